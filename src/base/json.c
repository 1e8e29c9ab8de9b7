/* src/base/json.c: the one file that knows the JSON library (Jansson). A psoup_json is a json_t. */
#include "base/internal.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SCALAR = 512 };
static const size_t FILE_LIMIT = (size_t)1 << 29;

static json_t *of(const psoup_json *value) {
    return (json_t *)value;
}

static psoup_json *as(json_t *value) {
    return (psoup_json *)value;
}

/* ---- reading ----------------------------------------------------------------------------- */

psoup_status psoup_json_parse(const char *text, size_t length, const char *name, psoup_json **out,
                              psoup_error *error) {
    return psoup__json_parse_at(text != NULL ? text : "", length, name != NULL ? name : "JSON", 1,
                                out, error);
}

psoup_status psoup_json_read(psoup_context *context, const char *path, psoup_json **out,
                             psoup_error *error) {
    char *text;
    size_t length;
    *out = NULL;
    psoup_status status = psoup__file_read(context, path, FILE_LIMIT, &text, &length, error);
    if (status != PSOUP_OK)
        return status;
    status = psoup__json_parse_at(text, length, path, 1, out, error);
    psoup__free(context, text);
    return status;
}

/* ---- writing ----------------------------------------------------------------------------- */

/* Digits that bring the same double back. Print and read in one locale, whatever its comma. */
static size_t digits_of(double value) {
    char text[64];
    for (int digits = 15; digits < 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value)
            return (size_t)digits;
    }
    return 17;
}

static void print_scalar(psoup__buffer *out, const json_t *value) {
    char small[SCALAR];
    size_t flags = JSON_ENCODE_ANY;
    if (json_is_real(value))
        flags |= JSON_REAL_PRECISION(digits_of(json_real_value(value)));
    size_t length = json_dumpb(value, small, sizeof small, flags);
    if (length <= sizeof small) {
        psoup__buffer_append(out, small, length);
        out->failed |= length == 0;
        return;
    }
    char *large = psoup__alloc(out->context, length, 1, NULL);
    if (large == NULL || json_dumpb(value, large, length, flags) != length)
        out->failed = true;
    else
        psoup__buffer_append(out, large, length);
    psoup__free(out->context, large);
}

static void print_string(psoup__buffer *out, const char *text) {
    json_t *value = json_string(text);
    if (value == NULL)
        out->failed = true;
    else
        print_scalar(out, value);
    json_decref(value);
}

static void print_break(psoup__buffer *out, int indent, int depth) {
    if (indent > 0)
        psoup__buffer_print(out, "\n%*s", indent * depth, "");
}

static void print_value(psoup__buffer *out, json_t *value, int indent, int depth) {
    const char *comma = indent > 0 ? "," : ", ";
    bool first = true;
    if (out->failed)
        return;
    if (json_is_array(value)) {
        psoup__buffer_print(out, "[");
        for (size_t i = 0; i < json_array_size(value); i++, first = false) {
            psoup__buffer_print(out, "%s", first ? "" : comma);
            print_break(out, indent, depth + 1);
            print_value(out, json_array_get(value, i), indent, depth + 1);
        }
        if (!first)
            print_break(out, indent, depth);
        psoup__buffer_print(out, "]");
    } else if (json_is_object(value)) {
        const char *key;
        json_t *member;
        psoup__buffer_print(out, "{");
        json_object_foreach(value, key, member) {
            psoup__buffer_print(out, "%s", first ? "" : comma);
            print_break(out, indent, depth + 1);
            print_string(out, key);
            psoup__buffer_print(out, ": ");
            print_value(out, member, indent, depth + 1);
            first = false;
        }
        if (!first)
            print_break(out, indent, depth);
        psoup__buffer_print(out, "}");
    } else if (value == NULL) {
        psoup__buffer_print(out, "null");
    } else {
        print_scalar(out, value);
    }
}

char *psoup_json_text(const psoup_json *value, int indent) {
    psoup__buffer out = {0};
    print_value(&out, of(value), indent, 0);
    if (!out.failed)
        return out.data;
    psoup__buffer_free(&out);
    return NULL;
}

void psoup_text_free(char *text) {
    psoup__free(NULL, text);
}

