/* psoup run: its files, read into tokens. */
#include "run.h"

#include <stdlib.h>
#include <string.h>

static psoup_status no_memory(psoup_error *error) {
    return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
}

/* ---- preferences and users ----------------------------------------------------------------------- */

static psoup_status read_user(run *r, size_t index, psoup_error *error) {
    run_user *u = &r->users[index];
    size_t length = 1;
    psoup_status status = psoup_user_get(r->preferences, index, u->members, u->name, sizeof u->name, error);
    for (size_t k = 0; status == PSOUP_OK && k < r->user_size; k++)
        length += strlen(psoup_preferences_get(r->preferences, (size_t)u->members[k])->prompt) + 1;
    if (status != PSOUP_OK)
        return status;
    u->wishes = calloc(length, 1);
    if (!u->wishes)
        return no_memory(error);
    for (size_t k = 0; k < r->user_size; k++) {
        if (k)
            strcat(u->wishes, " ");
        strcat(u->wishes, psoup_preferences_get(r->preferences, (size_t)u->members[k])->prompt);
    }
    return PSOUP_OK;
}

psoup_status run_read_preferences(run *r, psoup_error *error) {
    const run_config *c = &r->c;
    psoup_status status =
        c->preferences ? psoup_preferences_load(r->m.context, c->preferences, &r->preferences, error)
                       : psoup_preferences_default(r->m.context, c->new_preferences, &r->preferences, error);
    if (status != PSOUP_OK)
        return status;
    r->n_preferences = psoup_preferences_count(r->preferences);
    r->user_size = psoup_user_size(r->preferences);
    size_t users = psoup_users_count(r->preferences);
    if (r->n_preferences > RUN_PREFERENCES || r->user_size > RUN_MEMBERS || users > RUN_USERS)
        return cli_error(error, PSOUP_ERROR_ARGUMENT,
                         "%zu preferences in %zu dimensions make %zu users, expected at most %d, %d and %d",
                         r->n_preferences, r->user_size, users, RUN_PREFERENCES, RUN_MEMBERS, RUN_USERS);
    r->users = calloc(users, sizeof *r->users);
    if (!r->users)
        return no_memory(error);
    r->n_users = users;
    for (size_t u = 0; status == PSOUP_OK && u < users; u++)
        status = read_user(r, u, error);
    return status;
}

/* ---- prompts ------------------------------------------------------------------------------------- */

const char *run_file_of(const psoup_json *value, const char *name) {
    return psoup_json_string(psoup_json_kind(value) == PSOUP_JSON_OBJECT ? psoup_json_get(value, name) : value,
                             NULL);
}

psoup_status run_prompt_texts(const run_rows *rows, size_t i, const char **instruction, const char **input,
                              psoup_error *error) {
    const psoup_json *row = psoup_json_at(rows->rows, i);
    psoup_status status = row_option(row, "input", rows->path, i, input, error);
    *instruction = psoup_json_string(psoup_json_get(row, "prompt"), NULL);
    if (!*instruction)
        *instruction = psoup_json_string(psoup_json_get(row, "instruction"), NULL);
    return *instruction || status != PSOUP_OK ? status
                        : cli_error(error, PSOUP_ERROR_FORMAT,
                                    "%s: row %zu: \"instruction\" (or \"prompt\") is missing or no text",
                                    rows->path, i + 1);
}

psoup_status run_encode(run *r, const char *instruction, const char *input, const char *wishes,
                        const int32_t **tokens, size_t *n, psoup_error *error) {
    char *text = NULL;
    psoup_status status = psoup_template_fill(r->c.template, instruction, input, wishes, &text, error);
    if (status == PSOUP_OK)
        status = pool_encode(&r->pool, r->m.tokenizer, text, PSOUP_ADD_SPECIAL, tokens, n, error);
    psoup_text_free(text);
    return status;
}

static const char *wish(const run *r, int32_t preference) {
    return preference < 0 ? NULL : psoup_preferences_get(r->preferences, (size_t)preference)->prompt;
}

/* The longest prompt that leaves room for a response. */
static size_t longest_prompt(const run *r) {
    return r->c.max_prompt_tokens > 0 ? (size_t)r->c.max_prompt_tokens - 1 : SIZE_MAX;
}

