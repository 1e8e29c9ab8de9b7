/* The HTML page around the charts: one file that needs nothing from elsewhere, is read without scripts too, and is
 * well-formed XML. */
#include "plot.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char style[] =
    ":root{--ink:#1d2433;--soft:#667085;--line:#e4e7ec;--paper:#fff;--ground:#f6f7f9;--bad:#c0362c}"
    "@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#2b3240;--paper:#171c26;"
    "--ground:#0f131a;--bad:#ff8479}}"
    "*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);"
    "font:15px/1.5 system-ui,Helvetica,Arial,sans-serif}main{max-width:1320px;margin:0 auto;padding:28px 20px 70px}"
    "h1{font-size:26px;line-height:1.2;margin:0 0 2px;overflow-wrap:anywhere}h2{font-size:18px;margin:26px 0 8px}"
    ".soft{color:var(--soft)}.bad{color:var(--bad)}p{margin:4px 0}"
    ".card,figure,details{background:var(--paper);border:1px solid var(--line);border-radius:10px}"
    ".card{padding:6px 14px;overflow-x:auto}"
    "table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums;width:100%}"
    "th,td{padding:6px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}"
    "tr:last-child td{border-bottom:0}th{color:var(--soft);font-weight:600}"
    "th:first-child,td:first-child{text-align:left}"
    ".legend{position:sticky;top:0;background:var(--ground);padding:8px 0;display:flex;flex-wrap:wrap;gap:6px;"
    "z-index:1}"
    ".legend button{font:inherit;font-size:13px;color:inherit;background:var(--paper);border:1px solid var(--line);"
    "border-radius:99px;padding:2px 12px 2px 8px;display:flex;align-items:center;gap:6px;cursor:pointer}"
    ".legend button.off{opacity:.4}"
    ".grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(360px,1fr));gap:14px}"
    "figure{margin:0;padding:10px 6px 4px;position:relative}figcaption{padding:0 10px;font-weight:600;font-size:14px}"
    "figcaption small{font-weight:400;color:var(--soft)}figure>svg{display:block;width:100%;height:auto}"
    ".tip{position:absolute;pointer-events:none;background:var(--paper);border:1px solid var(--line);border-radius:6px;"
    "padding:4px 8px;font-size:12px;white-space:pre;box-shadow:0 2px 8px #0003;z-index:2}"
    ".hair{stroke:var(--soft);stroke-dasharray:2 3}"
    "details{padding:10px 14px;margin:8px 0}summary{cursor:pointer;font-weight:600}"
    "td.said{white-space:pre-wrap;overflow-wrap:anywhere;text-align:left;width:100%}"
    "pre{font-size:12.5px;overflow-x:auto}td.best{font-weight:600}";

/* Hints and the legend's buttons; written without &, < and ]]> so that the page stays XML. */
static const char script[] =
    "'use strict';\n"
    "const off = new Set();\n"
    "for (const b of document.querySelectorAll('.legend button')) b.onclick = () => {\n"
    "  const n = b.dataset.n;\n"
    "  if (!off.delete(n)) off.add(n);\n"
    "  b.classList.toggle('off', off.has(n));\n"
    "  for (const e of document.querySelectorAll('.n' + n)) e.style.display = off.has(n) ? 'none' : '';\n"
    "};\n"
    "const say = v => Math.abs(v) >= 1e5 || (v !== 0 ? 1e-3 >= Math.abs(v) : false) ? v.toExponential(2) : "
    "String(+v.toPrecision(4));\n"
    "for (const figure of document.querySelectorAll('figure')) {\n"
    "  const plot = figure.querySelector('svg.plot');\n"
    "  const [x0, x1, y0, y1] = plot.dataset.range.split(' ').map(Number);\n"
    "  const w = plot.viewBox.baseVal.width - 8, h = plot.viewBox.baseVal.height - 8;\n"
    "  const lines = [...plot.querySelectorAll('polyline.li, polyline.do')].map(e => ({e,\n"
    "    at: e.getAttribute('points').split(' ').map(p => p.split(',').map(Number))}));\n"
    "  const tip = document.createElement('div'), hair = document.createElementNS(plot.namespaceURI, 'line');\n"
    "  tip.className = 'tip'; tip.hidden = true; figure.append(tip);\n"
    "  hair.setAttribute('class', 'hair'); hair.style.display = 'none'; plot.append(hair);\n"
    "  figure.onmouseleave = () => { tip.hidden = true; hair.style.display = 'none'; };\n"
    "  figure.onmousemove = event => {\n"
    "    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(plot.getScreenCTM().inverse());\n"
    "    const x = Math.min(Math.max(point.x, 0), w);\n"
    "    const seen = [];\n"
    "    for (const {e, at} of lines) {\n"
    "      if (e.style.display === 'none') continue;\n"
    "      const p = at.reduce((a, b) => Math.abs(b[0] - x) >= Math.abs(a[0] - x) ? a : b);\n"
    "      if (Math.abs(p[0] - x) > w / 12) continue;\n"
    "      const step = Math.round(x1 > x0 ? x0 + p[0] / w * (x1 - x0) : x0);\n"
    "      seen.push([y1 - p[1] / h * (y1 - y0), e.dataset.label + (e.classList.contains('do') ? ', validation' : '') "
    "+ ' @ ' + step]);\n"
    "    }\n"
    "    seen.sort((a, b) => b[0] - a[0]);\n"
    "    tip.textContent = seen.map(s => say(s[0]).padEnd(9) + ' ' + s[1]).join('\\n');\n"
    "    tip.hidden = seen.length === 0;\n"
    "    for (const [k, v] of [['x1', x], ['x2', x], ['y1', 0], ['y2', h]]) hair.setAttribute(k, v);\n"
    "    hair.style.display = '';\n"
    "    const box = figure.getBoundingClientRect(), left = event.clientX - box.left;\n"
    "    tip.style.left = (left > box.width / 2 ? left - tip.offsetWidth - 14 : left + 14) + 'px';\n"
    "    tip.style.top = (event.clientY - box.top + 12) + 'px';\n"
    "  };\n"
    "}\n";

