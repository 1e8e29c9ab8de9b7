/* Merging in device memory, against the host's: tests/host_driver is the GPU. */
#include "gpu_case.h"

#include <sys/wait.h>
#include <unistd.h>

enum { MOST = 40 };

/* A sum's views in both places: tensors [rows, stride] of which columns from `first` on are meant. */
typedef struct sum {
    psoup_merge_view out, in[MOST], out_there, in_there[MOST];
    char *here[MOST + 1], *there[MOST + 1];
    size_t bytes[MOST + 1], n;
    double weights[MOST];
} sum;

static psoup_merge_view add_tensor(sum *s, size_t i, psoup_dtype dtype, int64_t rows, int64_t columns,
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

static void add_input(sum *s, psoup_dtype dtype, int64_t columns, int64_t stride, int64_t first) {
    const size_t i = s->n++;
    s->weights[i] = (double)(i % 5) * 0.375 - 0.9;
    s->in[i] = add_tensor(s, i, dtype, s->out.rows, columns, stride, first, &s->in_there[i]);
}

static void add_output(sum *s, psoup_dtype dtype, int64_t rows, int64_t columns, int64_t stride, int64_t first) {
    s->out = add_tensor(s, MOST, dtype, rows, columns, stride, first, &s->out_there);
}

/* Does it in both places and compares the whole output tensor, also what lies beside the view. */
static void check_sum(sum *s, const char *what) {
    const psoup_dtype dtype = (psoup_dtype)s->out.dtype;
    const size_t n = (size_t)(s->out.rows * (s->out.row_stride ? s->out.row_stride : s->out.columns));
    ck_ok(psoup_merge_views(device, &s->out_there, s->in_there, s->weights, s->n, &error));
    ck_ok(psoup_merge_views(host, &s->out, s->in, s->weights, s->n, &error));
    for (size_t i = 0; i <= MOST; i++) /* the output may be one of them */
        if (s->here[i] != NULL && (i == MOST || s->in[i].data == s->out.data)) {
            char *got = fetched(s->there[i], s->bytes[i]);
            check_same(what, dtype, got, s->here[i], n);
            free(got);
        }
}

static void drop(sum *s) {
    for (size_t i = 0; i <= MOST; i++) {
        free(s->here[i]);
        if (s->there[i] != NULL)
            release(s->there[i], 0);
    }
}

/* _i: the dtype that comes out. Inputs of three dtypes, slices of wider tensors. */
START_TEST(sums_of_any_dtypes) {
    static const int64_t sizes[][2] = {{1, 32}, {3, 288}, {37, 96}, {2, 736}};
    for (int first = 0; first < EVERY; first++)
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
            sum s = {0};
            add_output(&s, every[_i], sizes[k][0], sizes[k][1], sizes[k][1] + 64, 32);
            for (int i = 0; i < 3; i++)
                add_input(&s, every[(first + 2 * i) % EVERY], sizes[k][1], sizes[k][1] + 64, 32 * i);
            check_sum(&s, "mixed");
            drop(&s);
        }
}
END_TEST

/* _i: the dtype. What the kernels of one dtype take, and what they must leave to the other: 9 inputs, odd strides,
 * odd beginnings. */
START_TEST(sums_of_one_dtype) {
    static const int64_t sizes[][4] = { /* rows, columns, stride, first */
        {1, 1, 1, 0},       {1, 7, 7, 0},      {1, 8, 8, 0},      {1, 2049, 2049, 0}, {1, 150003, 150003, 0},
        {5, 40, 40, 0},     {300, 37, 48, 8},  {3, 4104, 4112, 0}, {7, 33, 35, 0},    {4, 64, 80, 3},
    };
    for (size_t n = 1; n <= 9; n++)
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
            sum s = {0};
            if (sizes[k][1] > 100000 && n % 4 != 1)
                continue;
            add_output(&s, every[_i], sizes[k][0], sizes[k][1], sizes[k][2], sizes[k][3]);
            for (size_t i = 0; i < n; i++)
                add_input(&s, every[_i], sizes[k][1], sizes[k][2], sizes[k][3]);
            check_sum(&s, "same");
            drop(&s);
        }
}
END_TEST

START_TEST(sums_of_any_number) {
    for (size_t n = 0; n <= MOST; n++) {
        sum s = {0};
        add_output(&s, PSOUP_BF16, 5, 70, 70, 0);
        for (size_t i = 0; i < n; i++)
            add_input(&s, every[i % 6], 70, 70, 0);
        check_sum(&s, "many");
        drop(&s);
    }
}
END_TEST

