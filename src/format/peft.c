/* PEFT adapters, read: adapter_config.json and adapter_model.safetensors. What the fields mean: peft,
 * tuners/lora/config.py; what the tensors are called: utils/save_and_load.py. */
#include "format/gguf.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PREFIX "base_model.model."

static psoup_status refuse(const char *where, const char *field, const char *why,
                           psoup_error *error) {
    return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "%s: %s: %s", where, field, why);
}

/* True for what PEFT takes as "not set": absent, null, false, "" and empty lists and objects. */
static bool is_unset(const psoup_json *value) {
    switch (psoup_json_kind(value)) {
    case PSOUP_JSON_NULL: return true;
    case PSOUP_JSON_BOOL: return !psoup_json_bool(value, 0);
    case PSOUP_JSON_STRING: return *psoup_json_string(value, "") == '\0';
    case PSOUP_JSON_ARRAY:
    case PSOUP_JSON_OBJECT: return psoup_json_size(value) == 0;
    default: return false;
    }
}

/* pissa, olora, corda and loftq write other weights into the base before training begins. */
static psoup_status check_init(const psoup_json *value, const char *where, psoup_error *error) {
    static const char *const harmless[] = {"gaussian", "eva", "orthogonal"};
    const char *name = psoup_json_string(value, NULL);
    if (name == NULL)
        return PSOUP_OK;
    for (size_t i = 0; i < sizeof harmless / sizeof *harmless; i++)
        if (strcmp(name, harmless[i]) == 0)
            return PSOUP_OK;
    return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                       "%s: init_lora_weights: \"%.60s\" alters the base; convert the adapter with "
                       "PEFT's path_initial_model_for_weight_conversion",
                       where, name);
}

/* alpha is kept in f32, and divided by a rank of at least 1. */
static bool is_alpha(const psoup_json *value) {
    double alpha = psoup_json_real(value, NAN);
    return fabs(alpha) <= FLT_MAX;
}

static psoup_status check_pattern(const psoup_json *patterns, const char *field, bool integers,
                                  const char *where, psoup_error *error) {
    psoup_status status;
    const char *key = NULL;
    bool matched;
    if (psoup_json_kind(patterns) == PSOUP_JSON_NULL)
        return PSOUP_OK;
    if (psoup_json_kind(patterns) != PSOUP_JSON_OBJECT)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %s: expected an object", where, field);
    for (const psoup_json *value; (value = psoup_json_next(patterns, &key)) != NULL;) {
        if (integers ? psoup_json_integer(value, 0) < 1 : !is_alpha(value))
            return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %s: %.200s: expected %s", where,
                               field, key, integers ? "a positive integer" : "a number");
        PSOUP__TRY(psoup__peft_match(key, "", where, &matched, error));
    }
    return PSOUP_OK;
fail:
    return status;
}

static psoup_status check_config(const psoup_json *config, const char *where, psoup_error *error) {
    psoup_status status;
    if (psoup_json_kind(config) != PSOUP_JSON_OBJECT)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: expected an object", where);
    const char *type = psoup_json_string(psoup_json_get(config, "peft_type"), "");
    if (strcmp(type, "LORA") != 0)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: peft_type: \"%.60s\"; expected LORA", where, type);
    int64_t r = psoup_json_integer(psoup_json_get(config, "r"), 0);
    if (r < 1 || r > 1 << 20)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: r: expected a positive integer", where);
    if (!is_alpha(psoup_json_get(config, "lora_alpha")))
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "%s: lora_alpha: expected a number that f32 can hold", where);
    static const struct {
        const char *field, *why;
    } unsupported[] = {
        {"use_dora", "DoRA is not supported"},
        {"layer_replication", "replicated layers are not supported"},
        {"lora_bias", "biases in adapters are not supported"},
        {"trainable_token_indices", "trained tokens are not supported"},
        {"target_parameters", "adapters of bare parameters are not supported"},
        {"alora_invocation_tokens", "activated LoRA is not supported"},
        {"use_qalora", "QALoRA is not supported"},
        {"arrow_config", "Arrow routing is not supported"},
    };
    for (size_t i = 0; i < sizeof unsupported / sizeof *unsupported; i++)
        if (!is_unset(psoup_json_get(config, unsupported[i].field)))
            return refuse(where, unsupported[i].field, unsupported[i].why, error);
    const psoup_json *fan = psoup_json_get(config, "fan_in_fan_out");
    if (psoup_json_kind(fan) != PSOUP_JSON_NULL && psoup_json_kind(fan) != PSOUP_JSON_BOOL)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: fan_in_fan_out: expected true or false", where);
    const char *bias = psoup_json_string(psoup_json_get(config, "bias"), "none");
    if (strcmp(bias, "none") != 0)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "%s: bias: \"%.60s\"; expected none",
                           where, bias);
    PSOUP__TRY(check_init(psoup_json_get(config, "init_lora_weights"), where, error));
    const psoup_json *saved = psoup_json_get(config, "modules_to_save");
    for (size_t i = 0; i < psoup_json_size(saved); i++) {
        /* PEFT lists both for every SEQ_CLS adapter; which one there is, the tensors say. */
        const char *name = psoup_json_string(psoup_json_at(saved, i), "");
        if (strcmp(name, "score") != 0 && strcmp(name, "classifier") != 0)
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "%s: modules_to_save: \"%.60s\"; only \"score\" is supported", where,
                               name);
    }
    PSOUP__TRY(check_pattern(psoup_json_get(config, "rank_pattern"), "rank_pattern", true, where,
                             error));
    PSOUP__TRY(check_pattern(psoup_json_get(config, "alpha_pattern"), "alpha_pattern", false, where,
                             error));
    return PSOUP_OK;
