/* Soups trained as one: the mixes that are drawn, what a mixed row earns and what its gradient is, that a
 * one-hot mix is the policy alone, and that they learn. */
#include "ppo_case.h"

enum { ADAPTERS = 3 };
static const psoup_objective objectives[3] = {PSOUP_OBJECTIVE_PPO, PSOUP_OBJECTIVE_RLOO,
                                              PSOUP_OBJECTIVE_GRPO};
static psoup_reward_input inputs[PROMPTS + VALIDATION][ADAPTERS];
static psoup_ppo_prompt users[PROMPTS + VALIDATION];

/* A callback that serves any adapter: the share of the token that adapter "Pk" is paid for. */
static int pay_adapter(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    return pay(&wanted[rollouts[0].policy[1] - '0'], rollouts, n, scores);
}

/* Prompts made for users: prompt i leaves out adapter i % 3. */
static void make_users(void) {
    for (int i = 0; i < PROMPTS + VALIDATION; i++) {
        users[i] = i < PROMPTS ? prompts[i] : validation[i - PROMPTS];
        users[i].inputs = inputs[i];
        users[i].n_inputs = 2;
        for (int k = 0; k < 2; k++)
            inputs[i][k] = (psoup_reward_input){.reward = (i + 1 + k) % ADAPTERS, .weight = 0.5f};
    }
}

static psoup_ppo_policy soup_policy(const psoup_ppo_soup *soup) {
    return (psoup_ppo_policy){.adapter = "soup",
                              .soup = soup,
                              .reward_fn = pay_adapter,
                              .prompts = prompts,
                              .n_prompts = PROMPTS,
                              .validation = validation,
                              .n_validation = VALIDATION,
                              .seed = 100};
}

static psoup_ppo_soup soup_of(size_t n) {
    psoup_ppo_soup soup = PSOUP_PPO_SOUP_INIT;
    soup.adapters = names;
    soup.n = n;
    return soup;
}

/* Adapters that say something: B and the head are no zeros. */
static void stir(psoup_model *model, int n) {
    for (int a = 0; a < n; a++) {
        const psoup__adapter *adapter = model->adapters[a];
        psoup__random random = {9, (uint64_t)a, 0};
        for (size_t i = 0; i < adapter->count; i++) {
            float x = 0.2f * psoup__random_normal(&random);
            model->be->ops->write(model->be, adapter->data + i, &x, sizeof(x));
        }
    }
}

/* Rollouts that grow within what was made for fewer have room for every column. */
START_TEST(rollouts_grow_in_all_columns) {
    psoup__rollouts r = {.n = 0};
    psoup_context *own;
    OK(psoup_context_create(NULL, &own, &error));
    for (size_t n = 1; n < 70; n += 3) {
        OK(psoup__rollouts_reserve(&r, own, n, 5, 7, &error));
        for (size_t i = 0; i < n; i++) {
            for (size_t k = 0; k < 5; k++)
                r.weight[i * 5 + k] = (float)(i + k);
            for (size_t k = 0; k < 7; k++)
                r.share[i * 7 + k] = r.part_score[i * 7 + k] = (float)(i * k);
        }
        for (size_t i = 0; i < n; i++)
            ck_assert(r.weight[i * 5 + 4] == (float)(i + 4) && r.share[i * 7 + 6] == (float)(i * 6) &&
                      r.part_score[i * 7 + 6] == (float)(i * 6));
    }
    psoup__rollouts_free(&r, own);
    psoup_context_free(own);
}
END_TEST

/* ---- mixes --------------------------------------------------------------------------------------- */

/* Mean, variance and covariance of the Dirichlet distribution, and no share where the parameter is 0. */
START_TEST(draws_are_dirichlets) {
    static const double parameters[][4] = {{1, 1, 1, 1}, {0.2, 0.5, 0, 2}, {30, 10, 0.05, 5}};
    enum { DRAWS = 40000 };
    const double *alpha = parameters[_i];
    double total = 0, mean[4] = {0}, square[4] = {0}, cross = 0;
    for (int k = 0; k < 4; k++)
        total += alpha[k];
    for (uint64_t d = 0; d < DRAWS; d++) {
        psoup__random random = {7, d, 0};
        double x[4], sum = 0;
        memcpy(x, alpha, sizeof(x));
        psoup__dirichlet(x, 4, &random);
        for (int k = 0; k < 4; k++) {
            ck_assert(x[k] >= 0 && x[k] <= 1 && (alpha[k] > 0 || x[k] == 0));
            sum += x[k];
            mean[k] += x[k] / DRAWS;
            square[k] += x[k] * x[k] / DRAWS;
        }
        cross += x[0] * x[1] / DRAWS;
        near(sum, 1, 1e-12, "sum of shares", d);
    }
    for (int k = 0; k < 4; k++) {
        double m = alpha[k] / total, v = m * (1 - m) / (total + 1);
        near(mean[k], m, 5 * sqrt(v / DRAWS) + 1e-12, "mean", (size_t)k);
        near(square[k] - mean[k] * mean[k], v, 0.03 * v + 1e-5, "variance", (size_t)k);
    }
    near(cross - mean[0] * mean[1], -alpha[0] * alpha[1] / (total * total * (total + 1)), 1e-3,
         "covariance", 0);
}
END_TEST

