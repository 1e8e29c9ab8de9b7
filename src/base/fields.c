/* src/base/fields.c: option structs filled from JSON and shown as JSON. */
#include "base/internal.h"

#include <ctype.h>
#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* "where: member "name": expected …, found …" */
static psoup_status expected(const psoup_field *field, const psoup_json *value, const char *where,
                             const char *what, psoup_error *error) {
    psoup_status status;
    char *text = psoup_json_text(value, 0);
    enum { shown = 60 };
    status =
        psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: member \"%s\": expected %s, found %.*s%s",
                    where, field->name, what, shown, text != NULL ? text : "another value",
                    text != NULL && strlen(text) > shown ? "…" : "");
    psoup_text_free(text);
    return status;
}

/* The place of `name` in "a|b|c", or −1. */
static int32_t choice_of(const char *choices, const char *name) {
    size_t length = strlen(name);
    for (int32_t i = 0; choices != NULL; i++) {
        const char *end = strchrnul(choices, '|');
        if ((size_t)(end - choices) == length && memcmp(choices, name, length) == 0)
            return i;
        choices = *end == '|' ? end + 1 : NULL;
    }
    return -1;
}

/* Decimal digits that fit: JSON integers end at 2⁶³, seeds at 2⁶⁴, so strings are taken too. */
static bool parse_uint64(const char *text, uint64_t *out) {
    if (!isdigit((unsigned char)text[0]))
        return false;
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    *out = value;
    return *end == '\0' && errno == 0;
}

static psoup_status read_field(const psoup_field *field, const psoup_json *value, const char *where,
                               void *options, psoup_error *error) {
    char *to = (char *)options + field->offset;
    psoup_json_type kind = psoup_json_kind(value);
    bool number = kind == PSOUP_JSON_INTEGER || kind == PSOUP_JSON_REAL;
    int64_t integer = psoup_json_integer(value, 0);
    double real = psoup_json_real(value, 0);
    switch (field->type) {
    case PSOUP_FIELD_INT: {
        int32_t v = (int32_t)integer;
        if (kind != PSOUP_JSON_INTEGER || v != integer)
            return expected(field, value, where, "an integer of 32 bits", error);
        memcpy(to, &v, sizeof v);
        return PSOUP_OK;
    }
    case PSOUP_FIELD_UINT64: {
        uint64_t v = (uint64_t)integer;
        bool fits = kind == PSOUP_JSON_INTEGER ? integer >= 0
                                               : parse_uint64(psoup_json_string(value, ""), &v);
        if (!fits)
            return expected(field, value, where, "an integer from 0 to 18446744073709551615",
                            error);
        memcpy(to, &v, sizeof v);
        return PSOUP_OK;
    }
    case PSOUP_FIELD_FLOAT: {
        float v = (float)real;
        if (!number || !isfinite(v))
            return expected(field, value, where, "a number of 32 bits", error);
        memcpy(to, &v, sizeof v);
        return PSOUP_OK;
    }
    case PSOUP_FIELD_DOUBLE:
        if (!number)
            return expected(field, value, where, "a number", error);
        memcpy(to, &real, sizeof real);
        return PSOUP_OK;
    case PSOUP_FIELD_BOOL: {
        int32_t v = psoup_json_bool(value, 0);
        if (kind != PSOUP_JSON_BOOL)
            return expected(field, value, where, "true or false", error);
        memcpy(to, &v, sizeof v);
        return PSOUP_OK;
    }
    case PSOUP_FIELD_STRING: {
        const char *v = psoup_json_string(value, NULL);
        if (kind != PSOUP_JSON_STRING && kind != PSOUP_JSON_NULL)
            return expected(field, value, where, "a string or null", error);
        memcpy(to, &v, sizeof v);
        return PSOUP_OK;
    }
    case PSOUP_FIELD_ENUM: {
        char what[256];
        int32_t v = choice_of(field->choices, psoup_json_string(value, ""));
        snprintf(what, sizeof what, "one of %s", field->choices != NULL ? field->choices : "none");
        if (kind != PSOUP_JSON_STRING || v < 0)
            return expected(field, value, where, what, error);
        memcpy(to, &v, sizeof v);
        return PSOUP_OK;
    }
    case PSOUP_FIELD_JSON:
        memcpy(to, &value, sizeof value);
        return PSOUP_OK;
    }
    return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: member \"%s\" is described with type %d",
                       where, field->name, (int)field->type);
}

static psoup_status expect_object(const psoup_json *object, const char *where, psoup_error *error) {
    if (psoup_json_kind(object) == PSOUP_JSON_OBJECT)
        return PSOUP_OK;
    return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: expected an object, found %s", where,
                       psoup__json_kind_name(object));
}

