/* Ranks that talk: sums, broadcasts, who is gone and who never came; and who a launcher says a process is. */
#include "ranks_case.h"

#include <fcntl.h>
#include <signal.h>
#include <time.h>

enum { BIG = 300001 }; /* more than a chunk, and no multiple of one */

/* ---- what arrives ---------------------------------------------------------------------------------------- */

static void sums(const psoup_comm *comm, void *arg) {
    float *x = malloc(BIG * sizeof(*x));
    double y[3] = {1e300, comm->rank, 0.1 * comm->rank};
    char text[64] = "";
    for (int i = 0; i < BIG; i++)
        x[i] = (float)(i % 1000) * (float)(comm->rank + 1) + (comm->rank == 0 ? 0x1p-20f : 0.0f);
    OK(comm->sum(comm->user, x, BIG, PSOUP_F32, &error));
    OK(comm->sum(comm->user, y, 3, PSOUP_F64, &error));
    OK(comm->failed(comm->user, &error)); /* nobody leaves before the next call */
    OK(comm->sum(comm->user, NULL, 0, PSOUP_F32, &error));
    if (comm->rank == 0)
        strcpy(text, "of rank 0");
    OK(comm->broadcast(comm->user, text, sizeof(text), &error));
    results[comm->rank].status = comm->sum(comm->user, y, 1, PSOUP_I32, &error);
    double all = comm->world * (comm->world + 1) / 2.0;
    size_t wrong = 0; /* an assertion takes longer than a sum */
    for (int i = 0; i < BIG; i++)
        wrong += x[i] != (float)((i % 1000) * all + 0x1p-20);
    ck_assert_uint_eq(wrong, 0);
    ck_assert(y[0] == comm->world * 1e300 && y[1] == all - comm->world);
    ck_assert_str_eq(text, "of rank 0");
    results[comm->rank].numbers[0] = y[2];
    free(x);
}

START_TEST(sums_are_of_all) {
    share_results();
    for (int world = 1; world <= MOST_RANKS; world++) {
        in_ranks(world, sums, NULL, NULL);
        for (int rank = 0; rank < world; rank++) {
            ck_assert_int_eq(results[rank].status, PSOUP_ERROR_ARGUMENT);
            ck_assert(results[rank].numbers[0] == results[0].numbers[0]);
        }
    }
}
END_TEST

/* ---- who goes ------------------------------------------------------------------------------------------------ */

/* One rank dies before its nth sum of a large vector, by SIGKILL or with a reason. */
typedef struct end {
    int who, after;
    bool says;
} end;

static void until_someone_goes(const psoup_comm *comm, void *arg) {
    const end *e = arg;
    float *x = calloc(BIG, sizeof(*x));
    for (int i = 0; results[comm->rank].status == PSOUP_OK && i < 100; i++) {
        if (comm->rank == e->who && i == e->after && e->says) {
            comm->abort(comm->user, "its disk is full");
            break;
        }
        if (comm->rank == e->who && i == e->after)
            kill(getpid(), SIGKILL);
        leave(comm->rank, comm->sum(comm->user, x, BIG, PSOUP_F32, &error));
    }
    if (comm->rank != e->who) { /* it stays so */
        ck_assert_int_ne(comm->broadcast(comm->user, x, 4, &error), PSOUP_OK);
        ck_assert_str_eq(error.message, results[comm->rank].message);
        ck_assert_int_ne(comm->failed(comm->user, NULL), PSOUP_OK);
    }
    free(x);
}

START_TEST(who_is_gone_is_named) {
    share_results();
    for (int world = 2; world <= 3; world++)
        for (int who = 0; who < world; who++)
            for (int says = 0; says < 2; says++) {
                end e = {.who = who, .after = 1 + who % 2, .says = says};
                int ended[MOST_RANKS];
                char expected[64];
                in_ranks(world, until_someone_goes, &e, ended);
                snprintf(expected, sizeof(expected), says ? "rank %d stopped: its disk is full" : "rank %d (", who);
                for (int rank = 0; rank < world; rank++) {
                    const left *l = &results[rank];
                    if (rank == who) {
                        ck_assert(says ? ended[rank] == 0 : WIFSIGNALED(ended[rank]));
                        continue;
                    }
                    ck_assert_msg(ended[rank] == 0 && l->status == PSOUP_ERROR_IO && strstr(l->message, expected),
                                  "rank %d of %d is told '%s' (%d)", rank, world, l->message, ended[rank]);
                    if (!says)
                        ck_assert_ptr_nonnull(strstr(l->message, "is gone"));
                }
            }
}
END_TEST

