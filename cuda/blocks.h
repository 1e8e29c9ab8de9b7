/* cuda/blocks.h: weights in blocks of int8 or nf4 (src/base/base.h, blocks.c). See kernels.h. */
#ifndef PSOUP__CUDA_BLOCKS_H
#define PSOUP__CUDA_BLOCKS_H

#include <stdint.h>

/* out[n] = the blocks' values, rounded. */
typedef struct psoup__blocks_args {
    void *out;            /* of 16 bytes' alignment, as are codes */
    const uint8_t *codes;
    const float *scales;
    uint64_t n;
    float level[16];      /* of nf4 */
    int32_t int8, spare;
} psoup__blocks_args;

#define PSOUP__BLOCKS_KERNELS(X) \
    X(blocks_f32, blocks) \
    X(blocks_f16, blocks) \
    X(blocks_bf16, blocks)

#endif
