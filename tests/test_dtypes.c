/* The narrow dtypes: torch's 8-bit floats and ggml's q8_0, on every instruction set, and reading tensors
 * of any dtype and row order in pieces. Golden: tests/golden/dtypes.py. */
#include "format_case.h"

static const char *const isas[] = {"generic", "avx2", "avx512", "neon"};
static psoup__safetensors *golden;

static const psoup__tensor *tensor_of(const char *format, const char *kind) {
    char name[64];
    snprintf(name, sizeof name, format, kind);
    for (size_t i = 0; i < psoup__safetensors_count(golden); i++)
        if (strcmp(psoup__safetensors_name(golden, i), name) == 0)
            return psoup__safetensors_tensor(golden, i);
    ck_abort_msg("no tensor %s", name);
}

static psoup_context *with_isa(const char *isa) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *made;
    options.isa = isa;
    options.threads = 2;
    return psoup_context_create(&options, &made, NULL) == PSOUP_OK ? made : NULL;
}

static bool is_nan(float x) {
    return x != x;
}

START_TEST(eight_bits) {
    static const struct {
        const char *name;
        psoup_dtype dtype;
    } kinds[] = {{"e4m3", PSOUP_F8_E4M3}, {"e5m2", PSOUP_F8_E5M2}};
    ck_assert_int_eq(psoup__safetensors_open(context, "tests/golden/dtypes/dtypes.safetensors", &golden,
                                             &error), PSOUP_OK);
    ck_assert_int_eq(psoup__safetensors_map(golden, &error), PSOUP_OK);
    int ran = 0;
    for (int which = 0; which < 4; which++) {
        psoup_context *c = with_isa(isas[which]);
        for (int k = 0; c != NULL && k < 2; k++) {
            const psoup__tensor *codes = tensor_of("%s.codes", kinds[k].name);
            const psoup__tensor *in = tensor_of("%s.in", kinds[k].name);
            const psoup__tensor *out = tensor_of("%s.out", kinds[k].name);
            float wide[256];
            ck_assert_int_eq(codes->dtype, kinds[k].dtype);
            ck_assert_int_eq(out->dtype, kinds[k].dtype);
            psoup__to_f32(c, wide, codes->data, codes->dtype, 256);
            ck_assert_mem_eq(wide, tensor_of("%s.values", kinds[k].name)->data, sizeof wide);
            unsigned char *got = malloc(out->bytes);
            psoup__from_f32(c, got, kinds[k].dtype, in->data, out->bytes);
            for (size_t i = 0; i < out->bytes; i++) {
                float x;
                memcpy(&x, (const char *)in->data + 4 * i, 4);
                unsigned want = ((const unsigned char *)out->data)[i];
                ck_assert_msg(got[i] == want, "%s of %a: %02x, torch %02x", kinds[k].name, (double)x,
                              got[i], want);
            }
            float most[2] = {psoup__dtype_largest(kinds[k].dtype)};
            most[1] = nextafterf(most[0], INFINITY);
            psoup__from_f32(c, got, kinds[k].dtype, most, 2);
            psoup__to_f32(c, wide, got, kinds[k].dtype, 2);
            ck_assert(isfinite(wide[0]) && !isfinite(wide[1]));
            free(got);
            ran++;
        }
        psoup_context_free(c);
    }
    ck_assert_int_ge(ran, 2);
    psoup__safetensors_free(golden);
}
END_TEST

START_TEST(blocks_of_q8) {
    ck_assert_int_eq(psoup__safetensors_open(context, "tests/golden/dtypes/dtypes.safetensors", &golden,
                                             &error), PSOUP_OK);
    ck_assert_int_eq(psoup__safetensors_map(golden, &error), PSOUP_OK);
    const psoup__tensor *in = tensor_of("q8_0.in", ""), *out = tensor_of("q8_0.out", "");
    size_t n = in->bytes / 4, bytes;
    ck_assert(psoup__dtype_bytes(PSOUP_Q8_0, n, &bytes) && bytes == out->bytes);
    for (int which = 0; which < 4; which++) {
        psoup_context *c = with_isa(isas[which]);
        if (c == NULL)
            continue;
        char *got = malloc(bytes);
        float *back = malloc(n * 4);
        psoup__from_f32(c, got, PSOUP_Q8_0, in->data, n);
        for (size_t b = 0; b < bytes / 34; b++)
            ck_assert_msg(memcmp(got + 34 * b, (const char *)out->data + 34 * b, 34) == 0, "block %zu", b);
        psoup__to_f32(c, back, got, PSOUP_Q8_0, n);
        ck_assert_mem_eq(back, tensor_of("q8_0.back", "")->data, n * 4);
        /* what no scale can say poisons its block and no other */
        float x[96];
        for (int i = 0; i < 96; i++)
            x[i] = (float)i;
        x[40] = which % 2 ? INFINITY : NAN;
        x[64] = nextafterf(psoup__dtype_largest(PSOUP_Q8_0), INFINITY);
        psoup__from_f32(c, got, PSOUP_Q8_0, x, 96);
        psoup__to_f32(c, back, got, PSOUP_Q8_0, 96);
        for (int i = 0; i < 32; i++)
            ck_assert(fabsf(back[i] - x[i]) < 0.2f && is_nan(back[32 + i]));
        ck_assert(!isfinite(back[64]));
        x[64] = psoup__dtype_largest(PSOUP_Q8_0);
        psoup__from_f32(c, got, PSOUP_Q8_0, x, 96);
        psoup__to_f32(c, back, got, PSOUP_Q8_0, 96);
        ck_assert(isfinite(back[64]));
        free(got);
        free(back);
        psoup_context_free(c);
    }
    ck_assert(!psoup__dtype_bytes(PSOUP_Q8_0, 33, &bytes));
    ck_assert(psoup__dtype_bytes(PSOUP_Q8_0, 64, &bytes) && bytes == 68);
    ck_assert(!psoup__dtype_bytes(PSOUP_Q8_0, SIZE_MAX - 31, &bytes));
    ck_assert(!psoup__dtype_bytes(PSOUP_F32, SIZE_MAX / 2, &bytes));
    psoup__safetensors_free(golden);
}
END_TEST

