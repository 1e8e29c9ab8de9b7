/* Several ranks, each with a GPU: sums in its memory by NCCL, or through the host's. Where there is no GPU the host
 * driver stands for one, and its libnccl.so.2 for NCCL (tests/host_driver). */
#include "ranks_case.h"

#include <signal.h>

#include "gpu/gpu.h"

enum { ROWS = 12, NUMBERS = 3001 };

static int32_t words[ROWS][12];
static psoup_example examples[ROWS];

/* How a rank's GPUs talk, and what goes wrong. */
typedef struct way {
    bool nccl;
    int dies; /* rank 1, by SIGKILL, at this step; 0: it does not */
} way;

static psoup_context *gpu_context(void) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *gpu;
    options.device = "cuda:0";
    options.threads = 1;
    OK(psoup_context_create(&options, &gpu, &error));
    return gpu;
}

static void make_rows(void) {
    for (int i = 0; i < ROWS; i++) {
        size_t n = 5 + (size_t)(i * 5) % 7;
        for (size_t t = 0; t < n; t++)
            words[i][t] = 2 + (int32_t)((i * 7 + (int)t * (i + 1)) % 13);
        examples[i] = (psoup_example){.tokens = words[i], .n = n, .n_prompt = 2};
    }
}

typedef struct watcher {
    const way *how;
    int rank;
} watcher;

static int watch(void *user, const psoup_step *step) {
    const watcher *w = user;
    if (w->rank == 1 && w->how->dies && step->step == w->how->dies)
        kill(getpid(), SIGKILL);
    return 0;
}

static void train(const psoup_comm *line, void *arg) {
    const way *how = arg;
    int rank = line ? line->rank : 0;
    watcher w = {how, rank};
    psoup_context *cpu = context;
    psoup_comm *comm = NULL;
    context = gpu_context();
    psoup_model *model = tiny_model();
    psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
    make_rows();
    add_adapter(model, "P", 2);
    if (line && how->nccl)
        OK(psoup_comm_nccl_create(context, line, &comm, &error));
    o.epochs = 2;
    o.batch_tokens = 40;
    o.learning_rate = 1e-2f;
    o.lora_dropout = 0.1f;
    o.on_step = watch;
    o.user = &w;
    o.comm = comm ? comm : line;
    leave(rank, psoup_sft(model, "P", examples, ROWS, NULL, 0, &o, &error));
    results[rank].n = 0;
    leave_weights(rank, model, "P");
    psoup_comm_free(comm);
    psoup_model_free(model);
    psoup_context_free(context);
    context = cpu;
}

START_TEST(the_same_by_nccl_and_through_the_host) {
    static float start[MOST_WEIGHTS];
    left *alone = malloc(sizeof(*alone));
    way how = {.nccl = false};
    share_results();
    set_up();
    psoup_model *model = tiny_model();
    add_adapter(model, "P", 2);
    size_t n;
    float *before = weights(model, "P", &n);
    memcpy(start, before, n * sizeof(*before));
    free(before);
    psoup_model_free(model);
    train(NULL, &how);
    ck_assert_msg(results[0].status == PSOUP_OK, "%s", results[0].message);
    *alone = results[0];
    for (int nccl = 0; nccl < 2; nccl++)
        for (int world = 2; world <= 3; world++) {
            how.nccl = nccl;
            in_ranks(world, train, &how, NULL);
            same_in_all(world, alone, start, 2e-3);
        }
    tear_down();
    free(alone);
}
END_TEST

/* ---- the table alone ------------------------------------------------------------------------------------ */

/* Sums of device memory, read back by the backend. */
static void sums(const psoup_comm *line, void *arg) {
    psoup_context *gpu = gpu_context();
    psoup__backend *be;
    psoup_comm *comm;
    float x[NUMBERS];
    double y[2] = {line->rank, 1.0};
    char text[8] = "";
    OK(psoup__gpu_create(gpu, &be, &error));
    OK(psoup_comm_nccl_create(gpu, line, &comm, &error));
    float *device = be->ops->alloc(be, NUMBERS, sizeof(float), &error);
    ck_assert_ptr_nonnull(device);
    for (int round = 1; round <= 3; round++) {
        for (int i = 0; i < NUMBERS; i++)
            x[i] = (float)(i * round + line->rank);
        be->ops->write(be, device, x, sizeof(x));
        OK(be->ops->read(be, x, device, sizeof(x), &error));
        OK(comm->sum_device(comm->user, device, NUMBERS, &error));
        OK(be->ops->read(be, x, device, sizeof(x), &error));
        size_t wrong = 0;
        for (int i = 0; i < NUMBERS; i++)
            wrong += x[i] != (float)(line->world * i * round + line->world * (line->world - 1) / 2);
        ck_assert_uint_eq(wrong, 0);
    }
    OK(comm->failed(comm->user, &error)); /* nobody leaves before the next call */
    OK(comm->sum(comm->user, y, 2, PSOUP_F64, &error));
    ck_assert(y[1] == line->world && comm->rank == line->rank && comm->world == line->world);
    strcpy(text, line->rank ? "" : "hello");
    OK(comm->broadcast(comm->user, text, sizeof(text), &error));
    ck_assert_str_eq(text, "hello");
    be->ops->release(be, device);
    psoup_comm_free(comm);
    be->ops->free(be);
    psoup_context_free(gpu);
}

