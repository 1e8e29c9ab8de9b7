/* Adapters: named LoRA factors in flat buffers, to and from PEFT directories. */
#include "model/model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static size_t pairs_of(const psoup_model *model) {
    return (size_t)model->config.num_hidden_layers * PSOUP__LINEARS;
}

static const psoup__weight *weight_of(const psoup_model *model, size_t pair) {
    return &model->layers[pair / PSOUP__LINEARS].linear[pair % PSOUP__LINEARS];
}

static size_t pair_count(const psoup_model *model, const psoup__adapter *adapter, size_t pair) {
    const psoup__weight *w = weight_of(model, pair);
    return (size_t)adapter->lora[pair].rank * ((size_t)w->in + (size_t)w->out);
}

void psoup__adapter_point(const psoup_model *model, psoup__adapter *adapter) {
    float *data = adapter->data, *grad = adapter->grad;
    size_t at = 0;
    for (size_t pair = 0; pair < pairs_of(model); pair++) {
        psoup__lora *lora = &adapter->lora[pair];
        const psoup__weight *w = weight_of(model, pair);
        size_t rank = (size_t)lora->rank, b = at + rank * (size_t)w->in;
        lora->a = rank ? data + at : NULL;
        lora->b = rank ? data + b : NULL;
        lora->da = rank && grad ? grad + at : NULL;
        lora->db = rank && grad ? grad + b : NULL;
        at = b + rank * (size_t)w->out;
    }
    bool head = at < adapter->count;
    size_t dim = (size_t)model->config.hidden_size;
    adapter->head = head ? data + at : NULL;
    adapter->head_bias = head ? data + at + dim : NULL;
    adapter->dhead = head && grad ? grad + at : NULL;
    adapter->dhead_bias = head && grad ? grad + at + dim : NULL;
}

static void free_adapter(psoup_model *model, psoup__adapter *adapter) {
    if (!adapter)
        return;
    model->be->ops->release(model->be, adapter->data);
    model->be->ops->release(model->be, adapter->grad);
    psoup__free(model->context, adapter->lora);
    psoup__free(model->context, adapter->host);
    psoup__free(model->context, adapter->name);
    psoup__free(model->context, adapter);
}

static psoup_status check_name(const psoup_model *model, const char *name, psoup_error *error) {
    bool plain = name && name[0];
    for (const char *c = name; plain && *c; c++)
        plain = *c != '=' && *c != ',' && (unsigned char)*c >= ' ';
    if (!plain)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "adapter name \"%s\": expected a text without '=' and ','",
                           name ? name : "");
    if (psoup__model_adapter(model, name))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "adapter name \"%s\": the model already has one of that name", name);
    return PSOUP_OK;
}

/* An adapter with a name and room for its pairs' ranks; data comes once those are set. */
static psoup_status create_adapter(psoup_model *model, const char *name, psoup__adapter **out,
                                   psoup_error *error) {
    *out = NULL;
    psoup_status status = check_name(model, name, error);
    if (status != PSOUP_OK)
        return status;
    psoup__adapter *adapter = psoup__alloc(model->context, 1, sizeof *adapter, error);
    if (!adapter)
        return PSOUP_ERROR_MEMORY;
    adapter->name = psoup__strdup(model->context, name, error);
    if (adapter->name)
        adapter->lora = psoup__alloc(model->context, pairs_of(model), sizeof *adapter->lora, error);
    if (!adapter->lora) {
        free_adapter(model, adapter);
        return PSOUP_ERROR_MEMORY;
    }
    *out = adapter;
    return PSOUP_OK;
}

static psoup_status allocate_data(psoup_model *model, psoup__adapter *adapter, bool head,
                                  psoup_error *error) {
    adapter->count = head ? (size_t)model->config.hidden_size + 1 : 0;
    for (size_t pair = 0; pair < pairs_of(model); pair++)
        adapter->count += pair_count(model, adapter, pair);
    adapter->data = model->be->ops->alloc(model->be, adapter->count, sizeof(float), error);
    if (!adapter->data)
        return PSOUP_ERROR_MEMORY;
    psoup__adapter_point(model, adapter);
    return PSOUP_OK;
}

