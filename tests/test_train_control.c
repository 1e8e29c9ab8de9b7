/* What keeps a run under control: guards that skip a step and say so, and signs of collapse that are told. */
#include <unistd.h>

#include "ppo_case.h"

/* ---- guards ----------------------------------------------------------------------------------------- */

/* Weights and AdamW's state of a policy. */
typedef struct snapshot {
    float *all; /* [3 n]: p, m, v */
    size_t n;
    int64_t steps;
} snapshot;

static snapshot look(const psoup__optimizer *o) {
    snapshot s = {.all = malloc(3 * o->n * sizeof(float)), .n = o->n, .steps = o->steps};
    const float *const parts[] = {o->p, o->m, o->v};
    for (int i = 0; i < 3; i++)
        OK(o->be->ops->read(o->be, s.all + (size_t)i * o->n, parts[i], o->n * sizeof(float), &error));
    return s;
}

static bool same(snapshot a, snapshot b) {
    bool equal = a.steps == b.steps && a.n == b.n && memcmp(a.all, b.all, 3 * a.n * sizeof(float)) == 0;
    free(a.all);
    free(b.all);
    return equal;
}

/* Pays, and makes the value head's bias NaN: values, and with them the losses, are no numbers. */
static psoup_model *poisoned;
static int pay_and_poison(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    psoup__adapter *a = psoup__model_adapter(poisoned, rollouts[0].policy);
    const float bad = NAN;
    poisoned->be->ops->write(poisoned->be, a->head + 16, &bad, sizeof(bad));
    return pay(user, rollouts, n, scores);
}

/* So much that the value loss overflows its gradient, and is a number itself. */
static int pay_millions(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    for (size_t i = 0; i < n; i++)
        scores[i] = 1e6f;
    return 0;
}

enum { NAN_LOSS, NAN_GRADIENT, RATIO, GUARDS };

/* A good step, and one of which every mini-batch is bad: it leaves weights, moments and count bit for bit as they
 * were, counts what it skipped, and says which policy, which step and what was wrong, once. */
START_TEST(a_bad_mini_batch_touches_nothing) {
    static const char *const why[GUARDS] = {"its loss or its ratio is not a finite number",
                                            "the norm of its gradient is ",
                                            "its mean ratio is 1 (ratio_threshold is 0.5)"};
    seen s = {0};
    psoup_model *model = poisoned = fresh(2);
    psoup_ppo_policy p[2] = {policy(0), policy(1)}; /* the second is told of too, in its own name */
    psoup_ppo_options o = plain();
    o.mini_batch_size = 4;
    o.ppo_epochs = 2;
    psoup_ppo *ppo = create(model, p, 2, &o);
    OK(psoup_ppo_step(ppo, NULL, &error));
    ck_assert_int_eq(heard.warnings, 0);
    ppo->reporter.on_step = watch;
    ppo->reporter.user = &s;
    s.subject = "P0";
    if (_i == NAN_LOSS)
        ppo->policies[0].sources[0].function = pay_and_poison;
    else if (_i == NAN_GRADIENT)
        for (int k = 0; k < 2; k++) {
            ppo->options.value_coefficient = 3e38f;
            ppo->options.normalize_reward = 0;
            ppo->policies[k].sources[0].function = pay_millions;
        }
    else
        ppo->options.ratio_threshold = 0.5f;
    psoup__optimizer *optimizer = &ppo->policies[0].parts[0].optimizer;
    snapshot before = look(optimizer);
    ck_assert_int_eq(before.steps, 4);
    before.all[before.n - 1] = _i == NAN_LOSS ? NAN : before.all[before.n - 1]; /* the head's bias */
    OK(psoup_ppo_step(ppo, NULL, &error));
    ck_assert_double_eq(s.skipped, 4.0);
    ck_assert_int_eq(heard.warnings, _i == NAN_LOSS ? 1 : 2);
    SAID(_i == NAN_LOSS ? "policy 'P0', step 2: mini-batch 1 was skipped"
                        : "policy 'P1', step 2: mini-batch 1 was skipped");
    SAID("its optimiser left as it was");
    SAID(why[_i]);
    ck_assert(same(before, look(optimizer)));
    if (_i == RATIO) { /* and where trl's rule is asked for, that is said */
        ppo->options.skipped_step = 1;
        before = look(optimizer);
        OK(psoup_ppo_step(ppo, NULL, &error));
        SAID("its optimiser stepped on a zero gradient");
        ck_assert(!same(before, look(optimizer)));
    }
    psoup_ppo_free(ppo);
    psoup_model_free(model);
}
END_TEST

