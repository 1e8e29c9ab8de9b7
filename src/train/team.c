/* One rank's part in a run of several: which rows are its own, and what all add up. */
#include "train/train.h"

#include <string.h>

psoup_status psoup__team_join(psoup__team *team, psoup_context *context, const psoup_comm *comm,
                              psoup_error *error) {
    *team = (psoup__team){.context = context, .world = 1};
    if (!comm)
        return PSOUP_OK;
    if (comm->size != sizeof(*comm) || comm->world < 1 || comm->rank < 0 || comm->rank >= comm->world ||
        !comm->sum || !comm->broadcast || !comm->failed || !comm->abort)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_comm: size is %zu, rank %d of %d, and a function is %s", comm->size,
                           comm->rank, comm->world,
                           comm->sum && comm->broadcast && comm->failed && comm->abort ? "there" : "NULL");
    if (comm->world == 1)
        return PSOUP_OK;
    if (comm->world > PSOUP__PIECE / 2)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_comm: world is %d: expected %d at most", comm->world,
                           PSOUP__PIECE / 2);
    team->comm = comm;
    team->load = psoup__alloc(context, (size_t)comm->world, sizeof(*team->load), error);
    team->piece = psoup__alloc(context, PSOUP__PIECE, sizeof(*team->piece), error);
    team->rank = comm->rank;
    team->world = comm->world;
    return team->load && team->piece ? PSOUP_OK : PSOUP_ERROR_MEMORY;
}

void psoup__team_tell(psoup__team *team, psoup_status status, const psoup_error *error) {
    if (!team->comm || status == PSOUP_OK || team->lost || team->agreed == status)
        return;
    team->comm->abort(team->comm->user, error && error->message[0] ? error->message
                                                                   : psoup_status_name(status));
    team->lost = true;
}

void psoup__team_leave(psoup__team *team) {
    if (team->comm) {
        psoup__free(team->context, team->load);
        psoup__free(team->context, team->piece);
    }
    *team = (psoup__team){.world = 1};
}

/* ---- shares --------------------------------------------------------------------------------------- */

void psoup__team_deal(psoup__team *team) {
    if (team->comm)
        memset(team->load, 0, (size_t)team->world * sizeof(*team->load));
}

bool psoup__team_mine(psoup__team *team, int64_t rows) {
    int32_t least = 0;
    if (!team->comm)
        return true;
    for (int32_t r = 1; r < team->world; r++)
        if (team->load[r] < team->load[least])
            least = r;
    team->load[least] += rows;
    return least == team->rank;
}

/* ---- sums ------------------------------------------------------------------------------------------- */

static psoup_status lose(psoup__team *team, psoup_status status) {
    team->lost = team->lost || status != PSOUP_OK;
    return status;
}

psoup_status psoup__team_sum(psoup__team *team, double *x, size_t n, psoup_error *error) {
    return team->comm ? lose(team, team->comm->sum(team->comm->user, x, n, PSOUP_F64, error)) : PSOUP_OK;
}

psoup_status psoup__team_sum_floats(psoup__team *team, float *x, size_t n, psoup_error *error) {
    return team->comm ? lose(team, team->comm->sum(team->comm->user, x, n, PSOUP_F32, error)) : PSOUP_OK;
}

/* As doubles, which hold every int32_t. */
psoup_status psoup__team_sum_ids(psoup__team *team, int32_t *x, size_t n, psoup_error *error) {
    enum { MOST = PSOUP__PIECE / 2 };
    double *wide = (double *)team->piece; /* 64-byte aligned */
    for (size_t at = 0, now; team->comm && at < n; at += now) {
        now = n - at < MOST ? n - at : MOST;
        for (size_t i = 0; i < now; i++)
            wide[i] = x[at + i];
        psoup_status status = psoup__team_sum(team, wide, now, error);
        if (status != PSOUP_OK)
            return status;
        for (size_t i = 0; i < now; i++)
            x[at + i] = (int32_t)wide[i];
    }
    return PSOUP_OK;
}

