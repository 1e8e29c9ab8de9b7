/* psoup/model.h: tokenizer, model, adapters and their mix, generation, scores.
 *
 * The mix. A model holds one frozen base and n named LoRA adapters. Every row of a batch carries its
 * own weights over them:
 *
 *     y[row] = W x[row] + Σ_i mix[row][i] · scale_i · B_i (A_i x[row])
 *
 * All zeros is the base, one-hot is one policy, a user's weights are a personal soup (Jang et al.
 * 2023, equation 5, on effective parameters). Nothing is merged and nothing is swapped. A zero weight
 * is skipped, never multiplied: an adapter full of NaN changes no row that does not use it.
 */
#ifndef PSOUP_MODEL_H
#define PSOUP_MODEL_H

#include "psoup/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- tokenizer -------------------------------------------------------------------------------- */

typedef struct psoup_tokenizer psoup_tokenizer;

/* Reads a tokenizer.json (or the one in a model directory): BPE, byte-level or SentencePiece style
 * with byte fallback. After loading, encode and decode may be called from several threads. */
psoup_status psoup_tokenizer_load(psoup_context *context, const char *path, psoup_tokenizer **out,
                                  psoup_error *error);
/* Writes tokenizer.json at `path`, as it was read or trained. */
psoup_status psoup_tokenizer_save(const psoup_tokenizer *tokenizer, const char *path,
                                  psoup_error *error);
void psoup_tokenizer_free(psoup_tokenizer *tokenizer);

/* Trains a byte-level BPE of `vocab_size` tokens (256 bytes, then the special tokens, then merges by
 * frequency; ties by the lower pair of ids) on n texts. special: n_special names such as "</s>",
 * matched in text before anything else. pattern: the pre-tokeniser's regular expression; NULL means
 * GPT-2's. */
psoup_status psoup_tokenizer_train(psoup_context *context, const char *const *texts, size_t n,
                                   int32_t vocab_size, const char *const *special, size_t n_special,
                                   const char *pattern, psoup_tokenizer **out, psoup_error *error);

int32_t psoup_tokenizer_vocab_size(const psoup_tokenizer *tokenizer); /* highest id + 1 */
/* The id of a token by its exact name, specials included; −1 when there is none. */
int32_t psoup_tokenizer_token_id(const psoup_tokenizer *tokenizer, const char *token);
/* The name of a token as the file spells it; NULL for an id that has none. Borrowed. */
const char *psoup_tokenizer_token(const psoup_tokenizer *tokenizer, int32_t id);

typedef struct psoup_offset {
    size_t begin, end; /* bytes [begin, end) of the text that was encoded */
} psoup_offset;

enum {
    PSOUP_ADD_SPECIAL = 1,  /* let the post-processor add its tokens (<s> …), as the file says */
    PSOUP_PLAIN_SPECIAL = 2 /* read special tokens in the text as plain text */
};

/* Encodes `length` bytes. Invalid UTF-8 is read as U+FFFD, as Python's errors="replace" does; offsets
 * stay those of the original bytes. Writes at most `capacity` ids and, when offsets is not NULL, as
 * many offsets; *count receives how many there are in all. Capacity 4 · length + 8 always
 * suffices. */
psoup_status psoup_tokenizer_encode(const psoup_tokenizer *tokenizer, const char *text,
                                    size_t length, uint32_t flags, int32_t *ids,
                                    psoup_offset *offsets, size_t capacity, size_t *count,
                                    psoup_error *error);
/* Decodes n ids into at most `capacity` bytes (no NUL is added); *length receives how many there are
 * in all. skip_special leaves special tokens out. Byte-level output may hold invalid UTF-8 where the
 * ids cut a character. An id out of range is an error. */
psoup_status psoup_tokenizer_decode(const psoup_tokenizer *tokenizer, const int32_t *ids, size_t n,
                                    int skip_special, char *text, size_t capacity, size_t *length,
                                    psoup_error *error);

/* ---- model ---------------------------------------------------------------------------------- */

