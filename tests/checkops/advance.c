/* A decoding batch from one step to the next; there is no such op on the CPU, whose session does it. */
#include "checkops.h"

enum { LONGEST = 80, VOCAB = 7, STEPS = 6, N_STOP = 2, PAGES = 2 /* of a row */ };
static const int32_t stops[N_STOP] = {2, 5};

/* One row, as the host has it and as it comes from the device. */
typedef struct row {
    psoup__decoding d;
    psoup__draw draw;
    psoup__span span;
    int32_t next, position, place; /* token of the next step, and where it stands */
    int32_t history[LONGEST], banned[N_STOP + LONGEST], token[STEPS];
    float logprob[STEPS];
} row;

typedef struct device {
    psoup__decode_state state;
    int32_t *history, *banned, *token, *pages;
    float *logprob;
} device;

/* Every rule in some rows: ends by length and by a stop token, a least length, n-grams of all sizes. Rows that are
 * long from the start come to their second page. */
static void begin_rows(row *rows, int32_t n, bool paged, int32_t page) {
    for (int32_t r = 0; r < n; r++) {
        const int32_t length = r % 2 ? page - 2 : 3 + r % 5;
        rows[r] = (row){.d = {.length = length, .most = length + 1 + r % 9, .least = length + r % 4, .ngram = r % 5,
                              .n_stop = N_STOP, .ignore_stop = r % 3 == 0},
                        .draw = {.temperature = 1, .top_p = 1, .seed = 3, .sequence = (uint64_t)r, .position = 10},
                        .span = {r, 1, length, r * (paged ? PAGES : LONGEST)}};
        for (int32_t i = 0; i < length; i++)
            rows[r].history[i] = (i * i + 3 * r + i / 4) % VOCAB;
    }
}

static int32_t page_of(int32_t n, int32_t at) { /* pages in the opposite order */
    return n * PAGES - 1 - at;
}

static device upload(checker *c, const row *rows, int32_t n, bool paged) {
    const size_t count = (size_t)n;
    device d = {.history = block(c, NULL, count * LONGEST * sizeof(int32_t)),
                .banned = block(c, NULL, count * (N_STOP + LONGEST) * sizeof(int32_t)),
                .token = block(c, NULL, count * STEPS * sizeof(int32_t)),
                .logprob = block(c, NULL, count * STEPS * sizeof(float))};
    const int32_t *stop = block(c, stops, sizeof stops);
    psoup__decoding *decoding = calloc(count, sizeof *decoding);
    psoup__draw *draw = calloc(count, sizeof *draw);
    psoup__span *span = calloc(count, sizeof *span);
    int32_t *pages = calloc(count * PAGES, sizeof *pages);
    for (int32_t r = 0; r < n; r++) {
        decoding[r] = rows[r].d;
        decoding[r].history = d.history + r * LONGEST;
        decoding[r].stop = stop;
        decoding[r].banned = d.banned + r * (N_STOP + LONGEST);
        decoding[r].token = d.token + r * STEPS;
        decoding[r].logprob = d.logprob + r * STEPS;
        draw[r] = rows[r].draw;
        span[r] = rows[r].span;
        c->ops->write(c->be, decoding[r].history, rows[r].history, LONGEST * sizeof(int32_t));
    }
    for (int32_t i = 0; i < n * PAGES; i++)
        pages[i] = page_of(n, i);
    d.pages = paged ? block(c, pages, count * PAGES * sizeof *pages) : NULL;
    d.state = (psoup__decode_state){.decoding = block(c, decoding, count * sizeof *decoding),
                                    .draw = block(c, draw, count * sizeof *draw),
                                    .token = block(c, NULL, count * sizeof(int32_t)),
                                    .position = block(c, NULL, count * sizeof(int32_t)),
                                    .place = block(c, NULL, count * sizeof(int32_t)),
                                    .span = block(c, span, count * sizeof *span)};
    free(decoding), free(draw), free(span), free(pages);
    return d;
}

static void fetch(checker *c, void *host, const void *from, size_t bytes) {
    psoup_error error;
    expect_true(c, "read", c->ops->read(c->be, host, from, bytes, &error) == PSOUP_OK);
}

static void download(checker *c, const device *d, int32_t r, row *out) {
    const psoup__decode_state *s = &d->state;
    fetch(c, &out->d, s->decoding + r, sizeof out->d);
    fetch(c, &out->draw, s->draw + r, sizeof out->draw);
    fetch(c, &out->span, s->span + r, sizeof out->span);
    fetch(c, &out->next, s->token + r, sizeof out->next);
    fetch(c, &out->position, s->position + r, sizeof out->position);
    fetch(c, &out->place, s->place + r, sizeof out->place);
    fetch(c, out->history, d->history + r * LONGEST, sizeof out->history);
    fetch(c, out->banned, d->banned + r * (N_STOP + LONGEST), sizeof out->banned);
    fetch(c, out->token, d->token + r * STEPS, sizeof out->token);
    fetch(c, out->logprob, d->logprob + r * STEPS, sizeof out->logprob);
}

