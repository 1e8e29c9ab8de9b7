#include "model/tape.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const int32_t no_rows[1] = {0};
const psoup__mix psoup__no_mix = {.n = 0, .first = no_rows};

/* ---- slabs ------------------------------------------------------------------------------------ */

void *psoup__slab_take(psoup__slab *slab, size_t count, size_t size) {
    size_t bytes = 0, end = 0;
    if (!psoup__multiply(count, size, &bytes) || !psoup__add(bytes, 63, &bytes) ||
        !psoup__add(slab->used, bytes / 64 * 64, &end)) {
        slab->overflow = true;
        return NULL;
    }
    void *slice = slab->base ? slab->base + slab->used : NULL;
    slab->used = end;
    return slice;
}

static void release_slab(psoup__tape *tape, psoup__slab *slab, bool device) {
    if (device)
        tape->model->be->ops->release(tape->model->be, slab->memory);
    else
        psoup__free(tape->model->context, slab->memory);
    *slab = (psoup__slab){.memory = NULL};
}

void psoup__slab_measure(psoup__slab *slab) {
    slab->base = NULL;
    slab->used = 0;
    slab->overflow = false;
}

psoup_status psoup__slab_grow(psoup__tape *tape, psoup__slab *slab, bool device,
                              psoup_error *error) {
    psoup_model *model = tape->model;
    size_t need = slab->used;
    if (slab->overflow)
        return psoup__out_of_memory(error, SIZE_MAX);
    if (need > slab->capacity) {
        release_slab(tape, slab, device);
        size_t room = need < SIZE_MAX / 2 ? need + need / 8 : need; /* batches differ a little */
        slab->memory = device ? model->be->ops->alloc(model->be, room, 1, error)
                              : psoup__alloc(model->context, room, 1, error);
        if (!slab->memory)
            return PSOUP_ERROR_MEMORY;
        slab->capacity = room;
    }
    slab->base = slab->memory;
    slab->used = 0;
    return PSOUP_OK;
}

/* ---- life ------------------------------------------------------------------------------------- */

psoup_status psoup__tape_create(psoup_model *model, psoup__tape **out, psoup_error *error) {
    *out = psoup__alloc(model->context, 1, sizeof **out, error);
    if (!*out)
        return PSOUP_ERROR_MEMORY;
    (*out)->model = model;
    /* Up to 256 rows of logits at a time, fewer for large vocabularies: at most 64 MB or 32 rows. */
    int32_t rows = (1 << 24) / model->config.vocab_size;
    (*out)->chunk_rows = rows < 32 ? 32 : rows > 256 ? 256 : rows;
    return PSOUP_OK;
}

void psoup__tape_free(psoup__tape *tape) {
    if (!tape)
        return;
    release_slab(tape, &tape->host, false);
    release_slab(tape, &tape->device, true);
    release_slab(tape, &tape->chunk_slab, true);
    release_slab(tape, &tape->mixed_slab, true);
    release_slab(tape, &tape->pull_slab, true);
    psoup__free(tape->model->context, tape->pulled);
    release_slab(tape, &tape->backward, true);
    release_slab(tape, &tape->heads, true);
    psoup__free(tape->model->context, tape);
}

void psoup__tape_recompute(psoup__tape *tape, bool recompute) {
    tape->recompute = recompute;
}

void psoup__tape_gradient(psoup__tape *tape, int32_t gradient) {
    tape->gradient = gradient;
}

const float *psoup__tape_hidden(const psoup__tape *tape) {
    return tape->hidden;
}

/* ---- checks ----------------------------------------------------------------------------------- */

