/* psoup/train.h: supervised fine-tuning, reward models, DPO and PPO, on the adapters of one model.
 *
 * Everything trains in place: the named adapters of the psoup_model change, the base stays (but for
 * psoup_sft without an adapter). Several reward models and several policies train side by side in one
 * batch; each one's result carries the same bits as when it trains alone (on the CPU).
 */
#ifndef PSOUP_TRAIN_H
#define PSOUP_TRAIN_H

#include "psoup/comm.h"
#include "psoup/data.h"
#include "psoup/model.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- what a trainer tells ------------------------------------------------------------------- */

/* One report: the metrics of one step, or of one validation. Valid during the call. */
typedef struct psoup_step {
    size_t size;
    const char *phase;   /* "train" or "validation" */
    const char *subject; /* the adapter trained; "base" for a base */
    int64_t step, total; /* from 1; optimiser steps (sft, reward, dpo) or PPO steps */
    size_t n;
    const char *const *names; /* [n] "loss", "reward", "kl", … */
    const double *values;     /* [n] */
    /* What the clock says of a training step, of all that train side by side: "seconds",
     * "tokens_per_second" (tokens that went through the update; with PPO tokens sampled, over the whole
     * step's time), and of PPO "rollout_seconds", "score_seconds", "evaluate_seconds" (log-probabilities and
     * values) and "update_seconds". No part of the metrics file, whose bytes a run that goes on repeats. */
    size_t n_times;
    const char *const *time_names; /* [n_times] */
    const double *times;           /* [n_times] */
} psoup_step;
/* Return non-zero to stop: the trainer returns PSOUP_ERROR_CANCELLED with its weights as they are. With
 * a checkpoint_dir it first keeps them, so that the run can go on. */
typedef int (*psoup_step_fn)(void *user, const psoup_step *step);

typedef enum psoup_schedule {
    PSOUP_SCHEDULE_CONSTANT = 0,
    PSOUP_SCHEDULE_LINEAR = 1, /* would be 0 one step after the last */
    PSOUP_SCHEDULE_COSINE = 2
} psoup_schedule;

/* ---- going on ------------------------------------------------------------------------------------
 *
 * With checkpoint_dir a trainer keeps its whole run there, in files checkpoint-STEP.safetensors.zst:
 * weights, moments, schedules, counters of the random words, its place in the data, the best weights so
 * far, and how long the metrics file was. They are written beside, synced and renamed: one before the
 * first step, one every checkpoint_every steps, one after the last, and one when on_step stops the run.
 * Kill the program at any moment; the same call with resume = 1, on the same model as it was before
 * training, goes on from the newest and ends with the same bytes of weights and metrics on the CPU (same
 * build, same instruction set). What was done since is done again, from the same random words: rollouts
 * of a PPO step that was not finished are sampled again.
 *
 * A checkpoint of another version, base, adapter, reward model, option or data is refused with
 * PSOUP_ERROR_STATE, naming the difference; a damaged one with PSOUP_ERROR_FORMAT; so is a directory with
 * checkpoints when resume is 0. Where the metrics file lies, the four options themselves and
 * gradient_checkpointing may differ.
 * Only one run at a time may use a directory. A checkpoint that cannot be written ends the run with that
 * error; the ones before stay as they are. */

/* ---- several processes ---------------------------------------------------------------------------
 *
 * With `comm` (psoup/comm.h) every rank calls the trainer with the same model, data and options; other
 * adapters, options or rows are refused with PSOUP_ERROR_STATE. Each takes a share of a step's rows, and all
 * of them its sums: losses, normalisation, early stops and skipped steps are of the whole batch, dropout and
 * sampling draw the words of a row's place in it, and all end with the same weights. Reports are told to
 * every rank's on_step, and one that says stop stops all; the metrics file and the checkpoints are rank 0's.
 * A run may go on with another number of ranks. When a rank is gone the others return PSOUP_ERROR_IO, and
 * rank 0 first keeps the run as it was after the last whole step. */

/* ---- step by step -------------------------------------------------------------------------------
 *
 * psoup_sft, psoup_reward_train and psoup_dpo in pieces, with the same bits, reports and checkpoints. What
 * is given to the functions that create one, options' texts and callbacks included, is borrowed until
 * psoup_training_free; adapters may be added to the model and removed between steps, but for those that
 * train. One training or psoup_ppo trains an adapter at a time. */
typedef struct psoup_training psoup_training;
/* One optimiser step of everyone who has steps to go, and the validation that is due before or after it.
 * *remaining (may be NULL) receives how many steps are left. When there are none, psoup_training_run has
 * nothing left to do but to leave the best weights. */
