/* psoup/ppo.h: PPO, RLOO and GRPO on adapters of one model, soups trained as one, and best of n.
 *
 * Policies train in place and side by side, as all of psoup/train.h does; each one's result carries the same bits
 * as when it trains alone (on the CPU). Three of them, on two rewards each:
 *
 *     psoup_reward_source paid[6]; // each policy's two, a reward model and a function
 *     psoup_ppo_policy policies[3];
 *     psoup_ppo_options options = PSOUP_PPO_OPTIONS_INIT;
 *     for (int k = 0; k < 3; k++) {
 *         paid[2 * k] = (psoup_reward_source){.name = "taste", .model = taste[k], .weight = 1.0f};
 *         paid[2 * k + 1] = (psoup_reward_source){.name = "short", .function = be_short, .weight = 0.1f};
 *         policies[k] = (psoup_ppo_policy){.adapter = names[k], .sources = paid + 2 * k, .n_sources = 2, .seed = k,
 *                                          .prompts = prompts[k], .n_prompts = n_prompts};
 *     }
 *     options.normalize_apart = 1;
 *     psoup_ppo_create(model, policies, 3, &options, &ppo, &error), psoup_ppo_run(ppo, &error), psoup_ppo_free(ppo);
 *
 * and then, from where they are, their soup, whose six rewards have names of their own and say whose they are:
 *
 *     psoup_ppo_soup soup = PSOUP_PPO_SOUP_INIT;
 *     soup.adapters = names, soup.n = 3;
 *     for (int k = 0; k < 6; k++)
 *         paid[k].name = six_names[k], paid[k].adapter = k / 2;
 *     psoup_ppo_policy one = {.adapter = "soup", .soup = &soup, .sources = paid, .n_sources = 6,
 *                             .prompts = prompts[0], .n_prompts = n_prompts};
 *     psoup_ppo_create(model, &one, 1, &options, &ppo, &error), psoup_ppo_run(ppo, &error), psoup_ppo_free(ppo);
 *
 * psoup_model_save_adapter writes what they learned.
 */
#ifndef PSOUP_PPO_H
#define PSOUP_PPO_H

#include "psoup/train.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- PPO ------------------------------------------------------------------------------------------ */

/* One way in which a response is scored: reward model `reward` reads `tokens` and then the response.
 * The response's score is Σ weight · score over the prompt's list; a soup's lists say what is mixed (psoup_ppo_soup). */
typedef struct psoup_reward_input {
    int32_t reward; /* index into psoup_ppo_policy.rewards, or sources */
    float weight;   /* of a soup's policy: how much that reward's adapter weighs in the mix */
    const int32_t *tokens;
    size_t n;
} psoup_reward_input;

