/* Files that are truncated, overwritten, replaced or unreadable while they are merged: always the right bytes, or
 * one line that names the file, and nothing left behind. The reads are this program's own, so that a file can be
 * harmed at each of them in turn; and another process harms one in a loop. */
#include "merge_case.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>

#define GGUF "tests/golden/gguf/"

/* ---- the victim, and what is done to it ---------------------------------------------------------------- */

typedef enum harm { CUT, EMPTIED, OVERWRITTEN, REPLACED, REMOVED, UNREADABLE, SLOW, HARMS } harm;

static char victim[700];
static unsigned char whole[1 << 17]; /* [whole_bytes], as the victim is before */
static size_t whole_bytes;
static long reads, harm_at; /* reads of the victim; the one before which it is harmed */
static harm how;

static void put(const char *path, const void *data, size_t bytes) {
    FILE *file = fopen(path, "wb");
    ck_assert(file != NULL && fwrite(data, 1, bytes, file) == bytes && fclose(file) == 0);
}

/* As it was, and of long ago: a change within a clock's tick could not be seen. */
static void heal(void) {
    const struct timeval old[2] = {{1000000000, 0}, {1000000000, 0}};
    put(victim, whole, whole_bytes);
    ck_assert_int_eq(utimes(victim, old), 0);
    reads = 0;
    harm_at = -1;
}

static void choose(const char *directory, const char *name) {
    snprintf(victim, sizeof victim, "%s%s%s", directory, *name != '\0' ? "/" : "", name);
    FILE *file = fopen(victim, "rb");
    ck_assert_ptr_nonnull(file);
    whole_bytes = fread(whole, 1, sizeof whole, file);
    ck_assert(whole_bytes > 100 && whole_bytes < sizeof whole);
    fclose(file);
    heal();
}

static void do_harm(void) {
    char beside[800];
    switch (how) {
    case CUT: ck_assert_int_eq(truncate(victim, (off_t)whole_bytes / 2), 0); break;
    case EMPTIED: ck_assert_int_eq(truncate(victim, 0), 0); break;
    case OVERWRITTEN: {
        FILE *file = fopen(victim, "r+b");
        ck_assert(file != NULL && fseek(file, (long)whole_bytes - 40, SEEK_SET) == 0);
        ck_assert(fwrite("another program's bytes", 1, 23, file) == 23 && fclose(file) == 0);
        break;
    }
    case REPLACED:
        snprintf(beside, sizeof beside, "%s.new", victim);
        put(beside, whole, whole_bytes);
        ck_assert_int_eq(rename(beside, victim), 0);
        break;
    case REMOVED: ck_assert_int_eq(unlink(victim), 0); break;
    default: break;
    }
}

static bool is_victim(int fd) {
    struct stat a, b;
    return *victim != '\0' && fstat(fd, &a) == 0 && stat(victim, &b) == 0 && a.st_dev == b.st_dev &&
           a.st_ino == b.st_ino;
}

/* In place of the C library's. */
ssize_t pread(int fd, void *out, size_t bytes, off_t offset) {
    if (is_victim(fd)) {
        long read = __atomic_fetch_add(&reads, 1, __ATOMIC_SEQ_CST);
        if (read == harm_at)
            do_harm();
        if (harm_at >= 0 && read >= harm_at && how == UNREADABLE) {
            errno = EIO;
            return -1;
        }
        if (how == SLOW && read % 3 == 0) {
            errno = EINTR;
            return -1;
        }
        if (how == SLOW && bytes > 1000)
            bytes = 1000;
    }
    return (ssize_t)syscall(SYS_pread64, fd, out, bytes, offset);
}

/* ---- what is made of it -------------------------------------------------------------------------------- */

static char directory[600], out[600], result[700], certificate[700];

static void copy(const char *from, const char *name) {
    char command[1800];
    snprintf(command, sizeof command, "cp -r '%s' '%s/%s'", from, scratch, name);
    ck_assert_int_eq(system(command), 0);
    snprintf(directory, sizeof directory, "%s/%s", scratch, name);
}

