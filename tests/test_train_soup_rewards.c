/* Soups trained as one whose adapters have several rewards each. */
#include "ppo_case.h"

enum { ADAPTERS = 3, MOST = 8 };

static psoup_ppo_soup soup_of(size_t n) {
    psoup_ppo_soup soup = PSOUP_PPO_SOUP_INIT;
    soup.adapters = names;
    soup.n = n;
    return soup;
}

static psoup_ppo_policy soup_policy(const psoup_ppo_soup *soup, const psoup_reward_source *sources, size_t n) {
    psoup_ppo_policy p = policy(0);
    p.adapter = "soup";
    p.soup = soup;
    p.reward_fn = NULL;
    p.reward_user = NULL;
    p.sources = sources;
    p.n_sources = n;
    return p;
}

static psoup_reward *headed(psoup_model *model, const char *name, int turn) {
    psoup_reward *reward;
    float head[17];
    OK(psoup_reward_create(model, name, NULL, &reward, &error));
    for (int j = 0; j < 17; j++)
        head[j] = (float)((j * 7 + turn) % 5) - 2.0f;
    model->be->ops->write(model->be, psoup__model_adapter(model, name)->head, head, sizeof(head));
    return reward;
}

/* The prompts, each made for a user: prompt i leaves out adapter i % 3. `per` rewards of each adapter follow one
 * another, and all are named. */
static psoup_reward_input inputs[PROMPTS][MOST];
static psoup_ppo_prompt users[PROMPTS];
static void make_users(size_t per) {
    for (size_t i = 0; i < PROMPTS; i++) {
        users[i] = prompts[i];
        users[i].inputs = inputs[i];
        users[i].n_inputs = 2 * per;
        for (size_t k = 0; k < 2 * per; k++)
            inputs[i][k] = (psoup_reward_input){.reward = (int32_t)((i + 1 + k / per) % ADAPTERS * per + k % per),
                                                .weight = k / per ? 0.25f : 0.75f,
                                                .tokens = prompts[i].tokens,
                                                .n = prompts[i].n};
    }
}

/* What training makes of each adapter; freed by the caller. */
static void train(float *out[ADAPTERS], size_t *count, const float *halves, float concentration, bool plain_form,
                  bool by_models) {
    size_t per = halves ? 2 : 1;
    psoup_model *model = fresh(ADAPTERS);
    psoup_reward *rewards[ADAPTERS];
    psoup_reward_source sources[2 * ADAPTERS];
    static const char *const called[2 * ADAPTERS] = {"a", "b", "c", "d", "e", "f"}, *const models[] = {"R", "S", "T"};
    psoup_ppo_soup soup = soup_of(ADAPTERS);
    psoup_ppo_options o = plain();
    for (int a = 0; a < ADAPTERS; a++)
        rewards[a] = headed(model, models[a], a);
    for (size_t k = 0; k < per * ADAPTERS; k++) {
        bool is_model = by_models || k / per == 1; /* else the second adapter's alone */
        sources[k] = (psoup_reward_source){.name = called[k], .model = is_model ? rewards[k / per] : NULL,
                                           .function = is_model ? NULL : pay, .user = &wanted[k / per],
                                           .weight = halves ? halves[k % 2] : 1.0f, .adapter = (int32_t)(k / per)};
    }
    psoup_ppo_policy p = soup_policy(&soup, sources, per * ADAPTERS);
    if (plain_form) {
        p.sources = NULL;
        p.n_sources = 0;
        p.rewards = rewards;
        p.n_rewards = ADAPTERS;
    }
    make_users(per);
    p.prompts = users;
    soup.concentration = concentration;
    o.lora_dropout = o.head_dropout = 0.1f;
    o.truncation_penalty = 0.25f;
    o.reward_clip = 1.5f;
    o.length_penalty = 0.01f;
    psoup_ppo *ppo = create(model, &p, 1, &o);
    OK(psoup_ppo_run(ppo, &error));
    psoup_ppo_free(ppo);
    for (int a = 0; a < ADAPTERS; a++) {
        out[a] = weights(model, names[a], count);
        psoup_reward_free(rewards[a]);
    }
    psoup_model_free(model);
}