typedef struct psoup_model psoup_model;

typedef enum psoup_rope_scaling {
    PSOUP_ROPE_DEFAULT = 0,
    PSOUP_ROPE_LINEAR = 1,
    PSOUP_ROPE_LLAMA3 = 2,
    PSOUP_ROPE_YARN = 3,
    PSOUP_ROPE_DYNAMIC = 4 /* NTK by length; the length is max_position of the configuration */
} psoup_rope_scaling;

/* The architecture: the LLaMA family, by the names of Hugging Face's config.json. */
typedef struct psoup_model_config {
    size_t size;
    int32_t vocab_size, hidden_size, intermediate_size;
    int32_t num_hidden_layers, num_attention_heads;
    int32_t num_key_value_heads; /* 0: as many as attention heads */
    int32_t head_dim;            /* 0: hidden_size / num_attention_heads */
    int32_t max_position_embeddings;
    float rms_norm_eps, rope_theta;
    int32_t rope_scaling; /* psoup_rope_scaling */
    float rope_factor, rope_low_freq_factor, rope_high_freq_factor;
    int32_t rope_original_max_position;
    float rope_beta_fast, rope_beta_slow;
    float rope_attention_factor; /* YaRN; 0: 0.1 ln(factor) + 1 */
    int32_t attention_bias;      /* q, k, v and o have biases */
    int32_t qkv_bias;            /* q, k, v alone have (Qwen2) */
    int32_t mlp_bias;
    int32_t tie_word_embeddings;
    int32_t bos_token_id, eos_token_id, pad_token_id; /* −1: none */
    int32_t torch_dtype; /* psoup_dtype of the stored weights: F32, F16 or BF16 */
    float initializer_range;
    int32_t more_eos_token_ids[7]; /* that end a text as eos_token_id does; −1: none */
    int32_t linear_dtype; /* since 0.4: how the layers' linears are kept while frozen: 0: as torch_dtype says;
                           * PSOUP_INT8, PSOUP_NF4: in blocks, see below */
    int32_t reserved;     /* 0 */
} psoup_model_config;

#define PSOUP_MODEL_CONFIG_INIT                                                                    \
    {.size = sizeof(psoup_model_config), .max_position_embeddings = 2048, .rms_norm_eps = 1e-6f,   \
     .rope_theta = 10000.0f, .rope_factor = 1.0f, .rope_low_freq_factor = 1.0f,                    \
     .rope_high_freq_factor = 4.0f, .rope_beta_fast = 32.0f, .rope_beta_slow = 1.0f,               \
     .bos_token_id = -1, .eos_token_id = -1, .pad_token_id = -1, .initializer_range = 0.02f, \
     .more_eos_token_ids = {-1, -1, -1, -1, -1, -1, -1}}

/* Loads a Hugging Face model directory: config.json with one model.safetensors, or several named by
 * model.safetensors.index.json, and of generation_config.json, where there is one, eos_token_id, whose tokens end a
 * text as config.json's do (its temperature and the like are a caller's to choose); or a .gguf file (f32, f16, bf16,
 * q8_0; its tokenizer is not read). Weights keep their dtype, q8_0 becomes f32. NaN and infinite weights are refused
 * with the tensor's name. On the CPU frozen matrices are mapped and used where they lie in the file, which must not be
 * truncated (a SIGBUS) or written to before the model is freed; another file may take its place. */
psoup_status psoup_model_load(psoup_context *context, const char *directory, psoup_model **out,
                              psoup_error *error);
/* Linears in blocks: 64 neighbouring values of a matrix (row-major, whatever its rows) with one f32 scale.
 *   PSOUP_NF4   4 bits a value, 4.5 with the scale: the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv
 *               2305.14314, appendix E), bit for bit what bitsandbytes makes with quant_type nf4, blocksize 64
 *   PSOUP_INT8  8 bits a value, 8.5 with the scale, which is max|x| / 127; rounded to the nearest
 * Every result has the bits (on a GPU: is that) of a model whose linears hold the blocks' values. Adapters train on
 * such a base as on any; the base itself does not, and is not saved. */
