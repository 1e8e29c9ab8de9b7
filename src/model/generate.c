/* A session, its steps and their results in one call. */
#include <string.h>

#include "model/measure.h"
#include "model/session.h"

typedef struct completion {
    psoup_completion seen; /* what callers see, pointing at: */
    int32_t *tokens;
    float *logprobs;
    size_t tokens_capacity, logprobs_capacity;
} completion;

struct psoup_generation {
    psoup_context *context;
    completion *completions;
    size_t n;
};

typedef struct collector {
    psoup_generation *generation;
    psoup_token_fn on_token;
    void *user;
    psoup_status status;
    psoup_error *error;
} collector;

static int collect(void *user, int64_t id, int32_t token, float logprob, psoup_finish finish) {
    collector *c = user;
    psoup_context *context = c->generation->context;
    completion *to = &c->generation->completions[id];
    to->seen.finish = finish;
    if (token >= 0) {
        c->status = psoup__reserve(context, &to->tokens, &to->tokens_capacity,
                                   to->seen.n + 1, sizeof *to->tokens, c->error);
        if (c->status == PSOUP_OK)
            c->status = psoup__reserve(context, &to->logprobs, &to->logprobs_capacity,
                                       to->seen.n + 1, sizeof *to->logprobs, c->error);
        if (c->status != PSOUP_OK)
            return 1;
        to->tokens[to->seen.n] = token;
        to->logprobs[to->seen.n++] = logprob;
        to->seen.tokens = to->tokens;
        to->seen.logprobs = to->logprobs;
    }
    return c->on_token ? c->on_token(c->user, id, token, logprob, finish) : 0;
}

static const psoup_sampling *sampling_of(const psoup_prompt *prompt,
                                         const psoup_sampling *sampling) {
    return prompt->sampling ? prompt->sampling : sampling;
}

/* Places for 32, or for all where they are fewer; for one whose logits are mixed as many as it takes. */
static int32_t fit_places(const psoup_model *model, const psoup_prompt *prompts, size_t n) {
    size_t all = 0, widest = 32;
    for (size_t i = 0; i < n; i++) {
        size_t places = prompts[i].mix_method == PSOUP_MIX_LOGITS
                            ? (size_t)psoup__mix_views(model, prompts[i].mix, NULL) + 1 /* strength may add the base */
                            : 1;
        all += places;
        widest = places > widest ? places : widest;
    }
    return (int32_t)(all < widest ? all : widest);
}

/* No more places than prompts take, no longer than any can grow. */
static psoup_status fit_session(const psoup_model *model, const psoup_prompt *prompts, size_t n,
                                const psoup_sampling *sampling, psoup_session_options *options,
                                psoup_error *error) {
    if (options->max_sequences == 0)
        options->max_sequences = fit_places(model, prompts, n);
    if (options->max_tokens != 0)
        return PSOUP_OK;
    size_t longest = 1;
    for (size_t i = 0; i < n; i++) {
        psoup_sampling full = PSOUP_SAMPLING_INIT;
        psoup_status status = psoup__options(&full, sizeof full, sampling_of(&prompts[i], sampling),
                                             "psoup_sampling", error);
        if (status != PSOUP_OK)
            return status;
        size_t length = prompts[i].n + (size_t)(full.max_new_tokens > 0 ? full.max_new_tokens : 0);
        longest = length > longest ? length : longest;
    }
    options->max_tokens = longest < INT32_MAX ? (int32_t)longest : INT32_MAX;
    return PSOUP_OK;
}

psoup_status psoup_generate(psoup_model *model, const psoup_prompt *prompts, size_t n,
                            const psoup_sampling *sampling, const psoup_session_options *options,
                            psoup_token_fn on_token, void *user, psoup_generation **out,
                            psoup_error *error) {
    psoup_session_options full = PSOUP_SESSION_OPTIONS_INIT;
    psoup_session *session = NULL;
    psoup_generation *g = NULL;
    if (!model || !out || (n > 0 && !prompts))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_generate: an argument is NULL");
    *out = NULL;
    psoup_status status;
    PSOUP__TRY(psoup__options(&full, sizeof full, options, "psoup_session_options", error));
    PSOUP__TRY(fit_session(model, prompts, n, sampling, &full, error));
    status = PSOUP_ERROR_MEMORY;
    g = psoup__alloc(model->context, 1, sizeof *g, error);
    if (!g)
        goto fail;
    g->context = model->context;
    g->completions = psoup__alloc(model->context, n, sizeof *g->completions, error);
    if (!g->completions)
        goto fail;
    g->n = n;
    PSOUP__TRY(psoup_session_create(model, &full, &session, error));
    for (size_t i = 0; i < n; i++) {
        psoup_prompt prompt = prompts[i];
        prompt.sampling = sampling_of(&prompt, sampling);
        PSOUP__TRY(psoup_session_submit(session, (int64_t)i, &prompt, error));
    }
    psoup_error ours = {.status = PSOUP_OK};
    collector c = {.generation = g, .on_token = on_token, .user = user, .error = &ours};
    for (size_t running = n; running > 0;) {
        status = psoup_session_step(session, collect, &c, &running, error);
        if (c.status != PSOUP_OK) { /* no room for a token: say so, not that we stopped */
            status = c.status;
            if (error)
                *error = ours;
        }
        if (status != PSOUP_OK)
            goto fail;
    }
    psoup_session_free(session);
    *out = g;
    return PSOUP_OK;
fail:
    psoup_session_free(session);
    psoup_generation_free(g);
    return status;
}

