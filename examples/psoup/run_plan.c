/* psoup run: what its stages will take of memory. */
#include "run.h"

#include <string.h>

psoup_status run_plan_stage(run *r, const char *stage, psoup_error *error) {
    const run_config *c = &r->c;
    psoup_memory m = {.size = sizeof m};
    const char *prefix = "ppo.";
    plan_work work = PLAN_PPO;
    psoup_status status;
    if (!strcmp(stage, "rewards")) {
        work = PLAN_REWARDS;
        prefix = "reward.";
        status = psoup_reward_memory(r->handles, r->n_rewards, r->comparisons, r->n_comparisons,
                                     r->comparisons + r->n_comparisons, r->n_comparisons_held, &c->reward, &m, error);
    } else if (!strcmp(stage, "responses")) {
        work = PLAN_RESPONSES;
        prefix = "generate.";
        status = run_responses_memory(r, &m, error);
    } else if (r->method->supervised) {
        work = PLAN_SFT;
        prefix = "sft.";
        status = psoup_sft_memory(r->m.model, r->policies[0].name, r->examples, r->n_examples,
                                  r->examples + r->n_examples, r->n_examples_held, &c->sft, &m, error);
    } else
        status = run_policies_memory(r, &m, error);
    return status == PSOUP_OK ? plan_work_fits(r->plan, r->config_path, prefix, work, r->m.model, &m, error) : status;
}
