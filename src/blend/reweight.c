/* Merging factors into factors: a soup's new weights, in the caller's memory.
 *
 * Many modules are one job: each is cut into parts (columns of A, rows of B), and the parts are shared out
 * among the threads. Products and sums are in f64 and rounded once. */
#include "blend/blend.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

enum {
    PARTS = 4,    /* of one module */
    ROWS = 256,   /* of B at a time */
    CHUNK = 1024, /* sums that stay in a first cache */
    STREAM_FROM = 8 << 20 /* bytes of output that no cache is counted on to hold until it is read */
};

typedef struct kernel {
    psoup__merge_sum_fn sum;
    psoup__merge_scatter_fn scatter;
    psoup__merge_add_double_fn add;
    psoup__merge_round_double_fn round;
} kernel;

static const kernel kernels[PSOUP__ISA_COUNT] = {
    [PSOUP__ISA_GENERIC] = {psoup__merge_sum_run_generic, psoup__merge_scatter_generic,
                            psoup__merge_add_double_generic, psoup__merge_round_double_generic},
#ifdef __x86_64__
    [PSOUP__ISA_AVX2] = {psoup__merge_sum_run_avx2, psoup__merge_scatter_avx2,
                         psoup__merge_add_double_avx2, psoup__merge_round_double_avx2},
    [PSOUP__ISA_AVX512] = {psoup__merge_sum_run_avx512, psoup__merge_scatter_avx512,
                           psoup__merge_add_double_avx512, psoup__merge_round_double_avx512},
#endif
};

typedef struct job {
    psoup_context *context;
    const kernel *kernel;
    psoup_merge_method method;
    psoup_merge_module *modules;
    bool errors, stream;
    pthread_mutex_t lock;
    size_t failed; /* the first module that failed; SIZE_MAX: none */
    psoup_error error;
    psoup_status status;
} job;

/* The ranks of the factors in use, together. */
static int64_t rank_in_use(const psoup_merge_module *m) {
    int64_t total = 0;
    for (size_t f = 0; f < m->count; f++)
        total += m->weights[f] != 0 ? m->factors[f].rank : 0;
    return total;
}

/* Past the caches. */
static void copy(const job *j, float *out, const float *in, size_t n) {
    const psoup_dtype dtype = PSOUP_F32;
    const float one = 1;
    const void *from = in;
    const psoup__sum_run run = {.out = out, .out_dtype = PSOUP_F32, .in = &from, .dtypes = &dtype,
                                .weights = &one, .count = 1, .n = n, .limit = INFINITY,
                                .stream = j->stream};
    j->kernel->sum(&run);
}

/* delta: a = the A_i one below the other, of which rows [first, last); b = the w_i s_i B_i side by side, of
 * which rows [row, end). Zeros where the weight is. */
static void stack_a(const job *j, const psoup_merge_module *m, int64_t first, int64_t last) {
    int64_t at = 0;
    for (size_t f = 0; f < m->count; at += m->factors[f++].rank) {
        const psoup_lora_factors *x = &m->factors[f];
        int64_t from = first > at ? first : at, to = last < at + x->rank ? last : at + x->rank;
        if (from >= to)
            continue;
        float *out = m->a_out + from * m->in_features;
        size_t n = (size_t)(to - from) * (size_t)m->in_features;
        if (m->weights[f] != 0)
            copy(j, out, x->a + (from - at) * m->in_features, n);
        else
            memset(out, 0, n * sizeof *out);
    }
}

static void stack_b(const job *j, const psoup_merge_module *m, int64_t row, int64_t end) {
    for (int64_t rows; row < end; row += rows) { /* not all, so that what is written lies together */
        int64_t at = 0;
        rows = end - row < ROWS ? end - row : ROWS;
        for (size_t f = 0; f < m->count; at += m->factors[f++].rank) {
            const psoup_lora_factors *x = &m->factors[f];
            float *out = m->b_out + row * m->rank + at;
            if (m->weights[f] != 0)
                j->kernel->scatter(out, (size_t)m->rank, x->b + row * x->rank, (size_t)x->rank,
                                   (size_t)rows, m->weights[f] * (double)x->scale, j->stream);
            for (int64_t i = 0; i < rows && m->weights[f] == 0; i++)
                memset(out + i * m->rank, 0, (size_t)x->rank * sizeof *out);
        }
    }
}

