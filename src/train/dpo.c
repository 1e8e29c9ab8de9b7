/* Direct preference optimisation of several policies of one base, side by side (Rafailov et al. 2023,
 * arXiv 2305.18290). The reference is the base itself: a zero mix. */
#include <string.h>

#include "train/train.h"

/* The pairs of a run, and what the reference thinks of them. */
typedef struct pair_set {
    const psoup_dpo_pair *pairs; /* [n] */
    size_t n;
    double *reference; /* [2n] log π_ref of the chosen and the rejected response */
} pair_set;

/* One policy of the run. Nothing in it depends on the others. */
typedef struct learner {
    const char *name;
    psoup__adapter *adapter;
    int32_t index;
    bool training; /* its adapter holds gradients */
    int32_t *train, *validation; /* [n_train], [n_validation]: its pairs, by place */
    size_t n_train, n_validation;
    int32_t *order; /* [n_train] permutation of the epoch */
    size_t at;      /* in it */
    int64_t epoch, step, total;
    uint64_t sequences; /* trained on so far: the dropout's stream */
    psoup__optimizer optimizer;
    psoup__best best;
    /* This step. */
    size_t step_end, micro_end; /* in order */
    double loss, right, chosen, rejected, norm; /* chosen, rejected: sums of implied rewards */
    bool stepped, due; /* due: its validation is */
} learner;

typedef enum purpose { REFERENCE, EVALUATE, LEARN } purpose;

typedef struct trainer {
    psoup_model *model;
    psoup_dpo_options options;
    pair_set train, validation;
    learner *learners;
    size_t n;
    psoup__pack *pack;
    psoup__reporter reporter;
    /* The items of a micro-batch: pairs of all learners, at most those of a whole set. */
    int32_t *item, *owner, *rows, *pass; /* [items] */
    uint64_t *stream;                    /* [items] of the chosen row; the rejected has the next */
} trainer;

/* Rows are cut after this many tokens. */
static size_t longest_row(const trainer *t) {
    size_t most = (size_t)t->model->config.max_position_embeddings;
    size_t wanted = (size_t)t->options.max_tokens;
    return wanted && wanted < most ? wanted : most;
}

/* The response of one side: 0 the chosen, 1 the rejected. *n receives how many tokens count. */
static const int32_t *response(const trainer *t, const psoup_dpo_pair *pair, int side, size_t *n) {
    size_t room = longest_row(t) - pair->n_prompt;
    *n = side ? pair->n_rejected : pair->n_chosen;
    *n = *n < room ? *n : room;
    return side ? pair->rejected : pair->chosen;
}

/* Both rows of the items of one pass; what is read are their responses' tokens, chosen before rejected.
 * Token k is read at position |prompt| + k − 1, so that a row needs no last token. */
static psoup_status pack_items(trainer *t, const pair_set *set, size_t n, int32_t pass, purpose what,
                               psoup_error *error) {
    psoup_status status = PSOUP_OK;
    uint64_t seed = psoup__seed_for(t->options.seed, PSOUP__FOR_LORA_DROPOUT);
    psoup__pack_clear(t->pack);
    for (size_t i = 0; i < n; i++) {
        if (t->pass[i] != pass)
            continue;
        const psoup_dpo_pair *pair = &set->pairs[t->item[i]];
        for (int side = 0; side < 2; side++) {
            size_t length;
            const int32_t *tokens = response(t, pair, side, &length);
            psoup__sequence sequence = {
                .first = pair->prompt,
                .n_first = pair->n_prompt,
                .then = tokens,
                .n_then = length - 1,
                .adapter = what == REFERENCE ? -1 : t->learners[t->owner[i]].index,
                .seed = seed,
                .stream = t->stream[i] + (uint64_t)side};
            int32_t row;
            PSOUP__TRY(psoup__pack_sequence(t->pack, &sequence, &row, error));
            row += (int32_t)pair->n_prompt - 1;
            for (size_t k = 0; k < length; k++)
                PSOUP__TRY(psoup__pack_read(t->pack, row + (int32_t)k, tokens[k], error));
        }
    }
fail:
    return status;
}

