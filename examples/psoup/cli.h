/* What the commands of the psoup program share: arguments, messages, progress, JSON output. */
#ifndef CLI_H
#define CLI_H

#include <stdbool.h>
#include <stdio.h>

#include "psoup/psoup.h"

/* ---- commands ---------------------------------------------------------------------------------- */

typedef struct command {
    const char *name;
    int (*run)(int argc, char **argv); /* argv[0] is the command's name; returns the exit status */
    const char *summary;
} command;

int cmd_info(int argc, char **argv);
int cmd_tokenize(int argc, char **argv);
int cmd_generate(int argc, char **argv);
int cmd_score(int argc, char **argv);
int cmd_feedback(int argc, char **argv);
int cmd_sft(int argc, char **argv);
int cmd_reward(int argc, char **argv);
int cmd_dpo(int argc, char **argv);
int cmd_ppo(int argc, char **argv);
int cmd_merge(int argc, char **argv);
int cmd_inspect(int argc, char **argv);
int cmd_winrate(int argc, char **argv);
int cmd_plot(int argc, char **argv);
int cmd_run(int argc, char **argv);
int cmd_judge(int argc, char **argv);

/* ---- arguments --------------------------------------------------------------------------------- */

typedef enum cli_kind { CLI_FLAG, CLI_INT, CLI_UINT64, CLI_FLOAT, CLI_TEXT, CLI_LIST } cli_kind;

/* Texts of an option that may be given several times, or of the arguments that are no options. */
typedef struct cli_list {
    const char *items[256];
    size_t n;
} cli_list;

typedef struct cli_option {
    const char *name; /* "--model"; the table ends with NULL */
    cli_kind kind;
    void *to;          /* bool, int32_t, uint64_t, float, const char *, cli_list */
    const char *value; /* what --help calls the argument: "DIR" */
    const char *help;
} cli_option;

/* Reads argv[1 …]. Prints help and exits the command with `*status` 0 on --help, complains with 2
 * on bad usage; then returns false. `about` is the text above the options. */
bool cli_parse(int argc, char **argv, const cli_option *options, const char *about,
               cli_list *arguments, int *status);

/* ---- messages ---------------------------------------------------------------------------------- */

/* "psoup: MESSAGE" on standard error; returns 1, an exit status. */
int cli_fail(const psoup_error *error);
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
int cli_complain(const char *format, ...); /* the same from a format; returns 2 */
/* Fills *error and returns the status. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
psoup_status cli_error(psoup_error *error, psoup_status status, const char *format, ...);
/* Of a judge of whose answers none says a verdict. */
psoup_status cli_misunderstood(const char *judge, size_t answers, psoup_error *error);
void cli_log(void *user, psoup_log_level level, const char *line); /* for psoup_context_options */

/* A progress bar on standard error, only where that is a terminal. */
int cli_progress(void *user, const char *label, int64_t done, int64_t total);
/* A psoup_step_fn that shows training: on a terminal as a table of all who train, redrawn in place, with
 * their main metrics, speed and the time left; off one as a line for each validation, and one a minute. It
 * stops the training when that was asked to stop. `user` is a cli_training. */
enum { CLI_TRAINEES = 64, CLI_SHOWN = 11, CLI_PHASES = 4 };
typedef struct cli_trainee {
    char name[64];
    int64_t step, total, best_step;
    double values[CLI_SHOWN], validation, best; /* NaN where there is none */
} cli_trainee;
typedef struct cli_training {
    bool quiet; /* nothing at all */
    const char *config, *config_path; /* a text that is written there with the first report; NULL: none */
    /* How far it is; all 0 at first. */
    cli_trainee rows[CLI_TRAINEES];
    size_t n;
    double began, shown, speed, share[CLI_PHASES];
    int64_t first; /* steps that were done before this run of the program */
} cli_training;
int cli_training_step(void *user, const psoup_step *step);
/* Where a run has a directory for checkpoints: SIGTERM and SIGINT ask it to stop; a second one kills it. */
void cli_training_begin(const char *checkpoint_dir);
/* Whether it was; for work that has no psoup_step_fn. */
int cli_asked_to_stop(void);
/* cli_fail; or for a run that was asked to stop, and kept itself, how it goes on: status 0. */
int cli_training_fail(const psoup_error *error);
void cli_progress_end(void);

