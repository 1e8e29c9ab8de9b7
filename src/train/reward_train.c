/* Bradley–Terry training of several reward models of one base, side by side. */
#include <string.h>

#include "train/train.h"

/* One model of the run. Nothing in it depends on the others. */
typedef struct learner {
    const char *name;
    psoup__adapter *adapter;
    int32_t index;
    bool training; /* its adapter holds gradients */
    int32_t *train, *validation; /* [n_train], [n_validation]: its comparisons, by place */
    size_t n_train, n_validation;
    int32_t *order; /* [n_train] permutation of the epoch */
    size_t at;      /* in it */
    int64_t epoch, step, total;
    uint64_t sequences; /* trained on so far: the dropout's stream */
    psoup__optimizer optimizer;
    psoup__best best;
    /* This step. */
    size_t step_end, micro_end; /* in order */
    double loss, right, margin, norm;
    bool stepped, due; /* due: its validation is */
} learner;

typedef struct trainer {
    psoup_model *model;
    psoup_reward_options options;
    const psoup_comparison *comparisons; /* those of the pass */
    learner *learners;
    size_t n;
    psoup__pack *pack;
    psoup__reporter reporter;
    /* The items of a micro-batch: comparisons of all learners. */
    size_t capacity;
    int32_t *item, *owner, *rows, *pass; /* [items] */
    uint64_t *stream;                    /* [items] of the chosen row; the rejected has the next */
} trainer;

static size_t row_length(const psoup_model *model, int32_t max_tokens, size_t n) {
    size_t most = (size_t)model->config.max_position_embeddings;
    if (max_tokens > 0 && (size_t)max_tokens < most)
        most = (size_t)max_tokens;
    return n < most ? n : most;
}

/* Longer rows keep their first tokens, as Hugging Face's truncation and PPO's scoring do. */
static psoup__sequence row_of(const psoup_model *model, int32_t max_tokens, const int32_t *tokens,
                              size_t n, int32_t adapter) {
    size_t length = row_length(model, max_tokens, n);
    return (psoup__sequence){.first = tokens, .n_first = length, .adapter = adapter};
}

static psoup_status reserve_items(trainer *t, size_t n, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = t->model->context;
    size_t a = t->capacity, b = a, c = a, d = a, e = a;
    PSOUP__TRY(psoup__reserve(context, &t->item, &a, n, sizeof(*t->item), error));
    PSOUP__TRY(psoup__reserve(context, &t->owner, &b, n, sizeof(*t->owner), error));
    PSOUP__TRY(psoup__reserve(context, &t->rows, &c, n, sizeof(*t->rows), error));
    PSOUP__TRY(psoup__reserve(context, &t->pass, &d, n, sizeof(*t->pass), error));
    PSOUP__TRY(psoup__reserve(context, &t->stream, &e, n, sizeof(*t->stream), error));
    t->capacity = e;
fail:
    return status;
}

/* Both rows of the items of one pass, and their heads: value[2k] chosen, value[2k + 1] rejected. */
static psoup_status pack_items(trainer *t, size_t n, int32_t pass, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    uint64_t seed = psoup__seed_for(t->options.seed, PSOUP__FOR_LORA_DROPOUT);
    psoup__pack_clear(t->pack);
    for (size_t i = 0; i < n; i++) {
        if (t->pass[i] != pass)
            continue;
        const psoup_comparison *pair = &t->comparisons[t->item[i]];
        const learner *l = &t->learners[t->owner[i]];
        for (int side = 0; side < 2; side++) {
            psoup__sequence sequence =
                row_of(t->model, t->options.max_tokens, side ? pair->rejected : pair->chosen,
                       side ? pair->n_rejected : pair->n_chosen, l->index);
            int32_t row;
            sequence.seed = seed;
            sequence.stream = t->stream[i] + (uint64_t)side;
            PSOUP__TRY(psoup__pack_sequence(t->pack, &sequence, &row, error));
            PSOUP__TRY(psoup__pack_head(t->pack, l->adapter, row + (int32_t)sequence.n_first - 1, 0,
                                        0, 0, error));
        }
    }
fail:
    return status;
}

