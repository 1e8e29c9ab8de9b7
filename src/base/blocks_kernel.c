/* Weights in blocks: written, read, and made panels of for the matrix product. Compiled once per instruction set;
 * every value is one product of f32, so all give the same bits.
 *
 * A run of 16 elements that begins at a multiple of 16 has one scale and whole bytes of codes. Matrices whose rows
 * are so many runs are read in vectors, all others element by element. */
#include "base/blocks.h"
#include "base/vector.h"

enum { RUN = 16 }; /* elements; a whole number of vectors */

typedef int32_t ints __attribute__((vector_size(4 * VECTOR)));
typedef signed char bytes __attribute__((vector_size(VECTOR)));
typedef bytes loose_bytes __attribute__((aligned(1), may_alias));

/* ---- writing ---------------------------------------------------------------------------------- */

/* The level nearest to each of x / scale, a product with 1 / scale as bitsandbytes has it; between two, the lower
 * one. */
static void write_nf4(const float *x, size_t n, float scale, uint8_t *codes) {
    float middle[PSOUP__NF4_LEVELS - 1];
    int32_t code[PSOUP__BLOCK + 1] = {0};
    for (int level = 0; level < PSOUP__NF4_LEVELS - 1; level++)
        middle[level] = (psoup__nf4_level[level] + psoup__nf4_level[level + 1]) * 0.5f;
    const bool plain = scale >= 0x1p-126f; /* the inverse of less overflows */
    const float inverse = plain ? 1.0f / scale : 0;
    for (size_t i = 0; i < n; i++) {
        const float v = plain ? x[i] * inverse : scale > 0 ? x[i] / scale : 0;
        for (int level = 0; level < PSOUP__NF4_LEVELS - 1; level++)
            code[i] += v > middle[level];
    }
    for (size_t i = 0; i < n; i += 2) /* a last one alone: the low half is 0 */
        codes[i / 2] = (uint8_t)(code[i] << 4 | code[i + 1]);
}

/* x · 127 / max|x|, to the nearest even; 1.5 · 2²³ leaves no bits behind the point. */
static void write_int8(const float *x, size_t n, float factor, uint8_t *codes) {
    for (size_t i = 0; i < n; i++)
        codes[i] = (uint8_t)(int8_t)(x[i] * factor + 0x1.8p23f - 0x1.8p23f);
}

static void write(psoup_dtype dtype, const float *in, size_t n, uint8_t *codes, float *scales) {
    for (size_t first = 0; first < n; first += PSOUP__BLOCK, scales++) {
        const size_t count = n - first < PSOUP__BLOCK ? n - first : PSOUP__BLOCK;
        const float *x = in + first;
        uint8_t *to = codes + psoup__block_bytes(dtype, first);
        uint32_t most = 0; /* magnitudes order as their bits do, NaN above all */
        for (size_t i = 0; i < count; i++) {
            uint32_t bits;
            memcpy(&bits, &x[i], 4);
            bits &= 0x7fffffffu;
            most = bits > most ? bits : most;
        }
        float magnitude;
        memcpy(&magnitude, &most, 4);
        const float scale = magnitude / 127.0f, limit = 0x1.020406p121f; /* 127 · more is infinite */
        const bool finite = most < 0x7f800000u;
        *scales = !finite ? magnitude - magnitude : dtype == PSOUP_NF4 ? magnitude : scale < limit ? scale : limit;
        if (!finite) {
            memset(to, 0, psoup__block_bytes(dtype, count)); /* 0 · NaN is NaN too */
        } else if (dtype == PSOUP_NF4) {
            write_nf4(x, count, magnitude, to);
        } else if (*scales < 0x1p-126f) { /* the inverse of less overflows */
            memset(to, 0, count);
            *scales = 0;
        } else {
            write_int8(x, count, 127.0f / magnitude, to);
        }
    }
}

/* ---- reading ---------------------------------------------------------------------------------- */