static double distance(float *a[ADAPTERS], float *b[ADAPTERS], size_t count) {
    double most = 0.0;
    for (int k = 0; k < ADAPTERS; k++)
        for (size_t i = 0; i < count; i++) {
            double off = fabs((double)a[k][i] - b[k][i]);
            if (!(off <= most))
                most = off; /* NaN too */
        }
    return most;
}

static void release(float *a[ADAPTERS]) {
    for (int k = 0; k < ADAPTERS; k++)
        free(a[k]);
}

/* One source of weight 1 for each adapter is `rewards`, bit for bit. */
START_TEST(one_source_each_is_the_plain_form) {
    float *expected[ADAPTERS], *got[ADAPTERS];
    size_t count;
    train(expected, &count, NULL, 1.0f, true, true);
    train(got, &count, NULL, 1.0f, false, true);
    ck_assert(distance(expected, got, count) == 0.0);
    release(expected);
    release(got);
}
END_TEST

/* Two copies of a reward, of half its weight each, are that reward: to the bit where a response has one adapter, and
 * to the last digits of a sum where it has two. Two that do not come to 1 are another. */
START_TEST(two_halves_are_one) {
    static const float half[] = {0.5f, 0.5f}, more[] = {0.75f, 0.75f};
    float *expected[ADAPTERS], *got[ADAPTERS], *other[ADAPTERS];
    size_t count;
    float concentration = _i ? 1.0f : 0.0f;
    train(expected, &count, NULL, concentration, false, false);
    train(got, &count, half, concentration, false, false);
    train(other, &count, more, concentration, false, false);
    ck_assert_double_le(distance(expected, got, count), _i ? 1e-6 : 0.0);
    ck_assert_double_gt(distance(expected, other, count), 1e-4);
    release(expected);
    release(got);
    release(other);
}
END_TEST

/* ---- by hand --------------------------------------------------------------------------------------------- */

enum { SOURCES = 5, STEPS = 3, BATCH = 12 };
static const char *const told_name[SOURCES] = {"reward/R", "reward/share", "reward/P1/share", "reward/S", "reward/length"};
static const int32_t owner[SOURCES] = {0, 0, 1, 1, 1};
static const float source_weight[SOURCES] = {0.5f, 2.0f, 1.0f, -0.75f, 0.125f};
static double told[SOURCES + 1];
static int keep(void *user, const psoup_step *step) {
    for (int k = 0; k < SOURCES; k++)
        told[k] = value_of(step, told_name[k]);
    told[SOURCES] = value_of(step, "reward");
    return 0;
}

/* Asked only for responses of adapter P1. */
static int pay_length(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    for (size_t i = 0; i < n; i++) {
        ck_assert_str_eq(rollouts[i].policy, "P1");
        scores[i] = (float)rollouts[i].n;
    }
    *(size_t *)user += n;
    return 0;
}

static float by_model(psoup_reward *reward, const int32_t *tokens, size_t n_tokens, const psoup_rollout *r) {
    int32_t row[32];
    float score;
    memcpy(row, tokens, n_tokens * sizeof(*row));
    memcpy(row + n_tokens, r->response, r->n * sizeof(*row));
    psoup_row rows = {row, n_tokens + r->n, NULL};
    OK(psoup_reward_score(reward, &rows, 1, &score, &error));
    return score;
}

/* s in deviations from the mean of the n scores so far, within ±1.25. */
static double normalised(const double *all, size_t n, double s) {
    double mean = 0.0, squares = 0.0;
    for (size_t i = 0; i < n; i++)
        mean += all[i] / (double)n;
    for (size_t i = 0; i < n; i++)
        squares += (all[i] - mean) * (all[i] - mean);
    return fmin(fmax((s - mean) / sqrt(squares / (double)(n - 1)), -1.25), 1.25);
}

