/* psoup generate: text from a model, every prompt with its own mix. */
#include "plan.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct job {
    psoup_json *row; /* of the prompts file; NULL for --prompt */
    int64_t line;    /* and where; 0 */
    int32_t *tokens;
    size_t n;
    float *mix;
    int32_t method;
} job;

typedef struct generate_args {
    const char *model, *device, *dtype, *mix, *method, *prompt, *prompts, *template, *preference, *out;
    cli_list adapters, rewards;
    bool any_sum, json, ignore_stop;
    int32_t threads, batch, best_of;
    float strength;
    psoup_sampling sampling;
    const char *memory_limit;
    plan_options plan;
} generate_args;

/* What was answered; with --best-of which of each prompt's answers is the best, and what all scored. */
typedef struct answers {
    psoup_generation *generation;
    size_t each;
    int32_t *chosen; /* [n] */
    float *scores;   /* [n, each]; NULL without --best-of */
} answers;

static const psoup_completion *answer(const answers *a, size_t i) {
    return psoup_generation_get(a->generation, i * a->each + (a->scores ? (size_t)a->chosen[i] : 0));
}

static psoup_status read_job(const generate_args *args, const cli_model *m, psoup_json *row,
                             int64_t line, job *out, psoup_error *error) {
    const char *text, *instruction, *input, *preference;
    char *filled = NULL;
    out->row = row;
    out->line = line;
    psoup_status status = cli_text(row, "prompt", args->prompt, args->prompts, line, &text, error);
    if (status == PSOUP_OK)
        status = cli_text(row, "instruction", NULL, args->prompts, line, &instruction, error);
    if (status == PSOUP_OK)
        status = cli_text(row, "input", NULL, args->prompts, line, &input, error);
    if (status == PSOUP_OK)
        status = cli_text(row, "preference", args->preference, args->prompts, line, &preference, error);
    if (status != PSOUP_OK)
        return status;
    if (!text && !instruction)
        return cli_error(error, PSOUP_ERROR_FORMAT,
                         "%s:%lld: expected a text \"prompt\" or \"instruction\"", args->prompts,
                         (long long)line);
    if (instruction || args->template) {
        status = psoup_template_fill(args->template, instruction ? instruction : text, input, preference, &filled,
                                     error);
        text = filled;
    }
    if (status == PSOUP_OK)
        status = cli_encode(m->tokenizer, text, strlen(text), PSOUP_ADD_SPECIAL, &out->tokens,
                            &out->n, error);
    psoup_text_free(filled);
    if (status == PSOUP_OK) /* and one of its own */
        status = cli_check_line(m, out->tokens, out->n, 1, row ? args->prompts : NULL, line, "--prompt", error);
    if (status != PSOUP_OK)
        return status;
    /* Some more, which stay 0: the adapters of rewards, which come later. */
    out->mix = calloc((size_t)psoup_model_adapters(m->model) + args->rewards.n + 1, sizeof *out->mix);
    if (!out->mix)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    status = cli_mix_method(row, args->method, args->prompts, line, &out->method, error);
    if (status != PSOUP_OK)
        return status;
    status = psoup_json_get(row, "mix")
                 ? cli_read_mix(m, psoup_json_get(row, "mix"), args->any_sum, args->prompts, line, out->mix, error)
                 : psoup_model_parse_mix(m->model, args->mix ? args->mix : "", args->any_sum, out->mix, error);
    return status == PSOUP_OK ? cli_strengthen(m, row, args->strength, args->prompts, line, out->mix, error) : status;
}

static psoup_status read_jobs(const generate_args *args, const cli_model *m, job **jobs, size_t *n,
                              psoup_error *error) {
    psoup_jsonl_reader *reader = NULL;
    psoup_status status = PSOUP_OK;
    if (args->prompts)
        status = psoup_jsonl_open(m->context, args->prompts, &reader, error);
    for (bool more = true; status == PSOUP_OK && more;) {
        psoup_json *row = NULL;
        if (args->prompts) {
            status = psoup_jsonl_next(reader, &row, error);
            if (status != PSOUP_OK || !row)
                break;
        } else
            more = false;
        job *grown = realloc(*jobs, (*n + 1) * sizeof **jobs);
        if (!grown) {
            psoup_json_free(row);
            status = cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
            break;
        }
        *jobs = grown;
        (*jobs)[*n] = (job){0};
        status = read_job(args, m, row, reader ? psoup_jsonl_line(reader) : 0, &(*jobs)[*n], error);
        ++*n;
    }
    psoup_jsonl_reader_free(reader);
    if (status == PSOUP_OK && *n == 0)
        status = cli_error(error, PSOUP_ERROR_FORMAT, "%s: no prompts in it", args->prompts);
    return status;
}

