/* One run in several processes, as mpirun, torchrun or Slurm launches them; see docs/cluster.md. */
#ifndef LAUNCH_H
#define LAUNCH_H

#include "cli.h"

/* Of the commands that train, for their --help. */
#define LAUNCH_HELP                                                                                \
    "\nStarted in several processes by torchrun, srun or mpirun, these train one run together, each on its\n" \
    "share of every step's rows, and rank 0 writes the results: see docs/cluster.md.\n"

/* Looks who this process is; before, and alone, it is rank 0 of 1. */
psoup_status launch_look(psoup_error *error);
int32_t launch_rank(void);
int32_t launch_world(void);
int32_t launch_neighbours(void); /* ranks on this machine, with this one */
/* What "cuda" and 0 threads stand for in this process. */
enum { LAUNCH_DEVICE = 32 };
const char *launch_device(const char *device, char out[LAUNCH_DEVICE]);
int32_t launch_threads(int32_t threads);
/* The other processes; NULL where there are none. Free with psoup_comm_free. */
psoup_status launch_connect(psoup_context *context, psoup_comm **out, psoup_error *error);
/* m->comm, but that GPUs talk by NCCL where they can. */
psoup_status launch_join_gpus(cli_model *m, psoup_error *error);
/* Of a rank that failed where the others may not have: tells them why. Returns status. */
psoup_status launch_tell(const psoup_comm *comm, psoup_status status, const psoup_error *error);
/* All ranks call it, each with how it fared. Where one failed all return its error, of several the first one's, and
 * rank 0 alone says it. */
psoup_status launch_agree(const psoup_comm *comm, psoup_status status, psoup_error *error);
bool launch_agreed(void); /* on an error: all ranks know it */
/* After training, when rank 0 has saved: all wait until that is done, or hear why it was not. */
psoup_status launch_finish(const psoup_comm *comm, psoup_status status, psoup_error *error);
/* Before the program ends; returns its exit status. */
int launch_end(int status);

#endif
