/* PPO cancelled, paid NaN, refused, and out of memory. */
#include "ppo_case.h"

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
            ppo->policies[0].sources[0].function = failing == 1 ? pay_nan : pay_fails;
            ck_assert_int_eq(psoup_ppo_step(ppo, &remaining, &error),
                             failing == 1 ? PSOUP_ERROR_STATE : PSOUP_ERROR_CANCELLED);
            ck_assert_int_eq(remaining, 3);
            ppo->policies[0].sources[0].function = pay;
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

    ppo = (psoup_ppo *)model;
    ck_assert_int_eq(psoup_ppo_create(model, p, 0, &o, &ppo, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_null(ppo);
    p[1].adapter = "P0";
    ck_assert_int_eq(psoup_ppo_create(model, p, 2, &o, &ppo, &error), PSOUP_ERROR_ARGUMENT);
    p[1].adapter = "nobody";
    ck_assert_int_eq(psoup_ppo_create(model, p, 2, &o, &ppo, &error), PSOUP_ERROR_ARGUMENT);
    p[0].reward_fn = NULL;
    ck_assert_int_eq(psoup_ppo_create(model, p, 1, &o, &ppo, &error), PSOUP_ERROR_ARGUMENT);
    psoup_model_free(model);
}
END_TEST

/* Each policy is sound but for one thing, which the message names. */
START_TEST(unsound_policies_are_refused) {
    static const char *const says[] = {
        "prompts is NULL",      "prompts[0] has 0 tokens",  "prompts[0] has 48 tokens",
        "validation[0] has 0",  "has no prompts",           "neither a reward model nor a callback",
        "rewards[0] is NULL",   "lists no reward input",    "names reward 1 of 1",
        "names reward -1 of 1", "has weight inf",           "and no tokens",
        "both a policy and a reward model", "prompts[0].reserved is not 0", "validation[0].reserved is not 0",
        "'P0': reserved is not 0",
    };
    psoup_model *model = fresh(1);
    psoup_reward *reward, *none = NULL;
    psoup_ppo_options o = plain();
    OK(psoup_reward_create(model, "R", NULL, &reward, &error));
    for (int i = 0; i < (int)(sizeof says / sizeof *says); i++) {
        const int32_t tokens[48] = {2, 3};
        psoup_reward_input input = {0, 1.0f, tokens, 2};
        psoup_ppo_prompt bad = {.tokens = tokens, .n = i == 1 || i == 3 ? 0 : i == 2 ? 48 : 2};
        psoup_ppo_policy p = policy(0);
        psoup_ppo *ppo;
        bad.reserved[1] = i == 13 || i == 14;
        p.reserved[0] = i == 15;
        if (i == 0)
            p.prompts = NULL;
        else if (i == 3 || i == 14)
            p.validation = &bad, p.n_validation = 1;
        else
            p.prompts = &bad, p.n_prompts = i != 4;
        if (i >= 5) {
            p.reward_fn = NULL;
            p.rewards = i == 6 ? &none : &reward;
            p.n_rewards = i != 5;
        }
        if (i >= 7) {
            input.reward = i == 8 ? 1 : i == 9 ? -1 : 0;
            input.weight = i == 10 ? INFINITY : 1.0f;
            input.tokens = i == 11 ? NULL : tokens;
            bad.inputs = &input;
            bad.n_inputs = i != 7;
        }
        if (i == 12)
            p.adapter = "R";
        ck_assert_int_eq(psoup_ppo_create(model, &p, 1, &o, &ppo, &error), PSOUP_ERROR_ARGUMENT);
        ck_assert_msg(strstr(error.message, says[i]) != NULL, "\"%s\" lacks \"%s\"", error.message,
                      says[i]);
        ck_assert_ptr_null(ppo);
    }
    psoup_ppo_trace trace = {0};
    ck_assert_int_eq(psoup_ppo_get_trace(NULL, 0, &trace, &error), PSOUP_ERROR_ARGUMENT);
    psoup_ppo_policy p = policy(0);
    psoup_ppo *ppo = create(model, &p, 1, &o);
    ck_assert_int_eq(psoup_ppo_get_trace(ppo, 0, &trace, &error), PSOUP_ERROR_ARGUMENT);
    trace.size = sizeof trace;
    ck_assert_int_eq(psoup_ppo_get_trace(ppo, 1, &trace, &error), PSOUP_ERROR_ARGUMENT);
    psoup_ppo_free(ppo);
    psoup_reward_free(reward);
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
    psoup_comparison pair = {words[0], 2, words[1], 3, 0, 0.0f};
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
    Suite *suite = suite_create("train_ppo_trouble");
    TCase *tests = tcase_create("ppo_trouble");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 240);
    tcase_add_test(tests, failures_leave_a_clean_run);
    tcase_add_test(tests, unsound_policies_are_refused);
    tcase_add_test(tests, allocations_may_fail);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
