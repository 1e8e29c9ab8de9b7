/* Generation in trouble: diverged adapters, stops, bad requests, and every allocation failing in turn. */
#include "generate_case.h"

/* ---- trouble ---------------------------------------------------------------------------------- */

START_TEST(a_diverged_adapter_ends_its_own_rows) {
    psoup_context *context = make_context(2);
    psoup_model *model = load_plain(context, true);
    sample_rows rows;
    mixed_rows(&rows, 28);
    psoup_sampling sampling = sampled(10);
    psoup_generation *healthy = generate(model, &rows, 0, 6, &sampling, 4, 0);
    psoup__adapter *all = psoup__model_adapter(model, "all");
    for (size_t i = 0; i < all->count; i++)
        all->data[i] = NAN;
    psoup_generation *g = generate(model, &rows, 0, 6, &sampling, 4, 0);
    for (size_t i = 0; i < 6; i++) {
        psoup_completion c = *psoup_generation_get(g, i);
        if (mixes[i][0] != 0)
            ck_assert(c.n == 0 && c.finish == PSOUP_FINISH_ERROR);
        else
            ck_assert(equal(c, *psoup_generation_get(healthy, i)));
    }
    psoup_generation_free(g);
    psoup_generation_free(healthy);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

typedef struct record {
    int32_t tokens[6][32];
    size_t n[6];
    int until_stop;
} record;

static int record_token(void *user, int64_t id, int32_t token, float logprob,
                        psoup_finish finish) {
    record *r = user;
    r->tokens[id][r->n[id]++] = token;
    return --r->until_stop == 0;
}

/* Stopped in the middle of a step, a session goes on as if nothing had been. */
START_TEST(cancelled_and_resumed) {
    psoup_context *context = make_context(1);
    psoup_model *model = load_plain(context, true);
    sample_rows rows;
    mixed_rows(&rows, 29);
    psoup_sampling sampling = sampled(12);
    sampling.ignore_stop = 1;
    psoup_generation *expected = generate(model, &rows, 0, 6, &sampling, 0, 0);
    psoup_session *session = NULL;
    psoup_session_options options = PSOUP_SESSION_OPTIONS_INIT;
    options.max_sequences = 4;
    OK(psoup_session_create(model, &options, &session, &error));
    for (size_t i = 0; i < 6; i++) {
        psoup_prompt prompt = prompt_of(&rows.row[i], i);
        prompt.sampling = &sampling;
        OK(psoup_session_submit(session, (int64_t)i, &prompt, &error));
    }
    record r = {.until_stop = 3};
    int stops = 0;
    for (size_t running = 1; running;) {
        psoup_status status = psoup_session_step(session, record_token, &r, &running, &error);
        ck_assert(status == PSOUP_OK || status == PSOUP_ERROR_CANCELLED);
        if (status == PSOUP_ERROR_CANCELLED) {
            stops++;
            r.until_stop = 3 + stops % 5;
        }
    }
    ck_assert_int_gt(stops, 3);
    for (size_t i = 0; i < 6; i++) {
        psoup_completion c = *psoup_generation_get(expected, i);
        ck_assert_uint_eq(r.n[i], c.n);
        ck_assert(memcmp(r.tokens[i], c.tokens, c.n * sizeof *c.tokens) == 0);
    }
    psoup_session_free(session);
    psoup_generation_free(expected);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* Adapters that change under a running session would change the meaning of its mixes. */
START_TEST(adapters_change_under_way) {
    psoup_context *context = make_context(1);
    psoup_model *model = load_plain(context, true);
    psoup_session *session = NULL;
    sample_rows rows;
    size_t running = 0;
    mixed_rows(&rows, 30);
    psoup_prompt prompt = prompt_of(&rows.row[0], 0);
    OK(psoup_session_create(model, NULL, &session, &error));
    OK(psoup_session_submit(session, 1, &prompt, &error));
    OK(psoup_session_step(session, NULL, NULL, &running, &error));
    OK(psoup_model_remove_adapter(model, "qv", &error));
    OK(psoup_model_load_adapter(model, "qv", GOLDEN "adapter_qv", &error));
    ck_assert_int_eq(psoup_session_step(session, NULL, NULL, &running, &error), PSOUP_ERROR_STATE);
    ck_assert_uint_eq(running, 1);
    psoup_session_free(session);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

START_TEST(refused_sampling) {
    psoup_context *context = make_context(1);
    psoup_model *model = load_plain(context, false);
    int32_t tokens[2] = {1, 99}, stop = 80;
    psoup_sampling bad[6] = {sampled(0), sampled(5), sampled(5), sampled(5), sampled(5), sampled(5)};
    bad[1].temperature = -1;
    bad[2].top_p = NAN;
    bad[3].top_k = -1;
    bad[4].stop_tokens = &stop;
    bad[4].n_stop_tokens = 1;
    psoup_generation *g = NULL;
    for (int i = 0; i < 6; i++) {
        psoup_prompt prompt = {.tokens = tokens, .n = i == 5 ? 2 : 1};
        ck_assert_int_eq(psoup_generate(model, &prompt, 1, &bad[i], NULL, NULL, NULL, &g, &error),
                         PSOUP_ERROR_ARGUMENT);
        ck_assert_ptr_null(g);
        ck_assert_uint_gt(strlen(error.message), 10);
    }
    psoup_session *session = NULL;
    const psoup_prompt prompt = {.tokens = tokens, .n = 1};
    size_t running;
    OK(psoup_session_create(model, NULL, &session, &error));
    const psoup_status refused[] = {
        psoup_generate(NULL, &prompt, 1, NULL, NULL, NULL, NULL, &g, &error),
        psoup_generate(model, NULL, 1, NULL, NULL, NULL, NULL, &g, &error),
        psoup_generate(model, &prompt, 1, NULL, NULL, NULL, NULL, NULL, &error),
        psoup_session_create(NULL, NULL, &session, &error),
        psoup_session_submit(session, 0, NULL, &error),
        psoup_session_submit(NULL, 0, &prompt, &error),
        psoup_session_step(NULL, NULL, NULL, &running, &error)};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        ck_assert_int_eq(refused[i], PSOUP_ERROR_ARGUMENT);
    psoup_session_free(session);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* ---- every allocation fails in turn ------------------------------------------------------------ */

typedef struct failing {
    long countdown, alive;
} failing;

static void *failing_alloc(void *user, size_t bytes, size_t alignment) {
    failing *f = user;
    if (f->countdown-- == 0)
        return NULL;
    f->alive++;
    return aligned_alloc(alignment < 64 ? 64 : alignment, (bytes + 63) / 64 * 64);
}

static void failing_free(void *user, void *memory) {
    failing *f = user;
    if (memory)
        f->alive--;
    free(memory);
}

static psoup_status whole_path(psoup_context *context, const char *directory) {
    psoup_model *model = NULL;
    psoup_generation *g = NULL;
    psoup_gradients *gradients = NULL;
    psoup_status status;
    sample_rows rows;
    psoup_prompt prompts[3];
    float out[64];
    fill_rows(&rows, 3, 1);
    for (int i = 0; i < 3; i++) {
        rows.row[i].mix = mixes[i];
        prompts[i] = prompt_of(&rows.row[i], 0);
    }
    psoup_sampling sampling = sampled(3);
    psoup_session_options session = PSOUP_SESSION_OPTIONS_INIT;
    session.max_sequences = 2;
    psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
    PSOUP__TRY(psoup_model_load(context, GOLDEN "plain", &model, &error));
    PSOUP__TRY(psoup_model_load_adapter(model, "all", GOLDEN "adapter_all", &error));
    PSOUP__TRY(psoup_model_add_adapter(model, "new", &options, &error));
    PSOUP__TRY(psoup_generate(model, prompts, 3, &sampling, &session, NULL, NULL, &g, &error));
    PSOUP__TRY(psoup_model_logprobs(model, rows.row, 3, out, &error));
    PSOUP__TRY(psoup_model_gradients(model, rows.row, 3, NULL, 7, &gradients, &error));
    PSOUP__TRY(psoup_model_save_adapter(model, "all", directory, NULL, &error));
    PSOUP__TRY(psoup__model_train_base(model, true, &error));
    PSOUP__TRY(psoup__model_train_base(model, false, &error));
    PSOUP__TRY(psoup_model_save(model, directory, NULL, &error));
fail:
    psoup_gradients_free(gradients);
    psoup_generation_free(g);
    psoup_model_free(model);
    return status;
}

START_TEST(allocations_fail) {
    char directory[64];
    strcpy(directory, temporary_directory());
    failing f = {.countdown = -1};
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.threads = 1;
    options.allocator = (psoup_allocator){&f, failing_alloc, failing_free};
    long failures = 0;
    for (bool whole = false; !whole; failures++) {
        psoup_context *context = NULL;
        f.countdown = -1;
        OK(psoup_context_create(&options, &context, &error));
        long before = f.alive;
        f.countdown = failures;
        psoup_status status = whole_path(context, directory);
        whole = f.countdown >= 0;
        ck_assert_msg(whole ? status == PSOUP_OK : status == PSOUP_ERROR_MEMORY,
                      "allocation %ld: status %d, %s", failures, (int)status, error.message);
        ck_assert_msg(f.alive == before, "allocation %ld: %ld blocks leaked", failures,
                      f.alive - before);
        psoup_context_free(context);
    }
    ck_assert_int_gt(failures, 100);
    ck_assert_int_eq(f.alive, 0);
    remove_directory(directory);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("generation in trouble");
    TCase *tests = tcase_create("generation in trouble");
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, a_diverged_adapter_ends_its_own_rows);
    tcase_add_test(tests, cancelled_and_resumed);
    tcase_add_test(tests, adapters_change_under_way);
    tcase_add_test(tests, refused_sampling);
    tcase_add_test(tests, allocations_fail);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
