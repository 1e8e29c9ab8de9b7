/* How methods read: blocks of inputs and of task vectors, and whole tensors by a fixed division. */
#include "blend/methods.h"

#include <string.h>

#define CHUNK 2048     /* floats: some inputs' worth stay in the first cache */
#define STEP (1 << 16) /* elements of one task of a walk */

const psoup__method_kernels *psoup__method_kernels_of(const psoup_context *context) {
#ifdef __x86_64__
    switch (psoup__isa_of(context)) {
    case PSOUP__ISA_AVX512:
        return &psoup__method_kernels_avx512;
    case PSOUP__ISA_AVX2:
        return &psoup__method_kernels_avx2;
    default:
        break;
    }
#endif
    return &psoup__method_kernels_generic;
}

const float *psoup__method_view(const psoup__method_job *job, const psoup__merge_input *input,
                                size_t at, size_t n, float *buffer) {
    const psoup__tensor *tensor = input->tensor;
    if (tensor != NULL && tensor->data != NULL && input->n_factors == 0 && tensor->heads == 0 &&
        tensor->dtype == PSOUP_F32 && (uintptr_t)tensor->data % sizeof(float) == 0)
        return (const float *)tensor->data + at;
    psoup__merge_read(job->context, input, at, n, buffer);
    return buffer;
}

/* Whether two tensors have the same elements because they are the same. */
static bool are_one(const psoup__tensor *a, const psoup__tensor *b) {
    if (a == b || a == NULL || b == NULL)
        return a == b && a != NULL;
    return a->dtype == b->dtype && a->heads == b->heads && a->pull == b->pull && a->at == b->at &&
           (a->pull != NULL || a->data == b->data);
}

void psoup__method_delta(const psoup__method_job *job, size_t i, size_t at, size_t n,
                         const float *base, float *out) {
    psoup__merge_input input = job->inputs[i];
    if (base != NULL && job->base->n_factors == 0 && are_one(input.tensor, job->base->tensor)) {
        input.tensor = NULL;
        base = NULL;
    }
    psoup__merge_read(job->context, &input, at, n, out);
    if (base != NULL)
        psoup__method_kernels_of(job->context)->subtract(out, base, n);
}

static bool has_factors(const psoup__method_job *job) {
    bool any = job->base != NULL && job->base->n_factors > 0;
    for (size_t i = 0; i < job->count; i++)
        any |= job->inputs[i].n_factors > 0;
    return any;
}

size_t psoup__method_chunk(const psoup__method_job *job, size_t n) {
    return n < CHUNK || job->method->whole_rows || has_factors(job) ? n : CHUNK;
}

size_t psoup__method_step(const psoup__method_job *job) {
    size_t columns = job->columns > 0 ? (size_t)job->columns : 1;
    if (!job->method->whole_rows && !has_factors(job))
        return STEP;
    return columns < STEP ? STEP / columns * columns : columns;
}

/* ---- whole tensors --------------------------------------------------------------------------- */

typedef struct walk {
    const psoup__method_job *job;
    psoup__ahead *ahead;
    psoup__walk_fn fn;
    void *arg;
    size_t step, piece, per_element, quantities;
    float *scratch;   /* [workers, piece · per_element] */
    double *partials; /* [tasks, quantities] */
} walk;

static void walk_task(void *arg, size_t task, int worker) {
    const walk *w = arg;
    size_t at = task * w->step, end = w->job->n - at < w->step ? w->job->n : at + w->step;
    float *scratch = w->scratch + (size_t)worker * w->piece * w->per_element;
    double *partial = w->quantities > 0 ? w->partials + task * w->quantities : NULL;
    const psoup__method_job *job = psoup__ahead_job(w->ahead, w->job, worker, end);
    for (; at < end; at += w->piece) {
        size_t n = end - at < w->piece ? end - at : w->piece;
        w->fn(job, w->arg, at, n, worker, scratch, partial);
    }
}

