/* Speed of a LLaMA-7B with random weights on a GPU: decoding, LoRA training, a PPO step. One line of JSON for
 * each figure, in milliseconds, with the bytes and operations that cannot be done without; tests/gpu/run.py
 * reads them.
 *
 *     llama [--tiny] [--device cuda:0] decode|train|ppo
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "psoup/psoup.h"

enum { ADAPTERS = 8, RANK = 16, MOST_ROWS = 64, TURNS = 3 };

typedef struct sizes {
    psoup_model_config config;
    int32_t batches[2];
    int32_t prompt, window, windows;  /* decode: tokens before, of a window; windows that are timed */
    int32_t turns;                    /* of which the median is taken */
    int32_t rows, length, steps;      /* train: sequences, tokens of one, optimiser steps */
    int32_t rollouts, ppo_prompt, new_tokens;
} sizes;

typedef struct bench {
    sizes at;
    psoup_context *context;
    psoup_model *model;
    double linear; /* parameters of the linears and the head: what a token is multiplied with */
    int32_t *tokens; /* [MOST_ROWS, longest prompt] */
} bench;

static void must(psoup_status status, const psoup_error *error) {
    if (status == PSOUP_OK)
        return;
    fprintf(stderr, "llama: %s\n", error->message);
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n) {
    qsort(values, (size_t)n, sizeof *values, ascending);
    return values[n / 2];
}

static void report(const char *key, double milliseconds, double tokens, double bytes, double operations) {
    printf("{\"key\": \"%s\", \"who\": \"psoup\", \"ms\": %.6g, \"tokens\": %.0f, \"bytes\": %.6g, "
           "\"operations\": %.6g}\n",
           key, milliseconds, tokens, bytes, operations);
    fflush(stdout);
}

/* ---- the model --------------------------------------------------------------------------------------- */

static sizes sizes_of(bool tiny) {
    sizes s = {.config = PSOUP_MODEL_CONFIG_INIT, .batches = {1, MOST_ROWS}};
    s.config.torch_dtype = PSOUP_BF16;
    s.config.vocab_size = tiny ? 64 : 32000;
    s.config.hidden_size = tiny ? 64 : 4096;
    s.config.intermediate_size = tiny ? 96 : 11008;
    s.config.num_hidden_layers = tiny ? 1 : 32;
    s.config.num_attention_heads = tiny ? 1 : 32;
    s.batches[1] = tiny ? 3 : MOST_ROWS;
    s.window = tiny ? 3 : 32;
    s.windows = tiny ? 1 : 4;
    s.prompt = tiny ? 5 : 512 - (s.windows + 2) * s.window / 2; /* 512 keys on average of what is timed */
    s.turns = tiny ? 1 : TURNS;
    s.rows = tiny ? 2 : 8;
    s.length = tiny ? 16 : 512;
    s.steps = tiny ? 3 : 8;
    s.rollouts = tiny ? 2 : 64;
    s.ppo_prompt = tiny ? 4 : 128;
    s.new_tokens = tiny ? 6 : 511;
    return s;
}

static void create(bench *b) {
    psoup_error error;
    const psoup_model_config *c = &b->at.config;
    const double d = c->hidden_size, ffn = c->intermediate_size;
    const double start = now();
    must(psoup_model_create(b->context, c, 1, &b->model, &error), &error);
    fprintf(stderr, "%lld random parameters in %.1f s\n", (long long)psoup_model_parameters(b->model),
            1e-3 * (now() - start));
    b->linear = c->num_hidden_layers * (4 * d * d + 3 * d * ffn) + c->vocab_size * d;
    size_t n = (size_t)MOST_ROWS * 512;
    b->tokens = malloc(n * sizeof *b->tokens);
    if (!b->tokens)
        exit(1);
    for (size_t i = 0; i < n; i++)
        b->tokens[i] = (int32_t)(((uint32_t)i * 2654435761u >> 12) % (uint32_t)c->vocab_size);
}

static void add_adapters(bench *b, int n, uint32_t targets) {
    psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
    psoup_error error;
    options.rank = RANK;
    options.targets = targets;
    for (int i = 0; i < n; i++) {
        char name[16];
        snprintf(name, sizeof name, "p%d", i);
        options.seed = (uint64_t)i;
        must(psoup_model_add_adapter(b->model, name, &options, &error), &error);
    }
}

