/* Several ranks train one run: the same update as one process on the whole batch, by supervised fine-tuning,
 * reward training and DPO. */
#include "ranks_kept_case.h"

enum { ROWS = 23, LEARNERS = 2 };

static int32_t words[ROWS][16];
static psoup_example examples[ROWS];
static psoup_comparison comparisons[ROWS];
static psoup_dpo_pair pairs[ROWS];
static float rate, start[MOST_WEIGHTS]; /* the learning rate; the weights before */
static int full_at, stops_at; /* the disk is full after P's report of this step; rank 1 stops there; 0: never */

/* Rows of 4 to 14 tokens, for one learner more than for the other. */
static void make_rows(void) {
    for (int i = 0; i < ROWS; i++) {
        size_t n = 4 + (size_t)(i * 7) % 11;
        for (size_t t = 0; t < n; t++)
            words[i][t] = 2 + (int32_t)((i * 5 + (int)t * (3 + i % 2)) % 13);
        examples[i] = (psoup_example){.tokens = words[i], .n = n, .n_prompt = 2};
        comparisons[i] = (psoup_comparison){.chosen = words[i], .n_chosen = n, .rejected = words[(i + 5) % ROWS],
                                            .n_rejected = 4, .reward = i % 3 == 0};
        pairs[i] = (psoup_dpo_pair){.prompt = words[i], .n_prompt = 2, .chosen = words[i] + 2, .n_chosen = n - 2,
                                    .rejected = words[(i + 5) % ROWS], .n_rejected = 4, .policy = i % 3 == 0};
    }
}

static psoup_model *fresh(void) {
    psoup_model *model = tiny_model();
    make_rows();
    add_adapter(model, "P", 2);
    add_adapter(model, "Q", 3);
    return model;
}

static int keep_numbers(void *user, const psoup_step *step) {
    left *l = user;
    size_t at = 0;
    for (size_t i = 0; i < step->n && i < 8; i++, at++)
        l->numbers[at + (strcmp(step->phase, "validation") == 0 ? 16 : 0) +
                   (strcmp(step->subject, "Q") == 0 ? 32 : 0)] = step->values[i];
    if (l == &results[0] && full_at == step->step && strcmp(step->subject, "P") == 0)
        fill_disk(keeping.metrics);
    return l == &results[1] && stops_at == step->step && strcmp(step->subject, "P") == 0;
}

/* ---- the trainers ------------------------------------------------------------------------------------- */

static void train_sft(const psoup_comm *comm, void *arg) {
    psoup_model *model = fresh();
    int rank = comm ? comm->rank : 0;
    const char *adapter = arg;
    psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
    o.epochs = 3;
    o.batch_tokens = 40;
    o.accumulation = 2;
    o.learning_rate = rate;
    o.lora_dropout = adapter ? 0.1f : 0.0f;
    o.validate_every = 3;
    o.seed = 5;
    o.on_step = keep_numbers;
    o.user = &results[rank];
    o.comm = comm;
    o.metrics = keeping.metrics;
    o.checkpoint_dir = keeping.directory;
    o.checkpoint_every = keeping.every; /* 0: before the first step and after the last, and when somebody dies */
    o.resume = keeping.resume;
    leave(rank, psoup_sft(model, adapter, examples, ROWS - 6, examples + ROWS - 6, 6, &o, &error));
    if (adapter)
        leave_weights(rank, model, adapter);
    else
        OK(psoup_model_logits(model, &(psoup_row){.tokens = words[0], .n = 4}, 1, results[rank].weights, &error));
    if (!adapter)
        results[rank].n = 4 * VOCABULARY;
    psoup_model_free(model);
}

static void train_rewards(const psoup_comm *comm, void *arg) {
    psoup_model *model = tiny_model();
    psoup_reward *rewards[LEARNERS];
    int rank = comm ? comm->rank : 0;
    const char *const name[LEARNERS] = {"P", "Q"};
    psoup_reward_options o = PSOUP_REWARD_OPTIONS_INIT;
    make_rows();
    for (int j = 0; j < LEARNERS; j++) {
        psoup_adapter_options a = PSOUP_ADAPTER_OPTIONS_INIT;
        a.rank = 4;
        a.seed = 2 + (uint64_t)j;
        OK(psoup_reward_create(model, name[j], &a, &rewards[j], &error));
    }
    o.epochs = 2;
    o.batch_size = 3;
    o.accumulation = 2;
    o.learning_rate = rate;
    o.lora_dropout = 0.1f;
    o.centering = 0.1f;
    o.validate_every = 1;
    o.on_step = keep_numbers;
    o.user = &results[rank];
    o.comm = comm;
    o.metrics = keeping.metrics;
    o.checkpoint_dir = keeping.directory;
    o.checkpoint_every = keeping.every; /* 0: before the first step and after the last, and when somebody dies */
    o.resume = keeping.resume;
    leave(rank, psoup_reward_train(rewards, LEARNERS, comparisons, ROWS - 5, comparisons + ROWS - 5, 5, &o, &error));
    for (int j = 0; j < LEARNERS; j++) {
        leave_weights(rank, model, name[j]);
        psoup_reward_free(rewards[j]);
    }
    psoup_model_free(model);
}

