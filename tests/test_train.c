/* The trainers' formulas against trl 0.7.2 and torch (tests/golden/train.py), and their options. */
#include "train_case.h"

/* ---- PPO's formulas ----------------------------------------------------------------------------- */

typedef struct tokens {
    float *x;
    size_t n;
} tokens;

static tokens read_tokens(const psoup_json *object, const char *key) {
    tokens t;
    t.x = floats(object, key, &t.n);
    return t;
}

static void compare(const float *got, tokens expected, const char *what) {
    for (size_t i = 0; i < expected.n; i++)
        near(got[i], expected.x[i], 1e-6, what, i);
    free(expected.x);
}

START_TEST(rewards_advantages_and_losses_are_trls) {
    psoup_json *file = golden("objectives.json");
    const psoup_json *c = psoup_json_at(psoup_json_get(file, "ppo"), (size_t)_i);
    const psoup_json *lengths = psoup_json_get(c, "lengths");
    tokens logprob = read_tokens(c, "logprob"), ref = read_tokens(c, "ref_logprob");
    tokens value = read_tokens(c, "value"), score = read_tokens(c, "score");
    tokens advantage32 = read_tokens(c, "advantage32"), returns32 = read_tokens(c, "returns32");
    tokens new_logprob = read_tokens(c, "new_logprob"), new_value = read_tokens(c, "new_value");
    float reward[64], advantage[64], returns[64], dlogprob[64], dvalue[64];
    size_t total = logprob.n, at = 0;
    ck_assert_uint_le(total, 64);
    psoup__loss_terms terms = {0};
    const psoup__objective objective = {.clip = real(c, "clip"), .value_clip = real(c, "clip_value"),
                                        .value_coefficient = real(c, "coefficient")};
    psoup__backend *be;
    double scale = 1.0 / (double)total;
    OK(psoup__cpu_create(context, &be, &error));
    for (size_t i = 0; i < psoup_json_size(lengths); i++) {
        size_t n = (size_t)psoup_json_integer(psoup_json_at(lengths, i), 0);
        psoup__kl_rewards(reward + at, logprob.x + at, ref.x + at, n, PSOUP_KL_DEFAULT, real(c, "beta"),
                          score.x[i]);
        const int32_t first[2] = {(int32_t)at, (int32_t)(at + n)};
        const psoup__old old = {logprob.x + at, advantage32.x + at, NULL, value.x + at, returns32.x + at};
        be->ops->gae(be, advantage, returns, reward, value.x, first, 1, real(c, "gamma"), real(c, "lambda_"));
        lose_one(&objective, dlogprob + at, dvalue + at, new_logprob.x + at, new_value.x + at, old, n, 0.0, scale,
                 &terms);
        at += n;
    }
    be->ops->free(be);
    ck_assert_uint_eq(at, total);
    psoup__whiten(advantage, total);
    compare(reward, read_tokens(c, "reward"), "reward");
    compare(returns, read_tokens(c, "returns"), "return");
    compare(advantage, read_tokens(c, "advantage"), "advantage");
    compare(dlogprob, read_tokens(c, "dlogprob"), "dlogprob");
    compare(dvalue, read_tokens(c, "dvalue"), "dvalue");
    ck_assert_uint_eq((size_t)terms.tokens, total);
    ck_assert_int_eq(terms.broken, 0);
    near(terms.policy_loss * scale, real(c, "policy_loss"), 1e-6, "policy loss", 0);
    near(terms.value_loss * scale * real(c, "coefficient"), real(c, "value_loss"), 1e-6,
         "value loss", 0);
    near(terms.clipped * scale, real(c, "clip_fraction"), 1e-6, "clip fraction", 0);
    near(terms.value_clipped * scale, real(c, "value_clip_fraction"), 1e-6, "value clip fraction",
         0);
    near(terms.kl * scale, real(c, "policy_kl"), 1e-6, "policy KL", 0);
    near(terms.ratio * scale, real(c, "mean_ratio"), 1e-6, "mean ratio", 0);
    tokens all[] = {logprob, ref, value, score, advantage32, returns32, new_logprob, new_value};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        free(all[i].x);
    psoup_json_free(file);
}
END_TEST

