/* examples/demo/demo.h: what the parts of the demonstration share.
 *
 *   world, judge    the small world, its writer, and the program that judges responses
 *   tools           memory, prompts as tokens, generation, progress
 *   learn           base model, feedback, reward models
 *   methods         the policies: RLHF, six for P-SOUPS, MT, P-MORL, the trained soups, the other objectives'
 *   proof           reward models' agreement, what each objective did to each policy
 *   contest         everybody's responses on held-out prompts, and who is better by how much
 *   report          the HTML page
 */
#ifndef DEMO_H
#define DEMO_H

#include <psoup/psoup.h>

#include "judge.h"

/* Everything that says how long the demonstration takes. */
typedef struct demo_scale {
    int base_examples;   /* of instruction data */
    int feedback_rounds; /* over the training prompts, for every preference */
    int general_pairs;   /* comparisons by general helpfulness */
    int policy_steps;    /* of PPO, each policy */
    int morl_steps;
    int morl_equal_steps; /* at the compute of all of P-SOUPS; 0: not trained */
    int soup_after;       /* steps of the policies after which a soup of them begins that has the rest of
                           * their compute; 0: no soup is trained */
    int rollouts;         /* of one PPO step */
    int samples;          /* for each held-out prompt where a policy is compared with its base */
    int objectives;       /* 1: the policies are trained by each of the other objectives too */
} demo_scale;

typedef struct demo_tokens {
    const int32_t *ids; /* [n] */
    size_t n;
} demo_tokens;

/* What a method cost: beyond base, feedback and reward models, which are listed apart. */
typedef struct demo_cost {
    double seconds;
    int64_t tokens;  /* through the model, forward or backward, any number of times */
    int64_t updates; /* optimiser steps */
    double
        flop; /* 2 P a token forward, 4 P forward and backward with frozen weights, 6 P with all */
} demo_cost;

enum { CURVE_POINTS = 512, CURVES = 16 };
typedef struct demo_curve {
    char name[24];
    size_t n;
    double reward[CURVE_POINTS], kl[CURVE_POINTS]; /* per rollout; per token */
} demo_curve;

/* A mean with its 95 % interval. */
typedef struct demo_estimate {
    double mean, low, high;
} demo_estimate;

typedef struct demo_agreement { /* with the noiseless judge, held-out prompts, ties left out */
    double positive, neutral, negative;
} demo_agreement;

typedef struct demo_policy_proof {
    demo_estimate reward, judge; /* policy − base, paired by held-out prompt */
    double judge_base, judge_policy;
    double kl_token; /* nats, on the policy's own responses */
} demo_policy_proof;

/* What raises a reward beside PPO: two without a critic, one without a reward model, one that trains nothing. */
enum { DEMO_RLOO, DEMO_GRPO, DEMO_DPO, DEMO_BEST, DEMO_OBJECTIVES, DEMO_BEST_OF = 4 };
extern const char *const demo_objectives[DEMO_OBJECTIVES];

/* One run from one seed. */
typedef struct demo_run {
    uint64_t seed;
    demo_scale scale;
    const char *directory;
    psoup_context *context;
    psoup_tokenizer *tokenizer;
    int32_t end; /* id of "</s>" */
    psoup_model *model;
    int n_preferences;              /* 6, or 8 once the new ones are there */
    psoup_preferences *preferences; /* of the first six */
    psoup_reward *rewards[WORLD_PREFERENCES], *general, *told;
    world_prompt train[600], held[600];
    size_t n_train, n_held;
    size_t comparisons;
    demo_cost base_cost, feedback_cost, reward_cost, policy_cost[WORLD_PREFERENCES];
    demo_cost objective_cost[DEMO_OBJECTIVES]; /* of all six */
    demo_cost rlhf_cost, mt_cost, morl_cost, morl_equal_cost, morl16_cost, new_cost;
    demo_cost soup_before, soup_cost, soup_equal_cost; /* the policies' until soup_after; the soups' own */
    demo_curve curves[CURVES];
    size_t n_curves;
    demo_agreement agreement[WORLD_PREFERENCES];
    demo_policy_proof proof[WORLD_PREFERENCES];
    demo_policy_proof objective[DEMO_OBJECTIVES][6]; /* likewise; KL 0 where nothing was trained */
    demo_policy_proof objective_mean[DEMO_OBJECTIVES]; /* over the six */
    double factors_error;      /* ‖factors − delta‖ / ‖delta‖, the mean over users */
    struct demo_block *blocks; /* memory that lives as long as the run */
} demo_run;

/* ---- tools ---- */
/* Ends the program with the library's message unless status is PSOUP_OK. */
void must(psoup_status status, const psoup_error *error);
void *demo_take(demo_run *run, size_t bytes); /* zeroed, freed with the run */
void demo_free(demo_run *run);
double demo_now(void); /* seconds */
void demo_say(const char *format, ...) __attribute__((format(printf, 1, 2)));
int demo_progress(void *user, const char *label, int64_t done,
                  int64_t total); /* a psoup_progress_fn */
