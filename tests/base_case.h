/* What the tests of the ground floor's files share: a directory of their own and a context. Every
 * program uses most of it. */
#ifndef BASE_CASE_H
#define BASE_CASE_H

#include <check.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/base.h"

static psoup_context *context;
static psoup_error error;
static char folder[256];

/* A path in this test's own directory; of the last eight calls. */
__attribute__((unused)) static const char *at(const char *name) {
    static char paths[8][512];
    static int turn;
    char *path = paths[turn++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

__attribute__((unused)) static void set_up(void) {
    const char *place = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/psoup-test-XXXXXX", place != NULL ? place : P_tmpdir);
    ck_assert_ptr_nonnull(mkdtemp(folder));
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.threads = 2;
    ck_assert_int_eq(psoup_context_create(&options, &context, NULL), PSOUP_OK);
}

/* How many names the test's directory holds; removes them when asked to. */
__attribute__((unused)) static int names(bool removing) {
    DIR *directory = opendir(folder);
    int n = 0;
    for (struct dirent *e; (e = readdir(directory)) != NULL;)
        if (e->d_name[0] != '.') {
            n++;
            if (removing)
                remove(at(e->d_name));
        }
    closedir(directory);
    return n;
}

__attribute__((unused)) static void tear_down(void) {
    psoup_context_free(context);
    names(true);
    rmdir(folder);
}

__attribute__((unused)) static void put(const char *path, const void *data, size_t length) {
    FILE *file = fopen(path, "wb");
    ck_assert(file != NULL && fwrite(data, 1, length, file) == length && fclose(file) == 0);
}

__attribute__((unused)) static void put_text(const char *path, const char *text) {
    put(path, text, strlen(text));
}

__attribute__((unused)) static char *get(const char *path, size_t *length) {
    char *data;
    ck_assert_msg(psoup__file_read(context, path, 1 << 28, &data, length, &error) == PSOUP_OK, "%s",
                  error.message);
    return data;
}

__attribute__((unused)) static void check_text(const char *path, const char *expected) {
    size_t length;
    char *text = get(path, &length);
    ck_assert_str_eq(text, expected);
    psoup__free(context, text);
}

#define CONTAINS(text)                                                                             \
    ck_assert_msg(strstr(error.message, (text)) != NULL, "\"%s\" lacks \"%s\"", error.message,     \
                  (text))
#define OK(call) ck_assert_msg((call) == PSOUP_OK, "%s", error.message)
#define FAILS(call, code, text)                                                                    \
    do {                                                                                           \
        error.message[0] = '\0';                                                                   \
        ck_assert_int_eq(call, code);                                                              \
        CONTAINS(text);                                                                            \
    } while (0)

__attribute__((unused)) static psoup_json *parse(const char *text) {
    psoup_json *value;
    OK(psoup_json_parse(text, strlen(text), "text", &value, &error));
    return value;
}

__attribute__((unused)) static psoup_json *numbered(int i) {
    char text[300];
    memset(text, "a{}[]\\\"\n,"[i % 9], sizeof text); /* what a scanner of brackets may trip on */
    text[i % 299] = '\0';
    psoup_json *row = psoup_json_new_object();
    ck_assert_int_eq(psoup_json_set(row, "i", psoup_json_new_integer(i)), 0);
    ck_assert_int_eq(psoup_json_set(row, "text", psoup_json_new_string(text)), 0);
    return row;
}

#endif
