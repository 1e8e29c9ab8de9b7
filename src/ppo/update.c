/* The passes of PPO: evaluation of a batch before its updates, and the updates. Policies share passes;
 * a policy that stops early leaves them. */
#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "ppo/ppo.h"

/* One response in a pass, under its policy or under the reference (the base, a zero mix). */
typedef struct item {
    size_t policy; /* place in the list of policies */
    int32_t row;   /* in its pass: where its first token is read */
    size_t value;  /* in its pass: the first of its values */
    size_t rollout;
    uint64_t stream;
    double scale; /* of a token's loss in an update: its share of the mini-batch's mean */
    size_t place; /* in an update: among the responses of the mini-batch */
    bool reference;
    bool last; /* in the mini-batch's last loss group */
    bool first; /* no update or epoch came before: its ratios are noted */
} item;

/* What the losses of an update read, and what they come to; a mini-batch's responses in the order of its passes. */
typedef struct losses {
    float *known;      /* device: the policies' tokens one after another, array by array; `old` points there */
    psoup__old old;
    size_t *begin;     /* [policies] where a policy's tokens begin in each */
    int32_t *first;    /* [items + 1] where a pass's responses begin */
    psoup__response *response, *response_device; /* [items] */
    psoup__loss_terms *terms, *terms_device;     /* [items] */
    psoup__objective objective;
} losses;

typedef struct work {
    psoup_ppo *ppo;
    psoup__policy *const *policies;
    bool validation; /* reads `validation` instead of `experience` */
    item *items;     /* [n] in order of owner */
    int32_t *rows, *owner, *pass;
    size_t n;
    bool values; /* are read */
    losses loss;
} work;

static psoup__experience *experience_of(const work *w, const item *it) {
    psoup__policy *policy = w->policies[it->policy];
    return w->validation ? &policy->validation : &policy->experience;
}

static size_t response_tokens(const psoup__rollouts *r, size_t rollout) {
    return (size_t)(r->start[rollout + 1] - r->start[rollout]);
}

static psoup_status work_start(work *w, size_t capacity, psoup_error *error) {
    psoup_context *context = w->ppo->model->context;
    w->items = psoup__alloc(context, capacity, sizeof(*w->items), error);
    w->rows = psoup__alloc(context, capacity, sizeof(*w->rows), error);
    w->owner = psoup__alloc(context, capacity, sizeof(*w->owner), error);
    w->pass = psoup__alloc(context, capacity, sizeof(*w->pass), error);
    return w->items && w->rows && w->owner && w->pass ? PSOUP_OK : PSOUP_ERROR_MEMORY;
}

static void work_end(work *w) {
    psoup_context *context = w->ppo->model->context;
    psoup__free(context, w->items);
    psoup__free(context, w->rows);
    psoup__free(context, w->owner);
    psoup__free(context, w->pass);
}

/* The last token of a response is only a target: it takes no row. */
static void add_item(work *w, item it) {
    const psoup__rollouts *r = &experience_of(w, &it)->rollouts;
    int32_t response = r->start[it.rollout + 1] - r->start[it.rollout];
    w->items[w->n] = it;
    w->rows[w->n] = (int32_t)r->prompt[it.rollout]->n + response - 1;
    w->owner[w->n] = (int32_t)(2 * it.policy + it.reference);
    w->n++;
}

static psoup_status plan(work *w, bool learn, psoup_error *error) {
    return psoup__passes_plan(w->ppo->passes, w->rows, w->owner, w->n, w->ppo->options.micro_batch_tokens, learn,
                              w->pass, error);
}