/* out[n] = scale Σ w x: of A's or B's elements from `at` on; w is √(weight · scale) for peft-linear. */
static void add_up(const job *j, const psoup_merge_module *m, bool of_b, size_t at, size_t n, float *out) {
    const bool roots = j->method == PSOUP_MERGE_PEFT_LINEAR;
    const double scale = of_b && !roots ? (double)m->factors[0].scale : 1;
    double sum[CHUNK];
    for (size_t end = at + n, count; at < end; at += count, out += count) {
        count = end - at < CHUNK ? end - at : CHUNK;
        memset(sum, 0, count * sizeof *sum);
        for (size_t f = 0; f < m->count; f++) {
            const psoup_lora_factors *x = &m->factors[f];
            if (m->weights[f] != 0)
                j->kernel->add(sum, (of_b ? x->b : x->a) + at,
                               roots ? sqrt(m->weights[f] * (double)x->scale) : m->weights[f], count);
        }
        j->kernel->round(out, sum, scale, count, j->stream);
    }
}

static void merge_part(void *arg, size_t task, int worker) {
    const job *j = arg;
    const psoup_merge_module *m = &j->modules[task / PARTS];
    const int64_t part = (int64_t)(task % PARTS);
    (void)worker;
    if (j->method == PSOUP_MERGE_DELTA) {
        if (m->a_out != NULL)
            stack_a(j, m, m->rank * part / PARTS, m->rank * (part + 1) / PARTS);
        stack_b(j, m, m->out_features * part / PARTS, m->out_features * (part + 1) / PARTS);
        return;
    }
    for (int of_b = 0; of_b < 2; of_b++) {
        float *out = of_b ? m->b_out : m->a_out;
        size_t n = (size_t)m->rank * (size_t)(of_b ? m->out_features : m->in_features);
        size_t each = (n / CHUNK + PARTS) / PARTS * CHUNK;
        size_t at = (size_t)part * each < n ? (size_t)part * each : n;
        add_up(j, m, of_b, at, n - at < each ? n - at : each, out + at);
    }
}

/* The error of `factors` from the Gram matrices of the factors in use: several times as fast as through their
 * spans. ‖merged − exact‖² comes as a difference of larger numbers, so *known is false where it is so small
 * that rounding would show, or no number. */
static psoup_status gram_error(const job *j, const psoup_merge_module *m, int64_t total, double *relative,
                               bool *known, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    const size_t square = (size_t)total * (size_t)total;
    double *grams = NULL, *inner = NULL, exact = 0;
    psoup_lora_factors *used = psoup__alloc(j->context, m->count, sizeof *used, error);
    double *weights = psoup__alloc(j->context, m->count, sizeof *weights, error);
    psoup__gram_module module = {.factors = used, .out = m->out_features, .in = m->in_features,
                                    .total = total};
    if (used == NULL || weights == NULL ||
        (inner = psoup__alloc(j->context, m->count * m->count, sizeof *inner, error)) == NULL ||
        (grams = psoup__alloc(j->context, 4 * square, sizeof *grams, error)) == NULL)
        goto fail;
    for (size_t f = 0; f < m->count; f++)
        if (m->weights[f] != 0) {
            weights[module.n] = m->weights[f];
            used[module.n++] = m->factors[f];
        }
    PSOUP__TRY(psoup__gram_of(j->context, &module, false, grams, error));
    PSOUP__TRY(psoup__gram_of(j->context, &module, true, grams + square, error));
    psoup__gram_inner(&module, grams, grams + square, inner);
    for (size_t a = 0; a < module.n; a++)
        for (size_t b = 0; b < module.n; b++)
            exact += weights[a] * weights[b] * inner[a * module.n + b];
    const double cross = psoup__gram_cross(&module, grams, grams + square, weights, grams + 2 * square);
    *known = exact > 0 && cross > 1e-8 * exact && cross < 1e8 * exact;
    *relative = *known ? sqrt(cross / exact) : 0;
    status = PSOUP_OK;
fail:
    psoup__free(j->context, used);
    psoup__free(j->context, weights);
    psoup__free(j->context, inner);
    psoup__free(j->context, grams);
    return status;
}

