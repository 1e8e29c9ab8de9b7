/* One result in the making: its inputs opened, and what its method must know of whole tensors. */
#include "merge/engine.h"

#include <string.h>

enum {
    SUM_BLOCK = 1 << 17,     /* elements: two tasks' worth of psoup__sum; fewer where many inputs are read: */
    STAGE_BYTES = 1 << 20,   /* of a block's inputs that are read, so that they stay in the second cache */
    MADE_BLOCK = 1 << 18,    /* elements at most; fewer where a method needs much scratch: */
    SCRATCH_BYTES = 64 << 20 /* of all workers together, but for rows that are longer */
};

/* ---- factors ------------------------------------------------------------------------------------------ */

/* All factors into one pair of scale 1. */
static psoup_status merge_factors(psoup__work *work, size_t n, double *lost, psoup_error *error) {
    psoup_status status;
    psoup_merger *merger = work->merger;
    psoup_merge_method method = (psoup_merge_method)merger->options.method;
    psoup_error inner = {0};
    const psoup__peft_pair *like = work->plan->parts[work->plan->inputs[work->result->input].part].pair;
    const bool across = psoup__work_is_across(work, like);
    int64_t out = across ? like->a.shape[1] : like->b.shape[0];
    int64_t in = across ? like->b.shape[0] : like->a.shape[1];
    int32_t rank = psoup__merge_rank(method, merger->options.svd_rank, work->factors, n, &inner);
    if (rank == 0)
        return psoup__fail(error, inner.status, "%.200s: %s", work->result->module, inner.message);
    float *a = psoup__alloc_unset(merger->context, (size_t)rank, ((size_t)in + (size_t)out) * sizeof *a, error);
    if ((work->merged_memory = a) == NULL)
        return PSOUP_ERROR_MEMORY;
    float *b = a + (size_t)rank * (size_t)in;
    PSOUP__TRY(psoup_merge_factors(merger->context, method, a, b, rank, out, in, work->factors,
                                   work->weights, n, lost, error));
    work->merged = (psoup_lora_factors){.a = a, .b = b, .rank = rank, .scale = 1};
fail:
    return status;
}

/* ---- opening -------------------------------------------------------------------------------------------- */

const psoup__plan_input *psoup__work_input(const psoup__work *work, size_t i) {
    return i < work->result->inputs ? &work->plan->inputs[work->result->input + i]
                                    : &work->plan->inputs[work->result->base];
}

size_t psoup__work_inputs(const psoup__work *work) {
    return work->result->inputs + (work->result->base != PSOUP__NONE);
}

static psoup_status open_values(psoup__work *work, psoup_error *error) {
    size_t n = work->result->inputs;
    for (int p = 0; p <= PSOUP__SCALE; p++) {
        work->values[p] = psoup__alloc(work->merger->context, n, sizeof **work->values, error);
        if (work->values[p] == NULL)
            return PSOUP_ERROR_MEMORY;
        for (size_t i = 0; i < n; i++)
            work->values[p][i] = psoup__work_input(work, i)->values[p];
    }
    return PSOUP_OK;
}

static psoup_status open_plain(psoup__work *work, psoup_error *error) {
    const size_t n = psoup__work_inputs(work);
    if ((work->dtypes = psoup__alloc(work->merger->context, n, sizeof *work->dtypes, error)) == NULL)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < n; i++) {
        const psoup__tensor *tensor = psoup__work_input(work, i)->tensor;
        work->dtypes[i] = tensor->dtype;
        work->staged += tensor->data == NULL ? psoup_dtype_size(tensor->dtype) : 0;
    }
    work->block = SUM_BLOCK;
    if (work->staged > STAGE_BYTES / SUM_BLOCK)
        work->block = STAGE_BYTES / work->staged > 1024 ? STAGE_BYTES / work->staged / 1024 * 1024 : 1024;
    return PSOUP_OK;
}

