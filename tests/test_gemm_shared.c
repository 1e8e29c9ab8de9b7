/* Matrix products called at once, and memory that fails. */
#include "gemm_case.h"

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

/* As layers of a base that trains, whose weights are not packed: products of few rows, several at once. */
static void *call_each(void *arg) {
    caller *me = arg;
    for (int repeat = 0; repeat < 20000; repeat++) {
        psoup__gemm_args both[2] = {me->x->args, me->x->args};
        float c[2][64];
        both[0].c = c[0], both[1].c = c[1];
        psoup__gemm_each(me->context, both, 2);
        for (int i = 0; i < 2; i++)
            me->wrong += memcmp(c[i], me->expected, me->x->c_size * sizeof *c[i]) != 0;
    }
    return NULL;
}

/* Who has buffers waits for no others. */
START_TEST(test_few_rows_at_once) {
    enum { CALLERS = 6 };
    psoup_context *context = context_of(isas[_i], 1);
    if (context == NULL)
        return;
    caller callers[CALLERS];
    pthread_t threads[CALLERS];
    state = 3;
    problem x = random_problem(2, 21, 30, false);
    ck_assert_uint_le(x.c_size, 64);
    float *expected = result(context, &x, false);
    for (int i = 0; i < CALLERS; i++) {
        callers[i] = (caller){context, &x, expected, 0};
        ck_assert_int_eq(pthread_create(&threads[i], NULL, call_each, &callers[i]), 0);
    }
    for (int i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < CALLERS; i++)
        ck_assert_int_eq(callers[i].wrong, 0);
    free(expected);
    problem_free(&x);
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
    Suite *suite = suite_create("gemm_shared");
    TCase *tcase = tcase_create("gemm_shared");
    tcase_set_timeout(tcase, 300);
    tcase_add_loop_test(tcase, test_concurrent, 0, variants);
    tcase_add_loop_test(tcase, test_few_rows_at_once, 0, variants);
    tcase_add_test(tcase, test_memory);
    suite_add_tcase(suite, tcase);
    return run_suite(suite);
}
