/* Memory, counted by the context's allocator. Gradient checkpointing: every trainer ends with the bits it has without,
 * in less of it. */
#include "ppo_case.h"
#include "resume_case.h"

#include <stdatomic.h>

enum { LAYERS = 8, TEXTS = 8, LENGTH = 40 };

/* ---- counted memory ----------------------------------------------------------------------------- */

typedef struct counted {
    size_t size;
    void *memory;
} counted;

static atomic_size_t live, most;

static void *count_alloc(void *user, size_t bytes, size_t alignment) {
    size_t room = alignment > sizeof(counted) ? alignment : sizeof(counted);
    char *memory = aligned_alloc(room, (bytes + 2 * room - 1) / room * room);
    if (!memory)
        return NULL;
    counted *head = (counted *)(void *)(memory + room) - 1;
    *head = (counted){bytes, memory};
    size_t now = atomic_fetch_add(&live, bytes) + bytes;
    if (now > atomic_load(&most))
        atomic_store(&most, now);
    return memory + room;
}

static void count_free(void *user, void *memory) {
    counted head = ((counted *)memory)[-1];
    atomic_fetch_sub(&live, head.size);
    free(head.memory);
}

static void open_counted(const char *device) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.device = device;
    options.threads = 2;
    options.allocator = (psoup_allocator){NULL, count_alloc, count_free};
    OK(psoup_context_create(&options, &context, &error));
}

static psoup_model *deep_model(void) {
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_model *model = NULL;
    config.vocab_size = VOCABULARY;
    config.hidden_size = 16;
    config.intermediate_size = 24;
    config.num_hidden_layers = LAYERS;
    config.num_attention_heads = 2;
    config.num_key_value_heads = 1;
    config.max_position_embeddings = 48;
    config.eos_token_id = END;
    config.initializer_range = 0.2f;
    OK(psoup_model_create(context, &config, 7, &model, &error));
    add_adapter(model, "P0", 1);
    add_adapter(model, "P1", 2);
    return model;
}

/* ---- the trainers -------------------------------------------------------------------------------- */

static int32_t texts[TEXTS][LENGTH];

static void make_texts(void) {
    for (int i = 0; i < TEXTS; i++)
        for (int t = 0; t < LENGTH; t++)
            texts[i][t] = 2 + (i * 7 + t * (i + 1)) % 13;
}

static psoup_status train_sft(psoup_model *model, int recompute, const char *adapter, const run *r) {
    psoup_example examples[TEXTS];
    psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
    for (int i = 0; i < TEXTS; i++)
        examples[i] = (psoup_example){.tokens = texts[i], .n = LENGTH, .n_prompt = 2};
    o.learning_rate = 1e-3f;
    o.lora_dropout = 0.2f;
    o.gradient_checkpointing = recompute;
    if (r) {
        o.checkpoint_dir = r->checkpoints;
        o.resume = 1;
        o.on_step = watch_run;
        o.user = (void *)r;
        o.batch_tokens = 2 * LENGTH;
    }
    return psoup_sft(model, adapter, examples, TEXTS, NULL, 0, &o, &error);
}

static void train_reward(psoup_model *model, int recompute) {
    psoup_comparison pairs[TEXTS / 2];
    psoup_adapter_options adapter = PSOUP_ADAPTER_OPTIONS_INIT;
    psoup_reward *reward = NULL;
    psoup_reward_options o = PSOUP_REWARD_OPTIONS_INIT;
    adapter.rank = 4;
    adapter.targets = PSOUP_ALL_LINEAR;
    OK(psoup_reward_create(model, "R", &adapter, &reward, &error));
    for (int i = 0; i < TEXTS / 2; i++)
        pairs[i] = (psoup_comparison){.chosen = texts[2 * i], .n_chosen = LENGTH, .rejected = texts[2 * i + 1],
                                      .n_rejected = LENGTH - 3};
    o.learning_rate = 1e-3f;
    o.epochs = 3; /* a head of 0 leaves the first step nothing to go back through */
    o.lora_dropout = 0.2f;
    o.gradient_checkpointing = recompute;
    OK(psoup_reward_train(&reward, 1, pairs, TEXTS / 2, NULL, 0, &o, &error));
    psoup_reward_free(reward);
}

static void train_dpo(psoup_model *model, int recompute) {
    psoup_dpo_pair pairs[TEXTS / 2];
    const char *const policies[] = {"P0", "P1"};
    psoup_dpo_options o = PSOUP_DPO_OPTIONS_INIT;
    for (int i = 0; i < TEXTS / 2; i++)
        pairs[i] = (psoup_dpo_pair){.prompt = texts[2 * i], .n_prompt = 4, .chosen = texts[2 * i] + 4,
                                    .n_chosen = LENGTH - 4, .rejected = texts[2 * i + 1], .n_rejected = LENGTH - 9,
                                    .policy = i % 2};
    o.learning_rate = 1e-3f;
    o.lora_dropout = 0.2f;
    o.epochs = 2;
    o.gradient_checkpointing = recompute;
    OK(psoup_dpo(model, policies, 2, pairs, TEXTS / 2, NULL, 0, &o, &error));
}

