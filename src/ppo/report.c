/* What PPO tells of its responses and of the time that a step took. */
#include <math.h>

#include "ppo/ppo.h"

/* The repeats among the 4-grams of all responses, as a share: seq-rep-4 of Welleck et al. 2019 (arXiv 1908.04319),
 * of each response by itself. And how many responses have nothing before their end token. */
static psoup_status measure_texts(psoup_context *context, const psoup__rollouts *r, psoup__ppo_summary *out,
                                  psoup_error *error) {
    size_t most = 0, size = 1, grams = 0, repeated = 0, empty = 0;
    for (size_t i = 0; i < r->n; i++) {
        size_t n = (size_t)(r->start[i + 1] - r->start[i]);
        most = n > most ? n : most;
    }
    while (size <= 2 * most)
        size *= 2;
    int32_t *table = psoup__alloc_unset(context, size, sizeof(*table), error);
    if (!table)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < r->n; i++) {
        size_t n = (size_t)(r->start[i + 1] - r->start[i]);
        grams += n > 3 ? n - 3 : 0;
        repeated += psoup__repeated_grams(r->response + r->start[i], n, table, size);
        empty += n == (r->finish[i] == PSOUP_FINISH_STOP);
    }
    psoup__free(context, table);
    out->repetition = grams ? (double)repeated / (double)grams : 0.0;
    out->empty = (double)empty / (double)r->n;
    return PSOUP_OK;
}

psoup_status psoup__ppo_report(const psoup_ppo *ppo, const psoup__policy *policy, const psoup__experience *x,
                               psoup__metrics *metrics, psoup__ppo_summary *out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const psoup__rollouts *r = &x->rollouts;
    double score = 0.0, squares = 0.0, sum = 0.0, ended = 0.0, n = (double)r->n;
    for (size_t t = 0; t < r->tokens; t++)
        sum += psoup__kl_estimate(ppo->options.kl_estimator, x->logprob[t], x->ref_logprob[t]);
    for (size_t i = 0; i < r->n; i++) {
        score += r->score[i];
        ended += r->finish[i] == PSOUP_FINISH_STOP;
    }
    *out = (psoup__ppo_summary){.reward = score / n, .kl = sum / n};
    for (size_t i = 0; i < r->n; i++)
        squares += (r->score[i] - out->reward) * (r->score[i] - out->reward);
    out->deviation = r->n > 1 ? sqrt(squares / (n - 1.0)) : 0.0;
    PSOUP__TRY(measure_texts(ppo->model->context, r, out, error));
    psoup__metric(metrics, "reward", out->reward);
    psoup__metric(metrics, "reward_deviation", out->deviation);
    psoup__metric(metrics, "kl", out->kl);
    psoup__metric(metrics, "kl_token", sum / (double)r->tokens);
    psoup__metric(metrics, "tokens", (double)r->tokens);
    psoup__metric(metrics, "length", (double)r->tokens / n);
    psoup__metric(metrics, "ended", ended / n);
    psoup__metric(metrics, "repetition", out->repetition);
    psoup__metric(metrics, "empty", out->empty);
    psoup__report_rewards(&ppo->options, policy, r, metrics);
fail:
    return status;
}

/* Tokens are those of all policies, since they share the time. */
void psoup__ppo_report_times(psoup_ppo *ppo, size_t n) {
    static const char *const names[PSOUP__PHASES] = {"rollout_seconds", "score_seconds",
                                                     "evaluate_seconds", "update_seconds"};
    size_t tokens = 0;
    for (size_t p = 0; p < n; p++)
        tokens += ppo->active[p]->experience.rollouts.tokens;
    for (size_t p = 0; p < n; p++) {
        psoup__metrics *metrics = &ppo->active[p]->metrics;
        psoup__metric_speed(metrics, ppo->began[0], tokens);
        for (int k = 0; k < PSOUP__PHASES; k++)
            psoup__metric_time(metrics, names[k], ppo->began[k + 1] - ppo->began[k]);
    }
}
