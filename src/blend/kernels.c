/* The merger's inner loops over what stands in memory, compiled once per instruction set. */
#include "blend/blend.h"
#include "blend/vector.h"

#include <math.h>
#include <string.h>

void PSOUP__NAME(psoup__merge_add)(float *y, const float *x, float w, size_t n, bool first) {
    if (first)
        for (size_t i = 0; i < n; i++)
            y[i] = w * x[i];
    else
        for (size_t i = 0; i < n; i++)
            y[i] += w * x[i];
}

bool PSOUP__NAME(psoup__merge_within)(const float *x, float limit, size_t n) {
    int outside = 0;
    for (size_t i = 0; i < n; i++)
        outside |= !(fabsf(x[i]) <= limit);
    return !outside;
}

/* ---- sums -------------------------------------------------------------------------------------- */

/* One step sums this many elements in registers, input after input. */
#define VECTORS 4
#define STEP (VECTORS * VECTOR)
/* Bytes that each input is asked for before they are due. The hardware's own prefetching stops at pages:
 * 3 × bf16 ran at 0.79 of a triad's speed without this, at 0.92 with it (Sapphire Rapids, two threads);
 * half as far and four times as far lose some of it. */
#define AHEAD 1024

/* acc (+)= weight · input i at `at`. `same` is the inputs' common dtype or −1. */
INLINE void take(const psoup__sum_run *run, size_t i, size_t at, vec *acc, bool first, bool ahead,
                 const int same) {
    const psoup_dtype dtype = same >= 0 ? (psoup_dtype)same : run->dtypes[i];
    const size_t size = dtype == PSOUP_F32 ? 4 : 2;
    const char *in = (const char *)run->in[i] + at * size;
    const vec w = broadcast(run->weights[i]);
    if (ahead)
        for (size_t line = 0; line < STEP * size; line += 64)
            __builtin_prefetch(in + AHEAD + line);
#pragma GCC unroll 4
    for (size_t v = 0; v < VECTORS; v++) {
        vec product = w * load_as(in + v * VECTOR * size, dtype);
        acc[v] = first ? product : acc[v] + product;
    }
}

/* One step at element `at`, to `out`; the lanes of the result that are out of range. Constants where this
 * is inlined: stream, ahead, same. */
INLINE words step(const psoup__sum_run *run, size_t at, char *out, bool stream, bool ahead,
                  const int same) {
    vec acc[VECTORS];
    const ints limit = (ints)broadcast(run->limit);
    words outside = {0};
    take(run, 0, at, acc, true, ahead, same);
    for (size_t i = 1; i < run->count; i++)
        take(run, i, at, acc, false, ahead, same);
    const size_t out_size = run->out_dtype == PSOUP_F32 ? 4 : 2;
#pragma GCC unroll 4
    for (size_t v = 0; v < VECTORS; v++)
        outside |= (words)((ints)((words)acc[v] & 0x7fffffff) > limit); /* NaN is above infinity */
#pragma GCC unroll 2
    for (size_t v = 0; v < VECTORS; v += 2) {
        char *to = out + v * VECTOR * out_size;
        if (stream) {
            stream_as(to, acc[v], acc[v + 1], run->out_dtype);
        } else {
            store_as(to, acc[v], run->out_dtype);
            store_as(to + VECTOR * out_size, acc[v + 1], run->out_dtype);
        }
    }
    return outside;
}

/* The same for bf16 to bf16, elements at even and odd places apart: reading and writing them is then a shift
 * and a mask, half of what widening and narrowing in order costs. 3 × bf16 by AVX2: from 0.68 to 0.89 of a
 * triad's speed (Sapphire Rapids, two threads). */
enum { PAIRS = VECTORS / 2 };

INLINE void take_bf16(const psoup__sum_run *run, size_t i, size_t at, vec *even, vec *odd, bool first) {
    const char *in = (const char *)run->in[i] + at * 2;
    const vec w = broadcast(run->weights[i]);
    for (size_t line = 0; line < STEP * 2; line += 64)
        __builtin_prefetch(in + AHEAD + line);
#pragma GCC unroll 2
    for (size_t p = 0; p < PAIRS; p++) {
        words both = *(const loose_words *)(const void *)(in + p * VECTOR * 4);
        vec a = w * (vec)(both << 16), b = w * (vec)(both & 0xffff0000);
        even[p] = first ? a : even[p] + a;
        odd[p] = first ? b : odd[p] + b;
    }
}

INLINE words step_bf16(const psoup__sum_run *run, size_t at, char *out, bool stream) {
    vec even[PAIRS], odd[PAIRS];
    const ints limit = (ints)broadcast(run->limit);
    words outside = {0};
    take_bf16(run, 0, at, even, odd, true);
    for (size_t i = 1; i < run->count; i++)
        take_bf16(run, i, at, even, odd, false);
#pragma GCC unroll 2
    for (size_t p = 0; p < PAIRS; p++) {
        outside |= (words)((ints)((words)even[p] & 0x7fffffff) > limit);
        outside |= (words)((ints)((words)odd[p] & 0x7fffffff) > limit);
    }
    if (any_lane(outside)) /* NaN among them want another rounding */
        return step(run, at, out, false, false, PSOUP_BF16);
#pragma GCC unroll 2
    for (size_t p = 0; p < PAIRS; p++) {
        words both = bf16_above(even[p]) >> 16 | (bf16_above(odd[p]) & 0xffff0000);
        if (stream)
            stream_words(out + p * VECTOR * 4, both);
        else
            *(loose_words *)(void *)(out + p * VECTOR * 4) = both;
    }
    return outside;
}

