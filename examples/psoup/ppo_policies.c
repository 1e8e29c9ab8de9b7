/* The policies of `psoup ppo`: adapters, rewards and prompts from the configuration's list. */
#include "ppo_policies.h"

#include <stdlib.h>
#include <string.h>

#define PART(type, member, base)                                                                   \
    {"name", type, base + offsetof(member, name), NULL, NULL},                                     \
        {"reward", type, base + offsetof(member, reward_directory), NULL, NULL},                   \
        {"preference", type, base + offsetof(member, preference), NULL, NULL},                     \
        {"init", type, base + offsetof(member, init), NULL, NULL},                                 \
        {"rewards", PSOUP_FIELD_JSON, base + offsetof(member, several), NULL, NULL}
static const psoup_field part_members[] = {PART(PSOUP_FIELD_STRING, policy_part, 0), {0}};
static const psoup_field policy_members[] = {
    PART(PSOUP_FIELD_STRING, policy_part, offsetof(policy_run, self)),
    {"soup", PSOUP_FIELD_JSON, offsetof(policy_run, soup), NULL, NULL},
    {"concentration", PSOUP_FIELD_FLOAT, offsetof(policy_run, concentration), NULL, NULL},
    {"seed", PSOUP_FIELD_UINT64, offsetof(policy_run, seed), NULL, NULL},
    {0}};
#undef PART
static const psoup_field reward_members[] = {
    {"reward", PSOUP_FIELD_STRING, offsetof(reward_part, directory), NULL, NULL},
    {"weight", PSOUP_FIELD_FLOAT, offsetof(reward_part, weight), NULL, NULL},
    {0}};

/* ---- reading ------------------------------------------------------------------------------------ */

static psoup_status read_object(const psoup_field *members, const psoup_json *object, const char *where,
                                void *to, psoup_error *error) {
    const psoup_field *const tables[] = {members};
    psoup_status status = psoup_fields_check(tables, 1, object, where, error);
    return status == PSOUP_OK ? psoup_fields_read(members, object, where, to, error) : status;
}

static bool has_several(const policy_part *part) {
    return part->several && psoup_json_kind(part->several) != PSOUP_JSON_NULL;
}

/* Names a directory, and knows its reward and preference; a soup itself has neither, and who has several rewards lists
 * them. */
static psoup_status check_part(const ppo_state *s, const policy_part *part, bool is_soup, const char *where,
                               psoup_error *error) {
    if (!part->name || !*part->name || strchr(part->name, '/') || part->name[0] == '.' ||
        (!is_soup && !has_several(part) && !part->reward_directory))
        return cli_error(error, PSOUP_ERROR_ARGUMENT,
                         "%s: expected a \"name\" that can name a directory, and \"reward\", a directory",
                         where);
    if (is_soup && (part->reward_directory || has_several(part) || part->preference || part->init))
        return cli_error(error, PSOUP_ERROR_ARGUMENT,
                         "%s: \"reward\", \"rewards\", \"preference\" and \"init\" are of a soup's adapters", where);
    if (part->preference && strcmp(part->preference, "all") != 0 &&
        psoup_preferences_find(s->preferences, part->preference) < 0)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: preference \"%s\" is not in the catalogue",
                         where, part->preference);
    return PSOUP_OK;
}

/* Either all of a soup's adapters have a preference, each another, or none has. */
static psoup_status check_soup(const policy_run *p, const char *where, psoup_error *error) {
    for (size_t k = 0; k < p->n_parts; k++) {
        const char *preference = p->parts[k].preference;
        if (!preference != !p->parts[0].preference || (preference && !strcmp(preference, "all")))
            return cli_error(error, PSOUP_ERROR_ARGUMENT,
                             "%s: expected a preference's symbol of every adapter of the soup, or of none",
                             where);
        for (size_t j = 0; preference && j < k; j++)
            if (!strcmp(preference, p->parts[j].preference))
                return cli_error(error, PSOUP_ERROR_ARGUMENT,
                                 "%s: two adapters of the soup have preference \"%s\"", where, preference);
    }
    return PSOUP_OK;
}

