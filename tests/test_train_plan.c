/* What a call is said to take against what it takes: an allocator that counts gives the peak, which the plan must hold
 * and may exceed by a quarter at most. */
#include <stdatomic.h>

#include "train_case.h"

/* ---- an allocator that counts ------------------------------------------------------------------- */

static atomic_llong now, peak;

static void *counted_alloc(void *user, size_t bytes, size_t alignment) {
    void *memory = NULL;
    (void)user;
    if (posix_memalign(&memory, 64, bytes + 64) != 0)
        return NULL;
    *(size_t *)memory = bytes;
    long long held = atomic_fetch_add(&now, (long long)bytes) + (long long)bytes, most = atomic_load(&peak);
    while (held > most && !atomic_compare_exchange_weak(&peak, &most, held))
        ;
    return (char *)memory + 64;
}

static void counted_free(void *user, void *memory) {
    (void)user;
    if (!memory)
        return;
    memory = (char *)memory - 64;
    atomic_fetch_sub(&now, (long long)*(size_t *)memory);
    free(memory);
}

static void counting(void) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.threads = 2;
    options.allocator = (psoup_allocator){.alloc = counted_alloc, .free = counted_free};
    OK(psoup_context_create(&options, &context, &error));
}

static long long before;

static void begin(void) {
    before = atomic_load(&now);
    atomic_store(&peak, before);
}

static void within(const char *what, const psoup_memory *m) {
    long long took = atomic_load(&peak) - before, said = m->host - m->held;
    ck_assert_msg(m->device == 0 && m->device_free == -1, "%s: there is a device", what);
    ck_assert_msg(took <= said, "%s took %lld bytes, more than the %lld that were said", what, took, said);
    ck_assert_msg((double)said <= 1.25 * (double)took, "%s took %lld bytes, far less than the %lld that were said",
                  what, took, said);
    ck_assert_int_eq(m->host, m->base + m->adapters + m->learning + m->activations + m->logits + m->cache + m->rows);
}

/* ---- a world whose responses all are as long as they may be ---------------------------------------- */

enum { WORDS = 96, LENGTH = 24, ROWS = 64, NEW = 20 };

static int32_t tokens[ROWS][LENGTH];

static psoup_model *small_model(int n_adapters) {
    psoup_model_config c = PSOUP_MODEL_CONFIG_INIT;
    psoup_model *model = NULL;
    char name[16];
    c.vocab_size = WORDS;
    c.hidden_size = 64;
    c.intermediate_size = 160;
    c.num_hidden_layers = 4;
    c.num_attention_heads = 4;
    c.num_key_value_heads = 2;
    c.max_position_embeddings = 128;
    c.initializer_range = 0.1f;
    OK(psoup_model_create(context, &c, 7, &model, &error));
    for (int i = 0; i < n_adapters; i++) {
        snprintf(name, sizeof name, "P%d", i);
        add_adapter(model, name, 20 + (uint64_t)i);
    }
    for (int i = 0; i < ROWS; i++)
        for (int t = 0; t < LENGTH; t++)
            tokens[i][t] = (i * 7 + t * 5) % WORDS;
    return model;
}

static psoup_memory nothing(void) { return (psoup_memory){.size = sizeof(psoup_memory)}; }

/* The same read from files: mapped, or with its linears in blocks. */
static psoup_model *from_files(psoup_model *model, int32_t dtype, int n_adapters) {
    psoup_load_options options = PSOUP_LOAD_OPTIONS_INIT;
    char directory[256], command[300], name[8];
    temporary(directory, sizeof directory);
    ck_assert_ptr_nonnull(mkdtemp(directory));
    OK(psoup_model_save(model, directory, NULL, &error));
    psoup_model_free(model);
    options.dtype = dtype;
    OK(psoup_model_load_with(context, directory, &options, &model, &error));
    for (int i = 0; i < n_adapters; i++) {
        snprintf(name, sizeof name, "P%d", i);
        add_adapter(model, name, 20 + (uint64_t)i);
    }
    snprintf(command, sizeof command, "rm -r '%s'", directory);
    ck_assert_int_eq(system(command), 0);
    return model;
}

/* ---- the calls -------------------------------------------------------------------------------------- */

