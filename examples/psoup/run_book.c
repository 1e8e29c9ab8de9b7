/* psoup run: what is done already. The run's directory holds the configuration as it was used, config.json, and which
 * stages are finished, finished.json. */
#include "launch.h"
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

static bool is_finished(const run *r, const run_book *book, const char *stage) {
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

static const char *const stages[] = {"rewards", "policies", "soups", "responses"};
enum { STAGES = sizeof stages / sizeof *stages };

bool run_finished(const run_book *book, const char *stage) {
    for (int i = 0; i < STAGES; i++)
        if (!strcmp(stages[i], stage))
            return book->stages >> i & 1;
    return false;
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

/* With what the run was, or (ranks) with what it is for rank 0, whose device need not be this rank's. */
static psoup_status compare(const psoup_json *was, const psoup_json *is, bool ranks, const char *prefix,
                            const char *path, psoup_error *error) {
    const psoup_json *value;
    const char *name = NULL;
    psoup_status status = PSOUP_OK;
    while (status == PSOUP_OK && (value = psoup_json_next(is, &name))) {
        const psoup_json *before = psoup_json_get(was, name);
        char where[256];
        snprintf(where, sizeof where, "%s%s%s", prefix, *prefix ? "." : "", name);
        if (may_differ(where) || (ranks && !strcmp(where, "device")))
            continue;
        if (psoup_json_kind(value) == PSOUP_JSON_OBJECT && psoup_json_kind(before) == PSOUP_JSON_OBJECT) {
            status = compare(before, value, ranks, where, path, error);
            continue;
        }
        char *a = before ? psoup_json_text(before, 0) : NULL, *b = psoup_json_text(value, 0);
        if (!a || !b || strcmp(a, b) != 0)
            status = cli_error(error, PSOUP_ERROR_STATE,
                               ranks ? "%s: is of another run than rank 0's: its %s is %.200s there, %.200s here"
                                     : "%s: is of another run: its %s was %.200s, is %.200s",
                               path, where, a ? a : "absent", b ? b : "?");
        psoup_text_free(a);
        psoup_text_free(b);
    }
    return status;
}

static psoup_status look(const run *r, run_book *book, psoup_error *error) {
    psoup_json *was = NULL, *finished = NULL;
    psoup_status status = PSOUP_OK;
    bool there = access(book->config_path, F_OK) == 0;
    if (there && !r->c.resume)
        return cli_error(error, PSOUP_ERROR_STATE, "%s: has a run already; --resume goes on with it", r->c.output);
    if (there)
        status = psoup_json_read(r->m.context, book->config_path, &was, error);
    if (there && status == PSOUP_OK)
        status = compare(was, book->config, false, "", book->config_path, error);
    if (status == PSOUP_OK && there && access(book->finished_path, F_OK) == 0) {
        status = psoup_json_read(r->m.context, book->finished_path, &finished, error);
        if (status == PSOUP_OK) {
            psoup_json_free(book->finished);
            book->finished = finished;
        }
    }
    for (int i = 0; status == PSOUP_OK && i < STAGES; i++)
        book->stages |= (uint32_t)is_finished(r, book, stages[i]) << i;
    psoup_json_free(was);
    return status;
}

/* What rank 0 says of its run. */
typedef struct saying {
    char method[16];
    uint64_t length; /* of the text of its configuration */
    uint32_t stages;
    int32_t resume;
} saying;

static psoup_status hear(run *r, run_book *book, const saying *first, const char *text, psoup_error *error) {
    psoup_json *there = NULL;
    if (strcmp(first->method, r->method->name) != 0)
        return cli_error(error, PSOUP_ERROR_STATE, "%s: is run by %s, by rank 0 %.15s", r->config_path,
                         r->method->name, first->method);
    psoup_status status = psoup_json_parse(text, (size_t)first->length, "rank 0's configuration", &there, error);
    if (status == PSOUP_OK)
        status = compare(there, book->config, true, "", r->config_path, error);
    psoup_json_free(there);
    r->c.resume = first->resume;
    book->stages = first->stages;
    return status;
}

static psoup_status share(run *r, run_book *book, psoup_error *error) {
    psoup_comm *comm = r->comm;
    char *own = psoup_json_text(book->config, 0), *text = NULL;
    saying first = {.length = own ? strlen(own) : 0, .stages = book->stages, .resume = r->c.resume};
    psoup_status status = own ? PSOUP_OK : cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    snprintf(first.method, sizeof first.method, "%s", r->method->name);
    if (status == PSOUP_OK)
        status = comm->broadcast(comm->user, &first, sizeof first, error);
    if (status == PSOUP_OK && !(text = calloc((size_t)first.length + 1, 1)))
        status = cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    if (status == PSOUP_OK && comm->rank == 0)
        memcpy(text, own, (size_t)first.length);
    if (status == PSOUP_OK)
        status = comm->broadcast(comm->user, text, (size_t)first.length, error);
    if (launch_tell(comm, status, error) == PSOUP_OK && comm->rank > 0)
        status = hear(r, book, &first, text, error);
    psoup_text_free(own);
    free(text);
    return launch_agree(comm, status, error);
}

psoup_status run_open_book(run *r, run_book *book, psoup_error *error) {
    book->config_path = join(r->c.output, "config.json");
    book->finished_path = join(r->c.output, "finished.json");
    book->finished = psoup_json_new_array();
    bool made = book->config_path && book->finished_path && book->finished && book->config;
    psoup_status status = made ? PSOUP_OK : cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    if (status == PSOUP_OK && launch_rank() == 0)
        status = look(r, book, error);
    status = launch_agree(r->comm, status, error);
    return status == PSOUP_OK && r->comm ? share(r, book, error) : status;
}

void run_close_book(run_book *book) {
    psoup_json_free(book->config);
    psoup_json_free(book->finished);
    free(book->config_path);
    free(book->finished_path);
}
