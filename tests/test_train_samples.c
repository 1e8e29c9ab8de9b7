/* What is seen of a run while it goes: samples of the policies, times, and steps taken one by one. */
#include "ppo_case.h"
#include "resume_case.h"

enum { STEPS = 5, COUNT = 3 };

/* What a run told of: reports to a stop, samples, and whether the times made sense. */
typedef struct told {
    run files;
    char samples[300];
    int calls, stop_after; /* of samples; 0: none */
    int64_t steps[64];
    char policies[64][8];
    float first_score;
    int timed, validations;
} told;

static void told_begin(told *t) {
    *t = (told){.calls = 0};
    run_begin(&t->files);
    snprintf(t->samples, sizeof(t->samples), "%s/samples.jsonl", t->files.directory);
}

static int hear_step(void *user, const psoup_step *step) {
    told *t = user;
    t->validations += strcmp(step->phase, "validation") == 0;
    if (strcmp(step->phase, "train") == 0) {
        double parts = 0.0, all = 0.0;
        ck_assert_uint_eq(step->n_times, 6);
        for (size_t i = 0; i < step->n_times; i++) {
            ck_assert(step->times[i] >= 0.0);
            if (strcmp(step->time_names[i], "seconds") == 0)
                all = step->times[i];
            else if (strcmp(step->time_names[i], "tokens_per_second") == 0)
                t->timed += step->times[i] > 0.0;
            else
                parts += step->times[i];
        }
        ck_assert(parts > 0.0 && parts <= all + 1e-3);
    } else {
        ck_assert_uint_eq(step->n_times, 0);
    }
    return watch_run(&t->files, step);
}

static int hear_samples(void *user, int64_t step, const psoup_rollout *rollouts, const float *scores,
                        size_t n) {
    told *t = user;
    float expected[COUNT];
    ck_assert_uint_eq(n, COUNT);
    for (size_t i = 0; i < n; i++) {
        ck_assert_str_eq(rollouts[i].policy, rollouts[0].policy);
        ck_assert_ptr_eq(rollouts[i].prompt, &validation[i]);
        ck_assert_uint_ge(rollouts[i].n, 1);
    }
    pay(&wanted[rollouts[0].policy[1] - '0'], rollouts, n, expected);
    ck_assert_mem_eq(scores, expected, sizeof(expected));
    ck_assert_int_lt(t->calls, 64);
    snprintf(t->policies[t->calls], sizeof(t->policies[0]), "%s", rollouts[0].policy);
    t->steps[t->calls++] = step;
    return t->stop_after && t->calls == t->stop_after;
}

static psoup_ppo_options told_options(told *t) {
    psoup_ppo_options o = plain();
    o.steps = STEPS;
    o.mini_batch_size = 4;
    o.ppo_epochs = 2;
    o.lora_dropout = 0.1f;
    o.validate_every = 2;
    o.samples_every = 2;
    o.samples_count = COUNT;
    o.samples = t->samples;
    o.on_samples = hear_samples;
    o.on_step = hear_step;
    o.user = t;
    o.metrics = t->files.metrics;
    return o;
}

/* Runs two policies, or one of them, on a fresh model; weights[p] receives those of policy p. */
static psoup_status run_told(const psoup_ppo_options *o, int first, int n, bool steps, float *out[2]) {
    const psoup_ppo_policy policies[2] = {policy(0), policy(1)};
    psoup_model *model = fresh(2);
    psoup_ppo *ppo;
    int64_t left = 1;
    size_t count;
    psoup_status status = psoup_ppo_create(model, policies + first, (size_t)n, o, &ppo, &error);
    while (status == PSOUP_OK && steps && left)
        status = psoup_ppo_step(ppo, &left, &error);
    if (status == PSOUP_OK)
        status = psoup_ppo_run(ppo, &error);
    for (int p = 0; status == PSOUP_OK && p < 2; p++)
        out[p] = weights(model, names[p], &count);
    psoup_ppo_free(ppo);
    psoup_model_free(model);
    return status;
}

static bool same(float *a, float *b) {
    psoup_model *model = fresh(1);
    size_t n;
    float *start = weights(model, names[0], &n);
    bool equal = memcmp(a, b, n * sizeof(float)) == 0;
    ck_assert(memcmp(a, start, n * sizeof(float)) != 0); /* something was learned */
    psoup_model_free(model);
    free(start);
    return equal;
}

static void free_both(float *both[2]) {
    free(both[0]);
    free(both[1]);
}

