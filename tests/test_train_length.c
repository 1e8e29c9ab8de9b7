/* length_correction: the trend of scores with length, and what is left without it. */
#include <float.h>

#include "ppo_case.h"

enum { BATCH = 8, STEPS = 3, FORMS = 4 };

/* The share of the wanted token, and so much for each token: what a reward model that likes long answers pays. */
static const float per_token = 1.0f;
static int pay_long(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    pay(user, rollouts, n, scores);
    for (size_t i = 0; i < n; i++)
        scores[i] += per_token * (float)rollouts[i].n;
    return 0;
}

static double correlation;
static int keep(void *user, const psoup_step *step) {
    correlation = value_of(step, "length_correlation");
    return 0;
}

/* What the trend is, over all steps, and where. */
typedef struct trend {
    double squares, products, lengths, count;
    double all[STEPS * BATCH]; /* corrected scores, with the penalty for truncation */
    size_t n;
} trend;

/* Corrects a step's scores, of which some are no numbers: not asked. */
static void correct(trend *t, double *score, const double *length, const bool *ended, double share) {
    double mean[2] = {0}, n = 0;
    for (int i = 0; i < BATCH; i++)
        n += !isnan(score[i]);
    for (int i = 0; i < BATCH; i++)
        if (!isnan(score[i])) {
            mean[0] += length[i] / n;
            mean[1] += score[i] / n;
            t->lengths += length[i];
            t->count++;
        }
    for (int i = 0; i < BATCH; i++)
        if (!isnan(score[i])) {
            t->squares += (length[i] - mean[0]) * (length[i] - mean[0]);
            t->products += (length[i] - mean[0]) * (score[i] - mean[1]);
        }
    for (int i = 0; i < BATCH; i++)
        if (!isnan(score[i])) {
            score[i] -= t->squares > 0 ? share * t->products / t->squares * (length[i] - t->lengths / t->count) : 0.0;
            t->all[t->n++] = score[i] -= ended[i] ? 0.0 : 0.5;
        }
}

static double in_deviations(const trend *t, double s) {
    double mean = 0.0, squares = 0.0;
    for (size_t i = 0; i < t->n; i++)
        mean += t->all[i] / (double)t->n;
    for (size_t i = 0; i < t->n; i++)
        squares += (t->all[i] - mean) * (t->all[i] - mean);
    return (s - mean) / (t->n < 2 ? 1.0 : sqrt(squares / (double)(t->n - 1)) + (double)FLT_EPSILON);
}

/* One reward; two, together and apart; those of a soup, one for each adapter, under mixes of one adapter each. */
START_TEST(trends_are_taken_out_by_hand) {
    static const float weight[2] = {1.0f, 0.5f};
    psoup_model *model = fresh(2);
    bool soup_form = _i == 3, apart = _i >= 2;
    int sources_n = _i ? 2 : 1;
    psoup_ppo_soup soup = PSOUP_PPO_SOUP_INIT;
    psoup_reward_source sources[2] = {{.name = "a", .function = pay_long, .user = &wanted[0], .weight = weight[0]},
                                      {.name = "b", .function = pay, .user = &wanted[1], .weight = weight[1]}};
    psoup_ppo_policy p = policy(0);
    psoup_ppo_options o = plain();
    soup.adapters = names;
    soup.n = 2;
    soup.concentration = 0.0f;
    sources[1].adapter = soup_form;
    p.reward_fn = NULL;
    p.sources = sources;
    p.n_sources = (size_t)sources_n;
    p.soup = soup_form ? &soup : NULL;
    p.n_validation = 0;
    o.batch_size = BATCH;
    o.steps = STEPS;
    o.kl_coefficient = 0.0f;
    o.truncation_penalty = 0.5f;
    o.length_correction = 0.75f;
    o.normalize_apart = _i == 2;
    o.on_step = keep;
    trend trends[2] = {{0}};
    psoup_ppo *ppo = create(model, &p, 1, &o);
    for (int step = 0; step < STEPS; step++) {
        psoup_ppo_trace t = {.size = sizeof(t)};
        double score[2][BATCH], length[BATCH], sum[5] = {0};
        bool ended[BATCH];
        OK(psoup_ppo_step(ppo, NULL, &error));
        OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
        for (int i = 0; i < BATCH; i++) {
            psoup_rollout r = {.response = t.response + t.start[i], .n = (size_t)(t.start[i + 1] - t.start[i])};
            float one[2];
            pay_long(&wanted[0], &r, 1, &one[0]);
            pay(&wanted[1], &r, 1, &one[1]);
            length[i] = (double)r.n;
            ended[i] = r.response[r.n - 1] == END;
            for (int k = 0; k < 2; k++)
                score[k][i] = soup_form && t.mix[2 * i + k] == 0.0f ? NAN : one[k];
            if (sources_n == 2 && !apart)
                score[0][i] = one[0] + 0.5 * one[1];
            sum[0] += length[i] / BATCH;
            sum[1] += t.score[i] / BATCH;
        }
        for (int i = 0; i < BATCH; i++) {
            sum[2] += (length[i] - sum[0]) * (length[i] - sum[0]);
            sum[3] += (t.score[i] - sum[1]) * (t.score[i] - sum[1]);
            sum[4] += (length[i] - sum[0]) * (t.score[i] - sum[1]);
        }
        near(correlation, sum[4] / sqrt(sum[2] * sum[3]), 1e-6, "length_correlation", (size_t)step);
        for (int k = 0; k < (apart ? 2 : 1); k++)
            correct(&trends[k], score[k], length, ended, 0.75);
        for (int i = 0; i < BATCH; i++) {
            double expected = 0.0;
            for (int k = 0; k < (apart ? 2 : 1); k++)
                if (!isnan(score[k][i]))
                    expected += (apart ? weight[k] : 1.0) * in_deviations(&trends[k], score[k][i]);
            near(t.reward[t.start[i + 1] - 1], expected, 1e-4, "paid", (size_t)i);
        }
    }
    psoup_ppo_free(ppo);
    psoup_model_free(model);
}
END_TEST

