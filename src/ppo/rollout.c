/* Rollouts: all policies sample in one continuous batch. What a policy draws depends on its seed and
 * its running rollout number alone. */
#include <stdatomic.h>
#include <string.h>

#include "ppo/rollout.h"

psoup_status psoup__rollouts_reserve(psoup__rollouts *rollouts, psoup_context *context, size_t n,
                                     size_t adapters, size_t sources, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t a = rollouts->capacity, b = a, c = a, d = a, e = a * adapters, f = a * sources, g = a, h = f;
    PSOUP__TRY(psoup__reserve(context, &rollouts->prompt, &a, n + 1, sizeof(*rollouts->prompt),
                              error));
    PSOUP__TRY(psoup__reserve(context, &rollouts->start, &b, n + 1, sizeof(*rollouts->start),
                              error));
    PSOUP__TRY(psoup__reserve(context, &rollouts->finish, &c, n + 1, sizeof(*rollouts->finish),
                              error));
    PSOUP__TRY(psoup__reserve(context, &rollouts->score, &d, n + 1, sizeof(*rollouts->score),
                              error));
    /* As many columns as `capacity` says, which more than n + 1 may have been made for. */
    PSOUP__TRY(psoup__reserve(context, &rollouts->weight, &e, d * adapters, sizeof(*rollouts->weight), error));
    PSOUP__TRY(psoup__reserve(context, &rollouts->part_score, &f, d * sources, sizeof(*rollouts->part_score),
                              error));
    PSOUP__TRY(psoup__reserve(context, &rollouts->share, &h, d * sources, sizeof(*rollouts->share), error));
    PSOUP__TRY(psoup__reserve(context, &rollouts->mine, &g, n + 1, sizeof(*rollouts->mine), error));
    rollouts->capacity = d;
    rollouts->adapters = adapters;
    rollouts->sources = sources;
    rollouts->n = n;
    rollouts->tokens = 0;
    rollouts->diverged = false;
fail:
    return status;
}

void psoup__rollouts_free(psoup__rollouts *rollouts, psoup_context *context) {
    psoup__free(context, rollouts->prompt);
    psoup__free(context, rollouts->start);
    psoup__free(context, rollouts->response);
    psoup__free(context, rollouts->finish);
    psoup__free(context, rollouts->score);
    psoup__free(context, rollouts->weight);
    psoup__free(context, rollouts->part_score);
    psoup__free(context, rollouts->share);
    psoup__free(context, rollouts->mine);
    *rollouts = (psoup__rollouts){.n = 0};
}

void psoup__rollouts_deal(psoup__rollouts *out, psoup__team *team, bool responses) {
    psoup__team_deal(team);
    for (size_t i = 0; i < out->n; i++) {
        size_t rows = out->prompt[i]->n + (responses ? (size_t)(out->start[i + 1] - out->start[i]) : 0);
        bool again = !responses && i && out->prompt[i] == out->prompt[i - 1];
        out->mine[i] = again ? out->mine[i - 1] : psoup__team_mine(team, (int64_t)rows);
    }
}

/* What was drawn for one prompt. One thread draws; what `said` counts another may read meanwhile. */
typedef struct answer {
    int32_t *tokens;
    _Atomic uint64_t said; /* tokens · 8 + finish */
} answer;

static void say(answer *a, size_t n, psoup_finish finish) {
    atomic_store_explicit(&a->said, (uint64_t)n * 8 + (uint64_t)finish, memory_order_release);
}

static size_t said(const answer *a, psoup_finish *finish) {
    uint64_t both = atomic_load_explicit(&a->said, memory_order_acquire);
    *finish = (psoup_finish)(both % 8);
    return (size_t)(both / 8);
}

/* Takes note of an answer: it is kept up to and with its first end token, also where sampling went on past
 * it. Its length stands in start[i + 1] until all are known. */
static void note(const psoup_model *model, psoup__rollouts *out, size_t i, const answer *a) {
    int32_t ends[PSOUP__END_TOKENS];
    psoup_finish finish;
    size_t n = 0, drawn = said(a, &finish), n_ends = psoup__end_tokens(&model->config, ends);
    bool ended = false;
    for (; n < drawn && !ended; n++)
        for (size_t e = 0; e < n_ends; e++)
            ended = ended || a->tokens[n] == ends[e];
    if (finish == PSOUP_FINISH_ERROR)
        out->diverged = true;
    out->start[i + 1] = (int32_t)n;
    out->finish[i] = ended && finish != PSOUP_FINISH_ERROR ? PSOUP_FINISH_STOP : finish;
}

