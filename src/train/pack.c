/* Packed passes: which rows run together, and one pass being filled, run and differentiated. */
#include <assert.h>
#include <string.h>

#include "train/train.h"

psoup_status psoup__plan(psoup_context *context, const int32_t *rows, const int32_t *owner, size_t n,
                         int64_t bound, int32_t *pass, int32_t *passes, psoup_error *error) {
    int64_t *used = psoup__alloc(context, n, sizeof(*used), error); /* rows of each pass */
    if (!used)
        return PSOUP_ERROR_MEMORY;
    int32_t count = 0, from = 0; /* `from`: the first pass that this owner may still use */
    for (size_t i = 0, end; i < n; i = end) {
        int64_t chunk = rows[i];
        for (end = i + 1; end < n && owner[end] == owner[i] && chunk + rows[end] <= bound; end++)
            chunk += rows[end];
        if (i == 0 || owner[i] != owner[i - 1])
            from = 0;
        while (from < count && used[from] + chunk > bound)
            from++;
        used[from] += chunk;
        for (size_t j = i; j < end; j++)
            pass[j] = from;
        if (++from > count)
            count = from;
    }
    *passes = count;
    psoup__free(context, used);
    return PSOUP_OK;
}

psoup_status psoup__pack_create(psoup_model *model, bool recompute, psoup__pack **out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__pack *pack = psoup__alloc(model->context, 1, sizeof(*pack), error);
    *out = NULL;
    if (!pack)
        return PSOUP_ERROR_MEMORY;
    pack->model = model;
    PSOUP__TRY(psoup__tape_create(model, &pack->tape, error));
    psoup__tape_recompute(pack->tape, recompute);
    *out = pack;
    return PSOUP_OK;
fail:
    psoup__pack_free(pack);
    return status;
}

void psoup__pack_free(psoup__pack *pack) {
    if (!pack)
        return;
    psoup_context *context = pack->model->context;
    void *arrays[] = {pack->tokens,      pack->start,       pack->seed,     pack->stream,
                      pack->mix,         pack->row,         pack->target,   pack->logprob,
                      pack->dlogprob,    pack->head_row,    pack->value,    pack->dvalue,
                      pack->head_at,     pack->head_weight, pack->head_seed,   pack->head_stream,
                      pack->head_offset, pack->list,        pack->list_dropout};
    for (size_t i = 0; i < sizeof(arrays) / sizeof(arrays[0]); i++)
        psoup__free(context, arrays[i]);
    pack->model->be->ops->release(pack->model->be, pack->device.memory);
    psoup__tape_free(pack->tape);
    psoup__free(context, pack);
}

void psoup__pack_clear(psoup__pack *pack) {
    pack->n = pack->rows = pack->reads = pack->values = pack->head_reads = pack->lists = 0;
}

/* Arrays that share one capacity. */
typedef struct column {
    void *array; /* T ** */
    size_t size;
} column;

static psoup_status grow(psoup_context *context, const column *columns, size_t n, size_t *capacity,
                         size_t need, psoup_error *error) {
    size_t reached = *capacity;
    for (size_t i = 0; i < n && need > *capacity; i++) {
        reached = *capacity;
        psoup_status status =
            psoup__reserve(context, columns[i].array, &reached, need, columns[i].size, error);
        if (status != PSOUP_OK)
            return status;
    }
    *capacity = reached;
    return PSOUP_OK;
}