static void svd_or_error(void *arg, size_t task, int worker) {
    job *j = arg;
    psoup_merge_module *m = &j->modules[task];
    const bool is_svd = j->method == PSOUP_MERGE_SVD;
    const int64_t total = rank_in_use(m);
    psoup_error error = {0};
    (void)worker;
    if (is_svd) {
        memset(m->a_out, 0, (size_t)m->rank * (size_t)m->in_features * sizeof *m->a_out);
        memset(m->b_out, 0, (size_t)m->rank * (size_t)m->out_features * sizeof *m->b_out);
    }
    m->relative_error = 0;
    psoup_status status = PSOUP_OK;
    bool known = total == 0;
    if (!known && j->method == PSOUP_MERGE_FACTORS)
        status = gram_error(j, m, total, &m->relative_error, &known, &error);
    if (status == PSOUP_OK && !known)
        status = psoup__factors_between(j->context, j->method, is_svd ? m->a_out : NULL, is_svd ? m->b_out : NULL,
                                 is_svd ? m->rank : 0, m->out_features, m->in_features, m->factors,
                                 m->weights, m->count, total, &m->relative_error, &error);
    if (status == PSOUP_OK)
        return;
    pthread_mutex_lock(&j->lock);
    if (task < j->failed) {
        j->failed = task;
        j->error = error;
        j->status = status;
    }
    pthread_mutex_unlock(&j->lock);
}

static psoup_status check_module(const job *j, const psoup_merge_module *m, psoup_error *error) {
    psoup_status status;
    PSOUP__TRY(psoup__lora_check("psoup_merge_factors", j->context, m->out_features, m->in_features,
                                 m->factors, m->weights, m->count, error));
    PSOUP__TRY(psoup__factors_check(j->context, j->method, m->out_features, m->in_features, m->factors,
                                    m->weights, m->count, error));
    int32_t expected = psoup__merge_rank(j->method, m->rank, m->factors, m->count, error);
    if (expected == 0)
        return PSOUP_ERROR_ARGUMENT;
    if (m->rank != expected || m->b_out == NULL ||
        (m->a_out == NULL && j->method != PSOUP_MERGE_DELTA))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merge_factors: rank %d; expected %d, a_out and b_out", (int)m->rank,
                           (int)expected);
    if (m->reserved32 || !psoup__all_zero(m->reserved, sizeof m->reserved))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_merge_factors: reserved is not 0");
    return PSOUP_OK;
fail:
    return status;
}

psoup_status psoup_merge_factors_batch(psoup_context *context, psoup_merge_method method,
                                       psoup_merge_module *modules, size_t n, int32_t errors,
                                       psoup_error *error) {
    double bytes = 0;
    psoup_error inner = {0};
    if (context == NULL || (n > 0 && modules == NULL))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merge_factors_batch: expected a context and modules");
    job j = {.context = context, .kernel = &kernels[psoup__isa_of(context)], .method = method,
             .modules = modules, .failed = SIZE_MAX};
    for (size_t i = 0; i < n; i++) {
        psoup_status status = check_module(&j, &modules[i], &inner);
        if (status != PSOUP_OK)
            return n == 1 ? psoup__fail(error, status, "%s", inner.message)
                          : psoup__fail(error, status, "module %zu: %s", i, inner.message);
        bytes += 4.0 * (double)modules[i].rank *
                 ((double)modules[i].in_features + (double)modules[i].out_features);
    }
    j.stream = bytes >= STREAM_FROM;
    if (method != PSOUP_MERGE_SVD)
        psoup__parallel(context, n * PARTS, merge_part, &j);
    if (method != PSOUP_MERGE_SVD && (errors == 0 || method == PSOUP_MERGE_DELTA)) {
        for (size_t i = 0; i < n; i++)
            modules[i].relative_error = 0;
        return PSOUP_OK;
    }
    pthread_mutex_init(&j.lock, NULL);
    psoup__parallel(context, n, svd_or_error, &j);
    pthread_mutex_destroy(&j.lock);
    if (j.failed == SIZE_MAX)
        return PSOUP_OK;
    return n == 1 ? psoup__fail(error, j.status, "%s", j.error.message)
                  : psoup__fail(error, j.status, "module %zu: %s", j.failed, j.error.message);
}

psoup_status psoup_merge_factors(psoup_context *context, psoup_merge_method method, float *a_out,
                                 float *b_out, int32_t rank, int64_t out_features,
                                 int64_t in_features, const psoup_lora_factors *factors,
                                 const double *weights, size_t count, double *relative_error,
                                 psoup_error *error) {
    psoup_merge_module module = {.factors = factors, .weights = weights, .count = count,
                                 .out_features = out_features, .in_features = in_features,
                                 .a_out = a_out, .b_out = b_out, .rank = rank};
    if (a_out == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_merge_factors: a_out is NULL");
    psoup_status status = psoup_merge_factors_batch(context, method, &module, 1, relative_error != NULL,
                                                    error);
    if (status == PSOUP_OK && relative_error != NULL)
        *relative_error = module.relative_error;
    return status;
}
