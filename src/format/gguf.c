/* GGUF, read: a header of counts, key-value metadata, tensor infos, then the tensors' data. Nothing in
 * the file is believed before it is checked against the file's length.
 * Format: ggml, docs/gguf.md; the types' numbers: ggml/include/ggml.h. */
#include "format/gguf.h"

#include <stdlib.h>
#include <string.h>

enum {
    MAX_DEPTH = 4,       /* of arrays in arrays */
    MAX_DIMENSIONS = 4,  /* as ggml */
    MAX_KEY = 65535,
    LEAST_VALUE = 13,    /* bytes of the shortest key and value: length, type, one byte */
    LEAST_TENSOR = 24,   /* of the shortest tensor info */
    MOST = 1 << 20,      /* values, tensors */
    FIRST_HEAD = 1 << 16, /* bytes read before it is known how many stand before the data */
    MOST_HEAD = 1 << 28
};

/* What is still to be read. */
typedef struct reader {
    const unsigned char *at;
    size_t left, begin; /* begin: the file's length */
    size_t have; /* of `left`, in memory: */
    bool more;   /* these were too few, which is no error yet */
    const char *path;
    psoup_error *error;
} reader;

static const struct {
    size_t size;
    const char *name;
} value_types[PSOUP__GGUF_TYPES] = {
    [PSOUP__GGUF_UINT8] = {1, "uint8"},     [PSOUP__GGUF_INT8] = {1, "int8"},
    [PSOUP__GGUF_UINT16] = {2, "uint16"},   [PSOUP__GGUF_INT16] = {2, "int16"},
    [PSOUP__GGUF_UINT32] = {4, "uint32"},   [PSOUP__GGUF_INT32] = {4, "int32"},
    [PSOUP__GGUF_FLOAT32] = {4, "float32"}, [PSOUP__GGUF_BOOL] = {1, "bool"},
    [PSOUP__GGUF_STRING] = {0, "string"},   [PSOUP__GGUF_ARRAY] = {0, "array"},
    [PSOUP__GGUF_UINT64] = {8, "uint64"},   [PSOUP__GGUF_INT64] = {8, "int64"},
    [PSOUP__GGUF_FLOAT64] = {8, "float64"},
};

/* The types of tensors by ggml's numbers; NULL was removed or never was. */
static const char *const tensor_types[] = {
    "F32", "F16", "Q4_0", "Q4_1", NULL, NULL, "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K",
    "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S",
    "IQ4_XS", "I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16", NULL, NULL, NULL, "TQ1_0", "TQ2_0",
    NULL, NULL, NULL, "MXFP4"};

static uint64_t little(const unsigned char *bytes, size_t n) {
    uint64_t value = 0;
    while (n-- > 0)
        value = value << 8 | bytes[n];
    return value;
}

static psoup_status cut_short(const reader *r, const char *what) {
    return psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                       "%s: the file ends at byte %zu, within %s (it is cut short, or no GGUF file)",
                       r->path, r->begin, what);
}

/* Passes over n bytes that the file has. */
static psoup_status step(reader *r, size_t n) {
    if (r->have < n) {
        r->more = true;
        return PSOUP_ERROR_STATE;
    }
    r->at += n;
    r->left -= n;
    r->have -= n;
    return PSOUP_OK;
}

static psoup_status take(reader *r, size_t n, const char *what, uint64_t *value) {
    const unsigned char *at = r->at;
    *value = 0;
    if (r->left < n)
        return cut_short(r, what);
    psoup_status status = step(r, n);
    if (status == PSOUP_OK)
        *value = little(at, n);
    return status;
}

/* A u64 length and so many bytes. */
static psoup_status take_text(reader *r, const char *what, const char **text, size_t *length) {
    uint64_t n;
    psoup_status status = take(r, 8, what, &n);
    if (status != PSOUP_OK)
        return status;
    if (n > r->left)
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                           "%s: %s claims %llu bytes at byte %zu; the file has %zu more", r->path,
                           what, (unsigned long long)n, r->begin - r->left, r->left);
    *text = (const char *)r->at;
    *length = (size_t)n;
    return step(r, (size_t)n);
}

/* ---- metadata ----------------------------------------------------------------------------------- */

