/* Supervised fine-tuning on a tiny model: the loss it reports, the weights it leaves. */
#include "train_case.h"

enum { EXAMPLES = 12 };

static int32_t words[EXAMPLES][12];
static psoup_example examples[EXAMPLES];

/* Prompt: a token and a count; completion: the token counted up, and the end token. */
static void make_examples(void) {
    for (int i = 0; i < EXAMPLES; i++) {
        size_t n = 0, counted = 2 + (size_t)i % 4;
        int32_t first = 2 + i % 8;
        words[i][n++] = first;
        words[i][n++] = 14;
        for (size_t j = 1; j <= counted; j++)
            words[i][n++] = first + (int32_t)j;
        words[i][n++] = END;
        examples[i] = (psoup_example){.tokens = words[i], .n = n, .n_prompt = 2};
    }
}

/* Mean loss over completion tokens, as the public scores have it. */
static double loss_of(psoup_model *model, const char *adapter, bool prompt) {
    float mix[4] = {0}, out[EXAMPLES * 12];
    psoup_row rows[EXAMPLES];
    double sum = 0.0;
    size_t count = 0, at = 0;
    if (adapter)
        mix[psoup_model_find_adapter(model, adapter)] = 1.0f;
    for (int i = 0; i < EXAMPLES; i++)
        rows[i] = (psoup_row){examples[i].tokens, examples[i].n, adapter ? mix : NULL};
    OK(psoup_model_logprobs(model, rows, EXAMPLES, out, &error));
    for (int i = 0; i < EXAMPLES; i++)
        for (size_t t = 1; t < examples[i].n; t++, at++)
            if (prompt || t >= examples[i].n_prompt) {
                sum -= out[at];
                count++;
            }
    return sum / (double)count;
}

typedef struct seen {
    double first_loss, last_loss, validation, best_validation;
    int64_t steps, total, stop_at;
    int validations;
} seen;

static int watch(void *user, const psoup_step *step) {
    seen *s = user;
    double loss = value_of(step, "loss");
    if (strcmp(step->phase, "validation") == 0) {
        s->best_validation = s->validations++ && s->best_validation < loss ? s->best_validation : loss;
        s->validation = loss;
        return 0;
    }
    if (step->step == 1)
        s->first_loss = loss;
    s->last_loss = loss;
    s->steps = step->step;
    s->total = step->total;
    return s->stop_at == step->step;
}

static psoup_sft_options plain(seen *s) {
    psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
    memset(s, 0, sizeof(*s));
    o.learning_rate = 1e-2f;
    o.epochs = 20;
    o.on_step = watch;
    o.user = s;
    return o;
}

static psoup_model *fresh(void) {
    psoup_model *model = tiny_model();
    make_examples();
    add_adapter(model, "other", 1);
    add_adapter(model, "P", 2);
    return model;
}

START_TEST(adapter_learns_and_reports_its_loss) {
    seen s;
    psoup_model *model = fresh();
    psoup_sft_options o = plain(&s);
    o.loss_on_prompt = _i;
    double before = loss_of(model, "P", _i);
    size_t count, count_other;
    float *other = weights(model, "other", &count_other), *mine = weights(model, "P", &count);
    OK(psoup_sft(model, "P", examples, EXAMPLES, examples, EXAMPLES, &o, &error));
    near(s.first_loss, before, 1e-6, "first loss", 0);
    near(s.validation, loss_of(model, "P", _i), 1e-6, "validation loss", 0);
    ck_assert_int_eq(s.steps, 20);
    ck_assert_int_eq(s.total, 20);
    ck_assert_double_lt(s.last_loss, 0.5 * before);
    ck_assert(same_weights(model, "other", other, count_other));
    ck_assert(!same_weights(model, "P", mine, count));
    free(other);
    free(mine);
    psoup_model_free(model);
}
END_TEST

