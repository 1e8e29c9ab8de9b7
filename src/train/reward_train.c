/* Bradley–Terry training of several reward models of one base, side by side. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "train/reward.h"

/* Whether anyone's validation is due now: marks whose. */
static bool validation_due(psoup__reward_trainer *t) {
    int32_t every = t->options.validate_every;
    bool any = false;
    for (size_t j = 0; j < t->n; j++) {
        psoup__reward_learner *l = &t->learners[j];
        l->due = l->n_validation && l->step > l->validated &&
                 (l->step == l->total || (every && l->step % every == 0));
        any = any || l->due;
    }
    return any;
}

/* The steps of those who train the longest: done, or in all. */
static int64_t most_steps(const psoup__reward_trainer *t, bool total) {
    int64_t most = 0;
    for (size_t j = 0; j < t->n; j++) {
        int64_t steps = total ? t->learners[j].total : t->learners[j].step;
        most = steps > most ? steps : most;
    }
    return most;
}

/* ---- checkpoints --------------------------------------------------------------------------------- */

static psoup_status identify_rows(psoup__reward_trainer *t, const char *key,
                                  const psoup_comparison *rows, size_t n, psoup_error *error) {
    psoup__hash *hash = psoup__hash_create(t->model->context, error);
    if (!hash)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < n; i++) {
        psoup__hash_tokens(hash, rows[i].chosen, rows[i].n_chosen);
        psoup__hash_tokens(hash, rows[i].rejected, rows[i].n_rejected);
        psoup__hash_update(hash, &rows[i].reward, sizeof(rows[i].reward));
        if (t->options.margins)
            psoup__hash_update(hash, &rows[i].margin, sizeof(rows[i].margin));
    }
    psoup_status status = psoup__run_rows(&t->checkpoint, key, n, hash, error);
    psoup__free(t->model->context, hash);
    return status;
}

static psoup_status identify(psoup__reward_trainer *t, const psoup_comparison *train, size_t n_train,
                             const psoup_comparison *validation, size_t n_validation,
                             psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__checkpoint *c = &t->checkpoint;
    PSOUP__TRY(psoup__run_text(c, "trainer", error, "reward"));
    PSOUP__TRY(psoup__run_options(c, psoup_reward_fields(), &t->options, error));
    PSOUP__TRY(psoup__run_base(c, "base", t->model, error));
    for (size_t j = 0; j < t->n; j++) {
        char key[64];
        snprintf(key, sizeof(key), "reward %zu", j);
        PSOUP__TRY(psoup__run_adapter(c, key, t->model, t->learners[j].adapter, false, error));
    }
    PSOUP__TRY(psoup__run_text(c, "rewards", error, "%zu", t->n));
    PSOUP__TRY(identify_rows(t, "train", train, n_train, error));
    PSOUP__TRY(identify_rows(t, "validation", validation, n_validation, error));
fail:
    return status;
}

static psoup_status start_checkpoint(psoup__reward_trainer *t, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__checkpoint *c = &t->checkpoint;
    for (size_t j = 0; j < t->n; j++) {
        psoup__reward_learner *l = &t->learners[j];
        const psoup__piece pieces[] = {
            {.name = "epoch", .dtype = PSOUP_I64, .data = &l->epoch, .n = 1},
            {.name = "at", .dtype = PSOUP_I64, .data = &l->at, .n = 1},
            {.name = "step", .dtype = PSOUP_I64, .data = &l->step, .n = 1},
            {.name = "validated", .dtype = PSOUP_I64, .data = &l->validated, .n = 1},
            {.name = "sequences", .dtype = PSOUP_I64, .data = &l->sequences, .n = 1},
        };
        PSOUP__TRY(psoup__checkpoint_add(c, j, pieces, sizeof(pieces) / sizeof(pieces[0]), error));
        PSOUP__TRY(psoup__checkpoint_add_learner(c, j, &l->optimizer, &l->best, error));
    }
    PSOUP__TRY(psoup__checkpoint_start(c, error));
    for (size_t j = 0; j < t->n; j++) {
        psoup__reward_learner *l = &t->learners[j];
        PSOUP__TRY(psoup__checkpoint_expect(c, l->at <= l->n_train && l->step <= l->total,
                                            "place in the data", error));
        if (l->epoch >= 0)
            psoup__reward_order(t, l);
    }
fail:
    return status;
}

/* ---- setting up ------------------------------------------------------------------------------- */

psoup_status psoup__reward_check_comparisons(const psoup_comparison *comparisons, size_t n, size_t n_rewards,
                                             bool margins, const char *what, psoup_error *error) {
    if (n > INT32_MAX || (n && !comparisons))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "reward training: %s is NULL or too long",
                           what);
    for (size_t i = 0; i < n; i++) {
        const psoup_comparison *pair = &comparisons[i];
        if (!pair->chosen || !pair->rejected || pair->n_chosen == 0 || pair->n_rejected == 0)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "reward training: %s[%zu] has an empty row", what, i);
        if (pair->reward < 0 || (size_t)pair->reward >= n_rewards)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "reward training: %s[%zu] names reward %d of %zu", what, i,
                               pair->reward, n_rewards);
        if (margins && !isfinite(pair->margin))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "reward training: %s[%zu] has margin %g: expected a finite number", what, i,
                               (double)pair->margin);
    }
    return PSOUP_OK;
}

