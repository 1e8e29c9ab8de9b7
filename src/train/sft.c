/* Supervised fine-tuning: packed micro-batches, loss on the completions. */
#include <stdio.h>

#include "train/training.h"

typedef struct sft {
    psoup_model *model;
    char *subject;
    psoup__adapter *trained; /* NULL: the base */
    int32_t adapter;         /* its number, now; −1: the base */
    bool begun;              /* there are gradients */
    psoup_sft_options options;
    size_t limit; /* tokens of an example at most */
    const psoup_example *examples, *validation;
    size_t n_validation;
    int32_t *usable; /* [n] those with a token that carries loss */
    int32_t *order;  /* [n] permutation of an epoch, of places in `usable` */
    size_t n;
    /* How far it is. */
    int64_t epoch, step, total, validated; /* validated: the last step whose validation is done */
    size_t at;          /* place in the order of the epoch */
    uint64_t sequences; /* trained on so far: the dropout's stream */
    psoup__passes *passes;
    /* Examples that run together: this rank's of a step, or of a validation. */
    size_t items, capacity;
    const psoup_example **item; /* [items] */
    uint64_t *stream;           /* [items] of dropout */
    int32_t *rows, *owner, *pass; /* [items] rows: with the last token, which takes none */
    double *loss;               /* [items] */
    float slope;                /* of a token's loss by its log-prob; 0: nothing learns */
    psoup__optimizer optimizer;
    psoup__team team;
    psoup__reporter reporter;
    psoup__best best;
    psoup__checkpoint checkpoint;
} sft;

static size_t length_of(const sft *s, const psoup_example *example) {
    return example->n < s->limit ? example->n : s->limit;
}

/* The first token of the example that carries loss; the first of all is predicted by nothing. */
static size_t loss_from(const sft *s, const psoup_example *example) {
    return s->options.loss_on_prompt || example->n_prompt == 0 ? 1 : example->n_prompt;
}

static size_t loss_tokens(const sft *s, const psoup_example *example) {
    size_t n = length_of(s, example), from = loss_from(s, example);
    return n > from ? n - from : 0;
}

static const psoup_example *nth(const sft *s, size_t i) {
    return &s->examples[s->usable[s->order[i]]];
}

/* Where the micro-batch that begins at `from` ends: as many examples as its tokens allow. */
static size_t micro_batch_end(const sft *s, size_t from) {
    size_t tokens = length_of(s, nth(s, from)), end = from + 1;
    while (end < s->n && tokens + length_of(s, nth(s, end)) <= (size_t)s->options.batch_tokens)
        tokens += length_of(s, nth(s, end++));
    return end;
}

static void order_epoch(sft *s, int64_t epoch) {
    psoup__permutation(s->order, s->n, psoup__seed_for(s->options.seed, PSOUP__FOR_ORDER),
                       (uint64_t)epoch);
}

/* Steps of the run: packing differs from epoch to epoch, so each is laid out once. */
static int64_t count_steps(sft *s) {
    if (s->options.max_steps > 0)
        return s->options.max_steps;
    int64_t steps = 0;
    for (int32_t epoch = 0; epoch < s->options.epochs; epoch++) {
        int64_t micro_batches = 0;
        order_epoch(s, epoch);
        for (size_t at = 0; at < s->n; at = micro_batch_end(s, at))
            micro_batches++;
        steps += (micro_batches + s->options.accumulation - 1) / s->options.accumulation;
    }
    return steps;
}

/* ---- passes ------------------------------------------------------------------------------------------ */

static psoup_status reserve_items(sft *s, size_t n, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = s->model->context;
    size_t a = s->capacity, b = a, c = a, d = a, e = a, f = a;
    PSOUP__TRY(psoup__reserve(context, &s->item, &a, n, sizeof(*s->item), error));
    PSOUP__TRY(psoup__reserve(context, &s->stream, &b, n, sizeof(*s->stream), error));
    PSOUP__TRY(psoup__reserve(context, &s->rows, &c, n, sizeof(*s->rows), error));
    PSOUP__TRY(psoup__reserve(context, &s->owner, &d, n, sizeof(*s->owner), error));
    PSOUP__TRY(psoup__reserve(context, &s->pass, &e, n, sizeof(*s->pass), error));
    PSOUP__TRY(psoup__reserve(context, &s->loss, &f, n, sizeof(*s->loss), error));
    s->capacity = f;
fail:
    return status;
}

static void add_item(sft *s, const psoup_example *example, uint64_t stream) {
    s->item[s->items] = example;
    s->stream[s->items] = stream;
    s->owner[s->items] = 0;
    s->rows[s->items++] = (int32_t)length_of(s, example);
}

