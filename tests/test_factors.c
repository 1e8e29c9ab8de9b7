/* Adapters merged into one adapter: PEFT's ways, and the fit of a dense change without factors. */
#include "methods_case.h"

#include "format/format.h"

static const char *const isas[] = {"generic", "avx2", "avx512"};

/* ---- PEFT's linear --------------------------------------------------------------------------- */

static psoup_lora_factors factors_of(const psoup__peft_pair *pair) {
    size_t n_a = (size_t)(pair->a.shape[0] * pair->a.shape[1]),
           n_b = (size_t)(pair->b.shape[0] * pair->b.shape[1]);
    float *a = malloc(n_a * sizeof *a), *b = malloc(n_b * sizeof *b);
    psoup__tensor_read(context, &pair->a, 0, n_a, a);
    psoup__tensor_read(context, &pair->b, 0, n_b, b);
    return (psoup_lora_factors){a, b, pair->rank, pair->scale};
}

static void free_factors(psoup_lora_factors *f, size_t n) {
    for (size_t i = 0; i < n; i++) {
        free((void *)(uintptr_t)f[i].a);
        free((void *)(uintptr_t)f[i].b);
    }
}

/* tests/golden/merge.py has PEFT 0.13.2 merge a and b, 0.3 and 0.7, as "linear", and stores the
 * dense change. */
START_TEST(peft_linear_is_peft_s) {
    const double weights[2] = {0.3, 0.7};
    psoup__peft *adapters[2];
    psoup__weights *golden;
    ck_ok(psoup__peft_open(context, A, &adapters[0], &error));
    ck_ok(psoup__peft_open(context, B, &adapters[1], &error));
    ck_ok(psoup__weights_map(context, GOLDEN "linear.safetensors", "model", &golden, &error));
    ck_assert_uint_gt(adapters[0]->n, 0);
    for (size_t i = 0; i < adapters[0]->n; i++) {
        const psoup__peft_pair *pair = &adapters[0]->pairs[i];
        psoup_lora_factors f[2] = {factors_of(pair), factors_of(&adapters[1]->pairs[i])};
        const int64_t in = pair->a.shape[1], out = pair->b.shape[0];
        const psoup__tensor *dense = psoup__weights_find(golden, pair->module);
        float *a = malloc((size_t)(in * pair->rank) * 4),
              *b = malloc((size_t)(out * pair->rank) * 4);
        double lost = -1, gap = 0, whole = 0;
        ck_assert_ptr_nonnull(dense);
        ck_ok(psoup_merge_factors(context, PSOUP_MERGE_PEFT_LINEAR, a, b, pair->rank, out, in, f,
                                  weights, 2, &lost, &error));
        for (int64_t r = 0; r < out; r++)
            for (int64_t c = 0; c < in; c++) {
                double sum = 0, exact = 0;
                for (int64_t k = 0; k < pair->rank; k++) {
                    sum += (double)b[r * pair->rank + k] * (double)a[k * in + c];
                    for (int x = 0; x < 2; x++)
                        exact += weights[x] * (double)f[x].scale *
                                 (double)f[x].b[r * pair->rank + k] * (double)f[x].a[k * in + c];
                }
                ck_assert_double_eq_tol(sum, as_double(dense, (size_t)(r * in + c)), 1e-6);
                gap += (sum - exact) * (sum - exact);
                whole += exact * exact;
            }
        ck_assert_double_eq_tol(lost, sqrt(gap / whole), 1e-6);
        ck_assert_double_gt(lost, 0.1);
        free(a);
        free(b);
        free_factors(f, 2);
    }
    psoup__weights_free(golden);
    psoup__peft_free(adapters[0]);
    psoup__peft_free(adapters[1]);
}
END_TEST