/* A rank that waits for nothing hears of it too. */
static void listens(const psoup_comm *comm, void *arg) {
    const struct timespec moment = {.tv_nsec = 5000000};
    if (comm->rank == 2)
        return;
    while (results[comm->rank].status == PSOUP_OK) {
        leave(comm->rank, comm->failed(comm->user, &error));
        nanosleep(&moment, NULL);
    }
    ck_assert_ptr_nonnull(strstr(results[comm->rank].message, "rank 2 ("));
}

START_TEST(who_is_gone_is_known_without_waiting) {
    share_results();
    in_ranks(3, listens, NULL, NULL);
}
END_TEST

static void differ(const psoup_comm *comm, void *arg) {
    float x[8] = {0};
    leave(comm->rank, comm->rank == 1 ? comm->broadcast(comm->user, x, 8, &error)
                                      : comm->sum(comm->user, x, 8, PSOUP_F32, &error));
}

START_TEST(calls_that_differ_are_refused) {
    share_results();
    in_ranks(2, differ, NULL, NULL);
    for (int rank = 0; rank < 2; rank++)
        ck_assert_ptr_nonnull(strstr(results[rank].message, "rank 1 ("));
    ck_assert_ptr_nonnull(strstr(results[0].message, "is at another call"));
}
END_TEST

/* ---- who comes -------------------------------------------------------------------------------------------- */

static psoup_status one_comes(const psoup_comm_options *o) {
    psoup_comm *comm;
    psoup_status status = psoup_comm_tcp_create(context, o, &comm, &error);
    psoup_comm_free(comm);
    return status;
}

#define REFUSED(options, text)                                                                     \
    do {                                                                                           \
        ck_assert_int_ne(one_comes(options), PSOUP_OK);                                            \
        ck_assert_msg(strstr(error.message, text) != NULL, "'%s' has no '%s'", error.message, text); \
    } while (0)

START_TEST(who_does_not_come_is_named) {
    int port, listener = listen_here(&port);
    psoup_comm_options o = rank_options(0, 4, port, listener);
    o.timeout = 0;
    REFUSED(&o, "of 4 ranks these did not come: 1, 2, 3");
    o.rank = 1; /* rank 0 has closed the socket */
    o.listener = -1;
    REFUSED(&o, "rank 1 did not reach rank 0 at 127.0.0.1");
    o.world = 1;
    o.rank = 0;
    OK(one_comes(&o));
    o.rank = 1;
    REFUSED(&o, "rank 1 of 1");
    o.world = 2;
    o.address[0] = '\0';
    REFUSED(&o, "address is empty");
    memset(o.address, 'a', sizeof(o.address));
    REFUSED(&o, "not ended by a NUL");
    o.port = 0;
    REFUSED(&o, "port is 0");
}
END_TEST

/* The socket that rank 0 was given is its own: also where it does not come to listening. */
START_TEST(a_listener_is_taken_over) {
    for (int k = 0; k < 3; k++) {
        int port, listener = listen_here(&port);
        psoup_comm_options o = rank_options(0, k == 0 ? 1 : 2, port, listener);
        o.timeout = 0;
        o.port = k == 1 ? 0 : port;
        ck_assert_int_eq(one_comes(&o) == PSOUP_OK, k == 0);
        ck_assert_int_eq(fcntl(listener, F_GETFD), -1);
    }
}
END_TEST

