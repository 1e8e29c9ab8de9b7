/* What stands between the linear layers. All of it is bound by memory: each element is read and written
 * once, 16 bytes at a time where the addresses allow it. */
#include "device.cuh"

/* A row of at most NORM_THREADS · 4 · KEPT elements stays in registers between the two passes. */
PSOUP__KERNEL(rmsnorm, PSOUP__NORM_THREADS) {
    enum { KEPT = 8 };
    const size_t at = (size_t)blockIdx.x * a.width;
    const float *x = a.x + at;
    float *out = a.out + at;
    float sum = 0;
    if (a.width % 4 == 0 && a.width <= PSOUP__NORM_THREADS * 4 * KEPT && aligned16(x) && aligned16(out) &&
        aligned16(a.weight)) {
        pack<float> kept[KEPT];
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            const int j = (i * PSOUP__NORM_THREADS + threadIdx.x) * 4;
            if (j >= a.width)
                break;
            kept[i] = load_pack(x + j);
#pragma unroll
            for (int c = 0; c < 4; c++)
                sum += kept[i].x[c] * kept[i].x[c];
        }
        const float rstd = rsqrtf(block_sum<PSOUP__NORM_THREADS>(sum) / a.width + a.epsilon);
#pragma unroll
        for (int i = 0; i < KEPT; i++) {
            const int j = (i * PSOUP__NORM_THREADS + threadIdx.x) * 4;
            if (j >= a.width)
                break;
            const pack<float> weight = load_pack(a.weight + j);
#pragma unroll
            for (int c = 0; c < 4; c++)
                kept[i].x[c] *= rstd * weight.x[c];
            store_pack(out + j, kept[i]);
        }
        if (threadIdx.x == 0)
            a.rstd[blockIdx.x] = rstd;
        return;
    }
    for (int j = threadIdx.x; j < a.width; j += PSOUP__NORM_THREADS)
        sum += x[j] * x[j];
    const float rstd = rsqrtf(block_sum<PSOUP__NORM_THREADS>(sum) / a.width + a.epsilon);
    for (int j = threadIdx.x; j < a.width; j += PSOUP__NORM_THREADS)
        out[j] = x[j] * rstd * a.weight[j];
    if (threadIdx.x == 0)
        a.rstd[blockIdx.x] = rstd;
}

PSOUP__KERNEL(add, PSOUP__FLAT_THREADS) {
    const uint64_t step = (uint64_t)gridDim.x * PSOUP__FLAT_THREADS;
    const uint64_t start = (uint64_t)blockIdx.x * PSOUP__FLAT_THREADS + threadIdx.x;
    const uint64_t packs = aligned16(a.x) && aligned16(a.y) ? a.n / 4 : 0;
    for (uint64_t i = start; i < packs; i += step) {
        pack<float> x = load_pack(a.x + i * 4);
        const pack<float> y = load_pack(a.y + i * 4);
#pragma unroll
        for (int c = 0; c < 4; c++)
            x.x[c] += y.x[c];
        store_pack(a.x + i * 4, x);
    }
    for (uint64_t i = packs * 4 + start; i < a.n; i += step)
        a.x[i] += a.y[i];
}
