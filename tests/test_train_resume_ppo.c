/* Reward models, DPO and PPO, stopped at every report and continued: the same bytes as in one go. */
#include "resume_case.h"
#include "ppo_case.h"

/* ---- reward models ------------------------------------------------------------------------------- */

enum { PAIRS = 14 };
static psoup_comparison pairs[PAIRS];

/* Two models' comparisons; the second has fewer, and is done before the first. */
static void make_pairs(void) {
    make_prompts();
    for (int i = 0; i < PAIRS; i++)
        pairs[i] = (psoup_comparison){.chosen = words[i], .n_chosen = prompts[i].n,
                                      .rejected = words[i + 2], .n_rejected = 2, .reward = i % 4 == 0};
}

static psoup_reward_options reward_options(run *r) {
    psoup_reward_options o = PSOUP_REWARD_OPTIONS_INIT;
    o.epochs = 2;
    o.batch_size = 2;
    o.learning_rate = 1e-2f;
    o.lora_dropout = 0.1f;
    o.validate_every = 2;
    o.metrics = r->metrics;
    o.on_step = watch_run;
    o.user = r;
    o.checkpoint_dir = r->checkpoints;
    o.checkpoint_every = 2;
    o.resume = 1;
    return o;
}

typedef struct rewards {
    psoup_model *model;
    psoup_reward *reward[2];
} rewards;

static rewards make_rewards(void) {
    static const char *const called[2] = {"R0", "R1"};
    rewards out = {.model = tiny_model()};
    make_pairs();
    for (int j = 0; j < 2; j++) {
        psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
        options.seed = 3 + (uint64_t)j;
        OK(psoup_reward_create(out.model, called[j], &options, &out.reward[j], &error));
    }
    return out;
}

static void free_rewards(rewards *r) {
    for (int j = 0; j < 2; j++)
        psoup_reward_free(r->reward[j]);
    psoup_model_free(r->model);
}

static psoup_status train_rewards(rewards *r, const psoup_reward_options *o) {
    return psoup_reward_train(r->reward, 2, pairs, PAIRS, pairs, 6, o, &error);
}

START_TEST(rewards_go_on_with_the_same_bytes) {
    run whole, r;
    float *expected[2];
    size_t n;
    run_begin(&whole);
    run_begin(&r);
    psoup_reward_options o = reward_options(&whole);
    o.checkpoint_dir = NULL;
    o.resume = 0;
    rewards trained = make_rewards();
    OK(train_rewards(&trained, &o));
    expected[0] = weights(trained.model, "R0", &n);
    expected[1] = weights(trained.model, "R1", &n);
    free_rewards(&trained);
    psoup_context_free(context);
    open_context(1 + _i);
    int stops = 0;
    for (psoup_status status = PSOUP_ERROR_CANCELLED; status != PSOUP_OK; stops++) {
        rewards again = make_rewards();
        o = reward_options(&r);
        r.stop_after = stops % 2 ? 1 : 2; /* the first learner's report, or the second's */
        status = train_rewards(&again, &o);
        ck_assert(status == PSOUP_OK || status == PSOUP_ERROR_CANCELLED);
        if (status == PSOUP_OK) {
            ck_assert(same_weights(again.model, "R0", expected[0], n));
            ck_assert(same_weights(again.model, "R1", expected[1], n));
        }
        free_rewards(&again);
    }
    ck_assert_int_ge(stops, 10);
    same_files(whole.metrics, r.metrics);
    free(expected[0]);
    free(expected[1]);
    run_end(&whole);
    run_end(&r);
}
END_TEST

