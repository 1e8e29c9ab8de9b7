/* New weights on an open merger: adapters' factors that were read once stay in memory, up to a bound, and the files
 * they came from are not read again. The reads are this program's own, to be counted. */
#include "merge_case.h"

#include <sys/stat.h>
#include <sys/syscall.h>

#define FAN "tests/golden/fan/"
#define GGUF "tests/golden/gguf/"

static char one[600], two[600], files[2][700]; /* the adapters, and the files their factors are in */
static long reads[2], harm_at = -1;            /* of those files; the one before which they are harmed */

static bool is_file(int fd, const char *path) {
    struct stat a, b;
    return fstat(fd, &a) == 0 && stat(path, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

typedef enum harm { REMOVED, CUT, OVERWRITTEN, HARMS } harm;

static void do_harm(harm how) {
    for (int i = 0; i < 2; i++) {
        FILE *file = how == OVERWRITTEN ? fopen(files[i], "r+b") : NULL;
        if (how == REMOVED)
            ck_assert_int_eq(unlink(files[i]), 0);
        else if (how == CUT)
            ck_assert_int_eq(truncate(files[i], 100), 0);
        else
            ck_assert(file != NULL && fseek(file, -64, SEEK_END) == 0 && fwrite("another program's", 1, 17, file) == 17 &&
                      fclose(file) == 0);
    }
}

/* In place of the C library's. */
ssize_t pread(int fd, void *out, size_t bytes, off_t offset) {
    for (int i = 0; i < 2; i++)
        if (files[i][0] != '\0' && is_file(fd, files[i]))
            if (__atomic_add_fetch(&reads[i], 1, __ATOMIC_SEQ_CST) == harm_at)
                do_harm(OVERWRITTEN);
    return (ssize_t)syscall(SYS_pread64, fd, out, bytes, offset);
}

static const struct kind {
    const char *name, *base, *one, *two;
    int32_t method, svd_rank;
    size_t factors; /* bytes of both adapters' as f32 */
} kinds[] = {
    {"delta", NULL, GOLDEN "a", GOLDEN "b", PSOUP_MERGE_DELTA, 0, 4 * 2 * 2 * 4 * (16 + 16 + 16 + 8)},
    {"factors", NULL, GOLDEN "a", GOLDEN "b", PSOUP_MERGE_FACTORS, 0, 0},
    {"svd", NULL, GOLDEN "a", GOLDEN "c", PSOUP_MERGE_SVD, 3, 0},
    {"ties of changes", NULL, GOLDEN "a", GOLDEN "b", PSOUP_MERGE_TIES, 3, 0},
    {"folded", GOLDEN "base", GOLDEN "a", GOLDEN "c", PSOUP_MERGE_DELTA, 0, 0},
    {"factors folded", GOLDEN "base", GOLDEN "a", GOLDEN "b", PSOUP_MERGE_FACTORS, 0, 0},
    {"ties folded", GOLDEN "base", GOLDEN "a", GOLDEN "b", PSOUP_MERGE_TIES, 0, 0},
    {"dare folded", GOLDEN "base", GOLDEN "a", GOLDEN "c", PSOUP_MERGE_DARE_TIES, 0, 0},
    {"fan_in_fan_out, folded across", FAN "base", FAN "a", FAN "b", PSOUP_MERGE_DELTA, 0, 0},
    {"fan_in_fan_out", NULL, FAN "a", FAN "b", PSOUP_MERGE_DELTA, 0, 0},
    {"GGUF adapters", GGUF "llama", GGUF "adapter_llama.gguf", GGUF "adapter_llama.gguf", PSOUP_MERGE_DELTA, 0, 0},
};
enum { KINDS = sizeof kinds / sizeof *kinds };

/* Copies of the kind's adapters, which may be harmed. */
static void take(const struct kind *k) {
    char command[3000];
    const bool gguf = psoup__is_gguf(k->one);
    snprintf(one, sizeof one, "%s/one%s", scratch, gguf ? ".gguf" : "");
    snprintf(two, sizeof two, "%s/two%s", scratch, gguf ? ".gguf" : "");
    snprintf(command, sizeof command, "rm -rf '%s' '%s' && cp -r '%s' '%s' && cp -r '%s' '%s'", one, two, k->one, one,
             k->two, two);
    ck_assert_int_eq(system(command), 0);
    for (int i = 0; i < 2; i++)
        snprintf(files[i], sizeof *files, "%s%s", i == 0 ? one : two, gguf ? "" : "/adapter_model.safetensors");
}

static psoup_status open_merger(psoup_context *in, const struct kind *k, int64_t keep_bytes, const double weights[2],
                                psoup_merger **out) {
    psoup_status status;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    options.method = k->method;
    options.svd_rank = k->svd_rank;
    options.density = 0.6;
    options.keep_bytes = keep_bytes;
    PSOUP__TRY(psoup_merger_create(in, &options, out, &error));
    if (k->base != NULL)
        PSOUP__TRY(psoup_merger_set_base(*out, k->base, &error));
    PSOUP__TRY(psoup_merger_add(*out, one, weights[0], &error));
    PSOUP__TRY(psoup_merger_add(*out, two, weights[1], &error));
fail:
    return status;
}

static const double early[2] = {0.3, 0.7}, late[2] = {0.8, 0.2}, first_alone[2] = {1, 0};

/* What a merger makes that never had other weights: its files, and its certificate, of the sources as they are. */
static void make_right(const struct kind *k) {
    psoup_merger *merger = NULL;
    ck_ok(open_merger(context, k, 0, late, &merger));
    ck_ok(psoup_merger_write(merger, in_scratch("right"), &error));
    psoup_merger_free(merger);
}

static void expect_same(const char *right, const char *made) {
    char *x, *y;
    size_t n, m;
    ck_ok(psoup__file_read(context, in_scratch(right), 1 << 24, &x, &n, &error));
    ck_ok(psoup__file_read(context, in_scratch(made), 1 << 24, &y, &m, &error));
    ck_assert_msg(n == m && memcmp(x, y, n) == 0, "%s is not %s", made, right);
    psoup__free(context, x);
    psoup__free(context, y);
}

static void expect_right(const char *made) {
    const char *name = psoup__file_exists(in_scratch("right/model.safetensors")) ? "model.safetensors"
                                                                                 : "adapter_model.safetensors";
    char weights[2][100], certificate[100];
    snprintf(weights[0], sizeof *weights, "right/%s", name);
    snprintf(weights[1], sizeof *weights, "%s/%s", made, name);
    snprintf(certificate, sizeof certificate, "%s/psoup-merge.json", made);
    expect_same(weights[0], weights[1]);
    expect_same("right/psoup-merge.json", certificate);
}

/* Whatever becomes of the files between two runs, and by every way that factors take. */
START_TEST(the_second_run_reads_no_adapter) {
    const struct kind *k = &kinds[_i / HARMS];
    psoup_merger *merger = NULL;
    take(k);
    make_right(k);
    ck_ok(open_merger(context, k, -1, early, &merger));
    reads[0] = reads[1] = 0;
    ck_ok(psoup_merger_write(merger, in_scratch("first"), &error));
    ck_assert_msg(reads[0] > 0 && reads[1] > 0, "%s: %ld and %ld reads", k->name, reads[0], reads[1]);
    do_harm((harm)(_i % HARMS));
    ck_ok(psoup_merger_set_weights(merger, late, 2, &error));
    reads[0] = reads[1] = 0;
    for (int turn = 0; turn < 2; turn++) {
        ck_assert_msg(psoup_merger_write(merger, in_scratch("second"), &error) == PSOUP_OK, "%s: %s", k->name,
                      error.message);
        expect_right("second");
    }
    ck_assert_int_eq(reads[0] + reads[1], 0);
    psoup_merger_free(merger);
}
END_TEST

/* A source whose weight was 0 is read by the run that first needs it, and refused where its file is another by then;
 * one whose weight becomes 0 is not looked at. */
START_TEST(what_was_not_needed_is_read_when_it_is) {
    const struct kind *k = &kinds[4];
    psoup_merger *merger = NULL;
    take(k);
    make_right(k);
    ck_ok(open_merger(context, k, -1, first_alone, &merger));
    reads[0] = reads[1] = 0;
    ck_ok(psoup_merger_write(merger, in_scratch("first"), &error));
    ck_assert(reads[0] > 0 && reads[1] == 0);
    ck_ok(psoup_merger_set_weights(merger, late, 2, &error));
    reads[0] = 0;
    ck_ok(psoup_merger_write(merger, in_scratch("second"), &error));
    ck_assert(reads[0] == 0 && reads[1] > 0);
    expect_right("second");
    psoup_merger_free(merger);

    ck_ok(open_merger(context, k, -1, first_alone, &merger));
    ck_ok(psoup_merger_write(merger, in_scratch("first"), &error));
    do_harm(CUT);
    ck_ok(psoup_merger_write(merger, in_scratch("again"), &error));
    ck_ok(psoup_merger_set_weights(merger, late, 2, &error));
    ck_assert_int_eq(psoup_merger_write(merger, in_scratch("second"), &error), PSOUP_ERROR_IO);
    ck_assert_msg(strstr(error.message, files[1]) != NULL, "%s", error.message);
    /* and a run that failed keeps nothing */
    ck_ok(psoup_merger_set_weights(merger, first_alone, 2, &error));
    ck_assert_int_eq(psoup_merger_write(merger, in_scratch("second"), &error), PSOUP_ERROR_IO);
    ck_assert_msg(strstr(error.message, files[0]) != NULL, "%s", error.message);
    psoup_merger_free(merger);
}
END_TEST

/* With no bound every run reads, with a small one a part; and the result is the same. */
START_TEST(the_bound_is_kept) {
    const struct kind *k = &kinds[0];
    long of_bound[4] = {0};
    const int64_t bounds[4] = {0, (int64_t)k->factors / 2, (int64_t)k->factors - 1, (int64_t)k->factors};
    psoup_merger *merger = NULL;
    take(k);
    make_right(k);
    for (int i = 0; i < 4; i++) {
        ck_ok(open_merger(context, k, bounds[i], early, &merger));
        ck_ok(psoup_merger_write(merger, in_scratch("first"), &error));
        ck_ok(psoup_merger_set_weights(merger, late, 2, &error));
        reads[0] = reads[1] = 0;
        ck_ok(psoup_merger_write(merger, in_scratch("second"), &error));
        expect_right("second");
        of_bound[i] = reads[0] + reads[1];
        psoup_merger_free(merger);
    }
    ck_assert_msg(of_bound[0] > of_bound[1] && of_bound[1] > of_bound[2] && of_bound[2] == 1 && of_bound[3] == 0,
                  "%ld, %ld, %ld, %ld reads", of_bound[0], of_bound[1], of_bound[2], of_bound[3]);
    ck_assert_int_eq(open_merger(context, k, -2, early, &merger), PSOUP_ERROR_ARGUMENT);
    ck_assert_msg(strstr(error.message, "keep_bytes -2") != NULL, "%s", error.message);
}
END_TEST

/* A file that changes while the first run reads it: nothing of it stays. */
START_TEST(what_changes_while_it_is_read_is_refused) {
    psoup_merger *merger = NULL;
    take(&kinds[0]);
    ck_ok(open_merger(context, &kinds[0], -1, early, &merger));
    reads[0] = reads[1] = 0;
    harm_at = 5;
    for (int turn = 0; turn < 3; turn++) {
        ck_assert_int_eq(psoup_merger_write(merger, in_scratch("first"), &error), PSOUP_ERROR_IO);
        ck_assert_msg(strstr(error.message, "was changed") != NULL, "%s", error.message);
    }
    harm_at = -1;
    psoup_merger_free(merger);
}
END_TEST

/* ---- no memory for it ------------------------------------------------------------------------------------- */

static int asked, refused = -1;

static void *once_refused(void *user, size_t bytes, size_t alignment) {
    return __atomic_fetch_add(&asked, 1, __ATOMIC_SEQ_CST) == refused ? NULL : counted_alloc(user, bytes, alignment);
}

static int add_bytes(void *user, uint64_t offset, const void *data, size_t bytes) {
    uint64_t *sum = user;
    (void)offset;
    for (size_t i = 0; i < bytes; i++)
        *sum = (*sum ^ ((const unsigned char *)data)[i]) * 0x100000001b3u;
    return 0;
}

/* Two runs; *sum of the bytes of the second. */
static psoup_status run_twice(psoup_context *in, uint64_t *sum) {
    psoup_status status;
    psoup_merger *merger = NULL;
    uint64_t ignored = 0;
    psoup_merge_sink sink = PSOUP_MERGE_SINK_INIT;
    sink.write = add_bytes;
    sink.user = &ignored;
    *sum = 0xcbf29ce484222325u;
    PSOUP__TRY(open_merger(in, &kinds[0], -1, early, &merger));
    PSOUP__TRY(psoup_merger_run(merger, &sink, &error));
    PSOUP__TRY(psoup_merger_set_weights(merger, late, 2, &error));
    sink.user = sum;
    PSOUP__TRY(psoup_merger_run(merger, &sink, &error));
fail:
    psoup_merger_free(merger);
    return status;
}

/* Each allocation of two runs fails in turn, it alone. Those that would have kept factors are of no consequence: they
 * are read again. */
START_TEST(without_memory_it_is_read_again) {
    const int before = live;
    int tolerated = 0, failed = 0, all = 0;
    uint64_t right = 0, made;
    psoup_context *other;
    psoup_context_options settings = PSOUP_CONTEXT_OPTIONS_INIT;
    settings.threads = 2;
    settings.allocator = (psoup_allocator){NULL, once_refused, counted_free};
    take(&kinds[0]);
    ck_ok(psoup_context_create(&settings, &other, &error));
    const int with_context = live;
    for (int n = -1; n < all; n++) {
        asked = 0;
        refused = n;
        psoup_status status = run_twice(other, &made);
        refused = -1;
        ck_assert_msg(status == PSOUP_OK || (n >= 0 && status == PSOUP_ERROR_MEMORY), "%d: %s", n, error.message);
        if (n < 0) {
            all = asked;
            right = made;
        }
        ck_assert(status != PSOUP_OK || made == right);
        tolerated += n >= 0 && status == PSOUP_OK;
        failed += status != PSOUP_OK;
        ck_assert_int_eq(live, with_context);
    }
    ck_assert_msg(failed > 100 && tolerated >= 16, "%d failed, %d did not matter", failed, tolerated);
    psoup_context_free(other);
    ck_assert_int_eq(live, before);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("merge: what is kept");
    TCase *tests = tcase_create("keep");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, the_second_run_reads_no_adapter, 0, KINDS * HARMS);
    tcase_add_test(tests, what_was_not_needed_is_read_when_it_is);
    tcase_add_test(tests, the_bound_is_kept);
    tcase_add_test(tests, what_changes_while_it_is_read_is_refused);
    tcase_add_test(tests, without_memory_it_is_read_again);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
