/* A step of direct preference optimisation of several policies, side by side, and their validation. */
#include <string.h>

#include "train/dpo.h"

typedef enum purpose { REFERENCE, EVALUATE, LEARN } purpose;

size_t psoup__dpo_longest_row(const psoup__dpo_trainer *t) {
    size_t most = (size_t)t->model->config.max_position_embeddings;
    size_t wanted = (size_t)t->options.max_tokens;
    return wanted && wanted < most ? wanted : most;
}

/* The response of one side: 0 the chosen, 1 the rejected. *n receives how many tokens count. */
static const int32_t *response(const psoup__dpo_trainer *t, const psoup_dpo_pair *pair, int side,
                               size_t *n) {
    size_t room = psoup__dpo_longest_row(t) - pair->n_prompt;
    *n = side ? pair->n_rejected : pair->n_chosen;
    *n = *n < room ? *n : room;
    return side ? pair->rejected : pair->chosen;
}

int64_t psoup__dpo_rows(const psoup__dpo_trainer *t, const psoup_dpo_pair *pair) {
    size_t length[2];
    for (int side = 0; side < 2; side++)
        response(t, pair, side, &length[side]);
    return (int64_t)(2 * (pair->n_prompt - 1) + length[0] + length[1]);
}

/* What is run of the listed items, all of one set. */
typedef struct errand {
    psoup__dpo_trainer *t;
    const psoup__dpo_set *set;
    purpose what;
} errand;

/* Both rows of the items of one pass; what is read are their responses' tokens, chosen before rejected.
 * Token k is read at position |prompt| + k − 1, so that a row needs no last token. */
static psoup_status pack_items(const errand *e, psoup__pack *pack, int32_t pass, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const psoup__dpo_trainer *t = e->t;
    uint64_t seed = psoup__seed_for(t->options.seed, PSOUP__FOR_LORA_DROPOUT);
    for (size_t i = t->passes->begin[pass]; i < t->passes->end[pass]; i++) {
        if (t->pass[i] != pass)
            continue;
        const psoup_dpo_pair *pair = &e->set->pairs[t->item[i]];
        for (int side = 0; side < 2; side++) {
            size_t length;
            const int32_t *tokens = response(t, pair, side, &length);
            psoup__sequence sequence = {
                .first = pair->prompt,
                .n_first = pair->n_prompt,
                .then = tokens,
                .n_then = length - 1,
                .adapter = e->what == REFERENCE ? -1 : t->learners[t->owner[i]].index,
                .seed = seed,
                .stream = t->stream[i] + (uint64_t)side};
            int32_t row;
            PSOUP__TRY(psoup__pack_sequence(pack, &sequence, &row, error));
            row += (int32_t)pair->n_prompt - 1;
            for (size_t k = 0; k < length; k++)
                PSOUP__TRY(psoup__pack_read(pack, row + (int32_t)k, tokens[k], error));
        }
    }
fail:
    return status;
}

/* The loss of an item, by its responses' log-probs: by what they gained on the reference's, and their lengths. */
static double loss_of(const errand *e, size_t i, double *w, double *r, double *dw) {
    const psoup__dpo_trainer *t = e->t;
    const double *reference = e->set->reference + 2 * (size_t)t->item[i];
    double token = t->options.length_penalty / (double)t->options.beta;
    size_t n[2];
    for (int side = 0; side < 2; side++)
        response(t, &e->set->pairs[t->item[i]], side, &n[side]);
    *w = t->logprob[2 * i] - reference[0] + token * (double)n[0];
    *r = t->logprob[2 * i + 1] - reference[1] + token * (double)n[1];
    return psoup__dpo_loss(*w, *r, t->options.beta, t->options.label_smoothing, dw);
}

static psoup_status run_pass(void *user, psoup__pack *pack, int32_t pass, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const errand *e = user;
    psoup__dpo_trainer *t = e->t;
    const bool learn = e->what == LEARN;
    PSOUP__TRY(pack_items(e, pack, pass, error));
    PSOUP__TRY(psoup__pack_forward(pack, learn, learn ? t->options.lora_dropout : 0.0f, 0.0f, error));
    PSOUP__TRY(psoup__pack_fetch(pack, error));
    for (size_t i = t->passes->begin[pass], read = 0; i < t->passes->end[pass]; i++) {
        if (t->pass[i] != pass)
            continue;
        size_t length[2], at = read;
        double *logprob = t->logprob + 2 * i, w, r, dw;
        logprob[0] = logprob[1] = 0.0;
        for (int side = 0; side < 2; side++) {
            response(t, &e->set->pairs[t->item[i]], side, &length[side]);
            for (size_t k = 0; k < length[side]; k++)
                logprob[side] += pack->logprob[read++];
        }
        if (!learn)
            continue;
        const psoup__dpo_learner *l = &t->learners[t->owner[i]];
        loss_of(e, i, &w, &r, &dw);
        float slope = (float)(dw / (double)(l->step_end - l->at)); /* mean over the step */
        for (size_t k = at; k < read; k++)
            pack->dlogprob[k] = k < at + length[0] ? slope : -slope;
    }
    if (learn) {
        psoup__pack_send(pack);
        PSOUP__TRY(psoup__pack_backward(pack, error));
    }
fail:
    return status;
}

