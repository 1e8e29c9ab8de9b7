/* The merger against PEFT, torch and numpy (tests/golden/merge.py) and against dense f64 sums. With
 * PSOUP_TEST_KEEP=DIR the files written here stay in DIR, for merge.py --check DIR. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "merge/merge.h"

#define GOLDEN "tests/golden/merge/"
#define ck_ok(call) ck_assert_msg((call) == PSOUP_OK, "%s", error.message)

static psoup_context *context;
static psoup_error error;
static char scratch[512];
static int allocations, fail_at = -1, live;

static void *counted_alloc(void *user, size_t bytes, size_t alignment) {
    (void)user;
    if (fail_at >= 0 && allocations++ >= fail_at)
        return NULL;
    void *memory = NULL;
    if (posix_memalign(&memory, alignment < sizeof(void *) ? sizeof(void *) : alignment,
                       bytes > 0 ? bytes : 1) != 0)
        return NULL;
    __atomic_add_fetch(&live, 1, __ATOMIC_RELAXED);
    return memory;
}

static void counted_free(void *user, void *memory) {
    (void)user;
    if (memory != NULL)
        __atomic_sub_fetch(&live, 1, __ATOMIC_RELAXED);
    free(memory);
}

static psoup_context *new_context(int threads, const char *isa) {
    psoup_context *made;
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.threads = threads;
    options.isa = isa;
    options.allocator = (psoup_allocator){NULL, counted_alloc, counted_free};
    return psoup_context_create(&options, &made, &error) == PSOUP_OK ? made : NULL;
}

static void set_up(void) {
    context = new_context(2, NULL);
    ck_assert_ptr_nonnull(context);
    const char *keep = getenv("PSOUP_TEST_KEEP"), *parent = getenv("TMPDIR");
    if (keep != NULL)
        snprintf(scratch, sizeof scratch, "%s", keep);
    else
        snprintf(scratch, sizeof scratch, "%s/psoup-merge-XXXXXX", parent != NULL ? parent : P_tmpdir);
    if (keep == NULL)
        ck_assert_ptr_nonnull(mkdtemp(scratch));
}

static void tear_down(void) {
    char command[600];
    psoup_context_free(context);
    ck_assert_int_eq(live, 0);
    snprintf(command, sizeof command, "rm -rf '%s'", scratch);
    if (getenv("PSOUP_TEST_KEEP") == NULL)
        ck_assert_int_eq(system(command), 0);
}

static const char *in_scratch(const char *name) {
    static char path[2][1024];
    static int turn;
    snprintf(path[turn ^= 1], sizeof path[0], "%s/%s", scratch, name);
    return path[turn];
}

static uint64_t draws;
static float noise(void) {
    psoup__random random = {7, 0, draws++ * 2};
    return psoup__random_normal(&random);
}

static float *noises(size_t n) {
    float *x = malloc((n + 1) * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = noise();
    return x;
}

/* ---- sums --------------------------------------------------------------------------------------- */

static const psoup_dtype dtypes[] = {PSOUP_F32, PSOUP_F16, PSOUP_BF16};
static const size_t sizes[] = {0, 1, 63, 2048, 70001};

START_TEST(sums_are_rounded_once) {
    psoup_dtype from = dtypes[_i % 3], to = dtypes[_i / 3];
    const double weights[4] = {0.37, 0, -1.25, 0.63};
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        size_t n = sizes[k], in_size = psoup_dtype_size(from), out_size = psoup_dtype_size(to);
        char *raw[4], *out = malloc(n * out_size + 1), *expected = malloc(n * out_size + 1);
        float *wide = malloc(4 * (n + 1) * sizeof *wide), *sum = malloc((n + 1) * sizeof *sum);
        for (int i = 0; i < 4; i++) { /* the second is never read: its weight is 0 */
            float *x = noises(n);
            raw[i] = (char *)malloc(n * in_size + 1) + (i == 3); /* one is not aligned */
            psoup__from_f32(context, raw[i], from, x, n);
            psoup__to_f32(context, wide + (size_t)i * n, raw[i], from, n);
            free(x);
        }
        for (size_t j = 0; j < n; j++) {
            volatile float acc = (float)0.37 * wide[j];
            volatile float product = (float)-1.25 * wide[2 * n + j];
            acc = acc + product;
            product = (float)0.63 * wide[3 * n + j];
            sum[j] = acc + product;
        }
        const void *in[4] = {raw[0], NULL, raw[2], raw[3]};
        psoup__from_f32(context, expected, to, sum, n);
        ck_ok(psoup_merge_sum(context, out, to, in, from, weights, 4, n, &error));
        ck_assert(n == 0 || memcmp(out, expected, n * out_size) == 0);
        if (from == to && n > 0) { /* in place */
            ck_ok(psoup_merge_sum(context, raw[0], to, in, from, weights, 4, n, &error));
            ck_assert_mem_eq(raw[0], expected, n * out_size);
        }
        for (int i = 0; i < 4; i++)
            free(raw[i] - (i == 3));
        free(out);
        free(expected);
        free(wide);
        free(sum);
    }
}
END_TEST

