/* The small files that make a model directory whole. */
#include "merge/engine.h"

#include <string.h>

/* torch's name of the dtype that most of the results' bytes have. */
static const char *torch_dtype(const psoup__plan *plan) {
    static const struct {
        psoup_dtype dtype;
        const char *name;
    } names[] = {{PSOUP_F32, "float32"}, {PSOUP_F16, "float16"}, {PSOUP_BF16, "bfloat16"},
                 {PSOUP_F64, "float64"}};
    uint64_t most = 0;
    const char *name = NULL;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        uint64_t bytes = 0;
        for (size_t j = 0; j < plan->n; j++)
            bytes += plan->results[j].dtype == names[i].dtype ? plan->results[j].bytes : 0;
        if (bytes > most) {
            most = bytes;
            name = names[i].name;
        }
    }
    return name;
}

/* config.json says the dtype, and what slices and untying changed. */
static psoup_status change_config(const psoup__plan *plan, const char *path, psoup_error *error) {
    psoup_status status;
    psoup_context *context = plan->merger->context;
    psoup_json *config = NULL, *changed = NULL;
    PSOUP__TRY(psoup_json_read(context, path, &config, error));
    const char *dtype = torch_dtype(plan);
    const char *field = psoup_json_get(config, "dtype") != NULL ? "dtype" : "torch_dtype";
    const char *was = psoup_json_string(psoup_json_get(config, field), "");
    bool retype = dtype != NULL && strcmp(was, dtype) != 0 &&
                  (plan->merger->options.dtype >= 0 || psoup_json_get(config, field) != NULL);
    bool untie = plan->untied && psoup_json_bool(psoup_json_get(config, "tie_word_embeddings"), 0);
    if (!retype && !untie && plan->layers < 0)
        goto fail;
    int failed = 0;
    changed = psoup_json_copy(config);
    if (retype)
        failed |= psoup_json_set(changed, field, psoup_json_new_string(dtype));
    if (untie)
        failed |= psoup_json_set(changed, "tie_word_embeddings", psoup_json_new_bool(0));
    if (plan->layers >= 0)
        failed |= psoup_json_set(changed, "num_hidden_layers", psoup_json_new_integer(plan->layers));
    status = failed || changed == NULL ? psoup__out_of_memory(error, 0)
                                       : psoup_json_write(context, path, changed, error);
fail:
    psoup_json_free(changed);
    psoup_json_free(config);
    return status;
}

/* A directory's name of a source; files of a MODEL+ADAPTER are the model's. */
static const char *place_of(const psoup__merge_source *source) {
    return source->model != NULL ? psoup__weights_path(source->model) : NULL;
}

/* Embeddings are merged row by row: a tokenizer goes along only where all sources have the same. */
static psoup_status check_tokenizers(const psoup_merger *merger, const char *directory, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = merger->context;
    char *own = NULL, *other = NULL;
    size_t own_length, other_length;
    char *path = psoup__path_join(context, directory, "tokenizer.json", error);
    if (path == NULL)
        return PSOUP_ERROR_MEMORY;
    if (!psoup__file_exists(path))
        goto fail;
    PSOUP__TRY(psoup__file_read(context, path, SIZE_MAX, &own, &own_length, error));
    for (size_t i = 0; i <= merger->n; i++) {
        const psoup__merge_source *source = i < merger->n ? &merger->sources[i] : &merger->base;
        const char *place = place_of(source);
        if (place == NULL || !psoup__is_directory(place))
            continue;
        psoup__free(context, path);
        if ((path = psoup__path_join(context, place, "tokenizer.json", error)) == NULL) {
            status = PSOUP_ERROR_MEMORY;
            goto fail;
        }
        if (!psoup__file_exists(path))
            continue;
        PSOUP__TRY(psoup__file_read(context, path, SIZE_MAX, &other, &other_length, error));
        bool same = own_length == other_length && memcmp(own, other, own_length) == 0;
        psoup__free(context, other);
        if (!same) {
            status = psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                                 "%s: is another tokenizer than that of %s; moving the embeddings' rows to one "
                                 "vocabulary is not supported",
                                 path, merger->sidecars);
            goto fail;
        }
    }
fail:
    psoup__free(context, own);
    psoup__free(context, path);
    return status;
}

/* Another source's tokenizer and templates over `like`'s, whose config.json stays. */
static psoup_status take_other(const psoup__plan *plan, const char *directory, const char *config_path,
                               psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_merger *merger = plan->merger;
    const psoup__merge_source *from = merger->has_base && strcmp(merger->base.path, merger->sidecars) == 0
                                          ? &merger->base
                                          : NULL;
    psoup_json *config = NULL;
    for (size_t i = 0; from == NULL && i < merger->n; i++)
        if (strcmp(merger->sources[i].path, merger->sidecars) == 0)
            from = &merger->sources[i];
    if (from == NULL || place_of(from) == NULL)
        return PSOUP_OK;
    if (psoup__file_exists(config_path))
        PSOUP__TRY(psoup_json_read(merger->context, config_path, &config, error));
    PSOUP__TRY(psoup__hf_copy_sidecars(merger->context, place_of(from), directory, error));
    if (config != NULL)
        PSOUP__TRY(psoup_json_write(merger->context, config_path, config, error));
    if (merger->same_tokenizers)
        PSOUP__TRY(check_tokenizers(merger, directory, error));
fail:
    psoup_json_free(config);
    return status;
}

/* transformers reads the file where there is one, and tokenizer_config.json otherwise: both say it. */
static psoup_status write_template(const psoup__plan *plan, const char *directory, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    psoup_context *context = plan->merger->context;
    const char *text = plan->merger->chat_template;
    psoup__writer *writer = NULL;
    psoup_json *config = NULL, *changed = NULL;
    char *path = psoup__path_join(context, directory, "chat_template.jinja", error);
    char *json = psoup__path_join(context, directory, "tokenizer_config.json", error);
    if (path == NULL || json == NULL)
        goto fail;
    PSOUP__TRY(psoup__writer_create(context, path, &writer, error));
    PSOUP__TRY(psoup__writer_write(writer, text, strlen(text), error));
    PSOUP__TRY(psoup__writer_commit(writer, error));
    if (psoup__file_exists(json)) {
        PSOUP__TRY(psoup_json_read(context, json, &config, error));
        changed = psoup_json_copy(config);
        if (psoup_json_set(changed, "chat_template", psoup_json_new_string(text)) != 0)
            status = psoup__out_of_memory(error, 0);
        else
            status = psoup_json_write(context, json, changed, error);
    }
fail:
    psoup__writer_free(writer);
    psoup_json_free(config);
    psoup_json_free(changed);
    psoup__free(context, path);
    psoup__free(context, json);
    return status;
}

psoup_status psoup__write_sidecars(const psoup__plan *plan, const char *directory, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = plan->merger->context;
    const char *from = place_of(plan->like);
    if (from == NULL)
        return PSOUP_OK;
    char *path = psoup__path_join(context, directory, "config.json", error);
    if (path == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(psoup__hf_copy_sidecars(context, from, directory, error));
    if (plan->merger->sidecars != NULL)
        PSOUP__TRY(take_other(plan, directory, path, error));
    if (plan->merger->chat_template != NULL)
        PSOUP__TRY(write_template(plan, directory, error));
    if (psoup__file_exists(path))
        PSOUP__TRY(change_config(plan, path, error));
fail:
    psoup__free(context, path);
    return status;
}
