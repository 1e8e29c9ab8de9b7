/* Merging in memory beside PyTorch and the machine's own limits: sums, folds, new weights. Peers and limits take
 * turns with ours in the same run; every figure is the best of a few.
 *
 *   bench_merge [PYTHON SCRIPT [MILLIONS [PARTS]]]   e.g. bench_merge python3 tests/bench_merge.py 1100 sum,fold
 *
 * MILLIONS of parameters (250): the sum needs 8 bytes each. PARTS are of sum, fold, weights; all of them. Run it on a
 * machine that does nothing else. */
#include "bench_peer.h"

/* ---- in memory ------------------------------------------------------------------------------------- */

typedef struct triad_arg {
    const char *x, *y;
    char *out;
    size_t bytes;
} triad_arg;

#if defined(__x86_64__)
__attribute__((target("avx512f"))) static void triad_512(const triad_arg *t) {
    const __m512 s = _mm512_set1_ps(0.5f);
    for (size_t i = 0; i + 64 <= t->bytes; i += 64)
        _mm512_stream_ps((float *)(void *)(t->out + i),
                         _mm512_add_ps(_mm512_load_ps(t->x + i), _mm512_mul_ps(s, _mm512_load_ps(t->y + i))));
}
__attribute__((target("avx2"))) static void triad_256(const triad_arg *t) {
    const __m256 s = _mm256_set1_ps(0.5f);
    for (size_t i = 0; i + 32 <= t->bytes; i += 32)
        _mm256_stream_ps((float *)(void *)(t->out + i),
                         _mm256_add_ps(_mm256_load_ps((const float *)(const void *)(t->x + i)),
                                       _mm256_mul_ps(s, _mm256_load_ps((const float *)(const void *)(t->y + i)))));
}
#endif

/* out = x + s y on floats, past the caches: STREAM's triad (McCalpin). */
static void *triad(void *arg) {
    const triad_arg *t = arg;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
        triad_512(t);
        return NULL;
    }
    if (__builtin_cpu_supports("avx2")) {
        triad_256(t);
        return NULL;
    }
#endif
    for (size_t i = 0; i + 16 <= t->bytes; i += 16) {
        lanes a, b;
        memcpy(&a, t->x + i, 16);
        memcpy(&b, t->y + i, 16);
        a += 0.5f * b;
        memcpy(t->out + i, &a, 16);
    }
    return NULL;
}

static double run_triad(char *const *buffers, char *out, size_t bytes) {
    pthread_t threads[THREADS];
    triad_arg args[THREADS];
    size_t part = bytes / THREADS / 64 * 64;
    double start = now();
    for (size_t t = 0; t < THREADS; t++) {
        args[t] = (triad_arg){buffers[0] + t * part, buffers[1] + t * part, out + t * part, part};
        pthread_create(&threads[t], NULL, triad, &args[t]);
    }
    for (int t = 0; t < THREADS; t++)
        pthread_join(threads[t], NULL);
    return now() - start;
}

static void bench_sum(psoup_context *context, int millions) {
    const size_t n = (size_t)millions * 1000 * 1000, bytes = n * 2;
    const double weights[3] = {0.6, 0.3, 0.1};
    char *in[3], *out = buffer(bytes, 0), question[64], first[512];
    double limit_s = 0, ours = 0;
    psoup_error error;
    for (int i = 0; i < 3; i++)
        in[i] = buffer(bytes, 0x3d);
    for (int turn = 0; turn < 8; turn++) {
        least(&limit_s, run_triad(in, out, bytes));
        double start = now();
        must(psoup_merge_sum(context, out, PSOUP_BF16, (const void *const *)in, PSOUP_BF16, weights, 3, n, &error),
             &error);
        least(&ours, now() - start);
    }
    for (int i = 0; i < 3; i++)
        free(in[i]);
    free(out);
    const double triad_rate = 3.0 * (double)bytes / limit_s, rate = 4.0 * (double)bytes / ours;
    printf("in memory: 3 × bf16 → bf16, %d million parameters, into a buffer that is there\n", millions);
    printf("  %-34s %9.4f s   %.1f GB/s, %.2f of the limit (goal 0.85)\n", "ours", ours, rate / 1e9,
           rate / triad_rate);
    printf("  %-34s               %.1f GB/s\n", "limit: streaming triad", triad_rate / 1e9);
    snprintf(question, sizeof question, "sum %d", millions);
    snprintf(first, sizeof first, "%s", ask(question));
    beside("PyTorch", ours, first, 3);
}

/* Uniform numbers of this standard deviation. */
static void fill(float *out, size_t n, double deviation) {
    static uint64_t state = 1;
    for (size_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        out[i] = (float)(((double)(state >> 11) * 0x1p-53 - 0.5) * sqrt(12) * deviation);
    }
}

/* The fold of weights and a change of usual sizes beside float64: how many elements are not the nearest bf16,
 * and the error as a share of what one rounding makes. */
