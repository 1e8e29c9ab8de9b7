/* tests/checkops: every op of src/ops.h on every backend, against float64. One file for each file of cuda/.
 *
 * A check asks for buffers, runs the op and compares. Inputs are random words of a fixed seed; outputs begin as
 * NaN and end in a sentinel; what an op adds to begins as random numbers. Gradients are compared with finite
 * differences of the float64 forward (see `differences`). An op that allocates or waits fails (watch.c).
 */
#ifndef TESTS_CHECKOPS_H
#define TESTS_CHECKOPS_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ops.h"

enum { MOST_BUFFERS = 64, MOST_NOTE = 256 };

/* Device memory and its twin on the host. */
typedef struct buffer {
    float *host;   /* [n + 1]; the last is a sentinel, NaN */
    float *device; /* the same bytes, or n elements of `dtype` */
    size_t n;
    psoup_dtype dtype;
} buffer;

typedef struct checker {
    psoup_context *context;
    psoup__backend *be;
    const psoup__ops *ops;
    bool cuda;
    const char *op;        /* what is being checked, */
    char note[MOST_NOTE];  /* and with which parameters */
    uint64_t seed;         /* of the next buffer */
    buffer buffers[MOST_BUFFERS];
    int n_buffers;
    void *blocks[2 * MOST_BUFFERS]; /* device memory that is no buffer of numbers */
    int n_blocks;
    bool aside; /* what is done is no op: it may allocate and wait; see watch.c */
    int checks, failures;
} checker;

/* Sizes at which tiles, warps and vectors end badly. */
static const int32_t ragged[] = {1, 2, 37, 64, 127, 128, 129, 640};
enum { RAGGED = sizeof ragged / sizeof *ragged };

/* Starts one case: its parameters, as printf has them, are told where it fails. Frees what the last one asked for. */
void begin(checker *c, const char *op, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Says what is wrong, with the case's parameters, and counts it. */
void fail(checker *c, const char *format, ...) __attribute__((format(printf, 2, 3)));

buffer *input(checker *c, size_t n);                      /* standard normal numbers */
buffer *input_of(checker *c, size_t n, psoup_dtype dtype); /* rounded to a dtype, on the host too */
buffer *output(checker *c, size_t n);                     /* NaN */
buffer *values(checker *c, const float *host, size_t n);   /* these */
void *block(checker *c, const void *host, size_t bytes);  /* any bytes on the device */
void put(checker *c, buffer *b);                          /* host to device */
void get(checker *c, buffer *b);                          /* device to host; the sentinel must still be there */

/* Reads the buffer and compares: |got − want| ≤ tolerance · (1 + max |want|). */
void expect(checker *c, const char *what, buffer *b, const double *want, double tolerance);
void expect_true(checker *c, const char *what, bool truth);

/* d loss / d x[i] for i = 0, step, 2·step …, by central differences in float64; compares with base[i] + that, where
 * `got` is the buffer of the gradient and base what it began with (NULL: 0). loss reads x through `arg`. */
typedef double (*loss_fn)(void *arg);
void differences(checker *c, const char *what, buffer *got, const float *base, double *x, size_t n, size_t step,
                 loss_fn loss, void *arg, double tolerance);

double *doubles(size_t n);                   /* zeros */
double *doubles_of(const float *x, size_t n);
double inner(const double *a, const double *b, size_t n);

/* How close a result has to be where products are taken in a dtype: its unit of rounding, some times over. */
double tolerance_of(psoup_dtype dtype);

/* From `watch` on an op of the backend that allocates or waits fails. The allocator is for the context before it. */
psoup_allocator watched_allocator(checker *c);
void watch(checker *c);

void check_layer(checker *c);
void check_rows(checker *c);
void check_attention(checker *c);
void check_attention_decode(checker *c);
void check_linear_mix(checker *c);
void check_loss(checker *c);
void check_policy(checker *c);
void check_sample(checker *c);
void check_advance(checker *c);
void check_adamw(checker *c);

#endif
