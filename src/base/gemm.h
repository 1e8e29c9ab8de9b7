/* src/base/gemm.h: between gemm.c, which plans and schedules, gemm_pack.c, and gemm_kernel.c, which is compiled
 * once per instruction set and touches the numbers. Nobody else includes it.
 */
#ifndef PSOUP__GEMM_H
#define PSOUP__GEMM_H

#include "base/base.h"

/* A panel of B holds `columns` neighbouring columns of B, depth by depth. Only the last panel of a
 * matrix may be narrower; its width is then rounded up to whole vectors and filled with zeros. */

/* One panel times some rows of A, over one block of the depth. */
typedef struct psoup__gemm_strip {
    int64_t rows, columns, depth;
    const float *const *a; /* [rows]; row i, depth p: a[i][(a_first + p) · a_step] */
    int64_t a_first, a_step;
    const void *b; /* [depth, whole vectors], rows b_step elements apart, of any alignment */
    int64_t b_step;
    psoup_dtype b_dtype;
    float *const *c; /* [rows]; row i, column j: c[i][c_first + j] */
    int64_t c_first;
    bool resume; /* the sums start from C, else from 0 */
    const char *next; /* the panel that comes after this one, asked for meanwhile; or NULL */
} psoup__gemm_strip;

/* What to read of B: rows `b_row` and columns `b_col` elements apart, of any alignment. */
typedef struct psoup__gemm_source {
    const void *b;
    psoup_dtype dtype;
    int64_t b_row, b_col;
    const int32_t *b_depth; /* NULL, or which row each depth reads */
} psoup__gemm_source;

typedef struct psoup__gemm_kernels {
    int64_t rows;    /* of A in one register tile */
    int64_t columns; /* of B in one panel */
    int64_t vector;  /* floats in one vector */
    void (*multiply)(const psoup__gemm_strip *strip);
    /* Copies depths [k0, k0 + depth) of rows [i0, i0 + rows) of A, scaled, to `out`, and points
     * a[i][p · *step] at them. out holds rows · depth floats. */
    void (*pack_a)(float *out, const float **a /* [rows] */, int64_t *step,
                   const psoup__gemm_args *args, int64_t i0, int64_t rows, int64_t k0,
                   int64_t depth);
    /* Copies depths [k0, k0 + depth) of columns [j0, j0 + columns) of B as f32 to a panel. */
    void (*pack_b)(float *out /* [depth, whole vectors] */, const psoup__gemm_source *source,
                   int64_t k0, int64_t depth, int64_t j0, int64_t columns);
} psoup__gemm_kernels;

extern const psoup__gemm_kernels psoup__gemm_kernels_generic;
#if defined(__x86_64__)
extern const psoup__gemm_kernels psoup__gemm_kernels_avx2;
extern const psoup__gemm_kernels psoup__gemm_kernels_avx512;
#endif
/* gemm_pack.c */
const psoup__gemm_kernels *psoup__gemm_kernels_of(const psoup_context *context);

#endif
