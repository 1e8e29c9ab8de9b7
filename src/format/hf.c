/* config.json of the LLaMA family (llama, mistral, qwen2), read. Field names, defaults and
 * meanings: transformers, models/{llama,mistral,qwen2}/configuration_*.py and
 * modeling_rope_utils.py. */
#include "format/format.h"

#include <math.h>
#include <string.h>

typedef enum family { LLAMA, MISTRAL, QWEN2 } family;

/* A member as an integer. Absent: `otherwise`; null: `null_value`. */
static psoup_status read_int(const psoup_json *object, const char *where, const char *field,
                             int64_t otherwise, int64_t null_value, int32_t *out,
                             psoup_error *error) {
    const psoup_json *value = psoup_json_get(object, field);
    int64_t number = otherwise;
    if (value != NULL && psoup_json_kind(value) == PSOUP_JSON_NULL)
        number = null_value;
    else if (value != NULL && psoup_json_kind(value) != PSOUP_JSON_INTEGER)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %s: expected an integer", where, field);
    else if (value != NULL)
        number = psoup_json_integer(value, otherwise);
    else if (otherwise == INT64_MIN)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %s: missing, expected an integer", where,
                           field);
    if (number < INT32_MIN || number > INT32_MAX)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %s: %lld is out of range", where, field,
                           (long long)number);
    *out = (int32_t)number;
    return PSOUP_OK;
}

static psoup_status read_float(const psoup_json *object, const char *where, const char *field,
                               float *out, psoup_error *error) {
    const psoup_json *value = psoup_json_get(object, field);
    psoup_json_type kind = psoup_json_kind(value);
    if (kind == PSOUP_JSON_NULL)
        return PSOUP_OK;
    if (kind != PSOUP_JSON_INTEGER && kind != PSOUP_JSON_REAL)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %s: expected a number", where, field);
    *out = (float)psoup_json_real(value, 0);
    return PSOUP_OK;
}

static psoup_status read_bool(const psoup_json *object, const char *where, const char *field,
                              int32_t *out, psoup_error *error) {
    const psoup_json *value = psoup_json_get(object, field);
    psoup_json_type kind = psoup_json_kind(value);
    if (kind == PSOUP_JSON_NULL)
        return PSOUP_OK;
    if (kind != PSOUP_JSON_BOOL)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %s: expected true or false", where,
                           field);
    *out = psoup_json_bool(value, 0) != 0;
    return PSOUP_OK;
}

/* A token id, or the first of a list of them. */
static psoup_status read_token(const psoup_json *object, const char *where, const char *field,
                               int32_t otherwise, int32_t *out, psoup_error *error) {
    const psoup_json *value = psoup_json_get(object, field);
    *out = value == NULL ? otherwise : -1;
    if (psoup_json_kind(value) == PSOUP_JSON_ARRAY)
        value = psoup_json_at(value, 0);
    if (psoup_json_kind(value) == PSOUP_JSON_NULL)
        return PSOUP_OK;
    int64_t id = psoup_json_integer(value, -2);
    if (id < -1 || id > INT32_MAX)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: %s: expected a token id or a list of them", where, field);
    *out = (int32_t)id;
    return PSOUP_OK;
}

/* The tokens of a list after its first. */
static psoup_status read_more_eos(const psoup_json *root, const char *where, psoup_model_config *c,
                                  psoup_error *error) {
    const psoup_json *list = psoup_json_get(root, "eos_token_id");
    size_t room = sizeof c->more_eos_token_ids / sizeof *c->more_eos_token_ids;
    size_t n = psoup_json_kind(list) == PSOUP_JSON_ARRAY ? psoup_json_size(list) : 0;
    if (n > room + 1)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "%s: eos_token_id: %zu tokens; expected at "
                           "most %zu", where, n, room + 1);
    for (size_t i = 1; i < n; i++) {
        int64_t id = psoup_json_integer(psoup_json_at(list, i), -1);
        if (id < 0 || id > INT32_MAX)
            return psoup__fail(error, PSOUP_ERROR_FORMAT,
                               "%s: eos_token_id: expected a token id or a list of them", where);
        c->more_eos_token_ids[i - 1] = (int32_t)id;
    }
    return PSOUP_OK;
}