static psoup_status append(psoup_model *model, psoup__adapter *adapter, psoup_error *error) {
    psoup_status status =
        psoup__reserve(model->context, &model->adapters, &model->adapters_capacity,
                       (size_t)model->n_adapters + 1, sizeof *model->adapters, error);
    if (status == PSOUP_OK) {
        model->adapters[model->n_adapters++] = adapter;
        model->edition++;
    }
    return status;
}

/* ---- new -------------------------------------------------------------------------------------- */

static psoup_status check_options(const psoup_adapter_options *options, psoup_error *error) {
    if (options->rank < 1 || options->rank > 65536)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_adapter_options: rank is %d; expected 1 … 65536",
                           (int)options->rank);
    if (!isfinite(options->alpha) || options->alpha <= 0) /* at 0 no gradient would reach A or B */
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_adapter_options: alpha is %g; expected a finite number above 0",
                           (double)options->alpha);
    if (options->targets == 0 || (options->targets & ~(uint32_t)PSOUP_ALL_LINEAR))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_adapter_options: targets is %u; expected a set of PSOUP_Q_PROJ … "
                           "PSOUP_DOWN_PROJ",
                           (unsigned)options->targets);
    return PSOUP_OK;
}

/* PEFT's default: kaiming_uniform with a = √5 bounds A by 1/√in; B is zero. Every pair draws from a
 * stream of its own, so what is drawn for one does not depend on the other targets. */
static psoup_status draw_factors(psoup_model *model, psoup__adapter *adapter, uint64_t seed,
                                 psoup_error *error) {
    float *piece = psoup__alloc(model->context, PSOUP__PIECE, sizeof(float), error);
    if (!piece)
        return PSOUP_ERROR_MEMORY;
    for (size_t pair = 0; pair < pairs_of(model); pair++) {
        const psoup__lora *lora = &adapter->lora[pair];
        size_t in = (size_t)weight_of(model, pair)->in, count = (size_t)lora->rank * in;
        float bound = (float)(1 / sqrt((double)in));
        psoup__random random = {.seed = seed, .sequence = pair};
        for (size_t first = 0; first < count; first += PSOUP__PIECE) {
            size_t n = count - first < PSOUP__PIECE ? count - first : PSOUP__PIECE;
            for (size_t i = 0; i < n; i++)
                piece[i] = (2 * psoup__random_uniform(&random) - 1) * bound;
            model->be->ops->write(model->be, adapter->data + (lora->a - adapter->data) + first,
                                  piece, n * sizeof(float));
        }
    }
    psoup__free(model->context, piece);
    return PSOUP_OK;
}

psoup_status psoup_model_add_adapter(psoup_model *model, const char *name,
                                     const psoup_adapter_options *options, psoup_error *error) {
    psoup_adapter_options full = PSOUP_ADAPTER_OPTIONS_INIT;
    psoup__adapter *adapter = NULL;
    psoup_status status;
    PSOUP__TRY(psoup__options(&full, sizeof full, options, "psoup_adapter_options", error));
    PSOUP__TRY(check_options(&full, error));
    PSOUP__TRY(create_adapter(model, name, &adapter, error));
    adapter->rank = full.rank;
    adapter->alpha = full.alpha;
    adapter->rslora = full.rslora != 0;
    adapter->targets = full.targets;
    double rank = full.rank, divisor = full.rslora ? sqrt(rank) : rank;
    for (size_t pair = 0; pair < pairs_of(model); pair++)
        if (full.targets >> (pair % PSOUP__LINEARS) & 1) {
            adapter->lora[pair].rank = full.rank;
            adapter->lora[pair].scale = (float)(full.alpha / divisor);
        }
    PSOUP__TRY(allocate_data(model, adapter, false, error));
    PSOUP__TRY(draw_factors(model, adapter, full.seed, error));
    PSOUP__TRY(append(model, adapter, error));
    return PSOUP_OK;
fail:
    free_adapter(model, adapter);
    return status;
}

