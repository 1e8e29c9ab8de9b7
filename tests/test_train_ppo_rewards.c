/* What PPO pays: reward models on every form of their input, penalties and limits. */
#include "ppo_case.h"

START_TEST(reward_models_pay_by_their_inputs) {
    psoup_model *model = fresh(1);
    psoup_reward *rewards[2];
    psoup_adapter_options a = PSOUP_ADAPTER_OPTIONS_INIT;
    a.targets = PSOUP_ALL_LINEAR;
    for (int r = 0; r < 2; r++) {
        OK(psoup_reward_create(model, r ? "R1" : "R0", &a, &rewards[r], &error));
        psoup__adapter *adapter = psoup__model_adapter(model, r ? "R1" : "R0");
        float head[17];
        for (int j = 0; j < 17; j++)
            head[j] = (float)((j * 7 + r * 3) % 5) - 2.0f;
        model->be->ops->write(model->be, adapter->head, head, sizeof(head));
    }
    /* P-MORL's form: several readings of one response, each with a prompt of its own. */
    static const int32_t first[] = {2, 3}, second[] = {9};
    psoup_reward_input inputs[] = {{0, 0.25f, first, 2}, {1, 0.75f, second, 1}};
    psoup_ppo_prompt listed[PROMPTS];
    for (int i = 0; i < PROMPTS; i++) {
        listed[i] = prompts[i];
        if (i % 2) {
            listed[i].inputs = inputs;
            listed[i].n_inputs = 2;
        }
    }
    psoup_ppo_policy p = policy(0);
    p.reward_fn = NULL;
    p.rewards = rewards;
    p.n_rewards = 2;
    p.prompts = listed;
    psoup_ppo_options o = plain();
    o.reward_max_tokens = 6;
    o.adaptive_kl = 0;
    psoup_ppo *ppo = create(model, &p, 1, &o);
    OK(psoup_ppo_step(ppo, NULL, &error));
    psoup_ppo_trace t = {.size = sizeof(t)};
    OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
    for (size_t i = 0; i < t.rollouts; i++) {
        const psoup_ppo_prompt *prompt = ppo->policies[0].experience.rollouts.prompt[i];
        psoup_reward_input own = {0, 1.0f, prompt->tokens, prompt->n};
        float expected = 0.0f, score;
        for (size_t k = 0; k < (prompt->inputs ? 2 : 1); k++) {
            const psoup_reward_input *input = prompt->inputs ? &inputs[k] : &own;
            size_t n = (size_t)(t.start[i + 1] - t.start[i]);
            int32_t row[32];
            memcpy(row, input->tokens, input->n * sizeof(*row));
            memcpy(row + input->n, t.response + t.start[i], n * sizeof(*row));
            psoup_row rows = {row, input->n + n < 6 ? input->n + n : 6, NULL};
            OK(psoup_reward_score(rewards[input->reward], &rows, 1, &score, &error));
            expected += input->weight * score;
        }
        ck_assert_mem_eq(&expected, &t.score[i], sizeof(expected));
    }
    ck_assert_double_eq(t.kl_coefficient, o.kl_coefficient);
    psoup_ppo_free(ppo);
    psoup_reward_free(rewards[0]);
    psoup_reward_free(rewards[1]);
    psoup_model_free(model);
}
END_TEST

/* The code's reward input: the decoded text of prompt and response, tokenised again, specials dropped,
 * ids without a token left out. */
