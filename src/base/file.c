/* src/base/file.c: files kept open or mapped, and read in order. */
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

/* ---- kept open, or mapped ----------------------------------------------------------------- */

psoup_status psoup__file_open(psoup_context *context, const char *path, psoup__file *out,
                              psoup_error *error) {
    psoup_status status = PSOUP_OK;
    struct stat info;
    *out = (psoup__file){0};
    out->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (out->fd < 0)
        return psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot open: %m", path);
    out->open = true;
    if (fstat(out->fd, &info) != 0) {
        status = psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot read: %m", path);
        goto fail;
    }
    if (!S_ISREG(info.st_mode)) {
        status = psoup__fail(error, PSOUP_ERROR_IO, "%s: not a regular file", path);
        goto fail;
    }
    if ((out->path = psoup__strdup(context, path, error)) == NULL) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    out->length = (size_t)info.st_size;
    out->seconds = (int64_t)info.st_mtim.tv_sec;
    out->nanoseconds = (int64_t)info.st_mtim.tv_nsec;
    out->device = (uint64_t)info.st_dev;
    out->inode = (uint64_t)info.st_ino;
    return PSOUP_OK;
fail:
    psoup__file_close(context, out);
    return status;
}

/* The first failure is the one that is told of. */
static void remember(psoup__file *file, uint64_t offset, int reason) {
    if (__atomic_exchange_n(&file->failed, 1, __ATOMIC_RELAXED) == 0) {
        file->lost = offset;
        file->reason = reason;
    }
}

bool psoup__file_at(psoup__file *file, uint64_t offset, size_t bytes, void *out) {
    unsigned char *to = out;
    size_t done = 0;
    while (done < bytes) {
        ssize_t n = pread(file->fd, to + done, bytes - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            remember(file, offset + done, n < 0 ? errno : 0);
            memset(to + done, 0, bytes - done);
            return false;
        }
        done += (size_t)n;
    }
    return true;
}

static int read_file(void *user, size_t index, uint64_t offset, size_t bytes, void *out) {
    (void)index;
    return psoup__file_at(user, offset, bytes, out) ? 0 : 1;
}

const psoup__pull *psoup__file_pull(psoup__file *file) {
    file->pull = (psoup__pull){.read = read_file, .user = file, .failed = &file->failed};
    return &file->pull;
}

psoup_status psoup__file_check(const psoup__file *file, const char *part, psoup_error *error) {
    struct stat is;
    if (file->failed && file->reason != 0) {
        errno = file->reason;
        return psoup__fail(error, PSOUP_ERROR_IO, "%s: %scannot read: %m", file->path, part);
    }
    if (stat(file->path, &is) != 0)
        return psoup__fail(error, PSOUP_ERROR_IO, "%s: went away while it was read: %m", file->path);
    if (file->failed || (uintmax_t)is.st_size != file->length || is.st_mtim.tv_sec != file->seconds ||
        is.st_mtim.tv_nsec != file->nanoseconds || is.st_dev != file->device || is.st_ino != file->inode)
        return psoup__fail(error, PSOUP_ERROR_IO, "%s: %swas changed while it was read (%zu bytes, now %lld)",
                           file->path, part, file->length, (long long)is.st_size);
    return PSOUP_OK;
}

uint64_t psoup__file_lost(const psoup__file *file) {
    struct stat is;
    if (file->failed)
        return file->lost;
    return stat(file->path, &is) == 0 && (uintmax_t)is.st_size < file->length ? (uint64_t)is.st_size
                                                                             : UINT64_MAX;
}

psoup_status psoup__file_map(psoup__file *file, psoup_error *error) {
    if (file->length > 0) {
        void *data = mmap(NULL, file->length, PROT_READ, MAP_PRIVATE, file->fd, 0);
        if (data == MAP_FAILED)
            return psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot map %zu bytes: %m", file->path, file->length);
        file->data = data;
    }
    close(file->fd);
    file->open = false;
    return PSOUP_OK;
}

void psoup__file_close(psoup_context *context, psoup__file *file) {
    if (file->data != NULL)
        munmap((void *)file->data, file->length);
    if (file->open)
        close(file->fd);
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
