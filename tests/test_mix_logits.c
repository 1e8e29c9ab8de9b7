/* Logits that are mixed, beside rows of other methods; and a mix's strength. On the CPU and on a GPU. */
#include "mix_case.h"

/* All three kinds beside each other; row 0 has three policies, row 5 two and, its weights summing to 1.5, the base. */
static const float kinds_weights[ROWS][ADAPTERS] = {{0.5f, 0.3f, 0.2f}, {0.5f, 0.3f, 0.2f}, {0, 1, 0},
                                                    {0, 0, 0},          {-0.5f, 1.5f, 0},   {0.75f, 0, 0.75f}};
static const int32_t kinds[ROWS] = {PSOUP_MIX_LOGITS, PSOUP_MIX_DELTA,  PSOUP_MIX_LOGITS,
                                    PSOUP_MIX_LOGITS, PSOUP_MIX_LOGITS, PSOUP_MIX_LOGITS};

static void rows_of_all_kinds(sample_rows *rows, uint64_t seed) {
    fill_rows(rows, ROWS, seed);
    for (size_t i = 0; i < ROWS; i++)
        rows->row[i].mix = kinds_weights[i];
}

/* Σ w_i logits_i + (1 − Σ w_i) logits_base in float64, [row->n, VOCAB], from each policy's own. */
static double *mixture_of(psoup_model *model, const psoup_row *row) {
    double *out = calloc(row->n * VOCAB, sizeof *out), left = 1;
    for (int i = 0; i <= ADAPTERS; i++) {
        float one_hot[ADAPTERS] = {0};
        double weight = i < ADAPTERS ? (double)row->mix[i] : left;
        if (i < ADAPTERS)
            one_hot[i] = 1;
        psoup_row own = {row->tokens, row->n, one_hot};
        float *logits = logits_of(model, &own, NULL, 1);
        for (size_t k = 0; k < row->n * VOCAB; k++)
            out[k] += weight * (double)logits[k];
        left -= weight;
        free(logits);
    }
    return out;
}

static double log_sum_exp(const double *x) {
    double most = x[0], sum = 0;
    for (int i = 1; i < VOCAB; i++)
        most = fmax(most, x[i]);
    for (int i = 0; i < VOCAB; i++)
        sum += exp(x[i] - most);
    return most + log(sum);
}

