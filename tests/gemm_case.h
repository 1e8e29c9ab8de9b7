/* What the tests of the matrix product share: random problems, float64 beside them, and bits compared. */
#ifndef GEMM_CASE_H
#define GEMM_CASE_H

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

static inline uint32_t word(void) { /* splitmix64 (Steele, Lea, Flood 2014) */
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) >> 32);
}
static inline int below(int n) {
    return (int)(word() % (uint32_t)n);
}
static inline float uniform(void) {
    return (float)(word() >> 8) * 0x1p-23f - 1.0f;
}
static inline int any_size(void) {
    return sizes[below(sizeof sizes / sizeof sizes[0])];
}
static inline float *numbers(size_t n) {
    float *x = malloc(n * sizeof *x + 1);
    for (size_t i = 0; i < n; i++)
        x[i] = uniform();
    return x;
}
static inline int32_t *distinct(int n, int bound) { /* n of bound numbers, shuffled */
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
static inline int32_t *repeated(int n, int bound) { /* n numbers below bound */
    int32_t *x = malloc((size_t)n * sizeof *x + 1);
    for (int i = 0; i < n; i++)
        x[i] = below(bound);
    return x;
}

/* Keeps what fits the dtype, so that x is exact in it. */
static inline float rounded(float x, psoup_dtype dtype) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits &= dtype == PSOUP_BF16 ? 0xffff0000u : dtype == PSOUP_F16 ? 0xffffe000u : ~0u;
    memcpy(&x, &bits, 4);
    return dtype == PSOUP_F16 && fabsf(x) < 0x1p-10f ? 0x1p-24f * (float)(bits >> 13 & 0x3ff) : x;
}
static inline uint16_t narrowed(float x, psoup_dtype dtype) { /* of a rounded number */
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

static inline problem random_problem(int m, int n, int k, bool options) {
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

static inline void problem_free(problem *x) {
    free(x->a), free(x->b), free(x->c), free(x->scale), free(x->b_raw);
    free(x->c_rows), free(x->a_rows), free(x->a_depth), free(x->b_depth);
}

static inline float a_of(const problem *x, int64_t i, int64_t p) {
    const psoup__gemm_args *g = &x->args;
    int64_t row = g->a_rows ? g->a_rows[i] : i, at = g->a_depth ? g->a_depth[p] : p;
    float s = g->alpha;
    if (g->a_scale)
        s = g->a_scale[(g->a_scale_by_depth ? at : row) * g->a_scale_stride] * g->alpha;
    return g->a[row * g->a_row + at * g->a_col] * s;
}
static inline float b_of(const problem *x, int64_t p, int64_t j) {
    const psoup__gemm_args *g = &x->args;
    return x->b[(g->b_depth ? g->b_depth[p] : p) * g->b_row + j * g->b_col];
}

static inline psoup_context *context_of(const char *isa, int threads) { /* NULL: not on this machine */
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *context = NULL;
    options.isa = isa;
    options.threads = threads;
    if (psoup_context_create(&options, &context, NULL) != PSOUP_OK)
        return NULL;
    return context;
}

/* Runs the problem into a fresh copy of its C, with B packed ahead where `packed`. */
static inline float *result(psoup_context *context, const problem *x, bool packed) {
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

static inline void check_against_f64(const problem *x, const float *c) {
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

static inline void check_same(const float *x, const float *y, size_t n, const char *what) {
    for (size_t i = 0; i < n; i++)
        ck_assert_msg(memcmp(x + i, y + i, 4) == 0, "%s: [%zu] is %a, not %a", what, i, y[i], x[i]);
}

static inline int run_suite(Suite *suite) {
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}

#endif
