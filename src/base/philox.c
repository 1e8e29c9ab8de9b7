/* src/base/philox.c: Philox4x32-10, "Parallel random numbers: as easy as 1, 2, 3" (Salmon et al.
 * 2011), with cuRAND's layout of seed, sequence and position in key and counter. */
#include "base/base.h"

#include <assert.h>
#include <math.h>

void psoup__philox_block(uint64_t seed, uint64_t sequence, uint64_t block, uint32_t out[4]) {
    uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32);
    uint32_t c2 = (uint32_t)sequence, c3 = (uint32_t)(sequence >> 32);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)c0 * 0xd2511f53u, p1 = (uint64_t)c2 * 0xcd9e8d57u;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9e3779b9u; /* golden ratio */
        k1 += 0xbb67ae85u; /* √3 − 1 */
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

uint32_t psoup__philox_word(uint64_t seed, uint64_t sequence, uint64_t position) {
    uint32_t words[4];
    psoup__philox_block(seed, sequence, position / 4, words);
    return words[position % 4];
}

uint32_t psoup__random_word(psoup__random *random) {
    return psoup__philox_word(random->seed, random->sequence, random->position++);
}

float psoup__random_uniform(psoup__random *random) {
    return psoup__uniform(psoup__random_word(random));
}

static float normal_of(uint32_t first, uint32_t second) {
    const double two_pi = 6.283185307179586;
    double u = 1.0 - (double)psoup__uniform(first); /* (0, 1]: its logarithm is finite */
    double v = (double)psoup__uniform(second);
    return (float)(sqrt(-2.0 * log(u)) * cos(two_pi * v));
}

float psoup__random_normal(psoup__random *random) {
    uint32_t first = psoup__random_word(random);
    return normal_of(first, psoup__random_word(random));
}

void psoup__random_normals(psoup__random *random, float *out, size_t n) {
    assert(random->position % 2 == 0);
    for (size_t i = 0; i < n;) {
        uint32_t words[4];
        psoup__philox_block(random->seed, random->sequence, random->position / 4, words);
        for (unsigned word = random->position % 4; word < 4 && i < n; word += 2, random->position += 2)
            out[i++] = normal_of(words[word], words[word + 1]);
    }
}

/* Lemire 2019, "Fast random integer generation in an interval": the high half of word · n, words
 * whose low half would favour some results drawn again. */
uint32_t psoup__random_below(psoup__random *random, uint32_t n) {
    if (n == 0)
        return 0;
    uint32_t unfair = (0u - n) % n; /* 2³² mod n */
    for (;;) {
        uint64_t product = (uint64_t)psoup__random_word(random) * n;
        if ((uint32_t)product >= unfair)
            return (uint32_t)(product >> 32);
    }
}

void psoup__random_shuffle(psoup__random *random, int32_t *items, size_t n) {
    for (size_t i = n; i > 1; i--) {
        size_t j = psoup__random_below(random, (uint32_t)i);
        int32_t item = items[i - 1];
        items[i - 1] = items[j];
        items[j] = item;
    }
}