/* Packs an example: its last token is only ever a target, so it takes no row. */
static psoup_status pack_item(const sft *s, psoup__pack *pack, size_t item, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    int32_t row;
    const psoup_example *example = s->item[item];
    size_t n = (size_t)s->rows[item];
    psoup__sequence sequence = {.first = example->tokens,
                                .n_first = n - 1,
                                .adapter = s->adapter,
                                .seed = psoup__seed_for(s->options.seed, PSOUP__FOR_LORA_DROPOUT),
                                .stream = s->stream[item]};
    PSOUP__TRY(psoup__pack_sequence(pack, &sequence, &row, error));
    for (size_t t = loss_from(s, example); t < n; t++)
        PSOUP__TRY(psoup__pack_read(pack, row + (int32_t)t - 1, example->tokens[t], error));
fail:
    return status;
}

static psoup_status run_pass(void *user, psoup__pack *pack, int32_t pass, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const sft *s = user;
    const size_t begin = s->passes->begin[pass], end = s->passes->end[pass];
    const bool learn = s->slope != 0.0f;
    for (size_t i = begin; i < end; i++)
        PSOUP__TRY(pack_item(s, pack, i, error));
    PSOUP__TRY(psoup__pack_forward(pack, learn, learn && s->adapter >= 0 ? s->options.lora_dropout : 0.0f, 0.0f,
                                   error));
    for (size_t k = 0; learn && k < pack->reads; k++)
        pack->dlogprob[k] = s->slope;
    if (learn) {
        psoup__pack_send(pack);
        PSOUP__TRY(psoup__pack_backward(pack, error));
    }
    PSOUP__TRY(psoup__pack_fetch(pack, error));
    for (size_t i = begin, read = 0; i < end; i++) {
        s->loss[i] = 0.0;
        for (size_t k = loss_tokens(s, s->item[i]); k > 0; k--)
            s->loss[i] -= pack->logprob[read++];
    }
fail:
    return status;
}

/* Runs the items that were listed; *loss receives the sum of theirs. `slope`: a token's loss by its log-prob, 0 where
 * nothing learns. */
static psoup_status run_items(sft *s, float slope, double *loss, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    *loss = 0.0;
    s->slope = slope;
    PSOUP__TRY(psoup__passes_plan(s->passes, s->rows, s->owner, s->items, s->options.batch_tokens, slope != 0.0f,
                                  s->pass, error));
    PSOUP__TRY(psoup__passes_run(s->passes, run_pass, s, error));
    for (size_t i = 0; i < s->items; i++)
        *loss += s->loss[i];
fail:
    return status;
}

/* The gradient of the examples from s->at to `end`, of which this rank takes its share; and their loss. */
static psoup_status add_gradient(sft *s, size_t end, size_t tokens, double *loss, size_t *through,
                                 psoup_error *error) {
    psoup_status status = PSOUP_OK;
    double sums[2] = {0.0, 0.0}; /* loss, tokens that went through */
    psoup__team_deal(&s->team);
    PSOUP__TRY(reserve_items(s, end - s->at, error));
    s->items = 0;
    for (size_t i = s->at; i < end; i++)
        if (psoup__team_mine(&s->team, (int64_t)length_of(s, nth(s, i)))) {
            add_item(s, nth(s, i), s->sequences + (i - s->at));
            sums[1] += (double)length_of(s, nth(s, i)) - 1.0;
        }
    psoup__optimizer_zero(&s->optimizer);
    PSOUP__TRY(run_items(s, -1.0f / (float)tokens, &sums[0], error));
    PSOUP__TRY(psoup__team_sum(&s->team, sums, 2, error));
    PSOUP__TRY(psoup__team_sum_gradient(&s->team, &s->optimizer, error));
    *loss = sums[0];
    *through = (size_t)sums[1];
fail:
    return status;
}

