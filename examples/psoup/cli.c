#include "launch.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- messages ---------------------------------------------------------------------------------- */

int cli_fail(const psoup_error *error) {
    cli_progress_end();
    if (launch_world() > 1 && !launch_agreed())
        fprintf(stderr, "psoup: rank %d: %s\n", launch_rank(), error->message);
    else
        fprintf(stderr, "psoup: %s\n", error->message);
    return 1;
}

int cli_complain(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("psoup: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    return 2;
}

psoup_status cli_error(psoup_error *error, psoup_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    error->status = status;
    vsnprintf(error->message, sizeof error->message, format, args);
    va_end(args);
    return status;
}

psoup_status cli_misunderstood(const char *judge, size_t answers, psoup_error *error) {
    return cli_error(error, PSOUP_ERROR_FORMAT,
                     "judge %s: none of its %zu answers was understood: expected {\"id\": N, \"verdict\": \"a\", \"b\" or "
                     "\"tie\"}",
                     judge, answers);
}

void cli_log(void *user, psoup_log_level level, const char *line) {
    (void)user;
    if (launch_rank() > 0) /* rank 0 says the same */
        return;
    cli_progress_end();
    fprintf(stderr, "psoup: %s%s\n", level == PSOUP_LOG_WARNING ? "warning: " : "", line);
}

psoup_status cli_write_file(const char *path, const char *text, size_t n, psoup_error *error) {
    char *beside = malloc(strlen(path) + 8);
    if (!beside)
        return cli_error(error, PSOUP_ERROR_MEMORY, "out of memory");
    sprintf(beside, "%s.tmp", path);
    FILE *f = fopen(beside, "wb");
    bool good = f && fwrite(text, 1, n, f) == n;
    int why = errno;
    if (f && fclose(f) != 0 && good) {
        good = false;
        why = errno;
    }
    if (good && rename(beside, path) != 0) {
        good = false;
        why = errno;
    }
    if (!good && f)
        unlink(beside);
    free(beside);
    return good ? PSOUP_OK
                : cli_error(error, PSOUP_ERROR_IO, "%s: cannot write: %s", path, strerror(why));
}

int cli_print_json(psoup_json *value) {
    char *text = psoup_json_text(value, 0);
    psoup_json_free(value);
    if (!text)
        return cli_complain("out of memory"), 1;
    puts(text);
    psoup_text_free(text);
    return fflush(stdout) == 0 ? 0 : (cli_complain("standard output: %s", strerror(errno)), 1);
}

/* ---- arguments --------------------------------------------------------------------------------- */

static void print_help(const cli_option *options, const char *about) {
    puts(about);
    puts("Options:");
    for (const cli_option *o = options; o->name; o++) {
        char left[64];
        snprintf(left, sizeof left, "%s%s%s", o->name, o->value ? " " : "",
                 o->value ? o->value : "");
        int width = 28; /* columns; in bytes what goes on a character takes more */
        for (const char *c = left; *c; c++)
            width += ((unsigned char)*c & 0xC0) == 0x80;
        printf("  %-*s %s%s\n", width, left, o->help, o->kind == CLI_LIST ? " (may be repeated)" : "");
    }
    printf("  %-28s %s\n", "--help", "this text");
}

static bool read_number(const char *name, const char *text, double low, double high, bool integer,
                        double *out) {
    char *end;
    errno = 0;
    *out = strtod(text, &end);
    if (errno || end == text || *end || !isfinite(*out) || *out < low || *out > high ||
        (integer && *out != floor(*out))) {
        cli_complain("%s: \"%s\", expected %s from %.10g to %.10g", name, text,
                     integer ? "a whole number" : "a number", low, high);
        return false;
    }
    return true;
}

static bool store(const cli_option *o, const char *text) {
    double number;
    char *end;
    switch (o->kind) {
    case CLI_FLAG:
        *(bool *)o->to = true;
        return true;
    case CLI_INT:
        if (!read_number(o->name, text, -2147483648.0, 2147483647.0, true, &number))
            return false;
        *(int32_t *)o->to = (int32_t)number;
        return true;
    case CLI_UINT64:
        errno = 0;
        *(uint64_t *)o->to = strtoull(text, &end, 10);
        if (errno || end == text || *end || strchr(text, '-'))
            return cli_complain("%s: \"%s\", expected a whole number from 0 to 2^64 - 1", o->name,
                                text),
                   false;
        return true;
    case CLI_FLOAT:
        if (!read_number(o->name, text, -1e30, 1e30, false, &number))
            return false;
        *(float *)o->to = (float)number;
        return true;
    case CLI_TEXT:
        *(const char **)o->to = text;
        return true;
    case CLI_LIST: {
        cli_list *list = o->to;
        if (list->n == sizeof list->items / sizeof *list->items)
            return cli_complain("%s: given more than %zu times", o->name, list->n), false;
        list->items[list->n++] = text;
        return true;
    }
    }
    return false;
}

bool cli_parse(int argc, char **argv, const cli_option *options, const char *about,
               cli_list *arguments, int *status) {
    bool only_arguments = false;
    const cli_option rest = {"arguments", CLI_LIST, arguments, NULL, NULL};
    *status = 2;
    for (int i = 1; i < argc; i++) {
        if (!only_arguments && (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h"))) {
            print_help(options, about);
            *status = 0;
            return false;
        }
        if (!only_arguments && !strcmp(argv[i], "--")) {
            only_arguments = true;
            continue;
        }
        if (only_arguments || strncmp(argv[i], "--", 2) != 0) {
            if (!store(&rest, argv[i]))
                return false;
            continue;
        }
        size_t length = strcspn(argv[i], "=");
        const cli_option *o = options;
        while (o->name && (strlen(o->name) != length || strncmp(o->name, argv[i], length) != 0))
            o++;
        if (!o->name) {
            cli_complain("%s: unknown option %s (see psoup %s --help)", argv[0], argv[i], argv[0]);
            return false;
        }
        const char *value = argv[i][length] == '=' ? argv[i] + length + 1 : NULL;
        if (o->kind == CLI_FLAG && value) {
            cli_complain("%s takes no value, got \"%s\"", o->name, value);
            return false;
        }
        if (o->kind != CLI_FLAG && !value) {
            if (i + 1 == argc) {
                cli_complain("%s needs a value: %s", o->name, o->value);
                return false;
            }
            value = argv[++i];
        }
        if (!store(o, value))
            return false;
    }
    *status = 0;
    return true;
}

/* ---- stopping ---------------------------------------------------------------------------------- */

static volatile sig_atomic_t asked_to_stop;

static void ask_to_stop(int number) {
    (void)number;
    asked_to_stop = 1;
}

void cli_training_begin(const char *checkpoint_dir) {
    struct sigaction action = {.sa_handler = ask_to_stop, .sa_flags = SA_RESTART | (int)SA_RESETHAND};
    if (!checkpoint_dir)
        return;
    sigemptyset(&action.sa_mask);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
}

int cli_asked_to_stop(void) { return asked_to_stop; }

int cli_training_fail(const psoup_error *error) {
    bool stopped = asked_to_stop || launch_world() > 1; /* any of the ranks may have been asked */
    if (launch_agreed() && launch_rank() > 0) /* rank 0 says it */
        return error->status != PSOUP_ERROR_CANCELLED;
    if (!stopped || error->status != PSOUP_ERROR_CANCELLED)
        return cli_fail(error);
    cli_progress_end();
    if (launch_rank() > 0)
        return 0;
    fprintf(stderr, "%s; the same command with --resume goes on\n", error->message);
    return 0;
}
