/* Everything of a model but its weights, from and to GGUF files. */
#include "format/gguf.h"

#include <stdio.h>
#include <string.h>

const char *psoup__gguf_hole(size_t id, char out[32]) {
    snprintf(out, 32, "[PAD%zu]", id); /* as llama.cpp's converter names it */
    return out;
}

psoup_status psoup__gguf_write_more_eos(psoup__gguf_writer *writer, const psoup_model_config *c,
                                        int64_t eos, psoup_error *error) {
    static const char *const keys[] = {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"};
    size_t n = 0;
    const size_t more = sizeof c->more_eos_token_ids / sizeof *c->more_eos_token_ids;
    for (size_t i = 0; i <= more && n < 2; i++) {
        int32_t id = i == 0 ? c->eos_token_id : c->more_eos_token_ids[i - 1];
        if (id < 0 || id == eos || id >= c->vocab_size)
            continue;
        psoup_status status = psoup__gguf_set_uint32(writer, keys[n++], (uint32_t)id, error);
        if (status != PSOUP_OK)
            return status;
    }
    return PSOUP_OK;
}

psoup_status psoup__gguf_write_template(psoup__gguf_writer *writer, const char *directory,
                                        const psoup_json *config, psoup_error *error) {
    psoup_status status;
    psoup_context *context = psoup__gguf_writer_context(writer);
    const psoup_json *value = psoup_json_get(config, "chat_template");
    const char *key = "tokenizer.chat_template", *text = psoup_json_string(value, NULL);
    char *read = NULL;
    size_t length;
    char *path = psoup__path_join(context, directory, "chat_template.jinja", error);
    if (path == NULL)
        return PSOUP_ERROR_MEMORY;
    /* several: [{"name", "template"}, …], of which one is called "default" */
    for (size_t i = 0; i < psoup_json_size(value) && text == NULL; i++) {
        const psoup_json *one = psoup_json_at(value, i);
        if (strcmp(psoup_json_string(psoup_json_get(one, "name"), ""), "default") == 0)
            text = psoup_json_string(psoup_json_get(one, "template"), NULL);
    }
    if (psoup__file_exists(path)) {
        PSOUP__TRY(psoup__file_read(context, path, 1 << 24, &read, &length, error));
        if (strlen(read) != length || !psoup__is_utf8(read)) {
            status = psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: is not UTF-8 text", path);
            goto fail;
        }
        text = read;
    }
    status = text != NULL ? psoup__gguf_set_string(writer, key, text, error) : PSOUP_OK;
fail:
    psoup__free(context, read);
    psoup__free(context, path);
    return status;
}

/* The last part of a path: a model's name for want of a better one. */
static const char *base_name(const char *path, char out[256]) {
    size_t end = strlen(path);
    while (end > 1 && path[end - 1] == '/')
        end--;
    size_t begin = end;
    while (begin > 0 && path[begin - 1] != '/')
        begin--;
    snprintf(out, 256, "%.*s", (int)(end - begin < 200 ? end - begin : 200), path + begin);
    return psoup__is_utf8(out) ? out : "model";
}

/* From another GGUF file: all of it but what is about this file alone. */
static psoup_status copy_metadata(psoup__gguf_writer *writer, const char *from, psoup_dtype dtype,
                                  psoup_error *error) {
    psoup_status status;
    psoup__gguf *file = NULL;
    psoup__gguf_layout layout;
    float factors[PSOUP__GGUF_MAX_PAIRS];
    PSOUP__TRY(psoup__gguf_open(psoup__gguf_writer_context(writer), from, &file, error));
    PSOUP__TRY(psoup__gguf_layout_of(file, &layout, error));
    psoup__gguf_set_layout(writer, &layout);
    for (size_t i = 0; i < psoup__gguf_values(file); i++) {
        const psoup__gguf_value *value = psoup__gguf_value_at(file, i);
        if (strcmp(value->key, "general.alignment") != 0 && strncmp(value->key, "split.", 6) != 0 &&
            strncmp(value->key, "quantize.", 9) != 0 && strncmp(value->key, "psoup.", 6) != 0)
            PSOUP__TRY(psoup__gguf_set_value(writer, value, error));
    }
    PSOUP__TRY(psoup__gguf_set_uint32(writer, "general.file_type", psoup__gguf_file_type(dtype), error));
    const psoup__tensor *freqs = psoup__gguf_find(file, "rope_freqs.weight");
    if (freqs != NULL && (freqs->dtype != PSOUP_F32 || freqs->rank != 1 ||
                          freqs->shape[0] > PSOUP__GGUF_MAX_PAIRS))
        status = psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: tensor rope_freqs.weight: expected f32 values",
                             from);
    else if (freqs != NULL) {
        psoup__tensor_bytes(freqs, 0, freqs->bytes, factors);
        PSOUP__TRY(psoup__file_check(psoup__gguf_file(file), "tensor rope_freqs.weight: ", error));
        status = psoup__gguf_add_vector(writer, "rope_freqs.weight", factors, freqs->shape[0], error);
    }
fail:
    psoup__gguf_free(file);
    return status;
}

