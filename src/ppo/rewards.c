/* What a policy is paid by: reward models and functions, one or several, and what becomes of their scores before a
 * token sees them. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "ppo/ppo.h"

/* ---- the forms in which a caller gives them --------------------------------------------------------- */

size_t psoup__rewards_count(const psoup_ppo_policy *policy) {
    if (policy->sources)
        return policy->n_sources;
    if (policy->reward_fn)
        return policy->soup ? policy->soup->n : 1;
    return policy->n_rewards;
}

psoup_reward *psoup__rewards_model(const psoup_ppo_policy *policy, size_t k) {
    if (policy->sources)
        return policy->sources[k].model;
    return policy->reward_fn ? NULL : policy->rewards[k];
}

size_t psoup__rewards_adapter(const psoup_ppo_policy *policy, size_t k) {
    if (policy->sources)
        return (size_t)policy->sources[k].adapter;
    return policy->soup ? k : 0;
}

static const char *source_name(const psoup_reward_source *source) {
    return source->name || !source->model ? source->name : source->model->name;
}

/* ---- what is refused -------------------------------------------------------------------------------- */

static psoup_status check_source(const psoup_ppo_policy *policy, size_t k, psoup_error *error) {
    const psoup_reward_source *source = &policy->sources[k];
    const char *name = source_name(source), *const *adapters;
    size_t n = psoup__ppo_adapters(policy, &adapters);
    if (!source->model == !source->function)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "policy '%s': sources[%zu] has %s: expected a model or a function", policy->adapter, k,
                           source->model ? "both" : "neither");
    if (!name || !*name)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s': sources[%zu] has no name", policy->adapter, k);
    if (!isfinite(source->weight) || source->weight == 0.0f)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "policy '%s': the weight of source '%s' is %g: expected a finite number other than 0",
                           policy->adapter, name, (double)source->weight);
    if (source->adapter < 0 || (size_t)source->adapter >= n)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s': source '%s' is of adapter %d of %zu",
                           policy->adapter, name, source->adapter, n);
    if (!psoup__all_zero(source->reserved2, sizeof(source->reserved2)))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s': source '%s': reserved2 is not 0",
                           policy->adapter, name);
    for (size_t i = 0; i < k; i++)
        if (strcmp(source_name(&policy->sources[i]), name) == 0)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s': source '%s' is there twice",
                               policy->adapter, name);
    return PSOUP_OK;
}

/* Every adapter of a soup is paid for something. */
static psoup_status check_adapters(const psoup_ppo_policy *policy, psoup_error *error) {
    const char *const *adapters;
    bool paid[PSOUP__MAX_SOUP] = {false};
    for (size_t k = 0; k < policy->n_sources; k++)
        paid[policy->sources[k].adapter] = true;
    for (size_t a = 0; a < psoup__ppo_adapters(policy, &adapters); a++)
        if (!paid[a])
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s': no source is of its adapter '%s'",
                               policy->adapter, adapters[a]);
    return PSOUP_OK;
}

psoup_status psoup__rewards_check(const psoup_ppo_policy *policy, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t n = psoup__rewards_count(policy);
    if (policy->sources && (policy->rewards || policy->n_rewards || policy->reward_fn))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "policy '%s' has sources, and rewards or reward_fn: expected one of the three",
                           policy->adapter);
    if (!policy->sources && !policy->reward_fn && (n == 0 || !policy->rewards))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s' has neither a reward model nor a callback",
                           policy->adapter);
    if (n == 0 || n > PSOUP__MAX_SOURCES)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s' has %zu rewards: expected 1 to %d",
                           policy->adapter, n, PSOUP__MAX_SOURCES);
    for (size_t k = 0; k < n; k++) {
        psoup__adapter *adapter = NULL;
        if (policy->sources)
            PSOUP__TRY(check_source(policy, k, error));
        psoup_reward *model = psoup__rewards_model(policy, k);
        if (!policy->sources && !policy->reward_fn && !model)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s': rewards[%zu] is NULL", policy->adapter, k);
        if (model)
            PSOUP__TRY(psoup__reward_adapter(model, &adapter, NULL, error));
    }
    if (policy->sources)
        PSOUP__TRY(check_adapters(policy, error));
fail:
    return status;
}

