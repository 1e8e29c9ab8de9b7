/* The tensors of a model: one file, or several that an index names. */
#include "format/format.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct psoup__weights {
    psoup_context *context;
    char *path;
    bool map;
    psoup__safetensors **files; /* [n_files] */
    size_t n_files, files_capacity;
    psoup__gguf *gguf; /* instead of files, with its tensors as PyTorch knows them: */
    psoup__tensor *renamed; /* [count] */
    char (*names)[PSOUP__GGUF_NAME]; /* [count] */
    struct slot {
        const char *name;
        const psoup__tensor *tensor;
        size_t file;
    } *slots; /* [count] */
    size_t count, slots_capacity;
    psoup__map *by_name;
};

/* Opens one file and takes in its tensors; refuses a name that another file already has. */
static psoup_status add_file(psoup__weights *weights, const char *path, psoup_error *error) {
    psoup_status status;
    psoup_context *context = weights->context;
    PSOUP__TRY(psoup__reserve(context, &weights->files, &weights->files_capacity,
                              weights->n_files + 1, sizeof *weights->files, error));
    PSOUP__TRY(psoup__safetensors_open(context, path, &weights->files[weights->n_files], error));
    psoup__safetensors *file = weights->files[weights->n_files++];
    if (weights->map)
        PSOUP__TRY(psoup__safetensors_map(file, error));
    size_t n = psoup__safetensors_count(file);
    PSOUP__TRY(psoup__reserve(context, &weights->slots, &weights->slots_capacity,
                              weights->count + n, sizeof *weights->slots, error));
    for (size_t i = 0; i < n; i++) {
        struct slot *slot = &weights->slots[weights->count];
        *slot = (struct slot){psoup__safetensors_name(file, i), psoup__safetensors_tensor(file, i),
                              weights->n_files - 1};
        int64_t other;
        if (psoup__map_get(weights->by_name, slot->name, strlen(slot->name), &other))
            return psoup__fail(error, PSOUP_ERROR_FORMAT,
                               "%s: tensor %.200s is in another shard too", path, slot->name);
        PSOUP__TRY(psoup__map_set(weights->by_name, slot->name, strlen(slot->name),
                                  (int64_t)weights->count, NULL, error));
        weights->count++;
    }
    return PSOUP_OK;
fail:
    return status;
}

/* Opens a GGUF file: a model's tensors under Hugging Face's names, an adapter's under PEFT's, those of q
 * and k with their row order. */
static psoup_status add_gguf(psoup__weights *weights, const char *path, const char *stem,
                             int32_t heads, int32_t kv_heads, psoup_error *error) {
    psoup_status status;
    psoup_context *context = weights->context;
    psoup__gguf_layout layout;
    PSOUP__TRY(psoup__gguf_open(context, path, &weights->gguf, error));
    if (weights->map)
        PSOUP__TRY(psoup__gguf_map(weights->gguf, error));
    const psoup__gguf *file = weights->gguf;
    bool adapter = strcmp(stem, "model") != 0;
    const char *type = adapter ? "adapter" : "model";
    if ((adapter || psoup__gguf_get(file, "general.type") != NULL) &&
        !psoup__gguf_is(file, "general.type", type))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: general.type: expected \"%s\"", path, type);
    PSOUP__TRY(psoup__gguf_layout_of(file, &layout, error));
    if (layout.heads == 0)
        layout = (psoup__gguf_layout){.permuted = layout.permuted, .heads = heads, .kv_heads = kv_heads};
    else if (heads > 0 && (layout.heads != heads || layout.kv_heads != kv_heads))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: is of %d heads and %d of keys; the model has %d and %d", path,
                           (int)layout.heads, (int)layout.kv_heads, (int)heads, (int)kv_heads);
    size_t n = psoup__gguf_count(file);
    weights->renamed = psoup__alloc(context, n, sizeof *weights->renamed, error);
    weights->names = psoup__alloc(context, n, sizeof *weights->names, error);
    if (weights->renamed == NULL || weights->names == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(psoup__reserve(context, &weights->slots, &weights->slots_capacity, n,
                              sizeof *weights->slots, error));
    for (size_t i = 0; i < n; i++) {
        const char *name = psoup__gguf_name(file, i);
        char *hf = weights->names[weights->count];
        psoup__tensor *tensor = &weights->renamed[weights->count];
        if (strcmp(name, "rope_freqs.weight") == 0) /* config.json says it: rope_scaling */
            continue;
        if (!(adapter ? psoup__gguf_to_peft(name, hf) : psoup__gguf_to_hf(name, hf)))
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "%s: tensor %s has no counterpart in a Hugging Face %s", path, name, type);
        *tensor = *psoup__gguf_tensor(file, i);
        PSOUP__TRY(psoup__gguf_set_heads(&layout, path, name, hf, tensor, error));
        weights->slots[weights->count] = (struct slot){hf, tensor, 0};
        PSOUP__TRY(psoup__map_set(weights->by_name, hf, strlen(hf), (int64_t)weights->count, NULL,
                                  error));
        weights->count++;
    }
    return PSOUP_OK;
