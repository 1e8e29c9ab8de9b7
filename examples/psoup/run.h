/* psoup run: what its parts share.
 *
 *   cmd_run.c      the command: configuration, preset, what is done already, the order of the stages
 *   run_book.c     what is done already
 *   run_data.c     files in the paper's layouts, and what psoup feedback writes, as tokens
 *   run_methods.c  the stages: reward models, policies, soups, responses
 *   run_plan.c     what the stages will take of memory
 */
#ifndef RUN_H
#define RUN_H

#include "config.h"

enum { RUN_PREFERENCES = 64, RUN_MEMBERS = 16, RUN_USERS = 4096 };

/* What a policy is trained for. */
typedef enum run_scope {
    RUN_NOBODY,  /* there is none: the base answers */
    RUN_GENERAL, /* one, of general preference */
    RUN_ALL,     /* one, over the prompts of all users */
    RUN_EACH     /* one for each preference */
} run_scope;

typedef struct run_method {
    const char *name, *summary;
    run_scope scope;
    bool supervised; /* trained on examples, not on a reward */
    bool asks;       /* evaluation prompts carry the user's preference prompts */
} run_method;

typedef enum run_form { RUN_FORM_METHOD, RUN_FORM_EACH, RUN_FORM_TOLD } run_form;
typedef enum run_user_input { RUN_INPUT_AUTO, RUN_INPUT_INSTRUCTION, RUN_INPUT_PROMPT } run_user_input;
typedef enum run_soup { RUN_DELTA, RUN_FACTORS } run_soup;

typedef struct run_config {
    const char *model, *tokenizer, *device, *dtype, *template, *preferences, *output;
    const char *validation, *evaluation, *examples;
    const psoup_json *prompts, *rewards, *reward_data;
    int32_t reward_form, user_input, soup; /* run_form, run_user_input, run_soup */
    int32_t save_soups, train_with_preference, evaluate_with_preference, new_preferences;
    int32_t max_prompt_tokens, threads, resume;
    float held_out;
    uint64_t seed;
    adapter_config lora, reward_lora;
    psoup_ppo_options ppo;
    psoup_reward_options reward;
    psoup_sft_options sft;
    sampling_config generate;
} run_config;

/* Rows of a file, with its name for messages. */
typedef struct run_rows {
    psoup_json *rows;
    const char *path;
} run_rows;

typedef struct run_user {
    char name[RUN_MEMBERS + 1];   /* "AAB" */
    int32_t members[RUN_MEMBERS]; /* preferences */
    char *wishes;                 /* their prompts, one after another */
} run_user;

typedef struct run_reward {
    const char *name;      /* a symbol, "general" or "told" */
    char *adapter;         /* its name in the model */
    const char *directory; /* it was trained before; NULL: trained here */
    char *own;             /* where this run keeps it */
} run_reward;

typedef struct run_prompts {
    psoup_ppo_prompt *items;
    psoup_reward_input *inputs; /* RUN_ALL: one for each preference of the user */
    size_t n, left_out;
} run_prompts;

typedef struct run_policy {
    const char *name;
    int32_t preference; /* −1: none, or all */
    run_prompts prompts, validation;
} run_policy;

typedef struct run {
    const run_method *method;
    run_config c;
    const char *config_path;
    const plan_options *plan;
    bool quiet;
    cli_training training;
    psoup_context *meeting; /* the ranks know each other before anything can go wrong */
    psoup_comm *comm;       /* the other ranks; NULL: there are none */
    cli_model m;
    psoup_preferences *preferences;
    size_t n_preferences, n_users, user_size;
    run_user *users;
    token_pool pool;
    bool told; /* one reward model, told by the preference prompt */
    run_reward rewards[RUN_PREFERENCES];
    psoup_reward *handles[RUN_PREFERENCES];
    size_t n_rewards;
    run_policy policies[RUN_PREFERENCES];
    size_t n_policies;
    run_rows evaluation;
    psoup_comparison *comparisons;
    size_t n_comparisons, n_comparisons_held;
    psoup_example *examples;
    size_t n_examples, n_examples_held;
} run;

/* ---- run_book.c ---- */
typedef struct run_book {
    psoup_json *config, *finished;
    char *config_path, *finished_path;
    uint32_t stages; /* finished when it was opened, as bits */
} run_book;
/* book->config is the configuration now. Refuses an output that has a run, unless it goes on with the same. Of several
 * ranks the first looks, and all go by it; one with another configuration is refused. */
psoup_status run_open_book(run *r, run_book *book, psoup_error *error);
void run_close_book(run_book *book);
/* Of "rewards", "policies", "soups", "responses". A stage is finished when it said so and what it made is still there:
 * files come into their place whole. */
bool run_finished(const run_book *book, const char *stage);
psoup_status run_finish(const run *r, run_book *book, const char *stage, psoup_error *error);

/* ---- run_data.c ---- */
psoup_status run_read_preferences(run *r, psoup_error *error);
/* The file that `value` names for `name`: the text itself, or the object's member; NULL where it has none. */
const char *run_file_of(const psoup_json *value, const char *name);
/* The policies' prompts, and the evaluation's rows. */
psoup_status run_read_prompts(run *r, psoup_error *error);
psoup_status run_read_comparisons(run *r, psoup_error *error);
psoup_status run_read_examples(run *r, psoup_error *error);
/* Row i of a file of prompts: its instruction and input. */
psoup_status run_prompt_texts(const run_rows *rows, size_t i, const char **instruction, const char **input,
                              psoup_error *error);
psoup_status run_encode(run *r, const char *instruction, const char *input, const char *wishes,
                        const int32_t **tokens, size_t *n, psoup_error *error);
void run_free_data(run *r);

/* ---- run_methods.c ---- */
/* The adapters that the run trains or was given, as they are before it trains anything. */
psoup_status run_add_rewards(run *r, bool trained, psoup_error *error);
psoup_status run_add_policies(run *r, bool trained, psoup_error *error);
/* Stages. All ranks train and answer, each its share; the first writes what comes of it, and makes the soups. */
psoup_status run_train_rewards(run *r, psoup_error *error);
psoup_status run_train_policies(run *r, psoup_error *error);
psoup_status run_make_soups(run *r, psoup_error *error);
psoup_status run_load_soups(run *r, psoup_error *error);
psoup_status run_respond(run *r, psoup_error *error);
psoup_status run_policies_memory(run *r, psoup_memory *out, psoup_error *error);
psoup_status run_responses_memory(run *r, psoup_memory *out, psoup_error *error);
/* "OUTPUT/FOLDER/NAME"; free with free(). */
char *run_path(const run *r, const char *folder, const char *name);
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
void run_say(const run *r, const char *format, ...); /* rank 0's line on standard error, unless it is quiet */

/* ---- run_plan.c ---- */
/* Says what "rewards", "policies" or "responses" will take; PSOUP_ERROR_MEMORY, with numbers, where there is less. */
psoup_status run_plan_stage(run *r, const char *stage, psoup_error *error);

#endif
