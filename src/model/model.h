/* src/model: the LLaMA family with its adapters: blueprint, forward, backward, generation. Calls only
 * the ops table; never asks which backend is behind it.
 */
#ifndef PSOUP__MODEL_H
#define PSOUP__MODEL_H

#include "format/format.h"
#include "ops.h"
#include "psoup/model.h"

/* ---- blueprint ------------------------------------------------------------------------------ */

enum { /* the linears of a layer; 1 << these are psoup/model.h's PSOUP_Q_PROJ … */
    PSOUP__Q,
    PSOUP__K,
    PSOUP__V,
    PSOUP__O,
    PSOUP__GATE,
    PSOUP__UP,
    PSOUP__DOWN,
    PSOUP__LINEARS
};

typedef struct psoup__layer {
    psoup__weight linear[PSOUP__LINEARS]; /* q [heads·hd, dim] … down [dim, ffn] */
    float *bias[PSOUP__LINEARS];          /* [out], f32, or NULL */
    float *input_norm, *post_norm;        /* [dim], f32 */
    float *dlinear[PSOUP__LINEARS];       /* gradients, into model->grad; NULL while frozen */
    float *dbias[PSOUP__LINEARS];
    float *dinput_norm, *dpost_norm;
} psoup__layer;

/* An adapter: its factors and, for critics and reward models, a scalar head on the final hidden
 * state, in one flat buffer that an optimiser can step over. */
typedef struct psoup__adapter {
    char *name;
    int32_t rank; /* the common rank and alpha; pairs may differ where a file's patterns say so */
    float alpha;
    bool rslora;
    uint32_t targets;
    float *data; /* [count]: layer by layer, q k v o gate up down, A then B; then head [dim], bias [1] */
    float *grad; /* [gradients, count], each laid out as data; NULL while frozen */
    int32_t gradients;
    size_t count;
    psoup__lora *lora; /* [layers · PSOUP__LINEARS], pointing into data and grad */
    float *head, *head_bias, *dhead, *dhead_bias; /* NULL where it has none, or is frozen */
    float *host; /* psoup_model_adapter_data's last copy */
} psoup__adapter;

struct psoup_model {
    psoup_context *context;
    psoup__backend *be;
    psoup_model_config config;
    int32_t q_width, kv_width; /* heads · head_dim, kv_heads · head_dim */
    psoup__weight embed;       /* [vocab, dim] */
    psoup__weight lm_head;     /* [vocab, dim]; shares embed.data when tied */
    float *norm;               /* [dim] */
    float *dembed, *dlm_head, *dnorm;
    psoup__layer *layers;
    float *cos_sin; /* [positions, head_dim]: see ops.h, rope */
    int32_t positions; /* grows to what is run: configurations promise a million */
    /* While the base itself trains: all weights as f32 in one flat buffer, and their gradients. */
    float *data, *grad; /* [count]; NULL while frozen */
    size_t count;
    psoup__weights *weights; /* the open files that frozen matrices point into, or NULL with: */
    void *storage;           /* device: frozen matrices of config.torch_dtype, linears of config.linear_dtype */
    float *vectors;          /* device: frozen norms and biases */
    bool backward_packed;
    psoup__adapter **adapters;
    int32_t n_adapters;
    size_t adapters_capacity;
    uint64_t edition; /* counts adapters added and removed: what a mix's columns mean */
};

/* Whether a parameter's matrix (or NULL) is one of a layer's linears. */
static inline bool psoup__is_linear(const psoup_model *model, const psoup__weight *weight) {
    return weight && weight != &model->embed && weight != &model->lm_head;
}

/* The widest input of a linear. */
static inline int32_t psoup__model_widest(const psoup_model *model) {
    int32_t dim = model->config.hidden_size, ffn = model->config.intermediate_size;
    int32_t widest = ffn > dim ? ffn : dim;
    return widest > model->q_width ? widest : model->q_width;
}

/* The tokens that end a text, by the configuration; returns how many. */
enum { PSOUP__END_TOKENS = 8 };
static inline size_t psoup__end_tokens(const psoup_model_config *c, int32_t out[PSOUP__END_TOKENS]) {
    size_t n = 0;
    if (c->eos_token_id >= 0)
        out[n++] = c->eos_token_id;
    for (size_t i = 0; i < PSOUP__END_TOKENS - 1; i++)
        if (c->more_eos_token_ids[i] >= 0)
            out[n++] = c->more_eos_token_ids[i];
    return n;
}

/* ---- parameters.c: the base's weights, one by one -------------------------------------------------- */

