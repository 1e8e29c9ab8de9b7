/* The policies of `psoup ppo`: adapters, rewards and prompts from the configuration's list. */
#include "ppo_policies.h"

#include <stdlib.h>
#include <string.h>

#define PART(type, member, base)                                                                   \
    {"name", type, base + offsetof(member, name), NULL, NULL},                                     \
        {"reward", type, base + offsetof(member, reward_directory), NULL, NULL},                   \
        {"preference", type, base + offsetof(member, preference), NULL, NULL},                     \
        {"init", type, base + offsetof(member, init), NULL, NULL}
static const psoup_field part_members[] = {PART(PSOUP_FIELD_STRING, policy_part, 0), {0}};
static const psoup_field policy_members[] = {
    PART(PSOUP_FIELD_STRING, policy_part, offsetof(policy_run, self)),
    {"rewards", PSOUP_FIELD_JSON, offsetof(policy_run, several), NULL, NULL},
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

/* Names a directory, and knows its reward and preference; a soup itself has neither, and who has several rewards lists
 * them. */
static psoup_status check_part(const ppo_state *s, const policy_part *part, bool is_soup, bool several,
                               const char *where, psoup_error *error) {
    if (!part->name || !*part->name || strchr(part->name, '/') || part->name[0] == '.' ||
        (!is_soup && !several && !part->reward_directory))
        return cli_error(error, PSOUP_ERROR_ARGUMENT,
                         "%s: expected a \"name\" that can name a directory, and \"reward\", a directory",
                         where);
    if (is_soup && (part->reward_directory || part->preference || part->init))
        return cli_error(error, PSOUP_ERROR_ARGUMENT,
                         "%s: \"reward\", \"preference\" and \"init\" are of a soup's adapters", where);
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
            status = check_part(s, &p->parts[k], false, false, place, error);
    }
    return status == PSOUP_OK ? check_soup(p, where, error) : status;
}

/* "rewards": {"NAME": DIR, "OTHER": {"reward": DIR, "weight": W}, …}. */
static psoup_status read_rewards(policy_run *p, const char *where, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t n = psoup_json_size(p->several);
    const psoup_json *value;
    const char *name = NULL;
    if (p->soup || p->self.reward_directory || psoup_json_kind(p->several) != PSOUP_JSON_OBJECT || n == 0 ||
        n > MAX_REWARDS)
        return cli_error(error, PSOUP_ERROR_ARGUMENT,
                         "%s: rewards: expected {\"NAME\": DIR, …} of 1 to %d, without \"reward\" or \"soup\"", where,
                         MAX_REWARDS);
    p->several_parts = calloc(n, sizeof *p->several_parts);
    p->sources = calloc(n, sizeof *p->sources);
    if (!p->several_parts || !p->sources)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    while (status == PSOUP_OK && (value = psoup_json_next(p->several, &name))) {
        reward_part *part = &p->several_parts[p->n_sources];
        char place[600];
        part->weight = 1;
        part->directory = psoup_json_string(value, NULL);
        p->sources[p->n_sources++].name = name;
        snprintf(place, sizeof place, "%s: rewards: %s", where, name);
        if (!part->directory && psoup_json_kind(value) == PSOUP_JSON_OBJECT)
            status = read_object(reward_members, value, place, part, error);
        if (status == PSOUP_OK && !part->directory)
            status = cli_error(error, PSOUP_ERROR_ARGUMENT,
                               "%s: expected a directory, or {\"reward\": DIR, \"weight\": W}", place);
    }
    return status;
}

static psoup_status read_policy(const ppo_state *s, const psoup_json *object, policy_run *p,
                                const char *where, psoup_error *error) {
    psoup_status status = read_object(policy_members, object, where, p, error);
    bool is_soup = p->soup && psoup_json_kind(p->soup) != PSOUP_JSON_NULL;
    bool several = p->several && psoup_json_kind(p->several) != PSOUP_JSON_NULL;
    p->soup = is_soup ? p->soup : NULL;
    if (status == PSOUP_OK)
        status = check_part(s, &p->self, is_soup, several, where, error);
    if (status == PSOUP_OK && several)
        status = read_rewards(p, where, error);
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

static psoup_status load_reward(ppo_state *s, const char *policy, const char *reward, const char *directory,
                                char **name, psoup_reward **out, psoup_error *error) {
    size_t length = strlen(policy) + strlen(reward) + sizeof "reward of : ";
    *name = malloc(length);
    if (!*name)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    snprintf(*name, length, "reward of %s%s%s", policy, *reward ? ": " : "", reward);
    return psoup_reward_load(s->m.model, *name, directory, out, error);
}

static psoup_status load_part(ppo_state *s, policy_part *part, psoup_error *error) {
    psoup_status status = part->init
                              ? psoup_model_load_adapter(s->m.model, part->name, part->init, error)
                              : psoup_model_add_adapter(s->m.model, part->name, &s->run->lora.options, error);
    if (status == PSOUP_OK && part->reward_directory)
        status = load_reward(s, part->name, "", part->reward_directory, &part->reward_name, &part->reward, error);
    return status;
}

static psoup_status load_sources(ppo_state *s, policy_run *p, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t k = 0; status == PSOUP_OK && k < p->n_sources; k++) {
        reward_part *part = &p->several_parts[k];
        status = load_reward(s, p->self.name, p->sources[k].name, part->directory, &part->model_name, &part->reward,
                             error);
        p->sources[k].model = part->reward;
        p->sources[k].weight = part->weight;
    }
    return status;
}

