/* What a PPO run will take: see src/train/memory.c. */
#include "train/memory.h"

#include "ppo/ppo.h"

/* What is known of the prompts of all policies, for training or for validation. */
typedef struct asked {
    int64_t prompts;  /* that are answered together */
    int64_t longest;  /* tokens of the longest prompt */
    int64_t readings; /* by reward models, of all responses together */
    int64_t read;     /* tokens of what one reads before the response */
} asked;

static void look(const psoup_ppo_policy *policy, const psoup_ppo_prompt *prompts, size_t n, int64_t answered,
                 asked *a) {
    int64_t inputs = 0, models = 0;
    for (size_t k = 0; k < psoup__rewards_count(policy); k++)
        models += psoup__rewards_model(policy, k) != NULL;
    for (size_t i = 0; i < n; i++) {
        const psoup_ppo_prompt *p = &prompts[i];
        a->longest = (int64_t)p->n > a->longest ? (int64_t)p->n : a->longest;
        if (models == 0)
            continue;
        int64_t own = p->inputs ? (int64_t)p->n_inputs : models;
        inputs = own > inputs ? own : inputs;
        a->read = !p->inputs && (int64_t)p->n > a->read ? (int64_t)p->n : a->read;
        for (size_t k = 0; p->inputs && k < p->n_inputs; k++)
            a->read = (int64_t)p->inputs[k].n > a->read ? (int64_t)p->inputs[k].n : a->read;
    }
    a->prompts += n ? answered : 0;
    a->readings += n ? psoup__product(answered, inputs) : 0;
}

typedef struct ppo_sizes {
    psoup_model *model;
    const psoup_ppo_policy *policies;
    size_t n;
    psoup_ppo_options options;
    int32_t *adapters; /* [n_adapters] the policies' */
    int32_t n_adapters, each;
    int64_t sources; /* rewards of a policy at most */
    asked train, held;
    int64_t most;     /* tokens of a response at most */
    int64_t kept, reserved;
    psoup_memory memory;
} ppo_sizes;

static psoup_status add_policies(ppo_sizes *s, psoup_error *error) {
    const psoup_ppo_options *o = &s->options;
    psoup_model *model = s->model;
    size_t parts = 0;
    for (size_t p = 0; p < s->n; p++) {
        const char *const *names;
        parts += psoup__ppo_adapters(&s->policies[p], &names);
    }
    s->adapters = psoup__alloc(model->context, parts, sizeof *s->adapters, error);
    if (!s->adapters)
        return PSOUP_ERROR_MEMORY;
    for (size_t p = 0; p < s->n; p++) {
        const psoup_ppo_policy *policy = &s->policies[p];
        const char *const *names;
        size_t own = psoup__ppo_adapters(policy, &names);
        int64_t sources = (int64_t)psoup__rewards_count(policy);
        s->each = (int32_t)own > s->each ? (int32_t)own : s->each;
        s->sources = sources > s->sources ? sources : s->sources;
        for (size_t k = 0; k < own; k++) {
            const psoup__adapter *adapter = psoup__model_adapter(model, names[k]);
            bool grows = psoup__has_critic(o) && !adapter->head;
            int64_t head = grows ? (int64_t)model->config.hidden_size + 1 : 0, count = (int64_t)adapter->count + head;
            s->adapters[s->n_adapters++] = psoup_model_find_adapter(model, names[k]);
            s->memory.adapters += 4 * head;
            s->memory.learning = psoup__sum(
                s->memory.learning, psoup__learning_bytes(model, count, o->keep_best && policy->n_validation, &s->kept));
        }
        look(policy, policy->prompts, policy->n_prompts, o->batch_size, &s->train);
        look(policy, policy->validation, policy->n_validation, (int64_t)policy->n_validation, &s->held);
        s->memory.rows += (int64_t)(policy->n_prompts * 4 + own * 512) + 4096;
    }
    int64_t room = model->config.max_position_embeddings - 1;
    s->most = o->max_new_tokens < room ? o->max_new_tokens : room;
    return PSOUP_OK;
}

/* A response with its prompt, as it takes rows: its last token is a target alone. */
static int64_t length(const ppo_sizes *s, const asked *a) {
    int64_t all = a->longest + s->most, longest = s->model->config.max_position_embeddings;
    return (all < longest ? all : longest) - 1;
}

