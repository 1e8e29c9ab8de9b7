/* Merge methods where they could go wrong: tensors of many blocks with equal magnitudes, adapters
 * as inputs, numbers that are none, parameters at their ends, memory that runs out. */
#include "methods_case.h"

#include <malloc.h>

/* ---- selection ------------------------------------------------------------------------------- */

static const float *sorted_by;
static int by_magnitude(const void *a, const void *b) {
    size_t i = *(const size_t *)a, j = *(const size_t *)b;
    float x = fabsf(sorted_by[i]), y = fabsf(sorted_by[j]);
    return x != y ? (x < y) - (x > y) : (i > j) - (i < j);
}

/* Values of few different magnitudes, over several blocks: exactly the k largest stay, of equal
 * ones the first. */
START_TEST(ties_are_cut_by_index) {
    enum { ROWS = 401, COLUMNS = 353 };
    set s;
    const double densities[] = {0, 1e-7, 0.2, 0.5, 0.99, 1}, gamma[3] = {0.1, 0.1, 0.1};
    make_set(&s, _i ? "breadcrumbs" : "magnitude_prune", ROWS, COLUMNS, 1);
    s.job.base = NULL;
    s.job.gamma = gamma;
    for (size_t i = 0; i < s.n; i++) {
        uint32_t word = psoup__philox_word(5, 0, i);
        s.x[0][i] = (word & 8 ? -1.0f : 1.0f) * (float)(word % 7) * 0.25f; /* zeros too */
    }
    size_t *order = malloc(s.n * sizeof *order);
    char *stays = malloc(s.n);
    float *out = malloc(s.n * sizeof *out);
    for (size_t i = 0; i < s.n; i++)
        order[i] = i;
    sorted_by = s.x[0];
    qsort(order, s.n, sizeof *order, by_magnitude);
    for (size_t d = 0; d < sizeof densities / sizeof *densities; d++) {
        size_t k = (size_t)(densities[d] * (double)s.n), top = _i ? (size_t)(0.1 * (double)s.n) : 0;
        top = top + k > s.n ? s.n - k : top;
        memset(stays, 0, s.n);
        for (size_t i = 0; i < k; i++)
            stays[order[top + i]] = 1;
        s.job.density = &densities[d];
        run_all_ways(&s.job, out);
        for (size_t i = 0; i < s.n; i++)
            ck_assert_msg(out[i] == (stays[i] ? s.x[0][i] : 0),
                          "density %g: element %zu is %g of %g", densities[d], i, (double)out[i],
                          (double)s.x[0][i]);
    }
    free(order);
    free(stays);
    free(out);
    free_set(&s);
}
END_TEST

/* ---- many blocks ----------------------------------------------------------------------------- */

/* A tensor of several blocks, whatever its division, with every switch on and off. */
START_TEST(large_tensors_have_one_result) {
    set s;
    make_set(&s, all[_i], 151, 977, inputs_of(all[_i]));
    float *out = malloc(s.n * sizeof *out);
    s.job.weight = some_weights;
    s.job.density = some_densities;
    for (int k = 0; k < 4; k++) {
        s.job.peer = k % 3;
        s.job.normalize = k % 2;
        s.job.rescale = k < 2;
        s.job.flatten = k == 0;
        s.job.row_wise = k == 1;
        s.job.filter_wise = k > 1;
        run_all_ways(&s.job, out);
        for (size_t i = 0; i < s.n; i++)
            ck_assert(isfinite(out[i]));
    }
    free(out);
    free_set(&s);
}
END_TEST

static size_t bytes_now, most_bytes;

static void *weighed_alloc(void *user, size_t bytes, size_t alignment) {
    (void)user;
    void *memory = NULL;
    if (posix_memalign(&memory, alignment < sizeof(void *) ? sizeof(void *) : alignment,
                       bytes + 1) != 0)
        return NULL;
    bytes_now += malloc_usable_size(memory);
    most_bytes = bytes_now > most_bytes ? bytes_now : most_bytes;
    return memory;
}

static void weighed_free(void *user, void *memory) {
    (void)user;
    bytes_now -= malloc_usable_size(memory);
    free(memory);
}

