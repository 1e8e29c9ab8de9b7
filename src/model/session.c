/* Continuous batching: every step runs one packed batch of all running sequences, one row for each
 * that decodes and a stretch of prompt for each that does not yet, over a cache of keys and values.
 *
 * Nothing of a step counts until a sequence's token is delivered: a step that fails or is stopped is
 * simply done again by the next, with the same bits. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model/session.h"

/* ---- create and free -------------------------------------------------------------------------- */

void psoup_session_free(psoup_session *session) {
    if (!session)
        return;
    psoup_context *context = session->model->context;
    psoup__backend *be = session->model->be;
    for (int32_t i = 0; i < session->n_running; i++)
        psoup__sequence_free(context, session->running[i]);
    while (session->first_waiting) {
        sequence *s = session->first_waiting;
        session->first_waiting = s->next;
        psoup__sequence_free(context, s);
    }
    psoup__tape_free(session->tape);
    psoup__cache_free(session->cache);
    psoup__window_free(session);
    void *device[] = {session->device_token, session->device_logprob, session->device_draws,
                      session->device_banned};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++)
        be->ops->release(be, device[i]);
    void *host[] = {session->running, session->parts, session->tokens,     session->start,
                    session->pages,   session->past,  session->mix,        session->draws,
                    session->drawn,   session->logprobs, session->sample_row, session->method,
                    session->sample_first, session->sample_weight, session};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++)
        psoup__free(context, host[i]);
}

static psoup_status allocate(psoup_session *s, psoup_error *error) {
    psoup_model *model = s->model;
    psoup_context *context = model->context;
    const psoup__ops *ops = model->be->ops;
    size_t places = (size_t)s->places, chunk = (size_t)s->tape->chunk_rows;
    bool whole =
        (s->device_token = ops->alloc(model->be, chunk, sizeof *s->device_token, error)) &&
        (s->device_logprob = ops->alloc(model->be, chunk, sizeof *s->device_logprob, error)) &&
        (s->device_draws = ops->alloc(model->be, chunk, sizeof *s->device_draws, error)) &&
        (s->running = psoup__alloc(context, places, sizeof *s->running, error)) &&
        (s->parts = psoup__alloc(context, places, sizeof *s->parts, error)) &&
        (s->tokens = psoup__alloc(context, places + (size_t)s->prefill_rows, sizeof *s->tokens,
                                  error)) &&
        (s->start = psoup__alloc(context, places + 1, sizeof *s->start, error)) &&
        (s->pages = psoup__alloc(context, places, sizeof *s->pages, error)) &&
        (s->past = psoup__alloc(context, places, sizeof *s->past, error)) &&
        (s->sample_row = psoup__alloc(context, places, sizeof *s->sample_row, error)) &&
        (s->sample_first = psoup__alloc(context, places + 1, sizeof *s->sample_first, error)) &&
        (s->sample_weight = psoup__alloc(context, places, sizeof *s->sample_weight, error)) &&
        (s->method = psoup__alloc(context, places, sizeof *s->method, error)) &&
        (s->draws = psoup__alloc(context, places, sizeof *s->draws, error)) &&
        (s->drawn = psoup__alloc(context, places, sizeof *s->drawn, error)) &&
        (s->logprobs = psoup__alloc(context, places, sizeof *s->logprobs, error));
    return whole ? PSOUP_OK : PSOUP_ERROR_MEMORY;
}

psoup_status psoup__session_check(const psoup_session_options *o, psoup_error *error) {
    if (o->max_sequences < 0 || o->max_tokens < 0 || o->prefill_rows < 0 || o->reserved ||
        o->cache_tokens < 0 || o->steps < 0 || o->steps > 1024 || o->reserved2)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_session_options: max_sequences %d, max_tokens %d, prefill_rows %d, "
                           "reserved %d, cache_tokens %lld, steps %d, reserved2 %d: expected no negative number, "
                           "at most 1024 steps, and reserved ones 0",
                           (int)o->max_sequences, (int)o->max_tokens, (int)o->prefill_rows,
                           (int)o->reserved, (long long)o->cache_tokens, (int)o->steps, (int)o->reserved2);
    return PSOUP_OK;
}

