/* config.json's contents as GGUF metadata, and back. Keys and meanings: llama.cpp,
 * gguf-py/gguf/constants.py and src/llama-model.cpp (load_hparams); which Hugging Face field becomes
 * which key: conversion/base.py and conversion/llama.py. */
#include "format/gguf.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- the rotation of Llama 3.1 ------------------------------------------------------------------ */

/* By how much each pair's frequency is divided: transformers, modeling_rope_utils.py,
 * _compute_llama3_parameters; llama.cpp keeps these numbers in the tensor rope_freqs.weight. */
static void llama3_factors(const psoup_model_config *c, float *out /* [head_dim / 2] */) {
    const double pi = 3.14159265358979323846;
    double factor = c->rope_factor, low = c->rope_low_freq_factor, high = c->rope_high_freq_factor;
    double original = c->rope_original_max_position;
    for (int32_t i = 0; i < c->head_dim / 2; i++) {
        double wavelength = 2 * pi * pow(c->rope_theta, 2.0 * i / c->head_dim);
        double smooth = (original / wavelength - low) / (high - low);
        if (wavelength < original / high)
            out[i] = 1;
        else if (wavelength > original / low)
            out[i] = (float)factor;
        else
            out[i] = (float)(1 / ((1 - smooth) / factor + smooth));
    }
}

/* The other way: a scaling whose factors the tensor holds, found by trying the original lengths and bounds
 * that models have, the length that the file names first. Where several fit they mean the same. */
static psoup_status read_llama3(const psoup__gguf *file, const psoup__tensor *freqs,
                                psoup_model_config *c, psoup_error *error) {
    const int32_t lengths[] = {c->rope_original_max_position, 8192, 4096, 2048, 16384, 32768, 1024, 512, 256,
                               128, 64, 32};
    static const float lows[] = {1, 2, 0.5f}, highs[] = {4, 8, 2};
    float have[PSOUP__GGUF_MAX_PAIRS], want[PSOUP__GGUF_MAX_PAIRS];
    int32_t pairs = c->head_dim / 2;
    if (freqs->dtype != PSOUP_F32 || freqs->rank != 1 || freqs->shape[0] != pairs || pairs > PSOUP__GGUF_MAX_PAIRS)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: tensor rope_freqs.weight: expected %d f32 values",
                           psoup__gguf_path(file), (int)pairs);
    psoup__tensor_bytes(freqs, 0, (size_t)pairs * sizeof *have, have);
    if (file->file.failed)
        return psoup__file_check(&file->file, "tensor rope_freqs.weight: ", error);
    c->rope_factor = 1;
    for (int32_t i = 0; i < pairs; i++)
        c->rope_factor = have[i] > c->rope_factor ? have[i] : c->rope_factor;
    for (size_t l = 0; l < sizeof lows / sizeof *lows; l++)
        for (size_t h = 0; h < sizeof highs / sizeof *highs; h++)
            for (size_t n = 0; n < sizeof lengths / sizeof *lengths; n++) {
                bool same = highs[h] > lows[l];
                c->rope_scaling = PSOUP_ROPE_LLAMA3;
                c->rope_original_max_position = lengths[n];
                c->rope_low_freq_factor = lows[l];
                c->rope_high_freq_factor = highs[h];
                llama3_factors(c, want);
                for (int32_t i = 0; i < pairs && same; i++)
                    same = fabsf(have[i] - want[i]) <= 1e-4f * want[i];
                if (same)
                    return PSOUP_OK;
            }
    return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                       "%s: tensor rope_freqs.weight: no llama3 scaling gives these factors",
                       psoup__gguf_path(file));
}

/* ---- from a file -------------------------------------------------------------------------------- */

static const char *const architectures[] = {"llama", "qwen2"};

/* "llama.block_count" of "block_count". */
static const char *key_of(bool qwen2, const char *field, char out[96]) {
    snprintf(out, 96, "%s.%s", architectures[qwen2], field);
    return out;
}

