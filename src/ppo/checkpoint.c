/* What a PPO run is and what its state is, for its checkpoints. A file is of the moment between two steps; and has the
 * responses of the next, as far as they were sampled, where it was written while that was in progress. Whatever else a
 * step makes of them is made again. */
#include <stdio.h>
#include <string.h>

#include "ppo/ppo.h"

static psoup_status identify_prompts(psoup_ppo *ppo, const char *key, const psoup_ppo_prompt *prompts,
                                     size_t n, psoup_error *error) {
    psoup__hash *hash = psoup__hash_create(ppo->model->context, error);
    if (!hash)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < n; i++) {
        psoup__hash_tokens(hash, prompts[i].tokens, prompts[i].n);
        for (size_t k = 0; prompts[i].inputs && k < prompts[i].n_inputs; k++) {
            const psoup_reward_input *input = &prompts[i].inputs[k];
            psoup__hash_update(hash, &input->reward, sizeof(input->reward));
            psoup__hash_update(hash, &input->weight, sizeof(input->weight));
            psoup__hash_tokens(hash, input->tokens, input->n);
        }
    }
    psoup_status status = psoup__run_rows(&ppo->checkpoint, key, n, hash, error);
    psoup__free(ppo->model->context, hash);
    return status;
}

/* What callbacks and the samples file call them by. */
static psoup_status identify_ids(psoup_ppo *ppo, const char *key, const psoup_ppo_prompt *prompts, size_t n,
                                 psoup_error *error) {
    psoup__hash *hash = psoup__hash_create(ppo->model->context, error);
    if (!hash)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < n; i++)
        psoup__hash_update(hash, &prompts[i].id, sizeof(prompts[i].id));
    psoup_status status = psoup__run_rows(&ppo->checkpoint, key, n, hash, error);
    psoup__free(ppo->model->context, hash);
    return status;
}

/* The words of the tokenizer through which rewards read. */
static psoup_status identify_tokenizer(psoup_ppo *ppo, psoup_error *error) {
    const psoup_tokenizer *tokenizer = ppo->options.tokenizer;
    int32_t n = psoup_tokenizer_vocab_size(tokenizer);
    psoup__hash *hash = psoup__hash_create(ppo->model->context, error);
    if (!hash)
        return PSOUP_ERROR_MEMORY;
    for (int32_t id = 0; id < n; id++) {
        const char *token = psoup_tokenizer_token(tokenizer, id);
        psoup__hash_update(hash, token ? token : "", token ? strlen(token) + 1 : 1);
    }
    psoup_status status = psoup__run_rows(&ppo->checkpoint, "tokenizer", (size_t)n, hash, error);
    psoup__free(ppo->model->context, hash);
    return status;
}

static psoup_status identify_rewards(psoup_ppo *ppo, size_t p, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__checkpoint *c = &ppo->checkpoint;
    const psoup_ppo_policy *given = &ppo->policies[p].given;
    char key[96];
    snprintf(key, sizeof(key), "rewards of policy %zu", p);
    if (!given->sources && given->reward_fn)
        return psoup__run_text(c, key, error, "a callback");
    PSOUP__TRY(psoup__run_text(c, key, error, "%zu", ppo->policies[p].n_sources));
    for (size_t i = 0; i < ppo->policies[p].n_sources; i++) {
        const psoup__source *source = &ppo->policies[p].sources[i];
        const psoup_reward *reward = source->model;
        psoup__adapter *adapter = NULL;
        if (given->sources) {
            snprintf(key, sizeof(key), "source %zu of policy %zu", i, p);
            PSOUP__TRY(psoup__run_text(c, key, error, "%.200s of weight %.9g, %s%s%.100s", source->metric,
                                       (double)source->weight, reward ? "a model" : "a callback",
                                       given->soup ? " of " : "",
                                       given->soup ? ppo->policies[p].names[source->adapter] : ""));
        }
        if (!reward)
            continue;
        PSOUP__TRY(psoup__reward_adapter(reward, &adapter, NULL, error));
        snprintf(key, sizeof(key), "reward %zu of policy %zu", i, p);
        PSOUP__TRY(psoup__run_adapter(c, key, reward->model, adapter, true, error));
        snprintf(key, sizeof(key), "base of reward %zu of policy %zu", i, p);
        if (reward->model != ppo->model)
            PSOUP__TRY(psoup__run_base(c, key, reward->model, error));
    }
fail:
    return status;
}

