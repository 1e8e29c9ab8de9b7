/* Rollouts: all policies sample in one continuous batch. What a policy draws depends on its seed and
 * its running rollout number alone. */
#include <string.h>

#include "train/train.h"

psoup_status psoup__rollouts_reserve(psoup__rollouts *rollouts, psoup_context *context, size_t n,
                                     size_t adapters, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t a = rollouts->capacity, b = a, c = a, d = a, e = a * adapters, f = e;
    PSOUP__TRY(psoup__reserve(context, &rollouts->prompt, &a, n + 1, sizeof(*rollouts->prompt),
                              error));
    PSOUP__TRY(psoup__reserve(context, &rollouts->start, &b, n + 1, sizeof(*rollouts->start),
                              error));
    PSOUP__TRY(psoup__reserve(context, &rollouts->finish, &c, n + 1, sizeof(*rollouts->finish),
                              error));
    PSOUP__TRY(psoup__reserve(context, &rollouts->score, &d, n + 1, sizeof(*rollouts->score),
                              error));
    PSOUP__TRY(psoup__reserve(context, &rollouts->weight, &e, (n + 1) * adapters,
                              sizeof(*rollouts->weight), error));
    PSOUP__TRY(psoup__reserve(context, &rollouts->part_score, &f, (n + 1) * adapters,
                              sizeof(*rollouts->part_score), error));
    rollouts->capacity = d;
    rollouts->adapters = adapters;
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
    *rollouts = (psoup__rollouts){.n = 0};
}

/* Keeps a completion: up to and with its first end token, also where sampling went on past it. */
static psoup_status keep(psoup_model *model, psoup__rollouts *out, size_t i, psoup_completion c,
                         psoup_error *error) {
    int32_t ends[PSOUP__END_TOKENS];
    size_t n = 0, n_ends = psoup__end_tokens(&model->config, ends);
    bool ended = false;
    for (; n < c.n && !ended; n++)
        for (size_t e = 0; e < n_ends; e++)
            ended = ended || c.tokens[n] == ends[e];
    psoup_status status = psoup__reserve(model->context, &out->response, &out->token_capacity,
                                         out->tokens + n, sizeof(*out->response), error);
    if (status != PSOUP_OK)
        return status;
    if (c.finish == PSOUP_FINISH_ERROR || n == 0)
        out->diverged = true;
    if (n)
        memcpy(out->response + out->tokens, c.tokens, n * sizeof(*c.tokens));
    out->start[i] = (int32_t)out->tokens;
    out->start[i + 1] = (int32_t)(out->tokens += n);
    out->finish[i] = ended ? PSOUP_FINISH_STOP : c.finish;
    return PSOUP_OK;
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

psoup_status psoup__sample_rollouts(psoup_model *model, const psoup_ppo_options *options,
                                    const psoup__request *requests, size_t n, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = model->context;
    size_t total = 0, adapters = (size_t)model->n_adapters, longest = 0, k = 0, size;
    psoup_generation *generation = NULL;
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
            prompts[k] = (psoup_prompt){.tokens = prompt->tokens,
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
    psoup_session_options session = PSOUP_SESSION_OPTIONS_INIT;
    session.max_tokens = (int32_t)(room < most ? room : most);
    session.max_sequences = options->max_sequences ? options->max_sequences : (int32_t)total;
    PSOUP__TRY(psoup_generate(model, prompts, total, NULL, &session, NULL, NULL, &generation,
                              error));
    k = 0;
    for (size_t r = 0; r < n; r++)
        for (size_t i = 0; i < requests[r].out->n; i++)
            PSOUP__TRY(keep(model, requests[r].out, i, *psoup_generation_get(generation, k++),
                            error));
fail:
    psoup_generation_free(generation);
    psoup__free(context, mix);
    psoup__free(context, sampling);
    psoup__free(context, prompts);
    return status;
}
