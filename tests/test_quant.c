/* Weights in blocks, int8 and nf4: the format against bitsandbytes' and against its definition, and products bit
 * for bit against those with the blocks' values. Golden: tests/golden/quant.py. */
#include "format/format.h"
#include "gemm_case.h"

static const psoup_dtype dtypes[] = {PSOUP_INT8, PSOUP_NF4};

/* Numbers in blocks, with their values beside them. */
typedef struct quantised {
    psoup__blocks blocks;
    uint8_t *codes;
    float *scales, *values;
    size_t n;
} quantised;

static quantised quantise(psoup_context *context, psoup_dtype dtype, const float *in, size_t n) {
    quantised q = {.n = n};
    q.codes = malloc(psoup__block_bytes(dtype, n) + 1);
    q.scales = malloc(psoup__block_count(n) * sizeof(float) + 1);
    q.values = malloc(n * sizeof(float) + 1);
    psoup__blocks_write(context, dtype, in, n, q.codes, q.scales);
    q.blocks = (psoup__blocks){dtype, q.codes, q.scales};
    psoup__blocks_read(context, &q.blocks, 0, n, q.values);
    return q;
}

static void quantised_free(quantised *q) {
    free(q->codes), free(q->scales), free(q->values);
}

static float largest(const float *x, size_t n) {
    float most = 0;
    for (size_t i = 0; i < n; i++)
        most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    return most;
}

/* ---- the format ----------------------------------------------------------------------------------- */

/* Every value is a nearest one of those that its block has, of any length and on every instruction set; whatever
 * is read from the middle is the same. */
START_TEST(test_nearest) {
    psoup_context *context = context_of(isas[_i], 2);
    static const size_t counts[] = {1, 2, 63, 64, 65, 127, 300, 64 * 40, (1 << 16) + 64 * 3 + 7};
    if (context == NULL)
        return;
    for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
        for (int d = 0; d < 2; d++) {
            const size_t n = counts[c];
            state = n;
            float *x = numbers(n), *part = malloc(n * sizeof *part + 1);
            for (size_t i = 0; i < n; i++)
                x[i] *= ldexpf(1, (int)(i / 64 % 40) - 20) * x[i] * x[i];
            quantised q = quantise(context, dtypes[d], x, n);
            for (size_t i = 0; i < n; i++) {
                const float alone = psoup__block_value(&q.blocks, i);
                check_same(&q.values[i], &alone, 1, "a value alone");
                if (i > 300 && i % 16 != 5) /* comparing with all values takes its time */
                    continue;
                const size_t block = i / 64 * 64;
                const float most = largest(x + block, n - block < 64 ? n - block : 64);
                double best = INFINITY;
                for (int k = 0; k < (d ? 16 : 255); k++) {
                    const double value = d ? (double)psoup__nf4_level[k] * most : (k - 127) / 127.0 * most;
                    best = fmin(best, fabs(value - x[i]));
                }
                ck_assert_float_eq(q.scales[i / 64], d ? most : most / 127.0f);
                ck_assert_msg(fabs((double)q.values[i] - x[i]) <= best + 1e-6 * most, "%s [%zu]: %a is read as %a",
                              psoup_dtype_name(dtypes[d]), i, x[i], q.values[i]);
            }
            for (int trial = 0; trial < 20; trial++) {
                const size_t at = (size_t)below((int)n), some = (size_t)below((int)(n - at) + 1);
                psoup__blocks_read(context, &q.blocks, at, some, part);
                check_same(q.values + at, part, some, "a part");
            }
            quantised_free(&q);
            free(x), free(part);
        }
    psoup_context_free(context);
}
END_TEST

