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

enum {
    PSOUP__BLOCKS_FEW = 8,   /* rows of x, */
    PSOUP__BLOCKS_MORE = 16, /* or up to so many */
    PSOUP__BLOCKS_OUTS = 32  /* rows of W to a block */
};

/* y = (y +) x Wᵀ, W [out, in] in blocks whose values are rounded to x's dtype. in is a multiple of 64. */
typedef struct psoup__blocks_few_args {
    float *y;             /* [rows, out] */
    const void *x;        /* [rows, in], of 16 bytes' alignment, as are codes */
    const uint8_t *codes;
    const float *scales;
    int32_t rows, in, out;
    int32_t add;          /* to y, or overwrite it */
    float level[16];      /* of nf4 */
} psoup__blocks_few_args;

#define PSOUP__BLOCKS_KERNELS(X) \
    X(blocks_f32, blocks) \
    X(blocks_f16, blocks) \
    X(blocks_bf16, blocks) \
    X(int8_few_f16, blocks_few) \
    X(int8_few_bf16, blocks_few) \
    X(int8_more_f16, blocks_few) \
    X(int8_more_bf16, blocks_few) \
    X(nf4_few_f16, blocks_few) \
    X(nf4_few_bf16, blocks_few) \
    X(nf4_more_f16, blocks_few) \
    X(nf4_more_bf16, blocks_few)

#endif
