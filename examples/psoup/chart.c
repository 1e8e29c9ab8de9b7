#include "chart.h"

#include <math.h>
#include <string.h>

enum { LEFT = 50, RIGHT = 12, TOP = 10, TITLE = 22, BOTTOM = 24 };

/* ---- text and numbers --------------------------------------------------------------------------------- */

void chart_text(FILE *f, const char *text) {
    for (; *text; text++) {
        unsigned char c = (unsigned char)*text;
        bool no_character = !strncmp(text, "\xEF\xBF\xBE", 3) || !strncmp(text, "\xEF\xBF\xBF", 3);
        if (no_character)
            text += 2;
        if (c == '<')
            fputs("&lt;", f);
        else if (c == '>')
            fputs("&gt;", f);
        else if (c == '&')
            fputs("&amp;", f);
        else if (c == '"')
            fputs("&quot;", f);
        else if (no_character || (c < ' ' && c != '\n' && c != '\t'))
            fputs("\xEF\xBF\xBD", f);
        else
            fputc(c, f);
    }
}

void chart_number(char out[32], double value) {
    double size = fabs(value);
    const char *sign = value < 0 ? "−" : "";
    if (!isfinite(value))
        snprintf(out, 32, "–");
    else if (size >= 1e6)
        snprintf(out, 32, "%s%.3gM", sign, size / 1e6);
    else if (size >= 1e4)
        snprintf(out, 32, "%s%.3gk", sign, size / 1e3);
    else if (size >= 100)
        snprintf(out, 32, "%s%.0f", sign, size);
    else
        snprintf(out, 32, "%s%.3g", sign, size);
}

/* 1, 2, 2.5 or 5 times a power of ten: at most `most` of them in the span. */
static double tick_step(double span, int most) {
    static const double steps[] = {1, 2, 2.5, 5, 10};
    double raw = span / most, power = pow(10, floor(log10(raw)));
    for (int i = 0; i < 5; i++)
        if (steps[i] * power >= raw * 0.999)
            return steps[i] * power;
    return 10 * power;
}

static void tick_label(FILE *f, double value, double step) {
    char text[32];
    int digits = step >= 1 ? 0 : (int)ceil(-log10(step) - 1e-9);
    if (fabs(step * pow(10, digits) - round(step * pow(10, digits))) > 1e-6)
        digits++; /* 0.25 */
    if (fabs(value) < step * 1e-6)
        value = 0;
    if (fabs(value) >= 1e4 || digits > 4)
        chart_number(text, value);
    else
        snprintf(text, sizeof text, "%s%.*f", value < 0 ? "−" : "", digits, fabs(value));
    fputs(text, f);
}

/* ---- colours ------------------------------------------------------------------------------------------ */

void chart_style(FILE *f) {
    /* Of similar lightness, and told apart by those who see no red or no green. */
    static const char *const light[CHART_COLOURS] = {"#2563eb", "#dd6b20", "#0f8a5f", "#b5179e",
                                                     "#0891b2", "#c0362c", "#7c3aed", "#8a6d1a"};
    static const char *const dark[CHART_COLOURS] = {"#7aa2ff", "#f6a667", "#4fc998", "#f08be0",
                                                    "#5ccbe6", "#ff8479", "#b79cff", "#d9bd62"};
    fputs("svg{font-family:system-ui,Helvetica,Arial,sans-serif}"
          ".bg{fill:#fff}.ax{fill:#667085;font-size:11px}.ti{fill:#1d2433;font-size:13px;font-weight:600}"
          ".gr{stroke:#e4e7ec}.li{fill:none;stroke-width:1.8;stroke-linejoin:round}"
          ".fa{fill:none;stroke-width:1;opacity:.28}.do{fill:none;stroke-width:1.2;opacity:.85}"
          ".ri{fill:none;stroke-width:1.8}",
          f);
    for (int i = 0; i < CHART_COLOURS; i++)
        fprintf(f, ".k%d{stroke:%s}.f%d{fill:%s}", i, light[i], i, light[i]);
    fputs("@media(prefers-color-scheme:dark){.bg{fill:#171c26}.ax{fill:#98a2b3}.ti{fill:#e6e9ef}"
          ".gr{stroke:#2b3240}",
          f);
    for (int i = 0; i < CHART_COLOURS; i++)
        fprintf(f, ".k%d{stroke:%s}.f%d{fill:%s}", i, dark[i], i, dark[i]);
    fputs("}", f);
}

/* More curves than colours: dashes tell them apart. */
static const char *dashes(size_t number) {
    static const char *const kinds[] = {"", " stroke-dasharray=\"6 3\"", " stroke-dasharray=\"2 2\"",
                                        " stroke-dasharray=\"8 2 2 2\""};
    return kinds[number / CHART_COLOURS % 4];
}

void chart_swatch(FILE *f, size_t number, double x, double y) {
    fprintf(f, "<line class=\"li k%zu\"%s x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/>",
            number % CHART_COLOURS, dashes(number), x, x + 18, y, y);
}

/* ---- a chart ------------------------------------------------------------------------------------------ */

typedef struct area {
    double x0, x1, y0, y1, width, height;
} area;

