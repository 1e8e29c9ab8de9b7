/* Reward models on a tiny model: they learn a rule, side by side as alone, and score alike in any
 * batch. */
#include <unistd.h>

#include "train_case.h"

enum { PAIRS = 192, LENGTH = 10 };

static int32_t words[2][PAIRS][2][LENGTH]; /* per rule */
static psoup_comparison pairs[2 * PAIRS];

/* Rule r: the chosen row holds token 5 + r, the rejected one does not. */
static void make_pairs(uint64_t seed) {
    psoup__random random = {seed, 0, 0};
    for (int rule = 0; rule < 2; rule++)
        for (int i = 0; i < PAIRS; i++) {
            size_t n[2];
            for (int side = 0; side < 2; side++) {
                n[side] = 4 + psoup__random_below(&random, LENGTH - 4);
                for (size_t t = 0; t < n[side]; t++) {
                    int32_t word = 2 + (int32_t)psoup__random_below(&random, VOCABULARY - 3);
                    words[rule][i][side][t] = word >= 5 + rule ? word + 1 : word;
                }
            }
            words[rule][i][0][psoup__random_below(&random, (uint32_t)n[0])] = 5 + rule;
            pairs[2 * i + rule] = (psoup_comparison){.chosen = words[rule][i][0],
                                                     .n_chosen = n[0],
                                                     .rejected = words[rule][i][1],
                                                     .n_rejected = n[1],
                                                     .reward = rule};
        }
}

static psoup_reward_options plain(void) {
    psoup_reward_options o = PSOUP_REWARD_OPTIONS_INIT;
    o.learning_rate = 2e-2f;
    o.epochs = 12;
    o.seed = 3;
    return o;
}

static psoup_reward *make_reward(psoup_model *model, const char *name, uint64_t seed) {
    psoup_reward *reward;
    psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
    options.rank = 4;
    options.targets = PSOUP_ALL_LINEAR;
    options.seed = seed;
    OK(psoup_reward_create(model, name, &options, &reward, &error));
    return reward;
}

/* Comparisons of one rule, as reward 0. */
static void only(int rule, psoup_comparison *out, int n) {
    for (int i = 0; i < n; i++) {
        out[i] = pairs[2 * i + rule];
        out[i].reward = 0;
    }
}