static void train_ppo(psoup_model *model, int recompute) {
    psoup_ppo_policy policies[2] = {policy(0), policy(1)};
    psoup_ppo_options o = plain();
    o.steps = 2;
    o.batch_size = 8;
    o.max_new_tokens = 40;
    o.ignore_stop = 1;
    o.lora_dropout = 0.1f;
    o.head_dropout = 0.1f;
    o.gradient_checkpointing = recompute;
    psoup_ppo *ppo = create(model, policies, 2, &o);
    OK(psoup_ppo_run(ppo, &error));
    psoup_ppo_free(ppo);
}

static const char *const trainers[] = {"sft", "reward", "dpo", "ppo"};

static float *train(int trainer, int recompute, size_t *count, size_t *peak) {
    psoup_model *model = deep_model();
    make_texts();
    make_prompts();
    atomic_store(&most, atomic_load(&live));
    size_t before = atomic_load(&live);
    if (trainer == 0)
        OK(train_sft(model, recompute, "P0", NULL));
    if (trainer == 1)
        train_reward(model, recompute);
    if (trainer == 2)
        train_dpo(model, recompute);
    if (trainer == 3)
        train_ppo(model, recompute);
    *peak = atomic_load(&most) - before;
    float *after = weights(model, trainer == 1 ? "R" : "P0", count);
    psoup_model_free(model);
    return after;
}

START_TEST(the_same_bits_in_less_memory) {
    size_t n = 0, peak[2];
    float *after[2];
    open_counted("cpu");
    for (int recompute = 0; recompute < 2; recompute++)
        after[recompute] = train(_i, recompute, &n, &peak[recompute]);
    ck_assert_msg(memcmp(after[0], after[1], n * sizeof(float)) == 0, "%s: other weights", trainers[_i]);
    ck_assert_msg(peak[1] < 0.7 * (double)peak[0], "%s: %zu bytes, and %zu without", trainers[_i], peak[1], peak[0]);
    free(after[0]), free(after[1]);
    psoup_context_free(context);
    ck_assert_uint_eq(atomic_load(&live), 0);
}
END_TEST

/* On a GPU too: one step of four examples. */
START_TEST(a_gpu_has_the_same_bits) {
    psoup_example examples[4];
    size_t n = 0;
    float *after[2], *before = NULL;
    open_counted("cuda:0");
    make_texts();
    for (int i = 0; i < 4; i++)
        examples[i] = (psoup_example){.tokens = texts[i], .n = 12, .n_prompt = 2};
    for (int recompute = 0; recompute < 2; recompute++) {
        psoup_model *model = deep_model();
        psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
        o.learning_rate = 1e-3f;
        o.lora_dropout = 0.2f;
        o.gradient_checkpointing = recompute;
        free(before);
        before = weights(model, "P0", &n);
        OK(psoup_sft(model, "P0", examples, 4, NULL, 0, &o, &error));
        after[recompute] = weights(model, "P0", &n);
        psoup_model_free(model);
    }
    ck_assert(memcmp(after[0], after[1], n * sizeof(float)) == 0 && memcmp(after[0], before, n * sizeof(float)) != 0);
    free(after[0]), free(after[1]), free(before);
    psoup_context_free(context);
}
END_TEST

/* A base that trains, whose gradients are of every weight. */
START_TEST(a_base_trains_to_the_same_bits) {
    float *after[2];
    size_t n = 0;
    open_counted("cpu");
    make_texts();
    for (int recompute = 0; recompute < 2; recompute++) {
        psoup_model *model = deep_model();
        OK(train_sft(model, recompute, NULL, NULL));
        n = psoup__model_count(model);
        after[recompute] = calloc(n, sizeof(float));
        float *scratch = calloc(n, sizeof(float));
        size_t at = 0;
        for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p); at += p.count)
            OK(psoup__parameter_read(model, &p, 0, p.count, after[recompute] + at, scratch, &error));
        free(scratch);
        psoup_model_free(model);
    }
    ck_assert(memcmp(after[0], after[1], n * sizeof(float)) == 0);
    free(after[0]), free(after[1]);
    psoup_context_free(context);
}
END_TEST

/* The tape has the size that docs/training.md gives, to the slack of an eighth and of alignment: that of one layer
 * and every layer's input, in place of all. */
