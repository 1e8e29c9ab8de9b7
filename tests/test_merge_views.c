/* Slices of tensors that the caller holds: sums and folds of any dtype, stride and place, against the same of
 * whole tensors. */
#include "merge_case.h"

enum { ROWS = 37, COLUMNS = 96, WIDE = 160 };
static const psoup_dtype every[] = {PSOUP_F32, PSOUP_F16, PSOUP_BF16, PSOUP_F64, PSOUP_F8_E4M3, PSOUP_F8_E5M2,
                                    PSOUP_Q8_0};
enum { EVERY = 7 };

static size_t bytes_of(psoup_dtype dtype, size_t n) {
    size_t bytes = 0;
    ck_assert(psoup__dtype_bytes(dtype, n, &bytes));
    return bytes;
}

/* A tensor [ROWS, WIDE] of the dtype and what it holds as f32. */
static char *tensor(psoup_dtype dtype, float *wide) {
    float *x = noises(ROWS * WIDE);
    char *raw = malloc(bytes_of(dtype, ROWS * WIDE));
    psoup__from_f32(context, raw, dtype, x, ROWS * WIDE);
    psoup__to_f32(context, wide, raw, dtype, ROWS * WIDE);
    free(x);
    return raw;
}

static psoup_merge_view slice(char *raw, psoup_dtype dtype, int64_t column) {
    return (psoup_merge_view){.data = raw + bytes_of(dtype, (size_t)column), .dtype = (int32_t)dtype,
                              .rows = ROWS, .columns = COLUMNS, .row_stride = WIDE};
}

/* _i: the dtype that comes out. Inputs of three dtypes, from different columns. */
START_TEST(slices_of_any_dtype_are_summed) {
    static float wide[3][ROWS * WIDE];
    const double weights[3] = {0.5, -0.25, 1.5};
    psoup_dtype to = every[_i];
    for (int first = 0; first < EVERY; first++) {
        psoup_dtype from[3] = {every[first], every[(first + 2) % EVERY], every[(first + 4) % EVERY]};
        char *raw[3], *out = tensor(to, wide[0]), *before = malloc(bytes_of(to, ROWS * WIDE));
        psoup_merge_view in[3], view = slice(out, to, 64);
        for (int i = 0; i < 3; i++) {
            raw[i] = tensor(from[i], wide[i]);
            in[i] = slice(raw[i], from[i], 32 * i);
        }
        memcpy(before, out, bytes_of(to, ROWS * WIDE));
        ck_ok(psoup_merge_views(context, &view, in, weights, 3, &error));
        for (int r = 0; r < ROWS; r++) {
            float sum[COLUMNS];
            char expected[COLUMNS * 8];
            for (int c = 0; c < COLUMNS; c++) {
                volatile float acc = 0.5f * wide[0][r * WIDE + c];
                volatile float product = -0.25f * wide[1][r * WIDE + 32 + c];
                acc = acc + product;
                product = 1.5f * wide[2][r * WIDE + 64 + c];
                sum[c] = acc + product;
            }
            psoup__from_f32(context, expected, to, sum, COLUMNS);
            const size_t row = bytes_of(to, (size_t)r * WIDE), skip = bytes_of(to, 64);
            ck_assert_mem_eq(out + row + skip, expected, bytes_of(to, COLUMNS));
            ck_assert_mem_eq(out + row, before + row, skip); /* what is beside the slice stays */
        }
        for (int i = 0; i < 3; i++)
            free(raw[i]);
        free(out);
        free(before);
    }
}
END_TEST

START_TEST(sums_in_place_are_sums) {
    static float wide[ROWS * WIDE];
    const double weights[2] = {0.75, 0.5};
    for (int k = 0; k < EVERY; k++) {
        char *x = tensor(every[k], wide), *y = tensor(PSOUP_BF16, wide), *z = tensor(every[k], wide);
        psoup_merge_view in[2] = {slice(x, every[k], 32), slice(y, PSOUP_BF16, 0)};
        psoup_merge_view apart = slice(z, every[k], 32);
        ck_ok(psoup_merge_views(context, &apart, in, weights, 2, &error));
        ck_ok(psoup_merge_views(context, &in[0], in, weights, 2, &error));
        for (int r = 0; r < ROWS; r++) {
            size_t at = bytes_of(every[k], (size_t)r * WIDE + 32);
            ck_assert_mem_eq(x + at, z + at, bytes_of(every[k], COLUMNS));
        }
        free(x);
        free(y);
        free(z);
    }
}
END_TEST

