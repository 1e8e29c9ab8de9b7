/* cuda/philox.cuh: Philox4x32-10, the words of src/base/philox.c. On a device they are made by cuRAND's own
 * function; where its header is not installed, by a twin. tests/philox.cc compares all three. */
#ifndef PSOUP__PHILOX_CUH
#define PSOUP__PHILOX_CUH

#include "device.cuh"

#if defined(__CUDACC__)
#define PSOUP__CURAND 1
#elif __has_include(<curand_philox4x32_x.h>) && __has_include(<nv/target>)
#define PSOUP__CURAND 1
#else
#define PSOUP__CURAND 0
#endif

#if PSOUP__CURAND
#include <curand_philox4x32_x.h>
#endif

__device__ __forceinline__ uint4 philox_twin(uint4 counter, uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)counter.x * 0xd2511f53u, p1 = (uint64_t)counter.z * 0xcd9e8d57u;
        counter = uint4{(unsigned)(p1 >> 32) ^ counter.y ^ key.x, (unsigned)p1,
                        (unsigned)(p0 >> 32) ^ counter.w ^ key.y, (unsigned)p0};
        key = uint2{key.x + 0x9e3779b9u, key.y + 0xbb67ae85u};
    }
    return counter;
}

/* The words at positions 4 · block … 4 · block + 3. */
__device__ __forceinline__ uint4 philox_block(uint64_t seed, uint64_t sequence, uint64_t block) {
    const uint4 counter = {(unsigned)block, (unsigned)(block >> 32), (unsigned)sequence,
                           (unsigned)(sequence >> 32)};
    const uint2 key = {(unsigned)seed, (unsigned)(seed >> 32)};
#if PSOUP__CURAND
    return curand_Philox4x32_10(counter, key);
#else
    return philox_twin(counter, key);
#endif
}

/* psoup__uniform: in [0, 1). */
__device__ __forceinline__ float uniform_of(unsigned word) { return (float)(word >> 8) * 0x1p-24f; }

#endif