START_TEST(other_reward_runs_are_refused) {
    run r;
    run_begin(&r);
    rewards trained = make_rewards();
    psoup_reward_options o = reward_options(&r);
    r.stop_after = 3;
    REFUSED(train_rewards(&trained, &o), PSOUP_ERROR_CANCELLED, "was stopped at step");
    free_rewards(&trained);
    trained = make_rewards();
    o.margin = 1.0f;
    REFUSED(train_rewards(&trained, &o), PSOUP_ERROR_STATE, "its margin was 0.0, is 1.0");
    o = reward_options(&r);
    REFUSED(psoup_reward_train(trained.reward + 1, 1, pairs, 1, NULL, 0, &o, &error),
            PSOUP_ERROR_ARGUMENT, "names reward");
    pairs[0].reward = 0;
    REFUSED(psoup_reward_train(trained.reward, 1, pairs, 1, NULL, 0, &o, &error), PSOUP_ERROR_STATE,
            "its rewards was \"2\", is \"1\"");
    pairs[0].reward = 1;
    pairs[3].reward = 1;
    REFUSED(train_rewards(&trained, &o), PSOUP_ERROR_STATE, "its train was \"14 rows, ");
    free_rewards(&trained);
    run_end(&r);
}
END_TEST

/* ---- DPO ----------------------------------------------------------------------------------------- */

static psoup_dpo_pair preferred[PAIRS];

static psoup_dpo_options dpo_options(run *r) {
    psoup_dpo_options o = PSOUP_DPO_OPTIONS_INIT;
    o.epochs = 2;
    o.batch_size = 2;
    o.learning_rate = 1e-2f;
    o.lora_dropout = 0.1f;
    o.validate_every = 2;
    o.metrics = r->metrics;
    o.on_step = watch_run;
    o.user = r;
    o.checkpoint_dir = r->checkpoints;
    o.checkpoint_every = 2;
    o.resume = 1;
    return o;
}

static psoup_status run_dpo(psoup_model *model, const psoup_dpo_options *o) {
    for (int i = 0; i < PAIRS; i++)
        preferred[i] = (psoup_dpo_pair){.prompt = words[i], .n_prompt = 2, .chosen = words[i + 1],
                                        .n_chosen = 2, .rejected = words[i + 2], .n_rejected = 2,
                                        .policy = i % 4 == 0};
    return psoup_dpo(model, names, 2, preferred, PAIRS, preferred, 6, o, &error);
}

START_TEST(dpo_goes_on_with_the_same_bytes) {
    run whole, r;
    float *expected[2];
    size_t n;
    run_begin(&whole);
    run_begin(&r);
    psoup_dpo_options o = dpo_options(&whole);
    o.checkpoint_dir = NULL;
    o.resume = 0;
    psoup_model *model = fresh(2);
    OK(run_dpo(model, &o));
    expected[0] = weights(model, names[0], &n);
    expected[1] = weights(model, names[1], &n);
    psoup_model_free(model);
    psoup_context_free(context);
    open_context(1 + _i);
    int stops = 0;
    for (psoup_status status = PSOUP_ERROR_CANCELLED; status != PSOUP_OK; stops++) {
        model = fresh(2);
        o = dpo_options(&r);
        r.stop_after = stops % 2 ? 1 : 2;
        status = run_dpo(model, &o);
        ck_assert(status == PSOUP_OK || status == PSOUP_ERROR_CANCELLED);
        if (status == PSOUP_OK) {
            ck_assert(same_weights(model, names[0], expected[0], n));
            ck_assert(same_weights(model, names[1], expected[1], n));
        }
        psoup_model_free(model);
    }
    ck_assert_int_ge(stops, 10);
    same_files(whole.metrics, r.metrics);
    model = fresh(2);
    o.beta = 0.5f;
    REFUSED(run_dpo(model, &o), PSOUP_ERROR_STATE, "its beta was 0.1, is 0.5");
    o = dpo_options(&r);
    words[2][1]++;
    REFUSED(run_dpo(model, &o), PSOUP_ERROR_STATE, "its train was \"14 rows, ");
    psoup_model_free(model);
    free(expected[0]);
    free(expected[1]);
    run_end(&whole);
    run_end(&r);
}
END_TEST

/* ---- PPO ------------------------------------------------------------------------------------------ */

