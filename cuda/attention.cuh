/* cuda/attention.cuh: what the kernels of attention and of its gradients share.
 *
 * Tiles for tensor cores lie in shared memory as rows of DIM 16-bit numbers, in chunks of 16 bytes: chunk
 * c of row r is where chunk c ^ r % 8 would be. Eight rows' chunk c then lie in all banks once, which is
 * what ldmatrix reads.
 */
#ifndef PSOUP__ATTENTION_CUH
#define PSOUP__ATTENTION_CUH

#include "mma.cuh"

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

/* ---- who does what
 * ---------------------------------------------------------------------------------------- */

/* The span, key head and tile of a block, and where its rows are. */
struct place {
    psoup__attention_span span;
    int group, kv_head, tile;
    int rows; /* of the span: queries · group */
    int past; /* keys before the first query */
    int64_t width; /* of q */

    template <typename A> __device__ __forceinline__ place(const A &a, unsigned block, int least = 1) {
        const unsigned head = block / a.tiles;
        span = a.spans[head / a.kv_heads];
        kv_head = head % a.kv_heads;
        tile = block % a.tiles;
        group = a.heads / a.kv_heads;
        rows = span.queries < least ? 0 : span.queries * group;
        past = span.keys - span.queries;
        width = (int64_t)a.heads * a.head_dim;
    }
    /* The last key that a row sees. */
    __device__ __forceinline__ int position(int row) const { return past + row / group; }
    /* Its query's row in the batch; its head. */
    __device__ __forceinline__ int64_t query(int row) const { return span.query + row / group; }
    __device__ __forceinline__ int head(int row) const { return kv_head * group + row % group; }
    /* Where its numbers begin. */
    __device__ __forceinline__ int64_t at(int row, int dim) const {
        return query(row) * width + head(row) * dim;
    }
};

/* ---- tensor cores
 * ----------------------------------------------------------------------------------------- */

/* Where a chunk begins. 2 n chunks on from chunk 0 or 1 of a row is ^ 16 n. */
template <int DIM> __device__ __forceinline__ int chunk_at(int row, int chunk) {
    return row * DIM + ((chunk ^ (row & 7)) << 3);
}

/* Rows `stride` apart on their way to a tile, zeros from row `n` on. */
template <int DIM, int ROWS, int THREADS, typename T>
__device__ __forceinline__ void copy_rows(T *tile, const T *from, int64_t stride, int n) {
    constexpr int CHUNKS = DIM / 8, STEP = THREADS / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
    from += first * stride + chunk * 8;
#pragma unroll
    for (int row = 0; row < ROWS; row += STEP) {
        copy16(tile + chunk_at<DIM>(first + row, chunk), from, first + row < n);
        from += STEP * stride;
    }
}

template <int M, int N> __device__ __forceinline__ void zero_sums(float (&s)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                s[m][n][i] = 0;
}

/* s = A Bᵀ: 16 · M rows of tile a from `row` on, N · 8 rows of tile b from `column` on. */
template <typename T, int DIM, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&s)[M][N][4], const T *a, int row, const T *b,
                                              int column) {
    const int lane = threadIdx.x % 32;
    const int left = chunk_at<DIM>(row + lane % 16, lane / 16);
    const int right = chunk_at<DIM>(column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    zero_sums(s);
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
        uint32_t x[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
            load_matrices(x[m], a + (left ^ k * 16) + m * 16 * DIM);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t y[4];
            load_matrices(y, b + (right ^ k * 16) + n * 8 * DIM);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma<T>(s[m][n], x[m], y);
                mma<T>(s[m][n + 1], x[m], y + 2);
            }
        }
    }
}

/* Sums of a product become the left operand of the next: columns 16 k … 16 k + 15. */
template <typename T, int N>
__device__ __forceinline__ void round_rows(uint32_t a[4], const float (&s)[N][4], int k) {
    a[0] = pair_of<T>(s[2 * k][0], s[2 * k][1]);
    a[1] = pair_of<T>(s[2 * k][2], s[2 * k][3]);
    a[2] = pair_of<T>(s[2 * k + 1][0], s[2 * k + 1][1]);
    a[3] = pair_of<T>(s[2 * k + 1][2], s[2 * k + 1][3]);
}

/* Where a lane's part of a right operand [16, 16] is whose rows are the first 16 of a tile; those 16 · k
 * rows on and 16 · n columns on are at (columns_at ^ n · 16) + k · 16 · DIM. */
template <int DIM> __device__ __forceinline__ int columns_at() {
    const int lane = threadIdx.x % 32;
    return chunk_at<DIM>(lane % 16, lane / 16);
}

