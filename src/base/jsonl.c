/* src/base/jsonl.c: JSON Lines, one object at a time, and the same read from one large array. */
#include "base/internal.h"

#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CHUNK = 1 << 16, ROW_LIMIT = 1 << 28 };

typedef enum layout { UNKNOWN, LINES, ARRAY, OVER } layout;

struct psoup_jsonl_reader {
    psoup_context *context;
    char *path;
    psoup__input *input;
    unsigned char *chunk; /* [CHUNK] */
    size_t at, end;
    layout layout;
    bool any;         /* ARRAY: an element was read */
    int64_t line;     /* of the next byte */
    int64_t row_line; /* of the last row */
    psoup__buffer row;
};

psoup_status psoup_jsonl_open(psoup_context *context, const char *path, psoup_jsonl_reader **out,
                              psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    *out = NULL;
    psoup_jsonl_reader *reader = psoup__alloc(context, 1, sizeof *reader, error);
    if (reader == NULL)
        return status;
    reader->context = reader->row.context = context;
    reader->line = 1;
    reader->path = psoup__strdup(context, path, error);
    if (reader->path == NULL)
        goto fail;
    reader->chunk = psoup__alloc(context, CHUNK, 1, error);
    if (reader->chunk == NULL)
        goto fail;
    PSOUP__TRY(psoup__input_open(context, path, &reader->input, error));
    *out = reader;
    return PSOUP_OK;
fail:
    psoup_jsonl_reader_free(reader);
    return status;
}

/* The next byte without taking it; −1 at the end. */
static psoup_status peek(psoup_jsonl_reader *reader, int *byte, psoup_error *error) {
    if (reader->at == reader->end) {
        reader->at = reader->end = 0;
        psoup_status status =
            psoup__input_read(reader->input, reader->chunk, CHUNK, &reader->end, error);
        if (status != PSOUP_OK)
            return status;
    }
    *byte = reader->at < reader->end ? reader->chunk[reader->at] : -1;
    return PSOUP_OK;
}

static void take(psoup_jsonl_reader *reader) {
    reader->line += reader->chunk[reader->at++] == '\n';
}

static psoup_status skip_blank(psoup_jsonl_reader *reader, int *byte, psoup_error *error) {
    for (;;) {
        psoup_status status = peek(reader, byte, error);
        if (status != PSOUP_OK)
            return status;
        if (*byte != ' ' && *byte != '\t' && *byte != '\r' && *byte != '\n')
            return PSOUP_OK;
        take(reader);
    }
}

/* Adds chunk[at … at+length) to the row and takes it. */
static psoup_status keep(psoup_jsonl_reader *reader, size_t length, psoup_error *error) {
    if (reader->row.length + length > ROW_LIMIT)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s:%" PRId64 ": a row of more than %d bytes",
                           reader->path, reader->row_line, ROW_LIMIT);
    psoup__buffer_append(&reader->row, reader->chunk + reader->at, length);
    if (reader->row.failed)
        return psoup__out_of_memory(error, reader->row.length + length);
    for (size_t i = 0; i < length; i++)
        take(reader);
    return PSOUP_OK;
}

static psoup_status read_line(psoup_jsonl_reader *reader, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    int byte = 0;
    PSOUP__TRY(peek(reader, &byte, error));
    while (byte >= 0) {
        const unsigned char *start = reader->chunk + reader->at;
        const unsigned char *stop = memchr(start, '\n', reader->end - reader->at);
        size_t length = stop != NULL ? (size_t)(stop - start) : reader->end - reader->at;
        PSOUP__TRY(keep(reader, length, error));
        if (stop != NULL)
            break;
        PSOUP__TRY(peek(reader, &byte, error));
    }
fail:
    return status;
}

/* One value from '{' to the '}' that closes it, or what the file has of it. */
static psoup_status read_element(psoup_jsonl_reader *reader, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    int byte = 0;
    size_t depth = 0;
    bool quoted = false, escaped = false, whole = false;
    PSOUP__TRY(peek(reader, &byte, error));
    while (byte >= 0 && !whole) {
        size_t length = 0, room = reader->end - reader->at;
        while (length < room && !whole) {
            unsigned char c = reader->chunk[reader->at + length++];
            if (escaped)
                escaped = false;
            else if (quoted)
                escaped = c == '\\', quoted = c != '"';
            else if (c == '"')
                quoted = true;
            else if (c == '{' || c == '[')
                depth++;
            else if (c == '}' || c == ']')
                whole = --depth == 0;
        }
        PSOUP__TRY(keep(reader, length, error));
        if (!whole)
            PSOUP__TRY(peek(reader, &byte, error));
    }
fail:
    return status;
}

