/* The backward pass: forward.c's calls in reverse order. */
#include "model/tape.h"

#include <math.h>
#include <string.h>

/* Gradients of one layer's activations; device scratch, used by all layers in turn. */
typedef struct scratch {
    float *dstream;           /* [rows, dim] of the residual stream, which only grows */
    float *dnorm;             /* [rows, dim] */
    float *dact, *dgate, *dup; /* [rows, ffn] */
    float *dattended, *dq;    /* [rows, q_width] */
    float *dk, *dv;           /* [rows, kv_width] */
    float *ddropped;          /* [rows, widest]: of an adapter's input after dropout */
    float *du;
    float *dhidden;           /* [rows, dim] */
    float *dchunk;            /* [chunk_rows, dim] */
    float *dweight;           /* [rows, active], where dmix is asked for */
} scratch;

static float *take(psoup__slab *slab, int32_t rows, int32_t width) {
    size_t count = 0;
    if (!psoup__multiply((size_t)rows, (size_t)width, &count))
        slab->overflow = true;
    return psoup__slab_take(slab, count, sizeof(float));
}

static size_t largest_u(const psoup__tape *t) {
    size_t largest = 0;
    for (int32_t l = 0; l < t->model->config.num_hidden_layers; l++)
        for (int i = 0; i < PSOUP__LINEARS; i++) {
            const psoup__lora *lora = psoup__tape_lora(t, l, i);
            size_t count = 0;
            for (int32_t a = 0; lora && a < t->active; a++)
                count += (size_t)(t->first[a + 1] - t->first[a]) * (size_t)lora[a].rank;
            largest = count > largest ? count : largest;
        }
    return largest;
}

static void lay_out(psoup__tape *t, scratch *s, bool dmix) {
    const psoup_model *m = t->model;
    psoup__slab *slab = &t->backward;
    int32_t rows = t->rows, dim = m->config.hidden_size, ffn = m->config.intermediate_size;
    s->dstream = take(slab, rows, dim);
    s->dnorm = take(slab, rows, dim);
    s->dact = take(slab, rows, ffn);
    s->dgate = take(slab, rows, ffn);
    s->dup = take(slab, rows, ffn);
    s->dattended = take(slab, rows, m->q_width);
    s->dq = take(slab, rows, m->q_width);
    s->dk = take(slab, rows, m->kv_width);
    s->dv = take(slab, rows, m->kv_width);
    s->ddropped = t->dropout > 0 ? take(slab, rows, psoup__model_widest(m)) : NULL;
    s->du = psoup__slab_take(slab, largest_u(t), sizeof(float));
    s->dhidden = take(slab, rows, dim);
    s->dchunk = take(slab, t->chunk_rows, dim);
    s->dweight = dmix ? take(slab, rows, t->active) : NULL;
}

void psoup__backward_measure(psoup__tape *t) {
    scratch s;
    psoup__slab_measure(&t->backward);
    lay_out(t, &s, false);
}

static void zero(psoup__tape *t, float *x, int32_t rows, int32_t width) {
    psoup__backend *be = t->model->be;
    be->ops->zero(be, x, (size_t)rows * (size_t)width * sizeof *x);
}

/* dx (NULL: not asked for) and the gradients of weights, adapters and mix from dy. */
static void linear(psoup__tape *t, scratch *s, float *dx, const float *dy, const float *x,
                   int32_t layer, int which) {
    psoup__backend *be = t->model->be;
    const psoup__layer *l = &t->model->layers[layer];
    const psoup__weight *w = &l->linear[which];
    const psoup__lora *lora = psoup__tape_lora(t, layer, which);
    if (!lora) {
        be->ops->linear_mix_backward(be, dx, dx, l->dlinear[which], l->dbias[which], NULL, dy, x, x,
                                     NULL, w, NULL, &psoup__no_mix, t->rows);
        return;
    }
    bool drop = t->dropout > 0;
    float *dx_lora = drop && dx ? s->ddropped : dx;
    const float *x_lora = psoup__tape_drop(t, x, layer, which);
    if (drop && dx)
        zero(t, dx_lora, t->rows, w->in);
    be->ops->linear_mix_backward(be, dx, dx_lora, l->dlinear[which], l->dbias[which], s->du, dy, x,
                                 x_lora, t->layers[layer].u[which], w, lora, &t->mix, t->rows);
    if (drop && dx) {
        psoup__dropout dropout = psoup__tape_dropout(t, layer, which);
        be->ops->dropout_backward(be, dx, dx_lora, &dropout, t->rows, w->in);
    }
}

