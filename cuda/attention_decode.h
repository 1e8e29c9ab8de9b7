/* cuda/attention_decode.h: attention of spans of one query over a cache. See kernels.h.
 *
 * Grid: x = splits of the keys, y = kv_heads · tiles of the heads that share one, z = spans; with more than
 * one split, attention_merge then adds the parts up: x = heads, y = spans.
 */
#ifndef PSOUP__ATTENTION_DECODE_H
#define PSOUP__ATTENTION_DECODE_H

#include <stdint.h>

enum { PSOUP__DECODE_THREADS = 128, PSOUP__DECODE_HEADS = 8 /* most to a tile */ };

typedef struct psoup__attention_decode_args {
    float *out;         /* [rows, heads · head_dim]; with splits > 1: part */
    float *part;        /* [spans, heads, splits, head_dim + 2]: out, then log2 of its maximum, and its sum */
    const float *q;     /* [rows, heads · head_dim] */
    const void *k, *v;  /* 16-byte aligned, stride too */
    int64_t stride;
    const int32_t *pages;
    const int32_t *span; /* [spans, 4]: query, queries, keys, first. Those of other than one query are left out */
    int32_t page;       /* rows in a page; 0: no pages */
    int32_t heads, kv_heads;
    int32_t splits, split; /* how many, and the keys in one */
    float scale;        /* times log2 e */
} psoup__attention_decode_args;

typedef struct psoup__attention_merge_args {
    float *out;
    const float *part;
    const int32_t *span;
    int32_t heads, head_dim, splits, split;
} psoup__attention_merge_args;

#define PSOUP__DECODE_OF(X, type)                                                                          \
    X(decode_##type##_64_1, attention_decode)                                                              \
    X(decode_##type##_64_4, attention_decode)                                                              \
    X(decode_##type##_64_8, attention_decode)                                                              \
    X(decode_##type##_128_1, attention_decode)                                                             \
    X(decode_##type##_128_4, attention_decode)                                                             \
    X(decode_##type##_128_8, attention_decode)                                                             \
    X(decode_##type##_256_1, attention_decode)                                                             \
    X(decode_##type##_256_4, attention_decode)                                                             \
    X(decode_##type##_256_8, attention_decode)
#define PSOUP__ATTENTION_DECODE_KERNELS(X)                                                                 \
    PSOUP__DECODE_OF(X, float)                                                                             \
    PSOUP__DECODE_OF(X, bf16)                                                                              \
    PSOUP__DECODE_OF(X, f16)                                                                               \
    X(attention_merge, attention_merge)

#endif
