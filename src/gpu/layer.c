/* What stands between the linear layers. */
#include "gpu/internal.h"

static void rmsnorm(psoup__backend *be, float *out, float *rstd, const float *x, const float *weight,
                    float epsilon, int32_t rows, int32_t width) {
    PSOUP__LAUNCH(psoup__gpu_of(be), rmsnorm,
                  ((psoup__grid){(unsigned)rows, 1, 1, PSOUP__NORM_THREADS, 0}),
                  {out, rstd, x, weight, epsilon, width});
}

static void add(psoup__backend *be, float *x, const float *y, size_t n) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    PSOUP__LAUNCH(gpu, add, psoup__gpu_flat(gpu, n, 4), {x, y, n});
}

void psoup__gpu_fill_layer(psoup__ops *ops) {
    ops->rmsnorm = rmsnorm;
    ops->add = add;
}
