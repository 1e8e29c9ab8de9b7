/* What the tests of merging on a GPU share: the driver's calls as an engine has them, device memory, tensors
 * of any dtype. Public headers only. */
#ifndef GPU_CASE_H
#define GPU_CASE_H

#include <check.h>
#include <dlfcn.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "psoup/psoup.h"

#define ck_ok(call) ck_assert_msg((call) == PSOUP_OK, "%s", error.message)
#define ck_cu(call) ck_assert_int_eq(call, 0)

static const psoup_dtype every[] = {PSOUP_F32, PSOUP_F16, PSOUP_BF16, PSOUP_F64, PSOUP_F8_E4M3, PSOUP_F8_E5M2,
                                    PSOUP_Q8_0};
enum { EVERY = 7, Q8 = 32 };

static struct {
    int (*init)(unsigned);
    int (*alloc)(unsigned long long *, size_t);
    int (*release)(unsigned long long);
    int (*to_device)(unsigned long long, const void *, size_t, void *);
    int (*to_host)(void *, unsigned long long, size_t, void *);
    int (*stream_create)(void **, unsigned);
    int (*stream_destroy)(void *);
    int (*stream_wait)(void *);
    int (*context_get)(void **);
    int (*context_set)(void *);
    int (*context_retain)(void **, int);
    int (*capture_begin)(void *, int);
    int (*capture_end)(void *, void **);
    int (*graph_instantiate)(void **, void *, unsigned long long);
    int (*graph_launch)(void *, void *);
    int (*graph_destroy)(void *);
    int (*graph_exec_destroy)(void *);
} cu;

static psoup_context *host, *device; /* on the CPU; on cuda:0 with `stream` */
static psoup_gpu_merge *merge;
static psoup_error error;
static void *stream, *context;

static inline void find(void *library, const char *symbol, void *call) {
    void *address = dlsym(library, symbol);
    ck_assert_msg(address != NULL, "%s", symbol);
    memcpy(call, &address, sizeof address);
}

static inline psoup_context *new_context(const char *on, void *with) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *made = NULL;
    options.threads = 1;
    options.device = on;
    options.stream = with;
    ck_ok(psoup_context_create(&options, &made, &error));
    return made;
}

static inline void open_driver(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    ck_assert_msg(library != NULL, "%s", dlerror());
    find(library, "cuInit", &cu.init);
    find(library, "cuMemAlloc_v2", &cu.alloc);
    find(library, "cuMemFree_v2", &cu.release);
    find(library, "cuMemcpyHtoDAsync_v2", &cu.to_device);
    find(library, "cuMemcpyDtoHAsync_v2", &cu.to_host);
    find(library, "cuStreamCreate", &cu.stream_create);
    find(library, "cuStreamDestroy_v2", &cu.stream_destroy);
    find(library, "cuStreamSynchronize", &cu.stream_wait);
    find(library, "cuCtxGetCurrent", &cu.context_get);
    find(library, "cuCtxSetCurrent", &cu.context_set);
    find(library, "cuDevicePrimaryCtxRetain", &cu.context_retain);
    find(library, "cuStreamBeginCapture_v2", &cu.capture_begin);
    find(library, "cuStreamEndCapture", &cu.capture_end);
    find(library, "cuGraphInstantiateWithFlags", &cu.graph_instantiate);
    find(library, "cuGraphLaunch", &cu.graph_launch);
    find(library, "cuGraphDestroy", &cu.graph_destroy);
    find(library, "cuGraphExecDestroy", &cu.graph_exec_destroy);
    ck_cu(cu.init(0));
    ck_cu(cu.context_retain(&context, 0)); /* as CUDA's runtime does */
    ck_cu(cu.context_set(context));
    host = new_context("cpu", NULL);
}

static inline void set_up(void) {
    open_driver();
    ck_cu(cu.stream_create(&stream, 1));
    device = new_context("cuda:0", stream);
    ck_ok(psoup_gpu_merge_create(device, &merge, &error));
}

