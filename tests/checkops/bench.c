/* checkops --bench: see bench.h. */
#include "bench.h"

#include <time.h>

#include "gpu/gpu.h"

enum { NOISE = 1 << 20, ROUNDS = 5, MOST_COPIES = 256, ALIGN = 256 };

static const bench_sizes seven_b = {.width = 4096, .ffn = 11008, .rows = 4096, .vocab = 32000, .heads = 32,
                                    .kv_heads = 8, .head_dim = 128, .adapters = 8, .rank = 16,
                                    .sequence = 2048, .batch = 64, .context = 512, .square = 8192,
                                    .parameters = (size_t)1 << 27, .beyond_cache = (size_t)256 << 20};
static const bench_sizes tiny = {.width = 128, .ffn = 192, .rows = 32, .vocab = 100, .heads = 2,
                                 .kv_heads = 1, .head_dim = 64, .adapters = 3, .rank = 4,
                                 .sequence = 16, .batch = 4, .context = 24, .square = 32,
                                 .parameters = (size_t)1 << 12, .beyond_cache = 1};

static void need(const bench *b, psoup__cu_result result, const char *what) {
    const char *text = "unknown error";
    if (result == 0)
        return;
    b->gpu->driver.error_string(result, &text);
    fprintf(stderr, "checkops: %s: %s\n", what, text);
    exit(1);
}

/* Waits, and ends the program if anything went wrong. */
static void settle(bench *b, const char *op) {
    psoup_error error;
    if (b->ops->read(b->be, NULL, NULL, 0, &error) == PSOUP_OK)
        return;
    fprintf(stderr, "checkops: %s: %s\n", op, error.message);
    exit(1);
}

static double clock_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- memory -------------------------------------------------------------------------------------------- */

