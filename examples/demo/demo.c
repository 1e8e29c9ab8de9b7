/* demo.c: the whole method on a small world, measured: from random weights to a personal soup.
 *
 * In order: a base model from scratch; a judge's feedback on its own responses; reward models; a
 * PPO policy for each preference, side by side; the soups of all users, and the methods they are
 * compared with; and whether each claim holds. Base, data and judge are fixed before any policy
 * exists. */
#include "demo.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MAX_CHECKS = 160, FULL_SEEDS = 3 };

/* What a policy may spend of divergence from the base, nats a token. */
static const double kl_bound = 0.3;

typedef struct options {
    const char *out;
    uint64_t seed;
    int threads, full, seeds, help;
} options;

static const char usage[] =
    "psoup-demo [--out DIR] [--seed N] [--threads N] [--full [--seeds N]]\n"
    "\n"
    "Runs the whole method on a small world and writes DIR/report.html, whose path is the last "
    "line.\n"
    "\n"
    "  --out DIR    where the report and the data go (build/demo)\n"
    "  --seed N     of everything random (1)\n"
    "  --threads N  worker threads; 0: one per processor (0); results do not depend on it\n"
    "  --full       three seeds, P-MORL at equal compute too, soups trained as one, two "
    "preferences\n"
    "               added afterwards; of the first seed RLOO, GRPO, DPO and best of 4\n"
    "  --seeds N    with --full so many seeds, 1 to 3 (3)\n"
    "  --help       this\n"
    "\n"
    "Ends with 0 when every check passes, 1 on an error, 2 when a check fails.\n";

static int parse(int argc, char **argv, options *o) {
    *o = (options){.out = "build/demo", .seed = 1, .seeds = FULL_SEEDS};
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        char *end = NULL;
        if (!strcmp(argv[i], "--full")) {
            o->full = 1;
        } else if (!strcmp(argv[i], "--seeds") && value && value[0] >= '1' &&
                   value[0] <= '0' + FULL_SEEDS && !value[1]) {
            o->seeds = argv[++i][0] - '0';
        } else if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) {
            o->help = 1;
        } else if (!strcmp(argv[i], "--out") && value && *value && strlen(value) < 512) {
            o->out = argv[++i];
        } else if ((!strcmp(argv[i], "--seed") || !strcmp(argv[i], "--threads")) && value) {
            errno = 0;
            long number = strtol(value, &end, 10);
            if (errno || end == value || *end || number < 0 || number > 1000000) {
                fprintf(stderr, "psoup-demo: %s '%s': expected 0 to 1000000\n", argv[i], value);
                return -1;
            }
            if (!strcmp(argv[i++], "--seed"))
                o->seed = (uint64_t)number;
            else
                o->threads = (int)number;
        } else {
            fprintf(stderr, "psoup-demo: '%s' is no option, or lacks its value; see --help\n",
                    argv[i]);
            return -1;
        }
    }
    return 0;
}

static int make_directory(const char *path) {
    char part[1024];
    size_t n = strlen(path);
    if (n >= sizeof part)
        return -1;
    for (size_t i = 1; i <= n; i++)
        if (path[i] == '/' || !path[i]) {
            memcpy(part, path, i);
            part[i] = '\0';
            if (mkdir(part, 0777) && errno != EEXIST) {
                fprintf(stderr, "psoup-demo: %s: %s\n", part, strerror(errno));
                return -1;
            }
        }
    return 0;
}

/* ---- checks
 * ----------------------------------------------------------------------------------------- */

typedef struct checks {
    demo_check items[MAX_CHECKS];
    size_t n;
    int failed;
} checks;

__attribute__((format(printf, 3, 4))) static void check(checks *c, int passed, const char *format,
                                                        ...) {
    if (c->n == MAX_CHECKS)
        return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(c->items[c->n].text, sizeof c->items[0].text, format, arguments);
    va_end(arguments);
    c->items[c->n++].passed = passed;
    c->failed += !passed;
}