/* What a method allocates for two million elements it allocates for any number: blocks and
 * histograms. */
START_TEST(memory_is_bounded) {
    set s;
    psoup_context *weighed;
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.threads = 2;
    options.allocator = (psoup_allocator){NULL, weighed_alloc, weighed_free};
    ck_ok(psoup_context_create(&options, &weighed, &error));
    make_set(&s, all[_i], 1 << 11, 1 << 10, inputs_of(all[_i]));
    s.job.context = weighed;
    s.job.weight = some_weights;
    s.job.density = some_densities;
    s.job.rescale = true;
    void *state;
    size_t before = most_bytes = bytes_now;
    ck_ok(s.job.method->prepare(&s.job, &state, &error));
    psoup__free(weighed, state);
    ck_assert_uint_eq(bytes_now, before);
    ck_assert_uint_le(most_bytes - before, 7 << 20);
    psoup_context_free(weighed);
    free_set(&s);
}
END_TEST

/* ---- dtypes ---------------------------------------------------------------------------------- */

/* Inputs as they lie in files (q8_0, bf16, rows in llama.cpp's order, f32 of any alignment) give
 * what the same numbers in f32 give. */
START_TEST(inputs_of_any_dtype) {
    enum { ROWS = 24, COLUMNS = 96 };
    set s, plain;
    make_set(&s, all[_i], ROWS, COLUMNS, inputs_of(all[_i]));
    make_set(&plain, all[_i], ROWS, COLUMNS, s.count);
    char *bytes = malloc(s.n * 4 + 1);
    static const psoup_dtype dtypes[3] = {PSOUP_Q8_0, PSOUP_BF16, PSOUP_F32};
    for (size_t i = 0; i < s.count; i++) {
        void *made = malloc(s.n * 4);
        psoup__from_f32(context, made, dtypes[i], s.x[i], s.n);
        memcpy(s.x[i], made, s.n * (i == 0 ? 2 : 4));
        s.tensors[i].dtype = dtypes[i];
        s.tensors[i].heads = i == 2 ? 2 : 0;
        ck_assert(psoup__dtype_bytes(dtypes[i], s.n, &s.tensors[i].bytes));
        psoup__tensor_read(context, &s.tensors[i], 0, s.n, plain.x[i]);
        free(made);
    }
    memcpy(plain.zero, s.zero, s.n * sizeof *s.zero);
    memcpy(bytes + 1, s.zero, s.n * sizeof *s.zero);
    s.base_tensor.data = bytes + 1;
    s.job.weight = plain.job.weight = some_weights;
    s.job.density = plain.job.density = some_densities;
    float *out = malloc(s.n * sizeof *out), *expected = malloc(s.n * sizeof *out);
    run_all_ways(&s.job, out);
    run_all_ways(&plain.job, expected);
    ck_assert_mem_eq(out, expected, s.n * sizeof *out);
    free(bytes);
    free(out);
    free(expected);
    free_set(&s);
    free_set(&plain);
}
END_TEST

/* ---- adapters -------------------------------------------------------------------------------- */

/* A base with adapters, as its tensor and factors, is what the same tensors written out give; and a
 * task vector of it is the adapters' change without the base's rounding. */
