/* One result in the making: its blocks, their fingerprints, and whose fault a bad number is. */
#include "merge/engine.h"

#include <string.h>

size_t psoup__work_scratch(const psoup__work *work) {
    size_t n = work->block < work->result->n ? work->block : work->result->n;
    return work->result->kind == PSOUP__MADE ? n * (psoup__method_scratch(&work->job) + 1) : 0;
}

static void spoil(psoup__work *work) {
    __atomic_store_n(&work->bad, 1, __ATOMIC_RELAXED);
}

/* The bytes of elements at …, from memory or into buffer. */
static const void *raw_bytes(const psoup__work *work, const psoup__plan_input *input, size_t at, size_t bytes,
                             void *buffer) {
    if (input->pull == NULL)
        return (const char *)input->tensor->data + at;
    if (input->pull->read(input->pull->user, input->pull->index, at, bytes, buffer) != 0) {
        __atomic_store_n(input->pull->failed, 1, __ATOMIC_RELAXED);
        memset(buffer, 0, bytes);
    }
    (void)work;
    return buffer;
}

/* Tensors that are no floats must be the same everywhere, and are kept. */
static void keep_block(psoup__work *work, size_t at, size_t n, char *out) {
    enum { PIECE = 4096 };
    char buffer[PIECE];
    size_t size = psoup_dtype_size(work->result->dtype), bytes = n * size, first = at * size;
    for (size_t i = 0; i < psoup__work_inputs(work); i++) {
        const psoup__plan_input *input = psoup__work_input(work, i);
        if (input->tensor->dtype != work->result->dtype) {
            spoil(work);
            continue;
        }
        for (size_t done = 0; done < bytes; done += PIECE) {
            size_t m = bytes - done < PIECE ? bytes - done : PIECE;
            const void *raw = raw_bytes(work, input, first + done, m, buffer);
            if (i == 0)
                memcpy(out + done, raw, m);
            else if (memcmp(out + done, raw, m) != 0)
                spoil(work);
        }
    }
}

static bool is_plain(psoup_dtype dtype) {
    return dtype == PSOUP_F32 || dtype == PSOUP_F16 || dtype == PSOUP_BF16;
}

/* Adapters on a base that lies in memory, and nothing else: one product reads and rounds the base in its
 * tiles. Numbers that became infinite in rounding are found in what was written. */
static bool fold_block(psoup__work *work, size_t at, size_t n, void *out) {
    enum { PIECE = 2048 };
    float piece[PIECE];
    const psoup__result *r = work->result;
    const psoup__merge_input *input = &work->inputs[0];
    const psoup__tensor *tensor = input->tensor;
    if (r->method->method != PSOUP_MERGE_PASSTHROUGH || !work->folds || work->values[PSOUP__SCALE][0] != 1 ||
        tensor == NULL || input->pull != NULL || tensor->heads != 0 || !is_plain(tensor->dtype) ||
        !is_plain(r->dtype))
        return false;
    size_t columns = (size_t)input->columns, size = psoup_dtype_size(r->dtype);
    const psoup__fold_args args = {
        .out = out, .out_dtype = r->dtype, .out_stride = columns,
        .base = (const char *)tensor->data + at * psoup_dtype_size(tensor->dtype),
        .base_dtype = tensor->dtype, .base_stride = columns, .rows = (int64_t)(n / columns),
        .columns = input->columns, .first_row = (int64_t)(at / columns), .in = input->columns,
        .factors = input->factors, .weights = input->weights, .count = input->n_factors};
    psoup__fold(work->merger->context, &args);
    for (size_t done = 0; done < n; done += PIECE) {
        size_t m = n - done < PIECE ? n - done : PIECE;
        psoup__to_f32(work->merger->context, piece, (const char *)out + done * size, r->dtype, m);
        if (!psoup__merge_finite(work->merger->context, piece, m, PSOUP_F32))
            spoil(work);
    }
    return true;
}