START_TEST(kl_controller_is_trls) {
    psoup_json *file = golden("objectives.json");
    const psoup_json *c = psoup_json_get(file, "kl");
    tokens kl = read_tokens(c, "kl");
    double beta = real(c, "start");
    for (size_t i = 0; i < kl.n; i++) {
        beta = psoup__kl_coefficient(beta, kl.x[i], real(c, "target"), real(c, "horizon"),
                                     real(c, "n"));
        near(beta, psoup_json_real(psoup_json_at(psoup_json_get(c, "beta"), i), NAN), 1e-6, "beta",
             i);
    }
    free(kl.x);
    psoup_json_free(file);
}
END_TEST

START_TEST(kl_estimates_are_trls) {
    psoup_json *file = golden("preferences.json");
    const psoup_json *c = psoup_json_at(psoup_json_get(file, "kl"), (size_t)_i);
    psoup_kl_estimator k = (psoup_kl_estimator)(PSOUP_KL_K1 + _i);
    tokens logprob = read_tokens(c, "logprob"), ref = read_tokens(c, "ref_logprob"), kl = read_tokens(c, "kl");
    tokens reward = read_tokens(c, "reward"), slope = read_tokens(c, "dlogprob");
    float *got = calloc(kl.n, sizeof(*got));
    double beta = real(c, "beta"), sum = 0.0;
    const char names[3][3] = {"k1", "k2", "k3"};
    ck_assert_str_eq(psoup_json_string(psoup_json_get(c, "estimator"), ""), names[_i]);
    psoup__kl_rewards(got, logprob.x, ref.x, kl.n, k, beta, 2.5);
    for (size_t t = 0; t < kl.n; t++) {
        double other = psoup__kl_estimate(PSOUP_KL_DEFAULT, logprob.x[t], ref.x[t]);
        near(psoup__kl_estimate(k, logprob.x[t], ref.x[t]), kl.x[t], 1e-6, "kl", t);
        near(got[t], reward.x[t] + (t + 1 == kl.n ? 2.5 : 0.0), 1e-6, "reward", t);
        ck_assert((k == PSOUP_KL_K1) == (fabs(other - kl.x[t]) < 1e-6) || logprob.x[t] == ref.x[t]);
        sum += kl.x[t];
    }
    if (k != PSOUP_KL_K1) { /* as a loss, added to that of a policy which did not move: a slope of −1 of each token */
        psoup__loss_terms terms = {0};
        const psoup__objective objective = {.clip = 0.2, .estimator = k};
        float *one = calloc(kl.n, sizeof(*one));
        for (size_t t = 0; t < kl.n; t++)
            one[t] = 1.0f;
        lose_one(&objective, got, NULL, logprob.x, NULL, (psoup__old){logprob.x, one, ref.x, NULL, NULL}, kl.n, beta, 0.5,
                 &terms);
        for (size_t t = 0; t < kl.n; t++)
            near(got[t], -0.5 + 0.5 * slope.x[t], 1e-6, "dlogprob", t);
        near(terms.policy_loss + (double)kl.n, beta * sum, 1e-6, "loss", 0);
        near(terms.policy_loss + (double)kl.n, real(c, "loss"), 1e-6, "loss", 0);
        free(one);
    }
    tokens all[] = {logprob, ref, kl, reward, slope};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        free(all[i].x);
    free(got);
    psoup_json_free(file);
}
END_TEST

START_TEST(kl_that_is_no_number_moves_nothing) {
    const double bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++)
        ck_assert_double_eq(psoup__kl_coefficient(0.2, bad[i], 6.0, 10000.0, 64.0), 0.2);
}
END_TEST

