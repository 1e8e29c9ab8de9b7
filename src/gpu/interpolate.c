/* Sums, folds and copies of views, as launches: see cuda/interpolate.h. */
#include "gpu/interpolate.h"

#include <string.h>

static const char who_sums[] = "psoup_merge_views", who_folds[] = "psoup_merge_fold_view";
enum { WAVES = 32 }; /* blocks for each multiprocessor: more, and they walk on */

static uint64_t bytes_of(int32_t dtype, uint64_t elements) {
    size_t bytes = 0;
    psoup__dtype_bytes((psoup_dtype)dtype, elements, &bytes); /* has been checked */
    return bytes;
}

static uint64_t stride_of(const psoup_merge_view *view) {
    return (uint64_t)(view->row_stride > 0 ? view->row_stride : view->columns);
}

static uint64_t stride_bytes(const psoup_merge_view *view) {
    return view->rows > 1 ? bytes_of(view->dtype, stride_of(view)) : 0;
}

/* The GPU reads whole elements only; of q8_0 the scales are f16. */
static psoup_status check_address(const char *who, const char *what, size_t i, const void *data,
                                  int32_t dtype, psoup_error *error) {
    size_t size = psoup_dtype_size((psoup_dtype)dtype);
    size = size > 0 ? size : 2;
    if ((uintptr_t)data % size == 0)
        return PSOUP_OK;
    return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                       "%s: %s %zu of %s is at address %p; expected a multiple of %zu on a GPU", who, what, i,
                       psoup_dtype_name((psoup_dtype)dtype), data, size);
}

static unsigned blocks(const psoup__gpu *gpu, uint64_t work) {
    const uint64_t most = (uint64_t)gpu->processors * WAVES;
    return (unsigned)(work < most ? work : most);
}

/* ---- terms ------------------------------------------------------------------------------------------- */

/* Where `count` of them are to be written: `here` if they travel with the kernel, else in the room, from
 * where stage_terms brings them to the device. */
static psoup_status term_room(psoup__gpu *gpu, psoup__terms *room, void *here, size_t count, size_t size,
                              void *out /* T ** */, psoup_error *error) {
    void *terms = here;
    if (count > PSOUP__UPLOAD_BYTES / 2 / size)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "%zu weights; expected at most %zu on a GPU",
                           count, PSOUP__UPLOAD_BYTES / 2 / size);
    if (count > PSOUP__TERMS && room->bytes < count * size) {
        psoup__free(gpu->base.context, room->memory);
        room->bytes = 0;
        room->memory = psoup__alloc(gpu->base.context, count, size, error);
        if (!room->memory)
            return PSOUP_ERROR_MEMORY;
        room->bytes = count * size;
    }
    if (count > PSOUP__TERMS)
        terms = room->memory;
    memcpy(out, &terms, sizeof terms);
    return PSOUP_OK;
}

static const void *stage_terms(psoup__gpu *gpu, const void *terms, const void *here, size_t count,
                               size_t size) {
    return terms == here ? NULL : psoup__gpu_stage(gpu, terms, count * size);
}

static size_t used(const double *weights, size_t count) {
    size_t n = 0;
    for (size_t i = 0; i < count; i++)
        n += weights[i] != 0;
    return n;
}

/* ---- sums -------------------------------------------------------------------------------------------- */

/* The kernel of one input of a dtype; those of more follow it. */
static psoup__kernel first_of(int32_t dtype) {
    return dtype == PSOUP_F32 ? PSOUP__KERNEL_sum_f32_1
                              : dtype == PSOUP_F16 ? PSOUP__KERNEL_sum_f16_1 : PSOUP__KERNEL_sum_bf16_1;
}

/* All of one dtype of the kernels', at multiples of 16 bytes: launches, and returns true. */
static bool sum_few(psoup__gpu *gpu, const psoup__sum_any_args *any, uint64_t rows) {
    const int32_t dtype = any->out_dtype;
    psoup__sum_few_args args = {.out = any->out, .out_stride = any->out_stride};
    uint64_t bits = (uintptr_t)any->out | any->out_stride;
    if ((dtype != PSOUP_F32 && dtype != PSOUP_F16 && dtype != PSOUP_BF16) || any->n < 1 ||
        any->n > PSOUP__SUM_MOST)
        return false;
    for (int32_t i = 0; i < any->n; i++) {
        const psoup__sum_term *t = &any->term[i];
        if (t->dtype != dtype)
            return false;
        bits |= (uintptr_t)t->in | t->stride;
        args.in[i] = t->in;
        args.stride[i] = t->stride;
        args.weight[i] = t->weight;
    }
    const uint64_t each = dtype == PSOUP_F32 ? 4 : 8;
    const uint64_t tile = (uint64_t)PSOUP__SUM_THREADS * PSOUP__SUM_PACKS(any->n);
    args.packs = any->columns / each;
    args.rest = (uint32_t)(any->columns % each);
    const uint64_t across = args.packs > 0 ? (args.packs - 1) / tile + 1 : 1;
    if (bits % 16 != 0 || across > INT32_MAX || rows > INT32_MAX / across)
        return false;
    args.across = (uint32_t)across;
    args.tiles = (uint32_t)(rows * across);
    const psoup__grid grid = {blocks(gpu, args.tiles), 1, 1, PSOUP__SUM_THREADS, 0};
    psoup__gpu_launch(gpu, (psoup__kernel)(first_of(dtype) + any->n - 1), grid, &args);
    return true;
}

