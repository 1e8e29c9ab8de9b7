/* safetensors, read: a u64 little-endian header length, a JSON header, the tensors' bytes. Nothing in
 * the file is believed before it is checked against the file's length.
 * Format: https://github.com/huggingface/safetensors (README, "Format"). */
#include "format/format.h"

#include <stdlib.h>
#include <string.h>

#define HEADER_LIMIT 100000000u

typedef struct entry {
    const char *name; /* borrowed from the header */
    uint64_t begin, end;
    psoup__tensor tensor;
} entry;

struct psoup__safetensors {
    psoup_context *context;
    psoup__file file; /* zeros when the caller holds the bytes in memory */
    uint64_t data;    /* where in the file the tensors' bytes begin */
    psoup_json *header;
    const psoup_json *metadata;
    entry *entries; /* [count], in the order of their data */
    size_t count;
};

static const struct {
    const char *name;
    psoup_dtype dtype;
} dtypes[] = {{"F32", PSOUP_F32}, {"F16", PSOUP_F16}, {"BF16", PSOUP_BF16}, {"F64", PSOUP_F64},
              {"I8", PSOUP_I8},   {"U8", PSOUP_U8},   {"I16", PSOUP_I16},   {"I32", PSOUP_I32},
              {"I64", PSOUP_I64}, {"BOOL", PSOUP_BOOL}, {"F8_E4M3", PSOUP_F8_E4M3},
              {"F8_E5M2", PSOUP_F8_E5M2}};

static bool find_dtype(const char *name, psoup_dtype *out) {
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (strcmp(name, dtypes[i].name) == 0) {
            *out = dtypes[i].dtype;
            return true;
        }
    return false;
}

const char *psoup__safetensors_dtype_name(psoup_dtype dtype) {
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (dtypes[i].dtype == dtype)
            return dtypes[i].name;
    return NULL;
}

/* Reads {"dtype", "shape", "data_offsets"} and checks that the three agree. */
static psoup_status read_entry(const psoup_json *value, const char *path, size_t data_bytes,
                               entry *out, psoup_error *error) {
    const char *name = out->name;
    psoup__tensor *tensor = &out->tensor;
    if (psoup_json_kind(value) != PSOUP_JSON_OBJECT)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: tensor %.200s: expected an object in the header", path, name);
    const char *dtype = psoup_json_string(psoup_json_get(value, "dtype"), NULL);
    if (dtype == NULL)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: tensor %.200s: no \"dtype\"", path,
                           name);
    if (!find_dtype(dtype, &tensor->dtype))
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: tensor %.200s: dtype %.40s is not supported; expected F32, F16, "
                           "BF16, F64, I8, U8, I16, I32, I64, BOOL, F8_E4M3 or F8_E5M2",
                           path, name, dtype);

    const psoup_json *shape = psoup_json_get(value, "shape");
    size_t rank = psoup_json_size(shape);
    if (psoup_json_kind(shape) != PSOUP_JSON_ARRAY || rank > PSOUP__MAX_RANK)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: tensor %.200s: expected a \"shape\" of at most %d sizes", path,
                           name, PSOUP__MAX_RANK);
    tensor->rank = (int)rank;
    for (size_t i = 0; i < rank; i++) {
        tensor->shape[i] = psoup_json_integer(psoup_json_at(shape, i), -1);
        if (tensor->shape[i] < 0)
            return psoup__fail(error, PSOUP_ERROR_FORMAT,
                               "%s: tensor %.200s: size %zu of its shape is no natural number",
                               path, name, i);
    }
    size_t elements;
    if (!psoup__tensor_elements(tensor, &elements) ||
        !psoup__multiply(elements, psoup_dtype_size(tensor->dtype), &tensor->bytes))
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: tensor %.200s: the product of its shape overflows", path, name);

    const psoup_json *offsets = psoup_json_get(value, "data_offsets");
    int64_t begin = psoup_json_integer(psoup_json_at(offsets, 0), -1);
    int64_t end = psoup_json_integer(psoup_json_at(offsets, 1), -1);
    if (psoup_json_kind(offsets) != PSOUP_JSON_ARRAY || psoup_json_size(offsets) != 2 ||
        begin < 0 || end < begin || (uint64_t)end > data_bytes)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: tensor %.200s: its \"data_offsets\" are not two numbers within the "
                           "file's %zu bytes of data",
                           path, name, data_bytes);
    if ((uint64_t)(end - begin) != tensor->bytes)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: tensor %.200s: its offsets span %lld bytes, its dtype and shape "
                           "need %zu",
                           path, name, (long long)(end - begin), tensor->bytes);
    out->begin = (uint64_t)begin;
    out->end = (uint64_t)end;
    return PSOUP_OK;
}