/* A place for each rank, and zeros in the others'. */
psoup_status psoup__team_max(psoup__team *team, double *x, psoup_error *error) {
    double *all = (double *)team->piece;
    if (!team->comm)
        return PSOUP_OK;
    memset(all, 0, (size_t)team->world * sizeof(*all));
    all[team->rank] = *x;
    psoup_status status = psoup__team_sum(team, all, (size_t)team->world, error);
    *x = all[0];
    for (int32_t r = 1; r < team->world; r++)
        if (!(all[r] <= *x))
            *x = all[r];
    return status;
}

psoup_status psoup__team_count(psoup__team *team, size_t *n, psoup_error *error) {
    double count = (double)*n;
    psoup_status status = psoup__team_sum(team, &count, 1, error);
    *n = (size_t)count;
    return status;
}

/* Another rank that failed says so by psoup__team_tell. Where one is gone the run ends for that. */
psoup_status psoup__team_vote(psoup__team *team, psoup_status own, bool *stop, psoup_error *error) {
    double said[2] = {*stop, own != PSOUP_OK};
    if (team->lost)
        *stop = false;
    if (!team->comm || team->lost || (own != PSOUP_OK && team->rank != 0))
        return own;
    psoup_error trouble = {0}; /* the sum must not overwrite what *error says of `own` */
    psoup_status status = psoup__team_sum(team, said, 2, own == PSOUP_OK ? error : &trouble);
    if (status != PSOUP_OK)
        return own == PSOUP_OK ? status : own;
    *stop = said[0] > 0.0;
    if (said[1] > 0.0)
        return psoup__team_outcome(team, own, error);
    if (*stop)
        team->agreed = PSOUP_ERROR_CANCELLED;
    return PSOUP_OK;
}

psoup_status psoup__team_broadcast(psoup__team *team, void *data, size_t bytes, psoup_error *error) {
    return team->comm ? lose(team, team->comm->broadcast(team->comm->user, data, bytes, error)) : PSOUP_OK;
}

/* Through the host, piece by piece, where the ranks cannot add up in the device's memory. */
static psoup_status sum_pieces(psoup__team *team, psoup__backend *be, float *x, size_t n, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t at = 0, now; at < n; at += now) {
        now = n - at < PSOUP__PIECE ? n - at : PSOUP__PIECE;
        PSOUP__TRY(be->ops->read(be, team->piece, x + at, now * sizeof(*x), error));
        PSOUP__TRY(psoup__team_sum_floats(team, team->piece, now, error));
        be->ops->write(be, x + at, team->piece, now * sizeof(*x));
    }
fail:
    return status;
}

psoup_status psoup__team_sum_gradient(psoup__team *team, psoup__optimizer *o, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__optimizer_gather(o);
    if (!team->comm)
        return PSOUP_OK;
    if (o->be->ops->on_host)
        return psoup__team_sum_floats(team, o->g, o->n, error);
    if (!team->comm->sum_device)
        return sum_pieces(team, o->be, o->g, o->n, error);
    PSOUP__TRY(o->be->ops->read(o->be, team->piece, o->g, sizeof(*o->g), error)); /* waits for the work before */
    return lose(team, team->comm->sum_device(team->comm->user, o->g, o->n, error));
fail:
    return status;
}

/* ---- what rank 0 does alone ------------------------------------------------------------------------- */

psoup_status psoup__team_outcome(psoup__team *team, psoup_status status, psoup_error *error) {
    psoup_error told = {.status = status};
    if (!team->comm || team->lost)
        return status;
    if (team->rank == 0 && status != PSOUP_OK && error)
        memcpy(told.message, error->message, sizeof(told.message));
    psoup_status sent = psoup__team_broadcast(team, &told, sizeof(told), error);
    if (sent != PSOUP_OK)
        return sent;
    if (told.status != PSOUP_OK)
        team->agreed = told.status;
    told.message[sizeof(told.message) - 1] = '\0';
    return told.status == PSOUP_OK || team->rank == 0
               ? told.status
               : psoup__fail(error, told.status, "rank 0: %.900s", told.message);
}
