/* Norms, angles and spectra of low-rank changes from the Gram matrices of their factors, in f64: nothing of
 * the size of ΔW is ever formed. */
#include "blend/blend.h"
#include "blend/methods.h"

#include <float.h>
#include <math.h>
#include <string.h>

typedef struct gram_job {
    const psoup__method_kernels *kernels;
    const float **rows; /* [total], each [length] */
    size_t total, length;
    double *gram;
} gram_job;

/* Two rows a task, a short one and a long one of the triangle. */
static void gram_rows(void *arg, size_t task, int worker) {
    const gram_job *g = arg;
    (void)worker;
    for (int end = 0; end < 2; end++) {
        size_t i = end == 0 ? task : g->total - 1 - task;
        for (size_t j = 0; j <= i && (end == 0 || i != task); j++)
            g->gram[i * g->total + j] = g->gram[j * g->total + i] =
                g->kernels->dot(g->rows[i], g->rows[j], g->length);
    }
}

psoup_status psoup__gram_of(psoup_context *context, const psoup__gram_module *module, bool of_b,
                            double *gram, psoup_error *error) {
    const size_t length = (size_t)(of_b ? module->out : module->in), total = (size_t)module->total;
    float *turned = NULL;
    const float **rows = psoup__alloc(context, total, sizeof *rows, error);
    if (rows == NULL)
        return PSOUP_ERROR_MEMORY;
    if (of_b && (turned = psoup__alloc(context, total * length, sizeof *turned, error)) == NULL) {
        psoup__free(context, rows);
        return PSOUP_ERROR_MEMORY;
    }
    size_t at = 0;
    for (size_t f = 0; f < module->n; f++) {
        const psoup_lora_factors *x = &module->factors[f];
        for (size_t k = 0; k < (size_t)x->rank; k++, at++) {
            rows[at] = of_b ? turned + at * length : x->a + k * length;
            for (size_t i = 0; i < length && of_b; i++)
                turned[at * length + i] = x->b[i * (size_t)x->rank + k];
        }
    }
    gram_job job = {psoup__method_kernels_of(context), rows, total, length, gram};
    psoup__parallel(context, (total + 1) / 2, gram_rows, &job);
    psoup__free(context, rows);
    psoup__free(context, turned);
    return PSOUP_OK;
}

void psoup__gram_inner(const psoup__gram_module *module, const double *gram_a, const double *gram_b,
                          double *inner) {
    const size_t n = module->n, total = (size_t)module->total;
    size_t row = 0;
    for (size_t i = 0; i < n; row += (size_t)module->factors[i++].rank) {
        size_t column = 0;
        for (size_t j = 0; j < n; column += (size_t)module->factors[j++].rank) {
            double sum = 0;
            for (size_t a = row; a < row + (size_t)module->factors[i].rank; a++)
                for (size_t b = column; b < column + (size_t)module->factors[j].rank; b++)
                    sum += gram_b[a * total + b] * gram_a[a * total + b];
            inner[i * n + j] = sum * (double)module->factors[i].scale * (double)module->factors[j].scale;
        }
    }
}

double psoup__gram_cross(const psoup__gram_module *module, const double *gram_a, const double *gram_b,
                            const double *weights, double *scratch) {
    const size_t n = module->n, total = (size_t)module->total, rank = total / n;
    const double scale = (double)module->factors[0].scale;
    double *half = scratch, *whole = scratch + total * total; /* C G_A, then C G_A Cᵀ */
    memset(scratch, 0, 2 * total * total * sizeof *scratch);
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++) {
            const double c = scale * weights[i] * weights[j] - (i == j ? weights[i] * scale : 0);
            for (size_t k = 0; k < rank && c != 0; k++)
                for (size_t b = 0; b < total; b++)
                    half[(i * rank + k) * total + b] += c * gram_a[(j * rank + k) * total + b];
        }
    for (size_t a = 0; a < total; a++)
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < n; j++) {
                const double c = scale * weights[i] * weights[j] - (i == j ? weights[i] * scale : 0);
                for (size_t k = 0; k < rank; k++)
                    whole[a * total + i * rank + k] += c * half[a * total + j * rank + k];
            }
    double sum = 0;
    for (size_t i = 0; i < total * total; i++)
        sum += gram_b[i] * whole[i];
    return sum > 0 ? sum : 0;
}

/* rows[p, n] with rowsᵀ rows = x [n, n], which is symmetric and has no negative eigenvalue: Cholesky with
 * the largest pivot first, until what is left is rounding (Golub and Van Loan, section 4.2.8). Returns p;
 * x keeps only its diagonal's remainder. */
static size_t root_of(double *x, size_t n, double *rows) {
    double first = 0;
    size_t p = 0;
    for (size_t i = 0; i < n; i++)
        first = fmax(first, x[i * n + i]);
    for (; p < n; p++) {
        size_t best = 0;
        for (size_t i = 1; i < n; i++)
            best = x[i * n + i] > x[best * n + best] ? i : best;
        if (!(x[best * n + best] > first * (double)n * DBL_EPSILON))
            break;
        const double pivot = sqrt(x[best * n + best]);
        double *row = rows + p * n;
        for (size_t c = 0; c < n; c++)
            row[c] = x[best * n + c] / pivot;
        for (size_t i = 0; i < n; i++)
            for (size_t c = 0; c < n; c++)
                x[i * n + c] -= row[i] * row[c];
        for (size_t i = 0; i < n; i++)
            x[i * n + best] = x[best * n + i] = 0;
    }
    return p;
}

