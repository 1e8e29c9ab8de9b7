/* Our matrix product beside OpenBLAS' sgemm and the machine's limit, all in one run.
 *
 *   shape  ours  openblas  limit  ratio      GFLOP/s; the median of the ratios of neighbouring pairs
 *
 * Shapes are m × n × k. The limit is two threads multiplying and adding in registers, for one row
 * (GB/s of B instead) two threads reading memory.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "base/base.h"

/* cblas.h and its build-time configuration are not needed for these. */
extern void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k,
                        float alpha, const float *a, int lda, const float *b, int ldb, float beta,
                        float *c, int ldc);
extern void openblas_set_num_threads(int threads);
enum { ROW_MAJOR = 101, AS_IT_IS = 111, TRANSPOSED = 112 };

enum { THREADS = 2, PAIRS = 11 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- limits ---------------------------------------------------------------------------------- */

enum { ROUNDS = 2000000, CHAINS = 12 }; /* independent sums: they hide the latency of one */

/* Each returns how many floating-point operations it did. */
typedef double arithmetic(volatile float *out);

#if defined(__x86_64__)
#define WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
__attribute__((target("avx512f"))) static double fuse_512(volatile float *out) {
    __m512 sum[CHAINS], x = _mm512_set1_ps(*out);
    for (int i = 0; i < CHAINS; i++)
        sum[i] = _mm512_set1_ps((float)i);
    for (int r = 0; r < ROUNDS; r++)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++)
            sum[i] = _mm512_fmadd_ps(sum[i], x, x);
    for (int i = 0; i < CHAINS; i++)
        *out += _mm512_cvtss_f32(sum[i]);
    return 2.0 * ROUNDS * CHAINS * 16;
}
__attribute__((target("avx2,fma"))) static double fuse_256(volatile float *out) {
    __m256 sum[CHAINS], x = _mm256_set1_ps(*out);
    for (int i = 0; i < CHAINS; i++)
        sum[i] = _mm256_set1_ps((float)i);
    for (int r = 0; r < ROUNDS; r++)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++)
            sum[i] = _mm256_fmadd_ps(sum[i], x, x);
    for (int i = 0; i < CHAINS; i++)
        *out += _mm256_cvtss_f32(sum[i]);
    return 2.0 * ROUNDS * CHAINS * 8;
}
#else
#define WIDEST
#endif

typedef float lanes __attribute__((vector_size(16)));

static double multiply_and_add(volatile float *out) {
    lanes sum[CHAINS], x = {*out, *out, *out, *out};
    for (int i = 0; i < CHAINS; i++)
        sum[i] = x * (float)i;
    for (int r = 0; r < ROUNDS; r++)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) {
#if defined(__aarch64__)
            sum[i] = vfmaq_f32(x, sum[i], x);
#else
            sum[i] = sum[i] * x + x;
#endif
        }
    for (int i = 0; i < CHAINS; i++)
        *out += sum[i][0];
    return 2.0 * ROUNDS * CHAINS * 4;
}

static arithmetic *widest(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f"))
        return fuse_512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return fuse_256;
#endif
    return multiply_and_add;
}

WIDEST static float read_all(const float *x, size_t n) {
    lanes part[32] = {{0}};
    for (size_t i = 0; i + 128 <= n; i += 128)
#pragma GCC unroll 32
        for (int c = 0; c < 32; c++) {
            lanes value;
            memcpy(&value, x + i + c * 4, sizeof value);
            part[c] += value;
        }
    float sum = 0;
    for (int c = 0; c < 32; c++)
        sum += part[c][0];
    return sum;
}

typedef struct limit_arg {
    const float *x; /* NULL: arithmetic */
    size_t n;
    volatile float out;
    double done; /* operations or bytes */
} limit_arg;

static void *limit_thread(void *arg) {
    limit_arg *me = arg;
    if (me->x == NULL) {
        me->done = widest()(&me->out);
    } else {
        me->out = read_all(me->x, me->n);
        me->done = 4.0 * (double)me->n;
    }
    return NULL;
}

/* What THREADS threads do in a nanosecond, the best of seven. */
static double limit(const float *x, size_t n) {
    double best = 0;
    for (int repeat = 0; repeat < 7; repeat++) {
        pthread_t threads[THREADS];
        limit_arg args[THREADS];
        double done = 0, start = now();
        for (int t = 0; t < THREADS; t++) {
            args[t] = (limit_arg){x == NULL ? NULL : x + (size_t)t * (n / THREADS), n / THREADS,
                                  0.5f, 0};
            if (pthread_create(&threads[t], NULL, limit_thread, &args[t]) != 0)
                exit(1);
        }
        for (int t = 0; t < THREADS; t++) {
            pthread_join(threads[t], NULL);
            done += args[t].done;
        }
        double rate = 1e-9 * done / (now() - start);
        best = rate > best ? rate : best;
    }
    return best;
}

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
    const int calls = 1 + (int)(4e8 / flop);
    double ours[PAIRS], theirs[PAIRS], ratio[PAIRS];
    for (int pair = -1; pair < PAIRS; pair++) { /* the first warms up */
        nanosleep(&(struct timespec){0, 3000000}, NULL); /* until the peer's idle threads sleep */
        double t0 = now();
        for (int call = 0; call < calls; call++)
            psoup__gemm(context, &args);
        double t1 = now();
        for (int call = 0; call < calls; call++)
            peer(s, a, b, d);
        double t2 = now();
        if (pair < 0)
            continue;
        ours[pair] = (t1 - t0) / calls;
        theirs[pair] = (t2 - t1) / calls;
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
     * processors; 2^20 still spans the pauses between its own calls. It reads this when loaded. */
    if (getenv("OPENBLAS_THREAD_TIMEOUT") == NULL) {
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
    printf("%d threads, %s. Packed: B's dtype named, packed once; the peer has it as f32.\n",
           THREADS, psoup_context_isa(context));
    printf("    m     n     k                ours openblas    limit  ratio\n");
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        bench(context, &shapes[i], peak, bandwidth);
    psoup_context_free(context);
    return 0;
}