/* Any range of a tensor, whatever its dtype and row order, is the whole one's part. */
START_TEST(ranges) {
    enum { ROWS = 24, COLUMNS = 32, N = ROWS * COLUMNS };
    static float x[N], whole[N], part[N];
    static char data[N * 8];
    for (int i = 0; i < N; i++)
        x[i] = (float)(i % 250) - 120;
    const psoup_dtype dtypes[] = {PSOUP_F32, PSOUP_BF16, PSOUP_F8_E5M2, PSOUP_Q8_0};
    for (int d = 0; d < 4; d++)
        for (int32_t heads = 0; heads <= 3; heads++) {
            psoup__tensor tensor = {.dtype = dtypes[d], .rank = 2, .shape = {ROWS, COLUMNS}, .data = data,
                                    .heads = heads};
            psoup__from_f32(context, data, dtypes[d], x, N);
            psoup__tensor_read(context, &tensor, 0, N, whole);
            /* a head of n rows, the first half and the second interleaved */
            float straight[N];
            psoup__to_f32(context, straight, data, dtypes[d], N);
            for (int row = 0; row < ROWS; row++) {
                int place = row;
                if (heads > 0) {
                    int n = ROWS / heads, h = row / n, r = row % n;
                    place = h * n + (r < n / 2 ? 2 * r : 2 * (r - n / 2) + 1);
                }
                ck_assert_uint_eq(psoup__tensor_row(&tensor, (size_t)row), (size_t)place);
                ck_assert_mem_eq(whole + row * COLUMNS, straight + place * COLUMNS, COLUMNS * 4);
            }
            for (size_t at = 0; at < N; at += 13)
                for (size_t n = 0; n <= N - at; n += 37) {
                    psoup__tensor_read(context, &tensor, at, n, part);
                    ck_assert_mem_eq(part, whole + at, n * 4);
                }
        }
    psoup__tensor vector = {.dtype = PSOUP_F32, .rank = 1, .shape = {ROWS}, .data = x, .heads = 3};
    psoup__tensor_read(context, &vector, 1, 4, part);
    ck_assert(part[0] == x[2] && part[1] == x[4] && part[2] == x[6] && part[3] == x[1]);
}
END_TEST

START_TEST(written_and_read) {
    const unsigned char codes[6] = {0, 0x7e, 0x80, 0x7f, 1, 0xc0};
    const int64_t shape[2] = {2, 3};
    const psoup_named_tensor both[] = {{"a", PSOUP_F8_E4M3, 2, shape, codes},
                                       {"b", PSOUP_F8_E5M2, 2, shape, codes}};
    const psoup_named_tensor blocks = {"c", PSOUP_Q8_0, 2, shape, codes};
    ck_assert_int_eq(psoup_safetensors_write(context, in_scratch("f8.safetensors"), both, 2, &error),
                     PSOUP_OK);
    psoup__safetensors *file;
    ck_assert_int_eq(psoup__safetensors_open(context, in_scratch("f8.safetensors"), &file, &error),
                     PSOUP_OK);
    for (size_t i = 0; i < 2; i++) {
        unsigned char bytes[6];
        ck_assert_int_eq(psoup__safetensors_tensor(file, i)->dtype, both[i].dtype);
        psoup__tensor_bytes(psoup__safetensors_tensor(file, i), 0, 6, bytes);
        ck_assert_mem_eq(bytes, codes, 6);
    }
    psoup__safetensors_free(file);
    ck_assert_int_eq(psoup_safetensors_write(context, in_scratch("q8.safetensors"), &blocks, 1, &error),
                     PSOUP_ERROR_ARGUMENT);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("dtypes");
    TCase *c = tcase_create("dtypes");
    tcase_add_checked_fixture(c, set_up, tear_down);
    tcase_set_timeout(c, 60);
    tcase_add_test(c, eight_bits);
    tcase_add_test(c, blocks_of_q8);
    tcase_add_test(c, ranges);
    tcase_add_test(c, written_and_read);
    suite_add_tcase(suite, c);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