START_TEST(a_weight_of_zero_skips_its_input) {
    static const size_t counts[] = {3, 8, 20, 40};
    for (size_t k = 0; k < sizeof counts / sizeof *counts; k++)
        for (int all = 0; all < 2; all++) {
            sum s = {0};
            add_output(&s, PSOUP_F16, 2, 64, 64, 0);
            for (size_t i = 0; i < counts[k]; i++) {
                add_input(&s, PSOUP_F16, 64, 64, 0);
                if (i % 3 != 1 && !all)
                    continue;
                s.weights[i] = 0;
                s.in_there[i].data = (void *)(uintptr_t)(16 + i % 2); /* nobody's */
                s.in_there[i].columns = -1;
            }
            check_sum(&s, all ? "nothing" : "some");
            drop(&s);
        }
}
END_TEST

START_TEST(sums_in_place) {
    for (int k = 0; k < EVERY; k++)
        for (int wide = 0; wide < 2; wide++) {
            sum s = {0};
            s.out.rows = 9;
            add_input(&s, every[k], 96, wide ? 128 : 96, 0);
            add_input(&s, wide ? every[k] : PSOUP_BF16, 96, wide ? 128 : 96, 0);
            s.out = s.in[1 * (wide || every[k] == PSOUP_BF16)];
            s.out_there = s.in_there[1 * (wide || every[k] == PSOUP_BF16)];
            check_sum(&s, "in place");
            drop(&s);
        }
}
END_TEST

/* ---- folds --------------------------------------------------------------------------------------------- */

typedef struct adapters {
    psoup_lora_factors here[MOST], there[MOST];
    double weights[MOST];
    size_t n;
} adapters;

static float *plain(size_t n) {
    float *x = malloc((n + 1) * sizeof *x);
    for (size_t i = 0; i < n; i++)
        do
            x[i] = noise();
        while (!(fabsf(x[i]) < 3));
    return x;
}

static void add_adapter(adapters *a, int32_t rank, int64_t out, int64_t in) {
    const size_t na = (size_t)(rank * in), nb = (size_t)(rank * out);
    psoup_lora_factors f = {.a = plain(na), .b = plain(nb), .rank = rank, .scale = 0.5f + (float)a->n};
    a->weights[a->n] = (double)(a->n % 3) * 0.4 - 0.3;
    a->here[a->n] = f;
    f.a = (const float *)(const void *)on_device(f.a, na * 4, 0);
    f.b = (const float *)(const void *)on_device(f.b, nb * 4, 0);
    a->there[a->n++] = f;
}

static void drop_adapters(adapters *a) {
    for (size_t i = 0; i < a->n; i++) {
        free((void *)(uintptr_t)a->here[i].a);
        free((void *)(uintptr_t)a->here[i].b);
        release((void *)(uintptr_t)a->there[i].a, 0);
        release((void *)(uintptr_t)a->there[i].b, 0);
    }
}

/* The bits of a host that has fused multiply-adds. */
static void check_fold(const char *what, psoup_dtype dtype, const char *got, const char *expected, size_t n) {
    if (strcmp(psoup_context_isa(host), "generic") != 0) {
        check_same(what, dtype, got, expected, n);
        return;
    }
    float *a = malloc(n * sizeof *a), *b = malloc(n * sizeof *b);
    convert(a, PSOUP_F32, got, dtype, n);
    convert(b, PSOUP_F32, expected, dtype, n);
    for (size_t i = 0; i < n; i++) {
        const float place = dtype == PSOUP_F32 || dtype == PSOUP_F64 ? 1e-5f : 0.3f;
        ck_assert_msg((isnan(a[i]) && isnan(b[i])) || a[i] == b[i] || fabsf(a[i] - b[i]) <= place * (1 + fabsf(b[i])),
                      "%s, %s: element %zu is %.9g; expected %.9g", what, psoup_dtype_name(dtype), i, (double)a[i],
                      (double)b[i]);
    }
    free(a);
    free(b);
}

