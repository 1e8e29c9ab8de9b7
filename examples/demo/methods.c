/* methods.c: the policies. All are LoRA adapters over the one base. */
#include "demo.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

static void add_adapter(demo_run *run, const char *name, uint64_t seed) {
    psoup_error error;
    psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
    options.rank = 8;
    options.alpha = 16;
    options.targets = PSOUP_ALL_LINEAR;
    options.seed = run->seed * 8191 + seed;
    must(psoup_model_add_adapter(run->model, name, &options, &error), &error);
}

/* ---- PPO
 * ------------------------------------------------------------------------------------------- */

/* What the trainer's reports are gathered into. */
typedef struct watch {
    demo_run *run;
    psoup_objective objective;
    const char *names[WORLD_PREFERENCES];
    demo_cost *costs[WORLD_PREFERENCES];
    demo_curve *curves[WORLD_PREFERENCES]; /* PPO's */
    double prompt_tokens; /* of a rollout, on average */
    double scored_tokens; /* of the prompts its reward models read, likewise */
    double reward_passes; /* reward models that read a response */
    int keep_at; /* step after which the policies are kept in files; 0: none */
    size_t n;
} watch;

/* Where a policy is kept as it was after some of its steps; 0: after all. */
static const char *kept_path(const demo_run *run, const char *symbol, int step, char path[1024]) {
    if (step)
        snprintf(path, 1024, "%s/%s-%d", run->directory, symbol, step);
    else
        snprintf(path, 1024, "%s/%s", run->directory, symbol);
    return path;
}

static void keep_policy(demo_run *run, const char *symbol, int step) {
    psoup_error error;
    char path[1024];
    must(psoup_model_save_adapter(run->model, symbol, kept_path(run, symbol, step, path), NULL, &error),
         &error);
}

static double metric(const psoup_step *step, const char *name) {
    for (size_t i = 0; i < step->n; i++)
        if (!strcmp(step->names[i], name))
            return step->values[i];
    return 0;
}

static int watch_step(void *user, const psoup_step *step) {
    watch *w = user;
    for (size_t i = 0; i < w->n && !strcmp(step->phase, "train"); i++) {
        demo_curve *curve = w->curves[i];
        if (strcmp(w->names[i], step->subject))
            continue;
        if (curve && curve->n < CURVE_POINTS) {
            curve->reward[curve->n] = metric(step, "reward");
            curve->kl[curve->n++] = metric(step, "kl_token");
        }
        /* Forward: sampling, log π, log π_ref, and the reward models; forward and backward, with
         * the base's weights frozen: every epoch. */
        double rollouts = w->run->scale.rollouts, response = metric(step, "tokens");
        double own = rollouts * w->prompt_tokens + response, epochs = metric(step, "epochs");
        double scored = rollouts * w->scored_tokens + w->reward_passes * response;
        demo_count(w->run, w->costs[i], 1, (int64_t)(3 * own + scored));
        demo_count(w->run, w->costs[i], 2, (int64_t)(epochs * own));
        w->costs[i]->updates += (int64_t)epochs;
    }
    return demo_progress(NULL, step->subject, step->step, step->total);
}

static demo_curve *new_curve(demo_run *run, const char *name) {
    if (run->n_curves == CURVES)
        run->n_curves--; /* never with this program's methods */
    demo_curve *curve = &run->curves[run->n_curves++];
    snprintf(curve->name, sizeof curve->name, "%s", name);
    return curve;
}

