/* Advantages, and the losses of policies. */
#include "gpu/internal.h"

static psoup__grid a_response(int32_t n) {
    return (psoup__grid){(unsigned)n, 1, 1, PSOUP__POLICY_THREADS, 0};
}

static void gae(psoup__backend *be, float *advantage, float *returns, const float *reward, const float *value,
                const int32_t *first, int32_t n, double gamma, double lambda) {
    PSOUP__LAUNCH(psoup__gpu_of(be), gae, a_response(n),
                  {advantage, returns, reward, value, first, gamma, gamma * lambda});
}

static void policy_loss(psoup__backend *be, float *dlogprob, float *dvalue, psoup__loss_terms *terms,
                        const float *logprob, const float *value, const psoup__old *old,
                        const psoup__response *response, int32_t n, const psoup__objective *objective) {
    PSOUP__LAUNCH(psoup__gpu_of(be), policy_loss, a_response(n),
                  {dlogprob, dvalue, terms, logprob, value, response, *old, *objective});
}

void psoup__gpu_fill_policy(psoup__ops *ops) {
    ops->gae = gae;
    ops->policy_loss = policy_loss;
}
