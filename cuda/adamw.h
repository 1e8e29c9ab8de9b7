/* cuda/adamw.h: the optimiser. See kernels.h. */
#ifndef PSOUP__ADAMW_H
#define PSOUP__ADAMW_H

#include <stdint.h>

enum { PSOUP__ADAMW_THREADS = 256, PSOUP__SQUARES_PARTS = 1024 };

/* p = p · keep − step · m / (√v / root + epsilon): see psoup__adamw_args. */
typedef struct psoup__adamw_step_args {
    float *p, *m, *v; /* [n] */
    const float *g;
    uint64_t n;
    float keep, step, root, rest1, beta2, rest2, epsilon, scale;
} psoup__adamw_step_args;

/* x = min(max(x, −limit), limit); NaN stays. */
typedef struct psoup__clip_values_args {
    float *x; /* [n] */
    uint64_t n;
    float limit;
    uint32_t spare;
} psoup__clip_values_args;

/* part[i]: the squares of block i's elements. The parts are as many on any device. */
typedef struct psoup__sum_squares_args {
    double *part; /* [SQUARES_PARTS] */
    const float *x;
    uint64_t n;
} psoup__sum_squares_args;

#define PSOUP__ADAMW_KERNELS(X) \
    X(adamw_step, adamw_step) \
    X(clip_values, clip_values) \
    X(sum_squares, sum_squares)

#endif
