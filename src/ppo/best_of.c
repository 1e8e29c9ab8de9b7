/* Best of n: several answers to each prompt, and the one that a reward likes best (Stiennon et al. 2020, arXiv
 * 2009.01325; Nakano et al. 2021, arXiv 2112.09332, section 3.2: rejection sampling). */
#include <math.h>
#include <string.h>

#include "ppo/ppo.h"

typedef struct best {
    psoup_model *model;
    const psoup_prompt *prompts; /* [n] */
    size_t n, each;              /* each: answers to a prompt */
    psoup_best_options options;
    psoup_ppo_policy policy;  /* has the options' rewards */
    psoup_prompt *asked;      /* [n · each] */
    psoup_sampling *sampling; /* [n · each] */
    psoup_ppo_prompt *questions; /* [n] what rewards read, or callbacks are told */
    psoup__source *sources;      /* [n_sources] the rewards */
    size_t n_sources;
    size_t *place;            /* [rollouts.n] which answer it is */
    psoup__rollouts rollouts; /* the answers that can be scored */
} best;

/* Questions as they were given, or the prompts themselves. */
static void make_questions(best *b) {
    for (size_t i = 0; i < b->n; i++) {
        psoup_ppo_prompt own = {.tokens = b->prompts[i].tokens, .n = b->prompts[i].n, .id = (int64_t)i};
        b->questions[i] = b->options.questions ? b->options.questions[i] : own;
    }
}

static psoup_status check_questions(const best *b, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; i < b->n; i++) {
        const psoup_ppo_prompt *q = &b->questions[i];
        if (!q->tokens || q->n == 0)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_best_of_n: questions[%zu] has no tokens", i);
        if (!psoup__all_zero(q->reserved, sizeof(q->reserved)))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_best_of_n: questions[%zu].reserved is not 0", i);
        PSOUP__TRY(psoup__rewards_check_prompt(&b->policy, q, "questions", i, error));
    }
fail:
    return status;
}

static psoup_status check(const best *b, psoup_error *error) {
    const psoup_best_options *o = &b->options;
    if (o->n < 1 || o->n > 65536)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_best_options: n is %d: expected 1 to 65536", o->n);
    psoup_status status = psoup__rewards_check(&b->policy, error);
    if (status != PSOUP_OK)
        return status;
    if (o->reward_text && !o->tokenizer)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_best_options: tokenizer is NULL, which reward_text needs");
    if (o->reward_max_tokens < 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_best_options: reward_max_tokens is %d: expected 0 "
                           "or more", o->reward_max_tokens);
    if (o->reserved)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_best_options: reserved is %d: expected 0", o->reserved);
    return PSOUP_OK;
}

/* Answer k has random words of its own: those of a seed that only k changes. So the first is what
 * psoup_generate gives, and the answers of a larger n begin with those of a smaller one. */
static psoup_status ask(best *b, const psoup_sampling *sampling, const psoup_session_options *session,
                        psoup_generation **out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; i < b->n; i++)
        for (size_t k = 0; k < b->each; k++) {
            psoup_sampling *own = &b->sampling[i * b->each + k], defaults = PSOUP_SAMPLING_INIT;
            *own = defaults;
            PSOUP__TRY(psoup__options(own, sizeof(*own), b->prompts[i].sampling ? b->prompts[i].sampling : sampling,
                                      "psoup_sampling", error));
            if (own->temperature == 0.0f && b->each > 1)
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                   "psoup_best_of_n: the temperature is 0: all answers would be the same");
            own->seed ^= (uint64_t)k * UINT64_C(0xD1B54A32D192ED03);
            b->asked[i * b->each + k] = b->prompts[i];
            b->asked[i * b->each + k].sampling = own;
        }
    PSOUP__TRY(psoup_generate(b->model, b->asked, b->n * b->each, NULL, session, NULL, NULL, out, error));
fail:
    return status;
}

/* Lists the answers that can be scored: those whose logits were numbers. */
static psoup_status list(best *b, const psoup_generation *generation, psoup_error *error) {
    psoup__rollouts *r = &b->rollouts;
    psoup_context *context = b->model->context;
    size_t all = b->n * b->each, tokens = 0, n = 0;
    psoup_status status = psoup__rollouts_reserve(r, context, all, 1, b->n_sources, error);
    for (size_t i = 0; i < all; i++)
        tokens += psoup_generation_get(generation, i)->n;
    if (status == PSOUP_OK && tokens > INT32_MAX)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "psoup_best_of_n: the answers have %zu tokens in all: "
                           "expected 2^31 - 1 at most", tokens);
    if (status == PSOUP_OK)
        status = psoup__reserve(context, &r->response, &r->token_capacity, tokens + 1, sizeof(*r->response), error);
    if (status != PSOUP_OK)
        return status;
    r->start[0] = 0;
    for (size_t i = 0; i < all; i++) {
        const psoup_completion *c = psoup_generation_get(generation, i);
        if (c->finish == PSOUP_FINISH_ERROR || c->n == 0)
            continue;
        memcpy(r->response + r->start[n], c->tokens, c->n * sizeof(*c->tokens));
        r->start[n + 1] = r->start[n] + (int32_t)c->n;
        r->prompt[n] = &b->questions[i / b->each];
        r->finish[n] = c->finish;
        r->weight[n] = 1.0f;
        b->place[n++] = i;
    }
    r->n = n;
    r->tokens = (size_t)r->start[n];
    return PSOUP_OK;
}

