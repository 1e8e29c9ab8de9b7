/* mergekit's recipes, against what mergekit makes of them (tests/golden/recipe.py), and recipes that are
 * refused. */
#include "merge_case.h"

#define RECIPES "tests/golden/recipe/"

static const struct {
    const char *name;
    double tolerance;
} golden[] = {{"linear", 1e-7}, {"unnormalized", 0}, {"lora", 1e-7}, {"task", 1e-7}, {"ties", 2e-7},
              {"slerp", 1e-6}, {"passthrough", 0}, {"slices", 2e-7}, {"nuslerp", 1e-6}, {"stock", 1e-6}};

static psoup_status run_file(const char *path, const char *out) {
    psoup_status status;
    psoup_merger *merger = NULL;
    PSOUP__TRY(psoup_merger_create(context, NULL, &merger, &error));
    PSOUP__TRY(psoup_merger_load_recipe(merger, path, &error));
    PSOUP__TRY(psoup_merger_write(merger, out, &error));
fail:
    psoup_merger_free(merger);
    return status;
}

START_TEST(as_mergekit_makes_them) {
    char path[256], expected[256], again[1024];
    size_t tensors;
    snprintf(path, sizeof path, RECIPES "%s.yaml", golden[_i].name);
    snprintf(expected, sizeof expected, RECIPES "%s.safetensors", golden[_i].name);
    ck_ok(run_file(path, in_scratch("out")));
    compare_weights(in_scratch("out"), expected, golden[_i].tolerance, 1);
    ck_ok(psoup_merge_verify(context, in_scratch("out"), &tensors, &error));
    ck_assert_uint_ge(tensors, 21);

    psoup_merger *merger; /* the certificate holds the whole recipe */
    snprintf(again, sizeof again, "%s", in_scratch("out/psoup-merge.json"));
    ck_ok(psoup_merger_create(context, NULL, &merger, &error));
    ck_ok(psoup_merger_load_certificate(merger, again, &error));
    ck_ok(psoup_merger_write(merger, in_scratch("again"), &error));
    psoup_merger_free(merger);
    char command[2200];
    snprintf(command, sizeof command, "diff -r '%s' '%s'", in_scratch("out"), in_scratch("again"));
    ck_assert_int_eq(system(command), 0);
}
END_TEST

START_TEST(layers_of_a_frankenmerge_are_counted) {
    psoup_json *config;
    ck_ok(run_file(RECIPES "passthrough.yaml", in_scratch("out")));
    ck_ok(psoup_json_read(context, in_scratch("out/config.json"), &config, &error));
    ck_assert_int_eq(psoup_json_integer(psoup_json_get(config, "num_hidden_layers"), 0), 4);
    ck_assert_str_eq(psoup_json_string(psoup_json_get(config, "torch_dtype"), ""), "float32");
    psoup_json_free(config);
}
END_TEST

static void refuse(const char *text, const char *says) {
    char path[1024];
    snprintf(path, sizeof path, "%s", in_scratch("bad.yaml"));
    FILE *file = fopen(path, "w");
    ck_assert_ptr_nonnull(file);
    fputs(text, file);
    fclose(file);
    ck_assert_msg(run_file(path, in_scratch("refused")) != PSOUP_OK, "%s", text);
    ck_assert_msg(strstr(error.message, says) != NULL, "%s\n%s", error.message, text);
    ck_assert(!psoup__file_exists(in_scratch("refused")));
    ck_assert(!psoup__file_exists(in_scratch("refused.psoup-partial")));
}

#define MODELS "models: [{model: tests/golden/merge/model11, parameters: {weight: 1}}]\n"
#define LINEAR "merge_method: linear\n"