/* One item's loss, its gradient where it learns, and what its learner reports. Its responses' tokens
 * are n[0] and then n[1] of those read, from `read` on. */
static void lose(trainer *t, const pair_set *set, size_t i, size_t read, const size_t n[2],
                 const double logprob[2], purpose what) {
    learner *l = &t->learners[t->owner[i]];
    const double *reference = set->reference + 2 * (size_t)t->item[i];
    double w = logprob[0] - reference[0], r = logprob[1] - reference[1], dw;
    l->loss += psoup__dpo_loss(w, r, t->options.beta, t->options.label_smoothing, &dw);
    l->right += w > r;
    l->chosen += t->options.beta * w;
    l->rejected += t->options.beta * r;
    if (what != LEARN)
        return;
    float slope = (float)(dw / (double)(l->step_end - l->at)); /* mean over the step */
    for (size_t k = 0; k < n[0] + n[1]; k++)
        t->pack->dlogprob[read + k] = k < n[0] ? slope : -slope;
}

/* Runs the items that were listed, in as many passes as it takes: forwards for the reference's
 * log-probs, or for the losses, or backwards too. */
static psoup_status run_items(trainer *t, const pair_set *set, size_t n, purpose what,
                              psoup_error *error) {
    psoup_status status = PSOUP_OK;
    int32_t passes = 0;
    for (size_t i = 0; i < n; i++) {
        const psoup_dpo_pair *pair = &set->pairs[t->item[i]];
        size_t length[2];
        for (int side = 0; side < 2; side++)
            response(t, pair, side, &length[side]);
        t->rows[i] = (int32_t)(2 * (pair->n_prompt - 1) + length[0] + length[1]);
    }
    PSOUP__TRY(psoup__plan(t->model->context, t->rows, t->owner, n, PSOUP__PASS_TOKENS, t->pass,
                           &passes, error));
    for (int32_t pass = 0; pass < passes; pass++) {
        PSOUP__TRY(pack_items(t, set, n, pass, what, error));
        PSOUP__TRY(psoup__pack_forward(t->pack, what == LEARN,
                                       what == LEARN ? t->options.lora_dropout : 0.0f, 0.0f, error));
        for (size_t i = 0, read = 0; i < n; i++) {
            if (t->pass[i] != pass)
                continue;
            size_t length[2], at = read;
            double logprob[2] = {0.0, 0.0};
            for (int side = 0; side < 2; side++) {
                response(t, &set->pairs[t->item[i]], side, &length[side]);
                for (size_t k = 0; k < length[side]; k++)
                    logprob[side] += t->pack->logprob[read++];
            }
            if (what == REFERENCE)
                memcpy(set->reference + 2 * (size_t)t->item[i], logprob, sizeof(logprob));
            else
                lose(t, set, i, at, length, logprob, what);
        }
        if (what == LEARN)
            PSOUP__TRY(psoup__pack_backward(t->pack, error));
    }
fail:
    return status;
}

/* log π_ref of all pairs, once: the base does not change. */
static psoup_status ask_reference(trainer *t, pair_set *set, psoup_error *error) {
    set->reference = psoup__alloc(t->model->context, set->n, 2 * sizeof(*set->reference), error);
    if (!set->reference)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < set->n; i++) {
        t->item[i] = (int32_t)i;
        t->owner[i] = 0;
        t->stream[i] = 0;
    }
    return run_items(t, set, set->n, REFERENCE, error);
}

/* ---- steps ------------------------------------------------------------------------------------ */

static void clear_sums(learner *l) { l->loss = l->right = l->chosen = l->rejected = 0.0; }