static psoup_status check_batch(const psoup_model *model, const psoup__batch *batch,
                                const psoup__cached *cached, int32_t *positions,
                                psoup_error *error) {
    if (batch->n < 1 || batch->rows < 1 || batch->start[0] != 0 ||
        batch->start[batch->n] != batch->rows)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "a batch needs at least one sequence of at least one token");
    int32_t longest = model->config.max_position_embeddings;
    *positions = 0;
    for (int32_t s = 0; s < batch->n; s++) {
        int32_t length = batch->start[s + 1] - batch->start[s];
        int64_t end = (int64_t)length + (cached ? cached->past[s] : 0);
        if (length < 1)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "sequence %d is empty", (int)s);
        if (end > longest)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "sequence %d has %lld tokens; max_position_embeddings is %d", (int)s,
                               (long long)end, (int)longest);
        *positions = end > *positions ? (int32_t)end : *positions;
    }
    for (int32_t i = 0; i < batch->rows; i++)
        if (batch->tokens[i] < 0 || batch->tokens[i] >= model->config.vocab_size)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "token %d is out of range; the vocabulary has %d",
                               (int)batch->tokens[i], (int)model->config.vocab_size);
    for (int32_t s = 0; batch->mix && s < batch->n; s++) {
        char what[32];
        snprintf(what, sizeof what, "mix of sequence %d", (int)s);
        psoup_status status = psoup__mix_check(model, batch->mix + (size_t)s * (size_t)model->n_adapters,
                                               batch->method && !cached ? batch->method[s] : PSOUP_MIX_DELTA,
                                               what, error); /* a session has checked the method once */
        if (status != PSOUP_OK)
            return status;
    }
    if (!(batch->dropout >= 0 && batch->dropout < 1))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "dropout is %g; expected 0 ≤ p < 1",
                           (double)batch->dropout);
    return PSOUP_OK;
}

psoup_status psoup__check_rows(const psoup__tape *tape, const int32_t *row, const int32_t *target,
                               int32_t n, psoup_error *error) {
    for (int32_t i = 0; i < n; i++) {
        if (row[i] < 0 || row[i] >= tape->rows)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "row %d is out of range; the batch has %d",
                               (int)row[i], (int)tape->rows);
        if (target && (target[i] < 0 || target[i] >= tape->model->config.vocab_size))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "token %d is out of range; the vocabulary has %d", (int)target[i],
                               (int)tape->model->config.vocab_size);
    }
    return PSOUP_OK;
}

/* ---- layout ----------------------------------------------------------------------------------- */

static void lay_out_host(psoup__tape *t, bool cached) {
    psoup__slab *s = &t->host;
    size_t n = (size_t)t->n, rows = (size_t)t->rows, active = (size_t)t->active;
    size_t layers = (size_t)t->model->config.num_hidden_layers;
    size_t cells = 0;
    if (!psoup__multiply(rows, active, &cells))
        s->overflow = true;
    t->adapter = psoup__slab_take(s, active, sizeof *t->adapter);
    t->lora = psoup__slab_take(s, layers * PSOUP__LINEARS * active, sizeof *t->lora);
    t->start = psoup__slab_take(s, n + 1, sizeof *t->start);
    t->position_host = psoup__slab_take(s, rows, sizeof *t->position_host);
    t->used_by = psoup__slab_take(s, cells, sizeof *t->used_by);
    t->weight_host = psoup__slab_take(s, cells, sizeof *t->weight_host);
    t->factors_host = psoup__slab_take(s, t->factors ? rows : 0, sizeof *t->factors_host);
    t->first = psoup__slab_take(s, active + 1, sizeof *t->first);
    size_t dropped = t->dropout > 0 ? rows : 0;
    t->drop_seed = psoup__slab_take(s, dropped, sizeof *t->drop_seed);
    t->drop_stream = psoup__slab_take(s, dropped, sizeof *t->drop_stream);
    t->drop_offset = psoup__slab_take(s, dropped, sizeof *t->drop_offset);
    t->span_host = psoup__slab_take(s, n, sizeof *t->span_host);
    t->place_host = psoup__slab_take(s, cached ? rows : 0, sizeof *t->place_host);
    t->pages_host = psoup__slab_take(s, t->n_pages, sizeof *t->pages_host);
    t->layers = psoup__slab_take(s, layers + 1, sizeof *t->layers);
}

/* Floats of u for one linear: every active adapter's rows times its rank there. */
static size_t u_count(const psoup__tape *t, int32_t layer, int linear) {
    size_t count = 0;
    for (int32_t i = 0; i < t->active; i++)
        count += (size_t)(t->first[i + 1] - t->first[i]) *
                 (size_t)t->model->adapters[t->adapter[i]]
                     ->lora[layer * PSOUP__LINEARS + linear]
                     .rank;
    return count;
}

