/* src/base/convert.c: floats of other widths to f32 and back, rounding to nearest even. Compiled
 * once per instruction set; the integer formulas and the F16C instructions give the same bits.
 *
 * A NaN keeps its sign and as much of its payload as fits; one that is narrowed becomes quiet, so
 * that cutting its payload cannot make it an infinity. The 8-bit floats have torch's NaNs.
 *
 * q8_0 is ggml's quantize_row_q8_0_ref (ggml-quants.c): d = max|x| / 127 in f32, kept as f16;
 * q = round(x · (1/d)), halves away from zero. */
#include "base/base.h"
#include "base/f8.h"

#include <assert.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

void PSOUP__NAME(psoup__to_f32_kernel)(float *out, const void *in, psoup_dtype dtype, size_t n);
void PSOUP__NAME(psoup__from_f32_kernel)(void *out, psoup_dtype dtype, const float *in, size_t n);

/* f16: 1 sign, 5 exponent (bias 15), 10 fraction; f32: 1, 8 (bias 127), 23. */
static inline uint32_t f32_of_f16(uint16_t h) {
    uint32_t magnitude = h & 0x7fffu, normal = (magnitude << 13) + (112u << 23), subnormal;
    float small = (float)(int32_t)magnitude * 0x1p-24f; /* exact, and normal in f32 */
    memcpy(&subnormal, &small, 4);
    uint32_t special = (magnitude << 13) | 0x7f800000u | (magnitude > 0x7c00u ? 0x400000u : 0);
    uint32_t bits = magnitude < 0x400u ? subnormal : normal;
    bits = magnitude >= 0x7c00u ? special : bits;
    return bits | (uint32_t)(h & 0x8000u) << 16;
}

static inline uint16_t f16_of_f32(uint32_t f) {
    uint32_t magnitude = f & 0x7fffffffu, subnormal;
    float shifted;
    memcpy(&shifted, &magnitude, 4);
    shifted = (magnitude < 0x38800000u ? shifted : 0.0f) + 0.5f; /* a last place of 2⁻²⁴ */
    memcpy(&subnormal, &shifted, 4);
    subnormal -= 0x3f000000u;
    uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    uint32_t bits = magnitude < 0x38800000u ? subnormal : normal; /* 2⁻¹⁴ */
    bits = magnitude >= 0x477ff000u ? 0x7c00u : bits;             /* 65520 and more: infinity */
    bits = magnitude > 0x7f800000u ? (0x7e00u | (magnitude >> 13 & 0x3ffu)) : bits;
    return (uint16_t)(bits | (f >> 16 & 0x8000u));
}

static inline uint16_t bf16_of_f32(uint32_t f) {
    uint32_t rounded = (f + 0x7fffu + (f >> 16 & 1u)) >> 16;
    return (uint16_t)((f & 0x7fffffffu) > 0x7f800000u ? (f >> 16 | 0x40u) : rounded);
}

static void f16_to_f32(char *restrict out, const char *restrict in, size_t n) {
    size_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(
            (float *)(void *)(out + 4 * i),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(in + 2 * i))));
#endif
    for (; i < n; i++) {
        uint16_t h;
        memcpy(&h, in + 2 * i, 2);
        uint32_t f = f32_of_f16(h);
        memcpy(out + 4 * i, &f, 4);
    }
}

static void f32_to_f16(char *restrict out, const char *restrict in, size_t n) {
    size_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(void *)(out + 2 * i),
                         _mm256_cvtps_ph(_mm256_loadu_ps((const float *)(const void *)(in + 4 * i)),
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
    for (; i < n; i++) {
        uint32_t f;
        memcpy(&f, in + 4 * i, 4);
        uint16_t h = f16_of_f32(f);
        memcpy(out + 2 * i, &h, 2);
    }
}

static void bf16_to_f32(char *restrict out, const char *restrict in, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, in + 2 * i, 2);
        uint32_t f = (uint32_t)h << 16;
        memcpy(out + 4 * i, &f, 4);
    }
}

static void f32_to_bf16(char *restrict out, const char *restrict in, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t f;
        memcpy(&f, in + 4 * i, 4);
        uint16_t h = bf16_of_f32(f);
        memcpy(out + 2 * i, &h, 2);
    }
}

static void e4m3_to_f32(char *restrict out, const char *restrict in, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t f = psoup__f32_of_e4m3((uint8_t)in[i]);
        memcpy(out + 4 * i, &f, 4);
    }
}

static void f32_to_e4m3(char *restrict out, const char *restrict in, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t f;
        memcpy(&f, in + 4 * i, 4);
        out[i] = (char)psoup__e4m3_of_f32(f);
    }
}

static void e5m2_to_f32(char *restrict out, const char *restrict in, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t f = psoup__f32_of_e5m2((uint8_t)in[i]);
        memcpy(out + 4 * i, &f, 4);
    }
}