static void number(FILE *f, double value) {
    char text[32];
    chart_number(text, value);
    fputs(text, f);
}

/* ---- overview and notes ------------------------------------------------------------------------------------ */

/* The metric that says best what a line came to. */
static size_t main_metric(const plot *p, const plot_line *line) {
    static const char *const names[] = {"reward", "accuracy", "loss"};
    for (int i = 0; i < 3; i++) {
        size_t m = plot_metric(p, names[i]);
        if (m < PLOT_METRICS && line->points[m][PLOT_TRAIN].n)
            return m;
    }
    return PLOT_METRICS;
}

static void change_cell(FILE *f, const plot *p, const plot_line *line, const char *metric) {
    size_t m = plot_metric(p, metric);
    double first = plot_mean(line, m, false), last = plot_mean(line, m, true);
    fputs("<td>", f);
    if (isnan(first)) {
        fputs("–", f);
    } else {
        number(f, first);
        fputs(" → ", f);
        number(f, last);
    }
    fputs("</td>", f);
}

static void overview(FILE *f, const plot *p) {
    static const char *const more[] = {"kl", "kl_coefficient", "value_loss", "length", "grad_norm"};
    size_t n_more = sizeof more / sizeof *more;
    fputs("<h2>Overview</h2><div class=\"card\"><table><tr><th></th><th>steps</th><th>first tenth → last tenth</th>"
          "<th>best validation</th>",
          f);
    for (size_t k = 0; k < n_more; k++)
        if (plot_metric(p, more[k]) < PLOT_METRICS) {
            fputs("<th>", f);
            chart_text(f, plot_title(more[k]));
            fputs("</th>", f);
        }
    fputs("</tr>\n", f);
    for (size_t i = 0; i < p->n; i++) {
        const plot_line *line = p->lines[i];
        size_t metric = main_metric(p, line);
        fputs("<tr><td>", f);
        chart_text(f, line->label);
        fprintf(f, "</td><td>%lld of %lld</td>", (long long)line->step, (long long)line->total);
        if (metric < PLOT_METRICS)
            change_cell(f, p, line, p->metrics[metric]);
        else
            fputs("<td>–</td>", f);
        fputs("<td class=\"best\">", f);
        if (line->best_step) {
            chart_text(f, p->metrics[line->best_metric]);
            fputs(" ", f);
            number(f, line->best);
            fprintf(f, " at %lld", (long long)line->best_step);
        } else
            fputs("–", f);
        fputs("</td>", f);
        for (size_t k = 0; k < n_more; k++)
            if (plot_metric(p, more[k]) < PLOT_METRICS)
                change_cell(f, p, line, more[k]);
        fputs("</tr>\n", f);
    }
    fputs("</table></div>\n", f);
}

/* "3, 7, 12 and 40 more" of the steps where a predicate of the metric holds; returns how many there are. */
static size_t steps_where(FILE *f, const plot_points *v, bool missing) {
    size_t n = 0;
    for (size_t k = 0; k < v->n; k++) {
        if (missing ? !isnan(v->y[k]) : !(v->y[k] > 0))
            continue;
        if (f && n < 12)
            fprintf(f, "%s%.0f", n ? ", " : "", v->x[k]);
        n++;
    }
    if (f && n > 12)
        fprintf(f, " and %zu more", n - 12);
    return n;
}

