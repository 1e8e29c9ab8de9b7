/* A merge made again from its certificate, and a result checked against it. */
#include "merge/engine.h"

#include <string.h>

static psoup_status bad(const char *path, const char *what, psoup_error *error) {
    return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %s: not as a certificate has it", path, what);
}

static psoup_status read_settings(psoup_merger *merger, const psoup_json *list, const char *path,
                                  psoup__settings *out, psoup_error *error) {
    psoup_status status;
    double *values = NULL;
    for (size_t i = 0; i < psoup_json_size(list); i++) {
        const psoup_json *one = psoup_json_at(list, i), *array = psoup_json_get(one, "values");
        const char *name = psoup_json_string(psoup_json_get(one, "parameter"), "");
        psoup__parameter parameter = psoup__parameter_named(name);
        size_t n = psoup_json_size(array);
        if (parameter == PSOUP__PARAMETERS || n == 0)
            return bad(path, "settings", error);
        if ((values = psoup__alloc(merger->context, n, sizeof *values, error)) == NULL)
            return PSOUP_ERROR_MEMORY;
        for (size_t j = 0; j < n; j++)
            values[j] = psoup_json_real(psoup_json_at(array, j), 0);
        PSOUP__TRY(psoup__settings_add(merger->context, out, parameter,
                                       psoup_json_string(psoup_json_get(one, "filter"), NULL), values, n,
                                       false, error));
        psoup__free(merger->context, values);
        values = NULL;
    }
    return PSOUP_OK;
fail:
    psoup__free(merger->context, values);
    return status;
}

static psoup_status read_options(psoup_merger *merger, const psoup_json *root, const char *path,
                                 psoup_error *error) {
    psoup_status status;
    psoup_merger_options *o = &merger->options;
    const psoup_json *json = psoup_json_get(root, "options");
    const char *dtype = psoup_json_string(psoup_json_get(json, "dtype"), NULL);
    const struct {
        const char *name;
        int32_t *to;
    } integers[] = {{"svd_rank", &o->svd_rank}, {"any_sum", &o->any_sum}, {"peer", &o->peer},
                    {"format", &o->format}, {"normalize", &o->normalize}, {"rescale", &o->rescale}};
    const struct {
        const char *name;
        double *to;
    } reals[] = {{"density", &o->density}, {"gamma", &o->gamma}, {"epsilon", &o->epsilon},
                 {"lambda", &o->lambda}, {"t", &o->t}, {"strength", &o->strength}};
    psoup_dtype kind;
    PSOUP__TRY(psoup_merge_method_parse(psoup_json_string(psoup_json_get(root, "method"), ""), &o->method,
                                        error));
    for (size_t i = 0; i < sizeof integers / sizeof *integers; i++) {
        int64_t value = psoup_json_integer(psoup_json_get(json, integers[i].name), INT64_MIN);
        if (value < INT32_MIN || value > INT32_MAX)
            return bad(path, integers[i].name, error);
        *integers[i].to = (int32_t)value;
    }
    for (size_t i = 0; i < sizeof reals / sizeof *reals; i++)
        *reals[i].to = psoup_json_real(psoup_json_get(json, reals[i].name), PSOUP_MERGE_UNSAID);
    if (o->strength == PSOUP_MERGE_UNSAID) /* of before 0.4 */
        o->strength = 1;
    o->shard_size = (uint64_t)psoup_json_integer(psoup_json_get(json, "shard_size"), 0);
    o->seed = (uint64_t)psoup_json_integer(psoup_json_get(json, "seed"), 0);
    o->dtype = -1;
    if (dtype != NULL) {
        PSOUP__TRY(psoup_dtype_parse(dtype, &kind, error));
        o->dtype = (int32_t)kind;
    }
    PSOUP__TRY(psoup__options_check(o, error));
fail:
    return status;
}

