/* One step of PPO, RLOO or GRPO on n policies side by side, in the order of Jang et al. 2023 (section 3
 * and its appendix) and of the trainer it ran on (trl 0.7). Everything from the scores to the KL
 * coefficient is each policy's own. */
#include <math.h>

#include "ppo/ppo.h"

/* ---- 1. sample, 2. score ------------------------------------------------------------------------- */

static psoup_status collect(psoup_ppo *ppo, size_t n, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t p = 0; p < n; p++) {
        psoup__policy *policy = ppo->active[p];
        PSOUP__TRY(psoup__ppo_next_prompts(ppo, policy, error));
        ppo->requests[p] = (psoup__request){.policy = &policy->given,
                                            .sources = policy->sources,
                                            .adapters = policy->adapters,
                                            .seed = policy->given.seed,
                                            .sequence = policy->state.rollouts,
                                            .step = (uint64_t)policy->state.step,
                                            .draw = true,
                                            .begun = &policy->begun,
                                            .out = &policy->experience.rollouts};
        policy->next.rollouts += policy->experience.rollouts.n;
    }
    PSOUP__TRY(psoup__ppo_draw(ppo, n, true, error));
fail:
    return status;
}

/* Takes diverged policies out of the active ones and their requests; *n receives who is left. */
static void drop_diverged(psoup_ppo *ppo, size_t *n, bool validation) {
    size_t left = 0;
    for (size_t p = 0; p < *n; p++) {
        psoup__policy *policy = ppo->active[p];
        psoup__experience *x = validation ? &policy->validation : &policy->experience;
        if (x->rollouts.diverged) {
            policy->state.failed = 1;
            policy->begun.n = 0;
            x->rollouts.n = x->rollouts.tokens = 0;
            psoup__log(ppo->model->context, PSOUP_LOG_WARNING,
                       "ppo: policy '%s' diverged: its logits are not numbers; it leaves the run "
                       "after %lld steps", policy->name, (long long)policy->state.step);
            continue;
        }
        ppo->requests[left] = ppo->requests[p];
        ppo->active[left++] = policy;
    }
    *n = left;
}

/* ---- 3. normalise, 5. reward, 6. advantages ------------------------------------------------------- */

static void reward_tokens(const psoup_ppo_options *o, psoup__policy *policy) {
    psoup__experience *x = &policy->experience;
    const psoup__rollouts *r = &x->rollouts;
    double beta = o->objective == PSOUP_OBJECTIVE_GRPO ? 0.0 : policy->state.kl_coefficient;
    /* They are free until the advantages, and every response has a token: tokens ≥ n. */
    psoup__update_moments(o, policy, x->returns, x->advantage);
    for (size_t i = 0; i < r->n; i++) {
        size_t begin = (size_t)r->start[i], n = (size_t)r->start[i + 1] - begin;
        psoup__kl_rewards(x->reward + begin, x->logprob + begin, x->ref_logprob + begin, n,
                          o->kl_estimator, beta, psoup__earned(o, policy, i));
    }
}

/* One advantage for all tokens of a response, from the rewards of its group. */
static psoup_status compare_groups(const psoup_ppo *ppo, psoup__experience *x, psoup_error *error) {
    const psoup_ppo_options *o = &ppo->options;
    const psoup__rollouts *r = &x->rollouts;
    size_t k = psoup__group_size(o);
    bool rloo = o->objective == PSOUP_OBJECTIVE_RLOO;
    double *reward = psoup__alloc(ppo->model->context, 2 * r->n, sizeof(*reward), error);
    double *advantage = reward + r->n;
    if (!reward)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < r->n; i++)
        for (int32_t t = r->start[i]; t < r->start[i + 1]; t++)
            reward[i] += x->reward[t];
    for (size_t first = 0; first < r->n; first += k) {
        (rloo ? psoup__leave_one_out : psoup__group_centre)(advantage + first, reward + first, k);
        if (!rloo && o->scale_rewards == PSOUP_SCALE_GROUP)
            psoup__scale_advantages(advantage + first, k, psoup__reward_deviation(reward + first, k));
    }
    if (!rloo && o->scale_rewards == PSOUP_SCALE_BATCH)
        psoup__scale_advantages(advantage, r->n, psoup__reward_deviation(reward, r->n));
    for (size_t i = 0; i < r->n; i++)
        for (int32_t t = r->start[i]; t < r->start[i + 1]; t++) {
            x->advantage[t] = (float)advantage[i];
            x->returns[t] = (float)reward[i];
        }
    psoup__free(ppo->model->context, reward);
    return PSOUP_OK;
}

