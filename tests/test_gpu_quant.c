/* Linears in blocks on a GPU against the same on the CPU: scores, gradients, texts, training, files. Where there is no
 * GPU the host driver stands for one (tests/host_driver). */
#include "generate_case.h"

#include "gpu/internal.h"
#include "psoup/ppo.h"

static const struct {
    psoup_dtype blocks;
    int32_t dtype;
    double tolerance; /* of log-probs */
} kinds[] = {{PSOUP_NF4, PSOUP_F32, 1e-4}, {PSOUP_INT8, PSOUP_F32, 1e-4}, {PSOUP_NF4, PSOUP_BF16, 0.12},
             {PSOUP_INT8, PSOUP_F16, 2e-2}};
enum { KINDS = sizeof kinds / sizeof *kinds };

static psoup_context *on(const char *device) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *context = NULL;
    options.device = device;
    OK(psoup_context_create(&options, &context, &error));
    return context;
}

typedef struct pair {
    psoup_context *context[2];
    psoup_model *model[2];
} pair;

/* The same random model on the CPU and on the GPU; no row of `down` is whole blocks. */
static pair make_pair(psoup_dtype blocks, int32_t dtype) {
    pair p = {.context = {on("cpu"), on("cuda:0")}};
    for (int i = 0; i < 2; i++) {
        psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
        psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
        config.vocab_size = VOCAB;
        config.hidden_size = 64;
        config.intermediate_size = 72;
        config.num_hidden_layers = 2;
        config.num_attention_heads = 4;
        config.num_key_value_heads = 2;
        config.max_position_embeddings = 128;
        config.torch_dtype = dtype;
        config.linear_dtype = (int32_t)blocks;
        config.initializer_range = 0.1f;
        OK(psoup_model_create(p.context[i], &config, 11, &p.model[i], &error));
        options.rank = 4;
        options.targets = PSOUP_ALL_LINEAR;
        for (int a = 0; a < 2; a++) {
            OK(psoup_model_add_adapter(p.model[i], a ? "b" : "a", &options, &error));
            psoup__adapter *adapter = p.model[i]->adapters[a];
            float *values = malloc(adapter->count * sizeof *values);
            psoup__random random = {.seed = 5, .sequence = (uint64_t)a};
            for (size_t k = 0; k < adapter->count; k++)
                values[k] = 0.1f * psoup__random_normal(&random);
            p.model[i]->be->ops->write(p.model[i]->be, adapter->data, values, adapter->count * sizeof *values);
            free(values);
        }
    }
    return p;
}

static void free_pair(pair *p) {
    for (int i = 0; i < 2; i++) {
        psoup_model_free(p->model[i]);
        psoup_context_free(p->context[i]);
    }
}

/* The blocks on the device are the CPU's; scores and gradients are close. */
START_TEST(scores_are_the_cpus) {
    static const char *const of[] = {"a/model.layers.0.self_attn.q_proj.lora_A",
                                     "b/model.layers.1.mlp.down_proj.lora_B", "mix"};
    pair p = make_pair(kinds[_i].blocks, kinds[_i].dtype);
    float *values = malloc(4 * sizeof(float) * PSOUP__PIECE);
    for (psoup__parameter a = {.next = 0}, b = {.next = 0};
         psoup__model_next(p.model[0], &a) && psoup__model_next(p.model[1], &b);) {
        OK(psoup__parameter_read(p.model[0], &a, 0, a.count, values, values + PSOUP__PIECE, &error));
        OK(psoup__parameter_read(p.model[1], &b, 0, a.count, values + 2 * PSOUP__PIECE, values + PSOUP__PIECE, &error));
        ck_assert_msg(memcmp(values, values + 2 * PSOUP__PIECE, a.count * sizeof(float)) == 0, "%s", a.name);
    }
    free(values);
    sample_rows rows;
    float out[2][128];
    psoup_gradients *g[2];
    mixed_rows(&rows, 31);
    for (int i = 0; i < 2; i++) {
        OK(psoup_model_logprobs(p.model[i], rows.row, 6, out[i], &error));
        OK(psoup_model_gradients(p.model[i], rows.row, 6, NULL, PSOUP_GRADIENT_ADAPTERS | PSOUP_GRADIENT_MIX, &g[i],
                                 &error));
    }
    double off = distance(out[0], out[1], rows.total - 6);
    ck_assert_msg(off <= kinds[_i].tolerance && off > 0, "log-probs differ by %g", off);
    for (int k = 0; k < 3; k++) {
        size_t n = 0, m = 0;
        const float *want = psoup_gradients_get(g[0], of[k], &n), *got = psoup_gradients_get(g[1], of[k], &m);
        ck_assert(want && got && n == m);
        off = relative(got, want, n);
        ck_assert_msg(off <= 2 * kinds[_i].tolerance, "%s: the relative difference is %g", of[k], off);
    }
    psoup_gradients_free(g[0]), psoup_gradients_free(g[1]);
    free_pair(&p);
}
END_TEST

