/* GGUF, written (version 3, alignment 32): header, metadata, tensor infos, data. The tensors come in
 * Hugging Face's row order; q and k of a permuted architecture are interleaved through one head's rows. */
#include "format/gguf.h"

#include <string.h>

enum { ALIGNMENT = 32 };

/* One key and its value as they will lie in the file, type and all. */
typedef struct setting {
    char *key;
    void *bytes; /* [length] */
    size_t length;
} setting;

typedef struct declared {
    char name[PSOUP__GGUF_MAX_NAME + 1]; /* the file's */
    psoup__tensor tensor;
    float *own; /* data that the writer writes itself; NULL for the caller's */
} declared;

struct psoup__gguf_writer {
    psoup_context *context;
    psoup__writer *file;
    char *path;
    psoup__gguf_layout layout;
    setting *settings; /* [n_settings] */
    size_t n_settings, settings_capacity;
    declared *tensors; /* [n_tensors]; the writer's own come first */
    size_t n_tensors, tensors_capacity;
    psoup__map *by_name, *by_key;
    bool begun;
    size_t current, within; /* the tensor that is written, and how many of its bytes */
    char *head;             /* one head's rows */
    size_t head_capacity;
};

psoup_status psoup__gguf_create(psoup_context *context, const char *path, psoup__gguf_writer **out,
                                psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    *out = NULL;
    psoup__gguf_writer *writer = psoup__alloc(context, 1, sizeof *writer, error);
    if (writer == NULL)
        return PSOUP_ERROR_MEMORY;
    writer->context = context;
    if ((writer->path = psoup__strdup(context, path, error)) == NULL)
        goto fail;
    PSOUP__TRY(psoup__map_create(context, 256, &writer->by_name, error));
    PSOUP__TRY(psoup__map_create(context, 64, &writer->by_key, error));
    PSOUP__TRY(psoup__writer_create(context, path, &writer->file, error));
    *out = writer;
    return PSOUP_OK;
fail:
    psoup__gguf_writer_free(writer);
    return status;
}

void psoup__gguf_writer_free(psoup__gguf_writer *writer) {
    if (writer == NULL)
        return;
    psoup_context *context = writer->context;
    for (size_t i = 0; i < writer->n_settings; i++) {
        psoup__free(context, writer->settings[i].key);
        psoup__free(context, writer->settings[i].bytes);
    }
    for (size_t i = 0; i < writer->n_tensors; i++)
        psoup__free(context, writer->tensors[i].own);
    psoup__free(context, writer->settings);
    psoup__free(context, writer->tensors);
    psoup__free(context, writer->head);
    psoup__map_free(writer->by_name);
    psoup__map_free(writer->by_key);
    psoup__writer_free(writer->file);
    psoup__free(context, writer->path);
    psoup__free(context, writer);
}

void psoup__gguf_set_layout(psoup__gguf_writer *writer, const psoup__gguf_layout *layout) {
    writer->layout = *layout;
}

const char *psoup__gguf_writer_path(const psoup__gguf_writer *writer) {
    return writer->path;
}

psoup_context *psoup__gguf_writer_context(const psoup__gguf_writer *writer) {
    return writer->context;
}

/* ---- metadata ----------------------------------------------------------------------------------- */

static void put_little(unsigned char *out, uint64_t value, size_t n) {
    for (size_t i = 0; i < n; i++)
        out[i] = (unsigned char)(value >> (8 * i));
}

/* Keeps `head` and `bytes` as the key's type and value. */
static psoup_status set(psoup__gguf_writer *writer, const char *key, const void *head, size_t n_head,
                        const void *bytes, size_t n, psoup_error *error) {
    psoup_status status;
    psoup_context *context = writer->context;
    int64_t found;
    size_t at = writer->n_settings, total;
    if (*key == '\0' || !psoup__is_utf8(key) || writer->begun)
        return psoup__fail(error, PSOUP_ERROR_STATE, "%s: metadata \"%.200s\" set %s", writer->path, key,
                           writer->begun ? "after the header was written" : "under a key that is no text");
    if (!psoup__add(n_head, n, &total))
        return psoup__out_of_memory(error, SIZE_MAX);
    char *kept = psoup__alloc(context, total, 1, error);
    if (kept == NULL)
        return PSOUP_ERROR_MEMORY;
    memcpy(kept, head, n_head);
    if (n > 0)
        memcpy(kept + n_head, bytes, n);
    if (psoup__map_get(writer->by_key, key, strlen(key), &found)) {
        at = (size_t)found;
    } else {
        PSOUP__TRY(psoup__reserve(context, &writer->settings, &writer->settings_capacity, at + 1,
                                  sizeof *writer->settings, error));
        char *name = psoup__strdup(context, key, error);
        if (name == NULL) {
            status = PSOUP_ERROR_MEMORY;
            goto fail;
        }
        writer->settings[writer->n_settings++] = (setting){.key = name};
        PSOUP__TRY(psoup__map_set(writer->by_key, key, strlen(key), (int64_t)at, NULL, error));
    }
    psoup__free(context, writer->settings[at].bytes);
    writer->settings[at].bytes = kept;
    writer->settings[at].length = total;
    return PSOUP_OK;
fail:
    psoup__free(context, kept);
    return status;
}