psoup_status psoup_training_step(psoup_training *training, int64_t *remaining, psoup_error *error);
/* Steps to the end, and leaves the best weights in place, with keep_best. */
psoup_status psoup_training_run(psoup_training *training, psoup_error *error);
/* Ends it with the weights as they are; takes NULL. It must go before its model. */
void psoup_training_free(psoup_training *training);

/* ---- supervised fine-tuning ------------------------------------------------------------------- */

typedef struct psoup_example {
    const int32_t *tokens; /* prompt, completion and, if wanted, the end token */
    size_t n;
    size_t n_prompt; /* the first n_prompt tokens carry no loss */
} psoup_example;

typedef struct psoup_sft_options {
    size_t size;
    int32_t epochs;
    int32_t max_steps;    /* optimiser steps; 0: epochs decide */
    int32_t batch_tokens; /* tokens of one micro-batch at most: examples are packed without padding,
                           * and never attend to one another */
    int32_t accumulation; /* micro-batches of one optimiser step */
    float learning_rate, beta1, beta2, epsilon, weight_decay;
    float max_grad_norm; /* 0: not clipped */
    int32_t schedule;    /* psoup_schedule */
    int32_t warmup_steps;
    float lora_dropout;
    int32_t loss_on_prompt; /* 1: every token counts */
    int32_t validate_every; /* steps; 0: at the end only */
    int32_t keep_best;      /* 1: end with the weights of the lowest validation loss */
    uint64_t seed;
    const char *metrics; /* JSON Lines file that every report is appended to; NULL: none */
    psoup_step_fn on_step;
    void *user;
    const char *checkpoint_dir; /* where the run is kept, so that it can go on; NULL: nowhere */
    int32_t checkpoint_every;   /* optimiser steps between checkpoints; 0: when it is stopped only */
    int32_t checkpoint_keep;    /* so many stay */
    int32_t resume; /* 1: continue from the newest checkpoint in checkpoint_dir, where there is one */
    float max_grad_value; /* elements of a gradient beyond ± this are set to it, before its norm is taken; 0: not */
    const psoup_comm *comm; /* the other processes that train the same run; NULL: there are none */
    int32_t gradient_checkpointing; /* since 0.4; 1: keep each layer's input alone, and run the layer again in the
                                     * backward. Less memory, more time, the same bits: docs/training.md */
    int32_t reserved; /* 0 */
} psoup_sft_options;
#define PSOUP_SFT_OPTIONS_INIT                                                                     \
    {.size = sizeof(psoup_sft_options), .epochs = 1, .batch_tokens = 1024, .accumulation = 1,      \
     .learning_rate = 1e-5f, .beta1 = 0.9f, .beta2 = 0.999f, .epsilon = 1e-8f,                     \
     .max_grad_norm = 1.0f, .keep_best = 1, .checkpoint_every = 100, .checkpoint_keep = 3}
/* The options above as data, for configuration files; callbacks and size are not in it. Static. */
const psoup_field *psoup_sft_fields(void);

/* Trains the named adapter, or with adapter NULL the base's own weights (kept in f32 meanwhile).
 * The loss is the mean over the completion tokens of an optimiser step. */
psoup_status psoup_sft(psoup_model *model, const char *adapter, const psoup_example *train,
                       size_t n_train, const psoup_example *validation, size_t n_validation,
                       const psoup_sft_options *options, psoup_error *error);
/* The same, to be taken step by step. */
psoup_status psoup_sft_create(psoup_model *model, const char *adapter, const psoup_example *train,
                              size_t n_train, const psoup_example *validation, size_t n_validation,
                              const psoup_sft_options *options, psoup_training **out, psoup_error *error);

/* ---- reward models ------------------------------------------------------------------------------ */

/* A reward model: an adapter with a scalar head over a model's base. Its score is the head's output
 * on the last token. Several share one base. */
typedef struct psoup_reward psoup_reward;

/* Makes a new one: adds adapter `name` (options as for psoup_model_add_adapter) with a zero head. */
psoup_status psoup_reward_create(psoup_model *model, const char *name,
                                 const psoup_adapter_options *options, psoup_reward **out,
                                 psoup_error *error);
/* Reads a PEFT directory of task type SEQ_CLS. */
psoup_status psoup_reward_load(psoup_model *model, const char *name, const char *directory,
                               psoup_reward **out, psoup_error *error);
/* Writes such a directory. The head's bias, which transformers' score has none of, is written only where
 * it is not 0: training moves it only with `centering`. */
psoup_status psoup_reward_save(const psoup_reward *reward, const char *directory,
                               const char *base_name, psoup_error *error);
const char *psoup_reward_name(const psoup_reward *reward);
/* Frees the handle, which must go before its model; the adapter stays in the model. */
void psoup_reward_free(psoup_reward *reward);
/* out[i] = score of rows[i] (its mix is not read). The same bits for any batch. */
psoup_status psoup_reward_score(psoup_reward *reward, const psoup_row *rows, size_t n, float *out,
                                psoup_error *error);