static void report_sums(const learner *l, double n, psoup__metrics *metrics) {
    psoup__metric(metrics, "loss", l->loss / n);
    psoup__metric(metrics, "accuracy", l->right / n);
    psoup__metric(metrics, "margin", (l->chosen - l->rejected) / n);
    psoup__metric(metrics, "reward_chosen", l->chosen / n);
    psoup__metric(metrics, "reward_rejected", l->rejected / n);
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

/* The next micro-batch of every learner that still has steps to go. */
static psoup_status run_micro_batch(trainer *t, psoup_error *error) {
    size_t n = 0;
    for (size_t j = 0; j < t->n; j++) {
        learner *l = &t->learners[j];
        if (l->step == l->total)
            continue;
        size_t left = l->step_end - l->micro_end, size = (size_t)t->options.batch_size;
        size = left < size ? left : size;
        for (size_t end = l->micro_end + size; l->micro_end < end; l->micro_end++, n++) {
            t->item[n] = l->train[l->order[l->micro_end]];
            t->owner[n] = (int32_t)j;
            t->stream[n] = l->sequences;
            l->sequences += 2;
        }
    }
    return run_items(t, &t->train, n, LEARN, error);
}

static psoup_status train_step(trainer *t, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const psoup_dpo_options *o = &t->options;
    for (size_t j = 0; j < t->n; j++)
        if (t->learners[j].step < t->learners[j].total)
            begin_step(t, &t->learners[j]);
    for (int32_t a = 0; a < o->accumulation; a++)
        PSOUP__TRY(run_micro_batch(t, error));
    for (size_t j = 0; j < t->n; j++) {
        learner *l = &t->learners[j];
        if (l->step == l->total)
            continue;
        float rate = psoup__learning_rate(o->learning_rate, o->schedule, o->warmup_steps, l->step + 1,
                                          l->total);
        PSOUP__TRY(psoup__optimizer_step(&l->optimizer, rate, &l->norm, &l->stepped, error));
        psoup__metrics metrics = {.n = 0};
        report_sums(l, (double)(l->step_end - l->at), &metrics);
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

/* The validation pairs of every learner that is due. */
static psoup_status validate(trainer *t, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t n = 0;
    for (size_t j = 0; j < t->n; j++) {
        learner *l = &t->learners[j];
        if (!l->due)
            continue;
        clear_sums(l);
        for (size_t i = 0; i < l->n_validation; i++, n++) {
            t->item[n] = l->validation[i];
            t->owner[n] = (int32_t)j;
            t->stream[n] = 0;
        }
    }
    PSOUP__TRY(run_items(t, &t->validation, n, EVALUATE, error));
    for (size_t j = 0; j < t->n; j++) {
        learner *l = &t->learners[j];
        if (!l->due)
            continue;
        double count = (double)l->n_validation;
        psoup__metrics metrics = {.n = 0};
        report_sums(l, count, &metrics);
        if (t->options.keep_best)
            PSOUP__TRY(psoup__best_offer(&l->best, t->model->be, l->adapter->data,
                                         l->adapter->count, l->right / count, -l->loss / count,
                                         l->step, error));
        PSOUP__TRY(psoup__report(&t->reporter, "validation", l->name, l->step, l->total, &metrics,
                                 error));
    }
fail:
    return status;
}

/* Steps until every learner is done. */
static psoup_status run(trainer *t, psoup_error *error) {
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
        PSOUP__TRY(train_step(t, error));
        if (any_due)
            PSOUP__TRY(validate(t, error));
    }
    for (size_t j = 0; j < t->n; j++)
        psoup__best_restore(&t->learners[j].best, t->model->be, t->learners[j].adapter->data);
fail:
    return status;
}

/* ---- setting up ------------------------------------------------------------------------------- */

static psoup_status check_pairs(const trainer *t, const pair_set *set, size_t n_policies,
                                const char *what, psoup_error *error) {
    if (set->n > INT32_MAX || (set->n && !set->pairs))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_dpo: %s is NULL or too long", what);
    for (size_t i = 0; i < set->n; i++) {
        const psoup_dpo_pair *pair = &set->pairs[i];
        if (!pair->prompt || !pair->chosen || !pair->rejected || pair->n_prompt == 0 ||
            pair->n_chosen == 0 || pair->n_rejected == 0)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "psoup_dpo: %s[%zu] has an empty prompt or response", what, i);
        if (pair->n_prompt >= longest_row(t))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "psoup_dpo: %s[%zu] has a prompt of %zu tokens: expected fewer than "
                               "the %zu of a row", what, i, pair->n_prompt, longest_row(t));
        if (pair->policy < 0 || (size_t)pair->policy >= n_policies)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "psoup_dpo: %s[%zu] names policy %d of %zu", what, i, pair->policy,
                               n_policies);
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
        for (size_t i = 0; i < j; i++)
            if (strcmp(policies[i], policies[j]) == 0)
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "policy '%s' is there twice",
                                   policies[j]);
    }
    return PSOUP_OK;
}

