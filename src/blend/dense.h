/* src/blend/dense.h: small dense problems in f64, for matrices of a few hundred columns at most. */
#ifndef PSOUP__MERGE_DENSE_H
#define PSOUP__MERGE_DENSE_H

#include "base/base.h"

/* ---- dense_kernels.c (compiled per instruction set) ------------------------------------------ */

/* Every product and sum is rounded, lanes are added in a fixed order: the same bits on all. */
typedef struct psoup__dense_kernels {
    double (*dot)(const double *x, const double *y, size_t n);
    /* Each of `columns` vectors x [n], `stride` apart: x −= tau (v·x) v. */
    void (*reflect)(double *x, size_t stride, size_t columns, const double *v, double tau,
                    size_t n);
    /* p = c p − s q, q = s p + c q. */
    void (*rotate)(double *p, double *q, double c, double s, size_t n);
} psoup__dense_kernels;
extern const psoup__dense_kernels psoup__dense_kernels_generic;
#ifdef __x86_64__
extern const psoup__dense_kernels psoup__dense_kernels_avx2, psoup__dense_kernels_avx512;
#endif

/* ---- qr.c ------------------------------------------------------------------------------------ */

/* The thin QR of x [m, n], m ≥ n ≥ 1, Q kept as the reflections that make it. */
typedef struct psoup__qr psoup__qr;
psoup_status psoup__qr_create(psoup_context *context, int64_t m, int64_t n, psoup__qr **out,
                              psoup_error *error);
void psoup__qr_free(psoup__qr *qr);
/* Column k of x: x[0], x[stride], …; all are to be set. */
void psoup__qr_column(psoup__qr *qr, int64_t k, const float *x, int64_t stride);
void psoup__qr_run(psoup__qr *qr);
const double *psoup__qr_r(const psoup__qr *qr); /* [n, n], upper triangular */
/* out = Q c, columns contiguous: c [columns, n], out [columns, m]. */
psoup_status psoup__qr_apply(const psoup__qr *qr, const double *c, int64_t columns, double *out,
                             psoup_error *error);

/* ---- svd.c ----------------------------------------------------------------------------------- */

/* SVD of x [n, n] = U diag(s) Vᵀ by one-sided Jacobi; x becomes U, vt [n, n]; s descending. Columns
 * of U whose singular value is 0 are 0. */
void psoup__svd(psoup_context *context, double *x, double *s, double *vt, int64_t n);
const psoup__dense_kernels *psoup__dense_kernels_of(const psoup_context *context);

#endif