/* One policy's prompts: {t}, or {t + P_i} (Jang et al. 2023, section 2.2). Rows that are too long are left out, as
 * the paper's code does. */
static psoup_status read_prompts(run *r, const run_rows *rows, int32_t preference, run_prompts *out,
                                 psoup_error *error) {
    size_t n = psoup_json_size(rows->rows);
    psoup_status status = PSOUP_OK;
    out->items = calloc(n + 1, sizeof *out->items);
    if (!out->items)
        return no_memory(error);
    for (size_t i = 0; status == PSOUP_OK && i < n; i++) {
        const char *instruction, *input;
        psoup_ppo_prompt p = {.id = psoup_json_integer(psoup_json_get(psoup_json_at(rows->rows, i), "id"), (int64_t)i)};
        status = run_prompt_texts(rows, i, &instruction, &input, error);
        if (status == PSOUP_OK)
            status = run_encode(r, instruction, input, wish(r, preference), &p.tokens, &p.n, error);
        if (status == PSOUP_OK && p.n > longest_prompt(r))
            out->left_out++;
        else
            out->items[out->n++] = p;
    }
    return status;
}

/* P-MORL's: {t + P_1 + P_2 + P_3} of every row and user, rewarded by the mean over RM(t + P_k + response). What a
 * reward model reads of a row is encoded once for each preference. */
static psoup_status read_user_prompts(run *r, const run_rows *rows, run_prompts *out, psoup_error *error) {
    size_t n = psoup_json_size(rows->rows), size = r->user_size;
    psoup_status status = PSOUP_OK;
    out->items = calloc(n * r->n_users + 1, sizeof *out->items);
    out->inputs = calloc(n * r->n_users * size + 1, sizeof *out->inputs);
    if (!out->items || !out->inputs)
        return no_memory(error);
    for (size_t i = 0; status == PSOUP_OK && i < n; i++) {
        psoup_reward_input read[RUN_PREFERENCES] = {{0}};
        const char *instruction, *input;
        status = run_prompt_texts(rows, i, &instruction, &input, error);
        for (size_t k = 0; status == PSOUP_OK && k < r->n_preferences; k++) {
            read[k] = (psoup_reward_input){.reward = r->told ? 0 : (int32_t)k, .weight = 1.0f / (float)size};
            status = run_encode(r, instruction, input, wish(r, (int32_t)k), &read[k].tokens, &read[k].n, error);
        }
        for (size_t u = 0; status == PSOUP_OK && u < r->n_users; u++) {
            psoup_ppo_prompt p = {.id = (int64_t)(i * r->n_users + u), .n_inputs = size};
            psoup_reward_input *inputs = out->inputs + out->n * size;
            p.inputs = inputs;
            status = run_encode(r, instruction, input, r->users[u].wishes, &p.tokens, &p.n, error);
            for (size_t k = 0; k < size; k++)
                inputs[k] = read[r->users[u].members[k]];
            if (status == PSOUP_OK && p.n > longest_prompt(r))
                out->left_out++;
            else
                out->items[out->n++] = p;
        }
    }
    return status;
}

static psoup_status read_policy_prompts(run *r, run_policy *p, const char *path, run_prompts *out,
                                        psoup_error *error) {
    run_rows rows = {.path = path};
    psoup_status status = read_rows(r->m.context, path, &rows.rows, error);
    if (status == PSOUP_OK)
        status = r->method->scope == RUN_ALL
                     ? read_user_prompts(r, &rows, out, error)
                     : read_prompts(r, &rows, r->c.train_with_preference ? p->preference : -1, out, error);
    if (status == PSOUP_OK && path && out->n == 0)
        status = cli_error(error, PSOUP_ERROR_ARGUMENT,
                           "%s: all %zu prompts have max_prompt_tokens, %d, or more", path, out->left_out,
                           r->c.max_prompt_tokens);
    if (status == PSOUP_OK && out->left_out)
        run_say(r, "%s: %zu of %zu prompts are left out: %d tokens or more", path, out->left_out,
                out->left_out + out->n, r->c.max_prompt_tokens);
    psoup_json_free(rows.rows);
    return status;
}

