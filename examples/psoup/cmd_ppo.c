/* psoup ppo: policies from reward models, side by side on one base. */
#include "config.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_POLICIES = 64, MAX_MEMBERS = 16 };

typedef struct ppo_run {
    const char *model, *tokenizer, *device, *prompts, *validation, *preferences, *output, *template;
    const psoup_json *policies;
    int32_t new_preferences, threads;
    uint64_t seed;
    adapter_config lora;
    psoup_ppo_options options;
} ppo_run;

#define FIELD(type, member, help)                                                                  \
    { #member, type, offsetof(ppo_run, member), NULL, help }
static const psoup_field ppo_run_fields[] = {
    FIELD(PSOUP_FIELD_STRING, model, "Model directory; required."),
    FIELD(PSOUP_FIELD_STRING, tokenizer, "tokenizer.json; null: the model's own."),
    FIELD(PSOUP_FIELD_STRING, prompts, "JSON Lines of instruction (or prompt), input; required."),
    FIELD(PSOUP_FIELD_STRING, validation, "The same, held out, for the best checkpoint."),
    FIELD(
        PSOUP_FIELD_JSON, policies,
        "[{\"name\", \"reward\": DIR, \"preference\": SYMBOL | \"all\" | null, \"init\": DIR}, …]; "
        "required. init: the PEFT directory it starts from, with its rank, alpha and targets."),
    FIELD(PSOUP_FIELD_STRING, preferences, "Catalogue file; null: the paper's."),
    FIELD(PSOUP_FIELD_BOOL, new_preferences, "With the paper's catalogue: P3C and P3D too."),
    FIELD(PSOUP_FIELD_STRING, template, "tulu, alpaca, or a text with {instruction}."),
    FIELD(PSOUP_FIELD_STRING, output, "Directory; each policy goes to output/NAME; required."),
    FIELD(PSOUP_FIELD_UINT64, seed, "Policy k samples under seed + k."),
    FIELD(PSOUP_FIELD_STRING, device, "\"cpu\", \"cuda\" or \"cuda:N\"; null: the CPU."),
    FIELD(PSOUP_FIELD_INT, threads, "0 is one per processor."),
    {0}};
#undef FIELD

/* One policy's share of the configuration, and what was made of it. */
typedef struct policy_run {
    const char *name, *reward_directory, *preference, *init;
    char *reward_name;
    psoup_reward *reward;
    psoup_ppo_prompt *prompts[2]; /* training, validation */
    size_t n[2];
    psoup_reward_input *inputs[2]; /* P-MORL: one per preference of the user */
} policy_run;

typedef struct ppo_state {
    ppo_run *run;
    const char *config_path;
    cli_model m;
    psoup_preferences *preferences;
    psoup_json *rows[2];
    token_pool pool;
    policy_run policies[MAX_POLICIES];
    size_t n;
} ppo_state;

static psoup_status read_policies(ppo_state *s, psoup_error *error) {
    static const psoup_field members[] = {
        {"name", PSOUP_FIELD_STRING, offsetof(policy_run, name), NULL, NULL},
        {"reward", PSOUP_FIELD_STRING, offsetof(policy_run, reward_directory), NULL, NULL},
        {"preference", PSOUP_FIELD_STRING, offsetof(policy_run, preference), NULL, NULL},
        {"init", PSOUP_FIELD_STRING, offsetof(policy_run, init), NULL, NULL},
        {0}};
    const psoup_field *const tables[] = {members};
    const psoup_json *list = s->run->policies;
    psoup_status status = PSOUP_OK;
    s->n = psoup_json_size(list);
    if (psoup_json_kind(list) != PSOUP_JSON_ARRAY || s->n == 0 || s->n > MAX_POLICIES) {
        s->n = 0;
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: policies: expected a list of 1 to %d",
                         s->config_path, MAX_POLICIES);
    }
    for (size_t i = 0; status == PSOUP_OK && i < s->n; i++) {
        policy_run *p = &s->policies[i];
        const psoup_json *object = psoup_json_at(list, i);
        char where[512];
        snprintf(where, sizeof where, "%s: policies[%zu]", s->config_path, i);
        status = psoup_fields_check(tables, 1, object, where, error);
        if (status == PSOUP_OK)
            status = psoup_fields_read(members, object, where, p, error);
        if (status == PSOUP_OK && (!p->name || !*p->name || strchr(p->name, '/') ||
                                   p->name[0] == '.' || !p->reward_directory))
            status = cli_error(error, PSOUP_ERROR_ARGUMENT,
                               "%s: expected a \"name\" that can name a directory, and \"reward\", "
                               "a directory",
                               where);
        if (status == PSOUP_OK && p->preference && strcmp(p->preference, "all") != 0 &&
            psoup_preferences_find(s->preferences, p->preference) < 0)
            status = cli_error(error, PSOUP_ERROR_ARGUMENT,
                               "%s: preference \"%s\" is not in the catalogue", where,
                               p->preference);
    }
    return status;
}

