/* src/base/thread.c: a pool of threads that take numbered tasks from a counter.
 *
 * A job is open while its caller works on it. A thread joins an open job, takes tasks until none is
 * left, and leaves. The caller closes the job when the counter has run out and waits for those who
 * joined; a thread that wakes too late finds it closed. So nobody waits for a sleeper. */
#include "base/internal.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

typedef struct member {
    struct psoup__pool *pool;
    pthread_t thread;
    int worker; /* from 1; the caller is 0 */
} member;

struct psoup__pool {
    member *members; /* [started] */
    int started;
    int spins; /* looks at the counters before sleeping: a wake-up costs more than a short wait */
    atomic_bool busy;

    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    int sleeping; /* under lock, as are: */
    bool open, stop;
    psoup__task_fn fn;
    void *arg;
    size_t tasks;
    atomic_uint job;    /* counts jobs; written under lock */
    atomic_int joined;  /* written under lock */
    atomic_size_t next; /* the next task */
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

static void *work(void *user) {
    member *self = user;
    struct psoup__pool *pool = self->pool;
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < pool->spins && atomic_load(&pool->job) == seen; i++)
            relax();
        pthread_mutex_lock(&pool->lock);
        while (!pool->stop && atomic_load(&pool->job) == seen) {
            pool->sleeping++;
            pthread_cond_wait(&pool->wake, &pool->lock);
            pool->sleeping--;
        }
        if (pool->stop) {
            pthread_mutex_unlock(&pool->lock);
            return NULL;
        }
        seen = atomic_load(&pool->job);
        bool open = pool->open;
        psoup__task_fn fn = pool->fn;
        void *arg = pool->arg;
        size_t tasks = pool->tasks;
        if (open)
            atomic_fetch_add(&pool->joined, 1);
        pthread_mutex_unlock(&pool->lock);
        if (!open)
            continue;
        take_tasks(pool, fn, arg, tasks, self->worker);
        pthread_mutex_lock(&pool->lock);
        if (atomic_fetch_sub(&pool->joined, 1) == 1 && !pool->open)
            pthread_cond_signal(&pool->done);
        pthread_mutex_unlock(&pool->lock);
    }
}

void psoup__parallel(psoup_context *context, size_t tasks, psoup__task_fn fn, void *arg) {
    struct psoup__pool *pool = context->pool;
    if (tasks <= 1 || pool == NULL || atomic_exchange(&pool->busy, true)) {
        for (size_t task = 0; task < tasks; task++)
            fn(arg, task, 0);
        return;
    }
    pthread_mutex_lock(&pool->lock);
    pool->fn = fn;
    pool->arg = arg;
    pool->tasks = tasks;
    pool->open = true;
    atomic_store(&pool->next, 0);
    atomic_fetch_add(&pool->job, 1);
    if (pool->sleeping > 0)
        pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);

    take_tasks(pool, fn, arg, tasks, 0);
    for (int i = 0; i < pool->spins && atomic_load(&pool->joined) > 0; i++)
        relax();
    pthread_mutex_lock(&pool->lock);
    pool->open = false;
    while (atomic_load(&pool->joined) > 0)
        pthread_cond_wait(&pool->done, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
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
    pool->stop = true;
    atomic_fetch_add(&pool->job, 1);
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
