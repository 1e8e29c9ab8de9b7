/* Best of n: what is sampled, what is scored, and which answer wins. */
#include "ppo_case.h"

enum { ASKED = 4, EACH = 6 };

static psoup_sampling sampling;
static psoup_prompt asked[ASKED];
static float mixes[ASKED][4];

/* A model with two adapters that differ, and prompts of which each has its own mix and sequence. */
static psoup_model *world(void) {
    psoup_model *model = fresh(2);
    psoup_sampling defaults = PSOUP_SAMPLING_INIT;
    sampling = defaults;
    sampling.max_new_tokens = 9;
    sampling.seed = 11;
    for (int p = 0; p < 2; p++) {
        psoup__adapter *adapter = psoup__model_adapter(model, names[p]);
        for (size_t i = 0; i < adapter->count; i++)
            adapter->data[i] += 0.3f * (float)((i * 7 + (size_t)p * 3) % 11) / 11.0f;
    }
    for (int i = 0; i < ASKED; i++) {
        mixes[i][0] = 0.25f * (float)i;
        mixes[i][1] = 1.0f - mixes[i][0];
        mixes[i][2] = mixes[i][3] = 0.0f;
        asked[i] = (psoup_prompt){.tokens = words[i], .n = prompts[i].n, .mix = mixes[i],
                                  .sequence = 30 + (uint64_t)i};
    }
    return model;
}

static psoup_best_options by_pay(int n) {
    psoup_best_options o = PSOUP_BEST_OPTIONS_INIT;
    o.n = n;
    o.reward_fn = pay;
    o.reward_user = &wanted[0];
    return o;
}

static void same_answer(const psoup_completion *a, const psoup_completion *b) {
    ck_assert(a->n == b->n && a->finish == b->finish);
    ck_assert_mem_eq(a->tokens, b->tokens, a->n * sizeof(*a->tokens));
    ck_assert_mem_eq(a->logprobs, b->logprobs, a->n * sizeof(*a->logprobs));
}

START_TEST(the_same_bits_in_any_batch) {
    psoup_model *model = world();
    psoup_best_options o = by_pay(EACH);
    psoup_generation *all, *plain, *few;
    int32_t chosen[ASKED], own[ASKED];
    float scores[ASKED * EACH], one[ASKED * EACH];
    OK(psoup_best_of_n(model, asked, ASKED, &sampling, NULL, &o, &all, chosen, scores, &error));
    ck_assert_ptr_null(psoup_generation_get(all, ASKED * EACH));
    int different = 0;
    for (int i = 0; i < ASKED; i++) {
        psoup_session_options session = PSOUP_SESSION_OPTIONS_INIT;
        psoup_generation *alone;
        session.max_sequences = 1 + i;
        OK(psoup_best_of_n(model, &asked[i], 1, &sampling, &session, &o, &alone, own, one, &error));
        ck_assert_int_eq(own[0], chosen[i]);
        ck_assert_mem_eq(one, scores + i * EACH, EACH * sizeof(float));
        for (int k = 0; k < EACH; k++)
            same_answer(psoup_generation_get(alone, (size_t)k), psoup_generation_get(all, (size_t)(i * EACH + k)));
        const psoup_completion *a = psoup_generation_get(alone, 0), *b = psoup_generation_get(alone, 1);
        different += a->n != b->n || memcmp(a->tokens, b->tokens, a->n * sizeof(*a->tokens)) != 0;
        psoup_generation_free(alone);
    }
    ck_assert_int_ge(different, ASKED - 1); /* the answers to a prompt are not one and the same */
    /* The first answer is psoup_generate's, and fewer answers are the first of more. */
    OK(psoup_generate(model, asked, ASKED, &sampling, NULL, NULL, NULL, &plain, &error));
    o.n = 2;
    OK(psoup_best_of_n(model, asked, ASKED, &sampling, NULL, &o, &few, own, one, &error));
    for (int i = 0; i < ASKED; i++) {
        same_answer(psoup_generation_get(plain, (size_t)i), psoup_generation_get(all, (size_t)(i * EACH)));
        for (int k = 0; k < 2; k++) {
            same_answer(psoup_generation_get(few, (size_t)(2 * i + k)),
                        psoup_generation_get(all, (size_t)(i * EACH + k)));
            ck_assert(one[2 * i + k] == scores[i * EACH + k]);
        }
    }
    psoup_generation_free(few);
    psoup_generation_free(plain);
    psoup_generation_free(all);
    psoup_model_free(model);
}
END_TEST

