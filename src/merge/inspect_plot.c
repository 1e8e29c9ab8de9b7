/* An inspection as a picture: SVG with two heat maps of cosines, and the soup's energy by rank.
 *
 * Blue is against each other, white at right angles, red along each other. The scale ends at the largest
 * cosine between two adapters, rounded up, so that small ones show. */
#include "blend/blend.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { LEFT = 40, TOP = 96, GAP = 72, LABEL = 150 };

typedef struct plot {
    psoup__buffer svg;
    const psoup_json *inspection;
    const char *const *names;
    size_t n;
    double limit; /* of the colours */
} plot;

static void text(plot *p, double x, double y, const char *style, const char *words) {
    psoup__buffer_print(&p->svg, "<text x=\"%.1f\" y=\"%.1f\" %s>", x, y, style);
    for (; *words; words++) {
        if (*words == '<')
            psoup__buffer_append(&p->svg, "&lt;", 4);
        else if (*words == '&')
            psoup__buffer_append(&p->svg, "&amp;", 5);
        else if ((unsigned char)*words >= ' ')
            psoup__buffer_append(&p->svg, words, 1);
    }
    psoup__buffer_print(&p->svg, "</text>\n");
}

/* The name of an adapter: the last part of its path where the caller gives none. */
static const char *name_of(const plot *p, size_t i) {
    if (p->names != NULL && p->names[i] != NULL)
        return p->names[i];
    const psoup_json *one = psoup_json_at(psoup_json_get(p->inspection, "adapters"), i);
    const char *path = psoup_json_string(psoup_json_get(one, "path"), "?"), *slash = strrchr(path, '/');
    return slash != NULL && slash[1] != '\0' ? slash + 1 : path;
}

/* From blue by white to red as x goes from −1 to 1. */
static void colour(double x, int rgb[3]) {
    static const double cold[3] = {33, 102, 172}, warm[3] = {178, 24, 43}, none = 247;
    double t = fmin(fabs(x), 1);
    for (int k = 0; k < 3; k++)
        rgb[k] = (int)lround(none + ((x < 0 ? cold : warm)[k] - none) * t);
}

static void cell(plot *p, double x, double y, double w, double h, const psoup_json *value, bool number) {
    int rgb[3] = {228, 228, 228};
    char digits[32];
    if (psoup_json_kind(value) != PSOUP_JSON_NULL)
        colour(psoup_json_real(value, 0) / p->limit, rgb);
    psoup__buffer_print(&p->svg,
                        "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" "
                        "fill=\"#%02x%02x%02x\"/>\n",
                        x, y, w, h, (unsigned)rgb[0], (unsigned)rgb[1], (unsigned)rgb[2]);
    if (!number || psoup_json_kind(value) == PSOUP_JSON_NULL)
        return;
    double v = psoup_json_real(value, 0);
    snprintf(digits, sizeof digits, "%s%.2f", v < -0.005 ? "−" : "", fabs(v));
    text(p, x + w / 2, y + h / 2 + 4,
         fabs(v) > 0.6 * p->limit ? "class=\"n\" fill=\"#fff\"" : "class=\"n\" fill=\"#222\"", digits);
}

/* Adapters × adapters from (x, y) on; the norm on the diagonal. Returns its height. */
static double adapters(plot *p, double x, double y, double side) {
    const psoup_json *cosine = psoup_json_get(p->inspection, "cosine");
    const psoup_json *norms = psoup_json_get(p->inspection, "norms");
    char label[64];
    for (size_t i = 0; i < p->n; i++) {
        const double row = y + (double)i * side;
        text(p, x - 8, row + side / 2 + 4, "class=\"l\" text-anchor=\"end\"", name_of(p, i));
        snprintf(label, sizeof label, "transform=\"rotate(-35 %.1f %.1f)\" class=\"l\"",
                 x + ((double)i + 0.5) * side, y - 6);
        text(p, x + ((double)i + 0.5) * side, y - 6, label, name_of(p, i));
        for (size_t j = 0; j < p->n; j++) {
            const double column = x + (double)j * side;
            if (i != j) {
                cell(p, column, row, side - 1, side - 1, psoup_json_at(psoup_json_at(cosine, i), j),
                     side >= 36);
                continue;
            }
            psoup__buffer_print(&p->svg,
                                "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" "
                                "fill=\"#fff\" stroke=\"#bbb\"/>\n",
                                column + 0.5, row + 0.5, side - 2, side - 2);
            snprintf(label, sizeof label, "%.3g", psoup_json_real(psoup_json_at(norms, i), 0));
            if (side >= 36)
                text(p, column + side / 2, row + side / 2 + 4, "class=\"n\" fill=\"#777\"", label);
        }
    }
    return (double)p->n * side;
}

