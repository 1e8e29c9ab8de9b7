/* src/blend/vector.h: vectors of floats in the widest registers of the instruction set a file is compiled
 * for, read from and rounded to f32, f16 and bf16: the bits of psoup__to_f32 and psoup__from_f32, but for
 * a signalling NaN, which becomes quiet with the first sum. */
#ifndef PSOUP__MERGE_VECTOR_H
#define PSOUP__MERGE_VECTOR_H

#include "base/base.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define VECTOR 16
#elif defined(__AVX2__)
#define VECTOR 8
#else
#define VECTOR 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * VECTOR)));
typedef uint32_t words __attribute__((vector_size(4 * VECTOR)));
typedef int32_t ints __attribute__((vector_size(4 * VECTOR)));
typedef uint16_t halves __attribute__((vector_size(2 * VECTOR)));
typedef vec loose_vec __attribute__((aligned(1), may_alias));
typedef words loose_words __attribute__((aligned(1), may_alias));
typedef halves loose_halves __attribute__((aligned(1), may_alias));

INLINE vec broadcast(float x) {
#if defined(__AVX512F__)
    return _mm512_set1_ps(x);
#elif defined(__AVX2__)
    return _mm256_set1_ps(x);
#else
    return (vec){x, x, x, x};
#endif
}

/* 16 bits to 32 with zeros above, and the low 16 of 32: where gcc's own conversion goes by way of halves of
 * a register, the instruction. */
INLINE words widen_halves(halves x) {
#if defined(__AVX512F__)
    return (words)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
    return (words)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, words);
#endif
}

INLINE halves narrow_words(words x) {
#if defined(__AVX512F__)
    return (halves)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return __builtin_convertvector(x, halves);
#endif
}

/* VECTOR elements of f32, f16 or bf16 at any address. */
INLINE vec load_as(const char *from, psoup_dtype dtype) {
    if (dtype == PSOUP_F32)
        return *(const loose_vec *)(const void *)from;
    halves half = *(const loose_halves *)(const void *)from;
#if defined(__AVX512F__)
    if (dtype == PSOUP_F16)
        return _mm512_cvtph_ps((__m256i)half);
#elif defined(__AVX2__)
    if (dtype == PSOUP_F16)
        return _mm256_cvtph_ps((__m128i)half);
#endif
    words word = widen_halves(half);
    if (dtype == PSOUP_BF16)
        return (vec)(word << 16);
    /* Read as if it were binary32 with the exponent 112 too small; multiplying restores it, also of
     * subnormals. Infinities and NaN want an exponent of all ones. */
    words magnitude = (word & 0x7fff) << 13;
    words special = (words)((ints)magnitude >= 0x0f800000) & 0x7f800000;
    return (vec)((words)((vec)magnitude * 0x1p112f) | special | ((word & 0x8000) << 16));
}

/* f32 to the dtype's 16 bits, to nearest even; the formulas are explained in base/convert.c. A bf16 comes in
 * the upper halves first. */
INLINE words round_above(vec x) {
    words f = (words)x, bias = 0x7fff + (f >> 16 & 1);
#if defined(__AVX512F__)
    const __mmask16 number = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_ORD_Q);
    return (words)_mm512_mask_add_epi32((__m512i)(f | 0x400000), number, (__m512i)f, (__m512i)bias);
#else
    words nan = (words)((ints)(f & 0x7fffffff) > 0x7f800000);
    return ((f + bias) & ~nan) | ((f | 0x400000) & nan);
#endif
}

INLINE halves round_to_bf16(vec x) {
    return narrow_words(round_above(x) >> 16);
}

INLINE halves round_to_f16(vec x) {
#if defined(__AVX512F__)
    return (halves)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (halves)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    words f = (words)x, magnitude = f & 0x7fffffff;
    words tiny = (words)((ints)magnitude < 0x38800000);
    words subnormal = (words)((vec)(magnitude & tiny) + 0.5f) - 0x3f000000;
    words normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    words large = (words)((ints)magnitude >= 0x477ff000);
    words nan = (words)((ints)magnitude > 0x7f800000);
    words bits = (subnormal & tiny) | (normal & ~tiny);
    bits = (bits & ~large) | (0x7c00 & large);
    bits = (bits & ~nan) | ((0x7e00 | (magnitude >> 13 & 0x3ff)) & nan);
    return __builtin_convertvector(bits | (f >> 16 & 0x8000), halves);
#endif
}