/* Whether `size` tokens in a row would be there twice if v came next. */
static bool repeats(const int32_t *history, int32_t length, int32_t size, int32_t v) {
    for (int32_t i = 0; size > 0 && i + size <= length; i++) {
        bool same = history[i + size - 1] == v;
        for (int32_t j = 1; j < size; j++)
            same = same && history[i + size - 1 - j] == history[length - j];
        if (same)
            return true;
    }
    return false;
}

static bool is_stop(int32_t token) {
    return token == stops[0] || token == stops[1];
}

/* The rule of ops.h for one row that drew a token. */
static void step(row *w, int32_t token, float logprob, const int32_t *pages, int32_t page) {
    psoup__decoding *d = &w->d;
    if (d->ended)
        return;
    w->token[d->drawn] = token;
    w->logprob[d->drawn++] = logprob;
    if (token >= 0)
        w->history[d->length] = token;
    d->ended = token < 0 || (is_stop(token) && !d->ignore_stop) || d->length + 1 == d->most;
    if (d->ended)
        return;
    w->next = token;
    w->position = d->length++;
    w->span.keys = d->length;
    w->draw.position++;
    w->place = pages ? pages[w->span.first + w->position / page] * page + w->position % page
                     : w->span.first + w->position;
}

static bool same_bans(const row *want, const row *got) {
    bool banned[VOCAB] = {false};
    if (got->draw.n_banned < 0 || got->draw.n_banned > N_STOP + want->d.most)
        return false;
    for (int32_t i = 0; i < got->draw.n_banned; i++) {
        if (got->banned[i] < 0 || got->banned[i] >= VOCAB)
            return false;
        banned[got->banned[i]] = true;
    }
    for (int32_t v = 0; v < VOCAB; v++)
        if (banned[v] != (repeats(want->history, want->d.length, want->d.ngram, v) ||
                          (want->d.length < want->d.least && is_stop(v))))
            return false;
    return true;
}

static void compare(checker *c, const row *want, const row *got) {
    const psoup__decoding *w = &want->d, *g = &got->d;
    expect_true(c, "ended", g->ended == w->ended);
    expect_true(c, "what was drawn", g->drawn == w->drawn &&
                memcmp(got->token, want->token, (size_t)w->drawn * sizeof(int32_t)) == 0 &&
                memcmp(got->logprob, want->logprob, (size_t)w->drawn * sizeof(float)) == 0);
    expect_true(c, "the text", g->length == w->length &&
                memcmp(got->history, want->history, (size_t)w->length * sizeof(int32_t)) == 0);
    expect_true(c, "the span", memcmp(&got->span, &want->span, sizeof got->span) == 0);
    expect_true(c, "the next word", got->draw.position == want->draw.position &&
                got->draw.seed == want->draw.seed && got->draw.sequence == want->draw.sequence);
    expect_true(c, "the next input", got->next == want->next && got->position == want->position &&
                got->place == want->place);
    if (!w->ended)
        expect_true(c, "what is banned", same_bans(want, got));
}

static void check(checker *c, int32_t n, bool paged) {
    const int32_t page = c->ops->page;
    row *rows = calloc((size_t)n, sizeof *rows), got;
    int32_t *pages = calloc((size_t)(n * PAGES), sizeof *pages), *drawn = calloc((size_t)n, sizeof *drawn);
    float *logprob = calloc((size_t)n, sizeof *logprob);
    begin(c, "advance", "rows %d, %s", (int)n, paged ? "pages" : "no pages");
    begin_rows(rows, n, paged, page);
    device d = upload(c, rows, n, paged);
    for (int32_t i = 0; i < n * PAGES; i++)
        pages[i] = page_of(n, i);
    int32_t *device_drawn = block(c, NULL, (size_t)n * sizeof *drawn);
    float *device_logprob = block(c, NULL, (size_t)n * sizeof *logprob);
    for (int32_t s = 0; s < STEPS; s++) {
        for (int32_t r = 0; r < n; r++) {
            drawn[r] = r % 11 == 7 && s == 2 ? -1 : (s * s + 2 * r + 3 * s) % VOCAB;
            logprob[r] = -(float)(s + 1) / (float)(r + 1);
            step(&rows[r], drawn[r], logprob[r], paged ? pages : NULL, page);
        }
        c->ops->write(c->be, device_drawn, drawn, (size_t)n * sizeof *drawn);
        c->ops->write(c->be, device_logprob, logprob, (size_t)n * sizeof *logprob);
        c->ops->advance(c->be, &d.state, device_drawn, device_logprob, &(psoup__keys){.pages = d.pages}, n);
        for (int32_t r = 0; r < n; r += n > 8 ? 3 : 1) {
            download(c, &d, r, &got);
            compare(c, &rows[r], &got);
        }
    }
    free(rows), free(pages), free(drawn), free(logprob);
}

void check_advance(checker *c) {
    static const int32_t rows[] = {1, 2, 37, 64};
    for (size_t i = 0; c->ops->advance && i < sizeof rows / sizeof *rows; i++)
        for (int paged = 0; paged < 2; paged++)
            check(c, rows[i], paged);
}