/* The levels of codes; what stands above their four bits is not looked at. */
INLINE vec levels(words code) {
#if defined(__AVX512F__)
    return _mm512_permutexvar_ps((__m512i)code, load(psoup__nf4_level));
#elif defined(__AVX2__)
    vec low = _mm256_permutevar8x32_ps(load(psoup__nf4_level), (__m256i)code);
    vec high = _mm256_permutevar8x32_ps(load(psoup__nf4_level + 8), (__m256i)code);
    return _mm256_blendv_ps(low, high, (vec)(code << 28)); /* by the sign: the code's highest bit */
#else
    vec out;
    for (int i = 0; i < VECTOR; i++)
        out[i] = psoup__nf4_level[code[i] & 15];
    return out;
#endif
}

/* VECTOR neighbours from `at` on, a multiple of VECTOR, in one block. */
INLINE vec neighbours(const psoup__blocks *b, size_t at, const psoup_dtype dtype) {
    const vec scale = broadcast(b->scales[at / PSOUP__BLOCK]);
    if (dtype == PSOUP_INT8) {
        const bytes code = *(const loose_bytes *)(b->codes + at);
        return __builtin_convertvector(code, vec) * scale;
    }
    const uint8_t *from = b->codes + at / 2;
    uint32_t four[2] = {0};
    memcpy(four, from, VECTOR / 2);
#if VECTOR == 16
    const words all = (words)_mm512_inserti64x4(_mm512_set1_epi32((int)four[0]), _mm256_set1_epi32((int)four[1]), 1);
    const words shift = {4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24};
#elif VECTOR == 8
    const words all = (words)_mm256_set1_epi32((int)four[0]);
    const words shift = {4, 0, 12, 8, 20, 16, 28, 24};
#else
    const words all = {four[0], four[0], four[0], four[0]};
    const words shift = {4, 0, 12, 8};
#endif
    return levels(all >> shift) * scale;
}

INLINE void read_as(const psoup__blocks *blocks, size_t at, size_t n, float *out, const psoup_dtype dtype) {
    for (; n > 0 && at % VECTOR != 0; at++, n--)
        *out++ = psoup__block_value(blocks, at);
    for (; n >= VECTOR; at += VECTOR, out += VECTOR, n -= VECTOR)
        store(out, neighbours(blocks, at, dtype));
    for (; n > 0; at++, n--)
        *out++ = psoup__block_value(blocks, at);
}

static void read(const psoup__blocks *blocks, size_t at, size_t n, float *out) {
    if (blocks->dtype == PSOUP_NF4)
        read_as(blocks, at, n, out, PSOUP_NF4);
    else
        read_as(blocks, at, n, out, PSOUP_INT8);
}

/* ---- panels ----------------------------------------------------------------------------------- */

/* B's rows are the matrix's: columns are neighbours. */
INLINE void pack_across(float *out, const psoup__blocks *b, int64_t line, int64_t k0, int64_t depth, int64_t j0,
                        int64_t columns, int64_t width, const psoup_dtype dtype) {
    for (int64_t p = 0; p < depth; p++, out += width) {
        const size_t at = (size_t)((k0 + p) * line + j0);
        int64_t j = 0;
        for (; j + VECTOR <= columns; j += VECTOR)
            store(out + j, neighbours(b, at + (size_t)j, dtype));
        for (; j < width; j++)
            out[j] = j < columns ? psoup__block_value(b, at + (size_t)j) : 0;
    }
}

/* The scales of depth k of VECTOR columns; 0 past the last. */
INLINE vec scales_of(const psoup__blocks *b, int64_t line, int64_t k, int64_t j, int64_t columns) {
    float scale[VECTOR] = {0};
    for (int64_t i = 0; i < VECTOR && i < columns; i++)
        scale[i] = b->scales[(size_t)((j + i) * line + k) / PSOUP__BLOCK];
    return load(scale);
}

/* Whether scales change at depth k, a multiple of a word's codes. */
INLINE bool is_new_block(int64_t line, int64_t k) {
    return k % (line % PSOUP__BLOCK == 0 ? PSOUP__BLOCK : RUN) == 0;
}

enum { WORD = 4 }; /* bytes */

INLINE int64_t in_word(const psoup_dtype dtype) {
    return dtype == PSOUP_NF4 ? 8 : 4;
}