START_TEST(reward_models_read_text) {
    const char *texts[] = {"the cat sat on the mat and the hat", "a dog and a cat at the door"};
    const char *special[] = {"</s>"};
    psoup_tokenizer *tokenizer;
    OK(psoup_tokenizer_train(context, texts, 2, 270, special, 1, NULL, &tokenizer, &error));
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_model *model;
    psoup_reward *reward;
    config.vocab_size = 300; /* thirty of them have no token */
    config.hidden_size = config.intermediate_size = 16;
    config.num_hidden_layers = 1;
    config.num_attention_heads = 2;
    config.max_position_embeddings = 64;
    config.eos_token_id = psoup_tokenizer_token_id(tokenizer, "</s>");
    OK(psoup_model_create(context, &config, 7, &model, &error));
    add_adapter(model, "P0", 1);
    OK(psoup_reward_create(model, "R", NULL, &reward, &error));
    float head[17];
    for (int j = 0; j < 17; j++)
        head[j] = (float)(j * 7 % 5) - 2.0f;
    model->be->ops->write(model->be, psoup__model_adapter(model, "R")->head, head, sizeof(head));
    int32_t ids[32];
    size_t n;
    OK(psoup_tokenizer_encode(tokenizer, "the cat", 7, 0, ids, NULL, 32, &n, &error));
    psoup_ppo_prompt prompt = {.tokens = ids, .n = n};
    psoup_ppo_policy p = policy(0);
    p.reward_fn = NULL;
    p.rewards = &reward;
    p.n_rewards = 1;
    p.prompts = &prompt;
    p.n_prompts = 1;
    p.n_validation = 0;
    psoup_ppo_options o = plain();
    o.reward_text = 1;
    o.reward_max_tokens = 9;
    o.tokenizer = tokenizer;
    psoup_ppo *ppo = create(model, &p, 1, &o);
    OK(psoup_ppo_step(ppo, NULL, &error));
    psoup_ppo_trace t = {.size = sizeof(t)};
    OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
    size_t unknown = 0;
    for (size_t i = 0; i < t.rollouts; i++) {
        char text[512] = "the cat";
        int32_t known[16], row[600];
        size_t k = 0, length, count;
        float score;
        for (int32_t j = t.start[i]; j < t.start[i + 1]; j++)
            if (psoup_tokenizer_token(tokenizer, t.response[j]))
                known[k++] = t.response[j];
            else
                unknown++;
        OK(psoup_tokenizer_decode(tokenizer, known, k, 1, text + 7, 500, &length, &error));
        OK(psoup_tokenizer_encode(tokenizer, text, 7 + length, PSOUP_ADD_SPECIAL, row, NULL, 600,
                                  &count, &error));
        psoup_row rows = {row, count < 9 ? count : 9, NULL};
        OK(psoup_reward_score(reward, &rows, 1, &score, &error));
        ck_assert_mem_eq(&score, &t.score[i], sizeof(score));
    }
    ck_assert_uint_gt(unknown, 0);
    psoup_ppo_free(ppo);
    psoup_reward_free(reward);
    psoup_model_free(model);
    psoup_tokenizer_free(tokenizer);
}
END_TEST

/* ---- several rewards at once ------------------------------------------------------------------------- */

/* The mean token, times a thousand. */
static int pay_thousands(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    for (size_t i = 0; i < n; i++) {
        scores[i] = 0.0f;
        for (size_t t = 0; t < rollouts[i].n; t++)
            scores[i] += 1000.0f * (float)rollouts[i].response[t] / (float)rollouts[i].n;
        ck_assert(rollouts[i].prompt->n > 0 && strcmp(rollouts[i].policy, "P0") == 0);
    }
    return 0;
}

static psoup_reward *headed(psoup_model *model, const char *name) {
    psoup_reward *reward;
    float head[17];
    OK(psoup_reward_create(model, name, NULL, &reward, &error));
    for (int j = 0; j < 17; j++)
        head[j] = (float)((j * 7) % 5) - 2.0f;
    model->be->ops->write(model->be, psoup__model_adapter(model, name)->head, head, sizeof(head));
    return reward;
}

typedef struct means {
    double reward[3], all, length_penalty;
} means;
static int keep_means(void *user, const psoup_step *step) {
    means *m = user;
    m->reward[0] = value_of(step, "reward/R");
    m->reward[1] = value_of(step, "reward/share");
    m->reward[2] = value_of(step, "reward/thousands");
    m->all = value_of(step, "reward");
    m->length_penalty = value_of(step, "length_penalty");
    return 0;
}

/* What the score of response i must be by the model R: it reads each of the prompt's inputs, or else the prompt. */
static float by_model(psoup_reward *reward, const psoup_ppo_prompt *prompt, const int32_t *response, size_t n) {
    psoup_reward_input own = {0, 1.0f, prompt->tokens, prompt->n};
    float sum = 0.0f, score;
    for (size_t k = 0; k < (prompt->inputs ? prompt->n_inputs : 1); k++) {
        const psoup_reward_input *input = prompt->inputs ? &prompt->inputs[k] : &own;
        int32_t row[32];
        memcpy(row, input->tokens, input->n * sizeof(*row));
        memcpy(row + input->n, response, n * sizeof(*row));
        psoup_row rows = {row, input->n + n, NULL};
        OK(psoup_reward_score(reward, &rows, 1, &score, &error));
        sum += input->weight * score;
    }
    return sum;
}

