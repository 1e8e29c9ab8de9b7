/* What the tests of resuming share: a run in a directory of its own, stopped at a step and continued, and
 * what it leaves. */
#ifndef RESUME_CASE_H
#define RESUME_CASE_H

#include "train_case.h"
#include "train/checkpoint.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct run {
    char directory[256], checkpoints[300], metrics[300];
    int stop_after; /* so many reports; 0: none */
} run;

static inline int watch_run(void *user, const psoup_step *step) {
    run *r = user;
    if (strcmp(step->phase, "pause") == 0)
        return 0;
    return r->stop_after && --r->stop_after == 0;
}

static inline void run_begin(run *r) {
    *r = (run){.stop_after = 0};
    temporary(r->directory, sizeof(r->directory));
    ck_assert_ptr_nonnull(mkdtemp(r->directory));
    snprintf(r->checkpoints, sizeof(r->checkpoints), "%s/checkpoints", r->directory);
    snprintf(r->metrics, sizeof(r->metrics), "%s/metrics.jsonl", r->directory);
}

static inline void remove_in(const char *path) {
    DIR *directory = opendir(path);
    for (const struct dirent *entry; directory && (entry = readdir(directory));)
        if (entry->d_name[0] != '.')
            unlinkat(dirfd(directory), entry->d_name, 0);
    if (directory)
        closedir(directory);
    rmdir(path);
}

static inline void run_end(run *r) {
    remove_in(r->checkpoints);
    remove_in(r->directory);
}


static inline void same_files(const char *a, const char *b) {
    size_t n, m;
    char *x, *y;
    OK(psoup__file_read(context, a, 1 << 30, &x, &n, &error));
    OK(psoup__file_read(context, b, 1 << 30, &y, &m, &error));
    ck_assert_msg(n == m && memcmp(x, y, n) == 0, "%s and %s differ", a, b);
    psoup__free(context, x);
    psoup__free(context, y);
}

/* How many checkpoints there are; *newest receives the last one's path. */
static inline int count_checkpoints(const run *r, char newest[600]) {
    DIR *directory = opendir(r->checkpoints);
    char last[256] = "";
    int n = 0;
    ck_assert_ptr_nonnull(directory);
    for (const struct dirent *entry; (entry = readdir(directory));) {
        if (entry->d_name[0] == '.')
            continue;
        n++;
        ck_assert_ptr_null(strstr(entry->d_name, ".tmp"));
        if (strcmp(entry->d_name, last) > 0)
            snprintf(last, sizeof(last), "%s", entry->d_name);
    }
    closedir(directory);
    if (newest)
        snprintf(newest, 600, "%s/%s", r->checkpoints, last);
    return n;
}

static inline void write_file(const char *path, const void *data, size_t n) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    ck_assert(fd >= 0 && write(fd, data, n) == (ssize_t)n && close(fd) == 0);
}

/* The call is refused, in one line that holds `text`. */
#define REFUSED(call, expected, text)                                                              \
    do {                                                                                           \
        error.message[0] = '\0';                                                                   \
        psoup_status got_ = (call);                                                                \
        ck_assert_msg(got_ == (expected), "%s: %s: %s", #call, psoup_status_name(got_),            \
                      error.message);                                                              \
        ck_assert_msg(strstr(error.message, text) != NULL, "'%s' has no '%s'", error.message, text); \
    } while (0)

#endif
