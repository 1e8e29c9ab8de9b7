/* src/base/gemm.h: between gemm.c, which plans and schedules, gemm_space.c, gemm_pack.c, and gemm_kernel.c, which
 * is compiled once per instruction set and touches the numbers. Nobody else includes it.
 */
#ifndef PSOUP__GEMM_H
#define PSOUP__GEMM_H

#include "base/base.h"

#include <stdatomic.h>

/* A panel of B holds `columns` neighbouring columns of B, depth by depth; one of a B packed ahead, vector by vector,
 * each over all depths. Only the last panel of a matrix may be narrower; its width is then rounded up to whole vectors
 * and filled with zeros. */

/* One panel times some rows of A, over one block of the depth. */
typedef struct psoup__gemm_strip {
    int64_t rows, columns, depth;
    const float *const *a; /* [rows]; row i, depth p: a[i][(a_first + p) · a_step] */
    int64_t a_first, a_step;
    const float *turned; /* the same once more, [depth, kernels' high], the depth being all there is; or NULL */
    const void *b; /* [depth, whole vectors], rows b_step elements apart, of any alignment */
    int64_t b_step, b_vector; /* b_vector: from one vector of a row to the next */
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
    int64_t high;    /* of A at most in one that is a single vector wide; 0: there is none */
    int64_t columns; /* of B in one panel */
    int64_t vector;  /* floats in one vector */
    void (*multiply)(const psoup__gemm_strip *strip);
    /* Copies depths [k0, k0 + depth) of rows [i0, i0 + rows) of A, scaled, to `out`, and points
     * a[i][p · *step] at them. out holds rows · depth floats. */
    void (*pack_a)(float *out, const float **a /* [rows] */, int64_t *step,
                   const psoup__gemm_args *args, int64_t i0, int64_t rows, int64_t k0,
                   int64_t depth);
    /* Copies at most `high` rows for a strip's `turned`. */
    void (*turn_a)(float *out /* [depth, high] */, const float *const *a /* [rows] */, int64_t a_step, int64_t rows,
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
/* ---- gemm_space.c */

enum {
    PSOUP__GEMM_DEPTH = 384, /* of one step: a panel of B [384, 64] is 96 KiB, a fraction of an L2 cache */
    PSOUP__GEMM_ROWS = 96    /* most rows of A in one block: 144 KiB */
};

typedef struct psoup__gemm_worker {
    _Alignas(64) const psoup__gemm_args *turned; /* whose A, turned over, lies in the worker's block; or NULL */
    atomic_size_t next; /* tile of its share, where they are shared out */
    size_t end;
} psoup__gemm_worker;

/* One call's buffers. Calls run at once where handles do, and from inside parallel tasks. */
typedef struct psoup__gemm_slot {
    bool busy;
    int workers;
    psoup__gemm_worker *worker; /* [workers] */
    float *b;                   /* [b_size] panels */
    size_t b_size;
    float *a;     /* [workers, PSOUP__GEMM_ROWS · PSOUP__GEMM_DEPTH] blocks */
    float *panel; /* [workers, PSOUP__GEMM_DEPTH · columns] one panel of a packed 16-bit B, or one in blocks, as f32 */
} psoup__gemm_slot;

/* A free slot, the wide one only where it is asked for and free. Waits when all are taken; who has
 * one waits for no other, so one comes free. */
psoup__gemm_slot *psoup__gemm_take(struct psoup__gemm_space *space, bool wide);
void psoup__gemm_give(struct psoup__gemm_space *space, psoup__gemm_slot *slot);

/* ---- gemm_pack.c */

const psoup__gemm_kernels *psoup__gemm_kernels_of(const psoup_context *context);

#endif