static psoup_status set_number(psoup__gguf_writer *writer, const char *key, psoup__gguf_type type,
                               uint64_t bits, size_t size, psoup_error *error) {
    unsigned char head[4], value[8];
    put_little(head, type, 4);
    put_little(value, bits, size);
    return set(writer, key, head, sizeof head, value, size, error);
}

psoup_status psoup__gguf_set_uint32(psoup__gguf_writer *writer, const char *key, uint32_t value,
                                    psoup_error *error) {
    return set_number(writer, key, PSOUP__GGUF_UINT32, value, 4, error);
}

psoup_status psoup__gguf_set_float32(psoup__gguf_writer *writer, const char *key, float value,
                                     psoup_error *error) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return set_number(writer, key, PSOUP__GGUF_FLOAT32, bits, 4, error);
}

psoup_status psoup__gguf_set_bool(psoup__gguf_writer *writer, const char *key, bool value,
                                  psoup_error *error) {
    return set_number(writer, key, PSOUP__GGUF_BOOL, value, 1, error);
}

psoup_status psoup__gguf_set_string(psoup__gguf_writer *writer, const char *key, const char *text,
                                    psoup_error *error) {
    unsigned char head[12];
    put_little(head, PSOUP__GGUF_STRING, 4);
    put_little(head + 4, strlen(text), 8);
    return set(writer, key, head, sizeof head, text, strlen(text), error);
}

psoup_status psoup__gguf_set_array(psoup__gguf_writer *writer, const char *key,
                                   psoup__gguf_type element, size_t count, const void *data,
                                   size_t bytes, psoup_error *error) {
    unsigned char head[16];
    put_little(head, PSOUP__GGUF_ARRAY, 4);
    put_little(head + 4, element, 4);
    put_little(head + 8, count, 8);
    return set(writer, key, head, sizeof head, data, bytes, error);
}

psoup_status psoup__gguf_set_value(psoup__gguf_writer *writer, const psoup__gguf_value *value,
                                   psoup_error *error) {
    unsigned char head[4];
    if (value->type == PSOUP__GGUF_ARRAY)
        return psoup__gguf_set_array(writer, value->key, value->element, value->count, value->data,
                                     value->bytes, error);
    put_little(head, value->type, 4);
    return set(writer, value->key, head, sizeof head, value->data, value->bytes, error);
}

/* ---- tensors ------------------------------------------------------------------------------------ */

psoup_dtype psoup__gguf_dtype(psoup_dtype dtype, int rank, const int64_t *shape) {
    if (rank < 2 || dtype == PSOUP_F64)
        return PSOUP_F32;
    if (dtype == PSOUP_F8_E4M3 || dtype == PSOUP_F8_E5M2)
        return PSOUP_BF16;
    if (dtype == PSOUP_Q8_0 && shape[rank - 1] % PSOUP__Q8_BLOCK != 0)
        return PSOUP_F16;
    return dtype;
}

/* ggml's number of a dtype; −1 for one that is not written. */
static int type_number(psoup_dtype dtype) {
    switch (dtype) {
    case PSOUP_F32:
        return 0;
    case PSOUP_F16:
        return 1;
    case PSOUP_Q8_0:
        return 8;
    case PSOUP_BF16:
        return 30;
    default:
        return -1;
    }
}

/* Checks a tensor under the file's own name and takes it in. */
static psoup_status add(psoup__gguf_writer *writer, const char *name, const psoup__tensor *tensor,
                        psoup_error *error) {
    psoup_status status;
    size_t n = writer->n_tensors;
    bool fresh;
    if (strlen(name) > PSOUP__GGUF_MAX_NAME)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: tensor %.200s: the name is longer than %d bytes", writer->path, name,
                           PSOUP__GGUF_MAX_NAME);
    PSOUP__TRY(psoup__map_set(writer->by_name, name, strlen(name), (int64_t)n, &fresh, error));
    if (writer->begun || !fresh)
        return psoup__fail(error, PSOUP_ERROR_STATE, "%s: tensor %s declared %s", writer->path, name,
                           writer->begun ? "after the header was written" : "twice");
    PSOUP__TRY(psoup__reserve(writer->context, &writer->tensors, &writer->tensors_capacity, n + 1,
                              sizeof *writer->tensors, error));
    writer->tensors[n] = (declared){.tensor = *tensor};
    memcpy(writer->tensors[n].name, name, strlen(name));
    writer->n_tensors = n + 1;
    return PSOUP_OK;
