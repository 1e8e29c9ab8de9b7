/* Causal attention over spans, forward: online softmax over tiles of keys (Dao 2023, FlashAttention-2).
 *
 * On tensor cores a block of 4 warps has 128 rows (64 at head_dim 256), a warp 32 (16) of them: their
 * scores, and the sums they become, never leave its registers, and each fragment of K and V read from
 * shared memory meets two of Q and of P. Shared memory holds the tile of Q and two stages of K and V, one
 * arriving while the other is worked on: 64 KB at head_dim 128, so that two blocks share a
 * multiprocessor.
 *
 * A key beyond a row's position is never felt, be it NaN: its score is replaced; and where a tile has
 * keys that some rows see and others do not, values that are not finite are kept out of the products, and
 * the rows that see them become NaN at the end.
 */
#include "attention.cuh"

enum { WARPS = PSOUP__ATTENTION_WARPS, THREADS = PSOUP__ATTENTION_THREADS, KEYS = PSOUP__ATTENTION_KEYS };

/* Row of key j of a span. With pages of a multiple of KEYS rows those of a tile follow one another. */
__device__ __forceinline__ int64_t row_of_key(const psoup__attention_args &a, const place &p, int j) {
    if (!a.pages)
        return (int64_t)p.span.first + j;
    return (int64_t)a.pages[p.span.first + j / a.page] * a.page + j % a.page;
}

/* Keys and values from `start` on, on their way to a stage. */
template <int DIM, typename T>
__device__ __forceinline__ void copy_keys(T *stage, const psoup__attention_args &a, const place &p,
                                          int start) {
    const int64_t at = row_of_key(a, p, start) * a.stride + p.kv_head * DIM;
    const int left = p.span.keys - start;
    copy_rows<DIM, KEYS, THREADS>(stage, static_cast<const T *>(a.k) + at, a.stride, left);
    copy_rows<DIM, KEYS, THREADS>(stage + KEYS * DIM, static_cast<const T *>(a.v) + at, a.stride, left);
    copy_commit();
}

/* Rows of q from `first` on, rounded; zeros beyond the span's. */
template <int DIM, int ROWS, typename T>
__device__ __forceinline__ void load_queries(T *tile, const psoup__attention_args &a, const place &p,
                                             int first) {
    constexpr int CHUNKS = DIM / 8, STEP = THREADS / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS;
#pragma unroll 4
    for (int row = threadIdx.x / CHUNKS; row < ROWS; row += STEP) {
        pack<float> low = {}, high = {};
        if (first + row < p.rows) {
            const float *q = a.q + p.at(first + row, DIM) + chunk * 8;
            low = load_pack(q);
            high = load_pack(q + 4);
        }
        pack<T> rounded;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            rounded.x[i] = from_float<T>(low.x[i]);
            rounded.x[i + 4] = from_float<T>(high.x[i]);
        }
        store_pack(tile + chunk_at<DIM>(row, chunk), rounded);
    }
}

/* What rows hold between tiles of keys. With g = lane / 4, rows g and g + 8 of each 16. */
template <int DIM, int M> struct running {
    float out[M][DIM / 8][4];
    float max[M][2]; /* of the scores as they are */
    float sum[M][2]; /* of exp2((score − max) · scale) over this lane's columns */
};

/* Scores become weights; what was summed before is brought to the new maximum. */
template <int DIM, int M, int N>
__device__ __forceinline__ void soften(running<DIM, M> &r, float (&s)[M][N][4], float scale) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float most = r.max[m][h];
#pragma unroll
            for (int n = 0; n < N; n++)
                most = fmaxf(most, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
            const float keep = fast_exp2((r.max[m][h] - most) * scale), base = most * scale;
            float sum = 0;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 2 * h; i < 2 * h + 2; i++) {
                    s[m][n][i] = fast_exp2(s[m][n][i] * scale - base);
                    sum += s[m][n][i];
                }
            r.max[m][h] = most;
            r.sum[m][h] = r.sum[m][h] * keep + sum;
            if (__ballot_sync(0xffffffffu, keep != 1) == 0)
                continue;
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
                r.out[m][n][2 * h] *= keep;
                r.out[m][n][2 * h + 1] *= keep;
            }
        }
}

__device__ __forceinline__ bool finite(float x) { return fabsf(x) <= 3.4028235e38f; }

/* Of what this thread copied to a tile of values: zeros for numbers that are not finite, and to `least`
 * the first key that had one. */