static float *take_rows(psoup__slab *s, size_t rows, int32_t width) {
    size_t count = 0;
    if (!psoup__multiply(rows, (size_t)width, &count))
        s->overflow = true;
    return psoup__slab_take(s, count, sizeof(float));
}

/* All but x and u. */
static void lay_out_layer(psoup__tape *t, psoup__layer_tape *layer) {
    const psoup_model *m = t->model;
    psoup__slab *s = &t->device;
    size_t rows = (size_t)t->rows;
    int32_t dim = m->config.hidden_size, ffn = m->config.intermediate_size;
    layer->rstd1 = take_rows(s, rows, 1);
    layer->norm1 = take_rows(s, rows, dim);
    layer->q = take_rows(s, rows, m->q_width);
    layer->k = take_rows(s, rows, m->kv_width);
    layer->v = take_rows(s, rows, m->kv_width);
    layer->attended = take_rows(s, rows, m->q_width);
    layer->lse = t->saved ? take_rows(s, rows, m->config.num_attention_heads) : NULL;
    layer->middle = take_rows(s, rows, dim);
    layer->rstd2 = take_rows(s, rows, 1);
    layer->norm2 = take_rows(s, rows, dim);
    layer->gate = take_rows(s, rows, ffn);
    layer->up = take_rows(s, rows, ffn);
}

/* Room for the u of any layer. Without a backward only those that are there at once are apart: q, k, v; gate, up. */
static void take_shared_u(psoup__tape *t, psoup__layer_tape *shared) {
    static const int apart[PSOUP__LINEARS] = {[PSOUP__K] = 1, [PSOUP__V] = 2, [PSOUP__UP] = 1};
    size_t most[PSOUP__LINEARS] = {0};
    float *u[PSOUP__LINEARS];
    for (int32_t l = 0; l < t->model->config.num_hidden_layers; l++)
        for (int i = 0; i < PSOUP__LINEARS; i++) {
            size_t count = u_count(t, l, i), *place = &most[t->saved ? i : apart[i]];
            *place = count > *place ? count : *place;
        }
    for (int i = 0; i < PSOUP__LINEARS; i++)
        u[i] = psoup__slab_take(&t->device, most[i], sizeof(float));
    for (int i = 0; i < PSOUP__LINEARS; i++)
        shared->u[i] = u[t->saved ? i : apart[i]];
}

static void lay_out_device(psoup__tape *t, bool cached) {
    const psoup_model *m = t->model;
    psoup__slab *s = &t->device;
    size_t rows = (size_t)t->rows, cells = rows * (size_t)t->active;
    int32_t layers = m->config.num_hidden_layers, dim = m->config.hidden_size;
    t->token = psoup__slab_take(s, rows, sizeof *t->token);
    t->position = psoup__slab_take(s, rows, sizeof *t->position);
    t->span = psoup__slab_take(s, (size_t)t->n, sizeof *t->span);
    t->place = psoup__slab_take(s, cached ? rows : 0, sizeof *t->place);
    t->pages = psoup__slab_take(s, t->n_pages, sizeof *t->pages);
    t->mix_rows = psoup__slab_take(s, cells, sizeof *t->mix_rows);
    t->mix_weight = psoup__slab_take(s, cells, sizeof *t->mix_weight);
    t->mix_factors = psoup__slab_take(s, t->factors ? rows : 0, sizeof *t->mix_factors);
    t->act = take_rows(s, rows, m->config.intermediate_size);
    t->dropped = t->dropout > 0 ? take_rows(s, rows, psoup__model_widest(m)) : NULL;
    t->rstd = take_rows(s, rows, 1);
    t->hidden = take_rows(s, rows, dim);
    bool real = s->base != NULL;
    psoup__layer_tape measured, shared = {0};
    if (!t->saved || t->inputs_only) { /* one layer's worth, used by all in turn */
        lay_out_layer(t, &shared);
        take_shared_u(t, &shared);
    }
    if (!t->saved)
        shared.x = take_rows(s, rows, dim);
    for (int32_t l = 0; l < layers; l++) {
        psoup__layer_tape *layer = real ? &t->layers[l] : &measured;
        *layer = shared;
        if (t->saved && !t->inputs_only) {
            lay_out_layer(t, layer);
            for (int i = 0; i < PSOUP__LINEARS; i++)
                layer->u[i] = psoup__slab_take(s, u_count(t, l, i), sizeof(float));
        }
        layer->x = t->saved ? take_rows(s, rows, dim) : shared.x;
    }
    float *last = t->saved ? take_rows(s, rows, dim) : shared.x;
    if (real)
        t->layers[layers] = (psoup__layer_tape){.x = last};
}

