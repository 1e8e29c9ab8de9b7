/* The forward pass. backward.c mirrors it call by call. */
#include "model/tape.h"

#include <math.h>
#include <string.h>

static void linear(psoup__tape *t, float *y, float *u, const float *x, int32_t layer, int which) {
    psoup__backend *be = t->model->be;
    const psoup__layer *l = &t->model->layers[layer];
    const psoup__lora *lora = psoup__tape_lora(t, layer, which);
    const float *x_lora = lora ? psoup__tape_drop(t, x, layer, which) : x;
    be->ops->linear_mix(be, y, lora ? u : NULL, x, x_lora, &l->linear[which], l->bias[which], lora,
                        lora ? &t->mix : &psoup__no_mix, t->rows);
}

/* Neighbours first … first + n − 1, which read one x. */
static void linears(psoup__tape *t, float *const *y, const float *x, int32_t layer, int first, int n) {
    psoup__backend *be = t->model->be;
    const psoup__layer *l = &t->model->layers[layer];
    psoup__linear each[PSOUP__LINEARS];
    if (t->dropout > 0) {
        for (int i = 0; i < n; i++)
            linear(t, y[i], t->layers[layer].u[first + i], x, layer, first + i);
        return;
    }
    for (int i = 0; i < n; i++)
        each[i] = (psoup__linear){y[i], t->layers[layer].u[first + i], &l->linear[first + i], l->bias[first + i],
                                  psoup__tape_lora(t, layer, first + i)};
    be->ops->linear_mix_each(be, each, n, x, &t->mix, t->rows);
}

psoup__attention_shape psoup__model_attention(const psoup_model *model) {
    const psoup_model_config *c = &model->config;
    return (psoup__attention_shape){.heads = c->num_attention_heads,
                                    .kv_heads = c->num_key_value_heads,
                                    .head_dim = c->head_dim,
                                    .scale = (float)(1 / sqrt((double)c->head_dim)),
                                    .dtype = model->embed.dtype};
}

psoup__keys psoup__cached_keys(const psoup__tape *t, const psoup__cached *cached, int32_t layer) {
    const psoup__cache *cache = cached->cache;
    psoup__keys keys = {.dtype = cache->dtype, .stride = t->model->kv_width};
    size_t rows = (size_t)layer * (size_t)cache->pages * (size_t)cache->page;
    size_t bytes = rows * (size_t)keys.stride * psoup_dtype_size(cache->dtype);
    keys.k = cache->k + bytes;
    keys.v = cache->v + bytes;
    keys.pages = t->model->be->ops->page ? t->pages : NULL;
    return keys;
}

/* Turns queries and keys. The keys that a layer's queries attend to: those or, with a cache, the layer's part of it,
 * where the new ones are put first. */
static psoup__keys keys_of(psoup__tape *t, const psoup__layer_tape *a, const psoup__cached *cached, int32_t layer,
                           const psoup__attention_shape *shape) {
    const psoup_model *m = t->model;
    psoup__backend *be = m->be;
    const psoup__ops *ops = be->ops;
    if (cached) {
        psoup__keys keys = psoup__cached_keys(t, cached, layer);
        ops->rope_append(be, a->q, a->k, a->v, m->cos_sin, t->position, &keys, t->place, t->rows, shape);
        return keys;
    }
    ops->rope(be, a->q, m->cos_sin, t->position, t->rows, shape->heads, shape->head_dim, m->q_width, false);
    ops->rope(be, a->k, m->cos_sin, t->position, t->rows, shape->kv_heads, shape->head_dim, m->kv_width, false);
    return (psoup__keys){.dtype = PSOUP_F32, .stride = m->kv_width, .k = a->k, .v = a->v};
}

void psoup__forward_layer(psoup__tape *t, const psoup__cached *cached, int32_t l, const float *residual) {
    psoup_model *model = t->model;
    psoup__backend *be = model->be;
    const psoup__ops *ops = be->ops;
    const psoup_model_config *c = &model->config;
    const psoup__layer *w = &model->layers[l];
    psoup__layer_tape *a = &t->layers[l];
    int32_t rows = t->rows, dim = c->hidden_size, ffn = c->intermediate_size;
    psoup__attention_shape shape = psoup__model_attention(model);

    ops->rmsnorm(be, a->norm1, a->rstd1, a->x, residual, w->input_norm, c->rms_norm_eps, rows, dim);
    linears(t, (float *const[]){a->q, a->k, a->v}, a->norm1, l, PSOUP__Q, 3);
    psoup__keys keys = keys_of(t, a, cached, l, &shape);
    ops->attention(be, a->attended, a->lse, a->q, &keys, &t->spans, &shape);
    linear(t, a->middle, a->u[PSOUP__O], a->attended, l, PSOUP__O);
    ops->rmsnorm(be, a->norm2, a->rstd2, a->middle, a->x, w->post_norm, c->rms_norm_eps, rows, dim);
    linears(t, (float *const[]){a->gate, a->up}, a->norm2, l, PSOUP__GATE, 2);
    ops->swiglu(be, t->act, a->gate, a->up, (size_t)rows * (size_t)ffn);
    linear(t, t->layers[l + 1].x, a->u[PSOUP__DOWN], t->act, l, PSOUP__DOWN);
}