/* A slice of [out, in] from (row, column) on, of tensors [rows, stride]. */
static void fold_case(const adapters *a, psoup_dtype to, psoup_dtype from, int64_t out, int64_t in, int64_t row,
                      int64_t column, int64_t rows, int64_t columns, int64_t stride, bool over) {
    sum s = {0};
    add_output(&s, to, rows, columns, stride, 0);
    add_input(&s, from, columns, stride, 0);
    psoup_merge_view *to_here = over ? &s.in[0] : &s.out, *to_there = over ? &s.in_there[0] : &s.out_there;
    const size_t which = over ? 0 : MOST;
    ck_ok(psoup_merge_fold_view(device, to_there, &s.in_there[0], row, column, out, in, a->there, a->weights, a->n,
                                &error));
    ck_ok(psoup_merge_fold_view(host, to_here, &s.in[0], row, column, out, in, a->here, a->weights, a->n, &error));
    char *got = fetched(s.there[which], s.bytes[which]);
    check_fold(over ? "over" : "fold", to, got, s.here[which], (size_t)(rows * stride));
    free(got);
    drop(&s);
}

/* _i: the dtype of the result. */
START_TEST(folds_of_any_dtype) {
    enum { OUT = 150, IN = 320 };
    const psoup_dtype to = every[_i];
    adapters a = {0};
    add_adapter(&a, 5, OUT, IN);
    add_adapter(&a, 16, OUT, IN);
    add_adapter(&a, 35, OUT, IN);
    for (int k = 0; k < EVERY; k++)
        fold_case(&a, to, every[k], OUT, IN, 3, 32, 70, 160, 192, false);
    fold_case(&a, to, to, OUT, IN, 0, 0, OUT, IN, IN, false);
    fold_case(&a, to, to, OUT, IN, 0, 0, OUT, IN, IN, true);
    if (to != PSOUP_Q8_0) { /* odd widths, odd strides */
        fold_case(&a, to, to, OUT, IN, 149, 7, 1, 131, 131, false);
        fold_case(&a, to, to, OUT, IN, 1, 1, 65, 1, 1, true);
        fold_case(&a, to, PSOUP_BF16, OUT, IN, 64, 1, 64, 127, 129, false);
    }
    drop_adapters(&a);
}
END_TEST

START_TEST(folds_of_any_number) {
    static const size_t counts[] = {0, 1, 2, 32, 33, 40};
    for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
        adapters a = {0};
        for (size_t i = 0; i < counts[k]; i++)
            add_adapter(&a, 1 + (int32_t)(i % 4), 20, 40);
        if (counts[k] == 2) { /* who is not in use may be anything */
            release((void *)(uintptr_t)a.there[0].a, 0);
            a.there[0].a = (const float *)(const void *)on_device("", 0, 0);
            a.weights[0] = 0;
        }
        fold_case(&a, PSOUP_BF16, PSOUP_BF16, 20, 40, 0, 0, 20, 40, 40, false);
        fold_case(&a, PSOUP_F16, PSOUP_F32, 20, 40, 0, 0, 20, 40, 40, false);
        for (size_t i = 0; i < a.n && counts[k] > 2; i++)
            a.weights[i] = 0;
        fold_case(&a, PSOUP_F32, PSOUP_F32, 20, 40, 0, 0, 20, 40, 40, false);
        drop_adapters(&a);
    }
}
END_TEST

/* ---- copies -------------------------------------------------------------------------------------------- */

START_TEST(copies_go_anywhere) {
    static const int64_t strides[][2] = {{96, 96}, {128, 96}, {96, 160}, {128, 160}};
    enum { ROWS = 11, COLUMNS = 96 };
    for (int k = 0; k < EVERY; k++)
        for (size_t i = 0; i < sizeof strides / sizeof *strides; i++)
            for (int way = 1; way < 4; way++) { /* 1: to the device; 2: from it; 3: there */
                sum s = {0};
                add_output(&s, every[k], ROWS, COLUMNS, strides[i][0], 0);
                add_input(&s, every[k], COLUMNS, strides[i][1], 0);
                char *before = malloc(s.bytes[0]);
                memcpy(before, s.here[0], s.bytes[0]);
                ck_ok(psoup_merge_copy(device, way == 2 ? &s.out : &s.out_there, way == 1 ? &s.in[0] : &s.in_there[0],
                                       &error));
                memset(s.here[0], 0, s.bytes[0]); /* it is the caller's again */
                char *got = way == 2 ? NULL : fetched(s.there[MOST], s.bytes[MOST]);
                const size_t row = bytes_of(every[k], COLUMNS);
                for (size_t r = 0; r < ROWS; r++) {
                    const size_t to = bytes_of(every[k], r * (size_t)strides[i][0]);
                    const size_t next = bytes_of(every[k], (r + 1) * (size_t)strides[i][0]);
                    const char *out = way == 2 ? s.here[MOST] : got;
                    ck_assert_mem_eq(out + to, before + bytes_of(every[k], r * (size_t)strides[i][1]), row);
                    if (way != 2)
                        ck_assert_mem_eq(out + to + row, s.here[MOST] + to + row, next - to - row);
                }
                free(got);
                free(before);
                drop(&s);
            }
}
END_TEST

