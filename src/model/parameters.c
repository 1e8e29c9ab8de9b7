/* The base's weights one by one, and the three places they can live in:
 *   mapped   matrices point into the model's files, norms and biases into `vectors`;
 *   stored   matrices point into `storage`, in the model's dtype or, the layers' linears, in blocks;
 *   training everything is f32 in `data`, with gradients in `grad`.
 */
#include "model/model.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

const char *const psoup__linear_names[PSOUP__LINEARS] = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj"};

static bool has_bias(const psoup_model_config *config, int linear) {
    if (linear <= PSOUP__V)
        return config->attention_bias || config->qkv_bias;
    return linear == PSOUP__O ? config->attention_bias != 0 : config->mlp_bias != 0;
}

static void set_matrix(psoup__parameter *p, psoup__weight *weight, float **gradient) {
    p->weight = weight;
    p->vector = NULL;
    p->gradient = gradient;
    p->rows = weight->out;
    p->columns = weight->in;
}

static void set_vector(psoup__parameter *p, float **vector, float **gradient, int32_t rows) {
    p->weight = NULL;
    p->vector = vector;
    p->gradient = gradient;
    p->rows = rows;
    p->columns = 1;
}

/* Slots: embed, norm, lm_head; then for every layer two norms, the linears, their biases. */
enum { LAYER_SLOTS = 2 + 2 * PSOUP__LINEARS };

static bool fill_slot(psoup_model *model, size_t slot, psoup__parameter *p) {
    const psoup_model_config *config = &model->config;
    if (slot == 0) {
        snprintf(p->name, sizeof p->name, "model.embed_tokens.weight");
        set_matrix(p, &model->embed, &model->dembed);
        return true;
    }
    if (slot == 1) {
        snprintf(p->name, sizeof p->name, "model.norm.weight");
        set_vector(p, &model->norm, &model->dnorm, config->hidden_size);
        return true;
    }
    if (slot == 2) {
        snprintf(p->name, sizeof p->name, "lm_head.weight");
        set_matrix(p, &model->lm_head, &model->dlm_head);
        return !config->tie_word_embeddings;
    }
    int number = (int)((slot - 3) / LAYER_SLOTS), within = (int)((slot - 3) % LAYER_SLOTS);
    psoup__layer *layer = &model->layers[number];
    if (within < 2) {
        snprintf(p->name, sizeof p->name, "model.layers.%d.%s.weight", number,
                 within == 0 ? "input_layernorm" : "post_attention_layernorm");
        if (within == 0)
            set_vector(p, &layer->input_norm, &layer->dinput_norm, config->hidden_size);
        else
            set_vector(p, &layer->post_norm, &layer->dpost_norm, config->hidden_size);
        return true;
    }
    int linear = (within - 2) % PSOUP__LINEARS;
    bool bias = within - 2 >= PSOUP__LINEARS;
    snprintf(p->name, sizeof p->name, "model.layers.%d.%s.%s", number, psoup__linear_names[linear],
             bias ? "bias" : "weight");
    if (!bias) {
        set_matrix(p, &layer->linear[linear], &layer->dlinear[linear]);
        return true;
    }
    set_vector(p, &layer->bias[linear], &layer->dbias[linear], layer->linear[linear].out);
    return has_bias(config, linear);
}

bool psoup__model_next(const psoup_model *model, psoup__parameter *p) {
    size_t slots = 3 + (size_t)model->config.num_hidden_layers * LAYER_SLOTS;
    while (p->next < slots)
        if (fill_slot((psoup_model *)(uintptr_t)model, p->next++, p)) {
            p->count = (size_t)p->rows * (size_t)p->columns;
            return true;
        }
    return false;
}

size_t psoup__model_count(const psoup_model *model) {
    size_t count = 0;
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);)
        count += p.count;
    return count;
}

static void tie(psoup_model *model) {
    if (!model->config.tie_word_embeddings)
        return;
    model->lm_head.dtype = model->embed.dtype;
    model->lm_head.data = model->embed.data;
    model->dlm_head = model->dembed;
}