/* rope_scaling as transformers 4 writes it ("type" before 4.43, "rope_type" after), or
 * rope_parameters as transformers 5 does, which holds rope_theta too. */
static psoup_status read_rope(const psoup_json *root, const char *where, psoup_model_config *config,
                              psoup_error *error) {
    static const struct {
        const char *name;
        psoup_rope_scaling kind;
    } kinds[] = {{"default", PSOUP_ROPE_DEFAULT}, {"linear", PSOUP_ROPE_LINEAR},
                 {"llama3", PSOUP_ROPE_LLAMA3},   {"yarn", PSOUP_ROPE_YARN},
                 {"dynamic", PSOUP_ROPE_DYNAMIC}};
    psoup_status status;
    const char *field = "rope_parameters";
    const psoup_json *rope = psoup_json_get(root, field);
    PSOUP__TRY(read_float(root, where, "rope_theta", &config->rope_theta, error));
    if (psoup_json_kind(rope) == PSOUP_JSON_NULL)
        rope = psoup_json_get(root, field = "rope_scaling");
    if (psoup_json_kind(rope) == PSOUP_JSON_NULL)
        return PSOUP_OK;
    if (psoup_json_kind(rope) != PSOUP_JSON_OBJECT)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %s: expected an object or null", where,
                           field);
    PSOUP__TRY(read_float(rope, where, "rope_theta", &config->rope_theta, error));
    const char *name = psoup_json_string(psoup_json_get(rope, "rope_type"), NULL);
    if (name == NULL)
        name = psoup_json_string(psoup_json_get(rope, "type"), "default");
    size_t i = 0, n = sizeof kinds / sizeof *kinds;
    while (i < n && strcmp(name, kinds[i].name) != 0)
        i++;
    if (i == n)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: %s: type \"%.60s\" is not supported; expected default, linear, "
                           "llama3, yarn or dynamic",
                           where, field, name);
    config->rope_scaling = kinds[i].kind;
    if (config->rope_scaling == PSOUP_ROPE_DEFAULT)
        return PSOUP_OK;

    config->rope_factor = 0; /* must be given: the check below refuses 0 */
    PSOUP__TRY(read_float(rope, where, "factor", &config->rope_factor, error));
    PSOUP__TRY(read_int(rope, where, "original_max_position_embeddings",
                        config->max_position_embeddings, config->max_position_embeddings,
                        &config->rope_original_max_position, error));
    PSOUP__TRY(read_float(rope, where, "low_freq_factor", &config->rope_low_freq_factor, error));
    PSOUP__TRY(read_float(rope, where, "high_freq_factor", &config->rope_high_freq_factor, error));
    PSOUP__TRY(read_float(rope, where, "beta_fast", &config->rope_beta_fast, error));
    PSOUP__TRY(read_float(rope, where, "beta_slow", &config->rope_beta_slow, error));
    PSOUP__TRY(read_float(rope, where, "attention_factor", &config->rope_attention_factor, error));
    static const char *const foreign[] = {"mscale", "mscale_all_dim", "short_factor",
                                          "long_factor"};
    for (size_t j = 0; j < sizeof foreign / sizeof *foreign; j++)
        if (psoup_json_kind(psoup_json_get(rope, foreign[j])) != PSOUP_JSON_NULL)
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "%s: %s: %s is not supported", where,
                               field, foreign[j]);
    if (!psoup_json_bool(psoup_json_get(rope, "truncate"), 1))
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: %s: truncate: false is not supported", where, field);
    return PSOUP_OK;
fail:
    return status;
}

