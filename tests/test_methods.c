/* Methods of whole tensors. */
#include "merge_case.h"
#include "merge/method.h"

/* Runs a method in blocks of `block` elements. */
static void run_method(psoup__method_job *job, psoup_merge_method method, size_t block, float *out) {
    void *state = NULL;
    job->context = context;
    job->method = psoup__method_of(method);
    ck_assert_ptr_nonnull(job->method);
    ck_ok(job->method->prepare(job, &state, &error));
    float *space = malloc(psoup__method_scratch(job) * block * sizeof *space);
    for (size_t at = 0; at < job->n; at += block) {
        size_t n = job->n - at < block ? job->n - at : block;
        job->method->block(job, state, at, n, out + at, space);
    }
    free(space);
    psoup__free(context, state);
}

START_TEST(simple_methods) {
    enum { N = 3001 };
    float *x[3] = {noises(N), noises(N), noises(N)}, *out = malloc(N * sizeof *out);
    psoup__tensor tensors[3];
    psoup__merge_input inputs[3];
    for (int i = 0; i < 3; i++) {
        tensors[i] = (psoup__tensor){.dtype = PSOUP_F32, .rank = 1, .shape = {N}, .bytes = N * 4,
                                     .data = x[i]};
        inputs[i] = (psoup__merge_input){.tensor = &tensors[i], .columns = N};
    }
    const double weight[2] = {0.5, 1.5};
    psoup__method_job job = {.name = "x", .n = N, .columns = N, .rows = N, .count = 2, .inputs = inputs,
                             .weight = weight, .lambda = 0.5, .t = 0.25, .normalize = true};
    run_method(&job, PSOUP_MERGE_LINEAR, 100, out);
    for (int i = 0; i < N; i++)
        ck_assert_float_eq_tol(out[i], 0.25f * x[0][i] + 0.75f * x[1][i], 1e-6f);
    job.base = &inputs[2];
    run_method(&job, PSOUP_MERGE_TASK_ARITHMETIC, 777, out);
    for (int i = 0; i < N; i++)
        ck_assert_float_eq_tol(out[i], x[2][i] + 0.125f * (x[0][i] - x[2][i]) + 0.375f * (x[1][i] - x[2][i]),
                               2e-6f);
    job.base = NULL;
    run_method(&job, PSOUP_MERGE_SLERP, N, out);
    double xx = 0, yy = 0, xy = 0;
    for (int i = 0; i < N; i++) {
        xx += (double)x[0][i] * (double)x[0][i];
        yy += (double)x[1][i] * (double)x[1][i];
        xy += (double)x[0][i] * (double)x[1][i];
    }
    double theta = acos(xy / sqrt(xx * yy)), a = sin(0.75 * theta) / sin(theta), b = sin(0.25 * theta) / sin(theta);
    for (int i = 0; i < N; i++)
        ck_assert_double_eq_tol((double)out[i], a * (double)x[0][i] + b * (double)x[1][i], 1e-6);
    job.count = 1;
    run_method(&job, PSOUP_MERGE_PASSTHROUGH, 5, out);
    ck_assert_mem_eq(out, x[0], N * sizeof *out);
    for (int i = 0; i < 3; i++)
        free(x[i]);
    free(out);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("methods");
    TCase *tcase = tcase_create("methods");
    tcase_add_checked_fixture(tcase, set_up, tear_down);
    tcase_add_test(tcase, simple_methods);
    suite_add_tcase(suite, tcase);
    return run_suite(suite);
}
