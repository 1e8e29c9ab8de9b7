/* PEFT adapters, written so that PeftModel.from_pretrained loads them. */
#include "format/format.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* An integer where it is one: PEFT declares lora_alpha so. */
static psoup_json *alpha_json(double alpha) {
    if (alpha == floor(alpha) && fabs(alpha) < 1e9)
        return psoup_json_new_integer((int64_t)alpha);
    return psoup_json_new_real(alpha);
}

/* The alpha that gives a pair its scale at its own rank. */
static double pair_alpha(const psoup__peft_output *adapter, const psoup__peft_pair *pair) {
    double divisor = adapter->rslora ? sqrt((double)pair->rank) : (double)pair->rank;
    double alpha = (double)pair->scale * divisor;
    if ((float)((double)adapter->alpha / divisor) == pair->scale)
        return (double)adapter->alpha;
    /* Where a rounder number gives the same scale, that was meant. */
    double rounded = round(alpha * 65536.0) / 65536.0;
    return (float)(rounded / divisor) == pair->scale ? rounded : alpha;
}

/* "q_proj" of "model.layers.0.self_attn.q_proj", once for all layers. */
static int add_target(psoup_json *targets, const char *module) {
    const char *dot = strrchr(module, '.'), *suffix = dot != NULL ? dot + 1 : module;
    for (size_t i = 0; i < psoup_json_size(targets); i++)
        if (strcmp(psoup_json_string(psoup_json_at(targets, i), ""), suffix) == 0)
            return 0;
    return psoup_json_append(targets, psoup_json_new_string(suffix));
}

static psoup_json *config_json(const psoup__peft_output *adapter) {
    psoup_json *config = psoup_json_new_object(), *targets = psoup_json_new_array();
    psoup_json *ranks = psoup_json_new_object(), *alphas = psoup_json_new_object();
    psoup_json *saved = adapter->head != NULL ? psoup_json_new_array() : psoup_json_new_null();
    int failed = 0;
    for (size_t i = 0; i < adapter->n; i++) {
        const psoup__peft_pair *pair = &adapter->pairs[i];
        double alpha = pair_alpha(adapter, pair);
        failed |= add_target(targets, pair->module);
        if (pair->rank != adapter->rank)
            failed |= psoup_json_set(ranks, pair->module, psoup_json_new_integer(pair->rank));
        if (alpha != (double)adapter->alpha)
            failed |= psoup_json_set(alphas, pair->module, alpha_json(alpha));
    }
    if (adapter->head != NULL) {
        failed |= psoup_json_append(saved, psoup_json_new_string("classifier"));
        failed |= psoup_json_append(saved, psoup_json_new_string("score"));
    }
    const char *task = adapter->task_type != NULL ? adapter->task_type : "CAUSAL_LM";
    const char *base = adapter->base_name != NULL ? adapter->base_name : "";
    failed |= psoup_json_set(config, "alpha_pattern", alphas);
    failed |= psoup_json_set(config, "base_model_name_or_path", psoup_json_new_string(base));
    failed |= psoup_json_set(config, "bias", psoup_json_new_string("none"));
    failed |= psoup_json_set(config, "fan_in_fan_out",
                             psoup_json_new_bool(adapter->n > 0 && adapter->pairs[0].transposed));
    failed |= psoup_json_set(config, "inference_mode", psoup_json_new_bool(1));
    failed |= psoup_json_set(config, "init_lora_weights", psoup_json_new_bool(1));
    failed |= psoup_json_set(config, "lora_alpha", alpha_json((double)adapter->alpha));
    failed |= psoup_json_set(config, "lora_dropout", psoup_json_new_real(0));
    failed |= psoup_json_set(config, "modules_to_save", saved);
    failed |= psoup_json_set(config, "peft_type", psoup_json_new_string("LORA"));
    failed |= psoup_json_set(config, "r", psoup_json_new_integer(adapter->rank));
    failed |= psoup_json_set(config, "rank_pattern", ranks);
    failed |= psoup_json_set(config, "target_modules", targets);
    failed |= psoup_json_set(config, "task_type", psoup_json_new_string(task));
    failed |= psoup_json_set(config, "use_dora", psoup_json_new_bool(0));
    failed |= psoup_json_set(config, "use_rslora", psoup_json_new_bool(adapter->rslora));
    if (!failed)
        return config;
    psoup_json_free(config);
    return NULL;
}

