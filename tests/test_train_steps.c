/* Trainings taken step by step: what the one call leaves, to the byte, whatever is done between the steps. */
#include "resume_case.h"

enum { ROWS = 14 };

static int32_t words[ROWS + 2][6];
static psoup_example examples[ROWS];
static psoup_comparison comparisons[ROWS];
static psoup_dpo_pair pairs[ROWS];
static const char *const names[] = {"A", "B"};
static const psoup_comm *ranks; /* NULL: one process alone */

/* One training that the tests take whole or in steps. */
typedef struct subject {
    psoup_model *model;
    psoup_reward *rewards[2];
} subject;

static void begin(subject *s) {
    *s = (subject){.model = tiny_model()};
    for (int i = 0; i < ROWS + 2; i++)
        for (int t = 0; t < 6; t++)
            words[i][t] = 2 + (i * 3 + t * 5 + i * t) % 13;
    for (int i = 0; i < ROWS; i++) {
        examples[i] = (psoup_example){.tokens = words[i], .n = 6, .n_prompt = 2};
        comparisons[i] = (psoup_comparison){.chosen = words[i], .n_chosen = 5, .rejected = words[i + 1],
                                            .n_rejected = 4, .reward = i % 3 == 0};
        pairs[i] = (psoup_dpo_pair){.prompt = words[i], .n_prompt = 2, .chosen = words[i + 1], .n_chosen = 3,
                                    .rejected = words[i + 2], .n_rejected = 2, .policy = i % 3 == 0};
    }
}

static void make_adapters(subject *s, int kind) {
    for (int k = 0; k < 2; k++)
        if (kind == 1)
            OK(psoup_reward_create(s->model, names[k], NULL, &s->rewards[k], &error));
        else
            add_adapter(s->model, names[k], (uint64_t)k);
}

static void finish(subject *s) {
    psoup_reward_free(s->rewards[0]);
    psoup_reward_free(s->rewards[1]);
    psoup_model_free(s->model);
}

#define COMMON(o, r)                                                                               \
    do {                                                                                           \
        o.epochs = 3;                                                                              \
        o.learning_rate = 1e-2f;                                                                   \
        o.lora_dropout = 0.1f;                                                                     \
        o.validate_every = 2;                                                                      \
        o.metrics = (r)->metrics;                                                                  \
        o.on_step = watch_run;                                                                     \
        o.user = (r);                                                                              \
        o.checkpoint_dir = (r)->checkpoints;                                                       \
        o.checkpoint_every = 3;                                                                    \
        o.resume = 1;                                                                              \
        o.comm = ranks;                                                                            \
    } while (0)

/* kind 0: fine-tuning of A; 1: two rewards; 2: two policies; 3: the base. *out NULL: the whole. */
static psoup_status train(subject *s, int kind, run *r, psoup_training **out) {
    if (kind == 1) {
        psoup_reward_options o = PSOUP_REWARD_OPTIONS_INIT;
        COMMON(o, r);
        o.batch_size = 2;
        return out ? psoup_reward_train_create(s->rewards, 2, comparisons, ROWS, comparisons, 5, &o, out, &error)
                   : psoup_reward_train(s->rewards, 2, comparisons, ROWS, comparisons, 5, &o, &error);
    }
    if (kind == 2) {
        psoup_dpo_options o = PSOUP_DPO_OPTIONS_INIT;
        COMMON(o, r);
        o.batch_size = 2;
        return out ? psoup_dpo_create(s->model, names, 2, pairs, ROWS, pairs, 5, &o, out, &error)
                   : psoup_dpo(s->model, names, 2, pairs, ROWS, pairs, 5, &o, &error);
    }
    psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
    const char *adapter = kind == 0 ? "A" : NULL;
    COMMON(o, r);
    o.batch_tokens = 18;
    return out ? psoup_sft_create(s->model, adapter, examples, ROWS, examples, 4, &o, out, &error)
               : psoup_sft(s->model, adapter, examples, ROWS, examples, 4, &o, &error);
}

