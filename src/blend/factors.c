/* LoRA factors merged with each other: into one pair of factors, and how far that is from the exact
 * sum. */
#include "blend/dense.h"
#include "blend/blend.h"

#include <math.h>
#include <string.h>

/* x [m, n] = q · r with orthonormal columns in q; where x is wider than high q is the identity. */
typedef struct span {
    psoup__qr *qr;   /* NULL: the identity */
    double *own;     /* r of the identity */
    const double *r; /* [p, n] */
    int64_t m, n, p;
} span;

static void span_free(psoup_context *context, span *s) {
    psoup__qr_free(s->qr);
    psoup__free(context, s->own);
}

static psoup_status span_create(psoup_context *context, span *s, int64_t m, int64_t n,
                                psoup_error *error) {
    *s = (span){.m = m, .n = n, .p = m < n ? m : n};
    if (m >= n)
        return psoup__qr_create(context, m, n, &s->qr, error);
    s->r = s->own = psoup__alloc(context, (size_t)m, (size_t)n * sizeof *s->own, error);
    return s->own != NULL ? PSOUP_OK : PSOUP_ERROR_MEMORY;
}

static void span_column(span *s, int64_t k, const float *x, int64_t stride) {
    if (s->qr != NULL)
        psoup__qr_column(s->qr, k, x, stride);
    for (int64_t i = 0; i < s->m && s->qr == NULL; i++)
        s->own[i * s->n + k] = (double)x[i * stride];
}

static void span_run(span *s) {
    if (s->qr == NULL)
        return;
    psoup__qr_run(s->qr);
    s->r = psoup__qr_r(s->qr);
}

/* The spans of [B_1 … B_n] [out, R] and [A_1; …; A_n]ᵀ [in, R], zero weights left out. */
static psoup_status spans_of(psoup_context *context, int64_t out, int64_t in,
                             const psoup_lora_factors *factors, const double *weights, size_t count,
                             int64_t total, span *left, span *right, psoup_error *error) {
    psoup_status status;
    PSOUP__TRY(span_create(context, left, out, total, error));
    PSOUP__TRY(span_create(context, right, in, total, error));
    int64_t at = 0;
    for (size_t f = 0; f < count; f++) {
        const psoup_lora_factors *x = &factors[f];
        for (int64_t k = 0; k < x->rank && weights[f] != 0; k++, at++) {
            span_column(left, at, x->b + k, x->rank);
            span_column(right, at, x->a + k * in, 1);
        }
    }
    span_run(left);
    span_run(right);
fail:
    return status;
}

static double norm(const double *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    return sqrt(sum);
}

/* The merged pair is Σ_ij m_ij B_i A_j: delta has w_i s_i where i = j; factors s w_i w_j; PEFT's
 * linear √(w_i s_i) √(w_j s_j). Less delta, where that is asked for. */
static double coefficient(psoup_merge_method method, const psoup_lora_factors *factors,
                          const double *weights, size_t i, size_t j, bool minus_delta) {
    double own = weights[i] * (double)factors[i].scale, m = i == j ? own : 0;
    if (method == PSOUP_MERGE_FACTORS)
        m = (double)factors[i].scale * weights[i] * weights[j];
    if (method == PSOUP_MERGE_PEFT_LINEAR)
        m = sqrt(own) * sqrt(weights[j] * (double)factors[j].scale);
    return minus_delta && i == j ? m - own : m;
}

/* y[n, n] (its upper left [left.p, right.p]) = left.r · M · right.rᵀ. M, never stored, has the
 * blocks m_ij · I. */
static void core_of(double *y, int64_t n, const span *left, const span *right,
                    psoup_merge_method method, const psoup_lora_factors *factors,
                    const double *weights, size_t count, bool minus_delta) {
    int64_t total = left->n, row = 0;
    memset(y, 0, (size_t)(n * n) * sizeof *y);
    for (size_t i = 0; i < count; i++) {
        if (weights[i] == 0)
            continue;
        int64_t column = 0;
        for (size_t j = 0; j < count; j++) {
            if (weights[j] == 0)
                continue;
            double m = coefficient(method, factors, weights, i, j, minus_delta);
            for (int64_t a = 0; a < left->p && m != 0; a++)
                for (int64_t b = 0; b < right->p; b++) {
                    double sum = 0;
                    for (int64_t k = 0; k < factors[i].rank; k++)
                        sum += left->r[a * total + row + k] * right->r[b * total + column + k];
                    y[a * n + b] += m * sum;
                }
            column += factors[j].rank;
        }
        row += factors[i].rank;
    }
}

/* The first `rank` of Q x √s: x [p, n] holds vectors in its columns (or, transposed, its rows);
 * out's element (i, k) is at out[i · row + k · column]. Vectors past the n-th are 0. */
static psoup_status take_values(psoup_context *context, float *out, int64_t row, int64_t column,
                                int64_t rank, const span *s, const double *x, bool transposed,
                                const double *values, int64_t n, psoup_error *error) {
    const int64_t some = rank < n ? rank : n;
    double *c = psoup__alloc(context, (size_t)some, (size_t)s->p * sizeof *c, error), *wide = NULL;
    psoup_status status = c != NULL ? PSOUP_OK : PSOUP_ERROR_MEMORY;
    for (int64_t k = 0; k < some && c != NULL; k++)
        for (int64_t p = 0; p < s->p; p++)
            c[k * s->p + p] = x[transposed ? k * n + p : p * n + k] * sqrt(values[k]);
    if (c != NULL && s->qr != NULL) {
        wide = psoup__alloc(context, (size_t)some, (size_t)s->m * sizeof *wide, error);
        status = wide != NULL ? psoup__qr_apply(s->qr, c, some, wide, error) : PSOUP_ERROR_MEMORY;
    }
    for (int64_t k = 0; k < rank && status == PSOUP_OK; k++)
        for (int64_t i = 0; i < s->m; i++)
            out[i * row + k * column] =
                k < some ? (float)(wide != NULL ? wide : c)[k * s->m + i] : 0;
    psoup__free(context, c);
    psoup__free(context, wide);
    return status;
}