START_TEST(tiny_parameters_draw_a_vertex) {
    for (uint64_t d = 0; d < 1000; d++) {
        psoup__random random = {7, d, 0};
        double x[3] = {1e-30, 1e-30, 1e-30};
        psoup__dirichlet(x, 3, &random);
        near(fmax(x[0], fmax(x[1], x[2])), 1, 1e-12, "largest share", d);
    }
}
END_TEST

/* What a step's mixes are: over the prompt's inputs, as concentrated as was said, one for each group. */
START_TEST(mixes_are_what_was_asked_for) {
    static const float concentrations[] = {1, 0, INFINITY, 1e6f};
    psoup_model *model = fresh(ADAPTERS);
    psoup_ppo_soup soup = soup_of(ADAPTERS);
    psoup_ppo_policy p = soup_policy(&soup);
    psoup_ppo_options o = plain();
    psoup_ppo_trace t = {.size = sizeof(t)};
    float c = soup.concentration = concentrations[_i % 4];
    make_users();
    p.prompts = users;
    o.ppo_epochs = 1;
    o.objective = objectives[_i / 4];
    inputs[0][0].weight = 1.5f; /* its shares are 3/4 and 1/4 */
    psoup_ppo *ppo = create(model, &p, 1, &o);
    for (int step = 0; step < 2; step++) {
        OK(psoup_ppo_step(ppo, NULL, &error));
        OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
        ck_assert_uint_eq(t.adapters, ADAPTERS);
        for (size_t i = 0; i < t.rollouts; i++) {
            const psoup_ppo_prompt *prompt = ppo->policies[0].experience.rollouts.prompt[i];
            const float *mix = t.mix + i * ADAPTERS;
            size_t user = (size_t)prompt->id, out = user % ADAPTERS, first = (user + 1) % ADAPTERS;
            float share = user ? 0.5f : 0.75f;
            near(mix[0] + mix[1] + mix[2], 1, 1e-6, "sum of the mix", i);
            ck_assert(mix[out] == 0.0f);
            if (c == 0)
                ck_assert(mix[first] == 0.0f || mix[first] == 1.0f);
            else if (c == 1)
                ck_assert(mix[first] > 0.0f && mix[first] < 1.0f && mix[first] != share);
            else if (c == INFINITY)
                ck_assert(mix[first] == share);
            else
                near(mix[first], share, 3e-3, "share", i);
            if (_i / 4 && i % 4)
                ck_assert_mem_eq(mix, mix - ADAPTERS, ADAPTERS * sizeof(*mix));
        }
    }
    psoup_ppo_free(ppo);
    psoup_model_free(model);
}
END_TEST

/* ---- one-hot --------------------------------------------------------------------------------------- */

/* A soup whose every mix is one adapter: that adapter has the bits of its policy alone, with PPO, RLOO and
 * GRPO, and the others keep theirs. */
