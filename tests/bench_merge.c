/* Merging beside PyTorch, mergekit and the machine's own limits: in memory (sum, fold, new weights) and from
 * file to file. Peers and limits take turns with ours in the same run; every figure is the best of a few.
 *
 *   bench_merge [PYTHON SCRIPT [MILLIONS [PARTS]]]   e.g. bench_merge python3 tests/bench_merge.py 1100 sum,fold
 *
 * MILLIONS of parameters (250): the sum needs 8 bytes each, the files as much on disk under $TMPDIR and again
 * in /dev/shm. PARTS are of sum, fold, weights, files; all of them. Run it on a machine that does nothing else. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/base.h"
#include "bench_limits.h"
#include "psoup/merge.h"

static const char *python, *script;
static FILE *to_peer, *from_peer;

static void must(psoup_status status, const psoup_error *error) {
    if (status != PSOUP_OK) {
        fprintf(stderr, "bench_merge: %s\n", error->message);
        exit(1);
    }
}

static void *buffer(size_t bytes, int value) {
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory == NULL) {
        fprintf(stderr, "bench_merge: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    memset(memory, value, bytes); /* touched: page faults are not what is measured */
    return memory;
}

static void least(double *best, double seconds) {
    if (*best == 0 || seconds < *best)
        *best = seconds;
}

/* ---- the peer -------------------------------------------------------------------------------------- */

static void start_peer(void) {
    int down[2], up[2];
    if (python == NULL || pipe(down) != 0 || pipe(up) != 0)
        return;
    if (fork() == 0) {
        dup2(down[0], 0);
        dup2(up[1], 1);
        close(down[1]);
        close(up[0]);
        execlp(python, python, script, (char *)NULL);
        _exit(127);
    }
    close(down[0]);
    close(up[1]);
    to_peer = fdopen(down[1], "w");
    from_peer = fdopen(up[0], "r");
}

/* Asks; the answer without its newline, or "absent". */
static const char *ask(const char *question) {
    static char answer[512];
    strcpy(answer, "absent");
    if (to_peer == NULL)
        return answer;
    if (fprintf(to_peer, "%s\n", question) < 0 || fflush(to_peer) != 0 ||
        fgets(answer, sizeof answer, from_peer) == NULL) {
        to_peer = NULL;
        return strcpy(answer, "absent");
    }
    answer[strcspn(answer, "\n")] = '\0';
    return answer;
}

/* "ours, theirs, ratio and goal" of seconds. */
static void beside(const char *what, double ours, const char *answer, double goal) {
    double theirs = strtod(answer, NULL);
    if (theirs > 0)
        printf("  %-34s %9.4f s   ours is %.2f times as fast (goal %.1f)   %s\n", what, theirs, theirs / ours,
               goal, strchr(answer, ' ') != NULL ? strchr(answer, ' ') + 1 : "");
    else
        printf("  %-34s    absent\n", what);
}

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

enum { LINEARS = 7, HIDDEN = 2048, FFN = 5632, KV = 256, VOCAB = 32000, RANK = 16, ADAPTERS = 3 };
static const struct {
    const char *name;
    int64_t rows, columns;
} linears[LINEARS] = {{"self_attn.q_proj", HIDDEN, HIDDEN}, {"self_attn.k_proj", KV, HIDDEN},
                      {"self_attn.v_proj", KV, HIDDEN},     {"self_attn.o_proj", HIDDEN, HIDDEN},
                      {"mlp.gate_proj", FFN, HIDDEN},       {"mlp.up_proj", FFN, HIDDEN},
                      {"mlp.down_proj", HIDDEN, FFN}};

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

/* ---- from file to file ------------------------------------------------------------------------------- */

static char directory[400];

