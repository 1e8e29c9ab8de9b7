/* src/format: files that others wrote, checked before they are believed. */
#ifndef PSOUP__FORMAT_H
#define PSOUP__FORMAT_H

#include "base/base.h"
#include "psoup/model.h" /* psoup_model_config, the target set */

/* ---- safetensors.c: one file ----------------------------------------------------------------- */

/* A file's tensors, in the order of their data. The file is kept open, and tensors are read by their `pull`. */
typedef struct psoup__safetensors psoup__safetensors;
psoup_status psoup__safetensors_open(psoup_context *context, const char *path,
                                     psoup__safetensors **out, psoup_error *error);
/* Maps the file, so that tensors have `data` and no `pull`. */
psoup_status psoup__safetensors_map(psoup__safetensors *file, psoup_error *error);
/* The same from memory that outlives the handle; `name` stands for it in messages. */
psoup_status psoup__safetensors_parse(psoup_context *context, const void *data, size_t length,
                                      const char *name, psoup__safetensors **out,
                                      psoup_error *error);
void psoup__safetensors_free(psoup__safetensors *file);
size_t psoup__safetensors_count(const psoup__safetensors *file);
const char *psoup__safetensors_name(const psoup__safetensors *file, size_t index);
const psoup__tensor *psoup__safetensors_tensor(const psoup__safetensors *file, size_t index);
const psoup_json *psoup__safetensors_metadata(const psoup__safetensors *file); /* or NULL */
psoup__file *psoup__safetensors_file(psoup__safetensors *file); /* its path is NULL when it was in memory */
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
/* Puts text into the metadata of a file that was written, in the place of a value of spaces, which must be as
 * many at least as the text takes inside a JSON string (psoup__json_string_bytes). May be done again. */
psoup_status psoup__safetensors_patch(psoup_context *context, const char *path, const char *key,
                                      const char *text, psoup_error *error);
size_t psoup__json_string_bytes(const char *text);

/* ---- weights.c: the tensors of a directory or file, over all its shards --------------------------
 * `path` is a .safetensors file, a .gguf file (of a model, or with another stem of an adapter), or a
 * directory holding `<stem>.safetensors` or `<stem>.safetensors.index.json` (stem "model" or
 * "adapter_model"). A directory that holds only pickles (.bin, .pt) is refused with the command that
 * converts them. Tensors of a GGUF file have Hugging Face's names, and may be q8_0 or have `heads`: read
 * them with psoup__tensor_read. */
typedef struct psoup__weights psoup__weights;
/* Files are kept open, and tensors read by their `pull`: afterwards psoup__weights_check says whether what was
 * read can be believed. heads and kv_heads: for GGUF adapters whose file does not say how many their rows are
 * interleaved by, or 0. */
psoup_status psoup__weights_open(psoup_context *context, const char *path, const char *stem, int32_t heads,
                                 int32_t kv_heads, psoup__weights **out, psoup_error *error);
/* Files are mapped, and tensors have `data`: for who reads weights in place. */
psoup_status psoup__weights_map(psoup_context *context, const char *path, const char *stem,
                                psoup__weights **out, psoup_error *error);
void psoup__weights_free(psoup__weights *weights);
/* Refuses weights whose files changed since they were opened, or could not be read: names the file, and the
 * tensor where bytes of one are missing. */
psoup_status psoup__weights_check(const psoup__weights *weights, psoup_error *error);
size_t psoup__weights_count(const psoup__weights *weights);
const char *psoup__weights_name(const psoup__weights *weights, size_t index);
const psoup__tensor *psoup__weights_tensor(const psoup__weights *weights, size_t index);
const psoup__tensor *psoup__weights_find(const psoup__weights *weights, const char *name);
bool psoup__weights_index(const psoup__weights *weights, const char *name, size_t *index);
const char *psoup__weights_path(const psoup__weights *weights); /* for messages */
bool psoup__is_gguf(const char *path); /* by its name's ending; no directory */
size_t psoup__weights_files(const psoup__weights *weights);
psoup__file *psoup__weights_file(const psoup__weights *weights, size_t index);
struct psoup__gguf;
const struct psoup__gguf *psoup__weights_gguf(const psoup__weights *weights); /* NULL: is none */

/* ---- bitsandbytes.c: linears that transformers saved quantised ---------------------------------- */

/* One linear, where its parts lie; see blocks.c in base.h for what they become. */
typedef struct psoup__bnb {
    psoup_dtype dtype; /* NF4, or INT8 for LLM.int8() */
    int64_t in;
    const psoup__tensor *codes;
    const psoup__tensor *scales; /* max|x| of each block, or row: F32, or U8 where they are quantised in turn: */
    const psoup__tensor *nested; /* max|x| of 256 scales; or NULL */
    float level[256], offset;
} psoup__bnb;
/* Finds and checks what belongs to a weight "….weight" [out, in]. */
psoup_status psoup__bnb_find(psoup_context *context, const psoup__weights *weights, const char *weight,
                             psoup_dtype dtype, int64_t out, int64_t in, psoup__bnb *linear, psoup_error *error);
