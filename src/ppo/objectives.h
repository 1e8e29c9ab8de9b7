/* src/ppo/objectives.h: what PPO, RLOO and GRPO compute before and after their losses, as pure functions on host
 * arrays: rewards, advantages but GAE, the coefficient of KL. GAE and the losses are ops: base/policy.h. */
#ifndef PSOUP__OBJECTIVES_H
#define PSOUP__OBJECTIVES_H

#include "psoup/ppo.h"
#include "train/train.h"

/* The estimate of KL(π ‖ π_ref) by one token; the default is k1. */
double psoup__kl_estimate(psoup_kl_estimator estimator, double logprob, double ref);
/* reward[t] = −beta · that estimate of token t, plus score on the last token. */
void psoup__kl_rewards(float *reward, const float *logprob, const float *ref, size_t n,
                       psoup_kl_estimator estimator, double beta, double score);
/* x ← (x − mean) / sqrt(variance + 1e-8), variance unbiased. */
void psoup__whiten(float *x, size_t n);

/* Advantages of k responses to one prompt, by their rewards: over the mean of the others, or over the mean;
 * psoup__scale_advantages divides them by what psoup__reward_deviation says of a group or a batch. */
void psoup__leave_one_out(double *advantage, const double *reward, size_t k);
void psoup__group_centre(double *advantage, const double *reward, size_t k);
double psoup__reward_deviation(const double *reward, size_t n); /* unbiased */
void psoup__scale_advantages(double *advantage, size_t n, double deviation);

void psoup__loss_terms_add(psoup__loss_terms *terms, const psoup__loss_terms *more);

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
