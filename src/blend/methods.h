/* src/blend/methods.h: what the files of the methods share among themselves and with nobody else.
 */
#ifndef PSOUP__MERGE_METHODS_H
#define PSOUP__MERGE_METHODS_H

#include "blend/blend.h"
#include "blend/method.h"

/* ---- method_kernels.c (compiled per instruction set) ----------------------------------------- */

/* Every product and sum is rounded, lanes are added in a fixed order: the same bits on all. */
typedef struct psoup__method_kernels {
    void (*add)(float *y, const float *x, float w, size_t n, bool first); /* psoup__merge_add */
    void (*subtract)(float *x, const float *y, size_t n);                 /* x −= y */
    /* out = base + s · x, s · x where base is NULL; out may be x. */
    void (*finish)(float *out, const float *base, const float *x, float s, size_t n);
    void (*mix)(float *out, const float *x, const float *y, float a, float b,
                size_t n); /* a x + b y */
    double (*dot)(const float *x, const float *y, size_t n);
    /* out = x_j a_j + y_j b_j; xx_j += x_j², yy_j += y_j², xy_j += x_j y_j. */
    void (*mix_each)(float *out, const float *x, const float *y, const float *a, const float *b,
                     size_t n);
    void (*dot_each)(double *xx, double *yy, double *xy, const float *x, const float *y, size_t n);
    double (*absolute)(const float *x, size_t n); /* Σ |x| */
    /* x = scale · x where low ≤ bits of |x| < high, else 0. */
    void (*window)(float *x, size_t n, uint32_t low, uint32_t high, float scale);
    /* out[i] = the high 24 bits of Philox word at + i. */
    void (*draw)(uint32_t *out, size_t n, uint64_t seed, uint64_t sequence, uint64_t at);
    void (*keep)(float *x, size_t n, const uint32_t *drawn, uint32_t limit,
                 float scale); /* drawn < limit */
    /* votes (+)= x, or x's sign. */
    void (*vote)(float *votes, const float *x, size_t n, bool of_signs, bool first);
    void (*elect)(float *votes, size_t n, float tie); /* 1, −1, `tie` for 0; NaN stays */
    /* Where x has the sign: sum (+)= w · x and divisor (+)= d. */
    void (*agree)(float *sum, float *divisor, const float *sign, const float *x, float w, float d,
                  size_t n, bool first);
    /* sum /= divisor where that is not 0 (nor NULL); NaN where the sign is. */
    void (*settle)(float *sum, const float *divisor, const float *sign, size_t n);
} psoup__method_kernels;
extern const psoup__method_kernels psoup__method_kernels_generic;
#ifdef __x86_64__
extern const psoup__method_kernels psoup__method_kernels_avx2, psoup__method_kernels_avx512;
#endif
const psoup__method_kernels *psoup__method_kernels_of(const psoup_context *context);

/* ---- methods_walk.c: reading -------------------------------------------------------------------
 */

static inline double psoup__method_weight(const psoup__method_job *job, size_t i) {
    return job->weight != NULL ? job->weight[i] : 1;
}
static inline double psoup__method_density(const psoup__method_job *job, size_t i) {
    return job->density != NULL ? job->density[i] : 1;
}

/* n elements of an input: where it stands, or read into buffer [n]. */
const float *psoup__method_view(const psoup__method_job *job, const psoup__merge_input *input,
                                size_t at, size_t n, float *buffer);
/* out[n] = input i − base. base [n] is the base's block; NULL where the job has none. An input that
 * is the base with adapters is those adapters' sum: nothing is added and taken off again. */
void psoup__method_delta(const psoup__method_job *job, size_t i, size_t at, size_t n,
                         const float *base, float *out);
/* Elements that a block works on at a time: few, so that they stay in a cache, where any number may
 * be read; all n where an input has factors, which are read in whole rows. */
size_t psoup__method_chunk(const psoup__method_job *job, size_t n);

/* Goes through a fixed division of the tensor into blocks, in parallel, and through each in pieces,
 * for which it calls fn; scratch is [per_element · piece] and the worker's own. fn adds to its
 * block's partial sums, and these are added in the order of the blocks to sums [quantities] (which
 * may be NULL). */
typedef void (*psoup__walk_fn)(const psoup__method_job *job, void *arg, size_t at, size_t n,
                               int worker, float *scratch, double *partial /* [quantities] */);