/* "reward": DIR; or "rewards": {"NAME": DIR, "OTHER": {"reward": DIR, "weight": W}, …}. */
static psoup_status read_rewards(policy_run *p, policy_part *part, const char *where, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    bool several = has_several(part);
    size_t n = several ? psoup_json_size(part->several) : 1;
    const psoup_json *value;
    const char *name = NULL;
    if (several && (part->reward_directory || psoup_json_kind(part->several) != PSOUP_JSON_OBJECT || n == 0 ||
                    n > MAX_REWARDS))
        return cli_error(error, PSOUP_ERROR_ARGUMENT,
                         "%s: rewards: expected {\"NAME\": DIR, …} of 1 to %d, without \"reward\"", where, MAX_REWARDS);
    part->rewards = calloc(n, sizeof *part->rewards);
    if (!part->rewards)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    part->first = p->n_rewards;
    p->n_rewards += n;
    p->several = p->several || several;
    part->rewards[0] = (reward_part){.directory = part->reward_directory, .weight = 1};
    part->n_rewards = several ? 0 : 1;
    while (several && status == PSOUP_OK && (value = psoup_json_next(part->several, &name))) {
        reward_part *reward = &part->rewards[part->n_rewards++];
        char place[700];
        *reward = (reward_part){.name = name, .directory = psoup_json_string(value, NULL), .weight = 1};
        snprintf(place, sizeof place, "%s: rewards: %s", where, name);
        if (!reward->directory && psoup_json_kind(value) == PSOUP_JSON_OBJECT)
            status = read_object(reward_members, value, place, reward, error);
        if (status == PSOUP_OK && !reward->directory)
            status = cli_error(error, PSOUP_ERROR_ARGUMENT,
                               "%s: expected a directory, or {\"reward\": DIR, \"weight\": W}", place);
    }
    return status;
}

static psoup_status read_soup(const ppo_state *s, policy_run *p, const char *where, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t n = psoup_json_size(p->soup);
    if (psoup_json_kind(p->soup) != PSOUP_JSON_ARRAY || n == 0 || n > MAX_SOUP)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: soup: expected a list of 1 to %d adapters", where,
                         MAX_SOUP);
    p->parts = calloc(n, sizeof *p->parts);
    if (!p->parts)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    p->n_parts = n;
    for (size_t k = 0; status == PSOUP_OK && k < n; k++) {
        char place[600];
        snprintf(place, sizeof place, "%s: soup[%zu]", where, k);
        status = read_object(part_members, psoup_json_at(p->soup, k), place, &p->parts[k], error);
        if (status == PSOUP_OK)
            status = check_part(s, &p->parts[k], false, place, error);
        if (status == PSOUP_OK)
            status = read_rewards(p, &p->parts[k], place, error);
    }
    return status == PSOUP_OK ? check_soup(p, where, error) : status;
}

static psoup_status read_policy(const ppo_state *s, const psoup_json *object, policy_run *p,
                                const char *where, psoup_error *error) {
    psoup_status status = read_object(policy_members, object, where, p, error);
    bool is_soup = p->soup && psoup_json_kind(p->soup) != PSOUP_JSON_NULL;
    p->soup = is_soup ? p->soup : NULL;
    if (status == PSOUP_OK)
        status = check_part(s, &p->self, is_soup, where, error);
    if (status == PSOUP_OK && is_soup) {
        status = read_soup(s, p, where, error);
    } else if (status == PSOUP_OK) {
        if (psoup_json_get(object, "concentration"))
            return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: \"concentration\" is of a soup's mixes", where);
        p->parts = calloc(1, sizeof *p->parts);
        if (!p->parts)
            return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
        p->parts[0] = p->self;
        p->n_parts = 1;
        status = read_rewards(p, &p->parts[0], where, error);
    }
    return status;
}

