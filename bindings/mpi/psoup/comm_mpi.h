/* psoup/comm_mpi.h: the ranks of an MPI job train one run. In libpsoup-mpi.a, which alone needs MPI. */
#ifndef PSOUP_COMM_MPI_H
#define PSOUP_COMM_MPI_H

#include <mpi.h>

#include "psoup/comm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Over the ranks of `parent`, all of which call it, from one thread each (MPI_THREAD_FUNNELED); MPI is the
 * caller's, initialised before and finalised after psoup_comm_free. Sums are MPI's, made at rank 0, so that all
 * ranks have the same bits. MPI does not say who died: each rank keeps a connection to rank 0 beside it, over
 * TCP at a port of the system's choice, by which a rank that is gone is known while MPI waits for it. */
psoup_status psoup_comm_mpi_create(psoup_context *context, MPI_Comm parent, psoup_comm **out,
                                   psoup_error *error);

#ifdef __cplusplus
}
#endif
#endif
