/* Sampling: greedy choice, transformers' filters, the distribution of draws, bans, NaN, and the same
 * token wherever the row stands. */
#include "cpu_case.h"

static int32_t draw_one(const machine *m, const float *logits, int32_t vocab, const psoup__draw *draw,
                        float *logprob) {
    int32_t token = -7;
    float lp = NAN;
    m->ops->sample(m->be, &token, &lp, logits, draw, 1, vocab);
    if (logprob)
        *logprob = lp;
    return token;
}

static double lse_of(const float *logits, int32_t vocab) {
    double max = -INFINITY, sum = 0;
    for (int32_t i = 0; i < vocab; i++)
        max = fmax(max, logits[i]);
    for (int32_t i = 0; i < vocab; i++)
        sum += exp(logits[i] - max);
    return max + log(sum);
}

START_TEST(greedy_takes_lowest_id) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    float logits[7] = {1, -2, 5, 5, 0, 5, -INFINITY}, logprob;
    const int32_t banned[1] = {2};
    psoup__draw draw = {.top_p = 1};
    ck_assert_int_eq(draw_one(&m, logits, 7, &draw, &logprob), 2);
    ck_assert_double_eq_tol(logprob, 5 - lse_of(logits, 7), 1e-6);
    draw.banned = banned;
    draw.n_banned = 1;
    ck_assert_int_eq(draw_one(&m, logits, 7, &draw, &logprob), 3);
    ck_assert_double_eq_tol(logprob, 5 - lse_of(logits, 7), 1e-6); /* the ban is no part of it */
    logits[4] = NAN;
    ck_assert_int_eq(draw_one(&m, logits, 7, &draw, &logprob), -1);
    draw.temperature = 1;
    ck_assert_int_eq(draw_one(&m, logits, 7, &draw, &logprob), -1);
    machine_close(&m);
}
END_TEST

/* One token in plain float64, sorted: the rule of ops.h read aloud. */
typedef struct entry {
    double p;
    float logit;
    int32_t id;
} entry;

static int descending(const void *a, const void *b) {
    const entry *x = a, *y = b;
    return x->logit != y->logit ? (x->logit < y->logit ? 1 : -1) : x->id - y->id;
}

/* Returns the token, or −1 where the target lies too near an edge to be sure of it. */
static int32_t sorted_draw(const float *logits, int32_t vocab, const psoup__draw *draw) {
    entry *list = malloc((size_t)vocab * sizeof *list);
    for (int32_t i = 0; i < vocab; i++)
        list[i] = (entry){0, logits[i], i};
    qsort(list, (size_t)vocab, sizeof *list, descending);
    int32_t n = vocab, token = -1;
    if (draw->top_k > 0 && draw->top_k < vocab)
        for (n = draw->top_k; n < vocab && list[n].logit == list[draw->top_k - 1].logit;)
            n++;
    double sum = 0, before = 0;
    for (int32_t i = 0; i < n; i++)
        sum += list[i].p = exp(((double)list[i].logit - list[0].logit) / draw->temperature);
    int unsure = 0;
    if (draw->top_p < 1) {
        int32_t kept = 0;
        for (; kept < n && (kept == 0 || before < draw->top_p * sum); kept++)
            before += list[kept].p;
        const double target = draw->top_p * sum;
        unsure = (kept > 1 && fabs(before - list[kept - 1].p - target) < 1e-5 * sum) ||
                 (kept < n && fabs(before - target) < 1e-5 * sum);
        n = kept;
        sum = before;
    }
    const double u =
        psoup__uniform(psoup__philox_word(draw->seed, draw->sequence, draw->position)) * sum;
    before = 0;
    for (int32_t i = 0; i < n && token < 0; i++) {
        before += list[i].p;
        if (before > u)
            token = list[i].id;
        unsure |= fabs(before - u) < 1e-5 * sum;
    }
    free(list);
    return unsure ? -1 : token;
}

START_TEST(agrees_with_sorting) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    const int32_t vocabs[] = {1, 2, 37, 64, 127, 129, 5000};
    const float temperatures[] = {1, 0.7f, 3, 0.05f}, top_ps[] = {1, 0.9f, 0.3f, 0.01f, 0};
    int compared = 0, unsure = 0;
    for (size_t c = 0; c < sizeof vocabs / sizeof *vocabs; c++) {
        const int32_t vocab = vocabs[c];
        float *logits = normal((size_t)vocab, 11);
        for (int32_t i = 0; i < vocab; i++) /* many ties, zeros of both signs */
            logits[i] = i % 3 ? 2 * logits[i] : rintf(logits[i]);
        for (int t = 0; t < 4; t++)
            for (int p = 0; p < 5; p++)
                for (int32_t k = 0; k <= 40; k = k ? k * 3 : 1)
                    for (uint64_t i = 0; i < 5; i++) {
                        const psoup__draw draw = {.temperature = temperatures[t], .top_k = k,
                                                  .top_p = top_ps[p], .seed = 5, .sequence = i,
                                                  .position = (uint64_t)(t * 5 + p)};
                        float logprob;
                        const int32_t token = draw_one(&m, logits, vocab, &draw, &logprob);
                        const int32_t want = sorted_draw(logits, vocab, &draw);
                        ck_assert_int_ge(token, 0);
                        ck_assert_double_eq_tol(logprob, logits[token] - lse_of(logits, vocab), 1e-5);
                        compared++;
                        if (want < 0)
                            unsure++;
                        else
                            ck_assert_msg(token == want,
                                          "vocab %d, temperature %g, top_k %d, top_p %g: %d, want %d",
                                          vocab, (double)temperatures[t], k, (double)top_ps[p], token,
                                          want);
                    }
        free(logits);
    }
    ck_assert_int_lt(unsure * 20, compared);
    machine_close(&m);
}
END_TEST