static void check_run(checks *c, const demo_run *run) {
    char where[32] = "";
    if (run->scale.morl_equal_steps)
        snprintf(where, sizeof where, " (seed %llu)", (unsigned long long)run->seed);
    for (int k = 0; k < run->n_preferences; k++) {
        const char *symbol = world_preferences[k].symbol;
        const demo_agreement *a = &run->agreement[k];
        const demo_policy_proof *p = &run->proof[k];
        check(c, a->neutral >= 0.9 && a->negative >= 0.9 && a->positive >= 0.7,
              "%s%s: the reward model agrees with the judge: %.3f neutral, %.3f negative (0.9), "
              "%.3f positive (0.7)",
              symbol, where, a->neutral, a->negative, a->positive);
        check(c, p->reward.low > 0, "%s%s: PPO raises the learned reward: %+.2f [%+.2f, %+.2f]",
              symbol, where, p->reward.mean, p->reward.low, p->reward.high);
        check(c, p->judge.low > 0, "%s%s: PPO raises the judge's score: %+.2f [%+.2f, %+.2f]",
              symbol, where, p->judge.mean, p->judge.low, p->judge.high);
        check(c, p->kl_token < kl_bound, "%s%s: KL %.3f nats a token, under %.1f", symbol, where,
              p->kl_token, kl_bound);
    }
    for (int m = 0; m < DEMO_OBJECTIVES && run->scale.objectives; m++) {
        const demo_policy_proof *p = &run->objective_mean[m];
        check(c, p->reward.low > 0 && p->judge.low > 0,
              "%s%s raises the learned rewards, %+.2f [%+.2f, %+.2f], and the judge's scores, %+.2f "
              "[%+.2f, %+.2f]",
              demo_objectives[m], where, p->reward.mean, p->reward.low, p->reward.high, p->judge.mean,
              p->judge.low, p->judge.high);
    }
}

static const contest_method *find(const contest *c, const char *name) {
    for (size_t m = 0; m < c->n; m++)
        if (!strcmp(c->methods[m].name, name))
            return &c->methods[m];
    return NULL;
}

/* One method over another: head to head, and with intervals apart in the field. */
static void check_over(checks *c, const contest *field, const char *better, const char *worse) {
    const contest_method *a = find(field, better), *b = find(field, worse);
    const psoup_rate *rate = &a->against[b - field->methods];
    check(c, rate->low > 0.5, "%s wins over %s: %.3f [%.3f, %.3f]", better, worse, rate->rate,
          rate->low, rate->high);
    check(c, a->against_all.low > b->against_all.high,
          "%s above %s in the field: [%.3f, %.3f] and [%.3f, %.3f]", better, worse,
          a->against_all.low, a->against_all.high, b->against_all.low, b->against_all.high);
}

/* ---- stages
 * ------------------------------------------------------------------------------------------ */

static demo_run *run_method(psoup_context *context, const options *o, uint64_t seed) {
    demo_run *run = calloc(1, sizeof *run);
    char *directory = calloc(1, 1024);
    if (!run || !directory) {
        fprintf(stderr, "psoup-demo: out of memory\n");
        exit(1);
    }
    snprintf(directory, 1024, "%s/seed-%llu", o->out, (unsigned long long)seed);
    if (make_directory(directory))
        exit(1);
    run->context = context;
    run->seed = seed;
    run->directory = directory;
    run->scale = (demo_scale){.base_examples = 80000,
                              .feedback_rounds = 6,
                              .general_pairs = 20000,
                              .policy_steps = 18,
                              .morl_steps = 18,
                              .soup_after = o->full ? 12 : 0,
                              .rollouts = 128,
                              .samples = 3,
                              .objectives = o->full && seed == o->seed};
    demo_say("\nseed %llu", (unsigned long long)seed);
    learn_base(run);
    learn_rewards(run);
    prove_rewards(run, 0, 6);
    train_policies(run, 0, 6);
    prove_policies(run, 0, 6);
    for (int m = 0; m < DEMO_OBJECTIVES && run->scale.objectives; m++) {
        train_objective(run, m);
        prove_objective(run, m);
        drop_objective(run, m);
    }
    train_rlhf(run);
    train_mt(run);
    train_morl(run, "P-MORL", 6, run->scale.morl_steps, &run->morl_cost);
    if (o->full) { /* as many steps as all of P-SOUPS' policies paid for */
        double soups = 0;
        for (int k = 0; k < 6; k++)
            soups += run->policy_cost[k].flop;
        run->scale.morl_equal_steps =
            (int)lround(run->scale.morl_steps * soups / run->morl_cost.flop);
        train_morl(run, "P-MORL equal", 6, run->scale.morl_equal_steps, &run->morl_equal_cost);
    }
    merge_factors(run);
    if (o->full) { /* a soup's step costs what P-MORL's does: both answer users, and read three rewards */
        double left = 0;
        for (int k = 0; k < 6; k++)
            left += run->policy_cost[k].flop;
        left -= run->soup_before.flop;
        train_soup(run, "soup", 0, run->scale.morl_steps, &run->soup_cost);
        train_soup(run, "soup equal", run->scale.soup_after,
                   (int)lround(run->scale.morl_steps * left / run->morl_cost.flop),
                   &run->soup_equal_cost);
    }
    return run;
}

