/* src/blend: what merging computes: sums, folds, factors, and the methods of whole tensors (method.h). Knows
 * nothing of files; src/merge decides what is merged from where to where. */
#ifndef PSOUP__BLEND_H
#define PSOUP__BLEND_H

#include "base/base.h"
#include "psoup/merge.h"

/* ---- kernels.c (compiled per instruction set), sum.c dispatches -------------------------------- */

/* y = w · x where first, else y += w · x; every product and sum rounded (no fused multiply-add), so
 * that all instruction sets give the same bits. */
typedef void (*psoup__merge_add_fn)(float *y, const float *x, float w, size_t n, bool first);
/* Whether every |x| ≤ limit; a NaN is not. */
typedef bool (*psoup__merge_within_fn)(const float *x, float limit, size_t n);
/* out[n] = Σ weights · in, in the order of the inputs, one rounding; false when a sum is NaN or beyond
 * `limit`. Dtypes are F32, F16, BF16; every pointer of any alignment. */
enum { PSOUP__SUM_INPUTS = 32 };
typedef struct psoup__sum_run {
    void *out;
    psoup_dtype out_dtype;
    const void *const *in; /* [count], 1 … PSOUP__SUM_INPUTS; one may be out where dtypes are equal */
    const psoup_dtype *dtypes;
    const float *weights;
    size_t count, n;
    float limit;
    bool stream; /* past the caches */
} psoup__sum_run;
typedef bool (*psoup__merge_sum_fn)(const psoup__sum_run *run);
/* Products and sums of factors, in f64, each rounded once; `stream` goes past the caches where the place
 * allows it. scatter: rows [rows, rank] to rows out_stride apart, times w. */
typedef void (*psoup__merge_scatter_fn)(float *out, size_t out_stride, const float *x, size_t rank,
                                        size_t rows, double w, bool stream);
typedef void (*psoup__merge_add_double_fn)(double *y, const float *x, double w, size_t n); /* y += w · x */
typedef void (*psoup__merge_round_double_fn)(float *out, const double *x, double scale, size_t n,
                                             bool stream);
#define PSOUP__MERGE_DECLARE(variant)                                                              \
    void PSOUP__PASTE(psoup__merge_add, variant)(float *y, const float *x, float w, size_t n,      \
                                                 bool first);                                      \
    bool PSOUP__PASTE(psoup__merge_within, variant)(const float *x, float limit, size_t n);        \
    bool PSOUP__PASTE(psoup__merge_sum_run, variant)(const psoup__sum_run *run);                   \
    void PSOUP__PASTE(psoup__merge_scatter, variant)(float *out, size_t out_stride, const float *x, \
                                                     size_t rank, size_t rows, double w,           \
                                                     bool stream);                                 \
    void PSOUP__PASTE(psoup__merge_add_double, variant)(double *y, const float *x, double w,       \
                                                        size_t n);                                 \
    void PSOUP__PASTE(psoup__merge_round_double, variant)(float *out, const double *x,             \
                                                          double scale, size_t n, bool stream);
PSOUP__MERGE_DECLARE(generic)
PSOUP__MERGE_DECLARE(avx2)
PSOUP__MERGE_DECLARE(avx512)

typedef struct psoup__sum_args {
    void *out; /* [n] of out_dtype */
    psoup_dtype out_dtype;
    const void *const *in; /* [count], each [n] of its dtype; any alignment */
    const psoup_dtype *dtypes;
    const double *weights; /* zero skips its input */
    size_t count, n;
    bool stream; /* out will not be read soon, and is none of the inputs */
    /* With rows > 1 there are so many runs of n elements, which begin so many elements apart. */
    size_t rows, out_stride;
    const size_t *strides; /* [count] */
} psoup__sum_args;
/* out = Σ weights · in; false when a result is NaN or too large for out_dtype. All dtypes that
 * psoup__dtype_is_float knows; those that are not F32, F16 or BF16 take a copy through a cache. */
bool psoup__sum(psoup_context *context, const psoup__sum_args *args);
/* Whether all n values are finite and stay so when rounded to dtype. */
bool psoup__merge_finite(psoup_context *context, const float *x, size_t n, psoup_dtype dtype);
/* Sum to 1, finite: an error naming `where` otherwise. */
psoup_status psoup__merge_check_weights(const double *weights, size_t n, bool any_sum,
                                        psoup_error *error);

/* ---- fold_kernel.c (compiled per instruction set), fold.c ------------------------------------------ */

