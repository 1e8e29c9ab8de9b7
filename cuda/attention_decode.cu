/* Attention of one query to a span over a cache. All there is to do is to read the keys and values once: a key's
 * row is read by as many lanes as it has 16-byte pieces, several keys in flight for each; the lanes of a key slot
 * keep their own maximum, sum and part of the output, and these meet once, at the end (flash decoding: Dao et al.
 * 2023, "Flash-Decoding for long-context inference"). All heads that share a key head look at a key together.
 */
#include "device.cuh"

namespace {

enum { WARPS = PSOUP__DECODE_THREADS / 32 };

/* E elements of a row in a lane. */
template <typename T, int E> struct piece { T x[E]; };

template <typename T, int E> __device__ __forceinline__ piece<T, E> load_piece(const T *p) {
    enum { PACK = 16 / sizeof(T) };
    piece<T, E> out;
#pragma unroll
    for (int i = 0; i < E; i += PACK) {
        const pack<T> part = load_pack(p + i);
#pragma unroll
        for (int c = 0; c < PACK; c++)
            out.x[i + c] = part.x[c];
    }
    return out;
}

/* The running softmax of G heads, and a lane's elements of their outputs. */
template <int G, int E> struct running {
    float most[G], sum[G], out[G][E];
};

/* a and b as one; b is given by its values. */
template <int G, int E>
__device__ __forceinline__ void join(running<G, E> &a, int g, float most, float sum, const float *out, float keep,
                                     float take) {
    a.most[g] = most;
    a.sum[g] = a.sum[g] * keep + sum * take;
#pragma unroll
    for (int e = 0; e < E; e++)
        a.out[g][e] = a.out[g][e] * keep + out[e] * take;
}

/* 2^(x − most), and 0 where there was nothing yet. */
__device__ __forceinline__ float weight_of(float x, float most) {
    return x == -INFINITY ? 0 : fast_exp2(x - most);
}

template <int D> __device__ __forceinline__ size_t row_of(const psoup__attention_decode_args &a, int first, int key) {
    if (a.page == 0)
        return (size_t)first + key;
    return (size_t)a.pages[first + key / a.page] * a.page + key % a.page;
}

template <typename T, int D, int G> __device__ __forceinline__ void decode(const psoup__attention_decode_args &a) {
    enum {
        LANES = D * sizeof(T) / 16 < 32 ? D * sizeof(T) / 16 : 32, /* to a key */
        E = D / LANES,
        SLOTS = 32 / LANES, /* keys side by side in a warp */
        FLIGHT = G == 8 ? 2 : 4 /* keys in flight in a slot */
    };
    SHARED float meet[WARPS][G][D + 2];
    const int32_t *span = a.span + (size_t)blockIdx.z * 4;
    const int query = span[0], keys = span[2], first = span[3];
    const int start = (int)blockIdx.x * a.split, end = min(keys, start + a.split);
    if (span[1] != 1 || start >= end)
        return;
    const int group = a.heads / a.kv_heads, tiles = (group + G - 1) / G;
    const int kv_head = blockIdx.y / tiles, tile = blockIdx.y % tiles;
    const int head = kv_head * group + tile * G, heads = min(G, group - tile * G);
    /* told to be the warp's own, so that its loop is seen to be taken by all lanes alike: else shuffles become calls */
    const int warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0);
    const int lane = threadIdx.x % 32, slot = lane / LANES, place = lane % LANES * E;

    float q[G][E];
    running<G, E> r;
#pragma unroll
    for (int g = 0; g < G; g++) {
        r.most[g] = -INFINITY;
        r.sum[g] = 0;
#pragma unroll
        for (int e = 0; e < E; e++) {
            r.out[g][e] = 0;
            q[g][e] = g < heads ? a.q[((size_t)query * a.heads + head + g) * D + place + e] * a.scale : 0;
        }
    }

    const T *k = static_cast<const T *>(a.k) + (size_t)kv_head * D + place;
    const T *v = static_cast<const T *>(a.v) + (size_t)kv_head * D + place;
    for (int base = start + warp * SLOTS * FLIGHT; base < end; base += WARPS * SLOTS * FLIGHT) {
        piece<T, E> key[FLIGHT], value[FLIGHT];
#pragma unroll
        for (int f = 0; f < FLIGHT; f++) {
            const int at = base + f * SLOTS + slot;
            key[f] = value[f] = piece<T, E>{};
            if (at < end) {
                const size_t row = row_of<D>(a, first, at) * a.stride;
                key[f] = load_piece<T, E>(k + row);
                value[f] = load_piece<T, E>(v + row);
            }
        }
#pragma unroll
        for (int g = 0; g < G; g++) {
            float score[FLIGHT], most = r.most[g];
#pragma unroll
            for (int f = 0; f < FLIGHT; f++) {
                score[f] = 0;
#pragma unroll
                for (int e = 0; e < E; e++)
                    score[f] += q[g][e] * to_float(key[f].x[e]);
#pragma unroll
                for (int mask = LANES / 2; mask > 0; mask >>= 1)
                    score[f] += __shfl_xor_sync(0xffffffffu, score[f], mask);
                if (base + f * SLOTS + slot >= end)
                    score[f] = -INFINITY;
                most = score[f] == score[f] ? fmaxf(most, score[f]) : score[f]; /* a NaN stays one */
            }
            const float keep = weight_of(r.most[g], most);
            r.most[g] = most;
            r.sum[g] *= keep;
#pragma unroll
            for (int e = 0; e < E; e++)
                r.out[g][e] *= keep;
#pragma unroll
            for (int f = 0; f < FLIGHT; f++) {
                const float p = weight_of(score[f], most);
                r.sum[g] += p;
#pragma unroll
                for (int e = 0; e < E; e++)
                    r.out[g][e] += p * to_float(value[f].x[e]);
            }
        }
    }