START_TEST(one_hot_is_the_policy_alone) {
    psoup_model *model = fresh(2);
    psoup_ppo_policy single = policy(0);
    psoup_ppo_options o = plain();
    psoup_ppo_trace t = {.size = sizeof(t)};
    size_t count, n;
    o.objective = objectives[_i];
    o.lora_dropout = o.head_dropout = 0.1f;
    o.mini_batch_size = 4;
    o.micro_batch_tokens = 40;
    o.truncation_penalty = 0.3f;
    o.validate_every = 2;
    psoup_ppo *ppo = create(model, &single, 1, &o);
    OK(psoup_ppo_run(ppo, &error));
    float *expected = weights(model, "P0", &count);
    OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
    size_t bytes = t.tokens * sizeof(float);
    float *advantage = memcpy(malloc(bytes), t.advantage, bytes);
    psoup_ppo_free(ppo);
    psoup_model_free(model);

    model = fresh(2);
    make_users();
    for (int i = 0; i < PROMPTS + VALIDATION; i++) {
        users[i].n_inputs = 1;
        inputs[i][0] = (psoup_reward_input){.reward = 0, .weight = 0.7f};
    }
    psoup_ppo_soup soup = soup_of(2);
    psoup_ppo_policy p = soup_policy(&soup);
    p.prompts = users;
    p.validation = users + PROMPTS;
    ppo = create(model, &p, 1, &o);
    float *other = weights(model, "P1", &n);
    OK(psoup_ppo_run(ppo, &error));
    OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
    ck_assert_uint_eq(t.tokens * sizeof(float), bytes);
    ck_assert_mem_eq(t.advantage, advantage, bytes);
    ck_assert(same_weights(model, "P0", expected, count));
    ck_assert(same_weights(model, "P1", other, n));
    psoup_ppo_free(ppo);
    psoup_model_free(model);
    free(other);
    free(expected);
    free(advantage);
}
END_TEST

/* ---- rewards and gradients --------------------------------------------------------------------------- */

/* Each adapter's scores have moments of their own; a response earns its mix of them, and reports tell. */
static double told[ADAPTERS];
static int keep_parts(void *user, const psoup_step *step) {
    if (strcmp(step->phase, "train") != 0)
        return 0;
    for (int k = 0; k < ADAPTERS; k++) {
        char name[32];
        snprintf(name, sizeof(name), "reward/P%d", k);
        told[k] = value_of(step, name);
    }
    return 0;
}

START_TEST(rewards_are_mixed) {
    psoup_model *model = fresh(ADAPTERS);
    psoup_ppo_soup soup = soup_of(ADAPTERS);
    psoup_ppo_policy p = soup_policy(&soup);
    psoup_ppo_options o = plain();
    psoup_ppo_trace t = {.size = sizeof(t)};
    psoup__moments moments[ADAPTERS] = {{0}};
    make_users();
    p.prompts = users;
    o.batch_size = 12;
    o.truncation_penalty = 0.5f;
    o.on_step = keep_parts;
    psoup_ppo *ppo = create(model, &p, 1, &o);
    stir(model, ADAPTERS);
    for (int step = 0; step < 3; step++) {
        float score[ADAPTERS][12], own[ADAPTERS][12];
        double beta = ppo->policies[0].state.kl_coefficient, sums[ADAPTERS] = {0};
        size_t n[ADAPTERS] = {0};
        OK(psoup_ppo_step(ppo, NULL, &error));
        OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
        for (size_t i = 0; i < 12; i++)
            for (int k = 0; k < ADAPTERS; k++) {
                int32_t length = t.start[i + 1] - t.start[i], wins = 0;
                for (int32_t at = t.start[i]; at < t.start[i + 1]; at++)
                    wins += t.response[at] == wanted[k];
                bool ended = t.response[t.start[i + 1] - 1] == END;
                score[k][i] = (float)wins / (float)length - (ended ? 0.0f : 0.5f);
                if (t.mix[i * ADAPTERS + (size_t)k] == 0.0f)
                    continue;
                sums[k] += (float)wins / (float)length;
                own[k][n[k]++] = score[k][i];
            }
        for (int k = 0; k < ADAPTERS; k++) {
            ck_assert_uint_gt(n[k], 2);
            psoup__moments_update(&moments[k], own[k], n[k]);
            near(told[k], sums[k] / (double)n[k], 1e-6, "reported reward", (size_t)k);
        }
        for (size_t i = 0; i < 12; i++) {
            double expected = 0.0, got = 0.0;
            for (int k = 0; k < ADAPTERS; k++)
                if (t.mix[i * ADAPTERS + (size_t)k] != 0.0f)
                    expected += t.mix[i * ADAPTERS + (size_t)k] * (score[k][i] - moments[k].mean) /
                                psoup__moments_deviation(&moments[k]);
            for (int32_t at = t.start[i]; at < t.start[i + 1]; at++)
                got += t.reward[at] + beta * ((double)t.logprob[at] - t.ref_logprob[at]);
            near(got, expected, 1e-4, "reward", i);
        }
    }
    psoup_ppo_free(ppo);
    psoup_model_free(model);
}
END_TEST

/* The loss of a step's first update by its definition: every response under its mix, its value the mix of
 * the adapters' heads; written without the passes that PPO packs. `same`: the weights are the step's. */
