/* The activations of one batch, and what forward and backward share. */
#ifndef PSOUP__TAPE_H
#define PSOUP__TAPE_H

#include "model/model.h"

/* One layer's activations; device memory. */
typedef struct psoup__layer_tape {
    float *x;               /* [rows, dim] the residual stream where it enters the layer */
    float *rstd1, *norm1;   /* [rows], [rows, dim] */
    float *q;               /* [rows, q_width], rotated */
    float *k, *v;           /* [rows, kv_width], k rotated */
    float *attended;        /* [rows, q_width] */
    float *lse;             /* [rows, heads] */
    float *middle;          /* [rows, dim] the stream after attention */
    float *rstd2, *norm2;   /* [rows], [rows, dim] */
    float *gate, *up;       /* [rows, ffn] */
    float *u[PSOUP__LINEARS]; /* see ops.h, linear_mix */
} psoup__layer_tape;

/* A KV cache (cache.c): row r of layer l begins at element (l · pages · page + r) · kv_width of k and v. Where
 * ops->page is 0 a page holds a whole sequence, so that its rows follow one another. */
typedef struct psoup__cache {
    psoup_model *model;
    psoup_dtype dtype;
    char *k, *v;         /* device */
    int32_t page, pages; /* rows in a page, and how many pages: their product is an int32 */
    int32_t most;        /* pages of one sequence at most */
    int32_t spare;       /* a page that is never handed out, for rows that fill a batch up; or −1 */
    int32_t *unused, n_unused;
} psoup__cache;
/* Room for so many sequences of max_tokens; with tokens > 0, for so many tokens of all together. */
psoup_status psoup__cache_create(psoup_model *model, int32_t sequences, int32_t max_tokens, int64_t tokens,
                                 psoup__cache **out, psoup_error *error);
size_t psoup__cache_bytes(psoup_model *model, int32_t sequences, int32_t max_tokens, int64_t tokens); /* or SIZE_MAX */
void psoup__cache_free(psoup__cache *cache);
int32_t psoup__cache_pages(const psoup__cache *cache, int32_t tokens); /* that so many tokens take */
bool psoup__cache_take(psoup__cache *cache, int32_t *pages, int32_t n); /* false where there are too few */
void psoup__cache_give(psoup__cache *cache, const int32_t *pages, int32_t n);

/* What the sequences of a batch have in a cache, which the batch reads and appends to. */
typedef struct psoup__cached {
    psoup__cache *cache;
    int32_t *const *pages; /* host [batch n], each its own, for past and new tokens */
    const int32_t *n_pages; /* host [batch n], with batch->ahead: how many each has */
    const int32_t *past;   /* host [batch n]: tokens it already holds */
} psoup__cached;

/* Memory handed out in slices, by the same code twice: after `measure` slices are NULL and only
 * counted; after `grow` they are real. */
typedef struct psoup__slab {
    char *memory, *base; /* base: memory, or NULL while measuring */
    size_t used, capacity;
    bool overflow;
} psoup__slab;
void psoup__slab_measure(psoup__slab *slab);

/* A chunk of rows on their way through the lm head. */
typedef struct psoup__chunk {
    int32_t *row, *target;  /* device [chunk_rows] */
    float *hidden;          /* [chunk_rows, dim] */
    float *logits;          /* [chunk_rows, vocab] */
    float *logprob, *lse;   /* [chunk_rows] */
} psoup__chunk;

struct psoup__tape {
    psoup_model *model;
    /* The batch. */
    int32_t n, rows;
    bool saved;       /* holds what a backward needs */
    bool recompute;   /* asked for: see psoup__tape_recompute */
    int32_t gradient; /* which of its adapters' */
    bool inputs_only; /* of this batch: of all layers but the one last run only x is kept */
    int32_t ahead;    /* see psoup__batch */
    float dropout;
    int32_t active;   /* adapters with a non-zero weight somewhere */
    bool factors;     /* some sequence is mixed by PSOUP_MIX_FACTORS */
    int32_t n_adapters;
    uint64_t edition;
    int32_t *adapter; /* host [active]: their numbers, ascending */
    psoup__lora *lora; /* host [layers · LINEARS, active] */
    psoup__mix mix;   /* over the active adapters */
    /* Host. */
    int32_t *start;   /* [n + 1] */
    int32_t *position_host, *used_by; /* [rows], [rows · active] */
    float *weight_host;               /* [rows, active] */
    int32_t *factors_host;            /* [rows], where `factors` */
    int32_t *first;                   /* [active + 1] */
    uint64_t *drop_seed, *drop_stream, *drop_offset; /* [rows] */
    psoup__span *span_host;           /* [n] */
    int32_t *place_host, *pages_host; /* [rows], [n_pages], with a cache */
    psoup__layer_tape *layers;        /* [layers + 1]; the last has x alone */
    psoup__slab host;
    /* Device. */
    int32_t *token, *position, *mix_rows;
    psoup__spans spans;
    psoup__span *span;   /* [n] */
    int32_t *place;      /* [rows]: each row's row in a layer of the cache */
    int32_t *pages;      /* [n_pages], of all sequences in turn; none where ops->page is 0 */
    size_t n_pages;
    float *mix_weight;
    int32_t *mix_factors; /* [rows], where `factors` */
    float *act;      /* [rows, ffn] */
    float *dropped;  /* [rows, widest input]: an adapter's input after dropout */
    float *rstd, *hidden; /* [rows], [rows, dim]: the last norm */
    psoup__slab device;
    /* Grown on their first use: */
    int32_t chunk_rows;
    psoup__chunk chunk;
    psoup__slab chunk_slab;
    float *mixed; /* device [chunk_rows, vocab]: logits of mixtures */
    psoup__slab mixed_slab;
    /* d log p / d hidden, kept from psoup__logprobs on a saved tape for the backward, which only has to
     * scale it: else the backward multiplies by the lm head once more (a twelfth of the products of a
     * LoRA step at dim 256, vocabulary 4096). */
    float *pull;                /* device [pulls, dim] */
    int32_t *pulled;            /* host: pulls rows, then their targets */
    int32_t pulls;
    size_t pulled_capacity;
    psoup__slab pull_slab;
    psoup__slab backward;
    psoup__slab heads;
};

