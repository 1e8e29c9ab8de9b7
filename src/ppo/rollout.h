/* src/ppo/rollout.h: responses and their scores, for PPO and for best of n. */
#ifndef PSOUP__ROLLOUT_H
#define PSOUP__ROLLOUT_H

#include "psoup/ppo.h"
#include "train/checkpoint.h"

/* ---- rollout.c, score.c -------------------------------------------------------------------------- */

/* Responses of one policy, one after another. */
typedef struct psoup__rollouts {
    size_t n, tokens, adapters, sources, capacity, token_capacity;
    const psoup_ppo_prompt **prompt; /* [n] */
    float *weight; /* [n, adapters] each response's mix over its policy's adapters */
    float *share;  /* [n, sources] how much of its score each reward's is, of a soup's with its adapter's part of the
                    * mix; 0: it was not asked */
    float *part_score; /* [n, sources] what each reward gave */
    int32_t *start;                  /* [n + 1] */
    int32_t *response;               /* [tokens] */
    psoup_finish *finish;            /* [n] */
    float *score;                    /* [n] Σ share · part_score */
    bool *mine;                      /* [n] dealt to this rank, of several, for what is done now */
    bool diverged;                   /* logits were not numbers: there is nothing here */
} psoup__rollouts;
psoup_status psoup__rollouts_reserve(psoup__rollouts *rollouts, psoup_context *context, size_t n,
                                     size_t adapters, size_t sources, psoup_error *error);
void psoup__rollouts_free(psoup__rollouts *rollouts, psoup_context *context);

/* One reward of a policy. */
typedef struct psoup__source {
    psoup_reward *model; /* or NULL, and then: */
    psoup_reward_fn function;
    void *user;
    float weight;
    size_t adapter; /* which of the policy's it is a reward of */
    char *metric; /* "reward/NAME"; NULL: it is the only one, and "reward" says all */
} psoup__source;

/* What one policy wants: out->n prompts, set by the caller. */
typedef struct psoup__request {
    const psoup_ppo_policy *policy;
    const psoup__source *sources; /* [out->sources] */
    const int32_t *adapters; /* [out->adapters] their numbers in the model */
    uint64_t seed, sequence; /* of its sampling; rollout i takes sequence + i */
    uint64_t step;         /* of the drawn limits */
    bool draw;             /* draw limits, where the options say so */
    const psoup__begun *begun; /* responses that there are already, whole or in part; NULL or empty: none */
    psoup__rollouts *out;
} psoup__request;

/* begun.c: responses that may not be finished (PSOUP_FINISH_NONE), as a checkpoint holds them: of each how many tokens
 * it has and its finish, then all tokens, one response after another. */
psoup_status psoup__begun_keep(psoup__begun *begun, const psoup__rollouts *rollouts, psoup_context *context,
                               psoup_error *error);
/* Whether it is of n responses of at most `most` tokens, or empty. */
bool psoup__begun_fits(const psoup__begun *begun, size_t n, size_t most, int32_t vocab_size);

/* What is asked between decoding steps, by the thread that samples. */
typedef enum psoup__answer { PSOUP__GO_ON, PSOUP__KEEP, PSOUP__STOP } psoup__answer;
typedef struct psoup__pause {
    psoup__answer (*ask)(void *user);
    psoup_status (*keep)(void *user, psoup_error *error); /* after PSOUP__KEEP: every request's out has what there is */
    void *user;
    bool stopped; /* out: on this rank, where out may have responses that are not finished */
} psoup__pause;
/* Shares rollouts out by their prompts, those of one prompt together; or by prompts and responses. */
void psoup__rollouts_deal(psoup__rollouts *rollouts, psoup__team *team, bool responses);
/* How n rollouts decode: *sessions receives in how many sessions side by side; returns how many of them together in
 * each. */
int32_t psoup__rollout_places(const psoup_model *model, size_t n, int32_t max_sequences,
                              size_t *sessions);
/* Samples for all policies in one continuous batch; each rank its share, and all have all afterwards. pause may be
 * NULL; ranks keep nothing on the way. */
psoup_status psoup__sample_rollouts(psoup_model *model, psoup__team *team, const psoup_ppo_options *options,
                                    const psoup__request *requests, size_t n, psoup__pause *pause, psoup_error *error);
/* Fills out->score of every request, by callbacks or by reward models, all in shared passes; likewise. */
psoup_status psoup__score_rollouts(psoup_model *model, psoup__team *team, const psoup_ppo_options *options,
                                   const psoup__request *requests, size_t n, psoup_error *error);

#endif
