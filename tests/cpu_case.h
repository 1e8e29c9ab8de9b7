/* What the tests of src/cpu share: a backend per instruction set and thread count, random inputs,
 * poisoned outputs, and comparison with float64. */
#ifndef TESTS_CPU_CASE_H
#define TESTS_CPU_CASE_H

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"

static const char *const case_isas[] = {"generic", "avx2", "avx512"};
enum { CASE_ISAS = 3 };

typedef struct machine {
    psoup_context *context;
    psoup__backend *be;
    const psoup__ops *ops;
} machine;

/* False where this machine lacks the instruction set. */
static inline int machine_open(machine *m, int isa, int threads) {
    psoup_error error;
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.isa = case_isas[isa];
    options.threads = threads;
    if (psoup_context_create(&options, &m->context, &error) != PSOUP_OK) {
        ck_assert_msg(isa > 0, "%s", error.message);
        return 0;
    }
    ck_assert_msg(psoup__cpu_create(m->context, &m->be, &error) == PSOUP_OK, "%s", error.message);
    m->ops = m->be->ops;
    ck_assert_str_eq(m->ops->name, "cpu");
    return 1;
}

static inline void machine_close(machine *m) {
    m->ops->free(m->be);
    psoup_context_free(m->context);
}

static inline float *poisoned(size_t n) {
    float *x = malloc((n + 1) * sizeof *x);
    ck_assert_ptr_nonnull(x);
    for (size_t i = 0; i <= n; i++)
        x[i] = NAN;
    return x;
}

static inline float *normal(size_t n, uint64_t seed) {
    float *x = poisoned(n);
    psoup__random random = {.seed = seed, .sequence = 77};
    for (size_t i = 0; i < n; i++)
        x[i] = psoup__random_normal(&random);
    return x;
}

static inline float *copy_of(const float *x, size_t n) {
    float *copy = poisoned(n);
    memcpy(copy, x, n * sizeof *x);
    return copy;
}

static inline double *doubles(size_t n) {
    double *x = calloc(n + 1, sizeof *x);
    ck_assert_ptr_nonnull(x);
    return x;
}

/* |got − want| <= tolerance · (1 + max |want|) everywhere, and the sentinel after the end untouched. */
static inline void near(const char *what, const float *got, const double *want, size_t n,
                        double tolerance) {
    double most = 1;
    for (size_t i = 0; i < n; i++)
        most = fmax(most, fabs(want[i]));
    for (size_t i = 0; i < n; i++)
        if (!(fabs(got[i] - want[i]) <= tolerance * most)) /* a ck_assert each would cost minutes */
            ck_abort_msg("%s[%zu] = %.9g, want %.9g", what, i, (double)got[i], want[i]);
    ck_assert_msg(isnan(got[n]), "%s: written past its end", what);
}

static inline void same_bits(const char *what, const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (memcmp(a + i, b + i, sizeof *a) != 0)
            ck_abort_msg("%s[%zu]: %.9g and %.9g", what, i, (double)a[i], (double)b[i]);
}

static inline int run_suite(Suite *suite) {
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}

#endif
