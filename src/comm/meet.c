/* How ranks find each other: rank 0 listens, the others knock until they are let in. */
#include "comm/wire.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HELLO 0x6f6c6568u
enum { STRANGER_MS = 5000 /* in which one who connects has to say who it is */, RETRY_MS = 50 };

/* What another rank says first. */
typedef struct hello {
    uint32_t magic;
    int32_t rank, world, process;
    char version[16], host[64];
} hello;

/* And what it is told: let in, or why not. */
typedef struct answer {
    uint32_t magic, refused;
    int32_t process, reserved;
    char host[64], why[200];
} answer;

static int64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void host_name(char out[64]) {
    memset(out, 0, 64);
    if (gethostname(out, 63) != 0)
        strcpy(out, "?");
}

/* A machine that vanishes without a word is noticed after about a minute. */
static void settle(int fd) {
    const int on = 1, idle = 20, interval = 10, probes = 4;
    const unsigned unanswered = 60000; /* ms */
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unanswered, sizeof unanswered);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
}

/* All bytes before `deadline`, or not. */
static bool take(int fd, void *data, size_t bytes, int64_t deadline) {
    for (size_t at = 0; at < bytes;) {
        ssize_t n = recv(fd, (char *)data + at, bytes - at, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR))
            return false;
        at += n > 0 ? (size_t)n : 0;
        int64_t left = deadline - now_ms();
        struct pollfd p = {.fd = fd, .events = POLLIN};
        if (at < bytes && (left <= 0 || (poll(&p, 1, (int)left) < 0 && errno != EINTR)))
            return false;
    }
    return true;
}

/* A few bytes, for which a fresh connection has room. */
static bool tell(int fd, const void *data, size_t bytes) {
    return send(fd, data, bytes, MSG_NOSIGNAL) == (ssize_t)bytes;
}

/* ---- rank 0 ------------------------------------------------------------------------------------------- */

static bool is_loopback(const struct sockaddr *address) {
    if (address->sa_family == AF_INET)
        return ntohl(((const struct sockaddr_in *)address)->sin_addr.s_addr) >> 24 == 127;
    return address->sa_family == AF_INET6 &&
           IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)address)->sin6_addr);
}

static int listen_at(const struct sockaddr *address, socklen_t length) {
    const int on = 1, off = 0;
    int fd = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (address->sa_family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (bind(fd, address, length) == 0 && listen(fd, 1024) == 0)
        return fd;
    int kept = errno;
    close(fd);
    errno = kept;
    return -1;
}

/* At an address of this machine alone, or at all that it has: a host's name may stand for one of many. */
static psoup_status open_listener(const psoup_comm_options *o, int *out, psoup_error *error) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
    struct sockaddr_in6 any6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)o->port)};
    struct sockaddr_in any4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)o->port)};
    char port[16];
    snprintf(port, sizeof port, "%d", o->port);
    *out = -1;
    if (getaddrinfo(o->address, port, &hints, &found) == 0 && found && is_loopback(found->ai_addr)) {
        *out = listen_at(found->ai_addr, found->ai_addrlen);
    } else {
        *out = listen_at((const struct sockaddr *)&any6, sizeof any6);
        if (*out < 0)
            *out = listen_at((const struct sockaddr *)&any4, sizeof any4);
    }
    int kept = errno;
    if (found)
        freeaddrinfo(found);
    errno = kept;
    return *out >= 0 ? PSOUP_OK
                     : psoup__fail(error, PSOUP_ERROR_IO, "rank 0 cannot listen at %s:%d: %m", o->address,
                                   o->port);
}

/* Lets one in, or tells it why not. What says nothing, or nothing that can be understood, is sent away. */
static bool receive_one(const psoup_comm_options *o, psoup__peer *peers, int fd) {
    hello h;
    answer a = {.magic = HELLO, .process = (int32_t)getpid()};
    host_name(a.host);
    if (!take(fd, &h, sizeof h, now_ms() + STRANGER_MS) || h.magic != HELLO)
        return false;
    h.version[sizeof h.version - 1] = h.host[sizeof h.host - 1] = '\0';
    if (strcmp(h.version, psoup_version()) != 0)
        snprintf(a.why, sizeof a.why, "it is of version %s, rank 0 of %s", h.version, psoup_version());
    else if (h.world != o->world)
        snprintf(a.why, sizeof a.why, "it is one of %d ranks, rank 0 of %d", h.world, o->world);
    else if (h.rank < 1 || h.rank >= o->world || peers[h.rank].fd >= 0)
        snprintf(a.why, sizeof a.why, "rank %d is %s", h.rank, h.rank > 0 && h.rank < o->world ? "there already"
                                                                                            : "none");
    a.refused = a.why[0] != '\0';
    if (!tell(fd, &a, sizeof a) || a.refused)
        return false;
    peers[h.rank].fd = fd;
    snprintf(peers[h.rank].name, sizeof peers[h.rank].name, "%s, process %d", h.host, h.process);
    return true;
}

