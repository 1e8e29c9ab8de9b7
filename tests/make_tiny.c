/* Makes what tests/cli.sh works on: DIR/base, a random model of 11 thousand parameters with its own
 * tokenizer, and the adapters DIR/P1A and DIR/P2A over it, which change its answers.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "psoup/psoup.h"

enum { HIDDEN = 16, LAYERS = 2, HEADS = 2, RANK = 2 };

static psoup_error error;

static void need(psoup_status status) {
    if (status == PSOUP_OK)
        return;
    fprintf(stderr, "make_tiny: %s\n", error.message);
    exit(1);
}

static const char *join(const char *directory, const char *name) {
    static char path[4096];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return path;
}

/* An adapter as training leaves it: B is not zero. psoup_model_save_adapter writes the
 * configuration; the factors are written here. */
static void make_adapter(psoup_model *model, const char *parent, const char *name, unsigned seed) {
    static const char *const linears[] = {"q_proj", "v_proj"};
    static char names[LAYERS * 4][128];
    static float data[LAYERS * 4][RANK * HIDDEN];
    static int64_t shapes[LAYERS * 4][2];
    psoup_named_tensor tensors[LAYERS * 4];
    psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
    char directory[4000];
    snprintf(directory, sizeof directory, "%s/%s", parent, name);
    options.rank = RANK;
    options.alpha = 2 * RANK;
    need(psoup_model_add_adapter(model, name, &options, &error));
    need(psoup_model_save_adapter(model, name, directory, "base", &error));
    for (int i = 0; i < LAYERS * 4; i++) {
        int is_b = i % 2;
        snprintf(names[i], sizeof names[i],
                 "base_model.model.model.layers.%d.self_attn.%s.lora_%c.weight", i / 4,
                 linears[i / 2 % 2], is_b ? 'B' : 'A');
        shapes[i][0] = is_b ? HIDDEN : RANK;
        shapes[i][1] = is_b ? RANK : HIDDEN;
        for (int k = 0; k < RANK * HIDDEN; k++) {
            seed = seed * 1664525u + 1013904223u;
            data[i][k] = ((float)(seed >> 16) / 65536.0f - 0.5f) * 1.5f;
        }
        tensors[i] = (psoup_named_tensor){names[i], PSOUP_F32, 2, shapes[i], data[i]};
    }
    need(psoup_safetensors_write(psoup_model_context(model),
                                 join(directory, "adapter_model.safetensors"), tensors, LAYERS * 4,
                                 &error));
}

int main(int argc, char **argv) {
    const char *const special[] = {"</s>"};
    const char *const texts[] = {
        "<|user|>\nWhy does it rain?\n<|assistant|>\n", "Name a colour. What is the sun made of?",
        "Generate a response that can be easily understood by an elementary school student."};
    psoup_context_options one_thread = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *context;
    psoup_tokenizer *tokenizer;
    psoup_model *model;
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    if (argc != 2) {
        fputs("usage: make_tiny DIR\n", stderr);
        return 2;
    }
    one_thread.threads = 1;
    need(psoup_context_create(&one_thread, &context, &error));
    need(psoup_tokenizer_train(context, texts, sizeof texts / sizeof *texts, 300, special, 1, NULL,
                               &tokenizer, &error));
    config.vocab_size = psoup_tokenizer_vocab_size(tokenizer);
    config.hidden_size = HIDDEN;
    config.intermediate_size = 32;
    config.num_hidden_layers = LAYERS;
    config.num_attention_heads = config.num_key_value_heads = HEADS;
    config.max_position_embeddings = 256;
    config.eos_token_id = psoup_tokenizer_token_id(tokenizer, "</s>");
    config.initializer_range = 0.4f;
    need(psoup_model_create(context, &config, 3, &model, &error));
    need(psoup_model_save(model, join(argv[1], "base"), tokenizer, &error));
    make_adapter(model, argv[1], "P1A", 7);
    make_adapter(model, argv[1], "P2A", 8);
    psoup_model_free(model);
    psoup_tokenizer_free(tokenizer);
    psoup_context_free(context);
    return 0;
}
