#include "config.h"
#include "launch.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- reading ----------------------------------------------------------------------------------- */

psoup_json *config_values(const config_section *sections, const char *const *keys, size_t n) {
    psoup_json *all = psoup_json_new_object();
    for (size_t i = 0; i < n; i++) {
        psoup_json *part = psoup_fields_json(sections[i].fields, sections[i].to);
        const char *key = NULL;
        if (keys && keys[i]) {
            psoup_json_set(all, keys[i], part);
            continue;
        }
        const psoup_json *value;
        while ((value = psoup_json_next(part, &key)))
            psoup_json_set(all, key, psoup_json_copy(value));
        psoup_json_free(part);
    }
    return all;
}

/* The member that --resume or --join sets, of the commands that have it. */
static int32_t *member_of(const config_section *sections, size_t n, const char *name) {
    for (size_t i = 0; i < n; i++)
        for (const psoup_field *f = sections[i].fields; f->name; f++)
            if (!strcmp(f->name, name))
                return (int32_t *)((char *)sections[i].to + f->offset);
    return NULL;
}

static void print_config_help(const char *about, const config_section *sections, const char *const *keys,
                              size_t n) {
    puts(about);
    puts("Options:\n"
         "  --config FILE     the configuration, a JSON object\n"
         "  --print-config    print a configuration with every default, and stop\n"
         "  --json            print the result as one line of JSON, and no progress");
    if (member_of(sections, n, "resume"))
        puts("  --plan            say what memory it will take, and stop\n"
             "  --memory-limit SIZE\n"
             "                    refuse to begin where it needs more, as 24G or 512M; without it, more than is\n"
             "                    free, in the GPU or in the machine");
    if (member_of(sections, n, "checkpoint_dir"))
        puts("  --resume          go on from the newest checkpoint in \"checkpoint_dir\", if there is one.\n"
             "                    With a \"checkpoint_dir\" SIGTERM and SIGINT end the run after its step, of\n"
             "                    PPO within a second or after its updates, with a checkpoint and status 0");
    else if (member_of(sections, n, "resume"))
        puts("  --resume          go on with the run in \"output\", skipping what is finished. SIGTERM and SIGINT\n"
             "                    end it after its step, of PPO within a second or after its updates, with a\n"
             "                    checkpoint and status 0");
    if (!keys && member_of(sections, n, "join"))
        puts("  --join            the same, and policies at the end of the list that the checkpoint has not\n"
             "                    yet begin: a finished run takes in another, and trains it alone");
    puts("  --help            this text");
    for (size_t i = 0; i < n; i++) {
        const char *key = keys ? keys[i] : NULL;
        printf("\n%s%s%s%s:\n", sections[i].title, key ? ", in \"" : "", key ? key : "", key ? "\"" : "");
        psoup_json *values = psoup_fields_json(sections[i].fields, sections[i].to);
        for (const psoup_field *f = sections[i].fields; f->name; f++) {
            char *value = psoup_json_text(psoup_json_get(values, f->name), 0);
            printf("  %-22s %s%s%s%s (%s)\n", f->name, f->help, f->choices ? " One of " : "",
                   f->choices ? f->choices : "", f->choices ? "." : "", value ? value : "?");
            psoup_text_free(value);
        }
        psoup_json_free(values);
    }
}

enum { MOST_SECTIONS = 8 };

/* The file's members into the sections' structs; nothing else may stand in it. */
static psoup_status read_sections(const config_section *sections, const char *const *keys, size_t n, const config *c,
                                  psoup_error *error) {
    psoup_field objects[MOST_SECTIONS + 1] = {{0}};
    const psoup_field *tables[MOST_SECTIONS + 1];
    size_t n_keys = 0, n_tables = 0;
    for (size_t i = 0; i < n && i < MOST_SECTIONS; i++)
        if (keys && keys[i])
            objects[n_keys++] = (psoup_field){keys[i], PSOUP_FIELD_JSON, 0, NULL, NULL};
        else
            tables[n_tables++] = sections[i].fields;
    tables[n_tables++] = objects;
    psoup_status status = psoup_fields_check(tables, n_tables, c->root, c->path, error);
    for (size_t i = 0; status == PSOUP_OK && i < n; i++) {
        const config_section *s = &sections[i];
        const char *key = keys ? keys[i] : NULL;
        const psoup_json *object = key ? psoup_json_get(c->root, key) : c->root;
        char where[1024];
        snprintf(where, sizeof where, "%s%s%s", c->path, key ? ": " : "", key ? key : "");
        if (key && psoup_json_kind(object) == PSOUP_JSON_NULL)
            continue;
        if (key && psoup_json_kind(object) != PSOUP_JSON_OBJECT)
            return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: expected an object", where);
        if (key)
            status = psoup_fields_check(&s->fields, 1, object, where, error);
        if (status == PSOUP_OK)
            status = psoup_fields_read(s->fields, object, where, s->to, error);
    }
    return status;
}