static psoup_status read_sizes(const psoup__gguf *file, bool qwen2, psoup_model_config *c,
                               psoup_error *error) {
    const psoup__tensor *embedding = psoup__gguf_find(file, "token_embd.weight");
    const psoup__gguf_value *tokens = psoup__gguf_get(file, "tokenizer.ggml.tokens");
    int64_t rows = tokens != NULL && tokens->type == PSOUP__GGUF_ARRAY ? (int64_t)tokens->count : -1;
    if (embedding != NULL && embedding->rank == 2)
        rows = embedding->shape[0];
    const struct {
        const char *field;
        int32_t *out;
        int64_t otherwise; /* −1: must be there */
    } sizes[] = {{"vocab_size", &c->vocab_size, rows},
                 {"embedding_length", &c->hidden_size, -1},
                 {"feed_forward_length", &c->intermediate_size, -1},
                 {"block_count", &c->num_hidden_layers, -1},
                 {"attention.head_count", &c->num_attention_heads, -1},
                 {"attention.head_count_kv", &c->num_key_value_heads, 0},
                 {"attention.key_length", &c->head_dim, 0},
                 {"context_length", &c->max_position_embeddings, -1}};
    char key[96];
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        key_of(qwen2, sizes[i].field, key);
        int64_t value = psoup__gguf_integer(file, key, sizes[i].otherwise);
        if (value < 0 || value > INT32_MAX)
            return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %s: missing, or no natural number",
                               psoup__gguf_path(file), key);
        *sizes[i].out = (int32_t)value;
    }
    int64_t experts = psoup__gguf_integer(file, key_of(qwen2, "expert_count", key), 0);
    int64_t window = psoup__gguf_integer(file, key_of(qwen2, "attention.sliding_window", key), INT32_MAX);
    if (experts > 0 || window < c->max_position_embeddings)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: mixtures of experts and attention over a window are not supported",
                           psoup__gguf_path(file));
    return PSOUP_OK;
}

static psoup_status read_rope(const psoup__gguf *file, bool qwen2, psoup_model_config *c,
                              psoup_error *error) {
    char key[96];
    const char *name = "none";
    size_t length = 4;
    const psoup__tensor *freqs = psoup__gguf_find(file, "rope_freqs.weight");
    c->rope_theta = (float)psoup__gguf_real(file, key_of(qwen2, "rope.freq_base", key), 10000);
    int64_t rotated = psoup__gguf_integer(file, key_of(qwen2, "rope.dimension_count", key), c->head_dim);
    if (rotated != c->head_dim)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: %s: %lld of %d dimensions are rotated; only all are supported",
                           psoup__gguf_path(file), key, (long long)rotated, (int)c->head_dim);
    psoup__gguf_string(file, key_of(qwen2, "rope.scaling.type", key), &name, &length);
    double linear = psoup__gguf_real(file, key_of(qwen2, "rope.scale_linear", key), 1);
    c->rope_factor = (float)psoup__gguf_real(file, key_of(qwen2, "rope.scaling.factor", key), linear);
    int64_t original = psoup__gguf_integer(
        file, key_of(qwen2, "rope.scaling.original_context_length", key), c->max_position_embeddings);
    c->rope_original_max_position = (int32_t)original;
    if (original < 1 || original > INT32_MAX)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %s: expected a positive number",
                           psoup__gguf_path(file), key);
    if (freqs != NULL)
        return read_llama3(file, freqs, c, error);
    if (length == 4 && memcmp(name, "yarn", 4) == 0) {
        double plain = 0.1 * log((double)c->rope_factor) + 1;
        double scale = psoup__gguf_real(file, key_of(qwen2, "rope.scaling.attn_factor", key), 1);
        c->rope_scaling = PSOUP_ROPE_YARN;
        c->rope_attention_factor = scale == 1 ? 0 : (float)(scale * plain);
        c->rope_beta_fast =
            (float)psoup__gguf_real(file, key_of(qwen2, "rope.scaling.yarn_beta_fast", key), 32);
        c->rope_beta_slow =
            (float)psoup__gguf_real(file, key_of(qwen2, "rope.scaling.yarn_beta_slow", key), 1);
    } else if ((length == 6 && memcmp(name, "linear", 6) == 0) || linear != 1) {
        c->rope_scaling = PSOUP_ROPE_LINEAR;
    } else if (length != 4 || memcmp(name, "none", 4) != 0) {
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: %s: \"%.*s\" is not supported; expected none, linear or yarn",
                           psoup__gguf_path(file), key_of(qwen2, "rope.scaling.type", key),
                           (int)(length < 60 ? length : 60), name);
    } else { /* what the context grew from says nothing then */
        c->rope_factor = 1;
        c->rope_original_max_position = 0;
    }
    return PSOUP_OK;
}

