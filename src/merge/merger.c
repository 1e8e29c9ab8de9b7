/* The merger's handle: what is merged with what weights. */
#include "merge/merge.h"

#include <math.h>
#include <string.h>
#include <sys/stat.h>

psoup_status psoup_merger_create(psoup_context *context, const psoup_merger_options *options,
                                 psoup_merger **out, psoup_error *error) {
    psoup_status status;
    psoup_merger_options checked = PSOUP_MERGER_OPTIONS_INIT;
    *out = NULL;
    if (context == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_merger_create: no context");
    PSOUP__TRY(psoup__options(&checked, sizeof checked, options, "psoup_merger_options", error));
    if (checked.method < PSOUP_MERGE_DELTA || checked.method > PSOUP_MERGE_SVD)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merger_options: method %d; expected delta, factors or svd",
                           (int)checked.method);
    if (checked.method == PSOUP_MERGE_SVD && (checked.svd_rank < 1 || checked.svd_rank > 1 << 20))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merger_options: svd_rank %d; expected 1 to %d",
                           (int)checked.svd_rank, 1 << 20);
    if (checked.dtype < -1 || checked.dtype > PSOUP_BF16)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merger_options: dtype %s; expected f32, f16 or bf16",
                           psoup_dtype_name((psoup_dtype)checked.dtype));
    psoup_merger *merger = psoup__alloc(context, 1, sizeof *merger, error);
    if (merger == NULL)
        return PSOUP_ERROR_MEMORY;
    merger->context = context;
    merger->options = checked;
    *out = merger;
    return PSOUP_OK;
fail:
    return status;
}

void psoup_merger_free(psoup_merger *merger) {
    if (merger == NULL)
        return;
    for (size_t i = 0; i < merger->n; i++) {
        psoup__weights_free(merger->sources[i].model);
        psoup__peft_free(merger->sources[i].adapter);
    }
    psoup__weights_free(merger->base);
    psoup__free(merger->context, merger->sources);
    psoup__free(merger->context, merger->weights);
    psoup__free(merger->context, merger);
}

psoup_status psoup_merger_set_base(psoup_merger *merger, const char *path, psoup_error *error) {
    psoup__weights *base;
    psoup_status status = psoup__weights_open(merger->context, path, "model", &base, error);
    if (status != PSOUP_OK)
        return status;
    psoup__weights_free(merger->base);
    merger->base = base;
    return PSOUP_OK;
}

static bool same_shape(const psoup__tensor *a, const psoup__tensor *b) {
    return a->rank == b->rank &&
           memcmp(a->shape, b->shape, (size_t)a->rank * sizeof *a->shape) == 0;
}

/* Full models are summed tensor by tensor: the same names, the same shapes. A head that is tied in one
 * and not in the other shows as a missing name. */
static psoup_status check_models_agree(const psoup__weights *first, const psoup__weights *other,
                                       psoup_error *error) {
    const psoup__weights *sides[2][2] = {{first, other}, {other, first}};
    for (int side = 0; side < 2; side++)
        for (size_t i = 0; i < psoup__weights_count(sides[side][0]); i++) {
            const char *name = psoup__weights_name(sides[side][0], i);
            const psoup__tensor *a = psoup__weights_tensor(sides[side][0], i);
            const psoup__tensor *b = psoup__weights_find(sides[side][1], name);
            if (b == NULL)
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                   "%s: has no tensor %.200s, which %s has",
                                   psoup__weights_path(sides[side][1]), name,
                                   psoup__weights_path(sides[side][0]));
            if (!same_shape(a, b))
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                   "%s: tensor %.200s has another shape than in %s",
                                   psoup__weights_path(other), name, psoup__weights_path(first));
        }
    return PSOUP_OK;
}

static psoup_status open_source(psoup_context *context, const char *path,
                                psoup__merge_source *source, psoup_error *error) {
    char *config = psoup__path_join(context, path, "adapter_config.json", error);
    if (config == NULL)
        return PSOUP_ERROR_MEMORY;
    bool adapter = psoup__file_exists(config);
    psoup__free(context, config);
    if (adapter) {
        psoup_status status = psoup__peft_open(context, path, &source->adapter, error);
        if (status == PSOUP_OK)
            source->path = source->adapter->path;
        return status;
    }
    psoup_status status = psoup__weights_open(context, path, "model", &source->model, error);
    if (status != PSOUP_OK)
        return status;
    source->path = psoup__weights_path(source->model);
    for (size_t i = 0; i < psoup__weights_count(source->model); i++)
        if (strstr(psoup__weights_name(source->model, i), ".lora_A.") != NULL)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: holds an adapter; expected its directory, with "
                               "adapter_config.json",
                               path);
    return PSOUP_OK;
}

