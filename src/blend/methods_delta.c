/* Methods that add a sum of task vectors to the base: Ilharco et al. 2023, "Editing models with
 * task arithmetic". Each is thinned out first, and signs may be elected: Yadav et al. 2023,
 * "TIES-Merging".
 *
 * An election, where mergekit, PEFT and the paper differ:
 *            votes                   a tie          what agrees is divided by
 *   paper    the vectors             nothing stays  the sum of its weights (equal ones: its mean)
 *   mergekit the weighted vectors    counts as +    the sum of its weights
 *   PEFT     the vectors             counts as +    its number */
#include "blend/methods.h"

#include <math.h>
#include <string.h>

psoup_status psoup__delta_prepare(const psoup__method_job *job, void **state, psoup_error *error) {
    psoup__thin *thins = NULL;
    psoup_status status = PSOUP_OK;
    if (job->method->thinning != PSOUP__THIN_NONE)
        status = psoup__thin_prepare(job, &thins, error);
    *state = thins;
    return status;
}

/* λ, over the sum of the weights where that is asked for and is not 0. */
static double sum_factor(const psoup__method_job *job) {
    double sum = 0;
    for (size_t i = 0; i < job->count && job->normalize; i++)
        sum += psoup__method_weight(job, i);
    return fabs(sum) < 1e-8 ? job->lambda : job->lambda / sum;
}

typedef struct delta_chunk {
    const psoup__method_job *job;
    const psoup__method_kernels *kernels;
    const psoup__thin *thins; /* or NULL */
    size_t at, n;
    const float *base;                      /* [n] or NULL */
    float *values, *sign, *divisor, *space; /* [count, n], [n], [n], [6 · n] */
} delta_chunk;

static void thinned(const delta_chunk *c, size_t i, float *out) {
    psoup__method_delta(c->job, i, c->at, c->n, c->base, out);
    if (c->thins != NULL)
        psoup__thin_apply(c->job, &c->thins[i], c->at, c->n, out, c->space);
}

static void weighted_sum(const delta_chunk *c, float *sum) {
    bool first = true;
    for (size_t i = 0; i < c->job->count; i++) {
        double w = psoup__method_weight(c->job, i);
        if (w == 0)
            continue;
        thinned(c, i, c->values);
        c->kernels->add(sum, c->values, (float)w, c->n, first);
        first = false;
    }
    if (first)
        memset(sum, 0, c->n * sizeof *sum);
}

static void elected_sum(const delta_chunk *c, float *sum) {
    const psoup__method_job *job = c->job;
    const bool weighs = job->peer == PSOUP_MERGE_MERGEKIT, counts = job->peer == PSOUP_MERGE_PEFT;
    bool first = true;
    for (size_t i = 0; i < job->count; i++) {
        double w = psoup__method_weight(job, i);
        float *x = c->values + i * c->n;
        if (w == 0)
            continue;
        thinned(c, i, x);
        if (weighs)
            c->kernels->finish(x, NULL, x, (float)w, c->n);
        c->kernels->vote(c->sign, x, c->n, job->vote == PSOUP__VOTE_FREQUENCY, first);
        first = false;
    }
    if (first) {
        memset(sum, 0, c->n * sizeof *sum);
        return;
    }
    c->kernels->elect(c->sign, c->n, job->peer == PSOUP_MERGE_PAPER ? 0 : 1);
    first = true;
    for (size_t i = 0; i < job->count; i++) {
        float w = (float)psoup__method_weight(job, i);
        if (psoup__method_weight(job, i) == 0)
            continue;
        c->kernels->agree(sum, c->divisor, c->sign, c->values + i * c->n, weighs ? 1 : w,
                          counts ? 1 : w, c->n, first);
        first = false;
    }
    c->kernels->settle(sum, job->normalize ? c->divisor : NULL, c->sign, c->n);
}

void psoup__delta_block(const psoup__method_job *job, const void *state, size_t at, size_t n,
                        float *out, float *scratch) {
    const bool elects = job->method->elects;
    const float factor = (float)(elects ? job->lambda : sum_factor(job));
    size_t chunk = psoup__method_chunk(job, n);
    delta_chunk c = {.job = job, .kernels = psoup__method_kernels_of(job->context), .thins = state};
    float *base = scratch;
    c.sign = base + chunk;
    c.divisor = c.sign + chunk;
    c.space = c.divisor + chunk;
    c.values = c.space + (job->method->whole_rows ? PSOUP__THIN_SPACE * chunk : 0);
    for (size_t done = 0; done < n; done += chunk) {
        c.at = at + done;
        c.n = n - done < chunk ? n - done : chunk;
        if (job->base != NULL)
            c.base = psoup__method_view(job, job->base, c.at, c.n, base);
        (elects ? elected_sum : weighted_sum)(&c, out + done);
        c.kernels->finish(out + done, c.base, out + done, factor, c.n);
    }
}
