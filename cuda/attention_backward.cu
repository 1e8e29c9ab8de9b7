/* Causal attention over spans, backward (Dao 2023, FlashAttention-2, algorithm 2). With p = exp(s − lse)
 * and D = <dout, out>:
 *
 *     ds = scale · p · (dout vᵀ − D)     dq = ds k     dk += dsᵀ q     dv += pᵀ dout
 *
 * Two kernels take p and ds anew, so that every sum has one owner and one order: attention_dkdv, whose
 * blocks have a tile of keys and go over the rows that see them, and attention_dq, whose blocks have a
 * tile of rows. In both, p and ds stay in the registers in which they come out of one product and go into
 * the next; dkdv takes them transposed.
 *
 * On tensor cores everything is rounded to bf16, for f16 weights too: gradients of a mean over many
 * tokens are smaller than what f16 can say.
 */
#include "attention.cuh"

enum { WARPS = PSOUP__ATTENTION_WARPS, THREADS = PSOUP__ATTENTION_THREADS };

/* ---- before both
 * ------------------------------------------------------------------------------------------- */

template <bool ROUND> __device__ __forceinline__ void prepare(const psoup__attention_prepare_args &a) {
    const psoup__attention_span span = a.spans[blockIdx.x / a.blocks];
    const int pair = blockIdx.x % a.blocks * (PSOUP__ROUND_THREADS / 32) + threadIdx.x / 32;
    const int query = pair / a.heads, head = pair % a.heads, lane = threadIdx.x % 32;
    if (query >= span.queries)
        return;
    const int64_t row = span.query + query, at = (row * a.heads + head) * a.head_dim;
    float sum = 0;
    if (ROUND) {
        const int64_t to = row * a.pitch + head * a.head_dim;
        for (int d = 2 * lane; d < a.head_dim; d += 64) {
            const float2 x = *reinterpret_cast<const float2 *>(a.dout + at + d);
            const float2 y = *reinterpret_cast<const float2 *>(a.out + at + d);
            const float2 q = *reinterpret_cast<const float2 *>(a.q + at + d);
            sum += x.x * y.x + x.y * y.y;
            *reinterpret_cast<uint32_t *>(static_cast<bf16 *>(a.dout16) + to + d) = pair_of<bf16>(x.x, x.y);
            *reinterpret_cast<uint32_t *>(static_cast<bf16 *>(a.q16) + to + d) = pair_of<bf16>(q.x, q.y);
        }
    } else {
        for (int d = lane; d < a.head_dim; d += 32)
            sum += a.dout[at + d] * a.out[at + d];
    }
    sum = warp_sum(sum);
    if (lane == 0)
        *reinterpret_cast<float2 *>(a.stats + row * a.stats_pitch + 2 * head) =
            float2{a.lse[row * a.heads + head] * LOG2_E, sum};
}

PSOUP__KERNEL_AS(attention_prepare_bf16, attention_prepare, PSOUP__ROUND_THREADS) { prepare<true>(a); }
PSOUP__KERNEL_AS(attention_prepare_plain, attention_prepare, PSOUP__ROUND_THREADS) { prepare<false>(a); }

__device__ __forceinline__ const float *stats_of(const psoup__attention_backward_args &a, const place &p,
                                                 int row) {
    return a.stats + p.query(row) * a.stats_pitch + 2 * p.head(row);
}

/* ---- dk and dv on tensor cores
 * ------------------------------------------------------------------------------ */

/* Rows from `first` on, on their way to a stage: q, dout, stats. */
template <int DIM, int ROWS>
__device__ __forceinline__ void copy_queries(bf16 *stage, const psoup__attention_backward_args &a,
                                             const place &p, int first) {
    constexpr int CHUNKS = DIM / 8, STEP = THREADS / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS;
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP) {
        const int row = i + threadIdx.x / CHUNKS;
        const bool there = first + row < p.rows;
        const int64_t at = p.query(first + row) * a.pitch + p.head(first + row) * DIM + chunk * 8;
        bf16 *const to = stage + chunk_at<DIM>(row, chunk);
        copy16(to, static_cast<const bf16 *>(a.q16) + at, there);
        copy16(to + ROWS * DIM, static_cast<const bf16 *>(a.dout16) + at, there);
    }
    if (threadIdx.x < ROWS)
        copy8(stage + 2 * ROWS * DIM + 4 * threadIdx.x, stats_of(a, p, first + threadIdx.x),
              first + (int)threadIdx.x < p.rows);
    copy_commit();
}

