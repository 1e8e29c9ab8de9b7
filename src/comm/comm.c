/* What every way to talk has in common. */
#include "psoup/comm.h"

void psoup_comm_free(psoup_comm *comm) {
    if (comm && comm->free)
        comm->free(comm->user);
}