#if defined(__AVX512F__)
/* Those of x, then those of y. */
INLINE words upper_halves(words x, words y) {
    static const uint16_t odd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return (words)_mm512_permutex2var_epi16((__m512i)x, _mm512_loadu_si512(odd), (__m512i)y);
}
#endif

/* Rounds VECTOR floats and writes them at any address. */
INLINE void store_as(char *to, vec x, psoup_dtype dtype) {
    if (dtype == PSOUP_F32)
        *(loose_vec *)(void *)to = x;
    else
        *(loose_halves *)(void *)to = dtype == PSOUP_BF16 ? round_to_bf16(x) : round_to_f16(x);
}

/* f32 that are no NaN rounded to bf16 in the upper halves, with what is left of them below. */
INLINE words bf16_above(vec x) {
    words f = (words)x;
    return f + 0x7fff + (f >> 16 & 1);
}

INLINE bool any_lane(words mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__x86_64__)
    return _mm_movemask_epi8((__m128i)mask) != 0;
#else
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

/* One vector of words past the caches, where the machine can; `to` is aligned to its size. */
INLINE void stream_words(char *to, words x) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i *)(void *)to, (__m512i)x);
#elif defined(__AVX2__)
    _mm256_stream_si256((__m256i *)(void *)to, (__m256i)x);
#elif defined(__x86_64__)
    _mm_stream_si128((__m128i *)(void *)to, (__m128i)x);
#else
    *(loose_words *)(void *)to = x;
#endif
}

/* The same for two vectors, rounded, past the caches where the machine can; `to` is aligned to what is written. */
INLINE void stream_as(char *to, vec x, vec y, psoup_dtype dtype) {
    if (dtype == PSOUP_F32) {
        stream_words(to, (words)x);
        stream_words(to + 4 * VECTOR, (words)y);
        return;
    }
#if defined(__AVX512F__)
    if (dtype == PSOUP_BF16) {
        stream_words(to, upper_halves(round_above(x), round_above(y)));
        return;
    }
#endif
    halves a = dtype == PSOUP_BF16 ? round_to_bf16(x) : round_to_f16(x);
    halves b = dtype == PSOUP_BF16 ? round_to_bf16(y) : round_to_f16(y);
#if defined(__AVX512F__)
    stream_words(to, (words)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)a), (__m256i)b, 1));
#elif defined(__AVX2__)
    stream_words(to, (words)_mm256_set_m128i((__m128i)b, (__m128i)a));
#else
    typedef long long two __attribute__((vector_size(16)));
    stream_words(to, (words)(two){(long long)a, (long long)b});
#endif
}

/* Half a vector of floats as doubles. */
typedef double doubles __attribute__((vector_size(4 * VECTOR)));
typedef float half_vec __attribute__((vector_size(2 * VECTOR)));
typedef double loose_doubles __attribute__((vector_size(4 * VECTOR), aligned(8), may_alias));
typedef half_vec loose_half_vec __attribute__((aligned(4), may_alias));

INLINE doubles widen(const float *from) {
    return __builtin_convertvector(*(const loose_half_vec *)from, doubles);
}

/* Past the caches where `stream` is set and the machine can; `to` is then aligned to what is written. */
INLINE void narrow(float *to, doubles x, bool stream) {
    half_vec half = __builtin_convertvector(x, half_vec);
#if defined(__AVX512F__)
    if (stream) {
        _mm256_stream_ps(to, (__m256)half);
        return;
    }
#elif defined(__AVX2__)
    if (stream) {
        _mm_stream_ps(to, (__m128)half);
        return;
    }
#endif
    *(loose_half_vec *)to = half;
}

#endif
