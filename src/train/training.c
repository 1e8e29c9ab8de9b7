/* A training step by step, or to its end. One checkpoint is for a step and the validation due after it. */
#include "train/training.h"

static int64_t steps_left(const psoup_training *t) {
    int64_t step, total;
    t->trainer->progress(t->state, &step, &total);
    return total - step;
}

/* The next thing to do: a validation or a step; *stepped becomes true with the latter. */
static psoup_status advance(psoup_training *t, bool *stepped, psoup_error *error) {
    const psoup__trainer *trainer = t->trainer;
    int64_t step, total;
    psoup_status status = trainer->refresh(t->state, error);
    if (status != PSOUP_OK)
        return status;
    if (trainer->due(t->state)) {
        status = trainer->validate(t->state, error);
    } else {
        *stepped = true;
        if (steps_left(t) > 0)
            status = trainer->step(t->state, error);
    }
    trainer->progress(t->state, &step, &total);
    if (status != PSOUP_OK || !trainer->due(t->state))
        status = psoup__checkpoint_after(t->checkpoint, status, step, step == total, error);
    return status;
}

psoup_status psoup_training_step(psoup_training *training, int64_t *remaining, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    bool stepped = false;
    if (!training)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_training_step: training is NULL");
    training->team->agreed = PSOUP_OK;
    while (status == PSOUP_OK && (!stepped || training->trainer->due(training->state)))
        status = advance(training, &stepped, error);
    psoup__team_tell(training->team, status, error);
    if (remaining)
        *remaining = steps_left(training);
    return status;
}

psoup_status psoup_training_run(psoup_training *training, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    bool stepped = false;
    if (!training)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_training_run: training is NULL");
    training->team->agreed = PSOUP_OK;
    while (training->trainer->due(training->state) || steps_left(training) > 0)
        PSOUP__TRY(advance(training, &stepped, error));
    PSOUP__TRY(training->trainer->refresh(training->state, error));
    training->trainer->restore(training->state);
fail:
    psoup__team_tell(training->team, status, error);
    return status;
}

static psoup_status end(psoup_training *training, psoup_error *error) {
    psoup_context *context = training->context;
    psoup_status status = training->trainer->end(training->state, error);
    psoup__free(context, training);
    return status;
}

void psoup_training_free(psoup_training *training) {
    if (training)
        end(training, NULL);
}

psoup_status psoup__training_made(psoup_status status, psoup_training made, psoup_training **out,
                                  psoup_error *error) {
    *out = NULL;
    if (status == PSOUP_OK) {
        *out = psoup__alloc(made.context, 1, sizeof(made), error);
        status = *out ? PSOUP_OK : PSOUP_ERROR_MEMORY;
    }
    if (status == PSOUP_OK) {
        **out = made;
        return PSOUP_OK;
    }
    psoup__team_tell(made.team, status, error);
    made.trainer->end(made.state, NULL);
    return status;
}

/* The first failure is the one that is told. */
psoup_status psoup__training_whole(psoup_status status, psoup_training *training, psoup_error *error) {
    if (status == PSOUP_OK)
        status = psoup_training_run(training, error);
    if (!training)
        return status;
    bool report = status == PSOUP_OK;
    psoup_status ended = end(training, report ? error : NULL);
    return report ? ended : status;
}

psoup_status psoup__training_adapter(const psoup_model *model, const char *name, const psoup__adapter *adapter,
                                     const psoup__optimizer *optimizer, int32_t *index, psoup_error *error) {
    if (psoup__model_adapter(model, name) != adapter || adapter->grad != optimizer->g)
        return psoup__fail(error, PSOUP_ERROR_STATE, "training of '%s': its adapter was removed or replaced", name);
    *index = psoup_model_find_adapter(model, name);
    return PSOUP_OK;
}
