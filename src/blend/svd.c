/* One-sided Jacobi SVD, for matrices of a few hundred columns at most. */
#include "blend/dense.h"

#include <float.h>
#include <math.h>
#include <string.h>

const psoup__dense_kernels *psoup__dense_kernels_of(const psoup_context *context) {
#ifdef __x86_64__
    switch (psoup__isa_of(context)) {
    case PSOUP__ISA_AVX512:
        return &psoup__dense_kernels_avx512;
    case PSOUP__ISA_AVX2:
        return &psoup__dense_kernels_avx2;
    default:
        break;
    }
#endif
    return &psoup__dense_kernels_generic;
}

static void transpose(double *x, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < i; j++) {
            double t = x[i * n + j];
            x[i * n + j] = x[j * n + i];
            x[j * n + i] = t;
        }
}

/* (p, q) → (−q, p): a sign that U and V share, so their product keeps. */
static void swap_rows(const psoup__dense_kernels *kernels, double *p, double *q, int64_t n) {
    kernels->rotate(p, q, 0, 1, (size_t)n);
}

/* One sweep over all pairs; whether any was rotated. square [n] holds the rows' squared norms; they
 * are carried along, and summed again where a difference has left few digits. */
static bool sweep_pairs(const psoup__dense_kernels *kernels, double *x, double *vt, double *square,
                        int64_t n, double nothing) {
    bool rotated = false;
    for (int64_t i = 0; i < n; i++)
        square[i] = kernels->dot(x + i * n, x + i * n, (size_t)n);
    for (int64_t p = 0; p < n - 1; p++)
        for (int64_t q = p + 1; q < n; q++) {
            double *xp = x + p * n, *xq = x + q * n, pp = square[p], qq = square[q];
            double pq = kernels->dot(xp, xq, (size_t)n);
            if (fabs(pq) <= 1e-15 * sqrt(pp) * sqrt(qq) || fabs(pq) <= nothing)
                continue;
            double zeta = (qq - pp) / (2 * pq);
            double t = (zeta < 0 ? -1 : 1) / (fabs(zeta) + hypot(1, zeta));
            double c = 1 / hypot(1, t);
            kernels->rotate(xp, xq, c, c * t, (size_t)n);
            kernels->rotate(vt + p * n, vt + q * n, c, c * t, (size_t)n);
            square[p] = pp - t * pq;
            square[q] = qq + t * pq;
            if (!(square[p] > 0.01 * pp))
                square[p] = kernels->dot(xp, xp, (size_t)n);
            if (!(square[q] > 0.01 * qq))
                square[q] = kernels->dot(xq, xq, (size_t)n);
            rotated = true;
        }
    return rotated;
}

/* Hestenes: rotate pairs of columns until all are orthogonal (Golub and Van Loan, section 8.6.4).
 * Columns lie in rows here, which is why x is transposed first. */
void psoup__svd(psoup_context *context, double *x, double *s, double *vt, int64_t n) {
    const psoup__dense_kernels *kernels = psoup__dense_kernels_of(context);
    const int sweeps = 60; /* quadratic convergence: some ten are the rule */
    double largest = 0;
    transpose(x, n);
    memset(vt, 0, (size_t)(n * n) * sizeof *vt);
    for (int64_t i = 0; i < n; i++)
        vt[i * n + i] = 1;
    for (int64_t i = 0; i < n * n; i++)
        largest = fmax(largest, fabs(x[i]));
    const double nothing = largest * largest * DBL_EPSILON * DBL_EPSILON * DBL_EPSILON;
    for (int sweep = 0; sweep < sweeps && largest > 0; sweep++)
        if (!sweep_pairs(kernels, x, vt, s, n, nothing))
            break;
    for (int64_t i = 0; i < n; i++) {
        double square = 0;
        for (int64_t k = 0; k < n; k++)
            square += x[i * n + k] * x[i * n + k];
        s[i] = sqrt(square);
    }
    for (int64_t i = 0; i < n; i++) {
        int64_t best = i;
        for (int64_t j = i + 1; j < n; j++)
            if (s[j] > s[best])
                best = j;
        if (best != i) {
            double t = s[i];
            s[i] = s[best];
            s[best] = t;
            swap_rows(kernels, x + i * n, x + best * n, n);
            swap_rows(kernels, vt + i * n, vt + best * n, n);
        }
        for (int64_t k = 0; k < n && s[i] > 0; k++)
            x[i * n + k] /= s[i];
    }
    transpose(x, n);
}
