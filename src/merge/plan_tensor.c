/* One result of a full model: its inputs from all sources, and the method that makes it. */
#include "merge/plan_models.h"

#include <math.h>
#include <string.h>

static size_t part_source(const psoup__group *g, size_t i) {
    return g->slice != NULL ? g->slice->parts[i].source : i;
}

static bool takes_base(const psoup_merger *merger) {
    const psoup__method *method = psoup__method_of((psoup_merge_method)merger->options.method);
    return method != NULL && merger->has_base &&
           (method->needs_base || method->method == PSOUP_MERGE_SLERP ||
            method->method == PSOUP_MERGE_NUSLERP);
}

/* ---- names ------------------------------------------------------------------------------------------ */

char *psoup__with_layer(psoup_context *context, const char *name, int64_t layer, psoup_error *error) {
    size_t begin, end;
    if (psoup__layer_of(name, &begin, &end) < 0)
        return psoup__strdup(context, name, error);
    return psoup__format(context, error, "%.*s%lld%s", (int)begin, name, (long long)layer, name + end);
}

/* A tied head is the embedding. */
static bool find_tied(const psoup__merge_source *source, const char *name, size_t *index) {
    return psoup__source_index(source, name, index) ||
           (strcmp(name, PSOUP__HEAD) == 0 && psoup__source_index(source, PSOUP__EMBEDDING, index));
}

/* ---- inputs ---------------------------------------------------------------------------------------------- */

static const psoup__peft_pair *pair_of(const psoup__merge_source *source, const char *name) {
    size_t length = strlen(name), ending = strlen(".weight");
    if (source->adapter == NULL || length <= ending || strcmp(name + length - ending, ".weight") != 0)
        return NULL;
    return psoup__peft_find(source->adapter, name, length - ending);
}

static psoup_status set_tensor(psoup__plan *plan, psoup__plan_input *input, size_t source,
                               const char *name, psoup_error *error) {
    psoup_merger *merger = plan->merger;
    const psoup__merge_source *from = psoup__merger_source(merger, source);
    size_t index;
    if (psoup__source_is_adapter(from)) {
        source = PSOUP__NONE;
        from = &merger->base;
    }
    if (!find_tied(from, name, &index))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: has no tensor %.200s, which %s has",
                           from->path, name, plan->like->path);
    input->source = source;
    input->name = psoup__source_name(from, index);
    input->tensor = psoup__source_tensor(from, index);
    return PSOUP_OK;
}

static double value_of(const psoup__plan *plan, const psoup__group *g, size_t part, const char *name,
                       psoup__parameter parameter, double otherwise) {
    psoup_merger *merger = plan->merger;
    double out = otherwise;
    if (g->slice != NULL) {
        if (part < g->n && psoup__settings_find(&g->slice->parts[part].settings, parameter, name, g->t, &out))
            return out;
        if (psoup__settings_find(&g->slice->settings, parameter, name, g->t, &out))
            return out;
    } else if (part < g->n &&
               psoup__settings_find(&merger->sources[part].settings, parameter, name, g->t, &out)) {
        return out;
    }
    psoup__settings_find(&merger->settings, parameter, name, g->t, &out);
    return out;
}

static void set_values(const psoup__plan *plan, const psoup__group *g, size_t part, const char *name,
                       psoup__plan_input *input) {
    const psoup_merger *merger = plan->merger;
    const psoup_merger_options *o = &merger->options;
    size_t source = part_source(g, part);
    const double defaults[PSOUP__SCALE + 1] = {
        [PSOUP__WEIGHT] = source != PSOUP__NONE ? merger->weights[source] : 1, [PSOUP__DENSITY] = o->density,
        [PSOUP__GAMMA] = o->gamma, [PSOUP__EPSILON] = o->epsilon, [PSOUP__SCALE] = 1};
    for (int p = 0; p <= PSOUP__SCALE; p++)
        input->values[p] = value_of(plan, g, part, name, (psoup__parameter)p, defaults[p]);
}