psoup_status psoup__method_walk(const psoup__method_job *job, size_t per_element, psoup__walk_fn fn,
                                void *arg, size_t quantities, double *sums, psoup_error *error) {
    walk w = {.job = job,
              .fn = fn,
              .arg = arg,
              .step = psoup__method_step(job),
              .per_element = per_element,
              .quantities = quantities};
    psoup_status status = PSOUP_ERROR_MEMORY;
    size_t tasks = job->n / w.step + (job->n % w.step != 0), floats;
    size_t workers = (size_t)psoup_context_threads(job->context);
    w.piece = psoup__method_chunk(job, job->n < w.step ? job->n : w.step);
    if (job->method->whole_rows && !has_factors(job))
        w.piece = (size_t)job->columns;
    if (!psoup__multiply(w.piece, per_element * workers, &floats))
        return psoup__out_of_memory(error, SIZE_MAX);
    if ((w.scratch = psoup__alloc(job->context, floats, sizeof *w.scratch, error)) == NULL ||
        (w.partials = psoup__alloc(job->context, tasks * quantities, sizeof *w.partials, error)) ==
            NULL)
        goto fail;
    PSOUP__TRY(psoup__ahead_open(job, &w.ahead, error));
    psoup__parallel(job->context, tasks, walk_task, &w);
    for (size_t q = 0; q < quantities; q++)
        sums[q] = 0;
    for (size_t task = 0; task < tasks; task++)
        for (size_t q = 0; q < quantities; q++)
            sums[q] += w.partials[task * quantities + q];
    status = PSOUP_OK;
fail:
    psoup__ahead_close(job->context, w.ahead);
    psoup__free(job->context, w.scratch);
    psoup__free(job->context, w.partials);
    return status;
}

typedef struct row_walk {
    const psoup__method_job *job;
    psoup__ahead *ahead;
    psoup__rows_fn fn;
    void *arg;
    size_t rows, columns, together; /* rows of one task */
    size_t space;
    float *scratch; /* [workers, space] */
} row_walk;

static void row_task(void *arg, size_t task, int worker) {
    const row_walk *w = arg;
    size_t first = task * w->together;
    size_t n = w->rows - first < w->together ? w->rows - first : w->together;
    const psoup__method_job *job = psoup__ahead_job(w->ahead, w->job, worker, (first + n) * w->columns);
    for (size_t row = first; row < first + n; row++)
        w->fn(job, w->arg, row, worker, w->scratch + (size_t)worker * w->space);
}

psoup_status psoup__method_walk_rows(const psoup__method_job *job, size_t per_element,
                                     psoup__rows_fn fn, void *arg, psoup_error *error) {
    row_walk w = {.job = job, .fn = fn, .arg = arg, .columns = (size_t)job->columns};
    size_t workers = (size_t)psoup_context_threads(job->context), floats;
    w.rows = w.columns > 0 ? job->n / w.columns : 0;
    w.together = w.columns < STEP && w.columns > 0 ? STEP / w.columns : 1;
    w.space = psoup__method_chunk(job, w.columns) * per_element;
    if (!psoup__multiply(w.space, workers, &floats))
        return psoup__out_of_memory(error, SIZE_MAX);
    psoup_status status = psoup__ahead_open(job, &w.ahead, error);
    if (status != PSOUP_OK)
        return status;
    w.scratch = psoup__alloc(job->context, floats, sizeof *w.scratch, error);
    if (w.scratch != NULL)
        psoup__parallel(job->context, w.rows / w.together + (w.rows % w.together != 0), row_task, &w);
    else
        status = PSOUP_ERROR_MEMORY;
    psoup__ahead_close(job->context, w.ahead);
    psoup__free(job->context, w.scratch);
    return status;
}

psoup_status psoup__method_not_finite(const psoup__method_job *job, size_t input,
                                      psoup_error *error) {
    return psoup__fail(
        error, PSOUP_ERROR_FORMAT,
        "%.300s: input %zu, or the base, holds a NaN or infinity, or numbers whose squares "
        "are too large; %s needs a sum over the whole tensor",
        job->name, input, job->method->name);
}
