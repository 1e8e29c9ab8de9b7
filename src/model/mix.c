/* A mix as text, "P1A=0.5,P2B=0.5", and what it may mix. */
#include "model/model.h"

#include <math.h>
#include <string.h>

/* A number as JSON writes it: the same in every locale. */
static psoup_status parse_number(const char *text, size_t length, double *out, bool *one) {
    char list[64] = "[";
    psoup_json *value = NULL;
    *one = false;
    if (length == 0 || length > sizeof list - 3)
        return PSOUP_OK;
    memcpy(list + 1, text, length);
    list[length + 1] = ']';
    psoup_status status = psoup_json_parse(list, length + 2, "mix", &value, NULL);
    if (status != PSOUP_OK)
        return status == PSOUP_ERROR_MEMORY ? status : PSOUP_OK;
    *out = psoup_json_real(psoup_json_at(value, 0), NAN);
    *one = psoup_json_size(value) == 1 && isfinite(*out);
    psoup_json_free(value);
    return PSOUP_OK;
}

static psoup_status parse_part(const psoup_model *model, const char *part, size_t length,
                               float *weights, bool *seen, double *sum, psoup_error *error) {
    const char *equals = memchr(part, '=', length);
    size_t name = equals ? (size_t)(equals - part) : 0;
    double weight = 0;
    bool is_number = false;
    if (equals && parse_number(equals + 1, length - name - 1, &weight, &is_number) != PSOUP_OK)
        return psoup__out_of_memory(error, length);
    if (!is_number)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "mix: \"%.*s\": expected NAME=NUMBER", (int)length, part);
    int32_t index = -1;
    for (int32_t i = 0; i < model->n_adapters; i++)
        if (strlen(model->adapters[i]->name) == name &&
            memcmp(model->adapters[i]->name, part, name) == 0)
            index = i;
    if (index < 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "mix: the model has no adapter named \"%.*s\"", (int)name, part);
    if (seen[index])
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "mix: adapter \"%.*s\" is named twice",
                           (int)name, part);
    seen[index] = true;
    weights[index] = (float)weight;
    *sum += weight;
    return PSOUP_OK;
}

psoup_status psoup_model_parse_mix(const psoup_model *model, const char *text, int any_sum,
                                   float *weights, psoup_error *error) {
    double sum = 0;
    psoup_status status = PSOUP_OK;
    for (int32_t i = 0; i < model->n_adapters; i++)
        weights[i] = 0;
    if (!text || !text[0])
        return PSOUP_OK;
    bool *seen = psoup__alloc(model->context, (size_t)model->n_adapters, sizeof *seen, error);
    if (!seen)
        return PSOUP_ERROR_MEMORY;
    for (const char *part = text; status == PSOUP_OK && part;) {
        const char *comma = strchr(part, ',');
        size_t length = comma ? (size_t)(comma - part) : strlen(part);
        status = parse_part(model, part, length < 1000 ? length : 1000, weights, seen, &sum, error);
        part = comma ? comma + 1 : NULL;
    }
    psoup__free(model->context, seen);
    if (status == PSOUP_OK && !any_sum && !(fabs(sum - 1) <= 1e-6))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "mix: the weights sum to %.9g; expected 1", sum);
    return status;
}

static const char *const method_names[] = {"delta", "factors", "logits"};
enum { METHODS = sizeof method_names / sizeof *method_names };

/* Where the adapter's pair has another rank or scale than `first` has; −1: nowhere. One that leaves a linear alone is
 * left out of it, as the merger's `factors` leaves it. */
static int32_t unlike(const psoup_model *model, const psoup__adapter *first, const psoup__adapter *adapter) {
    for (int32_t i = 0; i < model->config.num_hidden_layers * PSOUP__LINEARS; i++) {
        const psoup__lora *a = &first->lora[i], *b = &adapter->lora[i];
        if (a->rank > 0 && b->rank > 0 && (a->rank != b->rank || a->scale != b->scale))
            return i;
    }
    return -1;
}

int32_t psoup__mix_views(const psoup_model *model, const float *mix, psoup__view *out) {
    double left = 1;
    int32_t n = 0;
    for (int32_t i = 0; mix && i < model->n_adapters; i++) {
        left -= (double)mix[i];
        if (mix[i] != 0 && out)
            out[n] = (psoup__view){i, mix[i]};
        n += mix[i] != 0;
    }
    if (fabs(left) > 1e-6 && out)
        out[n] = (psoup__view){-1, (float)left};
    return n + (fabs(left) > 1e-6);
}

psoup_status psoup__mix_check(const psoup_model *model, const float *mix, int32_t method, const char *what,
                              psoup_error *error) {
    if (method < 0 || method >= METHODS)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: mix method %d; expected 0 (delta), 1 (factors) or 2 (logits)", what, (int)method);
    for (int32_t i = 0; mix && i < model->n_adapters; i++)
        if (!isfinite(mix[i]))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: the weight of adapter \"%s\" is %g", what,
                               model->adapters[i]->name, (double)mix[i]);
    int32_t views = method == PSOUP_MIX_LOGITS ? psoup__mix_views(model, mix, NULL) : 1;
    if (views > PSOUP__MOST_VIEWS)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: method logits: it mixes %d policies; expected at most %d", what, (int)views,
                           PSOUP__MOST_VIEWS);
    for (int32_t i = 0; mix && method == PSOUP_MIX_FACTORS && i < model->n_adapters; i++)
        for (int32_t j = 0; mix[i] != 0 && j < i; j++) {
            const psoup__adapter *a = model->adapters[j], *b = model->adapters[i];
            int32_t pair = mix[j] != 0 ? unlike(model, a, b) : -1;
            if (pair >= 0)
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                   "%s: method factors: in layer %d, %s, adapter \"%s\" has rank %d and scale %g, "
                                   "\"%s\" rank %d and scale %g; expected equal ones",
                                   what, (int)pair / PSOUP__LINEARS, psoup__linear_names[pair % PSOUP__LINEARS],
                                   a->name, (int)a->lora[pair].rank, (double)a->lora[pair].scale, b->name,
                                   (int)b->lora[pair].rank, (double)b->lora[pair].scale);
        }
    return PSOUP_OK;
}

const char *psoup_mix_method_name(int32_t method) {
    return method >= 0 && method < METHODS ? method_names[method] : "?";
}

psoup_status psoup_mix_method_parse(const char *name, int32_t *out, psoup_error *error) {
    if (!name || !out)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_mix_method_parse: an argument is NULL");
    for (int32_t i = 0; i < METHODS; i++)
        if (strcmp(name, method_names[i]) == 0) {
            *out = i;
            return PSOUP_OK;
        }
    return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "mix method \"%.64s\"; expected delta, factors or logits", name);
}