/* The passes that learn, and those that look before: the same tapes, which are as large as either needs. */
static psoup_status add_updates(ppo_sizes *s, psoup_error *error) {
    const psoup_ppo_options *o = &s->options;
    int64_t mini = psoup__product((int64_t)s->n, o->mini_batch_size ? o->mini_batch_size : o->batch_size);
    psoup__use uses[3] = {{.extent = {.adapters = s->adapters,
                                      .n_adapters = s->n_adapters,
                                      .each = s->each,
                                      .saved = true,
                                      .recompute = o->gradient_checkpointing,
                                      .lora_dropout = o->lora_dropout,
                                      .head_dropout = o->head_dropout}}};
    const asked *of[] = {&s->train, &s->train, &s->held};
    const int64_t items[] = {mini, 2 * s->train.prompts, 2 * s->held.prompts};
    int n = s->held.prompts ? 3 : 2;
    for (int k = 0; k < n; k++) {
        psoup__extent *e = &uses[k].extent;
        if (k > 0) {
            *e = uses[0].extent;
            e->saved = false;
            e->lora_dropout = e->head_dropout = 0;
        }
        uses[k].at_once = psoup__passes_at_once(s->model, (int64_t)s->n, items[k], length(s, of[k]),
                                                o->micro_batch_tokens, e->saved, &e->rows);
        e->sequences = items[k] < e->rows ? items[k] : e->rows;
        e->reads = e->rows;
        e->heads = k < 2 && psoup__has_critic(o) ? e->rows : 0;
    }
    return psoup__add_passes(s->model, uses, n, &s->memory, &s->reserved, error);
}

/* Where responses decode together, and what stays of them. */
static psoup_status measure_answers(ppo_sizes *s, const asked *a, psoup__footprint *print, int64_t *cache,
                                    psoup_error *error) {
    psoup_session_options session = PSOUP_SESSION_OPTIONS_INIT;
    size_t sessions = 0;
    int64_t n = a->prompts;
    if (n > INT32_MAX)
        n = INT32_MAX;
    session.max_sequences = psoup__rollout_places(s->model, (size_t)n, s->options.max_sequences, &sessions);
    const int64_t at_once = (int64_t)sessions;
    psoup__decoding_extent d = {.prompts = session.max_sequences,
                                .longest = a->longest,
                                .most = s->most,
                                .adapters = s->adapters,
                                .n_adapters = s->n_adapters,
                                .each = s->each,
                                .options = &session};
    psoup_status status = psoup__measure_decoding(s->model, &d, print, cache, error);
    /* rollout.c's prompts, samplings, mixes and answers */
    int64_t prompt = (int64_t)(sizeof(psoup_prompt) + sizeof(psoup_sampling)) + 4 * s->model->n_adapters + 24 + 4 * s->most;
    print->host = psoup__sum(psoup__product(at_once, print->host), psoup__product(n, prompt));
    print->activations = psoup__product(at_once, print->activations);
    print->logits = psoup__product(at_once, print->logits);
    *cache = psoup__product(at_once, *cache);
    return status;
}

/* The responses of a step, or of a validation; their sessions are gone before the passes. */
static psoup_status add_rollouts(ppo_sizes *s, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__footprint largest = {0};
    const asked *both[] = {&s->train, &s->held};
    for (int k = 0; status == PSOUP_OK && k < 2; k++) {
        psoup__footprint print;
        int64_t cache = 0, n = both[k]->prompts;
        if (n == 0)
            continue;
        status = measure_answers(s, both[k], &print, &cache, error);
        largest.activations = print.activations > largest.activations ? print.activations : largest.activations;
        largest.logits = print.logits > largest.logits ? print.logits : largest.logits;
        largest.host = print.host > largest.host ? print.host : largest.host;
        s->memory.cache = cache > s->memory.cache ? cache : s->memory.cache;
        s->reserved = print.reserved > s->reserved ? print.reserved : s->reserved;
        /* What stays of them: responses, and seven numbers of each token (ppo.h), whose arrays may have doubled. */
        int64_t token = 2 * (4 + 7 * 4), response = 2 * (8 + 4 + 4 + 4 + 1 + 4 * (int64_t)s->each + 8 * s->sources);
        s->memory.rows = psoup__sum(s->memory.rows, psoup__product(n, s->most * token + response + 64));
    }
    psoup__memory_add(&s->memory, &largest);
    return status;
}

/* Whether a reward before the i-th of policy p reads with this model too. */
static bool is_scored(const ppo_sizes *s, size_t p, size_t i, const psoup_model *model) {
    for (size_t q = 0; q <= p; q++)
        for (size_t k = 0; k < psoup__rewards_count(&s->policies[q]) && (q < p || k < i); k++) {
            const psoup_reward *reward = psoup__rewards_model(&s->policies[q], k);
            if (reward && reward->model == model)
                return true;
        }
    return false;
}