/* The ids that end a text: llama.cpp has one key for each kind. */
static void read_tokens(const psoup__gguf *file, psoup_model_config *c) {
    static const char *const more[] = {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"};
    bool spm = psoup__gguf_is(file, "tokenizer.ggml.model", "llama"); /* its defaults are 1 and 2 */
    const struct {
        const char *key;
        int32_t *out;
        int64_t otherwise;
    } ids[] = {{"tokenizer.ggml.bos_token_id", &c->bos_token_id, spm ? 1 : -1},
               {"tokenizer.ggml.eos_token_id", &c->eos_token_id, spm ? 2 : -1},
               {"tokenizer.ggml.padding_token_id", &c->pad_token_id, -1}};
    for (size_t i = 0; i < 3; i++) {
        int64_t id = psoup__gguf_integer(file, ids[i].key, ids[i].otherwise);
        *ids[i].out = id >= 0 && id < c->vocab_size ? (int32_t)id : -1;
    }
    int n = 0;
    for (size_t i = 0; i < 2; i++) {
        int64_t id = psoup__gguf_integer(file, more[i], -1);
        if (id >= 0 && id < c->vocab_size && id != c->eos_token_id)
            c->more_eos_token_ids[n++] = (int32_t)id;
    }
}

psoup_status psoup__gguf_read_config(const psoup__gguf *file, psoup_model_config *out,
                                     psoup_error *error) {
    psoup_status status;
    psoup_model_config *c = out;
    psoup__gguf_layout layout;
    char key[96];
    *c = (psoup_model_config)PSOUP_MODEL_CONFIG_INIT;
    PSOUP__TRY(psoup__gguf_layout_of(file, &layout, error));
    bool qwen2 = !layout.permuted;
    PSOUP__TRY(read_sizes(file, qwen2, c, error));
    double eps = psoup__gguf_real(file, key_of(qwen2, "attention.layer_norm_rms_epsilon", key), 0);
    c->rms_norm_eps = (float)eps;
    PSOUP__TRY(psoup__config_check(c, psoup__gguf_path(file), error));
    PSOUP__TRY(read_rope(file, qwen2, c, error));
    read_tokens(file, c);
    c->attention_bias = psoup__gguf_find(file, "blk.0.attn_output.bias") != NULL;
    c->qkv_bias = !c->attention_bias && psoup__gguf_find(file, "blk.0.attn_q.bias") != NULL;
    c->mlp_bias = psoup__gguf_find(file, "blk.0.ffn_up.bias") != NULL;
    c->tie_word_embeddings = psoup__gguf_find(file, "output.weight") == NULL;
    const psoup__tensor *embedding = psoup__gguf_find(file, "token_embd.weight");
    c->torch_dtype = PSOUP_F32; /* q8_0 becomes f16 where a dtype of torch is needed */
    if (embedding != NULL)
        c->torch_dtype = embedding->dtype == PSOUP_Q8_0 ? PSOUP_F16 : (int32_t)embedding->dtype;
    return psoup__config_check(c, psoup__gguf_path(file), error);
fail:
    return status;
}

/* ---- to a file ---------------------------------------------------------------------------------- */

static psoup_status write_rope(psoup__gguf_writer *writer, bool qwen2, const psoup_model_config *c,
                               psoup_error *error) {
    psoup_status status;
    char key[96];
    const char *path = psoup__gguf_writer_path(writer);
    float factors[PSOUP__GGUF_MAX_PAIRS];
    PSOUP__TRY(psoup__gguf_set_float32(writer, key_of(qwen2, "rope.freq_base", key), c->rope_theta, error));
    PSOUP__TRY(psoup__gguf_set_uint32(writer, key_of(qwen2, "rope.dimension_count", key),
                                      (uint32_t)c->head_dim, error));
    if (c->rope_scaling == PSOUP_ROPE_DEFAULT)
        return PSOUP_OK;
    if (c->rope_scaling == PSOUP_ROPE_DYNAMIC)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: rope_scaling \"dynamic\" has no equal in GGUF files", path);
    PSOUP__TRY(psoup__gguf_set_uint32(writer, key_of(qwen2, "rope.scaling.original_context_length", key),
                                      (uint32_t)c->rope_original_max_position, error));
    if (c->rope_scaling == PSOUP_ROPE_LLAMA3) {
        if (qwen2)
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "%s: llama.cpp reads rope_scaling \"llama3\" of llama models only", path);
        llama3_factors(c, factors);
        return psoup__gguf_add_vector(writer, "rope_freqs.weight", factors, c->head_dim / 2, error);
    }
    bool yarn = c->rope_scaling == PSOUP_ROPE_YARN;
    PSOUP__TRY(psoup__gguf_set_string(writer, key_of(qwen2, "rope.scaling.type", key),
                                      yarn ? "yarn" : "linear", error));
    PSOUP__TRY(psoup__gguf_set_float32(writer, key_of(qwen2, "rope.scaling.factor", key), c->rope_factor,
                                       error));
    if (!yarn)
        return PSOUP_OK;
    PSOUP__TRY(psoup__gguf_set_float32(writer, key_of(qwen2, "rope.scaling.yarn_beta_fast", key),
                                       c->rope_beta_fast, error));
    PSOUP__TRY(psoup__gguf_set_float32(writer, key_of(qwen2, "rope.scaling.yarn_beta_slow", key),
                                       c->rope_beta_slow, error));
    if (c->rope_attention_factor != 0) { /* llama.cpp multiplies 0.1 ln(factor) + 1 by it */
        double plain = 0.1 * log((double)c->rope_factor) + 1;
        PSOUP__TRY(psoup__gguf_set_float32(writer, key_of(qwen2, "rope.scaling.attn_factor", key),
                                           (float)((double)c->rope_attention_factor / plain), error));
    }
    return PSOUP_OK;
