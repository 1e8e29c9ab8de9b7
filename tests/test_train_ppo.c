/* PPO on a tiny model: it raises what it is paid for, and every policy's run is its own. */
#include "train_case.h"

enum { PROMPTS = 16, VALIDATION = 8, POLICIES = 6 };

static int32_t words[PROMPTS + VALIDATION][4];
static psoup_ppo_prompt prompts[PROMPTS], validation[VALIDATION];

static void make_prompts(void) {
    for (int i = 0; i < PROMPTS + VALIDATION; i++) {
        size_t n = 2 + (size_t)i % 3;
        for (size_t t = 0; t < n; t++)
            words[i][t] = 2 + (int32_t)((i * 5 + (int)t * 3) % 13);
        psoup_ppo_prompt prompt = {.tokens = words[i], .n = n, .id = i};
        if (i < PROMPTS)
            prompts[i] = prompt;
        else
            validation[i - PROMPTS] = prompt;
    }
}

/* The share of the wanted token in a response. */
static int pay(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    int32_t wanted = *(const int32_t *)user;
    for (size_t i = 0; i < n; i++) {
        scores[i] = 0.0f;
        ck_assert_uint_ge(rollouts[i].n, 1);
        for (size_t t = 0; t < rollouts[i].n; t++)
            scores[i] += rollouts[i].response[t] == wanted;
        scores[i] /= (float)rollouts[i].n;
    }
    return 0;
}

static int pay_nan(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    for (size_t i = 0; i < n; i++)
        scores[i] = i ? 0.0f : NAN;
    return 0;
}

static int pay_fails(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    return 1;
}

static const char *const names[POLICIES] = {"P0", "P1", "P2", "P3", "P4", "P5"};
static int32_t wanted[POLICIES] = {3, 4, 5, 6, 7, 8};

static psoup_model *fresh(int policies) {
    psoup_model *model = tiny_model();
    make_prompts();
    for (int p = 0; p < policies; p++)
        add_adapter(model, names[p], 20 + (uint64_t)p);
    return model;
}

static psoup_ppo_policy policy(int p) {
    return (psoup_ppo_policy){.adapter = names[p],
                              .reward_fn = pay,
                              .reward_user = &wanted[p],
                              .prompts = prompts,
                              .n_prompts = PROMPTS,
                              .validation = validation,
                              .n_validation = VALIDATION,
                              .seed = 100 + (uint64_t)p};
}

static psoup_ppo_options plain(void) {
    psoup_ppo_options o = PSOUP_PPO_OPTIONS_INIT;
    o.steps = 3;
    o.batch_size = 8;
    o.ppo_epochs = 3;
    o.max_new_tokens = 12;
    o.learning_rate = 3e-3f;
    o.target_kl = 10.0f;
    return o;
}

typedef struct seen {
    double first, last, validation, best, skipped, epochs;
    int validations;
    int64_t stop_at;
    const char *subject; /* NULL: any */
} seen;

static int watch(void *user, const psoup_step *step) {
    seen *s = user;
    if (s->subject && strcmp(s->subject, step->subject) != 0)
        return 0;
    double reward = value_of(step, "reward");
    ck_assert(isfinite(value_of(step, "kl")) && isfinite(value_of(step, "kl_token")));
    if (strcmp(step->phase, "validation") == 0) {
        s->validation = reward;
        s->best = s->validations++ && s->best > reward ? s->best : reward;
        return 0;
    }
    if (step->step == 1)
        s->first = reward;
    s->last = reward;
    s->skipped += value_of(step, "skipped");
    s->epochs = value_of(step, "epochs");
    ck_assert(value_of(step, "tokens") > 0);
    return s->stop_at == step->step;
}

static int keep_grad_norm(void *user, const psoup_step *step) {
    *(double *)user = value_of(step, "grad_norm");
    return 0;
}

static psoup_ppo *create(psoup_model *model, const psoup_ppo_policy *policies, size_t n,
                         const psoup_ppo_options *o) {
    psoup_ppo *ppo;
    OK(psoup_ppo_create(model, policies, n, o, &ppo, &error));
    return ppo;
}

