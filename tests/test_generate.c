/* Generation: the same bits in any company, the rules of sampling and stopping, and every allocation
 * failing in turn. */
#include "model_case.h"

static const float mixes[6][2] = {{0.5f, 0.5f}, {0, 0}, {1, 0}, {0, 1}, {0.2f, 0.8f}, {0, 0}};

static void mixed_rows(sample_rows *rows, uint64_t seed) {
    fill_rows(rows, 6, seed);
    for (size_t i = 0; i < 6; i++)
        rows->row[i].mix = mixes[i];
}

static psoup_prompt prompt_of(const psoup_row *row, uint64_t sequence) {
    return (psoup_prompt){
        .tokens = row->tokens, .n = row->n, .mix = row->mix, .sequence = sequence};
}

static psoup_generation *generate(psoup_model *model, const sample_rows *rows, size_t first,
                                  size_t n, const psoup_sampling *sampling, int32_t places,
                                  int32_t prefill) {
    psoup_prompt prompts[6];
    psoup_generation *g = NULL;
    psoup_session_options options = PSOUP_SESSION_OPTIONS_INIT;
    options.max_sequences = places;
    options.prefill_rows = prefill;
    for (size_t i = 0; i < n; i++)
        prompts[i] = prompt_of(&rows->row[first + i], first + i);
    OK(psoup_generate(model, prompts, n, sampling, &options, NULL, NULL, &g, &error));
    return g;
}

static bool equal(psoup_completion a, psoup_completion b) {
    return a.n == b.n && a.finish == b.finish &&
           memcmp(a.tokens, b.tokens, a.n * sizeof *a.tokens) == 0 &&
           memcmp(a.logprobs, b.logprobs, a.n * sizeof *a.logprobs) == 0;
}

static psoup_sampling sampled(int32_t max_new) {
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    sampling.max_new_tokens = max_new;
    sampling.seed = 9;
    return sampling;
}

/* ---- the same bits ---------------------------------------------------------------------------- */

START_TEST(scores_keep_their_bits) {
    psoup_context *one = make_context(1), *two = make_context(2);
    psoup_model *a = load_plain(one, true), *b = load_plain(two, true);
    sample_rows rows;
    mixed_rows(&rows, 21);
    float batch[128], threads[128], alone[128], turned[128];
    psoup_row backwards[6];
    for (int i = 0; i < 6; i++)
        backwards[i] = rows.row[5 - i];
    OK(psoup_model_logprobs(a, rows.row, 6, batch, &error));
    OK(psoup_model_logprobs(b, rows.row, 6, threads, &error));
    OK(psoup_model_logprobs(b, backwards, 6, turned, &error));
    size_t total = rows.total - 6, at = 0, back = total;
    ck_assert(memcmp(batch, threads, total * sizeof *batch) == 0);
    for (int i = 0; i < 6; i++) {
        size_t n = rows.row[i].n - 1;
        OK(psoup_model_logprobs(a, &rows.row[i], 1, alone, &error));
        back -= n;
        ck_assert_msg(memcmp(batch + at, alone, n * sizeof *batch) == 0, "row %d alone", i);
        ck_assert_msg(memcmp(batch + at, turned + back, n * sizeof *batch) == 0, "row %d turned", i);
        at += n;
    }
    psoup_model_free(a);
    psoup_model_free(b);
    psoup_context_free(one);
    psoup_context_free(two);
}
END_TEST