/* What the other ranks noted: lengths, ends and whether any diverged. */
static psoup_status share_notes(psoup_context *context, psoup__team *team, psoup__rollouts *out,
                                psoup_error *error) {
    if (!team->comm)
        return PSOUP_OK;
    int32_t *notes = psoup__alloc(context, 2 * out->n + 1, sizeof(*notes), error);
    if (!notes)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < out->n; i++)
        if (out->mine[i]) {
            notes[2 * i] = out->start[i + 1];
            notes[2 * i + 1] = (int32_t)out->finish[i];
        }
    notes[2 * out->n] = out->diverged;
    psoup_status status = psoup__team_sum_ids(team, notes, 2 * out->n + 1, error);
    for (size_t i = 0; i < out->n; i++) {
        out->start[i + 1] = notes[2 * i];
        out->finish[i] = (psoup_finish)notes[2 * i + 1];
    }
    out->diverged = notes[2 * out->n] > 0;
    psoup__free(context, notes);
    return status;
}

/* ---- sampling -------------------------------------------------------------------------------------- */

enum {
    TOGETHER = 256, /* rows by which a CPU multiplies as fast as it can: more only drive one another's keys and
                     * activations out of its caches */
    ALONE = 64      /* rows by which one of its threads does, or nearly */
};

/* Answers to n prompts. On a CPU with rows enough, each thread has a session of its own: no thread waits for another
 * at every op of a small model. Each begins with its part of the prompts, which keeps a policy's together, and takes half
 * of the longest part left when its own is done. A draw depends on none of it. */
typedef struct samples {
    psoup_model *model;
    psoup__team *team;
    const psoup__request *requests;
    size_t n_requests;
    psoup__pause *pause; /* or NULL */
    atomic_bool halt;    /* no session goes on */
    const psoup_prompt *prompts;
    answer *answers; /* [n] */
    int32_t *tokens; /* [n, limit] theirs */
    size_t n, limit, sessions;
    _Atomic uint64_t *part; /* [sessions] prompts not begun: first · 2³² + end */
    psoup_session_options session;
    psoup_status *status; /* [sessions] */
    psoup_error *errors;  /* [sessions] */
} samples;

int32_t psoup__rollout_places(const psoup_model *model, size_t n, int32_t max_sequences, size_t *sessions) {
    size_t threads = (size_t)model->context->threads;
    size_t most = psoup__gradients(model) > 1 ? threads * ALONE : TOGETHER; /* a small model's keys should lie near, too */
    size_t places = max_sequences ? (size_t)max_sequences : model->be->ops->record ? n : most;
    *sessions = !model->be->ops->record && n >= threads * ALONE && places >= threads * ALONE ? threads : 1;
    size_t share = (n + *sessions - 1) / *sessions;
    places /= *sessions;
    return (int32_t)(places < share ? places : share);
}

static int take_token(void *user, int64_t id, int32_t token, float logprob, psoup_finish finish) {
    answer *a = &((samples *)user)->answers[id];
    psoup_finish before;
    size_t n = said(a, &before);
    if (token >= 0)
        a->tokens[n++] = token;
    say(a, n, finish);
    (void)logprob;
    return 0;
}

static uint64_t left_of(uint64_t part) { return (uint32_t)part - (part >> 32); }

/* The session's next prompt, or n. */
static size_t next_prompt(samples *s, size_t session) {
    for (;;) {
        uint64_t part = atomic_load(&s->part[session]);
        while (left_of(part))
            if (atomic_compare_exchange_weak(&s->part[session], &part, part + ((uint64_t)1 << 32)))
                return part >> 32;
        size_t from = session;
        for (size_t i = 0; i < s->sessions; i++) {
            uint64_t other = atomic_load(&s->part[i]);
            if (left_of(other) > left_of(part)) {
                part = other;
                from = i;
            }
        }
        if (!left_of(part))
            return s->n;
        uint64_t end = (uint32_t)part, middle = end - (left_of(part) + 1) / 2;
        if (atomic_compare_exchange_strong(&s->part[from], &part, part - end + middle))
            atomic_store(&s->part[session], middle << 32 | end);
    }
}

static psoup_status gather(samples *s, psoup_error *error);

/* Between two steps, by the caller's own thread. */
static psoup_status ask(samples *s, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    switch (s->pause->ask(s->pause->user)) {
    case PSOUP__GO_ON:
        break;
    case PSOUP__KEEP:
        if (!s->team->comm)
            status = gather(s, error);
        if (!s->team->comm && status == PSOUP_OK)
            status = s->pause->keep(s->pause->user, error);
        break;
    case PSOUP__STOP:
        s->pause->stopped = true;
        s->halt = true;
    }
    return status;
}

