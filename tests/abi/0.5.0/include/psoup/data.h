/* psoup/data.h: JSON values, JSON Lines files, and options read from JSON.
 *
 * Every file read here may be compressed: a name that ends in ".zst" is read and written through
 * Zstandard. Files are written under a temporary name, synced and renamed.
 */
#ifndef PSOUP_DATA_H
#define PSOUP_DATA_H

#include "psoup/common.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A JSON value. Values inside another are borrowed from it; a root is freed with psoup_json_free. */
typedef struct psoup_json psoup_json;

typedef enum psoup_json_type {
    PSOUP_JSON_NULL,
    PSOUP_JSON_BOOL,
    PSOUP_JSON_INTEGER,
    PSOUP_JSON_REAL,
    PSOUP_JSON_STRING,
    PSOUP_JSON_ARRAY,
    PSOUP_JSON_OBJECT
} psoup_json_type;

/* Parses `length` bytes. `name` stands for the text in messages ("config.json"). Refuses duplicate
 * keys, invalid UTF-8, trailing text and nesting deeper than 512. An integer that int64_t cannot hold is
 * read as a real. */
psoup_status psoup_json_parse(const char *text, size_t length, const char *name, psoup_json **out,
                              psoup_error *error);
psoup_status psoup_json_read(psoup_context *context, const char *path, psoup_json **out,
                             psoup_error *error);
/* Writes with two spaces of indent, keys in their order. */
psoup_status psoup_json_write(psoup_context *context, const char *path, const psoup_json *value,
                              psoup_error *error);
/* One line of text, or with indent > 0 many; NULL when out of memory. Free with psoup_text_free. */
char *psoup_json_text(const psoup_json *value, int indent);
void psoup_text_free(char *text);
void psoup_json_free(psoup_json *value);

psoup_json_type psoup_json_kind(const psoup_json *value); /* NULL counts as PSOUP_JSON_NULL */
/* Member of an object, or element of an array; NULL where there is none or value is of another kind. */
const psoup_json *psoup_json_get(const psoup_json *object, const char *key);
const psoup_json *psoup_json_at(const psoup_json *array, size_t index);
size_t psoup_json_size(const psoup_json *value); /* members or elements; 0 for other kinds */
/* Walks an object: *key NULL starts; returns the next value and sets *key, or NULL at the end. */
const psoup_json *psoup_json_next(const psoup_json *object, const char **key);
/* The value as C type, or `otherwise` where it is absent or of another kind. Integers convert to
 * reals; not the other way round. Strings are borrowed, NUL-terminated, and hold no NUL inside. */
int64_t psoup_json_integer(const psoup_json *value, int64_t otherwise);
double psoup_json_real(const psoup_json *value, double otherwise);
const char *psoup_json_string(const psoup_json *value, const char *otherwise);
int psoup_json_bool(const psoup_json *value, int otherwise);

/* Builders. A NULL argument (out of memory earlier) makes the result NULL, so that a chain needs one
 * check at its end. set and append take ownership of `value` in every case and return 0, or -1. */
psoup_json *psoup_json_new_object(void);
psoup_json *psoup_json_new_array(void);
psoup_json *psoup_json_new_string(const char *text); /* NULL when text is not UTF-8 */
psoup_json *psoup_json_new_integer(int64_t value);
psoup_json *psoup_json_new_real(double value); /* NaN and infinities become null */
psoup_json *psoup_json_new_bool(int value);
psoup_json *psoup_json_new_null(void);
psoup_json *psoup_json_copy(const psoup_json *value); /* deep */
int psoup_json_set(psoup_json *object, const char *key, psoup_json *value);
int psoup_json_append(psoup_json *array, psoup_json *value);

/* JSON Lines: one object a line; blank lines are skipped. A file whose first character is '[' is
 * read as one array of objects (the layout of the paper's released data). */
typedef struct psoup_jsonl_reader psoup_jsonl_reader;
psoup_status psoup_jsonl_open(psoup_context *context, const char *path, psoup_jsonl_reader **out,
                              psoup_error *error);
/* *row receives the next row, owned by the caller, or NULL at the end of the file. */
psoup_status psoup_jsonl_next(psoup_jsonl_reader *reader, psoup_json **row, psoup_error *error);
int64_t psoup_jsonl_line(const psoup_jsonl_reader *reader); /* of the last row, from 1 */
void psoup_jsonl_reader_free(psoup_jsonl_reader *reader);

typedef struct psoup_jsonl_writer psoup_jsonl_writer;
/* With append = 0 rows go to a temporary file until psoup_jsonl_close; freeing an unclosed writer
 * removes it. With append = 1 every row is flushed to `path` itself at once (metrics, logs; not for
 * ".zst"). */
psoup_status psoup_jsonl_create(psoup_context *context, const char *path, int append,
                                psoup_jsonl_writer **out, psoup_error *error);
psoup_status psoup_jsonl_write(psoup_jsonl_writer *writer, const psoup_json *row,
                               psoup_error *error);
psoup_status psoup_jsonl_close(psoup_jsonl_writer *writer, psoup_error *error); /* then free it */
void psoup_jsonl_writer_free(psoup_jsonl_writer *writer);

/* Named tensors to a safetensors file. Data is in memory, row-major, little-endian. */
typedef struct psoup_named_tensor {
    const char *name;
    psoup_dtype dtype;
    int32_t rank;         /* 0 … 8 */
    const int64_t *shape; /* [rank] */
    const void *data;
} psoup_named_tensor;
psoup_status psoup_safetensors_write(psoup_context *context, const char *path,
                                     const psoup_named_tensor *tensors, size_t n,
                                     psoup_error *error);

/* Option structs describe their own fields, so that a JSON file can fill them and a program can
 * print them with their defaults. */
typedef enum psoup_field_type {
    PSOUP_FIELD_INT,    /* int32_t */
    PSOUP_FIELD_UINT64, /* uint64_t */
    PSOUP_FIELD_FLOAT,  /* float */
    PSOUP_FIELD_DOUBLE, /* double */
    PSOUP_FIELD_BOOL,   /* int32_t, 0 or 1 */
    PSOUP_FIELD_STRING, /* const char *, borrowed from the JSON value */
    PSOUP_FIELD_ENUM,   /* int32_t, by name; `choices` is "linear|cosine|constant" in order from 0 */
    PSOUP_FIELD_JSON    /* const psoup_json *, any value, borrowed from the object */
} psoup_field_type;

typedef struct psoup_field {
    const char *name;
    psoup_field_type type;
    size_t offset;
    const char *choices; /* for PSOUP_FIELD_ENUM */
    const char *help;    /* one sentence, with units */
} psoup_field;

/* Fills the struct at `options` from the members of `object` that `fields` (ended by a NULL name)
 * name. A member of the wrong kind or an unknown choice is an error naming `where` and the member.
 * Members that are not in `fields` are left to the caller: see psoup_fields_check. */
psoup_status psoup_fields_read(const psoup_field *fields, const psoup_json *object,
                               const char *where, void *options, psoup_error *error);
/* Refuses a member of `object` that is in none of the `n` tables, naming it and the nearest name. */
psoup_status psoup_fields_check(const psoup_field *const *tables, size_t n,
                                const psoup_json *object, const char *where, psoup_error *error);
/* The struct's current values as a JSON object. */
psoup_json *psoup_fields_json(const psoup_field *fields, const void *options);

#ifdef __cplusplus
}
#endif
#endif
