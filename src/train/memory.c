/* What a training run will take: the sums of what its parts are known to allocate, every response as long as it may be.
 * tests/test_train_plan.c holds them against what is allocated. */
#include "train/memory.h"

#include "train/dpo.h"
#include "train/reward.h"

/* Bytes beside activations of a pass (pack.c), whose arrays may have doubled: its rows, log-probs, values and heads. */
static int64_t pack_bytes(const psoup_model *model, const psoup__extent *e) {
    int64_t row = 4, read = 16, head = 2 * 4 + 3 * 4 + 3 * 8;
    int64_t sequence = 4 + 16 + 4 * (int64_t)model->n_adapters;
    int64_t sum = psoup__product(e->rows, row);
    sum = psoup__sum(sum, psoup__product(e->reads, read));
    sum = psoup__sum(sum, psoup__product(e->heads, head * (e->each > 1 ? e->each : 1)));
    return 2 * psoup__sum(sum, psoup__product(e->sequences, sequence + (int64_t)sizeof(psoup__head_rows)));
}

psoup_status psoup__add_passes(psoup_model *model, const psoup__use *uses, int n, psoup_memory *memory,
                               int64_t *reserved, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__footprint print[PSOUP__USES];
    int64_t runners = 1, host[PSOUP__USES], saved[PSOUP__USES] = {0};
    for (int i = 0; i < n; i++) {
        PSOUP__TRY(psoup__measure_batch(model, &uses[i].extent, &print[i], error));
        if (uses[i].extent.saved) { /* what is kept comes to what passes need that keep nothing, which may be longer */
            psoup__extent passing = uses[i].extent;
            psoup__footprint less;
            passing.saved = false;
            PSOUP__TRY(psoup__measure_batch(model, &passing, &less, error));
            saved[i] = print[i].activations - less.activations;
            print[i].activations = less.activations;
        }
        int64_t read = psoup__product(2 * 4, psoup__sum(uses[i].extent.reads, uses[i].extent.heads));
        print[i].activations = psoup__sum(print[i].activations, read + read / 8); /* pack.c's on the device */
        host[i] = psoup__sum(print[i].host, pack_bytes(model, &uses[i].extent));
        runners = uses[i].at_once > runners ? uses[i].at_once : runners;
        *reserved = print[i].reserved > *reserved ? print[i].reserved : *reserved;
    }
    for (int64_t r = 0; r < runners; r++) {
        psoup__footprint most = {0};
        int64_t kept = 0;
        for (int i = 0; i < n; i++) {
            if (uses[i].at_once <= r)
                continue;
            most.activations = print[i].activations > most.activations ? print[i].activations : most.activations;
            most.logits = print[i].logits > most.logits ? print[i].logits : most.logits;
            most.host = host[i] > most.host ? host[i] : most.host;
            kept = saved[i] > kept ? saved[i] : kept;
        }
        most.activations = psoup__sum(most.activations, kept);
        psoup__memory_add(memory, &most);
    }
    memory->rows = psoup__sum(memory->rows, (int64_t)sizeof(psoup__runner) * model->context->threads);
fail:
    return status;
}

int64_t psoup__learning_bytes(const psoup_model *model, int64_t count, bool best, int64_t *kept) {
    *kept += best ? 4 * count : 0;
    /* gradients and two moments */
    return ((model ? psoup__gradients(model) : 1) + 2) * 4 * count + (best ? 4 * count : 0);
}

int64_t psoup__checkpoint_bytes(const char *directory) { return directory ? 4 * (int64_t)PSOUP__PIECE + 65536 : 0; }

/* ---- supervised ---------------------------------------------------------------------------------- */

static int64_t longest_example(const psoup_example *examples, size_t n, int64_t limit) {
    size_t longest = 1;
    for (size_t i = 0; i < n; i++)
        longest = examples[i].n > longest ? examples[i].n : longest;
    return (int64_t)longest < limit ? (int64_t)longest : limit;
}

