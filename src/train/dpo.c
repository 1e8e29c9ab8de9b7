/* Direct preference optimisation of several policies of one base, side by side (Rafailov et al. 2023,
 * arXiv 2305.18290). The reference is the base itself: a zero mix. */
#include <stdio.h>
#include <string.h>

#include "train/dpo.h"

/* ---- the run ------------------------------------------------------------------------------------ */

/* Whether anyone's validation is due now: marks whose. */
static bool validation_due(psoup__dpo_trainer *t) {
    int32_t every = t->options.validate_every;
    bool any = false;
    for (size_t j = 0; j < t->n; j++) {
        psoup__dpo_learner *l = &t->learners[j];
        l->due = l->n_validation && l->step > l->validated &&
                 (l->step == l->total || (every && l->step % every == 0));
        any = any || l->due;
    }
    return any;
}

/* The steps of those who train the longest: done, or in all. */
static int64_t most_steps(const psoup__dpo_trainer *t, bool total) {
    int64_t most = 0;
    for (size_t j = 0; j < t->n; j++) {
        int64_t steps = total ? t->learners[j].total : t->learners[j].step;
        most = steps > most ? steps : most;
    }
    return most;
}

/* ---- checkpoints --------------------------------------------------------------------------------- */

static psoup_status identify_pairs(psoup__dpo_trainer *t, const char *key, const psoup__dpo_set *set,
                                   psoup_error *error) {
    psoup__hash *hash = psoup__hash_create(t->model->context, error);
    if (!hash)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < set->n; i++) {
        const psoup_dpo_pair *pair = &set->pairs[i];
        psoup__hash_tokens(hash, pair->prompt, pair->n_prompt);
        psoup__hash_tokens(hash, pair->chosen, pair->n_chosen);
        psoup__hash_tokens(hash, pair->rejected, pair->n_rejected);
        psoup__hash_update(hash, &pair->policy, sizeof(pair->policy));
    }
    psoup_status status = psoup__run_rows(&t->checkpoint, key, set->n, hash, error);
    psoup__free(t->model->context, hash);
    return status;
}

/* What the reference thinks is no part of it: it is asked again. */
static psoup_status start_checkpoint(psoup__dpo_trainer *t, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__checkpoint *c = &t->checkpoint;
    const psoup_dpo_options *o = &t->options;
    PSOUP__TRY(psoup__checkpoint_open(c, t->model->context, &t->reporter, o->checkpoint_dir,
                                      o->checkpoint_every, o->checkpoint_keep, o->resume, error));
    PSOUP__TRY(psoup__run_text(c, "trainer", error, "dpo"));
    PSOUP__TRY(psoup__run_options(c, psoup_dpo_fields(), o, error));
    PSOUP__TRY(psoup__run_base(c, "base", t->model, error));
    PSOUP__TRY(psoup__run_text(c, "policies", error, "%zu", t->n));
    PSOUP__TRY(identify_pairs(t, "train", &t->train, error));
    PSOUP__TRY(identify_pairs(t, "validation", &t->validation, error));
    for (size_t j = 0; j < t->n; j++) {
        psoup__dpo_learner *l = &t->learners[j];
        char key[64];
        const psoup__piece pieces[] = {
            {.name = "epoch", .dtype = PSOUP_I64, .data = &l->epoch, .n = 1},
            {.name = "at", .dtype = PSOUP_I64, .data = &l->at, .n = 1},
            {.name = "step", .dtype = PSOUP_I64, .data = &l->step, .n = 1},
            {.name = "validated", .dtype = PSOUP_I64, .data = &l->validated, .n = 1},
            {.name = "sequences", .dtype = PSOUP_I64, .data = &l->sequences, .n = 1},
        };
        snprintf(key, sizeof(key), "policy %zu", j);
        PSOUP__TRY(psoup__run_adapter(c, key, t->model, l->adapter, false, error));
        PSOUP__TRY(psoup__checkpoint_add(c, j, pieces, sizeof(pieces) / sizeof(pieces[0]), error));
        PSOUP__TRY(psoup__checkpoint_add_learner(c, j, &l->optimizer, &l->best, error));
    }
    PSOUP__TRY(psoup__checkpoint_start(c, error));
    for (size_t j = 0; j < t->n; j++) {
        psoup__dpo_learner *l = &t->learners[j];
        PSOUP__TRY(psoup__checkpoint_expect(c, l->at <= l->n_train && l->step <= l->total,
                                            "place in the data", error));
        if (l->epoch >= 0)
            psoup__dpo_order(t, l);
    }
fail:
    return status;
}

