/* Householder QR and one-sided Jacobi SVD, for matrices of a few hundred columns at most. */
#include "merge/merge.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* Applies I − tau v vᵀ from the left to columns [first, n) of x's rows [j, m); v lies in column
 * `column` of x below row j, its element j being `head`. w is scratch [n]. */
static void reflect(double *x, int64_t m, int64_t n, int64_t j, int64_t column, double head,
                    double tau, int64_t first, double *w) {
    for (int64_t c = first; c < n; c++)
        w[c] = head * x[j * n + c];
    for (int64_t i = j + 1; i < m; i++) {
        double v = x[i * n + column];
        for (int64_t c = first; c < n; c++)
            w[c] += v * x[i * n + c];
    }
    for (int64_t c = first; c < n; c++) {
        w[c] *= tau;
        x[j * n + c] -= head * w[c];
    }
    for (int64_t i = j + 1; i < m; i++) {
        double v = x[i * n + column];
        for (int64_t c = first; c < n; c++)
            x[i * n + c] -= v * w[c];
    }
}

/* Golub and Van Loan, Matrix Computations, algorithms 5.1.1, 5.2.1 and 5.1.5: v is scaled to have 1 at
 * its head, is kept below the diagonal of x, and Q is built backwards in its place. */
void psoup__qr(double *x, double *r, double *scratch, int64_t m, int64_t n) {
    double *tau = scratch, *w = scratch + n;
    memset(r, 0, (size_t)(n * n) * sizeof *r);
    for (int64_t j = 0; j < n; j++) {
        double scale = 0, below = 0, top = x[j * n + j];
        for (int64_t i = j; i < m; i++)
            scale = fmax(scale, fabs(x[i * n + j]));
        for (int64_t i = j + 1; i < m && scale > 0; i++)
            below += x[i * n + j] / scale * (x[i * n + j] / scale);
        tau[j] = 0;
        if (below > 0) {
            double norm = scale * sqrt(below + top / scale * (top / scale));
            double beta = top > 0 ? -norm : norm;
            tau[j] = (beta - top) / beta;
            for (int64_t i = j + 1; i < m; i++)
                x[i * n + j] /= top - beta;
            x[j * n + j] = beta;
            reflect(x, m, n, j, j, 1, tau[j], j + 1, w);
        }
        for (int64_t c = j; c < n; c++)
            r[j * n + c] = x[j * n + c];
    }
    for (int64_t j = n - 1; j >= 0; j--) { /* column j of Q = H_0 … H_j e_j */
        for (int64_t c = j; c < n; c++)
            x[j * n + c] = c == j ? 1 : 0;
        reflect(x, m, n, j, j, 1, tau[j], j + 1, w);
        for (int64_t i = j + 1; i < m; i++)
            x[i * n + j] *= -tau[j];
        x[j * n + j] = 1 - tau[j];
    }
}

static void transpose(double *x, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < i; j++) {
            double t = x[i * n + j];
            x[i * n + j] = x[j * n + i];
            x[j * n + i] = t;
        }
}

static void rotate(double *p, double *q, double c, double s, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        double a = p[i], b = q[i];
        p[i] = c * a - s * b;
        q[i] = s * a + c * b;
    }
}

static void swap_rows(double *p, double *q, int64_t n) {
    rotate(p, q, 0, 1, n); /* (p, q) → (−q, p): a sign that U and V share, so their product keeps */
}

/* Hestenes: rotate pairs of columns until all are orthogonal (Golub and Van Loan, section 8.6.4).
 * Columns lie in rows here, which is why x is transposed first. */
void psoup__svd(double *x, double *s, double *vt, int64_t n) {
    const int sweeps = 60; /* quadratic convergence: some ten are the rule */
    double largest = 0;
    transpose(x, n);
    memset(vt, 0, (size_t)(n * n) * sizeof *vt);
    for (int64_t i = 0; i < n; i++)
        vt[i * n + i] = 1;
    for (int64_t i = 0; i < n * n; i++)
        largest = fmax(largest, fabs(x[i]));
    const double nothing = largest * largest * DBL_EPSILON * DBL_EPSILON * DBL_EPSILON;
    bool rotated = largest > 0;
    for (int sweep = 0; sweep < sweeps && rotated; sweep++) {
        rotated = false;
        for (int64_t p = 0; p < n - 1; p++)
            for (int64_t q = p + 1; q < n; q++) {
                double *xp = x + p * n, *xq = x + q * n, pp = 0, qq = 0, pq = 0;
                for (int64_t i = 0; i < n; i++) {
                    pp += xp[i] * xp[i];
                    qq += xq[i] * xq[i];
                    pq += xp[i] * xq[i];
                }
                if (fabs(pq) <= 1e-15 * sqrt(pp) * sqrt(qq) || fabs(pq) <= nothing)
                    continue;
                double zeta = (qq - pp) / (2 * pq);
                double t = (zeta < 0 ? -1 : 1) / (fabs(zeta) + hypot(1, zeta));
                double c = 1 / hypot(1, t);
                rotate(xp, xq, c, c * t, n);
                rotate(vt + p * n, vt + q * n, c, c * t, n);
                rotated = true;
            }
    }
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
            swap_rows(x + i * n, x + best * n, n);
            swap_rows(vt + i * n, vt + best * n, n);
        }
        for (int64_t k = 0; k < n && s[i] > 0; k++)
            x[i * n + k] /= s[i];
    }
    transpose(x, n);
}
