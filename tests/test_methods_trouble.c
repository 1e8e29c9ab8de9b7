/* What merge methods refuse, and what they make of numbers that are none and of memory that runs out. */
#include "methods_case.h"

/* ---- numbers that are none ------------------------------------------------------------------- */

/* A NaN stays in its element, or the method says that it cannot go on; an input of weight 0 is not
 * read. */
START_TEST(nan_is_told_or_stays) {
    enum { ROWS = 40, COLUMNS = 33, BAD = 777 };
    for (int k = 0; k < 3; k++) { /* a NaN, an infinity, and one in an input of weight 0 */
        set s;
        psoup_error why = {0};
        double weights[3] = {0.5, 0.6, 0.7};
        make_set(&s, all[_i], ROWS, COLUMNS, inputs_of(all[_i]));
        const size_t bad = s.count - 1;
        const bool weighs = (s.job.method->parameters & PSOUP__USES_WEIGHT) != 0;
        s.x[bad][BAD] = k == 0 ? NAN : INFINITY;
        if (k == 2)
            weights[bad] = 0;
        s.job.weight = weights;
        s.job.flatten = true;
        s.job.rescale = true;
        s.job.density = (const double[]){0.8, 0.8, 0.8};
        s.job.peer = PSOUP_MERGE_MERGEKIT;
        float *out = malloc(s.n * sizeof *out);
        psoup_status status = run_blocks(context, &s.job, s.n, out, &why);
        if (status == PSOUP_OK) {
            for (size_t i = 0; i < s.n; i++)
                ck_assert_msg(i == BAD || isfinite(out[i]), "%s: element %zu", all[_i], i);
            ck_assert(k != 2 || !weighs || isfinite(out[BAD]));
        } else {
            ck_assert_int_eq(status, PSOUP_ERROR_FORMAT);
            ck_assert_ptr_nonnull(strstr(why.message, "model.norm.weight"));
            ck_assert_ptr_nonnull(strstr(why.message, "NaN"));
            ck_assert(k != 2 || !weighs);
        }
        free(out);
        free_set(&s);
    }
}
END_TEST

/* ---- parameters ------------------------------------------------------------------------------ */

static void refuses(set *s, const char *method, const char *why) {
    void *state = s;
    s->job.method = psoup__method_named(method);
    memset(&error, 0, sizeof error);
    ck_assert_int_eq(s->job.method->prepare(&s->job, &state, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_null(state);
    ck_assert_msg(strstr(error.message, why) != NULL &&
                      strstr(error.message, "model.norm.weight") != NULL,
                  "%s", error.message);
}

START_TEST(refuses_nonsense) {
    set s;
    make_set(&s, "ties", 5, 6, 3);
    s.job.density = (const double[]){0.5, -0.1, 0.5};
    refuses(&s, "ties", "input 1: density -0.1");
    refuses(&s, "dare_ties", "density");
    s.job.density = (const double[]){0.5, 0.5, NAN};
    refuses(&s, "della", "input 2: density nan");
    s.job.density = (const double[]){0.9, 0.5, 0.5};
    refuses(&s, "della_linear", "epsilon 0.15 around density 0.9");
    s.job.gamma = (const double[]){0.5, 0.5, 1.5};
    refuses(&s, "breadcrumbs", "input 2: gamma 1.5");
    refuses(&s, "slerp", "expected two, the base counted");
    s.job.count = 1;
    s.job.t = INFINITY;
    refuses(&s, "slerp", "t is inf");
    refuses(&s, "model_stock", "at least two");
    s.job.count = 2;
    s.job.weight = (const double[]){1, -1};
    s.job.normalize = true;
    refuses(&s, "linear", "sum to 0");
    free_set(&s);
}
END_TEST

/* ---- memory that runs out -------------------------------------------------------------------- */

START_TEST(every_allocation_may_fail) {
    for (int k = 0; k < 3; k++) {
        set s;
        make_set(&s, all[_i], 20, 30, inputs_of(all[_i]));
        for (size_t i = 0; i < s.n; i++) /* ties, so that they are looked for */
            s.x[0][i] = s.zero[i] + (float)(i % 3);
        s.job.weight = some_weights;
        s.job.density = some_densities;
        s.job.rescale = true;
        s.job.flatten = k == 0;
        s.job.row_wise = k == 1;
        s.job.filter_wise = k == 2;
        s.job.peer = k;
        psoup_status status = PSOUP_ERROR_MEMORY;
        int before = live, fails = 0;
        for (int at = 0; status != PSOUP_OK; at++) {
            void *state = NULL;
            allocations = 0;
            fail_at = at;
            status = s.job.method->prepare(&s.job, &state, &error);
            fail_at = -1;
            ck_assert(status == PSOUP_OK || status == PSOUP_ERROR_MEMORY);
            fails += status != PSOUP_OK;
            psoup__free(context, state);
            ck_assert_int_eq(live, before);
        }
        ck_assert(fails > 0 || k > 0 || s.job.method->parameters == PSOUP__USES_SCALE ||
                  s.job.method->thinning == PSOUP__THIN_NONE);
        free_set(&s);
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("methods_trouble");
    TCase *tests = tcase_create("trouble");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, nan_is_told_or_stays, 0, ALL);
    tcase_add_test(tests, refuses_nonsense);
    tcase_add_loop_test(tests, every_allocation_may_fail, 0, ALL);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
