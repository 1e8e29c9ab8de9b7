/* libnccl.so.2 for machines without one: the calls that src/gpu makes, between processes on one machine. Rank 0
 * listens at a name of this machine's; its work in a stream moves bytes when the stream is asked, and waits for no one.
 *
 *   PSOUP_HOST_NCCL_DEAF=1   nobody's end is noticed, as where GPUs share memory: work then goes on for ever
 *   PSOUP_HOST_NCCL_FAIL=N   the Nth sum fails by itself
 */
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "stream.h"

extern "C" {
#include "gpu/nccl.h"
}

namespace {

enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };

struct name { /* what an id holds */
    char path[100];
    int listener; /* of the process that made it */
    int maker;
};

struct ranks {
    int rank, world, state = IN_PROGRESS, listener = -1, sums = 0;
    bool aborted = false;
    sockaddr_un address{};
    std::vector<int> peers; /* rank 0: of each other rank; else rank 0's alone */
    size_t met = 0;
};

bool deaf() { return std::getenv("PSOUP_HOST_NCCL_DEAF") != nullptr; }

/* One more of the others, if there is one now. */
void meet(ranks *r) {
    if (r->rank == 0) {
        int fd = accept4(r->listener, nullptr, nullptr, SOCK_CLOEXEC);
        int who = 0;
        if (fd >= 0 && recv(fd, &who, sizeof who, 0) == (ssize_t)sizeof who && who > 0 && who < r->world) {
            r->peers[(size_t)who] = fd;
            r->met++;
        }
        if (r->met + 1 == (size_t)r->world)
            r->state = SUCCESS;
        return;
    }
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, (const sockaddr *)&r->address, sizeof r->address) == 0 &&
        send(fd, &r->rank, sizeof r->rank, MSG_NOSIGNAL) == (ssize_t)sizeof r->rank) {
        r->peers[0] = fd;
        r->state = SUCCESS;
    } else {
        close(fd);
    }
}

/* Bytes that go, or come, without waiting. */
struct transfer {
    int fd;
    char *data;
    size_t bytes, at = 0;
    bool out;
    /* Whether all is through; false also when the peer is gone, of which *gone tells. */
    bool move(bool *gone) {
        while (at < bytes) {
            ssize_t n = out ? send(fd, data + at, bytes - at, MSG_DONTWAIT | MSG_NOSIGNAL)
                            : recv(fd, data + at, bytes - at, MSG_DONTWAIT);
            if (n > 0) {
                at += (size_t)n;
            } else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) {
                return false;
            } else {
                *gone = true;
                return false;
            }
        }
        return true;
    }
};

/* One sum under way. */
struct sum {
    ranks *r;
    float *x;
    size_t n;
    std::vector<std::vector<float>> theirs;
    std::vector<transfer> in, out;
    bool added = false;

    void begin() {
        const size_t bytes = n * sizeof(float);
        if (r->rank == 0) {
            theirs.resize((size_t)r->world);
            for (int k = 1; k < r->world; k++) {
                theirs[(size_t)k].resize(n);
                in.push_back({r->peers[(size_t)k], (char *)theirs[(size_t)k].data(), bytes, 0, false});
                out.push_back({r->peers[(size_t)k], (char *)x, bytes, 0, true});
            }
        } else {
            out.push_back({r->peers[0], (char *)x, bytes, 0, true});
            in.push_back({r->peers[0], (char *)x, bytes, 0, false});
        }
    }
    static bool all(std::vector<transfer> &list, bool *gone) {
        bool through = true;
        for (auto &t : list)
            through = t.move(gone) && through;
        return through;
    }
    /* Rank 0 takes all, adds, and gives; another one gives and then takes. */
    bool step() {
        bool gone = false, done = false;
        if (r->aborted)
            return true;
        if (r->rank == 0) {
            if (all(in, &gone) && !added) {
                for (int k = 1; k < r->world; k++)
                    for (size_t i = 0; i < n; i++)
                        x[i] += theirs[(size_t)k][i];
                added = true;
            }
            done = added && all(out, &gone);
        } else {
            done = all(out, &gone) && all(in, &gone);
        }
        if (gone && !deaf()) {
            r->state = REMOTE_ERROR;
            return true;
        }
        return done;
    }
};

