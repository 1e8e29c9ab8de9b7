/* PPO, stopped or killed while it samples: it goes on behind the tokens that it had drawn, to the bytes of the run that
 * nobody disturbed. */
#include "ppo_case.h"
#include "ranks_kept_case.h"

/* Who is asked between tokens and phases. */
typedef struct pauses {
    psoup_ppo *ppo;
    int stop_at; /* so many pauses from now; 0: never */
    bool any;    /* also of validations and samples, which are drawn again; else of steps */
    bool dies;   /* by SIGKILL, instead */
    int seen;
    char samples[300];
} pauses;

static int on_step(void *user, const psoup_step *step) {
    pauses *p = user;
    if (strcmp(step->phase, "pause") != 0)
        return 0;
    ck_assert(step->n == 0 && step->step >= 0 && step->step <= step->total);
    p->seen += p->ppo->pauses.n > 0;
    p->ppo->pauses.cost = 0.0; /* keeps whenever it may */
    if (!p->stop_at || (!p->any && !p->ppo->pauses.n) || --p->stop_at > 0)
        return 0;
    if (p->dies)
        kill(getpid(), SIGKILL);
    return 1;
}

/* One kind of run. */
typedef struct kind {
    int32_t batch, objective, ignore_stop, max_sequences;
    bool soup, models;
} kind;
static const kind kinds[] = {
    {.batch = 8},
    {.batch = 8, .soup = true, .max_sequences = 3},
    {.batch = 8, .ignore_stop = 1},
    {.batch = 8, .objective = PSOUP_OBJECTIVE_GRPO, .models = true},
    {.batch = 128}, /* a session for each thread */
};
enum { KINDS = sizeof(kinds) / sizeof(kinds[0]) };

static psoup_ppo_options options_of(const kind *k, const run *r, pauses *p) {
    psoup_ppo_options o = plain();
    o.steps = 2;
    o.batch_size = k->batch;
    o.objective = k->objective;
    o.ignore_stop = k->ignore_stop;
    o.max_sequences = k->max_sequences;
    o.min_new_tokens = 2;
    o.draw_new_tokens_from = 5;
    o.mini_batch_size = 4;
    o.lora_dropout = 0.1f;
    o.ppo_epochs = 2;
    o.validate_every = 1;
    o.samples_every = 1;
    o.samples = p->samples;
    snprintf(p->samples, sizeof(p->samples), "%s/samples.jsonl", r->directory);
    o.metrics = r->metrics;
    o.checkpoint_dir = r->checkpoints;
    o.checkpoint_every = 0;
    o.resume = 1;
    o.on_step = on_step;
    o.user = p;
    return o;
}

/* Runs or goes on; in `left`, what became of it, and its weights. */
static void go(const kind *k, const run *r, pauses *p, const psoup_comm *comm, bool keeps, left *to) {
    psoup_ppo_soup soup = PSOUP_PPO_SOUP_INIT;
    psoup_ppo_policy policies[2] = {policy(0), policy(1)};
    psoup_model *model = fresh(3);
    psoup_reward *reward = NULL;
    psoup_ppo_options o = options_of(k, r, p);
    soup.adapters = names + 1;
    soup.n = 2;
    if (k->soup)
        policies[1].soup = &soup;
    if (k->models) {
        OK(psoup_reward_create(model, "R", NULL, &reward, &error));
        policies[1].reward_fn = NULL;
        policies[1].rewards = &reward;
        policies[1].n_rewards = 1;
    }
    o.comm = comm;
    p->ppo = create(model, policies, 2, &o);
    p->ppo->pauses.ask_every = 0.0;
    p->ppo->pauses.keep_every = keeps ? 0.0 : 1e9;
    to->status = psoup_ppo_run(p->ppo, &error);
    snprintf(to->message, sizeof(to->message), "%s", error.message);
    psoup_ppo_free(p->ppo);
    to->n = 0;
    for (int i = 0; i < 3; i++) {
        size_t n;
        float *w = weights(model, names[i], &n);
        ck_assert_uint_le(to->n + n, MOST_WEIGHTS);
        memcpy(to->weights + to->n, w, n * sizeof(*w));
        to->n += n;
        free(w);
    }
    psoup_reward_free(reward);
    psoup_model_free(model);
}

static void same_end(const left *a, const left *b) {
    ck_assert_msg(b->status == PSOUP_OK, "%s", b->message);
    ck_assert(a->n == b->n && memcmp(a->weights, b->weights, a->n * sizeof(float)) == 0);
}

static void undisturbed(const kind *k, run *r, left *whole) {
    pauses none = {.seen = 0};
    run_begin(r);
    go(k, r, &none, NULL, false, whole);
    ck_assert_msg(whole->status == PSOUP_OK, "%s", whole->message);
    ck_assert_int_gt(none.seen, 20);
}