bool config_read(int argc, char **argv, const char *about, const config_section *sections, size_t n,
                 config *out, int *status) {
    psoup_error error = {0};
    bool read = config_read_parts(argc, argv, about, sections, NULL, n, out, status, &error);
    if (error.status != PSOUP_OK)
        cli_fail(&error);
    return read;
}

bool config_read_parts(int argc, char **argv, const char *about, const config_section *sections,
                       const char *const *keys, size_t n, config *out, int *status, psoup_error *error) {
    bool print = false, resumes = false, joins = false;
    int32_t *resume = member_of(sections, n, "resume"), *joined = keys ? NULL : member_of(sections, n, "join");
    *out = (config){0};
    *status = 2;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            print_config_help(about, sections, keys, n);
            *status = 0;
            return false;
        } else if (!strcmp(argv[i], "--print-config"))
            print = true;
        else if (!strcmp(argv[i], "--json"))
            out->json = true;
        else if (!strcmp(argv[i], "--resume") && resume)
            resumes = true;
        else if (!strcmp(argv[i], "--join") && joined)
            joins = true;
        else if (!strcmp(argv[i], "--plan") && resume)
            out->plan.only = true;
        else if (resume && (!strcmp(argv[i], "--memory-limit") || !strncmp(argv[i], "--memory-limit=", 15))) {
            const char *size = argv[i][14] ? argv[i] + 15 : i + 1 < argc ? argv[++i] : "";
            if (!plan_parse_size(size, &out->plan.limit)) {
                cli_complain("--memory-limit: \"%s\", expected a size as 24G or 512M", size);
                return false;
            }
        } else if (!strcmp(argv[i], "--config") && i + 1 == argc) {
            cli_complain("--config needs a value: FILE");
            return false;
        } else if (!strcmp(argv[i], "--config"))
            out->path = argv[++i];
        else if (!strncmp(argv[i], "--config=", 9))
            out->path = argv[i] + 9;
        else {
            cli_complain("%s: unexpected \"%s\" (see psoup %s --help)", argv[0], argv[i], argv[0]);
            return false;
        }
    }
    if (!out->path && !print) {
        cli_complain("%s: expected --config FILE (see psoup %s --help)", argv[0], argv[0]);
        return false;
    }
    psoup_status done = PSOUP_OK;
    if (out->path) {
        psoup_context *context = NULL;
        done = psoup_context_create(NULL, &context, error);
        if (done == PSOUP_OK)
            done = psoup_json_read(context, out->path, &out->root, error);
        psoup_context_free(context);
        if (done == PSOUP_OK)
            done = read_sections(sections, keys, n, out, error);
    }
    if (done != PSOUP_OK) {
        *status = 1;
        config_free(out);
        return false;
    }
    out->plan.json = out->json;
    out->parts = keys != NULL;
    if (resumes)
        *resume = 1;
    if (joins)
        *joined = 1;
    if (print) {
        psoup_json *all = config_values(sections, keys, n);
        char *text = psoup_json_text(all, 2);
        puts(text ? text : "{}");
        psoup_text_free(text);
        psoup_json_free(all);
        config_free(out);
        *status = 0;
        return false;
    }
    return true;
}

void config_free(config *c) {
    psoup_json_free(c->root);
    c->root = NULL;
}

int config_fail(const config *c, const psoup_error *error) {
    static const struct {
        const char *options, *key; /* key: whose object has them, where there are several */
    } named[] = {{"psoup_ppo_options: ", "ppo: "},         {"psoup_reward_options: ", "reward: "},
                 {"psoup_sft_options: ", "sft: "},         {"psoup_dpo_options: ", ""},
                 {"psoup_adapter_options: ", ""},          {"psoup_sampling: ", "generate: "},
                 {"psoup_session_options: ", "generate: "}, {"context options: ", ""}};
    psoup_error own = *error;
    for (size_t i = 0; i < sizeof named / sizeof *named; i++) {
        size_t length = strlen(named[i].options);
        if (!strncmp(error->message, named[i].options, length))
            snprintf(own.message, sizeof own.message, "%s: %s%s", c->path, c->parts ? named[i].key : "",
                     error->message + length);
    }
    return cli_training_fail(&own);
}