/* What a method of whole tensors is given: the inputs with their factors, and the parameters. */
static psoup_status make_job(psoup__work *work, int64_t columns, int64_t rows, psoup__made *made,
                             psoup_error *error) {
    static const double one = 1;
    psoup_status status;
    psoup_context *context = work->merger->context;
    const psoup__result *r = work->result;
    const psoup__plan *plan = work->plan;
    const psoup_merger_options *o = &work->merger->options;
    size_t n = psoup__work_inputs(work), first = plan->inputs[r->input].part, parts = 0;
    for (size_t i = 0; i < n; i++)
        parts += psoup__work_input(work, i)->parts;
    if ((work->inputs = psoup__alloc(context, n, sizeof *work->inputs, error)) == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(psoup__work_factors(work, plan->parts + first, parts, error));
    bool as_one = r->kind == PSOUP__MADE && r->module != NULL && parts > 0;
    if (as_one)
        PSOUP__TRY(merge_factors(work, parts, &made->error, error));
    for (size_t i = 0; i < n; i++) {
        const psoup__plan_input *input = psoup__work_input(work, i);
        work->inputs[i] = (psoup__merge_input){.tensor = input->tensor, .columns = columns,
                                               .n_factors = input->parts};
        if (input->parts > 0) {
            work->inputs[i].factors = as_one ? &work->merged : work->factors + (input->part - first);
            work->inputs[i].weights = as_one ? &one : work->weights + (input->part - first);
            work->inputs[i].n_factors = as_one ? 1 : input->parts;
        }
    }
    work->folds = parts > 0;
    /* an adapter's change draws what it would draw on a base */
    if (r->kind == PSOUP__PAIR_A &&
        (work->name = psoup__format(context, error, "%s.weight", r->module)) == NULL)
        return PSOUP_ERROR_MEMORY;
    work->job = (psoup__method_job){
        .context = context, .name = work->name != NULL ? work->name : r->name,
        .n = (size_t)rows * (size_t)columns, .columns = columns, .rows = rows, .count = r->inputs, .inputs = work->inputs,
        .base = r->base != PSOUP__NONE ? &work->inputs[r->inputs] : NULL,
        .weight = work->values[PSOUP__WEIGHT], .density = work->values[PSOUP__DENSITY],
        .gamma = work->values[PSOUP__GAMMA], .epsilon = work->values[PSOUP__EPSILON],
        .scale = work->values[PSOUP__SCALE], .lambda = r->values[PSOUP__LAMBDA], .t = r->values[PSOUP__T],
        .normalize = r->values[PSOUP__NORMALIZE] != 0, .rescale = r->values[PSOUP__RESCALE] != 0,
        .seed = o->seed, .peer = o->peer, .method = r->method, .vote = (int32_t)r->values[PSOUP__VOTE],
        .flatten = r->values[PSOUP__FLATTEN] != 0, .row_wise = r->values[PSOUP__ROW_WISE] != 0,
        .filter_wise = r->values[PSOUP__FILTER_WISE] != 0};
fail:
    return status;
}

/* Every worker's job, with tensors of its own. */
static psoup_status open_desks(psoup__work *work, psoup_error *error) {
    psoup_context *context = work->merger->context;
    const size_t workers = (size_t)psoup_context_threads(context), n = psoup__work_inputs(work);
    for (size_t i = 0; i < n; i++)
        if (psoup__work_stages(work, i))
            work->staged += psoup_dtype_size(psoup__work_input(work, i)->tensor->dtype);
    if (work->staged == 0)
        return PSOUP_OK;
    if ((work->desks = psoup__alloc(context, workers, sizeof *work->desks, error)) == NULL)
        return PSOUP_ERROR_MEMORY;
    for (size_t w = 0; w < workers; w++) {
        psoup__desk *desk = &work->desks[w];
        if ((desk->inputs = psoup__alloc(context, n, sizeof *desk->inputs, error)) == NULL ||
            (desk->tensors = psoup__alloc(context, n, sizeof *desk->tensors, error)) == NULL)
            return PSOUP_ERROR_MEMORY;
        memcpy(desk->inputs, work->inputs, n * sizeof *desk->inputs);
        for (size_t i = 0; i < n; i++)
            if (psoup__work_stages(work, i)) {
                desk->tensors[i] = *work->inputs[i].tensor;
                desk->inputs[i].tensor = &desk->tensors[i];
            }
        desk->job = work->job;
        desk->job.inputs = desk->inputs;
        desk->job.base = work->job.base != NULL ? &desk->inputs[work->result->inputs] : NULL;
    }
    return PSOUP_OK;
}

static psoup_status open_made(psoup__work *work, psoup__made *made, psoup_error *error) {
    psoup_status status;
    const psoup__result *r = work->result;
    int64_t columns = r->rank > 0 ? r->shape[r->rank - 1] : 1;
    PSOUP__TRY(make_job(work, columns, r->rank > 0 ? r->shape[0] : 1, made, error));
    work->job.n = r->n;
    if (r->n > 0)
        PSOUP__TRY(r->method->prepare(&work->job, &work->state, error));
    PSOUP__TRY(open_desks(work, error));
    size_t bytes = SCRATCH_BYTES / (size_t)psoup_context_threads(work->merger->context);
    size_t most = bytes / (sizeof(float) * (psoup__method_scratch(&work->job) + 1) + work->staged);
    work->block = most < MADE_BLOCK ? most : MADE_BLOCK;
    work->block = work->block < 1024 ? 1024 : work->block / 1024 * 1024;
    if ((r->method->whole_rows || work->folds) && columns > 0)
        work->block = work->block < (size_t)columns ? (size_t)columns
                                                    : work->block / (size_t)columns * (size_t)columns;
fail:
    return status;
}

/* A method of whole tensors on the adapters' changes, cut to a rank. */
static psoup_status cut_change(psoup__work *work, psoup__made *made, psoup_error *error) {
    psoup_status status;
    const psoup__peft_pair *like = work->plan->parts[psoup__work_input(work, 0)->part].pair;
    int64_t rows = like->b.shape[0], columns = like->a.shape[1];
    int32_t rank = (int32_t)work->result->shape[0];
    PSOUP__TRY(make_job(work, columns, rows, made, error));
    float *a = psoup__alloc(work->merger->context, (size_t)rank,
                            ((size_t)rows + (size_t)columns) * sizeof *a, error);
    if ((work->merged_memory = a) == NULL)
        return PSOUP_ERROR_MEMORY;
    float *b = a + (size_t)rank * (size_t)columns;
    work->merged = (psoup_lora_factors){.a = a, .b = b, .rank = rank, .scale = 1};
    PSOUP__TRY(psoup__merge_dense_svd(&work->job, rank, a, b, &made->error, error));
fail:
    return status;
}

static psoup_status open_pair(psoup__work *work, psoup__work *pair, psoup__made *made,
                              psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const psoup__plan_input *input = psoup__work_input(work, 0);
    if (pair != NULL) {
        work->pair = pair;
        work->merged = pair->merged;
        *made = (psoup__made){.error = made[-1].error};
    } else if (work->result->method != NULL) {
        PSOUP__TRY(cut_change(work, made, error));
    } else {
        PSOUP__TRY(psoup__work_factors(work, work->plan->parts + input->part, input->parts, error));
        PSOUP__TRY(merge_factors(work, input->parts, &made->error, error));
    }
    work->block = SUM_BLOCK;
fail:
    return status;
}

static psoup_status add_stream(psoup__work *work, size_t input, char *to, psoup_error *error) {
    psoup__stream *stream = &work->streams[work->n_streams];
    *stream = (psoup__stream){.input = input, .to = to};
    if ((stream->hash = psoup__hash_create(work->merger->context, error)) == NULL)
        return PSOUP_ERROR_MEMORY;
    work->n_streams++;
    return PSOUP_OK;
}

/* Tensors are hashed as their blocks are made, by the first result that reads them. */
static psoup_status open_streams(psoup__work *work, psoup_error *error) {
    psoup_status status;
    psoup_context *context = work->merger->context;
    psoup__certificate *certificate = work->certificate;
    size_t n = work->result->kind == PSOUP__PAIR_A || work->result->kind == PSOUP__PAIR_B
                   ? 0
                   : psoup__work_inputs(work);
    work->streams = psoup__alloc(context, n + 1, sizeof *work->streams, error);
    if (work->streams == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(add_stream(work, PSOUP__NONE, certificate->made[work->index].text, error));
    for (size_t i = 0; i < n; i++) {
        const psoup__plan_input *input = psoup__work_input(work, i);
        psoup__entry *entry = input->entry != PSOUP__NONE ? &certificate->entries[input->entry] : NULL;
        if (entry != NULL && !entry->claimed) {
            entry->claimed = true;
            PSOUP__TRY(add_stream(work, i, entry->text, error));
        }
    }
fail:
    return status;
}

psoup_status psoup__work_open(const psoup__plan *plan, size_t index, psoup__certificate *certificate,
                              psoup__work *pair, psoup__work **out, psoup_error *error) {
    psoup_status status;
    psoup_context *context = plan->merger->context;
    psoup__made *made = &certificate->made[index];
    psoup__work *work = psoup__alloc(context, 1, sizeof *work, error);
    *out = NULL;
    if (work == NULL)
        return PSOUP_ERROR_MEMORY;
    work->merger = plan->merger;
    work->plan = plan;
    work->result = &plan->results[index];
    work->index = index;
    work->certificate = certificate;
    work->in = psoup__alloc(context, psoup__work_inputs(work),
                            sizeof *work->in * (size_t)psoup_context_threads(context), error);
    if (work->in == NULL) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    PSOUP__TRY(open_values(work, error));
    switch (work->result->kind) {
    case PSOUP__SUM:
    case PSOUP__KEPT: PSOUP__TRY(open_plain(work, error)); break;
    case PSOUP__MADE: PSOUP__TRY(open_made(work, made, error)); break;
    default: PSOUP__TRY(open_pair(work, pair, made, error)); break;
    }
    PSOUP__TRY(open_streams(work, error));
    *out = work;
    return PSOUP_OK;
fail:
    psoup__work_free(work);
    return status;
}

void psoup__work_free(psoup__work *work) {
    if (work == NULL)
        return;
    psoup_context *context = work->merger->context;
    for (size_t i = 0; i < work->n_streams; i++)
        psoup__free(context, work->streams[i].hash);
    for (int p = 0; p <= PSOUP__SCALE; p++)
        psoup__free(context, work->values[p]);
    psoup__free(context, work->streams);
    psoup__free(context, work->in);
    psoup__free(context, work->dtypes);
    for (int w = 0; w < psoup_context_threads(context) && work->desks != NULL; w++) {
        psoup__free(context, work->desks[w].inputs);
        psoup__free(context, work->desks[w].tensors);
    }
    psoup__free(context, work->desks);
    psoup__free(context, work->state);
    psoup__free(context, work->inputs);
    psoup__free(context, work->factors);
    psoup__free(context, work->weights);
    psoup__free(context, work->memory);
    psoup__free(context, work->merged_memory);
    psoup__free(context, work->name);
    psoup__free(context, work);
}
