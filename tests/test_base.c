/* The ground floor: status, options, memory, maps, threads, the context. */
#include <check.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/base.h"
#include "psoup/psoup.h"

static psoup_context *context_with(const char *isa, int32_t threads) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *context;
    psoup_error error;
    options.isa = isa;
    options.threads = threads;
    psoup_status status = psoup_context_create(&options, &context, &error);
    if (status == PSOUP_ERROR_UNSUPPORTED)
        return NULL; /* an instruction set of another machine */
    ck_assert_msg(status == PSOUP_OK, "%s", error.message);
    return context;
}

#define CONTAINS(error, text)                                                                      \
    ck_assert_msg(strstr((error).message, (text)) != NULL, "\"%s\" lacks \"%s\"", (error).message, \
                  (text))

/* ---- status -------------------------------------------------------------------------------- */

START_TEST(messages) {
    psoup_error error = {0};
    ck_assert_int_eq(psoup__fail(NULL, PSOUP_ERROR_IO, "%d", 1), PSOUP_ERROR_IO);
    ck_assert_int_eq(psoup__fail(&error, PSOUP_ERROR_IO, "a\nb\x1b[2J\x7f é \xff%c", 'c'),
                     PSOUP_ERROR_IO);
    ck_assert_int_eq(error.status, PSOUP_ERROR_IO);
    ck_assert_str_eq(error.message, "a?b?[2J? é ?c");
    psoup__fail(&error, PSOUP_ERROR_FORMAT, "outer: %s", error.message);
    ck_assert_str_eq(error.message, "outer: a?b?[2J? é ?c");
    psoup__fail(&error, PSOUP_ERROR_FORMAT, "\xc2\x85 \xed\xa0\x80 \xf0\x9f\x98\x80 \xe2\x82");
    ck_assert_str_eq(error.message, "?? ??? \xf0\x9f\x98\x80 ??");

    /* cut at the edge of a character, wherever the cut falls */
    for (int lead = 1; lead <= 3; lead++) {
        char text[2001] = "xxx";
        for (int i = lead; i + 3 < 2000; i += 3)
            memcpy(text + i, "\xe2\x82\xac", 4);
        psoup__fail(&error, PSOUP_ERROR_IO, "%s", text);
        size_t length = strlen(error.message);
        ck_assert_uint_ge(length, sizeof error.message - 3);
        ck_assert_uint_eq((length - (size_t)lead) % 3, 0);
        ck_assert_ptr_null(strchr(error.message, '?'));
    }
    ck_assert_str_eq(psoup_version(), "0.5.0");
    for (int s = PSOUP_OK; s <= PSOUP_ERROR_CANCELLED; s++)
        for (int t = PSOUP_OK; t < s; t++)
            ck_assert_str_ne(psoup_status_name((psoup_status)s),
                             psoup_status_name((psoup_status)t));
    ck_assert_str_eq(psoup_status_name((psoup_status)99), "unknown status");
}
END_TEST

typedef struct grown {
    size_t size;
    int32_t a, b;
    int64_t later[2];
} grown;

START_TEST(option_structs) {
    psoup_error error;
    grown value = {.size = sizeof value, .a = 1, .b = 2, .later = {3, 4}};
    ck_assert_int_eq(psoup__options(&value, sizeof value, NULL, "grown", &error), PSOUP_OK);
    ck_assert_int_eq(value.a, 1);

    grown old = {.size = offsetof(grown, later), .a = 7, .b = 8, .later = {9, 9}};
    ck_assert_int_eq(psoup__options(&value, sizeof value, &old, "grown", &error), PSOUP_OK);
    ck_assert(value.a == 7 && value.b == 8 && value.later[0] == 3 && value.later[1] == 4);
    ck_assert_uint_eq(value.size, sizeof value);

    struct {
        grown known;
        int64_t unknown;
    } newer = {.known = {.a = 5}};
    newer.known.size = sizeof newer;
    ck_assert_int_eq(psoup__options(&value, sizeof value, &newer, "grown", &error), PSOUP_OK);
    ck_assert(value.a == 5 && value.size == sizeof value);
    newer.unknown = 1;
    ck_assert_int_eq(psoup__options(&value, sizeof value, &newer, "grown", &error),
                     PSOUP_ERROR_UNSUPPORTED);
    CONTAINS(error, "grown: a field at byte 32");

    const size_t bad[] = {0, 4, 70000, SIZE_MAX};
    for (size_t i = 0; i < 4; i++) {
        old.size = bad[i];
        ck_assert_int_eq(psoup__options(&value, sizeof value, &old, "grown", &error),
                         PSOUP_ERROR_ARGUMENT);
        CONTAINS(error, "grown: size is");
    }
}
END_TEST

