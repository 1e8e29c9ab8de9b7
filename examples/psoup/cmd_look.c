/* psoup info, psoup tokenize: what is there. */
#include "cli.h"

#include <stdlib.h>
#include <string.h>

/* ---- info -------------------------------------------------------------------------------------- */

static const char *const rope_names[] = {"default", "linear", "llama3", "yarn", "dynamic"};

static psoup_json *model_json(const cli_model *m, psoup_error *error) {
    psoup_model_config c = PSOUP_MODEL_CONFIG_INIT;
    if (psoup_model_get_config(m->model, &c, error) != PSOUP_OK)
        return NULL;
    const struct {
        const char *name;
        int64_t value;
    } integers[] = {{"parameters", psoup_model_parameters(m->model)},
                    {"vocab_size", c.vocab_size},
                    {"hidden_size", c.hidden_size},
                    {"intermediate_size", c.intermediate_size},
                    {"num_hidden_layers", c.num_hidden_layers},
                    {"num_attention_heads", c.num_attention_heads},
                    {"num_key_value_heads", c.num_key_value_heads},
                    {"head_dim", c.head_dim},
                    {"max_position_embeddings", c.max_position_embeddings},
                    {"bos_token_id", c.bos_token_id},
                    {"eos_token_id", c.eos_token_id}};
    psoup_json *out = psoup_json_new_object();
    psoup_json_set(out, "kind", psoup_json_new_string("model"));
    for (size_t i = 0; i < sizeof integers / sizeof *integers; i++)
        psoup_json_set(out, integers[i].name, psoup_json_new_integer(integers[i].value));
    psoup_json *ends = psoup_json_new_array(); /* what ends a text */
    if (c.eos_token_id >= 0)
        psoup_json_append(ends, psoup_json_new_integer(c.eos_token_id));
    for (size_t i = 0; i < sizeof c.more_eos_token_ids / sizeof *c.more_eos_token_ids; i++)
        if (c.more_eos_token_ids[i] >= 0)
            psoup_json_append(ends, psoup_json_new_integer(c.more_eos_token_ids[i]));
    psoup_json_set(out, "end_tokens", ends);
    psoup_json_set(out, "rope_theta", psoup_json_new_real(c.rope_theta));
    psoup_json_set(out, "rope_scaling", psoup_json_new_string(rope_names[c.rope_scaling]));
    psoup_json_set(out, "tie_word_embeddings", psoup_json_new_bool(c.tie_word_embeddings));
    psoup_json_set(out, "dtype",
                   psoup_json_new_string(psoup_dtype_name((psoup_dtype)c.torch_dtype)));
    if (c.linear_dtype)
        psoup_json_set(out, "linear_dtype",
                       psoup_json_new_string(psoup_dtype_name((psoup_dtype)c.linear_dtype)));
    psoup_json_set(out, "tokenizer_tokens",
                   m->tokenizer ? psoup_json_new_integer(psoup_tokenizer_vocab_size(m->tokenizer))
                                : psoup_json_new_null());
    psoup_json_set(out, "isa", psoup_json_new_string(psoup_context_isa(m->context)));
    return out;
}