/* ---- from and to PEFT ------------------------------------------------------------------------- */

/* "model.layers.3.mlp.up_proj" → its pair; −1 where the model has no such linear. */
static int64_t find_pair(const psoup_model *model, const char *module) {
    int layer = -1, length = 0;
    if (sscanf(module, "model.layers.%9d.%n", &layer, &length) != 1 || length == 0 || layer < 0 ||
        layer >= model->config.num_hidden_layers)
        return -1;
    for (int i = 0; i < PSOUP__LINEARS; i++)
        if (strcmp(module + length, psoup__linear_names[i]) == 0)
            return (int64_t)layer * PSOUP__LINEARS + i;
    return -1;
}

static psoup_status take_pair(psoup_model *model, psoup__adapter *adapter, const psoup__peft *peft,
                              const psoup__peft_pair *from, psoup_error *error) {
    int64_t pair = find_pair(model, from->module);
    if (pair < 0)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: adapts %s, which is no linear layer of this model", peft->path,
                           from->module);
    const psoup__weight *w = weight_of(model, (size_t)pair);
    const psoup__tensor *a = &from->a, *b = &from->b;
    if (a->rank != 2 || b->rank != 2 || a->shape[0] != from->rank || a->shape[1] != w->in ||
        b->shape[0] != w->out || b->shape[1] != from->rank || from->rank < 1)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: %s has factors [%lld, %lld] and [%lld, %lld]; this model asks for "
                           "[r, %d] and [%d, r]",
                           peft->path, from->module, (long long)a->shape[0],
                           (long long)a->shape[1], (long long)b->shape[0], (long long)b->shape[1],
                           (int)w->in, (int)w->out);
    adapter->lora[pair].rank = from->rank;
    adapter->lora[pair].scale = from->scale;
    adapter->targets |= 1u << (pair % PSOUP__LINEARS);
    return PSOUP_OK;
}

static psoup_status copy_tensor(psoup_model *model, const float *to, const psoup__tensor *tensor,
                                psoup_error *error) {
    size_t count = 0;
    if (!psoup__tensor_elements(tensor, &count))
        return psoup__out_of_memory(error, SIZE_MAX);
    float *values = psoup__alloc(model->context, count, sizeof(float), error);
    if (!values)
        return PSOUP_ERROR_MEMORY;
    psoup__tensor_read(model->context, tensor, 0, count, values);
    model->be->ops->write(model->be, (float *)(uintptr_t)to, values, count * sizeof(float));
    psoup__free(model->context, values);
    return PSOUP_OK;
}

static psoup_status check_head(const psoup_model *model, const psoup__peft *peft,
                               psoup_error *error) {
    size_t weights = 0, biases = 1;
    bool right = psoup__tensor_elements(&peft->head, &weights) &&
                 weights == (size_t)model->config.hidden_size;
    if (right && psoup__tensor_is_there(&peft->head_bias))
        right = psoup__tensor_elements(&peft->head_bias, &biases) && biases == 1;
    if (!right)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: the head \"score\" has %zu weights; this model asks for [1, %d]",
                           peft->path, weights, (int)model->config.hidden_size);
    return PSOUP_OK;
}

static psoup_status fill_from_peft(psoup_model *model, psoup__adapter *adapter,
                                   const psoup__peft *peft, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const bool head = psoup__tensor_is_there(&peft->head);
    for (size_t i = 0; i < peft->n; i++)
        PSOUP__TRY(take_pair(model, adapter, peft, &peft->pairs[i], error));
    if (head)
        PSOUP__TRY(check_head(model, peft, error));
    PSOUP__TRY(allocate_data(model, adapter, head, error));
    for (size_t i = 0; i < peft->n; i++) {
        const psoup__peft_pair *from = &peft->pairs[i];
        const psoup__lora *lora = &adapter->lora[find_pair(model, from->module)];
        PSOUP__TRY(copy_tensor(model, lora->a, &from->a, error));
        PSOUP__TRY(copy_tensor(model, lora->b, &from->b, error));
    }
    if (head)
        PSOUP__TRY(copy_tensor(model, adapter->head, &peft->head, error));
    if (head && psoup__tensor_is_there(&peft->head_bias))
        PSOUP__TRY(copy_tensor(model, adapter->head_bias, &peft->head_bias, error));
    PSOUP__TRY(psoup__weights_check(peft->weights, error));
fail:
    return status;
}