/* Symmetric x [n, n] to a tridiagonal matrix: diagonal d, below it e[1 …]. Householder (Golub and Van Loan,
 * algorithm 8.3.1). */
static void tridiagonal(double *x, size_t n, double *d, double *e) {
    for (size_t k = 0; k + 2 < n; k++) {
        double *v = e, square = 0, *p = d; /* free until they are written below */
        double largest = 0;
        for (size_t i = k + 1; i < n; i++)
            largest = fmax(largest, fabs(x[i * n + k]));
        if (largest == 0)
            continue;
        for (size_t i = k + 1; i < n; i++) {
            v[i] = x[i * n + k] / largest;
            square += v[i] * v[i];
        }
        const double length = v[k + 1] > 0 ? -sqrt(square) : sqrt(square);
        const double beta = 1 / (square - v[k + 1] * length);
        v[k + 1] -= length;
        double along = 0;
        for (size_t i = k + 1; i < n; i++) {
            double sum = 0;
            for (size_t c = k + 1; c < n; c++)
                sum += x[i * n + c] * v[c];
            p[i] = beta * sum;
            along += p[i] * v[i];
        }
        for (size_t i = k + 1; i < n; i++)
            p[i] -= beta * along / 2 * v[i];
        for (size_t i = k + 1; i < n; i++)
            for (size_t c = k + 1; c < n; c++)
                x[i * n + c] -= v[i] * p[c] + p[i] * v[c];
        x[(k + 1) * n + k] = x[k * n + k + 1] = length * largest;
    }
    for (size_t i = 0; i < n; i++) {
        d[i] = x[i * n + i];
        e[i] = i > 0 ? x[i * n + i - 1] : 0;
    }
}

/* Eigenvalues of the tridiagonal matrix into d: QR steps with Wilkinson's shift, implicit (Golub and Van Loan,
 * algorithms 8.3.2 and 8.3.3). */
static void eigenvalues(double *d, double *e, size_t n) {
    size_t end = n; /* the matrix still coupled ends before here */
    for (size_t steps = 0; end > 1 && steps < 60 * n; steps++) {
        size_t last = end - 1, first = last;
        while (first > 0 && fabs(e[first]) > DBL_EPSILON * (fabs(d[first]) + fabs(d[first - 1])))
            first--;
        if (first == last) {
            end--;
            continue;
        }
        double half = (d[last - 1] - d[last]) / 2, square = e[last] * e[last];
        double shift = d[last] - square / (half + (half < 0 ? -1 : 1) * hypot(half, e[last]));
        double x = d[first] - shift, z = e[first + 1];
        for (size_t k = first; k < last; k++) {
            double r = hypot(x, z), c = r > 0 ? x / r : 1, s = r > 0 ? z / r : 0;
            double p = d[k], q = d[k + 1], o = e[k + 1];
            if (k > first)
                e[k] = r;
            d[k] = c * c * p + 2 * c * s * o + s * s * q;
            d[k + 1] = s * s * p - 2 * c * s * o + c * c * q;
            e[k + 1] = c * s * (q - p) + (c * c - s * s) * o;
            x = e[k + 1];
            if (k + 1 < last) {
                z = s * e[k + 2];
                e[k + 2] *= c;
            }
        }
    }
}

void psoup__gram_spectrum(const psoup__gram_module *module, const double *gram_a, const double *gram_b,
                             const double *weights, double *squares, double *scratch) {
    const size_t total = (size_t)module->total, square = total * total;
    double *rows = scratch, *middle = scratch + square, *left = scratch + 2 * square;
    memcpy(middle, gram_b, square * sizeof *middle);
    const size_t p = root_of(middle, total, rows); /* G_B = rowsᵀ rows */
    size_t at = 0;
    for (size_t f = 0; f < module->n; f++) /* rows · diag(w s) */
        for (int32_t k = 0; k < module->factors[f].rank; k++, at++)
            for (size_t i = 0; i < p; i++)
                rows[i * total + at] *= weights[f] * (double)module->factors[f].scale;
    memset(left, 0, p * total * sizeof *left);
    for (size_t i = 0; i < p; i++)
        for (size_t k = 0; k < total; k++)
            for (size_t c = 0; c < total; c++)
                left[i * total + c] += rows[i * total + k] * gram_a[k * total + c];
    for (size_t i = 0; i < p; i++)
        for (size_t j = 0; j < p; j++) {
            double sum = 0;
            for (size_t c = 0; c < total; c++)
                sum += left[i * total + c] * rows[j * total + c];
            middle[i * p + j] = sum;
        }
    for (size_t i = 0; i < p; i++)
        for (size_t j = 0; j < i; j++)
            middle[i * p + j] = middle[j * p + i] = (middle[i * p + j] + middle[j * p + i]) / 2;
    memset(squares, 0, total * sizeof *squares);
    if (p > 0) {
        tridiagonal(middle, p, squares, left);
        eigenvalues(squares, left, p);
    }
    for (size_t i = 0; i < total; i++) { /* insertion; rounding below 0 is 0 */
        double value = squares[i] > 0 ? squares[i] : 0;
        size_t to = i;
        for (; to > 0 && squares[to - 1] < value; to--)
            squares[to] = squares[to - 1];
        squares[to] = value;
    }
}