/* ---- adapters ---------------------------------------------------------------------------------- */

#define FIELD(name, type, member, help)                                                            \
    { name, type, offsetof(adapter_config, member), NULL, help }
const psoup_field adapter_fields[] = {
    FIELD("rank", PSOUP_FIELD_INT, options.rank, "LoRA rank r of a new adapter."),
    FIELD("alpha", PSOUP_FIELD_FLOAT, options.alpha, "LoRA alpha; the scale is alpha / rank."),
    FIELD("rslora", PSOUP_FIELD_BOOL, options.rslora, "Scale by alpha / sqrt(rank) instead."),
    FIELD("targets", PSOUP_FIELD_JSON, targets,
          "List of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; null: q and v."),
    FIELD("adapter_seed", PSOUP_FIELD_UINT64, options.seed, "Seed of a new adapter's A factors."),
    {0}};
#undef FIELD

/* The bit of "q_proj" …; 0: it is none. */
static uint32_t linear_of(const char *name) {
    static const char *const names[] = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                        "gate_proj", "up_proj", "down_proj"};
    for (uint32_t k = 0; k < 7; k++)
        if (!strcmp(name, names[k]))
            return 1u << k;
    return 0;
}

psoup_status adapter_config_finish(adapter_config *a, const char *where, psoup_error *error) {
    if (psoup_json_kind(a->targets) == PSOUP_JSON_NULL)
        return PSOUP_OK;
    a->options.targets = 0;
    for (size_t i = 0; i < psoup_json_size(a->targets); i++) {
        const char *name = psoup_json_string(psoup_json_at(a->targets, i), "");
        uint32_t bit = linear_of(name);
        if (!bit)
            return cli_error(error, PSOUP_ERROR_ARGUMENT,
                             "%s: targets[%zu] is \"%s\", expected q_proj … down_proj", where, i,
                             name);
        a->options.targets |= bit;
    }
    return a->options.targets
               ? PSOUP_OK
               : cli_error(error, PSOUP_ERROR_ARGUMENT,
                           "%s: targets is not a list of at least one linear", where);
}

/* Of "target_modules", by the last part of their names. */
static uint32_t targets_of(const psoup_json *modules) {
    uint32_t targets = 0;
    if (!strcmp(psoup_json_string(modules, ""), "all-linear"))
        return PSOUP_ALL_LINEAR;
    for (size_t i = 0; i < psoup_json_size(modules); i++) {
        const char *name = psoup_json_string(psoup_json_at(modules, i), ""), *dot = strrchr(name, '.');
        targets |= linear_of(dot ? dot + 1 : name);
    }
    return targets;
}

psoup_status adapter_config_beside(const adapter_config *a, psoup_context *context, const char *init, const char *where,
                                   psoup_error *error) {
    static const psoup_adapter_options none = PSOUP_ADAPTER_OPTIONS_INIT;
    const psoup_adapter_options *o = &a->options;
    psoup_json *peft = NULL;
    psoup_error unread; /* a .gguf has no such file, and what is said beside it cannot be its own */
    char path[4096];
    snprintf(path, sizeof path, "%s/adapter_config.json", init);
    if (psoup_json_read(context, path, &peft, &unread) != PSOUP_OK)
        peft = NULL;
    const struct {
        const char *name;
        bool other;
    } said[] = {
        {"rank", o->rank != none.rank && o->rank != psoup_json_integer(psoup_json_get(peft, "r"), 0)},
        {"alpha", o->alpha != none.alpha && o->alpha != (float)psoup_json_real(psoup_json_get(peft, "lora_alpha"), NAN)},
        {"rslora", o->rslora != none.rslora && !psoup_json_bool(psoup_json_get(peft, "use_rslora"), 0)},
        {"targets", o->targets != none.targets && o->targets != targets_of(psoup_json_get(peft, "target_modules"))},
        {"adapter_seed", o->seed != none.seed}};
    psoup_json_free(peft);
    for (size_t i = 0; i < sizeof said / sizeof *said; i++)
        if (said[i].other)
            return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: \"%s\" is of new adapters: the one in \"init\", %s, "
                             "has another", where, said[i].name, init);
    return PSOUP_OK;
}