/* Two preferences nobody knew of: P-SOUPS trains two policies, P-MORL everything again. */
static void add_preferences(demo_run *run) {
    learn_new_rewards(run);
    prove_rewards(run, 6, 8);
    train_policies(run, 6, 8);
    prove_policies(run, 6, 8);
    train_morl(run, "P-MORL 16", 8, run->scale.morl_steps, &run->morl16_cost);
}

static void show_example(const contest *c) {
    char question[WORLD_TEXT];
    size_t prompt = 20 % c->n_prompts;
    const contest_method *soups = find(c, "P-SOUPS");
    world_question(&c->prompts[prompt], question);
    printf("One question for all users: \"%s\"\n", question);
    for (size_t u = 0; u < c->n_users; u++)
        printf("  %s  %s\n", c->users[u],
               contest_response(c, 0, (size_t)(soups - c->methods), u, prompt));
    printf("\n");
}

int main(int argc, char **argv) {
    options o;
    psoup_error error;
    psoup_context *context;
    psoup_context_options context_options = PSOUP_CONTEXT_OPTIONS_INIT;
    static contest eight, sixteen;
    static checks made;
    demo_run *runs[FULL_SEEDS] = {NULL};
    char path[1024];
    double begun = demo_now();

    if (parse(argc, argv, &o))
        return 1;
    if (o.help) {
        fputs(usage, stdout);
        return 0;
    }
    context_options.threads = o.threads;
    must(psoup_context_create(&context_options, &context, &error), &error);
    demo_say("libpsoup %s, %d threads, %s", psoup_version(), psoup_context_threads(context),
             psoup_context_isa(context));

    size_t n = o.full ? (size_t)o.seeds : 1;
    for (size_t s = 0; s < n; s++) {
        runs[s] = run_method(context, &o, o.seed + s);
        if (s == 0)
            contest_begin(&eight, runs[0], CONTEST_EIGHT, n, o.full);
        contest_play(&eight, runs[s], CONTEST_EIGHT, s);
        if (o.full) {
            add_preferences(runs[s]);
            if (s == 0)
                contest_begin(&sixteen, runs[0], CONTEST_SIXTEEN, n, 1);
            contest_play(&sixteen, runs[s], CONTEST_SIXTEEN, s);
        }
        check_run(&made, runs[s]);
    }
    contest_decide(&eight, runs[0]);
    contest_print(&eight);
    if (o.full) {
        contest_decide(&sixteen, runs[0]);
        contest_print(&sixteen);
    }
    check_over(&made, &eight, "PP", "VB");
    check_over(&made, &eight, "P-SOUPS", "PP");
    check_over(&made, &eight, "P-SOUPS", "wrong soup");
    if (o.full)
        check_over(&made, &sixteen, "P-SOUPS", "PP");
    show_example(&eight);

    for (size_t i = 0; i < made.n; i++)
        printf("%s  %s\n", made.items[i].passed ? "PASS" : "FAIL", made.items[i].text);
    printf("\n%zu checks, %d failed, %.0f s\n", made.n, made.failed, demo_now() - begun);
    snprintf(path, sizeof path, "%s/report.html", o.out);
    report_write(path, runs[0], &eight, o.full ? &sixteen : NULL, made.items, made.n,
                 demo_now() - begun);
    contest_free(&eight);
    contest_free(&sixteen);
    for (size_t s = 0; s < n; s++) {
        demo_free(runs[s]);
        free((void *)(uintptr_t)runs[s]->directory);
        free(runs[s]);
    }
    psoup_context_free(context);
    printf("%s\n", path);
    return made.failed ? 2 : 0;
}
