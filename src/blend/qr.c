/* Householder QR of tall matrices by blocks of rows: each block has its own QR, the R of all blocks
 * one below the other are the next, smaller, matrix (Demmel et al. 2012, "Communication-optimal
 * parallel and sequential QR", section 3). As stable as the plain one; blocks run in parallel and
 * stay in a cache. */
#include "blend/dense.h"

#include <math.h>
#include <string.h>

#define LEVELS 24

/* Blocks lie one after the other, each with its columns contiguous. Below the diagonal are the
 * reflections' vectors with 1 at their head, above it R without its diagonal. */
typedef struct level {
    int64_t m, rows, blocks; /* rows of a block, at least n; the last block has the rest as well */
    double *x;               /* [m, n] */
    double *tau, *diagonal;  /* [blocks, n] */
} level;

struct psoup__qr {
    psoup_context *context;
    const psoup__dense_kernels *kernels;
    int64_t n;
    int levels;
    level level[LEVELS];
    double *r; /* [n, n] */
};

static int64_t rows_of(const level *l, int64_t block) {
    return block == l->blocks - 1 ? l->m - block * l->rows : l->rows;
}

static double *block_of(const psoup__qr *qr, const level *l, int64_t block) {
    return l->x + block * l->rows * qr->n;
}

psoup_status psoup__qr_create(psoup_context *context, int64_t m, int64_t n, psoup__qr **out,
                              psoup_error *error) {
    *out = NULL;
    psoup__qr *qr = psoup__alloc(context, 1, sizeof *qr, error);
    if (qr == NULL)
        return PSOUP_ERROR_MEMORY;
    qr->context = context;
    qr->kernels = psoup__dense_kernels_of(context);
    qr->n = n;
    const int64_t rows = 4 * n > 256 ? 4 * n : 256;
    bool ok = (qr->r = psoup__alloc(context, (size_t)n, (size_t)n * sizeof *qr->r, error)) != NULL;
    for (bool last = false; ok && !last; m = qr->level[qr->levels++].blocks * n) {
        level *l = &qr->level[qr->levels];
        *l = (level){.m = m, .rows = rows, .blocks = m / rows > 1 ? m / rows : 1};
        last = l->blocks == 1;
        ok = (l->x = psoup__alloc(context, (size_t)m, (size_t)n * sizeof *l->x, error)) != NULL &&
             (l->tau = psoup__alloc(context, (size_t)(l->blocks * n), 2 * sizeof *l->tau, error)) !=
                 NULL;
        l->diagonal = ok ? l->tau + l->blocks * n : NULL;
    }
    if (ok) {
        *out = qr;
        return PSOUP_OK;
    }
    psoup__qr_free(qr);
    return PSOUP_ERROR_MEMORY;
}

void psoup__qr_free(psoup__qr *qr) {
    if (qr == NULL)
        return;
    for (int i = 0; i < LEVELS; i++) {
        psoup__free(qr->context, qr->level[i].x);
        psoup__free(qr->context, qr->level[i].tau);
    }
    psoup__free(qr->context, qr->r);
    psoup__free(qr->context, qr);
}

void psoup__qr_column(psoup__qr *qr, int64_t k, const float *x, int64_t stride) {
    const level *l = &qr->level[0];
    for (int64_t b = 0; b < l->blocks; b++) {
        const int64_t rows = rows_of(l, b);
        double *column = block_of(qr, l, b) + k * rows;
        for (int64_t i = 0; i < rows; i++)
            column[i] = (double)x[(b * l->rows + i) * stride];
    }
}

/* √Σ x², where squares would overflow or vanish too. */
static double norm_of(const psoup__dense_kernels *kernels, const double *x, int64_t n) {
    double square = kernels->dot(x, x, (size_t)n), scale = 0, sum = 0;
    if (square > 1e-280 && square < 1e280)
        return sqrt(square);
    for (int64_t i = 0; i < n; i++)
        scale = fmax(scale, fabs(x[i]));
    for (int64_t i = 0; i < n && scale > 0; i++)
        sum += x[i] / scale * (x[i] / scale);
    return scale * sqrt(sum);
}

typedef struct step {
    const psoup__qr *qr;
    const level *level;
    /* Of applying: */
    const double *from; /* [columns, n · blocks]: what the next level gave; NULL at the last */
    const double *c;
    double *to; /* [columns, m] */
    int64_t columns;
    double *scratch; /* [blocks, columns, rows of the largest] */
} step;

/* Golub and Van Loan, Matrix Computations, algorithms 5.1.1 and 5.2.1. Where the vector below the
 * head is all zero nothing is reflected. */
