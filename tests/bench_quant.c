/* A base in blocks of int8 and nf4 beside the same in f32, taking turns: LoRA training, and generation of 16 sequences
 * and of one, at bench_model's size and at one that no cache holds. */
#include <stdio.h>
#include <stdlib.h>

#include "bench_limits.h"
#include "psoup/psoup.h"

enum { VOCAB = 4096, BATCH = 16, LENGTH = 128, PROMPT = 16, TURNS = 3, KINDS = 3 };

static const struct {
    psoup_dtype dtype;
    double bytes; /* of a value */
} kinds[KINDS] = {{PSOUP_F32, 4}, {PSOUP_INT8, 8.5 / 8}, {PSOUP_NF4, 4.5 / 8}};

static const struct {
    int32_t dim, ffn, layers, heads;
} sizes[] = {{256, 688, 6, 4}, {1536, 4096, 3, 12}};

static int32_t tokens[BATCH][LENGTH];

static void must(psoup_status status, const psoup_error *error) {
    if (status != PSOUP_OK) {
        fprintf(stderr, "bench_quant: %s\n", error->message);
        exit(1);
    }
}

static psoup_model *make_model(psoup_context *context, int size, psoup_dtype dtype) {
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_adapter_options lora = PSOUP_ADAPTER_OPTIONS_INIT;
    psoup_error error;
    psoup_model *model;
    config.vocab_size = VOCAB;
    config.hidden_size = sizes[size].dim;
    config.intermediate_size = sizes[size].ffn;
    config.num_hidden_layers = sizes[size].layers;
    config.num_attention_heads = sizes[size].heads;
    config.max_position_embeddings = LENGTH;
    config.linear_dtype = (int32_t)dtype; /* of f32: 0, none */
    must(psoup_model_create(context, &config, 1, &model, &error), &error);
    must(psoup_model_add_adapter(model, "lora", &lora, &error), &error);
    return model;
}

static double first_step, last_step;

static int on_step(void *user, const psoup_step *step) {
    last_step = now();
    if (step->step == 1)
        first_step = last_step;
    return 0;
}

/* Tokens a second; the first step warms up. */
static double train(psoup_model *model, int size) {
    psoup_example examples[BATCH];
    psoup_sft_options options = PSOUP_SFT_OPTIONS_INIT;
    psoup_error error;
    const int rows = size ? 4 : BATCH, steps = size ? 2 : 4;
    for (int i = 0; i < rows; i++)
        examples[i] = (psoup_example){.tokens = tokens[i], .n = LENGTH, .n_prompt = 1};
    options.max_steps = options.epochs = steps;
    options.batch_tokens = rows * LENGTH;
    options.learning_rate = 1e-4f;
    options.keep_best = 0;
    options.on_step = on_step;
    must(psoup_sft(model, "lora", examples, (size_t)rows, NULL, 0, &options, &error), &error);
    return rows * LENGTH * (steps - 1) / (last_step - first_step);
}

/* New tokens a second. */
static double generate(psoup_model *model, int size, int32_t sequences) {
    psoup_prompt prompts[BATCH];
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_generation *generation;
    psoup_error error;
    const float mix[1] = {1};
    sampling.max_new_tokens = size ? 16 : LENGTH - PROMPT;
    sampling.ignore_stop = 1;
    for (int i = 0; i < sequences; i++)
        prompts[i] = (psoup_prompt){.tokens = tokens[i], .n = size ? 1 : PROMPT, .mix = mix, .sequence = (uint64_t)i};
    double start = now();
    must(psoup_generate(model, prompts, (size_t)sequences, &sampling, NULL, NULL, NULL, &generation, &error), &error);
    double seconds = now() - start;
    psoup_generation_free(generation);
    return sequences * sampling.max_new_tokens / seconds;
}

/* The most that a token can gain by blocks: where a step takes its multiply-adds, or the reading of its weights,
 * whichever is longer. A training step is multiply-adds alone. */
static double most(int size, int32_t sequences, int kind) {
    const double dim = sizes[size].dim;
    const double linears = sizes[size].layers * (4 * dim * dim + 3 * dim * sizes[size].ffn), head = dim * VOCAB;
    const double multiply = 1e-9 * 2 * sequences * (linears + head) / limit(NULL, 0);
    double seconds[2];
    for (int k = 0; k < 2; k++) {
        const size_t floats = (size_t)((linears * kinds[k ? kind : 0].bytes + head * 4) / 4);
        float *x = malloc(floats * sizeof *x);
        if (!x)
            exit(1);
        for (size_t i = 0; i < floats; i++)
            x[i] = 1;
        const double reading = 4e-9 * (double)floats / limit(x, floats);
        seconds[k] = reading > multiply ? reading : multiply;
        free(x);
    }
    return seconds[0] / seconds[1];
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values) {
    qsort(values, TURNS, sizeof *values, ascending);
    return values[TURNS / 2];
}

int main(void) {
    psoup_context *context;
    psoup_error error;
    must(psoup_context_create(NULL, &context, &error), &error);
    for (int i = 0; i < BATCH * LENGTH; i++)
        tokens[i / LENGTH][i % LENGTH] = (int32_t)((uint32_t)i * 2654435761u >> 20) % VOCAB;
    for (int size = 0; size < 2; size++) {
        psoup_model *model[KINDS];
        printf("linears in blocks beside f32: dim %d, ffn %d, %d layers; %d threads, %s\n", sizes[size].dim,
               sizes[size].ffn, sizes[size].layers, psoup_context_threads(context), psoup_context_isa(context));
        for (int k = 0; k < KINDS; k++)
            model[k] = make_model(context, size, kinds[k].dtype);
        for (int work = 0; work < 3; work++) {
            static const char *const names[] = {"LoRA training", "generation, 16 sequences", "generation, 1 sequence"};
            double speed[KINDS][TURNS], ratio[KINDS][TURNS];
            for (int t = 0; t < TURNS; t++)
                for (int k = 0; k < KINDS; k++) {
                    speed[k][t] = work == 0 ? train(model[k], size) : generate(model[k], size, work == 1 ? BATCH : 1);
                    ratio[k][t] = speed[k][t] / speed[0][t];
                }
            printf("%-26s f32 %7.1f tokens/s", names[work], median(speed[0]));
            for (int k = 1; k < KINDS; k++)
                printf("  %s %7.1f, ratio %.2f (limit %.2f)", psoup_dtype_name(kinds[k].dtype), median(speed[k]),
                       median(ratio[k]), work == 0 ? 1.0 : most(size, work == 1 ? BATCH : 1, k));
            printf("\n");
        }
        for (int k = 0; k < KINDS; k++)
            psoup_model_free(model[k]);
    }
    psoup_context_free(context);
    return 0;
}