/* Refuses attention over a window shorter than the model's context. */
static psoup_status check_window(const psoup_json *root, const char *where, family kind,
                                 const psoup_model_config *config, psoup_error *error) {
    const psoup_json *value = psoup_json_get(root, "sliding_window");
    bool used = kind == MISTRAL;
    if (kind == QWEN2)
        used = psoup_json_bool(psoup_json_get(root, "use_sliding_window"), 0);
    if (!used || (value != NULL && psoup_json_kind(value) == PSOUP_JSON_NULL))
        return PSOUP_OK;
    int64_t window = psoup_json_integer(value, value == NULL ? 4096 : -1);
    if (window < config->max_position_embeddings)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: sliding_window: %lld is shorter than max_position_embeddings %d; "
                           "attention over a window is not supported",
                           where, (long long)window, (int)config->max_position_embeddings);
    return PSOUP_OK;
}

static psoup_status read_dtype(const psoup_json *root, const char *where, int32_t *out,
                               psoup_error *error) {
    const psoup_json *value = psoup_json_get(root, "torch_dtype");
    if (psoup_json_kind(value) == PSOUP_JSON_NULL)
        value = psoup_json_get(root, "dtype");
    if (psoup_json_kind(value) == PSOUP_JSON_NULL)
        return PSOUP_OK;
    const char *name = psoup_json_string(value, "");
    if (strcmp(name, "float32") == 0)
        *out = PSOUP_F32;
    else if (strcmp(name, "float16") == 0)
        *out = PSOUP_F16;
    else if (strcmp(name, "bfloat16") == 0)
        *out = PSOUP_BF16;
    else
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: torch_dtype: \"%.60s\"; expected float32, float16 or bfloat16",
                           where, name);
    return PSOUP_OK;
}

/* bitsandbytes' nf4 and int8 become blocks; another method is refused. */
static psoup_status read_quantization(const psoup_json *how, const char *where, int32_t *out, psoup_error *error) {
    if (psoup_json_kind(how) == PSOUP_JSON_NULL)
        return PSOUP_OK;
    const char *method = psoup_json_string(psoup_json_get(how, "quant_method"), "");
    const char *type = psoup_json_string(psoup_json_get(how, "bnb_4bit_quant_type"), "");
    const char *storage = psoup_json_string(psoup_json_get(how, "bnb_4bit_quant_storage"), "uint8");
    if (strcmp(method, "bitsandbytes") != 0)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: quantization_config: quant_method: \"%.60s\"; expected bitsandbytes", where, method);
    if (psoup_json_bool(psoup_json_get(how, "load_in_8bit"), 0)) {
        *out = PSOUP_INT8;
        return PSOUP_OK;
    }
    if (!psoup_json_bool(psoup_json_get(how, "load_in_4bit"), 0) || strcmp(type, "nf4") != 0 ||
        strcmp(storage, "uint8") != 0)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: quantization_config: bnb_4bit_quant_type \"%.40s\" in %.40s; expected nf4 in uint8, "
                           "or load_in_8bit",
                           where, type, storage);
    *out = PSOUP_NF4;
    return PSOUP_OK;
}

