/* cuda/rows.h: rows found by number: embedding, gathering, sums, scalar heads. See kernels.h. */
#ifndef PSOUP__ROWS_H
#define PSOUP__ROWS_H

#include <stdint.h>

/* A block to a row of each of these, of FLAT_THREADS threads or fewer. */
typedef struct psoup__embed_args {
    float *out;
    const void *table;
    const int32_t *token;
    int32_t width, spare;
} psoup__embed_args;

/* blockIdx.y 0 for k, 1 for v. */
typedef struct psoup__cache_append_args {
    void *cache[2];
    const float *in[2];
    const int32_t *place;
    int64_t stride;
    int32_t width, spare;
} psoup__cache_append_args;

typedef struct psoup__gather_rows_args {
    float *out;
    const float *in;
    const int32_t *row;
    int32_t width, spare;
} psoup__gather_rows_args;

typedef struct psoup__scatter_add_rows_args {
    float *out;
    const float *in, *scale;
    const int32_t *row;
    int32_t width, spare;
} psoup__scatter_add_rows_args;

/* Four columns to a thread; blockIdx.y counts a row's blocks. */
typedef struct psoup__combine_rows_args {
    float *out;
    const float *in, *weight;
    const int32_t *first;
    int32_t width, spare;
} psoup__combine_rows_args;

typedef struct psoup__head_args {
    float *value;
    const float *hidden;
    const int32_t *row, *at;
    const float *weight, *w, *bias;
    int32_t width, spare;
} psoup__head_args;

/* Columns to a block of embed_backward and head_backward, four to a thread and step. blockIdx.y counts. */
enum { PSOUP__ROWS_THREADS = 256, PSOUP__ROWS_KEPT = 4,
       PSOUP__ROWS_COLUMNS = PSOUP__ROWS_THREADS * 4 * PSOUP__ROWS_KEPT };

typedef struct psoup__embed_backward_args {
    float *dtable;
    const float *dout;
    const int32_t *token;
    int32_t rows, width;
} psoup__embed_backward_args;

/* A block takes rows_each of the n rows; its sums for dw go as those of rmsnorm_backward. */
typedef struct psoup__head_backward_args {
    float *dhidden, *sums, *dbias;
    const float *dvalue, *hidden;
    const int32_t *row, *at;
    const float *weight, *w;
    int32_t n, rows_each, width, spare;
} psoup__head_backward_args;

#define PSOUP__ROWS_KERNELS(X) \
    X(embed_f32, embed) \
    X(embed_bf16, embed) \
    X(embed_f16, embed) \
    X(embed_backward, embed_backward) \
    X(cache_append_f32, cache_append) \
    X(cache_append_bf16, cache_append) \
    X(cache_append_f16, cache_append) \
    X(gather_rows, gather_rows) \
    X(scatter_add_rows, scatter_add_rows) \
    X(combine_rows, combine_rows) \
    X(head, head) \
    X(head_backward, head_backward)

#endif
