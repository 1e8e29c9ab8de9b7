/* The matrix product: against float64, and bit for bit against itself in other company. */
#include "gemm_case.h"

START_TEST(test_values) {
    psoup_context *context = context_of(isas[_i], 2);
    if (context == NULL)
        return;
    for (int trial = 0; trial < 64; trial++) {
        state = (uint64_t)trial * 977 + 1;
        problem x = random_problem(any_size(), any_size(), trial % 16 ? any_size() : 0, trial > 9);
        float *c = result(context, &x, false);
        check_against_f64(&x, c);
        free(c);
        problem_free(&x);
    }
    psoup_context_free(context);
}
END_TEST

/* Each row of a batch equals the same row alone, however B comes and whoever works. */
START_TEST(test_company) {
    psoup_context *one = context_of(isas[_i], 1), *two = context_of(isas[_i], 2),
                  *five = context_of(isas[_i], 5);
    if (one == NULL)
        return;
    for (int trial = 0; trial < 32; trial++) {
        state = (uint64_t)trial * 131 + 7;
        /* now and then more than one step, chunk and tile */
        int k = trial % 8 ? any_size() : 1500, n = trial % 6 ? any_size() : 1100;
        problem x = random_problem(any_size(), n, k, true);
        psoup__gemm_args g = x.args;
        float *c = result(two, &x, false);
        float *other = result(one, &x, false);
        check_same(c, other, x.c_size, "one thread");
        free(other);
        other = result(five, &x, false);
        check_same(c, other, x.c_size, "five threads");
        free(other);
        if (g.b_depth == NULL) {
            other = result(two, &x, true);
            check_same(c, other, x.c_size, "packed ahead");
            free(other);
        }
        x.args.b = x.b; /* the same values as f32 */
        x.args.b_dtype = PSOUP_F32;
        other = result(one, &x, false);
        check_same(c, other, x.c_size, "B as f32");
        free(other);
        for (int repeat = 0; repeat < 6; repeat++) {
            int64_t i = below((int)g.m), count = 1 + below(7);
            if (count > g.m - i)
                count = g.m - i;
            problem alone = x;
            int32_t rows[8], places[8];
            for (int64_t r = 0; r < count; r++) {
                rows[r] = (int32_t)(g.a_rows ? g.a_rows[i + r] : i + r);
                places[r] = (int32_t)(g.c_rows ? g.c_rows[i + r] : i + r);
            }
            alone.args.m = count;
            alone.args.a_rows = rows;
            alone.args.c_rows = places;
            other = result(repeat % 2 ? one : two, &alone, repeat % 3 == 0 && g.b_depth == NULL);
            for (int64_t r = 0; r < count; r++)
                check_same(c + places[r] * g.c_stride, other + places[r] * g.c_stride, (size_t)g.n,
                           "a row alone");
            free(other);
        }
        free(c);
        problem_free(&x);
    }
    psoup_context_free(one), psoup_context_free(two), psoup_context_free(five);
}
END_TEST

/* Cutting the columns does not change them either. */
START_TEST(test_columns) {
    psoup_context *context = context_of(isas[_i], 2);
    if (context == NULL)
        return;
    state = 5;
    problem x = random_problem(37, 300, 400, false);
    float *c = result(context, &x, false);
    for (int trial = 0; trial < 20; trial++) {
        int first = below(300), count = 1 + below(300 - first);
        problem part = x;
        part.args.n = count;
        part.args.b = (const char *)x.args.b +
                      (size_t)(first * x.args.b_col) * psoup_dtype_size(x.args.b_dtype);
        float *other = result(context, &part, trial % 2);
        for (int i = 0; i < 37; i++)
            check_same(c + i * 300 + first, other + i * 300, (size_t)count, "fewer columns");
        free(other);
    }
    free(c);
    problem_free(&x);
    psoup_context_free(context);
}
END_TEST

