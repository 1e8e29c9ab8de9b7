/* cuda/layer.h: what stands between the linear layers. See kernels.h. */
#ifndef PSOUP__LAYER_H
#define PSOUP__LAYER_H

#include <stdint.h>

/* A row of at most NORM_THREADS · 4 · KEPT elements stays in the backward's registers; NORM_WIDE threads
 * keep one of twice that. FLAT_THREADS: of kernels that only move and map elements, fewer for narrow rows. */
enum { PSOUP__NORM_THREADS = 256, PSOUP__NORM_WIDE = 512, PSOUP__NORM_KEPT = 4, PSOUP__FLAT_THREADS = 256 };

typedef struct psoup__rmsnorm_args {
    float *out, *rstd, *x;
    const float *y, *weight; /* y: is added to x, or NULL */
    float epsilon;
    int32_t width;
} psoup__rmsnorm_args;

/* A block takes rows_each rows. Its sums for dweight go to sums + blockIdx.x · width, or, where it is the
 * only block, are added there. */
typedef struct psoup__rmsnorm_backward_args {
    float *dx, *sums;
    const float *dout, *x, *weight, *rstd;
    int32_t rows, rows_each, width, spare;
} psoup__rmsnorm_backward_args;

/* out [width] += Σ_i sums[i][width], i < n: SUM_COLUMNS columns to a block. */
enum { PSOUP__SUM_COLUMNS = 32 };
typedef struct psoup__column_sums_args {
    float *out;
    const float *sums;
    int32_t n, width;
} psoup__column_sums_args;

/* A block to a row. */
typedef struct psoup__rope_args {
    float *x;
    const float *cos_sin;
    const int32_t *position;
    int64_t stride;
    int32_t heads, head_dim;
    float sign; /* of the sines */
    int32_t spare;
} psoup__rope_args;

/* A block to a row of q, of k and of v: blockIdx.y. */
typedef struct psoup__rope_append_args {
    float *q;
    const float *in[3]; /* q, k, v */
    void *cache[2];
    const float *cos_sin;
    const int32_t *position, *place;
    int64_t stride; /* of the cache */
    int32_t heads, kv_heads, head_dim, spare;
} psoup__rope_append_args;

/* Of n elements: FLAT_THREADS to a block, as many blocks as fill the device, each walking on. */
typedef struct psoup__swiglu_args {
    float *out;
    const float *gate, *up;
    uint64_t n;
} psoup__swiglu_args;

typedef struct psoup__swiglu_backward_args {
    float *dgate, *dup;
    const float *dout, *gate, *up;
    uint64_t n;
} psoup__swiglu_backward_args;

/* x += y */
typedef struct psoup__add_args {
    float *x;
    const float *y;
    uint64_t n;
} psoup__add_args;

/* A block to a row; seed, stream and offset [rows]. */
typedef struct psoup__dropout_args {
    float *out;
    const float *in;
    const uint64_t *seed, *stream, *offset;
    float p, scale;
    int32_t width, spare;
} psoup__dropout_args;

#define PSOUP__LAYER_KERNELS(X) \
    X(rmsnorm, rmsnorm) \
    X(rmsnorm_backward, rmsnorm_backward) \
    X(rmsnorm_backward_512, rmsnorm_backward) \
    X(rmsnorm_backward_sums, rmsnorm_backward) \
    X(rmsnorm_backward_sums_512, rmsnorm_backward) \
    X(rmsnorm_backward_wide, rmsnorm_backward) \
    X(column_sums, column_sums) \
    X(rope, rope) \
    X(rope_append_f32, rope_append) \
    X(rope_append_bf16, rope_append) \
    X(rope_append_f16, rope_append) \
    X(swiglu, swiglu) \
    X(swiglu_backward, swiglu_backward) \
    X(add, add) \
    X(dropout, dropout) \
    X(dropout_backward, dropout)

#endif