psoup_status psoup_merger_add(psoup_merger *merger, const char *path, double weight,
                              psoup_error *error) {
    psoup_status status;
    psoup_context *context = merger->context;
    psoup__merge_source source = {0};
    PSOUP__TRY(psoup__merge_check_weights(&weight, 1, true, error));
    PSOUP__TRY(psoup__reserve(context, &merger->sources, &merger->sources_capacity, merger->n + 1,
                              sizeof *merger->sources, error));
    PSOUP__TRY(psoup__reserve(context, &merger->weights, &merger->weights_capacity, merger->n + 1,
                              sizeof *merger->weights, error));
    PSOUP__TRY(open_source(context, path, &source, error));
    if (merger->n > 0) {
        const psoup__merge_source *first = &merger->sources[0];
        if ((first->adapter != NULL) != (source.adapter != NULL)) {
            status = psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                 "%s is %s and %s %s; expected sources of one kind", path,
                                 source.adapter != NULL ? "an adapter" : "a model", first->path,
                                 first->adapter != NULL ? "an adapter" : "a model");
            goto fail;
        }
        if (source.model != NULL)
            PSOUP__TRY(check_models_agree(first->model, source.model, error));
    }
    merger->sources[merger->n] = source;
    merger->weights[merger->n++] = weight;
    return PSOUP_OK;
fail:
    psoup__weights_free(source.model);
    psoup__peft_free(source.adapter);
    return status;
}

psoup_status psoup_merger_set_weights(psoup_merger *merger, const double *weights, size_t n,
                                      psoup_error *error) {
    if (n != merger->n)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%zu weights for %zu sources", n,
                           merger->n);
    psoup_status status =
        psoup__merge_check_weights(weights, n, merger->options.any_sum, error);
    if (status == PSOUP_OK && n > 0)
        memcpy(merger->weights, weights, n * sizeof *weights);
    return status;
}

/* Whether two names are one file or directory. */
static bool same_place(const char *a, const char *b) {
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

psoup_status psoup_merger_write(psoup_merger *merger, const char *directory, psoup_error *error) {
    psoup_status status;
    if (merger->n == 0)
        return psoup__fail(error, PSOUP_ERROR_STATE, "nothing to merge: no source was added");
    bool adapters = merger->sources[0].adapter != NULL;
    if (!adapters && merger->base != NULL)
        return psoup__fail(error, PSOUP_ERROR_STATE,
                           "%s is a full model; a base goes with adapters", merger->sources[0].path);
    if (!adapters && merger->options.method != PSOUP_MERGE_DELTA)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s is a full model, which only the method delta merges",
                           merger->sources[0].path);
    PSOUP__TRY(psoup__merge_check_weights(merger->weights, merger->n, merger->options.any_sum,
                                          error));
    PSOUP__TRY(psoup__make_directories(directory, error));
    for (size_t i = 0; i <= merger->n; i++) {
        const char *path = i < merger->n ? merger->sources[i].path
                           : merger->base != NULL ? psoup__weights_path(merger->base) : NULL;
        if (path != NULL && same_place(path, directory))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: is a source; expected another directory for the result",
                               directory);
    }
    merger->ran = false;
    merger->report = (psoup_merge_report){.size = sizeof merger->report};
    merger->error_sum = 0;
    merger->errors = 0;
    if (adapters && merger->base == NULL)
        PSOUP__TRY(psoup__merge_adapters(merger, directory, error));
    else
        PSOUP__TRY(psoup__merge_models(merger, directory, error));
    if (merger->errors > 0)
        merger->report.mean_error = merger->error_sum / (double)merger->errors;
    merger->ran = true;
    return PSOUP_OK;
fail:
    return status;
}

psoup_status psoup_merger_report(const psoup_merger *merger, psoup_merge_report *out,
                                 psoup_error *error) {
    size_t size = out->size;
    if (size < sizeof size)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merge_report: size %zu; expected sizeof(psoup_merge_report)",
                           size);
    if (!merger->ran)
        return psoup__fail(error, PSOUP_ERROR_STATE, "nothing was merged yet");
    memset(out, 0, size);
    memcpy(out, &merger->report, size < sizeof merger->report ? size : sizeof merger->report);
    out->size = size;
    return PSOUP_OK;
}