/* An adapter: what its weights come to, and its own configuration file, if it has one (path). */
static psoup_json *adapter_json(psoup_context *context, const char *directory, const char *path, psoup_error *error) {
    static const char *const kept[] = {"peft_type",
                                       "task_type",
                                       "r",
                                       "lora_alpha",
                                       "use_rslora",
                                       "target_modules",
                                       "modules_to_save",
                                       "base_model_name_or_path"};
    psoup_json *config = NULL, *found = NULL, *out = NULL;
    if (path && psoup_json_read(context, path, &config, error) != PSOUP_OK)
        return NULL;
    if (path && psoup_json_kind(config) != PSOUP_JSON_OBJECT)
        cli_error(error, PSOUP_ERROR_FORMAT, "%s: expected an object", path);
    else if (psoup_merge_inspect(context, &directory, 1, NULL, &found, error) == PSOUP_OK) {
        const psoup_json *weights = psoup_json_at(psoup_json_get(found, "adapters"), 0);
        out = psoup_json_new_object();
        psoup_json_set(out, "kind", psoup_json_new_string("adapter"));
        psoup_json_set(out, "parameters", psoup_json_copy(psoup_json_get(weights, "parameters")));
        psoup_json_set(out, "modules", psoup_json_copy(psoup_json_get(weights, "modules")));
        psoup_json_set(out, "norm", psoup_json_copy(psoup_json_at(psoup_json_get(found, "norms"), 0)));
        for (size_t i = 0; i < sizeof kept / sizeof *kept; i++)
            if (psoup_json_get(config, kept[i]))
                psoup_json_set(out, kept[i], psoup_json_copy(psoup_json_get(config, kept[i])));
    }
    psoup_json_free(found);
    psoup_json_free(config);
    return out;
}

static int print_table(psoup_json *object) {
    const char *key = NULL;
    const psoup_json *value;
    while ((value = psoup_json_next(object, &key))) {
        char *text = psoup_json_text(value, 0);
        const char *plain = psoup_json_string(value, text ? text : "?");
        printf("%-24s %s\n", key, plain);
        psoup_text_free(text);
    }
    psoup_json_free(object);
    return 0;
}

int cmd_info(int argc, char **argv) {
    bool json = false;
    cli_list arguments = {0};
    int status;
    const char *dtype = NULL;
    const cli_option options[] = {
        {"--json", CLI_FLAG, &json, NULL, "print one line of JSON"},
        {"--dtype", CLI_TEXT, &dtype, "DTYPE", "load it in f32, f16, bf16, int8 or nf4 (as stored)"},
        {0}};
    if (!cli_parse(
            argc, argv, options,
            "Usage: psoup info DIR\n\nDescribes a model or an adapter, a directory or a .gguf file, which is loaded and "
            "checked.\n",
            &arguments, &status))
        return status;
    if (arguments.n != 1)
        return cli_complain("info: expected one directory, got %zu", arguments.n);
    const char *directory = arguments.items[0];
    psoup_error error = {0};
    cli_model opened = {0};
    psoup_json *out = NULL;
    char *path = malloc(strlen(directory) + sizeof "/adapter_config.json");
    if (!path)
        return cli_complain("out of memory"), 1;
    sprintf(path, "%s/adapter_config.json", directory);
    size_t length = strlen(directory);
    FILE *adapter = fopen(path, "rb");
    if (length > 5 && !strcmp(directory + length - 5, ".gguf") &&
        psoup_context_create(NULL, &opened.context, &error) == PSOUP_OK) { /* an adapter, or else a model */
        psoup_error no_adapter;
        out = adapter_json(opened.context, directory, NULL, &no_adapter);
        cli_close(&opened);
    }
    if (adapter) {
        fclose(adapter);
        if (psoup_context_create(NULL, &opened.context, &error) == PSOUP_OK)
            out = adapter_json(opened.context, directory, path, &error);
    } else if (!out && cli_open(directory, NULL, dtype, 1, NULL, false, &opened, &error) == PSOUP_OK)
        out = model_json(&opened, &error);
    free(path);
    cli_close(&opened);
    if (!out)
        return cli_fail(&error);
    return json ? cli_print_json(out) : print_table(out);
}

/* ---- tokenize ---------------------------------------------------------------------------------- */

static psoup_status print_text(const psoup_tokenizer *tokenizer, const char *list,
                               psoup_error *error) {
    int32_t *ids = NULL;
    size_t n, length;
    char *text = NULL;
    psoup_status status = cli_parse_ids("--decode", list, &ids, &n, error);
    if (status == PSOUP_OK)
        status = cli_decode(tokenizer, ids, n, &text, &length, error);
    if (status == PSOUP_OK) {
        fwrite(text, 1, length, stdout);
        putchar('\n');
    }
    free(text);
    free(ids);
    return status;
}

