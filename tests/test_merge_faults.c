/* A merge that is killed, runs out of disk, or whose sources change under it; and how little memory one
 * takes. Killed at 5 moments, at 50 with PSOUP_LONG. */
#include "merge_case.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>

/* Two models of some small tensors and one larger, written once for all tests of a process. */
static void write_model(const char *directory, uint64_t seed) {
    char path[1100];
    psoup__safetensors_writer *writer;
    enum { N = 12, ROWS = 1024, COLUMNS = 512 };
    float *values = malloc(ROWS * COLUMNS * sizeof *values);
    ck_ok(psoup__make_directories(directory, &error));
    snprintf(path, sizeof path, "%s/config.json", directory);
    FILE *config = fopen(path, "w");
    ck_assert_ptr_nonnull(config);
    fputs("{\"model_type\": \"llama\", \"torch_dtype\": \"float32\"}", config);
    fclose(config);
    snprintf(path, sizeof path, "%s/model.safetensors", directory);
    ck_ok(psoup__safetensors_create(context, path, &writer, &error));
    for (int i = 0; i < N; i++) {
        char name[64];
        const int64_t shape[2] = {ROWS, COLUMNS};
        snprintf(name, sizeof name, "model.layers.%d.mlp.up_proj.weight", i);
        ck_ok(psoup__safetensors_declare(writer, name, PSOUP_F32, 2, shape, &error));
    }
    ck_ok(psoup__safetensors_begin(writer, &error));
    psoup__random random = {seed, 0, 0};
    for (int i = 0; i < N; i++) {
        for (int j = 0; j < ROWS * COLUMNS; j++)
            values[j] = psoup__random_uniform(&random) - 0.5f;
        ck_ok(psoup__safetensors_write(writer, values, ROWS * COLUMNS * sizeof *values, &error));
    }
    free(values);
    ck_ok(psoup__safetensors_commit(writer, &error));
    psoup__safetensors_writer_free(writer);
}

static char first[600], second[600], out[600], partial[700];

static void models(void) {
    set_up();
    snprintf(first, sizeof first, "%s/first", scratch);
    snprintf(second, sizeof second, "%s/second", scratch);
    snprintf(out, sizeof out, "%s/out", scratch);
    snprintf(partial, sizeof partial, "%s.psoup-partial", out);
    write_model(first, 1);
    write_model(second, 2);
}

typedef struct settings {
    bool resume;
    psoup_progress_fn progress;
    void *user;
    uint64_t shard_size;
} settings;

static psoup_status merge_into(const char *directory, settings s) {
    psoup_status status;
    psoup_merger *merger = NULL;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    options.method = PSOUP_MERGE_DARE_LINEAR;
    options.density = 0.5;
    options.shard_size = s.shard_size;
    options.resume = s.resume;
    options.progress = s.progress;
    options.progress_user = s.user;
    PSOUP__TRY(psoup_merger_create(context, &options, &merger, &error));
    PSOUP__TRY(psoup_merger_set_base(merger, first, &error));
    PSOUP__TRY(psoup_merger_add(merger, second, 0.7, &error));
    PSOUP__TRY(psoup_merger_write(merger, directory, &error));
fail:
    psoup_merger_free(merger);
    return status;
}

enum { SHARD = 5000000 }; /* two tensors */

static bool is_same(const char *a, const char *b) {
    char command[1400];
    snprintf(command, sizeof command, "diff -r '%s' '%s' >/dev/null", a, b);
    return system(command) == 0;
}

/* ---- killed -------------------------------------------------------------------------------------------- */

/* Merges in a child that is killed after so many microseconds; whether it got to its end before. */
static bool killed_after(unsigned microseconds, settings s) {
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0) { /* threads do not survive a fork: a context of its own */
        context = new_context(2, NULL);
        _exit(context != NULL && merge_into(out, s) == PSOUP_OK ? 0 : 1);
    }
    usleep(microseconds);
    kill(child, SIGKILL);
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    ck_assert(WIFSIGNALED(status) || WEXITSTATUS(status) == 0);
    return WIFEXITED(status);
}

static void remove_all(const char *path) {
    char command[800];
    snprintf(command, sizeof command, "rm -rf '%s'", path);
    ck_assert_int_eq(system(command), 0);
}

static int nanoseconds_until(const struct timespec *begin) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int)((now.tv_sec - begin->tv_sec) * 1000000000L + (now.tv_nsec - begin->tv_nsec));
}