/* Bytes at odd addresses too: what is copied need not be what is summed. */
START_TEST(copies_of_odd_bytes) {
    for (size_t shift = 0; shift < 5; shift++) {
        char *x = tensor(PSOUP_F8_E5M2, 6 * 21), *in = on_device(x, 6 * 21, shift), *out = on_device(x, 6 * 21, 0);
        psoup_merge_view to = {.data = out, .dtype = PSOUP_F8_E5M2, .place = PSOUP_MERGE_DEVICE, .rows = 6,
                               .columns = 20, .row_stride = 20}, from = to;
        from.data = in;
        from.row_stride = 21;
        ck_ok(psoup_merge_copy(device, &to, &from, &error));
        char *got = fetched(out, 120);
        for (size_t r = 0; r < 6; r++)
            ck_assert_mem_eq(got + r * 20, x + r * 21, 20);
        free(got);
        free(x);
        release(in, shift);
        release(out, 0);
    }
}
END_TEST

/* ---- streams ------------------------------------------------------------------------------------------- */

/* Without a stream of the caller's, a call waits for all streams, and has finished when it returns. */
START_TEST(without_a_stream_calls_wait) {
    psoup_context *alone = new_context("cuda", NULL);
    psoup_gpu_merge *other = NULL;
    void *current = alone;
    ck_ok(psoup_gpu_merge_create(alone, &other, &error));
    float x[100], y[100];
    for (int i = 0; i < 100; i++)
        x[i] = (float)i;
    char *there = on_device(x, sizeof x, 0); /* in `stream`, which nobody waited for */
    psoup_merge_view view = {.data = there, .place = PSOUP_MERGE_DEVICE, .rows = 1, .columns = 100}, home = view;
    home.data = y;
    home.place = PSOUP_MERGE_HOST;
    const double twice = 2;
    ck_ok(psoup_merge_views(alone, &view, &view, &twice, 1, &error));
    char *got = fetched(there, sizeof x); /* by another stream */
    for (int i = 0; i < 100; i++)
        ck_assert(((float *)(void *)got)[i] == 2 * x[i]);
    ck_ok(psoup_merge_copy(alone, &home, &view, &error));
    ck_assert_mem_eq(y, got, sizeof y);
    ck_cu(cu.context_get(&current)); /* this thread never had one */
    ck_assert_ptr_null(current);
    psoup_gpu_merge_free(other);
    ck_cu(cu.context_get(&current));
    ck_assert_ptr_null(current);
    ck_assert_int_eq(psoup_merge_views(alone, &view, &view, &twice, 1, &error), PSOUP_ERROR_STATE);
    psoup_context_free(alone);
    free(got);
    release(there, 0);
}
END_TEST

/* Captured once, a sum and a fold are made anew by each launch of the graph. */
START_TEST(calls_are_captured_in_a_graph) {
    enum { OUT = 6, IN = 10 };
    adapters a = {0};
    float x[OUT * IN], y[OUT * IN], expected[OUT * IN];
    void *graph = NULL, *exec = NULL;
    add_adapter(&a, 3, OUT, IN);
    char *base = on_device(x, sizeof x, 0), *live = on_device(x, sizeof x, 0);
    psoup_merge_view from = {.data = base, .place = PSOUP_MERGE_DEVICE, .rows = OUT, .columns = IN}, to = from;
    psoup_merge_view here = {.data = x, .rows = OUT, .columns = IN}, result = here;
    const double half = 0.5;
    to.data = live;
    ck_cu(cu.stream_wait(stream));
    ck_cu(cu.capture_begin(stream, 1));
    ck_ok(psoup_merge_fold_view(device, &to, &from, 0, 0, OUT, IN, a.there, a.weights, 1, &error));
    ck_ok(psoup_merge_views(device, &to, &to, &half, 1, &error));
    ck_cu(cu.capture_end(stream, &graph));
    ck_cu(cu.graph_instantiate(&exec, graph, 0));
    result.data = expected;
    for (int turn = 0; turn < 2; turn++) {
        for (int i = 0; i < OUT * IN; i++)
            x[i] = (float)(i + 100 * turn);
        ck_cu(cu.to_device((unsigned long long)(uintptr_t)base, x, sizeof x, stream));
        ck_cu(cu.graph_launch(exec, stream));
        ck_cu(cu.to_host(y, (unsigned long long)(uintptr_t)live, sizeof y, stream));
        ck_cu(cu.stream_wait(stream));
        ck_ok(psoup_merge_fold_view(host, &result, &here, 0, 0, OUT, IN, a.here, a.weights, 1, &error));
        ck_ok(psoup_merge_views(host, &result, &result, &half, 1, &error));
        check_fold("graph", PSOUP_F32, (char *)y, (char *)expected, OUT * IN);
    }
    ck_cu(cu.graph_exec_destroy(exec));
    ck_cu(cu.graph_destroy(graph));
    release(base, 0);
    release(live, 0);
    drop_adapters(&a);
}
END_TEST