/* The passes of n examples of so many tokens together, none longer than `longest`, or all of that length. */
static void measure_examples(psoup__use *use, const psoup_model *model, bool lanes, size_t n, int64_t tokens,
                             int64_t longest, bool equal, int64_t bound) {
    int64_t unit = equal ? longest : 1, rows = 0;
    use->at_once = 1;
    if (lanes)
        use->at_once = psoup__passes_at_once(model, 1, (tokens + unit - 1) / unit, unit, bound, use->extent.saved, &rows);
    else
        rows = tokens < bound ? tokens : bound;
    rows = rows > longest ? rows : longest;
    use->extent.rows = use->extent.reads = rows;
    use->extent.sequences = rows < (int64_t)n ? rows : (int64_t)n;
}

psoup_status psoup_sft_memory(psoup_model *model, const char *adapter, const psoup_example *train, size_t n_train,
                              const psoup_example *validation, size_t n_validation, const psoup_sft_options *options,
                              psoup_memory *out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
    psoup_memory memory = {.size = sizeof memory};
    int64_t reserved = 0, kept = 0, tokens = 0;
    if (!model || !out)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_sft_memory: an argument is NULL");
    PSOUP__TRY(psoup__options(&o, sizeof o, options, "psoup_sft_options", error));
    PSOUP__TRY(psoup__sft_check(&o, error));
    PSOUP__TRY(psoup__sft_check_examples(train, n_train, "train", error));
    PSOUP__TRY(psoup__sft_check_examples(validation, n_validation, "validation", error));
    if (!adapter)
        PSOUP__TRY(psoup__model_may_train(model, error));
    const psoup__adapter *trained = adapter ? psoup__model_adapter(model, adapter) : NULL;
    int32_t index = adapter ? psoup_model_find_adapter(model, adapter) : -1;
    if (adapter && !trained)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_sft_memory: the model has no adapter '%s'", adapter);
    psoup__memory_begin(model, trained != NULL, &memory);
    bool best = o.keep_best && n_validation > 0;
    int64_t count = trained ? (int64_t)trained->count : (int64_t)psoup__model_count(model);
    memory.learning = psoup__learning_bytes(trained ? model : NULL, count, best, &kept);
    if (!trained) { /* in f32 for the while; what it was frozen as is there before and after */
        memory.learning = psoup__sum(memory.learning, 4 * count);
        memory.base = memory.base > memory.held - memory.adapters ? memory.base : memory.held - memory.adapters;
    }
    int64_t limit = o.batch_tokens < model->config.max_position_embeddings ? o.batch_tokens
                                                                           : model->config.max_position_embeddings;
    for (size_t i = 0; i < n_train; i++)
        tokens += (int64_t)train[i].n < limit ? (int64_t)train[i].n : limit;
    int64_t longest = longest_example(train, n_train, limit), held = longest_example(validation, n_validation, limit);
    int64_t step = psoup__product(o.batch_tokens, o.accumulation);
    step = tokens < step ? tokens : step;
    psoup__use uses[2] = {{.extent = {.adapters = &index,
                                      .n_adapters = trained ? 1 : 0,
                                      .each = 1,
                                      .saved = true,
                                      .recompute = o.gradient_checkpointing,
                                      .lora_dropout = trained ? o.lora_dropout : 0.0f}}};
    uses[1] = uses[0];
    uses[1].extent.saved = false;
    measure_examples(&uses[0], model, trained != NULL, n_train, step, longest, tokens == (int64_t)n_train * longest,
                     o.batch_tokens);
    measure_examples(&uses[1], model, trained != NULL, n_validation, psoup__product((int64_t)n_validation, held), held, true,
                     o.batch_tokens);
    PSOUP__TRY(psoup__add_passes(model, uses, n_validation ? 2 : 1, &memory, &reserved, error));
    int64_t items = step / 2 < (int64_t)n_train ? step / 2 : (int64_t)n_train;
    items = items > (int64_t)n_validation ? items : (int64_t)n_validation;
    memory.rows += (int64_t)n_train * 8 + psoup__checkpoint_bytes(o.checkpoint_dir) + 4096;
    memory.rows += items * (PSOUP__ITEM_BYTES + 2 * (8 + 8 + 12 + 8));
    memory.activations = psoup__sum(memory.activations, reserved);
    memory.base += psoup__measure_positions(model, longest > held ? longest : held);
    psoup__memory_end(model, kept, &memory);
    psoup__memory_copy(out, &memory);
fail:
    return status;
}

/* ---- reward models ------------------------------------------------------------------------------- */

