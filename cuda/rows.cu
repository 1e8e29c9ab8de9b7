/* Rows on the move: embedding, gather and scatter, sums, the cache, and the scalar head that reads single rows.
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

PSOUP__KERNEL(combine_rows, PSOUP__FLAT_THREADS) {
    const int start = a.first[0], first = a.first[blockIdx.x] - start, end = a.first[blockIdx.x + 1] - start;
    const int j = (int)(blockIdx.y * blockDim.x + threadIdx.x) * 4;
    float *out = a.out + (size_t)blockIdx.x * a.width;
    const bool whole = a.width % 4 == 0 && aligned16(a.in) && aligned16(a.out);
    if (j >= a.width)
        return;
    pack<float> sum = {};
    if (end - first == 1)
        sum = load4(a.in + (size_t)first * a.width, j, a.width, whole);
    for (int k = first; end - first > 1 && k < end; k++) {
        const pack<float> x = load4(a.in + (size_t)k * a.width, j, a.width, whole);
        const float weight = a.weight[k];
#pragma unroll
        for (int c = 0; c < 4; c++)
            sum.x[c] += weight * x.x[c];
    }
    store4(out, j, a.width, whole, sum);
}

/* ---- the backward of embedding ----------------------------------------------------------------------- */

/* The rows among THREADS from `start` on that hold `token`, listed in their order; how many. */
__device__ __forceinline__ int list_rows(int *list /* [THREADS] */, const psoup__embed_backward_args &a,
                                         int start, int token) {
    SHARED unsigned matches[PSOUP__ROWS_THREADS / 32];
    const int i = start + threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned same = __ballot_sync(0xffffffffu, i < a.rows && a.token[i] == token);
    __syncthreads(); /* whoever still reads the last list */
    if (lane == 0)
        matches[warp] = same;
    __syncthreads();
    int before = __popc(same & ((1u << lane) - 1)), count = 0;
    for (int w = 0; w < PSOUP__ROWS_THREADS / 32; w++) {
        before += w < warp ? __popc(matches[w]) : 0;
        count += __popc(matches[w]);
    }
    if (same >> lane & 1)
        list[before] = i;
    __syncthreads();
    return count;
}

template <bool WHOLE>
__device__ __forceinline__ void embed_backward_token(const psoup__embed_backward_args &a, int token) {
    enum { THREADS = PSOUP__ROWS_THREADS };
    SHARED int list[THREADS];
    const size_t column = (size_t)blockIdx.y * PSOUP__ROWS_COLUMNS;
    const int width = min(a.width - (int)column, (int)PSOUP__ROWS_COLUMNS);
    float *dtable = a.dtable + (size_t)token * a.width + column;
    pack<float> sum[PSOUP__ROWS_KEPT], d[PSOUP__ROWS_KEPT];
    load_row<THREADS, WHOLE>(sum, dtable, width);
    for (int start = blockIdx.x; start < a.rows; start += THREADS) {
        const int count = list_rows(list, a, start, token);
        for (int i = 0; i < count; i++) {
            load_row<THREADS, WHOLE>(d, a.dout + (size_t)list[i] * a.width + column, width);
#pragma unroll
            for (int k = 0; k < PSOUP__ROWS_KEPT * 4; k++)
                sum[k / 4].x[k % 4] += d[k / 4].x[k % 4];
        }
    }
    store_row<THREADS, WHOLE>(dtable, width, sum);
}

/* The first row of a token takes all its rows, found by looking at every token: no table of the vocabulary,
 * no sorting, and each token's rows are summed in ascending order. That is rows² comparisons at most, from
 * the second-level cache. */
PSOUP__KERNEL(embed_backward, PSOUP__ROWS_THREADS) {
    SHARED int earlier;
    const int row = blockIdx.x, token = a.token[row];
    if (threadIdx.x == 0)
        earlier = 0;
    __syncthreads();
    bool seen = false;
    for (int i = threadIdx.x; i < row; i += PSOUP__ROWS_THREADS)
        seen |= a.token[i] == token;
    if (seen)
        earlier = 1;
    __syncthreads();
    if (earlier)
        return;
    if (a.width % 4 == 0 && aligned16(a.dout) && aligned16(a.dtable))
        embed_backward_token<true>(a, token);
    else
        embed_backward_token<false>(a, token);
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
        a.value[a.at[blockIdx.x]] += a.weight[blockIdx.x] * (sum + (a.bias ? a.bias[0] : 0));
}

/* w and the sums for dw stay in registers. */
template <bool WHOLE> __device__ __forceinline__ void head_backward_rows(const psoup__head_backward_args &a) {
    enum { THREADS = PSOUP__ROWS_THREADS, KEPT = PSOUP__ROWS_KEPT };
    const size_t column = (size_t)blockIdx.y * PSOUP__ROWS_COLUMNS;
    const int width = min(a.width - (int)column, (int)PSOUP__ROWS_COLUMNS);
    const int first = blockIdx.x * a.rows_each, end = min(a.n - first, a.rows_each) + first;
    pack<float> sums[KEPT] = {}, w[KEPT];
    load_row<THREADS, WHOLE>(w, a.w + column, width);
    for (int i = first; i < end; i++) {
        const size_t at = (size_t)a.row[i] * a.width + column;
        const float d = a.weight[i] * a.dvalue[a.at[i]];
        pack<float> x[KEPT], y[KEPT];
        load_row<THREADS, WHOLE>(x, a.hidden + at, width);
        if (a.dhidden) {
            load_row<THREADS, WHOLE>(y, a.dhidden + at, width);
#pragma unroll
            for (int k = 0; k < KEPT * 4; k++)
                y[k / 4].x[k % 4] += d * w[k / 4].x[k % 4];
            store_row<THREADS, WHOLE>(a.dhidden + at, width, y);
        }
#pragma unroll
        for (int k = 0; k < KEPT * 4; k++)
            sums[k / 4].x[k % 4] += d * x[k / 4].x[k % 4];
    }
    put_sums<THREADS, WHOLE>(a.sums + (size_t)blockIdx.x * a.width + column, width, sums);
}

PSOUP__KERNEL(head_backward, PSOUP__ROWS_THREADS) {
    if (a.width % 4 == 0 && aligned16(a.sums) && aligned16(a.dhidden) && aligned16(a.hidden) && aligned16(a.w))
        head_backward_rows<true>(a);
    else
        head_backward_rows<false>(a);
    if (!a.dbias || blockIdx.x > 0 || blockIdx.y > 0)
        return;
    float sum = 0;
    for (int i = threadIdx.x; i < a.n; i += PSOUP__ROWS_THREADS)
        sum += a.weight[i] * a.dvalue[a.at[i]];
    sum = block_sum<PSOUP__ROWS_THREADS>(sum);
    if (threadIdx.x == 0)
        a.dbias[0] += sum;
}