static psoup_ppo_options ppo_options(run *r) {
    psoup_ppo_options o = plain();
    o.steps = 5;
    o.mini_batch_size = 4;
    o.ppo_epochs = 2;
    o.lora_dropout = o.head_dropout = 0.1f;
    o.draw_new_tokens_from = 3;
    o.warn_window = 4;
    o.normalize_apart = 1;
    o.length_penalty = 0.1f;
    o.validate_every = 2;
    o.metrics = r->metrics;
    o.on_step = watch_run;
    o.user = r;
    o.checkpoint_dir = r->checkpoints;
    o.checkpoint_every = 2;
    o.resume = 1;
    return o;
}

static psoup_status run_ppo(psoup_model *model, const psoup_ppo_policy *policies, size_t n,
                            const psoup_ppo_options *o) {
    psoup_ppo *ppo;
    psoup_status status = psoup_ppo_create(model, policies, n, o, &ppo, &error);
    if (status == PSOUP_OK)
        status = psoup_ppo_run(ppo, &error);
    psoup_ppo_free(ppo);
    return status;
}

START_TEST(policies_go_on_with_the_same_bytes) {
    /* Two policies; or one, and the others' adapters as a soup, with one reward each or several. */
    psoup_ppo_soup soup = PSOUP_PPO_SOUP_INIT;
    psoup_ppo_policy policies[2] = {policy(0), policy(1)};
    const psoup_reward_source sources[2] = {
        {.name = "a", .function = pay, .user = &wanted[0], .weight = 1.0f},
        {.name = "b", .function = pay, .user = &wanted[3], .weight = -0.5f}};
    const psoup_reward_source apart[3] = {
        {.name = "a", .function = pay, .user = &wanted[0], .weight = 1.0f},
        {.name = "b", .function = pay, .user = &wanted[3], .weight = 0.5f, .adapter = 1},
        {.name = "c", .function = pay, .user = &wanted[2], .weight = -0.25f, .adapter = 1}};
    policies[0].reward_fn = NULL;
    policies[0].sources = sources;
    policies[0].n_sources = 2;
    soup.adapters = names + 1;
    soup.n = 2;
    if (_i / 2)
        policies[1].soup = &soup;
    if (_i / 2 == 2) {
        policies[1].reward_fn = NULL;
        policies[1].sources = apart;
        policies[1].n_sources = 3;
    }
    run whole, r;
    float *expected[3], correction = _i % 2 ? 0.0f : 0.5f;
    size_t n, count;
    run_begin(&whole);
    run_begin(&r);
    psoup_ppo_options o = ppo_options(&whole);
    o.checkpoint_dir = NULL;
    o.resume = 0;
    o.length_correction = correction;
    psoup_model *model = fresh(3);
    OK(run_ppo(model, policies, 2, &o));
    expected[0] = weights(model, names[0], &n);
    expected[1] = weights(model, names[1], &n);
    expected[2] = weights(model, names[2], &count);
    psoup_model_free(model);
    psoup_context_free(context);
    open_context(1 + _i % 2);
    int stops = 0;
    for (psoup_status status = PSOUP_ERROR_CANCELLED; status != PSOUP_OK; stops++) {
        model = fresh(3);
        o = ppo_options(&r);
        o.length_correction = correction;
        r.stop_after = stops % 2 ? 1 : 2;
        status = run_ppo(model, policies, 2, &o);
        ck_assert(status == PSOUP_OK || status == PSOUP_ERROR_CANCELLED);
        if (status == PSOUP_OK) {
            ck_assert(same_weights(model, names[0], expected[0], n));
            ck_assert(same_weights(model, names[1], expected[1], n));
            ck_assert(same_weights(model, names[2], expected[2], count));
        }
        psoup_model_free(model);
    }
    ck_assert_int_ge(stops, 8);
    same_files(whole.metrics, r.metrics);
    free(expected[0]);
    free(expected[1]);
    free(expected[2]);
    run_end(&whole);
    run_end(&r);
}
END_TEST