static void fine_tune(const char *adapter, float dropout, int32_t recompute) {
    psoup_model *model = small_model(2);
    psoup_example examples[ROWS];
    psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
    psoup_memory said = nothing();
    for (int i = 0; i < ROWS; i++)
        examples[i] = (psoup_example){tokens[i], LENGTH, 4};
    o.batch_tokens = 12 * LENGTH;
    o.max_steps = 3;
    o.lora_dropout = dropout;
    o.gradient_checkpointing = recompute;
    OK(psoup_sft_memory(model, adapter, examples, 48, examples + 48, 16, &o, &said, &error));
    begin();
    OK(psoup_sft(model, adapter, examples, 48, examples + 48, 16, &o, &error));
    within(adapter ? "sft of an adapter" : "sft of the base", &said);
    ck_assert(said.learning > 0 && said.cache == 0 && said.mapped == 0);
    psoup_model_free(model);
}

/* Of a base that is mapped, or kept in blocks, which are not packed. */
START_TEST(bases_of_files) {
    static const int32_t dtypes[] = {-1, PSOUP_BF16, PSOUP_INT8, PSOUP_NF4};
    psoup_model *model = from_files(small_model(0), dtypes[_i], 1);
    psoup_example examples[ROWS];
    psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
    psoup_memory said = nothing();
    for (int i = 0; i < ROWS; i++)
        examples[i] = (psoup_example){tokens[i], LENGTH, 4};
    o.batch_tokens = 3 * LENGTH;
    o.max_steps = 2;
    OK(psoup_sft_memory(model, "P0", examples, ROWS, NULL, 0, &o, &said, &error));
    ck_assert_int_eq(said.mapped > 0, dtypes[_i] < 0);
    begin();
    OK(psoup_sft(model, "P0", examples, ROWS, NULL, 0, &o, &error));
    within("sft over a base of a file", &said);
    psoup_model_free(model);
}
END_TEST

START_TEST(sft_of_an_adapter) { fine_tune("P1", 0, 0); }
END_TEST
START_TEST(sft_with_dropout) { fine_tune("P1", 0.1f, 0); }
END_TEST
START_TEST(sft_of_inputs_alone) { fine_tune("P1", 0, 1); }
END_TEST
START_TEST(sft_of_the_base) { fine_tune(NULL, 0, 0); }
END_TEST

START_TEST(reward_models) {
    psoup_model *model = small_model(0);
    psoup_reward *rewards[3];
    psoup_comparison pairs[ROWS / 2];
    psoup_reward_options o = PSOUP_REWARD_OPTIONS_INIT;
    psoup_adapter_options lora = PSOUP_ADAPTER_OPTIONS_INIT;
    psoup_memory said = nothing();
    const char *const named[] = {"R0", "R1", "R2"};
    for (int j = 0; j < 3; j++)
        OK(psoup_reward_create(model, named[j], &lora, &rewards[j], &error));
    for (int i = 0; i < ROWS / 2; i++)
        pairs[i] = (psoup_comparison){.chosen = tokens[2 * i],
                                      .n_chosen = LENGTH,
                                      .rejected = tokens[2 * i + 1],
                                      .n_rejected = LENGTH - 2,
                                      .reward = i % 3};
    o.batch_size = 6;
    OK(psoup_reward_memory(rewards, 3, pairs, 27, pairs + 27, 5, &o, &said, &error));
    begin();
    OK(psoup_reward_train(rewards, 3, pairs, 27, pairs + 27, 5, &o, &error));
    within("reward training", &said);
    /* What cannot be trained together is refused here too. */
    psoup_model *other = small_model(8);
    psoup_reward *apart, *const pair[] = {rewards[0], NULL};
    OK(psoup_reward_create(other, "R9", &lora, &apart, &error));
    psoup_reward *const two[] = {rewards[0], apart};
    ck_assert(psoup_reward_memory(pair, 2, pairs, 27, NULL, 0, &o, &said, &error) == PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "rewards[1] is NULL"));
    ck_assert(psoup_reward_memory(two, 2, pairs, 27, NULL, 0, &o, &said, &error) == PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "are of different models"));
    psoup_reward_free(apart);
    psoup_model_free(other);
    for (int j = 0; j < 3; j++)
        psoup_reward_free(rewards[j]);
    psoup_model_free(model);
}
END_TEST