/* Runs the items that were listed, in as many passes as it takes; with `learn` backwards too. Sums of
 * loss, right answers and margins go to the learners. */
static psoup_status run_items(trainer *t, size_t n, bool learn, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    int32_t passes = 0;
    for (size_t i = 0; i < n; i++) {
        const psoup_comparison *pair = &t->comparisons[t->item[i]];
        t->rows[i] = (int32_t)(row_length(t->model, t->options.max_tokens, pair->n_chosen) +
                               row_length(t->model, t->options.max_tokens, pair->n_rejected));
    }
    PSOUP__TRY(psoup__plan(t->model->context, t->rows, t->owner, n, PSOUP__PASS_TOKENS, t->pass,
                           &passes, error));
    for (int32_t pass = 0; pass < passes; pass++) {
        PSOUP__TRY(pack_items(t, n, pass, error));
        PSOUP__TRY(psoup__pack_forward(t->pack, learn, learn ? t->options.lora_dropout : 0.0f, 0.0f,
                                       error));
        for (size_t i = 0, k = 0; i < n; i++) {
            if (t->pass[i] != pass)
                continue;
            learner *l = &t->learners[t->owner[i]];
            double w = t->pack->value[k], r = t->pack->value[k + 1], dw, dr;
            l->loss += psoup__bradley_terry(w, r, t->options.margin, t->options.centering, &dw, &dr);
            l->right += w > r;
            l->margin += w - r;
            if (learn) {
                double scale = 1.0 / (double)(l->step_end - l->at); /* mean over the step */
                t->pack->dvalue[k] = (float)(dw * scale);
                t->pack->dvalue[k + 1] = (float)(dr * scale);
            }
            k += 2;
        }
        if (learn)
            PSOUP__TRY(psoup__pack_backward(t->pack, error));
    }
fail:
    return status;
}

static void clear_sums(learner *l) { l->loss = l->right = l->margin = 0.0; }

/* The validation comparisons of every learner that is due. */
static psoup_status evaluate(trainer *t, const psoup_comparison *comparisons, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t n = 0;
    t->comparisons = comparisons;
    for (size_t j = 0; j < t->n; j++) {
        learner *l = &t->learners[j];
        if (!l->due)
            continue;
        clear_sums(l);
        PSOUP__TRY(reserve_items(t, n + l->n_validation, error));
        for (size_t i = 0; i < l->n_validation; i++, n++) {
            t->item[n] = l->validation[i];
            t->owner[n] = (int32_t)j;
            t->stream[n] = 0;
        }
    }
    PSOUP__TRY(run_items(t, n, false, error));
fail:
    return status;
}

/* Starts each learner's next step: where it ends in its order. */
static void begin_step(const trainer *t, learner *l) {
    size_t per_step = (size_t)t->options.batch_size * (size_t)t->options.accumulation;
    if (l->at == l->n_train || l->epoch < 0) {
        psoup__permutation(l->order, l->n_train,
                           psoup__seed_for(t->options.seed, PSOUP__FOR_ORDER),
                           (uint64_t)++l->epoch);
        l->at = 0;
    }
    l->step_end = l->n_train - l->at < per_step ? l->n_train : l->at + per_step;
    l->micro_end = l->at;
    clear_sums(l);
    psoup__optimizer_zero(&l->optimizer);
}

