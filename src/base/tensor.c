/* src/base/tensor.c: dtypes and shapes. */
#include "base/base.h"

#include <strings.h>

static const struct {
    const char *name;
    size_t size;
} dtypes[] = {
    [PSOUP_F32] = {"f32", 4},   [PSOUP_F16] = {"f16", 2}, [PSOUP_BF16] = {"bf16", 2},
    [PSOUP_F64] = {"f64", 8},   [PSOUP_I8] = {"i8", 1},   [PSOUP_U8] = {"u8", 1},
    [PSOUP_I16] = {"i16", 2},   [PSOUP_I32] = {"i32", 4}, [PSOUP_I64] = {"i64", 8},
    [PSOUP_BOOL] = {"bool", 1},
};
enum { DTYPES = sizeof dtypes / sizeof dtypes[0] };

size_t psoup_dtype_size(psoup_dtype dtype) {
    return (unsigned)dtype < DTYPES ? dtypes[dtype].size : 0;
}

const char *psoup_dtype_name(psoup_dtype dtype) {
    return (unsigned)dtype < DTYPES ? dtypes[dtype].name : "?";
}

psoup_status psoup_dtype_parse(const char *name, psoup_dtype *out, psoup_error *error) {
    for (unsigned i = 0; name != NULL && i < DTYPES; i++)
        if (strcasecmp(name, dtypes[i].name) == 0) {
            *out = (psoup_dtype)i;
            return PSOUP_OK;
        }
    return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                       "dtype \"%s\": expected f32, f16, bf16, f64, i8, u8, i16, i32, i64 or bool",
                       name != NULL ? name : "");
}

bool psoup__tensor_elements(const psoup__tensor *tensor, size_t *elements) {
    if (tensor->rank < 0 || tensor->rank > PSOUP__MAX_RANK)
        return false;
    size_t product = 1, nonzero = 1; /* [huge, huge, 0] overflows too, in any order */
    for (int i = 0; i < tensor->rank; i++) {
        size_t extent = (size_t)tensor->shape[i];
        if (tensor->shape[i] < 0 || !psoup__multiply(nonzero, extent > 0 ? extent : 1, &nonzero))
            return false;
        product *= extent;
    }
    *elements = product;
    return true;
}
