/* The merger in memory: sums, small dense problems and factors, against dense f64 sums. */
#include "merge_case.h"

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

/* x = Q R with orthonormal Q: one block, several, several levels; columns that are equal, zero, tiny or huge. */
START_TEST(qr_is_one) {
    static const int64_t shapes[][2] = {{1, 1}, {5, 5}, {40, 7}, {9, 1}, {1300, 3}, {700, 96}, {70000, 5}};
    for (int k = 0; k < 9; k++) {
        int64_t m = shapes[k % 7][0], n = shapes[k % 7][1];
        float *x = noises((size_t)(m * n)); /* columns contiguous */
        double *eye = calloc((size_t)(n * n), sizeof *eye), *q = malloc((size_t)(m * n) * sizeof *q);
        for (int64_t i = 0; i < m * n; i++)
            x[i] = k < 7 ? x[i] : k == 7 ? 0 : x[i] * (i / m % 2 ? 1e30f : 1e-30f);
        if (m == 1300)
            for (int64_t i = 0; i < m; i++) {
                x[m + i] = x[i];
                x[2 * m + i] = 0;
            }
        for (int64_t i = 0; i < n; i++)
            eye[i * n + i] = 1;
        psoup__qr *qr;
        ck_ok(psoup__qr_create(context, m, n, &qr, &error));
        for (int64_t j = 0; j < n; j++)
            psoup__qr_column(qr, j, x + j * m, 1);
        psoup__qr_run(qr);
        ck_ok(psoup__qr_apply(qr, eye, n, q, &error));
        const double *r = psoup__qr_r(qr);
        for (int64_t j = 0; j < n; j++)
            for (int64_t i = 0; i < m; i++) {
                double sum = 0, size = 0;
                for (int64_t p = 0; p < n; p++) {
                    sum += q[p * m + i] * r[p * n + j];
                    size = fmax(size, fabs(r[p * n + j]));
                }
                ck_assert_double_le(fabs(sum - (double)x[j * m + i]), 1e-13 * size);
            }
        for (int64_t a = 0; a < n; a++)
            for (int64_t b = 0; b < n; b++) {
                double dot = 0;
                for (int64_t i = 0; i < m; i++)
                    dot += q[a * m + i] * q[b * m + i];
                ck_assert_double_eq_tol(dot, a == b, 1e-12);
                ck_assert(a <= b || r[a * n + b] == 0);
            }
        psoup__qr_free(qr);
        free(x);
        free(eye);
        free(q);
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
        psoup__svd(context, u, s, vt, N);
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
    psoup__svd(context, square, s, vt, OUT);
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
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