/* The blocks of elements first … first + n − 1; first is a multiple of 64. */
void psoup__bnb_read(psoup_context *context, const psoup__bnb *linear, size_t first, size_t n, uint8_t *codes,
                     float *scales);
/* Whether a tensor's name is that of such a part, and of which weight. */
bool psoup__bnb_part(const char *name, char *weight, size_t size);

/* ---- hf.c: config.json ------------------------------------------------------------------------ */

/* Reads an architecture, of a model directory or a .gguf file, with the end tokens of generation_config.json too;
 * refuses model types outside the LLaMA family, hidden activations other than silu, and sizes that make no sense, by
 * field and value. */
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
 * chat template files), those that exist. `from` may be a file in such a directory; of a .gguf file they
 * are made from its metadata. */
psoup_status psoup__hf_copy_sidecars(psoup_context *context, const char *from, const char *to,
                                     psoup_error *error);

/* The directory itself, or the one that the file is in; free it with psoup__free. */
char *psoup__directory_of(psoup_context *context, const char *path, psoup_error *error);

/* ---- peft.c: adapter directories ------------------------------------------------------------- */

/* One linear's pair of factors, as the file has them. */
typedef struct psoup__peft_pair {
    const char *module; /* "model.layers.0.self_attn.q_proj": the name in the base, no prefix */
    psoup__tensor a, b; /* [r, in], [out, r], any float dtype */
    float scale;        /* alpha / r or alpha / sqrt(r), patterns applied */
    int32_t rank;
    bool transposed; /* fan_in_fan_out: the base keeps this weight as [in, out], and (B A)ᵀ is added to it */
} psoup__peft_pair;

typedef struct psoup__peft {
    psoup_context *context;
    psoup__weights *weights;
    psoup_json *config; /* of a .gguf file: r, lora_alpha */
    psoup__peft_pair *pairs; /* sorted by module name; of a .gguf file B's rows may be interleaved and
                              * either factor q8_0: read with psoup__tensor_read */
    size_t n;
    psoup__tensor head; /* modules_to_save "score": [1, dim]; zeros where there is none */
    psoup__tensor head_bias;
    char *path;
    char *names; /* storage of the module names */
} psoup__peft;
/* Honours rank_pattern, alpha_pattern, use_rslora, and says of every pair whether it is fan_in_fan_out;
 * refuses by name what would change the result: DoRA, bias other than "none", layer_replication,
 * initialisations that alter the base, other modules_to_save, other peft types. */
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
/* adapter_config.json alone, into a directory that is there. Of the pairs the module, rank and scale count. */
psoup_status psoup__peft_write_config(psoup_context *context, const char *directory,
                                      const psoup__peft_output *adapter, psoup_error *error);

/* ---- gguf.c: GGUF files (llama.cpp's) ---------------------------------------------------------------
 * Version 2 or 3, little-endian. Every count, length, offset, name and type is checked against the file
 * before it is used. What stands before the tensors' data is read into memory, the file kept open, and tensors
 * read by their `pull`. Format: ggml's docs/gguf.md. */

typedef enum psoup__gguf_type { /* of a metadata value */
    PSOUP__GGUF_UINT8, PSOUP__GGUF_INT8, PSOUP__GGUF_UINT16, PSOUP__GGUF_INT16, PSOUP__GGUF_UINT32,
    PSOUP__GGUF_INT32, PSOUP__GGUF_FLOAT32, PSOUP__GGUF_BOOL, PSOUP__GGUF_STRING, PSOUP__GGUF_ARRAY,
    PSOUP__GGUF_UINT64, PSOUP__GGUF_INT64, PSOUP__GGUF_FLOAT64, PSOUP__GGUF_TYPES
} psoup__gguf_type;

typedef struct psoup__gguf_value {
    const char *key; /* NUL-terminated */
    psoup__gguf_type type;
    psoup__gguf_type element; /* of an array */
    size_t count;             /* elements of an array; 1 otherwise */
    const unsigned char *data; /* the first element, or the string's length field; unaligned */
    size_t bytes;              /* all elements */
} psoup__gguf_value;

typedef struct psoup__gguf psoup__gguf;
psoup_status psoup__gguf_open(psoup_context *context, const char *path, psoup__gguf **out,
                              psoup_error *error);
/* Maps the file, so that tensors have `data` and no `pull`. */
psoup_status psoup__gguf_map(psoup__gguf *file, psoup_error *error);
/* The same from memory that outlives the handle; `name` stands for it in messages. */
psoup_status psoup__gguf_parse(psoup_context *context, const void *data, size_t length,
                               const char *name, psoup__gguf **out, psoup_error *error);