/* One optimiser step from example s->at of the epoch on. */
static psoup_status train_step(sft *s, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t end, tokens = 0, through = 0;
    double loss = 0.0, norm = 0.0, since = psoup__now();
    bool stepped;
    if (s->at == s->n) {
        order_epoch(s, ++s->epoch);
        s->at = 0;
    }
    end = s->at;
    for (int32_t i = 0; i < s->options.accumulation && end < s->n; i++)
        end = micro_batch_end(s, end);
    for (size_t i = s->at; i < end; i++)
        tokens += loss_tokens(s, nth(s, i));
    PSOUP__TRY(add_gradient(s, end, tokens, &loss, &through, error)); /* should a rank be gone, nothing is done yet */

    float rate = psoup__learning_rate(s->options.learning_rate, s->options.schedule,
                                      s->options.warmup_steps, s->step + 1, s->total);
    PSOUP__TRY(psoup__guarded_step(&s->team, &s->optimizer, rate, loss, "sft", s->subject, s->step + 1, &norm,
                                   &stepped, error));
    s->sequences += end - s->at;
    s->at = end;
    s->step++;

    psoup__metrics metrics = {.n = 0};
    psoup__metric(&metrics, "loss", loss / (double)tokens);
    psoup__metric(&metrics, "learning_rate", rate);
    psoup__metric(&metrics, "grad_norm", norm);
    psoup__metric(&metrics, "tokens", (double)tokens);
    psoup__metric(&metrics, "skipped", !stepped);
    psoup__metric_speed(&metrics, since, through);
    PSOUP__TRY(psoup__report(&s->reporter, "train", s->subject, s->step, s->total, &metrics, error));
fail:
    return status;
}

static bool validation_due(const sft *s) {
    int32_t every = s->options.validate_every;
    return s->n_validation && s->step > s->validated &&
           (s->step == s->total || (every && s->step % every == 0));
}

/* Sums over this rank's share of the validation examples. */
static psoup_status evaluate(sft *s, double *loss, double *tokens, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__team_deal(&s->team);
    PSOUP__TRY(reserve_items(s, s->n_validation, error));
    s->items = 0;
    for (size_t i = 0; i < s->n_validation; i++) {
        const psoup_example *example = &s->validation[i];
        if (loss_tokens(s, example) == 0 || !psoup__team_mine(&s->team, (int64_t)length_of(s, example)))
            continue;
        add_item(s, example, 0);
        *tokens += (double)loss_tokens(s, example);
    }
    PSOUP__TRY(run_items(s, 0.0f, loss, error));
fail:
    return status;
}

static psoup_status validate(sft *s, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    double sums[2] = {0.0, 0.0}; /* loss, tokens */
    PSOUP__TRY(evaluate(s, &sums[0], &sums[1], error));
    PSOUP__TRY(psoup__team_sum(&s->team, sums, 2, error));
    s->validated = s->step;
    if (sums[1] == 0.0)
        return PSOUP_OK;
    double loss = sums[0] / sums[1];
    if (s->options.keep_best)
        PSOUP__TRY(psoup__best_offer(&s->best, s->optimizer.be, s->optimizer.p, s->optimizer.n,
                                     -loss, 0.0, s->step, error));
    psoup__metrics metrics = {.n = 0};
    psoup__metric(&metrics, "loss", loss);
    psoup__metric(&metrics, "tokens", sums[1]);
    PSOUP__TRY(psoup__report(&s->reporter, "validation", s->subject, s->step, s->total, &metrics,
                             error));
fail:
    return status;
}

psoup_status psoup__sft_check_examples(const psoup_example *examples, size_t n, const char *what,
                                       psoup_error *error) {
    if (n > INT32_MAX || (n && !examples))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_sft: %s is NULL or too long", what);
    for (size_t i = 0; i < n; i++)
        if ((examples[i].n && !examples[i].tokens) || examples[i].n_prompt > examples[i].n)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "psoup_sft: %s[%zu] has %zu prompt tokens of %zu tokens%s", what, i,
                               examples[i].n_prompt, examples[i].n,
                               examples[i].tokens ? "" : ", at NULL");
    return PSOUP_OK;
}

static psoup_status choose_examples(sft *s, const psoup_example *train, size_t n_train,
                                    psoup_error *error) {
    psoup_context *context = s->model->context;
    s->examples = train;
    s->usable = psoup__alloc(context, n_train, sizeof(*s->usable), error);
    s->order = psoup__alloc(context, n_train, sizeof(*s->order), error);
    if (!s->usable || !s->order)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < n_train; i++)
        if (loss_tokens(s, &train[i]))
            s->usable[s->n++] = (int32_t)i;
    if (s->n == 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_sft: none of %zu examples has a token that carries loss within "
                           "%zu tokens", n_train, s->limit);
    if (s->n < n_train)
        psoup__log(context, PSOUP_LOG_WARNING,
                   "sft: %zu of %zu examples carry no loss within %zu tokens and are left out",
                   n_train - s->n, n_train, s->limit);
    return PSOUP_OK;
}

static void hash_examples(psoup__hash *hash, const psoup_example *examples, size_t n) {
    for (size_t i = 0; i < n; i++) {
        psoup__hash_update(hash, &examples[i].n_prompt, sizeof(examples[i].n_prompt));
        psoup__hash_tokens(hash, examples[i].tokens, examples[i].n);
    }
}

