/* src/cpu, inside: vectors of the instruction set being compiled for, and the few functions on them
 * that the ops share. Elementwise loops are plain C: the compiler vectorises them, and as every step is one
 * IEEE operation (the build forbids contraction; `fused` asks for it by name) the vector body and the
 * scalar tail give the same bits. Sums are written out, because their order is part of the promise. */
#ifndef PSOUP__CPU_VECTOR_H
#define PSOUP__CPU_VECTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t vec_mask __attribute__((vector_size(4 * LANES)));
typedef float vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Before a loop whose iterations touch the same index of arrays that may be one and the same. */
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

static inline size_t tiles(size_t n, size_t tile) {
    return n / tile + (n % tile != 0);
}

static inline size_t least(size_t a, size_t b) {
    return a < b ? a : b;
}

static inline vec load(const float *p) {
    return *(const vec_unaligned *)p;
}

static inline void store(float *p, vec v) {
    *(vec_unaligned *)p = v;
}

static inline vec splat(float x) {
    return x - (vec){0};
}

/* a · b + c, rounded once where the machine can, the same in scalars and vectors. */
static inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

static inline vec vec_fused(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* x where it is greater than `most`, else `most`: a NaN in x is passed over. */
static inline vec vec_max(vec x, vec most) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)x, (__m512)most);
#elif defined(__AVX2__)
    return (vec)_mm256_max_ps((__m256)x, (__m256)most);
#else
    vec_mask greater = x > most;
    return (vec)(((vec_mask)x & greater) | ((vec_mask)most & ~greater));
#endif
}

/* x where it is less than `least`, else `least`. */
static inline vec vec_min(vec x, vec least) {
#if defined(__AVX512F__)
    return (vec)_mm512_min_ps((__m512)x, (__m512)least);
#elif defined(__AVX2__)
    return (vec)_mm256_min_ps((__m256)x, (__m256)least);
#else
    vec_mask less = x < least;
    return (vec)(((vec_mask)x & less) | ((vec_mask)least & ~less));
#endif
}

/* The lanes at even places of a, then of b; and those at odd ones. */
static inline vec evens(vec a, vec b) {
#if LANES == 16
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif LANES == 8
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6);
#endif
}

static inline vec odds(vec a, vec b) {
#if LANES == 16
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif LANES == 8
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

/* Of neighbours, first a's, then b's: the sum, and the greater. */
static inline vec pairs(vec a, vec b) {
    return evens(a, b) + odds(a, b);
}

static inline vec greater_ones(vec a, vec b) {
    return vec_max(evens(a, b), odds(a, b));
}

#define OF_FOUR(of, a) of(of((a)[0], (a)[1]), of((a)[2], (a)[3]))
#if LANES == 16
#define OF_ALL(of, a) of(of(OF_FOUR(of, a), OF_FOUR(of, (a) + 4)), of(OF_FOUR(of, (a) + 8), OF_FOUR(of, (a) + 12)))
#elif LANES == 8
#define OF_ALL(of, a) of(OF_FOUR(of, a), OF_FOUR(of, (a) + 4))
#else
#define OF_ALL OF_FOUR
#endif

/* Lane i: the sum of a[i]'s lanes, neighbours first. */
static inline vec sum_each(const vec *a /* [LANES] */) {
    return OF_ALL(pairs, a);
}

/* Lane i: the greatest of a[i]'s lanes, of which none is NaN. */
static inline vec max_each(const vec *a /* [LANES] */) {
    return OF_ALL(greater_ones, a);
}

static inline float sum_lanes(vec v) {
    for (int width = LANES; width > 1; width /= 2)
        v = pairs(v, v);
    return v[0];
}

/* The lanes with the neighbour groups of `width` swapped. */
static inline vec swap_lanes(vec v, int width) {
#if LANES == 16
    return width == 8   ? __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
           : width == 4 ? __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
           : width == 2 ? __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
                        : __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif LANES == 8
    return width == 4   ? __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3)
           : width == 2 ? __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5)
                        : __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    return width == 2 ? __builtin_shufflevector(v, v, 2, 3, 0, 1) : __builtin_shufflevector(v, v, 1, 0, 3, 2);
#endif
}

/* Of numbers: no lane is NaN. */
static inline float max_lanes(vec v) {
    for (int width = LANES / 2; width > 0; width /= 2)
        v = vec_max(swap_lanes(v, width), v);
    return v[0];
}