/* Scores [16 keys, N · 8 rows] of a warp become weights: 0 where a row does not see a key. */
template <int N>
__device__ __forceinline__ void weigh_keys(float (&s)[N][4], const float *stats, const place &p, int key,
                                           int row, bool edge, float scale) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < N; n++) {
        const pack<float> stat = load_pack(stats + (n * 8 + 2 * t) * 2);
#pragma unroll
        for (int i = 0; i < 4; i++)
            s[n][i] = fast_exp2(s[n][i] * scale - stat.x[i % 2 * 2]);
        if (edge)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (key + g + i / 2 * 8 > p.position(row + n * 8 + 2 * t + i % 2))
                    s[n][i] = 0;
    }
}

/* ds / scale from dp = dout vᵀ; a weight of 0 stays 0. */
template <int N>
__device__ __forceinline__ void weigh_gradients(float (&ds)[N][4], const float (&w)[N][4],
                                                const float *stats) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        const pack<float> stat = load_pack(stats + (n * 8 + 2 * (threadIdx.x % 4)) * 2);
#pragma unroll
        for (int i = 0; i < 4; i++)
            ds[n][i] = w[n][i] == 0 ? 0 : w[n][i] * (ds[n][i] - stat.x[i % 2 * 2 + 1]);
    }
}

/* Adds a warp's 16 keys from `key` on, columns from `column` on. */
template <int N>
__device__ __forceinline__ void add_keys(float *out, const float (&sum)[N][4],
                                         const psoup__attention_backward_args &a, const place &p, int key,
                                         int column, float scale) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int j = key + h * 8 + threadIdx.x % 32 / 4;
        if (j >= p.span.keys)
            continue;
        float *row = out + (p.span.first + (int64_t)j) * a.stride + p.kv_head * a.head_dim + column;
#pragma unroll
        for (int n = 0; n < N; n++) {
            float2 *at = reinterpret_cast<float2 *>(row + n * 8 + threadIdx.x % 4 * 2);
            const float2 x = *at;
            *at = float2{x.x + scale * sum[n][2 * h], x.y + scale * sum[n][2 * h + 1]};
        }
    }
}

/* Shared memory: K and V of the tile; two stages of q, dout and stats. */
template <int DIM> __device__ __forceinline__ void keys_gradient(const psoup__attention_backward_args &a) {
    constexpr int KEYS = PSOUP__ATTENTION_DKDV_KEYS, ROWS = PSOUP__ATTENTION_DKDV_ROWS(DIM);
    constexpr int PARTS = PSOUP__ATTENTION_DKDV_PARTS(DIM), OUT = DIM / PARTS;
    constexpr int STAGE = 2 * ROWS * DIM + 4 * ROWS;
    DYNAMIC_SHARED(bf16, k);
    bf16 *const v = k + KEYS * DIM, *const stages = v + KEYS * DIM;
    const place p(a, blockIdx.x);
    const int tile = p.tile / PARTS * KEYS, column = p.tile % PARTS * OUT, mine = threadIdx.x / 32 * 16;
    if (tile >= p.span.keys)
        return;
    const int64_t at = (p.span.first + (int64_t)tile) * a.pitch + p.kv_head * DIM;
    copy_rows<DIM, KEYS, THREADS>(k, static_cast<const bf16 *>(a.k16) + at, a.pitch, p.span.keys - tile);
    copy_rows<DIM, KEYS, THREADS>(v, static_cast<const bf16 *>(a.v16) + at, a.pitch, p.span.keys - tile);
    const int first = max(tile - p.past, 0) * p.group; /* the first row that sees one of the keys */
    copy_queries<DIM, ROWS>(stages, a, p, first);
    float dk[1][OUT / 8][4], dv[1][OUT / 8][4];
    zero_sums(dk);
    zero_sums(dv);
    int which = 0;
    for (int row = first; row < p.rows; row += ROWS, which ^= 1) {
        float w[1][ROWS / 8][4], ds[1][ROWS / 8][4];
        const bf16 *const q = stages + which * STAGE, *const dout = q + ROWS * DIM;
        const float *const stats = reinterpret_cast<const float *>(dout + ROWS * DIM);
        copy_wait<0>();
        __syncthreads();
        if (row + ROWS < p.rows)
            copy_queries<DIM, ROWS>(stages + (which ^ 1) * STAGE, a, p, row + ROWS);
        multiply_rows<bf16, DIM>(w, k, mine, q, 0);
        weigh_keys(w[0], stats, p, tile + mine, row, p.position(row) < tile + KEYS - 1, a.scale * LOG2_E);
        multiply_columns<bf16, DIM>(dv, w, dout, 0, column);
        multiply_rows<bf16, DIM>(ds, v, mine, dout, 0);
        weigh_gradients(ds[0], w[0], stats);
        multiply_columns<bf16, DIM>(dk, ds, q, 0, column);
    }
    copy_wait<0>();
    add_keys(a.dk, dk[0], a, p, tile + mine, column, a.scale);
    add_keys(a.dv, dv[0], a, p, tile + mine, column, 1);
}

