/* The matrix product: against float64, and bit for bit against itself in other company. */
#include <check.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/base.h"

static const char *const isas[] = {"generic", "avx2", "avx512", "neon"};
static const int sizes[] = {1, 2, 5, 6, 7, 15, 16, 17, 37, 64, 100, 127, 128, 129, 300, 513};

/* ---- random problems ------------------------------------------------------------------------- */

static uint64_t state; /* set by each test */

static uint32_t word(void) { /* splitmix64 (Steele, Lea, Flood 2014) */
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}
static int below(int n) {
    return (int)(word() % (uint32_t)n);
}
static float uniform(void) {
    return (float)(word() >> 8) * 0x1p-23f - 1.0f;
}
static int any_size(void) {
    return sizes[below(sizeof sizes / sizeof sizes[0])];
}
static float *numbers(size_t n) {
    float *x = malloc(n * sizeof *x + 1);
    for (size_t i = 0; i < n; i++)
        x[i] = uniform();
    return x;
}
static int32_t *distinct(int n, int bound) { /* n of bound numbers, shuffled */
    int32_t *x = malloc((size_t)bound * sizeof *x + 1);
    for (int i = 0; i < bound; i++)
        x[i] = i;
    for (int i = 0; i < n; i++) {
        int j = i + below(bound - i);
        int32_t t = x[i];
        x[i] = x[j];
        x[j] = t;
    }
    return x;
}
static int32_t *repeated(int n, int bound) { /* n numbers below bound */
    int32_t *x = malloc((size_t)n * sizeof *x + 1);
    for (int i = 0; i < n; i++)
        x[i] = below(bound);
    return x;
}

/* Keeps what fits the dtype, so that x is exact in it. */
static float rounded(float x, psoup_dtype dtype) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits &= dtype == PSOUP_BF16 ? 0xffff0000u : dtype == PSOUP_F16 ? 0xffffe000u : ~0u;
    memcpy(&x, &bits, 4);
    return dtype == PSOUP_F16 && fabsf(x) < 0x1p-10f ? 0x1p-24f * (float)(bits >> 13 & 0x3ff) : x;
}
static uint16_t narrowed(float x, psoup_dtype dtype) { /* of a rounded number */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (dtype == PSOUP_BF16)
        return (uint16_t)(bits >> 16);
    float magnitude = fabsf(x) * 0x1p-112f; /* binary16's exponents, also of subnormals */
    uint32_t half;
    memcpy(&half, &magnitude, 4);
    return (uint16_t)(half >> 13 | (bits >> 16 & 0x8000));
}

/* A product with everything it points to. */
typedef struct problem {
    psoup__gemm_args args;
    float *a, *b, *c, *scale; /* b: the values as f32, laid out as args.b */
    void *b_raw;
    int32_t *c_rows, *a_rows, *a_depth, *b_depth;
    size_t c_size;
} problem;

static problem random_problem(int m, int n, int k, bool options) {
    problem x = {.args = {.m = m, .n = n, .k = k, .alpha = 1}};
    psoup__gemm_args *g = &x.args;
    int rows = m + (options ? below(9) : 0), depths = k + (options ? below(9) : 0) + (k == 0);
    if (options && below(2))
        g->a_rows = x.a_rows = repeated(m, rows);
    if (options && below(3) == 0)
        g->a_depth = x.a_depth = repeated(k, depths);
    if (options && below(3) == 0)
        g->b_depth = x.b_depth = repeated(k, depths);
    if (options && below(2))
        g->c_rows = x.c_rows = distinct(m, rows);
    if (options && below(3) == 0)
        g->alpha = uniform();
    g->accumulate = options && below(2);
    g->c_stride = n + (options ? below(5) : 0);
    int layout = options ? below(3) : 0;
    g->a_col = layout == 0 ? 1 : layout == 1 ? rows + below(3) : 2;
    g->a_row = layout == 1 ? 1 : depths * g->a_col + below(3);
    layout = below(3);
    g->b_row = layout == 0 ? n + below(20) : layout == 1 ? 1 : 2 * n;
    g->b_col = layout == 0 ? 1 : layout == 1 ? depths + below(20) : 2;
    if (options && below(2)) {
        g->a_scale_by_depth = below(2);
        g->a_scale_stride = 1 + below(3);
        g->a_scale = x.scale = numbers((size_t)(rows + depths) * 3);
    }
    g->b_dtype = (psoup_dtype[]){PSOUP_F32, PSOUP_F16, PSOUP_BF16}[below(3)];
    size_t b_size = (size_t)(depths * g->b_row + n * g->b_col);
    x.c_size = (size_t)(rows * g->c_stride);
    g->a = x.a = numbers((size_t)(rows * g->a_row + depths * g->a_col));
    g->c = x.c = numbers(x.c_size);
    x.b = numbers(b_size);
    size_t width = g->b_dtype == PSOUP_F32 ? 4 : 2, odd = options && below(2);
    char *raw = x.b_raw = malloc(b_size * width + 1);
    g->b = raw + odd; /* B may lie at any alignment */
    for (size_t i = 0; i < b_size; i++) {
        x.b[i] = rounded(x.b[i], g->b_dtype);
        uint16_t half = narrowed(x.b[i], g->b_dtype);
        memcpy(raw + odd + i * width, width == 4 ? (void *)&x.b[i] : (void *)&half, width);
    }
    return x;
}

