/* src/format/gguf.h: what the gguf_*.c files share among themselves and with nobody else. */
#ifndef PSOUP__GGUF_H
#define PSOUP__GGUF_H

#include "format/format.h"

/* Kinds of tokens: llama.cpp, llama.h, enum llama_token_type. */
enum {
    PSOUP__GGUF_NORMAL = 1, PSOUP__GGUF_UNKNOWN, PSOUP__GGUF_CONTROL, PSOUP__GGUF_USER_DEFINED,
    PSOUP__GGUF_UNUSED, PSOUP__GGUF_BYTE
};
#define PSOUP__GGUF_UNREACHED (-1e6f) /* the score we give to what no merge makes */

/* A way of splitting text that llama.cpp has a name for (tokenizer.ggml.pre); the first of several equal
 * ones is the one written. */
typedef struct psoup__gguf_pre {
    const char *name;
    const char *regex; /* of tokenizer.json's Split; NULL: ByteLevel's own */
    bool digits;       /* digits apart first */
    bool ignore_merges;
} psoup__gguf_pre;
extern const psoup__gguf_pre psoup__gguf_pres[]; /* ended by a NULL name */

enum { PSOUP__GGUF_MAX_PAIRS = 2048 }; /* of a head's rotation: psoup__config_check allows heads of 4096 */
enum { PSOUP__GGUF_MAX_NAME = 63 }; /* bytes of a tensor's name, ggml's GGML_MAX_NAME less its NUL */

typedef struct psoup__gguf_entry {
    char name[PSOUP__GGUF_MAX_NAME + 1];
    uint64_t offset;
    psoup__tensor tensor;
} psoup__gguf_entry;

struct psoup__gguf {
    psoup_context *context;
    psoup__file file;    /* zeros when the caller holds the bytes in memory */
    unsigned char *head; /* of the file: what stands before the tensors' data */
    char *path;
    psoup__gguf_value *values; /* [n_values]; the keys are allocated one by one */
    size_t n_values;
    psoup__gguf_entry *entries; /* [count] */
    size_t count;
    psoup__map *by_key, *by_name;
};

/* ---- gguf_write.c */

const char *psoup__gguf_writer_path(const psoup__gguf_writer *writer);
psoup_context *psoup__gguf_writer_context(const psoup__gguf_writer *writer);
/* A vector that Hugging Face has no tensor for, under the file's own name; before other declarations. */
psoup_status psoup__gguf_add_vector(psoup__gguf_writer *writer, const char *name,
                                    const float *values, int64_t n, psoup_error *error);

/* ---- gguf_lora.c */

/* The rank and scale that llama.cpp gives a pair. */
psoup_status psoup__gguf_scale(const psoup__gguf *file, psoup__peft_pair *pair, psoup_error *error);
/* What adapter_config.json would say of a file: r, lora_alpha. */
psoup_status psoup__gguf_adapter_config(const psoup__gguf *file, int32_t rank, psoup_json **out,
                                        psoup_error *error);

/* ---- gguf_config.c */

psoup_status psoup__gguf_write_config(psoup__gguf_writer *writer, const psoup_model_config *config,
                                      bool qwen2, const char *name, psoup_dtype dtype,
                                      psoup_error *error);
uint32_t psoup__gguf_file_type(psoup_dtype dtype); /* general.file_type */

/* ---- gguf_sidecars.c */

/* The token of an id that has none. */
const char *psoup__gguf_hole(size_t id, char out[32]);
psoup_status psoup__gguf_write_template(psoup__gguf_writer *writer, const char *directory,
                                        const psoup_json *tokenizer_config, psoup_error *error);
/* The ids beside `eos` that end a text too, as far as there are keys for them. */
psoup_status psoup__gguf_write_more_eos(psoup__gguf_writer *writer, const psoup_model_config *config,
                                        int64_t eos, psoup_error *error);

/* ---- gguf_tokenizer.c: tokenizer.json and tokenizer_config.json of a directory, as metadata */

psoup_status psoup__gguf_write_tokenizer(psoup__gguf_writer *writer, const char *directory,
                                         const psoup_model_config *config, psoup_error *error);

/* ---- gguf_tokenizer_hf.c: and back */

/* tokenizer.json and tokenizer_config.json, both NULL where the file has no vocabulary. */
psoup_status psoup__gguf_tokenizer_json(psoup_context *context, const psoup__gguf *file,
                                        const psoup_model_config *config, psoup_json **tokenizer,
                                        psoup_json **settings, psoup_error *error);
/* The same into files of a directory (gguf_sidecars.c). */
psoup_status psoup__gguf_read_tokenizer(psoup_context *context, const psoup__gguf *file,
                                        const char *directory, const psoup_model_config *config,
                                        psoup_error *error);

#endif
