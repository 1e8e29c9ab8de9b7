/* Soups that are trained as one: what is refused, and the mixes of a step. A policy of one adapter is a soup of one,
 * whose mix is always 1. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "ppo/ppo.h"

/* ---- what is refused ------------------------------------------------------------------------------ */

psoup_status psoup__soup_check(const psoup_ppo_policy *policy, psoup_error *error) {
    const psoup_ppo_soup *soup = policy->soup;
    if (soup->size < sizeof(*soup) || soup->reserved || !soup->adapters || soup->n < 1 ||
        soup->n > PSOUP__MAX_SOUP)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "policy '%s': its soup has size %zu and %zu adapters: expected "
                           "PSOUP_PPO_SOUP_INIT and 1 to %d", policy->adapter, soup->size,
                           soup->adapters ? soup->n : 0, PSOUP__MAX_SOUP);
    if (!(soup->concentration >= 0.0f))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "policy '%s': its soup's concentration is %g: expected 0 to infinity",
                           policy->adapter, (double)soup->concentration);
    if (!policy->sources && !policy->reward_fn && policy->n_rewards != soup->n)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "policy '%s' has %zu rewards: expected one for each of its soup's %zu adapters",
                           policy->adapter, policy->n_rewards, soup->n);
    return PSOUP_OK;
}

psoup_status psoup__soup_check_prompt(const psoup_ppo_policy *policy, const psoup_ppo_prompt *prompt,
                                      const char *what, size_t i, psoup_error *error) {
    bool named[PSOUP__MAX_SOURCES] = {false};
    const float *said[PSOUP__MAX_SOUP] = {NULL}; /* an adapter's weight */
    double sum = 0.0;
    for (size_t k = 0; prompt->inputs && k < prompt->n_inputs; k++) {
        int32_t reward = prompt->inputs[k].reward;
        float weight = prompt->inputs[k].weight;
        if (reward < 0 || (size_t)reward >= psoup__rewards_count(policy) || named[reward])
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "policy '%s': %s[%zu] names reward %d %s", policy->adapter, what, i,
                               reward, reward >= 0 && (size_t)reward < psoup__rewards_count(policy)
                                           ? "twice" : "which its soup does not have");
        if (!(weight >= 0.0f && weight <= FLT_MAX))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "policy '%s': reward input %zu of %s[%zu] has weight %g: expected 0 or more",
                               policy->adapter, k, what, i, (double)weight);
        named[reward] = true;
        size_t adapter = psoup__rewards_adapter(policy, (size_t)reward);
        if (said[adapter] && *said[adapter] != weight)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "policy '%s': %s[%zu] has weights %g and %g for adapter '%s': expected one",
                               policy->adapter, what, i, (double)*said[adapter], (double)weight,
                               policy->soup->adapters[adapter]);
        said[adapter] = &prompt->inputs[k].weight;
        sum += weight;
    }
    if (prompt->inputs && !(sum > 0.0))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "policy '%s': the reward inputs of %s[%zu] have no weight", policy->adapter,
                           what, i);
    return PSOUP_OK;
}

/* ---- mixes ----------------------------------------------------------------------------------------- */

/* Uniform in (0, 1]: its logarithm is finite. */
static double above_zero(psoup__random *random) {
    return 1.0 - (double)psoup__random_uniform(random);
}

/* log of a draw from Gamma(alpha, 1), alpha > 0: Marsaglia & Tsang 2000, "A simple method for generating
 * gamma variables"; below 1 as Gamma(alpha + 1) · U^(1/alpha), its section 6. The logarithm, since U^(1/alpha)
 * itself would soon be 0. */
static double log_gamma_draw(double alpha, psoup__random *random) {
    double boost = 0.0;
    if (alpha < 1.0) {
        boost = log(above_zero(random)) / alpha;
        alpha += 1.0;
    }
    double d = alpha - 1.0 / 3.0, c = 1.0 / sqrt(9.0 * d);
    for (;;) {
        double x = psoup__random_normal(random), root = 1.0 + c * x;
        double v = root * root * root, u = above_zero(random);
        if (root > 0.0 && log(u) < 0.5 * x * x + d - d * v + d * log(v))
            return log(d) + log(v) + boost;
    }
}

void psoup__dirichlet(double *shares, size_t n, psoup__random *random) {
    double most = -INFINITY, sum = 0.0;
    for (size_t k = 0; k < n; k++) {
        shares[k] = shares[k] > 0.0 ? log_gamma_draw(shares[k], random) : -INFINITY;
        most = fmax(most, shares[k]);
    }
    for (size_t k = 0; k < n; k++)
        sum += shares[k] = exp(shares[k] - most);
    for (size_t k = 0; k < n; k++)
        shares[k] /= sum;
}

/* All of it to one, drawn by the shares. */
static void pick_one(double *shares, size_t n, psoup__random *random) {
    double u = psoup__random_uniform(random), sum = 0.0;
    size_t picked = n;
    for (size_t k = 0; k < n; k++)
        if (shares[k] > 0.0 && (picked == n || u >= sum)) {
            picked = k;
            sum += shares[k];
        }
    for (size_t k = 0; k < n; k++)
        shares[k] = k == picked;
}

/* What the prompt's inputs say: each adapter's share, Σ = 1. */
static void shares_of(const psoup__policy *policy, const psoup_ppo_prompt *prompt,
                      double *shares /* [n_parts] */) {
    size_t n = policy->n_parts;
    double sum = 0.0;
    for (size_t k = 0; k < n; k++)
        shares[k] = prompt->inputs ? 0.0 : 1.0 / (double)n;
    for (size_t k = 0; prompt->inputs && k < prompt->n_inputs; k++) {
        size_t adapter = policy->sources[prompt->inputs[k].reward].adapter;
        if (shares[adapter] == 0.0) /* another reward of it says the same */
            sum += shares[adapter] = prompt->inputs[k].weight;
    }
    for (size_t k = 0; prompt->inputs && k < n; k++)
        shares[k] /= sum;
}

static void draw_mix(const psoup__policy *policy, const psoup_ppo_prompt *prompt, psoup__random random,
                     float *weight /* [n_parts] */) {
    double shares[PSOUP__MAX_SOUP], concentration = policy->soup.concentration;
    size_t n = policy->n_parts, mixed = 0;
    shares_of(policy, prompt, shares);
    for (size_t k = 0; k < n; k++)
        mixed += shares[k] > 0.0;
    if (concentration == 0.0) {
        pick_one(shares, n, &random);
    } else if (concentration < INFINITY && mixed > 1) {
        for (size_t k = 0; k < n; k++)
            shares[k] *= concentration * (double)mixed;
        psoup__dirichlet(shares, n, &random);
    }
    for (size_t k = 0; k < n; k++)
        weight[k] = (float)shares[k];
}

void psoup__draw_mixes(const psoup__policy *policy, psoup__rollouts *rollouts, uint64_t seed,
                       uint64_t first, size_t group) {
    size_t n = policy->n_parts;
    for (size_t i = 0; i < rollouts->n; i++) {
        float *weight = rollouts->weight + i * n;
        if (!policy->given.soup)
            *weight = 1.0f;
        else if (i % group)
            memcpy(weight, weight - n, n * sizeof(*weight));
        else
            draw_mix(policy, rollouts->prompt[i],
                     (psoup__random){psoup__seed_for(seed, PSOUP__FOR_MIXES), first + i, 0}, weight);
    }
}
