/* Our matrix product beside OpenBLAS' sgemm and the machine's limit, all in one run.
 *
 *   shape  ours  openblas  limit  ratio      GFLOP/s; the median of the ratios of neighbouring turns
 *
 * Shapes are m × n × k. The limit is two threads multiplying and adding in registers, for one row
 * (GB/s of B instead) two threads reading memory.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/base.h"
#include "bench_limits.h"

/* cblas.h and its build-time configuration are not needed for these. */
extern void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k,
                        float alpha, const float *a, int lda, const float *b, int ldb, float beta,
                        float *c, int ldc);
extern void openblas_set_num_threads(int threads);
extern char *openblas_get_corename(void);
enum { ROW_MAJOR = 101, AS_IT_IS = 111, TRANSPOSED = 112 };

enum { PAIRS = 21 };

/* ---- shapes ---------------------------------------------------------------------------------- */

typedef struct shape {
    int m, n, k;
    enum { X_WT, X_W, DYT_X } kind; /* A·Bᵀ (forward), A·B, Aᵀ·B (gradient of a weight) */
    bool packed;
    psoup_dtype dtype; /* of the packed B */
} shape;

static const shape shapes[] = {
    {2048, 2048, 2048, X_WT, false, PSOUP_F32}, {1024, 1024, 1024, X_WT, false, PSOUP_F32},
    {1024, 1024, 1024, X_W, false, PSOUP_F32},  {512, 512, 512, X_WT, false, PSOUP_F32},
    {512, 512, 512, X_W, false, PSOUP_F32},     {2048, 64, 64, X_WT, false, PSOUP_F32},
    {2048, 256, 256, X_WT, false, PSOUP_F32},   {2048, 688, 256, X_WT, false, PSOUP_F32},
    {2048, 256, 688, X_W, false, PSOUP_F32},    {1024, 2048, 48, X_WT, false, PSOUP_F32},
    {2048, 16, 256, X_WT, false, PSOUP_F32},    {2048, 256, 16, X_WT, false, PSOUP_F32},
    {2048, 256, 16, X_W, false, PSOUP_F32},     {256, 256, 2048, DYT_X, false, PSOUP_F32},
    {688, 256, 2048, DYT_X, false, PSOUP_F32},  {16, 256, 2048, DYT_X, false, PSOUP_F32},
    {256, 16, 2048, DYT_X, false, PSOUP_F32},   {128, 64, 128, X_W, false, PSOUP_F32},
    {128, 128, 64, X_WT, false, PSOUP_F32},     {16, 2048, 2048, X_WT, true, PSOUP_F32},
    {16, 2048, 2048, X_WT, true, PSOUP_BF16},   {64, 2048, 2048, X_WT, true, PSOUP_F32},
    {64, 2048, 2048, X_WT, true, PSOUP_BF16},   {16, 688, 256, X_WT, true, PSOUP_F32},
    {1, 4096, 4096, X_WT, true, PSOUP_F32},     {1, 4096, 4096, X_WT, true, PSOUP_BF16},
    {1, 4096, 4096, X_WT, true, PSOUP_F16},
};

static float *numbers(size_t n) {
    float *x = aligned_alloc(64, (n * sizeof *x + 63) / 64 * 64);
    uint32_t word = 1;
    for (size_t i = 0; i < n; i++) {
        word = word * 1664525u + 1013904223u;
        x[i] = (float)(word >> 8) * 0x1p-24f - 0.5f;
    }
    return x;
}

