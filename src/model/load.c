/* Reading a Hugging Face model directory, or a GGUF file. */
#include "model/model.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

/* ---- NaN and infinity ------------------------------------------------------------------------- */

typedef struct scan {
    const psoup__tensor *tensor;
    size_t elements;
    atomic_bool found;
} scan;

enum { SCAN_PIECE = 1 << 18 };

/* All exponent bits set: works on raw bits, so a bf16 file is scanned at the speed of memory. */
static void scan_piece(void *arg, size_t task, int worker) {
    scan *s = arg;
    size_t first = task * SCAN_PIECE;
    size_t end = s->elements - first < SCAN_PIECE ? s->elements : first + SCAN_PIECE;
    bool found = false;
    if (s->tensor->dtype == PSOUP_F32) {
        for (size_t i = first; i < end; i++) {
            uint32_t bits;
            memcpy(&bits, (const char *)s->tensor->data + 4 * i, 4);
            found |= (bits & 0x7f800000u) == 0x7f800000u;
        }
    } else if (s->tensor->dtype == PSOUP_Q8_0) { /* SCAN_PIECE is whole blocks */
        for (size_t i = first / PSOUP__Q8_BLOCK; i < end / PSOUP__Q8_BLOCK; i++) {
            uint16_t scale;
            memcpy(&scale, (const char *)s->tensor->data + PSOUP__Q8_BYTES * i, 2);
            found |= (scale & 0x7c00) == 0x7c00;
        }
    } else {
        uint16_t mask = s->tensor->dtype == PSOUP_F16 ? 0x7c00 : 0x7f80;
        for (size_t i = first; i < end; i++) {
            uint16_t bits;
            memcpy(&bits, (const char *)s->tensor->data + 2 * i, 2);
            found |= (bits & mask) == mask;
        }
    }
    if (found)
        atomic_store(&s->found, true);
}

static bool has_non_finite(psoup_context *context, const psoup__tensor *tensor, size_t elements) {
    scan s = {.tensor = tensor, .elements = elements};
    atomic_init(&s.found, false);
    psoup__parallel(context, (elements + SCAN_PIECE - 1) / SCAN_PIECE, scan_piece, &s);
    return atomic_load(&s.found);
}

/* ---- tensors ---------------------------------------------------------------------------------- */

static psoup_status check_tensor(const psoup_model *model, const psoup__parameter *p,
                                 const psoup__tensor *tensor, psoup_error *error) {
    const char *path = psoup__weights_path(model->weights);
    if (!tensor)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: tensor %s is missing", path, p->name);
    bool right = p->weight ? tensor->rank == 2 && tensor->shape[0] == p->rows &&
                                 tensor->shape[1] == p->columns
                           : tensor->rank == 1 && tensor->shape[0] == p->rows;
    if (!right) {
        char shape[128] = "";
        for (int i = 0, at = 0; i < tensor->rank && at < 100; i++)
            at += snprintf(shape + at, sizeof shape - (size_t)at, i ? ", %lld" : "%lld",
                           (long long)tensor->shape[i]);
        if (p->weight)
            return psoup__fail(error, PSOUP_ERROR_FORMAT,
                               "%s: tensor %s has shape [%s], config.json asks for [%d, %d]", path,
                               p->name, shape, (int)p->rows, (int)p->columns);
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: tensor %s has shape [%s], config.json asks for [%d]", path, p->name,
                           shape, (int)p->rows);
    }
    if (tensor->dtype != PSOUP_F32 && tensor->dtype != PSOUP_F16 && tensor->dtype != PSOUP_BF16 &&
        tensor->dtype != PSOUP_Q8_0)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: tensor %s is %s; weights must be f32, f16, bf16 or q8_0", path, p->name,
                           psoup_dtype_name(tensor->dtype));
    if (has_non_finite(model->context, tensor, p->count))
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: tensor %s holds NaN or infinite values",
                           path, p->name);
    return PSOUP_OK;
}

static bool ends_with(const char *text, const char *end) {
    size_t a = strlen(text), b = strlen(end);
    return a >= b && strcmp(text + a - b, end) == 0;
}

