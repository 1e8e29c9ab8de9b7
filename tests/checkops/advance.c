/* A decoding batch from one step to the next; there is no such op on the CPU, whose session does it. */
#include "checkops.h"

enum { LONGEST = 80, VOCAB = 7, STEPS = 6, N_STOP = 2, PAGES = 2 /* of a row */, MOST_ROWS = 3 /* of a sequence */ };
static const int32_t stops[N_STOP] = {2, 5};

/* A row of a sequence: the token of the next step, and where it stands. */
typedef struct row {
    psoup__span span;
    int32_t next, position, place;
} row;

/* One sequence, as the host has it and as it comes from the device. */
typedef struct text {
    psoup__decoding d;
    psoup__draw draw;
    row row[MOST_ROWS];
    int32_t first, n; /* rows */
    int32_t history[LONGEST], banned[N_STOP + LONGEST], token[STEPS];
    float logprob[STEPS];
} text;

typedef struct device {
    psoup__decode_state state;
    int32_t *history, *banned, *token, *pages;
    float *logprob;
    int32_t rows; /* one more than the texts have */
} device;

static psoup__span span_of(int32_t at, int32_t length, bool paged) {
    return (psoup__span){at, 1, length, at * (paged ? PAGES : LONGEST)};
}

/* Every rule in some texts: ends by length and by a stop token, a least length, n-grams of all sizes. Those that are
 * long from the start come to their second page. `several`: they have up to MOST_ROWS rows, or none; else one. */
static void begin_texts(text *texts, int32_t n, bool paged, bool several, int32_t page) {
    for (int32_t r = 0, rows = 0; r < n; rows += texts[r++].n) {
        const int32_t length = r % 2 ? page - 2 : 3 + r % 5;
        texts[r] = (text){.d = {.length = length, .most = length + 1 + r % 9, .least = length + r % 4, .ngram = r % 5,
                                .n_stop = N_STOP, .ignore_stop = r % 3 == 0},
                          .draw = {.temperature = 1, .top_p = 1, .seed = 3, .sequence = (uint64_t)r, .position = 10},
                          .first = rows, .n = several ? (r + 2) % (MOST_ROWS + 1) : 1};
        for (int32_t i = 0; i < texts[r].n; i++)
            texts[r].row[i].span = span_of(rows + i, length, paged);
        for (int32_t i = 0; i < length; i++)
            texts[r].history[i] = (i * i + 3 * r + i / 4) % VOCAB;
    }
}

static int32_t page_of(int32_t rows, int32_t at) { /* pages in the opposite order */
    return rows * PAGES - 1 - at;
}

static device upload(checker *c, const text *texts, int32_t n, bool paged, bool several) {
    const int32_t rows = texts[n - 1].first + texts[n - 1].n + 1;
    const size_t count = (size_t)n, n_rows = (size_t)rows;
    device d = {.history = block(c, NULL, count * LONGEST * sizeof(int32_t)),
                .banned = block(c, NULL, count * (N_STOP + LONGEST) * sizeof(int32_t)),
                .token = block(c, NULL, count * STEPS * sizeof(int32_t)),
                .logprob = block(c, NULL, count * STEPS * sizeof(float)), .rows = rows};
    const int32_t *stop = block(c, stops, sizeof stops);
    psoup__decoding *decoding = calloc(count, sizeof *decoding);
    psoup__draw *draw = calloc(count, sizeof *draw);
    psoup__span *span = calloc(n_rows, sizeof *span);
    int32_t *pages = calloc(n_rows * PAGES, sizeof *pages), *first = calloc(count + 1, sizeof *first);
    for (int32_t r = 0; r < n; r++) {
        decoding[r] = texts[r].d;
        decoding[r].history = d.history + r * LONGEST;
        decoding[r].stop = stop;
        decoding[r].banned = d.banned + r * (N_STOP + LONGEST);
        decoding[r].token = d.token + r * STEPS;
        decoding[r].logprob = d.logprob + r * STEPS;
        draw[r] = texts[r].draw;
        first[r + 1] = texts[r].first + texts[r].n;
        for (int32_t i = 0; i < texts[r].n; i++)
            span[texts[r].first + i] = texts[r].row[i].span;
        c->ops->write(c->be, decoding[r].history, texts[r].history, LONGEST * sizeof(int32_t));
    }
    span[rows - 1] = span_of(rows - 1, 3, paged);
    for (int32_t i = 0; i < rows * PAGES; i++)
        pages[i] = page_of(rows, i);
    d.pages = paged ? block(c, pages, n_rows * PAGES * sizeof *pages) : NULL;
    d.state = (psoup__decode_state){.decoding = block(c, decoding, count * sizeof *decoding),
                                    .draw = block(c, draw, count * sizeof *draw),
                                    .first = several ? block(c, first, (count + 1) * sizeof *first) : NULL,
                                    .token = block(c, NULL, n_rows * sizeof(int32_t)),
                                    .position = block(c, NULL, n_rows * sizeof(int32_t)),
                                    .place = block(c, NULL, n_rows * sizeof(int32_t)),
                                    .span = block(c, span, n_rows * sizeof *span)};
    free(decoding), free(draw), free(span), free(pages), free(first);
    return d;
}

