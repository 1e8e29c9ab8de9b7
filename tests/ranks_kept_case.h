/* What the tests of runs that outlive a rank share: rank 1 dies at one call of psoup_comm after the other, and the run
 * goes on from what rank 0 keeps. */
#ifndef RANKS_KEPT_CASE_H
#define RANKS_KEPT_CASE_H

#include "ranks_case.h"
#include "resume_case.h"

/* How the ranks run; a trainer's options are made of it. */
static struct keeping {
    const char *directory; /* of checkpoints; NULL: none */
    const char *metrics, *samples; /* rank 0's files; NULL: none */
    int every, resume;
} keeping;

/* A rank that is killed in its call number `left`, before others hear of it. */
typedef struct mortal {
    const psoup_comm *comm;
    int left;
} mortal;

static inline const psoup_comm *live(mortal *m) {
    if (m->left > 0 && --m->left == 0)
        kill(getpid(), SIGKILL);
    return m->comm;
}

static inline psoup_status mortal_sum(void *user, void *x, size_t n, psoup_dtype dtype, psoup_error *e) {
    const psoup_comm *c = live(user);
    return c->sum(c->user, x, n, dtype, e);
}

static inline psoup_status mortal_broadcast(void *user, void *data, size_t bytes, psoup_error *e) {
    const psoup_comm *c = live(user);
    return c->broadcast(c->user, data, bytes, e);
}

static inline psoup_status mortal_failed(void *user, psoup_error *e) {
    const mortal *m = user;
    return m->comm->failed(m->comm->user, e);
}

static inline void mortal_abort(void *user, const char *reason) {
    const mortal *m = user;
    m->comm->abort(m->comm->user, reason);
}

typedef struct life {
    rank_fn train;
    void *arg;
    int calls; /* of rank 1 */
} life;

static inline void lead(const psoup_comm *comm, void *arg) {
    const life *l = arg;
    mortal m = {.comm = comm, .left = comm->rank == 1 ? l->calls : 0};
    psoup_comm c = *comm;
    c.user = &m;
    c.sum = mortal_sum;
    c.broadcast = mortal_broadcast;
    c.failed = mortal_failed;
    c.abort = mortal_abort;
    l->train(&c, l->arg);
}

/* A run of two ranks with its files in r. */
static inline void run_two(const run *r, rank_fn train, void *arg, int *ended) {
    static char samples[sizeof(r->directory) + 16];
    snprintf(samples, sizeof(samples), "%s/samples.jsonl", r->directory);
    keeping.directory = r->checkpoints;
    keeping.metrics = r->metrics;
    keeping.samples = samples;
    in_ranks(2, train, arg, ended);
}

static inline void same_file_of(const run *a, const run *b, const char *name) {
    char one[300], other[300];
    snprintf(one, sizeof(one), "%s/%s", a->directory, name);
    snprintf(other, sizeof(other), "%s/%s", b->directory, name);
    if (access(one, F_OK) == 0)
        same_files(one, other);
}

/* Whenever rank 1 dies, the run goes on from what rank 0 kept to the bits and the files of one that nobody
 * disturbed. `first` and `stride`: which calls it dies at. */
static inline void survives(rank_fn train, void *arg, int first, int stride) {
    left *whole = malloc(sizeof(*whole));
    run undisturbed;
    int died = 0;
    run_begin(&undisturbed);
    share_results();
    run_two(&undisturbed, train, arg, NULL);
    *whole = results[0];
    ck_assert_msg(whole->status == PSOUP_OK, "%s", whole->message);
    for (int at = first;; at += stride) {
        run r;
        int ended[2];
        life given = {.train = train, .arg = arg, .calls = at};
        run_begin(&r);
        keeping.every = at % 2;
        run_two(&r, lead, &given, ended);
        ck_assert_int_eq(ended[0], 0);
        if (ended[1]) {
            ck_assert(WIFSIGNALED(ended[1]) && WTERMSIG(ended[1]) == SIGKILL);
            ck_assert_msg(results[0].status == PSOUP_ERROR_IO && strstr(results[0].message, "rank 1 ("), "call %d: %s",
                          at, results[0].message);
            died++;
            keeping.resume = 1;
            run_two(&r, train, arg, NULL);
            keeping.resume = 0;
        }
        for (int rank = 0; rank < 2; rank++) {
            const left *l = &results[rank];
            ck_assert_msg(l->status == PSOUP_OK, "call %d, rank %d: %s", at, rank, l->message);
            ck_assert_msg(l->n == whole->n && memcmp(l->weights, whole->weights, l->n * sizeof(float)) == 0,
                          "call %d: rank %d has other weights", at, rank);
        }
        same_file_of(&undisturbed, &r, "metrics.jsonl");
        same_file_of(&undisturbed, &r, "samples.jsonl");
        run_end(&r);
        if (!ended[1])
            break;
    }
    ck_assert_int_gt(died, 4);
    keeping = (struct keeping){.every = 0};
    run_end(&undisturbed);
    free(whole);
}

#endif