START_TEST(reward_rises) {
    seen s = {0};
    psoup_model *model = fresh(2);
    psoup_ppo_policy p = policy(0);
    psoup_ppo_options o = plain();
    o.steps = 30;
    o.batch_size = 32;
    o.learning_rate = 2e-2f;
    o.kl_coefficient = 0.02f;
    o.validate_every = 5;
    o.on_step = watch;
    o.user = &s;
    size_t count;
    float *other = weights(model, "P1", &count);
    psoup_ppo *ppo = create(model, &p, 1, &o);
    OK(psoup_ppo_run(ppo, &error));
    ck_assert_msg(s.last > s.first + 0.3, "reward %g, then %g", s.first, s.last);
    ck_assert_int_eq(s.validations, 6);
    ck_assert_double_gt(s.best, 0.4);
    ck_assert(same_weights(model, "P1", other, count));
    psoup_ppo_free(ppo);
    ck_assert_ptr_null(model->adapters[0]->grad);
    free(other);
    psoup_model_free(model);
}
END_TEST

/* The trace against the formulas and the public scores; the ratio before any update is 1, bit for
 * bit. */
START_TEST(trace_is_what_was_computed) {
    psoup_model *model = fresh(2);
    psoup_ppo_policy p[2] = {policy(0), policy(1)};
    psoup_ppo_options o = plain();
    o.micro_batch_tokens = _i ? 20 : 4096;
    o.max_sequences = _i ? 3 : 0;
    o.kl_horizon = 20.0f; /* so that it moves */
    psoup_ppo *ppo = create(model, p, 2, &o);
    psoup__moments moments = {0}; /* both run on from step to step */
    double beta = o.kl_coefficient;
    for (int step = 0; step < 2; step++) {
        float mix[2] = {0.0f, 1.0f}, *logprob = NULL, *reference = NULL;
        psoup_ppo_trace t = {.size = sizeof(t)};
        size_t count;
        /* The policy as it samples, set aside as an adapter of another model. */
        psoup_model *before = fresh(2);
        OK(psoup__adapter_add_head(before, before->adapters[1], &error));
        float *data = weights(model, "P1", &count);
        ck_assert_uint_eq(count, before->adapters[1]->count);
        before->be->ops->write(before->be, before->adapters[1]->data, data, count * sizeof(*data));
        free(data);
        OK(psoup_ppo_step(ppo, NULL, &error));
        OK(psoup_ppo_get_trace(ppo, 1, &t, &error));
        ck_assert_uint_eq(t.rollouts, 8);
        ck_assert_int_eq(t.start[8], (int32_t)t.tokens);
        psoup__moments_update(&moments, t.score, t.rollouts);
        double kl = 0.0;
        logprob = calloc(t.tokens, sizeof(float));
        reference = calloc(t.tokens, sizeof(float));
        for (size_t i = 0; i < t.rollouts; i++) {
            const psoup_ppo_prompt *prompt = ppo->policies[1].experience.rollouts.prompt[i];
            size_t n = (size_t)(t.start[i + 1] - t.start[i]);
            int32_t row[16];
            float out[16];
            memcpy(row, prompt->tokens, prompt->n * sizeof(*row));
            memcpy(row + prompt->n, t.response + t.start[i], n * sizeof(*row));
            psoup_row rows = {row, prompt->n + n, mix};
            OK(psoup_model_logprobs(before, &rows, 1, out, &error));
            memcpy(logprob + t.start[i], out + prompt->n - 1, n * sizeof(float));
            rows.mix = NULL;
            OK(psoup_model_logprobs(before, &rows, 1, out, &error));
            memcpy(reference + t.start[i], out + prompt->n - 1, n * sizeof(float));
            double sum = 0.0;
            for (size_t k = (size_t)t.start[i]; k < (size_t)t.start[i] + n; k++) {
                sum += t.reward[k] + beta * (t.logprob[k] - t.ref_logprob[k]);
                kl += (double)t.logprob[k] - t.ref_logprob[k];
            }
            near(sum, (t.score[i] - moments.mean) / psoup__moments_deviation(&moments), 1e-4,
                 "score", i);
        }
        beta = psoup__kl_coefficient(beta, kl / 8.0, o.kl_target, o.kl_horizon, 8.0);
        ck_assert_double_eq(t.kl_coefficient, beta);
        ck_assert_uint_eq(ppo->policies[1].state.rollouts, 8 * ((uint64_t)step + 1));
        ck_assert_mem_eq(logprob, t.logprob, t.tokens * sizeof(float));
        ck_assert_mem_eq(reference, t.ref_logprob, t.tokens * sizeof(float));
        if (step == 0)
            ck_assert_mem_eq(t.logprob, t.ref_logprob, t.tokens * sizeof(float)); /* B is 0 */
        double mean = 0.0, square = 0.0;
        for (size_t k = 0; k < t.tokens; k++) {
            ck_assert_msg(t.first_ratio[k] == 1.0f, "ratio %zu is %.9g", k, t.first_ratio[k]);
            mean += t.advantage[k] / (double)t.tokens;
            square += t.advantage[k] * (double)t.advantage[k] / (double)(t.tokens - 1);
        }
        near(mean, 0.0, 1e-5, "mean advantage", 0);
        near(square, 1.0, 1e-3, "deviation of the advantages", 0);
        free(logprob);
        free(reference);
        psoup_model_free(before);
    }
    psoup_ppo_free(ppo);
    psoup_model_free(model);
}
END_TEST