void psoup__forward_run(psoup__tape *t, const psoup__cached *cached) {
    psoup_model *model = t->model;
    const psoup__ops *ops = model->be->ops;
    const psoup_model_config *c = &model->config;
    ops->embed(model->be, t->layers[0].x, &model->embed, t->token, t->rows);
    const float *residual = NULL;
    for (int32_t l = 0; l < c->num_hidden_layers; l++) {
        psoup__forward_layer(t, cached, l, residual);
        residual = t->layers[l].middle;
    }
    ops->rmsnorm(model->be, t->hidden, t->rstd, t->layers[c->num_hidden_layers].x, residual, model->norm,
                 c->rms_norm_eps, t->rows, c->hidden_size);
}

psoup_status psoup__forward_cached(psoup_model *model, psoup__tape *t, const psoup__batch *batch,
                                   bool save, const psoup__cached *cached, psoup_error *error) {
    psoup_status status = psoup__tape_prepare(t, batch, save, cached, error);
    if (status == PSOUP_OK)
        psoup__forward_run(t, cached);
    return status;
}

psoup_status psoup__forward(psoup_model *model, psoup__tape *tape, const psoup__batch *batch,
                            bool save, psoup_error *error) {
    return psoup__forward_cached(model, tape, batch, save, NULL, error);
}

/* ---- the lm head, chunk by chunk ---------------------------------------------------------------- */

void psoup__chunk_logits(psoup__tape *t, const int32_t *row, int32_t rows) {
    psoup_model *model = t->model;
    const psoup__ops *ops = model->be->ops;
    ops->write(model->be, t->chunk.row, row, (size_t)rows * sizeof *row);
    ops->gather_rows(model->be, t->chunk.hidden, t->hidden, t->chunk.row, rows,
                     model->config.hidden_size);
    ops->linear_mix(model->be, t->chunk.logits, NULL, t->chunk.hidden, t->chunk.hidden,
                    &model->lm_head, NULL, NULL, &psoup__no_mix, rows);
}

/* Room for the pulls of these rows. */
static psoup_status prepare_pulls(psoup__tape *t, const int32_t *row, const int32_t *target,
                                  int32_t n, psoup_error *error) {
    size_t dim = (size_t)t->model->config.hidden_size, count = (size_t)n;
    t->pulls = 0;
    psoup_status status = psoup__reserve(t->model->context, &t->pulled, &t->pulled_capacity,
                                         2 * count, sizeof *t->pulled, error);
    psoup__slab_measure(&t->pull_slab);
    psoup__slab_take(&t->pull_slab, count, dim * sizeof(float));
    if (status == PSOUP_OK)
        status = psoup__slab_grow(t, &t->pull_slab, true, error);
    if (status != PSOUP_OK || n == 0)
        return status;
    t->pull = psoup__slab_take(&t->pull_slab, count, dim * sizeof(float));
    memcpy(t->pulled, row, count * sizeof *row);
    memcpy(t->pulled + count, target, count * sizeof *target);
    return PSOUP_OK;
}

/* The pulls of the chunk, which is `rows` from the batch's `first` on; they take the logits' place. */
static void pull_chunk(psoup__tape *t, int32_t first, int32_t rows) {
    psoup_model *model = t->model;
    const psoup__ops *ops = model->be->ops;
    psoup__chunk *c = &t->chunk;
    size_t dim = (size_t)model->config.hidden_size;
    float *pull = t->pull + (size_t)first * dim;
    ops->logprob_backward(model->be, c->logits, c->logits, c->lse, c->target, NULL, rows,
                          model->config.vocab_size);
    ops->zero(model->be, pull, (size_t)rows * dim * sizeof *pull);
    ops->linear_mix_backward(model->be, pull, pull, NULL, NULL, NULL, c->logits, c->hidden,
                             c->hidden, NULL, &model->lm_head, NULL, &psoup__no_mix, rows);
}

psoup_status psoup__logprobs(psoup_model *model, psoup__tape *t, const int32_t *row,
                             const int32_t *target, int32_t n, float *out, psoup_error *error) {
    const psoup__ops *ops = model->be->ops;
    const bool pull = t->saved && !model->dlm_head; /* a head that learns needs the logits again */
    psoup_status status = psoup__check_rows(t, row, target, n, error);
    if (status == PSOUP_OK)
        status = psoup__tape_chunk(t, error);
    if (status == PSOUP_OK && pull)
        status = prepare_pulls(t, row, target, n, error);
    if (status != PSOUP_OK)
        return status;
    for (int32_t first = 0; first < n; first += t->chunk_rows) {
        int32_t rows = n - first < t->chunk_rows ? n - first : t->chunk_rows;
        psoup__chunk_logits(t, row + first, rows);
        ops->write(model->be, t->chunk.target, target + first, (size_t)rows * sizeof *target);
        ops->logprob(model->be, out + first, t->chunk.lse, t->chunk.logits, t->chunk.target, rows,
                     model->config.vocab_size);
        if (pull)
            pull_chunk(t, first, rows);
    }
    if (pull)
        t->pulls = n;
    return PSOUP_OK;
}

