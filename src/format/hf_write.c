/* config.json as transformers reads it, and the small files that go with a model. */
#include "format/format.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The shortest decimal that reads back as the same float: 1e-06, not 9.99999997e-07. */
static psoup_json *float_json(float value) {
    char text[40];
    for (int digits = 6; digits <= 9; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, (double)value);
        if (strtof(text, NULL) == value)
            break;
    }
    return psoup_json_new_real(strtod(text, NULL));
}

static psoup_json *token_json(int32_t id) {
    return id < 0 ? psoup_json_new_null() : psoup_json_new_integer(id);
}

/* One id, or where several tokens end a text the list of them. */
static psoup_json *eos_json(const psoup_model_config *c) {
    if (c->more_eos_token_ids[0] < 0)
        return token_json(c->eos_token_id);
    psoup_json *list = psoup_json_new_array();
    int failed = psoup_json_append(list, token_json(c->eos_token_id));
    for (size_t i = 0; i < sizeof c->more_eos_token_ids / sizeof *c->more_eos_token_ids; i++)
        if (c->more_eos_token_ids[i] >= 0)
            failed |= psoup_json_append(list, token_json(c->more_eos_token_ids[i]));
    if (!failed)
        return list;
    psoup_json_free(list);
    return NULL;
}

static psoup_json *rope_json(const psoup_model_config *c) {
    static const char *const names[] = {"default", "linear", "llama3", "yarn", "dynamic"};
    if (c->rope_scaling == PSOUP_ROPE_DEFAULT)
        return psoup_json_new_null();
    psoup_json *rope = psoup_json_new_object();
    int failed = psoup_json_set(rope, "rope_type", psoup_json_new_string(names[c->rope_scaling]));
    failed |= psoup_json_set(rope, "factor", float_json(c->rope_factor));
    if (c->rope_scaling == PSOUP_ROPE_LLAMA3 ||
        (c->rope_scaling == PSOUP_ROPE_YARN &&
         c->rope_original_max_position != c->max_position_embeddings))
        failed |= psoup_json_set(rope, "original_max_position_embeddings",
                                 psoup_json_new_integer(c->rope_original_max_position));
    if (c->rope_scaling == PSOUP_ROPE_LLAMA3) {
        failed |= psoup_json_set(rope, "low_freq_factor", float_json(c->rope_low_freq_factor));
        failed |= psoup_json_set(rope, "high_freq_factor", float_json(c->rope_high_freq_factor));
    }
    if (c->rope_scaling == PSOUP_ROPE_YARN) {
        failed |= psoup_json_set(rope, "beta_fast", float_json(c->rope_beta_fast));
        failed |= psoup_json_set(rope, "beta_slow", float_json(c->rope_beta_slow));
        if (c->rope_attention_factor != 0)
            failed |= psoup_json_set(rope, "attention_factor",
                                     float_json(c->rope_attention_factor));
    }
    if (!failed)
        return rope;
    psoup_json_free(rope);
    return NULL;
}