static psoup_status merge(int32_t method, int32_t format, int32_t sha256, const char *base, const char *first,
                          const char *second) {
    psoup_status status;
    psoup_merger *merger = NULL;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    options.method = method;
    options.density = 0.5;
    options.t = 0.3;
    options.format = format;
    options.sha256 = sha256;
    PSOUP__TRY(psoup_merger_create(context, &options, &merger, &error));
    if (base != NULL)
        PSOUP__TRY(psoup_merger_set_base(merger, base, &error));
    PSOUP__TRY(psoup_merger_add(merger, first, second != NULL ? 0.5 : 1, &error));
    if (second != NULL)
        PSOUP__TRY(psoup_merger_add(merger, second, 0.5, &error));
    PSOUP__TRY(psoup_merger_write(merger, out, &error));
fail:
    psoup_merger_free(merger);
    return status;
}

#define M11 GOLDEN "model11"
#define M12 GOLDEN "model12"

static psoup_status linear(void) {
    return merge(PSOUP_MERGE_LINEAR, 0, 0, NULL, M11, directory);
}
static psoup_status with_sha256(void) {
    return merge(PSOUP_MERGE_LINEAR, 0, 1, NULL, M11, directory);
}
static psoup_status ties(void) {
    return merge(PSOUP_MERGE_TIES, 0, 0, M11, M12, directory);
}
static psoup_status slerp(void) {
    return merge(PSOUP_MERGE_SLERP, 0, 0, directory, M12, NULL);
}
static psoup_status folded(void) {
    return merge(PSOUP_MERGE_DELTA, 0, 0, BASE, A, directory);
}
static psoup_status fold_onto(void) {
    return merge(PSOUP_MERGE_DELTA, 0, 0, directory, A, B);
}
static psoup_status one_adapter(void) {
    return merge(PSOUP_MERGE_DELTA, 0, 0, NULL, A, directory);
}
static psoup_status from_gguf(void) {
    return merge(PSOUP_MERGE_LINEAR, 0, 0, NULL, GGUF "llama-bf16.gguf", victim);
}
static psoup_status to_gguf(void) {
    return merge(PSOUP_MERGE_LINEAR, PSOUP_MERGE_GGUF, 0, NULL, victim, NULL);
}

static psoup_status verified(void) {
    return psoup_merge_verify(context, directory, NULL, &error);
}

static psoup_status inspected(void) {
    const char *adapters[2] = {A, directory};
    psoup_json *answer = NULL;
    psoup_status status = psoup_merge_inspect(context, adapters, 2, NULL, &answer, &error);
    char *text = status == PSOUP_OK ? psoup_json_text(answer, 0) : NULL;
    if (text != NULL)
        put(result, text, strlen(text));
    psoup_text_free(text);
    psoup_json_free(answer);
    return status;
}

static void prepare_verify(void) {
    snprintf(out, sizeof out, "%s/merged", scratch);
    ck_ok(merge(PSOUP_MERGE_LINEAR, 0, 0, NULL, M11, M12));
    snprintf(directory, sizeof directory, "%s", out);
}

static const struct {
    const char *name;
    psoup_status (*make)(void);
    const char *from, *file; /* the victim: a directory, and the file in it; "" where it is a file itself */
    const char *makes;       /* of the place of the result, "" the place itself; NULL: nothing */
} kinds[] = {
    {"linear", linear, M12, "model.safetensors", "/model.safetensors"},
    {"sha256", with_sha256, M12, "model.safetensors", "/model.safetensors"},
    {"ties", ties, GOLDEN "model11", "model.safetensors", "/model.safetensors"},
    {"slerp", slerp, GOLDEN "model11", "model.safetensors", "/model.safetensors"},
    {"folded", folded, GOLDEN "b", "adapter_model.safetensors", "/model.safetensors"},
    {"fold onto", fold_onto, GOLDEN "base", "model.safetensors", "/model.safetensors"},
    {"one adapter", one_adapter, GOLDEN "b", "adapter_model.safetensors", "/adapter_model.safetensors"},
    {"GGUF", from_gguf, GGUF "llama-q8_0.gguf", "", "/model.safetensors"},
    {"to GGUF", to_gguf, GGUF "llama3-f16.gguf", "", ""},
    {"inspect", inspected, GOLDEN "b", "adapter_model.safetensors", NULL},
    {"verify", verified, NULL, "model.safetensors", NULL},
};
enum { KINDS = sizeof kinds / sizeof *kinds };