/* Writes a text to a file, beside it and renamed. */
psoup_status cli_write_file(const char *path, const char *text, size_t n, psoup_error *error);
/* Prints one line of JSON on standard output and frees it; returns an exit status. */
int cli_print_json(psoup_json *value);

/* ---- what several commands open ---------------------------------------------------------------- */

/* A model with its context, tokenizer and adapters. */
typedef struct cli_model {
    psoup_context *context;
    psoup_comm *comm; /* the other processes of a training; NULL: there are none */
    psoup_comm *line; /* what comm needs; NULL: nothing */
    psoup_model *model;
    psoup_tokenizer *tokenizer; /* NULL when not asked for, or absent and not required */
} cli_model;
/* device: "cpu", "cuda" or "cuda:N"; NULL: the CPU. dtype: of psoup_load_options, by name; NULL: as stored.
 * adapters: "NAME=DIR" each; may be NULL. */
psoup_status cli_open(const char *directory, const char *device, const char *dtype, int32_t threads,
                      const cli_list *adapters, bool need_tokenizer, cli_model *out, psoup_error *error);
void cli_close(cli_model *opened);

/* Encodes a text; flags as for psoup_tokenizer_encode. Free *ids with free(). */
psoup_status cli_encode(const psoup_tokenizer *tokenizer, const char *text, size_t length,
                        uint32_t flags, int32_t **ids, size_t *n, psoup_error *error);
/* "1 15 27", the value of an option. Free *ids with free(), also on failure. */
psoup_status cli_parse_ids(const char *option, const char *text, int32_t **ids, size_t *n,
                           psoup_error *error);
/* Decodes without special tokens into *length bytes and a NUL, to be freed with free(). A model's
 * answer need not be UTF-8: it may end inside a character. */
psoup_status cli_decode(const psoup_tokenizer *tokenizer, const int32_t *ids, size_t n, char **text,
                        size_t *length, psoup_error *error);
/* Bytes of the UTF-8 character that text[0, length), length > 0, begins with; 0 where it is none. */
size_t cli_character(const char *text, size_t length);
/* The text with U+FFFD for every byte that is not UTF-8, and for NUL. Free with free(). */
char *cli_utf8(const char *text, size_t length);
/* A line's member that is a text, or `otherwise` where it has none; anything else is an error. */
psoup_status cli_text(const psoup_json *line, const char *name, const char *otherwise, const char *path, int64_t number,
                      const char **out, psoup_error *error);
/* Whether the model can read these tokens and `more` after them; `where` they come from, for messages. */
psoup_status cli_check_tokens(const cli_model *m, const int32_t *ids, size_t n, size_t more, const char *where,
                              psoup_error *error);
/* The same for a line of a file, or (path NULL) for an option. */
psoup_status cli_check_line(const cli_model *m, const int32_t *ids, size_t n, size_t more, const char *path,
                            int64_t number, const char *option, psoup_error *error);
/* A line's "mix_method", or where it has none, what --mix-method says (NULL: delta). */
psoup_status cli_mix_method(const psoup_json *line, const char *option, const char *path, int64_t number,
                            int32_t *method, psoup_error *error);
/* Multiplies the mix by a line's "strength", or where it has none, by --strength. */
psoup_status cli_strengthen(const cli_model *m, const psoup_json *line, float option, const char *path, int64_t number,
                            float *mix, psoup_error *error);
/* A row's {"NAME": W, …} into mix [adapters], all 0 before; path and line for messages. */
psoup_status cli_read_mix(const cli_model *m, const psoup_json *object, bool any_sum,
                          const char *path, int64_t line, float *mix, psoup_error *error);

#endif