typedef struct psoup_comparison {
    const int32_t *chosen; /* prompt and response, as scored */
    size_t n_chosen;
    const int32_t *rejected;
    size_t n_rejected;
    int32_t reward; /* which of the rewards it trains */
    float margin;   /* read where psoup_reward_options.margins says so; by how much the annotators preferred it:
                     * Touvron et al. 2023 (Llama 2), arXiv 2307.09288, equation 2 */
} psoup_comparison;

typedef struct psoup_reward_options {
    size_t size;
    int32_t epochs;
    int32_t max_steps;
    int32_t batch_size;   /* comparisons of one micro-batch, per reward model */
    int32_t accumulation;
    float learning_rate, beta1, beta2, epsilon, weight_decay;
    float max_grad_norm;
    int32_t schedule, warmup_steps;
    float lora_dropout;
    float margin;    /* loss −log σ(r_w − r_l − margin) */
    float centering; /* adds centering · mean((r_w + r_l)²) */
    int32_t max_tokens; /* longer rows keep their first tokens; 0: max_position_embeddings */
    int32_t validate_every;
    int32_t keep_best; /* by validation accuracy, then loss */
    uint64_t seed;
    const char *metrics;
    psoup_step_fn on_step;
    void *user;
    const char *checkpoint_dir; /* where the run is kept, so that it can go on; NULL: nowhere */
    int32_t checkpoint_every;   /* optimiser steps between checkpoints; 0: when it is stopped only */
    int32_t checkpoint_keep;    /* so many stay */
    int32_t resume; /* 1: continue from the newest checkpoint in checkpoint_dir, where there is one */
    float max_grad_value; /* elements of a gradient beyond ± this are set to it, before its norm is taken; 0: not */
    int32_t margins;  /* 1: each comparison's own margin is added to `margin` */
    int32_t gradient_checkpointing; /* since 0.4; 1: keep each layer's input alone, and run the layer again in the
                                     * backward. Less memory, more time, the same bits: docs/training.md */
    const psoup_comm *comm; /* the other processes that train the same run; NULL: there are none */
} psoup_reward_options;
/* The paper's: AdamW 2e-5, decay 0.001, linear to 0, no warm-up, one epoch, 512 tokens. */
#define PSOUP_REWARD_OPTIONS_INIT                                                                  \
    {.size = sizeof(psoup_reward_options), .epochs = 1, .batch_size = 8, .accumulation = 1,        \
     .learning_rate = 2e-5f, .beta1 = 0.9f, .beta2 = 0.999f, .epsilon = 1e-8f,                     \
     .weight_decay = 0.001f, .schedule = PSOUP_SCHEDULE_LINEAR, .max_tokens = 512,                 \
     .keep_best = 1, .checkpoint_every = 100, .checkpoint_keep = 3}
const psoup_field *psoup_reward_fields(void);

/* Bradley–Terry training, −log σ(r_chosen − r_rejected) averaged, of n_rewards models of one base,
 * side by side. Steps of a model with fewer comparisons end earlier. */
psoup_status psoup_reward_train(psoup_reward *const *rewards, size_t n_rewards,
                                const psoup_comparison *train, size_t n_train,
                                const psoup_comparison *validation, size_t n_validation,
                                const psoup_reward_options *options, psoup_error *error);
/* The same, to be taken step by step. */
psoup_status psoup_reward_train_create(psoup_reward *const *rewards, size_t n_rewards,
                                       const psoup_comparison *train, size_t n_train,
                                       const psoup_comparison *validation, size_t n_validation,
                                       const psoup_reward_options *options, psoup_training **out,
                                       psoup_error *error);
/* The fraction of comparisons with r_chosen > r_rejected, and the mean loss; either may be NULL. */
psoup_status psoup_reward_accuracy(psoup_reward *const *rewards, size_t n_rewards,
                                   const psoup_comparison *comparisons, size_t n, double *accuracy,
                                   double *loss, psoup_error *error);

/* ---- DPO ------------------------------------------------------------------------------------------ */

/* Two responses to one prompt. */
typedef struct psoup_dpo_pair {
    const int32_t *prompt;
    size_t n_prompt;
    const int32_t *chosen; /* the response alone, with the end token if wanted */
    size_t n_chosen;
    const int32_t *rejected;
    size_t n_rejected;
    int32_t policy; /* which of the policies it trains */
    int32_t reserved[3]; /* 0 */
} psoup_dpo_pair;

