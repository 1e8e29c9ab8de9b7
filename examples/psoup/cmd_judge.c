/* psoup judge: the responses of two runs before a judge, as duels for psoup winrate. */
#include "config.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MOST_WORDS = 63, MOST_MEMBERS = 16 };

typedef struct judge_args {
    const char *preferences, *out;
    cli_list judge;
    bool swap, helpfulness, new_preferences, json;
    float patience;
} judge_args;

/* Rows of both sides, pair by pair; what a duel is made of is borrowed from them. */
typedef struct duel_set {
    psoup_json *rows[2]; /* arrays of equal length once they are paired */
    psoup_duel *duels;
    int32_t (*preferences)[MOST_MEMBERS];
    char **prompts; /* [n] as the judge sees them */
    const char **responses[2];
    size_t n;
} duel_set;

static psoup_status no_memory(psoup_error *error) { return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory"); }

/* ---- reading --------------------------------------------------------------------------------------- */

static psoup_status append_file(psoup_context *context, const char *path, psoup_json *rows, psoup_error *error) {
    psoup_jsonl_reader *reader = NULL;
    psoup_status status = psoup_jsonl_open(context, path, &reader, error);
    while (status == PSOUP_OK) {
        psoup_json *row = NULL;
        status = psoup_jsonl_next(reader, &row, error);
        if (status != PSOUP_OK || !row)
            break;
        if (psoup_json_append(rows, row) != 0)
            status = no_memory(error);
    }
    psoup_jsonl_reader_free(reader);
    return status;
}

/* A file of responses; or a run's directory, whose responses/USER.jsonl are read user by user. */
static psoup_status read_side(psoup_context *context, const psoup_preferences *preferences, const char *path,
                              psoup_json **rows, psoup_error *error) {
    char *directory = join(path, "responses");
    psoup_status status = directory ? PSOUP_OK : no_memory(error);
    if (!(*rows = psoup_json_new_array()))
        status = no_memory(error);
    struct stat info;
    bool is_run = directory && stat(directory, &info) == 0;
    if (status == PSOUP_OK && !is_run && stat(path, &info) == 0 && S_ISDIR(info.st_mode))
        status = cli_error(error, PSOUP_ERROR_FORMAT,
                           "%s: has no responses/: expected a directory of psoup run, or a file of its responses", path);
    if (status == PSOUP_OK && !is_run)
        status = append_file(context, path, *rows, error);
    for (size_t u = 0; status == PSOUP_OK && is_run && u < psoup_users_count(preferences); u++) {
        int32_t members[MOST_MEMBERS];
        char name[MOST_MEMBERS + 8] = "";
        status = psoup_user_get(preferences, u, members, name, MOST_MEMBERS, error);
        strcat(name, ".jsonl");
        char *file = status == PSOUP_OK ? join(directory, name) : NULL;
        if (status == PSOUP_OK)
            status = file ? append_file(context, file, *rows, error) : no_memory(error);
        free(file);
    }
    if (status == PSOUP_OK && psoup_json_size(*rows) == 0)
        status = cli_error(error, PSOUP_ERROR_FORMAT, "%s: no responses in it", path);
    free(directory);
    return status;
}

static bool same(const psoup_json *a, const psoup_json *b, const char *key) {
    char *x = psoup_json_text(psoup_json_get(a, key), 0), *y = psoup_json_text(psoup_json_get(b, key), 0);
    bool equal = x && y && !strcmp(x, y);
    psoup_text_free(x);
    psoup_text_free(y);
    return equal;
}

static psoup_status read_members(const psoup_preferences *preferences, const psoup_json *row, const char *path,
                                 size_t i, duel_set *d, psoup_error *error) {
    const psoup_json *list = psoup_json_get(row, "preferences");
    size_t n = psoup_json_size(list);
    if (psoup_json_kind(list) != PSOUP_JSON_ARRAY || n > MOST_MEMBERS)
        return cli_error(error, PSOUP_ERROR_FORMAT,
                         "%s: row %zu: \"preferences\" is missing or no list of at most %d symbols", path, i + 1,
                         MOST_MEMBERS);
    for (size_t k = 0; k < n; k++) {
        const char *symbol = psoup_json_string(psoup_json_at(list, k), "");
        d->preferences[i][k] = psoup_preferences_find(preferences, symbol);
        if (d->preferences[i][k] < 0)
            return cli_error(error, PSOUP_ERROR_ARGUMENT,
                             "%s: row %zu: \"preferences\": \"%s\" is not in the catalogue", path, i + 1, symbol);
    }
    d->duels[i] = (psoup_duel){.prompt = (int64_t)i, .preferences = d->preferences[i], .n = n};
    return PSOUP_OK;
}

static psoup_status make_duel(const psoup_preferences *preferences, const char *const paths[2], size_t i, duel_set *d,
                              psoup_error *error) {
    const psoup_json *a = psoup_json_at(d->rows[0], i), *b = psoup_json_at(d->rows[1], i);
    const char *instruction, *input = psoup_json_string(psoup_json_get(a, "input"), "");
    psoup_status status = row_text(a, "completion", paths[0], i, &d->responses[0][i], error);
    if (status == PSOUP_OK)
        status = row_text(b, "completion", paths[1], i, &d->responses[1][i], error);
    if (status == PSOUP_OK)
        status = row_text(a, "instruction", paths[0], i, &instruction, error);
    if (status == PSOUP_OK)
        status = read_members(preferences, a, paths[0], i, d, error);
    if (status != PSOUP_OK)
        return status;
    if (!same(a, b, "prompt") || !same(a, b, "user") || !same(a, b, "instruction"))
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s and %s: row %zu answers other prompts or users", paths[0],
                         paths[1], i + 1);
    size_t length = strlen(instruction) + strlen(input) + 2;
    if (!(d->prompts[i] = malloc(length)))
        return no_memory(error);
    snprintf(d->prompts[i], length, "%s%s%s", instruction, *input ? " " : "", input);
    return PSOUP_OK;
}