static void problem_free(problem *x) {
    free(x->a), free(x->b), free(x->c), free(x->scale), free(x->b_raw);
    free(x->c_rows), free(x->a_rows), free(x->a_depth), free(x->b_depth);
}

static float a_of(const problem *x, int64_t i, int64_t p) {
    const psoup__gemm_args *g = &x->args;
    int64_t row = g->a_rows ? g->a_rows[i] : i, at = g->a_depth ? g->a_depth[p] : p;
    float s = g->alpha;
    if (g->a_scale)
        s = g->a_scale[(g->a_scale_by_depth ? at : row) * g->a_scale_stride] * g->alpha;
    return g->a[row * g->a_row + at * g->a_col] * s;
}
static float b_of(const problem *x, int64_t p, int64_t j) {
    const psoup__gemm_args *g = &x->args;
    return x->b[(g->b_depth ? g->b_depth[p] : p) * g->b_row + j * g->b_col];
}

static psoup_context *context_of(const char *isa, int threads) { /* NULL: not on this machine */
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *context = NULL;
    options.isa = isa;
    options.threads = threads;
    if (psoup_context_create(&options, &context, NULL) != PSOUP_OK)
        return NULL;
    return context;
}

/* Runs the problem into a fresh copy of its C, with B packed ahead where `packed`. */
static float *result(psoup_context *context, const problem *x, bool packed) {
    psoup__gemm_args g = x->args;
    psoup__gemm_b *ahead = NULL;
    float *c = malloc(x->c_size * sizeof *c + 1);
    memcpy(c, x->c, x->c_size * sizeof *c);
    g.c = c;
    if (packed) {
        ck_assert_int_eq(psoup__gemm_pack(context, g.b, g.b_dtype, g.k, g.n, g.b_row, g.b_col,
                                          &ahead, NULL), PSOUP_OK);
        g.packed = ahead;
        g.b = NULL;
    }
    psoup__gemm(context, &g);
    psoup__gemm_b_free(context, ahead);
    return c;
}

static void check_against_f64(const problem *x, const float *c) {
    const psoup__gemm_args *g = &x->args;
    bool *written = calloc(x->c_size + 1, 1);
    for (int64_t i = 0; i < g->m; i++)
        for (int64_t j = 0; j < g->n; j++) {
            int64_t at = (g->c_rows ? g->c_rows[i] : i) * g->c_stride + j;
            double sum = g->accumulate ? x->c[at] : 0, size = fabs(sum);
            for (int64_t p = 0; p < g->k; p++) {
                double term = (double)a_of(x, i, p) * b_of(x, p, j);
                sum += term;
                size += fabs(term);
            }
            written[at] = true;
            /* |error| ≤ γ(k + 1) Σ|terms| (Higham 2002, §3.1), of which rounding uses little. */
            ck_assert_msg(fabs(c[at] - sum) <= 0x1p-22 * (4 + sqrt((double)g->k)) * size,
                          "%d×%d×%d [%d, %d]: %.9g, expected %.9g", (int)g->m, (int)g->n,
                          (int)g->k, (int)i, (int)j, c[at], sum);
        }
    for (size_t at = 0; at < x->c_size; at++)
        ck_assert_msg(written[at] || c[at] == x->c[at], "wrote outside of C at %zu", at);
    free(written);
}

static void check_same(const float *x, const float *y, size_t n, const char *what) {
    for (size_t i = 0; i < n; i++)
        ck_assert_msg(memcmp(x + i, y + i, 4) == 0, "%s: [%zu] is %a, not %a", what, i, y[i], x[i]);
}

/* ---- tests ----------------------------------------------------------------------------------- */

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

typedef struct caller {
    psoup_context *context;
    const problem *x;
    const float *expected;
    int wrong;
} caller;

static void *call_often(void *arg) {
    caller *me = arg;
    for (int repeat = 0; repeat < 16; repeat++) {
        float *c = result(me->context, me->x, repeat % 4 == 0);
        me->wrong += memcmp(c, me->expected, me->x->c_size * sizeof *c) != 0;
        free(c);
    }
    return NULL;
}
static void call_task(void *arg, size_t task, int worker) {
    call_often((caller *)arg + task);
}