template <int DIM, typename T> __device__ __forceinline__ void clean(T *tile, int start, int *least) {
    constexpr int CHUNKS = DIM / 8, STEP = THREADS / CHUNKS;
    const int thread = threadIdx.x;
#pragma unroll 1
    for (int row = thread / CHUNKS; row < KEYS; row += STEP) {
        T *at = tile + chunk_at<DIM>(row, thread % CHUNKS);
        pack<T> x = load_pack(at);
        bool all = true;
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (!finite(to_float(x.x[i]))) {
                x.x[i] = from_float<T>(0);
                all = false;
            }
        if (!all) {
            store_pack(at, x);
            atomicMin(least, start + row);
        }
    }
}

template <int DIM, int M>
__device__ __forceinline__ void begin_rows(running<DIM, M> &r) {
    zero_sums(r.out);
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            r.max[m][h] = -INFINITY;
            r.sum[m][h] = 0;
        }
    }
}

template <int DIM, int M>
__device__ __forceinline__ void end_rows(const running<DIM, M> &r, const psoup__attention_args &a,
                                         const place &p, int first, int least) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = r.sum[m][h];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const int row = first + m * 16 + h * 8 + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
            if (row >= p.rows)
                continue;
            float *out = a.out + p.at(row, DIM);
            const float scale = p.position(row) < least ? 1 / sum : NAN;
#pragma unroll
            for (int n = 0; n < DIM / 8; n++)
                *reinterpret_cast<float2 *>(out + n * 8 + t * 2) =
                    float2{r.out[m][n][2 * h] * scale, r.out[m][n][2 * h + 1] * scale};
            if (a.lse && t == 0)
                a.lse[p.query(row) * a.heads + p.head(row)] = r.max[m][h] * a.scale + __logf(sum);
        }
}

/* Scores of keys that a row does not see. */
template <int M, int N>
__device__ __forceinline__ void hide(float (&s)[M][N][4], const place &p, int first, int start) {
    const int column = start + threadIdx.x % 4 * 2;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int last = p.position(first + m * 16 + h * 8 + threadIdx.x % 32 / 4);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (column + n * 8 + i > min(last, p.span.keys - 1))
                        s[m][n][2 * h + i] = -INFINITY;
        }
}

template <typename T, int DIM> __device__ __forceinline__ void attend(const psoup__attention_args &a) {
    constexpr int ROWS = PSOUP__ATTENTION_ROWS(DIM), M = ROWS / WARPS / 16;
    DYNAMIC_SHARED(T, q);
    T *const stages = q + ROWS * DIM; /* each a tile of keys and one of values */
    SHARED int least;
    const place p(a, blockIdx.x, a.least);
    const int tile = (a.tiles - 1 - p.tile) * ROWS; /* those with most keys first */
    if (tile >= p.rows)
        return;
    const int whole = p.position(tile) + 1; /* keys that all the rows see */
    const int keys = min(p.position(tile + ROWS - 1) + 1, p.span.keys);
    const int mine = threadIdx.x / 32 * M * 16;
    if (threadIdx.x == 0)
        least = 0x7fffffff;
    copy_keys<DIM>(stages, a, p, 0);
    load_queries<DIM, ROWS>(q, a, p, tile);
    __syncthreads();
    running<DIM, M> r;
    begin_rows(r);
    for (int start = 0; start < keys; start += KEYS) {
        float s[M][KEYS / 8][4];
        T *const k = stages + start / KEYS % 2 * (2 * KEYS * DIM), *const v = k + KEYS * DIM;
        const bool edge = start + KEYS > whole;
        copy_wait<0>();
        if (edge)
            clean<DIM>(v, start, &least);
        __syncthreads();
        if (start + KEYS < keys)
            copy_keys<DIM>(stages + (start / KEYS + 1) % 2 * (2 * KEYS * DIM), a, p, start + KEYS);
        multiply_rows<T, DIM>(s, q, mine, k, 0);
        if (edge)
            hide(s, p, tile + mine, start);
        soften(r, s, a.scale * LOG2_E);
        multiply_columns<T, DIM>(r.out, s, v, 0, 0);
    }
    end_rows(r, a, p, tile + mine, least);
}

PSOUP__KERNEL_AS(attention_bf16_64, attention, PSOUP__ATTENTION_THREADS) { attend<bf16, 64>(a); }
PSOUP__KERNEL_AS(attention_bf16_128, attention, PSOUP__ATTENTION_THREADS) { attend<bf16, 128>(a); }
PSOUP__KERNEL_AS(attention_bf16_256, attention, PSOUP__ATTENTION_THREADS) { attend<bf16, 256>(a); }
PSOUP__KERNEL_AS(attention_f16_64, attention, PSOUP__ATTENTION_THREADS) { attend<f16, 64>(a); }
PSOUP__KERNEL_AS(attention_f16_128, attention, PSOUP__ATTENTION_THREADS) { attend<f16, 128>(a); }
PSOUP__KERNEL_AS(attention_f16_256, attention, PSOUP__ATTENTION_THREADS) { attend<f16, 256>(a); }