static psoup_status pair(const psoup_preferences *preferences, const char *const paths[2], duel_set *d,
                         psoup_error *error) {
    size_t n = psoup_json_size(d->rows[0]), other = psoup_json_size(d->rows[1]);
    psoup_status status = PSOUP_OK;
    if (n != other)
        return cli_error(error, PSOUP_ERROR_ARGUMENT,
                         "%s has %zu responses, %s %zu: expected those to the same prompts", paths[0], n, paths[1],
                         other);
    d->duels = calloc(n, sizeof *d->duels);
    d->preferences = calloc(n, sizeof *d->preferences);
    d->prompts = calloc(n, sizeof *d->prompts);
    d->responses[0] = calloc(n, sizeof *d->responses[0]);
    d->responses[1] = calloc(n, sizeof *d->responses[1]);
    if (!d->duels || !d->preferences || !d->prompts || !d->responses[0] || !d->responses[1])
        return no_memory(error);
    d->n = n;
    for (size_t i = 0; status == PSOUP_OK && i < n; i++)
        status = make_duel(preferences, paths, i, d, error);
    return status;
}

static void free_duels(duel_set *d) {
    for (size_t i = 0; i < d->n; i++)
        free(d->prompts[i]);
    free(d->duels), free(d->preferences), free(d->prompts);
    for (int k = 0; k < 2; k++) {
        free(d->responses[k]);
        psoup_json_free(d->rows[k]);
    }
}

/* ---- judging --------------------------------------------------------------------------------------- */

static psoup_status write_duels(const psoup_preferences *preferences, const duel_set *d, const int32_t *verdicts,
                                const int32_t *helpful, psoup_jsonl_writer *writer, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; status == PSOUP_OK && i < d->n; i++) {
        const psoup_json *from = psoup_json_at(d->rows[0], i);
        psoup_json *row = psoup_json_new_object(), *criteria = psoup_json_new_object();
        for (size_t k = 0; k < d->duels[i].n; k++)
            psoup_json_set(criteria, psoup_preferences_get(preferences, (size_t)d->preferences[i][k])->symbol,
                           psoup_json_new_integer(*verdicts++));
        psoup_json_set(row, "prompt", psoup_json_copy(psoup_json_get(from, "prompt")));
        psoup_json_set(row, "user", psoup_json_copy(psoup_json_get(from, "user")));
        psoup_json_set(row, "criteria", criteria);
        if (helpful)
            psoup_json_set(row, "helpfulness", psoup_json_new_integer(helpful[i]));
        status = psoup_jsonl_write(writer, row, error);
        psoup_json_free(row);
    }
    return status == PSOUP_OK ? psoup_jsonl_close(writer, error) : status;
}