START_TEST(the_highest_score_wins) {
    psoup_model *model = world();
    psoup_best_options o = by_pay(EACH);
    psoup_generation *g;
    int32_t chosen[ASKED];
    float scores[ASKED * EACH];
    double first = 0, best = 0;
    OK(psoup_best_of_n(model, asked, ASKED, &sampling, NULL, &o, &g, chosen, scores, &error));
    for (int i = 0; i < ASKED; i++) {
        for (int k = 0; k < EACH; k++) {
            const psoup_completion *c = psoup_generation_get(g, (size_t)(i * EACH + k));
            psoup_rollout r = {.response = c->tokens, .n = c->n};
            float expected;
            pay(&wanted[0], &r, 1, &expected);
            ck_assert(scores[i * EACH + k] == expected);
            ck_assert(expected < scores[i * EACH + chosen[i]] ||
                      (expected == scores[i * EACH + chosen[i]] && k >= chosen[i])); /* of equals the first */
        }
        first += scores[i * EACH];
        best += scores[i * EACH + chosen[i]];
    }
    ck_assert(best > first);
    psoup_generation_free(g);
    psoup_model_free(model);
}
END_TEST

/* Rewards weigh what they read, as with PPO; alone, one reads the prompt and the answer. */
START_TEST(reward_models_score_them) {
    psoup_model *model = world();
    psoup_reward *rewards[2];
    psoup_generation *g;
    int32_t chosen[ASKED];
    float scores[ASKED * EACH];
    for (int k = 0; k < 2; k++) {
        OK(psoup_reward_create(model, k ? "R1" : "R0", NULL, &rewards[k], &error));
        psoup__adapter *adapter = psoup__model_adapter(model, k ? "R1" : "R0");
        for (size_t i = 0; i < adapter->count; i++)
            adapter->data[i] += 0.1f * (float)((i * 5 + (size_t)k) % 7);
    }
    for (int weighed = 0; weighed < 2; weighed++) {
        psoup_best_options o = PSOUP_BEST_OPTIONS_INIT;
        psoup_reward_input inputs[ASKED][2];
        psoup_ppo_prompt questions[ASKED];
        o.n = EACH;
        o.rewards = rewards;
        o.n_rewards = 2;
        for (int i = 0; i < ASKED; i++) {
            for (int k = 0; k < 2; k++)
                inputs[i][k] = (psoup_reward_input){.reward = k, .weight = k ? -0.5f : 2.0f,
                                                    .tokens = words[i + 5], .n = prompts[i + 5].n};
            questions[i] = (psoup_ppo_prompt){.tokens = words[i], .n = prompts[i].n, .inputs = inputs[i],
                                              .n_inputs = 2};
        }
        o.questions = weighed ? questions : NULL;
        OK(psoup_best_of_n(model, asked, ASKED, &sampling, NULL, &o, &g, chosen, scores, &error));
        for (int i = 0; i < ASKED * EACH; i++) {
            const psoup_completion *c = psoup_generation_get(g, (size_t)i);
            int32_t read[32];
            int from = weighed ? i / EACH + 5 : i / EACH;
            size_t n = prompts[from].n;
            float score[2];
            memcpy(read, words[from], n * sizeof(*read));
            memcpy(read + n, c->tokens, c->n * sizeof(*read));
            psoup_row row = {read, n + c->n, NULL};
            for (int k = 0; k < 2; k++)
                OK(psoup_reward_score(rewards[k], &row, 1, &score[k], &error));
            near(scores[i], weighed ? 2.0 * score[0] - 0.5 * score[1] : score[0], weighed ? 1e-6 : 0.0, "score",
                 (size_t)i);
        }
        psoup_generation_free(g);
    }
    psoup_reward_free(rewards[0]);
    psoup_reward_free(rewards[1]);
    psoup_model_free(model);
}
END_TEST