/* Each adapter's gradient is the same bits whoever else is in the batch: rows one-hot on another. */
START_TEST(gradients_keep_their_bits) {
    psoup_context *context = make_context(2);
    psoup_model *model = load_plain(context, true);
    sample_rows rows;
    static const float one_hot[6][2] = {{1, 0}, {0, 1}, {0, 1}, {1, 0}, {0, 1}, {1, 0}};
    psoup_row own[6];
    size_t n_own = 0, count = 0;
    fill_rows(&rows, 6, 22);
    for (int i = 0; i < 6; i++) {
        rows.row[i].mix = one_hot[i];
        if (one_hot[i][0] == 1)
            own[n_own++] = rows.row[i];
    }
    psoup_gradients *with = NULL, *without = NULL;
    OK(psoup_model_gradients(model, rows.row, 6, NULL, PSOUP_GRADIENT_ADAPTERS, &with, &error));
    OK(psoup_model_gradients(model, own, n_own, NULL, PSOUP_GRADIENT_ADAPTERS, &without, &error));
    const char *name = "all/model.layers.0.self_attn.q_proj.lora_A"; /* the first of the flat buffer */
    const float *a = psoup_gradients_get(with, name, &count);
    const float *b = psoup_gradients_get(without, name, &count);
    count = psoup__model_adapter(model, "all")->count;
    ck_assert(memcmp(a, b, count * sizeof *a) == 0);
    double sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += fabs((double)a[i]);
    ck_assert(sum > 1);
    psoup_gradients_free(with);
    psoup_gradients_free(without);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* Few places, prompts in pieces, one thread or two: each completion is what it is alone; and what the
 * cache says of a token is what the whole sequence says of it. */
START_TEST(generation_keeps_its_bits) {
    psoup_context *one = make_context(1), *two = make_context(2);
    psoup_model *a = load_plain(one, true), *b = load_plain(two, true);
    sample_rows rows;
    mixed_rows(&rows, 23);
    psoup_sampling sampling = sampled(20);
    sampling.ignore_stop = 1;
    psoup_generation *few = generate(a, &rows, 0, 6, &sampling, 2, 5);
    psoup_generation *many = generate(b, &rows, 0, 6, &sampling, 0, 0);
    for (size_t i = 0; i < 6; i++) {
        psoup_generation *alone = generate(a, &rows, i, 1, &sampling, 1, 0);
        psoup_completion c = psoup_generation_get(few, i);
        ck_assert_uint_eq(c.n, 20);
        ck_assert_int_eq(c.finish, PSOUP_FINISH_LENGTH);
        ck_assert_msg(equal(c, psoup_generation_get(many, i)), "sequence %zu among others", i);
        ck_assert_msg(equal(c, psoup_generation_get(alone, 0)), "sequence %zu alone", i);
        int32_t tokens[64];
        float logprobs[64];
        size_t n = rows.row[i].n;
        memcpy(tokens, rows.row[i].tokens, n * sizeof *tokens);
        memcpy(tokens + n, c.tokens, c.n * sizeof *tokens);
        psoup_row row = {.tokens = tokens, .n = n + c.n, .mix = rows.row[i].mix};
        OK(psoup_model_logprobs(a, &row, 1, logprobs, &error));
        ck_assert_msg(memcmp(logprobs + n - 1, c.logprobs, c.n * sizeof *logprobs) == 0,
                      "sequence %zu: cached and whole log-probabilities differ", i);
        psoup_generation_free(alone);
    }
    psoup_generation_free(few);
    psoup_generation_free(many);
    psoup_model_free(a);
    psoup_model_free(b);
    psoup_context_free(one);
    psoup_context_free(two);
}
END_TEST

/* ---- the rules -------------------------------------------------------------------------------- */

START_TEST(greedy_takes_the_best) {
    psoup_context *context = make_context(2);
    psoup_model *model = load_plain(context, true);
    sample_rows rows;
    mixed_rows(&rows, 24);
    psoup_sampling sampling = sampled(12);
    sampling.temperature = 0;
    sampling.ignore_stop = 1;
    psoup_generation *g = generate(model, &rows, 0, 6, &sampling, 3, 0);
    for (size_t i = 0; i < 6; i++) {
        psoup_completion c = psoup_generation_get(g, i);
        int32_t tokens[64];
        float logits[64 * VOCAB];
        size_t n = rows.row[i].n;
        memcpy(tokens, rows.row[i].tokens, n * sizeof *tokens);
        memcpy(tokens + n, c.tokens, c.n * sizeof *tokens);
        psoup_row row = {.tokens = tokens, .n = n + c.n, .mix = rows.row[i].mix};
        OK(psoup_model_logits(model, &row, 1, logits, &error));
        for (size_t t = 0; t < c.n; t++) {
            const float *at = logits + (n - 1 + t) * VOCAB;
            int best = 0;
            for (int v = 1; v < VOCAB; v++)
                best = at[v] > at[best] ? v : best;
            ck_assert_int_eq(c.tokens[t], best);
        }
    }
    psoup_generation_free(g);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

START_TEST(stopping) {
    psoup_context *context = make_context(1);
    psoup_model *model = load_plain(context, true);
    sample_rows rows;
    mixed_rows(&rows, 25);
    psoup_sampling sampling = sampled(30);
    sampling.ignore_stop = 1;
    psoup_generation *free_run = generate(model, &rows, 0, 1, &sampling, 1, 0);
    psoup_completion c = psoup_generation_get(free_run, 0);
    /* A token that comes third or later, and not before. */
    size_t at = 3;
    for (bool fresh = false; !fresh; at += !fresh) {
        fresh = true;
        for (size_t i = 0; i < at; i++)
            fresh = fresh && c.tokens[i] != c.tokens[at];
    }
    sampling.ignore_stop = 0;
    int32_t stop[2] = {79, c.tokens[at]};
    sampling.stop_tokens = stop + 1;
    sampling.n_stop_tokens = 1;
    psoup_generation *stopped = generate(model, &rows, 0, 1, &sampling, 1, 0);
    psoup_completion s = psoup_generation_get(stopped, 0);
    ck_assert_int_eq(s.finish, PSOUP_FINISH_STOP);
    ck_assert_uint_eq(s.n, at + 1); /* the stop token is kept */
    ck_assert(memcmp(s.tokens, c.tokens, s.n * sizeof *s.tokens) == 0);
    psoup_generation_free(stopped);
    /* Banned until min_new_tokens; the log-probability stays that of the untouched distribution. */
    sampling.min_new_tokens = (int32_t)at + 5;
    stopped = generate(model, &rows, 0, 1, &sampling, 1, 0);
    s = psoup_generation_get(stopped, 0);
    ck_assert_uint_gt(s.n, at + 4);
    for (size_t i = 0; i + 1 < s.n && i < at + 5; i++)
        ck_assert_int_ne(s.tokens[i], c.tokens[at]);
    psoup_generation_free(stopped);
    psoup_generation_free(free_run);
    /* The room of a place ends a sequence too. */
    psoup_session *session = NULL;
    psoup_session_options options = PSOUP_SESSION_OPTIONS_INIT;
    options.max_sequences = 1;
    options.max_tokens = 10;
    OK(psoup_session_create(model, &options, &session, &error));
    psoup_prompt prompt = prompt_of(&rows.row[0], 0); /* 7 tokens */
    sampling = sampled(30);
    sampling.ignore_stop = 1;
    prompt.sampling = &sampling;
    OK(psoup_session_submit(session, 4, &prompt, &error));
    size_t running = 1, steps = 0;
    for (; running; steps++)
        OK(psoup_session_step(session, NULL, NULL, &running, &error));
    ck_assert_uint_eq(steps, 3);
    prompt = prompt_of(&rows.row[1], 0); /* 19 tokens */
    ck_assert_int_eq(psoup_session_submit(session, 5, &prompt, &error), PSOUP_ERROR_ARGUMENT);
    psoup_session_free(session);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

static bool repeats(const int32_t *tokens, size_t n, size_t size) {
    for (size_t i = 0; i + size <= n; i++)
        for (size_t j = i + 1; j + size <= n; j++)
            if (memcmp(tokens + i, tokens + j, size * sizeof *tokens) == 0)
                return true;
    return false;
}

START_TEST(no_repeated_ngrams) {
    psoup_context *context = make_context(1);
    psoup_model *model = load_plain(context, false);
    sample_rows rows;
    fill_rows(&rows, 1, 26);
    psoup_sampling sampling = sampled(50);
    sampling.temperature = 0.05f; /* runs in circles when let */
    sampling.ignore_stop = 1;
    for (int32_t size = 0; size <= 3; size++) {
        int32_t tokens[64];
        sampling.no_repeat_ngram_size = size;
        psoup_generation *g = generate(model, &rows, 0, 1, &sampling, 1, 0);
        psoup_completion c = psoup_generation_get(g, 0);
        memcpy(tokens, rows.row[0].tokens, 7 * sizeof *tokens);
        memcpy(tokens + 7, c.tokens, c.n * sizeof *tokens);
        ck_assert_uint_eq(c.n, 50);
        ck_assert_int_eq(repeats(tokens, 57, size ? (size_t)size : 3), size == 0);
        psoup_generation_free(g);
    }
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

START_TEST(seeds_and_sequences) {
    psoup_context *context = make_context(1);
    psoup_model *model = load_plain(context, true);
    sample_rows rows;
    mixed_rows(&rows, 27);
    psoup_sampling sampling = sampled(15), other = sampled(15);
    other.seed = 10;
    psoup_prompt prompts[4];
    for (int i = 0; i < 4; i++)
        prompts[i] = prompt_of(&rows.row[0], (uint64_t)(i == 1));
    prompts[2].sampling = &other;
    psoup_generation *g = NULL;
    OK(psoup_generate(model, prompts, 4, &sampling, NULL, NULL, NULL, &g, &error));
    psoup_completion first = psoup_generation_get(g, 0);
    ck_assert(!equal(first, psoup_generation_get(g, 1))); /* another sequence */
    ck_assert(!equal(first, psoup_generation_get(g, 2))); /* another seed */
    ck_assert(equal(first, psoup_generation_get(g, 3)));
    psoup_generation_free(g);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

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
        psoup_completion c = psoup_generation_get(g, i);
        if (mixes[i][0] != 0)
            ck_assert(c.n == 0 && c.finish == PSOUP_FINISH_ERROR);
        else
            ck_assert(equal(c, psoup_generation_get(healthy, i)));
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
        psoup_completion c = psoup_generation_get(expected, i);
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

/* The table of positions grows to what is run, and what it held stays the same. */
START_TEST(long_rows) {
    psoup_context *context = make_context(2);
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    config.vocab_size = VOCAB;
    config.hidden_size = config.intermediate_size = 16;
    config.num_hidden_layers = 1;
    config.num_attention_heads = 2;
    config.max_position_embeddings = 1 << 28; /* a promise that costs nothing */
    psoup_model *model = NULL;
    OK(psoup_model_create(context, &config, 3, &model, &error));
    static int32_t tokens[1500];
    static float before[1500], after[1500];
    for (int i = 0; i < 1500; i++)
        tokens[i] = i * i % VOCAB;
    psoup_row row = {.tokens = tokens, .n = 300};
    OK(psoup_model_logprobs(model, &row, 1, before, &error));
    row.n = 1500;
    OK(psoup_model_logprobs(model, &row, 1, after, &error));
    ck_assert(memcmp(before, after, 299 * sizeof *before) == 0);
    for (int i = 0; i < 1499; i++)
        ck_assert(isfinite(after[i]) && after[i] < 0);
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
    Suite *suite = suite_create("generate");
    TCase *tests = tcase_create("generate");
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, scores_keep_their_bits);
    tcase_add_test(tests, gradients_keep_their_bits);
    tcase_add_test(tests, generation_keeps_its_bits);
    tcase_add_test(tests, greedy_takes_the_best);
    tcase_add_test(tests, stopping);
    tcase_add_test(tests, no_repeated_ngrams);
    tcase_add_test(tests, seeds_and_sequences);
    tcase_add_test(tests, a_diverged_adapter_ends_its_own_rows);
    tcase_add_test(tests, cancelled_and_resumed);
    tcase_add_test(tests, adapters_change_under_way);
    tcase_add_test(tests, long_rows);
    tcase_add_test(tests, refused_sampling);
    tcase_add_test(tests, allocations_fail);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
