/* Steps of PPO, supervised fine-tuning and reward training, at the demo's size and at 110 million parameters, with the
 * same steps in torch, transformers and peft taking turns in the same run where PYTHON has them.
 *
 *   bench_train [PYTHON SCRIPT [SIZES]]     e.g. bench_train python3 tests/bench_train.py demo
 *
 * SIZES are of demo, 110M; both. PYTHON may be -: no peer. */
#include "bench_peer.h"

#include "base/gemm.h"
#include "psoup/psoup.h"

enum { TURNS = 3, MOST_ROWS = 128, MOST = 128, PHASES = 4, POLICIES = 6 };

typedef struct scale {
    const char *name;
    int32_t dim, ffn, layers, heads, vocab, rank, all_linears;
    int32_t rollouts, prompt, new, epochs; /* of a PPO step; one optimiser step an epoch */
    int32_t rows, length;                  /* of a step of the others; of reward training half are chosen */
    double ppo_goal, other_goal;
} scale;
static const scale scales[] = {
    {"demo", 64, 128, 2, 4, 680, 8, 1, 128, 24, 48, 4, 32, 64, 3, 3},
    {"110M", 768, 2048, 12, 12, 32000, 16, 0, 8, 32, 32, 2, 8, 64, 1.2, 1.2},
};

static int32_t tokens[MOST_ROWS][MOST];

static psoup_model *make_model(psoup_context *context, const scale *s) {
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_adapter_options lora = PSOUP_ADAPTER_OPTIONS_INIT;
    psoup_error error;
    psoup_model *model;
    char name[16];
    config.vocab_size = s->vocab;
    config.hidden_size = s->dim;
    config.intermediate_size = s->ffn;
    config.num_hidden_layers = s->layers;
    config.num_attention_heads = s->heads;
    config.max_position_embeddings = 256;
    config.tie_word_embeddings = 1;
    must(psoup_model_create(context, &config, 1, &model, &error), &error);
    lora.rank = s->rank;
    lora.alpha = 2 * (float)s->rank;
    if (s->all_linears)
        lora.targets = PSOUP_ALL_LINEAR;
    for (int k = 0; k < POLICIES; k++) {
        snprintf(name, sizeof name, "p%d", k);
        must(psoup_model_add_adapter(model, name, &lora, &error), &error);
    }
    for (int i = 0; i < MOST_ROWS * MOST; i++)
        tokens[i / MOST][i % MOST] = 1 + (int32_t)(((uint64_t)((uint32_t)i * 2654435761u) * (uint64_t)(s->vocab - 1)) >> 32);
    return model;
}

/* ---- ours ----------------------------------------------------------------------------------------- */

typedef struct watch {
    double seconds[1 + PHASES]; /* of the last step */
    double first, last;
    int64_t steps;
} watch;

static int on_step(void *user, const psoup_step *step) {
    static const char *const names[PHASES] = {"rollout_seconds", "score_seconds", "evaluate_seconds", "update_seconds"};
    watch *w = user;
    if (strcmp(step->phase, "train") != 0)
        return 0;
    if (step->step == 1)
        w->first = now();
    w->last = now();
    w->steps = step->step;
    for (size_t i = 0; i < step->n_times; i++)
        for (int p = 0; p < PHASES; p++)
            if (strcmp(step->time_names[i], names[p]) == 0)
                w->seconds[1 + p] = step->times[i];
    return 0;
}

/* Seconds of one PPO step of n policies and of its phases; a first step warms up. */
static void ppo(const scale *s, psoup_model *model, psoup_reward *reward, size_t n, double seconds[1 + PHASES]) {
    static const char *const names[POLICIES] = {"p0", "p1", "p2", "p3", "p4", "p5"};
    psoup_ppo_prompt prompts[MOST_ROWS];
    psoup_ppo_policy policies[POLICIES];
    psoup_ppo_options options = PSOUP_PPO_OPTIONS_INIT;
    psoup_ppo *run;
    psoup_error error;
    int64_t left;
    watch w = {0};
    for (int i = 0; i < s->rollouts; i++)
        prompts[i] = (psoup_ppo_prompt){.tokens = tokens[i], .n = (size_t)s->prompt, .id = i};
    for (size_t k = 0; k < n; k++)
        policies[k] = (psoup_ppo_policy){.adapter = names[k], .rewards = &reward, .n_rewards = 1, .prompts = prompts,
                                         .n_prompts = (size_t)s->rollouts, .seed = k};
    options.steps = 2;
    options.batch_size = s->rollouts;
    options.max_new_tokens = s->new;
    options.ignore_stop = 1;
    options.ppo_epochs = s->epochs;
    options.early_stop = PSOUP_EARLY_STOP_OFF;
    options.keep_best = 0;
    options.on_step = on_step;
    options.user = &w;
    must(psoup_ppo_create(model, policies, n, &options, &run, &error), &error);
    must(psoup_ppo_step(run, &left, &error), &error);
    double start = now();
    must(psoup_ppo_step(run, &left, &error), &error);
    w.seconds[0] = now() - start;
    psoup_ppo_free(run);
    memcpy(seconds, w.seconds, sizeof w.seconds);
}

