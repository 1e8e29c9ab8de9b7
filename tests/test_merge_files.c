/* The merger from file to file, against what PEFT, torch and numpy merge (tests/golden/merge.py). */
#include "merge_case.h"

/* An adapter's dense changes beside a golden file of them. */
static void compare_delta(const char *directory, const char *golden, double tolerance) {
    psoup__peft *peft;
    psoup__weights *expected;
    ck_ok(psoup__peft_open(context, directory, &peft, &error));
    ck_ok(psoup__weights_map(context, golden, "model", &expected, &error));
    ck_assert_uint_eq(peft->n, psoup__weights_count(expected));
    for (size_t p = 0; p < peft->n; p++) {
        const psoup__peft_pair *pair = &peft->pairs[p];
        const psoup__tensor *dense = psoup__weights_find(expected, pair->module);
        ck_assert_msg(dense != NULL, "%s", pair->module);
        int64_t out = pair->b.shape[0], in = pair->a.shape[1];
        double worst = 0;
        for (int64_t i = 0; i < out; i++)
            for (int64_t j = 0; j < in; j++) {
                double sum = 0;
                for (int32_t k = 0; k < pair->rank; k++)
                    sum += as_double(&pair->b, (size_t)(i * pair->rank + k)) *
                           as_double(&pair->a, (size_t)(k * in + j));
                sum *= (double)pair->scale;
                double off = fabs(sum - as_double(dense, (size_t)(i * in + j)));
                if (!(off <= worst))
                    worst = off; /* NaN too */
            }
        ck_assert_msg(worst <= tolerance, "%s: %g", pair->module, worst);
    }
    psoup__peft_free(peft);
    psoup__weights_free(expected);
}

START_TEST(adapters_as_peft_merges_them) {
    psoup_merge_report report;
    recipe r = {.sources = {A, B}, .weights = {0.3, 0.7}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("cat"), &report));
    ck_assert_uint_eq(report.tensors, 8);
    ck_assert(report.worst_error == 0 && report.worst_name[0] == '\0');
    compare_delta(in_scratch("cat"), GOLDEN "cat.safetensors", 1e-6);
    r.method = PSOUP_MERGE_SVD;
    r.svd_rank = 3;
    ck_ok(run_recipe(context, &r, in_scratch("svd"), &report));
    compare_delta(in_scratch("svd"), GOLDEN "svd.safetensors", 1e-5);
    ck_assert(report.worst_error >= report.mean_error && report.mean_error > 0.01);
    ck_assert_ptr_nonnull(strstr(report.worst_name, "self_attn"));
    r.svd_rank = 8; /* all there is */
    ck_ok(run_recipe(context, &r, in_scratch("svd8"), &report));
    compare_delta(in_scratch("svd8"), GOLDEN "cat.safetensors", 1e-6);
    ck_assert_double_lt(report.worst_error, 1e-12);

    psoup_json *facts;
    ck_ok(psoup_json_read(context, GOLDEN "facts.json", &facts, &error));
    r = (recipe){.sources = {A, B}, .weights = {0.3, 0.7}, .method = PSOUP_MERGE_FACTORS, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("factors"), &report));
    ck_assert_double_eq_tol(report.worst_error,
                            psoup_json_real(psoup_json_get(facts, "factors_worst"), NAN), 1e-6);
    /* PEFT's "linear" is our factors with √(w s) on both sides. */
    psoup__peft *p[2], *merged;
    psoup__weights *linear;
    ck_ok(psoup__peft_open(context, A, &p[0], &error));
    ck_ok(psoup__peft_open(context, B, &p[1], &error));
    ck_ok(psoup__peft_open(context, in_scratch("factors"), &merged, &error));
    ck_ok(psoup__weights_map(context, GOLDEN "linear.safetensors", "model", &linear, &error));
    for (size_t m = 0; m < p[0]->n; m++) {
        const psoup__peft_pair *x = &p[0]->pairs[m], *y = &p[1]->pairs[m];
        const psoup__tensor *dense = psoup__weights_find(linear, x->module);
        int64_t out = x->b.shape[0], in = x->a.shape[1];
        float buffer[4 * 4 * 16], a[4 * 16], b[16 * 4];
        const psoup__tensor *four[4] = {&x->a, &y->a, &x->b, &y->b};
        for (int i = 0; i < 4; i++)
            psoup__tensor_bytes(four[i], 0, four[i]->bytes, buffer + i * 64);
        const psoup_lora_factors f[2] = {{buffer, buffer + 128, 4, 1}, {buffer + 64, buffer + 192, 4, 1}};
        const double w[2] = {sqrt(0.3 * 2), sqrt(0.7 * 2)};
        ck_ok(psoup_merge_factors(context, PSOUP_MERGE_FACTORS, a, b, 4, out, in, f, w, 2, NULL,
                                  &error));
        for (int64_t i = 0; i < out * in; i++) {
            double sum = 0;
            for (int k = 0; k < 4; k++)
                sum += (double)b[i / in * 4 + k] * (double)a[k * in + i % in];
            ck_assert_double_eq_tol(sum, as_double(dense, (size_t)i), 2e-6);
        }
    }
    psoup__weights_free(linear);
    psoup__peft_free(merged);
    psoup__peft_free(p[0]);
    psoup__peft_free(p[1]);
    psoup_json_free(facts);
}
END_TEST

