/* Methods that turn one tensor into another: slerp and nuslerp. Norms and angles are in f64. */
#include "blend/methods.h"

#include <math.h>
#include <string.h>

enum { FROM_FROM, TO_TO, FROM_TO, PAIR_SUMS };

typedef struct pair {
    double from, to; /* what the two are multiplied by */
} pair;

/* out = w.from · x + w.to · y; one of weight 0 is not touched. */
static void mix_pair(const psoup__method_kernels *kernels, float *out, const float *x,
                     const float *y, pair w, size_t n) {
    if (w.to == 0)
        kernels->finish(out, NULL, x, (float)w.from, n);
    else if (w.from == 0)
        kernels->finish(out, NULL, y, (float)w.to, n);
    else
        kernels->mix(out, x, y, (float)w.from, (float)w.to, n);
}

/* ---- slerp ----------------------------------------------------------------------------------- */

/* Shoemake 1985, "Animating rotation with quaternion curves"; as in mergekit's slerp.py. */

typedef struct ends {
    const psoup__merge_input *from, *to;
} ends;

static ends slerp_ends(const psoup__method_job *job) {
    if (job->base != NULL)
        return (ends){job->base, &job->inputs[0]};
    return (ends){&job->inputs[0], &job->inputs[job->count > 1 ? 1 : 0]};
}

static void slerp_sums(const psoup__method_job *job, void *arg, size_t at, size_t n, int worker,
                       float *scratch, double *partial) {
    const psoup__method_kernels *kernels = psoup__method_kernels_of(job->context);
    const ends e = slerp_ends(job);
    const float *x = psoup__method_view(job, e.from, at, n, scratch);
    const float *y = psoup__method_view(job, e.to, at, n, scratch + n);
    partial[FROM_FROM] += kernels->dot(x, x, n);
    partial[TO_TO] += kernels->dot(y, y, n);
    partial[FROM_TO] += kernels->dot(x, y, n);
}

/* Straight where the two are nearly parallel or opposed (|cos| > 0.9995). A vector of zeros counts
 * as at a right angle to any other. Both are mergekit's choices. */
static pair slerp_weights(double t, const double sums[PAIR_SUMS]) {
    double from = sqrt(sums[FROM_FROM]), to = sqrt(sums[TO_TO]), dot = sums[FROM_TO];
    dot = from > 1e-8 ? dot / from : dot;
    dot = to > 1e-8 ? dot / to : dot;
    if (fabs(dot) > 0.9995)
        return (pair){1 - t, t};
    double theta = acos(dot);
    return (pair){sin(theta - theta * t) / sin(theta), sin(theta * t) / sin(theta)};
}

psoup_status psoup__slerp_prepare(const psoup__method_job *job, void **state, psoup_error *error) {
    double sums[PAIR_SUMS];
    *state = NULL;
    if (job->count + (job->base != NULL) != 2)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%.300s: slerp of %zu inputs %s a base; expected two, the base counted",
                           job->name, job->count, job->base != NULL ? "and" : "without");
    if (!isfinite(job->t))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%.300s: t is %g; expected 0 to 1",
                           job->name, job->t);
    pair *p = psoup__alloc(job->context, 1, sizeof *p, error);
    if (p == NULL)
        return PSOUP_ERROR_MEMORY;
    psoup_status status = PSOUP_OK;
    *p = (pair){1 - job->t, job->t};
    if (job->t != 0 && job->t != 1) { /* else one of them is all there is */
        PSOUP__TRY(psoup__method_walk(job, 2, slerp_sums, NULL, PAIR_SUMS, sums, error));
        for (int i = 0; i < PAIR_SUMS; i++)
            if (!isfinite(sums[i]))
                PSOUP__TRY(psoup__method_not_finite(job, job->count - 1, error));
        *p = slerp_weights(job->t, sums);
    }
    *state = p;
    return PSOUP_OK;
fail:
    psoup__free(job->context, p);
    return status;
}

void psoup__slerp_block(const psoup__method_job *job, const void *state, size_t at, size_t n,
                        float *out, float *scratch) {
    const psoup__method_kernels *kernels = psoup__method_kernels_of(job->context);
    const ends e = slerp_ends(job);
    size_t chunk = psoup__method_chunk(job, n);
    for (size_t done = 0; done < n; done += chunk) {
        size_t m = n - done < chunk ? n - done : chunk;
        const float *x = psoup__method_view(job, e.from, at + done, m, scratch);
        const float *y = psoup__method_view(job, e.to, at + done, m, scratch + chunk);
        mix_pair(kernels, out + done, x, y, *(const pair *)state, m);
    }
}

/* ---- nuslerp: as in mergekit's nuslerp.py ---------------------------------------------------- */

/* The tensor is one vector, or each row is, or the elements that differ in the first dimension
 * only. */
