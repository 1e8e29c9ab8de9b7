/* The k largest magnitudes of tensors that are read block by block: a histogram over the upper 16
 * of the 31 bits of |x|, one over the lower 15 of those in the bin where the k-th lies, and, where
 * only some of the elements equal to it stay, a third reading to find the last of these. */
#include "blend/methods.h"

#include <string.h>

#define UPPER 65536
#define LOWER 32768
#define BUDGET                                                                                     \
    (24 << 20) /* bytes of histograms: as many inputs at a time as these hold, one at least */

typedef struct selection {
    psoup__cut *cuts; /* [count, per_input] */
    const bool *skip;
    size_t per_input, first, last; /* inputs of this round */
    uint64_t *bins; /* [workers, last − first, width]; summed into the first worker's */
    size_t width;
    uint32_t *bin;  /* [count, per_input]: where the k-th is; then the k-th itself */
    uint64_t *left; /* [count, per_input]: how many of that bin are above the cut */
    uint32_t *ties; /* [tasks, count, per_input] */
    size_t step;
} selection;

static uint32_t magnitude(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffff;
}

/* For each of the round's inputs calls the counter with its task vector's block. */
typedef void (*counter)(selection *s, size_t input, size_t at, size_t n, const float *x,
                        uint64_t *bins);

static void each_delta(const psoup__method_job *job, selection *s, size_t at, size_t n, int worker,
                       float *scratch, counter count) {
    const float *base = NULL;
    if (job->base != NULL)
        base = psoup__method_view(job, job->base, at, n, scratch);
    for (size_t i = s->first; i < s->last; i++) {
        if (s->skip[i])
            continue;
        psoup__method_delta(job, i, at, n, base, scratch + n);
        count(s, i, at, n, scratch + n,
              s->bins + ((size_t)worker * (s->last - s->first) + i - s->first) * s->width);
    }
}

static void count_upper(selection *s, size_t input, size_t at, size_t n, const float *x,
                        uint64_t *bins) {
    for (size_t e = 0; e < n; e++)
        bins[magnitude(x[e]) >> 15]++;
}

static void count_lower(selection *s, size_t input, size_t at, size_t n, const float *x,
                        uint64_t *bins) {
    for (size_t c = 0; c < s->per_input; c++) {
        uint32_t bin = s->bin[input * s->per_input + c];
        for (size_t e = 0; e < n; e++) {
            uint32_t bits = magnitude(x[e]);
            if (bits >> 15 == bin)
                bins[c * LOWER + (bits & (LOWER - 1))]++;
        }
    }
}

static void count_ties(selection *s, size_t input, size_t at, size_t n, const float *x,
                       uint64_t *bins) {
    for (size_t c = 0; c < s->per_input; c++) {
        uint32_t bits = s->cuts[input * s->per_input + c].bits, count = 0;
        for (size_t e = 0; e < n; e++)
            count += magnitude(x[e]) == bits;
        size_t first = (at / s->step * (s->last - s->first) + input - s->first) * s->per_input;
        s->ties[first + c] += count;
    }
}

static void walk_upper(const psoup__method_job *job, void *arg, size_t at, size_t n, int worker,
                       float *scratch, double *partial) {
    each_delta(job, arg, at, n, worker, scratch, count_upper);
}

static void walk_lower(const psoup__method_job *job, void *arg, size_t at, size_t n, int worker,
                       float *scratch, double *partial) {
    each_delta(job, arg, at, n, worker, scratch, count_lower);
}

static void walk_ties(const psoup__method_job *job, void *arg, size_t at, size_t n, int worker,
                      float *scratch, double *partial) {
    each_delta(job, arg, at, n, worker, scratch, count_ties);
}

static psoup_status count_bins(const psoup__method_job *job, selection *s, size_t width,
                               psoup__walk_fn fn, psoup_error *error) {
    size_t workers = (size_t)psoup_context_threads(job->context), inputs = s->last - s->first;
    s->width = width;
    memset(s->bins, 0, workers * inputs * width * sizeof *s->bins);
    psoup_status status = psoup__method_walk(job, 2, fn, s, 0, NULL, error);
    for (size_t w = 1; w < workers && status == PSOUP_OK; w++)
        for (size_t b = 0; b < inputs * width; b++)
            s->bins[b] += s->bins[w * inputs * width + b];
    return status;
}

/* The bin, from the highest, in which `above` elements are reached; *above becomes how many of it
 * belong above the cut. Where none are asked for, past the highest. */
static uint32_t find_bin(const uint64_t *bins, uint32_t n, uint64_t *above) {
    uint32_t bin = n;
    while (*above > 0 && bin > 0 && *above > bins[bin - 1])
        *above -= bins[--bin];
    return *above > 0 && bin > 0 ? bin - 1 : n;
}