START_TEST(a_tape_has_the_size_that_is_said) {
    open_counted("cpu");
    psoup_model *model = deep_model();
    const double rows = TEXTS * LENGTH, dim = 16, q = 16, kv = 8, ffn = 24, heads = 2;
    double layer = 4 * rows * (3 * dim + 2 * q + 2 * kv + 2 * ffn + heads + 2), input = 4 * rows * dim;
    double u = 4 * rows * 4 * PSOUP__LINEARS; /* an adapter's x A of each linear, of rank 4 */
    float mix[TEXTS][2];
    int32_t start[TEXTS + 1];
    make_texts();
    for (int i = 0; i < TEXTS; i++)
        mix[i][0] = 1, mix[i][1] = 0;
    for (int i = 0; i <= TEXTS; i++)
        start[i] = i * LENGTH;
    psoup__batch batch = {.n = TEXTS, .rows = TEXTS * LENGTH, .tokens = texts[0], .start = start, .mix = mix[0]};
    size_t bytes[2];
    for (int recompute = 0; recompute < 2; recompute++) {
        psoup__tape *tape = NULL;
        OK(psoup__tape_create(model, &tape, &error));
        psoup__tape_recompute(tape, recompute);
        size_t before = atomic_load(&live);
        OK(psoup__forward(model, tape, &batch, true, &error));
        bytes[recompute] = atomic_load(&live) - before;
        psoup__tape_free(tape);
    }
    double all = LAYERS * (layer + u + input), some = LAYERS * input + layer + u;
    double rest = 4 * rows * (2 * dim + ffn) + 40 * rows; /* the last norm, what is shared, and the batch itself */
    ck_assert_msg((double)bytes[0] > all && (double)bytes[0] < 1.2 * (all + rest), "%zu bytes for %g", bytes[0], all);
    ck_assert_msg((double)bytes[1] > some && (double)bytes[1] < 1.2 * (some + rest), "%zu bytes for %g", bytes[1],
                  some);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* Nobody ever has the logits of a long text: log-probs, and what training goes back from, are taken a chunk at a time. */
START_TEST(log_probs_take_no_full_logits) {
    enum { WORDS = 4096, TOKENS = 2000 };
    const size_t full = (size_t)WORDS * TOKENS * sizeof(float); /* 33 MB */
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_model *model = NULL;
    open_counted("cpu");
    config.vocab_size = WORDS;
    config.hidden_size = 16;
    config.intermediate_size = 24;
    config.num_hidden_layers = config.num_attention_heads = 1;
    config.max_position_embeddings = TOKENS;
    OK(psoup_model_create(context, &config, 7, &model, &error));
    add_adapter(model, "P0", 1);
    int32_t *tokens = malloc(TOKENS * sizeof *tokens);
    float *out = malloc(TOKENS * sizeof *out);
    for (int t = 0; t < TOKENS; t++)
        tokens[t] = (t * 37 + 11) % WORDS;
    atomic_store(&most, atomic_load(&live));
    size_t before = atomic_load(&live);
    OK(psoup_model_logprobs(model, &(psoup_row){.tokens = tokens, .n = TOKENS}, 1, out, &error));
    ck_assert_msg(atomic_load(&most) - before < full / 3, "scores took %zu bytes", atomic_load(&most) - before);
    psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
    o.batch_tokens = TOKENS;
    o.learning_rate = 1e-3f;
    before = atomic_load(&live);
    atomic_store(&most, before);
    OK(psoup_sft(model, "P0", &(psoup_example){.tokens = tokens, .n = TOKENS, .n_prompt = 1}, 1, NULL, 0, &o, &error));
    ck_assert_msg(atomic_load(&most) - before < full / 3, "training took %zu bytes", atomic_load(&most) - before);
    free(tokens), free(out);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* It is no part of what a run is: one that was stopped may go on with it, or without. */
START_TEST(a_run_may_go_on_with_it) {
    size_t n = 0;
    run whole, stopped;
    open_counted("cpu");
    make_texts();
    run_begin(&whole);
    run_begin(&stopped);
    psoup_model *model = deep_model();
    OK(train_sft(model, 0, "P0", &whole));
    float *expected = weights(model, "P0", &n);
    psoup_model_free(model);
    stopped.stop_after = 2;
    model = deep_model();
    ck_assert_int_eq(train_sft(model, 0, "P0", &stopped), PSOUP_ERROR_CANCELLED);
    psoup_model_free(model);
    model = deep_model();
    OK(train_sft(model, 1, "P0", &stopped));
    ck_assert(same_weights(model, "P0", expected, n));
    psoup_model_free(model);
    model = deep_model();
    REFUSED(train_sft(model, 2, "P0", NULL), PSOUP_ERROR_ARGUMENT, "gradient_checkpointing is 2: expected 0 to 1");
    free(expected);
    psoup_model_free(model);
    run_end(&whole);
    run_end(&stopped);
    psoup_context_free(context);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train: memory");
    TCase *tests = tcase_create("gradient checkpointing");
    tcase_set_timeout(tests, 300);
    tcase_add_loop_test(tests, the_same_bits_in_less_memory, 0, 4);
    tcase_add_test(tests, a_gpu_has_the_same_bits);
    tcase_add_test(tests, a_base_trains_to_the_same_bits);
    tcase_add_test(tests, a_tape_has_the_size_that_is_said);
    tcase_add_test(tests, log_probs_take_no_full_logits);
    tcase_add_test(tests, a_run_may_go_on_with_it);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