static psoup_status declare(psoup_context *context, psoup__safetensors_writer *writer,
                            const char *module, const char *part, psoup_dtype dtype, int rank,
                            const int64_t *shape, psoup_error *error) {
    char *name = psoup__format(context, error, "base_model.model.%s.%s", module, part);
    if (name == NULL)
        return PSOUP_ERROR_MEMORY;
    psoup_status status =
        psoup__safetensors_declare(writer, name, dtype, rank, shape, error);
    psoup__free(context, name);
    return status;
}

static psoup_status write_factor(psoup__safetensors_writer *writer, const psoup__tensor *tensor,
                                 psoup_error *error) {
    enum { PIECE = 1 << 14 };
    char piece[PIECE];
    psoup_status status = PSOUP_OK;
    for (size_t at = 0; at < tensor->bytes && status == PSOUP_OK; at += PIECE) {
        size_t n = tensor->bytes - at < PIECE ? tensor->bytes - at : PIECE;
        psoup__tensor_bytes(tensor, at, n, piece);
        status = psoup__safetensors_write(writer, piece, n, error);
    }
    return status;
}

static psoup_status write_tensors(psoup_context *context, const char *directory,
                                  const psoup__peft_output *adapter, psoup_error *error) {
    psoup_status status;
    psoup__safetensors_writer *writer = NULL;
    const int64_t head_shape[2] = {1, adapter->dim};
    char *path = psoup__path_join(context, directory, "adapter_model.safetensors", error);
    if (path == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(psoup__safetensors_create(context, path, &writer, error));
    for (const char *const *m = adapter->metadata; m != NULL && *m != NULL; m += 2)
        PSOUP__TRY(psoup__safetensors_metadata_set(writer, m[0], m[1], error));
    for (size_t i = 0; i < adapter->n; i++) {
        const psoup__peft_pair *pair = &adapter->pairs[i];
        PSOUP__TRY(declare(context, writer, pair->module, "lora_A.weight", pair->a.dtype, 2,
                           pair->a.shape, error));
        PSOUP__TRY(declare(context, writer, pair->module, "lora_B.weight", pair->b.dtype, 2,
                           pair->b.shape, error));
    }
    if (adapter->head != NULL)
        PSOUP__TRY(declare(context, writer, "score", "weight", PSOUP_F32, 2, head_shape, error));
    if (adapter->head != NULL && adapter->head_bias != NULL)
        PSOUP__TRY(declare(context, writer, "score", "bias", PSOUP_F32, 1, head_shape, error));

    PSOUP__TRY(psoup__safetensors_begin(writer, error));
    for (size_t i = 0; i < adapter->n; i++) {
        PSOUP__TRY(write_factor(writer, &adapter->pairs[i].a, error));
        PSOUP__TRY(write_factor(writer, &adapter->pairs[i].b, error));
    }
    if (adapter->head != NULL)
        PSOUP__TRY(psoup__safetensors_write(writer, adapter->head,
                                            (size_t)adapter->dim * sizeof(float), error));
    if (adapter->head != NULL && adapter->head_bias != NULL)
        PSOUP__TRY(psoup__safetensors_write(writer, adapter->head_bias, sizeof(float), error));
    PSOUP__TRY(psoup__safetensors_commit(writer, error));
fail:
    psoup__safetensors_writer_free(writer);
    psoup__free(context, path);
    return status;
}

psoup_status psoup__peft_write_config(psoup_context *context, const char *directory,
                                      const psoup__peft_output *adapter, psoup_error *error) {
    psoup_status status;
    psoup_json *config = NULL;
    char *path = psoup__path_join(context, directory, "adapter_config.json", error);
    if (path == NULL)
        return PSOUP_ERROR_MEMORY;
    if ((config = config_json(adapter)) == NULL)
        status = psoup__out_of_memory(error, 0);
    else
        status = psoup_json_write(context, path, config, error);
    psoup_json_free(config);
    psoup__free(context, path);
    return status;
}

psoup_status psoup__peft_write(psoup_context *context, const char *directory,
                               const psoup__peft_output *adapter, psoup_error *error) {
    psoup_status status;
    PSOUP__TRY(psoup__make_directories(directory, error));
    PSOUP__TRY(write_tensors(context, directory, adapter, error));
    PSOUP__TRY(psoup__peft_write_config(context, directory, adapter, error));
fail:
    return status;
}
