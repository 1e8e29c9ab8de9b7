/* One linear over all adapters: its factors read, and merged. */
#include "merge/merge.h"

#include <stdlib.h>
#include <string.h>

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

const psoup__peft_pair *psoup__peft_find(const psoup__peft *peft, const char *module,
                                         size_t length) {
    const module_key key = {module, length};
    return peft->n == 0
               ? NULL
               : bsearch(&key, peft->pairs, peft->n, sizeof *peft->pairs, compare_module);
}

psoup_status psoup__merge_module_init(const psoup_merger *merger, psoup__merge_module *module,
                                      psoup_error *error) {
    *module = (psoup__merge_module){0};
    module->factors = psoup__alloc(merger->context, merger->n, sizeof *module->factors, error);
    module->weights = psoup__alloc(merger->context, merger->n, sizeof *module->weights, error);
    return module->factors != NULL && module->weights != NULL ? PSOUP_OK : PSOUP_ERROR_MEMORY;
}

void psoup__merge_module_free(const psoup_merger *merger, psoup__merge_module *module) {
    psoup__free(merger->context, module->factors);
    psoup__free(merger->context, module->weights);
    psoup__free(merger->context, module->memory);
}

/* One factor as f32; refuses NaN and infinity. */
static psoup_status read_factor(psoup_context *context, const psoup__merge_source *source,
                                const char *module, const char *part, const psoup__tensor *tensor,
                                float *out, psoup_error *error) {
    size_t n = tensor->bytes / psoup_dtype_size(tensor->dtype);
    psoup__to_f32(context, out, tensor->data, tensor->dtype, n);
    if (psoup__merge_finite(context, out, n, PSOUP_F32))
        return PSOUP_OK;
    return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %.200s.%s holds a NaN or infinity",
                       source->path, module, part);
}

psoup_status psoup__merge_module_load(const psoup_merger *merger, psoup__merge_module *module,
                                      const char *name, psoup_error *error) {
    psoup_status status;
    const psoup__merge_source *owner = NULL;
    size_t need = 0;
    module->name = name;
    module->count = 0;
    for (size_t i = 0; i < merger->n; i++) {
        const psoup__merge_source *source = &merger->sources[i];
        const psoup__peft_pair *pair = psoup__peft_find(source->adapter, name, strlen(name));
        if (pair == NULL)
            continue;
        if (owner == NULL) {
            owner = source;
            module->in = pair->a.shape[1];
            module->out = pair->b.shape[0];
            module->dtype = pair->a.dtype;
        } else if (pair->a.shape[1] != module->in || pair->b.shape[0] != module->out) {
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: %.200s maps %lld to %lld features, in %s %lld to %lld",
                               source->path, name, (long long)pair->a.shape[1],
                               (long long)pair->b.shape[0], owner->path, (long long)module->in,
                               (long long)module->out);
        }
        /* The shapes come from a file: their sum may not overflow either. */
        size_t floats = (size_t)pair->rank * ((size_t)module->in + (size_t)module->out);
        if (merger->weights[i] != 0 && !psoup__add(need, floats, &need))
            return psoup__out_of_memory(error, SIZE_MAX);
        module->factors[module->count] =
            (psoup_lora_factors){.rank = pair->rank, .scale = pair->scale};
        module->weights[module->count++] = merger->weights[i];
    }
    PSOUP__TRY(psoup__reserve(merger->context, &module->memory, &module->capacity, need,
                              sizeof *module->memory, error));
    float *at = module->memory;
    size_t f = 0;
    for (size_t i = 0; i < merger->n; i++) {
        const psoup__merge_source *source = &merger->sources[i];
        const psoup__peft_pair *pair = psoup__peft_find(source->adapter, name, strlen(name));
        if (pair == NULL)
            continue;
        if (merger->weights[i] != 0) {
            float *b = at + (size_t)pair->rank * (size_t)module->in;
            PSOUP__TRY(read_factor(merger->context, source, name, "lora_A", &pair->a, at, error));
            PSOUP__TRY(read_factor(merger->context, source, name, "lora_B", &pair->b, b, error));
            module->factors[f].a = at;
            module->factors[f].b = b;
            at = b + (size_t)pair->rank * (size_t)module->out;
        }
        f++;
    }
    return PSOUP_OK;
fail:
    return status;
}

psoup_status psoup__merge_module_run(psoup_merger *merger, const psoup__merge_module *module,
                                     float **a, float **b, int32_t *rank, psoup_error *error) {
    psoup_status status;
    psoup_error inner = {0};
    psoup_merge_method method = (psoup_merge_method)merger->options.method;
    psoup_merge_report *report = &merger->report;
    double lost = 0;
    *a = NULL;
    *rank = psoup__merge_rank(method, merger->options.svd_rank, module->factors, module->count,
                              &inner);
    if (*rank == 0)
        return psoup__fail(error, inner.status, "%.200s: %s", module->name, inner.message);
    *a = psoup__alloc(merger->context, (size_t)*rank,
                      ((size_t)module->in + (size_t)module->out) * sizeof **a, error);
    if (*a == NULL)
        return PSOUP_ERROR_MEMORY;
    *b = *a + (size_t)*rank * (size_t)module->in;
    PSOUP__TRY(psoup_merge_factors(merger->context, method, *a, *b, *rank, module->out, module->in,
                                   module->factors, module->weights, module->count, &lost, error));
    merger->error_sum += lost;
    merger->errors++;
    if (lost > report->worst_error) {
        report->worst_error = lost;
        strncpy(report->worst_name, module->name, sizeof report->worst_name - 1);
    }
    return PSOUP_OK;
fail:
    psoup__free(merger->context, *a);
    *a = NULL;
    return status;
}

psoup_status psoup__merge_progress(psoup_merger *merger, size_t done, size_t total,
                                   psoup_error *error) {
    const psoup_merger_options *options = &merger->options;
    if (options->progress == NULL ||
        options->progress(options->progress_user, "merge", (int64_t)done, (int64_t)total) == 0)
        return PSOUP_OK;
    return psoup__fail(error, PSOUP_ERROR_CANCELLED, "merging was cancelled after %zu of %zu", done,
                       total);
}