/* Whether an input is read: one of weight 0 is not, by methods that weigh. (nuslerp takes two of weight 0 for
 * equals.) */
bool psoup__plan_counts(const psoup__plan *plan, const psoup__plan_input *input) {
    const psoup__method *method = psoup__method_of((psoup_merge_method)plan->merger->options.method);
    return method == NULL || method->method == PSOUP_MERGE_NUSLERP ||
           (method->parameters & PSOUP__USES_WEIGHT) == 0 || input->values[PSOUP__WEIGHT] != 0;
}

/* One source's input, with the parameters that are its own. */
static psoup_status add_input(psoup__plan *plan, const psoup__group *g, size_t part, const char *like_name,
                              psoup__result *result, psoup_error *error) {
    psoup_status status;
    psoup_merger *merger = plan->merger;
    psoup__plan_input *input;
    size_t source = part_source(g, part);
    const psoup__merge_source *from = psoup__merger_source(merger, source);
    char *name = NULL;
    if (g->slice != NULL)
        name = psoup__with_layer(merger->context, like_name, g->slice->parts[part].first + g->shift, error);
    else
        name = psoup__strdup(merger->context, like_name, error);
    if (name == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(psoup__plan_input_add(plan, &input, error));
    PSOUP__TRY(set_tensor(plan, input, source, name, error));
    result->inputs++;
    const psoup__peft_pair *pair = pair_of(from, name);
    set_values(plan, g, part, name, input);
    if (pair != NULL)
        PSOUP__TRY(psoup__plan_part_add(plan, input, source, pair, psoup__plan_counts(plan, input) ? 1 : 0,
                                        error));
fail:
    psoup__free(merger->context, name);
    return status;
}

/* Adapters on a base whose factors are summed, or merged with each other: one input. */
static psoup_status add_folded(psoup__plan *plan, const char *name, psoup__result *result,
                               psoup_error *error) {
    psoup_status status;
    psoup_merger *merger = plan->merger;
    bool sums = merger->options.method == PSOUP_MERGE_DELTA;
    psoup__plan_input *input;
    PSOUP__TRY(psoup__plan_input_add(plan, &input, error));
    PSOUP__TRY(set_tensor(plan, input, PSOUP__NONE, name, error));
    input->values[PSOUP__WEIGHT] = input->values[PSOUP__SCALE] = 1;
    result->inputs = 1;
    PSOUP__TRY(psoup__plan_check_sum(plan, name, error));
    for (size_t i = 0; i < merger->n; i++) {
        const psoup__peft_pair *pair = pair_of(&merger->sources[i], name);
        double weight = merger->weights[i];
        if (pair == NULL)
            continue;
        psoup__plan_weight(plan, i, name, &weight);
        weight *= merger->options.strength;
        if (!sums || weight != 0)
            PSOUP__TRY(psoup__plan_part_add(plan, input, i, pair, weight, error));
    }
    if (!sums && input->parts > 0)
        result->module = plan->parts[input->part].pair->module;
fail:
    return status;
}

/* ---- results --------------------------------------------------------------------------------------------- */

static bool same_shape(const psoup__tensor *a, const psoup__tensor *b) {
    return a->rank == b->rank && memcmp(a->shape, b->shape, (size_t)a->rank * sizeof *a->shape) == 0;
}

static psoup_status check_input(psoup__plan *plan, const psoup__result *result,
                                const psoup__plan_input *first, const psoup__plan_input *input,
                                psoup_error *error) {
    const char *path = psoup__merger_source(plan->merger, input->source)->path;
    const char *other = psoup__merger_source(plan->merger, first->source)->path;
    const psoup__tensor *a = first->tensor, *b = input->tensor;
    if (!same_shape(a, b))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: tensor %.200s has another shape than in %s: %lld × %lld, there %lld × "
                           "%lld%s",
                           path, input->name, other, b->rank > 0 ? (long long)b->shape[0] : 1,
                           b->rank > 1 ? (long long)b->shape[1] : 1,
                           a->rank > 0 ? (long long)a->shape[0] : 1,
                           a->rank > 1 ? (long long)a->shape[1] : 1,
                           strstr(input->name, "embed_tokens") != NULL ? " (the vocabularies differ)" : "");
    if (psoup__dtype_mergeable(a->dtype) && !psoup__dtype_mergeable(b->dtype))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: tensor %.200s is %s; expected floats as in %s", path, input->name,
                           psoup_dtype_name(b->dtype), other);
    for (size_t i = 0; i < input->parts; i++) {
        const psoup__plan_part *part = &plan->parts[input->part + i];
        const bool across = part->pair->transposed;
        if (b->rank != 2 || b->shape[across] != part->pair->b.shape[0] ||
            b->shape[!across] != part->pair->a.shape[1] || !psoup__dtype_mergeable(b->dtype))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: %.200s maps %lld to %lld features%s; the base %s has another shape",
                               psoup__merger_source(plan->merger, part->source)->path, part->pair->module,
                               (long long)part->pair->a.shape[1], (long long)part->pair->b.shape[0],
                               across ? " (fan_in_fan_out)" : "", path);
    }
    (void)result;
    return PSOUP_OK;
}

