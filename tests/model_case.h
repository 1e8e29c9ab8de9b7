/* What the tests of the model room share. */
#ifndef MODEL_CASE_H
#define MODEL_CASE_H

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model/model.h"

#define GOLDEN "tests/golden/model/"
#define OK(call) ck_assert_msg((call) == PSOUP_OK, "%s: %s", #call, error.message)

static psoup_error error;

static inline psoup_context *make_context(int threads) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.threads = threads;
    psoup_context *context = NULL;
    OK(psoup_context_create(&options, &context, &error));
    return context;
}

static inline psoup_model *load_plain(psoup_context *context, bool adapters) {
    psoup_model *model = NULL;
    OK(psoup_model_load(context, GOLDEN "plain", &model, &error));
    if (adapters) {
        OK(psoup_model_load_adapter(model, "all", GOLDEN "adapter_all", &error));
        OK(psoup_model_load_adapter(model, "qv", GOLDEN "adapter_qv", &error));
    }
    return model;
}

static inline char *temporary_directory(void) {
    static char path[64];
    strcpy(path, P_tmpdir "/psoup-test-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(path));
    return path;
}

static inline void remove_directory(const char *path) {
    char command[256];
    snprintf(command, sizeof command, "rm -rf '%s'", path);
    ck_assert_int_eq(system(command), 0);
}

static inline void copy_file(const char *from, const char *to) {
    char command[512];
    snprintf(command, sizeof command, "cp '%s' '%s'", from, to);
    ck_assert_int_eq(system(command), 0);
}

static inline double distance(const float *a, const float *b, size_t n) {
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - b[i]);
        if (!(d <= worst))
            worst = d; /* NaN too */
    }
    return worst;
}

/* ‖a − b‖ / ‖b‖ */
static inline double relative(const float *a, const float *b, size_t n) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        size += (double)b[i] * b[i];
    }
    return size > 0 ? sqrt(difference / size) : sqrt(difference);
}

/* Rows of random tokens. */
typedef struct sample_rows {
    int32_t tokens[256];
    psoup_row row[6];
    size_t n, total;
} sample_rows;

static inline void fill_rows(sample_rows *rows, size_t n, uint64_t seed) {
    static const size_t lengths[6] = {7, 19, 1, 33, 12, 5};
    psoup__random random = {.seed = seed};
    *rows = (sample_rows){.n = n};
    for (size_t i = 0; i < n; i++) {
        rows->row[i] = (psoup_row){.tokens = rows->tokens + rows->total, .n = lengths[i]};
        for (size_t t = 0; t < lengths[i]; t++)
            rows->tokens[rows->total++] = 3 + (int32_t)psoup__random_below(&random, 77);
    }
}

enum { VOCAB = 80 };

#endif