fail:
    return status;
}

psoup_status psoup__peft_config_parse(const char *text, size_t length, const char *name,
                                      psoup_json **out, psoup_error *error) {
    psoup_status status;
    *out = NULL;
    PSOUP__TRY(psoup_json_parse(text, length, name, out, error));
    PSOUP__TRY(check_config(*out, name, error));
    return PSOUP_OK;
fail:
    psoup_json_free(*out);
    *out = NULL;
    return status;
}

/* The first key that matches, in the file's order; NULL when none does. */
static psoup_status first_match(const psoup_json *patterns, const char *module, const char *where,
                                const char **out, psoup_error *error) {
    psoup_status status;
    const char *key = NULL;
    *out = NULL;
    while (psoup_json_next(patterns, &key) != NULL) {
        bool matched;
        PSOUP__TRY(psoup__peft_match(key, module, where, &matched, error));
        if (matched) {
            *out = key;
            break;
        }
    }
    return PSOUP_OK;
fail:
    return status;
}

/* The rank that the config gives a module, and its scale. */
static psoup_status find_scale(const psoup_json *config, const char *module, const char *where,
                               psoup__peft_pair *pair, psoup_error *error) {
    psoup_status status;
    const psoup_json *ranks = psoup_json_get(config, "rank_pattern");
    const psoup_json *alphas = psoup_json_get(config, "alpha_pattern");
    const char *rank_key, *alpha_key;
    PSOUP__TRY(first_match(ranks, module, where, &rank_key, error));
    PSOUP__TRY(first_match(alphas, module, where, &alpha_key, error));
    int64_t r = psoup_json_integer(psoup_json_get(config, "r"), 0);
    double default_alpha = psoup_json_real(psoup_json_get(config, "lora_alpha"), 0);
    double alpha = default_alpha;
    if (alpha_key != NULL)
        alpha = psoup_json_real(psoup_json_get(alphas, alpha_key), 0);
    if (rank_key != NULL) {
        r = psoup_json_integer(psoup_json_get(ranks, rank_key), 0);
        /* Up to 0.13 PEFT looked for one key in both tables, since then for one in each. */
        if (alpha != psoup_json_real(psoup_json_get(alphas, rank_key), default_alpha))
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "%s: rank_pattern and alpha_pattern have different keys for %.200s, "
                               "which PEFT's versions read differently; give both the same key",
                               where, module);
    }
    if (r > 1 << 20)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: rank_pattern: %lld is no rank", where,
                           (long long)r);
    pair->rank = (int32_t)r;
    pair->scale = (float)(psoup_json_bool(psoup_json_get(config, "use_rslora"), 0)
                              ? alpha / sqrt((double)r)
                              : alpha / (double)r);
    return PSOUP_OK;
fail:
    return status;
}

static bool cut_ending(const char *name, size_t *length, const char *ending) {
    size_t n = strlen(ending);
    if (*length < n || memcmp(name + *length - n, ending, n) != 0)
        return false;
    *length -= n;
    return true;
}

typedef enum part { PART_A, PART_B, PART_HEAD, PART_HEAD_BIAS, PART_UNKNOWN } part;

/* What a tensor is: [*begin, *begin + *length) of its name is its module. Some tools leave the
 * adapter's name ("default") in, or the wrapper's of modules_to_save. */