/* What it left: the adapters' weights, or of the base what it says of a row. */
static float *left(const subject *s, int kind, size_t *n) {
    if (kind != 3) {
        size_t a, b;
        float *x = weights(s->model, "A", &a), *y = weights(s->model, "B", &b);
        x = realloc(x, (a + b) * sizeof(*x));
        memcpy(x + a, y, b * sizeof(*x));
        free(y);
        *n = a + b;
        return x;
    }
    float *out = calloc(5, sizeof(*out));
    psoup_row row = {words[0], 6, NULL};
    OK(psoup_model_logprobs(s->model, &row, 1, out, &error));
    *n = 5;
    return out;
}

/* Between two steps the model is used, and adapters come and go, which moves the numbers of those that train. */
static void disturb(psoup_model *model, int64_t round) {
    psoup_row row = {words[1], 6, NULL};
    float out[5];
    OK(psoup_model_logprobs(model, &row, 1, out, &error));
    if (round % 2)
        add_adapter(model, "guest", 9);
    else if (psoup_model_find_adapter(model, "guest") >= 0)
        OK(psoup_model_remove_adapter(model, "guest", &error));
    if (round == 1)
        OK(psoup_model_remove_adapter(model, "first", &error));
}

START_TEST(steps_leave_what_the_whole_leaves) {
    const int kind = _i;
    run whole, r;
    subject a, b;
    size_t n, m;
    psoup_training *training = NULL;
    int64_t remaining = 1, rounds = 0, before = INT64_MAX;
    run_begin(&whole);
    begin(&a);
    make_adapters(&a, kind);
    OK(train(&a, kind, &whole, NULL));
    float *expected = left(&a, kind, &n);
    finish(&a);

    run_begin(&r);
    begin(&b);
    add_adapter(b.model, "first", 3); /* before those that train: they move down when it goes */
    make_adapters(&b, kind);
    OK(train(&b, kind, &r, &training));
    if (kind != 3) {
        psoup_training *twice;
        ck_assert(train(&b, kind, &r, &twice) != PSOUP_OK && !twice); /* one run at a time */
    }
    for (; remaining; rounds++) {
        OK(psoup_training_step(training, &remaining, &error));
        ck_assert_int_lt(remaining, before);
        before = remaining;
        disturb(b.model, rounds);
        if (rounds == 3) { /* thrown away, and gone on from the checkpoint of step 3 */
            char newest[600];
            ck_assert_int_ge(count_checkpoints(&r, newest), 1);
            psoup_training_free(training);
            finish(&b);
            begin(&b);
            make_adapters(&b, kind);
            add_adapter(b.model, "first", 3);
            OK(train(&b, kind, &r, &training));
            before = INT64_MAX;
        }
    }
    ck_assert_int_ge(rounds, 6);
    OK(psoup_training_step(training, &remaining, &error)); /* nothing is left to do */
    OK(psoup_training_run(training, &error));
    psoup_training_free(training);
    float *got = left(&b, kind, &m);
    ck_assert(n == m && memcmp(got, expected, n * sizeof(*got)) == 0);
    same_files(whole.metrics, r.metrics);
    finish(&b);
    free(got);
    free(expected);
    run_end(&whole);
    run_end(&r);
}
END_TEST

START_TEST(a_report_stops_it_and_it_goes_on) {
    run r;
    subject s;
    psoup_training *training;
    int64_t remaining, before;
    run_begin(&r);
    begin(&s);
    make_adapters(&s, _i);
    OK(train(&s, _i, &r, &training));
    r.stop_after = 1;
    REFUSED(psoup_training_step(training, &before, &error), PSOUP_ERROR_CANCELLED, "was stopped at step 1");
    OK(psoup_training_step(training, &remaining, &error));
    ck_assert_int_eq(remaining, before - 1);
    psoup_training_free(training);
    finish(&s);
    run_end(&r);
}
END_TEST

