/* What stays of a task vector: the largest (TIES, Yadav et al. 2023), those between the largest and
 * the smallest (Model Breadcrumbs, Davari and Belilovsky 2023), a random part (DARE, Yu et al.
 * 2023), or a random part in which large elements are likelier (DELLA, Deep et al. 2024). */
#include "blend/methods.h"

#include <math.h>
#include <string.h>

#define DRAWN 1024 /* random numbers at a time */

/* ---- random numbers -------------------------------------------------------------------------- */

/* The Philox sequence of an input of a tensor: FNV-1a, 64 bits, of the name, a zero byte and the
 * input's index in eight bytes, low first. */
static uint64_t sequence_of(const char *name, uint64_t input) {
    uint64_t hash = 0xcbf29ce484222325u;
    const uint64_t prime = 0x100000001b3u;
    for (; *name != '\0'; name++)
        hash = (hash ^ (unsigned char)*name) * prime;
    hash *= prime;
    for (int i = 0; i < 8; i++)
        hash = (hash ^ (input >> 8 * i & 0xff)) * prime;
    return hash;
}

/* ---- by rank --------------------------------------------------------------------------------- */

static uint32_t magnitude(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffff;
}

/* The elements of x in order of |x|, the smallest first, equal ones in their own order; a NaN is
 * larger than any number. Each is |x|'s bits above its index. space [2 · n]; returns the half of it
 * that is sorted. */
static const uint64_t *sort_magnitudes(const float *x, size_t n, uint64_t *space) {
    enum { DIGIT = 11, PASSES = 3, VALUES = 1 << DIGIT };
    uint64_t *from = space, *to = space + n;
    uint32_t starts[PASSES][VALUES];
    memset(starts, 0, sizeof starts);
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = magnitude(x[i]);
        from[i] = (uint64_t)bits << 32 | (uint32_t)i;
        for (int pass = 0; pass < PASSES; pass++)
            starts[pass][bits >> DIGIT * pass & (VALUES - 1)]++;
    }
    for (int pass = 0; pass < PASSES; pass++) {
        uint32_t sum = 0, *start = starts[pass];
        for (int b = 0; b < VALUES; b++) {
            uint32_t count = start[b];
            start[b] = sum;
            sum += count;
        }
        for (size_t i = 0; i < n; i++)
            to[start[from[i] >> (32 + DIGIT * pass) & (VALUES - 1)]++] = from[i];
        uint64_t *swap = from;
        from = to;
        to = swap;
    }
    return from;
}

/* One row: the element of rank r of n (0: the smallest) stays with probability least + spread ·
 * r/(n−1). space [PSOUP__THIN_SPACE · n]: five for what is sorted and drawn, and room to align it.
 */
static void thin_row(const psoup__method_job *job, const psoup__thin *thin, size_t at, size_t n,
                     float *x, float *space) {
    const psoup__method_kernels *kernels = psoup__method_kernels_of(job->context);
    uint64_t *pairs = (uint64_t *)(void *)(space + (uintptr_t)space / sizeof *space % 2);
    uint32_t *drawn = (uint32_t *)(void *)(pairs + 2 * n);
    const uint64_t *order = sort_magnitudes(x, n, pairs);
    kernels->draw(drawn, n, job->seed, thin->sequence, at);
    for (size_t r = 0; r < n; r++) {
        uint32_t e = (uint32_t)order[r];
        double place = n > 1 ? (double)r / (double)(n - 1) : 0.5;
        double chance = thin->least + place * thin->spread;
        float value = thin->each ? (float)((double)x[e] / chance) : thin->scale * x[e];
        uint32_t bits,
            stays = (double)drawn[e] * 0x1p-24 < chance; /* no branch: it would be a coin's */
        memcpy(&bits, &value, sizeof bits);
        bits &= 0 - stays;
        memcpy(&x[e], &bits, sizeof bits);
    }
}

/* ---- thinning -------------------------------------------------------------------------------- */

/* Parts at whose ends the cuts' ties end have the same two limits. */
static void thin_by_magnitude(const psoup__method_kernels *kernels, const psoup__thin *thin,
                              size_t at, size_t n, float *x) {
    const psoup__cut *lower = &thin->cuts[0], *upper = &thin->cuts[1];
    for (size_t e = at, next; e < at + n; e = next) {
        next = at + n;
        if (lower->end > e && lower->end < next)
            next = lower->end;
        if (upper->end > e && upper->end < next)
            next = upper->end;
        kernels->window(x + (e - at), next - e, lower->bits + (e >= lower->end),
                        upper->bits + (e >= upper->end), thin->scale);
    }
}

