/* LoRA factors folded into a weight, and merged with each other, in the caller's memory. */
#include "merge/merge.h"

#include <math.h>
#include <string.h>

#define BLOCK_FLOATS (1 << 20)

/* ---- folding ---------------------------------------------------------------------------------- */

int64_t psoup__fold_block(int64_t out, int64_t in) {
    int64_t rows = in > 0 ? BLOCK_FLOATS / in : out;
    return rows < 1 ? 1 : rows < out ? rows : out > 0 ? out : 1;
}

void psoup__fold_into(psoup_context *context, float *acc, int64_t first, int64_t rows, int64_t in,
                      const psoup_lora_factors *factors, const double *weights, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const psoup_lora_factors *f = &factors[i];
        if (weights[i] == 0)
            continue;
        const psoup__gemm_args args = {
            .m = rows,
            .n = in,
            .k = f->rank,
            .c = acc,
            .c_stride = in,
            .accumulate = true,
            .a = f->b + first * f->rank,
            .a_row = f->rank,
            .a_col = 1,
            .alpha = (float)(weights[i] * (double)f->scale),
            .b = f->a,
            .b_dtype = PSOUP_F32,
            .b_row = in,
            .b_col = 1,
        };
        psoup__gemm(context, &args);
    }
}

void psoup__fold_rows(psoup_context *context, float *acc, const void *base, psoup_dtype dtype,
                      int64_t first, int64_t rows, int64_t in, const psoup_lora_factors *factors,
                      const double *weights, size_t count) {
    const char *from = (const char *)base + (size_t)first * (size_t)in * psoup_dtype_size(dtype);
    psoup__to_f32(context, acc, from, dtype, (size_t)rows * (size_t)in);
    psoup__fold_into(context, acc, first, rows, in, factors, weights, count);
}

/* Sizes whose products fit, ranks and pointers there; weights finite. */
static psoup_status check_arguments(const char *who, const psoup_context *context, int64_t out,
                                    int64_t in, const psoup_lora_factors *factors,
                                    const double *weights, size_t count, psoup_error *error) {
    size_t product;
    if (context == NULL || out < 1 || in < 1 || out > INT32_MAX || in > INT32_MAX ||
        !psoup__multiply((size_t)out, (size_t)in * sizeof(double), &product) ||
        (count > 0 && (factors == NULL || weights == NULL)))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: %lld × %lld: expected positive sizes below 2^31, a context, factors "
                           "and weights",
                           who, (long long)out, (long long)in);
    for (size_t i = 0; i < count; i++)
        if (factors[i].rank < 1 || !isfinite(factors[i].scale) ||
            (weights[i] != 0 && (factors[i].a == NULL || factors[i].b == NULL)))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: factors %zu: rank %d, scale %g; expected a positive rank, a "
                               "finite scale, a and b",
                               who, i, (int)factors[i].rank, (double)factors[i].scale);
    return psoup__merge_check_weights(weights, count, true, error);
}

psoup_status psoup_merge_fold(psoup_context *context, void *out, const void *base,
                              psoup_dtype dtype, int64_t out_features, int64_t in_features,
                              const psoup_lora_factors *factors, const double *weights,
                              size_t count, psoup_error *error) {
    psoup_status status;
    PSOUP__TRY(check_arguments("psoup_merge_fold", context, out_features, in_features, factors,
                               weights, count, error));
    if ((dtype != PSOUP_F32 && dtype != PSOUP_F16 && dtype != PSOUP_BF16) || out == NULL ||
        base == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merge_fold: dtype %s; expected out, base, and f32, f16 or bf16",
                           psoup_dtype_name(dtype));
    int64_t block = psoup__fold_block(out_features, in_features);
    float *acc = psoup__alloc(context, (size_t)block * (size_t)in_features, sizeof *acc, error);
    if (acc == NULL)
        return PSOUP_ERROR_MEMORY;
    for (int64_t first = 0; first < out_features; first += block) {
        int64_t rows = out_features - first < block ? out_features - first : block;
        size_t offset = (size_t)first * (size_t)in_features * psoup_dtype_size(dtype);
        psoup__fold_rows(context, acc, base, dtype, first, rows, in_features, factors, weights,
                         count);
        psoup__from_f32(context, (char *)out + offset, dtype, acc,
                        (size_t)rows * (size_t)in_features);
    }
    psoup__free(context, acc);
    return PSOUP_OK;
fail:
    return status;
}