START_TEST(adapters_into_a_base) {
    psoup_merge_report report;
    recipe r = {.base = BASE, .sources = {A, B}, .weights = {0.3, 0.7}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("unloaded"), &report));
    compare_weights(in_scratch("unloaded"), GOLDEN "unloaded.safetensors", 1e-6, 1);
    ck_assert(psoup__file_exists(in_scratch("unloaded/config.json")));
    /* Other ranks, other scales, other modules: the dense f64 sum. */
    r = (recipe){.base = BASE, .sources = {A, B, C}, .weights = {0.5, 0.3, 0.2}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("folded"), &report));
    compare_weights(in_scratch("folded"), GOLDEN "folded.safetensors", 1e-6, 0);
    ck_assert_double_eq(report.worst_error, 0);
    /* Best of rank 3, with numpy's singular values beside. */
    r.method = PSOUP_MERGE_SVD;
    r.svd_rank = 3;
    psoup_json *facts;
    ck_ok(psoup_json_read(context, GOLDEN "facts.json", &facts, &error));
    ck_ok(run_recipe(context, &r, in_scratch("folded3"), &report));
    double worst = 0, sum = 0;
    const char *name = NULL, *worst_name = "";
    const psoup_json *errors = psoup_json_get(facts, "svd_errors");
    for (const psoup_json *e; (e = psoup_json_next(errors, &name)) != NULL;) {
        sum += psoup_json_real(e, NAN);
        if (psoup_json_real(e, NAN) > worst) {
            worst = psoup_json_real(e, NAN);
            worst_name = name;
        }
    }
    ck_assert_double_eq_tol(report.worst_error, worst, 1e-6);
    ck_assert_double_eq_tol(report.mean_error, sum / (double)psoup_json_size(errors), 1e-6);
    ck_assert_str_eq(report.worst_name, worst_name);
    psoup_json_free(facts);
    /* In another dtype, which config.json names. */
    r = (recipe){.base = BASE, .sources = {A, B}, .weights = {0.3, 0.7}, .dtype = PSOUP_BF16};
    ck_ok(run_recipe(context, &r, in_scratch("bf16"), NULL));
    compare_weights(in_scratch("bf16"), GOLDEN "unloaded.safetensors", 0x1p-8, 1);
    psoup_model_config config;
    ck_ok(psoup__hf_config_read(context, in_scratch("bf16"), &config, &error));
    ck_assert_int_eq(config.torch_dtype, PSOUP_BF16);
}
END_TEST

START_TEST(full_models_as_torch_sums_them) {
    recipe r = {.sources = {GOLDEN "model11", GOLDEN "model12"}, .weights = {0.37, 0.63}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("models"), NULL));
    compare_weights(in_scratch("models"), GOLDEN "models.safetensors", 0, 1);
    r = (recipe){.sources = {GOLDEN "model11"}, .weights = {1}, .dtype = PSOUP_F32};
    ck_ok(run_recipe(context, &r, in_scratch("one"), NULL));
    compare_weights(in_scratch("one"), GOLDEN "model11", 0, 1);
}
END_TEST