/* ---- the loss --------------------------------------------------------------------------------- */

/* Whether psoup__logprobs was asked for the very rows and targets that the loss is about. */
static bool was_pulled(const psoup__tape *t, const psoup__loss_gradient *loss) {
    size_t n = (size_t)loss->n;
    return n > 0 && t->pulls == loss->n && memcmp(t->pulled, loss->row, n * sizeof *loss->row) == 0 &&
           memcmp(t->pulled + n, loss->target, n * sizeof *loss->target) == 0;
}

static void logprobs(psoup__tape *t, scratch *s, const psoup__loss_gradient *loss) {
    psoup_model *m = t->model;
    psoup__backend *be = m->be;
    const psoup__ops *ops = be->ops;
    psoup__chunk *c = &t->chunk;
    int32_t dim = m->config.hidden_size, vocab = m->config.vocab_size;
    bool pulled = was_pulled(t, loss);
    for (int32_t first = 0; first < loss->n; first += t->chunk_rows) {
        int32_t rows = loss->n - first < t->chunk_rows ? loss->n - first : t->chunk_rows;
        const float *dlogprob = loss->dlogprob + first;
        if (pulled) {
            ops->write(be, c->row, loss->row + first, (size_t)rows * sizeof(int32_t));
            ops->scatter_add_rows(be, s->dhidden, t->pull + (size_t)first * (size_t)dim,
                                  dlogprob, c->row, rows, dim);
            continue;
        }
        psoup__chunk_logits(t, loss->row + first, rows);
        ops->write(be, c->target, loss->target + first, (size_t)rows * sizeof(int32_t));
        ops->logprob(be, c->logprob, c->lse, c->logits, c->target, rows, vocab);
        ops->logprob_backward(be, c->logits, c->logits, c->lse, c->target, dlogprob, rows, vocab);
        zero(t, s->dchunk, rows, dim);
        ops->linear_mix_backward(be, s->dchunk, s->dchunk, m->dlm_head, NULL, NULL, c->logits,
                                 c->hidden, c->hidden, NULL, &m->lm_head, NULL, &psoup__no_mix,
                                 rows);
        ops->scatter_add_rows(be, s->dhidden, s->dchunk, NULL, c->row, rows, dim);
    }
}

static psoup_status head(psoup__tape *t, scratch *s, const psoup__head_rows *h, const float *dvalue,
                         psoup_error *error) {
    psoup__backend *be = t->model->be;
    const psoup__ops *ops = be->ops;
    const psoup__adapter *adapter = h->adapter;
    int32_t dim = t->model->config.hidden_size;
    psoup__head_space space;
    psoup_status status = psoup__head_prepare(t, h, &space, error);
    if (status != PSOUP_OK)
        return status;
    const size_t past = (size_t)t->gradient * adapter->count;
    float *dw = adapter->dhead ? adapter->dhead + past : space.dweight;
    float *dbias = adapter->dhead_bias ? adapter->dhead_bias + past : space.dweight + dim;
    const float *hidden = psoup__head_hidden(t, h, &space);
    if (hidden == t->hidden) {
        ops->head_backward(be, s->dhidden, dw, dbias, dvalue, hidden, space.row, space.at, space.weight,
                           adapter->head, h->n, dim);
        return PSOUP_OK;
    }
    float *ddropped = s->dnorm, *dgathered = s->dstream; /* both free until the layers start */
    zero(t, ddropped, h->n, dim);
    zero(t, dgathered, h->n, dim);
    ops->head_backward(be, ddropped, dw, dbias, dvalue, hidden, space.identity, space.at, space.weight,
                       adapter->head, h->n, dim);
    ops->dropout_backward(be, dgathered, ddropped, h->dropout, h->n, dim);
    ops->scatter_add_rows(be, s->dhidden, dgathered, NULL, space.row, h->n, dim);
    return PSOUP_OK;
}

/* ---- one layer -------------------------------------------------------------------------------- */