fail:
    return status;
}

psoup_status psoup__gguf_declare(psoup__gguf_writer *writer, const char *hf_name, psoup_dtype dtype,
                                 int rank, const int64_t *shape, psoup_error *error) {
    char name[PSOUP__GGUF_NAME];
    size_t elements;
    psoup__tensor tensor = {.dtype = dtype, .rank = rank};
    if (!psoup__gguf_from_hf(hf_name, name))
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: tensor %.200s has no name in GGUF files of llama and qwen2", writer->path,
                           hf_name);
    if (type_number(dtype) < 0 || rank < 1 || rank > 4)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: tensor %.200s: %s of rank %d cannot be written; expected f32, f16, bf16 or "
                           "q8_0 of rank 1 to 4",
                           writer->path, hf_name, psoup_dtype_name(dtype), rank);
    memcpy(tensor.shape, shape, (size_t)rank * sizeof *shape);
    if (!psoup__tensor_elements(&tensor, &elements) ||
        (dtype == PSOUP_Q8_0 && shape[rank - 1] % PSOUP__Q8_BLOCK != 0) ||
        !psoup__dtype_bytes(dtype, elements, &tensor.bytes))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: tensor %.200s: its shape overflows, or its rows are no whole blocks of %s",
                           writer->path, hf_name, psoup_dtype_name(dtype));
    psoup_status status = psoup__gguf_set_heads(&writer->layout, writer->path, name, hf_name, &tensor,
                                                error);
    return status == PSOUP_OK ? add(writer, name, &tensor, error) : status;
}

psoup_status psoup__gguf_add_vector(psoup__gguf_writer *writer, const char *name,
                                    const float *values, int64_t n, psoup_error *error) {
    psoup__tensor tensor = {.rank = 1, .shape = {n}, .bytes = (size_t)n * sizeof *values};
    if (writer->n_tensors > 0 && writer->tensors[writer->n_tensors - 1].own == NULL)
        return psoup__fail(error, PSOUP_ERROR_STATE, "%s: tensor %s added after others were declared",
                           writer->path, name);
    float *own = psoup__alloc(writer->context, (size_t)n, sizeof *own, error);
    if (own == NULL)
        return PSOUP_ERROR_MEMORY;
    memcpy(own, values, tensor.bytes);
    psoup_status status = add(writer, name, &tensor, error);
    if (status == PSOUP_OK)
        writer->tensors[writer->n_tensors - 1].own = own;
    else
        psoup__free(writer->context, own);
    return status;
}

/* ---- the file ----------------------------------------------------------------------------------- */

static psoup_status put(psoup__gguf_writer *writer, uint64_t value, size_t n, psoup_error *error) {
    unsigned char bytes[8];
    put_little(bytes, value, n);
    return psoup__writer_write(writer->file, bytes, n, error);
}

static psoup_status put_text(psoup__gguf_writer *writer, const char *text, psoup_error *error) {
    psoup_status status = put(writer, strlen(text), 8, error);
    return status == PSOUP_OK ? psoup__writer_write(writer->file, text, strlen(text), error) : status;
}

static psoup_status pad(psoup__gguf_writer *writer, size_t written, psoup_error *error) {
    static const char zeros[ALIGNMENT];
    size_t n = (ALIGNMENT - written % ALIGNMENT) % ALIGNMENT;
    return n == 0 ? PSOUP_OK : psoup__writer_write(writer->file, zeros, n, error);
}

/* Ends tensors that are whole; writes those of the writer's own that come next. */
static psoup_status step(psoup__gguf_writer *writer, psoup_error *error) {
    psoup_status status;
    while (writer->current < writer->n_tensors) {
        const declared *d = &writer->tensors[writer->current];
        if (d->own != NULL)
            PSOUP__TRY(psoup__writer_write(writer->file, d->own, d->tensor.bytes, error));
        else if (writer->within < d->tensor.bytes)
            return PSOUP_OK;
        PSOUP__TRY(pad(writer, d->tensor.bytes, error));
        writer->current++;
        writer->within = 0;
    }
    return PSOUP_OK;
fail:
    return status;
}

static size_t head_bytes(const psoup__tensor *tensor) {
    return tensor->heads > 0 ? tensor->bytes / (size_t)tensor->heads : 0;
}