START_TEST(peft_linear_refuses) {
    float x[64] = {0}, a[64], b[64];
    psoup_lora_factors f[2] = {{x, x, 2, 1}, {x, x, 2, 3}};
    double weights[2] = {1, -1};
    ck_assert_int_eq(psoup_merge_factors(context, PSOUP_MERGE_PEFT_LINEAR, a, b, 2, 4, 4, f,
                                         weights, 2, NULL, &error),
                     PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "square root"));
    weights[1] = 0;
    ck_ok(psoup_merge_factors(context, PSOUP_MERGE_PEFT_LINEAR, a, b, 2, 4, 4, f, weights, 2, NULL,
                              &error));
    f[1].rank = 3;
    weights[1] = 1;
    ck_assert_int_eq(psoup_merge_factors(context, PSOUP_MERGE_PEFT_LINEAR, a, b, 2, 4, 4, f,
                                         weights, 2, NULL, &error),
                     PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "equal ranks"));
    f[1].rank = 2;
    ck_assert_int_eq(
        psoup_merge_factors(context, PSOUP_MERGE_TIES, a, b, 2, 4, 4, f, weights, 2, NULL, &error),
        PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "expected delta"));
}
END_TEST

/* ---- the same bits whatever the machine ------------------------------------------------------ */

START_TEST(svd_has_one_result) {
    enum { OUT = 1100, IN = 700, R = 9, N = 3 };
    psoup_lora_factors f[N];
    const double weights[N] = {0.2, 0.5, 0.3};
    float *a[2], *b[2];
    for (int i = 0; i < N; i++)
        f[i] = (psoup_lora_factors){noises(R * IN), noises(OUT * R), R, 1.5f};
    for (int i = 0; i < 2; i++) {
        a[i] = malloc(5 * IN * sizeof(float));
        b[i] = malloc(5 * OUT * sizeof(float));
    }
    bool first = true;
    for (int isa = 0; isa < 3; isa++)
        for (int threads = 1; threads <= 3; threads++) {
            psoup_context *made = new_context(threads, isas[isa]);
            if (made == NULL)
                continue;
            ck_ok(psoup_merge_factors(made, PSOUP_MERGE_SVD, a[!first], b[!first], 5, OUT, IN, f,
                                      weights, N, NULL, &error));
            ck_assert(first || memcmp(a[0], a[1], 5 * IN * sizeof(float)) == 0);
            ck_assert(first || memcmp(b[0], b[1], 5 * OUT * sizeof(float)) == 0);
            first = false;
            psoup_context_free(made);
        }
    free_factors(f, N);
    for (int i = 0; i < 2; i++) {
        free(a[i]);
        free(b[i]);
    }
}
END_TEST

/* ---- the fit of a dense change --------------------------------------------------------------- */

static const char *const dense_methods[] = {"ties", "dare_linear", "dare_ties", "magnitude_prune"};

static double distance_to(const float *dense, const float *a, const float *b, int64_t rows,
                          int64_t columns, int32_t rank, double *whole) {
    double gap = 0;
    *whole = 0;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) {
            double sum = 0, exact = (double)dense[i * columns + j];
            for (int64_t k = 0; k < rank; k++)
                sum += (double)b[i * rank + k] * (double)a[k * columns + j];
            gap += (sum - exact) * (sum - exact);
            *whole += exact * exact;
        }
    return sqrt(gap);
}