/* ---- decoding ---------------------------------------------------------------------------------------- */

static int count(void *user, int64_t id, int32_t token, float logprob, psoup_finish finish) {
    (void)id, (void)token, (void)logprob, (void)finish;
    ++*(int64_t *)user;
    return 0;
}

/* Milliseconds of a step of `rows` sequences. The first window is not timed: it is recorded then. */
static double decode(bench *b, int32_t rows, const float *mixes) {
    psoup_session_options options = PSOUP_SESSION_OPTIONS_INIT;
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_session *session;
    psoup_error error;
    size_t running = 1;
    const int32_t more = 1 + b->at.window * (b->at.windows + 1);
    int64_t done = 0, before = 0;
    double start = 0;
    options.max_sequences = rows;
    options.max_tokens = b->at.prompt + more;
    options.steps = b->at.window;
    sampling.max_new_tokens = more;
    sampling.temperature = 0;
    sampling.ignore_stop = 1;
    must(psoup_session_create(b->model, &options, &session, &error), &error);
    for (int32_t i = 0; i < rows; i++) {
        psoup_prompt prompt = {.tokens = b->tokens + (size_t)i * (size_t)b->at.prompt,
                               .n = (size_t)b->at.prompt,
                               .mix = mixes ? mixes + (size_t)i * ADAPTERS : NULL,
                               .sampling = &sampling};
        must(psoup_session_submit(session, i, &prompt, &error), &error);
    }
    while (running > 0) {
        must(psoup_session_step(session, count, &done, &running, &error), &error);
        if (start == 0 && done >= (int64_t)rows * (1 + b->at.window)) {
            start = now();
            before = done;
        }
    }
    double milliseconds = (now() - start) * rows / (double)(done - before);
    psoup_session_free(session);
    return milliseconds;
}

static void decode_all(bench *b) {
    const psoup_model_config *c = &b->at.config;
    const double width = c->hidden_size, ffn = c->intermediate_size, layers = c->num_hidden_layers;
    const double keys = b->at.prompt + (b->at.windows + 2) * b->at.window / 2.0;
    float mixes[MOST_ROWS * ADAPTERS];
    for (int i = 0; i < MOST_ROWS * ADAPTERS; i++)
        mixes[i] = (float)(1 + (i * 7 + i / ADAPTERS) % 11) / 64;
    for (int mixed = 0; mixed < 2; mixed++) {
        if (mixed)
            add_adapters(b, ADAPTERS, PSOUP_ALL_LINEAR);
        const double adapted = mixed * ADAPTERS * RANK * layers * (11 * width + 3 * ffn);
        for (int i = 0; i < 2; i++) {
            const int32_t rows = b->at.batches[i];
            double times[TURNS];
            char key[64];
            for (int t = 0; t < b->at.turns; t++)
                times[t] = decode(b, rows, mixed ? mixes : NULL);
            snprintf(key, sizeof key, "decode, batch %s%s", i ? "64" : "1", mixed ? ", 8 adapters" : "");
            report(key, median(times, b->at.turns), rows,
                   2 * b->linear + 4 * adapted + rows * keys * layers * 4 * width,
                   rows * (2 * b->linear + 2 * adapted + 4 * keys * layers * width));
        }
    }
}

/* ---- training ---------------------------------------------------------------------------------------- */

typedef struct stopwatch {
    double at[64];
    int n;
} stopwatch;

static int on_step(void *user, const psoup_step *step) {
    stopwatch *w = user;
    if (strcmp(step->phase, "train") == 0 && w->n < 64)
        w->at[w->n++] = now();
    return 0;
}

/* 4 operations a parameter and token: forward, and back to the input; the base has no gradient. */
static void train(bench *b) {
    psoup_sft_options options = PSOUP_SFT_OPTIONS_INIT;
    psoup_example examples[MOST_ROWS];
    psoup_error error;
    stopwatch watch = {.n = 0};
    const int32_t length = b->at.length;
    double times[64];
    add_adapters(b, 1, PSOUP_Q_PROJ | PSOUP_V_PROJ);
    for (int32_t i = 0; i < b->at.rows; i++)
        examples[i] = (psoup_example){.tokens = b->tokens + (size_t)i * (size_t)length, .n = (size_t)length,
                                      .n_prompt = 1};
    options.epochs = options.max_steps = b->at.steps;
    options.batch_tokens = b->at.rows * length;
    options.learning_rate = 1e-4f;
    options.keep_best = 0;
    options.on_step = on_step;
    options.user = &watch;
    must(psoup_sft(b->model, "p0", examples, (size_t)b->at.rows, NULL, 0, &options, &error), &error);
    for (int i = 1; i < watch.n; i++)
        times[i - 1] = watch.at[i] - watch.at[i - 1];
    const double tokens = (double)b->at.rows * length;
    report("LoRA training step", median(times + 1, watch.n - 2), tokens, 0, 4 * b->linear * tokens);
}

