/* What the tests of tokenizers share. */
#ifndef TEXT_CASE_H
#define TEXT_CASE_H

#include <check.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "text/text.h"

#define GOLDEN "tests/golden/text/"

static psoup_context *context;

static inline void setup(void) {
    psoup_error error = {0};
    ck_assert_msg(psoup_context_create(NULL, &context, &error) == PSOUP_OK, "%s", error.message);
}

static inline void teardown(void) {
    psoup_context_free(context);
}

static inline psoup_tokenizer *load(const char *name) {
    char path[256];
    psoup_error error = {0};
    psoup_tokenizer *tokenizer;
    snprintf(path, sizeof path, GOLDEN "%s.json", name);
    ck_assert_msg(psoup_tokenizer_load(context, path, &tokenizer, &error) == PSOUP_OK, "%s",
                  error.message);
    return tokenizer;
}

static inline psoup_tokenizer *parse(const char *json, psoup_error *error) {
    psoup_tokenizer *tokenizer;
    psoup__tokenizer_parse(context, json, strlen(json), "test.json", &tokenizer, error);
    return tokenizer;
}

static inline size_t unhex(const char *hex, char **out) {
    size_t n = strlen(hex) / 2;
    *out = malloc(n + 1);
    for (size_t i = 0; i < n; i++) {
        unsigned byte;
        sscanf(hex + 2 * i, "%2x", &byte);
        (*out)[i] = (char)byte;
    }
    (*out)[n] = '\0';
    return n;
}

static inline int run_suite(Suite *suite) {
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}

#endif