/* Blocks of zeros, of NaN and infinity, of the smallest and the largest numbers; neighbours stay as they are. */
START_TEST(test_corners) {
    psoup_context *context = context_of(isas[_i], 1);
    static const float corners[] = {0, -0.0f, NAN, INFINITY, -INFINITY, 0x1p-149f, 0x1p-126f, 0x1p-119f, 0x1p-118f,
                                    0x1.fffffep127f, -0x1.fffffep127f};
    if (context == NULL)
        return;
    for (size_t c = 0; c < sizeof corners / sizeof *corners; c++)
        for (int d = 0; d < 2; d++) {
            float x[3 * 64];
            state = c;
            for (int i = 0; i < 3 * 64; i++)
                x[i] = i / 64 == 1 ? 0 : uniform();
            x[64 + 17] = corners[c];
            quantised q = quantise(context, dtypes[d], x, 3 * 64);
            quantised clean = quantise(context, dtypes[d], x, 64);
            check_same(clean.values, q.values, 64, "the block before");
            quantised_free(&clean);
            clean = quantise(context, dtypes[d], x + 128, 64);
            check_same(clean.values, q.values + 128, 64, "the block after");
            quantised_free(&clean);
            for (int i = 64; i < 128; i++)
                if (!isfinite(corners[c]))
                    ck_assert_msg(isnan(q.values[i]), "%g is lost", corners[c]);
                else if (i != 64 + 17)
                    ck_assert_float_eq(q.values[i], 0);
                else if (d == 0 && fabsf(corners[c]) / 127 < 0x1p-126f)
                    ck_assert_float_eq(q.values[i], 0);
                else
                    ck_assert_float_le(fabsf(q.values[i] - corners[c]), 1e-6f * fabsf(corners[c]));
            quantised_free(&q);
        }
    psoup_context_free(context);
}
END_TEST

static const psoup__tensor *golden_tensor(psoup__safetensors *file, int number, const char *what) {
    char name[64];
    snprintf(name, sizeof name, "%d.%s", number, what);
    for (size_t i = 0; i < psoup__safetensors_count(file); i++)
        if (strcmp(psoup__safetensors_name(file, i), name) == 0)
            return psoup__safetensors_tensor(file, i);
    return NULL;
}

/* What bitsandbytes makes of the same numbers: codes and scales byte for byte, nf4's values too; int8's it takes by
 * two products, and ours by one. */
START_TEST(test_bitsandbytes) {
    psoup_context *context = context_of(isas[_i], 2);
    psoup__safetensors *file = NULL;
    psoup_error error;
    int n_int8 = 0;
    if (context == NULL)
        return;
    ck_assert_int_eq(psoup__safetensors_open(context, "tests/golden/quant/blocks.safetensors", &file, &error), 0);
    ck_assert_int_eq(psoup__safetensors_map(file, &error), PSOUP_OK);
    for (int number = 0; number < 5; number++) {
        const psoup__tensor *in = golden_tensor(file, number, "in");
        const size_t n = in->bytes / sizeof(float);
        float *x = malloc(in->bytes), *values = malloc(in->bytes);
        memcpy(x, in->data, in->bytes);
        quantised q = quantise(context, PSOUP_NF4, x, n);
        ck_assert_uint_eq(golden_tensor(file, number, "nf4.codes")->bytes, psoup__block_bytes(PSOUP_NF4, n));
        ck_assert_mem_eq(q.codes, golden_tensor(file, number, "nf4.codes")->data, n / 2);
        if (n % 2) /* the half behind the last one is nobody's: ours is 0 */
            ck_assert_int_eq(q.codes[n / 2] >> 4,
                             ((const uint8_t *)golden_tensor(file, number, "nf4.codes")->data)[n / 2] >> 4);
        ck_assert_mem_eq(q.scales, golden_tensor(file, number, "nf4.scales")->data, psoup__block_count(n) * 4);
        ck_assert_mem_eq(q.values, golden_tensor(file, number, "nf4.values")->data, n * 4);
        quantised_free(&q);
        if (golden_tensor(file, number, "int8.codes")) {
            q = quantise(context, PSOUP_INT8, x, n);
            ck_assert_mem_eq(q.codes, golden_tensor(file, number, "int8.codes")->data, n);
            memcpy(values, golden_tensor(file, number, "int8.scales")->data, psoup__block_count(n) * 4);
            for (size_t i = 0; i < psoup__block_count(n); i++)
                ck_assert_float_eq(q.scales[i], values[i] / 127.0f);
            memcpy(values, golden_tensor(file, number, "int8.values")->data, n * 4);
            for (size_t i = 0; i < n; i++)
                ck_assert_float_le(fabsf(q.values[i] - values[i]), 3e-7f * fabsf(values[i]));
            quantised_free(&q);
            n_int8++;
        }
        free(x), free(values);
    }
    ck_assert_int_ge(n_int8, 2);
    psoup__safetensors_free(file);
    psoup_context_free(context);
}
END_TEST