/* ---- sampling ---------------------------------------------------------------------------------- */

#define FIELD(type, member, help)                                                                  \
    { #member, type, offsetof(sampling_config, member), NULL, help }
const psoup_field sampling_fields[] = {
    FIELD(PSOUP_FIELD_INT, max_new_tokens, "Tokens of an answer at most."),
    FIELD(PSOUP_FIELD_INT, min_new_tokens, "Tokens before the first possible end."),
    FIELD(PSOUP_FIELD_FLOAT, temperature, "0 is greedy."),
    FIELD(PSOUP_FIELD_INT, top_k, "0 is off."),
    FIELD(PSOUP_FIELD_FLOAT, top_p, "1 is off."),
    FIELD(PSOUP_FIELD_INT, no_repeat_ngram_size, "No so many tokens in a row come twice; 0 is off."),
    FIELD(PSOUP_FIELD_INT, max_sequences, "Answers decoding together; 0: 32, of psoup feedback 64."),
    {0}};
#undef FIELD

void sampling_config_to(const sampling_config *from, psoup_sampling *to) {
    to->max_new_tokens = from->max_new_tokens;
    to->min_new_tokens = from->min_new_tokens;
    to->temperature = from->temperature;
    to->top_k = from->top_k;
    to->top_p = from->top_p;
    to->no_repeat_ngram_size = from->no_repeat_ngram_size;
}

/* ---- rows and tokens --------------------------------------------------------------------------- */

static psoup_status pool_add(token_pool *pool, int32_t *row, psoup_error *error) {
    int32_t **grown = NULL;
    if ((pool->n & (pool->n + 1)) == 0) { /* 0, 1, 3, 7, …: full; double */
        grown = realloc(pool->rows, (2 * pool->n + 1) * sizeof *grown);
        if (!grown) {
            free(row);
            return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
        }
        pool->rows = grown;
    }
    pool->rows[pool->n++] = row;
    return PSOUP_OK;
}

psoup_status pool_encode(token_pool *pool, const psoup_tokenizer *tokenizer, const char *text,
                         uint32_t flags, const int32_t **ids, size_t *n, psoup_error *error) {
    int32_t *row = NULL;
    psoup_status status = cli_encode(tokenizer, text, strlen(text), flags, &row, n, error);
    if (status != PSOUP_OK) {
        free(row);
        return status;
    }
    int32_t *fitted = realloc(row, (*n + 1) * sizeof *row); /* encoding took room for the worst case */
    *ids = fitted ? fitted : row;
    return pool_add(pool, fitted ? fitted : row, error);
}

psoup_status pool_encode_pair(token_pool *pool, const psoup_tokenizer *tokenizer,
                              const char *prompt, const char *completion, int32_t end_token,
                              const int32_t **ids, size_t *n, size_t *n_prompt,
                              psoup_error *error) {
    int32_t *first = NULL, *second = NULL, *row = NULL;
    size_t n_second = 0;
    psoup_status status =
        cli_encode(tokenizer, prompt, strlen(prompt), PSOUP_ADD_SPECIAL, &first, n_prompt, error);
    if (status == PSOUP_OK)
        status =
            cli_encode(tokenizer, completion, strlen(completion), 0, &second, &n_second, error);
    if (status == PSOUP_OK) {
        *n = *n_prompt + n_second + (end_token >= 0);
        row = malloc((*n + 1) * sizeof *row);
        if (!row)
            status = cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    }
    if (row) {
        memcpy(row, first, *n_prompt * sizeof *row);
        memcpy(row + *n_prompt, second, n_second * sizeof *row);
        if (end_token >= 0)
            row[*n - 1] = end_token;
        *ids = row;
        status = pool_add(pool, row, error);
    }
    free(first);
    free(second);
    return status;
}

void pool_free(token_pool *pool) {
    for (size_t i = 0; i < pool->n; i++)
        free(pool->rows[i]);
    free(pool->rows);
    *pool = (token_pool){0};
}

psoup_status read_rows(psoup_context *context, const char *path, psoup_json **out,
                       psoup_error *error) {
    psoup_jsonl_reader *reader = NULL;
    psoup_json *row = NULL;
    psoup_status status = PSOUP_OK;
    *out = psoup_json_new_array();
    if (path)
        status = psoup_jsonl_open(context, path, &reader, error);
    while (path && status == PSOUP_OK) {
        status = psoup_jsonl_next(reader, &row, error);
        if (status != PSOUP_OK || !row)
            break;
        if (psoup_json_append(*out, row) != 0)
            status = cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    }
    psoup_jsonl_reader_free(reader);
    if (path && status == PSOUP_OK && psoup_json_size(*out) == 0)
        status = cli_error(error, PSOUP_ERROR_FORMAT, "%s: no rows in it", path);
    return status;
}

psoup_status row_text(const psoup_json *row, const char *key, const char *path, size_t index,
                      const char **out, psoup_error *error) {
    *out = psoup_json_string(psoup_json_get(row, key), NULL);
    if (*out)
        return PSOUP_OK;
    return cli_error(error, PSOUP_ERROR_FORMAT, "%s: row %zu: \"%s\" is missing or no text", path,
                     index + 1, key);
}

psoup_status row_option(const psoup_json *row, const char *key, const char *path, size_t index,
                        const char **out, psoup_error *error) {
    const psoup_json *own = psoup_json_get(row, key);
    *out = NULL;
    return !own || psoup_json_kind(own) == PSOUP_JSON_NULL ? PSOUP_OK : row_text(row, key, path, index, out, error);
}

psoup_status hold_out(const psoup_json *rows, float fraction, void *items, size_t size, size_t *stay,
                      psoup_error *error) {
    size_t n = psoup_json_size(rows), kept = 0, held = 0;
    unsigned char *all = items, *out = malloc((n + 1) * size);
    int64_t group = -1;
    char *last = NULL;
    if (!out)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    for (size_t i = 0; i < n; i++) {
        const psoup_json *row = psoup_json_at(rows, i), *id = psoup_json_get(row, "id");
        char *key = psoup_json_text(id ? id : psoup_json_get(row, "user_input"), 0);
        group += !last || !key || strcmp(last, key) != 0;
        psoup_text_free(last);
        last = key;
        bool hold = floor((double)(group + 1) * fraction) > floor((double)group * fraction);
        memmove(hold ? out + held++ * size : all + kept++ * size, all + i * size, size);
    }
    memcpy(all + kept * size, out, held * size);
    psoup_text_free(last);
    free(out);
    *stay = kept;
    return PSOUP_OK;
}

char *join(const char *directory, const char *name) {
    char *path = malloc(strlen(directory) + strlen(name) + 2);
    if (path)
        sprintf(path, "%s/%s", directory, name);
    return path;
}

/* ---- a run ------------------------------------------------------------------------------------- */

psoup_status run_open(const char *model, const char *tokenizer, const char *device, const char *dtype,
                      int32_t threads, cli_model *out, psoup_error *error) {
    if (!model)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "the configuration names no \"model\"");
    psoup_status status = cli_open(model, device, dtype, threads, NULL, tokenizer == NULL, out, error);
    if (status != PSOUP_OK || !tokenizer)
        return status;
    psoup_tokenizer_free(out->tokenizer); /* the model's own, where it has one */
    return psoup_tokenizer_load(out->context, tokenizer, &out->tokenizer, error);
}

psoup_status run_open_ranks(const char *model, const char *tokenizer, const char *device, const char *dtype,
                            int32_t threads, cli_model *out, psoup_error *error) {
    char own[LAUNCH_DEVICE];
    psoup_status status = launch_look(error);
    if (status == PSOUP_OK)
        status = run_open(model, tokenizer, launch_device(device, own), dtype, launch_threads(threads), out, error);
    if (status == PSOUP_OK)
        status = launch_connect(out->context, &out->comm, error);
    if (status == PSOUP_OK && out->comm && device && !strncmp(device, "cuda", 4))
        status = launch_join_gpus(out, error);
    return status;
}

int32_t run_end_token(const cli_model *m) {
    psoup_model_config c = PSOUP_MODEL_CONFIG_INIT;
    psoup_error error;
    return psoup_model_get_config(m->model, &c, &error) == PSOUP_OK ? c.eos_token_id : -1;
}

int run_print_output(const char *output, bool json) {
    if (launch_rank() > 0)
        return 0;
    if (!json) {
        puts(output);
        return 0;
    }
    psoup_json *row = psoup_json_new_object();
    psoup_json_set(row, "output", psoup_json_new_string(output));
    return cli_print_json(row);
}
