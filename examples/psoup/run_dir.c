/* A training's own directory, "run_dir": what it tells, what it says, how it goes on, and how it was configured. */
#include "config.h"
#include "launch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

const psoup_field run_dir_fields[] = {
    {"run_dir", PSOUP_FIELD_STRING, offsetof(run_directory, path), NULL,
     "Directory of the run: metrics.jsonl, with samples_every samples.jsonl, checkpoints/ and config.json, the "
     "configuration as it was used. Members that name such a file or directory themselves go before."},
    {0}};

/* Makes a directory and those above it. */
static psoup_status make_path(const char *path, psoup_error *error) {
    char *part = strdup(path);
    struct stat info;
    if (!part)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    for (char *slash = strchr(part + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        (void)mkdir(part, 0777);
        *slash = '/';
    }
    free(part);
    if (mkdir(path, 0777) == 0 || (stat(path, &info) == 0 && S_ISDIR(info.st_mode)))
        return PSOUP_OK;
    return cli_error(error, PSOUP_ERROR_IO, "%s: cannot make it: %s", path, strerror(errno));
}

psoup_status run_check_output(const char *output, const char *config_path, psoup_error *error) {
    struct stat info;
    if (!*output)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: output is empty: expected a directory", config_path);
    if (launch_rank() > 0)
        return PSOUP_OK;
    char *part = strdup(output);
    if (!part)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    /* The nearest that is there: the directory itself, or one above it. */
    const char *there = part;
    while (there == part && stat(there, &info) != 0 && (errno == ENOENT || errno == ENOTDIR)) {
        char *slash = strrchr(part, '/');
        if (slash && slash != part)
            *slash = 0;
        else
            there = slash ? "/" : ".";
    }
    const char *why = NULL;
    if (stat(there, &info) == 0 && !S_ISDIR(info.st_mode))
        why = strerror(ENOTDIR);
    else if (access(there, W_OK | X_OK) != 0)
        why = strerror(errno);
    psoup_status status = PSOUP_OK;
    if (why)
        status = cli_error(error, PSOUP_ERROR_IO, "%s: output: \"%s\" cannot be made in %s: %s", config_path, output,
                           there, why);
    free(part);
    return status;
}

/* The member of the sections' structs; NULL: none has it. */
static void *member(const config_section *sections, size_t n, const char *name) {
    for (size_t i = 0; i < n; i++)
        for (const psoup_field *f = sections[i].fields; f->name; f++)
            if (!strcmp(f->name, name))
                return (char *)sections[i].to + f->offset;
    return NULL;
}

static psoup_json *all_values(const config_section *sections, size_t n) {
    psoup_json *all = psoup_json_new_object();
    for (size_t i = 0; i < n; i++) {
        psoup_json *part = psoup_fields_json(sections[i].fields, sections[i].to);
        const char *key = NULL;
        for (const psoup_json *value; (value = psoup_json_next(part, &key));)
            psoup_json_set(all, key, psoup_json_copy(value));
        psoup_json_free(part);
    }
    return all;
}

psoup_status run_directory_open(run_directory *d, const config_section *sections, size_t n,
                                cli_training *training, psoup_error *error) {
    static const char *const members[] = {"metrics", "samples", "checkpoint_dir"};
    static const char *const names[] = {"metrics.jsonl", "samples.jsonl", "checkpoints"};
    const int32_t *samples = member(sections, n, "samples_every");
    if (!d->path)
        return PSOUP_OK;
    psoup_status status = make_path(d->path, error);
    for (int i = 0; status == PSOUP_OK && i < 3; i++) {
        const char **to = member(sections, n, members[i]);
        if (!to || *to || (i == 1 && *samples == 0))
            continue;
        d->made[i] = join(d->path, names[i]);
        if (!d->made[i])
            return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
        *to = d->made[i];
    }
    if (status != PSOUP_OK)
        return status;
    psoup_json *all = all_values(sections, n);
    char *text = psoup_json_text(all, 2);
    psoup_json_free(all);
    d->config_path = join(d->path, "config.json");
    d->config = text ? malloc(strlen(text) + 2) : NULL;
    if (d->config)
        sprintf(d->config, "%s\n", text);
    psoup_text_free(text);
    if (!d->config || !d->config_path)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    training->config = d->config;
    training->config_path = d->config_path;
    return PSOUP_OK;
}

void run_directory_close(run_directory *d) {
    if (d->path)
        rmdir(d->path); /* where nothing came of the run it is empty */
    for (int i = 0; i < 3; i++)
        free(d->made[i]);
    free(d->config);
    free(d->config_path);
    *d = (run_directory){0};
}
