/* Weighted sums: f32 accumulation in the order of the inputs, one rounding at the end. */
#include "blend/blend.h"

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

enum {
    CHUNK = 2048,  /* floats that stay in the first cache; whole blocks of q8_0 */
    PIECE = 65536, /* elements of one task; whole blocks too */
    STREAM_FROM = 8 << 20 /* bytes of output that no cache is counted on to hold until it is read */
};

static const struct {
    psoup__merge_add_fn add;
    psoup__merge_within_fn within;
    psoup__merge_sum_fn sum;
} kernels[PSOUP__ISA_COUNT] = {
    [PSOUP__ISA_GENERIC] = {psoup__merge_add_generic, psoup__merge_within_generic,
                            psoup__merge_sum_run_generic},
#ifdef __x86_64__
    [PSOUP__ISA_AVX2] = {psoup__merge_add_avx2, psoup__merge_within_avx2, psoup__merge_sum_run_avx2},
    [PSOUP__ISA_AVX512] = {psoup__merge_add_avx512, psoup__merge_within_avx512,
                           psoup__merge_sum_run_avx512},
#endif
};

static bool is_small_float(psoup_dtype dtype) {
    return dtype == PSOUP_F32 || dtype == PSOUP_F16 || dtype == PSOUP_BF16;
}

typedef struct job {
    psoup_context *context;
    const psoup__sum_args *args;
    size_t pieces, rows; /* pieces of a row; rows of a task */
    bool fused, stream;
    float limit;
    atomic_bool bad;
} job;

/* Bytes of elements that are whole blocks, as the caller has checked. */
static size_t bytes_of(psoup_dtype dtype, size_t elements) {
    size_t bytes = 0;
    psoup__dtype_bytes(dtype, elements, &bytes);
    return bytes;
}

/* n elements from `at` of a row, all inputs in registers. */
static void sum_fused(job *j, size_t row, size_t at, size_t n) {
    const psoup__sum_args *args = j->args;
    const void *in[PSOUP__SUM_INPUTS];
    psoup_dtype dtypes[PSOUP__SUM_INPUTS];
    float weights[PSOUP__SUM_INPUTS];
    psoup__sum_run run = {.out_dtype = args->out_dtype, .in = in, .dtypes = dtypes,
                          .weights = weights, .n = n, .limit = j->limit, .stream = j->stream};
    run.out = (char *)args->out + (row * args->out_stride + at) * psoup_dtype_size(args->out_dtype);
    for (size_t i = 0; i < args->count; i++) {
        if (args->weights[i] == 0)
            continue;
        size_t first = (row > 0 ? row * args->strides[i] : 0) + at;
        in[run.count] = (const char *)args->in[i] + first * psoup_dtype_size(args->dtypes[i]);
        dtypes[run.count] = args->dtypes[i];
        weights[run.count++] = (float)args->weights[i];
    }
    if (!kernels[psoup__isa_of(j->context)].sum(&run))
        atomic_store(&j->bad, true);
}

/* The same with sums in a cache, for any dtypes and any number of inputs. */
static void sum_chunks(job *j, size_t row, size_t begin, size_t length) {
    const psoup__sum_args *args = j->args;
    psoup__isa isa = psoup__isa_of(j->context);
    float acc[CHUNK], input[CHUNK];
    for (size_t at = begin; at < begin + length; at += CHUNK) {
        size_t n = begin + length - at < CHUNK ? begin + length - at : CHUNK;
        bool first = true;
        for (size_t i = 0; i < args->count; i++) {
            if (args->weights[i] == 0)
                continue;
            psoup_dtype dtype = args->dtypes[i];
            const char *in = (const char *)args->in[i] +
                             bytes_of(dtype, (row > 0 ? row * args->strides[i] : 0) + at);
            psoup__to_f32(j->context, input, in, dtype, n);
            kernels[isa].add(acc, input, (float)args->weights[i], n, first);
            first = false;
        }
        if (first)
            memset(acc, 0, n * sizeof *acc);
        if (!kernels[isa].within(acc, j->limit, n))
            atomic_store(&j->bad, true);
        psoup__from_f32(j->context,
                        (char *)args->out + bytes_of(args->out_dtype, row * args->out_stride + at),
                        args->out_dtype, acc, n);
    }
}