static psoup_status train_step(trainer *t, const psoup_comparison *comparisons, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    t->comparisons = comparisons;
    for (size_t j = 0; j < t->n; j++)
        if (t->learners[j].step < t->learners[j].total)
            begin_step(t, &t->learners[j]);
    for (int32_t a = 0; a < t->options.accumulation; a++) {
        size_t n = 0;
        for (size_t j = 0; j < t->n; j++) {
            learner *l = &t->learners[j];
            if (l->step == l->total)
                continue;
            size_t left = l->step_end - l->micro_end, size = (size_t)t->options.batch_size;
            size = left < size ? left : size;
            PSOUP__TRY(reserve_items(t, n + size, error));
            for (size_t end = l->micro_end + size; l->micro_end < end; l->micro_end++, n++) {
                t->item[n] = l->train[l->order[l->micro_end]];
                t->owner[n] = (int32_t)j;
                t->stream[n] = l->sequences;
                l->sequences += 2;
            }
        }
        PSOUP__TRY(run_items(t, n, true, error));
    }
    for (size_t j = 0; j < t->n; j++) {
        learner *l = &t->learners[j];
        if (l->step == l->total)
            continue;
        float rate = psoup__learning_rate(t->options.learning_rate, t->options.schedule,
                                          t->options.warmup_steps, l->step + 1, l->total);
        PSOUP__TRY(psoup__optimizer_step(&l->optimizer, rate, &l->norm, &l->stepped, error));
        double n = (double)(l->step_end - l->at);
        psoup__metrics metrics = {.n = 0};
        psoup__metric(&metrics, "loss", l->loss / n);
        psoup__metric(&metrics, "accuracy", l->right / n);
        psoup__metric(&metrics, "margin", l->margin / n);
        psoup__metric(&metrics, "learning_rate", rate);
        psoup__metric(&metrics, "grad_norm", l->norm);
        psoup__metric(&metrics, "skipped", !l->stepped);
        l->at = l->step_end;
        l->step++;
        PSOUP__TRY(psoup__report(&t->reporter, "train", l->name, l->step, l->total, &metrics,
                                 error));
    }
fail:
    return status;
}

static psoup_status validate(trainer *t, const psoup_comparison *comparisons, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    PSOUP__TRY(evaluate(t, comparisons, error));
    for (size_t j = 0; j < t->n; j++) {
        learner *l = &t->learners[j];
        if (!l->due)
            continue;
        double n = (double)l->n_validation;
        psoup__metrics metrics = {.n = 0};
        psoup__metric(&metrics, "loss", l->loss / n);
        psoup__metric(&metrics, "accuracy", l->right / n);
        psoup__metric(&metrics, "margin", l->margin / n);
        if (t->options.keep_best)
            PSOUP__TRY(psoup__best_offer(&l->best, t->model->be, l->adapter->data,
                                         l->adapter->count, l->right / n, -l->loss / n, l->step,
                                         error));
        PSOUP__TRY(psoup__report(&t->reporter, "validation", l->name, l->step, l->total, &metrics,
                                 error));
    }
fail:
    return status;
}

/* Steps until every learner is done. */
static psoup_status run(trainer *t, const psoup_comparison *train,
                        const psoup_comparison *validation, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    int32_t every = t->options.validate_every;
    for (int64_t step = 1;; step++) {
        bool any = false, any_due = false;
        for (size_t j = 0; j < t->n; j++) {
            learner *l = &t->learners[j];
            bool runs = l->step < l->total;
            l->due = runs && l->n_validation &&
                     (step == l->total || (every && step % every == 0));
            any = any || runs;
            any_due = any_due || l->due;
        }
        if (!any)
            break;
        PSOUP__TRY(train_step(t, train, error));
        if (any_due)
            PSOUP__TRY(validate(t, validation, error));
    }
    for (size_t j = 0; j < t->n; j++)
        psoup__best_restore(&t->learners[j].best, t->model->be, t->learners[j].adapter->data);
fail:
    return status;
}

/* ---- setting up ------------------------------------------------------------------------------- */