/* The distribution of response token t, and the value before it, are read at position |q| + t − 1. */
static psoup_status pack_item(const work *w, psoup__pack *pack, item *it, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const psoup__policy *policy = w->policies[it->policy];
    const psoup__rollouts *r = &experience_of(w, it)->rollouts;
    const int32_t *response = r->response + r->start[it->rollout];
    size_t n = (size_t)(r->start[it->rollout + 1] - r->start[it->rollout]);
    const psoup_ppo_prompt *prompt = r->prompt[it->rollout];
    psoup__sequence sequence = {.first = prompt->tokens,
                                .n_first = prompt->n,
                                .then = response,
                                .n_then = n - 1,
                                .adapter = -1,
                                .adapters = it->reference ? NULL : policy->adapters,
                                .weight = r->weight + it->rollout * r->adapters,
                                .n_adapters = r->adapters,
                                .seed = psoup__seed_for(policy->given.seed,
                                                        PSOUP__FOR_LORA_DROPOUT),
                                .stream = it->stream};
    int32_t row;
    PSOUP__TRY(psoup__pack_sequence(pack, &sequence, &row, error));
    it->row = row + (int32_t)prompt->n - 1;
    for (size_t t = 0; t < n; t++)
        PSOUP__TRY(psoup__pack_read(pack, it->row + (int32_t)t, response[t], error));
    if (w->values && !it->reference)
        PSOUP__TRY(psoup__pack_values(pack, n, &it->value, error));
fail:
    return status;
}

/* One adapter's part of the values of items [begin, end), which are of one policy. */
static psoup_status pack_heads(const work *w, psoup__pack *pack, int32_t pass, size_t begin, size_t end, size_t part,
                               psoup_error *error) {
    const psoup__policy *policy = w->policies[w->items[begin].policy];
    uint64_t seed = psoup__seed_for(policy->given.seed, PSOUP__FOR_HEAD_DROPOUT);
    psoup_status status = PSOUP_OK;
    for (size_t i = begin; i < end; i++) {
        const item *it = &w->items[i];
        const psoup__rollouts *r = &experience_of(w, it)->rollouts;
        float weight = r->weight[it->rollout * r->adapters + part];
        if (w->pass[i] != pass || it->reference || weight == 0.0f)
            continue;
        for (size_t t = 0; t < response_tokens(r, it->rollout); t++)
            PSOUP__TRY(psoup__pack_head(pack, policy->parts[part].adapter,
                                        it->row + (int32_t)t, it->value + t, weight, seed,
                                        it->stream, t, error));
    }
fail:
    return status;
}

static psoup_status pack_pass(const work *w, psoup__pack *pack, int32_t pass, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const size_t begin = w->ppo->passes->begin[pass], last = w->ppo->passes->end[pass];
    for (size_t i = begin; i < last; i++)
        if (w->pass[i] == pass)
            PSOUP__TRY(pack_item(w, pack, &w->items[i], error));
    for (size_t i = begin, end; w->values && i < last; i = end) {
        for (end = i; end < last && w->items[end].policy == w->items[i].policy;)
            end++;
        for (size_t k = 0; k < w->policies[w->items[i].policy]->n_parts; k++)
            PSOUP__TRY(pack_heads(w, pack, pass, i, end, k, error));
    }
fail:
    return status;
}

/* ---- before the updates -------------------------------------------------------------------------- */

static psoup_status reserve_tokens(psoup_context *context, psoup__experience *x,
                                   psoup_error *error) {
    psoup_status status = PSOUP_OK;
    float **arrays[] = {&x->logprob,   &x->ref_logprob, &x->value,      &x->reward,
                        &x->advantage, &x->returns,     &x->first_ratio};
    size_t reached = x->capacity;
    for (size_t i = 0; i < sizeof(arrays) / sizeof(arrays[0]); i++) {
        reached = x->capacity;
        PSOUP__TRY(psoup__reserve(context, arrays[i], &reached, x->rollouts.tokens, sizeof(float),
                                  error));
    }
    x->capacity = reached;
fail:
    return status;
}

static psoup_status evaluate_pass(void *user, psoup__pack *pack, int32_t pass, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const work *w = user;
    PSOUP__TRY(pack_pass(w, pack, pass, error));
    PSOUP__TRY(psoup__pack_forward(pack, false, 0.0f, 0.0f, error));
    PSOUP__TRY(psoup__pack_fetch(pack, error));
    for (size_t i = w->ppo->passes->begin[pass], read = 0; i < w->ppo->passes->end[pass]; i++) {
        const item *it = &w->items[i];
        if (w->pass[i] != pass)
            continue;
        psoup__experience *x = experience_of(w, it);
        size_t begin = (size_t)x->rollouts.start[it->rollout], n = response_tokens(&x->rollouts, it->rollout);
        memcpy((it->reference ? x->ref_logprob : x->logprob) + begin, pack->logprob + read, n * sizeof(*x->logprob));
        if (w->values && !it->reference)
            memcpy(x->value + begin, pack->value + it->value, n * sizeof(*x->value));
        read += n;
    }
fail:
    return status;
}

