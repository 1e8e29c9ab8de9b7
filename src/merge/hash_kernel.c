/* XXH3-128, compiled once per instruction set: libxxhash's header holds all of it, in the vectors of whatever
 * it is compiled for. The same hash on all. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "merge/hash.h"

static void reset(void *state) {
    XXH3_128bits_reset(state);
}

static void update(void *state, const void *data, size_t bytes) {
    XXH3_128bits_update(state, data, bytes);
}

static void digest(const void *state, unsigned char out[16]) {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state));
    memcpy(out, canonical.digest, 16);
}

const psoup__hash_kernels PSOUP__NAME(psoup__hash_kernels) = {sizeof(XXH3_state_t), reset, update, digest};
