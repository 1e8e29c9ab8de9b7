/* PPO's handle: what it checks, holds and gives back; the order of its prompts. */
#include <math.h>
#include <string.h>

#include "train/ppo.h"

static psoup_status check_prompts(const psoup_model *model, const psoup_ppo_policy *policy,
                                  const psoup_ppo_prompt *prompts, size_t n, const char *what,
                                  psoup_error *error) {
    int32_t most = model->config.max_position_embeddings;
    if (n > INT32_MAX || (n && !prompts))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s': %s is NULL or too long",
                           policy->adapter, what);
    for (size_t i = 0; i < n; i++) {
        const psoup_ppo_prompt *p = &prompts[i];
        if (!p->tokens || p->n == 0 || p->n >= (size_t)most)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "policy '%s': %s[%zu] has %zu tokens: expected 1 to %d",
                               policy->adapter, what, i, p->tokens ? p->n : 0, most - 1);
        if (policy->reward_fn)
            continue;
        if (p->inputs && p->n_inputs == 0)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "policy '%s': %s[%zu] lists no reward input", policy->adapter, what,
                               i);
        for (size_t k = 0; p->inputs && k < p->n_inputs; k++) {
            const psoup_reward_input *input = &p->inputs[k];
            if (input->reward < 0 || (size_t)input->reward >= policy->n_rewards)
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                   "policy '%s': %s[%zu] names reward %d of %zu", policy->adapter,
                                   what, i, input->reward, policy->n_rewards);
            if (!isfinite(input->weight) || (input->n && !input->tokens))
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                   "policy '%s': reward input %zu of %s[%zu] has weight %g and %s",
                                   policy->adapter, k, what, i, (double)input->weight,
                                   input->tokens ? "tokens" : "no tokens");
        }
    }
    return PSOUP_OK;
}

static psoup_status check_policy(const psoup_model *model, const psoup_ppo_policy *policies,
                                 size_t at, psoup_error *error) {
    const psoup_ppo_policy *policy = &policies[at];
    const psoup__adapter *adapter =
        policy->adapter ? psoup__model_adapter(model, policy->adapter) : NULL;
    if (!adapter)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_ppo: the model has no adapter '%s'",
                           policy->adapter ? policy->adapter : "(NULL)");
    if (adapter->grad)
        return psoup__fail(error, PSOUP_ERROR_STATE, "adapter '%s' is being trained already",
                           policy->adapter);
    for (size_t i = 0; i < at; i++)
        if (strcmp(policies[i].adapter, policy->adapter) == 0)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s' is there twice",
                               policy->adapter);
    if (!policy->reward_fn && (policy->n_rewards == 0 || !policy->rewards))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "policy '%s' has neither a reward model nor a callback",
                           policy->adapter);
    for (size_t i = 0; !policy->reward_fn && i < policy->n_rewards; i++) {
        psoup__adapter *reward = NULL;
        if (!policy->rewards[i])
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s': rewards[%zu] is NULL",
                               policy->adapter, i);
        psoup_status status = psoup__reward_adapter(policy->rewards[i], &reward, NULL, error);
        if (status != PSOUP_OK)
            return status;
    }
    if (policy->n_prompts == 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s' has no prompts",
                           policy->adapter);
    psoup_status status =
        check_prompts(model, policy, policy->prompts, policy->n_prompts, "prompts", error);
    return status != PSOUP_OK ? status
                              : check_prompts(model, policy, policy->validation,
                                              policy->n_validation, "validation", error);
}

/* A policy that is trained must score nothing: its head would be its value head. */
static psoup_status check_apart(const psoup_model *model, const psoup_ppo_policy *policies, size_t n,
                                psoup_error *error) {
    for (size_t p = 0; p < n; p++)
        for (size_t i = 0; !policies[p].reward_fn && i < policies[p].n_rewards; i++)
            for (size_t q = 0; q < n; q++)
                if (policies[p].rewards[i]->model == model &&
                    strcmp(policies[p].rewards[i]->name, policies[q].adapter) == 0)
                    return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                       "adapter '%s' is both a policy and a reward model",
                                       policies[q].adapter);
    return PSOUP_OK;
}

