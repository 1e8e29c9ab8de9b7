/* cuda/linear_mix.h: the adapters' part of a linear layer. See kernels.h and linear_mix.cuh.
 *
 * Kernels end in the dtype that products are taken in; `_wide` ones read x (or dy) as f32 and round it, the
 * others find it rounded. "a": the factor is laid out as A, [rank, width]; "b": as B, [width, rank].
 */
#ifndef PSOUP__LINEAR_MIX_H
#define PSOUP__LINEAR_MIX_H

#include <stdint.h>

enum {
    PSOUP__MIX_THREADS = 128,
    PSOUP__MIX_GROUP = 32,     /* adapters of one launch */
    PSOUP__MIX_PARTS = 4,      /* linears of one launch of expand */
    PSOUP__MIX_ROWS = 64,      /* of a tile of shrink and expand, */
    PSOUP__MIX_FEW = 16,       /* or of expand_few; */
    PSOUP__MIX_FEW_USES = 4,   /* most that an adapter of shrink_few has */
    PSOUP__MIX_RANKS = 64,     /* of a tile of shrink and gradient: more ranks are more tiles */
    PSOUP__MIX_COLUMNS = 64,   /* of a tile of expand */
    PSOUP__MIX_GRADIENT_COLUMNS = 128,
    PSOUP__MIX_CHUNK = 512,    /* uses of an adapter that one block of gradient adds up */
    PSOUP__MIX_SLOT = 4096,    /* floats that a block of shrink leaves for the last one, and */
    PSOUP__MIX_GRADIENT_SLOT = 8192,
    PSOUP__MIX_DBIAS_COLUMNS = 32, /* of a block of dbias, whose warps share the rows */
    PSOUP__MIX_DBIAS_THREADS = 1024
};

/* One adapter of a launch: those that nobody uses, or of rank 0, are left out. */
typedef struct psoup__mix_adapter {
    const float *factor; /* A or B */
    float *u;            /* [uses, rank]: x Aᵀ, or dy B */
    float *gradient;     /* dA or dB, added to; of dweight: du, read */
    const int32_t *rows; /* [uses], ascending */
    float scale;
    int32_t uses, rank;
    int32_t column;      /* of mix->weight */
} psoup__mix_adapter;

/* n numbers, rounded. */
typedef struct psoup__mix_cast_args {
    void *out;
    const float *in;
    uint64_t n;
} psoup__mix_cast_args;

/* u = x · factor, or its transpose, for the rows of each adapter. Blocks (tile, split): a tile is ROWS uses
 * and RANKS ranks of one adapter, a split `slice` columns of x. shrink_few: a tile is one rank, x is f32 and
 * not split. */
typedef struct psoup__mix_shrink_args {
    psoup__mix_adapter adapter[PSOUP__MIX_GROUP];
    const void *x;                       /* [rows, width] */
    float *slots;                        /* [tiles][splits][SLOT] */
    uint32_t *counters;                  /* [tiles], zeros before and after */
    int32_t tiles[PSOUP__MIX_GROUP + 1]; /* where each adapter's begin */
    int32_t width, splits, slice;
} psoup__mix_shrink_args;

/* One linear's y and its adapters, adapter[first … first + n − 1]. */
typedef struct psoup__mix_part {
    float *y;          /* [rows, width] */
    const float *bias; /* [width] or NULL */
    int32_t first, n, width, spare;
} psoup__mix_part;

/* y = (y, or bias) + Σ weight · scale · u · factor, adapters in order. Blocks (tile of ROWS or FEW rows, `span`
 * tiles of COLUMNS columns, part). */
typedef struct psoup__mix_expand_args {
    psoup__mix_adapter adapter[PSOUP__MIX_GROUP];
    psoup__mix_part part[PSOUP__MIX_PARTS];
    const float *weight; /* [rows, weights] */
    int32_t rows, weights, span;
    int32_t add;         /* to y, or overwrite it */
} psoup__mix_expand_args;

