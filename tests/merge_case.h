/* What the tests of the merger share: counted memory, a directory of their own, and recipes of a merge from
 * file to file. With PSOUP_TEST_KEEP=DIR the files written stay in DIR, for merge.py --check DIR. */
#ifndef MERGE_CASE_H
#define MERGE_CASE_H

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "blend/blend.h"
#include "blend/dense.h"
#include "format/format.h"

#define GOLDEN "tests/golden/merge/"
#define ck_ok(call) ck_assert_msg((call) == PSOUP_OK, "%s", error.message)

static psoup_context *context;
static psoup_error error;
static char scratch[512];
static int allocations, fail_at = -1, live;

static inline void *counted_alloc(void *user, size_t bytes, size_t alignment) {
    (void)user;
    if (fail_at >= 0 && allocations++ >= fail_at)
        return NULL;
    void *memory = NULL;
    if (posix_memalign(&memory, alignment < sizeof(void *) ? sizeof(void *) : alignment,
                       bytes > 0 ? bytes : 1) != 0)
        return NULL;
    __atomic_add_fetch(&live, 1, __ATOMIC_RELAXED);
    return memory;
}

static inline void counted_free(void *user, void *memory) {
    (void)user;
    if (memory != NULL)
        __atomic_sub_fetch(&live, 1, __ATOMIC_RELAXED);
    free(memory);
}

static inline psoup_context *new_context(int threads, const char *isa) {
    psoup_context *made;
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.threads = threads;
    options.isa = isa;
    options.allocator = (psoup_allocator){NULL, counted_alloc, counted_free};
    return psoup_context_create(&options, &made, &error) == PSOUP_OK ? made : NULL;
}

static inline void set_up(void) {
    context = new_context(2, NULL);
    ck_assert_ptr_nonnull(context);
    const char *keep = getenv("PSOUP_TEST_KEEP"), *parent = getenv("TMPDIR");
    if (keep != NULL)
        snprintf(scratch, sizeof scratch, "%s", keep);
    else
        snprintf(scratch, sizeof scratch, "%s/psoup-merge-XXXXXX", parent != NULL ? parent : P_tmpdir);
    if (keep == NULL)
        ck_assert_ptr_nonnull(mkdtemp(scratch));
}

static inline void tear_down(void) {
    char command[600];
    psoup_context_free(context);
    ck_assert_int_eq(live, 0);
    snprintf(command, sizeof command, "rm -rf '%s'", scratch);
    if (getenv("PSOUP_TEST_KEEP") == NULL)
        ck_assert_int_eq(system(command), 0);
}

static inline const char *in_scratch(const char *name) {
    static char path[2][1024];
    static int turn;
    snprintf(path[turn ^= 1], sizeof path[0], "%s/%s", scratch, name);
    return path[turn];
}

static uint64_t draws;
static inline float noise(void) {
    psoup__random random = {7, 0, draws++ * 2};
    return psoup__random_normal(&random);
}

static inline float *noises(size_t n) {
    float *x = malloc((n + 1) * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = noise();
    return x;
}

/* ---- from file to file --------------------------------------------------------------------------- */

typedef struct recipe {
    const char *base;
    const char *sources[4];
    double weights[4];
    int32_t method, svd_rank, any_sum, dtype; /* dtype −1: kept */
} recipe;

static inline psoup_status run_recipe(psoup_context *in, const recipe *r, const char *directory,
                               psoup_merge_report *report) {
    psoup_status status;
    psoup_merger *merger = NULL;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    options.method = r->method;
    options.svd_rank = r->svd_rank;
    options.any_sum = r->any_sum;
    options.dtype = r->dtype;
    memset(&error, 0, sizeof error);
    PSOUP__TRY(psoup_merger_create(in, &options, &merger, &error));
    if (r->base != NULL)
        PSOUP__TRY(psoup_merger_set_base(merger, r->base, &error));
    for (int i = 0; i < 4 && r->sources[i] != NULL; i++)
        PSOUP__TRY(psoup_merger_add(merger, r->sources[i], r->weights[i], &error));
    PSOUP__TRY(psoup_merger_write(merger, directory, &error));
    if (report != NULL) {
        report->size = sizeof *report;
        PSOUP__TRY(psoup_merger_report(merger, report, &error));
    }
fail:
    psoup_merger_free(merger);
    return status;
}

static const char *const A = GOLDEN "a", *const B = GOLDEN "b", *const C = GOLDEN "c",
                         *const BASE = GOLDEN "base";

static inline double as_double(const psoup__tensor *tensor, size_t i) {
    float f;
    double d;
    if (tensor->dtype == PSOUP_F64) {
        psoup__tensor_bytes(tensor, 8 * i, 8, &d);
        return d;
    }
    psoup__tensor_read(context, tensor, i, 1, &f);
    return (double)f;
}

static inline void compare_weights(const char *ours, const char *golden, double tolerance, size_t all) {
    psoup__weights *a, *b;
    ck_ok(psoup__weights_map(context, ours, "model", &a, &error));
    ck_ok(psoup__weights_map(context, golden, "model", &b, &error));
    ck_assert(all == 0 || psoup__weights_count(a) == psoup__weights_count(b));
    for (size_t t = 0; t < psoup__weights_count(b); t++) {
        char name[256];
        const psoup__tensor *y = psoup__weights_tensor(b, t);
        snprintf(name, sizeof name, "%s%s", psoup__weights_name(b, t), all ? "" : ".weight");
        const psoup__tensor *x = psoup__weights_find(a, name);
        ck_assert_msg(x != NULL, "%s", name);
        size_t n = y->bytes / psoup_dtype_size(y->dtype);
        ck_assert_uint_eq(x->bytes / psoup_dtype_size(x->dtype), n);
        for (size_t i = 0; i < n; i++)
            ck_assert_msg(fabs(as_double(x, i) - as_double(y, i)) <= tolerance, "%s %zu %g %g", name,
                          i, as_double(x, i), as_double(y, i));
    }
    psoup__weights_free(a);
    psoup__weights_free(b);
}

static inline int run_suite(Suite *suite) {
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}

#endif