static psoup_status check_comparisons(const psoup_comparison *comparisons, size_t n,
                                      size_t n_rewards, const char *what, psoup_error *error) {
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

static psoup_status set_up(trainer *t, psoup_reward *const *rewards, size_t n_rewards,
                           const psoup_comparison *train, size_t n_train,
                           const psoup_comparison *validation, size_t n_validation,
                           psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = t->model->context;
    t->learners = psoup__alloc(context, n_rewards, sizeof(*t->learners), error);
    if (!t->learners)
        return PSOUP_ERROR_MEMORY;
    t->n = n_rewards;
    PSOUP__TRY(psoup__pack_create(t->model, &t->pack, error));
    for (size_t j = 0; j < n_rewards; j++) {
        learner *l = &t->learners[j];
        if (rewards[j]->model != t->model)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "reward models '%s' and '%s' are of different models: those trained "
                               "together share one", rewards[0]->name, rewards[j]->name);
        l->name = rewards[j]->name;
        l->epoch = -1;
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

static psoup_status start_training(trainer *t, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const psoup_reward_options *o = &t->options;
    int64_t per_step = (int64_t)o->batch_size * o->accumulation;
    for (size_t j = 0; j < t->n; j++) {
        learner *l = &t->learners[j];
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
                                          .n = l->adapter->count,
                                          .beta1 = o->beta1,
                                          .beta2 = o->beta2,
                                          .epsilon = o->epsilon,
                                          .weight_decay = o->weight_decay,
                                          .max_grad_norm = o->max_grad_norm};
        PSOUP__TRY(psoup__optimizer_start(&l->optimizer, t->model->be, error));
    }
fail:
    return status;
}

static void tear_down(trainer *t) {
    psoup_context *context = t->model->context;
    void *arrays[] = {t->item, t->owner, t->rows, t->pass, t->stream};
    for (size_t j = 0; j < t->n; j++) {
        learner *l = &t->learners[j];
        psoup__optimizer_end(&l->optimizer);
        if (l->training)
            psoup__adapter_train(t->model, l->adapter, false, NULL);
        psoup__best_free(&l->best, context);
        psoup__free(context, l->train);
        psoup__free(context, l->validation);
        psoup__free(context, l->order);
    }
    for (size_t i = 0; i < sizeof(arrays) / sizeof(arrays[0]); i++)
        psoup__free(context, arrays[i]);
    psoup__free(context, t->learners);
    psoup__reporter_close(&t->reporter);
    psoup__pack_free(t->pack);
}

static psoup_status check_rewards(psoup_reward *const *rewards, size_t n, psoup_error *error) {
    if (n == 0 || !rewards)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "reward training: there is no reward model");
    for (size_t j = 0; j < n; j++)
        for (size_t i = 0; i <= j; i++)
            if (!rewards[j] || (i < j && strcmp(rewards[i]->name, rewards[j]->name) == 0))
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                   "reward training: rewards[%zu] is %s", j,
                                   rewards[j] ? "there twice" : "NULL");
    return PSOUP_OK;
}

psoup_status psoup_reward_train(psoup_reward *const *rewards, size_t n_rewards,
                                const psoup_comparison *train, size_t n_train,
                                const psoup_comparison *validation, size_t n_validation,
                                const psoup_reward_options *options, psoup_error *error) {
    psoup_status status = check_rewards(rewards, n_rewards, error);
    if (status != PSOUP_OK)
        return status;
    trainer t = {.model = rewards[0]->model, .options = PSOUP_REWARD_OPTIONS_INIT};
    PSOUP__TRY(psoup__options(&t.options, sizeof(t.options), options, "psoup_reward_options",
                              error));
    PSOUP__TRY(psoup__reward_check(&t.options, error));
    PSOUP__TRY(check_comparisons(train, n_train, n_rewards, "train", error));
    PSOUP__TRY(check_comparisons(validation, n_validation, n_rewards, "validation", error));
    PSOUP__TRY(set_up(&t, rewards, n_rewards, train, n_train, validation, n_validation, error));
    PSOUP__TRY(psoup__reporter_open(&t.reporter, t.model->context, t.options.metrics,
                                    t.options.on_step, t.options.user, error));
    PSOUP__TRY(start_training(&t, error));
    PSOUP__TRY(run(&t, train, validation, error));
fail:
    tear_down(&t);
    return status;
}

psoup_status psoup_reward_accuracy(psoup_reward *const *rewards, size_t n_rewards,
                                   const psoup_comparison *comparisons, size_t n, double *accuracy,
                                   double *loss, psoup_error *error) {
    psoup_status status = check_rewards(rewards, n_rewards, error);
    if (status != PSOUP_OK)
        return status;
    trainer t = {.model = rewards[0]->model, .options = PSOUP_REWARD_OPTIONS_INIT};
    double right = 0.0, sum = 0.0;
    t.options.max_tokens = 0;
    PSOUP__TRY(check_comparisons(comparisons, n, n_rewards, "comparisons", error));
    PSOUP__TRY(set_up(&t, rewards, n_rewards, NULL, 0, comparisons, n, error));
    for (size_t j = 0; j < t.n; j++)
        t.learners[j].due = true;
    PSOUP__TRY(evaluate(&t, comparisons, error));
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