/* Of two ranks the other one, which says nothing: all that it adds is 0. */
static psoup_status nothing_added(void *user, void *x, size_t n, psoup_dtype dtype, psoup_error *e) { return PSOUP_OK; }
static psoup_status nothing_sent(void *user, void *data, size_t bytes, psoup_error *e) { return PSOUP_OK; }
static psoup_status nobody_failed(void *user, psoup_error *e) { return PSOUP_OK; }
static void count_aborts(void *user, const char *reason) { ++*(int *)user; }

/* All ranks know that a report stopped it; what one of them fails by after it went on they do not. */
START_TEST(a_failure_after_a_stop_is_told_to_the_others) {
    int aborts = 0;
    const psoup_comm two = {.size = sizeof(two), .user = &aborts, .world = 2, .sum = nothing_added,
                            .broadcast = nothing_sent, .failed = nobody_failed, .abort = count_aborts};
    run r;
    subject s;
    psoup_training *training;
    run_begin(&r);
    begin(&s);
    make_adapters(&s, _i);
    ranks = &two;
    OK(train(&s, _i, &r, &training));
    r.stop_after = 1;
    REFUSED(psoup_training_step(training, NULL, &error), PSOUP_ERROR_CANCELLED, "was stopped at step 1");
    OK(psoup_training_step(training, NULL, &error));
    ck_assert_int_eq(aborts, 0);
    OK(psoup_model_remove_adapter(s.model, "A", &error));
    REFUSED(psoup_training_step(training, NULL, &error), PSOUP_ERROR_STATE, "'A'");
    ck_assert_int_eq(aborts, 1);
    psoup_training_free(training);
    ranks = NULL;
    finish(&s);
    run_end(&r);
}
END_TEST

START_TEST(an_adapter_that_is_gone_is_refused) {
    run r;
    subject s;
    psoup_training *training;
    int64_t remaining;
    run_begin(&r);
    begin(&s);
    make_adapters(&s, _i);
    OK(train(&s, _i, &r, &training));
    OK(psoup_training_step(training, &remaining, &error));
    OK(psoup_model_remove_adapter(s.model, "A", &error));
    REFUSED(psoup_training_step(training, &remaining, &error), PSOUP_ERROR_STATE,
            "training of 'A': its adapter was removed or replaced");
    add_adapter(s.model, "A", 3);
    REFUSED(psoup_training_run(training, &error), PSOUP_ERROR_STATE, "'A'");
    psoup_training_free(training);
    finish(&s);
    run_end(&r);
}
END_TEST

START_TEST(nothing_is_needed) {
    REFUSED(psoup_training_step(NULL, NULL, &error), PSOUP_ERROR_ARGUMENT, "training is NULL");
    REFUSED(psoup_training_run(NULL, &error), PSOUP_ERROR_ARGUMENT, "training is NULL");
    psoup_training_free(NULL);
    subject s;
    begin(&s);
    REFUSED(psoup_sft_create(s.model, NULL, examples, ROWS, NULL, 0, NULL, NULL, &error), PSOUP_ERROR_ARGUMENT,
            "out is NULL");
    finish(&s);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("steps");
    TCase *tcase = tcase_create("all");
    tcase_set_timeout(tcase, 120);
    tcase_add_checked_fixture(tcase, set_up, tear_down);
    tcase_add_loop_test(tcase, steps_leave_what_the_whole_leaves, 0, 4);
    tcase_add_loop_test(tcase, a_report_stops_it_and_it_goes_on, 0, 4);
    tcase_add_loop_test(tcase, an_adapter_that_is_gone_is_refused, 0, 3);
    tcase_add_loop_test(tcase, a_failure_after_a_stop_is_told_to_the_others, 0, 3);
    tcase_add_test(tcase, nothing_is_needed);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