/* ---- the batch -------------------------------------------------------------------------------- */

static int32_t count_active(const psoup_model *model, const psoup__batch *batch) {
    int32_t active = 0;
    for (int32_t i = 0; batch->mix && i < model->n_adapters; i++) {
        bool used = false;
        for (int32_t s = 0; s < batch->n && !used; s++)
            used = batch->mix[(size_t)s * (size_t)model->n_adapters + (size_t)i] != 0;
        active += used;
    }
    return active;
}

static bool any_factors(const psoup__batch *batch) {
    bool any = false;
    for (int32_t s = 0; batch->mix && batch->method && s < batch->n; s++)
        any = any || batch->method[s] == PSOUP_MIX_FACTORS;
    return any;
}

/* The mix per row over the active adapters, and the rows of each. */
static void expand_mix(psoup__tape *t, const psoup__batch *batch) {
    size_t n_adapters = (size_t)t->model->n_adapters, active = (size_t)t->active;
    int32_t used = 0, slot = 0;
    t->first[0] = 0;
    for (size_t i = 0; t->active > 0 && i < n_adapters; i++) {
        int32_t before = used;
        for (int32_t s = 0; s < batch->n; s++) {
            float weight = batch->mix[(size_t)s * n_adapters + i];
            for (int32_t r = batch->start[s]; weight != 0 && r < batch->start[s + 1]; r++)
                t->used_by[used++] = r;
        }
        if (used == before)
            continue;
        if (t->ahead) /* all rows, whose weights say who is meant: the list stays the same */
            for (used = before; used < before + t->rows; used++)
                t->used_by[used] = used - before;
        for (int32_t s = 0; s < batch->n; s++)
            for (int32_t r = batch->start[s]; r < batch->start[s + 1]; r++)
                t->weight_host[(size_t)r * active + (size_t)slot] =
                    batch->mix[(size_t)s * n_adapters + i];
        t->adapter[slot++] = (int32_t)i;
        t->first[slot] = used;
    }
    for (int32_t s = 0; t->factors && s < batch->n; s++)
        for (int32_t r = batch->start[s]; r < batch->start[s + 1]; r++)
            t->factors_host[r] = batch->method[s] == PSOUP_MIX_FACTORS;
}

void psoup__tape_collect(psoup__tape *t) {
    psoup__lora *to = t->lora;
    int32_t pairs = t->model->config.num_hidden_layers * PSOUP__LINEARS;
    for (int32_t pair = 0; pair < pairs; pair++)
        for (int32_t i = 0; i < t->active; i++) {
            const psoup__adapter *adapter = t->model->adapters[t->adapter[i]];
            const size_t past = (size_t)t->gradient * adapter->count;
            *to = adapter->lora[pair];
            to->da = to->da ? to->da + past : NULL;
            to->db = to->db ? to->db + past : NULL;
            to++;
        }
}

static int32_t cached_row(const psoup__cached *cached, int32_t s, int32_t token) {
    int32_t page = cached->cache->page;
    return cached->pages[s][token / page] * page + token % page;
}

/* Where the span of a sequence that holds so many keys begins: its first row, or its place in the list of pages. */
static int32_t expand_pages(psoup__tape *t, const psoup__cached *cached, int32_t s, int32_t keys, size_t *listed) {
    if (t->model->be->ops->page == 0)
        return cached_row(cached, s, 0);
    int32_t first = (int32_t)*listed;
    int32_t n = t->ahead ? cached->n_pages[s] : psoup__cache_pages(cached->cache, keys);
    memcpy(t->pages_host + *listed, cached->pages[s], (size_t)n * sizeof *t->pages_host);
    *listed += (size_t)(t->ahead ? cached->cache->most : n);
    return first;
}