static void attention(psoup__tape *t, scratch *s, int32_t layer) {
    psoup_model *m = t->model;
    psoup__backend *be = m->be;
    const psoup__ops *ops = be->ops;
    const psoup_model_config *c = &m->config;
    psoup__layer_tape *a = &t->layers[layer];
    psoup__attention_shape shape = psoup__model_attention(m);
    psoup__keys keys = {PSOUP_F32, m->kv_width, a->k, a->v, s->dk, s->dv, NULL};
    zero(t, s->dk, t->rows, m->kv_width);
    zero(t, s->dv, t->rows, m->kv_width);
    ops->attention_backward(be, s->dq, s->dattended, a->q, a->attended, a->lse, &keys, &t->spans,
                            &shape);
    ops->rope(be, s->dk, m->cos_sin, t->position, t->rows, shape.kv_heads, c->head_dim,
              m->kv_width, true);
    ops->rope(be, s->dq, m->cos_sin, t->position, t->rows, shape.heads, c->head_dim, m->q_width,
              true);
}

/* s->dstream comes in as the gradient of the layer's output and leaves as that of its input, unless
 * nothing `below` asks for it. */
static void backward_layer(psoup__tape *t, scratch *s, int32_t l, bool below) {
    psoup_model *m = t->model;
    psoup__backend *be = m->be;
    const psoup__ops *ops = be->ops;
    const psoup__layer *w = &m->layers[l];
    psoup__layer_tape *a = &t->layers[l];
    int32_t rows = t->rows, dim = m->config.hidden_size, ffn = m->config.intermediate_size;
    size_t wide = (size_t)rows * (size_t)ffn;

    if (w->dlinear[PSOUP__DOWN] || psoup__tape_lora(t, l, PSOUP__DOWN)) /* else nobody reads it */
        ops->swiglu(be, t->act, a->gate, a->up, wide); /* computed again rather than kept */
    zero(t, s->dact, rows, ffn);
    linear(t, s, s->dact, s->dstream, t->act, l, PSOUP__DOWN);
    ops->swiglu_backward(be, s->dgate, s->dup, s->dact, a->gate, a->up, wide);
    zero(t, s->dnorm, rows, dim);
    linear(t, s, s->dnorm, s->dup, a->norm2, l, PSOUP__UP);
    linear(t, s, s->dnorm, s->dgate, a->norm2, l, PSOUP__GATE);
    ops->rmsnorm_backward(be, s->dstream, w->dpost_norm, s->dnorm, a->middle, w->post_norm,
                          a->rstd2, rows, dim);

    zero(t, s->dattended, rows, m->q_width);
    linear(t, s, s->dattended, s->dstream, a->attended, l, PSOUP__O);
    attention(t, s, l);
    float *dnorm = below ? s->dnorm : NULL;
    if (below)
        zero(t, s->dnorm, rows, dim);
    linear(t, s, dnorm, s->dv, a->norm1, l, PSOUP__V);
    linear(t, s, dnorm, s->dk, a->norm1, l, PSOUP__K);
    linear(t, s, dnorm, s->dq, a->norm1, l, PSOUP__Q);
    if (below)
        ops->rmsnorm_backward(be, s->dstream, w->dinput_norm, s->dnorm, a->x, w->input_norm,
                              a->rstd1, rows, dim);
}

/* The lowest layer that has anything to learn: nothing below it is computed. −1: the embedding. */
static int32_t lowest_trained(const psoup__tape *t, bool dmix) {
    const psoup_model *m = t->model;
    if (m->dembed)
        return -1;
    int32_t layers = m->config.num_hidden_layers;
    for (int32_t l = 0; l < layers; l++)
        for (int i = 0; i < PSOUP__LINEARS; i++) {
            const psoup__lora *lora = psoup__tape_lora(t, l, i);
            for (int32_t a = 0; lora && a < t->active; a++)
                if (lora[a].rank > 0 && (dmix || lora[a].da))
                    return l;
        }
    return layers;
}

/* ---- all together ----------------------------------------------------------------------------- */

