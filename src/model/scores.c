/* Log-probabilities, logits and gradients of rows, in packed batches of bounded size. */
#include "model/tape.h"

#include <string.h>

enum { BATCH_TOKENS = 2048 }; /* a longer row makes a batch of its own */

/* Host arrays for one batch at a time; rows [first, first + batch.n) of the caller's. */
typedef struct packer {
    psoup_model *model;
    const psoup_row *rows;
    const int32_t *methods; /* [n] or NULL */
    size_t n, first, next;
    int32_t *tokens, *start, *row, *target;
    float *mix;
    float *logprob; /* device [longest batch]: of what is scored, or gradients by it */
    psoup__batch batch;
    int32_t scored; /* entries of row and target */
} packer;

static psoup_status check_rows(const psoup_row *rows, size_t n, psoup_error *error) {
    for (size_t i = 0; i < n; i++) {
        if (rows[i].n == 0 || !rows[i].tokens)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "row %zu has no tokens", i);
        if (rows[i].n > INT32_MAX / 2)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "row %zu has %zu tokens, too many", i,
                               rows[i].n);
    }
    return PSOUP_OK;
}

static void packer_free(packer *p) {
    psoup_context *context = p->model->context;
    psoup__free(context, p->tokens);
    psoup__free(context, p->start);
    psoup__free(context, p->row);
    psoup__free(context, p->target);
    psoup__free(context, p->mix);
    p->model->be->ops->release(p->model->be, p->logprob);
}

static psoup_status packer_create(packer *p, psoup_model *model, const psoup_row *rows, const int32_t *methods,
                                  size_t n, psoup_error *error) {
    psoup_context *context = model->context;
    *p = (packer){.model = model, .rows = rows, .methods = methods, .n = n};
    psoup_status status = check_rows(rows, n, error);
    if (status != PSOUP_OK)
        return status;
    size_t most = BATCH_TOKENS, sequences = n < BATCH_TOKENS ? n : BATCH_TOKENS;
    for (size_t i = 0; i < n; i++)
        most = rows[i].n > most ? rows[i].n : most;
    p->tokens = psoup__alloc(context, most, sizeof *p->tokens, error);
    if (p->tokens)
        p->row = psoup__alloc(context, most, sizeof *p->row, error);
    if (p->row)
        p->target = psoup__alloc(context, most, sizeof *p->target, error);
    if (p->target)
        p->start = psoup__alloc(context, sequences + 1, sizeof *p->start, error);
    if (p->start)
        p->mix = psoup__alloc(context, sequences,
                              (size_t)model->n_adapters * sizeof *p->mix, error);
    if (p->mix)
        p->logprob = model->be->ops->alloc(model->be, most, sizeof *p->logprob, error);
    if (p->logprob)
        return PSOUP_OK;
    packer_free(p);
    return PSOUP_ERROR_MEMORY;
}

/* Fills the next batch; false at the end. */
static bool packer_next(packer *p) {
    if (p->next == p->n)
        return false;
    size_t adapters = (size_t)p->model->n_adapters, width = adapters * sizeof(float);
    int32_t tokens = 0, n = 0, scored = 0;
    p->first = p->next;
    for (; p->next < p->n; p->next++, n++) {
        const psoup_row *row = &p->rows[p->next];
        if (n > 0 && (size_t)tokens + row->n > BATCH_TOKENS)
            break;
        p->start[n] = tokens;
        memcpy(p->tokens + tokens, row->tokens, row->n * sizeof *row->tokens);
        float *mix = p->mix + (size_t)n * adapters;
        if (row->mix && width)
            memcpy(mix, row->mix, width);
        else
            memset(mix, 0, width);
        for (size_t i = 1; i < row->n; i++, scored++) {
            p->row[scored] = tokens + (int32_t)i - 1;
            p->target[scored] = row->tokens[i];
        }
        tokens += (int32_t)row->n;
    }
    p->start[n] = tokens;
    p->scored = scored;
    p->batch = (psoup__batch){
        .n = n, .rows = tokens, .tokens = p->tokens, .start = p->start, .mix = p->mix,
        .method = p->methods ? p->methods + p->first : NULL};
    return true;
}

/* How many rows from the first on are mixed alike: by parameters, or by logits. */
static size_t run_of(const int32_t *methods, size_t n) {
    size_t end = 1;
    while (end < n && methods && (methods[end] == PSOUP_MIX_LOGITS) == (methods[0] == PSOUP_MIX_LOGITS))
        end++;
    return methods ? end : n;
}