/* A step so large that the next mini-batch's log-probabilities are no numbers. */
START_TEST(a_step_too_far_is_the_last) {
    float *expected = NULL;
    size_t count;
    for (int epochs = 1; epochs <= 3; epochs++) {
        seen s = {0};
        psoup_model *model = fresh(1);
        psoup_ppo_policy p = policy(0);
        psoup_ppo_options o = plain();
        p.n_validation = 0;
        o.steps = 1;
        o.ppo_epochs = epochs;
        o.learning_rate = 1e30f;
        o.early_stop = PSOUP_EARLY_STOP_OFF;
        o.on_step = watch;
        o.user = &s;
        psoup_ppo *ppo = create(model, &p, 1, &o);
        OK(psoup_ppo_step(ppo, NULL, &error));
        ck_assert_double_eq(s.skipped, epochs - 1);
        ck_assert_int_eq(ppo->policies[0].parts[0].optimizer.steps, 1);
        psoup_ppo_free(ppo);
        if (!expected)
            expected = weights(model, "P0", &count);
        ck_assert(same_weights(model, "P0", expected, count));
        psoup_model_free(model);
    }
    free(expected);
    SAID("mini-batch 2 was skipped");
}
END_TEST

static void put(psoup_model *model, const float *where, float value) {
    model->be->ops->write(model->be, (float *)(uintptr_t)where, &value, sizeof(value));
}

/* Counts skipped steps; and behind the first makes an element of the adapter NaN. */
typedef struct venom {
    psoup_model *model;
    const char *adapter; /* NULL: none */
    float *after;        /* [count] its weights then */
    size_t count;
    double skipped;
} venom;

static int poison(void *user, const psoup_step *step) {
    venom *v = user;
    v->skipped += value_of(step, "skipped");
    if (v->adapter && step->step == 1) {
        put(v->model, psoup__model_adapter(v->model, v->adapter)->data + 1, NAN);
        v->after = weights(v->model, v->adapter, &v->count);
    }
    return 0;
}

/* Fine-tuning, reward models and DPO skip such steps too, and say so. */
START_TEST(other_trainers_skip_and_say_so) {
    static const char *const says[] = {"sft: 'P0', step 2 was skipped, its optimiser left as it was: its loss is nan",
                                       "reward: 'R', step 2 was skipped, its optimiser left as it was: its loss is nan",
                                       "dpo: 'P0', step 2 was skipped, its optimiser left as it was: the norm of its "
                                       "gradient is "};
    psoup_model *model = fresh(1);
    psoup_reward *reward;
    const char *name = _i == 1 ? "R" : "P0";
    OK(psoup_reward_create(model, "R", NULL, &reward, &error));
    venom v = {.model = model, .adapter = _i < 2 ? name : NULL};
    if (_i == 2)
        v.after = weights(model, name, &v.count);
    const psoup_example example = {words[0], 2, 1};
    psoup_comparison pair = {.chosen = words[0], .n_chosen = 2, .rejected = words[1], .n_rejected = 3};
    psoup_dpo_pair two = {.prompt = words[0], .n_prompt = 1, .chosen = words[1], .n_chosen = 2, .rejected = words[2],
                          .n_rejected = 1};
    psoup_sft_options sft = PSOUP_SFT_OPTIONS_INIT;
    psoup_reward_options r = PSOUP_REWARD_OPTIONS_INIT;
    psoup_dpo_options dpo = PSOUP_DPO_OPTIONS_INIT;
    sft.max_steps = r.max_steps = dpo.max_steps = 2;
    sft.weight_decay = r.weight_decay = dpo.weight_decay = 0.5f;
    sft.on_step = r.on_step = dpo.on_step = poison;
    sft.user = r.user = dpo.user = &v;
    dpo.beta = 3e38f;
    if (_i == 0)
        OK(psoup_sft(model, "P0", &example, 1, NULL, 0, &sft, &error));
    else if (_i == 1)
        OK(psoup_reward_train(&reward, 1, &pair, 1, NULL, 0, &r, &error));
    else
        OK(psoup_dpo(model, &name, 1, &two, 1, NULL, 0, &dpo, &error));
    ck_assert_double_eq(v.skipped, _i < 2 ? 1.0 : 2.0);
    ck_assert_int_eq(heard.warnings, _i < 2 ? 1 : 2);
    SAID(says[_i]);
    ck_assert(same_weights(model, name, v.after, v.count));
    free(v.after);
    psoup_reward_free(reward);
    psoup_model_free(model);
}
END_TEST

