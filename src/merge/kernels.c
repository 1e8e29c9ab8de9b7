/* The merger's inner loops, compiled once per instruction set; plain loops that compilers
 * vectorise. */
#include "merge/merge.h"

#include <math.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

void PSOUP__NAME(psoup__merge_stream)(void *out, const void *in, size_t bytes) {
#if defined(__x86_64__)
    char *o = out;
    const char *p = in;
    size_t lines = bytes / 64 * 64;
    for (size_t i = 0; i < lines; i += 16)
        _mm_stream_si128((__m128i *)(void *)(o + i),
                         _mm_loadu_si128((const __m128i *)(const void *)(p + i)));
    memcpy(o + lines, p + lines, bytes - lines);
    _mm_sfence();
#else
    memcpy(out, in, bytes);
#endif
}
