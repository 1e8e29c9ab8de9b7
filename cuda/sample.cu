/* Drawing tokens: src/cpu/sample.c's arithmetic, by a block for each row. A token's mass is a whole number, so
 * that its sums are exact in any order: atomics give the same bits in every run, and the token is the CPU's.
 *
 * Nothing is sorted. Where the cumulative mass crosses a target in descending order of the logits is found by
 * descending a histogram over the logits' bits, 11, 11 and 10 at a time. The row is walked once for its maximum
 * and log-sum-exp, once for the first histogram, twice for each cut (top-k's three times, as it counts) and
 * once for the token: from the second time on it comes from the cache. */
#include "lse.cuh"
#include "philox.cuh"

namespace {

enum { THREADS = PSOUP__SAMPLE_THREADS, WARPS = THREADS / 32, BINS = PSOUP__SAMPLE_BINS,
       EACH = BINS / THREADS };
typedef unsigned long long mass; /* 64 bits, as shuffles take them */

/* 64-bit atomics on shared memory are loops of compare and swap; two of 32 bits are not. */
struct histogram {
    unsigned low[BINS], high[BINS];
};

struct row_state {
    const float *logits;
    const unsigned *banned; /* a bit for each token, or NULL */
    int vocab;
    float max;              /* of the logits not banned */
    float temperature, unit;
    unsigned floor;         /* keys below it were filtered out */
};

struct cut {
    unsigned key; /* the largest whose mass, with that of all larger keys, exceeds the target */
    mass above;   /* the mass of the larger keys */
};

/* An integer that orders as the float does; −0 is 0. */
__device__ __forceinline__ unsigned key_of(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits ^ ((unsigned)-(int)(bits >> 31) | 0x80000000u);
}

__device__ __forceinline__ float key_float(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

/* src/cpu/vector.h's, step by step, where that has fused multiply-add. */
__device__ __forceinline__ float exp_float(float x) {
    const float magic = 0x1.8p23f;
    x = x < -104.0f ? -104.0f : x;
    const float shifted = fmaf(x, 0x1.715476p0f, magic), n = shifted - magic;
    const float r = fmaf(n, -0x1.7f7d1cp-20f, fmaf(n, -0x1.62e4p-1f, x));
    float y = 1.0f / 5040;
    y = fmaf(y, r, 1.0f / 720);
    y = fmaf(y, r, 1.0f / 120);
    y = fmaf(y, r, 1.0f / 24);
    y = fmaf(y, r, 1.0f / 6);
    y = fmaf(y, r, 0.5f);
    y = fmaf(y, r, 1.0f);
    y = fmaf(y, r, 1.0f);
    const int power = __float_as_int(shifted) - __float_as_int(magic), half = power >> 1;
    return y * __int_as_float((half + 127) << 23) * __int_as_float((power - half + 127) << 23);
}

__device__ __forceinline__ mass mass_of(const row_state &row, float logit) {
    return (mass)(exp_float((logit - row.max) / row.temperature) * row.unit);
}

__device__ __forceinline__ float value_of(const row_state &row, int token, float logit) {
    return row.banned && row.banned[token / 32] >> token % 32 & 1 ? -INFINITY : logit;
}

__device__ __forceinline__ void add(histogram &h, unsigned bin, mass x) {
    const unsigned low = (unsigned)x;
    unsigned high = (unsigned)(x >> 32);
    if (atomicAdd(&h.low[bin], low) + low < low)
        high++; /* the carry */
    if (high)
        atomicAdd(&h.high[bin], high);
}

__device__ __forceinline__ mass bin_of(const histogram &h, int bin) {
    return (mass)h.high[bin] << 32 | h.low[bin];
}

/* The mass, or the count, of every token whose key begins with `prefix`, above bit `shift + width`. */
__device__ __forceinline__ void fill(histogram &h, const row_state &row, bool count, unsigned prefix,
                                     int shift, int width) {
    const unsigned most = 0xffffffffu >> (32 - shift - width), digit = (1u << width) - 1;
    __syncthreads(); /* whoever still reads it */
    for (int i = threadIdx.x; i < BINS; i += THREADS)
        h.low[i] = h.high[i] = 0;
    __syncthreads();
    walk_row<THREADS, 1>(row.logits, row.vocab, [&](int first, const auto &x) {
#pragma unroll
        for (int i = 0; i < (int)(sizeof x / sizeof *x); i++) {
            const float logit = value_of(row, first + i, x[i]);
            const unsigned key = key_of(logit);
            if (key < row.floor || (key ^ prefix) > most)
                continue;
            const mass m = count ? 1 : mass_of(row, logit);
            if (m > 0)
                add(h, key >> shift & digit, m);
        }
    });
    __syncthreads();
}

/* The sum of the lanes before, and in `all` of every lane. */
__device__ __forceinline__ mass warp_before(mass x, mass &all) {
    mass sum = x;
    for (int lanes = 1; lanes < 32; lanes *= 2) {
        const mass other = __shfl_up_sync(0xffffffffu, sum, lanes);
        sum += (int)threadIdx.x % 32 >= lanes ? other : 0;
    }
    all = __shfl_sync(0xffffffffu, sum, 31);
    return sum - x;
}

/* The highest bin that takes the sum from `c.above`, over higher bins, beyond the target; c.above becomes the
 * mass above it. Every thread has EACH bins, the first thread the highest. */
__device__ __forceinline__ int choose(const histogram &h, int bins, mass target, cut &c) {
    SHARED mass warps[WARPS], chosen_above;
    SHARED int chosen;
    mass sum = 0, all;
    const int top = bins - 1 - (int)threadIdx.x * EACH;
#pragma unroll
    for (int i = 0; i < EACH; i++)
        sum += top - i >= 0 ? bin_of(h, top - i) : 0;
    mass above = c.above + warp_before(sum, all);
    if (threadIdx.x % 32 == 0)
        warps[threadIdx.x / 32] = all;
    __syncthreads();
    for (int w = 0; w < (int)threadIdx.x / 32; w++)
        above += warps[w];
    if (above <= target && above + sum > target) {
        int at = top;
        for (; above + bin_of(h, at) <= target; at--)
            above += bin_of(h, at);
        chosen = at;
        chosen_above = above;
    }
    __syncthreads();
    c.above = chosen_above;
    return chosen;
}

__device__ __forceinline__ mass sum_of(const histogram &h) {
    SHARED mass warps[WARPS];
    mass sum = 0, all;
    for (int i = threadIdx.x; i < BINS; i += THREADS)
        sum += bin_of(h, i);
    warp_before(sum, all);
    if (threadIdx.x % 32 == 0)
        warps[threadIdx.x / 32] = all;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < WARPS; w++)
        sum += warps[w];
    return sum;
}

/* `first` is the histogram of the first digit; its sum exceeds the target. */
__device__ __forceinline__ cut find_cut(const row_state &row, bool count, const histogram &first,
                                        histogram &rest, mass target) {
    cut c = {0, 0};
    c.key = (unsigned)choose(first, BINS, target, c) << 21;
    for (int shift = 10; shift >= 0; shift -= 10) {
        const int width = shift > 0 ? 11 : 10;
        fill(rest, row, count, c.key, shift, width);
        c.key |= (unsigned)choose(rest, 1 << width, target, c) << shift;
    }
    return c;
}

/* The token of this key that has `before` others of it before it. Each warp looks at a part of the row. */
__device__ __forceinline__ void find_token(const row_state &row, unsigned key, mass before, int *token) {
    SHARED int found[WARPS];
    const int part = (row.vocab + WARPS - 1) / WARPS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int start = min(warp * part, row.vocab), end = min(start + part, row.vocab);
    int n = 0;
    for (int i = start + lane; i < end; i += 32)
        n += key_of(value_of(row, i, row.logits[i])) == key;
    for (int bits = 16; bits > 0; bits >>= 1)
        n += __shfl_xor_sync(0xffffffffu, n, bits);
    if (lane == 0)
        found[warp] = n;
    __syncthreads();
    int left = (int)before;
    for (int w = 0; w < warp; w++)
        left -= found[w];
    for (int i = start; left >= 0 && left < n; i += 32) {
        const bool is = i + lane < end && key_of(value_of(row, i + lane, row.logits[i + lane])) == key;
        const unsigned lanes = __ballot_sync(0xffffffffu, is);
        if (is && __popc(lanes & ((1u << lane) - 1)) == left)
            *token = i + lane;
        left -= __popc(lanes);
    }
    __syncthreads();
}

/* The row's maximum as a key, and where it is first as ~id; all ones when a logit is NaN. In `all` the sum of
 * exponentials of the untouched logits. */
__device__ __forceinline__ mass find_best(const row_state &row, online_sum &all) {
    SHARED mass warps[WARPS];
    online_sum sum = online_start();
    float max = -INFINITY;
    int id = -1;
    bool nan = false;
    walk_row<THREADS, 2>(row.logits, row.vocab, [&](int first, const auto &x) {
        online_add(sum, x);
#pragma unroll
        for (int i = 0; i < (int)(sizeof x / sizeof *x); i++) {
            const float logit = value_of(row, first + i, x[i]);
            nan |= x[i] != x[i];
            id = logit > max ? first + i : id;
            max = logit > max ? logit : max;
        }
    });
    all = online_row<THREADS>(sum);
    mass best = nan ? ~0ull : (mass)key_of(max) << 32 | (unsigned)~id;
    for (int bits = 16; bits > 0; bits >>= 1) {
        const mass other = __shfl_xor_sync(0xffffffffu, best, bits);
        best = other > best ? other : best;
    }
    if (threadIdx.x % 32 == 0)
        warps[threadIdx.x / 32] = best;
    __syncthreads();
    for (int w = 0; w < WARPS; w++)
        best = warps[w] > best ? warps[w] : best;
    return best;
}

__device__ __forceinline__ void set_banned(unsigned *bits, const int *list, int n, int vocab) {
    for (int i = threadIdx.x; i < (vocab + 31) / 32; i += THREADS)
        bits[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS)
        if (list[i] >= 0 && list[i] < vocab)
            atomicOr(&bits[list[i] / 32], 1u << list[i] % 32);
    __syncthreads();
}

__device__ __forceinline__ unsigned word_of(const psoup__device_draw &draw) {
    const uint4 words = philox_block(draw.seed, draw.sequence, draw.position / 4);
    const int i = draw.position % 4;
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

/* transformers' order and rules: see src/cpu/sample.c. Each stage looks for where the cumulative count or
 * mass crosses its target: at the k-th token, at the last that top-p keeps, at the one that is drawn. */
__device__ __forceinline__ void draw_token(row_state &row, const psoup__device_draw &draw, histogram &first,
                                           histogram &rest, int *token) {
    enum { TOP_K, TOP_P, DRAW };
    mass total = 0, target;
    for (int stage = draw.top_k > 0 && draw.top_k < row.vocab ? TOP_K : TOP_P; stage <= DRAW; stage++) {
        if (stage != DRAW)
            fill(first, row, stage == TOP_K, 0, 21, 11);
        if (stage == TOP_K) {
            target = draw.top_k - 1;
        } else if (stage == TOP_P) {
            total = sum_of(first);
            if (draw.top_p >= 1)
                continue;
            const mass part = (mass)ceil((double)draw.top_p * (double)total);
            target = part > 1 ? part - 1 : 0;
        } else {
            const mass u = word_of(draw) >> 8;
            target = u * (total >> 32) * 256 + (u * (total & 0xffffffff) >> 24);
        }
        const cut c = find_cut(row, stage == TOP_K, first, rest, target);
        if (stage == TOP_K) {
            row.floor = c.key;
            continue;
        }
        const mass each = mass_of(row, key_float(c.key)), before = (target - c.above) / each;
        if (stage == TOP_P)
            total = c.above + (before + 1) * each;
        else
            find_token(row, c.key, before, token);
    }
}

} // namespace

PSOUP__KERNEL(sample, PSOUP__SAMPLE_THREADS) {
    DYNAMIC_SHARED(histogram, histograms);
    SHARED int token;
    SHARED online_sum all;
    const psoup__device_draw &draw = a.draw[blockIdx.x];
    unsigned *bits = draw.n_banned > 0 ? reinterpret_cast<unsigned *>(histograms + 2) : nullptr;
    row_state row = {a.logits + (size_t)blockIdx.x * a.vocab, bits, a.vocab, 0, draw.temperature, a.unit, 0};
    if (bits)
        set_banned(bits, draw.banned, draw.n_banned, a.vocab);
    online_sum sum;
    const mass best = find_best(row, sum);
    row.max = key_float((unsigned)(best >> 32));
    if (!(fabsf(row.max) <= 3.402823466e38f)) {
        if (threadIdx.x == 0) {
            a.token[blockIdx.x] = -1;
            a.logprob[blockIdx.x] = NAN;
        }
        return;
    }
    if (threadIdx.x == 0) {
        token = (int)~(unsigned)best;
        all = sum; /* not in registers all the while */
    }
    if (draw.temperature > 0)
        draw_token(row, draw, histograms[0], histograms[1], &token);
    if (threadIdx.x == 0) {
        a.token[blockIdx.x] = token;
        a.logprob[blockIdx.x] = row.logits[token] - all.max - logf(all.sum);
    }
}