static psoup_status check_bools(const reader *r, const char *key, const unsigned char *data,
                                size_t n) {
    for (size_t i = 0; i < n; i++)
        if (data[i] > 1)
            return psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                               "%s: %.200s: a bool is %d; expected 0 or 1", r->path, key, data[i]);
    return PSOUP_OK;
}

static psoup_status take_type(reader *r, const char *key, psoup__gguf_type *type) {
    uint64_t number;
    psoup_status status = take(r, 4, "a value's type", &number);
    if (status == PSOUP_OK && number >= PSOUP__GGUF_TYPES)
        status = psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                             "%s: %.200s: value type %llu; expected 0 to %d", r->path, key,
                             (unsigned long long)number, PSOUP__GGUF_TYPES - 1);
    if (status == PSOUP_OK)
        *type = (psoup__gguf_type)number;
    return status;
}

/* Passes over `count` values of a type. Every element takes at least a byte, so the loops end with the
 * file. */
static psoup_status pass(reader *r, const char *key, psoup__gguf_type type, uint64_t count,
                         int depth) {
    psoup_status status = PSOUP_OK;
    size_t size = value_types[type].size;
    if (size > 0) {
        const unsigned char *data = r->at;
        if (count > r->left / size)
            return psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                               "%s: %.200s: %llu values of type %s at byte %zu; the file has %zu bytes "
                               "more",
                               r->path, key, (unsigned long long)count, value_types[type].name,
                               r->begin - r->left, r->left);
        status = step(r, (size_t)count * size);
        return status == PSOUP_OK && type == PSOUP__GGUF_BOOL ? check_bools(r, key, data, (size_t)count)
                                                              : status;
    }
    if (type == PSOUP__GGUF_ARRAY && depth == MAX_DEPTH)
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                           "%s: %.200s: arrays are nested deeper than %d", r->path, key, MAX_DEPTH);
    for (uint64_t i = 0; i < count && status == PSOUP_OK; i++) {
        const char *text;
        size_t length;
        psoup__gguf_type element = PSOUP__GGUF_UINT8;
        uint64_t n = 0;
        if (type == PSOUP__GGUF_STRING) {
            status = take_text(r, key, &text, &length);
            continue;
        }
        status = take_type(r, key, &element);
        if (status == PSOUP_OK)
            status = take(r, 8, "an array's length", &n);
        if (status == PSOUP_OK)
            status = pass(r, key, element, n, depth + 1);
    }
    return status;
}

static psoup_status read_value(psoup__gguf *file, reader *r, psoup__gguf_value *value) {
    psoup_status status;
    const char *key;
    size_t length;
    uint64_t count = 1;
    bool fresh;
    PSOUP__TRY(take_text(r, "a key", &key, &length));
    if (length == 0 || length > MAX_KEY || memchr(key, '\0', length) != NULL)
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                           "%s: a key of %zu bytes before byte %zu; expected 1 to %d without a NUL",
                           r->path, length, r->begin - r->left, MAX_KEY);
    char *kept = psoup__alloc(file->context, length + 1, 1, r->error);
    if (kept == NULL)
        return PSOUP_ERROR_MEMORY;
    value->key = memcpy(kept, key, length);
    if (!psoup__is_utf8(kept))
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT, "%s: the key %.200s is not UTF-8 text",
                           r->path, kept);
    PSOUP__TRY(psoup__map_set(file->by_key, kept, length, (int64_t)(value - file->values), &fresh,
                              r->error));
    if (!fresh)
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT, "%s: the key %.200s is there twice",
                           r->path, kept);
    PSOUP__TRY(take_type(r, kept, &value->type));
    value->element = value->type;
    if (value->type == PSOUP__GGUF_ARRAY) {
        PSOUP__TRY(take_type(r, kept, &value->element));
        PSOUP__TRY(take(r, 8, "an array's length", &count));
    }
    value->data = r->at;
    PSOUP__TRY(pass(r, kept, value->element, count, value->type == PSOUP__GGUF_ARRAY));
    value->count = (size_t)count;
    value->bytes = (size_t)(r->at - value->data);
    return PSOUP_OK;
fail:
    return status;
}

/* ---- tensors ------------------------------------------------------------------------------------ */