static int64_t longest_pair(const psoup_comparison *pairs, size_t n, int64_t limit) {
    int64_t longest = 2;
    for (size_t i = 0; i < n; i++) {
        int64_t chosen = (int64_t)pairs[i].n_chosen, rejected = (int64_t)pairs[i].n_rejected;
        int64_t both = (chosen < limit ? chosen : limit) + (rejected < limit ? rejected : limit);
        longest = both > longest ? both : longest;
    }
    return longest;
}

psoup_status psoup_reward_memory(psoup_reward *const *rewards, size_t n_rewards, const psoup_comparison *train,
                                 size_t n_train, const psoup_comparison *validation, size_t n_validation,
                                 const psoup_reward_options *options, psoup_memory *out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_reward_options o = PSOUP_REWARD_OPTIONS_INIT;
    psoup_memory memory = {.size = sizeof memory};
    int64_t reserved = 0, kept = 0;
    int32_t *adapters = NULL;
    if (!out)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_reward_memory: out is NULL");
    status = psoup__reward_check_models(rewards, n_rewards, error);
    if (status != PSOUP_OK)
        return status;
    psoup_model *model = rewards[0]->model;
    adapters = psoup__alloc(model->context, n_rewards, sizeof *adapters, error);
    if (!adapters)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(psoup__options(&o, sizeof o, options, "psoup_reward_options", error));
    PSOUP__TRY(psoup__reward_check(&o, error));
    PSOUP__TRY(psoup__reward_check_comparisons(train, n_train, n_rewards, o.margins, "train", error));
    PSOUP__TRY(psoup__reward_check_comparisons(validation, n_validation, n_rewards, o.margins, "validation", error));
    psoup__memory_begin(model, true, &memory);
    for (size_t j = 0; j < n_rewards; j++) {
        psoup__adapter *adapter = NULL;
        PSOUP__TRY(psoup__reward_adapter(rewards[j], &adapter, &adapters[j], error));
        memory.learning = psoup__sum(memory.learning,
                                     psoup__learning_bytes(model, (int64_t)adapter->count, o.keep_best && n_validation,
                                                           &kept));
    }
    int64_t limit = model->config.max_position_embeddings;
    if (o.max_tokens > 0 && o.max_tokens < limit)
        limit = o.max_tokens;
    int64_t pair = longest_pair(train, n_train, limit), held = longest_pair(validation, n_validation, limit);
    int64_t items = psoup__product((int64_t)n_rewards, o.batch_size);
    items = items < (int64_t)n_train ? items : (int64_t)n_train;
    psoup__use uses[2] = {{.extent = {.adapters = adapters,
                                      .n_adapters = (int32_t)n_rewards,
                                      .each = 1,
                                      .saved = true,
                                      .recompute = o.gradient_checkpointing,
                                      .lora_dropout = o.lora_dropout}}};
    uses[1] = uses[0]; /* not saved, but it may be longer */
    uses[1].extent.saved = false;
    const int64_t listed[] = {items, (int64_t)n_validation}, lengths[] = {pair, held};
    for (int k = 0; k < 2; k++) {
        psoup__extent *e = &uses[k].extent;
        uses[k].at_once = psoup__passes_at_once(model, (int64_t)n_rewards, listed[k], lengths[k], PSOUP__PASS_TOKENS,
                                                e->saved, &e->rows);
        e->sequences = e->heads = 2 * listed[k] < e->rows ? 2 * listed[k] : e->rows;
    }
    PSOUP__TRY(psoup__add_passes(model, uses, n_validation ? 2 : 1, &memory, &reserved, error));
    int64_t places = psoup__product((int64_t)n_rewards, 4 * (2 * (int64_t)n_train + (int64_t)n_validation));
    memory.rows = psoup__sum(memory.rows, places + (2 * 40 + PSOUP__ITEM_BYTES) * (items + (int64_t)n_validation) + 4096);
    memory.rows += psoup__checkpoint_bytes(o.checkpoint_dir);
    memory.activations = psoup__sum(memory.activations, reserved);
    memory.base += psoup__measure_positions(model, pair > held ? pair : held);
    psoup__memory_end(model, kept, &memory);
    psoup__memory_copy(out, &memory);
fail:
    psoup__free(model->context, adapters);
    return status;
}