typedef struct psoup_load_options {
    size_t size;
    int32_t dtype;    /* −1: as the files have it. PSOUP_F32, F16, BF16: of all matrices, rounded to nearest.
                       * PSOUP_INT8, NF4: of the layers' linears; embedding and head stay as they are */
    int32_t reserved; /* 0 */
} psoup_load_options;
#define PSOUP_LOAD_OPTIONS_INIT {.size = sizeof(psoup_load_options), .dtype = -1}

/* psoup_model_load with options (NULL: none). Files are read piece by piece where anything is converted, so that
 * the memory taken is the model's own; they are not used afterwards. Directories that transformers saved with
 * bitsandbytes' nf4 (with double quantisation or without) or LLM.int8() are read by both, as they are or
 * converted to f32, f16 or bf16. Since 0.4. */
psoup_status psoup_model_load_with(psoup_context *context, const char *directory, const psoup_load_options *options,
                                   psoup_model **out, psoup_error *error);
/* A model with random weights: matrices normal(0, initializer_range), norms 1, biases 0. */
psoup_status psoup_model_create(psoup_context *context, const psoup_model_config *config,
                                uint64_t seed, psoup_model **out, psoup_error *error);
/* Writes config.json and model.safetensors; with a tokenizer, tokenizer.json and a tokenizer_config.json
 * too. PSOUP_ERROR_UNSUPPORTED where linears are kept in blocks. */
psoup_status psoup_model_save(const psoup_model *model, const char *directory,
                              const psoup_tokenizer *tokenizer, psoup_error *error);
void psoup_model_free(psoup_model *model);
/* config->size must be set. */
psoup_status psoup_model_get_config(const psoup_model *model, psoup_model_config *config,
                                    psoup_error *error);
int64_t psoup_model_parameters(const psoup_model *model); /* of the base */
psoup_context *psoup_model_context(const psoup_model *model);

/* ---- adapters ---------------------------------------------------------------------------------- */

enum { /* the linears of a layer, as a set */
    PSOUP_Q_PROJ = 1,
    PSOUP_K_PROJ = 2,
    PSOUP_V_PROJ = 4,
    PSOUP_O_PROJ = 8,
    PSOUP_GATE_PROJ = 16,
    PSOUP_UP_PROJ = 32,
    PSOUP_DOWN_PROJ = 64,
    PSOUP_ALL_LINEAR = 127
};

typedef struct psoup_adapter_options {
    size_t size;
    int32_t rank;
    float alpha; /* scale = alpha / rank; above 0 */
    int32_t rslora; /* scale = alpha / sqrt(rank) instead */
    uint32_t targets;
    uint64_t seed; /* A is uniform(−1/√in, 1/√in) (PEFT's kaiming_uniform, a = √5), B is 0 */
} psoup_adapter_options;
#define PSOUP_ADAPTER_OPTIONS_INIT                                                                 \
    {.size = sizeof(psoup_adapter_options), .rank = 16, .alpha = 32.0f,                            \
     .targets = PSOUP_Q_PROJ | PSOUP_V_PROJ}

/* Adds an adapter under a new name. Adapters are numbered from 0 in the order they were added. */
psoup_status psoup_model_add_adapter(psoup_model *model, const char *name,
                                     const psoup_adapter_options *options, psoup_error *error);
/* Reads a PEFT directory (adapter_config.json, adapter_model.safetensors), or a .gguf adapter. */
psoup_status psoup_model_load_adapter(psoup_model *model, const char *name, const char *directory,
                                      psoup_error *error);
/* Writes a PEFT directory of task type CAUSAL_LM. base_name goes into base_model_name_or_path; NULL: "".
 * A scalar head (PPO's values, a reward model's score) is not in it: see psoup_reward_save. */
