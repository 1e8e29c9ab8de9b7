/* The backward of the adapters' part, with share = weight · scale:
 *
 *     du = dy B              shrink, B as it lies             dweight += scale · <du, u>    dweight
 *     dB += dyᵀ (share · u)  gradient                         dA += (share · du)ᵀ x         gradient
 *     dx += share · du A     expand, A as it lies
 *
 * Rows of factors: u and du are pooled (mix_pool) but for dweight += scale · (<dy B, pooled u> + <pooled du, x A>).
 */
#include "linear_mix.cuh"

/* Columns × ranks of Σ zᵀ (share · u) over the uses of one adapter: a warp has 32 columns and all the tile's
 * ranks. Uses go by in steps of 64 bytes of T, through two tiles of z and of u in turn; those of share 0 as
 * zeros. */
template <typename T, typename X>
__device__ __forceinline__ void gradient(const psoup__mix_gradient_args &a) {
    constexpr int COLUMNS = PSOUP__MIX_GRADIENT_COLUMNS, RANKS = PSOUP__MIX_RANKS, CHUNK = PSOUP__MIX_CHUNK;
    constexpr int STEP = 64 / (int)sizeof(T), NT = RANKS / 8;
    constexpr int LD = COLUMNS + in_pack<T>, U_LD = RANKS + in_pack<T>;
    SHARED pack<T> z_tiles[2][STEP * LD / in_pack<T>], u_tiles[2][STEP * U_LD / in_pack<T>];
    SHARED int32_t row[CHUNK];
    SHARED float share[CHUNK];

    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int i = adapter_of(a.tiles, (int)blockIdx.x);
    const psoup__mix_adapter &adapter = a.adapter[i];
    const int rank = adapter.rank, across = (rank + RANKS - 1) / RANKS, tile = (int)blockIdx.x - a.tiles[i];
    const int column0 = tile / across * COLUMNS;
    const int rank0 = tile % across * RANKS, ranks = min(RANKS, rank - rank0);
    const int start = (a.chunk + (int)blockIdx.y) * CHUNK, uses = min(CHUNK, adapter.uses - start);
    const int chunks = min((int)gridDim.y, (adapter.uses + CHUNK - 1) / CHUNK - a.chunk);
    if (uses <= 0)
        return;
    const X *z = static_cast<const X *>(a.z) + column0;
    const float *u = adapter.u + (size_t)start * rank + rank0;
    const bool z_whole = a.width % in_pack<X> == 0 && aligned16(z), u_whole = rank % 4 == 0 && aligned16(u);
    for (int k = (int)threadIdx.x; k < uses; k += THREADS) {
        const int r = adapter.rows[start + k];
        share[k] = a.weight[(size_t)r * a.weights + adapter.column] * adapter.scale;
        row[k] = share[k] != 0 ? r : -1;
    }
    __syncthreads();

    pack<X> z_kept[STEP * COLUMNS / in_pack<X> / THREADS];
    pack<float> u_kept[STEP * RANKS / 4 / THREADS];
    const auto ahead = [&](int k) {
        const auto z_row = [&](int r) {
            return row[k + r] >= 0 ? z + (size_t)row[k + r] * a.width : nullptr;
        };
        const auto u_row = [&](int r) { return row[k + r] >= 0 ? u + (size_t)(k + r) * rank : nullptr; };
        fetch_tile<COLUMNS>(z_kept, z_row, uses - k, a.width - column0, z_whole);
        fetch_tile<RANKS>(u_kept, u_row, uses - k, ranks, u_whole);
    };
    float d[2][NT][4] = {};
    ahead(0);
    for (int k = 0, side = 0; k < uses; k += STEP, side ^= 1) {
        T *const zs = reinterpret_cast<T *>(z_tiles[side]), *const us = reinterpret_cast<T *>(u_tiles[side]);
#pragma unroll
        for (int q = 0; q < STEP * RANKS / 4 / THREADS; q++) {
            const int r = k + (q * THREADS + (int)threadIdx.x) / (RANKS / 4);
            const float factor = r < uses ? share[r] : 0;
#pragma unroll
            for (int c = 0; c < 4; c++)
                u_kept[q].x[c] *= factor;
        }
        put_tile<COLUMNS>(zs, z_kept, STEP);
        put_tile<RANKS>(us, u_kept, STEP);
        __syncthreads();
        if (k + STEP < uses)
            ahead(k + STEP);
#pragma unroll
        for (int j = 0; j < STEP; j += 16)
#pragma unroll
            for (int half = 0; half < 2; half++)
                multiply<T, false, false, NT>(d[half], zs + j * LD + warp * 32 + half * 16, LD, us + j * U_LD,
                                              U_LD, ranks);
    }

    float *slots = a.slots + (size_t)blockIdx.x * gridDim.y * PSOUP__MIX_GRADIENT_SLOT;
    if (chunks > 1) {
#pragma unroll
        for (int f = 0; f < 2 * NT; f++)
            if (f / 2 * 8 < ranks)
                leave_fragment(slots + (size_t)blockIdx.y * PSOUP__MIX_GRADIENT_SLOT, f, d[f % 2][f / 2]);
        if (!last_to_come(a.counters + blockIdx.x, (uint32_t)chunks))
            return;
    }
    const int column1 = column0 + warp * 32 + lane / 4, j1 = rank0 + lane % 4 * 2;
    const int column_step = a.b_layout ? rank : 1, rank_step = a.b_layout ? 1 : a.width;
#pragma unroll
    for (int f = 0; f < 2 * NT; f++) {
        if (f / 2 * 8 >= ranks)
            break;
        float *const sum = d[f % 2][f / 2];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int column = column1 + f % 2 * 16 + c / 2 * 8, j = j1 + f / 2 * 8 + c % 2;
            sum[c] = chunks > 1 ? 0 : sum[c];
            if (column < a.width && j < rank)
                sum[c] += adapter.gradient[(size_t)column * column_step + (size_t)j * rank_step];
        }
        if (chunks > 1)
            add_fragments<8>(sum, slots, PSOUP__MIX_GRADIENT_SLOT, f, chunks);
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int column = column1 + f % 2 * 16 + c / 2 * 8, j = j1 + f / 2 * 8 + c % 2;
            if (column < a.width && j < rank)
                adapter.gradient[(size_t)column * column_step + (size_t)j * rank_step] = sum[c];
        }
    }
}