static double loss_of(psoup_model *model, const psoup_ppo_trace *t, const psoup__rollouts *r,
                      double value_coefficient, bool same) {
    psoup__tape *tape;
    double loss = 0.0;
    OK(psoup__tape_create(model, &tape, &error));
    for (size_t i = 0; i < t->rollouts; i++) {
        const psoup_ppo_prompt *prompt = r->prompt[i];
        int32_t n = t->start[i + 1] - t->start[i], q = (int32_t)prompt->n, begin = t->start[i];
        int32_t tokens[32], row[16], start[2] = {0, q + n - 1};
        int32_t at[16];
        float logprob[16], weight[16], value[16] = {0};
        memcpy(tokens, prompt->tokens, (size_t)q * sizeof(*tokens));
        memcpy(tokens + q, t->response + begin, (size_t)(n - 1) * sizeof(*tokens));
        for (int32_t k = 0; k < n; k++) {
            row[k] = q - 1 + k;
            at[k] = k;
        }
        psoup__batch batch = {.n = 1, .rows = q + n - 1, .tokens = tokens, .start = start,
                              .mix = t->mix + i * t->adapters};
        OK(psoup__forward(model, tape, &batch, false, &error));
        OK(psoup__logprobs(model, tape, row, t->response + begin, n, logprob, &error));
        for (size_t a = 0; a < t->adapters && value_coefficient > 0; a++) {
            psoup__head_rows head = {.adapter = model->adapters[a], .row = row, .at = at, .weight = weight, .n = n};
            for (int32_t k = 0; k < n; k++)
                weight[k] = t->mix[i * t->adapters + a];
            OK(psoup__heads(model, tape, &head, 1, value, &error));
        }
        for (int32_t k = 0; k < n; k++) {
            double off = (double)value[k] - t->returns[begin + k];
            loss -= t->advantage[begin + k] * exp((double)logprob[k] - t->logprob[begin + k]);
            loss += 0.5 * value_coefficient * off * off;
            if (same)
                near(value[k], t->value[begin + k], 1e-5, "value", (size_t)k);
        }
    }
    psoup__tape_free(tape);
    return loss / (double)t->tokens;
}

START_TEST(gradients_are_what_differences_say) {
    psoup_model *model = fresh(ADAPTERS);
    psoup_ppo_soup soup = soup_of(ADAPTERS);
    psoup_ppo_policy p = soup_policy(&soup);
    psoup_ppo_options o = plain();
    psoup_ppo_trace t = {.size = sizeof(t)};
    o.objective = _i ? PSOUP_OBJECTIVE_GRPO : PSOUP_OBJECTIVE_PPO;
    o.kl_coefficient = _i ? 0.0f : 0.2f; /* GRPO's loss has no other term then */
    o.adaptive_kl = 0;
    o.steps = o.ppo_epochs = 1;
    o.learning_rate = 0.0f; /* the gradient stays where it was summed, and the weights as they were */
    o.micro_batch_tokens = 40;
    o.value_coefficient = 0.7f;
    psoup_ppo *ppo = create(model, &p, 1, &o);
    stir(model, ADAPTERS);
    OK(psoup_ppo_step(ppo, NULL, &error));
    OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
    const psoup__rollouts *r = &ppo->policies[0].experience.rollouts;
    loss_of(model, &t, r, _i ? 0.0 : o.value_coefficient, true);
    for (int a = 0; a < ADAPTERS; a++) {
        const psoup__adapter *adapter = model->adapters[a];
        float *kept = malloc(adapter->count * sizeof(float));
        float *direction = malloc(adapter->count * sizeof(float)), *moved = calloc(adapter->count, 4);
        memcpy(kept, adapter->data, adapter->count * sizeof(float));
        for (int round = 0; round < 3; round++) {
            psoup__random random = {31, (uint64_t)(3 * a + round), 0};
            double slope = 0.0, side[2], h = 1e-3, norm = 0.0;
            for (size_t i = 0; i < adapter->count; i++) {
                direction[i] = psoup__random_normal(&random);
                slope += (double)direction[i] * adapter->grad[i];
                norm += (double)adapter->grad[i] * adapter->grad[i];
            }
            for (int s = 0; s < 2; s++) {
                for (size_t i = 0; i < adapter->count; i++)
                    moved[i] = kept[i] + (float)(s ? h : -h) * direction[i];
                model->be->ops->write(model->be, adapter->data, moved, adapter->count * sizeof(float));
                side[s] = loss_of(model, &t, r, _i ? 0.0 : o.value_coefficient, false);
            }
            model->be->ops->write(model->be, adapter->data, kept, adapter->count * sizeof(float));
            ck_assert_double_gt(norm, 1e-6);
            near((side[1] - side[0]) / (2 * h * sqrt(norm)), slope / sqrt(norm), 0.01, "slope",
                 (size_t)(3 * a + round));
        }
        free(kept);
        free(direction);
        free(moved);
    }
    psoup_ppo_free(ppo);
    psoup_model_free(model);
}
END_TEST