static double across(const area *a, double x) {
    return a->x1 > a->x0 ? (x - a->x0) / (a->x1 - a->x0) * a->width : a->width / 2;
}
static double down(const area *a, double y) { return (1 - (y - a->y0) / (a->y1 - a->y0)) * a->height; }

/* The range of y is that of the curves that are not faint. */
static void fit(area *a, const chart *c) {
    double low = INFINITY, high = -INFINITY;
    for (size_t i = 0; i < c->n; i++)
        for (size_t k = 0; k < c->curves[i].n && c->curves[i].kind != CHART_FAINT; k++)
            if (isfinite(c->curves[i].y[k])) {
                low = fmin(low, c->curves[i].y[k]);
                high = fmax(high, c->curves[i].y[k]);
            }
    if (low > high)
        low = high = 0;
    double room = high > low ? 0.06 * (high - low) : fabs(low) > 0 ? 0.1 * fabs(low) : 1;
    a->y0 = low - room;
    a->y1 = high + room;
    if (low >= 0 && a->y0 < 0)
        a->y0 = 0; /* what is never negative does not look so */
}

static void axes(FILE *f, const area *a) {
    double step = tick_step(a->y1 - a->y0, 5);
    for (double k = ceil(a->y0 / step); k * step <= a->y1; k++) {
        double y = down(a, k * step);
        fprintf(f, "<line class=\"gr\" x1=\"0\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/>", a->width, y, y);
        fprintf(f, "<text class=\"ax\" x=\"-6\" y=\"%.1f\" text-anchor=\"end\">", y + 4);
        tick_label(f, k * step, step);
        fputs("</text>", f);
    }
    step = fmax(tick_step(fmax(a->x1 - a->x0, 1), 6), 1);
    step = ceil(step);
    for (double k = ceil(a->x0 / step); k * step <= a->x1; k++) {
        double x = across(a, k * step);
        fprintf(f, "<text class=\"ax\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">", x, a->height + 16);
        tick_label(f, k * step, step);
        fputs("</text>", f);
    }
}

static void curve(FILE *f, const area *a, const chart_curve *c) {
    static const char *const classes[] = {[CHART_LINE] = "li", [CHART_FAINT] = "fa", [CHART_DOTS] = "do"};
    size_t colour = c->number % CHART_COLOURS;
    bool open = false;
    for (size_t i = 0; i <= c->n; i++) {
        bool gap = i == c->n || !isfinite(c->y[i]);
        if (open && gap) {
            fputs("\"/>", f);
            open = false;
        }
        if (gap)
            continue;
        if (!open) {
            fprintf(f, "<polyline class=\"%s k%zu n%zu\"%s data-label=\"", classes[c->kind], colour, c->number,
                    c->kind == CHART_FAINT ? "" : dashes(c->number));
            chart_text(f, c->label ? c->label : "");
            fputs("\" points=\"", f);
        }
        fprintf(f, "%s%.1f,%.1f", open ? " " : "", across(a, c->x[i]), down(a, c->y[i]));
        open = true;
    }
    for (size_t i = 0; c->kind == CHART_DOTS && c->n <= 80 && i < c->n; i++)
        if (isfinite(c->y[i]))
            fprintf(f, "<circle class=\"f%zu n%zu\" cx=\"%.1f\" cy=\"%.1f\" r=\"2.4\"/>", colour, c->number,
                    across(a, c->x[i]), down(a, c->y[i]));
    if (isfinite(c->mark_x) && isfinite(c->mark_y))
        fprintf(f, "<circle class=\"ri k%zu n%zu\" cx=\"%.1f\" cy=\"%.1f\" r=\"5.5\"/>", colour, c->number,
                across(a, c->mark_x), down(a, c->mark_y));
}

void chart_draw(FILE *f, const chart *c, double left, double top) {
    double head = TOP + (c->title ? TITLE : 0);
    area a = {.x0 = c->x0, .x1 = c->x1, .width = c->width - LEFT - RIGHT, .height = c->height - head - BOTTOM};
    fit(&a, c);
    fprintf(f, "<g transform=\"translate(%.1f %.1f)\">", left, top);
    if (c->title) {
        fprintf(f, "<text class=\"ti\" x=\"%d\" y=\"18\">", LEFT);
        chart_text(f, c->title);
        fputs("</text>", f);
    }
    fprintf(f, "<g transform=\"translate(%d %.1f)\">", LEFT, head);
    axes(f, &a);
    /* An <svg> cuts off what leaves it; a hair of room for lines on its edge. */
    fprintf(f,
            "<svg class=\"plot\" x=\"-4\" y=\"-4\" width=\"%.1f\" height=\"%.1f\" viewBox=\"-4 -4 %.1f %.1f\" "
            "data-range=\"%.10g %.10g %.10g %.10g\">",
            a.width + 8, a.height + 8, a.width + 8, a.height + 8, a.x0, a.x1, a.y0, a.y1);
    for (int kind = CHART_FAINT; kind >= CHART_LINE; kind--)
        for (size_t i = 0; i < c->n; i++)
            if ((int)c->curves[i].kind == kind)
                curve(f, &a, &c->curves[i]);
    for (size_t i = 0; i < c->n; i++)
        if (c->curves[i].kind == CHART_DOTS)
            curve(f, &a, &c->curves[i]);
    fputs("</svg></g></g>\n", f);
}
