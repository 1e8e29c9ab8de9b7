/* psoup/comm.h: several processes, on one machine or many, that train one run together.
 *
 * Every process (a rank) calls the same trainer with the same model, data and options and with a
 * `psoup_comm` in them. Rows are shared out, gradients are summed, and all ranks take the same steps: the
 * same update as one process makes on the whole batch, to the order of its sums. Options keep their
 * meaning: batch_size is the run's, not a rank's.
 */
#ifndef PSOUP_COMM_H
#define PSOUP_COMM_H

#include "psoup/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How the ranks talk: the library's own, below, or the caller's. Every rank makes the same calls in the same
 * order, each from one thread at a time. A call that fails on one rank fails on all sooner or later; the
 * error names the rank that is gone, and nothing works after it. */
typedef struct psoup_comm {
    size_t size;
    void *user;
    int32_t rank, world; /* 0 … world − 1 */
    /* x[i] ← Σ over ranks of x[i], PSOUP_F32 or PSOUP_F64, with the same bits on every rank. n == 0 waits for
     * all: a barrier. */
    psoup_status (*sum)(void *user, void *x /* [n] */, size_t n, psoup_dtype dtype, psoup_error *error);
    /* The same of memory on the context's GPU, complete when it returns; NULL: it goes through the host. */
    psoup_status (*sum_device)(void *user, float *x /* device [n] */, size_t n, psoup_error *error);
    /* Rank 0's bytes to all others. */
    psoup_status (*broadcast)(void *user, void *data, size_t bytes, psoup_error *error);
    /* Whether a rank is known to be gone, without waiting. */
    psoup_status (*failed)(void *user, psoup_error *error);
    /* Tells the others that this rank goes, and why; they fail with that line. */
    void (*abort)(void *user, const char *reason);
    void (*free)(void *user); /* NULL, or what psoup_comm_free calls */
} psoup_comm;

/* Where a rank finds the others. */
typedef struct psoup_comm_options {
    size_t size;
    int32_t rank, world;
    int32_t local_rank, local_world; /* of the ranks on this machine; local_world 0: not known */
    int32_t port;
    int32_t timeout;  /* seconds in which all have to be there */
    int32_t listener; /* rank 0: a socket that listens already, taken over also on failure; −1: none */
    int32_t reserved; /* 0 */
    char address[256]; /* rank 0's host name or address */
} psoup_comm_options;
#define PSOUP_COMM_OPTIONS_INIT                                                                    \
    {.size = sizeof(psoup_comm_options), .world = 1, .port = 29500, .timeout = 600, .listener = -1}

/* The value of an environment variable, or NULL. */
typedef const char *(*psoup_variable_fn)(void *user, const char *name);
/* Who this process is, by the variables of what launched it, the first of these that is there:
 *   RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, as torchrun sets them. Where
 *     its agent holds that port itself (TORCHELASTIC_USE_AGENT_STORE=True), the next one is taken
 *   SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID of a task that srun started (SLURM_STEP_ID or
 *     SLURM_LAUNCH_NODE_IPADDR is set: a batch script itself is no rank). The address is the first host of
 *     SLURM_STEP_NODELIST or SLURM_JOB_NODELIST, else SLURM_LAUNCH_NODE_IPADDR; the port is of the job and
 *     step: 10000 + (SLURM_JOB_ID + 97 SLURM_STEP_ID) mod 20000
 *   OMPI_COMM_WORLD_RANK, … of Open MPI's mpirun; PMI_RANK, PMI_SIZE of MPICH's. Ranks of one machine need no
 *     address
 * MASTER_ADDR and MASTER_PORT decide wherever they are set. Without any of them *out is world 1. */
psoup_status psoup_comm_launch(psoup_variable_fn variable, void *user, psoup_comm_options *out,
                               psoup_error *error);

/* Over TCP: rank 0 listens at address:port, the others connect to it. Sums are made by rank 0, in f64 and in the
 * order of the ranks. Anyone who reaches the port may come first: it is for networks that are trusted, as
 * torch's and MPI's are; an address of this machine alone (127.0.0.1) is listened at alone. */
psoup_status psoup_comm_tcp_create(psoup_context *context, const psoup_comm_options *options,
                                   psoup_comm **out, psoup_error *error);
/* Adds up in the memory of GPUs, one to a rank, by NCCL (libnccl.so.2, opened by this call); the rest goes by `host`,
 * over which the ranks meet here, and which is borrowed until *out is freed. The context is of the rank's GPU. Where a
 * rank cannot begin, no rank does, and all return one status: PSOUP_ERROR_UNSUPPORTED where one has no NCCL. `host` is
 * as good as before then, and sums can go through the host's memory. A rank that is gone is known by `host` too, and then ends NCCL's work here. */
psoup_status psoup_comm_nccl_create(psoup_context *context, const psoup_comm *host, psoup_comm **out,
                                    psoup_error *error);
/* Frees what one of this header's functions made; takes NULL. */
void psoup_comm_free(psoup_comm *comm);

#ifdef __cplusplus
}
#endif
#endif