static psoup_status read_type(const reader *r, const char *name, uint64_t type, psoup_dtype *out) {
    static const struct {
        uint64_t type;
        psoup_dtype dtype;
    } known[] = {{0, PSOUP_F32}, {1, PSOUP_F16}, {8, PSOUP_Q8_0}, {30, PSOUP_BF16}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].type == type) {
            *out = known[i].dtype;
            return PSOUP_OK;
        }
    const char *text = type < sizeof tensor_types / sizeof *tensor_types ? tensor_types[type] : NULL;
    if (text == NULL)
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT, "%s: tensor %s: type %llu is unknown",
                           r->path, name, (unsigned long long)type);
    return psoup__fail(r->error, PSOUP_ERROR_UNSUPPORTED,
                       "%s: tensor %s: type %s is not supported; expected F32, F16, BF16 or Q8_0",
                       r->path, name, text);
}

static psoup_status read_info(psoup__gguf *file, reader *r, psoup__gguf_entry *e,
                              uint64_t alignment) {
    psoup_status status;
    const char *name;
    size_t length, elements;
    uint64_t dimensions, size, type;
    bool fresh;
    psoup__tensor *tensor = &e->tensor;
    PSOUP__TRY(take_text(r, "a tensor's name", &name, &length));
    if (length == 0 || length > PSOUP__GGUF_MAX_NAME || memchr(name, '\0', length) != NULL)
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                           "%s: a tensor's name has %zu bytes; expected 1 to %d without a NUL", r->path,
                           length, PSOUP__GGUF_MAX_NAME);
    memcpy(e->name, name, length);
    if (!psoup__is_utf8(e->name))
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT, "%s: tensor %s: the name is not UTF-8 text",
                           r->path, e->name);
    PSOUP__TRY(psoup__map_set(file->by_name, e->name, length, (int64_t)(e - file->entries), &fresh,
                              r->error));
    if (!fresh)
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT, "%s: tensor %s is there twice", r->path,
                           e->name);
    PSOUP__TRY(take(r, 4, "a tensor's dimensions", &dimensions));
    if (dimensions > MAX_DIMENSIONS)
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                           "%s: tensor %s has %llu dimensions; expected at most %d", r->path, e->name,
                           (unsigned long long)dimensions, MAX_DIMENSIONS);
    tensor->rank = (int)dimensions;
    for (int i = tensor->rank - 1; i >= 0; i--) { /* the fastest first there, last here */
        PSOUP__TRY(take(r, 8, "a tensor's dimensions", &size));
        if (size > INT64_MAX)
            return psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                               "%s: tensor %s: a dimension of %llu is too large", r->path, e->name,
                               (unsigned long long)size);
        tensor->shape[i] = (int64_t)size;
    }
    PSOUP__TRY(take(r, 4, "a tensor's type", &type));
    PSOUP__TRY(take(r, 8, "a tensor's offset", &e->offset));
    PSOUP__TRY(read_type(r, e->name, type, &tensor->dtype));
    int64_t row = tensor->rank > 0 ? tensor->shape[tensor->rank - 1] : 1;
    if (tensor->dtype == PSOUP_Q8_0 && row % PSOUP__Q8_BLOCK != 0)
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                           "%s: tensor %s: rows of %lld values are no whole blocks of %d", r->path,
                           e->name, (long long)row, PSOUP__Q8_BLOCK);
    if (!psoup__tensor_elements(tensor, &elements) ||
        !psoup__dtype_bytes(tensor->dtype, elements, &tensor->bytes))
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                           "%s: tensor %s: the product of its dimensions overflows", r->path, e->name);
    if (e->offset % alignment != 0)
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                           "%s: tensor %s: offset %llu is no multiple of the alignment %llu", r->path,
                           e->name, (unsigned long long)e->offset, (unsigned long long)alignment);
    return PSOUP_OK;
fail:
    return status;
}

static int by_offset(const void *a, const void *b) {
    const psoup__gguf_entry *x = *(const psoup__gguf_entry *const *)a;
    const psoup__gguf_entry *y = *(const psoup__gguf_entry *const *)b;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return x->tensor.bytes < y->tensor.bytes ? -1 : x->tensor.bytes > y->tensor.bytes;
}