static size_t bytes_of(const bench_item *item) {
    const size_t bytes = item->host ? item->n : item->n * psoup_dtype_size(item->dtype);
    return (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

static void fill(bench *b, char *out, const bench_item *item) {
    if (item->host) {
        b->ops->write(b->be, out, item->host, item->n);
        return;
    }
    const size_t size = psoup_dtype_size(item->dtype);
    void *stored = malloc(NOISE * size);
    if (!stored)
        exit(2);
    psoup__from_f32(b->context, stored, item->dtype, item->square ? b->squares : b->noise, NOISE);
    for (size_t at = 0; at < item->n; at += NOISE) {
        const size_t n = item->n - at < NOISE ? item->n - at : NOISE;
        b->ops->write(b->be, out + at * size, stored, n * size);
    }
    free(stored);
}

/* Copies of a case's memory, in one block. */
typedef struct copies {
    int32_t n;
    char *memory;
    void *item[MOST_COPIES][MOST_ITEMS];
} copies;

static void open_copies(bench *b, const bench_case *c, copies *m) {
    psoup_error error;
    size_t one = 0;
    for (int i = 0; i < MOST_ITEMS && c->item[i].n > 0; i++)
        one += bytes_of(&c->item[i]);
    const size_t n = b->s.beyond_cache / one + 2; /* at least 2: nothing of the last call is at hand */
    m->n = (int32_t)(n < MOST_COPIES ? n : MOST_COPIES);
    m->memory = b->ops->alloc(b->be, (size_t)m->n, one, &error);
    if (!m->memory) {
        fprintf(stderr, "checkops: %s: %s\n", c->op, error.message);
        exit(1);
    }
    char *at = m->memory;
    for (int32_t k = 0; k < m->n; k++)
        for (int i = 0; i < MOST_ITEMS && c->item[i].n > 0; i++) {
            m->item[k][i] = at;
            at += bytes_of(&c->item[i]);
            if (k == 0)
                fill(b, m->item[k][i], &c->item[i]);
            else
                b->ops->copy(b->be, m->item[k][i], m->item[0][i], bytes_of(&c->item[i]));
        }
}

/* ---- time ---------------------------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double time_waiting(bench *b, const bench_case *c, copies *m) {
    double seconds[ROUNDS];
    for (int r = 0; r < ROUNDS; r++) {
        const double start = clock_seconds();
        for (int32_t k = 0; k < m->n; k++)
            c->run(b, m->item[k], c->arg);
        seconds[r] = (clock_seconds() - start) / m->n;
    }
    qsort(seconds, ROUNDS, sizeof *seconds, ascending);
    return seconds[ROUNDS / 2];
}

/* One call on each copy. What the calls stage must fit in one half of the staging memory, whose other half a
 * graph cannot wait for: they begin with an empty one. */
static psoup__cu_graph_exec capture(bench *b, const bench_case *c, copies *m) {
    psoup__driver *d = &b->gpu->driver;
    psoup__cu_graph graph;
    psoup__cu_graph_exec exec;
    b->gpu->upload.used = 0;
    b->gpu->upload.pending[0] = b->gpu->upload.pending[1] = false;
    need(b, d->capture_begin(b->gpu->stream, PSOUP__CU_CAPTURE_RELAXED), c->op);
    for (int32_t k = 0; k < m->n; k++)
        c->run(b, m->item[k], c->arg);
    need(b, d->capture_end(b->gpu->stream, &graph), c->op);
    need(b, d->graph_instantiate(&exec, graph, 0), c->op);
    need(b, d->graph_destroy(graph), c->op);
    return exec;
}

static double time_launches(bench *b, psoup__cu_graph_exec exec, int times, const psoup__cu_event ends[2]) {
    psoup__driver *d = &b->gpu->driver;
    float milliseconds;
    need(b, d->event_record(ends[0], b->gpu->stream), "timing");
    for (int i = 0; i < times; i++)
        need(b, d->graph_launch(exec, b->gpu->stream), "timing");
    need(b, d->event_record(ends[1], b->gpu->stream), "timing");
    need(b, d->event_wait(ends[1]), "timing");
    need(b, d->event_elapsed(&milliseconds, ends[0], ends[1]), "timing");
    return milliseconds / 1e3;
}

/* The median of ROUNDS rounds of at least 20 ms. */
static double time_graph(bench *b, const bench_case *c, copies *m) {
    psoup__driver *d = &b->gpu->driver;
    psoup__cu_event ends[2];
    double seconds[ROUNDS];
    psoup__cu_graph_exec exec = capture(b, c, m);
    for (int i = 0; i < 2; i++)
        need(b, d->event_create(&ends[i], 0), "timing");
    time_launches(b, exec, 1, ends);
    const double one = time_launches(b, exec, 1, ends);
    const int times = one < 20e-3 / 500 ? 500 : (int)(20e-3 / one) + 1;
    for (int r = 0; r < ROUNDS; r++)
        seconds[r] = time_launches(b, exec, times, ends) / times / m->n;
    for (int i = 0; i < 2; i++)
        d->event_destroy(ends[i]);
    d->graph_exec_destroy(exec);
    qsort(seconds, ROUNDS, sizeof *seconds, ascending);
    return seconds[ROUNDS / 2];
}

/* ---- what is printed ----------------------------------------------------------------------------------- */

static void print_head(const bench *b) {
    if (!b->json)
        printf("%s\n%-18s %-52s %10s %9s %9s %10s %6s\n", b->device, "op", "shape", "us", "GB/s", "TFLOP/s",
               "floor us", "ratio");
}

static void print_case(const bench *b, const bench_case *c, double seconds) {
    const double moving = c->bytes / b->copy_rate, computing = c->flops / b->product_rate;
    const double floor = moving > computing ? moving : computing;
    if (b->json)
        printf("{\"op\": \"%s\", \"shape\": \"%s\", \"seconds\": %.4g, \"bytes\": %.0f, \"flops\": %.0f, "
               "\"floor\": %.4g, \"ratio\": %.4g, \"device\": \"%s\"}\n",
               c->op, c->shape, seconds, c->bytes, c->flops, floor, floor / seconds, b->device);
    else
        printf("%-18s %-52s %10.2f %9.1f %9.2f %10.2f %6.2f\n", c->op, c->shape, seconds * 1e6,
               c->bytes / seconds / 1e9, c->flops / seconds / 1e12, floor * 1e6, floor / seconds);
    fflush(stdout);
}

static double time_case(bench *b, const bench_case *c) {
    static copies m; /* large */
    open_copies(b, c, &m);
    c->run(b, m.item[0], c->arg); /* kernels are found, plans made */
    settle(b, c->op);
    const double seconds = c->waits ? time_waiting(b, c, &m) : time_graph(b, c, &m);
    settle(b, c->op);
    b->ops->release(b->be, m.memory);
    return seconds;
}

void bench_run(bench *b, const bench_case *c) {
    print_case(b, c, time_case(b, c));
}

/* ---- the ceilings -------------------------------------------------------------------------------------- */

static void run_copy(bench *b, void *const *item, const void *arg) {
    const size_t *bytes = arg;
    b->ops->copy(b->be, item[0], item[1], *bytes);
}

static void run_product(bench *b, void *const *item, const void *arg) {
    psoup__blas_run(b->gpu, arg, item[0], item[1], item[2]);
}

static void measure_ceilings(bench *b) {
    const size_t bytes = 4 * b->s.parameters;
    const bench_case copy = {.op = "copy", .shape = "of the device", .bytes = 2.0 * (double)bytes,
                             .item = {FLOATS(b->s.parameters), FLOATS(b->s.parameters)}, .run = run_copy,
                             .arg = &bytes};
    const int32_t n = b->s.square;
    const size_t cells = (size_t)n * (size_t)n;
    const psoup__product p = {.m = n, .n = n, .k = n, .dtype = PSOUP_BF16, .lda = n, .ldb = n, .ldc = n,
                              .transpose_b = true, .alpha = 1};
    bench_case product = {.op = "product", .flops = 2.0 * n * n * (double)n,
                          .bytes = 8.0 * (double)cells,
                          .item = {FLOATS(cells), NUMBERS(cells, PSOUP_BF16), NUMBERS(cells, PSOUP_BF16)},
                          .run = run_product, .arg = &p};
    snprintf(product.shape, sizeof product.shape, "bf16, %d cubed, by cuBLASLt", (int)n);
    const double copying = time_case(b, &copy), multiplying = time_case(b, &product);
    b->copy_rate = copy.bytes / copying;
    b->product_rate = product.flops / multiplying;
    print_case(b, &copy, copying);
    print_case(b, &product, multiplying);
}

/* ---- the program --------------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    void (*run)(bench *b);
} groups[] = {
    {"layer", bench_layer},
    {"rows", bench_rows},
    {"attention", bench_attention},
    {"linear_mix", bench_linear_mix},
    {"loss", bench_loss},
    {"policy", bench_policy},
    {"sample", bench_sample},
    {"adamw", bench_adamw},
    {"interpolate", bench_interpolate},
};

static int run_groups(bench *b, const char *only) {
    psoup_error error;
    psoup__random random = {.seed = 1};
    const bench_sizes *s = &b->s;
    b->noise = malloc(NOISE * sizeof *b->noise);
    b->squares = malloc(NOISE * sizeof *b->squares);
    if (!b->noise || !b->squares)
        return 2;
    for (size_t i = 0; i < NOISE; i++) {
        b->noise[i] = psoup__random_normal(&random);
        b->squares[i] = b->noise[i] * b->noise[i];
    }
    if (b->ops->reserve(b->be, s->rows, s->vocab > s->ffn ? s->vocab : s->ffn, &error) != PSOUP_OK) {
        fprintf(stderr, "checkops: %s\n", error.message);
        return 1;
    }
    print_head(b);
    measure_ceilings(b);
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++)
        if (!only || strcmp(only, groups[i].name) == 0)
            groups[i].run(b);
    free(b->noise), free(b->squares);
    return 0;
}

int bench_all(const char *device, const char *only, bool json, bool force) {
    psoup_error error;
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    bench b = {.s = force ? tiny : seven_b, .json = json};
    options.device = device;
    if (psoup_context_create(&options, &b.context, &error) != PSOUP_OK ||
        psoup__gpu_create(b.context, &b.be, &error) != PSOUP_OK) {
        fprintf(stderr, "checkops: %s\n", error.message);
        return 2;
    }
    b.ops = b.be->ops;
    b.gpu = psoup__gpu_of(b.be);
    b.gpu->driver.device_name(b.device, sizeof b.device, b.gpu->device);
    int status = 2;
    if (strcmp(b.device, "host driver") == 0 && !force)
        fprintf(stderr, "checkops: the device is the host driver, whose times mean nothing; --force runs "
                        "tiny shapes all the same\n");
    else
        status = run_groups(&b, only);
    b.ops->free(b.be);
    psoup_context_free(b.context);
    return status;
}