/* ---- weights that nothing is learnt from ------------------------------------------------------------- */

typedef struct run {
    psoup_model *model;
    psoup_reward *reward;
    const char *metrics, *checkpoints;
} run;

static psoup_status run_sft(const run *r) {
    const psoup_example example = {words[0], 2, 1};
    psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
    o.metrics = r->metrics;
    o.checkpoint_dir = r->checkpoints;
    return psoup_sft(r->model, "R", &example, 1, NULL, 0, &o, &error);
}

static psoup_status run_reward(const run *r) {
    psoup_comparison pair = {.chosen = words[0], .n_chosen = 2, .rejected = words[1], .n_rejected = 3};
    psoup_reward_options o = PSOUP_REWARD_OPTIONS_INIT;
    o.metrics = r->metrics;
    o.checkpoint_dir = r->checkpoints;
    psoup_reward *rewards[] = {r->reward};
    return psoup_reward_train(rewards, 1, &pair, 1, NULL, 0, &o, &error);
}

static psoup_status run_dpo(const run *r) {
    const char *const both[] = {"P0", "R"};
    psoup_dpo_pair two[2] = {{.prompt = words[0], .n_prompt = 1, .chosen = words[1], .n_chosen = 2,
                              .rejected = words[2], .n_rejected = 1}};
    psoup_dpo_options o = PSOUP_DPO_OPTIONS_INIT;
    two[1] = two[0];
    two[1].policy = 1;
    o.metrics = r->metrics;
    o.checkpoint_dir = r->checkpoints;
    return psoup_dpo(r->model, both, 2, two, 2, NULL, 0, &o, &error);
}

static psoup_status improve(const run *r, psoup_objective objective, bool as_soup) {
    static const char *const both[] = {"P0", "R"};
    psoup_ppo_soup soup = PSOUP_PPO_SOUP_INIT;
    psoup_ppo_policy p = policy(0);
    psoup_ppo_options o = plain();
    psoup_ppo *ppo;
    soup.adapters = both;
    soup.n = 2;
    p.adapter = "R";
    p.soup = as_soup ? &soup : NULL;
    o.objective = objective;
    o.steps = 1;
    o.metrics = r->metrics;
    o.checkpoint_dir = r->checkpoints;
    psoup_status status = psoup_ppo_create(r->model, &p, 1, &o, &ppo, &error);
    if (status == PSOUP_OK)
        status = psoup_ppo_run(ppo, &error);
    psoup_ppo_free(ppo);
    return status;
}

static psoup_status run_ppo(const run *r) { return improve(r, PSOUP_OBJECTIVE_PPO, false); }
static psoup_status run_soup(const run *r) { return improve(r, PSOUP_OBJECTIVE_PPO, true); }

/* An adapter that holds NaN or an infinity anywhere is refused by name before a file is made; without a critic PPO
 * leaves heads alone, and whatever they hold. */
START_TEST(weights_that_are_no_numbers_are_refused) {
    static psoup_status (*const runs[])(const run *) = {run_sft, run_reward, run_dpo, run_ppo, run_soup};
    char directory[256], metrics[300], checkpoints[300];
    psoup_model *model = fresh(1);
    psoup_reward *reward;
    OK(psoup_reward_create(model, "R", NULL, &reward, &error));
    const psoup__adapter *a = psoup__model_adapter(model, "R");
    const struct {
        const float *where;
        float value;
        const char *says;
    } bad[] = {{a->lora[0].a, NAN, "model.layers.0.self_attn.q_proj.lora_A holds nan"},
               {a->lora[PSOUP__LINEARS].b - 1, -INFINITY, "model.layers.1.self_attn.q_proj.lora_A holds -inf"},
               {a->lora[PSOUP__V].b, NAN, "model.layers.0.self_attn.v_proj.lora_B holds nan"},
               {a->head + 15, INFINITY, "score.weight holds inf"},
               {a->head_bias, -NAN, "score.bias holds nan"}};
    temporary(directory, sizeof(directory));
    ck_assert_ptr_nonnull(mkdtemp(directory));
    snprintf(metrics, sizeof(metrics), "%s/metrics.jsonl", directory);
    snprintf(checkpoints, sizeof(checkpoints), "%s/checkpoints", directory);
    const run r = {model, reward, metrics, checkpoints};
    for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
        float good;
        OK(model->be->ops->read(model->be, &good, bad[i].where, sizeof(good), &error));
        put(model, bad[i].where, bad[i].value);
        ck_assert_int_eq(runs[_i](&r), PSOUP_ERROR_ARGUMENT);
        ck_assert_msg(strstr(error.message, "adapter 'R' cannot be trained: its tensor ") != NULL, "%s", error.message);
        ck_assert_msg(strstr(error.message, bad[i].says) != NULL, "\"%s\" lacks \"%s\"", error.message, bad[i].says);
        ck_assert_ptr_null(a->grad);
        if (i > 2) { /* of the head */
            const run plain = {model, reward, NULL, NULL};
            OK(improve(&plain, PSOUP_OBJECTIVE_RLOO, false));
        }
        put(model, bad[i].where, good);
    }
    ck_assert_int_eq(heard.warnings, 0);
    ck_assert_int_eq(rmdir(directory), 0); /* which is empty */
    psoup_reward_free(reward);
    psoup_model_free(model);
}
END_TEST