/* Whether psoup__sum may take the numbers as they lie. */
static bool lies_plainly(const psoup__plan_input *input) {
    return input->parts == 0 && input->tensor->heads == 0 && input->tensor->dtype != PSOUP_Q8_0;
}

/* A weighted sum: kept where all numbers lie plainly, else the method linear. */
static psoup_status finish_sum(psoup__plan *plan, psoup__result *result, bool normalize,
                               psoup_error *error) {
    psoup_merger *merger = plan->merger;
    double sum = 0;
    bool plain = result->dtype != PSOUP_Q8_0;
    for (size_t i = 0; i < result->inputs; i++) {
        sum += plan->inputs[result->input + i].values[PSOUP__WEIGHT];
        plain &= lies_plainly(&plan->inputs[result->input + i]);
    }
    if (normalize && fabs(sum) < 1e-8)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "tensor %.200s: the weights sum to %g and cannot be normalized", result->name, sum);
    if (!normalize && !merger->options.any_sum && !merger->from_recipe && fabs(sum - 1) > 1e-6)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "tensor %.200s: the weights sum to %.9g; expected 1 (any_sum allows another)",
                           result->name, sum);
    for (size_t i = 0; normalize && i < result->inputs; i++)
        plan->inputs[result->input + i].values[PSOUP__WEIGHT] /= sum;
    result->values[PSOUP__NORMALIZE] = 0;
    result->kind = plain ? PSOUP__SUM : PSOUP__MADE;
    result->method = psoup__method_of(PSOUP_MERGE_LINEAR);
    return PSOUP_OK;
}

static double flag(const psoup__plan *plan, const psoup__group *g, const psoup__result *result,
                   psoup__parameter parameter, int32_t option) {
    bool on = (result->method->on[plan->merger->options.peer] & psoup__parameter_bit(parameter)) != 0;
    return value_of(plan, g, PSOUP__NONE, result->name, parameter, option >= 0 ? option : on);
}