START_TEST(logits_are_the_mixture) {
    psoup_context *context = on(devices[_i], 2);
    psoup_model *model = random_model(context);
    sample_rows rows;
    rows_of_all_kinds(&rows, 47);
    float *logits = logits_of(model, rows.row, kinds, ROWS), logprobs[256];
    float *delta = logits_of(model, rows.row, NULL, ROWS);
    OK(psoup_model_logprobs_mixed(model, rows.row, kinds, ROWS, logprobs, &error));
    for (size_t i = 0, at = 0, scored = 0; i < ROWS; at += rows.row[i++].n * VOCAB) {
        const psoup_row *row = &rows.row[i];
        double *want = mixture_of(model, row);
        const bool one = i == 2 || i == 3, same = memcmp(logits + at, delta + at, row->n * VOCAB * sizeof *logits) == 0;
        for (size_t k = 0; i != 1 && k < row->n * VOCAB; k++)
            ck_assert_msg(fabs((double)logits[at + k] - want[k]) < 1e-4, "row %zu, logit %zu: %g for %g", i, k,
                          (double)logits[at + k], want[k]);
        for (size_t t = 1; t < row->n; t++, scored++) {
            const double *x = want + (t - 1) * VOCAB, logprob = x[row->tokens[t]] - log_sum_exp(x);
            ck_assert_msg(i == 1 || fabs((double)logprobs[scored] - logprob) < 1e-4, "row %zu: %g for %g", i,
                          (double)logprobs[scored], logprob);
        }
        ck_assert_msg(_i || same == (one || i == 1), "row %zu beside delta", i); /* on the CPU one policy, or the base,
                                                                                   * to the bit */
        free(want);
    }
    free(logits), free(delta);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* What a row of mixed logits draws next by the session's rules, from logits that are scored. */
static int32_t draw_next(psoup_model *model, const psoup_row *row, const psoup_sampling *s, uint64_t sequence,
                         uint64_t position, float *logprob) {
    static int32_t method = PSOUP_MIX_LOGITS;
    float *logits = logits_of(model, row, &method, 1);
    int32_t banned[64], token = -1;
    psoup__draw draw = {.temperature = s->temperature, .top_k = s->top_k, .top_p = s->top_p, .seed = s->seed,
                        .sequence = sequence, .position = position, .banned = banned};
    for (size_t i = 0; s->no_repeat_ngram_size == 2 && i + 1 < row->n; i++) /* what has followed the last token */
        if (row->tokens[i] == row->tokens[row->n - 1])
            banned[draw.n_banned++] = row->tokens[i + 1];
    model->be->ops->sample(model->be, &token, logprob, logits + (row->n - 1) * VOCAB, &draw, 1, VOCAB);
    free(logits);
    return token;
}

/* Temperature, top-k, top-p and no-repeat n-grams act on the mixture, whose log-probs are reported. */
START_TEST(sampling_acts_on_the_mixture) {
    psoup_context *context = on("cpu", 2);
    psoup_model *model = random_model(context);
    sample_rows rows;
    rows_of_all_kinds(&rows, 48);
    psoup_sampling sampling = sampled(14);
    sampling.ignore_stop = 1;
    sampling.temperature = _i ? 0.8f : 0;
    sampling.top_k = _i ? 20 : 0;
    sampling.top_p = _i ? 0.9f : 1;
    sampling.no_repeat_ngram_size = 2;
    psoup_prompt prompt = prompt_of(&rows.row[0], 5);
    prompt.mix_method = PSOUP_MIX_LOGITS;
    psoup_generation *g = NULL;
    OK(psoup_generate(model, &prompt, 1, &sampling, NULL, NULL, NULL, &g, &error));
    const psoup_completion *c = psoup_generation_get(g, 0);
    int32_t text[64];
    memcpy(text, prompt.tokens, prompt.n * sizeof *text);
    ck_assert_uint_eq(c->n, 14);
    for (size_t t = 0; t < c->n; t++) {
        psoup_row row = {text, prompt.n + t, prompt.mix};
        float logprob;
        text[prompt.n + t] = draw_next(model, &row, &sampling, 5, t, &logprob);
        ck_assert_msg(text[prompt.n + t] == c->tokens[t], "token %zu", t);
        ck_assert_msg(logprob == c->logprobs[t], "log-prob %zu", t); /* to the bit */
    }
    psoup_generation_free(g);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* Rows of all kinds decode together: in few places and in steps of few prompt tokens each is as alone. */
START_TEST(all_kinds_decode_together) {
    psoup_context *context = on(devices[_i], 2);
    psoup_model *model = random_model(context);
    sample_rows rows;
    rows_of_all_kinds(&rows, 49);
    psoup_sampling sampling = sampled(9);
    psoup_prompt prompts[ROWS];
    psoup_generation *all[3] = {NULL};
    const int32_t places[] = {0, 3, 5}, prefill[] = {0, 2, 7};
    sampling.ignore_stop = 1;
    for (size_t i = 0; i < ROWS; i++) {
        prompts[i] = prompt_of(&rows.row[i], i);
        prompts[i].mix_method = kinds[i];
    }
    for (int way = 0; way < (_i == 0 ? 3 : 1); way++) {
        psoup_session_options options = PSOUP_SESSION_OPTIONS_INIT;
        options.max_sequences = places[way];
        options.prefill_rows = prefill[way];
        OK(psoup_generate(model, prompts, ROWS, &sampling, &options, NULL, NULL, &all[way], &error));
    }
    for (size_t i = 0; i < ROWS; i++) {
        const psoup_completion *c = psoup_generation_get(all[0], i);
        int32_t text[64];
        float scored[64];
        for (int way = 1; way < 3 && all[way]; way++)
            ck_assert_msg(equal(*c, *psoup_generation_get(all[way], i)), "sequence %zu in %d places", i,
                          (int)places[way]);
        memcpy(text, prompts[i].tokens, prompts[i].n * sizeof *text);
        memcpy(text + prompts[i].n, c->tokens, c->n * sizeof *text);
        psoup_row row = {text, prompts[i].n + c->n, prompts[i].mix};
        OK(psoup_model_logprobs_mixed(model, &row, &kinds[i], 1, scored, &error));
        double off = distance(scored + prompts[i].n - 1, c->logprobs, c->n);
        ck_assert_msg(c->n == 9 && (_i ? off < 1e-4 : off == 0), "sequence %zu: log-probs differ by %g", i, off);
    }
    for (int way = 0; way < 3; way++)
        psoup_generation_free(all[way]);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* A policy that diverged ends the rows that mix its logits, and no other. */
START_TEST(a_diverged_policy_ends_its_rows) {
    psoup_context *context = on("cpu", 2);
    psoup_model *model = random_model(context);
    sample_rows rows;
    rows_of_all_kinds(&rows, 50);
    psoup_sampling sampling = sampled(4);
    psoup_prompt prompts[2] = {prompt_of(&rows.row[0], 0), prompt_of(&rows.row[4], 4)};
    psoup_generation *well = NULL, *ill = NULL;
    sampling.ignore_stop = 1;
    prompts[0].mix_method = prompts[1].mix_method = PSOUP_MIX_LOGITS;
    OK(psoup_generate(model, prompts, 2, &sampling, NULL, NULL, NULL, &well, &error));
    fill_adapter(model, "c", 0, NAN);
    OK(psoup_generate(model, prompts, 2, &sampling, NULL, NULL, NULL, &ill, &error));
    ck_assert_int_eq(psoup_generation_get(ill, 0)->finish, PSOUP_FINISH_ERROR);
    ck_assert(equal(*psoup_generation_get(ill, 1), *psoup_generation_get(well, 1)));
    psoup_generation_free(well);
    psoup_generation_free(ill);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* A strength multiplies the weights, by each method. */
START_TEST(a_strength_multiplies_the_weights) {
    psoup_context *context = on("cpu", 2);
    psoup_model *model = random_model(context);
    sample_rows rows;
    rows_of_all_kinds(&rows, 51);
    psoup_sampling sampling = sampled(8);
    sampling.ignore_stop = 1;
    const float stronger[ADAPTERS] = {1.5f * 0.5f, 1.5f * 0.3f, 1.5f * 0.2f};
    psoup_prompt prompts[3] = {prompt_of(&rows.row[0], 0), prompt_of(&rows.row[0], 0), prompt_of(&rows.row[0], 0)};
    psoup_generation *g = NULL;
    for (int i = 0; i < 3; i++)
        prompts[i].mix_method = _i;
    prompts[0].mix_strength = 1.5f;
    prompts[1].mix = stronger;
    OK(psoup_generate(model, prompts, 3, &sampling, NULL, NULL, NULL, &g, &error));
    ck_assert(equal(*psoup_generation_get(g, 0), *psoup_generation_get(g, 1)));
    ck_assert(!equal(*psoup_generation_get(g, 0), *psoup_generation_get(g, 2)));
    psoup_generation_free(g);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

START_TEST(logits_that_cannot_be_mixed_are_refused) {
    psoup_context *context = on("cpu", 1);
    psoup_model *model = random_model(context);
    psoup_session *session = NULL;
    psoup_session_options options = PSOUP_SESSION_OPTIONS_INIT;
    psoup_sampling sampling = sampled(4);
    psoup_gradients *g = NULL;
    sample_rows rows;
    rows_of_all_kinds(&rows, 52);
    psoup_prompt prompt = prompt_of(&rows.row[0], 0);
    prompt.mix_method = PSOUP_MIX_LOGITS;
    prompt.sampling = &sampling;
    options.max_sequences = 2;
    OK(psoup_session_create(model, &options, &session, &error));
    REFUSED(psoup_session_submit(session, 7, &prompt, &error),
            "prompt 7 mixes the logits of 3 policies, each of which takes a place; the session has 2");
    psoup_session_free(session);
    options.max_sequences = 4;
    options.max_tokens = 32;
    options.cache_tokens = 64;
    OK(psoup_session_create(model, &options, &session, &error));
    REFUSED(psoup_session_submit(session, 7, &prompt, &error),
            "prompt 7 mixes the logits of 3 policies, whose 11 tokens each take 3 pages of the cache; it has 2");
    psoup_session_free(session);
    ck_assert_int_eq(psoup_model_gradients_mixed(model, rows.row, kinds, 1, NULL, PSOUP_GRADIENT_ADAPTERS, &g, &error),
                     PSOUP_ERROR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(error.message, "row 0: gradients of mixed logits are not made"));
    for (int i = ADAPTERS; i < 33; i++) {
        char name[32];
        psoup_adapter_options adapter = PSOUP_ADAPTER_OPTIONS_INIT;
        adapter.rank = 1;
        snprintf(name, sizeof name, "n%d", i);
        OK(psoup_model_add_adapter(model, name, &adapter, &error));
    }
    float many[33], out[64 * VOCAB];
    for (int i = 0; i < 33; i++)
        many[i] = i == 0 ? 0.5f : 0.5f / 32;
    rows.row[0].mix = many;
    REFUSED(psoup_model_logits_mixed(model, rows.row, kinds, 1, out, &error),
            "method logits: it mixes 33 policies; expected at most 32");
    many[0] = 0;
    for (int i = 1; i < 33; i++)
        many[i] = 1.0f / 32;
    OK(psoup_model_logits_mixed(model, rows.row, kinds, 1, out, &error));
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("mixed logits");
    TCase *tests = tcase_create("mixed logits");
    tcase_set_timeout(tests, 300);
    tcase_add_loop_test(tests, logits_are_the_mixture, 0, 2);
    tcase_add_loop_test(tests, sampling_acts_on_the_mixture, 0, 2);
    tcase_add_loop_test(tests, all_kinds_decode_together, 0, 2);
    tcase_add_test(tests, a_diverged_policy_ends_its_rows);
    tcase_add_loop_test(tests, a_strength_multiplies_the_weights, 0, 3);
    tcase_add_test(tests, logits_that_cannot_be_mixed_are_refused);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