/* Handles share a context: calls at once, and from inside parallel tasks. */
START_TEST(test_concurrent) {
    enum { CALLERS = 7 };
    psoup_context *context = context_of(isas[_i], 2);
    if (context == NULL)
        return;
    problem x[CALLERS];
    caller callers[CALLERS];
    pthread_t threads[CALLERS];
    for (int i = 0; i < CALLERS; i++) {
        state = (uint64_t)i + 50;
        x[i] = random_problem(40 + 30 * i, 170 + 11 * i, 400, false);
        callers[i] = (caller){context, &x[i], result(context, &x[i], false), 0};
    }
    for (int i = 0; i < CALLERS; i++)
        ck_assert_int_eq(pthread_create(&threads[i], NULL, call_often, &callers[i]), 0);
    for (int i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
    psoup__parallel(context, CALLERS, call_task, callers);
    for (int i = 0; i < CALLERS; i++) {
        ck_assert_int_eq(callers[i].wrong, 0);
        free((float *)callers[i].expected);
        problem_free(&x[i]);
    }
    psoup_context_free(context);
}
END_TEST

/* ---- failing memory --------------------------------------------------------------------------- */

typedef struct counter {
    int left, live; /* allocations until the first failure; blocks not yet freed */
} counter;

static void *counted_alloc(void *user, size_t bytes, size_t alignment) {
    counter *count = user;
    if (count->left-- <= 0)
        return NULL;
    __atomic_add_fetch(&count->live, 1, __ATOMIC_SEQ_CST);
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}
static void counted_free(void *user, void *memory) {
    if (memory != NULL)
        __atomic_sub_fetch(&((counter *)user)->live, 1, __ATOMIC_SEQ_CST);
    free(memory);
}

START_TEST(test_memory) {
    counter count = {1000, 0};
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.threads = 2;
    options.allocator = (psoup_allocator){&count, counted_alloc, counted_free};
    psoup_context *context;
    psoup_error error;
    psoup__gemm_b *packed;
    float b[6] = {1, 2, 3, 4, 5, 6};
    ck_assert_int_eq(psoup_context_create(&options, &context, &error), PSOUP_OK);
    int live = count.live;
    for (count.left = 0;; count.left++) {
        int tried = count.left;
        packed = (psoup__gemm_b *)b;
        psoup_status status = psoup__gemm_pack(context, b, PSOUP_F32, 2, 3, 3, 1, &packed, &error);
        if (status == PSOUP_OK) {
            ck_assert_int_eq(tried, 2);
            break;
        }
        ck_assert_int_eq(status, PSOUP_ERROR_MEMORY);
        ck_assert_int_eq(error.status, PSOUP_ERROR_MEMORY);
        ck_assert_ptr_null(packed);
        ck_assert_int_eq(count.live, live);
        count.left = tried;
    }
    psoup__gemm_b_free(context, packed);
    psoup__gemm_b_free(context, NULL);
    ck_assert_int_eq(count.live, live);
    struct psoup__gemm_space *space = NULL;
    for (int left = 0; space == NULL; left++) {
        count.left = left;
        space = psoup__gemm_space_create(context, &error);
        ck_assert(space != NULL || (error.status == PSOUP_ERROR_MEMORY && count.live == live));
        ck_assert_int_le(left, 8);
    }
    psoup__gemm_space_free(context, space);
    psoup__gemm_space_free(context, NULL);
    ck_assert_int_eq(count.live, live);
    count.left = 1000;
    ck_assert_int_eq(psoup__gemm_pack(context, b, PSOUP_I8, 2, 3, 3, 1, &packed, &error),
                     PSOUP_ERROR_ARGUMENT);
    ck_assert_int_eq(psoup__gemm_pack(context, b, PSOUP_F32, INT64_MAX, INT64_MAX / 2, 3, 1, &packed,
                                      &error), PSOUP_ERROR_MEMORY);
    ck_assert_ptr_null(packed);
    ck_assert_int_eq(psoup__gemm_pack(context, b, PSOUP_F32, 0, 3, 3, 1, &packed, &error),
                     PSOUP_OK);
    psoup__gemm_b_free(context, packed);
    psoup_context_free(context);
    ck_assert_int_eq(count.live, 0);
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
    tcase_add_loop_test(tcase, test_nan, 0, variants);
    tcase_add_loop_test(tcase, test_f16, 0, variants);
    tcase_add_loop_test(tcase, test_concurrent, 0, variants);
    tcase_add_test(tcase, test_memory);
    suite_add_tcase(suite, tcase);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
