/* What stands between the linear layers. All of it is bound by memory: each element is read and written
 * once, 16 bytes at a time where the addresses allow it. */
#include "philox.cuh"

/* A row of at most NORM_THREADS · 4 · KEPT elements stays in registers between the two passes. */
PSOUP__KERNEL(rmsnorm, PSOUP__NORM_THREADS) {
    enum { KEPT = 8 };
    const size_t at = (size_t)blockIdx.x * a.width;
    const float *y = a.y ? a.y + at : nullptr;
    float *x = a.x + at, *out = a.out + at;
    float sum = 0;
    if (a.width % 4 == 0 && a.width <= PSOUP__NORM_THREADS * 4 * KEPT && aligned16(x) && aligned16(y) &&
        aligned16(out) && aligned16(a.weight)) {
        pack<float> kept[KEPT], weight[KEPT];
        load_row<PSOUP__NORM_THREADS, true>(kept, x, a.width);
        if (y) {
            load_row<PSOUP__NORM_THREADS, true>(weight, y, a.width);
#pragma unroll
            for (int i = 0; i < KEPT * 4; i++)
                kept[i / 4].x[i % 4] += weight[i / 4].x[i % 4];
            store_row<PSOUP__NORM_THREADS, true>(x, a.width, kept);
        }
#pragma unroll
        for (int i = 0; i < KEPT * 4; i++)
            sum += kept[i / 4].x[i % 4] * kept[i / 4].x[i % 4];
        const float rstd = rsqrtf(block_sum<PSOUP__NORM_THREADS>(sum) / a.width + a.epsilon);
        load_row<PSOUP__NORM_THREADS, true>(weight, a.weight, a.width);
#pragma unroll
        for (int i = 0; i < KEPT * 4; i++)
            kept[i / 4].x[i % 4] *= rstd * weight[i / 4].x[i % 4];
        store_row<PSOUP__NORM_THREADS, true>(out, a.width, kept);
        if (threadIdx.x == 0)
            a.rstd[blockIdx.x] = rstd;
        return;
    }
    for (int j = threadIdx.x; j < a.width; j += PSOUP__NORM_THREADS) {
        if (y)
            x[j] += y[j];
        sum += x[j] * x[j];
    }
    const float rstd = rsqrtf(block_sum<PSOUP__NORM_THREADS>(sum) / a.width + a.epsilon);
    for (int j = threadIdx.x; j < a.width; j += PSOUP__NORM_THREADS)
        out[j] = x[j] * rstd * a.weight[j];
    if (threadIdx.x == 0)
        a.rstd[blockIdx.x] = rstd;
}

/* With x̂ = x · rstd and g = dout · weight: dx += rstd · (g − x̂ · mean(g · x̂)), and dweight += dout · x̂
 * over the block's rows, in their order. A row's elements are read once and stay in registers, as do the
 * sums. */
template <int THREADS, bool SUMS, bool WHOLE>
__device__ __forceinline__ void norm_backward_rows(const psoup__rmsnorm_backward_args &a) {
    enum { KEPT = PSOUP__NORM_KEPT };
    const int first = blockIdx.x * a.rows_each, end = min(a.rows - first, a.rows_each) + first;
    pack<float> sums[KEPT] = {};
    for (int row = first; row < end; row++) {
        const size_t at = (size_t)row * a.width;
        const float rstd = a.rstd[row];
        pack<float> dout[KEPT], x[KEPT], dx[KEPT], weight[KEPT];
        load_row<THREADS, WHOLE>(dout, a.dout + at, a.width);
        load_row<THREADS, WHOLE>(x, a.x + at, a.width);
        load_row<THREADS, WHOLE>(dx, a.dx + at, a.width);
        load_row<THREADS, WHOLE>(weight, a.weight, a.width);
        float sum = 0;
#pragma unroll
        for (int i = 0; i < KEPT * 4; i++) {
            float &d = dout[i / 4].x[i % 4];
            if (SUMS)
                sums[i / 4].x[i % 4] += d * (x[i / 4].x[i % 4] * rstd);
            d *= weight[i / 4].x[i % 4];
            sum += d * x[i / 4].x[i % 4];
        }
        const float mean = block_sum<THREADS>(sum) * rstd * rstd / a.width;
#pragma unroll
        for (int i = 0; i < KEPT * 4; i++)
            dx[i / 4].x[i % 4] += rstd * (dout[i / 4].x[i % 4] - x[i / 4].x[i % 4] * mean);
        store_row<THREADS, WHOLE>(a.dx + at, a.width, dx);
    }
    if (SUMS)
        put_sums<THREADS, WHOLE>(a.sums + (size_t)blockIdx.x * a.width, a.width, sums);
}

