/* Weights in blocks: they stay so in the device's memory. Few rows are multiplied with them as they are; before other
 * products they are made a matrix of the dtype that it is taken in, in a room that all weights of the model share. */
#include "gpu/internal.h"

#include <string.h>

psoup_status psoup__gpu_reserve_matrix(psoup__gpu *gpu, const psoup__weight *weight, psoup_error *error) {
    size_t bytes = 0;
    if (!psoup__dtype_is_blocks(weight->dtype))
        return PSOUP_OK;
    if (!psoup__multiply((size_t)weight->out, (size_t)weight->in, &bytes) ||
        !psoup__multiply(bytes, psoup_dtype_size(weight->values), &bytes))
        return psoup__out_of_memory(error, SIZE_MAX);
    if (bytes <= gpu->matrix_bytes)
        return PSOUP_OK;
    const psoup__ops *ops = gpu->base.ops;
    ops->release(&gpu->base, (void *)(uintptr_t)gpu->matrix);
    gpu->matrix = psoup__gpu_address(ops->alloc(&gpu->base, bytes, 1, error));
    gpu->matrix_bytes = gpu->matrix ? bytes : 0;
    return gpu->matrix ? PSOUP_OK : PSOUP_ERROR_MEMORY;
}

const void *psoup__gpu_matrix(psoup__gpu *gpu, const psoup__weight *weight) {
    const size_t n = (size_t)weight->out * (size_t)weight->in;
    if (!psoup__dtype_is_blocks(weight->dtype))
        return weight->data;
    if (n * psoup_dtype_size(weight->values) > gpu->matrix_bytes && gpu->failed.status == PSOUP_OK)
        psoup__fail(&gpu->failed, PSOUP_ERROR_STATE, "GPU: weights of %s were not packed",
                    psoup_dtype_name(weight->dtype));
    if (gpu->failed.status != PSOUP_OK)
        return NULL;
    psoup__blocks_args args = {.out = (void *)(uintptr_t)gpu->matrix, .codes = weight->data, .scales = weight->scales,
                               .n = n, .int8 = weight->dtype == PSOUP_INT8};
    memcpy(args.level, psoup__nf4_level, sizeof args.level);
    const psoup__kernel kernel = weight->values == PSOUP_BF16  ? PSOUP__KERNEL_blocks_bf16
                                 : weight->values == PSOUP_F16 ? PSOUP__KERNEL_blocks_f16
                                                               : PSOUP__KERNEL_blocks_f32;
    const psoup__cast cast = gpu->cast; /* the kernel writes no activation */
    psoup__gpu_launch(gpu, kernel, psoup__gpu_flat(gpu, n, 8), &args);
    gpu->cast = cast;
    return args.out;
}

bool psoup__gpu_multiply_blocks(psoup__gpu *gpu, const psoup__weight *weight, float *y, const void *x, int32_t rows,
                                bool add) {
    static const psoup__kernel kernels[2][2][2] = {
        {{PSOUP__KERNEL_nf4_few_f16, PSOUP__KERNEL_nf4_few_bf16},
         {PSOUP__KERNEL_nf4_more_f16, PSOUP__KERNEL_nf4_more_bf16}},
        {{PSOUP__KERNEL_int8_few_f16, PSOUP__KERNEL_int8_few_bf16},
         {PSOUP__KERNEL_int8_more_f16, PSOUP__KERNEL_int8_more_bf16}}};
    if (!psoup__dtype_is_blocks(weight->dtype) || weight->values == PSOUP_F32 || rows > PSOUP__BLOCKS_MORE ||
        weight->in % PSOUP__BLOCK != 0)
        return false;
    psoup__blocks_few_args args = {.y = y, .x = x, .codes = weight->data, .scales = weight->scales, .rows = rows,
                                   .in = weight->in, .out = weight->out, .add = add};
    memcpy(args.level, psoup__nf4_level, sizeof args.level);
    const psoup__grid grid = {(unsigned)((weight->out + PSOUP__BLOCKS_OUTS - 1) / PSOUP__BLOCKS_OUTS), 1, 1,
                              PSOUP__FLAT_THREADS, 0};
    const psoup__cast cast = gpu->cast; /* of x; whoever asks for y takes care of y */
    psoup__gpu_launch(gpu, kernels[weight->dtype == PSOUP_INT8][rows > PSOUP__BLOCKS_FEW][weight->values == PSOUP_BF16],
                      grid, &args);
    gpu->cast = cast;
    return true;
}
