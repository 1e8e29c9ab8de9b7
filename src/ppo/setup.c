/* PPO's handle: what it checks, holds and gives back; the order of its prompts. */
#include <math.h>
#include <string.h>

#include "ppo/ppo.h"

static psoup_status check_prompts(const psoup_model *model, const psoup_ppo_policy *policy,
                                  const psoup_ppo_prompt *prompts, size_t n, const char *what,
                                  psoup_error *error) {
    psoup_status status = PSOUP_OK;
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
        if (!psoup__all_zero(p->reserved, sizeof(p->reserved)))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s': %s[%zu].reserved is not 0",
                               policy->adapter, what, i);
        if (policy->soup)
            PSOUP__TRY(psoup__soup_check_prompt(policy, p, what, i, error));
        PSOUP__TRY(psoup__rewards_check_prompt(policy, p, what, i, error));
    }
fail:
    return status;
}

size_t psoup__ppo_adapters(const psoup_ppo_policy *policy, const char *const **names) {
    *names = policy->soup ? policy->soup->adapters : &policy->adapter;
    return policy->soup ? policy->soup->n : 1;
}

/* An adapter is there, free, and trained by nobody before policy `at`'s adapter `k`. */
static psoup_status check_adapter(const psoup_model *model, const psoup_ppo_policy *policies, size_t at,
                                  size_t k, psoup_error *error) {
    const char *const *names, *const *others;
    psoup__ppo_adapters(&policies[at], &names);
    const psoup__adapter *adapter = names[k] ? psoup__model_adapter(model, names[k]) : NULL;
    if (!adapter)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_ppo: the model has no adapter '%s'",
                           names[k] ? names[k] : "(NULL)");
    if (adapter->grad)
        return psoup__fail(error, PSOUP_ERROR_STATE, "adapter '%s' is being trained already", names[k]);
    for (size_t i = 0; i <= at; i++) {
        size_t n = psoup__ppo_adapters(&policies[i], &others);
        for (size_t j = 0; j < (i < at ? n : k); j++)
            if (strcmp(others[j], names[k]) == 0)
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s' is there twice", names[k]);
    }
    return PSOUP_OK;
}

static psoup_status check_policy(const psoup_model *model, const psoup_ppo_policy *policies,
                                 size_t at, psoup_error *error) {
    const psoup_ppo_policy *policy = &policies[at];
    const char *const *names;
    psoup_status status = PSOUP_OK;
    if (!policy->adapter && policy->soup)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_ppo: a soup has no name");
    for (size_t i = 0; policy->soup && i < at; i++)
        if (strcmp(policies[i].adapter, policy->adapter) == 0)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s' is there twice",
                               policy->adapter);
    if (!psoup__all_zero(policy->reserved, sizeof(policy->reserved)))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s': reserved is not 0",
                           policy->adapter ? policy->adapter : "(NULL)");
    if (policy->soup)
        PSOUP__TRY(psoup__soup_check(policy, error));
    for (size_t k = 0; k < psoup__ppo_adapters(policy, &names); k++)
        PSOUP__TRY(check_adapter(model, policies, at, k, error));
    PSOUP__TRY(psoup__rewards_check(policy, error));
    if (policy->n_prompts == 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s' has no prompts",
                           policy->adapter);
    PSOUP__TRY(check_prompts(model, policy, policy->prompts, policy->n_prompts, "prompts", error));
    PSOUP__TRY(check_prompts(model, policy, policy->validation, policy->n_validation, "validation",
                             error));
fail:
    return status;
}

/* A policy that is trained must score nothing: its head would be its value head. */
static psoup_status check_apart(const psoup_model *model, const psoup_ppo_policy *policies, size_t n,
                                psoup_error *error) {
    for (size_t p = 0; p < n; p++)
        for (size_t i = 0; i < psoup__rewards_count(&policies[p]); i++) {
            const psoup_reward *reward = psoup__rewards_model(&policies[p], i);
            const char *const *names;
            for (size_t q = 0; reward && reward->model == model && q < n; q++)
                for (size_t k = 0; k < psoup__ppo_adapters(&policies[q], &names); k++)
                    if (strcmp(reward->name, names[k]) == 0)
                        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                           "adapter '%s' is both a policy and a reward model",
                                           names[k]);
        }
    return PSOUP_OK;
}

