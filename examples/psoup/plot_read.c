/* Runs from their files: rows of metrics and of samples, and the configuration. */
#include "plot.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static psoup_status out_of_memory(psoup_error *error) {
    return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
}

/* Room for one more of `size` bytes each; items: the address of the pointer to them. */
static bool reserve(void *items, size_t n, size_t *capacity, size_t size) {
    if (n < *capacity)
        return true;
    size_t grown = *capacity ? 2 * *capacity : 16;
    void *moved;
    memcpy(&moved, items, sizeof moved);
    if (!(moved = realloc(moved, grown * size)))
        return false;
    memcpy(items, &moved, sizeof moved);
    *capacity = grown;
    return true;
}

size_t plot_metric(const plot *p, const char *name) {
    for (size_t i = 0; i < p->n_metrics; i++)
        if (!strcmp(p->metrics[i], name))
            return i;
    return PLOT_METRICS;
}

/* ---- rows --------------------------------------------------------------------------------------------- */

static psoup_status add_run(plot *p, const char *path, size_t part, psoup_error *error) {
    if (!reserve(&p->runs, p->n_runs, &p->runs_capacity, sizeof *p->runs))
        return out_of_memory(error);
    plot_run *run = &p->runs[p->n_runs];
    *run = (plot_run){.path = strdup(path), .part = part};
    if (!run->path)
        return out_of_memory(error);
    p->n_runs++;
    return PSOUP_OK;
}

static plot_line *find_line(const plot *p, size_t run, const char *subject) {
    for (size_t i = p->n; i-- > 0;)
        if (p->lines[i]->run == run && !strcmp(p->lines[i]->subject, subject))
            return p->lines[i];
    return NULL;
}

static plot_line *add_line(plot *p, const char *subject) {
    plot_line *line = calloc(1, sizeof *line);
    if (!line || !(line->subject = strdup(subject)) ||
        !reserve(&p->lines, p->n, &p->lines_capacity, sizeof *p->lines)) {
        if (line)
            free(line->subject);
        free(line);
        return NULL;
    }
    line->run = p->n_runs - 1;
    p->lines[p->n++] = line;
    return line;
}

static psoup_status add_value(plot *p, plot_line *line, const char *name, int phase, int64_t step, double value,
                              psoup_error *error) {
    size_t metric = plot_metric(p, name);
    if (metric == PLOT_METRICS) {
        if (p->n_metrics == PLOT_METRICS || !(p->metrics[p->n_metrics] = strdup(name)))
            return cli_error(error, PSOUP_ERROR_UNSUPPORTED, "more than %d metrics", PLOT_METRICS);
        metric = p->n_metrics++;
    }
    plot_points *points = &line->points[metric][phase];
    size_t capacity = points->capacity;
    if (!reserve(&points->x, points->n, &capacity, sizeof *points->x) ||
        !reserve(&points->y, points->n, &points->capacity, sizeof *points->y))
        return out_of_memory(error);
    points->x[points->n] = (double)step;
    points->y[points->n++] = value;
    return PSOUP_OK;
}

/* {"phase", "subject", "step", "total", metrics…} */
static psoup_status read_metrics(plot *p, const char *path, int64_t number, const psoup_json *row,
                                 psoup_error *error) {
    const char *phase = psoup_json_string(psoup_json_get(row, "phase"), ""), *key = NULL;
    const char *subject = psoup_json_string(psoup_json_get(row, "subject"), NULL);
    int64_t step = psoup_json_integer(psoup_json_get(row, "step"), -1);
    int64_t total = psoup_json_integer(psoup_json_get(row, "total"), -1);
    int kind = !strcmp(phase, "validation") ? PLOT_VALIDATION : PLOT_TRAIN;
    psoup_status status = PSOUP_OK;
    const char *wrong = kind == PLOT_TRAIN && strcmp(phase, "train") != 0 ? "\"phase\": \"train\" or \"validation\""
                        : !subject                                       ? "\"subject\", a text"
                        : step < 1                                       ? "\"step\", a whole number from 1"
                        : total < 1                                      ? "\"total\", a whole number from 1"
                                                                         : NULL;
    if (wrong)
        return cli_error(error, PSOUP_ERROR_FORMAT, "%s:%lld: expected a row of metrics, with %s", path,
                         (long long)number, wrong);
    plot_line *line = find_line(p, p->n_runs - 1, subject);
    if (line && step <= line->last[kind]) { /* steps begin anew: another run was appended */
        status = add_run(p, path, p->runs[p->n_runs - 1].part + 1, error);
        line = NULL;
    }
    if (status == PSOUP_OK && !line && !(line = add_line(p, subject)))
        status = out_of_memory(error);
    if (status != PSOUP_OK)
        return status;
    line->last[kind] = step;
    line->step = step > line->step ? step : line->step;
    line->total = total;
    for (const psoup_json *value; status == PSOUP_OK && (value = psoup_json_next(row, &key));) {
        psoup_json_type is = psoup_json_kind(value);
        if (!strcmp(key, "phase") || !strcmp(key, "subject") || !strcmp(key, "step") || !strcmp(key, "total"))
            continue;
        if (is != PSOUP_JSON_INTEGER && is != PSOUP_JSON_REAL && is != PSOUP_JSON_NULL)
            return cli_error(error, PSOUP_ERROR_FORMAT, "%s:%lld: \"%s\" is no number", path, (long long)number, key);
        status = add_value(p, line, key, kind, step, psoup_json_real(value, NAN), error);
    }
    return status;
}