psoup_status psoup__ppo_evaluate(psoup_ppo *ppo, psoup__policy *const *policies, size_t n,
                                 bool validation, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    work w = {.ppo = ppo, .policies = policies, .validation = validation};
    bool values = !validation && psoup__has_critic(&ppo->options);
    size_t items = 0;
    for (size_t p = 0; p < n; p++) {
        item any = {.policy = p};
        psoup__experience *x = experience_of(&w, &any);
        items += 2 * x->rollouts.n;
        PSOUP__TRY(reserve_tokens(ppo->model->context, x, error));
        psoup__rollouts_deal(&x->rollouts, &ppo->team, true);
        for (size_t t = 0; t < x->rollouts.tokens; t++) {
            x->first_ratio[t] = NAN;
            x->value[t] = 0.0f;
        }
    }
    PSOUP__TRY(work_start(&w, items, error));
    for (size_t p = 0; p < n; p++)
        for (int reference = 0; reference < 2; reference++) {
            item it = {.policy = p, .reference = reference};
            for (; it.rollout < experience_of(&w, &it)->rollouts.n; it.rollout++)
                if (experience_of(&w, &it)->rollouts.mine[it.rollout])
                    add_item(&w, it);
        }
    w.values = values;
    PSOUP__TRY(plan(&w, false, error));
    PSOUP__TRY(psoup__passes_run(ppo->passes, evaluate_pass, &w, error));
    for (size_t p = 0; p < n; p++) {
        item any = {.policy = p};
        PSOUP__TRY(psoup__ppo_share_evaluation(ppo, experience_of(&w, &any), values, error));
    }
fail:
    work_end(&w);
    return status;
}

/* ---- the updates ------------------------------------------------------------------------------- */

/* How the updates of one policy go. */
typedef struct progress {
    psoup__random shuffle;
    int32_t *order; /* [batch] this epoch's permutation */
    bool stopped, updated;
    size_t tokens;           /* of the mini-batch */
    psoup__loss_terms terms; /* of the mini-batch */
    double epoch_kl, last_kl; /* sums of log π_old − log π: of an epoch, of its last loss group */
    size_t epoch_tokens;
    int64_t last_tokens;
    /* For the report: sums over mini-batches. */
    double policy_loss, value_loss, clipped, value_clipped, ratio_max, norm, kl;
    int32_t mini_batches, skipped, epochs;
} progress;