psoup_status ppo_read_policies(ppo_state *s, psoup_error *error) {
    const psoup_json *list = s->run->policies;
    psoup_status status = PSOUP_OK;
    size_t n = psoup_json_size(list);
    if (psoup_json_kind(list) != PSOUP_JSON_ARRAY || n == 0 || n > MAX_POLICIES)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: policies: expected a list of 1 to %d",
                         s->config_path, MAX_POLICIES);
    for (size_t i = 0; status == PSOUP_OK && i < n; i++) {
        policy_run *p = &s->policies[s->n++];
        char where[512];
        p->seed = s->run->seed + i;
        p->concentration = 1;
        snprintf(where, sizeof where, "%s: policies[%zu]", s->config_path, i);
        status = read_policy(s, psoup_json_at(list, i), p, where, error);
    }
    return status;
}

/* ---- adapters ------------------------------------------------------------------------------------- */

static psoup_status load_reward(ppo_state *s, const char *part, reward_part *reward, psoup_error *error) {
    const char *own = reward->name ? reward->name : "";
    size_t length = strlen(part) + strlen(own) + sizeof "reward of : ";
    reward->model_name = malloc(length);
    reward->full_name = malloc(length);
    if (!reward->model_name || !reward->full_name)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    snprintf(reward->model_name, length, "reward of %s%s%s", part, *own ? ": " : "", own);
    snprintf(reward->full_name, length, "%s%s%s", part, *own ? "/" : "", own);
    return psoup_reward_load(s->m.model, reward->model_name, reward->directory, &reward->reward, error);
}

/* The adapter of part `k`, and its rewards. */
static psoup_status load_part(ppo_state *s, policy_run *p, size_t k, psoup_error *error) {
    policy_part *part = &p->parts[k];
    psoup_status status = part->init
                              ? psoup_model_load_adapter(s->m.model, part->name, part->init, error)
                              : psoup_model_add_adapter(s->m.model, part->name, &s->run->lora.options, error);
    p->names[k] = part->name;
    for (size_t i = 0; status == PSOUP_OK && i < part->n_rewards; i++) {
        reward_part *reward = &part->rewards[i];
        status = load_reward(s, part->name, reward, error);
        p->rewards[part->first + i] = reward->reward;
        p->sources[part->first + i] = (psoup_reward_source){.name = p->soup ? reward->full_name : reward->name,
                                                            .model = reward->reward,
                                                            .weight = reward->weight,
                                                            .adapter = (int32_t)k};
    }
    return status;
}

/* What is said of new adapters has to be for one. */
static psoup_status check_inits(ppo_state *s, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; i < s->n; i++)
        for (size_t k = 0; k < s->policies[i].n_parts; k++)
            if (!s->policies[i].parts[k].init)
                return PSOUP_OK;
    for (size_t i = 0; i < s->n; i++)
        for (size_t k = 0; status == PSOUP_OK && k < s->policies[i].n_parts; k++)
            status = adapter_config_beside(&s->run->lora, s->m.context, s->policies[i].parts[k].init, s->config_path,
                                           error);
    return status;
}

psoup_status ppo_load_adapters(ppo_state *s, psoup_error *error) {
    psoup_status status = check_inits(s, error);
    for (size_t i = 0; status == PSOUP_OK && i < s->n; i++) {
        policy_run *p = &s->policies[i];
        p->names = calloc(p->n_parts, sizeof *p->names);
        p->rewards = calloc(p->n_rewards, sizeof(psoup_reward *));
        p->sources = calloc(p->n_rewards, sizeof *p->sources);
        if (!p->names || !p->rewards || !p->sources)
            return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
        for (size_t k = 0; status == PSOUP_OK && k < p->n_parts; k++)
            status = load_part(s, p, k, error);
    }
    return status;
}

/* ---- prompts -------------------------------------------------------------------------------------- */

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

/* Which of a soup's adapters is trained for preference k; −1: none. Of another policy it is the one. */
static int32_t part_for(const ppo_state *s, const policy_run *p, int32_t k) {
    for (size_t i = 0; p->soup && i < p->n_parts; i++)
        if (psoup_preferences_find(s->preferences, p->parts[i].preference) == k)
            return (int32_t)i;
    return p->soup ? -1 : 0;
}