/* Prints one answer while it grows, whole characters only. */
typedef struct stream {
    const cli_model *m;
    int32_t *tokens;
    size_t n, capacity, printed; /* printed: bytes of the text so far */
} stream;

static int on_stream(void *user, int64_t id, int32_t token, float logprob, psoup_finish finish) {
    stream *s = user;
    psoup_error error;
    char *text = NULL, *piece = NULL;
    size_t length, end = s->printed;
    (void)id, (void)logprob;
    if (s->n == s->capacity) {
        int32_t *grown = realloc(s->tokens, (2 * s->capacity + 64) * sizeof *grown);
        if (!grown)
            return 1;
        s->tokens = grown;
        s->capacity = 2 * s->capacity + 64;
    }
    if (token >= 0)
        s->tokens[s->n++] = token;
    if (cli_decode(s->m->tokenizer, s->tokens, s->n, &text, &length, &error) == PSOUP_OK) {
        while (end < length) { /* what is no character now may become one, within 4 bytes */
            size_t n = cli_character(text + end, length - end);
            if (n == 0 && length - end < 4 && finish == PSOUP_FINISH_NONE)
                break;
            end += n ? n : 1;
        }
        piece = end > s->printed ? cli_utf8(text + s->printed, end - s->printed) : NULL;
    }
    if (piece) {
        fputs(piece, stdout);
        fflush(stdout);
        s->printed = end;
    }
    free(piece);
    free(text);
    return 0;
}

typedef struct counter {
    int64_t done, total;
} counter;

static int on_count(void *user, int64_t id, int32_t token, float logprob, psoup_finish finish) {
    counter *c = user;
    (void)id, (void)token, (void)logprob;
    if (finish != PSOUP_FINISH_NONE)
        cli_progress(NULL, "generate", ++c->done, c->total);
    return 0;
}

static psoup_json *result_row(const cli_model *m, const job *j, psoup_completion c,
                              const char *prompt, psoup_error *error) {
    static const char *const finishes[] = {"none", "stop", "length", "error"};
    char *text = NULL, *clean = NULL;
    size_t length;
    if (cli_decode(m->tokenizer, c.tokens, c.n, &text, &length, error) == PSOUP_OK &&
        !(clean = cli_utf8(text, length)))
        cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    free(text);
    if (!clean)
        return NULL;
    psoup_json *row = j->row ? psoup_json_copy(j->row) : psoup_json_new_object();
    if (!j->row) {
        char *asked = cli_utf8(prompt, strlen(prompt));
        psoup_json_set(row, "prompt", psoup_json_new_string(asked ? asked : ""));
        free(asked);
    }
    double logprob = 0;
    for (size_t i = 0; i < c.n; i++)
        logprob += c.logprobs[i];
    psoup_json_set(row, "completion", psoup_json_new_string(clean));
    free(clean);
    psoup_json_set(row, "finish", psoup_json_new_string(finishes[c.finish]));
    psoup_json_set(row, "tokens", psoup_json_new_integer((int64_t)c.n));
    psoup_json_set(row, "logprob", psoup_json_new_real(logprob));
    return row;
}

/* "score", that of the answer, and "scores", of all. */
static void add_scores(psoup_json *row, const answers *a, size_t i) {
    psoup_json *scores = psoup_json_new_array();
    const float *own = a->scores + i * a->each;
    for (size_t k = 0; k < a->each; k++)
        psoup_json_append(scores, psoup_json_new_real((double)own[k]));
    psoup_json_set(row, "score", psoup_json_new_real((double)own[a->chosen[i]]));
    psoup_json_set(row, "scores", scores);
}

static psoup_status write_results(const generate_args *args, const cli_model *m, const job *jobs,
                                  size_t n, const answers *a, psoup_error *error) {
    psoup_jsonl_writer *writer = NULL;
    psoup_status status = PSOUP_OK;
    if (args->out)
        status = psoup_jsonl_create(m->context, args->out, 0, &writer, error);
    for (size_t i = 0; status == PSOUP_OK && i < n; i++) {
        psoup_json *row =
            result_row(m, &jobs[i], *answer(a, i), args->prompt, error);
        if (row && a->scores)
            add_scores(row, a, i);
        if (!row)
            status = error->status;
        else if (writer) {
            status = psoup_jsonl_write(writer, row, error);
            psoup_json_free(row);
        } else
            cli_print_json(row);
    }
    if (status == PSOUP_OK && writer)
        status = psoup_jsonl_close(writer, error);
    psoup_jsonl_writer_free(writer);
    return status;
}