/* Elements of a gradient are clipped in every trainer, and a value beyond all of them changes nothing. */
START_TEST(gradients_are_clipped_by_value) {
    static const float values[3] = {0.0f, 1e30f, 1e-3f};
    float *expected = NULL;
    size_t count;
    for (int v = 0; v < 3; v++) {
        psoup_model *model = fresh(1);
        psoup_reward *reward;
        const char *name = _i == 1 ? "R" : "P0";
        OK(psoup_reward_create(model, "R", NULL, &reward, &error));
        const psoup_example example = {words[0], 2, 1};
        psoup_comparison pair = {.chosen = words[0], .n_chosen = 2, .rejected = words[1], .n_rejected = 3};
        psoup_dpo_pair two = {.prompt = words[0], .n_prompt = 1, .chosen = words[1], .n_chosen = 2,
                              .rejected = words[2], .n_rejected = 1};
        psoup_ppo_policy p = policy(0);
        psoup_sft_options sft = PSOUP_SFT_OPTIONS_INIT;
        psoup_reward_options r = PSOUP_REWARD_OPTIONS_INIT;
        psoup_dpo_options dpo = PSOUP_DPO_OPTIONS_INIT;
        psoup_ppo_options o = plain();
        sft.max_steps = r.max_steps = dpo.max_steps = 3;
        sft.max_grad_value = r.max_grad_value = dpo.max_grad_value = o.max_grad_value = values[v];
        if (_i == 0)
            OK(psoup_sft(model, "P0", &example, 1, NULL, 0, &sft, &error));
        else if (_i == 1)
            OK(psoup_reward_train(&reward, 1, &pair, 1, NULL, 0, &r, &error));
        else if (_i == 2)
            OK(psoup_dpo(model, &name, 1, &two, 1, NULL, 0, &dpo, &error));
        psoup_ppo *ppo = _i == 3 ? create(model, &p, 1, &o) : NULL;
        if (ppo)
            OK(psoup_ppo_step(ppo, NULL, &error));
        psoup_ppo_free(ppo);
        if (v == 0)
            expected = weights(model, name, &count);
        else
            ck_assert_int_eq(same_weights(model, name, expected, count), v == 1);
        psoup_reward_free(reward);
        psoup_model_free(model);
    }
    free(expected);
}
END_TEST

/* ---- signs of collapse ------------------------------------------------------------------------------ */

START_TEST(repeated_grams_are_counted) {
    psoup__random random = {9, 0, 0};
    int32_t tokens[64], table[256];
    size_t some = 0;
    for (int round = 0; round < 200; round++) {
        size_t n = psoup__random_below(&random, 65), expected = 0;
        for (size_t i = 0; i < n; i++)
            tokens[i] = (int32_t)psoup__random_below(&random, 1 + (uint32_t)round % 4);
        for (size_t i = 0; i + 4 <= n; i++) {
            bool before = false;
            for (size_t j = 0; j < i; j++)
                before = before || memcmp(tokens + i, tokens + j, 4 * sizeof(*tokens)) == 0;
            expected += before;
        }
        ck_assert_uint_eq(psoup__repeated_grams(tokens, n, table, 256), expected);
        some += expected;
    }
    ck_assert_uint_gt(some, 1000);
}
END_TEST

/* One metric of the step that a policy has noted. */
static double noted(const psoup__policy *policy, const char *name) {
    for (size_t i = 0; i < policy->metrics.n; i++)
        if (strcmp(policy->metrics.name[i], name) == 0)
            return policy->metrics.value[i];
    ck_abort_msg("no metric %s", name);
}