psoup_status psoup_model_save_adapter(const psoup_model *model, const char *name,
                                      const char *directory, const char *base_name,
                                      psoup_error *error);
/* Removes it; later adapters move down by one. */
psoup_status psoup_model_remove_adapter(psoup_model *model, const char *name, psoup_error *error);
int32_t psoup_model_adapters(const psoup_model *model);
int32_t psoup_model_find_adapter(const psoup_model *model, const char *name);  /* −1: none */
const char *psoup_model_adapter_name(const psoup_model *model, int32_t index); /* borrowed */
/* The named adapter's parameters in one flat buffer, for callers that keep or compare them: *data
 * (borrowed, host memory) and *count. The order is layer by layer, q k v o gate up down, A then B,
 * then the scalar head if it has one. */
psoup_status psoup_model_adapter_data(const psoup_model *model, const char *name,
                                      const float **data, size_t *count, psoup_error *error);

/* Reads "P1A=0.5,P2B=0.5" into weights[psoup_model_adapters(model)]; names must exist, numbers be
 * finite, and the sum within 1e-6 of 1 unless any_sum. An empty text is the base. */
psoup_status psoup_model_parse_mix(const psoup_model *model, const char *text, int any_sum,
                                   float *weights, psoup_error *error);

/* What the weights of a mix, those of one row, are given to. Rows of one batch may differ in it. The first two are the
 * merger's methods of these names, per row and without merging. */
typedef enum psoup_mix_method {
    PSOUP_MIX_DELTA = 0,  /* Σ w_i s_i B_i A_i, the weighted sum of what the adapters change (Jang et al. 2023, eq. 5) */
    PSOUP_MIX_FACTORS = 1, /* s (Σ w_i B_i)(Σ w_j A_j), as the paper's released code sums them. In each linear adapters of
                           * weights other than 0 have one rank and one scale, or leave it alone. Since 0.4 */
    /* No parameters but logits: Σ w_i logits_i + (1 − Σ w_i) logits_base, each policy reading the text by itself, so
     * that π ∝ π_base^(1 − Σ w) Π π_i^(w_i). With Σ w = 1 (to 1e-6) the base has no part: multi-objective decoding
     * (Shi et al. 2024, arXiv 2406.18853). At most 32 are mixed. Costs, and caches, as many sequences. Since 0.4 */
    PSOUP_MIX_LOGITS = 2
} psoup_mix_method;
/* The name of a method ("factors"; borrowed, static; "?" for a value that is none), and back. */
const char *psoup_mix_method_name(int32_t method);
psoup_status psoup_mix_method_parse(const char *name, int32_t *out, psoup_error *error);

/* ---- scores --------------------------------------------------------------------------------- */

/* One sequence of a batch. */
typedef struct psoup_row {
    const int32_t *tokens;
    size_t n;
    const float *mix; /* [psoup_model_adapters(model)]; NULL: the base */
} psoup_row;

/* Log-probabilities of tokens 1 … n−1 of each row given those before: out receives Σ (n_i − 1)
 * floats, row after row. Rows are computed packed, without padding. */
psoup_status psoup_model_logprobs(psoup_model *model, const psoup_row *rows, size_t n, float *out,
                                  psoup_error *error);
/* Logits of every position of every row: out receives Σ n_i · vocab_size floats. */
psoup_status psoup_model_logits(psoup_model *model, const psoup_row *rows, size_t n, float *out,
                                psoup_error *error);

/* The same two, each row by its own method: methods [n] psoup_mix_method, NULL: all delta. Since 0.4. */
psoup_status psoup_model_logprobs_mixed(psoup_model *model, const psoup_row *rows, const int32_t *methods, size_t n,
                                        float *out, psoup_error *error);
psoup_status psoup_model_logits_mixed(psoup_model *model, const psoup_row *rows, const int32_t *methods, size_t n,
                                      float *out, psoup_error *error);

/* The gradient of Σ_i Σ_t weight · log p(token t of row i), for callers with objectives of their own
 * and for tests. weights has the layout of psoup_model_logprobs' out; NULL: all 1. */
