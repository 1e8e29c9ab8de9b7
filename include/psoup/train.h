/* psoup/train.h: supervised fine-tuning, reward models and DPO, on the adapters of one model.
 *
 * Everything trains in place: the named adapters of the psoup_model change, the base stays (but for
 * psoup_sft without an adapter). An adapter that holds NaN or an infinity is refused. Several reward models
 * and several policies train side by side in one batch; each one's result carries the same bits as when it
 * trains alone (on the CPU).
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
    const char *phase;   /* "train" or "validation"; or "pause", of PPO with a checkpoint_dir: there is nothing to tell
                          * (n is 0), but a moment to stop, between two tokens or two phases of step `step` */
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
 * far, and how long the metrics file was; of a PPO step in progress also the responses so far. They are written
 * beside, synced and renamed: one before the first step, one every checkpoint_every steps, one after the last, one when
 * on_step stops the run, and one a minute while a PPO step samples for so long.
 * Kill the program at any moment; the same call with resume = 1, on the same model as it was before
 * training, goes on from the newest and ends with the same bytes of weights and metrics on the CPU (same
 * build, same instruction set). What was done since is done again, from the same random words; responses that a
 * checkpoint has are not, and those that it has in part go on behind their last token.
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
    float length_penalty; /* what each token of a response costs the policy: below. Since 0.5 */
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
 * "reward_chosen" and "reward_rejected". Steps of a policy with fewer pairs end earlier.
 * With length_penalty α a response's r has α for each of its tokens too, in the loss and in reports (Park et al. 2024,
 * arXiv 2403.19159): of what was preferred, so much is put down to its length, and the policy that the loss leads to is
 * the optimum of that reward less α for each token. */
psoup_status psoup_dpo(psoup_model *model, const char *const *policies, size_t n_policies,
                       const psoup_dpo_pair *train, size_t n_train,
                       const psoup_dpo_pair *validation, size_t n_validation,
                       const psoup_dpo_options *options, psoup_error *error);
/* The same, to be taken step by step. */
psoup_status psoup_dpo_create(psoup_model *model, const char *const *policies, size_t n_policies,
                              const psoup_dpo_pair *train, size_t n_train,
                              const psoup_dpo_pair *validation, size_t n_validation,
                              const psoup_dpo_options *options, psoup_training **out, psoup_error *error);

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
/* Since 0.5. */
psoup_status psoup_dpo_memory(psoup_model *model, const char *const *policies, size_t n_policies,
                              const psoup_dpo_pair *train, size_t n_train,
                              const psoup_dpo_pair *validation, size_t n_validation,
                              const psoup_dpo_options *options, psoup_memory *out, psoup_error *error);

#ifdef __cplusplus
}
#endif
#endif