/* A child that says something at the port, and gets whatever answer. */
static void say(int port, const char *text) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                             .sin_port = htons((uint16_t)port)};
    char answer[512];
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    ck_assert_int_eq(connect(fd, (struct sockaddr *)&to, sizeof(to)), 0);
    ck_assert_int_eq(send(fd, text, strlen(text), 0), (ssize_t)strlen(text));
    shutdown(fd, SHUT_WR);
    while (recv(fd, answer, sizeof(answer), 0) > 0)
        ;
    close(fd);
}

/* Strangers, a rank of another run and one that is there twice are sent away; the right one is let in. */
START_TEST(strangers_are_sent_away) {
    int port, listener = listen_here(&port), status;
    share_results();
    pid_t first = fork();
    if (first == 0)
        be_rank(0, 2, port, listener, sums, NULL);
    close(listener);
    say(port, "GET / HTTP/1.1\r\n\r\n");
    say(port, "");
    psoup_comm_options o = rank_options(2, 3, port, -1);
    REFUSED(&o, "it is one of 3 ranks, rank 0 of 2");
    pid_t second = fork();
    if (second == 0)
        be_rank(1, 2, port, dup(0), sums, NULL);
    ck_assert(waitpid(first, &status, 0) == first && status == 0);
    ck_assert(waitpid(second, &status, 0) == second && status == 0);
}
END_TEST

/* ---- launchers ---------------------------------------------------------------------------------------------- */

static const char *look_up(void *user, const char *name) {
    const char *const *pairs = user;
    for (; *pairs; pairs += 2)
        if (strcmp(*pairs, name) == 0)
            return pairs[1];
    return NULL;
}

#define LAUNCHED(o, ...) psoup_comm_launch(look_up, (void *)(const char *const[]){__VA_ARGS__, NULL}, o, &error)

START_TEST(launchers_are_understood) {
    psoup_comm_options o = PSOUP_COMM_OPTIONS_INIT;
    OK(LAUNCHED(&o, "HOME", "/"));
    ck_assert(o.world == 1 && o.rank == 0);
    OK(LAUNCHED(&o, "RANK", "3", "WORLD_SIZE", "8", "LOCAL_RANK", "1", "LOCAL_WORLD_SIZE", "2", "MASTER_ADDR", "n0",
                "MASTER_PORT", "1234", "SLURM_PROCID", "1", "SLURM_NTASKS", "2", "SLURM_STEP_ID", "0"));
    ck_assert(o.rank == 3 && o.world == 8 && o.local_rank == 1 && o.local_world == 2 && o.port == 1234);
    ck_assert_str_eq(o.address, "n0");
    OK(LAUNCHED(&o, "RANK", "0", "WORLD_SIZE", "2", "MASTER_ADDR", "n0", "MASTER_PORT", "1234",
                "TORCHELASTIC_USE_AGENT_STORE", "True"));
    ck_assert(o.rank == 0 && o.world == 2 && o.local_world == 0 && o.port == 1235);
    OK(LAUNCHED(&o, "SLURM_PROCID", "5", "SLURM_NTASKS", "8", "SLURM_LOCALID", "1", "SLURM_STEP_ID", "2",
                "SLURM_JOB_ID", "41007", "SLURM_JOB_NODELIST", "gpu[007-010,12],big3",
                "SLURM_STEP_TASKS_PER_NODE", "2(x4)", "SLURM_LAUNCH_NODE_IPADDR", "10.0.0.1"));
    ck_assert(o.rank == 5 && o.world == 8 && o.local_rank == 1 && o.local_world == 2);
    ck_assert_int_eq(o.port, 10000 + (41007 + 97 * 2) % 20000);
    ck_assert_str_eq(o.address, "gpu007");
    OK(LAUNCHED(&o, "SLURM_PROCID", "0", "SLURM_NTASKS", "2", "SLURM_STEP_ID", "0", "SLURM_STEP_NODELIST", "a-1,a-2",
                "SLURM_JOB_NODELIST", "b", "MASTER_PORT", "99"));
    ck_assert_str_eq(o.address, "a-1");
    ck_assert_int_eq(o.port, 99);
    OK(LAUNCHED(&o, "SLURM_PROCID", "0", "SLURM_NTASKS", "2", "SLURM_STEP_ID", "0", "SLURM_JOB_NODELIST",
                "r[1-2]-x,b"));
    ck_assert_str_eq(o.address, "r1-x");
    OK(LAUNCHED(&o, "SLURM_PROCID", "1", "SLURM_NTASKS", "2", "SLURM_LAUNCH_NODE_IPADDR", "10.0.0.1"));
    ck_assert_str_eq(o.address, "10.0.0.1");
    OK(LAUNCHED(&o, "SLURM_PROCID", "0", "SLURM_NTASKS", "4", "SLURM_JOB_ID", "3")); /* the batch script itself */
    ck_assert_int_eq(o.world, 1);
    OK(LAUNCHED(&o, "OMPI_COMM_WORLD_RANK", "1", "OMPI_COMM_WORLD_SIZE", "2", "OMPI_COMM_WORLD_LOCAL_RANK", "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE", "2"));
    ck_assert(o.rank == 1 && o.world == 2 && o.local_rank == 1);
    ck_assert_str_eq(o.address, "127.0.0.1");
    OK(LAUNCHED(&o, "PMI_RANK", "1", "PMI_SIZE", "2", "MPI_LOCALRANKID", "1", "MPI_LOCALNRANKS", "2"));
    ck_assert(o.rank == 1 && o.world == 2);
}
END_TEST

