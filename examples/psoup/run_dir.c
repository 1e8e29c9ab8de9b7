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

psoup_status run_make_directory(const char *path, psoup_error *error) {
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
    if (mkdir(path, 0777) == 0)
        return PSOUP_OK;
    int why = errno;
    if (stat(path, &info) == 0 && S_ISDIR(info.st_mode))
        return PSOUP_OK;
    errno = why == EEXIST ? ENOTDIR : why; /* something else is there */
    return cli_error(error, PSOUP_ERROR_IO, "%s: cannot make it: %s", path, strerror(errno));
}

/* ---- what goes again ------------------------------------------------------------------------------- */

psoup_status place_note(made_place *place, const char *path, psoup_error *error) {
    struct stat info;
    *place = (made_place){0};
    if (!path || !*path || launch_rank() > 0)
        return PSOUP_OK;
    if (!(place->path = strdup(path)))
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    place->there = strlen(path);
    while (place->there > 0 && stat(place->path, &info) != 0) {
        do
            place->there--;
        while (place->there > 0 && path[place->there] != '/');
        place->path[place->there] = 0;
    }
    strcpy(place->path, path);
    return PSOUP_OK;
}

void place_leave(made_place *place) {
    struct stat info;
    size_t n = place->path ? strlen(place->path) : 0;
    if (n > place->there && stat(place->path, &info) == 0 && S_ISREG(info.st_mode) && info.st_size == 0)
        unlink(place->path);
    while (n > place->there) {
        rmdir(place->path); /* fails where there is something in it */
        do
            n--;
        while (n > place->there && place->path[n] != '/');
        place->path[n] = 0;
    }
    free(place->path);
    *place = (made_place){0};
}

psoup_status run_check_output(const char *output, const char *config_path, const plan_options *plan,
                              psoup_error *error) {
    made_place place;
    if (!*output)
        return cli_error(error, PSOUP_ERROR_ARGUMENT, "%s: output is empty: expected a directory", config_path);
    if (launch_rank() > 0 || plan->only)
        return PSOUP_OK;
    psoup_status status = place_note(&place, output, error);
    char *probe = status == PSOUP_OK ? malloc(strlen(output) + sizeof "/.psoup-XXXXXX") : NULL;
    if (!probe) {
        place_leave(&place);
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    }
    sprintf(probe, "%s/.psoup-XXXXXX", output);
    psoup_error trouble;
    int file = -1, why;
    errno = 0;
    if (run_make_directory(output, &trouble) == PSOUP_OK)
        file = mkstemp(probe);
    why = errno;
    if (file >= 0) {
        close(file);
        unlink(probe);
    } else {
        size_t there = place.there;
        place_leave(&place);
        status = cli_error(error, PSOUP_ERROR_IO, "%s: output: \"%s\" cannot be made in %.*s: %s", config_path, output,
                           there ? (int)there : 1, there ? output : *output == '/' ? "/" : ".", strerror(why));
    }
    free(place.path);
    free(probe);
    return status;
}

/* ---- the directory --------------------------------------------------------------------------------- */

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

psoup_status run_directory_open(run_directory *d, const config_section *sections, size_t n, const plan_options *plan,
                                cli_training *training, psoup_error *error) {
    static const char *const members[] = {"metrics", "samples", "checkpoint_dir", "output"};
    static const char *const names[] = {"metrics.jsonl", "samples.jsonl", "checkpoints"};
    const int32_t *samples = member(sections, n, "samples_every");
    psoup_status status = place_note(&d->places[0], d->path, error);
    if (status == PSOUP_OK && d->path && !plan->only)
        status = run_make_directory(d->path, error);
    for (int i = 0; d->path && status == PSOUP_OK && i < 3; i++) {
        const char **to = member(sections, n, members[i]);
        if (!to || *to || (i == 1 && *samples == 0))
            continue;
        d->made[i] = join(d->path, names[i]);
        if (!d->made[i])
            return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
        *to = d->made[i];
    }
    for (int i = 0; status == PSOUP_OK && i < 4; i++) {
        const char **to = member(sections, n, members[i]);
        status = place_note(&d->places[i + 1], to ? *to : NULL, error);
    }
    if (status != PSOUP_OK || !d->path)
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
    for (int i = 4; i >= 0; i--)
        place_leave(&d->places[i]);
    for (int i = 0; i < 3; i++)
        free(d->made[i]);
    free(d->config);
    free(d->config_path);
    *d = (run_directory){0};
}
