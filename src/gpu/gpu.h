/* src/gpu: the ops on NVIDIA GPUs, by the kernels of cuda/ and cuBLASLt. */
#ifndef PSOUP__GPU_H
#define PSOUP__GPU_H

#include "ops.h"

/* The backend of the context's device ("cuda:N"), on the context's stream or one of its own. Ops go into
 * the stream and return; what fails there is told, once, by the next op that waits, `read` or sum_squares, or by
 * `replay`. freed by (*out)->ops->free */
psoup_status psoup__gpu_create(psoup_context *context, psoup__backend **out, psoup_error *error);

#endif