/* ---- what is refused ----------------------------------------------------------------------------------- */

static void refused(psoup_status status, psoup_status expected, const char *words) {
    ck_assert_int_eq(status, expected);
    ck_assert_msg(strstr(error.message, words) != NULL && strchr(error.message, '\n') == NULL, "%s", error.message);
}

START_TEST(odd_addresses_are_refused) {
    char *x = on_device("", 0, 0) + 1;
    psoup_merge_view odd = {.data = x, .dtype = PSOUP_BF16, .place = PSOUP_MERGE_DEVICE, .rows = 1, .columns = 32},
                     even = odd;
    const double one = 1;
    const psoup_lora_factors f = {.a = (const float *)(const void *)x, .b = (const float *)(const void *)(x + 3),
                                  .rank = 1, .scale = 1};
    even.data = x + 511;
    refused(psoup_merge_views(device, &even, &odd, &one, 1, &error), PSOUP_ERROR_ARGUMENT,
            "psoup_merge_views: input 0 of bf16");
    refused(psoup_merge_views(device, &odd, &even, &one, 1, &error), PSOUP_ERROR_ARGUMENT,
            "expected a multiple of 2 on a GPU");
    odd.dtype = even.dtype = PSOUP_Q8_0;
    refused(psoup_merge_views(device, &even, &odd, &one, 1, &error), PSOUP_ERROR_ARGUMENT, "input 0 of q8_0");
    refused(psoup_merge_fold_view(device, &even, &odd, 0, 0, 1, 32, &f, &one, 1, &error), PSOUP_ERROR_ARGUMENT,
            "psoup_merge_fold_view: base 0 of q8_0");
    refused(psoup_merge_fold_view(device, &even, &even, 0, 0, 1, 32, &f, &one, 1, &error), PSOUP_ERROR_ARGUMENT,
            "A of factors 0 of f32");
    release(x, 1);
}
END_TEST

/* A call that the driver refuses says so once; the next is another. */
START_TEST(a_failure_is_told_once) {
    static float home[8];
    char *there = on_device(home, sizeof home, 0);
    psoup_merge_view view = {.data = there, .place = PSOUP_MERGE_DEVICE, .rows = 1, .columns = 8}, out = view;
    const double one = 1;
    out.data = home;
    out.place = PSOUP_MERGE_HOST;
    ck_cu(cu.capture_begin(stream, 1)); /* waiting is forbidden while a stream is captured */
    refused(psoup_merge_copy(device, &out, &view, &error), PSOUP_ERROR_STATE, "GPU: the work before");
    void *graph;
    ck_cu(cu.capture_end(stream, &graph));
    ck_cu(cu.graph_destroy(graph));
    ck_ok(psoup_merge_copy(device, &out, &view, &error));
    ck_ok(psoup_merge_views(device, &view, &view, &one, 1, &error));
    release(there, 0);
}
END_TEST