#define NOT_LAUNCHED(text, ...)                                                                    \
    do {                                                                                           \
        ck_assert_int_eq(LAUNCHED(&o, __VA_ARGS__), PSOUP_ERROR_ARGUMENT);                         \
        ck_assert_msg(strstr(error.message, text) != NULL, "'%s' has no '%s'", error.message, text); \
    } while (0)

START_TEST(what_launchers_must_not_say) {
    psoup_comm_options o = PSOUP_COMM_OPTIONS_INIT;
    NOT_LAUNCHED("WORLD_SIZE is not", "RANK", "1");
    NOT_LAUNCHED("RANK is \"2\": expected a whole number from 0 to 1", "RANK", "2", "WORLD_SIZE", "2");
    NOT_LAUNCHED("WORLD_SIZE is \"two\"", "RANK", "0", "WORLD_SIZE", "two");
    NOT_LAUNCHED("LOCAL_RANK is \"-1\"", "RANK", "0", "WORLD_SIZE", "2", "LOCAL_RANK", "-1");
    NOT_LAUNCHED("MASTER_ADDR is not set", "RANK", "0", "WORLD_SIZE", "2");
    NOT_LAUNCHED("MASTER_PORT is \"0\"", "RANK", "0", "WORLD_SIZE", "2", "MASTER_PORT", "0", "MASTER_ADDR", "x");
    NOT_LAUNCHED("has no first one", "SLURM_PROCID", "0", "SLURM_NTASKS", "2", "SLURM_STEP_ID", "0",
                 "SLURM_JOB_NODELIST", "n[1-");
    NOT_LAUNCHED("MASTER_ADDR is not set", "OMPI_COMM_WORLD_RANK", "1", "OMPI_COMM_WORLD_SIZE", "4",
                 "OMPI_COMM_WORLD_LOCAL_SIZE", "2");
    o.size = 0;
    NOT_LAUNCHED("out->size is not set", "RANK", "0");
}
END_TEST

int main(void) {
    Suite *suite = suite_create("comm");
    TCase *c = tcase_create("comm");
    tcase_add_checked_fixture(c, set_up, tear_down);
    tcase_set_timeout(c, 60);
    tcase_add_test(c, sums_are_of_all);
    tcase_add_test(c, who_is_gone_is_named);
    tcase_add_test(c, who_is_gone_is_known_without_waiting);
    tcase_add_test(c, calls_that_differ_are_refused);
    tcase_add_test(c, who_does_not_come_is_named);
    tcase_add_test(c, a_listener_is_taken_over);
    tcase_add_test(c, strangers_are_sent_away);
    tcase_add_test(c, launchers_are_understood);
    tcase_add_test(c, what_launchers_must_not_say);
    suite_add_tcase(suite, c);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