/* ---- PPO --------------------------------------------------------------------------------------------- */

/* The published step (preset rlphf), but for three things: rewards read tokens, since random weights write no
 * text; all epochs are run; and the step is timed alone, after one of a few rollouts. The responses' lengths
 * are told, for a peer to do the same work. */
static double ppo(bench *b, psoup_reward *reward, int32_t rollouts, bool tell) {
    psoup_ppo_options options = PSOUP_PPO_OPTIONS_INIT;
    psoup_ppo_prompt prompts[MOST_ROWS];
    psoup_ppo_policy policy = {.adapter = "p0", .rewards = &reward, .n_rewards = 1, .prompts = prompts,
                               .n_prompts = (size_t)rollouts, .seed = 1};
    psoup_ppo_trace trace = {.size = sizeof trace};
    psoup_ppo *run;
    psoup_error error;
    int64_t left;
    for (int32_t i = 0; i < rollouts; i++)
        prompts[i] = (psoup_ppo_prompt){.tokens = b->tokens + (size_t)i * (size_t)b->at.ppo_prompt,
                                        .n = (size_t)b->at.ppo_prompt, .id = i};
    must(psoup_ppo_preset("rlphf", &options, &error), &error);
    options.steps = 1;
    options.batch_size = rollouts;
    options.max_new_tokens = b->at.new_tokens;
    options.draw_new_tokens_from = b->at.new_tokens < 32 ? 2 : 32;
    options.whiten_groups = rollouts % 4 ? 1 : 4;
    options.reward_text = 0;
    options.early_stop = PSOUP_EARLY_STOP_OFF;
    must(psoup_ppo_create(b->model, &policy, 1, &options, &run, &error), &error);
    const double start = now();
    must(psoup_ppo_step(run, &left, &error), &error);
    const double milliseconds = now() - start;
    must(psoup_ppo_get_trace(run, 0, &trace, &error), &error);
    if (tell) {
        report("PPO step", milliseconds, (double)trace.tokens, 0, 0);
        printf("{\"lengths\": [");
        for (size_t i = 0; i < trace.rollouts; i++)
            printf("%s%d", i ? ", " : "", (int)(trace.start[i + 1] - trace.start[i]));
        printf("]}\n");
    }
    psoup_ppo_free(run);
    return milliseconds;
}

static void ppo_all(bench *b) {
    psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
    psoup_reward *reward;
    psoup_error error;
    add_adapters(b, 1, PSOUP_Q_PROJ | PSOUP_V_PROJ);
    must(psoup_reward_create(b->model, "reward", &options, &reward, &error), &error);
    ppo(b, reward, 2, false);
    ppo(b, reward, b->at.rollouts, true);
    psoup_reward_free(reward);
}

/* ---- the program ------------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    void (*run)(bench *b);
} stages[] = {{"decode", decode_all}, {"train", train}, {"ppo", ppo_all}};

int main(int argc, char **argv) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_error error;
    bench b = {.at = sizes_of(false)};
    int stage = -1;
    options.device = "cuda:0";
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--tiny") == 0)
            b.at = sizes_of(true);
        else if (strcmp(argv[i], "--device") == 0 && i + 1 < argc)
            options.device = argv[++i];
        for (int k = 0; k < 3; k++)
            if (strcmp(argv[i], stages[k].name) == 0)
                stage = k;
    }
    if (stage < 0) {
        fprintf(stderr, "llama [--tiny] [--device cuda:0] decode|train|ppo\n");
        return 2;
    }
    must(psoup_context_create(&options, &b.context, &error), &error);
    create(&b);
    stages[stage].run(&b);
    psoup_model_free(b.model);
    psoup_context_free(b.context);
    free(b.tokens);
    return 0;
}
