/* cuda/interpolate.h: weighted sums of tensors, adapters folded into weights, rows copied. See kernels.h;
 * what they compute is said in psoup/merge.h. Strides are in bytes. */
#ifndef PSOUP__INTERPOLATE_H
#define PSOUP__INTERPOLATE_H

#include <stdint.h>

#include "../include/psoup/common.h" /* psoup_dtype */

enum {
    PSOUP__SUM_THREADS = 256,
    PSOUP__SUM_MOST = 8,      /* inputs of the kernels of one dtype */
    PSOUP__SUM_ANY_TILE = 256, /* elements of a row that a warp of the other sums */
    PSOUP__TERMS = 32,        /* that travel with a kernel's struct; more are staged */
    PSOUP__FOLD_THREADS = 256,
    PSOUP__FOLD_TILE_ROWS = 64,
    PSOUP__FOLD_TILE_COLUMNS = 128
};
/* 16-byte packs that a thread sums at a time, so that it waits for about eight loads whatever n is. */
#define PSOUP__SUM_PACKS(n) ((n) <= 2 ? 4 : (n) <= 4 ? 2 : 1)

/* Of one dtype of 16 or 32 bits, n inputs to a kernel of that n: everything lies at multiples of 16 bytes. A
 * tile is SUM_THREADS · SUM_PACKS packs of a row, the last of a row what is left of it. */
typedef struct psoup__sum_few_args {
    char *out;
    const char *in[PSOUP__SUM_MOST];
    uint64_t out_stride, stride[PSOUP__SUM_MOST];
    float weight[PSOUP__SUM_MOST];
    uint64_t packs;   /* whole ones of a row */
    uint32_t rest;    /* elements after them */
    uint32_t across;  /* tiles of a row, at least 1 */
    uint32_t tiles;   /* of all rows, below 2³¹ */
} psoup__sum_few_args;

typedef struct psoup__sum_term {
    const char *in;
    uint64_t stride;
    float weight;
    int32_t dtype; /* psoup_dtype */
} psoup__sum_term;

/* Of any dtypes, any n and any multiples of an element. */
typedef struct psoup__sum_any_args {
    char *out;
    const psoup__sum_term *staged; /* [n], or NULL: they are in `term` */
    uint64_t out_stride, columns;
    uint64_t across, tiles; /* tiles of a row; of all */
    int32_t n, out_dtype;
    psoup__sum_term term[PSOUP__TERMS];
} psoup__sum_any_args;

typedef struct psoup__fold_factor {
    const float *a; /* [rank, ·]: the slice's first column */
    const float *b; /* [·, rank]: its first row */
    int32_t rank;
    float weight; /* w · s */
} psoup__fold_factor;

/* out = base + Σ weight · B A, a block to a tile: blocks = across · ⌈rows / FOLD_TILE_ROWS⌉. */
typedef struct psoup__fold_tiles_args {
    char *out;
    const char *base;
    const psoup__fold_factor *staged; /* [n], or NULL: they are in `factor` */
    uint64_t out_stride, base_stride;
    int64_t a_stride; /* elements */
    int32_t rows, columns, across, n;
    int32_t out_dtype, base_dtype;
    int32_t wide; /* four elements of out and of base lie at multiples of their size */
    psoup__fold_factor factor[PSOUP__TERMS];
} psoup__fold_tiles_args;

/* rows × units of 1 to 16 bytes. */
typedef struct psoup__copy_rows_args {
    char *out;
    const char *in;
    uint64_t out_stride, in_stride, rows, units;
    int32_t unit;
} psoup__copy_rows_args;

#define PSOUP__SUM_KERNELS(X, dtype) \
    X(sum_##dtype##_1, sum_few) \
    X(sum_##dtype##_2, sum_few) \
    X(sum_##dtype##_3, sum_few) \
    X(sum_##dtype##_4, sum_few) \
    X(sum_##dtype##_5, sum_few) \
    X(sum_##dtype##_6, sum_few) \
    X(sum_##dtype##_7, sum_few) \
    X(sum_##dtype##_8, sum_few)

#define PSOUP__INTERPOLATE_KERNELS(X) \
    PSOUP__SUM_KERNELS(X, f32) \
    PSOUP__SUM_KERNELS(X, f16) \
    PSOUP__SUM_KERNELS(X, bf16) \
    X(sum_any, sum_any) \
    X(fold_f32, fold_tiles) \
    X(fold_f16, fold_tiles) \
    X(fold_bf16, fold_tiles) \
    X(fold_any, fold_tiles) \
    X(copy_rows, copy_rows)

#endif