static int by_offset(const void *a, const void *b) {
    const entry *x = a, *y = b;
    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    if (x->end != y->end)
        return x->end < y->end ? -1 : 1;
    return strcmp(x->name, y->name);
}

/* The length of the header, of which the file's first bytes (9, or all) are given. */
static psoup_status header_length(const unsigned char *bytes, size_t length, const char *path, size_t *out,
                                  psoup_error *error) {
    uint64_t header = 0;
    if (length < 8)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: %zu bytes are too few for a safetensors file", path, length);
    for (int i = 7; i >= 0; i--)
        header = header << 8 | bytes[i];
    if (header > HEADER_LIMIT || header > length - 8)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: the header claims %llu bytes; expected at most %zu (file is cut "
                           "short, or is no safetensors file)",
                           path, (unsigned long long)header,
                           length - 8 < HEADER_LIMIT ? length - 8 : (size_t)HEADER_LIMIT);
    if (header == 0 || bytes[8] != '{')
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: the header does not begin with '{': no safetensors file", path);
    *out = (size_t)header;
    return PSOUP_OK;
}

/* json [header]; the file has `length` bytes. */
static psoup_status read_header(psoup__safetensors *file, const char *json, size_t header, size_t length,
                                const char *path, psoup_error *error) {
    psoup_status status;
    size_t data_bytes = length - 8 - header;
    file->data = 8 + header;
    PSOUP__TRY(psoup_json_parse(json, header, path, &file->header, error));

    file->entries = psoup__alloc(file->context, psoup_json_size(file->header), sizeof(entry),
                                 error);
    if (file->entries == NULL)
        return PSOUP_ERROR_MEMORY;
    const char *key = NULL;
    for (const psoup_json *value; (value = psoup_json_next(file->header, &key)) != NULL;) {
        if (strcmp(key, "__metadata__") == 0) {
            const char *field = NULL;
            bool strings = psoup_json_kind(value) == PSOUP_JSON_OBJECT;
            for (const psoup_json *text;
                 strings && (text = psoup_json_next(value, &field)) != NULL;)
                strings = psoup_json_kind(text) == PSOUP_JSON_STRING;
            if (!strings)
                return psoup__fail(error, PSOUP_ERROR_FORMAT,
                                   "%s: __metadata__ is not an object of strings", path);
            file->metadata = value;
            continue;
        }
        entry *e = &file->entries[file->count];
        e->name = key;
        PSOUP__TRY(read_entry(value, path, data_bytes, e, error));
        e->tensor.at = file->data + e->begin;
        file->count++;
    }

    qsort(file->entries, file->count, sizeof(entry), by_offset);
    uint64_t reached = 0;
    for (size_t i = 0; i < file->count; i++) {
        const entry *e = &file->entries[i];
        if (e->begin != reached)
            return psoup__fail(error, PSOUP_ERROR_FORMAT,
                               "%s: tensor %.200s begins at byte %llu of the data, expected %llu "
                               "(%s)",
                               path, e->name, (unsigned long long)e->begin,
                               (unsigned long long)reached,
                               e->begin < reached ? "tensors overlap" : "a hole");
        reached = e->end;
    }
    if (reached != data_bytes)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: the tensors end at byte %llu of the data, the file at %zu", path,
                           (unsigned long long)reached, data_bytes);
    return PSOUP_OK;