static void check_fold(psoup_context *context, const double weights[ADAPTERS]) {
    enum { ROWS = 1024 };
    float *a = buffer((size_t)ADAPTERS * RANK * HIDDEN * 4, 0), *b = buffer((size_t)ADAPTERS * RANK * ROWS * 4, 0);
    float *base = buffer((size_t)ROWS * HIDDEN * 4, 0), *out = buffer((size_t)ROWS * HIDDEN * 4, 0);
    uint16_t *half = buffer((size_t)ROWS * HIDDEN * 2, 0);
    psoup_lora_factors f[ADAPTERS];
    psoup_error error;
    double wrong = 0, ours = 0, one = 0;
    fill(a, (size_t)ADAPTERS * RANK * HIDDEN, 0.02);
    fill(b, (size_t)ADAPTERS * RANK * ROWS, 0.0092); /* with these weights a change of 5 % */
    fill(base, (size_t)ROWS * HIDDEN, 0.02);
    psoup__from_f32(context, half, PSOUP_BF16, base, (size_t)ROWS * HIDDEN);
    psoup__to_f32(context, base, half, PSOUP_BF16, (size_t)ROWS * HIDDEN);
    for (int i = 0; i < ADAPTERS; i++)
        f[i] = (psoup_lora_factors){a + i * RANK * HIDDEN, b + i * RANK * ROWS, RANK, 2};
    must(psoup_merge_fold(context, half, half, PSOUP_BF16, ROWS, HIDDEN, f, weights, ADAPTERS, &error), &error);
    psoup__to_f32(context, out, half, PSOUP_BF16, (size_t)ROWS * HIDDEN);
    for (size_t row = 0; row < ROWS; row++)
        for (size_t column = 0; column < HIDDEN; column++) {
            double want = base[row * HIDDEN + column];
            for (int i = 0; i < ADAPTERS; i++)
                for (size_t k = 0; k < RANK; k++)
                    want += 2 * weights[i] * f[i].b[row * RANK + k] * f[i].a[k * HIDDEN + column];
            uint16_t nearest;
            float single = (float)want;
            psoup__from_f32(context, &nearest, PSOUP_BF16, &single, 1);
            psoup__to_f32(context, &single, &nearest, PSOUP_BF16, 1);
            wrong += out[row * HIDDEN + column] != single;
            ours += (out[row * HIDDEN + column] - want) * (out[row * HIDDEN + column] - want);
            one += (single - want) * (single - want);
        }
    printf("  %-34s %.2f %% not the nearest bf16, error %.3f of one rounding's\n", "ours, of a change of 5 %",
           100 * wrong / ROWS / HIDDEN, sqrt(ours / one));
    free(a);
    free(b);
    free(base);
    free(out);
    free(half);
}

static void bench_fold(psoup_context *context, int layers) {
    float *a = buffer((size_t)ADAPTERS * RANK * FFN * 4, 0x3c), *b = buffer((size_t)ADAPTERS * RANK * FFN * 4, 0x3b);
    psoup_lora_factors f[ADAPTERS];
    const double weights[ADAPTERS] = {0.6, 0.3, 0.1};
    char **base = calloc((size_t)layers * LINEARS, sizeof *base), **out = calloc((size_t)layers * LINEARS, sizeof *out);
    char question[64];
    double ours = 0, products = 0, floats = 0, gemm = 0;
    psoup_error error;
    for (int k = 0; k < layers * LINEARS; k++) {
        size_t bytes = (size_t)(linears[k % LINEARS].rows * linears[k % LINEARS].columns) * 2;
        base[k] = buffer(bytes, 0x3c);
        out[k] = buffer(bytes, 0);
        floats += (double)bytes / 2;
    }
    products = 2.0 * ADAPTERS * RANK * floats;
    for (int turn = 0; turn < 5; turn++) {
        double start = now();
        for (int k = 0; k < layers * LINEARS; k++) {
            for (int i = 0; i < ADAPTERS; i++)
                f[i] = (psoup_lora_factors){a + i * RANK * FFN, b + i * RANK * FFN, RANK, 2};
            must(psoup_merge_fold(context, out[k], base[k], PSOUP_BF16, linears[k % LINEARS].rows,
                                  linears[k % LINEARS].columns, f, weights, ADAPTERS, &error),
                 &error);
        }
        least(&ours, now() - start);
    }
    for (int k = 0; k < layers * LINEARS; k++) {
        free(base[k]);
        free(out[k]);
    }
    float *c = buffer((size_t)FFN * HIDDEN * 4, 0);
    for (int turn = 0; turn < 10; turn++) {
        const psoup__gemm_args args = {.m = FFN, .n = HIDDEN, .k = ADAPTERS * RANK, .c = c, .c_stride = HIDDEN,
                                       .a = b, .a_row = ADAPTERS * RANK, .a_col = 1, .alpha = 1, .b = a,
                                       .b_row = HIDDEN, .b_col = 1};
        double start = now();
        psoup__gemm(context, &args);
        least(&gemm, now() - start);
    }
    const double sgemm = 2.0 * FFN * HIDDEN * ADAPTERS * RANK / gemm, peak = limit(NULL, 0) * 1e9;
    printf("\nfolding 3 adapters of r = 16 into bf16, all linears of %d layers: %.1f GFLOP (22 layers: 93)\n", layers,
           products / 1e9);
    printf("  %-34s %9.4f s   %.0f GFLOP/s, %.2f of sgemm's %.0f at K = 48, %.2f of the arithmetic's %.0f\n", "ours",
           ours, products / ours / 1e9, products / ours / sgemm, sgemm / 1e9, products / ours / peak, peak / 1e9);
    printf("  %-34s %9.4f s\n", "limit: its multiply-adds in f32", products / peak);
    check_fold(context, weights);
    snprintf(question, sizeof question, "fold %d", layers);
    char *answer = strdup(ask(question)), *half = strchr(answer, ';');
    if (half != NULL)
        *half++ = '\0';
    beside("PyTorch, factors in f32", ours, answer, 2);
    if (half != NULL)
        beside("PyTorch, factors rounded to bf16", ours, half + 1, 2);
    free(answer);
    free(a);
    free(b);
    free(c);
    free(base);
    free(out);
}