/* Logits of every position, or log-probs, of rows that are mixed by parameters. */
static psoup_status score_packed(psoup_model *model, psoup__tape *tape, const psoup_row *rows, const int32_t *methods,
                                 size_t n, bool whole, float *out, psoup_error *error) {
    packer p;
    psoup_status status = packer_create(&p, model, rows, methods, n, error);
    if (status != PSOUP_OK)
        return status;
    while (packer_next(&p)) {
        PSOUP__TRY(psoup__forward(model, tape, &p.batch, false, error));
        if (!whole) {
            PSOUP__TRY(psoup__logprobs(model, tape, p.row, p.target, p.scored, p.logprob, error));
            PSOUP__TRY(model->be->ops->read(model->be, out, p.logprob, (size_t)p.scored * sizeof *out, error));
            out += p.scored;
            continue;
        }
        for (int32_t i = 0; i < p.batch.rows; i++)
            p.row[i] = i;
        PSOUP__TRY(psoup__logits(model, tape, p.row, p.batch.rows, out, error));
        out += (size_t)p.batch.rows * (size_t)model->config.vocab_size;
    }
fail:
    packer_free(&p);
    return status;
}

static psoup_status score(psoup_model *model, const psoup_row *rows, const int32_t *methods, size_t n, bool whole,
                          float *out, psoup_error *error) {
    psoup__tape *tape = NULL;
    psoup_status status;
    PSOUP__TRY(check_rows(rows, n, error));
    PSOUP__TRY(psoup__tape_create(model, &tape, error));
    for (size_t run; n > 0; n -= run) {
        run = run_of(methods, n);
        const bool mixed = methods && methods[0] == PSOUP_MIX_LOGITS;
        if (!mixed)
            PSOUP__TRY(score_packed(model, tape, rows, methods, run, whole, out, error));
        for (size_t i = 0; i < run; i++, rows++) {
            if (mixed)
                PSOUP__TRY(psoup__mix_check(model, rows->mix, PSOUP_MIX_LOGITS, "mix of a row", error));
            if (mixed)
                PSOUP__TRY(psoup__score_mixed(model, tape, rows, whole, out, error));
            out += whole ? rows->n * (size_t)model->config.vocab_size : rows->n - 1;
        }
        methods = methods ? methods + run : NULL;
    }
fail:
    psoup__tape_free(tape);
    return status;
}

psoup_status psoup_model_logprobs_mixed(psoup_model *model, const psoup_row *rows, const int32_t *methods, size_t n,
                                        float *out, psoup_error *error) {
    return score(model, rows, methods, n, false, out, error);
}

psoup_status psoup_model_logits_mixed(psoup_model *model, const psoup_row *rows, const int32_t *methods, size_t n,
                                      float *out, psoup_error *error) {
    return score(model, rows, methods, n, true, out, error);
}

psoup_status psoup_model_logprobs(psoup_model *model, const psoup_row *rows, size_t n, float *out,
                                  psoup_error *error) {
    return score(model, rows, NULL, n, false, out, error);
}

psoup_status psoup_model_logits(psoup_model *model, const psoup_row *rows, size_t n, float *out,
                                psoup_error *error) {
    return score(model, rows, NULL, n, true, out, error);
}

/* ---- gradients -------------------------------------------------------------------------------- */

typedef struct entry {
    size_t offset, count;
} entry;

struct psoup_gradients {
    psoup_context *context;
    psoup__map *names; /* name → index of its entry */
    entry *entries;
    size_t n, capacity;
    float *data;
};

static psoup_status add_entry(psoup_gradients *g, const char *name, size_t *offset, size_t count,
                              psoup_error *error) {
    psoup_status status = psoup__reserve(g->context, &g->entries, &g->capacity, g->n + 1,
                                         sizeof *g->entries, error);
    if (status == PSOUP_OK)
        status = psoup__map_set(g->names, name, strlen(name), (int64_t)g->n, NULL, error);
    if (status == PSOUP_OK)
        g->entries[g->n++] = (entry){*offset, count};
    *offset += count;
    return status;
}

