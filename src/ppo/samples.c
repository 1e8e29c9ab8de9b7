/* What the policies of a PPO run say on the way: each answers the same few prompts, from the same random
 * words every time, which are no part of training: no bit of it changes. */
#include <string.h>

#include "ppo/ppo.h"

/* The prompts: the first ones of the validation, or of training where there is none. */
static const psoup_ppo_prompt *prompts_of(const psoup_ppo *ppo, const psoup_ppo_policy *given, size_t *n) {
    bool validates = given->n_validation > 0;
    size_t all = validates ? given->n_validation : given->n_prompts;
    size_t wanted = (size_t)ppo->options.samples_count;
    *n = wanted < all ? wanted : all;
    return validates ? given->validation : given->prompts;
}

size_t psoup__ppo_samples_due(psoup_ppo *ppo) {
    int32_t every = ppo->options.samples_every;
    size_t due = 0;
    for (size_t p = 0; every > 0 && p < ppo->n; p++) {
        const psoup__ppo_state *s = &ppo->policies[p].state;
        if (!s->failed && s->step >= s->sampled &&
            (s->step % every == 0 || s->step == ppo->policies[p].total))
            ppo->active[due++] = &ppo->policies[p];
    }
    return due;
}

/* ---- the file ----------------------------------------------------------------------------------- */

/* The ids as a text, where there is a tokenizer: bytes that are not UTF-8, and NUL, become U+FFFD. Ids
 * without a token, which a model's padded vocabulary can hold, are left out. */
static psoup_json *text_of(const psoup_ppo *ppo, const int32_t *ids, size_t n) {
    const psoup_tokenizer *tokenizer = ppo->options.tokenizer;
    psoup_context *context = ppo->model->context;
    psoup__buffer text = {.context = context};
    size_t known = 0, length = 0;
    char *bytes = NULL;
    psoup_json *out = NULL;
    int32_t *sifted = psoup__alloc(context, n + 1, sizeof(*sifted), NULL);
    if (!sifted)
        return NULL;
    for (size_t i = 0; i < n; i++)
        if (psoup_tokenizer_token(tokenizer, ids[i]))
            sifted[known++] = ids[i];
    if (psoup_tokenizer_decode(tokenizer, sifted, known, 1, NULL, 0, &length, NULL) != PSOUP_OK ||
        !(bytes = psoup__alloc(context, length + 1, 1, NULL)) ||
        psoup_tokenizer_decode(tokenizer, sifted, known, 1, bytes, length, &length, NULL) != PSOUP_OK)
        goto end;
    for (size_t at = 0; at < length;) {
        uint32_t code;
        char character[4];
        at += psoup__utf8_next(bytes + at, length - at, &code);
        psoup__buffer_append(&text, character, psoup__utf8_put(code ? code : 0xFFFD, character));
    }
    psoup__buffer_append(&text, "", 1);
    if (!text.failed)
        out = psoup_json_new_string(text.data);
end:
    psoup__buffer_free(&text);
    psoup__free(context, bytes);
    psoup__free(context, sifted);
    return out;
}

static psoup_json *words(const psoup_ppo *ppo, const int32_t *ids, size_t n) {
    if (ppo->options.tokenizer)
        return text_of(ppo, ids, n);
    psoup_json *out = psoup_json_new_array();
    for (size_t i = 0; i < n; i++)
        psoup_json_append(out, psoup_json_new_integer(ids[i]));
    return out;
}

/* A soup's mix, by adapter. */
static psoup_json *mix_of(const psoup__policy *policy, const float *weight) {
    psoup_json *out = psoup_json_new_object();
    for (size_t k = 0; k < policy->n_parts; k++)
        if (weight[k] != 0.0f)
            psoup_json_set(out, policy->names[k], psoup_json_new_real((double)weight[k]));
    return out;
}