/* Two adapters with two and three rewards, models and functions. Of three prompts one lists no inputs; one names both
 * models and gives R a text of its own; one names R, and of P1 a function, so that S is not asked. */
START_TEST(preferences_have_several_rewards) {
    psoup_model *model = fresh(2);
    psoup_reward *rewards[2] = {headed(model, "R", 0), headed(model, "S", 3)};
    static const int32_t own[] = {9, 3};
    size_t asked = 0, expected_asked = 0;
    psoup_reward_source sources[SOURCES] = {{.model = rewards[0]},
                                            {.name = "share", .function = pay, .user = &wanted[0]},
                                            {.name = "P1/share", .function = pay, .user = &wanted[1]},
                                            {.model = rewards[1]},
                                            {.name = "length", .function = pay_length, .user = &asked}};
    psoup_reward_input both[PROMPTS][2], first[PROMPTS][2];
    psoup_ppo_soup soup = soup_of(2);
    psoup_ppo_policy p = soup_policy(&soup, sources, SOURCES);
    psoup_ppo_options o = plain();
    for (int k = 0; k < SOURCES; k++) {
        sources[k].adapter = owner[k];
        sources[k].weight = source_weight[k];
    }
    for (int i = 0; i < PROMPTS; i++) {
        users[i] = prompts[i];
        users[i].inputs = i % 3 == 1 ? both[i] : i % 3 ? first[i] : NULL;
        users[i].n_inputs = i % 3 ? 2 : 0;
        both[i][0] = first[i][0] = (psoup_reward_input){.reward = 0, .weight = 1.0f, .tokens = own, .n = 2};
        both[i][1] = (psoup_reward_input){3, 2.0f, prompts[i].tokens, prompts[i].n};
        first[i][1] = (psoup_reward_input){.reward = 2, .weight = 0.5f};
    }
    p.prompts = users;
    p.n_validation = 0;
    o.batch_size = BATCH;
    o.steps = STEPS;
    o.reward_clip = 1.25f;
    o.truncation_penalty = 0.5f;
    o.length_penalty = 0.125f;
    o.length_target = 4;
    o.kl_coefficient = 0.0f;
    o.on_step = keep;
    psoup_ppo *ppo = create(model, &p, 1, &o);
    double all[SOURCES][STEPS * BATCH];
    size_t n[SOURCES] = {0};
    for (size_t step = 0; step < STEPS; step++) {
        psoup_ppo_trace t = {.size = sizeof(t)};
        double score[BATCH][SOURCES], sum[SOURCES] = {0}, count[SOURCES] = {0}, reward = 0.0;
        OK(psoup_ppo_step(ppo, NULL, &error));
        OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
        for (size_t i = 0; i < BATCH; i++) {
            const psoup_ppo_prompt *prompt = ppo->policies[0].experience.rollouts.prompt[i];
            const float *mix = t.mix + i * 2;
            int form = (int)(prompt->id % 3);
            psoup_rollout r = {.prompt = prompt, .response = t.response + t.start[i],
                               .n = (size_t)(t.start[i + 1] - t.start[i])};
            float share[2], total = 0.0f;
            bool ended = r.response[r.n - 1] == END;
            ck_assert(mix[0] > 0.0f && mix[1] > 0.0f);
            pay(&wanted[0], &r, 1, &share[0]);
            pay(&wanted[1], &r, 1, &share[1]);
            score[i][0] = by_model(rewards[0], form ? own : prompt->tokens, form ? 2 : prompt->n, &r);
            score[i][1] = share[0];
            score[i][2] = share[1];
            score[i][3] = form == 2 ? NAN : by_model(rewards[1], prompt->tokens, prompt->n, &r);
            score[i][4] = (double)r.n;
            expected_asked++;
            for (int k = 0; k < SOURCES; k++) {
                if (isnan(score[i][k]))
                    continue;
                total += mix[owner[k]] * source_weight[k] * (float)score[i][k];
                sum[k] += score[i][k];
                count[k]++;
                all[k][n[k]++] = score[i][k] -= ended ? 0.0 : 0.5;
            }
            near(t.score[i], total, 1e-5, "score", i);
            reward += t.score[i] / BATCH;
        }
        for (size_t i = 0; i < BATCH; i++) {
            double expected = 0.0, length = t.start[i + 1] - t.start[i];
            for (int k = 0; k < SOURCES; k++)
                if (!isnan(score[i][k]))
                    expected += (double)t.mix[i * 2 + (size_t)owner[k]] * source_weight[k] *
                                normalised(all[k], n[k], score[i][k]);
            expected -= length > 4.0 ? 0.125 * (length - 4.0) : 0.0;
            near(t.reward[t.start[i + 1] - 1], expected, 1e-5, "paid", i);
        }
        for (size_t k = 0; k < SOURCES; k++)
            near(told[k], sum[k] / count[k], 1e-6, "reward/NAME", k);
        near(told[SOURCES], reward, 1e-6, "reward", step);
        ck_assert_double_lt(count[3], count[2]);
    }
    ck_assert_uint_eq(asked, expected_asked);
    psoup_ppo_free(ppo);
    psoup_reward_free(rewards[0]);
    psoup_reward_free(rewards[1]);
    psoup_model_free(model);
}
END_TEST