static void expect_same_file(const char *a, const char *b) {
    char *x, *y;
    size_t n, m;
    ck_ok(psoup__file_read(context, a, 1 << 24, &x, &n, &error));
    ck_ok(psoup__file_read(context, b, 1 << 24, &y, &m, &error));
    ck_assert_uint_eq(n, m);
    ck_assert_mem_eq(x, y, n);
    psoup__free(context, x);
    psoup__free(context, y);
}

/* A reward model's head is summed like its factors: with the weights given, its bias too. */
START_TEST(heads_are_summed) {
    const float heads[2][4] = {{1, 2, -3, 0.5f}, {5, -2, 1, 0.25f}}, biases[2] = {2, -4};
    char sources[2][1024];
    psoup__peft *peft;
    for (int i = 0; i < 2; i++) {
        ck_ok(psoup__peft_open(context, i ? B : A, &peft, &error));
        const psoup__peft_output output = {.pairs = peft->pairs, .n = peft->n, .rank = 4, .alpha = 8,
                                           .task_type = "SEQ_CLS", .head = heads[i], .dim = 4,
                                           .head_bias = &biases[i]};
        snprintf(sources[i], sizeof sources[i], "%s", in_scratch(i ? "reward1" : "reward0"));
        ck_ok(psoup__peft_write(context, sources[i], &output, &error));
        psoup__peft_free(peft);
    }
    recipe r = {.sources = {sources[0], sources[1]}, .weights = {0.25, 0.75}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("reward"), NULL));
    ck_ok(psoup__peft_open(context, in_scratch("reward"), &peft, &error));
    ck_assert_uint_eq(peft->head.bytes, 16);
    for (size_t k = 0; k < 4; k++)
        ck_assert_double_eq_tol(as_double(&peft->head, k),
                                0.25 * (double)heads[0][k] + 0.75 * (double)heads[1][k], 1e-6);
    ck_assert_double_eq_tol(as_double(&peft->head_bias, 0), 0.25 * 2 + 0.75 * -4, 1e-6);
    psoup__peft_free(peft);
}
END_TEST

START_TEST(new_weights_and_threads) {
    const double other[2] = {0.9, 0.1};
    recipe r = {.base = BASE, .sources = {A, B}, .weights = {0.9, 0.1}, .dtype = -1};
    psoup_context *alone = new_context(1, NULL);
    ck_ok(run_recipe(alone, &r, in_scratch("alone"), NULL));
    psoup_context_free(alone);
    psoup_merger *merger;
    ck_ok(psoup_merger_create(context, NULL, &merger, &error));
    ck_ok(psoup_merger_set_base(merger, BASE, &error));
    ck_ok(psoup_merger_add(merger, A, 0.3, &error));
    ck_ok(psoup_merger_add(merger, B, 0.7, &error));
    ck_ok(psoup_merger_write(merger, in_scratch("first"), &error));
    ck_ok(psoup_merger_set_weights(merger, other, 2, &error));
    ck_ok(psoup_merger_write(merger, in_scratch("second"), &error));
    expect_same_file(in_scratch("alone/model.safetensors"), in_scratch("second/model.safetensors"));
    ck_assert_int_eq(psoup_merger_set_weights(merger, other, 1, &error), PSOUP_ERROR_ARGUMENT);
    const double bad[2] = {0.9, 0.2}, nan[2] = {NAN, 1};
    ck_assert_int_eq(psoup_merger_set_weights(merger, bad, 2, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "1.1"));
    ck_assert_int_eq(psoup_merger_set_weights(merger, nan, 2, &error), PSOUP_ERROR_ARGUMENT);
    psoup_merger_free(merger);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("merge_files");
    TCase *tests = tcase_create("merge_files");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, adapters_as_peft_merges_them);
    tcase_add_test(tests, adapters_into_a_base);
    tcase_add_test(tests, full_models_as_torch_sums_them);
    tcase_add_test(tests, heads_are_summed);
    tcase_add_test(tests, new_weights_and_threads);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