/* Column- and row-parallel shards of a fold have the whole fold's bits; other dtypes are its rounding. */
START_TEST(shards_of_a_fold_are_the_fold) {
    enum { RANK = 5, OUT = 64, IN = 192 };
    float *a = noises(2 * RANK * IN), *b = noises(2 * OUT * RANK), *base = noises(OUT * IN);
    const psoup_lora_factors f[2] = {{a, b, RANK, 0.5f}, {a + RANK * IN, b + OUT * RANK, RANK, 2}};
    const double weights[2] = {0.4, 0.6};
    float *folded = malloc(OUT * IN * sizeof *folded), *exact = malloc(OUT * IN * sizeof *exact);
    for (int k = 0; k < EVERY; k++) {
        psoup_dtype dtype = every[k];
        char *stored = malloc(bytes_of(dtype, OUT * IN)), *whole = malloc(bytes_of(dtype, OUT * IN));
        psoup__from_f32(context, stored, dtype, base, OUT * IN);
        psoup__to_f32(context, exact, stored, dtype, OUT * IN);
        ck_ok(psoup_merge_fold(context, folded, exact, PSOUP_F32, OUT, IN, f, weights, 2, &error));
        psoup__from_f32(context, whole, dtype, folded, OUT * IN);
        for (int part = 0; part < 6; part++) { /* two ranks' rows, three ranks' columns, a corner */
            const bool rows = part < 2;
            int64_t row = rows ? part * OUT / 2 : part == 5 ? 33 : 0, column = rows ? 0 : part == 5 ? 96 : (part - 2) * 64;
            int64_t n_rows = rows ? OUT / 2 : part == 5 ? 7 : OUT, columns = rows ? IN : part == 5 ? 32 : 64;
            char *out = malloc(bytes_of(dtype, (size_t)(n_rows * columns)));
            psoup_merge_view from = {.data = stored + bytes_of(dtype, (size_t)(row * IN + column)),
                                     .dtype = (int32_t)dtype, .rows = n_rows, .columns = columns,
                                     .row_stride = IN};
            psoup_merge_view to = {.data = out, .dtype = (int32_t)dtype, .rows = n_rows, .columns = columns};
            ck_ok(psoup_merge_fold_view(context, &to, &from, row, column, OUT, IN, f, weights, 2, &error));
            for (int64_t r = 0; r < n_rows; r++)
                ck_assert_mem_eq(out + bytes_of(dtype, (size_t)(r * columns)),
                                 whole + bytes_of(dtype, (size_t)((row + r) * IN + column)),
                                 bytes_of(dtype, (size_t)columns));
            free(out);
        }
        psoup_merge_view all = {.data = stored, .dtype = (int32_t)dtype, .rows = OUT, .columns = IN};
        ck_ok(psoup_merge_fold_view(context, &all, &all, 0, 0, OUT, IN, f, weights, 2, &error));
        ck_assert_mem_eq(stored, whole, bytes_of(dtype, OUT * IN));
        free(stored);
        free(whole);
    }
    free(a);
    free(b);
    free(base);
    free(folded);
    free(exact);
}
END_TEST

static void refused(psoup_status status, psoup_status expected, const char *words) {
    ck_assert_int_eq(status, expected);
    ck_assert_msg(strstr(error.message, words) != NULL, "%s", error.message);
}