START_TEST(base_learns) {
    seen s;
    psoup_model *model = tiny_model();
    make_examples();
    psoup_sft_options o = plain(&s);
    double before = loss_of(model, NULL, false);
    OK(psoup_sft(model, NULL, examples, EXAMPLES, examples, EXAMPLES, &o, &error));
    near(s.first_loss, before, 1e-6, "first loss", 0);
    near(s.validation, loss_of(model, NULL, false), 1e-6, "validation loss", 0);
    ck_assert_double_lt(s.last_loss, 0.3 * before);
    ck_assert_ptr_null(model->grad);
    psoup_model_free(model);
}
END_TEST

/* A step's gradient does not depend on how it is cut into micro-batches. */
START_TEST(accumulation_is_one_batch) {
    seen s;
    size_t count;
    float *expected = NULL;
    for (int cut = 0; cut < 2; cut++) {
        psoup_model *model = fresh();
        psoup_sft_options o = plain(&s);
        o.epochs = 3;
        o.batch_tokens = cut ? 16 : 1024;
        o.accumulation = cut ? 100 : 1;
        OK(psoup_sft(model, "P", examples, EXAMPLES, NULL, 0, &o, &error));
        ck_assert_int_eq(s.total, 3);
        if (!cut)
            expected = weights(model, "P", &count);
        else
            ck_assert(same_weights(model, "P", expected, count));
        psoup_model_free(model);
    }
    free(expected);
}
END_TEST

START_TEST(threads_and_seeds_decide_nothing_and_all) {
    seen s;
    size_t count;
    float *expected = NULL;
    tear_down();
    for (int run = 0; run < 4; run++) {
        open_context(run == 1 ? 1 : 2);
        psoup_model *model = fresh();
        psoup_sft_options o = plain(&s);
        o.epochs = 3;
        o.batch_tokens = 24;
        o.lora_dropout = 0.1f;
        o.seed = run == 3 ? 8 : 7;
        OK(psoup_sft(model, "P", examples, EXAMPLES, NULL, 0, &o, &error));
        if (run == 0)
            expected = weights(model, "P", &count);
        else
            ck_assert_int_eq(same_weights(model, "P", expected, count), run != 3);
        psoup_model_free(model);
        if (run < 3)
            tear_down();
    }
    free(expected);
}
END_TEST

START_TEST(stopping_leaves_a_clean_model) {
    seen s;
    psoup_model *model = fresh();
    psoup_sft_options o = plain(&s);
    s.stop_at = 2;
    const char *adapter = _i ? NULL : "P";
    ck_assert_int_eq(psoup_sft(model, adapter, examples, EXAMPLES, NULL, 0, &o, &error),
                     PSOUP_ERROR_CANCELLED);
    ck_assert_int_eq(s.steps, 2);
    ck_assert_ptr_null(psoup__model_adapter(model, "P")->grad);
    ck_assert_ptr_null(model->grad);
    s.stop_at = 0;
    OK(psoup_sft(model, adapter, examples, EXAMPLES, NULL, 0, &o, &error));
    psoup_model_free(model);
}
END_TEST

START_TEST(best_weights_are_kept) {
    seen s;
    psoup_model *model = fresh();
    psoup_sft_options o = plain(&s);
    int32_t others[EXAMPLES][12]; /* what is learnt of them makes the loss on the examples rise */
    psoup_example train[EXAMPLES];
    for (int i = 0; i < EXAMPLES; i++) {
        for (size_t t = 0; t < 12; t++)
            others[i][t] = words[i][11 - t];
        train[i] = examples[i];
        train[i].tokens = others[i];
    }
    o.lora_dropout = 0.3f; /* in training alone */
    o.validate_every = 1;
    o.max_steps = 12;
    OK(psoup_sft(model, "P", train, EXAMPLES, examples, EXAMPLES, &o, &error));
    ck_assert_int_eq(s.validations, 12);
    ck_assert_double_lt(s.best_validation, s.validation);
    near(loss_of(model, "P", false), s.best_validation, 1e-6, "kept loss", 0);
    psoup_model_free(model);
}
END_TEST

