/* Speed of the merge methods: a base and three models of one bf16 linear [4096, 4096] into f32,
 * with mergekit's own code in the same run where python3 has it, and the truncated SVD of six
 * adapters with LAPACK's.
 *
 *   bench_methods [PYTHON SCRIPT]     e.g. bench_methods python3 tests/bench_methods.py
 */
#include <stdio.h>
#include <stdlib.h>

#include "bench_limits.h"
#include "blend/blend.h"
#include "blend/method.h"

enum { N = 4096, INPUTS = 3, BLOCK = 1 << 16, TURNS = 5, ADAPTERS = 6, RANK = 16 };
#define SIZE ((size_t)N * N)

static void must(psoup_status status, const psoup_error *error) {
    if (status != PSOUP_OK) {
        fprintf(stderr, "bench_methods: %s\n", error->message);
        exit(1);
    }
}

static psoup_context *context;
static psoup_error error;
static float *out, *scratch;

/* ---- ours ------------------------------------------------------------------------------------ */

typedef struct blocks {
    const psoup__method_job *job;
    const void *state;
    size_t space;
} blocks;

static void make_block(void *arg, size_t task, int worker) {
    const blocks *b = arg;
    b->job->method->block(b->job, b->state, task * BLOCK, BLOCK, out + task * BLOCK,
                          scratch + (size_t)worker * b->space);
}

static double merge(const char *name, const psoup__merge_input *inputs) {
    static const double weight[INPUTS] = {0.5, 0.3, 0.2}, density[INPUTS] = {0.5, 0.5, 0.5};
    const psoup__method *method = psoup__method_named(name);
    const uint32_t on = method->on[PSOUP_MERGE_MERGEKIT];
    psoup__method_job job = {.context = context,
                             .name = "linear",
                             .n = SIZE,
                             .columns = N,
                             .rows = N,
                             .count = method->most == 2 ? 1 : INPUTS,
                             .inputs = inputs,
                             .base = &inputs[INPUTS],
                             .weight = weight,
                             .density = density,
                             .lambda = 1,
                             .t = 0.3,
                             .normalize = (on & PSOUP__USES_NORMALIZE) != 0,
                             .rescale = (on & PSOUP__USES_RESCALE) != 0,
                             .peer = PSOUP_MERGE_MERGEKIT,
                             .method = method};
    double best = 1e9;
    for (int turn = 0; turn < TURNS; turn++) {
        double start = now();
        void *state = NULL;
        must(method->prepare(&job, &state, &error), &error);
        blocks b = {&job, state, psoup__method_scratch(&job) * BLOCK};
        psoup__parallel(context, SIZE / BLOCK, make_block, &b);
        psoup__free(context, state);
        double took = now() - start;
        best = took < best ? took : best;
    }
    return best;
}

static double truncate_adapters(void) {
    psoup_lora_factors f[ADAPTERS];
    const double weights[ADAPTERS] = {0.3, 0.2, 0.2, 0.1, 0.1, 0.1};
    float *a = malloc(RANK * N * sizeof *a), *b = malloc(RANK * N * sizeof *b);
    double best = 1e9, lost;
    psoup__random random = {3, 0, 0};
    for (int i = 0; i < ADAPTERS; i++) {
        float *x = malloc(2 * RANK * N * sizeof *x);
        for (int j = 0; j < 2 * RANK * N; j++)
            x[j] = psoup__random_uniform(&random) - 0.5f;
        f[i] = (psoup_lora_factors){x, x + RANK * N, RANK, 2};
    }
    for (int turn = 0; turn < TURNS; turn++) {
        double start = now();
        must(psoup_merge_factors(context, PSOUP_MERGE_SVD, a, b, RANK, N, N, f, weights, ADAPTERS,
                                 &lost, &error),
             &error);
        double took = now() - start;
        best = took < best ? took : best;
    }
    for (int i = 0; i < ADAPTERS; i++)
        free((void *)(uintptr_t)f[i].a);
    free(a);
    free(b);
    return best;
}

/* ---- theirs, and both -------------------------------------------------------------------------
 */

/* Seconds, as the script prints them; 0 where there is none. */
static double ask(char **argv, const char *name) {
    char command[1024], line[64] = "";
    snprintf(command, sizeof command, "%s %s %s 2>/dev/null", argv[1], argv[2], name);
    FILE *from = popen(command, "r");
    if (from == NULL)
        return 0;
    double seconds = fgets(line, sizeof line, from) != NULL ? atof(line) : 0;
    pclose(from);
    return seconds;
}

static void tell(const char *name, double ours, double theirs, double least) {
    printf("%-18s ours %7.1f ms", name, 1e3 * ours);
    if (theirs > 0)
        printf("  theirs %7.1f ms  ratio %6.1f", 1e3 * theirs, theirs / ours);
    if (least > 0)
        printf("  reading it once %5.1f ms", 1e3 * least);
    printf("\n");
}

int main(int argc, char **argv) {
    static const char *const names[] = {"task_arithmetic", "ties",  "dare_linear", "dare_ties",
                                        "breadcrumbs",     "della", "slerp",       "model_stock"};
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup__tensor tensors[INPUTS + 1];
    psoup__merge_input inputs[INPUTS + 1];
    options.threads = THREADS;
    must(psoup_context_create(&options, &context, &error), &error);
    out = malloc(SIZE * sizeof *out);
    scratch = malloc((size_t)THREADS * 32 * BLOCK * sizeof *scratch);
    for (int i = 0; i <= INPUTS; i++) {
        void *data = malloc(2 * SIZE);
        for (size_t e = 0; e < SIZE; e++) {
            uint32_t word = (uint32_t)(e * 2654435761u + (uint32_t)i * 40503u * (uint32_t)(e >> 7));
            out[e] = (float)(int32_t)(word ^ word >> 15) * 0x1p-31f;
        }
        psoup__from_f32(context, data, PSOUP_BF16, out, SIZE);
        tensors[i] = (psoup__tensor){
            .dtype = PSOUP_BF16, .rank = 2, .shape = {N, N}, .bytes = 2 * SIZE, .data = data};
        inputs[i] = (psoup__merge_input){.tensor = &tensors[i], .columns = N};
    }
    const double rate = limit(out, SIZE);
    printf("[4096, 4096] bf16, %d threads, %s; %.1f GB/s\n", THREADS, psoup_context_isa(context),
           rate);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const double models = strcmp(names[i], "slerp") == 0 ? 2 : INPUTS + 1;
        double ours = merge(names[i], inputs);
        tell(names[i], ours, argc > 2 ? ask(argv, names[i]) : 0,
             models * 2 * (double)SIZE / rate * 1e-9);
    }
    tell("svd of 6 adapters", truncate_adapters(), argc > 2 ? ask(argv, "svd") : 0, 0);
    for (int i = 0; i <= INPUTS; i++)
        free((void *)(uintptr_t)tensors[i].data);
    free(out);
    free(scratch);
    psoup_context_free(context);
    return 0;
}