static void take_place(int kind) {
    if (kinds[kind].from != NULL)
        copy(kinds[kind].from, kinds[kind].file[0] != '\0' ? "source" : "source.gguf");
    else
        prepare_verify();
    choose(directory, kinds[kind].file);
    snprintf(out, sizeof out, "%s/out%s", scratch, kinds[kind].make == to_gguf ? ".gguf" : "");
    snprintf(result, sizeof result, "%s%s", out, kinds[kind].makes != NULL ? kinds[kind].makes : "");
    snprintf(certificate, sizeof certificate, "%s/out.psoup-merge.json", scratch);
}

/* The bytes that were made; nothing is left of them. */
static size_t collect(unsigned char *bytes, size_t capacity) {
    char command[1500];
    FILE *file = fopen(result, "rb");
    size_t n = file != NULL ? fread(bytes, 1, capacity, file) : 0;
    if (file != NULL)
        fclose(file);
    snprintf(command, sizeof command, "rm -rf '%s' '%s'", out, certificate);
    ck_assert_int_eq(system(command), 0);
    return n;
}

/* Neither the result, nor what it grows in; of `inspect` there is no result. */
static void nothing_is_left(void) {
    DIR *all = opendir(scratch);
    ck_assert_ptr_nonnull(all);
    for (struct dirent *one; (one = readdir(all)) != NULL;)
        ck_assert_msg(one->d_name[0] == '.' ? strspn(one->d_name, ".") == strlen(one->d_name)
                                            : strncmp(one->d_name, "source", 6) == 0 ||
                                                  strcmp(one->d_name, "merged") == 0,
                      "%s is left: %s", one->d_name, error.message);
    closedir(all);
}

static bool one_line(void) {
    return strstr(error.message, victim) != NULL && strchr(error.message, '\n') == NULL;
}

enum { ROOM = 1 << 20 };
static unsigned char right[ROOM], changed[ROOM], made[ROOM];

/* At some of the reads, at all with PSOUP_LONG. What is changed before a file is opened for merging (a GGUF file is
 * looked into before) is merged as it is then. */
START_TEST(harmed_at_each_read) {
    const int kind = _i / HARMS;
    how = (harm)(_i % HARMS);
    take_place(kind);
    ck_assert_msg(kinds[kind].make() == PSOUP_OK, "%s: %s", kinds[kind].name, error.message);
    const size_t n = collect(right, ROOM);
    ck_assert(n < ROOM && (n > 0 || kinds[kind].make == verified));
    const long last = reads, step = getenv("PSOUP_LONG") != NULL ? 1 : last / 16 + 1;
    size_t m = 0;
    int failures = 0, named = 0;
    ck_assert_int_ge(last, 3);
    if (how == OVERWRITTEN && kinds[kind].make != verified) {
        do_harm();
        ck_assert_msg(kinds[kind].make() == PSOUP_OK, "%s: %s", kinds[kind].name, error.message);
        m = collect(changed, ROOM);
    }
    for (long at = 0; at < last; at += step) {
        heal();
        harm_at = at;
        psoup_status status = kinds[kind].make();
        if (status == PSOUP_OK) {
            const size_t k = collect(made, ROOM);
            ck_assert_msg((k == n && memcmp(made, right, n) == 0) ||
                              (m > 0 && k == m && memcmp(made, changed, m) == 0),
                          "%s, harm %d at read %ld", kinds[kind].name, (int)how, at);
            continue;
        }
        failures++;
        named += strstr(error.message, "tensor ") != NULL;
        ck_assert_msg(one_line() && (status == PSOUP_ERROR_IO || status == PSOUP_ERROR_FORMAT),
                      "%s, harm %d at read %ld: %s", kinds[kind].name, (int)how, at, error.message);
        if (how == UNREADABLE)
            ck_assert_msg(strstr(error.message, "cannot read: Input/output error") != NULL, "%s", error.message);
        nothing_is_left();
    }
    if (how == SLOW) /* reads that give less than was asked for, or are interrupted, are none */
        ck_assert_int_eq(failures, 0);
    else
        ck_assert_msg(failures > 0, "%s, harm %d: never seen", kinds[kind].name, (int)how);
    if (how == CUT || how == EMPTIED || how == UNREADABLE)
        ck_assert_int_gt(named, 0);
}
END_TEST