static psoup_status estimate_advantages(const psoup_ppo *ppo, psoup__experience *x, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    const psoup_ppo_options *o = &ppo->options;
    const psoup__rollouts *r = &x->rollouts;
    psoup__backend *be = ppo->model->be;
    const size_t bytes = r->tokens * sizeof(float);
    float *reward = be->ops->alloc(be, r->tokens, 4 * sizeof(*reward), error);
    int32_t *first = be->ops->alloc(be, r->n + 1, sizeof(*first), error);
    if (!reward || !first)
        goto fail;
    float *value = reward + r->tokens, *advantage = value + r->tokens, *returns = advantage + r->tokens;
    be->ops->write(be, reward, x->reward, bytes);
    be->ops->write(be, value, x->value, bytes);
    be->ops->write(be, first, r->start, (r->n + 1) * sizeof(*first));
    be->ops->gae(be, advantage, returns, reward, value, first, (int32_t)r->n, o->gamma, o->lambda);
    PSOUP__TRY(be->ops->read(be, x->advantage, advantage, bytes, error));
    PSOUP__TRY(be->ops->read(be, x->returns, returns, bytes, error));
    size_t groups = o->whiten_advantages ? (size_t)o->whiten_groups : 0;
    for (size_t g = 0; g < groups; g++) {
        int32_t begin = r->start[r->n * g / groups], end = r->start[r->n * (g + 1) / groups];
        psoup__whiten(x->advantage + begin, (size_t)(end - begin));
    }
fail:
    be->ops->release(be, reward);
    be->ops->release(be, first);
    return status;
}

/* ---- the step ------------------------------------------------------------------------------------ */

static int64_t steps_left(const psoup_ppo *ppo) {
    int64_t most = 0;
    for (size_t p = 0; p < ppo->n; p++) {
        const psoup__policy *policy = &ppo->policies[p];
        int64_t left = policy->state.failed ? 0 : policy->total - policy->state.step;
        most = left > most ? left : most;
    }
    return most;
}

static psoup_status no_policy_left(const psoup_ppo *ppo, psoup_error *error) {
    for (size_t p = 0; p < ppo->n; p++)
        if (!ppo->policies[p].state.failed)
            return PSOUP_OK;
    return psoup__fail(error, PSOUP_ERROR_STATE,
                       "policy '%s'%s diverged: logits are not numbers", ppo->policies[0].name,
                       ppo->n > 1 ? " and all others" : "");
}

/* The active policies' step; it moves their `next`, which the caller makes their state. */
static psoup_status step(psoup_ppo *ppo, size_t *n, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const psoup_ppo_options *o = &ppo->options;
    ppo->began[PSOUP__ROLLOUT] = psoup__now();
    PSOUP__TRY(collect(ppo, *n, error));
    drop_diverged(ppo, n, false);
    ppo->began[PSOUP__SCORE] = psoup__now();
    PSOUP__TRY(psoup__score_rollouts(ppo->model, &ppo->team, o, ppo->requests, *n, error));
    PSOUP__TRY(psoup__ppo_pause(ppo, *n, error));
    ppo->began[PSOUP__EVALUATE] = psoup__now();
    PSOUP__TRY(psoup__ppo_evaluate(ppo, ppo->active, *n, false, error));
    PSOUP__TRY(psoup__ppo_pause(ppo, *n, error));
    for (size_t p = 0; p < *n; p++) {
        reward_tokens(o, ppo->active[p]);
        if (psoup__has_critic(o))
            PSOUP__TRY(estimate_advantages(ppo, &ppo->active[p]->experience, error));
        else
            PSOUP__TRY(compare_groups(ppo, &ppo->active[p]->experience, error));
    }
    for (size_t p = 0; p < *n; p++) {
        psoup__policy *policy = ppo->active[p];
        psoup__ppo_summary seen;
        policy->metrics.n = policy->metrics.n_times = 0;
        PSOUP__TRY(psoup__ppo_report(ppo, policy, &policy->experience, &policy->metrics, &seen, error));
        psoup__ppo_watch(ppo, policy, &seen);
        psoup__metric(&policy->metrics, "kl_coefficient", policy->state.kl_coefficient);
        if (o->adaptive_kl)
            policy->next.kl_coefficient =
                psoup__kl_coefficient(policy->state.kl_coefficient, seen.kl, o->kl_target,
                                      o->kl_horizon, (double)policy->experience.rollouts.n);
    }
    ppo->began[PSOUP__UPDATE] = psoup__now();
    PSOUP__TRY(psoup__ppo_update(ppo, ppo->active, *n, error));
    ppo->began[PSOUP__PHASES] = psoup__now();
    psoup__ppo_report_times(ppo, *n);
fail:
    return status;
}

