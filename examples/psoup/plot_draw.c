/* Which charts a plot has and what is in them; and all of them as one picture. */
#include "plot.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- metrics ------------------------------------------------------------------------------------------- */

static const struct {
    const char *name, *title, *about;
} known[] = {
    {"reward", "Reward", "mean score of a response, as the reward gave it"},
    {"accuracy", "Accuracy", "how often the chosen response scores higher"},
    {"loss", "Loss", NULL},
    {"margin", "Margin", "chosen minus rejected, on average"},
    {"kl", "KL from the base", "nats, of a whole response"},
    {"kl_token", "KL a token", "nats"},
    {"kl_coefficient", "KL coefficient", "weight of the penalty"},
    {"policy_loss", "Policy loss", NULL},
    {"value_loss", "Value loss", "of the critic"},
    {"length", "Length", "tokens of a response"},
    {"length_penalty", "Length penalty", "mean, of a response"},
    {"length_correlation", "Scores and length", "their correlation within a step"},
    {"ended", "Ended", "share of responses that end by themselves"},
    {"empty", "Empty", "share of responses"},
    {"repetition", "Repetition", "share of 4-grams that were there before"},
    {"reward_deviation", "Deviation of the reward", "within a batch"},
    {"reward_chosen", "Implied reward of the chosen", NULL},
    {"reward_rejected", "Implied reward of the rejected", NULL},
    {"policy_kl", "KL of the updates", "from the policy that sampled, a token"},
    {"clip_fraction", "Clipped ratios", "share of tokens"},
    {"value_clip_fraction", "Clipped values", "share of tokens"},
    {"ratio_max", "Largest ratio", "of new to old probability"},
    {"reward_rise", "Rise of the reward", "in its deviations, over warn_window steps"},
    {"epochs", "Epochs", "of updates before the early stop"},
    {"grad_norm", "Gradient's norm", "before it is clipped"},
    {"learning_rate", "Learning rate", NULL},
    {"tokens", "Tokens of a step", NULL},
    {"skipped", "Skipped updates", "the optimiser was not touched"},
    {"warnings", "Warnings", "of a collapse"},
};
enum { KNOWN = sizeof known / sizeof *known };

static size_t known_as(const char *metric) {
    for (size_t i = 0; i < KNOWN; i++)
        if (!strcmp(known[i].name, metric))
            return i;
    return KNOWN;
}

static bool is_part(const char *metric) { return !strncmp(metric, "reward/", 7); }

const char *plot_title(const char *metric) {
    size_t i = known_as(metric);
    return i < KNOWN ? known[i].title : metric;
}

const char *plot_about(const char *metric) {
    size_t i = known_as(metric);
    return i < KNOWN ? known[i].about : is_part(metric) ? "what this reward gave, on average" : NULL;
}

static bool moves(const plot *p, size_t metric) {
    double first = NAN;
    for (size_t i = 0; i < p->n; i++)
        for (int phase = 0; phase < 2; phase++) {
            const plot_points *v = &p->lines[i]->points[metric][phase];
            for (size_t k = 0; k < v->n; k++) {
                if (isnan(first))
                    first = v->y[k];
                if (v->y[k] != first && !isnan(v->y[k]))
                    return true;
            }
        }
    return false;
}

size_t plot_choose(const plot *p, size_t *chosen, size_t *constant, size_t constants[PLOT_METRICS]) {
    size_t n = 0, order[PLOT_METRICS], all = 0;
    *constant = 0;
    if (p->only.n) {
        for (size_t i = 0; i < p->only.n && n < PLOT_METRICS; i++)
            chosen[n++] = plot_metric(p, p->only.items[i]);
        return n;
    }
    for (size_t i = 0; i < KNOWN; i++) {
        if (plot_metric(p, known[i].name) < PLOT_METRICS)
            order[all++] = plot_metric(p, known[i].name);
        for (size_t m = 0; i == 0 && m < p->n_metrics; m++) /* what each reward gave, behind their sum */
            if (is_part(p->metrics[m]))
                order[all++] = m;
    }
    for (size_t m = 0; m < p->n_metrics; m++)
        if (known_as(p->metrics[m]) == KNOWN && !is_part(p->metrics[m]))
            order[all++] = m;
    for (size_t i = 0; i < all; i++)
        if (moves(p, order[i]))
            chosen[n++] = order[i];
        else
            constants[(*constant)++] = order[i];
    return n;
}