START_TEST(sums_in_device_memory) {
    share_results();
    for (int world = 2; world <= 3; world++)
        in_ranks(world, sums, NULL, NULL);
}
END_TEST

START_TEST(what_it_needs) {
    psoup_comm_options o = PSOUP_COMM_OPTIONS_INIT;
    psoup_comm *line, *comm;
    set_up();
    OK(psoup_comm_tcp_create(context, &o, &line, &error));
    ck_assert_int_eq(psoup_comm_nccl_create(context, line, &comm, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "the context is the CPU's"));
    ck_assert_int_eq(psoup_comm_nccl_create(context, NULL, &comm, &error), PSOUP_ERROR_ARGUMENT);
    psoup_comm_free(line);
    tear_down();
}
END_TEST

/* Rank 1 has a context of the CPU: nobody begins, all return its status, and the line is as good as before. */
static void without_a_gpu(const psoup_comm *line, void *arg) {
    psoup_context *gpu = line->rank == 1 ? NULL : gpu_context();
    psoup_comm *comm;
    double one = 1.0;
    (void)arg;
    leave(line->rank, psoup_comm_nccl_create(gpu ? gpu : context, line, &comm, &error));
    ck_assert_ptr_null(comm);
    OK(line->sum(line->user, &one, 1, PSOUP_F64, &error));
    ck_assert_double_eq(one, line->world);
    psoup_context_free(gpu);
}

START_TEST(one_that_cannot_begin_keeps_nobody_waiting) {
    share_results();
    in_ranks(3, without_a_gpu, NULL, NULL);
    for (int rank = 0; rank < 3; rank++) {
        ck_assert_int_eq(results[rank].status, PSOUP_ERROR_ARGUMENT);
        ck_assert_msg(strstr(results[rank].message, rank == 1 ? "the context is the CPU's"
                                                              : "1 of 3 ranks cannot begin with NCCL: ") != NULL,
                      "rank %d: %s", rank, results[rank].message);
    }
}
END_TEST

/* ---- what goes wrong --------------------------------------------------------------------------------------- */

/* NCCL notices that a rank is gone, or does not: then the line beside it does. */
START_TEST(a_dead_rank_is_named) {
    way how = {.nccl = true, .dies = 3};
    share_results();
    for (int deaf = 0; deaf < 2; deaf++) {
        int ended[3];
        if (deaf)
            setenv("PSOUP_HOST_NCCL_DEAF", "1", 1);
        in_ranks(3, train, &how, ended);
        ck_assert(ended[0] == 0 && WIFSIGNALED(ended[1]) && ended[2] == 0);
        for (int rank = 0; rank < 3; rank += 2)
            ck_assert_msg(results[rank].status == PSOUP_ERROR_IO && strstr(results[rank].message, "rank 1 ("),
                          "rank %d, deaf %d: %s", rank, deaf, results[rank].message);
    }
    unsetenv("PSOUP_HOST_NCCL_DEAF");
}
END_TEST

/* A call that fails on one rank ends the run of both, and says so. */
static void fails_on_1(const psoup_comm *line, void *arg) {
    if (line->rank == 1)
        setenv("PSOUP_HOST_NCCL_FAIL", "2", 1);
    train(line, arg);
}

START_TEST(a_failed_call_ends_all) {
    way how = {.nccl = true};
    share_results();
    in_ranks(2, fails_on_1, &how, NULL);
    ck_assert_msg(strcmp(results[1].message, "NCCL: unhandled system error") == 0, "%s", results[1].message);
    ck_assert_msg(strcmp(results[0].message, "rank 1 stopped: NCCL: unhandled system error") == 0, "%s",
                  results[0].message);
    ck_assert(results[0].status != PSOUP_OK && results[1].status != PSOUP_OK);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("gpu_ranks");
    TCase *c = tcase_create("gpu_ranks");
    tcase_set_timeout(c, 90);
    tcase_add_test(c, sums_in_device_memory);
    tcase_add_test(c, the_same_by_nccl_and_through_the_host);
    tcase_add_test(c, what_it_needs);
    tcase_add_test(c, one_that_cannot_begin_keeps_nobody_waiting);
    tcase_add_test(c, a_dead_rank_is_named);
    tcase_add_test(c, a_failed_call_ends_all);
    suite_add_tcase(suite, c);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