static void train_dpo(const psoup_comm *comm, void *arg) {
    psoup_model *model = fresh();
    const char *const name[LEARNERS] = {"P", "Q"};
    int rank = comm ? comm->rank : 0;
    psoup_dpo_options o = PSOUP_DPO_OPTIONS_INIT;
    o.epochs = 2;
    o.batch_size = 4;
    o.learning_rate = rate;
    o.lora_dropout = 0.1f;
    o.validate_every = 2;
    o.on_step = keep_numbers;
    o.user = &results[rank];
    o.comm = comm;
    o.metrics = keeping.metrics;
    o.checkpoint_dir = keeping.directory;
    o.checkpoint_every = keeping.every; /* 0: before the first step and after the last, and when somebody dies */
    o.resume = keeping.resume;
    leave(rank, psoup_dpo(model, name, LEARNERS, pairs, ROWS - 5, pairs + ROWS - 5, 5, &o, &error));
    for (int j = 0; j < LEARNERS; j++)
        leave_weights(rank, model, name[j]);
    psoup_model_free(model);
}

/* Alone, and with 2 and 3 ranks. */
static void the_same(rank_fn train, const char *arg, double tolerance) {
    left *alone = malloc(sizeof(*alone));
    share_results();
    rate = 0.0f; /* nothing moves */
    train(NULL, (void *)arg);
    memcpy(start, results[0].weights, sizeof(start));
    memset(results, 0, sizeof(*results));
    rate = 1e-2f;
    train(NULL, (void *)arg);
    ck_assert_msg(results[0].status == PSOUP_OK, "%s", results[0].message);
    *alone = results[0];
    for (int world = 2; world <= 3; world++) {
        in_ranks(world, train, (void *)arg, NULL);
        same_in_all(world, alone, start, tolerance);
        for (int rank = 0; rank < world; rank++)
            for (size_t i = 0; i < 64; i++)
                near(results[rank].numbers[i], alone->numbers[i], 1e-4, "metric", i);
    }
    free(alone);
}

START_TEST(supervised) { the_same(train_sft, "P", 1e-4); }
END_TEST
START_TEST(supervised_base) { the_same(train_sft, NULL, 1e-4); }
END_TEST
START_TEST(rewards) { the_same(train_rewards, NULL, 1e-4); }
END_TEST
START_TEST(dpo) { the_same(train_dpo, NULL, 1e-4); }
END_TEST

/* ---- when a rank dies -------------------------------------------------------------------------------- */

enum { EACH = 3 }; /* a test of its own for every third call */

START_TEST(supervised_survives) {
    rate = 1e-2f;
    survives(train_sft, (void *)"P", 1 + _i, EACH);
}
END_TEST
START_TEST(rewards_survive) {
    rate = 1e-2f;
    survives(train_rewards, NULL, 1 + _i, EACH);
}
END_TEST
START_TEST(dpo_survives) {
    rate = 1e-2f;
    survives(train_dpo, NULL, 1 + _i, EACH);
}
END_TEST

/* ---- when rank 0 cannot write -------------------------------------------------------------------------- */

/* A line of metrics, while rank 1 says stop: with the same line, or with one before, of another learner. */
static void ends_alike(rank_fn train, const char *arg, int full, int stops) {
    run r;
    share_results();
    run_begin(&r);
    rate = 1e-2f;
    keeping.metrics = r.metrics;
    keeping.directory = r.checkpoints;
    full_at = full;
    stops_at = stops;
    in_ranks(3, train, (void *)arg, NULL);
    all_know_of_the_disk(3, r.metrics);
    full_at = stops_at = 0;
    keeping = (struct keeping){.every = 0};
    run_end(&r);
}

START_TEST(supervised_ends_alike) { ends_alike(train_sft, "P", 1, 2 * _i); }
END_TEST
START_TEST(rewards_end_alike) { ends_alike(train_rewards, NULL, 1, _i); }
END_TEST
START_TEST(dpo_ends_alike) { ends_alike(train_dpo, NULL, 1, _i); }
END_TEST

int main(void) {
    Suite *suite = suite_create("train_ranks");
    TCase *same = tcase_create("same");
    tcase_add_checked_fixture(same, set_up, tear_down);
    tcase_set_timeout(same, 120);
    tcase_add_test(same, supervised);
    tcase_add_test(same, supervised_base);
    tcase_add_test(same, rewards);
    tcase_add_test(same, dpo);
    suite_add_tcase(suite, same);
    TCase *death = tcase_create("death");
    tcase_add_checked_fixture(death, set_up, tear_down);
    tcase_set_timeout(death, 120);
    tcase_add_loop_test(death, supervised_survives, 0, EACH);
    tcase_add_loop_test(death, rewards_survive, 0, EACH);
    tcase_add_loop_test(death, dpo_survives, 0, EACH);
    suite_add_tcase(suite, death);
    TCase *disk = tcase_create("disk");
    tcase_add_checked_fixture(disk, set_up, tear_down);
    tcase_set_timeout(disk, 30);
    tcase_add_loop_test(disk, supervised_ends_alike, 0, 2);
    tcase_add_loop_test(disk, rewards_end_alike, 0, 2);
    tcase_add_loop_test(disk, dpo_ends_alike, 0, 2);
    suite_add_tcase(suite, disk);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
