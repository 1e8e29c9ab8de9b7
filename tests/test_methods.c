/* Every method of whole tensors against mergekit's and PEFT's own code and the papers' formulas, in
 * every way that must give the same bits. The cases are written by tests/golden/methods.py. */
#include "methods_case.h"

#define CASES "tests/golden/methods/"
#define MOST 8

static psoup__weights *tensors;
static psoup_json *cases;

static void open_cases(void) {
    set_up();
    ck_ok(psoup__weights_map(context, CASES "model.safetensors", "model", &tensors, &error));
    ck_ok(psoup_json_read(context, CASES "cases.json", &cases, &error));
}

static void close_cases(void) {
    psoup__weights_free(tensors);
    psoup_json_free(cases);
    tear_down();
}

static psoup__merge_input input_of(const char *name) {
    const psoup__tensor *tensor = psoup__weights_find(tensors, name);
    ck_assert_msg(tensor != NULL, "%s", name);
    return (psoup__merge_input){.tensor = tensor, .columns = tensor->shape[tensor->rank - 1]};
}

/* The numbers of an array, or NULL where there is none. */
static const double *reals(const psoup_json *one, const char *key, double out[MOST]) {
    const psoup_json *array = psoup_json_get(one, key);
    for (size_t i = 0; i < psoup_json_size(array); i++)
        out[i] = psoup_json_real(psoup_json_at(array, i), NAN);
    return array != NULL ? out : NULL;
}

static int32_t peer_of(const psoup_json *one) {
    const char *peer = psoup_json_string(psoup_json_get(one, "peer"), "mergekit");
    return strcmp(peer, "paper") == 0  ? PSOUP_MERGE_PAPER
           : strcmp(peer, "peft") == 0 ? PSOUP_MERGE_PEFT
                                       : PSOUP_MERGE_MERGEKIT;
}

static bool truth(const psoup_json *one, const char *key, bool otherwise) {
    return psoup_json_bool(psoup_json_get(one, key), otherwise);
}

static void run_case(const psoup_json *one, size_t index) {
    double values[5][MOST];
    char name[64];
    psoup__merge_input inputs[MOST], base = {0};
    const psoup_json *list = psoup_json_get(one, "inputs");
    const char *base_name = psoup_json_string(psoup_json_get(one, "base"), NULL);
    const char *method = psoup_json_string(psoup_json_get(one, "method"), "");
    const char *vote = psoup_json_string(psoup_json_get(one, "vote"), "total");
    for (size_t i = 0; i < psoup_json_size(list); i++)
        inputs[i] = input_of(psoup_json_string(psoup_json_at(list, i), ""));
    if (base_name != NULL)
        base = input_of(base_name);
    snprintf(name, sizeof name, "layer.%zu.weight", index);
    const psoup__method_job job = {
        .name = name,
        .method = psoup__method_named(method),
        .n = inputs[0].tensor->bytes / sizeof(float),
        .columns = inputs[0].columns,
        .rows = inputs[0].tensor->shape[0],
        .count = psoup_json_size(list),
        .inputs = inputs,
        .base = base_name != NULL ? &base : NULL,
        .weight = reals(one, "weight", values[0]),
        .density = reals(one, "density", values[1]),
        .gamma = reals(one, "gamma", values[2]),
        .epsilon = reals(one, "epsilon", values[3]),
        .scale = reals(one, "scale", values[4]),
        .lambda = psoup_json_real(psoup_json_get(one, "lambda"), 1),
        .t = psoup_json_real(psoup_json_get(one, "t"), NAN),
        .normalize = truth(one, "normalize", false),
        .rescale = truth(one, "rescale", false),
        .flatten = truth(one, "flatten", true),
        .row_wise = truth(one, "row_wise", false),
        .filter_wise = truth(one, "filter_wise", false),
        .vote = strcmp(vote, "frequency") == 0 ? PSOUP__VOTE_FREQUENCY : PSOUP__VOTE_TOTAL,
        .peer = peer_of(one),
        .seed = 0x1234567890abcdef,
    };
    ck_assert_msg(job.method != NULL, "%s", method);
    float *out = malloc(job.n * sizeof *out);
    run_all_ways(&job, out);
    snprintf(name, sizeof name, "case.%zu", index);
    const psoup__tensor *golden = psoup__weights_find(tensors, name);
    ck_assert_ptr_nonnull(golden);
    ck_assert_uint_eq(golden->bytes, job.n * sizeof *out);
    for (size_t i = 0; i < job.n; i++)
        ck_assert_msg(fabs((double)out[i] - as_double(golden, i)) <= 2e-6,
                      "case %zu (%s): element %zu is %g, not %g", index, method, i, (double)out[i],
                      as_double(golden, i));
    free(out);
}

START_TEST(as_the_peers_and_the_papers) {
    size_t n = psoup_json_size(cases);
    ck_assert_uint_ge(n, 150);
    for (size_t i = 0; i < n; i++)
        run_case(psoup_json_at(cases, i), i);
}
END_TEST

START_TEST(every_method_has_a_case) {
    for (int32_t m = PSOUP_MERGE_LINEAR; m <= PSOUP_MERGE_MAGNITUDE_PRUNE; m++) {
        const psoup__method *method = psoup__method_of((psoup_merge_method)m);
        size_t found = 0;
        ck_assert_ptr_nonnull(method);
        ck_assert_ptr_eq(psoup__method_named(method->name), method);
        for (size_t i = 0; i < psoup_json_size(cases); i++)
            found +=
                strcmp(psoup_json_string(psoup_json_get(psoup_json_at(cases, i), "method"), ""),
                       method->name) == 0;
        ck_assert_msg(found > 0, "%s", method->name);
    }
    ck_assert_ptr_null(psoup__method_of(PSOUP_MERGE_DELTA));
    ck_assert_ptr_null(psoup__method_of(PSOUP_MERGE_PEFT_LINEAR));
    ck_assert_ptr_null(psoup__method_named("karcher"));
}
END_TEST

int main(void) {
    Suite *suite = suite_create("methods");
    TCase *tcase = tcase_create("methods");
    tcase_add_checked_fixture(tcase, open_cases, close_cases);
    tcase_set_timeout(tcase, 120);
    tcase_add_test(tcase, as_the_peers_and_the_papers);
    tcase_add_test(tcase, every_method_has_a_case);
    suite_add_tcase(suite, tcase);
    return run_suite(suite);
}