fail:
    return status;
}

uint32_t psoup__gguf_file_type(psoup_dtype dtype) {
    switch (dtype) { /* llama.h, enum llama_ftype */
    case PSOUP_F32:
    case PSOUP_F64:
        return 0;
    case PSOUP_F16:
        return 1;
    case PSOUP_Q8_0:
        return 7;
    default:
        return 32; /* bf16 */
    }
}

psoup_status psoup__gguf_write_config(psoup__gguf_writer *writer, const psoup_model_config *c,
                                      bool qwen2, const char *name, psoup_dtype dtype,
                                      psoup_error *error) {
    psoup_status status;
    char key[96];
    const psoup__gguf_layout layout = {!qwen2, c->num_attention_heads, c->num_key_value_heads, c->head_dim};
    const struct {
        const char *field;
        int32_t value;
    } sizes[] = {{"vocab_size", c->vocab_size},
                 {"context_length", c->max_position_embeddings},
                 {"embedding_length", c->hidden_size},
                 {"block_count", c->num_hidden_layers},
                 {"feed_forward_length", c->intermediate_size},
                 {"attention.head_count", c->num_attention_heads},
                 {"attention.head_count_kv", c->num_key_value_heads},
                 {"attention.key_length", c->head_dim},
                 {"attention.value_length", c->head_dim}};
    psoup__gguf_set_layout(writer, &layout);
    PSOUP__TRY(psoup__gguf_set_string(writer, "general.architecture", architectures[qwen2], error));
    PSOUP__TRY(psoup__gguf_set_string(writer, "general.type", "model", error));
    PSOUP__TRY(psoup__gguf_set_string(writer, "general.name", name, error));
    PSOUP__TRY(psoup__gguf_set_uint32(writer, "general.file_type", psoup__gguf_file_type(dtype), error));
    PSOUP__TRY(psoup__gguf_set_uint32(writer, "general.quantization_version", 2, error));
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        PSOUP__TRY(psoup__gguf_set_uint32(writer, key_of(qwen2, sizes[i].field, key),
                                          (uint32_t)sizes[i].value, error));
    PSOUP__TRY(psoup__gguf_set_float32(writer, key_of(qwen2, "attention.layer_norm_rms_epsilon", key),
                                       c->rms_norm_eps, error));
    return write_rope(writer, qwen2, c, error);
fail:
    return status;
}