void psoup__thin_apply(const psoup__method_job *job, const psoup__thin *thin, size_t at, size_t n,
                       float *x, float *space) {
    const psoup__method_kernels *kernels = psoup__method_kernels_of(job->context);
    uint32_t drawn[DRAWN];
    size_t columns = (size_t)job->columns;
    if (thin->none)
        memset(x, 0, n * sizeof *x);
    if (thin->none || thin->all)
        return;
    switch (job->method->thinning) {
    case PSOUP__THIN_NONE:
        break;
    case PSOUP__THIN_MAGNITUDE:
    case PSOUP__THIN_OUTLIERS:
        thin_by_magnitude(kernels, thin, at, n, x);
        break;
    case PSOUP__THIN_RANDOM:
        for (size_t i = 0; i < n; i += DRAWN) {
            size_t m = n - i < DRAWN ? n - i : DRAWN;
            kernels->draw(drawn, m, job->seed, thin->sequence, at + i);
            kernels->keep(x + i, m, drawn, thin->limit, thin->scale);
        }
        break;
    case PSOUP__THIN_RANKED:
        for (size_t i = 0; i < n; i += columns)
            thin_row(job, thin, at + i, columns, x + i, space);
        break;
    }
}

/* ---- what must be known of the whole tensor -------------------------------------------------- */

static double parameter(const double *values, size_t i, double otherwise) {
    return values != NULL ? values[i] : otherwise;
}

static psoup_status check_parameters(const psoup__method_job *job, size_t i, psoup_error *error) {
    double density = psoup__method_density(job, i), gamma = parameter(job->gamma, i, 0.01);
    double epsilon = parameter(job->epsilon, i, 0.15);
    if (!(density >= 0) || isinf(density))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%.300s: input %zu: density %g; expected 0 to 1", job->name, i, density);
    if (job->method->thinning == PSOUP__THIN_OUTLIERS && !(gamma >= 0 && gamma <= 1))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%.300s: input %zu: gamma %g; expected 0 to 1", job->name, i, gamma);
    if (job->method->thinning == PSOUP__THIN_RANKED && density > 0 && density < 1 &&
        !(epsilon >= 0 && density - epsilon > 0 && density + epsilon < 1))
        return psoup__fail(
            error, PSOUP_ERROR_ARGUMENT,
            "%.300s: input %zu: epsilon %g around density %g; expected chances between 0 "
            "and 1",
            job->name, i, epsilon, density);
    return PSOUP_OK;
}

/* How many of n are the fraction f: rounded down, as mergekit and PEFT do. */
static size_t part(double f, size_t n) {
    double k = floor(f * (double)n);
    return k >= (double)n ? n : (size_t)k;
}

/* All but the sums: which elements stay. The cuts still need to be found. */
static void set_thin(const psoup__method_job *job, size_t i, psoup__thin *thin) {
    double density = psoup__method_density(job, i), epsilon = parameter(job->epsilon, i, 0.15);
    size_t n = job->n, stay = part(density, n), top;
    *thin = (psoup__thin){.scale = 1, .sequence = sequence_of(job->name, i)};
    thin->all = density >= 1;
    thin->none = density <= 0;
    switch (job->method->thinning) {
    case PSOUP__THIN_NONE:
        thin->all = true;
        break;
    case PSOUP__THIN_MAGNITUDE:
        thin->cuts[0].k = stay;
        break;
    case PSOUP__THIN_OUTLIERS: /* fewer large ones go where density asks for more to stay */
        top = part(parameter(job->gamma, i, 0.01), n);
        top = top + stay > n ? n - stay : top;
        thin->cuts[0].k = top + stay;
        thin->cuts[1].k = top;
        /* mergekit slices [bottom:-0] here, which is empty: nothing stays. */
        if (job->peer == PSOUP_MERGE_MERGEKIT && top == 0 && !thin->all)
            thin->none = true;
        break;
    case PSOUP__THIN_RANDOM:
        thin->limit = (uint32_t)ceil(fmin(density, 1) * 0x1p24);
        break;
    case PSOUP__THIN_RANKED:
        thin->least = density - epsilon;
        thin->spread = 2 * epsilon;
        break;
    }
}