/* Who takes the steps one by one has checkpoints too; the step that was begun is taken again. */
START_TEST(single_steps_go_on) {
    const psoup_ppo_policy one = policy(0);
    run whole, r;
    float *expected = NULL;
    size_t n = 0;
    for (int stop = 0; stop < 2; stop++) {
        run *at = stop ? &r : &whole;
        run_begin(at);
        psoup_ppo_options o = ppo_options(at);
        int64_t left = 5;
        psoup_model *model = fresh(1);
        psoup_ppo *ppo = create(model, &one, 1, &o);
        for (int i = 0; left; i++) {
            OK(psoup_ppo_step(ppo, &left, &error));
            if (stop && i == 2) { /* its last checkpoint is of step 2 */
                psoup_ppo_free(ppo);
                psoup_model_free(model);
                model = fresh(1);
                ppo = create(model, &one, 1, &o);
            }
        }
        if (stop)
            ck_assert(same_weights(model, names[0], expected, n));
        else
            expected = weights(model, names[0], &n);
        psoup_ppo_free(ppo);
        psoup_model_free(model);
    }
    same_files(whole.metrics, r.metrics);
    free(expected);
    run_end(&whole);
    run_end(&r);
}
END_TEST

/* Makes a policy's state such as no short run has: what warnings go by, and that it has left the run. */
static int spoil(void *user, const psoup_step *step) {
    psoup__ppo_state *s = &(*(psoup_ppo **)user)->policies[1].state;
    if (step->step < 2 || strcmp(step->subject, names[1]) != 0)
        return 0;
    for (int i = 0; i < PSOUP__MAX_WINDOW; i++) {
        s->watch.reward[i] = 0.5 + i;
        s->watch.deviation[i] = 1.5 + i;
        s->watch.kl[i] = 2.5 + i;
    }
    s->watch.warned = 5;
    s->failed = 1;
    return 0;
}

/* To the last byte, what steps of so small a run show in no weight too. */
START_TEST(the_state_is_kept_whole) {
    const psoup_ppo_policy policies[2] = {policy(0), policy(1)};
    psoup__ppo_state kept[2];
    psoup_ppo *ppo;
    run r;
    run_begin(&r);
    psoup_ppo_options o = ppo_options(&r);
    o.checkpoint_every = 1;
    o.length_correction = 1.0f;
    o.on_step = spoil;
    o.user = &ppo;
    for (int again = 0; again < 2; again++) {
        psoup_model *model = fresh(2);
        ppo = create(model, policies, 2, &o);
        for (int i = 0; i < 2 && !again; i++)
            OK(psoup_ppo_step(ppo, NULL, &error));
        for (int k = 0; k < 2; k++)
            if (again)
                ck_assert(memcmp(&ppo->policies[k].state, &kept[k], sizeof(kept[k])) == 0);
            else
                kept[k] = ppo->policies[k].state;
        psoup_ppo_free(ppo);
        psoup_model_free(model);
    }
    ck_assert(kept[0].step == 2 && kept[1].failed == 1 && kept[1].watch.warned == 5);
    run_end(&r);
}
END_TEST

