/* Many tokens in one go, where the backend can repeat a step without the host (ops->record): the drawn token, the
 * positions, what is banned and who has ended stay on the device, and so do the sums of logits that are mixed. Then the
 * host applies the same rules to what was drawn, token by token; its own state alone counts, and the device's is made
 * anew from it for every window. */
#include <string.h>

#include "model/session.h"

enum { MOST_STOP = 32 };

void psoup__window_free(psoup_session *session) {
    psoup__backend *be = session->model->be;
    psoup__window *w = &session->window;
    void *memory[] = {w->decoding, w->draw, w->history, w->banned, w->stop, w->drawn, w->token, w->drawn_logprob,
                      w->logprob, w->first, w->weight};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        be->ops->release(be, memory[i]);
    *w = (psoup__window){.decoding = NULL};
}

static void *take(psoup_session *session, size_t columns, size_t size, psoup_error *error) {
    psoup__backend *be = session->model->be;
    return be->ops->alloc(be, (size_t)session->places * columns, size, error);
}

static psoup_status allocate(psoup_session *session, psoup_error *error) {
    psoup__window *w = &session->window;
    size_t steps = (size_t)session->steps, most = (size_t)session->max_tokens;
    if (w->decoding)
        return PSOUP_OK;
    bool whole = (w->decoding = take(session, 1, sizeof *w->decoding, error)) &&
                 (w->draw = take(session, 1, sizeof *w->draw, error)) &&
                 (w->history = take(session, most, sizeof *w->history, error)) &&
                 (w->banned = take(session, MOST_STOP + most, sizeof *w->banned, error)) &&
                 (w->stop = take(session, MOST_STOP, sizeof *w->stop, error)) &&
                 (w->drawn = take(session, 1, sizeof *w->drawn, error)) &&
                 (w->token = take(session, steps, sizeof *w->token, error)) &&
                 (w->drawn_logprob = take(session, 1, sizeof *w->drawn_logprob, error)) &&
                 (w->logprob = take(session, steps, sizeof *w->logprob, error)) &&
                 (w->first = take(session, 2, sizeof *w->first, error)) && /* one more than places at least */
                 (w->weight = take(session, 1, sizeof *w->weight, error));
    if (!whole)
        psoup__window_free(session);
    return whole ? PSOUP_OK : PSOUP_ERROR_MEMORY;
}

bool psoup__window_fits(const psoup_session *session, const psoup__batch *batch, int32_t samples) {
    if (session->steps < 2 || batch->rows != batch->n || session->sample_first[samples] != batch->n)
        return false;
    for (int32_t i = 0; i < batch->n; i++)
        if (session->parts[i].s->n_stop > MOST_STOP)
            return false;
    return true;
}

/* Rows and sequences are rounded up, so that batches that shrink run the graphs of few sizes. */
static int32_t padded(const psoup_session *session, int32_t n) {
    int32_t step = n <= 4 ? 1 : n <= 32 ? 4 : 16, full = (n + step - 1) / step * step;
    return full < session->places ? full : session->places;
}

/* The rows that are added have one token and write into a page of nobody's; the sequences that are added have ended,
 * and one of those rows each while there are any. Returns how many sequences there are then. */
static int32_t pad(psoup_session *session, psoup__batch *batch, int32_t samples) {
    size_t adapters = (size_t)session->model->n_adapters;
    int32_t full = padded(session, batch->n), sequences = padded(session, samples), *first = session->sample_first;
    for (int32_t i = batch->n; i < full; i++) {
        session->tokens[i] = session->tokens[0];
        session->past[i] = 0;
        session->pages[i] = &session->cache->spare;
        session->start[i + 1] = i + 1;
        if (adapters)
            memcpy(session->mix + (size_t)i * adapters, session->mix, adapters * sizeof *session->mix);
        session->method[i] = session->method[0];
    }
    for (int32_t i = samples; i < sequences; i++) {
        session->draws[i] = session->draws[0];
        first[i + 1] = first[i] < full ? first[i] + 1 : full;
    }
    batch->n = batch->rows = full;
    return sequences;
}