START_TEST(learns_a_rule_and_scores_alike_in_any_batch) {
    psoup_model *model = tiny_model();
    psoup_reward *reward = make_reward(model, "R", 1);
    psoup_comparison train[PAIRS], held_out[PAIRS];
    make_pairs(1);
    only(0, train, PAIRS);
    psoup_reward_options o = plain();
    double accuracy, loss, before;
    OK(psoup_reward_accuracy(&reward, 1, train, PAIRS, &accuracy, &before, &error));
    near(before, log(2.0), 1e-6, "loss of a zero head", 0);
    ck_assert_double_eq(accuracy, 0.0); /* ties are no wins */
    OK(psoup_reward_train(&reward, 1, train, PAIRS, NULL, 0, &o, &error));
    make_pairs(2);
    only(0, held_out, PAIRS);
    OK(psoup_reward_accuracy(&reward, 1, held_out, PAIRS, &accuracy, &loss, &error));
    ck_assert_msg(accuracy > 0.95, "accuracy %g", accuracy);
    ck_assert_double_lt(loss, 0.3);

    float together[2 * PAIRS], alone, reversed[2 * PAIRS];
    psoup_row rows[2 * PAIRS], back[2 * PAIRS];
    for (int i = 0; i < PAIRS; i++) {
        rows[2 * i] = (psoup_row){held_out[i].chosen, held_out[i].n_chosen, NULL};
        rows[2 * i + 1] = (psoup_row){held_out[i].rejected, held_out[i].n_rejected, NULL};
    }
    for (int i = 0; i < 2 * PAIRS; i++)
        back[i] = rows[2 * PAIRS - 1 - i];
    OK(psoup_reward_score(reward, rows, 2 * PAIRS, together, &error));
    OK(psoup_reward_score(reward, back, 2 * PAIRS, reversed, &error));
    for (int i = 0; i < 2 * PAIRS; i++) {
        OK(psoup_reward_score(reward, rows + i, 1, &alone, &error));
        ck_assert_mem_eq(&alone, &together[i], sizeof(alone));
        ck_assert_mem_eq(&alone, &reversed[2 * PAIRS - 1 - i], sizeof(alone));
    }
    psoup_row empty = {words[0][0][0], 0, NULL};
    ck_assert_int_eq(psoup_reward_score(reward, &empty, 1, &alone, &error), PSOUP_ERROR_ARGUMENT);

    char folder[256], file[512];
    temporary(folder, sizeof(folder));
    ck_assert_ptr_nonnull(mkdtemp(folder));
    OK(psoup_reward_save(reward, folder, "base", &error));
    psoup_reward *loaded;
    OK(psoup_reward_load(model, "L", folder, &loaded, &error));
    OK(psoup_reward_score(loaded, rows, 2 * PAIRS, reversed, &error));
    ck_assert_mem_eq(together, reversed, sizeof(together));
    ck_assert_str_eq(psoup_reward_name(loaded), "L");
    const char *const names[] = {"adapter_config.json", "adapter_model.safetensors"};
    for (int i = 0; i < 2; i++) {
        snprintf(file, sizeof(file), "%s/%s", folder, names[i]);
        remove(file);
    }
    rmdir(folder);
    psoup_reward_free(loaded);
    OK(psoup_model_remove_adapter(model, "R", &error));
    ck_assert_int_eq(psoup_reward_score(reward, rows, 1, &alone, &error), PSOUP_ERROR_STATE);
    psoup_reward_free(reward);
    psoup_model_free(model);
}
END_TEST

/* The first report of a run, against the loss and gradient computed by hand. */
static double first_norm;
static int keep_first(void *user, const psoup_step *step) {
    if (step->step == 1)
        first_norm = value_of(step, "grad_norm");
    return 0;
}

/* With a zero head the scores are 0, so dL/dscore = ∓1/2 (and margin's), and the gradient lies in the
 * head alone: Σ dscore · hidden. Its bias gets nothing: w and l cancel. */
START_TEST(gradient_is_the_formulas) {
    psoup_model *model = tiny_model();
    psoup_reward *reward = make_reward(model, "R", 1);
    psoup_comparison train[PAIRS];
    psoup__tape *tape;
    make_pairs(1);
    only(0, train, PAIRS);
    double expected = 0.0, sum[16] = {0};
    OK(psoup__tape_create(model, &tape, &error));
    for (int i = 0; i < 4; i++)
        for (int side = 0; side < 2; side++) {
            int32_t n = (int32_t)(side ? train[i].n_rejected : train[i].n_chosen);
            int32_t start[2] = {0, n};
            float hidden[LENGTH * 16];
            psoup__batch batch = {.n = 1, .rows = n, .start = start,
                                  .tokens = side ? train[i].rejected : train[i].chosen};
            OK(psoup__forward(model, tape, &batch, false, &error));
            OK(model->be->ops->read(model->be, hidden, psoup__tape_hidden(tape),
                                    (size_t)n * 16 * sizeof(float), &error));
            for (int j = 0; j < 16; j++)
                sum[j] += (side ? 0.5 : -0.5) * hidden[(n - 1) * 16 + j] / 4.0;
        }
    for (int j = 0; j < 16; j++)
        expected += sum[j] * sum[j];
    psoup_reward_options o = plain();
    o.batch_size = 4;
    o.max_steps = 1;
    o.on_step = keep_first;
    OK(psoup_reward_train(&reward, 1, train, 4, NULL, 0, &o, &error));
    near(first_norm, sqrt(expected), 1e-6, "gradient's norm", 0);
    psoup__tape_free(tape);
    psoup_reward_free(reward);
    psoup_model_free(model);
}
END_TEST

