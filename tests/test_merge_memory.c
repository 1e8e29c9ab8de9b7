/* Merging in the caller's memory: sums, views and folds on every instruction set, against plain loops. */
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

int main(void) {
    Suite *suite = suite_create("merge in memory");
    TCase *sums = tcase_create("sums");
    tcase_set_timeout(sums, 300);
    tcase_add_checked_fixture(sums, set_up, tear_down);
    tcase_add_loop_test(sums, sums_are_the_same_on_every_path, 0, 12);
    tcase_add_test(sums, streamed_sums_are_the_same);
    suite_add_tcase(suite, sums);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
