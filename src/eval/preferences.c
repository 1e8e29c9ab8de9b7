/* The catalogue of preferences and the users that combine them. */
#include "eval/eval.h"

#include <stdio.h>
#include <string.h>

/* Jang et al. 2023, table 4 and appendix B.2. The paper gives no opposite for its two new styles;
 * friendliness is theirs too. */
static const psoup_preference paper[] = {
    {"P1A", "expertise",
     "Generate a response that can be easily understood by an elementary school student.", NULL,
     "P1B"},
    {"P1B", "expertise",
     "Generate a response that only a PhD Student in that specific field could understand.", NULL,
     "P1A"},
    {"P2A", "informativeness",
     "Generate a response that is concise and to the point, without being verbose.", NULL, "P2B"},
    {"P2B", "informativeness",
     "Generate a response that is very informative, without missing any background information.",
     NULL, "P2A"},
    {"P3A", "style",
     "Generate a response that is friendly, witty, funny, and humorous, like a close friend.", NULL,
     "P3B"},
    {"P3B", "style", "Generate a response in an unfriendly manner.", NULL, "P3A"},
    {"P3C", "style", "Generate a response in a sassy manner.", NULL, "P3A"},
    {"P3D", "style", "Generate a response in a sarcastic manner.", NULL, "P3A"},
};

static psoup_status preferences_alloc(psoup_context *context, size_t n, psoup_preferences **out,
                                      psoup_error *error) {
    psoup_preferences *p = psoup__alloc(context, 1, sizeof *p, error);
    if (!p)
        return PSOUP_ERROR_MEMORY;
    p->context = context;
    p->n = n;
    *out = p;
    p->items = psoup__alloc(context, n, sizeof *p->items, error);
    p->criteria = psoup__alloc(context, n, sizeof *p->criteria, error);
    p->dimension = psoup__alloc(context, n, sizeof *p->dimension, error);
    return p->items && p->criteria && p->dimension ? PSOUP_OK : PSOUP_ERROR_MEMORY;
}

/* Fills in what follows from the items: dimension numbers and missing criteria. Checks that symbols
 * are unique and opposites exist. */
static psoup_status preferences_derive(psoup_preferences *p, const char *name, psoup_error *error) {
    for (size_t i = 0; i < p->n; i++) {
        psoup_preference *item = &p->items[i];
        int32_t number = -1;
        for (size_t j = 0; j < i; j++) {
            if (!strcmp(p->items[j].symbol, item->symbol))
                return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: symbol \"%s\" appears twice", name,
                                   item->symbol);
            if (!strcmp(p->items[j].dimension, item->dimension))
                number = p->dimension[j];
        }
        p->dimension[i] = number >= 0 ? number : (int32_t)p->dimensions++;
        if (item->opposite && psoup_preferences_find(p, item->opposite) < 0)
            return psoup__fail(error, PSOUP_ERROR_FORMAT,
                               "%s: \"%s\" names the opposite \"%s\", which is not in the catalogue",
                               name, item->symbol, item->opposite);
        if (item->criterion)
            continue;
        if (!strncmp(item->prompt, "Generate", 8))
            p->criteria[i] = psoup__format(p->context, error, "Choose%s", item->prompt + 8);
        else
            p->criteria[i] = psoup__strdup(p->context, item->prompt, error);
        if (!p->criteria[i])
            return PSOUP_ERROR_MEMORY;
        item->criterion = p->criteria[i];
    }
    return PSOUP_OK;
}

psoup_status psoup_preferences_default(psoup_context *context, int with_new,
                                       psoup_preferences **out, psoup_error *error) {
    psoup_preferences *p = NULL;
    psoup_status status;
    if (!out)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_preferences_default: an argument is NULL");
    *out = NULL;
    size_t n = with_new ? 8 : 6;
    PSOUP__TRY(preferences_alloc(context, n, &p, error));
    memcpy(p->items, paper, n * sizeof *paper);
    PSOUP__TRY(preferences_derive(p, "preferences", error));
    *out = p;
    return PSOUP_OK;
fail:
    psoup_preferences_free(p);
    return status;
}

