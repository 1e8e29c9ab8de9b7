/* Parameters by tensor: numbers, gradients over depth, filters. The rules are mergekit's (config.py,
 * evaluate_setting and ConfigReader.parameter). */
#include "merge/engine.h"

#include <string.h>

static const struct {
    const char *name;
    uint32_t bit;
} parameters[PSOUP__PARAMETERS] = {
    [PSOUP__WEIGHT] = {"weight", PSOUP__USES_WEIGHT},
    [PSOUP__DENSITY] = {"density", PSOUP__USES_DENSITY},
    [PSOUP__GAMMA] = {"gamma", PSOUP__USES_GAMMA},
    [PSOUP__EPSILON] = {"epsilon", PSOUP__USES_EPSILON},
    [PSOUP__SCALE] = {"scale", PSOUP__USES_SCALE},
    [PSOUP__LAMBDA] = {"lambda", PSOUP__USES_LAMBDA},
    [PSOUP__T] = {"t", PSOUP__USES_T},
    [PSOUP__NORMALIZE] = {"normalize", PSOUP__USES_NORMALIZE},
    [PSOUP__RESCALE] = {"rescale", PSOUP__USES_RESCALE},
    [PSOUP__VOTE] = {"vote", PSOUP__USES_VOTE},
    [PSOUP__FLATTEN] = {"nuslerp_flatten", PSOUP__USES_FLATTEN},
    [PSOUP__ROW_WISE] = {"nuslerp_row_wise", PSOUP__USES_ROW_WISE},
    [PSOUP__FILTER_WISE] = {"filter_wise", PSOUP__USES_FILTER_WISE},
};

psoup__parameter psoup__parameter_named(const char *name) {
    int i = 0;
    while (i < PSOUP__PARAMETERS && strcmp(parameters[i].name, name) != 0)
        i++;
    return (psoup__parameter)i;
}

const char *psoup__parameter_name(psoup__parameter parameter) {
    return parameters[parameter].name;
}

uint32_t psoup__parameter_bit(psoup__parameter parameter) {
    return parameters[parameter].bit;
}

psoup_status psoup__settings_add(psoup_context *context, psoup__settings *settings,
                                 psoup__parameter parameter, const char *filter, const double *values,
                                 size_t n, bool first, psoup_error *error) {
    psoup_status status;
    psoup__setting setting = {.parameter = parameter, .n = n};
    bool matched;
    if (filter != NULL)
        PSOUP__TRY(psoup__merge_text(filter, "filter", error));
    PSOUP__TRY(psoup__reserve(context, &settings->items, &settings->capacity, settings->n + 1,
                              sizeof *settings->items, error));
    if (filter != NULL && strncmp(filter, "re:", 3) == 0)
        PSOUP__TRY(psoup__peft_match(filter + 3, "", parameters[parameter].name, &matched, error));
    status = PSOUP_ERROR_MEMORY;
    if ((setting.values = psoup__alloc(context, n, sizeof *values, error)) == NULL ||
        (filter != NULL && (setting.filter = psoup__strdup(context, filter, error)) == NULL))
        goto fail;
    memcpy(setting.values, values, n * sizeof *values);
    if (first)
        memmove(settings->items + 1, settings->items, settings->n * sizeof *settings->items);
    settings->items[first ? 0 : settings->n] = setting;
    settings->n++;
    return PSOUP_OK;
fail:
    psoup__free(context, setting.values);
    return status;
}

void psoup__settings_free(psoup_context *context, psoup__settings *settings) {
    for (size_t i = 0; i < settings->n; i++) {
        psoup__free(context, settings->items[i].filter);
        psoup__free(context, settings->items[i].values);
    }
    psoup__free(context, settings->items);
    *settings = (psoup__settings){0};
}

static bool fits(const char *filter, const char *tensor) {
    bool matched = false;
    if (filter == NULL || strcmp(filter, "*") == 0)
        return true;
    if (strncmp(filter, "re:", 3) != 0)
        return strstr(tensor, filter) != NULL;
    return psoup__peft_match(filter + 3, tensor, "", &matched, NULL) == PSOUP_OK && matched;
}

bool psoup__settings_find(const psoup__settings *settings, psoup__parameter parameter, const char *tensor,
                          double t, double *out) {
    for (size_t i = 0; i < settings->n; i++) {
        const psoup__setting *s = &settings->items[i];
        if (s->parameter != parameter || !fits(s->filter, tensor))
            continue;
        double scaled = t * (double)(s->n - 1);
        size_t low = (size_t)scaled, high = low + 1 < s->n ? low + 1 : s->n - 1;
        double part = scaled - (double)low;
        *out = s->n == 1 ? s->values[0] : (1 - part) * s->values[low] + part * s->values[high];
        return true;
    }
    return false;
}