static psoup_status score(best *b, psoup_error *error) {
    const psoup_best_options *o = &b->options;
    psoup__team alone;
    psoup_ppo_options options = PSOUP_PPO_OPTIONS_INIT;
    psoup__request request = {.policy = &b->policy, .sources = b->sources, .out = &b->rollouts};
    options.reward_text = o->reward_text;
    options.reward_max_tokens = o->reward_max_tokens;
    options.tokenizer = o->tokenizer;
    psoup_status status = psoup__team_join(&alone, b->model->context, NULL, error);
    if (status == PSOUP_OK && b->rollouts.n)
        status = psoup__score_rollouts(b->model, &alone, &options, &request, 1, error);
    psoup__team_leave(&alone);
    return status;
}

/* The highest score; of equal ones the first. Where none has a score, the first answer. */
static void choose(const best *b, int32_t *chosen, float *scores) {
    const psoup__rollouts *r = &b->rollouts;
    for (size_t i = 0; i < b->n; i++)
        chosen[i] = -1;
    for (size_t i = 0; scores && i < b->n * b->each; i++)
        scores[i] = NAN;
    size_t best_at = 0;
    for (size_t j = 0; j < r->n; j++) {
        size_t i = b->place[j] / b->each;
        if (scores)
            scores[b->place[j]] = r->score[j];
        if (chosen[i] >= 0 && r->score[j] <= r->score[best_at])
            continue;
        chosen[i] = (int32_t)(b->place[j] % b->each);
        best_at = j;
    }
    for (size_t i = 0; i < b->n; i++)
        chosen[i] = chosen[i] < 0 ? 0 : chosen[i];
}

psoup_status psoup_best_of_n(psoup_model *model, const psoup_prompt *prompts, size_t n,
                             const psoup_sampling *sampling, const psoup_session_options *session,
                             const psoup_best_options *options, psoup_generation **out, int32_t *chosen,
                             float *scores, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_best_options defaults = PSOUP_BEST_OPTIONS_INIT;
    if (!model || !out || (n && (!prompts || !chosen)))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_best_of_n: an argument is NULL");
    *out = NULL;
    best b = {.model = model, .prompts = prompts, .n = n, .options = defaults};
    size_t all;
    PSOUP__TRY(psoup__options(&b.options, sizeof(b.options), options, "psoup_best_options", error));
    b.policy = (psoup_ppo_policy){.adapter = "best of n",
                                  .rewards = b.options.rewards,
                                  .n_rewards = b.options.n_rewards,
                                  .reward_fn = b.options.reward_fn,
                                  .reward_user = b.options.reward_user,
                                  .sources = b.options.sources,
                                  .n_sources = b.options.n_sources};
    PSOUP__TRY(check(&b, error));
    b.each = (size_t)b.options.n;
    if (!psoup__multiply(n, b.each, &all))
        return psoup__out_of_memory(error, SIZE_MAX);
    b.asked = psoup__alloc(model->context, all, sizeof(*b.asked), error);
    b.sampling = psoup__alloc(model->context, all, sizeof(*b.sampling), error);
    b.place = psoup__alloc(model->context, all, sizeof(*b.place), error);
    b.questions = psoup__alloc(model->context, n, sizeof(*b.questions), error);
    b.n_sources = psoup__rewards_count(&b.policy);
    b.sources = psoup__alloc(model->context, b.n_sources, sizeof(*b.sources), error);
    if (!b.asked || !b.sampling || !b.place || !b.questions || !b.sources) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    make_questions(&b);
    for (size_t k = 0; k < b.n_sources; k++)
        b.sources[k] = psoup__rewards_source(&b.policy, k);
    PSOUP__TRY(check_questions(&b, error));
    PSOUP__TRY(ask(&b, sampling, session, out, error));
    PSOUP__TRY(list(&b, *out, error));
    PSOUP__TRY(score(&b, error));
    choose(&b, chosen, scores);
fail:
    psoup__rollouts_free(&b.rollouts, model->context);
    psoup__free(model->context, b.sources);
    psoup__free(model->context, b.questions);
    psoup__free(model->context, b.place);
    psoup__free(model->context, b.sampling);
    psoup__free(model->context, b.asked);
    if (status != PSOUP_OK) {
        psoup_generation_free(*out);
        *out = NULL;
    }
    return status;
}