static part parse_name(const char *name, const char **begin, size_t *length) {
    if (strncmp(name, PREFIX, strlen(PREFIX)) != 0)
        return PART_UNKNOWN;
    const char *module = name + strlen(PREFIX);
    size_t n = strlen(module);
    bool bias = cut_ending(module, &n, ".bias");
    if (!bias && !cut_ending(module, &n, ".weight"))
        return PART_UNKNOWN;
    bool a = cut_ending(module, &n, ".lora_A") || cut_ending(module, &n, ".lora_A.default");
    bool b = !a && (cut_ending(module, &n, ".lora_B") || cut_ending(module, &n, ".lora_B.default"));
    *begin = module;
    *length = n;
    if (a || b)
        return bias || n == 0 ? PART_UNKNOWN : a ? PART_A : PART_B;
    if (!cut_ending(module, &n, ".modules_to_save"))
        cut_ending(module, &n, ".modules_to_save.default");
    if (n == 5 && memcmp(module, "score", 5) == 0)
        return bias ? PART_HEAD_BIAS : PART_HEAD;
    return PART_UNKNOWN;
}

static int by_module(const void *a, const void *b) {
    return strcmp(((const psoup__peft_pair *)a)->module, ((const psoup__peft_pair *)b)->module);
}

/* Sorts the tensors into pairs and the head. */
static psoup_status collect(psoup__peft *peft, psoup_error *error) {
    psoup_status status;
    const char *path = psoup__weights_path(peft->weights);
    size_t count = psoup__weights_count(peft->weights), bytes = 0;
    psoup__map *modules = NULL;
    for (size_t i = 0; i < count; i++) /* room for a NUL and for "model." */
        bytes += strlen(psoup__weights_name(peft->weights, i)) + 8;
    peft->pairs = psoup__alloc(peft->context, count, sizeof *peft->pairs, error);
    peft->names = psoup__alloc(peft->context, bytes, 1, error);
    if (peft->pairs == NULL || peft->names == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(psoup__map_create(peft->context, count, &modules, error));
    char *names = peft->names;
    for (size_t i = 0; i < count; i++) {
        const char *name = psoup__weights_name(peft->weights, i), *begin = name;
        const psoup__tensor *tensor = psoup__weights_tensor(peft->weights, i);
        size_t length = 0;
        part kind = parse_name(name, &begin, &length);
        bool head = kind == PART_HEAD && tensor->rank == 2 && tensor->shape[0] == 1;
        bool bias = kind == PART_HEAD_BIAS && tensor->rank == 1 && tensor->shape[0] == 1;
        bool factor = (kind == PART_A || kind == PART_B) && tensor->rank == 2;
        if (kind == PART_UNKNOWN || !psoup__dtype_is_float(tensor->dtype) || !(head || bias || factor)) {
            status = psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                                 "%s: tensor %.200s (%s of rank %d): expected "
                                 "base_model.model.….lora_A.weight or .lora_B.weight, matrices of "
                                 "floats, or base_model.model.score.weight, one row of them",
                                 path, name, psoup_dtype_name(tensor->dtype), tensor->rank);
            goto fail;
        }
        if (!factor) {
            psoup__tensor *place = head ? &peft->head : &peft->head_bias;
            if (psoup__tensor_is_there(place)) {
                status = psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: tensor %.200s is there twice",
                                     path, name);
                goto fail;
            }
            *place = *tensor;
            continue;
        }
        int64_t index = (int64_t)peft->n;
        if (!psoup__map_get(modules, begin, length, &index)) {
            PSOUP__TRY(psoup__map_set(modules, begin, length, index, NULL, error));
            psoup__peft_pair *pair = &peft->pairs[peft->n++];
            pair->module = names;
            memcpy(names, begin, length);
            names[length] = '\0';
            names += length + 1;
        }
        psoup__tensor *place =
            kind == PART_A ? &peft->pairs[index].a : &peft->pairs[index].b;
        if (psoup__tensor_is_there(place)) {
            status = psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: tensor %.200s is there twice", path,
                                 name);
            goto fail;
        }
        *place = *tensor;
    }
    status = PSOUP_OK;
fail:
    psoup__map_free(modules);
    return status;
}

/* Checks the shapes of every pair and gives it its scale and its final name: adapters of the bare
 * model (feature extraction) call model.layers… layers…. */
