/* A mix as text: "P1A=0.5,P2B=0.5". */
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
