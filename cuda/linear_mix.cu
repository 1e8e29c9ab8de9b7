/* The forward of the adapters' part: y = bias + Σ weight · scale · (x Aᵀ) Bᵀ, to which the base's product is
 * added. Two launches for up to 32 adapters: u = x Aᵀ, then all of y. */
#include "linear_mix.cuh"

template <typename T> __device__ __forceinline__ void cast(const psoup__mix_cast_args &a) {
    constexpr int EACH = 8;
    T *out = static_cast<T *>(a.out);
    const uint64_t step = (uint64_t)gridDim.x * PSOUP__FLAT_THREADS;
    const uint64_t start = (uint64_t)blockIdx.x * PSOUP__FLAT_THREADS + threadIdx.x;
    const uint64_t packs = aligned16(a.in) && aligned16(out) ? a.n / EACH : 0;
    for (uint64_t i = start; i < packs; i += step) {
        const pack<float> low = load_pack(a.in + i * EACH), high = load_pack(a.in + i * EACH + 4);
        pack<T> both;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            both.x[c] = from_float<T>(low.x[c]);
            both.x[c + 4] = from_float<T>(high.x[c]);
        }
        store_pack(out + i * EACH, both);
    }
    for (uint64_t i = packs * EACH + start; i < a.n; i += step)
        out[i] = from_float<T>(a.in[i]);
}
PSOUP__KERNEL_AS(mix_cast_f16, mix_cast, PSOUP__FLAT_THREADS) { cast<f16>(a); }
PSOUP__KERNEL_AS(mix_cast_bf16, mix_cast, PSOUP__FLAT_THREADS) { cast<bf16>(a); }

/* For a row or some, each block takes one row of A and meets every use with it, all in f32. */
PSOUP__KERNEL_AS(mix_shrink_few, mix_shrink, THREADS) {
    constexpr int USES = PSOUP__MIX_FEW_USES, AT_ONCE = 4;
    const int i = adapter_of(a.tiles, (int)blockIdx.x), j = (int)blockIdx.x - a.tiles[i];
    const psoup__mix_adapter &adapter = a.adapter[i];
    const float *factor = adapter.factor + (size_t)j * a.width, *x[USES];
    const bool whole = a.width % 4 == 0 && aligned16(factor) && aligned16(a.x);
    for (int k = 0; k < USES; k++)
        x[k] = static_cast<const float *>(a.x) + (size_t)adapter.rows[min(k, adapter.uses - 1)] * a.width;
    float sum[USES] = {};
    for (int at = (int)threadIdx.x * 4; at < a.width; at += THREADS * 4 * AT_ONCE) {
        pack<float> f[AT_ONCE], v[AT_ONCE][USES];
#pragma unroll
        for (int q = 0; q < AT_ONCE; q++) {
            f[q] = fetch(factor, at + q * THREADS * 4, a.width, whole);
#pragma unroll
            for (int k = 0; k < USES; k++)
                v[q][k] = fetch(x[k], at + q * THREADS * 4, k < adapter.uses ? a.width : 0, whole);
        }
#pragma unroll
        for (int q = 0; q < AT_ONCE; q++)
#pragma unroll
            for (int k = 0; k < USES; k++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    sum[k] += f[q].x[c] * v[q][k].x[c];
    }
#pragma unroll
    for (int k = 0; k < USES; k++) {
        const float all = block_sum<THREADS>(sum[k]);
        if (threadIdx.x == 0 && k < adapter.uses)
            adapter.u[(size_t)k * adapter.rank + j] = all;
    }
}

/* Lane i knows where adapter i has the row. */
PSOUP__KERNEL(mix_pool, THREADS) {
    const int at = (int)blockIdx.x * (THREADS / 32) + (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int row = a.row0 + at;
    if (at >= a.rows || a.factors[row] == 0)
        return;
    const float *weights = a.weight + (size_t)row * a.weights;
    const float own = lane < a.n ? weights[a.adapter[lane].column] : 0;
    const int own_place = own != 0 ? lower_bound(a.adapter[lane].rows, 0, a.adapter[lane].uses, row) : 0;
    for (int j0 = 0; j0 < a.most; j0 += 32) {
        const int j = j0 + lane;
        float sum = a.begin || j >= a.most ? 0 : a.sums[(size_t)at * a.most + j];
        for (int pass = a.gather ? 0 : 1; pass < (a.spread ? 2 : 1); pass++)
            for (int i = 0; i < a.n; i++) {
                const float weight = __shfl_sync(0xffffffffu, own, i);
                const int place = __shfl_sync(0xffffffffu, own_place, i), rank = a.adapter[i].rank;
                if (weight == 0 || j >= rank)
                    continue;
                float *u = a.adapter[i].u + (size_t)place * rank + j;
                if (pass == 0)
                    sum += weight * *u;
                else
                    *u = sum;
            }
        if (!a.spread && j < a.most)
            a.sums[(size_t)at * a.most + j] = sum;
    }
}

PSOUP__KERNEL_AS(mix_shrink_a_f32, mix_shrink, THREADS) { shrink<float, float, false>(a); }
PSOUP__KERNEL_AS(mix_shrink_a_f16, mix_shrink, THREADS) { shrink<f16, f16, false>(a); }
PSOUP__KERNEL_AS(mix_shrink_a_bf16, mix_shrink, THREADS) { shrink<bf16, bf16, false>(a); }
PSOUP__KERNEL_AS(mix_shrink_a_f16_wide, mix_shrink, THREADS) { shrink<f16, float, false>(a); }
PSOUP__KERNEL_AS(mix_shrink_a_bf16_wide, mix_shrink, THREADS) { shrink<bf16, float, false>(a); }

PSOUP__KERNEL_AS(mix_expand_b_f32, mix_expand, THREADS) { expand<float, 4, true>(a); }
PSOUP__KERNEL_AS(mix_expand_b_f16, mix_expand, THREADS) { expand<f16, 4, true>(a); }
PSOUP__KERNEL_AS(mix_expand_b_bf16, mix_expand, THREADS) { expand<bf16, 4, true>(a); }
PSOUP__KERNEL_AS(mix_expand_few_f32, mix_expand, THREADS) { expand<float, 1, true>(a); }
PSOUP__KERNEL_AS(mix_expand_few_f16, mix_expand, THREADS) { expand<f16, 1, true>(a); }
PSOUP__KERNEL_AS(mix_expand_few_bf16, mix_expand, THREADS) { expand<bf16, 1, true>(a); }