static size_t note_steps(FILE *f, const plot *p, const plot_line *line, const char *text, size_t metric,
                         bool missing) {
    size_t n = 0;
    for (int phase = 0; phase < 2; phase++) {
        const plot_points *v = &line->points[metric][phase];
        if (!steps_where(NULL, v, missing))
            continue;
        n++;
        fputs("<p class=\"bad\">", f);
        chart_text(f, line->label);
        fprintf(f, ": %s", text);
        if (missing) {
            fputs(" ", f);
            chart_text(f, p->metrics[metric]);
        }
        fprintf(f, " at step%s ", phase ? " (validation)" : "");
        steps_where(f, v, missing);
        fputs("</p>\n", f);
    }
    return n;
}

/* What a reader should not overlook. */
static void notes(FILE *f, const plot *p, const size_t *constants, size_t constant) {
    size_t n = 0, skipped = plot_metric(p, "skipped"), warnings = plot_metric(p, "warnings");
    fputs("<h2>Notes</h2><div class=\"card\">", f);
    for (size_t i = 0; i < p->n; i++) {
        const plot_line *line = p->lines[i];
        if (line->step < line->total) {
            fputs("<p>", f);
            chart_text(f, line->label);
            fprintf(f, ": is at step %lld of %lld</p>\n", (long long)line->step, (long long)line->total);
            n++;
        }
        if (skipped < PLOT_METRICS)
            n += note_steps(f, p, line, "updates were skipped", skipped, false);
        if (warnings < PLOT_METRICS)
            n += note_steps(f, p, line, "there were warnings of a collapse", warnings, false);
        for (size_t m = 0; m < p->n_metrics; m++)
            n += note_steps(f, p, line, "no finite", m, true);
    }
    if (n == 0)
        fputs("<p>No update was skipped, nothing was warned of, and every number is finite.</p>\n", f);
    for (size_t k = 0; k < constant; k++) {
        double value = NAN;
        for (size_t i = 0; i < p->n && isnan(value); i++)
            for (int phase = 0; phase < 2 && isnan(value); phase++)
                if (p->lines[i]->points[constants[k]][phase].n)
                    value = p->lines[i]->points[constants[k]][phase].y[0];
        fputs(k ? ", " : "<p class=\"soft\">Never changed: ", f);
        chart_text(f, p->metrics[constants[k]]);
        fputs(" ", f);
        number(f, value);
    }
    fputs(constant ? "</p>" : "", f);
    fputs("</div>\n", f);
}

/* ---- charts ------------------------------------------------------------------------------------------------ */

static void legend(FILE *f, const plot *p) {
    fputs("<div class=\"legend\">", f);
    for (size_t i = 0; i < p->n; i++) {
        fprintf(f, "<button type=\"button\" data-n=\"%zu\"><svg width=\"18\" height=\"8\">", i);
        chart_swatch(f, i, 0, 4);
        fputs("</svg>", f);
        chart_text(f, p->lines[i]->label);
        fputs("</button>", f);
    }
    fputs("</div>\n", f);
}

static psoup_status charts(FILE *f, const plot *p, const size_t *chosen, size_t n, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    fputs("<div class=\"grid\">\n", f);
    for (size_t i = 0; status == PSOUP_OK && i < n; i++) {
        const char *name = p->metrics[chosen[i]], *about = plot_about(name);
        fputs("<figure><figcaption>", f);
        chart_text(f, plot_title(name));
        fputs(" <small>", f);
        if (about)
            chart_text(f, about);
        fputs("</small></figcaption><svg viewBox=\"0 0 420 220\">", f);
        status = plot_chart(f, p, chosen[i], false, 420, 220, 0, 0, error);
        fputs("</svg></figure>\n", f);
    }
    fputs("</div>\n", f);
    return status;
}

/* ---- samples ------------------------------------------------------------------------------------------------ */

/* A text, or ids with spaces between. */
static void said(FILE *f, const psoup_json *value) {
    const char *text = psoup_json_string(value, NULL);
    if (text)
        chart_text(f, text);
    for (size_t i = 0; !text && i < psoup_json_size(value); i++)
        fprintf(f, "%s%lld", i ? " " : "", (long long)psoup_json_integer(psoup_json_at(value, i), -1));
}

static bool same_prompt(const plot_sample *a, const plot_sample *b) {
    if (a->source != b->source || strcmp(a->policy, b->policy) != 0)
        return false;
    char *x = psoup_json_text(psoup_json_get(a->row, "prompt"), 0);
    char *y = psoup_json_text(psoup_json_get(b->row, "prompt"), 0);
    bool same = x && y && !strcmp(x, y) &&
                psoup_json_integer(psoup_json_get(a->row, "id"), 0) ==
                    psoup_json_integer(psoup_json_get(b->row, "id"), 0);
    psoup_text_free(x);
    psoup_text_free(y);
    return same;
}