/* The reward models' passes: one tape for each base, which lives with the reward models. */
static psoup_status add_scoring(ppo_sizes *s, psoup_error *error) {
    const psoup_ppo_options *o = &s->options;
    psoup_status status = PSOUP_OK;
    int64_t readings = s->train.readings > s->held.readings ? s->train.readings : s->held.readings;
    int64_t read = s->train.read > s->held.read ? s->train.read : s->held.read;
    for (size_t p = 0; p < s->n; p++)
        for (size_t i = 0; status == PSOUP_OK && i < psoup__rewards_count(&s->policies[p]); i++) {
            const psoup_reward *reward = psoup__rewards_model(&s->policies[p], i);
            if (!reward || is_scored(s, p, i, reward->model))
                continue;
            int64_t most = reward->model->config.max_position_embeddings;
            most = o->reward_max_tokens > 0 && o->reward_max_tokens < most ? o->reward_max_tokens : most;
            int64_t tokens = read + s->most < most || o->reward_text ? read + s->most : most;
            tokens = tokens < most ? tokens : most;
            int32_t adapter = psoup_model_find_adapter(reward->model, reward->name);
            psoup__use use = {.extent = {.adapters = &adapter, .n_adapters = 1, .each = 1}};
            use.at_once = psoup__passes_at_once(reward->model, 1, readings, tokens, PSOUP__PASS_TOKENS, false,
                                                &use.extent.rows);
            use.extent.sequences = use.extent.heads = readings < use.extent.rows ? readings : use.extent.rows;
            status = psoup__add_passes(reward->model, &use, 1, &s->memory, &s->reserved, error);
        }
    /* score.c: of each reading its place, its sequence and score; with text also its tokens. */
    int64_t each = 72 + (int64_t)sizeof(psoup__sequence) + 8 + 12 + PSOUP__ITEM_BYTES + (o->reward_text ? 8 * (read + s->most) : 0);
    s->memory.rows = psoup__sum(s->memory.rows, psoup__product(readings, each));
    return status;
}

/* What the losses have on the device (update.c): old numbers of all tokens, responses and their terms. GAE's before
 * them take no more. */
static int64_t losses(const ppo_sizes *s) {
    int64_t arrays = psoup__has_critic(&s->options) ? 4 : 3;
    int64_t known = psoup__product(s->train.prompts, psoup__product(s->most, 4 * arrays));
    return psoup__sum(known, psoup__product(s->train.prompts, (int64_t)(sizeof(psoup__response) + sizeof(psoup__loss_terms))));
}

psoup_status psoup_ppo_memory(psoup_model *model, const psoup_ppo_policy *policies, size_t n,
                              const psoup_ppo_options *options, psoup_memory *out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    ppo_sizes s = {.model = model, .policies = policies, .n = n, .options = PSOUP_PPO_OPTIONS_INIT,
                   .memory = {.size = sizeof s.memory}};
    if (!model || !out || n == 0 || n > INT32_MAX || !policies)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_ppo_memory: model or out is NULL, or there is no policy");
    PSOUP__TRY(psoup__options(&s.options, sizeof s.options, options, "psoup_ppo_options", error));
    PSOUP__TRY(psoup__ppo_check(&s.options, error));
    PSOUP__TRY(psoup__ppo_check_policies(model, policies, n, error));
    psoup__memory_begin(model, true, &s.memory);
    PSOUP__TRY(add_policies(&s, error));
    PSOUP__TRY(add_updates(&s, error));
    PSOUP__TRY(add_rollouts(&s, error));
    PSOUP__TRY(add_scoring(&s, error));
    int64_t items = 2 * (s.train.prompts > s.held.prompts ? s.train.prompts : s.held.prompts);
    s.memory.rows = psoup__sum(s.memory.rows, psoup__product(items, 192 + PSOUP__ITEM_BYTES)); /* update.c's */
    s.memory.activations = psoup__sum(s.memory.activations, losses(&s));
    s.memory.rows += psoup__checkpoint_bytes(s.options.checkpoint_dir);
    if (s.options.checkpoint_dir) /* responses of a step in progress */
        s.memory.rows = psoup__sum(s.memory.rows, psoup__product(s.train.prompts, 2 * 4 * (2 + s.most)));
    s.memory.activations = psoup__sum(s.memory.activations, s.reserved);
    int64_t a = length(&s, &s.train), b = length(&s, &s.held);
    s.memory.base += psoup__measure_positions(model, (a > b ? a : b) + 1);
    psoup__memory_end(model, s.kept, &s.memory);
    psoup__memory_copy(out, &s.memory);
fail:
    psoup__free(model->context, s.adapters);
    return status;
}
