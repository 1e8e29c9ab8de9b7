/* cuda/device.cuh: what every kernel is written with. Under nvcc it is CUDA; under a C++ compiler it is
 * tests/host_driver, where each thread is a fiber and the same sources run on the CPU.
 *
 *   PSOUP__KERNEL(name, threads) { … a.x … }   a kernel that takes psoup__name_args as `a`
 *   PSOUP__KERNEL_AS(name, args, threads)      the same with another kernel's struct
 *   SHARED float tile[32];                     shared memory
 *   DYNAMIC_SHARED(float, tile);               shared memory whose size the launch gives
 *
 * Only whole warps call warp functions, and every thread of a block reaches every __syncthreads.
 */
#ifndef PSOUP__DEVICE_CUH
#define PSOUP__DEVICE_CUH

#ifdef __CUDACC__ /* of src/base/f8.h and policy.h */
#define PSOUP__EVERYWHERE static __device__ __forceinline__
#else
#define PSOUP__EVERYWHERE static inline
#endif
#include "kernels.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef __nv_bfloat16 bf16;
typedef __half f16;

#define PSOUP__KERNEL_AS(name, args, threads)                                                              \
    extern "C" __global__ void __launch_bounds__(threads, 1)                                                \
        psoup__##name(const __grid_constant__ psoup__##args##_args a)
#define SHARED __shared__
#define DYNAMIC_SHARED(type, name)                                                                         \
    extern __shared__ __align__(128) unsigned char psoup__dynamic[];                                       \
    type *const name = reinterpret_cast<type *>(psoup__dynamic)

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

/* 2^x, a few units in the last place; results below 2⁻¹²⁶ are 0. */
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 16 bytes that are used once: read past the first cache (also where the kernel writes them), and written so
 * that they are the first to leave the second. */
__device__ __forceinline__ uint4 load_once(const char *p) {
    uint4 v;
    asm("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p));
    return v;
}
__device__ __forceinline__ void store_once(char *p, uint4 v) { __stcs(reinterpret_cast<uint4 *>(p), v); }

#else
#include "host_device.h"
#endif

#define PSOUP__KERNEL(name, threads) PSOUP__KERNEL_AS(name, name, threads)

/* ---- vectors: 16 bytes of memory at a time ----------------------------------------------------------- */

template <typename T> struct alignas(16) pack { T x[16 / sizeof(T)]; };

template <typename T> __device__ __forceinline__ pack<T> load_pack(const T *p) {
    return *reinterpret_cast<const pack<T> *>(p);
}

template <typename T> __device__ __forceinline__ void store_pack(T *p, const pack<T> &v) {
    *reinterpret_cast<pack<T> *>(p) = v;
}

__device__ __forceinline__ bool aligned16(const void *p) {
    return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

/* Elements j … j + 3 of a row of `width`: at once where the row is `whole`, a multiple of 4 wide and aligned;
 * else one by one, those beyond the end as 0. */
__device__ __forceinline__ pack<float> load4(const float *row, int j, int width, bool whole) {
    if (whole)
        return load_pack(row + j);
    pack<float> v;
#pragma unroll
    for (int c = 0; c < 4; c++)
        v.x[c] = c < width - j ? row[j + c] : 0;
    return v;
}

__device__ __forceinline__ void store4(float *row, int j, int width, bool whole, const pack<float> &v) {
    if (whole) {
        store_pack(row + j, v);
        return;
    }
#pragma unroll
    for (int c = 0; c < 4; c++)
        if (c < width - j)
            row[j + c] = v.x[c];
}

/* A row of at most N · THREADS · 4 elements, spread over a block; all loads are on their way before the first
 * is waited for. Beyond the row's end lie zeros. */
template <int THREADS, bool WHOLE, int N>
__device__ __forceinline__ void load_row(pack<float> (&v)[N], const float *row, int width) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int j = (i * THREADS + (int)threadIdx.x) * 4;
        v[i] = pack<float>{};
        if (j < width)
            v[i] = load4(row, j, width, WHOLE);
    }
}

template <int THREADS, bool WHOLE, int N>
__device__ __forceinline__ void store_row(float *row, int width, const pack<float> (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int j = (i * THREADS + (int)threadIdx.x) * 4;
        if (j < width)
            store4(row, j, width, WHOLE, v[i]);
    }
}

/* A block's sums over rows: written to its row of sums, or added there by a block that is alone. */
template <int THREADS, bool WHOLE, int N>
__device__ __forceinline__ void put_sums(float *row, int width, pack<float> (&sums)[N]) {
    if (gridDim.x == 1) {
        pack<float> before[N];
        load_row<THREADS, WHOLE>(before, row, width);
#pragma unroll
        for (int i = 0; i < N * 4; i++)
            sums[i / 4].x[i % 4] += before[i / 4].x[i % 4];
    }
    store_row<THREADS, WHOLE>(row, width, sums);
}

/* ---- sums ----------------------------------------------------------------------------------------------- */

template <typename T> __device__ __forceinline__ T warp_sum(T x) {
    for (int mask = 16; mask > 0; mask >>= 1)
        x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int mask = 16; mask > 0; mask >>= 1)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
    return x;
}

/* The sum over a block of whole warps, in every thread; the same order every time. */
template <int THREADS> __device__ __forceinline__ float block_sum(float x) {
    SHARED float part[THREADS / 32];
    x = warp_sum(x);
    __syncthreads(); /* whoever still reads the last call's */
    if (threadIdx.x % 32 == 0)
        part[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < THREADS / 32; i++)
        sum += part[i];
    return sum;
}

#endif
