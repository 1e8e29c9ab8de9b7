/* LoRA factors folded into a weight in the caller's memory.
 *
 * The adapters' factors are one product: [w_1 s_1 B_1 … w_n s_n B_n] [A_1; …; A_n], of depth Σ rank. Every
 * element starts from the base and takes its depths in ascending order, adapter after adapter: the bits
 * of one product per adapter, whatever the threads and the blocks. */
#include "blend/blend.h"

#include <math.h>
#include <string.h>

enum {
    TASK_ROWS = 192,      /* of one task: how often a panel of A is used once it is packed */
    TASK_COLUMNS = 1024,
    DEPTH = PSOUP__FOLD_DEPTH, /* two panels [64, 64] lie in a first cache, 192 rows of B in a second */
    STREAM_FROM = 8 << 20 /* bytes of output that no cache is counted on to hold until it is read */
};

static const psoup__fold_kernels *kernels_of(psoup_context *context) {
#ifdef __x86_64__
    if (psoup__isa_of(context) == PSOUP__ISA_AVX512)
        return &psoup__fold_kernels_avx512;
    if (psoup__isa_of(context) == PSOUP__ISA_AVX2)
        return &psoup__fold_kernels_avx2;
#endif
    return &psoup__fold_kernels_generic;
}

typedef struct job {
    const psoup__fold_args *args;
    const psoup__fold_kernels *kernel;
    int64_t depth; /* Σ rank of the adapters in use */
    size_t across; /* tasks along the columns */
    bool stream;
} job;

/* Where a walk over the depths of all adapters in use stands: at depth k of adapter i. */
typedef struct place {
    size_t i;
    int64_t k;
} place;

/* The next adapter in use that has depths left; how many of them, at most `most`. */
static int64_t next_run(const psoup__fold_args *args, place *at, int64_t most) {
    while (args->weights[at->i] == 0 || at->k == args->factors[at->i].rank) {
        at->i++;
        at->k = 0;
    }
    int64_t left = args->factors[at->i].rank - at->k;
    return left < most ? left : most;
}

/* b[rows, DEPTH] = w s B of `depth` depths from *at on. */
static void scale_b(const psoup__fold_args *args, place at, int64_t row, int64_t rows, int64_t depth,
                    float *b) {
    for (int64_t done = 0, n; done < depth; done += n, at.k += n) {
        n = next_run(args, &at, depth - done);
        const psoup_lora_factors *f = &args->factors[at.i];
        const float w = (float)(args->weights[at.i] * (double)f->scale);
        for (int64_t i = 0; i < rows; i++) {
            const float *from = f->b + (args->first_row + row + i) * f->rank + at.k;
            for (int64_t k = 0; k < n; k++)
                b[i * DEPTH + done + k] = from[k] * w;
        }
    }
}

static void pack_a(const job *j, place *at, int64_t column, int64_t columns, int64_t depth, float *a) {
    const psoup__fold_args *args = j->args;
    for (int64_t done = 0, n; done < depth; done += n, at->k += n) {
        n = next_run(args, at, depth - done);
        const float *from = args->factors[at->i].a + at->k * args->in + args->first_column + column;
        j->kernel->pack(a, from, args->in, done, n, depth, columns);
    }
}

static void fold_task(void *arg, size_t task, int worker) {
    const job *j = arg;
    const psoup__fold_args *args = j->args;
    const int64_t row = (int64_t)(task / j->across) * TASK_ROWS;
    const int64_t begin = (int64_t)(task % j->across) * TASK_COLUMNS;
    const int64_t end = begin + TASK_COLUMNS < args->columns ? begin + TASK_COLUMNS : args->columns;
    const int64_t rows = args->rows - row < TASK_ROWS ? args->rows - row : TASK_ROWS;
    const size_t in_size = psoup_dtype_size(args->base_dtype), out_size = psoup_dtype_size(args->out_dtype);
    float a[DEPTH * PSOUP__FOLD_COLUMNS], b[TASK_ROWS * DEPTH], sums[TASK_ROWS * PSOUP__FOLD_COLUMNS];
    (void)worker;
    for (int64_t column = begin; column < end; column += PSOUP__FOLD_COLUMNS) {
        place at = {0};
        for (int64_t done = 0; done < j->depth; done += DEPTH) {
            const int64_t depth = j->depth - done < DEPTH ? j->depth - done : DEPTH;
            const bool first = done == 0, last = done + depth == j->depth;
            psoup__fold_strip strip = {.rows = rows, .depth = depth, .a = a, .b = b};
            strip.columns = end - column < PSOUP__FOLD_COLUMNS ? end - column : PSOUP__FOLD_COLUMNS;
            if (column == begin || j->depth > DEPTH)
                scale_b(args, at, row, rows, depth, b);
            pack_a(j, &at, column, strip.columns, depth, a);
            strip.in = (const char *)sums; /* between steps the sums stay in f32 */
            strip.out = (char *)sums;
            strip.in_dtype = strip.out_dtype = PSOUP_F32;
            strip.in_stride = strip.out_stride = PSOUP__FOLD_COLUMNS * sizeof *sums;
            if (first) {
                strip.in = (const char *)args->base +
                           ((size_t)row * args->base_stride + (size_t)column) * in_size;
                strip.in_dtype = args->base_dtype;
                strip.in_stride = (int64_t)(args->base_stride * in_size);
            }
            if (last) {
                strip.out = (char *)args->out +
                            ((size_t)row * args->out_stride + (size_t)column) * out_size;
                strip.out_dtype = args->out_dtype;
                strip.out_stride = (int64_t)(args->out_stride * out_size);
                strip.stream = j->stream;
            }
            j->kernel->strip(&strip);
        }
    }
}

