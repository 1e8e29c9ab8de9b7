/* Ranks that talk by MPI, and know of each other's end by TCP. */
#include "psoup/comm_mpi.h"

#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 1 << 24, /* numbers or bytes of one call: counts are ints */ SPINS = 2000 };

typedef struct mpi {
    psoup_comm comm; /* first: what the caller has */
    MPI_Comm world;
    psoup_comm *line; /* beside it */
    psoup_error gone; /* the failure that ended it */
} mpi;

static psoup_status fail(psoup_error *error, psoup_status status, const char *format, ...) {
    va_list args;
    if (!error)
        return status;
    va_start(args, format);
    error->status = status;
    vsnprintf(error->message, sizeof error->message, format, args);
    va_end(args);
    return status;
}

/* The first failure stays; the others hear of it by the line. */
static psoup_status end(mpi *m, const psoup_error *why, psoup_error *error) {
    if (m->gone.status == PSOUP_OK) {
        m->gone = *why;
        m->line->abort(m->line->user, why->message);
    }
    return fail(error, m->gone.status, "%s", m->gone.message);
}

static psoup_status refused(int code, psoup_error *why) {
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(code, text, &length);
    return fail(why, PSOUP_ERROR_IO, "MPI: %s", text);
}

/* Waits for what was begun, or until a rank is known to be gone: then it is left as it is. */
static psoup_status wait_for(mpi *m, int code, MPI_Request *request, psoup_error *why) {
    const struct timespec moment = {.tv_nsec = 50000};
    int done = 0;
    for (int tries = 0; code == MPI_SUCCESS; tries++) {
        code = MPI_Test(request, &done, MPI_STATUS_IGNORE);
        if (code == MPI_SUCCESS && done)
            return PSOUP_OK;
        if (tries < SPINS)
            continue;
        psoup_status status = m->line->failed(m->line->user, why);
        if (status != PSOUP_OK)
            return status;
        nanosleep(&moment, NULL);
    }
    return refused(code, why);
}

/* To rank 0 and from there to all: they have the same bits, which MPI_Allreduce does not promise. */
static psoup_status sum_piece(mpi *m, void *x, int n, MPI_Datatype type, psoup_error *why) {
    MPI_Request request;
    int first = m->comm.rank == 0;
    int code = MPI_Ireduce(first ? MPI_IN_PLACE : x, first ? x : NULL, n, type, MPI_SUM, 0, m->world, &request);
    psoup_status status = wait_for(m, code, &request, why);
    if (status != PSOUP_OK)
        return status;
    code = MPI_Ibcast(x, n, type, 0, m->world, &request);
    return wait_for(m, code, &request, why);
}

static psoup_status mpi_sum(void *user, void *x, size_t n, psoup_dtype dtype, psoup_error *error) {
    mpi *m = user;
    psoup_error why = m->gone;
    size_t size = psoup_dtype_size(dtype);
    if (dtype != PSOUP_F32 && dtype != PSOUP_F64)
        return fail(error, PSOUP_ERROR_ARGUMENT, "a sum over ranks of %s: expected f32 or f64",
                    psoup_dtype_name(dtype));
    char nothing[sizeof(double)] = {0};
    psoup_status status = why.status;
    for (size_t at = 0; status == PSOUP_OK && (at < n || at == 0); at += PIECE) {
        int now = n - at < PIECE ? (int)(n - at) : PIECE;
        status = sum_piece(m, n ? (char *)x + at * size : nothing, n ? now : 1,
                           dtype == PSOUP_F32 ? MPI_FLOAT : MPI_DOUBLE, &why);
    }
    return status == PSOUP_OK ? PSOUP_OK : end(m, &why, error);
}

static psoup_status mpi_broadcast(void *user, void *data, size_t bytes, psoup_error *error) {
    mpi *m = user;
    psoup_error why = m->gone;
    psoup_status status = why.status;
    for (size_t at = 0; status == PSOUP_OK && at < bytes; at += PIECE) {
        MPI_Request request;
        int now = bytes - at < PIECE ? (int)(bytes - at) : PIECE;
        int code = MPI_Ibcast((char *)data + at, now, MPI_BYTE, 0, m->world, &request);
        status = wait_for(m, code, &request, &why);
    }
    return status == PSOUP_OK ? PSOUP_OK : end(m, &why, error);
}

static psoup_status mpi_failed(void *user, psoup_error *error) {
    mpi *m = user;
    psoup_error why = m->gone;
    psoup_status status = why.status;
    if (status == PSOUP_OK)
        status = m->line->failed(m->line->user, &why);
    return status == PSOUP_OK ? PSOUP_OK : end(m, &why, error);
}

static void mpi_abort(void *user, const char *reason) {
    mpi *m = user;
    if (m->gone.status != PSOUP_OK)
        return;
    m->line->abort(m->line->user, reason);
    m->line->failed(m->line->user, &m->gone);
}

/* All go together: a rank that still waits for what came last by MPI would take the end of the line for a death. */
static void part(mpi *m) {
    MPI_Request request;
    psoup_error why = m->gone;
    if (why.status == PSOUP_OK)
        m->gone.status = wait_for(m, MPI_Ibarrier(m->world, &request), &request, &why);
}

static void mpi_free(void *user) {
    mpi *m = user;
    part(m);
    int well = m->gone.status == PSOUP_OK;
    psoup_comm_free(m->line);
    if (well)
        MPI_Comm_free(&m->world);
    free(m);
}

/* ---- the line ----------------------------------------------------------------------------------------- */

enum { PLACES = 16, KNOCK_MS = 3000 };

/* Where rank 0 listens: at this machine alone where all ranks are on it; else at its name, which another machine may
 * not know, and at the addresses of its networks, not all of which another machine reaches. */
