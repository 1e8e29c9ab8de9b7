/* src/train/ppo.h: what the files of PPO share. */
#ifndef PSOUP__PPO_H
#define PSOUP__PPO_H

#include "train/checkpoint.h"

/* Rollouts and what was made of them, token by token. */
typedef struct psoup__experience {
    psoup__rollouts rollouts;
    size_t capacity;
    float *logprob, *ref_logprob; /* [tokens] log π_old, log π_ref */
    float *value;                 /* [tokens] V_old, read at the position before the token */
    float *reward, *advantage, *returns; /* [tokens] */
    float *first_ratio;           /* [tokens] NaN where a token's first pass came after an update */
} psoup__experience;

typedef struct psoup__ppo_state { /* what a step moves on, beside weights and moments */
    int64_t step;                 /* steps done */
    uint64_t rollouts;            /* sampled so far */
    uint64_t updates;             /* sequences that went through update passes, for dropout */
    double kl_coefficient;
    psoup__moments moments; /* of the scores */
    int64_t validated;      /* the last step whose validation is done */
    int64_t sampled;        /* samples are taken of every step before this one */
    int64_t failed;         /* 1: it diverged, and left the run */
} psoup__ppo_state;

typedef struct psoup__policy {
    psoup_ppo_policy given;
    char *name;
    psoup__adapter *adapter;
    int32_t index; /* of the adapter, now */
    bool training; /* its adapter holds gradients for this run */
    int64_t total; /* steps */
    psoup__ppo_state state;
    psoup__ppo_state next; /* of the step in progress; becomes `state` when it is done */
    psoup__optimizer optimizer;
    psoup__best best;
    int32_t *order; /* [n_prompts] permutation of epoch `epoch` */
    uint64_t epoch; /* UINT64_MAX: none yet */
    psoup__experience experience, validation;
    psoup__rollouts samples;
    psoup__metrics metrics; /* of the step in progress */
} psoup__policy;

typedef enum psoup__phase { /* what a step does, one after another */
    PSOUP__ROLLOUT,
    PSOUP__SCORE,
    PSOUP__EVALUATE,
    PSOUP__UPDATE,
    PSOUP__PHASES
} psoup__phase;

struct psoup_ppo {
    psoup_model *model;
    psoup_ppo_options options;
    psoup__reporter reporter;
    psoup__checkpoint checkpoint;
    psoup__pack *pack;
    psoup__policy *policies;
    psoup__policy **active; /* [n] scratch of a step */
    psoup__request *requests; /* [n] scratch */
    size_t n;
    double began[PSOUP__PHASES + 1]; /* when the step's phases did, and its end */
};

/* ppo_setup.c: finds each policy's adapter where it is now; PSOUP_ERROR_STATE when it is gone. */
psoup_status psoup__ppo_refresh(psoup_ppo *ppo, psoup_error *error);
/* The prompts of a policy's next batch, into its experience. */
psoup_status psoup__ppo_next_prompts(psoup_ppo *ppo, psoup__policy *policy, psoup_error *error);

/* ppo_update.c: log π, log π_ref and, with values, V of every response token, without dropout. Reads
 * each policy's validation instead of its experience where `validation`. */
psoup_status psoup__ppo_evaluate(psoup_ppo *ppo, psoup__policy *const *policies, size_t n,
                                 bool validation, psoup_error *error);
/* The epochs of clipped updates on the policies' experience; adds to their metrics. */
psoup_status psoup__ppo_update(psoup_ppo *ppo, psoup__policy *const *policies, size_t n,
                               psoup_error *error);

/* ppo_samples.c: makes those whose samples are due now the active ones, and counts them. */
size_t psoup__ppo_samples_due(psoup_ppo *ppo);
/* Samples the first n of the active policies, and tells of it. */
psoup_status psoup__ppo_sample(psoup_ppo *ppo, size_t n, psoup_error *error);

/* ppo_checkpoint.c: takes checkpoint_dir, and goes on from what is there. */
psoup_status psoup__ppo_start_checkpoint(psoup_ppo *ppo, psoup_error *error);

#endif