static psoup_status load_adapters(ppo_state *s, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; status == PSOUP_OK && i < s->n; i++) {
        policy_run *p = &s->policies[i];
        size_t length = strlen(p->name) + sizeof "reward of ";
        p->reward_name = malloc(length);
        if (!p->reward_name)
            return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
        snprintf(p->reward_name, length, "reward of %s", p->name);
        status = p->init
                     ? psoup_model_load_adapter(s->m.model, p->name, p->init, error)
                     : psoup_model_add_adapter(s->m.model, p->name, &s->run->lora.options, error);
        if (status == PSOUP_OK)
            status = psoup_reward_load(s->m.model, p->reward_name, p->reward_directory, &p->reward,
                                       error);
    }
    return status;
}

static psoup_status encode_filled(ppo_state *s, const char *instruction, const char *input,
                                  const char *preference, const int32_t **ids, size_t *n,
                                  psoup_error *error) {
    char *text = NULL;
    psoup_status status =
        psoup_template_fill(s->run->template, instruction, input, preference, &text, error);
    if (status == PSOUP_OK)
        status = pool_encode(&s->pool, s->m.tokenizer, text, PSOUP_ADD_SPECIAL, ids, n, error);
    psoup_text_free(text);
    return status;
}

/* The prompt of a user with several preferences: {t + P1 + P2 + P3}, and one reward input
 * {t + P_i} for each (Jang et al. 2023, section 2.2, P-MORL). */
static psoup_status user_prompt(ppo_state *s, const char *instruction, const char *input,
                                size_t user, psoup_reward_input *inputs, psoup_ppo_prompt *out,
                                psoup_error *error) {
    int32_t members[MAX_MEMBERS];
    size_t size = psoup_user_size(s->preferences), length = 1;
    psoup_status status = psoup_user_get(s->preferences, user, members, NULL, 0, error);
    for (size_t k = 0; status == PSOUP_OK && k < size; k++)
        length += strlen(psoup_preferences_get(s->preferences, (size_t)members[k])->prompt) + 1;
    char *all = malloc(length);
    if (!all)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    *all = 0;
    for (size_t k = 0; status == PSOUP_OK && k < size; k++) {
        const char *prompt = psoup_preferences_get(s->preferences, (size_t)members[k])->prompt;
        if (k)
            strcat(all, " ");
        strcat(all, prompt);
        inputs[k] = (psoup_reward_input){.weight = 1.0f / (float)size};
        status =
            encode_filled(s, instruction, input, prompt, &inputs[k].tokens, &inputs[k].n, error);
    }
    if (status == PSOUP_OK)
        status = encode_filled(s, instruction, input, all, &out->tokens, &out->n, error);
    free(all);
    out->inputs = inputs;
    out->n_inputs = size;
    return status;
}

