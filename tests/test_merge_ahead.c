/* What methods ask of whole tensors before they make blocks: the same bits whether the tensors are in memory or given
 * piece by piece, and then in few large pieces. */
#include "merge_case.h"

enum { ROWS = 190, COLUMNS = 701, SOURCES = 3, TENSORS = 3 };
static const int64_t shapes[TENSORS][2] = {{ROWS, COLUMNS}, {1, COLUMNS}, {3000, 1}};
static const char *const names[TENSORS] = {"matrix", "row", "column"};
static psoup_named_tensor tensors[SOURCES][TENSORS];
static size_t calls, given; /* reads, and their bytes, of pieces that are no whole tensor */

static const struct {
    const char *method;
    const char *switched; /* a parameter that is 1, or NULL */
} cases[] = {{"ties", NULL}, {"della", NULL}, {"della_linear", NULL}, {"dare_ties", NULL}, {"breadcrumbs", NULL},
             {"magnitude_prune", "rescale"}, {"slerp", NULL}, {"nuslerp", NULL}, {"nuslerp", "nuslerp_row_wise"},
             {"model_stock", NULL}, {"model_stock", "filter_wise"}};
static const psoup_dtype dtypes[] = {PSOUP_F32, PSOUP_BF16, PSOUP_F16, PSOUP_F8_E4M3};
enum { CASES = sizeof cases / sizeof *cases, DTYPES = sizeof dtypes / sizeof *dtypes };

static void make(psoup_dtype dtype) {
    for (int s = 0; s < SOURCES; s++)
        for (int t = 0; t < TENSORS; t++) {
            const size_t n = (size_t)(shapes[t][0] * shapes[t][1]);
            float *x = malloc(n * sizeof *x);
            for (size_t i = 0; i < n; i++) /* every seventh equal, to be told apart by its place */
                x[i] = i % 7 == 0 ? 0.5f : (float)(int32_t)((uint32_t)(i + 977 * (size_t)(s * TENSORS + t)) * 2654435761u) * 0x1p-30f;
            void *data = malloc(n * psoup_dtype_size(dtype));
            psoup__from_f32(context, data, dtype, x, n);
            tensors[s][t] = (psoup_named_tensor){names[t], dtype, 2, shapes[t], data};
            free(x);
        }
}

static int give(void *user, size_t index, uint64_t offset, size_t bytes, void *out) {
    const psoup_named_tensor *t = &((const psoup_named_tensor *)user)[index];
    memcpy(out, (const char *)t->data + offset, bytes);
    if (index == 0) {
        __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
        __atomic_add_fetch(&given, bytes, __ATOMIC_RELAXED);
    }
    return 0;
}

static int collect(void *user, uint64_t offset, const void *data, size_t bytes) {
    psoup__buffer_append(user, data, bytes);
    return 0;
}

static psoup__buffer merged(int which, bool pulled) {
    psoup_merger *merger;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    psoup_merge_sink sink = PSOUP_MERGE_SINK_INIT;
    psoup__buffer out = {.context = context};
    const double one = 1;
    ck_ok(psoup_merge_method_parse(cases[which].method, &options.method, &error));
    options.density = 0.4;
    options.gamma = 0.1;
    options.t = 0.3;
    ck_ok(psoup_merger_create(context, &options, &merger, &error));
    if (cases[which].switched != NULL)
        ck_ok(psoup_merger_set_parameter(merger, -1, cases[which].switched, NULL, &one, 1, &error));
    if (strstr(cases[which].switched != NULL ? cases[which].switched : "", "nuslerp") != NULL) {
        const double off = 0;
        ck_ok(psoup_merger_set_parameter(merger, -1, "nuslerp_flatten", NULL, &off, 1, &error));
    }
    for (int s = 0; s < (options.method == PSOUP_MERGE_SLERP ? 2 : SOURCES); s++) {
        psoup_merge_tensors from = PSOUP_MERGE_TENSORS_INIT;
        psoup_named_tensor there[TENSORS];
        memcpy(there, tensors[s], sizeof there);
        for (int t = 0; pulled && t < TENSORS; t++)
            there[t].data = NULL;
        from.tensors = there;
        from.n = TENSORS;
        from.read = give;
        from.user = tensors[s];
        if (s == 0)
            ck_ok(psoup_merger_set_base_tensors(merger, &from, &error));
        else
            ck_ok(psoup_merger_add_tensors(merger, &from, 0.3 * s, &error));
    }
    sink.user = &out;
    sink.write = collect;
    calls = given = 0;
    ck_assert_msg(psoup_merger_run(merger, &sink, &error) == PSOUP_OK, "%s: %s", cases[which].method, error.message);
    psoup_merger_free(merger);
    ck_assert(!out.failed && out.length > 0);
    return out;
}

