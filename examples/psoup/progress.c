/* How far a command is: a bar, or a table of all who train, redrawn in place on a terminal. */
#include "launch.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

static int drawn; /* lines on the terminal that are wiped before other output; the cursor is on the last */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void cli_progress_end(void) {
    if (drawn > 1)
        fprintf(stderr, "\033[%dA", drawn - 1);
    if (drawn)
        fputs("\r\033[J", stderr);
    drawn = 0;
}

/* ---- a bar ------------------------------------------------------------------------------------------ */

enum { BAR = 24 };

static void fill_bar(char bar[BAR + 1], int64_t done, int64_t total) {
    int filled = total > 0 ? (int)(done * BAR / total) : 0;
    for (int i = 0; i < BAR; i++)
        bar[i] = i < filled ? '#' : '.';
    bar[BAR] = 0;
}

int cli_progress(void *user, const char *label, int64_t done, int64_t total) {
    (void)user;
    char bar[BAR + 1];
    if (!isatty(STDERR_FILENO))
        return 0;
    fill_bar(bar, done, total);
    cli_progress_end();
    fprintf(stderr, "%s [%s] %lld/%lld", label, bar, (long long)done, (long long)total);
    drawn = 1;
    if (done >= total)
        cli_progress_end();
    fflush(stderr);
    return 0;
}

/* ---- what is kept of those who train ---------------------------------------------------------------- */

/* What the table shows of the metrics there are, the most telling first. */
static const struct {
    const char *name, *title;
} shown[] = {{"reward", "reward"},           {"accuracy", "accuracy"},
             {"loss", "loss"},               {"kl", "kl"},
             {"kl_coefficient", "kl coeff"}, {"value_loss", "value loss"},
             {"policy_loss", "pol. loss"},   {"length", "length"},
             {"margin", "margin"},           {"grad_norm", "grad norm"},
             {"learning_rate", "rate"}};
enum { SHOWN = sizeof shown / sizeof *shown };

static double value_of(const psoup_step *step, const char *name) {
    for (size_t i = 0; i < step->n; i++)
        if (!strcmp(step->names[i], name))
            return step->values[i];
    return NAN;
}

static double time_of(const psoup_step *step, const char *name) {
    for (size_t i = 0; i < step->n_times; i++)
        if (!strcmp(step->time_names[i], name))
            return step->times[i];
    return NAN;
}

/* The row of a subject. Where its steps begin anew it is another training, and all rows are. */
static cli_trainee *row_of(cli_training *t, const psoup_step *step) {
    for (size_t i = 0; i < t->n; i++) {
        cli_trainee *r = &t->rows[i];
        if (strcmp(r->name, step->subject) != 0)
            continue;
        if (step->step >= r->step)
            return r;
        t->n = 0;
    }
    if (t->n && t->rows[0].total != step->total && t->rows[0].step == t->rows[0].total)
        t->n = 0;
    if (t->n == CLI_TRAINEES)
        return NULL;
    if (t->n == 0)
        t->began = 0;
    cli_trainee *r = &t->rows[t->n++];
    *r = (cli_trainee){.best = NAN, .validation = NAN};
    snprintf(r->name, sizeof r->name, "%s", step->subject);
    for (int i = 0; i < SHOWN; i++)
        r->values[i] = NAN;
    return r;
}

static void note_training(cli_training *t, cli_trainee *r, const psoup_step *step) {
    for (int i = 0; i < SHOWN; i++)
        r->values[i] = value_of(step, shown[i].name);
    if (t->began == 0) {
        double seconds = time_of(step, "seconds");
        t->began = now() - (seconds > 0 ? seconds : 0);
        t->first = step->step - 1;
    }
    static const char *const phases[CLI_PHASES] = {"rollout_seconds", "score_seconds", "evaluate_seconds",
                                                   "update_seconds"};
    t->speed = time_of(step, "tokens_per_second");
    for (int k = 0; k < CLI_PHASES; k++)
        t->share[k] = time_of(step, phases[k]) / time_of(step, "seconds");
}

