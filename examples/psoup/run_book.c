/* psoup run: what is done already. The run's directory holds the configuration as it was used, config.json, and which
 * stages are finished, finished.json. */
#include "run.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool is_listed(const run_book *book, const char *stage) {
    for (size_t i = 0; i < psoup_json_size(book->finished); i++)
        if (!strcmp(psoup_json_string(psoup_json_at(book->finished, i), ""), stage))
            return true;
    return false;
}

static bool is_there(const run *r, const char *folder, const char *name, const char *file) {
    char *directory = run_path(r, folder, name), *path = directory && file ? join(directory, file) : NULL;
    bool there = directory && access(path ? path : directory, R_OK) == 0;
    free(directory);
    free(path);
    return there;
}

bool run_finished(const run *r, const run_book *book, const char *stage) {
    bool rewards = !strcmp(stage, "rewards"), policies = !strcmp(stage, "policies"), soups = !strcmp(stage, "soups");
    bool there = is_listed(book, stage);
    for (size_t i = 0; i < r->n_rewards && rewards; i++)
        there = there && is_there(r, stage, r->rewards[i].name, "adapter_config.json") &&
                is_there(r, stage, r->rewards[i].name, "adapter_model.safetensors");
    for (size_t i = 0; i < r->n_policies && policies; i++)
        there = there && is_there(r, stage, r->policies[i].name, "adapter_config.json") &&
                is_there(r, stage, r->policies[i].name, "adapter_model.safetensors");
    for (size_t u = 0; u < r->n_users && !rewards && !policies; u++) {
        char name[RUN_MEMBERS + 8];
        snprintf(name, sizeof name, "%s%s", r->users[u].name, soups ? "" : ".jsonl");
        there = there && is_there(r, stage, name, soups ? "adapter_model.safetensors" : NULL);
    }
    return there;
}

psoup_status run_finish(const run *r, run_book *book, const char *stage, psoup_error *error) {
    if (!is_listed(book, stage) && psoup_json_append(book->finished, psoup_json_new_string(stage)) != 0)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    return psoup_json_write(r->m.context, book->finished_path, book->finished, error);
}

/* Members in which a run may go on differently: none of them changes a result. */
static bool may_differ(const char *name) {
    return !strcmp(name, "output") || !strcmp(name, "resume") || !strcmp(name, "threads");
}

static psoup_status compare(const psoup_json *was, const psoup_json *is, const char *prefix, const char *path,
                            psoup_error *error) {
    const psoup_json *value;
    const char *name = NULL;
    psoup_status status = PSOUP_OK;
    while (status == PSOUP_OK && (value = psoup_json_next(is, &name))) {
        const psoup_json *before = psoup_json_get(was, name);
        char where[256];
        snprintf(where, sizeof where, "%s%s%s", prefix, *prefix ? "." : "", name);
        if (may_differ(where))
            continue;
        if (psoup_json_kind(value) == PSOUP_JSON_OBJECT && psoup_json_kind(before) == PSOUP_JSON_OBJECT) {
            status = compare(before, value, where, path, error);
            continue;
        }
        char *a = before ? psoup_json_text(before, 0) : NULL, *b = psoup_json_text(value, 0);
        if (!a || !b || strcmp(a, b) != 0)
            status = cli_error(error, PSOUP_ERROR_STATE, "%s: is of another run: its %s was %.200s, is %.200s", path,
                               where, a ? a : "absent", b ? b : "?");
        psoup_text_free(a);
        psoup_text_free(b);
    }
    return status;
}

psoup_status run_open_book(const run *r, run_book *book, psoup_error *error) {
    psoup_json *was = NULL, *finished = NULL;
    psoup_status status = PSOUP_OK;
    book->config_path = join(r->c.output, "config.json");
    book->finished_path = join(r->c.output, "finished.json");
    book->finished = psoup_json_new_array();
    if (!book->config_path || !book->finished_path || !book->finished || !book->config)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    bool there = access(book->config_path, F_OK) == 0;
    if (there && !r->c.resume)
        return cli_error(error, PSOUP_ERROR_STATE, "%s: has a run already; --resume goes on with it", r->c.output);
    if (there)
        status = psoup_json_read(r->m.context, book->config_path, &was, error);
    if (there && status == PSOUP_OK)
        status = compare(was, book->config, "", book->config_path, error);
    if (status == PSOUP_OK && there && access(book->finished_path, F_OK) == 0) {
        status = psoup_json_read(r->m.context, book->finished_path, &finished, error);
        if (status == PSOUP_OK) {
            psoup_json_free(book->finished);
            book->finished = finished;
        }
    }
    psoup_json_free(was);
    return status;
}

void run_close_book(run_book *book) {
    psoup_json_free(book->config);
    psoup_json_free(book->finished);
    free(book->config_path);
    free(book->finished_path);
}
