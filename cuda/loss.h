/* cuda/loss.h: log-probs of chosen tokens, and their gradient. See kernels.h. */
#ifndef PSOUP__LOSS_H
#define PSOUP__LOSS_H

#include <stdint.h>

/* A block to a row. */
enum { PSOUP__LOSS_THREADS = 512 };

typedef struct psoup__logprob_args {
    float *logprob, *lse;  /* [rows] */
    const float *logits;   /* [rows, vocab] */
    const int32_t *target; /* [rows] */
    int32_t vocab, spare;
} psoup__logprob_args;

typedef struct psoup__logprob_backward_args {
    float *dlogits;        /* [rows, vocab]; may be logits */
    const float *logits;
    const float *lse;      /* [rows] */
    const int32_t *target;
    const float *dlogprob; /* [rows] or NULL */
    int32_t vocab, spare;
} psoup__logprob_backward_args;

#define PSOUP__LOSS_KERNELS(X) \
    X(logprob, logprob) \
    X(logprob_backward, logprob_backward)

#endif
