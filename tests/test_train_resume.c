/* Runs that were stopped, killed or lost their disk, and went on: the same bytes as if nothing had been. */
#include "resume_case.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

enum { EXAMPLES = 10, HELD = 3 };

static int32_t words[EXAMPLES + HELD][8];
static psoup_example examples[EXAMPLES + HELD];

static void make_examples(void) {
    for (int i = 0; i < EXAMPLES + HELD; i++) {
        size_t n = 5 + (size_t)i % 4;
        for (size_t t = 0; t < n; t++)
            words[i][t] = 2 + (int32_t)((i * 3 + (int)t * 5) % 13);
        examples[i] = (psoup_example){.tokens = words[i], .n = n, .n_prompt = 2};
    }
}

static psoup_sft_options options_of(run *r) {
    psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
    o.learning_rate = 1e-2f;
    o.epochs = 3;
    o.batch_tokens = 16;
    o.accumulation = 2;
    o.schedule = PSOUP_SCHEDULE_COSINE;
    o.warmup_steps = 2;
    o.lora_dropout = 0.1f;
    o.validate_every = 2;
    o.seed = 5;
    o.metrics = r->metrics;
    o.on_step = watch_run;
    o.user = r;
    o.checkpoint_dir = r->checkpoints;
    o.checkpoint_every = 2;
    o.resume = 1;
    return o;
}

static psoup_model *fresh(void) {
    psoup_model *model = tiny_model();
    make_examples();
    add_adapter(model, "P", 2);
    return model;
}

static psoup_status train(psoup_model *model, const char *adapter, const psoup_sft_options *o) {
    return psoup_sft(model, adapter, examples, EXAMPLES, examples + EXAMPLES, HELD, o, &error);
}

/* What a finished run leaves of its adapter or its base. */
static float *left(psoup_model *model, const char *adapter, size_t *n) {
    if (adapter)
        return weights(model, adapter, n);
    int32_t row[] = {2, 3, 4, 5};
    psoup_row rows = {row, 4, NULL};
    float *out = calloc(4, sizeof(*out));
    *n = 3;
    OK(psoup_model_logprobs(model, &rows, 1, out, &error));
    return out;
}

static void run_whole(run *r, const char *adapter, float **data, size_t *n, bool kept) {
    psoup_model *model = fresh();
    psoup_sft_options o = options_of(r);
    if (!kept) {
        o.checkpoint_dir = NULL;
        o.resume = 0;
    }
    OK(train(model, adapter, &o));
    *data = left(model, adapter, n);
    psoup_model_free(model);
}

/* Stopped at every report, and begun anew each time. */
static void stop_everywhere(const char *adapter, int threads) {
    float *expected, *got;
    size_t n, m;
    int stops = 0;
    run whole, r;
    run_begin(&whole);
    run_begin(&r);
    run_whole(&whole, adapter, &expected, &n, false); /* keeping a run changes nothing */
    psoup_context_free(context);
    open_context(threads);
    for (psoup_status status = PSOUP_ERROR_CANCELLED; status != PSOUP_OK; stops++) {
        psoup_model *model = fresh();
        psoup_sft_options o = options_of(&r);
        r.stop_after = 1;
        status = train(model, adapter, &o);
        ck_assert(status == PSOUP_OK || status == PSOUP_ERROR_CANCELLED);
        psoup_model_free(model);
        ck_assert_int_le(count_checkpoints(&r, NULL), 3);
    }
    ck_assert_int_ge(stops, 10);
    r.stop_after = 0;
    run_whole(&r, adapter, &got, &m, true); /* it is done: nothing is done again */
    ck_assert(n == m && memcmp(expected, got, n * sizeof(*got)) == 0);
    same_files(whole.metrics, r.metrics);
    free(got);
    free(expected);
    run_end(&whole);
    run_end(&r);
}

START_TEST(sft_goes_on_with_the_same_bytes) {
    stop_everywhere("P", 1 + _i);
}
END_TEST

