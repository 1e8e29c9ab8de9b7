/* The results of a full model: every tensor of the base or first model, or of slices of layers. */
#include "merge/plan_models.h"

#include <string.h>

/* Every module of every adapter must be in the base: one that is not would be lost. */
static psoup_status check_adapters_fit(const psoup__plan *plan, psoup_error *error) {
    psoup_merger *merger = plan->merger;
    size_t index;
    for (size_t i = 0; i < merger->n; i++) {
        const psoup__merge_source *source = &merger->sources[i];
        const psoup__merge_source *on = source->model != NULL ? source : &merger->base;
        if (source->adapter != NULL && psoup__tensor_is_there(&source->adapter->head))
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "%s: has a scalar head (score), which a full model has no place for; "
                               "merge such adapters without a base",
                               source->path);
        for (size_t j = 0; source->adapter != NULL && j < source->adapter->n; j++) {
            const char *module = source->adapter->pairs[j].module;
            char *name = psoup__format(merger->context, error, "%s.weight", module);
            if (name == NULL)
                return PSOUP_ERROR_MEMORY;
            bool found = psoup__source_index(on, name, &index);
            psoup__free(merger->context, name);
            if (!found)
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: %.200s is not in the base %s%s",
                                   source->path, module, on->path,
                                   strcmp(module, "lm_head") == 0
                                       ? " (its head is tied to the embedding)"
                                       : "");
        }
    }
    return PSOUP_OK;
}

/* What `like` lacks would be lost, but for a head that is tied there; other architectures may have tensors of
 * the same names. */
static psoup_status check_models_agree(psoup__plan *plan, bool *head, psoup_error *error) {
    psoup_merger *merger = plan->merger;
    size_t index;
    for (size_t i = 0; i < merger->n; i++) {
        const psoup__merge_source *source = &merger->sources[i];
        if (psoup__source_is_adapter(source))
            continue;
        if (source->architecture[0] != '\0' && plan->like->architecture[0] != '\0' &&
            strcmp(source->architecture, plan->like->architecture) != 0)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: config.json's model_type is %.60s, that of %s %.60s; expected one "
                               "architecture",
                               source->path, source->architecture, plan->like->path,
                               plan->like->architecture);
        for (size_t j = 0; j < psoup__source_count(source); j++) {
            const char *name = psoup__source_name(source, j);
            if (psoup__source_index(plan->like, name, &index))
                continue;
            if (strcmp(name, PSOUP__HEAD) == 0 && psoup__source_index(plan->like, PSOUP__EMBEDDING, &index))
                *head = true;
            else if (merger->n_slices == 0)
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: has no tensor %.200s, which %s has",
                                   plan->like->path, name, source->path);
        }
    }
    return PSOUP_OK;
}

static psoup_status plan_whole(psoup__plan *plan, bool head, psoup_error *error) {
    psoup_status status;
    psoup__group g = {.n = plan->merger->n};
    size_t n = psoup__source_count(plan->like), begin, end;
    for (size_t i = 0; i < n; i++) {
        const char *name = psoup__source_name(plan->like, i);
        g.t = psoup__depth_of(psoup__layer_of(name, &begin, &end), plan->depth);
        PSOUP__TRY(psoup__plan_tensor(plan, &g, name, name, error));
    }
    g.t = 0;
    if (head)
        PSOUP__TRY(psoup__plan_tensor(plan, &g, PSOUP__HEAD, PSOUP__HEAD, error));
    plan->untied = head;
    return PSOUP_OK;
fail:
    return status;
}

/* Tensors outside the layers: the embedding comes from the first slice, what follows the layers from the
 * last (mergekit's plan.py, plan_module). */
static psoup_status plan_outside(psoup__plan *plan, bool before, bool head, psoup_error *error) {
    psoup_status status;
    psoup_merger *merger = plan->merger;
    const psoup__slice *slice = &merger->slices[before ? 0 : merger->n_slices - 1];
    const psoup__group g = {.slice = slice, .n = slice->n};
    size_t begin, end;
    for (size_t i = 0; i < psoup__source_count(plan->like); i++) {
        const char *name = psoup__source_name(plan->like, i);
        bool embedding = strstr(name, "embed") != NULL;
        if (psoup__layer_of(name, &begin, &end) < 0 && embedding == before)
            PSOUP__TRY(psoup__plan_tensor(plan, &g, name, name, error));
    }
    if (head && !before) {
        PSOUP__TRY(psoup__plan_tensor(plan, &g, PSOUP__HEAD, PSOUP__HEAD, error));
        plan->untied = true;
    }
    return PSOUP_OK;
fail:
    return status;
}

static psoup_status plan_layer(psoup__plan *plan, const psoup__group *g, int64_t place, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const psoup__slice_part *part = &g->slice->parts[0];
    const psoup__merge_source *from = psoup__merger_source(plan->merger, part->source);
    size_t begin, end, made = 0;
    if (psoup__source_is_adapter(from))
        from = &plan->merger->base;
    for (size_t i = 0; i < psoup__source_count(from); i++) {
        const char *like_name = psoup__source_name(from, i);
        if (psoup__layer_of(like_name, &begin, &end) != part->first + g->shift)
            continue;
        char *name = psoup__with_layer(plan->merger->context, like_name, place, error);
        if (name == NULL)
            return PSOUP_ERROR_MEMORY;
        status = psoup__plan_tensor(plan, g, name, like_name, error);
        psoup__free(plan->merger->context, name);
        if (status != PSOUP_OK)
            return status;
        made++;
    }
    if (made == 0)
        status = psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: has no layer %lld", from->path,
                             (long long)(part->first + g->shift));
    return status;
}

static psoup_status plan_slices(psoup__plan *plan, bool head, psoup_error *error) {
    psoup_status status;
    psoup_merger *merger = plan->merger;
    plan->layers = 0;
    PSOUP__TRY(plan_outside(plan, true, head, error));
    for (size_t i = 0; i < merger->n_slices; i++) {
        const psoup__slice *slice = &merger->slices[i];
        int64_t length = slice->parts[0].end - slice->parts[0].first;
        psoup__group g = {.slice = slice, .n = slice->n};
        for (g.shift = 0; g.shift < length; g.shift++) {
            g.t = psoup__depth_of(g.shift, length);
            PSOUP__TRY(plan_layer(plan, &g, plan->layers++, error));
        }
    }
    PSOUP__TRY(plan_outside(plan, false, head, error));
    return PSOUP_OK;
fail:
    return status;
}

psoup_status psoup__plan_models(psoup__plan *plan, psoup_error *error) {
    psoup_status status;
    psoup_merger *merger = plan->merger;
    const psoup__method *method = psoup__method_of((psoup_merge_method)merger->options.method);
    bool head = false;
    size_t first = 0;
    while (first < merger->n && psoup__source_is_adapter(&merger->sources[first]))
        first++;
    plan->like = merger->has_base ? &merger->base : &merger->sources[first];
    if (method != NULL && method->needs_base && !merger->has_base)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "method %s takes differences from a base; expected a base", method->name);
    for (size_t i = 0; merger->options.strength != 1 && i < merger->n; i++)
        if (!psoup__source_is_adapter(&merger->sources[i]))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: a strength of %g is of adapters; expected one, or task_arithmetic with a base and "
                               "lambda",
                               merger->sources[i].path, merger->options.strength);
    PSOUP__TRY(check_adapters_fit(plan, error));
    PSOUP__TRY(check_models_agree(plan, &head, error));
    PSOUP__TRY(merger->n_slices > 0 ? plan_slices(plan, head, error) : plan_whole(plan, head, error));
fail:
    return status;
}