/* Words of codes, n of each of `some` columns, transposed as they are: word q of all columns begins at
 * turned[q · VECTOR]. */
INLINE void turn(float *turned /* [VECTOR, VECTOR] */, const uint8_t *from, size_t line_bytes, int64_t some,
                 int64_t n) {
    if (n == VECTOR && some == VECTOR) {
        for (int64_t i = 0; i < VECTOR; i++) /* more streams than the hardware follows by itself */
            __builtin_prefetch(from + (size_t)i * line_bytes + 2 * VECTOR * WORD);
        transpose(turned, VECTOR, (const char *)from, line_bytes, PSOUP_F32);
        return;
    }
    uint8_t padded[VECTOR][VECTOR * WORD] = {{0}};
    for (int64_t i = 0; i < some; i++)
        memcpy(padded[i], from + (size_t)i * line_bytes, (size_t)n * WORD);
    transpose(turned, VECTOR, (const char *)padded, VECTOR * WORD, PSOUP_F32);
}

/* Code t of each word, in the order of depths, unscaled. A byte of NF4 has the even depth above the odd one. */
INLINE vec code_of(words word, const int t, const psoup_dtype dtype) {
    if (dtype == PSOUP_NF4)
        return levels(word >> (t / 2 * 8 + (t % 2 ? 0 : 4)));
    return __builtin_convertvector((ints)(word << (24 - 8 * t)) >> 24, vec);
}

/* B's columns are the matrix's rows: depths are neighbours. */
INLINE void pack_along(float *out, const psoup__blocks *b, int64_t line, int64_t k0, int64_t depth, int64_t j0,
                       int64_t columns, int64_t width, const psoup_dtype dtype) {
    const int64_t codes = in_word(dtype);
    const size_t line_bytes = psoup__block_bytes(dtype, (size_t)line);
    float turned[VECTOR * VECTOR];
    for (int64_t j = 0; j < columns; j += VECTOR) {
        const int64_t some = columns - j < VECTOR ? columns - j : VECTOR;
        const uint8_t *from = b->codes + psoup__block_bytes(dtype, (size_t)((j0 + j) * line + k0));
        vec scale = scales_of(b, line, k0, j0 + j, some);
        for (int64_t p = 0; p < depth; p += VECTOR * codes, from += VECTOR * WORD) {
            const int64_t left = (depth - p) / codes, n = left < VECTOR ? left : VECTOR;
            turn(turned, from, line_bytes, some, n);
            for (int64_t q = 0; q < n; q++) {
                const int64_t k = k0 + p + q * codes;
                const words word = (words)load(turned + q * VECTOR);
                float *to = out + (p + q * codes) * width + j;
                if (is_new_block(line, k))
                    scale = scales_of(b, line, k, j0 + j, some);
#pragma GCC unroll 8
                for (int t = 0; t < 8; t++)
                    if (t < codes)
                        store(to + t * width, code_of(word, t, dtype) * scale);
            }
        }
    }
}

/* Whether depths are neighbours, and begin with whole runs. */
static bool is_whole(const psoup__gemm_args *args) {
    return args->b_depth == NULL && args->b_row == 1 && args->b_col % RUN == 0 && args->k % RUN == 0;
}

INLINE void pack_as(float *out, const psoup__gemm_args *args, int64_t k0, int64_t depth, int64_t j0,
                    int64_t columns, const psoup_dtype dtype) {
    const psoup__blocks b = {dtype, args->b, args->b_scales};
    const int64_t width = (columns + VECTOR - 1) / VECTOR * VECTOR;
    const bool gathered = args->b_depth != NULL;
    if (is_whole(args) && k0 % RUN == 0) {
        pack_along(out, &b, args->b_col, k0, depth, j0, columns, width, dtype);
        return;
    }
    if (!gathered && args->b_col == 1 && args->b_row % RUN == 0 && j0 % RUN == 0) {
        pack_across(out, &b, args->b_row, k0, depth, j0, columns, width, dtype);
        return;
    }
    for (int64_t p = 0; p < depth; p++, out += width) {
        const int64_t row = (gathered ? args->b_depth[k0 + p] : k0 + p) * args->b_row;
        for (int64_t j = 0; j < width; j++)
            out[j] = j < columns ? psoup__block_value(&b, (size_t)(row + (j0 + j) * args->b_col)) : 0;
    }
}