START_TEST(the_base_goes_on_with_the_same_bytes) {
    stop_everywhere(NULL, 1 + _i);
}
END_TEST

/* Killed by SIGKILL in a child: at a report, and while it writes a checkpoint. */
START_TEST(killed_runs_go_on) {
    float *expected, *got;
    size_t n, m;
    run whole, r;
    psoup_context_free(context);
    open_context(1); /* a child of fork has no pool */
    run_begin(&whole);
    run_begin(&r);
    run_whole(&whole, "P", &expected, &n, true);
    for (int i = 0; i < 8; i++) {
        pid_t child = fork();
        ck_assert_int_ge(child, 0);
        if (child == 0) {
            for (;;) /* over and over; it ends at once when it is done */
                run_whole(&r, "P", &got, &m, true);
        }
        usleep((useconds_t)(500 + 1700 * i));
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
    }
    run_whole(&r, "P", &got, &m, true);
    ck_assert(n == m && memcmp(expected, got, n * sizeof(*got)) == 0);
    same_files(whole.metrics, r.metrics);
    count_checkpoints(&r, NULL); /* nothing half-written is left */
    free(got);
    free(expected);
    run_end(&whole);
    run_end(&r);
}
END_TEST

static int64_t best_step;
static double best_loss;

static int note_best(void *user, const psoup_step *step) {
    if (strcmp(step->phase, "validation") == 0 && (best_step == 0 || value_of(step, "loss") < best_loss)) {
        best_step = step->step;
        best_loss = value_of(step, "loss");
    }
    return watch_run(user, step);
}

/* Which step's weights a run ends with is told at its end, of what was seen before it was stopped too. */
START_TEST(the_step_of_the_best_weights_is_told) {
    char expected[128];
    run r;
    psoup_context_free(context);
    set_up_log();
    run_begin(&r);
    for (int turn = 0; turn < 3; turn++) {
        psoup_model *model = fresh();
        psoup_sft_options o = options_of(&r);
        o.learning_rate = 0.2f; /* the best is seen early */
        o.on_step = note_best;
        r.stop_after = turn ? 0 : 11;
        ck_assert_int_eq(train(model, "P", &o), turn ? PSOUP_OK : PSOUP_ERROR_CANCELLED);
        snprintf(expected, sizeof(expected), "sft: 'P' ends with the weights of step %lld of 9, the best in validation",
                 (long long)best_step);
        if (turn)
            SAID(expected);
        else
            ck_assert_ptr_null(strstr(heard.last, "ends with"));
        ck_assert_int_lt(best_step, 7); /* before it was stopped */
        psoup_model_free(model);
    }
    run_end(&r);
}
END_TEST

static void stopped_run(run *r) {
    psoup_model *model = fresh();
    psoup_sft_options o = options_of(r);
    r->stop_after = 7; /* two of them of validations */
    REFUSED(train(model, "P", &o), PSOUP_ERROR_CANCELLED, "'P' was stopped at step 5 of");
    psoup_model_free(model);
}