static psoup_status finish_pairs(psoup__peft *peft, const char *config_path, psoup_error *error) {
    psoup_status status;
    const char *path = psoup__weights_path(peft->weights);
    size_t bytes = 0;
    for (size_t i = 0; i < peft->n; i++) {
        psoup__peft_pair *pair = &peft->pairs[i];
        const psoup__tensor *a = &pair->a, *b = &pair->b;
        if (!psoup__tensor_is_there(a) || !psoup__tensor_is_there(b))
            return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %.200s has no lora_%s", path,
                               pair->module, psoup__tensor_is_there(a) ? "B" : "A");
        if (psoup__weights_gguf(peft->weights) != NULL)
            PSOUP__TRY(psoup__gguf_scale(psoup__weights_gguf(peft->weights), pair, error));
        else
            PSOUP__TRY(find_scale(peft->config, pair->module, config_path, pair, error));
        pair->transposed = psoup_json_bool(psoup_json_get(peft->config, "fan_in_fan_out"), 0);
        if (a->shape[0] != pair->rank || b->shape[1] != pair->rank || a->shape[1] < 1 ||
            b->shape[0] < 1)
            return psoup__fail(error, PSOUP_ERROR_FORMAT,
                               "%s: %.200s: lora_A is [%lld, %lld] and lora_B [%lld, %lld]; "
                               "expected rank %d, as %s says",
                               path, pair->module, (long long)a->shape[0], (long long)a->shape[1],
                               (long long)b->shape[0], (long long)b->shape[1], (int)pair->rank,
                               config_path);
        bytes += strlen(pair->module) + 8;
    }
    char *names = psoup__alloc(peft->context, bytes, 1, error);
    if (names == NULL)
        return PSOUP_ERROR_MEMORY;
    char *name = names;
    for (size_t i = 0; i < peft->n; i++) {
        const char *module = peft->pairs[i].module;
        size_t length = strlen(module), extra = strncmp(module, "layers.", 7) == 0 ? 6 : 0;
        memcpy(name, "model.", extra);
        memcpy(name + extra, module, length + 1);
        peft->pairs[i].module = name;
        name += extra + length + 1;
    }
    psoup__free(peft->context, peft->names);
    peft->names = names;
    if (peft->n > 0)
        qsort(peft->pairs, peft->n, sizeof *peft->pairs, by_module);
    for (size_t i = 1; i < peft->n; i++)
        if (by_module(&peft->pairs[i - 1], &peft->pairs[i]) == 0)
            return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %.200s is there twice", path,
                               peft->pairs[i].module);
    if (psoup__tensor_is_there(&peft->head_bias) && !psoup__tensor_is_there(&peft->head))
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: score has a bias but no weight", path);
    return PSOUP_OK;
fail:
    return status;
}

psoup_status psoup__peft_open(psoup_context *context, const char *directory, psoup__peft **out,
                              psoup_error *error) {
    return psoup__peft_open_heads(context, directory, 0, 0, out, error);
}

psoup_status psoup__peft_open_heads(psoup_context *context, const char *directory, int32_t heads,
                                    int32_t kv_heads, psoup__peft **out, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    bool gguf = psoup__is_gguf(directory);
    char *config_path = NULL;
    *out = NULL;
    psoup__peft *peft = psoup__alloc(context, 1, sizeof *peft, error);
    if (peft == NULL)
        return PSOUP_ERROR_MEMORY;
    peft->context = context;
    if ((peft->path = psoup__strdup(context, directory, error)) == NULL ||
        (config_path = gguf ? psoup__strdup(context, directory, error)
                            : psoup__path_join(context, directory, "adapter_config.json", error)) == NULL)
        goto fail;
    if (!gguf) {
        PSOUP__TRY(psoup_json_read(context, config_path, &peft->config, error));
        PSOUP__TRY(check_config(peft->config, config_path, error));
    }
    PSOUP__TRY(psoup__weights_open(context, directory, "adapter_model", heads, kv_heads, &peft->weights,
                                   error));
    PSOUP__TRY(collect(peft, error));
    PSOUP__TRY(finish_pairs(peft, config_path, error));
    if (gguf)
        PSOUP__TRY(psoup__gguf_adapter_config(psoup__weights_gguf(peft->weights),
                                              peft->n > 0 ? peft->pairs[0].rank : 0, &peft->config, error));
    if (peft->n == 0 && !psoup__tensor_is_there(&peft->head)) {
        status = psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: holds no lora_A and lora_B",
                             psoup__weights_path(peft->weights));
        goto fail;
    }
    *out = peft;
    peft = NULL;
    status = PSOUP_OK;
fail:
    psoup__free(context, config_path);
    psoup__peft_free(peft);
    return status;
}

void psoup__peft_free(psoup__peft *peft) {
    if (peft == NULL)
        return;
    psoup_context *context = peft->context;
    psoup__weights_free(peft->weights);
    psoup_json_free(peft->config);
    psoup__free(context, peft->pairs);
    psoup__free(context, peft->path);
    psoup__free(context, peft->names);
    psoup__free(context, peft);
}
