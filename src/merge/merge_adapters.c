/* Adapters into one adapter. */
#include "merge/merge.h"

#include <stdlib.h>
#include <string.h>

typedef struct result {
    const char **modules; /* [n] sorted, borrowed from the sources */
    psoup__peft_pair *pairs;
    void **data; /* [n] a and b of each, in the output's dtype */
    size_t n;
    float *head;
    float head_bias;
    int32_t dim;
} result;

static int by_name(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The modules that at least one adapter has. */
static psoup_status collect_modules(const psoup_merger *merger, result *r, psoup_error *error) {
    size_t total = 0, kept = 0;
    for (size_t i = 0; i < merger->n; i++)
        total += merger->sources[i].adapter->n;
    r->modules = psoup__alloc(merger->context, total, sizeof *r->modules, error);
    r->pairs = psoup__alloc(merger->context, total, sizeof *r->pairs, error);
    r->data = psoup__alloc(merger->context, total, sizeof *r->data, error);
    if (r->modules == NULL || r->pairs == NULL || r->data == NULL)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < merger->n; i++)
        for (size_t j = 0; j < merger->sources[i].adapter->n; j++)
            r->modules[r->n++] = merger->sources[i].adapter->pairs[j].module;
    qsort(r->modules, r->n, sizeof *r->modules, by_name);
    for (size_t i = 0; i < r->n; i++)
        if (kept == 0 || strcmp(r->modules[kept - 1], r->modules[i]) != 0)
            r->modules[kept++] = r->modules[i];
    r->n = kept;
    return PSOUP_OK;
}

/* Merges one module and rounds it to the output's dtype. */
static psoup_status merge_pair(psoup_merger *merger, const psoup__merge_module *module,
                               psoup__peft_pair *pair, void **data, psoup_error *error) {
    psoup_status status;
    psoup_context *context = merger->context;
    float *a = NULL, *b;
    psoup_dtype dtype = merger->options.dtype >= 0 ? (psoup_dtype)merger->options.dtype
                                                   : module->dtype;
    if (dtype == PSOUP_F64)
        dtype = PSOUP_F32;
    pair->module = module->name;
    pair->scale = 1;
    PSOUP__TRY(psoup__merge_module_run(merger, module, &a, &b, &pair->rank, error));
    size_t n_a = (size_t)pair->rank * (size_t)module->in;
    size_t n_b = (size_t)pair->rank * (size_t)module->out, size = psoup_dtype_size(dtype);
    if (!psoup__merge_finite(context, a, n_a + n_b, dtype)) {
        status = psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                             "%.200s: the merged factors are too large for %s", module->name,
                             psoup_dtype_name(dtype));
        goto fail;
    }
    if ((*data = psoup__alloc(context, n_a + n_b, size, error)) == NULL) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    psoup__from_f32(context, *data, dtype, a, n_a + n_b);
    pair->a = (psoup__tensor){.dtype = dtype, .rank = 2, .shape = {pair->rank, module->in},
                              .bytes = n_a * size, .data = *data};
    pair->b = (psoup__tensor){.dtype = dtype, .rank = 2, .shape = {module->out, pair->rank},
                              .bytes = n_b * size, .data = (const char *)*data + n_a * size};
fail:
    psoup__free(context, a);
    return status;
}

/* The heads of reward adapters: all have one, of one size, or none has. */
static psoup_status merge_heads(psoup_merger *merger, result *r, psoup_error *error) {
    psoup_context *context = merger->context;
    const psoup__merge_source *first = &merger->sources[0];
    const psoup__tensor *like = &first->adapter->head;
    float *row = NULL;
    for (size_t i = 0; i < merger->n; i++) {
        const psoup__merge_source *source = &merger->sources[i];
        const psoup__tensor *head = &source->adapter->head;
        if ((head->data == NULL) != (like->data == NULL) ||
            (head->data != NULL && head->shape[1] != like->shape[1]))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: score: expected a head as in %s, or none in both", source->path,
                               first->path);
    }
    if (like->data == NULL)
        return PSOUP_OK;
    if (like->shape[1] < 1 || like->shape[1] > INT32_MAX)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: score: %lld features", first->path,
                           (long long)like->shape[1]);
    r->dim = (int32_t)like->shape[1];
    r->head = psoup__alloc(context, (size_t)r->dim, 2 * sizeof *r->head, error);
    if (r->head == NULL)
        return PSOUP_ERROR_MEMORY;
    row = r->head + r->dim;
    for (size_t i = 0; i < merger->n; i++) {
        const psoup__peft *adapter = merger->sources[i].adapter;
        float bias = 0, w = (float)merger->weights[i];
        if (w == 0)
            continue;
        psoup__to_f32(context, row, adapter->head.data, adapter->head.dtype, (size_t)r->dim);
        if (adapter->head_bias.data != NULL)
            psoup__to_f32(context, &bias, adapter->head_bias.data, adapter->head_bias.dtype, 1);
        if (!psoup__merge_finite(context, row, (size_t)r->dim, PSOUP_F32) ||
            !psoup__merge_finite(context, &bias, 1, PSOUP_F32))
            return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: score holds a NaN or infinity",
                               adapter->path);
        for (int32_t k = 0; k < r->dim; k++)
            r->head[k] += w * row[k];
        r->head_bias += w * bias;
    }
    return PSOUP_OK;
}

static bool any_bias(const psoup_merger *merger) {
    for (size_t i = 0; i < merger->n; i++)
        if (merger->sources[i].adapter->head_bias.data != NULL)
            return true;
    return false;
}

psoup_status psoup__merge_adapters(psoup_merger *merger, const char *directory,
                                   psoup_error *error) {
    psoup_status status;
    result r = {0};
    psoup__merge_module module = {0};
    const psoup_json *config = merger->sources[0].adapter->config;
    psoup__peft_output output = {
        .rank = 1,
        .task_type = psoup_json_string(psoup_json_get(config, "task_type"), "CAUSAL_LM"),
        .base_name = psoup_json_string(psoup_json_get(config, "base_model_name_or_path"), "")};
    PSOUP__TRY(collect_modules(merger, &r, error));
    PSOUP__TRY(psoup__merge_module_init(merger, &module, error));
    PSOUP__TRY(merge_heads(merger, &r, error));
    for (size_t i = 0; i < r.n; i++) {
        PSOUP__TRY(psoup__merge_module_load(merger, &module, r.modules[i], error));
        PSOUP__TRY(merge_pair(merger, &module, &r.pairs[i], &r.data[i], error));
        if (r.pairs[i].rank > output.rank)
            output.rank = r.pairs[i].rank;
        PSOUP__TRY(psoup__merge_progress(merger, i + 1, r.n, error));
    }
    output.pairs = r.pairs;
    output.n = r.n;
    output.alpha = (float)output.rank; /* scale 1 */
    output.head = r.head;
    output.head_bias = any_bias(merger) ? &r.head_bias : NULL;
    output.dim = r.dim;
    PSOUP__TRY(psoup__peft_write(merger->context, directory, &output, error));
    merger->report.tensors = 2 * r.n + (r.head != NULL) + (output.head_bias != NULL);
fail:
    psoup__merge_module_free(merger, &module);
    for (size_t i = 0; r.data != NULL && i < r.n; i++)
        psoup__free(merger->context, r.data[i]);
    psoup__free(merger->context, r.modules);
    psoup__free(merger->context, r.pairs);
    psoup__free(merger->context, r.data);
    psoup__free(merger->context, r.head);
    return status;
}
