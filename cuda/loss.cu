/* Log-probs of chosen tokens, and their gradient: a block to a row, the logits read once. */
#include "lse.cuh"

PSOUP__KERNEL(logprob, PSOUP__LOSS_THREADS) {
    const float *row = a.logits + (size_t)blockIdx.x * a.vocab;
    online_sum mine = online_start();
    walk_row<PSOUP__LOSS_THREADS, 4>(row, a.vocab, [&](int, const auto &x) { online_add(mine, x); });
    const online_sum all = online_row<PSOUP__LOSS_THREADS>(mine);
    if (threadIdx.x == 0) {
        const float rest = logf(all.sum);
        a.lse[blockIdx.x] = all.max + rest;
        a.logprob[blockIdx.x] = row[a.target[blockIdx.x]] - all.max - rest;
    }
}

/* dlogits = d · (onehot(target) − exp(logits − lse)); a thread writes where it alone has read. */
PSOUP__KERNEL(logprob_backward, PSOUP__LOSS_THREADS) {
    const size_t at = (size_t)blockIdx.x * a.vocab;
    float *out = a.dlogits + at;
    const float lse = a.lse[blockIdx.x], d = a.dlogprob ? a.dlogprob[blockIdx.x] : 1;
    const int target = a.target[blockIdx.x];
    walk_row<PSOUP__LOSS_THREADS, 4>(a.logits + at, a.vocab, [&](int first, const auto &x) {
        enum { N = sizeof x / sizeof *x };
        pack<float> y;
#pragma unroll
        for (int i = 0; i < N; i++)
            y.x[i] = d * ((first + i == target ? 1.0f : 0.0f) - online_exp(x[i] - lse));
        if (N == 4 && aligned16(out + first)) {
            store_pack(out + first, y);
        } else {
#pragma unroll
            for (int i = 0; i < N; i++)
                out[first + i] = y.x[i];
        }
    });
}