void psoup__model_point_gradients(psoup_model *model, float *gradient) {
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);) {
        *p.gradient = gradient;
        if (gradient)
            gradient += p.count;
    }
    tie(model);
}

/* ---- storage --------------------------------------------------------------------------------- */

static size_t aligned(size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

/* In which a matrix is kept while it is frozen. */
static psoup_dtype frozen_dtype(const psoup_model *model, const psoup__weight *weight) {
    const psoup_model_config *c = &model->config;
    return (psoup_dtype)(psoup__is_linear(model, weight) && c->linear_dtype ? c->linear_dtype : c->torch_dtype);
}

/* Bytes of so many elements, and where in them the scales of blocks begin. False where they overflow. */
static bool matrix_bytes(psoup_dtype dtype, size_t count, size_t *bytes, size_t *scales) {
    *scales = 0;
    if (!psoup__dtype_is_blocks(dtype))
        return psoup__multiply(count, psoup_dtype_size(dtype), bytes);
    *scales = aligned(psoup__block_bytes(dtype, count)); /* of less than count bytes, and so what follows */
    return psoup__add(*scales, psoup__block_count(count) * sizeof(float), bytes);
}

static psoup_status allocate_store(psoup_model *model, void **storage, float **vectors,
                                   psoup_error *error) {
    const psoup__ops *ops = model->be->ops;
    size_t all = 0, vector_count = 0;
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);) {
        size_t bytes = 0, scales = 0;
        if (p.weight && (!matrix_bytes(frozen_dtype(model, p.weight), p.count, &bytes, &scales) ||
                         !psoup__add(all, aligned(bytes), &all)))
            return psoup__out_of_memory(error, SIZE_MAX);
        vector_count += p.weight ? 0 : aligned(p.count);
    }
    *vectors = ops->alloc(model->be, vector_count, sizeof(float), error);
    if (!*vectors)
        return PSOUP_ERROR_MEMORY;
    if (!storage)
        return PSOUP_OK;
    *storage = ops->alloc(model->be, all, 1, error);
    if (!*storage) {
        ops->release(model->be, *vectors);
        *vectors = NULL;
        return PSOUP_ERROR_MEMORY;
    }
    return PSOUP_OK;
}

static void point_store(psoup_model *model, void *storage, float *vectors) {
    char *matrix = storage;
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);) {
        if (!p.weight) {
            *p.vector = vectors;
            vectors += aligned(p.count);
        } else if (matrix) {
            size_t bytes, scales;
            p.weight->dtype = frozen_dtype(model, p.weight);
            matrix_bytes(p.weight->dtype, p.count, &bytes, &scales);
            p.weight->data = matrix;
            p.weight->values = (psoup_dtype)model->config.torch_dtype;
            p.weight->scales = scales ? (const float *)(const void *)(matrix + scales) : NULL;
            matrix += aligned(bytes);
        }
    }
    tie(model);
}

psoup_status psoup__model_store(psoup_model *model, bool matrices, psoup_error *error) {
    void *storage = NULL;
    float *vectors = NULL;
    psoup_status status = allocate_store(model, matrices ? &storage : NULL, &vectors, error);
    if (status != PSOUP_OK)
        return status;
    model->storage = storage;
    model->vectors = vectors;
    point_store(model, storage, vectors);
    return PSOUP_OK;
}

/* Of blocks: `first` begins one. Scales go to the head of the scratch, codes behind them. */
static psoup_status read_blocks(const psoup_model *model, const psoup__weight *weight, size_t first, size_t n,
                                float *out, void *scratch, psoup_error *error) {
    const psoup__ops *ops = model->be->ops;
    const size_t count = psoup__block_count(n);
    float *scales = scratch;
    uint8_t *codes = (uint8_t *)(scales + count);
    psoup_status status;
    assert(first % PSOUP__BLOCK == 0);
    PSOUP__TRY(ops->read(model->be, scales, weight->scales + first / PSOUP__BLOCK, count * sizeof *scales, error));
    PSOUP__TRY(ops->read(model->be, codes, (const uint8_t *)weight->data + psoup__block_bytes(weight->dtype, first),
                         psoup__block_bytes(weight->dtype, n), error));
    psoup__blocks_read(model->context, &(psoup__blocks){weight->dtype, codes, scales}, 0, n, out);
fail:
    return status;
}