START_TEST(nonsense_is_refused) {
    static float x[ROWS * WIDE], y[ROWS * WIDE];
    const double one = 1, none = 0;
    psoup_merge_view out = slice((char *)y, PSOUP_F32, 0), in = slice((char *)x, PSOUP_F32, 0), other = in;
    const psoup_lora_factors f = {x, x, 1, 1};
    other.rows--;
    refused(psoup_merge_views(context, &out, &other, &one, 1, &error), PSOUP_ERROR_ARGUMENT, "expected 37 × 96");
    ck_ok(psoup_merge_views(context, &out, &other, &none, 1, &error));
    other = in;
    other.row_stride = COLUMNS - 1;
    refused(psoup_merge_views(context, &out, &other, &one, 1, &error), PSOUP_ERROR_ARGUMENT, "do not overlap");
    other.row_stride = INT64_MAX;
    refused(psoup_merge_views(context, &out, &other, &one, 1, &error), PSOUP_ERROR_ARGUMENT, "sizes");
    other = in;
    other.dtype = PSOUP_I32;
    refused(psoup_merge_views(context, &out, &other, &one, 1, &error), PSOUP_ERROR_ARGUMENT, "i32");
    other = in;
    other.data = NULL;
    refused(psoup_merge_views(context, &out, &other, &one, 1, &error), PSOUP_ERROR_ARGUMENT, "NULL");
    other = in;
    other.reserved[2] = 1;
    refused(psoup_merge_views(context, &out, &other, &one, 1, &error), PSOUP_ERROR_ARGUMENT, "reserved is not 0");
    other = slice((char *)y, PSOUP_F32, 32); /* overlaps out's columns */
    refused(psoup_merge_views(context, &out, &other, &one, 1, &error), PSOUP_ERROR_ARGUMENT, "overlaps");
    other = out;
    other.dtype = PSOUP_F16;
    refused(psoup_merge_views(context, &out, &other, &one, 1, &error), PSOUP_ERROR_ARGUMENT, "overlaps");
    out.columns = in.columns = 64;
    other = slice((char *)y, PSOUP_F32, 64); /* beside */
    other.columns = 64;
    ck_ok(psoup_merge_views(context, &out, &other, &one, 1, &error));
    refused(psoup_merge_fold_view(context, &out, &in, 0, 1, ROWS, 64, &f, &one, 1, &error), PSOUP_ERROR_ARGUMENT,
            "expected a part of 37 × 64");
    in.place = PSOUP_MERGE_DEVICE;
    refused(psoup_merge_views(context, &out, &in, &one, 1, &error), PSOUP_ERROR_ARGUMENT, "psoup_merge_copy");
    out.place = PSOUP_MERGE_DEVICE;
    refused(psoup_merge_views(context, &out, &in, &one, 1, &error), PSOUP_ERROR_STATE, "psoup_merge_set_device");
    refused(psoup_merge_copy(context, &out, &in, &error), PSOUP_ERROR_STATE, "psoup_merge_set_device");
}
END_TEST

/* ---- a device that is memory of its own -------------------------------------------------------------- */

typedef struct device {
    char *memory;   /* its addresses are `shift` away from the host's */
    ptrdiff_t shift;
    int sums, folds, copies;
    psoup_status answer;
} device;

static psoup_merge_view seen(const device *d, const psoup_merge_view *view) {
    psoup_merge_view host = *view;
    if (view->place == PSOUP_MERGE_DEVICE)
        host.data = (char *)view->data + d->shift;
    host.place = PSOUP_MERGE_HOST;
    return host;
}

static psoup_status device_sum(void *user, const psoup_merge_view *out, const psoup_merge_view *in,
                               const double *weights, size_t count, psoup_error *failure) {
    device *d = user;
    psoup_merge_view to = seen(d, out), from[4];
    d->sums++;
    for (size_t i = 0; i < count; i++)
        from[i] = seen(d, &in[i]);
    if (d->answer != PSOUP_OK)
        return psoup__fail(failure, d->answer, "the device is gone");
    return psoup_merge_views(context, &to, from, weights, count, failure);
}

static psoup_status device_fold(void *user, const psoup_merge_view *out, const psoup_merge_view *base,
                                int64_t first_row, int64_t first_column, int64_t in_features,
                                const psoup_lora_factors *factors, const double *weights, size_t count,
                                psoup_error *failure) {
    device *d = user;
    psoup_merge_view to = seen(d, out), from = seen(d, base);
    psoup_lora_factors f[4];
    d->folds++;
    for (size_t i = 0; i < count; i++) {
        f[i] = factors[i];
        f[i].a = (const float *)((const char *)factors[i].a + d->shift);
        f[i].b = (const float *)((const char *)factors[i].b + d->shift);
    }
    return psoup_merge_fold_view(context, &to, &from, first_row, first_column, first_row + out->rows,
                                 in_features, f, weights, count, failure);
}

static psoup_status device_copy(void *user, const psoup_merge_view *out, const psoup_merge_view *in,
                                psoup_error *failure) {
    device *d = user;
    psoup_merge_view to = seen(d, out), from = seen(d, in);
    d->copies++;
    return psoup_merge_copy(context, &to, &from, failure);
}