START_TEST(adapters_are_task_vectors) {
    enum { ROWS = 70, COLUMNS = 45, RANK = 3 };
    set s, dense;
    const double one[1] = {0.75};
    psoup_lora_factors f[3];
    make_set(&s, all[_i], ROWS, COLUMNS, inputs_of(all[_i]));
    make_set(&dense, all[_i], ROWS, COLUMNS, s.count);
    memcpy(dense.zero, s.zero, s.n * sizeof *s.zero);
    for (size_t i = 0; i < s.count; i++) {
        f[i] = (psoup_lora_factors){noises(RANK * COLUMNS), noises(ROWS * RANK), RANK, 0.5f};
        s.inputs[i] = (psoup__merge_input){.tensor = &s.base_tensor,
                                           .factors = &f[i],
                                           .weights = one,
                                           .n_factors = 1,
                                           .columns = COLUMNS};
        psoup__merge_read(context, &s.inputs[i], 0, s.n, dense.x[i]);
    }
    float *out = malloc(s.n * sizeof *out), *other = malloc(s.n * sizeof *other);
    s.job.weight = dense.job.weight = some_weights;
    run_all_ways(&s.job, out);
    run_all_ways(&dense.job, other);
    for (size_t i = 0; i < s.n; i++)
        ck_assert_float_eq_tol(out[i], other[i], 4e-6f);
    if (strcmp(all[_i], "task_arithmetic") ==
        0) { /* a base of 1e9 swallows ΔW; the task vector does not */
        float *change = malloc(s.n * sizeof *change);
        psoup__merge_input zeros = s.inputs[0];
        zeros.tensor = NULL;
        psoup__merge_read(context, &zeros, 0, s.n, change);
        s.job.count = 1;
        s.job.weight = (const double[]){1e9};
        for (size_t i = 0; i < s.n; i++)
            s.zero[i] = 1e9f;
        ck_ok(run_blocks(context, &s.job, s.n, out, &error));
        for (size_t i = 0; i < s.n; i++)
            ck_assert_float_eq(out[i], 1e9f + 1e9f * change[i]);
        free(change);
    }
    for (size_t i = 0; i < s.count; i++) {
        free((void *)(uintptr_t)f[i].a);
        free((void *)(uintptr_t)f[i].b);
    }
    free(out);
    free(other);
    free_set(&s);
    free_set(&dense);
}
END_TEST

/* ---- ends of parameters ---------------------------------------------------------------------- */

static void check_equal(const set *s, const float *out, const float *expected, float tolerance) {
    for (size_t i = 0; i < s->n; i++)
        ck_assert_msg(fabsf(out[i] - expected[i]) <= tolerance, "%s: element %zu is %g, not %g",
                      s->job.method->name, i, (double)out[i], (double)expected[i]);
}

START_TEST(ends_of_parameters) {
    set s;
    make_set(&s, "ties", 13, 7, 3);
    float *out = malloc(s.n * sizeof *out);
    s.job.normalize = true;
    s.job.density = (const double[]){0, 0, 0};
    run_all_ways(&s.job, out);
    check_equal(&s, out, s.zero, 0); /* nothing is left but the base */
    s.job.density = NULL;
    for (size_t i = 0; i < s.n; i++)
        s.x[0][i] = s.x[1][i] = s.x[2][i] = s.zero[i] + 0.5f;
    run_all_ways(&s.job, out);
    check_equal(&s, out, s.x[0], 1e-6f); /* three that agree */
    for (size_t i = 0; i < s.n; i++) {
        s.x[0][i] = s.zero[i] + 0.25f;
        s.x[1][i] = s.zero[i] - 0.25f;
        s.zero[i] = s.x[2][i] = (s.x[0][i] + s.x[1][i]) / 2;
    }
    s.job.count = 2;
    s.job.base = NULL; /* +v and −v: a tie */
    for (size_t i = 0; i < s.n; i++) {
        s.x[0][i] = 1;
        s.x[1][i] = -1;
    }
    run_all_ways(&s.job, out);
    ck_assert(out[3] == 0); /* the paper's sign of 0 is 0 */
    s.job.peer = PSOUP_MERGE_MERGEKIT;
    run_all_ways(&s.job, out);
    ck_assert(out[3] == 1);
    s.job.peer = PSOUP_MERGE_PEFT;
    run_all_ways(&s.job, out);
    ck_assert(out[3] == 1);

    s.job.method = psoup__method_named("slerp"); /* opposed: straight through 0 */
    s.job.t = 0.25;
    run_all_ways(&s.job, out);
    ck_assert_float_eq_tol(out[3], 0.5f, 1e-6f);
    s.job.method = psoup__method_named("nuslerp");
    s.job.weight = (const double[]){0.75, 0.25};
    run_all_ways(&s.job, out);
    ck_assert_float_eq_tol(out[3], 0.5f, 1e-6f);
    memset(s.x[1], 0, s.n * sizeof *s.x[1]);
    memset(s.x[0], 0, s.n * sizeof *s.x[0]);
    for (int rows = 0; rows < 3; rows++) { /* zeros have no direction, and stay zeros */
        s.job.flatten = rows == 0;
        s.job.row_wise = rows == 1;
        run_all_ways(&s.job, out);
        ck_assert(out[5] == 0);
    }
    s.job.method = psoup__method_named("slerp");
    run_all_ways(&s.job, out);
    ck_assert(out[5] == 0);
    s.job.method = psoup__method_named("model_stock"); /* what adds up to nothing leaves the base */
    s.job.base = &s.base;
    for (size_t i = 0; i < s.n; i++) {
        s.zero[i] = (float)i;
        s.x[0][i] = (float)i + 2;
        s.x[1][i] = (float)i - 2;
    }
    for (int rows = 0; rows < 2; rows++) {
        s.job.filter_wise = rows;
        run_all_ways(&s.job, out);
        check_equal(&s, out, s.zero, 0);
    }
    free(out);
    free_set(&s);
}
END_TEST

