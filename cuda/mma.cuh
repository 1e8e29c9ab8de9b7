/* cuda/mma.cuh: tensor cores, and copies to shared memory that run beside them.
 *
 * D = A · B + D on a warp, A [16, 16] and B [16, 8] of bf16 or f16, D [16, 8] of f32.
 * With g = lane / 4 and t = lane % 4 a lane holds (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
 *   a[0] A[g][2t, 2t+1]   a[1] A[g+8][2t, 2t+1]   a[2] A[g][2t+8, 2t+9]   a[3] A[g+8][2t+8, 2t+9]
 *   b[0] B[2t, 2t+1][g]   b[1] B[2t+8, 2t+9][g]
 *   d[0], d[1] D[g][2t, 2t+1]   d[2], d[3] D[g+8][2t, 2t+1]
 */
#ifndef PSOUP__MMA_CUH
#define PSOUP__MMA_CUH

#include "device.cuh"

#ifdef __CUDACC__

template <typename T>
__device__ __forceinline__ void mma(float d[4], const uint32_t a[4], const uint32_t b[2]);
template <>
__device__ __forceinline__ void mma<bf16>(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma<f16>(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Four 8 × 8 matrices of 16-bit numbers from shared memory: lane l gives the address of row l % 8 of matrix
 * l / 8 (16 bytes, aligned) and gets elements [g][2t, 2t+1] of each; transposed, [2t, 2t+1][g]. */
__device__ __forceinline__ void load_matrices(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t r[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}

/* 16 or 8 bytes, aligned, from the device's memory to shared memory, or zeros where they are not `there`.
 * They have arrived, for the thread that asked, when copy_wait<n> returns and at most n of its copy_commit
 * came after theirs. */
__device__ __forceinline__ void copy16(void *to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy8(void *to, const void *from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
                 :
                 : "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(there ? 8 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#else
#include "host_mma.h"
#endif

/* Two numbers as a register of a fragment, the first in its low half. */
template <typename T> __device__ __forceinline__ uint32_t pair_of(float low, float high) {
    struct alignas(4) two {
        T low, high;
    };
    const two x = {from_float<T>(low), from_float<T>(high)};
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

#endif
