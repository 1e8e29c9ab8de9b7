/* cuda/policy.h: advantages, and the losses of policies. See kernels.h. */
#ifndef PSOUP__POLICY_KERNELS_H
#define PSOUP__POLICY_KERNELS_H

#include <stdint.h>

#include "../src/base/policy.h"

/* A block of one warp to a response. */
enum { PSOUP__POLICY_THREADS = 32 };

typedef struct psoup__gae_args {
    float *advantage, *returns;
    const float *reward, *value;
    const int32_t *first; /* [n + 1] */
    double gamma, decay;  /* decay = γλ */
} psoup__gae_args;

typedef struct psoup__policy_loss_args {
    float *dlogprob, *dvalue;
    psoup__loss_terms *terms; /* [n] */
    const float *logprob, *value;
    const psoup__response *response; /* [n] */
    psoup__old old;
    psoup__objective objective;
} psoup__policy_loss_args;

#define PSOUP__POLICY_KERNELS(X) \
    X(gae, gae) \
    X(policy_loss, policy_loss)

#endif