START_TEST(large_sums_are_the_same_on_all_paths) {
    enum { N = (8 << 20) / 4 + 1237 };
    float *in[2] = {noises(N), noises(N)};
    float *out[2] = {aligned_alloc(64, (N * 4 + 63) / 64 * 64), malloc(N * 4 + 4)};
    const double weights[2] = {0.4, 0.6};
    ck_ok(psoup_merge_sum(context, out[0], PSOUP_F32, (const void *const *)in, PSOUP_F32, weights, 2,
                          N, &error)); /* aligned: streamed */
    static const char *const isas[] = {"generic", "avx2", "avx512"};
    for (int i = 0; i < 3; i++) {
        psoup_context *other = new_context(1, isas[i]);
        if (other == NULL)
            continue;
        ck_ok(psoup_merge_sum(other, out[1], PSOUP_F32, (const void *const *)in, PSOUP_F32, weights,
                              2, N, &error));
        ck_assert_mem_eq(out[0], out[1], N * sizeof(float));
        psoup_context_free(other);
    }
    for (int i = 0; i < 2; i++) {
        free(in[i]);
        free(out[i]);
    }
}
END_TEST

START_TEST(sums_refuse_nonsense) {
    float x[2] = {1, 2}, y[2];
    const void *in[1] = {x};
    double w = NAN;
    ck_assert_int_eq(psoup_merge_sum(context, y, PSOUP_F32, in, PSOUP_F32, &w, 1, 2, &error),
                     PSOUP_ERROR_ARGUMENT);
    w = 1;
    ck_assert_int_eq(psoup_merge_sum(context, y, PSOUP_I8, in, PSOUP_F32, &w, 1, 2, &error),
                     PSOUP_ERROR_ARGUMENT);
    ck_assert_int_eq(psoup_merge_sum(context, x, PSOUP_BF16, in, PSOUP_F32, &w, 1, 2, &error),
                     PSOUP_ERROR_ARGUMENT);
    in[0] = NULL;
    ck_assert_int_eq(psoup_merge_sum(context, y, PSOUP_F32, in, PSOUP_F32, &w, 1, 2, &error),
                     PSOUP_ERROR_ARGUMENT);
    ck_ok(psoup_merge_sum(context, y, PSOUP_F32, NULL, PSOUP_F32, NULL, 0, 2, &error));
    ck_assert(y[0] == 0 && y[1] == 0);
}
END_TEST

/* ---- small dense problems ------------------------------------------------------------------------ */

START_TEST(qr_is_one) {
    static const int64_t shapes[][2] = {{1, 1}, {5, 5}, {40, 7}, {9, 1}};
    for (int k = 0; k < 5; k++) {
        int64_t m = shapes[k % 4][0], n = shapes[k % 4][1];
        double x[300], q[300], r[64], scratch_[32];
        for (int64_t i = 0; i < m * n; i++) /* the last: a column twice, another zero */
            q[i] = x[i] = k < 4 ? (double)noise() : i % n == 2 ? 0 : (double)(i / n + 1);
        psoup__qr(q, r, scratch_, m, n);
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++) {
                double sum = 0;
                for (int64_t p = 0; p < n; p++)
                    sum += q[i * n + p] * r[p * n + j];
                ck_assert_double_eq_tol(sum, x[i * n + j], 1e-12);
            }
        for (int64_t a = 0; a < n; a++)
            for (int64_t b = 0; b < n; b++) {
                double dot = 0;
                for (int64_t i = 0; i < m; i++)
                    dot += q[i * n + a] * q[i * n + b];
                ck_assert_double_eq_tol(dot, a == b, 1e-12);
                ck_assert(a <= b || r[a * n + b] == 0);
            }
    }
}
END_TEST

START_TEST(svd_is_one) {
    for (int k = 0; k < 4; k++) { /* random; of rank 3; zero; tiny and huge */
        enum { N = 12 };
        double x[N * N], u[N * N], s[N], vt[N * N], left[N * 3], right[3 * N];
        for (int i = 0; i < N * 3; i++) {
            left[i] = (double)noise();
            right[i] = (double)noise();
        }
        for (int i = 0; i < N * N; i++) {
            x[i] = k == 0 ? (double)noise() : 0;
            for (int p = 0; p < 3 && k == 1; p++)
                x[i] += left[i / N * 3 + p] * right[p * N + i % N];
            if (k == 3)
                x[i] = (double)noise() * pow(10, i / N - 6);
            u[i] = x[i];
        }
        psoup__svd(u, s, vt, N);
        for (int i = 0; i < N; i++) {
            ck_assert(i == 0 || s[i] <= s[i - 1]);
            ck_assert(k != 1 || i < 3 || s[i] < 1e-12);
            ck_assert(k != 2 || s[i] == 0);
            for (int j = 0; j < N; j++) {
                double sum = 0, dot = 0, udot = 0;
                for (int p = 0; p < N; p++) {
                    sum += u[i * N + p] * s[p] * vt[p * N + j];
                    dot += vt[i * N + p] * vt[j * N + p];
                    udot += u[p * N + i] * u[p * N + j];
                }
                ck_assert_double_eq_tol(sum, x[i * N + j], 1e-11 * (k == 3 ? 1e6 : 1));
                ck_assert_double_eq_tol(dot, i == j, 1e-12);
                ck_assert(k != 0 || fabs(udot - (i == j)) < 1e-12);
            }
        }
    }
}
END_TEST

/* ---- factors in memory ----------------------------------------------------------------------------- */

enum { OUT = 37, IN = 29, COUNT = 3 };

static void make_factors(psoup_lora_factors *factors, const int32_t *ranks, float scale) {
    for (int i = 0; i < COUNT; i++)
        factors[i] = (psoup_lora_factors){noises((size_t)(ranks[i] * IN)),
                                          noises((size_t)(OUT * ranks[i])), ranks[i],
                                          scale != 0 ? scale : 0.5f + (float)i};
}