START_TEST(no_device_is_refused) {
    psoup_gpu_merge *none = merge, *second = NULL;
    refused(psoup_gpu_merge_create(NULL, &none, &error), PSOUP_ERROR_ARGUMENT, "context is NULL");
    ck_assert_ptr_null(none);
    refused(psoup_gpu_merge_create(host, &none, &error), PSOUP_ERROR_ARGUMENT, "the context's device is the CPU");
    psoup_context *seventh = new_context("cuda:7", NULL);
    refused(psoup_gpu_merge_create(seventh, &none, &error), PSOUP_ERROR_ARGUMENT,
            "no GPU: device cuda:7 is asked for, there are 1");
    ck_assert_ptr_null(none);
    psoup_context_free(seventh);
    psoup_gpu_merge_free(NULL);
    /* A second takes the first's place, which may go. */
    ck_ok(psoup_gpu_merge_create(device, &second, &error));
    psoup_gpu_merge_free(merge);
    merge = second;
    char *x = on_device("", 0, 0);
    psoup_merge_view view = {.data = x, .place = PSOUP_MERGE_DEVICE};
    ck_ok(psoup_merge_views(device, &view, NULL, NULL, 0, &error));
    release(x, 0);
}
END_TEST

/* _i: how many allocations on the device succeed. */
START_TEST(no_memory_is_told) {
    psoup_gpu_merge *none = merge;
    setenv("PSOUP_HOST_FAIL_ALLOC", _i == 0 ? "1" : "2", 1);
    open_driver();
    device = new_context("cuda", NULL);
    refused(psoup_gpu_merge_create(device, &none, &error), PSOUP_ERROR_MEMORY,
            _i == 0 ? "out of GPU memory: " : "GPU: staging memory: out of memory");
    ck_assert_ptr_null(none);
    psoup_context_free(device);
    psoup_context_free(host);
}
END_TEST

/* In a process whose libcuda.so.1 is none: this program again, told where to look. */
START_TEST(no_driver_is_told) {
    char directory[] = "/tmp/psoup-gpu-XXXXXX", path[64];
    ck_assert_ptr_nonnull(mkdtemp(directory));
    snprintf(path, sizeof path, "%s/libcuda.so.1", directory);
    FILE *file = fopen(path, "w");
    ck_assert(file != NULL && fputs("not a library", file) > 0 && fclose(file) == 0);
    pid_t child = fork();
    if (child == 0) {
        setenv("LD_LIBRARY_PATH", directory, 1);
        execl("/proc/self/exe", "test_gpu_merge", "--no-driver", (char *)NULL);
        _exit(2);
    }
    int status = -1;
    ck_assert(waitpid(child, &status, 0) == child);
    unlink(path);
    rmdir(directory);
    ck_assert_msg(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with %d", status);
}
END_TEST

static int without_driver(void) {
    psoup_gpu_merge *none;
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.device = "cuda";
    if (psoup_context_create(&options, &device, &error) != PSOUP_OK)
        return 3;
    const psoup_status status = psoup_gpu_merge_create(device, &none, &error);
    psoup_context_free(device);
    return status == PSOUP_ERROR_UNSUPPORTED && none == NULL &&
                   strstr(error.message, "no GPU: NVIDIA's driver is not here (") == error.message &&
                   strchr(error.message, '\n') == NULL
               ? 0
               : 1;
}

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "--no-driver") == 0)
        return without_driver();
    Suite *suite = suite_create("merging on a GPU");
    TCase *all = tcase_create("views"), *bare = tcase_create("opening");
    tcase_set_timeout(all, 240);
    tcase_set_timeout(bare, 60);
    tcase_add_checked_fixture(all, set_up, tear_down);
    tcase_add_loop_test(all, sums_of_any_dtypes, 0, EVERY);
    tcase_add_loop_test(all, sums_of_one_dtype, 0, 3);
    tcase_add_test(all, sums_of_any_number);
    tcase_add_test(all, a_weight_of_zero_skips_its_input);
    tcase_add_test(all, sums_in_place);
    tcase_add_loop_test(all, folds_of_any_dtype, 0, EVERY);
    tcase_add_test(all, folds_of_any_number);
    tcase_add_test(all, copies_go_anywhere);
    tcase_add_test(all, copies_of_odd_bytes);
    tcase_add_test(all, without_a_stream_calls_wait);
    tcase_add_test(all, calls_are_captured_in_a_graph);
    tcase_add_test(all, odd_addresses_are_refused);
    tcase_add_test(all, a_failure_is_told_once);
    tcase_add_test(all, no_device_is_refused);
    tcase_add_loop_test(bare, no_memory_is_told, 0, 2);
    tcase_add_test(bare, no_driver_is_told);
    suite_add_tcase(suite, all);
    suite_add_tcase(suite, bare);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