psoup_status psoup__ppo_check_policies(const psoup_model *model, const psoup_ppo_policy *policies, size_t n,
                                       psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t p = 0; p < n; p++)
        PSOUP__TRY(check_policy(model, policies, p, error));
    PSOUP__TRY(check_apart(model, policies, n, error));
fail:
    return status;
}

/* Without a critic a head is left alone, whatever it holds. */
static psoup_status check_weights(const psoup_model *model, const psoup_ppo_policy *policies, size_t n, bool critic,
                                  psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t p = 0; p < n; p++) {
        const char *const *names;
        for (size_t k = 0; k < psoup__ppo_adapters(&policies[p], &names); k++)
            PSOUP__TRY(psoup__adapter_may_train(model, psoup__model_adapter(model, names[k]), critic, error));
    }
fail:
    return status;
}

static psoup_status start_part(psoup_ppo *ppo, psoup__policy *policy, size_t k, const char *name,
                               psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_model *model = ppo->model;
    const psoup_ppo_options *o = &ppo->options;
    psoup__part *part = &policy->parts[k];
    policy->names[k] = part->name = psoup__strdup(model->context, name, error);
    if (!part->name)
        return PSOUP_ERROR_MEMORY;
    part->adapter = psoup__model_adapter(model, name);
    if (psoup__has_critic(o))
        PSOUP__TRY(psoup__adapter_add_head(model, part->adapter, error));
    PSOUP__TRY(psoup__adapter_train(model, part->adapter, true, error));
    part->training = true;
    size_t trained = part->adapter->count; /* a head that stands at its end is left alone */
    if (!psoup__has_critic(o) && part->adapter->head)
        trained -= (size_t)model->config.hidden_size + 1;
    part->optimizer = (psoup__optimizer){.p = part->adapter->data,
                                         .g = part->adapter->grad,
                                         .gradients = part->adapter->gradients,
                                         .stride = part->adapter->count,
                                         .n = trained,
                                         .beta1 = o->beta1,
                                         .beta2 = o->beta2,
                                         .epsilon = o->epsilon,
                                         .weight_decay = o->weight_decay,
                                         .max_grad_norm = o->max_grad_norm,
                                         .max_grad_value = o->max_grad_value};
    PSOUP__TRY(psoup__optimizer_start(&part->optimizer, model->be, error));
fail:
    return status;
}

