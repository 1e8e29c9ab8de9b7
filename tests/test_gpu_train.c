/* The trainers on a GPU against the same on the CPU: from the same start, over the same texts, to the same weights but
 * for rounding. Where there is no GPU the host driver stands for one (tests/host_driver). */
#include "ppo_case.h"
#include "resume_case.h"

static void on(const char *device) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.device = device;
    OK(psoup_context_create(&options, &context, &error));
}

/* What a training makes of weights, on each device. */
typedef struct made {
    float *before, *after[2];
    size_t n;
} made;

static void keep(made *m, int device, float *before, float *after, size_t n) {
    if (device == 0)
        m->before = before;
    else
        free(before);
    m->after[device] = after;
    m->n = n;
}

/* ‖change on the GPU − change on the CPU‖ ≤ tolerance · ‖change on the CPU‖. */
static void same_change(made *m, const char *what, double tolerance) {
    double off = 0, size = 0;
    for (size_t i = 0; i < m->n; i++) {
        const double change = (double)m->after[0][i] - m->before[i];
        off += pow((double)m->after[1][i] - m->after[0][i], 2);
        size += change * change;
    }
    ck_assert_msg(size > 0 && sqrt(off / size) <= tolerance, "%s: the changes differ by %g of them", what,
                  sqrt(off / size));
    free(m->before), free(m->after[0]), free(m->after[1]);
}

static const char *const devices[2] = {"cpu", "cuda:0"};

static int32_t texts[12][12];
static psoup_example examples[12];

static void make_examples(void) {
    for (int i = 0; i < 12; i++) {
        size_t n = 6 + (size_t)i % 6;
        for (size_t t = 0; t < n; t++)
            texts[i][t] = 2 + (int32_t)((i * 7 + (int)t * (i + 1)) % 13);
        examples[i] = (psoup_example){.tokens = texts[i], .n = n, .n_prompt = 2};
    }
}

static float *base_weights(const psoup_model *model, size_t *n) {
    float *out = calloc(*n = 16 * VOCABULARY, sizeof *out), scratch[16 * VOCABULARY];
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);)
        if (strcmp(p.name, "model.embed_tokens.weight") == 0)
            OK(psoup__parameter_read(model, &p, 0, *n, out, scratch, &error));
    return out;
}

/* An adapter with dropout, then the base itself. */
START_TEST(sft_is_the_cpus) {
    made m = {.n = 0};
    make_examples();
    for (int d = 0; d < 2; d++) {
        on(devices[d]);
        psoup_model *model = tiny_model();
        add_adapter(model, "P", 2);
        psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
        o.learning_rate = 1e-3f;
        o.epochs = 4;
        o.batch_tokens = 64;
        o.lora_dropout = _i ? 0 : 0.2f;
        size_t n;
        float *before = _i ? base_weights(model, &n) : weights(model, "P", &n);
        OK(psoup_sft(model, _i ? NULL : "P", examples, 12, examples, 4, &o, &error));
        float *after = _i ? base_weights(model, &n) : weights(model, "P", &n);
        keep(&m, d, before, after, n);
        psoup_model_free(model);
        psoup_context_free(context);
    }
    same_change(&m, _i ? "the base" : "an adapter", 2e-2);
}
END_TEST

START_TEST(reward_is_the_cpus) {
    made m = {.n = 0};
    float scores[2][12];
    make_examples();
    for (int d = 0; d < 2; d++) {
        on(devices[d]);
        psoup_model *model = tiny_model();
        psoup_reward *reward[2];
        psoup_comparison pairs[12];
        psoup_row rows[12];
        for (int r = 0; r < 2; r++) {
            psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
            options.rank = 4;
            options.targets = PSOUP_ALL_LINEAR;
            options.seed = (uint64_t)r;
            OK(psoup_reward_create(model, r ? "R1" : "R0", &options, &reward[r], &error));
        }
        for (int i = 0; i < 12; i++) {
            const psoup_example *a = &examples[i], *b = &examples[(i + 5) % 12];
            pairs[i] = (psoup_comparison){a->tokens, a->n, b->tokens, b->n, i % 2, 0.0f};
            rows[i] = (psoup_row){a->tokens, a->n, NULL};
        }
        psoup_reward_options o = PSOUP_REWARD_OPTIONS_INIT;
        o.learning_rate = 1e-3f;
        o.epochs = 3;
        o.batch_size = 4;
        size_t n;
        float *before = weights(model, "R1", &n);
        OK(psoup_reward_train(reward, 2, pairs, 12, pairs, 12, &o, &error));
        keep(&m, d, before, weights(model, "R1", &n), n);
        OK(psoup_reward_score(reward[1], rows, 12, scores[d], &error));
        psoup_reward_free(reward[0]);
        psoup_reward_free(reward[1]);
        psoup_model_free(model);
        psoup_context_free(context);
    }
    for (int i = 0; i < 12; i++)
        near(scores[1][i], scores[0][i], 1e-3, "score", (size_t)i);
    same_change(&m, "a reward model", 2e-2);
}
END_TEST

