/* Drawing the next token. */
#include "gpu/internal.h"

/* The largest power of two that vocab times is at most 2⁶². */
static float unit_of(int32_t vocab) {
    int bits = 0;
    while ((int64_t)1 << bits < vocab)
        bits++;
    return (float)((int64_t)1 << (62 - bits));
}

static void sample(psoup__backend *be, int32_t *token, float *logprob, const float *logits,
                   const psoup__draw *draw, int32_t rows, int32_t vocab) {
    enum { OTHER_SHARED = 2048 }; /* the kernel's small arrays, and what the driver takes */
    psoup__gpu *gpu = psoup__gpu_of(be);
    const int64_t shared = PSOUP__SAMPLE_SHARED + ((int64_t)vocab + 31) / 32 * 4;
    if (shared + OTHER_SHARED > gpu->shared_memory) {
        if (gpu->failed.status == PSOUP_OK)
            psoup__fail(&gpu->failed, PSOUP_ERROR_UNSUPPORTED,
                        "GPU: a vocabulary of %d; this device samples from at most %d tokens", (int)vocab,
                        (gpu->shared_memory - OTHER_SHARED - PSOUP__SAMPLE_SHARED) / 4 * 32);
        return;
    }
    PSOUP__LAUNCH(gpu, sample,
                  ((psoup__grid){(unsigned)rows, 1, 1, PSOUP__SAMPLE_THREADS, (unsigned)shared}),
                  {token, logprob, logits, (const psoup__device_draw *)draw, unit_of(vocab), vocab});
}

void psoup__gpu_fill_sample(psoup__ops *ops) {
    ops->sample = sample;
}
