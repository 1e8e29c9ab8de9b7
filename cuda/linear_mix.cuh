/* cuda/linear_mix.cuh: what the kernels of linear_mix and its backward are made of.
 *
 * Every product goes through tiles in shared memory, of T (the dtype of the weights; products of f16 and bf16
 * are taken by tensor cores, of f32 by FMA with the same fragments). A tile's rows are padded by 16 bytes, so
 * that the eight rows of an ldmatrix lie in different banks. Tiles are fetched into registers a step ahead;
 * on the way rows are gathered, numbers rounded, and what is not there filled with zeros.
 */
#ifndef PSOUP__LINEAR_MIX_CUH
#define PSOUP__LINEAR_MIX_CUH

#include "mma.cuh"

enum { THREADS = PSOUP__MIX_THREADS };

/* Numbers of 16 bytes: what a pack of them has, and what a row of a tile is padded by. */
template <typename T> constexpr int in_pack = 16 / (int)sizeof(T);

__device__ __forceinline__ int tile_of_16(int n) { return (n + 15) / 16 * 16; }

/* d[NT][4] += A[16, 16] · B[16, 8·NT], a warp, the columns below n (or their 16) only. ALONG_K: consecutive
 * elements of the operand in shared memory are those of one k sum; otherwise its rows are k. */
template <typename T, bool A_ALONG_K, bool B_ALONG_K, int NT>
__device__ __forceinline__ void multiply(float (*d)[4], const T *a, int lda, const T *b, int ldb, int n) {
    const int lane = (int)threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
        uint32_t x[4], y[4];
        if constexpr (A_ALONG_K)
            load_matrices(x, a + lane % 16 * lda + lane / 16 * 8);
        else
            load_matrices_transposed(x, a + (lane % 8 + lane / 16 * 8) * lda + lane / 8 % 2 * 8);
#pragma unroll
        for (int t = 0; t < NT; t += 2) {
            if (t * 8 >= n)
                break;
            if constexpr (B_ALONG_K)
                load_matrices(y, b + (t * 8 + lane / 16 * 8 + lane % 8) * ldb + lane / 8 % 2 * 8);
            else
                load_matrices_transposed(y, b + lane % 16 * ldb + t * 8 + lane / 16 * 8);
            mma<T>(d[t], x, y);
            mma<T>(d[t + 1], x, y + 2);
        }
    } else {
        const int g = lane / 4, c = lane % 4 * 2;
#pragma unroll 2
        for (int k = 0; k < 16; k++) {
            const float x0 = a[A_ALONG_K ? g * lda + k : k * lda + g];
            const float x1 = a[A_ALONG_K ? (g + 8) * lda + k : k * lda + g + 8];
#pragma unroll
            for (int t = 0; t < NT; t++) {
                if (t * 8 >= n)
                    break;
                const float y0 = b[B_ALONG_K ? (t * 8 + c) * ldb + k : k * ldb + t * 8 + c];
                const float y1 = b[B_ALONG_K ? (t * 8 + c + 1) * ldb + k : k * ldb + t * 8 + c + 1];
                d[t][0] += x0 * y0;
                d[t][1] += x0 * y1;
                d[t][2] += x1 * y0;
                d[t][3] += x1 * y1;
            }
        }
    }
}

/* ---- global to shared memory ------------------------------------------------------------------------- */

/* p[at …] of a row that ends at `end`, zeros beyond. `whole`: packs are aligned. */
template <typename X> __device__ __forceinline__ pack<X> fetch(const X *p, int at, int end, bool whole) {
    pack<X> v;
    if (whole && at + in_pack<X> <= end)
        return load_pack(p + at);
#pragma unroll
    for (int c = 0; c < in_pack<X>; c++)
        v.x[c] = at + c < end ? p[at + c] : from_float<X>(0);
    return v;
}