START_TEST(other_runs_are_refused) {
    run r;
    run_begin(&r);
    stopped_run(&r);
    psoup_model *model = fresh();
    psoup_sft_options o = options_of(&r);
    o.learning_rate = 0.5f;
    REFUSED(train(model, "P", &o), PSOUP_ERROR_STATE, "checkpoint-000000005.safetensors.zst: is of another "
            "run: its learning_rate was 0.01, is 0.5");
    o = options_of(&r);
    o.schedule = PSOUP_SCHEDULE_LINEAR;
    REFUSED(train(model, "P", &o), PSOUP_ERROR_STATE, "its schedule was \"cosine\", is \"linear\"");
    o = options_of(&r);
    o.resume = 0;
    REFUSED(train(model, "P", &o), PSOUP_ERROR_STATE, "checkpoints of an earlier run, up to step 5");
    o = options_of(&r);
    words[3][2]++;
    REFUSED(train(model, "P", &o), PSOUP_ERROR_STATE, "its train was \"10 rows, ");
    words[3][2]--;
    words[EXAMPLES][2]++;
    REFUSED(train(model, "P", &o), PSOUP_ERROR_STATE, "its validation was \"3 rows, ");
    words[EXAMPLES][2]--;
    REFUSED(train(model, NULL, &o), PSOUP_ERROR_STATE, "its adapter was \"P of rank 4 and alpha 8, ");
    psoup_adapter_options wide = PSOUP_ADAPTER_OPTIONS_INIT;
    wide.rank = 2;
    OK(psoup_model_add_adapter(model, "Q", &wide, &error));
    REFUSED(train(model, "Q", &o), PSOUP_ERROR_STATE, "is \"Q of rank 2 and alpha");
    psoup_model_free(model);

    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    config.size = sizeof(config);
    model = fresh();
    OK(psoup_model_get_config(model, &config, &error));
    psoup_model_free(model);
    OK(psoup_model_create(context, &config, 8, &model, &error)); /* another seed: other weights */
    add_adapter(model, "P", 2);
    REFUSED(train(model, "P", &o), PSOUP_ERROR_STATE, "its base was \"");
    psoup_model_free(model);

    model = fresh();
    write_file(r.metrics, "{}\n", 3);
    REFUSED(train(model, "P", &o), PSOUP_ERROR_STATE, "has 3 bytes; it had ");
    psoup_model_free(model);
    run_end(&r);
}
END_TEST

/* Another version is the same file with another text in it. */
START_TEST(another_version_is_refused) {
    run r;
    char path[600];
    size_t n;
    psoup__writer *writer;
    run_begin(&r);
    stopped_run(&r);
    count_checkpoints(&r, path);
    char *data;
    OK(psoup__file_read(context, path, 1 << 30, &data, &n, &error));
    char *at = strstr(data + 8, "\\\"version\\\": \\\"");
    ck_assert_ptr_nonnull(at);
    at[15]++;
    OK(psoup__writer_create(context, path, &writer, &error));
    OK(psoup__writer_write(writer, data, n, &error));
    OK(psoup__writer_commit(writer, &error));
    psoup__writer_free(writer);
    psoup__free(context, data);
    psoup_model *model = fresh();
    psoup_sft_options o = options_of(&r);
    REFUSED(train(model, "P", &o), PSOUP_ERROR_STATE, "is of another run: its version was \"1.");
    psoup_model_free(model);
    run_end(&r);
}
END_TEST

START_TEST(damaged_checkpoints_are_refused) {
    run r;
    char path[600];
    run_begin(&r);
    stopped_run(&r);
    count_checkpoints(&r, path);
    int fd = open(path, O_RDONLY);
    struct stat info;
    ck_assert(fd >= 0 && fstat(fd, &info) == 0);
    size_t n = (size_t)info.st_size;
    unsigned char *data = malloc(n);
    ck_assert(read(fd, data, n) == (ssize_t)n && close(fd) == 0);
    psoup_model *model = fresh();
    psoup_sft_options o = options_of(&r);
    size_t count;
    float *before = weights(model, "P", &count);
    for (size_t i = 0; i < 40; i++) {
        write_file(path, data, n * i / 40);
        REFUSED(train(model, "P", &o), PSOUP_ERROR_FORMAT, path);
    }
    for (size_t at = 8; at < n; at += n / 60) {
        data[at] ^= (unsigned char)(1 << at % 8);
        write_file(path, data, n);
        REFUSED(train(model, "P", &o), PSOUP_ERROR_FORMAT, path);
        data[at] ^= (unsigned char)(1 << at % 8);
    }
    ck_assert(same_weights(model, "P", before, count)); /* refused before anything is read into it */
    write_file(path, data, n);
    OK(train(model, "P", &o));
    psoup_model_free(model);
    free(before);
    free(data);
    run_end(&r);
}
END_TEST

