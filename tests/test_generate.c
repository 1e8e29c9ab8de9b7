/* Generation: the same bits in any company, and the rules of sampling and stopping. */
#include "generate_case.h"

typedef struct taken {
    int32_t tokens[6][64];
    size_t length[6], n;
} taken;

static int take_tokens(void *user, int64_t id, int32_t token, float logprob, psoup_finish finish) {
    taken *t = user;
    t->tokens[id][t->length[id]++] = token;
    t->n++;
    return 0;
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
        psoup_completion c = *psoup_generation_get(few, i);
        ck_assert_uint_eq(c.n, 20);
        ck_assert_int_eq(c.finish, PSOUP_FINISH_LENGTH);
        ck_assert_msg(equal(c, *psoup_generation_get(many, i)), "sequence %zu among others", i);
        ck_assert_msg(equal(c, *psoup_generation_get(alone, 0)), "sequence %zu alone", i);
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

/* A cache of two sequences' tokens: never more than two run, whatever the places, and nothing changes. */
START_TEST(a_small_cache_makes_them_wait) {
    psoup_context *context = make_context(2);
    psoup_model *model = load_plain(context, true);
    sample_rows rows;
    mixed_rows(&rows, 24);
    psoup_sampling sampling = sampled(12);
    psoup_generation *wide = generate(model, &rows, 0, 6, &sampling, 6, 0);
    psoup_session_options options = PSOUP_SESSION_OPTIONS_INIT;
    psoup_session *session = NULL;
    options.max_sequences = 6;
    options.max_tokens = 64;
    options.cache_tokens = 150;
    OK(psoup_session_create(model, &options, &session, &error));
    taken all = {.n = 0};
    for (size_t i = 0; i < 6; i++) {
        psoup_prompt prompt = prompt_of(&rows.row[i], i);
        prompt.sampling = &sampling;
        OK(psoup_session_submit(session, (int64_t)i, &prompt, &error));
    }
    size_t running = 6;
    for (int step = 0; running > 0 && step < 200; step++) {
        size_t before = all.n;
        OK(psoup_session_step(session, take_tokens, &all, &running, &error));
        ck_assert_uint_le(all.n - before, 2);
    }
    ck_assert_uint_eq(running, 0);
    for (size_t i = 0; i < 6; i++) {
        const psoup_completion *c = psoup_generation_get(wide, i);
        ck_assert_uint_eq(all.length[i], c->n);
        ck_assert(memcmp(all.tokens[i], c->tokens, c->n * sizeof *c->tokens) == 0);
    }
    options.cache_tokens = -1;
    psoup_session *none = NULL;
    ck_assert_int_eq(psoup_session_create(model, &options, &none, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "cache_tokens -1"));
    psoup_session_free(session);
    psoup_generation_free(wide);
    psoup_model_free(model);
    psoup_context_free(context);
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
        psoup_completion c = *psoup_generation_get(g, i);
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
    psoup_completion c = *psoup_generation_get(free_run, 0);
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
    psoup_completion s = *psoup_generation_get(stopped, 0);
    ck_assert_int_eq(s.finish, PSOUP_FINISH_STOP);
    ck_assert_uint_eq(s.n, at + 1); /* the stop token is kept */
    ck_assert(memcmp(s.tokens, c.tokens, s.n * sizeof *s.tokens) == 0);
    psoup_generation_free(stopped);
    /* So does any of the configuration's ends, where no stop tokens are given. */
    psoup_sampling plain = sampled(30);
    model->config.eos_token_id = -1;
    model->config.more_eos_token_ids[1] = c.tokens[at];
    stopped = generate(model, &rows, 0, 1, &plain, 1, 0);
    s = *psoup_generation_get(stopped, 0);
    ck_assert(s.finish == PSOUP_FINISH_STOP && s.n == at + 1);
    psoup_generation_free(stopped);
    /* Banned until min_new_tokens; the log-probability stays that of the untouched distribution. */
    sampling.min_new_tokens = (int32_t)at + 5;
    stopped = generate(model, &rows, 0, 1, &sampling, 1, 0);
    s = *psoup_generation_get(stopped, 0);
    ck_assert_uint_gt(s.n, at + 4);
    for (size_t i = 0; i + 1 < s.n && i < at + 5; i++)
        ck_assert_int_ne(s.tokens[i], c.tokens[at]);
    psoup_generation_free(stopped);
    psoup_generation_free(free_run);
    /* The likeliest tokens do not hang on what is banned: the second one may end a text of at least one token, and not one
     * of at least two. */
    psoup_sampling greedy = sampled(6);
    greedy.temperature = 0;
    greedy.ignore_stop = 1;
    free_run = generate(model, &rows, 0, 1, &greedy, 1, 0);
    c = *psoup_generation_get(free_run, 0);
    ck_assert_int_ne(c.tokens[0], c.tokens[1]);
    greedy.ignore_stop = 0;
    greedy.stop_tokens = c.tokens + 1;
    greedy.n_stop_tokens = 1;
    for (int least = 1; least <= 2; least++) {
        greedy.min_new_tokens = least;
        stopped = generate(model, &rows, 0, 1, &greedy, 1, 0);
        s = *psoup_generation_get(stopped, 0);
        ck_assert((s.n == 2) == (least == 1) && (s.tokens[1] == c.tokens[1]) == (least == 1));
        psoup_generation_free(stopped);
    }
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
        psoup_completion c = *psoup_generation_get(g, 0);
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
    psoup_completion first = *psoup_generation_get(g, 0);
    ck_assert(!equal(first, *psoup_generation_get(g, 1))); /* another sequence */
    ck_assert(!equal(first, *psoup_generation_get(g, 2))); /* another seed */
    ck_assert(equal(first, *psoup_generation_get(g, 3)));
    psoup_generation_free(g);
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

int main(void) {
    Suite *suite = suite_create("generate");
    TCase *tests = tcase_create("generate");
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, scores_keep_their_bits);
    tcase_add_test(tests, gradients_keep_their_bits);
    tcase_add_test(tests, generation_keeps_its_bits);
    tcase_add_test(tests, a_small_cache_makes_them_wait);
    tcase_add_test(tests, greedy_takes_the_best);
    tcase_add_test(tests, stopping);
    tcase_add_test(tests, no_repeated_ngrams);
    tcase_add_test(tests, seeds_and_sequences);
    tcase_add_test(tests, long_rows);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
