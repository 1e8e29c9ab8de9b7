/* The passes that a list of items takes, and who runs them.
 *
 * A large model runs one pass after another, each op shared out among all threads. A small model's ops are over before
 * threads have met, and each thread finds half of its rows in another's cache: it runs in lanes instead, each of which
 * one thread takes from pass to pass by itself, as rollouts decode. A lane that learns adds to a gradient of its own;
 * the optimiser adds them up in order. How an owner's items are cut into lanes depends on their lengths alone, so its
 * bits know neither the threads nor who learns beside it. */
#include <stdatomic.h>

#include "train/train.h"

enum {
    LANE_ROWS = 256, /* of a lane that learns, where there are as many: lanes of fewer would be more to add up */
    PASS_ROWS = 64   /* of a lane's pass, where the bound allows: fewer are slower a row */
};

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

psoup_status psoup__passes_create(psoup_model *model, bool recompute, psoup__passes **out, psoup_error *error) {
    psoup_context *context = model->context;
    psoup__passes *p = *out = psoup__alloc(context, 1, sizeof(*p), error);
    if (!p)
        return PSOUP_ERROR_MEMORY;
    p->model = model;
    p->recompute = recompute;
    p->small = psoup__gradients(model) > 1;
    p->runners = p->small ? context->threads : 1;
    p->runner = psoup__alloc(context, (size_t)p->runners, sizeof(*p->runner), error);
    if (p->runner)
        return PSOUP_OK;
    psoup__free(context, p);
    *out = NULL;
    return PSOUP_ERROR_MEMORY;
}

void psoup__passes_free(psoup__passes *p) {
    if (!p)
        return;
    psoup_context *context = p->model->context;
    for (int32_t w = 0; w < p->runners; w++)
        psoup__pack_free(p->runner[w].pack);
    psoup__free(context, p->runner);
    psoup__free(context, p->begin);
    psoup__free(context, p->end);
    psoup__free(context, p->first);
    psoup__free(context, p->gradient);
    psoup__free(context, p);
}

/* ---- the plan ------------------------------------------------------------------------------------- */

/* Rows of a lane's pass, so that lanes at once have no more than `bound`; a longer item runs alone there too. */
static int64_t rows_of(int64_t bound) {
    return most(bound / PSOUP__LANES, least(bound, PASS_ROWS));
}

static psoup_status reserve(psoup__passes *p, size_t n, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = p->model->context;
    size_t a = p->capacity, b = a, c = a, d = a;
    PSOUP__TRY(psoup__reserve(context, &p->begin, &a, n + 1, sizeof(*p->begin), error));
    PSOUP__TRY(psoup__reserve(context, &p->end, &b, n + 1, sizeof(*p->end), error));
    PSOUP__TRY(psoup__reserve(context, &p->first, &c, n + 1, sizeof(*p->first), error));
    PSOUP__TRY(psoup__reserve(context, &p->gradient, &d, n + 1, sizeof(*p->gradient), error));
    p->capacity = d < c ? d : c;
fail:
    return status;
}

/* Lanes of so many rows of an owner. Where nothing learns no bit knows of them, and there may be some for every thread. */
static int64_t lanes_of(int64_t threads, int64_t total, int64_t bound, bool learn) {
    if (learn)
        return most(1, least(total / LANE_ROWS, PSOUP__LANES));
    int64_t lanes = most(1, divide_up(total, rows_of(bound))), even = divide_up(lanes, threads) * threads;
    return total / even >= PASS_ROWS ? even : lanes;
}

int64_t psoup__passes_at_once(const psoup_model *model, int64_t owners, int64_t items, int64_t length, int64_t bound,
                              bool learn, int64_t *rows) {
    const int64_t threads = model->context->threads, room = rows_of(bound);
    if (psoup__gradients(model) == 1 || model->data) {
        *rows = least(items * length, length > bound ? length : bound / length * length);
        return 1;
    }
    const int64_t own = learn ? divide_up(items, owners) : items;
    const int64_t lanes = lanes_of(threads, own * length, bound, learn), each = divide_up(own, lanes);
    *rows = least(each * length, length > room ? length : room / length * length);
    return least(least(threads, bound / room), learn ? owners * lanes : lanes);
}

