/* cuda/kernels.h: every kernel, by name, with the struct it takes: what src/gpu fills and cuda/ reads.
 *
 * A kernel takes one struct by value, of at most 4 KiB, and without padding: recorded steps are compared byte for
 * byte (src/gpu/record.c), so what would be padding is a field `spare`, which is 0. Pointers in it are device memory. Names of fields and
 * shapes are those of src/ops.h, where each op is described. X(kernel, args): psoup__args_args is its struct.
 */
#ifndef PSOUP__KERNELS_H
#define PSOUP__KERNELS_H

#include "interpolate.h" /* merges are not recorded */
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic error "-Wpadded"
#endif
#include "layer.h"
#include "blocks.h"
#include "rows.h"
#include "attention.h"
#include "attention_decode.h"
#include "linear_mix.h"
#include "loss.h"
#include "policy.h"
#include "sample.h"
#include "advance.h"
#include "adamw.h"
#include "upload.h"
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC diagnostic pop
#endif

#define PSOUP__KERNELS(X) \
    PSOUP__LAYER_KERNELS(X) \
    PSOUP__BLOCKS_KERNELS(X) \
    PSOUP__ROWS_KERNELS(X) \
    PSOUP__ATTENTION_KERNELS(X) \
    PSOUP__ATTENTION_DECODE_KERNELS(X) \
    PSOUP__LINEAR_MIX_KERNELS(X) \
    PSOUP__LOSS_KERNELS(X) \
    PSOUP__POLICY_KERNELS(X) \
    PSOUP__SAMPLE_KERNELS(X) \
    PSOUP__ADVANCE_KERNELS(X) \
    PSOUP__ADAMW_KERNELS(X) \
    PSOUP__UPLOAD_KERNELS(X) \
    PSOUP__INTERPOLATE_KERNELS(X)

typedef enum psoup__kernel {
#define PSOUP__KERNEL_ID(name, args) PSOUP__KERNEL_##name,
    PSOUP__KERNELS(PSOUP__KERNEL_ID)
#undef PSOUP__KERNEL_ID
    PSOUP__KERNEL_COUNT
} psoup__kernel;

#endif