static void sum_task(void *arg, size_t task, int worker) {
    job *j = arg;
    const psoup__sum_args *args = j->args;
    size_t begin = task % j->pieces * PIECE, n = args->n - begin < PIECE ? args->n - begin : PIECE;
    size_t row = task / j->pieces * j->rows;
    size_t end = args->rows - row < j->rows ? args->rows : row + j->rows;
    (void)worker;
    for (; row < end; row++)
        (j->fused ? sum_fused : sum_chunks)(j, row, begin, n);
}

bool psoup__sum(psoup_context *context, const psoup__sum_args *given) {
    psoup__sum_args args = *given;
    size_t used = 0, bytes;
    args.rows = args.rows > 1 ? args.rows : 1;
    if (args.n == 0)
        return true;
    job j = {.context = context, .args = &args, .limit = psoup__dtype_largest(args.out_dtype)};
    j.fused = is_small_float(args.out_dtype);
    for (size_t i = 0; i < args.count; i++)
        if (args.weights[i] != 0) {
            used++;
            j.fused &= is_small_float(args.dtypes[i]);
        }
    j.fused &= used >= 1 && used <= PSOUP__SUM_INPUTS;
    j.stream = args.stream && psoup__multiply(args.n * args.rows, psoup_dtype_size(args.out_dtype), &bytes) &&
               bytes >= STREAM_FROM;
    j.pieces = (args.n - 1) / PIECE + 1;
    j.rows = args.n < PIECE ? PIECE / args.n : 1;
    atomic_init(&j.bad, false);
    psoup__parallel(context, ((args.rows - 1) / j.rows + 1) * j.pieces, sum_task, &j);
    return !atomic_load(&j.bad);
}

bool psoup__merge_finite(psoup_context *context, const float *x, size_t n, psoup_dtype dtype) {
    return kernels[psoup__isa_of(context)].within(x, psoup__dtype_largest(dtype), n);
}

psoup_status psoup__merge_check_weights(const double *weights, size_t n, bool any_sum,
                                        psoup_error *error) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(weights[i]) || fabs(weights[i]) > (double)FLT_MAX)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "weight %zu is %g; expected a finite number", i, weights[i]);
        sum += weights[i];
    }
    if (!any_sum && fabs(sum - 1) > 1e-6)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "the weights sum to %.9g; expected 1 (any_sum allows another)", sum);
    return PSOUP_OK;
}

psoup_status psoup_merge_sum(psoup_context *context, void *out, psoup_dtype out_dtype,
                             const void *const *in, psoup_dtype in_dtype, const double *weights,
                             size_t count, size_t n, psoup_error *error) {
    size_t bytes;
    if (!is_small_float(in_dtype) || !is_small_float(out_dtype))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merge_sum: dtypes %s to %s; expected f32, f16 or bf16",
                           psoup_dtype_name(in_dtype), psoup_dtype_name(out_dtype));
    if (context == NULL || (n > 0 && out == NULL) || (count > 0 && (in == NULL || weights == NULL)) ||
        !psoup__multiply(n, sizeof(float), &bytes))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merge_sum: context, out, in or weights is NULL, or n is too large");
    psoup_status status = psoup__merge_check_weights(weights, count, true, error);
    if (status != PSOUP_OK || n == 0)
        return status;
    bool in_place = false;
    for (size_t i = 0; i < count; i++) {
        in_place |= in[i] == out;
        if (in[i] == NULL && weights[i] != 0)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_merge_sum: input %zu is NULL", i);
    }
    if (in_place && in_dtype != out_dtype)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merge_sum: the output is an input of another dtype");
    psoup_dtype *dtypes = psoup__alloc(context, count, sizeof *dtypes, error);
    if (dtypes == NULL)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < count; i++)
        dtypes[i] = in_dtype;
    const psoup__sum_args args = {.out = out, .out_dtype = out_dtype, .in = in, .dtypes = dtypes,
                                  .weights = weights, .count = count, .n = n, .stream = !in_place};
    psoup__sum(context, &args); /* the caller's NaNs are the caller's */
    psoup__free(context, dtypes);
    return PSOUP_OK;
}