static psoup_status read_item(const psoup_json *row, const char *name, size_t index,
                              psoup_preference *item, psoup_error *error) {
    const struct {
        const char *key;
        const char **to;
        bool required;
    } fields[] = {{"symbol", &item->symbol, true},
                  {"dimension", &item->dimension, true},
                  {"prompt", &item->prompt, true},
                  {"criterion", &item->criterion, false},
                  {"opposite", &item->opposite, false}};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        const psoup_json *value = psoup_json_get(row, fields[i].key);
        *fields[i].to = psoup_json_string(value, NULL);
        bool absent = psoup_json_kind(value) == PSOUP_JSON_NULL;
        if (absent ? fields[i].required : !*fields[i].to || !**fields[i].to)
            return psoup__fail(error, PSOUP_ERROR_FORMAT,
                               "%s: preference %zu: \"%s\" is %s, expected a text", name, index + 1,
                               fields[i].key,
                               absent          ? "missing"
                               : *fields[i].to ? "empty"
                                               : "no text");
    }
    return PSOUP_OK;
}

psoup_status psoup_preferences_load(psoup_context *context, const char *path,
                                    psoup_preferences **out, psoup_error *error) {
    psoup_jsonl_reader *reader = NULL;
    psoup_preferences *p = NULL;
    psoup_json *rows = NULL, *row = NULL;
    psoup_status status;
    if (!path || !out)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_preferences_load: an argument is NULL");
    *out = NULL;
    rows = psoup_json_new_array();
    PSOUP__TRY(psoup_jsonl_open(context, path, &reader, error));
    for (;;) {
        PSOUP__TRY(psoup_jsonl_next(reader, &row, error));
        if (!row)
            break;
        if (psoup_json_append(rows, row) != 0)
            PSOUP__TRY(psoup__out_of_memory(error, 0));
    }
    size_t n = psoup_json_size(rows);
    if (n == 0)
        PSOUP__TRY(psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: no preferences in it", path));
    PSOUP__TRY(preferences_alloc(context, n, &p, error));
    p->root = rows;
    for (size_t i = 0; i < n; i++)
        PSOUP__TRY(read_item(psoup_json_at(rows, i), path, i, &p->items[i], error));
    rows = NULL;
    PSOUP__TRY(preferences_derive(p, path, error));
    psoup_jsonl_reader_free(reader);
    *out = p;
    return PSOUP_OK;
fail:
    psoup_jsonl_reader_free(reader);
    if (!p || p->root != rows)
        psoup_json_free(rows);
    psoup_preferences_free(p);
    return status;
}

void psoup_preferences_free(psoup_preferences *p) {
    if (!p)
        return;
    for (size_t i = 0; p->criteria && i < p->n; i++)
        psoup__free(p->context, p->criteria[i]);
    psoup__free(p->context, p->criteria);
    psoup__free(p->context, p->dimension);
    psoup__free(p->context, p->items);
    psoup_json_free(p->root);
    psoup__free(p->context, p);
}

size_t psoup_preferences_count(const psoup_preferences *p) {
    return p->n;
}

const psoup_preference *psoup_preferences_get(const psoup_preferences *p, size_t index) {
    return index < p->n ? &p->items[index] : NULL;
}

int32_t psoup_preferences_find(const psoup_preferences *p, const char *symbol) {
    for (size_t i = 0; i < p->n; i++)
        if (!strcmp(p->items[i].symbol, symbol))
            return (int32_t)i;
    return -1;
}

static size_t members_of(const psoup_preferences *p, size_t dimension) {
    size_t n = 0;
    for (size_t i = 0; i < p->n; i++)
        n += p->dimension[i] == (int32_t)dimension;
    return n;
}

size_t psoup_users_count(const psoup_preferences *p) {
    size_t users = 1;
    for (size_t d = 0; d < p->dimensions; d++)
        if (!psoup__multiply(users, members_of(p, d), &users))
            return 0;
    return users;
}

size_t psoup_user_size(const psoup_preferences *p) {
    return p->dimensions;
}

psoup_status psoup_user_get(const psoup_preferences *p, size_t user, int32_t *members, char *name,
                            size_t name_size, psoup_error *error) {
    if (!p || !members)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_user_get: an argument is NULL");
    if (user >= psoup_users_count(p))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "user %zu: there are %zu", user,
                           psoup_users_count(p));
    if (name && name_size < p->dimensions + 1)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "name_size is %zu, expected at least %zu",
                           name_size, p->dimensions + 1);
    for (size_t d = p->dimensions; d-- > 0;) {
        size_t n = members_of(p, d), pick = user % n;
        user /= n;
        for (size_t i = 0; i < p->n; i++)
            if (p->dimension[i] == (int32_t)d && pick-- == 0) {
                members[d] = (int32_t)i;
                if (name)
                    name[d] = p->items[i].symbol[strlen(p->items[i].symbol) - 1];
                break;
            }
    }
    if (name)
        name[p->dimensions] = 0;
    return PSOUP_OK;
}