void psoup__parameter_write_blocks(psoup_model *model, const psoup__parameter *p, size_t first, size_t n,
                                   const uint8_t *codes, const float *scales) {
    const psoup__ops *ops = model->be->ops;
    const psoup__weight *w = p->weight;
    assert(first % PSOUP__BLOCK == 0);
    ops->write(model->be, (uint8_t *)(uintptr_t)w->data + psoup__block_bytes(w->dtype, first), codes,
               psoup__block_bytes(w->dtype, n));
    ops->write(model->be, (float *)(uintptr_t)w->scales + first / PSOUP__BLOCK, scales,
               psoup__block_count(n) * sizeof *scales);
}

psoup_status psoup__parameter_read(const psoup_model *model, const psoup__parameter *p,
                                   size_t first, size_t n, float *out, void *scratch,
                                   psoup_error *error) {
    const psoup__ops *ops = model->be->ops;
    if (!p->weight)
        return ops->read(model->be, out, *p->vector + first, n * sizeof(float), error);
    if (psoup__dtype_is_blocks(p->weight->dtype))
        return read_blocks(model, p->weight, first, n, out, scratch, error);
    size_t item = psoup_dtype_size(p->weight->dtype);
    const char *from = (const char *)p->weight->data + first * item;
    if (!model->weights) {
        psoup_status status = ops->read(model->be, scratch, from, n * item, error);
        if (status != PSOUP_OK)
            return status;
        from = scratch;
    }
    psoup__to_f32(model->context, out, from, p->weight->dtype, n);
    return PSOUP_OK;
}

void psoup__parameter_write(psoup_model *model, const psoup__parameter *p, size_t first, size_t n,
                            const float *in, void *scratch) {
    const psoup__ops *ops = model->be->ops;
    if (!p->weight) {
        ops->write(model->be, *p->vector + first, in, n * sizeof(float));
        return;
    }
    if (psoup__dtype_is_blocks(p->weight->dtype)) {
        float *scales = scratch;
        uint8_t *codes = (uint8_t *)(scales + psoup__block_count(n));
        psoup__blocks_write(model->context, p->weight->dtype, in, n, codes, scales);
        psoup__parameter_write_blocks(model, p, first, n, codes, scales);
        return;
    }
    size_t item = psoup_dtype_size(p->weight->dtype);
    char *to = (char *)(uintptr_t)p->weight->data + first * item; /* ours: never the files */
    psoup__from_f32(model->context, scratch, p->weight->dtype, in, n);
    ops->write(model->be, to, scratch, n * item);
}

static void unpack(psoup_model *model) {
    model->be->ops->weight_unpack(model->be, &model->lm_head);
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);)
        if (p.weight)
            model->be->ops->weight_unpack(model->be, p.weight);
    model->backward_packed = false;
}

psoup_status psoup__model_pack(psoup_model *model, bool backward, psoup_error *error) {
    psoup_context *context = model->context;
    const size_t most = (size_t)model->config.num_hidden_layers * PSOUP__LINEARS + 1;
    psoup__weight **weights = psoup__alloc(context, most, sizeof *weights, error);
    int32_t n = 0;
    if (!weights)
        return PSOUP_ERROR_MEMORY;
    if (!backward) /* else what is packed stays */
        unpack(model);
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);)
        if (p.weight && p.weight != &model->embed && p.weight != &model->lm_head)
            weights[n++] = p.weight;
    weights[n++] = &model->lm_head;
    psoup_status status = model->be->ops->weights_pack(model->be, weights, n, backward, error);
    if (status == PSOUP_OK && backward)
        model->backward_packed = true;
    psoup__free(context, weights);
    return status;
}

