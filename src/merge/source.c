/* What is merged: models and adapters in files, and tensors that the caller holds. */
#include "merge/engine.h"

#include <stdlib.h>
#include <string.h>

/* ---- files that must stay what they are --------------------------------------------------------- */

static psoup_status add_files(psoup_context *context, psoup__merge_source *source,
                              const psoup__weights *weights, psoup_error *error) {
    size_t n = psoup__weights_files(weights);
    psoup__source_file *files = psoup__alloc(context, source->n_files + n, sizeof *files, error);
    if (files == NULL)
        return PSOUP_ERROR_MEMORY;
    if (source->n_files > 0)
        memcpy(files, source->files, source->n_files * sizeof *files);
    psoup__free(context, source->files);
    source->files = files;
    for (size_t i = 0; i < n; i++)
        files[source->n_files++].file = psoup__weights_file(weights, i);
    return PSOUP_OK;
}

psoup_status psoup__source_check(const psoup__merge_source *source, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    if (source->model != NULL)
        PSOUP__TRY(psoup__weights_check(source->model, error));
    if (source->adapter != NULL)
        PSOUP__TRY(psoup__weights_check(source->adapter->weights, error));
    if (source->pull_failed != NULL && *source->pull_failed)
        status = psoup__fail(error, PSOUP_ERROR_IO, "%s: its read function could not give a tensor's bytes",
                             source->path);
fail:
    return status;
}

void psoup__source_retry(psoup__merge_source *source) {
    for (size_t i = 0; i < source->n_files; i++)
        source->files[i].file->failed = 0;
    source->read = false;
    if (source->pull_failed != NULL)
        *source->pull_failed = 0;
}

psoup_status psoup__source_sha256(psoup__merge_source *source, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; i < source->n_files && status == PSOUP_OK; i++)
        if (source->files[i].sha256[0] == '\0')
            status = psoup__sha256_file(source->files[i].file, source->files[i].sha256, error);
    return status;
}

/* ---- opening --------------------------------------------------------------------------------------- */

static bool has_file(psoup_context *context, const char *directory, const char *name, bool *there,
                     psoup_error *error) {
    char *path = psoup__path_join(context, directory, name, error);
    if (path == NULL)
        return false;
    *there = psoup__file_exists(path);
    psoup__free(context, path);
    return true;
}

/* config.json's model_type, where there is one beside the weights: other architectures can have tensors of
 * the same names and shapes. What it says of quantised weights no sum of their codes would keep. */
static psoup_status read_architecture(psoup_context *context, psoup__merge_source *source,
                                      const char *directory, psoup_error *error) {
    psoup_json *config = NULL;
    bool there = false;
    if (!psoup__is_directory(directory))
        return PSOUP_OK;
    if (!has_file(context, directory, "config.json", &there, error))
        return PSOUP_ERROR_MEMORY;
    if (!there)
        return PSOUP_OK;
    char *path = psoup__path_join(context, directory, "config.json", error);
    if (path == NULL)
        return PSOUP_ERROR_MEMORY;
    psoup_status status = psoup_json_read(context, path, &config, error);
    psoup__free(context, path);
    if (status != PSOUP_OK)
        return status;
    const char *type = psoup_json_string(psoup_json_get(config, "model_type"), "");
    strncpy(source->architecture, type, sizeof source->architecture - 1);
    if (psoup_json_get(config, "quantization_config") != NULL)
        status = psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                             "%s: config.json: quantization_config: quantised weights cannot be merged; name the model "
                             "that they were made from",
                             directory);
    psoup_json_free(config);
    return status;
}

psoup_status psoup__path_is_adapter(psoup_context *context, const char *path, bool *adapter,
                                    psoup_error *error) {
    psoup__gguf *file = NULL;
    if (!psoup__is_gguf(path))
        return has_file(context, path, "adapter_config.json", adapter, error) ? PSOUP_OK
                                                                              : PSOUP_ERROR_MEMORY;
    psoup_status status = psoup__gguf_open(context, path, &file, error);
    *adapter = status == PSOUP_OK && psoup__gguf_is(file, "general.type", "adapter");
    psoup__gguf_free(file);
    return status;
}

