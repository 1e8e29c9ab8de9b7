/* Scores of rollouts: by the caller's callbacks, and by reward models over every prompt's list of inputs, all policies
 * in shared passes. */
#include <math.h>
#include <string.h>

#include "ppo/rollout.h"

/* One reading of one response by one reward model. */
typedef struct reading {
    psoup_reward *reward;
    const psoup_reward_input *input;
    size_t request, rollout;
    size_t text, n_text; /* with reward_text: its tokens in the arena */
    float score;
} reading;

typedef struct scoring {
    psoup_context *context;
    const psoup_ppo_options *options;
    const psoup__request *requests;
    reading *readings; /* [n] */
    size_t n;
    psoup_reward_input *plain; /* inputs of prompts that list none; the next free one */
    int32_t *arena;            /* retokenised texts */
    size_t arena_length, arena_capacity;
    char *text;
    size_t text_capacity;
} scoring;

/* Appends the text of n ids. Ids without a token, which a model's padded vocabulary can hold, are left
 * out, as tokenizers' own decode does; they are sifted into the arena's free end. */
static psoup_status decode(scoring *s, const int32_t *ids, size_t n, size_t *length,
                           psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t known = 0, more = 0;
    const psoup_tokenizer *tokenizer = s->options->tokenizer;
    PSOUP__TRY(psoup__reserve(s->context, &s->arena, &s->arena_capacity, s->arena_length + n,
                              sizeof(*s->arena), error));
    int32_t *sifted = s->arena + s->arena_length;
    for (size_t i = 0; i < n; i++)
        if (psoup_tokenizer_token(tokenizer, ids[i]))
            sifted[known++] = ids[i];
    PSOUP__TRY(psoup_tokenizer_decode(tokenizer, sifted, known, 1, NULL, 0, &more, error));
    PSOUP__TRY(psoup__reserve(s->context, &s->text, &s->text_capacity, *length + more + 1, 1,
                              error));
    PSOUP__TRY(psoup_tokenizer_decode(tokenizer, sifted, known, 1, s->text + *length, more, &more,
                                      error));
    *length += more;
fail:
    return status;
}

/* decode(input) + decode(response), tokenised again: joeljang/RLPHF training/psoups.py. */
static psoup_status retokenise(scoring *s, reading *r, const int32_t *response, size_t n,
                               psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t length = 0, count = 0;
    PSOUP__TRY(decode(s, r->input->tokens, r->input->n, &length, error));
    PSOUP__TRY(decode(s, response, n, &length, error));
    size_t room = 4 * length + 8;
    PSOUP__TRY(psoup__reserve(s->context, &s->arena, &s->arena_capacity, s->arena_length + room,
                              sizeof(*s->arena), error));
    PSOUP__TRY(psoup_tokenizer_encode(s->options->tokenizer, s->text, length, PSOUP_ADD_SPECIAL,
                                      s->arena + s->arena_length, NULL, room, &count, error));
    if (count == 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "reward model '%s': its input and the response decode to an empty text",
                           psoup_reward_name(r->reward));
    r->text = s->arena_length;
    r->n_text = count;
    s->arena_length += count;
fail:
    return status;
}

/* What a reading's reward model reads: its first reward_max_tokens tokens. */
static psoup__sequence sequence_of(const scoring *s, const reading *r, int32_t adapter) {
    const psoup__rollouts *rollouts = s->requests[r->request].out;
    int32_t start = rollouts->start[r->rollout], end = rollouts->start[r->rollout + 1];
    size_t most = (size_t)r->reward->model->config.max_position_embeddings;
    if (s->options->reward_max_tokens > 0 && (size_t)s->options->reward_max_tokens < most)
        most = (size_t)s->options->reward_max_tokens;
    psoup__sequence sequence = {.adapter = adapter};
    if (s->options->reward_text) {
        sequence.first = s->arena + r->text;
        sequence.n_first = r->n_text;
    } else {
        sequence.first = r->input->tokens;
        sequence.n_first = r->input->n;
        sequence.then = rollouts->response + start;
        sequence.n_then = (size_t)(end - start);
    }
    if (sequence.n_first > most)
        sequence.n_first = most;
    if (sequence.n_then > most - sequence.n_first)
        sequence.n_then = most - sequence.n_first;
    return sequence;
}

/* Whether a policy's source reads prompts that list no inputs: all models do, but that of a list of `rewards` the
 * first alone. */
static bool reads_prompts(const psoup__request *q, size_t source) {
    return q->sources[source].model && (q->policy->soup || q->policy->sources || source == 0);
}

static bool has_models(const psoup__request *q) {
    bool any = false;
    for (size_t k = 0; k < q->out->sources; k++)
        any = any || q->sources[k].model;
    return any;
}