/* In windows too, where launches become a graph. */
START_TEST(texts_are_the_cpus) {
    pair p = make_pair(kinds[_i].blocks, PSOUP_F32);
    sample_rows rows;
    psoup_prompt prompts[6];
    psoup_generation *g[3];
    mixed_rows(&rows, 34);
    psoup_sampling sampling = sampled(13);
    sampling.temperature = 0.9f;
    for (size_t i = 0; i < 6; i++)
        prompts[i] = prompt_of(&rows.row[i], i);
    for (int w = 0; w < 3; w++) {
        psoup_session_options options = PSOUP_SESSION_OPTIONS_INIT;
        options.steps = w == 1 ? 1 : 0;
        OK(psoup_generate(p.model[w > 0], prompts, 6, &sampling, &options, NULL, NULL, &g[w], &error));
    }
    for (int w = 1; w < 3; w++)
        for (size_t i = 0; i < 6; i++) {
            const psoup_completion *x = psoup_generation_get(g[0], i), *y = psoup_generation_get(g[w], i);
            ck_assert_uint_eq(x->n, y->n);
            ck_assert_mem_eq(x->tokens, y->tokens, x->n * sizeof *x->tokens);
            ck_assert_double_le(distance(x->logprobs, y->logprobs, x->n), 1e-4);
        }
    for (int w = 0; w < 3; w++)
        psoup_generation_free(g[w]);
    free_pair(&p);
}
END_TEST

static int reward(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    for (size_t i = 0; i < n; i++)
        scores[i] = (float)(rollouts[i].response[0] % 7);
    return 0;
}

static void train(psoup_model *model) {
    sample_rows rows;
    psoup_example examples[4];
    psoup_sft_options sft = PSOUP_SFT_OPTIONS_INIT;
    psoup_ppo_prompt prompts[2];
    psoup_ppo_policy policy = {.adapter = "b", .reward_fn = reward, .prompts = prompts, .n_prompts = 2};
    psoup_ppo_options ppo = PSOUP_PPO_OPTIONS_INIT;
    psoup_ppo *run = NULL;
    int64_t left;
    fill_rows(&rows, 6, 21);
    for (int i = 0; i < 4; i++)
        examples[i] = (psoup_example){.tokens = rows.row[i == 2 ? 4 : i].tokens, .n = rows.row[i == 2 ? 4 : i].n,
                                      .n_prompt = 1};
    for (int i = 0; i < 2; i++)
        prompts[i] = (psoup_ppo_prompt){.tokens = rows.row[i].tokens, .n = rows.row[i].n, .id = i};
    sft.max_steps = 2;
    sft.batch_tokens = 64;
    sft.learning_rate = 1e-3f;
    OK(psoup_sft(model, "a", examples, 4, NULL, 0, &sft, &error));
    ppo.steps = 1;
    ppo.batch_size = 2;
    ppo.max_new_tokens = 6;
    ppo.ppo_epochs = 2;
    OK(psoup_ppo_create(model, &policy, 1, &ppo, &run, &error));
    OK(psoup_ppo_step(run, &left, &error));
    psoup_ppo_free(run);
}

