/* cuda/layer.h: what stands between the linear layers. See kernels.h. */
#ifndef PSOUP__LAYER_H
#define PSOUP__LAYER_H

#include <stdint.h>

enum { PSOUP__NORM_THREADS = 256, PSOUP__FLAT_THREADS = 256 };

typedef struct psoup__rmsnorm_args {
    float *out, *rstd;
    const float *x, *weight;
    float epsilon;
    int32_t width;
} psoup__rmsnorm_args;

/* x += y, n elements: FLAT_THREADS to a block, as many blocks as fill the device, each walking on. */
typedef struct psoup__add_args {
    float *x;
    const float *y;
    uint64_t n;
} psoup__add_args;

#define PSOUP__LAYER_KERNELS(X) \
    X(rmsnorm, rmsnorm) \
    X(add, add)

#endif
