/* What the calls on LoRA factors in the caller's memory have in common. */
#include "blend/blend.h"

#include <math.h>
#include <string.h>

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