/* A sequence as the device continues it, and as `s` is; one that fills up has ended. */
static psoup__decoding decoding_of(psoup_session *session, const sequence *s, int32_t i, bool ended) {
    psoup__backend *be = session->model->be;
    psoup__window *w = &session->window;
    size_t at = (size_t)i, most = (size_t)session->max_tokens;
    psoup__decoding d = {
        .history = w->history + at * most, .length = s->length, .most = s->prompt + s->room,
        .least = s->prompt + s->sampling.min_new_tokens, .ngram = s->sampling.no_repeat_ngram_size,
        .stop = w->stop + at * MOST_STOP, .n_stop = s->n_stop, .ignore_stop = s->sampling.ignore_stop,
        .banned = w->banned + at * (MOST_STOP + most), .token = w->token + at * (size_t)session->steps,
        .logprob = w->logprob + at * (size_t)session->steps, .ended = ended};
    psoup__draw *draw = &session->draws[i];
    be->ops->write(be, w->stop + at * MOST_STOP, s->stop, (size_t)s->n_stop * sizeof *s->stop);
    if (d.ngram > 0)
        be->ops->write(be, d.history, s->tokens, (size_t)s->length * sizeof *s->tokens);
    be->ops->write(be, d.banned, draw->banned, (size_t)draw->n_banned * sizeof *draw->banned);
    draw->banned = d.banned;
    return d;
}

/* Of `sequences` the first `samples` go on. */
static psoup_status upload(psoup_session *session, int32_t samples, int32_t sequences, psoup_error *error) {
    psoup__backend *be = session->model->be;
    psoup__window *w = &session->window;
    const int32_t *first = session->sample_first;
    size_t n = (size_t)sequences;
    psoup__decoding *all = psoup__alloc(session->model->context, n, sizeof *all, error);
    if (!all)
        return PSOUP_ERROR_MEMORY;
    for (int32_t i = 0; i < sequences; i++)
        all[i] = decoding_of(session, session->parts[i < samples ? first[i] : 0].s, i, i >= samples);
    be->ops->write(be, w->decoding, all, n * sizeof *all);
    be->ops->write(be, w->draw, session->draws, n * sizeof *session->draws);
    be->ops->write(be, w->first, first, (n + 1) * sizeof *first);
    be->ops->write(be, w->weight, session->sample_weight, (size_t)first[samples] * sizeof *session->sample_weight);
    psoup__free(session->model->context, all);
    return PSOUP_OK;
}

/* Sequences from `at` on whose rows the head takes at once, and, in *rows, how many rows these are; with the last one's
 * those that are nobody's. */
static int32_t chunk_of(const psoup_session *session, int32_t at, int32_t sequences, int32_t *rows) {
    const psoup__tape *t = session->tape;
    const int32_t *first = session->sample_first, most = t->chunk_rows;
    int32_t n = 1;
    while (at + n < sequences && n < most && first[at + n + 1] - first[at] <= most)
        n++;
    int32_t end = at + n < sequences ? first[at + n] : t->rows;
    *rows = end - first[at] < most ? end - first[at] : most;
    return n;
}

/* One step, as it is recorded: the hidden states of all rows lie in their order, so none is gathered. */
static void step(psoup_session *session, const psoup__cached *cached, int32_t sequences, bool mixed) {
    psoup_model *model = session->model;
    psoup__backend *be = model->be;
    const psoup__ops *ops = be->ops;
    psoup__tape *t = session->tape;
    psoup__window *w = &session->window;
    const int32_t vocab = model->config.vocab_size;
    psoup__forward_run(t, cached);
    for (int32_t at = 0, n, rows; at < sequences; at += n) {
        n = chunk_of(session, at, sequences, &rows);
        size_t row = (size_t)session->sample_first[at];
        const float *hidden = t->hidden + row * (size_t)model->config.hidden_size, *logits = t->chunk.logits;
        ops->linear_mix(be, t->chunk.logits, NULL, hidden, hidden, &model->lm_head, NULL, NULL, &psoup__no_mix,
                        rows);
        if (mixed) {
            ops->combine_rows(be, t->mixed, logits, w->weight + row, w->first + at, n, vocab);
            logits = t->mixed;
        }
        ops->sample(be, w->drawn + at, w->drawn_logprob + at, logits, w->draw + at, n, vocab);
    }
    psoup__keys keys = psoup__cached_keys(t, cached, 0);
    psoup__decode_state state = {.decoding = w->decoding, .draw = w->draw, .first = mixed ? w->first : NULL,
                                 .token = t->token, .position = t->position, .place = t->place, .span = t->span};
    ops->advance(be, &state, w->drawn, w->drawn_logprob, &keys, sequences);
}

