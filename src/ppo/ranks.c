/* PPO by several ranks. Each samples, scores, evaluates and updates on its share of the rows; between these all
 * have all of them, so that what is decided on a batch is decided on the whole of it, by everyone alike. */
#include <math.h>
#include <string.h>

#include "ppo/ppo.h"

/* ---- a step that a rank did not live to see the end of -------------------------------------------------- */

psoup_status psoup__ppo_begin(psoup_ppo *ppo, size_t n, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    bool keeps = ppo->team.comm && ppo->checkpoint.directory;
    for (size_t p = 0; keeps && p < n; p++)
        for (size_t k = 0; k < ppo->active[p]->n_parts; k++) {
            psoup__part *part = &ppo->active[p]->parts[k];
            PSOUP__TRY(psoup__snapshot_take(&part->before, &part->optimizer, error));
        }
fail:
    return status;
}

void psoup__ppo_go_back(psoup_ppo *ppo) {
    for (size_t p = 0; p < ppo->n; p++) {
        psoup__policy *policy = &ppo->policies[p];
        bool begun = !policy->state.failed && policy->state.step < policy->total;
        for (size_t k = 0; begun && k < policy->n_parts; k++)
            if (policy->parts[k].before.data)
                psoup__snapshot_restore(&policy->parts[k].before, &policy->parts[k].optimizer);
    }
}

/* ---- unions: every number is known to one rank, and 0 on the others --------------------------------------- */

psoup_status psoup__ppo_share_evaluation(psoup_ppo *ppo, psoup__experience *x, bool values,
                                         psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const psoup__rollouts *r = &x->rollouts;
    float *const arrays[] = {x->logprob, x->ref_logprob, x->value};
    for (size_t k = 0; ppo->team.comm && k < (values ? 3 : 2); k++) {
        for (size_t i = 0; i < r->n; i++)
            if (!r->mine[i])
                memset(arrays[k] + r->start[i], 0, (size_t)(r->start[i + 1] - r->start[i]) * sizeof(float));
        PSOUP__TRY(psoup__team_sum_floats(&ppo->team, arrays[k], r->tokens, error));
    }
fail:
    return status;
}

psoup_status psoup__ppo_share_ratios(psoup_ppo *ppo, psoup__experience *x, psoup_error *error) {
    float *ratio = x->first_ratio;
    psoup_status status = PSOUP_OK;
    if (!ppo->team.comm)
        return PSOUP_OK;
    for (size_t t = 0; t < x->rollouts.tokens; t++)
        ratio[t] = isnan(ratio[t]) ? 0.0f : ratio[t];
    status = psoup__team_sum_floats(&ppo->team, ratio, x->rollouts.tokens, error);
    for (size_t t = 0; t < x->rollouts.tokens; t++)
        ratio[t] = ratio[t] == 0.0f ? NAN : ratio[t];
    return status;
}

/* ---- sums of a mini-batch ----------------------------------------------------------------------------------- */

psoup_status psoup__ppo_add_terms(psoup_ppo *ppo, psoup__loss_terms *terms, double *last_kl,
                                  int64_t *last_tokens, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    double *const sums[] = {&terms->policy_loss, &terms->value_loss, &terms->ratio, &terms->kl,
                            &terms->clipped, &terms->value_clipped, last_kl};
    int64_t *const counts[] = {&terms->tokens, &terms->ratios, last_tokens, &terms->broken};
    enum { SUMS = sizeof(sums) / sizeof(sums[0]), ALL = SUMS + sizeof(counts) / sizeof(counts[0]) };
    double all[ALL];
    if (!ppo->team.comm)
        return PSOUP_OK;
    for (size_t i = 0; i < ALL; i++)
        all[i] = i < SUMS ? *sums[i] : (double)*counts[i - SUMS];
    PSOUP__TRY(psoup__team_sum(&ppo->team, all, ALL, error));
    PSOUP__TRY(psoup__team_max(&ppo->team, &terms->ratio_max, error));
    for (size_t i = 0; i < ALL; i++)
        if (i < SUMS)
            *sums[i] = all[i];
        else
            *counts[i - SUMS] = (int64_t)all[i];
fail:
    return status;
}
