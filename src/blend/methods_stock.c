/* Model Stock (Jang et al. 2024, arXiv 2403.19522): between the base and the mean of N models
 * fine-tuned from it, at t = N cos θ / (1 + (N − 1) cos θ), θ being the angle between two of them
 * as seen from the base. Where there are more than two the cosines of all pairs are averaged, as in
 * mergekit's model_stock.py. */
#include "blend/methods.h"

#include <math.h>
#include <string.h>

/* dots [N (N + 1) / 2]: of vectors i ≤ j, row by row. */
static size_t dots_of(size_t n) {
    return n * (n + 1) / 2;
}

static void add_dots(const psoup__method_job *job, size_t at, size_t n, float *scratch,
                     double *dots) {
    const psoup__method_kernels *kernels = psoup__method_kernels_of(job->context);
    const float *base = NULL;
    float *deltas = scratch + n;
    if (job->base != NULL)
        base = psoup__method_view(job, job->base, at, n, scratch);
    for (size_t i = 0; i < job->count; i++)
        psoup__method_delta(job, i, at, n, base, deltas + i * n);
    for (size_t i = 0, d = 0; i < job->count; i++)
        for (size_t j = i; j < job->count; j++)
            dots[d++] += kernels->dot(deltas + i * n, deltas + j * n, n);
}

/* t / N, so that the result is base + that · Σ (x_i − base). Task vectors that add up to nothing
 * have no t: the base. NaN where a dot product is not finite. */
static double stock_factor(size_t n, const double *dots) {
    double sum = 0;
    size_t pairs = 0;
    for (size_t i = 0; i < dots_of(n); i++)
        if (!isfinite(dots[i]))
            return NAN;
    for (size_t i = 0, row = 0; i < n; row += n - i++) /* dots[row] is of i with itself */
        for (size_t j = i + 1; j < n; j++, pairs++) {
            size_t other = dots_of(n) - dots_of(n - j);
            double product = sqrt(dots[row]) * sqrt(dots[other]);
            sum += fmax(-1, fmin(1, dots[row + j - i] / fmax(product, 1e-6)));
        }
    double cosine = sum / (double)pairs, below = 1 + (double)(n - 1) * cosine;
    return below > 1e-9 ? cosine / below : 0;
}

static void whole_dots(const psoup__method_job *job, void *arg, size_t at, size_t n, int worker,
                       float *scratch, double *partial) {
    add_dots(job, at, n, scratch, partial);
}

typedef struct stock {
    bool by_row;
    float factor[]; /* [rows], or one */
} stock;

typedef struct stock_rows {
    stock *stock;
    double *dots; /* [workers, dots_of(count)] */
} stock_rows;

static void row_dots(const psoup__method_job *job, void *arg, size_t row, int worker,
                     float *scratch) {
    const stock_rows *s = arg;
    size_t columns = (size_t)job->columns, chunk = psoup__method_chunk(job, columns);
    double *dots = s->dots + (size_t)worker * dots_of(job->count);
    memset(dots, 0, dots_of(job->count) * sizeof *dots);
    for (size_t done = 0; done < columns; done += chunk) {
        size_t n = columns - done < chunk ? columns - done : chunk;
        add_dots(job, row * columns + done, n, scratch, dots);
    }
    s->stock->factor[row] = (float)stock_factor(job->count, dots);
}

psoup_status psoup__stock_prepare(const psoup__method_job *job, void **state, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    bool by_row = job->filter_wise && (size_t)job->columns != job->n;
    size_t rows = by_row ? job->n / (size_t)job->columns : 1, dots = dots_of(job->count);
    *state = NULL;
    if (job->count < 2)
        return psoup__fail(
            error, PSOUP_ERROR_ARGUMENT,
            "%.300s: model_stock of %zu inputs; expected at least two beside the base", job->name,
            job->count);
    stock *s = psoup__alloc(job->context, 1, sizeof *s + rows * sizeof *s->factor, error);
    stock_rows by = {.stock = s};
    by.dots = psoup__alloc(job->context, (size_t)psoup_context_threads(job->context),
                           dots * sizeof *by.dots, error);
    if (s == NULL || by.dots == NULL)
        goto fail;
    s->by_row = by_row;
    if (by_row) {
        PSOUP__TRY(psoup__method_walk_rows(job, job->count + 1, row_dots, &by, error));
    } else {
        PSOUP__TRY(psoup__method_walk(job, job->count + 1, whole_dots, NULL, dots, by.dots, error));
        s->factor[0] = (float)stock_factor(job->count, by.dots);
    }
    for (size_t i = 0; i < rows; i++)
        if (isnan(s->factor[i]))
            PSOUP__TRY(psoup__method_not_finite(job, 0, error));
    psoup__free(job->context, by.dots);
    *state = s;
    return PSOUP_OK;
fail:
    psoup__free(job->context, by.dots);
    psoup__free(job->context, s);
    return status;
}

void psoup__stock_block(const psoup__method_job *job, const void *state, size_t at, size_t n,
                        float *out, float *scratch) {
    const psoup__method_kernels *kernels = psoup__method_kernels_of(job->context);
    const stock *s = state;
    size_t chunk = psoup__method_chunk(job, n);
    float *delta = scratch + chunk;
    for (size_t done = 0; done < n; done += chunk) {
        size_t m = n - done < chunk ? n - done : chunk,
               width = s->by_row ? (size_t)job->columns : m;
        const float *base = NULL;
        if (job->base != NULL)
            base = psoup__method_view(job, job->base, at + done, m, scratch);
        for (size_t i = 0; i < job->count; i++) {
            psoup__method_delta(job, i, at + done, m, base, delta);
            kernels->add(out + done, delta, 1, m, i == 0);
        }
        for (size_t e = 0, some; e < m; e += some) { /* row by row */
            size_t row = s->by_row ? (at + done + e) / width : 0;
            some = s->by_row ? width - (at + done + e) % width : m;
            some = m - e < some ? m - e : some;
            float *o = out + done + e;
            kernels->finish(o, base != NULL ? base + e : NULL, o, s->factor[row], some);
        }
    }
}
