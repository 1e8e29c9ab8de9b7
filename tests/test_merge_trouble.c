/* What the merger refuses, being cancelled, and memory that fails. */
#include "merge_case.h"

/* A copy of golden/a whose tensors of a pattern are filled with a value, under another layer's name. */
static void spoil(const char *name, float value, const char *renamed) {
    psoup__peft *peft;
    ck_ok(psoup__peft_open(context, A, &peft, &error));
    float bad[256];
    for (int i = 0; i < 256; i++)
        bad[i] = value;
    if (value != 0)
        peft->pairs[1].b.data = bad;
    if (renamed != NULL)
        peft->pairs[1].module = renamed;
    const psoup__peft_output output = {.pairs = peft->pairs, .n = peft->n, .rank = 4, .alpha = 8};
    ck_ok(psoup__peft_write(context, in_scratch(name), &output, &error));
    psoup__peft_free(peft);
}

static void expect_refusal(recipe r, const char *says) {
    psoup_status status = run_recipe(context, &r, in_scratch("refused"), NULL);
    ck_assert_int_ne(status, PSOUP_OK);
    ck_assert_msg(strstr(error.message, says) != NULL, "%s", error.message);
    ck_assert(!psoup__file_exists(in_scratch("refused/model.safetensors")));
    ck_assert(!psoup__file_exists(in_scratch("refused/adapter_model.safetensors")));
}

START_TEST(refuses_what_cannot_be) {
    expect_refusal((recipe){.dtype = -1}, "nothing to merge");
    expect_refusal((recipe){.sources = {A, B}, .weights = {0.5, 0.6}, .dtype = -1}, "sum to 1.1");
    expect_refusal((recipe){.sources = {A, B}, .weights = {0.5, 0.500002}, .dtype = -1}, "sum to 1.000002");
    ck_ok(run_recipe(context, &(recipe){.sources = {A, B}, .weights = {0.5, 0.5000005}, .dtype = -1}, in_scratch("close"), NULL));
    expect_refusal((recipe){.sources = {A, BASE}, .weights = {0.5, 0.5}, .dtype = -1}, "one kind");
    expect_refusal((recipe){.sources = {A, C}, .weights = {0.5, 0.5}, .dtype = -1,
                            .method = PSOUP_MERGE_FACTORS}, "expected equal ones");
    expect_refusal((recipe){.sources = {BASE, BASE}, .weights = {0.5, 0.5}, .dtype = -1,
                            .method = PSOUP_MERGE_SVD, .svd_rank = 2}, "only the method delta");
    expect_refusal((recipe){.sources = {A}, .weights = {1}, .dtype = -1, .method = PSOUP_MERGE_SVD},
                   "svd_rank 0");
    expect_refusal((recipe){.sources = {A}, .weights = {1}, .dtype = -1, .method = 99}, "method 99");
    expect_refusal((recipe){.sources = {A}, .weights = {1}, .dtype = PSOUP_I8}, "dtype i8");
    expect_refusal((recipe){.sources = {A}, .weights = {NAN}, .dtype = -1}, "weight 0 is nan");
    expect_refusal((recipe){.sources = {"/nowhere"}, .weights = {1}, .dtype = -1}, "/nowhere");
    expect_refusal((recipe){.base = BASE, .sources = {BASE}, .weights = {1}, .dtype = -1},
                   "a base goes with adapters");
    expect_refusal((recipe){.sources = {GOLDEN "a/adapter_model.safetensors"}, .weights = {1},
                            .dtype = -1}, "holds an adapter");
    expect_refusal((recipe){.sources = {BASE, GOLDEN "unloaded.safetensors", GOLDEN "cat.safetensors"},
                            .weights = {0.5, 0.25, 0.25}, .dtype = -1}, "has no tensor");
    const char *quantised = "tests/golden/quant/nf4";
    expect_refusal((recipe){.sources = {quantised, quantised}, .weights = {0.5, 0.5}, .dtype = -1},
                   "quantization_config: quantised weights cannot be merged");
    expect_refusal((recipe){.base = quantised, .sources = {A}, .weights = {1}, .dtype = -1}, "quantization_config");
    recipe r = {.sources = {A, B}, .weights = {0.5, 0.7}, .dtype = -1, .any_sum = 1};
    ck_ok(run_recipe(context, &r, in_scratch("any"), NULL));
    ck_assert_int_eq(run_recipe(context, &r, in_scratch("any"), NULL), PSOUP_OK); /* over itself */

    char spoiled[1024];
    spoil("nan", NAN, NULL);
    snprintf(spoiled, sizeof spoiled, "%s", in_scratch("nan"));
    expect_refusal((recipe){.sources = {A, spoiled}, .weights = {0.5, 0.5}, .dtype = -1},
                   "layers.0.self_attn.v_proj.lora_B holds a NaN");
    expect_refusal((recipe){.base = BASE, .sources = {A, spoiled}, .weights = {0.5, 0.5}, .dtype = -1},
                   "holds a NaN");
    r = (recipe){.base = BASE, .sources = {A, spoiled}, .weights = {1, 0}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("skipped"), NULL)); /* weight 0 is not read */
    r.base = NULL;
    ck_ok(run_recipe(context, &r, in_scratch("skipped"), NULL));
    spoil("unknown", 0, "model.layers.7.self_attn.v_proj");
    snprintf(spoiled, sizeof spoiled, "%s", in_scratch("unknown"));
    expect_refusal((recipe){.base = BASE, .sources = {spoiled}, .weights = {1}, .dtype = -1},
                   "model.layers.7.self_attn.v_proj is not in the base");
    spoil("shape", 0, "model.layers.0.mlp.up_proj");
    snprintf(spoiled, sizeof spoiled, "%s", in_scratch("shape"));
    expect_refusal((recipe){.base = BASE, .sources = {spoiled}, .weights = {1}, .dtype = -1},
                   "another shape");
    spoil("huge", 1e6f, NULL);
    snprintf(spoiled, sizeof spoiled, "%s", in_scratch("huge"));
    expect_refusal((recipe){.sources = {spoiled}, .weights = {1}, .dtype = PSOUP_F16}, "too large");
    expect_refusal((recipe){.base = BASE, .sources = {spoiled}, .weights = {1}, .dtype = PSOUP_F16},
                   "too large for f16");
    r = (recipe){.sources = {A, B}, .weights = {0.5, 0.5}, .dtype = -1};
    ck_assert_int_eq(run_recipe(context, &r, A, NULL), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "is a source"));
    r = (recipe){.sources = {GOLDEN "model11/model.safetensors"}, .weights = {1}, .dtype = -1};
    ck_assert_int_eq(run_recipe(context, &r, GOLDEN "model11/", NULL), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "is a source"));
}
END_TEST