void psoup__fold(psoup_context *context, const psoup__fold_args *args) {
    job j = {.args = args, .kernel = kernels_of(context)};
    for (size_t i = 0; i < args->count; i++)
        j.depth += args->weights[i] != 0 ? args->factors[i].rank : 0;
    if (args->rows <= 0 || args->columns <= 0)
        return;
    if (j.depth == 0) { /* the base, converted */
        const double one = 1;
        const size_t stride = args->base_stride;
        const psoup__sum_args copy = {.out = args->out, .out_dtype = args->out_dtype, .in = &args->base,
                                      .dtypes = &args->base_dtype, .weights = &one, .count = 1,
                                      .n = (size_t)args->columns, .rows = (size_t)args->rows,
                                      .out_stride = args->out_stride, .strides = &stride};
        if (args->out != args->base)
            psoup__sum(context, &copy);
        return;
    }
    size_t out_size = psoup_dtype_size(args->out_dtype);
    j.stream = args->stream && args->out_dtype == PSOUP_BF16 && args->out != args->base &&
               (uintptr_t)args->out % 64 == 0 && args->out_stride * out_size % 64 == 0 &&
               (size_t)args->rows >= STREAM_FROM / out_size / (size_t)args->columns;
    j.across = (size_t)((args->columns - 1) / TASK_COLUMNS + 1);
    psoup__parallel(context, (size_t)((args->rows - 1) / TASK_ROWS + 1) * j.across, fold_task, &j);
}

/* ---- blocks of rows --------------------------------------------------------------------------- */

#define BLOCK_FLOATS (1 << 20)

int64_t psoup__fold_block(int64_t out, int64_t in) {
    int64_t rows = in > 0 ? BLOCK_FLOATS / in : out;
    return rows < 1 ? 1 : rows < out ? rows : out > 0 ? out : 1;
}

void psoup__fold_into(psoup_context *context, float *acc, int64_t first, int64_t rows, int64_t in,
                      const psoup_lora_factors *factors, const double *weights, size_t count) {
    const psoup__fold_args args = {.out = acc, .base = acc, .out_dtype = PSOUP_F32, .base_dtype = PSOUP_F32,
                                   .out_stride = (size_t)in, .base_stride = (size_t)in, .rows = rows,
                                   .columns = in, .in = in, .first_row = first, .factors = factors,
                                   .weights = weights, .count = count};
    psoup__fold(context, &args);
}

void psoup__fold_rows(psoup_context *context, float *acc, const void *base, psoup_dtype dtype,
                      int64_t first, int64_t rows, int64_t in, const psoup_lora_factors *factors,
                      const double *weights, size_t count) {
    size_t at = 0;
    psoup__dtype_bytes(dtype, (size_t)first * (size_t)in, &at);
    psoup__to_f32(context, acc, (const char *)base + at, dtype, (size_t)rows * (size_t)in);
    psoup__fold_into(context, acc, first, rows, in, factors, weights, count);
}

/* ---- the public call --------------------------------------------------------------------------- */

psoup_status psoup_merge_fold(psoup_context *context, void *out, const void *base,
                              psoup_dtype dtype, int64_t out_features, int64_t in_features,
                              const psoup_lora_factors *factors, const double *weights,
                              size_t count, psoup_error *error) {
    psoup_status status;
    PSOUP__TRY(psoup__lora_check("psoup_merge_fold", context, out_features, in_features, factors,
                                 weights, count, error));
    if ((dtype != PSOUP_F32 && dtype != PSOUP_F16 && dtype != PSOUP_BF16) || out == NULL ||
        base == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merge_fold: dtype %s; expected out, base, and f32, f16 or bf16",
                           psoup_dtype_name(dtype));
    const psoup__fold_args args = {.out = out, .base = base, .out_dtype = dtype, .base_dtype = dtype,
                                   .out_stride = (size_t)in_features, .base_stride = (size_t)in_features,
                                   .rows = out_features, .columns = in_features, .in = in_features,
                                   .factors = factors, .weights = weights, .count = count, .stream = true};
    psoup__fold(context, &args);
    return PSOUP_OK;
fail:
    return status;
}