/* The configuration of a directory whose weights a GGUF file can hold. */
static psoup_status read_plain(psoup_context *context, const char *directory, psoup_model_config *out,
                               psoup_error *error) {
    psoup_status status = psoup__hf_config_read(context, directory, out, error);
    if (status == PSOUP_OK && out->linear_dtype != 0)
        status = psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                             "%s: config.json: quantization_config: quantised weights cannot be merged; name the model "
                             "that they were made from",
                             directory);
    return status;
}

psoup_status psoup__gguf_metadata_from(psoup__gguf_writer *writer, const char *from,
                                       psoup_dtype dtype, psoup_error *error) {
    psoup_status status;
    psoup_model_config config;
    psoup_context *context = psoup__gguf_writer_context(writer);
    char name[256], *directory = NULL;
    if (psoup__is_gguf(from))
        return copy_metadata(writer, from, dtype, error);
    if ((directory = psoup__directory_of(context, from, error)) == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(read_plain(context, directory, &config, error));
    PSOUP__TRY(psoup__gguf_write_config(writer, &config, config.qkv_bias != 0, base_name(directory, name),
                                        dtype, error));
    PSOUP__TRY(psoup__gguf_write_tokenizer(writer, directory, &config, error));
fail:
    psoup__free(context, directory);
    return status;
}

static psoup_status write_json(psoup_context *context, const char *directory, const char *name,
                               const psoup_json *value, psoup_error *error) {
    char *path = psoup__path_join(context, directory, name, error);
    if (path == NULL)
        return PSOUP_ERROR_MEMORY;
    psoup_status status = psoup_json_write(context, path, value, error);
    psoup__free(context, path);
    return status;
}

psoup_status psoup__gguf_read_tokenizer(psoup_context *context, const psoup__gguf *file,
                                        const char *directory, const psoup_model_config *config,
                                        psoup_error *error) {
    psoup_status status;
    psoup_json *tokenizer, *settings;
    PSOUP__TRY(psoup__gguf_tokenizer_json(context, file, config, &tokenizer, &settings, error));
    if (tokenizer != NULL)
        PSOUP__TRY(write_json(context, directory, "tokenizer.json", tokenizer, error));
    if (tokenizer != NULL)
        PSOUP__TRY(write_json(context, directory, "tokenizer_config.json", settings, error));
fail:
    psoup_json_free(tokenizer);
    psoup_json_free(settings);
    return status;
}

psoup_status psoup__gguf_sidecars(psoup_context *context, const char *path, const char *directory,
                                  psoup_error *error) {
    psoup_status status;
    psoup_model_config config;
    psoup__gguf *file = NULL;
    PSOUP__TRY(psoup__gguf_open(context, path, &file, error));
    PSOUP__TRY(psoup__gguf_read_config(file, &config, error));
    PSOUP__TRY(psoup__hf_config_write(context, directory, &config, error));
    PSOUP__TRY(psoup__gguf_read_tokenizer(context, file, directory, &config, error));
fail:
    psoup__gguf_free(file);
    return status;
}

psoup_status psoup__model_heads(psoup_context *context, const char *model, const char **architecture,
                                int32_t *heads, int32_t *kv_heads, psoup_error *error) {
    psoup_status status;
    psoup_model_config config;
    psoup__gguf_layout layout = {.permuted = false};
    psoup__gguf *file = NULL;
    char *directory = NULL;
    if (psoup__is_gguf(model)) {
        PSOUP__TRY(psoup__gguf_open(context, model, &file, error));
        PSOUP__TRY(psoup__gguf_layout_of(file, &layout, error));
    } else {
        if ((directory = psoup__directory_of(context, model, error)) == NULL)
            return PSOUP_ERROR_MEMORY;
        PSOUP__TRY(read_plain(context, directory, &config, error));
        layout.permuted = !config.qkv_bias;
        layout.heads = config.num_attention_heads;
        layout.kv_heads = config.num_key_value_heads;
    }
    *architecture = layout.permuted ? "llama" : "qwen2";
    *heads = layout.heads;
    *kv_heads = layout.kv_heads;
fail:
    psoup__gguf_free(file);
    psoup__free(context, directory);
    return status;
}
