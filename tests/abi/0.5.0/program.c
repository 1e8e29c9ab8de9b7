/* Compiled against the 0.5.0 headers kept beside it, run on today's libpsoup.so: what 0.5 added. */
#include <stdio.h>
#include <string.h>

#include "psoup/ppo.h"

#define EXPECT(condition)                                                                          \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "abi 0.5.0: not so: %s\n", #condition);                                \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

/* Its policy is an adapter of the soup. */
static int pay(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    for (size_t i = 0; i < n; i++)
        scores[i] = strcmp(rollouts[i].policy, user) == 0 ? (float)rollouts[i].n : -1000.0f;
    return 0;
}

/* A soup whose first adapter has two rewards. */
static int soup(psoup_context *context) {
    static const char *const names[] = {"A", "B"};
    const int32_t tokens[] = {2, 3};
    const psoup_ppo_prompt prompt = {.tokens = tokens, .n = 2};
    const psoup_reward_source sources[] = {{.name = "a", .function = pay, .user = "A", .weight = 0.5f},
                                           {.name = "b", .function = pay, .user = "A", .weight = 0.5f},
                                           {.name = "c", .function = pay, .user = "B", .weight = 1.0f, .adapter = 1}};
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_ppo_options options = PSOUP_PPO_OPTIONS_INIT;
    psoup_ppo_soup mixed = PSOUP_PPO_SOUP_INIT;
    psoup_ppo_trace trace = {.size = sizeof(trace)};
    psoup_model *model;
    psoup_ppo *ppo;
    psoup_error error;
    config.vocab_size = config.hidden_size = config.intermediate_size = 16;
    config.num_hidden_layers = config.num_attention_heads = 1;
    EXPECT(psoup_model_create(context, &config, 7, &model, &error) == PSOUP_OK);
    EXPECT(psoup_model_add_adapter(model, "A", NULL, &error) == PSOUP_OK);
    EXPECT(psoup_model_add_adapter(model, "B", NULL, &error) == PSOUP_OK);
    mixed.adapters = names;
    mixed.n = 2;
    options.batch_size = 2;
    options.max_new_tokens = 4;
    const psoup_ppo_policy policy = {.adapter = "soup", .soup = &mixed, .sources = sources, .n_sources = 3,
                                     .prompts = &prompt, .n_prompts = 1};
    EXPECT(psoup_ppo_create(model, &policy, 1, &options, &ppo, &error) == PSOUP_OK);
    EXPECT(psoup_ppo_step(ppo, NULL, &error) == PSOUP_OK);
    EXPECT(psoup_ppo_get_trace(ppo, 0, &trace, &error) == PSOUP_OK && trace.adapters == 2);
    EXPECT(trace.score[0] > 0.99f && trace.score[0] < 4.01f);
    psoup_ppo_free(ppo);
    psoup_model_free(model);
    return 0;
}

int main(void) {
    psoup_context *context;
    psoup_error error;
    EXPECT(psoup_ppo_fields() != NULL);
    EXPECT(strcmp(psoup_version(), "0.5.0") >= 0);
    EXPECT(psoup_context_create(NULL, &context, &error) == PSOUP_OK);
    int failed = soup(context);
    psoup_context_free(context);
    return failed;
}