PSOUP__KERNEL_AS(attention_dkdv_64, attention_backward, PSOUP__ATTENTION_THREADS) { keys_gradient<64>(a); }
PSOUP__KERNEL_AS(attention_dkdv_128, attention_backward, PSOUP__ATTENTION_THREADS) { keys_gradient<128>(a); }
PSOUP__KERNEL_AS(attention_dkdv_256, attention_backward, PSOUP__ATTENTION_THREADS) { keys_gradient<256>(a); }

/* ---- dq on tensor cores
 * -------------------------------------------------------------------------------------- */

/* Scores and dout vᵀ [16 · M rows, N · 8 keys] of a warp become ds / scale, in ds. */
template <int M, int N>
__device__ __forceinline__ void weigh_rows(float (&ds)[M][N][4], const float (&s)[M][N][4],
                                           const float2 *stats, const place &p, int row, int start, bool edge,
                                           float scale) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float2 stat = stats[m * 16 + h * 8 + g];
            const int last = edge ? p.position(row + m * 16 + h * 8 + g) : p.span.keys;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; i++) {
                    const float w = fast_exp2(s[m][n][i] * scale - stat.x);
                    ds[m][n][i] = start + n * 8 + 2 * t + i % 2 > last ? 0 : w * (ds[m][n][i] - stat.y);
                }
        }
}