static psoup_status identify_policy(psoup_ppo *ppo, size_t p, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__checkpoint *c = &ppo->checkpoint;
    const psoup__policy *policy = &ppo->policies[p];
    const psoup_ppo_policy *given = &policy->given;
    char key[96];
    snprintf(key, sizeof(key), "policy %zu", p);
    if (given->soup)
        PSOUP__TRY(psoup__run_text(c, key, error, "a soup of %zu adapters", policy->n_parts));
    for (size_t k = 0; k < policy->n_parts; k++) {
        if (given->soup)
            snprintf(key, sizeof(key), "adapter %zu of policy %zu", k, p);
        PSOUP__TRY(psoup__run_adapter(c, key, ppo->model, policy->parts[k].adapter, false, error));
    }
    if (given->soup) {
        snprintf(key, sizeof(key), "concentration of policy %zu", p);
        PSOUP__TRY(psoup__run_text(c, key, error, "%.9g", (double)given->soup->concentration));
    }
    snprintf(key, sizeof(key), "seed of policy %zu", p);
    PSOUP__TRY(psoup__run_text(c, key, error, "%llu", (unsigned long long)given->seed));
    snprintf(key, sizeof(key), "prompts of policy %zu", p);
    PSOUP__TRY(identify_prompts(ppo, key, given->prompts, given->n_prompts, error));
    snprintf(key, sizeof(key), "prompts' ids of policy %zu", p);
    PSOUP__TRY(identify_ids(ppo, key, given->prompts, given->n_prompts, error));
    snprintf(key, sizeof(key), "validation of policy %zu", p);
    PSOUP__TRY(identify_prompts(ppo, key, given->validation, given->n_validation, error));
    snprintf(key, sizeof(key), "validation's ids of policy %zu", p);
    PSOUP__TRY(identify_ids(ppo, key, given->validation, given->n_validation, error));
    PSOUP__TRY(identify_rewards(ppo, p, error));
fail:
    return status;
}

/* Tokens of a response, at most. */
static size_t most_tokens(const psoup_ppo *ppo) {
    int32_t most = ppo->model->config.max_position_embeddings;
    return (size_t)(ppo->options.max_new_tokens < most ? ppo->options.max_new_tokens : most);
}