typedef struct psoup_gradients psoup_gradients;
enum {
    PSOUP_GRADIENT_BASE = 1,     /* every base weight, by its Hugging Face name */
    PSOUP_GRADIENT_ADAPTERS = 2, /* every adapter: "P1A/model.layers.0.self_attn.q_proj.lora_A" */
    PSOUP_GRADIENT_MIX = 4       /* "mix": [rows, adapters]; zero where a row's weight is zero */
};
psoup_status psoup_model_gradients(psoup_model *model, const psoup_row *rows, size_t n,
                                   const float *weights, uint32_t what, psoup_gradients **out,
                                   psoup_error *error);
/* The same, each row by its own method as above, but PSOUP_MIX_LOGITS (PSOUP_ERROR_UNSUPPORTED). Since 0.4. */
psoup_status psoup_model_gradients_mixed(psoup_model *model, const psoup_row *rows, const int32_t *methods, size_t n,
                                         const float *weights, uint32_t what, psoup_gradients **out,
                                         psoup_error *error);
/* Borrowed; NULL when there is none of that name. *count receives its elements. */
const float *psoup_gradients_get(const psoup_gradients *gradients, const char *name, size_t *count);
void psoup_gradients_free(psoup_gradients *gradients);

/* ---- generation ------------------------------------------------------------------------------- */

typedef struct psoup_sampling {
    size_t size;
    int32_t max_new_tokens;
    int32_t min_new_tokens;      /* until then stop tokens have probability 0 */
    float temperature;           /* 0: greedy */
    int32_t top_k;               /* 0: off */
    float top_p;                 /* 1: off */
    int32_t no_repeat_ngram_size; /* 0: off; over prompt and output, as transformers has it */
    int32_t ignore_stop;         /* sample on past stop tokens, to max_new_tokens */
    uint64_t seed;
    const int32_t *stop_tokens; /* n_stop_tokens of them; NULL: the model's eos tokens */
    size_t n_stop_tokens;
} psoup_sampling;
#define PSOUP_SAMPLING_INIT                                                                        \
    {.size = sizeof(psoup_sampling), .max_new_tokens = 128, .temperature = 1.0f, .top_p = 1.0f}

typedef struct psoup_prompt {
    const int32_t *tokens; /* at least one */
    size_t n;
    const float *mix;  /* [psoup_model_adapters(model)]; NULL: the base */
    uint64_t sequence; /* with the seed, its stream of random words: token t takes word t */
    const psoup_sampling *sampling; /* NULL: the call's */
    int32_t mix_method;             /* psoup_mix_method; since 0.4 */
    float mix_strength; /* multiplies the mix's weights: with Σ w = 1, how far the soup goes from the base, by its
                         * method; 0: 1. Since 0.4 */
    uint64_t reserved[1];           /* 0 */
} psoup_prompt;

typedef enum psoup_finish {
    PSOUP_FINISH_NONE = 0,   /* not finished */
    PSOUP_FINISH_STOP = 1,   /* a stop token, which is kept as the last token */
    PSOUP_FINISH_LENGTH = 2, /* max_new_tokens, or the session's room */
    PSOUP_FINISH_ERROR = 3   /* its logits were not numbers: an adapter or weight of its mix diverged */
} psoup_finish;

/* A session: a KV cache and a changing set of sequences that decode together, each with its own mix;
 * a finished one gives its place to the next prompt. */