/* {"step", "policy", "prompt", "response", "score", …}; takes the row. */
static psoup_status read_sample(plot *p, const char *path, int64_t number, psoup_json *row, size_t source,
                                psoup_error *error) {
    const char *policy = psoup_json_string(psoup_json_get(row, "policy"), NULL);
    int64_t step = psoup_json_integer(psoup_json_get(row, "step"), -1);
    if (!policy || step < 0 || !psoup_json_get(row, "prompt")) {
        psoup_json_free(row);
        return cli_error(error, PSOUP_ERROR_FORMAT,
                         "%s:%lld: expected a sample, with \"step\", \"policy\", \"prompt\" and \"response\"", path,
                         (long long)number);
    }
    if (!reserve(&p->samples, p->n_samples, &p->samples_capacity, sizeof *p->samples)) {
        psoup_json_free(row);
        return out_of_memory(error);
    }
    p->samples[p->n_samples++] = (plot_sample){.source = source, .step = step, .policy = policy, .row = row};
    return PSOUP_OK;
}

/* A file of rows of either kind. */
static psoup_status read_file(plot *p, const char *path, size_t source, psoup_error *error) {
    psoup_jsonl_reader *reader = NULL;
    psoup_json *row = NULL;
    bool metrics = false;
    psoup_status status = psoup_jsonl_open(p->context, path, &reader, error);
    while (status == PSOUP_OK && (status = psoup_jsonl_next(reader, &row, error)) == PSOUP_OK && row) {
        int64_t line = psoup_jsonl_line(reader);
        if (psoup_json_get(row, "response")) {
            status = read_sample(p, path, line, row, source, error);
            continue;
        }
        if (!metrics)
            status = add_run(p, path, 1, error);
        metrics = true;
        if (status == PSOUP_OK)
            status = read_metrics(p, path, line, row, error);
        psoup_json_free(row);
    }
    psoup_jsonl_reader_free(reader);
    return status;
}

/* ---- a run's files ------------------------------------------------------------------------------------- */

static char *join_path(const char *directory, const char *name) {
    char *path = malloc(strlen(directory) + strlen(name) + 2);
    if (path)
        sprintf(path, "%s%s%s", directory, *directory && directory[strlen(directory) - 1] == '/' ? "" : "/", name);
    return path;
}

static bool is_ours(const struct dirent *entry, const char *begins) {
    size_t n = strlen(entry->d_name);
    return !strncmp(entry->d_name, begins, strlen(begins)) && n > 6 && !strcmp(entry->d_name + n - 6, ".jsonl");
}
static int is_metrics(const struct dirent *entry) { return is_ours(entry, "metrics"); }
static int is_samples(const struct dirent *entry) { return is_ours(entry, "samples"); }

static psoup_status read_all(plot *p, const char *directory, int (*wanted)(const struct dirent *), size_t source,
                             size_t *found, psoup_error *error) {
    struct dirent **entries = NULL;
    psoup_status status = PSOUP_OK;
    int n = scandir(directory, &entries, wanted, alphasort);
    if (n < 0)
        return cli_error(error, PSOUP_ERROR_IO, "%s: cannot read: %s", directory, strerror(errno));
    for (int i = 0; i < n; i++) {
        char *path = status == PSOUP_OK ? join_path(directory, entries[i]->d_name) : NULL;
        if (status == PSOUP_OK)
            status = path ? read_file(p, path, source, error) : out_of_memory(error);
        free(path);
        free(entries[i]);
    }
    free(entries);
    *found = (size_t)n;
    return status;
}

static psoup_status read_directory(plot *p, const char *directory, size_t source, psoup_error *error) {
    size_t found = 0, first = p->n_runs;
    struct stat info;
    char *path = NULL;
    psoup_json *config = NULL;
    psoup_status status = read_all(p, directory, is_metrics, source, &found, error);
    if (status == PSOUP_OK && found == 0)
        return cli_error(error, PSOUP_ERROR_IO, "%s: has no metrics.jsonl, nor another metrics*.jsonl", directory);
    if (status == PSOUP_OK)
        status = read_all(p, directory, is_samples, source, &found, error);
    if (status == PSOUP_OK && !(path = join_path(directory, "config.json")))
        status = out_of_memory(error);
    if (status == PSOUP_OK && stat(path, &info) == 0)
        status = psoup_json_read(p->context, path, &config, error);
    if (status == PSOUP_OK && first < p->n_runs)
        p->runs[first].config = config;
    else
        psoup_json_free(config);
    free(path);
    return status;
}