static psoup_status read_slices(psoup_merger *merger, const psoup_json *list, const char *path,
                                psoup_error *error) {
    psoup_status status;
    for (size_t i = 0; i < psoup_json_size(list); i++) {
        const psoup_json *one = psoup_json_at(list, i), *parts = psoup_json_get(one, "sources");
        psoup__slice *slice;
        PSOUP__TRY(psoup__merger_slice(merger, &slice, error));
        PSOUP__TRY(read_settings(merger, psoup_json_get(one, "settings"), path, &slice->settings, error));
        for (size_t j = 0; j < psoup_json_size(parts); j++) {
            const psoup_json *part = psoup_json_at(parts, j), *layers = psoup_json_get(part, "layers");
            int64_t source = psoup_json_integer(psoup_json_get(part, "source"), -2);
            psoup__slice_part *p;
            if (source < -1 || source >= (int64_t)merger->n || (source < 0 && !merger->has_base))
                return bad(path, "slices", error);
            PSOUP__TRY(psoup__merger_slice_part(merger, slice, source < 0 ? PSOUP__NONE : (size_t)source,
                                                psoup_json_integer(psoup_json_at(layers, 0), -1),
                                                psoup_json_integer(psoup_json_at(layers, 1), -1), &p, error));
            PSOUP__TRY(read_settings(merger, psoup_json_get(part, "settings"), path, &p->settings, error));
        }
        if (slice->n == 0)
            return bad(path, "slices", error);
    }
    return PSOUP_OK;
fail:
    return status;
}

static psoup_status read_sources(psoup_merger *merger, const psoup_json *root, const char *path,
                                 psoup_error *error) {
    psoup_status status;
    const psoup_json *base = psoup_json_get(root, "base"), *sources = psoup_json_get(root, "sources");
    if (base != NULL)
        PSOUP__TRY(psoup_merger_set_base(
            merger, psoup_json_string(psoup_json_get(base, "path"), ""), error));
    for (size_t i = 0; i < psoup_json_size(sources); i++) {
        const psoup_json *one = psoup_json_at(sources, i), *files = psoup_json_get(one, "files");
        double weight = psoup_json_real(psoup_json_get(one, "weight"), 0);
        bool unsaid = weight == PSOUP_MERGE_UNSAID;
        PSOUP__TRY(psoup_merger_add(merger, psoup_json_string(psoup_json_get(one, "path"), ""),
                                    unsaid ? 1 : weight, error));
        merger->weights[merger->n - 1] = weight;
        PSOUP__TRY(read_settings(merger, psoup_json_get(one, "settings"), path,
                                 &merger->sources[merger->n - 1].settings, error));
        if (psoup_json_get(psoup_json_at(files, 0), "sha256") != NULL)
            merger->options.sha256 = 1;
    }
    return PSOUP_OK;
fail:
    return status;
}

psoup_status psoup_merger_load_certificate(psoup_merger *merger, const char *path, psoup_error *error) {
    psoup_status status;
    psoup_json *root = NULL;
    psoup_context *context = merger->context;
    const char *text;
    if (merger->n > 0 || merger->has_base || merger->n_slices > 0 || merger->settings.n > 0)
        return psoup__fail(error, PSOUP_ERROR_STATE, "%s: a certificate goes into a fresh merger", path);
    PSOUP__TRY(psoup_json_read(context, path, &root, error));
    if (psoup_json_integer(psoup_json_get(root, "psoup_merge"), 0) != 1) {
        status = psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: psoup_merge: expected 1", path);
        goto fail;
    }
    PSOUP__TRY(read_options(merger, root, path, error));
    if ((text = psoup_json_string(psoup_json_get(root, "reference"), NULL)) != NULL)
        PSOUP__TRY(psoup_merger_set_reference(merger, text, error));
    PSOUP__TRY(read_sources(merger, root, path, error));
    PSOUP__TRY(read_settings(merger, psoup_json_get(root, "settings"), path, &merger->settings, error));
    PSOUP__TRY(read_slices(merger, psoup_json_get(root, "slices"), path, error));
    merger->from_recipe = psoup_json_bool(psoup_json_get(root, "recipe"), 0) != 0;
    status = PSOUP_ERROR_MEMORY;
    if ((text = psoup_json_string(psoup_json_get(root, "sidecars"), NULL)) != NULL &&
        (merger->sidecars = psoup__strdup(context, text, error)) == NULL)
        goto fail;
    if ((text = psoup_json_string(psoup_json_get(root, "chat_template"), NULL)) != NULL &&
        (merger->chat_template = psoup__strdup(context, text, error)) == NULL)
        goto fail;
    merger->expected = root;
    return PSOUP_OK;
fail:
    psoup_json_free(root);
    return status;
}