/* A merger reads its files again for every run: what could not be read once may be there now. */
START_TEST(a_merger_tries_again) {
    psoup_merger *merger;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    options.method = PSOUP_MERGE_LINEAR;
    options.density = 0.5; /* as in merge(), for the certificate */
    options.t = 0.3;
    take_place(0);
    ck_ok(kinds[0].make());
    const size_t n = collect(right, ROOM);
    how = UNREADABLE;
    heal();
    ck_ok(psoup_merger_create(context, &options, &merger, &error));
    ck_ok(psoup_merger_add(merger, M11, 0.5, &error));
    ck_ok(psoup_merger_add(merger, directory, 0.5, &error));
    harm_at = reads;
    ck_assert_int_eq(psoup_merger_write(merger, out, &error), PSOUP_ERROR_IO);
    ck_assert_msg(one_line() && strstr(error.message, "tensor ") != NULL, "%s", error.message);
    nothing_is_left();
    harm_at = -1;
    ck_ok(psoup_merger_write(merger, out, &error));
    ck_assert_uint_eq(collect(made, ROOM), n);
    ck_assert_mem_eq(made, right, n);
    psoup_merger_free(merger);
}
END_TEST

/* ---- another process -------------------------------------------------------------------------------------- */

static uint32_t state = 1;
static uint32_t draw(uint32_t below) { /* of the process that it is called in */
    state = state * 1664525u + 1013904223u;
    return (uint32_t)(((uint64_t)state * below) >> 32);
}

/* Truncates and puts back, with no hole on the way: what can be read is right. Now and then it rests, ever longer,
 * so that the slowest merge succeeds at last. */
static void harm_for_ever(void) {
    useconds_t rest = 20000;
    for (int i = 0;; i++) {
        usleep(i % 10 == 9 ? rest : draw(3000));
        if (i % 10 == 9 && rest < 5000000)
            rest *= 2;
        size_t cut = draw((uint32_t)whole_bytes);
        if (truncate(victim, (off_t)cut) != 0)
            _exit(1);
        if (draw(2) == 0)
            usleep(draw(2000));
        FILE *file = fopen(victim, "ab");
        if (file == NULL || fwrite(whole + cut, 1, whole_bytes - cut, file) != whole_bytes - cut ||
            fclose(file) != 0)
            _exit(1);
    }
}

START_TEST(beside_a_process_that_truncates) {
    const int seconds = getenv("PSOUP_LONG") != NULL ? 5 : 0;
    int failures = 0, successes = 0;
    take_place(_i);
    how = HARMS;
    ck_assert_msg(kinds[_i].make() == PSOUP_OK, "%s", error.message);
    const size_t n = collect(right, ROOM);
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (child == 0)
        harm_for_ever();
    const time_t end = time(NULL) + seconds, never = end + 60;
    while (time(NULL) < end || ((failures < 3 || successes < 3) && time(NULL) < never)) {
        psoup_status status = kinds[_i].make();
        if (status == PSOUP_OK) {
            successes++;
            ck_assert_uint_eq(collect(made, ROOM), n);
            ck_assert_mem_eq(made, right, n);
        } else {
            failures++;
            ck_assert_msg(one_line(), "%s: %s", kinds[_i].name, error.message);
            nothing_is_left();
        }
    }
    ck_assert_int_eq(kill(child, SIGKILL), 0);
    ck_assert_int_eq(waitpid(child, NULL, 0), child);
    ck_assert_msg(failures >= 3 && successes >= 3, "%s: %d failed, %d did not", kinds[_i].name, failures, successes);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("merge: torn files");
    TCase *tests = tcase_create("torn");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 300);
    tcase_add_loop_test(tests, harmed_at_each_read, 0, KINDS * HARMS);
    tcase_add_test(tests, a_merger_tries_again);
    tcase_add_loop_test(tests, beside_a_process_that_truncates, 0, KINDS);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
