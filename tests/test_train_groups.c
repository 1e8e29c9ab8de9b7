/* RLOO and GRPO: their advantages and losses against trl's, what their first step's gradient is, what they
 * learn, and that policies side by side are as alone. */
#include "ppo_case.h"

static const psoup_objective objectives[2] = {PSOUP_OBJECTIVE_RLOO, PSOUP_OBJECTIVE_GRPO};

/* ---- formulas ------------------------------------------------------------------------------------ */

enum { MOST = 32 };

/* A group's advantages. */
static void compare(bool rloo, psoup_scale_rewards scale, double *advantage, const double *reward, size_t k) {
    (rloo ? psoup__leave_one_out : psoup__group_centre)(advantage, reward, k);
    if (!rloo && scale == PSOUP_SCALE_GROUP)
        psoup__scale_advantages(advantage, k, psoup__reward_deviation(reward, k));
}

/* A response's loss and gradient as the library adds them up. */
static void lose(bool rloo, float *dlogprob, const float *logprob, const float *old, const float *ref,
                 float advantage, size_t n, double beta, double clip, double scale,
                 psoup__loss_terms *terms) {
    const psoup__objective objective = {.clip = clip, .whole = rloo, .estimator = PSOUP__K3};
    float same[MOST];
    for (size_t t = 0; t < n; t++)
        same[t] = advantage;
    lose_one(&objective, dlogprob, NULL, logprob, NULL, (psoup__old){old, same, rloo ? NULL : ref, NULL, NULL}, n, beta,
             scale, terms);
}

START_TEST(advantages_and_losses_are_trls) {
    psoup_json *file = golden("preferences.json");
    const psoup_json *c = psoup_json_at(psoup_json_get(file, "groups"), (size_t)_i);
    const char *const keys[] = {"lengths", "score", "logprob", "ref_logprob", "new_logprob",
                                "advantage", "advantage32", "dlogprob"};
    bool rloo = strcmp(psoup_json_string(psoup_json_get(c, "kind"), ""), "rloo") == 0;
    const char *scaled = psoup_json_string(psoup_json_get(c, "scale"), "");
    float *x[8], dlogprob[MOST], reward[MOST];
    double sums[MOST], advantage[MOST], loss = 0.0, beta = real(c, "beta");
    size_t n, total, k = (size_t)real(c, "k"), at = 0;
    for (int i = 0; i < 8; i++)
        x[i] = floats(c, keys[i], &total);
    free(floats(c, "score", &n));
    for (size_t i = 0; i < n; at += (size_t)x[0][i++]) {
        psoup__kl_rewards(reward, x[2] + at, x[3] + at, (size_t)x[0][i], PSOUP_KL_DEFAULT, rloo ? beta : 0.0,
                          x[1][i]);
        sums[i] = 0.0;
        for (size_t t = 0; t < (size_t)x[0][i]; t++)
            sums[i] += reward[t];
    }
    for (size_t i = 0; i < n; i += k)
        compare(rloo, strcmp(scaled, "group") == 0 ? PSOUP_SCALE_GROUP : PSOUP_SCALE_NONE, advantage + i, sums + i, k);
    if (strcmp(scaled, "batch") == 0)
        psoup__scale_advantages(advantage, n, psoup__reward_deviation(sums, n));
    at = 0;
    for (size_t i = 0; i < n; i++) {
        size_t length = (size_t)x[0][i];
        psoup__loss_terms terms = {0};
        double scale = 1.0 / (double)(rloo ? n : n * length);
        near(advantage[i], x[5][i], 1e-6, "advantage", i);
        lose(rloo, dlogprob, x[4] + at, x[2] + at, x[3] + at, x[6][i], length, beta, real(c, "clip"),
             scale, &terms);
        ck_assert_uint_eq((size_t)terms.tokens, length);
        ck_assert_uint_eq((size_t)terms.ratios, rloo ? 1 : length);
        loss += terms.policy_loss * scale;
        for (size_t t = 0; t < length; t++)
            near(dlogprob[t], x[7][at + t], 1e-6, "dlogprob", at + t);
        at += length;
    }
    ck_assert_uint_eq(at, total);
    near(loss, real(c, "loss"), 1e-6, "loss", 0);
    for (int i = 0; i < 8; i++)
        free(x[i]);
    psoup_json_free(file);
}
END_TEST

