/* Merging in device memory: streams and graphs, and what is refused. tests/host_driver is the GPU. */
#include "gpu_case.h"

#include <sys/wait.h>
#include <unistd.h>

/* ---- streams ------------------------------------------------------------------------------------------- */

/* Without a stream of the caller's, a call waits for all streams, and has finished when it returns. */
START_TEST(without_a_stream_calls_wait) {
    psoup_context *alone = new_context("cuda", NULL);
    psoup_gpu_merge *other = NULL;
    void *current = alone;
    float x[100], y[100];
    for (int i = 0; i < 100; i++)
        x[i] = (float)i;
    char *there = on_device(x, sizeof x, 0); /* in `stream`, which nobody waited for */
    psoup_merge_view view = {.data = there, .place = PSOUP_MERGE_DEVICE, .rows = 1, .columns = 100};
    psoup_merge_view home = view;
    home.data = y;
    home.place = PSOUP_MERGE_HOST;
    const double twice = 2;
    ck_cu(cu.context_set(NULL)); /* as in a thread that never had one */
    ck_ok(psoup_gpu_merge_create(alone, &other, &error));
    ck_ok(psoup_merge_views(alone, &view, &view, &twice, 1, &error));
    ck_cu(cu.context_get(&current));
    ck_assert_ptr_null(current);
    ck_cu(cu.context_set(context));
    char *got = fetched(there, sizeof x); /* by another stream */
    for (int i = 0; i < 100; i++)
        ck_assert(((float *)(void *)got)[i] == 2 * x[i]);
    ck_ok(psoup_merge_copy(alone, &home, &view, &error));
    ck_assert_mem_eq(y, got, sizeof y);
    psoup_gpu_merge_free(other);
    ck_cu(cu.context_get(&current));
    ck_assert_ptr_eq(current, context);
    ck_assert_int_eq(psoup_merge_views(alone, &view, &view, &twice, 1, &error), PSOUP_ERROR_STATE);
    psoup_context_free(alone);
    free(got);
    release(there, 0);
}
END_TEST

/* Captured once, a sum and a fold are made anew by each launch of the graph. */
START_TEST(calls_are_captured_in_a_graph) {
    enum { OUT = 6, IN = 10 };
    adapters a = {0};
    float x[OUT * IN], y[OUT * IN], expected[OUT * IN];
    void *graph = NULL, *exec = NULL;
    add_adapter(&a, 3, OUT, IN);
    char *base = on_device(x, sizeof x, 0), *live = on_device(x, sizeof x, 0);
    psoup_merge_view from = {.data = base, .place = PSOUP_MERGE_DEVICE, .rows = OUT, .columns = IN};
    psoup_merge_view to = from;
    psoup_merge_view here = {.data = x, .rows = OUT, .columns = IN}, result = here;
    const double half = 0.5;
    to.data = live;
    ck_cu(cu.stream_wait(stream));
    ck_cu(cu.capture_begin(stream, 1));
    ck_ok(psoup_merge_fold_view(device, &to, &from, 0, 0, OUT, IN, a.there, a.weights, 1, &error));
    ck_ok(psoup_merge_views(device, &to, &to, &half, 1, &error));
    ck_cu(cu.capture_end(stream, &graph));
    ck_cu(cu.graph_instantiate(&exec, graph, 0));
    result.data = expected;
    for (int turn = 0; turn < 2; turn++) {
        for (int i = 0; i < OUT * IN; i++)
            x[i] = (float)(i + 100 * turn);
        ck_cu(cu.to_device((unsigned long long)(uintptr_t)base, x, sizeof x, stream));
        ck_cu(cu.graph_launch(exec, stream));
        ck_cu(cu.to_host(y, (unsigned long long)(uintptr_t)live, sizeof y, stream));
        ck_cu(cu.stream_wait(stream));
        ck_ok(psoup_merge_fold_view(host, &result, &here, 0, 0, OUT, IN, a.here, a.weights, 1, &error));
        ck_ok(psoup_merge_views(host, &result, &result, &half, 1, &error));
        check_fold("graph", PSOUP_F32, (char *)y, (char *)expected, OUT * IN);
    }
    ck_cu(cu.graph_exec_destroy(exec));
    ck_cu(cu.graph_destroy(graph));
    release(base, 0);
    release(live, 0);
    drop_adapters(&a);
}
END_TEST

/* ---- what is refused ----------------------------------------------------------------------------------- */

static void refused(psoup_status status, psoup_status expected, const char *words) {
    ck_assert_int_eq(status, expected);
    ck_assert_msg(strstr(error.message, words) != NULL && strchr(error.message, '\n') == NULL, "%s",
                  error.message);
}

START_TEST(odd_addresses_are_refused) {
    char *x = on_device("", 0, 0) + 1;
    psoup_merge_view odd = {.data = x, .dtype = PSOUP_BF16, .place = PSOUP_MERGE_DEVICE, .rows = 1,
                            .columns = 32}, even = odd;
    const double one = 1;
    const psoup_lora_factors f = {.a = (const float *)(const void *)x,
                                  .b = (const float *)(const void *)(x + 3), .rank = 1, .scale = 1};
    even.data = x + 511;
    refused(psoup_merge_views(device, &even, &odd, &one, 1, &error), PSOUP_ERROR_ARGUMENT,
            "psoup_merge_views: input 0 of bf16");
    refused(psoup_merge_views(device, &odd, &even, &one, 1, &error), PSOUP_ERROR_ARGUMENT,
            "expected a multiple of 2 on a GPU");
    odd.dtype = even.dtype = PSOUP_Q8_0;
    refused(psoup_merge_views(device, &even, &odd, &one, 1, &error), PSOUP_ERROR_ARGUMENT, "input 0 of q8_0");
    refused(psoup_merge_fold_view(device, &even, &odd, 0, 0, 1, 32, &f, &one, 1, &error),
            PSOUP_ERROR_ARGUMENT, "psoup_merge_fold_view: base 0 of q8_0");
    refused(psoup_merge_fold_view(device, &even, &even, 0, 0, 1, 32, &f, &one, 1, &error),
            PSOUP_ERROR_ARGUMENT, "A of factors 0 of f32");
    release(x, 1);
}
END_TEST