static void fetch(checker *c, void *host, const void *from, size_t bytes) {
    psoup_error error;
    expect_true(c, "read", c->ops->read(c->be, host, from, bytes, &error) == PSOUP_OK);
}

static void download_row(checker *c, const device *d, int32_t r, row *out) {
    const psoup__decode_state *s = &d->state;
    fetch(c, &out->span, s->span + r, sizeof out->span);
    fetch(c, &out->next, s->token + r, sizeof out->next);
    fetch(c, &out->position, s->position + r, sizeof out->position);
    fetch(c, &out->place, s->place + r, sizeof out->place);
}

static void download(checker *c, const device *d, int32_t r, const text *of, text *out) {
    const psoup__decode_state *s = &d->state;
    for (int32_t i = 0; i < of->n; i++)
        download_row(c, d, of->first + i, &out->row[i]);
    fetch(c, &out->d, s->decoding + r, sizeof out->d);
    fetch(c, &out->draw, s->draw + r, sizeof out->draw);
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

/* The rule of ops.h for one text that drew a token. */
static void step(text *w, int32_t token, float logprob, const int32_t *pages, int32_t page) {
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
    const int32_t position = d->length++;
    w->draw.position++;
    for (row *r = w->row; r < w->row + w->n; r++) {
        r->next = token;
        r->position = position;
        r->span.keys = d->length;
        r->place = pages ? pages[r->span.first + position / page] * page + position % page : r->span.first + position;
    }
}

static bool same_bans(const text *want, const text *got) {
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

static void compare_rows(checker *c, const row *want, const row *got) {
    expect_true(c, "the span", memcmp(&got->span, &want->span, sizeof got->span) == 0);
    expect_true(c, "the next input", got->next == want->next && got->position == want->position &&
                got->place == want->place);
}

static void compare(checker *c, const text *want, const text *got) {
    const psoup__decoding *w = &want->d, *g = &got->d;
    expect_true(c, "ended", g->ended == w->ended);
    expect_true(c, "what was drawn", g->drawn == w->drawn &&
                memcmp(got->token, want->token, (size_t)w->drawn * sizeof(int32_t)) == 0 &&
                memcmp(got->logprob, want->logprob, (size_t)w->drawn * sizeof(float)) == 0);
    expect_true(c, "the text", g->length == w->length &&
                memcmp(got->history, want->history, (size_t)w->length * sizeof(int32_t)) == 0);
    for (int32_t i = 0; i < want->n; i++)
        compare_rows(c, &want->row[i], &got->row[i]);
    expect_true(c, "the next word", got->draw.position == want->draw.position &&
                got->draw.seed == want->draw.seed && got->draw.sequence == want->draw.sequence);
    if (!w->ended)
        expect_true(c, "what is banned", same_bans(want, got));
}

static void check(checker *c, int32_t n, bool paged, bool several) {
    const int32_t page = c->ops->page;
    text *texts = calloc((size_t)n, sizeof *texts), got;
    int32_t *drawn = calloc((size_t)n, sizeof *drawn);
    float *logprob = calloc((size_t)n, sizeof *logprob);
    begin(c, "advance", "%d sequences%s, %s", (int)n, several ? " of several rows" : "", paged ? "pages" : "no pages");
    begin_texts(texts, n, paged, several, page);
    device d = upload(c, texts, n, paged, several);
    const row nobodys = {.span = span_of(d.rows - 1, 3, paged)};
    row last;
    int32_t *pages = calloc((size_t)(d.rows * PAGES), sizeof *pages);
    for (int32_t i = 0; i < d.rows * PAGES; i++)
        pages[i] = page_of(d.rows, i);
    int32_t *device_drawn = block(c, NULL, (size_t)n * sizeof *drawn);
    float *device_logprob = block(c, NULL, (size_t)n * sizeof *logprob);
    for (int32_t s = 0; s < STEPS; s++) {
        for (int32_t r = 0; r < n; r++) {
            drawn[r] = r % 11 == 7 && s == 2 ? -1 : (s * s + 2 * r + 3 * s) % VOCAB;
            logprob[r] = -(float)(s + 1) / (float)(r + 1);
            step(&texts[r], drawn[r], logprob[r], paged ? pages : NULL, page);
        }
        c->ops->write(c->be, device_drawn, drawn, (size_t)n * sizeof *drawn);
        c->ops->write(c->be, device_logprob, logprob, (size_t)n * sizeof *logprob);
        c->ops->advance(c->be, &d.state, device_drawn, device_logprob, &(psoup__keys){.pages = d.pages}, n);
        for (int32_t r = 0; r < n; r += n > 8 ? 3 : 1) {
            download(c, &d, r, &texts[r], &got);
            compare(c, &texts[r], &got);
        }
        download_row(c, &d, d.rows - 1, &last);
        compare_rows(c, &nobodys, &last);
    }
    free(texts), free(pages), free(drawn), free(logprob);
}

void check_advance(checker *c) {
    static const int32_t n[] = {1, 2, 37, 64};
    for (size_t i = 0; c->ops->advance && i < sizeof n / sizeof *n; i++)
        for (int way = 0; way < 4; way++)
            check(c, n[i], way % 2, way / 2);
}
