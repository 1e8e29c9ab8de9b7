/* A step of Bradley–Terry training of several reward models, side by side, and their validation. */
#include "train/reward.h"

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

static int64_t rows_of(const psoup__reward_trainer *t, int32_t item) {
    const psoup_comparison *pair = &t->comparisons[item];
    return (int64_t)(row_length(t->model, t->options.max_tokens, pair->n_chosen) +
                     row_length(t->model, t->options.max_tokens, pair->n_rejected));
}

static psoup_status reserve_items(psoup__reward_trainer *t, size_t n, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = t->model->context;
    size_t a = t->capacity, b = a, c = a, d = a, e = a, f = 2 * a;
    PSOUP__TRY(psoup__reserve(context, &t->item, &a, n, sizeof(*t->item), error));
    PSOUP__TRY(psoup__reserve(context, &t->owner, &b, n, sizeof(*t->owner), error));
    PSOUP__TRY(psoup__reserve(context, &t->rows, &c, n, sizeof(*t->rows), error));
    PSOUP__TRY(psoup__reserve(context, &t->pass, &d, n, sizeof(*t->pass), error));
    PSOUP__TRY(psoup__reserve(context, &t->stream, &e, n, sizeof(*t->stream), error));
    PSOUP__TRY(psoup__reserve(context, &t->score, &f, 2 * e, sizeof(*t->score), error));
    t->capacity = e;
fail:
    return status;
}

/* Both rows of the items of one pass, and their heads: value[2k] chosen, value[2k + 1] rejected. */
static psoup_status pack_items(const psoup__reward_trainer *t, psoup__pack *pack, int32_t pass, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    uint64_t seed = psoup__seed_for(t->options.seed, PSOUP__FOR_LORA_DROPOUT);
    for (size_t i = t->passes->begin[pass]; i < t->passes->end[pass]; i++) {
        if (t->pass[i] != pass)
            continue;
        const psoup_comparison *pair = &t->comparisons[t->item[i]];
        const psoup__reward_learner *l = &t->learners[t->owner[i]];
        for (int side = 0; side < 2; side++) {
            psoup__sequence sequence =
                row_of(t->model, t->options.max_tokens, side ? pair->rejected : pair->chosen,
                       side ? pair->n_rejected : pair->n_chosen, l->index);
            int32_t row;
            sequence.seed = seed;
            sequence.stream = t->stream[i] + (uint64_t)side;
            PSOUP__TRY(psoup__pack_sequence(pack, &sequence, &row, error));
            PSOUP__TRY(psoup__pack_score(pack, l->adapter, row + (int32_t)sequence.n_first - 1, error));
        }
    }
fail:
    return status;
}

/* The loss of an item, by its scores, and its derivatives by them. */
static double loss_of(const psoup__reward_trainer *t, size_t i, double *dw, double *dr) {
    double margin = t->options.margin;
    if (t->options.margins)
        margin += t->comparisons[t->item[i]].margin;
    return psoup__bradley_terry(t->score[2 * i], t->score[2 * i + 1], margin, t->options.centering, dw, dr);
}

static psoup_status run_pass(void *user, psoup__pack *pack, int32_t pass, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__reward_trainer *t = user;
    PSOUP__TRY(pack_items(t, pack, pass, error));
    PSOUP__TRY(psoup__pack_forward(pack, t->learn, t->learn ? t->options.lora_dropout : 0.0f, 0.0f, error));
    PSOUP__TRY(psoup__pack_fetch(pack, error));
    for (size_t i = t->passes->begin[pass], k = 0; i < t->passes->end[pass]; i++) {
        if (t->pass[i] != pass)
            continue;
        const psoup__reward_learner *l = &t->learners[t->owner[i]];
        double dw, dr, scale = 1.0 / (double)(l->step_end - l->at); /* mean over the step */
        t->score[2 * i] = pack->value[k];
        t->score[2 * i + 1] = pack->value[k + 1];
        if (t->learn) {
            loss_of(t, i, &dw, &dr);
            pack->dvalue[k] = (float)(dw * scale);
            pack->dvalue[k + 1] = (float)(dr * scale);
        }
        k += 2;
    }
    if (t->learn) {
        psoup__pack_send(pack);
        PSOUP__TRY(psoup__pack_backward(pack, error));
    }
fail:
    return status;
}