psoup_jsonl_reader *demo_open(demo_run *run, const char *name); /* rows that the run wrote, as "feedback" */
psoup_json *demo_next(psoup_jsonl_reader *reader);              /* NULL: there are no more */
demo_tokens demo_encode(demo_run *run, const char *text);
/* The filled template with n preference prompts (indices) joined. */
demo_tokens demo_prompt(demo_run *run, const world_prompt *prompt, const int32_t *preferences,
                        size_t n);
demo_tokens demo_join(demo_run *run, demo_tokens prompt, demo_tokens response, int end);
float *demo_mix(demo_run *run, const char *const *adapters, size_t n); /* equal weights, Σ = 1 */
typedef struct demo_response {
    demo_tokens tokens;
    const char *text;
} demo_response;
demo_response *demo_generate(demo_run *run, const demo_tokens *prompts, const float *const *mixes,
                             size_t n, uint64_t seed);
/* Of `of` answers of the base to each prompt the one that the reward model scores highest. */
demo_response *demo_best(demo_run *run, const demo_tokens *prompts, size_t n, psoup_reward *reward,
                         int of, uint64_t seed);
demo_estimate demo_interval(const double *values, size_t n); /* mean ± 1.96 standard errors */
void demo_count(demo_run *run, demo_cost *cost, double passes, int64_t tokens); /* passes of 2 P */

/* Mean log π − log π_ref of the responses' tokens under each row's mix. */
double demo_divergence(demo_run *run, const demo_tokens *prompts, const demo_response *responses,
                       const float *const *mixes, size_t n);
/* Preferences from … to − 1 of the world as a catalogue, through its file. */
psoup_preferences *demo_catalogue(demo_run *run, int from, int to);
/* The judge as a psoup_judge_fn; user: a demo_noise, or NULL for the judge as it is. */
typedef struct demo_noise {
    world_random random;
    double share; /* of verdicts that are turned round */
} demo_noise;
int demo_answer(void *user, const psoup_question *questions, size_t n, int32_t *verdicts);

/* ---- learn ---- */
void learn_base(demo_run *run);
void learn_rewards(demo_run *run);     /* feedback and reward models of the first six, and the two
                                        * others: general helpfulness, and told by prompt */
void learn_new_rewards(demo_run *run); /* of P3C and P3D; and told by prompt over all eight */

/* ---- methods ---- */
void train_policies(demo_run *run, int from, int to); /* side by side, "P1A" … */
/* The six policies by another objective, as adapters "RLOO P1A" …; and without them again. */
void train_objective(demo_run *run, int objective);
void drop_objective(demo_run *run, int objective);
const char *objective_adapter(int objective, int k, char name[32]);
void train_rlhf(demo_run *run);
void train_mt(demo_run *run);
/* P-MORL over all users of the first n_preferences preferences. */
void train_morl(demo_run *run, const char *adapter, int n_preferences, int steps, demo_cost *cost);
/* A soup of the six policies, trained from where they were after `from` of their steps (0: after the last);
 * its adapters are "NAME P1A" … */
void train_soup(demo_run *run, const char *name, int from, int steps, demo_cost *cost);
/* Each user's policies averaged by A and B apart, as adapters "factors AAA" …, through files. */
void merge_factors(demo_run *run);

/* ---- proof ---- */
void prove_rewards(demo_run *run, int from, int to);
void prove_policies(demo_run *run, int from, int to);
void prove_objective(demo_run *run, int objective);

/* ---- contest ---- */
enum { CONTEST_METHODS = 11, CONTEST_USERS = 16 };
typedef struct contest_method {
    const char *name;
    const char *about;
    psoup_rate against_all, helpful;                /* over the contest's other methods */
    psoup_rate criterion[WORLD_PREFERENCES];        /* likewise, by preference */
    psoup_rate against[CONTEST_METHODS];            /* one by one */
    double score[WORLD_PREFERENCES], helpful_score; /* mean judge's scores, of users that have it */
    double kl_token, length, valid;
    demo_cost cost;
} contest_method;

typedef struct contest {
    size_t n, n_users, n_seeds;
    int rated; /* the first `rated` methods are each other's opponents; the rest only meet them */
    contest_method methods[CONTEST_METHODS];
    int32_t members[CONTEST_USERS][3];
    char users[CONTEST_USERS][8];
    world_prompt prompts[600];
    size_t n_prompts;
    /* [seed][method][user][prompt] */
    const char **responses;
} contest;

enum { CONTEST_EIGHT = 0, CONTEST_SIXTEEN = 1 };
void contest_begin(contest *c, const demo_run *run, int kind, size_t n_seeds, int full);
/* Generates everybody's responses from one run: one batch, every row its own mix. */
void contest_play(contest *c, demo_run *run, int kind, size_t seed);
void contest_decide(contest *c, demo_run *run);
const char *contest_response(const contest *c, size_t seed, size_t method, size_t user,
                             size_t prompt);
void contest_print(const contest *c);
void contest_free(contest *c);

/* ---- report ---- */
typedef struct demo_check {
    char text[160];
    int passed;
} demo_check;
void report_write(const char *path, const demo_run *run, const contest *eight,
                  const contest *sixteen, const demo_check *checks, size_t n_checks,
                  double seconds);

#endif