/* Where a struct that grows by its size ended in padding, the next field could come to lie there, and an
 * older caller's padding would be read as its value. */
START_TEST(option_structs_end_without_padding) {
#define ENDS(type, last) {#type, sizeof(type), offsetof(type, last) + sizeof((type){0}.last)}
    const struct {
        const char *name;
        size_t size, end;
    } structs[] = {
        ENDS(psoup_context_options, stream),     ENDS(psoup_model_config, reserved),
        ENDS(psoup_adapter_options, seed),       ENDS(psoup_sampling, n_stop_tokens),
        ENDS(psoup_session_options, reserved2),  ENDS(psoup_step, times),
        ENDS(psoup_sft_options, reserved),       ENDS(psoup_reward_options, comm),
        ENDS(psoup_dpo_options, length_penalty),
        ENDS(psoup_ppo_options, comm),       ENDS(psoup_ppo_trace, mix),
        ENDS(psoup_memory, device_free),
        ENDS(psoup_best_options, n_sources),
        ENDS(psoup_merger_options, strength),  ENDS(psoup_merge_report, mean_error),
        ENDS(psoup_merge_sink, write),           ENDS(psoup_merge_tensors, user),
        ENDS(psoup_merge_device, copy),      ENDS(psoup_comm, free),
        ENDS(psoup_comm_options, address),
        ENDS(psoup_feedback_options, reserved),  ENDS(psoup_feedback_counts, unparsed),
    };
    for (size_t i = 0; i < sizeof structs / sizeof *structs; i++)
        ck_assert_msg(structs[i].size == structs[i].end, "%s: %zu bytes, fields end at %zu",
                      structs[i].name, structs[i].size, structs[i].end);
}
END_TEST

static void keep_line(void *user, psoup_log_level level, const char *line) {
    snprintf(user, 64, "%d %s", (int)level, line);
}

START_TEST(contexts) {
    psoup_context *context;
    psoup_error error;
    char logged[64] = "";
    ck_assert_int_eq(psoup_context_create(NULL, &context, &error), PSOUP_OK);
    ck_assert_int_ge(psoup_context_threads(context), 1);
    ck_assert_ptr_nonnull(psoup_context_isa(context));
    psoup__log(context, PSOUP_LOG_INFO, "nobody listens");
    psoup_context_free(context);
    psoup_context_free(NULL);

    psoup_context_options good = PSOUP_CONTEXT_OPTIONS_INIT, o;
    good.device = "cpu";
    good.threads = 3;
    good.isa = "generic";
    good.log = keep_line;
    good.log_user = logged;
    ck_assert_int_eq(psoup_context_create(&good, &context, &error), PSOUP_OK);
    ck_assert_int_eq(psoup_context_threads(context), 3);
    psoup__log(context, PSOUP_LOG_WARNING, "a\nb %d", 5);
    ck_assert_str_eq(logged, "1 a?b 5");
    psoup_context_free(context);

#define REFUSED(change, code, text)                                                                \
    o = good;                                                                                      \
    change;                                                                                        \
    ck_assert_int_eq(psoup_context_create(&o, &context, &error), code);                            \
    ck_assert_ptr_null(context);                                                                   \
    CONTAINS(error, text)
    REFUSED(o.device = "gpu", PSOUP_ERROR_ARGUMENT, "device is \"gpu\"; expected \"cpu\", \"cuda\" or \"cuda:N\"");
    REFUSED(o.device = "cuda:x", PSOUP_ERROR_ARGUMENT, "device is \"cuda:x\"");
    REFUSED(o.stream = &context, PSOUP_ERROR_ARGUMENT, "a stream is given, but the device is the CPU");
    REFUSED(o.threads = -1, PSOUP_ERROR_ARGUMENT, "threads is -1");
    REFUSED(o.threads = 1 << 20, PSOUP_ERROR_ARGUMENT, "threads is 1048576");
    REFUSED(o.reserved = 1, PSOUP_ERROR_ARGUMENT, "reserved");
    REFUSED(o.isa = "mmx", PSOUP_ERROR_ARGUMENT, "isa \"mmx\"");
    REFUSED(o.size = 0, PSOUP_ERROR_ARGUMENT, "size is 0");
#ifdef __x86_64__
    REFUSED(o.isa = "neon", PSOUP_ERROR_UNSUPPORTED, "isa \"neon\"");
#else
    REFUSED(o.isa = "avx2", PSOUP_ERROR_UNSUPPORTED, "isa \"avx2\"");
#endif
}
END_TEST