static psoup_status add_policy(psoup_ppo *ppo, size_t p, psoup_error *error) {
    psoup__checkpoint *c = &ppo->checkpoint;
    psoup__policy *policy = &ppo->policies[p];
    psoup__ppo_state *s = &policy->state;
    size_t begun = 0;
    if (!psoup__multiply((size_t)ppo->options.batch_size, 2 + most_tokens(ppo), &begun))
        return psoup__out_of_memory(error, SIZE_MAX);
    const psoup__piece pieces[] = {
        {.name = "failed", .dtype = PSOUP_I64, .data = &s->failed, .n = 1},
        {.name = "step", .dtype = PSOUP_I64, .data = &s->step, .n = 1},
        {.name = "validated", .dtype = PSOUP_I64, .data = &s->validated, .n = 1},
        {.name = "sampled", .dtype = PSOUP_I64, .data = &s->sampled, .n = 1},
        {.name = "rollouts", .dtype = PSOUP_I64, .data = &s->rollouts, .n = 1},
        {.name = "updates", .dtype = PSOUP_I64, .data = &s->updates, .n = 1},
        {.name = "kl_coefficient", .dtype = PSOUP_F64, .data = &s->kl_coefficient, .n = 1},
        {.name = "watch_reward", .dtype = PSOUP_F64, .data = s->watch.reward, .n = PSOUP__MAX_WINDOW},
        {.name = "watch_deviation", .dtype = PSOUP_F64, .data = s->watch.deviation, .n = PSOUP__MAX_WINDOW},
        {.name = "watch_kl", .dtype = PSOUP_F64, .data = s->watch.kl, .n = PSOUP__MAX_WINDOW},
        {.name = "warned", .dtype = PSOUP_I64, .data = &s->watch.warned, .n = 1},
        {.name = "begun", .dtype = PSOUP_I32, .begun = &policy->begun, .n = begun},
    };
    psoup_status status =
        psoup__checkpoint_add(c, p, pieces, sizeof(pieces) / sizeof(pieces[0]), error);
    for (size_t k = 0; status == PSOUP_OK && k < policy->n_sources; k++) {
        psoup__moments *m = &s->moments[k];
        psoup__trend *trend = &s->trends[k];
        const psoup__piece scores[] = {
            {.name = "score_mean", .dtype = PSOUP_F64, .data = &m->mean, .n = 1, .part = k},
            {.name = "score_variance", .dtype = PSOUP_F64, .data = &m->variance, .n = 1, .part = k},
            {.name = "score_count", .dtype = PSOUP_F64, .data = &m->count, .n = 1, .part = k},
            {.name = "length_squares", .dtype = PSOUP_F64, .data = &trend->squares, .n = 1, .part = k},
            {.name = "length_products", .dtype = PSOUP_F64, .data = &trend->products, .n = 1, .part = k},
            {.name = "length_mean", .dtype = PSOUP_F64, .data = &trend->length, .n = 1, .part = k},
            {.name = "length_count", .dtype = PSOUP_F64, .data = &trend->count, .n = 1, .part = k},
        };
        status = psoup__checkpoint_add(c, p, scores, sizeof(scores) / sizeof(scores[0]), error);
    }
    for (size_t k = 0; status == PSOUP_OK && k < policy->n_parts; k++)
        status = psoup__checkpoint_add_part(c, p, k, &policy->parts[k].optimizer, &policy->parts[k].best, error);
    return status;
}

psoup_status psoup__ppo_start_checkpoint(psoup_ppo *ppo, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__checkpoint *c = &ppo->checkpoint;
    const psoup_ppo_options *o = &ppo->options;
    PSOUP__TRY(psoup__checkpoint_open(c, ppo->model->context, &ppo->reporter, o->checkpoint_dir,
                                      o->checkpoint_every, o->checkpoint_keep, o->resume || o->join,
                                      error));
    c->join = o->join;
    PSOUP__TRY(psoup__run_text(c, "trainer", error, "ppo"));
    PSOUP__TRY(psoup__run_options(c, psoup_ppo_fields(), o, error));
    PSOUP__TRY(psoup__run_base(c, "base", ppo->model, error));
    PSOUP__TRY(psoup__run_text(c, "policies", error, "%zu", ppo->n));
    if (o->reward_text)
        PSOUP__TRY(identify_tokenizer(ppo, error));
    for (size_t p = 0; p < ppo->n; p++) {
        PSOUP__TRY(identify_policy(ppo, p, error));
        PSOUP__TRY(add_policy(ppo, p, error));
    }
    PSOUP__TRY(psoup__checkpoint_start(c, error));
    for (size_t p = 0; p < ppo->n; p++) {
        const psoup__policy *policy = &ppo->policies[p];
        PSOUP__TRY(psoup__checkpoint_expect(c, policy->state.step <= policy->total, "step", error));
        PSOUP__TRY(psoup__checkpoint_expect(
            c, psoup__begun_fits(&policy->begun, (size_t)o->batch_size, most_tokens(ppo), ppo->model->config.vocab_size),
            "begun", error));
    }
fail:
    return status;
}
