/* Models, texts and mixes, as several commands open them. */
#include "cli.h"

#include <stdlib.h>
#include <string.h>

void cli_close(cli_model *opened) {
    psoup_tokenizer_free(opened->tokenizer);
    psoup_model_free(opened->model);
    psoup_comm_free(opened->comm);
    psoup_comm_free(opened->line);
    psoup_context_free(opened->context);
    *opened = (cli_model){0};
}

static psoup_status load_adapter(psoup_model *model, const char *text, psoup_error *error) {
    const char *equal = strchr(text, '=');
    if (!equal || equal == text || !equal[1])
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "--adapter \"%s\": expected NAME=DIR", text);
    char *name = strndup(text, (size_t)(equal - text));
    if (!name)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    psoup_status status = psoup_model_load_adapter(model, name, equal + 1, error);
    free(name);
    return status;
}

/* The dtype that a model is to be kept in. */
static psoup_status read_dtype(const char *name, int32_t *out, psoup_error *error) {
    psoup_dtype dtype;
    if (!name)
        return PSOUP_OK;
    if (psoup_dtype_parse(name, &dtype, NULL) != PSOUP_OK ||
        (dtype > PSOUP_BF16 && dtype != PSOUP_INT8 && dtype != PSOUP_NF4))
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "dtype: \"%.60s\", expected f32, f16, bf16, int8 or nf4", name);
    *out = (int32_t)dtype;
    return PSOUP_OK;
}

psoup_status cli_open(const char *directory, const char *device, const char *dtype, int32_t threads,
                      const cli_list *adapters, bool need_tokenizer, cli_model *out, psoup_error *error) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_load_options load = PSOUP_LOAD_OPTIONS_INIT;
    *out = (cli_model){0};
    options.device = device;
    options.threads = threads;
    options.log = cli_log;
    psoup_status status = read_dtype(dtype, &load.dtype, error);
    if (status == PSOUP_OK)
        status = psoup_context_create(&options, &out->context, error);
    if (status == PSOUP_OK)
        status = psoup_model_load_with(out->context, directory, &load, &out->model, error);
    for (size_t i = 0; status == PSOUP_OK && adapters && i < adapters->n; i++)
        status = load_adapter(out->model, adapters->items[i], error);
    if (status == PSOUP_OK) {
        psoup_error found = {0};
        status = psoup_tokenizer_load(out->context, directory, &out->tokenizer, &found);
        const char *dot = strrchr(directory, '.');
        bool inside = dot && !strcmp(dot, ".gguf"); /* the model's own file, which has no tokenizer.json */
        if ((status == PSOUP_ERROR_IO || inside) && !need_tokenizer) /* absent, where it may be */
            status = PSOUP_OK;
        else if (status != PSOUP_OK)
            *error = found;
    }
    if (status != PSOUP_OK)
        cli_close(out);
    return status;
}

/* ---- texts ------------------------------------------------------------------------------------- */

psoup_status cli_encode(const psoup_tokenizer *tokenizer, const char *text, size_t length,
                        uint32_t flags, int32_t **ids, size_t *n, psoup_error *error) {
    size_t capacity = 4 * length + 8;
    *ids = malloc(capacity * sizeof **ids);
    if (!*ids)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    return psoup_tokenizer_encode(tokenizer, text, length, flags, *ids, NULL, capacity, n, error);
}

psoup_status cli_parse_ids(const char *option, const char *text, int32_t **ids, size_t *n,
                           psoup_error *error) {
    char *end;
    *n = 0;
    *ids = malloc((strlen(text) + 1) * sizeof **ids);
    if (!*ids)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    for (const char *at = text; at[strspn(at, " ,")]; at = end) {
        at += strspn(at, " ,");
        long id = strtol(at, &end, 10);
        if (end == at || id < 0 || id > INT32_MAX)
            return cli_error(error, PSOUP_ERROR_ARGUMENT,
                             "%s: \"%.40s\", expected token ids separated by blanks", option, at);
        (*ids)[(*n)++] = (int32_t)id;
    }
    return PSOUP_OK;
}

psoup_status cli_decode(const psoup_tokenizer *tokenizer, const int32_t *ids, size_t n, char **text,
                        size_t *length, psoup_error *error) {
    *text = NULL;
    *length = 0;
    psoup_status status = psoup_tokenizer_decode(tokenizer, ids, n, 1, NULL, 0, length, error);
    if (status != PSOUP_OK)
        return status;
    *text = calloc(*length + 1, 1);
    if (!*text)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    return psoup_tokenizer_decode(tokenizer, ids, n, 1, *text, *length, length, error);
}

size_t cli_character(const char *text, size_t length) {
    const unsigned char *c = (const unsigned char *)text;
    size_t n = c[0] < 0x80 ? 1 : c[0] < 0xC2 ? 0 : c[0] < 0xE0 ? 2 : c[0] < 0xF0 ? 3 : 4;
    if (c[0] > 0xF4 || n > length)
        return 0;
    for (size_t i = 1; i < n; i++)
        if (c[i] >> 6 != 2)
            return 0;
    /* overlong forms, surrogates, and past U+10FFFF (Unicode 15, table 3-7) */
    bool bad = (c[0] == 0xE0 && c[1] < 0xA0) || (c[0] == 0xED && c[1] > 0x9F) ||
               (c[0] == 0xF0 && c[1] < 0x90) || (c[0] == 0xF4 && c[1] > 0x8F);
    return bad ? 0 : n;
}