/* Of few rows, several products at once, some of one A: the bits of one row alone. */
START_TEST(test_few_rows) {
    enum { PRODUCTS = 5, MOST_ROWS = 18, DEEPEST = 2500, MOST_COLUMNS = 150 };
    static const int depths[] = {1, 16, 100, 689, DEEPEST};
    psoup_context *context = context_of(isas[_i], 2 + _i);
    if (context == NULL)
        return;
    state = 11;
    float *a[2] = {numbers(MOST_ROWS * DEEPEST), numbers(MOST_ROWS * DEEPEST)};
    float *c = malloc(PRODUCTS * MOST_ROWS * MOST_COLUMNS * sizeof *c), *alone = malloc(MOST_COLUMNS * sizeof *alone);
    for (int trial = 0; trial < 5 * MOST_ROWS; trial++) {
        psoup__gemm_args g[PRODUCTS];
        psoup__gemm_b *packed[PRODUCTS];
        problem b[PRODUCTS];
        const int m = 1 + trial / 5, k = depths[trial % 5];
        for (int i = 0; i < PRODUCTS; i++) { /* A: 0, 0, 1, 1, 0 */
            const int n = i == 1 ? 128 : 1 + below(MOST_COLUMNS);
            b[i] = random_problem(1, n, k, false);
            packed[i] = NULL;
            ck_assert_int_eq(psoup__gemm_pack(context, b[i].args.b, b[i].args.b_dtype, k, n, b[i].args.b_row,
                                              b[i].args.b_col, &packed[i], NULL), PSOUP_OK);
            g[i] = (psoup__gemm_args){.m = m, .n = n, .k = k, .c = c + i * MOST_ROWS * MOST_COLUMNS, .c_stride = n,
                                      .a = a[i / 2 % 2], .a_row = k, .a_col = 1, .alpha = 1, .packed = packed[i]};
        }
        psoup__gemm_each(context, g, PRODUCTS);
        for (int i = 0; i < PRODUCTS; i++) {
            for (int row = 0; row < m; row++) {
                psoup__gemm_args one = g[i];
                one.m = 1;
                one.a = g[i].a + row * k;
                one.c = alone;
                psoup__gemm(context, &one);
                check_same(g[i].c + row * g[i].n, alone, (size_t)g[i].n, "a row alone");
            }
            psoup__gemm_b_free(context, packed[i]);
            problem_free(&b[i]);
        }
    }
    free(a[0]), free(a[1]), free(c), free(alone);
    psoup_context_free(context);
}
END_TEST

/* Of one A, in turn with a packed B and with one whose product copies A: each finds what it put into its buffers. */
START_TEST(test_few_rows_in_turn) {
    enum { PRODUCTS = 6, ROWS = 9, DEPTH = 100, COLUMNS = 640 };
    psoup_context *context = context_of(isas[_i], 1);
    if (context == NULL)
        return;
    state = 13;
    float *a = numbers(ROWS * DEPTH), *b = numbers(DEPTH * COLUMNS);
    float *c = malloc(PRODUCTS * ROWS * COLUMNS * sizeof *c);
    psoup__gemm_b *packed = NULL;
    psoup__gemm_args g[PRODUCTS];
    ck_assert_int_eq(psoup__gemm_pack(context, b, PSOUP_F32, DEPTH, COLUMNS, COLUMNS, 1, &packed, NULL), PSOUP_OK);
    for (int i = 0; i < PRODUCTS; i++)
        g[i] = (psoup__gemm_args){.m = ROWS, .n = COLUMNS, .k = DEPTH, .c = c + i * ROWS * COLUMNS, .c_stride = COLUMNS,
                                  .a = a, .a_row = DEPTH, .a_col = 1, .alpha = 1, .b = b, .b_dtype = PSOUP_F32,
                                  .b_row = COLUMNS, .b_col = 1, .packed = i % 2 ? NULL : packed};
    psoup__gemm_each(context, g, PRODUCTS);
    for (int i = 1; i < PRODUCTS; i++)
        check_same(g[i].c, c, ROWS * COLUMNS, "the same product");
    psoup__gemm_b_free(context, packed);
    free(a), free(b), free(c);
    psoup_context_free(context);
}
END_TEST

