/* Weighted sums and copies of rows: bound by memory, every input read once and the result written once.
 *
 * The sums' bits are the CPU's: each product and each sum is rounded, in the order of the inputs, the first
 * product as it is; a fused multiply-add would give others. An element is read and written by one thread, so
 * the result may be one of the inputs. */
#include "dtypes.cuh"

template <typename T> __device__ __forceinline__ pack<T> pack_of(uint4 bits) {
    pack<T> v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

template <typename T> __device__ __forceinline__ uint4 bits_of(const pack<T> &v) {
    uint4 bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

/* All of a thread's packs of all inputs are asked for before the first is used. */
template <typename T, int N> __device__ __forceinline__ void sum_few(const psoup__sum_few_args &a) {
    constexpr int EACH = 16 / sizeof(T), PACKS = PSOUP__SUM_PACKS(N);
    for (uint32_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
        const uint32_t row = tile / a.across, turn = tile - row * a.across;
        const uint64_t first = (uint64_t)turn * (PSOUP__SUM_THREADS * PACKS) + threadIdx.x;
        uint4 x[N][PACKS];
#pragma unroll
        for (int i = 0; i < N; i++) {
            const char *in = a.in[i] + row * a.stride[i];
#pragma unroll
            for (int p = 0; p < PACKS; p++)
                if (first + p * PSOUP__SUM_THREADS < a.packs)
                    x[i][p] = load_once(in + (first + p * PSOUP__SUM_THREADS) * 16);
        }
        char *out = a.out + row * a.out_stride;
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            if (first + p * PSOUP__SUM_THREADS >= a.packs)
                break;
            float sum[EACH];
#pragma unroll
            for (int i = 0; i < N; i++) {
                const pack<T> v = pack_of<T>(x[i][p]);
#pragma unroll
                for (int c = 0; c < EACH; c++) {
                    const float product = __fmul_rn(a.weight[i], to_float(v.x[c]));
                    sum[c] = i == 0 ? product : __fadd_rn(sum[c], product);
                }
            }
            pack<T> rounded;
#pragma unroll
            for (int c = 0; c < EACH; c++)
                rounded.x[c] = from_float<T>(sum[c]);
            store_once(out + (first + p * PSOUP__SUM_THREADS) * 16, bits_of(rounded));
        }
        if (turn + 1 == a.across && threadIdx.x < a.rest) {
            const uint64_t column = a.packs * EACH + threadIdx.x;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float x_i = read_element(T(), a.in[i] + row * a.stride[i], column);
                const float product = __fmul_rn(a.weight[i], x_i);
                sum = i == 0 ? product : __fadd_rn(sum, product);
            }
            reinterpret_cast<T *>(out)[column] = from_float<T>(sum);
        }
    }
}

#define SUM(name, type, n)                                                                                 \
    PSOUP__KERNEL_AS(sum_##name##_##n, sum_few, PSOUP__SUM_THREADS) { sum_few<type, n>(a); }
#define SUMS(name, type)                                                                                   \
    SUM(name, type, 1) SUM(name, type, 2) SUM(name, type, 3) SUM(name, type, 4)                            \
    SUM(name, type, 5) SUM(name, type, 6) SUM(name, type, 7) SUM(name, type, 8)
SUMS(f32, float)
SUMS(f16, f16)
SUMS(bf16, bf16)

/* ---- any dtypes, any number --------------------------------------------------------------------------- */

/* A lane has every 32nd element of its warp's tile, so that neighbours read neighbours whatever the dtype and
 * the alignment, and a block of q8_0 is a warp's. */
enum { ANY = PSOUP__SUM_ANY_TILE / 32 };

template <typename T>
__device__ __forceinline__ void write_any(T, char *row, uint64_t column, uint64_t columns, const float *sum) {
#pragma unroll
    for (int v = 0; v < ANY; v++)
        if (column + v * 32 < columns)
            reinterpret_cast<T *>(row)[column + v * 32] = from_float<T>(sum[v]);
}
__device__ __forceinline__ void write_any(q8_0, char *row, uint64_t column, uint64_t columns,
                                          const float *sum) {
#pragma unroll
    for (int v = 0; v < ANY; v++)
        if (column + v * 32 < columns) { /* whole blocks: the same for the whole warp */
            const q8_scale scale(largest(magnitude_of(sum[v]), 32));
            char *block = row + (column / 32 + v) * sizeof(q8_0);
            if (column % 32 == 0)
                *reinterpret_cast<f16 *>(block) = scale.d;
            block[2 + column % 32] = scale(sum[v]);
        }
}

PSOUP__KERNEL(sum_any, PSOUP__SUM_THREADS) {
    const psoup__sum_term *terms = a.staged ? a.staged : a.term;
    const uint64_t step = (uint64_t)gridDim.x * (PSOUP__SUM_THREADS / 32);
    uint64_t tile = (uint64_t)blockIdx.x * (PSOUP__SUM_THREADS / 32) + threadIdx.x / 32;
    for (; tile < a.tiles; tile += step) {
        const uint64_t row = tile / a.across;
        const uint64_t column = (tile - row * a.across) * PSOUP__SUM_ANY_TILE + threadIdx.x % 32;
        float sum[ANY] = {};
        for (int i = 0; i < a.n; i++) {
            const psoup__sum_term &t = terms[i];
            const char *in = t.in + row * t.stride;
            float x[ANY] = {};
            with_dtype(t.dtype, [&](auto of) {
#pragma unroll
                for (int v = 0; v < ANY; v++)
                    if (column + v * 32 < a.columns)
                        x[v] = read_element(of, in, column + v * 32);
            });
#pragma unroll
            for (int v = 0; v < ANY; v++) {
                const float product = __fmul_rn(t.weight, x[v]);
                sum[v] = i == 0 ? product : __fadd_rn(sum[v], product);
            }
        }
        with_dtype(a.out_dtype,
                   [&](auto of) { write_any(of, a.out + row * a.out_stride, column, a.columns, sum); });
    }
}

/* ---- copies ------------------------------------------------------------------------------------------- */

template <typename T> __device__ __forceinline__ void copy_units(const psoup__copy_rows_args &a) {
    const uint64_t step = (uint64_t)gridDim.x * PSOUP__SUM_THREADS;
    uint64_t i = (uint64_t)blockIdx.x * PSOUP__SUM_THREADS + threadIdx.x;
    for (; i < a.rows * a.units; i += step) {
        const uint64_t row = i / a.units, unit = i - row * a.units;
        reinterpret_cast<T *>(a.out + row * a.out_stride)[unit] =
            reinterpret_cast<const T *>(a.in + row * a.in_stride)[unit];
    }
}

PSOUP__KERNEL(copy_rows, PSOUP__SUM_THREADS) {
    switch (a.unit) {
    case 16: copy_units<uint4>(a); break;
    case 4: copy_units<uint32_t>(a); break;
    case 2: copy_units<uint16_t>(a); break;
    default: copy_units<uint8_t>(a); break;
    }
}
