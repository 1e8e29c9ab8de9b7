/* The objectives, as pure functions on host arrays: inputs f32, sums f64. Each is differentiated by
 * hand beside its value. */
#include <math.h>

#include "ppo/objectives.h"

/* With d = log π(t) − log π_ref(t), t drawn from π: k1 = d, k2 = d² / 2, k3 = e^−d − 1 + d. Schulman 2020,
 * "Approximating KL Divergence"; trl 0.23 ppo_trainer.py, kl_estimator. */
double psoup__kl_estimate(psoup_kl_estimator estimator, double logprob, double ref) {
    double d = logprob - ref;
    switch (estimator) {
    case PSOUP_KL_K2: return 0.5 * d * d;
    case PSOUP_KL_K3: return expm1(-d) + d;
    default: return d;
    }
}

/* r_t = −β k(t) + [t last] s, k the estimate of KL: Jang et al. 2023 section 3, after Ziegler et al. 2019
 * (arXiv 1909.08593) equation 2; trl 0.7 ppo_trainer.py, compute_rewards. */
void psoup__kl_rewards(float *reward, const float *logprob, const float *ref, size_t n,
                       psoup_kl_estimator estimator, double beta, double score) {
    for (size_t t = 0; t < n; t++)
        reward[t] = (float)(-beta * psoup__kl_estimate(estimator, logprob[t], ref[t]) +
                            (t + 1 == n ? score : 0.0));
}

/* δ_t = r_t + γ V_{t+1} − V_t,  A_t = δ_t + γλ A_{t+1},  return_t = A_t + V_t, and V past the end is
 * 0: Schulman et al. 2016 (arXiv 1506.02438) equations 11–16. */
void psoup__gae(float *advantage, float *returns, const float *reward, const float *value, size_t n,
                double gamma, double lambda) {
    double next_value = 0.0, next_advantage = 0.0;
    for (size_t t = n; t-- > 0;) {
        double delta = reward[t] + gamma * next_value - value[t];
        next_advantage = delta + gamma * lambda * next_advantage;
        next_value = value[t];
        advantage[t] = (float)next_advantage;
        returns[t] = (float)(next_advantage + value[t]);
    }
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

void psoup__ppo_terms_add(psoup__ppo_terms *terms, const psoup__ppo_terms *more) {
    terms->policy_loss += more->policy_loss;
    terms->value_loss += more->value_loss;
    terms->ratio += more->ratio;
    if (!(more->ratio_max <= terms->ratio_max))
        terms->ratio_max = more->ratio_max;
    terms->kl += more->kl;
    terms->clipped += more->clipped;
    terms->value_clipped += more->value_clipped;
    terms->tokens += more->tokens;
    terms->ratios += more->ratios;
    terms->finite = terms->finite && more->finite;
}

/* L = max(−A ρ, −A clip(ρ, 1−ε, 1+ε)), ρ = exp(log π − log π_old): Schulman et al. 2017 (arXiv
 * 1707.06347) equation 7. Where the clipped branch is the larger one, ρ lies outside the range and the
 * gradient is 0; elsewhere ∂L/∂log π = −A ρ. */
void psoup__policy_loss(float *dlogprob, const float *logprob, const float *old_logprob,
                        const float *advantage, size_t n, double clip, double scale,
                        psoup__ppo_terms *terms) {
    for (size_t t = 0; t < n; t++) {
        double difference = (double)logprob[t] - old_logprob[t];
        double ratio = exp(difference);
        double bounded = fmin(fmax(ratio, 1.0 - clip), 1.0 + clip);
        double plain = -advantage[t] * ratio;
        double clipped = -advantage[t] * bounded;
        bool flat = clipped > plain;
        dlogprob[t] = flat ? 0.0f : (float)(plain * scale);
        terms->policy_loss += flat ? clipped : plain;
        terms->ratio += ratio;
        if (!(ratio <= terms->ratio_max))
            terms->ratio_max = ratio;
        terms->kl -= difference;
        terms->clipped += flat;
        terms->finite = terms->finite && isfinite(ratio) && isfinite(plain);
    }
    terms->tokens += n;
    terms->ratios += n;
}

/* The same with ρ = exp(Σ_t log π(t) − log π_old(t)), the ratio of the whole response: trl 0.23
 * rloo_trainer.py, _compute_loss. */
void psoup__response_loss(float *dlogprob, const float *logprob, const float *old_logprob,
                          double advantage, size_t n, double clip, double scale,
                          psoup__ppo_terms *terms) {
    double difference = 0.0;
    for (size_t t = 0; t < n; t++)
        difference += (double)logprob[t] - old_logprob[t];
    double ratio = exp(difference);
    double plain = -advantage * ratio;
    double clipped = -advantage * fmin(fmax(ratio, 1.0 - clip), 1.0 + clip);
    bool flat = clipped > plain;
    for (size_t t = 0; t < n; t++)
        dlogprob[t] = flat ? 0.0f : (float)(plain * scale);
    terms->policy_loss += flat ? clipped : plain;
    terms->ratio += ratio;
    if (!(ratio <= terms->ratio_max))
        terms->ratio_max = ratio;
    terms->kl -= difference;
    terms->clipped += flat;
    terms->finite = terms->finite && isfinite(ratio) && isfinite(plain);
    terms->tokens += n;
    terms->ratios++;
}

/* L = β k3 = β (ρ − log ρ − 1), ρ = π_ref(t)/π(t): Shao et al. 2024 equation 4. ∂L/∂log π = β (1 − ρ), whose mean
 * where π drew t is the gradient of β KL(π_ref ‖ π). L = β k2 = β d² / 2 has ∂L/∂log π = β d, whose mean is that of
 * β KL(π ‖ π_ref). */
void psoup__kl_loss(float *dlogprob, const float *logprob, const float *ref, size_t n,
                    psoup_kl_estimator estimator, double beta, double scale, psoup__ppo_terms *terms) {
    psoup_kl_estimator k = estimator == PSOUP_KL_DEFAULT ? PSOUP_KL_K3 : estimator;
    for (size_t t = 0; t < n; t++) {
        double d = (double)logprob[t] - ref[t];
        double estimate = psoup__kl_estimate(k, logprob[t], ref[t]);
        dlogprob[t] += (float)(beta * (k == PSOUP_KL_K2 ? d : -expm1(-d)) * scale);
        terms->policy_loss += beta * estimate;
        terms->finite = terms->finite && isfinite(estimate);
    }
}

/* L = ½ max((V − R)², (clip(V, V_old ± ε) − R)²): trl ppo_trainer.py, loss, after OpenAI baselines'
 * ppo2. Where the clipped branch is the larger one the gradient is 0; elsewhere ∂L/∂V = V − R. */
void psoup__value_loss(float *dvalue, const float *value, const float *old_value,
                       const float *returns, size_t n, double clip, double scale,
                       psoup__ppo_terms *terms) {
    for (size_t t = 0; t < n; t++) {
        double v = value[t], r = returns[t], old = old_value[t];
        double bounded = fmin(fmax(v, old - clip), old + clip);
        double plain = (v - r) * (v - r);
        double clipped = (bounded - r) * (bounded - r);
        bool flat = clipped > plain;
        dvalue[t] = flat ? 0.0f : (float)((v - r) * scale);
        terms->value_loss += 0.5 * (flat ? clipped : plain);
        terms->value_clipped += flat;
        terms->finite = terms->finite && isfinite(plain);
    }
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
