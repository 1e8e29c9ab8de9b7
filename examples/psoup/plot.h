/* psoup plot: what its parts share.
 *
 *   cmd_plot.c   the command
 *   plot_read.c  runs from their files: metrics, samples, configuration
 *   plot_draw.c  which charts there are, with which curves; the picture
 *   plot_page.c  the HTML page around them
 *   chart.c      one chart
 */
#ifndef PLOT_H
#define PLOT_H

#include "chart.h"
#include "cli.h"

enum { PLOT_METRICS = 96, PLOT_TRAIN = 0, PLOT_VALIDATION = 1 };

typedef struct plot_points {
    double *x, *y; /* [n] steps, and values: NaN where the file has null */
    size_t n, capacity;
} plot_points;

/* One who was trained, in one run: a curve in each chart. */
typedef struct plot_line {
    size_t run;
    char *subject, *label;
    int64_t step, total, last[2]; /* last step of each phase */
    plot_points points[PLOT_METRICS][2];
    size_t best_metric; /* of the validation that was best */
    int64_t best_step;  /* 0: there was none */
    double best;
} plot_line;

typedef struct plot_run {
    char *path, *label;
    size_t part;        /* from 1: a file may hold several runs, one after another */
    psoup_json *config; /* NULL: none */
} plot_run;

typedef struct plot_sample {
    size_t source; /* the argument it came with */
    int64_t step;
    const char *policy;
    psoup_json *row;
} plot_sample;

typedef struct plot {
    psoup_context *context;
    char *metrics[PLOT_METRICS];
    size_t n_metrics;
    plot_line **lines;
    size_t n, lines_capacity;
    plot_run *runs;
    size_t n_runs, runs_capacity;
    plot_sample *samples;
    size_t n_samples, samples_capacity;
    double smooth;
    cli_list only; /* metrics that were asked for; none: all that move */
} plot;

/* ---- plot_read.c ---- */
/* Adds a run: a metrics file, or a directory with some. `source` is its number among the arguments. */
psoup_status plot_read(plot *p, const char *path, size_t source, psoup_error *error);
/* After all: labels, and the best validations. */
psoup_status plot_finish(plot *p, psoup_error *error);
void plot_free(plot *p);
/* The number of a metric; PLOT_METRICS when no file has it. */
size_t plot_metric(const plot *p, const char *name);

/* ---- plot_draw.c ---- */
/* The charts, in order: chosen [PLOT_METRICS] receives metrics. Those whose one value never changes are left out,
 * unless they were asked for, and counted in *constant. */
size_t plot_choose(const plot *p, size_t *chosen, size_t *constant, size_t constants[PLOT_METRICS]);
/* Title of a metric's chart, and what it is, or NULL. */
const char *plot_title(const char *metric);
const char *plot_about(const char *metric);
/* The chart of a metric, title or not. */
psoup_status plot_chart(FILE *f, const plot *p, size_t metric, bool title, double width, double height, double left,
                        double top, psoup_error *error);
/* All charts as one picture. */
psoup_status plot_svg(FILE *f, const plot *p, psoup_error *error);
/* The mean of the first or last tenth of a line's training, as it was reported; NaN: there is none. */
double plot_mean(const plot_line *line, size_t metric, bool last);

/* ---- plot_page.c ---- */
psoup_status plot_html(FILE *f, const plot *p, psoup_error *error);

#endif