static void prefer(int n_policies, int32_t batch, int n_validation, float dropout, int32_t recompute) {
    psoup_model *model = small_model(n_policies);
    psoup_dpo_pair pairs[ROWS / 2];
    psoup_dpo_options o = PSOUP_DPO_OPTIONS_INIT;
    psoup_memory said = nothing();
    const char *const policy[] = {"P0", "P1", "P2"};
    for (int i = 0; i < ROWS / 2; i++)
        pairs[i] = (psoup_dpo_pair){.prompt = tokens[2 * i],
                                    .n_prompt = 6,
                                    .chosen = tokens[2 * i] + 6,
                                    .n_chosen = LENGTH - 6,
                                    .rejected = tokens[2 * i + 1],
                                    .n_rejected = LENGTH - 8,
                                    .policy = i % n_policies};
    o.batch_size = batch;
    o.lora_dropout = dropout;
    o.gradient_checkpointing = recompute;
    OK(psoup_dpo_memory(model, policy, (size_t)n_policies, pairs, 24, pairs + 24, (size_t)n_validation, &o, &said,
                        &error));
    begin();
    OK(psoup_dpo(model, policy, (size_t)n_policies, pairs, 24, pairs + 24, (size_t)n_validation, &o, &error));
    within("dpo", &said);
    psoup_model_free(model);
}

START_TEST(dpo_of_one) { prefer(1, 24, 0, 0, 0); }
END_TEST
START_TEST(dpo_in_small_steps) { prefer(1, 1, 0, 0, 0); } /* the reference is asked in longer passes than what learns */
END_TEST
START_TEST(dpo_side_by_side) { prefer(3, 4, 8, 0.1f, 0); }
END_TEST
START_TEST(dpo_of_inputs_alone) { prefer(2, 12, 8, 0, 1); }
END_TEST

/* Three policies, each against a reward model of its own on the same base. */
static void improve(int32_t objective, int32_t batch, int n_validation, float dropout, int32_t recompute) {
    psoup_model *model = small_model(3);
    psoup_reward *rewards[3];
    psoup_ppo_prompt asked[ROWS];
    psoup_ppo_policy policies[3];
    psoup_ppo_options o = PSOUP_PPO_OPTIONS_INIT;
    psoup_adapter_options lora = PSOUP_ADAPTER_OPTIONS_INIT;
    psoup_memory said = nothing();
    psoup_ppo *ppo = NULL;
    const char *const named[] = {"R0", "R1", "R2"}, *const policy[] = {"P0", "P1", "P2"};
    for (int i = 0; i < ROWS; i++)
        asked[i] = (psoup_ppo_prompt){.tokens = tokens[i], .n = LENGTH / 2, .id = i};
    for (int j = 0; j < 3; j++) {
        OK(psoup_reward_create(model, named[j], &lora, &rewards[j], &error));
        policies[j] = (psoup_ppo_policy){.adapter = policy[j],
                                         .rewards = &rewards[j],
                                         .n_rewards = 1,
                                         .prompts = asked,
                                         .n_prompts = 48,
                                         .validation = asked + 48,
                                         .n_validation = (size_t)n_validation,
                                         .seed = 5 + (uint64_t)j};
    }
    o.batch_size = batch;
    o.steps = 2;
    o.ppo_epochs = 1;
    o.max_new_tokens = NEW;
    o.micro_batch_tokens = 256;
    o.validate_every = 1;
    o.objective = objective;
    o.gradient_checkpointing = recompute;
    o.lora_dropout = o.head_dropout = dropout;
    OK(psoup_ppo_memory(model, policies, 3, &o, &said, &error));
    begin();
    OK(psoup_ppo_create(model, policies, 3, &o, &ppo, &error));
    OK(psoup_ppo_run(ppo, &error));
    within(objective ? "GRPO" : "PPO", &said);
    psoup_ppo_free(ppo);
    ck_assert(said.cache > 0 && said.logits > 0);
    for (int j = 0; j < 3; j++)
        psoup_reward_free(rewards[j]);
    psoup_model_free(model);
}

START_TEST(ppo) { improve(PSOUP_OBJECTIVE_PPO, 8, 0, 0, 0); }
END_TEST
START_TEST(ppo_with_validation) { improve(PSOUP_OBJECTIVE_PPO, 8, 16, 0.1f, 0); }
END_TEST
START_TEST(ppo_of_many) { improve(PSOUP_OBJECTIVE_PPO, 44, 0, 0, 0); } /* each thread decodes a share */
END_TEST
START_TEST(grpo) { improve(PSOUP_OBJECTIVE_GRPO, 8, 4, 0, 1); }
END_TEST