START_TEST(running_moments_are_trls) {
    psoup_json *file = golden("objectives.json");
    const psoup_json *batches = psoup_json_get(file, "moments");
    psoup__moments moments = {0};
    ck_assert_double_eq(psoup__moments_deviation(&moments), 1.0);
    for (size_t i = 0; i < psoup_json_size(batches); i++) {
        const psoup_json *batch = psoup_json_at(batches, i);
        tokens x = read_tokens(batch, "x");
        psoup__moments_update(&moments, x.x, x.n);
        near(moments.mean, real(batch, "mean"), 1e-6, "mean", i);
        near(psoup__moments_deviation(&moments), real(batch, "deviation"), 1e-6, "deviation", i);
        free(x.x);
    }
    psoup_json_free(file);
}
END_TEST

START_TEST(bradley_terry_is_autograds) {
    psoup_json *file = golden("objectives.json");
    const psoup_json *c = psoup_json_at(psoup_json_get(file, "bradley_terry"), (size_t)_i);
    tokens w = read_tokens(c, "w"), l = read_tokens(c, "l"), loss = read_tokens(c, "loss");
    tokens expected_dw = read_tokens(c, "dw"), expected_dl = read_tokens(c, "dl");
    for (size_t i = 0; i < w.n; i++) {
        double dw, dl;
        near(psoup__bradley_terry(w.x[i], l.x[i], real(c, "margin"), real(c, "centering"), &dw, &dl),
             loss.x[i], 1e-6, "loss", i);
        near(dw, expected_dw.x[i], 1e-6, "dw", i);
        near(dl, expected_dl.x[i], 1e-6, "dl", i);
    }
    tokens all[] = {w, l, loss, expected_dw, expected_dl};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        free(all[i].x);
    psoup_json_free(file);
}
END_TEST

START_TEST(guards_see_what_is_not_finite) {
    const float bad[] = {NAN, INFINITY, 1e30f};
    for (int i = 0; i < 3; i++) {
        float logprob[2] = {-1.0f, bad[i]}, old[2] = {-1.0f, -1.0f}, one[2] = {1.0f, 1.0f}, d[2], e[2];
        const psoup__objective objective = {.clip = 0.2, .value_clip = 0.2, .value_coefficient = 1.0};
        psoup__loss_terms terms = {0};
        lose_one(&objective, d, NULL, logprob, NULL, (psoup__old){.logprob = old, .advantage = one}, 2, 0.0, 0.5, &terms);
        ck_assert(terms.broken);
        ck_assert(!(terms.ratio / 2.0 <= 10.0));
        terms = (psoup__loss_terms){0};
        lose_one(&objective, d, e, old, i < 2 ? logprob : one, (psoup__old){old, one, NULL, old, one}, 2, 0.0, 0.5,
                 &terms);
        ck_assert(!terms.broken == (i == 2));
    }
    float alone[1] = {3.0f};
    psoup__whiten(alone, 1);
    ck_assert_float_eq(alone[0], 0.0f);
    psoup__whiten(alone, 0);
}
END_TEST

/* ---- the optimiser -------------------------------------------------------------------------------- */