/* Runs the items that were listed, in as many passes as it takes; with `learn` backwards too. Sums of
 * loss, right answers and margins go to the learners. */
static psoup_status run_items(psoup__reward_trainer *t, size_t n, bool learn, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; i < n; i++)
        t->through += (size_t)(t->rows[i] = (int32_t)rows_of(t, t->item[i]));
    t->learn = learn;
    PSOUP__TRY(psoup__passes_plan(t->passes, t->rows, t->owner, n, PSOUP__PASS_TOKENS, learn, t->pass, error));
    PSOUP__TRY(psoup__passes_run(t->passes, run_pass, t, error));
    for (size_t i = 0; i < n; i++) {
        psoup__reward_learner *l = &t->learners[t->owner[i]];
        const double w = t->score[2 * i], r = t->score[2 * i + 1];
        double dw, dr;
        l->loss += loss_of(t, i, &dw, &dr);
        l->right += w > r;
        l->margin += w - r;
    }
fail:
    return status;
}

static void clear_sums(psoup__reward_learner *l) { l->loss = l->right = l->margin = 0.0; }

/* Over all ranks. */
static psoup_status add_sums(psoup__reward_trainer *t, psoup__reward_learner *l, psoup_error *error) {
    double sums[] = {l->loss, l->right, l->margin};
    psoup_status status = psoup__team_sum(&t->team, sums, 3, error);
    l->loss = sums[0];
    l->right = sums[1];
    l->margin = sums[2];
    return status;
}

/* Makes a comparison an item, where it is this rank's. */
static void list_item(psoup__reward_trainer *t, size_t *n, int32_t item, size_t owner, uint64_t stream) {
    if (!psoup__team_mine(&t->team, rows_of(t, item)))
        return;
    t->item[*n] = item;
    t->owner[*n] = (int32_t)owner;
    t->stream[(*n)++] = stream;
}

/* The validation comparisons of every learner that is due. */
psoup_status psoup__reward_evaluate(psoup__reward_trainer *t, const psoup_comparison *comparisons,
                                    psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t n = 0;
    t->comparisons = comparisons;
    for (size_t j = 0; j < t->n; j++) {
        psoup__reward_learner *l = &t->learners[j];
        if (!l->due)
            continue;
        clear_sums(l);
        PSOUP__TRY(reserve_items(t, n + l->n_validation, error));
        psoup__team_deal(&t->team);
        for (size_t i = 0; i < l->n_validation; i++)
            list_item(t, &n, l->validation[i], j, 0);
    }
    PSOUP__TRY(run_items(t, n, false, error));
    for (size_t j = 0; j < t->n; j++)
        if (t->learners[j].due)
            PSOUP__TRY(add_sums(t, &t->learners[j], error));
fail:
    return status;
}

void psoup__reward_order(const psoup__reward_trainer *t, psoup__reward_learner *l) {
    psoup__permutation(l->order, l->n_train, psoup__seed_for(t->options.seed, PSOUP__FOR_ORDER),
                       (uint64_t)l->epoch);
}

/* Starts each learner's next step: where it ends in its order. */
static void begin_step(const psoup__reward_trainer *t, psoup__reward_learner *l) {
    size_t per_step = (size_t)t->options.batch_size * (size_t)t->options.accumulation;
    if (l->at == l->n_train || l->epoch < 0) {
        l->epoch++;
        psoup__reward_order(t, l);
        l->at = 0;
    }
    l->step_end = l->n_train - l->at < per_step ? l->n_train : l->at + per_step;
    l->micro_end = l->at;
    clear_sums(l);
    psoup__optimizer_zero(&l->optimizer);
}

