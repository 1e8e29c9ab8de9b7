/* src/ppo/objectives.h: what PPO, RLOO and GRPO compute, as pure functions on host arrays. */
#ifndef PSOUP__OBJECTIVES_H
#define PSOUP__OBJECTIVES_H

#include "psoup/ppo.h"
#include "train/train.h"

/* The estimate of KL(π ‖ π_ref) by one token; the default is k1. */
double psoup__kl_estimate(psoup_kl_estimator estimator, double logprob, double ref);
/* reward[t] = −beta · that estimate of token t, plus score on the last token. */
void psoup__kl_rewards(float *reward, const float *logprob, const float *ref, size_t n,
                       psoup_kl_estimator estimator, double beta, double score);
/* Generalised advantages and returns of one response; the value after its end is 0. */
void psoup__gae(float *advantage, float *returns, const float *reward, const float *value, size_t n,
                double gamma, double lambda);
/* x ← (x − mean) / sqrt(variance + 1e-8), variance unbiased. */
void psoup__whiten(float *x, size_t n);

/* Advantages of k responses to one prompt, by their rewards: over the mean of the others, or over the mean;
 * psoup__scale_advantages divides them by what psoup__reward_deviation says of a group or a batch. */
void psoup__leave_one_out(double *advantage, const double *reward, size_t k);
void psoup__group_centre(double *advantage, const double *reward, size_t k);
double psoup__reward_deviation(const double *reward, size_t n); /* unbiased */
void psoup__scale_advantages(double *advantage, size_t n, double deviation);

/* Sums over a mini-batch. Divide policy_loss, ratio and clipped by `ratios`, the rest by `tokens`. */
typedef struct psoup__ppo_terms {
    double policy_loss, value_loss; /* the latter without its coefficient */
    double ratio, ratio_max, kl;    /* kl: log π_old − log π */
    double clipped, value_clipped;
    size_t tokens, ratios; /* as many, but where a response has one ratio */
    bool finite; /* start it as true */
} psoup__ppo_terms;
void psoup__ppo_terms_add(psoup__ppo_terms *terms, const psoup__ppo_terms *more);
/* dlogprob[t] = scale · ∂/∂logprob of the clipped surrogate; adds to terms, which counts the tokens. */
void psoup__policy_loss(float *dlogprob, const float *logprob, const float *old_logprob,
                        const float *advantage, size_t n, double clip, double scale,
                        psoup__ppo_terms *terms);
/* The same of a whole response, which has one ratio and one advantage. */
void psoup__response_loss(float *dlogprob, const float *logprob, const float *old_logprob,
                          double advantage, size_t n, double clip, double scale,
                          psoup__ppo_terms *terms);
/* Adds to dlogprob scale · ∂/∂logprob of beta · the estimate, k2 or by default k3, and the loss to terms. */
void psoup__kl_loss(float *dlogprob, const float *logprob, const float *ref, size_t n,
                    psoup_kl_estimator estimator, double beta, double scale, psoup__ppo_terms *terms);
/* dvalue[t] = scale · ∂/∂value of the clipped squared error; adds to terms. */
void psoup__value_loss(float *dvalue, const float *value, const float *old_value,
                       const float *returns, size_t n, double clip, double scale,
                       psoup__ppo_terms *terms);

double psoup__kl_coefficient(double beta, double kl, double target, double horizon, double n);

typedef struct psoup__moments { /* of a stream of numbers, batch by batch */
    double mean, variance, count;
} psoup__moments;
void psoup__moments_update(psoup__moments *moments, const float *x, size_t n);
double psoup__moments_deviation(const psoup__moments *moments); /* unbiased; 1 before two numbers */

/* The line that scores follow with length, by least squares over all steps, each about its own means: a policy that
 * becomes better and longer is not taken for a reward that pays for length. */
typedef struct psoup__trend {
    double squares, products; /* Σ (length − its step's mean)², and times (score − its step's mean) */
    double length, count;     /* the mean length of all responses; how many they are */
} psoup__trend;
/* lengths [n], scores [n]: those of a step. */
void psoup__trend_update(psoup__trend *trend, const float *lengths, const float *scores, size_t n);
/* By how much more a response of this length scores than one of the mean length. */
double psoup__trend_at(const psoup__trend *trend, double length);

#endif