/* ---- setting up ------------------------------------------------------------------------------- */

static psoup_status check_pairs(const psoup__dpo_trainer *t, const psoup__dpo_set *set, size_t n_policies,
                                const char *what, psoup_error *error) {
    if (set->n > INT32_MAX || (set->n && !set->pairs))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_dpo: %s is NULL or too long", what);
    for (size_t i = 0; i < set->n; i++) {
        const psoup_dpo_pair *pair = &set->pairs[i];
        if (!pair->prompt || !pair->chosen || !pair->rejected || pair->n_prompt == 0 ||
            pair->n_chosen == 0 || pair->n_rejected == 0)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "psoup_dpo: %s[%zu] has an empty prompt or response", what, i);
        if (pair->n_prompt >= psoup__dpo_longest_row(t))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "psoup_dpo: %s[%zu] has a prompt of %zu tokens: expected fewer than "
                               "the %zu of a row", what, i, pair->n_prompt, psoup__dpo_longest_row(t));
        if (pair->policy < 0 || (size_t)pair->policy >= n_policies)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "psoup_dpo: %s[%zu] names policy %d of %zu", what, i, pair->policy,
                               n_policies);
        if (!psoup__all_zero(pair->reserved, sizeof(pair->reserved)))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_dpo: %s[%zu].reserved is not 0", what, i);
    }
    return PSOUP_OK;
}

static psoup_status check_policies(const psoup_model *model, const char *const *policies, size_t n,
                                   psoup_error *error) {
    if (n == 0 || !policies)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_dpo: there is no policy");
    for (size_t j = 0; j < n; j++) {
        const psoup__adapter *adapter =
            policies[j] ? psoup__model_adapter(model, policies[j]) : NULL;
        if (!adapter)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_dpo: the model has no adapter '%s'",
                               policies[j] ? policies[j] : "(NULL)");
        if (adapter->grad)
            return psoup__fail(error, PSOUP_ERROR_STATE, "adapter '%s' is being trained already",
                               policies[j]);
        psoup_status status = psoup__adapter_may_train(model, adapter, true, error);
        if (status != PSOUP_OK)
            return status;
        for (size_t i = 0; i < j; i++)
            if (strcmp(policies[i], policies[j]) == 0)
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s' is there twice",
                                   policies[j]);
    }
    return PSOUP_OK;
}

psoup_status psoup__dpo_check_run(const psoup__dpo_trainer *t, const char *const *policies, size_t n,
                                  psoup_error *error) {
    psoup_status status = psoup__dpo_check(&t->options, error);
    if (status == PSOUP_OK)
        status = check_policies(t->model, policies, n, error);
    if (status == PSOUP_OK)
        status = check_pairs(t, &t->train, n, "train", error);
    return status == PSOUP_OK ? check_pairs(t, &t->validation, n, "validation", error) : status;
}

/* The places of the pairs of policy `j`. */
static psoup_status choose(psoup_context *context, const psoup__dpo_set *set, size_t j, int32_t **out,
                           size_t *count, psoup_error *error) {
    *out = psoup__alloc(context, set->n, sizeof(**out), error);
    if (!*out)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < set->n; i++)
        if ((size_t)set->pairs[i].policy == j)
            (*out)[(*count)++] = (int32_t)i;
    return PSOUP_OK;
}