/* Seconds of an optimiser step, of three after the first. */
static double sft(const scale *s, psoup_model *model) {
    psoup_example examples[MOST_ROWS];
    psoup_sft_options options = PSOUP_SFT_OPTIONS_INIT;
    psoup_error error;
    watch w = {0};
    for (int i = 0; i < s->rows; i++)
        examples[i] = (psoup_example){.tokens = tokens[i], .n = (size_t)s->length, .n_prompt = 1};
    options.max_steps = options.epochs = 4;
    options.batch_tokens = s->rows * s->length;
    options.keep_best = 0;
    options.on_step = on_step;
    options.user = &w;
    must(psoup_sft(model, "p0", examples, (size_t)s->rows, NULL, 0, &options, &error), &error);
    return (w.last - w.first) / (double)(w.steps - 1);
}

static double train_reward(const scale *s, psoup_reward *reward) {
    psoup_comparison pairs[MOST_ROWS];
    psoup_reward_options options = PSOUP_REWARD_OPTIONS_INIT;
    psoup_error error;
    watch w = {0};
    const size_t n = (size_t)s->rows / 2;
    for (size_t i = 0; i < n; i++)
        pairs[i] = (psoup_comparison){.chosen = tokens[2 * i], .n_chosen = (size_t)s->length,
                                      .rejected = tokens[2 * i + 1], .n_rejected = (size_t)s->length};
    options.max_steps = options.epochs = 4;
    options.batch_size = (int32_t)n;
    options.keep_best = 0;
    options.on_step = on_step;
    options.user = &w;
    must(psoup_reward_train(&reward, 1, pairs, n, NULL, 0, &options, &error), &error);
    return (w.last - w.first) / (double)(w.steps - 1);
}

/* ---- what it takes at least ----------------------------------------------------------------------------- */

/* Operations of a token in a forward pass: of the linears, of an adapter, of attention to `keys`, of the head. */
typedef struct costs {
    double linear, lora, attention, head;
} costs;

static costs costs_of(const scale *s, double keys) {
    const double dim = s->dim, ffn = s->ffn, layers = s->layers, r = s->rank;
    const double through = s->all_linears ? 4 * 2 * dim + 3 * (dim + ffn) : 2 * 2 * dim;
    return (costs){2 * layers * (4 * dim * dim + 3 * dim * ffn), 2 * layers * r * through, layers * 4 * dim * keys,
                   2 * dim * s->vocab};
}

/* An update's: gradients of activations take another pass of the frozen weights, those of factors another of theirs. */
static double update_of(costs c, double rows_tokens, double heads_tokens) {
    return rows_tokens * (2 * c.linear + 3 * c.lora + 3 * c.attention) + 2 * heads_tokens * c.head;
}

/* Operations of a PPO step: sampling with a cache, the reward, old and reference log-probabilities, the epochs. */
static double ppo_operations(const scale *s) {
    const double all = s->rollouts * (double)(s->prompt + s->new), answers = s->rollouts * (double)s->new;
    const costs c = costs_of(s, (s->prompt + s->new) / 2.0);
    const double pass = c.linear + c.attention;
    return (all * (pass + c.lora) + answers * c.head) + all * (pass + c.lora) + 2 * all * pass + all * c.lora +
           2 * answers * c.head + s->epochs * update_of(c, all, answers);
}

static double other_operations(const scale *s, bool head) {
    const double all = s->rows * (double)s->length;
    return update_of(costs_of(s, s->length / 2.0), all, head ? all : 0);
}

/* Our own product's operations a second, [1024, 1024, 1024]: as fast as OpenBLAS's, see bench_gemm. */
static double sgemm_rate(psoup_context *context) {
    enum { N = 1024 };
    float *a = buffer(N * N * 4, 0x3c), *b = buffer(N * N * 4, 0x3c), *c = buffer(N * N * 4, 0);
    double best = 0;
    for (int turn = 0; turn < 5; turn++) {
        const psoup__gemm_args args = {.m = N, .n = N, .k = N, .c = c, .c_stride = N, .a = a, .a_row = N, .a_col = 1,
                                       .alpha = 1, .b = b, .b_row = N, .b_col = 1};
        double start = now();
        psoup__gemm(context, &args);
        least(&best, now() - start);
    }
    free(a);
    free(b);
    free(c);
    return 2.0 * N * N * N / best;
}

/* ---- side by side ---------------------------------------------------------------------------------------- */

static void theirs(const scale *s, const char *what, double seconds[1 + PHASES]) {
    char question[200];
    snprintf(question, sizeof question, "%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d,%d %s", s->dim, s->ffn, s->layers, s->heads,
             s->vocab, s->rank, s->all_linears, s->rollouts, s->prompt, s->new, s->epochs, s->rows, s->length, what);
    memset(seconds, 0, (1 + PHASES) * sizeof *seconds);
    sscanf(ask(question), "%lf %lf %lf %lf %lf", &seconds[0], &seconds[1], &seconds[2], &seconds[3], &seconds[4]);
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double values[TURNS]) {
    double sorted[TURNS];
    memcpy(sorted, values, sizeof sorted);
    qsort(sorted, TURNS, sizeof *sorted, ascending);
    return sorted[TURNS / 2];
}

