/* Readers and writers of files; and what everything on the ground floor does when an allocation
 * fails. */
#include <sys/stat.h>

#include "base_case.h"

/* ---- files ----------------------------------------------------------------------------------- */

START_TEST(writers) {
    psoup__writer *writer;
    const char *files[] = {"data.bin", "data.bin.zst"};
    enum { size = 300000 };
    unsigned char *data = malloc(size);
    psoup__random random = {.seed = 1};
    for (int i = 0; i < size; i++)
        data[i] = (unsigned char)psoup__random_word(&random);
    for (int f = 0; f < 2; f++) {
        put_text(at(files[f]), "old");
        OK(psoup__writer_create(context, at(files[f]), &writer, &error));
        OK(psoup__writer_write(writer, data, size, &error));
        ck_assert_int_eq(names(false), 2); /* the old file and the one beside it */
        psoup__writer_free(writer);
        ck_assert_int_eq(names(false), 1);
        struct stat info;
        ck_assert(stat(at(files[f]), &info) == 0 && info.st_size == 3);

        OK(psoup__writer_create(context, at(files[f]), &writer, &error));
        for (size_t done = 0, step = 1; done < size; done += step, step = step * 3 % 70001) {
            if (step > size - done)
                step = size - done;
            OK(psoup__writer_write(writer, data + done, step, &error));
        }
        OK(psoup__writer_commit(writer, &error));
        FAILS(psoup__writer_write(writer, data, 1, &error), PSOUP_ERROR_STATE, files[f]);
        FAILS(psoup__writer_commit(writer, &error), PSOUP_ERROR_STATE, files[f]);
        psoup__writer_free(writer);
        ck_assert_int_eq(names(false), 1);
        size_t length;
        char *back = get(at(files[f]), &length);
        ck_assert_uint_eq(length, size);
        ck_assert_mem_eq(back, data, size);
        psoup__free(context, back);
        FAILS(psoup__file_read(context, at(files[f]), size - 1, &back, &length, &error),
              PSOUP_ERROR_FORMAT, "299999");
        ck_assert_ptr_null(back);
        if (f == 1) { /* cut and damaged archives */
            struct stat whole;
            stat(at(files[1]), &whole);
            for (long cut = 0; cut < whole.st_size; cut += cut < 64 ? 1 : 9973) {
                ck_assert_int_eq(truncate(at(files[1]), whole.st_size - 1 - cut), 0);
                FAILS(psoup__file_read(context, at(files[1]), size, &back, &length, &error),
                      PSOUP_ERROR_FORMAT, "cut short");
                OK(psoup__writer_create(context, at(files[1]), &writer, &error));
                OK(psoup__writer_write(writer, data, size, &error));
                OK(psoup__writer_commit(writer, &error));
                psoup__writer_free(writer);
                if (cut >= 64)
                    break;
            }
            put(at(files[1]), data, 1000);
            FAILS(psoup__file_read(context, at(files[1]), size, &back, &length, &error),
                  PSOUP_ERROR_FORMAT, "not valid Zstandard");
            put(at(files[1]), data, 0);
            FAILS(psoup__file_read(context, at(files[1]), size, &back, &length, &error),
                  PSOUP_ERROR_FORMAT, "cut short");
        }
        names(true);
    }
    free(data);
    FAILS(psoup__writer_create(context, at("no/such/place"), &writer, &error), PSOUP_ERROR_IO,
          "no/such/place: cannot create: No such file");
    ck_assert_ptr_null(writer);
    FAILS(psoup__writer_create(context, folder, &writer, &error), PSOUP_ERROR_IO, "not a regular");
    /* a name that becomes a directory meanwhile */
    OK(psoup__writer_create(context, at("later"), &writer, &error));
    ck_assert_int_eq(mkdir(at("later"), 0777), 0);
    FAILS(psoup__writer_commit(writer, &error), PSOUP_ERROR_IO, "later: cannot put in its place");
    psoup__writer_free(writer);
    ck_assert_int_eq(names(false), 1);
}
END_TEST