/* A model and a function together, as a policy's sources: their weighted sum chooses. */
START_TEST(several_rewards_are_weighed) {
    psoup_model *model = world();
    psoup_reward *reward;
    psoup_generation *g;
    psoup_best_options o = PSOUP_BEST_OPTIONS_INIT;
    int32_t chosen[ASKED];
    float scores[ASKED * EACH];
    OK(psoup_reward_create(model, "R", NULL, &reward, &error));
    psoup__adapter *adapter = psoup__model_adapter(model, "R");
    for (size_t i = 0; i < adapter->count; i++)
        adapter->data[i] += 0.1f * (float)((i * 5) % 7);
    const psoup_reward_source sources[] = {{.model = reward, .weight = 0.5f},
                                           {.name = "share", .function = pay, .user = &wanted[0], .weight = -2.0f}};
    o.n = EACH;
    o.sources = sources;
    o.n_sources = 2;
    OK(psoup_best_of_n(model, asked, ASKED, &sampling, NULL, &o, &g, chosen, scores, &error));
    for (int i = 0; i < ASKED * EACH; i++) {
        const psoup_completion *c = psoup_generation_get(g, (size_t)i);
        size_t n = prompts[i / EACH].n;
        psoup_rollout r = {.response = c->tokens, .n = c->n};
        int32_t read[32];
        float score, share;
        memcpy(read, words[i / EACH], n * sizeof(*read));
        memcpy(read + n, c->tokens, c->n * sizeof(*read));
        psoup_row row = {read, n + c->n, NULL};
        OK(psoup_reward_score(reward, &row, 1, &score, &error));
        pay(&wanted[0], &r, 1, &share);
        near(scores[i], 0.5 * score - 2.0 * share, 1e-6, "score", (size_t)i);
        ck_assert(scores[i] <= scores[i / EACH * EACH + chosen[i / EACH]]);
    }
    psoup_generation_free(g);
    psoup_reward_free(reward);
    psoup_model_free(model);
}
END_TEST

/* A mix whose adapter diverged costs its own prompt alone. */
START_TEST(answers_without_numbers_have_no_score) {
    psoup_model *model = world();
    psoup_best_options o = by_pay(3);
    psoup_generation *g;
    int32_t chosen[ASKED];
    float scores[ASKED * 3];
    psoup__model_adapter(model, names[0])->data[0] = NAN; /* prompt 0 does not mix it in */
    OK(psoup_best_of_n(model, asked, ASKED, &sampling, NULL, &o, &g, chosen, scores, &error));
    for (int i = 0; i < ASKED; i++)
        for (int k = 0; k < 3; k++) {
            ck_assert_int_eq(!isnan(scores[3 * i + k]), i == 0);
            ck_assert_int_eq(psoup_generation_get(g, (size_t)(3 * i + k))->finish == PSOUP_FINISH_ERROR, i > 0);
        }
    ck_assert_int_eq(chosen[1], 0);
    psoup_generation_free(g);
    psoup_model_free(model);
}
END_TEST

