/* The results of adapters that become one adapter: a pair of factors for each module that one of them has,
 * and the weighted sum of their heads. */
#include "merge/engine.h"

#include <stdlib.h>
#include <string.h>

static int by_name(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* [n] sorted, borrowed from the sources. */
static psoup_status collect_modules(const psoup_merger *merger, const char ***out, size_t *n,
                                    psoup_error *error) {
    size_t total = 0, kept = 0;
    for (size_t i = 0; i < merger->n; i++)
        total += merger->sources[i].adapter->n;
    const char **modules = psoup__alloc(merger->context, total, sizeof *modules, error);
    if ((*out = modules) == NULL)
        return PSOUP_ERROR_MEMORY;
    *n = 0;
    for (size_t i = 0; i < merger->n; i++)
        for (size_t j = 0; j < merger->sources[i].adapter->n; j++)
            modules[(*n)++] = merger->sources[i].adapter->pairs[j].module;
    if (*n > 0)
        qsort(modules, *n, sizeof *modules, by_name);
    for (size_t i = 0; i < *n; i++)
        if (kept == 0 || strcmp(modules[kept - 1], modules[i]) != 0)
            modules[kept++] = modules[i];
    *n = kept;
    return PSOUP_OK;
}

/* What an adapter file can hold: PEFT knows no f64, and no 8-bit kinds. */
static psoup_dtype factor_dtype(const psoup_merger *merger, psoup_dtype dtype) {
    if (merger->options.dtype >= 0)
        return (psoup_dtype)merger->options.dtype;
    return dtype == PSOUP_F16 || dtype == PSOUP_BF16 ? dtype : PSOUP_F32;
}

static psoup_status plan_pair(psoup__plan *plan, const char *module, psoup_error *error) {
    psoup_status status;
    psoup_merger *merger = plan->merger;
    psoup_context *context = merger->context;
    psoup__result *result;
    psoup__plan_input *input;
    psoup_lora_factors *factors = psoup__alloc(context, merger->n, sizeof *factors, error);
    char *name = psoup__format(context, error, "base_model.model.%s.lora_A.weight", module);
    const psoup__peft_pair *first = NULL;
    size_t count = 0, owner = 0;
    psoup_error inner = {0};
    status = PSOUP_ERROR_MEMORY;
    if (factors == NULL || name == NULL)
        goto fail;
    PSOUP__TRY(psoup__plan_result(plan, PSOUP__PAIR_A, name, &result, error));
    size_t mine = plan->n - 1;
    result->method = psoup__method_of((psoup_merge_method)merger->options.method);
    if (result->method == NULL)
        PSOUP__TRY(psoup__plan_input_add(plan, &input, error));
    for (size_t i = 0; i < merger->n; i++) {
        const psoup__merge_source *source = &merger->sources[i];
        const psoup__peft_pair *pair = psoup__peft_find(source->adapter, module, strlen(module));
        double weight = merger->weights[i];
        if (pair == NULL) { /* its change is 0, which counts where whole changes are merged */
            if (result->method != NULL)
                PSOUP__TRY(psoup__plan_task_vector(plan, i, module, &input, error));
            continue;
        }
        if (first == NULL) {
            first = pair;
            owner = i;
        } else if (pair->a.shape[1] != first->a.shape[1] || pair->b.shape[0] != first->b.shape[0]) {
            status = psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                 "%s: %.200s maps %lld to %lld features, in %s %lld to %lld", source->path,
                                 module, (long long)pair->a.shape[1], (long long)pair->b.shape[0],
                                 merger->sources[owner].path, (long long)first->a.shape[1],
                                 (long long)first->b.shape[0]);
            goto fail;
        }
        psoup__plan_weight(plan, i, module, &weight);
        factors[count++] = (psoup_lora_factors){.rank = pair->rank, .scale = pair->scale};
        if (result->method != NULL)
            PSOUP__TRY(psoup__plan_task_vector(plan, i, module, &input, error));
        weight = result->method == NULL ? weight * merger->options.strength
                 : psoup__plan_counts(plan, input) ? 1 : 0;
        PSOUP__TRY(psoup__plan_part_add(plan, input, i, pair, weight, error));
    }
    int32_t rank = merger->options.svd_rank;
    if (result->method == NULL) {
        PSOUP__TRY(psoup__plan_check_sum(plan, module, error));
        rank = psoup__merge_rank((psoup_merge_method)merger->options.method, merger->options.svd_rank,
                                 factors, count, &inner);
    }
    if (rank == 0) {
        status = psoup__fail(error, inner.status, "%.200s: %s", module, inner.message);
        goto fail;
    }
    psoup_dtype dtype = factor_dtype(merger, first->a.dtype);
    const int64_t a[2] = {rank, first->a.shape[1]}, b[2] = {first->b.shape[0], rank};
    result->module = first->module;
    result->inputs = plan->n_inputs - result->input;
    if (result->method != NULL)
        PSOUP__TRY(psoup__plan_method(plan, result, module, error));
    PSOUP__TRY(psoup__result_shape(result, dtype, 2, a, error));
    memcpy(strrchr(name, '_') + 1, "B", 1);
    PSOUP__TRY(psoup__plan_result(plan, PSOUP__PAIR_B, name, &result, error));
    result->module = first->module;
    result->input = plan->results[mine].input;
    result->inputs = plan->results[mine].inputs;
    PSOUP__TRY(psoup__result_shape(result, dtype, 2, b, error));
    if (rank > plan->rank)
        plan->rank = rank;
fail:
    psoup__free(context, name);
    psoup__free(context, factors);
    return status;
}