/* A tensor that no weight of this architecture claims would be dropped silently: refuse it. */
static psoup_status refuse_extra(const psoup_model *model, psoup_error *error) {
    psoup__map *known = NULL;
    psoup_status status = psoup__map_create(model->context, psoup__weights_count(model->weights),
                                            &known, error);
    for (psoup__parameter p = {.next = 0}; status == PSOUP_OK && psoup__model_next(model, &p);)
        status = psoup__map_set(known, p.name, strlen(p.name), 1, NULL, error);
    for (size_t i = 0; status == PSOUP_OK && i < psoup__weights_count(model->weights); i++) {
        const char *name = psoup__weights_name(model->weights, i);
        bool ignored = ends_with(name, "rotary_emb.inv_freq") || /* old checkpoints' buffers */
                       (model->config.tie_word_embeddings && strcmp(name, "lm_head.weight") == 0);
        if (!ignored && !psoup__map_get(known, name, strlen(name), &(int64_t){0}))
            status = psoup__fail(error, PSOUP_ERROR_FORMAT,
                                 "%s: tensor %s belongs to no weight that config.json describes",
                                 psoup__weights_path(model->weights), name);
    }
    psoup__map_free(known);
    return status;
}

static psoup_status copy_vector(psoup_model *model, const psoup__parameter *p,
                                const psoup__tensor *tensor, psoup_error *error) {
    float *values = psoup__alloc(model->context, p->count, sizeof(float), error);
    if (!values)
        return PSOUP_ERROR_MEMORY;
    psoup__tensor_read(model->context, tensor, 0, p->count, values);
    model->be->ops->write(model->be, *p->vector, values, p->count * sizeof(float));
    psoup__free(model->context, values);
    return PSOUP_OK;
}

/* Bytes that the device takes as they are. */
static bool same_bytes(const psoup__parameter *p, const psoup__tensor *tensor) {
    return tensor->dtype == p->weight->dtype && tensor->heads == 0;
}

static psoup_status copy_matrix(psoup_model *model, const psoup__parameter *p,
                                const psoup__tensor *tensor, psoup_error *error) {
    if (same_bytes(p, tensor)) {
        void *to = (void *)(uintptr_t)p->weight->data; /* ours: never the files */
        model->be->ops->write(model->be, to, tensor->data, tensor->bytes);
        return PSOUP_OK;
    }
    float *piece = psoup__alloc(model->context, 2 * (size_t)PSOUP__PIECE, sizeof(float), error);
    if (!piece)
        return PSOUP_ERROR_MEMORY;
    for (size_t first = 0; first < p->count; first += PSOUP__PIECE) {
        size_t n = p->count - first < PSOUP__PIECE ? p->count - first : PSOUP__PIECE;
        psoup__tensor_read(model->context, tensor, first, n, piece);
        psoup__parameter_write(model, p, first, n, piece, piece + PSOUP__PIECE);
    }
    psoup__free(model->context, piece);
    return PSOUP_OK;
}

psoup_status psoup__model_read(psoup_model *model, const char *directory, psoup_error *error) {
    psoup_status status = psoup__weights_map(model->context, directory, "model", &model->weights,
                                             error);
    if (status != PSOUP_OK)
        return status;
    /* Matrices are read in place when they lie at multiples of their items, in order, where the ops can. */
    bool mappable = model->be->ops->on_host;
    bool one_dtype = true;
    psoup_dtype dtype = (psoup_dtype)model->config.torch_dtype;
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);) {
        const psoup__tensor *tensor = psoup__weights_find(model->weights, p.name);
        PSOUP__TRY(check_tensor(model, &p, tensor, error));
        if (!p.weight)
            continue;
        psoup_dtype exact = tensor->dtype == PSOUP_Q8_0 ? PSOUP_F32 : tensor->dtype;
        if (p.weight == &model->embed)
            dtype = exact;
        one_dtype = one_dtype && exact == dtype;
        mappable = mappable && tensor->dtype == exact && tensor->heads == 0 &&
                   (uintptr_t)tensor->data % psoup_dtype_size(exact) == 0;
    }
    PSOUP__TRY(refuse_extra(model, error));
    /* What the files hold, whatever config.json says; f32 holds any mixture exactly. */
    model->config.torch_dtype = one_dtype ? (int32_t)dtype : PSOUP_F32;
    PSOUP__TRY(psoup__model_store(model, !mappable, error));
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);) {
        const psoup__tensor *tensor = psoup__weights_find(model->weights, p.name);
        if (!p.weight) {
            PSOUP__TRY(copy_vector(model, &p, tensor, error));
        } else if (mappable) {
            p.weight->dtype = tensor->dtype;
            p.weight->data = tensor->data;
        } else {
            PSOUP__TRY(copy_matrix(model, &p, tensor, error));
        }
    }
    if (model->config.tie_word_embeddings) {
        model->lm_head.dtype = model->embed.dtype;
        model->lm_head.data = model->embed.data;
    }
    if (!mappable) {
        psoup__weights_free(model->weights);
        model->weights = NULL;
    }
    return PSOUP_OK;
fail:
    return status;
}
