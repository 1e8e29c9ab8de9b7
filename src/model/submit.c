/* What a session is given: a prompt with its sampling and mix is checked and copied into the queue. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model/session.h"

void psoup__sequence_free(psoup_context *context, sequence *s) {
    if (!s)
        return;
    psoup__free(context, s->stop);
    psoup__free(context, s->pages);
    psoup__free(context, s->tokens);
    psoup__free(context, s->mix);
    psoup__free(context, s->views);
    psoup__free(context, s->banned);
    psoup__free(context, s);
}

psoup_status psoup__sampling_check(const psoup_model *model, const psoup_sampling *s, psoup_error *error) {
    if (s->max_new_tokens < 1 || s->min_new_tokens < 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_sampling: max_new_tokens %d, min_new_tokens %d: expected at "
                           "least 1 and at least 0",
                           (int)s->max_new_tokens, (int)s->min_new_tokens);
    if (s->min_new_tokens > s->max_new_tokens)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_sampling: min_new_tokens %d exceeds max_new_tokens %d",
                           (int)s->min_new_tokens, (int)s->max_new_tokens);
    if (!(s->temperature >= 0) || !isfinite(s->temperature))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_sampling: temperature is %g; expected 0 or more",
                           (double)s->temperature);
    if (!(s->top_p >= 0 && s->top_p <= 1) || s->top_k < 0 || s->no_repeat_ngram_size < 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_sampling: top_k %d, top_p %g, no_repeat_ngram_size %d: expected "
                           "0 or more, 0 … 1, 0 or more",
                           (int)s->top_k, (double)s->top_p, (int)s->no_repeat_ngram_size);
    for (size_t i = 0; s->stop_tokens && i < s->n_stop_tokens; i++)
        if (s->stop_tokens[i] < 0 || s->stop_tokens[i] >= model->config.vocab_size)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "psoup_sampling: stop token %d is out of range; the vocabulary has "
                               "%d",
                               (int)s->stop_tokens[i], (int)model->config.vocab_size);
    return PSOUP_OK;
}

static psoup_status check_tokens(const psoup_model *model, int64_t id, const int32_t *tokens, size_t n,
                                 psoup_error *error) {
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= model->config.vocab_size)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "prompt %lld: token %d is out of range; the vocabulary has %d",
                               (long long)id, (int)tokens[i], (int)model->config.vocab_size);
    return PSOUP_OK;
}

static psoup_status check_prompt(const psoup_session *session, int64_t id,
                                 const psoup_prompt *prompt, psoup_error *error) {
    if (!prompt->tokens || prompt->n == 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "prompt %lld has no tokens",
                           (long long)id);
    if (prompt->n >= (size_t)session->max_tokens)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "prompt %lld has %zu tokens; a place of this session holds %d, prompt "
                           "and output together",
                           (long long)id, prompt->n, (int)session->max_tokens);
    if (!isfinite(prompt->mix_strength) || prompt->reserved[0])
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "prompt %lld: mix_strength %g, reserved %llu: expected a finite number, and 0",
                           (long long)id, (double)prompt->mix_strength, (unsigned long long)prompt->reserved[0]);
    return check_tokens(session->model, id, prompt->tokens, prompt->n, error);
}

/* The prompt's mix, and whose logits it mixes. */
static psoup_status copy_mix(psoup_session *session, const psoup_prompt *prompt, sequence *s, psoup_error *error) {
    psoup_model *model = session->model;
    size_t adapters = (size_t)model->n_adapters;
    const float strength = prompt->mix_strength != 0 ? prompt->mix_strength : 1;
    char what[32];
    if (!(s->mix = psoup__alloc(model->context, adapters, sizeof *s->mix, error)))
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; prompt->mix && i < adapters; i++)
        s->mix[i] = strength * prompt->mix[i];
    s->method = prompt->mix_method;
    s->n_views = 1;
    snprintf(what, sizeof what, "prompt %lld", (long long)s->id);
    psoup_status status = psoup__mix_check(model, s->mix, s->method, what, error);
    if (status != PSOUP_OK || s->method != PSOUP_MIX_LOGITS)
        return status;
    s->n_views = psoup__mix_views(model, s->mix, NULL);
    if (s->n_views > session->places)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s mixes the logits of %d policies, each of which takes a place; the session has %d", what,
                           (int)s->n_views, (int)session->places);
    if (!(s->views = psoup__alloc(model->context, (size_t)s->n_views, sizeof *s->views, error)))
        return PSOUP_ERROR_MEMORY;
    psoup__mix_views(model, s->mix, s->views);
    return PSOUP_OK;
}