/* ---- training the base ----------------------------------------------------------------------- */

static psoup_status thaw(psoup_model *model, float *piece, void *scratch, psoup_error *error) {
    const psoup__ops *ops = model->be->ops;
    psoup_status status = PSOUP_OK;
    size_t count = psoup__model_count(model);
    float *grad = NULL, *data = ops->alloc(model->be, count, sizeof(float), error);
    if (data)
        grad = ops->alloc(model->be, count, sizeof(float), error);
    if (!grad) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    float *to = data;
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);)
        for (size_t first = 0; first < p.count; first += PSOUP__PIECE) {
            size_t n = p.count - first < PSOUP__PIECE ? p.count - first : PSOUP__PIECE;
            PSOUP__TRY(psoup__parameter_read(model, &p, first, n, piece, scratch, error));
            ops->write(model->be, to, piece, n * sizeof(float));
            to += n;
        }
    unpack(model);
    to = data;
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p); to += p.count) {
        if (p.weight) {
            p.weight->dtype = PSOUP_F32;
            p.weight->data = to;
        } else {
            *p.vector = to;
        }
    }
    model->data = data;
    model->grad = grad;
    model->count = count;
    psoup__model_point_gradients(model, grad);
    ops->release(model->be, model->storage);
    ops->release(model->be, model->vectors);
    psoup__weights_free(model->weights);
    model->storage = NULL;
    model->vectors = NULL;
    model->weights = NULL;
    return PSOUP_OK;
fail:
    ops->release(model->be, data);
    ops->release(model->be, grad);
    return status;
}

static psoup_status freeze(psoup_model *model, float *piece, void *scratch, psoup_error *error) {
    const psoup__ops *ops = model->be->ops;
    void *storage = NULL;
    float *vectors = NULL;
    psoup_status status = allocate_store(model, &storage, &vectors, error);
    if (status != PSOUP_OK)
        return status;
    point_store(model, storage, vectors);
    const float *from = model->data;
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);)
        for (size_t first = 0; first < p.count; first += PSOUP__PIECE) {
            size_t n = p.count - first < PSOUP__PIECE ? p.count - first : PSOUP__PIECE;
            status = ops->read(model->be, piece, from, n * sizeof(float), error);
            if (status != PSOUP_OK)
                goto fail;
            psoup__parameter_write(model, &p, first, n, piece, scratch);
            from += n;
        }
    model->storage = storage;
    model->vectors = vectors;
    ops->release(model->be, model->data);
    ops->release(model->be, model->grad);
    model->data = model->grad = NULL;
    model->count = 0;
    psoup__model_point_gradients(model, NULL);
    return psoup__model_pack(model, false, error);
fail:
    from = model->data;
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p); from += p.count) {
        if (p.weight) {
            p.weight->dtype = PSOUP_F32;
            p.weight->data = from;
        } else {
            *p.vector = model->data + (from - model->data);
        }
    }
    tie(model);
    ops->release(model->be, storage);
    ops->release(model->be, vectors);
    return status;
}

psoup_status psoup__model_may_train(const psoup_model *model, psoup_error *error) {
    if (!model->config.linear_dtype)
        return PSOUP_OK;
    return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                       "the base is kept in %s blocks, which cannot train: load it in f32, f16 or bf16, or train an "
                       "adapter",
                       psoup_dtype_name((psoup_dtype)model->config.linear_dtype));
}

psoup_status psoup__model_train_base(psoup_model *model, bool train, psoup_error *error) {
    if (train == (model->data != NULL))
        return PSOUP_OK;
    psoup_status status = psoup__model_may_train(model, error);
    if (status != PSOUP_OK)
        return status;
    float *piece = psoup__alloc(model->context, 2 * (size_t)PSOUP__PIECE, sizeof(float), error);
    if (!piece)
        return PSOUP_ERROR_MEMORY;
    status = train ? thaw(model, piece, piece + PSOUP__PIECE, error)
                                : freeze(model, piece, piece + PSOUP__PIECE, error);
    psoup__free(model->context, piece);
    return status;
}