/* Six policies in one run, against each of them alone: same weights and same trace, bit for bit, with
 * dropout, drawn limits, mini-batches and several passes, and with another number of threads. */
START_TEST(side_by_side_is_alone) {
    psoup_model *model = fresh(POLICIES);
    psoup_ppo_policy all[POLICIES];
    psoup_ppo_options o = plain();
    size_t count[POLICIES], tokens[POLICIES];
    float *expected[POLICIES], *advantage[POLICIES];
    psoup_ppo_trace t = {.size = sizeof(t)};
    o.mini_batch_size = 3;
    o.micro_batch_tokens = 40;
    o.lora_dropout = 0.1f;
    o.head_dropout = 0.1f;
    o.draw_new_tokens_from = 4;
    o.ignore_stop = 1;
    o.whiten_groups = 2;
    for (int p = 0; p < POLICIES; p++)
        all[p] = policy(p);
    psoup_ppo *ppo = create(model, all, POLICIES, &o);
    OK(psoup_ppo_run(ppo, &error));
    for (size_t p = 0; p < POLICIES; p++) {
        expected[p] = weights(model, names[p], &count[p]);
        OK(psoup_ppo_get_trace(ppo, p, &t, &error));
        tokens[p] = t.tokens;
        advantage[p] = malloc(t.tokens * sizeof(float));
        memcpy(advantage[p], t.advantage, t.tokens * sizeof(float));
    }
    psoup_ppo_free(ppo);
    psoup_model_free(model);
    tear_down();
    open_context(1);
    for (size_t p = 0; p < POLICIES; p++) {
        model = fresh(POLICIES);
        ppo = create(model, &all[p], 1, &o);
        OK(psoup_ppo_run(ppo, &error));
        OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
        ck_assert_uint_eq(t.tokens, tokens[p]);
        ck_assert_mem_eq(t.advantage, advantage[p], t.tokens * sizeof(float));
        ck_assert(same_weights(model, names[p], expected[p], count[p]));
        psoup_ppo_free(ppo);
        psoup_model_free(model);
        free(expected[p]);
        free(advantage[p]);
    }
}
END_TEST

/* One group of the whole batch is no group, bit for bit. Groups of one response weigh a short response's
 * tokens more: another gradient where lengths differ, the same where they do not. */
