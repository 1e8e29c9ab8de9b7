/* Every allocation of the process can be made to fail: these definitions take the place of the C
 * library's in the program and in the shared libraries it uses. So they reach what a psoup_allocator
 * does not: the allocations of jansson, PCRE2 and Zstandard, and of the C library itself.
 */
#ifndef ALLOC_CASE_H
#define ALLOC_CASE_H

#include <check.h>
#include <dirent.h>
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "world_case.h"

#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !__has_feature(address_sanitizer)
#define CAN_INTERPOSE 1
#else
#define CAN_INTERPOSE 0 /* a sanitizer's allocator is in that place already */
#endif

static atomic_bool armed;      /* allocations are counted, and may fail */
static atomic_long made, live; /* allocations since armed; blocks not yet freed */
static long fail_at = -1;      /* the allocation that fails, from 0; −1: none */
static bool fail_on;           /* and all after it */

__attribute__((unused)) static bool fails(void) {
    if (!atomic_load(&armed))
        return false;
    long i = atomic_fetch_add(&made, 1);
    bool now = fail_at >= 0 && (i == fail_at || (fail_on && i > fail_at));
    if (now)
        errno = ENOMEM;
    return now;
}

#if CAN_INTERPOSE
void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
void __libc_free(void *);

static void *counted(void *memory) {
    if (memory != NULL)
        atomic_fetch_add(&live, 1);
    return memory;
}

void *malloc(size_t size) {
    return fails() ? NULL : counted(__libc_malloc(size));
}

void *calloc(size_t n, size_t size) {
    return fails() ? NULL : counted(__libc_calloc(n, size));
}

void *memalign(size_t alignment, size_t size) {
    return fails() ? NULL : counted(__libc_memalign(alignment, size));
}

void *aligned_alloc(size_t alignment, size_t size) {
    return memalign(alignment, size);
}

int posix_memalign(void **out, size_t alignment, size_t size) {
    void *memory = memalign(alignment, size);
    if (memory == NULL)
        return ENOMEM;
    *out = memory;
    return 0;
}

void free(void *memory) {
    if (memory != NULL)
        atomic_fetch_sub(&live, 1);
    __libc_free(memory);
}

void *realloc(void *memory, size_t size) {
    if (memory == NULL)
        return malloc(size);
    if (size == 0) {
        free(memory);
        return NULL;
    }
    return fails() ? NULL : __libc_realloc(memory, size);
}
#endif

/* ---- what a path leaves ------------------------------------------------------------------------- */

static void digest(uint64_t *sum, const void *data, size_t length) {
    for (size_t i = 0; i < length; i++) /* FNV-1a */
        *sum = (*sum ^ ((const unsigned char *)data)[i]) * 0x100000001b3u;
}

/* Rows are appended to it one by one. */
static bool grows(const char *name) { return strstr(name, "metrics") != NULL || strstr(name, "samples") != NULL; }

typedef struct left { /* a file below home/out */
    char name[300];
    uint64_t sum;
} left;
enum { MAX_LEFT = 16 };

static size_t look(const char *folder, bool removing, left *files, size_t n) {
    static char data[1 << 18];
    DIR *directory = opendir(at(folder));
    if (directory == NULL)
        return n;
    for (struct dirent *e; (e = readdir(directory)) != NULL;) {
        char name[300];
        struct stat info;
        snprintf(name, sizeof name, "%s/%s", folder, e->d_name);
        if (e->d_name[0] == '.' || stat(at(name), &info) != 0)
            continue;
        if (S_ISDIR(info.st_mode)) {
            n = look(name, removing, files, n);
            if (removing)
                rmdir(at(name));
            continue;
        }
        FILE *file = fopen(at(name), "rb");
        ck_assert(file != NULL && n < MAX_LEFT);
        size_t length = fread(data, 1, sizeof data, file);
        fclose(file);
        files[n].sum = 0xcbf29ce484222325u;
        digest(&files[n].sum, data, length);
        snprintf(files[n++].name, sizeof files->name, "%s", name);
        if (grows(name)) /* whole lines */
            ck_assert_msg(length == 0 || data[length - 1] == '\n', "%s: half a line", name);
        if (removing)
            remove(at(name));
    }
    closedir(directory);
    return n;
}

static void clear(void) {
    left files[MAX_LEFT];
    look("out", true, files, 0);
}

/* ---- failing in turn ------------------------------------------------------------------------------ */

typedef struct path {
    const char *name;
    void (*prepare)(void);            /* the handles the path works on; may be NULL */
    psoup_status (*act)(uint64_t *sum); /* leaves nothing behind but what `release` frees */
    void (*release)(void);
    bool trains; /* acting twice gives another result */
} path;