psoup_status psoup__method_walk(const psoup__method_job *job, size_t per_element, psoup__walk_fn fn,
                                void *arg, size_t quantities, double *sums, psoup_error *error);
/* Calls fn for every row of columns elements, in parallel; scratch is [per_element ·
 * chunk(columns)], so a row is to be read in chunks of psoup__method_chunk(job, columns). */
typedef void (*psoup__rows_fn)(const psoup__method_job *job, void *arg, size_t row, int worker,
                               float *scratch);
psoup_status psoup__method_walk_rows(const psoup__method_job *job, size_t per_element,
                                     psoup__rows_fn fn, void *arg, psoup_error *error);
/* Elements of one of psoup__method_walk's blocks; the last has what is left. */
size_t psoup__method_step(const psoup__method_job *job);
/* "NAME: input I holds a NaN or infinity": of sums that are not finite. */
psoup_status psoup__method_not_finite(const psoup__method_job *job, size_t input,
                                      psoup_error *error);

/* ---- methods_ahead.c: whole tensors from files ------------------------------------------------- */

typedef struct psoup__ahead psoup__ahead;
/* For a walk of whole tensors; *out is NULL where all of them are in memory. */
psoup_status psoup__ahead_open(const psoup__method_job *job, psoup__ahead **out, psoup_error *error);
/* The job for a worker whose task ends before element `end`. */
const psoup__method_job *psoup__ahead_job(psoup__ahead *ahead, const psoup__method_job *job, int worker,
                                          size_t end);
void psoup__ahead_close(psoup_context *context, psoup__ahead *ahead);

/* ---- methods_thin.c, methods_select.c: what stays of a task vector --------------------------- */

/* Elements above a cut: |x| has bits above these, or these and an index below `end`. */
typedef struct psoup__cut {
    uint32_t bits;
    size_t end;
    size_t k; /* how many are above */
} psoup__cut;
/* Finds the cuts with the k largest magnitudes above them, of equal ones those of the lowest index;
 * a NaN is larger than any number. cuts is [job->count, per_input]; inputs whose `skip` is set are
 * not read. */
psoup_status psoup__method_cuts(const psoup__method_job *job, psoup__cut *cuts, size_t per_input,
                                const bool *skip, psoup_error *error);

typedef struct psoup__thin { /* one input's */
    bool all, none;
    psoup__cut cuts[2]; /* by magnitude: above the first and not above the second stays */
    uint32_t limit;     /* at random: 24-bit numbers below it stay */
    uint64_t sequence;
    double least,
        spread;  /* by rank: the smallest's chance to stay, and what the largest has more */
    bool each;   /* what stays by rank is divided by its own chance; else */
    float scale; /* multiplies what stays */
} psoup__thin;
/* [job->count], from the context's allocator. */
psoup_status psoup__thin_prepare(const psoup__method_job *job, psoup__thin **out,
                                 psoup_error *error);
/* Thins x [n], elements at … of input i's task vector. space is [PSOUP__THIN_SPACE · n] where rows
 * are whole. */
enum { PSOUP__THIN_SPACE = 6 };
void psoup__thin_apply(const psoup__method_job *job, const psoup__thin *thin, size_t at, size_t n,
                       float *x, float *space);

/* ---- methods_delta.c, methods_angle.c, methods_stock.c --------------------------------------- */

psoup_status psoup__delta_prepare(const psoup__method_job *job, void **state, psoup_error *error);
void psoup__delta_block(const psoup__method_job *job, const void *state, size_t at, size_t n,
                        float *out, float *scratch);
psoup_status psoup__slerp_prepare(const psoup__method_job *job, void **state, psoup_error *error);
void psoup__slerp_block(const psoup__method_job *job, const void *state, size_t at, size_t n,
                        float *out, float *scratch);

psoup_status psoup__nuslerp_prepare(const psoup__method_job *job, void **state, psoup_error *error);
void psoup__nuslerp_block(const psoup__method_job *job, const void *state, size_t at, size_t n,
                          float *out, float *scratch);
psoup_status psoup__stock_prepare(const psoup__method_job *job, void **state, psoup_error *error);
void psoup__stock_block(const psoup__method_job *job, const void *state, size_t at, size_t n,
                        float *out, float *scratch);

#endif