START_TEST(test_nan) {
    psoup_context *context = context_of(isas[_i], 2);
    if (context == NULL)
        return;
    for (int trial = 0; trial < 24; trial++) {
        state = (uint64_t)trial + 100;
        problem x = random_problem(any_size(), any_size(), any_size(), false);
        psoup__gemm_args *g = &x.args;
        float *clean = result(context, &x, false);
        int i = below((int)g->m), p = below((int)g->k);
        x.a[i * g->a_row + p * g->a_col] = trial % 2 ? NAN : INFINITY;
        float *c = result(context, &x, trial % 3 == 0);
        for (int r = 0; r < g->m; r++)
            for (int j = 0; j < g->n; j++) {
                float value = c[r * g->c_stride + j];
                if (r == i)
                    ck_assert_msg(!isfinite(value) || (trial % 2 == 0 && b_of(&x, p, j) == 0),
                                  "lost in its own row");
                else
                    check_same(&clean[r * g->c_stride + j], &value, 1, "another row");
            }
        x.a[i * g->a_row + p * g->a_col] = 0.5f;
        free(c);
        /* and a NaN of B in its column; 0x7fc1 is one in both 16-bit dtypes */
        static const uint16_t half = 0x7fc1;
        static const float single = NAN;
        int column = below((int)g->n);
        size_t size = psoup_dtype_size(g->b_dtype);
        memcpy((char *)x.b_raw + (size_t)(p * g->b_row + column * g->b_col) * size,
               size == 4 ? (const void *)&single : (const void *)&half, size);
        c = result(context, &x, trial % 3 == 0);
        for (int r = 0; r < g->m; r++)
            for (int j = 0; j < g->n; j++)
                ck_assert(isnan(c[r * g->c_stride + j]) == (j == column));
        free(c);
        free(clean);
        problem_free(&x);
    }
    psoup_context_free(context);
}
END_TEST

/* Every binary16 number, through the copy of B and through the kernel. */
START_TEST(test_f16) {
    psoup_context *context = context_of(isas[_i], 2);
    if (context == NULL)
        return;
    enum { COLUMNS = 1024 };
    static uint16_t b[65536];
    static float c[COLUMNS];
    const float one = 1;
    for (int i = 0; i < 65536; i++)
        b[i] = (uint16_t)i;
    for (int i = 0; i < 65536; i += COLUMNS)
        for (int packed = 0; packed < 2; packed++) {
            psoup__gemm_args g = {.m = 1, .n = COLUMNS, .k = 1, .c = c, .c_stride = COLUMNS,
                                  .a = &one, .a_row = 1, .a_col = 1, .alpha = 1, .b = b + i,
                                  .b_dtype = PSOUP_F16, .b_row = COLUMNS, .b_col = 1};
            psoup__gemm_b *ahead = NULL;
            if (packed)
                ck_assert_int_eq(psoup__gemm_pack(context, b + i, PSOUP_F16, 1, COLUMNS, COLUMNS, 1,
                                                  &ahead, NULL), PSOUP_OK);
            g.packed = ahead;
            psoup__gemm(context, &g);
            psoup__gemm_b_free(context, ahead);
            for (int j = 0; j < COLUMNS; j++) {
                int exponent = (i + j) >> 10 & 31, fraction = (i + j) & 1023;
                float expected = exponent == 31 ? (fraction ? NAN : INFINITY)
                                 : exponent     ? ldexpf((float)(1024 + fraction), exponent - 25)
                                                : ldexpf((float)fraction, -24);
                expected = (i + j) & 0x8000 ? -expected : expected;
                ck_assert_msg(isnan(expected) ? isnan(c[j]) : c[j] == expected,
                              "0x%04x is %a, expected %a", (unsigned)(i + j), c[j], expected);
            }
        }
    psoup_context_free(context);
}
END_TEST

int main(void) {
    const int variants = sizeof isas / sizeof isas[0];
    Suite *suite = suite_create("gemm");
    TCase *tcase = tcase_create("gemm");
    tcase_set_timeout(tcase, 300);
    tcase_add_loop_test(tcase, test_values, 0, variants);
    tcase_add_loop_test(tcase, test_company, 0, variants);
    tcase_add_loop_test(tcase, test_columns, 0, variants);
    tcase_add_loop_test(tcase, test_few_rows, 0, variants);
    tcase_add_loop_test(tcase, test_few_rows_in_turn, 0, variants);
    tcase_add_loop_test(tcase, test_nan, 0, variants);
    tcase_add_loop_test(tcase, test_f16, 0, variants);
    suite_add_tcase(suite, tcase);
    return run_suite(suite);
}
