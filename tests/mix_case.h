/* What the tests of mixes share: a model with three adapters, on the CPU or on a GPU, and its logits by any method. */
#ifndef MIX_CASE_H
#define MIX_CASE_H

#include "generate_case.h"

enum { ADAPTERS = 3, ROWS = 6 };
static const char *const names[ADAPTERS] = {"a", "b", "c"};
static const char *const devices[] = {"cpu", "cuda:0"};

static inline psoup_context *on(const char *device, int threads) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *context = NULL;
    options.device = device;
    options.threads = threads;
    OK(psoup_context_create(&options, &context, &error));
    return context;
}

static inline void fill_adapter(psoup_model *model, const char *name, uint64_t sequence, float size) {
    psoup__adapter *adapter = psoup__model_adapter(model, name);
    float *values = malloc(adapter->count * sizeof *values);
    psoup__random random = {.seed = 5, .sequence = sequence};
    for (size_t i = 0; i < adapter->count; i++)
        values[i] = size * psoup__random_normal(&random);
    model->be->ops->write(model->be, adapter->data, values, adapter->count * sizeof *values);
    free(values);
}

/* Three adapters of one rank and scale; c leaves most linears alone. */
static inline psoup_model *random_model(psoup_context *context) {
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_model *model = NULL;
    config.vocab_size = VOCAB;
    config.hidden_size = 48;
    config.intermediate_size = 72;
    config.num_hidden_layers = 2;
    config.num_attention_heads = 4;
    config.num_key_value_heads = 2;
    config.head_dim = 64;
    config.max_position_embeddings = 128;
    config.torch_dtype = PSOUP_F32;
    config.initializer_range = 0.1f;
    OK(psoup_model_create(context, &config, 11, &model, &error));
    for (int i = 0; i < ADAPTERS; i++) {
        psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
        options.rank = 5;
        options.alpha = 10;
        options.targets = i == 2 ? PSOUP_Q_PROJ | PSOUP_V_PROJ : PSOUP_ALL_LINEAR;
        OK(psoup_model_add_adapter(model, names[i], &options, &error));
        fill_adapter(model, names[i], (uint64_t)i, 0.1f);
    }
    return model;
}

static inline float *logits_of(psoup_model *model, const psoup_row *rows, const int32_t *how, size_t n) {
    size_t total = 0;
    for (size_t i = 0; i < n; i++)
        total += rows[i].n;
    float *out = malloc(total * VOCAB * sizeof *out);
    OK(psoup_model_logits_mixed(model, rows, how, n, out, &error));
    return out;
}

#define REFUSED(call, text)                                                                                        \
    do {                                                                                                           \
        ck_assert_int_eq(call, PSOUP_ERROR_ARGUMENT);                                                              \
        ck_assert_msg(strstr(error.message, text) && !strchr(error.message, '\n'), "%s", error.message);          \
    } while (0)

#endif