/* The highest reward or accuracy, or where there is neither the lowest loss, of the validations. */
static void note_validation(cli_trainee *r, const psoup_step *step) {
    double up = value_of(step, "reward"), value = isnan(up) ? value_of(step, "accuracy") : up;
    bool down = isnan(value);
    if (down)
        value = value_of(step, "loss");
    r->validation = value;
    if (isnan(r->best) || (down ? value < r->best : value > r->best)) {
        r->best = value;
        r->best_step = step->step;
    }
}

/* ---- the table ---------------------------------------------------------------------------------------- */

/* Lines that fit the terminal. */
typedef struct page {
    char text[16384];
    size_t used, line; /* line: where the last one begins */
    int lines, columns, rows;
} page;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static void add(page *p, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(p->text + p->used, sizeof p->text - p->used, format, args);
    va_end(args);
    if (n > 0)
        p->used += (size_t)n < sizeof p->text - p->used ? (size_t)n : sizeof p->text - p->used - 1;
}

/* Ends a line, cut where the terminal's would wrap. */
static void end_line(page *p) {
    int column = 0;
    size_t at = p->line;
    for (; at < p->used; at++) {
        bool begins = ((unsigned char)p->text[at] & 0xC0) != 0x80;
        if (begins && ++column >= p->columns)
            break;
    }
    p->used = at;
    add(p, "\033[K\n");
    p->line = p->used;
    p->lines++;
}

static void add_duration(page *p, double seconds) {
    long s = (long)(seconds + 0.5);
    if (s >= 3600)
        add(p, "%ld h %02ld min", s / 3600, s / 60 % 60);
    else if (s >= 60)
        add(p, "%ld min %02ld s", s / 60, s % 60);
    else
        add(p, "%ld s", s);
}

/* Of the one who has the most steps to go. */
static void furthest(const cli_training *t, int64_t *step, int64_t *total) {
    *step = *total = 0;
    for (size_t i = 0; i < t->n; i++) {
        *step = t->rows[i].step > *step ? t->rows[i].step : *step;
        *total = t->rows[i].total > *total ? t->rows[i].total : *total;
    }
}

static void add_speed(page *p, const cli_training *t, int64_t step, int64_t total) {
    static const char *const names[CLI_PHASES] = {"rollout", "score", "evaluate", "update"};
    if (t->speed >= 0)
        add(p, "  %.4g tokens/s", t->speed < 1e4 ? t->speed : round(t->speed));
    if (t->began > 0 && step > t->first && total > step) {
        add(p, "  ");
        add_duration(p, (now() - t->began) * (double)(total - step) / (double)(step - t->first));
        add(p, " left");
    }
    for (int k = 0; k < CLI_PHASES; k++)
        if (t->share[k] >= 0)
            add(p, "%s%s %.0f %%", k ? ", " : "  ", names[k], 100 * t->share[k]);
}

static bool has(const cli_training *t, int metric) {
    for (size_t i = 0; i < t->n; i++)
        if (!isnan(t->rows[i].values[metric]))
            return true;
    return false;
}

static void lay_out(page *p, const cli_training *t) {
    char bar[BAR + 1];
    int64_t step, total;
    int name = 6, columns[SHOWN], n = 0;
    bool best = false;
    furthest(t, &step, &total);
    fill_bar(bar, step, total);
    add(p, "step %lld/%lld [%s]", (long long)step, (long long)total, bar);
    add_speed(p, t, step, total);
    end_line(p);
    for (size_t i = 0; i < t->n; i++) {
        int length = (int)strlen(t->rows[i].name);
        name = length > name ? length : name;
        best = best || !isnan(t->rows[i].best);
    }
    name = name < 24 ? name : 24;
    for (int i = 0; i < SHOWN && name + 11 * (n + 1) + (best ? 29 : 0) < p->columns; i++)
        if (has(t, i))
            columns[n++] = i;
    add(p, "%-*s", name, "");
    for (int c = 0; c < n; c++)
        add(p, " %10s", shown[columns[c]].title);
    add(p, best ? " validation  best at step" : "");
    end_line(p);
    for (size_t i = 0; i < t->n; i++) {
        const cli_trainee *r = &t->rows[i];
        if (p->lines + 2 > p->rows && i + 1 < t->n) { /* the last line of the screen */
            add(p, "and %zu more", t->n - i);
            end_line(p);
            break;
        }
        add(p, "%-*.24s", name, r->name);
        for (int c = 0; c < n; c++)
            if (isnan(r->values[columns[c]]))
                add(p, " %10s", "-");
            else
                add(p, " %10.4g", r->values[columns[c]]);
        if (!isnan(r->best))
            add(p, " %10.4g  %.4g at %lld", r->validation, r->best, (long long)r->best_step);
        add(p, r->step == r->total ? "  done" : "");
        end_line(p);
    }
}

