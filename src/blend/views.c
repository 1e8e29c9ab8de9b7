/* Merging slices that the caller holds, in memory or on a device: checks, then sum.c and fold.c, or the
 * device's table. */
#include "blend/blend.h"

#include <string.h>

/* What a view covers. */
typedef struct extent {
    uintptr_t begin;
    size_t bytes;        /* from its first to its last byte */
    size_t row, stride;  /* bytes of a row, and from row to row */
} extent;

static int64_t stride_of(const psoup_merge_view *view) {
    return view->row_stride > 0 ? view->row_stride : view->columns;
}

static psoup_status check_view(const char *who, const char *what, size_t index, const psoup_merge_view *v,
                               extent *out, psoup_error *error) {
    const psoup_dtype dtype = (psoup_dtype)v->dtype;
    size_t whole = 0;
    bool fits = v->rows >= 0 && v->columns >= 0 && v->row_stride >= 0 &&
                (v->rows <= 1 || stride_of(v) >= v->columns);
    *out = (extent){.begin = (uintptr_t)v->data};
    if (!psoup__dtype_is_float(dtype))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: %s %zu is %s; expected floats", who, what, index,
                           psoup_dtype_name(dtype));
    if (fits && v->rows > 0 && v->columns > 0) {
        size_t before = 0;
        fits = psoup__dtype_bytes(dtype, (size_t)v->columns, &out->row) &&
               psoup__dtype_bytes(dtype, (size_t)stride_of(v), &out->stride) &&
               psoup__multiply((size_t)v->rows - 1, out->stride, &before) &&
               psoup__add(before, out->row, &whole) && whole <= UINTPTR_MAX - out->begin;
        if (fits && v->data == NULL)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: %s %zu is NULL", who, what, index);
    }
    if (!fits)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: %s %zu is %lld × %lld, %lld apart; expected sizes of at least 0 that fit, rows "
                           "that do not overlap, and whole blocks of q8_0",
                           who, what, index, (long long)v->rows, (long long)v->columns,
                           (long long)v->row_stride);
    if (v->place != PSOUP_MERGE_HOST && v->place != PSOUP_MERGE_DEVICE)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: %s %zu: place %d; expected host or device", who,
                           what, index, (int)v->place);
    if (!psoup__all_zero(v->reserved, sizeof v->reserved))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: %s %zu: reserved is not 0", who, what, index);
    out->bytes = whole;
    return PSOUP_OK;
}

/* Whether two views have a byte in common. Columns of one matrix, side by side, have none. */
static bool overlap(const extent *a, const extent *b) {
    if (a->begin > b->begin) {
        const extent *swap = a;
        a = b;
        b = swap;
    }
    const size_t apart = b->begin - a->begin;
    if (a->bytes == 0 || b->bytes == 0 || apart >= a->bytes)
        return false;
    if (a->bytes == a->row || (b->bytes != b->row && a->stride != b->stride))
        return true;
    const size_t shift = apart % a->stride;
    return shift < a->row || shift + b->row > a->stride;
}

/* Whether the output may be written over this input: the same elements in the same order. */
static bool in_place(const psoup_merge_view *out, const psoup_merge_view *in) {
    return out->data == in->data && out->dtype == in->dtype &&
           (out->rows <= 1 || stride_of(out) == stride_of(in));
}

/* Input `index` beside the output: shape, place, overlap. */
static psoup_status check_pair(const char *who, const char *what, size_t index, const psoup_merge_view *out,
                               const extent *there, const psoup_merge_view *in, bool *over,
                               psoup_error *error) {
    psoup_status status;
    extent here;
    PSOUP__TRY(check_view(who, what, index, in, &here, error));
    if (in->rows != out->rows || in->columns != out->columns)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: %s %zu is %lld × %lld; expected %lld × %lld", who,
                           what, index, (long long)in->rows, (long long)in->columns, (long long)out->rows,
                           (long long)out->columns);
    if (in->place != out->place)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: %s %zu is not where the output is; psoup_merge_copy brings it there", who,
                           what, index);
    if (overlap(there, &here)) {
        if (!in_place(out, in))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: %s %zu overlaps the output without being the same view of the same dtype",
                               who, what, index);
        *over = true;
    }
    return PSOUP_OK;
fail:
    return status;
}

/* The context's table where the output is on a device. */
static psoup_status device_of(const char *who, const psoup_context *context, const psoup_merge_view *out,
                              const psoup_merge_device **device, psoup_error *error) {
    *device = NULL;
    if (out->place == PSOUP_MERGE_HOST)
        return PSOUP_OK;
    *device = context->merge_device;
    if (*device == NULL)
        return psoup__fail(error, PSOUP_ERROR_STATE,
                           "%s: the output is on a device and the context has none (psoup_merge_set_device)",
                           who);
    return PSOUP_OK;
}

