/* The list of results, and what it is built with. */
#include "merge/engine.h"

#include <math.h>
#include <string.h>

bool psoup__dtype_mergeable(psoup_dtype dtype) {
    return psoup__dtype_is_float(dtype);
}

psoup_dtype psoup__result_dtype(const psoup_merger *merger, psoup_dtype dtype) {
    if (!psoup__dtype_mergeable(dtype))
        return dtype;
    if (merger->options.dtype >= 0)
        return (psoup_dtype)merger->options.dtype;
    return dtype == PSOUP_Q8_0 && merger->options.format != PSOUP_MERGE_GGUF ? PSOUP_F16 : dtype;
}

psoup_status psoup__plan_result(psoup__plan *plan, psoup__result_kind kind, const char *name,
                                psoup__result **out, psoup_error *error) {
    psoup_status status;
    psoup_context *context = plan->merger->context;
    PSOUP__TRY(psoup__reserve(context, &plan->results, &plan->results_capacity, plan->n + 1,
                              sizeof *plan->results, error));
    psoup__result *result = &plan->results[plan->n];
    *result = (psoup__result){.kind = kind, .input = plan->n_inputs, .base = PSOUP__NONE};
    if ((result->name = psoup__strdup(context, name, error)) == NULL)
        return PSOUP_ERROR_MEMORY;
    plan->n++;
    *out = result;
fail:
    return status;
}

psoup_status psoup__plan_input_add(psoup__plan *plan, psoup__plan_input **out, psoup_error *error) {
    psoup_status status;
    PSOUP__TRY(psoup__reserve(plan->merger->context, &plan->inputs, &plan->inputs_capacity,
                              plan->n_inputs + 1, sizeof *plan->inputs, error));
    *out = &plan->inputs[plan->n_inputs++];
    **out = (psoup__plan_input){.part = plan->n_parts};
fail:
    return status;
}

psoup_status psoup__plan_part_add(psoup__plan *plan, psoup__plan_input *input, size_t source,
                                  const psoup__peft_pair *pair, double weight, psoup_error *error) {
    psoup_status status;
    PSOUP__TRY(psoup__reserve(plan->merger->context, &plan->parts, &plan->parts_capacity,
                              plan->n_parts + 1, sizeof *plan->parts, error));
    plan->parts[plan->n_parts++] = 
        (psoup__plan_part){.source = source, .pair = pair, .weight = weight};
    input->parts++;
fail:
    return status;
}

psoup_status psoup__result_shape(psoup__result *result, psoup_dtype dtype, int rank, const int64_t *shape,
                                 psoup_error *error) {
    psoup__tensor tensor = {.rank = rank};
    result->dtype = dtype;
    result->rank = rank;
    if (rank > 0)
        memcpy(result->shape, shape, (size_t)rank * sizeof *shape);
    memcpy(tensor.shape, result->shape, sizeof tensor.shape);
    if (!psoup__tensor_elements(&tensor, &result->n) ||
        !psoup__dtype_bytes(dtype, result->n, &result->bytes))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "tensor %.200s: cannot be %s: %s", result->name,
                           psoup_dtype_name(dtype),
                           dtype == PSOUP_Q8_0 ? "no whole blocks of 32" : "too many bytes");
    return PSOUP_OK;
}

int64_t psoup__layer_of(const char *name, size_t *begin, size_t *end) {
    const char *at = strncmp(name, "layers.", 7) == 0 ? name : strstr(name, ".layers.");
    if (at == NULL)
        return -1;
    at += *at == '.' ? 8 : 7;
    const char *digit = at;
    int64_t layer = 0;
    while (*digit >= '0' && *digit <= '9' && layer < 1000000)
        layer = 10 * layer + (*digit++ - '0');
    if (digit == at || (*digit != '.' && *digit != '\0'))
        return -1;
    *begin = (size_t)(at - name);
    *end = (size_t)(digit - name);
    return layer;
}

double psoup__depth_of(int64_t layer, int64_t layers) {
    if (layer < 0)
        return 0;
    return layers > 1 ? (double)layer / (double)(layers - 1) : 1;
}

/* Settings for one source go before those for all. */
void psoup__plan_weight(const psoup__plan *plan, size_t source, const char *tensor, double *weight) {
    const psoup_merger *merger = plan->merger;
    size_t begin, end;
    double t = psoup__depth_of(psoup__layer_of(tensor, &begin, &end), plan->depth);
    if (!psoup__settings_find(&merger->sources[source].settings, PSOUP__WEIGHT, tensor, t, weight))
        psoup__settings_find(&merger->settings, PSOUP__WEIGHT, tensor, t, weight);
}

