/* The best pair of factors for a dense merged ΔW, as the adapters' ties, dare and magnitude_prune
 * make it: a truncated SVD by randomised subspace iteration (Halko, Martinsson and Tropp 2011,
 * "Finding structure with randomness", algorithms 4.4 and 5.1). Products are in f32, orthogonal
 * bases in f64. */
#include "blend/dense.h"
#include "blend/blend.h"
#include "blend/method.h"

#include <math.h>
#include <string.h>

#define MORE 16     /* vectors beside those that stay */
#define PASSES 24   /* at most; */
#define ENOUGH 1e-5 /* less when the first `rank` vectors hold only so much more of ΔW's energy */
#define KEPT (64 << 20) /* bytes of ΔW that are kept between passes; else it is merged for each */
#define PANEL (4 << 20) /* bytes of rows that are merged at a time, where it is not kept */

typedef struct fit {
    const psoup__method_job *job;
    psoup_context *context;
    void *state;
    int64_t rows, columns, width; /* width: vectors of the subspace, */
    int64_t rank;                 /* of which these are kept */
    int64_t panel;                /* rows merged at a time */
    int64_t step;                 /* rows of one task */
    float *dense, *scratch;       /* [panel, columns]; [workers, step · per_element] */
    size_t per_element;
    bool merged;   /* dense holds all rows */
    double energy; /* Σ ΔW² */
} fit;

/* ---- ΔW, row panel by row panel -------------------------------------------------------------- */

typedef struct panel_job {
    const fit *f;
    int64_t first, rows;
} panel_job;

static void merge_rows(void *arg, size_t task, int worker) {
    const panel_job *p = arg;
    const fit *f = p->f;
    int64_t at = (int64_t)task * f->step, rows = p->rows - at < f->step ? p->rows - at : f->step;
    f->job->method->block(f->job, f->state, (size_t)((p->first + at) * f->columns),
                          (size_t)(rows * f->columns), f->dense + at * f->columns,
                          f->scratch + (size_t)(worker * f->step * f->columns) * f->per_element);
}

/* Rows first … of ΔW, read only. */
static const float *panel_of(fit *f, int64_t first, int64_t rows) {
    panel_job p = {f, first, rows};
    if (!f->merged)
        psoup__parallel(f->context, (size_t)((rows + f->step - 1) / f->step), merge_rows, &p);
    f->merged = f->panel == f->rows;
    return f->dense;
}

/* ---- products -------------------------------------------------------------------------------- */

/* y [rows, n] = x [rows, k] · b [k, n]. */
static void multiply(const fit *f, float *y, const float *x, const float *b, int64_t rows,
                     int64_t n, int64_t k) {
    const psoup__gemm_args args = {.m = rows,
                                   .n = n,
                                   .k = k,
                                   .c = y,
                                   .c_stride = n,
                                   .a = x,
                                   .a_row = k,
                                   .a_col = 1,
                                   .alpha = 1,
                                   .b = b,
                                   .b_dtype = PSOUP_F32,
                                   .b_row = n,
                                   .b_col = 1};
    psoup__gemm(f->context, &args);
}

/* z [n, k] += xᵀ y, x [rows, n], y [rows, k]. */
static void multiply_transposed(const fit *f, float *z, const float *x, const float *y,
                                int64_t rows, int64_t n, int64_t k) {
    const psoup__gemm_args args = {.m = n,
                                   .n = k,
                                   .k = rows,
                                   .c = z,
                                   .c_stride = k,
                                   .accumulate = true,
                                   .a = x,
                                   .a_row = 1,
                                   .a_col = n,
                                   .alpha = 1,
                                   .b = y,
                                   .b_dtype = PSOUP_F32,
                                   .b_row = k,
                                   .b_col = 1};
    psoup__gemm(f->context, &args);
}

static double energy_of(const float *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)x[i];
    return sum;
}

/* y [rows, width] = ΔW · v and, where z is given, z [columns, width] = ΔWᵀ y. */
static void through(fit *f, const float *v, float *y, float *z) {
    if (z != NULL)
        memset(z, 0, (size_t)(f->columns * f->width) * sizeof *z);
    for (int64_t first = 0; first < f->rows; first += f->panel) {
        int64_t rows = f->rows - first < f->panel ? f->rows - first : f->panel;
        const float *w = panel_of(f, first, rows);
        multiply(f, y + first * f->width, w, v, rows, f->width, f->columns);
        if (z != NULL)
            multiply_transposed(f, z, w, y + first * f->width, rows, f->columns, f->width);
    }
}