static psoup_status start_policy(psoup__dpo_trainer *t, psoup__dpo_learner *l, size_t j, const char *name,
                                 psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = t->model->context;
    const psoup_dpo_options *o = &t->options;
    int64_t per_step = (int64_t)o->batch_size * o->accumulation;
    l->name = psoup__strdup(context, name, error);
    l->epoch = -1;
    if (!l->name)
        return PSOUP_ERROR_MEMORY;
    l->adapter = psoup__model_adapter(t->model, l->name);
    l->index = psoup_model_find_adapter(t->model, l->name);
    PSOUP__TRY(choose(context, &t->train, j, &l->train, &l->n_train, error));
    PSOUP__TRY(choose(context, &t->validation, j, &l->validation, &l->n_validation, error));
    if (l->n_train == 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s' has no pairs to train on",
                           l->name);
    l->order = psoup__alloc(context, l->n_train, sizeof(*l->order), error);
    if (!l->order)
        return PSOUP_ERROR_MEMORY;
    int64_t per_epoch = ((int64_t)l->n_train + per_step - 1) / per_step;
    l->total = o->max_steps > 0 ? o->max_steps : per_epoch * o->epochs;
    PSOUP__TRY(psoup__adapter_train(t->model, l->adapter, true, error));
    l->training = true;
    l->optimizer = (psoup__optimizer){.p = l->adapter->data,
                                      .g = l->adapter->grad,
                                      .gradients = l->adapter->gradients,
                                      .stride = l->adapter->count,
                                      .n = l->adapter->count,
                                      .beta1 = o->beta1,
                                      .beta2 = o->beta2,
                                      .epsilon = o->epsilon,
                                      .weight_decay = o->weight_decay,
                                      .max_grad_norm = o->max_grad_norm,
                                      .max_grad_value = o->max_grad_value};
    PSOUP__TRY(psoup__optimizer_start(&l->optimizer, t->model->be, error));
fail:
    return status;
}

static psoup_status set_up(psoup__dpo_trainer *t, const char *const *policies, size_t n,
                           psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = t->model->context;
    size_t items = t->train.n > t->validation.n ? t->train.n : t->validation.n;
    t->item = psoup__alloc(context, items, sizeof(*t->item), error);
    t->owner = psoup__alloc(context, items, sizeof(*t->owner), error);
    t->rows = psoup__alloc(context, items, sizeof(*t->rows), error);
    t->pass = psoup__alloc(context, items, sizeof(*t->pass), error);
    t->stream = psoup__alloc(context, items, sizeof(*t->stream), error);
    t->learners = psoup__alloc(context, n, sizeof(*t->learners), error);
    t->logprob = psoup__alloc(context, 2 * items, sizeof(*t->logprob), error);
    if (!t->item || !t->owner || !t->rows || !t->pass || !t->stream || !t->logprob || !t->learners)
        return PSOUP_ERROR_MEMORY;
    t->n = n;
    PSOUP__TRY(psoup__passes_create(t->model, t->options.gradient_checkpointing, &t->passes, error));
    for (size_t j = 0; j < n; j++)
        PSOUP__TRY(start_policy(t, &t->learners[j], j, policies[j], error));
fail:
    return status;
}

static void tear_down(psoup__dpo_trainer *t) {
    psoup_context *context = t->model->context;
    void *arrays[] = {t->item,   t->owner, t->rows, t->pass, t->stream, t->logprob, t->train.reference,
                      t->validation.reference};
    for (size_t j = 0; j < t->n; j++) {
        psoup__dpo_learner *l = &t->learners[j];
        psoup__optimizer_end(&l->optimizer);
        if (l->training && psoup__model_adapter(t->model, l->name) == l->adapter)
            psoup__adapter_train(t->model, l->adapter, false, NULL);
        psoup__best_free(&l->best, context);
        psoup__free(context, l->train);
        psoup__free(context, l->validation);
        psoup__free(context, l->order);
        psoup__free(context, l->name);
    }
    for (size_t i = 0; i < sizeof(arrays) / sizeof(arrays[0]); i++)
        psoup__free(context, arrays[i]);
    psoup__free(context, t->learners);
    psoup__checkpoint_close(&t->checkpoint);
    psoup__reporter_close(&t->reporter);
    psoup__team_leave(&t->team);
    psoup__passes_free(t->passes);
}