psoup_status psoup__plan_check_sum(const psoup__plan *plan, const char *tensor, psoup_error *error) {
    const psoup_merger *merger = plan->merger;
    double sum = 0;
    for (size_t i = 0; i < merger->n; i++) {
        double weight = merger->weights[i];
        psoup__plan_weight(plan, i, tensor, &weight);
        sum += weight;
    }
    if (merger->n == 0 || merger->options.any_sum || fabs(sum - 1) <= 1e-6)
        return PSOUP_OK;
    return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                       "%.200s: the weights sum to %.9g; expected 1 (any_sum allows another)", tensor, sum);
}

static void count_layers(psoup__plan *plan) {
    psoup_merger *merger = plan->merger;
    size_t begin, end;
    for (size_t i = 0; i <= merger->n; i++) {
        const psoup__merge_source *source = i < merger->n ? &merger->sources[i] : &merger->base;
        for (size_t j = 0; j < psoup__source_count(source); j++) {
            int64_t layer = psoup__layer_of(psoup__source_name(source, j), &begin, &end);
            plan->depth = layer + 1 > plan->depth ? layer + 1 : plan->depth;
        }
        for (size_t j = 0; source->adapter != NULL && j < source->adapter->n; j++) {
            int64_t layer = psoup__layer_of(source->adapter->pairs[j].module, &begin, &end);
            plan->depth = layer + 1 > plan->depth ? layer + 1 : plan->depth;
        }
    }
}

static bool any_model(const psoup_merger *merger) {
    for (size_t i = 0; i < merger->n; i++)
        if (!psoup__source_is_adapter(&merger->sources[i]))
            return true;
    return false;
}

static psoup_status check_kinds(const psoup_merger *merger, bool models, psoup_error *error) {
    const psoup__merge_source *model = NULL, *adapter = NULL;
    for (size_t i = 0; i < merger->n; i++)
        if (psoup__source_is_adapter(&merger->sources[i]))
            adapter = adapter != NULL ? adapter : &merger->sources[i];
        else
            model = model != NULL ? model : &merger->sources[i];
    int32_t method = merger->options.method;
    bool whole = psoup__method_of((psoup_merge_method)method) != NULL;
    if (models && adapter != NULL && !merger->has_base)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s is an adapter and %s a model; expected sources of one kind, or a base for "
                           "the adapters",
                           adapter->path, model->path);
    if (models && !whole && method != PSOUP_MERGE_DELTA)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s is a full model: only the method delta and methods of whole tensors merge "
                           "it, not %s",
                           model->path, psoup_merge_method_name(method));
    if (models && merger->has_base && adapter == NULL && !whole)
        return psoup__fail(error, PSOUP_ERROR_STATE,
                           "%s is a full model; a base goes with adapters, or with methods of whole "
                           "tensors",
                           model->path);
    if (!models && !merger->has_base && whole && merger->options.svd_rank < 1)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "method %s: what it makes of adapters is no low-rank change; expected a base, or "
                           "svd_rank, the rank to cut it to",
                           psoup_merge_method_name(method));
    return PSOUP_OK;
}

psoup_status psoup__plan_make(psoup_merger *merger, psoup__plan *out, psoup_error *error) {
    psoup_status status;
    bool models = any_model(merger);
    *out = (psoup__plan){.merger = merger, .layers = -1};
    if (merger->n == 0 && !merger->has_base)
        return psoup__fail(error, PSOUP_ERROR_STATE, "nothing to merge: no source was added");
    PSOUP__TRY(check_kinds(merger, models, error));
    count_layers(out);
    out->adapter = !models && !merger->has_base;
    PSOUP__TRY(out->adapter ? psoup__plan_adapters(out, error) : psoup__plan_models(out, error));
    return PSOUP_OK;
fail:
    psoup__plan_free(out);
    return status;
}

void psoup__plan_free(psoup__plan *plan) {
    if (plan->merger == NULL)
        return;
    psoup_context *context = plan->merger->context;
    for (size_t i = 0; i < plan->n; i++)
        psoup__free(context, plan->results[i].name);
    psoup__free(context, plan->results);
    psoup__free(context, plan->inputs);
    psoup__free(context, plan->parts);
    *plan = (psoup__plan){0};
}