psoup_status psoup_session_create(psoup_model *model, const psoup_session_options *options,
                                  psoup_session **out, psoup_error *error) {
    psoup_session_options full = PSOUP_SESSION_OPTIONS_INIT;
    psoup_session *session = NULL;
    if (!model || !out)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_session_create: an argument is NULL");
    *out = NULL;
    psoup_status status;
    PSOUP__TRY(psoup__options(&full, sizeof full, options, "psoup_session_options", error));
    PSOUP__TRY(psoup__session_check(&full, error));
    session = psoup__alloc(model->context, 1, sizeof *session, error);
    if (!session)
        return PSOUP_ERROR_MEMORY;
    int32_t longest = model->config.max_position_embeddings;
    session->model = model;
    session->places = full.max_sequences ? full.max_sequences : 32;
    session->prefill_rows = full.prefill_rows ? full.prefill_rows : 512;
    session->max_tokens =
        full.max_tokens && full.max_tokens < longest ? full.max_tokens : longest;
    /* More than the places hold is never pending. */
    int64_t most = (int64_t)session->places * session->max_tokens;
    most = most < INT32_MAX / 2 ? most : INT32_MAX / 2;
    session->prefill_rows = session->prefill_rows < most ? session->prefill_rows : (int32_t)most;
    PSOUP__TRY(psoup__tape_create(model, &session->tape, error));
    PSOUP__TRY(psoup__tape_chunk(session->tape, error));
    PSOUP__TRY(psoup__cache_create(model, session->places, session->max_tokens, full.cache_tokens,
                                   &session->cache, error));
    PSOUP__TRY(allocate(session, error));
    session->steps = model->be->ops->replay ? (full.steps ? full.steps : 8) : 1;
    *out = session;
    return PSOUP_OK;
fail:
    psoup_session_free(session);
    return status;
}

/* ---- one step --------------------------------------------------------------------------------- */

static void admit(psoup_session *session) {
    while (session->first_waiting) {
        sequence *s = session->first_waiting;
        if (session->views_running + s->n_views > session->places ||
            !psoup__cache_take(session->cache, s->pages, s->n_pages * s->n_views))
            return; /* until others have finished; all pages hold any one sequence */
        session->first_waiting = s->next;
        if (!s->next)
            session->last_waiting = NULL;
        session->n_waiting--;
        s->next = NULL;
        session->running[session->n_running++] = s;
        session->views_running += s->n_views;
    }
}

/* Tokens that may not come next. No-repeat: a token that would complete an n-gram seen before
 * (transformers' NoRepeatNGramLogitsProcessor). Min new tokens: the stop tokens. */
static int32_t ban(sequence *s) {
    int32_t n = 0, size = s->sampling.no_repeat_ngram_size;
    if (s->length - s->prompt < s->sampling.min_new_tokens)
        for (; n < s->n_stop; n++)
            s->banned[n] = s->stop[n];
    if (size == 0 || s->length + 1 < size)
        return n;
    const int32_t *last = s->tokens + s->length - (size - 1);
    size_t width = (size_t)(size - 1) * sizeof *last;
    for (int32_t i = 0; i + size <= s->length; i++)
        if (memcmp(s->tokens + i, last, width) == 0)
            s->banned[n++] = s->tokens[i + size - 1];
    return n;
}

/* Prompt tokens that a sequence takes of the step's budget, where each counts for every view; one at least while
 * nobody else has had any. */
static int32_t take_prompt(const psoup_session *session, const sequence *s, int32_t pending, int32_t *budget) {
    int32_t share = *budget / s->n_views;
    if (share == 0 && *budget == session->prefill_rows)
        share = 1;
    int32_t take = pending < share ? pending : share;
    *budget -= take * s->n_views < *budget ? take * s->n_views : *budget;
    return take;
}

