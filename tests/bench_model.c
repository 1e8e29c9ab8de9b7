/* Speed of training, generation and side-by-side policies at a small size, with plain PyTorch taking
 * turns in the same run where python3 has it.
 *
 *   bench_model [PYTHON SCRIPT]     e.g. bench_model python3 tests/bench_torch.py
 */
#include <malloc.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench_limits.h"
#include "psoup/psoup.h"

enum { DIM = 256, LAYERS = 6, HEADS = 4, VOCAB = 4096, FFN = 688, BATCH = 16, LENGTH = 128 };
enum { PROMPT = 16, TURNS = 3, POLICIES = 6, RANK = 16 };

static void must(psoup_status status, const psoup_error *error) {
    if (status != PSOUP_OK) {
        fprintf(stderr, "bench_model: %s\n", error->message);
        exit(1);
    }
}

static int32_t tokens[BATCH][LENGTH];

/* The library's memory, and the most that it was. */
static atomic_size_t live, most_live;

static void *count_alloc(void *user, size_t bytes, size_t alignment) {
    void *memory = aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    (void)user;
    if (memory) {
        size_t now_live = atomic_fetch_add(&live, malloc_usable_size(memory)) + malloc_usable_size(memory);
        if (now_live > atomic_load(&most_live))
            atomic_store(&most_live, now_live);
    }
    return memory;
}

static void count_free(void *user, void *memory) {
    (void)user;
    atomic_fetch_sub(&live, malloc_usable_size(memory));
    free(memory);
}

static psoup_model *make_model(psoup_context *context) {
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_error error;
    psoup_model *model;
    config.vocab_size = VOCAB;
    config.hidden_size = DIM;
    config.intermediate_size = FFN;
    config.num_hidden_layers = LAYERS;
    config.num_attention_heads = HEADS;
    config.max_position_embeddings = LENGTH;
    must(psoup_model_create(context, &config, 1, &model, &error), &error);
    return model;
}

/* ---- ours ----------------------------------------------------------------------------------------- */

typedef struct clock_span {
    double first, last;
    int64_t steps;
} clock_span;

static int on_step(void *user, const psoup_step *step) {
    clock_span *span = user;
    if (strcmp(step->phase, "train") != 0)
        return 0;
    if (step->step == 1)
        span->first = now();
    span->last = now();
    span->steps = step->step;
    return 0;
}

/* Tokens a second of LoRA training, r = 16 on q and v; the first step warms up. */
static double train(psoup_model *model, int recompute) {
    psoup_example examples[BATCH];
    psoup_sft_options options = PSOUP_SFT_OPTIONS_INIT;
    psoup_error error;
    clock_span span = {0};
    for (int i = 0; i < BATCH; i++)
        examples[i] = (psoup_example){.tokens = tokens[i], .n = LENGTH, .n_prompt = 1};
    options.max_steps = 4;
    options.epochs = 4;
    options.batch_tokens = BATCH * LENGTH;
    options.learning_rate = 1e-4f;
    options.keep_best = 0;
    options.gradient_checkpointing = recompute;
    options.on_step = on_step;
    options.user = &span;
    must(psoup_sft(model, "lora", examples, BATCH, NULL, 0, &options, &error), &error);
    return (double)(BATCH * LENGTH * (span.steps - 1)) / (span.last - span.first);
}

/* New tokens a second of sampling LENGTH − PROMPT tokens for each of BATCH prompts. */
static double generate(psoup_model *model, const float *mix) {
    psoup_prompt prompts[BATCH];
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_generation *generation;
    psoup_error error;
    sampling.max_new_tokens = LENGTH - PROMPT;
    sampling.ignore_stop = 1;
    for (int i = 0; i < BATCH; i++)
        prompts[i] = (psoup_prompt){
            .tokens = tokens[i], .n = PROMPT, .mix = mix, .sequence = (uint64_t)i};
    double start = now();
    must(psoup_generate(model, prompts, BATCH, &sampling, NULL, NULL, NULL, &generation, &error),
         &error);
    double seconds = now() - start;
    psoup_generation_free(generation);
    return BATCH * (LENGTH - PROMPT) / seconds;
}

static int reward(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    (void)user;
    for (size_t i = 0; i < n; i++)
        scores[i] = (float)(rollouts[i].response[0] % 7);
    return 0;
}