/* Gives the device what is known of the policies' tokens, and room for so many responses. */
static psoup_status losses_start(work *w, size_t n, size_t items, psoup_error *error) {
    const psoup_ppo_options *o = &w->ppo->options;
    psoup_context *context = w->ppo->model->context;
    psoup__backend *be = w->ppo->model->be;
    losses *l = &w->loss;
    const bool critic = psoup__has_critic(o), kl = o->objective == PSOUP_OBJECTIVE_GRPO;
    const float **const old[] = {&l->old.logprob, &l->old.advantage, &l->old.ref, &l->old.value, &l->old.returns};
    const bool has[] = {true, true, kl, critic, critic};
    size_t tokens = 0, arrays = 2 + (size_t)kl + 2 * (size_t)critic;
    l->objective = (psoup__objective){.clip = o->clip_range,
                                      .value_clip = o->clip_range_value,
                                      .value_coefficient = o->value_coefficient,
                                      .whole = o->objective == PSOUP_OBJECTIVE_RLOO,
                                      .estimator = o->kl_estimator == PSOUP_KL_DEFAULT ? PSOUP__K3 : o->kl_estimator};
    l->begin = psoup__alloc(context, n, sizeof(*l->begin), error);
    l->first = psoup__alloc(context, items + 1, sizeof(*l->first), error);
    l->response = psoup__alloc(context, items, sizeof(*l->response), error);
    l->terms = psoup__alloc(context, items, sizeof(*l->terms), error);
    for (size_t p = 0; l->begin && p < n; tokens += w->policies[p++]->experience.rollouts.tokens)
        l->begin[p] = tokens;
    l->known = be->ops->alloc(be, arrays * tokens, sizeof(*l->known), error);
    l->response_device = be->ops->alloc(be, items, sizeof(*l->response), error);
    l->terms_device = be->ops->alloc(be, items, sizeof(*l->terms), error);
    if (!l->begin || !l->first || !l->response || !l->terms || !l->known || !l->response_device || !l->terms_device)
        return PSOUP_ERROR_MEMORY;
    float *array = l->known;
    for (size_t k = 0; k < sizeof(old) / sizeof(old[0]); k++) {
        for (size_t p = 0; has[k] && p < n; p++) {
            const psoup__experience *x = &w->policies[p]->experience;
            const float *const of[] = {x->logprob, x->advantage, x->ref_logprob, x->value, x->returns};
            be->ops->write(be, array + l->begin[p], of[k], x->rollouts.tokens * sizeof(*array));
        }
        *old[k] = has[k] ? array : NULL;
        array += has[k] ? tokens : 0;
    }
    return PSOUP_OK;
}

static void losses_end(work *w) {
    psoup_context *context = w->ppo->model->context;
    psoup__backend *be = w->ppo->model->be;
    be->ops->release(be, w->loss.known);
    be->ops->release(be, w->loss.response_device);
    be->ops->release(be, w->loss.terms_device);
    psoup__free(context, w->loss.begin);
    psoup__free(context, w->loss.first);
    psoup__free(context, w->loss.response);
    psoup__free(context, w->loss.terms);
}

/* Lists the planned passes' responses. */
static void list_responses(work *w) {
    const psoup__passes *passes = w->ppo->passes;
    losses *l = &w->loss;
    size_t place = 0;
    for (int32_t pass = 0; pass < passes->n; pass++) {
        l->first[pass] = (int32_t)place;
        for (size_t i = passes->begin[pass], read = 0; i < passes->end[pass]; i++) {
            item *it = &w->items[i];
            if (w->pass[i] != pass)
                continue;
            const psoup__rollouts *r = &experience_of(w, it)->rollouts;
            const size_t n = response_tokens(r, it->rollout);
            l->response[place] = (psoup__response){.scale = it->scale,
                                                   .beta = w->policies[it->policy]->state.kl_coefficient,
                                                   .first = (int32_t)read,
                                                   .tokens = (int32_t)n,
                                                   .old = (int64_t)l->begin[it->policy] + r->start[it->rollout]};
            it->place = place++;
            read += n;
        }
    }
    l->first[passes->n] = (int32_t)place;
}

/* The ratios of responses that no update came before. */
static void note_ratios(const work *w, psoup__pack *pack, int32_t pass) {
    for (size_t i = w->ppo->passes->begin[pass]; i < w->ppo->passes->end[pass]; i++) {
        const item *it = &w->items[i];
        if (w->pass[i] != pass || !it->first)
            continue;
        psoup__experience *x = experience_of(w, it);
        const size_t begin = (size_t)x->rollouts.start[it->rollout], read = (size_t)w->loss.response[it->place].first;
        for (size_t t = 0; t < response_tokens(&x->rollouts, it->rollout); t++)
            x->first_ratio[begin + t] = expf(pack->logprob[read + t] - x->logprob[begin + t]);
    }
}