psoup_status psoup_model_load_adapter(psoup_model *model, const char *name, const char *directory,
                                      psoup_error *error) {
    psoup__peft *peft = NULL;
    psoup__adapter *adapter = NULL;
    psoup_status status;
    PSOUP__TRY(psoup__peft_open_heads(model->context, directory, model->config.num_attention_heads,
                                      model->config.num_key_value_heads, &peft, error));
    if (peft->n > 0 && peft->pairs[0].transposed) {
        status = psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                             "%s: fan_in_fan_out: true; the linears of this model are not transposed",
                             directory);
        goto fail;
    }
    PSOUP__TRY(create_adapter(model, name, &adapter, error));
    adapter->rank = (int32_t)psoup_json_integer(psoup_json_get(peft->config, "r"), 0);
    adapter->alpha = (float)psoup_json_real(psoup_json_get(peft->config, "lora_alpha"), 0);
    adapter->rslora = psoup_json_bool(psoup_json_get(peft->config, "use_rslora"), 0) != 0;
    PSOUP__TRY(fill_from_peft(model, adapter, peft, error));
    PSOUP__TRY(append(model, adapter, error));
    psoup__peft_free(peft);
    return PSOUP_OK;
fail:
    psoup__peft_free(peft);
    free_adapter(model, adapter);
    return status;
}

static void describe_pairs(const psoup_model *model, const psoup__adapter *adapter,
                           const float *values, psoup__peft_pair *pairs,
                           char (*names)[64], psoup__peft_output *out) {
    for (size_t pair = 0; pair < pairs_of(model); pair++) {
        const psoup__lora *lora = &adapter->lora[pair];
        const psoup__weight *w = weight_of(model, pair);
        if (lora->rank == 0)
            continue;
        snprintf(names[out->n], sizeof names[out->n], "model.layers.%zu.%s",
                 pair / PSOUP__LINEARS, psoup__linear_names[pair % PSOUP__LINEARS]);
        psoup__peft_pair *to = &pairs[out->n];
        size_t rank = (size_t)lora->rank;
        to->module = names[out->n++];
        to->rank = lora->rank;
        to->scale = lora->scale;
        to->a = (psoup__tensor){.dtype = PSOUP_F32, .rank = 2, .shape = {lora->rank, w->in},
                                .bytes = rank * (size_t)w->in * sizeof(float),
                                .data = values + (lora->a - adapter->data)};
        to->b = (psoup__tensor){.dtype = PSOUP_F32, .rank = 2, .shape = {w->out, lora->rank},
                                .bytes = rank * (size_t)w->out * sizeof(float),
                                .data = values + (lora->b - adapter->data)};
    }
}

psoup_status psoup__adapter_save(const psoup_model *model, const psoup__adapter *adapter,
                                 const char *directory, const char *base_name, bool with_head,
                                 psoup_error *error) {
    psoup_context *context = model->context;
    char(*names)[64] = NULL;
    float *values = NULL;
    psoup_status status = PSOUP_ERROR_MEMORY;
    psoup__peft_pair *pairs = psoup__alloc(context, pairs_of(model), sizeof *pairs, error);
    if (pairs)
        names = psoup__alloc(context, pairs_of(model), sizeof *names, error);
    if (names)
        values = psoup__alloc(context, adapter->count, sizeof(float), error);
    if (!values)
        goto fail;
    PSOUP__TRY(model->be->ops->read(model->be, values, adapter->data,
                                    adapter->count * sizeof(float), error));
    bool head = with_head && adapter->head;
    /* transformers' score has no bias; where ours is 0 nothing is lost there. */
    const float *bias = head ? values + (adapter->head_bias - adapter->data) : NULL;
    psoup__peft_output out = {
        .pairs = pairs,
        .rank = adapter->rank,
        .alpha = adapter->alpha,
        .rslora = adapter->rslora,
        .task_type = head ? "SEQ_CLS" : "CAUSAL_LM",
        .base_name = base_name,
        .head = head ? values + (adapter->head - adapter->data) : NULL,
        .head_bias = bias && *bias != 0 ? bias : NULL,
        .dim = model->config.hidden_size,
    };
    describe_pairs(model, adapter, values, pairs, names, &out);
    PSOUP__TRY(psoup__peft_write(context, directory, &out, error));
fail:
    psoup__free(context, values);
    psoup__free(context, names);
    psoup__free(context, pairs);
    return status;
}