/* Σ weights · the heads' weight, or bias, in f32; an adapter without a bias counts as zero. */
static psoup_status plan_head(psoup__plan *plan, const char *part, bool bias, psoup_error *error) {
    psoup_status status;
    psoup_merger *merger = plan->merger;
    psoup__result *result;
    psoup__plan_input *input;
    const psoup__tensor *like = NULL;
    char name[64] = "base_model.model.score.";
    strcat(name, part);
    PSOUP__TRY(psoup__plan_result(plan, PSOUP__SUM, name, &result, error));
    for (size_t i = 0; i < merger->n; i++) {
        const psoup__peft *adapter = merger->sources[i].adapter;
        const psoup__tensor *tensor = bias ? &adapter->head_bias : &adapter->head;
        if (!psoup__tensor_is_there(tensor))
            continue;
        like = like != NULL ? like : tensor;
        PSOUP__TRY(psoup__plan_input_add(plan, &input, error));
        input->source = i;
        input->name = bias ? "score.bias" : "score";
        input->tensor = tensor;
        input->values[PSOUP__WEIGHT] = merger->weights[i];
        psoup__plan_weight(plan, i, "score", &input->values[PSOUP__WEIGHT]);
        result->inputs++;
    }
    PSOUP__TRY(psoup__result_shape(result, PSOUP_F32, like->rank, like->shape, error));
fail:
    return status;
}

/* Reward adapters: all have a head of one size, or none has. */
static psoup_status plan_heads(psoup__plan *plan, psoup_error *error) {
    psoup_status status;
    const psoup_merger *merger = plan->merger;
    const psoup__tensor *like = &merger->sources[0].adapter->head;
    bool bias = false;
    for (size_t i = 0; i < merger->n; i++) {
        const psoup__tensor *head = &merger->sources[i].adapter->head;
        if (psoup__tensor_is_there(head) != psoup__tensor_is_there(like) ||
            (psoup__tensor_is_there(head) && head->shape[1] != like->shape[1]))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: score: expected a head as in %s, or none in both",
                               merger->sources[i].path, merger->sources[0].path);
        bias |= psoup__tensor_is_there(&merger->sources[i].adapter->head_bias);
    }
    if (!psoup__tensor_is_there(like))
        return PSOUP_OK;
    if (like->shape[1] < 1 || like->shape[1] > INT32_MAX)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: score: %lld features", merger->sources[0].path,
                           (long long)like->shape[1]);
    PSOUP__TRY(plan_head(plan, "weight", false, error));
    if (bias)
        PSOUP__TRY(plan_head(plan, "bias", true, error));
fail:
    return status;
}

/* One adapter_config.json speaks for all of the result's modules. */
static bool is_across(const psoup__peft *adapter) {
    return adapter->n > 0 && adapter->pairs[0].transposed;
}

static psoup_status check_orientation(const psoup_merger *merger, psoup_error *error) {
    const psoup__peft *first = merger->sources[0].adapter;
    for (size_t i = 0; i < merger->n; i++)
        if (is_across(merger->sources[i].adapter) != is_across(first))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: fan_in_fan_out is %s and in %s %s; expected one of both",
                               merger->sources[i].path, is_across(first) ? "false" : "true",
                               merger->sources[0].path, is_across(first) ? "true" : "false");
    if (is_across(first) && merger->options.format == PSOUP_MERGE_GGUF)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: fan_in_fan_out: no architecture that is written as GGUF has such weights",
                           merger->sources[0].path);
    return PSOUP_OK;
}

psoup_status psoup__plan_adapters(psoup__plan *plan, psoup_error *error) {
    psoup_status status;
    const char **modules = NULL;
    size_t n;
    int32_t dtype = plan->merger->options.dtype;
    plan->rank = 1;
    if (dtype > PSOUP_BF16)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "adapters are f32, f16 or bf16, not %s",
                           psoup_dtype_name((psoup_dtype)dtype));
    PSOUP__TRY(check_orientation(plan->merger, error));
    PSOUP__TRY(collect_modules(plan->merger, &modules, &n, error));
    for (size_t i = 0; i < n; i++)
        PSOUP__TRY(plan_pair(plan, modules[i], error));
    PSOUP__TRY(plan_heads(plan, error));
fail:
    psoup__free(plan->merger->context, modules);
    return status;
}
