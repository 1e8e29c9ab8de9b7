/* A directory that appears when it is whole. It grows beside its place and is renamed; where its place is
 * taken by a directory, it grows inside that and its files are moved one by one, the one by which readers
 * find the others last. */
#include "merge/engine.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define PARTIAL ".psoup-partial"
#define LOCK ".lock"

static bool is_dot(const char *name) {
    return strcmp(name, ".") == 0 || strcmp(name, "..") == 0;
}

/* Removes the files of the work directory, and it. It was opened when it was made: opening takes memory,
 * and to be out of that may be why nothing is to stay. */
static void remove_files(const psoup__staging *s) {
    rewinddir(s->directory);
    for (const struct dirent *entry; (entry = readdir(s->directory)) != NULL;)
        if (!is_dot(entry->d_name))
            unlinkat(dirfd(s->directory), entry->d_name, 0);
    rmdir(s->work);
}

static psoup_status take_lock(psoup__staging *s, psoup_error *error) {
    s->lock = openat(dirfd(s->directory), LOCK, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (s->lock < 0) {
        psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot create files in it: %m", s->work);
        rmdir(s->work); /* where it is empty */
        return PSOUP_ERROR_IO;
    }
    struct stat here, there;
    if ((flock(s->lock, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) ||
        fstat(dirfd(s->directory), &here) != 0 || stat(s->work, &there) != 0 || here.st_ino != there.st_ino)
        return psoup__fail(error, PSOUP_ERROR_STATE, "%s: another merge is writing there", s->work);
    return PSOUP_OK;
}

/* Drops what an earlier run left, but for the lock and the names. */
void psoup__staging_keep(const psoup__staging *s, const char *const *names, size_t n) {
    rewinddir(s->directory);
    for (const struct dirent *entry; (entry = readdir(s->directory)) != NULL;) {
        bool kept = is_dot(entry->d_name) || strcmp(entry->d_name, LOCK) == 0;
        for (size_t i = 0; i < n && !kept; i++)
            kept = strcmp(entry->d_name, names[i]) == 0;
        if (!kept)
            unlinkat(dirfd(s->directory), entry->d_name, 0);
    }
}

psoup_status psoup__staging_open(psoup_context *context, const char *target, bool keep,
                                 psoup__staging *out, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    *out = (psoup__staging){.context = context, .keep = true, .lock = -1}; /* until it is ours */
    size_t length = strlen(target);
    while (length > 1 && target[length - 1] == '/')
        length--;
    if ((out->target = psoup__format(context, error, "%.*s", (int)length, target)) == NULL)
        goto fail;
    if (psoup__file_exists(out->target) && !psoup__is_directory(out->target)) {
        status = psoup__fail(error, PSOUP_ERROR_IO, "%s: is there and is no directory", out->target);
        goto fail;
    }
    out->inside = psoup__is_directory(out->target);
    out->work = psoup__format(context, error, out->inside ? "%s/" PARTIAL : "%s" PARTIAL, out->target);
    if (out->work == NULL)
        goto fail;
    PSOUP__TRY(psoup__make_directories(out->work, error));
    if ((out->directory = opendir(out->work)) == NULL) {
        status = psoup__fail(error, errno == ENOMEM ? PSOUP_ERROR_MEMORY : PSOUP_ERROR_IO,
                             "%s: cannot read: %m", out->work);
        rmdir(out->work); /* where it is empty */
        goto fail;
    }
    PSOUP__TRY(take_lock(out, error));
    out->keep = keep;
    if (!keep)
        psoup__staging_keep(out, NULL, 0);
    return PSOUP_OK;
fail:
    psoup__staging_free(out);
    return status;
}

/* A shard of an earlier result, which loaders that take every file would load too. */
static bool is_old_shard(const char *name) {
    unsigned part, parts;
    int end = 0;
    return sscanf(name, "model-%5u-of-%5u.safetensors%n", &part, &parts, &end) == 2 && end > 0 &&
           name[end] == '\0';
}

/* An adapter may lie beside a model: each takes the place of its own kind only. */
static psoup_status clear_target(const psoup__staging *s, const char *entry_name, psoup_error *error) {
    static const char *const models[] = {"model.safetensors.index.json", "model.safetensors",
                                         "psoup-merge.json"};
    static const char *const adapters[] = {"adapter_model.safetensors", "psoup-merge.json"};
    bool adapter = strcmp(entry_name, adapters[0]) == 0;
    const char *const *entries = adapter ? adapters : models;
    psoup_status status = PSOUP_OK;
    DIR *directory = opendir(s->target);
    if (directory == NULL)
        return psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot read: %m", s->target);
    for (size_t i = 0; i < (adapter ? 2 : 3) && status == PSOUP_OK; i++)
        if (unlinkat(dirfd(directory), entries[i], 0) != 0 && errno != ENOENT)
            status = psoup__fail(error, PSOUP_ERROR_IO, "%s/%s: cannot remove: %m", s->target, entries[i]);
    for (const struct dirent *entry; !adapter && status == PSOUP_OK && (entry = readdir(directory)) != NULL;)
        if (is_old_shard(entry->d_name))
            unlinkat(dirfd(directory), entry->d_name, 0);
    closedir(directory);
    return status;
}

static psoup_status move_one(const psoup__staging *s, const char *name, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    char *from = psoup__path_join(s->context, s->work, name, error);
    char *to = psoup__path_join(s->context, s->target, name, error);
    if (from == NULL || to == NULL)
        status = PSOUP_ERROR_MEMORY;
    else if (rename(from, to) != 0)
        status = psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot put in its place: %m", to);
    psoup__free(s->context, from);
    psoup__free(s->context, to);
    return status;
}

static psoup_status move_files(const psoup__staging *s, const char *last, psoup_error *error) {
    psoup_status status;
    PSOUP__TRY(clear_target(s, last, error));
    rewinddir(s->directory);
    for (const struct dirent *entry; (entry = readdir(s->directory)) != NULL;)
        if (!is_dot(entry->d_name) && strcmp(entry->d_name, LOCK) != 0 && strcmp(entry->d_name, last) != 0)
            PSOUP__TRY(move_one(s, entry->d_name, error));
    PSOUP__TRY(move_one(s, last, error));
fail:
    return status;
}

static void sync_directory(const char *path) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return;
    (void)fsync(fd); /* some file systems cannot, and the data is synced already */
    close(fd);
}

psoup_status psoup__staging_commit(psoup__staging *s, const char *entry, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    char *parent = psoup__strdup(s->context, s->target, error);
    if (parent == NULL)
        return PSOUP_ERROR_MEMORY;
    char *slash = strrchr(parent, '/');
    if (s->inside) {
        PSOUP__TRY(move_files(s, entry, error));
        sync_directory(s->target);
        remove_files(s);
    } else {
        sync_directory(s->work);
        if (rename(s->work, s->target) != 0) {
            status = psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot put in its place: %m", s->target);
            goto fail;
        }
        unlinkat(dirfd(s->directory), LOCK, 0); /* held until here, so that nobody takes it for left over */
        if (slash != NULL)
            slash[slash == parent] = '\0';
        sync_directory(slash != NULL ? parent : ".");
    }
    s->committed = true;
fail:
    psoup__free(s->context, parent);
    return status;
}

void psoup__staging_free(psoup__staging *s) {
    if (s->context == NULL)
        return;
    if (!s->committed && !s->keep && s->directory != NULL)
        remove_files(s);
    if (s->directory != NULL)
        closedir(s->directory);
    if (s->lock >= 0)
        close(s->lock);
    psoup__free(s->context, s->target);
    psoup__free(s->context, s->work);
    *s = (psoup__staging){0};
}
