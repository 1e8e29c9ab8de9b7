/* Weights in blocks become a matrix that a product can take. Bound by memory: for nf4 half a byte and a share of the
 * scale is read, and two bytes or four are written for each element, 8 elements at a time. */
#include "device.cuh"

enum { EACH = 8, BLOCK = 64 };

template <typename T> __device__ __forceinline__ void read_blocks(const psoup__blocks_args &a) {
    constexpr int IN_PACK = 16 / (int)sizeof(T);
    SHARED float level[16];
    if (threadIdx.x < 16)
        level[threadIdx.x] = a.level[threadIdx.x];
    __syncthreads();
    T *const out = static_cast<T *>(a.out);
    const uint64_t step = (uint64_t)gridDim.x * PSOUP__FLAT_THREADS * EACH;
    for (uint64_t i = ((uint64_t)blockIdx.x * PSOUP__FLAT_THREADS + threadIdx.x) * EACH; i < a.n; i += step) {
        const float scale = a.scales[i / BLOCK];
        const int count = a.n - i < EACH ? (int)(a.n - i) : EACH;
        const bool whole = count == EACH;
        pack<T> v[EACH / IN_PACK];
        uint32_t word[2] = {0, 0};
        if (a.int8 && whole) {
            const uint2 both = *reinterpret_cast<const uint2 *>(a.codes + i);
            word[0] = both.x;
            word[1] = both.y;
        } else if (whole) {
            word[0] = *reinterpret_cast<const uint32_t *>(a.codes + i / 2);
        } else {
            const int bytes = a.int8 ? count : (count + 1) / 2;
            for (int c = 0; c < bytes; c++)
                word[c / 4] |= (uint32_t)a.codes[(a.int8 ? i : i / 2) + c] << c % 4 * 8;
        }
#pragma unroll
        for (int c = 0; c < EACH; c++) { /* a byte of nf4 has the even element above the odd one */
            const float code = a.int8 ? (float)(int8_t)(word[c / 4] >> c % 4 * 8)
                                      : level[word[0] >> (c / 2 * 8 + (c % 2 ? 0 : 4)) & 15];
            v[c / IN_PACK].x[c % IN_PACK] = from_float<T>(__fmul_rn(code, scale));
        }
        if (whole) {
#pragma unroll
            for (int p = 0; p < EACH / IN_PACK; p++)
                store_pack(out + i + p * IN_PACK, v[p]);
        } else {
#pragma unroll
            for (int c = 0; c < EACH; c++)
                if (c < count)
                    out[i + c] = v[c / IN_PACK].x[c % IN_PACK];
        }
    }
}

PSOUP__KERNEL_AS(blocks_f32, blocks, PSOUP__FLAT_THREADS) { read_blocks<float>(a); }
PSOUP__KERNEL_AS(blocks_f16, blocks, PSOUP__FLAT_THREADS) { read_blocks<f16>(a); }
PSOUP__KERNEL_AS(blocks_bf16, blocks, PSOUP__FLAT_THREADS) { read_blocks<bf16>(a); }
