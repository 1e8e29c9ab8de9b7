/* cuda/dtypes.cuh: elements of every dtype of floats, with the bits that src/base/convert.c gives them (a NaN
 * stays a NaN; its sign and payload are CUDA's). */
#ifndef PSOUP__DTYPES_CUH
#define PSOUP__DTYPES_CUH

#include "device.cuh"

#include "../src/base/f8.h"

struct e4m3 { uint8_t bits; };
struct e5m2 { uint8_t bits; };
struct q8_0 { uint8_t bytes[34]; }; /* of 32 elements */

__device__ __forceinline__ float to_float(double x) { return (float)x; }
__device__ __forceinline__ float to_float(e4m3 x) { return psoup__float_of(psoup__f32_of_e4m3(x.bits)); }
__device__ __forceinline__ float to_float(e5m2 x) { return psoup__float_of(psoup__f32_of_e5m2(x.bits)); }
template <> __device__ __forceinline__ double from_float<double>(float x) { return x; }
template <> __device__ __forceinline__ e4m3 from_float<e4m3>(float x) {
    return e4m3{psoup__e4m3_of_f32(psoup__bits_of(x))};
}
template <> __device__ __forceinline__ e5m2 from_float<e5m2>(float x) {
    return e5m2{psoup__e5m2_of_f32(psoup__bits_of(x))};
}

/* Calls what it is given with a value of the dtype's type. */
template <typename Call> __device__ __forceinline__ void with_dtype(int32_t dtype, Call call) {
    switch (dtype) {
    case PSOUP_F32: call(float()); break;
    case PSOUP_F16: call(f16()); break;
    case PSOUP_BF16: call(bf16()); break;
    case PSOUP_F64: call(double()); break;
    case PSOUP_F8_E4M3: call(e4m3()); break;
    case PSOUP_F8_E5M2: call(e5m2()); break;
    default: call(q8_0()); break;
    }
}

/* The element in a column of a row. */
template <typename T> __device__ __forceinline__ float read_element(T, const char *row, uint64_t column) {
    return to_float(reinterpret_cast<const T *>(row)[column]);
}
__device__ __forceinline__ float read_element(q8_0, const char *row, uint64_t column) {
    const char *block = row + column / 32 * sizeof(q8_0);
    const float d = to_float(*reinterpret_cast<const f16 *>(block));
    return __fmul_rn((float)(signed char)block[2 + column % 32], d);
}

/* What a block of q8_0 multiplies by, from the largest magnitude in it: ggml's quantize_row_q8_0_ref. */
struct q8_scale {
    float inverse; /* 0: all are written as 0 */
    f16 d;
    /* Of the magnitude's bits: a NaN's are above all. */
    __device__ __forceinline__ explicit q8_scale(uint32_t most) {
        const float scale = psoup__float_of(most) / 127.0f;
        const bool finite = most < 0x7f800000u;
        inverse = finite && scale >= 0x1p-126f ? 1.0f / scale : 0.0f; /* that of less overflows */
        d = from_float<f16>(finite ? scale : psoup__float_of(0x7fc00000u));
    }
    __device__ __forceinline__ char operator()(float x) const { /* halves away from zero */
        if (inverse == 0)
            return 0;
        const float v = __fmul_rn(x, inverse);
        const int whole = (int)v;
        const float rest = v - (float)whole; /* exact */
        return (char)(whole + (rest >= 0.5f) - (rest <= -0.5f));
    }
};

__device__ __forceinline__ uint32_t magnitude_of(float x) { return psoup__bits_of(x) & 0x7fffffffu; }

/* The largest over groups of neighbouring lanes. */
__device__ __forceinline__ uint32_t largest(uint32_t x, int lanes) {
    for (int mask = lanes / 2; mask > 0; mask >>= 1)
        x = max(x, __shfl_xor_sync(0xffffffffu, x, mask));
    return x;
}

#endif
