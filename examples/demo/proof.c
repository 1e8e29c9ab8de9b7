/* proof.c: do the reward models agree with the judge, and did PPO do what it was for? On held-out
 * prompts, with the judge as it is. */
#include "demo.h"

#include <stdio.h>
#include <string.h>

static void reward_scores(psoup_reward *reward, const demo_tokens *sequences, size_t n, float *out,
                          psoup_row *rows) {
    psoup_error error;
    for (size_t i = 0; i < n; i++)
        rows[i] = (psoup_row){.tokens = sequences[i].ids, .n = sequences[i].n};
    must(psoup_reward_score(reward, rows, n, out, &error), &error);
}

/* ---- reward models
 * --------------------------------------------------------------------------------- */

typedef struct tally {
    int64_t right, all;
} tally;

static double share(tally t) {
    return t.all ? (double)t.right / (double)t.all : 0;
}

static void prove_reward(demo_run *run, const char *name, int k) {
    tally positive = {0}, neutral = {0}, negative = {0};
    psoup_jsonl_reader *reader = demo_open(run, name);
    for (psoup_json *row; (row = demo_next(reader)); psoup_json_free(row)) {
        const char *kind = psoup_json_string(psoup_json_get(row, "kind"), "");
        const char *a = psoup_json_string(psoup_json_get(row, "completion_a"), "");
        const char *b = psoup_json_string(psoup_json_get(row, "completion_b"), "");
        world_prompt prompt;
        if (strcmp(psoup_json_string(psoup_json_get(row, "preference"), ""),
                   world_preferences[k].symbol) ||
            world_understand(psoup_json_string(psoup_json_get(row, "instruction"), ""), &prompt))
            continue;
        int verdict = judge_compare(&prompt, k, a, b);
        tally *t = !strcmp(kind, "positive-positive")   ? &positive
                   : !strcmp(kind, "positive-neutral")  ? &neutral
                   : !strcmp(kind, "positive-negative") ? &negative
                                                        : NULL;
        if (!t || !verdict)
            continue;
        demo_tokens read =
            demo_encode(run, psoup_json_string(psoup_json_get(row, "user_input"), ""));
        demo_tokens pair[2] = {demo_join(run, read, demo_encode(run, a), 1),
                               demo_join(run, read, demo_encode(run, b), 1)};
        psoup_row rows[2];
        float scores[2];
        reward_scores(run->rewards[k], pair, 2, scores, rows);
        t->right += (scores[0] > scores[1]) == (verdict > 0);
        t->all++;
    }
    psoup_jsonl_reader_free(reader);
    run->agreement[k] = (demo_agreement){share(positive), share(neutral), share(negative)};
}

void prove_rewards(demo_run *run, int from, int to) {
    for (int k = from; k < to; k++) {
        prove_reward(run, from ? "feedback-new-heldout" : "feedback-heldout", k);
        demo_say("          %s agrees with the judge: %.3f against neutral, %.3f against negative, "
                 "%.3f between positives",
                 world_preferences[k].symbol, run->agreement[k].neutral, run->agreement[k].negative,
                 run->agreement[k].positive);
    }
}

/* ---- policies
 * ---------------------------------------------------------------------------------------- */

/* Who is told preference k and answers under this adapter, or, without one, with the best of several of the base's
 * answers, against the base; by held-out prompt, reward and judge receive the differences. */
static demo_policy_proof prove_policy(demo_run *run, const char *adapter, int32_t k, double reward[600],
                                      double judged[600]) {
    size_t samples = (size_t)run->scale.samples, n = run->n_held * samples;
    demo_tokens *prompts = demo_take(run, 2 * n * sizeof *prompts);
    demo_tokens *sequences = demo_take(run, 2 * n * sizeof *sequences);
    const float **mixes = demo_take(run, 2 * n * sizeof *mixes);
    psoup_row *rows = demo_take(run, 2 * n * sizeof *rows);
    float *scores = demo_take(run, 2 * n * sizeof *scores);
    const float *mix = adapter ? demo_mix(run, &adapter, 1) : NULL;
    for (size_t i = 0; i < n; i++) {
        prompts[i] = prompts[n + i] = demo_prompt(run, &run->held[i / samples], &k, 1);
        mixes[i] = mix; /* the policy first, then the base */
    }
    demo_response *responses =
        demo_generate(run, prompts, mixes, 2 * n, run->seed + 1000 + (uint64_t)k);
    if (!adapter)
        memcpy(responses, demo_best(run, prompts, n, run->rewards[k], DEMO_BEST_OF, run->seed + 1100 + (uint64_t)k),
               n * sizeof *responses);
    for (size_t i = 0; i < 2 * n; i++)
        sequences[i] = demo_join(run, prompts[i], responses[i].tokens, 0);
    reward_scores(run->rewards[k], sequences, 2 * n, scores, rows);

    double base = 0, policy = 0;
    memset(reward, 0, 600 * sizeof *reward);
    memset(judged, 0, 600 * sizeof *judged);
    for (size_t i = 0; i < n; i++) {
        size_t p = i / samples;
        judge_reading after = judge_read(&run->held[p], responses[i].text);
        judge_reading before = judge_read(&run->held[p], responses[n + i].text);
        double a = judge_score(&after, k), b = judge_score(&before, k);
        reward[p] += ((double)scores[i] - scores[n + i]) / (double)samples;
        judged[p] += (a - b) / (double)samples;
        policy += a / (double)n;
        base += b / (double)n;
    }
    return (demo_policy_proof){.reward = demo_interval(reward, run->n_held),
                               .judge = demo_interval(judged, run->n_held),
                               .judge_base = base,
                               .judge_policy = policy,
                               .kl_token = demo_divergence(run, prompts, responses, mixes, n)};
}

static void say_proof(int k, const demo_policy_proof *p) {
    demo_say("          %s held-out: learned reward %+.2f [%+.2f, %+.2f], judge %.2f to %.2f "
             "[%+.2f, %+.2f], KL %.3f a token",
             world_preferences[k].symbol, p->reward.mean, p->reward.low, p->reward.high,
             p->judge_base, p->judge_policy, p->judge.low, p->judge.high, p->kl_token);
}

void prove_policies(demo_run *run, int from, int to) {
    double reward[600], judged[600];
    for (int k = from; k < to; k++) {
        run->proof[k] = prove_policy(run, world_preferences[k].symbol, k, reward, judged);
        say_proof(k, &run->proof[k]);
    }
}

void prove_objective(demo_run *run, int objective) {
    char name[32];
    double reward[600], judged[600], rewards[600] = {0}, judgements[600] = {0};
    demo_policy_proof *mean = &run->objective_mean[objective];
    for (int k = 0; k < 6; k++) {
        demo_policy_proof *p = &run->objective[objective][k];
        const char *adapter = objective == DEMO_BEST ? NULL : objective_adapter(objective, k, name);
        *p = prove_policy(run, adapter, k, reward, judged);
        say_proof(k, p);
        for (size_t i = 0; i < run->n_held; i++) {
            rewards[i] += reward[i] / 6;
            judgements[i] += judged[i] / 6;
        }
        mean->kl_token += p->kl_token / 6;
    }
    mean->reward = demo_interval(rewards, run->n_held);
    mean->judge = demo_interval(judgements, run->n_held);
}
