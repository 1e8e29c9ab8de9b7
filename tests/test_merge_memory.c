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

/* ---- new weights for many modules ----------------------------------------------------------------- */

/* delta or factors as the formulas have them, in f64. */
static void plain_factors(bool delta, float *a, float *b, const psoup_merge_module *m) {
    int64_t at = 0;
    memset(a, 0, (size_t)m->rank * (size_t)m->in_features * sizeof *a);
    memset(b, 0, (size_t)m->rank * (size_t)m->out_features * sizeof *b);
    for (size_t f = 0; f < m->count && delta; at += m->factors[f++].rank) {
        const psoup_lora_factors *x = &m->factors[f];
        for (int64_t i = 0; i < x->rank * m->in_features && m->weights[f] != 0; i++)
            a[at * m->in_features + i] = x->a[i];
        for (int64_t i = 0; i < x->rank * m->out_features && m->weights[f] != 0; i++)
            b[i / x->rank * m->rank + at + i % x->rank] =
                (float)(m->weights[f] * (double)x->scale * (double)x->b[i]);
    }
    for (int of_b = 0; of_b < 2 && !delta; of_b++)
        for (int64_t i = 0; i < m->rank * (of_b ? m->out_features : m->in_features); i++) {
            double sum = 0;
            for (size_t f = 0; f < m->count; f++)
                if (m->weights[f] != 0)
                    sum += m->weights[f] * (double)(of_b ? m->factors[f].b : m->factors[f].a)[i];
            (of_b ? b : a)[i] = (float)((of_b ? (double)m->factors[0].scale : 1) * sum);
        }
}

/* _i: 0 ranks of their own, delta; 1 equal ranks, delta; 2 equal ranks, factors. Large enough together to
 * pass the caches by. */
START_TEST(batches_are_every_module_by_itself) {
    enum { MODULES = 9, COUNT = 3 };
    static const int32_t uneven[COUNT] = {16, 5, 32};
    const double weights[COUNT] = {0.5, _i == 1 ? 0 : 0.3, 0.2};
    psoup_lora_factors f[MODULES][COUNT];
    psoup_merge_module m[MODULES];
    float *kept[MODULES][COUNT][2], *a[MODULES], *b[MODULES];
    for (int k = 0; k < MODULES; k++) {
        int64_t in = k == 0 ? 6400 : 3000 + k, out = k == 1 ? 1 : 4096 - 3 * k;
        m[k] = (psoup_merge_module){.factors = f[k], .weights = weights, .count = COUNT, .in_features = in,
                                    .out_features = out};
        for (int i = 0; i < COUNT; i++) {
            int32_t rank = _i == 0 ? uneven[i] : 32;
            kept[k][i][0] = noises((size_t)(rank * in));
            kept[k][i][1] = noises((size_t)(rank * out));
            f[k][i] = (psoup_lora_factors){kept[k][i][0], kept[k][i][1], rank, 2.5f};
            m[k].rank += _i == 2 && i > 0 ? 0 : rank;
        }
        if (_i == 1)
            kept[k][1][0][0] = NAN;
        m[k].a_out = aligned_alloc(64, ((size_t)(m[k].rank * in) * 4 + 63) / 64 * 64);
        m[k].b_out = aligned_alloc(64, ((size_t)(m[k].rank * out) * 4 + 63) / 64 * 64);
        a[k] = malloc((size_t)(m[k].rank * in) * 4);
        b[k] = malloc((size_t)(m[k].rank * out) * 4);
        plain_factors(_i < 2, a[k], b[k], &m[k]);
    }
    psoup_merge_method method = _i < 2 ? PSOUP_MERGE_DELTA : PSOUP_MERGE_FACTORS;
    for (int isa = 0; isa < ISAS; isa++) {
        psoup_context *other = new_context(1 + isa, isas[isa]);
        if (other == NULL)
            continue;
        ck_ok(psoup_merge_factors_batch(other, method, m, MODULES, 0, &error));
        for (int k = 0; k < MODULES; k++) {
            ck_assert_mem_eq(m[k].a_out, a[k], (size_t)(m[k].rank * m[k].in_features) * 4);
            ck_assert_mem_eq(m[k].b_out, b[k], (size_t)(m[k].rank * m[k].out_features) * 4);
            memset(m[k].b_out, 0xff, (size_t)(m[k].rank * m[k].out_features) * 4);
        }
        psoup_context_free(other);
    }
    if (_i < 2) { /* B alone */
        float *kept_a = m[0].a_out;
        m[0].a_out = NULL;
        ck_ok(psoup_merge_factors_batch(context, method, m, MODULES, 1, &error));
        ck_assert_mem_eq(m[0].b_out, b[0], (size_t)(m[0].rank * m[0].out_features) * 4);
        ck_assert(m[0].relative_error == 0);
        m[0].a_out = kept_a;
    } else {
        double alone = 0;
        ck_ok(psoup_merge_factors_batch(context, method, m, 2, 1, &error));
        ck_ok(psoup_merge_factors(context, method, a[1], b[1], m[1].rank, m[1].out_features,
                                  m[1].in_features, f[1], weights, COUNT, &alone, &error));
        ck_assert(alone > 0 && alone == m[1].relative_error);
        double exact = 0; /* the other way to it */
        ck_ok(psoup__factors_between(context, method, NULL, NULL, 0, m[1].out_features, m[1].in_features, f[1],
                                     weights, COUNT, 3 * 32, &exact, &error));
        ck_assert_double_eq_tol(alone / exact, 1, 1e-9);
        float *a_of_1 = m[1].a_out;
        m[1].a_out = NULL;
        ck_assert_int_eq(psoup_merge_factors_batch(context, method, m, 2, 0, &error), PSOUP_ERROR_ARGUMENT);
        ck_assert_ptr_nonnull(strstr(error.message, "module 1"));
        m[1].a_out = a_of_1;
        m[1].reserved[3] = 1;
        ck_assert_int_eq(psoup_merge_factors_batch(context, method, m, 2, 0, &error), PSOUP_ERROR_ARGUMENT);
        ck_assert_ptr_nonnull(strstr(error.message, "module 1: psoup_merge_factors: reserved is not 0"));
        m[1].reserved[3] = 0;
        m[0].reserved32 = 1;
        ck_assert_int_eq(psoup_merge_factors_batch(context, method, m, 2, 0, &error), PSOUP_ERROR_ARGUMENT);
        m[0].reserved32 = 0;
    }
    for (int k = 0; k < MODULES; k++) {
        for (int i = 0; i < COUNT * 2; i++)
            free(kept[k][i / 2][i % 2]);
        free(m[k].a_out);
        free(m[k].b_out);
        free(a[k]);
        free(b[k]);
    }
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
    tcase_add_loop_test(memory, batches_are_every_module_by_itself, 0, 3);
    suite_add_tcase(suite, memory);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
