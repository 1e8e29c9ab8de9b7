/* src/comm/wire.h: connections between ranks, and what is sent over them.
 *
 * Everything begins with a frame, in the byte order of the machine. Rank 0 answers call after call; whoever is
 * told "abort" instead of what it expects reads why.
 */
#ifndef PSOUP__WIRE_H
#define PSOUP__WIRE_H

#include <stdio.h>

#include "base/base.h"
#include "psoup/comm.h"

typedef enum psoup__call { PSOUP__SUM_F32 = 1, PSOUP__SUM_F64, PSOUP__BROADCAST, PSOUP__ABORT } psoup__call;

typedef struct psoup__frame {
    uint32_t magic, call;
    uint64_t n; /* numbers of the whole call, or bytes */
} psoup__frame;
psoup__frame psoup__frame_of(psoup__call call, size_t n);

typedef struct psoup__peer {
    int fd; /* −1: not connected; else it does not block */
    int32_t rank;
    char name[112]; /* "host, process 12" */
} psoup__peer;

/* What is being sent while something is awaited. */
typedef struct psoup__outgoing {
    psoup__frame frame;
    const char *data; /* [bytes], after the frame */
    size_t bytes, sent; /* sent: of both */
} psoup__outgoing;

/* ---- wire.c: `error` names the peer ------------------------------------------------------------------- */

psoup_status psoup__peer_send(psoup__peer *peer, const psoup__frame *frame, const void *data, size_t bytes,
                              psoup_error *error);
psoup_status psoup__peer_receive(psoup__peer *peer, void *data, size_t bytes, psoup__outgoing *out,
                                 psoup_error *error);
/* Receives a frame, which has to be this one. */
psoup_status psoup__peer_expect(psoup__peer *peer, const psoup__frame *frame, psoup__outgoing *out,
                                psoup_error *error);
/* Whether it has gone, as far as that is known now. */
psoup_status psoup__peer_alive(psoup__peer *peer, psoup_error *error);
/* Says why it goes, if that can be said at once. */
void psoup__peer_abort(psoup__peer *peer, const char *reason);
void psoup__peer_close(psoup__peer *peer);

/* ---- meet.c: finding each other ------------------------------------------------------------------------- */

/* Rank 0 waits for all others; another rank waits for rank 0. */
psoup_status psoup__meet_all(const psoup_comm_options *options, psoup__peer *peers /* [world] */,
                             psoup_error *error);
psoup_status psoup__meet_first(const psoup_comm_options *options, psoup__peer *peers, psoup_error *error);

#endif
