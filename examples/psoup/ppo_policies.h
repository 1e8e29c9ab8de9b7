/* The policies of `psoup ppo`: what its configuration says of them, and what is made of that. */
#ifndef PPO_POLICIES_H
#define PPO_POLICIES_H

#include "config.h"

enum { MAX_POLICIES = 64, MAX_DIMENSIONS = 16, MAX_SOUP = 64, MAX_REWARDS = 64 };

typedef struct ppo_run {
    const char *model, *tokenizer, *device, *dtype, *prompts, *validation, *preferences, *output, *template;
    const psoup_json *policies;
    int32_t new_preferences, threads;
    uint64_t seed;
    adapter_config lora;
    psoup_ppo_options options;
} ppo_run;

/* One reward of an adapter. */
typedef struct reward_part {
    const char *name; /* NULL: the only one */
    const char *directory;
    float weight;
    char *model_name, *full_name; /* the second of a soup's: ADAPTER/NAME */
    psoup_reward *reward;
} reward_part;

/* One adapter that is trained: a policy, or a part of a soup. */
typedef struct policy_part {
    const char *name, *reward_directory, *preference, *init;
    const psoup_json *several; /* its rewards, where there are several */
    reward_part *rewards;      /* [n_rewards] */
    size_t n_rewards, first;   /* the number of its first reward in the policy */
} policy_part;

/* One policy's share of the configuration, and what was made of it. */
typedef struct policy_run {
    policy_part self; /* a soup's has its name alone */
    const psoup_json *soup;
    float concentration;
    uint64_t seed;
    policy_part *parts; /* [n_parts] itself, or a soup's */
    size_t n_parts, n_rewards;
    bool several;                 /* an adapter has several rewards: they are `sources` */
    const char **names;           /* [n_parts] */
    psoup_reward **rewards;       /* [n_rewards] */
    psoup_reward_source *sources; /* [n_rewards] */
    psoup_ppo_soup mixed;
    psoup_ppo_prompt *prompts[2]; /* training, validation */
    size_t n[2];
    psoup_reward_input *inputs[2]; /* of a user's prompts: one per preference and reward */
} policy_run;

typedef struct ppo_state {
    ppo_run *run;
    const char *config_path;
    const plan_options *plan;
    cli_model m;
    psoup_preferences *preferences;
    psoup_json *rows[2];
    token_pool pool;
    policy_run policies[MAX_POLICIES];
    size_t n;
} ppo_state;

/* What the configuration lists, checked. */
psoup_status ppo_read_policies(ppo_state *s, psoup_error *error);
/* Adapters and reward models into the model. */
psoup_status ppo_load_adapters(ppo_state *s, psoup_error *error);
/* A policy's prompts for training (0) or validation (1). */
psoup_status ppo_make_prompts(ppo_state *s, policy_run *p, int part, psoup_error *error);
/* A policy as the library takes it; borrows from p. */
psoup_ppo_policy ppo_policy(policy_run *p);
psoup_status ppo_save(ppo_state *s, const policy_run *p, psoup_error *error);
void ppo_free_policies(ppo_state *s);

#endif