static void run_ppo(demo_run *run, const psoup_ppo_policy *policies, size_t n, int steps,
                    watch *w) {
    psoup_error error;
    psoup_ppo *ppo;
    psoup_ppo_options options = PSOUP_PPO_OPTIONS_INIT;
    double begun = demo_now();
    options.steps = steps;
    options.objective = w->objective;
    options.group_size = 4;
    if (w->objective == PSOUP_OBJECTIVE_GRPO) /* by its own deviation a group that hardly differs weighs most */
        options.scale_rewards = PSOUP_SCALE_BATCH;
    options.batch_size = run->scale.rollouts;
    options.ppo_epochs = 4;
    options.learning_rate = 8e-4f;
    options.kl_coefficient = 0.4f;
        options.max_new_tokens = 48;
    options.truncation_penalty = 1;
    options.reward_max_tokens = 128;
    options.early_stop = PSOUP_EARLY_STOP_ALL;
    options.on_step = watch_step;
    options.user = w;
    w->run = run;
    w->n = n;
    for (size_t i = 0; i < n; i++) {
        w->names[i] = policies[i].adapter;
        w->curves[i] = w->objective == PSOUP_OBJECTIVE_PPO ? new_curve(run, policies[i].adapter) : NULL;
    }
    double tokens = 0, scored = 0, inputs = 0, count = (double)policies[0].n_prompts;
    for (size_t j = 0; j < policies[0].n_prompts; j++) {
        const psoup_ppo_prompt *prompt = &policies[0].prompts[j];
        tokens += (double)prompt->n;
        for (size_t i = 0; i < prompt->n_inputs; i++)
            scored += (double)prompt->inputs[i].n;
        inputs += (double)(prompt->n_inputs ? prompt->n_inputs : 1);
        scored += prompt->n_inputs ? 0 : (double)prompt->n;
    }
    w->prompt_tokens = tokens / count;
    w->scored_tokens = scored / count;
    w->reward_passes = inputs / count;
    must(psoup_ppo_create(run->model, policies, n, &options, &ppo, &error), &error);
    for (int64_t step = 1, left = 1; left; step++) {
        must(psoup_ppo_step(ppo, &left, &error), &error);
        if (step != w->keep_at)
            continue;
        for (size_t i = 0; i < n; i++) {
            keep_policy(run, policies[i].adapter, w->keep_at);
            run->soup_before.flop += w->costs[i]->flop;
            run->soup_before.tokens += w->costs[i]->tokens;
            run->soup_before.updates += w->costs[i]->updates;
            run->soup_before.seconds += (demo_now() - begun) / (double)n;
        }
    }
    must(psoup_ppo_run(ppo, &error), &error); /* none of them diverged */
    psoup_ppo_free(ppo);
    for (size_t i = 0; i < n; i++)
        w->costs[i]->seconds += (demo_now() - begun) / (double)n;
}

/* The training prompts, each with the n preferences' prompts. */
static psoup_ppo_prompt *ppo_prompts(demo_run *run, const int32_t *preferences, size_t n) {
    psoup_ppo_prompt *prompts = demo_take(run, run->n_train * sizeof *prompts);
    for (size_t i = 0; i < run->n_train; i++) {
        demo_tokens tokens = demo_prompt(run, &run->train[i], preferences, n);
        prompts[i] = (psoup_ppo_prompt){.tokens = tokens.ids, .n = tokens.n, .id = (int64_t)i};
    }
    return prompts;
}

/* The policy of preference k as this adapter, which is new. */
static psoup_ppo_policy own_policy(demo_run *run, const char *adapter, int32_t k) {
    add_adapter(run, adapter, (uint64_t)k);
    return (psoup_ppo_policy){.adapter = adapter,
                              .rewards = &run->rewards[k],
                              .n_rewards = 1,
                              .prompts = ppo_prompts(run, &k, 1),
                              .n_prompts = run->n_train,
                              .seed = run->seed * 100 + (uint64_t)k};
}

void train_policies(demo_run *run, int from, int to) {
    psoup_ppo_policy policies[WORLD_PREFERENCES];
    watch w = {.keep_at = from ? 0 : run->scale.soup_after};
    size_t n = (size_t)(to - from);
    double begun = demo_now();
    for (size_t i = 0; i < n; i++) {
        int32_t k = from + (int32_t)i;
        policies[i] = own_policy(run, world_preferences[k].symbol, k);
        w.costs[i] = &run->policy_cost[k];
    }
    run_ppo(run, policies, n, run->scale.policy_steps, &w);
    demo_say("P-SOUPS   %zu policies side by side, %d PPO steps each, %.0f s", n,
             run->scale.policy_steps, demo_now() - begun);
}