/* As many steps as the options say, but not more than the longest row has left. */
static int32_t steps_of(const psoup_session *session, int32_t rows) {
    int32_t most = 0;
    for (int32_t i = 0; i < rows; i++) {
        const sequence *s = session->parts[i].s;
        int32_t left = s->prompt + s->room - s->length;
        most = left > most ? left : most;
    }
    return most < session->steps ? most : session->steps;
}

static psoup_status deliver(psoup_session *session, int32_t parts, int32_t steps, const int32_t *token,
                            const float *logprob, psoup_token_fn on_token, void *user, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (int32_t k = 0; status == PSOUP_OK && k < steps && parts > 0; k++) {
        for (int32_t i = 0; i < parts; i++) {
            int32_t at = session->parts[i].sampled; /* parts thin out; where their tokens are stays */
            if (at < 0)
                continue; /* another view of the one before */
            session->drawn[at] = token[(size_t)at * (size_t)session->steps + (size_t)k];
            session->logprobs[at] = logprob[(size_t)at * (size_t)session->steps + (size_t)k];
        }
        status = psoup__session_deliver(session, &parts, on_token, user, error);
    }
    return status;
}

psoup_status psoup__window_run(psoup_session *session, psoup__batch *batch, int32_t samples, psoup_token_fn on_token,
                               void *user, psoup_error *error) {
    psoup_model *model = session->model;
    psoup__backend *be = model->be;
    int32_t rows = batch->n, steps = steps_of(session, rows), sequences = pad(session, batch, samples);
    const bool mixed = rows > samples;
    size_t cells = (size_t)samples * (size_t)session->steps;
    int32_t *n_pages = NULL, *token = NULL;
    float *logprob = NULL;
    psoup_status status;
    batch->ahead = steps;
    PSOUP__TRY(allocate(session, error));
    if (mixed)
        PSOUP__TRY(psoup__tape_mixed(session->tape, error));
    status = PSOUP_ERROR_MEMORY;
    if (!(n_pages = psoup__alloc(model->context, (size_t)batch->n, sizeof *n_pages, error)) ||
        !(token = psoup__alloc(model->context, cells, sizeof *token, error)) ||
        !(logprob = psoup__alloc(model->context, cells, sizeof *logprob, error)))
        goto fail;
    for (int32_t i = 0; i < batch->n; i++)
        n_pages[i] = i < rows ? session->parts[i].s->n_pages : 1;
    psoup__cached cached = {session->cache, session->pages, n_pages, session->past};
    PSOUP__TRY(psoup__tape_prepare(session->tape, batch, false, &cached, error));
    PSOUP__TRY(upload(session, samples, sequences, error));
    be->ops->record(be);
    step(session, &cached, sequences, mixed);
    PSOUP__TRY(be->ops->replay(be, steps, error));
    PSOUP__TRY(be->ops->read(be, token, session->window.token, cells * sizeof *token, error));
    PSOUP__TRY(be->ops->read(be, logprob, session->window.logprob, cells * sizeof *logprob, error));
    status = deliver(session, rows, steps, token, logprob, on_token, user, error);
fail:
    psoup__free(model->context, n_pages);
    psoup__free(model->context, token);
    psoup__free(model->context, logprob);
    return status;
}
