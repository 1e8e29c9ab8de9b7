/* src/merge/methods.h: what the files of the methods share among themselves and with nobody else. */
#ifndef PSOUP__MERGE_METHODS_H
#define PSOUP__MERGE_METHODS_H

#include "merge/merge.h"
#include "merge/method.h"

/* ---- method_kernels.c (compiled per instruction set) --------------------------------------------- */

/* Every product and sum is rounded, lanes are added in a fixed order: the same bits on all. */
typedef struct psoup__method_kernels {
    void (*add)(float *y, const float *x, float w, size_t n, bool first); /* psoup__merge_add */
    void (*subtract)(float *x, const float *y, size_t n);                 /* x −= y */
    /* out = base + s · x, s · x where base is NULL; out may be x. */
    void (*finish)(float *out, const float *base, const float *x, float s, size_t n);
    void (*mix)(float *out, const float *x, const float *y, float a, float b, size_t n); /* a x + b y */
    double (*dot)(const float *x, const float *y, size_t n);
} psoup__method_kernels;
extern const psoup__method_kernels psoup__method_kernels_generic;
#ifdef __x86_64__
extern const psoup__method_kernels psoup__method_kernels_avx2, psoup__method_kernels_avx512;
#endif
const psoup__method_kernels *psoup__method_kernels_of(const psoup_context *context);

/* ---- methods_walk.c: reading ------------------------------------------------------------------- */

static inline double psoup__method_weight(const psoup__method_job *job, size_t i) {
    return job->weight != NULL ? job->weight[i] : 1;
}

/* n elements of an input: where it stands, or read into buffer [n]. */
const float *psoup__method_view(const psoup__method_job *job, const psoup__merge_input *input, size_t at,
                                size_t n, float *buffer);
/* out[n] = input i − base. base [n] is the base's block; NULL where the job has none. An input that is
 * the base with adapters is those adapters' sum: nothing is added and taken off again. */
void psoup__method_delta(const psoup__method_job *job, size_t i, size_t at, size_t n, const float *base,
                         float *out);
/* Elements that a block works on at a time: few, so that they stay in a cache, where any number may be
 * read; all n where an input has factors, which are read in whole rows. */
size_t psoup__method_chunk(const psoup__method_job *job, size_t n);

/* Calls fn for every block of a fixed division of the tensor, in parallel; scratch is
 * [per_element · block] and the worker's own. sums [quantities] (may be NULL) receives the blocks' partial
 * sums, added in the order of the blocks. */
typedef void (*psoup__walk_fn)(const psoup__method_job *job, void *arg, size_t at, size_t n, int worker,
                               float *scratch, double *partial /* [quantities] */);
psoup_status psoup__method_walk(const psoup__method_job *job, size_t per_element, psoup__walk_fn fn,
                                void *arg, size_t quantities, double *sums, psoup_error *error);
/* "NAME: input I holds a NaN or infinity": of sums that are not finite. */
psoup_status psoup__method_not_finite(const psoup__method_job *job, size_t input, psoup_error *error);

/* ---- methods_delta.c, methods_angle.c ------------------------------------------------------------- */

psoup_status psoup__delta_prepare(const psoup__method_job *job, void **state, psoup_error *error);
void psoup__delta_block(const psoup__method_job *job, const void *state, size_t at, size_t n, float *out,
                        float *scratch);
psoup_status psoup__slerp_prepare(const psoup__method_job *job, void **state, psoup_error *error);
void psoup__slerp_block(const psoup__method_job *job, const void *state, size_t at, size_t n, float *out,
                        float *scratch);

#endif