static void see(psoup_ppo *ppo, psoup__ppo_summary s) {
    psoup__policy *policy = &ppo->policies[0];
    policy->metrics.n = 0;
    policy->next = policy->state;
    policy->next.step++;
    psoup__ppo_watch(ppo, policy, &s);
    policy->state = policy->next;
}

/* Step t of a run of 24 by which a reward of deviation 1 rises by `rise`, at a KL that grows to `kl`. */
static psoup__ppo_summary at_step(int t, double rise, double kl) {
    double done = t / 23.0;
    return (psoup__ppo_summary){.reward = 5.0 + rise * done, .deviation = 1.0, .kl = kl * done * done};
}

/* A reward that rises by what its KL can buy is no sign of anything, nor is one that rises slowly; what the KL cannot
 * buy is told once, when the window is full. KL that grows while the reward falls is told of; noise is not. */
START_TEST(rewards_and_kl_belong_together) {
    static const struct {
        double rise, kl;
        float rise_bound, growth_bound;
        int warnings;
        const char *says;
    } runs[] = {
        {4.0, 9.0, 1.0f, 2.0f, 0, NULL}, /* what a normal reward costs: rise²/2 and a little */
        {0.5, 0.0, 1.0f, 2.0f, 0, NULL}, /* within what chance does */
        {4.0, 0.1, 1.0f, 2.0f, 1, "its reward rose from "},
        {4.0, -1.0, 1.0f, 2.0f, 1, "the reward does not come from the policy"},
        {4.0, 0.1, 0.0f, 2.0f, 0, NULL}, /* not asked for */
        {4.0, 0.1, 3.0f, 2.0f, 0, NULL}, /* a bound above what it rose within the window */
        {-4.0, 20.0, 1.0f, 2.0f, 1, "its KL grew from "},
        {-4.0, 20.0, 1.0f, 0.0f, 0, NULL},
        {-4.0, 0.9, 1.0f, 2.0f, 0, NULL}, /* hardly any KL */
        {0.0, 20.0, 1.0f, 2.0f, 0, NULL}, /* the reward stays */
    };
    psoup_model *model = fresh(1);
    psoup_ppo_policy p = policy(0);
    for (size_t i = 0; i < sizeof(runs) / sizeof(*runs); i++) {
        psoup_ppo_options o = plain();
        o.warn_reward_rise = runs[i].rise_bound;
        o.warn_kl_growth = runs[i].growth_bound;
        psoup_ppo *ppo = create(model, &p, 1, &o);
        heard = (spoken){0};
        for (int t = 0; t < 24; t++) {
            see(ppo, at_step(t, runs[i].rise, runs[i].kl));
            if (t < 15)
                ck_assert(heard.warnings == 0 && noted(&ppo->policies[0], "reward_rise") == 0.0);
            ck_assert_double_eq(noted(&ppo->policies[0], "warnings"), heard.warnings);
        }
        ck_assert_msg(heard.warnings == runs[i].warnings, "run %zu: %d warnings", i, heard.warnings);
        if (runs[i].says)
            SAID(runs[i].says);
        near(noted(&ppo->policies[0], "reward_rise"), runs[i].rise * 8.0 / 23.0, 1e-9, "rise", i);
        see(ppo, (psoup__ppo_summary){.reward = 5.0, .deviation = 1.0, .kl = 40.0}); /* over for now, */
        for (int t = 0; t < 15; t++)
            see(ppo, (psoup__ppo_summary){.reward = 5.0, .deviation = 1.0, .kl = 40.0});
        ck_assert_double_eq(noted(&ppo->policies[0], "warnings"), 0.0);
        psoup_ppo_free(ppo);
    }
    psoup_model_free(model);
}
END_TEST

/* One response to a step has no deviation that a rise could be measured in, nor means with a known error. */
START_TEST(one_response_tells_of_nothing) {
    psoup_model *model = fresh(1);
    psoup_ppo_policy p = policy(0);
    psoup_ppo_options o = plain();
    o.batch_size = 1;
    psoup_ppo *ppo = create(model, &p, 1, &o);
    heard = (spoken){0};
    for (int t = 0; t < 24; t++) {
        psoup__ppo_summary s = at_step(t, 4.0 * (_i ? -1.0 : 1.0), _i ? 20.0 : 9.0);
        s.deviation = 0.0;
        see(ppo, s);
        ck_assert_double_eq(noted(&ppo->policies[0], "warnings"), 0.0);
        ck_assert_double_eq(noted(&ppo->policies[0], "reward_rise"), 0.0);
    }
    ck_assert_int_eq(heard.warnings, 0);
    psoup_ppo_free(ppo);
    psoup_model_free(model);
}
END_TEST

