/* Rows on the move: embedding, gather and scatter, the cache, and the scalar head that reads single rows.
 * All of it is bound by memory: each element is read and written once, 16 bytes at a time where the
 * addresses allow it. */
#include "device.cuh"

/* From T to float or from float to T, 16 bytes of the narrower at a time. */
template <typename To, typename From>
__device__ __forceinline__ void convert_row(To *out, const From *in, int width, bool whole) {
    constexpr int each = 16 / (sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
    constexpr int ins = 16 / sizeof(From), outs = 16 / sizeof(To);
    if (!whole) {
        for (int j = threadIdx.x; j < width; j += blockDim.x)
            out[j] = from_float<To>(to_float(in[j]));
        return;
    }
    for (int j = (int)threadIdx.x * each; j < width; j += (int)blockDim.x * each) {
        pack<From> x[each / ins];
        pack<To> y[each / outs];
#pragma unroll
        for (int i = 0; i < each / ins; i++)
            x[i] = load_pack(in + j + i * ins);
#pragma unroll
        for (int c = 0; c < each; c++)
            y[c / outs].x[c % outs] = from_float<To>(to_float(x[c / ins].x[c % ins]));
#pragma unroll
        for (int i = 0; i < each / outs; i++)
            store_pack(out + j + i * outs, y[i]);
    }
}

template <typename T> __device__ __forceinline__ void embed_row(const psoup__embed_args &a) {
    const T *in = static_cast<const T *>(a.table) + (size_t)a.token[blockIdx.x] * a.width;
    float *out = a.out + (size_t)blockIdx.x * a.width;
    convert_row(out, in, a.width, a.width % (int)(16 / sizeof(T)) == 0 && aligned16(in) && aligned16(out));
}

PSOUP__KERNEL_AS(embed_f32, embed, PSOUP__FLAT_THREADS) { embed_row<float>(a); }
PSOUP__KERNEL_AS(embed_bf16, embed, PSOUP__FLAT_THREADS) { embed_row<bf16>(a); }
PSOUP__KERNEL_AS(embed_f16, embed, PSOUP__FLAT_THREADS) { embed_row<f16>(a); }

template <typename T> __device__ __forceinline__ void append_row(const psoup__cache_append_args &a) {
    const int which = blockIdx.y;
    const float *in = a.in[which] + (size_t)blockIdx.x * a.width;
    T *out = static_cast<T *>(a.cache[which]) + a.place[blockIdx.x] * a.stride;
    convert_row(out, in, a.width, a.width % (int)(16 / sizeof(T)) == 0 && aligned16(in) && aligned16(out));
}

PSOUP__KERNEL_AS(cache_append_f32, cache_append, PSOUP__FLAT_THREADS) { append_row<float>(a); }
PSOUP__KERNEL_AS(cache_append_bf16, cache_append, PSOUP__FLAT_THREADS) { append_row<bf16>(a); }
PSOUP__KERNEL_AS(cache_append_f16, cache_append, PSOUP__FLAT_THREADS) { append_row<f16>(a); }

PSOUP__KERNEL(gather_rows, PSOUP__FLAT_THREADS) {
    const float *in = a.in + (size_t)a.row[blockIdx.x] * a.width;
    float *out = a.out + (size_t)blockIdx.x * a.width;
    convert_row(out, in, a.width, a.width % 4 == 0 && aligned16(in) && aligned16(out));
}

PSOUP__KERNEL(scatter_add_rows, PSOUP__FLAT_THREADS) {
    const float *in = a.in + (size_t)blockIdx.x * a.width;
    float *out = a.out + (size_t)a.row[blockIdx.x] * a.width;
    const float scale = a.scale ? a.scale[blockIdx.x] : 1;
    const bool whole = a.width % 4 == 0 && aligned16(in) && aligned16(out);
    for (int j = (int)threadIdx.x * 4; j < a.width; j += (int)blockDim.x * 4) {
        pack<float> y = load4(out, j, a.width, whole);
        const pack<float> x = load4(in, j, a.width, whole);
#pragma unroll
        for (int c = 0; c < 4; c++)
            y.x[c] += scale * x.x[c];
        store4(out, j, a.width, whole, y);
    }
}

/* ---- the backward of embedding ----------------------------------------------------------------------- */

/* The first row of a token takes all its rows, found by looking at every token: no table of the vocabulary,
 * no sorting, and each token's rows are summed in ascending order. That is rows² comparisons at most, from
 * the second-level cache. The rows found among THREADS tokens are listed in shared memory in their order. */
PSOUP__KERNEL(embed_backward, PSOUP__ROWS_THREADS) {
    enum { THREADS = PSOUP__ROWS_THREADS, KEPT = PSOUP__ROWS_KEPT };
    SHARED int found[THREADS];
    SHARED unsigned matches[THREADS / 32];
    SHARED int earlier;
    const int thread = threadIdx.x, row = blockIdx.x, token = a.token[row];
    if (thread == 0)
        earlier = 0;
    __syncthreads();
    bool seen = false;
    for (int i = thread; i < row; i += THREADS)
        seen |= a.token[i] == token;
    if (seen)
        earlier = 1;
    __syncthreads();
    if (earlier)
        return;

    const size_t column = (size_t)blockIdx.y * PSOUP__ROWS_COLUMNS;
    const int width = min(a.width - (int)column, (int)PSOUP__ROWS_COLUMNS);
    const float *dout = a.dout + column;
    float *dtable = a.dtable + (size_t)token * a.width + column;
    const bool whole = a.width % 4 == 0 && aligned16(dout) && aligned16(dtable);
    pack<float> sum[KEPT] = {};
#pragma unroll
    for (int k = 0; k < KEPT; k++)
        if ((k * THREADS + thread) * 4 < width)
            sum[k] = load4(dtable, (k * THREADS + thread) * 4, width, whole);
    for (int start = row; start < a.rows; start += THREADS) {
        const int i = start + thread;
        const unsigned same = __ballot_sync(0xffffffffu, i < a.rows && a.token[i] == token);
        __syncthreads(); /* whoever still reads the last list */
        if (thread % 32 == 0)
            matches[thread / 32] = same;
        __syncthreads();
        int before = __popc(same & ((1u << thread % 32) - 1)), count = 0;
        for (int w = 0; w < THREADS / 32; w++) {
            before += w < thread / 32 ? __popc(matches[w]) : 0;
            count += __popc(matches[w]);
        }
        if (same >> thread % 32 & 1)
            found[before] = i;
        __syncthreads();
#pragma unroll 4
        for (int f = 0; f < count; f++)
#pragma unroll
            for (int k = 0; k < KEPT; k++) {
                const int j = (k * THREADS + thread) * 4;
                if (j >= width)
                    break;
                const pack<float> d = load4(dout + (size_t)found[f] * a.width, j, width, whole);
#pragma unroll
                for (int c = 0; c < 4; c++)
                    sum[k].x[c] += d.x[c];
            }
    }
#pragma unroll
    for (int k = 0; k < KEPT; k++)
        if ((k * THREADS + thread) * 4 < width)
            store4(dtable, (k * THREADS + thread) * 4, width, whole, sum[k]);
}

/* ---- the scalar head --------------------------------------------------------------------------------- */

PSOUP__KERNEL(head, PSOUP__ROWS_THREADS) {
    const float *hidden = a.hidden + (size_t)a.row[blockIdx.x] * a.width;
    const bool whole = a.width % 4 == 0 && aligned16(hidden) && aligned16(a.w);
    float sum = 0;
    for (int j = (int)threadIdx.x * 4; j < a.width; j += PSOUP__ROWS_THREADS * 4) {
        const pack<float> x = load4(hidden, j, a.width, whole), w = load4(a.w, j, a.width, whole);
#pragma unroll
        for (int c = 0; c < 4; c++)
            sum += x.x[c] * w.x[c];
    }
    sum = block_sum<PSOUP__ROWS_THREADS>(sum);
    if (threadIdx.x == 0)
        a.out[blockIdx.x] = sum + (a.bias ? a.bias[0] : 0);
}

/* w and the sums for dw stay in registers. */
PSOUP__KERNEL(head_backward, PSOUP__ROWS_THREADS) {
    enum { THREADS = PSOUP__ROWS_THREADS, KEPT = PSOUP__ROWS_KEPT };
    const size_t column = (size_t)blockIdx.y * PSOUP__ROWS_COLUMNS;
    const int thread = threadIdx.x, width = min(a.width - (int)column, (int)PSOUP__ROWS_COLUMNS);
    const int first = blockIdx.x * a.rows_each, end = min(a.n - first, a.rows_each) + first;
    float *out = a.sums + (size_t)blockIdx.x * a.width + column;
    const bool whole = a.width % 4 == 0 && aligned16(a.sums) && aligned16(a.dhidden) && aligned16(a.hidden) &&
                       aligned16(a.w);
    pack<float> sums[KEPT] = {}, w[KEPT] = {};
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        const int j = (k * THREADS + thread) * 4;
        if (j >= width)
            break;
        w[k] = load4(a.w + column, j, width, whole);
        if (gridDim.x == 1)
            sums[k] = load4(out, j, width, whole);
    }
    for (int i = first; i < end; i++) {
        const size_t at = (size_t)a.row[i] * a.width + column;
        const float d = a.dout[i];
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            const int j = (k * THREADS + thread) * 4;
            if (j >= width)
                break;
            const pack<float> x = load4(a.hidden + at, j, width, whole);
#pragma unroll
            for (int c = 0; c < 4; c++)
                sums[k].x[c] += d * x.x[c];
            if (!a.dhidden)
                continue;
            pack<float> y = load4(a.dhidden + at, j, width, whole);
#pragma unroll
            for (int c = 0; c < 4; c++)
                y.x[c] += d * w[k].x[c];
            store4(a.dhidden + at, j, width, whole, y);
        }
    }
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        const int j = (k * THREADS + thread) * 4;
        if (j >= width)
            break;
        store4(out, j, width, whole, sums[k]);
    }
    if (!a.dbias || blockIdx.x > 0 || blockIdx.y > 0)
        return;
    float sum = 0;
    for (int i = thread; i < a.n; i += THREADS)
        sum += a.dout[i];
    sum = block_sum<THREADS>(sum);
    if (thread == 0)
        a.dbias[0] += sum;
}
