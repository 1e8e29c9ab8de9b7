/* tests/host_driver/host_device.h: CUDA's language for cuda/device.cuh, on the CPU. Each thread is a fiber;
 * a warp function or a __syncthreads is a switch back to the scheduler in fibers.cc. It stands for the meaning
 * of a kernel: for its barriers, its indices and its arithmetic, not for timing, coalescing or the memory model.
 *
 * Caught on the way, each ending the process with a line: a warp function that not all lanes of its mask reach,
 * a __syncthreads that some live thread misses, and (under ASan) any access beyond an allocation.
 */
#ifndef PSOUP__HOST_DEVICE_H
#define PSOUP__HOST_DEVICE_H

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __device__
#define __forceinline__ inline
#define __restrict__
#define SHARED static /* blocks run one after another */
#define DYNAMIC_SHARED(type, name) type *const name = reinterpret_cast<type *>(host::shared)

using std::max;
using std::min;

namespace host {
struct index {
    unsigned x, y, z;
};
struct fiber {
    void *stack_pointer;
    index thread;
    int lane, warp;
    int state;
    unsigned mask; /* of the warp function it waits in */
    int parity;    /* which of two slots it exchanges through next */
};
extern fiber *now; /* the thread that runs */
extern index block, grid, block_size;
extern char *shared;

void wait_block();
void wait_warp(unsigned mask);
/* Slot `parity` of a lane of the running warp: 64 bytes. */
void *slot(int parity, int lane);

typedef void (*kernel)(const void *args);
struct registration {
    registration(const char *name, size_t args_size, unsigned most_threads, kernel call);
};

/* Every lane of the mask gives a value; returns where the lanes' values are, by lane, until the next but one. */
template <typename T> int give(unsigned mask, const T &value) {
    static_assert(sizeof(T) <= 64, "an exchange moves at most 64 bytes");
    const int parity = now->parity;
    now->parity ^= 1;
    std::memcpy(slot(parity, now->lane), &value, sizeof value);
    wait_warp(mask);
    return parity;
}
template <typename T> T take(int parity, int lane) {
    T value;
    std::memcpy(&value, slot(parity, lane), sizeof value);
    return value;
}
} // namespace host

#define threadIdx (host::now->thread)
#define blockIdx (host::block)
#define blockDim (host::block_size)
#define gridDim (host::grid)

/* ---- kernels ------------------------------------------------------------------------------------------ */

#define PSOUP__KERNEL_AS(name, args, threads)                                                              \
    static void name##_body(const psoup__##args##_args &a);                                                \
    static void name##_call(const void *a) {                                                               \
        name##_body(*static_cast<const psoup__##args##_args *>(a));                                        \
    }                                                                                                      \
    static_assert(sizeof(psoup__##args##_args) <= 4096, "a kernel's struct has at most 4 KiB");            \
    static const host::registration name##_known("psoup__" #name, sizeof(psoup__##args##_args), threads,   \
                                                 name##_call);                                             \
    static void name##_body(const psoup__##args##_args &a)

/* ---- barriers and warp functions ---------------------------------------------------------------------- */

inline void __syncthreads() { host::wait_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { host::wait_warp(mask); }

template <typename T> T __shfl_sync(unsigned mask, T value, int lane) {
    const int parity = host::give(mask, value);
    return host::take<T>(parity, lane & 31);
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return __shfl_sync(mask, value, host::now->lane ^ bits);
}
template <typename T> T __shfl_down_sync(unsigned mask, T value, int lanes) {
    const int lane = host::now->lane + lanes;
    return __shfl_sync(mask, value, lane < 32 ? lane : host::now->lane);
}
template <typename T> T __shfl_up_sync(unsigned mask, T value, int lanes) {
    const int lane = host::now->lane - lanes;
    return __shfl_sync(mask, value, lane >= 0 ? lane : host::now->lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const int parity = host::give(mask, predicate);
    unsigned bits = 0;
    for (int lane = 0; lane < 32; lane++)
        if (mask >> lane & 1 && host::take<int>(parity, lane))
            bits |= 1u << lane;
    return bits;
}

/* ---- numbers ------------------------------------------------------------------------------------------ */

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};
float host_to_float(f16 x);
f16 host_to_f16(float x);

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}
inline float to_float(f16 x) { return host_to_float(x); }
template <typename T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return bf16{0x7fff};
    return bf16{(uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
template <> inline f16 from_float<f16>(float x) { return host_to_f16(x); }

inline float fast_exp2(float x) {
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0 : y;
}
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; } /* never contracted with a sum, there as here */
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __int_as_float(int bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline int __float_as_int(float x) {
    int bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline unsigned __float_as_uint(float x) { return (unsigned)__float_as_int(x); }
inline float __uint_as_float(unsigned bits) { return __int_as_float((int)bits); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((unsigned)x); }
template <typename T> T __ldg(const T *p) { return *p; }

template <typename T> T atomicAdd(T *p, T x) {
    const T old = *p;
    *p = old + x;
    return old;
}
inline unsigned atomicOr(unsigned *p, unsigned x) {
    const unsigned old = *p;
    *p = old | x;
    return old;
}
template <typename T> T atomicMax(T *p, T x) {
    const T old = *p;
    *p = old > x ? old : x;
    return old;
}
template <typename T> T atomicMin(T *p, T x) {
    const T old = *p;
    *p = old < x ? old : x;
    return old;
}
inline void __threadfence() {}

struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline uint4 load_once(const char *p) { return *reinterpret_cast<const uint4 *>(p); }
inline void store_once(char *p, uint4 v) { *reinterpret_cast<uint4 *>(p) = v; }

#endif
