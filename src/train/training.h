/* src/train/training.h: what supervised fine-tuning, reward training and DPO have in common: a run that is taken
 * step by step or to its end. */
#ifndef PSOUP__TRAINING_H
#define PSOUP__TRAINING_H

#include "train/checkpoint.h"

/* One kind of training; `state` is its own. */
typedef struct psoup__trainer {
    bool (*due)(void *state); /* whether a validation is, now */
    psoup_status (*validate)(void *state, psoup_error *error);
    psoup_status (*step)(void *state, psoup_error *error);
    void (*progress)(const void *state, int64_t *step, int64_t *total); /* of who trains the longest */
    /* Finds the adapters where they are now; PSOUP_ERROR_STATE when one is gone. */
    psoup_status (*refresh)(void *state, psoup_error *error);
    void (*restore)(void *state); /* the best weights */
    psoup_status (*end)(void *state, psoup_error *error); /* gives back all that it holds, and the state */
} psoup__trainer;

struct psoup_training {
    psoup_context *context;
    const psoup__trainer *trainer;
    void *state;
    psoup__checkpoint *checkpoint; /* the state's */
    psoup__team *team;
};

/* *out receives a training that owns the state; or where that fails, or `status` says that making it did, ends
 * it. Returns the status. */
psoup_status psoup__training_made(psoup_status status, psoup_training made, psoup_training **out,
                                  psoup_error *error);
/* Runs it, where it was made, and frees it: the whole of psoup_sft, psoup_reward_train and psoup_dpo. */
psoup_status psoup__training_whole(psoup_status status, psoup_training *training, psoup_error *error);
/* Whether an adapter is still the one that trains; *index receives its number in the model. */
psoup_status psoup__training_adapter(const psoup_model *model, const char *name, const psoup__adapter *adapter,
                                     const psoup__optimizer *optimizer, int32_t *index, psoup_error *error);

#endif