/* The scale of the colours. */
static void scale(plot *p, double x, double y, double width) {
    char label[32];
    for (int k = 0; k < 60; k++) {
        int rgb[3];
        colour((k - 29.5) / 29.5, rgb);
        psoup__buffer_print(&p->svg,
                            "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"10\" "
                            "fill=\"#%02x%02x%02x\"/>\n",
                            x + width * k / 60, y, width / 60 + 0.3, (unsigned)rgb[0], (unsigned)rgb[1],
                            (unsigned)rgb[2]);
    }
    snprintf(label, sizeof label, "−%g", p->limit);
    text(p, x, y + 24, "class=\"s\"", label);
    text(p, x + width / 2, y + 24, "class=\"s\" text-anchor=\"middle\"", "cosine 0");
    snprintf(label, sizeof label, "%g", p->limit);
    text(p, x + width, y + 24, "class=\"s\" text-anchor=\"end\"", label);
}

/* The energy that svd(r) keeps, over log₂ r. */
static void energy(plot *p, double x, double y, double width, double height) {
    const psoup_json *svd = psoup_json_get(psoup_json_get(p->inspection, "soup"), "svd");
    const size_t n = psoup_json_size(svd);
    char label[64];
    text(p, x, y - 14, "class=\"h\"", "Energy of the soup that svd(r) keeps");
    for (int k = 0; k <= 4; k++) {
        double at = y + height * (1 - k / 4.0);
        psoup__buffer_print(&p->svg, "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" "
                            "stroke=\"#ddd\"/>\n", x, at, x + width, at);
        snprintf(label, sizeof label, "%d %%", 25 * k);
        text(p, x - 6, at + 4, "class=\"s\" text-anchor=\"end\"", label);
    }
    if (n == 0) {
        text(p, x + width / 2, y + height / 2, "class=\"s\" text-anchor=\"middle\"", "not computed");
        return;
    }
    const double last = log2((double)psoup_json_integer(psoup_json_get(psoup_json_at(svd, n - 1), "rank"), 1));
    for (int line = 0; line < 2; line++) { /* the worst module, then all */
        psoup__buffer_print(&p->svg, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"2\"%s points=\"",
                            line == 0 ? "#aaa" : "#b2182b", line == 0 ? " stroke-dasharray=\"4 3\"" : "");
        for (size_t k = 0; k < n; k++) {
            const psoup_json *one = psoup_json_at(svd, k);
            double rank = log2((double)psoup_json_integer(psoup_json_get(one, "rank"), 1));
            double kept = psoup_json_real(psoup_json_get(one, line == 0 ? "least_energy" : "energy"), 0);
            psoup__buffer_print(&p->svg, "%.1f,%.1f ", x + (last > 0 ? width * rank / last : 0),
                                y + height * (1 - kept));
        }
        psoup__buffer_print(&p->svg, "\"/>\n");
    }
    double before = -100;
    for (size_t k = 0; k < n; k++) {
        int64_t rank = psoup_json_integer(psoup_json_get(psoup_json_at(svd, k), "rank"), 1);
        double at = x + (last > 0 ? width * log2((double)rank) / last : 0);
        if (at - before < 20)
            continue;
        before = at;
        snprintf(label, sizeof label, "%lld", (long long)rank);
        text(p, at, y + height + 16, "class=\"s\" text-anchor=\"middle\"", label);
    }
    text(p, x + width, y + height + 34, "class=\"s\" text-anchor=\"end\"",
         "rank r; solid: all modules, dashed: the worst one");
}

/* Pairs × layers. Returns its height. */
static double layers(plot *p, double x, double y, double width, double row) {
    const psoup_json *all = psoup_json_get(p->inspection, "layers");
    const size_t count = psoup_json_size(all);
    const double step = count > 0 ? fmin(width / (double)count, 34) : 0;
    char label[400];
    size_t pair = 0;
    for (size_t i = 0; i < p->n; i++)
        for (size_t j = i + 1; j < p->n; j++, pair++) {
            const double at = y + (double)pair * row;
            snprintf(label, sizeof label, "%.180s · %.180s", name_of(p, i), name_of(p, j));
            text(p, x - 8, at + row / 2 + 4, "class=\"s\" text-anchor=\"end\"", label);
            for (size_t k = 0; k < count; k++)
                cell(p, x + (double)k * step, at, step - 0.6, row - 0.6,
                     psoup_json_at(psoup_json_at(psoup_json_get(psoup_json_at(all, k), "cosine"), i), j),
                     false);
        }
    for (size_t k = 0; k < count; k++) {
        const psoup_json *layer = psoup_json_get(psoup_json_at(all, k), "layer");
        if (count > 20 && k % 4 != 0)
            continue;
        if (psoup_json_kind(layer) == PSOUP_JSON_NULL)
            snprintf(label, sizeof label, "–");
        else
            snprintf(label, sizeof label, "%lld", (long long)psoup_json_integer(layer, 0));
        text(p, x + ((double)k + 0.5) * step, y + (double)pair * row + 14,
             "class=\"s\" text-anchor=\"middle\"", label);
    }
    return (double)pair * row + 20;
}