typedef enum division { WHOLE, ROWS, COLUMNS } division;

typedef struct nuslerp {
    division division;
    size_t width;     /* COLUMNS: how many vectors, side by side */
    float *from, *to; /* of each vector; behind this struct */
} nuslerp;

static division nuslerp_division(const psoup__method_job *job) {
    if (job->flatten || job->n == 0 || (size_t)(job->row_wise ? job->rows : job->columns) == job->n)
        return WHOLE;
    return job->row_wise ? COLUMNS : ROWS;
}

static double nuslerp_t(const psoup__method_job *job) {
    double from = psoup__method_weight(job, 0), to = psoup__method_weight(job, 1);
    return fabs(from + to) < 1e-6 ? 0.5 : to / (from + to);
}

/* The two task vectors, or the two tensors where there is no base. */
static void read_pair(const psoup__method_job *job, size_t at, size_t n, const float **x,
                      const float **y, const float **base, float *scratch /* [3 · n] */) {
    *base = NULL;
    if (job->base == NULL) {
        *x = psoup__method_view(job, &job->inputs[0], at, n, scratch);
        *y = psoup__method_view(job, &job->inputs[1], at, n, scratch + n);
        return;
    }
    *base = psoup__method_view(job, job->base, at, n, scratch);
    psoup__method_delta(job, 0, at, n, *base, scratch + n);
    psoup__method_delta(job, 1, at, n, *base, scratch + 2 * n);
    *x = scratch + n;
    *y = scratch + 2 * n;
}

/* Straight where they are parallel or opposed. mergekit draws the line at 1e-8, which the rounding
 * of an angle of π does not meet: it divides by what is left. */
static pair nuslerp_weights(double t, const double sums[PAIR_SUMS]) {
    double from = fmax(sqrt(sums[FROM_FROM]), 1e-7), to = fmax(sqrt(sums[TO_TO]), 1e-7);
    double theta = acos(fmin(1, fmax(-1, sums[FROM_TO] / from / to)));
    if (fabs(sin(theta)) < 1e-6)
        return (pair){1 - t, t};
    return (pair){sin((1 - t) * theta) / sin(theta), sin(t * theta) / sin(theta)};
}

static void whole_sums(const psoup__method_job *job, void *arg, size_t at, size_t n, int worker,
                       float *scratch, double *partial) {
    const psoup__method_kernels *kernels = psoup__method_kernels_of(job->context);
    const float *x, *y, *base;
    read_pair(job, at, n, &x, &y, &base, scratch);
    partial[FROM_FROM] += kernels->dot(x, x, n);
    partial[TO_TO] += kernels->dot(y, y, n);
    partial[FROM_TO] += kernels->dot(x, y, n);
}

static void set_pair(nuslerp *s, size_t vector, double t, const double sums[PAIR_SUMS]) {
    pair p = nuslerp_weights(t, sums);
    bool finite = isfinite(sums[FROM_FROM]) && isfinite(sums[TO_TO]) && isfinite(sums[FROM_TO]);
    s->from[vector] = finite ? (float)p.from : NAN; /* found, and refused, when all are known */
    s->to[vector] = (float)p.to;
}

static void row_sums(const psoup__method_job *job, void *arg, size_t row, int worker,
                     float *scratch) {
    double sums[PAIR_SUMS] = {0};
    size_t columns = (size_t)job->columns, chunk = psoup__method_chunk(job, columns);
    for (size_t done = 0; done < columns; done += chunk) {
        size_t n = columns - done < chunk ? columns - done : chunk;
        whole_sums(job, NULL, row * columns + done, n, worker, scratch, sums);
    }
    set_pair(arg, row, nuslerp_t(job), sums);
}

/* The first dimension is divided into a fixed number of parts, whose sums are added in order. */
#define PARTS 8

typedef struct column_sums {
    const psoup__method_job *job;
    size_t width, chunk;
    double *sums;   /* [PARTS, PAIR_SUMS, width] */
    float *scratch; /* [PARTS, 3 · chunk] */
} column_sums;

static void column_task(void *arg, size_t task, int worker) {
    const column_sums *c = arg;
    const psoup__method_kernels *kernels = psoup__method_kernels_of(c->job->context);
    size_t rows = (size_t)c->job->rows, width = c->width;
    double *sums = c->sums + task * PAIR_SUMS * width;
    const float *x, *y, *base;
    for (size_t row = rows * task / PARTS; row < rows * (task + 1) / PARTS; row++)
        for (size_t done = 0; done < width; done += c->chunk) {
            size_t n = width - done < c->chunk ? width - done : c->chunk;
            read_pair(c->job, row * width + done, n, &x, &y, &base,
                      c->scratch + task * 3 * c->chunk);
            kernels->dot_each(sums + done, sums + width + done, sums + 2 * width + done, x, y, n);
        }
}

