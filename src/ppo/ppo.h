/* src/ppo: PPO, RLOO and GRPO, of one policy, of several side by side, and of soups; best of n. Stands on
 * src/train. */
#ifndef PSOUP__PPO_H
#define PSOUP__PPO_H

#include "ppo/objectives.h"
#include "ppo/rollout.h"
#include "train/checkpoint.h"

/* ---- options.c --------------------------------------------------------------------------------- */

psoup_status psoup__ppo_check(const psoup_ppo_options *options, psoup_error *error);
static inline bool psoup__has_critic(const psoup_ppo_options *options) {
    return options->objective == PSOUP_OBJECTIVE_PPO;
}
/* Responses to one prompt in a step. */
static inline size_t psoup__group_size(const psoup_ppo_options *options) {
    return psoup__has_critic(options) ? 1 : (size_t)options->group_size;
}

/* ---- what a run is ----------------------------------------------------------------------------- */

/* Rollouts and what was made of them, token by token. */
typedef struct psoup__experience {
    psoup__rollouts rollouts;
    size_t capacity;
    float *logprob, *ref_logprob; /* [tokens] log π_old, log π_ref */
    float *value;                 /* [tokens] V_old, read at the position before the token */
    float *reward, *advantage, *returns; /* [tokens] */
    float *first_ratio;           /* [tokens] NaN where a token's first pass came after an update */
} psoup__experience;

/* What the last steps saw, for warnings. */
#define PSOUP__MAX_WINDOW 64
typedef struct psoup__watch {
    double reward[PSOUP__MAX_WINDOW], deviation[PSOUP__MAX_WINDOW], kl[PSOUP__MAX_WINDOW]; /* at step mod window */
    int64_t warned; /* a bit for each warning that held after the last step */
} psoup__watch;

typedef struct psoup__ppo_state { /* what a step moves on, beside weights and moments */
    int64_t step;                 /* steps done */
    uint64_t rollouts;            /* sampled so far */
    uint64_t updates;             /* sequences that went through update passes, for dropout */
    double kl_coefficient;
    psoup__moments moments[PSOUP__MAX_SOURCES]; /* of the scores of each reward, or of their sum the first */
    psoup__trend trends[PSOUP__MAX_SOURCES]; /* theirs with length, with length_correction */
    int64_t validated;      /* the last step whose validation is done */
    int64_t sampled;        /* samples are taken of every step before this one */
    int64_t failed;         /* 1: it diverged, and left the run */
    psoup__watch watch;
} psoup__ppo_state;

typedef struct psoup__part { /* one adapter of a policy */
    char *name;
    psoup__adapter *adapter;
    bool training; /* it holds gradients for this run */
    psoup__optimizer optimizer; /* those of a policy step as one */
    psoup__best best;
    psoup__snapshot before; /* of the step in progress, where rank 0 keeps the run of several */
} psoup__part;

