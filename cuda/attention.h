/* cuda/attention.h: causal attention over spans, forward and backward. See kernels.h.
 *
 * A row of attention is a query with one of the heads that share a key head: of `group` = heads /
 * kv_heads of them, row r of a span is query r / group, head r % group of the key head's. A block takes a
 * tile of rows (or of keys) of one span and key head; blocks count tiles of the longest span, then key
 * heads, then spans.
 *
 * Kernels on tensor cores are named by what they multiply in and by head_dim; the plain ones multiply in
 * f32, take any head_dim up to PLAIN_DIM, and are named by the keys' dtype.
 */
#ifndef PSOUP__ATTENTION_H
#define PSOUP__ATTENTION_H

#include <stdint.h>

enum {
    PSOUP__ATTENTION_WARPS = 4, /* of a block on tensor cores */
    PSOUP__ATTENTION_THREADS = PSOUP__ATTENTION_WARPS * 32,
    PSOUP__ATTENTION_KEYS = 32,      /* in a tile that rows go over */
    PSOUP__ATTENTION_DKDV_KEYS = 64, /* in a tile that goes over rows: 16 to a warp */
    PSOUP__PLAIN_ATTENTION_TILE = 32, /* rows, and keys, in a tile of the plain kernels */
    PSOUP__PLAIN_ATTENTION_THREADS = 256,
    PSOUP__PLAIN_ATTENTION_DIM = 256,
    PSOUP__ROUND_THREADS = 256, /* a warp to a key */
};
/* Rows in a tile: 32 to a warp, 16 where the sums would not fit its registers. */
#define PSOUP__ATTENTION_ROWS(dim) (PSOUP__ATTENTION_WARPS * ((dim) <= 128 ? 32 : 16))
/* Rows in a tile that keys go over; into how many parts the columns of dk and dv are cut. */
#define PSOUP__ATTENTION_DKDV_ROWS(dim) ((dim) <= 64 ? 64 : 32)
#define PSOUP__ATTENTION_DKDV_PARTS(dim) ((dim) <= 128 ? 1 : (dim) / 128)
/* Floats from row to row of a plain tile: of 16 bytes an odd number, so that rows begin in different
 * banks. */
#define PSOUP__PLAIN_ATTENTION_PITCH(dim) ((((dim) + 3) / 4 | 1) * 4)

/* psoup__span of src/ops.h. */
typedef struct psoup__attention_span {
    int32_t query, queries, keys, first;
} psoup__attention_span;

typedef struct psoup__attention_args {
    float *out, *lse; /* [rows, heads · head_dim]; [rows, heads] or NULL */
    const float *q;
    const void *k, *v;
    const int32_t *pages; /* of `page` rows, or NULL */
    const psoup__attention_span *spans;
    int64_t stride; /* from row to row of k, v */
    int32_t tiles;  /* of the longest span */
    int32_t heads, kv_heads, head_dim;
    int32_t page; /* a multiple of KEYS, but for the plain kernels */
    int32_t least; /* spans of fewer queries are left out, but by the plain kernels: attention_decode had them */
    float scale;
    int32_t spare;
} psoup__attention_args;

/* Keys and values of a batch, rounded: out[row · pitch] holds those of row `row` of k, `width` numbers,
 * then those of v. Blocks count `blocks` to a span. */
typedef struct psoup__attention_round_args {
    void *out;
    const float *k, *v;
    const psoup__attention_span *spans;
    int64_t pitch, stride;
    int32_t width, blocks;
} psoup__attention_round_args;

/* What both kernels of the gradient take beside their inputs: for each query and head lse · log2 e and
 * <dout, out>, two floats in `stats`, and for tensor cores q and dout rounded. A warp to a query and
 * head; blocks count `blocks` to a span. */
typedef struct psoup__attention_prepare_args {
    float *stats;     /* row r's begin at r · stats_pitch */
    void *q16, *dout16; /* row r begins at r · pitch */
    const float *dout, *q, *out, *lse;
    const psoup__attention_span *spans;
    int64_t pitch, stats_pitch;
    int32_t heads, head_dim, blocks, spare;
} psoup__attention_prepare_args;

/* attention_dkdv: a block has a tile of DKDV_KEYS keys, and with head_dim 256 a half of their gradients'
 * columns. attention_dq: a block has a tile of rows, as in the forward. The plain kernels read f32, the
 * others what is rounded. */
typedef struct psoup__attention_backward_args {
    float *dq;        /* [rows, heads · head_dim] */
    float *dk, *dv;   /* laid out as k and v; added to */
    const float *dout, *q, *k, *v;
    const void *dout16, *q16, *k16, *v16; /* row r begins at r · pitch */
    const float *stats;
    const psoup__attention_span *spans;
    int64_t stride, pitch, stats_pitch;
    int32_t tiles; /* of the longest span, times the parts of a tile */
    int32_t heads, kv_heads, head_dim;
    float scale;
    int32_t spare;
} psoup__attention_backward_args;

#define PSOUP__ATTENTION_KERNELS(X) \
    X(attention_bf16_64, attention) \
    X(attention_bf16_128, attention) \
    X(attention_bf16_256, attention) \
    X(attention_f16_64, attention) \
    X(attention_f16_128, attention) \
    X(attention_f16_256, attention) \
    X(attention_plain_f32, attention) \
    X(attention_plain_bf16, attention) \
    X(attention_plain_f16, attention) \
    X(attention_round_bf16, attention_round) \
    X(attention_round_f16, attention_round) \
    X(attention_prepare_bf16, attention_prepare) \
    X(attention_prepare_plain, attention_prepare) \
    X(attention_dkdv_64, attention_backward) \
    X(attention_dkdv_128, attention_backward) \
    X(attention_dkdv_256, attention_backward) \
    X(attention_dkdv_plain, attention_backward) \
    X(attention_dq_64, attention_backward) \
    X(attention_dq_128, attention_backward) \
    X(attention_dq_256, attention_backward) \
    X(attention_dq_plain, attention_backward)

#endif