static psoup_status identify_examples(sft *s, const char *key, const psoup_example *examples, size_t n,
                                      psoup_error *error) {
    psoup__hash *hash = psoup__hash_create(s->model->context, error);
    if (!hash)
        return PSOUP_ERROR_MEMORY;
    hash_examples(hash, examples, n);
    psoup_status status = psoup__run_rows(&s->checkpoint, key, n, hash, error);
    psoup__free(s->model->context, hash);
    return status;
}

/* Takes the checkpoint's directory and says what the run is, while the base is as it was given. */
static psoup_status open_checkpoint(sft *s, const psoup__adapter *trained, size_t n_train,
                                    psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__checkpoint *c = &s->checkpoint;
    const psoup_sft_options *o = &s->options;
    PSOUP__TRY(psoup__checkpoint_open(c, s->model->context, &s->reporter, o->checkpoint_dir,
                                      o->checkpoint_every, o->checkpoint_keep, o->resume, error));
    PSOUP__TRY(psoup__run_text(c, "trainer", error, "sft"));
    PSOUP__TRY(psoup__run_options(c, psoup_sft_fields(), o, error));
    PSOUP__TRY(psoup__run_base(c, "base", s->model, error));
    if (trained)
        PSOUP__TRY(psoup__run_adapter(c, "adapter", s->model, trained, false, error));
    PSOUP__TRY(identify_examples(s, "train", s->examples, n_train, error));
    PSOUP__TRY(identify_examples(s, "validation", s->validation, s->n_validation, error));
fail:
    return status;
}

static psoup_status start_checkpoint(sft *s, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__checkpoint *c = &s->checkpoint;
    const psoup__piece pieces[] = {
        {.name = "epoch", .dtype = PSOUP_I64, .data = &s->epoch, .n = 1},
        {.name = "at", .dtype = PSOUP_I64, .data = &s->at, .n = 1},
        {.name = "step", .dtype = PSOUP_I64, .data = &s->step, .n = 1},
        {.name = "validated", .dtype = PSOUP_I64, .data = &s->validated, .n = 1},
        {.name = "sequences", .dtype = PSOUP_I64, .data = &s->sequences, .n = 1},
    };
    PSOUP__TRY(psoup__checkpoint_add(c, 0, pieces, sizeof(pieces) / sizeof(pieces[0]), error));
    PSOUP__TRY(psoup__checkpoint_add_learner(c, 0, &s->optimizer, &s->best, error));
    PSOUP__TRY(psoup__checkpoint_start(c, error));
    PSOUP__TRY(psoup__checkpoint_expect(c, s->at <= s->n && s->step <= s->total, "place in the data",
                                        error));
fail:
    return status;
}

/* ---- the training ----------------------------------------------------------------------------------- */

static bool is_due(void *state) { return validation_due(state); }
static psoup_status run_validation(void *state, psoup_error *error) { return validate(state, error); }
static psoup_status run_step(void *state, psoup_error *error) { return train_step(state, error); }

static void progress(const void *state, int64_t *step, int64_t *total) {
    const sft *s = state;
    *step = s->step;
    *total = s->total;
}

static psoup_status refresh(void *state, psoup_error *error) {
    sft *s = state;
    if (s->trained)
        return psoup__training_adapter(s->model, s->subject, s->trained, &s->optimizer, &s->adapter, error);
    return PSOUP_OK;
}

static void restore(void *state) {
    sft *s = state;
    psoup__best_restore(&s->best, s->optimizer.be, s->optimizer.p);
    psoup__best_tell(&s->best, &s->team, "sft", s->subject, s->total);
}

static psoup_status end(void *state, psoup_error *error) {
    sft *s = state;
    psoup_context *context = s->model->context;
    psoup_status status = PSOUP_OK;
    psoup__checkpoint_close(&s->checkpoint);
    psoup__reporter_close(&s->reporter);
    psoup__team_leave(&s->team);
    psoup__optimizer_end(&s->optimizer);
    psoup__best_free(&s->best, context);
    psoup__passes_free(s->passes);
    if (s->begun && !s->trained)
        status = psoup__model_train_base(s->model, false, error);
    else if (s->begun && psoup__model_adapter(s->model, s->subject) == s->trained)
        status = psoup__adapter_train(s->model, s->trained, false, error);
    void *arrays[] = {s->order, s->usable, s->item, s->stream, s->rows, s->owner, s->pass, s->loss};
    for (size_t i = 0; i < sizeof(arrays) / sizeof(arrays[0]); i++)
        psoup__free(context, arrays[i]);
    psoup__free(context, s->subject);
    psoup__free(context, s);
    return status;
}

