/* What the tests of several ranks share: processes that are ranks of one run over TCP, and what they leave. */
#ifndef RANKS_CASE_H
#define RANKS_CASE_H

#include "train_case.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST_RANKS = 4, MOST_WEIGHTS = 1 << 16 };

/* What a rank leaves in memory that all processes share. */
typedef struct left {
    psoup_status status;
    char message[1024];
    size_t n;
    float weights[MOST_WEIGHTS];
    size_t n_tokens;
    int32_t tokens[4096];
    double numbers[512];
} left;

static left *results; /* [MOST_RANKS] */

static inline void share_results(void) {
    results = mmap(NULL, MOST_RANKS * sizeof(left), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert_ptr_ne(results, MAP_FAILED);
}

/* A socket that listens on this machine at a port of the system's choice. */
static inline int listen_here(int *port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof(address);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    ck_assert(fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0 && listen(fd, 16) == 0);
    ck_assert_int_eq(getsockname(fd, (struct sockaddr *)&address, &length), 0);
    *port = ntohs(address.sin_port);
    return fd;
}

static inline psoup_comm_options rank_options(int rank, int world, int port, int listener) {
    psoup_comm_options o = PSOUP_COMM_OPTIONS_INIT;
    o.rank = rank;
    o.world = world;
    o.port = port;
    o.timeout = 20;
    o.listener = rank == 0 ? listener : -1;
    strcpy(o.address, "127.0.0.1");
    return o;
}

/* A rank's part; it has `context`, of one thread, and `results[rank]`. */
typedef void (*rank_fn)(const psoup_comm *comm, void *arg);

static inline void be_rank(int rank, int world, int port, int listener, rank_fn fn, void *arg) {
    psoup_comm_options o = rank_options(rank, world, port, listener);
    psoup_comm *comm;
    open_context(1);
    if (rank > 0)
        close(listener);
    OK(psoup_comm_tcp_create(context, &o, &comm, &error));
    fn(comm, arg);
    psoup_comm_free(comm);
    psoup_context_free(context);
    fflush(NULL);
    _exit(0);
}

/* Runs fn in `world` processes, and waits: how each ended goes to ended[world], as waitpid has it; all 0 where
 * that is NULL. */
static inline void in_ranks(int world, rank_fn fn, void *arg, int *ended) {
    int port, listener = listen_here(&port);
    pid_t child[MOST_RANKS];
    memset(results, 0, MOST_RANKS * sizeof(left));
    for (int rank = 0; rank < world; rank++) {
        child[rank] = fork();
        ck_assert_int_ge(child[rank], 0);
        if (child[rank] == 0)
            be_rank(rank, world, port, listener, fn, arg);
    }
    close(listener);
    for (int rank = 0; rank < world; rank++) {
        int status = -1;
        ck_assert_int_eq(waitpid(child[rank], &status, 0), child[rank]);
        if (ended)
            ended[rank] = status;
        else
            ck_assert_msg(status == 0, "rank %d of %d ended with %#x: %s", rank, world, status,
                          results[rank].message);
    }
}

/* Keeps how a trainer ended. */
static inline void leave(int rank, psoup_status status) {
    results[rank].status = status;
    snprintf(results[rank].message, sizeof(results[rank].message), "%s", error.message);
}

static inline void leave_weights(int rank, psoup_model *model, const char *name) {
    size_t n;
    float *w = weights(model, name, &n);
    ck_assert_uint_le(results[rank].n + n, MOST_WEIGHTS);
    memcpy(results[rank].weights + results[rank].n, w, n * sizeof(*w));
    results[rank].n += n;
    free(w);
}

/* All ranks left the same bits, which are near `expected`: ‖a − b‖ ≤ tolerance · ‖b − from‖, of what
 * training has changed. */
static inline void same_in_all(int world, const left *expected, const float *from, double tolerance) {
    double off = 0.0, moved = 0.0;
    ck_assert_uint_gt(expected->n, 0);
    for (int rank = 0; rank < world; rank++) {
        ck_assert_msg(results[rank].status == PSOUP_OK, "rank %d: %s", rank, results[rank].message);
        ck_assert_uint_eq(results[rank].n, expected->n);
        ck_assert_msg(memcmp(results[rank].weights, results[0].weights, expected->n * sizeof(float)) == 0,
                      "rank %d has other weights than rank 0", rank);
    }
    for (size_t i = 0; i < expected->n; i++) {
        off += pow((double)results[0].weights[i] - expected->weights[i], 2.0);
        moved += pow((double)expected->weights[i] - from[i], 2.0);
    }
    ck_assert_msg(moved > 0.0 && sqrt(off) <= tolerance * sqrt(moved), "%d ranks end %.3g away, of %.3g", world,
                  sqrt(off), sqrt(moved));
}

/* From now on this process can write nothing more to a file, as on a full disk. */
static inline void fill_disk(const char *path) {
    struct stat info;
    struct rlimit limit;
    ck_assert(stat(path, &info) == 0 && getrlimit(RLIMIT_FSIZE, &limit) == 0);
    limit.rlim_cur = (rlim_t)info.st_size;
    signal(SIGXFSZ, SIG_IGN);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
}

/* All ranks ended because rank 0 could not write the file. */
static inline void all_know_of_the_disk(int world, const char *path) {
    for (int rank = 0; rank < world; rank++) {
        const left *l = &results[rank];
        ck_assert_msg(l->status == PSOUP_ERROR_IO && strstr(l->message, path) && strstr(l->message, "cannot write"),
                      "rank %d: %s: %s", rank, psoup_status_name(l->status), l->message);
        ck_assert_int_eq(strncmp(l->message, "rank 0: ", 8) == 0, rank > 0);
    }
}

#endif
