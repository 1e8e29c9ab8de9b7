/* src/base/f8.h: the 8-bit floats to bits of f32 and back, rounded to nearest even, with torch's NaNs: one
 * text for the CPU and for the GPU. */
#ifndef PSOUP__F8_H
#define PSOUP__F8_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#ifndef PSOUP__EVERYWHERE /* cuda/device.cuh says more */
#define PSOUP__EVERYWHERE static inline
#endif

/* The choice is one of masks, for a compiler moves a float operation behind a branch when only one side
 * needs it, and does not vectorise the loop then. */
PSOUP__EVERYWHERE uint32_t psoup__choose(bool first, uint32_t a, uint32_t b) {
#ifdef __AVX512F__
    return first ? a : b; /* which has masked operations for it */
#else
    uint32_t mask = 0u - (uint32_t)first;
    return (a & mask) | (b & ~mask);
#endif
}

PSOUP__EVERYWHERE float psoup__float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

PSOUP__EVERYWHERE uint32_t psoup__bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* e4m3: 1 sign, 4 exponent (bias 7), 3 fraction; magnitude 0x7f is NaN, there is no infinity. */
PSOUP__EVERYWHERE uint32_t psoup__f32_of_e4m3(uint8_t c) {
    uint32_t magnitude = c & 0x7fu, small = magnitude < 8; /* 2⁻⁶ (1 + m/8) − 2⁻⁶ then */
    float value = psoup__float_of((magnitude << 20) + ((120u + small) << 23)) -
                  psoup__float_of(psoup__choose(small, 121u << 23, 0));
    uint32_t bits = psoup__choose(magnitude == 0x7f, 0x7ff00000u, psoup__bits_of(value));
    return bits | (uint32_t)(c & 0x80u) << 24;
}

PSOUP__EVERYWHERE uint8_t psoup__e4m3_of_f32(uint32_t f) {
    uint32_t magnitude = f & 0x7fffffffu;
    bool small = magnitude < 0x3c800000u; /* 2⁻⁶; to a last place of 2⁻⁹ */
    float shifted = psoup__float_of(psoup__choose(small, magnitude, 0)) + 0x1p14f;
    uint32_t subnormal = psoup__bits_of(shifted) - 0x46800000u;
    uint32_t normal = (magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
    uint32_t bits = psoup__choose(small, subnormal, normal);
    bits = psoup__choose(magnitude >= 0x43f00000u, 0x7fu, bits); /* 480 and more, infinity, NaN */
    return (uint8_t)(bits | (f >> 24 & 0x80u));
}

/* e5m2: the upper byte of an f16; 1 sign, 5 exponent (bias 15), 2 fraction. */
PSOUP__EVERYWHERE uint32_t psoup__f32_of_e5m2(uint8_t c) {
    uint32_t magnitude = c & 0x7fu, small = magnitude < 4; /* 2⁻¹⁴ (1 + m/4) − 2⁻¹⁴ then */
    float value = psoup__float_of((magnitude << 21) + ((112u + small) << 23)) -
                  psoup__float_of(psoup__choose(small, 113u << 23, 0));
    uint32_t special = magnitude << 21 | 0x7f800000u | (uint32_t)(magnitude > 0x7c) << 22;
    uint32_t bits = psoup__choose(magnitude >= 0x7c, special, psoup__bits_of(value));
    return bits | (uint32_t)(c & 0x80u) << 24;
}

PSOUP__EVERYWHERE uint8_t psoup__e5m2_of_f32(uint32_t f) {
    uint32_t magnitude = f & 0x7fffffffu;
    bool small = magnitude < 0x38800000u; /* 2⁻¹⁴; to a last place of 2⁻¹⁶ */
    float shifted = psoup__float_of(psoup__choose(small, magnitude, 0)) + 0x1p7f;
    uint32_t subnormal = psoup__bits_of(shifted) - 0x43000000u;
    uint32_t normal = (magnitude - (112u << 23) + 0xfffffu + (magnitude >> 21 & 1u)) >> 21;
    uint32_t bits = psoup__choose(small, subnormal, normal);
    bits = psoup__choose(magnitude >= 0x47800000u, 0x7cu, bits); /* 65536 and more: infinity */
    bits = psoup__choose(magnitude > 0x7f800000u, 0x7fu, bits);
    return (uint8_t)(bits | (f >> 24 & 0x80u));
}

#endif