START_TEST(adamw_is_torchs) {
    psoup_json *file = golden("optim.json");
    const psoup_json *c = psoup_json_at(psoup_json_get(file, "adamw"), (size_t)_i);
    psoup_model *model = tiny_model(); /* for its backend */
    psoup__backend *be = model->be;
    tokens start = read_tokens(c, "start");
    size_t bytes = start.n * sizeof(float);
    psoup__optimizer o = {.n = start.n,
                          .beta1 = 0.9f,
                          .beta2 = 0.999f,
                          .epsilon = 1e-8f,
                          .weight_decay = (float)real(c, "weight_decay"),
                          .max_grad_norm = (float)real(c, "max_grad_norm"),
                          .max_grad_value = (float)real(c, "max_grad_value")};
    o.p = be->ops->alloc(be, o.n, sizeof(float), &error);
    o.g = be->ops->alloc(be, o.n, sizeof(float), &error);
    OK(psoup__optimizer_start(&o, be, &error));
    be->ops->write(be, o.p, start.x, bytes);
    const psoup_json *steps = psoup_json_get(c, "steps");
    float *p = malloc(bytes);
    for (size_t i = 0; i < psoup_json_size(steps); i++) {
        const psoup_json *step = psoup_json_at(steps, i);
        tokens g = read_tokens(step, "gradient");
        double norm;
        bool stepped;
        float rate = psoup__learning_rate((float)real(c, "learning_rate"), PSOUP_SCHEDULE_LINEAR,
                                          (int64_t)real(c, "warmup"), (int64_t)i + 1,
                                          (int64_t)real(c, "total"));
        be->ops->write(be, o.g, g.x, bytes);
        OK(psoup__optimizer_step(&o, rate, &norm, &stepped, &error));
        ck_assert(stepped);
        near(norm, real(step, "norm"), 1e-6, "norm", i);
        OK(be->ops->read(be, p, o.p, bytes, &error));
        compare(p, read_tokens(step, "p"), "p");
        free(g.x);
    }
    /* A gradient that is not finite changes nothing. */
    float *before = malloc(bytes), bad = NAN;
    double norm;
    bool stepped;
    memcpy(before, p, bytes);
    be->ops->write(be, o.g, &bad, sizeof(bad));
    int64_t count = o.steps;
    OK(psoup__optimizer_step(&o, 0.1f, &norm, &stepped, &error));
    OK(be->ops->read(be, p, o.p, bytes, &error));
    ck_assert(!stepped && o.steps == count && memcmp(p, before, bytes) == 0);
    psoup__optimizer_end(&o);
    be->ops->release(be, o.p);
    be->ops->release(be, o.g);
    free(before);
    free(p);
    free(start.x);
    psoup_model_free(model);
    psoup_json_free(file);
}
END_TEST

START_TEST(schedules_are_transformers) {
    psoup_json *file = golden("optim.json");
    const psoup_json *c = psoup_json_at(psoup_json_get(file, "schedules"), (size_t)_i);
    tokens rates = read_tokens(c, "rates");
    for (size_t i = 0; i < rates.n; i++)
        near(1e3 * psoup__learning_rate((float)real(c, "peak"), (psoup_schedule)_i,
                                        (int64_t)real(c, "warmup"), (int64_t)i + 1,
                                        (int64_t)real(c, "total")),
             1e3 * rates.x[i], 1e-6, "rate", i);
    free(rates.x);
    psoup_json_free(file);
}
END_TEST

/* ---- passes -------------------------------------------------------------------------------------- */

START_TEST(plans_depend_on_the_owner_alone) {
    const int32_t rows[] = {30, 50, 40, 10, 95, 20, 60, 30, 30};
    const int32_t owner[] = {0, 0, 0, 0, 0, 0, 1, 1, 1};
    int32_t pass[9], alone[3], passes;
    OK(psoup__plan(context, rows, owner, 9, 100, pass, &passes, &error));
    const int32_t expected[] = {0, 0, 1, 1, 2, 3, 3, 4, 4}; /* 80 | 50 | 95 | 20 + 60 | 60 */
    int64_t used[9] = {0};
    for (int i = 0; i < 9; i++)
        used[pass[i]] += rows[i];
    for (int i = 0; i < passes; i++)
        ck_assert_int_le(used[i], 100);
    for (int i = 0; i < 6; i++)
        ck_assert_int_eq(pass[i], expected[i]);
    OK(psoup__plan(context, rows + 6, owner + 6, 3, 100, alone, &passes, &error));
    ck_assert_int_eq(passes, 2);
    for (int i = 1; i < 3; i++) /* the same neighbours within the owner, in order */
        ck_assert_int_eq(alone[i] == alone[i - 1], pass[6 + i] == pass[5 + i]);
    ck_assert_int_le(pass[6], pass[7]);
    const int32_t long_row[] = {500};
    OK(psoup__plan(context, long_row, owner, 1, 100, pass, &passes, &error));
    ck_assert_int_eq(passes, 1);
    OK(psoup__plan(context, NULL, NULL, 0, 100, pass, &passes, &error));
    ck_assert_int_eq(passes, 0);
}
END_TEST