/* χ² of 50 000 draws over 12 tokens, two of them banned: 9 degrees of freedom, 99.99 % below 33.7. */
START_TEST(draws_follow_the_distribution) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    enum { VOCAB = 12, DRAWS = 50000, BATCH = 500 };
    const int32_t banned[2] = {4, 9};
    float *row = normal(VOCAB, 3), *logits = poisoned(BATCH * VOCAB), *logprob = poisoned(BATCH);
    int32_t token[BATCH], counts[VOCAB] = {0};
    psoup__draw draws[BATCH];
    for (int i = 0; i < BATCH; i++)
        memcpy(logits + i * VOCAB, row, VOCAB * sizeof *row);
    for (int start = 0; start < DRAWS; start += BATCH) {
        for (int i = 0; i < BATCH; i++)
            draws[i] = (psoup__draw){.temperature = 1.5f, .top_p = 1, .seed = 42,
                                     .position = (uint64_t)(start + i), .banned = banned,
                                     .n_banned = 2};
        m.ops->sample(m.be, token, logprob, logits, draws, BATCH, VOCAB);
        for (int i = 0; i < BATCH; i++)
            counts[token[i]]++;
    }
    double sum = 0, chi2 = 0;
    for (int i = 0; i < VOCAB; i++)
        sum += i == 4 || i == 9 ? 0 : exp(row[i] / 1.5);
    for (int i = 0; i < VOCAB; i++) {
        const double want = i == 4 || i == 9 ? 0 : DRAWS * exp(row[i] / 1.5) / sum;
        if (want == 0)
            ck_assert_int_eq(counts[i], 0);
        else
            chi2 += (counts[i] - want) * (counts[i] - want) / want;
    }
    ck_assert_msg(chi2 < 33.7 && chi2 > 0.5, "chi-square %g", chi2);
    free(row), free(logits), free(logprob);
    machine_close(&m);
}
END_TEST

/* A row gives the same token and bits alone on one thread and in a batch on three; sample's logprob is
 * logprob's. */
START_TEST(row_is_independent) {
    machine m, one;
    if (!machine_open(&m, _i, 3))
        return;
    ck_assert(machine_open(&one, _i, 1));
    enum { ROWS = 19, VOCAB = 4133 };
    float *logits = normal(ROWS * VOCAB, 8), *logprob = poisoned(ROWS), *again = poisoned(ROWS);
    float *lse = poisoned(ROWS);
    int32_t token[ROWS];
    psoup__draw draws[ROWS];
    for (int i = 0; i < ROWS; i++)
        draws[i] = (psoup__draw){.temperature = 0.8f, .top_k = i % 2 ? 0 : 50, .top_p = 0.95f,
                                 .seed = 1, .sequence = (uint64_t)i, .position = 12};
    logits[3 * VOCAB + 5] = NAN;
    m.ops->sample(m.be, token, logprob, logits, draws, ROWS, VOCAB);
    for (int i = 0; i < ROWS; i++) {
        float lp;
        ck_assert_int_eq(draw_one(&one, logits + i * VOCAB, VOCAB, &draws[i], &lp), token[i]);
        if (i == 3)
            ck_assert_int_eq(token[i], -1);
        else
            same_bits("logprob", &lp, logprob + i, 1);
    }
    token[3] = 0;
    m.ops->logprob(m.be, again, lse, logits, token, ROWS, VOCAB);
    same_bits("logprob", again, logprob, 3);
    same_bits("logprob", again + 4, logprob + 4, ROWS - 4);
    free(logits), free(logprob), free(again), free(lse);
    machine_close(&m);
    machine_close(&one);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("cpu: sample");
    TCase *tests = tcase_create("sample");
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, greedy_takes_lowest_id, 0, CASE_ISAS);
    tcase_add_loop_test(tests, agrees_with_sorting, 0, CASE_ISAS);
    tcase_add_loop_test(tests, draws_follow_the_distribution, 0, CASE_ISAS);
    tcase_add_loop_test(tests, row_is_independent, 0, CASE_ISAS);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