/* Adapters' ΔW merged as PEFT does, and fitted as well as numpy's SVD can. */
START_TEST(fits_what_has_no_factors) {
    enum { ROWS = 24, COLUMNS = 40, N = 3 };
    const char *method = dense_methods[_i];
    const double weight[N] = {0.5, 0.3, 0.2}, density[N] = {0.4, 0.4, 0.4}, one = 1;
    psoup__weights *golden;
    psoup_lora_factors f[N];
    psoup__merge_input inputs[N];
    char name[64];
    ck_ok(psoup__weights_map(context, "tests/golden/methods/model.safetensors", "model", &golden,
                              &error));
    for (int i = 0; i < N; i++) {
        snprintf(name, sizeof name, "lora.%c.A", 'a' + i);
        const psoup__tensor *a = psoup__weights_find(golden, name);
        snprintf(name, sizeof name, "lora.%c.B", 'a' + i);
        const psoup__tensor *b = psoup__weights_find(golden, name);
        const psoup__peft_pair pair = {
            .a = *a, .b = *b, .scale = 1.5f, .rank = (int32_t)a->shape[0]};
        f[i] = factors_of(&pair);
        inputs[i] = (psoup__merge_input){
            .factors = &f[i], .weights = &one, .n_factors = 1, .columns = COLUMNS};
    }
    psoup__method_job job = {.context = context,
                             .name = "lora",
                             .n = ROWS * COLUMNS,
                             .columns = COLUMNS,
                             .rows = ROWS,
                             .count = N,
                             .inputs = inputs,
                             .weight = weight,
                             .density = density,
                             .lambda = 1,
                             .peer = PSOUP_MERGE_PEFT,
                             .seed = 0x1234567890abcdef,
                             .method = psoup__method_named(method)};
    job.normalize = (job.method->on[PSOUP_MERGE_PEFT] & PSOUP__USES_NORMALIZE) != 0;
    job.rescale = (job.method->on[PSOUP_MERGE_PEFT] & PSOUP__USES_RESCALE) != 0;
    float *dense = malloc(job.n * sizeof *dense), a[30 * COLUMNS], b[ROWS * 30];
    run_all_ways(&job, dense);
    snprintf(name, sizeof name, "dense.%s", method);
    const psoup__tensor *expected = psoup__weights_find(golden, name);
    snprintf(name, sizeof name, "lost.%s", method);
    const psoup__tensor *best = psoup__weights_find(golden, name);
    for (size_t i = 0; i < job.n; i++)
        ck_assert_double_eq_tol((double)dense[i], as_double(expected, i), 4e-6);
    for (int32_t rank = 1; rank <= 30; rank += rank < 7 ? 2 : 23) {
        double lost, whole, optimum = rank < ROWS ? as_double(best, (size_t)rank) : 0;
        ck_ok(psoup__merge_dense_svd(&job, rank, a, b, &lost, &error));
        double gap = distance_to(dense, a, b, ROWS, COLUMNS, rank, &whole);
        ck_assert_double_eq_tol(lost, gap / sqrt(whole), 1e-6);
        ck_assert_double_eq_tol(lost, optimum, 2e-5);
    }
    free(dense);
    free_factors(f, N);
    psoup__weights_free(golden);
}
END_TEST

/* Larger than what is merged at a time, and with one result. */
START_TEST(fits_have_one_result) {
    enum { ROWS = 330, COLUMNS = 210, N = 2, RANK = 6 };
    psoup_lora_factors f[N];
    psoup__merge_input inputs[N];
    const double weight[N] = {0.5, 0.8}, density[N] = {1, 1}, one = 1;
    float *a[2], *b[2];
    double lost;
    for (int i = 0; i < N; i++) {
        f[i] = (psoup_lora_factors){noises(3 * COLUMNS), noises(ROWS * 3), 3, 0.7f};
        inputs[i] = (psoup__merge_input){
            .factors = &f[i], .weights = &one, .n_factors = 1, .columns = COLUMNS};
        a[i] = malloc(RANK * COLUMNS * sizeof(float));
        b[i] = malloc(RANK * ROWS * sizeof(float));
    }
    psoup__method_job job = {.name = "lora",
                             .n = ROWS * COLUMNS,
                             .columns = COLUMNS,
                             .rows = ROWS,
                             .count = N,
                             .inputs = inputs,
                             .weight = weight,
                             .density = density,
                             .lambda = 1,
                             .method = psoup__method_named("task_arithmetic")};
    for (int isa = 0; isa < 3; isa++) {
        bool first = true; /* the matrix products are the same on one instruction set */
        for (int threads = 1; threads <= 3; threads++) {
            psoup_context *made = new_context(threads, isas[isa]);
            if (made == NULL)
                continue;
            job.context = made;
            ck_ok(psoup__merge_dense_svd(&job, RANK, a[!first], b[!first], &lost, &error));
            ck_assert_double_le(lost, 2e-6); /* it has that rank */
            ck_assert(first || memcmp(a[0], a[1], RANK * COLUMNS * sizeof(float)) == 0);
            ck_assert(first || memcmp(b[0], b[1], RANK * ROWS * sizeof(float)) == 0);
            first = false;
            if (threads == 2) { /* merged anew for each pass, in panels of 39 rows and of one */
                for (int64_t kept = 39 * COLUMNS * 4; kept >= 0; kept -= 39 * COLUMNS * 4) {
                    double again;
                    memset(a[1], 0, RANK * COLUMNS * sizeof(float));
                    ck_ok(psoup__merge_dense_fit(&job, RANK, kept, a[1], b[1], &again, &error));
                    ck_assert_mem_eq(a[0], a[1], RANK * COLUMNS * sizeof(float));
                    ck_assert_mem_eq(b[0], b[1], RANK * ROWS * sizeof(float));
                    ck_assert_double_eq_tol(again, lost, 1e-9);
                }
            }
            psoup_context_free(made);
        }
    }
    job.context = context;
    job.weight = (const double[]){0, 0};
    ck_ok(psoup__merge_dense_svd(&job, RANK, a[0], b[0], &lost, &error));
    ck_assert(lost == 0 && a[0][7] == 0 && b[0][7] == 0);
    job.weight = weight;
    ((float *)(uintptr_t)f[0].b)[5] = NAN;
    ck_assert_int_eq(psoup__merge_dense_svd(&job, RANK, a[0], b[0], &lost, &error),
                     PSOUP_ERROR_FORMAT);
    job.rows = 3;
    ck_assert_int_eq(psoup__merge_dense_svd(&job, RANK, a[0], b[0], &lost, &error),
                     PSOUP_ERROR_ARGUMENT);
    free_factors(f, N);
    for (int i = 0; i < 2; i++) {
        free(a[i]);
        free(b[i]);
    }
}
END_TEST

