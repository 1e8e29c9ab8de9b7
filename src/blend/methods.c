/* The table of methods of whole tensors, and those that need to know nothing of a whole tensor. To
 * add one: a function that makes a block (and, where it needs sums over the tensor, one that
 * prepares them), and a row here. */
#include "blend/methods.h"

#include <math.h>
#include <string.h>

/* ---- linear: Wortsman et al. 2022, "Model soups" --------------------------------------------- */

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

static void linear_block(const psoup__method_job *job, const void *state, size_t at, size_t n,
                         float *out, float *scratch) {
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

/* ---- passthrough ----------------------------------------------------------------------------- */

static psoup_status nothing_to_prepare(const psoup__method_job *job, void **state,
                                       psoup_error *error) {
    *state = NULL;
    return PSOUP_OK;
}

static void passthrough_block(const psoup__method_job *job, const void *state, size_t at, size_t n,
                              float *out, float *scratch) {
    psoup__merge_read(job->context, &job->inputs[0], at, n, out);
    if (job->scale != NULL && job->scale[0] != 1)
        psoup__method_kernels_of(job->context)->finish(out, NULL, out, (float)job->scale[0], n);
}

/* ---- the table ------------------------------------------------------------------------------- */

#define ON(paper, mergekit, peft)                                                                  \
    { paper, mergekit, peft }
#define NORMALIZE PSOUP__USES_NORMALIZE
#define RESCALE PSOUP__USES_RESCALE
/* Sums of task vectors: how they are thinned out, what that needs to know, and what is on. */
#define DELTA(id, text, thin, uses, ...)                                                           \
    {                                                                                              \
        .name = text, .method = id, .needs_base = true, .least = 1,                                \
        .parameters = PSOUP__USES_WEIGHT | NORMALIZE | PSOUP__USES_LAMBDA | (uses),                \
        .thinning = thin, .whole_rows = (thin) == PSOUP__THIN_RANKED,                              \
        .prepare = psoup__delta_prepare, .block = psoup__delta_block, __VA_ARGS__                  \
    }
#define DENSITY (PSOUP__USES_DENSITY | RESCALE)
#define RANDOM (DENSITY | PSOUP__USES_SEED)
#define OUTLIERS (DENSITY | PSOUP__USES_GAMMA)
#define RANKED (RANDOM | PSOUP__USES_EPSILON)
#define VOTE PSOUP__USES_VOTE

static const psoup__method methods[] = {
    {.name = "linear",
     .method = PSOUP_MERGE_LINEAR,
     .least = 1,
     .parameters = PSOUP__USES_WEIGHT | NORMALIZE,
     .on = ON(NORMALIZE, NORMALIZE, 0),
     .prepare = linear_prepare,
     .block = linear_block},
    DELTA(PSOUP_MERGE_TASK_ARITHMETIC, "task_arithmetic", PSOUP__THIN_NONE, 0, .elects = false),
    DELTA(PSOUP_MERGE_MAGNITUDE_PRUNE, "magnitude_prune", PSOUP__THIN_MAGNITUDE, DENSITY,
          .elects = false),
    DELTA(PSOUP_MERGE_TIES, "ties", PSOUP__THIN_MAGNITUDE, DENSITY | VOTE, .elects = true,
          .on = ON(NORMALIZE, NORMALIZE, NORMALIZE)),
    DELTA(PSOUP_MERGE_DARE_LINEAR, "dare_linear", PSOUP__THIN_RANDOM, RANDOM, .elects = false,
          .on = ON(RESCALE, RESCALE, 0)),
    DELTA(PSOUP_MERGE_DARE_TIES, "dare_ties", PSOUP__THIN_RANDOM, RANDOM | VOTE, .elects = true,
          .on = ON(NORMALIZE | RESCALE, RESCALE, NORMALIZE)),
    DELTA(PSOUP_MERGE_DELLA, "della", PSOUP__THIN_RANKED, RANKED | VOTE, .elects = true,
          .on = ON(NORMALIZE | RESCALE, NORMALIZE | RESCALE, NORMALIZE | RESCALE)),
    DELTA(PSOUP_MERGE_DELLA_LINEAR, "della_linear", PSOUP__THIN_RANKED, RANKED, .elects = false,
          .on = ON(RESCALE, RESCALE, RESCALE)),
    DELTA(PSOUP_MERGE_BREADCRUMBS, "breadcrumbs", PSOUP__THIN_OUTLIERS, OUTLIERS, .elects = false),
    DELTA(PSOUP_MERGE_BREADCRUMBS_TIES, "breadcrumbs_ties", PSOUP__THIN_OUTLIERS, OUTLIERS | VOTE,
          .elects = true),
    {.name = "slerp",
     .method = PSOUP_MERGE_SLERP,
     .least = 1,
     .most = 2,
     .parameters = PSOUP__USES_T,
     .prepare = psoup__slerp_prepare,
     .block = psoup__slerp_block},
    {.name = "nuslerp",
     .method = PSOUP_MERGE_NUSLERP,
     .least = 2,
     .most = 2,
     .parameters = PSOUP__USES_WEIGHT | PSOUP__USES_FLATTEN | PSOUP__USES_ROW_WISE,
     .on = ON(PSOUP__USES_FLATTEN, PSOUP__USES_FLATTEN, PSOUP__USES_FLATTEN),
     .prepare = psoup__nuslerp_prepare,
     .block = psoup__nuslerp_block},
    {.name = "model_stock",
     .method = PSOUP_MERGE_MODEL_STOCK,
     .needs_base = true,
     .least = 2,
     .parameters = PSOUP__USES_FILTER_WISE,
     .prepare = psoup__stock_prepare,
     .block = psoup__stock_block},
    {.name = "passthrough",
     .method = PSOUP_MERGE_PASSTHROUGH,
     .least = 1,
     .most = 1,
     .parameters = PSOUP__USES_SCALE,
     .prepare = nothing_to_prepare,
     .block = passthrough_block},
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
    const psoup__method *method = job->method;
    return 3 + (method->whole_rows ? PSOUP__THIN_SPACE : 0) + (method->elects ? job->count : 1);
}