START_TEST(files) {
    psoup__file file;
    put_text(at("a"), "abc");
    OK(psoup__file_open(context, at("a"), &file, &error));
    ck_assert_str_eq(file.path, at("a"));
    char bytes[3];
    ck_assert(psoup__file_at(&file, 1, 2, bytes) && memcmp(bytes, "bc", 2) == 0);
    OK(psoup__file_check(&file, "", &error));
    ck_assert(psoup__file_lost(&file) == UINT64_MAX);
    OK(psoup__file_map(&file, &error));
    ck_assert(file.length == 3 && memcmp(file.data, "abc", 3) == 0);
    psoup__file_close(context, &file);
    ck_assert(file.data == NULL && file.path == NULL);
    /* cut short: zeros, and an error from then on, though the bytes come back */
    OK(psoup__file_open(context, at("a"), &file, &error));
    ck_assert_int_eq(truncate(at("a"), 2), 0);
    ck_assert(psoup__file_lost(&file) == 2);
    ck_assert(!psoup__file_at(&file, 0, 3, bytes) && memcmp(bytes, "ab", 3) == 0);
    FAILS(psoup__file_check(&file, "x: ", &error), PSOUP_ERROR_IO, "/a: x: was changed while it was read (3 bytes, now 2)");
    put_text(at("a"), "abc");
    ck_assert(psoup__file_lost(&file) == 2);
    FAILS(psoup__file_check(&file, "", &error), PSOUP_ERROR_IO, "was changed while it was read (3 bytes, now 3)");
    psoup__file_close(context, &file);
    put_text(at("a"), "");
    OK(psoup__file_open(context, at("a"), &file, &error));
    OK(psoup__file_map(&file, &error));
    ck_assert(file.length == 0 && file.data == NULL);
    psoup__file_close(context, &file);
    check_text(at("a"), "");
    FAILS(psoup__file_open(context, at("b"), &file, &error), PSOUP_ERROR_IO, "/b: cannot open: No");
    FAILS(psoup__file_open(context, folder, &file, &error), PSOUP_ERROR_IO, "not a regular file");
    char *text;
    size_t length;
    FAILS(psoup__file_read(context, folder, 10, &text, &length, &error), PSOUP_ERROR_IO,
          "directory");

    ck_assert(psoup__file_exists(at("a")) && !psoup__file_exists(at("b")));
    ck_assert(psoup__is_directory(folder) && !psoup__is_directory(at("a")));
    OK(psoup__make_directories(at("d/e//f/"), &error));
    OK(psoup__make_directories(at("d/e/f"), &error));
    ck_assert(psoup__is_directory(at("d/e/f")));
    FAILS(psoup__make_directories(at("a/b"), &error), PSOUP_ERROR_IO, "/a: cannot make");
    FAILS(psoup__make_directories(at("a"), &error), PSOUP_ERROR_IO, "Not a directory");
    FAILS(psoup__make_directories("", &error), PSOUP_ERROR_ARGUMENT, "1 to");
    ck_assert(rmdir(at("d/e/f")) == 0 && rmdir(at("d/e")) == 0);
    static const char *const joins[][3] = {{"a", "b", "a/b"}, {"a/", "b", "a/b"}, {"", "b", "b"}};
    for (int i = 0; i < 3; i++) {
        char *path = psoup__path_join(context, joins[i][0], joins[i][1], &error);
        ck_assert_str_eq(path, joins[i][2]);
        psoup__free(context, path);
    }
}
END_TEST

/* ---- failing allocations -----------------------------------------------------------------------
 */

typedef struct quota {
    long left, live;
} quota;

static void *quota_alloc(void *user, size_t bytes, size_t alignment) {
    quota *q = user;
    void *memory = NULL;
    if (q->left-- <= 0 || posix_memalign(&memory, alignment, bytes) != 0)
        return NULL;
    q->live++;
    return memory;
}

static void quota_free(void *user, void *memory) {
    quota *q = user;
    q->live -= memory != NULL;
    free(memory);
}