/* ---- merging factors -------------------------------------------------------------------------- */

/* x = q · r with orthonormal columns in q; where x is wider than high q is the identity. */
typedef struct span {
    double *q; /* [m, p] */
    double *r; /* [p, n] */
    int64_t m, n, p;
} span;

static void span_free(psoup_context *context, span *s) {
    psoup__free(context, s->q);
    psoup__free(context, s->r);
}

/* Takes x [m, n] in s->q. */
static psoup_status span_of(psoup_context *context, span *s, psoup_error *error) {
    s->p = s->m < s->n ? s->m : s->n;
    if (s->m < s->n) {
        s->r = s->q;
        s->q = psoup__alloc(context, (size_t)(s->m * s->m), sizeof(double), error);
        if (s->q == NULL)
            return PSOUP_ERROR_MEMORY;
        for (int64_t i = 0; i < s->m; i++)
            s->q[i * s->m + i] = 1;
        return PSOUP_OK;
    }
    double *scratch = psoup__alloc(context, (size_t)(2 * s->n), sizeof(double), error);
    if (scratch == NULL)
        return PSOUP_ERROR_MEMORY;
    s->r = psoup__alloc(context, (size_t)(s->n * s->n), sizeof(double), error);
    if (s->r != NULL)
        psoup__qr(s->q, s->r, scratch, s->m, s->n);
    psoup__free(context, scratch);
    return s->r != NULL ? PSOUP_OK : PSOUP_ERROR_MEMORY;
}

/* The spans of [B_1 … B_n] [out, R] and [A_1; …; A_n]ᵀ [in, R], zero weights left out. */
static psoup_status spans_of(psoup_context *context, int64_t out, int64_t in,
                             const psoup_lora_factors *factors, const double *weights,
                             size_t count, int64_t total, span *left, span *right,
                             psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    *left = (span){.m = out, .n = total};
    *right = (span){.m = in, .n = total};
    left->q = psoup__alloc(context, (size_t)out * (size_t)total, sizeof(double), error);
    if (left->q == NULL)
        return PSOUP_ERROR_MEMORY;
    right->q = psoup__alloc(context, (size_t)in * (size_t)total, sizeof(double), error);
    if (right->q == NULL)
        return PSOUP_ERROR_MEMORY;
    int64_t at = 0;
    for (size_t f = 0; f < count; f++) {
        const psoup_lora_factors *x = &factors[f];
        if (weights[f] == 0)
            continue;
        for (int64_t i = 0; i < out; i++)
            for (int64_t k = 0; k < x->rank; k++)
                left->q[i * total + at + k] = (double)x->b[i * x->rank + k];
        for (int64_t k = 0; k < x->rank; k++)
            for (int64_t j = 0; j < in; j++)
                right->q[j * total + at + k] = (double)x->a[k * in + j];
        at += x->rank;
    }
    PSOUP__TRY(span_of(context, left, error));
    PSOUP__TRY(span_of(context, right, error));
fail:
    return status;
}

static double norm(const double *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    return sqrt(sum);
}

/* y[n, n] (its upper left [left.p, right.p]) = left.r · M · right.rᵀ. M, never stored, has the blocks
 * M_ij = m(i, j) · I of size rank_i: for delta m = w_i s_i where i = j; for factors minus delta (equal
 * ranks) s w_i w_j less that. */