double plot_mean(const plot_line *line, size_t metric, bool last) {
    if (metric >= PLOT_METRICS)
        return NAN;
    const plot_points *v = &line->points[metric][PLOT_TRAIN];
    size_t many = (v->n + 9) / 10, from = last ? v->n - many : 0, n = 0;
    double sum = 0;
    for (size_t k = from; k < from + many; k++)
        if (isfinite(v->y[k])) {
            sum += v->y[k];
            n++;
        }
    return n ? sum / (double)n : NAN;
}

/* ---- curves --------------------------------------------------------------------------------------------- */

enum { BUCKETS = 400, SMOOTHED_FROM = 20 };

/* Points that a chart can show: of many, the least and the greatest of each of BUCKETS parts, in their order. */
static size_t thin_out(const double *x, const double *y, size_t n, double *to_x, double *to_y) {
    size_t out = 0;
    for (size_t b = 0; b < BUCKETS; b++) {
        size_t begin = n * b / BUCKETS, end = n * (b + 1) / BUCKETS, low = begin, high = begin;
        for (size_t k = begin; k < end; k++) {
            low = isnan(y[low]) || y[k] < y[low] ? k : low;
            high = isnan(y[high]) || y[k] > y[high] ? k : high;
        }
        for (int i = 0; i < 2 && begin < end; i++) {
            size_t k = (low < high) == (i == 0) ? low : high;
            if (i == 1 && low == high)
                break;
            to_x[out] = x[k];
            to_y[out++] = y[k];
        }
    }
    return out;
}

/* The mean over the past with weights that fall by `smooth` a step; what is missing counts for nothing. */
static void smoothed(const double *y, size_t n, double smooth, double *out) {
    double sum = 0, weight = 0;
    for (size_t k = 0; k < n; k++) {
        if (isfinite(y[k])) {
            sum = smooth * sum + y[k];
            weight = smooth * weight + 1;
        }
        out[k] = isfinite(y[k]) ? sum / weight : NAN;
    }
}

/* Two arrays of `n` numbers, one behind the other, for a curve. */
static bool make_curve(chart_curve *c, const double *x, const double *y, size_t n) {
    double *room = malloc((2 * (n > 2 * BUCKETS ? 2 * BUCKETS : n) + 1) * sizeof *room);
    if (!room)
        return false;
    if (n > 2 * BUCKETS) {
        c->n = thin_out(x, y, n, room, room + 2 * BUCKETS);
        c->y = room + 2 * BUCKETS;
    } else {
        memcpy(room, x, n * sizeof *x);
        memcpy(room + n, y, n * sizeof *y);
        c->n = n;
        c->y = room + n;
    }
    c->x = room;
    return true;
}

/* Up to three curves of a line: as it was, smoothed, and its validations. Returns false when out of memory. */
static bool line_curves(const plot *p, size_t number, size_t metric, chart_curve *curves, size_t *n) {
    const plot_line *line = p->lines[number];
    const plot_points *t = &line->points[metric][PLOT_TRAIN], *v = &line->points[metric][PLOT_VALIDATION];
    chart_curve any = {.number = number, .mark_x = NAN, .mark_y = NAN, .label = line->label};
    bool smooth = p->smooth > 0 && t->n >= SMOOTHED_FROM, good = true;
    if (t->n) {
        chart_curve *c = &curves[(*n)++];
        *c = any;
        c->kind = smooth ? CHART_FAINT : CHART_LINE;
        good = make_curve(c, t->x, t->y, t->n);
    }
    if (good && smooth) {
        double *y = malloc(t->n * sizeof *y);
        chart_curve *c = &curves[(*n)++];
        *c = any;
        if ((good = y != NULL)) {
            smoothed(t->y, t->n, p->smooth, y);
            good = make_curve(c, t->x, y, t->n);
        }
        free(y);
    }
    /* Validations have other prompts, and as many as there are. */
    if (good && v->n && strcmp(p->metrics[metric], "tokens") != 0) {
        chart_curve *c = &curves[(*n)++];
        *c = any;
        c->kind = CHART_DOTS;
        if (line->best_step && line->best_metric == metric) {
            c->mark_x = (double)line->best_step;
            c->mark_y = line->best;
        }
        good = make_curve(c, v->x, v->y, v->n);
    }
    return good;
}

