/* src/merge: the merger, a library inside the library. Sees neither ops nor model. */
#ifndef PSOUP__MERGE_H
#define PSOUP__MERGE_H

#include "base/base.h"
#include "format/format.h"
#include "psoup/merge.h"

/* ---- kernels.c (compiled per instruction set), sum.c dispatches -------------------------------- */

/* ---- svd.c: small dense problems in f64 ------------------------------------------------------- */

/* Thin QR of x [m, n] (m ≥ n, row-major): x becomes Q, r [n, n] upper triangular. Householder. */
void psoup__qr(double *x, double *r, double *scratch /* [n] */, int64_t m, int64_t n);
/* SVD of x [n, n] = U diag(s) Vᵀ by one-sided Jacobi; x becomes U, vt [n, n]; s descending. */
void psoup__svd(double *x, double *s, double *vt, int64_t n);

#endif
