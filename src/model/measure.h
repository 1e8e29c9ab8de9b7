/* What a model, a batch or a session takes, found without running anything: by the code that lays memory out. Sizes
 * saturate at PSOUP__TOO_MUCH. */
#ifndef PSOUP__MEASURE_H
#define PSOUP__MEASURE_H

#include <string.h>

#include "model/tape.h"

#define PSOUP__TOO_MUCH ((int64_t)1 << 60)

static inline int64_t psoup__sum(int64_t a, int64_t b) {
    return a + b < PSOUP__TOO_MUCH ? a + b : PSOUP__TOO_MUCH;
}
static inline int64_t psoup__product(int64_t a, int64_t b) {
    int64_t product;
    return __builtin_mul_overflow(a, b, &product) || product > PSOUP__TOO_MUCH ? PSOUP__TOO_MUCH : product;
}

/* The largest batch that a tape will hold. */
typedef struct psoup__extent {
    int64_t rows, sequences;
    const int32_t *adapters; /* [n_adapters] numbers of those that its rows use, */
    int32_t n_adapters;
    int32_t each;            /* and how many of them one row uses at most */
    bool saved, cached, factors;
    bool recompute;          /* saved, but of each layer its input alone */
    int64_t pages;           /* of a cache that lists them */
    float lora_dropout, head_dropout;
    int64_t reads, heads;    /* log-probabilities, and outputs of one head, that are read */
} psoup__extent;

/* A tape that has held it: activations and logits in device memory, the rest in the host's. */
typedef struct psoup__footprint {
    int64_t activations, logits, host;
    int64_t reserved; /* what the ops take beside their arguments, one for all tapes of a backend */
} psoup__footprint;
psoup_status psoup__measure_batch(psoup_model *model, const psoup__extent *extent, psoup__footprint *out,
                                  psoup_error *error);

/* psoup_generate over so many prompts of at most `longest` tokens; options as psoup_generate completes them, but for
 * max_tokens, which is longest + most. */
typedef struct psoup__decoding_extent {
    int64_t prompts, longest, most; /* most: new tokens of one */
    bool history;                   /* n-grams are not to repeat */
    bool factors;
    const int32_t *adapters;
    int32_t n_adapters, each;
    const psoup_session_options *options;
} psoup__decoding_extent;
psoup_status psoup__measure_decoding(psoup_model *model, const psoup__decoding_extent *extent, psoup__footprint *out,
                                     int64_t *cache, psoup_error *error);

/* The base's weights: where they lie now, and what packing them in one direction takes. */
typedef struct psoup__base_bytes {
    int64_t mapped, stored, packed, one_way;
} psoup__base_bytes;
psoup__base_bytes psoup__measure_base(const psoup_model *model);
/* The table of rotations for so many positions, and what making it takes besides. */
int64_t psoup__measure_positions(const psoup_model *model, int64_t positions);

/* Fills in base, adapters and held, of a model that will learn or not; adds a footprint; and sums up, where `kept`
 * bytes of learning are in host memory whatever the device. */
void psoup__memory_begin(psoup_model *model, bool learns, psoup_memory *out);
void psoup__memory_add(psoup_memory *out, const psoup__footprint *print);
void psoup__memory_end(const psoup_model *model, int64_t kept, psoup_memory *out);
/* Into the caller's, which may be shorter. */
static inline void psoup__memory_copy(psoup_memory *out, const psoup_memory *memory) {
    size_t size = out->size;
    memcpy(out, memory, size < sizeof *memory ? size : sizeof *memory);
    out->size = size;
}

#endif