/* One term to a weight that is not 0; `whole` says whether rows follow one another everywhere. */
static psoup_status fill_terms(psoup__sum_term *terms, const psoup_merge_view *in, const double *weights,
                               size_t count, bool *whole, psoup_error *error) {
    psoup_status status;
    for (size_t i = 0; i < count; i++) {
        if (weights[i] == 0)
            continue;
        PSOUP__TRY(check_address(who_sums, "input", i, in[i].data, in[i].dtype, error));
        *whole &= stride_of(&in[i]) == (uint64_t)in[i].columns;
        *terms++ = (psoup__sum_term){.in = in[i].data, .stride = stride_bytes(&in[i]),
                                     .weight = (float)weights[i], .dtype = in[i].dtype};
    }
    return PSOUP_OK;
fail:
    return status;
}

psoup_status psoup__gpu_sum(psoup__gpu *gpu, psoup__terms *room, const psoup_merge_view *out,
                            const psoup_merge_view *in, const double *weights, size_t count,
                            psoup_error *error) {
    psoup_status status;
    const size_t n = used(weights, count);
    uint64_t rows = (uint64_t)out->rows;
    bool whole = stride_of(out) == (uint64_t)out->columns;
    psoup__sum_any_args args = {.out = out->data, .out_stride = stride_bytes(out), .out_dtype = out->dtype,
                                .columns = (uint64_t)out->columns, .n = (int32_t)n};
    if (rows == 0 || args.columns == 0)
        return PSOUP_OK;
    PSOUP__TRY(check_address(who_sums, "output", 0, out->data, out->dtype, error));
    psoup__sum_term *terms;
    PSOUP__TRY(term_room(gpu, room, args.term, n, sizeof *terms, &terms, error));
    PSOUP__TRY(fill_terms(terms, in, weights, count, &whole, error));
    if (whole) {
        args.columns *= rows;
        rows = 1;
        args.out_stride = 0;
        for (size_t i = 0; i < n; i++)
            terms[i].stride = 0;
    }
    if (sum_few(gpu, &args, rows))
        return PSOUP_OK;
    args.staged = stage_terms(gpu, terms, args.term, n, sizeof *terms);
    args.across = (args.columns - 1) / PSOUP__SUM_ANY_TILE + 1;
    args.tiles = args.across * rows;
    const psoup__grid grid = {blocks(gpu, (args.tiles - 1) / (PSOUP__SUM_THREADS / 32) + 1), 1, 1,
                              PSOUP__SUM_THREADS, 0};
    psoup__gpu_launch(gpu, PSOUP__KERNEL_sum_any, grid, &args);
    return PSOUP_OK;
fail:
    return status;
}

/* ---- folds ------------------------------------------------------------------------------------------- */

static psoup__kernel fold_kernel(int32_t out, int32_t base) {
    if (out == base && out == PSOUP_F32)
        return PSOUP__KERNEL_fold_f32;
    if (out == base && out == PSOUP_F16)
        return PSOUP__KERNEL_fold_f16;
    return out == base && out == PSOUP_BF16 ? PSOUP__KERNEL_fold_bf16 : PSOUP__KERNEL_fold_any;
}

/* Whether four elements in a row, from every fourth column on, lie at multiples of their size. */
static bool is_wide(const psoup_merge_view *view) {
    const uint64_t four = 4 * psoup_dtype_size((psoup_dtype)view->dtype);
    return four > 0 && four <= 16 && ((uintptr_t)view->data | stride_bytes(view)) % four == 0;
}