/* z [columns, width] = ΔWᵀ y, y [rows, width]. */
static void back(fit *f, const float *y, float *z) {
    memset(z, 0, (size_t)(f->columns * f->width) * sizeof *z);
    for (int64_t first = 0; first < f->rows; first += f->panel) {
        int64_t rows = f->rows - first < f->panel ? f->rows - first : f->panel;
        multiply_transposed(f, z, panel_of(f, first, rows), y + first * f->width, rows, f->columns,
                            f->width);
    }
}

static psoup_status sum_energy(fit *f, psoup_error *error) {
    for (int64_t first = 0; first < f->rows; first += f->panel) {
        int64_t rows = f->rows - first < f->panel ? f->rows - first : f->panel;
        const float *w = panel_of(f, first, rows);
        for (int64_t i = 0; i < rows; i++)
            f->energy += energy_of(w + i * f->columns, (size_t)f->columns);
    }
    if (isfinite(f->energy))
        return PSOUP_OK;
    return psoup__fail(error, PSOUP_ERROR_FORMAT,
                       "%.300s: the merged change holds a NaN or infinity", f->job->name);
}

/* ---- bases ----------------------------------------------------------------------------------- */

/* The QR of x [m, width]. */
static psoup_status factor(const fit *f, const float *x, int64_t m, psoup__qr **out,
                           psoup_error *error) {
    psoup_status status = psoup__qr_create(f->context, m, f->width, out, error);
    for (int64_t k = 0; k < f->width && status == PSOUP_OK; k++)
        psoup__qr_column(*out, k, x + k, f->width);
    if (status == PSOUP_OK)
        psoup__qr_run(*out);
    return status;
}

/* *sum = x's first `rank` singular values. */
static psoup_status sum_values(const fit *f, const psoup__qr *qr, double *sum, psoup_error *error) {
    const size_t w = (size_t)f->width;
    double *core = psoup__alloc(f->context, 2 * w + 1, w * sizeof *core, error);
    if (core == NULL)
        return PSOUP_ERROR_MEMORY;
    double *vt = core + w * w, *s = vt + w * w;
    memcpy(core, psoup__qr_r(qr), w * w * sizeof *core);
    psoup__svd(f->context, core, s, vt, f->width);
    *sum = 0;
    for (int64_t k = 0; k < f->rank && k < f->width; k++)
        *sum += s[k];
    psoup__free(f->context, core);
    return PSOUP_OK;
}

/* x [m, width] becomes an orthonormal basis of its columns' space; *sum, where it is not NULL, as
 * above. */
static psoup_status orthonormal(const fit *f, float *x, int64_t m, double *sum,
                                psoup_error *error) {
    psoup__qr *qr = NULL;
    const int64_t k = f->width;
    double *eye = psoup__alloc(f->context, (size_t)k, (size_t)k * sizeof *eye, error);
    double *q = psoup__alloc(f->context, (size_t)k, (size_t)m * sizeof *q, error);
    psoup_status status = eye != NULL && q != NULL ? PSOUP_OK : PSOUP_ERROR_MEMORY;
    for (int64_t i = 0; i < k && status == PSOUP_OK; i++)
        eye[i * k + i] = 1;
    if (status == PSOUP_OK)
        status = factor(f, x, m, &qr, error);
    if (status == PSOUP_OK)
        status = psoup__qr_apply(qr, eye, k, q, error);
    if (status == PSOUP_OK && sum != NULL)
        status = sum_values(f, qr, sum, error);
    for (int64_t i = 0; i < m && status == PSOUP_OK; i++)
        for (int64_t j = 0; j < k; j++)
            x[i * k + j] = (float)q[j * m + i];
    psoup__qr_free(qr);
    psoup__free(f->context, eye);
    psoup__free(f->context, q);
    return status;
}

/* out's element (i, k) at i · row + k · column = the first `rank` of Q x √s; x [width, width] holds
 * vectors in its columns, or its rows. */