START_TEST(other_ppo_runs_are_refused) {
    psoup_ppo_policy policies[2] = {policy(0), policy(1)};
    psoup_reward_source source = {.name = "a", .function = pay, .user = &wanted[0], .weight = 1.0f};
    policies[0].reward_fn = NULL;
    policies[0].sources = &source;
    policies[0].n_sources = 1;
    psoup_reward *reward;
    run r;
    run_begin(&r);
    psoup_model *model = fresh(2);
    OK(psoup_reward_create(model, "R", NULL, &reward, &error));
    policies[1].reward_fn = NULL;
    policies[1].rewards = &reward;
    policies[1].n_rewards = 1;
    psoup_ppo_options o = ppo_options(&r);
    r.stop_after = 1;
    REFUSED(run_ppo(model, policies, 2, &o), PSOUP_ERROR_CANCELLED, "was stopped at step 1 of 5");
    r.stop_after = 0;
    psoup_reward_free(reward);
    psoup_model_free(model);

    model = fresh(2);
    OK(psoup_reward_create(model, "R", NULL, &reward, &error));
    o.gamma = 0.5f;
    REFUSED(run_ppo(model, policies, 2, &o), PSOUP_ERROR_STATE, "its gamma was 1.0, is 0.5");
    o = ppo_options(&r);
    REFUSED(run_ppo(model, policies, 1, &o), PSOUP_ERROR_STATE, "its policies was \"2\", is \"1\"");
    policies[0].seed++;
    REFUSED(run_ppo(model, policies, 2, &o), PSOUP_ERROR_STATE,
            "its seed of policy 0 was \"100\", is \"101\"");
    policies[0].seed--;
    policies[0].n_prompts--;
    REFUSED(run_ppo(model, policies, 2, &o), PSOUP_ERROR_STATE, "its prompts of policy 0 was \"16 rows, ");
    policies[0].n_prompts++;
    policies[1].n_validation--;
    REFUSED(run_ppo(model, policies, 2, &o), PSOUP_ERROR_STATE, "its validation of policy 1 was \"8 rows, ");
    policies[1].n_validation++;
    prompts[3].id++; /* as samples and callbacks are told */
    REFUSED(run_ppo(model, policies, 2, &o), PSOUP_ERROR_STATE, "its prompts' ids of policy 0 was \"16 rows, ");
    prompts[3].id--;
    validation[5].id--;
    REFUSED(run_ppo(model, policies, 2, &o), PSOUP_ERROR_STATE, "its validation's ids of policy 0 was \"8 rows, ");
    validation[5].id++;
    source.weight = 0.5f;
    REFUSED(run_ppo(model, policies, 2, &o), PSOUP_ERROR_STATE,
            "its source 0 of policy 0 was \"reward/a of weight 1, ");
    source.weight = 1.0f;
    *psoup__model_adapter(model, "R")->data += 1.0f;
    REFUSED(run_ppo(model, policies, 2, &o), PSOUP_ERROR_STATE, "its reward 0 of policy 1 was \"R of rank ");
    *psoup__model_adapter(model, "R")->data -= 1.0f;
    OK(run_ppo(model, policies, 2, &o));
    psoup_reward_free(reward);
    psoup_model_free(model);
    run_end(&r);
}
END_TEST

/* A source of a soup that changes its owner is another. */
START_TEST(other_sources_of_soups_are_refused) {
    psoup_ppo_soup soup = PSOUP_PPO_SOUP_INIT;
    psoup_ppo_policy p = policy(0);
    psoup_reward_source sources[3] = {
        {.name = "a", .function = pay, .user = &wanted[0], .weight = 1.0f},
        {.name = "b", .function = pay, .user = &wanted[3], .weight = 0.5f, .adapter = 1},
        {.name = "c", .function = pay, .user = &wanted[2], .weight = -0.25f, .adapter = 1}};
    run r;
    run_begin(&r);
    soup.adapters = names;
    soup.n = 2;
    p.soup = &soup;
    p.reward_fn = NULL;
    p.sources = sources;
    p.n_sources = 3;
    psoup_model *model = fresh(2);
    psoup_ppo_options o = ppo_options(&r);
    r.stop_after = 1;
    REFUSED(run_ppo(model, &p, 1, &o), PSOUP_ERROR_CANCELLED, "was stopped at step 1 of 5");
    r.stop_after = 0;
    sources[2].adapter = 0;
    REFUSED(run_ppo(model, &p, 1, &o), PSOUP_ERROR_STATE,
            "its source 2 of policy 0 was \"reward/c of weight -0.25, a callback of P1\", is \"");
    sources[2].adapter = 1;
    OK(run_ppo(model, &p, 1, &o));
    psoup_model_free(model);
    run_end(&r);
}
END_TEST

