/* src/base/json_parse.c: JSON texts (RFC 8259) read into values.
 *
 * The library's own parser is not used: where memory runs out inside a word it goes on without the
 * letters that found no room, or reads past the word's end (jansson 2.14, lex_save in load.c).
 */
#include "base/internal.h"

#include <errno.h>
#include <inttypes.h>
#include <langinfo.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEPTH = 512, SHOWN = 24 };

typedef struct parser {
    const char *name, *text, *at, *end;
    int64_t line;       /* of the text's start */
    psoup__buffer word; /* the string or number read last */
    psoup_error *error;
} parser;

/* What is wrong, and where: counted only now. */
static psoup_status wrong(const parser *p, const char *where, const char *what) {
    const char *start = p->text;
    int64_t line = p->line;
    size_t shown = 0;
    for (const char *c = start; c < where; c++)
        if (*c == '\n') {
            line++;
            start = c + 1;
        }
    size_t column = (size_t)(where - start) + 1;
    if (where == p->end)
        return psoup__fail(p->error, PSOUP_ERROR_FORMAT, "%s:%" PRId64 ":%zu: %s at the end", p->name,
                           line, column, what);
    if (*where == '\0')
        return psoup__fail(p->error, PSOUP_ERROR_FORMAT, "%s:%" PRId64 ":%zu: a NUL byte", p->name,
                           line, column);
    while (shown < SHOWN && where + shown < p->end && (unsigned char)where[shown] > ' ' &&
           (shown == 0 || strchr(":,]}", where[shown]) == NULL))
        shown++;
    return psoup__fail(p->error, PSOUP_ERROR_FORMAT, "%s:%" PRId64 ":%zu: %s near '%.*s'", p->name,
                       line, column, what, (int)shown, where);
}

static void skip_blanks(parser *p) {
    while (p->at < p->end && (*p->at == ' ' || *p->at == '\n' || *p->at == '\r' || *p->at == '\t'))
        p->at++;
}

/* Steps over `c`, after blanks, if it comes next. */
static bool take(parser *p, char c) {
    skip_blanks(p);
    if (p->at == p->end || *p->at != c)
        return false;
    p->at++;
    return true;
}

/* ---- strings ----------------------------------------------------------------------------------- */

/* Four hexadecimal digits; −1 where there are none. */
static int32_t hex4(parser *p) {
    int32_t code = 0;
    if (p->end - p->at < 4)
        return -1;
    for (int i = 0; i < 4; i++) {
        char c = *p->at++;
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0)
            return -1;
        code = code << 4 | digit;
    }
    return code;
}