START_TEST(samples_change_no_bit) {
    told with, without;
    float *a[2], *b[2];
    told_begin(&with);
    told_begin(&without);
    psoup_ppo_options o = told_options(&with);
    OK(run_told(&o, 0, 2, false, a));
    o = told_options(&without);
    o.samples_every = 0;
    o.samples = NULL;
    o.on_samples = NULL;
    OK(run_told(&o, 0, 2, false, b));
    ck_assert(same(a[0], b[0]) && same(a[1], b[1]));
    same_files(with.files.metrics, without.files.metrics);
    static const int64_t when[] = {0, 2, 4, 5}; /* before the first step, every second, after the last */
    ck_assert_int_eq(with.calls, 8);
    for (int i = 0; i < 8; i++) {
        ck_assert_int_eq(with.steps[i], when[i / 2]);
        ck_assert_str_eq(with.policies[i], names[i % 2]);
    }
    ck_assert_int_eq(without.calls, 0);
    ck_assert_int_eq(with.timed, 2 * STEPS);
    free_both(a);
    free_both(b);
    run_end(&with.files);
    run_end(&without.files);
}
END_TEST

/* A policy says what it says alone; and with a callback alone, or a file alone. */
START_TEST(samples_are_the_policy_s_own) {
    told both, one;
    float *a[2], *b[2];
    psoup_jsonl_reader *x, *y;
    psoup_json *row;
    int compared = 0;
    told_begin(&both);
    told_begin(&one);
    psoup_ppo_options o = told_options(&both);
    o.on_samples = NULL;
    OK(run_told(&o, 0, 2, false, a));
    o = told_options(&one);
    OK(run_told(&o, 1, 1, false, b));
    OK(psoup_jsonl_open(context, both.samples, &x, &error));
    OK(psoup_jsonl_open(context, one.samples, &y, &error));
    for (;;) {
        OK(psoup_jsonl_next(x, &row, &error));
        if (!row)
            break;
        if (strcmp(psoup_json_string(psoup_json_get(row, "policy"), ""), "P1") != 0) {
            psoup_json_free(row);
            continue;
        }
        psoup_json *other;
        char *p = psoup_json_text(row, 0);
        OK(psoup_jsonl_next(y, &other, &error));
        char *q = psoup_json_text(other, 0);
        ck_assert_str_eq(p, q);
        ck_assert_uint_ge(psoup_json_size(psoup_json_get(row, "response")), 1); /* ids: no tokenizer */
        compared++;
        psoup_text_free(p);
        psoup_text_free(q);
        psoup_json_free(row);
        psoup_json_free(other);
    }
    ck_assert_int_eq(compared, 4 * COUNT);
    psoup_jsonl_reader_free(x);
    psoup_jsonl_reader_free(y);
    free_both(a);
    free_both(b);
    run_end(&both.files);
    run_end(&one.files);
}
END_TEST

/* Stopped at every report and at every sample, and gone on: the same weights, metrics and samples. */
START_TEST(samples_go_on_with_the_same_bytes) {
    told whole, t;
    float *expected[2], *got[2];
    int stops = 0;
    told_begin(&whole);
    told_begin(&t);
    psoup_ppo_options o = told_options(&whole);
    OK(run_told(&o, 0, 2, false, expected));
    for (psoup_status status = PSOUP_ERROR_CANCELLED; status != PSOUP_OK; stops++) {
        o = told_options(&t);
        o.checkpoint_dir = t.files.checkpoints;
        o.checkpoint_every = 3;
        o.resume = 1;
        t.calls = 0;
        t.stop_after = stops % 3 ? 1 : 0;
        t.files.stop_after = stops % 3 == 1 ? 0 : 1;
        status = run_told(&o, 0, 2, _i, got);
        ck_assert_msg(status == PSOUP_OK || status == PSOUP_ERROR_CANCELLED, "%s", error.message);
        ck_assert_int_lt(stops, 30);
    }
    ck_assert_int_ge(stops, 8);
    ck_assert(same(expected[0], got[0]) && same(expected[1], got[1]));
    same_files(whole.files.metrics, t.files.metrics);
    same_files(whole.samples, t.samples);
    /* A killed run's samples since its last checkpoint are cut off, and a shortened file is refused. */
    FILE *f = fopen(t.samples, "a");
    ck_assert(f && fputs("{\"step\": 5, \"pol", f) >= 0 && fclose(f) == 0);
    free_both(got);
    OK(run_told(&o, 0, 2, false, got));
    same_files(whole.samples, t.samples);
    ck_assert_int_eq(truncate(t.samples, 0), 0);
    REFUSED(run_told(&o, 0, 2, false, got), PSOUP_ERROR_STATE, "samples.jsonl: has 0 bytes; it had");
    free_both(expected);
    free_both(got);
    run_end(&whole.files);
    run_end(&t.files);
}
END_TEST

