/* Whole tensors from files: functions ask for pieces that stay in the first cache, and a read of so few bytes costs
 * as much as what is done with them. So each worker reads further ahead, and gives the pieces from there. */
#include "blend/methods.h"

#include <string.h>

enum {
    TOGETHER = 512 << 10, /* bytes of all tensors of a worker: half of a second cache */
    MOST = 128 << 10,     /* of one: more gains nothing */
    LEAST = 16 << 10
};

typedef struct window {
    psoup__pull pull;        /* that the worker's tensor has in place of its own */
    const psoup__pull *from; /* its own; NULL: the tensor has no window */
    uint64_t limit;          /* where the worker's task ends */
    uint64_t start, end;     /* of the bytes that are here */
    size_t capacity;
    unsigned char *bytes; /* [capacity] */
} window;

typedef struct desk { /* a worker's */
    psoup__method_job job;
    psoup__merge_input *inputs; /* [count], then the base */
    psoup__tensor *tensors;     /* likewise */
    window *windows;            /* likewise */
} desk;

struct psoup__ahead {
    size_t n; /* inputs, and the base */
    psoup__merge_input *inputs;
    psoup__tensor *tensors;
    window *windows;
    unsigned char *bytes; /* each [workers, n] */
    desk desks[];         /* [workers] */
};

static int read_window(void *user, size_t index, uint64_t offset, size_t bytes, void *out) {
    window *w = user;
    (void)index;
    if (offset < w->start || offset + bytes > w->end) {
        const uint64_t left = w->limit > offset ? w->limit - offset : 0;
        const size_t take = left < w->capacity ? (size_t)left : w->capacity;
        if (take <= bytes)
            return w->from->read(w->from->user, w->from->index, offset, bytes, out);
        w->start = w->end = 0;
        if (w->from->read(w->from->user, w->from->index, offset, take, w->bytes) != 0)
            return 1;
        w->start = offset;
        w->end = offset + take;
    }
    memcpy(out, w->bytes + (offset - w->start), bytes);
    return 0;
}

static const psoup__merge_input *input_of(const psoup__method_job *job, size_t i) {
    return i < job->count ? &job->inputs[i] : job->base;
}

/* Rows in another order, and numbers in blocks, are read as they are asked for. */
static bool is_pulled(const psoup__tensor *tensor) {
    return tensor != NULL && tensor->data == NULL && tensor->heads == 0 && tensor->dtype != PSOUP_Q8_0;
}

/* Gives a desk's input i a window, or the one that another input of the same bytes has. */
static void set_window(desk *d, size_t i, const psoup__tensor *tensor, size_t capacity, unsigned char *bytes) {
    window *w = &d->windows[i];
    for (size_t j = 0; j < i; j++)
        if (d->windows[j].from == tensor->pull && d->tensors[j].at == tensor->at) {
            d->tensors[i] = *tensor;
            d->tensors[i].pull = &d->windows[j].pull;
            return;
        }
    *w = (window){.from = tensor->pull, .capacity = capacity, .bytes = bytes};
    w->pull = (psoup__pull){.read = read_window, .user = w, .failed = tensor->pull->failed};
    d->tensors[i] = *tensor;
    d->tensors[i].pull = &w->pull;
}

psoup_status psoup__ahead_open(const psoup__method_job *job, psoup__ahead **out, psoup_error *error) {
    psoup_context *context = job->context;
    const size_t n = job->count + (job->base != NULL), workers = (size_t)psoup_context_threads(context);
    size_t pulled = 0;
    *out = NULL;
    for (size_t i = 0; i < n; i++)
        pulled += is_pulled(input_of(job, i)->tensor);
    if (pulled == 0)
        return PSOUP_OK;
    size_t capacity = TOGETHER / pulled / 64 * 64;
    capacity = capacity > MOST ? MOST : capacity < LEAST ? LEAST : capacity;
    psoup__ahead *a = psoup__alloc(context, 1, sizeof *a + workers * sizeof *a->desks, error);
    if (a == NULL)
        return PSOUP_ERROR_MEMORY;
    a->n = n;
    if ((a->inputs = psoup__alloc(context, workers * n, sizeof *a->inputs, error)) == NULL ||
        (a->tensors = psoup__alloc(context, workers * n, sizeof *a->tensors, error)) == NULL ||
        (a->windows = psoup__alloc(context, workers * n, sizeof *a->windows, error)) == NULL ||
        (a->bytes = psoup__alloc_unset(context, workers * n, capacity, error)) == NULL) {
        psoup__ahead_close(context, a);
        return PSOUP_ERROR_MEMORY;
    }
    for (size_t w = 0; w < workers; w++) {
        desk *d = &a->desks[w];
        *d = (desk){*job, a->inputs + w * n, a->tensors + w * n, a->windows + w * n};
        for (size_t i = 0; i < n; i++) {
            const psoup__merge_input *input = input_of(job, i);
            d->inputs[i] = *input;
            if (!is_pulled(input->tensor))
                continue;
            set_window(d, i, input->tensor, capacity, a->bytes + (w * n + i) * capacity);
            d->inputs[i].tensor = &d->tensors[i];
        }
        d->job.inputs = d->inputs;
        d->job.base = job->base != NULL ? &d->inputs[job->count] : NULL;
    }
    *out = a;
    return PSOUP_OK;
}

const psoup__method_job *psoup__ahead_job(psoup__ahead *ahead, const psoup__method_job *job, int worker,
                                          size_t end) {
    if (ahead == NULL)
        return job;
    desk *d = &ahead->desks[worker];
    for (size_t i = 0; i < ahead->n; i++) {
        const psoup__tensor *tensor = d->inputs[i].tensor;
        if (d->windows[i].from != NULL)
            d->windows[i].limit = tensor->at + end * psoup_dtype_size(tensor->dtype);
    }
    return &d->job;
}

void psoup__ahead_close(psoup_context *context, psoup__ahead *ahead) {
    if (ahead == NULL)
        return;
    psoup__free(context, ahead->inputs);
    psoup__free(context, ahead->tensors);
    psoup__free(context, ahead->windows);
    psoup__free(context, ahead->bytes);
    psoup__free(context, ahead);
}