void train_rlhf(demo_run *run) {
    watch w = {.costs = {&run->rlhf_cost}};
    add_adapter(run, "RLHF", 20);
    psoup_ppo_policy policy = {.adapter = "RLHF",
                               .rewards = &run->general,
                               .n_rewards = 1,
                               .prompts = ppo_prompts(run, NULL, 0),
                               .n_prompts = run->n_train,
                               .seed = run->seed * 100 + 20};
    run_ppo(run, &policy, 1, run->scale.policy_steps, &w);
    demo_say("RLHF      one policy of general helpfulness, %.0f s", run->rlhf_cost.seconds);
}

/* The training prompts of every user of the first n_preferences preferences; rewards are read told by one
 * preference prompt each: by one model for all, or, of a soup, by each preference's own. */
static psoup_ppo_prompt *user_prompts(demo_run *run, int n_preferences, int own, size_t *count) {
    int styles = n_preferences - 4, users = 4 * styles;
    size_t n = *count = run->n_train * (size_t)users;
    psoup_ppo_prompt *prompts = demo_take(run, n * sizeof *prompts);
    psoup_reward_input *inputs = demo_take(run, 3 * n * sizeof *inputs);
    for (size_t i = 0; i < n; i++) {
        int user = (int)(i % (size_t)users);
        const world_prompt *asked = &run->train[i / (size_t)users];
        int32_t wishes[3] = {user / (2 * styles), 2 + user / styles % 2, 4 + user % styles};
        demo_tokens tokens = demo_prompt(run, asked, wishes, 3);
        for (int d = 0; d < 3; d++) {
            demo_tokens read = demo_prompt(run, asked, &wishes[d], 1);
            inputs[3 * i + (size_t)d] =
                (psoup_reward_input){own ? wishes[d] : 0, 1.0f / 3, read.ids, read.n};
        }
        prompts[i] = (psoup_ppo_prompt){.tokens = tokens.ids,
                                        .n = tokens.n,
                                        .id = (int64_t)i,
                                        .inputs = &inputs[3 * i],
                                        .n_inputs = 3};
    }
    return prompts;
}

void train_morl(demo_run *run, const char *adapter, int n_preferences, int steps, demo_cost *cost) {
    watch w = {.costs = {cost}};
    size_t n;
    psoup_ppo_prompt *prompts = user_prompts(run, n_preferences, 0, &n);
    add_adapter(run, adapter, 30 + (uint64_t)n_preferences + (uint64_t)steps);
    psoup_ppo_policy policy = {.adapter = adapter,
                               .rewards = &run->told,
                               .n_rewards = 1,
                               .prompts = prompts,
                               .n_prompts = n,
                               .seed = run->seed * 100 + 30};
    run_ppo(run, &policy, 1, steps, &w);
    demo_say("P-MORL    one policy over %d users, %d PPO steps, %.0f s", 4 * (n_preferences - 4), steps,
             cost->seconds);
}

void train_soup(demo_run *run, const char *name, int from, int steps, demo_cost *cost) {
    psoup_error error;
    watch w = {.costs = {cost}};
    const char *adapters[6];
    char path[1024];
    psoup_ppo_soup soup = PSOUP_PPO_SOUP_INIT; /* any mix of a user's three */
    for (int k = 0; k < 6; k++) {
        char *adapter = demo_take(run, 32);
        snprintf(adapter, 32, "%s %s", name, world_preferences[k].symbol);
        must(psoup_model_load_adapter(run->model, adapters[k] = adapter,
                                      kept_path(run, world_preferences[k].symbol, from, path), &error),
             &error);
    }
    soup.adapters = adapters;
    soup.n = 6;
    psoup_ppo_policy policy = {.adapter = name,
                               .soup = &soup,
                               .rewards = run->rewards,
                               .n_rewards = 6,
                               .seed = run->seed * 100 + 40};
    policy.prompts = user_prompts(run, 6, 1, &policy.n_prompts);
    run_ppo(run, &policy, 1, steps, &w);
    demo_say("soup      trained as one for %d steps, from the policies after %d, %.0f s", steps,
             from ? from : run->scale.policy_steps, cost->seconds);
}