psoup_status psoup__hf_config_write(psoup_context *context, const char *directory,
                                    const psoup_model_config *config, psoup_error *error) {
    static const char *const dtypes[] = {"float32", "float16", "bfloat16"};
    psoup_status status = PSOUP_ERROR_MEMORY;
    psoup_model_config c = *config;
    psoup_json *architectures = NULL, *root = NULL;
    char *path = psoup__path_join(context, directory, "config.json", error);
    if (path == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(psoup__config_check(&c, path, error));
    architectures = psoup_json_new_array();
    root = psoup_json_new_object();
    int failed = psoup_json_append(
        architectures,
        psoup_json_new_string(c.qkv_bias ? "Qwen2ForCausalLM" : "LlamaForCausalLM"));
    failed |= psoup_json_set(root, "architectures", architectures);
    failed |= psoup_json_set(root, "model_type",
                             psoup_json_new_string(c.qkv_bias ? "qwen2" : "llama"));
    failed |= psoup_json_set(root, "hidden_act", psoup_json_new_string("silu"));
    const struct {
        const char *name;
        int32_t value;
    } sizes[] = {{"vocab_size", c.vocab_size},
                 {"hidden_size", c.hidden_size},
                 {"intermediate_size", c.intermediate_size},
                 {"num_hidden_layers", c.num_hidden_layers},
                 {"num_attention_heads", c.num_attention_heads},
                 {"num_key_value_heads", c.num_key_value_heads},
                 {"head_dim", c.head_dim},
                 {"max_position_embeddings", c.max_position_embeddings}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        failed |= psoup_json_set(root, sizes[i].name, psoup_json_new_integer(sizes[i].value));
    failed |= psoup_json_set(root, "rms_norm_eps", float_json(c.rms_norm_eps));
    failed |= psoup_json_set(root, "rope_theta", float_json(c.rope_theta));
    failed |= psoup_json_set(root, "rope_scaling", rope_json(&c));
    failed |= psoup_json_set(root, "initializer_range", float_json(c.initializer_range));
    if (!c.qkv_bias) {
        failed |= psoup_json_set(root, "attention_bias", psoup_json_new_bool(c.attention_bias));
        failed |= psoup_json_set(root, "mlp_bias", psoup_json_new_bool(c.mlp_bias));
    }
    failed |= psoup_json_set(root, "tie_word_embeddings",
                             psoup_json_new_bool(c.tie_word_embeddings));
    failed |= psoup_json_set(root, "bos_token_id", token_json(c.bos_token_id));
    failed |= psoup_json_set(root, "eos_token_id", eos_json(&c));
    failed |= psoup_json_set(root, "pad_token_id", token_json(c.pad_token_id));
    failed |= psoup_json_set(root, "torch_dtype", psoup_json_new_string(dtypes[c.torch_dtype]));
    failed |= psoup_json_set(root, "use_cache", psoup_json_new_bool(1));
    status = failed ? psoup__out_of_memory(error, 0)
                    : psoup_json_write(context, path, root, error);
fail:
    psoup_json_free(root);
    psoup__free(context, path);
    return status;
}

static psoup_status copy_file(psoup_context *context, const char *from, const char *to,
                              psoup_error *error) {
    psoup_status status;
    psoup__writer *writer = NULL;
    char *text = NULL;
    size_t length;
    PSOUP__TRY(psoup__file_read(context, from, SIZE_MAX, &text, &length, error));
    PSOUP__TRY(psoup__writer_create(context, to, &writer, error));
    PSOUP__TRY(psoup__writer_write(writer, text, length, error));
    PSOUP__TRY(psoup__writer_commit(writer, error));
fail:
    psoup__writer_free(writer);
    psoup__free(context, text);
    return status;
}

char *psoup__directory_of(psoup_context *context, const char *path, psoup_error *error) {
    char *directory = psoup__strdup(context, *path != '\0' ? path : ".", error);
    if (directory == NULL || psoup__is_directory(path))
        return directory;
    char *slash = strrchr(directory, '/');
    if (slash == NULL)
        memcpy(directory, ".", 2);
    else
        slash[slash == directory] = '\0';
    return directory;
}

psoup_status psoup__hf_copy_sidecars(psoup_context *context, const char *from, const char *to,
                                     psoup_error *error) {
    static const char *const names[] = {
        "config.json",           "generation_config.json",  "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json",            "merges.txt",              "tokenizer.model",
        "chat_template.jinja",   "chat_template.json"};
    psoup_status status = PSOUP_ERROR_MEMORY;
    char *source = NULL, *target = NULL;
    if (psoup__is_gguf(from))
        return psoup__gguf_sidecars(context, from, to, error);
    char *directory = psoup__directory_of(context, from, error);
    if (directory == NULL)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        psoup__free(context, source);
        psoup__free(context, target);
        target = NULL;
        status = PSOUP_ERROR_MEMORY;
        if ((source = psoup__path_join(context, directory, names[i], error)) == NULL ||
            (target = psoup__path_join(context, to, names[i], error)) == NULL)
            goto fail;
        if (psoup__file_exists(source))
            PSOUP__TRY(copy_file(context, source, target, error));
    }
    status = PSOUP_OK;
fail:
    psoup__free(context, source);
    psoup__free(context, target);
    psoup__free(context, directory);
    return status;
}
