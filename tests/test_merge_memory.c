/* Merging in the caller's memory: memory, views and folds on every instruction set, against plain loops. */
#include "merge_case.h"

static const char *const isas[] = {"generic", "avx2", "avx512"};
enum { ISAS = 3 };

static const psoup_dtype narrow[] = {PSOUP_F32, PSOUP_F16, PSOUP_BF16};

/* ---- sums --------------------------------------------------------------------------------------- */

/* What a sum is, one element at a time. */
static void plain_sum(void *out, psoup_dtype out_dtype, float *const *in, const double *weights,
                      size_t count, size_t n) {
    float *sum = calloc(n + 1, sizeof *sum);
    for (size_t j = 0; j < n; j++) {
        bool first = true;
        for (size_t i = 0; i < count; i++) {
            if (weights[i] == 0)
                continue;
            volatile float product = (float)weights[i] * in[i][j];
            volatile float acc = first ? product : sum[j] + product;
            sum[j] = acc;
            first = false;
        }
    }
    psoup__from_f32(context, out, out_dtype, sum, n);
    free(sum);
}

/* Numbers of all sizes, so that f16 and bf16 overflow and go under; few NaN and infinities, none where
 * `tame`. */
static float *wild(size_t n, bool tame) {
    float *x = noises(n);
    for (size_t j = 0; j < n; j++) {
        x[j] = ldexpf(x[j], (int)(j * 7 % 61) - 40);
        if (!tame && j % 97 == 13)
            x[j] = j % 2 == 0 ? INFINITY : NAN;
        if (!tame && j % 97 == 50)
            x[j] *= 0x1p120f;
    }
    return x;
}

/* _i: which dtype goes in (3: mixed) and out. */
START_TEST(sums_are_the_same_on_every_path) {
    static const size_t counts[] = {1, 2, 3, 8, 32, 35}, sizes[] = {1, 31, 64, 129, 3001};
    psoup_dtype to = narrow[_i / 4];
    for (size_t c = 0; c < 6; c++)
        for (size_t k = 0; k < 5; k++) {
            size_t n = sizes[k], count = counts[c], size = psoup_dtype_size(to);
            float *wide[35];
            char *raw[35], *place = malloc(n * size + 64), *expected = malloc(n * size);
            const void *in[35];
            psoup_dtype dtypes[35];
            double weights[35];
            for (size_t i = 0; i < count; i++) {
                dtypes[i] = narrow[_i % 4 < 3 ? (size_t)_i % 4 : i % 3];
                float *x = wild(n, i > 0); /* two NaN in one sum: which is kept is the machine's */
                wide[i] = malloc(n * sizeof(float));
                raw[i] = malloc(n * psoup_dtype_size(dtypes[i]) + 1);
                char *at = raw[i] + (i % 5 == 2);
                psoup__from_f32(context, at, dtypes[i], x, n);
                psoup__to_f32(context, wide[i], at, dtypes[i], n);
                in[i] = at;
                weights[i] = i == 4 ? 0 : (double)noise();
                free(x);
            }
            plain_sum(expected, to, wide, weights, count, n);
            for (int isa = 0; isa < ISAS; isa++) {
                psoup_context *other = new_context(2, isas[isa]);
                if (other == NULL)
                    continue;
                for (size_t off = 0; off < 3; off++) {
                    const psoup__sum_args args = {.out = place + off, .out_dtype = to, .in = in,
                                                  .dtypes = dtypes, .weights = weights,
                                                  .count = count, .n = n};
                    psoup__sum(other, &args);
                    ck_assert_msg(memcmp(place + off, expected, n * size) == 0,
                                  "%s, %zu inputs of %zu, off %zu", isas[isa], count, n, off);
                }
                psoup_context_free(other);
            }
            for (size_t i = 0; i < count; i++) {
                free(wide[i]);
                free(raw[i]);
            }
            free(place);
            free(expected);
        }
}
END_TEST

/* Outputs large enough to pass the caches by, at addresses that begin within a line. */
START_TEST(streamed_sums_are_the_same) {
    enum { N = (16 << 20) / 2 + 777 };
    uint16_t *in[3], *out = malloc(N * 2 + 64), *expected = malloc(N * 2);
    const double weights[3] = {0.5, 0.3, 0.2};
    for (int i = 0; i < 3; i++) {
        in[i] = malloc(N * 2);
        for (size_t j = 0; j < N; j++) /* finite bf16 */
            in[i][j] = (uint16_t)(0x3c00 + (j * 2654435761u >> (7 + i)) % 0x300);
    }
    for (int isa = 0; isa < ISAS; isa++) {
        psoup_context *other = new_context(2, isas[isa]);
        if (other == NULL)
            continue;
        for (size_t k = 0; k < 3; k++) {
            static const size_t offs[] = {0, 3, 17};
            uint16_t *to = k == 0 && isa == 0 ? expected : out + offs[k];
            ck_ok(psoup_merge_sum(other, to, PSOUP_BF16, (const void *const *)in, PSOUP_BF16, weights, 3,
                                  N, &error));
            ck_assert_mem_eq(to, expected, N * 2);
        }
        psoup_context_free(other);
    }
    for (size_t j = 0; j < N; j += 4099) {
        float x[3], sum;
        uint16_t rounded;
        for (int i = 0; i < 3; i++)
            psoup__to_f32(context, &x[i], &in[i][j], PSOUP_BF16, 1);
        volatile float acc = 0.5f * x[0], product = 0.3f * x[1];
        acc = acc + product;
        product = 0.2f * x[2];
        sum = acc + product;
        psoup__from_f32(context, &rounded, PSOUP_BF16, &sum, 1);
        ck_assert_uint_eq(rounded, expected[j]);
    }
    for (int i = 0; i < 3; i++)
        free(in[i]);
    free(out);
    free(expected);
}
END_TEST