static psoup_status copy_sequence(psoup_session *session, const psoup_prompt *prompt,
                                  sequence *s, psoup_error *error) {
    psoup_model *model = session->model;
    psoup_context *context = model->context;
    const int32_t *stop = s->sampling.stop_tokens;
    size_t n_stop = s->sampling.n_stop_tokens;
    int32_t ends[PSOUP__END_TOKENS];
    if (!stop) {
        stop = ends;
        n_stop = psoup__end_tokens(&model->config, ends);
    }
    s->prompt = s->length = (int32_t)prompt->n;
    s->room = session->max_tokens - s->prompt;
    s->room = s->room < s->sampling.max_new_tokens ? s->room : s->sampling.max_new_tokens;
    s->n_stop = (int32_t)n_stop;
    s->edition = model->edition;
    psoup_status status = copy_mix(session, prompt, s, error);
    if (status != PSOUP_OK)
        return status;
    s->n_pages = psoup__cache_pages(session->cache, s->prompt + s->room);
    int64_t pages = (int64_t)s->n_pages * s->n_views, room = session->cache->pages - (session->cache->spare >= 0);
    if (pages > room)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "prompt %lld mixes the logits of %d policies, whose %d tokens each take %lld pages of the "
                           "cache; it has %lld",
                           (long long)s->id, (int)s->n_views, (int)(s->prompt + s->room), (long long)pages,
                           (long long)room);
    size_t most = (size_t)s->prompt + (size_t)s->room, adapters = (size_t)model->n_adapters;
    size_t history = s->sampling.no_repeat_ngram_size > 0 ? most : 0;
    bool whole = (s->tokens = psoup__alloc(context, most, sizeof *s->tokens, error)) &&
                 (s->stop = psoup__alloc(context, n_stop, sizeof *s->stop, error)) &&
                 (s->pages = psoup__alloc(context, (size_t)pages, sizeof *s->pages, error)) &&
                 (s->banned = psoup__alloc(context, n_stop + history, sizeof *s->banned, error));
    if (!whole)
        return PSOUP_ERROR_MEMORY;
    memcpy(s->tokens, prompt->tokens, prompt->n * sizeof *s->tokens);
    if (n_stop)
        memcpy(s->stop, stop, n_stop * sizeof *s->stop);
    s->sampling.stop_tokens = s->stop;
    return psoup__reserve(context, &session->mix, &session->mix_capacity,
                          (size_t)session->places * adapters, sizeof *session->mix, error);
}

/* What was drawn before is read like a prompt; place, limits and random words count it as drawn. */
static psoup_status take_drawn(const psoup_session *session, sequence *s, const int32_t *drawn, size_t n,
                               psoup_error *error) {
    if (n >= (size_t)s->room)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "prompt %lld: %zu tokens were drawn before; it has room for %d",
                           (long long)s->id, n, (int)s->room);
    psoup_status status = check_tokens(session->model, s->id, drawn, n, error);
    if (status != PSOUP_OK)
        return status;
    memcpy(s->tokens + s->prompt, drawn, n * sizeof *drawn);
    s->length += (int32_t)n;
    return PSOUP_OK;
}

psoup_status psoup_session_submit(psoup_session *session, int64_t id, const psoup_prompt *prompt,
                                  psoup_error *error) {
    return psoup__session_go_on(session, id, prompt, NULL, 0, error);
}

psoup_status psoup__session_go_on(psoup_session *session, int64_t id, const psoup_prompt *prompt,
                                  const int32_t *drawn, size_t n, psoup_error *error) {
    if (!session || !prompt)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_session_submit: an argument is NULL");
    psoup_context *context = session->model->context;
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    sequence *s = NULL;
    psoup_status status;
    PSOUP__TRY(psoup__options(&sampling, sizeof sampling, prompt->sampling, "psoup_sampling",
                              error));
    PSOUP__TRY(psoup__sampling_check(session->model, &sampling, error));
    PSOUP__TRY(check_prompt(session, id, prompt, error));
    s = psoup__alloc(context, 1, sizeof *s, error);
    if (!s)
        return PSOUP_ERROR_MEMORY;
    s->id = id;
    s->stream = prompt->sequence;
    s->sampling = sampling;
    PSOUP__TRY(copy_sequence(session, prompt, s, error));
    if (n)
        PSOUP__TRY(take_drawn(session, s, drawn, n, error));
    if (session->last_waiting)
        session->last_waiting->next = s;
    else
        session->first_waiting = s;
    session->last_waiting = s;
    session->n_waiting++;
    return PSOUP_OK;
fail:
    psoup__sequence_free(context, s);
    return status;
}
