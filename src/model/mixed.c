/* Logits that are mixed, where parameters are not (PSOUP_MIX_LOGITS): each policy of a mix reads the text by itself,
 * and the next token is drawn from softmax(Σ w_i logits_i), which is ∝ Π π_i^(w_i): multi-objective decoding (Shi et
 * al. 2024, arXiv 2406.18853). */
#include "model/tape.h"

#include <string.h>

enum { MOST_ROWS = 256 }; /* of a chunk */

psoup_status psoup__tape_mixed(psoup__tape *t, psoup_error *error) {
    size_t count = 0;
    if (t->mixed_slab.base)
        return PSOUP_OK;
    psoup__slab_measure(&t->mixed_slab);
    if (!psoup__multiply((size_t)t->chunk_rows, (size_t)t->model->config.vocab_size, &count))
        t->mixed_slab.overflow = true;
    psoup__slab_take(&t->mixed_slab, count, sizeof(float));
    psoup_status status = psoup__slab_grow(t, &t->mixed_slab, true, error);
    if (status == PSOUP_OK)
        t->mixed = psoup__slab_take(&t->mixed_slab, count, sizeof(float));
    return status;
}

psoup_status psoup__mixed_logits(psoup__tape *t, const psoup__mixtures *m, float **logits, psoup_error *error) {
    psoup__backend *be = t->model->be;
    const psoup__ops *ops = be->ops;
    const int32_t vocab = t->model->config.vocab_size, total = m->first[m->n] - m->first[0];
    const bool mixed = total > m->n; /* then there are no more than `total` numbers in first */
    psoup_status status = mixed ? psoup__tape_mixed(t, error) : PSOUP_OK;
    if (status != PSOUP_OK)
        return status;
    psoup__chunk_logits(t, m->row + m->first[0], total);
    *logits = mixed ? t->mixed : t->chunk.logits;
    if (!mixed)
        return PSOUP_OK;
    ops->write(be, t->chunk.target, m->first, ((size_t)m->n + 1) * sizeof *m->first);
    ops->write(be, t->chunk.logprob, m->weight + m->first[0], (size_t)total * sizeof *m->weight);
    ops->combine_rows(be, t->mixed, t->chunk.logits, t->chunk.logprob, t->chunk.target, m->n, vocab);
    return PSOUP_OK;
}

/* ---- scores ----------------------------------------------------------------------------------------------- */

/* One text, read by each policy of its mix: a batch of as many sequences. */
typedef struct reading {
    psoup__view views[PSOUP__MOST_VIEWS];
    int32_t n, length;
    int32_t *tokens, start[PSOUP__MOST_VIEWS + 1];
    float *mix;
} reading;

static psoup_status read_text(psoup_model *model, psoup__tape *tape, const psoup_row *row, reading *r,
                              psoup_error *error) {
    psoup_context *context = model->context;
    size_t adapters = (size_t)model->n_adapters, length = row->n, all = 0;
    r->n = psoup__mix_views(model, row->mix, r->views);
    r->length = (int32_t)length;
    if (!psoup__multiply(length, (size_t)r->n, &all) || all > INT32_MAX)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "a row of %zu tokens is too long for the logits of %d policies",
                           length, (int)r->n);
    if (!(r->tokens = psoup__alloc(context, all, sizeof *r->tokens, error)) ||
        !(r->mix = psoup__alloc(context, (size_t)r->n * adapters, sizeof *r->mix, error)))
        return PSOUP_ERROR_MEMORY;
    for (int32_t v = 0; v < r->n; v++) {
        memcpy(r->tokens + (size_t)v * length, row->tokens, length * sizeof *row->tokens);
        r->start[v + 1] = (v + 1) * r->length;
        if (r->views[v].adapter >= 0)
            r->mix[(size_t)v * adapters + (size_t)r->views[v].adapter] = 1;
    }
    psoup__batch batch = {.n = r->n, .rows = (int32_t)all, .tokens = r->tokens, .start = r->start,
                          .mix = adapters ? r->mix : NULL};
    return psoup__forward(model, tape, &batch, false, error);
}

/* Positions [from, from + n) of the text: their mixed logits. */
static psoup_status at_positions(psoup__tape *tape, const reading *r, int32_t from, int32_t n, float **logits,
                                 psoup_error *error) {
    int32_t row[MOST_ROWS], first[MOST_ROWS + 1] = {0};
    float weight[MOST_ROWS];
    for (int32_t i = 0; i < n; i++) {
        for (int32_t v = 0; v < r->n; v++) {
            row[i * r->n + v] = r->start[v] + from + i;
            weight[i * r->n + v] = r->views[v].weight;
        }
        first[i + 1] = first[i] + r->n;
    }
    return psoup__mixed_logits(tape, &(psoup__mixtures){row, weight, first, n}, logits, error);
}

psoup_status psoup__score_mixed(psoup_model *model, psoup__tape *tape, const psoup_row *row, bool whole, float *out,
                                psoup_error *error) {
    const psoup__ops *ops = model->be->ops;
    const int32_t vocab = model->config.vocab_size;
    psoup_status status;
    reading r = {.n = 0};
    PSOUP__TRY(read_text(model, tape, row, &r, error));
    PSOUP__TRY(psoup__tape_chunk(tape, error));
    const int32_t positions = whole ? r.length : r.length - 1, most = tape->chunk_rows / r.n;
    for (int32_t from = 0; from < positions; from += most) {
        const int32_t n = positions - from < most ? positions - from : most;
        float *logits = NULL;
        PSOUP__TRY(at_positions(tape, &r, from, n, &logits, error));
        if (whole) {
            PSOUP__TRY(ops->read(model->be, out + (size_t)from * (size_t)vocab, logits,
                                 (size_t)n * (size_t)vocab * sizeof *out, error));
            continue;
        }
        ops->write(model->be, tape->chunk.target, row->tokens + from + 1, (size_t)n * sizeof *row->tokens);
        ops->logprob(model->be, tape->chunk.logprob, tape->chunk.lse, logits, tape->chunk.target, n, vocab);
        PSOUP__TRY(ops->read(model->be, out + from, tape->chunk.logprob, (size_t)n * sizeof *out, error));
    }
fail:
    psoup__free(model->context, r.tokens);
    psoup__free(model->context, r.mix);
    return status;
}
