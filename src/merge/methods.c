/* The table of methods of whole tensors, and those that need to know nothing of a whole tensor. To add one:
 * a function that makes a block (and, where it needs sums over the tensor, one that prepares them), and a
 * row here. */
#include "merge/methods.h"

#include <math.h>
#include <string.h>

/* ---- linear: Wortsman et al. 2022, "Model soups" -------------------------------------------------- */

static double weight_sum(const psoup__method_job *job) {
    double sum = 0;
    for (size_t i = 0; i < job->count; i++)
        sum += psoup__method_weight(job, i);
    return sum;
}

static psoup_status linear_prepare(const psoup__method_job *job, void **state, psoup_error *error) {
    *state = NULL;
    double sum = weight_sum(job);
    if (!job->normalize || fabs(sum) >= 1e-8)
        return PSOUP_OK;
    return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                       "%.300s: the weights sum to %g and cannot be normalized", job->name, sum);
}

static void linear_block(const psoup__method_job *job, const void *state, size_t at, size_t n, float *out,
                         float *scratch) {
    const psoup__method_kernels *kernels = psoup__method_kernels_of(job->context);
    double divisor = job->normalize ? weight_sum(job) : 1;
    size_t chunk = psoup__method_chunk(job, n);
    for (size_t done = 0; done < n; done += chunk) {
        size_t m = n - done < chunk ? n - done : chunk;
        bool first = true;
        for (size_t i = 0; i < job->count; i++) {
            double w = psoup__method_weight(job, i) / divisor;
            if (w == 0)
                continue;
            const float *x = psoup__method_view(job, &job->inputs[i], at + done, m, scratch);
            kernels->add(out + done, x, (float)w, m, first);
            first = false;
        }
        if (first)
            memset(out + done, 0, m * sizeof *out);
    }
}

/* ---- passthrough ------------------------------------------------------------------------------------ */

static psoup_status nothing_to_prepare(const psoup__method_job *job, void **state, psoup_error *error) {
    *state = NULL;
    return PSOUP_OK;
}

static void passthrough_block(const psoup__method_job *job, const void *state, size_t at, size_t n,
                              float *out, float *scratch) {
    psoup__merge_read(job->context, &job->inputs[0], at, n, out);
    if (job->scale != NULL && job->scale[0] != 1)
        psoup__method_kernels_of(job->context)->finish(out, NULL, out, (float)job->scale[0], n);
}

/* ---- the table -------------------------------------------------------------------------------------- */

#define SUM_PARAMETERS (PSOUP__USES_WEIGHT | PSOUP__USES_NORMALIZE | PSOUP__USES_LAMBDA)

static const psoup__method methods[] = {
    {.name = "linear", .method = PSOUP_MERGE_LINEAR, .least = 1,
     .parameters = PSOUP__USES_WEIGHT | PSOUP__USES_NORMALIZE,
     .on = {PSOUP__USES_NORMALIZE, PSOUP__USES_NORMALIZE, 0},
     .prepare = linear_prepare, .block = linear_block},
    {.name = "task_arithmetic", .method = PSOUP_MERGE_TASK_ARITHMETIC, .needs_base = true, .least = 1,
     .parameters = SUM_PARAMETERS, .prepare = psoup__delta_prepare, .block = psoup__delta_block},
    {.name = "slerp", .method = PSOUP_MERGE_SLERP, .least = 1, .most = 2, .parameters = PSOUP__USES_T,
     .prepare = psoup__slerp_prepare, .block = psoup__slerp_block},
    {.name = "passthrough", .method = PSOUP_MERGE_PASSTHROUGH, .least = 1, .most = 1,
     .parameters = PSOUP__USES_SCALE, .prepare = nothing_to_prepare, .block = passthrough_block},
};

const psoup__method *psoup__method_of(psoup_merge_method method) {
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++)
        if (methods[i].method == (int32_t)method)
            return &methods[i];
    return NULL;
}

const psoup__method *psoup__method_named(const char *name) {
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++)
        if (strcmp(methods[i].name, name) == 0)
            return &methods[i];
    return NULL;
}

size_t psoup__method_scratch(const psoup__method_job *job) {
    return job->count + 2;
}
