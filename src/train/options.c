/* The trainers' options as data: tables for configuration files, presets, and what is refused. */
#include "train/options.h"

#include <stdio.h>

#define OPTIONS psoup_sft_options
static const psoup_field sft_fields[] = {
    INT(epochs, "Passes over the examples."),
    INT(max_steps, "Optimiser steps, whatever the epochs; 0 lets the epochs decide."),
    INT(batch_tokens, "Tokens of one packed micro-batch at most; longer examples are cut to it."),
    INT(accumulation, "Micro-batches of one optimiser step."),
    ADAM,
    SCHEDULE,
    INT(warmup_steps, "Optimiser steps over which the learning rate rises from 0."),
    FLOAT(lora_dropout, "Probability of dropping an element of an adapter's input."),
    BOOL(loss_on_prompt, "Whether prompt tokens carry loss too."),
    INT(validate_every, "Optimiser steps between validations; 0 validates at the end only."),
    BOOL(keep_best, "Whether to end with the weights of the lowest validation loss."),
    RUN,
    METRICS,
    CHECKPOINTS("Optimiser"),
    RECOMPUTE,
    {NULL, PSOUP_FIELD_INT, 0, NULL, NULL},
};
#undef OPTIONS

#define OPTIONS psoup_reward_options
static const psoup_field reward_fields[] = {
    INT(epochs, "Passes over the comparisons."),
    INT(max_steps, "Optimiser steps, whatever the epochs; 0 lets the epochs decide."),
    INT(batch_size, "Comparisons of one micro-batch, per reward model."),
    INT(accumulation, "Micro-batches of one optimiser step."),
    ADAM,
    SCHEDULE,
    INT(warmup_steps, "Optimiser steps over which the learning rate rises from 0."),
    FLOAT(lora_dropout, "Probability of dropping an element of an adapter's input."),
    FLOAT(margin, "How much higher the chosen response has to score before the loss is indifferent "
                  "to its half."),
    BOOL(margins, "Whether each comparison's own margin is added to that."),
    FLOAT(centering, "Weight of the squared sum of both scores, which keeps scores around 0."),
    INT(max_tokens, "Longer rows keep their first tokens; 0 allows what the model can hold."),
    INT(validate_every, "Optimiser steps between validations; 0 validates at the end only."),
    BOOL(keep_best, "Whether to end with the weights of the best validation accuracy."),
    RUN,
    METRICS,
    CHECKPOINTS("Optimiser"),
    RECOMPUTE,
    {NULL, PSOUP_FIELD_INT, 0, NULL, NULL},
};
#undef OPTIONS

#define OPTIONS psoup_dpo_options
static const psoup_field dpo_fields[] = {
    INT(epochs, "Passes over the pairs."),
    INT(max_steps, "Optimiser steps, whatever the epochs; 0 lets the epochs decide."),
    INT(batch_size, "Pairs of one micro-batch, per policy."),
    INT(accumulation, "Micro-batches of one optimiser step."),
    ADAM,
    SCHEDULE,
    INT(warmup_steps, "Optimiser steps over which the learning rate rises from 0."),
    FLOAT(lora_dropout, "Probability of dropping an element of an adapter's input."),
    FLOAT(beta, "Weight of the KL penalty that the implied reward stands against: smaller leaves the "
                "base further behind."),
    FLOAT(label_smoothing, "Share of the pairs taken to be the wrong way round, 0 to 0.5."),
    FLOAT(length_penalty, "What each token of a response costs the policy: so much for each, of what was preferred, is "
                          "put down to length."),
    INT(max_tokens, "Longer rows keep their first tokens; 0 allows what the model can hold."),
    INT(validate_every, "Optimiser steps between validations; 0 validates at the end only."),
    BOOL(keep_best, "Whether to end with the weights of the best validation accuracy."),
    RUN,
    METRICS,
    CHECKPOINTS("Optimiser"),
    RECOMPUTE,
    {NULL, PSOUP_FIELD_INT, 0, NULL, NULL},
};
#undef OPTIONS

const psoup_field *psoup_sft_fields(void) { return sft_fields; }
const psoup_field *psoup_reward_fields(void) { return reward_fields; }
const psoup_field *psoup_dpo_fields(void) { return dpo_fields; }

/* ---- what is refused ---------------------------------------------------------------------------- */

/* Whole numbers as such, up to the 15 digits that a double has of any. */
static void write_number(double value, char text[32]) {
    snprintf(text, 32, floor(value) == value && fabs(value) < 1e15 ? "%.0f" : "%.7g", value);
}