const psoup_completion *psoup_generation_get(const psoup_generation *generation, size_t index) {
    return index < generation->n ? &generation->completions[index].seen : NULL;
}

void psoup_generation_free(psoup_generation *generation) {
    if (!generation)
        return;
    for (size_t i = 0; i < generation->n; i++) {
        psoup__free(generation->context, generation->completions[i].tokens);
        psoup__free(generation->context, generation->completions[i].logprobs);
    }
    psoup__free(generation->context, generation->completions);
    psoup__free(generation->context, generation);
}

/* ---- what it takes ------------------------------------------------------------------------------- */

/* What the prompts want together; adapters [n_adapters] receives which ones they use. */
static psoup_status look(const psoup_model *model, const psoup_prompt *prompts, size_t n,
                         const psoup_sampling *sampling, int32_t *adapters, psoup__decoding_extent *d,
                         bool *mixes_logits, psoup_error *error) {
    for (size_t i = 0; i < n; i++) {
        psoup_sampling own = PSOUP_SAMPLING_INIT;
        psoup_status status = psoup__options(&own, sizeof own, sampling_of(&prompts[i], sampling), "psoup_sampling",
                                             error);
        if (status == PSOUP_OK)
            status = psoup__sampling_check(model, &own, error);
        if (status != PSOUP_OK)
            return status;
        bool logits = prompts[i].mix_method == PSOUP_MIX_LOGITS;
        int32_t used = 0;
        for (int32_t a = 0; prompts[i].mix && a < model->n_adapters; a++) {
            used += prompts[i].mix[a] != 0;
            adapters[a] |= prompts[i].mix[a] != 0;
        }
        used = logits ? 1 : used; /* each of its sequences has one */
        d->longest = (int64_t)prompts[i].n > d->longest ? (int64_t)prompts[i].n : d->longest;
        d->most = own.max_new_tokens > d->most ? own.max_new_tokens : d->most;
        d->each = used > d->each ? used : d->each;
        d->history = d->history || own.no_repeat_ngram_size > 0;
        d->factors = d->factors || prompts[i].mix_method == PSOUP_MIX_FACTORS;
        *mixes_logits = *mixes_logits || logits;
    }
    for (int32_t a = 0; a < model->n_adapters; a++)
        if (adapters[a])
            adapters[d->n_adapters++] = a;
    return PSOUP_OK;
}

psoup_status psoup_generate_memory(psoup_model *model, const psoup_prompt *prompts, size_t n,
                                   const psoup_sampling *sampling, const psoup_session_options *options,
                                   psoup_memory *out, psoup_error *error) {
    psoup_session_options full = PSOUP_SESSION_OPTIONS_INIT;
    psoup_memory memory = {.size = sizeof memory};
    psoup__footprint print;
    psoup_status status = PSOUP_OK;
    bool mixes_logits = false;
    if (!model || !out || (n > 0 && !prompts))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_generate_memory: an argument is NULL");
    psoup__decoding_extent d = {.prompts = (int64_t)n, .longest = 1, .most = 1, .options = &full, .each = 1};
    int32_t *adapters = psoup__alloc(model->context, (size_t)model->n_adapters, sizeof *adapters, error);
    if (!adapters)
        return PSOUP_ERROR_MEMORY;
    d.adapters = adapters;
    PSOUP__TRY(psoup__options(&full, sizeof full, options, "psoup_session_options", error));
    PSOUP__TRY(psoup__session_check(&full, error));
    PSOUP__TRY(look(model, prompts, n, sampling, adapters, &d, &mixes_logits, error));
    PSOUP__TRY(fit_session(model, prompts, n, sampling, &full, error));
    psoup__memory_begin(model, false, &memory);
    PSOUP__TRY(psoup__measure_decoding(model, &d, &print, &memory.cache, error));
    psoup__memory_add(&memory, &print);
    memory.logits += mixes_logits ? memory.logits : 0; /* as many again, mixed */
    memory.activations = psoup__sum(memory.activations, print.reserved);
    memory.base += psoup__measure_positions(model, d.longest + d.most);
    psoup__memory_end(model, 0, &memory);
    psoup__memory_copy(out, &memory);
fail:
    psoup__free(model->context, adapters);
    return status;
}