static psoup_status take_step(psoup_ppo *ppo, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t n = 0;
    PSOUP__TRY(psoup__ppo_refresh(ppo, error));
    for (size_t p = 0; p < ppo->n; p++) {
        psoup__policy *policy = &ppo->policies[p];
        if (policy->state.failed || policy->state.step >= policy->total)
            continue;
        policy->next = policy->state;
        policy->next.step++;
        ppo->active[n++] = policy;
    }
    if (n) {
        PSOUP__TRY(psoup__ppo_begin(ppo, n, error));
        status = step(ppo, &n, error);
        psoup__team_tell(&ppo->team, status, error);
        if (ppo->team.lost)
            psoup__ppo_go_back(ppo);
        PSOUP__TRY(status);
        PSOUP__TRY(no_policy_left(ppo, error));
    }
    for (size_t p = 0; p < n; p++) {
        ppo->active[p]->state = ppo->active[p]->next;
        ppo->active[p]->begun.n = 0;
    }
    for (size_t p = 0; p < n; p++) {
        psoup__policy *policy = ppo->active[p];
        if (!psoup__goes_on(&ppo->team, &status,
                            psoup__report(&ppo->reporter, "train", policy->name, policy->state.step, policy->total,
                                          &policy->metrics, error)))
            break;
    }
fail:
    return status;
}

/* After a step and its validation, or where the run was told to stop. */
static psoup_status keep(psoup_ppo *ppo, psoup_status told, psoup_error *error) {
    int64_t moved = 0;
    for (size_t p = 0; p < ppo->n; p++) {
        const psoup__ppo_state *s = &ppo->policies[p].state;
        if (!s->failed && s->step < ppo->policies[p].total)
            moved = s->step > moved ? s->step : moved;
    }
    return psoup__checkpoint_at(&ppo->checkpoint, told, psoup__ppo_steps_done(ppo), moved, steps_left(ppo) == 0, error);
}

int64_t psoup__ppo_steps_done(const psoup_ppo *ppo) {
    int64_t done = 0;
    for (size_t p = 0; p < ppo->n; p++)
        done = ppo->policies[p].state.step > done ? ppo->policies[p].state.step : done;
    return done;
}

int psoup_ppo_diverged(const psoup_ppo *ppo, size_t policy) {
    return policy < ppo->n && ppo->policies[policy].state.failed != 0;
}

/* ---- validation, and the whole run ---------------------------------------------------------------- */

/* Makes those whose validation is due now the active ones, and counts them. */
static size_t validation_due(psoup_ppo *ppo) {
    int32_t every = ppo->options.validate_every;
    size_t due = 0;
    for (size_t p = 0; p < ppo->n; p++) {
        psoup__policy *policy = &ppo->policies[p];
        const psoup__ppo_state *s = &policy->state;
        if (!s->failed && policy->given.n_validation && s->step > s->validated &&
            (s->step == policy->total || (every && s->step % every == 0)))
            ppo->active[due++] = policy;
    }
    return due;
}