/* A cursor over the base's weights, in the order of the flat buffers. Start with all zero. */
typedef struct psoup__parameter {
    char name[80];         /* Hugging Face's */
    psoup__weight *weight; /* a matrix [rows, columns]; or NULL and: */
    float **vector;        /* a norm or a bias [rows] */
    float **gradient;
    int32_t rows, columns; /* columns is 1 for a vector */
    size_t count;
    size_t next;           /* the cursor's own */
} psoup__parameter;
bool psoup__model_next(const psoup_model *model, psoup__parameter *parameter);
size_t psoup__model_count(const psoup_model *model);
/* Points every d… of the base into `gradient` (device, psoup__model_count floats), or to NULL. */
void psoup__model_point_gradients(psoup_model *model, float *gradient);
/* Device memory for frozen weights: norms and biases, and with `matrices` those too. Points the model
 * at it. */
psoup_status psoup__model_store(psoup_model *model, bool matrices, psoup_error *error);
/* Elements [first, first + n) as f32 in host memory; scratch has room for PSOUP__PIECE floats, and n is at most
 * that. Of linears in blocks, `first` begins one. */
psoup_status psoup__parameter_read(const psoup_model *model, const psoup__parameter *parameter,
                                   size_t first, size_t n, float *out, void *scratch,
                                   psoup_error *error);
void psoup__parameter_write(psoup_model *model, const psoup__parameter *parameter, size_t first,
                            size_t n, const float *in, void *scratch);
/* The same of blocks that are there already. */
void psoup__parameter_write_blocks(psoup_model *model, const psoup__parameter *parameter, size_t first, size_t n,
                                   const uint8_t *codes, const float *scales);
enum { PSOUP__PIECE = 1 << 16 }; /* floats that cross between host and device at a time */
/* Packs the frozen matrices for the forward, or for the backward. A failure leaves them usable. */
psoup_status psoup__model_pack(psoup_model *model, bool backward, psoup_error *error);

/* load.c: fills an empty model from a directory's files. dtype: of psoup_load_options. */
psoup_status psoup__model_read(psoup_model *model, const char *directory, int32_t dtype, psoup_error *error);

/* ---- rope.c ---------------------------------------------------------------------------------------- */

/* Makes sure that model->cos_sin covers positions 0 … n − 1. */
psoup_status psoup__model_positions(psoup_model *model, int32_t n, psoup_error *error);

/* ---- adapter.c -------------------------------------------------------------------------------- */

psoup__adapter *psoup__model_adapter(const psoup_model *model, const char *name); /* NULL: none */
/* Adds a zero head (dim weights, one bias) at the end of the flat buffer, if there is none. Moves data:
 * call it before taking pointers or gradients. */
psoup_status psoup__adapter_add_head(psoup_model *model, psoup__adapter *adapter,
                                     psoup_error *error);
/* Gradients of an adapter that trains: of a small model on the host several, that lanes of rows add to side by side
 * (src/train/passes.c). Says nothing of threads: what depends on it is bits. */
enum { PSOUP__LANES = 8 };
int32_t psoup__gradients(const psoup_model *model);
/* Gives the adapter zeroed gradients, or takes them away. */
psoup_status psoup__adapter_train(psoup_model *model, psoup__adapter *adapter, bool train,
                                  psoup_error *error);
/* Refuses one that holds NaN or an infinity, from which nothing is learnt, naming the tensor and the value; without
 * `head` whatever its head holds. */
psoup_status psoup__adapter_may_train(const psoup_model *model, const psoup__adapter *adapter, bool head,
                                      psoup_error *error);
/* PEFT directory; with_head writes modules_to_save "score" and task type SEQ_CLS. */
psoup_status psoup__adapter_save(const psoup_model *model, const psoup__adapter *adapter,
                                 const char *directory, const char *base_name, bool with_head,
                                 psoup_error *error);

/* Moves the base into model->data (f32) with gradients, unpacked, so that it can train; or back to
 * frozen packed weights of config.torch_dtype. */
psoup_status psoup__model_train_base(psoup_model *model, bool train, psoup_error *error);
/* Refuses a base in blocks, which stays as it is. */
psoup_status psoup__model_may_train(const psoup_model *model, psoup_error *error);

/* ---- mix.c ---- */

/* One whose logits are mixed, and its weight. */
typedef struct psoup__view {
    int32_t adapter; /* −1: the base */
    float weight;
} psoup__view;
enum { PSOUP__MOST_VIEWS = 32 }; /* a chunk of the lm head has as many rows at least */
/* Whose logits this mix weighs: the adapters of a weight other than 0, and with 1 − Σ w the base, unless that is
 * within 1e-6 of 0. Fills out (NULL: does not), which a checked mix fits into; returns how many, 1 at least. */
int32_t psoup__mix_views(const psoup_model *model, const float *mix, psoup__view *out);

/* Whether this mix [n_adapters] can be mixed so; `what` names it in the message. */
psoup_status psoup__mix_check(const psoup_model *model, const float *mix, int32_t method, const char *what,
                              psoup_error *error);