/* Σ a·b over four vectors of partial sums, then their lanes, then the tail in order. */
static inline float dot(const float *a, const float *b, size_t n) {
    vec sum[4] = {{0}, {0}, {0}, {0}};
    size_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (size_t s = 0; s < 4; s++)
            sum[s] = vec_fused(load(a + i + s * LANES), load(b + i + s * LANES), sum[s]);
    for (; i + LANES <= n; i += LANES)
        sum[0] = vec_fused(load(a + i), load(b + i), sum[0]);
    float total = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < n; i++)
        total = fused(a[i], b[i], total);
    return total;
}

static inline uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* exp(x) to about one unit in the last place: x = n·ln 2 + r, |r| <= ln 2 / 2, Taylor's series of degree 7
 * in r (remainder below 2⁻²⁷), and 2ⁿ as two factors, so that the ends of the range round to infinity and
 * to subnormals or zero. exp(−∞) = 0; NaN stays. */
static inline float exp_float(float x) {
    const float magic = 0x1.8p23f; /* adding it rounds to an integer in the low bits */
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    float shifted = fused(x, 0x1.715476p0f, magic);
    float n = shifted - magic;
    float r = fused(n, -0x1.62e4p-1f, x); /* ln 2 in two parts; n times the first is exact */
    r = fused(n, -0x1.7f7d1cp-20f, r);
    float y = 1.0f / 5040;
    y = fused(y, r, 1.0f / 720);
    y = fused(y, r, 1.0f / 120);
    y = fused(y, r, 1.0f / 24);
    y = fused(y, r, 1.0f / 6);
    y = fused(y, r, 0.5f);
    y = fused(y, r, 1.0f);
    y = fused(y, r, 1.0f);
    int32_t power = (int32_t)(float_bits(shifted) - float_bits(magic));
    int32_t half = power >> 1;
    float first = bits_float((uint32_t)(half + 127) << 23);
    float second = bits_float((uint32_t)(power - half + 127) << 23);
    return y * first * second;
}

/* exp_float of every lane, to the same bits: AVX-512's scaling rounds once, and so do two factors, y · first being exact. */
static inline vec vec_exp(vec x) {
    const vec magic = splat(0x1.8p23f);
    x = vec_max(splat(-104.0f), x);
    x = vec_min(splat(89.0f), x);
    const vec shifted = vec_fused(x, splat(0x1.715476p0f), magic), n = shifted - magic;
    vec r = vec_fused(n, splat(-0x1.62e4p-1f), x);
    r = vec_fused(n, splat(-0x1.7f7d1cp-20f), r);
    vec y = splat(1.0f / 5040);
    y = vec_fused(y, r, splat(1.0f / 720));
    y = vec_fused(y, r, splat(1.0f / 120));
    y = vec_fused(y, r, splat(1.0f / 24));
    y = vec_fused(y, r, splat(1.0f / 6));
    y = vec_fused(y, r, splat(0.5f));
    y = vec_fused(y, r, splat(1.0f));
    y = vec_fused(y, r, splat(1.0f));
#if defined(__AVX512F__)
    return (vec)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
    typedef uint32_t words __attribute__((vector_size(4 * LANES)));
    const words power = (words)shifted - (words)magic, half = (words)((vec_mask)power >> 1);
    return y * (vec)((half + 127) << 23) * (vec)((power - half + 127) << 23);
#endif
}

/* The first n lanes, 0 < n < LANES; the others are `otherwise`. */
static inline vec load_some(const float *p, size_t n, float otherwise) {
    float some[LANES];
    store(some, splat(otherwise));
    for (size_t i = 0; i < n; i++)
        some[i] = p[i];
    return load(some);
}

static inline void store_some(float *p, size_t n, vec v) {
    float some[LANES];
    store(some, v);
    for (size_t i = 0; i < n; i++)
        p[i] = some[i];
}

/* log(x) in double, for the one logarithm of a row: 2 artanh((m−1)/(m+1)) of the mantissa m in
 * [√½, √2), whose series after eleven terms leaves less than 2⁻⁵⁸. Ours, so that its bits depend on no
 * C library. */
static inline double log_positive(double x) { /* positive and finite */
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int exponent = (int)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffffull) | 0x3ff0000000000000ull;
    double m;
    memcpy(&m, &bits, sizeof m);
    const bool over = m > 1.4142135623730951;
    m *= over ? 0.5 : 1.0;
    exponent += over;
    double s = (m - 1) / (m + 1), square = s * s, series = 0;
#pragma GCC unroll 11
    for (int k = 21; k >= 1; k -= 2)
        series = series * square + 1.0 / k;
    return exponent * 0.6931471805599453 + 2 * s * series;
}

static inline double log_double(double x) {
    if (!(x > 0) || x > 1.7976931348623157e308)
        return x == 0 ? -__builtin_inf() : x > 0 ? x : __builtin_nan("");
    return log_positive(x);
}

#endif
