/* What a run is: everything that must be the same for it to go on from a checkpoint. */
#include "train/checkpoint.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

_Static_assert(sizeof(psoup_model_config) ==
                   offsetof(psoup_model_config, more_eos_token_ids) + 9 * sizeof(int32_t),
               "a configuration has no padding: its bytes are hashed");

static psoup_status set(psoup__checkpoint *c, const char *key, psoup_json *value, psoup_error *error) {
    return psoup_json_set(c->run, key, value) == 0 ? PSOUP_OK : psoup__out_of_memory(error, 256);
}

psoup_status psoup__run_text(psoup__checkpoint *c, const char *key, psoup_error *error,
                             const char *format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    return set(c, key, psoup_json_new_string(text), error);
}

psoup_status psoup__run_options(psoup__checkpoint *c, const psoup_field *fields, const void *options,
                                psoup_error *error) {
    static const char *const free[] = {"metrics", "samples", "checkpoint_dir", "checkpoint_every",
                                       "checkpoint_keep", "resume", "join",
                                       "gradient_checkpointing"};
    psoup_status status = PSOUP_OK;
    psoup_json *all = psoup_fields_json(fields, options);
    const char *key = NULL;
    if (!all)
        return psoup__out_of_memory(error, 0);
    for (const psoup_json *value; status == PSOUP_OK && (value = psoup_json_next(all, &key));) {
        bool skip = false;
        for (size_t i = 0; i < sizeof(free) / sizeof(free[0]); i++)
            skip = skip || strcmp(key, free[i]) == 0;
        if (!skip)
            status = set(c, key, psoup_json_copy(value), error);
    }
    psoup_json_free(all);
    return status;
}

psoup_status psoup__run_base(psoup__checkpoint *c, const char *key, const psoup_model *model,
                             psoup_error *error) {
    psoup_status status = PSOUP_OK;
    char text[PSOUP__HASH_TEXT];
    psoup__hash *hash = psoup__hash_create(c->context, error);
    float *piece = psoup__alloc(c->context, 2 * (size_t)PSOUP__PIECE, sizeof(float), error);
    if (!hash || !piece) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    psoup__hash_update(hash, &model->config, sizeof(model->config));
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);)
        for (size_t first = 0; first < p.count; first += PSOUP__PIECE) {
            size_t n = p.count - first < PSOUP__PIECE ? p.count - first : PSOUP__PIECE;
            PSOUP__TRY(psoup__parameter_read(model, &p, first, n, piece, piece + PSOUP__PIECE, error));
            psoup__hash_update(hash, piece, n * sizeof(float));
        }
    psoup__hash_text(hash, text);
    PSOUP__TRY(psoup__run_text(c, key, error, "%s", text));
fail:
    psoup__free(c->context, piece);
    psoup__free(c->context, hash);
    return status;
}

psoup_status psoup__run_adapter(psoup__checkpoint *c, const char *key, const psoup_model *model,
                                const psoup__adapter *adapter, bool weights, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    char text[PSOUP__HASH_TEXT];
    psoup__hash *hash = psoup__hash_create(c->context, error);
    if (!hash)
        return PSOUP_ERROR_MEMORY;
    size_t pairs = (size_t)model->config.num_hidden_layers * PSOUP__LINEARS;
    for (size_t i = 0; i < pairs; i++) {
        psoup__hash_update(hash, &adapter->lora[i].rank, sizeof(adapter->lora[i].rank));
        psoup__hash_update(hash, &adapter->lora[i].scale, sizeof(adapter->lora[i].scale));
    }
    for (size_t at = 0; weights && at < adapter->count; at += PSOUP__PIECE) {
        size_t n = adapter->count - at < PSOUP__PIECE ? adapter->count - at : PSOUP__PIECE;
        PSOUP__TRY(model->be->ops->read(model->be, c->buffer, adapter->data + at, n * sizeof(float),
                                        error));
        psoup__hash_update(hash, c->buffer, n * sizeof(float));
    }
    psoup__hash_text(hash, text);
    PSOUP__TRY(psoup__run_text(c, key, error, "%.200s of rank %d and alpha %g, %s", adapter->name,
                               adapter->rank, (double)adapter->alpha, text));
fail:
    psoup__free(c->context, hash);
    return status;
}

psoup_status psoup__run_rows(psoup__checkpoint *c, const char *key, size_t n, const psoup__hash *hash,
                             psoup_error *error) {
    char text[PSOUP__HASH_TEXT];
    psoup__hash_text(hash, text);
    return psoup__run_text(c, key, error, "%zu rows, %s", n, text);
}

void psoup__hash_tokens(psoup__hash *hash, const int32_t *tokens, size_t n) {
    psoup__hash_update(hash, &n, sizeof(n));
    if (n)
        psoup__hash_update(hash, tokens, n * sizeof(*tokens));
}