psoup_status psoup__logits(psoup_model *model, psoup__tape *t, const int32_t *row, int32_t n,
                           float *out, psoup_error *error) {
    const psoup__ops *ops = model->be->ops;
    size_t vocab = (size_t)model->config.vocab_size;
    psoup_status status = psoup__check_rows(t, row, NULL, n, error);
    if (status == PSOUP_OK)
        status = psoup__tape_chunk(t, error);
    for (int32_t first = 0; status == PSOUP_OK && first < n; first += t->chunk_rows) {
        int32_t rows = n - first < t->chunk_rows ? n - first : t->chunk_rows;
        psoup__chunk_logits(t, row + first, rows);
        status = ops->read(model->be, out + (size_t)first * vocab, t->chunk.logits,
                           (size_t)rows * vocab * sizeof *out, error);
    }
    return status;
}

/* ---- scalar heads ----------------------------------------------------------------------------- */

static void lay_out_heads(psoup__slab *s, psoup__head_space *space, size_t n, size_t dim,
                          size_t dropped) {
    space->row = psoup__slab_take(s, n, sizeof(int32_t));
    space->identity = psoup__slab_take(s, n, sizeof(int32_t));
    space->at = psoup__slab_take(s, n, sizeof(int32_t));
    space->weight = psoup__slab_take(s, n, sizeof(float));
    space->dweight = psoup__slab_take(s, dim + 1, sizeof(float));
    space->gathered = psoup__slab_take(s, dropped, sizeof(float));
    space->dropped = psoup__slab_take(s, dropped, sizeof(float));
}

void psoup__heads_measure(psoup__tape *t, size_t n, bool dropout) {
    psoup__head_space space;
    size_t dim = (size_t)t->model->config.hidden_size;
    psoup__slab_measure(&t->heads);
    lay_out_heads(&t->heads, &space, n, dim, dropout ? n * dim : 0);
}

psoup_status psoup__head_prepare(psoup__tape *t, const psoup__head_rows *h,
                                 psoup__head_space *space, psoup_error *error) {
    psoup_model *model = t->model;
    const psoup__ops *ops = model->be->ops;
    if (!h->adapter->head)
        return psoup__fail(error, PSOUP_ERROR_STATE, "adapter \"%s\" has no scalar head",
                           h->adapter->name);
    psoup_status status = psoup__check_rows(t, h->row, NULL, h->n, error);
    if (status != PSOUP_OK)
        return status;
    psoup__slab *s = &t->heads;
    size_t n = (size_t)h->n, dim = (size_t)model->config.hidden_size;
    size_t dropped = h->dropout && h->dropout->p > 0 ? n * dim : 0;
    psoup__slab_measure(s);
    lay_out_heads(s, space, n, dim, dropped);
    status = psoup__slab_grow(t, s, true, error);
    if (status != PSOUP_OK)
        return status;
    lay_out_heads(s, space, n, dim, dropped);
    ops->write(model->be, space->row, h->row, n * sizeof *h->row);
    ops->write(model->be, space->at, h->at, n * sizeof *h->at);
    ops->write(model->be, space->weight, h->weight, n * sizeof *h->weight);
    for (int32_t first = 0; dropped && first < h->n; first += 256) {
        int32_t numbers[256], count = h->n - first < 256 ? h->n - first : 256;
        for (int32_t i = 0; i < count; i++)
            numbers[i] = first + i;
        ops->write(model->be, space->identity + first, numbers, (size_t)count * sizeof *numbers);
    }
    return PSOUP_OK;
}

const float *psoup__head_hidden(psoup__tape *t, const psoup__head_rows *h,
                                const psoup__head_space *space) {
    psoup__backend *be = t->model->be;
    int32_t dim = t->model->config.hidden_size;
    if (!h->dropout || !(h->dropout->p > 0))
        return t->hidden;
    be->ops->gather_rows(be, space->gathered, t->hidden, space->row, h->n, dim);
    be->ops->dropout(be, space->dropped, space->gathered, h->dropout, h->n, dim);
    return space->dropped;
}

psoup_status psoup__heads(psoup_model *model, psoup__tape *t, const psoup__head_rows *heads,
                          int32_t n_heads, float *value, psoup_error *error) {
    psoup__backend *be = model->be;
    psoup_status status = PSOUP_OK;
    for (int32_t i = 0; i < n_heads; i++) {
        const psoup__head_rows *h = &heads[i];
        const psoup__adapter *adapter = h->adapter;
        if (h->n == 0)
            continue;
        psoup__head_space space;
        PSOUP__TRY(psoup__head_prepare(t, h, &space, error));
        const float *hidden = psoup__head_hidden(t, h, &space);
        be->ops->head(be, value, hidden, hidden == t->hidden ? space.row : space.identity, space.at,
                      space.weight, adapter->head, adapter->head_bias, h->n, model->config.hidden_size);
    }
fail:
    return status;
}
