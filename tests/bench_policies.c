/* Eight policies of PPO side by side on two threads, beside two single-threaded runs that work through the
 * eight in parallel, four each in turn: rollout tokens a second, and who is done first. Both train the same policies, to
 * the same bits. Then what one thread decodes a second of few rows and of many, and the peak of memory of eight policies
 * beside that of one with as many rows in flight.
 *
 *   bench_policies [SIZE [ROLLOUTS [STEPS]]]     demo, 128 and 2; or 110M, 2 and 1
 *
 * demo: the demonstration's 125 000 parameters, LoRA r = 8 on all linears, 8 to 48 new tokens, 4 epochs a step; 110M: 110
 * million parameters, r = 16 on q and v, 8 to 16 new tokens, 2 epochs, one turn.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench_limits.h"
#include "psoup/psoup.h"

enum { POLICIES = 8, PROMPTS = 256, LONGEST = 40, END = 0, TURNS = 3, SHORTEST = 8 };

typedef struct scale {
    const char *name;
    int32_t dim, ffn, layers, heads, vocab, rank, all_linears;
    float range;
    int32_t rollouts, steps, epochs, turns, new;
} scale;
static const scale scales[] = {{"demo", 64, 128, 2, 4, 680, 8, 1, 0.06f, 128, 2, 4, 3, 48},
                               {"110M", 768, 2048, 12, 12, 32000, 16, 0, 0.02f, 2, 1, 2, 1, 16}};
static scale size;
static int32_t tokens[PROMPTS][LONGEST];
static psoup_ppo_prompt prompts[PROMPTS];
static const char *const names[POLICIES] = {"p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7"};

static void must(psoup_status status, const psoup_error *error) {
    if (status != PSOUP_OK) {
        fprintf(stderr, "bench_policies: %s\n", error->message);
        exit(1);
    }
}

/* Its random weights hardly ever end a response: limits are drawn, and lengths spread as the demo's do. */
static psoup_model *make_model(psoup_context *context) {
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_adapter_options lora = PSOUP_ADAPTER_OPTIONS_INIT;
    psoup_error error;
    psoup_model *model;
    config.vocab_size = size.vocab;
    config.hidden_size = size.dim;
    config.intermediate_size = size.ffn;
    config.num_hidden_layers = size.layers;
    config.num_attention_heads = size.heads;
    config.max_position_embeddings = 128;
    config.tie_word_embeddings = 1;
    config.eos_token_id = END;
    config.initializer_range = size.range;
    must(psoup_model_create(context, &config, 1, &model, &error), &error);
    lora.rank = size.rank;
    lora.alpha = 2 * (float)size.rank;
    if (size.all_linears)
        lora.targets = PSOUP_ALL_LINEAR;
    for (uint64_t k = 0; k < POLICIES; k++) {
        lora.seed = k;
        must(psoup_model_add_adapter(model, names[k], &lora, &error), &error);
    }
    return model;
}

static int reward(void *user, const psoup_rollout *r, size_t n, float *scores) {
    (void)user;
    for (size_t i = 0; i < n; i++)
        scores[i] = (float)(r[i].response[0] % 7);
    return 0;
}

enum { PHASES = 4 };
static const char *const phases[PHASES] = {"rollout_seconds", "score_seconds", "evaluate_seconds",
                                           "update_seconds"};

/* What a run took; of two runs in parallel, the longer one. */
typedef struct account {
    const char *subject;
    double seconds, tokens;
    double phase[PHASES];
} account;

static int on_step(void *user, const psoup_step *step) {
    account *a = user;
    for (size_t i = 0; i < step->n; i++)
        if (!strcmp(step->names[i], "tokens"))
            a->tokens += step->values[i];
    for (size_t i = 0; i < step->n_times && !strcmp(step->subject, a->subject); i++)
        for (int k = 0; k < PHASES; k++)
            if (!strcmp(step->time_names[i], phases[k]))
                a->phase[k] += step->times[i];
    return 0;
}