static psoup_status start_policy(psoup_ppo *ppo, psoup__policy *policy,
                                 const psoup_ppo_policy *given, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_model *model = ppo->model;
    const psoup_ppo_options *o = &ppo->options;
    policy->given = *given;
    const char *const *names;
    size_t n = psoup__ppo_adapters(given, &names);
    policy->name = psoup__strdup(model->context, given->adapter, error);
    policy->order = psoup__alloc(model->context, given->n_prompts, sizeof(*policy->order), error);
    policy->parts = psoup__alloc(model->context, n, sizeof(*policy->parts), error);
    policy->names = psoup__alloc(model->context, n, sizeof(*policy->names), error);
    policy->adapters = psoup__alloc(model->context, n, sizeof(*policy->adapters), error);
    if (!policy->name || !policy->order || !policy->parts || !policy->names || !policy->adapters)
        return PSOUP_ERROR_MEMORY;
    policy->n_parts = n;
    policy->given.adapter = policy->name;
    if (given->soup) {
        policy->soup = *given->soup;
        policy->soup.adapters = policy->names;
        policy->given.soup = &policy->soup;
    }
    policy->epoch = UINT64_MAX;
    policy->state.kl_coefficient = o->kl_coefficient;
    int64_t epoch = (int64_t)(given->n_prompts / ((size_t)o->batch_size / psoup__group_size(o)));
    policy->total = o->steps ? o->steps : epoch ? epoch : 1;
    for (size_t k = 0; k < n; k++)
        PSOUP__TRY(start_part(ppo, policy, k, names[k], error));
    PSOUP__TRY(psoup__rewards_start(ppo, policy, error));
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
    ppo->pauses = (psoup__pauses){.ask_every = 0.5, .keep_every = 60.0, .asked = psoup__now()};
    PSOUP__TRY(psoup__options(&ppo->options, sizeof(ppo->options), options, "psoup_ppo_options",
                              error));
    PSOUP__TRY(psoup__team_join(&ppo->team, model->context, ppo->options.comm, error));
    PSOUP__TRY(psoup__ppo_check(&ppo->options, error));
    PSOUP__TRY(psoup__ppo_check_policies(model, policies, n, error));
    PSOUP__TRY(check_weights(model, policies, n, psoup__has_critic(&ppo->options), error));
    PSOUP__TRY(psoup__reporter_open(&ppo->reporter, &ppo->team, ppo->options.metrics,
                                    ppo->options.on_step, ppo->options.user, error));
    if (ppo->options.samples && ppo->team.rank == 0)
        PSOUP__TRY(psoup_jsonl_create(model->context, ppo->options.samples, 1, &ppo->reporter.samples,
                                      error));
    PSOUP__TRY(psoup__passes_create(model, ppo->options.gradient_checkpointing, &ppo->passes, error));
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
    if (psoup__checkpoint_wanted(ppo->options.checkpoint_dir, &ppo->team))
        PSOUP__TRY(psoup__ppo_start_checkpoint(ppo, error));
    *out = ppo;
    return PSOUP_OK;
fail:
    psoup__team_tell(&ppo->team, status, error);
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

static void free_part(psoup_model *model, psoup__part *part) {
    psoup__optimizer_end(&part->optimizer);
    if (part->training && psoup__model_adapter(model, part->name) == part->adapter)
        psoup__adapter_train(model, part->adapter, false, NULL);
    psoup__best_free(&part->best, model->context);
    psoup__snapshot_free(&part->before, model->context);
    psoup__free(model->context, part->name);
}

void psoup_ppo_free(psoup_ppo *ppo) {
    if (!ppo)
        return;
    psoup_context *context = ppo->model->context;
    for (size_t p = 0; p < ppo->n; p++) {
        psoup__policy *policy = &ppo->policies[p];
        for (size_t k = 0; k < policy->n_parts; k++)
            free_part(ppo->model, &policy->parts[k]);
        psoup__rewards_end(context, policy);
        psoup__free(context, policy->parts);
        psoup__free(context, policy->names);
        psoup__free(context, policy->adapters);
        free_experience(&policy->experience, context);
        free_experience(&policy->validation, context);
        psoup__rollouts_free(&policy->samples, context);
        psoup__free(context, policy->begun.data);
        psoup__free(context, policy->order);
        psoup__free(context, policy->name);
    }
    psoup__free(context, ppo->policies);
    psoup__free(context, ppo->active);
    psoup__free(context, ppo->requests);
    psoup__checkpoint_close(&ppo->checkpoint);
    psoup__reporter_close(&ppo->reporter);
    psoup__team_leave(&ppo->team);
    psoup__passes_free(ppo->passes);
    psoup__free(context, ppo);
}

psoup_status psoup__ppo_refresh(psoup_ppo *ppo, psoup_error *error) {
    for (size_t p = 0; p < ppo->n; p++) {
        psoup__policy *policy = &ppo->policies[p];
        for (size_t k = 0; k < policy->n_parts; k++) {
            const psoup__part *part = &policy->parts[k];
            if (psoup__model_adapter(ppo->model, part->name) != part->adapter ||
                part->adapter->grad != part->optimizer.g)
                return psoup__fail(error, PSOUP_ERROR_STATE,
                                   "policy '%s': its adapter was removed or replaced", part->name);
            policy->adapters[k] = psoup_model_find_adapter(ppo->model, part->name);
        }
    }
    return PSOUP_OK;
}

/* Batch after batch through the prompts, each epoch in an order of its own; a prompt as many times as its
 * group has responses. */
psoup_status psoup__ppo_next_prompts(psoup_ppo *ppo, psoup__policy *policy, psoup_error *error) {
    size_t batch = (size_t)ppo->options.batch_size, n = policy->given.n_prompts;
    size_t group = psoup__group_size(&ppo->options);
    psoup__rollouts *out = &policy->experience.rollouts;
    psoup_status status =
        psoup__rollouts_reserve(out, ppo->model->context, batch, policy->n_parts, policy->n_sources, error);
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
    psoup__draw_mixes(policy, out, policy->given.seed, policy->state.rollouts, group);
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
                             .kl_coefficient = ppo->policies[policy].state.kl_coefficient,
                             .adapters = ppo->policies[policy].n_parts,
                             .mix = x->rollouts.weight};
    memcpy(out, &trace, out->size < sizeof(trace) ? out->size : sizeof(trace));
    return PSOUP_OK;
}