/* What a range allows, in words where a limit stands for "none", "below" or "above". */
static void write_range(const psoup__range *r, char text[96]) {
    char low[32], high[32];
    bool above = r->low == ABOVE_ZERO;
    write_number(above ? 0 : r->low, low);
    write_number(r->high == BELOW_ONE ? 1 : r->high, high);
    if (r->low == r->high)
        snprintf(text, 96, "%s", low);
    else if (r->low <= -REALS)
        snprintf(text, 96, "a finite number");
    else if (r->high >= REALS)
        snprintf(text, 96, above ? "more than %s" : "%s or more", low);
    else if (above)
        snprintf(text, 96, "more than %s, %s at most", low, high);
    else
        snprintf(text, 96, "%s to %s%s", low, r->high == BELOW_ONE ? "below " : "", high);
}

psoup_status psoup__ranges_check(const char *where, const psoup__range *ranges, size_t n, const char *checkpoint_dir,
                                 int32_t resume, psoup_error *error) {
    if (resume && !checkpoint_dir)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: checkpoint_dir is NULL, which resume needs", where);
    for (size_t i = 0; i < n; i++) {
        const psoup__range *r = &ranges[i];
        char value[32], expected[96];
        if (r->value >= r->low && r->value <= r->high)
            continue;
        write_number(r->value, value);
        write_range(r, expected);
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: %s is %s: expected %s", where, r->name, value, expected);
    }
    return PSOUP_OK;
}

psoup_status psoup__sft_check(const psoup_sft_options *o, psoup_error *error) {
    const psoup__range ranges[] = {
        RANGE(epochs, 1, COUNTS),       RANGE(max_steps, 0, COUNTS),
        RANGE(batch_tokens, 2, COUNTS), RANGE(accumulation, 1, COUNTS),
        ADAM_RANGES,                    RANGE(schedule, 0, 2),
        RANGE(warmup_steps, 0, COUNTS), RANGE(lora_dropout, 0, BELOW_ONE),
        RANGE(loss_on_prompt, 0, 1),    RANGE(validate_every, 0, COUNTS),
        RANGE(keep_best, 0, 1),         CHECKPOINT_RANGES,
        RANGE(reserved, 0, 0),
    };
    return psoup__ranges_check("psoup_sft_options", ranges, LENGTH(ranges), o->checkpoint_dir, o->resume,
                 error);
}

psoup_status psoup__reward_check(const psoup_reward_options *o, psoup_error *error) {
    const psoup__range ranges[] = {
        RANGE(epochs, 1, COUNTS),       RANGE(max_steps, 0, COUNTS),
        RANGE(batch_size, 1, COUNTS),   RANGE(accumulation, 1, COUNTS),
        ADAM_RANGES,                    RANGE(schedule, 0, 2),
        RANGE(warmup_steps, 0, COUNTS), RANGE(lora_dropout, 0, BELOW_ONE),
        RANGE(margin, -REALS, REALS),   RANGE(centering, 0, REALS),
        RANGE(max_tokens, 0, COUNTS),   RANGE(validate_every, 0, COUNTS),
        RANGE(keep_best, 0, 1),         CHECKPOINT_RANGES,
        RANGE(margins, 0, 1),
    };
    return psoup__ranges_check("psoup_reward_options", ranges, LENGTH(ranges), o->checkpoint_dir, o->resume,
                 error);
}

psoup_status psoup__dpo_check(const psoup_dpo_options *o, psoup_error *error) {
    const psoup__range ranges[] = {
        RANGE(epochs, 1, COUNTS),       RANGE(max_steps, 0, COUNTS),
        RANGE(batch_size, 1, COUNTS),   RANGE(accumulation, 1, COUNTS),
        ADAM_RANGES,                    RANGE(schedule, 0, 2),
        RANGE(warmup_steps, 0, COUNTS), RANGE(lora_dropout, 0, BELOW_ONE),
        RANGE(beta, ABOVE_ZERO, REALS),      RANGE(label_smoothing, 0, 0.5),
        RANGE(max_tokens, 0, COUNTS),   RANGE(validate_every, 0, COUNTS),
        RANGE(keep_best, 0, 1),         CHECKPOINT_RANGES,
        RANGE(length_penalty, -REALS, REALS),
    };
    return psoup__ranges_check("psoup_dpo_options", ranges, LENGTH(ranges), o->checkpoint_dir, o->resume,
                 error);
}