__attribute__((format(printf, 1, 2))) static void shell(const char *format, ...) {
    char command[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    if (system(command) != 0) {
        fprintf(stderr, "bench_merge: failed: %s\n", command);
        exit(1);
    }
}

/* A LLaMA of so many layers in bf16, as a directory. */
static double write_model(psoup_context *context, const char *name, int layers, int value) {
    static char names[22 * LINEARS + 64][80];
    psoup_named_tensor tensors[22 * LINEARS + 64];
    static const int64_t table[2] = {VOCAB, HIDDEN}, vector[1] = {HIDDEN};
    int64_t shapes[LINEARS][2];
    size_t n = 0, bytes = 0;
    char path[600];
    psoup_error error;
    char *data = buffer((size_t)VOCAB * HIDDEN * 2, value);
    for (size_t i = 0; i < (size_t)VOCAB * HIDDEN; i++)
        data[2 * i] = (char)(i * 2654435761u >> 9);
    for (int l = 0; l < layers; l++) {
        for (int k = 0; k < LINEARS; k++, n++) {
            shapes[k][0] = linears[k].rows;
            shapes[k][1] = linears[k].columns;
            snprintf(names[n], sizeof *names, "model.layers.%d.%s.weight", l, linears[k].name);
            tensors[n] = (psoup_named_tensor){names[n], PSOUP_BF16, 2, shapes[k], data};
            bytes += (size_t)(linears[k].rows * linears[k].columns) * 2;
        }
        for (int k = 0; k < 2; k++, n++) {
            snprintf(names[n], sizeof *names, "model.layers.%d.%s.weight", l,
                     k == 0 ? "input_layernorm" : "post_attention_layernorm");
            tensors[n] = (psoup_named_tensor){names[n], PSOUP_BF16, 1, vector, data};
        }
    }
    tensors[n++] = (psoup_named_tensor){"model.norm.weight", PSOUP_BF16, 1, vector, data};
    tensors[n++] = (psoup_named_tensor){"model.embed_tokens.weight", PSOUP_BF16, 2, table, data};
    tensors[n++] = (psoup_named_tensor){"lm_head.weight", PSOUP_BF16, 2, table, data};
    bytes += 2 * (size_t)VOCAB * HIDDEN * 2;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    mkdir(path, 0777);
    snprintf(path, sizeof path, "%s/%s/config.json", directory, name);
    FILE *config = fopen(path, "w");
    fprintf(config,
            "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\", \"hidden_size\": %d, "
            "\"intermediate_size\": %d, \"num_hidden_layers\": %d, \"num_attention_heads\": 32, "
            "\"num_key_value_heads\": 4, \"vocab_size\": %d, \"rms_norm_eps\": 1e-05, \"hidden_act\": \"silu\", "
            "\"max_position_embeddings\": 2048, \"tie_word_embeddings\": false, \"torch_dtype\": \"bfloat16\"}\n",
            HIDDEN, FFN, layers, VOCAB);
    fclose(config);
    snprintf(path, sizeof path, "%s/%s/model.safetensors", directory, name);
    must(psoup_safetensors_write(context, path, tensors, n, &error), &error);
    free(data);
    return (double)bytes;
}

/* The sources out of the page cache. */
static void make_cold(void) {
    for (const char *name = "abc"; *name; name++) {
        char path[600];
        snprintf(path, sizeof path, "%s/%c/model.safetensors", directory, *name);
        int fd = open(path, O_RDONLY);
        if (fd >= 0) {
            fsync(fd);
            posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
            close(fd);
        }
    }
}

typedef struct cost {
    double wall, cpu, mib; /* mib: the most RssAnon */
} cost;

static void keep(cost *best, cost one) {
    if (best->wall == 0 || one.wall < best->wall)
        *best = one;
}

/* Runs in a child and watches it. */
static cost watch(void (*work)(void)) {
    char path[64], line[128];
    int status = 0;
    struct rusage usage;
    cost spent = {0};
    fflush(stdout);
    double start = now();
    pid_t child = fork();
    if (child == 0) {
        work();
        _exit(0);
    }
    snprintf(path, sizeof path, "/proc/%d/status", (int)child);
    while (wait4(child, &status, WNOHANG, &usage) == 0) {
        FILE *file = fopen(path, "r");
        while (file != NULL && fgets(line, sizeof line, file) != NULL)
            if (strncmp(line, "RssAnon:", 8) == 0 && strtod(line + 8, NULL) / 1024 > spent.mib)
                spent.mib = strtod(line + 8, NULL) / 1024;
        if (file != NULL)
            fclose(file);
        usleep(2000);
    }
    spent.wall = now() - start;
    spent.cpu = (double)usage.ru_utime.tv_sec + (double)usage.ru_stime.tv_sec +
                1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
    if (status != 0) {
        fprintf(stderr, "bench_merge: a child failed\n");
        exit(1);
    }
    return spent;
}

static void merge_ours(void) {
    psoup_context_options settings = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    psoup_context *context;
    psoup_merger *merger;
    psoup_error error;
    char path[600];
    settings.threads = THREADS;
    options.method = PSOUP_MERGE_LINEAR;
    options.normalize = 0;
    must(psoup_context_create(&settings, &context, &error), &error);
    must(psoup_merger_create(context, &options, &merger, &error), &error);
    for (int i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "%s/%c", directory, 'a' + i);
        must(psoup_merger_add(merger, path, i == 0 ? 0.6 : i == 1 ? 0.3 : 0.1, &error), &error);
    }
    snprintf(path, sizeof path, "%s/ours", directory);
    must(psoup_merger_write(merger, path, &error), &error);
    psoup_merger_free(merger);
    psoup_context_free(context);
}