/* The places of the comparisons of reward `j`. */
static psoup_status choose(psoup_context *context, const psoup_comparison *comparisons, size_t n,
                           size_t j, int32_t **out, size_t *count, psoup_error *error) {
    *out = psoup__alloc(context, n, sizeof(**out), error);
    if (!*out)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < n; i++)
        if ((size_t)comparisons[i].reward == j)
            (*out)[(*count)++] = (int32_t)i;
    return PSOUP_OK;
}

static psoup_status set_up(psoup__reward_trainer *t, psoup_reward *const *rewards, size_t n_rewards,
                           const psoup_comparison *train, size_t n_train,
                           const psoup_comparison *validation, size_t n_validation,
                           psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = t->model->context;
    t->learners = psoup__alloc(context, n_rewards, sizeof(*t->learners), error);
    if (!t->learners)
        return PSOUP_ERROR_MEMORY;
    t->n = n_rewards;
    PSOUP__TRY(psoup__passes_create(t->model, t->options.gradient_checkpointing, &t->passes, error));
    for (size_t j = 0; j < n_rewards; j++) {
        psoup__reward_learner *l = &t->learners[j];
        l->name = psoup__strdup(context, rewards[j]->name, error);
        l->epoch = -1;
        if (!l->name)
            return PSOUP_ERROR_MEMORY;
        PSOUP__TRY(psoup__reward_adapter(rewards[j], &l->adapter, &l->index, error));
        PSOUP__TRY(choose(context, train, n_train, j, &l->train, &l->n_train, error));
        PSOUP__TRY(choose(context, validation, n_validation, j, &l->validation, &l->n_validation,
                          error));
        l->order = psoup__alloc(context, l->n_train, sizeof(*l->order), error);
        if (!l->order)
            return PSOUP_ERROR_MEMORY;
    }
fail:
    return status;
}

static psoup_status start_training(psoup__reward_trainer *t, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const psoup_reward_options *o = &t->options;
    int64_t per_step = (int64_t)o->batch_size * o->accumulation;
    for (size_t j = 0; j < t->n; j++) {
        psoup__reward_learner *l = &t->learners[j];
        if (l->adapter->grad)
            return psoup__fail(error, PSOUP_ERROR_STATE,
                               "reward model '%s' is being trained already", l->name);
        if (l->n_train == 0)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "reward model '%s' has no comparisons to train on", l->name);
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
    }
fail:
    return status;
}

static void tear_down(psoup__reward_trainer *t) {
    psoup_context *context = t->model->context;
    void *arrays[] = {t->item, t->owner, t->rows, t->pass, t->stream, t->score};
    for (size_t j = 0; j < t->n; j++) {
        psoup__reward_learner *l = &t->learners[j];
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

psoup_status psoup__reward_check_models(psoup_reward *const *rewards, size_t n, psoup_error *error) {
    if (n == 0 || !rewards)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "reward training: there is no reward model");
    for (size_t j = 0; j < n; j++) {
        for (size_t i = 0; i <= j; i++)
            if (!rewards[j] || (i < j && strcmp(rewards[i]->name, rewards[j]->name) == 0))
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                   "reward training: rewards[%zu] is %s", j,
                                   rewards[j] ? "there twice" : "NULL");
        if (rewards[j]->model != rewards[0]->model)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "reward models '%s' and '%s' are of different models: those trained "
                               "together share one", rewards[0]->name, rewards[j]->name);
    }
    return PSOUP_OK;
}

/* ---- the training ----------------------------------------------------------------------------------- */

static bool is_due(void *state) { return validation_due(state); }

static psoup_status run_validation(void *state, psoup_error *error) {
    psoup__reward_trainer *t = state;
    return psoup__reward_validate(t, t->validation, error);
}

static psoup_status run_step(void *state, psoup_error *error) {
    psoup__reward_trainer *t = state;
    return psoup__reward_step(t, t->train, error);
}

static void progress(const void *state, int64_t *step, int64_t *total) {
    *step = most_steps(state, false);
    *total = most_steps(state, true);
}

static psoup_status refresh(void *state, psoup_error *error) {
    psoup__reward_trainer *t = state;
    psoup_status status = PSOUP_OK;
    for (size_t j = 0; status == PSOUP_OK && j < t->n; j++)
        status = psoup__training_adapter(t->model, t->learners[j].name, t->learners[j].adapter,
                                         &t->learners[j].optimizer, &t->learners[j].index, error);
    return status;
}

static void restore(void *state) {
    psoup__reward_trainer *t = state;
    for (size_t j = 0; j < t->n; j++) {
        const psoup__reward_learner *l = &t->learners[j];
        psoup__best_restore(&l->best, t->model->be, l->adapter->data);
        psoup__best_tell(&l->best, &t->team, "reward", l->name, l->total);
    }
}