char *cli_utf8(const char *text, size_t length) {
    char *out = malloc(3 * length + 1), *to = out;
    for (size_t at = 0; out && at < length;) {
        size_t n = text[at] ? cli_character(text + at, length - at) : 0;
        memcpy(to, n ? text + at : "\xEF\xBF\xBD", n ? n : 3);
        to += n ? n : 3;
        at += n ? n : 1;
    }
    if (out)
        *to = 0;
    return out;
}

/* ---- lines of a file ------------------------------------------------------------------------------ */

psoup_status cli_text(const psoup_json *line, const char *name, const char *otherwise, const char *path, int64_t number,
                      const char **out, psoup_error *error) {
    const psoup_json *own = psoup_json_get(line, name);
    *out = psoup_json_string(own, otherwise);
    if (own && psoup_json_kind(own) != PSOUP_JSON_STRING && psoup_json_kind(own) != PSOUP_JSON_NULL)
        return cli_error(error, PSOUP_ERROR_FORMAT, "%s:%lld: %s: expected a text", path, (long long)number, name);
    return PSOUP_OK;
}

psoup_status cli_check_tokens(const cli_model *m, const int32_t *ids, size_t n, size_t more, const char *where,
                              psoup_error *error) {
    psoup_model_config c = PSOUP_MODEL_CONFIG_INIT;
    psoup_status status = psoup_model_get_config(m->model, &c, error);
    if (status == PSOUP_OK && n == 0)
        status = cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: no tokens", where);
    if (status == PSOUP_OK && n + more > (size_t)c.max_position_embeddings)
        status = cli_error(error, PSOUP_ERROR_ARGUMENT,
                           "%s: %zu tokens, expected at most %d: the model's max_position_embeddings is %d", where, n,
                           c.max_position_embeddings - (int)more, c.max_position_embeddings);
    for (size_t i = 0; status == PSOUP_OK && i < n; i++)
        if (ids[i] >= c.vocab_size)
            status = cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: token %d, expected 0 to %d: the model's vocabulary",
                               where, ids[i], c.vocab_size - 1);
    return status;
}

psoup_status cli_check_line(const cli_model *m, const int32_t *ids, size_t n, size_t more, const char *path,
                            int64_t number, const char *option, psoup_error *error) {
    char where[256];
    if (path)
        snprintf(where, sizeof where, "%s:%lld", path, (long long)number);
    return cli_check_tokens(m, ids, n, more, path ? where : option, error);
}

/* ---- mixes ------------------------------------------------------------------------------------- */

psoup_status cli_mix_method(const psoup_json *line, const char *option, const char *path, int64_t number,
                            int32_t *method, psoup_error *error) {
    const psoup_json *own = psoup_json_get(line, "mix_method");
    psoup_error inner;
    *method = PSOUP_MIX_DELTA;
    if (own && psoup_mix_method_parse(psoup_json_string(own, "?"), method, &inner) != PSOUP_OK)
        return cli_error(error, PSOUP_ERROR_FORMAT, "%s:%lld: %s", path, (long long)number, inner.message);
    if (!own && option && psoup_mix_method_parse(option, method, &inner) != PSOUP_OK)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "--mix-method: %s", inner.message);
    return PSOUP_OK;
}

psoup_status cli_strengthen(const cli_model *m, const psoup_json *line, float option, const char *path, int64_t number,
                            float *mix, psoup_error *error) {
    const psoup_json *own = psoup_json_get(line, "strength");
    double strength = psoup_json_real(own, own ? 1e300 : option);
    if (!(strength > -1e30 && strength < 1e30) && own)
        return cli_error(error, PSOUP_ERROR_FORMAT, "%s:%lld: strength: expected a number", path, (long long)number);
    if (!(strength > -1e30 && strength < 1e30))
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "--strength: expected a number");
    for (int32_t i = 0; i < psoup_model_adapters(m->model); i++)
        mix[i] *= (float)strength;
    return PSOUP_OK;
}

psoup_status cli_read_mix(const cli_model *m, const psoup_json *object, bool any_sum,
                          const char *path, int64_t line, float *mix, psoup_error *error) {
    const psoup_json *weight;
    const char *name = NULL;
    double sum = 0;
    if (psoup_json_kind(object) != PSOUP_JSON_OBJECT)
        return cli_error(error, PSOUP_ERROR_FORMAT, "%s:%lld: mix: expected an object of weights",
                         path, (long long)line);
    while ((weight = psoup_json_next(object, &name))) {
        int32_t index = psoup_model_find_adapter(m->model, name);
        double w = psoup_json_real(weight, 1e300);
        if (index < 0)
            return cli_error(error, PSOUP_ERROR_ARGUMENT,
                             "%s:%lld: mix: no adapter is named \"%s\" (--adapter NAME=DIR)", path,
                             (long long)line, name);
        if (!(w > -1e30 && w < 1e30))
            return cli_error(error, PSOUP_ERROR_ARGUMENT,
                             "%s:%lld: mix: the weight of \"%s\" is not a number", path,
                             (long long)line, name);
        mix[index] = (float)w;
        sum += w;
    }
    if (psoup_json_size(object) > 0 && !any_sum && !(sum >= 1 - 1e-6 && sum <= 1 + 1e-6))
        return cli_error(error, PSOUP_ERROR_ARGUMENT,
                         "%s:%lld: mix: the weights sum to %.9g, expected 1 (or --any-sum)", path,
                         (long long)line, sum);
    return PSOUP_OK;
}