    /* the slots of a warp, then the warps */
#pragma unroll
    for (int g = 0; g < G; g++) {
#pragma unroll
        for (int mask = LANES; mask < 32; mask <<= 1) {
            const float other = __shfl_xor_sync(0xffffffffu, r.most[g], mask);
            const float sum = __shfl_xor_sync(0xffffffffu, r.sum[g], mask);
            float out[E];
#pragma unroll
            for (int e = 0; e < E; e++)
                out[e] = __shfl_xor_sync(0xffffffffu, r.out[g][e], mask);
            const float most = other == other ? fmaxf(r.most[g], other) : other;
            join<G, E>(r, g, most, sum, out, weight_of(r.most[g], most), weight_of(other, most));
        }
        if (slot == 0) {
#pragma unroll
            for (int e = 0; e < E; e++)
                meet[warp][g][place + e] = r.out[g][e];
            if (place == 0) {
                meet[warp][g][D] = r.most[g];
                meet[warp][g][D + 1] = r.sum[g];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * D; i += PSOUP__DECODE_THREADS) {
        const int g = i / D, d = i % D;
        float most = -INFINITY, sum = 0, out = 0;
        for (int w = 0; w < WARPS; w++)
            most = meet[w][g][D] == meet[w][g][D] ? fmaxf(most, meet[w][g][D]) : meet[w][g][D];
        for (int w = 0; w < WARPS; w++) {
            const float take = weight_of(meet[w][g][D], most);
            sum += meet[w][g][D + 1] * take;
            out += meet[w][g][d] * take;
        }
        if (a.splits == 1) {
            a.out[((size_t)query * a.heads + head + g) * D + d] = out / sum;
            continue;
        }
        float *part = a.part + (((size_t)blockIdx.z * a.heads + head + g) * a.splits + blockIdx.x) * (D + 2);
        part[d] = out;
        if (d == 0) {
            part[D] = most;
            part[D + 1] = sum;
        }
    }
}

} // namespace

#define KERNEL(type, dim, group)                                                                           \
    PSOUP__KERNEL_AS(decode_##type##_##dim##_##group, attention_decode, PSOUP__DECODE_THREADS) {           \
        decode<type, dim, group>(a);                                                                       \
    }
#define KERNELS(type)                                                                                      \
    KERNEL(type, 64, 1)                                                                                    \
    KERNEL(type, 64, 4)                                                                                    \
    KERNEL(type, 64, 8)                                                                                    \
    KERNEL(type, 128, 1)                                                                                   \
    KERNEL(type, 128, 4)                                                                                   \
    KERNEL(type, 128, 8)                                                                                   \
    KERNEL(type, 256, 1)                                                                                   \
    KERNEL(type, 256, 4)                                                                                   \
    KERNEL(type, 256, 8)
KERNELS(float)
KERNELS(bf16)
KERNELS(f16)

/* The splits of a head, in their order. */
PSOUP__KERNEL(attention_merge, PSOUP__DECODE_THREADS) {
    const int32_t *span = a.span + (size_t)blockIdx.y * 4;
    const int head = blockIdx.x, n = min(a.splits, (span[2] + a.split - 1) / a.split);
    if (span[1] != 1)
        return;
    const int width = a.head_dim + 2;
    const float *part = a.part + ((size_t)blockIdx.y * a.heads + head) * a.splits * width;
    float most = -INFINITY, sum = 0;
    for (int s = 0; s < n; s++) {
        const float x = part[s * width + a.head_dim];
        most = x == x ? fmaxf(most, x) : x;
    }
    for (int s = 0; s < n; s++)
        sum += part[s * width + a.head_dim + 1] * weight_of(part[s * width + a.head_dim], most);
    for (int d = threadIdx.x; d < a.head_dim; d += PSOUP__DECODE_THREADS) {
        float out = 0;
        for (int s = 0; s < n; s++)
            out += part[s * width + d] * weight_of(part[s * width + a.head_dim], most);
        a.out[((size_t)span[0] * a.heads + head) * a.head_dim + d] = out / sum;
    }
}
