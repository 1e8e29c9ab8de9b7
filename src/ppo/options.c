/* PPO's options as data: a table for configuration files, presets, and what is refused. */
#include <string.h>

#include "ppo/ppo.h"
#include "train/options.h"

#define OPTIONS psoup_ppo_options
static const psoup_field ppo_fields[] = {
    INT(steps, "PPO steps; 0 makes one epoch over the prompts."),
    INT(batch_size, "Responses sampled in one step, per policy."),
    INT(mini_batch_size, "Responses of one optimiser step; 0 takes the whole batch."),
    INT(loss_group, "Above 0, the loss is the mean over the tokens of so many responses, averaged over "
                    "such groups; 0 takes the mean over all tokens of the mini-batch."),
    INT(ppo_epochs, "Passes over a batch at most."),
    INT(micro_batch_tokens, "Tokens of one packed pass; bounds memory."),
    ADAM,
    FLOAT(gamma, "Discount of later rewards."),
    FLOAT(lambda, "Decay of generalised advantage estimation."),
    FLOAT(clip_range, "How far from 1 the probability ratio may be driven."),
    FLOAT(clip_range_value, "How far from its old prediction a value may be driven."),
    FLOAT(value_coefficient, "Weight of the value loss."),
    {"early_stop", PSOUP_FIELD_ENUM, offsetof(OPTIONS, early_stop), "off|all|last",
     "What decides whether KL ends the updates on a batch: all of an epoch, or its last loss group."},
    FLOAT(target_kl, "The updates on a batch end after an epoch of more than 1.5 times this KL per "
                     "token."),
    FLOAT(kl_coefficient, "Weight of the KL penalty at the start."),
    BOOL(adaptive_kl, "Whether the weight of the KL penalty follows kl_target."),
    FLOAT(kl_target, "KL per response that the adaptive weight aims at, in nats."),
    FLOAT(kl_horizon, "Responses over which the adaptive weight adjusts."),
    FLOAT(ratio_threshold, "A mini-batch whose mean probability ratio exceeds this is skipped."),
    BOOL(skipped_step, "Whether the optimiser still steps, with zero gradient, when a mini-batch is "
                       "skipped."),
    BOOL(normalize_reward, "Whether scores are normalised by their running mean and deviation."),
    BOOL(whiten_advantages, "Whether advantages are shifted and scaled to mean 0 and deviation 1."),
    INT(whiten_groups, "Equal parts of the batch that are whitened apart."),
    FLOAT(lora_dropout, "Probability of dropping an element of an adapter's input, in updates."),
    FLOAT(head_dropout, "Probability of dropping an element of the value head's input, in updates."),
    INT(max_new_tokens, "Tokens of a response at most."),
    INT(min_new_tokens, "Tokens of a response before an end token may come."),
    INT(draw_new_tokens_from, "Above 0, each group's limit is drawn uniformly from this to "
                              "max_new_tokens."),
    INT(draw_group, "Responses that share a drawn limit."),
    BOOL(ignore_stop, "Whether to sample past end tokens and cut after the first."),
    FLOAT(temperature, "Sampling temperature."),
    FLOAT(top_p, "Sampling keeps the smallest set of tokens of this probability; 1 keeps all."),
    INT(top_k, "Sampling keeps this many tokens; 0 keeps all."),
    FLOAT(truncation_penalty, "Subtracted from the score of a response without an end token."),
    BOOL(reward_text, "Whether rewards read decoded text, tokenised again."),
    INT(reward_max_tokens, "Longer reward inputs keep their first tokens; 0 allows what the model "
                           "can hold."),
    INT(max_sequences, "Responses decoded together; 0 decodes all of a step, on the CPU 256 of them."),
    INT(validate_every, "PPO steps between validations; 0 validates at the end only."),
    BOOL(keep_best, "Whether to end with the weights of the best mean reward on the validation "
                    "prompts."),
    METRICS,
    CHECKPOINTS("PPO"),
    RECOMPUTE,
    {"objective", PSOUP_FIELD_ENUM, offsetof(OPTIONS, objective), "ppo|rloo|grpo",
     "What a reward is measured against: a critic's value, the mean of the other responses to the "
     "prompt, or their mean and deviation. Without a critic gamma, lambda, value and whitening options "
     "and head_dropout have no part."},
    INT(group_size, "Responses sampled to each prompt, with rloo and grpo; divides batch_size."),
    BOOL(join, "Whether to resume, and to begin policies at the list's end that the checkpoint has not yet."),
    INT(samples_every, "PPO steps between samples of what each policy says; 0 takes none."),
    INT(samples_count, "How many prompts are sampled, of a policy's validation prompts where it has any."),
    {"samples", PSOUP_FIELD_STRING, offsetof(OPTIONS, samples), NULL,
     "JSON Lines file that samples are appended to."},
    {"kl_estimator", PSOUP_FIELD_ENUM, offsetof(OPTIONS, kl_estimator), "default|k1|k2|k3",
     "How KL to the reference is estimated from a token, with d its log-ratio: d, half of d squared, or "
     "exp(-d) - 1 + d; default is k1, and k3 in grpo's loss."},
    {"scale_rewards", PSOUP_FIELD_ENUM, offsetof(OPTIONS, scale_rewards), "group|none|batch",
     "What grpo divides its advantages by: the deviation of the group's rewards, nothing, or the deviation of "
     "all rewards of the step."},
    FLOAT(reward_clip, "A normalised score is kept within plus or minus this; 0 leaves it."),
    FLOAT(warn_repetition, "Warns when more than this share of the 4-grams of a step's responses repeat one of the "
                           "same response; 0 does not."),
    FLOAT(warn_empty, "Warns when more than this share of a step's responses are empty; 0 does not."),
    FLOAT(warn_reward_rise, "Warns when the reward rises by more than so many deviations within warn_window steps at "
                            "a KL that cannot buy it; 0 does not."),
    FLOAT(warn_kl_growth, "Warns when KL grows by more than this factor within warn_window steps while the reward "
                          "falls; 0 does not."),
    INT(warn_window, "PPO steps that the two look back on."),
    BOOL(normalize_apart, "Whether each of several rewards is normalised by its own mean and deviation before it is "
                          "weighted, instead of their sum."),
    FLOAT(length_penalty, "Subtracted from the normalised score for each token of a response beyond length_target."),
    INT(length_target, "Tokens of a response that cost nothing."),
    FLOAT(length_correction, "Share of a reward's linear trend with the length of responses that is taken out of its "
                             "scores, 0 to 1."),
    {NULL, PSOUP_FIELD_INT, 0, NULL, NULL},
};
#undef OPTIONS