START_TEST(a_device_does_what_the_host_does) {
    enum { OUT = 24, IN = 40, RANK = 3, N = OUT * IN };
    /* Host addresses of the device's memory, moved to where nobody may read. */
    device d = {.memory = malloc(16 * N * sizeof(float)), .shift = (ptrdiff_t)1 << 46};
    char *there = (char *)((uintptr_t)d.memory - (uintptr_t)d.shift);
    psoup_merge_device table = {.size = sizeof table, .user = &d, .sum = device_sum, .fold = device_fold};
    psoup_context *with = new_context(2, NULL);
    ck_assert_int_eq(psoup_merge_set_device(with, &table, &error), PSOUP_ERROR_ARGUMENT);
    table.copy = device_copy;
    ck_ok(psoup_merge_set_device(with, &table, &error));
    memset(&table, 0, sizeof table); /* it was copied */

    float *x = noises(N), *y = noises(N), *a = noises(RANK * IN), *b = noises(OUT * RANK), sum[N], folded[N], back[N];
    psoup_merge_view host[4] = {{.data = x, .rows = OUT, .columns = IN},
                                {.data = y, .rows = OUT, .columns = IN},
                                {.data = a, .rows = RANK, .columns = IN},
                                {.data = b, .rows = OUT, .columns = RANK}};
    psoup_merge_view on[4], result = {.data = there + 8 * N * sizeof(float), .place = PSOUP_MERGE_DEVICE,
                                      .rows = OUT, .columns = IN};
    psoup_merge_view home = {.data = back, .rows = OUT, .columns = IN};
    for (int i = 0; i < 4; i++) {
        on[i] = host[i];
        on[i].data = there + (size_t)i * N * sizeof(float);
        on[i].place = PSOUP_MERGE_DEVICE;
        ck_ok(psoup_merge_copy(with, &on[i], &host[i], &error));
    }
    const double weights[2] = {0.3, 0.7};
    psoup_merge_view to = {.data = sum, .rows = OUT, .columns = IN};
    ck_ok(psoup_merge_views(context, &to, host, weights, 2, &error));
    ck_ok(psoup_merge_views(with, &result, on, weights, 2, &error));
    ck_ok(psoup_merge_copy(with, &home, &result, &error));
    ck_assert_mem_eq(back, sum, sizeof sum);
    ck_assert(d.sums == 1 && d.folds == 0 && d.copies == 5);

    const psoup_lora_factors f = {a, b, RANK, 2}, g = {on[2].data, on[3].data, RANK, 2};
    to.data = folded;
    ck_ok(psoup_merge_fold_view(context, &to, &host[0], 0, 0, OUT, IN, &f, weights, 1, &error));
    ck_ok(psoup_merge_fold_view(with, &result, &on[0], 0, 0, OUT, IN, &g, weights, 1, &error));
    ck_ok(psoup_merge_copy(with, &home, &result, &error));
    ck_assert_mem_eq(back, folded, sizeof folded);
    ck_assert(d.sums == 1 && d.folds == 1 && d.copies == 6);

    to.data = sum; /* the host's own stays the host's */
    ck_ok(psoup_merge_views(with, &to, host, weights, 2, &error));
    ck_assert(d.sums == 1);
    d.answer = PSOUP_ERROR_IO;
    refused(psoup_merge_views(with, &result, on, weights, 2, &error), PSOUP_ERROR_IO, "the device is gone");
    ck_ok(psoup_merge_set_device(with, NULL, &error));
    refused(psoup_merge_views(with, &result, on, weights, 2, &error), PSOUP_ERROR_STATE, "set_device");
    psoup_context_free(with);
    free(x);
    free(y);
    free(a);
    free(b);
    free(d.memory);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("merge views");
    TCase *all = tcase_create("views");
    tcase_set_timeout(all, 120);
    tcase_add_checked_fixture(all, set_up, tear_down);
    tcase_add_loop_test(all, slices_of_any_dtype_are_summed, 0, EVERY);
    tcase_add_test(all, sums_in_place_are_sums);
    tcase_add_test(all, shards_of_a_fold_are_the_fold);
    tcase_add_test(all, nonsense_is_refused);
    tcase_add_test(all, a_device_does_what_the_host_does);
    suite_add_tcase(suite, all);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