static psoup_status ask(const judge_args *a, psoup_context *context, const psoup_preferences *preferences,
                        const duel_set *d, psoup_error *error) {
    const char *words[MOST_WORDS + 1] = {NULL};
    psoup_judge *judge = NULL;
    psoup_jsonl_writer *writer = NULL;
    size_t total = 1;
    for (size_t i = 0; i < d->n; i++)
        total += d->duels[i].n;
    int32_t *verdicts = calloc(total, sizeof *verdicts);
    int32_t *helpful = a->helpfulness ? calloc(d->n, sizeof *helpful) : NULL;
    psoup_status status = verdicts && (helpful || !a->helpfulness) ? PSOUP_OK : no_memory(error);
    memcpy(words, a->judge.items, a->judge.n * sizeof *words);
    if (status == PSOUP_OK) /* before the judge has worked: what cannot be written is known at once */
        status = psoup_jsonl_create(context, a->out, 0, &writer, error);
    if (status == PSOUP_OK)
        status = psoup_judge_command(context, words, &judge, error);
    if (status == PSOUP_OK)
        status = psoup_judge_set_patience(judge, (double)a->patience, error);
    if (status == PSOUP_OK)
        status = psoup_judge_duels(judge, preferences, (const char *const *)d->prompts, d->responses[0],
                                   d->responses[1], d->duels, d->n, a->swap, verdicts, helpful, error);
    size_t unparsed = 0;
    for (size_t i = 0; status == PSOUP_OK && i + 1 < total; i++)
        unparsed += verdicts[i] == PSOUP_UNPARSED;
    if (status == PSOUP_OK && unparsed > 0 && unparsed + 1 == total)
        status = cli_misunderstood(words[0], unparsed, error);
    if (status == PSOUP_OK)
        status = write_duels(preferences, d, verdicts, helpful, writer, error);
    psoup_jsonl_writer_free(writer);
    psoup_judge_free(judge);
    free(verdicts);
    free(helpful);
    return status;
}

static psoup_status run(const judge_args *a, const char *const paths[2], size_t *n, psoup_error *error) {
    psoup_context *context = NULL;
    psoup_preferences *preferences = NULL;
    duel_set d = {0};
    psoup_status status = psoup_context_create(NULL, &context, error);
    if (status == PSOUP_OK)
        status = a->preferences ? psoup_preferences_load(context, a->preferences, &preferences, error)
                                : psoup_preferences_default(context, a->new_preferences, &preferences, error);
    for (int k = 0; status == PSOUP_OK && k < 2; k++)
        status = read_side(context, preferences, paths[k], &d.rows[k], error);
    if (status == PSOUP_OK)
        status = pair(preferences, paths, &d, error);
    if (status == PSOUP_OK)
        status = ask(a, context, preferences, &d, error);
    *n = d.n;
    free_duels(&d);
    psoup_preferences_free(preferences);
    psoup_context_free(context);
    return status;
}

int cmd_judge(int argc, char **argv) {
    judge_args a = {.patience = 600};
    cli_list sides = {0};
    psoup_error error = {0};
    size_t n = 0;
    int status;
    const cli_option options[] = {
        {"--judge", CLI_LIST, &a.judge, "WORD", "the judge's program and, word by word, its arguments"},
        {"--out", CLI_TEXT, &a.out, "FILE", "JSON Lines of duels, for psoup winrate"},
        {"--swap", CLI_FLAG, &a.swap, NULL, "ask in both orders; a verdict that changes sides is a tie"},
        {"--helpfulness", CLI_FLAG, &a.helpfulness, NULL, "ask about general helpfulness too"},
        {"--preferences", CLI_TEXT, &a.preferences, "FILE", "the catalogue (the paper's)"},
        {"--new-preferences", CLI_FLAG, &a.new_preferences, NULL, "with the paper's: P3C and P3D too"},
        {"--patience", CLI_FLOAT, &a.patience, "SECONDS", "that the judge may be silent; 0 waits for ever (600)"},
        {"--json", CLI_FLAG, &a.json, NULL, "print the result as one line of JSON"},
        {0}};
    if (!cli_parse(argc, argv, options,
                   "Usage: psoup judge --judge WORD… --out DUELS.jsonl A B\n\n"
                   "Lays the responses A and B before a judge, each user's by that user's criteria. A and B are\n"
                   "directories of psoup run, or files of its responses, to the same prompts. The judge is any\n"
                   "program, as for psoup feedback. psoup winrate DUELS.jsonl says how often A wins.\n",
                   &sides, &status))
        return status;
    if (sides.n != 2)
        return cli_complain("judge: expected two sides, A and B, got %zu", sides.n);
    if (a.judge.n == 0 || a.judge.n > MOST_WORDS || !a.out)
        return cli_complain("judge: expected --judge with 1 to %d words, and --out FILE", MOST_WORDS);
    if (run(&a, sides.items, &n, &error) != PSOUP_OK)
        return cli_fail(&error);
    if (!a.json)
        return printf("%s: %zu duels\n", a.out, n) < 0;
    psoup_json *row = psoup_json_new_object();
    psoup_json_set(row, "output", psoup_json_new_string(a.out));
    psoup_json_set(row, "duels", psoup_json_new_integer((int64_t)n));
    return cli_print_json(row);
}