static inline void tear_down(void) {
    psoup_gpu_merge_free(merge);
    psoup_context_free(device);
    psoup_context_free(host);
    ck_cu(cu.stream_destroy(stream));
}

/* ---- tensors ----------------------------------------------------------------------------------------- */

static inline size_t bytes_of(psoup_dtype dtype, size_t n) {
    return dtype == PSOUP_Q8_0 ? n / Q8 * 34 : n * psoup_dtype_size(dtype);
}

/* From −2 to 2, among them what is hard to round. */
static uint32_t state = 1;
static inline float noise(void) {
    static const float odd[] = {0, -0.0f, 1e-40f, -3e38f, 65519, 1e-7f, 449, INFINITY, NAN};
    state = state * 1664525 + 1013904223;
    if (state >> 8 & 63)
        return (float)(state >> 8) * 0x1p-22f - 2;
    return odd[(state >> 14) % (sizeof odd / sizeof *odd)];
}

static inline void convert(void *out, psoup_dtype to, const void *in, psoup_dtype from, size_t n) {
    const double one = 1;
    psoup_merge_view a = {.data = out, .dtype = (int32_t)to, .rows = 1, .columns = (int64_t)n}, b = a;
    b.data = (void *)(uintptr_t)in;
    b.dtype = (int32_t)from;
    ck_ok(psoup_merge_views(host, &a, &b, &one, 1, &error));
}

static inline char *tensor(psoup_dtype dtype, size_t n) {
    float *x = malloc((n + 1) * sizeof *x);
    char *out = malloc(bytes_of(dtype, n) + 1);
    for (size_t i = 0; i < n; i++)
        x[i] = noise();
    convert(out, dtype, x, PSOUP_F32, n);
    free(x);
    return out;
}

/* A device's copy; `shift` bytes into an allocation. */
static inline char *on_device(const void *data, size_t bytes, size_t shift) {
    unsigned long long memory = 0;
    ck_cu(cu.alloc(&memory, bytes + shift + 1));
    memory += shift;
    if (bytes > 0)
        ck_cu(cu.to_device(memory, data, bytes, stream));
    return (char *)(uintptr_t)memory;
}

static inline void release(void *memory, size_t shift) {
    ck_cu(cu.stream_wait(stream));
    ck_cu(cu.release((unsigned long long)(uintptr_t)memory - shift));
}

static inline char *fetched(const void *memory, size_t bytes) {
    char *out = malloc(bytes + 1);
    if (bytes > 0)
        ck_cu(cu.to_host(out, (unsigned long long)(uintptr_t)memory, bytes, stream));
    ck_cu(cu.stream_wait(stream));
    return out;
}

/* n elements of the same bits, or NaN in both. */
static inline void check_same(const char *what, psoup_dtype dtype, const char *got, const char *expected,
                              size_t n) {
    if (memcmp(got, expected, bytes_of(dtype, n)) == 0)
        return;
    float *a = malloc(n * sizeof *a), *b = malloc(n * sizeof *b);
    convert(a, PSOUP_F32, got, dtype, n);
    convert(b, PSOUP_F32, expected, dtype, n);
    for (size_t i = 0; i < n; i++) {
        const size_t each = dtype == PSOUP_Q8_0 ? Q8 : 1, at = bytes_of(dtype, i / each * each);
        const bool same = memcmp(got + at, expected + at, bytes_of(dtype, each)) == 0;
        ck_assert_msg(same || (isnan(a[i]) && isnan(b[i])), "%s, %s: element %zu is %.9g; expected %.9g", what,
                      psoup_dtype_name(dtype), i, (double)a[i], (double)b[i]);
    }
    free(a);
    free(b);
}

/* ---- a call in both places -------------------------------------------------------------------------- */

enum { MOST = 40 };

/* A sum's views in both places: tensors [rows, stride] of which columns from `first` on are meant. */
typedef struct sum {
    psoup_merge_view out, in[MOST], out_there, in_there[MOST];
    char *here[MOST + 1], *there[MOST + 1];
    size_t bytes[MOST + 1], n;
    double weights[MOST];
} sum;