static void free_factors(psoup_lora_factors *factors) {
    for (int i = 0; i < COUNT; i++) {
        free((void *)(uintptr_t)factors[i].a);
        free((void *)(uintptr_t)factors[i].b);
    }
}

/* y += w · s · b a */
static void add_product(double *y, double w, const float *a, const float *b, int32_t rank) {
    for (int i = 0; i < OUT; i++)
        for (int j = 0; j < IN; j++)
            for (int k = 0; k < rank; k++)
                y[i * IN + j] += w * (double)b[i * rank + k] * (double)a[k * IN + j];
}

static void dense_delta(double *y, const psoup_lora_factors *f, const double *weights) {
    memset(y, 0, OUT * IN * sizeof *y);
    for (int i = 0; i < COUNT; i++)
        if (weights[i] != 0)
            add_product(y, weights[i] * (double)f[i].scale, f[i].a, f[i].b, f[i].rank);
}

static double distance(const double *x, const double *y, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (x[i] - y[i]) * (x[i] - y[i]);
    return sqrt(sum);
}

static double length_of(const double *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    return sqrt(sum);
}

START_TEST(folds_into_a_base) {
    psoup_dtype dtype = dtypes[_i];
    const int32_t ranks[COUNT] = {4, 1, 9};
    const double weights[COUNT] = {0.25, 0, 0.75};
    psoup_lora_factors f[COUNT];
    static double delta[OUT * IN];
    float *base = noises(OUT * IN), result[OUT * IN];
    double stored[OUT * IN], out[OUT * IN]; /* of any dtype */
    make_factors(f, ranks, 0);
    ((float *)(uintptr_t)f[1].a)[3] = NAN; /* weight 0: not read */
    psoup__from_f32(context, stored, dtype, base, OUT * IN);
    psoup__to_f32(context, base, stored, dtype, OUT * IN);
    dense_delta(delta, f, weights);
    ck_ok(psoup_merge_fold(context, out, stored, dtype, OUT, IN, f, weights, COUNT, &error));
    psoup__to_f32(context, result, out, dtype, OUT * IN);
    double step = dtype == PSOUP_F32 ? 1e-6 : dtype == PSOUP_F16 ? 0x1p-11 : 0x1p-8;
    for (int i = 0; i < OUT * IN; i++) {
        double exact = (double)base[i] + delta[i];
        ck_assert_double_eq_tol((double)result[i], exact, step * fabs(exact) + 4e-6);
    }
    ck_ok(psoup_merge_fold(context, stored, stored, dtype, OUT, IN, f, weights, COUNT, &error));
    ck_assert_mem_eq(stored, out, OUT * IN * psoup_dtype_size(dtype));
    ck_ok(psoup_merge_fold(context, out, stored, dtype, OUT, IN, NULL, NULL, 0, &error));
    ck_assert_mem_eq(stored, out, OUT * IN * psoup_dtype_size(dtype));
    ck_assert_int_eq(psoup_merge_fold(context, out, stored, PSOUP_I8, OUT, IN, f, weights, COUNT,
                                      &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_int_eq(psoup_merge_fold(context, out, stored, dtype, -1, IN, f, weights, COUNT,
                                      &error), PSOUP_ERROR_ARGUMENT);
    free_factors(f);
    free(base);
}
END_TEST

static double merged_distance(const float *a, const float *b, int32_t rank, const double *exact) {
    static double merged[OUT * IN];
    memset(merged, 0, sizeof merged);
    add_product(merged, 1, a, b, rank);
    return distance(merged, exact, OUT * IN);
}

START_TEST(merges_factors) {
    const int32_t ranks[COUNT] = {4, 2, 7}, equal[COUNT] = {4, 4, 4};
    const double weights[COUNT] = {0.2, 0.5, 0.3};
    static double exact[OUT * IN], crossed[OUT * IN];
    psoup_lora_factors f[COUNT];
    double lost = -1;
    float a[16 * IN], b[OUT * 16];
    make_factors(f, ranks, 0);
    dense_delta(exact, f, weights);
    ck_ok(psoup_merge_factors(context, PSOUP_MERGE_DELTA, a, b, 13, OUT, IN, f, weights, COUNT,
                              &lost, &error));
    ck_assert_double_le(merged_distance(a, b, 13, exact), 1e-6 * length_of(exact, OUT * IN));
    ck_assert_double_eq(lost, 0);
    ck_assert_int_eq(psoup_merge_factors(context, PSOUP_MERGE_DELTA, a, b, 12, OUT, IN, f, weights,
                                         COUNT, NULL, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "rank 12; expected 13"));
    ck_assert_int_eq(psoup_merge_factors(context, PSOUP_MERGE_FACTORS, a, b, 4, OUT, IN, f, weights,
                                         COUNT, NULL, &error), PSOUP_ERROR_ARGUMENT);
    free_factors(f);

    make_factors(f, equal, 2);
    dense_delta(exact, f, weights);
    ck_ok(psoup_merge_factors(context, PSOUP_MERGE_FACTORS, a, b, 4, OUT, IN, f, weights, COUNT,
                              &lost, &error));
    memset(crossed, 0, sizeof crossed);
    for (int i = 0; i < COUNT; i++)
        for (int j = 0; j < COUNT; j++)
            add_product(crossed, 2 * weights[i] * weights[j], f[j].a, f[i].b, 4);
    ck_assert_double_le(merged_distance(a, b, 4, crossed), 1e-6 * length_of(crossed, OUT * IN));
    double expected = distance(crossed, exact, OUT * IN) / length_of(exact, OUT * IN);
    ck_assert_double_eq_tol(lost, expected, 1e-9);
    ck_assert_double_gt(lost, 0.5);
    free_factors(f);
}
END_TEST

/* Ranks below and above both sides of the matrix: the small square is then the whole matrix. */
START_TEST(svd_is_what_it_says) {
    const int32_t ranks[2][COUNT] = {{4, 2, 7}, {20, 8, 15}};
    const double weights[COUNT] = {0.2, 0.5, 0.3};
    static double exact[OUT * IN], square[OUT * OUT], vt[OUT * OUT], s[OUT];
    psoup_lora_factors f[COUNT];
    float a[40 * IN], b[OUT * 40];
    make_factors(f, ranks[_i], 0);
    dense_delta(exact, f, weights);
    memset(square, 0, sizeof square);
    for (int i = 0; i < OUT; i++)
        memcpy(square + i * OUT, exact + i * IN, IN * sizeof *exact);
    psoup__svd(square, s, vt, OUT);
    for (int32_t rank = 1; rank <= 40; rank += 3) {
        double lost = -1, best = rank < OUT ? length_of(s + rank, (size_t)(OUT - rank)) : 0;
        double whole = length_of(s, OUT);
        ck_ok(psoup_merge_factors(context, PSOUP_MERGE_SVD, a, b, rank, OUT, IN, f, weights, COUNT,
                                  &lost, &error));
        ck_assert_double_eq_tol(lost, best / whole, 1e-10);
        ck_assert_double_eq_tol(merged_distance(a, b, rank, exact), best, 1e-5 * whole);
    }
    const double none[COUNT] = {0, 0, 0};
    ck_ok(psoup_merge_factors(context, PSOUP_MERGE_SVD, a, b, 3, OUT, IN, f, none, COUNT, NULL,
                              &error));
    for (int i = 0; i < 3 * IN; i++)
        ck_assert_float_eq(a[i], 0);
    ((float *)(uintptr_t)f[0].b)[0] = INFINITY;
    ck_assert_int_eq(psoup_merge_factors(context, PSOUP_MERGE_SVD, a, b, 3, OUT, IN, f, weights,
                                         COUNT, NULL, &error), PSOUP_ERROR_ARGUMENT);
    free_factors(f);
}
END_TEST

/* ---- files ------------------------------------------------------------------------------------------ */

typedef struct recipe {
    const char *base;
    const char *sources[4];
    double weights[4];
    int32_t method, svd_rank, any_sum, dtype; /* dtype −1: kept */
} recipe;

static psoup_status run_recipe(psoup_context *in, const recipe *r, const char *directory,
                               psoup_merge_report *report) {
    psoup_status status;
    psoup_merger *merger = NULL;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    options.method = r->method;
    options.svd_rank = r->svd_rank;
    options.any_sum = r->any_sum;
    options.dtype = r->dtype;
    memset(&error, 0, sizeof error);
    PSOUP__TRY(psoup_merger_create(in, &options, &merger, &error));
    if (r->base != NULL)
        PSOUP__TRY(psoup_merger_set_base(merger, r->base, &error));
    for (int i = 0; i < 4 && r->sources[i] != NULL; i++)
        PSOUP__TRY(psoup_merger_add(merger, r->sources[i], r->weights[i], &error));
    PSOUP__TRY(psoup_merger_write(merger, directory, &error));
    if (report != NULL) {
        report->size = sizeof *report;
        PSOUP__TRY(psoup_merger_report(merger, report, &error));
    }
fail:
    psoup_merger_free(merger);
    return status;
}

static const char *const A = GOLDEN "a", *const B = GOLDEN "b", *const C = GOLDEN "c",
                         *const BASE = GOLDEN "base";

static double as_double(const psoup__tensor *tensor, size_t i) {
    float f;
    double d;
    if (tensor->dtype == PSOUP_F64) {
        memcpy(&d, (const char *)tensor->data + 8 * i, 8);
        return d;
    }
    size_t size = psoup_dtype_size(tensor->dtype);
    psoup__to_f32(context, &f, (const char *)tensor->data + size * i, tensor->dtype, 1);
    return (double)f;
}

/* An adapter's dense changes beside a golden file of them. */
static void compare_delta(const char *directory, const char *golden, double tolerance) {
    psoup__peft *peft;
    psoup__weights *expected;
    ck_ok(psoup__peft_open(context, directory, &peft, &error));
    ck_ok(psoup__weights_open(context, golden, "model", &expected, &error));
    ck_assert_uint_eq(peft->n, psoup__weights_count(expected));
    for (size_t p = 0; p < peft->n; p++) {
        const psoup__peft_pair *pair = &peft->pairs[p];
        const psoup__tensor *dense = psoup__weights_find(expected, pair->module);
        ck_assert_msg(dense != NULL, "%s", pair->module);
        int64_t out = pair->b.shape[0], in = pair->a.shape[1];
        double worst = 0;
        for (int64_t i = 0; i < out; i++)
            for (int64_t j = 0; j < in; j++) {
                double sum = 0;
                for (int32_t k = 0; k < pair->rank; k++)
                    sum += as_double(&pair->b, (size_t)(i * pair->rank + k)) *
                           as_double(&pair->a, (size_t)(k * in + j));
                sum *= (double)pair->scale;
                worst = fmax(worst, fabs(sum - as_double(dense, (size_t)(i * in + j))));
            }
        ck_assert_msg(worst <= tolerance, "%s: %g", pair->module, worst);
    }
    psoup__peft_free(peft);
    psoup__weights_free(expected);
}

static void compare_weights(const char *ours, const char *golden, double tolerance, size_t all) {
    psoup__weights *a, *b;
    ck_ok(psoup__weights_open(context, ours, "model", &a, &error));
    ck_ok(psoup__weights_open(context, golden, "model", &b, &error));
    ck_assert(all == 0 || psoup__weights_count(a) == psoup__weights_count(b));
    for (size_t t = 0; t < psoup__weights_count(b); t++) {
        char name[256];
        const psoup__tensor *y = psoup__weights_tensor(b, t);
        snprintf(name, sizeof name, "%s%s", psoup__weights_name(b, t), all ? "" : ".weight");
        const psoup__tensor *x = psoup__weights_find(a, name);
        ck_assert_msg(x != NULL, "%s", name);
        size_t n = y->bytes / psoup_dtype_size(y->dtype);
        ck_assert_uint_eq(x->bytes / psoup_dtype_size(x->dtype), n);
        for (size_t i = 0; i < n; i++)
            ck_assert_msg(fabs(as_double(x, i) - as_double(y, i)) <= tolerance, "%s %zu %g %g", name,
                          i, as_double(x, i), as_double(y, i));
    }
    psoup__weights_free(a);
    psoup__weights_free(b);
}

START_TEST(adapters_as_peft_merges_them) {
    psoup_merge_report report;
    recipe r = {.sources = {A, B}, .weights = {0.3, 0.7}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("cat"), &report));
    ck_assert_uint_eq(report.tensors, 8);
    ck_assert(report.worst_error == 0 && report.worst_name[0] == '\0');
    compare_delta(in_scratch("cat"), GOLDEN "cat.safetensors", 1e-6);
    r.method = PSOUP_MERGE_SVD;
    r.svd_rank = 3;
    ck_ok(run_recipe(context, &r, in_scratch("svd"), &report));
    compare_delta(in_scratch("svd"), GOLDEN "svd.safetensors", 1e-5);
    ck_assert(report.worst_error >= report.mean_error && report.mean_error > 0.01);
    ck_assert_ptr_nonnull(strstr(report.worst_name, "self_attn"));
    r.svd_rank = 8; /* all there is */
    ck_ok(run_recipe(context, &r, in_scratch("svd8"), &report));
    compare_delta(in_scratch("svd8"), GOLDEN "cat.safetensors", 1e-6);
    ck_assert_double_lt(report.worst_error, 1e-12);

    psoup_json *facts;
    ck_ok(psoup_json_read(context, GOLDEN "facts.json", &facts, &error));
    r = (recipe){.sources = {A, B}, .weights = {0.3, 0.7}, .method = PSOUP_MERGE_FACTORS, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("factors"), &report));
    ck_assert_double_eq_tol(report.worst_error,
                            psoup_json_real(psoup_json_get(facts, "factors_worst"), NAN), 1e-6);
    /* PEFT's "linear" is our factors with √(w s) on both sides. */
    psoup__peft *p[2], *merged;
    psoup__weights *linear;
    ck_ok(psoup__peft_open(context, A, &p[0], &error));
    ck_ok(psoup__peft_open(context, B, &p[1], &error));
    ck_ok(psoup__peft_open(context, in_scratch("factors"), &merged, &error));
    ck_ok(psoup__weights_open(context, GOLDEN "linear.safetensors", "model", &linear, &error));
    for (size_t m = 0; m < p[0]->n; m++) {
        const psoup__peft_pair *x = &p[0]->pairs[m], *y = &p[1]->pairs[m];
        const psoup__tensor *dense = psoup__weights_find(linear, x->module);
        int64_t out = x->b.shape[0], in = x->a.shape[1];
        float buffer[4 * 4 * 16], a[4 * 16], b[16 * 4];
        const psoup__tensor *four[4] = {&x->a, &y->a, &x->b, &y->b};
        for (int i = 0; i < 4; i++)
            memcpy(buffer + i * 64, four[i]->data, four[i]->bytes);
        const psoup_lora_factors f[2] = {{buffer, buffer + 128, 4, 1}, {buffer + 64, buffer + 192, 4, 1}};
        const double w[2] = {sqrt(0.3 * 2), sqrt(0.7 * 2)};
        ck_ok(psoup_merge_factors(context, PSOUP_MERGE_FACTORS, a, b, 4, out, in, f, w, 2, NULL,
                                  &error));
        for (int64_t i = 0; i < out * in; i++) {
            double sum = 0;
            for (int k = 0; k < 4; k++)
                sum += (double)b[i / in * 4 + k] * (double)a[k * in + i % in];
            ck_assert_double_eq_tol(sum, as_double(dense, (size_t)i), 2e-6);
        }
    }
    psoup__weights_free(linear);
    psoup__peft_free(merged);
    psoup__peft_free(p[0]);
    psoup__peft_free(p[1]);
    psoup_json_free(facts);
}
END_TEST

