/* Methods that add a sum of task vectors to the base: Ilharco et al. 2023, "Editing models with task
 * arithmetic". */
#include "merge/methods.h"

#include <math.h>
#include <string.h>

psoup_status psoup__delta_prepare(const psoup__method_job *job, void **state, psoup_error *error) {
    *state = NULL;
    return PSOUP_OK;
}

/* λ, over the sum of the weights where that is asked for and is not 0. */
static double sum_factor(const psoup__method_job *job) {
    double sum = 0;
    for (size_t i = 0; i < job->count && job->normalize; i++)
        sum += psoup__method_weight(job, i);
    return fabs(sum) < 1e-8 ? job->lambda : job->lambda / sum;
}

void psoup__delta_block(const psoup__method_job *job, const void *state, size_t at, size_t n, float *out,
                        float *scratch) {
    const psoup__method_kernels *kernels = psoup__method_kernels_of(job->context);
    size_t chunk = psoup__method_chunk(job, n);
    float *delta = scratch, *buffer = scratch + chunk, factor = (float)sum_factor(job);
    for (size_t done = 0; done < n; done += chunk) {
        size_t m = n - done < chunk ? n - done : chunk;
        const float *base = NULL;
        bool first = true;
        if (job->base != NULL)
            base = psoup__method_view(job, job->base, at + done, m, buffer);
        for (size_t i = 0; i < job->count; i++) {
            double w = psoup__method_weight(job, i);
            if (w == 0)
                continue;
            psoup__method_delta(job, i, at + done, m, base, delta);
            kernels->add(out + done, delta, (float)w, m, first);
            first = false;
        }
        if (first)
            memset(out + done, 0, m * sizeof *out);
        kernels->finish(out + done, base, out + done, factor, m);
    }
}
