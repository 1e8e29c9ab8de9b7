/* What the tests of the trainers share: golden values, a tiny model, and counters of reports. */
#ifndef TRAIN_CASE_H
#define TRAIN_CASE_H

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "ppo/ppo.h"

static psoup_context *context;
static psoup_error error;

#define OK(call)                                                                                   \
    do {                                                                                           \
        psoup_status got_ = (call);                                                                \
        ck_assert_msg(got_ == PSOUP_OK, "%s: %s: %s", #call, psoup_status_name(got_),              \
                      error.message);                                                              \
    } while (0)

__attribute__((unused)) static void open_context(int threads) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.threads = threads;
    OK(psoup_context_create(&options, &context, &error));
}

__attribute__((unused)) static void set_up(void) { open_context(2); }
__attribute__((unused)) static void tear_down(void) { psoup_context_free(context); }

/* What the context's log was told. */
typedef struct spoken {
    int warnings;
    char last[512];
} spoken;
__attribute__((unused)) static spoken heard;

__attribute__((unused)) static void hear(void *user, psoup_log_level level, const char *line) {
    spoken *t = user;
    t->warnings += level == PSOUP_LOG_WARNING;
    snprintf(t->last, sizeof(t->last), "%s", line);
}

__attribute__((unused)) static void set_up_log(void) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.threads = 2;
    options.log = hear;
    options.log_user = &heard;
    OK(psoup_context_create(&options, &context, &error));
    heard = (spoken){0};
}

#define SAID(words) ck_assert_msg(strstr(heard.last, words) != NULL, "\"%s\" lacks \"%s\"", heard.last, words)

/* A pattern for mkstemp and mkdtemp. */
__attribute__((unused)) static void temporary(char *path, size_t size) {
    const char *place = getenv("TMPDIR");
    snprintf(path, size, "%s/psoup-train-XXXXXX", place ? place : P_tmpdir);
}

/* The loss of one response by the CPU's op, added to terms; d… and what `old` lacks may be NULL. */
__attribute__((unused)) static void lose_one(const psoup__objective *objective, float *dlogprob, float *dvalue,
                                             const float *logprob, const float *value, psoup__old old, size_t n,
                                             double beta, double scale, psoup__loss_terms *terms) {
    psoup__backend *be;
    psoup__loss_terms more;
    const psoup__response response = {.scale = scale, .beta = beta, .tokens = (int32_t)n};
    OK(psoup__cpu_create(context, &be, &error));
    be->ops->policy_loss(be, dlogprob, dvalue, &more, logprob, value, &old, &response, 1, objective);
    psoup__loss_terms_add(terms, &more);
    be->ops->free(be);
}

/* ---- golden values ---------------------------------------------------------------------------- */

__attribute__((unused)) static psoup_json *golden(const char *name) {
    char path[256];
    psoup_json *value = NULL;
    snprintf(path, sizeof(path), "tests/golden/train/%s", name);
    OK(psoup_json_read(context, path, &value, &error));
    return value;
}

__attribute__((unused)) static double real(const psoup_json *object, const char *key) {
    double x = psoup_json_real(psoup_json_get(object, key), NAN);
    ck_assert_msg(!isnan(x), "the golden file has no number %s", key);
    return x;
}

/* A golden array as floats; freed by the caller. */
__attribute__((unused)) static float *floats(const psoup_json *object, const char *key, size_t *n) {
    const psoup_json *array = psoup_json_get(object, key);
    *n = psoup_json_size(array);
    ck_assert_msg(*n > 0, "the golden file has no array %s", key);
    float *out = calloc(*n, sizeof(*out));
    for (size_t i = 0; i < *n; i++)
        out[i] = (float)psoup_json_real(psoup_json_at(array, i), NAN);
    return out;
}

__attribute__((unused)) static void near(double got, double expected, double tolerance,
                                         const char *what, size_t at) {
    double scale = fabs(expected) > 1.0 ? fabs(expected) : 1.0;
    ck_assert_msg(fabs(got - expected) <= tolerance * scale, "%s[%zu] is %.9g: expected %.9g", what,
                  at, got, expected);
}

/* ---- a tiny world ------------------------------------------------------------------------------- */

enum { VOCABULARY = 16, END = 1 };

__attribute__((unused)) static psoup_model *tiny_model(void) {
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_model *model = NULL;
    config.vocab_size = VOCABULARY;
    config.hidden_size = 16;
    config.intermediate_size = 24;
    config.num_hidden_layers = 2;
    config.num_attention_heads = 2;
    config.num_key_value_heads = 1;
    config.max_position_embeddings = 48;
    config.eos_token_id = END;
    config.initializer_range = 0.2f;
    OK(psoup_model_create(context, &config, 7, &model, &error));
    return model;
}

__attribute__((unused)) static void add_adapter(psoup_model *model, const char *name,
                                                uint64_t seed) {
    psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
    options.rank = 4;
    options.alpha = 8.0f;
    options.targets = PSOUP_ALL_LINEAR;
    options.seed = seed;
    OK(psoup_model_add_adapter(model, name, &options, &error));
}

/* A copy of an adapter's weights; freed by the caller. */
__attribute__((unused)) static float *weights(const psoup_model *model, const char *name,
                                              size_t *count) {
    const float *data = NULL;
    OK(psoup_model_adapter_data(model, name, &data, count, &error));
    float *copy = malloc(*count * sizeof(*copy));
    memcpy(copy, data, *count * sizeof(*copy));
    return copy;
}

__attribute__((unused)) static int same_weights(const psoup_model *model, const char *name,
                                                const float *expected, size_t count) {
    size_t n = 0;
    float *got = weights(model, name, &n);
    int same = n == count && memcmp(got, expected, n * sizeof(*got)) == 0;
    free(got);
    return same;
}

/* The value of a report's metric. */
__attribute__((unused)) static double value_of(const psoup_step *step, const char *name) {
    for (size_t i = 0; i < step->n; i++)
        if (strcmp(step->names[i], name) == 0)
            return step->values[i];
    ck_abort_msg("no metric %s", name);
    return NAN;
}

#endif
