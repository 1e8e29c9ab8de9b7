/* Eight policies of PPO side by side on two threads, beside two single-threaded runs that work through the
 * eight in parallel, four each in turn: rollout tokens a second, and who is done first. The size is the
 * demonstration's: 125 000 parameters, LoRA r = 8 on all linears, up to 48 new tokens, 128 responses and
 * 4 epochs a step. Both train the same policies, to the same bits.
 *
 *   bench_policies [ROLLOUTS [STEPS]]     128 and 2
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench_limits.h"
#include "psoup/psoup.h"

enum { POLICIES = 8, PROMPTS = 256, LONGEST = 40, VOCAB = 680, END = 0, TURNS = 3, SHORTEST = 8, NEW = 48 };

static int32_t rollouts = 128, steps = 2;
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
    config.vocab_size = VOCAB;
    config.hidden_size = 64;
    config.intermediate_size = 128;
    config.num_hidden_layers = 2;
    config.num_attention_heads = 4;
    config.max_position_embeddings = 128;
    config.tie_word_embeddings = 1;
    config.eos_token_id = END;
    config.initializer_range = 0.06f;
    must(psoup_model_create(context, &config, 1, &model, &error), &error);
    lora.rank = 8;
    lora.alpha = 16;
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

/* Trains policies [first, first + n) side by side. */
static void train(psoup_model *model, size_t first, size_t n, account *a) {
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
    options.steps = steps;
    options.batch_size = rollouts;
    options.ppo_epochs = 4;
    options.max_new_tokens = NEW;
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
        train(w->model, w->first + k, 1, &w->account);
    return NULL;
}

static psoup_context *make_context(int32_t threads) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
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
    train(model, 0, POLICIES, &a);
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

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values) {
    qsort(values, TURNS, sizeof *values, ascending);
    return values[TURNS / 2];
}

int main(int argc, char **argv) {
    double ours[2][TURNS], theirs[2][TURNS], ratio[2][TURNS];
    if (argc > 1 && atoi(argv[1]) > 0) /* `make bench` names Python and a script, as to every bench */
        rollouts = atoi(argv[1]);
    if (argc > 2 && atoi(argv[2]) > 0)
        steps = atoi(argv[2]);
    for (int i = 0; i < PROMPTS; i++) {
        size_t n = 24 + (size_t)i % 17;
        for (size_t t = 0; t < n; t++)
            tokens[i][t] = 1 + (int32_t)(((uint32_t)(i * LONGEST) + (uint32_t)t) * 2654435761u >> 16) % (VOCAB - 1);
        prompts[i] = (psoup_ppo_prompt){.tokens = tokens[i], .n = n, .id = i};
    }
    double count = 0;
    for (int t = 0; t < TURNS; t++) {
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
    printf("eight policies, %d responses each, %d steps, %.0f tokens a response\n", rollouts, steps,
           count / (double)(POLICIES * rollouts * steps));
    printf("rollouts       side by side %7.0f  two single-threaded runs %7.0f tokens/s  ratio %.2f (goal 1.50)\n",
           median(ours[0]), median(theirs[0]), median(ratio[0]));
    printf("all of it      side by side %7.2f  two single-threaded runs %7.2f s         ratio %.2f (goal 1.00)\n",
           median(ours[1]), median(theirs[1]), median(ratio[1]));
    return 0;
}