START_TEST(stopped_between_tokens) {
    static left whole, got;
    const kind *k = &kinds[_i / 2];
    run one, r;
    int stops = 0;
    undisturbed(k, &one, &whole);
    psoup_context_free(context);
    open_context(1 + _i % 2);
    run_begin(&r);
    do {
        pauses p = {.stop_at = 1 + stops * 3 % 5, .any = stops % 4 == 3};
        go(k, &r, &p, NULL, false, &got);
        ck_assert_int_eq(got.status == PSOUP_OK, p.stop_at > 0);
        if (got.status != PSOUP_OK) {
            ck_assert_msg(got.status == PSOUP_ERROR_CANCELLED && strstr(got.message, " was stopped "), "%s", got.message);
            ck_assert_int_le(count_checkpoints(&r, NULL), 3);
            stops++;
        }
    } while (got.status != PSOUP_OK);
    ck_assert_int_ge(stops, 6);
    same_end(&whole, &got);
    same_files(one.metrics, r.metrics);
    run_end(&one);
    run_end(&r);
}
END_TEST

/* Kept on the way: from what a killed run had drawn. */
START_TEST(killed_between_tokens) {
    const kind *k = &kinds[_i];
    static left whole;
    run one, r;
    int deaths = 0, status;
    share_results();
    undisturbed(k, &one, &whole);
    run_begin(&r);
    do {
        pid_t child = fork();
        ck_assert_int_ge(child, 0);
        if (child == 0) {
            pauses p = {.stop_at = 2 + deaths * 5 % 9, .dies = true};
            open_context(2);
            go(k, &r, &p, NULL, true, &results[0]);
            _exit(0);
        }
        ck_assert_int_eq(waitpid(child, &status, 0), child);
        ck_assert(status == 0 || (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL));
        deaths += status != 0;
        ck_assert_int_le(deaths, 200); /* every life draws some */
    } while (status != 0);
    ck_assert_int_ge(deaths, 5);
    same_end(&whole, &results[0]);
    same_files(one.metrics, r.metrics);
    run_end(&one);
    run_end(&r);
}
END_TEST

/* ---- what is not done again ------------------------------------------------------------------------- */

/* A run of one policy, stopped at a pause of its first step. */
static psoup_ppo *stopped(psoup_model **model, const run *r, pauses *p, int at) {
    static psoup_ppo_policy one;
    psoup_ppo_options o = options_of(&kinds[0], r, p);
    o.samples = NULL;
    o.samples_every = 0;
    one = policy(0);
    *model = fresh(1);
    *p = (pauses){.stop_at = at};
    psoup_ppo *ppo = p->ppo = create(*model, &one, 1, &o);
    ppo->pauses.ask_every = 0.0;
    if (at) {
        REFUSED(psoup_ppo_step(ppo, NULL, &error), PSOUP_ERROR_CANCELLED, "was stopped in step 1 of 2");
    }
    return ppo;
}

static void discard(psoup_ppo *ppo, psoup_model *model) {
    psoup_ppo_free(ppo);
    psoup_model_free(model);
}

static void stop_at(const run *r, int at) {
    psoup_model *model = NULL;
    pauses p;
    psoup_ppo *ppo = stopped(&model, r, &p, at);
    discard(ppo, model);
}

/* Of a step that is stopped, who goes on has every token; what is whole is not decoded again. */
START_TEST(what_was_drawn_stays) {
    int32_t kept[8 * 16];
    size_t n;
    psoup_model *model;
    pauses p;
    run r;
    run_begin(&r);
    stop_at(&r, 4);
    psoup_ppo *ppo = stopped(&model, &r, &p, 0);
    const psoup__begun *begun = &ppo->policies[0].begun;
    int part = 0;
    n = begun->n;
    ck_assert(n > 16 && n <= sizeof(kept) / sizeof(*kept));
    memcpy(kept, begun->data, n * sizeof(*kept));
    for (int i = 0; i < 8; i++)
        part += kept[2 * i] == 4 && kept[2 * i + 1] == PSOUP_FINISH_NONE;
    ck_assert_int_gt(part, 0);
    OK(psoup_ppo_step(ppo, NULL, &error));
    ck_assert_uint_eq(begun->n, 0);
    const psoup__rollouts *out = &ppo->policies[0].experience.rollouts;
    size_t at = 16;
    for (size_t i = 0; i < out->n; i++) {
        ck_assert_int_ge(out->start[i + 1] - out->start[i], kept[2 * i]);
        ck_assert(memcmp(out->response + out->start[i], kept + at, (size_t)kept[2 * i] * sizeof(*kept)) == 0);
        at += (size_t)kept[2 * i];
    }
    discard(ppo, model);
    run_end(&r);

    run_begin(&r); /* the last pauses of a step are those after sampling, scoring and evaluating */
    ppo = stopped(&model, &r, &p, 0);
    OK(psoup_ppo_step(ppo, NULL, &error));
    int all = p.seen;
    discard(ppo, model);
    run_end(&r);
    run_begin(&r);
    stop_at(&r, all - 1);
    ppo = stopped(&model, &r, &p, 0); /* nothing is drawn any more */
    for (int i = 0; i < 8; i++)
        ck_assert_int_ne(ppo->policies[0].begun.data[2 * i + 1], PSOUP_FINISH_NONE);
    OK(psoup_ppo_step(ppo, NULL, &error));
    ck_assert_int_eq(p.seen, 3);
    discard(ppo, model);
    run_end(&r);
}
END_TEST

