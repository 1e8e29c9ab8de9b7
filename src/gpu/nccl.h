/* src/gpu/nccl.h: as much of NCCL as sums need, written down from its header (nccl.h, 2.14 and later) and opened at
 * run time; only nccl.c knows it. */
#ifndef PSOUP__GPU_NCCL_H
#define PSOUP__GPU_NCCL_H

#include <limits.h>
#include <stddef.h>

enum {
    PSOUP__NCCL_SUCCESS = 0,     /* ncclSuccess */
    PSOUP__NCCL_IN_PROGRESS = 7, /* ncclInProgress */
    PSOUP__NCCL_F32 = 7,         /* ncclFloat32 */
    PSOUP__NCCL_SUM = 0,         /* ncclSum */
    PSOUP__NCCL_ID = 128         /* NCCL_UNIQUE_ID_BYTES */
};
typedef struct psoup__nccl_id {
    char bytes[PSOUP__NCCL_ID];
} psoup__nccl_id;
/* ncclConfig_t as 2.14 had it, which later versions take: what they have added is told by `size` to be unset. */
typedef struct psoup__nccl_config {
    size_t size;
    unsigned magic, version;
    int blocking, unset;
} psoup__nccl_config;
#define PSOUP__NCCL_CONFIG                                                                                 \
    {sizeof(psoup__nccl_config), 0xcafebeef, 21400, 0, INT_MIN} /* calls return at once */

/* X(what it is called here, the symbol, its parameters) */
#define PSOUP__NCCL_CALLS(X)                                                                               \
    X(unique_id, ncclGetUniqueId, (psoup__nccl_id * id))                                                   \
    X(init, ncclCommInitRankConfig,                                                                        \
      (void **comm, int world, psoup__nccl_id id, int rank, psoup__nccl_config *config))                   \
    X(all_reduce, ncclAllReduce,                                                                           \
      (const void *in, void *out, size_t n, int dtype, int op, void *comm, void *stream))                  \
    X(async_error, ncclCommGetAsyncError, (void *comm, int *state))                                        \
    X(finalize, ncclCommFinalize, (void *comm))                                                            \
    X(destroy, ncclCommDestroy, (void *comm))                                                              \
    X(abort, ncclCommAbort, (void *comm))

#endif