static void pack(float *out, const psoup__gemm_args *args, int64_t k0, int64_t depth, int64_t j0, int64_t columns) {
    if (args->b_dtype == PSOUP_NF4)
        pack_as(out, args, k0, depth, j0, columns, PSOUP_NF4);
    else
        pack_as(out, args, k0, depth, j0, columns, PSOUP_INT8);
}

/* ---- few rows --------------------------------------------------------------------------------- */

#if defined(__AVX512F__) || defined(__aarch64__) /* as in gemm_kernel.c */
#define VECTORS 4
#else
#define VECTORS 2
#endif
enum { FEW = 4 };

/* Each value is made in a register and multiplied with all rows there: the same products and sums, in the same order, as
 * gemm_kernel.c's of a panel. */
INLINE void multiply_as(const psoup__gemm_args *args, float *const *c_rows, const float *const *a, const int rows,
                        int64_t j0, const psoup_dtype dtype) {
    const psoup__blocks b = {dtype, args->b, args->b_scales};
    const int64_t line = args->b_col, depth = args->k, step = args->a_col, codes = in_word(dtype);
    const size_t line_bytes = psoup__block_bytes(dtype, (size_t)line);
    const uint8_t *from = b.codes + psoup__block_bytes(dtype, (size_t)(j0 * line));
    float turned[VECTORS][VECTOR * VECTOR];
    vec c[FEW][VECTORS], scale[VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            c[i][v] = args->accumulate ? load(c_rows[i] + j0 + v * VECTOR) : (vec){0};
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++)
        scale[v] = (vec){0};
    for (int64_t p = 0; p < depth; p += VECTOR * codes, from += VECTOR * WORD) {
        const int64_t left = (depth - p) / codes, n = left < VECTOR ? left : VECTOR;
        for (int v = 0; v < VECTORS; v++)
            turn(turned[v], from + (size_t)v * VECTOR * line_bytes, line_bytes, VECTOR, n);
        for (int64_t q = 0; q < n; q++) {
            const int64_t k = p + q * codes;
            words word[VECTORS];
            if (is_new_block(line, k)) {
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    scale[v] = scales_of(&b, line, k, j0 + v * VECTOR, VECTOR);
            }
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                word[v] = (words)load(turned[v] + q * VECTOR);
#pragma GCC unroll 8
            for (int t = 0; t < 8; t++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    if (t >= codes)
                        continue;
                    const vec value = code_of(word[v], t, dtype) * scale[v];
#pragma GCC unroll 4
                    for (int i = 0; i < rows; i++)
                        c[i][v] = multiply_add(broadcast(a[i][(k + t) * step]), value, c[i][v]);
                }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            store(c_rows[i] + j0 + v * VECTOR, c[i][v]);
}

#define MULTIPLY(name, dtype)                                                                               \
    static void name(const psoup__gemm_args *args, float *const *c, const float *const *a, int64_t rows,    \
                     int64_t j0) {                                                                          \
        switch (rows) {                                                                                     \
        case 1: multiply_as(args, c, a, 1, j0, dtype); break;                                               \
        case 2: multiply_as(args, c, a, 2, j0, dtype); break;                                               \
        case 3: multiply_as(args, c, a, 3, j0, dtype); break;                                               \
        default: multiply_as(args, c, a, 4, j0, dtype); break;                                              \
        }                                                                                                   \
    }
MULTIPLY(multiply_nf4, PSOUP_NF4)
MULTIPLY(multiply_int8, PSOUP_INT8)

static void multiply(const psoup__gemm_args *args, float *const *c, const float *const *a, int64_t rows, int64_t j0) {
    if (args->b_dtype == PSOUP_NF4)
        multiply_nf4(args, c, a, rows, j0);
    else
        multiply_int8(args, c, a, rows, j0);
}

const psoup__block_kernels PSOUP__NAME(psoup__block_kernels) = {
    .write = write, .read = read, .pack = pack, .few = FEW, .is_whole = is_whole, .multiply = multiply,
};