void psoup__gguf_free(psoup__gguf *file);
const char *psoup__gguf_path(const psoup__gguf *file);
psoup__file *psoup__gguf_file(psoup__gguf *file);
/* Where in the file a string lies that psoup__gguf_string gave. */
size_t psoup__gguf_offset(const psoup__gguf *file, const char *text);
/* Tensors in the order of their infos, shapes as PyTorch has them (the dimensions reversed), names as
 * the file has them; `heads` is 0 throughout: which rows are interleaved is the architecture's matter,
 * see psoup__gguf_layout. */
size_t psoup__gguf_count(const psoup__gguf *file);
const char *psoup__gguf_name(const psoup__gguf *file, size_t index);
const psoup__tensor *psoup__gguf_tensor(const psoup__gguf *file, size_t index);
const psoup__tensor *psoup__gguf_find(const psoup__gguf *file, const char *name);
/* Metadata. `get` gives NULL where there is no such key. */
size_t psoup__gguf_values(const psoup__gguf *file);
const psoup__gguf_value *psoup__gguf_value_at(const psoup__gguf *file, size_t index);
const psoup__gguf_value *psoup__gguf_get(const psoup__gguf *file, const char *key);
/* Any integer type, number type, bool; `otherwise` where the key is absent or of another kind. */
int64_t psoup__gguf_integer(const psoup__gguf *file, const char *key, int64_t otherwise);
double psoup__gguf_real(const psoup__gguf *file, const char *key, double otherwise);
bool psoup__gguf_bool(const psoup__gguf *file, const char *key, bool otherwise);
/* A string's bytes, not NUL-terminated: false where the key is absent or no string. */
bool psoup__gguf_string(const psoup__gguf *file, const char *key, const char **text, size_t *length);
bool psoup__gguf_is(const psoup__gguf *file, const char *key, const char *text); /* equals it */
/* Walks the strings of an array: *at starts as value->data. */
void psoup__gguf_next_string(const unsigned char **at, const char **text, size_t *length);
/* Element i of an array of numbers. */
double psoup__gguf_number(const psoup__gguf_value *array, size_t i);

/* ---- gguf_names.c: names and row orders of the two worlds ------------------------------------------ */

/* What a model's architecture says about its tensors. */
typedef struct psoup__gguf_layout {
    bool permuted; /* q and k lie as psoup__tensor.heads describes: "llama", but not "qwen2" */
    int32_t heads, kv_heads; /* 0: the file does not say */
    int32_t head_dim;        /* likewise */
} psoup__gguf_layout;
/* Of a file, by its general.architecture; refuses other architectures by name. */
psoup_status psoup__gguf_layout_of(const psoup__gguf *file, psoup__gguf_layout *out,
                                   psoup_error *error);
/* "blk.0.attn_q.weight" <-> "model.layers.0.self_attn.q_proj.weight". The ending (".weight", ".bias",
 * ".weight.lora_a") is kept; without one, modules are renamed: "model.layers.0.mlp.up_proj". False for a
 * name that has no counterpart. out has PSOUP__GGUF_NAME bytes. */
enum { PSOUP__GGUF_NAME = 128 };
bool psoup__gguf_to_hf(const char *name, char *out);
bool psoup__gguf_from_hf(const char *name, char *out);
/* "blk.0.attn_q.weight.lora_a" -> "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight". */
bool psoup__gguf_to_peft(const char *name, char *out);
/* The number of heads by which the rows of a tensor (by its Hugging Face name) are interleaved; 0 for all
 * but q and k of a permuted architecture. */
int32_t psoup__gguf_heads(const psoup__gguf_layout *layout, const char *hf_name);
/* Sets tensor->heads by that; refuses rows that do not divide into heads, and heads that are unknown.
 * `name` is for messages. */
psoup_status psoup__gguf_set_heads(const psoup__gguf_layout *layout, const char *path, const char *name,
                                   const char *hf_name, psoup__tensor *tensor, psoup_error *error);

/* ---- gguf_write.c ------------------------------------------------------------------------------------
 * As the safetensors writer: create, metadata and declarations in any order, begin, the data of the
 * tensors in the order declared and in row-major order as Hugging Face has it, in pieces of any size,
 * commit. Names are Hugging Face's; rows of q and k are interleaved on the way where the layout says
 * so, through a buffer of one head. Nothing appears under `path` before commit. */
typedef struct psoup__gguf_writer psoup__gguf_writer;
psoup_status psoup__gguf_create(psoup_context *context, const char *path, psoup__gguf_writer **out,
                                psoup_error *error);