enum { SOURCES = 3, STEPS = 3, BATCH = 8 };
static const float source_weight[SOURCES] = {0.5f, 2.0f, -0.25f};

/* s in deviations from the mean of the n scores so far. */
static double in_deviations(const double *all, size_t n, double s) {
    double mean = 0.0, squares = 0.0;
    for (size_t i = 0; i < n; i++)
        mean += all[i] / (double)n;
    for (size_t i = 0; i < n; i++)
        squares += (all[i] - mean) * (all[i] - mean);
    return (s - mean) / sqrt(squares / (double)(n - 1));
}

/* A reward model and two functions of one policy: each response's score is their weighted sum, and what it is paid
 * that sum normalised, or the sum of each one normalised; clipped, less a penalty for length. Each is told apart. */
START_TEST(several_rewards_are_weighed_and_told_apart) {
    psoup_model *model = fresh(1);
    psoup_reward *reward = headed(model, "R");
    const psoup_reward_source sources[SOURCES] = {
        {.model = reward, .weight = source_weight[0]},
        {.name = "share", .function = pay, .user = &wanted[0], .weight = source_weight[1]},
        {.name = "thousands", .function = pay_thousands, .weight = source_weight[2]}};
    static const int32_t first[] = {2, 3}, second[] = {9};
    psoup_reward_input inputs[] = {{0, 0.25f, first, 2}, {0, 0.75f, second, 1}};
    psoup_ppo_prompt listed[PROMPTS];
    for (int i = 0; i < PROMPTS; i++) {
        listed[i] = prompts[i];
        if (i % 2) {
            listed[i].inputs = inputs;
            listed[i].n_inputs = 2;
        }
    }
    psoup_ppo_policy p = policy(0);
    p.reward_fn = NULL;
    p.reward_user = NULL;
    p.sources = sources;
    p.n_sources = SOURCES;
    p.prompts = listed;
    p.n_validation = 0;
    means told = {.all = NAN};
    psoup_ppo_options o = plain();
    o.batch_size = BATCH;
    o.steps = STEPS;
    o.normalize_apart = _i;
    o.reward_clip = 1.25f;
    o.length_penalty = 0.125f;
    o.length_target = 4;
    o.kl_coefficient = 0.0f;
    o.on_step = keep_means;
    o.user = &told;
    psoup_ppo *ppo = create(model, &p, 1, &o);
    double all[SOURCES + 1][STEPS * BATCH], clipped = 0.0, distance = 0.0;
    for (size_t step = 0; step < STEPS; step++) {
        psoup_ppo_trace t = {.size = sizeof(t)};
        double mean[SOURCES + 1] = {0}, penalty = 0.0;
        OK(psoup_ppo_step(ppo, NULL, &error));
        OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
        for (size_t i = 0; i < BATCH; i++) {
            const psoup_ppo_prompt *prompt = ppo->policies[0].experience.rollouts.prompt[i];
            size_t n = (size_t)(t.start[i + 1] - t.start[i]), at = step * BATCH + i;
            psoup_rollout rollout = {.policy = "P0", .prompt = prompt, .response = t.response + t.start[i], .n = n};
            float score[SOURCES];
            score[0] = by_model(reward, prompt, rollout.response, n);
            pay(&wanted[0], &rollout, 1, &score[1]);
            pay_thousands(NULL, &rollout, 1, &score[2]);
            all[SOURCES][at] = 0.0;
            for (size_t k = 0; k < SOURCES; k++) {
                all[k][at] = score[k];
                all[SOURCES][at] += (double)source_weight[k] * score[k];
            }
            ck_assert_float_eq(t.score[i], (float)all[SOURCES][at]);
            for (size_t k = 0; k <= SOURCES; k++)
                mean[k] += all[k][at] / BATCH;
            penalty += n > 4 ? 0.125 * ((double)n - 4.0) / BATCH : 0.0;
        }
        for (size_t i = 0; i < BATCH; i++) {
            size_t seen_so_far = (step + 1) * BATCH, at = step * BATCH + i;
            double n = t.start[i + 1] - t.start[i], expected = 0.0, one;
            for (size_t k = _i ? 0 : SOURCES; k < (_i ? SOURCES : SOURCES + 1); k++) {
                one = in_deviations(all[k], seen_so_far, all[k][at]);
                clipped += fabs(one) > 1.25;
                expected += (k < SOURCES ? (double)source_weight[k] : 1.0) * fmin(fmax(one, -1.25), 1.25);
            }
            distance += fabs(expected - in_deviations(all[SOURCES], seen_so_far, all[SOURCES][at]));
            expected -= n > 4.0 ? 0.125 * (n - 4.0) : 0.0;
            near(t.reward[t.start[i + 1] - 1], expected, 1e-5, "paid", at);
        }
        for (size_t k = 0; k < SOURCES; k++)
            near(told.reward[k], mean[k], 1e-6, "reward/NAME", k);
        near(told.all, mean[SOURCES], 1e-6, "reward", step);
        near(told.length_penalty, penalty, 1e-6, "length_penalty", step);
    }
    ck_assert(clipped > 0.0 && distance > 0.5);
    psoup_ppo_free(ppo);
    psoup_reward_free(reward);
    psoup_model_free(model);
}
END_TEST