typedef struct psoup_dpo_options {
    size_t size;
    int32_t epochs;
    int32_t max_steps;
    int32_t batch_size;   /* pairs of one micro-batch, per policy */
    int32_t accumulation;
    float learning_rate, beta1, beta2, epsilon, weight_decay;
    float max_grad_norm;
    int32_t schedule, warmup_steps;
    float lora_dropout;
    float beta;            /* how dearly the policy pays for leaving the reference */
    float label_smoothing; /* the share of pairs taken to be the wrong way round; 0 to 0.5 */
    int32_t max_tokens; /* longer rows keep their first tokens; 0: max_position_embeddings */
    int32_t validate_every;
    int32_t keep_best; /* by validation accuracy, then loss */
    uint64_t seed;
    const char *metrics;
    psoup_step_fn on_step;
    void *user;
    const char *checkpoint_dir; /* where the run is kept, so that it can go on; NULL: nowhere */
    int32_t checkpoint_every;   /* optimiser steps between checkpoints; 0: when it is stopped only */
    int32_t checkpoint_keep;    /* so many stay */
    int32_t resume; /* 1: continue from the newest checkpoint in checkpoint_dir, where there is one */
    float max_grad_value; /* elements of a gradient beyond ± this are set to it, before its norm is taken; 0: not */
    const psoup_comm *comm; /* the other processes that train the same run; NULL: there are none */
    int32_t gradient_checkpointing; /* since 0.4; 1: keep each layer's input alone, and run the layer again in the
                                     * backward. Less memory, more time, the same bits: docs/training.md */
    int32_t reserved; /* 0 */
} psoup_dpo_options;
#define PSOUP_DPO_OPTIONS_INIT                                                                     \
    {.size = sizeof(psoup_dpo_options), .epochs = 1, .batch_size = 8, .accumulation = 1,           \
     .learning_rate = 1e-5f, .beta1 = 0.9f, .beta2 = 0.999f, .epsilon = 1e-8f,                     \
     .max_grad_norm = 1.0f, .schedule = PSOUP_SCHEDULE_LINEAR, .beta = 0.1f, .max_tokens = 1024,   \
     .keep_best = 1, .checkpoint_every = 100, .checkpoint_keep = 3}
const psoup_field *psoup_dpo_fields(void);

/* Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7) of n_policies
 * adapters of one model, side by side. With r = beta · (log π − log π_ref) of a whole response, the
 * reference being the base, the loss is −(1 − s) log σ(r_chosen − r_rejected)
 * − s log σ(r_rejected − r_chosen), s = label_smoothing (conservative DPO), averaged over a step's
 * pairs. Reports "loss", "accuracy" (how often r_chosen > r_rejected), "margin" (their mean difference),
 * "reward_chosen" and "reward_rejected". Steps of a policy with fewer pairs end earlier. */
psoup_status psoup_dpo(psoup_model *model, const char *const *policies, size_t n_policies,
                       const psoup_dpo_pair *train, size_t n_train,
                       const psoup_dpo_pair *validation, size_t n_validation,
                       const psoup_dpo_options *options, psoup_error *error);
/* The same, to be taken step by step. */
psoup_status psoup_dpo_create(psoup_model *model, const char *const *policies, size_t n_policies,
                              const psoup_dpo_pair *train, size_t n_train,
                              const psoup_dpo_pair *validation, size_t n_validation,
                              const psoup_dpo_options *options, psoup_training **out, psoup_error *error);

/* ---- PPO ------------------------------------------------------------------------------------------ */

/* One way in which a response is scored: reward model `reward` reads `tokens` and then the response.
 * The response's score is Σ weight · score over the prompt's list. */
typedef struct psoup_reward_input {
    int32_t reward; /* index into psoup_ppo_policy.rewards, or sources */
    float weight;
    const int32_t *tokens;
    size_t n;
} psoup_reward_input;

typedef struct psoup_ppo_prompt {
    const int32_t *tokens; /* what the policy reads */
    size_t n;
    /* NULL: rewards[0] of the policy reads the same tokens, weight 1. P-MORL lists three. */
    const psoup_reward_input *inputs;
    size_t n_inputs;
    int64_t id; /* the caller's, given back to callbacks */
    uint64_t reserved[2]; /* 0 */
} psoup_ppo_prompt;

typedef struct psoup_rollout {
    const char *policy;
    const psoup_ppo_prompt *prompt;
    const int32_t *response; /* [n], with its end token if it has one */
    size_t n;
    psoup_finish finish;
    uint64_t reserved[2]; /* 0 */
} psoup_rollout;
/* Scores n rollouts; return non-zero on failure. */
typedef int (*psoup_reward_fn)(void *user, const psoup_rollout *rollouts, size_t n, float *scores);

/* One of several rewards of a policy: a reward model, or a function of the caller's. Reports have "reward/NAME", the
 * mean of what it gave. */