/* ---- verifying ------------------------------------------------------------------------------------------- */

psoup_status psoup__hash_tensor(psoup_context *context, const psoup__tensor *tensor,
                                char out[PSOUP__HASH_TEXT], psoup_error *error) {
    psoup__hash *hash = psoup__hash_create(context, error);
    if (hash == NULL)
        return PSOUP_ERROR_MEMORY;
    size_t rows = tensor->heads > 0 ? (size_t)tensor->shape[0] : 1, bytes = tensor->bytes / rows;
    for (size_t i = 0; i < rows; i++)
        psoup__hash_bytes(hash, tensor, psoup__tensor_row(tensor, i) * bytes,
                          (psoup__tensor_row(tensor, i) + 1) * bytes);
    psoup__hash_text(hash, out);
    psoup__free(context, hash);
    return PSOUP_OK;
}

char *psoup__certificate_path(psoup_context *context, const char *result, psoup_error *error) {
    size_t length = strlen(result);
    if (psoup__is_directory(result))
        return psoup__path_join(context, result, "psoup-merge.json", error);
    if (length > 5 && strcmp(result + length - 5, ".gguf") == 0)
        length -= 5;
    return psoup__format(context, error, "%.*s.psoup-merge.json", (int)length, result);
}

/* What a file's metadata says, freed by psoup__free; NULL where it says nothing. */
static psoup_status metadata_text(psoup_context *context, const psoup__weights *weights, const char *path,
                                  char **out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__safetensors *file = NULL;
    const char *text = NULL;
    size_t length = 0;
    *out = NULL;
    if (psoup__weights_gguf(weights) != NULL) {
        if (!psoup__gguf_string(psoup__weights_gguf(weights), "psoup.merge", &text, &length) ||
            length > INT32_MAX)
            return PSOUP_OK;
    } else {
        PSOUP__TRY(psoup__safetensors_open(context, path, &file, error));
        text = psoup_json_string(psoup_json_get(psoup__safetensors_metadata(file), "psoup_merge"), NULL);
        length = text != NULL ? strlen(text) : 0;
    }
    if (text != NULL && (*out = psoup__format(context, error, "%.*s", (int)length, text)) == NULL)
        status = PSOUP_ERROR_MEMORY;
fail:
    psoup__safetensors_free(file);
    return status;
}

static psoup_status check_file(psoup_context *context, const psoup__weights *weights, const char *path,
                               const char *said, psoup_error *error) {
    psoup_status status;
    psoup_json *inside = NULL;
    char *text = NULL, *again = NULL;
    psoup_error inner = {0};
    PSOUP__TRY(metadata_text(context, weights, path, &text, error));
    status = text != NULL ? psoup_json_parse(text, strlen(text), path, &inside, &inner) : PSOUP_ERROR_FORMAT;
    if (status == PSOUP_ERROR_MEMORY) {
        psoup__fail(error, status, "%s", inner.message);
        goto fail;
    }
    if (status == PSOUP_OK && (again = psoup_json_text(inside, 0)) == NULL) {
        status = psoup__out_of_memory(error, 0);
        goto fail;
    }
    if (again == NULL || strcmp(again, said) != 0)
        status = psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: its metadata does not hold the certificate", path);
fail:
    psoup_text_free(again);
    psoup_json_free(inside);
    psoup__free(context, text);
    return status;
}

/* The same text must be in every file. */
static psoup_status check_metadata(psoup_context *context, const psoup__weights *weights,
                                   const psoup_json *certificate, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    char *said = psoup_json_text(certificate, 0);
    if (said == NULL)
        return psoup__out_of_memory(error, 0);
    for (size_t i = 0; i < psoup__weights_files(weights) && status == PSOUP_OK; i++)
        status = check_file(context, weights, psoup__weights_file(weights, i)->path, said, error);
    psoup_text_free(said);
    return status;
}

/* What is verified: a model's weights, or an adapter's factors (whose file may be of either kind). */
typedef struct opened {
    psoup__weights *weights;
    psoup__peft *peft;
} opened;