/* ---- runs ------------------------------------------------------------------------------------------- */

/* A soup and two policies in one run, and each alone on one thread: the same bits. */
START_TEST(side_by_side_is_alone) {
    static const char *const singles[2] = {"P4", "P5"};
    psoup_ppo_soup soup = soup_of(ADAPTERS);
    float *expected[5];
    const char *const all_names[5] = {"P0", "P1", "P2", singles[0], singles[1]};
    size_t count[5];
    psoup_ppo_options o = plain();
    o.mini_batch_size = 3;
    o.micro_batch_tokens = 40;
    o.lora_dropout = o.head_dropout = 0.1f;
    o.draw_new_tokens_from = 4;
    psoup_model *model = fresh(POLICIES);
    psoup_ppo_policy all[3] = {policy(4), soup_policy(&soup), policy(5)};
    make_users();
    all[1].prompts = users;
    psoup_ppo *ppo = create(model, all, 3, &o);
    OK(psoup_ppo_run(ppo, &error));
    for (int k = 0; k < 5; k++)
        expected[k] = weights(model, all_names[k], &count[k]);
    psoup_ppo_free(ppo);
    psoup_model_free(model);
    psoup_context_free(context);
    open_context(1);
    for (int p = 0; p < 3; p++) {
        model = fresh(POLICIES);
        ppo = create(model, &all[p], 1, &o);
        OK(psoup_ppo_run(ppo, &error));
        for (int k = p == 1 ? 0 : 3 + p / 2; k < (p == 1 ? 3 : 4 + p / 2); k++)
            ck_assert_msg(same_weights(model, all_names[k], expected[k], count[k]), "%s", all_names[k]);
        psoup_ppo_free(ppo);
        psoup_model_free(model);
    }
    for (int k = 0; k < 5; k++)
        free(expected[k]);
}
END_TEST

/* Mixes that no step drew are paid more after training than before: what is learned is the soup. */
START_TEST(held_out_mixes_earn_more) {
    static const float held[3][2] = {{0.5f, 0.5f}, {0.7f, 0.3f}, {0.15f, 0.85f}};
    enum { SAMPLES = 96 };
    psoup_model *model = fresh(2);
    psoup_ppo_soup soup = soup_of(2);
    psoup_ppo_policy p = soup_policy(&soup);
    psoup_ppo_options o = plain();
    double earned[2][3] = {{0}}, share[3][2];
    o.objective = objectives[_i];
    o.steps = 30;
    o.batch_size = 32;
    o.learning_rate = 2e-2f;
    o.kl_coefficient = 0.02f;
    o.keep_best = 0;
    psoup_ppo *ppo = create(model, &p, 1, &o);
    for (int after = 0; after < 2; after++) {
        if (after)
            OK(psoup_ppo_run(ppo, &error));
        for (int m = 0; m < 3; m++) {
            psoup_prompt asked[SAMPLES];
            psoup_sampling sampling = PSOUP_SAMPLING_INIT;
            psoup_generation *generation;
            sampling.max_new_tokens = 12;
            sampling.seed = 5;
            for (int i = 0; i < SAMPLES; i++)
                asked[i] = (psoup_prompt){.tokens = validation[i % VALIDATION].tokens,
                                          .n = validation[i % VALIDATION].n,
                                          .mix = held[m],
                                          .sequence = (uint64_t)i,
                                          .sampling = &sampling};
            OK(psoup_generate(model, asked, SAMPLES, NULL, NULL, NULL, NULL, &generation, &error));
            share[m][0] = share[m][1] = 0;
            for (size_t i = 0; i < SAMPLES; i++) {
                const psoup_completion *c = psoup_generation_get(generation, i);
                for (size_t k = 0; k < c->n; k++)
                    for (int a = 0; a < 2; a++)
                        share[m][a] += (c->tokens[k] == wanted[a]) / (double)(c->n * SAMPLES);
            }
            earned[after][m] = held[m][0] * share[m][0] + held[m][1] * share[m][1];
            psoup_generation_free(generation);
        }
    }
    for (int m = 0; m < 3; m++)
        ck_assert_msg(earned[1][m] > earned[0][m] + 0.15, "mix %d earned %g, then %g", m, earned[0][m],
                      earned[1][m]);
    ck_assert_double_gt(share[1][0], share[1][1]); /* who is paid more for a token gets more of it */
    ck_assert_double_gt(share[2][1], share[2][0]);
    psoup_ppo_free(ppo);
    psoup_model_free(model);
}
END_TEST