static psoup_status start_policy(psoup_ppo *ppo, psoup__policy *policy,
                                 const psoup_ppo_policy *given, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_model *model = ppo->model;
    const psoup_ppo_options *o = &ppo->options;
    policy->given = *given;
    policy->name = psoup__strdup(model->context, given->adapter, error);
    policy->order = psoup__alloc(model->context, given->n_prompts, sizeof(*policy->order), error);
    if (!policy->name || !policy->order)
        return PSOUP_ERROR_MEMORY;
    policy->given.adapter = policy->name;
    policy->epoch = UINT64_MAX;
    policy->state.kl_coefficient = o->kl_coefficient;
    int64_t epoch = (int64_t)(given->n_prompts / ((size_t)o->batch_size / psoup__group_size(o)));
    policy->total = o->steps ? o->steps : epoch ? epoch : 1;
    policy->adapter = psoup__model_adapter(model, policy->name);
    if (psoup__has_critic(o))
        PSOUP__TRY(psoup__adapter_add_head(model, policy->adapter, error));
    PSOUP__TRY(psoup__adapter_train(model, policy->adapter, true, error));
    policy->training = true;
    size_t trained = policy->adapter->count; /* a head that stands at its end is left alone */
    if (!psoup__has_critic(o) && policy->adapter->head)
        trained -= (size_t)model->config.hidden_size + 1;
    policy->optimizer = (psoup__optimizer){.p = policy->adapter->data,
                                           .g = policy->adapter->grad,
                                           .n = trained,
                                           .beta1 = o->beta1,
                                           .beta2 = o->beta2,
                                           .epsilon = o->epsilon,
                                           .weight_decay = o->weight_decay,
                                           .max_grad_norm = o->max_grad_norm};
    PSOUP__TRY(psoup__optimizer_start(&policy->optimizer, model->be, error));
fail:
    return status;
}

psoup_status psoup_ppo_create(psoup_model *model, const psoup_ppo_policy *policies, size_t n,
                              const psoup_ppo_options *options, psoup_ppo **out,
                              psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_ppo *ppo = NULL;
    if (out)
        *out = NULL;
    if (!model || !out || n == 0 || n > INT32_MAX || !policies)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_ppo_create: model or out is NULL, or there is no policy");
    ppo = psoup__alloc(model->context, 1, sizeof(*ppo), error);
    if (!ppo)
        return PSOUP_ERROR_MEMORY;
    psoup_ppo_options defaults = PSOUP_PPO_OPTIONS_INIT;
    ppo->model = model;
    ppo->options = defaults;
    PSOUP__TRY(psoup__options(&ppo->options, sizeof(ppo->options), options, "psoup_ppo_options",
                              error));
    PSOUP__TRY(psoup__ppo_check(&ppo->options, error));
    for (size_t p = 0; p < n; p++)
        PSOUP__TRY(check_policy(model, policies, p, error));
    PSOUP__TRY(check_apart(model, policies, n, error));
    PSOUP__TRY(psoup__reporter_open(&ppo->reporter, model->context, ppo->options.metrics,
                                    ppo->options.on_step, ppo->options.user, error));
    if (ppo->options.samples)
        PSOUP__TRY(psoup_jsonl_create(model->context, ppo->options.samples, 1, &ppo->reporter.samples,
                                      error));
    PSOUP__TRY(psoup__pack_create(model, &ppo->pack, error));
    ppo->policies = psoup__alloc(model->context, n, sizeof(*ppo->policies), error);
    ppo->active = psoup__alloc(model->context, n, sizeof(psoup__policy *), error);
    ppo->requests = psoup__alloc(model->context, n, sizeof(*ppo->requests), error);
    if (!ppo->policies || !ppo->active || !ppo->requests) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    ppo->n = n;
    for (size_t p = 0; p < n; p++)
        PSOUP__TRY(start_policy(ppo, &ppo->policies[p], &policies[p], error));
    if (ppo->options.checkpoint_dir)
        PSOUP__TRY(psoup__ppo_start_checkpoint(ppo, error));
    *out = ppo;
    return PSOUP_OK;
fail:
    psoup_ppo_free(ppo);
    return status;
}

