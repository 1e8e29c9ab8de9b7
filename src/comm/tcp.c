/* Ranks that talk over TCP, each other one with rank 0: collectives. What they send is in wire.c. */
#include "comm/wire.h"

#include <string.h>
#include <unistd.h>

enum { CHUNK = 1 << 17 /* numbers that are summed at a time */ };

typedef struct tcp {
    psoup_comm comm; /* first: what the caller has */
    psoup_context *context;
    psoup__peer *peers; /* [world]; of a rank that is not 0, peers[0] alone is open */
    double *total;      /* [CHUNK] */
    char *part;         /* [CHUNK] numbers of a rank */
    psoup_error gone;   /* the failure that ended it; PSOUP_OK while it works */
} tcp;

/* ---- failing ---------------------------------------------------------------------------------------- */

/* The first failure stays, and rank 0 tells the others of it, who know no one but rank 0. */
static psoup_status fail(tcp *t, const psoup_error *why, psoup_error *error) {
    if (t->gone.status == PSOUP_OK) {
        t->gone = *why;
        for (int32_t r = 1; t->comm.rank == 0 && r < t->comm.world; r++)
            psoup__peer_abort(&t->peers[r], why->message);
    }
    return psoup__fail(error, t->gone.status, "%s", t->gone.message);
}

static psoup_status check(tcp *t, psoup_status status, const psoup_error *why, psoup_error *error) {
    return status == PSOUP_OK ? PSOUP_OK : fail(t, why, error);
}

static psoup_status tcp_failed(void *user, psoup_error *error) {
    tcp *t = user;
    psoup_error why = t->gone;
    int32_t last = t->comm.rank == 0 ? t->comm.world : 1;
    for (int32_t r = t->comm.rank == 0; why.status == PSOUP_OK && r < last; r++)
        psoup__peer_alive(&t->peers[r], &why);
    return check(t, why.status, &why, error);
}

static void tcp_abort(void *user, const char *reason) {
    tcp *t = user;
    char text[600];
    if (t->gone.status != PSOUP_OK)
        return;
    snprintf(text, sizeof text, "rank %d stopped: %s", t->comm.rank, reason);
    psoup__fail(&t->gone, PSOUP_ERROR_STATE, "%s", text);
    for (int32_t r = t->comm.rank == 0; r < (t->comm.rank == 0 ? t->comm.world : 1); r++)
        psoup__peer_abort(&t->peers[r], text);
}

/* ---- sums ------------------------------------------------------------------------------------------- */

static void add(double *total, const void *x, size_t n, psoup_dtype dtype) {
    if (dtype == PSOUP_F32)
        for (size_t i = 0; i < n; i++)
            total[i] += ((const float *)x)[i];
    else
        for (size_t i = 0; i < n; i++)
            total[i] += ((const double *)x)[i];
}

static void give(void *x, const double *total, size_t n, psoup_dtype dtype) {
    if (dtype == PSOUP_F32)
        for (size_t i = 0; i < n; i++)
            ((float *)x)[i] = (float)total[i];
    else
        memcpy(x, total, n * sizeof *total);
}

/* Rank 0: takes a chunk of every rank, adds them in their order, and gives the sum to all. */
static psoup_status sum_here(tcp *t, char *x, size_t n, psoup_dtype dtype, psoup_error *why) {
    psoup_status status = PSOUP_OK;
    size_t size = psoup_dtype_size(dtype);
    const psoup__frame call = psoup__frame_of(dtype == PSOUP_F32 ? PSOUP__SUM_F32 : PSOUP__SUM_F64, n);
    for (int32_t r = 1; r < t->comm.world; r++)
        PSOUP__TRY(psoup__peer_expect(&t->peers[r], &call, NULL, why));
    for (size_t at = 0, now; at < n || at == 0; at += now) {
        now = n - at < CHUNK ? n - at : CHUNK;
        memset(t->total, 0, now * sizeof *t->total);
        add(t->total, x + at * size, now, dtype);
        for (int32_t r = 1; r < t->comm.world; r++) {
            PSOUP__TRY(psoup__peer_receive(&t->peers[r], t->part, now * size, NULL, why));
            add(t->total, t->part, now, dtype);
        }
        give(x + at * size, t->total, now, dtype);
        for (int32_t r = 1; r < t->comm.world; r++)
            PSOUP__TRY(psoup__peer_send(&t->peers[r], &call, x + at * size, now * size, why));
        if (now == 0)
            break;
    }
fail:
    return status;
}

/* Another rank: sends all, and takes the sums chunk by chunk, each where its own numbers have left from. */
static psoup_status sum_there(tcp *t, char *x, size_t n, psoup_dtype dtype, psoup_error *why) {
    psoup_status status = PSOUP_OK;
    size_t size = psoup_dtype_size(dtype);
    const psoup__frame call = psoup__frame_of(dtype == PSOUP_F32 ? PSOUP__SUM_F32 : PSOUP__SUM_F64, n);
    psoup__outgoing out = {.frame = call, .data = x, .bytes = n * size};
    for (size_t at = 0, now; at < n || at == 0; at += now) {
        now = n - at < CHUNK ? n - at : CHUNK;
        PSOUP__TRY(psoup__peer_expect(&t->peers[0], &call, &out, why));
        PSOUP__TRY(psoup__peer_receive(&t->peers[0], x + at * size, now * size, &out, why));
        if (now == 0)
            break;
    }
fail:
    return status;
}