static psoup_status write_sample(const psoup_ppo *ppo, const psoup__policy *policy, const psoup_rollout *r,
                                 const float *mix, float score, psoup_error *error) {
    psoup_json *row = psoup_json_new_object();
    const char *finish = r->finish == PSOUP_FINISH_STOP ? "stop" : "length";
    int failed = psoup_json_set(row, "step", psoup_json_new_integer(policy->state.step)) |
                 psoup_json_set(row, "policy", psoup_json_new_string(policy->name)) |
                 psoup_json_set(row, "id", psoup_json_new_integer(r->prompt->id)) |
                 psoup_json_set(row, "prompt", words(ppo, r->prompt->tokens, r->prompt->n)) |
                 psoup_json_set(row, "response", words(ppo, r->response, r->n)) |
                 psoup_json_set(row, "score", psoup_json_new_real((double)score)) |
                 psoup_json_set(row, "finish", psoup_json_new_string(finish));
    if (policy->given.soup)
        failed |= psoup_json_set(row, "mix", mix_of(policy, mix));
    psoup_status status = failed ? psoup__out_of_memory(error, 0)
                                 : psoup_jsonl_write(ppo->reporter.samples, row, error);
    psoup_json_free(row);
    return status;
}

/* To the file, which is rank 0's, and then to the caller. */
static psoup_status tell(psoup_ppo *ppo, const psoup__policy *policy, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const psoup__rollouts *s = &policy->samples;
    const psoup_ppo_options *o = &ppo->options;
    psoup_rollout *rollouts = psoup__alloc(ppo->model->context, s->n, sizeof(*rollouts), error);
    if (!rollouts)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < s->n; i++) {
        rollouts[i] = (psoup_rollout){.policy = policy->name,
                                      .prompt = s->prompt[i],
                                      .response = s->response + s->start[i],
                                      .n = (size_t)(s->start[i + 1] - s->start[i]),
                                      .finish = s->finish[i]};
        if (ppo->reporter.samples && status == PSOUP_OK)
            status = write_sample(ppo, policy, &rollouts[i], s->weight + i * s->adapters, s->score[i], error);
    }
    bool stop = status == PSOUP_OK && o->on_samples &&
                o->on_samples(o->user, policy->state.step, rollouts, s->score, s->n);
    status = psoup__team_vote(&ppo->team, status, &stop, error);
    if (status == PSOUP_OK && stop)
        status = psoup__fail(error, PSOUP_ERROR_CANCELLED,
                             "training of '%s' was stopped at step %lld of %lld", policy->name,
                             (long long)policy->state.step, (long long)policy->total);
    psoup__free(ppo->model->context, rollouts);
    return status;
}

psoup_status psoup__ppo_sample(psoup_ppo *ppo, size_t n, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t left = 0;
    PSOUP__TRY(psoup__ppo_refresh(ppo, error));
    for (size_t p = 0; p < n; p++) {
        psoup__policy *policy = ppo->active[p];
        size_t count;
        const psoup_ppo_prompt *prompts = prompts_of(ppo, &policy->given, &count);
        uint64_t seed = psoup__seed_for(policy->given.seed, PSOUP__FOR_SAMPLES);
        PSOUP__TRY(psoup__rollouts_reserve(&policy->samples, ppo->model->context, count,
                                           policy->n_parts, policy->n_sources, error));
        for (size_t i = 0; i < count; i++)
            policy->samples.prompt[i] = &prompts[i];
        psoup__draw_mixes(policy, &policy->samples, seed, 0, 1);
        ppo->requests[p] = (psoup__request){.policy = &policy->given,
                                            .sources = policy->sources,
                                            .adapters = policy->adapters,
                                            .seed = seed,
                                            .out = &policy->samples};
    }
    PSOUP__TRY(psoup__ppo_draw(ppo, n, false, error));
    for (size_t p = 0; p < n; p++) { /* who diverged has none; the next step finds it out */
        if (ppo->active[p]->samples.diverged) {
            ppo->active[p]->state.sampled = ppo->active[p]->state.step + 1;
            continue;
        }
        ppo->requests[left] = ppo->requests[p];
        ppo->active[left++] = ppo->active[p];
    }
    PSOUP__TRY(psoup__score_rollouts(ppo->model, &ppo->team, &ppo->options, ppo->requests, left, error));
    for (size_t p = 0; p < left; p++)
        ppo->active[p]->state.sampled = ppo->active[p]->state.step + 1;
    for (size_t p = 0; p < left; p++)
        if (!psoup__goes_on(&ppo->team, &status, tell(ppo, ppo->active[p], error)))
            break;
fail:
    return status;
}