static void core_of(double *y, int64_t n, const span *left, const span *right,
                    const psoup_lora_factors *factors, const double *weights, size_t count,
                    bool factors_minus_delta) {
    int64_t total = left->n, row = 0;
    memset(y, 0, (size_t)(n * n) * sizeof *y);
    for (size_t i = 0; i < count; i++) {
        if (weights[i] == 0)
            continue;
        int64_t column = 0;
        double scale = (double)factors[i].scale;
        for (size_t j = 0; j < count; j++) {
            if (weights[j] == 0)
                continue;
            double m = i == j ? weights[i] * scale : 0;
            if (factors_minus_delta)
                m = scale * weights[i] * weights[j] - m;
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

/* From U diag(s) Vᵀ: b = Q_left U √s, a = √s Vᵀ Q_rightᵀ, of the first `rank` values. */
static void take_values(float *a, float *b, int64_t rank, const span *left, const span *right,
                        const double *u, const double *s, const double *vt, int64_t n) {
    for (int64_t i = 0; i < left->m; i++)
        for (int64_t k = 0; k < rank; k++) {
            double sum = 0;
            for (int64_t p = 0; p < left->p && k < n; p++)
                sum += left->q[i * left->p + p] * u[p * n + k];
            b[i * rank + k] = k < n ? (float)(sum * sqrt(s[k])) : 0;
        }
    for (int64_t k = 0; k < rank; k++)
        for (int64_t j = 0; j < right->m; j++) {
            double sum = 0;
            for (int64_t p = 0; p < right->p && k < n; p++)
                sum += right->q[j * right->p + p] * vt[k * n + p];
            a[k * right->m + j] = k < n ? (float)(sum * sqrt(s[k])) : 0;
        }
}

/* PSOUP_MERGE_SVD, and the error of PSOUP_MERGE_FACTORS (a and b NULL): both live in the small square
 * between the spans. */
static psoup_status between_spans(psoup_context *context, float *a, float *b, int64_t rank,
                                  int64_t out, int64_t in, const psoup_lora_factors *factors,
                                  const double *weights, size_t count, int64_t total,
                                  double *relative_error, psoup_error *error) {
    psoup_status status;
    span left = {0}, right = {0};
    double *core = NULL, *vt = NULL, *s = NULL;
    PSOUP__TRY(spans_of(context, out, in, factors, weights, count, total, &left, &right, error));
    int64_t n = left.p > right.p ? left.p : right.p;
    status = PSOUP_ERROR_MEMORY;
    if ((core = psoup__alloc(context, (size_t)(n * n), sizeof *core, error)) == NULL)
        goto fail;
    core_of(core, n, &left, &right, factors, weights, count, false);
    double whole = norm(core, (size_t)(n * n)), lost;
    if (a == NULL) {
        core_of(core, n, &left, &right, factors, weights, count, true);
        lost = norm(core, (size_t)(n * n));
    } else {
        if ((vt = psoup__alloc(context, (size_t)(n * n), sizeof *vt, error)) == NULL ||
            (s = psoup__alloc(context, (size_t)n, sizeof *s, error)) == NULL)
            goto fail;
        psoup__svd(core, s, vt, n);
        take_values(a, b, rank, &left, &right, core, s, vt, n);
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
        if (method == PSOUP_MERGE_FACTORS && (factors[i].rank != factors[0].rank ||
                                              factors[i].scale != factors[0].scale)) {
            psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                        "method factors: rank %d and scale %g beside rank %d and scale %g; expected "
                        "equal ones",
                        (int)factors[i].rank, (double)factors[i].scale, (int)factors[0].rank,
                        (double)factors[0].scale);
            return 0;
        }
    }
    if (method == PSOUP_MERGE_SVD)
        total = svd_rank;
    else if (method == PSOUP_MERGE_FACTORS && count > 0)
        total = factors[0].rank;
    if (total < 1 || total > 1 << 20) {
        psoup__fail(error, PSOUP_ERROR_ARGUMENT, "merged rank %lld; expected 1 to %d",
                    (long long)total, 1 << 20);
        return 0;
    }
    return (int32_t)total;
}

/* a = the A_i one below the other, b = the w_i s_i B_i side by side. */
static void concatenate(float *a, float *b, int64_t rank, int64_t out, int64_t in,
                        const psoup_lora_factors *factors, const double *weights, size_t count) {
    int64_t at = 0;
    for (size_t f = 0; f < count; at += factors[f++].rank) {
        const psoup_lora_factors *x = &factors[f];
        if (weights[f] == 0) /* left zero */
            continue;
        double w = weights[f] * (double)x->scale;
        memcpy(a + at * in, x->a, (size_t)x->rank * (size_t)in * sizeof *a);
        for (int64_t i = 0; i < out; i++)
            for (int64_t k = 0; k < x->rank; k++)
                b[i * rank + at + k] = (float)(w * (double)x->b[i * x->rank + k]);
    }
}

/* a = Σ w_j A_j, b = s Σ w_i B_i. */
static void add_factors(float *a, float *b, int64_t rank, int64_t out, int64_t in,
                        const psoup_lora_factors *factors, const double *weights, size_t count) {
    const int64_t n_a = rank * in, n_b = out * rank;
    for (int64_t i = 0; i < n_a; i++) {
        double sum = 0;
        for (size_t f = 0; f < count; f++)
            sum += weights[f] != 0 ? weights[f] * (double)factors[f].a[i] : 0;
        a[i] = (float)sum;
    }
    for (int64_t i = 0; i < n_b; i++) {
        double sum = 0;
        for (size_t f = 0; f < count; f++)
            sum += weights[f] != 0 ? weights[f] * (double)factors[f].b[i] : 0;
        b[i] = (float)((double)factors[0].scale * sum);
    }
}

psoup_status psoup_merge_factors(psoup_context *context, psoup_merge_method method, float *a_out,
                                 float *b_out, int32_t rank, int64_t out_features,
                                 int64_t in_features, const psoup_lora_factors *factors,
                                 const double *weights, size_t count, double *relative_error,
                                 psoup_error *error) {
    psoup_status status;
    double lost = 0;
    PSOUP__TRY(check_arguments("psoup_merge_factors", context, out_features, in_features, factors,
                               weights, count, error));
    int32_t expected = psoup__merge_rank(method, rank, factors, count, error);
    if (expected == 0)
        return PSOUP_ERROR_ARGUMENT;
    if (rank != expected || a_out == NULL || b_out == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merge_factors: rank %d; expected %d, a_out and b_out", (int)rank,
                           (int)expected);
    int64_t total = 0;
    for (size_t i = 0; i < count; i++)
        if (weights[i] != 0) {
            total += factors[i].rank;
            size_t n_a = (size_t)factors[i].rank * (size_t)in_features;
            size_t n_b = (size_t)factors[i].rank * (size_t)out_features;
            if (method == PSOUP_MERGE_SVD &&
                (!psoup__merge_finite(context, factors[i].a, n_a, PSOUP_F32) ||
                 !psoup__merge_finite(context, factors[i].b, n_b, PSOUP_F32)))
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                   "psoup_merge_factors: factors %zu hold a NaN or infinity", i);
        }
    memset(a_out, 0, (size_t)rank * (size_t)in_features * sizeof *a_out);
    memset(b_out, 0, (size_t)rank * (size_t)out_features * sizeof *b_out);
    if (total > 0 && method == PSOUP_MERGE_DELTA)
        concatenate(a_out, b_out, rank, out_features, in_features, factors, weights, count);
    if (total > 0 && method == PSOUP_MERGE_FACTORS)
        add_factors(a_out, b_out, rank, out_features, in_features, factors, weights, count);
    if (total > 0 && method == PSOUP_MERGE_FACTORS && relative_error != NULL)
        PSOUP__TRY(between_spans(context, NULL, NULL, 0, out_features, in_features, factors,
                                 weights, count, total, &lost, error));
    if (total > 0 && method == PSOUP_MERGE_SVD)
        PSOUP__TRY(between_spans(context, a_out, b_out, rank, out_features, in_features, factors,
                                 weights, count, total, &lost, error));
    if (relative_error != NULL)
        *relative_error = lost;
    return PSOUP_OK;
fail:
    return status;
}