psoup_status psoup_fields_read(const psoup_field *fields, const psoup_json *object,
                               const char *where, void *options, psoup_error *error) {
    psoup_status status = expect_object(object, where, error);
    for (; status == PSOUP_OK && fields->name != NULL; fields++) {
        const psoup_json *value = psoup_json_get(object, fields->name);
        if (value != NULL)
            status = read_field(fields, value, where, options, error);
    }
    return status;
}

/* Levenshtein's edit distance; of long names the first `longest` bytes. */
static int distance(const char *a, const char *b) {
    enum { longest = 64 };
    int row[longest + 1], n = (int)strnlen(b, longest), m = (int)strnlen(a, longest);
    for (int j = 0; j <= n; j++)
        row[j] = j;
    for (int i = 1; i <= m; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int swap = diagonal + (a[i - 1] != b[j - 1]);
            int drop = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
            diagonal = row[j];
            row[j] = swap < drop ? swap : drop;
        }
    }
    return row[n];
}

psoup_status psoup_fields_check(const psoup_field *const *tables, size_t n,
                                const psoup_json *object, const char *where, psoup_error *error) {
    psoup_status status = expect_object(object, where, error);
    const char *key = NULL;
    while (status == PSOUP_OK && psoup_json_next(object, &key) != NULL) {
        const char *nearest = NULL;
        int best = INT32_MAX;
        for (size_t i = 0; i < n; i++)
            for (const psoup_field *field = tables[i]; field->name != NULL && best > 0; field++) {
                int d = strcmp(key, field->name) == 0 ? 0 : distance(key, field->name) + 1;
                if (d < best)
                    best = d, nearest = field->name;
            }
        if (best > 0 && nearest != NULL)
            status = psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                 "%s: unknown member \"%s\"; the nearest known one is \"%s\"",
                                 where, key, nearest);
        else if (best > 0)
            status = psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                 "%s: unknown member \"%s\"; none is expected here", where, key);
    }
    return status;
}

/* The double that a reader of the float's shortest decimal gets: 0.1, not 0.10000000149011612. */
static double shortest(float value) {
    char text[64];
    for (int digits = 6; digits < 9 && isfinite(value); digits++) {
        snprintf(text, sizeof text, "%.*g", digits, (double)value);
        if (strtof(text, NULL) == value)
            return strtod(text, NULL);
    }
    return value;
}

static psoup_json *choice_json(const char *choices, int32_t index) {
    char name[64];
    for (; index > 0 && choices != NULL; index--) {
        const char *bar = strchr(choices, '|');
        choices = bar != NULL ? bar + 1 : NULL;
    }
    if (choices == NULL || index < 0)
        return psoup_json_new_null();
    snprintf(name, sizeof name, "%.*s", (int)strcspn(choices, "|"), choices);
    return psoup_json_new_string(name);
}

static psoup_json *field_json(const psoup_field *field, const char *from) {
    union {
        int32_t i;
        uint64_t u;
        float f;
        double d;
        const char *s;
        const psoup_json *json;
    } v;
    char text[32];
    switch (field->type) {
    case PSOUP_FIELD_INT:
        memcpy(&v.i, from, sizeof v.i);
        return psoup_json_new_integer(v.i);
    case PSOUP_FIELD_UINT64:
        memcpy(&v.u, from, sizeof v.u);
        if (v.u <= INT64_MAX)
            return psoup_json_new_integer((int64_t)v.u);
        snprintf(text, sizeof text, "%" PRIu64, v.u);
        return psoup_json_new_string(text);
    case PSOUP_FIELD_FLOAT:
        memcpy(&v.f, from, sizeof v.f);
        return psoup_json_new_real(shortest(v.f));
    case PSOUP_FIELD_DOUBLE:
        memcpy(&v.d, from, sizeof v.d);
        return psoup_json_new_real(v.d);
    case PSOUP_FIELD_BOOL:
        memcpy(&v.i, from, sizeof v.i);
        return psoup_json_new_bool(v.i);
    case PSOUP_FIELD_STRING:
        memcpy(&v.s, from, sizeof v.s);
        return v.s != NULL ? psoup_json_new_string(v.s) : psoup_json_new_null();
    case PSOUP_FIELD_ENUM:
        memcpy(&v.i, from, sizeof v.i);
        return choice_json(field->choices, v.i);
    case PSOUP_FIELD_JSON:
        memcpy(&v.json, from, sizeof v.json);
        return v.json != NULL ? psoup_json_copy(v.json) : psoup_json_new_null();
    }
    return NULL;
}

psoup_json *psoup_fields_json(const psoup_field *fields, const void *options) {
    psoup_json *object = psoup_json_new_object();
    for (; object != NULL && fields->name != NULL; fields++)
        if (psoup_json_set(object, fields->name,
                           field_json(fields, (const char *)options + fields->offset)) != 0) {
            psoup_json_free(object);
            object = NULL;
        }
    return object;
}