/* The ties of a cut that stay are `left` of them, from the lowest index. */
static psoup_status last_tie(const psoup__method_job *job, const selection *s, size_t input,
                             size_t c, psoup_error *error) {
    psoup__cut *cut = &s->cuts[input * s->per_input + c];
    uint64_t left = s->left[input * s->per_input + c];
    size_t inputs = s->last - s->first, at = 0;
    for (size_t task = 0; at < job->n; task++, at += s->step) {
        uint32_t here = s->ties[(task * inputs + input - s->first) * s->per_input + c];
        if (left <= here)
            break;
        left -= here;
    }
    size_t n = job->n - at < s->step ? job->n - at : s->step;
    float *scratch = psoup__alloc(job->context, n, 2 * sizeof *scratch, error);
    if (scratch == NULL)
        return PSOUP_ERROR_MEMORY;
    const float *base =
        job->base != NULL ? psoup__method_view(job, job->base, at, n, scratch) : NULL;
    psoup__method_delta(job, input, at, n, base, scratch + n);
    for (size_t e = 0; e < n && left > 0; e++)
        if (magnitude(scratch[n + e]) == cut->bits && --left == 0)
            cut->end = at + e + 1;
    psoup__free(job->context, scratch);
    return PSOUP_OK;
}

/* One round: inputs first … last − 1. */
static psoup_status select_inputs(const psoup__method_job *job, selection *s, psoup_error *error) {
    psoup_status status;
    bool some_ties = false;
    PSOUP__TRY(count_bins(job, s, UPPER, walk_upper, error));
    for (size_t i = s->first; i < s->last; i++)
        for (size_t c = 0; c < s->per_input; c++) {
            size_t at = i * s->per_input + c;
            s->left[at] = s->cuts[at].k;
            s->bin[at] = find_bin(s->bins + (i - s->first) * UPPER, UPPER, &s->left[at]);
        }
    PSOUP__TRY(count_bins(job, s, LOWER * s->per_input, walk_lower, error));
    for (size_t i = s->first; i < s->last; i++)
        for (size_t c = 0; c < s->per_input; c++) {
            size_t at = i * s->per_input + c;
            const uint64_t *bins = s->bins + ((i - s->first) * s->per_input + c) * LOWER;
            psoup__cut *cut = &s->cuts[at];
            if (s->skip[i])
                continue;
            *cut = (psoup__cut){.bits = 0x80000000, .end = 0, .k = cut->k}; /* of none: above all */
            if (cut->k == 0)
                continue;
            uint32_t low = find_bin(bins, LOWER, &s->left[at]);
            cut->bits = s->bin[at] << 15 | low;
            cut->end = job->n;
            some_ties |= s->left[at] < bins[low];
        }
    if (!some_ties)
        return PSOUP_OK;
    s->ties = psoup__alloc(job->context, (job->n / s->step + 1) * (s->last - s->first),
                           s->per_input * sizeof *s->ties, error);
    if (s->ties == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(psoup__method_walk(job, 2, walk_ties, s, 0, NULL, error));
    for (size_t i = s->first; i < s->last; i++)
        for (size_t c = 0; c < s->per_input && !s->skip[i]; c++)
            if (s->cuts[i * s->per_input + c].k > 0)
                PSOUP__TRY(last_tie(job, s, i, c, error));
fail:
    psoup__free(job->context, s->ties);
    s->ties = NULL;
    return status;
}

psoup_status psoup__method_cuts(const psoup__method_job *job, psoup__cut *cuts, size_t per_input,
                                const bool *skip, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    selection s = {
        .cuts = cuts, .skip = skip, .per_input = per_input, .step = psoup__method_step(job)};
    size_t cell = (size_t)psoup_context_threads(job->context) * UPPER * sizeof *s.bins;
    size_t together = BUDGET / cell < 1 ? 1 : BUDGET / cell;
    together = job->count < together ? job->count : together;
    if ((s.bins = psoup__alloc(job->context, together, cell, error)) == NULL ||
        (s.bin = psoup__alloc(job->context, job->count * per_input, sizeof *s.bin, error)) ==
            NULL ||
        (s.left = psoup__alloc(job->context, job->count * per_input, sizeof *s.left, error)) ==
            NULL)
        goto fail;
    status = PSOUP_OK;
    for (; s.first < job->count; s.first = s.last) {
        s.last = job->count - s.first < together ? job->count : s.first + together;
        PSOUP__TRY(select_inputs(job, &s, error));
    }
fail:
    psoup__free(job->context, s.bins);
    psoup__free(job->context, s.bin);
    psoup__free(job->context, s.left);
    return status;
}