static psoup_status diverged(const generate_args *args, const job *j, psoup_error *error) {
    const char *what = "the logits are not numbers: a weight or an adapter of the mix diverged";
    if (!j->line)
        return cli_error(error, PSOUP_ERROR_STATE, "--prompt: %s", what);
    return cli_error(error, PSOUP_ERROR_STATE, "%s:%lld: %s", args->prompts, (long long)j->line,
                     what);
}

/* "DIR" or "DIR=WEIGHT", as the k-th source. */
static psoup_status load_reward(const char *text, size_t k, const cli_model *m, psoup_reward_source *out,
                                psoup_error *error) {
    const char *equal = strrchr(text, '=');
    char *end = NULL, *directory, name[48];
    double weight = equal ? strtod(equal + 1, &end) : 1;
    bool weighed = equal && end != equal + 1 && !*end;
    size_t length = weighed ? (size_t)(equal - text) : strlen(text);
    out->weight = weighed ? (float)weight : 1;
    directory = malloc(length + 1);
    if (!directory)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    snprintf(directory, length + 1, "%s", text);
    snprintf(name, sizeof name, "reward %zu of --best-of", k + 1);
    psoup_status status = psoup_reward_load(m->model, name, directory, &out->model, error);
    free(directory);
    return status;
}

/* After the mixes were read: they have a 0 for each. Free with free_rewards, also on failure. */
static psoup_status load_rewards(const generate_args *args, const cli_model *m, psoup_reward_source **out,
                                 psoup_error *error) {
    psoup_status status = PSOUP_OK;
    *out = calloc(args->rewards.n + 1, sizeof **out);
    if (!*out)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    for (size_t k = 0; status == PSOUP_OK && k < args->rewards.n; k++)
        status = load_reward(args->rewards.items[k], k, m, &(*out)[k], error);
    return status;
}

static void free_rewards(psoup_reward_source *rewards, size_t n) {
    for (size_t k = 0; rewards && k < n; k++)
        psoup_reward_free(rewards[k].model);
    free(rewards);
}

static psoup_status best_of(const generate_args *args, const cli_model *m, const psoup_reward_source *rewards,
                            const psoup_prompt *prompts, size_t n, const psoup_session_options *session, answers *out,
                            psoup_error *error) {
    psoup_best_options options = PSOUP_BEST_OPTIONS_INIT;
    out->each = (size_t)args->best_of;
    out->chosen = calloc(n + 1, sizeof *out->chosen);
    out->scores = calloc(n * out->each + 1, sizeof *out->scores);
    if (!out->chosen || !out->scores)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    options.n = args->best_of;
    options.sources = rewards;
    options.n_sources = args->rewards.n;
    return psoup_best_of_n(m->model, prompts, n, &args->sampling, session, &options, &out->generation, out->chosen,
                           out->scores, error);
}

/* Whether what is asked fits: with --best-of every prompt so often, beside the reward models. */
static psoup_status check_memory(const generate_args *args, const cli_model *m, const psoup_prompt *prompts, size_t n,
                                 const psoup_session_options *session, psoup_error *error) {
    psoup_memory memory = {.size = sizeof memory};
    size_t each = args->best_of ? (size_t)args->best_of : 1;
    psoup_prompt *all = each < SIZE_MAX / sizeof *all / n ? malloc(n * each * sizeof *all) : NULL;
    if (!all)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    for (size_t i = 0; i < n * each; i++)
        all[i] = prompts[i / each];
    psoup_status status = psoup_generate_memory(m->model, all, n * each, &args->sampling, session, &memory, error);
    free(all);
    return status == PSOUP_OK ? plan_work_fits(&args->plan, args->model, "--", PLAN_ANSWERS, m->model, &memory, error)
                              : status;
}

static psoup_status print_text(const cli_model *m, const psoup_completion *c, psoup_error *error) {
    char *text = NULL, *clean = NULL;
    size_t length;
    psoup_status status = cli_decode(m->tokenizer, c->tokens, c->n, &text, &length, error);
    if (status == PSOUP_OK && !(clean = cli_utf8(text, length)))
        status = cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    if (clean)
        puts(clean);
    free(clean);
    free(text);
    return status;
}