typedef struct psoup_ppo_prompt {
    const int32_t *tokens; /* what the policy reads */
    size_t n;
    /* NULL: rewards[0] of the policy, of sources and of a soup's rewards every model, reads the same tokens, weight 1.
     * P-MORL lists three. */
    const psoup_reward_input *inputs;
    size_t n_inputs;
    int64_t id; /* the caller's, given back to callbacks and in samples; a run goes on with the same ones */
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
 * mean of what it gave to the responses that it was asked for. */
typedef struct psoup_reward_source {
    const char *name;    /* of no other source of the policy; NULL: the reward model's */
    psoup_reward *model; /* or NULL, and then: */
    psoup_reward_fn function;
    void *user;
    float weight;    /* of its score in the response's reward, or in that of its adapter */
    int32_t adapter; /* which of a soup's adapters it is a reward of; 0 where there is one adapter. Since 0.5 */
    uint64_t reserved2[2]; /* 0 */
} psoup_reward_source;

/* Told of the responses [n] of one policy to its sampled prompts, as it is after `step` steps, and of their
 * scores; return non-zero to stop the run, as with psoup_step_fn. Everything is valid during the call. */
typedef int (*psoup_samples_fn)(void *user, int64_t step, const psoup_rollout *rollouts,
                                const float *scores, size_t n);

/* A soup that is trained for what it will be used for: its adapters learn as one policy while each prompt
 * of a step is answered under a mix of its own. A prompt's mix is over the adapters whose rewards its inputs
 * name (one of each dimension, where it was made for one user), or over all where it lists none: drawn from
 * the Dirichlet distribution with parameters concentration · weight_i · m / Σ weight over those m adapters.
 * A response's reward is Σ mix_i · reward_i, where reward_i is the one that adapter i is trained for, normalised by
 * its own moments, or of several sources Σ weight · score, each score normalised by its own. Its value is
 * Σ mix_i · head_i, a head of each adapter: what one user's mix promises is then linear in the mix, as what
 * it is paid is. Responses of one group (RLOO, GRPO) share a mix. One optimiser steps all its adapters, and
 * clips by their common norm. A soup whose every mix is one and the same adapter trains it to the bits of
 * its policy alone (of several sources with normalize_apart). Reports have also "reward/ADAPTER", or "reward/NAME" of
 * each source: the mean of what it gave to the responses that had its adapter in their mix. */
typedef struct psoup_ppo_soup {
    size_t size;
    const char *const *adapters; /* [n] trained in place */
    size_t n;                    /* 1 to 64 */
    float concentration; /* 1 and equal weights: uniform over the simplex; large: ever closer to the weights'
                          * own shares, which INFINITY gives; 0: always one adapter, drawn by the weights */
    int32_t reserved;    /* 0 */
} psoup_ppo_soup;
#define PSOUP_PPO_SOUP_INIT {.size = sizeof(psoup_ppo_soup), .concentration = 1.0f}

typedef struct psoup_ppo_policy {
    const char *adapter; /* trained in place; a value head is added to it, which saving leaves out. With a soup: its
                          * name */
    /* What it is paid by: reward models, of which the prompts' inputs say which reads what (one, where there are none);
     * a function; or both kinds together, as sources (below). */
    psoup_reward *const *rewards;
    size_t n_rewards;
    psoup_reward_fn reward_fn; /* instead of reward models when not NULL */
    void *reward_user;
    const psoup_ppo_prompt *prompts;
    size_t n_prompts;
    const psoup_ppo_prompt *validation; /* best checkpoint by mean reward on these; may be none */
    size_t n_validation;
    uint64_t seed; /* of its sampling, shuffling, mixes and dropout */
    /* NULL: one adapter. Else reward i is what adapter i is trained for: n_rewards is the soup's n, or reward_fn is
     * called once for each adapter, as rollouts' policy, with the responses that have it in their mix; or sources say
     * which adapter's they are, at least one of each. A prompt's inputs name no reward twice, and give an adapter one
     * weight, whichever of its rewards they name; they may name a function's, which reads no tokens. */
    const psoup_ppo_soup *soup;
    /* Several rewards at once, instead of rewards and reward_fn when not NULL: a response's score is Σ weight · score
     * over them. A function scores every response. A model reads what the prompt's inputs that name it say (`reward`
     * is an index into sources then, and its score Σ weight · score over those inputs); where a prompt lists none,
     * every model reads the prompt. With a soup a response's score is Σ mix_i Σ weight · score, the inner sum over the
     * sources of adapter i; none is asked for a response that has not its adapter in its mix. */
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
    float truncation_penalty; /* subtracted from the score of a response without an end token, in training: "reward"
                               * and what keep_best compares have no penalties in them */
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
    int32_t checkpoint_every;   /* PPO steps between checkpoints; 0: when it is stopped, or samples for long, only */
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
    float length_correction; /* 0 to 1: so much of the linear trend of a reward's scores with the response's length is
                              * taken out of them: docs/method.md. Since 0.5 */
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

/* The policies' prompts, rewards and callbacks are borrowed until psoup_ppo_free; the policies themselves, names and
 * soups are copied. Reports' subject is the policy. Trained or validated they have "reward" (of a response, as the
 * rewards gave it), "reward_deviation", "reward/NAME" of each of several rewards, "kl" (of a response), "kl_token",
 * "tokens", "length", "ended" (the share with an end token), "repetition" and "empty"; with length_penalty its mean as
 * "length_penalty", with length_correction "length_correlation" (of score and length). Trained they have also
 * "kl_coefficient", "policy_loss", "clip_fraction", "policy_kl" (mean log π_old − log π of the updates), "ratio_max",
 * "grad_norm", "epochs", "skipped" (mini-batches), "reward_rise" and "warnings"; with a critic "value_loss" and
 * "value_clip_fraction". */
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
/* What a run takes: as the calls of this name in psoup/train.h. */
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
    const psoup_reward_source *sources; /* several rewards at once, instead of rewards and reward_fn when not NULL, as a
                                         * psoup_ppo_policy's. Since 0.5 */
    size_t n_sources;
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