fail:
    return status;
}

/* A shard's name must be that of a file beside the index. */
static bool is_plain_name(const char *name) {
    return name != NULL && *name != '\0' && strpbrk(name, "/\\:") == NULL &&
           strcmp(name, ".") != 0 && strcmp(name, "..") != 0;
}

/* {"weight_map": {tensor: file, …}}: every file once, then every promise checked. */
static psoup_status add_index(psoup__weights *weights, const char *index_path,
                              psoup_error *error) {
    psoup_status status;
    psoup_context *context = weights->context;
    psoup_json *index = NULL;
    psoup__map *shards = NULL; /* name → number of its file */
    char *path = NULL;
    const char *tensor = NULL;
    PSOUP__TRY(psoup_json_read(context, index_path, &index, error));
    PSOUP__TRY(psoup__map_create(context, 16, &shards, error));
    const psoup_json *map = psoup_json_get(index, "weight_map");
    if (psoup_json_kind(map) != PSOUP_JSON_OBJECT || psoup_json_size(map) == 0) {
        status = psoup__fail(error, PSOUP_ERROR_FORMAT,
                             "%s: weight_map: expected an object of tensor and file names",
                             index_path);
        goto fail;
    }
    for (const psoup_json *value; (value = psoup_json_next(map, &tensor)) != NULL;) {
        const char *name = psoup_json_string(value, NULL);
        if (!is_plain_name(name)) {
            status = psoup__fail(error, PSOUP_ERROR_FORMAT,
                                 "%s: tensor %.200s is said to be in \"%.100s\"; expected the name "
                                 "of a file in the same directory",
                                 index_path, tensor, name != NULL ? name : "");
            goto fail;
        }
        int64_t number;
        if (psoup__map_get(shards, name, strlen(name), &number))
            continue;
        PSOUP__TRY(psoup__map_set(shards, name, strlen(name), (int64_t)weights->n_files, NULL,
                                  error));
        psoup__free(context, path);
        path = psoup__path_join(context, weights->path, name, error);
        if (path == NULL) {
            status = PSOUP_ERROR_MEMORY;
            goto fail;
        }
        PSOUP__TRY(add_file(weights, path, error));
    }
    tensor = NULL;
    for (const psoup_json *value; (value = psoup_json_next(map, &tensor)) != NULL;) {
        const char *name = psoup_json_string(value, "");
        int64_t number = 0, found;
        psoup__map_get(shards, name, strlen(name), &number);
        if (!psoup__map_get(weights->by_name, tensor, strlen(tensor), &found) ||
            weights->slots[found].file != (size_t)number) {
            status = psoup__fail(error, PSOUP_ERROR_FORMAT,
                                 "%s: tensor %.200s is not in %.100s as the index says", index_path,
                                 tensor, name);
            goto fail;
        }
    }
    status = PSOUP_OK;
fail:
    psoup__free(context, path);
    psoup__map_free(shards);
    psoup_json_free(index);
    return status;
}

/* Neither file is there: says what to do when the directory holds a pickle, which could run code. */
static psoup_status nothing_there(psoup_context *context, const char *directory, const char *stem,
                                  psoup_error *error) {
    static const char *const pickles[] = {"pytorch_model.bin", "pytorch_model.bin.index.json",
                                          "model.bin",         "adapter_model.bin",
                                          "adapter_model.pt",  "model.pt",
                                          "model.pth",         "consolidated.00.pth"};
    for (size_t i = 0; i < sizeof pickles / sizeof *pickles; i++) {
        char *path = psoup__path_join(context, directory, pickles[i], error);
        if (path == NULL)
            return PSOUP_ERROR_MEMORY;
        bool exists = psoup__file_exists(path);
        psoup__free(context, path);
        if (!exists)
            continue;
        if (strcmp(stem, "model") == 0)
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "%s: %s is a pickle, which could run code when read; convert it with "
                               "python -c \"from transformers import AutoModelForCausalLM as M; "
                               "M.from_pretrained('%.200s', torch_dtype='auto')"
                               ".save_pretrained('%.200s')\"",
                               directory, pickles[i], directory, directory);
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: %s is a pickle, which could run code when read; convert it with "
                           "python -c \"import torch, safetensors.torch as s; "
                           "s.save_file(torch.load('%.200s/%s', weights_only=True), "
                           "'%.200s/%s.safetensors')\"",
                           directory, pickles[i], directory, pickles[i], directory, stem);
    }
    return psoup__fail(error, PSOUP_ERROR_IO,
                       "%s: holds neither %s.safetensors nor %s.safetensors.index.json", directory,
                       stem, stem);
}

static bool has_ending(const char *text, const char *ending) {
    size_t n = strlen(text), m = strlen(ending);
    return n >= m && strcmp(text + n - m, ending) == 0;
}

bool psoup__is_gguf(const char *path) {
    return has_ending(path, ".gguf") && !psoup__is_directory(path);
}

