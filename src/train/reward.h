/* src/train/reward.h: reward training's state, and its steps. */
#ifndef PSOUP__REWARD_H
#define PSOUP__REWARD_H

#include "train/training.h"

/* One model of the run. Nothing in it depends on the others. */
typedef struct psoup__reward_learner {
    char *name;
    psoup__adapter *adapter;
    int32_t index;
    bool training; /* its adapter holds gradients */
    int32_t *train, *validation; /* [n_train], [n_validation]: its comparisons, by place */
    size_t n_train, n_validation;
    int32_t *order; /* [n_train] permutation of the epoch */
    size_t at;      /* in it */
    int64_t epoch, step, total, validated; /* validated: the last step whose validation is done */
    uint64_t sequences; /* trained on so far: the dropout's stream */
    psoup__optimizer optimizer;
    psoup__best best;
    /* This step. */
    size_t step_end, micro_end; /* in order */
    double loss, right, margin, norm;
    bool stepped, due; /* due: its validation is */
} psoup__reward_learner;

typedef struct psoup__reward_trainer {
    psoup_model *model;
    psoup_reward_options options;
    const psoup_comparison *train, *validation;
    const psoup_comparison *comparisons; /* those of the pass */
    psoup__reward_learner *learners;
    size_t n;
    psoup__passes *passes;
    psoup__team team;
    psoup__reporter reporter;
    psoup__checkpoint checkpoint;
    /* The items of a micro-batch: comparisons of all learners. */
    size_t capacity;
    int32_t *item, *owner, *rows, *pass; /* [items] */
    uint64_t *stream;                    /* [items] of the chosen row; the rejected has the next */
    float *score;                        /* [items, 2] of both rows */
    bool learn;                          /* they have a backward */
    double since;   /* when the step began */
    size_t through; /* tokens that went through it */
} psoup__reward_trainer;

/* reward_train.c: refuses reward models that cannot be trained together. */
psoup_status psoup__reward_check_models(psoup_reward *const *rewards, size_t n, psoup_error *error);
/* Refuses comparisons that make no sense. */
psoup_status psoup__reward_check_comparisons(const psoup_comparison *comparisons, size_t n, size_t n_rewards,
                                             bool margins, const char *what, psoup_error *error);
/* reward_step.c: the order of l->epoch. */
void psoup__reward_order(const psoup__reward_trainer *t, psoup__reward_learner *l);
/* One step of every learner that has steps to go, and its report. */
psoup_status psoup__reward_step(psoup__reward_trainer *t, const psoup_comparison *comparisons,
                                psoup_error *error);
/* Sums over the validation comparisons of every learner that is due; or with the report, and the best. */
psoup_status psoup__reward_evaluate(psoup__reward_trainer *t, const psoup_comparison *comparisons,
                                    psoup_error *error);
psoup_status psoup__reward_validate(psoup__reward_trainer *t, const psoup_comparison *comparisons,
                                    psoup_error *error);

#endif