START_TEST(given_or_there_the_bits_are_the_same) {
    make(dtypes[_i % DTYPES]);
    psoup__buffer there = merged(_i / DTYPES, false), given_out = merged(_i / DTYPES, true);
    ck_assert_uint_eq(there.length, given_out.length);
    ck_assert_msg(memcmp(there.data, given_out.data, there.length) == 0, "%s of %s", cases[_i / DTYPES].method,
                  psoup_dtype_name(dtypes[_i % DTYPES]));
    /* those by columns go row by row */
    const bool by_columns = cases[_i / DTYPES].switched != NULL && strstr(cases[_i / DTYPES].switched, "row_wise") != NULL;
    if (!by_columns)
        ck_assert_msg(given / calls >= (16 << 10), "%s: %zu bytes in %zu reads", cases[_i / DTYPES].method, given, calls);
    psoup__buffer_free(&there);
    psoup__buffer_free(&given_out);
    for (int s = 0; s < SOURCES; s++)
        for (int t = 0; t < TENSORS; t++)
            free((void *)tensors[s][t].data);
}
END_TEST

/* An input of weight 0 is not asked for, though the others are read ahead. */
static int refuse(void *user, size_t index, uint64_t offset, size_t bytes, void *out) {
    (void)user, (void)index, (void)offset, (void)bytes, (void)out;
    return 1;
}

START_TEST(what_does_not_count_is_not_read) {
    psoup_merger *merger;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    psoup_merge_sink sink = PSOUP_MERGE_SINK_INIT;
    psoup__buffer out = {.context = context};
    make(PSOUP_BF16);
    options.method = PSOUP_MERGE_TIES;
    options.density = 0.5;
    ck_ok(psoup_merger_create(context, &options, &merger, &error));
    for (int s = 0; s < SOURCES; s++) {
        psoup_merge_tensors from = PSOUP_MERGE_TENSORS_INIT;
        psoup_named_tensor there[TENSORS];
        memcpy(there, tensors[s], sizeof there);
        for (int t = 0; t < TENSORS; t++)
            there[t].data = NULL;
        from.tensors = there;
        from.n = TENSORS;
        from.read = s == 2 ? refuse : give;
        from.user = tensors[s];
        if (s == 0)
            ck_ok(psoup_merger_set_base_tensors(merger, &from, &error));
        else
            ck_ok(psoup_merger_add_tensors(merger, &from, s == 2 ? 0 : 1, &error));
    }
    sink.user = &out;
    sink.write = collect;
    ck_ok(psoup_merger_run(merger, &sink, &error));
    const double both[2] = {0.5, 0.5};
    ck_ok(psoup_merger_set_weights(merger, both, 2, &error));
    ck_assert_int_eq(psoup_merger_run(merger, &sink, &error), PSOUP_ERROR_IO);
    ck_assert_msg(strstr(error.message, "could not give") != NULL, "%s", error.message);
    psoup_merger_free(merger);
    psoup__buffer_free(&out);
    for (int s = 0; s < SOURCES; s++)
        for (int t = 0; t < TENSORS; t++)
            free((void *)tensors[s][t].data);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("merge: reading ahead");
    TCase *tests = tcase_create("ahead");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, given_or_there_the_bits_are_the_same, 0, CASES * DTYPES);
    tcase_add_test(tests, what_does_not_count_is_not_read);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