PSOUP__KERNEL(mix_dweight, THREADS) {
    const int use = (int)blockIdx.x * (THREADS / 32) + (int)threadIdx.x / 32;
    if (use >= a.uses[a.n])
        return;
    const int i = adapter_of(a.uses, use), k = use - a.uses[i];
    const psoup__mix_adapter &adapter = a.adapter[i];
    const size_t at = (size_t)k * adapter.rank, cell = (size_t)adapter.rows[k] * a.weights + adapter.column;
    if (a.factors && a.factors[adapter.rows[k]] != 0 ? a.weight[cell] == 0 : a.pooled)
        return;
    float sum = 0;
    for (int j = (int)threadIdx.x % 32; j < adapter.rank; j += 32)
        sum += adapter.u[at + j] * adapter.gradient[at + j];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0)
        a.dweight[cell] += adapter.scale * sum;
}

/* Warp l sums rows l, l + 32, …; then the warps' sums are added in order. */
PSOUP__KERNEL(mix_dbias, PSOUP__MIX_DBIAS_THREADS) {
    enum { WARPS = PSOUP__MIX_DBIAS_THREADS / 32 };
    SHARED float part[WARPS][32];
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const int column = (int)blockIdx.x * PSOUP__MIX_DBIAS_COLUMNS + lane;
    float sum = 0;
    if (column < a.out)
#pragma unroll 4
        for (int row = warp; row < a.rows; row += WARPS)
            sum += a.dy[(size_t)row * a.out + column];
    part[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= a.out)
        return;
    sum = a.dbias[column];
    for (int i = 0; i < WARPS; i++)
        sum += part[i][lane];
    a.dbias[column] = sum;
}

PSOUP__KERNEL_AS(mix_shrink_b_f32, mix_shrink, THREADS) { shrink<float, float, true>(a); }
PSOUP__KERNEL_AS(mix_shrink_b_f16, mix_shrink, THREADS) { shrink<f16, f16, true>(a); }
PSOUP__KERNEL_AS(mix_shrink_b_bf16, mix_shrink, THREADS) { shrink<bf16, bf16, true>(a); }
PSOUP__KERNEL_AS(mix_shrink_b_f16_wide, mix_shrink, THREADS) { shrink<f16, float, true>(a); }
PSOUP__KERNEL_AS(mix_shrink_b_bf16_wide, mix_shrink, THREADS) { shrink<bf16, float, true>(a); }

PSOUP__KERNEL_AS(mix_expand_a_f32, mix_expand, THREADS) { expand<float, 4, false>(a); }
PSOUP__KERNEL_AS(mix_expand_a_f16, mix_expand, THREADS) { expand<f16, 4, false>(a); }
PSOUP__KERNEL_AS(mix_expand_a_bf16, mix_expand, THREADS) { expand<bf16, 4, false>(a); }

PSOUP__KERNEL_AS(mix_gradient_f32, mix_gradient, THREADS) { gradient<float, float>(a); }
PSOUP__KERNEL_AS(mix_gradient_f16, mix_gradient, THREADS) { gradient<f16, f16>(a); }
PSOUP__KERNEL_AS(mix_gradient_bf16, mix_gradient, THREADS) { gradient<bf16, bf16>(a); }
PSOUP__KERNEL_AS(mix_gradient_f16_wide, mix_gradient, THREADS) { gradient<f16, float>(a); }
PSOUP__KERNEL_AS(mix_gradient_bf16_wide, mix_gradient, THREADS) { gradient<bf16, float>(a); }
