/* cuda/advance.h: a decoding batch from one step to the next. See kernels.h. */
#ifndef PSOUP__ADVANCE_H
#define PSOUP__ADVANCE_H

#include <stdint.h>

enum { PSOUP__ADVANCE_THREADS = 128 };

/* Twins of psoup__decoding, psoup__draw and psoup__span in src/ops.h, which src/gpu/advance.c compares. */
typedef struct psoup__device_decoding {
    int32_t *history;
    int32_t length, most, least, ngram;
    const int32_t *stop;
    int32_t n_stop, ignore_stop;
    int32_t *banned, *token;
    float *logprob;
    int32_t drawn, ended;
} psoup__device_decoding;

typedef struct psoup__device_draw {
    float temperature;
    int32_t top_k;
    float top_p;
    int32_t spare;
    uint64_t seed, sequence, position;
    const int32_t *banned;
    int32_t n_banned, spare_too;
} psoup__device_draw;

typedef struct psoup__device_span {
    int32_t query, queries, keys, first;
} psoup__device_span;

/* One block for each sequence. */
typedef struct psoup__advance_args {
    psoup__device_decoding *decoding;
    psoup__device_draw *draw;
    const int32_t *first; /* of its rows; NULL: each has one */
    int32_t *token, *position, *place;
    psoup__device_span *span;
    const int32_t *drawn;
    const float *logprob;
    const int32_t *pages;
    int64_t page; /* rows in a page; 0: no pages */
} psoup__advance_args;

#define PSOUP__ADVANCE_KERNELS(X) X(advance, advance)

#endif