/* The users whom a policy serves: all, or those for whose every preference a soup has an adapter. */
static psoup_status users_of(ppo_state *s, const policy_run *p, size_t *users, size_t *n,
                             psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t all = psoup_users_count(s->preferences), size = psoup_user_size(s->preferences);
    *n = 0;
    for (size_t u = 0; status == PSOUP_OK && u < all; u++) {
        int32_t members[MAX_DIMENSIONS];
        bool served = true;
        status = psoup_user_get(s->preferences, u, members, NULL, 0, error);
        for (size_t k = 0; status == PSOUP_OK && k < size; k++)
            served = served && part_for(s, p, members[k]) >= 0;
        if (status == PSOUP_OK && served)
            users[(*n)++] = u;
    }
    if (status == PSOUP_OK && *n == 0)
        status = cli_error(error, PSOUP_ERROR_ARGUMENT,
                           "%s: policy \"%s\": its soup has no user: expected an adapter for a preference of "
                           "each dimension", s->config_path, p->self.name);
    return status;
}

/* Inputs that a prompt of a user has at most. */
static size_t inputs_of(const ppo_state *s, const policy_run *p) {
    size_t most = 0;
    for (size_t k = 0; k < p->n_parts; k++)
        most = p->parts[k].n_rewards > most ? p->parts[k].n_rewards : most;
    return psoup_user_size(s->preferences) * most;
}

/* The prompt of a user with several preferences: {t + P1 + P2 + P3}, and one reward input {t + P_i} for each (Jang et
 * al. 2023, section 2.2, P-MORL), for every one of its rewards. */
static psoup_status user_prompt(ppo_state *s, const policy_run *p, const char *instruction,
                                const char *input, size_t user, psoup_reward_input *inputs,
                                psoup_ppo_prompt *out, psoup_error *error) {
    int32_t members[MAX_DIMENSIONS];
    size_t size = psoup_user_size(s->preferences), length = 1, n = 0;
    psoup_status status = psoup_user_get(s->preferences, user, members, NULL, 0, error);
    for (size_t k = 0; status == PSOUP_OK && k < size; k++)
        length += strlen(psoup_preferences_get(s->preferences, (size_t)members[k])->prompt) + 1;
    char *all = malloc(length);
    if (!all)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    *all = 0;
    for (size_t k = 0; status == PSOUP_OK && k < size; k++) {
        const char *prompt = psoup_preferences_get(s->preferences, (size_t)members[k])->prompt;
        const policy_part *part = &p->parts[part_for(s, p, members[k])];
        psoup_reward_input one = {.weight = 1.0f / (float)size};
        if (k)
            strcat(all, " ");
        strcat(all, prompt);
        status = encode_filled(s, instruction, input, prompt, &one.tokens, &one.n, error);
        for (size_t i = 0; i < part->n_rewards; i++) {
            inputs[n] = one;
            inputs[n++].reward = (int32_t)(part->first + i);
        }
    }
    if (status == PSOUP_OK)
        status = encode_filled(s, instruction, input, all, &out->tokens, &out->n, error);
    free(all);
    out->inputs = inputs;
    out->n_inputs = n;
    return status;
}

/* The prompt of row i for one of the policy's users, or with its one preference, or without. */
static psoup_status make_prompt(ppo_state *s, const policy_run *p, const char *path, const psoup_json *row,
                                size_t i, const size_t *user, psoup_reward_input *inputs,
                                psoup_ppo_prompt *out, psoup_error *error) {
    const char *instruction = psoup_json_string(psoup_json_get(row, "prompt"), NULL);
    const char *input, *preference = NULL;
    psoup_status status = row_option(row, "input", path, i, &input, error);
    out->id = psoup_json_integer(psoup_json_get(row, "id"), (int64_t)i);
    if (status == PSOUP_OK && !instruction)
        status = row_text(row, "instruction", path, i, &instruction, error);
    if (status == PSOUP_OK && user)
        status = user_prompt(s, p, instruction, input, *user, inputs, out, error);
    else if (status == PSOUP_OK) {
        int32_t k = p->self.preference ? psoup_preferences_find(s->preferences, p->self.preference) : -1;
        preference = k < 0 ? NULL : psoup_preferences_get(s->preferences, (size_t)k)->prompt;
        status = encode_filled(s, instruction, input, preference, &out->tokens, &out->n, error);
    }
    char where[256];
    snprintf(where, sizeof where, "%s: row %zu", path, i + 1);
    return status == PSOUP_OK ? cli_check_tokens(&s->m, out->tokens, out->n, 1, where, error) : status;
}