static void free_experience(psoup__experience *x, psoup_context *context) {
    psoup__rollouts_free(&x->rollouts, context);
    psoup__free(context, x->logprob);
    psoup__free(context, x->ref_logprob);
    psoup__free(context, x->value);
    psoup__free(context, x->reward);
    psoup__free(context, x->advantage);
    psoup__free(context, x->returns);
    psoup__free(context, x->first_ratio);
}

void psoup_ppo_free(psoup_ppo *ppo) {
    if (!ppo)
        return;
    psoup_context *context = ppo->model->context;
    for (size_t p = 0; p < ppo->n; p++) {
        psoup__policy *policy = &ppo->policies[p];
        psoup__optimizer_end(&policy->optimizer);
        if (policy->training && psoup__model_adapter(ppo->model, policy->name) == policy->adapter)
            psoup__adapter_train(ppo->model, policy->adapter, false, NULL);
        psoup__best_free(&policy->best, context);
        free_experience(&policy->experience, context);
        free_experience(&policy->validation, context);
        psoup__rollouts_free(&policy->samples, context);
        psoup__free(context, policy->order);
        psoup__free(context, policy->name);
    }
    psoup__free(context, ppo->policies);
    psoup__free(context, ppo->active);
    psoup__free(context, ppo->requests);
    psoup__checkpoint_close(&ppo->checkpoint);
    psoup__reporter_close(&ppo->reporter);
    psoup__pack_free(ppo->pack);
    psoup__free(context, ppo);
}

psoup_status psoup__ppo_refresh(psoup_ppo *ppo, psoup_error *error) {
    for (size_t p = 0; p < ppo->n; p++) {
        psoup__policy *policy = &ppo->policies[p];
        if (psoup__model_adapter(ppo->model, policy->name) != policy->adapter ||
            policy->adapter->grad != policy->optimizer.g)
            return psoup__fail(error, PSOUP_ERROR_STATE,
                               "policy '%s': its adapter was removed or replaced", policy->name);
        policy->index = psoup_model_find_adapter(ppo->model, policy->name);
    }
    return PSOUP_OK;
}

/* Batch after batch through the prompts, each epoch in an order of its own; a prompt as many times as its
 * group has responses. */
psoup_status psoup__ppo_next_prompts(psoup_ppo *ppo, psoup__policy *policy, psoup_error *error) {
    size_t batch = (size_t)ppo->options.batch_size, n = policy->given.n_prompts;
    size_t group = psoup__group_size(&ppo->options);
    psoup__rollouts *out = &policy->experience.rollouts;
    psoup_status status = psoup__rollouts_reserve(out, ppo->model->context, batch, error);
    if (status != PSOUP_OK)
        return status;
    for (size_t i = 0; i < batch; i++) {
        uint64_t place = (uint64_t)policy->state.step * (batch / group) + i / group;
        if (place / n != policy->epoch) {
            policy->epoch = place / n;
            psoup__permutation(policy->order, n,
                               psoup__seed_for(policy->given.seed, PSOUP__FOR_ORDER),
                               policy->epoch);
        }
        out->prompt[i] = &policy->given.prompts[policy->order[place % n]];
    }
    return PSOUP_OK;
}

psoup_status psoup_ppo_get_trace(const psoup_ppo *ppo, size_t policy, psoup_ppo_trace *out,
                                 psoup_error *error) {
    if (!ppo || !out || out->size < sizeof(size_t))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_ppo_get_trace: ppo or out is NULL, or out->size is not set");
    if (policy >= ppo->n)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_ppo_get_trace: policy %zu of %zu",
                           policy, ppo->n);
    const psoup__experience *x = &ppo->policies[policy].experience;
    psoup_ppo_trace trace = {.size = out->size,
                             .rollouts = x->rollouts.n,
                             .tokens = x->rollouts.tokens,
                             .start = x->rollouts.start,
                             .response = x->rollouts.response,
                             .logprob = x->logprob,
                             .ref_logprob = x->ref_logprob,
                             .value = x->value,
                             .reward = x->reward,
                             .advantage = x->advantage,
                             .returns = x->returns,
                             .score = x->rollouts.score,
                             .first_ratio = x->first_ratio,
                             .kl_coefficient = ppo->policies[policy].state.kl_coefficient};
    memcpy(out, &trace, out->size < sizeof(trace) ? out->size : sizeof(trace));
    return PSOUP_OK;
}