/* A reward whose every response earns the same, more each step, comes from no policy. */
static int drift(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    int *calls = user;
    for (size_t i = 0; i < n; i++)
        scores[i] = (float)*calls;
    ++*calls;
    return 0;
}

typedef struct last_step {
    double repetition, empty, warnings;
} last_step;
static int keep_last(void *user, const psoup_step *step) {
    last_step *l = user;
    l->repetition = value_of(step, "repetition");
    l->empty = value_of(step, "empty");
    if (strcmp(step->phase, "train") == 0)
        l->warnings = value_of(step, "warnings");
    return 0;
}

/* In real runs: a policy that repeats itself, one that says nothing, a reward that drifts, and one that learns as it
 * should, of which nothing is told. The weights are those of a run that is not watched, bit for bit. */
START_TEST(runs_are_watched_and_left_alone) {
    float *expected = NULL;
    size_t count;
    for (int watched = 0; watched < 2; watched++) {
        last_step last = {0};
        int calls = 0;
        psoup_model *model = fresh(1);
        psoup_ppo_policy p = policy(0);
        psoup_ppo_options o = plain();
        o.on_step = keep_last;
        o.user = &last;
        o.steps = 6;
        o.warn_window = 4;
        heard = (spoken){0};
        if (_i == 0) { /* greedy, as good as: this tiny model then goes in circles */
            o.temperature = 1e-3f;
            o.max_new_tokens = o.min_new_tokens = 40;
            o.warn_repetition = 0.2f;
            o.learning_rate = 0.0f;
        } else if (_i == 1) { /* paid for the end token alone */
            wanted[0] = END;
            o.steps = 30;
            o.warn_empty = 0.1f;
            o.batch_size = 32;
            o.learning_rate = 3e-2f;
            o.warn_kl_growth = 0.0f;
        } else if (_i == 2) {
            p.reward_fn = drift;
            p.reward_user = &calls;
            o.learning_rate = 0.0f;
        } else {
            o.steps = 30;
            o.batch_size = 32;
            o.learning_rate = 2e-2f;
            o.warn_window = 16;
        }
        if (!watched)
            o.warn_repetition = o.warn_empty = o.warn_reward_rise = o.warn_kl_growth = 0.0f;
        psoup_ppo *ppo = create(model, &p, 1, &o);
        for (int64_t left = 1; left > 0;)
            OK(psoup_ppo_step(ppo, &left, &error));
        psoup_ppo_free(ppo);
        ck_assert_int_eq(heard.warnings > 0, watched && _i < 3);
        ck_assert_double_eq(last.warnings, watched && _i < 3);
        if (_i == 0)
            ck_assert_double_gt(last.repetition, 0.2);
        if (_i == 1)
            ck_assert_double_gt(last.empty, 0.1);
        if (watched && _i < 3)
            SAID(_i == 0 ? "of the 4-grams of its responses repeat" : _i == 1 ? "of its responses are empty"
                                                                              : "its reward rose from ");
        if (!watched)
            expected = weights(model, "P0", &count);
        else
            ck_assert(same_weights(model, "P0", expected, count));
        psoup_model_free(model);
        wanted[0] = 3;
    }
    free(expected);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train_control");
    TCase *tests = tcase_create("control");
    tcase_set_timeout(tests, 120);
    tcase_add_checked_fixture(tests, set_up_log, tear_down);
    tcase_add_loop_test(tests, a_bad_mini_batch_touches_nothing, 0, GUARDS);
    tcase_add_test(tests, a_step_too_far_is_the_last);
    tcase_add_loop_test(tests, other_trainers_skip_and_say_so, 0, 3);
    tcase_add_loop_test(tests, weights_that_are_no_numbers_are_refused, 0, 5);
    tcase_add_loop_test(tests, gradients_are_clipped_by_value, 0, 4);
    tcase_add_test(tests, repeated_grams_are_counted);
    tcase_add_test(tests, rewards_and_kl_belong_together);
    tcase_add_loop_test(tests, one_response_tells_of_nothing, 0, 2);
    tcase_add_loop_test(tests, runs_are_watched_and_left_alone, 0, 4);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