const psoup_field *psoup_ppo_fields(void) { return ppo_fields; }

/* The paper's released code: README flags of joeljang/RLPHF and the trainer it ran on. Whitening was
 * per rank, of four. */
psoup_status psoup_ppo_preset(const char *name, psoup_ppo_options *options, psoup_error *error) {
    psoup_ppo_options full = PSOUP_PPO_OPTIONS_INIT;
    psoup_ppo_options from = PSOUP_PPO_OPTIONS_INIT; /* where the fields' values come from */
    psoup_status status = PSOUP_OK;
    if (!name || !options)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_ppo_preset: name or options is NULL");
    PSOUP__TRY(psoup__options(&full, sizeof(full), options, "psoup_ppo_options", error));
    if (strcmp(name, "rlphf") == 0) {
        from.max_grad_norm = 0.0f;
        from.early_stop = PSOUP_EARLY_STOP_LAST;
        from.skipped_step = 1;
        from.whiten_groups = 4;
        from.loss_group = 2;
        from.lora_dropout = 0.05f;
        from.head_dropout = 0.1f;
        from.draw_new_tokens_from = 32;
        from.ignore_stop = 1;
        from.reward_text = 1;
    } else if (strcmp(name, "default") != 0) {
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "PPO preset '%s' is unknown: expected 'default' or 'rlphf'", name);
    }
    full.max_grad_norm = from.max_grad_norm;
    full.early_stop = from.early_stop;
    full.skipped_step = from.skipped_step;
    full.whiten_groups = from.whiten_groups;
    full.loss_group = from.loss_group;
    full.lora_dropout = from.lora_dropout;
    full.head_dropout = from.head_dropout;
    full.draw_new_tokens_from = from.draw_new_tokens_from;
    full.draw_group = from.draw_group;
    full.max_new_tokens = from.max_new_tokens;
    full.ignore_stop = from.ignore_stop;
    full.reward_text = from.reward_text;
    full.reward_max_tokens = from.reward_max_tokens;
    full.truncation_penalty = from.truncation_penalty;
    /* A caller of an older header has a shorter struct. */
    size_t size = options->size;
    memcpy(options, &full, size < sizeof(full) ? size : sizeof(full));
    options->size = size;
fail:
    return status;
}