/* Both live in the small square between the spans. */
psoup_status psoup__factors_between(psoup_context *context, psoup_merge_method method, float *a,
                                    float *b, int64_t rank, int64_t out, int64_t in,
                                    const psoup_lora_factors *factors, const double *weights,
                                    size_t count, int64_t total, double *relative_error,
                                    psoup_error *error) {
    psoup_status status;
    span left = {0}, right = {0};
    double *core = NULL, *vt = NULL, *s = NULL;
    PSOUP__TRY(spans_of(context, out, in, factors, weights, count, total, &left, &right, error));
    int64_t n = left.p > right.p ? left.p : right.p;
    status = PSOUP_ERROR_MEMORY;
    if ((core = psoup__alloc(context, (size_t)(n * n), sizeof *core, error)) == NULL)
        goto fail;
    core_of(core, n, &left, &right, PSOUP_MERGE_DELTA, factors, weights, count, false);
    double whole = norm(core, (size_t)(n * n)), lost;
    if (a == NULL) {
        core_of(core, n, &left, &right, method, factors, weights, count, true);
        lost = norm(core, (size_t)(n * n));
    } else {
        if ((vt = psoup__alloc(context, (size_t)(n * n), sizeof *vt, error)) == NULL ||
            (s = psoup__alloc(context, (size_t)n, sizeof *s, error)) == NULL)
            goto fail;
        psoup__svd(context, core, s, vt, n);
        PSOUP__TRY(take_values(context, b, rank, 1, rank, &left, core, false, s, n, error));
        PSOUP__TRY(take_values(context, a, 1, in, rank, &right, vt, true, s, n, error));
        lost = rank < n ? norm(s + rank, (size_t)(n - rank)) : 0;
    }
    *relative_error = whole > 0 ? lost / whole : 0;
    status = PSOUP_OK;
fail:
    span_free(context, &left);
    span_free(context, &right);
    psoup__free(context, core);
    psoup__free(context, vt);
    psoup__free(context, s);
    return status;
}

int32_t psoup__merge_rank(psoup_merge_method method, int32_t svd_rank,
                          const psoup_lora_factors *factors, size_t count, psoup_error *error) {
    int64_t total = 0;
    for (size_t i = 0; i < count; i++) {
        total += factors[i].rank;
        bool ranks = factors[i].rank == factors[0].rank,
             scales = factors[i].scale == factors[0].scale;
        if ((method == PSOUP_MERGE_FACTORS && !(ranks && scales)) ||
            (method == PSOUP_MERGE_PEFT_LINEAR && !ranks)) {
            psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                        "method %s: rank %d and scale %g beside rank %d and scale %g; expected "
                        "equal %s",
                        method == PSOUP_MERGE_FACTORS ? "factors" : "peft_linear",
                        (int)factors[i].rank, (double)factors[i].scale, (int)factors[0].rank,
                        (double)factors[0].scale, method == PSOUP_MERGE_FACTORS ? "ones" : "ranks");
            return 0;
        }
    }
    if (method == PSOUP_MERGE_SVD)
        total = svd_rank;
    else if ((method == PSOUP_MERGE_FACTORS || method == PSOUP_MERGE_PEFT_LINEAR) && count > 0)
        total = factors[0].rank;
    if (total < 1 || total > 1 << 20) {
        psoup__fail(error, PSOUP_ERROR_ARGUMENT, "merged rank %lld; expected 1 to %d",
                    (long long)total, 1 << 20);
        return 0;
    }
    return (int32_t)total;
}

psoup_status psoup__factors_check(psoup_context *context, psoup_merge_method method, int64_t out,
                                  int64_t in, const psoup_lora_factors *factors,
                                  const double *weights, size_t count, psoup_error *error) {
    if (method != PSOUP_MERGE_DELTA && method != PSOUP_MERGE_FACTORS && method != PSOUP_MERGE_SVD &&
        method != PSOUP_MERGE_PEFT_LINEAR)
        return psoup__fail(
            error, PSOUP_ERROR_ARGUMENT,
            "psoup_merge_factors: method %d; expected delta, factors, svd or peft_linear",
            (int)method);
    for (size_t i = 0; i < count; i++) {
        if (weights[i] == 0)
            continue;
        size_t n_a = (size_t)factors[i].rank * (size_t)in,
               n_b = (size_t)factors[i].rank * (size_t)out;
        if (method == PSOUP_MERGE_SVD &&
            (!psoup__merge_finite(context, factors[i].a, n_a, PSOUP_F32) ||
             !psoup__merge_finite(context, factors[i].b, n_b, PSOUP_F32)))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "psoup_merge_factors: factors %zu hold a NaN or infinity", i);
        if (method == PSOUP_MERGE_PEFT_LINEAR && weights[i] * (double)factors[i].scale < 0)
            return psoup__fail(
                error, PSOUP_ERROR_ARGUMENT,
                "psoup_merge_factors: factors %zu: weight %g times scale %g is negative; "
                "peft_linear takes its square root",
                i, weights[i], (double)factors[i].scale);
    }
    return PSOUP_OK;
}
