/* Compiled against the 0.4.0 headers kept beside it, run on today's libpsoup.so: what 0.4 added. */
#include <stdio.h>
#include <string.h>

#include "psoup/psoup.h"

#define MUST(call)                                                                                 \
    do {                                                                                           \
        if ((call) != PSOUP_OK) {                                                                  \
            fprintf(stderr, "abi 0.4.0: %s: %s\n", #call, error.message);                          \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)
#define EXPECT(condition)                                                                          \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "abi 0.4.0: not so: %s\n", #condition);                                \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

/* Long answers are liked. */
static int by_length(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    (void)user;
    for (size_t i = 0; i < n; i++)
        scores[i] = (float)rollouts[i].n;
    return 0;
}

int main(void) {
    psoup_error error = {0};
    psoup_context *context;
    MUST(psoup_context_create(NULL, &context, &error));

    /* One process is a world of its own. */
    psoup_comm_options place = PSOUP_COMM_OPTIONS_INIT;
    psoup_comm *comm;
    double one = 1.0;
    MUST(psoup_comm_tcp_create(context, &place, &comm, &error));
    MUST(comm->sum(comm->user, &one, 1, PSOUP_F64, &error));
    EXPECT(comm->world == 1 && one == 1.0);

    /* A model whose linears are in blocks of nf4, and a method of mixing by its name. */
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_model *model;
    int32_t method = -1;
    config.vocab_size = 32;
    config.hidden_size = 16;
    config.intermediate_size = 16;
    config.num_hidden_layers = 1;
    config.num_attention_heads = 2;
    config.num_key_value_heads = 1;
    config.max_position_embeddings = 16;
    config.linear_dtype = PSOUP_NF4;
    MUST(psoup_model_create(context, &config, 1, &model, &error));
    MUST(psoup_mix_method_parse("logits", &method, &error));
    EXPECT(method == PSOUP_MIX_LOGITS && strcmp(psoup_mix_method_name(method), "logits") == 0);

    /* An adapter that trains step by step, on ranks of which there is one. */
    psoup_adapter_options adapter = PSOUP_ADAPTER_OPTIONS_INIT;
    static const int32_t tokens[4] = {1, 2, 3, 4};
    const psoup_example example = {.tokens = tokens, .n = 4};
    psoup_sft_options sft = PSOUP_SFT_OPTIONS_INIT;
    psoup_training *training;
    int64_t remaining = -1;
    MUST(psoup_model_add_adapter(model, "A", &adapter, &error));
    sft.epochs = 2;
    sft.gradient_checkpointing = 1;
    sft.comm = comm;
    MUST(psoup_sft_create(model, "A", &example, 1, NULL, 0, &sft, &training, &error));
    MUST(psoup_training_step(training, &remaining, &error));
    EXPECT(remaining == 1);
    MUST(psoup_training_run(training, &error));
    psoup_training_free(training);

    /* The longest of three answers, each from the logits of base and adapter. */
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_best_options best = PSOUP_BEST_OPTIONS_INIT;
    psoup_generation *generation;
    int32_t chosen;
    const float mix[1] = {1.0f};
    const psoup_prompt prompt = {.tokens = tokens, .n = 2, .mix = mix, .mix_method = method};
    sampling.max_new_tokens = 4;
    best.n = 3;
    best.reward_fn = by_length;
    MUST(psoup_best_of_n(model, &prompt, 1, &sampling, NULL, &best, &generation, &chosen, NULL, &error));
    for (int32_t k = 0; k < 3; k++)
        EXPECT(psoup_generation_get(generation, (size_t)k)->n <= psoup_generation_get(generation, (size_t)chosen)->n);
    psoup_generation_free(generation);

    /* What a run would take. */
    psoup_memory memory = {.size = sizeof(psoup_memory)};
    MUST(psoup_sft_memory(model, "A", &example, 1, NULL, 0, &sft, &memory, &error));
    EXPECT(memory.base > 0 && memory.host >= memory.base + memory.adapters);
    psoup_comm_free(comm);
    psoup_model_free(model);
    psoup_context_free(context);
    return 0;
}
