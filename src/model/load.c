/* Reading a Hugging Face model directory, or a GGUF file. */
#include "model/model.h"

#include <float.h>
#include <math.h>
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

static psoup_status not_finite(const char *path, const psoup__parameter *p, psoup_error *error) {
    return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: tensor %s holds NaN or infinite values", path, p->name);
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
    if (tensor->data && has_non_finite(model->context, tensor, p->count)) /* else see check_piece */
        return not_finite(path, p, error);
    return PSOUP_OK;
}

static bool ends_with(const char *text, const char *end) {
    size_t a = strlen(text), b = strlen(end);
    return a >= b && strcmp(text + a - b, end) == 0;
}

/* A tensor that no weight of this architecture claims would be dropped silently: refuse it. */
static psoup_status refuse_extra(const psoup_model *model, bool blocks, psoup_error *error) {
    psoup__map *known = NULL;
    psoup_status status = psoup__map_create(model->context, psoup__weights_count(model->weights),
                                            &known, error);
    for (psoup__parameter p = {.next = 0}; status == PSOUP_OK && psoup__model_next(model, &p);)
        status = psoup__map_set(known, p.name, strlen(p.name), 1, NULL, error);
    for (size_t i = 0; status == PSOUP_OK && i < psoup__weights_count(model->weights); i++) {
        const char *name = psoup__weights_name(model->weights, i);
        char whole[160]; /* the weight that a part belongs to */
        bool ignored = ends_with(name, "rotary_emb.inv_freq") || /* old checkpoints' buffers */
                       (model->config.tie_word_embeddings && strcmp(name, "lm_head.weight") == 0) ||
                       (blocks && psoup__bnb_part(name, whole, sizeof whole) &&
                        psoup__map_get(known, whole, strlen(whole), &(int64_t){0}));
        if (!ignored && !psoup__map_get(known, name, strlen(name), &(int64_t){0}))
            status = psoup__fail(error, PSOUP_ERROR_FORMAT,
                                 "%s: tensor %s belongs to no weight that config.json describes",
                                 psoup__weights_path(model->weights), name);
    }
    psoup__map_free(known);
    return status;
}

/* What was read of a tensor that is to become such a dtype: finite numbers, and in its range. */
static psoup_status check_piece(const psoup_model *model, const psoup__parameter *p, psoup_dtype dtype,
                                const float *piece, size_t n, psoup_error *error) {
    const float most = psoup__dtype_is_blocks(dtype) ? FLT_MAX : psoup__dtype_largest(dtype);
    const char *path = psoup__weights_path(model->weights);
    bool good = true;
    for (size_t i = 0; i < n; i++)
        good &= fabsf(piece[i]) <= most;
    for (size_t i = 0; !good && i < n; i++)
        if (!(fabsf(piece[i]) <= FLT_MAX))
            return not_finite(path, p, error);
    for (size_t i = 0; !good && i < n; i++)
        if (fabsf(piece[i]) > most)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: tensor %s: %g does not fit %s", path, p->name,
                               (double)piece[i], psoup_dtype_name(dtype));
    return PSOUP_OK;
}

static psoup_status copy_vector(psoup_model *model, const psoup__parameter *p,
                                const psoup__tensor *tensor, psoup_error *error) {
    float *values = psoup__alloc(model->context, p->count, sizeof(float), error);
    if (!values)
        return PSOUP_ERROR_MEMORY;
    psoup__tensor_read(model->context, tensor, 0, p->count, values);
    psoup_status status = check_piece(model, p, PSOUP_F32, values, p->count, error);
    if (status == PSOUP_OK)
        model->be->ops->write(model->be, *p->vector, values, p->count * sizeof(float));
    psoup__free(model->context, values);
    return status;
}

/* Bytes that the device takes as they are. */
static bool same_bytes(const psoup__parameter *p, const psoup__tensor *tensor) {
    return tensor->data && tensor->dtype == p->weight->dtype && tensor->heads == 0;
}

static psoup_status copy_matrix(psoup_model *model, const psoup__parameter *p,
                                const psoup__tensor *tensor, psoup_error *error) {
    if (same_bytes(p, tensor)) {
        void *to = (void *)(uintptr_t)p->weight->data; /* ours: never the files */
        model->be->ops->write(model->be, to, tensor->data, tensor->bytes);
        return PSOUP_OK;
    }
    psoup_status status = PSOUP_OK;
    float *piece = psoup__alloc(model->context, 2 * (size_t)PSOUP__PIECE, sizeof(float), error);
    if (!piece)
        return PSOUP_ERROR_MEMORY;
    for (size_t first = 0; status == PSOUP_OK && first < p->count; first += PSOUP__PIECE) {
        size_t n = p->count - first < PSOUP__PIECE ? p->count - first : PSOUP__PIECE;
        psoup__tensor_read(model->context, tensor, first, n, piece);
        status = check_piece(model, p, p->weight->dtype, piece, n, error);
        if (status == PSOUP_OK)
            psoup__parameter_write(model, p, first, n, piece, piece + PSOUP__PIECE);
    }
    psoup__free(model->context, piece);
    return status;
}

