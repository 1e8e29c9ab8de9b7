/* Compiled against the 0.3.0 headers kept beside it, run on today's libpsoup.so: what 0.3 added. */
#include <stdio.h>
#include <string.h>

#include "psoup/psoup.h"

#define MUST(call)                                                                                 \
    do {                                                                                           \
        if ((call) != PSOUP_OK) {                                                                  \
            fprintf(stderr, "abi 0.3.0: %s: %s\n", #call, error.message);                          \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)
#define EXPECT(condition)                                                                          \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "abi 0.3.0: not so: %s\n", #condition);                                \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

int main(void) {
    psoup_error error = {0};
    psoup_context *context;
    psoup_context_options place = PSOUP_CONTEXT_OPTIONS_INIT;

    /* A device may be named; a stream is a device's. */
    place.stream = &place;
    EXPECT(psoup_context_create(&place, &context, &error) == PSOUP_ERROR_ARGUMENT);
    EXPECT(strstr(error.message, "stream") != NULL);
    place.stream = NULL;
    place.device = "cpu";
    MUST(psoup_context_create(&place, &context, &error));

    /* No GPU merges for a context on the CPU. */
    psoup_gpu_merge *gpu;
    EXPECT(psoup_gpu_merge_create(context, &gpu, &error) != PSOUP_OK && gpu == NULL);
    psoup_gpu_merge_free(gpu);

    /* A session whose cache holds one sequence at a time. */
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_model *model;
    config.vocab_size = 32;
    config.hidden_size = 16;
    config.intermediate_size = 16;
    config.num_hidden_layers = 1;
    config.num_attention_heads = 2;
    config.num_key_value_heads = 1;
    config.max_position_embeddings = 16;
    MUST(psoup_model_create(context, &config, 1, &model, &error));
    psoup_session_options options = PSOUP_SESSION_OPTIONS_INIT;
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_generation *generation;
    static const int32_t tokens[2] = {1, 2};
    sampling.max_new_tokens = 4;
    sampling.ignore_stop = 1;
    const psoup_prompt prompts[2] = {{.tokens = tokens, .n = 2}, {.tokens = tokens, .n = 2}};
    options.cache_tokens = 16;
    options.steps = 4;
    MUST(psoup_generate(model, prompts, 2, &sampling, &options, NULL, NULL, &generation, &error));
    EXPECT(psoup_generation_get(generation, 1)->n == 4);
    psoup_generation_free(generation);
    psoup_model_free(model);
    psoup_context_free(context);
    return 0;
}