START_TEST(training_is_the_cpus) {
    pair p = make_pair(kinds[_i].blocks, PSOUP_F32);
    for (int a = 0; a < 2; a++) {
        const float *before, *after[2];
        size_t n;
        OK(psoup_model_adapter_data(p.model[0], a ? "b" : "a", &before, &n, &error));
        float *kept = malloc(n * sizeof *kept);
        memcpy(kept, before, n * sizeof *kept);
        if (a == 0)
            for (int i = 0; i < 2; i++)
                train(p.model[i]);
        for (int i = 0; i < 2; i++)
            OK(psoup_model_adapter_data(p.model[i], a ? "b" : "a", &after[i], &n, &error));
        double change = 0, off = 0;
        for (size_t k = 0; a == 0 && k < n; k++)
            change += pow((double)after[0][k] - kept[k], 2);
        for (size_t k = 0; k < n; k++)
            off += pow((double)after[1][k] - after[0][k], 2);
        ck_assert_msg(a == 1 || change > 0, "nothing was learned");
        ck_assert_msg(a == 1 ? off < 1e-6 : off < 1e-3 * change, "%g of a change of %g", off, change);
        free(kept);
    }
    free_pair(&p);
}
END_TEST

/* What transformers saved with bitsandbytes; and the base does not train here either. */
START_TEST(files_are_loaded) {
    static const char *const directories[] = {"tests/golden/quant/nf4", "tests/golden/quant/double",
                                              "tests/golden/quant/int8"};
    const int32_t tokens[] = {4, 9, 22, 5, 31};
    const psoup_row row = {.tokens = tokens, .n = 5};
    for (int d = 0; d < 3; d++) {
        pair p = {.context = {on("cpu"), on("cuda:0")}};
        float out[2][4];
        for (int i = 0; i < 2; i++) {
            OK(psoup_model_load(p.context[i], directories[d], &p.model[i], &error));
            OK(psoup_model_logprobs(p.model[i], &row, 1, out[i], &error));
        }
        ck_assert_double_le(distance(out[0], out[1], 4), 1e-4);
        psoup_example example = {.tokens = tokens, .n = 5, .n_prompt = 1};
        ck_assert_int_eq(psoup_sft(p.model[1], NULL, &example, 1, NULL, 0, NULL, &error), PSOUP_ERROR_UNSUPPORTED);
        free_pair(&p);
    }
}
END_TEST

/* Each allocation of the device's memory fails in turn. */
START_TEST(device_memory_runs_out) {
    int failures = 0;
    for (int n = 1;; n++) {
        char number[16];
        float out[4];
        const int32_t tokens[] = {4, 9, 22, 5, 31};
        const psoup_row row = {.tokens = tokens, .n = 5};
        psoup_model *model = NULL;
        psoup_context *context = on("cuda:0");
        snprintf(number, sizeof number, "+%d", n); /* the nth from now on */
        setenv("PSOUP_HOST_FAIL_ALLOC", number, 1);
        psoup_status status = psoup_model_load(context, "tests/golden/quant/nf4", &model, &error);
        if (status == PSOUP_OK)
            status = psoup_model_logprobs(model, &row, 1, out, &error);
        unsetenv("PSOUP_HOST_FAIL_ALLOC");
        psoup_model_free(model);
        psoup_context_free(context);
        if (status == PSOUP_OK)
            break;
        ck_assert_msg(status == PSOUP_ERROR_MEMORY, "%d: %s", n, error.message);
        ck_assert_int_lt(++failures, 200);
    }
    ck_assert_int_gt(failures, 5);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("gpu quant");
    TCase *tests = tcase_create("model");
    tcase_set_timeout(tests, 600);
    tcase_add_loop_test(tests, scores_are_the_cpus, 0, KINDS);
    tcase_add_loop_test(tests, texts_are_the_cpus, 0, 2);
    tcase_add_loop_test(tests, training_is_the_cpus, 0, 2);
    tcase_add_test(tests, files_are_loaded);
    tcase_add_test(tests, device_memory_runs_out);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
