/* checkops --bench: how long every op takes on a GPU, beside what it needs at least.
 *
 * A case names an op, the memory it works in and what it has to move and multiply. It is run on as many
 * copies of that memory as no cache holds, one after another, as a CUDA graph: what is timed is the device
 * alone. Its floor is the larger of two times: its bytes at the rate of a device copy, its products at that
 * of a large bf16 product, both measured in the same run.
 */
#ifndef TESTS_CHECKOPS_BENCH_H
#define TESTS_CHECKOPS_BENCH_H

#include "checkops.h"
#include "gpu/internal.h"

enum { MOST_ITEMS = 16, MOST_ADAPTERS = 8 };

/* What the ops are timed with. */
typedef struct bench_sizes {
    int32_t width, ffn, rows, vocab;
    int32_t heads, kv_heads, head_dim; /* heads · head_dim = width */
    int32_t adapters, rank;
    int32_t sequence;       /* rows are whole sequences of it */
    int32_t batch, context; /* of decoding */
    int32_t square;         /* the product that is the ceiling: [square, square]² */
    size_t parameters;      /* of the optimiser's buffer, and of a weighted sum */
    size_t beyond_cache;    /* bytes */
} bench_sizes;

typedef struct bench {
    psoup_context *context;
    psoup__backend *be;
    const psoup__ops *ops;
    psoup__gpu *gpu;
    bench_sizes s;
    bool json;
    char device[128];
    double copy_rate;    /* bytes in a second, read and written */
    double product_rate; /* FLOP in a second */
    float *noise;        /* standard normal numbers, */
    float *squares;      /* and their squares */
} bench;

/* A piece of a case's memory: random numbers of a dtype, or the same bytes in every copy. */
typedef struct bench_item {
    size_t n; /* elements, or bytes of host */
    psoup_dtype dtype;
    const void *host;
    bool square; /* none is negative */
} bench_item;
#define FLOATS(n) {(size_t)(n), PSOUP_F32, NULL, false}
#define SQUARES(n) {(size_t)(n), PSOUP_F32, NULL, true}
#define NUMBERS(n, dtype) {(size_t)(n), dtype, NULL, false}
#define BYTES(host, n) {(size_t)(n), PSOUP_F32, host, false}

typedef struct bench_case {
    const char *op;
    char shape[96];
    double bytes, flops;
    bench_item item[MOST_ITEMS]; /* up to the first with n == 0 */
    void (*run)(bench *b, void *const *item, const void *arg);
    const void *arg;
    bool waits; /* it reads results back: timed by the host's clock, without a graph */
} bench_case;

/* Times a case and prints its line. */
void bench_run(bench *b, const bench_case *c);

void bench_layer(bench *b);
void bench_rows(bench *b);
void bench_attention(bench *b);
void bench_linear_mix(bench *b);
void bench_loss(bench *b);
void bench_policy(bench *b);
void bench_sample(bench *b);
void bench_adamw(bench *b);
void bench_interpolate(bench *b);

/* The whole of it, or of one group. Returns the program's status. */
int bench_all(const char *device, const char *only, bool json, bool force);

#endif