/* Set before tensors are declared; psoup__gguf_metadata_from sets it too. */
void psoup__gguf_set_layout(psoup__gguf_writer *writer, const psoup__gguf_layout *layout);
/* Metadata; a key that was set before is replaced. */
psoup_status psoup__gguf_set_uint32(psoup__gguf_writer *writer, const char *key, uint32_t value,
                                    psoup_error *error);
psoup_status psoup__gguf_set_float32(psoup__gguf_writer *writer, const char *key, float value,
                                     psoup_error *error);
psoup_status psoup__gguf_set_bool(psoup__gguf_writer *writer, const char *key, bool value,
                                  psoup_error *error);
psoup_status psoup__gguf_set_string(psoup__gguf_writer *writer, const char *key, const char *text,
                                    psoup_error *error);
/* data: `count` elements as they lie in the file (strings: u64 length and bytes each). */
psoup_status psoup__gguf_set_array(psoup__gguf_writer *writer, const char *key,
                                   psoup__gguf_type element, size_t count, const void *data,
                                   size_t bytes, psoup_error *error);
psoup_status psoup__gguf_set_value(psoup__gguf_writer *writer, const psoup__gguf_value *value,
                                   psoup_error *error); /* copies it from a file */
/* The dtype in which a tensor goes into a GGUF file when `dtype` is wanted: vectors are f32 (llama.cpp
 * computes with them so); q8_0 needs rows of whole blocks, others become f16; what GGUF lacks becomes
 * f32 (f64) or bf16 (8-bit floats). */
psoup_dtype psoup__gguf_dtype(psoup_dtype dtype, int rank, const int64_t *shape);
psoup_status psoup__gguf_declare(psoup__gguf_writer *writer, const char *hf_name, psoup_dtype dtype,
                                 int rank, const int64_t *shape, psoup_error *error);
psoup_status psoup__gguf_begin(psoup__gguf_writer *writer, psoup_error *error);
psoup_status psoup__gguf_write(psoup__gguf_writer *writer, const void *data, size_t bytes,
                               psoup_error *error);
psoup_status psoup__gguf_commit(psoup__gguf_writer *writer, psoup_error *error);
void psoup__gguf_writer_free(psoup__gguf_writer *writer);

/* ---- gguf_sidecars.c: what goes with the weights, both ways ------------------------------------------
 *
 * Everything of a GGUF file but the weights, from a model directory (config.json, tokenizer.json,
 * tokenizer_config.json, chat_template.jinja; a directory without tokenizer.json gives a file without a
 * vocabulary and a warning in the log) or from another GGUF file. `dtype` is what most matrices will be
 * (general.file_type). Refuses by name what llama.cpp has no equal of. Sets the layout. Adds the tensor
 * rope_freqs.weight, whose data the writer writes itself, where the rope scaling needs it. */
psoup_status psoup__gguf_metadata_from(psoup__gguf_writer *writer, const char *from,
                                       psoup_dtype dtype, psoup_error *error);
/* The other way: config.json, tokenizer.json and tokenizer_config.json of a GGUF file into a directory.
 * psoup__hf_copy_sidecars calls it when `from` is a .gguf file. */
psoup_status psoup__gguf_sidecars(psoup_context *context, const char *path, const char *directory,
                                  psoup_error *error);
/* What a GGUF file's metadata says of the architecture. psoup__hf_config_read calls it for a .gguf file. */
psoup_status psoup__gguf_read_config(const psoup__gguf *file, psoup_model_config *out,
                                     psoup_error *error);

/* ---- gguf_lora.c: adapters ----------------------------------------------------------------------------
 * psoup__peft_open reads a .gguf path too. An adapter of a permuted architecture that changes q or k can
 * only be read when the numbers of heads are known: they are where psoup__gguf_adapter_write put them;
 * otherwise psoup__peft_open refuses, and this does with the base's numbers (0: unknown). */
psoup_status psoup__peft_open_heads(psoup_context *context, const char *path, int32_t heads,
                                    int32_t kv_heads, psoup__peft **out, psoup_error *error);
/* Heads of a model directory or .gguf model, for the function above and the next. *architecture
 * receives "llama" or "qwen2", static. */
psoup_status psoup__model_heads(psoup_context *context, const char *model, const char **architecture,
                                int32_t *heads, int32_t *kv_heads, psoup_error *error);
/* Writes one file that llama.cpp loads beside the base. llama.cpp scales every pair by alpha / rank:
 * other scales (rsLoRA, alpha_pattern, differing ranks) are multiplied into B in f32, rounded once to B's
 * dtype. architecture and heads are the base's. Refuses a scalar head. */
psoup_status psoup__gguf_adapter_write(psoup_context *context, const char *path,
                                       const psoup__peft_output *adapter, const char *architecture,
                                       int32_t heads, int32_t kv_heads, psoup_error *error);

#endif