/* A policy's prompts: one per row, or with preference "all" one per row and user. */
static psoup_status make_prompts(ppo_state *s, policy_run *p, int part, psoup_error *error) {
    const psoup_json *rows = s->rows[part];
    const char *path = part ? s->run->validation : s->run->prompts;
    bool all = p->preference && !strcmp(p->preference, "all");
    size_t n = psoup_json_size(rows), size = psoup_user_size(s->preferences);
    size_t users = all ? psoup_users_count(s->preferences) : 1;
    psoup_status status = PSOUP_OK;
    if (size > MAX_MEMBERS)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "more than %d dimensions of preference",
                         MAX_MEMBERS);
    p->n[part] = n * users;
    p->prompts[part] = calloc(n * users + 1, sizeof *p->prompts[part]);
    p->inputs[part] = all ? calloc(n * users * size + 1, sizeof *p->inputs[part]) : NULL;
    if (!p->prompts[part] || (all && !p->inputs[part]))
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    for (size_t i = 0; status == PSOUP_OK && i < n * users; i++) {
        const psoup_json *row = psoup_json_at(rows, i / users);
        const char *instruction = psoup_json_string(psoup_json_get(row, "prompt"), NULL);
        const char *input = psoup_json_string(psoup_json_get(row, "input"), NULL);
        psoup_ppo_prompt *out = &p->prompts[part][i];
        out->id = psoup_json_integer(psoup_json_get(row, "id"), (int64_t)(i / users));
        if (!instruction)
            status = row_text(row, "instruction", path, i / users, &instruction, error);
        if (status == PSOUP_OK && all) {
            status = user_prompt(s, instruction, input, i % users, p->inputs[part] + i * size, out,
                                 error);
        } else if (status == PSOUP_OK) {
            const char *preference = NULL;
            if (p->preference)
                preference = psoup_preferences_get(
                                 s->preferences,
                                 (size_t)psoup_preferences_find(s->preferences, p->preference))
                                 ->prompt;
            status = encode_filled(s, instruction, input, preference, &out->tokens, &out->n, error);
        }
    }
    return status;
}

static psoup_status train(ppo_state *s, psoup_error *error) {
    psoup_ppo_policy policies[MAX_POLICIES] = {0};
    psoup_ppo *ppo = NULL;
    for (size_t i = 0; i < s->n; i++) {
        policy_run *p = &s->policies[i];
        policies[i] = (psoup_ppo_policy){.adapter = p->name,
                                         .rewards = &p->reward,
                                         .n_rewards = 1,
                                         .prompts = p->prompts[0],
                                         .n_prompts = p->n[0],
                                         .validation = p->prompts[1],
                                         .n_validation = p->n[1],
                                         .seed = s->run->seed + i};
    }
    s->run->options.tokenizer = s->m.tokenizer;
    psoup_status status =
        psoup_ppo_create(s->m.model, policies, s->n, &s->run->options, &ppo, error);
    psoup_status saved = status;
    if (status == PSOUP_OK)
        status = psoup_ppo_run(ppo, error);
    cli_progress_end();
    /* A policy that diverged does not cost the others: they are done, and saved. */
    bool finished = status == PSOUP_OK;
    for (size_t i = 0; ppo && status == PSOUP_ERROR_STATE && i < s->n; i++)
        finished = finished || psoup_ppo_diverged(ppo, i);
    for (size_t i = 0; saved == PSOUP_OK && finished && i < s->n; i++) {
        psoup_error trouble;
        char *path = join(s->run->output, s->policies[i].name);
        if (!psoup_ppo_diverged(ppo, i))
            saved = path ? psoup_model_save_adapter(s->m.model, s->policies[i].name, path,
                                                    s->run->model, &trouble)
                         : cli_error(&trouble, PSOUP_ERROR_MEMORY, "out of memory");
        free(path);
        if (saved != PSOUP_OK) {
            *error = trouble;
            status = saved;
        }
    }
    psoup_ppo_free(ppo);
    return status;
}

