/* Merging in device memory, against the host's: tests/host_driver is the GPU. */
#include "gpu_case.h"

/* Does it in both places and compares the whole output tensor, also what lies beside the view. */
static void check_sum(sum *s, const char *what) {
    const psoup_dtype dtype = (psoup_dtype)s->out.dtype;
    const size_t n = (size_t)(s->out.rows * (s->out.row_stride ? s->out.row_stride : s->out.columns));
    ck_ok(psoup_merge_views(device, &s->out_there, s->in_there, s->weights, s->n, &error));
    ck_ok(psoup_merge_views(host, &s->out, s->in, s->weights, s->n, &error));
    for (size_t i = 0; i <= MOST; i++) /* the output may be one of them */
        if (s->here[i] != NULL && (i == MOST || s->in[i].data == s->out.data)) {
            char *got = fetched(s->there[i], s->bytes[i]);
            check_same(what, dtype, got, s->here[i], n);
            free(got);
        }
}

/* _i: the dtype that comes out. Inputs of three dtypes, slices of wider tensors. */
START_TEST(sums_of_any_dtypes) {
    static const int64_t sizes[][2] = {{1, 32}, {3, 288}, {37, 96}, {2, 736}};
    for (int first = 0; first < EVERY; first++)
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
            sum s = {0};
            add_output(&s, every[_i], sizes[k][0], sizes[k][1], sizes[k][1] + 64, 32);
            for (int i = 0; i < 3; i++)
                add_input(&s, every[(first + 2 * i) % EVERY], sizes[k][1], sizes[k][1] + 64, 32 * i);
            check_sum(&s, "mixed");
            drop(&s);
        }
}
END_TEST

/* _i: the dtype. What the kernels of one dtype take, and what they must leave to the other: 9 inputs, odd
 * strides, odd beginnings. */
START_TEST(sums_of_one_dtype) {
    static const int64_t sizes[][4] = { /* rows, columns, stride, first */
        {1, 1, 1, 0},       {1, 7, 7, 0},      {1, 8, 8, 0},      {1, 2049, 2049, 0}, {1, 150003, 150003, 0},
        {5, 40, 40, 0},     {300, 37, 48, 8},  {3, 4104, 4112, 0}, {7, 33, 35, 0},    {4, 64, 80, 3},
    };
    for (size_t n = 1; n <= 9; n++)
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
            sum s = {0};
            if (sizes[k][1] > 100000 && n % 4 != 1)
                continue;
            add_output(&s, every[_i], sizes[k][0], sizes[k][1], sizes[k][2], sizes[k][3]);
            for (size_t i = 0; i < n; i++)
                add_input(&s, every[_i], sizes[k][1], sizes[k][2], sizes[k][3]);
            check_sum(&s, "same");
            drop(&s);
        }
}
END_TEST

START_TEST(sums_of_any_number) {
    for (size_t n = 0; n <= MOST; n++) {
        sum s = {0};
        add_output(&s, PSOUP_BF16, 5, 70, 70, 0);
        for (size_t i = 0; i < n; i++)
            add_input(&s, every[i % 6], 70, 70, 0);
        check_sum(&s, "many");
        drop(&s);
    }
}
END_TEST

START_TEST(a_weight_of_zero_skips_its_input) {
    static const size_t counts[] = {3, 8, 20, 40};
    for (size_t k = 0; k < sizeof counts / sizeof *counts; k++)
        for (int all = 0; all < 2; all++) {
            sum s = {0};
            add_output(&s, PSOUP_F16, 2, 64, 64, 0);
            for (size_t i = 0; i < counts[k]; i++) {
                add_input(&s, PSOUP_F16, 64, 64, 0);
                if (i % 3 != 1 && !all)
                    continue;
                s.weights[i] = 0;
                s.in_there[i].data = (void *)(uintptr_t)(16 + i % 2); /* nobody's */
                s.in_there[i].columns = -1;
            }
            check_sum(&s, all ? "nothing" : "some");
            drop(&s);
        }
}
END_TEST

