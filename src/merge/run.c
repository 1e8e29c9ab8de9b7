/* The executor. A window of blocks, of one tensor or of several, is made and hashed in parallel while the window
 * before it is written; so no tensor is ever whole in memory, and results come in order. */
#include "merge/engine.h"

#include <pthread.h>
#include <string.h>

enum {
    WINDOW_BLOCKS = 64,
    WINDOW_BYTES = 8 << 20 /* of results; they are then still in the last cache when they are written */
};

typedef struct block {
    psoup__work *work;
    size_t at, n;
    size_t place, bytes; /* in the window's memory */
} block;

typedef struct window {
    block blocks[WINDOW_BLOCKS];
    size_t n, bytes;
    unsigned char *memory; /* [capacity] */
    size_t capacity;
} window;

typedef struct run {
    const psoup__plan *plan;
    psoup__certificate *certificate;
    psoup__output *output;
    window windows[2];
    window *next, *last; /* being made; made, being written */
    psoup__work *current; /* the result that the next window begins with, or NULL */
    psoup__work *pair_a;  /* whose b is to come */
    psoup__work *open;    /* list of works */
    size_t opened;        /* results */
    float *scratch; /* [workers, scratch_size] */
    size_t scratch_size;
    pthread_mutex_t lock; /* of all streams' `at` */
    pthread_cond_t moved; /* one of them */
    psoup_status written; /* what writing the last window came to */
    psoup_error write_error;
} run;

/* ---- a window: what is made next ---------------------------------------------------------------------- */

static psoup_status open_next(run *r, psoup_error *error) {
    psoup_status status;
    psoup__work *work = NULL;
    while (r->opened < r->plan->n && r->output->there != NULL && r->output->there[r->opened])
        r->opened++;
    if (r->opened == r->plan->n)
        return PSOUP_OK;
    bool b = r->plan->results[r->opened].kind == PSOUP__PAIR_B;
    PSOUP__TRY(psoup__work_open(r->plan, r->opened, r->certificate, b ? r->pair_a : NULL, &work, error));
    r->opened++;
    r->current = work;
    work->next = r->open;
    r->open = work;
    if (work->result->kind == PSOUP__PAIR_A)
        r->pair_a = work;
    size_t need = psoup__work_scratch(work);
    if (need > r->scratch_size) {
        size_t floats;
        psoup_context *context = r->plan->merger->context;
        if (!psoup__multiply(need, (size_t)psoup_context_threads(context), &floats))
            return psoup__out_of_memory(error, SIZE_MAX);
        psoup__free(context, r->scratch);
        r->scratch_size = 0;
        if ((r->scratch = psoup__alloc(context, floats, sizeof *r->scratch, error)) == NULL)
            return PSOUP_ERROR_MEMORY;
        r->scratch_size = need;
    }
fail:
    return status;
}

static psoup_status fill(run *r, psoup_error *error) {
    psoup_status status;
    window *w = r->next;
    w->n = w->bytes = 0;
    while (w->n < WINDOW_BLOCKS && (w->n == 0 || w->bytes < WINDOW_BYTES)) {
        if (r->current == NULL)
            PSOUP__TRY(open_next(r, error));
        psoup__work *work = r->current;
        if (work == NULL)
            break;
        size_t left = work->result->n - work->planned;
        block *b = &w->blocks[w->n];
        *b = (block){.work = work, .at = work->planned, .n = left < work->block ? left : work->block,
                     .place = (w->bytes + 63) / 64 * 64};
        psoup__dtype_bytes(work->result->dtype, b->n, &b->bytes);
        /* a block of another result that makes the window much larger begins the next one */
        if (w->n > 0 && b->bytes > 2 * (size_t)WINDOW_BYTES)
            break;
        w->n++;
        w->bytes = b->place + b->bytes;
        work->planned += b->n;
        if (work->planned == work->result->n)
            r->current = NULL;
    }
    if (w->bytes > w->capacity) {
        psoup_context *context = r->plan->merger->context;
        size_t capacity = w->bytes < WINDOW_BYTES + WINDOW_BYTES / 2 ? WINDOW_BYTES + WINDOW_BYTES / 2
                                                                     : w->bytes;
        psoup__free(context, w->memory);
        w->capacity = 0;
        if ((w->memory = psoup__alloc(context, capacity, 1, error)) == NULL)
            return PSOUP_ERROR_MEMORY;
        w->capacity = capacity;
    }
    return PSOUP_OK;
fail:
    return status;
}

/* ---- a round ------------------------------------------------------------------------------------------------ */

/* The last window into the output, in order. */
static void write_last(run *r) {
    const window *w = r->last;
    psoup__output *output = r->output;
    for (size_t i = 0; i < w->n && r->written == PSOUP_OK; i++) {
        const block *b = &w->blocks[i];
        psoup__work *work = b->work;
        if (b->at == 0)
            r->written = output->kind->tensor(output, work->index, &r->write_error);
        if (r->written == PSOUP_OK && b->bytes > 0)
            r->written = output->kind->write(output, work->index, w->memory + b->place, b->bytes,
                                             &r->write_error);
        if (r->written == PSOUP_OK && b->at + b->n == work->result->n)
            r->written = output->kind->finish(output, work->index, &r->write_error);
        work->written += b->n;
    }
}