void *psoup__slab_take(psoup__slab *slab, size_t count, size_t size);
/* After the measuring pass: makes sure of the room. What was in it is lost. */
psoup_status psoup__slab_grow(psoup__tape *tape, psoup__slab *slab, bool device,
                              psoup_error *error);

/* Checks the batch, expands the mix to rows, lays out memory and copies the batch to the device. */
psoup_status psoup__tape_prepare(psoup__tape *tape, const psoup__batch *batch, bool save,
                                 const psoup__cached *cached, psoup_error *error);
/* Collects the active adapters' pairs, with their gradients of this moment, into tape->lora. */
void psoup__tape_collect(psoup__tape *tape);
/* The pairs of one linear, or NULL where no active adapter has one. */
const psoup__lora *psoup__tape_lora(const psoup__tape *tape, int32_t layer, int linear);
/* What the adapters of a linear see of x: x itself, or tape->dropped. */
const float *psoup__tape_drop(psoup__tape *tape, const float *x, int32_t layer, int linear);
psoup__dropout psoup__tape_dropout(psoup__tape *tape, int32_t layer, int linear);
psoup_status psoup__tape_chunk(psoup__tape *tape, psoup_error *error);
/* The bytes of a batch that is not there, of which n, rows, saved, dropout, active, factors and n_pages are set: into
 * `used` of the slabs host, device and chunk_slab. Adapter i of [active] is used by first[i + 1] − first[i] rows;
 * lora is scratch [layers · LINEARS, active]. */
void psoup__tape_measure(psoup__tape *tape, bool cached, int32_t *adapter, int32_t *first, psoup__lora *lora);
void psoup__backward_measure(psoup__tape *tape); /* after it: into `backward` */
void psoup__heads_measure(psoup__tape *tape, size_t n, bool dropout); /* into `heads` */
psoup_status psoup__check_rows(const psoup__tape *tape, const int32_t *row, const int32_t *target,
                               int32_t n, psoup_error *error);

psoup__attention_shape psoup__model_attention(const psoup_model *model);
/* One layer, from its x, to which the residual is added first, to the next one's x, which lacks this layer's `middle`. */
void psoup__forward_layer(psoup__tape *tape, const psoup__cached *cached, int32_t layer,
                          const float *residual /* or NULL */);
/* psoup__forward's passes over a batch that was prepared. */
void psoup__forward_run(psoup__tape *tape, const psoup__cached *cached);
/* A layer of the cache, as `advance` and attention take it. */
psoup__keys psoup__cached_keys(const psoup__tape *tape, const psoup__cached *cached, int32_t layer);
/* psoup__forward over a cache: positions go on from what each sequence has there. */
psoup_status psoup__forward_cached(psoup_model *model, psoup__tape *tape,
                                   const psoup__batch *batch, bool save,
                                   const psoup__cached *cached, psoup_error *error);
/* The lm head at `rows` ≤ chunk_rows rows of the batch: fills chunk.row, .hidden and .logits. */
void psoup__chunk_logits(psoup__tape *tape, const int32_t *row, int32_t rows);

/* mixed.c: mixtures of the logits at rows of the batch: mixture i is Σ weight · logits over its entries
 * first[i] … first[i+1]−1; of one entry alone the weight is not read. */
typedef struct psoup__mixtures {
    const int32_t *row;   /* rows of the batch */
    const float *weight;
    const int32_t *first; /* [n + 1]; at most chunk_rows entries in all */
    int32_t n;
} psoup__mixtures;
/* Makes sure of tape->mixed. */
psoup_status psoup__tape_mixed(psoup__tape *tape, psoup_error *error);
/* *logits receives where they are, [n, vocab], until the next chunk. */
psoup_status psoup__mixed_logits(psoup__tape *tape, const psoup__mixtures *mixtures, float **logits,
                                 psoup_error *error);
/* Logits of every position of a row whose mix is by PSOUP_MIX_LOGITS (whole), or log-probs of its tokens 1 … n−1. */
psoup_status psoup__score_mixed(psoup_model *model, psoup__tape *tape, const psoup_row *row, bool whole, float *out,
                                psoup_error *error);

extern const psoup__mix psoup__no_mix;

/* What one list of head rows needs on the device. */
typedef struct psoup__head_space {
    int32_t *row, *identity, *at; /* [n]: the rows; 0 … n−1; the values */
    float *weight;           /* [n] */
    float *dweight;          /* [dim + 1]: gradients of a frozen head, which nobody reads */
    float *gathered, *dropped; /* [n, dim], with dropout */
} psoup__head_space;
psoup_status psoup__head_prepare(psoup__tape *tape, const psoup__head_rows *heads,
                                 psoup__head_space *space, psoup_error *error);
/* The hidden states the head sees: the tape's own, or a dropped-out copy numbered 0 … n−1. */
const float *psoup__head_hidden(psoup__tape *tape, const psoup__head_rows *heads,
                                const psoup__head_space *space);

#endif