START_TEST(sums_in_place) {
    for (int k = 0; k < EVERY; k++)
        for (int wide = 0; wide < 2; wide++) {
            sum s = {0};
            s.out.rows = 9;
            add_input(&s, every[k], 96, wide ? 128 : 96, 0);
            add_input(&s, wide ? every[k] : PSOUP_BF16, 96, wide ? 128 : 96, 0);
            s.out = s.in[1 * (wide || every[k] == PSOUP_BF16)];
            s.out_there = s.in_there[1 * (wide || every[k] == PSOUP_BF16)];
            check_sum(&s, "in place");
            drop(&s);
        }
}
END_TEST

/* ---- folds --------------------------------------------------------------------------------------------- */

/* A slice of [out, in] from (row, column) on, of tensors [rows, stride]. */
static void fold_case(const adapters *a, psoup_dtype to, psoup_dtype from, int64_t out, int64_t in,
                      int64_t row, int64_t column, int64_t rows, int64_t columns, int64_t stride, bool over) {
    sum s = {0};
    add_output(&s, to, rows, columns, stride, 0);
    add_input(&s, from, columns, stride, 0);
    psoup_merge_view *to_here = over ? &s.in[0] : &s.out, *to_there = over ? &s.in_there[0] : &s.out_there;
    const size_t which = over ? 0 : MOST;
    ck_ok(psoup_merge_fold_view(device, to_there, &s.in_there[0], row, column, out, in, a->there, a->weights,
                                a->n, &error));
    ck_ok(psoup_merge_fold_view(host, to_here, &s.in[0], row, column, out, in, a->here, a->weights, a->n,
                                &error));
    char *got = fetched(s.there[which], s.bytes[which]);
    check_fold(over ? "over" : "fold", to, got, s.here[which], (size_t)(rows * stride));
    free(got);
    drop(&s);
}

/* _i: the dtype of the result. */
START_TEST(folds_of_any_dtype) {
    enum { OUT = 150, IN = 320 };
    const psoup_dtype to = every[_i];
    adapters a = {0};
    add_adapter(&a, 5, OUT, IN);
    add_adapter(&a, 16, OUT, IN);
    add_adapter(&a, 35, OUT, IN);
    for (int k = 0; k < EVERY; k++)
        fold_case(&a, to, every[k], OUT, IN, 3, 32, 70, 160, 192, false);
    fold_case(&a, to, to, OUT, IN, 0, 0, OUT, IN, IN, false);
    fold_case(&a, to, to, OUT, IN, 0, 0, OUT, IN, IN, true);
    if (to != PSOUP_Q8_0) { /* odd widths, odd strides */
        fold_case(&a, to, to, OUT, IN, 149, 7, 1, 131, 131, false);
        fold_case(&a, to, to, OUT, IN, 1, 1, 65, 1, 1, true);
        fold_case(&a, to, PSOUP_BF16, OUT, IN, 64, 1, 64, 127, 129, false);
    }
    drop_adapters(&a);
}
END_TEST

START_TEST(folds_of_any_number) {
    static const size_t counts[] = {0, 1, 2, 32, 33, 40};
    for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
        adapters a = {0};
        for (size_t i = 0; i < counts[k]; i++)
            add_adapter(&a, 1 + (int32_t)(i % 4), 20, 40);
        if (counts[k] == 2) { /* who is not in use may be anything */
            release((void *)(uintptr_t)a.there[0].a, 0);
            a.there[0].a = (const float *)(const void *)on_device("", 0, 0);
            a.weights[0] = 0;
        }
        fold_case(&a, PSOUP_BF16, PSOUP_BF16, 20, 40, 0, 0, 20, 40, 40, false);
        fold_case(&a, PSOUP_F16, PSOUP_F32, 20, 40, 0, 0, 20, 40, 40, false);
        for (size_t i = 0; i < a.n && counts[k] > 2; i++)
            a.weights[i] = 0;
        fold_case(&a, PSOUP_F32, PSOUP_F32, 20, 40, 0, 0, 20, 40, 40, false);
        drop_adapters(&a);
    }
}
END_TEST

