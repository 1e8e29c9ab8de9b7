/* What a mix mixes: `factors` per row beside `delta`, on the CPU and on a GPU (the host driver's, where
 * there is none). */
#include "mix_case.h"

#include "psoup/merge.h"

/* Every second row by factors; the base, one-hot rows and soups among both. */
static const float weights[ROWS][ADAPTERS] = {{0.5f, 0.3f, 0.2f}, {0.5f, 0.3f, 0.2f}, {0, 1, 0},
                                              {0, 0, 0},          {-0.5f, 1.5f, 0},   {0.25f, 0, 0.75f}};
static const int32_t methods[ROWS] = {PSOUP_MIX_FACTORS, PSOUP_MIX_DELTA, PSOUP_MIX_FACTORS,
                                      PSOUP_MIX_DELTA,   PSOUP_MIX_FACTORS, PSOUP_MIX_FACTORS};

static void many_rows(sample_rows *rows, uint64_t seed) {
    fill_rows(rows, ROWS, seed);
    for (size_t i = 0; i < ROWS; i++)
        rows->row[i].mix = weights[i];
}

/* The merger's `factors` of these weights, loaded as one more adapter "merged". */
static void load_merged(psoup_model *model, const float *mix) {
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    psoup_merger *merger = NULL;
    const char *directory = temporary_directory();
    char path[128];
    options.method = PSOUP_MERGE_FACTORS;
    options.dtype = PSOUP_F32;
    OK(psoup_merger_create(model->context, &options, &merger, &error));
    for (int i = 0; i < ADAPTERS; i++) {
        snprintf(path, sizeof path, "%s/%s", directory, names[i]);
        OK(psoup_model_save_adapter(model, names[i], path, NULL, &error));
        OK(psoup_merger_add(merger, path, (double)mix[i], &error));
    }
    snprintf(path, sizeof path, "%s/merged", directory);
    OK(psoup_merger_write(merger, path, &error));
    psoup_merger_free(merger);
    OK(psoup_model_load_adapter(model, "merged", path, &error));
    remove_directory(directory);
}

