/* What a merge must not get wrong at its edges: adapters that lack a module, that weigh nothing, that come with
 * a head; what was said before and is other now. */
#include <unistd.h>

#include "merge_case.h"

/* The same method, folded into the base at once and through one adapter of full rank. */
START_TEST(an_absent_module_is_a_change_of_zero) {
    static const int32_t methods[] = {PSOUP_MERGE_LINEAR, PSOUP_MERGE_TASK_ARITHMETIC, PSOUP_MERGE_DARE_LINEAR};
    psoup_merger *merger;
    for (int way = 0; way < 2; way++) {
        psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
        options.method = methods[_i];
        options.density = methods[_i] == PSOUP_MERGE_DARE_LINEAR ? 0.5 : 1;
        options.normalize = 1;
        options.svd_rank = way ? 16 : 0;
        ck_ok(psoup_merger_create(context, &options, &merger, &error));
        if (!way)
            ck_ok(psoup_merger_set_base(merger, BASE, &error));
        ck_ok(psoup_merger_add(merger, A, 1, &error));
        ck_ok(psoup_merger_add(merger, C, 1, &error)); /* q_proj and down_proj; a has q_proj and v_proj */
        ck_ok(psoup_merger_write(merger, in_scratch(way ? "adapter" : "at-once"), &error));
        psoup_merger_free(merger);
    }
    char adapter[600];
    snprintf(adapter, sizeof adapter, "%s", in_scratch("adapter"));
    recipe r = {.sources = {adapter}, .weights = {1}, .base = BASE, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("folded"), NULL));
    compare_weights(in_scratch("folded"), in_scratch("at-once"), 1e-4, 1);
}
END_TEST

/* A copy of an adapter with a NaN in it, or with another alpha. */
static void spoil(const char *from, const char *to, double alpha) {
    char command[2048], path[700];
    psoup_json *config, *changed;
    snprintf(command, sizeof command, "rm -rf '%s' && cp -r '%s' '%s'", to, from, to);
    ck_assert_int_eq(system(command), 0);
    if (alpha == 0) {
        snprintf(path, sizeof path, "%s/adapter_model.safetensors", to);
        FILE *file = fopen(path, "r+b");
        const unsigned char nan[4] = {0, 0, 0xc0, 0x7f};
        ck_assert(file != NULL && fseek(file, -4, SEEK_END) == 0 && fwrite(nan, 1, 4, file) == 4);
        fclose(file);
        return;
    }
    snprintf(path, sizeof path, "%s/adapter_config.json", to);
    ck_ok(psoup_json_read(context, path, &config, &error));
    changed = psoup_json_copy(config);
    psoup_json_set(changed, "lora_alpha", psoup_json_new_real(alpha));
    ck_ok(psoup_json_write(context, path, changed, &error));
    psoup_json_free(config);
    psoup_json_free(changed);
}

START_TEST(what_weighs_nothing_is_not_read) {
    char bad[600];
    snprintf(bad, sizeof bad, "%s", in_scratch("nan"));
    spoil(B, bad, 0);
    recipe alone = {.sources = {A}, .weights = {1}, .base = BASE, .dtype = -1, .method = PSOUP_MERGE_TIES};
    recipe both = {.sources = {A, bad}, .weights = {1, 0}, .base = BASE, .dtype = -1, .method = PSOUP_MERGE_TIES};
    ck_ok(run_recipe(context, &alone, in_scratch("alone"), NULL));
    ck_ok(run_recipe(context, &both, in_scratch("both"), NULL));
    compare_weights(in_scratch("both"), in_scratch("alone"), 0, 1);
    both.base = NULL;
    both.svd_rank = 4;
    ck_ok(run_recipe(context, &both, in_scratch("rank-4"), NULL));
    both.weights[1] = 0.5;
    ck_assert_int_eq(run_recipe(context, &both, in_scratch("weighs"), NULL), PSOUP_ERROR_FORMAT);
    ck_assert_ptr_nonnull(strstr(error.message, "NaN"));
}
END_TEST

