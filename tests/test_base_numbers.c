/* The ground floor's numbers: dtypes, conversions on every instruction set, Philox. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/base.h"

static psoup_context *context_with(const char *isa, int32_t threads) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *context;
    psoup_error error;
    options.isa = isa;
    options.threads = threads;
    psoup_status status = psoup_context_create(&options, &context, &error);
    if (status == PSOUP_ERROR_UNSUPPORTED)
        return NULL; /* an instruction set of another machine */
    ck_assert_msg(status == PSOUP_OK, "%s", error.message);
    return context;
}

#define CONTAINS(error, text)                                                                      \
    ck_assert_msg(strstr((error).message, (text)) != NULL, "\"%s\" lacks \"%s\"", (error).message, \
                  (text))

/* ---- dtypes ---------------------------------------------------------------------------------- */

START_TEST(dtypes) {
    const size_t sizes[] = {4, 2, 2, 8, 1, 1, 2, 4, 8, 1, 1, 1, 0, 0, 0};
    psoup_dtype parsed;
    psoup_error error;
    for (int d = 0; d < 15; d++) {
        ck_assert_uint_eq(psoup_dtype_size((psoup_dtype)d), sizes[d]);
        ck_assert_int_eq(psoup_dtype_parse(psoup_dtype_name((psoup_dtype)d), &parsed, NULL), 0);
        ck_assert_int_eq(parsed, d);
    }
    ck_assert_int_eq(psoup_dtype_parse("Bf16", &parsed, NULL), PSOUP_OK);
    ck_assert_int_eq(parsed, PSOUP_BF16);
    ck_assert_int_eq(psoup_dtype_parse("f33", &parsed, &error), PSOUP_ERROR_ARGUMENT);
    CONTAINS(error, "\"f33\"");
    ck_assert_int_eq(psoup_dtype_parse(NULL, &parsed, NULL), PSOUP_ERROR_ARGUMENT);
    ck_assert_uint_eq(psoup_dtype_size((psoup_dtype)15), 0);
    ck_assert_str_eq(psoup_dtype_name((psoup_dtype)-1), "?");

    size_t n;
    psoup__tensor scalar = {.rank = 0}, cube = {.rank = 3, .shape = {2, 3, 4}},
                  none = {.rank = 3, .shape = {0, 3, 4}},
                  lying = {.rank = 3, .shape = {INT64_MAX, INT64_MAX, 0}},
                  huge = {.rank = 3, .shape = {INT64_MAX, INT64_MAX, 1}},
                  negative = {.rank = 1, .shape = {-1}}, deep = {.rank = 9};
    ck_assert(psoup__tensor_elements(&scalar, &n) && n == 1);
    ck_assert(psoup__tensor_elements(&cube, &n) && n == 24);
    ck_assert(psoup__tensor_elements(&none, &n) && n == 0);
    ck_assert(!psoup__tensor_elements(&lying, &n) && !psoup__tensor_elements(&huge, &n) &&
              !psoup__tensor_elements(&negative, &n) && !psoup__tensor_elements(&deep, &n));
}
END_TEST

/* The value a pattern of 1 sign bit, `exponent` and `fraction` bits stands for (IEEE
 * 754-2019, 3.4). */
static double value_of(uint32_t bits, int exponent, int fraction) {
    uint32_t f = bits & ((1u << fraction) - 1), e = bits >> fraction & ((1u << exponent) - 1);
    int bias = (1 << (exponent - 1)) - 1;
    double sign = bits >> (exponent + fraction) ? -1 : 1;
    if (e == (1u << exponent) - 1)
        return f ? NAN : sign * INFINITY;
    return sign * ldexp(e == 0 ? f : f + (1u << fraction), (int)(e == 0 ? 1 : e) - bias - fraction);
}

static uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static float float_of(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static void check_narrow(psoup_context *context, psoup_dtype dtype, int exponent, int fraction) {
    enum { all = 65536 };
    static uint16_t in[all], out[all];
    static float wide[all], near[all];
    uint16_t infinity = (uint16_t)(((1u << exponent) - 1) << fraction);
    for (uint32_t i = 0; i < all; i++)
        in[i] = (uint16_t)i;
    psoup__to_f32(context, wide, in, dtype, all);
    psoup__from_f32(context, out, dtype, wide, all);
    for (uint32_t i = 0; i < all; i++) {
        double want = value_of(i, exponent, fraction);
        if (isnan(want)) {
            ck_assert_msg(isnan(wide[i]) && !!signbit(wide[i]) == (i >> 15), "NaN %04x", i);
            ck_assert_msg(out[i] == (i | 1u << (fraction - 1)), "NaN %04x became %04x", i, out[i]);
        } else {
            ck_assert_msg((double)wide[i] == want && !!signbit(wide[i]) == (i >> 15), "%04x", i);
            ck_assert_msg(out[i] == i, "%04x became %04x", i, out[i]);
        }
    }
    /* half-way between neighbours, and one f32 step to either side; above the largest, half-way to
     * where the next would be */
    for (int side = -1; side <= 1; side++) {
        for (uint32_t i = 0; i < all; i++) {
            uint32_t magnitude = i & 0x7fff;
            double low = value_of(magnitude, exponent, fraction), high;
            if (magnitude + 1 == infinity)
                high = low + (low - value_of(magnitude - 1, exponent, fraction));
            else
                high = value_of(magnitude + 1, exponent, fraction);
            float middle = magnitude < infinity ? (float)((low + high) / 2) : INFINITY;
            if (side != 0 && isfinite(middle))
                middle = nextafterf(middle, side < 0 ? 0.0f : INFINITY);
            near[i] = i >> 15 ? -middle : middle;
        }
        psoup__from_f32(context, out, dtype, near, all);
        for (uint32_t i = 0; i < all; i++) {
            uint32_t magnitude = i & 0x7fff, want;
            if (magnitude >= infinity)
                want = infinity;
            else /* the tie goes to the even pattern */
                want = magnitude + (side > 0 || (side == 0 && (magnitude & 1)));
            ck_assert_msg(out[i] == (want | (i & 0x8000)), "%d beside the middle above %04x: %04x",
                          side, i, out[i]);
        }
    }
}

START_TEST(conversions) {
    static const char *const isas[] = {"generic", "avx2", "avx512", "neon"};
    enum { many = 100003 };
    static float source[many];
    psoup__random random = {.seed = 5};
    for (int i = 0; i < many; i++)
        source[i] = float_of(psoup__random_word(&random));
    const psoup_dtype floats[] = {PSOUP_F32,     PSOUP_F16,     PSOUP_BF16, PSOUP_F64,
                                  PSOUP_F8_E4M3, PSOUP_F8_E5M2};
    unsigned char *first[6] = {0}, *room = malloc(many * 8 + 8), *back = malloc(many * 4 + 8);
    for (int which = 0; which < 4; which++) {
        psoup_context *context = context_with(isas[which], which + 1);
        if (context == NULL)
            continue;
        check_narrow(context, PSOUP_F16, 5, 10);
        check_narrow(context, PSOUP_BF16, 8, 7);
        /* any bits at all, NaNs among them, are the same on every instruction set */
        for (int d = 0; d < 6; d++) {
            size_t size = psoup_dtype_size(floats[d]);
            psoup__from_f32(context, room, floats[d], source, many);
            if (first[d] == NULL)
                first[d] = memcpy(malloc(many * size), room, many * size);
            ck_assert_mem_eq(first[d], room, many * size);
            /* every length and misalignment */
            for (size_t n = 0; n < 40; n++)
                for (size_t shift = 0; shift < 4; shift++) {
                    memset(room, 0xa5, (n + 2) * 8);
                    memset(back, 0xa5, (n + 2) * 4);
                    psoup__from_f32(context, room + shift, floats[d], source + n, n);
                    ck_assert_mem_eq(room + shift, first[d] + n * size, n * size);
                    ck_assert_uint_eq(room[shift + n * size], 0xa5);
                    psoup__to_f32(context, (float *)(void *)(back + shift), room + shift, floats[d],
                                  n);
                    ck_assert_uint_eq(back[shift + n * 4], 0xa5);
                    if (d == 0)
                        ck_assert_mem_eq(back + shift, source + n, n * 4);
                }
        }
        const double doubles[] = {0.1, 1 + 0x1p-24, 1 + 0x3p-24, 1e300, -1e-300, 1 + 0x1.8p-24};
        const float rounded[] = {0.1f, 1.0f, 1 + 0x1p-22f, INFINITY, -0.0f, 1 + 0x1p-23f};
        float got[6];
        psoup__to_f32(context, got, doubles, PSOUP_F64, 6);
        for (int i = 0; i < 6; i++)
            ck_assert_uint_eq(bits_of(got[i]), bits_of(rounded[i]));
        psoup_context_free(context);
    }
    for (int d = 0; d < 6; d++)
        free(first[d]);
    free(room);
    free(back);
}
END_TEST

/* ---- random words ------------------------------------------------------------------------------
 */

START_TEST(philox) {
    /* philox4x32 10 of Random123's kat_vectors: counter, key, answer */
    static const uint32_t known[3][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d,
         0x41c83b0e, 0xa20bc7c6, 0x6d5451fd},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09,
         0x94fdcceb, 0x5001e420, 0x24126ea1}};
    uint32_t out[4];
    for (int i = 0; i < 3; i++) {
        const uint32_t *v = known[i];
        uint64_t seed = v[4] | (uint64_t)v[5] << 32, block = v[0] | (uint64_t)v[1] << 32;
        uint64_t sequence = v[2] | (uint64_t)v[3] << 32;
        psoup__philox_block(seed, sequence, block, out);
        ck_assert_mem_eq(out, v + 6, sizeof out);
    }
    ck_assert_uint_eq(psoup__philox_word(0, 0, 2), 0xbc57ac4c);
    psoup__philox_block(9, 8, 7, out);
    psoup__random random = {.seed = 9, .sequence = 8, .position = 28};
    for (int i = 0; i < 4; i++)
        ck_assert_uint_eq(psoup__random_word(&random), out[i]);
    ck_assert_uint_eq(random.position, 32);
    ck_assert_float_eq(psoup__uniform(0xffffffff), 1 - 0x1p-24f);
    ck_assert_float_eq(psoup__uniform(255), 0.0f);
    ck_assert_float_eq(psoup__uniform(0x80000000u), 0.5f);
}
END_TEST