/* Items [first, last) into lanes of about as many rows each, and those into passes. */
static void cut(psoup__passes *p, const int32_t *rows, size_t first, size_t last, int64_t bound, bool learn,
                int32_t *pass) {
    int64_t total = 0, before = 0, used = 0, lane = -1;
    for (size_t i = first; i < last; i++)
        total += rows[i];
    const int64_t lanes = lanes_of(p->model->context->threads, total, bound, learn), room = rows_of(bound);
    for (size_t i = first; i < last; before += rows[i++]) {
        const int64_t own = total ? (2 * before + rows[i]) * lanes / (2 * total) : 0; /* by its middle */
        if (own != lane) {
            p->first[p->lanes] = p->n;
            p->gradient[p->lanes++] = learn ? (int32_t)own : 0;
        }
        if (own != lane || used + rows[i] > room) {
            p->begin[p->n++] = i;
            used = 0;
        }
        lane = own;
        used += rows[i];
        p->end[p->n - 1] = i + 1;
        pass[i] = p->n - 1;
    }
    p->first[p->lanes] = p->n;
}

psoup_status psoup__passes_plan(psoup__passes *p, const int32_t *rows, const int32_t *owner, size_t n, int64_t bound,
                                bool learn, int32_t *pass, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    p->n = p->lanes = p->longest = 0;
    p->learn = learn;
    p->in_lanes = p->small && !p->model->data; /* a base that trains has one gradient, and is not packed */
    PSOUP__TRY(reserve(p, n, error));
    for (size_t i = 0; i < n; i++)
        p->longest = rows[i] > p->longest ? rows[i] : p->longest;
    if (p->in_lanes) {
        for (size_t i = 0, end = n; i < n; i = end) {
            for (end = i + 1; end < n && (!learn || owner[end] == owner[i]);)
                end++;
            cut(p, rows, i, end, bound, learn, pass);
        }
        p->at_once = least(p->lanes, bound / rows_of(bound));
        return PSOUP_OK;
    }
    PSOUP__TRY(psoup__plan(p->model->context, rows, owner, n, bound, pass, &p->n, error));
    for (int32_t k = 0; k < p->n; k++)
        p->end[k] = 0;
    for (size_t i = 0; i < n; i++) {
        if (p->end[pass[i]] == 0)
            p->begin[pass[i]] = i;
        p->end[pass[i]] = i + 1;
    }
fail:
    return status;
}

/* ---- the run --------------------------------------------------------------------------------------- */

typedef struct run {
    psoup__passes *passes;
    psoup__pass_fn fn;
    void *user;
    atomic_int next; /* lane */
} run;

static psoup_status run_pass(run *r, int32_t pass, int32_t gradient, psoup__runner *w, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    if (!w->pack)
        PSOUP__TRY(psoup__pack_create(r->passes->model, r->passes->recompute, &w->pack, error));
    psoup__pack_clear(w->pack);
    psoup__tape_gradient(w->pack->tape, gradient);
    PSOUP__TRY(r->fn(r->user, w->pack, pass, error));
fail:
    return status;
}

/* Its own lane, so that every runner has one and memory does not depend on who was quick; then others until none is left. */
static void run_lanes(void *arg, size_t task, int worker) {
    run *r = arg;
    const psoup__passes *p = r->passes;
    psoup__runner *w = &p->runner[task];
    w->status = PSOUP_OK;
    for (int32_t lane = (int32_t)task; w->status == PSOUP_OK && lane < p->lanes; lane = atomic_fetch_add(&r->next, 1))
        for (int32_t pass = p->first[lane]; w->status == PSOUP_OK && pass < p->first[lane + 1]; pass++)
            w->status = run_pass(r, pass, p->gradient[lane], w, &w->error);
    (void)worker;
}

psoup_status psoup__passes_run(psoup__passes *p, psoup__pass_fn fn, void *user, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_model *model = p->model;
    int32_t longest = model->config.max_position_embeddings, n = (int32_t)least(p->runners, p->at_once);
    run r = {p, fn, user, n};
    for (int32_t pass = 0; !p->in_lanes && pass < p->n; pass++)
        PSOUP__TRY(run_pass(&r, pass, 0, &p->runner[0], error));
    if (!p->in_lanes || p->n == 0)
        return PSOUP_OK;
    /* What all of them read is made before they share it. */
    PSOUP__TRY(psoup__model_positions(model, p->longest < longest ? p->longest : longest, error));
    if (p->learn)
        PSOUP__TRY(psoup__backward_ready(model, error));
    psoup__parallel(model->context, (size_t)n, run_lanes, &r);
    for (int32_t w = 0; w < n; w++)
        if (p->runner[w].status != PSOUP_OK) {
            if (error)
                *error = p->runner[w].error;
            return p->runner[w].status;
        }
fail:
    return status;
}