enum { AHEAD_KEYS = 256 };

/* Where each sequence's queries find their keys: in the batch itself, or in a layer of the cache. */
static void expand_sequences(psoup__tape *t, const psoup__batch *batch, const psoup__cached *cached) {
    memcpy(t->start, batch->start, ((size_t)batch->n + 1) * sizeof *t->start);
    t->spans = (psoup__spans){.n = t->n};
    size_t listed = 0;
    for (int32_t s = 0; s < batch->n; s++) {
        int32_t start = batch->start[s], queries = batch->start[s + 1] - start;
        int32_t past = cached ? cached->past[s] : 0, first = start;
        if (cached)
            first = expand_pages(t, cached, s, past + queries, &listed);
        t->span_host[s] = (psoup__span){start, queries, past + queries, first};
        t->spans.most_queries = queries > t->spans.most_queries ? queries : t->spans.most_queries;
        t->spans.most_keys = past + queries > t->spans.most_keys ? past + queries : t->spans.most_keys;
        for (int32_t r = start; r < start + queries; r++) {
            t->position_host[r] = past + r - start;
            if (cached)
                t->place_host[r] = cached_row(cached, s, t->position_host[r]);
            if (t->dropout > 0) {
                t->drop_seed[r] = batch->dropout_seed[s];
                t->drop_stream[r] = batch->dropout_stream[s];
            }
        }
    }
    if (t->ahead) /* in steps, so that it seldom changes */
        t->spans.most_keys = (t->spans.most_keys + t->ahead + AHEAD_KEYS - 1) / AHEAD_KEYS * AHEAD_KEYS;
}

psoup_status psoup__tape_prepare(psoup__tape *t, const psoup__batch *batch, bool save,
                                 const psoup__cached *cached, psoup_error *error) {
    psoup_model *model = t->model;
    const psoup__ops *ops = model->be->ops;
    psoup_status status;
    int32_t positions = 0;
    t->rows = t->pulls = 0; /* until all is well there is no batch to ask about */
    PSOUP__TRY(check_batch(model, batch, cached, &positions, error));
    positions = positions < model->config.max_position_embeddings - batch->ahead
                    ? positions + batch->ahead
                    : model->config.max_position_embeddings;
    PSOUP__TRY(psoup__model_positions(model, positions, error));
    t->rows = batch->rows;
    t->n = batch->n;
    t->saved = save;
    t->inputs_only = save && t->recompute;
    t->ahead = batch->ahead;
    t->dropout = batch->dropout;
    t->active = count_active(model, batch);
    t->factors = t->active > 0 && any_factors(batch);
    t->n_adapters = model->n_adapters;
    t->edition = model->edition;
    t->n_pages = 0;
    for (int32_t s = 0; cached && ops->page && s < batch->n; s++)
        t->n_pages += (size_t)(t->ahead ? cached->cache->most
                                        : psoup__cache_pages(cached->cache, cached->past[s] +
                                                                                batch->start[s + 1] -
                                                                                batch->start[s]));

    psoup__slab_measure(&t->host);
    lay_out_host(t, cached != NULL);
    PSOUP__TRY(psoup__slab_grow(t, &t->host, false, error));
    lay_out_host(t, cached != NULL);
    expand_mix(t, batch);
    expand_sequences(t, batch, cached);
    psoup__tape_collect(t);

    PSOUP__TRY(ops->reserve(model->be, t->rows, psoup__model_widest(model), error));
    psoup__slab_measure(&t->device);
    lay_out_device(t, cached != NULL);
    PSOUP__TRY(psoup__slab_grow(t, &t->device, true, error));
    lay_out_device(t, cached != NULL);
    size_t rows = (size_t)t->rows, cells = rows * (size_t)t->active;
    ops->write(model->be, t->token, batch->tokens, rows * sizeof *t->token);
    ops->write(model->be, t->position, t->position_host, rows * sizeof *t->position);
    ops->write(model->be, t->span, t->span_host, (size_t)t->n * sizeof *t->span);
    t->spans.span = t->span;
    if (cached)
        ops->write(model->be, t->place, t->place_host, rows * sizeof *t->place);
    ops->write(model->be, t->pages, t->pages_host, t->n_pages * sizeof *t->pages);
    ops->write(model->be, t->mix_weight, t->weight_host, cells * sizeof *t->mix_weight);
    ops->write(model->be, t->mix_rows, t->used_by,
               (size_t)t->first[t->active] * sizeof *t->mix_rows);
    if (t->factors)
        ops->write(model->be, t->mix_factors, t->factors_host, rows * sizeof *t->mix_factors);
    t->mix = (psoup__mix){.n = t->active, .weight = t->mix_weight, .rows = t->mix_rows, .first = t->first,
                          .factors = t->factors ? t->mix_factors : NULL};
    return PSOUP_OK;
fail:
    t->rows = 0;
    return status;
}