/* What one policy said to one prompt, step by step; of many steps ten, spread evenly. */
static void answers(FILE *f, const plot *p, const size_t *at, size_t n) {
    enum { SHOWN = 10 };
    fputs("<table><tr><th>step</th><th>score</th><th></th></tr>\n", f);
    for (size_t i = 0; i < n; i++) {
        if (n > SHOWN && i != (i * (SHOWN - 1) / (n - 1) * (n - 1) + SHOWN - 2) / (SHOWN - 1) && i != n - 1)
            continue;
        const plot_sample *s = &p->samples[at[i]];
        fprintf(f, "<tr><td>%lld</td><td>", (long long)s->step);
        number(f, psoup_json_real(psoup_json_get(s->row, "score"), NAN));
        fputs("</td><td class=\"said\">", f);
        said(f, psoup_json_get(s->row, "response"));
        fputs("</td></tr>\n", f);
    }
    fputs("</table>", f);
}

static psoup_status samples(FILE *f, const plot *p, psoup_error *error) {
    bool *done = calloc(p->n_samples + 1, sizeof *done);
    size_t *same = calloc(p->n_samples + 1, sizeof *same), groups = 0;
    if (done && same && p->n_samples)
        fputs("<h2>What they say</h2><p class=\"soft\">The same prompts and random words each time: what changes is "
              "the policy.</p>\n",
              f);
    for (size_t i = 0; done && same && i < p->n_samples; i++) {
        size_t n = 0;
        if (done[i])
            continue;
        for (size_t k = i; k < p->n_samples; k++)
            if (!done[k] && same_prompt(&p->samples[i], &p->samples[k])) {
                done[k] = true;
                same[n++] = k;
            }
        fprintf(f, "<details%s><summary>", groups++ < 4 ? " open=\"open\"" : "");
        chart_text(f, p->samples[i].policy);
        fputs(": ", f);
        said(f, psoup_json_get(p->samples[i].row, "prompt"));
        char *mix = psoup_json_text(psoup_json_get(p->samples[i].row, "mix"), 0);
        if (mix && psoup_json_get(p->samples[i].row, "mix")) {
            fputs(" <span class=\"soft\">", f);
            chart_text(f, mix);
            fputs("</span>", f);
        }
        psoup_text_free(mix);
        fputs("</summary>\n", f);
        answers(f, p, same, n);
        fputs("</details>\n", f);
    }
    bool good = done && same;
    free(done);
    free(same);
    return good ? PSOUP_OK : cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
}

/* ---- the page ----------------------------------------------------------------------------------------------- */

static void configurations(FILE *f, const plot *p) {
    bool any = false;
    for (size_t i = 0; i < p->n_runs; i++) {
        char *text = p->runs[i].config ? psoup_json_text(p->runs[i].config, 2) : NULL;
        if (!text)
            continue;
        fputs(any ? "" : "<h2>Configuration</h2>\n", f);
        any = true;
        fputs("<details><summary>", f);
        chart_text(f, p->runs[i].label);
        fputs("</summary><pre>", f);
        chart_text(f, text);
        fputs("</pre></details>\n", f);
        psoup_text_free(text);
    }
}

psoup_status plot_html(FILE *f, const plot *p, psoup_error *error) {
    size_t chosen[PLOT_METRICS], constants[PLOT_METRICS], constant;
    size_t n = plot_choose(p, chosen, &constant, constants);
    fputs("<!DOCTYPE html>\n<html lang=\"en\" xmlns=\"http://www.w3.org/1999/xhtml\"><head><meta charset=\"utf-8\"/>"
          "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"/><title>",
          f);
    for (size_t i = 0; i < p->n_runs; i++) {
        fputs(i ? ", " : "", f);
        chart_text(f, p->runs[i].label);
    }
    fputs("</title><style>", f);
    chart_style(f);
    fputs(style, f);
    fputs("</style></head><body><main><h1>", f);
    for (size_t i = 0; i < p->n_runs; i++) {
        fputs(i ? ", " : "", f);
        chart_text(f, p->runs[i].label);
    }
    fprintf(f, "</h1><p class=\"soft\">psoup %s; %zu run%s, %zu trained</p>\n", psoup_version(), p->n_runs,
            p->n_runs == 1 ? "" : "s", p->n);
    overview(f, p);
    fputs("<h2>Curves</h2><p class=\"soft\">By step. Dots are validations, a ring is the best of them", f);
    if (p->smooth > 0)
        fprintf(f, "; a pale line is what was reported, a strong one its mean over the past, smoothed by %g",
                p->smooth);
    fputs(".</p>\n", f);
    legend(f, p);
    psoup_status status = charts(f, p, chosen, n, error);
    if (status == PSOUP_OK)
        status = samples(f, p, error);
    notes(f, p, constants, constant);
    configurations(f, p);
    fprintf(f, "</main><script>%s</script></body></html>\n", script);
    return status;
}