/* One source of weight 1 is what reward_fn or rewards are, bit for bit. */
START_TEST(one_source_is_the_plain_form) {
    float *expected = NULL;
    size_t count;
    for (int form = 0; form < 2; form++) {
        psoup_model *model = fresh(1);
        psoup_reward *reward = headed(model, "R");
        psoup_reward_source source = {.name = "it", .model = _i ? reward : NULL, .function = _i ? NULL : pay,
                                      .user = &wanted[0], .weight = 1.0f};
        psoup_ppo_policy p = policy(0);
        psoup_ppo_options o = plain();
        if (_i) {
            p.reward_fn = NULL;
            p.rewards = &reward;
            p.n_rewards = 1;
        }
        if (form) {
            p.reward_fn = NULL;
            p.rewards = NULL;
            p.n_rewards = 0;
            p.sources = &source;
            p.n_sources = 1;
        }
        psoup_ppo *ppo = create(model, &p, 1, &o);
        OK(psoup_ppo_run(ppo, &error));
        if (form)
            ck_assert(same_weights(model, "P0", expected, count));
        else
            expected = weights(model, "P0", &count);
        psoup_ppo_free(ppo);
        psoup_reward_free(reward);
        psoup_model_free(model);
    }
    free(expected);
}
END_TEST

START_TEST(unsound_sources_are_refused) {
    static const char *const says[] = {
        "sources[1] has neither", "sources[1] has both", "sources[1] has no name", "the weight of source 'b' is nan",
        "the weight of source 'b' is 0", "source 'a' is there twice", "expected one of the three",
        "has 0 rewards: expected 1 to 64", "has 65 rewards: expected 1 to 64", "both a policy and a reward model",
        "names reward 2 of 2", "an input of reward 0, which is a function", "no source is of its adapter 'P1'",
        "normalize_apart is 1: expected 0", "source 'b': reserved2 is not 0"};
    psoup_model *model = fresh(2);
    psoup_reward *reward = headed(model, "R");
    for (int i = 0; i < (int)(sizeof says / sizeof *says); i++) {
        psoup_reward_source s[65] = {{.name = "a", .function = pay, .weight = 1.0f},
                                     {.name = "b", .function = pay, .weight = 1.0f}};
        const int32_t tokens[2] = {2, 3};
        const psoup_reward_input input = {i == 10 ? 2 : 0, 1.0f, tokens, 2};
        psoup_ppo_prompt prompt = {.tokens = tokens, .n = 2, .n_inputs = 1,
                                   .inputs = i == 10 || i == 11 ? &input : NULL};
        psoup_ppo_soup soup = PSOUP_PPO_SOUP_INIT;
        psoup_ppo_policy p = policy(0);
        psoup_ppo_options o = plain();
        psoup_ppo *ppo;
        soup.adapters = names;
        soup.n = 2;
        p.reward_fn = i == 6 ? pay : NULL;
        p.prompts = &prompt;
        p.n_prompts = 1;
        p.sources = s;
        p.n_sources = i == 7 ? 0 : i == 8 ? 65 : 2;
        if (i < 2 || i == 9)
            s[1].model = i ? reward : NULL, s[1].function = i == 1 ? pay : NULL;
        s[1].name = i == 2 ? NULL : i == 5 ? "a" : "b";
        s[1].reserved2[1] = i == 14;
        s[1].weight = i == 3 ? NAN : i == 4 ? 0.0f : 1.0f;
        if (i == 9)
            p.adapter = "R";
        if (i == 12)
            p.soup = &soup;
        o.normalize_apart = i == 13;
        o.normalize_reward = i != 13;
        ck_assert_int_eq(psoup_ppo_create(model, &p, 1, &o, &ppo, &error), PSOUP_ERROR_ARGUMENT);
        ck_assert_msg(strstr(error.message, says[i]) != NULL, "\"%s\" lacks \"%s\"", error.message, says[i]);
        ck_assert_ptr_null(ppo);
    }
    psoup_reward_free(reward);
    psoup_model_free(model);
}
END_TEST