static psoup_status decode(samples *s, size_t number, bool asks, psoup_error *error) {
    psoup_session *session = NULL;
    psoup_status status = PSOUP_OK;
    const size_t places = (size_t)s->session.max_sequences;
    PSOUP__TRY(psoup_session_create(s->model, &s->session, &session, error));
    for (size_t running = 0; !s->halt;) {
        for (size_t i; running < places && (i = next_prompt(s, number)) < s->n;) {
            psoup_finish finish;
            size_t drawn = said(&s->answers[i], &finish);
            if (finish != PSOUP_FINISH_NONE)
                continue;
            PSOUP__TRY(psoup__session_go_on(session, (int64_t)i, &s->prompts[i], s->answers[i].tokens, drawn, error));
            running++;
        }
        if (running == 0)
            break;
        PSOUP__TRY(psoup_session_step(session, take_token, s, &running, error));
        if (asks)
            PSOUP__TRY(ask(s, error));
    }
fail:
    psoup_session_free(session);
    return status;
}

static void run_session(void *arg, size_t task, int worker) {
    samples *s = arg;
    s->status[task] = decode(s, task, s->pause && worker == 0, &s->errors[task]);
    if (s->status[task] != PSOUP_OK)
        s->halt = true;
}

static void samples_free(samples *s) {
    psoup_context *context = s->model->context;
    psoup__free(context, s->answers);
    psoup__free(context, s->tokens);
    psoup__free(context, s->part);
    psoup__free(context, s->status);
    psoup__free(context, s->errors);
}

/* Answers that were begun before, to the prompts of this rank. */
static psoup_status recall(samples *s, psoup_error *error) {
    size_t k = 0;
    for (size_t r = 0; r < s->n_requests; r++) {
        const psoup__rollouts *out = s->requests[r].out;
        const psoup__begun *begun = s->requests[r].begun;
        if (!begun || !begun->n) {
            for (size_t i = 0; i < out->n; i++)
                k += out->mine[i];
            continue;
        }
        if (!psoup__begun_fits(begun, out->n, s->limit, s->model->config.vocab_size))
            return psoup__fail(error, PSOUP_ERROR_FORMAT, "the responses that were begun are none of this step");
        const int32_t *tokens = begun->data + 2 * out->n;
        for (size_t i = 0; i < out->n; i++) {
            size_t drawn = (size_t)begun->data[2 * i];
            if (out->mine[i]) {
                memcpy(s->answers[k].tokens, tokens, drawn * sizeof(*tokens));
                say(&s->answers[k++], drawn, (psoup_finish)begun->data[2 * i + 1]);
            }
            tokens += drawn;
        }
    }
    return PSOUP_OK;
}

static psoup_status sample(samples *s, int32_t max_sequences, psoup_error *error) {
    psoup_context *context = s->model->context;
    psoup_status status = PSOUP_OK;
    size_t size;
    if (s->n == 0)
        return PSOUP_OK;
    s->session.max_sequences = psoup__rollout_places(s->model, s->n, max_sequences, &s->sessions);
    s->part = psoup__alloc(context, s->sessions, sizeof(*s->part), error);
    s->status = psoup__alloc(context, s->sessions, sizeof(*s->status), error);
    s->errors = psoup__alloc(context, s->sessions, sizeof(*s->errors), error);
    s->answers = psoup__alloc(context, s->n, sizeof(*s->answers), error);
    s->tokens = psoup__multiply(s->n, s->limit, &size) ? psoup__alloc_unset(context, size, sizeof(*s->tokens), error) : NULL;
    if (!s->part || !s->status || !s->errors || !s->answers || !s->tokens)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < s->n; i++)
        s->answers[i].tokens = s->tokens + i * s->limit;
    for (size_t i = 0; i < s->sessions; i++)
        s->part[i] = (uint64_t)(i * s->n / s->sessions) << 32 | (i + 1) * s->n / s->sessions;
    PSOUP__TRY(recall(s, error));
    PSOUP__TRY(psoup__model_positions(s->model, s->session.max_tokens, error)); /* before they share it */
    psoup__parallel(context, s->sessions, run_session, s);
    for (size_t i = 0; i < s->sessions; i++)
        if (s->status[i] != PSOUP_OK) {
            if (error)
                *error = s->errors[i];
            return s->status[i];
        }
fail:
    return status;
}

/* Lays the responses out one after another, this rank's own from the `first` of those drawn on, and the others'. */
static psoup_status lay_out(const samples *s, psoup__rollouts *out, size_t *first, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = s->model->context;
    size_t own = *first;
    out->diverged = false;
    for (size_t i = 0; i < out->n; i++)
        if (out->mine[i])
            note(s->model, out, i, &s->answers[(*first)++]);
    PSOUP__TRY(share_notes(context, s->team, out, error));
    out->start[0] = 0;
    for (size_t i = 0; i < out->n; i++)
        out->start[i + 1] += out->start[i];
    out->tokens = (size_t)out->start[out->n];
    PSOUP__TRY(psoup__reserve(context, &out->response, &out->token_capacity, out->tokens,
                              sizeof(*out->response), error));
    for (size_t i = 0; i < out->n; i++) {
        size_t bytes = (size_t)(out->start[i + 1] - out->start[i]) * sizeof(*out->response);
        if (bytes && out->mine[i])
            memcpy(out->response + out->start[i], s->answers[own].tokens, bytes);
        else if (bytes)
            memset(out->response + out->start[i], 0, bytes);
        own += out->mine[i];
    }
    PSOUP__TRY(psoup__team_sum_ids(s->team, out->response, out->tokens, error));
fail:
    return status;
}