/* rows: [TURNS, 1 + PHASES] */
static double column(double rows[TURNS][1 + PHASES], int c) {
    double values[TURNS];
    for (int t = 0; t < TURNS; t++)
        values[t] = rows[t][c];
    return median(values);
}

static void line(const char *what, double ours[TURNS][1 + PHASES], double peers[TURNS][1 + PHASES], double goal,
                 double operations, double rate) {
    double ratios[TURNS];
    const double mine = column(ours, 0);
    for (int t = 0; t < TURNS; t++)
        ratios[t] = peers[t][0] / ours[t][0];
    printf("  %-16s ours %8.4f s, %.2f of sgemm's rate", what, mine, operations / mine / rate);
    if (peers[0][0] > 0)
        printf("   theirs %8.4f s   ratio %.2f (goal %.1f)\n", column(peers, 0), median(ratios), goal);
    else
        printf("   %s\n", from_peer == NULL ? "(no torch, transformers, peft and trl)" : "");
}

static void shares(const char *who, double rows[TURNS][1 + PHASES]) {
    if (column(rows, 0) > 0)
        printf("    %-8s rollout %.0f %%, scoring %.0f %%, old and reference log-probabilities %.0f %%, update %.0f %%\n", who,
               100 * column(rows, 1) / column(rows, 0), 100 * column(rows, 2) / column(rows, 0),
               100 * column(rows, 3) / column(rows, 0), 100 * column(rows, 4) / column(rows, 0));
}

static void bench(psoup_context *context, const scale *s) {
    psoup_adapter_options lora = PSOUP_ADAPTER_OPTIONS_INIT;
    psoup_reward *reward;
    psoup_error error;
    double ours[3][TURNS][1 + PHASES] = {0}, peers[3][TURNS][1 + PHASES] = {0}, six[TURNS][1 + PHASES], best = 0;
    psoup_model *model = make_model(context, s);
    lora.rank = s->rank;
    lora.alpha = 2 * (float)s->rank;
    if (s->all_linears)
        lora.targets = PSOUP_ALL_LINEAR;
    must(psoup_reward_create(model, "reward", &lora, &reward, &error), &error);
    for (int t = 0; t < TURNS; t++) {
        const double rate = sgemm_rate(context);
        best = rate > best ? rate : best;
        ppo(s, model, reward, 1, ours[0][t]);
        theirs(s, "ppo", peers[0][t]);
        ours[1][t][0] = sft(s, model);
        theirs(s, "sft", peers[1][t]);
        ours[2][t][0] = train_reward(s, reward);
        theirs(s, "reward", peers[2][t]);
    }
    printf("%s: dim %d, feed-forward %d, %d layers, vocabulary %d, LoRA r = %d on %s; sgemm %.0f GFLOP/s\n", s->name, s->dim,
           s->ffn, s->layers, s->vocab, s->rank, s->all_linears ? "all linears" : "q and v", best / 1e9);
    printf("  PPO: %d rollouts of %d + %d tokens, %d epochs; the others %d rows of %d tokens\n", s->rollouts, s->prompt, s->new,
           s->epochs, s->rows, s->length);
    line("PPO step", ours[0], peers[0], s->ppo_goal, ppo_operations(s), best);
    shares("ours", ours[0]);
    shares("theirs", peers[0]);
    line("SFT step", ours[1], peers[1], s->other_goal, other_operations(s, true), best);
    line("reward step", ours[2], peers[2], s->other_goal, other_operations(s, false), best);
    if (strcmp(s->name, "demo") == 0) {
        for (int t = 0; t < TURNS; t++)
            ppo(s, model, reward, POLICIES, six[t]);
        line("PPO step of six", six, (double[TURNS][1 + PHASES]){{0}}, 0, POLICIES * ppo_operations(s), best);
        printf("    for each policy %.4f s\n", column(six, 0) / POLICIES);
    }
    psoup_reward_free(reward);
    psoup_model_free(model);
}

int main(int argc, char **argv) {
    psoup_context_options settings = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *context;
    psoup_error error;
    char first[512];
    setvbuf(stdout, NULL, _IOLBF, 0);
    settings.threads = THREADS;
    must(psoup_context_create(&settings, &context, &error), &error);
    if (argc > 2 && strcmp(argv[1], "-") != 0) {
        python = argv[1];
        script = argv[2];
        start_peer();
    }
    printf("%d threads, %s, f32\n", THREADS, psoup_context_isa(context));
    if (from_peer != NULL && fgets(first, sizeof first, from_peer) != NULL)
        printf("peer: %s", first);
    for (size_t i = 0; i < sizeof scales / sizeof *scales; i++)
        if (argc < 4 || strstr(argv[3], scales[i].name) != NULL)
            bench(context, &scales[i]);
    psoup_context_free(context);
    return 0;
}
