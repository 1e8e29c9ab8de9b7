/* Reward models: the handle, and scores. */
#include <assert.h>
#include <string.h>

#include "train/train.h"

static psoup_status create_handle(psoup_model *model, const char *name, psoup_reward **out,
                                  psoup_error *error) {
    psoup_reward *reward = psoup__alloc(model->context, 1, sizeof(*reward), error);
    if (!reward)
        return PSOUP_ERROR_MEMORY;
    reward->model = model;
    reward->name = psoup__strdup(model->context, name, error);
    if (!reward->name) {
        psoup__free(model->context, reward);
        return PSOUP_ERROR_MEMORY;
    }
    *out = reward;
    return PSOUP_OK;
}

psoup_status psoup_reward_create(psoup_model *model, const char *name,
                                 const psoup_adapter_options *options, psoup_reward **out,
                                 psoup_error *error) {
    psoup_status status = PSOUP_OK;
    if (out)
        *out = NULL;
    if (!out || !model || !name)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_reward_create: an argument is NULL");
    status = psoup_model_add_adapter(model, name, options, error);
    if (status != PSOUP_OK)
        return status;
    PSOUP__TRY(psoup__adapter_add_head(model, psoup__model_adapter(model, name), error));
    PSOUP__TRY(create_handle(model, name, out, error));
    return PSOUP_OK;
fail:
    psoup_model_remove_adapter(model, name, NULL);
    return status;
}

psoup_status psoup_reward_load(psoup_model *model, const char *name, const char *directory,
                               psoup_reward **out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    if (out)
        *out = NULL;
    if (!out || !model || !name || !directory)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_reward_load: an argument is NULL");
    status = psoup_model_load_adapter(model, name, directory, error);
    if (status != PSOUP_OK)
        return status;
    if (!psoup__model_adapter(model, name)->head) {
        status = psoup__fail(error, PSOUP_ERROR_FORMAT,
                             "%s: the adapter has no score head: expected task type SEQ_CLS",
                             directory);
        goto fail;
    }
    PSOUP__TRY(create_handle(model, name, out, error));
    return PSOUP_OK;
fail:
    psoup_model_remove_adapter(model, name, NULL);
    return status;
}

psoup_status psoup_reward_save(const psoup_reward *reward, const char *directory,
                               const char *base_name, psoup_error *error) {
    psoup__adapter *adapter = NULL;
    psoup_status status = PSOUP_OK;
    if (!reward || !directory)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_reward_save: an argument is NULL");
    PSOUP__TRY(psoup__reward_adapter(reward, &adapter, NULL, error));
    PSOUP__TRY(psoup__adapter_save(reward->model, adapter, directory, base_name, true, error));
fail:
    return status;
}

const char *psoup_reward_name(const psoup_reward *reward) { return reward->name; }

void psoup_reward_free(psoup_reward *reward) {
    if (!reward)
        return;
    psoup_context *context = reward->model->context;
    psoup__passes_free(reward->passes);
    psoup__free(context, reward->name);
    psoup__free(context, reward);
}

psoup_status psoup__reward_adapter(const psoup_reward *reward, psoup__adapter **adapter,
                                   int32_t *index, psoup_error *error) {
    psoup__adapter *found = psoup__model_adapter(reward->model, reward->name);
    if (!found || !found->head)
        return psoup__fail(error, PSOUP_ERROR_STATE, "reward model '%s': the model's adapter %s",
                           reward->name, found ? "has no score head" : "is gone");
    *adapter = found;
    if (index)
        *index = psoup_model_find_adapter(reward->model, reward->name);
    return PSOUP_OK;
}

psoup_status psoup__reward_passes(psoup_reward *reward, psoup__passes **passes, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    if (!reward->passes)
        status = psoup__passes_create(reward->model, false, &reward->passes, error);
    *passes = reward->passes;
    return status;
}

typedef struct scoring {
    psoup__passes *passes;
    const psoup__sequence *sequences; /* [n] */
    float *out;                       /* [n] */
    int32_t *rows, *pass;             /* [n], [n] */
} scoring;

static psoup_status score_pass(void *user, psoup__pack *pack, int32_t pass, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const scoring *s = user;
    const size_t begin = s->passes->begin[pass], end = s->passes->end[pass];
    for (size_t i = begin; i < end; i++) {
        const psoup__sequence *sequence = &s->sequences[i];
        int32_t row;
        PSOUP__TRY(psoup__pack_sequence(pack, sequence, &row, error));
        PSOUP__TRY(psoup__pack_score(pack, pack->model->adapters[sequence->adapter], row + s->rows[i] - 1, error));
    }
    PSOUP__TRY(psoup__pack_forward(pack, false, 0.0f, 0.0f, error));
    PSOUP__TRY(psoup__pack_fetch(pack, error));
    memcpy(s->out + begin, pack->value, (end - begin) * sizeof(*s->out));
fail:
    return status;
}

/* Nothing here is differentiated and a row's bits do not depend on its batch: all sequences are one owner's, whose
 * passes are filled in order. */
psoup_status psoup__score_sequences(psoup__passes *passes, const psoup__sequence *sequences, size_t n,
                                    float *out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = passes->model->context;
    scoring s = {passes, sequences, out, psoup__alloc(context, n, sizeof(*s.rows), error),
                 psoup__alloc(context, n, sizeof(*s.pass), error)};
    int32_t *owner = psoup__alloc(context, n, sizeof(*owner), error);
    if (!s.rows || !s.pass || !owner) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    for (size_t i = 0; i < n; i++) {
        size_t length = sequences[i].n_first + sequences[i].n_then;
        assert(sequences[i].adapter >= 0 && length > 0);
        s.rows[i] = length < INT32_MAX ? (int32_t)length : INT32_MAX; /* which the pack refuses */
    }
    PSOUP__TRY(psoup__passes_plan(passes, s.rows, owner, n, PSOUP__PASS_TOKENS, false, s.pass, error));
    PSOUP__TRY(psoup__passes_run(passes, score_pass, &s, error));
fail:
    psoup__free(context, owner);
    psoup__free(context, s.rows);
    psoup__free(context, s.pass);
    return status;
}

psoup_status psoup_reward_score(psoup_reward *reward, const psoup_row *rows, size_t n, float *out,
                                psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__adapter *adapter = NULL;
    psoup__passes *passes = NULL;
    psoup__sequence *sequences = NULL;
    int32_t index = -1;
    if (!reward || (n && (!rows || !out)))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_reward_score: an argument is NULL");
    PSOUP__TRY(psoup__reward_adapter(reward, &adapter, &index, error));
    PSOUP__TRY(psoup__reward_passes(reward, &passes, error));
    sequences = psoup__alloc(reward->model->context, n, sizeof(*sequences), error);
    if (!sequences)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < n; i++) {
        if (rows[i].n == 0 || !rows[i].tokens) {
            status = psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                 "reward model '%s': row %zu has no tokens", reward->name, i);
            goto fail;
        }
        sequences[i] = (psoup__sequence){
            .first = rows[i].tokens, .n_first = rows[i].n, .adapter = index};
    }
    PSOUP__TRY(psoup__score_sequences(passes, sequences, n, out, error));
fail:
    psoup__free(reward->model->context, sequences);
    return status;
}