static psoup_status sum_columns(const psoup__method_job *job, nuslerp *s, psoup_error *error) {
    column_sums c = {.job = job, .width = s->width, .chunk = psoup__method_chunk(job, s->width)};
    c.sums = psoup__alloc(job->context, PARTS * PAIR_SUMS * sizeof *c.sums, s->width, error);
    c.scratch = psoup__alloc(job->context, PARTS * 3 * sizeof *c.scratch, c.chunk, error);
    psoup_status status = c.sums != NULL && c.scratch != NULL ? PSOUP_OK : PSOUP_ERROR_MEMORY;
    if (status == PSOUP_OK)
        psoup__parallel(job->context, PARTS, column_task, &c);
    for (size_t j = 0; j < s->width && status == PSOUP_OK; j++) {
        double sums[PAIR_SUMS] = {0};
        for (size_t part = 0; part < PARTS; part++)
            for (size_t i = 0; i < PAIR_SUMS; i++)
                sums[i] += c.sums[(part * PAIR_SUMS + i) * s->width + j];
        set_pair(s, j, nuslerp_t(job), sums);
    }
    psoup__free(job->context, c.sums);
    psoup__free(job->context, c.scratch);
    return status;
}

psoup_status psoup__nuslerp_prepare(const psoup__method_job *job, void **state,
                                    psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const division by = nuslerp_division(job);
    const double t = nuslerp_t(job);
    double sums[PAIR_SUMS];
    size_t vectors = 1, bytes;
    if (by != WHOLE)
        vectors = job->n / (size_t)(by == ROWS ? job->columns : job->rows);
    *state = NULL;
    if (!psoup__multiply(vectors, 2 * sizeof(float), &bytes) ||
        !psoup__add(bytes, sizeof(nuslerp), &bytes))
        return psoup__out_of_memory(error, SIZE_MAX);
    nuslerp *s = psoup__alloc(job->context, 1, bytes, error);
    if (s == NULL)
        return PSOUP_ERROR_MEMORY;
    *s = (nuslerp){.division = by, .width = vectors, .from = (float *)(void *)(s + 1)};
    s->to = s->from + vectors;
    if (t == 0 || t == 1) { /* one of them is all there is */
        s->division = WHOLE;
        s->from[0] = (float)(1 - t);
        s->to[0] = (float)t;
    } else if (by == WHOLE) {
        PSOUP__TRY(psoup__method_walk(job, 3, whole_sums, NULL, PAIR_SUMS, sums, error));
        set_pair(s, 0, t, sums);
    } else if (by == ROWS) {
        PSOUP__TRY(psoup__method_walk_rows(job, 3, row_sums, s, error));
    } else {
        PSOUP__TRY(sum_columns(job, s, error));
    }
    for (size_t i = 0; i < vectors; i++)
        if (isnan(s->from[i]))
            PSOUP__TRY(psoup__method_not_finite(job, 1, error));
    *state = s;
    return PSOUP_OK;
fail:
    psoup__free(job->context, s);
    return status;
}

/* Elements at … of all rows or columns that they touch. */
static void nuslerp_pieces(const psoup__method_job *job, const nuslerp *s, size_t at, size_t n,
                           float *out, const float *x, const float *y) {
    const psoup__method_kernels *kernels = psoup__method_kernels_of(job->context);
    const size_t width = s->division == ROWS ? (size_t)job->columns : s->width;
    for (size_t done = 0, m; done < n; done += m) {
        size_t row = (at + done) / width, column = (at + done) % width;
        m = n - done < width - column ? n - done : width - column;
        if (s->division == ROWS)
            kernels->mix(out + done, x + done, y + done, s->from[row], s->to[row], m);
        else
            kernels->mix_each(out + done, x + done, y + done, s->from + column, s->to + column, m);
    }
}

void psoup__nuslerp_block(const psoup__method_job *job, const void *state, size_t at, size_t n,
                          float *out, float *scratch) {
    const psoup__method_kernels *kernels = psoup__method_kernels_of(job->context);
    const nuslerp *s = state;
    size_t chunk = psoup__method_chunk(job, n);
    for (size_t done = 0; done < n; done += chunk) {
        size_t m = n - done < chunk ? n - done : chunk;
        const float *x, *y, *base;
        read_pair(job, at + done, m, &x, &y, &base, scratch);
        if (s->division == WHOLE)
            mix_pair(kernels, out + done, x, y, (pair){(double)s->from[0], (double)s->to[0]}, m);
        else
            nuslerp_pieces(job, s, at + done, m, out + done, x, y);
        if (base != NULL)
            kernels->finish(out + done, base, out + done, 1, m);
    }
}
