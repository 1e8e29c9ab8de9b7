/* src/format: files that others wrote, checked before they are believed. */
#ifndef PSOUP__FORMAT_H
#define PSOUP__FORMAT_H

#include "base/base.h"
#include "psoup/model.h" /* psoup_model_config, the target set */

/* ---- safetensors.c: one file, mapped -------------------------------------------------------- */

/* A file's tensors, in the order of their data; `tensor.data` points into the mapping. */
typedef struct psoup__safetensors psoup__safetensors;
psoup_status psoup__safetensors_open(psoup_context *context, const char *path,
                                     psoup__safetensors **out, psoup_error *error);
/* The same from memory that outlives the handle; `name` stands for it in messages. */
psoup_status psoup__safetensors_parse(psoup_context *context, const void *data, size_t length,
                                      const char *name, psoup__safetensors **out,
                                      psoup_error *error);
void psoup__safetensors_free(psoup__safetensors *file);
size_t psoup__safetensors_count(const psoup__safetensors *file);
const char *psoup__safetensors_name(const psoup__safetensors *file, size_t index);
const psoup__tensor *psoup__safetensors_tensor(const psoup__safetensors *file, size_t index);
const psoup_json *psoup__safetensors_metadata(const psoup__safetensors *file); /* or NULL */
/* "F32", "BF16", …: the format's own names; NULL for a value that is no dtype. */
const char *psoup__safetensors_dtype_name(psoup_dtype dtype);

/* Writing: declare every tensor, begin, then write the data in the order declared. */
typedef struct psoup__safetensors_writer psoup__safetensors_writer;
psoup_status psoup__safetensors_create(psoup_context *context, const char *path,
                                       psoup__safetensors_writer **out, psoup_error *error);
psoup_status psoup__safetensors_declare(psoup__safetensors_writer *writer, const char *name,
                                        psoup_dtype dtype, int rank, const int64_t *shape,
                                        psoup_error *error);
psoup_status psoup__safetensors_metadata_set(psoup__safetensors_writer *writer, const char *key,
                                             const char *value, psoup_error *error);
psoup_status psoup__safetensors_begin(psoup__safetensors_writer *writer, psoup_error *error);
psoup_status psoup__safetensors_write(psoup__safetensors_writer *writer, const void *data,
                                      size_t bytes, psoup_error *error);
psoup_status psoup__safetensors_commit(psoup__safetensors_writer *writer, psoup_error *error);
void psoup__safetensors_writer_free(psoup__safetensors_writer *writer);

/* ---- weights.c: the tensors of a directory or file, over all its shards --------------------------
 * `path` is a .safetensors file, or a directory holding `<stem>.safetensors` or
 * `<stem>.safetensors.index.json` (stem "model" or "adapter_model"). A directory that holds only
 * pickles (.bin, .pt) is refused with the command that converts them. */
typedef struct psoup__weights psoup__weights;
psoup_status psoup__weights_open(psoup_context *context, const char *path, const char *stem,
                                 psoup__weights **out, psoup_error *error);
void psoup__weights_free(psoup__weights *weights);
size_t psoup__weights_count(const psoup__weights *weights);
const char *psoup__weights_name(const psoup__weights *weights, size_t index);
const psoup__tensor *psoup__weights_tensor(const psoup__weights *weights, size_t index);
const psoup__tensor *psoup__weights_find(const psoup__weights *weights, const char *name);
const char *psoup__weights_path(const psoup__weights *weights); /* for messages */

/* ---- hf.c: config.json ------------------------------------------------------------------------ */

/* Reads an architecture; refuses model types outside the LLaMA family, hidden activations other than
 * silu, and sizes that make no sense, by field and value. */
psoup_status psoup__hf_config_read(psoup_context *context, const char *directory,
                                   psoup_model_config *out, psoup_error *error);
/* The same from memory; `name` stands for it in messages. */
psoup_status psoup__hf_config_parse(const char *text, size_t length, const char *name,
                                    psoup_model_config *out, psoup_error *error);
psoup_status psoup__hf_config_write(psoup_context *context, const char *directory,
                                    const psoup_model_config *config, psoup_error *error);
/* Checks a config's sizes and fills derived ones (kv heads, head_dim); `where` for messages. */
psoup_status psoup__config_check(psoup_model_config *config, const char *where,
                                 psoup_error *error);
/* Copies the small files that make a model directory whole (config, generation config, tokenizer and
 * chat template files), those that exist. `from` may be a file in such a directory. */
psoup_status psoup__hf_copy_sidecars(psoup_context *context, const char *from, const char *to,
                                     psoup_error *error);

/* ---- peft.c: adapter directories ------------------------------------------------------------- */

/* One linear's pair of factors, as the file has them. */
typedef struct psoup__peft_pair {
    const char *module; /* "model.layers.0.self_attn.q_proj": the name in the base, no prefix */
    psoup__tensor a, b; /* [r, in], [out, r], any float dtype */
    float scale;        /* alpha / r or alpha / sqrt(r), patterns applied */
    int32_t rank;
} psoup__peft_pair;

typedef struct psoup__peft {
    psoup_context *context;
    psoup__weights *weights;
    psoup_json *config;
    psoup__peft_pair *pairs; /* sorted by module name */
    size_t n;
    psoup__tensor head; /* modules_to_save "score": [1, dim]; data NULL when there is none */
    psoup__tensor head_bias;
    char *path;
    char *names; /* storage of the module names */
} psoup__peft;
/* Honours rank_pattern, alpha_pattern, use_rslora; refuses by name what would change the result:
 * DoRA, bias other than "none", fan_in_fan_out, layer_replication, initialisations that alter the
 * base, other modules_to_save, other peft types. */
psoup_status psoup__peft_open(psoup_context *context, const char *directory, psoup__peft **out,
                              psoup_error *error);
void psoup__peft_free(psoup__peft *peft);

/* adapter_config.json alone, from memory: refuses what psoup__peft_open refuses. The caller frees *out. */
psoup_status psoup__peft_config_parse(const char *text, size_t length, const char *name,
                                      psoup_json **out, psoup_error *error);
/* Whether PEFT would apply the rank_pattern or alpha_pattern key to the module: the regular expression
 * (^|.*\.)key$. *matched receives the answer; groups, alternation, anchors and counts are refused. */
psoup_status psoup__peft_match(const char *key, const char *module, const char *where,
                               bool *matched, psoup_error *error);

/* What psoup__peft_write needs of one adapter. Pairs' tensors are F32, F16 or BF16. */
typedef struct psoup__peft_output {
    const psoup__peft_pair *pairs;
    size_t n;
    int32_t rank;
    float alpha;
    bool rslora;
    const char *task_type; /* "CAUSAL_LM" or "SEQ_CLS" */
    const char *base_name; /* base_model_name_or_path; NULL: "" */
    const float *head;     /* [dim] or NULL */
    const float *head_bias;
    int32_t dim;
    const char *const *metadata; /* key, value, key, value, …, NULL; or NULL */
} psoup__peft_output;
/* Pairs whose scale differs from alpha/rank get rank_pattern and alpha_pattern entries. */
psoup_status psoup__peft_write(psoup_context *context, const char *directory,
                               const psoup__peft_output *adapter, psoup_error *error);

#endif
