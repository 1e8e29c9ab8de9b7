/* checkops: see checkops.h. Run it with --help. */
#include "checkops.h"

#include <stdarg.h>

#include "bench.h"
#include "cpu/cpu.h"
#include "gpu/gpu.h"

/* ---- one case ------------------------------------------------------------------------------------------- */

static void release(checker *c) {
    for (int i = 0; i < c->n_buffers; i++) {
        free(c->buffers[i].host);
        c->ops->release(c->be, c->buffers[i].device);
    }
    for (int i = 0; i < c->n_blocks; i++)
        c->ops->release(c->be, c->blocks[i]);
    c->n_buffers = c->n_blocks = 0;
}

void begin(checker *c, const char *op, const char *format, ...) {
    va_list args;
    release(c);
    c->op = op;
    va_start(args, format);
    vsnprintf(c->note, sizeof c->note, format, args);
    va_end(args);
}

void fail(checker *c, const char *format, ...) {
    va_list args;
    c->failures++;
    printf("FAILED %s %s (%s): ", c->ops->name, c->op, c->note);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
}

static void need(bool truth, const char *what) {
    if (truth)
        return;
    fprintf(stderr, "checkops: %s\n", what);
    exit(2);
}

void *block(checker *c, const void *host, size_t bytes) {
    psoup_error error;
    void *device = c->ops->alloc(c->be, bytes, 1, &error);
    need(device && c->n_blocks < 2 * MOST_BUFFERS, device ? "too many blocks" : error.message);
    if (host)
        c->ops->write(c->be, device, host, bytes);
    c->blocks[c->n_blocks++] = device;
    return device;
}

static buffer *new_buffer(checker *c, size_t n, psoup_dtype dtype) {
    psoup_error error;
    need(c->n_buffers < MOST_BUFFERS, "too many buffers");
    buffer *b = &c->buffers[c->n_buffers++];
    *b = (buffer){.n = n, .dtype = dtype, .host = malloc((n + 1) * sizeof(float))};
    b->device = c->ops->alloc(c->be, n + 1, psoup_dtype_size(dtype), &error);
    need(b->host && b->device, b->device ? "out of memory" : error.message);
    for (size_t i = 0; i <= n; i++)
        b->host[i] = NAN;
    return b;
}

void put(checker *c, buffer *b) {
    size_t bytes = (b->n + 1) * psoup_dtype_size(b->dtype);
    void *stored = malloc(bytes);
    need(stored, "out of memory");
    psoup__from_f32(c->context, stored, b->dtype, b->host, b->n + 1);
    c->ops->write(c->be, b->device, stored, bytes);
    psoup__to_f32(c->context, b->host, stored, b->dtype, b->n + 1);
    free(stored);
}

void get(checker *c, buffer *b) {
    psoup_error error;
    size_t bytes = (b->n + 1) * psoup_dtype_size(b->dtype);
    void *stored = malloc(bytes);
    need(stored, "out of memory");
    if (c->ops->read(c->be, stored, b->device, bytes, &error) != PSOUP_OK) {
        fail(c, "%s", error.message);
        exit(1);
    }
    psoup__to_f32(c->context, b->host, stored, b->dtype, b->n + 1);
    free(stored);
    if (!isnan(b->host[b->n]))
        fail(c, "written past the end of a buffer of %zu", b->n);
}

buffer *input_of(checker *c, size_t n, psoup_dtype dtype) {
    buffer *b = new_buffer(c, n, dtype);
    psoup__random random = {.seed = 1, .sequence = c->seed++};
    for (size_t i = 0; i < n; i++)
        b->host[i] = psoup__random_normal(&random);
    put(c, b);
    return b;
}

buffer *input(checker *c, size_t n) {
    return input_of(c, n, PSOUP_F32);
}

buffer *output(checker *c, size_t n) {
    buffer *b = new_buffer(c, n, PSOUP_F32);
    put(c, b);
    return b;
}

buffer *values(checker *c, const float *host, size_t n) {
    buffer *b = new_buffer(c, n, PSOUP_F32);
    memcpy(b->host, host, n * sizeof *host);
    put(c, b);
    return b;
}

/* ---- comparing ---------------------------------------------------------------------------------------- */

void expect(checker *c, const char *what, buffer *b, const double *want, double tolerance) {
    double most = 0;
    get(c, b);
    c->checks++;
    for (size_t i = 0; i < b->n; i++)
        most = fmax(most, fabs(want[i]));
    for (size_t i = 0; i < b->n; i++)
        if (!(fabs(b->host[i] - want[i]) <= tolerance * (1 + most))) {
            fail(c, "%s[%zu] is %.9g, expected %.9g ± %.1e", what, i, (double)b->host[i], want[i],
                 tolerance * (1 + most));
            return;
        }
}

