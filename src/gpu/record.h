/* src/gpu/record.h: steps that repeat; see ops.h, record and replay. */
#ifndef PSOUP__RECORD_H
#define PSOUP__RECORD_H

#include "../../cuda/kernels.h"
#include "gpu/blas.h"
#include "gpu/driver.h"
#include "ops.h"

enum { PSOUP__GRAPHS = 8 };

typedef struct psoup__grid {
    unsigned x, y, z;    /* blocks */
    unsigned threads;    /* of a block */
    unsigned shared;     /* bytes of dynamic shared memory */
} psoup__grid;

typedef struct psoup__graph {
    psoup__buffer notes;
    psoup__cu_graph_exec exec;
    uint64_t used; /* when last */
} psoup__graph;

typedef struct psoup__record {
    bool on;
    bool refused; /* something was asked that no graph can hold */
    psoup__buffer notes;
    psoup__graph graphs[PSOUP__GRAPHS];
    uint64_t clock;
} psoup__record;

void psoup__gpu_record(psoup__backend *be);
psoup_status psoup__gpu_replay(psoup__backend *be, int32_t times, psoup_error *error);

/* While recording each of these notes what it is given and returns true: then nothing is to be done. */
struct psoup__gpu;
bool psoup__record_kernel(struct psoup__gpu *gpu, psoup__kernel kernel, psoup__grid grid, const void *args,
                          size_t bytes);
bool psoup__record_product(struct psoup__gpu *gpu, const psoup__product *product, float *c, const void *a,
                           const void *b);
bool psoup__record_copy(struct psoup__gpu *gpu, psoup__cu_pointer out, psoup__cu_pointer in /* 0: zeros */,
                        size_t bytes);
bool psoup__record_refuse(struct psoup__gpu *gpu); /* data from the host: a graph would keep it for ever */
void psoup__record_free(struct psoup__gpu *gpu);

#endif