static inline psoup_merge_view add_tensor(sum *s, size_t i, psoup_dtype dtype, int64_t rows, int64_t columns,
                                   int64_t stride, int64_t first, psoup_merge_view *there) {
    const size_t n = (size_t)(rows * stride), skip = bytes_of(dtype, (size_t)first);
    s->here[i] = tensor(dtype, n);
    s->bytes[i] = bytes_of(dtype, n);
    s->there[i] = on_device(s->here[i], s->bytes[i], 0);
    psoup_merge_view view = {.data = s->here[i] + skip, .dtype = (int32_t)dtype, .rows = rows,
                             .columns = columns, .row_stride = stride};
    *there = view;
    there->data = s->there[i] + skip;
    there->place = PSOUP_MERGE_DEVICE;
    return view;
}

static inline void add_input(sum *s, psoup_dtype dtype, int64_t columns, int64_t stride, int64_t first) {
    const size_t i = s->n++;
    s->weights[i] = (double)(i % 5) * 0.375 - 0.9;
    s->in[i] = add_tensor(s, i, dtype, s->out.rows, columns, stride, first, &s->in_there[i]);
}

static inline void add_output(sum *s, psoup_dtype dtype, int64_t rows, int64_t columns, int64_t stride,
                              int64_t first) {
    s->out = add_tensor(s, MOST, dtype, rows, columns, stride, first, &s->out_there);
}

static inline void drop(sum *s) {
    for (size_t i = 0; i <= MOST; i++) {
        free(s->here[i]);
        if (s->there[i] != NULL)
            release(s->there[i], 0);
    }
}

typedef struct adapters {
    psoup_lora_factors here[MOST], there[MOST];
    double weights[MOST];
    size_t n;
} adapters;

static inline float *plain(size_t n) {
    float *x = malloc((n + 1) * sizeof *x);
    for (size_t i = 0; i < n; i++)
        do
            x[i] = noise();
        while (!(fabsf(x[i]) < 3));
    return x;
}

static inline void add_adapter(adapters *a, int32_t rank, int64_t out, int64_t in) {
    const size_t na = (size_t)(rank * in), nb = (size_t)(rank * out);
    psoup_lora_factors f = {.a = plain(na), .b = plain(nb), .rank = rank, .scale = 0.5f + (float)a->n};
    a->weights[a->n] = (double)(a->n % 3) * 0.4 - 0.3;
    a->here[a->n] = f;
    f.a = (const float *)(const void *)on_device(f.a, na * 4, 0);
    f.b = (const float *)(const void *)on_device(f.b, nb * 4, 0);
    a->there[a->n++] = f;
}

static inline void drop_adapters(adapters *a) {
    for (size_t i = 0; i < a->n; i++) {
        free((void *)(uintptr_t)a->here[i].a);
        free((void *)(uintptr_t)a->here[i].b);
        release((void *)(uintptr_t)a->there[i].a, 0);
        release((void *)(uintptr_t)a->there[i].b, 0);
    }
}

/* The bits of a host that has fused multiply-adds. */
static inline void check_fold(const char *what, psoup_dtype dtype, const char *got, const char *expected,
                              size_t n) {
    if (strcmp(psoup_context_isa(host), "generic") != 0) {
        check_same(what, dtype, got, expected, n);
        return;
    }
    float *a = malloc(n * sizeof *a), *b = malloc(n * sizeof *b);
    convert(a, PSOUP_F32, got, dtype, n);
    convert(b, PSOUP_F32, expected, dtype, n);
    for (size_t i = 0; i < n; i++) {
        const float place = dtype == PSOUP_F32 || dtype == PSOUP_F64 ? 1e-5f : 0.3f;
        const bool near = a[i] == b[i] || fabsf(a[i] - b[i]) <= place * (1 + fabsf(b[i]));
        ck_assert_msg(near || (isnan(a[i]) && isnan(b[i])), "%s, %s: element %zu is %.9g; expected %.9g", what,
                      psoup_dtype_name(dtype), i, (double)a[i], (double)b[i]);
    }
    free(a);
    free(b);
}

#endif
