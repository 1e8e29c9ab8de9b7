/* Fingerprints: the state, and whose vectors work on it. */
#include "merge/hash.h"

struct psoup__hash {
    const psoup__hash_kernels *kernels;
    _Alignas(64) unsigned char state[]; /* of kernels->bytes; 64-byte aligned, as psoup__alloc aligns */
};

static const psoup__hash_kernels *kernels_of(const psoup_context *context) {
#ifdef __x86_64__
    if (psoup__isa_of(context) == PSOUP__ISA_AVX512)
        return &psoup__hash_kernels_avx512;
    if (psoup__isa_of(context) == PSOUP__ISA_AVX2)
        return &psoup__hash_kernels_avx2;
#endif
    return &psoup__hash_kernels_generic;
}

psoup__hash *psoup__hash_create(psoup_context *context, psoup_error *error) {
    const psoup__hash_kernels *kernels = kernels_of(context);
    psoup__hash *hash = psoup__alloc(context, 1, sizeof *hash + kernels->bytes, error);
    if (hash == NULL)
        return NULL;
    hash->kernels = kernels;
    kernels->reset(hash->state);
    return hash;
}

void psoup__hash_update(psoup__hash *hash, const void *data, size_t bytes) {
    hash->kernels->update(hash->state, data, bytes);
}

void psoup__hash_bytes(psoup__hash *hash, const psoup__tensor *tensor, size_t from, size_t to) {
    enum { PIECE = 1 << 14 };
    char buffer[PIECE];
    if (tensor->data != NULL) {
        psoup__hash_update(hash, (const char *)tensor->data + from, to - from);
        return;
    }
    for (; from < to; from += PIECE) {
        size_t n = to - from < PIECE ? to - from : PIECE;
        psoup__tensor_bytes(tensor, from, n, buffer);
        psoup__hash_update(hash, buffer, n);
    }
}

void psoup__hash_text(const psoup__hash *hash, char out[PSOUP__HASH_TEXT]) {
    static const char digits[] = "0123456789abcdef";
    unsigned char bytes[16];
    hash->kernels->digest(hash->state, bytes);
    for (int i = 0; i < 16; i++) {
        out[2 * i] = digits[bytes[i] >> 4];
        out[2 * i + 1] = digits[bytes[i] & 15];
    }
    out[32] = '\0';
}