template <typename T> __device__ __forceinline__ void put(T *p, const pack<T> &v) { store_pack(p, v); }
template <typename T> __device__ __forceinline__ void put_half(T *p, const pack<float> &v) {
    uint2 bits;
    bits.x = pair_of<T>(v.x[0], v.x[1]);
    bits.y = pair_of<T>(v.x[2], v.x[3]);
    *reinterpret_cast<uint2 *>(p) = bits;
}
__device__ __forceinline__ void put(bf16 *p, const pack<float> &v) { put_half(p, v); }
__device__ __forceinline__ void put(f16 *p, const pack<float> &v) { put_half(p, v); }

/* A tile of COLUMNS columns, N packs of it to a thread. row(r) is where the tile's row r begins in global
 * memory, or NULL; it has columns below `end`, none where r is not below `count`. */
template <int COLUMNS, typename X, int N, typename Row>
__device__ __forceinline__ void fetch_tile(pack<X> (&kept)[N], Row row, int count, int end, bool whole) {
    constexpr int ACROSS = COLUMNS / in_pack<X>;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int q = i * THREADS + (int)threadIdx.x, r = q / ACROSS;
        const X *p = r < count ? row(r) : nullptr;
        kept[i] = fetch(p, q % ACROSS * in_pack<X>, p ? end : 0, whole);
    }
}

/* Only rows below `count` are put. */
template <int COLUMNS, typename T, typename X, int N>
__device__ __forceinline__ void put_tile(T *tile, const pack<X> (&kept)[N], int count) {
    constexpr int ACROSS = COLUMNS / in_pack<X>;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int q = i * THREADS + (int)threadIdx.x, r = q / ACROSS;
        if (r < count)
            put(tile + r * (COLUMNS + in_pack<T>) + q % ACROSS * in_pack<X>, kept[i]);
    }
}

/* ---- sums of several blocks -------------------------------------------------------------------------- */