START_TEST(unsound_rewards_are_refused) {
    static const char *const says[] = {"source 'b' is of adapter 2 of 2", "source 'b' is of adapter -1 of 2",
                                       "no source is of its adapter 'P1'", "names reward 0 twice",
                                       "names reward 3 which its soup does not have",
                                       "prompts[0] has weights 0.5 and 0.25 for adapter 'P0': expected one",
                                       "source 'b' is of adapter 1 of 1"};
    psoup_model *model = fresh(3);
    psoup_ppo_soup soup = soup_of(2);
    for (int i = 0; i < (int)(sizeof says / sizeof *says); i++) {
        psoup_reward_source sources[3] = {{.name = "a", .function = pay, .weight = 1.0f},
                                          {.name = "b", .function = pay, .weight = 1.0f, .adapter = 1},
                                          {.name = "c", .function = pay, .weight = 1.0f}};
        const psoup_reward_input listed[2] = {{.reward = 0, .weight = 0.5f},
                                              {.reward = i == 3 ? 0 : i == 4 ? 3 : 2,
                                               .weight = i == 5 ? 0.25f : 0.5f}};
        psoup_ppo_policy p = soup_policy(&soup, sources, 3);
        psoup_ppo_options o = plain();
        psoup_ppo *ppo;
        users[0] = prompts[0];
        users[0].inputs = i == 6 ? NULL : listed;
        users[0].n_inputs = 2;
        p.prompts = users;
        p.n_prompts = 1;
        sources[1].adapter = i == 0 ? 2 : i == 1 ? -1 : i == 2 ? 0 : 1;
        if (i == 6) {
            p.soup = NULL;
            p.adapter = "P2";
        }
        ck_assert_int_eq(psoup_ppo_create(model, &p, 1, &o, &ppo, &error), PSOUP_ERROR_ARGUMENT);
        ck_assert_msg(strstr(error.message, says[i]) != NULL, "\"%s\" lacks \"%s\"", error.message, says[i]);
    }
    psoup_model_free(model);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train_soup_rewards");
    TCase *tests = tcase_create("soup_rewards");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 240);
    tcase_add_test(tests, one_source_each_is_the_plain_form);
    tcase_add_loop_test(tests, two_halves_are_one, 0, 2);
    tcase_add_test(tests, preferences_have_several_rewards);
    tcase_add_test(tests, unsound_rewards_are_refused);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