/* What is longer than batch_tokens counts as its first tokens. */
START_TEST(long_examples_are_cut) {
    enum { ROOM = 5 };
    float *left[2];
    size_t count;
    for (int cut = 0; cut < 2; cut++) {
        seen s;
        psoup_model *model = fresh();
        psoup_sft_options o = plain(&s);
        psoup_example longest[4];
        o.batch_tokens = ROOM;
        o.epochs = 2;
        for (int i = 0; i < 4; i++) {
            longest[i] = examples[4 * (i / 2) + 2 + i % 2]; /* of 7 and 8 tokens */
            ck_assert_uint_gt(longest[i].n, ROOM);
            longest[i].n = cut ? ROOM : longest[i].n;
        }
        OK(psoup_sft(model, "P", longest, 4, NULL, 0, &o, &error));
        left[cut] = weights(model, "P", &count);
        psoup_model_free(model);
    }
    ck_assert_mem_eq(left[0], left[1], count * sizeof(float));
    free(left[0]);
    free(left[1]);
}
END_TEST

START_TEST(reports_are_json_lines) {
    seen s;
    char path[256];
    temporary(path, sizeof(path));
    ck_assert_int_ge(mkstemp(path), 0);
    psoup_model *model = fresh();
    psoup_sft_options o = plain(&s);
    o.epochs = 3;
    o.metrics = path;
    OK(psoup_sft(model, "P", examples, EXAMPLES, examples, EXAMPLES, &o, &error));
    psoup_jsonl_reader *reader;
    psoup_json *row;
    int lines = 0;
    OK(psoup_jsonl_open(context, path, &reader, &error));
    for (;; lines++) {
        OK(psoup_jsonl_next(reader, &row, &error));
        if (!row)
            break;
        ck_assert_str_eq(psoup_json_string(psoup_json_get(row, "subject"), ""), "P");
        ck_assert_str_eq(psoup_json_string(psoup_json_get(row, "phase"), ""),
                         lines < 3 ? "train" : "validation");
        ck_assert(psoup_json_kind(psoup_json_get(row, "loss")) == PSOUP_JSON_REAL);
        psoup_json_free(row);
    }
    ck_assert_int_eq(lines, 4);
    psoup_jsonl_reader_free(reader);
    remove(path);
    psoup_model_free(model);
}
END_TEST

START_TEST(bad_examples_are_refused) {
    seen s;
    psoup_model *model = fresh();
    psoup_sft_options o = plain(&s);
    ck_assert_int_eq(psoup_sft(model, "Q", examples, EXAMPLES, NULL, 0, &o, &error),
                     PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "'Q'"));
    ck_assert_int_eq(psoup_sft(model, "P", examples, 0, NULL, 0, &o, &error), PSOUP_ERROR_ARGUMENT);
    psoup_example bad = {words[0], 4, 5};
    ck_assert_int_eq(psoup_sft(model, "P", &bad, 1, NULL, 0, &o, &error), PSOUP_ERROR_ARGUMENT);
    bad = (psoup_example){words[0], 2, 2}; /* nothing to learn */
    ck_assert_int_eq(psoup_sft(model, "P", &bad, 1, NULL, 0, &o, &error), PSOUP_ERROR_ARGUMENT);
    int32_t wild[] = {1, 2, 99, 3};
    bad = (psoup_example){wild, 4, 1};
    ck_assert_int_eq(psoup_sft(model, "P", &bad, 1, NULL, 0, &o, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_null(psoup__model_adapter(model, "P")->grad);
    psoup_model_free(model);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train_sft");
    TCase *tests = tcase_create("sft");
    tcase_set_timeout(tests, 120);
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_add_loop_test(tests, adapter_learns_and_reports_its_loss, 0, 2);
    tcase_add_test(tests, base_learns);
    tcase_add_test(tests, accumulation_is_one_batch);
    tcase_add_test(tests, threads_and_seeds_decide_nothing_and_all);
    tcase_add_loop_test(tests, stopping_leaves_a_clean_model, 0, 2);
    tcase_add_test(tests, best_weights_are_kept);
    tcase_add_test(tests, long_examples_are_cut);
    tcase_add_test(tests, reports_are_json_lines);
    tcase_add_test(tests, bad_examples_are_refused);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