/* The method's own parameters, and what follows from them. */
static psoup_status finish_method(psoup__plan *plan, const psoup__group *g, psoup__result *result,
                                  psoup_error *error) {
    const psoup_merger_options *o = &plan->merger->options;
    double *v = result->values;
    const psoup__method *method = result->method;
    if (result->inputs < method->least || (method->most > 0 && result->inputs > method->most))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "tensor %.200s: method %s of %zu sources; expected %zu%s", result->name,
                           method->name, result->inputs, method->least,
                           method->most == 0 ? " or more" : method->most > method->least ? " or 2" : "");
    if (method->method == PSOUP_MERGE_SLERP && result->inputs + (result->base != PSOUP__NONE) != 2)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "tensor %.200s: slerp of %zu sources %s a base; expected two models",
                           result->name, result->inputs, result->base != PSOUP__NONE ? "and" : "without");
    for (size_t i = 0; i < result->inputs && (method->parameters & PSOUP__USES_WEIGHT) != 0; i++) {
        const psoup__plan_input *input = &plan->inputs[result->input + i];
        if (input->values[PSOUP__WEIGHT] == PSOUP_MERGE_UNSAID)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: tensor %.200s: no weight is given",
                               psoup__merger_source(plan->merger, input->source)->path, result->name);
    }
    v[PSOUP__LAMBDA] = value_of(plan, g, PSOUP__NONE, result->name, PSOUP__LAMBDA, o->lambda);
    v[PSOUP__T] = value_of(plan, g, PSOUP__NONE, result->name, PSOUP__T, o->t);
    v[PSOUP__VOTE] = value_of(plan, g, PSOUP__NONE, result->name, PSOUP__VOTE, PSOUP__VOTE_TOTAL);
    v[PSOUP__NORMALIZE] = flag(plan, g, result, PSOUP__NORMALIZE, o->normalize);
    v[PSOUP__RESCALE] = flag(plan, g, result, PSOUP__RESCALE, o->rescale);
    v[PSOUP__FLATTEN] = flag(plan, g, result, PSOUP__FLATTEN, -1);
    v[PSOUP__ROW_WISE] = flag(plan, g, result, PSOUP__ROW_WISE, -1);
    v[PSOUP__FILTER_WISE] = flag(plan, g, result, PSOUP__FILTER_WISE, -1);
    if (method->method == PSOUP_MERGE_SLERP && v[PSOUP__T] == PSOUP_MERGE_UNSAID)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "tensor %.200s: slerp needs the parameter t",
                           result->name);
    if (method->method == PSOUP_MERGE_LINEAR && result->kind != PSOUP__PAIR_A)
        return finish_sum(plan, result, v[PSOUP__NORMALIZE] != 0, error);
    return PSOUP_OK;
}

psoup_status psoup__plan_task_vector(psoup__plan *plan, size_t source, const char *module,
                                     psoup__plan_input **out, psoup_error *error) {
    psoup__group g = {.n = plan->merger->n};
    size_t begin, end;
    psoup_status status = psoup__plan_input_add(plan, out, error);
    if (status != PSOUP_OK)
        return status;
    g.t = psoup__depth_of(psoup__layer_of(module, &begin, &end), plan->depth);
    (*out)->source = source;
    set_values(plan, &g, source, module, *out);
    return PSOUP_OK;
}

psoup_status psoup__plan_method(psoup__plan *plan, psoup__result *result, const char *name,
                                psoup_error *error) {
    psoup__group g = {.n = plan->merger->n};
    size_t begin, end;
    g.t = psoup__depth_of(psoup__layer_of(name, &begin, &end), plan->depth);
    return finish_method(plan, &g, result, error);
}

/* Adapters that do not touch a tensor make no difference to it, whatever the method. */
static bool nothing_changes(const psoup__plan *plan, const psoup__result *result) {
    for (size_t i = 0; i < result->inputs; i++) {
        const psoup__plan_input *input = &plan->inputs[result->input + i];
        if (input->source != PSOUP__NONE || input->parts > 0)
            return false;
    }
    return result->base != PSOUP__NONE && result->method->needs_base;
}