psoup_status psoup_merge_set_device(psoup_context *context, const psoup_merge_device *device,
                                    psoup_error *error) {
    psoup_status status;
    psoup_merge_device table = {0}, *copy = NULL;
    if (context == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_merge_set_device: context is NULL");
    if (device != NULL) {
        PSOUP__TRY(psoup__options(&table, sizeof table, device, "psoup_merge_device", error));
        if (table.sum == NULL || table.fold == NULL || table.copy == NULL)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "psoup_merge_set_device: expected sum, fold and copy");
        if ((copy = psoup__alloc(context, 1, sizeof *copy, error)) == NULL)
            return PSOUP_ERROR_MEMORY;
        *copy = table;
    }
    psoup__free(context, context->merge_device);
    context->merge_device = copy;
    return PSOUP_OK;
fail:
    return status;
}

/* ---- sums ------------------------------------------------------------------------------------------ */

static psoup_status sum_here(psoup_context *context, const psoup_merge_view *out, const psoup_merge_view *in,
                             const double *weights, size_t count, bool over, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    bool whole = stride_of(out) == out->columns;
    size_t *strides = NULL;
    const void **data = psoup__alloc(context, count, sizeof *data, error);
    psoup_dtype *dtypes = psoup__alloc(context, count, sizeof *dtypes, error);
    strides = psoup__alloc(context, count, sizeof *strides, error);
    if (data == NULL || dtypes == NULL || strides == NULL)
        goto fail;
    for (size_t i = 0; i < count; i++) {
        data[i] = in[i].data;
        dtypes[i] = (psoup_dtype)in[i].dtype;
        strides[i] = (size_t)stride_of(&in[i]);
        whole &= weights[i] == 0 || stride_of(&in[i]) == in[i].columns;
    }
    psoup__sum_args args = {.out = out->data, .out_dtype = (psoup_dtype)out->dtype, .in = data,
                            .dtypes = dtypes, .weights = weights, .count = count,
                            .n = (size_t)out->columns, .stream = !over, .rows = (size_t)out->rows,
                            .out_stride = (size_t)stride_of(out), .strides = strides};
    if (whole) {
        args.n *= args.rows;
        args.rows = 1;
    }
    if (out->rows > 0)
        psoup__sum(context, &args); /* the caller's NaNs are the caller's */
    status = PSOUP_OK;
fail:
    psoup__free(context, data);
    psoup__free(context, dtypes);
    psoup__free(context, strides);
    return status;
}

psoup_status psoup_merge_views(psoup_context *context, const psoup_merge_view *out,
                               const psoup_merge_view *in, const double *weights, size_t count,
                               psoup_error *error) {
    psoup_status status;
    const char *who = "psoup_merge_views";
    const psoup_merge_device *device;
    extent there;
    bool over = false;
    if (context == NULL || out == NULL || (count > 0 && (in == NULL || weights == NULL)))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: context, out, in or weights is NULL", who);
    PSOUP__TRY(psoup__merge_check_weights(weights, count, true, error));
    PSOUP__TRY(check_view(who, "the output", 0, out, &there, error));
    for (size_t i = 0; i < count; i++)
        if (weights[i] != 0)
            PSOUP__TRY(check_pair(who, "input", i, out, &there, &in[i], &over, error));
    PSOUP__TRY(device_of(who, context, out, &device, error));
    if (device != NULL)
        return device->sum(device->user, out, in, weights, count, error);
    return sum_here(context, out, in, weights, count, over, error);
fail:
    return status;
}

/* ---- folds ----------------------------------------------------------------------------------------- */

static bool is_small_float(int32_t dtype) {
    return dtype == PSOUP_F32 || dtype == PSOUP_F16 || dtype == PSOUP_BF16;
}