/* ---- the other objectives ------------------------------------------------------------------------- */

const char *const demo_objectives[DEMO_OBJECTIVES] = {"RLOO", "GRPO", "DPO", "best of 4"};

const char *objective_adapter(int objective, int k, char name[32]) {
    snprintf(name, 32, "%s %s", demo_objectives[objective], world_preferences[k].symbol);
    return name;
}

static int watch_dpo(void *user, const psoup_step *step) {
    demo_cost *cost = user;
    cost->updates += !strcmp(step->phase, "train");
    return demo_progress(NULL, step->subject, step->step, step->total);
}

/* From the comparisons that the reward models were trained on, DPO_PAIRS of each preference. */
enum { DPO_PAIRS = 3840 };
static void train_dpo(demo_run *run, const char *const *adapters) {
    psoup_error error;
    demo_cost *cost = &run->objective_cost[DEMO_DPO];
    psoup_dpo_pair *pairs = demo_take(run, 6 * DPO_PAIRS * sizeof *pairs);
    size_t n = 0, of[6] = {0};
    int64_t tokens = 0;
    psoup_jsonl_reader *reader = demo_open(run, "feedback");
    for (psoup_json *row; (row = demo_next(reader)); psoup_json_free(row)) {
        const char *symbol = psoup_json_string(psoup_json_get(row, "preference"), "");
        int32_t k = 0;
        while (k < 6 && strcmp(symbol, world_preferences[k].symbol))
            k++;
        if (k == 6 || of[k]++ >= DPO_PAIRS)
            continue;
        const char *better = psoup_json_string(psoup_json_get(row, "completion_a"), "");
        const char *worse = psoup_json_string(psoup_json_get(row, "completion_b"), "");
        demo_tokens prompt = demo_encode(run, psoup_json_string(psoup_json_get(row, "user_input"), ""));
        demo_tokens none = {NULL, 0};
        demo_tokens a = demo_join(run, none, demo_encode(run, better), 1);
        demo_tokens b = demo_join(run, none, demo_encode(run, worse), 1);
        pairs[n++] = (psoup_dpo_pair){.prompt = prompt.ids,
                                      .n_prompt = prompt.n,
                                      .chosen = a.ids,
                                      .n_chosen = a.n,
                                      .rejected = b.ids,
                                      .n_rejected = b.n,
                                      .policy = k};
        tokens += (int64_t)(2 * prompt.n + a.n + b.n);
    }
    psoup_jsonl_reader_free(reader);

    psoup_dpo_options options = PSOUP_DPO_OPTIONS_INIT;
    options.batch_size = 32;
    options.learning_rate = 3e-4f;
    options.beta = 1.0f; /* with less it learns to write what nobody asked for: these pairs are not its own */
    options.warmup_steps = 10;
    options.seed = run->seed;
    options.on_step = watch_dpo;
    options.user = cost;
    must(psoup_dpo(run->model, adapters, 6, pairs, n, NULL, 0, &options, &error), &error);
    demo_count(run, cost, 3, tokens); /* the reference's, and the policy's there and back */
}

void train_objective(demo_run *run, int objective) {
    psoup_ppo_policy policies[6];
    const char *adapters[6];
    char names[6][32];
    demo_cost *cost = &run->objective_cost[objective];
    watch w = {.objective = objective == DEMO_RLOO ? PSOUP_OBJECTIVE_RLOO : PSOUP_OBJECTIVE_GRPO};
    double begun = demo_now();
    if (objective == DEMO_BEST) {
        demo_say("%s of the base's answers, by the reward models", demo_objectives[objective]);
        return;
    }
    for (int k = 0; k < 6; k++) {
        policies[k] = own_policy(run, adapters[k] = objective_adapter(objective, k, names[k]), k);
        w.costs[k] = cost;
    }
    if (objective == DEMO_DPO)
        train_dpo(run, adapters);
    else
        run_ppo(run, policies, 6, run->scale.policy_steps, &w);
    cost->seconds = demo_now() - begun;
    demo_say("%-9s six policies side by side, %.0f GFLOP, %.0f s", demo_objectives[objective], 1e-9 * cost->flop,
             cost->seconds);
}

