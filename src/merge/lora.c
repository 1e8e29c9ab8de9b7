/* LoRA factors folded into a weight, in the caller's memory. */
#include "merge/merge.h"

#include <math.h>
#include <string.h>

#define BLOCK_FLOATS (1 << 20)

int64_t psoup__fold_block(int64_t out, int64_t in) {
    int64_t rows = in > 0 ? BLOCK_FLOATS / in : out;
    return rows < 1 ? 1 : rows < out ? rows : out > 0 ? out : 1;
}

void psoup__fold_into(psoup_context *context, float *acc, int64_t first, int64_t rows, int64_t in,
                      const psoup_lora_factors *factors, const double *weights, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const psoup_lora_factors *f = &factors[i];
        if (weights[i] == 0)
            continue;
        const psoup__gemm_args args = {
            .m = rows,
            .n = in,
            .k = f->rank,
            .c = acc,
            .c_stride = in,
            .accumulate = true,
            .a = f->b + first * f->rank,
            .a_row = f->rank,
            .a_col = 1,
            .alpha = (float)(weights[i] * (double)f->scale),
            .b = f->a,
            .b_dtype = PSOUP_F32,
            .b_row = in,
            .b_col = 1,
        };
        psoup__gemm(context, &args);
    }
}

void psoup__fold_rows(psoup_context *context, float *acc, const void *base, psoup_dtype dtype,
                      int64_t first, int64_t rows, int64_t in, const psoup_lora_factors *factors,
                      const double *weights, size_t count) {
    const char *from = (const char *)base + (size_t)first * (size_t)in * psoup_dtype_size(dtype);
    psoup__to_f32(context, acc, from, dtype, (size_t)rows * (size_t)in);
    psoup__fold_into(context, acc, first, rows, in, factors, weights, count);
}

psoup_status psoup__lora_check(const char *who, const psoup_context *context, int64_t out,
                               int64_t in, const psoup_lora_factors *factors,
                               const double *weights, size_t count, psoup_error *error) {
    size_t product;
    if (context == NULL || out < 1 || in < 1 || out > INT32_MAX || in > INT32_MAX ||
        !psoup__multiply((size_t)out, (size_t)in * sizeof(double), &product) ||
        (count > 0 && (factors == NULL || weights == NULL)))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: %lld × %lld: expected positive sizes below 2^31, a context, factors "
                           "and weights",
                           who, (long long)out, (long long)in);
    for (size_t i = 0; i < count; i++)
        if (factors[i].rank < 1 || !isfinite(factors[i].scale) ||
            (weights[i] != 0 && (factors[i].a == NULL || factors[i].b == NULL)))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: factors %zu: rank %d, scale %g; expected a positive rank, a "
                               "finite scale, a and b",
                               who, i, (int)factors[i].rank, (double)factors[i].scale);
    return psoup__merge_check_weights(weights, count, true, error);
}

psoup_status psoup_merge_fold(psoup_context *context, void *out, const void *base,
                              psoup_dtype dtype, int64_t out_features, int64_t in_features,
                              const psoup_lora_factors *factors, const double *weights,
                              size_t count, psoup_error *error) {
    psoup_status status;
    PSOUP__TRY(psoup__lora_check("psoup_merge_fold", context, out_features, in_features, factors,
                                 weights, count, error));
    if ((dtype != PSOUP_F32 && dtype != PSOUP_F16 && dtype != PSOUP_BF16) || out == NULL ||
        base == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merge_fold: dtype %s; expected out, base, and f32, f16 or bf16",
                           psoup_dtype_name(dtype));
    int64_t block = psoup__fold_block(out_features, in_features);
    float *acc = psoup__alloc(context, (size_t)block * (size_t)in_features, sizeof *acc, error);
    if (acc == NULL)
        return PSOUP_ERROR_MEMORY;
    for (int64_t first = 0; first < out_features; first += block) {
        int64_t rows = out_features - first < block ? out_features - first : block;
        size_t offset = (size_t)first * (size_t)in_features * psoup_dtype_size(dtype);
        psoup__fold_rows(context, acc, base, dtype, first, rows, in_features, factors, weights,
                         count);
        psoup__from_f32(context, (char *)out + offset, dtype, acc,
                        (size_t)rows * (size_t)in_features);
    }
    psoup__free(context, acc);
    return PSOUP_OK;
fail:
    return status;
}