void psoup__work_block(psoup__work *work, size_t at, size_t n, void *out, float *scratch, int worker) {
    psoup_context *context = work->merger->context;
    const psoup__result *r = work->result;
    if (r->kind == PSOUP__KEPT) {
        keep_block(work, at, n, out);
    } else if (r->kind == PSOUP__SUM) {
        const void **in = work->in + (size_t)worker * r->inputs;
        for (size_t i = 0; i < r->inputs; i++)
            in[i] = (const char *)psoup__work_input(work, i)->tensor->data +
                    at * psoup_dtype_size(work->dtypes[i]);
        const psoup__sum_args args = {.out = out, .out_dtype = r->dtype, .in = in, .dtypes = work->dtypes,
                                      .weights = work->values[PSOUP__WEIGHT], .count = r->inputs, .n = n};
        if (!psoup__sum(context, &args))
            spoil(work);
    } else if (r->kind != PSOUP__MADE || !fold_block(work, at, n, out)) {
        const float *from = scratch;
        if (r->kind == PSOUP__MADE)
            r->method->block(&work->job, work->state, at, n, scratch, scratch + n);
        else
            from = (r->kind == PSOUP__PAIR_A ? work->merged.a : work->merged.b) + at;
        if (!psoup__merge_finite(context, from, n, r->dtype))
            spoil(work);
        psoup__from_f32(context, out, r->dtype, from, n);
    }
}

void psoup__stream_update(const psoup__work *work, psoup__stream *stream, size_t at, size_t n,
                          const void *out) {
    enum { PIECE = 1 << 14 };
    char buffer[PIECE];
    size_t from, to;
    psoup_dtype dtype = stream->tensor != NULL ? stream->tensor->dtype : work->result->dtype;
    /* a block may end within a q8_0 block of an input: the next one hashes that */
    psoup__dtype_bytes(dtype, dtype == PSOUP_Q8_0 ? at / PSOUP__Q8_BLOCK * PSOUP__Q8_BLOCK : at, &from);
    psoup__dtype_bytes(dtype, dtype == PSOUP_Q8_0 ? (at + n) / PSOUP__Q8_BLOCK * PSOUP__Q8_BLOCK : at + n,
                       &to);
    if (stream->tensor == NULL) {
        psoup__hash_update(stream->hash, out, to - from);
    } else if (stream->pull == NULL) {
        psoup__hash_update(stream->hash, (const char *)stream->tensor->data + from, to - from);
    } else {
        const psoup__plan_input input = {.tensor = stream->tensor, .pull = stream->pull};
        for (; from < to; from += PIECE) {
            size_t m = to - from < PIECE ? to - from : PIECE;
            psoup__hash_update(stream->hash, raw_bytes(work, &input, from, m, buffer), m);
        }
    }
    if (at + n == work->result->n)
        psoup__hash_text(stream->hash, stream->to);
}

/* ---- what went wrong ------------------------------------------------------------------------------------------ */

psoup_status psoup__work_blame(const psoup__work *work, psoup_error *error) {
    psoup_merger *merger = work->merger;
    const psoup__result *r = work->result;
    const char *path = r->inputs > 0 && r->kind <= PSOUP__KEPT
                           ? psoup__merger_source(merger, psoup__work_input(work, 0)->source)->path
                           : "";
    float chunk[1024];
    if (r->kind == PSOUP__PAIR_A || r->kind == PSOUP__PAIR_B)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%.200s: the merged factors are too large for %s",
                           r->module, psoup_dtype_name(r->dtype));
    if (r->kind == PSOUP__KEPT)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: tensor %.200s (%s) is another in other sources and is no sum of floats", path,
                           r->name, psoup_dtype_name(r->dtype));
    for (size_t i = 0; i < psoup__work_inputs(work); i++) {
        const psoup__plan_input *input = psoup__work_input(work, i);
        const psoup__merge_input plain = {.tensor = input->tensor, .pull = input->pull};
        if (i < r->inputs &&
            (r->kind == PSOUP__SUM || (r->method->parameters & PSOUP__USES_WEIGHT) != 0) &&
            input->values[PSOUP__WEIGHT] == 0)
            continue;
        for (size_t at = 0; at < r->n; at += 1024) {
            size_t m = r->n - at < 1024 ? r->n - at : 1024;
            psoup__merge_read(merger->context, &plain, at, m, chunk);
            if (!psoup__merge_finite(merger->context, chunk, m, PSOUP_F32))
                return psoup__fail(error, PSOUP_ERROR_FORMAT,
                                   "%s: tensor %.200s holds a NaN or infinity",
                                   psoup__merger_source(merger, input->source)->path, input->name);
        }
    }
    return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: tensor %.200s: the result is too large for %s", path,
                       r->name, psoup_dtype_name(r->dtype));
}