static psoup_status find_or_fail(const psoup_model *model, const char *name, psoup__adapter **out,
                                 psoup_error *error) {
    *out = psoup__model_adapter(model, name);
    if (*out)
        return PSOUP_OK;
    return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "the model has no adapter named \"%s\"",
                       name ? name : "");
}

psoup_status psoup_model_save_adapter(const psoup_model *model, const char *name,
                                      const char *directory, const char *base_name,
                                      psoup_error *error) {
    psoup__adapter *adapter = NULL;
    psoup_status status = find_or_fail(model, name, &adapter, error);
    if (status == PSOUP_OK)
        status = psoup__adapter_save(model, adapter, directory, base_name, false, error);
    return status;
}

/* ---- heads and gradients ---------------------------------------------------------------------- */

psoup_status psoup__adapter_add_head(psoup_model *model, psoup__adapter *adapter,
                                     psoup_error *error) {
    const psoup__ops *ops = model->be->ops;
    if (adapter->head)
        return PSOUP_OK;
    size_t old = adapter->count, count = old + (size_t)model->config.hidden_size + 1;
    float *grad = NULL, *data = ops->alloc(model->be, count, sizeof(float), error);
    if (data && adapter->grad)
        grad = ops->alloc(model->be, (size_t)adapter->gradients * count, sizeof(float), error);
    if (!data || (adapter->grad && !grad)) {
        ops->release(model->be, data);
        return PSOUP_ERROR_MEMORY;
    }
    ops->copy(model->be, data, adapter->data, old * sizeof(float));
    for (size_t k = 0; grad && k < (size_t)adapter->gradients; k++)
        ops->copy(model->be, grad + k * count, adapter->grad + k * old, old * sizeof(float));
    ops->release(model->be, adapter->data);
    ops->release(model->be, adapter->grad);
    psoup__free(model->context, adapter->host); /* too short now */
    adapter->host = NULL;
    adapter->data = data;
    adapter->grad = grad;
    adapter->count = count;
    psoup__adapter_point(model, adapter);
    return PSOUP_OK;
}

/* Weights up to which lanes were measured to gain: 1.12 times at 5.7 million, 1.4 at 0.9 (docs/speed.md). */
enum { SMALL = 1 << 23 };

int32_t psoup__gradients(const psoup_model *model) {
    return model->be->ops->on_host && psoup__model_count(model) <= SMALL ? PSOUP__LANES : 1;
}

psoup_status psoup__adapter_train(psoup_model *model, psoup__adapter *adapter, bool train,
                                  psoup_error *error) {
    const psoup__ops *ops = model->be->ops;
    if (train && adapter->grad) {
        ops->zero(model->be, adapter->grad, (size_t)adapter->gradients * adapter->count * sizeof(float));
        return PSOUP_OK;
    }
    if (train) {
        adapter->gradients = psoup__gradients(model);
        adapter->grad = ops->alloc(model->be, (size_t)adapter->gradients * adapter->count, sizeof(float), error);
        if (!adapter->grad)
            return PSOUP_ERROR_MEMORY;
    } else {
        ops->release(model->be, adapter->grad);
        adapter->grad = NULL;
    }
    psoup__adapter_point(model, adapter);
    return PSOUP_OK;
}