/* Runs the items that were listed, in as many passes as it takes: forwards for the reference's
 * log-probs, or for the losses, or backwards too. What the losses come to goes to the learners. */
static psoup_status run_items(psoup__dpo_trainer *t, const psoup__dpo_set *set, size_t n, purpose what,
                              psoup_error *error) {
    psoup_status status = PSOUP_OK;
    errand e = {t, set, what};
    for (size_t i = 0; i < n; i++)
        t->through += (size_t)(t->rows[i] = (int32_t)psoup__dpo_rows(t, &set->pairs[t->item[i]]));
    PSOUP__TRY(psoup__passes_plan(t->passes, t->rows, t->owner, n, PSOUP__PASS_TOKENS, what == LEARN, t->pass, error));
    PSOUP__TRY(psoup__passes_run(t->passes, run_pass, &e, error));
    for (size_t i = 0; i < n; i++) {
        psoup__dpo_learner *l = &t->learners[t->owner[i]];
        double w, r, dw;
        if (what == REFERENCE) {
            memcpy(set->reference + 2 * (size_t)t->item[i], t->logprob + 2 * i, 2 * sizeof(*t->logprob));
            continue;
        }
        l->loss += loss_of(&e, i, &w, &r, &dw);
        l->right += w > r;
        l->chosen += t->options.beta * w;
        l->rejected += t->options.beta * r;
    }
fail:
    return status;
}

/* Makes a pair an item, where it is this rank's. */
static void list_item(psoup__dpo_trainer *t, const psoup__dpo_set *set, size_t *n, int32_t item,
                      size_t owner, uint64_t stream) {
    if (!psoup__team_mine(&t->team, psoup__dpo_rows(t, &set->pairs[item])))
        return;
    t->item[*n] = item;
    t->owner[*n] = (int32_t)owner;
    t->stream[(*n)++] = stream;
}

psoup_status psoup__dpo_ask_reference(psoup__dpo_trainer *t, psoup__dpo_set *set, psoup_error *error) {
    set->reference = psoup__alloc(t->model->context, set->n, 2 * sizeof(*set->reference), error);
    if (!set->reference)
        return PSOUP_ERROR_MEMORY;
    size_t n = 0;
    psoup__team_deal(&t->team);
    for (size_t i = 0; i < set->n; i++)
        list_item(t, set, &n, (int32_t)i, 0, 0);
    psoup_status status = run_items(t, set, n, REFERENCE, error);
    return status != PSOUP_OK ? status /* with zeros for what others were asked, a sum is a union */
                              : psoup__team_sum(&t->team, set->reference, 2 * set->n, error);
}

/* ---- steps ------------------------------------------------------------------------------------ */

static void clear_sums(psoup__dpo_learner *l) { l->loss = l->right = l->chosen = l->rejected = 0.0; }

/* Over all ranks. */
static psoup_status add_sums(psoup__dpo_trainer *t, psoup__dpo_learner *l, psoup_error *error) {
    double sums[] = {l->loss, l->right, l->chosen, l->rejected};
    psoup_status status = psoup__team_sum(&t->team, sums, 4, error);
    l->loss = sums[0];
    l->right = sums[1];
    l->chosen = sums[2];
    l->rejected = sums[3];
    return status;
}

static void report_sums(const psoup__dpo_learner *l, double n, psoup__metrics *metrics) {
    psoup__metric(metrics, "loss", l->loss / n);
    psoup__metric(metrics, "accuracy", l->right / n);
    psoup__metric(metrics, "margin", (l->chosen - l->rejected) / n);
    psoup__metric(metrics, "reward_chosen", l->chosen / n);
    psoup__metric(metrics, "reward_rejected", l->rejected / n);
}

void psoup__dpo_order(const psoup__dpo_trainer *t, psoup__dpo_learner *l) {
    psoup__permutation(l->order, l->n_train, psoup__seed_for(t->options.seed, PSOUP__FOR_ORDER),
                       (uint64_t)l->epoch);
}