/* PPO, RLOO and GRPO of two policies side by side, or of a policy and a soup of two, with validation and dropout in the
 * head: rollouts in windows, values, advantages, two epochs of updates. A text that differed would show: the changes
 * would have nothing in common. */
START_TEST(ppo_is_the_cpus) {
    static const psoup_objective objectives[3] = {PSOUP_OBJECTIVE_PPO, PSOUP_OBJECTIVE_RLOO, PSOUP_OBJECTIVE_GRPO};
    made m[3] = {{.n = 0}, {.n = 0}, {.n = 0}};
    const bool souped = _i % 2;
    int n_adapters = souped ? 3 : 2;
    psoup_ppo_soup soup = PSOUP_PPO_SOUP_INIT;
    soup.adapters = names + 1;
    soup.n = 2;
    seen s[2];
    for (int d = 0; d < 2; d++) {
        on(devices[d]);
        psoup_model *model = fresh(n_adapters);
        psoup_ppo_policy policies[2] = {policy(0), policy(1)};
        psoup_ppo_options o = plain();
        float *before[3];
        size_t n;
        if (souped)
            policies[1].soup = &soup;
        o.objective = objectives[_i / 2];
        o.steps = 2;
        o.ppo_epochs = 2;
        o.learning_rate = 1e-3f;
        o.head_dropout = 0.1f;
        o.validate_every = 2;
        o.on_step = watch;
        o.user = &s[d];
        s[d] = (seen){.subject = "P1"};
        psoup_ppo *ppo = create(model, policies, 2, &o); /* which gives them a head for the value */
        for (int p = 0; p < n_adapters; p++)
            before[p] = weights(model, names[p], &n);
        OK(psoup_ppo_run(ppo, &error));
        for (int p = 0; p < n_adapters; p++)
            keep(&m[p], d, before[p], weights(model, names[p], &n), n);
        psoup_ppo_free(ppo);
        psoup_model_free(model);
        psoup_context_free(context);
    }
    near(s[1].first, s[0].first, 1e-6, "reward of the first step", 0);
    near(s[1].last, s[0].last, 1e-6, "reward of the last", 0);
    near(s[1].validation, s[0].validation, 1e-6, "validation reward", 0);
    same_change(&m[0], "policy 0", 5e-2);
    same_change(&m[1], "policy 1", 5e-2);
    if (souped)
        same_change(&m[2], "the soup's other adapter", 5e-2);
}
END_TEST

/* An adapter, then the base: its state goes to the checkpoint and comes back through the device's own ops. */
START_TEST(stopped_runs_go_on) {
    const char *adapter = _i ? NULL : "P";
    float *end[2];
    size_t n;
    run r;
    make_examples();
    on(devices[1]);
    run_begin(&r);
    for (int stopped = 0; stopped < 2; stopped++) {
        psoup_status status = PSOUP_ERROR_CANCELLED;
        for (int part = 0; status != PSOUP_OK; part++) {
            psoup_model *model = tiny_model();
            add_adapter(model, "P", 2);
            psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
            o.learning_rate = 1e-3f;
            o.epochs = 2;
            o.batch_tokens = 32;
            o.validate_every = 2;
            o.on_step = watch_run;
            o.user = &r;
            o.checkpoint_dir = stopped ? r.checkpoints : NULL;
            o.resume = stopped;
            r.stop_after = stopped && part < 2 ? 3 : 0;
            status = psoup_sft(model, adapter, examples, 12, examples, 4, &o, &error);
            ck_assert(status == (r.stop_after || !stopped || part > 1 ? PSOUP_OK : PSOUP_ERROR_CANCELLED));
            if (status == PSOUP_OK)
                end[stopped] = _i ? base_weights(model, &n) : weights(model, "P", &n);
            psoup_model_free(model);
        }
    }
    ck_assert_int_eq(memcmp(end[0], end[1], n * sizeof(float)), 0);
    free(end[0]), free(end[1]);
    run_end(&r);
    psoup_context_free(context);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("gpu: training");
    TCase *tests = tcase_create("training");
    tcase_set_timeout(tests, 600);
    tcase_add_loop_test(tests, sft_is_the_cpus, 0, 2);
    tcase_add_test(tests, reward_is_the_cpus);
    tcase_add_loop_test(tests, ppo_is_the_cpus, 0, 6);
    tcase_add_loop_test(tests, stopped_runs_go_on, 0, 2);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