psoup_status run_read_prompts(run *r, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; status == PSOUP_OK && !r->method->supervised && i < r->n_policies; i++) {
        run_policy *p = &r->policies[i];
        const char *path = run_file_of(r->c.prompts, p->name);
        if (!path)
            return cli_error(error, PSOUP_ERROR_ARGUMENT,
                             "%s: expected \"prompts\", a file or {\"%s\": FILE, …}", r->config_path, p->name);
        status = read_policy_prompts(r, p, path, &p->prompts, error);
        if (status == PSOUP_OK)
            status = read_policy_prompts(r, p, r->c.validation, &p->validation, error);
    }
    r->evaluation.path = r->c.evaluation;
    if (status == PSOUP_OK)
        status = read_rows(r->m.context, r->c.evaluation, &r->evaluation.rows, error);
    for (size_t i = 0; status == PSOUP_OK && i < psoup_json_size(r->evaluation.rows); i++) {
        const char *instruction, *input;
        status = run_prompt_texts(&r->evaluation, i, &instruction, &input, error);
    }
    return status;
}

/* ---- comparisons --------------------------------------------------------------------------------- */

/* The comparisons of one file, or of several one after another. */
typedef struct reading {
    psoup_json *rows; /* all */
    psoup_comparison *out;
    size_t capacity;
} reading;

/* Whether user_input is a filled template: rows of psoup feedback have it so, beside their instruction; the paper's
 * released rows have the instruction itself there. */
static bool is_filled(const run *r, const psoup_json *row) {
    return r->c.user_input == RUN_INPUT_PROMPT ||
           (r->c.user_input == RUN_INPUT_AUTO && psoup_json_get(row, "instruction"));
}

/* What is told of a row: its text, with the template around it and the preference's prompt in it unless it is there. */
static psoup_status prompt_of(const run *r, const psoup_json *row, const char *text, int32_t preference,
                              char **filled, psoup_error *error) {
    const char *asked = r->c.train_with_preference || r->method->scope == RUN_ALL ? wish(r, preference) : NULL;
    *filled = NULL;
    if (is_filled(r, row))
        return PSOUP_OK;
    if (asked && strstr(text, asked))
        asked = NULL;
    return psoup_template_fill(r->c.template, text, NULL, asked, filled, error);
}

/* A row's preference: its own, or its file's (symbol); −1 with a reward of general preference. */
static psoup_status preference_of(const run *r, const psoup_json *row, const char *path, size_t i,
                                  const char *symbol, int32_t *out, psoup_error *error) {
    const psoup_json *own = psoup_json_get(row, "preference");
    psoup_status status = PSOUP_OK;
    *out = -1;
    if (r->method->scope == RUN_GENERAL)
        return psoup_json_kind(own) == PSOUP_JSON_NULL
                   ? PSOUP_OK
                   : cli_error(error, PSOUP_ERROR_ARGUMENT,
                               "%s: row %zu: \"preference\": %s compares by general preference alone", path, i + 1,
                               r->method->name);
    if (own || !symbol)
        status = row_text(row, "preference", path, i, &symbol, error);
    if (status == PSOUP_OK && (*out = psoup_preferences_find(r->preferences, symbol)) < 0)
        status = cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: row %zu: \"preference\": \"%s\" is not in the catalogue",
                           path, i + 1, symbol);
    return status;
}

static psoup_status read_comparison(run *r, const psoup_json *row, const char *path, size_t i, const char *symbol,
                                    psoup_comparison *out, psoup_error *error) {
    const char *prompt, *better, *worse;
    char *filled = NULL;
    /* They end as responses do when they are scored: text that was decoded has no end token. */
    int32_t preference, end = r->c.ppo.reward_text ? -1 : run_end_token(&r->m);
    size_t n_prompt;
    psoup_status status = row_text(row, "user_input", path, i, &prompt, error);
    if (status == PSOUP_OK)
        status = row_text(row, "completion_a", path, i, &better, error);
    if (status == PSOUP_OK)
        status = row_text(row, "completion_b", path, i, &worse, error);
    if (status == PSOUP_OK)
        status = preference_of(r, row, path, i, symbol, &preference, error);
    if (status == PSOUP_OK)
        status = prompt_of(r, row, prompt, preference, &filled, error);
    if (status != PSOUP_OK)
        return status;
    prompt = filled ? filled : prompt;
    out->reward = r->told || preference < 0 ? 0 : preference;
    status = pool_encode_pair(&r->pool, r->m.tokenizer, prompt, better, end, &out->chosen, &out->n_chosen, &n_prompt,
                              error);
    if (status == PSOUP_OK)
        status = pool_encode_pair(&r->pool, r->m.tokenizer, prompt, worse, end, &out->rejected, &out->n_rejected,
                                  &n_prompt, error);
    psoup_text_free(filled);
    return status;
}