/* The places of the pairs of policy `j`. */
static psoup_status choose(psoup_context *context, const pair_set *set, size_t j, int32_t **out,
                           size_t *count, psoup_error *error) {
    *out = psoup__alloc(context, set->n, sizeof(**out), error);
    if (!*out)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < set->n; i++)
        if ((size_t)set->pairs[i].policy == j)
            (*out)[(*count)++] = (int32_t)i;
    return PSOUP_OK;
}

static psoup_status start_policy(trainer *t, learner *l, size_t j, const char *name,
                                 psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = t->model->context;
    const psoup_dpo_options *o = &t->options;
    int64_t per_step = (int64_t)o->batch_size * o->accumulation;
    l->name = name;
    l->epoch = -1;
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
                                      .n = l->adapter->count,
                                      .beta1 = o->beta1,
                                      .beta2 = o->beta2,
                                      .epsilon = o->epsilon,
                                      .weight_decay = o->weight_decay,
                                      .max_grad_norm = o->max_grad_norm};
    PSOUP__TRY(psoup__optimizer_start(&l->optimizer, t->model->be, error));
fail:
    return status;
}

static psoup_status set_up(trainer *t, const char *const *policies, size_t n, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = t->model->context;
    size_t items = t->train.n > t->validation.n ? t->train.n : t->validation.n;
    t->item = psoup__alloc(context, items, sizeof(*t->item), error);
    t->owner = psoup__alloc(context, items, sizeof(*t->owner), error);
    t->rows = psoup__alloc(context, items, sizeof(*t->rows), error);
    t->pass = psoup__alloc(context, items, sizeof(*t->pass), error);
    t->stream = psoup__alloc(context, items, sizeof(*t->stream), error);
    t->learners = psoup__alloc(context, n, sizeof(*t->learners), error);
    if (!t->item || !t->owner || !t->rows || !t->pass || !t->stream || !t->learners)
        return PSOUP_ERROR_MEMORY;
    t->n = n;
    PSOUP__TRY(psoup__pack_create(t->model, &t->pack, error));
    for (size_t j = 0; j < n; j++)
        PSOUP__TRY(start_policy(t, &t->learners[j], j, policies[j], error));
    PSOUP__TRY(ask_reference(t, &t->train, error));
    PSOUP__TRY(ask_reference(t, &t->validation, error));
fail:
    return status;
}

static void tear_down(trainer *t) {
    psoup_context *context = t->model->context;
    void *arrays[] = {t->item,   t->owner, t->rows, t->pass, t->stream, t->train.reference,
                      t->validation.reference};
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

psoup_status psoup_dpo(psoup_model *model, const char *const *policies, size_t n_policies,
                       const psoup_dpo_pair *train, size_t n_train,
                       const psoup_dpo_pair *validation, size_t n_validation,
                       const psoup_dpo_options *options, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    if (!model)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_dpo: model is NULL");
    trainer t = {.model = model,
                 .options = PSOUP_DPO_OPTIONS_INIT,
                 .train = {.pairs = train, .n = n_train},
                 .validation = {.pairs = validation, .n = n_validation}};
    PSOUP__TRY(psoup__options(&t.options, sizeof(t.options), options, "psoup_dpo_options", error));
    PSOUP__TRY(psoup__dpo_check(&t.options, error));
    PSOUP__TRY(check_policies(model, policies, n_policies, error));
    PSOUP__TRY(check_pairs(&t, &t.train, n_policies, "train", error));
    PSOUP__TRY(check_pairs(&t, &t.validation, n_policies, "validation", error));
    PSOUP__TRY(psoup__reporter_open(&t.reporter, model->context, t.options.metrics,
                                    t.options.on_step, t.options.user, error));
    PSOUP__TRY(set_up(&t, policies, n_policies, error));
    PSOUP__TRY(run(&t, error));
fail:
    tear_down(&t);
    return status;
}
