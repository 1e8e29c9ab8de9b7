/* LoRA adapters in GGUF files. llama.cpp multiplies every pair by adapter.lora.alpha / rank, or by 1 where
 * alpha is 0 (src/llama-adapter.h, llama_adapter_lora_weight::get_scale); there is no other scale. */
#include "format/gguf.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { PIECE = 1 << 14 }; /* elements read at once */

/* ---- reading ------------------------------------------------------------------------------------ */

psoup_status psoup__gguf_scale(const psoup__gguf *file, psoup__peft_pair *pair, psoup_error *error) {
    const char *path = psoup__gguf_path(file), *key = "adapter.lora.alpha";
    double alpha = psoup__gguf_real(file, key, NAN);
    int64_t rank = pair->a.shape[0];
    if (!psoup__gguf_is(file, "adapter.type", "lora"))
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "%s: adapter.type: expected \"lora\"", path);
    if (psoup__gguf_get(file, "adapter.alora.invocation_tokens") != NULL)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: adapter.alora.invocation_tokens: adapters that wait for certain tokens are "
                           "not supported",
                           path);
    if (psoup__gguf_get(file, key) == NULL)
        alpha = 0;
    if (!(fabs(alpha) <= (double)FLT_MAX))
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %s: expected a number that f32 can hold", path, key);
    if (rank < 1 || rank > 1 << 20)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %.200s: %lld is no rank", path, pair->module,
                           (long long)rank);
    pair->rank = (int32_t)rank;
    pair->scale = alpha != 0 ? (float)(alpha / (double)rank) : 1;
    return PSOUP_OK;
}

psoup_status psoup__gguf_adapter_config(const psoup__gguf *file, int32_t rank, psoup_json **out,
                                        psoup_error *error) {
    double alpha = psoup__gguf_real(file, "adapter.lora.alpha", 0);
    psoup_json *config = psoup_json_new_object();
    int failed = psoup_json_set(config, "peft_type", psoup_json_new_string("LORA"));
    failed |= psoup_json_set(config, "r", psoup_json_new_integer(rank));
    failed |= psoup_json_set(config, "lora_alpha", psoup_json_new_real(alpha != 0 ? alpha : rank));
    *out = failed ? NULL : config;
    if (failed)
        psoup_json_free(config);
    return failed ? psoup__out_of_memory(error, 0) : PSOUP_OK;
}

/* ---- writing ------------------------------------------------------------------------------------ */

/* The scale that llama.cpp gives a pair. */
static float given_scale(float alpha, const psoup__peft_pair *pair) {
    return (float)((double)alpha / pair->rank);
}

/* The alpha that leaves most pairs as they are: one that is the adapter's own, or of one of its first
 * pairs. 0 means 1 / 1 there and is not used. */
static float choose_alpha(const psoup__peft_output *adapter) {
    float best = adapter->alpha != 0 ? adapter->alpha : 1;
    size_t most = 0, tries = adapter->n < 64 ? adapter->n : 64;
    for (size_t i = 0; i <= tries; i++) {
        float alpha = best;
        if (i > 0)
            alpha = (float)((double)adapter->pairs[i - 1].scale * adapter->pairs[i - 1].rank);
        size_t same = 0;
        for (size_t j = 0; j < adapter->n; j++)
            same += given_scale(alpha, &adapter->pairs[j]) == adapter->pairs[j].scale;
        if (alpha != 0 && isfinite(alpha) && same > most) {
            best = alpha;
            most = same;
        }
    }
    return best;
}

static psoup_status declare(psoup__gguf_writer *writer, const psoup__peft_pair *pair, bool b,
                            psoup_error *error) {
    const psoup__tensor *tensor = b ? &pair->b : &pair->a;
    char name[256], gguf[PSOUP__GGUF_NAME];
    bool known = psoup__gguf_from_hf(pair->module, gguf) && strcmp(gguf, "token_embd") != 0;
    int n = snprintf(name, sizeof name, "%s.weight.lora_%c", pair->module, b ? 'b' : 'a');
    if (!known || n < 0 || (size_t)n >= sizeof name)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: %.200s has no counterpart in GGUF adapters of llama and qwen2",
                           psoup__gguf_writer_path(writer), pair->module);
    return psoup__gguf_declare(writer, name,
                               psoup__gguf_dtype(tensor->dtype, tensor->rank, tensor->shape), tensor->rank,
                               tensor->shape, error);
}