const psoup__lora *psoup__tape_lora(const psoup__tape *t, int32_t layer, int linear) {
    const psoup__lora *lora =
        t->lora + ((size_t)layer * PSOUP__LINEARS + (size_t)linear) * (size_t)t->active;
    for (int32_t i = 0; i < t->active; i++)
        if (lora[i].rank > 0)
            return lora;
    return NULL;
}

/* The pattern's place: layer and linear above bit 32, the token's position below. */
psoup__dropout psoup__tape_dropout(psoup__tape *t, int32_t layer, int linear) {
    uint64_t pair = (uint64_t)layer * PSOUP__LINEARS + (uint64_t)linear;
    for (int32_t r = 0; r < t->rows; r++)
        t->drop_offset[r] = pair << 32 | (uint64_t)t->position_host[r];
    return (psoup__dropout){.p = t->dropout,
                            .seed = t->drop_seed,
                            .stream = t->drop_stream,
                            .offset = t->drop_offset};
}

const float *psoup__tape_drop(psoup__tape *t, const float *x, int32_t layer, int linear) {
    if (!(t->dropout > 0))
        return x;
    psoup__dropout dropout = psoup__tape_dropout(t, layer, linear);
    psoup__backend *be = t->model->be;
    be->ops->dropout(be, t->dropped, x, &dropout, t->rows,
                     t->model->layers[layer].linear[linear].in);
    return t->dropped;
}

static void lay_out_chunk(psoup__tape *t) {
    psoup__slab *s = &t->chunk_slab;
    size_t rows = (size_t)t->chunk_rows;
    t->chunk.row = psoup__slab_take(s, rows, sizeof(int32_t));
    t->chunk.target = psoup__slab_take(s, rows, sizeof(int32_t));
    t->chunk.hidden = take_rows(s, rows, t->model->config.hidden_size);
    t->chunk.logits = take_rows(s, rows, t->model->config.vocab_size);
    t->chunk.logprob = take_rows(s, rows, 1);
    t->chunk.lse = take_rows(s, rows, 1);
}

void psoup__tape_measure(psoup__tape *t, bool cached, int32_t *adapter, int32_t *first, psoup__lora *lora) {
    psoup__slab_measure(&t->host);
    lay_out_host(t, cached);
    t->adapter = adapter; /* what says how wide u is */
    t->first = first;
    t->lora = lora;
    psoup__tape_collect(t);
    psoup__slab_measure(&t->device);
    lay_out_device(t, cached);
    psoup__slab_measure(&t->chunk_slab);
    lay_out_chunk(t);
}

psoup_status psoup__tape_chunk(psoup__tape *t, psoup_error *error) {
    if (t->chunk_slab.base)
        return PSOUP_OK;
    const psoup_model *model = t->model;
    int32_t dim = model->config.hidden_size, vocab = model->config.vocab_size;
    psoup_status status = model->be->ops->reserve(model->be, t->chunk_rows, vocab > dim ? vocab : dim, error);
    if (status != PSOUP_OK)
        return status;
    psoup__slab_measure(&t->chunk_slab);
    lay_out_chunk(t);
    status = psoup__slab_grow(t, &t->chunk_slab, true, error);
    if (status == PSOUP_OK)
        lay_out_chunk(t);
    return status;
}