/* Rows of q and k in a GGUF file are in llama.cpp's order, which the model's heads undo. */
static psoup_status open_adapter(psoup_context *context, const char *path, const char *reference,
                                 psoup__merge_source *source, psoup_error *error) {
    psoup_status status;
    const char *architecture;
    int32_t heads, kv_heads;
    if (psoup__is_gguf(path) && reference != NULL) {
        PSOUP__TRY(psoup__model_heads(context, reference, &architecture, &heads, &kv_heads, error));
        PSOUP__TRY(psoup__peft_open_heads(context, path, heads, kv_heads, &source->adapter, error));
    } else {
        PSOUP__TRY(psoup__peft_open(context, path, &source->adapter, error));
    }
    PSOUP__TRY(add_files(context, source, source->adapter->weights, error));
fail:
    return status;
}

static psoup_status open_model(psoup_context *context, const char *path, psoup__merge_source *source,
                               psoup_error *error) {
    psoup_status status;
    PSOUP__TRY(psoup__weights_open(context, path, "model", 0, 0, &source->model, error));
    PSOUP__TRY(add_files(context, source, source->model, error));
    for (size_t i = 0; i < psoup__weights_count(source->model); i++)
        if (strstr(psoup__weights_name(source->model, i), ".lora_A.") != NULL)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: holds an adapter; expected its directory, with "
                               "adapter_config.json",
                               path);
    PSOUP__TRY(read_architecture(context, source, path, error));
fail:
    return status;
}

/* "MODEL+ADAPTER", mergekit's way to name a model with an adapter folded in. */
static psoup_status open_both(psoup_context *context, const char *path, psoup__merge_source *source,
                              psoup_error *error) {
    psoup_status status;
    const char *plus = strrchr(path, '+');
    char *model = psoup__format(context, error, "%.*s", (int)(plus - path), path);
    if (model == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(open_model(context, model, source, error));
    PSOUP__TRY(open_adapter(context, plus + 1, model, source, error));
fail:
    psoup__free(context, model);
    return status;
}

psoup_status psoup__merge_text(const char *text, const char *what, psoup_error *error) {
    if (psoup__is_utf8(text))
        return PSOUP_OK;
    return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s \"%.200s\" is no UTF-8", what, text);
}

psoup_status psoup__source_open(psoup_context *context, const char *path, bool base, const char *reference,
                                psoup__merge_source *out, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    bool adapter = false;
    *out = (psoup__merge_source){0};
    PSOUP__TRY(psoup__merge_text(path, "path", error));
    status = PSOUP_ERROR_MEMORY;
    if ((out->path = psoup__strdup(context, path, error)) == NULL)
        goto fail;
    if (!base)
        PSOUP__TRY(psoup__path_is_adapter(context, path, &adapter, error));
    const char *plus = strrchr(path, '+');
    const bool both = plus != NULL && plus > path && strlen(path) < INT32_MAX && !psoup__file_exists(path);
    if (both && base) {
        status = psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                             "%s: a base with an adapter; fold it in first, with psoup merge --base", path);
        goto fail;
    }
    if (both)
        PSOUP__TRY(open_both(context, path, out, error));
    else if (adapter)
        PSOUP__TRY(open_adapter(context, path, reference, out, error));
    else
        PSOUP__TRY(open_model(context, path, out, error));
    return PSOUP_OK;
fail:
    psoup__source_free(context, out);
    return status;
}

void psoup__source_free(psoup_context *context, psoup__merge_source *source) {
    psoup__keep_free(context, source);
    psoup__weights_free(source->model);
    psoup__peft_free(source->adapter);
    for (size_t i = 0; i < source->n_held; i++)
        psoup__free(context, source->held[i].name);
    psoup__free(context, source->held);
    psoup__map_free(source->held_names);
    psoup__free(context, source->files);
    psoup__free(context, source->path);
    psoup__free(context, source->pull_failed);
    psoup__settings_free(context, &source->settings);
    *source = (psoup__merge_source){0};
}

bool psoup__source_is_adapter(const psoup__merge_source *source) {
    return source->adapter != NULL && source->model == NULL;
}

/* ---- tensors that the caller holds ---------------------------------------------------------------- */

