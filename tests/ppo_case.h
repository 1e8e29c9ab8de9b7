/* What the tests of PPO share: prompts, rewards that pay for a token, policies and a watcher of reports. */
#ifndef PPO_CASE_H
#define PPO_CASE_H

#include "train_case.h"
#include "ppo/ppo.h"

enum { PROMPTS = 16, VALIDATION = 8, POLICIES = 6 };

static int32_t words[PROMPTS + VALIDATION][4];
static psoup_ppo_prompt prompts[PROMPTS], validation[VALIDATION];

static inline void make_prompts(void) {
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
static inline int pay(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
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

static inline int pay_nan(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    for (size_t i = 0; i < n; i++)
        scores[i] = i ? 0.0f : NAN;
    return 0;
}

static inline int pay_fails(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    return 1;
}

static const char *const names[POLICIES] = {"P0", "P1", "P2", "P3", "P4", "P5"};
static int32_t wanted[POLICIES] = {3, 4, 5, 6, 7, 8};

static inline psoup_model *fresh(int policies) {
    psoup_model *model = tiny_model();
    make_prompts();
    for (int p = 0; p < policies; p++)
        add_adapter(model, names[p], 20 + (uint64_t)p);
    return model;
}

static inline psoup_ppo_policy policy(int p) {
    return (psoup_ppo_policy){.adapter = names[p],
                              .reward_fn = pay,
                              .reward_user = &wanted[p],
                              .prompts = prompts,
                              .n_prompts = PROMPTS,
                              .validation = validation,
                              .n_validation = VALIDATION,
                              .seed = 100 + (uint64_t)p};
}

static inline psoup_ppo_options plain(void) {
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

static inline int watch(void *user, const psoup_step *step) {
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

static inline int keep_grad_norm(void *user, const psoup_step *step) {
    if (strcmp(step->phase, "train") == 0)
        *(double *)user = value_of(step, "grad_norm");
    return 0;
}

static inline psoup_ppo *create(psoup_model *model, const psoup_ppo_policy *policies, size_t n,
                         const psoup_ppo_options *o) {
    psoup_ppo *ppo;
    OK(psoup_ppo_create(model, policies, n, o, &ppo, &error));
    return ppo;
}

static inline int run_suite(Suite *suite) {
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}

#endif
