/* Compiled against the 0.1.0 headers kept beside it, run on today's libpsoup.so. Touches a function of
 * every header and every kind of promise: options by size, results by **out, borrowed pointers. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "psoup/psoup.h"

#define MUST(call)                                                                                 \
    do {                                                                                           \
        if ((call) != PSOUP_OK) {                                                                  \
            fprintf(stderr, "abi 0.1.0: %s: %s\n", #call, error.message);                          \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)
#define EXPECT(condition)                                                                          \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "abi 0.1.0: not so: %s\n", #condition);                                \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

static int first_token(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    (void)user;
    for (size_t i = 0; i < n; i++)
        scores[i] = (float)rollouts[i].response[0];
    return 0;
}

int main(void) {
    psoup_error error = {0};
    psoup_context_options settings = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *context;
    settings.threads = 1;
    MUST(psoup_context_create(&settings, &context, &error));
    EXPECT(psoup_context_threads(context) == 1);
    EXPECT(psoup_dtype_size(PSOUP_BF16) == 2);

    /* data */
    psoup_json *json;
    MUST(psoup_json_parse("{\"a\": [1, 2.5]}", 15, "text", &json, &error));
    EXPECT(psoup_json_real(psoup_json_at(psoup_json_get(json, "a"), 1), 0) == 2.5);
    psoup_json_free(json);

    /* model */
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_model *model;
    config.vocab_size = 32;
    config.hidden_size = 16;
    config.intermediate_size = 24;
    config.num_hidden_layers = 1;
    config.num_attention_heads = 2;
    config.max_position_embeddings = 64;
    config.eos_token_id = 1;
    MUST(psoup_model_create(context, &config, 7, &model, &error));
    psoup_adapter_options lora = PSOUP_ADAPTER_OPTIONS_INIT;
    lora.rank = 2;
    MUST(psoup_model_add_adapter(model, "P1A", &lora, &error));
    float mix[1];
    MUST(psoup_model_parse_mix(model, "P1A=1", 0, mix, &error));
    const int32_t tokens[] = {3, 4, 5};
    const psoup_row row = {tokens, 3, mix};
    float logprobs[2];
    MUST(psoup_model_logprobs(model, &row, 1, logprobs, &error));
    EXPECT(logprobs[0] < 0);
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    sampling.max_new_tokens = 4;
    const psoup_prompt prompt = {tokens, 3, mix, 0, NULL};
    psoup_generation *generation;
    MUST(psoup_generate(model, &prompt, 1, &sampling, NULL, NULL, NULL, &generation, &error));
    EXPECT(psoup_generation_get(generation, 0)->n >= 1);
    psoup_generation_free(generation);

    /* train */
    psoup_ppo_options options = PSOUP_PPO_OPTIONS_INIT;
    const psoup_ppo_prompt question = {.tokens = tokens, .n = 3};
    const psoup_ppo_policy policy = {
        .adapter = "P1A", .reward_fn = first_token, .prompts = &question, .n_prompts = 1};
    psoup_ppo *ppo;
    int64_t left;
    options.steps = 1;
    options.batch_size = 4;
    options.max_new_tokens = 4;
    MUST(psoup_ppo_create(model, &policy, 1, &options, &ppo, &error));
    MUST(psoup_ppo_step(ppo, &left, &error));
    EXPECT(left == 0);
    psoup_ppo_free(ppo);

    /* merge */
    const float a[] = {1, 2}, b[] = {3, 6};
    const void *const in[] = {a, b};
    const double weights[] = {0.5, 0.5};
    float out[2];
    MUST(psoup_merge_sum(context, out, PSOUP_F32, in, PSOUP_F32, weights, 2, 2, &error));
    EXPECT(out[0] == 2 && out[1] == 4);

    /* eval */
    psoup_preferences *preferences;
    MUST(psoup_preferences_default(context, 1, &preferences, &error));
    EXPECT(psoup_users_count(preferences) == 16);
    psoup_preferences_free(preferences);

    psoup_model_free(model);
    psoup_context_free(context);
    return 0;
}