typedef struct psoup_reward_source {
    const char *name;    /* of no other source of the policy; NULL: the reward model's */
    psoup_reward *model; /* or NULL, and then: */
    psoup_reward_fn function;
    void *user;
    float weight; /* of its score in the response's reward */
    int32_t reserved; /* 0 */
    uint64_t reserved2[2]; /* 0 */
} psoup_reward_source;

/* Told of the responses [n] of one policy to its sampled prompts, as it is after `step` steps, and of their
 * scores; return non-zero to stop the run, as with psoup_step_fn. Everything is valid during the call. */
typedef int (*psoup_samples_fn)(void *user, int64_t step, const psoup_rollout *rollouts,
                                const float *scores, size_t n);

/* A soup that is trained for what it will be used for: its adapters learn as one policy while each prompt
 * of a step is answered under a mix of its own. A prompt's mix is over the adapters whose rewards its inputs
 * name (one of each dimension, where it was made for one user), or over all where it lists none: drawn from
 * the Dirichlet distribution with parameters concentration · weight_k · m / Σ weight over those m inputs.
 * A response's reward is Σ mix_i · reward_i, each reward normalised by its own moments, and its value is
 * Σ mix_i · head_i, a head of each adapter: what one user's mix promises is then linear in the mix, as what
 * it is paid is. Responses of one group (RLOO, GRPO) share a mix. One optimiser steps all its adapters, and
 * clips by their common norm. A soup whose every mix is one and the same adapter trains it to the bits of
 * its policy alone. Reports have also "reward/ADAPTER", the mean of what an adapter's reward gave to the
 * responses that had it in their mix. */
typedef struct psoup_ppo_soup {
    size_t size;
    const char *const *adapters; /* [n] trained in place; reward i is what adapter i is trained for */
    size_t n;                    /* 1 to 64 */
    float concentration; /* 1 and equal weights: uniform over the simplex; large: ever closer to the weights'
                          * own shares, which INFINITY gives; 0: always one adapter, drawn by the weights */
    int32_t reserved;    /* 0 */
} psoup_ppo_soup;
#define PSOUP_PPO_SOUP_INIT {.size = sizeof(psoup_ppo_soup), .concentration = 1.0f}

typedef struct psoup_ppo_policy {
    const char *adapter; /* trained in place; a value head is added to it. With a soup: its name */
    psoup_reward *const *rewards;
    size_t n_rewards;
    psoup_reward_fn reward_fn; /* instead of reward models when not NULL */
    void *reward_user;
    const psoup_ppo_prompt *prompts;
    size_t n_prompts;
    const psoup_ppo_prompt *validation; /* best checkpoint by mean reward on these; may be none */
    size_t n_validation;
    uint64_t seed; /* of its sampling, shuffling, mixes and dropout */
    /* NULL: one adapter. Else n_rewards is the soup's n; reward_fn is called once for each adapter, as
     * rollouts' policy, with the responses that have it in their mix; and inputs name no reward twice. */
    const psoup_ppo_soup *soup;
    /* Several rewards at once, instead of rewards and reward_fn when not NULL: a response's score is Σ weight · score
     * over them. A function scores every response. A model reads what the prompt's inputs that name it say (`reward`
     * is an index into sources then, and its score Σ weight · score over those inputs); where a prompt lists none,
     * every model reads the prompt. Not with a soup. */
    const psoup_reward_source *sources;
    size_t n_sources;     /* 1 to 64 */
    uint64_t reserved[1]; /* 0 */
} psoup_ppo_policy;

typedef enum psoup_early_stop {
    PSOUP_EARLY_STOP_OFF = 0,
    PSOUP_EARLY_STOP_ALL = 1, /* on the mean over all mini-batches of an epoch */
    PSOUP_EARLY_STOP_LAST = 2 /* on the epoch's last loss group, as the paper's code did */
} psoup_early_stop;

/* What a response's reward is measured against. RLOO and GRPO sample group_size responses to each prompt
 * and have no critic: no value head is made or trained, and gamma, lambda, clip_range_value,
 * value_coefficient, whiten_advantages, whiten_groups and head_dropout are of PPO alone. */
typedef enum psoup_objective {
    PSOUP_OBJECTIVE_PPO = 0, /* what a critic expects: Schulman et al. 2017, arXiv 1707.06347 */
    /* The mean of the group's others; the KL penalty is in the reward. A whole response has one ratio, and
     * the loss is the mean over responses. Ahmadian et al. 2024, arXiv 2402.14740. */
    PSOUP_OBJECTIVE_RLOO = 1,
    /* The group's mean, in units of its deviation (scale_rewards); the KL penalty is a term of each token's
     * loss, kl_coefficient · (π_ref/π − log(π_ref/π) − 1) (kl_estimator). The paper's mean of means is
     * loss_group 1. Shao et al. 2024, arXiv 2402.03300, equations 3 and 4. */
    PSOUP_OBJECTIVE_GRPO = 2
} psoup_objective;

