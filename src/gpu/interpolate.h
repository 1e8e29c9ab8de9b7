/* Sums, folds and copies of views (psoup/merge.h) put into a GPU's stream. */
#ifndef PSOUP__GPU_INTERPOLATE_H
#define PSOUP__GPU_INTERPOLATE_H

#include "gpu/internal.h"
#include "psoup/merge.h"

/* Host memory for more terms than travel with a kernel, kept from call to call. */
typedef struct psoup__terms {
    void *memory;
    size_t bytes;
} psoup__terms;

/* Views and weights are those that the functions of psoup/merge.h have checked. */
psoup_status psoup__gpu_sum(psoup__gpu *gpu, psoup__terms *room, const psoup_merge_view *out,
                            const psoup_merge_view *in, const double *weights, size_t count,
                            psoup_error *error);
psoup_status psoup__gpu_fold(psoup__gpu *gpu, psoup__terms *room, const psoup_merge_view *out,
                             const psoup_merge_view *base, int64_t first_row, int64_t first_column,
                             int64_t in_features, const psoup_lora_factors *factors, const double *weights,
                             size_t count, psoup_error *error);
psoup_status psoup__gpu_copy_view(psoup__gpu *gpu, const psoup_merge_view *out, const psoup_merge_view *in,
                                  psoup_error *error);

#endif
