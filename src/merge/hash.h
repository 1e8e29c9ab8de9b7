/* src/merge/hash.h: fingerprints of what goes in and comes out. */
#ifndef PSOUP__MERGE_HASH_H
#define PSOUP__MERGE_HASH_H

#include "base/base.h"

enum { PSOUP__HASH_TEXT = 33, PSOUP__SHA256_TEXT = 65 }; /* hexadecimal digits and a NUL */

/* hash_kernel.c (compiled per instruction set), the one file that knows libxxhash. */
typedef struct psoup__hash_kernels {
    size_t bytes; /* of a state */
    void (*reset)(void *state);
    void (*update)(void *state, const void *data, size_t bytes);
    void (*digest)(const void *state, unsigned char out[16]);
} psoup__hash_kernels;
extern const psoup__hash_kernels psoup__hash_kernels_generic;
#ifdef __x86_64__
extern const psoup__hash_kernels psoup__hash_kernels_avx2, psoup__hash_kernels_avx512;
#endif

/* XXH3-128, in order; freed by psoup__free. */
typedef struct psoup__hash psoup__hash;
psoup__hash *psoup__hash_create(psoup_context *context, psoup_error *error);
void psoup__hash_update(psoup__hash *hash, const void *data, size_t bytes);
/* Bytes from … to − 1 of a tensor as they lie. */
void psoup__hash_bytes(psoup__hash *hash, const psoup__tensor *tensor, size_t from, size_t to);
void psoup__hash_text(const psoup__hash *hash, char out[PSOUP__HASH_TEXT]); /* as xxhsum -H2 prints it */

/* SHA-256 of a file. sha256.c is the one file that knows libmd. */
psoup_status psoup__sha256_file(psoup__file *file, char out[PSOUP__SHA256_TEXT], psoup_error *error);

#endif