/* The tensor that element `at` of the flat buffer is of. */
static void name_tensor(const psoup_model *model, const psoup__adapter *adapter, size_t at, char *out, size_t size) {
    const float *element = adapter->data + at;
    if (adapter->head && element >= adapter->head) {
        snprintf(out, size, "score.%s", element == adapter->head_bias ? "bias" : "weight");
        return;
    }
    for (size_t pair = pairs_of(model); pair-- > 0;) {
        const psoup__lora *lora = &adapter->lora[pair];
        if (lora->rank == 0 || element < lora->a)
            continue;
        snprintf(out, size, "model.layers.%zu.%s.lora_%c", pair / PSOUP__LINEARS,
                 psoup__linear_names[pair % PSOUP__LINEARS], element < lora->b ? 'A' : 'B');
        return;
    }
}

psoup_status psoup__adapter_may_train(const psoup_model *model, const psoup__adapter *adapter, bool head,
                                      psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t count = adapter->count - (adapter->head && !head ? (size_t)model->config.hidden_size + 1 : 0);
    float *piece = psoup__alloc_unset(model->context, PSOUP__PIECE, sizeof(float), error);
    char tensor[96];
    if (!piece)
        return PSOUP_ERROR_MEMORY;
    for (size_t first = 0; first < count; first += PSOUP__PIECE) {
        size_t n = count - first < PSOUP__PIECE ? count - first : PSOUP__PIECE;
        PSOUP__TRY(model->be->ops->read(model->be, piece, adapter->data + first, n * sizeof(float), error));
        for (size_t i = 0; i < n; i++) {
            if (isfinite(piece[i]))
                continue;
            name_tensor(model, adapter, first + i, tensor, sizeof tensor);
            status = psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                 "adapter '%s' cannot be trained: its tensor %s holds %g: expected finite numbers",
                                 adapter->name, tensor, isnan(piece[i]) ? (double)NAN : (double)piece[i]);
            goto fail;
        }
    }
fail:
    psoup__free(model->context, piece);
    return status;
}

/* ---- by name ---------------------------------------------------------------------------------- */

int32_t psoup_model_adapters(const psoup_model *model) {
    return model->n_adapters;
}

int32_t psoup_model_find_adapter(const psoup_model *model, const char *name) {
    for (int32_t i = 0; name && i < model->n_adapters; i++)
        if (strcmp(model->adapters[i]->name, name) == 0)
            return i;
    return -1;
}

psoup__adapter *psoup__model_adapter(const psoup_model *model, const char *name) {
    int32_t index = psoup_model_find_adapter(model, name);
    return index < 0 ? NULL : model->adapters[index];
}

const char *psoup_model_adapter_name(const psoup_model *model, int32_t index) {
    return index >= 0 && index < model->n_adapters ? model->adapters[index]->name : NULL;
}

psoup_status psoup_model_remove_adapter(psoup_model *model, const char *name, psoup_error *error) {
    psoup__adapter *adapter = NULL;
    psoup_status status = find_or_fail(model, name, &adapter, error);
    if (status != PSOUP_OK)
        return status;
    int32_t index = psoup_model_find_adapter(model, name);
    model->n_adapters--;
    model->edition++;
    memmove(model->adapters + index, model->adapters + index + 1,
            (size_t)(model->n_adapters - index) * sizeof *model->adapters);
    free_adapter(model, adapter);
    return PSOUP_OK;
}

psoup_status psoup_model_adapter_data(const psoup_model *model, const char *name,
                                      const float **data, size_t *count, psoup_error *error) {
    psoup__adapter *adapter = NULL;
    psoup_status status = find_or_fail(model, name, &adapter, error);
    if (status != PSOUP_OK)
        return status;
    if (!adapter->host)
        adapter->host = psoup__alloc(model->context, adapter->count, sizeof(float), error);
    if (!adapter->host)
        return PSOUP_ERROR_MEMORY;
    status = model->be->ops->read(model->be, adapter->host, adapter->data,
                                  adapter->count * sizeof(float), error);
    if (status == PSOUP_OK) {
        *data = adapter->host;
        *count = adapter->count;
    }
    return status;
}
