/* The methods' inner loops, compiled once per instruction set; plain loops that compilers
 * vectorise. */
#include "blend/methods.h"

#include <math.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

static void subtract(float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++)
        x[i] -= y[i];
}

static void finish(float *out, const float *base, const float *x, float s, size_t n) {
    if (base == NULL)
        for (size_t i = 0; i < n; i++)
            out[i] = s * x[i];
    else
        for (size_t i = 0; i < n; i++)
            out[i] = base[i] + s * x[i];
}

static void mix(float *out, const float *x, const float *y, float a, float b, size_t n) {
    for (size_t i = 0; i < n; i++)
        out[i] = a * x[i] + b * y[i];
}

static void mix_each(float *out, const float *x, const float *y, const float *a, const float *b,
                     size_t n) {
    for (size_t i = 0; i < n; i++)
        out[i] = a[i] * x[i] + b[i] * y[i];
}

static void dot_each(double *xx, double *yy, double *xy, const float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++) {
        double u = (double)x[i], v = (double)y[i];
        xx[i] += u * u;
        yy[i] += v * v;
        xy[i] += u * v;
    }
}

#define LANES 16

static double sum_lanes(const double *lane) {
    double sum = 0;
    for (int k = 0; k < LANES; k++)
        sum += lane[k];
    return sum;
}

/* What is left after whole lanes, filled with zeros: lanes are then indexed by constants alone, and
 * stay in registers. */
static void rest(float out[LANES], const float *x, size_t n) {
    memset(out, 0, LANES * sizeof *out);
    memcpy(out, x, n * sizeof *out);
}

static double dot(const float *x, const float *y, size_t n) {
    double lane[LANES] = {0};
    float last[2][LANES];
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++)
            lane[k] += (double)x[i + k] * (double)y[i + k];
    rest(last[0], x + i, n - i);
    rest(last[1], y + i, n - i);
    for (int k = 0; k < LANES; k++)
        lane[k] += (double)last[0][k] * (double)last[1][k];
    return sum_lanes(lane);
}

static double absolute(const float *x, size_t n) {
    double lane[LANES] = {0};
    float last[LANES];
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++)
            lane[k] += fabs((double)x[i + k]);
    rest(last, x + i, n - i);
    for (int k = 0; k < LANES; k++)
        lane[k] += fabs((double)last[k]);
    return sum_lanes(lane);
}

/* ---- thinning -------------------------------------------------------------------------------- */

static void window(float *x, size_t n, uint32_t low, uint32_t high, float scale) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], sizeof bits);
        bits &= 0x7fffffff;
        const bool inside = (bits >= low) & (bits < high);
        x[i] = inside ? scale * x[i] : 0;
    }
}

/* Blocks of Philox, side by side: words of 32 bits in lanes of 64, of which the upper halves are
 * never read. */
#if defined(__AVX512F__)
#define WIDTH 8
#define SIDE 4 /* vectors at a time: one's products take longer than its turn */
#elif defined(__AVX2__)
#define WIDTH 4
#define SIDE 2
#else
#define WIDTH 2
#define SIDE 2
#endif
#define BLOCKS (WIDTH * SIDE)
typedef uint64_t lanes __attribute__((vector_size(8 * WIDTH)));

/* The products of the lower halves. Compilers make three multiplications of this where they do not
 * know the upper halves to be 0. */