/* What there is, finished or not, to all requests. */
static psoup_status gather(samples *s, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t own = 0;
    for (size_t r = 0; status == PSOUP_OK && r < s->n_requests; r++)
        status = lay_out(s, s->requests[r].out, &own, error);
    return status;
}

/* The limits of a request's groups, drawn from low … high. */
static void draw_limits(const psoup_ppo_options *o, const psoup__request *request,
                        psoup_sampling *sampling /* [out->n] */) {
    psoup__random random = {psoup__seed_for(request->seed, PSOUP__FOR_LIMITS), request->step, 0};
    int32_t limit = o->max_new_tokens;
    for (size_t i = 0; i < request->out->n; i++) {
        if (i % (size_t)o->draw_group == 0) {
            uint32_t span = (uint32_t)(o->max_new_tokens - o->draw_new_tokens_from) + 1;
            limit = o->draw_new_tokens_from + (int32_t)psoup__random_below(&random, span);
        }
        sampling[i].max_new_tokens = limit;
        if (sampling[i].min_new_tokens > limit)
            sampling[i].min_new_tokens = limit;
    }
}

psoup_status psoup__sample_rollouts(psoup_model *model, psoup__team *team, const psoup_ppo_options *options,
                                    const psoup__request *requests, size_t n, psoup__pause *pause, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = model->context;
    size_t total = 0, adapters = (size_t)model->n_adapters, longest = 0, k = 0, own = 0, size;
    samples drawn = {.model = model, .team = team, .requests = requests, .n_requests = n, .pause = pause,
                     .session = PSOUP_SESSION_OPTIONS_INIT};
    for (size_t r = 0; r < n; r++)
        total += requests[r].out->n;
    psoup_prompt *prompts = psoup__alloc(context, total, sizeof(*prompts), error);
    psoup_sampling *sampling = psoup__alloc(context, total, sizeof(*sampling), error);
    float *mix = psoup__multiply(total, adapters, &size)
                     ? psoup__alloc(context, size, sizeof(*mix), error) : NULL;
    if (!prompts || !sampling || !mix) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    for (size_t r = 0; r < n; r++) {
        const psoup__request *request = &requests[r];
        const psoup__rollouts *out = request->out;
        size_t first = k;
        psoup__rollouts_deal(request->out, team, false);
        for (size_t i = 0; i < out->n; i++, k++) {
            const psoup_ppo_prompt *prompt = out->prompt[i];
            for (size_t a = 0; a < out->adapters; a++)
                mix[k * adapters + (size_t)request->adapters[a]] = out->weight[i * out->adapters + a];
            sampling[k] = (psoup_sampling){.size = sizeof(*sampling),
                                           .max_new_tokens = options->max_new_tokens,
                                           .min_new_tokens = options->min_new_tokens,
                                           .temperature = options->temperature,
                                           .top_k = options->top_k,
                                           .top_p = options->top_p,
                                           .ignore_stop = options->ignore_stop,
                                           .seed = request->seed};
            if (!out->mine[i])
                continue;
            prompts[own++] = (psoup_prompt){.tokens = prompt->tokens,
                                            .n = prompt->n,
                                            .mix = mix + k * adapters,
                                            .sequence = request->sequence + i,
                                            .sampling = &sampling[k]};
            longest = prompt->n > longest ? prompt->n : longest;
        }
        if (request->draw && options->draw_new_tokens_from > 0)
            draw_limits(options, request, sampling + first);
    }
    size_t room = longest + (size_t)options->max_new_tokens;
    size_t most = (size_t)model->config.max_position_embeddings;
    drawn.prompts = prompts;
    drawn.n = own;
    drawn.limit = (size_t)options->max_new_tokens < most ? (size_t)options->max_new_tokens : most;
    drawn.session.max_tokens = (int32_t)(room < most ? room : most);
    PSOUP__TRY(sample(&drawn, options->max_sequences, error));
    PSOUP__TRY(gather(&drawn, error));
fail:
    samples_free(&drawn);
    psoup__free(context, mix);
    psoup__free(context, sampling);
    psoup__free(context, prompts);
    return status;
}
