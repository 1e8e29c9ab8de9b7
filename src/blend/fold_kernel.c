/* A block of rows of base + B A, compiled once per instruction set: what base/gemm_kernel.c does for any
 * product, here for a depth so small that reading and rounding C would cost as much as the product.
 *
 * A tile's sums start from the base in its own dtype, walk the depth once in ascending order with one
 * multiply-add per element and depth (fused where the instruction set has it), and are rounded as they
 * are written: the bits of psoup__gemm started from the base in f32. */
#include "blend/blend.h"
#include "blend/vector.h"

#include <string.h>

#define ROWS 6 /* with 4 vectors: 24 sums of the 32 registers; with 2: 12 of 16 */
#if defined(__AVX512F__) || defined(__aarch64__)
#define VECTORS 4
#else
#define VECTORS 2
#endif
#define COLUMNS (VECTORS * VECTOR)
_Static_assert(PSOUP__FOLD_COLUMNS % COLUMNS == 0, "whole panels");

/* a · b + c */
INLINE vec multiply_add(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

INLINE void read_tile(vec c[ROWS][VECTORS], const char *in, int64_t stride, const int rows,
                      const psoup_dtype dtype) {
    const size_t size = dtype == PSOUP_F32 ? 4 : 2;
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (size_t v = 0; v < VECTORS; v++)
            c[i][v] = load_as(in + i * stride + v * VECTOR * size, dtype);
}

INLINE void write_tile(vec c[ROWS][VECTORS], char *out, int64_t stride, const int rows,
                       const psoup_dtype dtype, const bool stream) {
    const size_t size = dtype == PSOUP_F32 ? 4 : 2;
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (size_t v = 0; v < VECTORS; v += 2) {
            char *to = out + i * stride + v * VECTOR * size;
            if (stream) {
                stream_as(to, c[i][v], c[i][v + 1], dtype);
            } else {
                store_as(to, c[i][v], dtype);
                store_as(to + VECTOR * size, c[i][v + 1], dtype);
            }
        }
}

/* `rows`, a constant where this is inlined, times the panel of COLUMNS at `a`. Strides of in and out are in
 * bytes. */
INLINE void tile(const psoup__fold_strip *s, const float *a, const float *b, const char *in, char *out,
                 const int rows) {
    vec c[ROWS][VECTORS];
    const int64_t stride = s->in_stride;
    if (s->in_dtype == PSOUP_BF16)
        read_tile(c, in, stride, rows, PSOUP_BF16);
    else if (s->in_dtype == PSOUP_F32)
        read_tile(c, in, stride, rows, PSOUP_F32);
    else
        read_tile(c, in, stride, rows, PSOUP_F16);
    for (int64_t p = 0; p < s->depth; p++, a += COLUMNS) {
        vec row[VECTORS];
#pragma GCC unroll 4
        for (size_t v = 0; v < VECTORS; v++)
            row[v] = *(const loose_vec *)(const void *)(a + v * VECTOR);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            vec element = broadcast(b[i * PSOUP__FOLD_DEPTH + p]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                c[i][v] = multiply_add(element, row[v], c[i][v]);
        }
    }
    if (s->out_dtype == PSOUP_BF16 && s->stream)
        write_tile(c, out, s->out_stride, rows, PSOUP_BF16, true);
    else if (s->out_dtype == PSOUP_BF16)
        write_tile(c, out, s->out_stride, rows, PSOUP_BF16, false);
    else if (s->out_dtype == PSOUP_F32)
        write_tile(c, out, s->out_stride, rows, PSOUP_F32, false);
    else
        write_tile(c, out, s->out_stride, rows, PSOUP_F16, false);
}

/* Rows × whole panels, tile by tile along the rows of the base: lines are read and written whole. */
INLINE void walk_rows(const psoup__fold_strip *s, const float *b, const char *in, char *out, int64_t panels,
                      int64_t next, const int rows) {
    const size_t in_size = s->in_dtype == PSOUP_F32 ? 4 : 2, out_size = s->out_dtype == PSOUP_F32 ? 4 : 2;
    for (int64_t p = 0; p < panels; p++) {
        const char *from = in + (size_t)p * COLUMNS * in_size;
        for (int64_t i = ROWS; i < ROWS + next; i++) /* they come from far: ask before they are due */
            for (size_t line = 0; line < COLUMNS * in_size; line += 64)
                __builtin_prefetch(from + i * s->in_stride + line);
        tile(s, s->a + p * s->depth * COLUMNS, b, from, out + (size_t)p * COLUMNS * out_size, rows);
    }
}

static void walk(const psoup__fold_strip *s, int64_t panels) {
    const float *b = s->b;
    const char *in = s->in;
    char *out = s->out;
    int64_t rows = s->rows;
    for (; rows >= ROWS; rows -= ROWS) {
        const int64_t next = rows - ROWS < ROWS ? rows - ROWS : ROWS;
        walk_rows(s, b, in, out, panels, next, ROWS);
        b += ROWS * PSOUP__FOLD_DEPTH;
        in += ROWS * s->in_stride;
        out += ROWS * s->out_stride;
    }
    switch (rows) {
    case 5: walk_rows(s, b, in, out, panels, 0, 5); break;
    case 4: walk_rows(s, b, in, out, panels, 0, 4); break;
    case 3: walk_rows(s, b, in, out, panels, 0, 3); break;
    case 2: walk_rows(s, b, in, out, panels, 0, 2); break;
    case 1: walk_rows(s, b, in, out, panels, 0, 1); break;
    default: break;
    }
}

/* The last columns, less than a panel: through copies of whole width. */
static void walk_narrow(const psoup__fold_strip *s, int64_t column) {
    char in[ROWS * COLUMNS * 4], out[ROWS * COLUMNS * 4];
    const size_t in_size = s->in_dtype == PSOUP_F32 ? 4 : 2, out_size = s->out_dtype == PSOUP_F32 ? 4 : 2;
    const size_t columns = (size_t)(s->columns - column);
    psoup__fold_strip part = *s;
    part.a = s->a + column * s->depth;
    part.in = in;
    part.out = out;
    part.in_stride = (int64_t)(COLUMNS * in_size);
    part.out_stride = (int64_t)(COLUMNS * out_size);
    part.stream = false;
    memset(in, 0, sizeof in);
    for (int64_t first = 0; first < s->rows; first += ROWS) {
        part.rows = s->rows - first < ROWS ? s->rows - first : ROWS;
        part.b = s->b + first * PSOUP__FOLD_DEPTH;
        for (int64_t i = 0; i < part.rows; i++)
            memcpy(in + i * part.in_stride, s->in + (first + i) * s->in_stride + (size_t)column * in_size,
                   columns * in_size);
        walk(&part, 1);
        for (int64_t i = 0; i < part.rows; i++)
            memcpy(s->out + (first + i) * s->out_stride + (size_t)column * out_size,
                   out + i * part.out_stride, columns * out_size);
    }
}

static void strip(const psoup__fold_strip *s) {
    const int64_t whole = s->columns / COLUMNS;
    if (whole > 0)
        walk(s, whole);
    if (whole * COLUMNS < s->columns)
        walk_narrow(s, whole * COLUMNS);
#if defined(__x86_64__)
    if (s->stream)
        _mm_sfence();
#endif
}

/* Depths `at` … of `depth` into panels [depth, COLUMNS], the last padded with zeros. */
static void pack(float *out, const float *a, int64_t a_stride, int64_t at, int64_t rows, int64_t depth,
                 int64_t columns) {
    for (int64_t p = 0; p < rows; p++)
        for (int64_t c = 0; c < columns; c += COLUMNS) {
            float *to = out + c * depth + (at + p) * COLUMNS;
            const float *from = a + p * a_stride + c;
            if (columns - c >= COLUMNS) {
                memcpy(to, from, COLUMNS * sizeof *to);
            } else {
                memset(to, 0, COLUMNS * sizeof *to);
                memcpy(to, from, (size_t)(columns - c) * sizeof *to);
            }
        }
}

const psoup__fold_kernels PSOUP__NAME(psoup__fold_kernels) = {strip, pack};