static psoup_status nobody(const psoup_comm_options *o, const psoup__peer *peers, psoup_error *error) {
    char who[200] = "";
    size_t used = 0;
    for (int32_t r = 1; r < o->world; r++)
        if (peers[r].fd < 0 && used + 32 < sizeof who)
            used += (size_t)snprintf(who + used, sizeof who - used, "%s%d", used ? ", " : "", r);
    return psoup__fail(error, PSOUP_ERROR_IO, "rank 0 waited %d seconds at %s:%d; of %d ranks these did not come: %s",
                       o->timeout, o->address, o->port, o->world, who);
}

psoup_status psoup__meet_all(const psoup_comm_options *o, psoup__peer *peers, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    int listener = o->listener;
    const int64_t deadline = now_ms() + 1000 * (int64_t)o->timeout;
    if (listener < 0)
        PSOUP__TRY(open_listener(o, &listener, error));
    for (int32_t missing = o->world - 1; missing > 0;) {
        int64_t left = deadline - now_ms();
        struct pollfd p = {.fd = listener, .events = POLLIN};
        int ready = left > 0 ? poll(&p, 1, left < 60000 ? (int)left : 60000) : 0;
        if (left <= 0) {
            status = nobody(o, peers, error);
            break;
        }
        int fd = ready > 0 ? accept(listener, NULL, NULL) : -1;
        if (fd < 0)
            continue;
        settle(fd);
        if (receive_one(o, peers, fd))
            missing--;
        else
            close(fd);
    }
fail:
    if (listener >= 0)
        close(listener);
    return status;
}

/* ---- another rank --------------------------------------------------------------------------------------- */

static int connect_once(const psoup_comm_options *o, const char **why) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
    char port[16];
    int fd = -1;
    snprintf(port, sizeof port, "%d", o->port);
    int unknown = getaddrinfo(o->address, port, &hints, &found);
    *why = unknown ? gai_strerror(unknown) : "nobody listens there";
    for (const struct addrinfo *a = unknown ? NULL : found; a && fd < 0; a = a->ai_next) {
        fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd >= 0 && connect(fd, a->ai_addr, a->ai_addrlen) != 0) {
            close(fd);
            fd = -1;
        }
    }
    if (!unknown)
        freeaddrinfo(found);
    return fd;
}

psoup_status psoup__meet_first(const psoup_comm_options *o, psoup__peer *peers, psoup_error *error) {
    const int64_t deadline = now_ms() + 1000 * (int64_t)o->timeout;
    const struct timespec pause = {.tv_nsec = RETRY_MS * 1000000L};
    const char *why = "";
    hello h = {.magic = HELLO, .rank = o->rank, .world = o->world, .process = (int32_t)getpid()};
    answer a = {0};
    int fd = connect_once(o, &why);
    while (fd < 0 && now_ms() < deadline) {
        nanosleep(&pause, NULL);
        fd = connect_once(o, &why);
    }
    if (fd < 0)
        return psoup__fail(error, PSOUP_ERROR_IO, "rank %d did not reach rank 0 at %s:%d within %d seconds: %s",
                           o->rank, o->address, o->port, o->timeout, why);
    settle(fd);
    snprintf(h.version, sizeof h.version, "%s", psoup_version());
    host_name(h.host);
    bool understood = tell(fd, &h, sizeof h) && take(fd, &a, sizeof a, deadline) && a.magic == HELLO;
    if (understood && !a.refused) {
        a.host[sizeof a.host - 1] = '\0';
        snprintf(peers[0].name, sizeof peers[0].name, "%s, process %d", a.host, a.process);
        peers[0].fd = fd;
        return PSOUP_OK;
    }
    close(fd);
    a.why[sizeof a.why - 1] = '\0';
    return psoup__fail(error, PSOUP_ERROR_IO, "rank %d was not let in at %s:%d: %s", o->rank, o->address, o->port,
                       understood ? a.why : "what listens there is not rank 0 of libpsoup");
}