START_TEST(adapters_into_a_base) {
    psoup_merge_report report;
    recipe r = {.base = BASE, .sources = {A, B}, .weights = {0.3, 0.7}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("unloaded"), &report));
    compare_weights(in_scratch("unloaded"), GOLDEN "unloaded.safetensors", 1e-6, 1);
    ck_assert(psoup__file_exists(in_scratch("unloaded/config.json")));
    /* Other ranks, other scales, other modules: the dense f64 sum. */
    r = (recipe){.base = BASE, .sources = {A, B, C}, .weights = {0.5, 0.3, 0.2}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("folded"), &report));
    compare_weights(in_scratch("folded"), GOLDEN "folded.safetensors", 1e-6, 0);
    ck_assert_double_eq(report.worst_error, 0);
    /* Best of rank 3, with numpy's singular values beside. */
    r.method = PSOUP_MERGE_SVD;
    r.svd_rank = 3;
    psoup_json *facts;
    ck_ok(psoup_json_read(context, GOLDEN "facts.json", &facts, &error));
    ck_ok(run_recipe(context, &r, in_scratch("folded3"), &report));
    double worst = 0, sum = 0;
    const char *name = NULL, *worst_name = "";
    const psoup_json *errors = psoup_json_get(facts, "svd_errors");
    for (const psoup_json *e; (e = psoup_json_next(errors, &name)) != NULL;) {
        sum += psoup_json_real(e, NAN);
        if (psoup_json_real(e, NAN) > worst) {
            worst = psoup_json_real(e, NAN);
            worst_name = name;
        }
    }
    ck_assert_double_eq_tol(report.worst_error, worst, 1e-6);
    ck_assert_double_eq_tol(report.mean_error, sum / (double)psoup_json_size(errors), 1e-6);
    ck_assert_str_eq(report.worst_name, worst_name);
    psoup_json_free(facts);
    /* In another dtype, which config.json names. */
    r = (recipe){.base = BASE, .sources = {A, B}, .weights = {0.3, 0.7}, .dtype = PSOUP_BF16};
    ck_ok(run_recipe(context, &r, in_scratch("bf16"), NULL));
    compare_weights(in_scratch("bf16"), GOLDEN "unloaded.safetensors", 0x1p-8, 1);
    psoup_model_config config;
    ck_ok(psoup__hf_config_read(context, in_scratch("bf16"), &config, &error));
    ck_assert_int_eq(config.torch_dtype, PSOUP_BF16);
}
END_TEST

