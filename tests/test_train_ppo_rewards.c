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

int main(void) {
    Suite *suite = suite_create("train_ppo_rewards");
    TCase *tests = tcase_create("ppo_rewards");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 240);
    tcase_add_test(tests, reward_models_pay_by_their_inputs);
    tcase_add_test(tests, reward_models_read_text);
    tcase_add_test(tests, sampling_follows_the_options);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