/* Nothing is read between forward and backward. Where there are values, each was read with its token's log-prob. */
static psoup_status update_pass(void *user, psoup__pack *pack, int32_t pass, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const work *w = user;
    const psoup_ppo_options *o = &w->ppo->options;
    const losses *l = &w->loss;
    psoup__backend *be = w->ppo->model->be;
    const int32_t first = l->first[pass];
    bool noted = false;
    PSOUP__TRY(pack_pass(w, pack, pass, error));
    PSOUP__TRY(psoup__pack_forward(pack, true, o->lora_dropout, o->head_dropout, error));
    be->ops->policy_loss(be, pack->device.dlogprob, pack->device.dvalue, l->terms_device + first, pack->device.logprob,
                         pack->device.value, &l->old, l->response_device + first, l->first[pass + 1] - first,
                         &l->objective);
    PSOUP__TRY(psoup__pack_backward(pack, error));
    for (size_t i = w->ppo->passes->begin[pass]; i < w->ppo->passes->end[pass]; i++) {
        const item *it = &w->items[i];
        assert(w->pass[i] != pass || !w->values || it->value == (size_t)l->response[it->place].first);
        noted = noted || (w->pass[i] == pass && it->first);
    }
    if (noted) {
        PSOUP__TRY(psoup__pack_fetch(pack, error));
        note_ratios(w, pack, pass);
    }
fail:
    return status;
}

/* The forwards and backwards of the items that were listed, and what their losses came to. */
static psoup_status run_updates(work *w, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__backend *be = w->ppo->model->be;
    losses *l = &w->loss;
    PSOUP__TRY(plan(w, true, error));
    list_responses(w);
    be->ops->write(be, l->response_device, l->response, w->n * sizeof(*l->response));
    PSOUP__TRY(psoup__passes_run(w->ppo->passes, update_pass, w, error));
    PSOUP__TRY(be->ops->read(be, l->terms, l->terms_device, w->n * sizeof(*l->terms), error));
fail:
    return status;
}

static void zero_gradients(psoup__policy *policy) {
    for (size_t k = 0; k < policy->n_parts; k++)
        psoup__optimizer_zero(&policy->parts[k].optimizer);
}

static psoup_status add_gradients(psoup_ppo *ppo, psoup__policy *policy, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t k = 0; status == PSOUP_OK && k < policy->n_parts; k++)
        status = psoup__team_sum_gradient(&ppo->team, &policy->parts[k].optimizer, error);
    return status;
}

static psoup_status step_parts(psoup__policy *policy, float lr, double *norm, bool *stepped,
                               psoup_error *error) {
    psoup__optimizer *all[PSOUP__MAX_SOUP];
    for (size_t k = 0; k < policy->n_parts; k++)
        all[k] = &policy->parts[k].optimizer;
    return psoup__optimizers_step(all, policy->n_parts, lr, norm, stepped, error);
}

/* The first of a step is told; "skipped" counts them. */
static void tell_skipped(const psoup_ppo *ppo, const psoup__policy *policy, const progress *g, double norm) {
    const psoup_ppo_options *o = &ppo->options;
    const psoup__loss_terms *terms = &g->terms;
    double ratio = terms->ratio / (double)terms->ratios;
    char why[128];
    if (terms->broken)
        snprintf(why, sizeof(why), "its loss or its ratio is not a finite number");
    else if (!(ratio <= o->ratio_threshold))
        snprintf(why, sizeof(why), "its mean ratio is %g (ratio_threshold is %g)", ratio, (double)o->ratio_threshold);
    else
        snprintf(why, sizeof(why), "the norm of its gradient is %g", isnan(norm) ? (double)NAN : norm);
    psoup__log(ppo->model->context, PSOUP_LOG_WARNING,
               "ppo: policy '%s', step %lld: mini-batch %d was skipped, %s: %s", policy->name,
               (long long)policy->next.step, g->mini_batches + 1,
               o->skipped_step ? "its optimiser stepped on a zero gradient" : "its optimiser left as it was", why);
}

/* Ends a policy's mini-batch: its step, or not. A mini-batch that drives the mean ratio too far, or
 * whose numbers are not finite, is dropped whole: its gradient was only ever in the buffer. */