/* One per row; or with preference "all", and of a soup whose adapters have preferences, one per row and
 * user. */
psoup_status ppo_make_prompts(ppo_state *s, policy_run *p, int part, psoup_error *error) {
    const psoup_json *rows = s->rows[part];
    const char *path = part ? s->run->validation : s->run->prompts;
    bool all = p->soup ? p->parts[0].preference != NULL
                       : p->self.preference && !strcmp(p->self.preference, "all");
    size_t n = psoup_json_size(rows), size = psoup_user_size(s->preferences), users = 1;
    size_t stride = inputs_of(s, p);
    psoup_status status = PSOUP_OK;
    if (size > MAX_DIMENSIONS)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "more than %d dimensions of preference",
                         MAX_DIMENSIONS);
    size_t *user = calloc(psoup_users_count(s->preferences) + 1, sizeof *user);
    if (!user)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    if (all)
        status = users_of(s, p, user, &users, error);
    p->n[part] = n * users;
    p->prompts[part] = calloc(n * users + 1, sizeof *p->prompts[part]);
    p->inputs[part] = all ? calloc(n * users * stride + 1, sizeof *p->inputs[part]) : NULL;
    if (status == PSOUP_OK && (!p->prompts[part] || (all && !p->inputs[part])))
        status = cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    for (size_t i = 0; status == PSOUP_OK && i < n * users; i++)
        status = make_prompt(s, p, path, psoup_json_at(rows, i / users), i / users,
                             all ? &user[i % users] : NULL, all ? p->inputs[part] + i * stride : NULL,
                             &p->prompts[part][i], error);
    free(user);
    return status;
}

/* ---- in and out ----------------------------------------------------------------------------------- */

psoup_ppo_policy ppo_policy(policy_run *p) {
    p->mixed = (psoup_ppo_soup)PSOUP_PPO_SOUP_INIT;
    p->mixed.adapters = p->names;
    p->mixed.n = p->n_parts;
    p->mixed.concentration = p->concentration;
    return (psoup_ppo_policy){.adapter = p->self.name,
                              .soup = p->soup ? &p->mixed : NULL,
                              .rewards = p->several ? NULL : p->rewards,
                              .n_rewards = p->several ? 0 : p->n_rewards,
                              .sources = p->several ? p->sources : NULL,
                              .n_sources = p->several ? p->n_rewards : 0,
                              .prompts = p->prompts[0],
                              .n_prompts = p->n[0],
                              .validation = p->prompts[1],
                              .n_validation = p->n[1],
                              .seed = p->seed};
}

/* To output/NAME, or a soup's adapters each to output/NAME/ADAPTER. */
psoup_status ppo_save(ppo_state *s, const policy_run *p, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    char *directory = join(s->run->output, p->self.name);
    for (size_t k = 0; status == PSOUP_OK && k < p->n_parts; k++) {
        char *path = !directory ? NULL : p->soup ? join(directory, p->names[k]) : directory;
        status = path ? psoup_model_save_adapter(s->m.model, p->names[k], path, s->run->model, error)
                      : cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
        if (path != directory)
            free(path);
    }
    free(directory);
    return status;
}

void ppo_free_policies(ppo_state *s) {
    for (size_t i = 0; i < s->n; i++) {
        policy_run *p = &s->policies[i];
        for (size_t k = 0; k < p->n_parts; k++) {
            for (size_t r = 0; r < p->parts[k].n_rewards; r++) {
                psoup_reward_free(p->parts[k].rewards[r].reward);
                free(p->parts[k].rewards[r].model_name);
                free(p->parts[k].rewards[r].full_name);
            }
            free(p->parts[k].rewards);
        }
        free(p->sources);
        free(p->parts);
        free(p->names);
        free(p->rewards);
        for (int part = 0; part < 2; part++) {
            free(p->prompts[part]);
            free(p->inputs[part]);
        }
    }
}