/* Something of everything that allocates. */
static psoup_status everything(quota *q) {
    psoup_status status = PSOUP_OK;
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *c = NULL;
    psoup__map *map = NULL;
    psoup__file file = {0};
    psoup_json *value = NULL, *row = NULL;
    psoup_jsonl_reader *reader = NULL;
    psoup_jsonl_writer *writer = NULL, *log = NULL;
    char key[16];
    options.threads = 2;
    options.allocator = (psoup_allocator){q, quota_alloc, quota_free};
    PSOUP__TRY(psoup_context_create(&options, &c, &error));
    PSOUP__TRY(psoup__map_create(c, 4, &map, &error));
    for (int i = 0; i < 100; i++) {
        int n = snprintf(key, sizeof key, "%d", i);
        status = psoup__map_set(map, key, (size_t)n, i, NULL, &error);
        for (int j = 0; j <= i; j++) { /* whole, whatever happened */
            int64_t got = -1;
            int m = snprintf(key, sizeof key, "%d", j);
            bool there = psoup__map_get(map, key, (size_t)m, &got);
            ck_assert(there == (j < i || status == PSOUP_OK) && (!there || got == j));
        }
        PSOUP__TRY(status);
    }
    PSOUP__TRY(psoup__file_open(c, at("in.json"), &file, &error));
    PSOUP__TRY(psoup__file_map(&file, &error));
    PSOUP__TRY(psoup_json_read(c, at("in.json"), &value, &error));
    PSOUP__TRY(psoup_json_write(c, at("out.json"), value, &error));
    PSOUP__TRY(psoup_json_write(c, at("out.json.zst"), value, &error));
    psoup_json_free(value);
    value = NULL;
    PSOUP__TRY(psoup_json_read(c, at("out.json.zst"), &value, &error));
    PSOUP__TRY(psoup_jsonl_create(c, at("out.jsonl.zst"), 0, &writer, &error));
    PSOUP__TRY(psoup_jsonl_create(c, at("log.jsonl"), 1, &log, &error));
    for (int i = 0; i < 50; i++) {
        PSOUP__TRY(psoup_jsonl_write(writer, value, &error));
        PSOUP__TRY(psoup_jsonl_write(log, value, &error));
    }
    PSOUP__TRY(psoup_jsonl_close(writer, &error));
    PSOUP__TRY(psoup_jsonl_open(c, at("out.jsonl.zst"), &reader, &error));
    for (int i = 0; i < 50; i++) {
        PSOUP__TRY(psoup_jsonl_next(reader, &row, &error));
        ck_assert_ptr_nonnull(row);
        psoup_json_free(row);
    }
fail:
    psoup_jsonl_reader_free(reader);
    psoup_jsonl_writer_free(writer);
    psoup_jsonl_writer_free(log);
    psoup_json_free(value);
    psoup__map_free(map);
    if (c != NULL)
        psoup__file_close(c, &file);
    psoup_context_free(c);
    return status;
}

START_TEST(every_allocation_fails_once) {
    psoup_json *value = numbered(12);
    OK(psoup_json_write(context, at("in.json"), value, &error));
    psoup_json_free(value);
    long i = 0;
    for (;; i++) {
        quota q = {.left = i};
        memset(&error, 0, sizeof error);
        psoup_status status = everything(&q);
        ck_assert_msg(q.live == 0, "allocation %ld: %ld leaked", i, q.live);
        if (status == PSOUP_OK)
            break;
        ck_assert_msg(status == PSOUP_ERROR_MEMORY && error.status == PSOUP_ERROR_MEMORY,
                      "allocation %ld: %s", i, error.message);
        CONTAINS("out of memory");
        ck_assert_ptr_null(strstr(error.message, ".tmp"));
    }
    ck_assert_int_gt(i, 30);
    ck_assert_int_eq(names(false), 5); /* no temporary file is left */
}
END_TEST

int main(void) {
    Suite *suite = suite_create("base files");
    TCase *c = tcase_create("files");
    tcase_set_timeout(c, 120);
    tcase_add_checked_fixture(c, set_up, tear_down);
    tcase_add_test(c, writers);
    tcase_add_test(c, files);
    tcase_add_test(c, every_allocation_fails_once);
    suite_add_tcase(suite, c);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