START_TEST(factors_are_the_mergers) {
    psoup_context *context = on(devices[_i], 2);
    psoup_model *model = random_model(context);
    sample_rows rows;
    many_rows(&rows, 41);
    psoup_row row = rows.row[3];
    row.mix = weights[0];
    float *mixed = logits_of(model, &row, &methods[0], 1), *delta = logits_of(model, &row, NULL, 1);
    load_merged(model, weights[0]);
    const float one_hot[ADAPTERS + 1] = {0, 0, 0, 1};
    row.mix = one_hot;
    float *merged = logits_of(model, &row, NULL, 1);
    double off = relative(mixed, merged, row.n * VOCAB), other = relative(delta, merged, row.n * VOCAB);
    ck_assert_msg(off < 1e-5, "factors per row are %g away from the merged ones", off);
    ck_assert_msg(other > 1e-2, "delta is %g away from factors", other);
    free(mixed), free(delta), free(merged);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* Rows of both methods in one batch on two threads have the bits that each has alone, on one; one-hot rows those of
 * delta; and NaN in an adapter of weight 0 changes none. */
START_TEST(rows_keep_their_bits) {
    psoup_context *context = on("cpu", 2), *single = on("cpu", 1);
    psoup_model *model = random_model(context), *alone = random_model(single);
    sample_rows rows;
    many_rows(&rows, 42);
    float *all = logits_of(model, rows.row, methods, ROWS), *delta = logits_of(model, rows.row, NULL, ROWS);
    fill_adapter(alone, "c", 0, NAN);
    for (size_t i = 0, at = 0; i < ROWS; at += rows.row[i++].n * VOCAB) {
        size_t n = rows.row[i].n * VOCAB;
        if (weights[i][2] == 0) {
            float *one = logits_of(alone, &rows.row[i], &methods[i], 1);
            ck_assert_msg(memcmp(all + at, one, n * sizeof *one) == 0, "row %zu", i);
            free(one);
        }
        bool one_hot = i == 2, same = memcmp(all + at, delta + at, n * sizeof *all) == 0;
        ck_assert_msg(same == (one_hot || methods[i] == PSOUP_MIX_DELTA), "row %zu beside delta", i);
    }
    free(all), free(delta);
    psoup_model_free(model);
    psoup_model_free(alone);
    psoup_context_free(context);
    psoup_context_free(single);
}
END_TEST

START_TEST(a_gpu_agrees) {
    psoup_context *context[2] = {on("cpu", 2), on("cuda:0", 2)};
    psoup_model *model[2];
    psoup_gradients *g[2];
    float *logits[2];
    sample_rows rows;
    many_rows(&rows, 43);
    for (int i = 0; i < 2; i++) {
        model[i] = random_model(context[i]);
        logits[i] = logits_of(model[i], rows.row, methods, ROWS);
        OK(psoup_model_gradients_mixed(model[i], rows.row, methods, ROWS, NULL,
                                       PSOUP_GRADIENT_ADAPTERS | PSOUP_GRADIENT_MIX, &g[i], &error));
    }
    double off = relative(logits[1], logits[0], rows.total * VOCAB);
    ck_assert_msg(off > 0 && off < 1e-5, "logits: %g", off);
    static const char *const of[] = {"a/model.layers.0.self_attn.q_proj.lora_A", "mix",
                                     "b/model.layers.1.mlp.down_proj.lora_B",
                                     "c/model.layers.0.self_attn.v_proj.lora_B"};
    for (size_t k = 0; k < sizeof of / sizeof *of; k++) {
        size_t n = 0;
        const float *want = psoup_gradients_get(g[0], of[k], &n), *got = psoup_gradients_get(g[1], of[k], NULL);
        off = relative(got, want, n);
        ck_assert_msg(off < 1e-4, "%s: %g", of[k], off);
    }
    for (int i = 0; i < 2; i++) {
        free(logits[i]);
        psoup_gradients_free(g[i]);
        psoup_model_free(model[i]);
        psoup_context_free(context[i]);
    }
}
END_TEST

static double loss_of(psoup_model *model, const psoup_row *row, const float *mix) {
    psoup_row own = *row;
    float out[64];
    double sum = 0;
    own.mix = mix;
    OK(psoup_model_logprobs_mixed(model, &own, &methods[0], 1, out, &error));
    for (size_t i = 0; i + 1 < own.n; i++)
        sum += (double)out[i];
    return sum;
}

/* The weights' gradient against central differences of the log-probs, which are f32. */
START_TEST(mix_gradients_are_slopes) {
    psoup_context *context = on(devices[_i], 2);
    psoup_model *model = random_model(context);
    psoup_gradients *g = NULL;
    sample_rows rows;
    many_rows(&rows, 44);
    psoup_row row = rows.row[3];
    row.mix = weights[0];
    OK(psoup_model_gradients_mixed(model, &row, methods, 1, NULL, PSOUP_GRADIENT_MIX, &g, &error));
    const float *slope = psoup_gradients_get(g, "mix", NULL);
    for (int i = 0; i < ADAPTERS; i++) {
        const float h = 1.0f / 256;
        float low[ADAPTERS], high[ADAPTERS];
        memcpy(low, weights[0], sizeof low);
        memcpy(high, weights[0], sizeof high);
        low[i] -= h;
        high[i] += h;
        double want = (loss_of(model, &row, high) - loss_of(model, &row, low)) / ((double)high[i] - (double)low[i]);
        ck_assert_msg(fabs((double)slope[i] - want) < 5e-3 * (1 + fabs(want)), "%s: %g, by differences %g", names[i],
                      (double)slope[i], want);
    }
    psoup_gradients_free(g);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* Sequences of both methods decode together, each as alone, as a GPU has it in windows or step by step; and what was
 * drawn has the log-probs that scoring gives. */
START_TEST(sequences_decode_by_their_method) {
    psoup_context *context = on(devices[_i], 2);
    psoup_model *model = random_model(context);
    sample_rows rows;
    many_rows(&rows, 45);
    psoup_sampling sampling = sampled(12);
    sampling.ignore_stop = 1;
    psoup_prompt prompts[ROWS];
    psoup_generation *all = NULL;
    psoup_session_options options = PSOUP_SESSION_OPTIONS_INIT;
    options.max_sequences = 4;
    options.prefill_rows = 16;
    for (size_t i = 0; i < ROWS; i++) {
        prompts[i] = prompt_of(&rows.row[i], i);
        prompts[i].mix_method = methods[i];
    }
    OK(psoup_generate(model, prompts, ROWS, &sampling, &options, NULL, NULL, &all, &error));
    for (size_t i = 0; i < ROWS; i++) {
        psoup_generation *one = NULL;
        const psoup_completion *c = psoup_generation_get(all, i);
        int32_t text[64];
        float scored[64];
        if (_i == 0) {
            OK(psoup_generate(model, &prompts[i], 1, &sampling, NULL, NULL, NULL, &one, &error));
            ck_assert_msg(equal(*c, *psoup_generation_get(one, 0)), "sequence %zu", i);
            psoup_generation_free(one);
        }
        ck_assert_uint_eq(c->n, 12);
        memcpy(text, prompts[i].tokens, prompts[i].n * sizeof *text);
        memcpy(text + prompts[i].n, c->tokens, c->n * sizeof *text);
        psoup_row row = {text, prompts[i].n + c->n, prompts[i].mix};
        OK(psoup_model_logprobs_mixed(model, &row, &methods[i], 1, scored, &error));
        double off = distance(scored + prompts[i].n - 1, c->logprobs, c->n);
        ck_assert_msg(off < 1e-4, "sequence %zu: log-probs differ by %g", i, off);
    }
    psoup_generation_free(all);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

START_TEST(unlike_adapters_are_refused) {
    psoup_context *context = on("cpu", 1);
    psoup_model *model = random_model(context);
    psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
    psoup_session *session = NULL;
    sample_rows rows;
    float out[VOCAB * 64];
    options.rank = 6;
    OK(psoup_model_add_adapter(model, "d", &options, &error));
    options.rank = 5;
    options.alpha = 20;
    OK(psoup_model_add_adapter(model, "e", &options, &error));
    OK(psoup_session_create(model, NULL, &session, &error));
    fill_rows(&rows, 1, 46);
    const float rank[] = {0.5f, 0, 0, 0.5f, 0}, scale[] = {0, 0, 0.5f, 0, 0.5f}, nobody[] = {0.5f, 0.5f, 0, 0, 0};
    const char *const told = "method factors: in layer 0, self_attn.q_proj, adapter \"a\" has rank 5 and scale 2, "
                             "\"d\" rank 6 and scale 5.33333; expected equal ones";
    rows.row[0].mix = rank;
    REFUSED(psoup_model_logits_mixed(model, rows.row, methods, 1, out, &error), told);
    psoup_prompt prompt = prompt_of(&rows.row[0], 0);
    prompt.mix_method = PSOUP_MIX_FACTORS;
    REFUSED(psoup_session_submit(session, 7, &prompt, &error), told);
    rows.row[0].mix = scale;
    REFUSED(psoup_model_logits_mixed(model, rows.row, methods, 1, out, &error), "scale 2, \"e\" rank 5 and scale 4");
    OK(psoup_model_logits_mixed(model, rows.row, NULL, 1, out, &error)); /* delta takes them */
    rows.row[0].mix = nobody; /* those of weight 0 do not count */
    OK(psoup_model_logits_mixed(model, rows.row, methods, 1, out, &error));
    const int32_t wrong = 9;
    REFUSED(psoup_model_logits_mixed(model, rows.row, &wrong, 1, out, &error), "mix method 9; expected 0 (delta)");
    prompt.mix = nobody;
    prompt.mix_method = 9;
    REFUSED(psoup_session_submit(session, 7, &prompt, &error), "prompt 7: mix method 9");
    prompt.mix_method = 0;
    prompt.reserved[0] = 1;
    REFUSED(psoup_session_submit(session, 7, &prompt, &error), "prompt 7: mix_strength 0, reserved 1: expected");
    prompt.reserved[0] = 0;
    prompt.mix_strength = INFINITY;
    REFUSED(psoup_session_submit(session, 7, &prompt, &error), "prompt 7: mix_strength inf, reserved 0: expected");
    int32_t method = -1;
    REFUSED(psoup_mix_method_parse("sum", &method, &error), "mix method \"sum\"; expected delta");
    for (int32_t m = 0; strcmp(psoup_mix_method_name(m), "?") != 0; m++) {
        OK(psoup_mix_method_parse(psoup_mix_method_name(m), &method, &error));
        ck_assert_int_eq(method, m);
    }
    psoup_session_free(session);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("mix");
    TCase *tests = tcase_create("mix");
    tcase_set_timeout(tests, 300);
    tcase_add_loop_test(tests, factors_are_the_mergers, 0, 2);
    tcase_add_test(tests, rows_keep_their_bits);
    tcase_add_test(tests, a_gpu_agrees);
    tcase_add_loop_test(tests, mix_gradients_are_slopes, 0, 2);
    tcase_add_loop_test(tests, sequences_decode_by_their_method, 0, 2);
    tcase_add_test(tests, unlike_adapters_are_refused);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