/* Shared memory: q, dout and stats of the tile; two stages of K and V. */
template <int DIM> __device__ __forceinline__ void rows_gradient(const psoup__attention_backward_args &a) {
    constexpr int KEYS = PSOUP__ATTENTION_KEYS, ROWS = PSOUP__ATTENTION_ROWS(DIM), M = ROWS / WARPS / 16;
    DYNAMIC_SHARED(bf16, q);
    bf16 *const dout = q + ROWS * DIM, *const stats = dout + ROWS * DIM, *const stages = stats + 4 * ROWS;
    const place p(a, blockIdx.x);
    const int tile = (a.tiles - 1 - p.tile) * ROWS, mine = threadIdx.x / 32 * M * 16; /* most keys first */
    if (tile >= p.rows)
        return;
    const int whole = p.position(tile) + 1, keys = min(p.position(tile + ROWS - 1) + 1, p.span.keys);
    const bf16 *const k = static_cast<const bf16 *>(a.k16) + p.span.first * a.pitch + p.kv_head * DIM;
    const bf16 *const v = static_cast<const bf16 *>(a.v16) + p.span.first * a.pitch + p.kv_head * DIM;
    const auto copy_keys = [&](bf16 *stage, int start) {
        copy_rows<DIM, KEYS, THREADS>(stage, k + start * a.pitch, a.pitch, p.span.keys - start);
        copy_rows<DIM, KEYS, THREADS>(stage + KEYS * DIM, v + start * a.pitch, a.pitch, p.span.keys - start);
        copy_commit();
    };
    constexpr int CHUNKS = DIM / 8;
    for (int row = threadIdx.x / CHUNKS; row < ROWS; row += THREADS / CHUNKS) {
        const int chunk = threadIdx.x % CHUNKS;
        const int64_t at = p.query(tile + row) * a.pitch + p.head(tile + row) * DIM + chunk * 8;
        bf16 *const to = q + chunk_at<DIM>(row, chunk);
        copy16(to, static_cast<const bf16 *>(a.q16) + at, tile + row < p.rows);
        copy16(to + ROWS * DIM, static_cast<const bf16 *>(a.dout16) + at, tile + row < p.rows);
    }
    if (threadIdx.x < ROWS)
        copy8(stats + 4 * threadIdx.x, stats_of(a, p, tile + threadIdx.x), tile + (int)threadIdx.x < p.rows);
    copy_keys(stages, 0);
    float dq[M][DIM / 8][4];
    zero_sums(dq);
    for (int start = 0; start < keys; start += KEYS) {
        float s[M][KEYS / 8][4], ds[M][KEYS / 8][4];
        const bf16 *const stage = stages + start / KEYS % 2 * (2 * KEYS * DIM);
        copy_wait<0>();
        __syncthreads();
        if (start + KEYS < keys)
            copy_keys(stages + (start / KEYS + 1) % 2 * (2 * KEYS * DIM), start + KEYS);
        multiply_rows<bf16, DIM>(s, q, mine, stage, 0);
        multiply_rows<bf16, DIM>(ds, dout, mine, stage + KEYS * DIM, 0);
        weigh_rows(ds, s, reinterpret_cast<const float2 *>(stats) + mine, p, tile + mine, start,
                   start + KEYS > whole, a.scale * LOG2_E);
        multiply_columns<bf16, DIM>(dq, ds, stage, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        const int row = tile + mine + i * 8 + threadIdx.x % 32 / 4;
        if (row >= p.rows)
            continue;
        float *out = a.dq + p.at(row, DIM) + threadIdx.x % 4 * 2;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++)
            *reinterpret_cast<float2 *>(out + n * 8) =
                float2{a.scale * dq[i / 2][n][i % 2 * 2], a.scale * dq[i / 2][n][i % 2 * 2 + 1]};
    }
}

PSOUP__KERNEL_AS(attention_dq_64, attention_backward, PSOUP__ATTENTION_THREADS) { rows_gradient<64>(a); }
PSOUP__KERNEL_AS(attention_dq_128, attention_backward, PSOUP__ATTENTION_THREADS) { rows_gradient<128>(a); }
PSOUP__KERNEL_AS(attention_dq_256, attention_backward, PSOUP__ATTENTION_THREADS) { rows_gradient<256>(a); }

/* ---- any head_dim, in f32
 * ------------------------------------------------------------------------------------ */

/* Shared memory: K and V of a tile of keys; then q, dout and q again of each tile of rows in the same
 * room. */