/* Rows of factors: u_i = Σ_j weight_j · u_j for each adapter i of the row; their ranks are one. A warp for each of
 * `rows` rows from row0 on. Where the adapters take several launches, those of `gather` add to `sums`, which one of
 * them begins, and those of `spread` come after; else one launch does both. */
typedef struct psoup__mix_pool_args {
    psoup__mix_adapter adapter[PSOUP__MIX_GROUP];
    float *sums;            /* [rows, most] */
    const float *weight;    /* [rows of all, weights] */
    const int32_t *factors; /* [rows of all] */
    int32_t n, row0, rows, weights;
    int32_t most;           /* ranks */
    int32_t gather, begin, spread;
} psoup__mix_pool_args;

/* gradient += Σ over uses (weight · scale · u)ᵀ z. Blocks (tile, chunk): a tile is GRADIENT_COLUMNS columns
 * and RANKS ranks of one adapter, a chunk CHUNK uses, beginning with chunk `chunk`. */
typedef struct psoup__mix_gradient_args {
    psoup__mix_adapter adapter[PSOUP__MIX_GROUP];
    const void *z;       /* [rows, width]: x or dy */
    const float *weight; /* [rows, weights] */
    float *slots;        /* [tiles][chunks][GRADIENT_SLOT] */
    uint32_t *counters;  /* [tiles] */
    int32_t tiles[PSOUP__MIX_GROUP + 1];
    int32_t width, weights, chunk;
    int32_t b_layout;    /* the gradient is one of B */
    int32_t spare;
} psoup__mix_gradient_args;

/* dweight[row][column] += scale · <du, u>: a warp for each use. `pooled`: of rows of factors alone, whose weights of
 * 0 get none. */
typedef struct psoup__mix_dweight_args {
    psoup__mix_adapter adapter[PSOUP__MIX_GROUP];
    float *dweight;                     /* [rows, weights] */
    const float *weight;                /* [rows, weights] */
    const int32_t *factors;             /* [rows] or NULL */
    int32_t uses[PSOUP__MIX_GROUP + 1]; /* where each adapter's begin */
    int32_t n, weights, pooled;
} psoup__mix_dweight_args;

typedef struct psoup__mix_dbias_args {
    float *dbias;    /* [out], added to */
    const float *dy; /* [rows, out] */
    int32_t rows, out;
} psoup__mix_dbias_args;

#define PSOUP__LINEAR_MIX_KERNELS(X) \
    X(mix_cast_f16, mix_cast) \
    X(mix_cast_bf16, mix_cast) \
    X(mix_shrink_few, mix_shrink) \
    X(mix_shrink_a_f32, mix_shrink) \
    X(mix_shrink_a_f16, mix_shrink) \
    X(mix_shrink_a_bf16, mix_shrink) \
    X(mix_shrink_a_f16_wide, mix_shrink) \
    X(mix_shrink_a_bf16_wide, mix_shrink) \
    X(mix_pool, mix_pool) \
    X(mix_expand_b_f32, mix_expand) \
    X(mix_expand_b_f16, mix_expand) \
    X(mix_expand_b_bf16, mix_expand) \
    X(mix_expand_few_f32, mix_expand) \
    X(mix_expand_few_f16, mix_expand) \
    X(mix_expand_few_bf16, mix_expand) \
    X(mix_shrink_b_f32, mix_shrink) \
    X(mix_shrink_b_f16, mix_shrink) \
    X(mix_shrink_b_bf16, mix_shrink) \
    X(mix_shrink_b_f16_wide, mix_shrink) \
    X(mix_shrink_b_bf16_wide, mix_shrink) \
    X(mix_expand_a_f32, mix_expand) \
    X(mix_expand_a_f16, mix_expand) \
    X(mix_expand_a_bf16, mix_expand) \
    X(mix_gradient_f32, mix_gradient) \
    X(mix_gradient_f16, mix_gradient) \
    X(mix_gradient_bf16, mix_gradient) \
    X(mix_gradient_f16_wide, mix_gradient) \
    X(mix_gradient_bf16_wide, mix_gradient) \
    X(mix_dweight, mix_dweight) \
    X(mix_dbias, mix_dbias)

#endif