static psoup_status hold_one(psoup_context *context, const psoup_merge_tensors *from, size_t index,
                             psoup__merge_source *out, psoup_error *error) {
    psoup_status status;
    const psoup_named_tensor *t = &from->tensors[index];
    psoup__held *held = &out->held[out->n_held];
    bool fresh;
    size_t elements;
    if (t->name == NULL || t->rank < 0 || t->rank > PSOUP__MAX_RANK || (t->rank > 0 && t->shape == NULL))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: tensor %zu: expected a name and a shape of at most %d sizes", out->path,
                           index, PSOUP__MAX_RANK);
    PSOUP__TRY(psoup__merge_text(t->name, "tensor", error));
    held->tensor = (psoup__tensor){.dtype = t->dtype, .rank = t->rank, .data = t->data};
    if (t->rank > 0)
        memcpy(held->tensor.shape, t->shape, (size_t)t->rank * sizeof *t->shape);
    if (!psoup__tensor_elements(&held->tensor, &elements) ||
        !psoup__dtype_bytes(t->dtype, elements, &held->tensor.bytes) ||
        (t->dtype != PSOUP_Q8_0 && psoup_dtype_size(t->dtype) == 0))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: tensor %.200s: dtype %d or the product of its shape cannot be", out->path,
                           t->name, (int)t->dtype);
    if (t->data == NULL && elements > 0 && from->read == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: tensor %.200s: expected data or `read`",
                           out->path, t->name);
    held->pull = (psoup__pull){.read = from->read, .user = from->user, .index = index,
                               .failed = out->pull_failed};
    if (t->data == NULL)
        held->tensor.pull = &held->pull;
    if ((held->name = psoup__strdup(context, t->name, error)) == NULL)
        return PSOUP_ERROR_MEMORY;
    out->n_held++;
    PSOUP__TRY(psoup__map_set(out->held_names, held->name, strlen(held->name), (int64_t)index, &fresh,
                              error));
    if (!fresh)
        status = psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: tensor %.200s is there twice", out->path,
                             held->name);
fail:
    return status;
}

psoup_status psoup__source_hold(psoup_context *context, const psoup_merge_tensors *tensors,
                                psoup__merge_source *out, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    psoup_merge_tensors from = PSOUP_MERGE_TENSORS_INIT;
    *out = (psoup__merge_source){0};
    PSOUP__TRY(psoup__options(&from, sizeof from, tensors, "psoup_merge_tensors", error));
    if (from.n == 0 || from.tensors == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_merge_tensors: no tensors");
    if (from.name != NULL)
        PSOUP__TRY(psoup__merge_text(from.name, "source", error));
    status = PSOUP_ERROR_MEMORY;
    if ((out->path = psoup__strdup(context, from.name != NULL ? from.name : "(memory)", error)) == NULL ||
        (out->held = psoup__alloc(context, from.n, sizeof *out->held, error)) == NULL ||
        (out->pull_failed = psoup__alloc(context, 1, sizeof *out->pull_failed, error)) == NULL)
        goto fail;
    PSOUP__TRY(psoup__map_create(context, from.n, &out->held_names, error));
    for (size_t i = 0; i < from.n; i++)
        PSOUP__TRY(hold_one(context, &from, i, out, error));
    return PSOUP_OK;
fail:
    psoup__source_free(context, out);
    return status;
}

/* ---- tensors ----------------------------------------------------------------------------------------- */

size_t psoup__source_count(const psoup__merge_source *source) {
    return source->model != NULL ? psoup__weights_count(source->model) : source->n_held;
}

const char *psoup__source_name(const psoup__merge_source *source, size_t index) {
    return source->model != NULL ? psoup__weights_name(source->model, index) : source->held[index].name;
}

bool psoup__source_index(const psoup__merge_source *source, const char *name, size_t *index) {
    int64_t found;
    if (source->model != NULL)
        return psoup__weights_index(source->model, name, index);
    if (source->held == NULL || !psoup__map_get(source->held_names, name, strlen(name), &found))
        return false;
    *index = (size_t)found;
    return true;
}

const psoup__tensor *psoup__source_tensor(const psoup__merge_source *source, size_t index) {
    return source->model != NULL ? psoup__weights_tensor(source->model, index) : &source->held[index].tensor;
}

typedef struct module_key {
    const char *name;
    size_t length;
} module_key;

static int compare_module(const void *key, const void *element) {
    const module_key *k = key;
    const char *module = ((const psoup__peft_pair *)element)->module;
    int order = strncmp(k->name, module, k->length);
    return order != 0 ? order : module[k->length] == '\0' ? 0 : -1;
}

const psoup__peft_pair *psoup__peft_find(const psoup__peft *peft, const char *module, size_t length) {
    const module_key key = {module, length};
    return peft->n == 0
               ? NULL
               : bsearch(&key, peft->pairs, peft->n, sizeof *peft->pairs, compare_module);
}