START_TEST(random_numbers) {
    psoup__random random = {.seed = 42};
    enum { n = 200000 };
    double sum = 0, square = 0, fourth = 0, uniform = 0;
    for (int i = 0; i < n; i++) {
        double x = (double)psoup__random_normal(&random);
        sum += x, square += x * x, fourth += x * x * x * x;
        float u = psoup__random_uniform(&random);
        ck_assert(u >= 0 && u < 1);
        uniform += (double)u;
    }
    ck_assert_uint_eq(random.position, 3 * n);
    /* five standard errors of the moments */
    ck_assert_double_lt(fabs(sum / n), 5 / sqrt(n));
    ck_assert_double_lt(fabs(square / n - 1), 5 * sqrt(2.0 / n));
    ck_assert_double_lt(fabs(fourth / n - 3), 5 * sqrt(96.0 / n));
    ck_assert_double_lt(fabs(uniform / n - 0.5), 5 * sqrt(1 / 12.0 / n));

    for (uint64_t first = 0; first < 8; first += 2) { /* many are those one by one */
        psoup__random one = {.seed = 7, .sequence = 3, .position = first}, many = one;
        float out[5];
        psoup__random_normals(&many, out, 5);
        for (int i = 0; i < 5; i++)
            ck_assert_float_eq(out[i], psoup__random_normal(&one));
        ck_assert_uint_eq(many.position, one.position);
    }

    int counts[6] = {0};
    for (int i = 0; i < 60000; i++)
        counts[psoup__random_below(&random, 6)]++;
    for (int i = 0; i < 6; i++)
        ck_assert_int_lt(abs(counts[i] - 10000), 5 * 92);
    /* with n = 3 · 2³⁰ a biased draw gives a third of the numbers twice as often: the lowest when
     * it divides, the multiples of three when it multiplies */
    int low = 0, multiples = 0;
    for (int i = 0; i < 30000; i++) {
        uint32_t x = psoup__random_below(&random, 3u << 30);
        low += x < 1u << 30, multiples += x % 3 == 0;
    }
    ck_assert_int_lt(abs(low - 10000), 5 * 82);
    ck_assert_int_lt(abs(multiples - 10000), 5 * 82);
    ck_assert_uint_eq(psoup__random_below(&random, 1), 0);

    int places[4][4] = {{0}};
    for (int i = 0; i < 24000; i++) {
        int32_t items[4] = {0, 1, 2, 3}, seen = 0;
        psoup__random_shuffle(&random, items, 4);
        for (int j = 0; j < 4; j++)
            seen |= 1 << items[j], places[items[j]][j]++;
        ck_assert_int_eq(seen, 15);
    }
    for (int i = 0; i < 16; i++)
        ck_assert_int_lt(abs(places[i / 4][i % 4] - 6000), 5 * 67);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("base numbers");
    TCase *c = tcase_create("numbers");
    tcase_set_timeout(c, 120);
    tcase_add_test(c, dtypes);
    tcase_add_test(c, conversions);
    tcase_add_test(c, philox);
    tcase_add_test(c, random_numbers);
    suite_add_tcase(suite, c);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