/* Functions score every response, models what the prompt's inputs name, or the prompt. */
static bool is_asked(const psoup__request *q, const psoup_ppo_prompt *prompt, size_t source) {
    bool named = false;
    for (size_t k = 0; prompt->inputs && k < prompt->n_inputs; k++)
        named = named || prompt->inputs[k].reward == (int32_t)source;
    return q->sources[source].function || (prompt->inputs ? named : reads_prompts(q, source));
}

/* How much of a response's score each of its policy's rewards is. */
static void set_shares(const psoup__request *q) {
    psoup__rollouts *out = q->out;
    for (size_t i = 0; i < out->n; i++)
        for (size_t k = 0; k < out->sources; k++) {
            const psoup__source *source = &q->sources[k];
            float mix = q->policy->soup ? out->weight[i * out->adapters + source->adapter] : 1.0f;
            out->share[i * out->sources + k] = is_asked(q, out->prompt[i], k) ? mix * source->weight : 0.0f;
        }
}

/* Lists the readings of one request. */
static psoup_status list_readings(scoring *s, size_t request, psoup_error *error) {
    const psoup__request *q = &s->requests[request];
    const psoup__rollouts *out = q->out;
    for (size_t i = 0; i < out->n; i++) {
        const psoup_ppo_prompt *prompt = out->prompt[i];
        const psoup_reward_input *inputs = prompt->inputs;
        size_t n = prompt->n_inputs;
        if (!out->mine[i])
            continue;
        if (!inputs) {
            inputs = s->plain;
            for (size_t k = 0; k < out->sources; k++)
                if (reads_prompts(q, k))
                    *s->plain++ = (psoup_reward_input){
                        .reward = (int32_t)k, .weight = 1.0f, .tokens = prompt->tokens, .n = prompt->n};
            n = (size_t)(s->plain - inputs);
        }
        for (size_t k = 0; k < n; k++) {
            psoup_reward *model = q->sources[inputs[k].reward].model;
            if (!model || out->share[i * out->sources + (size_t)inputs[k].reward] == 0.0f)
                continue;
            reading *r = &s->readings[s->n++];
            *r = (reading){.reward = model,
                           .input = &inputs[k],
                           .request = request,
                           .rollout = i};
            if (s->options->reward_text) {
                psoup_status status =
                    retokenise(s, r, out->response + out->start[i],
                               (size_t)(out->start[i + 1] - out->start[i]), error);
                if (status != PSOUP_OK)
                    return status;
            }
        }
    }
    return PSOUP_OK;
}

/* Scores all readings of the model that reading `from` reads with. */
static psoup_status score_model(scoring *s, size_t from, psoup__sequence *sequences /* [n] */,
                                float *scores /* [n] */, bool *done /* [n] */, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_model *model = s->readings[from].reward->model;
    psoup__passes *passes = NULL;
    size_t n = 0;
    for (size_t i = from; i < s->n; i++) {
        psoup__adapter *adapter = NULL;
        int32_t index = -1;
        if (s->readings[i].reward->model != model)
            continue;
        PSOUP__TRY(psoup__reward_adapter(s->readings[i].reward, &adapter, &index, error));
        sequences[n++] = sequence_of(s, &s->readings[i], index);
    }
    PSOUP__TRY(psoup__reward_passes(s->readings[from].reward, &passes, error));
    PSOUP__TRY(psoup__score_sequences(passes, sequences, n, scores, error));
    n = 0;
    for (size_t i = from; i < s->n; i++)
        if (s->readings[i].reward->model == model) {
            s->readings[i].score = scores[n++];
            done[i] = true;
        }
fail:
    return status;
}