START_TEST(full_models_as_torch_sums_them) {
    recipe r = {.sources = {GOLDEN "model11", GOLDEN "model12"}, .weights = {0.37, 0.63}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("models"), NULL));
    compare_weights(in_scratch("models"), GOLDEN "models.safetensors", 0, 1);
    r = (recipe){.sources = {GOLDEN "model11"}, .weights = {1}, .dtype = PSOUP_F32};
    ck_ok(run_recipe(context, &r, in_scratch("one"), NULL));
    compare_weights(in_scratch("one"), GOLDEN "model11", 0, 1);
}
END_TEST

static void expect_same_file(const char *a, const char *b) {
    char *x, *y;
    size_t n, m;
    ck_ok(psoup__file_read(context, a, 1 << 24, &x, &n, &error));
    ck_ok(psoup__file_read(context, b, 1 << 24, &y, &m, &error));
    ck_assert_uint_eq(n, m);
    ck_assert_mem_eq(x, y, n);
    psoup__free(context, x);
    psoup__free(context, y);
}

START_TEST(new_weights_and_threads) {
    const double other[2] = {0.9, 0.1};
    recipe r = {.base = BASE, .sources = {A, B}, .weights = {0.9, 0.1}, .dtype = -1};
    psoup_context *alone = new_context(1, NULL);
    ck_ok(run_recipe(alone, &r, in_scratch("alone"), NULL));
    psoup_context_free(alone);
    psoup_merger *merger;
    ck_ok(psoup_merger_create(context, NULL, &merger, &error));
    ck_ok(psoup_merger_set_base(merger, BASE, &error));
    ck_ok(psoup_merger_add(merger, A, 0.3, &error));
    ck_ok(psoup_merger_add(merger, B, 0.7, &error));
    ck_ok(psoup_merger_write(merger, in_scratch("first"), &error));
    ck_ok(psoup_merger_set_weights(merger, other, 2, &error));
    ck_ok(psoup_merger_write(merger, in_scratch("second"), &error));
    expect_same_file(in_scratch("alone/model.safetensors"), in_scratch("second/model.safetensors"));
    ck_assert_int_eq(psoup_merger_set_weights(merger, other, 1, &error), PSOUP_ERROR_ARGUMENT);
    const double bad[2] = {0.9, 0.2}, nan[2] = {NAN, 1};
    ck_assert_int_eq(psoup_merger_set_weights(merger, bad, 2, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "1.1"));
    ck_assert_int_eq(psoup_merger_set_weights(merger, nan, 2, &error), PSOUP_ERROR_ARGUMENT);
    psoup_merger_free(merger);
}
END_TEST

