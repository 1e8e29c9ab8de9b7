/* One result in the making: its blocks, their fingerprints, and whose fault a bad number is. */
#include "merge/engine.h"

#include <string.h>

enum { LINE = 64 }; /* bytes */

/* Floats of a block's scratch that its inputs' bytes are read into. */
static size_t room_of(const psoup__work *work) {
    size_t n = work->block < work->result->n ? work->block : work->result->n;
    return (n * work->staged + (psoup__work_inputs(work) + 1) * LINE) / LINE * (LINE / sizeof(float));
}

size_t psoup__work_scratch(const psoup__work *work) {
    size_t n = work->block < work->result->n ? work->block : work->result->n;
    return room_of(work) +
           (work->result->kind == PSOUP__MADE ? n * (psoup__method_scratch(&work->job) + 1) : 0);
}

static void spoil(psoup__work *work) {
    __atomic_store_n(&work->bad, 1, __ATOMIC_RELAXED);
}

/* Where the elements at … of an input lie: in memory, or read into *room, which moves on. Each byte is read
 * once, for all that is done with it. */
static const void *stage(const psoup__tensor *tensor, size_t at, size_t n, char **room) {
    const size_t size = psoup_dtype_size(tensor->dtype);
    char *to = *room;
    if (tensor->data != NULL)
        return (const char *)tensor->data + at * size;
    psoup__tensor_bytes(tensor, at * size, n * size, to);
    *room += (n * size + LINE - 1) / LINE * LINE;
    return to;
}

bool psoup__work_stages(const psoup__work *work, size_t input) {
    const psoup__plan_input *from = psoup__work_input(work, input);
    return from->entry != PSOUP__NONE && from->tensor->data == NULL && from->tensor->heads == 0 &&
           from->tensor->dtype != PSOUP_Q8_0;
}

/* The job for one block: tensors seem to be in memory whose elements at … are. */
static const psoup__method_job *lay_out(psoup__work *work, const void **in, size_t at, size_t n, char *room,
                                        int worker) {
    psoup__desk *desk = &work->desks[worker];
    if (work->desks == NULL)
        return &work->job;
    for (size_t i = 0; i < psoup__work_inputs(work); i++) {
        const psoup__tensor *tensor = psoup__work_input(work, i)->tensor;
        if (!psoup__work_stages(work, i))
            continue;
        in[i] = stage(tensor, at, n, &room);
        desk->tensors[i].data = (const void *)((uintptr_t)in[i] - at * psoup_dtype_size(tensor->dtype));
    }
    return &desk->job;
}

/* Tensors that are no floats must be the same everywhere, and are kept. */
static void keep_block(psoup__work *work, const void **in, size_t at, size_t n, char *out, char *room) {
    const size_t bytes = n * psoup_dtype_size(work->result->dtype);
    for (size_t i = 0; i < psoup__work_inputs(work); i++) {
        const psoup__tensor *tensor = psoup__work_input(work, i)->tensor;
        if (tensor->dtype != work->result->dtype) {
            spoil(work);
            continue;
        }
        in[i] = stage(tensor, at, n, &room);
        if (i == 0)
            memcpy(out, in[i], bytes);
        else if (memcmp(out, in[i], bytes) != 0)
            spoil(work);
    }
}

/* Inputs of weight 0 are not read. */
static void sum_block(psoup__work *work, const void **in, size_t at, size_t n, void *out, char *room) {
    const psoup__result *r = work->result;
    const double *weights = work->values[PSOUP__WEIGHT];
    for (size_t i = 0; i < r->inputs; i++)
        if (weights[i] != 0)
            in[i] = stage(psoup__work_input(work, i)->tensor, at, n, &room);
    const psoup__sum_args args = {.out = out, .out_dtype = r->dtype, .in = in, .dtypes = work->dtypes,
                                  .weights = weights, .count = r->inputs, .n = n};
    if (!psoup__sum(work->merger->context, &args))
        spoil(work);
}

static bool is_plain(psoup_dtype dtype) {
    return dtype == PSOUP_F32 || dtype == PSOUP_F16 || dtype == PSOUP_BF16;
}

/* Adapters on a base of numbers as they lie, and nothing else: one product reads and rounds the base in its
 * tiles. Numbers that became infinite in rounding are found in what was written. */
static bool fold_block(psoup__work *work, const void **in, size_t at, size_t n, void *out, char *room) {
    enum { PIECE = 2048 };
    float piece[PIECE];
    const psoup__result *r = work->result;
    const psoup__merge_input *input = &work->inputs[0];
    const psoup__tensor *tensor = input->tensor;
    if (r->method->method != PSOUP_MERGE_PASSTHROUGH || !work->folds || work->values[PSOUP__SCALE][0] != 1 ||
        tensor == NULL || (tensor->data == NULL && !psoup__work_stages(work, 0)) || tensor->heads != 0 || !is_plain(tensor->dtype) ||
        !is_plain(r->dtype))
        return false;
    size_t columns = (size_t)input->columns, size = psoup_dtype_size(r->dtype);
    in[0] = stage(tensor, at, n, &room);
    const psoup__fold_args args = {
        .out = out, .out_dtype = r->dtype, .out_stride = columns,
        .base = in[0], .base_dtype = tensor->dtype, .base_stride = columns, .rows = (int64_t)(n / columns),
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
    const void **in = work->in + (size_t)worker * psoup__work_inputs(work);
    char *room = (char *)scratch;
    if (r->kind == PSOUP__KEPT) {
        keep_block(work, in, at, n, out, room);
    } else if (r->kind == PSOUP__SUM) {
        sum_block(work, in, at, n, out, room);
    } else if (r->kind != PSOUP__MADE || !fold_block(work, in, at, n, out, room)) {
        float *made = scratch + room_of(work);
        const float *from = made;
        if (r->kind == PSOUP__MADE)
            r->method->block(lay_out(work, in, at, n, room, worker), work->state, at, n, made, made + n);
        else
            from = (r->kind == PSOUP__PAIR_A ? work->merged.a : work->merged.b) + at;
        if (!psoup__merge_finite(context, from, n, r->dtype))
            spoil(work);
        psoup__from_f32(context, out, r->dtype, from, n);
    }
}

void psoup__stream_update(const psoup__work *work, psoup__stream *stream, size_t n, const void *out,
                          int worker) {
    const size_t inputs = psoup__work_inputs(work), at = stream->at;
    const psoup__tensor *tensor =
        stream->input != PSOUP__NONE ? psoup__work_input(work, stream->input)->tensor : NULL;
    const void *bytes = tensor != NULL ? work->in[(size_t)worker * inputs + stream->input] : out;
    const psoup_dtype dtype = tensor != NULL ? tensor->dtype : work->result->dtype;
    size_t from, to;
    /* a block may end within a q8_0 block of an input: the next one hashes that */
    psoup__dtype_bytes(dtype, dtype == PSOUP_Q8_0 ? at / PSOUP__Q8_BLOCK * PSOUP__Q8_BLOCK : at, &from);
    psoup__dtype_bytes(dtype, dtype == PSOUP_Q8_0 ? (at + n) / PSOUP__Q8_BLOCK * PSOUP__Q8_BLOCK : at + n,
                       &to);
    if (bytes != NULL || tensor == NULL)
        psoup__hash_update(stream->hash, bytes, to - from);
    else
        psoup__hash_bytes(stream->hash, tensor, from, to);
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
        const psoup__merge_input plain = {.tensor = input->tensor};
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