static void generate(int32_t method) {
    psoup_model *model = small_model(3);
    psoup_prompt prompts[ROWS];
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_generation *g = NULL;
    psoup_memory said = nothing();
    float mix[3] = {0.5f, 0.25f, 0.25f};
    for (int i = 0; i < ROWS; i++)
        prompts[i] = (psoup_prompt){.tokens = tokens[i], .n = LENGTH, .mix = mix, .mix_method = method,
                                    .sequence = (uint64_t)i};
    sampling.max_new_tokens = 2 * NEW;
    sampling.no_repeat_ngram_size = 3;
    OK(psoup_generate_memory(model, prompts, ROWS, &sampling, NULL, &said, &error));
    begin();
    OK(psoup_generate(model, prompts, ROWS, &sampling, NULL, NULL, NULL, &g, &error));
    within(psoup_mix_method_name(method), &said);
    psoup_generation_free(g);
    psoup_model_free(model);
}

START_TEST(generation) { generate(_i); }
END_TEST

/* What does not depend on lengths grows as it should; and what cannot be is refused as by the call itself. */
START_TEST(sizes) {
    psoup_model *model = small_model(2);
    psoup_example example = {tokens[0], LENGTH, 4};
    psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
    psoup_memory one = nothing(), two = nothing();
    OK(psoup_sft_memory(model, "P0", &example, 1, NULL, 0, &o, &one, &error));
    const float *data = NULL;
    size_t count = 0;
    OK(psoup_model_adapter_data(model, "P0", &data, &count, &error));
    const size_t gradients = (size_t)psoup__gradients(model);
    ck_assert_int_eq(gradients, PSOUP__LANES); /* it is small: lanes learn side by side */
    ck_assert_int_eq(one.learning, (int64_t)((2 + gradients) * count * sizeof(float)));
    ck_assert_int_eq(one.adapters, (int64_t)(2 * count * sizeof(float)));
    OK(psoup_sft_memory(model, "P0", &example, 1, &example, 1, &o, &two, &error));
    ck_assert_int_eq(two.learning, (int64_t)((3 + gradients) * count * sizeof(float)));
    ck_assert_int_eq(two.adapters, one.adapters);
    ck_assert(psoup_sft_memory(model, "none", &example, 1, NULL, 0, &o, &one, &error) == PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "'none'"));
    o.batch_tokens = 0;
    ck_assert(psoup_sft_memory(model, "P0", &example, 1, NULL, 0, &o, &one, &error) == PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "batch_tokens"));
    ck_assert(psoup_ppo_memory(model, NULL, 1, NULL, &one, &error) == PSOUP_ERROR_ARGUMENT);
    ck_assert(psoup_reward_memory(NULL, 0, NULL, 0, NULL, 0, NULL, &one, &error) == PSOUP_ERROR_ARGUMENT);
    ck_assert(psoup_dpo_memory(model, NULL, 0, NULL, 0, NULL, 0, NULL, &one, &error) == PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "there is no policy"));
    ck_assert(psoup_generate_memory(NULL, NULL, 0, NULL, NULL, &one, &error) == PSOUP_ERROR_ARGUMENT);
    struct {
        size_t size;
        int64_t base;
    } old = {.size = 16};
    o = (psoup_sft_options)PSOUP_SFT_OPTIONS_INIT;
    OK(psoup_sft_memory(model, "P0", &example, 1, NULL, 0, &o, (psoup_memory *)&old, &error));
    ck_assert_int_eq(old.base, two.base);
    psoup_model_free(model);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("what a run takes");
    TCase *tests = tcase_create("all");
    tcase_set_timeout(tests, 60);
    tcase_add_checked_fixture(tests, counting, tear_down);
    tcase_add_test(tests, sft_of_an_adapter);
    tcase_add_test(tests, sft_with_dropout);
    tcase_add_test(tests, sft_of_inputs_alone);
    tcase_add_test(tests, sft_of_the_base);
    tcase_add_loop_test(tests, bases_of_files, 0, 4);
    tcase_add_test(tests, reward_models);
    tcase_add_test(tests, dpo_of_one);
    tcase_add_test(tests, dpo_in_small_steps);
    tcase_add_test(tests, dpo_side_by_side);
    tcase_add_test(tests, dpo_of_inputs_alone);
    tcase_add_test(tests, ppo);
    tcase_add_test(tests, ppo_with_validation);
    tcase_add_test(tests, ppo_of_many);
    tcase_add_test(tests, grpo);
    tcase_add_loop_test(tests, generation, PSOUP_MIX_DELTA, PSOUP_MIX_LOGITS + 1);
    tcase_add_test(tests, sizes);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
