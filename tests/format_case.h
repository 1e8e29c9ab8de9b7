/* What the tests of files share: counted memory and a directory of their own. With PSOUP_TEST_KEEP=DIR the
 * files written stay in DIR, for format.py --check DIR. */
#ifndef FORMAT_CASE_H
#define FORMAT_CASE_H

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "format/format.h"

#define GOLDEN "tests/golden/format/"

static psoup_context *context;
static psoup_error error;
static char scratch[512];

/* ---- memory that is counted and can be made to fail ----------------------------------------- */

static int allocations, fail_at = -1, live;

static inline void *counted_alloc(void *user, size_t bytes, size_t alignment) {
    (void)user;
    if (fail_at >= 0 && allocations++ >= fail_at)
        return NULL;
    void *memory = NULL;
    if (posix_memalign(&memory, alignment < sizeof(void *) ? sizeof(void *) : alignment,
                       bytes > 0 ? bytes : 1) != 0)
        return NULL;
    live++;
    return memory;
}

static inline void counted_free(void *user, void *memory) {
    (void)user;
    if (memory != NULL)
        live--;
    free(memory);
}

static inline void set_up(void) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.threads = 1;
    options.allocator = (psoup_allocator){NULL, counted_alloc, counted_free};
    ck_assert_int_eq(psoup_context_create(&options, &context, &error), PSOUP_OK);
    const char *keep = getenv("PSOUP_TEST_KEEP"), *parent = getenv("TMPDIR");
    if (keep != NULL)
        snprintf(scratch, sizeof scratch, "%s", keep);
    else
        snprintf(scratch, sizeof scratch, "%s/psoup-format-XXXXXX", parent != NULL ? parent : P_tmpdir);
    if (keep == NULL)
        ck_assert_ptr_nonnull(mkdtemp(scratch));
    else
        ck_assert_int_eq(psoup__make_directories(scratch, &error), PSOUP_OK);
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

static inline void write_file(const char *name, const void *data, size_t length) {
    FILE *file = fopen(in_scratch(name), "wb");
    ck_assert_ptr_nonnull(file);
    ck_assert_uint_eq(fwrite(data, 1, length, file), length);
    fclose(file);
}

static inline void make_directory(const char *name) {
    ck_assert_int_eq(psoup__make_directories(in_scratch(name), &error), PSOUP_OK);
}

#define ck_ok(call) ck_assert_msg((call) == PSOUP_OK, "%s", error.message)

static inline int run_suite(Suite *suite) {
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}

#endif
