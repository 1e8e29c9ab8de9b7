/* What a GGUF file holds, asked for by key and name. */
#include "format/gguf.h"

#include <string.h>

void psoup__gguf_free(psoup__gguf *file) {
    if (file == NULL)
        return;
    psoup_context *context = file->context;
    for (size_t i = 0; i < file->n_values && file->values != NULL; i++)
        psoup__free(context, (char *)(uintptr_t)file->values[i].key);
    psoup__free(context, file->values);
    psoup__free(context, file->entries);
    psoup__map_free(file->by_key);
    psoup__map_free(file->by_name);
    psoup__free(context, file->path);
    psoup__free(context, file->head);
    psoup__file_close(context, &file->file);
    psoup__free(context, file);
}

const char *psoup__gguf_path(const psoup__gguf *file) {
    return file->path;
}

psoup__file *psoup__gguf_file(psoup__gguf *file) {
    return &file->file;
}

/* ---- tensors ------------------------------------------------------------------------------------ */

size_t psoup__gguf_count(const psoup__gguf *file) {
    return file->count;
}

const char *psoup__gguf_name(const psoup__gguf *file, size_t index) {
    return file->entries[index].name;
}

const psoup__tensor *psoup__gguf_tensor(const psoup__gguf *file, size_t index) {
    return &file->entries[index].tensor;
}

const psoup__tensor *psoup__gguf_find(const psoup__gguf *file, const char *name) {
    int64_t index;
    if (!psoup__map_get(file->by_name, name, strlen(name), &index))
        return NULL;
    return &file->entries[index].tensor;
}

/* ---- metadata ----------------------------------------------------------------------------------- */

size_t psoup__gguf_values(const psoup__gguf *file) {
    return file->n_values;
}

const psoup__gguf_value *psoup__gguf_value_at(const psoup__gguf *file, size_t index) {
    return &file->values[index];
}

const psoup__gguf_value *psoup__gguf_get(const psoup__gguf *file, const char *key) {
    int64_t index;
    if (!psoup__map_get(file->by_key, key, strlen(key), &index))
        return NULL;
    return &file->values[index];
}

static uint64_t little(const unsigned char *bytes, size_t n) {
    uint64_t value = 0;
    while (n-- > 0)
        value = value << 8 | bytes[n];
    return value;
}

/* The integer at `data`; false for a type that is none, or a value above INT64_MAX. */
static bool integer_at(psoup__gguf_type type, const unsigned char *data, int64_t *out) {
    switch (type) {
    case PSOUP__GGUF_UINT8:
        *out = data[0];
        return true;
    case PSOUP__GGUF_INT8:
        *out = (int8_t)data[0];
        return true;
    case PSOUP__GGUF_UINT16:
        *out = (int64_t)little(data, 2);
        return true;
    case PSOUP__GGUF_INT16:
        *out = (int16_t)little(data, 2);
        return true;
    case PSOUP__GGUF_UINT32:
        *out = (int64_t)little(data, 4);
        return true;
    case PSOUP__GGUF_INT32:
        *out = (int32_t)little(data, 4);
        return true;
    case PSOUP__GGUF_UINT64:
    case PSOUP__GGUF_INT64:
        *out = (int64_t)little(data, 8);
        return type == PSOUP__GGUF_INT64 || *out >= 0;
    default:
        return false;
    }
}

static bool real_at(psoup__gguf_type type, const unsigned char *data, double *out) {
    int64_t integer;
    float narrow;
    if (type == PSOUP__GGUF_FLOAT32) {
        uint32_t bits = (uint32_t)little(data, 4);
        memcpy(&narrow, &bits, sizeof narrow);
        *out = (double)narrow;
        return true;
    }
    if (type == PSOUP__GGUF_FLOAT64) {
        uint64_t bits = little(data, 8);
        memcpy(out, &bits, sizeof *out);
        return true;
    }
    if (!integer_at(type, data, &integer))
        return false;
    *out = (double)integer;
    return true;
}

int64_t psoup__gguf_integer(const psoup__gguf *file, const char *key, int64_t otherwise) {
    const psoup__gguf_value *value = psoup__gguf_get(file, key);
    int64_t out;
    return value != NULL && integer_at(value->type, value->data, &out) ? out : otherwise;
}

double psoup__gguf_real(const psoup__gguf *file, const char *key, double otherwise) {
    const psoup__gguf_value *value = psoup__gguf_get(file, key);
    double out;
    return value != NULL && real_at(value->type, value->data, &out) ? out : otherwise;
}

bool psoup__gguf_bool(const psoup__gguf *file, const char *key, bool otherwise) {
    const psoup__gguf_value *value = psoup__gguf_get(file, key);
    return value != NULL && value->type == PSOUP__GGUF_BOOL ? value->data[0] != 0 : otherwise;
}

bool psoup__gguf_string(const psoup__gguf *file, const char *key, const char **text,
                        size_t *length) {
    const psoup__gguf_value *value = psoup__gguf_get(file, key);
    if (value == NULL || value->type != PSOUP__GGUF_STRING)
        return false;
    const unsigned char *at = value->data;
    psoup__gguf_next_string(&at, text, length);
    return true;
}

bool psoup__gguf_is(const psoup__gguf *file, const char *key, const char *text) {
    const char *found;
    size_t length;
    return psoup__gguf_string(file, key, &found, &length) && length == strlen(text) &&
           memcmp(found, text, length) == 0;
}

void psoup__gguf_next_string(const unsigned char **at, const char **text, size_t *length) {
    *length = (size_t)little(*at, 8);
    *text = (const char *)*at + 8;
    *at += 8 + *length;
}

double psoup__gguf_number(const psoup__gguf_value *array, size_t i) {
    double out = 0;
    real_at(array->element, array->data + i * (array->bytes / array->count), &out);
    return out;
}