/* Gives every tensor its data, after the infos and their padding; all within the file, none shared. */
static psoup_status place(psoup__gguf *file, reader *r, uint64_t alignment) {
    psoup_status status = PSOUP_OK;
    uint64_t passed = r->begin - r->left, padding = (alignment - passed % alignment) % alignment;
    if (file->count == 0)
        return PSOUP_OK;
    const psoup__gguf_entry **order =
        psoup__alloc(file->context, file->count, sizeof *order, r->error);
    if (order == NULL)
        return PSOUP_ERROR_MEMORY;
    if (padding > r->left) {
        status = cut_short(r, "the padding before the tensors' data");
        goto fail;
    }
    size_t length = r->left - (size_t)padding;
    for (size_t i = 0; i < file->count; i++) {
        psoup__gguf_entry *e = &file->entries[i];
        if (e->offset > length || e->tensor.bytes > length - e->offset) {
            status = psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                                 "%s: tensor %s: %zu bytes from offset %llu; the file has %zu bytes of "
                                 "data",
                                 r->path, e->name, e->tensor.bytes, (unsigned long long)e->offset,
                                 length);
            goto fail;
        }
        e->tensor.at = passed + padding + e->offset;
        order[i] = e;
    }
    qsort(order, file->count, sizeof *order, by_offset);
    for (size_t i = 1; i < file->count; i++)
        if (order[i - 1]->offset + order[i - 1]->tensor.bytes > order[i]->offset) {
            status = psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                                 "%s: the tensors %s and %s share bytes", r->path, order[i - 1]->name,
                                 order[i]->name);
            goto fail;
        }
fail:
    psoup__free(file->context, order);
    return status;
}

/* ---- the file ----------------------------------------------------------------------------------- */

static psoup_status read_counts(reader *r, uint64_t *tensors, uint64_t *values) {
    psoup_status status;
    uint64_t magic, version;
    PSOUP__TRY(take(r, 4, "the header", &magic));
    if (magic != 0x46554747) /* "GGUF" */
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT, "%s: does not begin with \"GGUF\"", r->path);
    PSOUP__TRY(take(r, 4, "the header", &version));
    if ((version & 0xffff) == 0 && version != 0)
        return psoup__fail(r->error, PSOUP_ERROR_UNSUPPORTED, "%s: is a big-endian GGUF file", r->path);
    if (version != 2 && version != 3)
        return psoup__fail(r->error, PSOUP_ERROR_UNSUPPORTED, "%s: GGUF version %llu; expected 2 or 3",
                           r->path, (unsigned long long)version);
    PSOUP__TRY(take(r, 8, "the header", tensors));
    PSOUP__TRY(take(r, 8, "the header", values));
    if (*values > r->left / LEAST_VALUE || *tensors > r->left / LEAST_TENSOR)
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                           "%s: the header claims %llu values and %llu tensors, more than %zu bytes hold",
                           r->path, (unsigned long long)*values, (unsigned long long)*tensors, r->left);
    if (*values > MOST || *tensors > MOST) /* a file's holes take no place on the disk, its entries do here */
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                           "%s: the header claims %llu values and %llu tensors; expected at most %d of each",
                           r->path, (unsigned long long)*values, (unsigned long long)*tensors, MOST);
    return PSOUP_OK;
fail:
    return status;
}

static psoup_status read_alignment(const psoup__gguf *file, const reader *r, uint64_t *out) {
    const psoup__gguf_value *value = psoup__gguf_get(file, "general.alignment");
    *out = 32;
    if (value == NULL)
        return PSOUP_OK;
    *out = value->type == PSOUP__GGUF_UINT32 ? little(value->data, 4) : 0;
    if (*out == 0 || (*out & (*out - 1)) != 0)
        return psoup__fail(r->error, PSOUP_ERROR_FORMAT,
                           "%s: general.alignment: expected a power of two of type uint32", r->path);
    return PSOUP_OK;
}

