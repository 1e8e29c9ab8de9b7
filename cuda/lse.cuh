/* log Σ exp of a row by one block, in one pass: every thread keeps the largest element it has seen and the
 * sum of exponentials relative to it (Milakov & Gimelshein 2018), and they are put together at the end. */
#ifndef PSOUP__LSE_CUH
#define PSOUP__LSE_CUH

#include "device.cuh"

static const float LOG2_E = 1.44269504f;

/* sum · exp(max) is the sum of the exponentials. max is finite from the start, so that −∞ adds nothing. */
struct online_sum {
    float max, sum;
};

__device__ __forceinline__ online_sum online_start() { return {-3.402823466e38f, 0}; }

__device__ __forceinline__ float online_exp(float x) { return fast_exp2(x * LOG2_E); }

template <int N> __device__ __forceinline__ void online_add(online_sum &s, const float (&x)[N]) {
    float most = x[0];
#pragma unroll
    for (int i = 1; i < N; i++)
        most = fmaxf(most, x[i]);
    if (most > s.max) {
        s.sum *= online_exp(s.max - most);
        s.max = most;
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        s.sum += online_exp(x[i] - s.max);
}

/* The row's, in every thread: the log-sum-exp is max + log(sum). */
template <int THREADS> __device__ __forceinline__ online_sum online_row(online_sum s) {
    SHARED float most[THREADS / 32];
    const float warp = warp_max(s.max);
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        most[threadIdx.x / 32] = warp;
    __syncthreads();
    float max = most[0];
    for (int i = 1; i < THREADS / 32; i++)
        max = fmaxf(max, most[i]);
    return {max, block_sum<THREADS>(s.sum * online_exp(s.max - max))};
}

/* Calls each(first index, pack of 4) for the row's packs and each(index, pack of 1) for the elements before
 * and after them: a row may begin anywhere. A thread's elements come in ascending order, UNROLL packs of them
 * in flight together. */
template <int THREADS, int UNROLL, typename EACH>
__device__ __forceinline__ void walk_row(const float *row, int n, EACH each) {
    const int head = min(n, (int)((16 - (reinterpret_cast<uintptr_t>(row) & 15)) % 16 / 4));
    const int packs = (n - head) / 4, thread = threadIdx.x, tail = head + packs * 4 + thread;
    if (thread < head) {
        const float one[1] = {row[thread]};
        each(thread, one);
    }
    int i = thread;
    for (; i + (UNROLL - 1) * THREADS < packs; i += UNROLL * THREADS) {
        pack<float> x[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
            x[u] = load_pack(row + head + (i + u * THREADS) * 4);
#pragma unroll
        for (int u = 0; u < UNROLL; u++)
            each(head + (i + u * THREADS) * 4, x[u].x);
    }
    for (; i < packs; i += THREADS)
        each(head + i * 4, load_pack(row + head + i * 4).x);
    if (tail < n) {
        const float one[1] = {row[tail]};
        each(tail, one);
    }
}

#endif