static psoup_status read_config(const psoup_json *root, const char *where, psoup_model_config *c,
                                psoup_error *error) {
    psoup_status status;
    const int64_t required = INT64_MIN;
    family kind;
    *c = (psoup_model_config)PSOUP_MODEL_CONFIG_INIT;
    if (psoup_json_kind(root) != PSOUP_JSON_OBJECT)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: expected an object", where);
    const char *type = psoup_json_string(psoup_json_get(root, "model_type"), "");
    if (strcmp(type, "llama") == 0)
        kind = LLAMA;
    else if (strcmp(type, "mistral") == 0)
        kind = MISTRAL;
    else if (strcmp(type, "qwen2") == 0)
        kind = QWEN2;
    else
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: model_type: \"%.60s\"; expected llama, mistral or qwen2", where,
                           type);
    const char *act = psoup_json_string(psoup_json_get(root, "hidden_act"), "silu");
    if (strcmp(act, "silu") != 0 && strcmp(act, "swish") != 0)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "%s: hidden_act: \"%.60s\"; expected silu",
                           where, act);
    PSOUP__TRY(read_quantization(psoup_json_get(root, "quantization_config"), where, &c->linear_dtype, error));
    if (psoup_json_real(psoup_json_get(root, "partial_rotary_factor"), 1) != 1)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: partial_rotary_factor: only 1 is supported", where);

    PSOUP__TRY(read_int(root, where, "vocab_size", required, 0, &c->vocab_size, error));
    PSOUP__TRY(read_int(root, where, "hidden_size", required, 0, &c->hidden_size, error));
    PSOUP__TRY(read_int(root, where, "intermediate_size", required, 0, &c->intermediate_size,
                        error));
    PSOUP__TRY(read_int(root, where, "num_hidden_layers", required, 0, &c->num_hidden_layers,
                        error));
    PSOUP__TRY(read_int(root, where, "num_attention_heads", required, 0, &c->num_attention_heads,
                        error));
    PSOUP__TRY(read_int(root, where, "num_key_value_heads",
                        kind == MISTRAL ? 8 : kind == QWEN2 ? 32 : 0, 0, &c->num_key_value_heads,
                        error));
    PSOUP__TRY(read_int(root, where, "head_dim", 0, 0, &c->head_dim, error));
    PSOUP__TRY(read_int(root, where, "max_position_embeddings",
                        kind == MISTRAL ? 131072 : kind == QWEN2 ? 32768 : 2048, 0,
                        &c->max_position_embeddings, error));
    PSOUP__TRY(read_float(root, where, "rms_norm_eps", &c->rms_norm_eps, error));
    PSOUP__TRY(read_float(root, where, "initializer_range", &c->initializer_range, error));
    PSOUP__TRY(read_bool(root, where, "tie_word_embeddings", &c->tie_word_embeddings, error));
    if (kind == LLAMA) {
        PSOUP__TRY(read_bool(root, where, "attention_bias", &c->attention_bias, error));
        PSOUP__TRY(read_bool(root, where, "mlp_bias", &c->mlp_bias, error));
    }
    c->qkv_bias = kind == QWEN2;
    PSOUP__TRY(read_token(root, where, "bos_token_id", kind == QWEN2 ? -1 : 1, &c->bos_token_id,
                          error));
    PSOUP__TRY(read_token(root, where, "eos_token_id", kind == QWEN2 ? -1 : 2, &c->eos_token_id,
                          error));
    PSOUP__TRY(read_more_eos(root, where, c, error));
    PSOUP__TRY(read_token(root, where, "pad_token_id", -1, &c->pad_token_id, error));
    PSOUP__TRY(read_dtype(root, where, &c->torch_dtype, error));
    PSOUP__TRY(read_rope(root, where, c, error));
    PSOUP__TRY(check_window(root, where, kind, c, error));
    return psoup__config_check(c, where, error);
fail:
    return status;
}

psoup_status psoup__hf_config_parse(const char *text, size_t length, const char *name,
                                    psoup_model_config *out, psoup_error *error) {
    psoup_json *root = NULL;
    psoup_status status = psoup_json_parse(text, length, name, &root, error);
    if (status == PSOUP_OK)
        status = read_config(root, name, out, error);
    psoup_json_free(root);
    return status;
}

/* The end tokens of generation_config.json, which may list more than config.json (Llama 3's turns end by <|eot_id|>),
 * behind those of the config. */