/* Seconds of one PPO step of n policies, some rollouts of 32 new tokens each; a first step warms up. */
static double ppo(psoup_model *model, size_t first, size_t n, int32_t rollouts) {
    static const char *const names[POLICIES] = {"p0", "p1", "p2", "p3", "p4", "p5"};
    psoup_ppo_prompt prompts[BATCH];
    psoup_ppo_policy policies[POLICIES];
    psoup_ppo_options options = PSOUP_PPO_OPTIONS_INIT;
    psoup_ppo *run;
    psoup_error error;
    int64_t left;
    for (int i = 0; i < rollouts; i++)
        prompts[i] = (psoup_ppo_prompt){.tokens = tokens[i], .n = PROMPT, .id = i};
    for (size_t k = 0; k < n; k++)
        policies[k] = (psoup_ppo_policy){.adapter = names[first + k],
                                         .reward_fn = reward,
                                         .prompts = prompts,
                                         .n_prompts = (size_t)rollouts,
                                         .seed = first + k};
    options.steps = 2;
    options.batch_size = rollouts;
    options.max_new_tokens = 32;
    options.ignore_stop = 1;
    options.ppo_epochs = 2;
    options.early_stop = PSOUP_EARLY_STOP_OFF;
    must(psoup_ppo_create(model, policies, n, &options, &run, &error), &error);
    must(psoup_ppo_step(run, &left, &error), &error);
    double start = now();
    must(psoup_ppo_step(run, &left, &error), &error);
    double seconds = now() - start;
    psoup_ppo_free(run);
    return seconds;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n) {
    qsort(values, (size_t)n, sizeof *values, ascending);
    return values[n / 2];
}

/* Gradient checkpointing beside none, in turn; of memory that is counted, which the other benches leave to the
 * library: its own lies on large pages. */
static void train_in_less_memory(void) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_adapter_options lora = PSOUP_ADAPTER_OPTIONS_INIT;
    psoup_context *context;
    psoup_error error;
    options.allocator = (psoup_allocator){NULL, count_alloc, count_free};
    must(psoup_context_create(&options, &context, &error), &error);
    psoup_model *model = make_model(context);
    must(psoup_model_add_adapter(model, "lora", &lora, &error), &error);
    double speed[2][TURNS], ratio[TURNS], megabytes[2];
    for (int t = 0; t < TURNS; t++)
        for (int recompute = 0; recompute < 2; recompute++) {
            size_t before = atomic_load(&live);
            atomic_store(&most_live, before);
            speed[recompute][t] = train(model, recompute);
            megabytes[recompute] = 1e-6 * (double)(atomic_load(&most_live) - before);
            if (recompute)
                ratio[t] = speed[1][t] / speed[0][t];
        }
    printf("gradient checkpointing: %.1f MB  without %.1f MB; tokens/s %.0f  without %.0f  ratio %.2f\n", megabytes[1],
           megabytes[0], median(speed[1], TURNS), median(speed[0], TURNS), median(ratio, TURNS));
    psoup_model_free(model);
    psoup_context_free(context);
}

/* ---- the limits ------------------------------------------------------------------------------------- */

/* Parameters of the linears and the head that a token is multiplied with, and of q's and v's adapters. */
static const double frozen = LAYERS * (4.0 * DIM * DIM + 3.0 * DIM * FFN) + (double)DIM * VOCAB;
static const double adapted = LAYERS * 2.0 * 2 * RANK * DIM;

/* Tokens a second if nothing but the products took time, at the rate of multiply-adds in registers: 4
 * operations a frozen parameter (forward, and back to the input), 6 an adapter's; attention's scores and
 * values over half of the keys on average, forward 2 products, backward 5. */
static double training_limit(void) {
    const double attention = LAYERS * 7 * 2.0 * DIM * LENGTH / 2;
    return 1e9 * limit(NULL, 0) / (4 * frozen + 6 * adapted + attention);
}

/* New tokens a second if a step took only its products' operations, or only the reading of its weights and
 * of the keys and values of half the length, from wherever so much fits; the slower of the two. */
static double generation_limit(void) {
    const size_t floats = (size_t)(frozen + adapted + BATCH * LAYERS * 2.0 * DIM * LENGTH / 2);
    float *x = malloc(floats * sizeof *x);
    if (!x)
        exit(1);
    for (size_t i = 0; i < floats; i++) /* pages never written would all be one page of zeros */
        x[i] = 1;
    const double reading = 4e-9 * (double)floats / limit(x, floats);
    const double attention = LAYERS * 2 * 2.0 * DIM * LENGTH / 2;
    const double products = 1e-9 * BATCH * (2 * (frozen + adapted) + attention) / limit(NULL, 0);
    free(x);
    return BATCH / (reading > products ? reading : products);
}