/* ---- the training ----------------------------------------------------------------------------------- */

static bool is_due(void *state) { return validation_due(state); }

static psoup_status run_validation(void *state, psoup_error *error) {
    return psoup__dpo_validate(state, error);
}
static psoup_status run_step(void *state, psoup_error *error) { return psoup__dpo_step(state, error); }

static void progress(const void *state, int64_t *step, int64_t *total) {
    *step = most_steps(state, false);
    *total = most_steps(state, true);
}

static psoup_status refresh(void *state, psoup_error *error) {
    psoup__dpo_trainer *t = state;
    psoup_status status = PSOUP_OK;
    for (size_t j = 0; status == PSOUP_OK && j < t->n; j++)
        status = psoup__training_adapter(t->model, t->learners[j].name, t->learners[j].adapter,
                                         &t->learners[j].optimizer, &t->learners[j].index, error);
    return status;
}

static void restore(void *state) {
    psoup__dpo_trainer *t = state;
    for (size_t j = 0; j < t->n; j++) {
        const psoup__dpo_learner *l = &t->learners[j];
        psoup__best_restore(&l->best, t->model->be, l->adapter->data);
        psoup__best_tell(&l->best, &t->team, "dpo", l->name, l->total);
    }
}

static psoup_status end(void *state, psoup_error *error) {
    psoup__dpo_trainer *t = state;
    psoup_context *context = t->model->context;
    tear_down(t);
    psoup__free(context, t);
    return PSOUP_OK;
}

static const psoup__trainer trainer = {is_due, run_validation, run_step, progress, refresh, restore, end};

psoup_status psoup_dpo_create(psoup_model *model, const char *const *policies, size_t n_policies,
                              const psoup_dpo_pair *train, size_t n_train,
                              const psoup_dpo_pair *validation, size_t n_validation,
                              const psoup_dpo_options *options, psoup_training **out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    if (out)
        *out = NULL;
    if (!model || !out)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_dpo: %s is NULL", model ? "out" : "model");
    psoup__dpo_trainer *t = psoup__alloc(model->context, 1, sizeof(*t), error);
    if (!t)
        return PSOUP_ERROR_MEMORY;
    *t = (psoup__dpo_trainer){.model = model,
                              .options = PSOUP_DPO_OPTIONS_INIT,
                              .train = {.pairs = train, .n = n_train},
                              .validation = {.pairs = validation, .n = n_validation}};
    PSOUP__TRY(psoup__options(&t->options, sizeof(t->options), options, "psoup_dpo_options", error));
    PSOUP__TRY(psoup__team_join(&t->team, model->context, t->options.comm, error));
    PSOUP__TRY(psoup__dpo_check_run(t, policies, n_policies, error));
    PSOUP__TRY(psoup__reporter_open(&t->reporter, &t->team, t->options.metrics,
                                    t->options.on_step, t->options.user, error));
    PSOUP__TRY(set_up(t, policies, n_policies, error));
    if (psoup__checkpoint_wanted(t->options.checkpoint_dir, &t->team))
        PSOUP__TRY(start_checkpoint(t, error));
    PSOUP__TRY(psoup__dpo_ask_reference(t, &t->train, error));
    PSOUP__TRY(psoup__dpo_ask_reference(t, &t->validation, error));
fail:
    return psoup__training_made(status, (psoup_training){model->context, &trainer, t, &t->checkpoint, &t->team},
                                out, error);
}

psoup_status psoup_dpo(psoup_model *model, const char *const *policies, size_t n_policies,
                       const psoup_dpo_pair *train, size_t n_train,
                       const psoup_dpo_pair *validation, size_t n_validation,
                       const psoup_dpo_options *options, psoup_error *error) {
    psoup_training *training = NULL;
    psoup_status status = psoup_dpo_create(model, policies, n_policies, train, n_train, validation, n_validation,
                                           options, &training, error);
    return psoup__training_whole(status, training, error);
}
