/* Training commands read one JSON file; every member is described by a table. */
#ifndef CONFIG_H
#define CONFIG_H

#include "plan.h"

/* One table of members and the struct they fill. */
typedef struct config_section {
    const char *title; /* of its part of --help */
    const psoup_field *fields;
    void *to; /* holds the defaults before, the file's values after */
} config_section;

typedef struct config {
    psoup_json *root; /* owns the texts that the structs borrow */
    const char *path;
    bool json;         /* --json: the result as JSON, no progress */
    bool parts;        /* the sections stand in objects of their own */
    plan_options plan; /* of what trains */
} config;

/* Reads argv: --config FILE, --print-config, --json, --resume and --join where there is such a member,
 * --memory-limit and --plan of what resumes, --help. Returns false when the command is done (help or the
 * configuration was printed, or something is wrong), with its exit *status. Options are read in the order of the
 * sections. */
bool config_read(int argc, char **argv, const char *about, const config_section *sections, size_t n,
                 config *out, int *status);
/* The same, where sections[i] stands in an object of its own, the file's member keys[i]; NULL: at the top. What is wrong
 * with the file is left in *error, for the caller to say. */
bool config_read_parts(int argc, char **argv, const char *about, const config_section *sections,
                       const char *const *keys, size_t n, config *out, int *status, psoup_error *error);
void config_free(config *c);
/* cli_training_fail, of an error that may speak of an option as the library does, which here is the file's:
 * "FILE: batch_size is 0: …" for "psoup_ppo_options: batch_size is 0: …". */
int config_fail(const config *c, const psoup_error *error);
/* What the sections hold now, laid out as in a file. */
psoup_json *config_values(const config_section *sections, const char *const *keys, size_t n);

/* A new adapter by the members "rank", "alpha", …: */
typedef struct adapter_config {
    psoup_adapter_options options;
    const psoup_json *targets; /* names; NULL: q_proj, v_proj */
} adapter_config;
extern const psoup_field adapter_fields[];
psoup_status adapter_config_finish(adapter_config *a, const char *where, psoup_error *error);
/* Where no adapter is new, refuses what is said of new ones and is neither the default, which every written
 * configuration has, nor what the adapter in `init` has. */
psoup_status adapter_config_beside(const adapter_config *a, psoup_context *context, const char *init, const char *where,
                                   psoup_error *error);

/* How answers are sampled, by the members "max_new_tokens", …: */
typedef struct sampling_config {
    int32_t max_new_tokens, min_new_tokens, top_k, no_repeat_ngram_size, max_sequences;
    float temperature, top_p;
} sampling_config;
extern const psoup_field sampling_fields[];
/* Everything but max_sequences, which is the session's. */
void sampling_config_to(const sampling_config *from, psoup_sampling *to);

/* A place that a run will make, and what was there before: what it leaves empty goes again, with the directories above
 * that it made, so that a run that is refused leaves nothing. */
typedef struct made_place {
    char *path;   /* NULL: none */
    size_t there; /* bytes of it that name what was there */
} made_place;
psoup_status place_note(made_place *place, const char *path, psoup_error *error); /* path may be NULL */
void place_leave(made_place *place);

/* A training's own directory, by the member "run_dir". */
typedef struct run_directory {
    const char *path; /* NULL: none */
    char *made[3], *config, *config_path;
    made_place places[5]; /* run_dir, metrics, samples, checkpoint_dir, output */
} run_directory;
extern const psoup_field run_dir_fields[];
/* Makes it, unless the run is only planned, and lets the members "metrics", "samples" and "checkpoint_dir" that are not
 * set name what is in it. The configuration is written with the first report: a run that is refused changes nothing. */
psoup_status run_directory_open(run_directory *d, const config_section *sections, size_t n, const plan_options *plan,
                                cli_training *training, psoup_error *error);
void run_directory_close(run_directory *d);
/* Makes a directory and those above it. */
psoup_status run_make_directory(const char *path, psoup_error *error);

/* Texts to token rows, kept until freed together. */
typedef struct token_pool {
    int32_t **rows;
    size_t n;
} token_pool;
psoup_status pool_encode(token_pool *pool, const psoup_tokenizer *tokenizer, const char *text,
                         uint32_t flags, const int32_t **ids, size_t *n, psoup_error *error);
/* The tokens of prompt followed by completion; *n_prompt receives how many are the prompt's own. */
psoup_status pool_encode_pair(token_pool *pool, const psoup_tokenizer *tokenizer,
                              const char *prompt, const char *completion, int32_t end_token,
                              const int32_t **ids, size_t *n, size_t *n_prompt, psoup_error *error);
void pool_free(token_pool *pool);

/* All rows of a JSON Lines file, at least one, as one array; NULL path gives an empty one. */
psoup_status read_rows(psoup_context *context, const char *path, psoup_json **out,
                       psoup_error *error);
/* A member that must be a text; `path` and the row's number for the message. */
psoup_status row_text(const psoup_json *row, const char *key, const char *path, size_t index,
                      const char **out, psoup_error *error);
/* The same for a member that may be absent, or null: NULL then. */
psoup_status row_option(const psoup_json *row, const char *key, const char *path, size_t index,
                        const char **out, psoup_error *error);
/* Of an array with an item for each row, moves those of a fraction of the prompts to the end; *stay
 * receives how many others there are. Rows of one prompt stand together and have one "id", or where they
 * have none, one "user_input". */
psoup_status hold_out(const psoup_json *rows, float fraction, void *items, size_t size, size_t *stay,
                      psoup_error *error);
/* "DIRECTORY/NAME"; free with free(). NULL when out of memory. */
char *join(const char *directory, const char *name);

/* The model of a run with its tokenizer, its own or another. */
psoup_status run_open(const char *model, const char *tokenizer, const char *device, const char *dtype,
                      int32_t threads, cli_model *out, psoup_error *error);
/* The same of a run that several processes may train, as they were launched; out->comm are the others. */
psoup_status run_open_ranks(const char *model, const char *tokenizer, const char *device, const char *dtype,
                            int32_t threads, cli_model *out, psoup_error *error);
int32_t run_end_token(const cli_model *m); /* the model's eos token; −1 when it has none */
/* Makes "output" a directory that can be written in: known before the training whose result it is for. Of several
 * ranks the first writes it, and looks. Where the run is only planned it is not made. */
psoup_status run_check_output(const char *output, const char *config_path, const plan_options *plan,
                              psoup_error *error);
/* What a finished run prints, of several ranks the first: where its results are. Returns the exit status. */
int run_print_output(const char *output, bool json);

#endif