START_TEST(refuses_heads_that_differ) {
    static const char *const names[] = {"four", "three", "nan"};
    const float head[4] = {1, 2, 3, 4}, nan[4] = {1, NAN, 3, 4};
    char paths[3][1024];
    psoup__peft *peft;
    ck_ok(psoup__peft_open(context, A, &peft, &error));
    for (int i = 0; i < 3; i++) {
        const psoup__peft_output output = {.pairs = peft->pairs, .n = peft->n, .rank = 4, .alpha = 8,
                                           .task_type = "SEQ_CLS", .head = i == 2 ? nan : head,
                                           .dim = i == 1 ? 3 : 4};
        snprintf(paths[i], sizeof paths[i], "%s", in_scratch(names[i]));
        ck_ok(psoup__peft_write(context, paths[i], &output, &error));
    }
    psoup__peft_free(peft);
    expect_refusal((recipe){.sources = {A, paths[0]}, .weights = {0.5, 0.5}, .dtype = -1},
                   "expected a head as in");
    expect_refusal((recipe){.sources = {paths[0], paths[1]}, .weights = {0.5, 0.5}, .dtype = -1},
                   "expected a head as in");
    expect_refusal((recipe){.sources = {paths[0], paths[2]}, .weights = {0.5, 0.5}, .dtype = -1},
                   "score holds a NaN");
}
END_TEST