static void draw_table(const cli_training *t) {
    page *p = calloc(1, sizeof *p);
    struct winsize size;
    if (!p)
        return;
    bool known = ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 && size.ws_row > 0;
    p->columns = known ? size.ws_col : 80;
    p->rows = known ? size.ws_row : 24;
    lay_out(p, t);
    p->text[p->used - 1] = 0; /* the cursor stays on the last line: a full screen does not scroll */
    cli_progress_end();
    fputs(p->text, stderr);
    fflush(stderr);
    drawn = p->lines;
    free(p);
}

/* Off a terminal, a line now and then. */
static void print_line(const cli_training *t) {
    page *p = calloc(1, sizeof *p);
    int64_t step, total;
    if (!p)
        return;
    furthest(t, &step, &total);
    add(p, "step %lld/%lld", (long long)step, (long long)total);
    add_speed(p, t, step, total);
    for (size_t i = 0; i < t->n; i++) {
        add(p, "%s%s", i ? "; " : ": ", t->rows[i].name);
        for (int c = 0, n = 0; c < SHOWN && n < 3; c++)
            if (!isnan(t->rows[i].values[c]) && ++n)
                add(p, " %s %.4g", shown[c].title, t->rows[i].values[c]);
    }
    fprintf(stderr, "%s\n", p->text);
    free(p);
}

static void print_validation(const psoup_step *step) {
    fprintf(stderr, "%s: step %lld/%lld, validation:", step->subject, (long long)step->step,
            (long long)step->total);
    for (size_t i = 0; i < step->n && i < 4; i++)
        fprintf(stderr, "%s%s %.4g", i ? "  " : " ", step->names[i], step->values[i]);
    fputc('\n', stderr);
}

int cli_training_step(void *user, const psoup_step *step) {
    cli_training *t = user;
    psoup_error error;
    _Static_assert((int)SHOWN == (int)CLI_SHOWN, "a row has a value for each");
    if (t->config && launch_rank() == 0 &&
        cli_write_file(t->config_path, t->config, strlen(t->config), &error) != PSOUP_OK)
        cli_log(NULL, PSOUP_LOG_WARNING, error.message);
    t->config = NULL;
    if (t->quiet || launch_rank() > 0 || !strcmp(step->phase, "pause"))
        return cli_asked_to_stop();
    bool validation = !strcmp(step->phase, "validation"), terminal = isatty(STDERR_FILENO);
    cli_trainee *r = row_of(t, step);
    if (validation && !terminal)
        print_validation(step);
    if (r) {
        r->step = step->step;
        r->total = step->total;
        if (validation)
            note_validation(r, step);
        else
            note_training(t, r, step);
    }
    double wait = terminal ? 0.1 : 60.0, time = now();
    if (!terminal && t->shown == 0)
        t->shown = time;
    if (terminal && (step->step == step->total || drawn == 0 || time - t->shown >= wait)) {
        draw_table(t);
        t->shown = time;
    } else if (!terminal && !validation && time - t->shown >= wait) {
        print_line(t);
        t->shown = time;
    }
    return cli_asked_to_stop();
}
