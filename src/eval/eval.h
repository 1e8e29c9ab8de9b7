/* src/eval: preferences, prompt templates, judges, feedback, win rates. */
#ifndef PSOUP__EVAL_H
#define PSOUP__EVAL_H

#include "base/base.h"
#include "psoup/eval.h"

struct psoup_preferences {
    psoup_context *context;
    psoup_json *root;          /* owns the texts of `items`; NULL for the built-in catalogue */
    psoup_preference *items;   /* [n] */
    char **criteria;           /* [n] derived from a prompt, or NULL */
    int32_t *dimension;        /* [n] number of the item's dimension, by first appearance */
    size_t n, dimensions;
};

struct psoup_judge {
    psoup_context *context;
    psoup_judge_fn fn;
    void *user;
    struct psoup__judge_process *process; /* judge_command.c; NULL for a callback */
};

psoup_status psoup__judge_process_start(psoup_context *context, const char *const *argv,
                                        struct psoup__judge_process **out, psoup_error *error);
psoup_status psoup__judge_process_ask(struct psoup__judge_process *process,
                                      const psoup_question *questions, size_t n, int32_t *verdicts,
                                      psoup_error *error);
void psoup__judge_process_patience(struct psoup__judge_process *process, double seconds);
void psoup__judge_process_free(struct psoup__judge_process *process);

/* winrate.c: refuses duels whose words that are kept for later say something. */
psoup_status psoup__duels_check(const psoup_duel *duels, size_t n, psoup_error *error);

#endif