START_TEST(gradients_are_what_differences_say) {
    psoup__random random = {5, 0, 0};
    for (int round = 0; round < 40; round++) {
        float old[4], ref[4], logprob[4], d[4], none[4], advantage = round % 2 ? 0.7f : -1.3f;
        double h = 1.0 / 1024.0;
        for (int t = 0; t < 4; t++) {
            old[t] = -1.0f - (float)psoup__random_below(&random, 512) / 256.0f;
            ref[t] = -1.0f - (float)psoup__random_below(&random, 512) / 256.0f;
            logprob[t] = old[t] + ((float)psoup__random_below(&random, 64) - 32.0f) / 1024.0f;
        }
        for (int rloo = 0; rloo < 2; rloo++) {
            psoup__loss_terms terms = {0};
            lose(rloo, d, logprob, old, ref, advantage, 4, 0.3, 0.2, 1.0, &terms);
            for (int t = 0; t < 4; t++) {
                psoup__loss_terms side[2] = {{.tokens = 0}, {.tokens = 0}};
                float kept = logprob[t];
                for (int s = 0; s < 2; s++) {
                    logprob[t] = kept + (float)(s ? h : -h);
                    lose(rloo, none, logprob, old, ref, advantage, 4, 0.3, 0.2, 1.0, &side[s]);
                }
                logprob[t] = kept;
                near(d[t], (side[1].policy_loss - side[0].policy_loss) / (2.0 * h), 1e-5, "slope",
                     (size_t)t);
            }
        }
    }
}
END_TEST

START_TEST(guards_see_what_is_not_finite) {
    const float bad[] = {NAN, INFINITY, 1e30f};
    float one[2] = {-1.0f, -1.0f}, d[2];
    for (int i = 0; i < 3; i++) {
        float logprob[2] = {-1.0f, bad[i]};
        psoup__loss_terms terms = {0};
        lose(true, d, logprob, one, NULL, 1.0f, 2, 0.0, 0.2, 0.5, &terms);
        ck_assert(terms.broken && !(terms.ratio <= 10.0));
        terms = (psoup__loss_terms){0};
        lose(false, d, one, one, logprob, 1.0f, 2, 0.1, 0.2, 0.5, &terms);
        ck_assert(terms.broken);
    }
    double same[3] = {2.0, 2.0, 2.0}, advantage[3];
    compare(false, PSOUP_SCALE_GROUP, advantage, same, 3);
    ck_assert(advantage[0] == 0.0 && advantage[1] == 0.0 && advantage[2] == 0.0);
}
END_TEST

/* ---- runs ---------------------------------------------------------------------------------------- */

static psoup_ppo_options grouped(psoup_objective objective) {
    psoup_ppo_options o = plain();
    o.objective = objective;
    o.group_size = 4;
    o.kl_coefficient = 0.05f;
    return o;
}

START_TEST(reward_rises) {
    seen s = {0};
    psoup_model *model = fresh(1);
    psoup_ppo_policy p = policy(0);
    psoup_ppo_options o = grouped(objectives[_i]);
    o.steps = 30;
    o.batch_size = 32;
    o.ppo_epochs = 2;
    o.learning_rate = 2e-2f;
    o.kl_coefficient = 0.02f;
    o.validate_every = 5;
    o.on_step = watch;
    o.user = &s;
    psoup_ppo *ppo = create(model, &p, 1, &o);
    OK(psoup_ppo_run(ppo, &error));
    ck_assert_msg(s.last > s.first + 0.3, "reward %g, then %g", s.first, s.last);
    ck_assert_int_eq(s.validations, 6);
    ck_assert_double_gt(s.best, 0.4);
    psoup_ppo_free(ppo);
    psoup_model_free(model);
}
END_TEST

