#include "model/measure.h"

#include "model/session.h"

/* What a slab takes that has been measured: it grows with an eighth of room (tape.c). */
static int64_t slab_bytes(const psoup__slab *slab) {
    if (slab->overflow || slab->used > (size_t)PSOUP__TOO_MUCH)
        return PSOUP__TOO_MUCH;
    return (int64_t)(slab->used + slab->used / 8);
}

/* The bytes where all rows, `each` times over, use adapter `a` of the extent; −1: none. The sum over rows of their own
 * adapters' ranks is never above that of the adapter with the largest. */
static void measure_with(psoup__tape *t, const psoup__extent *e, int32_t a, int32_t *adapter, int32_t *first,
                         psoup__lora *lora, psoup__footprint *out) {
    t->active = a < 0 ? 0 : e->n_adapters;
    first[0] = 0;
    for (int32_t s = 0; s < t->active; s++) {
        adapter[s] = e->adapters[a];
        first[s + 1] = first[s] + (s < e->each ? t->rows : 0);
    }
    psoup__tape_measure(t, e->cached, adapter, first, lora);
    if (e->saved)
        psoup__backward_measure(t);
    psoup__heads_measure(t, (size_t)e->heads, e->head_dropout > 0);
    int64_t pulls = e->saved ? psoup__product(e->reads, (int64_t)t->model->config.hidden_size * 4) : 0;
    int64_t activations = psoup__sum(slab_bytes(&t->device), slab_bytes(&t->heads));
    activations = psoup__sum(activations, e->saved ? slab_bytes(&t->backward) : 0);
    activations = psoup__sum(activations, pulls + pulls / 8 + 64);
    out->activations = activations > out->activations ? activations : out->activations;
    int64_t host = psoup__sum(slab_bytes(&t->host), psoup__product(e->saved ? 4 * e->reads : 0, 4));
    out->host = host > out->host ? host : out->host;
    out->logits = slab_bytes(&t->chunk_slab);
}

psoup_status psoup__measure_batch(psoup_model *model, const psoup__extent *e, psoup__footprint *out,
                                  psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    psoup_context *context = model->context;
    const psoup__ops *ops = model->be->ops;
    psoup__tape *t = NULL;
    size_t n = (size_t)e->n_adapters + 1, pairs = (size_t)model->config.num_hidden_layers * PSOUP__LINEARS;
    int32_t *adapter = psoup__alloc(context, n, sizeof *adapter, error);
    int32_t *first = psoup__alloc(context, n + 1, sizeof *first, error);
    psoup__lora *lora = psoup__alloc(context, n * pairs, sizeof *lora, error);
    *out = (psoup__footprint){0};
    if (!adapter || !first || !lora)
        goto fail;
    PSOUP__TRY(psoup__tape_create(model, &t, error));
    if (psoup__product(e->rows, e->each > 1 ? e->each : 1) > INT32_MAX || e->sequences > INT32_MAX ||
        e->heads > INT32_MAX) { /* more than one batch can be */
        *out = (psoup__footprint){PSOUP__TOO_MUCH, 0, 0, 0};
        goto fail;
    }
    t->rows = (int32_t)e->rows;
    t->n = (int32_t)e->sequences;
    t->saved = e->saved;
    t->inputs_only = e->saved && e->recompute;
    t->factors = e->factors;
    t->dropout = e->lora_dropout;
    t->n_pages = (size_t)e->pages;
    for (int32_t a = e->n_adapters ? 0 : -1; a < e->n_adapters; a++)
        measure_with(t, e, a, adapter, first, lora, out);
    int32_t dim = model->config.hidden_size, vocab = model->config.vocab_size;
    size_t run = ops->reserved_bytes(model->be, t->rows, psoup__model_widest(model));
    size_t head = ops->reserved_bytes(model->be, t->chunk_rows, vocab > dim ? vocab : dim);
    out->reserved = (int64_t)(run > head ? run : head) & (PSOUP__TOO_MUCH - 1);
    if ((run > head ? run : head) > (size_t)PSOUP__TOO_MUCH)
        out->reserved = PSOUP__TOO_MUCH;
fail:
    psoup__tape_free(t); /* measured slabs hold nothing */
    psoup__free(context, adapter);
    psoup__free(context, first);
    psoup__free(context, lora);
    return status;
}

/* ---- a session ----------------------------------------------------------------------------------- */