static psoup_status name_adapter(psoup_gradients *g, const psoup_model *model,
                                 const psoup__adapter *adapter, size_t base, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t pairs = (size_t)model->config.num_hidden_layers * PSOUP__LINEARS;
    for (size_t pair = 0; status == PSOUP_OK && pair < 2 * pairs; pair++) {
        size_t at = pair / 2;
        bool b = pair % 2;
        const psoup__lora *lora = &adapter->lora[at];
        const psoup__weight *w = &model->layers[at / PSOUP__LINEARS].linear[at % PSOUP__LINEARS];
        if (lora->rank == 0)
            continue;
        char *name = psoup__format(g->context, error, "%s/model.layers.%zu.%s.lora_%c",
                                   adapter->name, at / PSOUP__LINEARS,
                                   psoup__linear_names[at % PSOUP__LINEARS], b ? 'B' : 'A');
        if (!name)
            return PSOUP_ERROR_MEMORY;
        size_t offset = base + (size_t)((b ? lora->b : lora->a) - adapter->data);
        status = add_entry(g, name, &offset, (size_t)lora->rank * (size_t)(b ? w->out : w->in),
                           error);
        psoup__free(g->context, name);
    }
    return status;
}

/* Gradient buffers of this call alone hang in the model while it runs, so that what a trainer has
 * accumulated stays as it was. `own` [n_adapters] keeps the trainer's meanwhile. */
static psoup_status lend_buffers(psoup_model *model, uint32_t what, float **base, float **own,
                                 psoup_error *error) {
    const psoup__ops *ops = model->be->ops;
    psoup_status status = PSOUP_OK;
    for (int32_t i = 0; i < model->n_adapters; i++) {
        own[i] = model->adapters[i]->grad;
        model->adapters[i]->grad = NULL;
    }
    if (what & PSOUP_GRADIENT_BASE) {
        *base = ops->alloc(model->be, psoup__model_count(model), sizeof(float), error);
        status = *base ? PSOUP_OK : PSOUP_ERROR_MEMORY;
    }
    for (int32_t i = 0; i < model->n_adapters; i++) {
        psoup__adapter *adapter = model->adapters[i];
        if (status == PSOUP_OK && (what & PSOUP_GRADIENT_ADAPTERS)) {
            adapter->grad = ops->alloc(model->be, adapter->count, sizeof(float), error);
            status = adapter->grad ? PSOUP_OK : PSOUP_ERROR_MEMORY;
        }
        psoup__adapter_point(model, adapter);
    }
    psoup__model_point_gradients(model, *base);
    return status;
}

static void return_buffers(psoup_model *model, float *base, float **own) {
    const psoup__ops *ops = model->be->ops;
    psoup__model_point_gradients(model, model->grad);
    ops->release(model->be, base);
    for (int32_t i = 0; i < model->n_adapters; i++) {
        ops->release(model->be, model->adapters[i]->grad);
        model->adapters[i]->grad = own[i];
        psoup__adapter_point(model, model->adapters[i]);
    }
}

/* Names and room for all that is asked for. */
static psoup_status lay_out(psoup_gradients *g, const psoup_model *model, uint32_t what, size_t n,
                            size_t *base_at, size_t *adapters_at, size_t *mix_at,
                            psoup_error *error) {
    size_t offset = 0;
    psoup_status status = psoup__map_create(g->context, 64, &g->names, error);
    *base_at = offset;
    for (psoup__parameter p = {.next = 0};
         (what & PSOUP_GRADIENT_BASE) && status == PSOUP_OK && psoup__model_next(model, &p);)
        status = add_entry(g, p.name, &offset, p.count, error);
    *adapters_at = offset;
    for (int32_t i = 0;
         (what & PSOUP_GRADIENT_ADAPTERS) && status == PSOUP_OK && i < model->n_adapters; i++) {
        status = name_adapter(g, model, model->adapters[i], offset, error);
        offset += model->adapters[i]->count;
    }
    *mix_at = offset;
    if (status == PSOUP_OK && (what & PSOUP_GRADIENT_MIX))
        status = add_entry(g, "mix", &offset, n * (size_t)model->n_adapters, error);
    if (status == PSOUP_OK) {
        g->data = psoup__alloc(g->context, offset, sizeof *g->data, error);
        status = g->data ? PSOUP_OK : PSOUP_ERROR_MEMORY;
    }
    return status;
}