static const psoup__tensor *find_result(const opened *o, const char *name) {
    static const char prefix[] = "base_model.model.", ending[] = ".lora_A.weight";
    size_t length = strlen(name), cut = sizeof prefix - 1;
    if (o->peft == NULL || psoup__weights_gguf(o->peft->weights) == NULL)
        return psoup__weights_find(o->peft != NULL ? o->peft->weights : o->weights, name);
    if (length < cut + sizeof ending - 1 || strncmp(name, prefix, cut) != 0)
        return NULL;
    const psoup__peft_pair *pair = psoup__peft_find(o->peft, name + cut, length - cut - (sizeof ending - 1));
    if (pair == NULL)
        return NULL;
    return name[length - strlen("A.weight")] == 'A' ? &pair->a : &pair->b;
}

static psoup_status check_result(psoup_context *context, const opened *o, const char *path,
                                 const psoup_json *one, psoup_error *error) {
    const char *name = psoup_json_string(psoup_json_get(one, "tensor"), "");
    const char *dtype = psoup_json_string(psoup_json_get(one, "dtype"), "");
    const psoup_json *shape = psoup_json_get(one, "shape");
    const psoup__tensor *tensor = find_result(o, name);
    char text[PSOUP__HASH_TEXT];
    if (tensor == NULL)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: has no tensor %.200s, which the certificate has",
                           path, name);
    bool same = strcmp(dtype, psoup_dtype_name(tensor->dtype)) == 0 &&
                psoup_json_size(shape) == (size_t)tensor->rank;
    for (int i = 0; same && i < tensor->rank; i++)
        same = psoup_json_integer(psoup_json_at(shape, (size_t)i), -1) == tensor->shape[i];
    if (!same)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: tensor %.200s has another dtype or shape than the certificate says", path, name);
    psoup_status status = psoup__hash_tensor(context, tensor, text, error);
    if (status == PSOUP_OK && strcmp(text, psoup_json_string(psoup_json_get(one, "xxh3"), "")) != 0)
        status = psoup__fail(error, PSOUP_ERROR_FORMAT,
                             "%s: tensor %.200s has other bytes than the certificate says", path, name);
    return status;
}

static psoup_status open_result(psoup_context *context, const char *path, opened *o, psoup_error *error) {
    bool adapter = false;
    psoup_status status = psoup__path_is_adapter(context, path, &adapter, error);
    if (status != PSOUP_OK)
        return status;
    return adapter ? psoup__peft_open(context, path, &o->peft, error)
                   : psoup__weights_open(context, path, "model", 0, 0, &o->weights, error);
}

psoup_status psoup_merge_verify(psoup_context *context, const char *path, size_t *tensors,
                                psoup_error *error) {
    psoup_status status;
    psoup_json *root = NULL;
    opened o = {0};
    const psoup__weights *weights = NULL;
    char *certificate = psoup__certificate_path(context, path, error);
    if (certificate == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(psoup_json_read(context, certificate, &root, error));
    const psoup_json *results = psoup_json_get(root, "results");
    if (psoup_json_integer(psoup_json_get(root, "psoup_merge"), 0) != 1 || psoup_json_size(results) == 0) {
        status = bad(certificate, "psoup_merge", error);
        goto fail;
    }
    PSOUP__TRY(open_result(context, path, &o, error));
    weights = o.peft != NULL ? o.peft->weights : o.weights;
    if (psoup__weights_count(weights) != psoup_json_size(results)) {
        status = psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %zu tensors; the certificate has %zu", path,
                             psoup__weights_count(weights), psoup_json_size(results));
        goto fail;
    }
    for (size_t i = 0; i < psoup_json_size(results); i++)
        PSOUP__TRY(check_result(context, &o, path, psoup_json_at(results, i), error));
    PSOUP__TRY(check_metadata(context, weights, root, error));
    if (tensors != NULL)
        *tensors = psoup_json_size(results);
fail:
    if (weights != NULL && psoup__weights_check(weights, error) != PSOUP_OK)
        status = PSOUP_ERROR_IO; /* which is why other bytes were read */
    psoup__weights_free(o.weights);
    psoup__peft_free(o.peft);
    psoup_json_free(root);
    psoup__free(context, certificate);
    return status;
}