/* ---- copies -------------------------------------------------------------------------------------------- */

START_TEST(copies_go_anywhere) {
    static const int64_t strides[][2] = {{96, 96}, {128, 96}, {96, 160}, {128, 160}};
    enum { ROWS = 11, COLUMNS = 96 };
    for (int k = 0; k < EVERY; k++)
        for (size_t i = 0; i < sizeof strides / sizeof *strides; i++)
            for (int way = 1; way < 4; way++) { /* 1: to the device; 2: from it; 3: there */
                sum s = {0};
                add_output(&s, every[k], ROWS, COLUMNS, strides[i][0], 0);
                add_input(&s, every[k], COLUMNS, strides[i][1], 0);
                char *before = malloc(s.bytes[0]);
                memcpy(before, s.here[0], s.bytes[0]);
                ck_ok(psoup_merge_copy(device, way == 2 ? &s.out : &s.out_there,
                                       way == 1 ? &s.in[0] : &s.in_there[0], &error));
                memset(s.here[0], 0, s.bytes[0]); /* it is the caller's again */
                char *got = way == 2 ? NULL : fetched(s.there[MOST], s.bytes[MOST]);
                const size_t row = bytes_of(every[k], COLUMNS);
                for (size_t r = 0; r < ROWS; r++) {
                    const size_t to = bytes_of(every[k], r * (size_t)strides[i][0]);
                    const size_t next = bytes_of(every[k], (r + 1) * (size_t)strides[i][0]);
                    const char *out = way == 2 ? s.here[MOST] : got;
                    ck_assert_mem_eq(out + to, before + bytes_of(every[k], r * (size_t)strides[i][1]), row);
                    if (way != 2)
                        ck_assert_mem_eq(out + to + row, s.here[MOST] + to + row, next - to - row);
                }
                free(got);
                free(before);
                drop(&s);
            }
}
END_TEST

/* Bytes at odd addresses too: what is copied need not be what is summed. */
START_TEST(copies_of_odd_bytes) {
    for (size_t shift = 0; shift < 5; shift++) {
        char *x = tensor(PSOUP_F8_E5M2, 6 * 21), *in = on_device(x, 6 * 21, shift);
        char *out = on_device(x, 6 * 21, 0);
        psoup_merge_view to = {.data = out, .dtype = PSOUP_F8_E5M2, .place = PSOUP_MERGE_DEVICE, .rows = 6,
                               .columns = 20, .row_stride = 20}, from = to;
        from.data = in;
        from.row_stride = 21;
        ck_ok(psoup_merge_copy(device, &to, &from, &error));
        char *got = fetched(out, 120);
        for (size_t r = 0; r < 6; r++)
            ck_assert_mem_eq(got + r * 20, x + r * 21, 20);
        free(got);
        free(x);
        release(in, shift);
        release(out, 0);
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("merging on a GPU");
    TCase *all = tcase_create("views");
    tcase_set_timeout(all, 240);
    tcase_add_checked_fixture(all, set_up, tear_down);
    tcase_add_loop_test(all, sums_of_any_dtypes, 0, EVERY);
    tcase_add_loop_test(all, sums_of_one_dtype, 0, 3);
    tcase_add_test(all, sums_of_any_number);
    tcase_add_test(all, a_weight_of_zero_skips_its_input);
    tcase_add_test(all, sums_in_place);
    tcase_add_loop_test(all, folds_of_any_dtype, 0, EVERY);
    tcase_add_test(all, folds_of_any_number);
    tcase_add_test(all, copies_go_anywhere);
    tcase_add_test(all, copies_of_odd_bytes);
    suite_add_tcase(suite, all);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
