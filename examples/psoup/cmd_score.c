/* psoup score: log-probabilities of given tokens. */
#include "cli.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct score_args {
    const char *model, *device, *dtype, *mix, *method, *tokens, *prompts, *logits;
    cli_list adapters;
    bool any_sum, json;
    int32_t threads;
    float strength;
} score_args;

/* A line's tokens: its own "tokens", or "prompt" and "completion" as text. */
static psoup_status row_tokens(const score_args *args, const cli_model *m, const psoup_json *row,
                               int64_t line, int32_t **ids, size_t *n, psoup_error *error) {
    const psoup_json *list = psoup_json_get(row, "tokens");
    const char *prompt, *completion;
    if (list && psoup_json_kind(list) != PSOUP_JSON_ARRAY)
        return cli_error(error, PSOUP_ERROR_FORMAT, "%s:%lld: tokens: expected a list of token ids", args->prompts,
                         (long long)line);
    if (list) {
        *ids = malloc((psoup_json_size(list) + 1) * sizeof **ids);
        for (size_t i = 0; *ids && i < psoup_json_size(list); i++) {
            int64_t id = psoup_json_integer(psoup_json_at(list, i), -1);
            if (id < 0 || id > INT32_MAX)
                return cli_error(error, PSOUP_ERROR_FORMAT, "%s:%lld: tokens[%zu] is no token id",
                                 args->prompts, (long long)line, i);
            (*ids)[(*n)++] = (int32_t)id;
        }
        return *ids ? PSOUP_OK : cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    }
    psoup_status status = cli_text(row, "prompt", NULL, args->prompts, line, &prompt, error);
    if (status == PSOUP_OK)
        status = cli_text(row, "completion", "", args->prompts, line, &completion, error);
    if (status != PSOUP_OK)
        return status;
    if (!prompt)
        return cli_error(error, PSOUP_ERROR_FORMAT,
                         "%s:%lld: expected \"tokens\", or a text \"prompt\"", args->prompts,
                         (long long)line);
    if (!m->tokenizer)
        return cli_error(error, PSOUP_ERROR_STATE, "%s has no tokenizer.json, which texts need",
                         args->model);
    size_t length = strlen(prompt) + strlen(completion);
    char *text = malloc(length + 1);
    if (!text)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    strcpy(text, prompt);
    strcat(text, completion);
    status = cli_encode(m->tokenizer, text, length, PSOUP_ADD_SPECIAL, ids, n, error);
    free(text);
    return status;
}

static psoup_status print_scores(const score_args *args, size_t number, const int32_t *ids,
                                 size_t n, const float *logprobs, psoup_error *error) {
    double sum = 0;
    for (size_t i = 0; i + 1 < n; i++)
        sum += logprobs[i];
    if (isnan(sum))
        return cli_error(error, PSOUP_ERROR_STATE,
                         "%s: row %zu: its log-probabilities are not numbers: a weight or an adapter "
                         "of its mix diverged",
                         args->prompts ? args->prompts : "--tokens", number);
    if (!args->json) {
        for (size_t i = 0; i + 1 < n; i++)
            printf("%d %.9g\n", ids[i + 1], logprobs[i]);
        printf("sum %.9g\n", sum);
        return PSOUP_OK;
    }
    psoup_json *row = psoup_json_new_object(), *list = psoup_json_new_array();
    psoup_json *tokens = psoup_json_new_array();
    for (size_t i = 0; i < n; i++)
        psoup_json_append(tokens, psoup_json_new_integer(ids[i]));
    for (size_t i = 0; i + 1 < n; i++)
        psoup_json_append(list, psoup_json_new_real(logprobs[i]));
    psoup_json_set(row, "tokens", tokens);
    psoup_json_set(row, "logprobs", list);
    psoup_json_set(row, "sum", psoup_json_new_real(sum));
    return cli_print_json(row) == 0 ? PSOUP_OK
                                    : cli_error(error, PSOUP_ERROR_IO, "cannot write the result");
}

static psoup_status score(const score_args *args, const cli_model *m, const psoup_row *rows,
                          const int32_t *methods, size_t n, psoup_error *error) {
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    size_t tokens = 0, at = 0;
    for (size_t i = 0; i < n; i++)
        tokens += rows[i].n;
    psoup_status status = psoup_model_get_config(m->model, &config, error);
    float *logprobs = malloc((tokens + 1) * sizeof *logprobs), *logits = NULL;
    if (status == PSOUP_OK && !logprobs)
        status = cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    if (status == PSOUP_OK)
        status = psoup_model_logprobs_mixed(m->model, rows, methods, n, logprobs, error);
    if (status == PSOUP_OK && args->logits) {
        int64_t shape[] = {(int64_t)tokens, config.vocab_size};
        logits = malloc((tokens * (size_t)config.vocab_size + 1) * sizeof *logits);
        psoup_named_tensor tensor = {"logits", PSOUP_F32, 2, shape, logits};
        status = logits ? psoup_model_logits_mixed(m->model, rows, methods, n, logits, error)
                        : cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
        if (status == PSOUP_OK)
            status = psoup_safetensors_write(m->context, args->logits, &tensor, 1, error);
    }
    for (size_t i = 0; status == PSOUP_OK && i < n; i++) {
        status = print_scores(args, i + 1, rows[i].tokens, rows[i].n, logprobs + at, error);
        at += rows[i].n ? rows[i].n - 1 : 0;
    }
    free(logits);
    free(logprobs);
    return status;
}