/* Scores by reward models of all requests that have any. */
static psoup_status score_by_models(scoring *s, size_t n_requests, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t readings = 0, plains = 0;
    psoup__sequence *sequences = NULL;
    psoup_reward_input *plain = NULL;
    float *scores = NULL;
    bool *done = NULL;
    for (size_t r = 0; r < n_requests; r++)
        for (size_t i = 0; has_models(&s->requests[r]) && i < s->requests[r].out->n; i++) {
            const psoup__rollouts *out = s->requests[r].out;
            readings += out->prompt[i]->inputs ? out->prompt[i]->n_inputs : out->sources;
            plains += out->prompt[i]->inputs ? 0 : out->sources;
        }
    if (readings == 0)
        return PSOUP_OK;
    s->readings = psoup__alloc(s->context, readings, sizeof(*s->readings), error);
    s->plain = plain = psoup__alloc(s->context, plains, sizeof(*plain), error);
    sequences = psoup__alloc(s->context, readings, sizeof(*sequences), error);
    scores = psoup__alloc(s->context, readings, sizeof(*scores), error);
    done = psoup__alloc(s->context, readings, sizeof(*done), error);
    if (!s->readings || !plain || !sequences || !scores || !done) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    for (size_t r = 0; r < n_requests; r++)
        if (has_models(&s->requests[r]))
            PSOUP__TRY(list_readings(s, r, error));
    for (size_t i = 0; i < s->n; i++)
        if (!done[i])
            PSOUP__TRY(score_model(s, i, sequences, scores, done, error));
    for (size_t i = 0; i < s->n; i++) {
        const reading *r = &s->readings[i];
        psoup__rollouts *out = s->requests[r->request].out;
        float weight = s->requests[r->request].policy->soup ? 1.0f : r->input->weight;
        out->part_score[r->rollout * out->sources + (size_t)r->input->reward] += weight * r->score;
    }
fail:
    psoup__free(s->context, done);
    psoup__free(s->context, scores);
    psoup__free(s->context, sequences);
    psoup__free(s->context, plain);
    psoup__free(s->context, s->readings);
    psoup__free(s->context, s->arena);
    psoup__free(s->context, s->text);
    return status;
}

/* A callback's scores of those responses of this rank that have it in their score. */
static psoup_status score_by_callback(psoup_context *context, const psoup__request *request,
                                      size_t number, psoup_error *error) {
    psoup__rollouts *out = request->out;
    const psoup_ppo_policy *policy = request->policy;
    const psoup__source *source = &request->sources[number];
    psoup_rollout *rollouts = psoup__alloc(context, out->n, sizeof(*rollouts), error);
    size_t *place = psoup__alloc(context, out->n, sizeof(*place), error), n = 0;
    psoup_status status = rollouts && place ? PSOUP_OK : PSOUP_ERROR_MEMORY;
    for (size_t i = 0; status == PSOUP_OK && i < out->n; i++) {
        if (!out->mine[i] || out->share[i * out->sources + number] == 0.0f)
            continue;
        rollouts[n] = (psoup_rollout){.policy = policy->soup ? policy->soup->adapters[source->adapter]
                                                             : policy->adapter,
                                      .prompt = out->prompt[i],
                                      .response = out->response + out->start[i],
                                      .n = (size_t)(out->start[i + 1] - out->start[i]),
                                      .finish = out->finish[i]};
        place[n++] = i;
    }
    /* The scores go where those of all rewards are summed afterwards. */
    if (status == PSOUP_OK && n && source->function(source->user, rollouts, n, out->score))
        status = psoup__fail(error, PSOUP_ERROR_CANCELLED, "policy '%s': its reward callback failed",
                             policy->adapter);
    for (size_t i = 0; status == PSOUP_OK && i < n; i++)
        out->part_score[place[i] * out->sources + number] = out->score[i];
    psoup__free(context, place);
    psoup__free(context, rollouts);
    return status;
}

/* Σ share · part_score, of those that have a share. */
static void sum_parts(psoup__rollouts *out) {
    for (size_t i = 0; i < out->n; i++) {
        const float *share = out->share + i * out->sources;
        const float *score = out->part_score + i * out->sources;
        double sum = 0.0;
        for (size_t k = 0; k < out->sources; k++)
            sum += share[k] != 0.0f ? (double)share[k] * score[k] : 0.0;
        out->score[i] = (float)sum;
    }
}

psoup_status psoup__score_rollouts(psoup_model *model, psoup__team *team, const psoup_ppo_options *options,
                                   const psoup__request *requests, size_t n, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    scoring s = {.context = model->context, .options = options, .requests = requests};
    for (size_t r = 0; r < n; r++) {
        psoup__rollouts *out = requests[r].out;
        psoup__rollouts_deal(out, team, true);
        set_shares(&requests[r]);
        memset(out->part_score, 0, out->n * out->sources * sizeof(*out->part_score)); /* what others score */
    }
    PSOUP__TRY(score_by_models(&s, n, error));
    for (size_t r = 0; r < n; r++) {
        psoup__rollouts *out = requests[r].out;
        for (size_t k = 0; k < out->sources; k++)
            if (requests[r].sources[k].function)
                PSOUP__TRY(score_by_callback(model->context, &requests[r], k, error));
        PSOUP__TRY(psoup__team_sum_floats(team, out->part_score, out->n * out->sources, error));
        sum_parts(out);
        for (size_t i = 0; i < out->n; i++)
            if (!isfinite(out->score[i]))
                return psoup__fail(error, PSOUP_ERROR_STATE,
                                   "policy '%s': the score of response %zu is %g: expected a "
                                   "finite number", requests[r].policy->adapter, i,
                                   (double)out->score[i]);
    }
fail:
    return status;
}