psoup_status psoup_json_write(psoup_context *context, const char *path, const psoup_json *value,
                              psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__writer *writer = NULL;
    psoup__buffer text = {.context = context};
    if (value == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: no JSON value to write: memory was out, or a text was not UTF-8",
                           path);
    print_value(&text, of(value), 2, 0);
    psoup__buffer_print(&text, "\n");
    if (text.failed) {
        status = psoup__fail(error, PSOUP_ERROR_MEMORY, "%s: out of memory for its JSON", path);
        goto fail;
    }
    PSOUP__TRY(psoup__writer_create(context, path, &writer, error));
    PSOUP__TRY(psoup__writer_write(writer, text.data, text.length, error));
    PSOUP__TRY(psoup__writer_commit(writer, error));
fail:
    psoup__writer_free(writer);
    psoup__buffer_free(&text);
    return status;
}

/* ---- looking ----------------------------------------------------------------------------- */

void psoup_json_free(psoup_json *value) {
    json_decref(of(value));
}

psoup_json_type psoup_json_kind(const psoup_json *value) {
    switch (value == NULL ? JSON_NULL : json_typeof(of(value))) {
    case JSON_OBJECT:
        return PSOUP_JSON_OBJECT;
    case JSON_ARRAY:
        return PSOUP_JSON_ARRAY;
    case JSON_STRING:
        return PSOUP_JSON_STRING;
    case JSON_INTEGER:
        return PSOUP_JSON_INTEGER;
    case JSON_REAL:
        return PSOUP_JSON_REAL;
    case JSON_TRUE:
    case JSON_FALSE:
        return PSOUP_JSON_BOOL;
    case JSON_NULL:
        break;
    }
    return PSOUP_JSON_NULL;
}

const char *psoup__json_kind_name(const psoup_json *value) {
    static const char *const names[] = {"null",     "a truth value", "an integer", "a real number",
                                        "a string", "an array",      "an object"};
    return names[psoup_json_kind(value)];
}

const psoup_json *psoup_json_get(const psoup_json *object, const char *key) {
    return as(json_object_get(of(object), key));
}

const psoup_json *psoup_json_at(const psoup_json *array, size_t index) {
    return as(json_array_get(of(array), index));
}

size_t psoup_json_size(const psoup_json *value) {
    return json_is_object(of(value)) ? json_object_size(of(value)) : json_array_size(of(value));
}

const psoup_json *psoup_json_next(const psoup_json *object, const char **key) {
    void *at = *key == NULL ? json_object_iter(of(object))
                            : json_object_iter_next(of(object), json_object_key_to_iter(*key));
    *key = at == NULL ? NULL : json_object_iter_key(at);
    return at == NULL ? NULL : as(json_object_iter_value(at));
}

int64_t psoup_json_integer(const psoup_json *value, int64_t otherwise) {
    return json_is_integer(of(value)) ? (int64_t)json_integer_value(of(value)) : otherwise;
}

double psoup_json_real(const psoup_json *value, double otherwise) {
    return json_is_number(of(value)) ? json_number_value(of(value)) : otherwise;
}

const char *psoup_json_string(const psoup_json *value, const char *otherwise) {
    return json_is_string(of(value)) ? json_string_value(of(value)) : otherwise;
}

int psoup_json_bool(const psoup_json *value, int otherwise) {
    return json_is_boolean(of(value)) ? json_is_true(of(value)) : otherwise;
}

/* ---- building ---------------------------------------------------------------------------- */

psoup_json *psoup_json_new_object(void) {
    return as(json_object());
}

psoup_json *psoup_json_new_array(void) {
    return as(json_array());
}

psoup_json *psoup_json_new_string(const char *text) {
    return as(json_string(text));
}

psoup_json *psoup_json_new_integer(int64_t value) {
    return as(json_integer(value));
}

psoup_json *psoup_json_new_real(double value) {
    return as(isfinite(value) ? json_real(value) : json_null());
}

psoup_json *psoup_json_new_bool(int value) {
    return as(json_boolean(value));
}

psoup_json *psoup_json_new_null(void) {
    return as(json_null());
}

psoup_json *psoup_json_copy(const psoup_json *value) {
    return as(json_deep_copy(of(value)));
}

int psoup_json_set(psoup_json *object, const char *key, psoup_json *value) {
    return json_object_set_new(of(object), key, of(value));
}

int psoup_json_append(psoup_json *array, psoup_json *value) {
    return json_array_append_new(of(array), of(value));
}