static psoup_status ppo(ppo_state *s, psoup_error *error) {
    ppo_run *run = s->run;
    psoup_status status = PSOUP_OK;
    if (!run->prompts || !run->output)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: expected \"prompts\" and \"output\"",
                         s->config_path);
    status = adapter_config_finish(&run->lora, s->config_path, error);
    if (status == PSOUP_OK)
        status = run_open(run->model, run->tokenizer, run->device, run->threads, &s->m, error);
    if (status == PSOUP_OK)
        status = run->preferences ? psoup_preferences_load(s->m.context, run->preferences,
                                                           &s->preferences, error)
                                  : psoup_preferences_default(s->m.context, run->new_preferences,
                                                              &s->preferences, error);
    if (status == PSOUP_OK)
        status = read_policies(s, error);
    if (status == PSOUP_OK)
        status = load_adapters(s, error);
    if (status == PSOUP_OK)
        status = read_rows(s->m.context, run->prompts, &s->rows[0], error);
    if (status == PSOUP_OK)
        status = read_rows(s->m.context, run->validation, &s->rows[1], error);
    for (size_t i = 0; i < s->n; i++)
        for (int part = 0; status == PSOUP_OK && part < 2; part++)
            status = make_prompts(s, &s->policies[i], part, error);
    return status == PSOUP_OK ? train(s, error) : status;
}

static void ppo_close(ppo_state *s) {
    for (size_t i = 0; i < s->n; i++) {
        policy_run *p = &s->policies[i];
        psoup_reward_free(p->reward);
        free(p->reward_name);
        for (int part = 0; part < 2; part++) {
            free(p->prompts[part]);
            free(p->inputs[part]);
        }
    }
    psoup_json_free(s->rows[0]);
    psoup_json_free(s->rows[1]);
    pool_free(&s->pool);
    psoup_preferences_free(s->preferences);
    cli_close(&s->m);
}

int cmd_ppo(int argc, char **argv) {
    ppo_run run = {.lora = {.options = PSOUP_ADAPTER_OPTIONS_INIT},
                   .options = PSOUP_PPO_OPTIONS_INIT};
    psoup_error error = {0};
    config c;
    int status, kept = 1;
    /* --preset NAME comes before the file's own values. */
    for (int i = 1; i < argc; i++) {
        const char *name = !strncmp(argv[i], "--preset=", 9)              ? argv[i] + 9
                           : !strcmp(argv[i], "--preset") && i + 1 < argc ? argv[++i]
                                                                          : NULL;
        if (!name)
            argv[kept++] = argv[i];
        else if (psoup_ppo_preset(name, &run.options, &error) != PSOUP_OK)
            return cli_complain("%s", error.message);
    }
    const config_section sections[] = {{"Files", ppo_run_fields, &run},
                                       {"New adapters", adapter_fields, &run.lora},
                                       {"Training", psoup_ppo_fields(), &run.options}};
    if (!config_read(
            kept, argv,
            "Usage: psoup ppo [--preset default|rlphf] --config FILE.json\n\n"
            "PPO against learned rewards, all policies side by side: one base in memory, one "
            "batch,\n"
            "each policy with its own optimiser, moments, KL coefficient and early stop. A "
            "policy's\n"
            "\"preference\" is added to its prompts and to what its reward model reads: a symbol "
            "for\n"
            "Personalized Soups, \"all\" for P-MORL (every user's prompts; the mean of the reward\n"
            "told by each preference), null for plain RLHF.\n",
            sections, 3, &c, &status))
        return status;
    ppo_state *s = calloc(1, sizeof *s);
    cli_training training = {.quiet = c.json};
    if (!s)
        return cli_complain("out of memory"), 1;
    s->run = &run;
    s->config_path = c.path;
    run.options.on_step = cli_training_step;
    run.options.user = &training;
    cli_training_begin(run.options.checkpoint_dir);
    status = ppo(s, &error) == PSOUP_OK ? run_print_output(run.output, c.json)
                                                : cli_training_fail(&error);
    ppo_close(s);
    free(s);
    config_free(&c);
    return status;
}
