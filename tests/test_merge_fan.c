/* fan_in_fan_out: adapters of a model whose linears keep their weights as [in, out], beside what PEFT folds
 * them to (tests/golden/fan.py). */
#include "merge_case.h"

#define FAN "tests/golden/fan/"

/* Weights of a directory beside PEFT's; all others beside the base's. */
static void compare(const char *directory, double tolerance) {
    psoup__weights *ours, *folded, *base;
    ck_ok(psoup__weights_map(context, directory, "model", &ours, &error));
    ck_ok(psoup__weights_map(context, FAN "folded.safetensors", "model", &folded, &error));
    ck_ok(psoup__weights_map(context, FAN "base", "model", &base, &error));
    size_t changed = 0;
    ck_assert_uint_eq(psoup__weights_count(ours), psoup__weights_count(base));
    for (size_t i = 0; i < psoup__weights_count(base); i++) {
        const char *name = psoup__weights_name(base, i);
        const psoup__tensor *was = psoup__weights_tensor(base, i), *is = psoup__weights_find(ours, name);
        const psoup__tensor *want = psoup__weights_find(folded, name);
        ck_assert_msg(is != NULL && is->bytes == was->bytes, "%s", name);
        changed += want != NULL;
        want = want != NULL ? want : was;
        size_t n = 0;
        psoup__tensor_elements(want, &n);
        for (size_t k = 0; k < n; k++)
            ck_assert_msg(fabs(as_double(is, k) - as_double(want, k)) <= tolerance, "%s: element %zu", name, k);
    }
    ck_assert_uint_eq(changed, psoup__weights_count(folded));
    ck_assert_uint_eq(changed, 3); /* c_attn and two c_proj */
    psoup__weights_free(ours);
    psoup__weights_free(folded);
    psoup__weights_free(base);
}

START_TEST(folded_as_peft_folds_them) {
    recipe r = {.sources = {FAN "a", FAN "b"}, .weights = {0.3, 0.7}, .base = FAN "base", .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("folded"), NULL));
    compare(in_scratch("folded"), 1e-6);
    r.method = PSOUP_MERGE_SVD; /* of rank 5, which is all there is */
    r.svd_rank = 5;
    ck_ok(run_recipe(context, &r, in_scratch("svd"), NULL));
    compare(in_scratch("svd"), 1e-5);
    r = (recipe){.sources = {FAN "a", FAN "b"}, .weights = {0.3, 0.7}, .base = FAN "base", .dtype = -1,
                 .method = PSOUP_MERGE_TASK_ARITHMETIC};
    ck_ok(run_recipe(context, &r, in_scratch("task"), NULL));
    compare(in_scratch("task"), 1e-6);
}
END_TEST

/* One adapter of the two, which is folded as they are. */
START_TEST(merged_they_stay_across) {
    recipe r = {.sources = {FAN "a", FAN "b"}, .weights = {0.3, 0.7}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("soup"), NULL));
    psoup__peft *soup;
    ck_ok(psoup__peft_open(context, in_scratch("soup"), &soup, &error));
    ck_assert_uint_eq(soup->n, 3);
    for (size_t i = 0; i < soup->n; i++)
        ck_assert(soup->pairs[i].transposed && soup->pairs[i].rank == 5);
    psoup__peft_free(soup);
    char path[600];
    snprintf(path, sizeof path, "%s", in_scratch("soup"));
    r = (recipe){.sources = {path}, .weights = {1}, .base = FAN "base", .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("refolded"), NULL));
    compare(in_scratch("refolded"), 1e-6);
}
END_TEST

START_TEST(one_way_round_or_the_other) {
    char other[600], file[700];
    psoup_json *config, *changed;
    snprintf(other, sizeof other, "%s", in_scratch("other"));
    recipe r = {.sources = {FAN "b"}, .weights = {1}, .dtype = -1};
    ck_ok(run_recipe(context, &r, other, NULL));
    snprintf(file, sizeof file, "%s/adapter_config.json", other);
    ck_ok(psoup_json_read(context, file, &config, &error));
    changed = psoup_json_copy(config);
    psoup_json_set(changed, "fan_in_fan_out", psoup_json_new_bool(0));
    ck_ok(psoup_json_write(context, file, changed, &error));
    psoup_json_free(config);
    psoup_json_free(changed);
    r = (recipe){.sources = {FAN "a", other}, .weights = {0.5, 0.5}, .dtype = -1};
    ck_assert_int_eq(run_recipe(context, &r, in_scratch("mixed"), NULL), PSOUP_ERROR_ARGUMENT);
    ck_assert_msg(strstr(error.message, "fan_in_fan_out is false") != NULL, "%s", error.message);
    const char *const two[] = {FAN "a", other};
    psoup_json *inspection;
    ck_assert_int_eq(psoup_merge_inspect(context, two, 2, NULL, &inspection, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_msg(strstr(error.message, "fan_in_fan_out") != NULL, "%s", error.message);
    r = (recipe){.sources = {other}, .weights = {1}, .base = FAN "base", .dtype = -1};
    ck_assert_int_eq(run_recipe(context, &r, in_scratch("misfit"), NULL), PSOUP_ERROR_ARGUMENT);
    ck_assert_msg(strstr(error.message, "another shape") != NULL, "%s", error.message);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("fan_in_fan_out");
    TCase *tests = tcase_create("fan_in_fan_out");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_add_test(tests, folded_as_peft_folds_them);
    tcase_add_test(tests, merged_they_stay_across);
    tcase_add_test(tests, one_way_round_or_the_other);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