psoup_status psoup__gguf_begin(psoup__gguf_writer *writer, psoup_error *error) {
    psoup_status status;
    uint64_t offset = 0;
    size_t length = 24, most = 0;
    writer->begun = true;
    PSOUP__TRY(put(writer, 0x46554747, 4, error)); /* "GGUF" */
    PSOUP__TRY(put(writer, 3, 4, error));
    PSOUP__TRY(put(writer, writer->n_tensors, 8, error));
    PSOUP__TRY(put(writer, writer->n_settings, 8, error));
    for (size_t i = 0; i < writer->n_settings; i++) {
        const setting *s = &writer->settings[i];
        PSOUP__TRY(put_text(writer, s->key, error));
        PSOUP__TRY(psoup__writer_write(writer->file, s->bytes, s->length, error));
        length += 8 + strlen(s->key) + s->length;
    }
    for (size_t i = 0; i < writer->n_tensors; i++) {
        const declared *d = &writer->tensors[i];
        PSOUP__TRY(put_text(writer, d->name, error));
        PSOUP__TRY(put(writer, (uint64_t)d->tensor.rank, 4, error));
        for (int j = d->tensor.rank - 1; j >= 0; j--)
            PSOUP__TRY(put(writer, (uint64_t)d->tensor.shape[j], 8, error));
        PSOUP__TRY(put(writer, (uint64_t)type_number(d->tensor.dtype), 4, error));
        PSOUP__TRY(put(writer, offset, 8, error));
        length += 8 + strlen(d->name) + 4 + 8 * (size_t)d->tensor.rank + 12;
        size_t whole;
        if (!psoup__add(d->tensor.bytes, ALIGNMENT - 1, &whole) ||
            offset + whole / ALIGNMENT * ALIGNMENT > INT64_MAX)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: tensor %s: the file grows too large",
                               writer->path, d->name);
        offset += whole / ALIGNMENT * ALIGNMENT;
        if (head_bytes(&d->tensor) > most)
            most = head_bytes(&d->tensor);
    }
    PSOUP__TRY(pad(writer, length, error));
    if (most > 0 && (writer->head = psoup__alloc(writer->context, most, 1, error)) == NULL)
        return PSOUP_ERROR_MEMORY;
    return step(writer, error);
fail:
    return status;
}

/* Takes bytes of a tensor whose rows are interleaved; a head is written when it is whole. */
static psoup_status put_heads(psoup__gguf_writer *writer, const psoup__tensor *tensor,
                              const char *data, size_t n, psoup_error *error) {
    size_t head = head_bytes(tensor), rows = (size_t)tensor->shape[0] / (size_t)tensor->heads;
    size_t row_bytes = head / rows, half = rows / 2;
    for (size_t at = writer->within; n > 0;) {
        size_t row = at % head / row_bytes, column = at % row_bytes;
        size_t take = row_bytes - column < n ? row_bytes - column : n;
        memcpy(writer->head + (2 * (row % half) + row / half) * row_bytes + column, data, take);
        data += take;
        at += take;
        n -= take;
        if (at % head == 0) {
            psoup_status status = psoup__writer_write(writer->file, writer->head, head, error);
            if (status != PSOUP_OK)
                return status;
        }
    }
    return PSOUP_OK;
}

psoup_status psoup__gguf_write(psoup__gguf_writer *writer, const void *data, size_t bytes,
                               psoup_error *error) {
    psoup_status status;
    const char *from = data;
    while (bytes > 0) {
        if (!writer->begun || writer->current == writer->n_tensors)
            return psoup__fail(error, PSOUP_ERROR_STATE, "%s: more data than was declared", writer->path);
        const psoup__tensor *tensor = &writer->tensors[writer->current].tensor;
        size_t left = tensor->bytes - writer->within, take = left < bytes ? left : bytes;
        if (tensor->heads > 0)
            PSOUP__TRY(put_heads(writer, tensor, from, take, error));
        else
            PSOUP__TRY(psoup__writer_write(writer->file, from, take, error));
        writer->within += take;
        from += take;
        bytes -= take;
        PSOUP__TRY(step(writer, error));
    }
    return PSOUP_OK;
fail:
    return status;
}

psoup_status psoup__gguf_commit(psoup__gguf_writer *writer, psoup_error *error) {
    if (!writer->begun || writer->current < writer->n_tensors)
        return psoup__fail(error, PSOUP_ERROR_STATE, "%s: tensor %s and what follows were not written",
                           writer->path,
                           writer->begun ? writer->tensors[writer->current].name : "1");
    return psoup__writer_commit(writer->file, error);
}