/* The part that a view of a sequence has in the batch, which has `rows` rows so far. */
static void add_part(psoup_session *session, sequence *s, int32_t view, int32_t take, int32_t n, int32_t rows) {
    size_t adapters = (size_t)session->model->n_adapters;
    float *mix = session->mix + (size_t)n * adapters;
    session->start[n] = rows;
    session->pages[n] = s->pages + (size_t)view * (size_t)s->n_pages;
    session->past[n] = s->past;
    session->method[n] = s->views ? PSOUP_MIX_DELTA : s->method;
    memcpy(session->tokens + rows, s->tokens + s->past, (size_t)take * sizeof *s->tokens);
    if (adapters && !s->views)
        memcpy(mix, s->mix, adapters * sizeof *mix);
    if (adapters && s->views)
        memset(mix, 0, adapters * sizeof *mix);
    if (s->views && s->views[view].adapter >= 0)
        mix[s->views[view].adapter] = 1;
    session->parts[n] = (part){.s = s, .take = take, .view = view, .ready = take == s->length - s->past,
                               .last = rows + take - 1, .sampled = -1};
}

static void add_sample(psoup_session *session, int32_t at, int32_t sample) {
    sequence *s = session->parts[at].s;
    const psoup_sampling *sampling = &s->sampling;
    int32_t first = session->sample_first[sample];
    session->parts[at].sampled = sample;
    for (int32_t v = 0; v < s->n_views; v++) {
        session->sample_row[first + v] = session->parts[at + v].last;
        session->sample_weight[first + v] = s->views ? s->views[v].weight : 1;
    }
    session->sample_first[sample + 1] = first + s->n_views;
    session->draws[sample] = (psoup__draw){.temperature = sampling->temperature,
                                           .top_k = sampling->top_k,
                                           .top_p = sampling->top_p,
                                           .seed = sampling->seed,
                                           .sequence = s->stream,
                                           .position = (uint64_t)(s->length - s->prompt),
                                           .banned = s->banned,
                                           .n_banned = ban(s)};
}

/* The batch of this step: who takes part with how many rows, and who gets a token. */
static psoup_status gather(psoup_session *session, psoup__batch *batch, int32_t *samples,
                           psoup_error *error) {
    int32_t n = 0, rows = 0, budget = session->prefill_rows;
    *samples = 0;
    for (int32_t i = 0; i < session->n_running; i++) {
        sequence *s = session->running[i];
        if (s->edition != session->model->edition)
            return psoup__fail(error, PSOUP_ERROR_STATE,
                               "adapters were added or removed while sequence %lld was under way",
                               (long long)s->id);
        int32_t take = s->length - s->past;
        if (take > 1 || s->length == s->prompt)
            take = take_prompt(session, s, take, &budget);
        for (int32_t v = 0; take > 0 && v < s->n_views; v++, n++, rows += take)
            add_part(session, s, v, take, n, rows);
    }
    session->start[n] = rows;
    session->sample_first[0] = 0;
    for (int32_t i = 0; i < n; i++)
        if (session->parts[i].view == 0 && session->parts[i].ready)
            add_sample(session, i, (*samples)++);
    *batch = (psoup__batch){.n = n,
                            .rows = rows,
                            .tokens = session->tokens,
                            .start = session->start,
                            .mix = session->model->n_adapters ? session->mix : NULL,
                            .method = session->method};
    return PSOUP_OK;
}

/* Draws and what they ban, onto the device. */
static psoup_status upload_draws(psoup_session *session, psoup__draw *draws, int32_t rows,
                                 psoup_error *error) {
    psoup__backend *be = session->model->be;
    size_t banned = 0;
    for (int32_t i = 0; i < rows; i++)
        banned += (size_t)draws[i].n_banned;
    if (banned > session->banned_capacity) {
        be->ops->release(be, session->device_banned);
        session->banned_capacity = 0;
        session->device_banned = be->ops->alloc(be, 2 * banned, sizeof *session->device_banned, error);
        if (!session->device_banned)
            return PSOUP_ERROR_MEMORY;
        session->banned_capacity = 2 * banned;
    }
    int32_t *to = session->device_banned;
    for (int32_t i = 0; i < rows; i++) {
        be->ops->write(be, to, draws[i].banned, (size_t)draws[i].n_banned * sizeof *to);
        draws[i].banned = to;
        to += draws[i].n_banned;
    }
    be->ops->write(be, session->device_draws, draws, (size_t)rows * sizeof *draws);
    return PSOUP_OK;
}