static bool whole_files(const left *got, size_t n, const left *expected, size_t n_expected,
                        const char **bad) {
    for (size_t i = 0; i < n; i++) {
        bool whole = grows(got[i].name);
        for (size_t k = 0; k < n_expected; k++)
            whole |= strcmp(got[i].name, expected[k].name) == 0 && got[i].sum == expected[k].sum;
        *bad = got[i].name;
        if (!whole)
            return false;
    }
    return true;
}

/* got [MAX_LEFT] receives the files that the failing act left. */
static psoup_status once(const path *p, long at_which, uint64_t *sum, long *leaked, left *got,
                         size_t *n_got) {
    long before = atomic_load(&live);
    if (p->prepare != NULL)
        p->prepare();
    long prepared = atomic_load(&live);
    *sum = 0xcbf29ce484222325u;
    fail_at = at_which;
    atomic_store(&made, 0);
    memset(&error, 0, sizeof error);
    atomic_store(&armed, true);
    psoup_status status = p->act(sum);
    atomic_store(&armed, false);
    *leaked = p->prepare == NULL ? atomic_load(&live) - prepared : 0;
    *n_got = look("out", false, got, 0);
    if (status != PSOUP_OK) { /* what it worked on must have stayed usable */
        psoup_error kept = error;
        uint64_t again = 0xcbf29ce484222325u;
        psoup_status second = p->act(&again);
        ck_assert_msg(second == PSOUP_OK, "%s, allocation %ld failed, then again: %s", p->name,
                      at_which, error.message);
        if (!p->trains)
            *sum = again;
        error = kept;
    }
    if (p->release != NULL)
        p->release();
    *leaked += atomic_load(&live) - before;
    return status;
}

static void check_line(const char *name, long i) {
    size_t length = strlen(error.message);
    ck_assert_msg(length > 0 && length < sizeof error.message, "%s, %ld: no message", name, i);
    for (size_t k = 0; k < length; k++)
        ck_assert_msg((unsigned char)error.message[k] >= 0x20, "%s, %ld: an unprintable message",
                      name, i);
}

/* Runs the path whole, then once for every allocation it makes, which then fails. PSOUP_LONG=1: all of
 * them, and again with all later ones failing too; else a few hundred of those of a long path. */
static void fail_in_turn(const path *p) {
    enum { FEW = 300 };
    bool all = getenv("PSOUP_LONG") != NULL;
    left expected[MAX_LEFT], got[MAX_LEFT];
    size_t n_expected, n_got;
    uint64_t sum, whole;
    long leaked, tried = 0, tolerated = 0;
    for (int warm = 0; warm < 2; warm++) { /* the C library keeps some things from a first use */
        clear();
        psoup_status status = once(p, -1, &whole, &leaked, expected, &n_expected);
        ck_assert_msg(status == PSOUP_OK, "%s: %s", p->name, error.message);
    }
    long n = atomic_load(&made);
    ck_assert_msg(n > 0, "%s: no allocation was seen", p->name);
    ck_assert_msg(leaked == 0, "%s: %ld blocks leaked without any failure", p->name, leaked);
    for (int later = 0; later < (all ? 2 : 1); later++)
        for (long i = 0; i < n; i++) {
            if (!all && ((uint64_t)i * 0x9e3779b97f4a7c15u >> 32) % (uint64_t)(1 + n / FEW) != 0)
                continue;
            const char *bad = "";
            clear();
            fail_on = later == 1;
            psoup_status status = once(p, i, &sum, &leaked, got, &n_got);
            tried++;
            tolerated += status == PSOUP_OK;
            ck_assert_msg(status == PSOUP_OK || status == PSOUP_ERROR_MEMORY,
                          "%s, allocation %ld of %ld: %s: %s", p->name, i, n,
                          psoup_status_name(status), error.message);
            ck_assert_msg(leaked == 0, "%s, allocation %ld of %ld: %ld blocks leaked (%s)", p->name,
                          i, n, leaked, error.message);
            ck_assert_msg((p->trains && status != PSOUP_OK) || sum == whole,
                          "%s, allocation %ld of %ld: another result", p->name, i, n);
            if (status != PSOUP_OK)
                check_line(p->name, i);
            ck_assert_msg(whole_files(got, n_got, expected, n_expected, &bad),
                          "%s, allocation %ld of %ld: left %s", p->name, i, n, bad);
        }
    clear();
    printf("%-28s %6ld allocations, %6ld failed in turn, %ld of no consequence\n", p->name, n, tried,
           tolerated);
}

#endif