static psoup_status sum_dmix(psoup__tape *t, const scratch *s, float *dmix, psoup_error *error) {
    size_t active = (size_t)t->active, adapters = (size_t)t->n_adapters;
    for (size_t i = 0; i < (size_t)t->n * adapters; i++)
        dmix[i] = 0;
    if (t->active == 0)
        return PSOUP_OK;
    float *rows = t->weight_host; /* the weights are on the device by now */
    psoup_status status = t->model->be->ops->read(
        t->model->be, rows, s->dweight, (size_t)t->rows * active * sizeof *rows, error);
    for (int32_t i = 0; status == PSOUP_OK && i < t->n; i++)
        for (size_t a = 0; a < active; a++) {
            double sum = 0;
            for (int32_t r = t->start[i]; r < t->start[i + 1]; r++)
                sum += rows[(size_t)r * active + a];
            dmix[(size_t)i * adapters + (size_t)t->adapter[a]] = (float)sum;
        }
    return status;
}

static psoup_status check_loss(const psoup__tape *t, const psoup__loss_gradient *loss,
                               psoup_error *error) {
    if (!t->saved || t->rows == 0)
        return psoup__fail(error, PSOUP_ERROR_STATE,
                           "a backward needs a forward that saved its activations, once each");
    if (t->edition != t->model->edition)
        return psoup__fail(error, PSOUP_ERROR_STATE,
                           "adapters were added or removed between forward and backward");
    return psoup__check_rows(t, loss->row, loss->target, loss->n, error);
}

/* The frozen matrices are packed for dy·W too, the first time. A trainer takes thousands of steps
 * over the same weights, many of few rows; packing at each of them would cost up to a tenth of the
 * product. Inference never comes here, so it never pays for the copy. */
psoup_status psoup__backward_ready(psoup_model *model, psoup_error *error) {
    if (model->data || model->backward_packed)
        return PSOUP_OK;
    return psoup__model_pack(model, true, error);
}

psoup_status psoup__backward(psoup_model *model, psoup__tape *t, const psoup__loss_gradient *loss,
                             psoup_error *error) {
    psoup__backend *be = model->be;
    const psoup__ops *ops = be->ops;
    int32_t dim = model->config.hidden_size, layers = model->config.num_hidden_layers;
    scratch s;
    psoup_status status;
    PSOUP__TRY(check_loss(t, loss, error));
    PSOUP__TRY(psoup__backward_ready(model, error));
    PSOUP__TRY(psoup__tape_chunk(t, error));
    psoup__slab_measure(&t->backward);
    lay_out(t, &s, loss->dmix != NULL);
    PSOUP__TRY(psoup__slab_grow(t, &t->backward, true, error));
    lay_out(t, &s, loss->dmix != NULL);
    for (int32_t i = 0; i < loss->n_heads; i++) { /* what can fail does so before any gradient */
        psoup__head_space space;
        if (loss->heads[i].n > 0)
            PSOUP__TRY(psoup__head_prepare(t, &loss->heads[i], &space, error));
    }
    psoup__tape_collect(t);
    t->saved = false; /* one backward */
    if (s.dweight)
        zero(t, s.dweight, t->rows, t->active);
    t->mix.dweight = s.dweight;

    zero(t, s.dhidden, t->rows, dim);
    logprobs(t, &s, loss);
    for (int32_t i = 0; i < loss->n_heads; i++)
        if (loss->heads[i].n > 0)
            PSOUP__TRY(head(t, &s, &loss->heads[i], loss->dvalue, error));
    int32_t lowest = lowest_trained(t, loss->dmix != NULL);
    if (lowest < layers) {
        zero(t, s.dstream, t->rows, dim);
        ops->rmsnorm_backward(be, s.dstream, model->dnorm, s.dhidden, t->layers[layers].x,
                              model->norm, t->rstd, t->rows, dim);
    }
    for (int32_t l = layers - 1; l >= 0 && l >= lowest; l--) {
        if (t->inputs_only && l < layers - 1) /* the last one's activations are those still there */
            psoup__forward_layer(t, NULL, l, NULL);
        backward_layer(t, &s, l, l > lowest);
    }
    if (lowest < 0)
        ops->embed_backward(be, model->dembed, s.dstream, t->token, model->config.vocab_size, dim,
                            t->rows);
    if (loss->dmix)
        PSOUP__TRY(sum_dmix(t, &s, loss->dmix, error));
fail:
    return status;
}