__device__ __forceinline__ void keys_gradient_plain(const psoup__attention_backward_args &a) {
    const int dim = a.head_dim, size = PLAIN_TILE * PSOUP__PLAIN_ATTENTION_PITCH(dim);
    DYNAMIC_SHARED(float, k);
    float *const v = k + size, *const other = v + size;
    const place p(a, blockIdx.x);
    const int tile = p.tile * PLAIN_TILE, key = tile + threadIdx.x / 8;
    if (tile >= p.span.keys)
        return;
    const auto keys = [&](const float *from, int j) {
        const int64_t at = (p.span.first + (int64_t)tile + j) * a.stride + p.kv_head * dim;
        return tile + j < p.span.keys ? from + at : nullptr;
    };
    plain_load(k, dim, [&](int j) { return keys(a.k, j); });
    plain_load(v, dim, [&](int j) { return keys(a.v, j); });
    float dk[PLAIN_SUMS][4], dv[PLAIN_SUMS][4];
    plain_zero(dk);
    plain_zero(dv);
    const int sees = max(key - p.past, 0) * p.group; /* the first row that sees the key */
    for (int row = max(tile - p.past, 0) * p.group; row < p.rows; row += PLAIN_TILE) {
        float w[4], ds[4];
        const auto rows = [&](const float *from, int i) {
            return row + i < p.rows ? from + p.at(row + i, dim) : nullptr;
        };
        __syncthreads();
        plain_load(other, dim, [&](int i) { return rows(a.q, i); });
        __syncthreads();
        plain_products(w, k, other, dim);
        __syncthreads();
        plain_load(other, dim, [&](int i) { return rows(a.dout, i); });
        __syncthreads();
        plain_products(ds, v, other, dim);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = row + threadIdx.x % 8 + 8 * i;
            const bool seen = r >= sees && r < p.rows;
            const float *stats = stats_of(a, p, seen ? r : 0);
            w[i] = seen ? fast_exp2(w[i] * a.scale * LOG2_E - stats[0]) : 0;
            ds[i] = seen ? w[i] * (ds[i] - stats[1]) : 0;
        }
        plain_sums(dv, w, other, dim, sees - row, p.rows - row);
        __syncthreads();
        plain_load(other, dim, [&](int i) { return rows(a.q, i); });
        __syncthreads();
        plain_sums(dk, ds, other, dim, sees - row, p.rows - row);
    }
    if (key >= p.span.keys)
        return;
    const int64_t at = (p.span.first + (int64_t)key) * a.stride + p.kv_head * dim;
    plain_store<true>(a.dk + at, dk, a.scale, dim);
    plain_store<true>(a.dv + at, dv, 1, dim);
}

/* Shared memory: q and dout of a tile of rows; then V and K of each tile of keys in the same room. */
__device__ __forceinline__ void rows_gradient_plain(const psoup__attention_backward_args &a) {
    const int dim = a.head_dim, size = PLAIN_TILE * PSOUP__PLAIN_ATTENTION_PITCH(dim);
    DYNAMIC_SHARED(float, q);
    float *const dout = q + size, *const other = dout + size;
    const place p(a, blockIdx.x);
    const int tile = (a.tiles - 1 - p.tile) * PLAIN_TILE, row = tile + threadIdx.x / 8;
    if (tile >= p.rows)
        return;
    const auto rows = [&](const float *from, int i) {
        return tile + i < p.rows ? from + p.at(tile + i, dim) : nullptr;
    };
    plain_load(q, dim, [&](int i) { return rows(a.q, i); });
    plain_load(dout, dim, [&](int i) { return rows(a.dout, i); });
    const float *stats = stats_of(a, p, min(row, p.rows - 1));
    const float lse = stats[0], inner = stats[1];
    const int end = min(p.position(tile + PLAIN_TILE - 1) + 1, p.span.keys);
    float dq[PLAIN_SUMS][4];
    plain_zero(dq);
    for (int start = 0; start < end; start += PLAIN_TILE) {
        float s[4], ds[4];
        const auto keys = [&](const float *from, int j) {
            const int64_t at = (p.span.first + (int64_t)start + j) * a.stride + p.kv_head * dim;
            return start + j < p.span.keys ? from + at : nullptr;
        };
        __syncthreads();
        plain_load(other, dim, [&](int j) { return keys(a.v, j); });
        __syncthreads();
        plain_products(ds, dout, other, dim);
        __syncthreads();
        plain_load(other, dim, [&](int j) { return keys(a.k, j); });
        __syncthreads();
        plain_products(s, q, other, dim);
#pragma unroll
        for (int i = 0; i < 4; i++)
            ds[i] = fast_exp2(s[i] * a.scale * LOG2_E - lse) * (ds[i] - inner);
        plain_sums(dq, ds, other, dim, 0, p.position(row) + 1 - start);
    }
    if (row < p.rows)
        plain_store<false>(a.dq + p.at(row, dim), dq, a.scale, dim);
}

PSOUP__KERNEL_AS(attention_dkdv_plain, attention_backward, PSOUP__PLAIN_ATTENTION_THREADS) {
    keys_gradient_plain(a);
}
PSOUP__KERNEL_AS(attention_dq_plain, attention_backward, PSOUP__PLAIN_ATTENTION_THREADS) {
    rows_gradient_plain(a);
}
