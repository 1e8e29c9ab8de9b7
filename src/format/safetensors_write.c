/* safetensors, written: the header is known before the first byte of data, which is then streamed. */
#include "format/format.h"

#include <string.h>

struct psoup__safetensors_writer {
    psoup_context *context;
    psoup__writer *file;
    psoup_json *header;
    psoup_json *metadata; /* inside the header */
    char *path;
    size_t declared, written; /* bytes of data */
    bool begun;
};

psoup_status psoup__safetensors_create(psoup_context *context, const char *path,
                                       psoup__safetensors_writer **out, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    *out = NULL;
    psoup__safetensors_writer *writer = psoup__alloc(context, 1, sizeof *writer, error);
    if (writer == NULL)
        return PSOUP_ERROR_MEMORY;
    writer->context = context;
    writer->path = psoup__strdup(context, path, error);
    if (writer->path == NULL)
        goto fail;
    writer->header = psoup_json_new_object();
    writer->metadata = psoup_json_new_object();
    /* transformers refuses a file whose metadata does not name the framework. */
    if (writer->header == NULL || writer->metadata == NULL ||
        psoup_json_set(writer->metadata, "format", psoup_json_new_string("pt")) != 0) {
        psoup_json_free(writer->metadata);
        status = psoup__out_of_memory(error, sizeof *writer);
        goto fail;
    }
    if (psoup_json_set(writer->header, "__metadata__", writer->metadata) != 0) {
        status = psoup__out_of_memory(error, sizeof *writer);
        goto fail;
    }
    PSOUP__TRY(psoup__writer_create(context, path, &writer->file, error));
    *out = writer;
    return PSOUP_OK;
fail:
    psoup__safetensors_writer_free(writer);
    return status;
}

psoup_status psoup__safetensors_metadata_set(psoup__safetensors_writer *writer, const char *key,
                                             const char *value, psoup_error *error) {
    if (writer->begun)
        return psoup__fail(error, PSOUP_ERROR_STATE, "%s: metadata after the header was written",
                           writer->path);
    if (!psoup__is_utf8(key) || !psoup__is_utf8(value))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: metadata %.100s is not UTF-8 text",
                           writer->path, key);
    return psoup_json_set(writer->metadata, key, psoup_json_new_string(value)) == 0
               ? PSOUP_OK
               : psoup__out_of_memory(error, strlen(value));
}

psoup_status psoup__safetensors_declare(psoup__safetensors_writer *writer, const char *name,
                                        psoup_dtype dtype, int rank, const int64_t *shape,
                                        psoup_error *error) {
    psoup__tensor tensor = {.dtype = dtype, .rank = rank};
    size_t elements, bytes, end;
    const char *dtype_name = psoup__safetensors_dtype_name(dtype);
    if (!psoup__is_utf8(name))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: tensor %.200s: the name is not UTF-8 text", writer->path, name);
    if (writer->begun || psoup_json_get(writer->header, name) != NULL)
        return psoup__fail(error, PSOUP_ERROR_STATE, "%s: tensor %.200s declared %s", writer->path,
                           name, writer->begun ? "after the header was written" : "twice");
    if (dtype_name == NULL || rank < 0 || rank > PSOUP__MAX_RANK)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: tensor %.200s: dtype %d of rank %d cannot be written",
                           writer->path, name, (int)dtype, rank);
    if (rank > 0)
        memcpy(tensor.shape, shape, (size_t)rank * sizeof *shape);
    if (!psoup__tensor_elements(&tensor, &elements) ||
        !psoup__multiply(elements, psoup_dtype_size(dtype), &bytes) ||
        !psoup__add(writer->declared, bytes, &end) || end > INT64_MAX)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: tensor %.200s: the product of its shape overflows", writer->path,
                           name);

    psoup_json *object = psoup_json_new_object();
    psoup_json *sizes = psoup_json_new_array();
    psoup_json *offsets = psoup_json_new_array();
    int failed = 0;
    for (int i = 0; i < rank; i++)
        failed |= psoup_json_append(sizes, psoup_json_new_integer(shape[i]));
    failed |= psoup_json_append(offsets, psoup_json_new_integer((int64_t)writer->declared));
    failed |= psoup_json_append(offsets, psoup_json_new_integer((int64_t)end));
    failed |= psoup_json_set(object, "dtype", psoup_json_new_string(dtype_name));
    failed |= psoup_json_set(object, "shape", sizes);
    failed |= psoup_json_set(object, "data_offsets", offsets);
    if (failed) {
        psoup_json_free(object);
        return psoup__out_of_memory(error, 256);
    }
    if (psoup_json_set(writer->header, name, object) != 0)
        return psoup__out_of_memory(error, 256);
    writer->declared = end;
    return PSOUP_OK;
}

psoup_status psoup__safetensors_begin(psoup__safetensors_writer *writer, psoup_error *error) {
    psoup_status status;
    static const char spaces[8] = {' ', ' ', ' ', ' ', ' ', ' ', ' ', ' '};
    unsigned char length[8];
    char *text = psoup_json_text(writer->header, 0);
    if (text == NULL)
        return psoup__out_of_memory(error, 0);
    size_t bytes = strlen(text), padding = (8 - bytes % 8) % 8;
    for (int i = 0; i < 8; i++)
        length[i] = (unsigned char)((uint64_t)(bytes + padding) >> (8 * i));
    writer->begun = true;
    PSOUP__TRY(psoup__writer_write(writer->file, length, 8, error));
    PSOUP__TRY(psoup__writer_write(writer->file, text, bytes, error));
    PSOUP__TRY(psoup__writer_write(writer->file, spaces, padding, error));
fail:
    psoup_text_free(text);
    return status;
}

psoup_status psoup__safetensors_write(psoup__safetensors_writer *writer, const void *data,
                                      size_t bytes, psoup_error *error) {
    if (!writer->begun || bytes > writer->declared - writer->written)
        return psoup__fail(error, PSOUP_ERROR_STATE, "%s: more data than was declared",
                           writer->path);
    writer->written += bytes;
    return bytes == 0 ? PSOUP_OK : psoup__writer_write(writer->file, data, bytes, error);
}

psoup_status psoup__safetensors_commit(psoup__safetensors_writer *writer, psoup_error *error) {
    if (!writer->begun || writer->written != writer->declared)
        return psoup__fail(error, PSOUP_ERROR_STATE,
                           "%s: %zu bytes were written, %zu were declared", writer->path,
                           writer->written, writer->declared);
    return psoup__writer_commit(writer->file, error);
}

void psoup__safetensors_writer_free(psoup__safetensors_writer *writer) {
    if (writer == NULL)
        return;
    psoup_context *context = writer->context;
    psoup__writer_free(writer->file);
    psoup_json_free(writer->header);
    psoup__free(context, writer->path);
    psoup__free(context, writer);
}
