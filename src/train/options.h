/* src/train/options.h: what the tables of options are written with. A table begins where OPTIONS is defined. */
#ifndef PSOUP__TRAIN_OPTIONS_H
#define PSOUP__TRAIN_OPTIONS_H

#include <math.h>

#include "train/train.h"

/* ---- fields of configuration files ------------------------------------------------------------ */

#define FIELD(kind, name, help) {#name, kind, offsetof(OPTIONS, name), NULL, help}
#define INT(name, help) FIELD(PSOUP_FIELD_INT, name, help)
#define FLOAT(name, help) FIELD(PSOUP_FIELD_FLOAT, name, help)
#define BOOL(name, help) FIELD(PSOUP_FIELD_BOOL, name, help)
#define SCHEDULE                                                                                   \
    {"schedule", PSOUP_FIELD_ENUM, offsetof(OPTIONS, schedule), "constant|linear|cosine",          \
     "How the learning rate falls after warm-up: not at all, in a line to 0, or as a half cosine "  \
     "to 0."}
#define ADAM                                                                                       \
    FLOAT(learning_rate, "AdamW's learning rate at its peak."),                                    \
        FLOAT(beta1, "AdamW's decay of the gradient's running mean."),                             \
        FLOAT(beta2, "AdamW's decay of the squared gradient's running mean."),                     \
        FLOAT(epsilon, "Added to AdamW's denominator."),                                           \
        FLOAT(weight_decay, "AdamW's decoupled weight decay, per step times the learning rate."),  \
        FLOAT(max_grad_norm, "Gradients of a larger norm are scaled down to this one; 0 turns "    \
                             "clipping off."),                                                     \
        FLOAT(max_grad_value, "Elements of a gradient beyond plus or minus this are set to it, "   \
                              "before its norm is taken; 0 leaves them.")
#define RUN                                                                                        \
    {"seed", PSOUP_FIELD_UINT64, offsetof(OPTIONS, seed), NULL,                                    \
     "Seed of the order of the examples and of dropout."}
#define METRICS                                                                                    \
    {"metrics", PSOUP_FIELD_STRING, offsetof(OPTIONS, metrics), NULL,                              \
     "JSON Lines file that every report is appended to."}

#define RECOMPUTE                                                                                  \
    BOOL(gradient_checkpointing, "Whether updates keep each layer's input alone and run the layer again " \
                                 "in the backward: less memory, more time, the same bits.")

#define CHECKPOINTS(steps)                                                                         \
    {"checkpoint_dir", PSOUP_FIELD_STRING, offsetof(OPTIONS, checkpoint_dir), NULL,                \
     "Directory that keeps the whole run, so that it can go on after it was stopped or killed."},  \
        INT(checkpoint_every, steps " steps between checkpoints; 0 keeps one when the run is "     \
                              "stopped only."),                                                    \
        INT(checkpoint_keep, "How many checkpoints stay."),                                        \
        BOOL(resume, "Whether to continue from the newest checkpoint, where there is one.")

/* ---- what is refused ------------------------------------------------------------------------- */

typedef struct psoup__range {
    const char *name;
    double value, low, high; /* low ≤ value ≤ high; NaN is refused */
} psoup__range;

/* The first of the options o that is outside its range; resuming without a directory. */
psoup_status psoup__ranges_check(const char *where, const psoup__range *ranges, size_t n, const char *checkpoint_dir,
                                 int32_t resume, psoup_error *error);

#define RANGE(name, low, high) {#name, (double)o->name, low, high}
#define COUNTS 2147483647.0
#define CHECKPOINT_RANGES                                                                          \
    RANGE(checkpoint_every, 0, COUNTS), RANGE(checkpoint_keep, 1, COUNTS), RANGE(resume, 0, 1),    \
        RANGE(gradient_checkpointing, 0, 1)
#define REALS 3.4e38 /* without a limit, but finite */
#define ABOVE_ZERO 1e-30
#define BELOW_ONE 0.99999997
#define ADAM_RANGES                                                                                \
    RANGE(learning_rate, 0, REALS), RANGE(beta1, 0, BELOW_ONE), RANGE(beta2, 0, BELOW_ONE),        \
        RANGE(epsilon, 0, REALS), RANGE(weight_decay, 0, REALS), RANGE(max_grad_norm, 0, REALS), \
        RANGE(max_grad_value, 0, REALS)
#define LENGTH(ranges) (sizeof(ranges) / sizeof((ranges)[0]))

#endif