static void bench_reweight(psoup_context *context) {
    enum { N = 8, MODULES = 64, DIM = 4096 };
    const size_t one = (size_t)DIM * RANK;
    float *a = buffer(N * MODULES * one * 4, 0x3c), *b = buffer(N * MODULES * one * 4, 0x3c);
    float *a_out = buffer(N * MODULES * one * 4, 0), *b_out = buffer(N * MODULES * one * 4, 0);
    psoup_lora_factors *f = calloc(N * MODULES, sizeof *f);
    psoup_merge_module *m = calloc(MODULES, sizeof *m);
    double weights[N], ours[3] = {0};
    psoup_error error;
    for (int turn = 0; turn < 30; turn++) {
        const int kind = turn % 3; /* delta; B of delta alone; factors */
        const size_t rank = kind < 2 ? N * RANK : RANK;
        for (int i = 0; i < N; i++)
            weights[i] = i == turn % N ? 0.3 : 0.1;
        for (size_t k = 0; k < MODULES; k++) {
            for (size_t i = 0; i < N; i++)
                f[k * N + i] = (psoup_lora_factors){a + (k * N + i) * one, b + (k * N + i) * one, RANK, 2};
            m[k] = (psoup_merge_module){.factors = f + k * N, .weights = weights, .count = N, .out_features = DIM,
                                        .in_features = DIM, .a_out = kind == 1 ? NULL : a_out + k * rank * DIM,
                                        .b_out = b_out + k * rank * DIM, .rank = (int32_t)rank};
        }
        double start = now();
        must(psoup_merge_factors_batch(context, kind < 2 ? PSOUP_MERGE_DELTA : PSOUP_MERGE_FACTORS, m, MODULES, 0,
                                       &error),
             &error);
        least(&ours[kind], now() - start);
    }
    printf("\nnew weights for a soup of 8 adapters, r = 16, q and v of 7B: a PEFT adapter's factors in memory, f32\n");
    printf("  %-34s %9.2f ms  (goal 20)\n", "ours, delta (r = 128)", ours[0] * 1e3);
    printf("  %-34s %9.2f ms  (goal 20)\n", "ours, delta, B alone", ours[1] * 1e3);
    printf("  %-34s %9.2f ms  (goal 20)\n", "ours, factors (r = 16)", ours[2] * 1e3);
    beside("PyTorch, delta", ours[0], ask("reweight"), 1);
    free(a);
    free(b);
    free(a_out);
    free(b_out);
    free(f);
    free(m);
}

int main(int argc, char **argv) {
    psoup_context_options settings = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *context;
    psoup_error error;
    int millions = argc > 3 ? atoi(argv[3]) : 250;
    if (argc > 2) {
        python = argv[1];
        script = argv[2];
    }
    if (millions < 1 || millions > 1100) {
        fprintf(stderr, "bench_merge: %d million parameters; expected 1 to 1100\n", millions);
        return 2;
    }
    int layers = millions > 180 ? (millions - 131) / 44 : 1; /* 44 million each, and the two tables */
    layers = layers > 22 ? 22 : layers;
    setvbuf(stdout, NULL, _IOLBF, 0);
    settings.threads = THREADS;
    must(psoup_context_create(&settings, &context, &error), &error);
    start_peer();
    printf("%d threads, %s\n", THREADS, psoup_context_isa(context));
    const char *parts = argc > 4 ? argv[4] : "sum,fold,weights";
    if (strstr(parts, "sum") != NULL)
        bench_sum(context, millions);
    if (strstr(parts, "fold") != NULL)
        bench_fold(context, layers);
    if (strstr(parts, "weights") != NULL)
        bench_reweight(context);
    psoup_context_free(context);
    return 0;
}
