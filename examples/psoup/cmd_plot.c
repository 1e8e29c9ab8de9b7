/* psoup plot: the curves of trainings as a picture or a page. */
#include "plot.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static bool ends_with(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n > m && !strcmp(text + n - m, end);
}

static psoup_status write_plot(const plot *p, const char *path, psoup_error *error) {
    char *text = NULL;
    size_t n = 0;
    FILE *f = open_memstream(&text, &n);
    if (!f)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    psoup_status status = ends_with(path, ".svg") ? plot_svg(f, p, error) : plot_html(f, p, error);
    bool good = fclose(f) == 0;
    if (status == PSOUP_OK)
        status = good ? cli_write_file(path, text, n, error) : cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    free(text);
    return status;
}

static psoup_json *summary(const plot *p, const cli_list *out) {
    psoup_json *all = psoup_json_new_object(), *files = psoup_json_new_array(), *lines = psoup_json_new_array();
    for (size_t i = 0; i < out->n; i++)
        psoup_json_append(files, psoup_json_new_string(out->items[i]));
    for (size_t i = 0; i < p->n; i++) {
        const plot_line *line = p->lines[i];
        psoup_json *row = psoup_json_new_object(), *last = psoup_json_new_object();
        psoup_json_set(row, "run", psoup_json_new_string(p->runs[line->run].label));
        psoup_json_set(row, "subject", psoup_json_new_string(line->subject));
        psoup_json_set(row, "step", psoup_json_new_integer(line->step));
        psoup_json_set(row, "total", psoup_json_new_integer(line->total));
        for (size_t m = 0; m < p->n_metrics; m++)
            if (line->points[m][PLOT_TRAIN].n)
                psoup_json_set(last, p->metrics[m], psoup_json_new_real(plot_mean(line, m, true)));
        psoup_json_set(row, "last_tenth", last);
        if (line->best_step) {
            psoup_json_set(row, "best", psoup_json_new_string(p->metrics[line->best_metric]));
            psoup_json_set(row, "best_value", psoup_json_new_real(line->best));
            psoup_json_set(row, "best_step", psoup_json_new_integer(line->best_step));
        }
        psoup_json_append(lines, row);
    }
    psoup_json_set(all, "out", files);
    psoup_json_set(all, "trained", lines);
    psoup_json_set(all, "samples", psoup_json_new_integer((int64_t)p->n_samples));
    return all;
}

static psoup_status read_all(plot *p, const cli_list *paths, psoup_error *error) {
    psoup_status status = psoup_context_create(NULL, &p->context, error);
    for (size_t i = 0; status == PSOUP_OK && i < paths->n; i++)
        status = plot_read(p, paths->items[i], i, error);
    if (status == PSOUP_OK && p->n == 0)
        status = cli_error(error, PSOUP_ERROR_FORMAT, "%s: no row of metrics in it", paths->items[0]);
    for (size_t i = 0; status == PSOUP_OK && i < p->only.n; i++)
        if (plot_metric(p, p->only.items[i]) == PLOT_METRICS)
            status = cli_error(error, PSOUP_ERROR_ARGUMENT, "--metric %s: no run has it", p->only.items[i]);
    return status == PSOUP_OK ? plot_finish(p, error) : status;
}

int cmd_plot(int argc, char **argv) {
    plot p = {0};
    float smooth = 0.6f;
    bool json = false;
    cli_list paths = {0}, out = {0};
    int status;
    const cli_option options[] = {
        {"--out", CLI_LIST, &out, "FILE", "a page, FILE.html, or a picture, FILE.svg (plot.html)"},
        {"--metric", CLI_LIST, &p.only, "NAME", "draw this one (all that change)"},
        {"--smooth", CLI_FLOAT, &smooth, "A", "by which the past's weight falls a step, 0 to below 1 (0.6)"},
        {"--json", CLI_FLAG, &json, NULL, "print what they came to as one line of JSON"},
        {0}};
    if (!cli_parse(argc, argv, options,
                   "Usage: psoup plot RUN… [--out FILE]\n\n"
                   "Draws the curves of one or several trainings over each other. RUN is a metrics file or a\n"
                   "directory with metrics*.jsonl and, where they are, samples*.jsonl and config.json. The page is\n"
                   "one file without anything from elsewhere. Curves of 20 steps and more are smoothed.\n",
                   &paths, &status))
        return status;
    if (paths.n == 0)
        return cli_complain("plot: expected at least one metrics file or directory");
    if (!(smooth >= 0 && smooth < 1))
        return cli_complain("--smooth: %g, expected 0 to below 1", (double)smooth);
    if (out.n == 0)
        out.items[out.n++] = "plot.html";
    for (size_t i = 0; i < out.n; i++)
        if (!ends_with(out.items[i], ".html") && !ends_with(out.items[i], ".svg"))
            return cli_complain("--out: \"%s\", expected a name that ends in .html or .svg", out.items[i]);
    psoup_error error = {0};
    p.smooth = round(1e6 * (double)smooth) / 1e6;
    psoup_status done = read_all(&p, &paths, &error);
    for (size_t i = 0; done == PSOUP_OK && i < out.n; i++)
        done = write_plot(&p, out.items[i], &error);
    if (done != PSOUP_OK)
        status = cli_fail(&error);
    else if (json)
        status = cli_print_json(summary(&p, &out));
    else
        for (size_t i = 0; i < out.n; i++)
            puts(out.items[i]);
    psoup_context *context = p.context;
    plot_free(&p);
    psoup_context_free(context);
    return status;
}
