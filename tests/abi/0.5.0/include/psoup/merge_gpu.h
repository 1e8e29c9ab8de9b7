/* psoup/merge_gpu.h: merging on NVIDIA GPUs, in the caller's device memory. In libpsoup only: libpsoup-merge
 * knows no GPU, and takes a table of the caller's instead (psoup_merge_set_device). */
#ifndef PSOUP_MERGE_GPU_H
#define PSOUP_MERGE_GPU_H

#include "psoup/merge.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The GPU as the place of views: while it lives, psoup_merge_views, psoup_merge_fold_view and psoup_merge_copy
 * of its context take views whose place is PSOUP_MERGE_DEVICE: pointers of the device's primary context
 * (that of CUDA's runtime, so also PyTorch's and llama.cpp's), at multiples of their element's size.
 *   - With a stream in the context's options the work goes into it, behind what is there and before what the
 *     caller puts there next, and calls return at once; only a copy to the host, or from rows of the host
 *     that lie apart, waits. Sums and folds may be captured in a graph where at most 32 weights are not 0.
 *     Without a stream a call waits for all that the device is doing, and has finished when it returns.
 *   - Sums have the host's bits, folds those of a host with fused multiply-adds ("avx2", "avx512", "neon";
 *     "generic" rounds each product too); of a NaN only that it is one. The factors' numbers are on the
 *     device, their structs and the weights on the host.
 *   - Nothing is allocated after the first call with so many inputs. Calls from several threads take turns;
 *     the thread's current CUDA context stays what it was.
 *   - What goes wrong in the stream may be told by a later call. */
typedef struct psoup_gpu_merge psoup_gpu_merge;

/* Opens the context's device ("cuda:N") and gives it to the context, instead of a table that it has.
 * "no GPU: …" says what is missing. To be freed before the context; neither while another thread uses it. */
psoup_status psoup_gpu_merge_create(psoup_context *context, psoup_gpu_merge **out, psoup_error *error);
/* Waits for the stream, and takes the device away from the context. */
void psoup_gpu_merge_free(psoup_gpu_merge *merge);

#ifdef __cplusplus
}
#endif
#endif