static psoup_status parse(psoup_context *context, reader *r, psoup__gguf **out) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    psoup_error *error = r->error;
    uint64_t tensors = 0, values = 0, alignment;
    *out = NULL;
    psoup__gguf *file = psoup__alloc(context, 1, sizeof *file, error);
    if (file == NULL)
        return PSOUP_ERROR_MEMORY;
    file->context = context;
    if ((file->path = psoup__strdup(context, r->path, error)) == NULL)
        goto fail;
    PSOUP__TRY(read_counts(r, &tensors, &values));
    PSOUP__TRY(psoup__map_create(context, 64, &file->by_key, error));
    PSOUP__TRY(psoup__map_create(context, 64, &file->by_name, error));
    status = PSOUP_ERROR_MEMORY;
    if ((file->values = psoup__alloc(context, (size_t)values, sizeof *file->values, error)) == NULL ||
        (file->entries = psoup__alloc(context, (size_t)tensors, sizeof *file->entries, error)) == NULL)
        goto fail;
    file->n_values = (size_t)values;
    for (size_t i = 0; i < file->n_values; i++)
        PSOUP__TRY(read_value(file, r, &file->values[i]));
    PSOUP__TRY(read_alignment(file, r, &alignment));
    file->count = (size_t)tensors;
    for (size_t i = 0; i < file->count; i++)
        PSOUP__TRY(read_info(file, r, &file->entries[i], alignment));
    PSOUP__TRY(place(file, r, alignment));
    if (psoup__gguf_integer(file, "split.count", 1) > 1) {
        status = psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                             "%s: is one part of %lld; join them with llama-gguf-split --merge", r->path,
                             (long long)psoup__gguf_integer(file, "split.count", 1));
        goto fail;
    }
    *out = file;
    return PSOUP_OK;
fail:
    psoup__gguf_free(file);
    return status;
}

/* Gives the tensors their bytes: in memory, or (NULL) by the file. */
static void give(psoup__gguf *file, const unsigned char *bytes) {
    const psoup__pull *pull = bytes == NULL ? psoup__file_pull(&file->file) : NULL;
    for (size_t i = 0; i < file->count; i++) {
        psoup__tensor *tensor = &file->entries[i].tensor;
        tensor->data = bytes != NULL ? bytes + tensor->at : NULL;
        tensor->pull = pull;
    }
}

psoup_status psoup__gguf_parse(psoup_context *context, const void *data, size_t length,
                               const char *name, psoup__gguf **out, psoup_error *error) {
    reader r = {.at = data, .left = length, .begin = length, .have = length, .path = name, .error = error};
    psoup_status status = parse(context, &r, out);
    if (status == PSOUP_OK)
        give(*out, data);
    return status;
}

/* How much stands before the data shows on the way: more is read until it is enough, and then what is needed. */
psoup_status psoup__gguf_open(psoup_context *context, const char *path, psoup__gguf **out,
                              psoup_error *error) {
    psoup_status status;
    psoup__file file = {0};
    unsigned char *head = NULL;
    size_t size = FIRST_HEAD;
    *out = NULL;
    PSOUP__TRY(psoup__file_open(context, path, &file, error));
    for (;;) {
        size = size < file.length ? size : file.length;
        psoup__free(context, head);
        if ((head = psoup__alloc(context, size, 1, error)) == NULL) {
            status = PSOUP_ERROR_MEMORY;
            goto fail;
        }
        if (!psoup__file_at(&file, 0, size, head))
            PSOUP__TRY(psoup__file_check(&file, "", error));
        reader r = {.at = head, .left = file.length, .begin = file.length, .have = size, .path = path,
                    .error = error};
        status = parse(context, &r, out);
        size_t used = r.begin - r.left;
        if (status == PSOUP_OK && size - used < FIRST_HEAD)
            break;
        psoup__gguf_free(*out);
        *out = NULL;
        if (status == PSOUP_OK) {
            size = used;
        } else if (r.more && size < MOST_HEAD) {
            size *= 8;
        } else {
            if (r.more)
                status = psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                                     "%s: more than %d bytes stand before the tensors' data", path, MOST_HEAD);
            goto fail;
        }
    }
    (*out)->file = file;
    (*out)->head = head;
    give(*out, NULL);
    return PSOUP_OK;
fail:
    psoup__free(context, head);
    psoup__file_close(context, &file);
    return status;
}

psoup_status psoup__gguf_map(psoup__gguf *file, psoup_error *error) {
    psoup_status status = psoup__file_map(&file->file, error);
    if (status == PSOUP_OK)
        give(file, file->file.data);
    return status;
}

size_t psoup__gguf_offset(const psoup__gguf *file, const char *text) {
    return (size_t)((const unsigned char *)text - file->head);
}
