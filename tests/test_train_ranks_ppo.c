/* PPO, RLOO and GRPO by several ranks: the rollouts of one process, and its update to the order of sums. */
#include "ppo_case.h"
#include "ranks_kept_case.h"

enum { SIDE_BY_SIDE = 2, STEPS = 3 };

/* One way to run, and how near to one process it ends. */
typedef struct way {
    psoup_objective objective;
    bool models; /* reward models instead of callbacks */
    int32_t mini_batch_size, loss_group;
    float dropout;
    bool stops; /* early */
    bool soup; /* the adapters are trained as one policy, under mixes drawn for each row */
    bool several; /* the soup's first adapter has two rewards, a function and a model */
} way;

static psoup_ppo_options options_of(const way *w) {
    psoup_ppo_options o = plain();
    o.steps = STEPS;
    o.objective = w->objective;
    o.mini_batch_size = w->mini_batch_size;
    o.loss_group = w->loss_group;
    o.lora_dropout = w->dropout;
    o.head_dropout = w->dropout;
    o.whiten_groups = 2;
    o.draw_new_tokens_from = 4;
    o.draw_group = 3;
    o.micro_batch_tokens = 48;
    o.validate_every = 2;
    if (w->stops)
        o.target_kl = 1e-4f;
    if (w->several)
        o.length_correction = 0.5f;
    return o;
}

/* The numbers of the last reports: of each policy one of a step, and one of a validation. */
enum { REPORT = PSOUP__MAX_METRICS };
_Static_assert(2 * SIDE_BY_SIDE * REPORT <= sizeof(results->numbers) / sizeof(double), "room for all of them");
static int keep_numbers(void *user, const psoup_step *step) {
    left *l = user;
    size_t p = strcmp(step->subject, names[1]) == 0, v = strcmp(step->phase, "validation") == 0;
    ck_assert_uint_le(step->n, REPORT);
    for (size_t i = 0; i < step->n; i++)
        l->numbers[(2 * p + v) * REPORT + i] = step->values[i];
    return 0;
}

/* The first step's rollouts, and all that was made of them. */
static void keep_trace(left *l, const psoup_ppo *ppo, size_t policies) {
    psoup_ppo_trace trace = {.size = sizeof(trace)};
    for (size_t p = 0; p < policies; p++) {
        OK(psoup_ppo_get_trace(ppo, p, &trace, &error));
        const float *const arrays[] = {trace.logprob, trace.ref_logprob, trace.value, trace.advantage,
                                       trace.first_ratio};
        memcpy(l->tokens + l->n_tokens, trace.response, trace.tokens * sizeof(int32_t));
        l->n_tokens += trace.tokens;
        for (size_t k = 0; k < sizeof(arrays) / sizeof(arrays[0]); k++) {
            memcpy(l->tokens + l->n_tokens, arrays[k], trace.tokens * sizeof(float)); /* by their bits */
            l->n_tokens += trace.tokens;
        }
        ck_assert_uint_lt(l->n_tokens, 4096);
    }
}

static void train(const psoup_comm *comm, void *arg) {
    const way *w = arg;
    int rank = comm ? comm->rank : 0;
    left *l = &results[rank];
    psoup_model *model = fresh(SIDE_BY_SIDE);
    psoup_ppo_policy policies[SIDE_BY_SIDE];
    psoup_ppo_soup soup = PSOUP_PPO_SOUP_INIT;
    size_t n = w->soup ? 1 : SIDE_BY_SIDE;
    psoup_reward *reward = NULL;
    psoup_ppo_options o = options_of(w);
    OK(psoup_reward_create(model, "reward", NULL, &reward, &error));
    psoup__adapter *judge = psoup__model_adapter(model, "reward");
    for (size_t i = 0; i < judge->count; i++)
        judge->data[i] = 0.1f * sinf((float)i);
    for (int p = 0; p < SIDE_BY_SIDE; p++) {
        policies[p] = policy(p);
        if (w->models) {
            policies[p].reward_fn = NULL;
            policies[p].rewards = &reward;
            policies[p].n_rewards = 1;
        }
    }
    soup.adapters = names;
    soup.n = SIDE_BY_SIDE;
    if (w->soup) {
        policies[0].adapter = "soup";
        policies[0].soup = &soup;
    }
    const psoup_reward_source sources[] = {
        {.name = "share", .function = pay, .user = &wanted[0], .weight = 0.5f},
        {.model = reward, .weight = 0.25f},
        {.name = "other", .function = pay, .user = &wanted[1], .weight = 1.0f, .adapter = 1}};
    if (w->several) {
        policies[0].reward_fn = NULL;
        policies[0].sources = sources;
        policies[0].n_sources = sizeof(sources) / sizeof(sources[0]);
    }
    o.on_step = keep_numbers;
    o.user = l;
    o.comm = comm;
    o.metrics = keeping.metrics;
    o.samples = keeping.samples;
    o.samples_every = keeping.samples != NULL;
    o.checkpoint_dir = keeping.directory;
    o.checkpoint_every = keeping.every;
    o.resume = keeping.resume;
    psoup_ppo *ppo = NULL;
    psoup_status status = psoup_ppo_create(model, policies, n, &o, &ppo, &error);
    if (status == PSOUP_OK && !keeping.directory) {
        OK(psoup_ppo_step(ppo, NULL, &error));
        keep_trace(l, ppo, n);
    }
    leave(rank, status == PSOUP_OK ? psoup_ppo_run(ppo, &error) : status);
    psoup_ppo_free(ppo);
    for (int p = 0; p < SIDE_BY_SIDE; p++)
        leave_weights(rank, model, names[p]);
    psoup_reward_free(reward);
    psoup_model_free(model);
}