/* ---- memory ---------------------------------------------------------------------------------- */

START_TEST(memory) {
    psoup_context *context = context_with(NULL, 1);
    psoup_error error;
    char *zero[2] = {psoup__alloc(context, 0, 8, &error), psoup__alloc(context, 8, 0, &error)};
    ck_assert(zero[0] != NULL && zero[1] != NULL && zero[0] != zero[1]);
    psoup__free(context, zero[0]);
    psoup__free(context, zero[1]);
    psoup__free(context, NULL);
    unsigned char *bytes = psoup__alloc(context, 1001, 3, &error);
    ck_assert_uint_eq((uintptr_t)bytes % 64, 0);
    for (int i = 0; i < 3003; i++)
        ck_assert_uint_eq(bytes[i], 0);
    psoup__free(context, bytes);
    ck_assert_ptr_null(psoup__alloc(context, SIZE_MAX / 2, 3, &error));
    ck_assert_int_eq(error.status, PSOUP_ERROR_MEMORY);
    ck_assert_ptr_null(psoup__alloc(context, SIZE_MAX - 64, 1, NULL));

    size_t r;
    ck_assert(psoup__multiply(1u << 31, 2, &r) && r == (size_t)1 << 32);
    ck_assert(!psoup__multiply(SIZE_MAX / 2 + 1, 2, &r));
    ck_assert(psoup__add(SIZE_MAX - 1, 1, &r) && !psoup__add(SIZE_MAX, 1, &r));

    char *text = psoup__format(context, &error, "%s-%d", "adapter", 12);
    char *copy = psoup__strdup(context, text, &error);
    ck_assert_str_eq(copy, "adapter-12");
    psoup__free(context, text);
    psoup__free(context, copy);

    int64_t *items = NULL;
    size_t capacity = 0;
    for (size_t i = 0; i < 1000; i++) {
        ck_assert_int_eq(psoup__reserve(context, &items, &capacity, i + 1, sizeof *items, &error),
                         PSOUP_OK);
        items[i] = (int64_t)i;
    }
    for (size_t i = 0; i < 1000; i++)
        ck_assert_int_eq(items[i], i);
    int64_t *before = items;
    ck_assert_int_eq(psoup__reserve(context, &items, &capacity, SIZE_MAX / 4, 8, &error),
                     PSOUP_ERROR_MEMORY);
    ck_assert(items == before && capacity >= 1000);
    psoup__free(context, items);

    psoup__buffer buffer = {.context = context};
    psoup__buffer_append(&buffer, "", 0);
    ck_assert_str_eq(buffer.data, "");
    for (int i = 0; i < 100; i++)
        psoup__buffer_print(&buffer, "%d,", i);
    ck_assert(!buffer.failed && buffer.length == strlen(buffer.data) && buffer.length == 290);
    psoup__buffer_append(&buffer, "x", SIZE_MAX);
    psoup__buffer_append(&buffer, "x", 1);
    ck_assert(buffer.failed && buffer.length == 290);
    psoup__buffer_free(&buffer);
    psoup_context_free(context);
}
END_TEST