/* Steps a learner and tells of it: PSOUP_ERROR_CANCELLED afterwards, when that says stop. */
static psoup_status finish_step(psoup__reward_trainer *t, psoup__reward_learner *l, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    float rate = psoup__learning_rate(t->options.learning_rate, t->options.schedule,
                                      t->options.warmup_steps, l->step + 1, l->total);
    PSOUP__TRY(psoup__guarded_step(&t->team, &l->optimizer, rate, l->loss, "reward", l->name, l->step + 1,
                                   &l->norm, &l->stepped, error));
    double n = (double)(l->step_end - l->at);
    psoup__metrics metrics = {.n = 0};
    psoup__metric(&metrics, "loss", l->loss / n);
    psoup__metric(&metrics, "accuracy", l->right / n);
    psoup__metric(&metrics, "margin", l->margin / n);
    psoup__metric(&metrics, "learning_rate", rate);
    psoup__metric(&metrics, "grad_norm", l->norm);
    psoup__metric(&metrics, "skipped", !l->stepped);
    psoup__metric_speed(&metrics, t->since, t->through);
    l->sequences += 2 * (l->step_end - l->at);
    l->at = l->step_end;
    l->step++;
    PSOUP__TRY(psoup__report(&t->reporter, "train", l->name, l->step, l->total, &metrics, error));
fail:
    return status;
}

psoup_status psoup__reward_step(psoup__reward_trainer *t, const psoup_comparison *comparisons,
                                psoup_error *error) {
    psoup_status status = PSOUP_OK;
    t->comparisons = comparisons;
    t->since = psoup__now();
    t->through = 0;
    for (size_t j = 0; j < t->n; j++)
        if (t->learners[j].step < t->learners[j].total)
            begin_step(t, &t->learners[j]);
    for (int32_t a = 0; a < t->options.accumulation; a++) {
        size_t n = 0;
        for (size_t j = 0; j < t->n; j++) {
            psoup__reward_learner *l = &t->learners[j];
            if (l->step == l->total)
                continue;
            size_t left = l->step_end - l->micro_end, size = (size_t)t->options.batch_size;
            size = left < size ? left : size;
            PSOUP__TRY(reserve_items(t, n + size, error));
            psoup__team_deal(&t->team);
            for (size_t end = l->micro_end + size; l->micro_end < end; l->micro_end++)
                list_item(t, &n, l->train[l->order[l->micro_end]], j,
                          l->sequences + 2 * (l->micro_end - l->at));
        }
        PSOUP__TRY(run_items(t, n, true, error));
    }
    for (size_t j = 0; j < t->n; j++) { /* all of them before the first steps, should a rank be gone */
        psoup__reward_learner *l = &t->learners[j];
        if (l->step == l->total)
            continue;
        PSOUP__TRY(add_sums(t, l, error));
        PSOUP__TRY(psoup__team_sum_gradient(&t->team, &l->optimizer, error));
    }
    PSOUP__TRY(psoup__team_count(&t->team, &t->through, error));
    for (size_t j = 0; j < t->n; j++) {
        psoup__reward_learner *l = &t->learners[j];
        if (l->step == l->total)
            continue;
        if (!psoup__goes_on(&t->team, &status, finish_step(t, l, error)))
            break;
    }
fail:
    return status;
}

static psoup_status finish_validation(psoup__reward_trainer *t, psoup__reward_learner *l,
                                      psoup_error *error) {
    psoup_status status = PSOUP_OK;
    double n = (double)l->n_validation;
    psoup__metrics metrics = {.n = 0};
    psoup__metric(&metrics, "loss", l->loss / n);
    psoup__metric(&metrics, "accuracy", l->right / n);
    psoup__metric(&metrics, "margin", l->margin / n);
    l->validated = l->step;
    if (t->options.keep_best)
        PSOUP__TRY(psoup__best_offer(&l->best, t->model->be, l->adapter->data, l->adapter->count,
                                     l->right / n, -l->loss / n, l->step, error));
    PSOUP__TRY(psoup__report(&t->reporter, "validation", l->name, l->step, l->total, &metrics, error));
fail:
    return status;
}

psoup_status psoup__reward_validate(psoup__reward_trainer *t, const psoup_comparison *comparisons,
                                    psoup_error *error) {
    psoup_status status = PSOUP_OK;
    PSOUP__TRY(psoup__reward_evaluate(t, comparisons, error));
    for (size_t j = 0; j < t->n; j++) {
        psoup__reward_learner *l = &t->learners[j];
        if (!l->due)
            continue;
        if (!psoup__goes_on(&t->team, &status, finish_validation(t, l, error)))
            break;
    }
fail:
    return status;
}