/* A group is one prompt, answered from different random words; its advantages are what its rewards say and
 * sum to 0; there is no critic; before any update the ratio is 1, bit for bit. */
START_TEST(groups_are_compared) {
    psoup_model *model = fresh(1);
    psoup_ppo_policy p = policy(0);
    psoup_ppo_options o = grouped(objectives[_i]);
    psoup_ppo_trace t = {.size = sizeof(t)};
    psoup_ppo *ppo = create(model, &p, 1, &o);
    psoup__policy *inside = &ppo->policies[0];
    const psoup_ppo_prompt *last = NULL;
    int differ = 0;
    ck_assert_ptr_null(inside->parts[0].adapter->head);
    for (int step = 0; step < 2; step++) {
        OK(psoup_ppo_step(ppo, NULL, &error));
        OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
        ck_assert_uint_eq(t.rollouts, 8);
        for (size_t g = 0; g < 8; g += 4) {
            double sum = 0.0, reward[4] = {0}, advantage[4];
            for (size_t i = g; i < g + 4; i++) {
                ck_assert_ptr_eq(inside->experience.rollouts.prompt[i],
                                 inside->experience.rollouts.prompt[g]);
                int32_t n = t.start[i + 1] - t.start[i], first = t.start[g + 1] - t.start[g];
                differ += n != first || memcmp(t.response + t.start[i], t.response + t.start[g],
                                               (size_t)n * sizeof(*t.response)) != 0;
                for (int32_t k = t.start[i]; k < t.start[i + 1]; k++) {
                    bool end = k + 1 == t.start[i + 1];
                    reward[i - g] += t.reward[k];
                    if (!end && objectives[_i] == PSOUP_OBJECTIVE_GRPO)
                        ck_assert_float_eq(t.reward[k], 0.0f);
                    ck_assert_float_eq(t.value[k], 0.0f);
                    ck_assert_float_eq(t.first_ratio[k], 1.0f);
                }
            }
            compare(objectives[_i] == PSOUP_OBJECTIVE_RLOO, PSOUP_SCALE_GROUP, advantage, reward, 4);
            for (size_t i = g; i < g + 4; i++) {
                sum += advantage[i - g];
                for (int32_t k = t.start[i]; k < t.start[i + 1]; k++) {
                    near(t.advantage[k], advantage[i - g], 1e-6, "advantage", (size_t)k);
                    near(t.returns[k], reward[i - g], 1e-6, "return", (size_t)k);
                }
            }
            near(sum, 0.0, 1e-9, "sum of a group", g);
            ck_assert_ptr_ne(inside->experience.rollouts.prompt[g], last);
            last = inside->experience.rollouts.prompt[g];
        }
    }
    ck_assert_int_gt(differ, 6);
    psoup_ppo_free(ppo);
    ck_assert_ptr_null(model->adapters[0]->head);
    psoup_model_free(model);
}
END_TEST