template <int THREADS, bool SUMS>
__device__ __forceinline__ void norm_backward(const psoup__rmsnorm_backward_args &a) {
    if (a.width % 4 == 0 && aligned16(a.dx) && aligned16(a.x) && aligned16(a.dout) && aligned16(a.weight) &&
        aligned16(a.sums))
        norm_backward_rows<THREADS, SUMS, true>(a);
    else
        norm_backward_rows<THREADS, SUMS, false>(a);
}

PSOUP__KERNEL(rmsnorm_backward, PSOUP__NORM_THREADS) { norm_backward<PSOUP__NORM_THREADS, false>(a); }
PSOUP__KERNEL_AS(rmsnorm_backward_512, rmsnorm_backward, PSOUP__NORM_WIDE) {
    norm_backward<PSOUP__NORM_WIDE, false>(a);
}
PSOUP__KERNEL_AS(rmsnorm_backward_sums, rmsnorm_backward, PSOUP__NORM_THREADS) {
    norm_backward<PSOUP__NORM_THREADS, true>(a);
}
PSOUP__KERNEL_AS(rmsnorm_backward_sums_512, rmsnorm_backward, PSOUP__NORM_WIDE) {
    norm_backward<PSOUP__NORM_WIDE, true>(a);
}

/* Any width: a row is read twice and the sums stay in memory, each element with one thread. */
PSOUP__KERNEL_AS(rmsnorm_backward_wide, rmsnorm_backward, PSOUP__NORM_WIDE) {
    const int first = blockIdx.x * a.rows_each, end = min(a.rows - first, a.rows_each) + first;
    float *sums = a.sums ? a.sums + (size_t)blockIdx.x * a.width : nullptr;
    for (int row = first; row < end; row++) {
        const float *dout = a.dout + (size_t)row * a.width, *x = a.x + (size_t)row * a.width;
        float *dx = a.dx + (size_t)row * a.width;
        const float rstd = a.rstd[row];
        float sum = 0;
        for (int j = threadIdx.x; j < a.width; j += PSOUP__NORM_WIDE)
            sum += dout[j] * a.weight[j] * x[j];
        const float mean = block_sum<PSOUP__NORM_WIDE>(sum) * rstd * rstd / a.width;
        const bool fresh = row == first && gridDim.x > 1;
        for (int j = threadIdx.x; j < a.width; j += PSOUP__NORM_WIDE) {
            dx[j] += rstd * (dout[j] * a.weight[j] - x[j] * mean);
            if (sums)
                sums[j] = (fresh ? 0 : sums[j]) + dout[j] * (x[j] * rstd);
        }
    }
}