typedef struct psoup__policy {
    psoup_ppo_policy given; /* given.soup is the policy's own, below */
    psoup_ppo_soup soup;
    char *name;
    psoup__part *parts; /* [n_parts]: one, but of a soup */
    const char **names; /* [n_parts] the parts' */
    int32_t *adapters;  /* [n_parts] their numbers in the model, now */
    size_t n_parts;
    psoup__source *sources; /* [n_sources] its rewards; of a soup one or more for each part */
    size_t n_sources;
    int64_t total; /* steps */
    psoup__ppo_state state;
    psoup__ppo_state next; /* of the step in progress; becomes `state` when it is done */
    int32_t *order; /* [n_prompts] permutation of epoch `epoch` */
    uint64_t epoch; /* UINT64_MAX: none yet */
    psoup__experience experience, validation;
    psoup__begun begun; /* the responses of the step after state.step, so far */
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

#define PSOUP__KEEP_SHARE 20 /* keeping what was begun takes at most one part in so many of the time */
typedef struct psoup__pauses {
    double ask_every, keep_every; /* seconds */
    double asked, kept, cost;     /* when last; and how long keeping took */
    size_t n;                     /* active policies whose responses are kept; 0: none */
} psoup__pauses;

struct psoup_ppo {
    psoup_model *model;
    psoup_ppo_options options;
    psoup__team team;
    psoup__reporter reporter;
    psoup__checkpoint checkpoint;
    psoup__passes *passes;
    psoup__policy *policies;
    psoup__policy **active; /* [n] scratch of a step */
    psoup__request *requests; /* [n] scratch */
    size_t n;
    double began[PSOUP__PHASES + 1]; /* when the step's phases did, and its end */
    psoup__pauses pauses;
};

/* setup.c: the names of the adapters that a policy trains; whether these policies can be trained. */
size_t psoup__ppo_adapters(const psoup_ppo_policy *policy, const char *const **names);
psoup_status psoup__ppo_check_policies(const psoup_model *model, const psoup_ppo_policy *policies, size_t n,
                                       psoup_error *error);
/* Finds each policy's adapters where they are now; PSOUP_ERROR_STATE when one is gone. */
psoup_status psoup__ppo_refresh(psoup_ppo *ppo, psoup_error *error);
/* The prompts of a policy's next batch, into its experience. */
psoup_status psoup__ppo_next_prompts(psoup_ppo *ppo, psoup__policy *policy, psoup_error *error);

/* report.c: of responses, means over them. */
typedef struct psoup__ppo_summary {
    double reward, deviation; /* of the scores; the deviation unbiased */
    double kl;                /* the summed estimates of their tokens */
    double repetition, empty; /* the share of 4-grams that repeat one of the same response; of empty responses */
} psoup__ppo_summary;
psoup_status psoup__ppo_report(const psoup_ppo *ppo, const psoup__policy *policy, const psoup__experience *x,
                               psoup__metrics *metrics, psoup__ppo_summary *out, psoup_error *error);
/* What the clock says of the step of the first n active policies. */
void psoup__ppo_report_times(psoup_ppo *ppo, size_t n);

/* watch.c: how many of the n − 3 n-grams of length 4 stand in the response before. `table` is scratch, of a power
 * of two above 2 n. */
size_t psoup__repeated_grams(const int32_t *tokens, size_t n, int32_t *table, size_t size);
/* Notes what a step saw in the policy's `next`, adds to its metrics, and warns by the context's log of what has not
 * held the step before. */
void psoup__ppo_watch(const psoup_ppo *ppo, psoup__policy *policy, const psoup__ppo_summary *seen);

/* soup.c: refuses a soup, or inputs of its prompts, that make no sense. */
psoup_status psoup__soup_check(const psoup_ppo_policy *policy, psoup_error *error);
psoup_status psoup__soup_check_prompt(const psoup_ppo_policy *policy, const psoup_ppo_prompt *prompt,
                                      const char *what, size_t i, psoup_error *error);
/* Writes the mixes of rollouts, whose prompts are set; those of a group share one. Rollout i is number
 * first + i of the seed's. */
void psoup__draw_mixes(const psoup__policy *policy, psoup__rollouts *rollouts, uint64_t seed,
                       uint64_t first, size_t group);
/* Shares of the Dirichlet distribution with these parameters, which may be 0; in their place. */
void psoup__dirichlet(double *shares /* [n] */, size_t n, psoup__random *random);

/* rewards.c: refuses rewards that make no sense, or are trained themselves. */
psoup_status psoup__rewards_check(const psoup_ppo_policy *policy, psoup_error *error);
psoup_status psoup__rewards_check_prompt(const psoup_ppo_policy *policy, const psoup_ppo_prompt *prompt,
                                         const char *what, size_t i, psoup_error *error);
/* The k-th reward model of a policy, or NULL where that reward is a function; how many rewards it has. */
psoup_reward *psoup__rewards_model(const psoup_ppo_policy *policy, size_t k);
size_t psoup__rewards_count(const psoup_ppo_policy *policy);
/* Which of the policy's adapters the k-th is a reward of. */
size_t psoup__rewards_adapter(const psoup_ppo_policy *policy, size_t k);
/* The k-th as a source, without a metric; all of a policy's. */
psoup__source psoup__rewards_source(const psoup_ppo_policy *policy, size_t k);
psoup_status psoup__rewards_start(psoup_ppo *ppo, psoup__policy *policy, psoup_error *error);
void psoup__rewards_end(psoup_context *context, psoup__policy *policy);
/* Moves the step's trends and moments on by its scores. */
void psoup__update_moments(const psoup_ppo_options *options, psoup__policy *policy, float *scratch /* [rollouts] */,
                           float *more /* [rollouts] */);
/* What response i earned: its score, corrected for length, normalised, less its length's penalty. */
double psoup__earned(const psoup_ppo_options *options, const psoup__policy *policy, size_t i);
/* "reward/NAME" of each of several rewards. */
void psoup__report_rewards(const psoup_ppo_options *options, const psoup__policy *policy,
                           const psoup__rollouts *rollouts, psoup__metrics *metrics);

/* update.c: log π, log π_ref and, with values, V of every response token, without dropout. Reads
 * each policy's validation instead of its experience where `validation`. */
psoup_status psoup__ppo_evaluate(psoup_ppo *ppo, psoup__policy *const *policies, size_t n,
                                 bool validation, psoup_error *error);
/* The epochs of clipped updates on the policies' experience; adds to their metrics. */
psoup_status psoup__ppo_update(psoup_ppo *ppo, psoup__policy *const *policies, size_t n,
                               psoup_error *error);

/* samples.c: makes those whose samples are due now the active ones, and counts them. */
size_t psoup__ppo_samples_due(psoup_ppo *ppo);
/* Samples the first n of the active policies, and tells of it. */
psoup_status psoup__ppo_sample(psoup_ppo *ppo, size_t n, psoup_error *error);

/* ranks.c, of several ranks: what a step begins with is kept, where rank 0 keeps the run; and restored. */
psoup_status psoup__ppo_begin(psoup_ppo *ppo, size_t n, psoup_error *error);
void psoup__ppo_go_back(psoup_ppo *ppo);
/* Of an experience, what each rank evaluated of its share, to all. */
psoup_status psoup__ppo_share_evaluation(psoup_ppo *ppo, psoup__experience *x, bool values,
                                         psoup_error *error);
psoup_status psoup__ppo_share_ratios(psoup_ppo *ppo, psoup__experience *x, psoup_error *error);
/* What the ranks' shares of a mini-batch came to, its last loss group's apart, over all of them. */
psoup_status psoup__ppo_add_terms(psoup_ppo *ppo, psoup__loss_terms *terms, double *last_kl,
                                  int64_t *last_tokens, psoup_error *error);

/* pause.c, where the run is kept: samples what the first n requests want, of the active policies. on_step may say stop
 * meanwhile, to any rank: PSOUP_ERROR_CANCELLED. In a step the policies' `begun` has the responses so far, which a
 * checkpoint holds from time to time; with those it goes on. */
psoup_status psoup__ppo_draw(psoup_ppo *ppo, size_t n, bool stepping, psoup_error *error);
/* The same between two phases of a step. */
psoup_status psoup__ppo_pause(psoup_ppo *ppo, size_t n, psoup_error *error);
/* The step that checkpoints are called by. */
int64_t psoup__ppo_steps_done(const psoup_ppo *ppo);

/* checkpoint.c: takes checkpoint_dir, and goes on from what is there. */
psoup_status psoup__ppo_start_checkpoint(psoup_ppo *ppo, psoup_error *error);

#endif
