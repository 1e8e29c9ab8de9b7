/* src/ops.h: THE contract between the model and its backends: one table of functions, every op that
 * forward, backward, generation and training need, with shapes.
 *
 * Rules
 *   - Arguments run: backend, outputs, saved values, inputs, sizes.
 *   - An op works in the caller's memory; it neither allocates nor synchronises. Only `read` waits; and
 *     `write` may where it is given more than 4 MiB, as weights are when they are loaded.
 *   - All pointers are device memory from `alloc`, except where a comment says "host".
 *   - Activations are f32 [rows, width], rows contiguous. `rows` counts tokens of all sequences,
 *     packed one after another without padding.
 *   - On the CPU a row's result has the same bits for any batch it is in, any place in it, and any
 *     number of threads.
 *   - "adds to" means +=; other outputs are overwritten.
 */
#ifndef PSOUP__OPS_H
#define PSOUP__OPS_H

#include "base/base.h"
#include "base/policy.h"

/* A matrix of the base model, row-major [out, in], as torch.nn.Linear stores it. */
typedef struct psoup__weight {
    psoup_dtype dtype; /* F32, F16, BF16; INT8, NF4: blocks, see base.h */
    int32_t out, in;
    const void *data;        /* [out, in], or the blocks' codes, with: */
    const float *scales;     /* theirs, or NULL, and: */
    psoup_dtype values;      /* F32, F16, BF16: a device multiplies with values rounded to it, the CPU in f32 */
    psoup__gemm_b *forward;  /* packed for x·Wᵀ by weights_pack, or NULL */
    psoup__gemm_b *backward; /* packed for dy·W by weights_pack, or NULL */
} psoup__weight;

/* The dtype that a device takes products with a weight in. */
static inline psoup_dtype psoup__weight_dtype(const psoup__weight *weight) {
    return psoup__dtype_is_blocks(weight->dtype) ? weight->values : weight->dtype;
}

/* One adapter's factors for one linear; scale = alpha / rank, or alpha / sqrt(rank) (rsLoRA). An
 * adapter that leaves this linear alone has rank 0. */
typedef struct psoup__lora {
    int32_t rank;
    float scale;
    const float *a; /* [rank, in] */
    const float *b; /* [out, rank] */
    float *da;      /* [rank, in] gradient, added to; NULL where it is not asked for */
    float *db;      /* [out, rank] */
} psoup__lora;

/* The mix: each row's weights over the n adapters, and who uses whom. A weight of zero is skipped,
 * never multiplied. n == 0 is the base. */
typedef struct psoup__mix {
    int32_t n;
    const float *weight;  /* [rows, n] */
    const int32_t *rows;  /* rows[first[i] … first[i+1]−1], ascending: the rows that use adapter i */
    const int32_t *first; /* host [n + 1] */
    float *dweight;       /* [rows, n] gradient of the weights, added to; NULL where not asked for */
    const int32_t *factors; /* [rows]: not 0 where A's and B's are summed apart, s (Σ w_i B_i)(Σ w_j A_j), over
                             * adapters of one rank and one scale s, those of rank 0 left out; NULL: nowhere */
} psoup__mix;

/* One of several linears that read the same rows. */
typedef struct psoup__linear {
    float *y; /* [rows, out] */
    float *u; /* as linear_mix's */
    const psoup__weight *w;
    const float *bias;       /* [out] or NULL */
    const psoup__lora *lora; /* host [mix->n]; NULL: no adapter changes it */
} psoup__linear;

/* Keys and values: those of the batch itself, or a layer of a cache. Row r, head h begins at element
 * r · stride + h · head_dim of k and v. */
typedef struct psoup__keys {
    psoup_dtype dtype;    /* of k and v: F32, or what `cache` says */
    int64_t stride;
    void *k, *v;
    float *dk, *dv;       /* attention_backward adds here, laid out as k and v */
    const int32_t *pages; /* NULL: a sequence's keys lie in rows that follow one another. Else they lie
                           * in pages of ops->page rows, and this lists the pages' numbers */
} psoup__keys;