psoup_status ppo_load_adapters(ppo_state *s, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; status == PSOUP_OK && i < s->n; i++) {
        policy_run *p = &s->policies[i];
        p->names = calloc(p->n_parts, sizeof *p->names);
        p->rewards = calloc(p->n_parts, sizeof(psoup_reward *));
        if (!p->names || !p->rewards)
            return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
        for (size_t k = 0; status == PSOUP_OK && k < p->n_parts; k++) {
            status = load_part(s, &p->parts[k], error);
            p->names[k] = p->parts[k].name;
            p->rewards[k] = p->parts[k].reward;
        }
        if (status == PSOUP_OK)
            status = load_sources(s, p, error);
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

/* Which of a soup's adapters is trained for preference k; −1: none. Of another policy it is reward 0. */
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

/* The prompt of a user with several preferences: {t + P1 + P2 + P3}, and one reward input
 * {t + P_i} for each (Jang et al. 2023, section 2.2, P-MORL). */
static psoup_status user_prompt(ppo_state *s, const policy_run *p, const char *instruction,
                                const char *input, size_t user, psoup_reward_input *inputs,
                                psoup_ppo_prompt *out, psoup_error *error) {
    int32_t members[MAX_DIMENSIONS];
    size_t size = psoup_user_size(s->preferences), length = 1, rewards = p->n_sources ? p->n_sources : 1;
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
        inputs[k] = (psoup_reward_input){.reward = part_for(s, p, members[k]),
                                         .weight = 1.0f / (float)size};
        status =
            encode_filled(s, instruction, input, prompt, &inputs[k].tokens, &inputs[k].n, error);
    }
    for (size_t k = size; status == PSOUP_OK && k < size * rewards; k++) { /* the same for each of several rewards */
        inputs[k] = inputs[k % size];
        inputs[k].reward = (int32_t)(k / size);
    }
    if (status == PSOUP_OK)
        status = encode_filled(s, instruction, input, all, &out->tokens, &out->n, error);
    free(all);
    out->inputs = inputs;
    out->n_inputs = size * rewards;
    return status;
}

/* The prompt of row i for one of the policy's users, or with its one preference, or without. */
static psoup_status make_prompt(ppo_state *s, const policy_run *p, const char *path, const psoup_json *row,
                                size_t i, const size_t *user, psoup_reward_input *inputs,
                                psoup_ppo_prompt *out, psoup_error *error) {
    const char *instruction = psoup_json_string(psoup_json_get(row, "prompt"), NULL);
    const char *input = psoup_json_string(psoup_json_get(row, "input"), NULL), *preference = NULL;
    psoup_status status = PSOUP_OK;
    out->id = psoup_json_integer(psoup_json_get(row, "id"), (int64_t)i);
    if (!instruction)
        status = row_text(row, "instruction", path, i, &instruction, error);
    if (status != PSOUP_OK)
        return status;
    if (user)
        return user_prompt(s, p, instruction, input, *user, inputs, out, error);
    if (p->self.preference) {
        int32_t k = psoup_preferences_find(s->preferences, p->self.preference);
        preference = psoup_preferences_get(s->preferences, (size_t)k)->prompt;
    }
    return encode_filled(s, instruction, input, preference, &out->tokens, &out->n, error);
}

/* One per row; or with preference "all", and of a soup whose adapters have preferences, one per row and
 * user. */
psoup_status ppo_make_prompts(ppo_state *s, policy_run *p, int part, psoup_error *error) {
    const psoup_json *rows = s->rows[part];
    const char *path = part ? s->run->validation : s->run->prompts;
    bool all = p->soup ? p->parts[0].preference != NULL
                       : p->self.preference && !strcmp(p->self.preference, "all");
    size_t n = psoup_json_size(rows), size = psoup_user_size(s->preferences), users = 1;
    size_t stride = size * (p->n_sources ? p->n_sources : 1); /* inputs of a prompt */
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
                              .rewards = p->n_sources ? NULL : p->rewards,
                              .n_rewards = p->n_sources ? 0 : p->n_parts,
                              .sources = p->sources,
                              .n_sources = p->n_sources,
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
        for (size_t k = 0; p->parts && k < p->n_parts; k++) {
            psoup_reward_free(p->parts[k].reward);
            free(p->parts[k].reward_name);
        }
        for (size_t k = 0; k < p->n_sources; k++) {
            psoup_reward_free(p->several_parts[k].reward);
            free(p->several_parts[k].model_name);
        }
        free(p->several_parts);
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