START_TEST(what_cannot_be_is_refused) {
    psoup_model *model = world();
    psoup_best_options o = by_pay(2);
    psoup_generation *g = NULL;
    psoup_reward_input input = {.reward = 3, .weight = 1.0f};
    psoup_ppo_prompt question = {.tokens = words[0], .n = 2, .inputs = &input, .n_inputs = 1};
    psoup_reward *reward, *none = NULL;
    int32_t chosen[1];
#define REFUSE(expected, text)                                                                     \
    do {                                                                                           \
        psoup_status got_ = psoup_best_of_n(model, asked, 1, &sampling, NULL, &o, &g, chosen, NULL, &error); \
        ck_assert_int_eq(got_, expected);                                                          \
        ck_assert_ptr_null(g);                                                                     \
        ck_assert_msg(strstr(error.message, text) != NULL, "%s", error.message);                   \
    } while (0)
    o.n = 0;
    REFUSE(PSOUP_ERROR_ARGUMENT, "n is 0: expected 1 to 65536");
    o = by_pay(2);
    o.reserved = 3;
    REFUSE(PSOUP_ERROR_ARGUMENT, "psoup_best_options: reserved is 3: expected 0");
    o = by_pay(2);
    o.reward_fn = NULL;
    REFUSE(PSOUP_ERROR_ARGUMENT, "neither a reward model nor a callback");
    o.rewards = &none;
    o.n_rewards = 1;
    REFUSE(PSOUP_ERROR_ARGUMENT, "rewards[0] is NULL");
    OK(psoup_reward_create(model, "R", NULL, &reward, &error));
    o.rewards = &reward;
    o.questions = &question;
    REFUSE(PSOUP_ERROR_ARGUMENT, "questions[0] names reward 3 of 1");
    question.reserved[1] = 1;
    REFUSE(PSOUP_ERROR_ARGUMENT, "questions[0].reserved is not 0");
    question.reserved[1] = 0;
    question.n_inputs = 0;
    REFUSE(PSOUP_ERROR_ARGUMENT, "questions[0] lists no reward input");
    question.n = 0;
    REFUSE(PSOUP_ERROR_ARGUMENT, "questions[0] has no tokens");
    question.n = 2;
    o.questions = NULL;
    o.sources = &(psoup_reward_source){.name = "x", .function = pay, .user = &wanted[0], .weight = 1.0f};
    o.n_sources = 1;
    REFUSE(PSOUP_ERROR_ARGUMENT, "has sources, and rewards or reward_fn");
    o.sources = NULL;
    o.reward_text = 1;
    REFUSE(PSOUP_ERROR_ARGUMENT, "tokenizer is NULL");
    o = by_pay(2);
    sampling.temperature = 0.0f;
    REFUSE(PSOUP_ERROR_ARGUMENT, "all answers would be the same");
    o.n = 1;
    OK(psoup_best_of_n(model, asked, 1, &sampling, NULL, &o, &g, chosen, NULL, &error));
    psoup_generation_free(g);
    sampling.temperature = 1.0f;
    o = by_pay(2);
    question.n_inputs = 1;
    o.questions = &question; /* a callback reads no inputs */
    OK(psoup_best_of_n(model, asked, 1, &sampling, NULL, &o, &g, chosen, NULL, &error));
    psoup_generation_free(g);
    o.reward_fn = pay_fails;
    REFUSE(PSOUP_ERROR_CANCELLED, "callback failed");
    o.reward_fn = pay_nan;
    REFUSE(PSOUP_ERROR_STATE, "is nan: expected a finite number");
    ck_assert_int_eq(psoup_best_of_n(model, asked, 1, NULL, NULL, NULL, NULL, chosen, NULL, &error),
                     PSOUP_ERROR_ARGUMENT);
    OK(psoup_best_of_n(model, NULL, 0, NULL, NULL, &o, &g, NULL, NULL, &error));
    psoup_generation_free(g);
    psoup_reward_free(reward);
    psoup_model_free(model);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("best of n");
    TCase *tcase = tcase_create("all");
    tcase_set_timeout(tcase, 120);
    tcase_add_checked_fixture(tcase, set_up, tear_down);
    tcase_add_test(tcase, the_same_bits_in_any_batch);
    tcase_add_test(tcase, the_highest_score_wins);
    tcase_add_test(tcase, reward_models_score_them);
    tcase_add_test(tcase, several_rewards_are_weighed);
    tcase_add_test(tcase, answers_without_numbers_have_no_score);
    tcase_add_test(tcase, what_cannot_be_is_refused);
    suite_add_tcase(suite, tcase);
    return run_suite(suite);
}