static psoup_status find_cuts(const psoup__method_job *job, psoup__thin *thins,
                              psoup_error *error) {
    const size_t per_input = job->method->thinning == PSOUP__THIN_OUTLIERS ? 2 : 1;
    psoup__cut *cuts = psoup__alloc(job->context, job->count * per_input, sizeof *cuts, error);
    bool *skip = psoup__alloc(job->context, job->count, sizeof *skip, error);
    psoup_status status = cuts != NULL && skip != NULL ? PSOUP_OK : PSOUP_ERROR_MEMORY;
    bool any = false;
    for (size_t i = 0; i < job->count && status == PSOUP_OK; i++) {
        skip[i] = thins[i].all || thins[i].none || psoup__method_weight(job, i) == 0;
        any |= !skip[i];
        memcpy(&cuts[i * per_input], thins[i].cuts, per_input * sizeof *cuts);
    }
    if (status == PSOUP_OK && any)
        status = psoup__method_cuts(job, cuts, per_input, skip, error);
    for (size_t i = 0; i < job->count && status == PSOUP_OK; i++) {
        memcpy(thins[i].cuts, &cuts[i * per_input], per_input * sizeof *cuts);
        if (per_input == 1) /* nothing is too large */
            thins[i].cuts[1] = (psoup__cut){.bits = 0x80000000};
    }
    psoup__free(job->context, cuts);
    psoup__free(job->context, skip);
    return status;
}

/* Σ |δ| of each input, then Σ |what stays of it|. */
static void sum_absolute(const psoup__method_job *job, void *arg, size_t at, size_t n, int worker,
                         float *scratch, double *partial) {
    const psoup__method_kernels *kernels = psoup__method_kernels_of(job->context);
    const psoup__thin *thins = arg;
    const float *base = NULL;
    float *delta = scratch + n;
    if (job->base != NULL)
        base = psoup__method_view(job, job->base, at, n, scratch);
    for (size_t i = 0; i < job->count; i++) {
        if (psoup__method_weight(job, i) == 0 || thins[i].all || thins[i].none)
            continue;
        psoup__method_delta(job, i, at, n, base, delta);
        partial[2 * i] += kernels->absolute(delta, n);
        psoup__thin_apply(job, &thins[i], at, n, delta, delta + n);
        partial[2 * i + 1] += kernels->absolute(delta, n);
    }
}

/* mergekit's "rescale": what stays gets the L1 norm of all; norms below 1e-7 are left. */
static psoup_status keep_norms(const psoup__method_job *job, psoup__thin *thins,
                               psoup_error *error) {
    double *sums = psoup__alloc(job->context, job->count, 2 * sizeof *sums, error);
    if (sums == NULL)
        return PSOUP_ERROR_MEMORY;
    psoup_status status =
        psoup__method_walk(job, 2 + (job->method->whole_rows ? PSOUP__THIN_SPACE : 0), sum_absolute,
                           thins, 2 * job->count, sums, error);
    for (size_t i = 0; i < job->count && status == PSOUP_OK; i++) {
        if (!isfinite(sums[2 * i]))
            status = psoup__method_not_finite(job, i, error);
        else if (sums[2 * i] >= 1e-7 && sums[2 * i + 1] >= 1e-7)
            thins[i].scale = (float)(sums[2 * i] / sums[2 * i + 1]);
    }
    psoup__free(job->context, sums);
    return status;
}

psoup_status psoup__thin_prepare(const psoup__method_job *job, psoup__thin **out,
                                 psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const enum psoup__thinning thinning = job->method->thinning;
    psoup__thin *thins = psoup__alloc(job->context, job->count, sizeof *thins, error);
    if (thins == NULL)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < job->count; i++) {
        if (thinning != PSOUP__THIN_NONE)
            PSOUP__TRY(check_parameters(job, i, error));
        set_thin(job, i, &thins[i]);
    }
    if (thinning == PSOUP__THIN_MAGNITUDE || thinning == PSOUP__THIN_OUTLIERS)
        PSOUP__TRY(find_cuts(job, thins, error));
    bool random = thinning == PSOUP__THIN_RANDOM || thinning == PSOUP__THIN_RANKED;
    if (job->rescale && random && job->peer != PSOUP_MERGE_MERGEKIT) /* keeps the expectation */
        for (size_t i = 0; i < job->count; i++) {
            thins[i].each = thinning == PSOUP__THIN_RANKED;
            if (thinning == PSOUP__THIN_RANDOM && !thins[i].none)
                thins[i].scale = (float)(1 / psoup__method_density(job, i));
        }
    else if (job->rescale && thinning != PSOUP__THIN_NONE)
        PSOUP__TRY(keep_norms(job, thins, error));
    *out = thins;
    return PSOUP_OK;
fail:
    psoup__free(job->context, thins);
    return status;
}