static void *dirty_alloc(void *user, size_t bytes, size_t alignment) {
    void *block = aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    (void)user;
    return block ? memset(block, 0xa5, bytes) : NULL;
}

static void dirty_free(void *user, void *block) {
    (void)user;
    free(block);
}

static bool all_zero(const unsigned char *bytes, size_t n) { return bytes[0] == 0 && !memcmp(bytes, bytes + 1, n - 1); }

/* Zero also where it was used before, of the system's and of a caller's allocator. */
START_TEST(large_memory) {
    const size_t n = ((size_t)40 << 20) + 4097;
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    for (int own = 0; own < 2; own++) {
        psoup_context *context;
        if (own)
            options.allocator = (psoup_allocator){NULL, dirty_alloc, dirty_free};
        ck_assert_int_eq(psoup_context_create(&options, &context, NULL), PSOUP_OK);
        for (size_t more = 0; more < 3; more++) {
            unsigned char *bytes = psoup__alloc(context, n + more, 1, NULL);
            ck_assert(all_zero(bytes, n + more));
            memset(bytes, 0xa5, n + more);
            psoup__free(context, bytes);
        }
        psoup_context_free(context);
    }
}
END_TEST

#ifdef __linux__
static long resident(void) {
    long pages[2] = {0};
    FILE *file = fopen("/proc/self/statm", "r");
    ck_assert(file != NULL && fscanf(file, "%ld %ld", &pages[0], &pages[1]) == 2);
    fclose(file);
    return pages[1] * sysconf(_SC_PAGESIZE);
}

/* What nobody has touched takes none. */
START_TEST(large_memory_is_had_when_touched) {
    const size_t n = (size_t)512 << 20;
    const long before = resident();
    char *bytes = psoup__alloc(NULL, n, 1, NULL);
    ck_assert(bytes != NULL);
    ck_assert_int_lt(resident() - before, (long)n / 2);
    psoup__free(NULL, bytes);
}
END_TEST
#endif

START_TEST(maps) {
    psoup_context *context = context_with(NULL, 1);
    psoup__map *map;
    int64_t value = -1;
    bool fresh;
    char key[32];
    ck_assert_int_eq(psoup__map_create(context, 0, &map, NULL), PSOUP_OK);
    ck_assert(!psoup__map_get(map, "", 0, &value));
    for (int round = 0; round < 2; round++)
        for (int i = 0; i < 20000; i++) {
            int n = snprintf(key, sizeof key, "key%d", i);
            ck_assert_int_eq(psoup__map_set(map, key, (size_t)n, i * 3 + round, &fresh, NULL), 0);
            ck_assert_int_eq(fresh, round == 0);
        }
    for (int i = 0; i < 20000; i++) {
        int n = snprintf(key, sizeof key, "key%d", i);
        ck_assert(psoup__map_get(map, key, (size_t)n, &value) && value == i * 3 + 1);
        ck_assert(!psoup__map_get(map, key, (size_t)n - 1, NULL) || i >= 10);
    }
    /* bytes, not texts: keys that differ in zeros alone are different */
    for (size_t n = 0; n < 24; n++) {
        ck_assert_int_eq(psoup__map_set(map, "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", n,
                                        (int64_t)n, &fresh, NULL),
                         PSOUP_OK);
        ck_assert(fresh);
    }
    ck_assert(psoup__map_get(map, "\0\0\0\0\0\0\0\0\0", 9, &value) && value == 9);
    psoup__map_free(map);
    psoup__map_free(NULL);
    psoup_context_free(context);
}
END_TEST

/* ---- threads --------------------------------------------------------------------------------- */