static psoup_status take(const fit *f, const psoup__qr *qr, int64_t m, const double *x,
                         bool in_rows, const double *s, int64_t rank, float *out, int64_t row,
                         int64_t column, psoup_error *error) {
    const int64_t w = f->width, some = rank < w ? rank : w;
    double *c = psoup__alloc(f->context, (size_t)some, (size_t)w * sizeof *c, error);
    double *wide = psoup__alloc(f->context, (size_t)some, (size_t)m * sizeof *wide, error);
    psoup_status status = c != NULL && wide != NULL ? PSOUP_OK : PSOUP_ERROR_MEMORY;
    for (int64_t k = 0; k < some && status == PSOUP_OK; k++)
        for (int64_t p = 0; p < w; p++)
            c[k * w + p] = x[in_rows ? k * w + p : p * w + k] * sqrt(s[k]);
    if (status == PSOUP_OK)
        status = psoup__qr_apply(qr, c, some, wide, error);
    for (int64_t k = 0; k < rank && status == PSOUP_OK; k++)
        for (int64_t i = 0; i < m; i++)
            out[i * row + k * column] = k < some ? (float)wide[k * m + i] : 0;
    psoup__free(f->context, c);
    psoup__free(f->context, wide);
    return status;
}

/* ---- the fit --------------------------------------------------------------------------------- */

/* v [columns, width] spans, nearly, ΔW's first right singular vectors. */
static psoup_status find_space(fit *f, float *v, float *y, float *z, psoup_error *error) {
    psoup_status status;
    psoup__random random = {0, 0, 0};
    for (int64_t i = 0; i < f->columns * f->width; i++)
        v[i] = psoup__random_uniform(&random) - 0.5f;
    PSOUP__TRY(orthonormal(f, v, f->columns, NULL, error));
    double before = 0, now; /* the values of ΔWᵀΔW v are near the squares of ΔW's */
    for (int pass = 0; pass < PASSES; pass++) {
        through(f, v, y, z);
        memcpy(v, z, (size_t)(f->columns * f->width) * sizeof *v);
        PSOUP__TRY(orthonormal(f, v, f->columns, &now, error));
        if (now - before <= ENOUGH * f->energy)
            break;
        before = now;
    }
    return PSOUP_OK;
fail:
    return status;
}

/* Y = ΔW v = Q R, ΔWᵀ Q = P S, then U diag(s) Vᵀ of Sᵀ: ΔW ≈ (Q U) diag(s) (P V)ᵀ. */
static psoup_status take_factors(fit *f, float *v, float *y, float *z, int64_t rank, float *a,
                                 float *b, psoup_error *error) {
    psoup_status status;
    const int64_t w = f->width;
    psoup__qr *left = NULL, *right = NULL;
    double *core = NULL, *vt = NULL, *s = NULL;
    through(f, v, y, NULL);
    PSOUP__TRY(orthonormal(f, y, f->rows, NULL, error));
    back(f, y, z);
    PSOUP__TRY(factor(f, y, f->rows, &left, error));
    PSOUP__TRY(factor(f, z, f->columns, &right, error));
    status = PSOUP_ERROR_MEMORY;
    if ((core = psoup__alloc(f->context, (size_t)w, (size_t)w * sizeof *core, error)) == NULL ||
        (vt = psoup__alloc(f->context, (size_t)w, (size_t)w * sizeof *vt, error)) == NULL ||
        (s = psoup__alloc(f->context, (size_t)w, sizeof *s, error)) == NULL)
        goto fail;
    /* y is orthonormal but for its rounding to f32: y = Q R, so that core = R Sᵀ. */
    const double *r = psoup__qr_r(left), *t = psoup__qr_r(right);
    for (int64_t i = 0; i < w; i++)
        for (int64_t j = 0; j < w; j++)
            for (int64_t p = 0; p < w; p++)
                core[i * w + j] += r[i * w + p] * t[j * w + p];
    psoup__svd(f->context, core, s, vt, w);
    PSOUP__TRY(take(f, left, f->rows, core, false, s, rank, b, rank, 1, error));
    PSOUP__TRY(take(f, right, f->columns, vt, true, s, rank, a, 1, f->columns, error));
fail:
    psoup__qr_free(left);
    psoup__qr_free(right);
    psoup__free(f->context, core);
    psoup__free(f->context, vt);
    psoup__free(f->context, s);
    return status;
}