psoup_status psoup__measure_decoding(psoup_model *model, const psoup__decoding_extent *d, psoup__footprint *out,
                                     int64_t *cache, psoup_error *error) {
    const psoup__ops *ops = model->be->ops;
    const psoup_session_options *o = d->options;
    int64_t longest = model->config.max_position_embeddings, places = o->max_sequences ? o->max_sequences : 32;
    int64_t tokens = d->longest + d->most < longest ? d->longest + d->most : longest;
    int64_t prefill = o->prefill_rows ? o->prefill_rows : 512, pending = psoup__product(places, d->longest);
    int64_t rows = prefill + places < pending ? prefill + places : pending;
    int64_t pages = ops->page ? (tokens + ops->page - 1) / ops->page : 1, each = d->each;
    int64_t listed = (psoup__product(places, d->n_adapters) + rows - 1) / rows;
    if (ops->replay && listed > each)
        each = listed; /* in a window every adapter lists every row */
    psoup__extent extent = {.rows = rows,
                            .sequences = places,
                            .adapters = d->adapters,
                            .n_adapters = d->n_adapters,
                            .each = (int32_t)each,
                            .cached = true,
                            .factors = d->factors,
                            .pages = ops->page ? psoup__product(places, pages) : 0};
    psoup_status status = psoup__measure_batch(model, &extent, out, error);
    if (status != PSOUP_OK)
        return status;
    size_t bytes = psoup__cache_bytes(model, (int32_t)places, (int32_t)tokens, o->cache_tokens);
    *cache = bytes < (size_t)PSOUP__TOO_MUCH ? (int64_t)bytes : PSOUP__TOO_MUCH;
    /* session.c's arrays: of every place; of every prompt that waits or runs; and generate.c's of its answer. */
    int64_t adapters = model->n_adapters, most = d->most < tokens ? d->most : tokens;
    int64_t place = (int64_t)(sizeof(part) + sizeof(psoup__draw)) + 64 + 4 * adapters;
    int64_t prompt = (int64_t)sizeof(sequence) + 4 * tokens + 4 * pages + 4 * adapters +
                     4 * PSOUP__END_TOKENS + (d->history ? 4 * tokens : 0) + 5 * 64;
    int64_t answer = 64 + 2 * 4 * (2 * most + 16);
    out->host = psoup__sum(out->host, psoup__product(places, place) + 4 * prefill + (int64_t)sizeof(psoup_session));
    out->host = psoup__sum(out->host, psoup__product(d->prompts, prompt + answer));
    int64_t device = 4096 * (int64_t)sizeof(psoup__draw);
    if (ops->replay) /* window.c */
        device += psoup__product(places, (int64_t)(sizeof(psoup__decoding) + sizeof(psoup__draw)) + 8 * (tokens + 64) +
                                             8 * (o->steps ? o->steps : 8)); /* 64: stop tokens, and single numbers */
    if (ops->on_host)
        device = 256 * (int64_t)(sizeof(psoup__draw) + 8) + (d->history ? 8 * psoup__product(places, tokens) : 0);
    out->activations = psoup__sum(out->activations, device);
    return PSOUP_OK;
}

/* ---- the sums ------------------------------------------------------------------------------------- */

void psoup__memory_begin(psoup_model *model, bool learns, psoup_memory *out) {
    psoup__base_bytes base = psoup__measure_base(model);
    size_t size = out->size;
    *out = (psoup_memory){.size = size, .mapped = base.mapped, .device_free = model->be->ops->unused(model->be)};
    /* The first backward packs the frozen matrices in the other direction too. */
    int64_t packed = learns && !model->data ? 2 * base.one_way : base.packed;
    out->base = base.stored + (packed > base.packed ? packed : base.packed);
    for (int32_t i = 0; i < model->n_adapters; i++)
        out->adapters += (int64_t)(model->adapters[i]->count * sizeof(float));
    out->held = base.stored + base.packed + out->adapters;
}

void psoup__memory_end(const psoup_model *model, int64_t kept, psoup_memory *out) {
    int64_t parts[] = {out->base, out->adapters, out->learning, out->activations, out->logits, out->cache}, sum = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        sum = psoup__sum(sum, parts[i]);
    bool on_host = model->be->ops->on_host;
    out->host = psoup__sum(out->rows, on_host ? sum : kept);
    out->device = on_host ? 0 : sum - kept;
}

void psoup__memory_add(psoup_memory *out, const psoup__footprint *print) {
    out->activations = psoup__sum(out->activations, print->activations);
    out->logits = psoup__sum(out->logits, print->logits);
    out->rows = psoup__sum(out->rows, print->host);
}

/* ---- the base ------------------------------------------------------------------------------------ */

static int64_t matrix_bytes(const psoup__parameter *p) {
    psoup_dtype dtype = p->weight->dtype;
    if (psoup__dtype_is_blocks(dtype))
        return (int64_t)(psoup__block_bytes(dtype, p->count) + psoup__block_count(p->count) * sizeof(float));
    return (int64_t)(p->count * psoup_dtype_size(dtype));
}

psoup__base_bytes psoup__measure_base(const psoup_model *model) {
    psoup__base_bytes bytes = {0};
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);) {
        if (!p.weight) {
            bytes.stored += model->data ? 0 : (int64_t)(p.count * sizeof(float));
            continue;
        }
        int64_t own = matrix_bytes(&p);
        int64_t one_way = (int64_t)model->be->ops->packed_bytes(model->be, p.weight);
        if (!model->data && !(p.weight == &model->lm_head && model->config.tie_word_embeddings))
            *(model->storage ? &bytes.stored : &bytes.mapped) += own;
        if (p.weight == &model->embed) /* it is looked up; only a head of the same numbers is packed */
            continue;
        bytes.one_way += one_way;
        bytes.packed += ((p.weight->forward != NULL) + (p.weight->backward != NULL)) * one_way;
    }
    if (model->config.tie_word_embeddings) { /* the head is no parameter of its own then */
        int64_t one_way = (int64_t)model->be->ops->packed_bytes(model->be, &model->lm_head);
        bytes.one_way += one_way;
        bytes.packed += ((model->lm_head.forward != NULL) + (model->lm_head.backward != NULL)) * one_way;
    }
    if (model->data)
        bytes.stored += 2 * (int64_t)(model->count * sizeof(float));
    return bytes;
}

int64_t psoup__measure_positions(const psoup_model *model, int64_t positions) {
    int64_t rounded = 512, longest = model->config.max_position_embeddings;
    while (rounded < positions)
        rounded *= 2;
    rounded = rounded < longest ? rounded : longest;
    return rounded <= model->positions ? 0 : psoup__product(2 * rounded, model->config.head_dim * 4);
}