START_TEST(sampling_follows_the_options) {
    psoup_model *model = fresh(1);
    psoup_ppo_policy p = policy(0);
    psoup_ppo_options o = plain();
    o.batch_size = 16;
    o.draw_new_tokens_from = 3;
    o.ignore_stop = 1;
    o.truncation_penalty = 5.0f;
    o.normalize_reward = 0;
    psoup_ppo *ppo = create(model, &p, 1, &o);
    OK(psoup_ppo_step(ppo, NULL, &error));
    const psoup__experience *x = &ppo->policies[0].experience;
    const psoup__rollouts *r = &x->rollouts;
    size_t ended = 0, limits[4] = {0};
    for (size_t i = 0; i < r->n; i++) {
        size_t n = (size_t)(r->start[i + 1] - r->start[i]);
        const int32_t *response = r->response + r->start[i];
        for (size_t k = 0; k + 1 < n; k++)
            ck_assert_int_ne(response[k], END);
        ck_assert((response[n - 1] == END) == (r->finish[i] == PSOUP_FINISH_STOP));
        ended += r->finish[i] == PSOUP_FINISH_STOP;
        double paid = x->reward[r->start[i + 1] - 1];
        double penalty = 0.2 * (x->logprob[r->start[i + 1] - 1] - x->ref_logprob[r->start[i + 1] - 1]);
        near(paid + penalty, r->score[i] - (r->finish[i] == PSOUP_FINISH_STOP ? 0.0 : 5.0), 1e-5,
             "paid", i);
        if (r->finish[i] == PSOUP_FINISH_LENGTH) {
            ck_assert(n >= 3 && n <= 12);
            ck_assert(limits[i / 4] == 0 || limits[i / 4] == n); /* one limit per group of four */
            limits[i / 4] = n;
        }
    }
    ck_assert_uint_gt(ended, 0);
    ck_assert_uint_lt(ended, r->n);
    psoup_ppo_free(ppo);
    psoup_model_free(model);
}
END_TEST

/* Inputs are for models: where a callback pays, what they name is not looked at. */
START_TEST(a_callback_reads_no_inputs) {
    psoup_model *model = fresh(1);
    const psoup_reward_input input = {.reward = 1 << 28, .weight = 1.0f};
    psoup_ppo_prompt listed[PROMPTS];
    float *expected;
    size_t n;
    for (int i = 0; i < PROMPTS; i++) {
        listed[i] = prompts[i];
        listed[i].inputs = &input;
        listed[i].n_inputs = 1;
    }
    psoup_ppo_policy p = policy(0);
    psoup_ppo_options o = plain();
    psoup_ppo *ppo = create(model, &p, 1, &o);
    OK(psoup_ppo_step(ppo, NULL, &error));
    expected = weights(model, names[0], &n);
    psoup_ppo_free(ppo);
    psoup_model_free(model);
    model = fresh(1);
    p.prompts = listed;
    ppo = create(model, &p, 1, &o);
    OK(psoup_ppo_step(ppo, NULL, &error));
    ck_assert(same_weights(model, names[0], expected, n));
    free(expected);
    psoup_ppo_free(ppo);
    psoup_model_free(model);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train_ppo_rewards");
    TCase *tests = tcase_create("ppo_rewards");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 240);
    tcase_add_test(tests, reward_models_pay_by_their_inputs);
    tcase_add_test(tests, reward_models_read_text);
    tcase_add_test(tests, a_callback_reads_no_inputs);
    tcase_add_test(tests, sampling_follows_the_options);
    tcase_add_loop_test(tests, several_rewards_are_weighed_and_told_apart, 0, 2);
    tcase_add_loop_test(tests, one_source_is_the_plain_form, 0, 2);
    tcase_add_test(tests, unsound_sources_are_refused);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