/* Moves to the next element of the array; *more is false after its end. */
static psoup_status next_element(psoup_jsonl_reader *reader, bool *more, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    int byte = 0;
    const char *expected = NULL;
    *more = false;
    PSOUP__TRY(skip_blank(reader, &byte, error));
    if (byte == ']') {
        take(reader);
        PSOUP__TRY(skip_blank(reader, &byte, error));
        if (byte >= 0)
            expected = "the end of the file after the array";
        reader->layout = OVER;
    } else {
        if (reader->any && byte != ',')
            expected = "',' or ']' after an element of the array";
        else if (reader->any) {
            take(reader);
            PSOUP__TRY(skip_blank(reader, &byte, error));
        }
        if (expected == NULL && byte != '{')
            expected = "an object in the array";
        *more = expected == NULL;
    }
    if (expected != NULL) {
        reader->layout = OVER; /* nothing after it can be trusted */
        status = psoup__fail(error, PSOUP_ERROR_FORMAT, "%s:%" PRId64 ": expected %s", reader->path,
                             reader->line, expected);
    }
fail:
    return status;
}

/* The first character says which layout it is; a byte order mark before it is passed over. */
static psoup_status find_layout(psoup_jsonl_reader *reader, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    int byte = 0;
    PSOUP__TRY(peek(reader, &byte, error));
    if (reader->end >= 3 && memcmp(reader->chunk, "\xef\xbb\xbf", 3) == 0)
        reader->at = 3;
    PSOUP__TRY(skip_blank(reader, &byte, error));
    reader->layout = byte == '[' ? ARRAY : LINES;
    if (byte == '[')
        take(reader);
fail:
    return status;
}

psoup_status psoup_jsonl_next(psoup_jsonl_reader *reader, psoup_json **row, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    int byte = 0;
    bool more = false;
    *row = NULL;
    if (reader->layout == UNKNOWN)
        PSOUP__TRY(find_layout(reader, error));
    if (reader->layout == OVER)
        return PSOUP_OK;
    reader->row.length = 0;
    if (reader->layout == ARRAY) {
        PSOUP__TRY(next_element(reader, &more, error));
        if (!more)
            return PSOUP_OK;
    } else {
        PSOUP__TRY(skip_blank(reader, &byte, error));
        if (byte < 0) {
            reader->layout = OVER;
            return PSOUP_OK;
        }
    }
    reader->row_line = reader->line;
    PSOUP__TRY(reader->layout == ARRAY ? read_element(reader, error) : read_line(reader, error));
    reader->any = true;
    PSOUP__TRY(psoup__json_parse_at(reader->row.data, reader->row.length, reader->path,
                                    reader->row_line, row, error));
    if (psoup_json_kind(*row) != PSOUP_JSON_OBJECT) {
        status =
            psoup__fail(error, PSOUP_ERROR_FORMAT, "%s:%" PRId64 ": expected an object, found %s",
                        reader->path, reader->row_line, psoup__json_kind_name(*row));
        goto fail;
    }
    return PSOUP_OK;
fail:
    if (reader->row.failed)
        psoup__buffer_free(&reader->row);
    psoup_json_free(*row);
    *row = NULL;
    return status;
}

int64_t psoup_jsonl_line(const psoup_jsonl_reader *reader) {
    return reader->row_line;
}

void psoup_jsonl_reader_free(psoup_jsonl_reader *reader) {
    if (reader == NULL)
        return;
    psoup__input_free(reader->input);
    psoup__buffer_free(&reader->row);
    psoup__free(reader->context, reader->chunk);
    psoup__free(reader->context, reader->path);
    psoup__free(reader->context, reader);
}

/* ---- writing ----------------------------------------------------------------------------- */

struct psoup_jsonl_writer {
    psoup_context *context;
    char *path;
    psoup__writer *whole; /* NULL: append */
    int fd;               /* append */
    bool closed;
};

/* Opens for appending. A last line without its end (a run was killed there) gets one, so that it
 * spoils no further row. */