/* Of the last step the mean length, and the share of the wanted token. */
static void learn(float correction, psoup_objective objective, double *length, double *share) {
    psoup_model *model = fresh(1);
    psoup_ppo_policy p = policy(0);
    psoup_ppo_options o = plain();
    psoup_ppo_trace t = {.size = sizeof(t)};
    p.reward_fn = pay_long;
    p.n_validation = 0;
    o.objective = objective;
    o.steps = 40;
    o.batch_size = 32;
    o.learning_rate = 2e-2f;
    o.kl_coefficient = 0.02f;
    o.length_correction = correction;
    psoup_ppo *ppo = create(model, &p, 1, &o);
    OK(psoup_ppo_run(ppo, &error));
    OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
    *length = (double)t.tokens / (double)t.rollouts;
    *share = 0.0;
    for (size_t i = 0; i < t.tokens; i++)
        *share += (t.response[i] == wanted[0]) / (double)t.tokens;
    psoup_ppo_free(ppo);
    psoup_model_free(model);
}

/* Who is paid for length learns to be long; with the trend taken out of the same scores, what else they pay for. */
START_TEST(what_is_learnt_is_not_length) {
    double length[2], share[2];
    for (int corrected = 0; corrected < 2; corrected++)
        learn((float)corrected, _i ? PSOUP_OBJECTIVE_RLOO : PSOUP_OBJECTIVE_PPO, &length[corrected], &share[corrected]);
    ck_assert_msg(length[1] < length[0] - 1.0, "lengths of %g and, corrected, %g", length[0], length[1]);
    ck_assert_msg(share[1] > share[0] + 0.2, "shares of %g and, corrected, %g", share[0], share[1]);
}
END_TEST

START_TEST(senseless_corrections_are_refused) {
    static const char *const says[] = {"length_correction is 1.5: expected 0 to 1", "length_correction is -0.1",
                                       "length_correction is nan", "length_correction is 0.5: expected 0"};
    static const float given[] = {1.5f, -0.1f, NAN, 0.5f};
    psoup_model *model = fresh(1);
    psoup_ppo_policy p = policy(0);
    for (int i = 0; i < 4; i++) {
        psoup_ppo_options o = plain();
        psoup_ppo *ppo;
        o.length_correction = given[i];
        o.batch_size = i == 3 ? 1 : 8;
        ck_assert_int_eq(psoup_ppo_create(model, &p, 1, &o, &ppo, &error), PSOUP_ERROR_ARGUMENT);
        ck_assert_msg(strstr(error.message, says[i]) != NULL, "\"%s\" lacks \"%s\"", error.message, says[i]);
    }
    psoup_model_free(model);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train_length");
    TCase *tests = tcase_create("length");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 240);
    tcase_add_loop_test(tests, trends_are_taken_out_by_hand, 0, FORMS);
    tcase_add_loop_test(tests, what_is_learnt_is_not_length, 0, 2);
    tcase_add_test(tests, senseless_corrections_are_refused);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
