/* XXH3-128 through libxxhash. */
#define XXH_STATIC_LINKING_ONLY /* the size of its state, which lies in our memory */
#include <xxhash.h>
#if defined(__x86_64__) && __has_include(<xxh_x86dispatch.h>)
#include <xxh_x86dispatch.h> /* AVX2 and AVX-512 where the machine has them: the same hash, twice as fast */
#endif

#include "merge/hash.h"

struct psoup__hash {
    XXH3_state_t state; /* 64-byte aligned, as psoup__alloc aligns */
};

psoup__hash *psoup__hash_create(psoup_context *context, psoup_error *error) {
    psoup__hash *hash = psoup__alloc(context, 1, sizeof *hash, error);
    if (hash != NULL)
        XXH3_128bits_reset(&hash->state);
    return hash;
}

void psoup__hash_update(psoup__hash *hash, const void *data, size_t bytes) {
    XXH3_128bits_update(&hash->state, data, bytes);
}

void psoup__hash_text(const psoup__hash *hash, char out[PSOUP__HASH_TEXT]) {
    static const char digits[] = "0123456789abcdef";
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(&hash->state));
    for (int i = 0; i < 16; i++) {
        out[2 * i] = digits[canonical.digest[i] >> 4];
        out[2 * i + 1] = digits[canonical.digest[i] & 15];
    }
    out[32] = '\0';
}