static void factor_block(void *arg, size_t task, int worker) {
    const step *s = arg;
    const psoup__qr *qr = s->qr;
    const int64_t n = qr->n, m = rows_of(s->level, (int64_t)task);
    double *x = block_of(qr, s->level, (int64_t)task);
    double *tau = s->level->tau + (int64_t)task * n,
           *diagonal = s->level->diagonal + (int64_t)task * n;
    for (int64_t j = 0; j < n; j++) {
        double *v = x + j * m + j, top = v[0], below = norm_of(qr->kernels, v + 1, m - j - 1);
        diagonal[j] = top;
        tau[j] = 0;
        v[0] = 1;
        if (below > 0) {
            double norm = hypot(top, below), beta = top > 0 ? -norm : norm;
            tau[j] = (beta - top) / beta;
            diagonal[j] = beta;
            for (int64_t i = 1; i < m - j; i++)
                v[i] /= top - beta;
            qr->kernels->reflect(v + m, (size_t)m, (size_t)(n - j - 1), v, tau[j], (size_t)(m - j));
        }
    }
}

void psoup__qr_run(psoup__qr *qr) {
    const int64_t n = qr->n;
    for (int at = 0; at < qr->levels; at++) {
        const level *l = &qr->level[at];
        step s = {.qr = qr, .level = l};
        psoup__parallel(qr->context, (size_t)l->blocks, factor_block, &s);
        for (int64_t b = 0; b < l->blocks; b++) {
            const double *x = block_of(qr, l, b);
            const int64_t rows = rows_of(l, b);
            for (int64_t j = 0; j < n; j++)
                for (int64_t i = 0; i < n; i++) {
                    double value = i < j ? x[j * rows + i] : i == j ? l->diagonal[b * n + j] : 0;
                    if (l->blocks == 1) {
                        qr->r[i * n + j] = value;
                        continue;
                    }
                    const level *next = l + 1;
                    int64_t row = b * n + i, block = row / next->rows;
                    block = block < next->blocks ? block : next->blocks - 1;
                    block_of(qr, next, block)[j * rows_of(next, block) + row - block * next->rows] =
                        value;
                }
        }
    }
}

const double *psoup__qr_r(const psoup__qr *qr) {
    return qr->r;
}

/* Q of one block times the n rows above it: the reflections, last to first. */
static void apply_block(void *arg, size_t task, int worker) {
    const step *s = arg;
    const psoup__qr *qr = s->qr;
    const level *l = s->level;
    const int64_t n = qr->n, block = (int64_t)task, m = rows_of(l, block);
    const double *x = block_of(qr, l, block), *tau = l->tau + block * n;
    double *y = s->scratch + block * l->rows * s->columns; /* [columns, m] */
    for (int64_t k = 0; k < s->columns; k++) {
        const double *from =
            s->from != NULL ? s->from + k * n * l->blocks + block * n : s->c + k * n;
        memcpy(y + k * m, from, (size_t)n * sizeof *y);
        memset(y + k * m + n, 0, (size_t)(m - n) * sizeof *y);
    }
    for (int64_t j = n - 1; j >= 0; j--)
        if (tau[j] != 0)
            qr->kernels->reflect(y + j, (size_t)m, (size_t)s->columns, x + j * m + j, tau[j],
                                 (size_t)(m - j));
    for (int64_t k = 0; k < s->columns; k++)
        memcpy(s->to + k * l->m + block * l->rows, y + k * m, (size_t)m * sizeof *y);
}

psoup_status psoup__qr_apply(const psoup__qr *qr, const double *c, int64_t columns, double *out,
                             psoup_error *error) {
    const size_t most = (size_t)qr->level[0].m;
    double *scratch = psoup__alloc(qr->context, most, (size_t)columns * sizeof *scratch, error);
    double *turns[2] = {NULL, NULL}; /* two levels' rows, the largest but the first */
    size_t smaller = qr->levels > 1 ? (size_t)qr->level[1].m : 0;
    if (scratch == NULL)
        return PSOUP_ERROR_MEMORY;
    psoup_status status = PSOUP_ERROR_MEMORY;
    for (int i = 0; i < 2; i++) {
        turns[i] = psoup__alloc(qr->context, smaller, (size_t)columns * sizeof *turns[i], error);
        if (turns[i] == NULL)
            goto fail;
    }
    const double *from = NULL;
    for (int at = qr->levels - 1; at >= 0; at--) {
        step s = {.qr = qr,
                  .level = &qr->level[at],
                  .from = from,
                  .c = c,
                  .columns = columns,
                  .to = at == 0 ? out : turns[at % 2],
                  .scratch = scratch};
        psoup__parallel(qr->context, (size_t)s.level->blocks, apply_block, &s);
        from = s.to;
    }
    status = PSOUP_OK;
fail:
    psoup__free(qr->context, scratch);
    psoup__free(qr->context, turns[0]);
    psoup__free(qr->context, turns[1]);
    return status;
}