static psoup_status step_policy(psoup_ppo *ppo, psoup__policy *policy, progress *g,
                                psoup_error *error) {
    psoup_status status = psoup__ppo_add_terms(ppo, &g->terms, &g->last_kl, &g->last_tokens, error);
    const psoup_ppo_options *o = &ppo->options;
    const psoup__loss_terms *terms = &g->terms;
    if (status != PSOUP_OK)
        return status;
    double n = (double)g->tokens, ratios = (double)terms->ratios, norm = 0.0;
    bool good = !terms->broken && terms->ratio / ratios <= o->ratio_threshold, stepped = false;
    if (good) {
        PSOUP__TRY(add_gradients(ppo, policy, error));
        PSOUP__TRY(step_parts(policy, o->learning_rate, &norm, &stepped, error));
    }
    if (!stepped) {
        if (g->skipped++ == 0 && ppo->team.rank == 0)
            tell_skipped(ppo, policy, g, norm);
        if (o->skipped_step) { /* as trl did: momentum moves on */
            zero_gradients(policy);
            PSOUP__TRY(step_parts(policy, o->learning_rate, &norm, &stepped, error));
        }
    } else {
        g->policy_loss += terms->policy_loss / ratios;
        g->value_loss += terms->value_loss / n;
        g->clipped += terms->clipped / ratios;
        g->value_clipped += terms->value_clipped / n;
        g->kl += terms->kl / n;
        g->norm += norm;
    }
    g->updated = g->updated || stepped;
    if (!terms->broken) {
        g->epoch_kl += terms->kl;
        g->epoch_tokens += g->tokens;
    }
    if (!(terms->ratio_max <= g->ratio_max))
        g->ratio_max = terms->ratio_max;
    g->mini_batches++;
fail:
    return status;
}

/* Adds rollouts [begin, end) of a policy's permutation. Their loss is the mean over tokens of each
 * loss_group of them, averaged over the groups; or over all tokens, where there are no groups. RLOO's is
 * over responses instead. */
static void add_mini_batch(work *w, size_t p, progress *g, size_t begin, size_t end) {
    const psoup__rollouts *r = &w->policies[p]->experience.rollouts;
    size_t wanted = (size_t)w->ppo->options.loss_group, size = wanted ? wanted : end - begin;
    double groups = (double)((end - begin + size - 1) / size);
    psoup__team_deal(&w->ppo->team);
    g->tokens = g->last_tokens = 0;
    g->last_kl = 0.0;
    for (size_t first = begin; first < end; first += size) {
        size_t last = first + size < end ? first + size : end, tokens = 0;
        for (size_t i = first; i < last; i++)
            tokens += response_tokens(r, (size_t)g->order[i]);
        g->tokens += tokens;
        size_t count = w->ppo->options.objective == PSOUP_OBJECTIVE_RLOO ? last - first : tokens;
        for (size_t i = first; i < last; i++) {
            const item it = {.policy = p,
                             .rollout = (size_t)g->order[i],
                             .stream = w->policies[p]->next.updates++,
                             .scale = 1.0 / (groups * (double)count),
                             .last = last == end,
                             .first = !g->updated && g->epochs == 0};
            size_t rows = r->prompt[it.rollout]->n + response_tokens(r, it.rollout);
            if (psoup__team_mine(&w->ppo->team, (int64_t)rows))
                add_item(w, it);
        }
    }
}

/* One mini-batch of every policy that has not stopped: rollouts [begin, end) of its permutation. */
static psoup_status run_mini_batch(work *w, progress *all, size_t n, size_t begin, size_t end,
                                   psoup_error *error) {
    psoup_status status = PSOUP_OK;
    w->n = 0;
    for (size_t p = 0; p < n; p++) {
        progress *g = &all[p];
        if (g->stopped)
            continue;
        g->terms = (psoup__loss_terms){.tokens = 0};
        add_mini_batch(w, p, g, begin, end);
        zero_gradients(w->policies[p]);
    }
    PSOUP__TRY(run_updates(w, error));
    for (size_t i = 0; i < w->n; i++) {
        const item *it = &w->items[i];
        const psoup__loss_terms *terms = &w->loss.terms[it->place];
        progress *g = &all[it->policy];
        psoup__loss_terms_add(&g->terms, terms);
        g->last_kl += it->last ? terms->kl : 0.0;
        g->last_tokens += it->last ? terms->tokens : 0;
    }
    for (size_t p = 0; p < n; p++)
        if (!all[p].stopped)
            PSOUP__TRY(step_policy(w->ppo, w->policies[p], &all[p], error));
fail:
    return status;
}

