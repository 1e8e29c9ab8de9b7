/* What the machine can do, for the benches: multiply-adds in registers, and reads of memory. */
#ifndef BENCH_LIMITS_H
#define BENCH_LIMITS_H

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { THREADS = 2 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

enum { ROUNDS = 2000000, CHAINS = 12 }; /* independent sums: they hide the latency of one */

/* Each returns how many floating-point operations it did. */
typedef double arithmetic(volatile float *out);

#if defined(__x86_64__)
#define WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
__attribute__((target("avx512f"))) static double fuse_512(volatile float *out) {
    __m512 sum[CHAINS], x = _mm512_set1_ps(*out);
    for (int i = 0; i < CHAINS; i++)
        sum[i] = _mm512_set1_ps((float)i);
    for (int r = 0; r < ROUNDS; r++)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++)
            sum[i] = _mm512_fmadd_ps(sum[i], x, x);
    for (int i = 0; i < CHAINS; i++)
        *out += _mm512_cvtss_f32(sum[i]);
    return 2.0 * ROUNDS * CHAINS * 16;
}
__attribute__((target("avx2,fma"))) static double fuse_256(volatile float *out) {
    __m256 sum[CHAINS], x = _mm256_set1_ps(*out);
    for (int i = 0; i < CHAINS; i++)
        sum[i] = _mm256_set1_ps((float)i);
    for (int r = 0; r < ROUNDS; r++)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++)
            sum[i] = _mm256_fmadd_ps(sum[i], x, x);
    for (int i = 0; i < CHAINS; i++)
        *out += _mm256_cvtss_f32(sum[i]);
    return 2.0 * ROUNDS * CHAINS * 8;
}
#else
#define WIDEST
#endif

typedef float lanes __attribute__((vector_size(16)));

static double multiply_and_add(volatile float *out) {
    lanes sum[CHAINS], x = {*out, *out, *out, *out};
    for (int i = 0; i < CHAINS; i++)
        sum[i] = x * (float)i;
    for (int r = 0; r < ROUNDS; r++)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) {
#if defined(__aarch64__)
            sum[i] = vfmaq_f32(x, sum[i], x);
#else
            sum[i] = sum[i] * x + x;
#endif
        }
    for (int i = 0; i < CHAINS; i++)
        *out += sum[i][0];
    return 2.0 * ROUNDS * CHAINS * 4;
}

static arithmetic *widest(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f"))
        return fuse_512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return fuse_256;
#endif
    return multiply_and_add;
}

WIDEST static float read_all(const float *x, size_t n) {
    lanes part[32] = {{0}};
    for (size_t i = 0; i + 128 <= n; i += 128)
#pragma GCC unroll 32
        for (int c = 0; c < 32; c++) {
            lanes value;
            memcpy(&value, x + i + c * 4, sizeof value);
            part[c] += value;
        }
    float sum = 0;
    for (int c = 0; c < 32; c++)
        sum += part[c][0];
    return sum;
}

typedef struct limit_arg {
    const float *x; /* NULL: arithmetic */
    size_t n;
    volatile float out;
    double done; /* operations or bytes */
} limit_arg;

static void *limit_thread(void *arg) {
    limit_arg *me = arg;
    if (me->x == NULL) {
        me->done = widest()(&me->out);
    } else {
        me->out = read_all(me->x, me->n);
        me->done = 4.0 * (double)me->n;
    }
    return NULL;
}

/* What THREADS threads do in a nanosecond, the best of seven: floating-point operations where x is NULL,
 * else bytes read of x [n]. */
static inline double limit(const float *x, size_t n) {
    double best = 0;
    for (int repeat = 0; repeat < 7; repeat++) {
        pthread_t threads[THREADS];
        limit_arg args[THREADS];
        double done = 0, start = now();
        for (int t = 0; t < THREADS; t++) {
            args[t] = (limit_arg){x == NULL ? NULL : x + (size_t)t * (n / THREADS), n / THREADS,
                                  0.5f, 0};
            if (pthread_create(&threads[t], NULL, limit_thread, &args[t]) != 0)
                exit(1);
        }
        for (int t = 0; t < THREADS; t++) {
            pthread_join(threads[t], NULL);
            done += args[t].done;
        }
        double rate = 1e-9 * done / (now() - start);
        best = rate > best ? rate : best;
    }
    return best;
}

#endif
