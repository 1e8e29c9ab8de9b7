/* Drawing the next token. */
#include "checkops.h"

#include "cpu/cpu.h"
#include "gpu/gpu.h"

/* Rows of logits, their draws and what came of them. */
typedef struct batch {
    int32_t rows, vocab;
    float *logits;      /* [rows, vocab] */
    psoup__draw *draws; /* [rows], their lists on the host */
    int32_t *banned;    /* [rows, BANNED] */
    int32_t *token;     /* [rows] */
    float *logprob;     /* [rows] */
} batch;

enum { BANNED = 6 };

static batch new_batch(int32_t rows, int32_t vocab) {
    const size_t n = (size_t)rows, size = n * (size_t)vocab;
    return (batch){.rows = rows, .vocab = vocab, .logits = calloc(size, sizeof(float)),
                   .draws = calloc(n, sizeof(psoup__draw)), .banned = calloc(n * BANNED, sizeof(int32_t)),
                   .token = calloc(n, sizeof(int32_t)), .logprob = calloc(n, sizeof(float))};
}

static void free_batch(batch *b) {
    free(b->logits), free(b->draws), free(b->banned), free(b->token), free(b->logprob);
}

static void draw(checker *c, batch *b) {
    const size_t n = (size_t)b->rows;
    psoup_error error;
    const int32_t *banned = block(c, b->banned, n * BANNED * sizeof *b->banned);
    psoup__draw *draws = malloc(n * sizeof *draws);
    for (size_t i = 0; i < n; i++) {
        draws[i] = b->draws[i];
        draws[i].banned = banned + i * BANNED;
    }
    const psoup__draw *device = block(c, draws, n * sizeof *draws);
    buffer *logits = values(c, b->logits, n * (size_t)b->vocab), *logprob = output(c, n);
    int32_t *token = block(c, NULL, n * sizeof *token);
    c->ops->sample(c->be, token, logprob->device, logits->device, device, b->rows, b->vocab);
    get(c, logprob);
    memcpy(b->logprob, logprob->host, n * sizeof *b->logprob);
    expect_true(c, "tokens are read",
                c->ops->read(c->be, b->token, token, n * sizeof *token, &error) == PSOUP_OK);
    free(draws);
}

/* ---- one row in float64, sorted: the rule of ops.h read aloud ----------------------------------------- */

typedef struct entry {
    double p;
    float logit;
    int32_t id;
} entry;

static int descending(const void *a, const void *b) {
    const entry *x = a, *y = b;
    return x->logit != y->logit ? (x->logit < y->logit ? 1 : -1) : x->id - y->id;
}

/* The row's tokens after bans, in order; what top-k leaves of them. */
static int32_t sort_row(const batch *b, int32_t row, entry *list) {
    const psoup__draw *d = &b->draws[row];
    for (int32_t i = 0; i < b->vocab; i++)
        list[i] = (entry){0, b->logits[(size_t)row * (size_t)b->vocab + (size_t)i], i};
    for (int32_t i = 0; i < d->n_banned; i++)
        list[b->banned[row * BANNED + i]].logit = -INFINITY;
    qsort(list, (size_t)b->vocab, sizeof *list, descending);
    int32_t n = d->top_k > 0 && d->top_k < b->vocab ? d->top_k : b->vocab;
    while (n < b->vocab && list[n].logit == list[n - 1].logit)
        n++;
    return n;
}

enum { NONE = -1, UNSURE = -2 };

static int32_t choose(const psoup__draw *d, entry *list, int32_t n) {
    const double near = 1e-7;
    double sum = 0, before = 0;
    bool unsure = false;
    if (!isfinite(list[0].logit))
        return NONE;
    if (d->temperature == 0)
        return list[0].id;
    for (int32_t i = 0; i < n; i++)
        sum += list[i].p = exp(((double)list[i].logit - list[0].logit) / d->temperature);
    if (d->top_p < 1) {
        const double part = d->top_p * sum;
        int32_t kept = 0;
        for (; kept < n && (kept == 0 || before < part); kept++) {
            unsure |= kept > 0 && fabs(before - part) < near * sum;
            before += list[kept].p;
        }
        unsure |= kept < n && fabs(before - part) < near * sum;
        n = kept;
        sum = before;
    }
    const double u = psoup__uniform(psoup__philox_word(d->seed, d->sequence, d->position)) * sum;
    before = 0;
    for (int32_t i = 0; i < n; i++) {
        before += list[i].p;
        unsure |= fabs(before - u) < near * sum;
        if (before > u)
            return unsure ? UNSURE : list[i].id;
    }
    return UNSURE;
}

