/* src/blend/method.h: what one merge method is, and what it is given. A method knows nothing of files:
 * it reads f32 blocks of its inputs and makes f32 blocks of the result. Adding one is one function and
 * one row of the table in methods.c.
 */
#ifndef PSOUP__MERGE_METHOD_H
#define PSOUP__MERGE_METHOD_H

#include "base/base.h"
#include "psoup/merge.h"

/* ---- read.c: one source's part of a tensor ------------------------------------------------------ */

/* tensor + Σ_j weights[j] · scale_j · B_j A_j, read block by block. Without factors any block may be
 * read; with them `at` and `n` are whole rows. */
typedef struct psoup__merge_input {
    const psoup__tensor *tensor;       /* NULL: zeros */
    const psoup_lora_factors *factors; /* [n_factors]; a [rank, columns], b [rows, rank] */
    const double *weights;             /* [n_factors] */
    size_t n_factors;
    int64_t columns; /* the last dimension */
} psoup__merge_input;
/* out[n] = elements at … at + n − 1 in row-major order. May be called from any worker. */
void psoup__merge_read(psoup_context *context, const psoup__merge_input *input, size_t at, size_t n,
                       float *out);

/* ---- methods.c ---------------------------------------------------------------------------------- */

/* One tensor to merge. All inputs and the base have n elements. */
typedef struct psoup__method_job {
    psoup_context *context;
    const char *name; /* of the result: random methods draw from Philox by (seed, this name, element) */
    size_t n;
    int64_t columns; /* the last dimension; n for a vector */
    size_t count;
    const psoup__merge_input *inputs; /* [count], without the base */
    const psoup__merge_input *base;   /* or NULL */
    const double *weight, *density, *gamma, *epsilon; /* [count] each */
    double lambda;  /* scales the merged task vector */
    double t;       /* slerp */
    bool normalize; /* divide by the sum of the weights that count */
    bool rescale;   /* keep the norm, or the expectation, of what was thinned out */
    uint64_t seed;
    int32_t peer; /* psoup_merge_peer: whose definition, where two differ */
    const struct psoup__method *method; /* psoup__method_of(…) */
    int64_t rows;        /* the first dimension; n for a vector */
    const double *scale; /* [count] of passthrough; NULL: 1 */
    int32_t vote;        /* psoup__vote, where signs are elected */
    bool flatten;        /* nuslerp: the tensor is one vector; else its rows are (its columns where row_wise) */
    bool row_wise;       /* nuslerp: the first dimension is the vectors' own; mergekit's name */
    bool filter_wise;    /* model_stock: each row has its own angle */
} psoup__method_job;

typedef enum psoup__vote { PSOUP__VOTE_TOTAL, PSOUP__VOTE_FREQUENCY } psoup__vote; /* PEFT's names */

/* Arrays of the job that are NULL are all 1 (weight, density, scale), 0.01 (gamma), 0.15 (epsilon). A base
 * of NULL is zeros: the inputs are then task vectors, as ΔW of adapters is. Slerp begins at the base where
 * there is one, else at the first of two inputs. A weight of zero skips its input where weights count. */

typedef struct psoup__method {
    const char *name;
    int32_t method;       /* psoup_merge_method */
    bool needs_base;      /* of full models */
    size_t least, most;   /* inputs without the base; most 0: any number */
    uint32_t parameters;  /* which of the job's parameters it reads: one bit each, below */
    uint32_t on[3];       /* by psoup_merge_peer: which of its switches are on where nothing is said */
    bool whole_rows;      /* blocks must be whole rows (job->columns), one at least */
    /* Of sums of task vectors: how each is thinned out first, and whether signs are elected. */
    enum psoup__thinning {
        PSOUP__THIN_NONE,
        PSOUP__THIN_MAGNITUDE, /* the largest stay */
        PSOUP__THIN_OUTLIERS,  /* those between the largest and the smallest stay */
        PSOUP__THIN_RANDOM,    /* every element with the same probability */
        PSOUP__THIN_RANKED     /* with one that grows with its rank in its row */
    } thinning;
    bool elects;
    /* Whole-tensor quantities (thresholds, norms, angles), computed by reading the inputs block by block.
     * *state is allocated from the context and freed by psoup__free; NULL when there is nothing to know. */
    psoup_status (*prepare)(const psoup__method_job *job, void **state, psoup_error *error);
    /* out[n] = the result's elements at … at + n − 1; whole rows where an input has factors. Called for
     * different blocks from different workers, in any order: the bits of an element depend on the job alone.
     * scratch is [psoup__method_scratch(job) · n]. prepare has succeeded. */
    void (*block)(const psoup__method_job *job, const void *state, size_t at, size_t n, float *out,
                  float *scratch);
} psoup__method;

enum {
    PSOUP__USES_WEIGHT = 1, PSOUP__USES_DENSITY = 2, PSOUP__USES_GAMMA = 4, PSOUP__USES_EPSILON = 8,
    PSOUP__USES_LAMBDA = 16, PSOUP__USES_T = 32, PSOUP__USES_NORMALIZE = 64, PSOUP__USES_RESCALE = 128,
    PSOUP__USES_SEED = 256, PSOUP__USES_SCALE = 512, PSOUP__USES_VOTE = 1024, PSOUP__USES_FLATTEN = 2048,
    PSOUP__USES_ROW_WISE = 4096, PSOUP__USES_FILTER_WISE = 8192
};

/* The row of a method; NULL for a value that is no full-tensor method (delta, factors, svd,
 * peft_linear). */
const psoup__method *psoup__method_of(psoup_merge_method method);
/* The row of a name as in the table ("dare_ties"); NULL for another. */
const psoup__method *psoup__method_named(const char *name);
/* Floats of scratch that a block needs per element. */
size_t psoup__method_scratch(const psoup__method_job *job);

/* ---- fit.c ------------------------------------------------------------------------------------- */

/* The job's result [rows, columns], a matrix, as the nearest pair of factors that is easily found: a [rank,
 * columns], b [rows, rank], of scale 1. Calls the method's prepare and block itself, keeps at most 64 MiB of
 * the result, and gives the same bits for any number of threads. *relative_error receives
 * ‖b a − merged‖/‖merged‖ (0 where nothing was merged). */
psoup_status psoup__merge_dense_svd(const psoup__method_job *job, int32_t rank, float *a, float *b,
                                    double *relative_error, psoup_error *error);
/* The same, with another limit: a result of more than `kept` bytes is merged again for each of a few dozen
 * passes, in panels of rows. The bits do not depend on it. */
psoup_status psoup__merge_dense_fit(const psoup__method_job *job, int32_t rank, int64_t kept, float *a,
                                    float *b, double *relative_error, psoup_error *error);

#endif