START_TEST(killed_at_any_moment) {
    char whole[600];
    snprintf(whole, sizeof whole, "%s/whole", scratch);
    struct timespec begin;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    ck_ok(merge_into(whole, (settings){.shard_size = SHARD}));
    unsigned most = (unsigned)(nanoseconds_until(&begin) / 1000 * 3 / 2);
    int times = getenv("PSOUP_LONG") != NULL ? 50 : 5, ended = 0;
    for (int i = 0; i < times; i++) {
        uint32_t word = psoup__philox_word(9, 9, (uint64_t)i);
        bool inside = i % 2; /* into a directory that is there already */
        remove_all(out);
        remove_all(partial);
        if (inside)
            ck_ok(psoup__make_directories(out, &error));
        ended += killed_after((unsigned)((uint64_t)word * most >> 32), (settings){.shard_size = SHARD});
        /* absent or complete: a reader finds a model by its index, and then all of it */
        char index[700];
        snprintf(index, sizeof index, "%s/model.safetensors.index.json", out);
        if (psoup__file_exists(index))
            ck_ok(psoup_merge_verify(context, out, NULL, &error));
        else
            ck_assert(inside || !psoup__file_exists(out));
        ck_ok(merge_into(out, (settings){.shard_size = SHARD, .resume = true}));
        ck_assert(is_same(out, whole));
        ck_assert(!psoup__file_exists(partial));
    }
    ck_assert_int_lt(ended, times);
}
END_TEST

static int stop_after(void *user, const char *label, int64_t done, int64_t total) {
    (void)label, (void)total;
    return done == *(int64_t *)user;
}

static int count(void *user, const char *label, int64_t done, int64_t total) {
    (void)label, (void)done, (void)total;
    ++*(int64_t *)user;
    return 0;
}

START_TEST(resumes_with_finished_shards) {
    char whole[600];
    int64_t stop = 7, made = 0;
    snprintf(whole, sizeof whole, "%s/whole", scratch);
    ck_ok(merge_into(whole, (settings){.shard_size = SHARD}));
    ck_assert_int_eq(merge_into(out, (settings){.shard_size = SHARD, .resume = true, .progress = stop_after,
                                                .user = &stop}), PSOUP_ERROR_CANCELLED);
    ck_assert(psoup__file_exists(partial));
    ck_ok(merge_into(out, (settings){.shard_size = SHARD, .resume = true, .progress = count, .user = &made}));
    ck_assert_int_gt(made, 0);
    ck_assert_int_le(made, 6); /* of 12 results: at least three shards of two were there */
    ck_assert(is_same(out, whole));

    remove_all(out); /* what another merge left is not taken */
    ck_assert_int_eq(merge_into(out, (settings){.shard_size = SHARD, .resume = true, .progress = stop_after,
                                                .user = &stop}), PSOUP_ERROR_CANCELLED);
    write_model(second, 3);
    made = 0;
    ck_ok(merge_into(out, (settings){.shard_size = SHARD, .resume = true, .progress = count, .user = &made}));
    ck_assert_int_eq(made, 12);
    ck_assert(!is_same(out, whole));
    ck_ok(psoup_merge_verify(context, out, NULL, &error));
}
END_TEST

START_TEST(nothing_is_left_of_a_run_that_fails) {
    int64_t stop = 7;
    ck_assert_int_eq(merge_into(out, (settings){.shard_size = SHARD, .progress = stop_after, .user = &stop}),
                     PSOUP_ERROR_CANCELLED);
    ck_assert(!psoup__file_exists(out));
    ck_assert(!psoup__file_exists(partial));
    ck_ok(psoup__make_directories(out, &error));
    ck_assert_int_eq(merge_into(out, (settings){.progress = stop_after, .user = &stop}),
                     PSOUP_ERROR_CANCELLED);
    DIR *directory = opendir(out);
    int entries = 0;
    while (readdir(directory) != NULL)
        entries++;
    closedir(directory);
    ck_assert_int_eq(entries, 2);
}
END_TEST

