/* embed_engine_gpu: the engine of embed_engine.c with its weights in a GPU's memory, which become each user's
 * soup where they are, in the engine's own stream. See docs/embedding.md.
 *
 *     cc embed_engine_gpu.c $(pkg-config --cflags --static --libs psoup) -lcuda
 */
#include <math.h>
#include <psoup/merge_gpu.h>
#include <stdio.h>
#include <stdlib.h>

/* What the engine has of CUDA's driver; <cuda.h> declares the same. */
typedef struct CUstream_st *CUstream;
int cuInit(unsigned flags);
int cuDevicePrimaryCtxRetain(void **context, int device);
int cuCtxSetCurrent(void *context);
int cuMemAlloc_v2(unsigned long long *memory, size_t bytes);
int cuMemFree_v2(unsigned long long memory);
int cuStreamCreate(CUstream *stream, unsigned flags);
int cuStreamDestroy_v2(CUstream stream);

enum { OUT = 96, IN = 64, RANK = 4, ADAPTERS = 3 };

typedef struct engine { /* one linear, y = W x */
    psoup_context *context;
    psoup_gpu_merge *gpu;
    CUstream stream;
    psoup_merge_view base, live;           /* bf16, on the GPU */
    psoup_lora_factors adapters[ADAPTERS]; /* f32, on the GPU */
} engine;

static void need(psoup_status status, const psoup_error *error) {
    if (status == PSOUP_OK)
        return;
    fprintf(stderr, "%s\n", error->message);
    exit(1);
}

static void need_cuda(int result) {
    if (result == 0)
        return;
    fprintf(stderr, "the driver says %d\n", result);
    exit(1);
}

static void *gpu_memory(size_t bytes) {
    unsigned long long memory = 0;
    need_cuda(cuMemAlloc_v2(&memory, bytes));
    return (void *)(uintptr_t)memory;
}

static psoup_merge_view matrix(void *data, psoup_dtype dtype, psoup_merge_place place, int64_t rows,
                               int64_t columns) {
    return (psoup_merge_view){.data = data, .dtype = (int32_t)dtype, .place = place, .rows = rows,
                              .columns = columns};
}

/* The host's numbers on the GPU. */
static psoup_merge_view upload(const engine *e, float *x, int64_t rows, int64_t columns) {
    psoup_error error = {0};
    void *memory = gpu_memory((size_t)(rows * columns) * sizeof *x);
    const psoup_merge_view there = matrix(memory, PSOUP_F32, PSOUP_MERGE_DEVICE, rows, columns);
    const psoup_merge_view here = matrix(x, PSOUP_F32, PSOUP_MERGE_HOST, rows, columns);
    need(psoup_merge_copy(e->context, &there, &here, &error), &error);
    return there;
}

static void convert(const engine *e, const psoup_merge_view *out, const psoup_merge_view *in) {
    const double one = 1;
    psoup_error error = {0};
    need(psoup_merge_views(e->context, out, in, &one, 1, &error), &error);
}

/* A user's soup: behind what is in the stream and before the next token's kernels, always from the pristine
 * base. Nobody waits. */
static void serve(const engine *e, const double weights[ADAPTERS]) {
    psoup_error error = {0};
    need(psoup_merge_fold_view(e->context, &e->live, &e->base, 0, 0, OUT, IN, e->adapters, weights, ADAPTERS,
                               &error),
         &error);
}

static void fill(float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        x[i] = (float)(rand() % 256 - 128) / 256; /* eight bits: exact in bf16 */
}

/* The largest |live − (base + Σ w s B A)|, in units of bf16's last place. */
static double distance(const float *live, const float *base, float a[][RANK * IN], float b[][OUT * RANK],
                       const double *weights) {
    double worst = 0;
    for (size_t row = 0; row < OUT; row++)
        for (size_t column = 0; column < IN; column++) {
            double sum = base[row * IN + column];
            int exponent;
            for (size_t i = 0; i < ADAPTERS; i++)
                for (size_t k = 0; k < RANK; k++)
                    sum += weights[i] * 2 * b[i][row * RANK + k] * a[i][k * IN + column];
            frexp(sum, &exponent);
            worst = fmax(worst, fabs(live[row * IN + column] - sum) / ldexp(1, exponent - 8));
        }
    return worst;
}

int main(void) {
    static float base[OUT * IN], live[OUT * IN], a[ADAPTERS][RANK * IN], b[ADAPTERS][OUT * RANK];
    const double users[][ADAPTERS] = {{0.5, 0.5, 0}, {0.1, 0.2, 0.7}, {1, 0, 0}};
    engine e = {0};
    void *cuda = NULL;
    double worst = 0;
    psoup_error error = {0};
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    need_cuda(cuInit(0));
    need_cuda(cuDevicePrimaryCtxRetain(&cuda, 0));
    need_cuda(cuCtxSetCurrent(cuda));
    need_cuda(cuStreamCreate(&e.stream, 1));
    options.device = "cuda:0";
    options.stream = e.stream;
    need(psoup_context_create(&options, &e.context, &error), &error);
    need(psoup_gpu_merge_create(e.context, &e.gpu, &error), &error);

    fill(base, OUT * IN);
    const psoup_merge_view wide = upload(&e, base, OUT, IN);
    e.base = matrix(gpu_memory(OUT * IN * 2), PSOUP_BF16, PSOUP_MERGE_DEVICE, OUT, IN);
    e.live = matrix(gpu_memory(OUT * IN * 2), PSOUP_BF16, PSOUP_MERGE_DEVICE, OUT, IN);
    convert(&e, &e.base, &wide);
    for (size_t i = 0; i < ADAPTERS; i++) {
        fill(a[i], RANK * IN);
        fill(b[i], OUT * RANK);
        e.adapters[i] = (psoup_lora_factors){.a = upload(&e, a[i], RANK, IN).data,
                                             .b = upload(&e, b[i], OUT, RANK).data, .rank = RANK, .scale = 2};
    }
    for (size_t u = 0; u < sizeof users / sizeof *users; u++) {
        const psoup_merge_view here = matrix(live, PSOUP_F32, PSOUP_MERGE_HOST, OUT, IN);
        serve(&e, users[u]); /* the engine's own kernels would follow in e.stream; we look at the weights */
        convert(&e, &wide, &e.live);
        need(psoup_merge_copy(e.context, &here, &wide, &error), &error); /* waits */
        worst = fmax(worst, distance(live, base, a, b, users[u]));
        printf("user %zu: W[0][0] = %.6f\n", u, (double)live[0]);
    }
    printf("largest difference from the sum of the adapters: %.3f of a last place\n", worst);
    psoup_gpu_merge_free(e.gpu);
    psoup_context_free(e.context);
    void *memory[] = {wide.data, e.base.data, e.live.data};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        need_cuda(cuMemFree_v2((uintptr_t)memory[i]));
    for (size_t i = 0; i < ADAPTERS; i++) {
        need_cuda(cuMemFree_v2((uintptr_t)e.adapters[i].a));
        need_cuda(cuMemFree_v2((uintptr_t)e.adapters[i].b));
    }
    need_cuda(cuStreamDestroy_v2(e.stream));
    return worst < 0.501 ? 0 : 1;
}