static double first_loss;
static int keep_loss(void *user, const psoup_step *step) {
    if (step->step == 1)
        first_loss = value_of(step, "loss");
    return 0;
}

/* A comparison's margin is added to the option's, where it is asked for; with a zero head the first loss is the mean
 * of log(1 + e^margin). */
START_TEST(margins_are_each_comparisons_own) {
    float *expected = NULL;
    size_t count;
    make_pairs(1);
    for (int form = 0; form < 4; form++) {
        psoup_model *model = tiny_model();
        psoup_reward *reward = make_reward(model, "R", 1);
        psoup_comparison train[PAIRS];
        psoup_reward_options o = plain();
        double loss = 0.0;
        o.batch_size = 4;
        o.max_steps = 3;
        o.margin = form ? 0.25f : 0.75f;
        o.margins = form > 0;
        o.on_step = keep_loss;
        only(0, train, PAIRS);
        for (int i = 0; i < 4; i++) {
            train[i].margin = form == 0 ? NAN : form == 1 ? 0.5f : 0.25f * (float)i;
            loss += log1p(exp(form < 2 ? 0.75 : 0.25 + train[i].margin)) / 4.0;
        }
        if (form == 3) {
            train[2].margin = INFINITY;
            ck_assert_int_eq(psoup_reward_train(&reward, 1, train, 4, NULL, 0, &o, &error), PSOUP_ERROR_ARGUMENT);
            ck_assert_ptr_nonnull(strstr(error.message, "train[2] has margin inf"));
        } else {
            OK(psoup_reward_train(&reward, 1, train, 4, NULL, 0, &o, &error));
            near(first_loss, loss, 1e-6, "loss", (size_t)form);
        }
        if (form == 0)
            expected = weights(model, "R", &count);
        else
            ck_assert(same_weights(model, "R", expected, count) == (form == 1));
        psoup_reward_free(reward);
        psoup_model_free(model);
    }
    free(expected);
}
END_TEST

static psoup_model *two(psoup_reward *rewards[2]) {
    psoup_model *model = tiny_model();
    rewards[0] = make_reward(model, "R0", 1);
    rewards[1] = make_reward(model, "R1", 2);
    return model;
}

START_TEST(side_by_side_is_alone) {
    psoup_reward *rewards[2];
    psoup_model *model = two(rewards);
    psoup_comparison alone[PAIRS];
    size_t count[2];
    float *expected[2];
    make_pairs(1);
    psoup_reward_options o = plain();
    o.epochs = 2;
    o.batch_size = 6;
    o.accumulation = 3;
    o.lora_dropout = 0.1f;
    o.validate_every = 2;
    /* The second learns from fewer comparisons: its run ends earlier. */
    OK(psoup_reward_train(rewards, 2, pairs, 2 * PAIRS - 80, pairs, 40, &o, &error));
    for (int r = 0; r < 2; r++)
        expected[r] = weights(model, psoup_reward_name(rewards[r]), &count[r]);
    psoup_reward_free(rewards[0]);
    psoup_reward_free(rewards[1]);
    psoup_model_free(model);
    tear_down();
    open_context(1); /* one thread instead of two, at that */
    for (int r = 0; r < 2; r++) {
        model = two(rewards);
        only(r, alone, PAIRS);
        OK(psoup_reward_train(&rewards[r], 1, alone, PAIRS - 40, alone, 20, &o, &error));
        ck_assert(same_weights(model, psoup_reward_name(rewards[r]), expected[r], count[r]));
        free(expected[r]);
        psoup_reward_free(rewards[0]);
        psoup_reward_free(rewards[1]);
        psoup_model_free(model);
    }
}
END_TEST

typedef struct seen {
    double best, last;
    int validations;
    int64_t stop_at;
} seen;

static int watch(void *user, const psoup_step *step) {
    seen *s = user;
    if (strcmp(step->phase, "validation") == 0) {
        s->last = value_of(step, "accuracy");
        s->best = s->validations++ && s->best > s->last ? s->best : s->last;
    }
    return s->stop_at && s->stop_at == step->step;
}

