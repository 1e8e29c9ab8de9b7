/* The optimiser's step, and what it clips by: values, and the norm. */
#include "cpu/variant.h"
#include "cpu/vector.h"

enum { STEP_TILE = 16384 };

typedef struct adamw_job {
    float *p, *m, *v; /* [n] */
    const float *g;   /* [n] */
    size_t n;
    const psoup__adamw_args *args;
} adamw_job;

/* In the order of torch.optim.AdamW (torch/optim/adamw.py, _single_tensor_adamw):
 *   p *= 1 − lr·decay;  m += (1−β₁)(g − m);  v = β₂v + (1−β₂)g²
 *   p −= lr/correction1 · m / (√v/√correction2 + ε)
 */
static void adamw_task(void *arg, size_t task, int worker) {
    const adamw_job *job = arg;
    const psoup__adamw_args *o = job->args;
    const size_t start = task * STEP_TILE, n = least(STEP_TILE, job->n - start);
    float *p = job->p + start, *m = job->m + start, *v = job->v + start;
    const float *g = job->g + start;
    const float keep = (float)(1.0 - (double)o->lr * o->weight_decay);
    const float step = (float)((double)o->lr / o->correction1);
    const float root = (float)__builtin_sqrt((double)o->correction2);
    const float rest1 = (float)(1.0 - (double)o->beta1), rest2 = (float)(1.0 - (double)o->beta2);
    const float beta2 = o->beta2, epsilon = o->epsilon, scale = o->gradient_scale;
    INDEPENDENT
    for (size_t i = 0; i < n; i++) {
        float gradient = g[i] * scale;
        float mean = m[i] + rest1 * (gradient - m[i]);
        float square = v[i] * beta2 + rest2 * gradient * gradient;
        m[i] = mean;
        v[i] = square;
        p[i] = p[i] * keep - step * mean / (__builtin_sqrtf(square) / root + epsilon);
    }
}

static void adamw(psoup__backend *be, float *p, float *m, float *v, const float *g, size_t n,
                  const psoup__adamw_args *args) {
    adamw_job job = {p, m, v, g, n, args};
    psoup__parallel(be->context, tiles(n, STEP_TILE), adamw_task, &job);
}

typedef struct clip_job {
    float *x; /* [n] */
    size_t n;
    float limit;
} clip_job;

static void clip_task(void *arg, size_t task, int worker) {
    const clip_job *job = arg;
    const size_t start = task * STEP_TILE, n = least(STEP_TILE, job->n - start);
    float *x = job->x + start, high = job->limit, low = -high;
    INDEPENDENT
    for (size_t i = 0; i < n; i++) {
        float below = x[i] > high ? high : x[i]; /* NaN compares as false: it stays */
        x[i] = below < low ? low : below;
    }
}

static void clip_values(psoup__backend *be, float *x, size_t n, float limit) {
    clip_job job = {x, n, limit};
    psoup__parallel(be->context, tiles(n, STEP_TILE), clip_task, &job);
}

/* At most PARTS partial sums, whose size depends on n alone. */
enum { PARTS = 256, BLOCK = 1024 };

typedef struct squares_job {
    double part[PARTS];
    const float *x; /* [n] */
    size_t n, tile;
} squares_job;

static void squares_task(void *arg, size_t task, int worker) {
    squares_job *job = arg;
    const size_t start = task * job->tile, end = start + least(job->tile, job->n - start);
    double lane[LANES] = {0};
    for (size_t i = start; i < end; i += BLOCK) {
        const size_t n = least(BLOCK, end - i), whole = n - n % LANES;
        for (size_t j = 0; j < whole; j += LANES)
            for (size_t l = 0; l < LANES; l++)
                lane[l] += (double)job->x[i + j + l] * job->x[i + j + l];
        for (size_t j = whole; j < n; j++)
            lane[0] += (double)job->x[i + j] * job->x[i + j];
    }
    double sum = 0;
    for (size_t l = 0; l < LANES; l++)
        sum += lane[l];
    job->part[task] = sum;
}

static psoup_status sum_squares(psoup__backend *be, double *out, const float *x, size_t n,
                                psoup_error *error) {
    squares_job job = {.x = x, .n = n, .tile = tiles(tiles(n, PARTS), BLOCK) * BLOCK};
    const size_t parts = n ? tiles(n, job.tile) : 0;
    psoup__parallel(be->context, parts, squares_task, &job);
    double sum = 0;
    for (size_t i = 0; i < parts; i++)
        sum += job.part[i];
    *out = sum;
    return PSOUP_OK;
}

void PSOUP__NAME(psoup__cpu_fill_adamw)(psoup__ops *ops) {
    ops->adamw = adamw;
    ops->clip_values = clip_values;
    ops->sum_squares = sum_squares;
}
