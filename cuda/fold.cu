/* Adapters folded into a weight: the base read once, the result written once, sums in registers between.
 *
 * A block makes a tile of 64 rows × 128 columns, a thread 4 rows × (4 + 4) columns of it; half-warps read
 * and write 4 · 16 elements side by side. Sums start from the base and take the depths of all adapters in
 * ascending order, one fused multiply-add each, B first multiplied by w s: what the CPU does where it has
 * fused operations. Depths come through shared memory in steps of 16, A as [16][128], B turned as [16][64];
 * the next step is on its way while one is used. Everything is f32, whose bits no unit for matrices keeps. */
#include "dtypes.cuh"

enum {
    ROWS = PSOUP__FOLD_TILE_ROWS,
    COLUMNS = PSOUP__FOLD_TILE_COLUMNS,
    THREADS = PSOUP__FOLD_THREADS,
    DEPTH = 16,
    ACROSS = COLUMNS / 8, /* threads along a row */
    B_ROW = ROWS + 4      /* fewer of the turned stores meet in one bank */
};
static_assert(THREADS == ACROSS * ROWS / 4, "4 × 8 elements to a thread");

/* Four elements from `column` on; those outside are 0. */
template <typename T>
__device__ __forceinline__ void read_four(T of, float *x, const char *row, int column, int columns,
                                          bool wide) {
    if constexpr (sizeof(T) <= 4) {
        if (wide && column + 4 <= columns) {
            struct alignas(4 * sizeof(T)) four { T x[4]; };
            const four v = *reinterpret_cast<const four *>(row + column * sizeof(T));
#pragma unroll
            for (int c = 0; c < 4; c++)
                x[c] = to_float(v.x[c]);
            return;
        }
    }
#pragma unroll
    for (int c = 0; c < 4; c++)
        x[c] = column + c < columns ? read_element(of, row, column + c) : 0;
}

template <typename T>
__device__ __forceinline__ void write_four(T, const float *x, char *row, bool inside, int column, int columns,
                                           bool wide) {
    if constexpr (sizeof(T) <= 4) {
        if (wide && inside && column + 4 <= columns) {
            struct alignas(4 * sizeof(T)) four { T x[4]; } v;
#pragma unroll
            for (int c = 0; c < 4; c++)
                v.x[c] = from_float<T>(x[c]);
            *reinterpret_cast<four *>(row + column * sizeof(T)) = v;
            return;
        }
    }
#pragma unroll
    for (int c = 0; c < 4; c++)
        if (inside && column + c < columns)
            reinterpret_cast<T *>(row)[column + c] = from_float<T>(x[c]);
}
/* A block of q8_0 is eight neighbours'. Every lane comes here. */
__device__ __forceinline__ void write_four(q8_0, const float *x, char *row, bool inside, int column,
                                           int columns, bool) {
    uint32_t most = 0;
#pragma unroll
    for (int c = 0; c < 4; c++)
        most = max(most, magnitude_of(x[c]));
    const q8_scale scale(largest(most, 8));
    if (!inside || column >= columns)
        return;
    char *block = row + column / 32 * sizeof(q8_0);
    if (column % 32 == 0)
        *reinterpret_cast<f16 *>(block) = scale.d;
#pragma unroll
    for (int c = 0; c < 4; c++)
        block[2 + column % 32 + c] = scale(x[c]);
}

/* A step's operands on their way to shared memory. */
struct step {
    float a[DEPTH * COLUMNS / THREADS], b[DEPTH * ROWS / THREADS];

    __device__ __forceinline__ void fetch(const psoup__fold_tiles_args &args, const psoup__fold_factor &f,
                                          int k, int row, int column) {
        const int t = threadIdx.x;
#pragma unroll
        for (int i = 0; i < DEPTH * COLUMNS / THREADS; i++) {
            const int depth = k + (i * THREADS + t) / COLUMNS, c = column + t % COLUMNS;
            a[i] = depth < f.rank && c < args.columns ? f.a[depth * args.a_stride + c] : 0;
        }
#pragma unroll
        for (int i = 0; i < DEPTH * ROWS / THREADS; i++) {
            const int depth = k + t % DEPTH, r = row + (i * THREADS + t) / DEPTH;
            const bool inside = depth < f.rank && r < args.rows;
            b[i] = inside ? __fmul_rn(f.b[(int64_t)r * f.rank + depth], f.weight) : 0;
        }
    }
    __device__ __forceinline__ void put(float *a_tile, float *b_tile) const {
        const int t = threadIdx.x;
#pragma unroll
        for (int i = 0; i < DEPTH * COLUMNS / THREADS; i++)
            a_tile[i * THREADS + t] = a[i];
#pragma unroll
        for (int i = 0; i < DEPTH * ROWS / THREADS; i++)
            b_tile[t % DEPTH * B_ROW + (i * THREADS + t) / DEPTH] = b[i];
    }
};