/* How KL(π ‖ π_ref) is estimated from a token that π drew, with d = log π − log π_ref: Schulman 2020, "Approximating
 * KL Divergence". It is what the penalty in the reward of PPO and RLOO costs, what "kl" reports and an adaptive
 * kl_coefficient follows, and the term of GRPO's loss. */
typedef enum psoup_kl_estimator {
    PSOUP_KL_DEFAULT = 0, /* k1; k3 in GRPO's loss: as the papers have it */
    PSOUP_KL_K1 = 1,      /* d: unbiased, of either sign. Refused with GRPO: the mean of its gradient is 0 */
    PSOUP_KL_K2 = 2,      /* d² / 2: never negative, biased; as a loss its mean gradient is that of KL(π ‖ π_ref) */
    PSOUP_KL_K3 = 3       /* e^−d − 1 + d: never negative, unbiased; as a loss its mean gradient is that of
                           * KL(π_ref ‖ π) */
} psoup_kl_estimator;

/* What GRPO's advantages, the rewards less their group's mean, are divided by. */
typedef enum psoup_scale_rewards {
    PSOUP_SCALE_GROUP = 0, /* their group's deviation: the paper's */
    PSOUP_SCALE_NONE = 1,  /* nothing: Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783. Questions whose answers are all
                            * alike weigh no more than others */
    PSOUP_SCALE_BATCH = 2  /* the deviation of all rewards of the step: Liu et al. 2025, arXiv 2508.08221 */
} psoup_scale_rewards;

