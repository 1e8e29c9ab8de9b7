/* What stands around the losses (src/base/policy.h), as pure functions on host arrays: inputs f32, sums f64. */
#include <math.h>

#include "ppo/objectives.h"

_Static_assert((int)PSOUP__K1 == (int)PSOUP_KL_K1 && (int)PSOUP__K2 == (int)PSOUP_KL_K2 &&
               (int)PSOUP__K3 == (int)PSOUP_KL_K3, "the estimators have the public numbers");

double psoup__kl_estimate(psoup_kl_estimator estimator, double logprob, double ref) {
    return psoup__kl_of((int32_t)estimator, logprob - ref);
}

/* r_t = −β k(t) + [t last] s, k the estimate of KL: Jang et al. 2023 section 3, after Ziegler et al. 2019
 * (arXiv 1909.08593) equation 2; trl 0.7 ppo_trainer.py, compute_rewards. */
void psoup__kl_rewards(float *reward, const float *logprob, const float *ref, size_t n,
                       psoup_kl_estimator estimator, double beta, double score) {
    for (size_t t = 0; t < n; t++)
        reward[t] = (float)(-beta * psoup__kl_estimate(estimator, logprob[t], ref[t]) +
                            (t + 1 == n ? score : 0.0));
}

/* (x − mean) / sqrt(var + 1e-8) with the unbiased variance: trl core.py, masked_whiten. Of a single
 * token the variance is taken as 0, where trl divides by zero. */
void psoup__whiten(float *x, size_t n) {
    double mean = 0.0, variance = 0.0;
    for (size_t i = 0; i < n; i++)
        mean += x[i];
    mean /= n ? (double)n : 1.0;
    for (size_t i = 0; i < n; i++)
        variance += (x[i] - mean) * (x[i] - mean);
    variance /= n > 1 ? (double)(n - 1) : 1.0;
    double scale = 1.0 / sqrt(variance + 1e-8);
    for (size_t i = 0; i < n; i++)
        x[i] = (float)((x[i] - mean) * scale);
}

/* A_i = R_i − Σ_{j≠i} R_j / (k − 1): Ahmadian et al. 2024 (arXiv 2402.14740) section 3.2, after Kool et al.
 * 2019. */
void psoup__leave_one_out(double *advantage, const double *reward, size_t k) {
    double sum = 0.0;
    for (size_t i = 0; i < k; i++)
        sum += reward[i];
    for (size_t i = 0; i < k; i++)
        advantage[i] = reward[i] - (sum - reward[i]) / (double)(k - 1);
}

static double mean_of(const double *x, size_t n) {
    double mean = 0.0;
    for (size_t i = 0; i < n; i++)
        mean += x[i] / (double)n;
    return mean;
}

/* A_i = R_i − mean: Shao et al. 2024 (arXiv 2402.03300) section 4.1.2, before its division. */
void psoup__group_centre(double *advantage, const double *reward, size_t k) {
    double mean = mean_of(reward, k);
    for (size_t i = 0; i < k; i++)
        advantage[i] = reward[i] - mean;
}

double psoup__reward_deviation(const double *reward, size_t n) {
    double mean = mean_of(reward, n), squares = 0.0;
    for (size_t i = 0; i < n; i++)
        squares += (reward[i] - mean) * (reward[i] - mean);
    return sqrt(squares / (double)(n - 1));
}

/* A_i / (σ + 1e-4): the division of the same section, with trl's guard of groups that agree. */
void psoup__scale_advantages(double *advantage, size_t n, double deviation) {
    for (size_t i = 0; i < n; i++)
        advantage[i] /= deviation + 1e-4;
}

void psoup__loss_terms_add(psoup__loss_terms *terms, const psoup__loss_terms *more) {
    terms->policy_loss += more->policy_loss;
    terms->value_loss += more->value_loss;
    terms->ratio += more->ratio;
    terms->ratio_max = psoup__ratio_max(terms->ratio_max, more->ratio_max);
    terms->kl += more->kl;
    terms->clipped += more->clipped;
    terms->value_clipped += more->value_clipped;
    terms->tokens += more->tokens;
    terms->ratios += more->ratios;
    terms->broken += more->broken;
}

/* β ← β (1 + clip(KL/target − 1, ±0.2) n / horizon): Ziegler et al. 2019 section 2.2. A KL that is no number says
 * nothing. */
double psoup__kl_coefficient(double beta, double kl, double target, double horizon, double n) {
    if (!isfinite(kl))
        return beta;
    double off = fmin(fmax(kl / target - 1.0, -0.2), 0.2);
    return beta * (1.0 + off * n / horizon);
}

/* Mean and variance of all numbers seen, merged batch by batch: Chan et al. 1979; trl utils.py,
 * RunningMoments. */
void psoup__moments_update(psoup__moments *moments, const float *x, size_t n) {
    if (n == 0)
        return;
    double mean = 0.0, squares = 0.0;
    for (size_t i = 0; i < n; i++)
        mean += x[i];
    mean /= (double)n;
    for (size_t i = 0; i < n; i++)
        squares += (x[i] - mean) * (x[i] - mean);
    double delta = mean - moments->mean;
    double count = moments->count + (double)n;
    squares += moments->variance * moments->count +
               delta * delta * moments->count * (double)n / count;
    moments->mean += delta * (double)n / count;
    moments->variance = squares / count;
    moments->count = count;
}

double psoup__moments_deviation(const psoup__moments *moments) {
    if (moments->count < 2.0)
        return 1.0;
    return sqrt(moments->variance * moments->count / (moments->count - 1.0));
}

void psoup__trend_update(psoup__trend *trend, const float *lengths, const float *scores, size_t n) {
    double length = 0.0, score = 0.0;
    for (size_t i = 0; i < n; i++) {
        length += lengths[i] / (double)n;
        score += scores[i] / (double)n;
    }
    for (size_t i = 0; i < n; i++) {
        trend->squares += (lengths[i] - length) * (lengths[i] - length);
        trend->products += (lengths[i] - length) * (scores[i] - score);
    }
    if (n > 0)
        trend->length += (length - trend->length) * (double)n / (trend->count += (double)n);
}

double psoup__trend_at(const psoup__trend *trend, double length) {
    return trend->squares > 0.0 ? trend->products / trend->squares * (length - trend->length) : 0.0;
}