/* Fewer elements than a step has: through copies padded with zeros. */
static words part(const psoup__sum_run *run, size_t at, size_t n) {
    char copies[PSOUP__SUM_INPUTS][STEP * 4], result[STEP * 4];
    const void *in[PSOUP__SUM_INPUTS];
    psoup__sum_run padded = *run;
    padded.in = in;
    for (size_t i = 0; i < run->count; i++) {
        size_t size = run->dtypes[i] == PSOUP_F32 ? 4 : 2;
        memset(copies[i], 0, sizeof copies[i]);
        memcpy(copies[i], (const char *)run->in[i] + at * size, n * size);
        in[i] = copies[i];
    }
    size_t out_size = run->out_dtype == PSOUP_F32 ? 4 : 2;
    words outside = step(&padded, 0, result, false, false, -1);
    memcpy((char *)run->out + at * out_size, result, n * out_size);
    return outside;
}

INLINE words steps(const psoup__sum_run *run, size_t at, size_t end, bool stream, const int same) {
    const size_t out_size = run->out_dtype == PSOUP_F32 ? 4 : 2;
    words outside = {0};
    if (same == PSOUP_BF16 && run->out_dtype == PSOUP_BF16)
        for (; at < end; at += STEP)
            outside |= step_bf16(run, at, (char *)run->out + at * 2, stream);
    for (; at < end; at += STEP)
        outside |= step(run, at, (char *)run->out + at * out_size, stream, true, same);
    return outside;
}

bool PSOUP__NAME(psoup__merge_sum_run)(const psoup__sum_run *run) {
    const size_t out_size = run->out_dtype == PSOUP_F32 ? 4 : 2;
    size_t at = 0, astray = (uintptr_t)run->out % 64;
    bool stream = run->stream && astray % out_size == 0;
    int same = (int)run->dtypes[0];
    words outside = {0};
    for (size_t i = 1; i < run->count; i++)
        same = run->dtypes[i] == run->dtypes[0] ? same : -1;
    size_t head = stream && astray > 0 ? (64 - astray) / out_size : 0; /* up to whole lines */
    for (head = head < run->n ? head : run->n; at < head;) {
        size_t n = head - at < STEP ? head - at : STEP;
        outside |= part(run, at, n);
        at += n;
    }
    size_t end = at + (run->n - at) / STEP * STEP;
    switch (same) {
    case PSOUP_BF16: outside |= steps(run, at, end, stream, PSOUP_BF16); break;
    case PSOUP_F16: outside |= steps(run, at, end, stream, PSOUP_F16); break;
    case PSOUP_F32: outside |= steps(run, at, end, stream, PSOUP_F32); break;
    default: outside |= steps(run, at, end, stream, -1); break;
    }
    if (end < run->n)
        outside |= part(run, end, run->n - end);
#if defined(__x86_64__)
    if (stream)
        _mm_sfence();
#endif
    return !any_lane(outside);
}

/* ---- factors ------------------------------------------------------------------------------------ */

enum { HALF = VECTOR / 2 };

void PSOUP__NAME(psoup__merge_scatter)(float *out, size_t out_stride, const float *x, size_t rank,
                                       size_t rows, double w, bool stream) {
    stream &= (uintptr_t)out % 64 == 0 && out_stride % 16 == 0 && rank % 16 == 0; /* whole lines */
    for (size_t i = 0; i < rows; i++, out += out_stride, x += rank) {
        size_t k = 0;
        for (size_t line = 0; line < rank; line += 16)
            __builtin_prefetch(x + line + AHEAD / sizeof *x);
        for (; k + HALF <= rank; k += HALF)
            narrow(out + k, w * widen(x + k), stream);
        for (; k < rank; k++)
            out[k] = (float)(w * (double)x[k]);
    }
#if defined(__x86_64__)
    if (stream)
        _mm_sfence();
#endif
}

void PSOUP__NAME(psoup__merge_add_double)(double *y, const float *x, double w, size_t n) {
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __builtin_prefetch(x + i + AHEAD / sizeof *x);
#pragma GCC unroll 8
        for (size_t k = 0; k < 16; k += HALF) {
            loose_doubles *at = (loose_doubles *)(y + i + k);
            *at = *at + w * widen(x + i + k);
        }
    }
    for (; i < n; i++)
        y[i] += w * (double)x[i];
}

void PSOUP__NAME(psoup__merge_round_double)(float *out, const double *x, double scale, size_t n,
                                            bool stream) {
    size_t i = 0;
    stream &= (uintptr_t)out % 64 == 0;
    for (; i + HALF <= n; i += HALF)
        narrow(out + i, scale * *(const loose_doubles *)(x + i), stream);
    for (; i < n; i++)
        out[i] = (float)(scale * x[i]);
#if defined(__x86_64__)
    if (stream)
        _mm_sfence();
#endif
}