START_TEST(one_merge_at_a_time_in_a_place) {
    char lock[800];
    ck_ok(psoup__make_directories(partial, &error));
    snprintf(lock, sizeof lock, "%s/.lock", partial);
    char command[1800]; /* another process holds it */
    snprintf(command, sizeof command, "flock -x '%s' -c 'touch %s/held; sleep 3' &", lock, scratch);
    ck_assert_int_eq(system(command), 0);
    for (int i = 0; i < 200 && !psoup__file_exists(in_scratch("held")); i++)
        usleep(10000);
    ck_assert_int_eq(merge_into(out, (settings){0}), PSOUP_ERROR_STATE);
    ck_assert_ptr_nonnull(strstr(error.message, "another merge is writing there"));
    ck_assert(psoup__file_exists(lock));
}
END_TEST

/* ---- disks and sources ----------------------------------------------------------------------------------- */

START_TEST(a_full_disk_is_an_error) {
    struct rlimit limit = {1000000, RLIM_INFINITY};
    signal(SIGXFSZ, SIG_IGN);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    psoup_status status = merge_into(out, (settings){0});
    limit.rlim_cur = RLIM_INFINITY;
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    ck_assert_int_eq(status, PSOUP_ERROR_IO);
    ck_assert_msg(strstr(error.message, "model.safetensors: cannot write") != NULL, "%s", error.message);
    ck_assert(!psoup__file_exists(out));
    ck_assert(!psoup__file_exists(partial));
}
END_TEST

static int harm(void *user, const char *label, int64_t done, int64_t total) {
    char path[700];
    (void)label, (void)total;
    snprintf(path, sizeof path, "%s/model.safetensors", second);
    if (done == 1 && *(int *)user == 0)
        ck_assert_int_eq(truncate(path, 100000), 0);
    if (done == 1 && *(int *)user == 1)
        write_model(second, 5);
    if (done == 1 && *(int *)user == 2)
        remove_all(second);
    return 0;
}

START_TEST(a_source_that_changes_is_an_error) {
    static const char *const says[] = {"up_proj.weight: was changed while it was read (2516", "was changed", "went away"};
    int how = _i;
    ck_assert_int_eq(merge_into(out, (settings){.shard_size = SHARD, .progress = harm, .user = &how}),
                     PSOUP_ERROR_IO);
    ck_assert_msg(strstr(error.message, "second/model.safetensors") != NULL &&
                      strstr(error.message, says[_i]) != NULL, "%s", error.message);
    ck_assert(!psoup__file_exists(out));
    ck_assert(!psoup__file_exists(partial));
}
END_TEST

/* ---- certificates ------------------------------------------------------------------------------------------ */

static psoup_status replay(const char *certificate, const char *directory) {
    psoup_merger *merger = NULL;
    psoup_status status;
    PSOUP__TRY(psoup_merger_create(context, NULL, &merger, &error));
    PSOUP__TRY(psoup_merger_load_certificate(merger, certificate, &error));
    PSOUP__TRY(psoup_merger_write(merger, directory, &error));
fail:
    psoup_merger_free(merger);
    return status;
}

START_TEST(certificates_tell_what_changed) {
    char certificate[1024], file[1024];
    size_t tensors;
    ck_ok(merge_into(out, (settings){.shard_size = SHARD}));
    ck_ok(psoup_merge_verify(context, out, &tensors, &error));
    ck_assert_uint_eq(tensors, 12);
    snprintf(certificate, sizeof certificate, "%s/psoup-merge.json", out);
    ck_ok(replay(certificate, in_scratch("again")));
    ck_assert(is_same(out, in_scratch("again")));

    snprintf(file, sizeof file, "%s/model-00002-of-00006.safetensors", out);
    int fd = open(file, O_RDWR);
    struct stat info;
    ck_assert_int_eq(fstat(fd, &info), 0);
    ck_assert_int_eq(pwrite(fd, "!", 1, info.st_size - 2), 1); /* the shard's last tensor */
    close(fd);
    ck_assert_int_eq(psoup_merge_verify(context, out, &tensors, &error), PSOUP_ERROR_FORMAT);
    ck_assert_msg(strstr(error.message, "layers.") != NULL && strstr(error.message, "other bytes") != NULL,
                  "%s", error.message);

    write_model(second, 4);
    ck_assert_int_eq(replay(certificate, in_scratch("changed")), PSOUP_ERROR_FORMAT);
    ck_assert_msg(strstr(error.message, "second: tensor model.layers.0.mlp.up_proj.weight is not what it was"),
                  "%s", error.message);
    ck_assert(!psoup__file_exists(in_scratch("changed")));
}
END_TEST

