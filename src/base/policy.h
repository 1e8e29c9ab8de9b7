/* src/base/policy.h: what GAE and the losses of PPO, RLOO and GRPO are, token by token: one text for the CPU and for
 * the GPU. Inputs are f32, everything else f64; each loss is differentiated by hand beside its value. src/ops.h has the
 * ops that sum these up; what stands before them, from rewards to advantages, is src/ppo/objectives.c. */
#ifndef PSOUP__POLICY_H
#define PSOUP__POLICY_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#ifndef PSOUP__EVERYWHERE /* cuda/device.cuh says more */
#define PSOUP__EVERYWHERE static inline
#endif

/* ---- advantages ----------------------------------------------------------------------------------------- */

/* δ_t = r_t + γ V_{t+1} − V_t,  A_t = δ_t + γλ A_{t+1},  return_t = A_t + V_t, and V and A past the end are 0: Schulman
 * et al. 2016 (arXiv 1506.02438) equations 11–16. */
PSOUP__EVERYWHERE double psoup__gae_delta(double reward, double value, double next_value, double gamma) {
    return reward + gamma * next_value - value;
}
PSOUP__EVERYWHERE double psoup__gae_step(double delta, double decay /* γλ */, double next_advantage) {
    return delta + decay * next_advantage;
}

/* ---- losses --------------------------------------------------------------------------------------------- */

/* A loss, and its derivative by the log-prob or the value that it is of. */
typedef struct psoup__slope {
    double loss, slope;
    int32_t flat; /* its clipped branch is the larger one */
    int32_t finite;
} psoup__slope;

/* L = max(−A ρ, −A clip(ρ, 1−ε, 1+ε)), ρ = exp(log π − log π_old): Schulman et al. 2017 (arXiv 1707.06347) equation 7.
 * Where the clipped branch is the larger one, ρ lies outside the range and the gradient is 0; elsewhere
 * ∂L/∂log π = −A ρ. RLOO takes ρ = exp(Σ_t log π(t) − log π_old(t)), the ratio of the whole response: trl 0.23
 * rloo_trainer.py, _compute_loss. */
PSOUP__EVERYWHERE psoup__slope psoup__surrogate(double ratio, double advantage, double clip) {
    const double bounded = fmin(fmax(ratio, 1.0 - clip), 1.0 + clip);
    const double plain = -advantage * ratio, clipped = -advantage * bounded;
    const bool flat = clipped > plain;
    const psoup__slope s = {flat ? clipped : plain, flat ? 0.0 : plain, flat, isfinite(ratio) && isfinite(plain)};
    return s;
}

/* L = ½ max((V − R)², (clip(V, V_old ± ε) − R)²): trl 0.7 ppo_trainer.py, loss, after OpenAI baselines' ppo2. Where the
 * clipped branch is the larger one the gradient is 0; elsewhere ∂L/∂V = V − R. */
PSOUP__EVERYWHERE psoup__slope psoup__clipped_error(double value, double old, double returns, double clip) {
    const double bounded = fmin(fmax(value, old - clip), old + clip);
    const double plain = (value - returns) * (value - returns), clipped = (bounded - returns) * (bounded - returns);
    const bool flat = clipped > plain;
    const psoup__slope s = {0.5 * (flat ? clipped : plain), flat ? 0.0 : value - returns, flat, isfinite(plain)};
    return s;
}

/* With d = log π(t) − log π_ref(t), t drawn from π, the estimates of KL(π ‖ π_ref) are k1 = d, k2 = d² / 2,
 * k3 = e^−d − 1 + d: Schulman 2020, "Approximating KL Divergence"; trl 0.23 ppo_trainer.py, kl_estimator. */
enum { PSOUP__K1 = 1, PSOUP__K2 = 2, PSOUP__K3 = 3 }; /* psoup_kl_estimator */
PSOUP__EVERYWHERE double psoup__kl_of(int32_t estimator, double d) {
    return estimator == PSOUP__K2 ? 0.5 * d * d : estimator == PSOUP__K3 ? expm1(-d) + d : d;
}

/* L = β k3 = β (ρ − log ρ − 1), ρ = π_ref(t)/π(t): Shao et al. 2024 (arXiv 2402.03300) equation 4. ∂L/∂log π =
 * β (1 − ρ), whose mean where π drew t is the gradient of β KL(π_ref ‖ π). L = β k2 = β d² / 2 has ∂L/∂log π = β d,
 * whose mean is that of β KL(π ‖ π_ref). */
PSOUP__EVERYWHERE psoup__slope psoup__kl_term(int32_t estimator, double d, double beta) {
    const double estimate = psoup__kl_of(estimator, d);
    const psoup__slope s = {beta * estimate, beta * (estimator == PSOUP__K2 ? d : -expm1(-d)), 0, isfinite(estimate)};
    return s;
}

/* ---- what a loss comes to ------------------------------------------------------------------------------- */

/* Sums over tokens. Divide policy_loss, ratio and clipped by `ratios`, the rest by `tokens`. All 0 is the sum of none. */
typedef struct psoup__loss_terms {
    double policy_loss, value_loss; /* the latter without its coefficient */
    double ratio, ratio_max, kl;    /* kl: log π_old − log π */
    double clipped, value_clipped;  /* how many */
    int64_t tokens, ratios;         /* as many, but where a response has one ratio */
    int64_t broken;                 /* numbers that were not finite */
} psoup__loss_terms;

PSOUP__EVERYWHERE double psoup__ratio_max(double most, double ratio) {
    return !(ratio <= most) ? ratio : most;
}

/* A ratio's surrogate. */
PSOUP__EVERYWHERE void psoup__count_ratio(psoup__loss_terms *terms, const psoup__slope *s, double ratio,
                                          double difference) {
    terms->policy_loss += s->loss;
    terms->ratio += ratio;
    terms->ratio_max = psoup__ratio_max(terms->ratio_max, ratio);
    terms->kl -= difference;
    terms->clipped += s->flat;
    terms->broken += !s->finite;
    terms->ratios++;
}
PSOUP__EVERYWHERE void psoup__count_value(psoup__loss_terms *terms, const psoup__slope *s) {
    terms->value_loss += s->loss;
    terms->value_clipped += s->flat;
    terms->broken += !s->finite;
}
PSOUP__EVERYWHERE void psoup__count_kl(psoup__loss_terms *terms, const psoup__slope *s) {
    terms->policy_loss += s->loss;
    terms->broken += !s->finite;
}

/* ---- the ops' arguments --------------------------------------------------------------------------------- */

/* A response of a batch. */
typedef struct psoup__response {
    double scale; /* of its loss, in the gradient: its share of a mean */
    double beta;  /* of its KL term */
    int32_t first, tokens; /* its tokens among those whose log-probs and values were just read */
    int64_t old;           /* its first token among those of psoup__old */
} psoup__response;

/* What was known of all tokens before the updates, and of what the loss has a term; else NULL. */
typedef struct psoup__old {
    const float *logprob, *advantage;
    const float *ref;             /* log π_ref: with a KL term */
    const float *value, *returns; /* with a critic */
} psoup__old;

typedef struct psoup__objective {
    double clip, value_clip, value_coefficient;
    int32_t whole;     /* not 0: a response has one ratio, and one advantage, that of its first token */
    int32_t estimator; /* of the KL term */
} psoup__objective;

#endif
