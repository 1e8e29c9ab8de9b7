/* The inner loops of the matrix product, compiled once per instruction set.
 *
 * A register tile holds ROWS × (VECTORS · VECTOR) sums and walks the depth once, in ascending order,
 * with one multiply-add per element and depth: fused where the instruction set has it, else a
 * product and a sum. Smaller tiles (fewer rows, fewer vectors) do exactly the same operations on
 * the elements they have, so an element's bits do not depend on the tile it falls into.
 */
#include "base/gemm.h"
#include "base/vector.h"

/* 24 sums of the 32 registers, or 12 of 16; the rest hold B and one element of A. */
#define ROWS 6
#if defined(__AVX512F__) || defined(__aarch64__)
#define VECTORS 4
#else
#define VECTORS 2
#endif
#define COLUMNS (VECTORS * VECTOR)
#if defined(__AVX512F__)
#define HIGH 16  /* sums beside one vector of B */
#define FAR 4096 /* bytes: B streams from memory (of 2 to 8 KiB the best; Zen 4) */
#else
#define HIGH 0
#endif
#define AHEAD 8 /* depths: B streams from the L2 cache, whose latency is about as many steps; more where each vector's
                 * depths follow one another */

/* c[i][first + …] of `rows` × `vectors`, both constants where this is inlined; asks ahead for a panel that is
 * `near`, and for the one at `next`, where it is not NULL, line by line. */