static psoup_status open_weights(psoup_context *context, const char *path, const char *stem, bool map,
                                 int32_t heads, int32_t kv_heads, psoup__weights **out,
                                 psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    char *name = NULL, *single = NULL, *index = NULL;
    *out = NULL;
    psoup__weights *weights = psoup__alloc(context, 1, sizeof *weights, error);
    if (weights == NULL)
        return PSOUP_ERROR_MEMORY;
    weights->context = context;
    weights->map = map;
    if ((weights->path = psoup__strdup(context, path, error)) == NULL)
        goto fail;
    PSOUP__TRY(psoup__map_create(context, 256, &weights->by_name, error));
    if (!psoup__is_directory(path)) {
        if (psoup__file_exists(path) && !has_ending(path, ".safetensors") &&
            !psoup__is_gguf(path)) {
            status = psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                                 "%s: expected a directory, a .safetensors or a .gguf file", path);
            goto fail;
        }
        if (psoup__is_gguf(path))
            PSOUP__TRY(add_gguf(weights, path, stem, heads, kv_heads, error));
        else
            PSOUP__TRY(add_file(weights, path, error));
    } else {
        status = PSOUP_ERROR_MEMORY;
        if ((name = psoup__format(context, error, "%s.safetensors", stem)) == NULL ||
            (single = psoup__path_join(context, path, name, error)) == NULL ||
            (index = psoup__format(context, error, "%s.index.json", single)) == NULL)
            goto fail;
        if (psoup__file_exists(single))
            PSOUP__TRY(add_file(weights, single, error));
        else if (psoup__file_exists(index))
            PSOUP__TRY(add_index(weights, index, error));
        else
            PSOUP__TRY(nothing_there(context, path, stem, error));
    }
    *out = weights;
    weights = NULL;
    status = PSOUP_OK;
fail:
    psoup__free(context, name);
    psoup__free(context, single);
    psoup__free(context, index);
    psoup__weights_free(weights);
    return status;
}

psoup_status psoup__weights_open(psoup_context *context, const char *path, const char *stem, int32_t heads,
                                 int32_t kv_heads, psoup__weights **out, psoup_error *error) {
    return open_weights(context, path, stem, false, heads, kv_heads, out, error);
}

psoup_status psoup__weights_map(psoup_context *context, const char *path, const char *stem,
                                psoup__weights **out, psoup_error *error) {
    return open_weights(context, path, stem, true, 0, 0, out, error);
}

psoup_status psoup__weights_check(const psoup__weights *weights, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; i < psoup__weights_files(weights) && status == PSOUP_OK; i++) {
        const psoup__file *file = psoup__weights_file(weights, i);
        char part[256] = "";
        const uint64_t lost = psoup__file_lost(file);
        for (size_t j = 0; lost != UINT64_MAX && j < weights->count; j++) {
            const psoup__tensor *tensor = weights->slots[j].tensor;
            if (weights->slots[j].file == i && lost >= tensor->at && lost - tensor->at < tensor->bytes)
                snprintf(part, sizeof part, "tensor %.200s: ", weights->slots[j].name);
        }
        status = psoup__file_check(file, part, error);
    }
    return status;
}

void psoup__weights_free(psoup__weights *weights) {
    if (weights == NULL)
        return;
    psoup_context *context = weights->context;
    for (size_t i = 0; i < weights->n_files; i++)
        psoup__safetensors_free(weights->files[i]);
    psoup__free(context, weights->files);
    psoup__gguf_free(weights->gguf);
    psoup__free(context, weights->renamed);
    psoup__free(context, weights->names);
    psoup__free(context, weights->slots);
    psoup__map_free(weights->by_name);
    psoup__free(context, weights->path);
    psoup__free(context, weights);
}

size_t psoup__weights_count(const psoup__weights *weights) {
    return weights->count;
}

const char *psoup__weights_name(const psoup__weights *weights, size_t index) {
    return weights->slots[index].name;
}

const psoup__tensor *psoup__weights_tensor(const psoup__weights *weights, size_t index) {
    return weights->slots[index].tensor;
}

const psoup__tensor *psoup__weights_find(const psoup__weights *weights, const char *name) {
    int64_t index;
    if (!psoup__map_get(weights->by_name, name, strlen(name), &index))
        return NULL;
    return weights->slots[index].tensor;
}

const psoup__gguf *psoup__weights_gguf(const psoup__weights *weights) {
    return weights->gguf;
}

const char *psoup__weights_path(const psoup__weights *weights) {
    return weights->path;
}

size_t psoup__weights_files(const psoup__weights *weights) {
    return weights->gguf != NULL ? 1 : weights->n_files;
}

psoup__file *psoup__weights_file(const psoup__weights *weights, size_t index) {
    return weights->gguf != NULL ? psoup__gguf_file(weights->gguf)
                                 : psoup__safetensors_file(weights->files[index]);
}

bool psoup__weights_index(const psoup__weights *weights, const char *name, size_t *index) {
    int64_t found;
    if (!psoup__map_get(weights->by_name, name, strlen(name), &found))
        return false;
    *index = (size_t)found;
    return true;
}