/* Mean reward and KL on the validation prompts, sampled with the same random words every time. */
static psoup_status validate(psoup_ppo *ppo, size_t n, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    PSOUP__TRY(psoup__ppo_refresh(ppo, error));
    for (size_t p = 0; p < n; p++) {
        psoup__policy *policy = ppo->active[p];
        psoup__rollouts *out = &policy->validation.rollouts;
        uint64_t seed = psoup__seed_for(policy->given.seed, PSOUP__FOR_VALIDATION);
        PSOUP__TRY(psoup__rollouts_reserve(out, ppo->model->context, policy->given.n_validation,
                                           policy->n_parts, policy->n_sources, error));
        for (size_t i = 0; i < out->n; i++)
            out->prompt[i] = &policy->given.validation[i];
        psoup__draw_mixes(policy, out, seed, 0, 1);
        ppo->requests[p] = (psoup__request){.policy = &policy->given,
                                            .sources = policy->sources,
                                            .adapters = policy->adapters,
                                            .seed = seed,
                                            .out = out};
    }
    PSOUP__TRY(psoup__ppo_draw(ppo, n, false, error));
    drop_diverged(ppo, &n, true);
    PSOUP__TRY(psoup__score_rollouts(ppo->model, &ppo->team, &ppo->options, ppo->requests, n, error));
    PSOUP__TRY(psoup__ppo_evaluate(ppo, ppo->active, n, true, error));
    for (size_t p = 0; p < n; p++)
        ppo->active[p]->state.validated = ppo->active[p]->state.step;
    for (size_t p = 0; p < n; p++) {
        psoup__policy *policy = ppo->active[p];
        psoup__metrics metrics = {.n = 0};
        psoup__ppo_summary seen; /* its status is apart: a policy that said stop is not forgotten */
        psoup_status told = psoup__ppo_report(ppo, policy, &policy->validation, &metrics, &seen, error);
        for (size_t k = 0; ppo->options.keep_best && told == PSOUP_OK && k < policy->n_parts; k++) {
            psoup__part *part = &policy->parts[k];
            told = psoup__best_offer(&part->best, ppo->model->be, part->adapter->data,
                                     part->adapter->count, seen.reward, 0.0, policy->state.step, error);
        }
        if (told == PSOUP_OK)
            told = psoup__report(&ppo->reporter, "validation", policy->name, policy->state.step, policy->total,
                                 &metrics, error);
        if (!psoup__goes_on(&ppo->team, &status, told))
            break;
    }
fail:
    return status;
}

static bool anything_due(psoup_ppo *ppo) {
    return validation_due(ppo) || psoup__ppo_samples_due(ppo);
}

/* The next thing to do: a validation, samples, or a step. *stepped becomes true with the latter. One
 * checkpoint is for a step and what is due after it. */
static psoup_status advance(psoup_ppo *ppo, bool *stepped, psoup_error *error) {
    psoup_status status;
    size_t due = validation_due(ppo);
    if (due) {
        status = validate(ppo, due, error);
    } else if ((due = psoup__ppo_samples_due(ppo)) > 0) {
        status = psoup__ppo_sample(ppo, due, error);
    } else {
        *stepped = true;
        status = take_step(ppo, error);
    }
    psoup__team_tell(&ppo->team, status, error);
    return status != PSOUP_OK || !anything_due(ppo) ? keep(ppo, status, error) : status;
}

psoup_status psoup_ppo_step(psoup_ppo *ppo, int64_t *remaining, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    bool stepped = false;
    if (!ppo)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_ppo_step: ppo is NULL");
    ppo->team.agreed = PSOUP_OK;
    while (status == PSOUP_OK && (!stepped || anything_due(ppo)))
        status = advance(ppo, &stepped, error);
    if (remaining)
        *remaining = steps_left(ppo);
    return status;
}

psoup_status psoup_ppo_run(psoup_ppo *ppo, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    bool stepped = false;
    if (!ppo)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_ppo_run: ppo is NULL");
    ppo->team.agreed = PSOUP_OK;
    while (anything_due(ppo) || steps_left(ppo) > 0)
        PSOUP__TRY(advance(ppo, &stepped, error));
    for (size_t p = 0; p < ppo->n; p++) {
        const psoup__policy *policy = &ppo->policies[p];
        for (size_t k = 0; k < policy->n_parts; k++)
            psoup__best_restore(&policy->parts[k].best, ppo->model->be, policy->parts[k].adapter->data);
        psoup__best_tell(&policy->parts[0].best, &ppo->team, "ppo", policy->name, policy->total);
    }
    for (size_t p = 0; p < ppo->n; p++)
        if (ppo->policies[p].state.failed)
            return psoup__fail(error, PSOUP_ERROR_STATE,
                               "policy '%s' diverged after %lld of %lld steps%s",
                               ppo->policies[p].name, (long long)ppo->policies[p].state.step,
                               (long long)ppo->policies[p].total,
                               ppo->n > 1 ? "; the others are done" : "");
fail:
    return status;
}