psoup_status psoup__rewards_check_prompt(const psoup_ppo_policy *policy, const psoup_ppo_prompt *prompt,
                                         const char *what, size_t i, psoup_error *error) {
    size_t n = psoup__rewards_count(policy);
    if (!policy->sources && policy->reward_fn)
        return PSOUP_OK;
    if (prompt->inputs && prompt->n_inputs == 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s': %s[%zu] lists no reward input",
                           policy->adapter, what, i);
    for (size_t k = 0; prompt->inputs && k < prompt->n_inputs; k++) {
        const psoup_reward_input *input = &prompt->inputs[k];
        if (input->reward < 0 || (size_t)input->reward >= n)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s': %s[%zu] names reward %d of %zu",
                               policy->adapter, what, i, input->reward, n);
        if (!policy->soup && !psoup__rewards_model(policy, (size_t)input->reward))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "policy '%s': %s[%zu] has an input of reward %d, which is a function",
                               policy->adapter, what, i, input->reward);
        if (!isfinite(input->weight) || (input->n && !input->tokens))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "policy '%s': reward input %zu of %s[%zu] has weight %g and %s", policy->adapter,
                               k, what, i, (double)input->weight, input->tokens ? "tokens" : "no tokens");
    }
    return PSOUP_OK;
}

/* ---- the one form that they take ---------------------------------------------------------------------- */

/* Under which name a reward is reported; NULL: it is the only one. A list of `rewards` may name one twice. */
static const char *reported_name(const psoup__policy *policy, size_t k) {
    const psoup_ppo_policy *given = &policy->given;
    if (given->sources)
        return source_name(&given->sources[k]);
    if (given->soup)
        return policy->names[k];
    return policy->n_sources > 1 ? given->rewards[k]->name : NULL;
}

psoup__source psoup__rewards_source(const psoup_ppo_policy *policy, size_t k) {
    const psoup_reward_source *given = policy->sources ? &policy->sources[k] : NULL;
    return (psoup__source){.model = psoup__rewards_model(policy, k),
                           .function = given ? given->function : policy->reward_fn,
                           .user = given ? given->user : policy->reward_user,
                           .weight = given ? given->weight : 1.0f,
                           .adapter = psoup__rewards_adapter(policy, k)};
}

psoup_status psoup__rewards_start(psoup_ppo *ppo, psoup__policy *policy, psoup_error *error) {
    psoup_context *context = ppo->model->context;
    const psoup_ppo_policy *given = &policy->given;
    size_t n = psoup__rewards_count(given);
    policy->sources = psoup__alloc(context, n, sizeof(*policy->sources), error);
    if (!policy->sources)
        return PSOUP_ERROR_MEMORY;
    policy->n_sources = n;
    for (size_t k = 0; k < n; k++) {
        psoup__source *source = &policy->sources[k];
        const char *name = reported_name(policy, k);
        *source = psoup__rewards_source(given, k);
        if (name)
            source->metric = psoup__format(context, error, "reward/%s", name);
        for (size_t i = 0; source->metric && i < k; i++)
            if (policy->sources[i].metric && strcmp(policy->sources[i].metric, source->metric) == 0) {
                psoup__free(context, source->metric);
                source->metric = psoup__format(context, error, "reward/%s.%zu", name, k);
            }
        if (name && !source->metric)
            return PSOUP_ERROR_MEMORY;
    }
    return PSOUP_OK;
}

void psoup__rewards_end(psoup_context *context, psoup__policy *policy) {
    for (size_t k = 0; k < policy->n_sources; k++)
        psoup__free(context, policy->sources[k].metric);
    psoup__free(context, policy->sources);
}

/* ---- from scores to rewards --------------------------------------------------------------------------- */

/* Whether each reward has moments of its own. */
static bool apart(const psoup_ppo_options *o, const psoup__policy *policy) {
    return policy->given.soup || o->normalize_apart;
}

/* s ← (s − μ) / σ over all scores so far, this batch included; then within ±reward_clip: trl's
 * use_score_scaling, use_score_norm and score_clip. */
static double normalised(const psoup_ppo_options *o, const psoup__moments *moments, double score) {
    if (o->normalize_reward)
        score = (score - moments->mean) / (psoup__moments_deviation(moments) + (double)FLT_EPSILON);
    if (o->reward_clip > 0.0f)
        score = fmin(fmax(score, -(double)o->reward_clip), o->reward_clip);
    return score;
}

static double length_of(const psoup__rollouts *r, size_t i) { return (double)(r->start[i + 1] - r->start[i]); }

/* What is normalised of response i: reward k's score, or the sum of all; less its length's part. */
static float to_normalise(const psoup_ppo_options *o, const psoup__policy *policy, size_t i, size_t k) {
    const psoup__rollouts *r = &policy->experience.rollouts;
    float score = apart(o, policy) ? r->part_score[i * r->sources + k] : r->score[i];
    if (o->length_correction > 0.0f)
        score -= (float)(o->length_correction * psoup__trend_at(&policy->next.trends[k], length_of(r, i)));
    return score - (r->finish[i] == PSOUP_FINISH_STOP ? 0.0f : o->truncation_penalty);
}