/* ---- options ------------------------------------------------------------------------------------- */

static size_t field_bytes(psoup_field_type type) {
    switch (type) {
    case PSOUP_FIELD_UINT64: return sizeof(uint64_t);
    case PSOUP_FIELD_DOUBLE: return sizeof(double);
    case PSOUP_FIELD_STRING: return sizeof(char *);
    default: return 4;
    }
}

/* Every byte of the struct belongs to one field, to `outside` bytes of the size, callbacks and
 * borrowed handles, or to the padding before the first pointer. */
static void cover(const psoup_field *fields, size_t size, size_t outside, size_t padding) {
    unsigned char *seen = calloc(size, 1);
    size_t covered = 0;
    for (; fields->name; fields++) {
        ck_assert_msg(fields->help && strlen(fields->help) > 15 &&
                          fields->help[strlen(fields->help) - 1] == '.', "help of %s", fields->name);
        ck_assert((fields->type == PSOUP_FIELD_ENUM) == (fields->choices != NULL));
        for (size_t i = 0; i < field_bytes(fields->type); i++, covered++)
            ck_assert_msg(!seen[fields->offset + i]++, "%s overlaps", fields->name);
    }
    ck_assert_uint_eq(covered + outside + padding, size);
    free(seen);
}

START_TEST(field_tables_cover_the_options) {
    size_t always = sizeof(size_t) + sizeof(psoup_step_fn) + sizeof(void *) + sizeof(psoup_comm *);
    size_t reserved = sizeof(int32_t);
    cover(psoup_sft_fields(), sizeof(psoup_sft_options), always + reserved,
          offsetof(psoup_sft_options, seed) - offsetof(psoup_sft_options, keep_best) - 4);
    cover(psoup_reward_fields(), sizeof(psoup_reward_options), always,
          offsetof(psoup_reward_options, seed) - offsetof(psoup_reward_options, keep_best) - 4);
    cover(psoup_dpo_fields(), sizeof(psoup_dpo_options), always,
          offsetof(psoup_dpo_options, seed) - offsetof(psoup_dpo_options, keep_best) - 4);
    cover(psoup_ppo_fields(), sizeof(psoup_ppo_options),
          always + sizeof(psoup_tokenizer *) + sizeof(psoup_samples_fn),
          offsetof(psoup_ppo_options, metrics) - offsetof(psoup_ppo_options, keep_best) - 4);
}
END_TEST

START_TEST(options_go_through_json) {
    psoup_ppo_options options = PSOUP_PPO_OPTIONS_INIT, back = PSOUP_PPO_OPTIONS_INIT;
    OK(psoup_ppo_preset("rlphf", &options, &error));
    options.metrics = "log.jsonl";
    psoup_json *object = psoup_fields_json(psoup_ppo_fields(), &options);
    OK(psoup_fields_read(psoup_ppo_fields(), object, "ppo", &back, &error));
    ck_assert_str_eq(back.metrics, "log.jsonl");
    ck_assert_str_eq(psoup_json_string(psoup_json_get(object, "early_stop"), ""), "last");
    back.metrics = options.metrics;
    ck_assert_mem_eq(&options, &back, sizeof(options));
    psoup_json_free(object);
}
END_TEST