/* One sequence's queries, and the keys they attend to. */
typedef struct psoup__span {
    int32_t query;   /* first row of its queries in q */
    int32_t queries; /* how many rows; query i is at position keys − queries + i */
    int32_t keys;    /* number of keys; a query at position p sees keys 0 … p */
    int32_t first;   /* the row of key 0; with pages, where in `pages` its list begins */
} psoup__span;

/* The spans of a batch; what is said of all of them is known on the host. */
typedef struct psoup__spans {
    const psoup__span *span;    /* [n] */
    int32_t n;
    int32_t most_queries, most_keys; /* of one span */
} psoup__spans;

typedef struct psoup__attention_shape {
    int32_t heads, kv_heads, head_dim; /* heads is a multiple of kv_heads */
    float scale;                       /* usually 1 / sqrt(head_dim) */
    psoup_dtype dtype;                 /* of the model's weights. A device multiplies in it (gradients of f16:
                                        * in bf16), the CPU in f32 */
} psoup__attention_shape;

/* How the next token of one row is drawn. */
typedef struct psoup__draw {
    float temperature;    /* 0: the most likely token, the lowest id among equals */
    int32_t top_k;        /* 0: all */
    float top_p;          /* 1: all */
    uint64_t seed, sequence, position; /* its Philox word */
    const int32_t *banned; /* [n_banned]: tokens that get probability 0 (no-repeat n-grams, min new
                            * tokens); any may be there twice */
    int32_t n_banned;
} psoup__draw;

/* A sequence that decodes step after step on the device, by the rules that the session has on the host. */
typedef struct psoup__decoding {
    int32_t *history;       /* [most]: prompt and output so far */
    int32_t length, most;   /* tokens in it; where it ends */
    int32_t least;          /* stop tokens are banned while the length is less */
    int32_t ngram;          /* no n tokens in a row come twice; 0: they may */
    const int32_t *stop;    /* [n_stop] */
    int32_t n_stop;
    int32_t ignore_stop;    /* do not end there */
    int32_t *banned;        /* [n_stop + most], where the row's draw finds what is banned */
    int32_t *token;         /* what it drew, [steps] */
    float *logprob;
    int32_t drawn;          /* how many there are */
    int32_t ended;
} psoup__decoding;

/* The arrays a decoding batch is run with; `advance` moves them on. A sequence has the rows first[i] … first[i+1]−1,
 * which read the same tokens, each with keys of its own; first NULL: row i. */
typedef struct psoup__decode_state {
    psoup__decoding *decoding; /* [n] */
    psoup__draw *draw;
    const int32_t *first;      /* [n + 1], or NULL */
    int32_t *token, *position, *place; /* [rows] */
    psoup__span *span;
} psoup__decode_state;

typedef struct psoup__adamw_args {
    float lr, beta1, beta2, epsilon, weight_decay; /* decoupled decay, Loshchilov & Hutter 2019 */
    float correction1, correction2; /* 1 − beta^step */
    float gradient_scale;           /* multiplies g first: clipping and averaging */
} psoup__adamw_args;

/* Which values a dropout pattern belongs to: element j of row i is kept by the Philox word at
 * (seed, sequence = stream[i], position = offset[i] · width + j), scaled by 1/(1−p). So it does not
 * depend on the batch. */
typedef struct psoup__dropout {
    float p; /* 0: none */
    const uint64_t *seed;   /* host [rows] */
    const uint64_t *stream; /* host [rows] */
    const uint64_t *offset; /* host [rows] */
} psoup__dropout;

typedef struct psoup__backend psoup__backend;