typedef struct tally {
    psoup_context *context;
    atomic_int count[5000];
    atomic_int workers[8];
    atomic_int inner;
} tally;

static void count_inner(void *arg, size_t task, int worker) {
    tally *t = arg;
    (void)task, (void)worker;
    atomic_fetch_add(&t->inner, 1);
}

static void count_task(void *arg, size_t task, int worker) {
    tally *t = arg;
    atomic_fetch_add(&t->count[task], 1);
    atomic_fetch_add(&t->workers[worker], 1);
    if (task % 100 == 0)
        psoup__parallel(t->context, 10, count_inner, t);
}

static void *count_many(void *arg) {
    tally *t = arg;
    for (int i = 0; i < 200; i++)
        psoup__parallel(t->context, 1 + (size_t)i * 25, count_task, t);
    return NULL;
}

START_TEST(threads) {
    for (int n = 1; n <= 5; n++) {
        static tally tallies[3];
        memset(tallies, 0, sizeof tallies);
        psoup_context *context = context_with(NULL, n);
        pthread_t others[2]; /* three callers of one pool at once */
        for (int i = 0; i < 3; i++)
            tallies[i].context = context;
        for (int i = 0; i < 2; i++)
            ck_assert_int_eq(pthread_create(&others[i], NULL, count_many, &tallies[i]), 0);
        count_many(&tallies[2]);
        for (int i = 0; i < 2; i++)
            pthread_join(others[i], NULL);
        for (int i = 0; i < 3; i++) {
            int inner = 0, total = 0, all = 0;
            for (int task = 0; task < 5000; task++) {
                int jobs = 200 - (task + 24) / 25; /* job j has tasks 0 … 25 j */
                ck_assert_int_eq(tallies[i].count[task], jobs < 0 ? 0 : jobs);
                inner += task % 100 == 0 ? jobs * 10 : 0;
                total += jobs;
            }
            for (int w = 0; w < 8; w++) {
                all += tallies[i].workers[w];
                ck_assert(w < n || tallies[i].workers[w] == 0);
            }
            ck_assert_int_eq(all, total);
            ck_assert_int_eq(tallies[i].inner, inner);
        }
        psoup__parallel(context, 0, count_task, &tallies[0]);
        psoup_context_free(context);
    }
}
END_TEST

static void expect_inline(void *arg, size_t task, int worker) {
    (void)task;
    ck_assert_int_eq(worker, 0);
    ck_assert(pthread_equal(*(pthread_t *)arg, pthread_self()));
}

static void nest(void *arg, size_t task, int worker) {
    pthread_t self = pthread_self();
    (void)task, (void)worker;
    psoup__parallel(arg, 5, expect_inline, &self);
}

static void wait_for_all(void *arg, size_t task, int worker) {
    atomic_int *arrived = arg;
    (void)task, (void)worker;
    atomic_fetch_add(arrived, 1);
    while (atomic_load(arrived) < 4) /* ends only when four workers are in at once */
        sched_yield();
}

START_TEST(threads_really_work) {
    psoup_context *context = context_with(NULL, 4);
    for (int i = 0; i < 100; i++) {
        atomic_int arrived = 0;
        psoup__parallel(context, 4, wait_for_all, &arrived);
        ck_assert_int_eq(arrived, 4);
        psoup__parallel(context, 8, nest, context);
    }
    psoup_context_free(context);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("base");
    TCase *c = tcase_create("base");
    tcase_set_timeout(c, 120);
    tcase_add_test(c, messages);
    tcase_add_test(c, option_structs);
    tcase_add_test(c, option_structs_end_without_padding);
    tcase_add_test(c, contexts);
    tcase_add_test(c, memory);
    tcase_add_test(c, large_memory);
#ifdef __linux__
    tcase_add_test(c, large_memory_is_had_when_touched);
#endif
    tcase_add_test(c, maps);
    tcase_add_test(c, threads);
    tcase_add_test(c, threads_really_work);
    suite_add_tcase(suite, c);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