/* Of dtypes that the fold's kernels do not read or write: by blocks of rows in f32. */
static psoup_status fold_blocks(psoup_context *context, const psoup_merge_view *out,
                                const psoup_merge_view *base, psoup__fold_args args, psoup_error *error) {
    const int64_t block = psoup__fold_block(out->rows, out->columns);
    const size_t columns = (size_t)out->columns, first_row = (size_t)args.first_row;
    float *acc = psoup__alloc(context, (size_t)block * columns, sizeof *acc, error);
    if (acc == NULL)
        return PSOUP_ERROR_MEMORY;
    args.out = acc;
    args.base = acc;
    args.out_dtype = args.base_dtype = PSOUP_F32;
    args.out_stride = args.base_stride = columns;
    for (int64_t row = 0; row < out->rows; row += block) {
        size_t from = 0, to = 0;
        args.rows = out->rows - row < block ? out->rows - row : block;
        args.first_row = (int64_t)(first_row + (size_t)row);
        for (int64_t i = 0; i < args.rows; i++) {
            psoup__dtype_bytes((psoup_dtype)base->dtype, (size_t)((row + i) * stride_of(base)), &from);
            psoup__to_f32(context, acc + (size_t)i * columns, (const char *)base->data + from,
                          (psoup_dtype)base->dtype, columns);
        }
        psoup__fold(context, &args);
        for (int64_t i = 0; i < args.rows; i++) {
            psoup__dtype_bytes((psoup_dtype)out->dtype, (size_t)((row + i) * stride_of(out)), &to);
            psoup__from_f32(context, (char *)out->data + to, (psoup_dtype)out->dtype,
                            acc + (size_t)i * columns, columns);
        }
    }
    psoup__free(context, acc);
    return PSOUP_OK;
}

psoup_status psoup_merge_fold_view(psoup_context *context, const psoup_merge_view *out,
                                   const psoup_merge_view *base, int64_t first_row, int64_t first_column,
                                   int64_t out_features, int64_t in_features,
                                   const psoup_lora_factors *factors, const double *weights, size_t count,
                                   psoup_error *error) {
    psoup_status status;
    const char *who = "psoup_merge_fold_view";
    const psoup_merge_device *device;
    extent there;
    bool over = false;
    if (out == NULL || base == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: out or base is NULL", who);
    PSOUP__TRY(psoup__lora_check(who, context, out_features, in_features, factors, weights, count, error));
    PSOUP__TRY(check_view(who, "the output", 0, out, &there, error));
    PSOUP__TRY(check_pair(who, "the base", 0, out, &there, base, &over, error));
    if (first_row < 0 || first_column < 0 || out->rows > out_features - first_row ||
        out->columns > in_features - first_column)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: %lld × %lld from row %lld and column %lld on; expected a part of %lld × %lld",
                           who, (long long)out->rows, (long long)out->columns, (long long)first_row,
                           (long long)first_column, (long long)out_features, (long long)in_features);
    PSOUP__TRY(device_of(who, context, out, &device, error));
    if (device != NULL)
        return device->fold(device->user, out, base, first_row, first_column, in_features, factors, weights,
                            count, error);
    const psoup__fold_args args = {.out = out->data, .base = base->data,
                                   .out_dtype = (psoup_dtype)out->dtype,
                                   .base_dtype = (psoup_dtype)base->dtype,
                                   .out_stride = (size_t)stride_of(out),
                                   .base_stride = (size_t)stride_of(base), .rows = out->rows,
                                   .columns = out->columns, .first_row = first_row,
                                   .first_column = first_column, .in = in_features, .factors = factors,
                                   .weights = weights, .count = count, .stream = !over};
    if (!is_small_float(out->dtype) || !is_small_float(base->dtype))
        return fold_blocks(context, out, base, args, error);
    psoup__fold(context, &args);
    return PSOUP_OK;
fail:
    return status;
}

/* ---- copies ---------------------------------------------------------------------------------------- */

psoup_status psoup_merge_copy(psoup_context *context, const psoup_merge_view *out,
                              const psoup_merge_view *in, psoup_error *error) {
    psoup_status status;
    const char *who = "psoup_merge_copy";
    extent there, here;
    if (context == NULL || out == NULL || in == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: context, out or in is NULL", who);
    PSOUP__TRY(check_view(who, "the output", 0, out, &there, error));
    PSOUP__TRY(check_view(who, "the input", 0, in, &here, error));
    if (in->rows != out->rows || in->columns != out->columns || in->dtype != out->dtype)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: expected one shape and one dtype", who);
    if (in->place == out->place && overlap(&there, &here))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: the views overlap", who);
    if (in->place == PSOUP_MERGE_DEVICE || out->place == PSOUP_MERGE_DEVICE) {
        if (context->merge_device == NULL)
            return psoup__fail(error, PSOUP_ERROR_STATE,
                               "%s: the context has no device (psoup_merge_set_device)", who);
        return context->merge_device->copy(context->merge_device->user, out, in, error);
    }
    for (int64_t row = 0; row < out->rows && there.row > 0; row++)
        memcpy((char *)out->data + (size_t)row * there.stride, (const char *)in->data + (size_t)row * here.stride,
               there.row);
    return PSOUP_OK;
fail:
    return status;
}