/* Responses that are begun are something to lose; a policy that joins has none yet. */
START_TEST(others_may_join) {
    const psoup_ppo_policy both[2] = {policy(0), policy(1)};
    float *expected[2];
    size_t n;
    pauses p = {.seen = 0};
    run one, r;
    run_begin(&one);
    run_begin(&r);
    for (int joins = 0; joins < 2; joins++) {
        psoup_ppo_options o = options_of(&kinds[0], joins ? &r : &one, &p);
        o.samples = NULL;
        o.samples_every = 0;
        psoup_model *model = fresh(2);
        if (joins) {
            psoup_ppo *none = NULL;
            stop_at(&r, 5);
            o.resume = 0;
            REFUSED(psoup_ppo_create(model, both, 2, &o, &none, &error), PSOUP_ERROR_STATE,
                    "has checkpoints of an earlier run, up to step 0");
        }
        o.join = joins;
        p.ppo = create(model, both, 2, &o);
        ck_assert(joins == (p.ppo->policies[0].begun.n > 16) && p.ppo->policies[1].begun.n == 0);
        OK(psoup_ppo_run(p.ppo, &error));
        psoup_ppo_free(p.ppo);
        for (int i = 0; i < 2; i++)
            if (joins) {
                ck_assert(same_weights(model, names[i], expected[i], n));
                free(expected[i]);
            } else {
                expected[i] = weights(model, names[i], &n);
            }
        psoup_model_free(model);
    }
    same_files(one.metrics, r.metrics);
    run_end(&one);
    run_end(&r);
}
END_TEST

/* A handle that was stopped may step again. */
START_TEST(the_same_handle_goes_on) {
    psoup_model *model;
    pauses p;
    run one, r;
    size_t n;
    run_begin(&one);
    psoup_ppo *ppo = stopped(&model, &one, &p, 0);
    OK(psoup_ppo_run(ppo, &error));
    psoup_ppo_free(ppo);
    float *expected = weights(model, names[0], &n);
    psoup_model_free(model);
    run_begin(&r);
    ppo = stopped(&model, &r, &p, 3);
    for (p.stop_at = 5; psoup_ppo_run(ppo, &error) != PSOUP_OK; p.stop_at = 5)
        ck_assert_int_eq(error.status, PSOUP_ERROR_CANCELLED);
    ck_assert(same_weights(model, names[0], expected, n));
    same_files(one.metrics, r.metrics);
    discard(ppo, model);
    free(expected);
    run_end(&one);
    run_end(&r);
}
END_TEST

/* ---- what is refused --------------------------------------------------------------------------------- */

START_TEST(what_cannot_have_been_begun_is_refused) {
    static const struct {
        size_t at;
        int32_t value;
        int more; /* elements */
    } wrong[] = {{0, -1, 0}, {0, 13, 0}, {1, 7, 0}, {1, -1, 0}, {16, -1, 0}, {16, 1 << 20, 0}, {16, 1, -1},
                 {16, 1, 1}};
    const psoup_ppo_policy one = policy(0);
    psoup_model *model;
    pauses p;
    run r;
    run_begin(&r);
    stop_at(&r, 4);
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        psoup_ppo *ppo = stopped(&model, &r, &p, 0), *none = NULL;
        psoup__begun *begun = &ppo->policies[0].begun;
        psoup_ppo_options o = options_of(&kinds[0], &r, &p);
        o.samples = NULL;
        o.samples_every = 0;
        OK(psoup__reserve(context, &begun->data, &begun->capacity, begun->n + 1, sizeof(*begun->data), &error));
        begun->data[begun->n] = 0;
        begun->data[wrong[i].at] = wrong[i].value;
        begun->n += (size_t)wrong[i].more;
        OK(psoup__checkpoint_now(&ppo->checkpoint, 0, &error));
        psoup_ppo_free(ppo);
        psoup_model_free(model);
        model = fresh(1);
        REFUSED(psoup_ppo_create(model, &one, 1, &o, &none, &error), PSOUP_ERROR_FORMAT,
                "newest checkpoint's begun is none that the run can have");
        psoup_model_free(model);
        remove_in(r.checkpoints);
        stop_at(&r, 4);
    }
    /* Of a response that is not finished, more than it may have. */
    psoup_ppo *ppo = stopped(&model, &r, &p, 0);
    psoup__begun *begun = &ppo->policies[0].begun;
    int32_t tokens[8 * 14] = {0};
    for (int i = 0; i < 8; i++)
        tokens[2 * i] = 12;
    OK(psoup__reserve(context, &begun->data, &begun->capacity, 8 * 14, sizeof(*tokens), &error));
    memcpy(begun->data, tokens, sizeof(tokens));
    begun->n = 8 * 14;
    OK(psoup__checkpoint_now(&ppo->checkpoint, 0, &error));
    discard(ppo, model);
    ppo = stopped(&model, &r, &p, 0);
    REFUSED(psoup_ppo_step(ppo, NULL, &error), PSOUP_ERROR_ARGUMENT, "12 tokens were drawn before; it has room for");
    discard(ppo, model);
    run_end(&r);
}
END_TEST