/* ---- what is refused ------------------------------------------------------------------------------ */

/* A copy of golden/a whose tensors of a pattern are filled with a value, under another layer's name. */
static void spoil(const char *name, float value, const char *renamed) {
    psoup__peft *peft;
    ck_ok(psoup__peft_open(context, A, &peft, &error));
    float bad[256];
    for (int i = 0; i < 256; i++)
        bad[i] = value;
    if (value != 0)
        peft->pairs[1].b.data = bad;
    if (renamed != NULL)
        peft->pairs[1].module = renamed;
    const psoup__peft_output output = {.pairs = peft->pairs, .n = peft->n, .rank = 4, .alpha = 8};
    ck_ok(psoup__peft_write(context, in_scratch(name), &output, &error));
    psoup__peft_free(peft);
}

static void expect_refusal(recipe r, const char *says) {
    psoup_status status = run_recipe(context, &r, in_scratch("refused"), NULL);
    ck_assert_int_ne(status, PSOUP_OK);
    ck_assert_msg(strstr(error.message, says) != NULL, "%s", error.message);
    ck_assert(!psoup__file_exists(in_scratch("refused/model.safetensors")));
    ck_assert(!psoup__file_exists(in_scratch("refused/adapter_model.safetensors")));
}

START_TEST(refuses_what_cannot_be) {
    expect_refusal((recipe){.dtype = -1}, "nothing to merge");
    expect_refusal((recipe){.sources = {A, B}, .weights = {0.5, 0.6}, .dtype = -1}, "sum to 1.1");
    expect_refusal((recipe){.sources = {A, BASE}, .weights = {0.5, 0.5}, .dtype = -1}, "one kind");
    expect_refusal((recipe){.sources = {A, C}, .weights = {0.5, 0.5}, .dtype = -1,
                            .method = PSOUP_MERGE_FACTORS}, "expected equal ones");
    expect_refusal((recipe){.sources = {BASE, BASE}, .weights = {0.5, 0.5}, .dtype = -1,
                            .method = PSOUP_MERGE_SVD, .svd_rank = 2}, "only the method delta");
    expect_refusal((recipe){.sources = {A}, .weights = {1}, .dtype = -1, .method = PSOUP_MERGE_SVD},
                   "svd_rank 0");
    expect_refusal((recipe){.sources = {A}, .weights = {1}, .dtype = -1, .method = 9}, "method 9");
    expect_refusal((recipe){.sources = {A}, .weights = {1}, .dtype = PSOUP_I8}, "dtype i8");
    expect_refusal((recipe){.sources = {A}, .weights = {NAN}, .dtype = -1}, "weight 0 is nan");
    expect_refusal((recipe){.sources = {"/nowhere"}, .weights = {1}, .dtype = -1}, "/nowhere");
    expect_refusal((recipe){.base = BASE, .sources = {BASE}, .weights = {1}, .dtype = -1},
                   "a base goes with adapters");
    expect_refusal((recipe){.sources = {GOLDEN "a/adapter_model.safetensors"}, .weights = {1},
                            .dtype = -1}, "holds an adapter");
    expect_refusal((recipe){.sources = {BASE, GOLDEN "unloaded.safetensors", GOLDEN "cat.safetensors"},
                            .weights = {0.5, 0.25, 0.25}, .dtype = -1}, "has no tensor");
    recipe r = {.sources = {A, B}, .weights = {0.5, 0.7}, .dtype = -1, .any_sum = 1};
    ck_ok(run_recipe(context, &r, in_scratch("any"), NULL));
    ck_assert_int_eq(run_recipe(context, &r, in_scratch("any"), NULL), PSOUP_OK); /* over itself */

    char spoiled[1024];
    spoil("nan", NAN, NULL);
    snprintf(spoiled, sizeof spoiled, "%s", in_scratch("nan"));
    expect_refusal((recipe){.sources = {A, spoiled}, .weights = {0.5, 0.5}, .dtype = -1},
                   "layers.0.self_attn.v_proj.lora_B holds a NaN");
    expect_refusal((recipe){.base = BASE, .sources = {A, spoiled}, .weights = {0.5, 0.5}, .dtype = -1},
                   "holds a NaN");
    r = (recipe){.base = BASE, .sources = {A, spoiled}, .weights = {1, 0}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("skipped"), NULL)); /* weight 0 is not read */
    r.base = NULL;
    ck_ok(run_recipe(context, &r, in_scratch("skipped"), NULL));
    spoil("unknown", 0, "model.layers.7.self_attn.v_proj");
    snprintf(spoiled, sizeof spoiled, "%s", in_scratch("unknown"));
    expect_refusal((recipe){.base = BASE, .sources = {spoiled}, .weights = {1}, .dtype = -1},
                   "model.layers.7.self_attn.v_proj is not in the base");
    spoil("shape", 0, "model.layers.0.mlp.up_proj");
    snprintf(spoiled, sizeof spoiled, "%s", in_scratch("shape"));
    expect_refusal((recipe){.base = BASE, .sources = {spoiled}, .weights = {1}, .dtype = -1},
                   "another shape");
    spoil("huge", 1e6f, NULL);
    snprintf(spoiled, sizeof spoiled, "%s", in_scratch("huge"));
    expect_refusal((recipe){.sources = {spoiled}, .weights = {1}, .dtype = PSOUP_F16}, "too large");
    expect_refusal((recipe){.base = BASE, .sources = {spoiled}, .weights = {1}, .dtype = PSOUP_F16},
                   "too large for f16");
    r = (recipe){.sources = {A, B}, .weights = {0.5, 0.5}, .dtype = -1};
    ck_assert_int_eq(run_recipe(context, &r, A, NULL), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "is a source"));
}
END_TEST

