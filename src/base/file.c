/* src/base/file.c: files mapped, read in order, and written whole or not at all. */
#include "base/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CHUNK = 1 << 16 };

bool psoup__is_zst(const char *path) {
    size_t length = strlen(path);
    return length > 4 && strcmp(path + length - 4, ".zst") == 0;
}

bool psoup__file_exists(const char *path) {
    struct stat info;
    return stat(path, &info) == 0;
}

bool psoup__is_directory(const char *path) {
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

psoup_status psoup__make_directories(const char *path, psoup_error *error) {
    char part[PATH_MAX];
    size_t length = strlen(path);
    if (length == 0 || length >= sizeof part)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "\"%s\": a directory's name has 1 to %d bytes", path, PATH_MAX - 1);
    for (size_t i = 1; i <= length; i++) {
        if (path[i] != '/' && path[i] != '\0')
            continue;
        memcpy(part, path, i);
        part[i] = '\0';
        if (mkdir(part, 0777) != 0) {
            int reason = errno; /* on a directory that is there it may be other than EEXIST */
            if (psoup__is_directory(part))
                continue;
            errno = reason == EEXIST ? ENOTDIR : reason;
            return psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot make this directory: %m", part);
        }
    }
    return PSOUP_OK;
}

char *psoup__path_join(psoup_context *context, const char *directory, const char *name,
                       psoup_error *error) {
    size_t length = strlen(directory);
    const char *slash = length == 0 || directory[length - 1] == '/' ? "" : "/";
    return psoup__format(context, error, "%s%s%s", directory, slash, name);
}

/* ---- mapped ------------------------------------------------------------------------------ */

psoup_status psoup__file_map(psoup_context *context, const char *path, psoup__file *out,
                             psoup_error *error) {
    psoup_status status = PSOUP_OK;
    struct stat info;
    *out = (psoup__file){0};
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot open: %m", path);
    if (fstat(fd, &info) != 0) {
        status = psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot read: %m", path);
        goto fail;
    }
    if (!S_ISREG(info.st_mode)) {
        status = psoup__fail(error, PSOUP_ERROR_IO, "%s: not a regular file", path);
        goto fail;
    }
    out->path = psoup__strdup(context, path, error);
    if (out->path == NULL) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    if (info.st_size > 0) {
        void *data = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (data == MAP_FAILED) {
            status = psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot map %lld bytes: %m", path,
                                 (long long)info.st_size);
            goto fail;
        }
        out->data = data;
        out->length = (size_t)info.st_size;
    }
    close(fd);
    return PSOUP_OK;
fail:
    close(fd);
    psoup__file_unmap(context, out);
    return status;
}

void psoup__file_unmap(psoup_context *context, psoup__file *file) {
    if (file->data != NULL)
        munmap((void *)file->data, file->length);
    psoup__free(context, file->path);
    *file = (psoup__file){0};
}

/* ---- read in order ----------------------------------------------------------------------- */

struct psoup__input {
    psoup_context *context;
    char *path;
    int fd;
    psoup__unzstd *z;   /* NULL: plain */
    unsigned char *raw; /* [CHUNK], compressed bytes */
    const unsigned char *at;
    size_t left; /* bytes at `at` */
};

psoup_status psoup__input_open(psoup_context *context, const char *path, psoup__input **out,
                               psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    *out = NULL;
    psoup__input *input = psoup__alloc(context, 1, sizeof *input, error);
    if (input == NULL)
        return status;
    input->context = context;
    input->fd = -1;
    input->path = psoup__strdup(context, path, error);
    if (input->path == NULL)
        goto fail;
    if (psoup__is_zst(path)) {
        PSOUP__TRY(psoup__unzstd_create(context, input->path, &input->z, error));
        status = PSOUP_ERROR_MEMORY;
        input->raw = psoup__alloc(context, CHUNK, 1, error);
        if (input->raw == NULL)
            goto fail;
    }
    input->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (input->fd < 0) {
        status = psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot open: %m", path);
        goto fail;
    }
    *out = input;
    return PSOUP_OK;
fail:
    psoup__input_free(input);
    return status;
}

static psoup_status read_some(const psoup__input *input, void *out, size_t capacity, size_t *got,
                              psoup_error *error) {
    ssize_t n;
    do
        n = read(input->fd, out, capacity);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot read: %m", input->path);
    *got = (size_t)n;
    return PSOUP_OK;
}

psoup_status psoup__input_read(psoup__input *input, void *out, size_t capacity, size_t *got,
                               psoup_error *error) {
    *got = 0;
    if (input->z == NULL)
        return read_some(input, out, capacity, got, error);
    while (*got == 0) {
        if (input->left == 0) {
            psoup_status status = read_some(input, input->raw, CHUNK, &input->left, error);
            if (status != PSOUP_OK)
                return status;
            input->at = input->raw;
        }
        bool over = input->left == 0;
        if (over && psoup__unzstd_at_end(input->z))
            return PSOUP_OK;
        /* at the file's end too: the decoder may still hold output */
        psoup_status status =
            psoup__unzstd_step(input->z, &input->at, &input->left, out, capacity, got, error);
        if (status != PSOUP_OK)
            return status;
        if (over && *got == 0 && !psoup__unzstd_at_end(input->z))
            return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: the Zstandard data is cut short",
                               input->path);
    }
    return PSOUP_OK;
}

void psoup__input_free(psoup__input *input) {
    if (input == NULL)
        return;
    if (input->fd >= 0)
        close(input->fd);
    psoup__unzstd_free(input->z);
    psoup__free(input->context, input->raw);
    psoup__free(input->context, input->path);
    psoup__free(input->context, input);
}

psoup_status psoup__file_read(psoup_context *context, const char *path, size_t limit, char **out,
                              size_t *length, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__input *input = NULL;
    char *data = NULL;
    size_t used = 0, capacity = 0, got = 0, need;
    struct stat info;
    *out = NULL;
    *length = 0;
    PSOUP__TRY(psoup__input_open(context, path, &input, error));
    size_t expected = CHUNK;
    if (input->z == NULL && fstat(input->fd, &info) == 0 && S_ISREG(info.st_mode)) {
        if ((uintmax_t)info.st_size > limit) {
            status = psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %lld bytes; expected at most %zu",
                                 path, (long long)info.st_size, limit);
            goto fail;
        }
        expected = (size_t)info.st_size + 1; /* one read finds the end */
    }
    do {
        if (!psoup__add(used, used == 0 ? expected : 1, &need) || !psoup__add(need, 1, &need)) {
            status = psoup__out_of_memory(error, SIZE_MAX);
            goto fail;
        }
        PSOUP__TRY(psoup__reserve(context, &data, &capacity, need, 1, error));
        PSOUP__TRY(psoup__input_read(input, data + used, capacity - 1 - used, &got, error));
        used += got;
        if (used > limit) {
            status = psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: more than %zu bytes", path, limit);
            goto fail;
        }
    } while (got > 0);
    data[used] = '\0';
    *out = data;
    *length = used;
    psoup__input_free(input);
    return PSOUP_OK;
fail:
    psoup__input_free(input);
    psoup__free(context, data);
    return status;
}
