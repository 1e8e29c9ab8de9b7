/* Advantages, and the losses of policies: a response's tokens one after another, its sums in their order. */
#include "cpu/variant.h"

typedef struct gae_job {
    float *advantage, *returns;
    const float *reward, *value;
    const int32_t *first; /* [n + 1] */
    double gamma, lambda;
} gae_job;

static void gae_task(void *arg, size_t i, int worker) {
    const gae_job *job = arg;
    const double gamma = job->gamma, decay = gamma * job->lambda;
    double next_value = 0, next_advantage = 0;
    for (int32_t t = job->first[i + 1]; t-- > job->first[i];) {
        const double delta = psoup__gae_delta(job->reward[t], job->value[t], next_value, gamma);
        next_advantage = psoup__gae_step(delta, decay, next_advantage);
        next_value = job->value[t];
        job->advantage[t] = (float)next_advantage;
        job->returns[t] = (float)(next_advantage + next_value);
    }
}

static void gae(psoup__backend *be, float *advantage, float *returns, const float *reward, const float *value,
                const int32_t *first, int32_t n, double gamma, double lambda) {
    gae_job job = {advantage, returns, reward, value, first, gamma, lambda};
    psoup__parallel(be->context, (size_t)n, gae_task, &job);
}

typedef struct loss_job {
    float *dlogprob, *dvalue;
    psoup__loss_terms *terms; /* [n] */
    const float *logprob, *value;
    const psoup__old *old;
    const psoup__response *response; /* [n] */
    const psoup__objective *objective;
} loss_job;

/* The clipped surrogate of every token. */
static void lose_tokens(const loss_job *job, const psoup__response *r, psoup__loss_terms *terms) {
    const float *logprob = job->logprob + r->first, *old = job->old->logprob + r->old;
    const float *advantage = job->old->advantage + r->old;
    float *dlogprob = job->dlogprob + r->first;
    for (int32_t t = 0; t < r->tokens; t++) {
        const double difference = (double)logprob[t] - old[t], ratio = exp(difference);
        const psoup__slope s = psoup__surrogate(ratio, advantage[t], job->objective->clip);
        dlogprob[t] = (float)(s.slope * r->scale);
        psoup__count_ratio(terms, &s, ratio, difference);
    }
}

/* That of the response as a whole. */
static void lose_response(const loss_job *job, const psoup__response *r, psoup__loss_terms *terms) {
    const float *logprob = job->logprob + r->first, *old = job->old->logprob + r->old;
    double difference = 0;
    for (int32_t t = 0; t < r->tokens; t++)
        difference += (double)logprob[t] - old[t];
    const double ratio = exp(difference);
    const psoup__slope s = psoup__surrogate(ratio, job->old->advantage[r->old], job->objective->clip);
    for (int32_t t = 0; t < r->tokens; t++)
        job->dlogprob[r->first + t] = (float)(s.slope * r->scale);
    psoup__count_ratio(terms, &s, ratio, difference);
}

static void lose_kl(const loss_job *job, const psoup__response *r, psoup__loss_terms *terms) {
    const float *logprob = job->logprob + r->first, *ref = job->old->ref + r->old;
    for (int32_t t = 0; t < r->tokens; t++) {
        const psoup__slope s = psoup__kl_term(job->objective->estimator, (double)logprob[t] - ref[t], r->beta);
        job->dlogprob[r->first + t] += (float)(s.slope * r->scale);
        psoup__count_kl(terms, &s);
    }
}

static void lose_values(const loss_job *job, const psoup__response *r, psoup__loss_terms *terms) {
    const float *value = job->value + r->first, *old = job->old->value + r->old, *returns = job->old->returns + r->old;
    const double scale = job->objective->value_coefficient * r->scale;
    for (int32_t t = 0; t < r->tokens; t++) {
        const psoup__slope s = psoup__clipped_error(value[t], old[t], returns[t], job->objective->value_clip);
        job->dvalue[r->first + t] = (float)(s.slope * scale);
        psoup__count_value(terms, &s);
    }
}

static void loss_task(void *arg, size_t i, int worker) {
    const loss_job *job = arg;
    const psoup__response *r = &job->response[i];
    psoup__loss_terms terms = {.tokens = r->tokens};
    (job->objective->whole ? lose_response : lose_tokens)(job, r, &terms);
    if (job->old->ref)
        lose_kl(job, r, &terms);
    if (job->old->value)
        lose_values(job, r, &terms);
    job->terms[i] = terms;
}

static void policy_loss(psoup__backend *be, float *dlogprob, float *dvalue, psoup__loss_terms *terms,
                        const float *logprob, const float *value, const psoup__old *old,
                        const psoup__response *response, int32_t n, const psoup__objective *objective) {
    loss_job job = {dlogprob, dvalue, terms, logprob, value, old, response, objective};
    psoup__parallel(be->context, (size_t)n, loss_task, &job);
}

void PSOUP__NAME(psoup__cpu_fill_policy)(psoup__ops *ops) {
    ops->gae = gae;
    ops->policy_loss = policy_loss;
}
