/* The optimiser's step over a flat buffer, and what it clips by: values, and the norm. Bound by memory: the step by 28
 * bytes an element. */
#include "device.cuh"

template <typename A>
__device__ __forceinline__ void step_one(const A &a, float &p, float &m, float &v, float g) {
    g *= a.scale;
    m += a.rest1 * (g - m);
    v = v * a.beta2 + a.rest2 * g * g;
    p = p * a.keep - a.step * m / (sqrtf(v) / a.root + a.epsilon);
}

PSOUP__KERNEL(adamw_step, PSOUP__ADAMW_THREADS) {
    const uint64_t step = (uint64_t)gridDim.x * PSOUP__ADAMW_THREADS;
    const uint64_t start = (uint64_t)blockIdx.x * PSOUP__ADAMW_THREADS + threadIdx.x;
    const bool aligned = aligned16(a.p) && aligned16(a.m) && aligned16(a.v) && aligned16(a.g);
    const uint64_t packs = aligned ? a.n / 4 : 0;
    for (uint64_t i = start; i < packs; i += step) {
        const pack<float> g = load_pack(a.g + i * 4);
        pack<float> p = load_pack(a.p + i * 4), m = load_pack(a.m + i * 4), v = load_pack(a.v + i * 4);
#pragma unroll
        for (int c = 0; c < 4; c++)
            step_one(a, p.x[c], m.x[c], v.x[c], g.x[c]);
        store_pack(a.p + i * 4, p);
        store_pack(a.m + i * 4, m);
        store_pack(a.v + i * 4, v);
    }
    for (uint64_t i = packs * 4 + start; i < a.n; i += step)
        step_one(a, a.p[i], a.m[i], a.v[i], a.g[i]);
}

template <typename A>
__device__ __forceinline__ float clipped(const A &a, float x) {
    return x > a.limit ? a.limit : x < -a.limit ? -a.limit : x;
}

PSOUP__KERNEL(clip_values, PSOUP__ADAMW_THREADS) {
    const uint64_t step = (uint64_t)gridDim.x * PSOUP__ADAMW_THREADS;
    const uint64_t start = (uint64_t)blockIdx.x * PSOUP__ADAMW_THREADS + threadIdx.x;
    const uint64_t packs = aligned16(a.x) ? a.n / 4 : 0;
    for (uint64_t i = start; i < packs; i += step) {
        pack<float> x = load_pack(a.x + i * 4);
#pragma unroll
        for (int c = 0; c < 4; c++)
            x.x[c] = clipped(a, x.x[c]);
        store_pack(a.x + i * 4, x);
    }
    for (uint64_t i = packs * 4 + start; i < a.n; i += step)
        a.x[i] = clipped(a, a.x[i]);
}

/* Thread t of all takes elements 4(t + k·threads) … + 3, whatever the device and the alignment, and four sums
 * of them; the block's are then added in pairs. */
PSOUP__KERNEL(sum_squares, PSOUP__ADAMW_THREADS) {
    enum { ALL = PSOUP__SQUARES_PARTS * PSOUP__ADAMW_THREADS, WARPS = PSOUP__ADAMW_THREADS / 32 };
    const bool aligned = aligned16(a.x);
    double sum[4] = {0, 0, 0, 0};
    uint64_t i = ((uint64_t)blockIdx.x * PSOUP__ADAMW_THREADS + threadIdx.x) * 4;
#pragma unroll 4
    for (; i + 4 <= a.n; i += (uint64_t)ALL * 4) {
        pack<float> x;
        if (aligned) {
            x = load_pack(a.x + i);
        } else {
#pragma unroll
            for (int c = 0; c < 4; c++)
                x.x[c] = a.x[i + c];
        }
#pragma unroll
        for (int c = 0; c < 4; c++)
            sum[c] += (double)x.x[c] * x.x[c];
    }
    for (int c = 0; c < 4 && i + c < a.n; c++)
        sum[c] += (double)a.x[i + c] * a.x[i + c];

    SHARED double part[WARPS];
    double mine = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    for (int mask = 16; mask > 0; mask >>= 1)
        mine += __shfl_xor_sync(0xffffffffu, mine, mask);
    if (threadIdx.x % 32 == 0)
        part[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
        double all = 0;
        for (int w = 0; w < WARPS; w++)
            all += part[w];
        a.part[blockIdx.x] = all;
    }
}