START_TEST(other_soups_are_refused) {
    psoup_ppo_soup soup = PSOUP_PPO_SOUP_INIT;
    psoup_ppo_policy p = policy(0);
    run r;
    run_begin(&r);
    soup.adapters = names;
    soup.n = 2;
    p.soup = &soup;
    psoup_model *model = fresh(3);
    psoup_ppo_options o = ppo_options(&r);
    r.stop_after = 1;
    REFUSED(run_ppo(model, &p, 1, &o), PSOUP_ERROR_CANCELLED, "was stopped at step 1 of 5");
    r.stop_after = 0;
    soup.concentration = 2.0f;
    REFUSED(run_ppo(model, &p, 1, &o), PSOUP_ERROR_STATE, "its concentration of policy 0 was \"1\", is \"2\"");
    soup.concentration = 1.0f;
    soup.n = 1;
    REFUSED(run_ppo(model, &p, 1, &o), PSOUP_ERROR_STATE,
            "its policy 0 was \"a soup of 2 adapters\", is \"a soup of 1 adapters\"");
    soup.n = 2;
    soup.adapters = names + 1;
    REFUSED(run_ppo(model, &p, 1, &o), PSOUP_ERROR_STATE, "its adapter 0 of policy 0 was \"P0 of rank 4");
    soup.adapters = names;
    p.soup = NULL;
    REFUSED(run_ppo(model, &p, 1, &o), PSOUP_ERROR_STATE, "its policy 0 was \"a soup of 2 adapters\", is \"P0");
    p.soup = &soup;
    OK(run_ppo(model, &p, 1, &o));
    psoup_model_free(model);
    run_end(&r);
}
END_TEST

/* ---- joining ------------------------------------------------------------------------------------- */

/* The lines of the file that are of one policy, one after another; freed by the caller. */
static char *lines_of(const char *path, const char *subject) {
    size_t n;
    char *text, *out, quoted[32];
    OK(psoup__file_read(context, path, 1 << 30, &text, &n, &error));
    out = calloc(n + 1, 1);
    snprintf(quoted, sizeof(quoted), "\"subject\": \"%s\"", subject);
    for (char *line = text, *end; line < text + n; line = end + 1) {
        end = memchr(line, '\n', (size_t)(text + n - line));
        *end = '\0';
        if (strstr(line, quoted))
            strcat(strcat(out, line), "\n");
    }
    psoup__free(context, text);
    return out;
}

/* A run of two, done or stopped half-way, takes in a third, a policy or a soup: all end with the bytes of a
 * run of all three from the start, also when it is stopped at every report; who was done has no report. */
START_TEST(a_policy_joins) {
    psoup_ppo_soup soup = PSOUP_PPO_SOUP_INIT;
    psoup_ppo_policy policies[3] = {policy(0), policy(1), policy(2)};
    run whole, r;
    float *expected[4];
    size_t n[4];
    bool half = _i % 2;
    soup.adapters = names + 2;
    soup.n = 2;
    if (_i / 2)
        policies[2].soup = &soup;
    run_begin(&whole);
    run_begin(&r);
    psoup_ppo_options o = ppo_options(&whole);
    o.checkpoint_dir = NULL;
    o.resume = 0;
    psoup_model *model = fresh(4);
    OK(run_ppo(model, policies, 3, &o));
    for (int k = 0; k < 4; k++)
        expected[k] = weights(model, names[k], &n[k]);
    psoup_model_free(model);

    model = fresh(2);
    o = ppo_options(&r);
    r.stop_after = half ? 5 : 0;
    ck_assert_int_eq(run_ppo(model, policies, 2, &o), half ? PSOUP_ERROR_CANCELLED : PSOUP_OK);
    psoup_model_free(model);
    char *before = lines_of(r.metrics, "P0");
    int stops = 0;
    for (psoup_status status = PSOUP_ERROR_CANCELLED; status != PSOUP_OK; stops++) {
        model = fresh(4);
        r.stop_after = 1;
        o.join = 1;
        o.resume = 0;
        status = run_ppo(model, policies, 3, &o);
        ck_assert_msg(status == PSOUP_OK || status == PSOUP_ERROR_CANCELLED, "%s", error.message);
        for (int k = 0; status == PSOUP_OK && k < 4; k++)
            ck_assert(same_weights(model, names[k], expected[k], n[k]));
        psoup_model_free(model);
    }
    ck_assert_int_ge(stops, 8);
    ck_assert_int_le(count_checkpoints(&r, NULL), o.checkpoint_keep);
    for (int k = 0; k < 3; k++) { /* each one's lines are as in the whole run, and come to nothing more */
        const char *subject = k == 2 && policies[2].soup ? "P2" : names[k];
        char *all = lines_of(whole.metrics, subject), *joined = lines_of(r.metrics, subject);
        ck_assert(*all);
        ck_assert_str_eq(joined, all);
        if (k == 0 && !half)
            ck_assert_str_eq(before, all);
        free(all);
        free(joined);
    }
    for (int k = 0; k < 4; k++)
        free(expected[k]);
    free(before);
    run_end(&whole);
    run_end(&r);
}
END_TEST