psoup_status psoup__gpu_fold(psoup__gpu *gpu, psoup__terms *room, const psoup_merge_view *out,
                             const psoup_merge_view *base, int64_t first_row, int64_t first_column,
                             int64_t in_features, const psoup_lora_factors *factors, const double *weights,
                             size_t count, psoup_error *error) {
    psoup_status status;
    const double one = 1;
    const size_t n = used(weights, count);
    if (n == 0) /* the base, in another dtype perhaps */
        return psoup__gpu_sum(gpu, room, out, base, &one, 1, error);
    psoup__fold_tiles_args args = {.out = out->data, .base = base->data, .out_stride = stride_bytes(out),
                                   .base_stride = stride_bytes(base), .a_stride = in_features,
                                   .rows = (int32_t)out->rows, .columns = (int32_t)out->columns,
                                   .n = (int32_t)n, .out_dtype = out->dtype, .base_dtype = base->dtype,
                                   .wide = is_wide(out) && is_wide(base)};
    if (out->rows == 0 || out->columns == 0)
        return PSOUP_OK;
    PSOUP__TRY(check_address(who_folds, "output", 0, out->data, out->dtype, error));
    PSOUP__TRY(check_address(who_folds, "base", 0, base->data, base->dtype, error));
    psoup__fold_factor *terms, *next;
    PSOUP__TRY(term_room(gpu, room, args.factor, n, sizeof *terms, &terms, error));
    next = terms;
    for (size_t i = 0; i < count; i++) {
        const psoup_lora_factors *f = &factors[i];
        if (weights[i] == 0)
            continue;
        PSOUP__TRY(check_address(who_folds, "A of factors", i, f->a, PSOUP_F32, error));
        PSOUP__TRY(check_address(who_folds, "B of factors", i, f->b, PSOUP_F32, error));
        *next++ = (psoup__fold_factor){.a = f->a + first_column, .b = f->b + first_row * f->rank,
                                       .rank = f->rank, .weight = (float)(weights[i] * (double)f->scale)};
    }
    args.staged = stage_terms(gpu, terms, args.factor, n, sizeof *terms);
    args.across = (args.columns - 1) / PSOUP__FOLD_TILE_COLUMNS + 1;
    const unsigned down = (unsigned)((args.rows - 1) / PSOUP__FOLD_TILE_ROWS + 1);
    if (down > INT32_MAX / (unsigned)args.across)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "%s: %d × %d is too large for a GPU", who_folds,
                           (int)args.rows, (int)args.columns);
    const psoup__grid grid = {down * (unsigned)args.across, 1, 1, PSOUP__FOLD_THREADS, 0};
    psoup__gpu_launch(gpu, fold_kernel(out->dtype, base->dtype), grid, &args);
    return PSOUP_OK;
fail:
    return status;
}

/* ---- copies ------------------------------------------------------------------------------------------ */

/* On the device: in the largest units that all addresses, lengths and strides are multiples of. */
static void copy_here(psoup__gpu *gpu, psoup__copy_rows_args args, uint64_t bytes) {
    const uint64_t bits = (uintptr_t)args.out | (uintptr_t)args.in | args.out_stride | args.in_stride | bytes;
    args.unit = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1;
    args.units = bytes / (uint64_t)args.unit;
    const uint64_t work = (args.rows * args.units - 1) / PSOUP__SUM_THREADS + 1;
    const psoup__grid grid = {blocks(gpu, work), 1, 1, PSOUP__SUM_THREADS, 0};
    psoup__gpu_launch(gpu, PSOUP__KERNEL_copy_rows, grid, &args);
}

static psoup__cu_plane plane_of(const psoup_merge_view *view, size_t pitch) {
    if (view->place == PSOUP_MERGE_HOST)
        return (psoup__cu_plane){.place = PSOUP__CU_ON_HOST, .host = view->data, .pitch = pitch};
    return (psoup__cu_plane){.place = PSOUP__CU_ON_DEVICE, .device = psoup__gpu_address(view->data),
                             .pitch = pitch};
}

psoup_status psoup__gpu_copy_view(psoup__gpu *gpu, const psoup_merge_view *out, const psoup_merge_view *in,
                                  psoup_error *error) {
    const bool whole = stride_of(out) == (uint64_t)out->columns && stride_of(in) == (uint64_t)in->columns;
    uint64_t rows = (uint64_t)out->rows, bytes = bytes_of(out->dtype, (uint64_t)out->columns);
    uint64_t out_stride = stride_bytes(out), in_stride = stride_bytes(in);
    if (rows == 0 || bytes == 0)
        return PSOUP_OK;
    if (whole || rows == 1) {
        out_stride = in_stride = bytes *= rows;
        rows = 1;
    }
    if (out->place == in->place && rows == 1) {
        psoup__gpu_failed(gpu, gpu->driver.copy(psoup__gpu_address(out->data), psoup__gpu_address(in->data),
                                                bytes, gpu->stream),
                          "a copy");
        return PSOUP_OK;
    }
    if (out->place == in->place) {
        copy_here(gpu, (psoup__copy_rows_args){.out = out->data, .in = in->data, .out_stride = out_stride,
                                               .in_stride = in_stride, .rows = rows}, bytes);
        return PSOUP_OK;
    }
    if (out->place == PSOUP_MERGE_DEVICE && rows == 1) {
        psoup__gpu_write(gpu, psoup__gpu_address(out->data), in->data, bytes);
        return PSOUP_OK;
    }
    const psoup__cu_copy_2d copy = {.in = plane_of(in, in_stride), .out = plane_of(out, out_stride),
                                    .width = bytes, .height = rows};
    psoup__gpu_failed(gpu, gpu->driver.copy_2d((const struct CUDA_MEMCPY2D_st *)&copy, gpu->stream),
                      "a copy from or to the host");
    return psoup__gpu_finish(gpu, error);
}