/* A linear of blocks, as they are or as their values. */
static psoup_status copy_blocks(psoup_model *model, const psoup__parameter *p, psoup_dtype dtype, psoup_error *error) {
    psoup__bnb linear;
    psoup_status status = psoup__bnb_find(model->context, model->weights, p->name, dtype, p->rows, p->columns, &linear,
                                          error);
    if (status != PSOUP_OK)
        return status;
    const bool keep = p->weight->dtype == dtype;
    float *piece = psoup__alloc(model->context, 3 * (size_t)PSOUP__PIECE, sizeof(float), error);
    if (!piece)
        return PSOUP_ERROR_MEMORY;
    float *scales = piece + PSOUP__PIECE;
    uint8_t *codes = (uint8_t *)(scales + psoup__block_count(PSOUP__PIECE));
    for (size_t first = 0; status == PSOUP_OK && first < p->count; first += PSOUP__PIECE) {
        size_t n = p->count - first < PSOUP__PIECE ? p->count - first : PSOUP__PIECE;
        psoup__bnb_read(model->context, &linear, first, n, codes, scales);
        psoup__blocks_read(model->context, &(psoup__blocks){dtype, codes, scales}, 0, n, piece);
        status = check_piece(model, p, p->weight->dtype, piece, n, error);
        if (status == PSOUP_OK && keep)
            psoup__parameter_write_blocks(model, p, first, n, codes, scales);
        else if (status == PSOUP_OK)
            psoup__parameter_write(model, p, first, n, piece, piece + 2 * (size_t)PSOUP__PIECE);
    }
    psoup__free(model->context, piece);
    return status;
}

/* ---- the model -------------------------------------------------------------------------------- */

/* Checks the tensors and finds the dtype of the matrices that are no blocks in the files (f32 holds any mixture
 * exactly), and whether they can be read in place: where they lie at multiples of their items, in order, and the
 * ops can. */
static psoup_status survey(psoup_model *model, psoup_dtype blocks, bool *mappable, psoup_error *error) {
    psoup_status status;
    bool one_dtype = true;
    psoup_dtype dtype = (psoup_dtype)model->config.torch_dtype;
    *mappable = model->be->ops->on_host;
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);) {
        const psoup__tensor *tensor = psoup__weights_find(model->weights, p.name);
        if (blocks && psoup__is_linear(model, p.weight))
            continue;
        PSOUP__TRY(check_tensor(model, &p, tensor, error));
        if (!p.weight)
            continue;
        psoup_dtype exact = tensor->dtype == PSOUP_Q8_0 ? PSOUP_F32 : tensor->dtype;
        if (p.weight == &model->embed)
            dtype = exact;
        one_dtype = one_dtype && exact == dtype;
        *mappable = *mappable && tensor->data && tensor->dtype == exact && tensor->heads == 0 &&
                    (uintptr_t)tensor->data % psoup_dtype_size(exact) == 0;
    }
    PSOUP__TRY(refuse_extra(model, blocks != 0, error));
    /* What the files hold, whatever config.json says. */
    model->config.torch_dtype = one_dtype ? (int32_t)dtype : PSOUP_F32;
    return PSOUP_OK;
fail:
    return status;
}

psoup_status psoup__model_read(psoup_model *model, const char *directory, int32_t asked, psoup_error *error) {
    psoup_status status;
    psoup_model_config *config = &model->config;
    const psoup_dtype blocks = (psoup_dtype)config->linear_dtype; /* of the files; or 0 */
    const bool convert = asked >= 0 || blocks;
    bool mappable;
    if (blocks && (asked == PSOUP_INT8 || asked == PSOUP_NF4) && asked != (int32_t)blocks)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: its linears are %s; they become that, f32, f16 or bf16, not %s", directory,
                           psoup_dtype_name(blocks), psoup_dtype_name((psoup_dtype)asked));
    if (convert)
        PSOUP__TRY(psoup__weights_open(model->context, directory, "model", 0, 0, &model->weights, error));
    else
        PSOUP__TRY(psoup__weights_map(model->context, directory, "model", &model->weights, error));
    PSOUP__TRY(survey(model, blocks, &mappable, error));
    if (asked == PSOUP_INT8 || asked == PSOUP_NF4)
        config->linear_dtype = asked;
    else if (asked >= 0) {
        config->linear_dtype = 0;
        config->torch_dtype = asked;
    }
    PSOUP__TRY(psoup__model_store(model, !mappable, error));
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);) {
        const psoup__tensor *tensor = psoup__weights_find(model->weights, p.name);
        if (!p.weight) {
            PSOUP__TRY(copy_vector(model, &p, tensor, error));
        } else if (blocks && psoup__is_linear(model, p.weight)) {
            PSOUP__TRY(copy_blocks(model, &p, blocks, error));
        } else if (mappable) {
            p.weight->dtype = tensor->dtype;
            p.weight->data = tensor->data;
        } else {
            PSOUP__TRY(copy_matrix(model, &p, tensor, error));
        }
    }
    if (config->tie_word_embeddings) {
        model->lm_head.dtype = model->embed.dtype;
        model->lm_head.data = model->embed.data;
    }
    if (convert)
        PSOUP__TRY(psoup__weights_check(model->weights, error));
    if (!mappable) {
        psoup__weights_free(model->weights);
        model->weights = NULL;
    }
    return PSOUP_OK;
fail:
    return status;
}
