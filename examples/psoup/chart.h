/* Charts as SVG: curves over steps, with axes. Colours are classes that chart_style defines for light and dark, since
 * not every viewer of SVG knows variables. Text and attributes are escaped: what is written is well-formed XML. */
#ifndef CHART_H
#define CHART_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

enum { CHART_COLOURS = 8 };

typedef enum chart_kind {
    CHART_LINE,
    CHART_FAINT, /* behind the others; what leaves the range of those is cut off */
    CHART_DOTS   /* few values: a thin line with a dot at each */
} chart_kind;

typedef struct chart_curve {
    const double *x, *y; /* [n]; y is NaN where there is a gap */
    size_t n;
    size_t number; /* of its colour and dashes, and of class "nNUMBER", by which a page can hide it */
    chart_kind kind;
    double mark_x, mark_y; /* a ring around this point; NaN: none */
    const char *label;     /* for a page's hints */
} chart_curve;

typedef struct chart {
    const char *title; /* NULL: none */
    const chart_curve *curves;
    size_t n;
    double x0, x1; /* range of x */
    double width, height;
} chart;

/* The rules of the classes, for a <style> of SVG or HTML. */
void chart_style(FILE *f);
/* One chart in a <g> at (left, top). */
void chart_draw(FILE *f, const chart *c, double left, double top);
/* A short stroke with the colour and dashes of curve `number`, from (x, y) to the right. */
void chart_swatch(FILE *f, size_t number, double x, double y);
/* The text with <, >, & and quotes escaped, and U+FFFD for what XML cannot hold; it must be UTF-8. */
void chart_text(FILE *f, const char *text);
/* A number as people read it: 1.23, 0.0012, 12k, −3e-05. */
void chart_number(char out[32], double value);

#endif