INLINE void tile(const psoup__gemm_strip *s, const float *const *a_rows, float *const *c_rows,
                 int64_t first, const int rows, const int vectors, const psoup_dtype dtype,
                 const char *next, bool near) {
    const size_t size = dtype == PSOUP_F32 ? 4 : 2;
    const float *a[ROWS];
    vec c[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
        a[i] = a_rows[i] + s->a_first * s->a_step;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            c[i][v] = s->resume ? load(c_rows[i] + first + v * VECTOR) : (vec){0};
    }
    const char *b = s->b;
    const size_t b_step = (size_t)s->b_step * size, b_vector = (size_t)s->b_vector * size;
    const size_t ahead = (s->b_vector == VECTOR ? AHEAD : AHEAD * VECTORS) * b_step;
    const int64_t a_step = s->a_step;
    int64_t at = 0;
    for (int64_t p = s->depth; p > 0; p--, at += a_step, b += b_step) {
        vec row[VECTORS];
        if (near) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                __builtin_prefetch(b + ahead + (size_t)v * b_vector);
        }
        if (next != NULL) {
#pragma GCC unroll 4
            for (size_t line = 0; line < (size_t)(vectors * VECTOR) * size; line += 64)
                __builtin_prefetch(next + line, 0, 2);
            next += (size_t)(vectors * VECTOR) * size;
        }
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            row[v] = load_as_f32(b + (size_t)v * b_vector, dtype);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            vec element = broadcast(a[i][at]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                c[i][v] = multiply_add(element, row[v], c[i][v]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            store(c_rows[i] + first + v * VECTOR, c[i][v]);
}

#define UNROLL 4 /* depths: then the turns of a loop over 256 or 384 depths are few enough for its end to be foreseen */

/* Keeps the compiler from an address of its own for each depth of an unrolled loop, for which there are no registers. */
#define STEP_BY_STEP(pointer, index) __asm__("" : "+r"(pointer), "+r"(index))

/* Asks for a row of C, which comes from far, and for where a row of A begins. */
INLINE void prefetch_below(const float *a, const float *c, const int vectors) {
    __builtin_prefetch(a);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++)
        __builtin_prefetch(c + v * VECTOR, 1);
}

/* Adds one depth to the sums of a tile. */
INLINE void add_depth(vec (*c)[VECTORS], const float *const *a, int64_t at, const float *b, int64_t b_vector,
                      const int vectors) {
    vec row[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++)
        row[v] = load(b + v * b_vector);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
        vec element = broadcast(a[i][at]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            c[i][v] = multiply_add(element, row[v], c[i][v]);
    }
}

/* A tile of ROWS with an f32 panel that flows without gaps, depth by depth (`dense`) or vector by vector; hardware sees
 * every other depth coming. Asks for the `below` rows of the tile below at intervals: at once they crowd out each other
 * (2048 × 2048 × 2048: 0.93 times as fast; Zen 5). Its functions stand apart, where nothing else wants registers. */
INLINE void flowing_tile(const psoup__gemm_strip *s, const float *const *a_rows, float *const *c_rows, int64_t first,
                         const int vectors, const bool dense, bool near, int64_t below) {
    const int64_t a_step = s->a_step, a_first = s->a_first * a_step;
    const float *a[ROWS];
    vec c[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++) {
        a[i] = a_rows[i] + a_first;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            c[i][v] = s->resume ? load(c_rows[i] + first + v * VECTOR) : (vec){0};
    }
    const float *b = s->b;
    const int64_t b_step = dense ? vectors * VECTOR : VECTOR, b_vector = dense ? VECTOR : s->b_vector;
    const int64_t ahead = !near ? 0 : dense ? AHEAD * b_step : AHEAD * VECTORS * b_step;
    const int64_t interval = (s->depth / UNROLL + ROWS - 1) / ROWS; /* turns */
    int64_t at = 0, asked = 0, p = s->depth;
    for (; asked + p / UNROLL < below; asked++) /* of more than there are turns */
        prefetch_below(a_rows[ROWS + asked] + a_first, c_rows[ROWS + asked] + first, vectors);
    while (p >= UNROLL) {
        if (asked < below) {
            prefetch_below(a_rows[ROWS + asked] + a_first, c_rows[ROWS + asked] + first, vectors);
            asked++;
        }
        int64_t turns = p / UNROLL < interval ? p / UNROLL : interval;
        for (p -= turns * UNROLL; turns > 0; turns--) {
#pragma GCC unroll 4
            for (int u = 0; u < UNROLL; u++, at += a_step, b += b_step) {
                STEP_BY_STEP(b, at);
                if (u % 2 == 0)
#pragma GCC unroll 4
                    for (int v = 0; v < vectors; v++)
                        __builtin_prefetch(b + ahead + v * b_vector);
                add_depth(c, a, at, b, b_vector, vectors);
            }
        }
    }
    for (; p > 0; p--, at += a_step, b += b_step)
        add_depth(c, a, at, b, b_vector, vectors);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            store(c_rows[i] + first + v * VECTOR, c[i][v]);
}

typedef void flowing_fn(const psoup__gemm_strip *s, const float *const *a, float *const *c, int64_t first, bool near,
                        int64_t below);

#define FLOWING(name, vectors, dense)                                                              \
    static __attribute__((noinline)) void name(const psoup__gemm_strip *s, const float *const *a,  \
                                               float *const *c, int64_t first, bool near,          \
                                               int64_t below) {                                    \
        flowing_tile(s, a, c, first, vectors, dense, near, below);                                 \
    }
FLOWING(dense_2, 2, true)
FLOWING(apart_2, 2, false)
#if VECTORS == 4
FLOWING(dense_3, 3, true)
FLOWING(apart_3, 3, false)
FLOWING(dense_4, 4, true)
FLOWING(apart_4, 4, false)
#endif

static flowing_fn *const flowing[VECTORS][2] = {
    {NULL, NULL}, {apart_2, dense_2},
#if VECTORS == 4
    {apart_3, dense_3}, {apart_4, dense_4},
#endif
};

/* Which of them multiplies with the strip's panel; or NULL. */
INLINE flowing_fn *find_flowing(const psoup__gemm_strip *s, const int vectors, const psoup_dtype dtype) {
    if (dtype != PSOUP_F32 || vectors < 2)
        return NULL;
    if (s->b_vector == VECTOR)
        return s->b_step == vectors * VECTOR ? flowing[vectors - 1][true] : NULL;
    return s->b_step == VECTOR ? flowing[vectors - 1][false] : NULL;
}

/* All rows of a strip whose columns are whole vectors. */
INLINE void walk_rows(const psoup__gemm_strip *s, const float *const *a, float *const *c,
                      int64_t first, int64_t rows, const int vectors, const psoup_dtype dtype) {
    /* The first of several tiles fetches the panel from afar, where the hardware's own prefetcher does better
     * undisturbed (16 rows: generation 1.05 times as fast; Zen 4). */
    bool near = rows <= ROWS;
    flowing_fn *const flows = find_flowing(s, vectors, dtype);
    for (; rows >= ROWS; rows -= ROWS, a += ROWS, c += ROWS, near = true) {
        const int64_t next = rows - ROWS < ROWS ? rows - ROWS : ROWS;
        if (flows != NULL && (rows > ROWS || s->next == NULL)) {
            flows(s, a, c, first, near, next);
            continue;
        }
        for (int64_t i = ROWS; i < ROWS + next; i++) /* C comes from far; ask before it is due */
            for (int v = 0; v < vectors; v++)
                __builtin_prefetch(c[i] + first + v * VECTOR, 1);
        tile(s, a, c, first, ROWS, vectors, dtype, rows == ROWS ? s->next : NULL, near);
    }
    switch (rows) {
    case 5: tile(s, a, c, first, 5, vectors, dtype, s->next, near); break;
    case 4: tile(s, a, c, first, 4, vectors, dtype, s->next, near); break;
    case 3: tile(s, a, c, first, 3, vectors, dtype, s->next, near); break;
    case 2: tile(s, a, c, first, 2, vectors, dtype, s->next, near); break;
    case 1: tile(s, a, c, first, 1, vectors, dtype, s->next, near); break;
    default: break;
    }
}

#if HIGH > 0
/* All columns of a strip, one vector after the other, of as many rows as `rows`, which is a constant where this is
 * inlined, or fewer. Each value of B is read once, at an even pace that memory keeps up with; the first of several
 * tiles of ROWS would wait for it, and the others leave it idle. */
INLINE void high_tiles(const psoup__gemm_strip *s, const int rows, const psoup_dtype dtype) {
    const size_t size = dtype == PSOUP_F32 ? 4 : 2, b_step = (size_t)s->b_step * size;
    for (int64_t v = 0; v * VECTOR < s->columns; v++) {
        const char *b = (const char *)s->b + (size_t)(v * s->b_vector) * size;
        const float *a = s->turned;
        const int64_t first = s->c_first + v * VECTOR;
        vec c[HIGH];
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++)
            c[i] = s->resume && i < s->rows ? load(s->c[i] + first) : (vec){0};
        for (int64_t p = s->depth; p > 0; p--, a += HIGH, b += b_step) {
            __builtin_prefetch(b + FAR);
            const vec row = load_as_f32(b, dtype);
#pragma GCC unroll 16
            for (int i = 0; i < rows; i++)
                c[i] = multiply_add(broadcast(a[i]), row, c[i]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++)
            if (i < s->rows)
                store(s->c[i] + first, c[i]);
    }
}

INLINE void walk_high(const psoup__gemm_strip *s, const psoup_dtype dtype) {
    if (s->rows <= HIGH / 2)
        high_tiles(s, HIGH / 2, dtype);
    else if (s->rows <= HIGH * 3 / 4)
        high_tiles(s, HIGH * 3 / 4, dtype);
    else
        high_tiles(s, HIGH, dtype);
}

static void multiply_high(const psoup__gemm_strip *s) {
    switch (s->b_dtype) {
    case PSOUP_F32: walk_high(s, PSOUP_F32); break;
    case PSOUP_F16: walk_high(s, PSOUP_F16); break;
    default: walk_high(s, PSOUP_BF16); break;
    }
}

static void turn_a(float *out, const float *const *a, int64_t a_step, int64_t rows, int64_t depth) {
    int64_t p = 0;
    const int64_t line = rows > 1 ? a[1] - a[0] : 0;
    bool even = a_step == 1 && rows == HIGH;
    for (int64_t i = 1; i < rows; i++)
        even &= a[i] - a[i - 1] == line;
    for (; even && p + VECTOR <= depth; p += VECTOR)
        transpose(out + p * HIGH, HIGH, (const char *)(a[0] + p), (size_t)line * sizeof(float), PSOUP_F32);
    for (; p < depth; p++)
        for (int64_t i = 0; i < HIGH; i++)
            out[p * HIGH + i] = a[i < rows ? i : rows - 1][p * a_step];
}
#endif

typedef void walk_fn(const psoup__gemm_strip *s, const float *const *a, float *const *c,
                     int64_t first, int64_t rows);

#define WALK(name, vectors, dtype)                                                                 \
    static void name(const psoup__gemm_strip *s, const float *const *a, float *const *c,           \
                     int64_t first, int64_t rows) {                                                \
        walk_rows(s, a, c, first, rows, vectors, dtype);                                           \
    }
WALK(walk_f32_1, 1, PSOUP_F32)
WALK(walk_f16_1, 1, PSOUP_F16)
WALK(walk_bf16_1, 1, PSOUP_BF16)
WALK(walk_f32_2, 2, PSOUP_F32)
WALK(walk_f16_2, 2, PSOUP_F16)
WALK(walk_bf16_2, 2, PSOUP_BF16)
#if VECTORS == 4
WALK(walk_f32_3, 3, PSOUP_F32)
WALK(walk_f16_3, 3, PSOUP_F16)
WALK(walk_bf16_3, 3, PSOUP_BF16)
WALK(walk_f32_4, 4, PSOUP_F32)
WALK(walk_f16_4, 4, PSOUP_F16)
WALK(walk_bf16_4, 4, PSOUP_BF16)
#endif

static walk_fn *const walks[VECTORS][3] = {
    {walk_f32_1, walk_f16_1, walk_bf16_1}, {walk_f32_2, walk_f16_2, walk_bf16_2},
#if VECTORS == 4
    {walk_f32_3, walk_f16_3, walk_bf16_3}, {walk_f32_4, walk_f16_4, walk_bf16_4},
#endif
};
_Static_assert(PSOUP_F32 == 0 && PSOUP_F16 == 1 && PSOUP_BF16 == 2, "the order of `walks`");

static void multiply(const psoup__gemm_strip *s) {
    int64_t vectors = (s->columns + VECTOR - 1) / VECTOR;
#if HIGH > 0
    if (s->turned != NULL && s->columns == vectors * VECTOR) {
        multiply_high(s);
        return;
    }
#endif
    walk_fn *walk = walks[vectors - 1][s->b_dtype];
    if (s->columns == vectors * VECTOR) {
        walk(s, s->a, s->c, s->c_first, s->rows);
        return;
    }
    /* A vector would reach beyond the columns of C: a copy takes its place. */
    float copy[ROWS][COLUMNS];
    float *c[ROWS];
    memset(copy, 0, sizeof copy);
    for (int64_t i = 0; i < ROWS; i++)
        c[i] = copy[i];
    size_t bytes = (size_t)s->columns * sizeof(float);
    for (int64_t i0 = 0; i0 < s->rows; i0 += ROWS) {
        int64_t rows = s->rows - i0 < ROWS ? s->rows - i0 : ROWS;
        for (int64_t i = 0; s->resume && i < rows; i++)
            memcpy(copy[i], s->c[i0 + i] + s->c_first, bytes);
        walk(s, s->a + i0, c, 0, rows);
        for (int64_t i = 0; i < rows; i++)
            memcpy(s->c[i0 + i] + s->c_first, copy[i], bytes);
    }
}

/* ---- packing -------------------------------------------------------------------------------- */

/* What element (i, p) of A is multiplied by, apart from a_scale by depth. */
static float row_factor(const psoup__gemm_args *args, int64_t row) {
    if (args->a_scale == NULL || args->a_scale_by_depth)
        return args->alpha;
    return args->a_scale[row * args->a_scale_stride] * args->alpha;
}

static void pack_a(float *out, const float **a, int64_t *step, const psoup__gemm_args *args,
                   int64_t i0, int64_t rows, int64_t k0, int64_t depth) {
    const bool by_depth = args->a_scale != NULL && args->a_scale_by_depth;
    const bool across = args->a_row == 1 && args->a_col != 1 && args->a_rows == NULL;
    const int32_t *gather = args->a_depth == NULL ? NULL : args->a_depth + k0;
    if (!across) { /* row by row */
        *step = 1;
        for (int64_t i = 0; i < rows; i++, out += depth) {
            int64_t row = args->a_rows == NULL ? i0 + i : args->a_rows[i0 + i];
            const float *in = args->a + row * args->a_row;
            const float factor = row_factor(args, row);
            a[i] = out;
            if (gather != NULL) {
                for (int64_t p = 0; p < depth; p++)
                    out[p] = in[gather[p] * args->a_col];
            } else if (args->a_col == 1 && !by_depth) { /* a loop costs less than a call where the depth is a rank */
                for (int64_t p = 0; p < depth; p++)
                    out[p] = in[k0 + p] * factor;
                continue;
            } else {
                for (int64_t p = 0; p < depth; p++)
                    out[p] = in[(k0 + p) * args->a_col];
            }
            if (by_depth) {
                for (int64_t p = 0; p < depth; p++) {
                    int64_t at = gather == NULL ? k0 + p : gather[p];
                    out[p] *= args->a_scale[at * args->a_scale_stride] * factor;
                }
            } else if (factor != 1.0f) {
                for (int64_t p = 0; p < depth; p++)
                    out[p] *= factor;
            }
        }
        return;
    }
    *step = ROWS; /* neighbouring rows are neighbours in memory: keep them so */
    for (int64_t r = 0; r < rows; r += ROWS, out += ROWS * depth) {
        int64_t count = rows - r < ROWS ? rows - r : ROWS;
        float factor[ROWS];
        for (int64_t i = 0; i < count; i++) {
            a[r + i] = out + i;
            factor[i] = row_factor(args, i0 + r + i);
        }
        const bool scaled = args->a_scale != NULL || args->alpha != 1.0f;
        for (int64_t p = 0; p < depth; p++) {
            int64_t at = gather == NULL ? k0 + p : gather[p];
            const float *in = args->a + at * args->a_col + i0 + r;
            float *to = out + p * ROWS;
            if (count == ROWS)
                memcpy(to, in, ROWS * sizeof(float));
            else
                memcpy(to, in, (size_t)count * sizeof(float));
            if (by_depth) {
                float s = args->a_scale[at * args->a_scale_stride] * args->alpha;
                for (int64_t i = 0; i < count; i++)
                    to[i] *= s;
            } else if (scaled) {
                for (int64_t i = 0; i < count; i++)
                    to[i] *= factor[i];
            }
        }
    }
}

INLINE int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* One element of B, of any alignment. */
INLINE float element_as_f32(const char *from, psoup_dtype dtype) {
    char padded[4 * VECTOR] = {0};
    memcpy(padded, from, dtype == PSOUP_F32 ? 4 : 2);
    return load_as_f32(padded, dtype)[0];
}

INLINE void pack_b_as(float *out, const psoup__gemm_source *source, int64_t k0, int64_t depth,
                      int64_t j0, int64_t columns, const psoup_dtype dtype) {
    const int64_t size = dtype == PSOUP_F32 ? 4 : 2;
    const int64_t row = source->b_row * size, col = source->b_col * size;
    const int64_t width = (columns + VECTOR - 1) / VECTOR * VECTOR;
    const char *b = (const char *)source->b + j0 * col;
    const int32_t *gather = source->b_depth == NULL ? NULL : source->b_depth + k0;
    int64_t p = 0;
    /* Narrow ones as well: an adapter's factors, packed at every pass, are as narrow as its rank. */
    if (dtype == PSOUP_F32 && source->b_row == 1 && source->b_col != 1 && gather == NULL) {
        for (; p < depth; p += VECTOR)
            for (int64_t j = 0; j < width; j += VECTOR) {
                const char *from = b + j * col + (k0 + p) * size;
                if (j + VECTOR <= columns && p + VECTOR <= depth)
                    transpose(out + p * width + j, width, from, (size_t)col, dtype);
                else
                    transpose_some(out + p * width + j, width, from, (size_t)col, smaller(columns - j, VECTOR),
                                   smaller(depth - p, VECTOR));
            }
        return;
    }
    if (source->b_row == 1 && source->b_col != 1 && gather == NULL) {
        int64_t whole = columns / VECTOR * VECTOR;
        for (; p + VECTOR <= depth; p += VECTOR) {
            float *to = out + p * width;
            for (int64_t j = 0; j < whole; j += VECTOR)
                transpose(to + j, width, b + j * col + (k0 + p) * size, (size_t)col, dtype);
            for (int64_t q = 0; q < VECTOR; q++)
                for (int64_t j = whole; j < width; j++)
                    to[q * width + j] =
                        j < columns ? element_as_f32(b + j * col + (k0 + p + q) * size, dtype) : 0;
        }
    }
    for (; p < depth; p++) {
        const char *from = b + (gather == NULL ? k0 + p : gather[p]) * row;
        float *to = out + p * width;
        int64_t j = 0;
        if (source->b_col == 1)
            for (; j + VECTOR <= columns; j += VECTOR)
                store(to + j, load_as_f32(from + j * size, dtype));
        if (source->b_col == 1 && dtype == PSOUP_F32) {
            if (j < columns)
                store(to + j, load_some(from + j * size, columns - j));
            continue;
        }
        for (; j < columns; j++)
            to[j] = element_as_f32(from + j * col, dtype);
        for (; j < width; j++)
            to[j] = 0;
    }
}

static void pack_b(float *out, const psoup__gemm_source *source, int64_t k0, int64_t depth,
                   int64_t j0, int64_t columns) {
    switch (source->dtype) {
    case PSOUP_F32: pack_b_as(out, source, k0, depth, j0, columns, PSOUP_F32); break;
    case PSOUP_F16: pack_b_as(out, source, k0, depth, j0, columns, PSOUP_F16); break;
    default: pack_b_as(out, source, k0, depth, j0, columns, PSOUP_BF16); break;
    }
}

const psoup__gemm_kernels PSOUP__NAME(psoup__gemm_kernels) = {
    .rows = ROWS,
    .high = HIGH,
    .columns = COLUMNS,
    .vector = VECTOR,
    .multiply = multiply,
    .pack_a = pack_a,
#if HIGH > 0
    .turn_a = turn_a,
#endif
    .pack_b = pack_b,
};