void drop_objective(demo_run *run, int objective) {
    psoup_error error;
    char name[32];
    for (int k = 0; k < 6 && objective != DEMO_BEST; k++)
        must(psoup_model_remove_adapter(run->model, objective_adapter(objective, k, name), &error), &error);
}

/* ---- multi-task
 * ------------------------------------------------------------------------------------- */

static int watch_sft(void *user, const psoup_step *step) {
    demo_cost *cost = user;
    if (!strcmp(step->phase, "train"))
        cost->updates = step->step;
    return demo_progress(NULL, step->subject, step->step, step->total);
}

/* Supervised, on the judged-better positive of every pair with its one preference prompt. */
void train_mt(demo_run *run) {
    psoup_error error;
    double begun = demo_now();
    psoup_example *examples = demo_take(run, run->comparisons * sizeof *examples);
    size_t n = 0;
    int64_t tokens = 0;
    psoup_jsonl_reader *reader = demo_open(run, "feedback");
    for (psoup_json *row; (row = demo_next(reader)); psoup_json_free(row)) {
        if (strcmp(psoup_json_string(psoup_json_get(row, "kind"), ""), "positive-positive"))
            continue;
        demo_tokens prompt =
            demo_encode(run, psoup_json_string(psoup_json_get(row, "user_input"), ""));
        demo_tokens all = demo_join(
            run, prompt,
            demo_encode(run, psoup_json_string(psoup_json_get(row, "completion_a"), "")), 1);
        examples[n++] = (psoup_example){all.ids, all.n, prompt.n};
        tokens += (int64_t)all.n;
    }
    psoup_jsonl_reader_free(reader);

    psoup_sft_options options = PSOUP_SFT_OPTIONS_INIT;
    options.epochs = 2;
    options.batch_tokens = 1024;
    options.learning_rate = 3e-3f;
    options.schedule = PSOUP_SCHEDULE_LINEAR;
    options.seed = run->seed;
    options.on_step = watch_sft;
    options.user = &run->mt_cost;
    add_adapter(run, "MT", 40);
    must(psoup_sft(run->model, "MT", examples, n, NULL, 0, &options, &error), &error);
    demo_count(run, &run->mt_cost, 2, options.epochs * tokens);
    run->mt_cost.seconds = demo_now() - begun;
    demo_say("MT        supervised on %zu better positives, %.0f s", n, run->mt_cost.seconds);
}

/* ---- the other sum
 * ------------------------------------------------------------------------------------ */

void merge_factors(demo_run *run) {
    psoup_error error;
    char path[1024], name[32], user_name[8];
    for (int k = 0; k < 6; k++)
        keep_policy(run, world_preferences[k].symbol, 0);
    size_t users = psoup_users_count(run->preferences);
    for (size_t u = 0; u < users; u++) {
        int32_t members[3];
        psoup_merger *merger;
        psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
        psoup_merge_report report = {.size = sizeof report};
        options.method = PSOUP_MERGE_FACTORS;
        must(psoup_user_get(run->preferences, u, members, user_name, sizeof user_name, &error),
             &error);
        must(psoup_merger_create(run->context, &options, &merger, &error), &error);
        for (int d = 0; d < 3; d++) {
            snprintf(path, sizeof path, "%s/%s", run->directory,
                     world_preferences[members[d]].symbol);
            must(psoup_merger_add(merger, path, 1.0 / 3, &error), &error);
        }
        snprintf(path, sizeof path, "%s/factors-%s", run->directory, user_name);
        must(psoup_merger_write(merger, path, &error), &error);
        must(psoup_merger_report(merger, &report, &error), &error);
        psoup_merger_free(merger);
        run->factors_error += report.mean_error / (double)users;
        snprintf(name, sizeof name, "factors %s", user_name);
        must(psoup_model_load_adapter(run->model, name, path, &error), &error);
    }
    demo_say("factors   A and B averaged apart: %.0f %% away from the weighted sum",
             100 * run->factors_error);
}