/* Fails at one call of its own choosing, in training or where samples are scored. */
static int failing_calls;
static int pay_but_once(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    return --failing_calls == 0 || pay(user, rollouts, n, scores);
}

/* A reward that fails while samples are scored takes none of them away: the run that goes on has them all. */
START_TEST(samples_that_were_not_scored_are_taken_again) {
    told whole, t;
    told_begin(&whole);
    told_begin(&t);
    for (int k = 0; k < 2; k++) {
        psoup_ppo_policy p = policy(0);
        psoup_model *model = fresh(1);
        psoup_ppo *ppo;
        psoup_ppo_options o = told_options(k ? &t : &whole);
        p.reward_fn = pay_but_once;
        o.validate_every = 0;
        o.steps = 3;
        o.checkpoint_dir = k ? t.files.checkpoints : NULL;
        o.resume = k;
        failing_calls = k ? 4 : 0; /* samples, two steps, and samples */
        OK(psoup_ppo_create(model, &p, 1, &o, &ppo, &error));
        if (k) {
            REFUSED(psoup_ppo_run(ppo, &error), PSOUP_ERROR_CANCELLED, "its reward callback failed");
            psoup_ppo_free(ppo);
            psoup_model_free(model);
            model = fresh(1);
            OK(psoup_ppo_create(model, &p, 1, &o, &ppo, &error));
        }
        OK(psoup_ppo_run(ppo, &error));
        psoup_ppo_free(ppo);
        psoup_model_free(model);
    }
    ck_assert_int_eq(whole.calls, 3);
    same_files(whole.samples, t.samples);
    run_end(&whole.files);
    run_end(&t.files);
}
END_TEST

/* Steps taken one by one validate, keep the best weights and leave what psoup_ppo_run leaves. */
START_TEST(single_steps_are_the_run) {
    told whole, t;
    float *a[2], *b[2];
    told_begin(&whole);
    told_begin(&t);
    psoup_ppo_options o = told_options(&whole);
    OK(run_told(&o, 0, 2, false, a));
    o = told_options(&t);
    OK(run_told(&o, 0, 2, true, b));
    ck_assert(same(a[0], b[0]) && same(a[1], b[1]));
    ck_assert_int_eq(t.validations, whole.validations);
    ck_assert_int_eq(t.validations, 2 * 3); /* after steps 2, 4 and 5 */
    same_files(whole.files.metrics, t.files.metrics);
    same_files(whole.samples, t.samples);
    free_both(a);
    free_both(b);
    run_end(&whole.files);
    run_end(&t.files);
}
END_TEST

START_TEST(samples_need_a_place) {
    const psoup_ppo_policy one = policy(0);
    psoup_model *model = fresh(1);
    psoup_ppo *ppo;
    psoup_ppo_options o = plain();
    o.samples_every = 1;
    REFUSED(psoup_ppo_create(model, &one, 1, &o, &ppo, &error), PSOUP_ERROR_ARGUMENT,
            "samples_every is 1: expected samples, a file, or on_samples with it");
    o.samples_every = 0;
    o.samples = "s.jsonl";
    REFUSED(psoup_ppo_create(model, &one, 1, &o, &ppo, &error), PSOUP_ERROR_ARGUMENT,
            "samples_every is 0: expected more than 0");
    o.samples_every = 1;
    o.samples_count = 0;
    REFUSED(psoup_ppo_create(model, &one, 1, &o, &ppo, &error), PSOUP_ERROR_ARGUMENT, "samples_count is 0");
    o.samples_count = 1;
    o.samples = "/nowhere/s.jsonl";
    REFUSED(psoup_ppo_create(model, &one, 1, &o, &ppo, &error), PSOUP_ERROR_IO, "/nowhere/s.jsonl");
    psoup_model_free(model);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("a run that is seen");
    TCase *tcase = tcase_create("all");
    tcase_set_timeout(tcase, 120);
    tcase_add_checked_fixture(tcase, set_up, tear_down);
    tcase_add_test(tcase, samples_change_no_bit);
    tcase_add_test(tcase, samples_are_the_policy_s_own);
    tcase_add_loop_test(tcase, samples_go_on_with_the_same_bytes, 0, 2);
    tcase_add_test(tcase, samples_that_were_not_scored_are_taken_again);
    tcase_add_test(tcase, single_steps_are_the_run);
    tcase_add_test(tcase, samples_need_a_place);
    suite_add_tcase(suite, tcase);
    return run_suite(suite);
}