static psoup_status run_gradients(psoup_model *model, packer *p, const float *weights,
                                  float *dmix /* or NULL */, psoup_error *error) {
    psoup__tape *tape = NULL;
    psoup_status status;
    float *ones = NULL;
    PSOUP__TRY(psoup__tape_create(model, &tape, error));
    while (packer_next(p)) {
        if (!weights) {
            psoup__free(model->context, ones);
            ones = psoup__alloc(model->context, (size_t)p->scored, sizeof *ones, error);
            status = ones ? PSOUP_OK : PSOUP_ERROR_MEMORY;
            if (!ones)
                goto fail;
            for (int32_t i = 0; i < p->scored; i++)
                ones[i] = 1;
        }
        psoup__loss_gradient loss = {.row = p->row,
                                     .target = p->target,
                                     .dlogprob = p->logprob,
                                     .n = p->scored,
                                     .dmix = dmix};
        PSOUP__TRY(psoup__forward(model, tape, &p->batch, true, error));
        model->be->ops->write(model->be, p->logprob, weights ? weights : ones, (size_t)p->scored * sizeof *ones);
        PSOUP__TRY(psoup__backward(model, tape, &loss, error));
        weights = weights ? weights + p->scored : NULL;
        dmix = dmix ? dmix + (size_t)p->batch.n * (size_t)model->n_adapters : NULL;
    }
fail:
    psoup__free(model->context, ones);
    psoup__tape_free(tape);
    return status;
}

psoup_status psoup_model_gradients(psoup_model *model, const psoup_row *rows, size_t n,
                                   const float *weights, uint32_t what, psoup_gradients **out,
                                   psoup_error *error) {
    return psoup_model_gradients_mixed(model, rows, NULL, n, weights, what, out, error);
}

psoup_status psoup_model_gradients_mixed(psoup_model *model, const psoup_row *rows, const int32_t *methods, size_t n,
                                         const float *weights, uint32_t what, psoup_gradients **out,
                                         psoup_error *error) {
    psoup_context *context = model->context;
    const psoup__ops *ops = model->be->ops;
    size_t base_at = 0, adapters_at = 0, mix_at = 0;
    float *base = NULL, **own = NULL;
    psoup_gradients *g = NULL;
    packer p;
    *out = NULL;
    for (size_t i = 0; methods && i < n; i++)
        if (methods[i] == PSOUP_MIX_LOGITS)
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "row %zu: gradients of mixed logits are not made: of "
                               "method delta or factors they are", i);
    psoup_status status = packer_create(&p, model, rows, methods, n, error);
    if (status != PSOUP_OK)
        return status;
    status = PSOUP_ERROR_MEMORY;
    g = psoup__alloc(context, 1, sizeof *g, error);
    if (!g)
        goto fail;
    g->context = context;
    own = psoup__alloc(context, (size_t)model->n_adapters, sizeof *own, error);
    if (!own)
        goto fail;
    PSOUP__TRY(lend_buffers(model, what, &base, own, error));
    PSOUP__TRY(lay_out(g, model, what, n, &base_at, &adapters_at, &mix_at, error));
    PSOUP__TRY(run_gradients(model, &p, weights,
                             what & PSOUP_GRADIENT_MIX ? g->data + mix_at : NULL, error));
    if (base)
        PSOUP__TRY(ops->read(model->be, g->data + base_at, base,
                             psoup__model_count(model) * sizeof(float), error));
    for (int32_t i = 0; i < model->n_adapters; i++) {
        const psoup__adapter *adapter = model->adapters[i];
        if (adapter->grad)
            PSOUP__TRY(ops->read(model->be, g->data + adapters_at, adapter->grad,
                                 adapter->count * sizeof(float), error));
        adapters_at += adapter->count;
    }
fail:
    if (own)
        return_buffers(model, base, own);
    psoup__free(context, own);
    packer_free(&p);
    if (status == PSOUP_OK)
        *out = g;
    else
        psoup_gradients_free(g);
    return status;
}

const float *psoup_gradients_get(const psoup_gradients *gradients, const char *name,
                                 size_t *count) {
    int64_t index = 0;
    if (!psoup__map_get(gradients->names, name, strlen(name), &index))
        return NULL;
    if (count)
        *count = gradients->entries[index].count;
    return gradients->data + gradients->entries[index].offset;
}

void psoup_gradients_free(psoup_gradients *gradients) {
    if (!gradients)
        return;
    psoup_context *context = gradients->context;
    psoup__map_free(gradients->names);
    psoup__free(context, gradients->entries);
    psoup__free(context, gradients->data);
    psoup__free(context, gradients);
}