typedef struct psoup_session psoup_session;
typedef struct psoup_session_options {
    size_t size;
    int32_t max_sequences; /* places; 0: 32. A sequence takes one, by PSOUP_MIX_LOGITS one for each policy */
    int32_t max_tokens;    /* tokens a place can hold; 0: max_position_embeddings */
    int32_t prefill_rows;  /* prompt tokens taken in one step at most; 0: 512 */
    int32_t reserved;      /* 0 */
    int64_t cache_tokens;  /* since 0.3: tokens that the cache holds of all sequences together, as keys and values;
                            * one waits until there is room for its prompt and longest answer. 0: max_sequences ·
                            * max_tokens. At least one sequence of max_tokens always fits */
    int32_t steps;         /* since 0.3: tokens that a GPU decodes of every sequence before the host looks again,
                            * 1 to 1024; 0: 8. Callbacks come that late, results are the same. The CPU takes one */
    int32_t reserved2;     /* 0 */
} psoup_session_options;
#define PSOUP_SESSION_OPTIONS_INIT {.size = sizeof(psoup_session_options)}

/* Called for every new token, in step order; return non-zero to stop the session's step with
 * PSOUP_ERROR_CANCELLED. `finish` is PSOUP_FINISH_NONE but for the last token. With
 * PSOUP_FINISH_ERROR token is −1. */
typedef int (*psoup_token_fn)(void *user, int64_t id, int32_t token, float logprob,
                              psoup_finish finish);

psoup_status psoup_session_create(psoup_model *model, const psoup_session_options *options,
                                  psoup_session **out, psoup_error *error);
/* Queues a prompt (tokens, mix and sampling are copied) under the caller's id. */
psoup_status psoup_session_submit(psoup_session *session, int64_t id, const psoup_prompt *prompt,
                                  psoup_error *error);
/* One step: admits waiting prompts to free places, then one new token for every running sequence; on a GPU
 * up to options.steps of them, where no prompt is under way.
 * *running receives how many are running or waiting afterwards. */
psoup_status psoup_session_step(psoup_session *session, psoup_token_fn on_token, void *user,
                                size_t *running, psoup_error *error);
void psoup_session_free(psoup_session *session);

/* All at once: a session, its steps, and the results. on_token may be NULL. */
typedef struct psoup_generation psoup_generation;
typedef struct psoup_completion {
    const int32_t *tokens; /* [n], borrowed from the generation */
    const float *logprobs; /* [n] of the untouched distribution */
    size_t n;
    psoup_finish finish;
} psoup_completion;
psoup_status psoup_generate(psoup_model *model, const psoup_prompt *prompts, size_t n,
                            const psoup_sampling *sampling, const psoup_session_options *options,
                            psoup_token_fn on_token, void *user, psoup_generation **out,
                            psoup_error *error);
/* What a call will take, in bytes and at most, found without making it: from the sizes of the model, the options and
 * the lengths of what it is given, every response taken to be as long as it may become. Of what the system and other
 * libraries keep for themselves nothing is in it, nor what the context has since it was created. */
typedef struct psoup_memory {
    size_t size;
    int64_t base;        /* the base's weights, and their copies packed for products */
    int64_t mapped;      /* those used where they lie in their files, which no sum has: the system may drop them */
    int64_t adapters;    /* factors and heads of all of the model's adapters */
    int64_t learning;    /* gradients, optimisers' moments, the best weights so far; of a base also itself in f32 */
    int64_t activations; /* of the largest passes, forward and backward */
    int64_t logits;      /* of a few rows at a time */
    int64_t cache;       /* keys and values of what decodes together */
    int64_t rows;        /* tokens, responses, and what is known of each */
    int64_t held;        /* of base and adapters: what the model has already */
    int64_t host, device; /* the sums in host memory and in the GPU's; device is 0 on the CPU */
    int64_t device_free; /* what the GPU has free at this moment; −1 on the CPU */
} psoup_memory;

/* Of psoup_generate with these arguments; sampling and options are checked as there. out->size must be set. */
psoup_status psoup_generate_memory(psoup_model *model, const psoup_prompt *prompts, size_t n,
                                   const psoup_sampling *sampling, const psoup_session_options *options,
                                   psoup_memory *out, psoup_error *error);
/* Borrowed; NULL past the last prompt. */
const psoup_completion *psoup_generation_get(const psoup_generation *generation, size_t index);
void psoup_generation_free(psoup_generation *generation);

#ifdef __cplusplus
}
#endif
#endif