/* One more row, from a line of the file or (line NULL) from --tokens, with its own mix or --mix. */
static psoup_status add_row(const score_args *args, const cli_model *m, const psoup_json *line,
                            int64_t number, psoup_row **rows, int32_t **methods, size_t *n,
                            psoup_error *error) {
    psoup_row *grown = realloc(*rows, (*n + 1) * sizeof *grown);
    int32_t *method = realloc(*methods, (*n + 1) * sizeof *method);
    float *mix = calloc((size_t)psoup_model_adapters(m->model) + 1, sizeof *mix);
    const psoup_json *own = psoup_json_get(line, "mix");
    int32_t *ids = NULL;
    if (grown)
        *rows = grown;
    if (method)
        *methods = method;
    if (!grown || !method || !mix) {
        free(mix);
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    }
    psoup_row *row = &grown[*n];
    method += (*n)++;
    *row = (psoup_row){.mix = mix};
    psoup_status status = line ? row_tokens(args, m, line, number, &ids, &row->n, error)
                               : cli_parse_ids("--tokens", args->tokens, &ids, &row->n, error);
    row->tokens = ids;
    if (status == PSOUP_OK)
        status = cli_check_line(m, row->tokens, row->n, 0, line ? args->prompts : NULL, number, "--tokens", error);
    if (status == PSOUP_OK)
        status = cli_mix_method(line, args->method, args->prompts, number, method, error);
    if (status != PSOUP_OK)
        return status;
    status = own ? cli_read_mix(m, own, args->any_sum, args->prompts, number, mix, error)
                 : psoup_model_parse_mix(m->model, args->mix ? args->mix : "", args->any_sum, mix, error);
    return status == PSOUP_OK ? cli_strengthen(m, line, args->strength, args->prompts, number, mix, error) : status;
}

static psoup_status run(const score_args *args, const cli_model *m, psoup_error *error) {
    psoup_jsonl_reader *reader = NULL;
    psoup_row *rows = NULL;
    int32_t *methods = NULL;
    size_t n = 0;
    psoup_status status = args->prompts
                              ? psoup_jsonl_open(m->context, args->prompts, &reader, error)
                              : add_row(args, m, NULL, 0, &rows, &methods, &n, error);
    while (status == PSOUP_OK && reader) {
        psoup_json *line = NULL;
        status = psoup_jsonl_next(reader, &line, error);
        if (status != PSOUP_OK || !line)
            break;
        status = add_row(args, m, line, psoup_jsonl_line(reader), &rows, &methods, &n, error);
        psoup_json_free(line);
    }
    if (status == PSOUP_OK && n == 0)
        status = cli_error(error, PSOUP_ERROR_FORMAT, "%s: no rows in it", args->prompts);
    if (status == PSOUP_OK)
        status = score(args, m, rows, methods, n, error);
    for (size_t i = 0; i < n; i++) {
        free((void *)rows[i].tokens);
        free((void *)rows[i].mix);
    }
    free(rows);
    free(methods);
    psoup_jsonl_reader_free(reader);
    return status;
}

int cmd_score(int argc, char **argv) {
    score_args a = {.strength = 1};
    cli_list arguments = {0};
    int status;
    const cli_option options[] = {
        {"--model", CLI_TEXT, &a.model, "DIR", "the base model"},
        {"--adapter", CLI_LIST, &a.adapters, "NAME=DIR", "a PEFT adapter under a name"},
        {"--mix", CLI_TEXT, &a.mix, "NAME=W,…", "weights of the adapters; absent: the base"},
        {"--mix-method", CLI_TEXT, &a.method, "NAME", "what is weighed: delta, factors or logits (delta)"},
        {"--strength", CLI_FLOAT, &a.strength, "S", "multiplies the weights, which sum to 1 before (1)"},
        {"--any-sum", CLI_FLAG, &a.any_sum, NULL, "accept weights that do not sum to 1"},
        {"--tokens", CLI_TEXT, &a.tokens, "IDS", "token ids, separated by blanks"},
        {"--prompts", CLI_TEXT, &a.prompts, "FILE",
         "JSON Lines of \"tokens\", or of \"prompt\" and \"completion\", and \"mix\", \"mix_method\" and "
         "\"strength\" if any"},
        {"--logits", CLI_TEXT, &a.logits, "FILE",
         "write the logits, f32 [tokens, vocabulary], as "
         "safetensors"},
        {"--device", CLI_TEXT, &a.device, "DEVICE", "cpu, cuda or cuda:N (cpu)"},
        {"--dtype", CLI_TEXT, &a.dtype, "DTYPE", "the model in f32, f16 or bf16, or its linears in int8 or nf4 (as stored)"},
        {"--threads", CLI_INT, &a.threads, "N", "0 is one per processor (0)"},
        {"--json", CLI_FLAG, &a.json, NULL, "print JSON Lines instead of text"},
        {0}};
    if (!cli_parse(
            argc, argv, options,
            "Usage: psoup score --model DIR --tokens \"1 2 3\"\n\nPrints the log-probability "
            "of every token but the first, given those before it, and the sum.\n",
            &arguments, &status))
        return status;
    if (arguments.n)
        return cli_complain("score: unexpected \"%s\"", arguments.items[0]);
    if (!a.model)
        return cli_complain("score: expected --model DIR");
    if (!a.tokens == !a.prompts)
        return cli_complain("score: expected either --tokens IDS or --prompts FILE");
    psoup_error error = {0};
    cli_model m;
    psoup_status done = cli_open(a.model, a.device, a.dtype, a.threads, &a.adapters, false, &m, &error);
    if (done == PSOUP_OK)
        done = run(&a, &m, &error);
    status = done == PSOUP_OK ? 0 : cli_fail(&error);
    cli_close(&m);
    return status;
}