/* ---- full disks ----------------------------------------------------------------------------------------- */

START_TEST(a_full_disk_keeps_what_was_begun_before) {
    static left whole, got;
    run one, r;
    char path[600];
    pauses p = {.stop_at = 5};
    undisturbed(&kinds[0], &one, &whole);
    run_begin(&r);
    go(&kinds[0], &r, &p, NULL, false, &got);
    ck_assert_int_eq(got.status, PSOUP_ERROR_CANCELLED);
    count_checkpoints(&r, path);
    struct rlimit full, small;
    ck_assert_int_eq(getrlimit(RLIMIT_FSIZE, &full), 0);
    small = full;
    small.rlim_cur = 1000;
    signal(SIGXFSZ, SIG_IGN);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &small), 0);
    p = (pauses){.stop_at = 0};
    go(&kinds[0], &r, &p, NULL, true, &got);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &full), 0);
    ck_assert_int_eq(got.status, PSOUP_ERROR_IO);
    ck_assert_ptr_nonnull(strstr(got.message, "checkpoint-000000000.safetensors.zst: cannot write"));
    ck_assert_int_eq(count_checkpoints(&r, path), 1);
    p = (pauses){.stop_at = 0};
    go(&kinds[0], &r, &p, NULL, false, &got);
    same_end(&whole, &got);
    same_files(one.metrics, r.metrics);
    run_end(&one);
    run_end(&r);
}
END_TEST

/* ---- several ranks -------------------------------------------------------------------------------------- */

typedef struct world {
    const run *r;
    int stop_at; /* of rank 1 */
} world;

static void be_one(const psoup_comm *comm, void *arg) {
    const world *w = arg;
    pauses p = {.stop_at = comm->rank == 1 ? w->stop_at : 0};
    go(&kinds[1], w->r, &p, comm, false, &results[comm->rank]);
}

START_TEST(ranks_stop_together) {
    static left whole;
    run one, r;
    int stops = 0;
    share_results();
    run_begin(&one);
    run_begin(&r);
    in_ranks(2, be_one, &(world){.r = &one}, NULL);
    whole = results[0];
    ck_assert_msg(whole.status == PSOUP_OK, "%s", whole.message);
    do {
        in_ranks(2, be_one, &(world){.r = &r, .stop_at = 1 + stops * 3 % 5}, NULL);
        ck_assert_int_eq(results[0].status, results[1].status);
        stops += results[0].status == PSOUP_ERROR_CANCELLED;
    } while (results[0].status == PSOUP_ERROR_CANCELLED);
    ck_assert_int_ge(stops, 6);
    same_end(&whole, &results[0]);
    same_end(&whole, &results[1]);
    same_files(one.metrics, r.metrics);
    run_end(&one);
    run_end(&r);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("steps that were begun");
    TCase *tcase = tcase_create("all");
    tcase_set_timeout(tcase, 120);
    tcase_add_checked_fixture(tcase, set_up, tear_down);
    tcase_add_loop_test(tcase, stopped_between_tokens, 0, 2 * KINDS);
    tcase_add_loop_test(tcase, killed_between_tokens, 0, KINDS);
    tcase_add_test(tcase, what_was_drawn_stays);
    tcase_add_test(tcase, others_may_join);
    tcase_add_test(tcase, the_same_handle_goes_on);
    tcase_add_test(tcase, what_cannot_have_been_begun_is_refused);
    tcase_add_test(tcase, a_full_disk_keeps_what_was_begun_before);
    tcase_add_test(tcase, ranks_stop_together);
    suite_add_tcase(suite, tcase);
    return run_suite(suite);
}
