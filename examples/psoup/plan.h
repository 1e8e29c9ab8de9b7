/* What a command will take of memory: said before it begins, and refused where there is less. */
#ifndef PLAN_H
#define PLAN_H

#include "cli.h"

/* What is planned: it names itself in the plan, and knows which options make it less. */
typedef enum plan_work { PLAN_SFT, PLAN_REWARDS, PLAN_DPO, PLAN_PPO, PLAN_RESPONSES, PLAN_ANSWERS } plan_work;

typedef struct plan_options {
    int64_t limit; /* --memory-limit, bytes; 0: what there is */
    bool only;     /* --plan: it goes to standard output, and that is all */
    bool json;     /* as JSON, and none on standard error */
} plan_options;

/* "24G", "512M"; false where it is no size. */
bool plan_parse_size(const char *text, int64_t *bytes);
/* Says on standard error what the work takes, but for answers, who asks for those by --plan. PSOUP_ERROR_MEMORY, with
 * numbers, where there is less: the error begins with `where` and names options with `prefix`, "ppo." or "--". Of
 * several ranks the first speaks, and those of one machine share it. */
psoup_status plan_work_fits(const plan_options *o, const char *where, const char *prefix, plan_work work,
                            const psoup_model *model, const psoup_memory *memory, psoup_error *error);

#endif