typedef struct psoup_ppo_options {
    size_t size;
    int32_t steps;           /* 0: one epoch over the prompts */
    int32_t batch_size;      /* rollouts of one step, per policy */
    int32_t mini_batch_size; /* rollouts of one optimiser step; 0: the whole batch */
    int32_t loss_group; /* > 0: the loss is the mean over the tokens of each so many rollouts, averaged
                         * over these groups (the paper's code: micro-batches of 2); 0: over all tokens
                         * of the mini-batch. With RLOO read responses for tokens */
    int32_t ppo_epochs;
    int32_t micro_batch_tokens; /* tokens of one packed pass; changes memory, not results' meaning */
    float learning_rate, beta1, beta2, epsilon, weight_decay;
    float max_grad_norm; /* 0: not clipped */
    float gamma, lambda;
    float clip_range, clip_range_value, value_coefficient;
    int32_t early_stop; /* psoup_early_stop: after an epoch with mean(log π_old − log π) > 1.5 · */
    float target_kl;    /* target_kl */
    float kl_coefficient; /* β at the start */
    int32_t adaptive_kl;
    float kl_target, kl_horizon;
    float ratio_threshold; /* a mini-batch whose mean ratio exceeds it is skipped */
    int32_t skipped_step;  /* 1: a skipped mini-batch still steps the optimiser, with zero gradient */
    int32_t normalize_reward, whiten_advantages; /* the first: scores in deviations from their running mean */
    int32_t whiten_groups; /* whiten in this many equal parts of the batch; the code had one a rank */
    float lora_dropout, head_dropout; /* in updates only */
    int32_t max_new_tokens, min_new_tokens;
    int32_t draw_new_tokens_from; /* > 0: each group's limit is uniform on from … max_new_tokens */
    int32_t draw_group;           /* prompts that share a drawn limit */
    int32_t ignore_stop; /* 1: sample past end tokens, cut after the first */
    float temperature, top_p;
    int32_t top_k;
    float truncation_penalty; /* subtracted from the score of a response without an end token */
    int32_t reward_text;      /* 1: rewards read the decoded text, tokenised again (needs tokenizer) */
    int32_t reward_max_tokens; /* longer reward inputs keep their first tokens */
    int32_t max_sequences;     /* decoding together; 0: all of a step, on the CPU 256 of them */
    int32_t validate_every;    /* steps; 0: at the end only */
    int32_t keep_best;
    const char *metrics;
    psoup_step_fn on_step;
    void *user;
    const psoup_tokenizer *tokenizer;
    const char *checkpoint_dir; /* where the run is kept, so that it can go on; NULL: nowhere */
    int32_t checkpoint_every;   /* PPO steps between checkpoints; 0: when it is stopped only */
    int32_t checkpoint_keep;    /* so many stay */
    int32_t resume; /* 1: continue from the newest checkpoint in checkpoint_dir, where there is one */
    int32_t objective;  /* psoup_objective */
    int32_t group_size; /* responses to each prompt with RLOO and GRPO; divides batch_size */
    int32_t kl_estimator; /* psoup_kl_estimator */
    /* What the policies say. Before the first step, every samples_every steps and after the last, each
     * answers the same few of its validation prompts (of its prompts where it has none), always from the same
     * random words, which are no part of training. */
    int32_t samples_every; /* 0: never */
    int32_t samples_count; /* how many prompts: the first ones */
    const char *samples; /* JSON Lines file of "step", "policy", "id", "prompt", "response" (texts where there
                          * is a tokenizer, ids otherwise), "score" and "finish"; NULL: none. A run that goes
                          * on repeats its bytes, as with metrics */
    psoup_samples_fn on_samples; /* told of them too, with `user`; may be NULL */
    int32_t scale_rewards; /* psoup_scale_rewards, of GRPO */
    float max_grad_value;  /* elements of a gradient beyond ± this are set to it, before its norm is taken; 0: not */
    float reward_clip;     /* a normalised score is kept within ± this; 0: not */
    int32_t join; /* 1: as resume; and policies at the list's end that the checkpoint has not yet begin now,
                   * also where the others are done, whose weights keep their bytes. On the CPU a policy ends
                   * with the bytes that it would have if it had been there from the start */
    /* What is told by the context's log, and counted in "warnings", when it begins to hold; 0: not. Training is the
     * same. */
    float warn_repetition;  /* of the 4-grams of a step's responses more than this share repeat one before */
    float warn_empty;       /* more than this share of a step's responses are an end token and nothing else */
    float warn_reward_rise; /* from one half of the last warn_window steps to the other the mean reward rose by more
                             * deviations than this, at a KL that cannot buy such a rise */
    float warn_kl_growth;   /* KL grew by more than this factor, and above 1, while the mean reward fell */
    int32_t warn_window;    /* steps, 4 to 64 */
    int32_t gradient_checkpointing; /* 1: as in psoup_sft_options, in updates */
    int32_t normalize_apart; /* 1: each of several rewards is normalised by its own moments, and then weighted; 0: their
                              * weighted sum is. A soup's are apart in any case */
    float length_penalty;  /* subtracted from the reward for each token of a response beyond length_target, in */
    int32_t length_target; /* units of the normalised score */
    int32_t reserved;      /* 0 */
    const psoup_comm *comm; /* the other processes that train the same run; NULL: there are none */
} psoup_ppo_options;
#define PSOUP_PPO_OPTIONS_INIT                                                                     \
    {.size = sizeof(psoup_ppo_options), .batch_size = 64, .ppo_epochs = 8,                         \
     .micro_batch_tokens = 4096, .learning_rate = 1.4e-5f, .beta1 = 0.9f, .beta2 = 0.999f,         \
     .epsilon = 1e-8f, .max_grad_norm = 1.0f, .gamma = 1.0f, .lambda = 0.95f,                      \
     .clip_range = 0.2f, .clip_range_value = 0.2f, .value_coefficient = 0.1f,                      \
     .early_stop = PSOUP_EARLY_STOP_ALL, .target_kl = 0.1f, .kl_coefficient = 0.2f,                \
     .adaptive_kl = 1, .kl_target = 6.0f, .kl_horizon = 10000.0f, .ratio_threshold = 10.0f,        \
     .normalize_reward = 1, .whiten_advantages = 1, .whiten_groups = 1, .max_new_tokens = 511,     \
     .draw_group = 4, .temperature = 1.0f, .top_p = 1.0f, .reward_max_tokens = 512,                \
     .keep_best = 1, .checkpoint_every = 10, .checkpoint_keep = 3, .group_size = 4,               \
     .samples_count = 4, .warn_repetition = 0.5f, .warn_empty = 0.25f, .warn_reward_rise = 1.0f,   \
     .warn_kl_growth = 2.0f, .warn_window = 16}
const psoup_field *psoup_ppo_fields(void);
/* Sets the fields in which a named preset differs from the defaults: "default", or "rlphf", the
 * settings of the paper's released code. */
psoup_status psoup_ppo_preset(const char *name, psoup_ppo_options *options, psoup_error *error);

typedef struct psoup_ppo psoup_ppo;

/* The policies' prompts, rewards and callbacks are borrowed until psoup_ppo_free. */
psoup_status psoup_ppo_create(psoup_model *model, const psoup_ppo_policy *policies, size_t n,
                              const psoup_ppo_options *options, psoup_ppo **out,
                              psoup_error *error);
/* One step of every policy that still has steps to go: sample, score, update; and the validation and
 * samples that are due before or after it. *remaining receives how many steps are left. When there are none,
 * psoup_ppo_run has nothing left to do but to leave the best weights in the adapters. */