/* Trains policies [first, first + n) side by side, each on so many responses a step. */
static void train(psoup_model *model, size_t first, size_t n, int32_t responses, account *a) {
    psoup_ppo_policy policies[POLICIES];
    psoup_ppo_options options = PSOUP_PPO_OPTIONS_INIT;
    psoup_ppo *run;
    psoup_error error;
    a->subject = names[first]; /* one report of each step has the times of all who took it */
    for (size_t k = 0; k < n; k++)
        policies[k] = (psoup_ppo_policy){.adapter = names[first + k],
                                         .reward_fn = reward,
                                         .prompts = prompts,
                                         .n_prompts = PROMPTS,
                                         .seed = first + k};
    options.steps = size.steps;
    options.batch_size = responses;
    options.ppo_epochs = size.epochs;
    options.max_new_tokens = size.new;
    options.draw_new_tokens_from = SHORTEST;
    options.draw_group = 1;
    options.learning_rate = 8e-4f;
    options.early_stop = PSOUP_EARLY_STOP_OFF;
    options.on_step = on_step;
    options.user = a;
    must(psoup_ppo_create(model, policies, n, &options, &run, &error), &error);
    must(psoup_ppo_run(run, &error), &error);
    psoup_ppo_free(run);
}

/* Half of the policies, one after another, on one thread. */
typedef struct worker {
    size_t first;
    psoup_model *model;
    account account;
} worker;

static void *work(void *arg) {
    worker *w = arg;
    for (size_t k = 0; k < POLICIES / 2; k++)
        train(w->model, w->first + k, 1, size.rollouts, &w->account);
    return NULL;
}

/* Bytes that contexts hold, and the most they held. */
static atomic_llong held, most;

static void *counted_alloc(void *user, size_t bytes, size_t alignment) {
    char *memory = NULL;
    (void)user;
    (void)alignment;
    if (posix_memalign((void **)&memory, 64, bytes + 64) != 0)
        return NULL;
    *(size_t *)(void *)memory = bytes;
    long long now_held = atomic_fetch_add(&held, (long long)bytes) + (long long)bytes, before = atomic_load(&most);
    while (now_held > before && !atomic_compare_exchange_weak(&most, &before, now_held))
        ;
    return memory + 64;
}

static void counted_free(void *user, void *memory) {
    char *start = memory;
    (void)user;
    if (!start)
        return;
    atomic_fetch_sub(&held, (long long)*(size_t *)(void *)(start - 64));
    free(start - 64);
}

static psoup_context *make_context(int32_t threads) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.allocator = (psoup_allocator){.alloc = counted_alloc, .free = counted_free};
    psoup_context *context;
    psoup_error error;
    options.threads = threads;
    must(psoup_context_create(&options, &context, &error), &error);
    return context;
}

static account side_by_side(void) {
    account a = {0};
    psoup_context *context = make_context(THREADS);
    psoup_model *model = make_model(context);
    double start = now();
    train(model, 0, POLICIES, size.rollouts, &a);
    a.seconds = now() - start;
    psoup_model_free(model);
    psoup_context_free(context);
    return a;
}

static account in_parallel(void) {
    worker workers[2] = {{.first = 0}, {.first = POLICIES / 2}};
    psoup_context *context[2];
    pthread_t thread[2];
    account sum = {0};
    for (int i = 0; i < 2; i++)
        workers[i].model = make_model(context[i] = make_context(1));
    double start = now();
    for (int i = 0; i < 2; i++)
        pthread_create(&thread[i], NULL, work, &workers[i]);
    for (int i = 0; i < 2; i++)
        pthread_join(thread[i], NULL);
    sum.seconds = now() - start;
    for (int i = 0; i < 2; i++) {
        const account *a = &workers[i].account;
        sum.tokens += a->tokens;
        for (int k = 0; k < PHASES; k++)
            sum.phase[k] = a->phase[k] > sum.phase[k] ? a->phase[k] : sum.phase[k];
        psoup_model_free(workers[i].model);
        psoup_context_free(context[i]);
    }
    return sum;
}

/* Tokens a second of one thread that decodes so many rows together. */
static double decode(psoup_model *model, int32_t rows) {
    psoup_prompt asked[PROMPTS];
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_session_options session = PSOUP_SESSION_OPTIONS_INIT;
    psoup_error error;
    double best = 0;
    float mix[POLICIES] = {1};
    for (int32_t i = 0; i < rows; i++)
        asked[i] = (psoup_prompt){.tokens = tokens[i], .n = 2, .mix = mix, .sequence = (uint64_t)i};
    sampling.max_new_tokens = size.new;
    sampling.ignore_stop = 1;
    session.max_sequences = rows;
    for (int turn = 0; turn < size.turns; turn++) {
        psoup_generation *g;
        double start = now();
        must(psoup_generate(model, asked, (size_t)rows, &sampling, &session, NULL, NULL, &g, &error), &error);
        double rate = rows * (double)size.new / (now() - start);
        best = rate > best ? rate : best;
        psoup_generation_free(g);
    }
    return best;
}

