/* Frames and bytes over a connection that may end at any time. */
#include "comm/wire.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAGIC 0x70736f75u /* "psou", in one byte order */

psoup__frame psoup__frame_of(psoup__call call, size_t n) {
    return (psoup__frame){.magic = MAGIC, .call = (uint32_t)call, .n = n};
}

static psoup_status lost(const psoup__peer *peer, const char *why, psoup_error *error) {
    return psoup__fail(error, PSOUP_ERROR_IO, "rank %d (%s) is gone: %s", peer->rank, peer->name, why);
}

static psoup_status lost_by(const psoup__peer *peer, int number, psoup_error *error) {
    char text[128];
    errno = number;
    snprintf(text, sizeof text, "%m");
    return lost(peer, text, error);
}

/* Sends what goes without waiting. */
static psoup_status send_some(psoup__peer *peer, psoup__outgoing *out, psoup_error *error) {
    const size_t head = sizeof out->frame, all = head + out->bytes;
    while (out->sent < all) {
        const char *from = out->sent < head ? (const char *)&out->frame + out->sent : out->data + out->sent - head;
        size_t left = out->sent < head ? head - out->sent : all - out->sent;
        ssize_t n = send(peer->fd, from, left, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n >= 0)
            out->sent += (size_t)n;
        else if (errno == EAGAIN || errno == EWOULDBLOCK)
            return PSOUP_OK;
        else if (errno != EINTR)
            return lost_by(peer, errno, error);
    }
    return PSOUP_OK;
}

static bool all_sent(const psoup__outgoing *out) {
    return !out || out->sent == sizeof out->frame + out->bytes;
}

static psoup_status wait_for(psoup__peer *peer, short events, psoup_error *error) {
    struct pollfd p = {.fd = peer->fd, .events = events};
    while (poll(&p, 1, -1) < 0)
        if (errno != EINTR)
            return lost_by(peer, errno, error);
    return PSOUP_OK;
}

psoup_status psoup__peer_send(psoup__peer *peer, const psoup__frame *frame, const void *data, size_t bytes,
                              psoup_error *error) {
    psoup__outgoing out = {.frame = *frame, .data = data, .bytes = bytes};
    psoup_status status = send_some(peer, &out, error);
    while (status == PSOUP_OK && !all_sent(&out)) {
        status = wait_for(peer, POLLOUT, error);
        if (status == PSOUP_OK)
            status = send_some(peer, &out, error);
    }
    if (status != PSOUP_OK) /* it may have said why it goes */
        psoup__peer_alive(peer, error);
    return status;
}

static psoup_status receive_more(psoup__peer *peer, void *data, size_t bytes, size_t *got, psoup_error *error) {
    ssize_t n = recv(peer->fd, data, bytes, MSG_DONTWAIT);
    *got = n > 0 ? (size_t)n : 0;
    if (n == 0)
        return lost(peer, "its connection is closed", error);
    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
        return lost_by(peer, errno, error);
    return PSOUP_OK;
}

psoup_status psoup__peer_receive(psoup__peer *peer, void *data, size_t bytes, psoup__outgoing *out,
                                 psoup_error *error) {
    psoup_status status = PSOUP_OK;
    bool sends = true; /* until that fails */
    for (size_t at = 0, got; at < bytes || (sends && !all_sent(out));) {
        if (sends && !all_sent(out) && send_some(peer, out, NULL) != PSOUP_OK)
            sends = false;
        got = 0;
        if (at < bytes)
            PSOUP__TRY(receive_more(peer, (char *)data + at, bytes - at, &got, error));
        at += got;
        if (at == bytes && (!sends || all_sent(out)))
            break;
        if (got == 0)
            PSOUP__TRY(wait_for(peer, (short)((at < bytes ? POLLIN : 0) | (sends && !all_sent(out) ? POLLOUT : 0)),
                                error));
    }
    if (!sends && psoup__peer_alive(peer, error) == PSOUP_OK)
        lost(peer, "it takes no more", error);
    status = sends ? PSOUP_OK : PSOUP_ERROR_IO;
fail:
    return status;
}

/* Reads why it goes. */
static psoup_status read_reason(psoup__peer *peer, uint64_t n, psoup_error *error) {
    char text[800] = "";
    size_t length = n < sizeof text ? (size_t)n : sizeof text - 1;
    psoup_status status = psoup__peer_receive(peer, text, length, NULL, error);
    return status == PSOUP_OK ? psoup__fail(error, PSOUP_ERROR_IO, "%s", text) : status;
}

psoup_status psoup__peer_expect(psoup__peer *peer, const psoup__frame *frame, psoup__outgoing *out,
                                psoup_error *error) {
    psoup__frame got;
    size_t at = 0;
    while (at < sizeof got) { /* not all of `out` need have gone before the answer's first frame */
        size_t n = 0;
        bool sends = !all_sent(out) && send_some(peer, out, NULL) == PSOUP_OK && !all_sent(out);
        psoup_status status = receive_more(peer, (char *)&got + at, sizeof got - at, &n, error);
        if (status == PSOUP_OK && n == 0)
            status = wait_for(peer, (short)(POLLIN | (sends ? POLLOUT : 0)), error);
        if (status != PSOUP_OK)
            return status;
        at += n;
    }
    if (got.magic == MAGIC && got.call == PSOUP__ABORT)
        return read_reason(peer, got.n, error);
    if (memcmp(&got, frame, sizeof got) != 0)
        return psoup__fail(error, PSOUP_ERROR_STATE,
                           "rank %d (%s) is at another call (%u of %llu) than expected (%u of %llu): do all ranks "
                           "run the same program on the same data?", peer->rank, peer->name, got.call,
                           (unsigned long long)got.n, frame->call, (unsigned long long)frame->n);
    return PSOUP_OK;
}

psoup_status psoup__peer_alive(psoup__peer *peer, psoup_error *error) {
    psoup__frame got;
    ssize_t n = recv(peer->fd, &got, sizeof got, MSG_PEEK | MSG_DONTWAIT);
    if (n == 0)
        return lost(peer, "its connection is closed", error);
    if (n < 0)
        return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? PSOUP_OK : lost_by(peer, errno, error);
    if (n < (ssize_t)sizeof got || got.magic != MAGIC || got.call != PSOUP__ABORT)
        return PSOUP_OK; /* the next call's */
    return psoup__peer_expect(peer, &got, NULL, error);
}

void psoup__peer_abort(psoup__peer *peer, const char *reason) {
    if (peer->fd < 0)
        return;
    psoup__outgoing out = {.data = reason, .bytes = strlen(reason)};
    out.frame = psoup__frame_of(PSOUP__ABORT, out.bytes);
    send_some(peer, &out, NULL);
}

/* What was sent last still arrives: data that nobody read would make the system break the connection off. */
void psoup__peer_close(psoup__peer *peer) {
    char rest[4096];
    if (peer->fd < 0)
        return;
    shutdown(peer->fd, SHUT_WR);
    while (recv(peer->fd, rest, sizeof rest, MSG_DONTWAIT) > 0)
        ;
    close(peer->fd);
    peer->fd = -1;
}
