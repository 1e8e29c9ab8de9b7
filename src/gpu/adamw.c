/* The optimiser's step, and what it clips by: values, and the norm. */
#include <math.h>

#include "gpu/internal.h"

static void adamw(psoup__backend *be, float *p, float *m, float *v, const float *g, size_t n,
                  const psoup__adamw_args *o) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    PSOUP__LAUNCH(gpu, adamw_step, psoup__gpu_flat(gpu, n, 4),
                  {.p = p,
                   .m = m,
                   .v = v,
                   .g = g,
                   .n = n,
                   .keep = (float)(1.0 - (double)o->lr * o->weight_decay),
                   .step = (float)((double)o->lr / o->correction1),
                   .root = (float)sqrt((double)o->correction2),
                   .rest1 = (float)(1.0 - (double)o->beta1),
                   .beta2 = o->beta2,
                   .rest2 = (float)(1.0 - (double)o->beta2),
                   .epsilon = o->epsilon,
                   .scale = o->gradient_scale});
}

static void clip_values(psoup__backend *be, float *x, size_t n, float limit) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    PSOUP__LAUNCH(gpu, clip_values, psoup__gpu_flat(gpu, n, 4), {.x = x, .n = n, .limit = limit});
}

/* A part for each block that has elements, at most SQUARES_PARTS: the host adds them up. */
static psoup_status sum_squares(psoup__backend *be, double *out, const float *x, size_t n,
                                psoup_error *error) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    psoup_status status;
    double part[PSOUP__SQUARES_PARTS], sum = 0;
    const size_t first = (n + 4 * PSOUP__ADAMW_THREADS - 1) / (4 * PSOUP__ADAMW_THREADS);
    const size_t parts = first < PSOUP__SQUARES_PARTS ? first : PSOUP__SQUARES_PARTS;
    PSOUP__TRY(psoup__gpu_make_room(gpu, sizeof part, error));
    PSOUP__LAUNCH(gpu, sum_squares, ((psoup__grid){(unsigned)parts, 1, 1, PSOUP__ADAMW_THREADS, 0}),
                  {(double *)(uintptr_t)gpu->room, x, n});
    PSOUP__TRY(gpu->ops.read(be, part, (void *)(uintptr_t)gpu->room, parts * sizeof *part, error));
    for (size_t i = 0; i < parts; i++)
        sum += part[i];
    *out = sum;
fail:
    return status;
}

void psoup__gpu_fill_adamw(psoup__ops *ops) {
    ops->adamw = adamw;
    ops->clip_values = clip_values;
    ops->sum_squares = sum_squares;
}