static psoup_status read_generation(psoup_context *context, const char *directory, psoup_model_config *c,
                                    psoup_error *error) {
    psoup_json *root = NULL;
    psoup_status status = PSOUP_OK;
    const size_t room = sizeof c->more_eos_token_ids / sizeof *c->more_eos_token_ids;
    char *path = psoup__path_join(context, directory, "generation_config.json", error);
    if (path == NULL)
        return PSOUP_ERROR_MEMORY;
    if (!psoup__file_exists(path))
        goto fail;
    PSOUP__TRY(psoup_json_read(context, path, &root, error));
    const psoup_json *ends = psoup_json_get(root, "eos_token_id");
    const bool list = psoup_json_kind(ends) == PSOUP_JSON_ARRAY;
    const size_t n = list ? psoup_json_size(ends) : psoup_json_kind(ends) != PSOUP_JSON_NULL;
    for (size_t i = 0; i < n; i++) {
        const int64_t id = psoup_json_integer(list ? psoup_json_at(ends, i) : ends, -1);
        size_t at = 0;
        if (id < 0 || id > INT32_MAX)
            PSOUP__TRY(psoup__fail(error, PSOUP_ERROR_FORMAT,
                                   "%s: eos_token_id: expected a token id or a list of them", path));
        if (c->eos_token_id < 0)
            c->eos_token_id = (int32_t)id;
        while (at < room && c->more_eos_token_ids[at] >= 0 && c->more_eos_token_ids[at] != id)
            at++;
        if (id == c->eos_token_id)
            continue;
        if (at == room)
            PSOUP__TRY(psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                                   "%s: eos_token_id: with those of config.json more than %zu tokens", path, room + 1));
        c->more_eos_token_ids[at] = (int32_t)id;
    }
fail:
    psoup_json_free(root);
    psoup__free(context, path);
    return status;
}

psoup_status psoup__hf_config_read(psoup_context *context, const char *directory,
                                   psoup_model_config *out, psoup_error *error) {
    psoup_json *root = NULL;
    psoup__gguf *file;
    if (psoup__is_gguf(directory)) {
        psoup_status opened = psoup__gguf_open(context, directory, &file, error);
        if (opened == PSOUP_OK)
            opened = psoup__gguf_read_config(file, out, error);
        psoup__gguf_free(file);
        return opened;
    }
    char *path = psoup__path_join(context, directory, "config.json", error);
    if (path == NULL)
        return PSOUP_ERROR_MEMORY;
    psoup_status status = psoup_json_read(context, path, &root, error);
    if (status == PSOUP_OK)
        status = read_config(root, path, out, error);
    if (status == PSOUP_OK)
        status = read_generation(context, directory, out, error);
    psoup_json_free(root);
    psoup__free(context, path);
    return status;
}