/* A call that the driver refuses says so once; the next is another. */
START_TEST(a_failure_is_told_once) {
    static float home[8];
    char *there = on_device(home, sizeof home, 0);
    psoup_merge_view view = {.data = there, .place = PSOUP_MERGE_DEVICE, .rows = 1, .columns = 8}, out = view;
    const double one = 1;
    out.data = home;
    out.place = PSOUP_MERGE_HOST;
    ck_cu(cu.capture_begin(stream, 1)); /* waiting is forbidden while a stream is captured */
    refused(psoup_merge_copy(device, &out, &view, &error), PSOUP_ERROR_STATE, "GPU: the work before");
    void *graph;
    ck_cu(cu.capture_end(stream, &graph));
    ck_cu(cu.graph_destroy(graph));
    ck_ok(psoup_merge_copy(device, &out, &view, &error));
    ck_ok(psoup_merge_views(device, &view, &view, &one, 1, &error));
    release(there, 0);
}
END_TEST

START_TEST(no_device_is_refused) {
    psoup_gpu_merge *none = merge, *second = NULL;
    refused(psoup_gpu_merge_create(NULL, &none, &error), PSOUP_ERROR_ARGUMENT, "context is NULL");
    ck_assert_ptr_null(none);
    refused(psoup_gpu_merge_create(host, &none, &error), PSOUP_ERROR_ARGUMENT,
            "the context's device is the CPU");
    psoup_context *seventh = new_context("cuda:7", NULL);
    refused(psoup_gpu_merge_create(seventh, &none, &error), PSOUP_ERROR_ARGUMENT,
            "no GPU: device cuda:7 is asked for, there are 1");
    ck_assert_ptr_null(none);
    psoup_context_free(seventh);
    psoup_gpu_merge_free(NULL);
    /* A second takes the first's place, which may go. */
    ck_ok(psoup_gpu_merge_create(device, &second, &error));
    psoup_gpu_merge_free(merge);
    merge = second;
    char *x = on_device("", 0, 0);
    psoup_merge_view view = {.data = x, .place = PSOUP_MERGE_DEVICE};
    ck_ok(psoup_merge_views(device, &view, NULL, NULL, 0, &error));
    release(x, 0);
}
END_TEST

/* _i: how many allocations on the device succeed. */
START_TEST(no_memory_is_told) {
    psoup_gpu_merge *none = merge;
    setenv("PSOUP_HOST_FAIL_ALLOC", _i == 0 ? "1" : "2", 1);
    open_driver();
    device = new_context("cuda", NULL);
    refused(psoup_gpu_merge_create(device, &none, &error), PSOUP_ERROR_MEMORY,
            _i == 0 ? "out of GPU memory: " : "GPU: staging memory: out of memory");
    ck_assert_ptr_null(none);
    psoup_context_free(device);
    psoup_context_free(host);
}
END_TEST

/* In a process whose libcuda.so.1 is none: this program again, told where to look. */
START_TEST(no_driver_is_told) {
    char directory[] = P_tmpdir "/psoup-gpu-XXXXXX", path[64];
    ck_assert_ptr_nonnull(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/libcuda.so.1", directory);
    FILE *file = fopen(path, "w");
    ck_assert(file != NULL && fputs("not a library", file) > 0 && fclose(file) == 0);
    pid_t child = fork();
    if (child == 0) {
        setenv("LD_LIBRARY_PATH", directory, 1);
        execl("/proc/self/exe", "test_gpu_merge_trouble", "--no-driver", (char *)NULL);
        _exit(2);
    }
    int status = -1;
    ck_assert(waitpid(child, &status, 0) == child);
    unlink(path);
    rmdir(directory);
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with %d", status);
}
END_TEST

static int without_driver(void) {
    psoup_gpu_merge *none;
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.device = "cuda";
    if (psoup_context_create(&options, &device, &error) != PSOUP_OK)
        return 3;
    const psoup_status status = psoup_gpu_merge_create(device, &none, &error);
    psoup_context_free(device);
    return status == PSOUP_ERROR_UNSUPPORTED && none == NULL &&
                   strstr(error.message, "no GPU: NVIDIA's driver is not here (") == error.message &&
                   strchr(error.message, '\n') == NULL
               ? 0
               : 1;
}

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "--no-driver") == 0)
        return without_driver();
    Suite *suite = suite_create("merging on a GPU, trouble");
    TCase *all = tcase_create("open"), *bare = tcase_create("opening");
    tcase_set_timeout(all, 60);
    tcase_set_timeout(bare, 60);
    tcase_add_checked_fixture(all, set_up, tear_down);
    tcase_add_test(all, without_a_stream_calls_wait);
    tcase_add_test(all, calls_are_captured_in_a_graph);
    tcase_add_test(all, odd_addresses_are_refused);
    tcase_add_test(all, a_failure_is_told_once);
    tcase_add_test(all, no_device_is_refused);
    tcase_add_loop_test(bare, no_memory_is_told, 0, 2);
    tcase_add_test(bare, no_driver_is_told);
    suite_add_tcase(suite, all);
    suite_add_tcase(suite, bare);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