/* How much of what a response earned reward k's, or the sum's, normalised score is; 0: it was not asked. */
static double share_of(const psoup_ppo_options *o, const psoup__policy *policy, size_t i, size_t k) {
    const psoup__rollouts *r = &policy->experience.rollouts;
    return apart(o, policy) ? r->share[i * r->sources + k] : 1.0;
}

static size_t normalised_rewards(const psoup_ppo_options *o, const psoup__policy *policy) {
    return apart(o, policy) ? policy->n_sources : 1;
}

static void update_trend(const psoup_ppo_options *o, psoup__policy *policy, size_t k, float *lengths, float *scores) {
    const psoup__rollouts *r = &policy->experience.rollouts;
    size_t n = 0;
    for (size_t i = 0; i < r->n; i++)
        if (share_of(o, policy, i, k) != 0.0) {
            scores[n] = apart(o, policy) ? r->part_score[i * r->sources + k] : r->score[i];
            lengths[n++] = (float)length_of(r, i);
        }
    psoup__trend_update(&policy->next.trends[k], lengths, scores, n);
}

void psoup__update_moments(const psoup_ppo_options *o, psoup__policy *policy, float *scratch, float *more) {
    const psoup__rollouts *r = &policy->experience.rollouts;
    for (size_t k = 0; k < normalised_rewards(o, policy); k++) {
        size_t n = 0;
        if (o->length_correction > 0.0f)
            update_trend(o, policy, k, scratch, more);
        for (size_t i = 0; i < r->n; i++)
            if (share_of(o, policy, i, k) != 0.0)
                scratch[n++] = to_normalise(o, policy, i, k);
        psoup__moments_update(&policy->next.moments[k], scratch, n);
    }
}

/* λ for each token beyond the target. With no target and λ = 1/N it is the length penalty of Singhal et al. 2023 (arXiv
 * 2310.03716), (length / N) · σ; with a target of L_max − L_cache and λ = 1 / L_cache the soft overlong punishment of
 * Yu et al. 2025 (DAPO, arXiv 2503.14476). */
static double length_penalty(const psoup_ppo_options *o, const psoup__rollouts *r, size_t i) {
    int32_t beyond = r->start[i + 1] - r->start[i] - o->length_target;
    return beyond > 0 ? (double)o->length_penalty * beyond : 0.0;
}

double psoup__earned(const psoup_ppo_options *o, const psoup__policy *policy, size_t i) {
    double sum = 0.0;
    for (size_t k = 0; k < normalised_rewards(o, policy); k++) {
        double share = share_of(o, policy, i, k);
        if (share != 0.0)
            sum += share * normalised(o, &policy->next.moments[k], to_normalise(o, policy, i, k));
    }
    return sum - length_penalty(o, &policy->experience.rollouts, i);
}

/* Of the step's scores with the lengths; 0 where either are all the same. */
static double length_correlation(const psoup__rollouts *r) {
    double length = 0.0, score = 0.0, squares[2] = {0.0, 0.0}, products = 0.0, n = (double)r->n;
    for (size_t i = 0; i < r->n; i++) {
        length += length_of(r, i) / n;
        score += r->score[i] / n;
    }
    for (size_t i = 0; i < r->n; i++) {
        double l = length_of(r, i) - length, s = r->score[i] - score;
        squares[0] += l * l;
        squares[1] += s * s;
        products += l * s;
    }
    return squares[0] > 0.0 && squares[1] > 0.0 ? products / sqrt(squares[0] * squares[1]) : 0.0;
}

void psoup__report_rewards(const psoup_ppo_options *o, const psoup__policy *policy, const psoup__rollouts *r,
                           psoup__metrics *metrics) {
    double penalty = 0.0;
    for (size_t k = 0; k < r->sources; k++) {
        double sum = 0.0, n = 0.0;
        for (size_t i = 0; policy->sources[k].metric && i < r->n; i++)
            if (r->share[i * r->sources + k] != 0.0f) {
                sum += r->part_score[i * r->sources + k];
                n++;
            }
        if (n > 0.0)
            psoup__metric(metrics, policy->sources[k].metric, sum / n);
    }
    for (size_t i = 0; i < r->n; i++)
        penalty += length_penalty(o, r, i);
    if (o->length_penalty != 0.0f)
        psoup__metric(metrics, "length_penalty", penalty / (double)r->n);
    if (o->length_correction > 0.0f)
        psoup__metric(metrics, "length_correlation", length_correlation(r));
}