fail:
    return status;
}

/* Gives the tensors their bytes: in memory, or (NULL) by the file. */
static void place(psoup__safetensors *file, const unsigned char *bytes) {
    const psoup__pull *pull = bytes == NULL ? psoup__file_pull(&file->file) : NULL;
    for (size_t i = 0; i < file->count; i++) {
        psoup__tensor *tensor = &file->entries[i].tensor;
        tensor->data = bytes != NULL ? bytes + tensor->at : NULL;
        tensor->pull = pull;
    }
}

psoup_status psoup__safetensors_parse(psoup_context *context, const void *data, size_t length,
                                      const char *name, psoup__safetensors **out,
                                      psoup_error *error) {
    psoup_status status;
    size_t header;
    *out = NULL;
    psoup__safetensors *file = psoup__alloc(context, 1, sizeof *file, error);
    if (file == NULL)
        return PSOUP_ERROR_MEMORY;
    file->context = context;
    PSOUP__TRY(header_length(data, length, name, &header, error));
    PSOUP__TRY(read_header(file, (const char *)data + 8, header, length, name, error));
    place(file, data);
    *out = file;
    return PSOUP_OK;
fail:
    psoup__safetensors_free(file);
    return status;
}

psoup_status psoup__safetensors_open(psoup_context *context, const char *path,
                                     psoup__safetensors **out, psoup_error *error) {
    psoup_status status;
    unsigned char first[9];
    char *text = NULL;
    size_t header;
    *out = NULL;
    psoup__safetensors *file = psoup__alloc(context, 1, sizeof *file, error);
    if (file == NULL)
        return PSOUP_ERROR_MEMORY;
    file->context = context;
    PSOUP__TRY(psoup__file_open(context, path, &file->file, error));
    const size_t length = file->file.length;
    bool whole = psoup__file_at(&file->file, 0, length < sizeof first ? length : sizeof first, first);
    if (whole) {
        PSOUP__TRY(header_length(first, length, path, &header, error));
        if ((text = psoup__alloc(context, header, 1, error)) == NULL) {
            status = PSOUP_ERROR_MEMORY;
            goto fail;
        }
        whole = psoup__file_at(&file->file, 8, header, text);
    }
    if (!whole)
        PSOUP__TRY(psoup__file_check(&file->file, "", error));
    PSOUP__TRY(read_header(file, text, header, length, path, error));
    place(file, NULL);
    psoup__free(context, text);
    *out = file;
    return PSOUP_OK;
fail:
    psoup__free(context, text);
    psoup__safetensors_free(file);
    return status;
}

psoup_status psoup__safetensors_map(psoup__safetensors *file, psoup_error *error) {
    psoup_status status = psoup__file_map(&file->file, error);
    if (status == PSOUP_OK)
        place(file, file->file.data);
    return status;
}

void psoup__safetensors_free(psoup__safetensors *file) {
    if (file == NULL)
        return;
    psoup_context *context = file->context;
    psoup__free(context, file->entries);
    psoup_json_free(file->header);
    psoup__file_close(context, &file->file);
    psoup__free(context, file);
}

size_t psoup__safetensors_count(const psoup__safetensors *file) {
    return file->count;
}

const char *psoup__safetensors_name(const psoup__safetensors *file, size_t index) {
    return file->entries[index].name;
}

const psoup__tensor *psoup__safetensors_tensor(const psoup__safetensors *file, size_t index) {
    return &file->entries[index].tensor;
}

const psoup_json *psoup__safetensors_metadata(const psoup__safetensors *file) {
    return file->metadata;
}

psoup__file *psoup__safetensors_file(psoup__safetensors *file) {
    return &file->file;
}