START_TEST(a_base_is_no_base_with_an_adapter) {
    char name[600];
    snprintf(name, sizeof name, "%s+%s", BASE, A);
    recipe r = {.sources = {B}, .weights = {1}, .base = name, .dtype = -1};
    ck_assert_int_eq(run_recipe(context, &r, in_scratch("x"), NULL), PSOUP_ERROR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(error.message, "fold it in first"));
}
END_TEST

static int stop_after_some(void *user, const char *label, int64_t done, int64_t total) {
    (void)user, (void)label;
    return done > total / 2;
}

/* Shards of a run that was stopped, and an adapter whose config is another since. */
START_TEST(resuming_sees_a_changed_scale) {
    char adapter[600];
    snprintf(adapter, sizeof adapter, "%s", in_scratch("adapter"));
    for (int changed = 0; changed < 2; changed++) {
        psoup_merger *merger;
        psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
        spoil(A, adapter, changed ? 80 : 8);
        options.resume = 1;
        options.shard_size = 4096;
        options.progress = changed ? NULL : stop_after_some;
        ck_ok(psoup_merger_create(context, &options, &merger, &error));
        ck_ok(psoup_merger_set_base(merger, BASE, &error));
        ck_ok(psoup_merger_add(merger, adapter, 1, &error));
        psoup_status status = psoup_merger_write(merger, in_scratch("resumed"), &error);
        ck_assert_int_eq(status, changed ? PSOUP_OK : PSOUP_ERROR_CANCELLED);
        psoup_merger_free(merger);
    }
    recipe r = {.sources = {adapter}, .weights = {1}, .base = BASE, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("fresh"), NULL));
    compare_weights(in_scratch("resumed"), in_scratch("fresh"), 0, 1);
}
END_TEST

static int fails_once(void *user, size_t index, uint64_t offset, size_t bytes, void *out) {
    static const float values[4] = {1, 2, 3, 4};
    int *calls = user;
    (void)index;
    if ((*calls)++ == 0)
        return 1;
    memcpy(out, (const char *)values + offset, bytes);
    return 0;
}

static int take(void *user, uint64_t offset, const void *data, size_t bytes) {
    memcpy((char *)user + offset, data, bytes);
    return 0;
}

START_TEST(what_failed_once_may_be_there_now) {
    const int64_t shape[1] = {4};
    const psoup_named_tensor tensor = {.name = "w", .dtype = PSOUP_F32, .rank = 1, .shape = shape};
    int calls = 0;
    float out[4] = {0};
    psoup_merger *merger;
    psoup_merge_tensors source = PSOUP_MERGE_TENSORS_INIT;
    psoup_merge_sink sink = PSOUP_MERGE_SINK_INIT;
    source.tensors = &tensor;
    source.n = 1;
    source.read = fails_once;
    source.user = &calls;
    sink.user = out;
    sink.write = take;
    ck_ok(psoup_merger_create(context, NULL, &merger, &error));
    ck_ok(psoup_merger_add_tensors(merger, &source, 1, &error));
    ck_assert_int_ne(psoup_merger_run(merger, &sink, &error), PSOUP_OK);
    ck_ok(psoup_merger_run(merger, &sink, &error));
    ck_assert(out[0] == 1 && out[3] == 4);
    source.name = "mod\351le";
    ck_assert_int_eq(psoup_merger_add_tensors(merger, &source, 1, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "no UTF-8"));
    const double seven = 7;
    ck_assert_int_eq(psoup_merger_set_parameter(merger, -1, "vote", NULL, &seven, 1, &error),
                     PSOUP_ERROR_ARGUMENT);
    psoup_merger_free(merger);
}
END_TEST

/* What follows the header of DIRECTORY/FILE.safetensors. */
static char *numbers_in(const char *directory, const char *name, size_t *n) {
    char path[1200];
    uint64_t header;
    snprintf(path, sizeof path, "%s/%s.safetensors", directory, name);
    FILE *file = fopen(path, "rb");
    ck_assert_msg(file != NULL && fread(&header, 8, 1, file) == 1, "%s", path);
    ck_assert(fseek(file, 0, SEEK_END) == 0);
    *n = (size_t)ftell(file) - 8 - (size_t)header;
    char *out = malloc(*n);
    ck_assert(fseek(file, (long)(8 + header), SEEK_SET) == 0 && fread(out, 1, *n, file) == *n);
    fclose(file);
    return out;
}