psoup_status psoup__pack_sequence(psoup__pack *pack, const psoup__sequence *sequence, int32_t *row,
                                  psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = pack->model->context;
    size_t adapters = (size_t)pack->model->n_adapters, rows, mix;
    assert(sequence->adapter < pack->model->n_adapters);
    if (!psoup__add(sequence->n_first, sequence->n_then, &rows) ||
        !psoup__add(rows, pack->rows, &rows) || rows > INT32_MAX)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "a batch has more than %d tokens", INT32_MAX);
    const column sequences[] = {{&pack->start, sizeof(*pack->start)},
                                {&pack->seed, sizeof(*pack->seed)},
                                {&pack->stream, sizeof(*pack->stream)}};
    if (!psoup__multiply(pack->n + 1, adapters, &mix))
        return psoup__out_of_memory(error, SIZE_MAX);
    PSOUP__TRY(grow(context, sequences, 3, &pack->sequence_capacity, pack->n + 2, error));
    PSOUP__TRY(psoup__reserve(context, &pack->mix, &pack->mix_capacity, mix, sizeof(float), error));
    PSOUP__TRY(psoup__reserve(context, &pack->tokens, &pack->row_capacity, rows,
                              sizeof(*pack->tokens), error));
    *row = (int32_t)pack->rows;
    if (sequence->n_first)
        memcpy(pack->tokens + pack->rows, sequence->first,
               sequence->n_first * sizeof(*pack->tokens));
    if (sequence->n_then)
        memcpy(pack->tokens + pack->rows + sequence->n_first, sequence->then,
               sequence->n_then * sizeof(*pack->tokens));
    float *weights = pack->mix + pack->n * adapters;
    for (size_t i = 0; i < adapters; i++)
        weights[i] = !sequence->adapters && (int32_t)i == sequence->adapter ? 1.0f : 0.0f;
    for (size_t i = 0; sequence->adapters && i < sequence->n_adapters; i++)
        weights[sequence->adapters[i]] = sequence->weight[i];
    pack->seed[pack->n] = sequence->seed;
    pack->stream[pack->n] = sequence->stream;
    pack->start[pack->n] = *row;
    pack->start[++pack->n] = (int32_t)rows;
    pack->rows = rows;
fail:
    return status;
}

psoup_status psoup__pack_read(psoup__pack *pack, int32_t row, int32_t target, psoup_error *error) {
    const column columns[] = {{&pack->row, sizeof(*pack->row)},
                              {&pack->target, sizeof(*pack->target)},
                              {&pack->logprob, sizeof(*pack->logprob)},
                              {&pack->dlogprob, sizeof(*pack->dlogprob)}};
    psoup_status status = grow(pack->model->context, columns, 4, &pack->read_capacity,
                               pack->reads + 1, error);
    if (status != PSOUP_OK)
        return status;
    pack->row[pack->reads] = row;
    pack->target[pack->reads] = target;
    pack->dlogprob[pack->reads++] = 0.0f;
    return PSOUP_OK;
}

psoup_status psoup__pack_values(psoup__pack *pack, size_t n, size_t *first, psoup_error *error) {
    const column columns[] = {{&pack->value, sizeof(*pack->value)},
                              {&pack->dvalue, sizeof(*pack->dvalue)}};
    psoup_status status = grow(pack->model->context, columns, 2, &pack->value_capacity,
                               pack->values + n, error);
    if (status != PSOUP_OK)
        return status;
    *first = pack->values;
    for (size_t i = 0; i < n; i++)
        pack->dvalue[pack->values++] = 0.0f;
    return PSOUP_OK;
}

psoup_status psoup__pack_score(psoup__pack *pack, const psoup__adapter *adapter, int32_t row,
                               psoup_error *error) {
    size_t value;
    psoup_status status = psoup__pack_values(pack, 1, &value, error);
    return status != PSOUP_OK ? status
                              : psoup__pack_head(pack, adapter, row, value, 1.0f, 0, 0, 0, error);
}

psoup_status psoup__pack_head(psoup__pack *pack, const psoup__adapter *adapter, int32_t row,
                              size_t value, float weight, uint64_t seed, uint64_t stream,
                              uint64_t offset, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = pack->model->context;
    size_t at = pack->head_reads;
    const column columns[] = {{&pack->head_row, sizeof(*pack->head_row)},
                              {&pack->head_at, sizeof(*pack->head_at)},
                              {&pack->head_weight, sizeof(*pack->head_weight)},
                              {&pack->head_seed, sizeof(*pack->head_seed)},
                              {&pack->head_stream, sizeof(*pack->head_stream)},
                              {&pack->head_offset, sizeof(*pack->head_offset)}};
    const column lists[] = {{&pack->list, sizeof(*pack->list)},
                            {&pack->list_dropout, sizeof(*pack->list_dropout)}};
    PSOUP__TRY(grow(context, columns, 6, &pack->head_capacity, at + 1, error));
    if (pack->lists == 0 || pack->list[pack->lists - 1].adapter != adapter) {
        PSOUP__TRY(grow(context, lists, 2, &pack->list_capacity, pack->lists + 1, error));
        pack->list[pack->lists++] = (psoup__head_rows){.adapter = adapter};
    }
    pack->list[pack->lists - 1].n++;
    pack->head_row[at] = row;
    pack->head_at[at] = (int32_t)value;
    pack->head_weight[at] = weight;
    pack->head_seed[at] = seed;
    pack->head_stream[at] = stream;
    pack->head_offset[at] = offset;
    pack->head_reads++;
fail:
    return status;
}