/* Whether this block is the last of so many to come here; it then sees what all of them wrote before. */
__device__ __forceinline__ bool last_to_come(uint32_t *counter, uint32_t blocks) {
    SHARED bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(counter, 1u) == blocks - 1;
        if (last)
            *counter = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

/* A thread's fragments, to and from a slot: 16 bytes of one thread lie beside those of the next. */
__device__ __forceinline__ void leave_fragment(float *slot, int fragment, const float d[4]) {
    pack<float> v;
#pragma unroll
    for (int c = 0; c < 4; c++)
        v.x[c] = d[c];
    store_pack(slot + (fragment * THREADS + (int)threadIdx.x) * 4, v);
}

/* d += `blocks` slots, one after another; AT_ONCE are on their way together. */
template <int AT_ONCE>
__device__ __forceinline__ void add_fragments(float d[4], const float *slot, int slot_size, int fragment,
                                              int blocks) {
    slot += (fragment * THREADS + (int)threadIdx.x) * 4;
    for (int b = 0; b < blocks; b += AT_ONCE) {
        pack<float> v[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const bool there = b + i < blocks;
            v[i] = fetch(slot + (size_t)(there ? b + i : 0) * slot_size, 0, there ? 4 : 0, true);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                d[c] += v[i].x[c];
    }
}

__device__ __forceinline__ int adapter_of(const int32_t *first, int at) {
    int i = 0;
    while (at >= first[i + 1])
        i++;
    return i;
}

/* ---- shrink: u = x · factorᵀ (A, [rank, width]), or x · factor (B, [width, rank]) -------------------- */

/* A warp has 16 of the tile's rows and all its ranks. Columns go by in steps of 128 bytes of T, through two
 * tiles of x and of the factor in turn. */
template <typename T, typename X, bool B_LAYOUT>
__device__ __forceinline__ void shrink(const psoup__mix_shrink_args &a) {
    constexpr int ROWS = PSOUP__MIX_ROWS, RANKS = PSOUP__MIX_RANKS, STEP = 128 / (int)sizeof(T);
    constexpr int LD = STEP + in_pack<T>, FACTOR_ROWS = B_LAYOUT ? STEP : RANKS;
    constexpr int FACTOR_COLUMNS = B_LAYOUT ? RANKS : STEP, FACTOR_LD = FACTOR_COLUMNS + in_pack<T>;
    SHARED pack<T> x_tiles[2][ROWS * LD / in_pack<T>], factor_tiles[2][FACTOR_ROWS * FACTOR_LD / in_pack<T>];
    SHARED int32_t row[ROWS];

    const int i = adapter_of(a.tiles, (int)blockIdx.x), warp = (int)threadIdx.x / 32;
    const psoup__mix_adapter &adapter = a.adapter[i];
    const int rank = adapter.rank, across = (rank + RANKS - 1) / RANKS, tile = (int)blockIdx.x - a.tiles[i];
    const int start = tile / across * ROWS, rank0 = tile % across * RANKS;
    const int rows = min(ROWS, adapter.uses - start), ranks = min(RANKS, rank - rank0);
    const int begin = (int)blockIdx.y * a.slice, end = min(begin + a.slice, a.width);
    const X *x = static_cast<const X *>(a.x);
    const bool x_whole = a.width % in_pack<X> == 0 && aligned16(x);
    const bool factor_whole = (B_LAYOUT ? rank : a.width) % 4 == 0 && aligned16(adapter.factor);
    for (int r = (int)threadIdx.x; r < rows; r += THREADS)
        row[r] = adapter.rows[start + r];
    __syncthreads();

    pack<X> x_kept[ROWS * STEP / in_pack<X> / THREADS];
    pack<float> factor_kept[RANKS * STEP / 4 / THREADS];
    const auto ahead = [&](int k) {
        const auto x_row = [&](int r) { return x + (size_t)row[r] * a.width + k; };
        const auto a_row = [&](int r) { return adapter.factor + (size_t)(rank0 + r) * a.width + k; };
        const auto b_row = [&](int r) { return adapter.factor + (size_t)(k + r) * rank + rank0; };
        fetch_tile<STEP>(x_kept, x_row, rows, end - k, x_whole);
        if constexpr (B_LAYOUT)
            fetch_tile<RANKS>(factor_kept, b_row, end - k, ranks, factor_whole);
        else
            fetch_tile<STEP>(factor_kept, a_row, ranks, end - k, factor_whole);
    };
    float d[RANKS / 8][4] = {};
    ahead(begin);
    for (int k = begin, side = 0; k < end; k += STEP, side ^= 1) {
        T *const xs = reinterpret_cast<T *>(x_tiles[side]);
        T *const fs = reinterpret_cast<T *>(factor_tiles[side]);
        put_tile<STEP>(xs, x_kept, ROWS);
        put_tile<FACTOR_COLUMNS>(fs, factor_kept, B_LAYOUT ? FACTOR_ROWS : tile_of_16(ranks));
        __syncthreads();
        if (k + STEP < end)
            ahead(k + STEP);
        if (warp * 16 < rows)
#pragma unroll
            for (int j = 0; j < STEP; j += 16)
                multiply<T, true, !B_LAYOUT, RANKS / 8>(
                    d, xs + warp * 16 * LD + j, LD, fs + (B_LAYOUT ? j * FACTOR_LD : j), FACTOR_LD, ranks);
    }

    if (a.splits > 1) {
        float *slots = a.slots + (size_t)blockIdx.x * a.splits * PSOUP__MIX_SLOT;
#pragma unroll
        for (int t = 0; t < RANKS / 8; t++)
            if (t * 8 < ranks && warp * 16 < rows)
                leave_fragment(slots + (size_t)blockIdx.y * PSOUP__MIX_SLOT, t, d[t]);
        if (!last_to_come(a.counters + blockIdx.x, (uint32_t)a.splits))
            return;
#pragma unroll
        for (int t = 0; t < RANKS / 8; t++) {
            if (t * 8 >= ranks || warp * 16 >= rows)
                break;
            d[t][0] = d[t][1] = d[t][2] = d[t][3] = 0;
            add_fragments<16>(d[t], slots, PSOUP__MIX_SLOT, t, a.splits);
        }
    }
    const int m = warp * 16 + (int)threadIdx.x % 32 / 4, n = (int)threadIdx.x % 4 * 2;
#pragma unroll
    for (int t = 0; t < RANKS / 8; t++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int r = m + c / 2 * 8, j = t * 8 + n + c % 2;
            if (r < rows && j < ranks)
                adapter.u[(size_t)(start + r) * rank + rank0 + j] = d[t][c];
        }
}

/* ---- expand: y += weight · scale · u · factorᵀ (B), or · factor (A) ---------------------------------- */

/* The first of list[low … high−1], ascending, that is not below `value`. */
__device__ __forceinline__ int lower_bound(const int32_t *list, int low, int high, int value) {
    while (low < high) {
        const int middle = (low + high) / 2;
        if (list[middle] < value)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* What a block knows of its rows' adapters, those of its part. */
template <int ROWS> struct mix_tile {
    float share[PSOUP__MIX_GROUP][ROWS];     /* weight · scale; 0: the row does not use the adapter */
    uint8_t place[PSOUP__MIX_GROUP][ROWS];   /* where, after `low`, u has the row */
    int32_t low[PSOUP__MIX_GROUP], high[PSOUP__MIX_GROUP];
    int32_t slices[PSOUP__MIX_GROUP + 1];    /* where the adapters' slices of 16 ranks begin */
};

template <int ROWS>
__device__ __forceinline__ void look_up(mix_tile<ROWS> &t, const psoup__mix_expand_args &a,
                                        const psoup__mix_part &part, int row0) {
    if (threadIdx.x < 32) {
        const int i = (int)threadIdx.x, row1 = min(row0 + ROWS, a.rows);
        int low = 0, high = 0;
        if (i < part.n) { /* rows are distinct: before row r there are at most r, after it at most rows − r */
            const int32_t *rows = a.adapter[part.first + i].rows;
            const int uses = a.adapter[part.first + i].uses, unused = a.rows - uses;
            low = lower_bound(rows, max(0, row0 - unused), min(row0, uses), row0);
            high = lower_bound(rows, max(low, row1 - unused), min(row1, uses), row1);
        }
        int sum = high > low ? (a.adapter[part.first + i].rank + 15) / 16 : 0;
        for (int step = 1; step < 32; step *= 2) {
            const int before = __shfl_up_sync(0xffffffffu, sum, step);
            sum += i >= step ? before : 0;
        }
        t.low[i] = low;
        t.high[i] = high;
        t.slices[i + 1] = sum;
        if (i == 0)
            t.slices[0] = 0;
    }
    for (int q = (int)threadIdx.x; q < part.n * ROWS; q += THREADS)
        t.share[q / ROWS][q % ROWS] = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x / 32; i < part.n; i += THREADS / 32)
        for (int p = t.low[i] + (int)threadIdx.x % 32; p < t.high[i]; p += 32) {
            const psoup__mix_adapter &adapter = a.adapter[part.first + i];
            const int row = adapter.rows[p];
            t.share[i][row - row0] = a.weight[(size_t)row * a.weights + adapter.column] * adapter.scale;
            t.place[i][row - row0] = (uint8_t)(p - t.low[i]);
        }
    __syncthreads();
}

/* Sixteen ranks of an adapter. */
struct mix_slice {
    int32_t adapter, rank0;
    bool last; /* of the adapter */
};

/* Items of a tile, four numbers each, AT_ONCE of a thread on their way together: get(q) fetches item q, to(q)
 * is where it is put. */
template <int AT_ONCE, typename T, typename Get, typename To>
__device__ __forceinline__ void bring(int items, Get get, To to) {
    for (int q0 = (int)threadIdx.x; q0 < items; q0 += AT_ONCE * THREADS) {
        pack<float> kept[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (q0 + i * THREADS < items)
                kept[i] = get(q0 + i * THREADS);
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
            if (q0 + i * THREADS < items)
                put(to(q0 + i * THREADS), kept[i]);
    }
}

/* The u of n slices, [ROWS][DEPTH + pad]. */
template <typename T, int ROWS, int DEPTH>
__device__ __forceinline__ void bring_u(T *us, const mix_tile<ROWS> &t, const psoup__mix_expand_args &a,
                                        const psoup__mix_part &part, const mix_slice *slices, int n) {
    bring<sizeof(T) == 2 ? 8 : 4, T>(
        n * ROWS * 4,
        [&](int q) {
            const int r = q / 4 % ROWS, s = q / 4 / ROWS, i = slices[s].adapter;
            const psoup__mix_adapter &adapter = a.adapter[part.first + i];
            const bool used = t.share[i][r] != 0;
            const int use = t.low[i] + (used ? t.place[i][r] : 0);
            return fetch(adapter.u + (size_t)use * adapter.rank + slices[s].rank0, q % 4 * 4,
                         used ? adapter.rank - slices[s].rank0 : 0, adapter.rank % 4 == 0 && aligned16(adapter.u));
        },
        [&](int q) { return us + q / 4 % ROWS * (DEPTH + in_pack<T>) + q / 4 / ROWS * 16 + q % 4 * 4; });
}

/* The factors of n slices at COLUMNS columns from column0 on: as B lies, [COLUMNS][DEPTH + pad], or as A
 * does, [DEPTH][COLUMNS + pad]. */
template <typename T, int COLUMNS, int DEPTH, bool B_LAYOUT>
__device__ __forceinline__ void bring_factors(T *fs, const psoup__mix_expand_args &a, const psoup__mix_part &part,
                                              const mix_slice *slices, int n, int column0) {
    const int columns = part.width - column0;
    bring<sizeof(T) == 2 ? 8 : 4, T>(
        n * COLUMNS * 4,
        [&](int q) {
            const mix_slice &slice = slices[q / 4 / COLUMNS];
            const psoup__mix_adapter &adapter = a.adapter[part.first + slice.adapter];
            const int rank = adapter.rank, c = q / 4 % COLUMNS, k = slice.rank0 + q / (COLUMNS / 4) % 16;
            if constexpr (B_LAYOUT)
                return fetch(adapter.factor + (size_t)(column0 + (c < columns ? c : 0)) * rank + slice.rank0,
                             q % 4 * 4, c < columns ? rank - slice.rank0 : 0,
                             rank % 4 == 0 && aligned16(adapter.factor));
            else
                return fetch(adapter.factor + (size_t)(k < rank ? k : 0) * part.width + column0,
                             q % (COLUMNS / 4) * 4, k < rank ? columns : 0,
                             part.width % 4 == 0 && aligned16(adapter.factor));
        },
        [&](int q) {
            if constexpr (B_LAYOUT)
                return fs + q / 4 % COLUMNS * (DEPTH + in_pack<T>) + q / 4 / COLUMNS * 16 + q % 4 * 4;
            else
                return fs + q / (COLUMNS / 4) * (COLUMNS + in_pack<T>) + q % (COLUMNS / 4) * 4;
        });
}

/* Four warps share a tile of ROWS rows by rows (DOWN 4), one of FEW by columns (DOWN 1). The slices of all
 * adapters lie one after another along k, as many as fit at a time; where an adapter ends, its sum is weighed
 * and added. That a share of 0 is skipped there, and not multiplied, keeps NaN away from other rows. */
template <typename T, int DOWN, bool B_LAYOUT>
__device__ __forceinline__ void expand(const psoup__mix_expand_args &a) {
    constexpr int ROWS = 16 * DOWN, COLUMNS = PSOUP__MIX_COLUMNS, NT = COLUMNS / 8 * DOWN / 4;
    constexpr int DEPTH = 256 / (int)sizeof(T), SLICES = DEPTH / 16, LD = DEPTH + in_pack<T>;
    constexpr int FACTOR_ROWS = B_LAYOUT ? COLUMNS : DEPTH, FACTOR_LD = B_LAYOUT ? LD : COLUMNS + in_pack<T>;
    SHARED pack<T> u_tile[ROWS * LD / in_pack<T>], factor_tile[FACTOR_ROWS * FACTOR_LD / in_pack<T>];
    SHARED mix_tile<ROWS> mix;
    SHARED mix_slice slices[SLICES];
    T *const us = reinterpret_cast<T *>(u_tile), *const fs = reinterpret_cast<T *>(factor_tile);

    const psoup__mix_part &part = a.part[blockIdx.z];
    if ((int)blockIdx.y * a.span * COLUMNS >= part.width)
        return;
    const int row0 = (int)blockIdx.x * ROWS, warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    const int m = DOWN == 4 ? warp * 16 : 0, n = DOWN == 4 ? 0 : warp * 16;
    const bool pairs = part.width % 2 == 0 && (reinterpret_cast<uintptr_t>(part.y) & 7) == 0;
    look_up(mix, a, part, row0);
    const int all = mix.slices[part.n];
    const int end = min((int)(blockIdx.y + 1) * a.span * COLUMNS, part.width);
    for (int column0 = (int)blockIdx.y * a.span * COLUMNS; column0 < end; column0 += COLUMNS) {
        float d[NT][4], y[NT][4] = {};
#pragma unroll
        for (int t = 0; t < NT; t++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int row = row0 + m + lane / 4 + c / 2 * 8;
                const int column = column0 + n + t * 8 + lane % 4 * 2 + c % 2;
                d[t][c] = row >= a.rows || column >= part.width ? 0
                          : a.add     ? part.y[(size_t)row * part.width + column]
                          : part.bias ? part.bias[column]
                                      : 0;
            }
        for (int first = 0; first < all; first += SLICES) {
            const int some = min(SLICES, all - first);
            const bool bring = all > SLICES || column0 == (int)blockIdx.y * a.span * COLUMNS;
            __syncthreads();
            if (bring && (int)threadIdx.x < some) {
                const int at = first + (int)threadIdx.x, i = adapter_of(mix.slices, at);
                slices[threadIdx.x] = {i, (at - mix.slices[i]) * 16, at + 1 == mix.slices[i + 1]};
            }
            __syncthreads();
            if (bring)
                bring_u<T, ROWS, DEPTH>(us, mix, a, part, slices, some);
            bring_factors<T, COLUMNS, DEPTH, B_LAYOUT>(fs, a, part, slices, some, column0);
            __syncthreads();
            for (int s = 0; s < some && row0 + m < a.rows; s++) {
                const T *f = B_LAYOUT ? fs + n * FACTOR_LD + s * 16 : fs + s * 16 * FACTOR_LD + n;
                multiply<T, true, B_LAYOUT, NT>(y, us + m * LD + s * 16, LD, f, FACTOR_LD, NT * 8);
                if (!slices[s].last)
                    continue;
                const float *share = mix.share[slices[s].adapter] + m + lane / 4;
                const float share0 = share[0], share1 = share[8];
#pragma unroll
                for (int t = 0; t < NT; t++)
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const float factor = c < 2 ? share0 : share1;
                        d[t][c] = factor != 0 ? d[t][c] + factor * y[t][c] : d[t][c];
                        y[t][c] = 0;
                    }
            }
        }
#pragma unroll
        for (int t = 0; t < NT; t++)
#pragma unroll
            for (int c = 0; c < 4; c += 2) {
                const int row = row0 + m + lane / 4 + c / 2 * 8, column = column0 + n + t * 8 + lane % 4 * 2;
                float *out = part.y + (size_t)row * part.width + column;
                if (row >= a.rows || column >= part.width)
                    continue;
                if (pairs) {
                    *reinterpret_cast<float2 *>(out) = {d[t][c], d[t][c + 1]};
                } else {
                    out[0] = d[t][c];
                    if (column + 1 < part.width)
                        out[1] = d[t][c + 1];
                }
            }
    }
}

#endif