/* Starts each learner's next step: where it ends in its order. */
static void begin_step(const psoup__dpo_trainer *t, psoup__dpo_learner *l) {
    size_t per_step = (size_t)t->options.batch_size * (size_t)t->options.accumulation;
    if (l->at == l->n_train || l->epoch < 0) {
        l->epoch++;
        psoup__dpo_order(t, l);
        l->at = 0;
    }
    l->step_end = l->n_train - l->at < per_step ? l->n_train : l->at + per_step;
    l->micro_end = l->at;
    clear_sums(l);
    psoup__optimizer_zero(&l->optimizer);
}

/* The next micro-batch of every learner that still has steps to go. */
static psoup_status run_micro_batch(psoup__dpo_trainer *t, psoup_error *error) {
    size_t n = 0;
    for (size_t j = 0; j < t->n; j++) {
        psoup__dpo_learner *l = &t->learners[j];
        if (l->step == l->total)
            continue;
        size_t left = l->step_end - l->micro_end, size = (size_t)t->options.batch_size;
        size = left < size ? left : size;
        psoup__team_deal(&t->team);
        for (size_t end = l->micro_end + size; l->micro_end < end; l->micro_end++)
            list_item(t, &t->train, &n, l->train[l->order[l->micro_end]], j,
                      l->sequences + 2 * (l->micro_end - l->at));
    }
    return run_items(t, &t->train, n, LEARN, error);
}

/* Steps a learner and tells of it: PSOUP_ERROR_CANCELLED afterwards, when that says stop. */
static psoup_status finish_step(psoup__dpo_trainer *t, psoup__dpo_learner *l, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const psoup_dpo_options *o = &t->options;
    float rate = psoup__learning_rate(o->learning_rate, o->schedule, o->warmup_steps, l->step + 1,
                                      l->total);
    PSOUP__TRY(psoup__guarded_step(&t->team, &l->optimizer, rate, l->loss, "dpo", l->name, l->step + 1,
                                   &l->norm, &l->stepped, error));
    psoup__metrics metrics = {.n = 0};
    report_sums(l, (double)(l->step_end - l->at), &metrics);
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

psoup_status psoup__dpo_step(psoup__dpo_trainer *t, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    t->since = psoup__now();
    t->through = 0;
    for (size_t j = 0; j < t->n; j++)
        if (t->learners[j].step < t->learners[j].total)
            begin_step(t, &t->learners[j]);
    for (int32_t a = 0; a < t->options.accumulation; a++)
        PSOUP__TRY(run_micro_batch(t, error));
    for (size_t j = 0; j < t->n; j++) { /* all of them before the first steps, should a rank be gone */
        psoup__dpo_learner *l = &t->learners[j];
        if (l->step == l->total)
            continue;
        PSOUP__TRY(add_sums(t, l, error));
        PSOUP__TRY(psoup__team_sum_gradient(&t->team, &l->optimizer, error));
    }
    PSOUP__TRY(psoup__team_count(&t->team, &t->through, error));
    for (size_t j = 0; j < t->n; j++) {
        psoup__dpo_learner *l = &t->learners[j];
        if (l->step < l->total && !psoup__goes_on(&t->team, &status, finish_step(t, l, error)))
            break;
    }
fail:
    return status;
}

static psoup_status finish_validation(psoup__dpo_trainer *t, psoup__dpo_learner *l, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    double count = (double)l->n_validation;
    psoup__metrics metrics = {.n = 0};
    report_sums(l, count, &metrics);
    l->validated = l->step;
    if (t->options.keep_best)
        PSOUP__TRY(psoup__best_offer(&l->best, t->model->be, l->adapter->data, l->adapter->count,
                                     l->right / count, -l->loss / count, l->step, error));
    PSOUP__TRY(psoup__report(&t->reporter, "validation", l->name, l->step, l->total, &metrics, error));
fail:
    return status;
}

psoup_status psoup__dpo_validate(psoup__dpo_trainer *t, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t n = 0;
    for (size_t j = 0; j < t->n; j++) {
        psoup__dpo_learner *l = &t->learners[j];
        if (!l->due)
            continue;
        clear_sums(l);
        psoup__team_deal(&t->team);
        for (size_t i = 0; i < l->n_validation; i++)
            list_item(t, &t->validation, &n, l->validation[i], j, 0);
    }
    PSOUP__TRY(run_items(t, &t->validation, n, EVALUATE, error));
    for (size_t j = 0; j < t->n; j++)
        if (t->learners[j].due)
            PSOUP__TRY(add_sums(t, &t->learners[j], error));
    for (size_t j = 0; j < t->n; j++) {
        psoup__dpo_learner *l = &t->learners[j];
        if (l->due && !psoup__goes_on(&t->team, &status, finish_validation(t, l, error)))
            break;
    }
fail:
    return status;
}