enum { PSOUP__FOLD_COLUMNS = 128, PSOUP__FOLD_DEPTH = 64 }; /* the most of one strip */
/* Some of A's columns times some rows of B, over some depths, added to `in`. */
typedef struct psoup__fold_strip {
    int64_t rows, columns, depth;
    const float *a; /* [depth, columns] in panels as `pack` makes them */
    const float *b; /* [rows, PSOUP__FOLD_DEPTH], scaled */
    const char *in; /* F32, F16 or BF16; strides in bytes; may be out */
    psoup_dtype in_dtype;
    int64_t in_stride;
    char *out;
    psoup_dtype out_dtype;
    int64_t out_stride;
    bool stream; /* BF16 past the caches; rows of out begin at whole lines */
} psoup__fold_strip;
typedef struct psoup__fold_kernels {
    void (*strip)(const psoup__fold_strip *strip);
    /* Rows of A [rows, columns] become depths at … at + rows − 1 of `depth`; out holds
     * depth · PSOUP__FOLD_COLUMNS floats. */
    void (*pack)(float *out, const float *a, int64_t a_stride, int64_t at, int64_t rows, int64_t depth,
                 int64_t columns);
} psoup__fold_kernels;
extern const psoup__fold_kernels psoup__fold_kernels_generic;
#ifdef __x86_64__
extern const psoup__fold_kernels psoup__fold_kernels_avx2, psoup__fold_kernels_avx512;
#endif

typedef struct psoup__fold_args {
    void *out; /* [rows, columns] */
    const void *base;
    psoup_dtype out_dtype, base_dtype; /* F32, F16 or BF16 */
    size_t out_stride, base_stride;    /* elements from row to row */
    int64_t rows, columns;
    int64_t first_row, first_column; /* of B's rows and A's columns */
    int64_t in;                      /* A's columns in all */
    const psoup_lora_factors *factors;
    const double *weights; /* zero skips */
    size_t count;
    bool stream; /* out will not be read soon */
} psoup__fold_args;
/* out = base + Σ weights · scale · B A, rounded once. out may be base where dtypes and strides are equal. */
void psoup__fold(psoup_context *context, const psoup__fold_args *args);

/* acc[rows, in] = rows first … first + rows − 1 of base + Σ weights · scale · B A. */
void psoup__fold_rows(psoup_context *context, float *acc, const void *base, psoup_dtype dtype,
                      int64_t first, int64_t rows, int64_t in, const psoup_lora_factors *factors,
                      const double *weights, size_t count);
/* acc[rows, in] += rows first … of Σ weights · scale · B A. */
void psoup__fold_into(psoup_context *context, float *acc, int64_t first, int64_t rows, int64_t in,
                      const psoup_lora_factors *factors, const double *weights, size_t count);
/* Rows of one step, so that its sums fit a cache. */
int64_t psoup__fold_block(int64_t out, int64_t in);
/* ---- lora.c ----------------------------------------------------------------------------------- */

/* Sizes whose products fit, ranks and pointers there; weights finite. */
psoup_status psoup__lora_check(const char *who, const psoup_context *context, int64_t out, int64_t in,
                               const psoup_lora_factors *factors, const double *weights, size_t count,
                               psoup_error *error);

/* ---- factors.c, reweight.c -------------------------------------------------------------------- */

/* What a method asks of its factors beside what all do. */
psoup_status psoup__factors_check(psoup_context *context, psoup_merge_method method, int64_t out, int64_t in,
                                  const psoup_lora_factors *factors, const double *weights, size_t count,
                                  psoup_error *error);
/* PSOUP_MERGE_SVD into zeroed a and b, and the error of other methods (a and b NULL). total: the ranks of
 * the factors in use together, at least 1. */
psoup_status psoup__factors_between(psoup_context *context, psoup_merge_method method, float *a, float *b,
                                    int64_t rank, int64_t out, int64_t in,
                                    const psoup_lora_factors *factors, const double *weights,
                                    size_t count, int64_t total, double *relative_error,
                                    psoup_error *error);

/* The rank that a method's result has; 0 when the method cannot be used, with *error set. */
int32_t psoup__merge_rank(psoup_merge_method method, int32_t svd_rank,
                          const psoup_lora_factors *factors, size_t count, psoup_error *error);

/* ---- gram.c: small dense problems on Gram matrices, f64 ----------------------------------- */

/* One module: the factors of n adapters, absent ones of rank 0. */
typedef struct psoup__gram_module {
    const psoup_lora_factors *factors; /* [n] */
    size_t n;
    int64_t out, in;
    int64_t total; /* Σ rank */
} psoup__gram_module;

/* gram[total, total] of A's rows, or of B's columns. */
psoup_status psoup__gram_of(psoup_context *context, const psoup__gram_module *module, bool of_b,
                            double *gram, psoup_error *error);
/* inner[n, n]: ⟨ΔW_i, ΔW_j⟩ = s_i s_j tr((B_iᵀ B_j)(A_j A_iᵀ)). */
void psoup__gram_inner(const psoup__gram_module *module, const double *gram_a, const double *gram_b,
                          double *inner);
/* ‖factors − delta‖² for the weights: the Frobenius norm of B_cat C A_cat, where C has the blocks
 * (s w_i w_j − [i = j] w_i s) I. All adapters have the same rank and scale. scratch: [2 · total²]. */
double psoup__gram_cross(const psoup__gram_module *module, const double *gram_a, const double *gram_b,
                         const double *weights, double *scratch);
/* squares[total]: the squared singular values of Σ w_i ΔW_i, descending. scratch: [3 · total²]. */
void psoup__gram_spectrum(const psoup__gram_module *module, const double *gram_a, const double *gram_b,
                          const double *weights, double *squares, double *scratch);

#endif
