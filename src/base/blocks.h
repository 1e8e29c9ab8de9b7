/* src/base/blocks.h: between blocks.c, gemm.c and blocks_kernel.c, which is compiled once per instruction set. */
#ifndef PSOUP__BLOCKS_H
#define PSOUP__BLOCKS_H

#include "base/base.h"

typedef struct psoup__block_kernels {
    /* See base.h. `n` elements from the beginning of a block on. */
    void (*write)(psoup_dtype dtype, const float *in, size_t n, uint8_t *codes, float *scales);
    void (*read)(const psoup__blocks *blocks, size_t at, size_t n, float *out);
    /* Copies depths [k0, k0 + depth) of columns [j0, j0 + columns) of B as f32 to a panel of gemm.h, with zeros in
     * the columns that fill it up. */
    void (*pack)(float *out /* [depth, whole vectors] */, const psoup__gemm_args *args, int64_t k0, int64_t depth,
                 int64_t j0, int64_t columns);
    /* C's columns j0, … of one whole panel for few rows, straight from the codes: over all depths, from 0 or C. */
    int64_t few; /* rows at most */
    bool (*is_whole)(const psoup__gemm_args *args); /* whether it can read such a B */
    void (*multiply)(const psoup__gemm_args *args, float *const *c /* [rows] */, const float *const *a /* [rows] */,
                     int64_t rows, int64_t j0);
} psoup__block_kernels;

extern const psoup__block_kernels psoup__block_kernels_generic;
#if defined(__x86_64__)
extern const psoup__block_kernels psoup__block_kernels_avx2;
extern const psoup__block_kernels psoup__block_kernels_avx512;
#endif
const psoup__block_kernels *psoup__block_kernels_of(const psoup_context *context);

#endif