/* ---- folds --------------------------------------------------------------------------------------- */

/* One product per adapter on sums in f32. */
static void plain_fold(psoup_context *in_context, void *out, const void *base, psoup_dtype dtype, int64_t rows,
                       int64_t columns, const psoup_lora_factors *factors, const double *weights,
                       size_t count) {
    const size_t n = (size_t)(rows * columns);
    float *acc = malloc(n * sizeof *acc);
    psoup__to_f32(in_context, acc, base, dtype, n);
    for (size_t i = 0; i < count; i++) {
        const psoup__gemm_args args = {.m = rows, .n = columns, .k = factors[i].rank, .c = acc,
                                       .c_stride = columns, .accumulate = true, .a = factors[i].b,
                                       .a_row = factors[i].rank, .a_col = 1,
                                       .alpha = (float)(weights[i] * (double)factors[i].scale),
                                       .b = factors[i].a, .b_row = columns, .b_col = 1};
        if (weights[i] != 0)
            psoup__gemm(in_context, &args);
    }
    psoup__from_f32(in_context, out, dtype, acc, n);
    free(acc);
}

/* _i: the dtype. */
START_TEST(folds_have_the_bits_of_a_product_per_adapter) {
    static const int64_t shapes[][2] = {{1, 1}, {7, 64}, {100, 65}, {193, 1100}, {6, 2048}, {13, 15}};
    static const int32_t ranks[4] = {3, 16, 1, 70};
    const double weights[4] = {0.5, 0, -0.75, 1.25};
    psoup_dtype dtype = narrow[_i];
    for (int k = 0; k < 6; k++) {
        int64_t rows = shapes[k][0], columns = shapes[k][1];
        size_t n = (size_t)(rows * columns), size = psoup_dtype_size(dtype);
        psoup_lora_factors f[4];
        float *wide = noises(n), *kept[8];
        char *base = malloc(n * size), *out = malloc(n * size), *expected = malloc(n * size);
        psoup__from_f32(context, base, dtype, wide, n);
        for (int i = 0; i < 4; i++) {
            f[i].a = kept[2 * i] = noises((size_t)(ranks[i] * columns));
            f[i].b = kept[2 * i + 1] = noises((size_t)(ranks[i] * rows));
            f[i].rank = ranks[i];
            f[i].scale = 0.3f * (float)(i + 1);
        }
        kept[2][0] = NAN; /* the weight is 0: it is never read */
        for (int isa = 0; isa < ISAS; isa++)
            for (size_t count = 1; count <= 4; count += 3) {
                psoup_context *other = new_context(2, isas[isa]);
                if (other == NULL)
                    continue;
                plain_fold(other, expected, base, dtype, rows, columns, f, weights, count);
                ck_ok(psoup_merge_fold(other, out, base, dtype, rows, columns, f, weights, count, &error));
                ck_assert_msg(memcmp(out, expected, n * size) == 0, "%s, %d × %d", isas[isa], (int)rows,
                              (int)columns);
                psoup_context_free(other);
            }
        for (int i = 0; i < 8; i++)
            free(kept[i]);
        free(wide);
        free(base);
        free(out);
        free(expected);
    }
}
END_TEST

/* Large enough to pass the caches by. */
START_TEST(streamed_folds_are_the_same) {
    enum { ROWS = 2100, COLUMNS = 2048, RANK = 4 };
    float *a = noises(RANK * COLUMNS), *b = noises(ROWS * RANK);
    const psoup_lora_factors f = {a, b, RANK, 0.5f};
    const double weight = 0.7;
    size_t bytes = (size_t)ROWS * COLUMNS * 2;
    char *base = aligned_alloc(64, bytes), *out = aligned_alloc(64, bytes), *expected = malloc(bytes);
    for (size_t j = 0; j < bytes; j++)
        base[j] = (char)(j % 2 == 0 ? j * 31 % 251 : 0x3c);
    for (int isa = 0; isa < ISAS; isa++) {
        psoup_context *other = new_context(2, isas[isa]);
        if (other == NULL)
            continue;
        plain_fold(other, expected, base, PSOUP_BF16, ROWS, COLUMNS, &f, &weight, 1);
        ck_ok(psoup_merge_fold(other, out, base, PSOUP_BF16, ROWS, COLUMNS, &f, &weight, 1, &error));
        ck_assert_mem_eq(out, expected, bytes);
        psoup_context_free(other);
    }
    free(a);
    free(b);
    free(base);
    free(out);
    free(expected);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("merge in memory");
    TCase *memory = tcase_create("memory");
    tcase_set_timeout(memory, 300);
    tcase_add_checked_fixture(memory, set_up, tear_down);
    tcase_add_loop_test(memory, sums_are_the_same_on_every_path, 0, 12);
    tcase_add_test(memory, streamed_sums_are_the_same);
    tcase_add_loop_test(memory, folds_have_the_bits_of_a_product_per_adapter, 0, 3);
    tcase_add_test(memory, streamed_folds_are_the_same);
    suite_add_tcase(suite, memory);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