__device__ __forceinline__ void multiply_add(float *sum, float b, const float4 &a) {
    sum[0] = fmaf(b, a.x, sum[0]);
    sum[1] = fmaf(b, a.y, sum[1]);
    sum[2] = fmaf(b, a.z, sum[2]);
    sum[3] = fmaf(b, a.w, sum[3]);
}

/* Read calls (x, row, column), Write calls (x, row, inside, column). */
template <typename Read, typename Write>
__device__ __forceinline__ void fold(const psoup__fold_tiles_args &a, Read read, Write write) {
    SHARED float4 a_tile[DEPTH * COLUMNS / 4], b_tile[DEPTH * B_ROW / 4];
    const psoup__fold_factor *factors = a.staged ? a.staged : a.factor;
    const int row = blockIdx.x / a.across * ROWS, column = blockIdx.x % a.across * COLUMNS;
    const int x = threadIdx.x % ACROSS, y = threadIdx.x / ACROSS;
    float sum[4][8];
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (row + y * 4 + r < a.rows)
                read(sum[r] + half * 4, a.base + (row + y * 4 + r) * a.base_stride,
                     column + half * COLUMNS / 2 + x * 4);
            else
                for (int c = 0; c < 4; c++)
                    sum[r][half * 4 + c] = 0;
        }
    step next;
    next.fetch(a, factors[0], 0, row, column);
    for (int i = 0, k = 0; i < a.n;) {
        __syncthreads(); /* whoever still reads the last step */
        next.put(reinterpret_cast<float *>(a_tile), reinterpret_cast<float *>(b_tile));
        __syncthreads();
        const int depth = min((int)DEPTH, factors[i].rank - k);
        k += DEPTH;
        if (k >= factors[i].rank) {
            i++;
            k = 0;
        }
        if (i < a.n)
            next.fetch(a, factors[i], k, row, column);
#pragma unroll 4
        for (int d = 0; d < depth; d++) {
            const float4 a0 = a_tile[d * (COLUMNS / 4) + x], a1 = a_tile[d * (COLUMNS / 4) + ACROSS + x];
            const float4 b = b_tile[d * (B_ROW / 4) + y];
            multiply_add(sum[0], b.x, a0), multiply_add(sum[0] + 4, b.x, a1);
            multiply_add(sum[1], b.y, a0), multiply_add(sum[1] + 4, b.y, a1);
            multiply_add(sum[2], b.z, a0), multiply_add(sum[2] + 4, b.z, a1);
            multiply_add(sum[3], b.w, a0), multiply_add(sum[3] + 4, b.w, a1);
        }
    }
#pragma unroll
    for (int r = 0; r < 4; r++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            write(sum[r] + half * 4, a.out + (row + y * 4 + r) * a.out_stride, row + y * 4 + r < a.rows,
                  column + half * COLUMNS / 2 + x * 4);
}

template <typename T> __device__ __forceinline__ void fold_as(const psoup__fold_tiles_args &a) {
    fold(
        a, [&](float *x, const char *row, int column) { read_four(T(), x, row, column, a.columns, a.wide); },
        [&](const float *x, char *row, bool inside, int column) {
            write_four(T(), x, row, inside, column, a.columns, a.wide);
        });
}

PSOUP__KERNEL_AS(fold_f32, fold_tiles, PSOUP__FOLD_THREADS) { fold_as<float>(a); }
PSOUP__KERNEL_AS(fold_f16, fold_tiles, PSOUP__FOLD_THREADS) { fold_as<f16>(a); }
PSOUP__KERNEL_AS(fold_bf16, fold_tiles, PSOUP__FOLD_THREADS) { fold_as<bf16>(a); }

PSOUP__KERNEL_AS(fold_any, fold_tiles, PSOUP__FOLD_THREADS) {
    fold(
        a,
        [&](float *x, const char *row, int column) {
            with_dtype(a.base_dtype, [&](auto of) { read_four(of, x, row, column, a.columns, a.wide); });
        },
        [&](const float *x, char *row, bool inside, int column) {
            with_dtype(a.out_dtype,
                       [&](auto of) { write_four(of, x, row, inside, column, a.columns, a.wide); });
        });
}