/* max_tokens keeps a row's first tokens: what stands past them trains nothing. And a model that no
 * comparison trains is refused by name. */
START_TEST(long_rows_keep_their_first_tokens) {
    float *expected = NULL;
    size_t count;
    make_pairs(5);
    for (int tail = 0; tail < 2; tail++) {
        psoup_model *model = tiny_model();
        psoup_reward *reward = make_reward(model, "R", 1), *idle = make_reward(model, "idle", 2);
        psoup_reward *both[] = {reward, idle};
        psoup_comparison few[8];
        psoup_reward_options o = plain();
        o.epochs = 1;
        o.max_tokens = 4;
        only(0, few, 8);
        for (int i = 0; i < 8 && tail; i++) /* every row has at least 4 tokens */
            few[i].n_chosen = few[i].n_rejected = 4;
        ck_assert_int_eq(psoup_reward_train(both, 2, few, 8, NULL, 0, &o, &error),
                         PSOUP_ERROR_ARGUMENT);
        ck_assert_ptr_nonnull(strstr(error.message, "'idle'"));
        OK(psoup_reward_train(&reward, 1, few, 8, NULL, 0, &o, &error));
        if (tail)
            ck_assert(same_weights(model, "R", expected, count));
        else
            expected = weights(model, "R", &count);
        psoup_reward_free(idle);
        psoup_reward_free(reward);
        psoup_model_free(model);
    }
    free(expected);
}
END_TEST

START_TEST(best_is_kept_and_stopping_is_clean) {
    seen s = {0};
    psoup_reward *rewards[2];
    psoup_model *model = two(rewards);
    make_pairs(1);
    psoup_reward_options o = plain();
    o.on_step = watch;
    o.user = &s;
    o.validate_every = 1;
    o.max_steps = 10;
    o.learning_rate = 0.2f; /* too much */
    o.lora_dropout = 0.3f; /* in training alone */
    psoup_comparison mine[PAIRS];
    double accuracy;
    only(0, mine, PAIRS);
    OK(psoup_reward_train(rewards, 1, mine, 64, mine + 64, 32, &o, &error));
    OK(psoup_reward_accuracy(rewards, 1, mine + 64, 32, &accuracy, NULL, &error));
    ck_assert_int_eq(s.validations, 10);
    ck_assert_double_eq(accuracy, s.best);
    s.stop_at = 3;
    ck_assert_int_eq(psoup_reward_train(rewards, 2, pairs, 2 * PAIRS, NULL, 0, &o, &error),
                     PSOUP_ERROR_CANCELLED);
    for (int r = 0; r < 2; r++)
        ck_assert_ptr_null(model->adapters[r]->grad);
    psoup_comparison bad = pairs[0];
    bad.reward = 2;
    ck_assert_int_eq(psoup_reward_train(rewards, 2, &bad, 1, NULL, 0, NULL, &error),
                     PSOUP_ERROR_ARGUMENT);
    psoup_reward *twice[] = {rewards[0], rewards[0]};
    ck_assert_int_eq(psoup_reward_train(twice, 2, pairs, 2, NULL, 0, NULL, &error),
                     PSOUP_ERROR_ARGUMENT);
    psoup_reward *none;
    ck_assert_int_eq(psoup_reward_create(model, "R0", NULL, &none, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_null(none);
    psoup_reward_free(rewards[0]);
    psoup_reward_free(rewards[1]);
    psoup_model_free(model);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train_reward");
    TCase *tests = tcase_create("reward");
    tcase_set_timeout(tests, 120);
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_add_test(tests, learns_a_rule_and_scores_alike_in_any_batch);
    tcase_add_test(tests, gradient_is_the_formulas);
    tcase_add_test(tests, margins_are_each_comparisons_own);
    tcase_add_test(tests, side_by_side_is_alone);
    tcase_add_test(tests, long_rows_keep_their_first_tokens);
    tcase_add_test(tests, best_is_kept_and_stopping_is_clean);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