psoup_status psoup__config_check(psoup_model_config *c, const char *where, psoup_error *error) {
    const struct {
        const char *name;
        int64_t value, low, high;
    } sizes[] = {
        {"vocab_size", c->vocab_size, 1, 1 << 26},
        {"hidden_size", c->hidden_size, 1, 1 << 20},
        {"intermediate_size", c->intermediate_size, 1, 1 << 22},
        {"num_hidden_layers", c->num_hidden_layers, 1, 4096},
        {"num_attention_heads", c->num_attention_heads, 1, 4096},
        {"num_key_value_heads", c->num_key_value_heads, 0, c->num_attention_heads},
        {"head_dim", c->head_dim, 0, 4096},
        {"max_position_embeddings", c->max_position_embeddings, 1, 1 << 28},
        {"rope_scaling", c->rope_scaling, PSOUP_ROPE_DEFAULT, PSOUP_ROPE_DYNAMIC},
        {"bos_token_id", c->bos_token_id, -1, INT32_MAX},
        {"eos_token_id", c->eos_token_id, -1, INT32_MAX},
        {"pad_token_id", c->pad_token_id, -1, INT32_MAX},
        {"torch_dtype", c->torch_dtype, PSOUP_F32, PSOUP_BF16},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < sizes[i].low || sizes[i].value > sizes[i].high)
            return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %s: %lld; expected %lld to %lld",
                               where, sizes[i].name, (long long)sizes[i].value,
                               (long long)sizes[i].low, (long long)sizes[i].high);
    if (c->num_key_value_heads == 0)
        c->num_key_value_heads = c->num_attention_heads;
    if (c->num_attention_heads % c->num_key_value_heads != 0)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: num_key_value_heads: %d does not divide num_attention_heads %d",
                           where, (int)c->num_key_value_heads, (int)c->num_attention_heads);
    if (c->head_dim == 0) {
        if (c->hidden_size % c->num_attention_heads != 0)
            return psoup__fail(error, PSOUP_ERROR_FORMAT,
                               "%s: hidden_size: %d is no multiple of num_attention_heads %d", where,
                               (int)c->hidden_size, (int)c->num_attention_heads);
        c->head_dim = c->hidden_size / c->num_attention_heads;
        if (c->head_dim > 4096) /* as of one that is written down */
            return psoup__fail(error, PSOUP_ERROR_FORMAT,
                               "%s: hidden_size %d of %d heads: expected at most 4096 a head", where,
                               (int)c->hidden_size, (int)c->num_attention_heads);
    }
    if (c->head_dim % 2 != 0)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: head_dim: %d is odd; rotary positions need pairs", where,
                           (int)c->head_dim);
    if (c->linear_dtype != 0 && c->linear_dtype != PSOUP_INT8 && c->linear_dtype != PSOUP_NF4)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: linear_dtype: %d; expected 0, PSOUP_INT8 or PSOUP_NF4",
                           where, (int)c->linear_dtype);
    if (c->reserved)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: reserved is %d: expected 0", where, (int)c->reserved);
    if (c->qkv_bias && (c->attention_bias || c->mlp_bias))
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: qkv_bias: goes with neither attention_bias nor mlp_bias", where);
    bool scaled = c->rope_scaling != PSOUP_ROPE_DEFAULT;
    bool llama3 = c->rope_scaling == PSOUP_ROPE_LLAMA3, yarn = c->rope_scaling == PSOUP_ROPE_YARN;
    const struct {
        const char *name;
        float value;
        bool ok;
        const char *expected;
    } numbers[] = {
        {"rms_norm_eps", c->rms_norm_eps, c->rms_norm_eps > 0, "a positive number"},
        {"initializer_range", c->initializer_range, c->initializer_range >= 0,
         "a number of at least 0"},
        {"rope_theta", c->rope_theta, c->rope_theta > 0, "a positive number"},
        {"rope factor", c->rope_factor, !scaled || c->rope_factor >= 1, "a number of at least 1"},
        {"low_freq_factor", c->rope_low_freq_factor, !llama3 || c->rope_low_freq_factor > 0,
         "a positive number"},
        {"high_freq_factor", c->rope_high_freq_factor,
         !llama3 || c->rope_high_freq_factor > c->rope_low_freq_factor,
         "more than low_freq_factor"},
        {"beta_slow", c->rope_beta_slow, !yarn || c->rope_beta_slow > 0, "a positive number"},
        {"beta_fast", c->rope_beta_fast, !yarn || c->rope_beta_fast >= c->rope_beta_slow,
         "at least beta_slow"},
        {"attention_factor", c->rope_attention_factor, !yarn || c->rope_attention_factor >= 0,
         "a positive number"},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (!isfinite(numbers[i].value) || !numbers[i].ok)
            return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %s: %g; expected %s", where,
                               numbers[i].name, (double)numbers[i].value, numbers[i].expected);
    if (scaled && c->rope_original_max_position == 0)
        c->rope_original_max_position = c->max_position_embeddings;
    if (scaled && c->rope_original_max_position < 1)
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: original_max_position_embeddings: %d; expected a positive number",
                           where, (int)c->rope_original_max_position);
    return PSOUP_OK;
}
