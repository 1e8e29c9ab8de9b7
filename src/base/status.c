/* src/base/status.c: names, messages, the log, and the size rule of option structs. */
#include "base/base.h"

#include <stdio.h>
#include <string.h>

#define STRINGIFY2(x) #x
#define STRINGIFY(x) STRINGIFY2(x)

const char *psoup_version(void) {
    return STRINGIFY(PSOUP_VERSION_MAJOR) "." STRINGIFY(PSOUP_VERSION_MINOR) "." STRINGIFY(
        PSOUP_VERSION_PATCH);
}

const char *psoup_status_name(psoup_status status) {
    switch (status) {
    case PSOUP_OK:
        return "ok";
    case PSOUP_ERROR_ARGUMENT:
        return "invalid argument";
    case PSOUP_ERROR_MEMORY:
        return "out of memory";
    case PSOUP_ERROR_IO:
        return "input or output error";
    case PSOUP_ERROR_FORMAT:
        return "malformed data";
    case PSOUP_ERROR_UNSUPPORTED:
        return "not supported";
    case PSOUP_ERROR_STATE:
        return "wrong state";
    case PSOUP_ERROR_CANCELLED:
        return "cancelled";
    }
    return "unknown status";
}

/* Bytes of the printable UTF-8 character at text (the table of RFC 3629, section 4), or 0 for a
 * control character or a byte that starts no character. */
static size_t printable(const unsigned char *text) {
    unsigned char c = text[0], low = 0x80, high = 0xbf;
    if (c < 0x80)
        return c >= 0x20 && c != 0x7f;
    size_t length = c >= 0xc2 && c <= 0xdf   ? 2
                    : c >= 0xe0 && c <= 0xef ? 3
                    : c >= 0xf0 && c <= 0xf4 ? 4
                                             : 0;
    if (length == 0)
        return 0;
    if (c == 0xc2)
        low = 0xa0; /* U+0080 … U+009F are controls too */
    else if (c == 0xe0)
        low = 0xa0;
    else if (c == 0xed)
        high = 0x9f;
    else if (c == 0xf0)
        low = 0x90;
    else if (c == 0xf4)
        high = 0x8f;
    if (text[1] < low || text[1] > high)
        return 0;
    for (size_t i = 2; i < length; i++)
        if (text[i] < 0x80 || text[i] > 0xbf)
            return 0;
    return length;
}

/* Formats one clean line. What does not fit is cut, at a character's edge. */
static void format_line(char *line, size_t size, const char *format, va_list args) {
    int needed = vsnprintf(line, size, format, args);
    if (needed < 0)
        line[0] = '\0';
    size_t end = strlen(line);
    if (needed >= 0 && (size_t)needed >= size) {
        size_t start = end;
        while (start > 0 && end - start < 3 && ((unsigned char)line[start - 1] & 0xc0) == 0x80)
            start--;
        if (start > 0 && (unsigned char)line[start - 1] >= 0xc0 &&
            printable((const unsigned char *)line + start - 1) == 0)
            line[start - 1] = '\0';
    }
    for (char *c = line; *c != '\0';) {
        size_t length = printable((const unsigned char *)c);
        if (length == 0)
            *c++ = '?';
        else
            c += length;
    }
}

psoup_status psoup__fail(psoup_error *error, psoup_status status, const char *format, ...) {
    if (error == NULL)
        return status;
    psoup_error made; /* apart, for the arguments may point into *error */
    va_list args;
    va_start(args, format);
    format_line(made.message, sizeof made.message, format, args);
    va_end(args);
    error->status = status;
    memcpy(error->message, made.message, strlen(made.message) + 1);
    return status;
}

psoup_status psoup__out_of_memory(psoup_error *error, size_t bytes) {
    return psoup__fail(error, PSOUP_ERROR_MEMORY, "out of memory: %zu bytes", bytes);
}

void psoup__log(psoup_context *context, psoup_log_level level, const char *format, ...) {
    if (context == NULL || context->log == NULL)
        return;
    char line[1020];
    va_list args;
    va_start(args, format);
    format_line(line, sizeof line, format, args);
    va_end(args);
    context->log(context->log_user, level, line);
}

psoup_status psoup__options(void *defaults, size_t full, const void *options, const char *what,
                            psoup_error *error) {
    if (options == NULL)
        return PSOUP_OK;
    enum { largest = 65536 }; /* beyond it the size is a struct that nobody initialised */
    size_t size;
    memcpy(&size, options, sizeof size);
    if (size < sizeof size || size > largest)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: size is %zu; start the struct from its INIT macro", what, size);
    const unsigned char *bytes = options;
    for (size_t i = full; i < size; i++)
        if (bytes[i] != 0)
            return psoup__fail(
                error, PSOUP_ERROR_UNSUPPORTED,
                "%s: a field at byte %zu is set, but libpsoup %s knows %zu bytes only", what, i,
                psoup_version(), full);
    memcpy(defaults, options, size < full ? size : full);
    memcpy(defaults, &full, sizeof full);
    return PSOUP_OK;
}
