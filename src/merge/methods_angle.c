/* Methods that know angles: slerp. Norms and angles are in f64. */
#include "merge/methods.h"

#include <math.h>
#include <string.h>

/* ---- slerp: Shoemake 1985, "Animating rotation with quaternion curves"; as in mergekit's slerp.py ------- */

typedef struct ends {
    const psoup__merge_input *from, *to;
} ends;

static ends slerp_ends(const psoup__method_job *job) {
    if (job->base != NULL)
        return (ends){job->base, &job->inputs[0]};
    return (ends){&job->inputs[0], &job->inputs[job->count > 1 ? 1 : 0]};
}

enum { FROM_FROM, TO_TO, FROM_TO, PAIR_SUMS };

static void pair_sums(const psoup__method_job *job, void *arg, size_t at, size_t n, int worker,
                      float *scratch, double *partial) {
    const psoup__method_kernels *kernels = psoup__method_kernels_of(job->context);
    const ends e = slerp_ends(job);
    const float *x = psoup__method_view(job, e.from, at, n, scratch);
    const float *y = psoup__method_view(job, e.to, at, n, scratch + n);
    partial[FROM_FROM] = kernels->dot(x, x, n);
    partial[TO_TO] = kernels->dot(y, y, n);
    partial[FROM_TO] = kernels->dot(x, y, n);
}

typedef struct pair {
    double from, to; /* what the ends are multiplied by */
} pair;

/* Straight where the two are nearly parallel or opposed (|cos| > 0.9995). A vector of zeros counts as at a
 * right angle to any other. Both are mergekit's choices. */
static pair slerp_weights(double t, const double sums[PAIR_SUMS]) {
    double from = sqrt(sums[FROM_FROM]), to = sqrt(sums[TO_TO]), dot = sums[FROM_TO];
    dot = from > 1e-8 ? dot / from : dot;
    dot = to > 1e-8 ? dot / to : dot;
    if (fabs(dot) > 0.9995)
        return (pair){1 - t, t};
    double theta = acos(dot);
    return (pair){sin(theta - theta * t) / sin(theta), sin(theta * t) / sin(theta)};
}

psoup_status psoup__slerp_prepare(const psoup__method_job *job, void **state, psoup_error *error) {
    double sums[PAIR_SUMS];
    *state = NULL;
    if (job->count + (job->base != NULL) != 2)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%.300s: slerp of %zu inputs %s a base; expected two, the base counted",
                           job->name, job->count, job->base != NULL ? "and" : "without");
    psoup_status status = psoup__method_walk(job, 2, pair_sums, NULL, PAIR_SUMS, sums, error);
    if (status != PSOUP_OK)
        return status;
    for (int i = 0; i < PAIR_SUMS; i++)
        if (!isfinite(sums[i]))
            return psoup__method_not_finite(job, job->count - 1, error);
    pair *p = psoup__alloc(job->context, 1, sizeof *p, error);
    if (p == NULL)
        return PSOUP_ERROR_MEMORY;
    *p = slerp_weights(job->t, sums);
    *state = p;
    return PSOUP_OK;
}

void psoup__slerp_block(const psoup__method_job *job, const void *state, size_t at, size_t n, float *out,
                        float *scratch) {
    const psoup__method_kernels *kernels = psoup__method_kernels_of(job->context);
    const pair *p = state;
    const ends e = slerp_ends(job);
    size_t chunk = psoup__method_chunk(job, n);
    for (size_t done = 0; done < n; done += chunk) {
        size_t m = n - done < chunk ? n - done : chunk;
        const float *x = psoup__method_view(job, e.from, at + done, m, scratch);
        const float *y = psoup__method_view(job, e.to, at + done, m, scratch + chunk);
        kernels->mix(out + done, x, y, (float)p->from, (float)p->to, m);
    }
}