START_TEST(every_allocation_may_fail) {
    enum { ROWS = 300, COLUMNS = 30, RANK = 3, N = 2 };
    psoup_lora_factors f[N];
    psoup__merge_input inputs[N];
    const double weight[N] = {0.5, 0.8}, density[N] = {0.6, 0.4}, one = 1;
    float a[(N + 1) * RANK * COLUMNS], b[ROWS * (N + 1) * RANK];
    double lost;
    for (int i = 0; i < N; i++) {
        f[i] = (psoup_lora_factors){noises(RANK * COLUMNS), noises(ROWS * RANK), RANK, 0.7f};
        inputs[i] = (psoup__merge_input){
            .factors = &f[i], .weights = &one, .n_factors = 1, .columns = COLUMNS};
    }
    const psoup__method_job job = {.context = context,
                                   .name = "lora",
                                   .n = ROWS * COLUMNS,
                                   .columns = COLUMNS,
                                   .rows = ROWS,
                                   .count = N,
                                   .inputs = inputs,
                                   .weight = weight,
                                   .density = density,
                                   .lambda = 1,
                                   .method = psoup__method_named("ties")};
    for (int k = 0; k < 3; k++) {
        psoup_status status = PSOUP_ERROR_MEMORY;
        int before = live, at = 0;
        for (; status != PSOUP_OK; at++) {
            allocations = 0;
            fail_at = at;
            status = k == 0 ? psoup__merge_dense_svd(&job, RANK, a, b, &lost, &error)
                            : psoup_merge_factors(
                                  context, k == 1 ? PSOUP_MERGE_SVD : PSOUP_MERGE_PEFT_LINEAR, a, b,
                                  RANK, ROWS, COLUMNS, f, weight, N, &lost, &error);
            fail_at = -1;
            ck_assert(status == PSOUP_OK || status == PSOUP_ERROR_MEMORY);
            ck_assert_int_eq(live, before);
        }
        ck_assert_int_gt(at, 5);
    }
    free_factors(f, N);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("factors");
    TCase *tests = tcase_create("factors");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, peft_linear_is_peft_s);
    tcase_add_test(tests, peft_linear_refuses);
    tcase_add_test(tests, svd_has_one_result);
    tcase_add_loop_test(tests, fits_what_has_no_factors, 0, 4);
    tcase_add_test(tests, fits_have_one_result);
    tcase_add_test(tests, every_allocation_may_fail);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