START_TEST(refuses_spoiled_models) {
    psoup__safetensors_writer *writer;
    const int64_t shape[2] = {40, 64};
    float *values = noises(40 * 64);
    values[2222] = -INFINITY;
    for (int i = 0; i < 3; i++) {
        static const char *const names[] = {"good.safetensors", "inf.safetensors", "ints.safetensors"};
        static const int32_t ints[40 * 64] = {1};
        const void *data = i == 2 ? (const void *)ints : values;
        if (i == 1)
            values[2222] = -INFINITY;
        else
            values[2222] = 1;
        ck_ok(psoup__safetensors_create(context, in_scratch(names[i]), &writer, &error));
        ck_ok(psoup__safetensors_declare(writer, "w", i == 2 ? PSOUP_I32 : PSOUP_F32, 2, shape, &error));
        ck_ok(psoup__safetensors_begin(writer, &error));
        ck_ok(psoup__safetensors_write(writer, data, 40 * 64 * 4, &error));
        ck_ok(psoup__safetensors_commit(writer, &error));
        psoup__safetensors_writer_free(writer);
    }
    char good[1024], inf[1024], ints[1024];
    snprintf(good, sizeof good, "%s", in_scratch("good.safetensors"));
    snprintf(inf, sizeof inf, "%s", in_scratch("inf.safetensors"));
    snprintf(ints, sizeof ints, "%s", in_scratch("ints.safetensors"));
    expect_refusal((recipe){.sources = {good, inf}, .weights = {0.5, 0.5}, .dtype = -1},
                   "inf.safetensors: tensor w holds a NaN or infinity");
    expect_refusal((recipe){.sources = {good, ints}, .weights = {0.5, 0.5}, .dtype = -1},
                   "tensor w is i32");
    recipe r = {.sources = {good, inf}, .weights = {1, 0}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("fine"), NULL));
    compare_weights(in_scratch("fine"), good, 0, 1);
    r = (recipe){.sources = {ints, ints}, .weights = {0.5, 0.5}, .dtype = PSOUP_BF16};
    ck_ok(run_recipe(context, &r, in_scratch("kept"), NULL)); /* equal integers stay as they are */
    psoup__weights *kept;
    ck_ok(psoup__weights_open(context, in_scratch("kept"), "model", &kept, &error));
    ck_assert_int_eq(psoup__weights_find(kept, "w")->dtype, PSOUP_I32);
    psoup__weights_free(kept);
    free(values);
}
END_TEST

