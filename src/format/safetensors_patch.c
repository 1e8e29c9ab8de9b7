/* Metadata of a safetensors file that is known only when its data is written: spaces are left for it. */
#include "format/format.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

/* A character inside a JSON string, in at most 6 bytes. */
static size_t escape(unsigned char c, char out[7]) {
    static const char digits[] = "0123456789abcdef";
    if (c == '"' || c == '\\') {
        out[0] = '\\';
        out[1] = (char)c;
        return 2;
    }
    if (c == '\n') {
        memcpy(out, "\\n", 2);
        return 2;
    }
    if (c < 32) {
        memcpy(out, "\\u00", 4);
        out[4] = digits[c >> 4];
        out[5] = digits[c & 15];
        return 6;
    }
    out[0] = (char)c;
    return 1;
}

size_t psoup__json_string_bytes(const char *text) {
    char out[7];
    size_t bytes = 0;
    for (; *text != '\0'; text++)
        bytes += escape((unsigned char)*text, out);
    return bytes;
}

/* Where the value of "key": "…", as our writer has it, lies in the file, and its bytes; 0: nowhere. They are
 * spaces, or what a run that was killed here put there before. */
static psoup_status find_value(psoup_context *context, const psoup__file *file, const char *key,
                                size_t *offset, size_t *count, psoup_error *error) {
    uint64_t header = 0;
    char *pattern = psoup__format(context, error, "\"%s\": \"", key);
    if (pattern == NULL)
        return PSOUP_ERROR_MEMORY;
    for (int i = 7; i >= 0 && file->length >= 8; i--)
        header = header << 8 | file->data[i];
    const unsigned char *at = NULL;
    if (file->length >= 8 && header <= file->length - 8)
        at = memmem(file->data + 8, (size_t)header, pattern, strlen(pattern));
    *count = 0;
    *offset = at != NULL ? (size_t)(at - file->data) + strlen(pattern) : file->length;
    while (*offset + *count < file->length && file->data[*offset + *count] != '"')
        *count += file->data[*offset + *count] == '\\' ? 2 : 1;
    if (*offset + *count >= file->length)
        *count = 0;
    psoup__free(context, pattern);
    return PSOUP_OK;
}

static psoup_status overwrite(const char *path, size_t offset, const char *data, size_t bytes,
                              psoup_error *error) {
    psoup_status status = PSOUP_OK;
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot open: %m", path);
    while (bytes > 0 && status == PSOUP_OK) {
        ssize_t n = pwrite(fd, data, bytes, (off_t)offset);
        if (n < 0 && errno != EINTR)
            status = psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot write: %m", path);
        if (n > 0) {
            data += n;
            offset += (size_t)n;
            bytes -= (size_t)n;
        }
    }
    if (status == PSOUP_OK && fsync(fd) != 0 && errno != EINVAL)
        status = psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot sync: %m", path);
    close(fd);
    return status;
}

psoup_status psoup__safetensors_patch(psoup_context *context, const char *path, const char *key,
                                      const char *text, psoup_error *error) {
    psoup_status status;
    psoup__file file = {0};
    psoup__buffer escaped = {.context = context};
    size_t offset, spaces;
    PSOUP__TRY(psoup__file_open(context, path, &file, error));
    PSOUP__TRY(psoup__file_map(&file, error));
    PSOUP__TRY(find_value(context, &file, key, &offset, &spaces, error));
    if (spaces < psoup__json_string_bytes(text)) {
        status = psoup__fail(error, PSOUP_ERROR_STATE, "%s: no room for the metadata %s", path, key);
        goto fail;
    }
    for (; *text != '\0'; text++) {
        char out[7];
        psoup__buffer_append(&escaped, out, escape((unsigned char)*text, out));
    }
    while (!escaped.failed && escaped.length < spaces)
        psoup__buffer_append(&escaped, "                                ",
                             spaces - escaped.length < 32 ? spaces - escaped.length : 32);
    if (escaped.failed) {
        status = psoup__out_of_memory(error, escaped.length);
        goto fail;
    }
    PSOUP__TRY(overwrite(path, offset, escaped.data != NULL ? escaped.data : "",
                         escaped.length, error));
fail:
    psoup__buffer_free(&escaped);
    psoup__file_close(context, &file);
    return status;
}