static double logprob_of(const batch *b, int32_t row, int32_t token) {
    const float *logits = b->logits + (size_t)row * (size_t)b->vocab;
    double max = -INFINITY, sum = 0;
    for (int32_t i = 0; i < b->vocab; i++)
        max = fmax(max, logits[i]);
    for (int32_t i = 0; i < b->vocab; i++)
        sum += exp(logits[i] - max);
    return logits[token] - max - log(sum);
}

/* ---- many rows -------------------------------------------------------------------------------------- */

/* Flat, as models have them, peaked; every fourth row with many ties, others with −∞. */
static void fill_row(batch *b, int32_t row, psoup__random *random) {
    static const float spread[] = {0.05f, 3, 30}, temperature[] = {1, 0.7f, 3, 0.05f, 0};
    static const float top_p[] = {1, 0.9f, 0.3f, 0.999f, 0};
    const int32_t top_k[] = {0, 1, 2, 40, b->vocab - 1, b->vocab, b->vocab + 5};
    float *logits = b->logits + (size_t)row * (size_t)b->vocab;
    for (int32_t i = 0; i < b->vocab; i++) {
        logits[i] = spread[row % 3] * psoup__random_normal(random);
        if (row % 4 == 1)
            logits[i] = rintf(logits[i]); /* zeros of both signs among them */
        if (row % 4 == 2 && i % 3 == 0)
            logits[i] = -INFINITY;
    }
    const uint32_t banned = row % 3 == 0 ? psoup__random_below(random, BANNED + 1) : 0;
    b->draws[row] = (psoup__draw){.temperature = temperature[row % 5], .top_k = top_k[row / 5 % 7],
                                  .top_p = top_p[row / 35 % 5], .seed = 7, .sequence = (uint64_t)row,
                                  .position = psoup__random_below(random, 1000), .n_banned = (int32_t)banned};
    for (int32_t i = 0; i < BANNED; i++)
        b->banned[row * BANNED + i] = (int32_t)psoup__random_below(random, (uint32_t)b->vocab);
}

/* The token float64 says, where it is sure; and on a GPU the CPU's in every row. */
static void check_rows_of(checker *c, int32_t rows, int32_t vocab) {
    begin(c, "sample", "rows %d, vocab %d", (int)rows, (int)vocab);
    batch b = new_batch(rows, vocab);
    entry *list = malloc((size_t)vocab * sizeof *list);
    psoup__random random = {.seed = 3, .sequence = (uint64_t)vocab};
    for (int32_t i = 0; i < rows; i++)
        fill_row(&b, i, &random);
    draw(c, &b);
    int32_t unsure = 0, wrong = -1;
    double most = 0;
    for (int32_t i = 0; i < rows; i++) {
        const int32_t want = choose(&b.draws[i], list, sort_row(&b, i, list));
        unsure += want == UNSURE;
        if (want != UNSURE && want != b.token[i])
            wrong = i;
        if (b.token[i] >= 0)
            most = fmax(most, fabs(b.logprob[i] - logprob_of(&b, i, b.token[i])));
        else
            most = isnan(b.logprob[i]) ? most : 1;
    }
    if (wrong >= 0)
        printf("row %d: token %d\n", (int)wrong, (int)b.token[wrong]);
    expect_true(c, "every token as float64 has it", wrong < 0);
    expect_true(c, "float64 is sure of most", unsure * 4 <= rows);
    expect_true(c, "log-probs within 1e-5", most < 1e-5);
    if (c->cuda) {
        psoup_error error;
        checker cpu = {.context = c->context};
        int32_t differ = 0, *token = malloc((size_t)rows * sizeof *token);
        memcpy(token, b.token, (size_t)rows * sizeof *token);
        c->aside = true;
        expect_true(c, "a CPU", psoup__cpu_create(c->context, &cpu.be, &error) == PSOUP_OK);
        cpu.ops = cpu.be->ops;
        draw(&cpu, &b);
        for (int32_t i = 0; i < rows; i++)
            differ += token[i] != b.token[i];
        expect_true(c, "the CPU draws the same", differ == 0 && cpu.failures == 0);
        begin(&cpu, "", "%s", "");
        cpu.ops->free(cpu.be);
        c->aside = false;
        free(token);
    }
    free(list);
    free_batch(&b);
}