START_TEST(joining_is_refused_where_more_differs) {
    psoup_ppo_policy policies[3] = {policy(0), policy(1), policy(2)}, turned[2] = {policy(1), policy(0)};
    run r;
    run_begin(&r);
    psoup_model *model = fresh(3);
    psoup_ppo_options o = ppo_options(&r);
    OK(run_ppo(model, policies, 2, &o));
    psoup_model_free(model);
    model = fresh(3);
    REFUSED(run_ppo(model, policies, 3, &o), PSOUP_ERROR_STATE, "its policies was \"2\", is \"3\"");
    o.join = 1;
    o.resume = 0;
    REFUSED(run_ppo(model, policies, 1, &o), PSOUP_ERROR_STATE, "its policies was \"2\", is \"1\"");
    REFUSED(run_ppo(model, policies + 1, 2, &o), PSOUP_ERROR_STATE, "its policy 0 was \"P0 of rank 4");
    REFUSED(run_ppo(model, turned, 2, &o), PSOUP_ERROR_STATE, "its policy 0 was \"P0 of rank 4");
    policies[1].seed++;
    REFUSED(run_ppo(model, policies, 3, &o), PSOUP_ERROR_STATE,
            "its seed of policy 1 was \"101\", is \"102\"");
    policies[1].seed--;
    o.steps = 6;
    REFUSED(run_ppo(model, policies, 3, &o), PSOUP_ERROR_STATE, "its steps was 5, is 6");
    o.steps = 5;
    o.checkpoint_dir = NULL;
    REFUSED(run_ppo(model, policies, 3, &o), PSOUP_ERROR_ARGUMENT, "checkpoint_dir is NULL");
    o.checkpoint_dir = r.checkpoints;
    o.join = 2;
    REFUSED(run_ppo(model, policies, 3, &o), PSOUP_ERROR_ARGUMENT, "join is 2: expected 0 to 1");
    o.join = 1;
    OK(run_ppo(model, policies, 3, &o));
    o.join = 0;
    o.resume = 1;
    psoup_model_free(model);
    model = fresh(3);
    OK(run_ppo(model, policies, 3, &o)); /* the run has three now */
    REFUSED(run_ppo(model, policies, 2, &o), PSOUP_ERROR_STATE, "its policies was \"3\", is \"2\"");
    psoup_model_free(model);
    run_end(&r);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("resuming rewards and policies");
    TCase *tcase = tcase_create("all");
    tcase_set_timeout(tcase, 120);
    tcase_add_checked_fixture(tcase, set_up, tear_down);
    tcase_add_loop_test(tcase, rewards_go_on_with_the_same_bytes, 0, 2);
    tcase_add_test(tcase, other_reward_runs_are_refused);
    tcase_add_loop_test(tcase, dpo_goes_on_with_the_same_bytes, 0, 2);
    tcase_add_loop_test(tcase, policies_go_on_with_the_same_bytes, 0, 6);
    tcase_add_test(tcase, single_steps_go_on);
    tcase_add_test(tcase, the_state_is_kept_whole);
    tcase_add_test(tcase, other_ppo_runs_are_refused);
    tcase_add_test(tcase, other_soups_are_refused);
    tcase_add_test(tcase, other_sources_of_soups_are_refused);
    tcase_add_loop_test(tcase, a_policy_joins, 0, 4);
    tcase_add_test(tcase, joining_is_refused_where_more_differs);
    suite_add_tcase(suite, tcase);
    return run_suite(suite);
}