/* ---- the peer --------------------------------------------------------------------------------------- */

typedef struct peer {
    FILE *to, *from;
} peer;

static peer start_peer(char **command) {
    int in[2], out[2];
    char line[128];
    peer p = {0};
    if (!command || pipe(in) != 0 || pipe(out) != 0)
        return p;
    if (fork() == 0) {
        dup2(in[0], STDIN_FILENO);
        dup2(out[1], STDOUT_FILENO);
        close(in[1]);
        close(out[0]);
        execvp(command[0], command);
        _exit(127);
    }
    close(in[0]);
    close(out[1]);
    p.to = fdopen(in[1], "w");
    p.from = fdopen(out[0], "r");
    if (!fgets(line, sizeof line, p.from))
        return (peer){0};
    printf("peer: %s", line);
    return p;
}

static double ask(peer *p, const char *what) {
    char line[128] = "0";
    if (!p->to)
        return 0;
    fprintf(p->to, "%s\n", what);
    fflush(p->to);
    return fgets(line, sizeof line, p->from) ? atof(line) : 0;
}

static void line(const char *what, double *ours, double *theirs, double most, double *ratio,
                 double goal) {
    if (theirs[0] > 0)
        printf("%-26s ours %7.0f  theirs %7.0f  limit %7.0f tokens/s  ratio %5.2f (goal %.2f; at the limit "
               "%.2f)\n",
               what, median(ours, TURNS), median(theirs, TURNS), most, median(ratio, TURNS), goal,
               most / median(theirs, TURNS));
    else
        printf("%-26s ours %7.0f  limit %7.0f tokens/s  (no PyTorch here: pip install torch)\n", what,
               median(ours, TURNS), most);
}

int main(int argc, char **argv) {
    psoup_context *context;
    psoup_error error;
    psoup_adapter_options lora = PSOUP_ADAPTER_OPTIONS_INIT;
    double ours[TURNS], theirs[TURNS], ratio[TURNS];
    const char *const work[] = {"train", "generate"};
    const double goals[] = {2.0, 5.0};
    must(psoup_context_create(NULL, &context, &error), &error);
    for (int i = 0; i < BATCH * LENGTH; i++)
        tokens[i / LENGTH][i % LENGTH] = (int32_t)((uint32_t)i * 2654435761u >> 20) % VOCAB;
    psoup_model *model = make_model(context);
    must(psoup_model_add_adapter(model, "lora", &lora, &error), &error);
    const float mix[POLICIES + 1] = {1.0f};
    printf("dim 256, 6 layers, vocabulary 4096, LoRA r 16 on q and v, 16 x 128 tokens, f32; %d "
           "threads, %s\n",
           psoup_context_threads(context), psoup_context_isa(context));
    peer p = start_peer(argc > 2 ? argv + 1 : NULL);
    for (int w = 0; w < 2; w++) {
        for (int t = 0; t < TURNS; t++) {
            ours[t] = w ? generate(model, mix) : train(model, 0);
            theirs[t] = ask(&p, work[w]);
            ratio[t] = theirs[t] > 0 ? ours[t] / theirs[t] : 0;
        }
        line(w ? "generation, 16 sequences" : "LoRA training", ours, theirs,
             w ? generation_limit() : training_limit(), ratio, goals[w]);
    }
    if (p.to)
        fclose(p.to);
    train_in_less_memory();
    for (int k = 0; k < POLICIES; k++) {
        char name[8];
        snprintf(name, sizeof name, "p%d", k);
        must(psoup_model_add_adapter(model, name, &lora, &error), &error);
    }
    const int32_t rollouts[] = {2, BATCH}; /* of a policy and step: few leave a batch half empty */
    for (int r = 0; r < 2; r++) {
        for (int t = 0; t < TURNS; t++) {
            ours[t] = ppo(model, 0, POLICIES, rollouts[r]);
            theirs[t] = 0;
            for (size_t k = 0; k < POLICIES; k++)
                theirs[t] += ppo(model, k, 1, rollouts[r]);
            ratio[t] = theirs[t] / ours[t];
        }
        printf("PPO step of six policies, %2d rollouts each: side by side %.2f s  in turn %.2f s  "
               "ratio %.2f\n",
               (int)rollouts[r], median(ours, TURNS), median(theirs, TURNS), median(ratio, TURNS));
    }
    psoup_model_free(model);
    psoup_context_free(context);
    return 0;
}