static psoup_status draw(psoup_session *session, int32_t samples, psoup_error *error) {
    psoup_model *model = session->model;
    const psoup__ops *ops = model->be->ops;
    psoup__tape *tape = session->tape;
    psoup_status status = PSOUP_OK;
    for (int32_t first = 0, rows; first < samples; first += rows) {
        const int32_t *entry = session->sample_first + first;
        float *logits = NULL;
        for (rows = 1; first + rows < samples && entry[rows + 1] - entry[0] <= tape->chunk_rows;)
            rows++;
        psoup__mixtures mixtures = {session->sample_row, session->sample_weight, entry, rows};
        PSOUP__TRY(psoup__mixed_logits(tape, &mixtures, &logits, error));
        PSOUP__TRY(upload_draws(session, session->draws + first, rows, error));
        ops->sample(model->be, session->device_token, session->device_logprob, logits,
                    session->device_draws, rows, model->config.vocab_size);
        PSOUP__TRY(ops->read(model->be, session->drawn + first, session->device_token,
                             (size_t)rows * sizeof(int32_t), error));
        PSOUP__TRY(ops->read(model->be, session->logprobs + first, session->device_logprob,
                             (size_t)rows * sizeof(float), error));
    }
fail:
    return status;
}

/* Appends a token and says whether it was the last. */
static psoup_finish take_token(sequence *s, int32_t token) {
    if (token < 0)
        return PSOUP_FINISH_ERROR;
    s->tokens[s->length++] = token;
    for (int32_t i = 0; !s->sampling.ignore_stop && i < s->n_stop; i++)
        if (token == s->stop[i])
            return PSOUP_FINISH_STOP;
    return s->length == s->prompt + s->room ? PSOUP_FINISH_LENGTH : PSOUP_FINISH_NONE;
}

static void retire(psoup_session *session, sequence *s) {
    int32_t i = 0;
    while (session->running[i] != s)
        i++;
    session->n_running--;
    session->views_running -= s->n_views;
    memmove(session->running + i, session->running + i + 1,
            (size_t)(session->n_running - i) * sizeof *session->running);
    psoup__cache_give(session->cache, s->pages, s->n_pages * s->n_views);
    psoup__sequence_free(session->model->context, s);
}

psoup_status psoup__session_deliver(psoup_session *session, int32_t *parts, psoup_token_fn on_token, void *user,
                                    psoup_error *error) {
    int32_t n = *parts;
    *parts = 0;
    for (int32_t i = 0; i < n; i++) {
        const part p = session->parts[i];
        sequence *s = p.s; /* which the part of its first view may have ended */
        if (p.view > 0)
            continue;
        s->past += p.take;
        if (p.sampled < 0)
            continue;
        int32_t token = session->drawn[p.sampled];
        float logprob = session->logprobs[p.sampled];
        int64_t id = s->id;
        psoup_finish finish = take_token(s, token);
        if (finish != PSOUP_FINISH_NONE)
            retire(session, s);
        else
            session->parts[(*parts)++] = p;
        if (on_token && on_token(user, id, token, logprob, finish))
            return psoup__fail(error, PSOUP_ERROR_CANCELLED, "stopped by the token callback");
    }
    return PSOUP_OK;
}

psoup_status psoup_session_step(psoup_session *session, psoup_token_fn on_token, void *user,
                                size_t *running, psoup_error *error) {
    psoup__batch batch;
    int32_t samples = 0;
    psoup_status status = PSOUP_OK;
    if (!session)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_session_step: an argument is NULL");
    admit(session);
    if (session->n_running > 0) {
        PSOUP__TRY(gather(session, &batch, &samples, error));
        if (psoup__window_fits(session, &batch, samples)) {
            status = psoup__window_run(session, &batch, samples, on_token, user, error);
            if (status != PSOUP_ERROR_UNSUPPORTED)
                goto fail;
            session->steps = 1; /* nothing was done */
            PSOUP__TRY(gather(session, &batch, &samples, error));
        }
        psoup__cached cached = {.cache = session->cache, .pages = session->pages, .past = session->past};
        PSOUP__TRY(psoup__forward_cached(session->model, session->tape, &batch, false, &cached, error));
        PSOUP__TRY(draw(session, samples, error));
        int32_t parts = batch.n;
        PSOUP__TRY(psoup__session_deliver(session, &parts, on_token, user, error));
    }
fail:
    if (running)
        *running = (size_t)session->n_running + session->n_waiting;
    return status;
}