static psoup_status end(void *state, psoup_error *error) {
    psoup__reward_trainer *t = state;
    psoup_context *context = t->model->context;
    tear_down(t);
    psoup__free(context, t);
    return PSOUP_OK;
}

static const psoup__trainer trainer = {is_due, run_validation, run_step, progress, refresh, restore, end};

psoup_status psoup_reward_train_create(psoup_reward *const *rewards, size_t n_rewards,
                                       const psoup_comparison *train, size_t n_train,
                                       const psoup_comparison *validation, size_t n_validation,
                                       const psoup_reward_options *options, psoup_training **out,
                                       psoup_error *error) {
    psoup_status status = psoup__reward_check_models(rewards, n_rewards, error);
    if (out)
        *out = NULL;
    if (status == PSOUP_OK && !out)
        status = psoup__fail(error, PSOUP_ERROR_ARGUMENT, "reward training: out is NULL");
    if (status != PSOUP_OK)
        return status;
    psoup_context *context = rewards[0]->model->context;
    psoup__reward_trainer *t = psoup__alloc(context, 1, sizeof(*t), error);
    if (!t)
        return PSOUP_ERROR_MEMORY;
    *t = (psoup__reward_trainer){.model = rewards[0]->model,
                                 .options = PSOUP_REWARD_OPTIONS_INIT,
                                 .train = train,
                                 .validation = validation};
    PSOUP__TRY(psoup__options(&t->options, sizeof(t->options), options, "psoup_reward_options",
                              error));
    PSOUP__TRY(psoup__team_join(&t->team, t->model->context, t->options.comm, error));
    PSOUP__TRY(psoup__reward_check(&t->options, error));
    PSOUP__TRY(psoup__reward_check_comparisons(train, n_train, n_rewards, t->options.margins, "train", error));
    PSOUP__TRY(psoup__reward_check_comparisons(validation, n_validation, n_rewards, t->options.margins, "validation",
                                               error));
    PSOUP__TRY(set_up(t, rewards, n_rewards, train, n_train, validation, n_validation, error));
    for (size_t j = 0; j < t->n; j++)
        PSOUP__TRY(psoup__adapter_may_train(t->model, t->learners[j].adapter, true, error));
    PSOUP__TRY(psoup__reporter_open(&t->reporter, &t->team, t->options.metrics,
                                    t->options.on_step, t->options.user, error));
    if (psoup__checkpoint_wanted(t->options.checkpoint_dir, &t->team)) {
        PSOUP__TRY(psoup__checkpoint_open(&t->checkpoint, t->model->context, &t->reporter,
                                          t->options.checkpoint_dir, t->options.checkpoint_every,
                                          t->options.checkpoint_keep, t->options.resume, error));
        PSOUP__TRY(identify(t, train, n_train, validation, n_validation, error));
    }
    PSOUP__TRY(start_training(t, error));
    if (t->checkpoint.run)
        PSOUP__TRY(start_checkpoint(t, error));
fail:
    return psoup__training_made(status, (psoup_training){context, &trainer, t, &t->checkpoint, &t->team}, out,
                                error);
}

psoup_status psoup_reward_train(psoup_reward *const *rewards, size_t n_rewards,
                                const psoup_comparison *train, size_t n_train,
                                const psoup_comparison *validation, size_t n_validation,
                                const psoup_reward_options *options, psoup_error *error) {
    psoup_training *training = NULL;
    psoup_status status = psoup_reward_train_create(rewards, n_rewards, train, n_train, validation, n_validation,
                                                    options, &training, error);
    return psoup__training_whole(status, training, error);
}

psoup_status psoup_reward_accuracy(psoup_reward *const *rewards, size_t n_rewards,
                                   const psoup_comparison *comparisons, size_t n, double *accuracy,
                                   double *loss, psoup_error *error) {
    psoup_status status = psoup__reward_check_models(rewards, n_rewards, error);
    if (status != PSOUP_OK)
        return status;
    psoup__reward_trainer t = {.model = rewards[0]->model, .options = PSOUP_REWARD_OPTIONS_INIT};
    double right = 0.0, sum = 0.0;
    t.options.max_tokens = 0;
    PSOUP__TRY(psoup__reward_check_comparisons(comparisons, n, n_rewards, false, "comparisons", error));
    PSOUP__TRY(set_up(&t, rewards, n_rewards, NULL, 0, comparisons, n, error));
    for (size_t j = 0; j < t.n; j++)
        t.learners[j].due = true;
    PSOUP__TRY(psoup__reward_evaluate(&t, comparisons, error));
    for (size_t j = 0; j < t.n; j++) {
        right += t.learners[j].right;
        sum += t.learners[j].loss;
    }
    if (accuracy)
        *accuracy = n ? right / (double)n : 0.0;
    if (loss)
        *loss = n ? sum / (double)n : 0.0;
fail:
    tear_down(&t);
    return status;
}