void expect_true(checker *c, const char *what, bool truth) {
    c->checks++;
    if (!truth)
        fail(c, "not so: %s", what);
}

void differences(checker *c, const char *what, buffer *got, const float *base, double *x, size_t n, size_t step,
                 loss_fn loss, void *arg, double tolerance) {
    const double h = 1e-5;
    get(c, got);
    c->checks++;
    for (size_t i = 0; i < n; i += step) {
        const double kept = x[i];
        x[i] = kept + h;
        const double above = loss(arg);
        x[i] = kept - h;
        const double want = (above - loss(arg)) / (2 * h) + (base ? base[i] : 0);
        x[i] = kept;
        if (!(fabs(got->host[i] - want) <= tolerance * (1 + fabs(want)))) {
            fail(c, "%s[%zu] is %.9g; by finite differences %.9g", what, i, (double)got->host[i], want);
            return;
        }
    }
}

double *doubles(size_t n) {
    double *x = calloc(n + 1, sizeof *x);
    need(x, "out of memory");
    return x;
}

double *doubles_of(const float *x, size_t n) {
    double *y = doubles(n);
    for (size_t i = 0; i < n; i++)
        y[i] = x[i];
    return y;
}

double inner(const double *a, const double *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

double tolerance_of(psoup_dtype dtype) {
    return dtype == PSOUP_BF16 ? 1.5e-2 : dtype == PSOUP_F16 ? 2e-3 : 1e-5;
}

/* ---- the program ---------------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    void (*check)(checker *c);
} checks[] = {
    {"layer", check_layer},
    {"rows", check_rows},
    {"attention", check_attention},
    {"attention_decode", check_attention_decode},
    {"linear_mix", check_linear_mix},
    {"loss", check_loss},
    {"policy", check_policy},
    {"sample", check_sample},
    {"advance", check_advance},
    {"adamw", check_adamw},
};

static bool is_group(const char *name) {
    for (size_t i = 0; i < sizeof checks / sizeof *checks; i++)
        if (strcmp(name, checks[i].name) == 0)
            return true;
    return false;
}

static int run(const char *device, const char *only) {
    psoup_error error;
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    checker c = {.seed = 1};
    options.device = device;
    options.allocator = watched_allocator(&c);
    c.cuda = strcmp(device, "cpu") != 0;
    if (psoup_context_create(&options, &c.context, &error) != PSOUP_OK ||
        (c.cuda ? psoup__gpu_create : psoup__cpu_create)(c.context, &c.be, &error) != PSOUP_OK) {
        fprintf(stderr, "checkops: %s\n", error.message);
        return 2;
    }
    watch(&c);
    for (size_t i = 0; i < sizeof checks / sizeof *checks; i++) {
        if (only && strcmp(only, checks[i].name) != 0)
            continue;
        int before = c.checks, failed = c.failures;
        checks[i].check(&c);
        printf("%-5s %-14s %5d checks, %d failed\n", c.ops->name, checks[i].name, c.checks - before,
               c.failures - failed);
    }
    release(&c);
    c.aside = true;
    c.ops->free(c.be);
    psoup_context_free(c.context);
    return c.failures > 0;
}

int main(int argc, char **argv) {
    const char *device = NULL, *only = NULL;
    bool timed = false, json = false, force = false;
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--device") == 0 && i + 1 < argc) {
            device = argv[++i];
        } else if (strcmp(argv[i], "--bench") == 0) {
            timed = true;
        } else if (strcmp(argv[i], "--json") == 0) {
            json = true;
        } else if (strcmp(argv[i], "--force") == 0) {
            force = true;
        } else if (argv[i][0] != '-') {
            only = argv[i];
        } else {
            printf("checkops [--device cpu|cuda:N] [GROUP]\n"
                   "checkops --bench [--device cuda:N] [--json] [--force] [GROUP]\n\n"
                   "Checks every op against float64, on the CPU and on the GPU, or on one of them. Or times it\n"
                   "on a GPU beside what it needs at least, as a table or as lines of JSON; with --force in tiny\n"
                   "shapes, to see that it runs. GROUP: ");
            for (size_t k = 0; k < sizeof checks / sizeof *checks; k++)
                printf("%s%s", k ? ", " : "", checks[k].name);
            printf(".\nTimes are of the same groups, but attention_decode and advance, and of interpolate.\n");
            return strcmp(argv[i], "--help") != 0;
        }
    if (timed)
        return bench_all(device ? device : "cuda:0", only, json, force);
    if (only && !is_group(only)) {
        fprintf(stderr, "checkops: there is no group %s\n", only);
        return 2;
    }
    if (device)
        return run(device, only);
    int cpu = run("cpu", only), cuda = run("cuda:0", only);
    return cpu | cuda;
}