static double first_grad_norm(int32_t loss_group, int32_t ignore_stop, float *data, size_t capacity) {
    psoup_model *model = fresh(1);
    psoup_ppo_policy p = policy(0);
    psoup_ppo_options o = plain();
    double norm = -1.0;
    const float *now;
    size_t count;
    o.steps = 1;
    o.ppo_epochs = 1;
    o.max_grad_norm = 0.0f;
    o.loss_group = loss_group;
    o.ignore_stop = ignore_stop;
    o.min_new_tokens = ignore_stop ? o.max_new_tokens : 0; /* no end token, so equal lengths */
    o.on_step = keep_grad_norm;
    o.user = &norm;
    psoup_ppo *ppo = create(model, &p, 1, &o);
    OK(psoup_ppo_step(ppo, NULL, &error));
    OK(psoup_model_adapter_data(model, names[0], &now, &count, &error));
    ck_assert_uint_le(count, capacity);
    memcpy(data, now, count * sizeof(*now));
    psoup_ppo_free(ppo);
    psoup_model_free(model);
    return norm;
}

START_TEST(loss_groups_share_the_mean) {
    enum { MOST = 1 << 16 };
    static float none[MOST], whole[MOST], single[MOST];
    double all = first_grad_norm(0, 0, none, MOST);
    ck_assert(first_grad_norm(8, 0, whole, MOST) == all);
    ck_assert_mem_eq(none, whole, sizeof(none));
    ck_assert_double_gt(fabs(first_grad_norm(1, 0, single, MOST) - all), 1e-4 * all);
    all = first_grad_norm(0, 1, none, MOST);
    ck_assert_double_le(fabs(first_grad_norm(1, 1, single, MOST) - all), 1e-5 * all);
}
END_TEST

/* Two policies of which one stops early: it makes fewer epochs, the other all of them. */
START_TEST(early_stop_leaves_the_batch) {
    seen s[2] = {{.subject = "P0"}, {.subject = "P1"}};
    for (int which = 0; which < 2; which++) {
        psoup_model *model = fresh(2);
        psoup_ppo_policy p[2] = {policy(0), policy(1)};
        static int32_t nothing = -1; /* never paid: with no advantage there is no update to speak of */
        p[1].reward_user = &nothing;
        psoup_ppo_options o = plain();
        o.steps = 1;
        o.ppo_epochs = 8;
        o.learning_rate = 0.05f;
        o.target_kl = 0.05f;
        o.value_coefficient = 0.0f;
        o.whiten_advantages = 0;
        o.early_stop = _i ? PSOUP_EARLY_STOP_LAST : PSOUP_EARLY_STOP_ALL;
        o.mini_batch_size = 4;
        o.on_step = watch;
        o.user = &s[which];
        psoup_ppo *ppo = create(model, p, 2, &o);
        OK(psoup_ppo_step(ppo, NULL, &error));
        psoup_ppo_free(ppo);
        psoup_model_free(model);
    }
    ck_assert_double_lt(s[0].epochs, 8.0);
    ck_assert_double_eq(s[1].epochs, 8.0);
}
END_TEST

/* A mini-batch that the guard refuses leaves weights, moments and counter alone; with skipped_step
 * the optimiser moves on zero gradients. */
START_TEST(guard_leaves_the_optimiser_alone) {
    seen s = {0};
    psoup_model *model = fresh(1);
    psoup_ppo_policy p = policy(0);
    psoup_ppo_options o = plain();
    o.ratio_threshold = 0.5f; /* even a ratio of 1 exceeds it */
    o.skipped_step = _i;
    o.on_step = watch;
    o.user = &s;
    psoup_ppo *ppo = create(model, &p, 1, &o);
    size_t count;
    float *before = weights(model, "P0", &count);
    OK(psoup_ppo_step(ppo, NULL, &error));
    const psoup__optimizer *optimizer = &ppo->policies[0].optimizer;
    ck_assert_double_eq(s.skipped, 3.0);
    ck_assert_int_eq(optimizer->steps, _i ? 3 : 0);
    ck_assert(same_weights(model, "P0", before, count)); /* moments are still zero */
    for (size_t i = 0; i < optimizer->n; i++)
        ck_assert(optimizer->m[i] == 0.0f && optimizer->v[i] == 0.0f);
    psoup_ppo_free(ppo);
    free(before);
    psoup_model_free(model);
}
END_TEST

