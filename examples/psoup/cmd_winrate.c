/* psoup winrate: win rates from a file of judged duels. */
#include "cli.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_CRITERIA = 16, MAX_NAMES = 64 };

/* Duels read from a file: verdicts and criteria stand in the row's own place. */
typedef struct duels {
    psoup_duel *items;
    int32_t (*preferences)[MAX_CRITERIA], (*verdicts)[MAX_CRITERIA];
    size_t n, capacity;
    char *names[MAX_NAMES]; /* criteria by their number */
    int32_t n_names;
    char **users, **prompts;
    size_t n_users, n_prompts;
} duels;

static int64_t number_of(char ***names, size_t *n, const char *name) {
    for (size_t i = 0; i < *n; i++)
        if (!strcmp((*names)[i], name))
            return (int64_t)i;
    char **grown = realloc(*names, (*n + 1) * sizeof *grown);
    if (!grown)
        return -1;
    *names = grown;
    grown[*n] = strdup(name);
    return grown[*n] ? (int64_t)(*n)++ : -1;
}

static bool read_verdict(const psoup_json *value, int32_t *verdict) {
    const char *text = psoup_json_string(value, "");
    int64_t number = !strcmp(text, "a")     ? PSOUP_A_WINS
                     : !strcmp(text, "b")   ? PSOUP_B_WINS
                     : !strcmp(text, "tie") ? PSOUP_TIE
                                            : psoup_json_integer(value, INT64_MAX);
    *verdict = (int32_t)number;
    return number >= PSOUP_B_WINS && number <= PSOUP_UNPARSED;
}

static bool grow(duels *d) {
    size_t capacity = d->capacity ? 2 * d->capacity : 256;
    void *items = realloc(d->items, capacity * sizeof *d->items);
    d->items = items ? items : d->items;
    void *preferences = realloc(d->preferences, capacity * sizeof *d->preferences);
    d->preferences = preferences ? preferences : d->preferences;
    void *verdicts = realloc(d->verdicts, capacity * sizeof *d->verdicts);
    d->verdicts = verdicts ? verdicts : d->verdicts;
    d->capacity = capacity;
    return items && preferences && verdicts;
}

static psoup_status read_duel(duels *d, const psoup_json *row, const char *path, int64_t line,
                              psoup_error *error) {
    if (d->n == d->capacity && !grow(d))
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    psoup_duel *duel = &d->items[d->n];
    const psoup_json *criteria = psoup_json_get(row, "criteria"), *value;
    const char *key = NULL;
    psoup_json_type kind = psoup_json_kind(psoup_json_get(row, "prompt"));
    if (kind != PSOUP_JSON_INTEGER && kind != PSOUP_JSON_STRING)
        return cli_error(error, PSOUP_ERROR_FORMAT,
                         "%s:%lld: \"prompt\": expected an integer or a text", path,
                         (long long)line);
    char *prompt = psoup_json_text(psoup_json_get(row, "prompt"), 0);
    *duel = (psoup_duel){.helpfulness = PSOUP_UNPARSED};
    duel->prompt = prompt ? number_of(&d->prompts, &d->n_prompts, prompt) : -1;
    psoup_text_free(prompt);
    duel->user =
        number_of(&d->users, &d->n_users, psoup_json_string(psoup_json_get(row, "user"), ""));
    if (duel->prompt < 0 || duel->user < 0)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    while ((value = psoup_json_next(criteria, &key))) {
        int32_t name = 0;
        while (name < d->n_names && strcmp(d->names[name], key) != 0)
            name++;
        if (duel->n == MAX_CRITERIA || name == MAX_NAMES)
            return cli_error(error, PSOUP_ERROR_FORMAT,
                             "%s:%lld: more than %d criteria in a row or %d in all", path,
                             (long long)line, MAX_CRITERIA, MAX_NAMES);
        if (name == d->n_names && !(d->names[d->n_names++] = strdup(key)))
            return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
        d->preferences[d->n][duel->n] = name;
        if (!read_verdict(value, &d->verdicts[d->n][duel->n++]))
            return cli_error(error, PSOUP_ERROR_FORMAT,
                             "%s:%lld: criterion \"%s\": expected \"a\", \"b\", \"tie\", 1, -1, 0, "
                             "or 2 for an unparsed answer",
                             path, (long long)line, key);
    }
    if (psoup_json_get(row, "helpfulness") &&
        !read_verdict(psoup_json_get(row, "helpfulness"), &duel->helpfulness))
        return cli_error(error, PSOUP_ERROR_FORMAT,
                         "%s:%lld: helpfulness: expected \"a\", \"b\", \"tie\", 1, -1, 0 or 2",
                         path, (long long)line);
    if (duel->n == 0 && duel->helpfulness == PSOUP_UNPARSED)
        return cli_error(error, PSOUP_ERROR_FORMAT,
                         "%s:%lld: expected \"criteria\" or \"helpfulness\"", path,
                         (long long)line);
    d->n++;
    return PSOUP_OK;
}

