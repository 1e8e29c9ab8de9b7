/* cuda/sample.h: drawing tokens. See kernels.h. */
#ifndef PSOUP__SAMPLE_H
#define PSOUP__SAMPLE_H

#include "advance.h"

/* A block to a row. Its dynamic shared memory: two histograms, then a bit for each token, set where banned. */
enum { PSOUP__SAMPLE_THREADS = 512, PSOUP__SAMPLE_BINS = 2048,
       PSOUP__SAMPLE_SHARED = 2 * 2 * PSOUP__SAMPLE_BINS * 4 };

typedef struct psoup__sample_args {
    int32_t *token;                 /* [rows] */
    float *logprob;                 /* [rows] */
    const float *logits;            /* [rows, vocab] */
    const psoup__device_draw *draw; /* [rows] */
    float unit;                     /* the likeliest token's mass: a power of two; vocab times it is at most 2⁶² */
    int32_t vocab;
} psoup__sample_args;

#define PSOUP__SAMPLE_KERNELS(X) X(sample, sample)

#endif