/* Points lora, head and their gradients into data and grad. */
void psoup__adapter_point(const psoup_model *model, psoup__adapter *adapter);
extern const char *const psoup__linear_names[PSOUP__LINEARS]; /* "self_attn.q_proj" … */

/* ---- forward.c, backward.c ------------------------------------------------------------------- */

/* What runs together: n sequences packed one after another. All arrays are host memory. */
typedef struct psoup__batch {
    int32_t n, rows;       /* sequences; tokens in all */
    const int32_t *tokens; /* [rows] */
    const int32_t *start;  /* [n + 1]; start[n] == rows */
    const float *mix;      /* [n, n_adapters], NULL: the base */
    const int32_t *method; /* [n] psoup_mix_method, but not of logits, which are views of their own; NULL: delta */
    int32_t ahead;         /* 0; else each sequence has one row, and goes on by itself for so many tokens: its pages
                            * are all listed, every adapter lists every row, and no size says how long it is yet */
    float dropout;         /* on the adapters' input; 0: none */
    const uint64_t *dropout_seed;   /* [n], with dropout > 0: a pattern per (seed, stream) pair, */
    const uint64_t *dropout_stream; /* [n], layer, linear, position and element */
} psoup__batch;

/* The activations of one batch. Grows as needed and is used again. */
typedef struct psoup__tape psoup__tape;
psoup_status psoup__tape_create(psoup_model *model, psoup__tape **out, psoup_error *error);
void psoup__tape_free(psoup__tape *tape);
const float *psoup__tape_hidden(const psoup__tape *tape); /* device [rows, dim], after the last norm */

/* Whether saving forwards keep of each layer its input alone: the backward then runs a layer again before it goes
 * back through it (Chen et al. 2016, arXiv 1604.06174). Gradients have the same bits. */
void psoup__tape_recompute(psoup__tape *tape, bool recompute);

/* Which of its adapters' gradients a backward adds to: 0, unless this says another. */
void psoup__tape_gradient(psoup__tape *tape, int32_t gradient);

/* Runs the batch; with `save` keeps what psoup__backward needs. Refuses token ids out of range and
 * sequences longer than max_position_embeddings. */
psoup_status psoup__forward(psoup_model *model, psoup__tape *tape, const psoup__batch *batch,
                            bool save, psoup_error *error);

/* log p(target[i]) at chosen rows of the batch just run: out (device) [n]. The distribution read at a
 * row is that of the token after it. Works in chunks: no full logits for a long batch. */
psoup_status psoup__logprobs(psoup_model *model, psoup__tape *tape, const int32_t *row,
                             const int32_t *target, int32_t n, float *out, psoup_error *error);
/* Logits of chosen rows: out (host) [n, vocab]. */
psoup_status psoup__logits(psoup_model *model, psoup__tape *tape, const int32_t *row, int32_t n,
                           float *out, psoup_error *error);

/* A head at chosen rows, each a part of a value. */
typedef struct psoup__head_rows {
    const psoup__adapter *adapter; /* must have a head */
    const int32_t *row;            /* host [n], distinct */
    const int32_t *at;             /* host [n], distinct: which value, */
    const float *weight;           /* host [n]: and by what weight */
    int32_t n;
    const psoup__dropout *dropout; /* on the hidden state, per row of this list; NULL: none */
} psoup__head_rows;
/* Adds the heads' outputs to value (device), list by list. */
psoup_status psoup__heads(psoup_model *model, psoup__tape *tape, const psoup__head_rows *heads,
                          int32_t n_heads, float *value, psoup_error *error);

/* submit.c: psoup_session_submit of a prompt of whose answer n tokens were drawn before: it goes on behind them, on the
 * CPU with the bits that it would have had. */
psoup_status psoup__session_go_on(psoup_session *session, int64_t id, const psoup_prompt *prompt,
                                  const int32_t *drawn, size_t n, psoup_error *error);

/* What the loss says of the batch just run with `save`: its gradient by log-probs and values. */
typedef struct psoup__loss_gradient {
    const int32_t *row;    /* host [n], in any order, distinct */
    const int32_t *target; /* host [n] */
    const float *dlogprob; /* device [n] */
    int32_t n;
    const psoup__head_rows *heads;
    int32_t n_heads;
    const float *dvalue; /* device */
    float *dmix; /* host [batch n, n_adapters], overwritten; NULL: not asked for */
} psoup__loss_gradient;
/* What a backward makes when it is the first of its model. Before backwards of several tapes at once. */
psoup_status psoup__backward_ready(psoup_model *model, psoup_error *error);
/* Adds to the gradients of every adapter that has them (and to model->grad). Each adapter's sums run
 * over its own rows in their order, so rows of others change no bit of them. A tape is good for one
 * backward. */
psoup_status psoup__backward(psoup_model *model, psoup__tape *tape,
                             const psoup__loss_gradient *loss, psoup_error *error);

#endif