START_TEST(refuses_spoiled_models) {
    psoup__safetensors_writer *writer;
    const int64_t shape[2] = {40, 64};
    float *values = noises(40 * 64);
    values[2222] = -INFINITY;
    for (int i = 0; i < 3; i++) {
        static const char *const names[] = {"good.safetensors", "inf.safetensors", "ints.safetensors"};
        static const int32_t ints[40 * 64] = {1};
        const void *data = i == 2 ? (const void *)ints : values;
        if (i == 1)
            values[2222] = -INFINITY;
        else
            values[2222] = 1;
        ck_ok(psoup__safetensors_create(context, in_scratch(names[i]), &writer, &error));
        ck_ok(psoup__safetensors_declare(writer, "w", i == 2 ? PSOUP_I32 : PSOUP_F32, 2, shape, &error));
        ck_ok(psoup__safetensors_begin(writer, &error));
        ck_ok(psoup__safetensors_write(writer, data, 40 * 64 * 4, &error));
        ck_ok(psoup__safetensors_commit(writer, &error));
        psoup__safetensors_writer_free(writer);
    }
    char good[1024], inf[1024], ints[1024];
    snprintf(good, sizeof good, "%s", in_scratch("good.safetensors"));
    snprintf(inf, sizeof inf, "%s", in_scratch("inf.safetensors"));
    snprintf(ints, sizeof ints, "%s", in_scratch("ints.safetensors"));
    expect_refusal((recipe){.sources = {good, inf}, .weights = {0.5, 0.5}, .dtype = -1},
                   "inf.safetensors: tensor w holds a NaN or infinity");
    expect_refusal((recipe){.sources = {good, ints}, .weights = {0.5, 0.5}, .dtype = -1},
                   "tensor w is i32");
    recipe r = {.sources = {good, inf}, .weights = {1, 0}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("fine"), NULL));
    compare_weights(in_scratch("fine"), good, 0, 1);
    r = (recipe){.sources = {ints, ints}, .weights = {0.5, 0.5}, .dtype = PSOUP_BF16};
    ck_ok(run_recipe(context, &r, in_scratch("kept"), NULL)); /* equal integers stay as they are */
    psoup__weights *kept;
    ck_ok(psoup__weights_map(context, in_scratch("kept"), "model", &kept, &error));
    ck_assert_int_eq(psoup__weights_find(kept, "w")->dtype, PSOUP_I32);
    psoup__weights_free(kept);
    free(values);
}
END_TEST

static int stop_at_two(void *user, const char *label, int64_t done, int64_t total) {
    ++*(int *)user;
    return label != NULL && total > 2 && done == 2;
}

START_TEST(can_be_cancelled) {
    int calls = 0;
    psoup_merger *merger;
    psoup_merge_report report = {.size = sizeof report};
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    options.progress = stop_at_two;
    options.progress_user = &calls;
    ck_ok(psoup_merger_create(context, &options, &merger, &error));
    ck_ok(psoup_merger_set_base(merger, BASE, &error));
    ck_ok(psoup_merger_add(merger, A, 1, &error));
    ck_assert_int_eq(psoup_merger_write(merger, in_scratch("stopped"), &error), PSOUP_ERROR_CANCELLED);
    ck_assert_int_eq(calls, 2);
    ck_assert(!psoup__file_exists(in_scratch("stopped/model.safetensors")));
    ck_assert_int_eq(psoup_merger_report(merger, &report, &error), PSOUP_ERROR_STATE);
    psoup_merger_free(merger);
}
END_TEST

START_TEST(survives_every_failed_allocation) {
    const recipe recipes[] = {
        {.base = BASE, .sources = {A, C}, .weights = {0.5, 0.5}, .dtype = PSOUP_F16,
         .method = PSOUP_MERGE_SVD, .svd_rank = 2},
        {.sources = {A, B}, .weights = {0.5, 0.5}, .dtype = -1, .method = PSOUP_MERGE_FACTORS},
        {.sources = {GOLDEN "model11", GOLDEN "model12"}, .weights = {0.5, 0.5}, .dtype = PSOUP_F32}};
    int before = live, n = 0;
    psoup_status status;
    do {
        allocations = 0;
        fail_at = n++;
        status = run_recipe(context, &recipes[_i], scratch, NULL);
        fail_at = -1;
        ck_assert_int_eq(live, before);
        ck_assert_msg(status == PSOUP_OK || status == PSOUP_ERROR_MEMORY, "%d: %s", n,
                      error.message);
    } while (status != PSOUP_OK);
    ck_assert_int_gt(n, 30);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("merge_trouble");
    TCase *tests = tcase_create("merge_trouble");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, refuses_what_cannot_be);
    tcase_add_test(tests, refuses_heads_that_differ);
    tcase_add_test(tests, refuses_spoiled_models);
    tcase_add_test(tests, can_be_cancelled);
    tcase_add_loop_test(tests, survives_every_failed_allocation, 0, 3);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