START_TEST(sha256_as_the_program_says) {
    psoup_merger *merger;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    char command[2048];
    options.sha256 = 1;
    ck_ok(psoup_merger_create(context, &options, &merger, &error));
    ck_ok(psoup_merger_add(merger, first, 1, &error));
    ck_ok(psoup_merger_write(merger, out, &error));
    psoup_merger_free(merger);
    snprintf(command, sizeof command,
             "grep -q \"$(sha256sum '%s/model.safetensors' | cut -c 1-64)\" '%s/psoup-merge.json'", first, out);
    ck_assert_int_eq(system(command), 0);
}
END_TEST

/* ---- memory -------------------------------------------------------------------------------------------------- */

static long anonymous_kilobytes(void) {
    char line[256];
    long kilobytes = -1;
    FILE *file = fopen("/proc/self/status", "r");
    while (file != NULL && fgets(line, sizeof line, file) != NULL)
        if (sscanf(line, "RssAnon: %ld", &kilobytes) == 1)
            break;
    if (file != NULL)
        fclose(file);
    return kilobytes;
}

static long highest;
static int keep(void *user, uint64_t offset, const void *data, size_t bytes) {
    (void)user, (void)offset, (void)data, (void)bytes;
    long now = anonymous_kilobytes();
    highest = now > highest ? now : highest;
    return 0;
}

/* One tensor of 264 MiB, a hole in a file. */
static void write_large(const char *path, int64_t rows) {
    char header[256];
    enum { COLUMNS = 4096 };
    size_t bytes = (size_t)rows * COLUMNS * 2;
    int n = snprintf(header + 8, sizeof header - 8,
                     "{\"w\":{\"dtype\":\"BF16\",\"shape\":[%lld,%d],\"data_offsets\":[0,%zu]}}",
                     (long long)rows, COLUMNS, bytes);
    uint64_t length = (uint64_t)n;
    memcpy(header, &length, 8);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(write(fd, header, 8 + (size_t)n), 8 + n);
    ck_assert_int_eq(ftruncate(fd, (off_t)(8 + (size_t)n + bytes)), 0);
    close(fd);
}

START_TEST(takes_little_memory) {
#ifdef __SANITIZE_ADDRESS__
    return; /* its own memory is several times ours */
#endif
    static const int32_t methods[] = {PSOUP_MERGE_LINEAR, PSOUP_MERGE_DELLA, PSOUP_MERGE_TIES,
                                      PSOUP_MERGE_SLERP};
    if (_i > 1 && getenv("PSOUP_LONG") == NULL)
        return;
    psoup_merger *merger;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    psoup_merge_sink sink = PSOUP_MERGE_SINK_INIT;
    char path[700];
    snprintf(path, sizeof path, "%s/large.safetensors", scratch);
    write_large(path, 33792);
    options.method = methods[_i];
    options.density = 0.5;
    options.t = 0.25;
    sink.write = keep;
    highest = 0;
    ck_ok(psoup_merger_create(context, &options, &merger, &error));
    ck_ok(psoup_merger_set_base(merger, path, &error));
    ck_ok(psoup_merger_add(merger, path, 0.5, &error));
    if (methods[_i] != PSOUP_MERGE_SLERP)
        ck_ok(psoup_merger_add(merger, path, 0.5, &error));
    ck_ok(psoup_merger_run(merger, &sink, &error));
    psoup_merger_free(merger);
    ck_assert_int_gt(highest, 0);
    ck_assert_msg(highest < 256 * 1024, "%s: %ld KiB", psoup_merge_method_name(methods[_i]), highest);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("merge_faults");
    TCase *tests = tcase_create("merge_faults");
    tcase_add_checked_fixture(tests, models, tear_down);
    tcase_set_timeout(tests, 300);
    tcase_add_test(tests, killed_at_any_moment);
    tcase_add_test(tests, resumes_with_finished_shards);
    tcase_add_test(tests, nothing_is_left_of_a_run_that_fails);
    tcase_add_test(tests, one_merge_at_a_time_in_a_place);
    tcase_add_test(tests, a_full_disk_is_an_error);
    tcase_add_loop_test(tests, a_source_that_changes_is_an_error, 0, 3);
    tcase_add_test(tests, certificates_tell_what_changed);
    tcase_add_test(tests, sha256_as_the_program_says);
    tcase_add_loop_test(tests, takes_little_memory, 0, 4);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