/* The largest cosine between two adapters, of all modules or of a layer, rounded up to 1, 2 or 5 times a
 * power of ten. */
static double limit_of(const plot *p) {
    const psoup_json *all = psoup_json_get(p->inspection, "layers");
    double largest = 0;
    for (size_t k = 0; k <= psoup_json_size(all); k++) {
        const psoup_json *from = k == 0 ? p->inspection : psoup_json_at(all, k - 1);
        for (size_t i = 0; i < p->n; i++)
            for (size_t j = 0; j < i; j++)
                largest = fmax(largest, fabs(psoup_json_real(
                                            psoup_json_at(psoup_json_at(psoup_json_get(from, "cosine"), i), j),
                                            0)));
    }
    static const double steps[] = {0.05, 0.1, 0.2, 0.5};
    for (int k = 0; k < 4; k++)
        if (largest <= steps[k])
            return steps[k];
    return 1;
}

psoup_status psoup_merge_inspect_plot(psoup_context *context, const psoup_json *inspection,
                                      const char *const *names, const char *path, psoup_error *error) {
    psoup_status status;
    psoup__writer *writer = NULL;
    char label[160];
    if (context == NULL || path == NULL || psoup_json_size(psoup_json_get(inspection, "cosine")) == 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merge_inspect_plot: expected a context, an inspection and a path");
    plot p = {.svg = {.context = context}, .inspection = inspection, .names = names};
    p.n = psoup_json_size(psoup_json_get(inspection, "cosine"));
    p.limit = limit_of(&p);
    const size_t pairs = p.n * (p.n - 1) / 2;
    const double side = p.n <= 12 ? 44 : p.n <= 40 ? 528 / (double)p.n : 13;
    const double row = pairs <= 40 ? 16 : 8, left = LEFT + LABEL, map = side * (double)p.n;
    const double curve = fmax(map, 200), width = left + map + GAP + 300 + LEFT;
    const double strip = width - left - 140 - LEFT;
    const double second = TOP + curve + 104, height = second + (double)pairs * row + 60;
    psoup__buffer_print(&p.svg,
                        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" "
                        "height=\"%.0f\" font-family=\"Helvetica, Arial, sans-serif\">\n"
                        "<style>.t{font-size:18px;font-weight:bold}.h{font-size:13px;font-weight:bold}"
                        ".l{font-size:12px}.n{font-size:11px;text-anchor:middle}.s{font-size:10.5px;"
                        "fill:#444}</style>\n<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n",
                        width, height, width, height);
    snprintf(label, sizeof label, "%zu adapters, %zu modules: cosines of their changes", p.n,
             psoup_json_size(psoup_json_get(inspection, "modules")));
    text(&p, LEFT, 32, "class=\"t\"", label);
    adapters(&p, left, TOP, side);
    text(&p, left, TOP + map + 18, "class=\"s\"", "on the diagonal: ‖ΔW‖ over all modules");
    scale(&p, left, TOP + map + 30, map > 160 ? map : 160);
    energy(&p, left + map + GAP, TOP, 300, fmin(curve - 30, 220));
    text(&p, LEFT, second - 16, "class=\"h\"", "Pairs by layer");
    layers(&p, left + 140, second, strip, row);
    psoup__buffer_print(&p.svg, "</svg>\n");
    if (p.svg.failed) {
        status = psoup__out_of_memory(error, 0);
        goto fail;
    }
    PSOUP__TRY(psoup__writer_create(context, path, &writer, error));
    PSOUP__TRY(psoup__writer_write(writer, p.svg.data, p.svg.length, error));
    PSOUP__TRY(psoup__writer_commit(writer, error));
fail:
    psoup__writer_free(writer);
    psoup__buffer_free(&p.svg);
    return status;
}