psoup_status psoup__ppo_check(const psoup_ppo_options *o, psoup_error *error) {
    bool critic = psoup__has_critic(o);
    const psoup__range ranges[] = {
        RANGE(steps, 0, COUNTS),
        RANGE(batch_size, 1, COUNTS),
        RANGE(mini_batch_size, 0, o->batch_size),
        RANGE(loss_group, 0, o->batch_size),
        RANGE(ppo_epochs, 1, COUNTS),
        RANGE(micro_batch_tokens, 1, COUNTS),
        ADAM_RANGES,
        RANGE(gamma, 0, 1),
        RANGE(lambda, 0, 1),
        RANGE(clip_range, 0, REALS),
        RANGE(clip_range_value, 0, REALS),
        RANGE(value_coefficient, 0, REALS),
        RANGE(early_stop, 0, 2),
        RANGE(target_kl, 0, REALS),
        RANGE(kl_coefficient, 0, REALS),
        RANGE(adaptive_kl, 0, 1),
        RANGE(kl_target, ABOVE_ZERO, REALS),
        RANGE(kl_horizon, ABOVE_ZERO, REALS),
        RANGE(ratio_threshold, 0, INFINITY),
        RANGE(skipped_step, 0, 1),
        RANGE(normalize_reward, 0, 1),
        RANGE(whiten_advantages, 0, 1),
        RANGE(whiten_groups, 1, o->batch_size),
        RANGE(lora_dropout, 0, BELOW_ONE),
        RANGE(head_dropout, 0, BELOW_ONE),
        RANGE(max_new_tokens, 1, COUNTS),
        RANGE(min_new_tokens, 0, o->max_new_tokens),
        RANGE(draw_new_tokens_from, 0, o->max_new_tokens),
        RANGE(draw_group, 1, COUNTS),
        RANGE(ignore_stop, 0, 1),
        RANGE(temperature, ABOVE_ZERO, REALS), /* PPO explores: greedy sampling has no ratio to learn from */
        RANGE(top_p, ABOVE_ZERO, 1),
        RANGE(top_k, 0, COUNTS),
        RANGE(truncation_penalty, -REALS, REALS),
        RANGE(reward_text, 0, 1),
        RANGE(reward_max_tokens, 0, COUNTS),
        RANGE(max_sequences, 0, COUNTS),
        RANGE(validate_every, 0, COUNTS),
        RANGE(keep_best, 0, 1),
        CHECKPOINT_RANGES,
        RANGE(join, 0, 1),
        RANGE(objective, 0, 2),
        RANGE(group_size, critic ? 1 : 2, COUNTS),
        RANGE(samples_every, 0, COUNTS),
        RANGE(samples_count, 1, COUNTS),
        RANGE(kl_estimator, 0, 3),
        RANGE(scale_rewards, 0, 2),
        RANGE(reward_clip, 0, REALS),
        RANGE(warn_repetition, 0, REALS),
        RANGE(warn_empty, 0, REALS),
        RANGE(warn_reward_rise, 0, REALS),
        RANGE(warn_kl_growth, 0, REALS),
        RANGE(warn_window, 4, PSOUP__MAX_WINDOW),
        RANGE(normalize_apart, 0, o->normalize_reward ? 1 : 0),
        RANGE(length_penalty, -REALS, REALS),
        RANGE(length_target, 0, COUNTS),
        RANGE(length_correction, 0, o->batch_size > 1 ? 1 : 0), /* one response has no trend */
    };
    psoup_status status =
        psoup__ranges_check("psoup_ppo_options", ranges, LENGTH(ranges), o->checkpoint_dir,
              o->resume || o->join, error);
    if (status == PSOUP_OK && o->reward_text && !o->tokenizer)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_ppo_options: tokenizer is NULL, which reward_text needs");
    if (status == PSOUP_OK && (o->samples || o->on_samples) != (o->samples_every > 0))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_ppo_options: samples_every is %d: expected %s", o->samples_every,
                           o->samples_every ? "samples, a file, or on_samples with it"
                                            : "more than 0, with samples or on_samples");
    if (status == PSOUP_OK && !critic && o->batch_size % o->group_size)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_ppo_options: batch_size is %d: expected a multiple of group_size, %d",
                           o->batch_size, o->group_size);
    if (status == PSOUP_OK && o->objective == PSOUP_OBJECTIVE_GRPO && o->kl_estimator == PSOUP_KL_K1)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_ppo_options: kl_estimator is k1: expected k2 or k3 with grpo, whose loss it "
                           "is a term of: there the mean gradient of k1 is 0");
    if (status == PSOUP_OK && o->objective != PSOUP_OBJECTIVE_GRPO && o->scale_rewards != PSOUP_SCALE_GROUP)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_ppo_options: scale_rewards is of grpo alone: expected group");
    return status;
}