/* ---- DPO -------------------------------------------------------------------------------------------- */

static int64_t longest_rows(const psoup__dpo_trainer *t, const psoup__dpo_set *set) {
    int64_t longest = 2;
    for (size_t i = 0; i < set->n; i++) {
        int64_t rows = psoup__dpo_rows(t, &set->pairs[i]);
        longest = rows > longest ? rows : longest;
    }
    return longest;
}

/* What the reference is asked, what is learnt, and what is validated. */
psoup_status psoup_dpo_memory(psoup_model *model, const char *const *policies, size_t n_policies,
                              const psoup_dpo_pair *train, size_t n_train, const psoup_dpo_pair *validation,
                              size_t n_validation, const psoup_dpo_options *options, psoup_memory *out,
                              psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__dpo_trainer t = {.model = model,
                            .options = PSOUP_DPO_OPTIONS_INIT,
                            .train = {.pairs = train, .n = n_train},
                            .validation = {.pairs = validation, .n = n_validation}};
    const psoup_dpo_options *o = &t.options;
    psoup_memory memory = {.size = sizeof memory};
    int64_t reserved = 0, kept = 0, n = (int64_t)n_train, held = (int64_t)n_validation;
    int32_t *adapters = NULL;
    if (!model || !out)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_dpo_memory: an argument is NULL");
    PSOUP__TRY(psoup__options(&t.options, sizeof t.options, options, "psoup_dpo_options", error));
    PSOUP__TRY(psoup__dpo_check_run(&t, policies, n_policies, error));
    adapters = psoup__alloc(model->context, n_policies, sizeof *adapters, error);
    if (!adapters)
        return PSOUP_ERROR_MEMORY;
    psoup__memory_begin(model, true, &memory);
    for (size_t j = 0; j < n_policies; j++) {
        adapters[j] = psoup_model_find_adapter(model, policies[j]);
        int64_t count = (int64_t)model->adapters[adapters[j]]->count;
        memory.learning = psoup__sum(memory.learning, psoup__learning_bytes(model, count, o->keep_best && held, &kept));
    }
    int64_t pair = longest_rows(&t, &t.train), held_pair = longest_rows(&t, &t.validation);
    int64_t items = psoup__product((int64_t)n_policies, o->batch_size);
    psoup__use uses[4] = {{.extent = {.adapters = adapters,
                                      .n_adapters = (int32_t)n_policies,
                                      .each = 1,
                                      .saved = true,
                                      .recompute = o->gradient_checkpointing,
                                      .lora_dropout = o->lora_dropout}}};
    const int64_t listed[] = {items < n ? items : n, n, held, held};
    const int64_t lengths[] = {pair, pair, held_pair, held_pair};
    for (int k = 0; k < 4; k++) {
        bool reference = k == 1 || k == 2;
        psoup__extent *e = &uses[k].extent;
        if (k)
            *e = (psoup__extent){.adapters = adapters, .n_adapters = reference ? 0 : (int32_t)n_policies, .each = 1};
        uses[k].at_once = psoup__passes_at_once(model, reference ? 1 : (int64_t)n_policies, listed[k], lengths[k],
                                                PSOUP__PASS_TOKENS, e->saved, &e->rows);
        e->reads = e->rows;
        e->sequences = 2 * listed[k] < e->rows ? 2 * listed[k] : e->rows;
    }
    PSOUP__TRY(psoup__add_passes(model, uses, held ? 4 : 2, &memory, &reserved, error));
    int64_t places = psoup__product((int64_t)n_policies, 4 * (n + held) + (int64_t)sizeof(psoup__dpo_learner));
    memory.rows = psoup__sum(memory.rows, places + 4 * n + 16 * (n + held) + 4096);
    memory.rows += (40 + PSOUP__ITEM_BYTES) * (n > held ? n : held) + psoup__checkpoint_bytes(o->checkpoint_dir);
    memory.activations = psoup__sum(memory.activations, reserved);
    memory.base += psoup__measure_positions(model, pair > held_pair ? pair : held_pair);
    psoup__memory_end(model, kept, &memory);
    psoup__memory_copy(out, &memory);
fail:
    psoup__free(model->context, adapters);
    return status;
}
