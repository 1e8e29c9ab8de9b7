/* src/base/tensor.c: dtypes and shapes. */
#include "base/base.h"

#include <float.h>
#include <math.h>
#include <string.h>
#include <strings.h>

static const struct {
    const char *name;
    size_t size;
} dtypes[] = {
    [PSOUP_F32] = {"f32", 4},   [PSOUP_F16] = {"f16", 2}, [PSOUP_BF16] = {"bf16", 2},
    [PSOUP_F64] = {"f64", 8},   [PSOUP_I8] = {"i8", 1},   [PSOUP_U8] = {"u8", 1},
    [PSOUP_I16] = {"i16", 2},   [PSOUP_I32] = {"i32", 4}, [PSOUP_I64] = {"i64", 8},
    [PSOUP_BOOL] = {"bool", 1}, [PSOUP_F8_E4M3] = {"f8_e4m3", 1},
    [PSOUP_F8_E5M2] = {"f8_e5m2", 1}, [PSOUP_Q8_0] = {"q8_0", 0},
    [PSOUP_INT8] = {"int8", 0}, [PSOUP_NF4] = {"nf4", 0},
};
enum {
    DTYPES = sizeof dtypes / sizeof dtypes[0],
    PIECE = 1 << 14 /* bytes read at a time */
};

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
    if (name != NULL && strcasecmp(name, "f8_e4m3fn") == 0) {
        *out = PSOUP_F8_E4M3;
        return PSOUP_OK;
    }
    return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                       "dtype \"%s\": expected f32, f16, bf16, f64, i8, u8, i16, i32, i64, bool, "
                       "f8_e4m3, f8_e5m2, q8_0, int8 or nf4",
                       name != NULL ? name : "");
}

bool psoup__dtype_bytes(psoup_dtype dtype, size_t elements, size_t *bytes) {
    if (dtype == PSOUP_Q8_0)
        return elements % PSOUP__Q8_BLOCK == 0 &&
               psoup__multiply(elements / PSOUP__Q8_BLOCK, PSOUP__Q8_BYTES, bytes);
    return psoup__multiply(elements, psoup_dtype_size(dtype), bytes);
}

bool psoup__dtype_is_float(psoup_dtype dtype) {
    return dtype <= PSOUP_F64 || (dtype >= PSOUP_F8_E4M3 && dtype <= PSOUP_Q8_0);
}

float psoup__dtype_largest(psoup_dtype dtype) {
    const uint32_t bf16 = 0x7f7f7fff; /* just below half a step above the largest bf16 */
    float limit = FLT_MAX;
    switch (dtype) {
    case PSOUP_F16:
        return nextafterf(65520.0f, 0.0f);
    case PSOUP_F8_E4M3:
        return 464.0f; /* halfway from 448 to what would be 480: the even one is 448 */
    case PSOUP_F8_E5M2:
        return nextafterf(61440.0f, 0.0f);
    case PSOUP_Q8_0:
        return nextafterf(65520.0f * 127.0f, 0.0f); /* the scale is an f16 */
    case PSOUP_BF16:
        memcpy(&limit, &bf16, sizeof limit);
        return limit;
    default:
        return limit;
    }
}

void psoup__tensor_bytes(const psoup__tensor *tensor, size_t offset, size_t bytes, void *out) {
    const psoup__pull *pull = tensor->pull;
    if (tensor->data != NULL) {
        memcpy(out, (const char *)tensor->data + offset, bytes);
    } else if (bytes > 0 && pull->read(pull->user, pull->index, tensor->at + offset, bytes, out) != 0) {
        __atomic_store_n(pull->failed, 1, __ATOMIC_RELAXED);
        memset(out, 0, bytes);
    }
}

static void read_straight(psoup_context *context, const psoup__tensor *tensor, size_t at, size_t n,
                          float *out);

/* Elements at … of a tensor that is not in memory; q8_0 in whole blocks. */
static void read_pulled(psoup_context *context, const psoup__tensor *tensor, size_t at, size_t n,
                        float *out) {
    psoup__tensor piece = *tensor;
    const bool blocks = tensor->dtype == PSOUP_Q8_0;
    const size_t unit = blocks ? PSOUP__Q8_BLOCK : 1;
    const size_t size = blocks ? PSOUP__Q8_BYTES : psoup_dtype_size(tensor->dtype);
    unsigned char bytes[PIECE];
    piece.data = bytes;
    if (tensor->dtype == PSOUP_F32) {
        psoup__tensor_bytes(tensor, at * sizeof *out, n * sizeof *out, out);
        return;
    }
    while (n > 0) {
        size_t skip = at % unit, most = PIECE / size * unit - skip;
        size_t take = n < most ? n : most, units = (skip + take + unit - 1) / unit;
        psoup__tensor_bytes(tensor, at / unit * size, units * size, bytes);
        read_straight(context, &piece, skip, take, out);
        at += take;
        n -= take;
        out += take;
    }
}

/* Elements at … at + n − 1 of the data as it lies; q8_0 from and to the middle of blocks. */
static void read_straight(psoup_context *context, const psoup__tensor *tensor, size_t at, size_t n,
                          float *out) {
    const char *data = tensor->data;
    if (data == NULL) {
        read_pulled(context, tensor, at, n, out);
        return;
    }
    if (tensor->dtype != PSOUP_Q8_0) {
        psoup__to_f32(context, out, data + at * psoup_dtype_size(tensor->dtype), tensor->dtype, n);
        return;
    }
    while (n > 0) {
        const char *block = data + at / PSOUP__Q8_BLOCK * PSOUP__Q8_BYTES;
        size_t skip = at % PSOUP__Q8_BLOCK, take = n - n % PSOUP__Q8_BLOCK;
        if (skip == 0 && take > 0) {
            psoup__to_f32(context, out, block, PSOUP_Q8_0, take);
        } else {
            float whole[PSOUP__Q8_BLOCK];
            take = PSOUP__Q8_BLOCK - skip < n ? PSOUP__Q8_BLOCK - skip : n;
            psoup__to_f32(context, whole, block, PSOUP_Q8_0, PSOUP__Q8_BLOCK);
            memcpy(out, whole + skip, take * sizeof *out);
        }
        at += take;
        n -= take;
        out += take;
    }
}

size_t psoup__tensor_row(const psoup__tensor *tensor, size_t row) {
    if (tensor->heads <= 0)
        return row;
    size_t head = (size_t)tensor->shape[0] / (size_t)tensor->heads, half = head / 2;
    size_t within = row % head;
    return row - within + 2 * (within % half) + within / half;
}

void psoup__tensor_read(psoup_context *context, const psoup__tensor *tensor, size_t at, size_t n,
                        float *out) {
    if (tensor->heads <= 0) {
        read_straight(context, tensor, at, n, out);
        return;
    }
    size_t columns = tensor->rank == 2 ? (size_t)tensor->shape[1] : 1;
    while (n > 0) {
        size_t row = at / columns, column = at % columns;
        size_t take = columns - column < n ? columns - column : n;
        read_straight(context, tensor, psoup__tensor_row(tensor, row) * columns + column, take, out);
        at += take;
        n -= take;
        out += take;
    }
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