/* A file may grow to so many bytes only, as on a full disk: the write fails, what was there stays. */
START_TEST(a_full_disk_keeps_the_checkpoint_before) {
    float *expected, *got;
    size_t n, m;
    run whole, r;
    char path[600], after[600];
    run_begin(&whole);
    run_begin(&r);
    run_whole(&whole, "P", &expected, &n, true);
    stopped_run(&r);
    count_checkpoints(&r, path);
    struct rlimit full, small = {.rlim_cur = 2000, .rlim_max = RLIM_INFINITY};
    ck_assert_int_eq(getrlimit(RLIMIT_FSIZE, &full), 0);
    small.rlim_max = full.rlim_max;
    signal(SIGXFSZ, SIG_IGN);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &small), 0);
    psoup_model *model = fresh();
    psoup_sft_options o = options_of(&r);
    o.metrics = NULL; /* the limit is for its file too */
    psoup_status status = train(model, "P", &o);
    psoup_model_free(model);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &full), 0);
    ck_assert_int_eq(status, PSOUP_ERROR_IO);
    ck_assert_ptr_nonnull(strstr(error.message, "checkpoint-000000006.safetensors.zst: cannot write"));
    count_checkpoints(&r, after);
    ck_assert_str_eq(path, after);
    run_whole(&r, "P", &got, &m, true);
    ck_assert(n == m && memcmp(expected, got, n * sizeof(*got)) == 0);
    same_files(whole.metrics, r.metrics);
    free(got);
    free(expected);
    run_end(&whole);
    run_end(&r);
}
END_TEST

START_TEST(one_run_at_a_time_and_the_last_ones_are_kept) {
    run r;
    run_begin(&r);
    psoup_model *model = fresh();
    psoup_sft_options o = options_of(&r);
    OK(psoup__make_directories(r.checkpoints, &error));
    psoup__checkpoint other;
    psoup__team alone = {.world = 1};
    psoup__reporter nobody = {.team = &alone};
    OK(psoup__checkpoint_open(&other, context, &nobody, r.checkpoints, 1, 1, true, &error));
    REFUSED(train(model, "P", &o), PSOUP_ERROR_STATE, "another run keeps its checkpoints there");
    psoup__checkpoint_close(&other);
    char path[400];
    snprintf(path, sizeof(path), "%s/checkpoint-000000001.safetensors.zst.17-0.tmp", r.checkpoints);
    write_file(path, "half", 4);
    o.checkpoint_every = 1;
    o.checkpoint_keep = 2;
    OK(train(model, "P", &o));
    ck_assert_int_eq(count_checkpoints(&r, NULL), 2);
    o.checkpoint_keep = 0;
    REFUSED(train(model, "P", &o), PSOUP_ERROR_ARGUMENT, "checkpoint_keep is 0");
    o.checkpoint_keep = 1;
    o.checkpoint_dir = NULL;
    REFUSED(train(model, "P", &o), PSOUP_ERROR_ARGUMENT, "checkpoint_dir is NULL, which resume needs");
    psoup_model_free(model);
    run_end(&r);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("resuming");
    TCase *tcase = tcase_create("sft");
    tcase_set_timeout(tcase, 120);
    tcase_add_checked_fixture(tcase, set_up, tear_down);
    tcase_add_loop_test(tcase, sft_goes_on_with_the_same_bytes, 0, 2);
    tcase_add_loop_test(tcase, the_base_goes_on_with_the_same_bytes, 0, 2);
    tcase_add_test(tcase, killed_runs_go_on);
    tcase_add_test(tcase, the_step_of_the_best_weights_is_told);
    tcase_add_test(tcase, other_runs_are_refused);
    tcase_add_test(tcase, another_version_is_refused);
    tcase_add_test(tcase, damaged_checkpoints_are_refused);
    tcase_add_test(tcase, a_full_disk_keeps_the_checkpoint_before);
    tcase_add_test(tcase, one_run_at_a_time_and_the_last_ones_are_kept);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