/* The same bytes in and out. */
static void cat(void) {
    shell("cat %s/b/model.safetensors %s/c/model.safetensors > /dev/null && "
          "cat %s/a/model.safetensors > %s/cat", directory, directory, directory, directory);
}

static void cat_synced(void) {
    char path[600];
    cat();
    snprintf(path, sizeof path, "%s/cat", directory);
    int fd = open(path, O_RDWR);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
}

static void tell(const char *what, cost c, const char *more) {
    printf("  %-34s %9.3f s   CPU %6.3f s   RssAnon %5.0f MiB   %s\n", what, c.wall, c.cpu, c.mib, more);
}

/* In one place; `on_disk`: cold too, and what is written is synced. */
static void bench_files(psoup_context *context, const char *parent, int layers, bool on_disk) {
    cost ours = {0}, limits = {0}, cold = {0}, cold_limit = {0}, theirs = {0};
    char question[900], more[160];
    snprintf(directory, sizeof directory, "%s/psoup-bench-XXXXXX", parent);
    if (mkdtemp(directory) == NULL) {
        printf("\nfile to file in %s: cannot write there\n", parent);
        return;
    }
    double bytes = 0;
    for (int i = 0; i < 3; i++) {
        const char name[2] = {(char)('a' + i), 0};
        bytes = write_model(context, name, layers, 0x3c);
    }
    for (int turn = 0; turn < 4; turn++) {
        shell("rm -rf %s/ours %s/cat", directory, directory);
        keep(&limits, watch(on_disk ? cat_synced : cat));
        shell("rm -rf %s/ours %s/cat", directory, directory);
        keep(&ours, watch(merge_ours));
    }
    for (int turn = 0; turn < 2 && on_disk; turn++) {
        shell("rm -rf %s/ours %s/cat", directory, directory);
        make_cold();
        keep(&cold_limit, watch(cat_synced));
        shell("rm -rf %s/ours %s/cat", directory, directory);
        make_cold();
        keep(&cold, watch(merge_ours));
    }
    snprintf(question, sizeof question, "%s/recipe.yaml", directory);
    FILE *recipe = fopen(question, "w");
    fprintf(recipe, "merge_method: linear\ndtype: float32\nout_dtype: bfloat16\nparameters: {normalize: false}\nmodels:\n");
    for (int i = 0; i < 3; i++)
        fprintf(recipe, "  - {model: %s/%c, parameters: {weight: %s}}\n", directory, 'a' + i,
                i == 0 ? "0.6" : i == 1 ? "0.3" : "0.1");
    fclose(recipe);
    snprintf(question, sizeof question, "merge %s/recipe.yaml %s/theirs", directory, directory);
    const char *answer = ask(question);
    bool there = sscanf(answer, "%lf %lf %lf", &theirs.wall, &theirs.cpu, &theirs.mib) == 3;
    printf("\nfile to file, 3 × %.2f GB of bf16 → %.2f GB, linear, in %s%s\n", bytes / 1e9, bytes / 1e9, parent,
           on_disk ? ": on disk, results synced" : ": in memory, nothing to sync");
    snprintf(more, sizeof more, "%.2f GB/s in and out; %.2f of cat (goal 0.7)", 4 * bytes / ours.wall / 1e9,
             limits.wall / ours.wall);
    tell(on_disk ? "ours, warm, with its sync" : "ours, warm", ours, more);
    tell(on_disk ? "limit: cat of the bytes, synced" : "limit: cat of the bytes", limits, "");
    if (there) {
        snprintf(more, sizeof more, "ours is %.1f times as fast (goal 3)", theirs.wall / ours.wall);
        tell(on_disk ? "mergekit, warm, not synced" : "mergekit, warm", theirs, more);
    } else {
        printf("  mergekit: %s\n", answer);
    }
    if (on_disk) {
        snprintf(more, sizeof more, "%.2f of cat", cold_limit.wall / cold.wall);
        tell("ours, cold, with its sync", cold, more);
        tell("limit: cat, cold, synced", cold_limit, "");
    }
    shell("rm -rf %s", directory);
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
    const char *parts = argc > 4 ? argv[4] : "sum,fold,weights,files";
    if (strstr(parts, "sum") != NULL)
        bench_sum(context, millions);
    if (strstr(parts, "fold") != NULL)
        bench_fold(context, layers);
    if (strstr(parts, "weights") != NULL)
        bench_reweight(context);
    if (strstr(parts, "files") != NULL && access("/dev/shm", W_OK) == 0)
        bench_files(context, "/dev/shm", layers, false);
    if (strstr(parts, "files") != NULL)
        bench_files(context, getenv("TMPDIR") != NULL ? getenv("TMPDIR") : P_tmpdir, layers, true);
    psoup_context_free(context);
    return 0;
}