/* An adapter full of NaN leaves the run with its name told; its neighbour has the bits it has alone. */
START_TEST(diverged_policy_harms_nobody) {
    float *expected = NULL;
    size_t count;
    for (int beside = 0; beside < 2; beside++) {
        psoup_model *model = fresh(2);
        psoup_ppo_policy p[2] = {policy(0), policy(1)};
        psoup_ppo_options o = plain();
        psoup_ppo *ppo = create(model, p, beside ? 2 : 1, &o);
        if (beside) {
            float bad = NAN;
            for (size_t i = 0; i < model->adapters[1]->count; i++)
                model->be->ops->write(model->be, model->adapters[1]->data + i, &bad, sizeof(bad));
            ck_assert_int_eq(psoup_ppo_run(ppo, &error), PSOUP_ERROR_STATE);
            ck_assert_ptr_nonnull(strstr(error.message, "'P1'"));
            ck_assert(same_weights(model, "P0", expected, count));
        } else {
            OK(psoup_ppo_run(ppo, &error));
            expected = weights(model, "P0", &count);
        }
        psoup_ppo_free(ppo);
        psoup_model_free(model);
    }
    free(expected);
}
END_TEST

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

START_TEST(failures_leave_a_clean_run) {
    seen s = {.stop_at = 2};
    int64_t remaining = -1;
    psoup_model *model = fresh(2);
    psoup_ppo_policy p[2] = {policy(0), policy(1)};
    psoup_ppo_options o = plain();
    psoup_ppo *ppo;
    o.on_step = watch;
    o.user = &s;
    ppo = create(model, p, 2, &o);
    psoup_ppo *second;
    ck_assert_int_eq(psoup_ppo_create(model, p, 1, &o, &second, &error), PSOUP_ERROR_STATE);
    ck_assert_ptr_null(second);
    ck_assert_int_eq(psoup_ppo_run(ppo, &error), PSOUP_ERROR_CANCELLED);
    s.stop_at = 0;
    OK(psoup_ppo_step(ppo, &remaining, &error));
    ck_assert_int_eq(remaining, 0);
    OK(psoup_ppo_step(ppo, &remaining, &error)); /* nothing is left to do */
    psoup_ppo_free(ppo);
    for (int a = 0; a < 2; a++)
        ck_assert_ptr_null(model->adapters[a]->grad);

    /* A step that fails before its updates can be taken again: the same as if nothing had been. */
    size_t count;
    float *expected = NULL;
    for (int failing = 0; failing < 3; failing++) {
        psoup_model *again = fresh(1);
        psoup_ppo_policy q = policy(0);
        ppo = create(again, &q, 1, &o);
        if (failing) {
            ppo->policies[0].given.reward_fn = failing == 1 ? pay_nan : pay_fails;
            ck_assert_int_eq(psoup_ppo_step(ppo, &remaining, &error),
                             failing == 1 ? PSOUP_ERROR_STATE : PSOUP_ERROR_CANCELLED);
            ck_assert_int_eq(remaining, 3);
            ppo->policies[0].given.reward_fn = pay;
        }
        OK(psoup_ppo_step(ppo, NULL, &error));
        if (!failing)
            expected = weights(again, "P0", &count);
        else
            ck_assert(same_weights(again, "P0", expected, count));
        psoup_ppo_free(ppo);
        psoup_model_free(again);
    }
    free(expected);

    p[1].adapter = "P0";
    ck_assert_int_eq(psoup_ppo_create(model, p, 2, &o, &ppo, &error), PSOUP_ERROR_ARGUMENT);
    p[1].adapter = "nobody";
    ck_assert_int_eq(psoup_ppo_create(model, p, 2, &o, &ppo, &error), PSOUP_ERROR_ARGUMENT);
    p[0].reward_fn = NULL;
    ck_assert_int_eq(psoup_ppo_create(model, p, 1, &o, &ppo, &error), PSOUP_ERROR_ARGUMENT);
    psoup_model_free(model);
}
END_TEST

