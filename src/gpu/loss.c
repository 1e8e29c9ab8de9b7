/* Log-probs of chosen tokens. */
#include "gpu/internal.h"

static psoup__grid a_row(int32_t rows) {
    return (psoup__grid){(unsigned)rows, 1, 1, PSOUP__LOSS_THREADS, 0};
}

static void logprob(psoup__backend *be, float *out, float *lse, const float *logits, const int32_t *target,
                    int32_t rows, int32_t vocab) {
    PSOUP__LAUNCH(psoup__gpu_of(be), logprob, a_row(rows), {out, lse, logits, target, vocab, 0});
}

static void logprob_backward(psoup__backend *be, float *dlogits, const float *logits, const float *lse,
                             const int32_t *target, const float *dlogprob, int32_t rows, int32_t vocab) {
    PSOUP__LAUNCH(psoup__gpu_of(be), logprob_backward, a_row(rows),
                  {dlogits, logits, lse, target, dlogprob, vocab, 0});
}

void psoup__gpu_fill_loss(psoup__ops *ops) {
    ops->logprob = logprob;
    ops->logprob_backward = logprob_backward;
}