static psoup_status read_duels(psoup_context *context, const char *path, duels *d,
                               psoup_error *error) {
    psoup_jsonl_reader *reader = NULL;
    psoup_status status = psoup_jsonl_open(context, path, &reader, error);
    while (status == PSOUP_OK) {
        psoup_json *row = NULL;
        status = psoup_jsonl_next(reader, &row, error);
        if (!row)
            break;
        status = read_duel(d, row, path, psoup_jsonl_line(reader), error);
        psoup_json_free(row);
    }
    psoup_jsonl_reader_free(reader);
    if (status == PSOUP_OK && d->n == 0)
        status = cli_error(error, PSOUP_ERROR_FORMAT, "%s: no duels in it", path);
    for (size_t i = 0; i < d->n; i++) {
        d->items[i].preferences = d->preferences[i];
        d->items[i].verdicts = d->verdicts[i];
    }
    return status;
}

static void print_rate(const char *name, const psoup_rate *rate, psoup_json *json) {
    if (!json) {
        printf("%-14s %6.1f %%  [%5.1f, %5.1f]  %6lld won %6lld tied %6lld lost %5lld unparsed\n",
               name, 100 * rate->rate, 100 * rate->low, 100 * rate->high, (long long)rate->wins,
               (long long)rate->ties, (long long)rate->losses, (long long)rate->unparsed);
        return;
    }
    psoup_json *row = psoup_json_new_object();
    psoup_json_set(row, "rate", psoup_json_new_real(rate->rate));
    psoup_json_set(row, "low", psoup_json_new_real(rate->low));
    psoup_json_set(row, "high", psoup_json_new_real(rate->high));
    psoup_json_set(row, "wins", psoup_json_new_integer(rate->wins));
    psoup_json_set(row, "ties", psoup_json_new_integer(rate->ties));
    psoup_json_set(row, "losses", psoup_json_new_integer(rate->losses));
    psoup_json_set(row, "unparsed", psoup_json_new_integer(rate->unparsed));
    psoup_json_set(json, name, row);
}

int cmd_winrate(int argc, char **argv) {
    bool json = false;
    uint64_t seed = 0;
    cli_list files = {0};
    int status;
    const cli_option options[] = {
        {"--seed", CLI_UINT64, &seed, "N", "of the bootstrap that gives the intervals (0)"},
        {"--json", CLI_FLAG, &json, NULL, "print one line of JSON"},
        {0}};
    if (!cli_parse(argc, argv, options,
                   "Usage: psoup winrate FILE.jsonl\n\n"
                   "Each row is one duel of responses A and B to a prompt for a user:\n"
                   "  {\"prompt\": 7, \"user\": \"AAB\", \"criteria\": {\"P1A\": 1, \"P2A\": 0, "
                   "\"P3B\": -1}, "
                   "\"helpfulness\": 1}\n"
                   "Verdicts are 1 or \"a\", 0 or \"tie\", -1 or \"b\", 2 where the judge was not "
                   "understood.\n"
                   "The rate is A's wins / (wins + losses), of a criterion the mean over its users; the "
                   "interval is\n95 %, by prompt.\n",
                   &files, &status))
        return status;
    if (files.n != 1)
        return cli_complain("winrate: expected one file, got %zu", files.n);
    psoup_error error = {0};
    psoup_context *context = NULL;
    duels d = {0};
    psoup_rate rate;
    psoup_json *out = json ? psoup_json_new_object() : NULL;
    psoup_status done = psoup_context_create(NULL, &context, &error);
    if (done == PSOUP_OK)
        done = read_duels(context, files.items[0], &d, &error);
    if (done == PSOUP_OK)
        done = psoup_winrate_aggregate(context, d.items, d.n, seed, &rate, &error);
    if (done == PSOUP_OK)
        print_rate("aggregate", &rate, out);
    for (int32_t i = 0; done == PSOUP_OK && i < d.n_names; i++) {
        done = psoup_winrate_criterion(context, d.items, d.n, i, seed, &rate, &error);
        if (done == PSOUP_OK)
            print_rate(d.names[i], &rate, out);
    }
    if (done == PSOUP_OK)
        done = psoup_winrate_helpfulness(context, d.items, d.n, seed, &rate, &error);
    if (done == PSOUP_OK && rate.wins + rate.ties + rate.losses > 0)
        print_rate("helpfulness", &rate, out);
    status = done == PSOUP_OK ? 0 : cli_fail(&error);
    if (json && done == PSOUP_OK)
        status = cli_print_json(out);
    else
        psoup_json_free(out);
    for (size_t i = 0; i < d.n_prompts; i++)
        free(d.prompts[i]);
    for (size_t i = 0; i < d.n_users; i++)
        free(d.users[i]);
    for (int32_t i = 0; i < d.n_names; i++)
        free(d.names[i]);
    free(d.prompts), free(d.users), free(d.items), free(d.preferences), free(d.verdicts);
    psoup_context_free(context);
    return status;
}