static inline void multiply(lanes *out, const lanes *a, uint32_t b) {
#if defined(__AVX512F__)
    *out = (lanes)_mm512_mul_epu32((__m512i)*a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    *out = (lanes)_mm256_mul_epu32((__m256i)*a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__)
    *out = (lanes)_mm_mul_epu32((__m128i)*a, _mm_set1_epi64x(b));
#else
    *out = (*a & 0xffffffff) * b;
#endif
}

/* psoup__philox_block of blocks block … block + BLOCKS − 1, the high 24 bits of each word. */
static void philox(uint32_t out[4 * BLOCKS], uint64_t seed, uint64_t sequence, uint64_t block) {
    lanes c[4][SIDE];
    uint64_t own[4][BLOCKS];
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (uint64_t i = 0; i < BLOCKS; i++) {
        own[0][i] = block + i;
        own[1][i] = (block + i) >> 32;
        own[2][i] = sequence;
        own[3][i] = sequence >> 32;
    }
    memcpy(c, own, sizeof c);
    for (int round = 0; round < 10; round++) {
        for (int s = 0; s < SIDE; s++) {
            lanes p0, p1;
            multiply(&p0, &c[0][s], 0xd2511f53u);
            multiply(&p1, &c[2][s], 0xcd9e8d57u);
            c[0][s] = (p1 >> 32) ^ c[1][s] ^ (uint64_t)k0;
            c[2][s] = (p0 >> 32) ^ c[3][s] ^ (uint64_t)k1;
            c[1][s] = p1;
            c[3][s] = p0;
        }
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    memcpy(own, c, sizeof own);
    for (int i = 0; i < BLOCKS; i++)
        for (int k = 0; k < 4; k++)
            out[4 * i + k] = (uint32_t)own[k][i] >> 8;
}

static void draw(uint32_t *out, size_t n, uint64_t seed, uint64_t sequence, uint64_t at) {
    uint32_t words[4 * BLOCKS];
    for (size_t i = 0; i < n;) {
        size_t skip = (size_t)((at + i) % 4), m = 4 * BLOCKS - skip;
        m = n - i < m ? n - i : m;
        philox(words, seed, sequence, (at + i) / 4);
        memcpy(out + i, words + skip, m * sizeof *out);
        i += m;
    }
}

static void keep(float *x, size_t n, const uint32_t *drawn, uint32_t limit, float scale) {
    for (size_t i = 0; i < n; i++)
        x[i] = drawn[i] < limit ? scale * x[i] : 0;
}

/* ---- electing signs -------------------------------------------------------------------------- */

static void vote(float *votes, const float *x, size_t n, bool of_signs, bool first) {
    if (first)
        memset(votes, 0, n * sizeof *votes);
    if (of_signs)
        for (size_t i = 0; i < n; i++)
            votes[i] += x[i] > 0 ? 1 : x[i] < 0 ? -1 : x[i];
    else
        for (size_t i = 0; i < n; i++)
            votes[i] += x[i];
}

static void elect(float *votes, size_t n, float tie) {
    for (size_t i = 0; i < n; i++) {
        float v = votes[i] == 0 ? tie : votes[i];
        votes[i] = v > 0 ? 1 : v < 0 ? -1 : v;
    }
}

static void agree(float *sum, float *divisor, const float *sign, const float *x, float w, float d,
                  size_t n, bool first) {
    if (first) {
        memset(sum, 0, n * sizeof *sum);
        memset(divisor, 0, n * sizeof *divisor);
    }
    for (size_t i = 0; i < n; i++) {
        bool same = sign[i] * x[i] > 0;
        sum[i] += same ? w * x[i] : 0;
        divisor[i] += same ? d : 0;
    }
}

static void settle(float *sum, const float *divisor, const float *sign, size_t n) {
    if (divisor != NULL)
        for (size_t i = 0; i < n; i++)
            sum[i] /= divisor[i] != 0 ? divisor[i] : 1;
    for (size_t i = 0; i < n; i++)
        sum[i] = sign[i] == sign[i] ? sum[i] : sign[i];
}

const psoup__method_kernels PSOUP__NAME(psoup__method_kernels) = {
    .add = PSOUP__NAME(psoup__merge_add),
    .subtract = subtract,
    .finish = finish,
    .mix = mix,
    .mix_each = mix_each,
    .dot = dot,
    .dot_each = dot_each,
    .absolute = absolute,
    .window = window,
    .draw = draw,
    .keep = keep,
    .vote = vote,
    .elect = elect,
    .agree = agree,
    .settle = settle,
};