/* Warp w of a block adds up rows w, w + 8 …, a column to a lane; then the warps' sums are added in order. */
PSOUP__KERNEL(column_sums, PSOUP__FLAT_THREADS) {
    enum { WARPS = PSOUP__FLAT_THREADS / 32 };
    SHARED float part[WARPS][PSOUP__SUM_COLUMNS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int j = blockIdx.x * PSOUP__SUM_COLUMNS + lane;
    float sum = 0;
#pragma unroll 8
    for (int i = warp; j < a.width && i < a.n; i += WARPS)
        sum += a.sums[(size_t)i * a.width + j];
    part[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || j >= a.width)
        return;
    sum = 0;
    for (int i = 0; i < WARPS; i++)
        sum += part[i][lane];
    a.out[j] += sum;
}

__device__ __forceinline__ void rope_turn(pack<float> &low, pack<float> &high, const pack<float> &cosines,
                                          const pack<float> &sines, float sign) {
#pragma unroll
    for (int c = 0; c < 4; c++) {
        const float p = low.x[c], q = high.x[c], s = sines.x[c] * sign;
        low.x[c] = p * cosines.x[c] - q * s;
        high.x[c] = q * cosines.x[c] + p * s;
    }
}

/* Threads take four pairs at a time, of any head. */
PSOUP__KERNEL(rope, PSOUP__FLAT_THREADS) {
    const int half = a.head_dim / 2, each = (half + 3) / 4;
    const bool whole = half % 4 == 0 && a.stride % 4 == 0 && aligned16(a.x) && aligned16(a.cos_sin);
    const float *cosine = a.cos_sin + (size_t)a.position[blockIdx.x] * a.head_dim, *sine = cosine + half;
    float *x = a.x + (int64_t)blockIdx.x * a.stride;
    for (int k = threadIdx.x; k < a.heads * each; k += blockDim.x) {
        const int j = k % each * 4;
        float *low_at = x + (size_t)(k / each) * a.head_dim, *high_at = low_at + half;
        pack<float> low = load4(low_at, j, half, whole), high = load4(high_at, j, half, whole);
        rope_turn(low, high, load4(cosine, j, half, whole), load4(sine, j, half, whole), a.sign);
        store4(low_at, j, half, whole, low);
        store4(high_at, j, half, whole, high);
    }
}

/* Four elements of a row, as store4 has them, rounded. */
template <typename T> struct alignas(4 * sizeof(T)) quad { T x[4]; };
template <typename T>
__device__ __forceinline__ void round4(T *row, int j, int width, bool whole, const pack<float> &v) {
    quad<T> rounded;
#pragma unroll
    for (int c = 0; c < 4; c++)
        rounded.x[c] = from_float<T>(v.x[c]);
    if (whole) {
        *reinterpret_cast<quad<T> *>(row + j) = rounded;
        return;
    }
#pragma unroll
    for (int c = 0; c < 4; c++)
        if (c < width - j)
            row[j + c] = rounded.x[c];
}

/* q is turned in place, k on its way to the cache; v goes there as it is. */
template <typename T> __device__ __forceinline__ void rope_append(const psoup__rope_append_args &a) {
    const int part = blockIdx.y, half = a.head_dim / 2, each = (half + 3) / 4, heads = part ? a.kv_heads : a.heads;
    const float *cosine = a.cos_sin + (size_t)a.position[blockIdx.x] * a.head_dim, *sine = cosine + half;
    const size_t row = (size_t)blockIdx.x * heads * a.head_dim;
    const float *in = a.in[part] + row;
    T *cache = part ? static_cast<T *>(a.cache[part - 1]) + a.place[blockIdx.x] * a.stride : nullptr;
    const bool whole = half % 4 == 0 && a.stride % 4 == 0 && aligned16(a.in[part]) && aligned16(a.cos_sin) &&
                       aligned16(part ? a.cache[part - 1] : nullptr);
    for (int k = threadIdx.x; k < heads * each; k += blockDim.x) {
        const int j = k % each * 4;
        const size_t at = (size_t)(k / each) * a.head_dim;
        pack<float> low = load4(in + at, j, half, whole), high = load4(in + at + half, j, half, whole);
        if (part < 2)
            rope_turn(low, high, load4(cosine, j, half, whole), load4(sine, j, half, whole), 1);
        if (part == 0) {
            store4(a.q + row + at, j, half, whole, low);
            store4(a.q + row + at + half, j, half, whole, high);
        } else {
            round4(cache + at, j, half, whole, low);
            round4(cache + at + half, j, half, whole, high);
        }
    }
}

PSOUP__KERNEL_AS(rope_append_f32, rope_append, PSOUP__FLAT_THREADS) { rope_append<float>(a); }
PSOUP__KERNEL_AS(rope_append_bf16, rope_append, PSOUP__FLAT_THREADS) { rope_append<bf16>(a); }
PSOUP__KERNEL_AS(rope_append_f16, rope_append, PSOUP__FLAT_THREADS) { rope_append<f16>(a); }

__device__ __forceinline__ float swiglu_of(float gate, float up) { return gate / (1 + expf(-gate)) * up; }

PSOUP__KERNEL(swiglu, PSOUP__FLAT_THREADS) {
    const uint64_t step = (uint64_t)gridDim.x * PSOUP__FLAT_THREADS;
    const uint64_t start = (uint64_t)blockIdx.x * PSOUP__FLAT_THREADS + threadIdx.x;
    const uint64_t packs = aligned16(a.out) && aligned16(a.gate) && aligned16(a.up) ? a.n / 4 : 0;
    for (uint64_t i = start; i < packs; i += step) {
        const pack<float> gate = load_pack(a.gate + i * 4), up = load_pack(a.up + i * 4);
        pack<float> out;
#pragma unroll
        for (int c = 0; c < 4; c++)
            out.x[c] = swiglu_of(gate.x[c], up.x[c]);
        store_pack(a.out + i * 4, out);
    }
    for (uint64_t i = packs * 4 + start; i < a.n; i += step)
        a.out[i] = swiglu_of(a.gate[i], a.up[i]);
}

/* With σ = sigmoid(gate): gate becomes dout·up·σ·(1 + gate·(1 − σ)), up becomes dout·gate·σ. */
__device__ __forceinline__ void swiglu_turn(float &gate, float &up, float dout) {
    const float sigmoid = 1 / (1 + expf(-gate)), dup = dout * gate * sigmoid;
    gate = dout * up * sigmoid * (1 + gate * (1 - sigmoid));
    up = dup;
}

PSOUP__KERNEL(swiglu_backward, PSOUP__FLAT_THREADS) {
    const uint64_t step = (uint64_t)gridDim.x * PSOUP__FLAT_THREADS;
    const uint64_t start = (uint64_t)blockIdx.x * PSOUP__FLAT_THREADS + threadIdx.x;
    const bool whole = aligned16(a.dgate) && aligned16(a.dup) && aligned16(a.dout) && aligned16(a.gate) &&
                       aligned16(a.up);
    const uint64_t packs = whole ? a.n / 4 : 0;
    for (uint64_t i = start; i < packs; i += step) {
        pack<float> gate = load_pack(a.gate + i * 4), up = load_pack(a.up + i * 4);
        const pack<float> dout = load_pack(a.dout + i * 4);
#pragma unroll
        for (int c = 0; c < 4; c++)
            swiglu_turn(gate.x[c], up.x[c], dout.x[c]);
        store_pack(a.dgate + i * 4, gate);
        store_pack(a.dup + i * 4, up);
    }
    for (uint64_t i = packs * 4 + start; i < a.n; i += step) {
        float gate = a.gate[i], up = a.up[i];
        swiglu_turn(gate, up, a.dout[i]);
        a.dgate[i] = gate;
        a.dup[i] = up;
    }
}

PSOUP__KERNEL(add, PSOUP__FLAT_THREADS) {
    const uint64_t step = (uint64_t)gridDim.x * PSOUP__FLAT_THREADS;
    const uint64_t start = (uint64_t)blockIdx.x * PSOUP__FLAT_THREADS + threadIdx.x;
    const uint64_t packs = aligned16(a.x) && aligned16(a.y) ? a.n / 4 : 0;
    for (uint64_t i = start; i < packs; i += step) {
        pack<float> x = load_pack(a.x + i * 4);
        const pack<float> y = load_pack(a.y + i * 4);
#pragma unroll
        for (int c = 0; c < 4; c++)
            x.x[c] += y.x[c];
        store_pack(a.x + i * 4, x);
    }
    for (uint64_t i = packs * 4 + start; i < a.n; i += step)
        a.x[i] += a.y[i];
}

/* A thread takes the elements of one Philox block: four, or at the ends of a row that begins or ends within a
 * block those that are the row's. */
template <bool ADD> __device__ __forceinline__ void drop_row(const psoup__dropout_args &a) {
    const size_t row = blockIdx.x;
    const uint64_t seed = a.seed[row], stream = a.stream[row], position = a.offset[row] * (uint64_t)a.width;
    const int before = (int)(position % 4);
    const float *in = a.in + row * a.width;
    float *out = a.out + row * a.width;
    const bool whole = a.width % 4 == 0 && before == 0 && aligned16(in) && aligned16(out);
    for (int j = (int)threadIdx.x * 4 - before; j < a.width; j += (int)blockDim.x * 4) {
        const uint4 words = philox_block(seed, stream, (position + j) / 4);
        const float u[4] = {uniform_of(words.x), uniform_of(words.y), uniform_of(words.z),
                            uniform_of(words.w)};
        if (whole) {
            pack<float> x = load_pack(in + j);
#pragma unroll
            for (int c = 0; c < 4; c++)
                x.x[c] = u[c] >= a.p ? x.x[c] * a.scale : 0;
            if (ADD) {
                const pack<float> y = load_pack(out + j);
#pragma unroll
                for (int c = 0; c < 4; c++)
                    x.x[c] += y.x[c];
            }
            store_pack(out + j, x);
            continue;
        }
#pragma unroll
        for (int c = 0; c < 4; c++)
            if (j + c >= 0 && j + c < a.width) {
                const float x = u[c] >= a.p ? in[j + c] * a.scale : 0;
                out[j + c] = ADD ? out[j + c] + x : x;
            }
    }
}

PSOUP__KERNEL(dropout, PSOUP__FLAT_THREADS) { drop_row<false>(a); }
PSOUP__KERNEL_AS(dropout_backward, dropout, PSOUP__FLAT_THREADS) { drop_row<true>(a); }