/* The dtype that a tensor has in the base, where there is one: whatever is mixed into it. */
static psoup_dtype base_dtype(const psoup__plan *plan, const char *name, psoup_dtype otherwise) {
    const psoup__merge_source *base = &plan->merger->base;
    size_t index;
    if (!plan->merger->has_base || !psoup__dtype_mergeable(otherwise) || !find_tied(base, name, &index))
        return otherwise;
    psoup_dtype dtype = psoup__source_tensor(base, index)->dtype;
    return psoup__dtype_mergeable(dtype) ? dtype : otherwise;
}

psoup_status psoup__plan_tensor(psoup__plan *plan, const psoup__group *g, const char *name,
                                const char *like_name, psoup_error *error) {
    psoup_status status;
    psoup_merger *merger = plan->merger;
    const psoup__method *method = psoup__method_of((psoup_merge_method)merger->options.method);
    psoup__result *result;
    psoup__plan_input *base = NULL;
    bool models = false, has_base = takes_base(merger);
    for (size_t i = 0; i < merger->n; i++)
        models |= !psoup__source_is_adapter(&merger->sources[i]);
    PSOUP__TRY(psoup__plan_result(plan, PSOUP__MADE, name, &result, error));
    size_t mine = plan->n - 1;
    if (!models && method == NULL) {
        PSOUP__TRY(add_folded(plan, like_name, result, error));
    } else {
        for (size_t i = 0; i < g->n; i++)
            if (!has_base || part_source(g, i) != PSOUP__NONE)
                PSOUP__TRY(add_input(plan, g, i, like_name, result, error));
        if (has_base) {
            char *base_name = NULL;
            int64_t first = g->slice != NULL ? g->slice->parts[0].first : 0;
            for (size_t i = 0; g->slice != NULL && i < g->n; i++)
                if (g->slice->parts[i].source == PSOUP__NONE)
                    first = g->slice->parts[i].first;
            base_name = g->slice != NULL ? psoup__with_layer(merger->context, like_name, first + g->shift, error)
                                         : psoup__strdup(merger->context, like_name, error);
            if (base_name == NULL)
                return PSOUP_ERROR_MEMORY;
            result->base = plan->n_inputs;
            status = psoup__plan_input_add(plan, &base, error);
            if (status == PSOUP_OK)
                status = set_tensor(plan, base, PSOUP__NONE, base_name, error);
            psoup__free(merger->context, base_name);
            if (status != PSOUP_OK)
                return status;
        }
    }
    result = &plan->results[mine];
    const psoup__plan_input *first = &plan->inputs[result->input];
    if (result->inputs == 0 && base == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "tensor %.200s: no source has it", name);
    if (result->inputs == 0)
        first = base;
    const psoup__tensor *like = base != NULL ? plan->inputs[result->base].tensor : first->tensor;
    for (size_t i = result->input; i < plan->n_inputs; i++)
        PSOUP__TRY(check_input(plan, result, first, &plan->inputs[i], error));
    psoup_dtype dtype = psoup__result_dtype(merger, base_dtype(plan, like_name, like->dtype));
    if (merger->options.format == PSOUP_MERGE_GGUF)
        dtype = psoup__gguf_dtype(dtype, like->rank, like->shape);
    PSOUP__TRY(psoup__result_shape(result, dtype, like->rank, like->shape, error));
    if (!psoup__dtype_mergeable(like->dtype)) {
        result->kind = PSOUP__KEPT;
        return PSOUP_OK;
    }
    result->method = method;
    if (method != NULL && nothing_changes(plan, result)) {
        result->input = result->base;
        result->inputs = 1;
        plan->inputs[result->base].values[PSOUP__WEIGHT] = 1;
        result->base = PSOUP__NONE;
        return finish_sum(plan, result, false, error);
    }
    if (method != NULL)
        return finish_method(plan, g, result, error);
    if (models || plan->inputs[result->input].parts == 0) {
        result->module = NULL;
        return finish_sum(plan, result, false, error);
    }
    result->method = psoup__method_of(PSOUP_MERGE_PASSTHROUGH);
    return PSOUP_OK;
fail:
    return status;
}