/* One element, and none. */
START_TEST(smallest_tensors) {
    for (size_t n = 0; n < 2; n++) {
        set s;
        make_set(&s, all[_i], n, n, inputs_of(all[_i]));
        float *out = malloc(16);
        s.job.weight = some_weights;
        s.job.density = some_densities;
        for (int k = 0; k < 4; k++) {
            s.job.flatten = k == 0;
            s.job.row_wise = k == 1;
            s.job.filter_wise = k == 2;
            s.job.rescale = k > 1;
            ck_ok(run_blocks(context, &s.job, n > 0 ? n : 1, out, &error));
            ck_assert(n == 0 || isfinite(out[0]));
            s.job.rows = 5; /* [5, 0] */
            s.job.columns = 0;
            if (n == 0)
                ck_ok(run_blocks(context, &s.job, 1, out, &error));
            s.job.rows = s.job.columns = (int64_t)n;
        }
        free(out);
        free_set(&s);
    }
}
END_TEST

/* ---- masks ----------------------------------------------------------------------------------- */

/* DARE keeps what it should in number and in expectation; other names, inputs and seeds draw
 * otherwise. */
START_TEST(masks_are_fair) {
    set s;
    make_set(&s, "dare_linear", 400, 500, 1);
    float *out = malloc(s.n * sizeof *out), *other = malloc(s.n * sizeof *other);
    s.job.base = NULL;
    s.job.density = (const double[]){0.3};
    s.job.rescale = true;
    for (size_t i = 0; i < s.n; i++)
        s.x[0][i] = 1;
    ck_ok(run_blocks(context, &s.job, 1000, out, &error));
    double kept = 0, sum = 0;
    for (size_t i = 0; i < s.n; i++) {
        kept += out[i] != 0;
        sum += (double)out[i];
    }
    const double sigma = sqrt(0.3 * 0.7 / (double)s.n);
    ck_assert_double_eq_tol(kept / (double)s.n, 0.3, 4 * sigma);
    ck_assert_double_eq_tol(sum / (double)s.n, 1, 4 * sigma / 0.3);
    for (int k = 0; k < 2; k++) {
        if (k == 0)
            s.job.name = "model.norm.weigh";
        else
            s.job.seed++;
        ck_ok(run_blocks(context, &s.job, 1000, other, &error));
        double both = 0;
        for (size_t i = 0; i < s.n; i++)
            both += out[i] != 0 && other[i] != 0;
        ck_assert_double_eq_tol(both / (double)s.n, 0.09,
                                4 * sqrt(0.09 * 0.91 / (double)s.n)); /* independent */
        memcpy(out, other, s.n * sizeof *out);
    }
    free(out);
    free(other);
    free_set(&s);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("methods_corners");
    TCase *tests = tcase_create("corners");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 240);
    tcase_add_loop_test(tests, ties_are_cut_by_index, 0, 2);
    tcase_add_loop_test(tests, large_tensors_have_one_result, 0, ALL);
    tcase_add_loop_test(tests, memory_is_bounded, 0, ALL);
    tcase_add_loop_test(tests, inputs_of_any_dtype, 0, ALL);
    tcase_add_loop_test(tests, adapters_are_task_vectors, 0, ALL);
    tcase_add_test(tests, ends_of_parameters);
    tcase_add_loop_test(tests, smallest_tensors, 0, ALL);
    tcase_add_test(tests, masks_are_fair);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