static psoup_status run(const generate_args *args, const cli_model *m, job *jobs, size_t n,
                        psoup_error *error) {
    bool plain = args->prompt && !args->json && !args->out, streaming = plain && !args->best_of;
    psoup_prompt *prompts = calloc(n ? n : 1, sizeof *prompts);
    stream s = {.m = m};
    counter count = {0, (int64_t)n};
    answers a = {.each = 1};
    psoup_reward_source *rewards = NULL;
    psoup_session_options session = PSOUP_SESSION_OPTIONS_INIT;
    psoup_status status = PSOUP_OK;
    if (!prompts)
        status = cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    for (size_t i = 0; prompts && i < n; i++)
        prompts[i] = (psoup_prompt){
            .tokens = jobs[i].tokens, .n = jobs[i].n, .mix = jobs[i].mix, .sequence = i,
            .mix_method = jobs[i].method};
    session.max_sequences = args->batch;
    if (status == PSOUP_OK)
        status = load_rewards(args, m, &rewards, error);
    if (status == PSOUP_OK)
        status = check_memory(args, m, prompts, n, &session, error);
    if (status == PSOUP_OK && args->plan.only)
        goto done;
    if (status == PSOUP_OK && args->best_of)
        status = best_of(args, m, rewards, prompts, n, &session, &a, error);
    else if (status == PSOUP_OK)
        status = psoup_generate(m->model, prompts, n, &args->sampling, &session,
                                streaming ? on_stream : on_count,
                                streaming ? (void *)&s : (void *)&count, &a.generation, error);
    bool silent = status == PSOUP_OK && plain && answer(&a, 0)->finish == PSOUP_FINISH_ERROR && answer(&a, 0)->n == 0;
    if (status == PSOUP_OK && streaming && !silent)
        putchar('\n');
    else if (status == PSOUP_OK && !streaming && !silent)
        status = plain ? print_text(m, answer(&a, 0), error) : write_results(args, m, jobs, n, &a, error);
    for (size_t i = 0; status == PSOUP_OK && i < n; i++)
        if (answer(&a, i)->finish == PSOUP_FINISH_ERROR)
            status = diverged(args, &jobs[i], error);
done:
    free_rewards(rewards, args->rewards.n);
    psoup_generation_free(a.generation);
    free(a.chosen);
    free(a.scores);
    free(s.tokens);
    free(prompts);
    return status;
}

