/* src/base/vector.h: vectors of the instruction set that a kernel source is compiled for. */
#ifndef PSOUP__BASE_VECTOR_H
#define PSOUP__BASE_VECTOR_H

#include "base/base.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define VECTOR 16 /* floats */
#elif defined(__AVX2__)
#define VECTOR 8
#else
#define VECTOR 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * VECTOR)));
typedef uint32_t words __attribute__((vector_size(4 * VECTOR)));
typedef uint16_t halves __attribute__((vector_size(2 * VECTOR)));
typedef vec loose_vec __attribute__((aligned(1), may_alias));
typedef halves loose_halves __attribute__((aligned(1), may_alias));

INLINE vec load(const float *from) {
    return *(const loose_vec *)from;
}

INLINE void store(float *to, vec value) {
    *(loose_vec *)to = value;
}

INLINE vec broadcast(float x) {
#if defined(__AVX512F__)
    return _mm512_set1_ps(x);
#elif defined(__AVX2__)
    return _mm256_set1_ps(x);
#else
    return (vec){x, x, x, x};
#endif
}

/* a · b + c */
INLINE vec multiply_add(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

/* VECTOR elements of the dtype as f32; exact. */
INLINE vec load_as_f32(const void *from, psoup_dtype dtype) {
    if (dtype == PSOUP_F32)
        return *(const loose_vec *)from;
    halves half = *(const loose_halves *)from;
#if defined(__AVX512F__)
    if (dtype == PSOUP_F16)
        return _mm512_cvtph_ps((__m256i)half);
#elif defined(__AVX2__)
    if (dtype == PSOUP_F16)
        return _mm256_cvtph_ps((__m128i)half);
#endif
    words word = __builtin_convertvector(half, words);
    if (dtype == PSOUP_BF16)
        return (vec)(word << 16);
    /* binary16 read as if it were binary32 with the exponent 112 too small; multiplying restores it,
     * also of subnormals. Infinities and NaN want an exponent of all ones. */
    words magnitude = (word & 0x7fff) << 13;
    words special = (words)(magnitude >= 0x0f800000) & 0x7f800000;
    return (vec)((words)((vec)magnitude * 0x1p112f) | special | ((word & 0x8000) << 16));
}

/* The first n floats of VECTOR, of any alignment; the other lanes are 0. */
INLINE vec load_some(const char *from, int64_t n) {
#if defined(__AVX512F__)
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), from);
#else
    float some[VECTOR] = {0};
    for (int64_t i = 0; i < n; i++)
        memcpy(&some[i], from + 4 * i, 4);
    return load(some);
#endif
}

/* Interleaves the lower, and the upper, halves of x and y. */
INLINE void interleave(vec x, vec y, vec *lower, vec *upper) {
#if VECTOR == 16
    *lower = __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *upper = __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                     15, 31);
#elif VECTOR == 8
    *lower = __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
    *upper = __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    *lower = __builtin_shufflevector(x, y, 0, 4, 1, 5);
    *upper = __builtin_shufflevector(x, y, 2, 6, 3, 7);
#endif
}

/* log2(VECTOR) perfect shuffles. */
INLINE void transpose_lines(vec r[VECTOR]) {
    vec t[VECTOR];
#pragma GCC unroll 4
    for (int stage = 1; stage < VECTOR; stage *= 2) {
#pragma GCC unroll 16
        for (int j = 0; j < VECTOR / 2; j++)
            interleave(r[j], r[j + VECTOR / 2], &t[2 * j], &t[2 * j + 1]);
#pragma GCC unroll 16
        for (int j = 0; j < VECTOR; j++)
            r[j] = t[j];
    }
}

/* out[p · width + j] = element p of line j, both below VECTOR; line j starts at from + j · line. */
INLINE void transpose(float *out, int64_t width, const char *from, size_t line,
                      psoup_dtype dtype) {
    vec r[VECTOR];
#pragma GCC unroll 16
    for (int j = 0; j < VECTOR; j++)
        r[j] = load_as_f32(from + (size_t)j * line, dtype);
    transpose_lines(r);
#pragma GCC unroll 16
    for (int p = 0; p < VECTOR; p++)
        store(out + p * width, r[p]);
}

/* The same of the first elements of the first lines, of f32: zeros are in the others' place. */
INLINE void transpose_some(float *out, int64_t width, const char *from, size_t line, int64_t lines, int64_t elements) {
    vec r[VECTOR];
#pragma GCC unroll 16
    for (int j = 0; j < VECTOR; j++)
        r[j] = load_some(from + (size_t)j * line, j < lines ? elements : 0);
    transpose_lines(r);
#pragma GCC unroll 16
    for (int p = 0; p < VECTOR; p++)
        if (p < elements)
            store(out + p * width, r[p]);
}

#endif