/* scale · tensor, in f32, rounded once. */
static psoup_status write_scaled(psoup__gguf_writer *writer, const psoup__tensor *tensor, float scale,
                                 const char *module, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = psoup__gguf_writer_context(writer);
    psoup_dtype dtype = psoup__gguf_dtype(tensor->dtype, tensor->rank, tensor->shape);
    size_t elements = 0, bytes;
    float *values = psoup__alloc(context, 2 * (size_t)PIECE, sizeof *values, error);
    if (values == NULL)
        return PSOUP_ERROR_MEMORY;
    void *rounded = values + PIECE;
    float largest = psoup__dtype_largest(dtype);
    psoup__tensor_elements(tensor, &elements);
    for (size_t at = 0; at < elements; at += PIECE) {
        size_t n = elements - at < PIECE ? elements - at : PIECE;
        bool fits = true;
        psoup__tensor_read(context, tensor, at, n, values);
        for (size_t i = 0; i < n; i++) {
            values[i] *= scale;
            fits &= fabsf(values[i]) <= largest;
        }
        if (!fits) {
            status = psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                 "%s: %.200s: a factor is NaN, infinite or too large for %s",
                                 psoup__gguf_writer_path(writer), module, psoup_dtype_name(dtype));
            goto fail;
        }
        psoup__from_f32(context, rounded, dtype, values, n);
        psoup__dtype_bytes(dtype, n, &bytes);
        PSOUP__TRY(psoup__gguf_write(writer, rounded, bytes, error));
    }
fail:
    psoup__free(context, values);
    return status;
}

static psoup_status write_metadata(psoup__gguf_writer *writer, const psoup__peft_output *adapter,
                                   const char *architecture, const psoup__gguf_layout *layout,
                                   float alpha, psoup_error *error) {
    psoup_status status;
    char key[96];
    const psoup_dtype dtype = adapter->n > 0 ? adapter->pairs[0].a.dtype : PSOUP_F32;
    PSOUP__TRY(psoup__gguf_set_string(writer, "general.architecture", architecture, error));
    PSOUP__TRY(psoup__gguf_set_string(writer, "general.type", "adapter", error));
    PSOUP__TRY(psoup__gguf_set_uint32(writer, "general.file_type", psoup__gguf_file_type(dtype), error));
    PSOUP__TRY(psoup__gguf_set_uint32(writer, "general.quantization_version", 2, error));
    PSOUP__TRY(psoup__gguf_set_string(writer, "adapter.type", "lora", error));
    PSOUP__TRY(psoup__gguf_set_float32(writer, "adapter.lora.alpha", alpha, error));
    if (layout->heads > 0) { /* not llama.cpp's: so that a reader can put the rows in order */
        snprintf(key, sizeof key, "%s.attention.head_count", architecture);
        PSOUP__TRY(psoup__gguf_set_uint32(writer, key, (uint32_t)layout->heads, error));
        snprintf(key, sizeof key, "%s.attention.head_count_kv", architecture);
        PSOUP__TRY(psoup__gguf_set_uint32(writer, key, (uint32_t)layout->kv_heads, error));
    }
    for (const char *const *m = adapter->metadata; m != NULL && *m != NULL; m += 2)
        PSOUP__TRY(psoup__gguf_set_string(writer, m[0], m[1], error));
    return PSOUP_OK;
fail:
    return status;
}

psoup_status psoup__gguf_adapter_write(psoup_context *context, const char *path,
                                       const psoup__peft_output *adapter, const char *architecture,
                                       int32_t heads, int32_t kv_heads, psoup_error *error) {
    psoup_status status;
    psoup__gguf_writer *writer = NULL;
    bool llama = strcmp(architecture, "llama") == 0;
    const psoup__gguf_layout layout = {.permuted = llama, .heads = heads, .kv_heads = kv_heads};
    float alpha = choose_alpha(adapter);
    if (!llama && strcmp(architecture, "qwen2") != 0)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "%s: architecture \"%.60s\"; expected llama or qwen2",
                           path, architecture);
    if (adapter->head != NULL)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: a scalar head (score) has no place in a GGUF adapter", path);
    PSOUP__TRY(psoup__gguf_create(context, path, &writer, error));
    psoup__gguf_set_layout(writer, &layout);
    PSOUP__TRY(write_metadata(writer, adapter, architecture, &layout, alpha, error));
    for (size_t i = 0; i < 2 * adapter->n; i++)
        PSOUP__TRY(declare(writer, &adapter->pairs[i / 2], i % 2, error));
    PSOUP__TRY(psoup__gguf_begin(writer, error));
    for (size_t i = 0; i < adapter->n; i++) {
        const psoup__peft_pair *pair = &adapter->pairs[i];
        float given = given_scale(alpha, pair);
        float scale = given == pair->scale ? 1 : (float)((double)pair->scale * pair->rank / (double)alpha);
        PSOUP__TRY(write_scaled(writer, &pair->a, 1, pair->module, error));
        PSOUP__TRY(write_scaled(writer, &pair->b, scale, pair->module, error));
    }
    PSOUP__TRY(psoup__gguf_commit(writer, error));
fail:
    psoup__gguf_writer_free(writer);
    return status;
}
