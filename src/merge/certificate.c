/* What went into a merge and what came out of it. */
#include "merge/engine.h"

#include <string.h>

/* The entry of a tensor; the same for all results that read it. */
static psoup_status find_entry(psoup__certificate *c, psoup__map *map, size_t source, const char *name,
                               char part, size_t *out, psoup_error *error) {
    psoup_status status;
    psoup_context *context = c->plan->merger->context;
    int64_t found;
    char *key = psoup__format(context, error, "%zu/%c/%s", source, part != 0 ? part : '-', name);
    if (key == NULL)
        return PSOUP_ERROR_MEMORY;
    if (psoup__map_get(map, key, strlen(key), &found)) {
        *out = (size_t)found;
        status = PSOUP_OK;
        goto fail;
    }
    PSOUP__TRY(psoup__map_set(map, key, strlen(key), (int64_t)c->n, NULL, error));
    PSOUP__TRY(psoup__reserve(context, &c->entries, &c->capacity, c->n + 1, sizeof *c->entries, error));
    c->entries[c->n] = (psoup__entry){.source = source, .name = name, .part = part};
    *out = c->n++;
fail:
    psoup__free(context, key);
    return status;
}

/* Inputs of weight 0 are not read where weights count. */
static bool is_read(const psoup__result *result, const psoup__plan_input *input) {
    if (result->kind == PSOUP__PAIR_A || result->kind == PSOUP__PAIR_B)
        return false; /* its parts are */
    bool counts = result->kind == PSOUP__SUM ||
                  (result->method != NULL && (result->method->parameters & PSOUP__USES_WEIGHT) != 0);
    return !counts || input->values[PSOUP__WEIGHT] != 0;
}

static psoup_status add_input(psoup__certificate *c, psoup__map *map, psoup__plan *plan,
                              psoup__plan_input *input, bool read, psoup_error *error) {
    psoup_status status;
    input->entry = PSOUP__NONE;
    if (read && input->tensor != NULL)
        PSOUP__TRY(find_entry(c, map, input->source, input->name, 0, &input->entry, error));
    for (size_t i = input->part; i < input->part + input->parts; i++) {
        psoup__plan_part *part = &plan->parts[i];
        part->entries[0] = part->entries[1] = PSOUP__NONE;
        for (int j = 0; j < 2 && part->weight != 0; j++)
            PSOUP__TRY(find_entry(c, map, part->source, part->pair->module, "AB"[j], &part->entries[j], error));
    }
    return PSOUP_OK;
fail:
    return status;
}

psoup_status psoup__certificate_create(psoup__plan *plan, psoup__certificate *out, psoup_error *error) {
    psoup_status status;
    psoup_context *context = plan->merger->context;
    psoup__map *map = NULL;
    *out = (psoup__certificate){.plan = plan};
    PSOUP__TRY(psoup__map_create(context, plan->n_inputs, &map, error));
    if ((out->made = psoup__alloc(context, plan->n, sizeof *out->made, error)) == NULL) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    for (size_t i = 0; i < plan->n; i++) {
        const psoup__result *result = &plan->results[i];
        out->made[i].error = -1;
        for (size_t j = 0; j < result->inputs; j++) {
            psoup__plan_input *input = &plan->inputs[result->input + j];
            PSOUP__TRY(add_input(out, map, plan, input, is_read(result, input), error));
        }
        if (result->base != PSOUP__NONE)
            PSOUP__TRY(add_input(out, map, plan, &plan->inputs[result->base], true, error));
    }
    status = PSOUP_OK;
fail:
    psoup__map_free(map);
    if (status != PSOUP_OK)
        psoup__certificate_free(out);
    return status;
}

void psoup__certificate_free(psoup__certificate *certificate) {
    if (certificate->plan == NULL)
        return;
    psoup_context *context = certificate->plan->merger->context;
    psoup__free(context, certificate->entries);
    psoup__free(context, certificate->made);
    *certificate = (psoup__certificate){0};
}