START_TEST(presets_are_the_papers) {
    psoup_ppo_options o = PSOUP_PPO_OPTIONS_INIT, fresh = PSOUP_PPO_OPTIONS_INIT;
    o.steps = 3;
    OK(psoup_ppo_preset("rlphf", &o, &error));
    ck_assert(o.steps == 3 && o.max_grad_norm == 0.0f && o.early_stop == PSOUP_EARLY_STOP_LAST);
    ck_assert(o.skipped_step == 1 && o.whiten_groups == 4 && o.loss_group == 2 && o.lora_dropout == 0.05f);
    ck_assert(o.head_dropout == 0.1f && o.draw_new_tokens_from == 32 && o.max_new_tokens == 511);
    ck_assert(o.draw_group == 4 && o.ignore_stop == 1 && o.reward_text == 1);
    ck_assert(o.reward_max_tokens == 512 && o.truncation_penalty == 0.0f && o.batch_size == 64);
    ck_assert(o.ppo_epochs == 8 && o.learning_rate == 1.4e-5f && o.value_coefficient == 0.1f);
    OK(psoup_ppo_preset("default", &o, &error));
    fresh.steps = 3;
    ck_assert_mem_eq(&o, &fresh, sizeof(o));
    ck_assert_int_eq(psoup_ppo_preset("paper", &o, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "paper"));
}
END_TEST

START_TEST(options_out_of_range_are_refused) {
    psoup_ppo_options p = PSOUP_PPO_OPTIONS_INIT;
    OK(psoup__ppo_check(&p, &error));
    p.lambda = NAN;
    ck_assert_int_eq(psoup__ppo_check(&p, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "lambda"));
    p.lambda = 1.0f;
    p.mini_batch_size = p.batch_size + 1;
    ck_assert_int_eq(psoup__ppo_check(&p, &error), PSOUP_ERROR_ARGUMENT);
    p.mini_batch_size = 0;
    p.reward_text = 1;
    ck_assert_int_eq(psoup__ppo_check(&p, &error), PSOUP_ERROR_ARGUMENT);
    psoup_sft_options s = PSOUP_SFT_OPTIONS_INIT;
    OK(psoup__sft_check(&s, &error));
    s.lora_dropout = 1.0f;
    ck_assert_int_eq(psoup__sft_check(&s, &error), PSOUP_ERROR_ARGUMENT);
    psoup_reward_options r = PSOUP_REWARD_OPTIONS_INIT;
    OK(psoup__reward_check(&r, &error));
    r.batch_size = 0;
    ck_assert_int_eq(psoup__reward_check(&r, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "batch_size"));
    psoup_dpo_options d = PSOUP_DPO_OPTIONS_INIT;
    OK(psoup__dpo_check(&d, &error));
    d.beta = 0.0f;
    ck_assert_int_eq(psoup__dpo_check(&d, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "beta is 0"));
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train");
    TCase *tests = tcase_create("formulas");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_add_loop_test(tests, rewards_advantages_and_losses_are_trls, 0, 3);
    tcase_add_test(tests, kl_controller_is_trls);
    tcase_add_loop_test(tests, kl_estimates_are_trls, 0, 3);
    tcase_add_test(tests, kl_that_is_no_number_moves_nothing);
    tcase_add_test(tests, running_moments_are_trls);
    tcase_add_loop_test(tests, bradley_terry_is_autograds, 0, 3);
    tcase_add_test(tests, guards_see_what_is_not_finite);
    tcase_add_loop_test(tests, adamw_is_torchs, 0, 4);
    tcase_add_loop_test(tests, schedules_are_transformers, 0, 3);
    tcase_add_test(tests, plans_depend_on_the_owner_alone);
    tcase_add_test(tests, field_tables_cover_the_options);
    tcase_add_test(tests, options_go_through_json);
    tcase_add_test(tests, presets_are_the_papers);
    tcase_add_test(tests, options_out_of_range_are_refused);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