static void peer(const shape *s, const float *a, const float *b, float *c) {
    cblas_sgemm(ROW_MAJOR, s->kind == DYT_X ? TRANSPOSED : AS_IT_IS,
                s->kind == X_WT ? TRANSPOSED : AS_IT_IS, s->m, s->n, s->k, 1, a,
                s->kind == DYT_X ? s->m : s->k, b, s->kind == X_WT ? s->k : s->n, 0, c, s->n);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double median(double *x) {
    qsort(x, PAIRS, sizeof *x, by_value);
    return x[PAIRS / 2];
}

static void multiply(psoup_context *context, const shape *s, const psoup__gemm_args *args, float *d, bool ours) {
    if (ours)
        psoup__gemm(context, args);
    else
        peer(s, args->a, args->b, d);
}

/* Seconds of a call. Those of 8 ms before them wake threads, fill caches and raise clocks: a thread that sleeps is
 * sometimes woken on the processor of whoever wakes it, and shares that for the first milliseconds. */
static double time_turn(psoup_context *context, const shape *s, const psoup__gemm_args *args, float *d, int calls,
                        bool ours) {
    nanosleep(&(struct timespec){0, 3000000}, NULL); /* until the other's idle threads sleep */
    for (const double end = now() + 8e-3; now() < end;)
        multiply(context, s, args, d, ours);
    const double start = now();
    for (int call = 0; call < calls; call++)
        multiply(context, s, args, d, ours);
    return (now() - start) / calls;
}

static void bench(psoup_context *context, const shape *s, double peak, double bandwidth) {
    static const char *const kinds[] = {"x·Wᵀ", "x·W ", "dyᵀ·x"};
    const size_t m = (size_t)s->m, n = (size_t)s->n, k = (size_t)s->k;
    float *a = numbers(m * k), *b = numbers(k * n), *c = numbers(m * n), *d = numbers(m * n);
    void *half = NULL;
    psoup__gemm_b *packed = NULL;
    psoup__gemm_args args = {.m = s->m, .n = s->n, .k = s->k, .c = c, .c_stride = s->n, .a = a,
                             .a_row = s->kind == DYT_X ? 1 : s->k,
                             .a_col = s->kind == DYT_X ? s->m : 1, .alpha = 1, .b = b,
                             .b_row = s->kind == X_WT ? 1 : s->n,
                             .b_col = s->kind == X_WT ? s->k : 1};
    if (s->packed) {
        half = malloc(n * k * 4);
        psoup__from_f32(context, half, s->dtype, b, n * k);
        if (psoup__gemm_pack(context, half, s->dtype, s->k, s->n, args.b_row, args.b_col, &packed,
                             NULL) != PSOUP_OK)
            exit(1);
        args.packed = packed;
    }
    const double flop = 2.0 * (double)m * (double)n * (double)k;
    const int calls = 1 + (int)(1e9 / flop);
    double ours[PAIRS], theirs[PAIRS], ratio[PAIRS];
    for (int pair = 0; pair < PAIRS; pair++) {
        for (int turn = 0; turn < 2; turn++) { /* each begins every other pair */
            if (turn == pair % 2)
                ours[pair] = time_turn(context, s, &args, d, calls, true);
            else
                theirs[pair] = time_turn(context, s, &args, d, calls, false);
        }
        ratio[pair] = theirs[pair] / ours[pair];
    }
    if (s->m == 1) {
        const double bytes = (double)(n * k);
        printf("%5d %5d %5d %s %-4s %8.1f %8.1f %8.1f  %5.2f  GB/s\n", s->m, s->n, s->k,
               kinds[s->kind], psoup_dtype_name(s->dtype),
               1e-9 * bytes * (double)psoup_dtype_size(s->dtype) / median(ours),
               1e-9 * bytes * 4 / median(theirs), bandwidth, median(ratio));
    } else {
        printf("%5d %5d %5d %s %-4s %8.1f %8.1f %8.1f  %5.2f  GFLOP/s\n", s->m, s->n, s->k,
               kinds[s->kind], s->packed ? psoup_dtype_name(s->dtype) : "",
               1e-9 * flop / median(ours), 1e-9 * flop / median(theirs), peak, median(ratio));
    }
    fflush(stdout);
    psoup__gemm_b_free(context, packed);
    free(half), free(a), free(b), free(c), free(d);
}

int main(int argc, char **argv) {
    /* The peer's idle threads spin for 2^28 ticks, a tenth of a second, in which they would take our
     * processors; 2^20 still spans the pauses between its own calls. What it runs for this processor it
     * chooses itself. It reads these when loaded. */
    if (getenv("OPENBLAS_THREAD_TIMEOUT") == NULL) {
        unsetenv("OPENBLAS_CORETYPE");
        unsetenv("OPENBLAS_L2_SIZE");
        setenv("OPENBLAS_THREAD_TIMEOUT", "20", 1);
        execv("/proc/self/exe", argv);
    }
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *context;
    psoup_error error;
    options.threads = THREADS;
    if (psoup_context_create(&options, &context, &error) != PSOUP_OK) {
        fprintf(stderr, "%s\n", error.message);
        return 1;
    }
    openblas_set_num_threads(THREADS);
    const size_t n = 1u << 26;
    float *x = numbers(n);
    const double peak = limit(NULL, 0), bandwidth = limit(x, n);
    free(x);
    printf("%d threads, %s; OpenBLAS for %s. Packed: B's dtype named, packed once; the peer has it as f32.\n",
           THREADS, psoup_context_isa(context), openblas_get_corename());
    printf("    m     n     k                ours openblas    limit  ratio\n");
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        bench(context, &shapes[i], peak, bandwidth);
    psoup_context_free(context);
    return 0;
}