#define BAD(change, restore, text)                                                                 \
    do {                                                                                           \
        psoup_ppo *none;                                                                           \
        change;                                                                                    \
        error.message[0] = '\0';                                                                   \
        ck_assert_int_eq(psoup_ppo_create(model, policies, 2, &o, &none, &error),                  \
                         PSOUP_ERROR_ARGUMENT);                                                    \
        ck_assert_msg(strstr(error.message, text) != NULL, "'%s' has no '%s'", error.message, text); \
        restore;                                                                                   \
    } while (0)

START_TEST(senseless_soups_are_refused) {
    psoup_model *model = fresh(4);
    psoup_ppo_soup soup = soup_of(3);
    psoup_ppo_policy policies[2] = {policy(3), soup_policy(&soup)};
    psoup_ppo_options o = plain();
    static const char *const twice[3] = {"P0", "P1", "P0"}, *const taken[3] = {"P0", "P3", "P1"},
                      *const none_such[3] = {"P0", "P1", "P9"};
    make_users();
    policies[1].prompts = users;
    BAD(soup.concentration = -1.0f, soup.concentration = 1.0f, "concentration is -1: expected 0 to");
    BAD(soup.concentration = NAN, soup.concentration = 1.0f, "concentration is ");
    BAD(soup.size = 4, soup.size = sizeof(soup), "has size 4");
    BAD(soup.reserved = 1, soup.reserved = 0, "expected PSOUP_PPO_SOUP_INIT");
    BAD(soup.n = 0, soup.n = 3, "0 adapters");
    BAD(soup.n = 65, soup.n = 3, "65 adapters");
    BAD(soup.n = 2, soup.n = 3, "prompts[0] names reward 2 which its soup does not have");
    BAD(soup.adapters = twice, soup.adapters = names, "policy 'P0' is there twice");
    BAD(soup.adapters = taken, soup.adapters = names, "policy 'P3' is there twice");
    BAD(soup.adapters = none_such, soup.adapters = names, "no adapter 'P9'");
    BAD(policies[1].adapter = NULL, policies[1].adapter = "soup", "a soup has no name");
    BAD(policies[1].adapter = "P3", policies[1].adapter = "soup", "policy 'P3' is there twice");
    BAD(inputs[1][1].reward = 2, inputs[1][1].reward = 0, "prompts[1] names reward 2 twice");
    BAD(inputs[1][1].weight = -1.0f, inputs[1][1].weight = 0.5f, "has weight -1: expected 0 or more");
    BAD(inputs[1][0].weight = inputs[1][1].weight = 0.0f,
        inputs[1][0].weight = inputs[1][1].weight = 0.5f, "prompts[1] have no weight");
    psoup_reward *reward;
    OK(psoup_reward_create(model, "R", NULL, &reward, &error));
    BAD((policies[1].reward_fn = NULL, policies[1].rewards = &reward, policies[1].n_rewards = 1),
        policies[1].reward_fn = pay_adapter, "has 1 rewards: expected one for each of its soup's 3");
    psoup_ppo *ppo = create(model, policies, 2, &o); /* all restored */
    psoup_ppo_free(ppo);
    psoup_reward_free(reward);
    psoup_model_free(model);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train_soup");
    TCase *tests = tcase_create("soup");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 240);
    tcase_add_loop_test(tests, draws_are_dirichlets, 0, 3);
    tcase_add_test(tests, rollouts_grow_in_all_columns);
    tcase_add_test(tests, tiny_parameters_draw_a_vertex);
    tcase_add_loop_test(tests, mixes_are_what_was_asked_for, 0, 12);
    tcase_add_loop_test(tests, one_hot_is_the_policy_alone, 0, 3);
    tcase_add_test(tests, rewards_are_mixed);
    tcase_add_loop_test(tests, gradients_are_what_differences_say, 0, 2);
    tcase_add_test(tests, side_by_side_is_alone);
    tcase_add_loop_test(tests, held_out_mixes_earn_more, 0, 3);
    tcase_add_test(tests, senseless_soups_are_refused);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