/* ---- corners ---------------------------------------------------------------------------------------- */

static void check_corners(checker *c) {
    enum { ROWS = 8, VOCAB = 7 };
    static const float row[VOCAB] = {1, -2, 5, 5, 0, 5, -INFINITY};
    static const int32_t want[ROWS] = {2, 3, -1, -1, -1, -1, 0, 5};
    begin(c, "sample", "corners");
    batch b = new_batch(ROWS, VOCAB);
    for (int32_t i = 0; i < ROWS; i++) {
        memcpy(b.logits + i * VOCAB, row, sizeof row);
        b.draws[i] = (psoup__draw){.top_p = 1, .temperature = i % 2 ? 1e-3f : 0};
        memcpy(b.banned + i * BANNED, (int32_t[BANNED]){2, 2, 0, 1, 3, 4}, BANNED * sizeof(int32_t));
    }
    b.draws[1].temperature = 0; /* the next of equals, where the first is banned twice */
    b.draws[1].n_banned = 2;
    b.logits[2 * VOCAB + 4] = b.logits[3 * VOCAB + 4] = NAN;
    b.logits[4 * VOCAB + 4] = INFINITY;
    for (int i = 0; i < VOCAB; i++)
        b.logits[5 * VOCAB + i] = -INFINITY;
    for (int i = 0; i < VOCAB; i++) /* +0 and −0 are equal */
        b.logits[6 * VOCAB + i] = i % 2 ? 0.0f : -0.0f;
    b.draws[7].n_banned = BANNED; /* only one is left with a probability */
    draw(c, &b);
    for (int i = 0; i < ROWS; i++)
        expect_true(c, "the token that the row says", b.token[i] == want[i]);
    for (int i = 0; i < ROWS; i++) {
        const double logprob = want[i] < 0 ? 0 : logprob_of(&b, i, want[i]);
        expect_true(c, "its log-prob, of the untouched row",
                    want[i] < 0 ? isnan(b.logprob[i]) : fabs(b.logprob[i] - logprob) < 1e-6);
    }
    free_batch(&b);
}

/* What a block's memory cannot hold is refused, and the next that waits says why. */
static void check_too_large(checker *c) {
    psoup_error error;
    psoup__backend *be;
    int32_t token;
    begin(c, "sample", "too large a vocabulary");
    c->aside = true;
    expect_true(c, "another GPU backend", psoup__gpu_create(c->context, &be, &error) == PSOUP_OK);
    void *memory = be->ops->alloc(be, 1, 64, &error);
    be->ops->sample(be, memory, memory, memory, memory, 1, INT32_MAX);
    expect_true(c, "refused",
                be->ops->read(be, &token, memory, sizeof token, &error) == PSOUP_ERROR_UNSUPPORTED);
    expect_true(c, "with its reason", strstr(error.message, "a vocabulary of 2147483647") != NULL);
    be->ops->release(be, memory);
    be->ops->free(be);
    c->aside = false;
}

void check_sample(checker *c) {
    static const int32_t cases[][2] = {{20, 1}, {700, 7}, {700, 128}, {700, 1000}, {21, 32000}, {2, 128256}, {4, 131077}};
    check_corners(c);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_rows_of(c, cases[i][0], cases[i][1]);
    if (c->cuda)
        check_too_large(c);
}
