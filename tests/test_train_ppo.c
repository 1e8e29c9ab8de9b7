/* PPO on a tiny model: it raises what it is paid for, and every policy's run is its own. */
#include <stdatomic.h>

#include "ppo_case.h"

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
    o.steps = 4; /* and in the last a KL coefficient of its own for each, which moves so far at a target so near */
    o.kl_horizon = 20.0f;
    o.kl_target = 0.1f;
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

/* Responses enough that each thread samples shares of its own: on one thread and on more, in many places and in
 * few, the same bits. */
START_TEST(shares_are_the_whole) {
    static const int threads[4] = {1, 2, 3, 3};
    float *expected[2] = {NULL, NULL};
    size_t count[2];
    for (int run = 0; run < 4; run++) {
        psoup_context_free(context);
        open_context(threads[run]);
        psoup_model *model = fresh(2);
        psoup_ppo_policy p[2] = {policy(0), policy(1)};
        psoup_ppo_options o = plain();
        o.steps = 2;
        o.batch_size = 300;
        o.ppo_epochs = 1;
        o.max_sequences = run == 3 ? 200 : 0;
        psoup_ppo *ppo = create(model, p, 2, &o);
        OK(psoup_ppo_run(ppo, &error));
        for (int k = 0; k < 2; k++)
            if (run)
                ck_assert(same_weights(model, names[k], expected[k], count[k]));
            else
                expected[k] = weights(model, names[k], &count[k]);
        psoup_ppo_free(ppo);
        psoup_model_free(model);
    }
    free(expected[0]);
    free(expected[1]);
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
/* Far steps under a narrow bound: who is paid stops before the eighth epoch. */
static psoup_ppo_options stopping(int last) {
    psoup_ppo_options o = plain();
    o.steps = 1;
    o.ppo_epochs = 8;
    o.learning_rate = 0.05f;
    o.target_kl = 0.05f;
    o.value_coefficient = 0.0f;
    o.whiten_advantages = 0;
    o.early_stop = last ? PSOUP_EARLY_STOP_LAST : PSOUP_EARLY_STOP_ALL;
    o.mini_batch_size = 4;
    return o;
}

typedef struct told { /* a policy's last report of training */
    const char *subject;
    size_t n;
    double values[64];
} told;

static int keep_report(void *user, const psoup_step *step) {
    told *t = user;
    if (strcmp(step->phase, "train") != 0 || strcmp(step->subject, t->subject) != 0)
        return 0;
    t->n = 0;
    for (size_t i = 0; i < step->n; i++)
        if (strstr(step->names[i], "second") == NULL) /* what it took is the clock's */
            t->values[t->n++] = step->values[i];
    return 0;
}

/* A policy that stopped is in no batch of the others: what it tells is what it tells alone, and its gradient is still
 * that of its own last step. */
START_TEST(early_stop_is_the_same_beside_others) {
    float *gradient[2];
    size_t count = 0;
    told beside = {.subject = "P0"}, alone = {.subject = "P0"};
    for (int n = 1; n <= 2; n++) {
        psoup_model *model = fresh(2);
        psoup_ppo_policy p[2] = {policy(0), policy(1)};
        static int32_t nothing = -1;
        p[1].reward_user = &nothing;
        psoup_ppo_options o = stopping(_i);
        o.on_step = keep_report;
        o.user = n == 1 ? &alone : &beside;
        psoup_ppo *ppo = create(model, p, (size_t)n, &o);
        OK(psoup_ppo_step(ppo, NULL, &error));
        const psoup__optimizer *g = &ppo->policies[0].parts[0].optimizer;
        count = g->n;
        gradient[n - 1] = malloc(count * sizeof(float));
        OK(model->be->ops->read(model->be, gradient[n - 1], g->g, count * sizeof(float), &error));
        psoup_ppo_free(ppo);
        psoup_model_free(model);
    }
    ck_assert_mem_eq(gradient[0], gradient[1], count * sizeof(float));
    free(gradient[0]);
    free(gradient[1]);
    ck_assert_uint_gt(alone.n, 10);
    ck_assert_uint_eq(alone.n, beside.n);
    for (size_t i = 0; i < alone.n; i++)
        ck_assert_msg(alone.values[i] == beside.values[i], "value %zu is %g, and %g beside another", i, alone.values[i],
                      beside.values[i]);
}
END_TEST

static psoup_status (*read_before)(psoup__backend *, void *, const void *, size_t, psoup_error *);
static atomic_int reads;

static psoup_status count_read(psoup__backend *be, void *host, const void *in, size_t bytes, psoup_error *e) {
    reads++;
    return read_before(be, host, in, bytes, e);
}

/* Of many passes, all that an epoch reads back is what its losses came to: nothing waits between forward and backward. */
START_TEST(epochs_read_their_terms_alone) {
    const psoup_objective objectives[] = {PSOUP_OBJECTIVE_PPO, PSOUP_OBJECTIVE_RLOO, PSOUP_OBJECTIVE_GRPO};
    int seen_reads[3];
    for (int epochs = 1; epochs <= 3; epochs++) {
        psoup_model *model = fresh(2);
        psoup__ops ops = *model->be->ops;
        psoup_ppo_policy p[2] = {policy(0), policy(1)};
        psoup_ppo_options o = plain();
        o.objective = objectives[_i];
        o.ppo_epochs = epochs;
        o.micro_batch_tokens = 32;
        p[0].n_validation = p[1].n_validation = 0;
        read_before = ops.read;
        ops.read = count_read;
        model->be->ops = &ops;
        psoup_ppo *ppo = create(model, p, 2, &o);
        reads = 0;
        OK(psoup_ppo_step(ppo, NULL, &error));
        seen_reads[epochs - 1] = reads;
        psoup_ppo_free(ppo);
        psoup_model_free(model);
    }
    ck_assert_int_eq(seen_reads[1], seen_reads[0] + 1);
    ck_assert_int_eq(seen_reads[2], seen_reads[0] + 2);
}
END_TEST

START_TEST(early_stop_leaves_the_batch) {
    seen s[2] = {{.subject = "P0"}, {.subject = "P1"}};
    for (int which = 0; which < 2; which++) {
        psoup_model *model = fresh(2);
        psoup_ppo_policy p[2] = {policy(0), policy(1)};
        static int32_t nothing = -1; /* never paid: with no advantage there is no update to speak of */
        p[1].reward_user = &nothing;
        psoup_ppo_options o = stopping(_i);
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

static int keep_policy_kl(void *user, const psoup_step *step) {
    if (strcmp(step->phase, "train") == 0)
        *(double *)user = value_of(step, "policy_kl");
    return 0;
}

/* Of two mini-batches the first sees no update: over all of an epoch KL is about half of what the last one sees.
 * Between the two, one rule stops after the first epoch and the other goes on. */
START_TEST(early_stop_reads_what_it_is_told) {
    seen s = {0};
    double kl = 0.0;
    for (int rule = 0; rule < 3; rule++) {
        psoup_model *model = fresh(1);
        psoup_ppo_policy p = policy(0);
        psoup_ppo_options o = plain();
        o.steps = 1;
        o.ppo_epochs = rule ? 3 : 1;
        o.learning_rate = 0.05f;
        o.mini_batch_size = 4;
        o.early_stop = rule == 0 ? PSOUP_EARLY_STOP_OFF : rule == 1 ? PSOUP_EARLY_STOP_LAST : PSOUP_EARLY_STOP_ALL;
        o.target_kl = rule ? (float)kl : 10.0f; /* 1.5 of it is a stop: 0.75 of the last mini-batch's */
        o.on_step = rule ? watch : keep_policy_kl;
        o.user = rule ? (void *)&s : &kl;
        psoup_ppo *ppo = create(model, &p, 1, &o);
        OK(psoup_ppo_step(ppo, NULL, &error));
        if (rule == 0)
            ck_assert_double_gt(kl, 0.01);
        else if (rule == 1)
            ck_assert_double_eq(s.epochs, 1.0);
        else
            ck_assert_double_gt(s.epochs, 1.0);
        psoup_ppo_free(ppo);
        psoup_model_free(model);
    }
}
END_TEST

/* Each group of responses by itself, and not the batch. */
START_TEST(groups_are_whitened_apart) {
    enum { GROUPS = 4 };
    psoup_model *model = fresh(1);
    psoup_ppo_policy p = policy(0);
    psoup_ppo_options o = plain();
    psoup_ppo_trace t = {.size = sizeof(t)};
    o.whiten_groups = GROUPS;
    o.batch_size = 16;
    psoup_ppo *ppo = create(model, &p, 1, &o);
    OK(psoup_ppo_step(ppo, NULL, &error));
    OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
    for (int g = 0; g < GROUPS; g++) {
        const int32_t begin = t.start[16 / GROUPS * g], end = t.start[16 / GROUPS * (g + 1)];
        double mean = 0.0, square = 0.0;
        for (int32_t k = begin; k < end; k++) {
            mean += t.advantage[k] / (double)(end - begin);
            square += t.advantage[k] * (double)t.advantage[k] / (double)(end - begin - 1);
        }
        near(mean, 0.0, 1e-5, "mean advantage of group", (size_t)g);
        near(square, 1.0, 1e-3, "deviation of group", (size_t)g);
    }
    psoup_ppo_free(ppo);
    psoup_model_free(model);
}
END_TEST

/* Dropout, of the factors or of the head, is live in updates and nowhere before them. */
START_TEST(dropout_is_of_updates) {
    enum { WAYS = 3, TOKENS = 256 };
    float *after[WAYS], logprob[TOKENS], value[TOKENS], advantage[TOKENS];
    size_t count;
    for (int way = 0; way < WAYS; way++) {
        psoup_model *model = fresh(1);
        psoup_ppo_policy p = policy(0);
        psoup_ppo_options o = plain();
        psoup_ppo_trace t = {.size = sizeof(t)};
        o.lora_dropout = way == 1 ? 0.1f : 0.0f;
        o.head_dropout = way == 2 ? 0.1f : 0.0f;
        psoup__adapter *a = model->adapters[0]; /* one that says something, with a critic that does */
        OK(psoup__adapter_add_head(model, a, &error));
        for (size_t i = 0; i < a->count; i++)
            a->data[i] += (float)((i * 37) % 17) / 64.0f - 0.125f;
        psoup_ppo *ppo = create(model, &p, 1, &o);
        OK(psoup_ppo_step(ppo, NULL, &error));
        OK(psoup_ppo_get_trace(ppo, 0, &t, &error));
        ck_assert_uint_le(t.tokens, TOKENS);
        if (way == 0) {
            memcpy(logprob, t.logprob, t.tokens * sizeof(float));
            memcpy(value, t.value, t.tokens * sizeof(float));
            memcpy(advantage, t.advantage, t.tokens * sizeof(float));
        }
        ck_assert_mem_eq(t.logprob, logprob, t.tokens * sizeof(float));
        ck_assert_mem_eq(t.value, value, t.tokens * sizeof(float));
        ck_assert_mem_eq(t.advantage, advantage, t.tokens * sizeof(float));
        after[way] = weights(model, "P0", &count);
        for (int other = 0; other < way; other++)
            ck_assert_mem_ne(after[way], after[other], count * sizeof(float));
        psoup_ppo_free(ppo);
        psoup_model_free(model);
    }
    for (int way = 0; way < WAYS; way++)
        free(after[way]);
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
    const psoup__optimizer *optimizer = &ppo->policies[0].parts[0].optimizer;
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
            ck_assert(!psoup_ppo_diverged(ppo, 0) && psoup_ppo_diverged(ppo, 1));
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

/* What each validation pays, whatever is said; training is paid by the token. */
typedef struct paid {
    const psoup_model *model;
    const char *subject;
    float by[4];
    int32_t token;
    int now, best;
    float *kept; /* the weights of validation `best` */
    size_t count;
} paid;

static int pay_by_turn(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    const paid *p = user;
    pay((void *)(uintptr_t)&p->token, rollouts, n, scores);
    for (size_t i = 0; i < n; i++)
        if (rollouts[i].prompt->id >= PROMPTS)
            scores[i] = p->by[p->now];
    return 0;
}

static int keep_best_weights(void *user, const psoup_step *step) {
    paid *all = user;
    for (int k = 0; k < 2; k++)
        if (strcmp(step->phase, "validation") == 0 && strcmp(step->subject, all[k].subject) == 0) {
            ck_assert_double_eq(value_of(step, "reward"), all[k].by[all[k].now]);
            if (all[k].now++ == all[k].best)
                all[k].kept = weights(all[k].model, all[k].subject, &all[k].count);
        }
    return 0;
}

/* Each policy ends with its own weights of the best mean reward in validation; without keep_best with its last. */
START_TEST(the_best_weights_stay) {
    psoup_model *model = fresh(2);
    paid all[2] = {{.model = model, .subject = "P0", .by = {1, 3, 2, 0}, .token = 3, .best = _i ? 3 : 1},
                   {.model = model, .subject = "P1", .by = {-2, -3, -1, -4}, .token = 4, .best = _i ? 3 : 2}};
    psoup_ppo_policy p[2] = {policy(0), policy(1)};
    psoup_ppo_options o = plain();
    o.steps = 4;
    o.validate_every = 1;
    o.keep_best = !_i;
    o.on_step = keep_best_weights;
    o.user = all;
    for (int k = 0; k < 2; k++) {
        p[k].reward_fn = pay_by_turn;
        p[k].reward_user = &all[k];
    }
    psoup_ppo *ppo = create(model, p, 2, &o);
    OK(psoup_ppo_run(ppo, &error));
    for (int k = 0; k < 2; k++) {
        ck_assert_int_eq(all[k].now, 4);
        ck_assert(same_weights(model, names[k], all[k].kept, all[k].count));
        free(all[k].kept);
    }
    psoup_ppo_free(ppo);
    psoup_model_free(model);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train_ppo");
    TCase *tests = tcase_create("ppo");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 240);
    tcase_add_test(tests, reward_rises);
    tcase_add_loop_test(tests, trace_is_what_was_computed, 0, 2);
    tcase_add_test(tests, loss_groups_share_the_mean);
    tcase_add_test(tests, side_by_side_is_alone);
    tcase_add_test(tests, shares_are_the_whole);
    tcase_add_loop_test(tests, epochs_read_their_terms_alone, 0, 3);
    tcase_add_loop_test(tests, early_stop_leaves_the_batch, 0, 2);
    tcase_add_loop_test(tests, early_stop_is_the_same_beside_others, 0, 2);
    tcase_add_test(tests, early_stop_reads_what_it_is_told);
    tcase_add_test(tests, groups_are_whitened_apart);
    tcase_add_test(tests, dropout_is_of_updates);
    tcase_add_loop_test(tests, guard_leaves_the_optimiser_alone, 0, 2);
    tcase_add_test(tests, diverged_policy_harms_nobody);
    tcase_add_loop_test(tests, the_best_weights_stay, 0, 2);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