static void f32_to_e5m2(char *restrict out, const char *restrict in, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t f;
        memcpy(&f, in + 4 * i, 4);
        out[i] = (char)psoup__e5m2_of_f32(f);
    }
}

static void q8_0_to_f32(char *restrict out, const char *restrict in, size_t n) {
    for (size_t block = 0; block < n / PSOUP__Q8_BLOCK; block++, in += PSOUP__Q8_BYTES) {
        uint16_t h;
        float d;
        memcpy(&h, in, 2);
        uint32_t bits = f32_of_f16(h);
        memcpy(&d, &bits, 4);
        for (int i = 0; i < PSOUP__Q8_BLOCK; i++, out += 4) {
            float x = (float)(signed char)in[2 + i] * d;
            memcpy(out, &x, 4);
        }
    }
}

/* A block that holds a NaN or infinity becomes NaN as a whole: no scale could say it. */
static void f32_to_q8_0(char *restrict out, const char *restrict in, size_t n) {
    float x[PSOUP__Q8_BLOCK];
    for (size_t block = 0; block < n / PSOUP__Q8_BLOCK; block++, out += PSOUP__Q8_BYTES) {
        uint32_t most = 0, bits; /* magnitudes order as their bits do, NaN above all */
        memcpy(x, in + 4 * PSOUP__Q8_BLOCK * block, sizeof x);
        for (int i = 0; i < PSOUP__Q8_BLOCK; i++) {
            memcpy(&bits, &x[i], 4);
            bits &= 0x7fffffffu;
            most = bits > most ? bits : most;
        }
        float amax, d, inverse;
        memcpy(&amax, &most, 4);
        d = amax / 127.0f;
        inverse = 1.0f / d;
        memcpy(&bits, &d, 4);
        uint16_t h = f16_of_f32(bits);
        if (most >= 0x7f800000u)
            h = 0x7e00;
        memcpy(out, &h, 2);
        if (most >= 0x7f800000u || d < 0x1p-126f) { /* the inverse of less overflows */
            memset(out + 2, 0, PSOUP__Q8_BLOCK);
            continue;
        }
        for (int i = 0; i < PSOUP__Q8_BLOCK; i++) {
            float v = x[i] * inverse;
            int32_t whole = (int32_t)v;
            float rest = v - (float)whole; /* exact */
            out[2 + i] = (char)(whole + (rest >= 0.5f) - (rest <= -0.5f));
        }
    }
}

static void f64_to_f32(char *restrict out, const char *restrict in, size_t n) {
    for (size_t i = 0; i < n; i++) {
        double d;
        memcpy(&d, in + 8 * i, 8);
        float f = (float)d;
        memcpy(out + 4 * i, &f, 4);
    }
}

static void f32_to_f64(char *restrict out, const char *restrict in, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float f;
        memcpy(&f, in + 4 * i, 4);
        double d = f;
        memcpy(out + 8 * i, &d, 8);
    }
}

void PSOUP__NAME(psoup__to_f32_kernel)(float *out, const void *in, psoup_dtype dtype, size_t n) {
    static void (*const convert[])(char *restrict, const char *restrict, size_t) = {
        [PSOUP_F16] = f16_to_f32,       [PSOUP_BF16] = bf16_to_f32,     [PSOUP_F64] = f64_to_f32,
        [PSOUP_F8_E4M3] = e4m3_to_f32,  [PSOUP_F8_E5M2] = e5m2_to_f32,  [PSOUP_Q8_0] = q8_0_to_f32,
    };
    assert(psoup__dtype_is_float(dtype) && (dtype != PSOUP_Q8_0 || n % PSOUP__Q8_BLOCK == 0));
    if (n == 0)
        return;
    if (dtype == PSOUP_F32)
        memcpy((void *)out, in, n * 4);
    else
        convert[dtype]((char *)out, in, n);
}

void PSOUP__NAME(psoup__from_f32_kernel)(void *out, psoup_dtype dtype, const float *in, size_t n) {
    static void (*const convert[])(char *restrict, const char *restrict, size_t) = {
        [PSOUP_F16] = f32_to_f16,       [PSOUP_BF16] = f32_to_bf16,     [PSOUP_F64] = f32_to_f64,
        [PSOUP_F8_E4M3] = f32_to_e4m3,  [PSOUP_F8_E5M2] = f32_to_e5m2,  [PSOUP_Q8_0] = f32_to_q8_0,
    };
    assert(psoup__dtype_is_float(dtype) && (dtype != PSOUP_Q8_0 || n % PSOUP__Q8_BLOCK == 0));
    if (n == 0)
        return;
    if (dtype == PSOUP_F32)
        memcpy(out, (const void *)in, n * 4);
    else
        convert[dtype](out, (const char *)in, n);
}
