/* Weights in blocks become a matrix that a product can take. Bound by memory: for nf4 half a byte and a share of the
 * scale is read, and two bytes or four are written for each element, 8 elements at a time. Few rows are multiplied with
 * the blocks themselves. */
#include "mma.cuh"

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

/* ---- few rows ------------------------------------------------------------------------------------------------ */

/* y = x Wᵀ for up to 8 · NT rows, straight from the blocks: each code is read once and becomes a value in registers,
 * rounded as read_blocks rounds it. W is the first operand of the tensor cores' product, OUTS of its rows to a block,
 * whose warps share the columns. A lane reads 16 bytes of codes of a row, EACH columns, and x at the same: which of
 * the k of a product these are is all one, as both operands have them in the same lane. */
template <typename T, bool INT8, int NT> __device__ __forceinline__ void multiply(const psoup__blocks_few_args &a) {
    constexpr int OUTS = PSOUP__BLOCKS_OUTS, WARPS = PSOUP__FLAT_THREADS / 32, HALVES = OUTS / 8, AT_ONCE = 2;
    constexpr int EACH = INT8 ? 16 : 32, STEP = WARPS * 4 * EACH, ROWS = 8 * NT, LD = OUTS + 4;
    SHARED float level[16], part[WARPS][ROWS][LD];
    if (threadIdx.x < 16)
        level[threadIdx.x] = a.level[threadIdx.x];
    __syncthreads();
    const T *const x = static_cast<const T *>(a.x);
    const int warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0); /* known to be the warp's own */
    const int g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4, out0 = (int)blockIdx.x * OUTS;
    float d[OUTS / 16][NT][4] = {};
    for (int k0 = warp * 4 * EACH; k0 < a.in; k0 += AT_ONCE * STEP) {
        uint4 code[AT_ONCE][HALVES];
        float scale[AT_ONCE][HALVES];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                const int column = k0 + i * STEP + t * EACH, o = out0 + h * 8 + g;
                const bool there = column < a.in && o < a.out;
                const size_t at = there ? (size_t)o * a.in + column : 0;
                code[i][h] = load_once(reinterpret_cast<const char *>(a.codes) + (INT8 ? at : at / 2));
                scale[i][h] = there ? a.scales[at / BLOCK] : 0;
            }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int s = 0; s < EACH / 8; s++) { /* 8 columns of a lane are two products */
                const int column = k0 + i * STEP + t * EACH + s * 8;
                uint4 xs[NT];
                uint32_t w[HALVES][4];
#pragma unroll
                for (int q = 0; q < NT; q++) {
                    const bool there = column < a.in && q * 8 + g < a.rows;
                    xs[q] = there ? *reinterpret_cast<const uint4 *>(x + (size_t)(q * 8 + g) * a.in + column)
                                  : uint4{0, 0, 0, 0};
                }
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    const uint32_t words[4] = {code[i][h].x, code[i][h].y, code[i][h].z, code[i][h].w};
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const uint32_t word = INT8 ? words[s % 2 * 2 + c / 2] >> c % 2 * 16 : words[s] >> c * 8;
                        const float low = INT8 ? (float)(int8_t)word : level[word >> 4 & 15];
                        const float high = INT8 ? (float)(int8_t)(word >> 8) : level[word & 15];
                        w[h][c] = pair_of<T>(__fmul_rn(low, scale[i][h]), __fmul_rn(high, scale[i][h]));
                    }
                }
#pragma unroll
                for (int m = 0; m < OUTS / 16; m++)
#pragma unroll
                    for (int q = 0; q < NT; q++) {
                        const uint32_t *w0 = w[2 * m], *w1 = w[2 * m + 1];
                        const uint32_t first[4] = {w0[0], w1[0], w0[1], w1[1]}, x_first[2] = {xs[q].x, xs[q].y};
                        const uint32_t second[4] = {w0[2], w1[2], w0[3], w1[3]}, x_second[2] = {xs[q].z, xs[q].w};
                        mma<T>(d[m][q], first, x_first);
                        mma<T>(d[m][q], second, x_second);
                    }
            }
    }
#pragma unroll
    for (int m = 0; m < OUTS / 16; m++)
#pragma unroll
        for (int q = 0; q < NT; q++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                part[warp][q * 8 + t * 2 + c % 2][m * 16 + g + c / 2 * 8] = d[m][q][c];
    __syncthreads();
    for (int at = (int)threadIdx.x; at < ROWS * OUTS; at += PSOUP__FLAT_THREADS) {
        const int r = at / OUTS, o = at % OUTS;
        if (r >= a.rows || out0 + o >= a.out)
            continue;
        float sum = 0;
        for (int i = 0; i < WARPS; i++)
            sum += part[i][r][o];
        float *const y = a.y + (size_t)r * a.out + out0 + o;
        *y = a.add ? *y + sum : sum;
    }
}

PSOUP__KERNEL_AS(int8_few_f16, blocks_few, PSOUP__FLAT_THREADS) { multiply<f16, true, 1>(a); }
PSOUP__KERNEL_AS(int8_few_bf16, blocks_few, PSOUP__FLAT_THREADS) { multiply<bf16, true, 1>(a); }
PSOUP__KERNEL_AS(int8_more_f16, blocks_few, PSOUP__FLAT_THREADS) { multiply<f16, true, 2>(a); }
PSOUP__KERNEL_AS(int8_more_bf16, blocks_few, PSOUP__FLAT_THREADS) { multiply<bf16, true, 2>(a); }
PSOUP__KERNEL_AS(nf4_few_f16, blocks_few, PSOUP__FLAT_THREADS) { multiply<f16, false, 1>(a); }
PSOUP__KERNEL_AS(nf4_few_bf16, blocks_few, PSOUP__FLAT_THREADS) { multiply<bf16, false, 1>(a); }
PSOUP__KERNEL_AS(nf4_more_f16, blocks_few, PSOUP__FLAT_THREADS) { multiply<f16, false, 2>(a); }
PSOUP__KERNEL_AS(nf4_more_bf16, blocks_few, PSOUP__FLAT_THREADS) { multiply<bf16, false, 2>(a); }
