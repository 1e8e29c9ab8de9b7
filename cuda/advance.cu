/* A decoding batch from one step to the next, so that many steps run without the host: the rules of the session's
 * take_token and ban (src/model/session.c). One block for a sequence. */
#include "device.cuh"

/* Whether the sequence ends with this token. */
static __device__ __forceinline__ bool last(const psoup__device_decoding &d, int token, int length) {
    for (int i = 0; !d.ignore_stop && i < d.n_stop; i++)
        if (d.stop[i] == token)
            return true;
    return length == d.most;
}

/* What may not come next: the stop tokens before `least`; then, by all threads, each token that would repeat an
 * n-gram. Their order does not matter, only that all are there. */
static __device__ __forceinline__ void ban(const psoup__device_decoding &d, int length, int *n_banned) {
    const int start = length < d.least ? d.n_stop : 0, size = d.ngram;
    for (int i = threadIdx.x; i < start; i += PSOUP__ADVANCE_THREADS)
        d.banned[i] = d.stop[i];
    if (threadIdx.x == 0)
        *n_banned = start;
    __syncthreads();
    const int *tail = d.history + length - (size - 1);
    for (int i = threadIdx.x; size > 0 && i + size <= length; i += PSOUP__ADVANCE_THREADS) {
        bool same = true;
        for (int j = 0; same && j < size - 1; j++)
            same = d.history[i + j] == tail[j];
        if (same)
            d.banned[atomicAdd(n_banned, 1)] = d.history[i + size - 1];
    }
    __syncthreads();
}

/* The sequence's rows, all of which read its last token next. */
static __device__ __forceinline__ void move_rows(const psoup__advance_args &a, int token, int length) {
    const int i = blockIdx.x, position = length - 1;
    const int first = a.first ? a.first[i] : i, end = a.first ? a.first[i + 1] : i + 1;
    for (int row = first + (int)threadIdx.x; row < end; row += PSOUP__ADVANCE_THREADS) {
        psoup__device_span &span = a.span[row];
        a.token[row] = token;
        a.position[row] = position;
        a.place[row] = a.page == 0 ? span.first + position
                                   : (int)(a.pages[span.first + position / a.page] * a.page + position % a.page);
        span.keys = length;
    }
}

PSOUP__KERNEL(advance, PSOUP__ADVANCE_THREADS) {
    SHARED int n_banned;
    SHARED bool goes_on;
    const int i = blockIdx.x;
    psoup__device_decoding &d = a.decoding[i];
    if (d.ended)
        return;
    const int token = a.drawn[i], length = d.length + 1;
    if (threadIdx.x == 0) {
        d.token[d.drawn] = token;
        d.logprob[d.drawn] = a.logprob[i];
        if (token >= 0)
            d.history[length - 1] = token;
        goes_on = token >= 0 && !last(d, token, length);
    }
    __syncthreads();
    if (goes_on) {
        ban(d, length, &n_banned);
        move_rows(a, token, length);
    }
    if (threadIdx.x != 0)
        return;
    d.drawn++;
    d.ended = !goes_on;
    if (!goes_on)
        return;
    d.length = length;
    a.draw[i].position++;
    a.draw[i].banned = d.banned;
    a.draw[i].n_banned = n_banned;
}
