/* src/base/thread.c: a pool of threads that take numbered tasks from a counter.
 *
 * A job is open while its caller works on it. A thread joins an open job, takes tasks until none is
 * left, and leaves. The caller closes the job when the counter has run out and waits for those who
 * joined; a thread that comes too late finds it closed. So nobody waits for a sleeper.
 *
 * Number, openness and membership are one word, so that joining and closing cannot cross. The lock is for
 * those who sleep; while everybody is awake nobody takes it (two empty tasks: 0.3 µs for 0.9 µs with a
 * lock at every step, which a decoding step pays some fifty times). */
#include "base/internal.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#define OPEN ((uint64_t)1 << 31)
#define JOINED (OPEN - 1)    /* how many threads are in the job */
#define JOB ((uint64_t)1 << 32) /* the number of the job, above */

typedef struct member {
    struct psoup__pool *pool;
    pthread_t thread;
    int worker; /* from 1; the caller is 0 */
} member;

struct psoup__pool {
    member *members; /* [started] */
    int started;
    int spins; /* looks at the state before sleeping: a wake-up costs more than a short wait */
    atomic_bool busy;

    _Alignas(64) _Atomic uint64_t state; /* JOB · number + OPEN + joined */
    psoup__task_fn fn;                   /* of the job: written before it opens, read by who joined */
    void *arg;
    size_t tasks;
    _Alignas(64) atomic_size_t next; /* the next task */

    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    atomic_int sleeping;   /* threads; changed under lock */
    atomic_bool awaited;   /* the caller sleeps until nobody is in the job; changed under lock */
    atomic_bool stop;      /* set under lock */
};

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_tasks(struct psoup__pool *pool, psoup__task_fn fn, void *arg, size_t tasks,
                       int worker) {
    for (;;) {
        size_t task = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
        if (task >= tasks)
            return;
        fn(arg, task, worker);
    }
}

/* Waits for another state than `seen` of a job that is over or that this thread has left. The state is
 * looked at again after `sleeping` is raised, and the caller looks at `sleeping` after it changed the
 * state: one of the two sees the other. */
static uint64_t next_state(struct psoup__pool *pool, uint64_t job) {
    uint64_t state = atomic_load(&pool->state);
    for (int i = 0; i < pool->spins && state / JOB == job; i++) {
        relax();
        state = atomic_load_explicit(&pool->state, memory_order_acquire);
    }
    if (state / JOB != job)
        return state;
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->sleeping, 1);
    while ((state = atomic_load(&pool->state)) / JOB == job && !atomic_load(&pool->stop))
        pthread_cond_wait(&pool->wake, &pool->lock);
    atomic_fetch_sub(&pool->sleeping, 1);
    pthread_mutex_unlock(&pool->lock);
    return state;
}

static void *work(void *user) {
    member *self = user;
    struct psoup__pool *pool = self->pool;
    uint64_t job = 0;
    for (;;) {
        uint64_t state = next_state(pool, job);
        if (atomic_load(&pool->stop))
            return NULL;
        job = state / JOB;
        while ((state & OPEN) && state / JOB == job &&
               !atomic_compare_exchange_weak(&pool->state, &state, state + 1))
            ;
        if (!(state & OPEN) || state / JOB != job)
            continue;
        take_tasks(pool, pool->fn, pool->arg, pool->tasks, self->worker);
        state = atomic_fetch_sub(&pool->state, 1);
        if ((state & (OPEN | JOINED)) == 1 && atomic_load(&pool->awaited)) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->lock);
        }
    }
}

void psoup__parallel(psoup_context *context, size_t tasks, psoup__task_fn fn, void *arg) {
    struct psoup__pool *pool = context->pool;
    if (tasks <= 1 || pool == NULL || atomic_load_explicit(&pool->busy, memory_order_relaxed) ||
        atomic_exchange(&pool->busy, true)) {
        for (size_t task = 0; task < tasks; task++)
            fn(arg, task, 0);
        return;
    }
    pool->fn = fn;
    pool->arg = arg;
    pool->tasks = tasks;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    const uint64_t job = atomic_load(&pool->state) / JOB + 1; /* the old one is closed and empty */
    atomic_store(&pool->state, job * JOB + OPEN);
    if (atomic_load(&pool->sleeping) > 0) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }

    take_tasks(pool, fn, arg, tasks, 0);
    uint64_t state = atomic_fetch_and(&pool->state, ~OPEN);
    for (int i = 0; i < pool->spins && (state & JOINED); i++) {
        relax();
        state = atomic_load_explicit(&pool->state, memory_order_acquire);
    }
    if (state & JOINED) {
        pthread_mutex_lock(&pool->lock);
        atomic_store(&pool->awaited, true);
        while (atomic_load(&pool->state) & JOINED)
            pthread_cond_wait(&pool->done, &pool->lock);
        atomic_store(&pool->awaited, false);
        pthread_mutex_unlock(&pool->lock);
    }
    atomic_store(&pool->busy, false);
}

psoup_status psoup__pool_create(psoup_context *context, bool spin, psoup_error *error) {
    if (context->threads <= 1)
        return PSOUP_OK;
    struct psoup__pool *pool = psoup__alloc(context, 1, sizeof *pool, error);
    if (pool == NULL)
        return PSOUP_ERROR_MEMORY;
    pool->members = psoup__alloc(context, (size_t)context->threads - 1, sizeof(member), error);
    if (pool->members == NULL) {
        psoup__free(context, pool);
        return PSOUP_ERROR_MEMORY;
    }
    pool->spins = spin ? 2000 : 0;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    context->pool = pool;

    sigset_t all, before; /* signals are the program's own threads' business */
    sigfillset(&all);
    bool masked = pthread_sigmask(SIG_SETMASK, &all, &before) == 0;
    while (pool->started < context->threads - 1) {
        member *m = &pool->members[pool->started];
        m->pool = pool;
        m->worker = pool->started + 1;
        if (pthread_create(&m->thread, NULL, work, m) != 0)
            break;
        pool->started++;
    }
    if (masked)
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (pool->started < context->threads - 1) {
        psoup__log(context, PSOUP_LOG_WARNING, "the system started %d of %d threads",
                   pool->started + 1, context->threads);
        context->threads = pool->started + 1;
    }
    return PSOUP_OK;
}

void psoup__pool_free(psoup_context *context) {
    struct psoup__pool *pool = context->pool;
    if (pool == NULL)
        return;
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->stop, true);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->started; i++)
        pthread_join(pool->members[i].thread, NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    psoup__free(context, pool->members);
    psoup__free(context, pool);
    context->pool = NULL;
}