START_TEST(what_is_lacking_is_refused_by_name_and_line) {
    refuse("", "bad.yaml: is empty");
    refuse("[]", "bad.yaml:1: this: expected names");
    refuse("a: [", "bad.yaml:");
    refuse("a: 1\na: 2\n", "bad.yaml:2: a is there twice");
    refuse("<<: {a: 1}\n", "merge keys");
    refuse("merge_method: !!str linear\n", "tags");
    refuse("a: &x [*x]\n", "alias inside its own anchor");
    refuse("a: *x\n", "no anchor x");
    refuse("a: 1\n---\nb: 1\n", "one document");
    refuse("? [a]\n: 1\n", "expected a name as key");
    refuse(MODELS, "bad.yaml:1: merge_method: is not there");
    refuse(MODELS "merge_method: sce\n", "bad.yaml:2: merge_method: sce is not supported");
    refuse(LINEAR, "models, slices, modules: expected one of them");
    refuse(LINEAR MODELS "slices: []\n", "expected one of them");
    refuse(LINEAR MODELS "allow_crimes: true\n", "bad.yaml:3: allow_crimes: is not supported");
    refuse(LINEAR MODELS "tokenizer_source: union\n", "bad.yaml:3: tokenizer_source: union is not supported");
    refuse(LINEAR MODELS "tokenizer: {source: base, tokens: {a: 1}}\n", "tokens: is not supported");
    refuse(LINEAR MODELS "tokenizer_source: base\n", "there is no base_model");
    refuse(LINEAR MODELS "chat_template: chatml\n", "named templates are not supported");
    refuse(LINEAR MODELS "dtype: int64\n", "bad.yaml:3: dtype: expected float32");
    refuse(LINEAR MODELS "parameters:\n  top_k: 3\n", "bad.yaml:4: top_k: is not supported");
    refuse(LINEAR MODELS "parameters:\n  weight: heavy\n", "bad.yaml:4: weight: expected a number");
    refuse(LINEAR MODELS "parameters:\n  weight: [1, x]\n", "bad.yaml:4: weight: expected numbers");
    refuse(LINEAR MODELS "parameters:\n  weight: .inf\n", "weight: expected a number");
    refuse(LINEAR MODELS "parameters:\n  weight: [{value: 1, when: x}]\n", "when: is not supported");
    refuse(LINEAR "models: [{model: tests/golden/merge/model11}]\n", "no weight is given");
    refuse(LINEAR "models: [{model: /nowhere}]\n", "/nowhere");
    refuse(LINEAR "models: [{parameters: {weight: 1}}]\n", "expected model");
    refuse("merge_method: slerp\nbase_model: tests/golden/merge/model11\n"
           "models: [{model: tests/golden/merge/model12}]\n", "slerp needs the parameter t");
    refuse("merge_method: ties\n" MODELS, "expected a base");
    refuse("merge_method: passthrough\nslices: [{sources: [{model: tests/golden/merge/model11, layer_range: "
           "[0, 9]}]}]\n", "has no layer 2");
    refuse("merge_method: passthrough\nslices: [{sources: [{model: tests/golden/merge/model11, layer_range: "
           "[1, 1]}]}]\n", "layer_range: expected [FIRST, END]");
    refuse("merge_method: passthrough\nslices: [{sources: [{model: tests/golden/merge/model11, layer_range: "
           "[0, 1]}], residual_weight: 1}]\n", "residual_weight: is not supported");
    refuse(LINEAR "modules: {vision: {}}\n", "vision: is not supported");
    char deep[400] = "a: ";
    memset(deep + 3, '[', 100);
    refuse(deep, "too many levels");
}
END_TEST

START_TEST(a_bomb_of_aliases_is_refused) {
    static char text[4096] = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n";
    for (int i = 1; i < 60; i++)
        snprintf(text + strlen(text), sizeof text - strlen(text), "a%d: &a%d [*a%d, *a%d, *a%d]\n", i, i,
                 i - 1, i - 1, i - 1);
    refuse(text, "bad.yaml:9: too many values");
}
END_TEST

START_TEST(survives_every_failed_allocation) {
    int before = live, n = 0;
    psoup_status status;
    do {
        allocations = 0;
        fail_at = n++;
        status = run_file(RECIPES "slices.yaml", in_scratch("out"));
        fail_at = -1;
        ck_assert_int_eq(live, before);
        ck_assert_msg(status == PSOUP_OK || status == PSOUP_ERROR_MEMORY, "%d: %s", n, error.message);
    } while (status != PSOUP_OK);
    ck_assert_int_gt(n, 100);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("merge_recipe");
    TCase *tests = tcase_create("merge_recipe");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, as_mergekit_makes_them, 0, (int)(sizeof golden / sizeof *golden));
    tcase_add_test(tests, layers_of_a_frankenmerge_are_counted);
    tcase_add_test(tests, what_is_lacking_is_refused_by_name_and_line);
    tcase_add_test(tests, a_bomb_of_aliases_is_refused);
    tcase_add_test(tests, survives_every_failed_allocation);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
