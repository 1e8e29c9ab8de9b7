#include "demo.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
int main(int argc, char **argv) {
    psoup_error e;
    demo_run *run = calloc(1, sizeof *run);
    run->seed = 1;
    run->directory = "/tmp/w/proto/out";
    mkdir(run->directory, 0777);
    run->scale = (demo_scale){36000, 4, 2000, 40, 40, 64, 4};
    for (int i = 1; i < argc; i++) {
        char *s = strchr(argv[i], '=');
        int v = s ? atoi(s + 1) : 0;
        if (!strncmp(argv[i], "base", 4))
            run->scale.base_examples = v;
        if (!strncmp(argv[i], "fb", 2))
            run->scale.feedback_rounds = v;
    }
    psoup_context_options o = PSOUP_CONTEXT_OPTIONS_INIT;
    must(psoup_context_create(&o, &run->context, &e), &e);
    learn_base(run);
    learn_rewards(run);
    prove_rewards(run, 0, 6);
    train_policies(run, 0, 6);
    prove_policies(run, 0, 6);
    train_rlhf(run);
    train_mt(run);
    train_morl(run, "P-MORL", 6, run->scale.morl_steps, &run->morl_cost);
    merge_factors(run);
    demo_free(run);
    psoup_context_free(run->context);
}