/* The bits of the first step's rollouts, and everything else as near as sums in another order bring it. */
static void the_same(way w) {
    static float start[MOST_WEIGHTS];
    left *alone = malloc(sizeof(*alone));
    size_t n = 0, at = 0;
    share_results();
    train(NULL, &w);
    ck_assert_msg(results[0].status == PSOUP_OK, "%s", results[0].message);
    *alone = results[0];
    psoup_model *model = fresh(SIDE_BY_SIDE); /* with its value head, which is zero at first */
    for (int p = 0; p < SIDE_BY_SIDE; p++, at = alone->n / SIDE_BY_SIDE) {
        float *before = weights(model, names[p], &n);
        memcpy(start + at, before, n * sizeof(*before));
        free(before);
    }
    psoup_model_free(model);
    for (int world = 2; world <= 3; world++) {
        in_ranks(world, train, &w, NULL);
        same_in_all(world, alone, start, 1e-3);
        for (int rank = 0; rank < world; rank++) {
            ck_assert_uint_eq(results[rank].n_tokens, alone->n_tokens);
            ck_assert_msg(memcmp(results[rank].tokens, alone->tokens, alone->n_tokens * sizeof(int32_t)) == 0,
                          "rank %d of %d sampled, scored or evaluated otherwise", rank, world);
            for (size_t i = 0; i < 2 * SIDE_BY_SIDE * REPORT; i++)
                near(results[rank].numbers[i], alone->numbers[i], 1e-3, "metric", i);
        }
    }
    free(alone);
}

START_TEST(ppo) { the_same((way){.mini_batch_size = 3, .dropout = 0.1f}); }
END_TEST
START_TEST(ppo_by_models) { the_same((way){.models = true, .loss_group = 2}); }
END_TEST
START_TEST(ppo_stops_early) { the_same((way){.stops = true, .mini_batch_size = 4}); }
END_TEST
START_TEST(rloo) { the_same((way){.objective = PSOUP_OBJECTIVE_RLOO, .mini_batch_size = 4, .loss_group = 2}); }
END_TEST
START_TEST(grpo) { the_same((way){.objective = PSOUP_OBJECTIVE_GRPO, .loss_group = 1, .models = true}); }
END_TEST
START_TEST(a_soup) { the_same((way){.soup = true, .mini_batch_size = 4}); }
END_TEST
START_TEST(a_soup_of_several_rewards) { the_same((way){.soup = true, .several = true, .mini_batch_size = 4}); }
END_TEST

/* ---- when a rank dies -------------------------------------------------------------------------------- */

enum { EACH = 6 }; /* a test of its own for every sixth call */

START_TEST(ppo_survives) { survives(train, &(way){.mini_batch_size = 4, .dropout = 0.1f}, 1 + _i, EACH); }
END_TEST
START_TEST(a_soup_survives) { survives(train, &(way){.soup = true, .several = true}, 1 + _i, EACH); }
END_TEST

/* ---- when rank 0 cannot write -------------------------------------------------------------------------- */

enum { METRICS, VALIDATIONS, SAMPLES, FILES };
static char file[256];
static int which; /* line of two policies fails, after the first one's, where rank 1 has said stop */

static int full_and_stop(const left *l) {
    if (l == &results[0])
        fill_disk(file);
    return l == &results[1];
}

static int on_step(void *user, const psoup_step *step) {
    bool validates = strcmp(step->phase, "validation") == 0;
    return which != SAMPLES && validates == (which == VALIDATIONS) && strcmp(step->subject, names[0]) == 0 &&
           full_and_stop(user);
}

static int on_samples(void *user, int64_t step, const psoup_rollout *rollouts, const float *scores, size_t n) {
    return which == SAMPLES && strcmp(rollouts->policy, names[0]) == 0 && full_and_stop(user);
}

static void run_out(const psoup_comm *comm, void *arg) {
    psoup_model *model = fresh(SIDE_BY_SIDE);
    psoup_ppo_policy policies[SIDE_BY_SIDE] = {policy(0), policy(1)};
    psoup_ppo_options o = plain();
    *(which == SAMPLES ? &o.samples : &o.metrics) = file;
    o.samples_every = 2;
    o.on_samples = on_samples;
    o.on_step = on_step;
    o.user = &results[comm->rank];
    o.comm = comm;
    psoup_ppo *trainer = create(model, policies, SIDE_BY_SIDE, &o);
    leave(comm->rank, psoup_ppo_run(trainer, &error));
    psoup_ppo_free(trainer);
    psoup_model_free(model);
}

START_TEST(a_full_disk_ends_all) {
    share_results();
    temporary(file, sizeof(file));
    close(mkstemp(file));
    which = _i;
    in_ranks(3, run_out, NULL, NULL);
    all_know_of_the_disk(3, file);
    unlink(file);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train_ranks_ppo");
    TCase *same = tcase_create("same");
    tcase_add_checked_fixture(same, set_up, tear_down);
    tcase_set_timeout(same, 120);
    tcase_add_test(same, ppo);
    tcase_add_test(same, ppo_by_models);
    tcase_add_test(same, ppo_stops_early);
    tcase_add_test(same, rloo);
    tcase_add_test(same, grpo);
    tcase_add_test(same, a_soup);
    tcase_add_test(same, a_soup_of_several_rewards);
    tcase_add_loop_test(same, ppo_survives, 0, EACH);
    tcase_add_loop_test(same, a_soup_survives, 0, EACH);
    tcase_add_loop_test(same, a_full_disk_ends_all, METRICS, FILES);
    suite_add_tcase(suite, same);
    return run_suite(suite);
}