int cmd_generate(int argc, char **argv) {
    generate_args a = {.sampling = PSOUP_SAMPLING_INIT, .batch = 32, .strength = 1};
    cli_list arguments = {0};
    int status;
    const cli_option options[] = {
        {"--model", CLI_TEXT, &a.model, "DIR", "the base model"},
        {"--adapter", CLI_LIST, &a.adapters, "NAME=DIR", "a PEFT adapter under a name"},
        {"--mix", CLI_TEXT, &a.mix, "NAME=W,…", "weights of the adapters; absent: the base"},
        {"--mix-method", CLI_TEXT, &a.method, "NAME", "what is weighed: delta, factors or logits (delta)"},
        {"--strength", CLI_FLOAT, &a.strength, "S", "multiplies the weights, which sum to 1 before (1)"},
        {"--any-sum", CLI_FLAG, &a.any_sum, NULL, "accept weights that do not sum to 1"},
        {"--prompt", CLI_TEXT, &a.prompt, "TEXT", "one prompt; its answer is printed as it grows"},
        {"--prompts", CLI_TEXT, &a.prompts, "FILE",
         "JSON Lines of \"prompt\" (or \"instruction\", "
         "\"input\"), each with its own \"mix\", \"mix_method\" and "
         "\"strength\" if any"},
        {"--template", CLI_TEXT, &a.template, "NAME", "tulu, alpaca, or text with {instruction}"},
        {"--preference", CLI_TEXT, &a.preference, "TEXT", "preference prompt for the template"},
        {"--max-new-tokens", CLI_INT, &a.sampling.max_new_tokens, "N", "at most (128)"},
        {"--min-new-tokens", CLI_INT, &a.sampling.min_new_tokens, "N", "no end before (0)"},
        {"--temperature", CLI_FLOAT, &a.sampling.temperature, "T", "0 is greedy (1)"},
        {"--top-k", CLI_INT, &a.sampling.top_k, "K", "0 is off (0)"},
        {"--top-p", CLI_FLOAT, &a.sampling.top_p, "P", "1 is off (1)"},
        {"--no-repeat-ngram", CLI_INT, &a.sampling.no_repeat_ngram_size, "N", "0 is off (0)"},
        {"--ignore-stop", CLI_FLAG, &a.ignore_stop, NULL, "go on past end tokens"},
        {"--seed", CLI_UINT64, &a.sampling.seed, "N", "equal seeds give equal texts (0)"},
        {"--best-of", CLI_INT, &a.best_of, "N", "sample N answers, keep the one that --reward scores highest"},
        {"--reward", CLI_LIST, &a.rewards, "DIR[=W]", "a reward model of this base, and its weight"},
        {"--batch", CLI_INT, &a.batch, "N", "answers decoding together (32)"},
        {"--device", CLI_TEXT, &a.device, "DEVICE", "cpu, cuda or cuda:N (cpu)"},
        {"--dtype", CLI_TEXT, &a.dtype, "DTYPE", "the model in f32, f16 or bf16, or its linears in int8 or nf4 (as stored)"},
        {"--threads", CLI_INT, &a.threads, "N", "0 is one per processor (0)"},
        {"--memory-limit", CLI_TEXT, &a.memory_limit, "SIZE", "refuse what needs more, as 24G (what is free)"},
        {"--plan", CLI_FLAG, &a.plan.only, NULL, "say what memory it will take, and stop"},
        {"--out", CLI_TEXT, &a.out, "FILE", "JSON Lines results go here (.zst is compressed)"},
        {"--json", CLI_FLAG, &a.json, NULL, "print JSON Lines instead of text"},
        {0}};
    if (!cli_parse(argc, argv, options,
                   "Usage: psoup generate --model DIR [--adapter NAME=DIR]… [--mix NAME=W,…] "
                   "--prompt TEXT\n"
                   "\nSamples answers. With --prompts every line may carry its own mix, such as\n"
                   "  {\"prompt\": \"…\", \"mix\": {\"P1A\": 0.5, \"P2B\": 0.5}}\n"
                   "and one batch serves them all: nothing is merged and nothing swapped. Methods:\n"
                   "  delta    the weighted sum of what the adapters change\n"
                   "  factors  A's and B's weighed apart, as the paper's released code merges them\n"
                   "  logits   each policy reads the text by itself, and their logits are weighed: as many\n"
                   "           times the work and memory; a strength other than 1 leans on the base's\n"
                   "A model's config.json and generation_config.json say which tokens end an answer; how it is\n"
                   "sampled is said here alone.\n",
                   &arguments, &status))
        return status;
    if (arguments.n)
        return cli_complain("generate: unexpected \"%s\"", arguments.items[0]);
    if (!a.model)
        return cli_complain("generate: expected --model DIR");
    if (!a.prompt == !a.prompts)
        return cli_complain("generate: expected either --prompt TEXT or --prompts FILE");
    if (a.prompt && a.preference && !a.template)
        return cli_complain("--preference: a --prompt takes it only with a --template");
    if (a.sampling.max_new_tokens < 1)
        return cli_complain("--max-new-tokens: %d, expected at least 1", a.sampling.max_new_tokens);
    if (!a.best_of != !a.rewards.n || a.best_of < 0)
        return cli_complain("generate: expected --best-of N, at least 1, and --reward DIR together");
    if (a.best_of > 1 && a.sampling.temperature == 0.0f)
        return cli_complain("--best-of: at --temperature 0 all answers would be the same");
    if (a.memory_limit && !plan_parse_size(a.memory_limit, &a.plan.limit))
        return cli_complain("--memory-limit: \"%s\", expected a size as 24G or 512M", a.memory_limit);
    a.plan.json = a.json;
    a.sampling.ignore_stop = a.ignore_stop;
    psoup_error error = {0};
    cli_model m;
    job *jobs = NULL;
    size_t n = 0;
    psoup_status done = cli_open(a.model, a.device, a.dtype, a.threads, &a.adapters, true, &m, &error);
    if (done == PSOUP_OK)
        done = read_jobs(&a, &m, &jobs, &n, &error);
    if (done == PSOUP_OK)
        done = run(&a, &m, jobs, n, &error);
    status = done == PSOUP_OK ? 0 : cli_fail(&error);
    for (size_t i = 0; i < n; i++) {
        psoup_json_free(jobs[i].row);
        free(jobs[i].tokens);
        free(jobs[i].mix);
    }
    free(jobs);
    cli_close(&m);
    return status;
}