static psoup_status read_comparison_file(run *r, reading *all, const char *path, const char *symbol,
                                         psoup_error *error) {
    psoup_jsonl_reader *reader = NULL;
    psoup_status status = psoup_jsonl_open(r->m.context, path, &reader, error);
    for (size_t i = 0; status == PSOUP_OK; i++) {
        psoup_json *row = NULL;
        size_t n = psoup_json_size(all->rows);
        status = psoup_jsonl_next(reader, &row, error);
        if (status != PSOUP_OK || !row) {
            if (status == PSOUP_OK && i == 0)
                status = cli_error(error, PSOUP_ERROR_FORMAT, "%s: no rows in it", path);
            break;
        }
        if (n == all->capacity) {
            void *grown = realloc(all->out, (2 * n + 256) * sizeof *all->out);
            if (!grown) {
                psoup_json_free(row);
                status = no_memory(error);
                break;
            }
            all->out = grown;
            all->capacity = 2 * n + 256;
        }
        status = read_comparison(r, row, path, i, symbol, &all->out[n], error);
        if (psoup_json_append(all->rows, row) != 0 && status == PSOUP_OK)
            status = no_memory(error);
    }
    psoup_jsonl_reader_free(reader);
    return status;
}

/* Every reward model that is trained must have something to learn from. */
static psoup_status check_rewards_fed(const run *r, psoup_error *error) {
    size_t rows[RUN_PREFERENCES] = {0};
    for (size_t i = 0; i < r->n_comparisons; i++)
        rows[r->comparisons[i].reward]++;
    for (size_t i = 0; i < r->n_rewards; i++)
        if (!rows[i])
            return cli_error(error, PSOUP_ERROR_ARGUMENT,
                             "%s: reward_data: no comparisons to train the reward model \"%s\" on", r->config_path,
                             r->rewards[i].name);
    return PSOUP_OK;
}

psoup_status run_read_comparisons(run *r, psoup_error *error) {
    reading all = {.rows = psoup_json_new_array()};
    const psoup_json *data = r->c.reward_data, *file;
    const char *name = NULL;
    psoup_status status = all.rows ? PSOUP_OK : no_memory(error);
    if (status == PSOUP_OK && psoup_json_kind(data) == PSOUP_JSON_STRING)
        status = read_comparison_file(r, &all, psoup_json_string(data, ""), NULL, error);
    while (status == PSOUP_OK && psoup_json_kind(data) == PSOUP_JSON_OBJECT && (file = psoup_json_next(data, &name))) {
        const char *path = psoup_json_string(file, NULL);
        bool general = r->method->scope == RUN_GENERAL;
        if (!path || (!general && psoup_preferences_find(r->preferences, name) < 0 && strcmp(name, "general") != 0))
            status = cli_error(error, PSOUP_ERROR_ARGUMENT,
                               "%s: reward_data: \"%s\": expected a preference's symbol or \"general\", and a file",
                               r->config_path, name);
        else if (general == !strcmp(name, "general"))
            status = read_comparison_file(r, &all, path, name, error);
    }
    r->comparisons = all.out;
    r->n_comparisons = psoup_json_size(all.rows);
    if (status == PSOUP_OK && r->n_comparisons == 0)
        status = cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: reward_data: expected a file, or {\"%s\": FILE, …}",
                           r->config_path, r->method->scope == RUN_GENERAL ? "general" : "P1A");
    if (status == PSOUP_OK) {
        size_t n = r->n_comparisons;
        status = hold_out(all.rows, r->c.held_out, r->comparisons, sizeof *r->comparisons, &r->n_comparisons, error);
        r->n_comparisons_held = n - r->n_comparisons;
    }
    if (status == PSOUP_OK)
        status = check_rewards_fed(r, error);
    psoup_json_free(all.rows);
    return status;
}