psoup_status psoup_ppo_step(psoup_ppo *ppo, int64_t *remaining, psoup_error *error);
/* Whether a policy's logits stopped being numbers, at which it left the run; the others go on. */
int psoup_ppo_diverged(const psoup_ppo *ppo, size_t policy);
/* Steps to the end, with validation, and leaves the best weights in the adapters. */
psoup_status psoup_ppo_run(psoup_ppo *ppo, psoup_error *error);
void psoup_ppo_free(psoup_ppo *ppo);

/* What the last step saw of one policy, token by token: for tests and for those who look closely.
 * Arrays are borrowed until the next call. Tokens of all rollouts, one after another. */
typedef struct psoup_ppo_trace {
    size_t size;
    size_t rollouts, tokens;
    const int32_t *start;      /* [rollouts + 1] into the arrays below */
    const int32_t *response;   /* [tokens] */
    const float *logprob;      /* [tokens] log π_old */
    const float *ref_logprob;  /* [tokens] log π_ref */
    const float *value;        /* [tokens] V_old; 0 without a critic */
    const float *reward;       /* [tokens] with the KL penalty (but with GRPO), the score on the last */
    const float *advantage;    /* [tokens] whitened; without a critic its response's */
    const float *returns;      /* [tokens]; without a critic its response's summed reward */
    const float *score;        /* [rollouts] as the reward gave it */
    const float *first_ratio;  /* [tokens] ratio in the first pass, before any update: all 1; NaN
                                * where a token's first pass came after an update */
    double kl_coefficient;     /* after the step */
    size_t adapters;           /* of the policy: 1 but for a soup */
    const float *mix;          /* [rollouts, adapters] what each response was sampled under */
} psoup_ppo_trace;
psoup_status psoup_ppo_get_trace(const psoup_ppo *ppo, size_t policy, psoup_ppo_trace *out,
                                 psoup_error *error);

/* ---- what a run takes --------------------------------------------------------------------------------
 *
 * psoup_memory of a call with these arguments (see psoup/model.h), which are checked as there. out->size must
 * be set. */
psoup_status psoup_sft_memory(psoup_model *model, const char *adapter, const psoup_example *train,
                              size_t n_train, const psoup_example *validation, size_t n_validation,
                              const psoup_sft_options *options, psoup_memory *out, psoup_error *error);
psoup_status psoup_reward_memory(psoup_reward *const *rewards, size_t n_rewards,
                                 const psoup_comparison *train, size_t n_train,
                                 const psoup_comparison *validation, size_t n_validation,
                                 const psoup_reward_options *options, psoup_memory *out,
                                 psoup_error *error);
psoup_status psoup_ppo_memory(psoup_model *model, const psoup_ppo_policy *policies, size_t n,
                              const psoup_ppo_options *options, psoup_memory *out,
                              psoup_error *error);

/* ---- best of n --------------------------------------------------------------------------------------
 *
 * Several answers to each prompt, of which a reward chooses one (rejection sampling: Stiennon et al. 2020,
 * arXiv 2009.01325). Since 0.4. */
typedef struct psoup_best_options {
    size_t size;
    int32_t n;           /* answers to each prompt */
    int32_t reward_text; /* 1: rewards read the decoded text, tokenised again (needs tokenizer) */
    psoup_reward *const *rewards;
    size_t n_rewards;
    psoup_reward_fn reward_fn; /* instead of reward models when not NULL; a rollout's policy is "best of n" */
    void *reward_user;
    const psoup_ppo_prompt *questions; /* what rewards read before the answer, one for each prompt, as with PPO;
                                        * NULL: rewards[0] reads the prompt itself, and ids count from 0 */
    const psoup_tokenizer *tokenizer;
    int32_t reward_max_tokens; /* longer reward inputs keep their first tokens; 0: what the model can hold */
    int32_t reserved;          /* 0 */
} psoup_best_options;
#define PSOUP_BEST_OPTIONS_INIT                                                                    \
    {.size = sizeof(psoup_best_options), .n = 4, .reward_max_tokens = 512}
/* *out receives all answers: number k to prompt i is psoup_generation_get(*out, i · options.n + k). chosen [n]
 * receives which k has the highest score, the first of equals, and scores [n, options.n], which may be NULL,
 * what they were: NaN of an answer whose logits were no numbers, which is chosen only where all are such.
 * The first answer is what psoup_generate gives, those of a larger options.n begin with those of a smaller
 * one, and all have the same bits in any batch. sampling and session as for psoup_generate; a temperature of
 * 0 is refused. */
psoup_status psoup_best_of_n(psoup_model *model, const psoup_prompt *prompts, size_t n,
                             const psoup_sampling *sampling, const psoup_session_options *session,
                             const psoup_best_options *options, psoup_generation **out, int32_t *chosen,
                             float *scores, psoup_error *error);

#ifdef __cplusplus
}
#endif
#endif