/* trl's rule: past 1.5 · target_kl. The estimate of an epoch is mean(log π_old − log π) as its
 * mini-batches saw it. */
static bool stops(const psoup_ppo_options *o, const progress *g) {
    bool last = o->early_stop == PSOUP_EARLY_STOP_LAST;
    double sum = last ? g->last_kl : g->epoch_kl;
    size_t tokens = last ? (size_t)g->last_tokens : g->epoch_tokens;
    return o->early_stop != PSOUP_EARLY_STOP_OFF && tokens &&
           sum > 1.5 * o->target_kl * (double)tokens;
}

static void report_progress(psoup__policy *policy, const progress *g, bool critic) {
    double steps = g->mini_batches > g->skipped ? g->mini_batches - g->skipped : 1;
    psoup__metric(&policy->metrics, "policy_loss", g->policy_loss / steps);
    if (critic)
        psoup__metric(&policy->metrics, "value_loss", g->value_loss / steps);
    psoup__metric(&policy->metrics, "clip_fraction", g->clipped / steps);
    if (critic)
        psoup__metric(&policy->metrics, "value_clip_fraction", g->value_clipped / steps);
    psoup__metric(&policy->metrics, "policy_kl", g->kl / steps);
    psoup__metric(&policy->metrics, "ratio_max", g->ratio_max);
    psoup__metric(&policy->metrics, "grad_norm", g->norm / steps);
    psoup__metric(&policy->metrics, "epochs", g->epochs);
    psoup__metric(&policy->metrics, "skipped", g->skipped);
}

psoup_status psoup__ppo_update(psoup_ppo *ppo, psoup__policy *const *policies, size_t n,
                               psoup_error *error) {
    psoup_status status = PSOUP_OK;
    const psoup_ppo_options *o = &ppo->options;
    psoup_context *context = ppo->model->context;
    size_t batch = (size_t)o->batch_size;
    size_t mini = o->mini_batch_size ? (size_t)o->mini_batch_size : batch;
    work w = {.ppo = ppo, .policies = policies, .values = psoup__has_critic(o)};
    progress *all = psoup__alloc(context, n, sizeof(*all), error);
    if (!all)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(work_start(&w, n * batch, error));
    PSOUP__TRY(losses_start(&w, n, n * batch, error));
    for (size_t p = 0; p < n; p++) {
        all[p].shuffle = (psoup__random){
            psoup__seed_for(policies[p]->given.seed, PSOUP__FOR_MINI_BATCHES),
            (uint64_t)policies[p]->state.step, 0};
        all[p].order = psoup__alloc(context, batch, sizeof(*all[p].order), error);
        if (!all[p].order) {
            status = PSOUP_ERROR_MEMORY;
            goto fail;
        }
        for (size_t i = 0; i < batch; i++)
            all[p].order[i] = (int32_t)i;
    }
    size_t running = n;
    for (int32_t epoch = 0; epoch < o->ppo_epochs && running; epoch++) {
        for (size_t p = 0; p < n; p++) {
            if (all[p].stopped)
                continue;
            psoup__random_shuffle(&all[p].shuffle, all[p].order, batch);
            all[p].epoch_kl = 0.0;
            all[p].epoch_tokens = 0;
        }
        for (size_t begin = 0; begin < batch; begin += mini)
            PSOUP__TRY(run_mini_batch(&w, all, n, begin,
                                      batch - begin < mini ? batch : begin + mini, error));
        for (size_t p = 0; p < n; p++) {
            if (all[p].stopped)
                continue;
            all[p].epochs++;
            all[p].stopped = stops(o, &all[p]);
            running -= all[p].stopped;
        }
    }
    for (size_t p = 0; p < n; p++)
        PSOUP__TRY(psoup__ppo_share_ratios(ppo, &policies[p]->experience, error));
    for (size_t p = 0; p < n; p++)
        report_progress(policies[p], &all[p], psoup__has_critic(o));
fail:
    for (size_t p = 0; p < n; p++)
        psoup__free(context, all[p].order);
    psoup__free(context, all);
    losses_end(&w);
    work_end(&w);
    return status;
}