/* The first step's gradient against the public gradient of Σ weight · log π, weighted by the formulas. */
START_TEST(gradient_is_the_formulas) {
    psoup_model *model = fresh(1), *before = fresh(1);
    psoup_ppo_policy p = policy(0);
    psoup_ppo_options o = grouped(objectives[_i]);
    psoup_ppo_trace t = {.size = sizeof(t)};
    psoup_gradients *gradients = NULL;
    double norm = 0.0, squares = 0.0;
    float mix[1] = {1.0f}, weight[8 * 20] = {0}, *moved;
    static int32_t rows_tokens[8][20];
    psoup_row rows[8];
    size_t at = 0, count;
    o.ppo_epochs = 1;
    o.max_grad_norm = 0.0f;
    o.on_step = keep_grad_norm;
    o.user = &norm;
    /* Off the reference, so that the KL term has a slope. */
    moved = weights(model, names[0], &count);
    for (size_t i = 0; i < count; i++)
        moved[i] += 0.05f * (float)((int)(i * 7 % 11) - 5);
    model->be->ops->write(model->be, model->adapters[0]->data, moved, count * sizeof(*moved));
    before->be->ops->write(before->be, before->adapters[0]->data, moved, count * sizeof(*moved));
    free(moved);
    psoup_ppo *ppo = create(model, &p, 1, &o);
    OK(psoup_ppo_step(ppo, NULL, &error));
    OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
    for (size_t i = 0; i < 8; i++) {
        const psoup_ppo_prompt *prompt = ppo->policies[0].experience.rollouts.prompt[i];
        size_t n = (size_t)(t.start[i + 1] - t.start[i]);
        memcpy(rows_tokens[i], prompt->tokens, prompt->n * sizeof(int32_t));
        memcpy(rows_tokens[i] + prompt->n, t.response + t.start[i], n * sizeof(int32_t));
        rows[i] = (psoup_row){rows_tokens[i], prompt->n + n, mix};
        at += prompt->n - 1;
        for (int32_t k = t.start[i]; k < t.start[i + 1]; k++)
            weight[at++] = objectives[_i] == PSOUP_OBJECTIVE_RLOO
                               ? -t.advantage[k] / 8.0f
                               : (float)((-t.advantage[k] +
                                          0.05 * (1.0 - exp(t.ref_logprob[k] - t.logprob[k]))) /
                                         (double)t.tokens);
    }
    OK(psoup_model_gradients(before, rows, 8, weight, PSOUP_GRADIENT_ADAPTERS, &gradients, &error));
    static const char *const linears[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                          "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
                                          "mlp.down_proj"};
    for (int i = 0; i < 2 * 7 * 2; i++) {
        char name[128];
        snprintf(name, sizeof(name), "P0/model.layers.%d.%s.lora_%c", i / 14, linears[i / 2 % 7],
                 i % 2 ? 'B' : 'A');
        const float *g = psoup_gradients_get(gradients, name, &count);
        ck_assert_msg(g != NULL, "no gradient of %s", name);
        for (size_t k = 0; k < count; k++)
            squares += (double)g[k] * g[k];
    }
    ck_assert_msg(fabs(norm - sqrt(squares)) < 1e-5 * norm, "norm %g: expected %g", norm, sqrt(squares));
    psoup_gradients_free(gradients);
    psoup_ppo_free(ppo);
    psoup_model_free(before);
    psoup_model_free(model);
}
END_TEST

START_TEST(side_by_side_is_alone) {
    enum { TOGETHER = 3 };
    psoup_model *model = fresh(TOGETHER);
    psoup_ppo_policy all[TOGETHER];
    psoup_ppo_options o = grouped(objectives[_i]);
    float *expected[TOGETHER];
    size_t count[TOGETHER];
    o.mini_batch_size = 3; /* groups are torn, as they may be */
    o.micro_batch_tokens = 40;
    o.lora_dropout = 0.1f;
    o.draw_new_tokens_from = 4;
    for (int p = 0; p < TOGETHER; p++)
        all[p] = policy(p);
    psoup_ppo *ppo = create(model, all, TOGETHER, &o);
    OK(psoup_ppo_run(ppo, &error));
    psoup_ppo_free(ppo);
    for (int p = 0; p < TOGETHER; p++)
        expected[p] = weights(model, names[p], &count[p]);
    psoup_model_free(model);
    tear_down();
    open_context(1);
    for (int p = 0; p < TOGETHER; p++) {
        model = fresh(TOGETHER);
        ppo = create(model, &all[p], 1, &o);
        OK(psoup_ppo_run(ppo, &error));
        ck_assert(same_weights(model, names[p], expected[p], count[p]));
        psoup_ppo_free(ppo);
        psoup_model_free(model);
        free(expected[p]);
    }
}
END_TEST