static psoup_status tcp_sum(void *user, void *x, size_t n, psoup_dtype dtype, psoup_error *error) {
    tcp *t = user;
    psoup_error why = t->gone;
    size_t bytes;
    if (dtype != PSOUP_F32 && dtype != PSOUP_F64)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "a sum over ranks of %s: expected f32 or f64",
                           psoup_dtype_name(dtype));
    if (!psoup__multiply(n, psoup_dtype_size(dtype), &bytes))
        return psoup__out_of_memory(error, SIZE_MAX);
    psoup_status status = why.status;
    if (status == PSOUP_OK && t->comm.world > 1)
        status = t->comm.rank == 0 ? sum_here(t, x, n, dtype, &why) : sum_there(t, x, n, dtype, &why);
    return check(t, status, &why, error);
}

/* The others ask for the bytes, so that rank 0 knows that all are at the same call. */
static psoup_status tcp_broadcast(void *user, void *data, size_t bytes, psoup_error *error) {
    tcp *t = user;
    psoup_error why = t->gone;
    psoup_status status = why.status;
    const psoup__frame call = psoup__frame_of(PSOUP__BROADCAST, bytes);
    if (t->comm.rank == 0) {
        for (int32_t r = 1; status == PSOUP_OK && r < t->comm.world; r++)
            status = psoup__peer_expect(&t->peers[r], &call, NULL, &why);
        for (int32_t r = 1; status == PSOUP_OK && r < t->comm.world; r++)
            status = psoup__peer_send(&t->peers[r], &call, data, bytes, &why);
    } else if (status == PSOUP_OK) {
        status = psoup__peer_send(&t->peers[0], &call, NULL, 0, &why);
        if (status == PSOUP_OK)
            status = psoup__peer_expect(&t->peers[0], &call, NULL, &why);
        if (status == PSOUP_OK)
            status = psoup__peer_receive(&t->peers[0], data, bytes, NULL, &why);
    }
    return check(t, status, &why, error);
}

/* ---- beginning and end ------------------------------------------------------------------------------- */

static void tcp_free(void *user) {
    tcp *t = user;
    for (int32_t r = 0; t->peers && r < t->comm.world; r++)
        psoup__peer_close(&t->peers[r]);
    psoup__free(t->context, t->peers);
    psoup__free(t->context, t->total);
    psoup__free(t->context, t->part);
    psoup__free(t->context, t);
}

static psoup_status check_options(const psoup_comm_options *o, psoup_error *error) {
    if (o->world < 1 || o->rank < 0 || o->rank >= o->world)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_comm_options: rank %d of %d", o->rank, o->world);
    if (o->reserved != 0 || o->timeout < 0 || o->port < 1 || o->port > 65535)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_comm_options: port is %d, timeout %d, reserved %d: expected 1 to 65535, 0 or "
                           "more, and 0", o->port, o->timeout, o->reserved);
    bool ends = memchr(o->address, '\0', sizeof o->address) != NULL;
    if (!ends || (o->world > 1 && !o->address[0] && (o->rank > 0 || o->listener < 0)))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_comm_options: address is %s",
                           ends ? "empty" : "not ended by a NUL");
    return PSOUP_OK;
}

psoup_status psoup_comm_tcp_create(psoup_context *context, const psoup_comm_options *options,
                                   psoup_comm **out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_comm_options o = PSOUP_COMM_OPTIONS_INIT;
    tcp *t = NULL;
    bool meets = false;
    if (out)
        *out = NULL;
    if (!context || !out)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_comm_tcp_create: context or out is NULL");
    PSOUP__TRY(psoup__options(&o, sizeof o, options, "psoup_comm_options", error));
    PSOUP__TRY(check_options(&o, error));
    t = psoup__alloc(context, 1, sizeof *t, error);
    if (!t) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    t->context = context;
    t->comm = (psoup_comm){.size = sizeof t->comm, .user = t, .rank = o.rank, .world = o.world,
                           .sum = tcp_sum, .broadcast = tcp_broadcast, .failed = tcp_failed,
                           .abort = tcp_abort, .free = tcp_free};
    t->peers = psoup__alloc(context, (size_t)o.world, sizeof *t->peers, error);
    for (int32_t r = 0; t->peers && r < o.world; r++)
        t->peers[r] = (psoup__peer){.fd = -1, .rank = r};
    t->total = psoup__alloc(context, CHUNK, sizeof *t->total, error);
    t->part = psoup__alloc(context, CHUNK, sizeof(double), error);
    if (!t->peers || !t->total || !t->part) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    meets = o.world > 1;
    if (meets)
        PSOUP__TRY(o.rank == 0 ? psoup__meet_all(&o, t->peers, error) : psoup__meet_first(&o, t->peers, error));
    *out = &t->comm;
fail:
    if (!meets && o.rank == 0 && o.listener >= 0) /* else it is closed by the one who listens */
        close(o.listener);
    if (status != PSOUP_OK && t)
        tcp_free(t);
    return status;
}