/* ---- products ------------------------------------------------------------------------------------- */

/* x · Wᵀ and dy · W with W in blocks have the bits of those with its values, of any shape, for any rows, threads
 * and instruction set, also where B's rows are gathered. */
START_TEST(test_product) {
    static const int ins[] = {1, 16, 37, 48, 64, 96, 130, 256, 400, 688, 1024}, outs[] = {1, 3, 16, 37, 64, 130, 333};
    static const int rows[] = {1, 2, 5, 6, 7, 17, 33, 96, 97, 200};
    psoup_context *contexts[] = {context_of(isas[_i], 1), context_of(isas[_i], 2), context_of(isas[_i], 3)};
    if (contexts[0] == NULL)
        return;
    for (int trial = 0; trial < 44; trial++) {
        state = (uint64_t)trial * 31 + 3;
        const int in = ins[trial % 11], out = outs[below(7)], m = rows[below(10)], d = below(2), back = below(2);
        const int k = back ? out : in, n = back ? in : out;
        float *w = numbers((size_t)(in * out)), *a = numbers((size_t)(m * k)), *c0 = numbers((size_t)(m * n));
        float *want = malloc((size_t)(m * n) * sizeof *want), *got = malloc((size_t)(m * n) * sizeof *got);
        quantised q = quantise(contexts[1], dtypes[d], w, (size_t)(in * out));
        int32_t *gather = below(4) ? NULL : repeated(k, k);
        psoup__gemm_args g = {.m = m, .n = n, .k = k, .c = want, .c_stride = n, .accumulate = below(2), .a = a,
                              .a_row = k, .a_col = 1, .alpha = below(2) ? 1 : 0.5f, .b = q.values,
                              .b_row = back ? in : 1, .b_col = back ? 1 : in, .b_depth = gather};
        memcpy(want, c0, (size_t)(m * n) * sizeof *want);
        psoup__gemm(contexts[0], &g);
        g.b = q.codes;
        g.b_scales = q.scales;
        g.b_dtype = dtypes[d];
        g.c = got;
        for (int t = 0; t < 3; t++) {
            memcpy(got, c0, (size_t)(m * n) * sizeof *got);
            psoup__gemm(contexts[t], &g);
            check_same(want, got, (size_t)(m * n), psoup_dtype_name(dtypes[d]));
        }
        quantised_free(&q);
        free(w), free(a), free(c0), free(want), free(got), free(gather);
    }
    for (int t = 0; t < 3; t++)
        psoup_context_free(contexts[t]);
}
END_TEST

/* Every instruction set writes the same blocks. */
START_TEST(test_instruction_sets) {
    enum { N = 64 * 1000 + 13 };
    state = 9;
    float *x = numbers(N);
    psoup_context *context = context_of("generic", 2);
    for (int d = 0; context != NULL && d < 2; d++) {
        quantised want = quantise(context, dtypes[d], x, N);
        for (size_t i = 1; i < sizeof isas / sizeof *isas; i++) {
            psoup_context *other = context_of(isas[i], 1);
            if (other == NULL)
                continue;
            quantised got = quantise(other, dtypes[d], x, N);
            ck_assert_mem_eq(want.codes, got.codes, psoup__block_bytes(dtypes[d], N));
            check_same(want.scales, got.scales, psoup__block_count(N), isas[i]);
            check_same(want.values, got.values, N, isas[i]);
            quantised_free(&got);
            psoup_context_free(other);
        }
        quantised_free(&want);
    }
    psoup_context_free(context);
    free(x);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("quant");
    TCase *format = tcase_create("format"), *products = tcase_create("products");
    tcase_set_timeout(format, 120);
    tcase_set_timeout(products, 240);
    tcase_add_loop_test(format, test_nearest, 0, sizeof isas / sizeof *isas);
    tcase_add_loop_test(format, test_corners, 0, sizeof isas / sizeof *isas);
    tcase_add_test(format, test_instruction_sets);
    tcase_add_loop_test(format, test_bitsandbytes, 0, sizeof isas / sizeof *isas);
    tcase_add_loop_test(products, test_product, 0, sizeof isas / sizeof *isas);
    suite_add_tcase(suite, format);
    suite_add_tcase(suite, products);
    return run_suite(suite);
}