/* ---- every allocation made to fail in turn ------------------------------------------------------ */

typedef struct budget {
    long left, live;
} budget;

static void *spend(void *user, size_t bytes, size_t alignment) {
    budget *b = user;
    if (b->left-- == 0)
        return NULL;
    b->live++;
    return aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}

static void give_back(void *user, void *memory) {
    budget *b = user;
    b->live -= memory != NULL;
    free(memory);
}

static psoup_status whole_run(psoup_model *model, psoup_reward *reward) {
    psoup_status status;
    psoup_ppo_options o = plain();
    psoup_ppo_policy p = policy(0);
    psoup_ppo *ppo = NULL;
    static const psoup_example example = {words[0], 2, 1};
    psoup_comparison pair = {words[0], 2, words[1], 3, 0};
    p.reward_fn = NULL;
    p.rewards = &reward;
    p.n_rewards = 1;
    o.steps = 1;
    o.ppo_epochs = 1;
    o.batch_size = 2;
    o.max_new_tokens = 2;
    p.n_validation = 1;
    status = psoup_sft(model, "P0", &example, 1, &example, 1, NULL, &error);
    if (status == PSOUP_OK)
        status = psoup_reward_train(&reward, 1, &pair, 1, &pair, 1, NULL, &error);
    if (status == PSOUP_OK)
        status = psoup_ppo_create(model, &p, 1, &o, &ppo, &error);
    if (status == PSOUP_OK)
        status = psoup_ppo_run(ppo, &error);
    psoup_ppo_free(ppo);
    return status;
}

START_TEST(allocations_may_fail) {
    budget b = {.left = -1};
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.threads = 1;
    options.allocator.user = &b;
    options.allocator.alloc = spend;
    options.allocator.free = give_back;
    psoup_context *outer = context;
    OK(psoup_context_create(&options, &context, &error));
    psoup_adapter_options a = PSOUP_ADAPTER_OPTIONS_INIT;
    long failures = 0;
    for (long at = 0;; at++) {
        psoup_reward *reward;
        psoup_model *model = fresh(1);
        OK(psoup_reward_create(model, "R", &a, &reward, &error));
        b.left = at;
        psoup_status status = whole_run(model, reward);
        bool spent = b.left < 0;
        b.left = -1;
        ck_assert_ptr_null(model->adapters[0]->grad);
        ck_assert_ptr_null(model->adapters[1]->grad);
        psoup_reward_free(reward);
        psoup_model_free(model);
        if (!spent) {
            ck_assert_int_eq(status, PSOUP_OK);
            break;
        }
        ck_assert_msg(status == PSOUP_ERROR_MEMORY, "allocation %ld: %s", at,
                      psoup_status_name(status));
        failures++;
    }
    ck_assert_int_gt(failures, 100);
    psoup_context_free(context);
    ck_assert_int_eq(b.live, 0);
    context = outer;
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train_ppo");
    TCase *tests = tcase_create("ppo");
    tcase_set_timeout(tests, 240);
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_add_test(tests, reward_rises);
    tcase_add_loop_test(tests, trace_is_what_was_computed, 0, 2);
    tcase_add_test(tests, loss_groups_share_the_mean);
    tcase_add_test(tests, side_by_side_is_alone);
    tcase_add_loop_test(tests, early_stop_leaves_the_batch, 0, 2);
    tcase_add_loop_test(tests, guard_leaves_the_optimiser_alone, 0, 2);
    tcase_add_test(tests, diverged_policy_harms_nobody);
    tcase_add_test(tests, reward_models_pay_by_their_inputs);
    tcase_add_test(tests, reward_models_read_text);
    tcase_add_test(tests, sampling_follows_the_options);
    tcase_add_test(tests, failures_leave_a_clean_run);
    tcase_add_test(tests, allocations_may_fail);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