/* A mini-batch past the ratio's threshold is dropped; a value head that an adapter has from elsewhere is left
 * as it was, decay or not. */
START_TEST(guards_hold_and_heads_are_left_alone) {
    psoup_model *model = fresh(1);
    psoup_ppo_policy p = policy(0);
    psoup_ppo_options o = grouped(objectives[_i]);
    size_t count, head = 17; /* hidden_size and the bias */
    OK(psoup__adapter_add_head(model, model->adapters[0], &error));
    float *before = weights(model, names[0], &count);
    for (size_t i = count - head; i < count; i++)
        before[i] = 1.0f;
    model->be->ops->write(model->be, model->adapters[0]->data, before, count * sizeof(*before));
    o.weight_decay = 0.5f;
    psoup_ppo *ppo = create(model, &p, 1, &o);
    OK(psoup_ppo_step(ppo, NULL, &error));
    psoup_ppo_free(ppo);
    float *after = weights(model, names[0], &count);
    ck_assert_mem_eq(before + count - head, after + count - head, head * sizeof(*after));
    ck_assert_mem_ne(before, after, (count - head) * sizeof(*after));
    seen s = {0};
    o.ratio_threshold = 0.5f;
    o.on_step = watch;
    o.user = &s;
    o.ppo_epochs = 2;
    ppo = create(model, &p, 1, &o);
    OK(psoup_ppo_step(ppo, NULL, &error));
    ck_assert_double_eq(s.skipped, 2.0);
    ck_assert(same_weights(model, names[0], after, count));
    psoup_ppo_free(ppo);
    free(before);
    free(after);
    psoup_model_free(model);
}
END_TEST

static void refused(psoup_ppo_options o, const char *words_in_it) {
    psoup_model *model = fresh(1);
    psoup_ppo_policy p = policy(0);
    psoup_ppo *ppo;
    ck_assert_int_eq(psoup_ppo_create(model, &p, 1, &o, &ppo, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_null(ppo);
    ck_assert_msg(strstr(error.message, words_in_it) != NULL, "%s", error.message);
    psoup_model_free(model);
}

START_TEST(what_cannot_be_is_refused) {
    psoup_ppo_options o = grouped(objectives[_i]);
    o.group_size = 1;
    refused(o, "group_size is 1: expected 2 to");
    o.group_size = 3;
    refused(o, "batch_size is 8: expected a multiple of group_size, 3");
    o.group_size = 4;
    o.objective = 3;
    refused(o, "objective is 3: expected 0 to 2");
    o = grouped(objectives[_i]);
    o.kl_estimator = PSOUP_KL_K1;
    o.scale_rewards = PSOUP_SCALE_NONE;
    refused(o, objectives[_i] == PSOUP_OBJECTIVE_GRPO ? "kl_estimator is k1: expected k2 or k3 with grpo"
                                                      : "scale_rewards is of grpo alone");
    o.kl_estimator = 4;
    refused(o, "kl_estimator is 4: expected 0 to 3");
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train_groups");
    TCase *tests = tcase_create("groups");
    tcase_set_timeout(tests, 120);
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_add_loop_test(tests, advantages_and_losses_are_trls, 0, 6);
    tcase_add_test(tests, gradients_are_what_differences_say);
    tcase_add_test(tests, guards_see_what_is_not_finite);
    tcase_add_loop_test(tests, reward_rises, 0, 2);
    tcase_add_loop_test(tests, groups_are_compared, 0, 2);
    tcase_add_loop_test(tests, gradient_is_the_formulas, 0, 2);
    tcase_add_loop_test(tests, side_by_side_is_alone, 0, 2);
    tcase_add_loop_test(tests, guards_hold_and_heads_are_left_alone, 0, 2);
    tcase_add_loop_test(tests, what_cannot_be_is_refused, 0, 2);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