static psoup_status open_append(psoup_jsonl_writer *writer, psoup_error *error) {
    struct stat info;
    char last = '\n';
    writer->fd = open(writer->path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (writer->fd < 0)
        return psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot open: %m", writer->path);
    if (fstat(writer->fd, &info) == 0 && S_ISREG(info.st_mode) && info.st_size > 0) {
        int look = open(writer->path, O_RDONLY | O_CLOEXEC);
        if (look >= 0 && pread(look, &last, 1, info.st_size - 1) != 1)
            last = '\n';
        if (look >= 0)
            close(look);
    }
    return last == '\n' ? PSOUP_OK : psoup__write_all(writer->fd, writer->path, "\n", 1, error);
}

psoup_status psoup_jsonl_create(psoup_context *context, const char *path, int append,
                                psoup_jsonl_writer **out, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    *out = NULL;
    if (append && psoup__is_zst(path))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: a .zst file cannot be appended to",
                           path);
    psoup_jsonl_writer *writer = psoup__alloc(context, 1, sizeof *writer, error);
    if (writer == NULL)
        return status;
    writer->context = context;
    writer->fd = -1;
    writer->path = psoup__strdup(context, path, error);
    if (writer->path == NULL)
        goto fail;
    PSOUP__TRY(append ? open_append(writer, error)
                      : psoup__writer_create(context, path, &writer->whole, error));
    *out = writer;
    return PSOUP_OK;
fail:
    psoup_jsonl_writer_free(writer);
    return status;
}

psoup_status psoup_jsonl_write(psoup_jsonl_writer *writer, const psoup_json *row,
                               psoup_error *error) {
    if (writer->closed)
        return psoup__fail(error, PSOUP_ERROR_STATE, "%s: written to after it was closed",
                           writer->path);
    if (psoup_json_kind(row) != PSOUP_JSON_OBJECT)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: a row must be an object; this is %s",
                           writer->path, row == NULL ? "NULL" : psoup__json_kind_name(row));
    char *text = psoup_json_text(row, 0);
    if (text == NULL)
        return psoup__fail(error, PSOUP_ERROR_MEMORY, "%s: out of memory for a row", writer->path);
    size_t length = strlen(text);
    text[length] = '\n'; /* in the NUL's place: the line goes out in one piece */
    psoup_status status = writer->whole != NULL
                              ? psoup__writer_write(writer->whole, text, length + 1, error)
                              : psoup__write_all(writer->fd, writer->path, text, length + 1, error);
    psoup_text_free(text);
    return status;
}

psoup_status psoup__jsonl_sync(psoup_jsonl_writer *writer, int64_t *length, psoup_error *error) {
    struct stat info;
    *length = -1;
    if (fstat(writer->fd, &info) != 0 || (S_ISREG(info.st_mode) && fsync(writer->fd) != 0))
        return psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot sync: %m", writer->path);
    if (S_ISREG(info.st_mode))
        *length = (int64_t)info.st_size;
    return PSOUP_OK;
}

psoup_status psoup__jsonl_cut(psoup_jsonl_writer *writer, int64_t length, psoup_error *error) {
    struct stat info;
    if (length < 0 || (fstat(writer->fd, &info) == 0 && !S_ISREG(info.st_mode)))
        return PSOUP_OK;
    if (info.st_size < length)
        return psoup__fail(error, PSOUP_ERROR_STATE,
                           "%s: has %lld bytes; it had %lld when the checkpoint was made",
                           writer->path, (long long)info.st_size, (long long)length);
    if (ftruncate(writer->fd, (off_t)length) != 0)
        return psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot cut it short: %m", writer->path);
    return PSOUP_OK;
}

psoup_status psoup_jsonl_close(psoup_jsonl_writer *writer, psoup_error *error) {
    if (writer->closed)
        return psoup__fail(error, PSOUP_ERROR_STATE, "%s: closed twice", writer->path);
    writer->closed = true;
    if (writer->whole != NULL)
        return psoup__writer_commit(writer->whole, error);
    int closed = close(writer->fd);
    writer->fd = -1;
    return closed == 0 ? PSOUP_OK
                       : psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot close: %m", writer->path);
}

void psoup_jsonl_writer_free(psoup_jsonl_writer *writer) {
    if (writer == NULL)
        return;
    psoup__writer_free(writer->whole);
    if (writer->fd >= 0)
        close(writer->fd);
    psoup__free(writer->context, writer->path);
    psoup__free(writer->context, writer);
}