typedef struct psoup__ops {
    const char *name; /* "cpu", "cuda" */
    bool on_host;     /* device memory is the host's: files may be read where they are mapped */
    int32_t page;     /* rows in a page of a cache; 0: a sequence's rows follow one another */
    void (*free)(psoup__backend *be);
    int64_t (*unused)(psoup__backend *be); /* bytes of device memory that nobody has; −1: it is the host's */

    /* Memory. alloc gives zeroed bytes; write and read cross between host and device. */
    void *(*alloc)(psoup__backend *be, size_t count, size_t size, psoup_error *error);
    void (*release)(psoup__backend *be, void *memory);
    void (*write)(psoup__backend *be, void *out, const void *host, size_t bytes);
    psoup_status (*read)(psoup__backend *be, void *host, const void *in, size_t bytes,
                         psoup_error *error);
    void (*copy)(psoup__backend *be, void *out, const void *in, size_t bytes);
    void (*zero)(psoup__backend *be, void *out, size_t bytes);

    /* Steps that repeat, where launching them costs. After `record` ops are noted and not done; `replay` does
     * what was noted, so many times. Between the two nothing is written, read or allocated: a step that needs
     * it is refused with PSOUP_ERROR_UNSUPPORTED, and nothing of it is done. NULL on the CPU. */
    void (*record)(psoup__backend *be);
    psoup_status (*replay)(psoup__backend *be, int32_t times, psoup_error *error);

    /* Packs frozen weights once for `forward` (x·Wᵀ) and, when asked, `backward` (dy·W), each where it is not.
     * Not an op in the sense above: it allocates. unpack frees both. */
    psoup_status (*weights_pack)(psoup__backend *be, psoup__weight *const *weights /* [n] */, int32_t n,
                                 bool backward, psoup_error *error);
    void (*weight_unpack)(psoup__backend *be, psoup__weight *weight);
    /* Bytes that packing takes, for `forward` or for `backward`. */
    size_t (*packed_bytes)(psoup__backend *be, const psoup__weight *weight);

    /* Makes sure of the room that ops of so many rows, none wider than `width`, take beside their
     * arguments. Before them; not an op. */
    psoup_status (*reserve)(psoup__backend *be, int32_t rows, int32_t width, psoup_error *error);
    size_t (*reserved_bytes)(psoup__backend *be, int32_t rows, int32_t width); /* that reserve takes */
    /* The dtype of a cache for a model whose weights are of `weights`. */
    psoup_dtype (*cache)(psoup__backend *be, psoup_dtype weights);

    /* out[i] = table[token[i]]; table [vocab, width] in its own dtype. */
    void (*embed)(psoup__backend *be, float *out /* [rows, width] */, const psoup__weight *table,
                  const int32_t *token /* [rows] */, int32_t rows);
    void (*embed_backward)(psoup__backend *be, float *dtable /* [vocab, width], adds to */,
                           const float *dout, const int32_t *token, int32_t vocab, int32_t width,
                           int32_t rows);

    /* x += y, where there is one; then out = x / sqrt(mean(x²) + epsilon) · weight; saves
     * rstd = 1 / sqrt(mean(x²) + epsilon). */
    void (*rmsnorm)(psoup__backend *be, float *out, float *rstd /* [rows] */, float *x,
                    const float *y /* the residual, or NULL */, const float *weight /* [width] */, float epsilon,
                    int32_t rows, int32_t width);
    void (*rmsnorm_backward)(psoup__backend *be, float *dx /* adds to */,
                             float *dweight /* [width], adds to; NULL: not asked for */,
                             const float *dout, const float *x, const float *weight,
                             const float *rstd, int32_t rows, int32_t width);

    /* y = x Wᵀ + bias + Σ_i mix[row][i] · scale_i · (x_lora A_iᵀ) B_iᵀ, adapters in ascending order.
     * u saves x_lora A_iᵀ: for adapter i a block [first[i+1]−first[i], rank_i], blocks in order. In a row of
     * mix->factors every u_i is Σ_j mix[row][j] · x_lora A_jᵀ. */
    void (*linear_mix)(psoup__backend *be, float *y /* [rows, out] */, float *u,
                       const float *x /* [rows, in] */,
                       const float *x_lora /* x after dropout, or x itself */,
                       const psoup__weight *w, const float *bias /* [out] or NULL */,
                       const psoup__lora *lora /* host [mix->n] */, const psoup__mix *mix,
                       int32_t rows);
    /* The same for n linears that read one x, without dropout, each with a u of its own. On the CPU to the same bits
     * as one after another. */
    void (*linear_mix_each)(psoup__backend *be, const psoup__linear *each /* [n] */, int32_t n, const float *x,
                            const psoup__mix *mix, int32_t rows);
    /* du is scratch of u's size. Each output may be NULL where it is not asked for. With dx_lora ==
     * dx both parts are added there. Adds to lora[i].da, .db and mix->dweight where not NULL; the
     * sums over rows run in ascending row order within each adapter. Where both mix->factors and
     * mix->dweight are there u is used up; a weight of 0 of such a row gets no gradient. */
    void (*linear_mix_backward)(psoup__backend *be, float *dx /* [rows, in], adds to */,
                                float *dx_lora /* [rows, in], adds to */,
                                float *dw /* [out, in], adds to */,
                                float *dbias /* [out], adds to */, float *du, const float *dy,
                                const float *x, const float *x_lora, float *u,
                                const psoup__weight *w, const psoup__lora *lora,
                                const psoup__mix *mix, int32_t rows);

    /* Rotates pairs (j, j + head_dim/2) of every head, as transformers' LLaMA does. cos_sin is the
     * table [positions, head_dim]: head_dim/2 cosines, then as many sines. In place on
     * x [rows, heads · head_dim] with row stride `stride`; `inverse` rotates back (the backward). */
    void (*rope)(psoup__backend *be, float *x, const float *cos_sin, const int32_t *position,
                 int32_t rows, int32_t heads, int32_t head_dim, int64_t stride, bool inverse);

    /* Row i of k, v [rows, width] becomes row place[i] of the cache, rounded to its dtype. */
    void (*cache_append)(psoup__backend *be, const psoup__keys *cache, const int32_t *place /* [rows] */,
                         const float *k, const float *v, int32_t rows, int32_t width);

    /* rope of q [rows, heads · head_dim] and of k [rows, kv_heads · head_dim], then cache_append of k and v. What k
     * holds afterwards is not said. */
    void (*rope_append)(psoup__backend *be, float *q, float *k, const float *v, const float *cos_sin,
                        const int32_t *position, const psoup__keys *cache, const int32_t *place, int32_t rows,
                        const psoup__attention_shape *shape);

    /* Causal softmax attention over spans; out and q [rows, heads · head_dim]; lse saves the
     * log-sum-exp [rows, heads] of the scaled scores (NULL: not kept). */
    void (*attention)(psoup__backend *be, float *out, float *lse, const float *q,
                      const psoup__keys *keys, const psoup__spans *spans,
                      const psoup__attention_shape *shape);
    /* dq is overwritten; adds to keys->dk, dv. The keys are f32 and without pages. */
    void (*attention_backward)(psoup__backend *be, float *dq, const float *dout, const float *q,
                               const float *out, const float *lse, const psoup__keys *keys,
                               const psoup__spans *spans, const psoup__attention_shape *shape);

    /* out = silu(gate) · up, each [rows, width]. */
    void (*swiglu)(psoup__backend *be, float *out, const float *gate, const float *up, size_t n);
    void (*swiglu_backward)(psoup__backend *be, float *dgate, float *dup, const float *dout,
                            const float *gate, const float *up, size_t n);

    void (*add)(psoup__backend *be, float *x /* adds to */, const float *y, size_t n);
    /* out[i] = in[row[i]] and out[row[i]] += scale[i] · in[i]; row distinct. */
    void (*gather_rows)(psoup__backend *be, float *out, const float *in, const int32_t *row,
                        int32_t rows, int32_t width);
    void (*scatter_add_rows)(psoup__backend *be, float *out, const float *in,
                             const float *scale /* [rows]; NULL: 1 */, const int32_t *row,
                             int32_t rows, int32_t width);
    /* out[i] = Σ weight[k] · in[k], k from first[i] to first[i+1] − 1 in this order; one row alone is copied, its weight
     * not read. in and weight begin with row first[0]. */
    void (*combine_rows)(psoup__backend *be, float *out /* [n, width] */, const float *in, const float *weight,
                         const int32_t *first /* [n + 1] */, int32_t n, int32_t width);
    void (*dropout)(psoup__backend *be, float *out, const float *in, const psoup__dropout *dropout,
                    int32_t rows, int32_t width);
    /* dx += dout where kept, scaled. */
    void (*dropout_backward)(psoup__backend *be, float *dx, const float *dout,
                             const psoup__dropout *dropout, int32_t rows, int32_t width);

    /* A scalar head on chosen rows, each a part of a value: value[at[i]] += weight[i] · (w · hidden[row[i]] + bias[0]). */
    void (*head)(psoup__backend *be, float *value /* adds to */, const float *hidden /* [rows, width] */,
                 const int32_t *row /* [n], distinct */, const int32_t *at /* [n], distinct */,
                 const float *weight /* [n] */, const float *w /* [width] */, const float *bias /* [1] or NULL */,
                 int32_t n, int32_t width);
    void (*head_backward)(psoup__backend *be, float *dhidden /* adds to; NULL: not asked for */,
                          float *dw /* adds to */, float *dbias /* adds to, or NULL */, const float *dvalue,
                          const float *hidden, const int32_t *row, const int32_t *at, const float *weight,
                          const float *w, int32_t n, int32_t width);

    /* logprob[i] = logits[i][target[i]] − lse[i]. */
    void (*logprob)(psoup__backend *be, float *logprob /* [rows] */, float *lse /* [rows] */,
                    const float *logits /* [rows, vocab] */, const int32_t *target, int32_t rows,
                    int32_t vocab);
    /* dlogits[i] = dlogprob[i] · (onehot(target[i]) − exp(logits[i] − lse[i])), with dlogprob NULL
     * as if all were 1; dlogits may be logits. */
    void (*logprob_backward)(psoup__backend *be, float *dlogits, const float *logits,
                             const float *lse, const int32_t *target, const float *dlogprob,
                             int32_t rows, int32_t vocab);

    /* Generalised advantages and returns of n responses, response i of tokens first[i] … first[i+1] − 1: base/policy.h. */
    void (*gae)(psoup__backend *be, float *advantage, float *returns, const float *reward, const float *value,
                const int32_t *first /* [n + 1] */, int32_t n, double gamma, double lambda);
    /* The losses of PPO, RLOO or GRPO of n responses, as base/policy.h has them: of the clipped surrogate, with old->ref
     * of the KL term, and with old->value of the clipped error of values. The log-probs, values and gradients of response
     * i are those of its tokens response[i].first …; nothing beside them is written. terms[i]: its sums, in one order. */
    void (*policy_loss)(psoup__backend *be, float *dlogprob, float *dvalue, psoup__loss_terms *terms /* [n] */,
                        const float *logprob, const float *value, const psoup__old *old,
                        const psoup__response *response /* [n] */, int32_t n, const psoup__objective *objective);

    /* Draws token[i] from logits[i] (which are left as they are); logprob[i] is log softmax of the
     * untouched logits at it. Filters in transformers' order: temperature, top-k, top-p; then the
     * first token, in descending probability (ties: ascending id), whose cumulative probability
     * exceeds u. A row whose logits hold NaN gives token −1. */
    void (*sample)(psoup__backend *be, int32_t *token /* [rows] */, float *logprob /* [rows] */,
                   const float *logits, const psoup__draw *draw /* [rows] */, int32_t rows,
                   int32_t vocab);

    /* Sequence i has drawn token[i]: notes it and, unless it ended with it, makes its state, and its rows', that of
     * the next step. One that has ended stays as it is. Where `record` is, else NULL. */
    void (*advance)(psoup__backend *be, const psoup__decode_state *state, const int32_t *token,
                    const float *logprob, const psoup__keys *cache, int32_t n);

    /* One optimiser step over a flat buffer of n parameters. */
    void (*adamw)(psoup__backend *be, float *p, float *m, float *v, const float *g, size_t n,
                  const psoup__adamw_args *args);
    /* x ← min(max(x, −limit), limit), in place; NaN stays. */
    void (*clip_values)(psoup__backend *be, float *x, size_t n, float limit);
    /* *out (host) = Σ x²: f64, in one fixed order. Waits. */
    psoup_status (*sum_squares)(psoup__backend *be, double *out, const float *x, size_t n,
                                psoup_error *error);
} psoup__ops;

struct psoup__backend {
    const psoup__ops *ops;
    psoup_context *context;
};

#endif