/* A strength is weights that sum to something else, by name: in one adapter and folded into a base; its certificate
 * makes it again. */
START_TEST(a_strength_multiplies_the_weights) {
    static const int32_t methods[] = {PSOUP_MERGE_DELTA, PSOUP_MERGE_FACTORS, PSOUP_MERGE_SVD, PSOUP_MERGE_DELTA};
    const char *const names[] = {"plain", "strong"};
    char result[700];
    psoup_merger *merger;
    for (int way = 0; way < 2; way++) {
        psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
        options.method = methods[_i];
        options.svd_rank = methods[_i] == PSOUP_MERGE_SVD ? 8 : 0;
        options.any_sum = !way;
        options.strength = way ? 1.5 : 1;
        ck_ok(psoup_merger_create(context, &options, &merger, &error));
        if (_i == 3)
            ck_ok(psoup_merger_set_base(merger, BASE, &error));
        ck_ok(psoup_merger_add(merger, A, way ? 0.25 : 0.375, &error));
        ck_ok(psoup_merger_add(merger, B, way ? 0.75 : 1.125, &error));
        ck_ok(psoup_merger_write(merger, in_scratch(names[way]), &error));
        psoup_merger_free(merger);
    }
    snprintf(result, sizeof result, "%s/psoup-merge.json", in_scratch("strong"));
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    ck_ok(psoup_merger_create(context, &options, &merger, &error));
    ck_ok(psoup_merger_load_certificate(merger, result, &error));
    ck_ok(psoup_merger_write(merger, in_scratch("again"), &error));
    psoup_merger_free(merger);
    const char *const made[] = {"strong", "again"}, *file = _i == 3 ? "model" : "adapter_model";
    size_t n, m;
    char *expected = numbers_in(in_scratch("plain"), file, &n);
    for (int i = 0; i < 2; i++) {
        char *got = numbers_in(in_scratch(made[i]), file, &m);
        ck_assert_msg(n == m && memcmp(got, expected, n) == 0, "%s is not as weights that sum to 1.5", made[i]);
        free(got);
    }
    free(expected);
}
END_TEST

START_TEST(a_strength_is_of_adapters) {
    psoup_merger *merger;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    options.strength = 1.5;
    ck_ok(psoup_merger_create(context, &options, &merger, &error));
    ck_ok(psoup_merger_add(merger, BASE, 0.5, &error));
    ck_ok(psoup_merger_add(merger, BASE, 0.5, &error));
    ck_assert_int_eq(psoup_merger_write(merger, in_scratch("none"), &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_msg(strstr(error.message, "a strength of 1.5 is of adapters") != NULL, "%s", error.message);
    psoup_merger_free(merger);
    ck_ok(psoup_merger_create(context, &options, &merger, &error));
    ck_ok(psoup_merger_add(merger, A, 0.5, &error)); /* the sum is that of the weights themselves */
    ck_assert_int_eq(psoup_merger_write(merger, in_scratch("none"), &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_msg(strstr(error.message, "sum to 0.5") != NULL, "%s", error.message);
    psoup_merger_free(merger);
    options.method = PSOUP_MERGE_TIES;
    ck_assert_int_eq(psoup_merger_create(context, &options, &merger, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_msg(strstr(error.message, "strength 1.5 with method ties; expected delta") != NULL, "%s", error.message);
    options.strength = NAN;
    ck_assert_int_eq(psoup_merger_create(context, &options, &merger, &error), PSOUP_ERROR_ARGUMENT);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("merge: corners");
    TCase *tests = tcase_create("merge: corners");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 60);
    tcase_add_loop_test(tests, an_absent_module_is_a_change_of_zero, 0, 3);
    tcase_add_test(tests, what_weighs_nothing_is_not_read);
    tcase_add_test(tests, a_base_is_no_base_with_an_adapter);
    tcase_add_test(tests, resuming_sees_a_changed_scale);
    tcase_add_test(tests, what_failed_once_may_be_there_now);
    tcase_add_loop_test(tests, a_strength_multiplies_the_weights, 0, 4);
    tcase_add_test(tests, a_strength_is_of_adapters);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