psoup_status plot_read(plot *p, const char *path, size_t source, psoup_error *error) {
    struct stat info;
    if (stat(path, &info) == 0 && S_ISDIR(info.st_mode))
        return read_directory(p, path, source, error);
    return read_file(p, path, source, error);
}

/* ---- labels and the best -------------------------------------------------------------------------------- */

/* The short name of a run: its directory where the file is called metrics.jsonl, or the file without its end. */
static char *short_name(const char *path) {
    const char *slash = strrchr(path, '/'), *file = slash ? slash + 1 : path;
    size_t n = strlen(file);
    if (!strcmp(file, "metrics.jsonl") && slash) {
        n = (size_t)(slash - path);
        while (n && path[n - 1] == '/')
            n--;
        for (file = path + n; file > path && file[-1] != '/';)
            file--;
        n -= (size_t)(file - path);
    } else if (n > 6 && !strcmp(file + n - 6, ".jsonl")) {
        n -= 6;
    }
    return n ? cli_utf8(file, n) : cli_utf8(path, strlen(path));
}

static bool label_run(plot *p, size_t i) {
    plot_run *run = &p->runs[i];
    char *name = short_name(run->path), *again;
    bool twice = false;
    for (size_t k = 0; name && k < p->n_runs; k++) /* the same name of another file: the whole path */
        if (strcmp(p->runs[k].path, run->path) != 0 && (again = short_name(p->runs[k].path))) {
            twice = twice || !strcmp(again, name);
            free(again);
        }
    if (name && twice) {
        free(name);
        name = cli_utf8(run->path, strlen(run->path));
    }
    if (name && run->part > 1) {
        char *numbered = malloc(strlen(name) + 24);
        if (numbered)
            sprintf(numbered, "%s #%zu", name, run->part);
        free(name);
        name = numbered;
    }
    run->label = name;
    return name != NULL;
}

static bool label_line(const plot *p, plot_line *line) {
    const char *run = p->runs[line->run].label;
    line->label = malloc(strlen(run) + strlen(line->subject) + 8);
    if (!line->label)
        return false;
    if (p->n_runs == 1)
        strcpy(line->label, line->subject);
    else
        sprintf(line->label, "%s · %s", run, line->subject);
    return true;
}

/* The highest mean reward of a validation; or its accuracy, then its lowest loss; or its lowest loss alone: what
 * the trainers keep. */
static void find_best(const plot *p, plot_line *line) {
    size_t loss = plot_metric(p, "loss"), metric = PLOT_METRICS;
    static const char *const names[] = {"reward", "accuracy", "loss"};
    for (int i = 0; i < 3 && metric == PLOT_METRICS; i++) {
        metric = plot_metric(p, names[i]);
        if (metric < PLOT_METRICS && line->points[metric][PLOT_VALIDATION].n == 0)
            metric = PLOT_METRICS;
    }
    if (metric == PLOT_METRICS)
        return;
    const plot_points *v = &line->points[metric][PLOT_VALIDATION];
    const plot_points *tie = loss < PLOT_METRICS ? &line->points[loss][PLOT_VALIDATION] : NULL;
    double sign = metric == loss ? -1 : 1, least = INFINITY;
    for (size_t i = 0; i < v->n; i++) {
        double second = tie && tie->n == v->n ? tie->y[i] : 0;
        if (isnan(v->y[i]) || (line->best_step && (sign * v->y[i] < sign * line->best ||
                                                   (v->y[i] == line->best && second >= least))))
            continue;
        line->best = v->y[i];
        line->best_step = (int64_t)v->x[i];
        line->best_metric = metric;
        least = second;
    }
}

psoup_status plot_finish(plot *p, psoup_error *error) {
    for (size_t i = 0; i < p->n_runs; i++)
        if (!label_run(p, i))
            return out_of_memory(error);
    for (size_t i = 0; i < p->n; i++) {
        if (!label_line(p, p->lines[i]))
            return out_of_memory(error);
        find_best(p, p->lines[i]);
    }
    return PSOUP_OK;
}

void plot_free(plot *p) {
    for (size_t i = 0; i < p->n; i++) {
        for (size_t m = 0; m < PLOT_METRICS; m++)
            for (int phase = 0; phase < 2; phase++) {
                free(p->lines[i]->points[m][phase].x);
                free(p->lines[i]->points[m][phase].y);
            }
        free(p->lines[i]->subject);
        free(p->lines[i]->label);
        free(p->lines[i]);
    }
    for (size_t i = 0; i < p->n_runs; i++) {
        free(p->runs[i].path);
        free(p->runs[i].label);
        psoup_json_free(p->runs[i].config);
    }
    for (size_t i = 0; i < p->n_samples; i++)
        psoup_json_free(p->samples[i].row);
    for (size_t i = 0; i < p->n_metrics; i++)
        free(p->metrics[i]);
    free(p->lines);
    free(p->runs);
    free(p->samples);
    *p = (plot){0};
}