/* Room on the device for what is read, and for gradients by it. */
static psoup_status make_room(psoup__pack *pack, psoup_error *error) {
    psoup__backend *be = pack->model->be;
    size_t need = 2 * (pack->reads + pack->values);
    if (!pack->device.memory || need > pack->device.capacity) {
        be->ops->release(be, pack->device.memory);
        pack->device.capacity = need + need / 8; /* as a tape's */
        pack->device.memory = be->ops->alloc(be, pack->device.capacity, sizeof(float), error);
        if (!pack->device.memory)
            return PSOUP_ERROR_MEMORY;
    }
    pack->device.logprob = pack->device.memory;
    pack->device.dlogprob = pack->device.logprob + pack->reads;
    pack->device.value = pack->device.dlogprob + pack->reads;
    pack->device.dvalue = pack->device.value + pack->values;
    return PSOUP_OK;
}

psoup_status psoup__pack_forward(psoup__pack *pack, bool save, float lora_dropout,
                                 float head_dropout, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_model *model = pack->model;
    psoup__batch batch = {.n = (int32_t)pack->n,
                          .rows = (int32_t)pack->rows,
                          .tokens = pack->tokens,
                          .start = pack->start,
                          .mix = model->n_adapters ? pack->mix : NULL,
                          .dropout = lora_dropout,
                          .dropout_seed = pack->seed,
                          .dropout_stream = pack->stream};
    size_t at = 0;
    for (size_t i = 0; i < pack->lists; at += (size_t)pack->list[i].n, i++) {
        psoup__head_rows *list = &pack->list[i];
        pack->list_dropout[i] = (psoup__dropout){.p = head_dropout,
                                                 .seed = pack->head_seed + at,
                                                 .stream = pack->head_stream + at,
                                                 .offset = pack->head_offset + at};
        list->row = pack->head_row + at;
        list->at = pack->head_at + at;
        list->weight = pack->head_weight + at;
        list->dropout = head_dropout > 0.0f ? &pack->list_dropout[i] : NULL;
    }
    PSOUP__TRY(make_room(pack, error));
    PSOUP__TRY(psoup__forward(model, pack->tape, &batch, save, error));
    if (pack->reads)
        PSOUP__TRY(psoup__logprobs(model, pack->tape, pack->row, pack->target,
                                   (int32_t)pack->reads, pack->device.logprob, error));
    model->be->ops->zero(model->be, pack->device.value, pack->values * sizeof(*pack->value));
    PSOUP__TRY(psoup__heads(model, pack->tape, pack->list, (int32_t)pack->lists, pack->device.value, error));
fail:
    return status;
}

psoup_status psoup__pack_fetch(psoup__pack *pack, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__backend *be = pack->model->be;
    if (pack->reads)
        PSOUP__TRY(be->ops->read(be, pack->logprob, pack->device.logprob, pack->reads * sizeof(*pack->logprob),
                                 error));
    if (pack->values)
        PSOUP__TRY(be->ops->read(be, pack->value, pack->device.value, pack->values * sizeof(*pack->value), error));
fail:
    return status;
}

void psoup__pack_send(psoup__pack *pack) {
    psoup__backend *be = pack->model->be;
    be->ops->write(be, pack->device.dlogprob, pack->dlogprob, pack->reads * sizeof(*pack->dlogprob));
    be->ops->write(be, pack->device.dvalue, pack->dvalue, pack->values * sizeof(*pack->dvalue));
}

psoup_status psoup__pack_backward(psoup__pack *pack, psoup_error *error) {
    psoup__loss_gradient loss = {.row = pack->row,
                                 .target = pack->target,
                                 .dlogprob = pack->device.dlogprob,
                                 .n = (int32_t)pack->reads,
                                 .heads = pack->list,
                                 .n_heads = (int32_t)pack->lists,
                                 .dvalue = pack->device.dvalue};
    return psoup__backward(pack->model, pack->tape, &loss, error);
}