void close_all(ranks *r) {
    for (int fd : r->peers)
        if (fd >= 0)
            close(fd);
    if (r->listener >= 0)
        close(r->listener);
    r->peers.clear();
    r->listener = -1;
}

} // namespace

extern "C" {

int ncclGetUniqueId(psoup__nccl_id *id) {
    static int made;
    name n{};
    sockaddr_un address{};
    n.maker = getpid();
    std::snprintf(n.path, sizeof n.path, "psoup-nccl-%d-%d", n.maker, ++made);
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path + 1, n.path, std::strlen(n.path)); /* after a NUL: no file */
    n.listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (n.listener < 0 || bind(n.listener, (const sockaddr *)&address, sizeof address) != 0 ||
        listen(n.listener, 16) != 0)
        return SYSTEM_ERROR;
    std::memset(id, 0, sizeof *id);
    std::memcpy(id->bytes, &n, sizeof n);
    return SUCCESS;
}

int ncclCommInitRankConfig(void **comm, int world, psoup__nccl_id id, int rank, psoup__nccl_config *config) {
    name n;
    if (config->size != 24 || config->magic != 0xcafebeef || config->version < 21400 || config->blocking != 0 ||
        world < 1 || rank < 0 || rank >= world)
        return INVALID_ARGUMENT;
    std::memcpy(&n, id.bytes, sizeof n);
    auto *r = new ranks{};
    r->rank = rank;
    r->world = world;
    r->address.sun_family = AF_UNIX;
    std::memcpy(r->address.sun_path + 1, n.path, std::strlen(n.path));
    r->peers.assign(rank == 0 ? (size_t)world : 1, -1);
    if (rank == 0 && n.maker == getpid())
        r->listener = n.listener;
    *comm = r;
    return IN_PROGRESS;
}

int ncclCommGetAsyncError(void *comm, int *state) {
    auto *r = static_cast<ranks *>(comm);
    if (r->state == IN_PROGRESS)
        meet(r);
    *state = r->state;
    return SUCCESS;
}

int ncclAllReduce(const void *in, void *out, size_t n, int dtype, int op, void *comm, void *stream) {
    auto *r = static_cast<ranks *>(comm);
    const char *fail = std::getenv("PSOUP_HOST_NCCL_FAIL");
    if (r->state != SUCCESS)
        return INVALID_USAGE;
    if (in != out || dtype != PSOUP__NCCL_F32 || op != PSOUP__NCCL_SUM)
        return INVALID_ARGUMENT;
    if (fail && ++r->sums == std::atoi(fail))
        return SYSTEM_ERROR;
    auto s = std::make_shared<sum>();
    s->r = r;
    s->x = static_cast<float *>(out);
    s->n = n;
    s->begin();
    return psoup_host_put_until(static_cast<CUstream_st *>(stream), [s] { return s->step(); }) ? SUCCESS
                                                                                               : INVALID_USAGE;
}

int ncclCommFinalize(void *comm) { return static_cast<ranks *>(comm)->state; }
int ncclCommDestroy(void *comm) {
    close_all(static_cast<ranks *>(comm));
    delete static_cast<ranks *>(comm);
    return SUCCESS;
}
int ncclCommAbort(void *comm) {
    auto *r = static_cast<ranks *>(comm);
    r->aborted = true; /* kept: work in a stream may still look at it */
    close_all(r);
    return SUCCESS;
}
const char *ncclGetErrorString(int result) {
    return result == REMOTE_ERROR ? "remote process exited or there was a network error"
           : result == SYSTEM_ERROR ? "unhandled system error" : result == INVALID_USAGE ? "invalid usage"
                                                                                         : "invalid argument";
}
}