/* ---- examples ------------------------------------------------------------------------------------ */

/* MT's: the better positives of the comparisons (kind "positive-positive"), with the one preference prompt that they
 * were sampled with; or rows of instruction, input, output, whose "preference" is a symbol or a text. */
static psoup_status read_example(run *r, const psoup_json *row, const char *path, size_t i, psoup_example *out,
                                 psoup_error *error) {
    const char *prompt = NULL, *completion = NULL, *wishes = NULL, *input;
    char *filled = NULL;
    psoup_status status = PSOUP_OK;
    if (psoup_json_get(row, "completion_a")) {
        status = row_text(row, "user_input", path, i, &prompt, error);
        if (status == PSOUP_OK)
            status = row_text(row, "completion_a", path, i, &completion, error);
        if (status == PSOUP_OK && !is_filled(r, row)) {
            int32_t preference = -1;
            status = preference_of(r, row, path, i, NULL, &preference, error);
            if (status == PSOUP_OK)
                status = prompt_of(r, row, prompt, preference, &filled, error);
        }
    } else {
        status = row_text(row, "instruction", path, i, &prompt, error);
        if (status == PSOUP_OK)
            status = row_text(row, "output", path, i, &completion, error);
        if (psoup_json_get(row, "preference") && status == PSOUP_OK)
            status = row_text(row, "preference", path, i, &wishes, error);
        int32_t preference = wishes ? psoup_preferences_find(r->preferences, wishes) : -1;
        if (status == PSOUP_OK)
            status = row_option(row, "input", path, i, &input, error);
        if (status == PSOUP_OK)
            status = psoup_template_fill(r->c.template, prompt, input, preference < 0 ? wishes : wish(r, preference),
                                         &filled, error);
    }
    if (status == PSOUP_OK)
        status = pool_encode_pair(&r->pool, r->m.tokenizer, filled ? filled : prompt, completion, run_end_token(&r->m),
                                  &out->tokens, &out->n, &out->n_prompt, error);
    psoup_text_free(filled);
    return status;
}

psoup_status run_read_examples(run *r, psoup_error *error) {
    const char *path = r->c.examples;
    psoup_json *rows = NULL, *kept = psoup_json_new_array();
    psoup_status status = read_rows(r->m.context, path, &rows, error);
    size_t n = psoup_json_size(rows), used = 0;
    r->examples = calloc(n + 1, sizeof *r->examples);
    if (status == PSOUP_OK && (!r->examples || !kept))
        status = no_memory(error);
    for (size_t i = 0; status == PSOUP_OK && i < n; i++) {
        const psoup_json *row = psoup_json_at(rows, i);
        const char *kind = NULL;
        if (psoup_json_get(row, "completion_a"))
            status = row_text(row, "kind", path, i, &kind, error);
        if (status != PSOUP_OK || (kind && strcmp(kind, "positive-positive") != 0))
            continue;
        status = read_example(r, row, path, i, &r->examples[used], error);
        if (status == PSOUP_OK && psoup_json_append(kept, psoup_json_copy(row)) != 0)
            status = no_memory(error);
        used++;
    }
    if (status == PSOUP_OK && used == 0)
        status = cli_error(error, PSOUP_ERROR_FORMAT, "%s: no row of kind \"positive-positive\"", path);
    if (status == PSOUP_OK) {
        status = hold_out(kept, r->c.held_out, r->examples, sizeof *r->examples, &r->n_examples, error);
        r->n_examples_held = used - r->n_examples;
    }
    psoup_json_free(rows);
    psoup_json_free(kept);
    return status;
}

void run_free_data(run *r) {
    for (size_t i = 0; i < r->n_policies; i++) {
        run_prompts *both[] = {&r->policies[i].prompts, &r->policies[i].validation};
        for (int k = 0; k < 2; k++) {
            free(both[k]->items);
            free(both[k]->inputs);
        }
    }
    for (size_t u = 0; u < r->n_users; u++)
        free(r->users[u].wishes);
    free(r->users);
    free(r->comparisons);
    free(r->examples);
    psoup_json_free(r->evaluation.rows);
    pool_free(&r->pool);
    psoup_preferences_free(r->preferences);
}
