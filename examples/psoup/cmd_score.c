/* psoup score: log-probabilities of given tokens. */
#include "cli.h"

#include <stdlib.h>
#include <string.h>

typedef struct score_args {
    const char *model, *mix, *tokens, *prompts, *logits;
    cli_list adapters;
    bool any_sum, json;
    int32_t threads;
} score_args;

static psoup_status parse_tokens(const char *text, int32_t **ids, size_t *n, psoup_error *error) {
    char *end;
    *ids = malloc((strlen(text) + 1) * sizeof **ids);
    if (!*ids)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    for (const char *at = text; at[strspn(at, " ,")]; at = end) {
        at += strspn(at, " ,");
        long id = strtol(at, &end, 10);
        if (end == at || id < 0 || id > INT32_MAX)
            return cli_error(error, PSOUP_ERROR_ARGUMENT,
                             "--tokens: \"%.40s\", expected token ids separated by blanks", at);
        (*ids)[(*n)++] = (int32_t)id;
    }
    return PSOUP_OK;
}

/* A line's tokens: its own "tokens", or "prompt" and "completion" as text. */
static psoup_status row_tokens(const score_args *args, const cli_model *m, const psoup_json *row,
                               int64_t line, int32_t **ids, size_t *n, psoup_error *error) {
    const psoup_json *list = psoup_json_get(row, "tokens");
    const char *prompt = psoup_json_string(psoup_json_get(row, "prompt"), NULL);
    const char *completion = psoup_json_string(psoup_json_get(row, "completion"), "");
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
    psoup_status status = cli_encode(m->tokenizer, text, length, PSOUP_ADD_SPECIAL, ids, n, error);
    free(text);
    return status;
}

static psoup_status print_scores(const score_args *args, const int32_t *ids, size_t n,
                                 const float *logprobs, psoup_error *error) {
    double sum = 0;
    for (size_t i = 0; i + 1 < n; i++)
        sum += logprobs[i];
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
                          size_t n, psoup_error *error) {
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    size_t tokens = 0, at = 0;
    for (size_t i = 0; i < n; i++)
        tokens += rows[i].n;
    psoup_status status = psoup_model_get_config(m->model, &config, error);
    float *logprobs = malloc((tokens + 1) * sizeof *logprobs), *logits = NULL;
    if (status == PSOUP_OK && !logprobs)
        status = cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    if (status == PSOUP_OK)
        status = psoup_model_logprobs(m->model, rows, n, logprobs, error);
    if (status == PSOUP_OK && args->logits) {
        int64_t shape[] = {(int64_t)tokens, config.vocab_size};
        logits = malloc((tokens * (size_t)config.vocab_size + 1) * sizeof *logits);
        psoup_named_tensor tensor = {"logits", PSOUP_F32, 2, shape, logits};
        status = logits ? psoup_model_logits(m->model, rows, n, logits, error)
                        : cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
        if (status == PSOUP_OK)
            status = psoup_safetensors_write(m->context, args->logits, &tensor, 1, error);
    }
    for (size_t i = 0; status == PSOUP_OK && i < n; i++) {
        status = print_scores(args, rows[i].tokens, rows[i].n, logprobs + at, error);
        at += rows[i].n ? rows[i].n - 1 : 0;
    }
    free(logits);
    free(logprobs);
    return status;
}

static psoup_status run(const score_args *args, const cli_model *m, psoup_error *error) {
    psoup_jsonl_reader *reader = NULL;
    psoup_row *rows = NULL;
    size_t n = 0;
    psoup_status status = PSOUP_OK;
    float *mix = calloc((size_t)psoup_model_adapters(m->model) + 1, sizeof *mix);
    if (!mix)
        status = cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    if (status == PSOUP_OK)
        status =
            psoup_model_parse_mix(m->model, args->mix ? args->mix : "", args->any_sum, mix, error);
    if (status == PSOUP_OK && args->prompts)
        status = psoup_jsonl_open(m->context, args->prompts, &reader, error);
    for (bool more = true; status == PSOUP_OK && more; more = reader != NULL) {
        psoup_json *row = NULL;
        int32_t *ids = NULL;
        size_t count = 0;
        if (reader) {
            status = psoup_jsonl_next(reader, &row, error);
            if (status != PSOUP_OK || !row)
                break;
            status = row_tokens(args, m, row, psoup_jsonl_line(reader), &ids, &count, error);
            psoup_json_free(row);
        } else
            status = parse_tokens(args->tokens, &ids, &count, error);
        psoup_row *grown = realloc(rows, (n + 1) * sizeof *rows);
        if (!grown) {
            free(ids);
            status = cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
            break;
        }
        rows = grown;
        rows[n++] = (psoup_row){.tokens = ids, .n = count, .mix = mix};
        if (status == PSOUP_OK && count == 0)
            status = cli_error(error, PSOUP_ERROR_ARGUMENT, "row %zu has no tokens", n);
    }
    if (status == PSOUP_OK)
        status = score(args, m, rows, n, error);
    for (size_t i = 0; i < n; i++)
        free((void *)rows[i].tokens);
    free(rows);
    free(mix);
    psoup_jsonl_reader_free(reader);
    return status;
}

int cmd_score(int argc, char **argv) {
    score_args a = {0};
    cli_list arguments = {0};
    int status;
    const cli_option options[] = {
        {"--model", CLI_TEXT, &a.model, "DIR", "the base model"},
        {"--adapter", CLI_LIST, &a.adapters, "NAME=DIR", "a PEFT adapter under a name"},
        {"--mix", CLI_TEXT, &a.mix, "NAME=W,…", "weights of the adapters; absent: the base"},
        {"--any-sum", CLI_FLAG, &a.any_sum, NULL, "accept weights that do not sum to 1"},
        {"--tokens", CLI_TEXT, &a.tokens, "IDS", "token ids, separated by blanks"},
        {"--prompts", CLI_TEXT, &a.prompts, "FILE",
         "JSON Lines of \"tokens\", or of \"prompt\" and \"completion\""},
        {"--logits", CLI_TEXT, &a.logits, "FILE",
         "write the logits, f32 [tokens, vocabulary], as "
         "safetensors"},
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
    if (!a.tokens == !a.prompts)
        return cli_complain("score: expected either --tokens IDS or --prompts FILE");
    psoup_error error = {0};
    cli_model m;
    psoup_status done = cli_open(a.model, a.threads, &a.adapters, false, &m, &error);
    if (done == PSOUP_OK)
        done = run(&a, &m, &error);
    status = done == PSOUP_OK ? 0 : cli_fail(&error);
    cli_close(&m);
    return status;
}