/* ‖ΔW − b a‖ / ‖ΔW‖ of the factors as they are, rounded to f32. */
static psoup_status measure(fit *f, const float *a, const float *b, int64_t rank, double *out,
                            psoup_error *error) {
    double lost = 0;
    float *row = psoup__alloc(f->context, (size_t)f->step, (size_t)f->columns * sizeof *row, error);
    if (row == NULL)
        return PSOUP_ERROR_MEMORY;
    for (int64_t first = 0; first < f->rows; first += f->panel) {
        int64_t rows = f->rows - first < f->panel ? f->rows - first : f->panel;
        const float *w = panel_of(f, first, rows);
        for (int64_t at = 0; at < rows; at += f->step) {
            int64_t some = rows - at < f->step ? rows - at : f->step;
            memcpy(row, w + at * f->columns, (size_t)(some * f->columns) * sizeof *row);
            const psoup__gemm_args args = {.m = some,
                                           .n = f->columns,
                                           .k = rank,
                                           .c = row,
                                           .c_stride = f->columns,
                                           .accumulate = true,
                                           .a = b + (first + at) * rank,
                                           .a_row = rank,
                                           .a_col = 1,
                                           .alpha = -1,
                                           .b = a,
                                           .b_dtype = PSOUP_F32,
                                           .b_row = f->columns,
                                           .b_col = 1};
            psoup__gemm(f->context, &args);
            for (int64_t i = 0; i < some; i++)
                lost += energy_of(row + i * f->columns, (size_t)f->columns);
        }
    }
    *out = f->energy > 0 ? sqrt(lost / f->energy) : 0;
    psoup__free(f->context, row);
    return PSOUP_OK;
}

psoup_status psoup__merge_dense_svd(const psoup__method_job *job, int32_t rank, float *a, float *b,
                                    double *relative_error, psoup_error *error) {
    return psoup__merge_dense_fit(job, rank, KEPT, a, b, relative_error, error);
}

psoup_status psoup__merge_dense_fit(const psoup__method_job *job, int32_t rank, int64_t kept,
                                    float *a, float *b, double *relative_error,
                                    psoup_error *error) {
    psoup_status status;
    fit f = {.job = job,
             .context = job->context,
             .rows = job->rows,
             .columns = job->columns,
             .rank = rank};
    float *v = NULL, *y = NULL, *z = NULL;
    if (f.rows < 1 || f.columns < 1 || rank < 1 || (size_t)f.rows > job->n ||
        job->n % (size_t)f.rows != 0 || job->n / (size_t)f.rows != (size_t)f.columns)
        return psoup__fail(
            error, PSOUP_ERROR_ARGUMENT,
            "%.300s: a fit of rank %d to %lld × %lld of %zu elements; expected a matrix", job->name,
            (int)rank, (long long)f.rows, (long long)f.columns, job->n);
    memset(a, 0, (size_t)rank * (size_t)f.columns * sizeof *a);
    memset(b, 0, (size_t)rank * (size_t)f.rows * sizeof *b);
    *relative_error = 0;
    PSOUP__TRY(job->method->prepare(job, &f.state, error));
    const int64_t row_bytes = f.columns * (int64_t)sizeof(float);
    f.width = rank + MORE;
    f.width = f.width < f.rows ? f.width : f.rows;
    f.width = f.width < f.columns ? f.width : f.columns;
    f.panel = row_bytes <= kept / f.rows ? f.rows : (kept < PANEL ? kept : PANEL) / row_bytes;
    f.panel = f.panel < 1 ? 1 : f.panel;
    f.step = (1 << 16) / f.columns < 1 ? 1 : (1 << 16) / f.columns;
    f.per_element = psoup__method_scratch(job);
    status = PSOUP_ERROR_MEMORY;
    size_t workers = (size_t)psoup_context_threads(f.context);
    size_t space = (size_t)(f.step * f.columns) * f.per_element;
    if ((f.dense = psoup__alloc(f.context, (size_t)f.panel, (size_t)row_bytes, error)) == NULL ||
        (f.scratch = psoup__alloc(f.context, workers, space * sizeof *f.scratch, error)) == NULL ||
        (v = psoup__alloc(f.context, (size_t)f.columns, (size_t)f.width * sizeof *v, error)) ==
            NULL ||
        (z = psoup__alloc(f.context, (size_t)f.columns, (size_t)f.width * sizeof *z, error)) ==
            NULL ||
        (y = psoup__alloc(f.context, (size_t)f.rows, (size_t)f.width * sizeof *y, error)) == NULL)
        goto fail;
    PSOUP__TRY(sum_energy(&f, error));
    if (f.energy > 0) {
        PSOUP__TRY(find_space(&f, v, y, z, error));
        PSOUP__TRY(take_factors(&f, v, y, z, rank, a, b, error));
        PSOUP__TRY(measure(&f, a, b, rank, relative_error, error));
    }
    status = PSOUP_OK;
fail:
    psoup__free(f.context, f.state);
    psoup__free(f.context, f.dense);
    psoup__free(f.context, f.scratch);
    psoup__free(f.context, v);
    psoup__free(f.context, y);
    psoup__free(f.context, z);
    return status;
}