psoup_status plot_chart(FILE *f, const plot *p, size_t metric, bool title, double width, double height, double left,
                        double top, psoup_error *error) {
    chart c = {.width = width, .height = height, .title = title ? plot_title(p->metrics[metric]) : NULL};
    chart_curve *curves = calloc(3 * p->n + 1, sizeof *curves);
    bool good = curves != NULL;
    c.x0 = INFINITY;
    for (size_t i = 0; good && i < p->n; i++) {
        size_t first = c.n;
        good = line_curves(p, i, metric, curves, &c.n);
        for (size_t k = first; good && k < c.n; k++) {
            c.x0 = fmin(c.x0, curves[k].x[0]);
            c.x1 = fmax(c.x1, curves[k].x[curves[k].n - 1]);
        }
    }
    if (good && c.n) {
        c.curves = curves;
        chart_draw(f, &c, left, top);
    }
    for (size_t i = 0; curves && i < c.n; i++)
        free((void *)curves[i].x);
    free(curves);
    return good ? PSOUP_OK : cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
}

/* ---- the picture ----------------------------------------------------------------------------------------- */

enum { WIDTH = 380, HEIGHT = 236, GAP = 14, MARGIN = 20, HEAD = 30, LEGEND = 20 };

/* About how wide a text of 12 px is; letters outside ASCII count as others. */
static double text_width(const char *text) {
    double width = 0;
    for (; *text; text++)
        width += ((unsigned char)*text & 0xC0) != 0x80 ? 6.7 : 0;
    return width;
}

/* The legend, from y on; without a file only measured. Returns its height. */
static double legend(FILE *f, const plot *p, double y, double width) {
    double x = MARGIN + 6, first = y;
    for (size_t i = 0; i < p->n; i++) {
        double needs = 26 + text_width(p->lines[i]->label) + 18;
        if (x + needs > width - MARGIN && x > MARGIN + 6) {
            x = MARGIN + 6;
            y += LEGEND;
        }
        if (f) {
            chart_swatch(f, i, x, y + 10);
            fprintf(f, "<text class=\"ax\" style=\"font-size:12px\" x=\"%.1f\" y=\"%.1f\">", x + 24, y + 14);
            chart_text(f, p->lines[i]->label);
            fputs("</text>", f);
        }
        x += needs;
    }
    return y + LEGEND - first;
}

static void heading(FILE *f, const plot *p) {
    fprintf(f, "<text class=\"ti\" style=\"font-size:16px\" x=\"%d\" y=\"%d\">", MARGIN + 6, MARGIN + 12);
    for (size_t i = 0; i < p->n_runs && i < 6; i++) {
        fputs(i ? ", " : "", f);
        chart_text(f, p->runs[i].label);
    }
    fputs(p->n_runs > 6 ? ", …" : "", f);
    fputs("</text>", f);
}

psoup_status plot_svg(FILE *f, const plot *p, psoup_error *error) {
    size_t chosen[PLOT_METRICS], constants[PLOT_METRICS], constant;
    size_t n = plot_choose(p, chosen, &constant, constants), columns = n < 3 ? n : 3;
    if (n == 0)
        return cli_error(error, PSOUP_ERROR_FORMAT, "no metric changes: there is nothing to draw");
    double width = 2 * MARGIN + (double)columns * (WIDTH + GAP) - GAP, top = MARGIN + HEAD;
    double rows = (double)((n + columns - 1) / columns);
    top += legend(NULL, p, top, width) + 8;
    double height = top + rows * (HEIGHT + GAP) - GAP + 34;
    fprintf(f,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" height=\"%.0f\">\n"
            "<style>",
            width, height, width, height);
    chart_style(f);
    fputs("</style>\n<rect class=\"bg\" width=\"100%\" height=\"100%\"/>\n", f);
    heading(f, p);
    legend(f, p, MARGIN + HEAD, width);
    for (size_t i = 0; i < n; i++) {
        psoup_status status = plot_chart(f, p, chosen[i], true, WIDTH, HEIGHT,
                                         MARGIN + (double)(i % columns) * (WIDTH + GAP),
                                         top + (double)(i / columns) * (HEIGHT + GAP), error);
        if (status != PSOUP_OK)
            return status;
    }
    fprintf(f, "<text class=\"ax\" x=\"%d\" y=\"%.0f\">by step; dots: validation, ring: its best", MARGIN + 6,
            height - 14);
    if (p->smooth > 0)
        fprintf(f, "; pale: as it was, strong: smoothed by %g", p->smooth);
    fputs("</text>\n</svg>\n", f);
    return PSOUP_OK;
}