/* o += S B: S [16 · M, N · 8] rounded, B the N · 8 rows of tile b from `row` on and its columns from
 * `column` on, as many as o has. */
template <typename T, int DIM, int M, int N, int O>
__device__ __forceinline__ void multiply_columns(float (&o)[M][O][4], const float (&s)[M][N][4],
                                                 const T *b, int row, int column) {
    const int at = columns_at<DIM>();
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        uint32_t x[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
            round_rows<T>(x[m], s[m], k);
#pragma unroll
        for (int n = 0; n < O; n += 2) {
            uint32_t y[4];
            load_matrices_transposed(y, b + (at ^ (column + n * 8)) + (row + k * 16) * DIM);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma<T>(o[m][n], x[m], y);
                mma<T>(o[m][n + 1], x[m], y + 2);
            }
        }
    }
}

/* ---- plain
 * ------------------------------------------------------------------------------------------------ */

/* Thread t works on row t / 8 of its tile: on columns t % 8 + 8 i, i < 4, of a product of two tiles, and
 * on the numbers from 4 · (t % 8) + 32 i on, i < SUMS, of a sum of rows. A row's threads are lanes of one
 * warp. */
enum {
    PLAIN_TILE = PSOUP__PLAIN_ATTENTION_TILE,
    PLAIN_THREADS = PSOUP__PLAIN_ATTENTION_THREADS,
    PLAIN_SUMS = PSOUP__PLAIN_ATTENTION_DIM / 32
};

/* Rows of a plain tile, `from(row)` each (NULL: zeros), zeros up to a multiple of 4. */
template <typename F> __device__ __forceinline__ void plain_load(float *tile, int dim, F from) {
    const int pitch = PSOUP__PLAIN_ATTENTION_PITCH(dim);
    for (int row = threadIdx.x / 32; row < PLAIN_TILE; row += PLAIN_THREADS / 32) {
        const auto *source = from(row);
        for (int d = threadIdx.x % 32; d < pitch; d += 32)
            tile[row * pitch + d] = source && d < dim ? to_float(source[d]) : 0;
    }
}

__device__ __forceinline__ void plain_products(float (&s)[4], const float *a, const float *b, int dim) {
    const int pitch = PSOUP__PLAIN_ATTENTION_PITCH(dim);
    const float *x = a + threadIdx.x / 8 * pitch, *y = b + threadIdx.x % 8 * pitch;
    s[0] = s[1] = s[2] = s[3] = 0;
#pragma unroll 1
    for (int d = 0; d < dim; d += 4) {
        const pack<float> p = load_pack(x + d);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const pack<float> q = load_pack(y + i * 8 * pitch + d);
            s[i] += p.x[0] * q.x[0] + p.x[1] * q.x[1] + p.x[2] * q.x[2] + p.x[3] * q.x[3];
        }
    }
}

/* o += Σ_j w_j row j of the tile, j from `first` to `end` alone; w as plain_products leaves it. */
__device__ __forceinline__ void plain_sums(float (&o)[PLAIN_SUMS][4], const float (&w)[4],
                                           const float *tile, int dim, int first, int end) {
    const int pitch = PSOUP__PLAIN_ATTENTION_PITCH(dim), column = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < 4; i++)
        for (int c = 0; c < 8; c++) {
            const int j = i * 8 + c;
            const float weight = __shfl_sync(0xffffffffu, w[i], (threadIdx.x & 24) + c);
            if (j < first || j >= end)
                continue;
#pragma unroll
            for (int n = 0; n < PLAIN_SUMS; n++) {
                if (n * 32 + column * 4 >= dim)
                    continue;
                const pack<float> x = load_pack(tile + j * pitch + n * 32 + column * 4);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    o[n][e] += weight * x.x[e];
            }
        }
}

__device__ __forceinline__ void plain_zero(float (&o)[PLAIN_SUMS][4]) {
#pragma unroll
    for (int n = 0; n < PLAIN_SUMS; n++)
        o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0;
}

/* out (= or +=) scale · o, a row of dim numbers. */
template <bool ADD>
__device__ __forceinline__ void plain_store(float *out, const float (&o)[PLAIN_SUMS][4], float scale,
                                            int dim) {
#pragma unroll
    for (int n = 0; n < PLAIN_SUMS; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int d = n * 32 + threadIdx.x % 8 * 4 + e;
            if (d < dim)
                out[d] = (ADD ? out[d] : 0) + scale * o[n][e];
        }
}

#endif