static const psoup__trainer trainer = {is_due, run_validation, run_step, progress, refresh, restore, end};

static psoup_status find_adapter(sft *s, const char *adapter, psoup_error *error) {
    s->subject = psoup__strdup(s->model->context, adapter ? adapter : "base", error);
    if (!s->subject)
        return PSOUP_ERROR_MEMORY;
    if (!adapter)
        return psoup__model_may_train(s->model, error);
    s->adapter = psoup_model_find_adapter(s->model, adapter);
    s->trained = psoup__model_adapter(s->model, adapter);
    if (!s->trained)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_sft: the model has no adapter '%s'", adapter);
    if (s->trained->grad)
        return psoup__fail(error, PSOUP_ERROR_STATE, "psoup_sft: adapter '%s' is being trained already", adapter);
    return psoup__adapter_may_train(s->model, s->trained, true, error);
}

static psoup_status start(sft *s, size_t n_train, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_model *model = s->model;
    psoup__adapter *trained = s->trained;
    PSOUP__TRY(psoup__passes_create(model, s->options.gradient_checkpointing, &s->passes, error));
    PSOUP__TRY(psoup__reporter_open(&s->reporter, &s->team, s->options.metrics, s->options.on_step,
                                    s->options.user, error));
    if (psoup__checkpoint_wanted(s->options.checkpoint_dir, &s->team))
        PSOUP__TRY(open_checkpoint(s, trained, n_train, error));
    PSOUP__TRY(trained ? psoup__adapter_train(model, trained, true, error)
                       : psoup__model_train_base(model, true, error));
    s->begun = true;
    s->optimizer = (psoup__optimizer){.p = trained ? trained->data : model->data,
                                      .g = trained ? trained->grad : model->grad,
                                      .n = trained ? trained->count : model->count,
                                      .gradients = trained ? trained->gradients : 1,
                                      .stride = trained ? trained->count : 0,
                                      .beta1 = s->options.beta1,
                                      .beta2 = s->options.beta2,
                                      .epsilon = s->options.epsilon,
                                      .weight_decay = s->options.weight_decay,
                                      .max_grad_norm = s->options.max_grad_norm,
                                      .max_grad_value = s->options.max_grad_value};
    PSOUP__TRY(psoup__optimizer_start(&s->optimizer, model->be, error));
    s->total = count_steps(s);
    if (s->checkpoint.run)
        PSOUP__TRY(start_checkpoint(s, error));
    order_epoch(s, s->epoch);
fail:
    return status;
}

psoup_status psoup_sft_create(psoup_model *model, const char *adapter, const psoup_example *train,
                              size_t n_train, const psoup_example *validation, size_t n_validation,
                              const psoup_sft_options *options, psoup_training **out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    if (out)
        *out = NULL;
    if (!model || !out)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_sft: %s is NULL", model ? "out" : "model");
    sft *s = psoup__alloc(model->context, 1, sizeof(*s), error);
    if (!s)
        return PSOUP_ERROR_MEMORY;
    psoup_sft_options defaults = PSOUP_SFT_OPTIONS_INIT;
    *s = (sft){.model = model, .adapter = -1, .options = defaults, .validation = validation};
    s->n_validation = n_validation;
    PSOUP__TRY(psoup__options(&s->options, sizeof(s->options), options, "psoup_sft_options", error));
    PSOUP__TRY(psoup__team_join(&s->team, model->context, s->options.comm, error));
    PSOUP__TRY(psoup__sft_check(&s->options, error));
    PSOUP__TRY(psoup__sft_check_examples(train, n_train, "train", error));
    PSOUP__TRY(psoup__sft_check_examples(validation, n_validation, "validation", error));
    int32_t most = model->config.max_position_embeddings;
    s->limit = (size_t)(s->options.batch_tokens < most ? s->options.batch_tokens : most);
    PSOUP__TRY(choose_examples(s, train, n_train, error));
    PSOUP__TRY(find_adapter(s, adapter, error));
    PSOUP__TRY(start(s, n_train, error));
fail:
    return psoup__training_made(status, (psoup_training){model->context, &trainer, s, &s->checkpoint, &s->team},
                                out, error);
}

psoup_status psoup_sft(psoup_model *model, const char *adapter, const psoup_example *train,
                       size_t n_train, const psoup_example *validation, size_t n_validation,
                       const psoup_sft_options *options, psoup_error *error) {
    psoup_training *training = NULL;
    psoup_status status = psoup_sft_create(model, adapter, train, n_train, validation, n_validation, options,
                                           &training, error);
    return psoup__training_whole(status, training, error);
}