static int stop_at_two(void *user, const char *label, int64_t done, int64_t total) {
    ++*(int *)user;
    return label != NULL && total > 2 && done == 2;
}

START_TEST(can_be_cancelled) {
    int calls = 0;
    psoup_merger *merger;
    psoup_merge_report report = {.size = sizeof report};
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    options.progress = stop_at_two;
    options.progress_user = &calls;
    ck_ok(psoup_merger_create(context, &options, &merger, &error));
    ck_ok(psoup_merger_set_base(merger, BASE, &error));
    ck_ok(psoup_merger_add(merger, A, 1, &error));
    ck_assert_int_eq(psoup_merger_write(merger, in_scratch("stopped"), &error), PSOUP_ERROR_CANCELLED);
    ck_assert_int_eq(calls, 2);
    ck_assert(!psoup__file_exists(in_scratch("stopped/model.safetensors")));
    ck_assert_int_eq(psoup_merger_report(merger, &report, &error), PSOUP_ERROR_STATE);
    psoup_merger_free(merger);
}
END_TEST

START_TEST(survives_every_failed_allocation) {
    const recipe recipes[] = {
        {.base = BASE, .sources = {A, C}, .weights = {0.5, 0.5}, .dtype = PSOUP_F16,
         .method = PSOUP_MERGE_SVD, .svd_rank = 2},
        {.sources = {A, B}, .weights = {0.5, 0.5}, .dtype = -1, .method = PSOUP_MERGE_FACTORS},
        {.sources = {GOLDEN "model11", GOLDEN "model12"}, .weights = {0.5, 0.5}, .dtype = PSOUP_F32}};
    int before = live, n = 0;
    psoup_status status;
    do {
        allocations = 0;
        fail_at = n++;
        status = run_recipe(context, &recipes[_i], scratch, NULL);
        fail_at = -1;
        ck_assert_int_eq(live, before);
        ck_assert_msg(status == PSOUP_OK || status == PSOUP_ERROR_MEMORY, "%d: %s", n,
                      error.message);
    } while (status != PSOUP_OK);
    ck_assert_int_gt(n, 30);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("merge");
    TCase *tests = tcase_create("merge");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, sums_are_rounded_once, 0, 9);
    tcase_add_test(tests, large_sums_are_the_same_on_all_paths);
    tcase_add_test(tests, sums_refuse_nonsense);
    tcase_add_test(tests, qr_is_one);
    tcase_add_test(tests, svd_is_one);
    tcase_add_loop_test(tests, folds_into_a_base, 0, 3);
    tcase_add_test(tests, merges_factors);
    tcase_add_loop_test(tests, svd_is_what_it_says, 0, 2);
    tcase_add_test(tests, adapters_as_peft_merges_them);
    tcase_add_test(tests, adapters_into_a_base);
    tcase_add_test(tests, full_models_as_torch_sums_them);
    tcase_add_test(tests, new_weights_and_threads);
    tcase_add_test(tests, refuses_what_cannot_be);
    tcase_add_test(tests, refuses_spoiled_models);
    tcase_add_test(tests, can_be_cancelled);
    tcase_add_loop_test(tests, survives_every_failed_allocation, 0, 3);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? 0 : 1;
}