static void decode_alone(void) {
    static const int32_t rows[] = {1, 2, 4, 8, 16, 32, 64, 128};
    psoup_context *context = make_context(1);
    psoup_model *model = make_model(context);
    printf("one thread decodes, of prompts of two tokens:");
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        printf("  %d rows %.0f", rows[i], decode(model, rows[i]));
    printf(" tokens/s\n");
    psoup_model_free(model);
    psoup_context_free(context);
}

/* Most bytes held, the model's among them, by n policies of so many responses each. */
static double peak(size_t n, int32_t responses) {
    account a = {0};
    psoup_context *context = make_context(THREADS);
    psoup_model *model = make_model(context);
    atomic_store(&most, atomic_load(&held));
    train(model, 0, n, responses, &a);
    psoup_model_free(model);
    psoup_context_free(context);
    return (double)atomic_load(&most) / 1e6;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values) {
    qsort(values, (size_t)size.turns, sizeof *values, ascending);
    return values[size.turns / 2];
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    double ours[2][TURNS], theirs[2][TURNS], ratio[2][TURNS];
    size = scales[argc > 1 && strcmp(argv[1], scales[1].name) == 0]; /* `make bench` names Python and a script */
    if (argc > 2 && atoi(argv[2]) > 0)
        size.rollouts = atoi(argv[2]);
    if (argc > 3 && atoi(argv[3]) > 0)
        size.steps = atoi(argv[3]);
    for (int i = 0; i < PROMPTS; i++) {
        size_t n = 24 + (size_t)i % 17;
        for (size_t t = 0; t < n; t++)
            tokens[i][t] = 1 + (int32_t)(((uint32_t)(i * LONGEST) + (uint32_t)t) * 2654435761u >> 16) % (size.vocab - 1);
        prompts[i] = (psoup_ppo_prompt){.tokens = tokens[i], .n = n, .id = i};
    }
    double count = 0;
    for (int t = 0; t < size.turns; t++) {
        account a = side_by_side(), b = in_parallel();
        count = a.tokens;
        if (a.tokens != b.tokens) {
            fprintf(stderr, "bench_policies: %g tokens side by side, %g in turn\n", a.tokens, b.tokens);
            return 1;
        }
        ours[0][t] = a.tokens / a.phase[0];
        theirs[0][t] = b.tokens / b.phase[0];
        ratio[0][t] = ours[0][t] / theirs[0][t];
        ours[1][t] = a.seconds;
        theirs[1][t] = b.seconds;
        ratio[1][t] = b.seconds / a.seconds;
        printf("rollouts, scores, evaluation, updates: side by side %.2f %.2f %.2f %.2f s  two runs %.2f %.2f "
               "%.2f %.2f s\n", a.phase[0], a.phase[1], a.phase[2], a.phase[3], b.phase[0], b.phase[1], b.phase[2],
               b.phase[3]);
    }
    printf("%s: eight policies, %d responses each, %d steps, %.0f tokens a response\n", size.name, size.rollouts, size.steps,
           count / (double)(POLICIES * size.rollouts * size.steps));
    printf("rollouts       side by side %7.0f  two single-threaded runs %7.0f tokens/s  ratio %.2f (goal 1.50)\n",
           median(ours[0]), median(theirs[0]), median(ratio[0]));
    printf("all of it      side by side %7.2f  two single-threaded runs %7.2f s         ratio %.2f (goal 1.00)\n",
           median(ours[1]), median(theirs[1]), median(ratio[1]));
    decode_alone();
    double eight = peak(POLICIES, size.rollouts), one = peak(1, POLICIES * size.rollouts);
    printf("peak of memory eight policies   %7.1f  one of as many responses %7.1f MB              ratio %.2f (goal 1.30)\n",
           eight, one, eight / one);
    return 0;
}