typedef struct place {
    char host[PLACES][256]; /* empty: none */
    int32_t port;           /* 0: it cannot */
} place;

static void list_addresses(place *p) {
    struct ifaddrs *all = NULL;
    size_t n = 0;
    if (gethostname(p->host[n], sizeof p->host[n] - 1) == 0)
        n++;
    if (getifaddrs(&all) != 0)
        return;
    for (const struct ifaddrs *i = all; i && n < PLACES; i = i->ifa_next)
        if (i->ifa_addr && i->ifa_addr->sa_family == AF_INET && (i->ifa_flags & IFF_UP) &&
            !(i->ifa_flags & IFF_LOOPBACK) &&
            inet_ntop(AF_INET, &((struct sockaddr_in *)i->ifa_addr)->sin_addr, p->host[n], sizeof p->host[n]))
            n++;
    freeifaddrs(all);
}

/* Whether something listens there; rank 0 takes who says nothing for a stranger. */
static int answers(const char *host, int32_t port) {
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *found = NULL;
    char service[16];
    int does = 0;
    snprintf(service, sizeof service, "%d", port);
    if (getaddrinfo(host, service, &hints, &found) != 0)
        return 0;
    for (const struct addrinfo *a = found; a && !does; a = a->ai_next) {
        int fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), failure = 0;
        socklen_t size = sizeof failure;
        if (fd < 0)
            continue;
        struct pollfd p = {.fd = fd, .events = POLLOUT};
        does = connect(fd, a->ai_addr, a->ai_addrlen) == 0 ||
               (errno == EINPROGRESS && poll(&p, 1, KNOCK_MS) == 1 &&
                getsockopt(fd, SOL_SOCKET, SO_ERROR, &failure, &size) == 0 && failure == 0);
        close(fd);
    }
    freeaddrinfo(found);
    return does;
}

/* The first of rank 0's places that this rank reaches, or its name. */
static const char *nearest(const place *p) {
    for (size_t i = 0; i < PLACES; i++)
        if (p->host[i][0] && answers(p->host[i], p->port))
            return p->host[i];
    return p->host[0];
}

static int listen_anywhere(int alone, int32_t *port) {
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_addr.s_addr = htonl(alone ? INADDR_LOOPBACK : INADDR_ANY)};
    socklen_t length = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    *port = 0;
    if (fd < 0)
        return -1;
    if (bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && listen(fd, 1024) == 0 &&
        getsockname(fd, (struct sockaddr *)&address, &length) == 0) {
        *port = ntohs(address.sin_port);
        return fd;
    }
    close(fd);
    return -1;
}

static psoup_status open_line(mpi *m, psoup_context *context, psoup_error *error) {
    psoup_comm_options o = PSOUP_COMM_OPTIONS_INIT;
    place p = {.port = 0};
    MPI_Comm here;
    int local = 0;
    int code = MPI_Comm_split_type(m->world, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &here);
    if (code == MPI_SUCCESS)
        code = MPI_Comm_size(here, &local);
    if (code != MPI_SUCCESS)
        return refused(code, error);
    MPI_Comm_free(&here);
    o.rank = m->comm.rank;
    o.world = m->comm.world;
    if (o.rank == 0) {
        o.listener = listen_anywhere(local == o.world, &p.port);
        if (local == o.world)
            strcpy(p.host[0], "127.0.0.1");
        else
            list_addresses(&p);
    }
    code = MPI_Bcast(&p, (int)sizeof p, MPI_BYTE, 0, m->world);
    if (code == MPI_SUCCESS && p.port > 0) {
        o.port = p.port;
        memcpy(o.address, o.rank == 0 || local == o.world ? p.host[0] : nearest(&p), sizeof o.address);
        return psoup_comm_tcp_create(context, &o, &m->line, error);
    }
    if (o.listener >= 0)
        close(o.listener);
    return code != MPI_SUCCESS ? refused(code, error)
                               : fail(error, PSOUP_ERROR_IO, "rank 0 of an MPI job cannot listen at any port");
}

psoup_status psoup_comm_mpi_create(psoup_context *context, MPI_Comm parent, psoup_comm **out,
                                   psoup_error *error) {
    int ready = 0, code = MPI_SUCCESS, rank = 0, world = 1;
    if (out)
        *out = NULL;
    if (!context || !out)
        return fail(error, PSOUP_ERROR_ARGUMENT, "psoup_comm_mpi_create: context or out is NULL");
    if (MPI_Initialized(&ready) != MPI_SUCCESS || !ready)
        return fail(error, PSOUP_ERROR_STATE, "psoup_comm_mpi_create: MPI is not initialised");
    mpi *m = calloc(1, sizeof *m);
    if (!m)
        return fail(error, PSOUP_ERROR_MEMORY, "out of memory: %zu bytes", sizeof *m);
    code = MPI_Comm_dup(parent, &m->world);
    if (code == MPI_SUCCESS)
        code = MPI_Comm_set_errhandler(m->world, MPI_ERRORS_RETURN);
    if (code == MPI_SUCCESS)
        code = MPI_Comm_rank(m->world, &rank);
    if (code == MPI_SUCCESS)
        code = MPI_Comm_size(m->world, &world);
    m->comm = (psoup_comm){.size = sizeof m->comm, .user = m, .rank = rank, .world = world, .sum = mpi_sum,
                           .broadcast = mpi_broadcast, .failed = mpi_failed, .abort = mpi_abort,
                           .free = mpi_free};
    psoup_status status = code == MPI_SUCCESS ? open_line(m, context, error) : refused(code, error);
    if (status == PSOUP_OK)
        *out = &m->comm;
    else
        free(m);
    return status;
}