/* After the backslash. */
static psoup_status read_escape(parser *p) {
    static const char names[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    const char *where = p->at - 1, *known;
    char letter = p->at < p->end ? *p->at++ : '\0', bytes[4];
    if (letter == 'u') {
        int32_t code = hex4(p), low;
        if (code < 0)
            return wrong(p, where, "invalid escape");
        if (code == 0)
            return wrong(p, where, "\\u0000 is not allowed");
        if (code >= 0xD800 && code <= 0xDFFF) { /* a surrogate, of which two make a character */
            if (code >= 0xDC00 || p->end - p->at < 6 || p->at[0] != '\\' || p->at[1] != 'u')
                return wrong(p, where, "half a surrogate pair");
            p->at += 2;
            low = hex4(p);
            if (low < 0xDC00 || low > 0xDFFF)
                return wrong(p, where, "half a surrogate pair");
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        psoup__buffer_append(&p->word, bytes, psoup__utf8_put((uint32_t)code, bytes));
    } else if (letter != '\0' && (known = strchr(names, letter)) != NULL) {
        psoup__buffer_append(&p->word, &meant[known - names], 1);
    } else {
        return wrong(p, where, "invalid escape");
    }
    return PSOUP_OK;
}

/* The string that starts at p->at, into p->word. */
static psoup_status read_string(parser *p) {
    psoup_status status = PSOUP_OK;
    const char *start = p->at++;
    p->word.length = 0;
    psoup__buffer_append(&p->word, "", 0);
    while (p->at < p->end && *p->at != '"') {
        const char *run = p->at;
        while (p->at < p->end && *p->at != '"' && *p->at != '\\') {
            uint32_t code;
            if ((unsigned char)*p->at < ' ')
                return wrong(p, p->at, "a control character in a string");
            size_t used = psoup__utf8_next(p->at, (size_t)(p->end - p->at), &code);
            if (code == 0xFFFD && !psoup__is_replacement(p->at, used))
                return wrong(p, p->at, "unable to decode a byte: not UTF-8");
            p->at += used;
        }
        psoup__buffer_append(&p->word, run, (size_t)(p->at - run));
        if (p->at < p->end && *p->at == '\\') {
            p->at++;
            PSOUP__TRY(read_escape(p));
        }
    }
    if (p->at == p->end)
        return wrong(p, start, "a string without its end");
    p->at++;
    if (p->word.failed)
        return psoup__fail(p->error, PSOUP_ERROR_MEMORY, "%s: out of memory for a string", p->name);
fail:
    return status;
}

/* ---- numbers ----------------------------------------------------------------------------------- */

static bool digits(parser *p) {
    const char *start = p->at;
    while (p->at < p->end && *p->at >= '0' && *p->at <= '9')
        p->at++;
    return p->at > start;
}

static psoup_status read_number(parser *p, psoup_json **out) {
    const char *start = p->at, *point = NULL;
    bool real = false;
    p->at += *p->at == '-';
    bool good = p->at < p->end && *p->at == '0' ? (p->at++, true) : digits(p);
    if (good && p->at < p->end && *p->at == '.') {
        point = p->at++;
        real = true;
        good = digits(p);
    }
    if (good && p->at < p->end && (*p->at | 0x20) == 'e') {
        p->at++;
        real = true;
        p->at += p->at < p->end && (*p->at == '+' || *p->at == '-');
        good = digits(p);
    }
    if (!good || (p->at < p->end && (*p->at == '.' || (*p->at >= '0' && *p->at <= '9'))))
        return wrong(p, start, "not a number");
    const char *whole = point != NULL ? point : p->at;
    p->word.length = 0;
    psoup__buffer_append(&p->word, start, (size_t)(whole - start));
    if (point != NULL) { /* strtod reads the locale's point */
        psoup__buffer_print(&p->word, "%s", nl_langinfo(RADIXCHAR));
        psoup__buffer_append(&p->word, point + 1, (size_t)(p->at - point - 1));
    }
    if (p->word.failed)
        return psoup__fail(p->error, PSOUP_ERROR_MEMORY, "%s: out of memory for a number", p->name);
    errno = 0;
    long long whole_number = real ? 0 : strtoll(p->word.data, NULL, 10);
    if (real || errno == ERANGE) { /* tokenizers' "model_max_length" is 10³⁰ */
        double value = strtod(p->word.data, NULL);
        if (isinf(value))
            return wrong(p, start, "real number overflow");
        *out = psoup_json_new_real(value);
    } else {
        *out = psoup_json_new_integer(whole_number);
    }
    return PSOUP_OK;
}

/* ---- values ------------------------------------------------------------------------------------ */

static psoup_status read_value(parser *p, int depth, psoup_json **out);

static psoup_status read_array(parser *p, int depth, psoup_json *array) {
    psoup_status status = PSOUP_OK;
    p->at++;
    if (take(p, ']'))
        return PSOUP_OK;
    do {
        psoup_json *value = NULL;
        PSOUP__TRY(read_value(p, depth, &value));
        if (psoup_json_append(array, value) != 0)
            return psoup__fail(p->error, PSOUP_ERROR_MEMORY, "%s: out of memory for an array",
                               p->name);
    } while (take(p, ','));
    if (!take(p, ']'))
        return wrong(p, p->at, "']' expected");
fail:
    return status;
}

static psoup_status read_member(parser *p, int depth, psoup_json *object) {
    psoup_status status;
    psoup_json *value = NULL;
    char *key = NULL;
    skip_blanks(p);
    const char *where = p->at;
    if (p->at == p->end || *p->at != '"')
        return wrong(p, where, "string or '}' expected");
    PSOUP__TRY(read_string(p));
    if (psoup_json_get(object, p->word.data) != NULL)
        return wrong(p, where, "duplicate object key");
    key = psoup__strdup(NULL, p->word.data, p->error);
    if (key == NULL)
        return PSOUP_ERROR_MEMORY;
    if (!take(p, ':')) {
        status = wrong(p, p->at, "':' expected");
        goto fail;
    }
    PSOUP__TRY(read_value(p, depth, &value));
    if (psoup_json_set(object, key, value) != 0)
        status = psoup__fail(p->error, PSOUP_ERROR_MEMORY, "%s: out of memory for an object", p->name);
fail:
    psoup__free(NULL, key);
    return status;
}

static psoup_status read_object(parser *p, int depth, psoup_json *object) {
    psoup_status status = PSOUP_OK;
    p->at++;
    if (take(p, '}'))
        return PSOUP_OK;
    do
        PSOUP__TRY(read_member(p, depth, object));
    while (take(p, ','));
    if (!take(p, '}'))
        return wrong(p, p->at, "'}' expected");
fail:
    return status;
}

static bool literal(parser *p, const char *word) {
    size_t length = strlen(word);
    if ((size_t)(p->end - p->at) < length || memcmp(p->at, word, length) != 0)
        return false;
    p->at += length;
    return true;
}

/* `depth`: how many arrays and objects it stands in. */
static psoup_status read_value(parser *p, int depth, psoup_json **out) {
    psoup_status status = PSOUP_OK;
    skip_blanks(p);
    *out = NULL;
    char c = p->at < p->end ? *p->at : '\0';
    if ((c == '[' || c == '{') && depth == DEPTH) {
        char what[64];
        snprintf(what, sizeof what, "nested deeper than %d", DEPTH);
        return wrong(p, p->at, what);
    }
    if (c == '[') {
        *out = psoup_json_new_array();
        if (*out != NULL)
            PSOUP__TRY(read_array(p, depth + 1, *out));
    } else if (c == '{') {
        *out = psoup_json_new_object();
        if (*out != NULL)
            PSOUP__TRY(read_object(p, depth + 1, *out));
    } else if (c == '"') {
        PSOUP__TRY(read_string(p));
        *out = psoup_json_new_string(p->word.data);
    } else if (c == '-' || (c >= '0' && c <= '9')) {
        PSOUP__TRY(read_number(p, out));
    } else if (literal(p, "true")) {
        *out = psoup_json_new_bool(1);
    } else if (literal(p, "false")) {
        *out = psoup_json_new_bool(0);
    } else if (literal(p, "null")) {
        *out = psoup_json_new_null();
    } else {
        return wrong(p, p->at, "a value expected");
    }
    if (*out != NULL)
        return PSOUP_OK;
    status = psoup__fail(p->error, PSOUP_ERROR_MEMORY, "%s: out of memory for its JSON", p->name);
fail:
    psoup_json_free(*out);
    *out = NULL;
    return status;
}

psoup_status psoup__json_parse_at(const char *text, size_t length, const char *name, int64_t line,
                                  psoup_json **out, psoup_error *error) {
    parser p = {.name = name, .text = text, .at = text, .end = text + length, .line = line,
                .error = error};
    psoup_status status = read_value(&p, 0, out);
    psoup__buffer_free(&p.word);
    if (status != PSOUP_OK)
        return status;
    skip_blanks(&p);
    if (p.at == p.end)
        return PSOUP_OK;
    psoup_json_free(*out);
    *out = NULL;
    return wrong(&p, p.at, "end of file expected");
}