/* ---- keys and values of a batch, rounded
 * ------------------------------------------------------------------- */

/* A warp to a key, two numbers at a time. */
template <typename T> __device__ __forceinline__ void round_keys(const psoup__attention_round_args &a) {
    const psoup__attention_span span = a.spans[blockIdx.x / a.blocks];
    const int key = blockIdx.x % a.blocks * (PSOUP__ROUND_THREADS / 32) + threadIdx.x / 32;
    if (key >= span.keys)
        return;
    const int64_t row = span.first + key;
    uint32_t *out = reinterpret_cast<uint32_t *>(static_cast<T *>(a.out) + row * a.pitch);
    const float2 *k = reinterpret_cast<const float2 *>(a.k + row * a.stride);
    const float2 *v = reinterpret_cast<const float2 *>(a.v + row * a.stride);
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < a.width / 2; i += 32) {
        const float2 x = k[i], y = v[i];
        out[i] = pair_of<T>(x.x, x.y);
        out[a.width / 2 + i] = pair_of<T>(y.x, y.y);
    }
}

PSOUP__KERNEL_AS(attention_round_bf16, attention_round, PSOUP__ROUND_THREADS) { round_keys<bf16>(a); }
PSOUP__KERNEL_AS(attention_round_f16, attention_round, PSOUP__ROUND_THREADS) { round_keys<f16>(a); }

/* ---- any head_dim, in f32
 * ---------------------------------------------------------------------------------- */

/* A tile of rows, and tiles of keys after that of their values in the same room. */
template <typename T> __device__ __forceinline__ void attend_plain(const psoup__attention_args &a) {
    const int dim = a.head_dim;
    DYNAMIC_SHARED(float, q);
    float *const other = q + PLAIN_TILE * PSOUP__PLAIN_ATTENTION_PITCH(dim);
    place p(a, blockIdx.x);
    const int tile = (a.tiles - 1 - p.tile) * PLAIN_TILE, row = tile + threadIdx.x / 8;
    if (tile >= p.rows)
        return;
    const int last = min(p.position(row), p.span.keys - 1);
    const int keys = min(p.position(tile + PLAIN_TILE - 1) + 1, p.span.keys);
    int start = 0;
    const T *from;
    const auto key = [&](int j) -> const T * {
        if (start + j >= p.span.keys)
            return nullptr;
        return from + row_of_key(a, p, start + j) * a.stride + (int64_t)p.kv_head * dim;
    };
    plain_load(q, dim, [&](int i) -> const float * {
        return tile + i < p.rows ? a.q + p.at(tile + i, dim) : nullptr;
    });
    float o[PLAIN_SUMS][4], most = -INFINITY, sum = 0;
    plain_zero(o);
    for (; start < keys; start += PLAIN_TILE) {
        float s[4], next = most, part = 0;
        __syncthreads();
        from = static_cast<const T *>(a.k);
        plain_load(other, dim, key);
        __syncthreads();
        plain_products(s, q, other, dim);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[i] = start + (int)threadIdx.x % 8 + 8 * i <= last ? s[i] * a.scale * LOG2_E : -INFINITY;
            next = fmaxf(next, s[i]);
        }
        for (int mask = 4; mask > 0; mask >>= 1)
            next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, mask));
        const float keep = fast_exp2(most - next);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[i] = fast_exp2(s[i] - next);
            part += s[i];
        }
        most = next;
        sum = sum * keep + part;
#pragma unroll
        for (int n = 0; n < PLAIN_SUMS; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                o[n][e] *= keep;
        __syncthreads();
        from = static_cast<const T *>(a.v);
        plain_load(other, dim, key);
        __syncthreads();
        plain_sums(o, s, other, dim, 0, last + 1 - start);
    }
    for (int mask = 4; mask > 0; mask >>= 1)
        sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (row >= p.rows)
        return;
    plain_store<false>(a.out + p.at(row, dim), o, 1 / sum, dim);
    if (a.lse && threadIdx.x % 8 == 0)
        a.lse[p.query(row) * a.heads + p.head(row)] = most * LN_2 + __logf(sum);
}

PSOUP__KERNEL_AS(attention_plain_f32, attention, PSOUP__PLAIN_ATTENTION_THREADS) { attend_plain<float>(a); }
PSOUP__KERNEL_AS(attention_plain_bf16, attention, PSOUP__PLAIN_ATTENTION_THREADS) { attend_plain<bf16>(a); }
PSOUP__KERNEL_AS(attention_plain_f16, attention, PSOUP__PLAIN_ATTENTION_THREADS) { attend_plain<f16>(a); }
