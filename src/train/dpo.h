/* src/train/dpo.h: direct preference optimisation's state, and its steps. */
#ifndef PSOUP__DPO_H
#define PSOUP__DPO_H

#include "train/training.h"

/* The pairs of a run, and what the reference thinks of them. */
typedef struct psoup__dpo_set {
    const psoup_dpo_pair *pairs; /* [n] */
    size_t n;
    double *reference; /* [2n] log π_ref of the chosen and the rejected response */
} psoup__dpo_set;

/* One policy of the run. Nothing in it depends on the others. */
typedef struct psoup__dpo_learner {
    char *name;
    psoup__adapter *adapter;
    int32_t index;
    bool training; /* its adapter holds gradients */
    int32_t *train, *validation; /* [n_train], [n_validation]: its pairs, by place */
    size_t n_train, n_validation;
    int32_t *order; /* [n_train] permutation of the epoch */
    size_t at;      /* in it */
    int64_t epoch, step, total, validated; /* validated: the last step whose validation is done */
    uint64_t sequences; /* trained on so far: the dropout's stream */
    psoup__optimizer optimizer;
    psoup__best best;
    /* This step. */
    size_t step_end, micro_end; /* in order */
    double loss, right, chosen, rejected, norm; /* chosen, rejected: sums of implied rewards */
    bool stepped, due; /* due: its validation is */
} psoup__dpo_learner;

typedef struct psoup__dpo_trainer {
    psoup_model *model;
    psoup_dpo_options options;
    psoup__dpo_set train, validation;
    psoup__dpo_learner *learners;
    size_t n;
    psoup__passes *passes;
    psoup__team team;
    psoup__reporter reporter;
    psoup__checkpoint checkpoint;
    /* The items of a micro-batch: pairs of all learners, at most those of a whole set. */
    int32_t *item, *owner, *rows, *pass; /* [items] */
    uint64_t *stream;                    /* [items] of the chosen row; the rejected has the next */
    double *logprob;                     /* [items, 2] of both responses */
    double since;   /* when the step began */
    size_t through; /* tokens that went through it */
} psoup__dpo_trainer;

/* dpo.c: whether these policies can be trained on the trainer's pairs. */
psoup_status psoup__dpo_check_run(const psoup__dpo_trainer *t, const char *const *policies, size_t n,
                                  psoup_error *error);
/* dpo_step.c: rows are cut after this many tokens; how many both rows of a pair have. */
size_t psoup__dpo_longest_row(const psoup__dpo_trainer *t);
int64_t psoup__dpo_rows(const psoup__dpo_trainer *t, const psoup_dpo_pair *pair);
/* log π_ref of all pairs, once: the base does not change. Each rank asks of its share. */
psoup_status psoup__dpo_ask_reference(psoup__dpo_trainer *t, psoup__dpo_set *set, psoup_error *error);
/* The order of l->epoch. */
void psoup__dpo_order(const psoup__dpo_trainer *t, psoup__dpo_learner *l);
/* One step of every learner that has steps to go, and its report. */
psoup_status psoup__dpo_step(psoup__dpo_trainer *t, psoup_error *error);
/* The validation pairs of every learner that is due, the report, and the best. */
psoup_status psoup__dpo_validate(psoup__dpo_trainer *t, psoup_error *error);

#endif