static psoup_json *tokens_json(const psoup_tokenizer *tokenizer, const int32_t *ids,
                               const psoup_offset *offsets, size_t n) {
    psoup_json *out = psoup_json_new_object(), *all_ids = psoup_json_new_array();
    psoup_json *tokens = psoup_json_new_array(), *spans = psoup_json_new_array();
    for (size_t i = 0; i < n; i++) {
        const char *name = psoup_tokenizer_token(tokenizer, ids[i]);
        psoup_json *span = psoup_json_new_array();
        psoup_json_append(all_ids, psoup_json_new_integer(ids[i]));
        psoup_json_append(tokens, psoup_json_new_string(name ? name : ""));
        psoup_json_append(span, psoup_json_new_integer((int64_t)offsets[i].begin));
        psoup_json_append(span, psoup_json_new_integer((int64_t)offsets[i].end));
        psoup_json_append(spans, span);
    }
    psoup_json_set(out, "ids", all_ids);
    psoup_json_set(out, "tokens", tokens);
    psoup_json_set(out, "offsets", spans);
    return out;
}

static psoup_status print_tokens(const psoup_tokenizer *tokenizer, const char *text, uint32_t flags,
                                 bool json, psoup_error *error) {
    size_t length = strlen(text), capacity = 4 * length + 8, n = 0;
    int32_t *ids = malloc(capacity * sizeof *ids);
    psoup_offset *offsets = malloc(capacity * sizeof *offsets);
    psoup_status status =
        ids && offsets ? psoup_tokenizer_encode(tokenizer, text, length, flags, ids, offsets,
                                                capacity, &n, error)
                       : cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    if (status == PSOUP_OK && json && cli_print_json(tokens_json(tokenizer, ids, offsets, n)) != 0)
        status = cli_error(error, PSOUP_ERROR_IO, "cannot write the result");
    for (size_t i = 0; status == PSOUP_OK && !json && i < n; i++)
        printf("%s%d", i ? " " : "", ids[i]);
    if (status == PSOUP_OK && !json)
        putchar('\n');
    free(ids);
    free(offsets);
    return status;
}

int cmd_tokenize(int argc, char **argv) {
    bool json = false, plain = false;
    const char *model = NULL, *decode = NULL;
    cli_list arguments = {0};
    int status;
    const cli_option options[] = {
        {"--model", CLI_TEXT, &model, "DIR", "model directory, or a tokenizer.json"},
        {"--no-special", CLI_FLAG, &plain, NULL, "add no special tokens such as <s>"},
        {"--decode", CLI_TEXT, &decode, "IDS", "the other way: \"1 15 27\" to text"},
        {"--json", CLI_FLAG, &json, NULL, "print one line of JSON with ids, tokens and offsets"},
        {0}};
    if (!cli_parse(argc, argv, options,
                   "Usage: psoup tokenize --model DIR TEXT\n\nPrints the token ids of a text, "
                   "separated by blanks.\n",
                   &arguments, &status))
        return status;
    if (!model || (arguments.n != 1) == !decode)
        return cli_complain("tokenize: expected --model DIR and one TEXT (or --decode IDS)");
    psoup_error error = {0};
    psoup_context *context = NULL;
    psoup_tokenizer *tokenizer = NULL;
    psoup_status done = psoup_context_create(NULL, &context, &error);
    if (done == PSOUP_OK)
        done = psoup_tokenizer_load(context, model, &tokenizer, &error);
    if (done == PSOUP_OK)
        done = decode ? print_text(tokenizer, decode, &error)
                      : print_tokens(tokenizer, arguments.items[0], plain ? 0 : PSOUP_ADD_SPECIAL,
                                     json, &error);
    psoup_tokenizer_free(tokenizer);
    psoup_context_free(context);
    return done == PSOUP_OK ? 0 : cli_fail(&error);
}
