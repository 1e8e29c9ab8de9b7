/* src/base/writer.c: a file that appears under its name only when it is whole. */
#include "base/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CHUNK = 1 << 16 };

struct psoup__writer {
    psoup_context *context;
    char *path, *temporary;
    int fd;                /* −1 once closed */
    bool there;            /* the temporary file exists */
    psoup__tozstd *z;      /* NULL: plain */
    unsigned char *buffer; /* [CHUNK], bytes for the file */
    size_t fill;
};

psoup_status psoup__write_all(int fd, const char *path, const void *data, size_t length,
                              psoup_error *error) {
    const char *at = data;
    while (length > 0) {
        ssize_t n = write(fd, at, length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot write: %m", path);
        at += n;
        length -= (size_t)n;
    }
    return PSOUP_OK;
}

/* A new file beside `path`, under the first free name. Not mkstemp: the file shall get the mode
 * that the process gives its files. */
static psoup_status open_beside(psoup__writer *writer, psoup_error *error) {
    enum { tries = 1000 };
    for (int i = 0; i < tries; i++) {
        psoup__free(writer->context, writer->temporary);
        writer->temporary =
            psoup__format(writer->context, error, "%s.%ld-%d.tmp", writer->path, (long)getpid(), i);
        if (writer->temporary == NULL)
            return PSOUP_ERROR_MEMORY;
        writer->fd = open(writer->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (writer->fd >= 0) {
            writer->there = true;
            return PSOUP_OK;
        }
        if (errno != EEXIST)
            break;
    }
    return psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot create: %m", writer->path);
}

psoup_status psoup__writer_create(psoup_context *context, const char *path, psoup__writer **out,
                                  psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    struct stat info;
    *out = NULL;
    if (!*path) /* found now, not when the file is renamed */
        return psoup__fail(error, PSOUP_ERROR_IO, "the name of the file to write is empty");
    /* renaming over a device or a pipe would replace it */
    if (stat(path, &info) == 0 && !S_ISREG(info.st_mode))
        return psoup__fail(error, PSOUP_ERROR_IO, "%s: is there and is not a regular file", path);
    psoup__writer *writer = psoup__alloc(context, 1, sizeof *writer, error);
    if (writer == NULL)
        return status;
    writer->context = context;
    writer->fd = -1;
    writer->path = psoup__strdup(context, path, error);
    if (writer->path == NULL)
        goto fail;
    writer->buffer = psoup__alloc(context, CHUNK, 1, error);
    if (writer->buffer == NULL)
        goto fail;
    if (psoup__is_zst(path))
        PSOUP__TRY(psoup__tozstd_create(context, writer->path, &writer->z, error));
    PSOUP__TRY(open_beside(writer, error));
    *out = writer;
    return PSOUP_OK;
fail:
    psoup__writer_free(writer);
    return status;
}

static psoup_status flush(psoup__writer *writer, psoup_error *error) {
    psoup_status status =
        psoup__write_all(writer->fd, writer->path, writer->buffer, writer->fill, error);
    writer->fill = 0;
    return status;
}

static psoup_status compress(psoup__writer *writer, const void *data, size_t length, bool finish,
                             psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const unsigned char *at = data;
    bool done = false;
    while (status == PSOUP_OK && !done) {
        size_t got = 0;
        status = psoup__tozstd_step(writer->z, &at, &length, finish, writer->buffer + writer->fill,
                                    CHUNK - writer->fill, &got, &done, error);
        writer->fill += got;
        if (status == PSOUP_OK && writer->fill == CHUNK)
            status = flush(writer, error);
    }
    return status;
}

psoup_status psoup__writer_write(psoup__writer *writer, const void *data, size_t length,
                                 psoup_error *error) {
    psoup_status status = PSOUP_OK;
    if (writer->fd < 0)
        return psoup__fail(error, PSOUP_ERROR_STATE, "%s: written to after it was closed",
                           writer->path);
    if (length == 0)
        return PSOUP_OK;
    if (writer->z != NULL)
        return compress(writer, data, length, false, error);
    if (length > CHUNK - writer->fill)
        status = flush(writer, error);
    if (status != PSOUP_OK)
        return status;
    if (length >= CHUNK)
        return psoup__write_all(writer->fd, writer->path, data, length, error);
    memcpy(writer->buffer + writer->fill, data, length);
    writer->fill += length;
    return PSOUP_OK;
}

/* Makes the new name itself last: the directory holds it. */
static psoup_status sync_directory(psoup__writer *writer, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const char *slash = strrchr(writer->path, '/');
    size_t length = slash == NULL ? 0 : slash == writer->path ? 1 : (size_t)(slash - writer->path);
    /* the temporary name is done with, and is longer than the directory */
    char *name = writer->temporary;
    if (length == 0)
        memcpy(name, ".", 2);
    else
        memcpy(name, writer->path, length), name[length] = '\0';
    int fd = open(name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) /* a directory one may write but not read: nothing more can be done */
        return PSOUP_OK;
    if (fsync(fd) != 0 && errno != EINVAL && errno != ENOTSUP && errno != EROFS)
        status =
            psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot sync its directory: %m", writer->path);
    close(fd);
    return status;
}

psoup_status psoup__writer_commit(psoup__writer *writer, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    if (writer->fd < 0)
        return psoup__fail(error, PSOUP_ERROR_STATE, "%s: closed twice", writer->path);
    if (writer->z != NULL)
        PSOUP__TRY(compress(writer, NULL, 0, true, error));
    PSOUP__TRY(flush(writer, error));
    if (fsync(writer->fd) != 0 && errno != EINVAL) {
        status = psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot sync: %m", writer->path);
        goto fail;
    }
    int closed = close(writer->fd);
    writer->fd = -1;
    if (closed != 0 || rename(writer->temporary, writer->path) != 0) {
        status =
            psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot put in its place: %m", writer->path);
        goto fail;
    }
    writer->there = false;
    return sync_directory(writer, error);
fail:
    if (writer->fd >= 0)
        close(writer->fd);
    writer->fd = -1;
    return status;
}

void psoup__writer_free(psoup__writer *writer) {
    if (writer == NULL)
        return;
    if (writer->fd >= 0)
        close(writer->fd);
    if (writer->there)
        unlink(writer->temporary);
    psoup__tozstd_free(writer->z);
    psoup__free(writer->context, writer->buffer);
    psoup__free(writer->context, writer->temporary);
    psoup__free(writer->context, writer->path);
    psoup__free(writer->context, writer);
}