/* What the worker has read and made goes into the hashes while it is in its cache. A stream takes blocks in
 * their order; the one before this one was begun earlier. */
static void hash_block(run *r, const block *b, int worker) {
    psoup__work *work = b->work;
    for (size_t i = 0; i < work->n_streams; i++) {
        psoup__stream *stream = &work->streams[i];
        pthread_mutex_lock(&r->lock);
        while (stream->at != b->at)
            pthread_cond_wait(&r->moved, &r->lock);
        pthread_mutex_unlock(&r->lock);
        psoup__stream_update(work, stream, b->n, r->next->memory + b->place, worker);
        pthread_mutex_lock(&r->lock);
        stream->at += b->n;
        pthread_cond_broadcast(&r->moved);
        pthread_mutex_unlock(&r->lock);
    }
}

static void do_task(void *arg, size_t task, int worker) {
    run *r = arg;
    size_t writes = r->output->kind->any_thread && r->last->n > 0;
    if (task < writes) {
        write_last(r);
    } else {
        const block *b = &r->next->blocks[task - writes];
        psoup__work_block(b->work, b->at, b->n, r->next->memory + b->place,
                          r->scratch + (size_t)worker * r->scratch_size, worker);
        hash_block(r, b, worker);
    }
}

/* An adapter that is in memory may be gone. */
static psoup_status check_sources(const psoup__plan *plan, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_merger *merger = plan->merger;
    for (size_t i = 0; i <= merger->n && status == PSOUP_OK; i++) {
        const psoup__merge_source *source = i < merger->n ? &merger->sources[i] : &merger->base;
        if (source->read || !psoup__source_is_adapter(source))
            status = psoup__source_check(source, error);
    }
    return status;
}

static psoup_status check_blocks(const run *r, psoup_error *error) {
    for (size_t i = 0; i < r->next->n; i++)
        if (r->next->blocks[i].work->bad)
            return psoup__work_blame(r->next->blocks[i].work, error);
    return PSOUP_OK;
}

static void close_work(run *r, psoup__work *work) {
    psoup__work **at = &r->open;
    while (*at != work)
        at = &(*at)->next;
    *at = work->next;
    psoup__work_free(work);
}

/* Frees what the last window finished, and tells of it. A pair's a stays for its b. */
static psoup_status close_last(run *r, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; i < r->last->n && status == PSOUP_OK; i++) {
        const block *b = &r->last->blocks[i];
        psoup__work *work = b->work;
        if (b->at + b->n < work->result->n)
            continue;
        status = psoup__merge_progress(r->plan->merger, work->index + 1, r->plan->n, error);
        if (work->pair != NULL)
            close_work(r, work->pair);
        if (work->result->kind != PSOUP__PAIR_A)
            close_work(r, work);
    }
    r->last->n = 0;
    return status;
}

static psoup_status do_round(run *r, psoup_error *error) {
    psoup_status status;
    psoup_context *context = r->plan->merger->context;
    size_t tasks = r->next->n;
    if (r->output->kind->any_thread)
        tasks += r->last->n > 0;
    else
        write_last(r);
    psoup__parallel(context, tasks, do_task, r);
    PSOUP__TRY(check_sources(r->plan, error));
    if (r->written != PSOUP_OK)
        return psoup__fail(error, r->written, "%s", r->write_error.message);
    PSOUP__TRY(check_blocks(r, error));
    if (r->output->kind->settle != NULL)
        PSOUP__TRY(r->output->kind->settle(r->output, error));
    PSOUP__TRY(close_last(r, error));
fail:
    return status;
}

psoup_status psoup__run(const psoup__plan *plan, psoup__certificate *certificate, psoup__output *output,
                        psoup_error *error) {
    psoup_status status;
    psoup_context *context = plan->merger->context;
    run *r = psoup__alloc(context, 1, sizeof *r, error);
    if (r == NULL)
        return PSOUP_ERROR_MEMORY;
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->moved, NULL);
    r->plan = plan;
    r->certificate = certificate;
    r->output = output;
    r->next = &r->windows[0];
    r->last = &r->windows[1];
    do {
        PSOUP__TRY(fill(r, error));
        PSOUP__TRY(do_round(r, error));
        window *made = r->next;
        r->next = r->last;
        r->last = made;
    } while (r->last->n > 0);
fail:
    /* a source that could not be read, or is no longer what it was, is why all else went wrong */
    if (status != PSOUP_OK && status != PSOUP_ERROR_CANCELLED && check_sources(plan, error) != PSOUP_OK)
        status = PSOUP_ERROR_IO;
    while (r->open != NULL)
        close_work(r, r->open);
    psoup__free(context, r->windows[0].memory);
    psoup__free(context, r->windows[1].memory);
    psoup__free(context, r->scratch);
    pthread_cond_destroy(&r->moved);
    pthread_mutex_destroy(&r->lock);
    psoup__free(context, r);
    return status;
}
