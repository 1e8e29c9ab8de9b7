/* contest.c: every method answers the held-out prompts for every user, and the judge compares. */
#include "demo.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What a method reads and which adapters it mixes. */
enum { READS_NOTHING, READS_WISHES };
enum { MIX_BASE, MIX_ONE, MIX_SOUP, MIX_WRONG_SOUP, MIX_FACTORS, MIX_TRAINED_SOUP };

typedef struct competitor {
    const char *name, *about;
    int reads, mix;
    const char *adapter; /* of MIX_ONE; of MIX_TRAINED_SOUP what its adapters' names begin with */
} competitor;

static const competitor eight[] = {
    {"VB", "the base, not told", READS_NOTHING, MIX_BASE, NULL},
    {"RLHF", "one policy of general helpfulness, not told", READS_NOTHING, MIX_ONE, "RLHF"},
    {"PP", "the base, told by three prompts", READS_WISHES, MIX_BASE, NULL},
    {"MT", "supervised on all preferences", READS_WISHES, MIX_ONE, "MT"},
    {"P-MORL", "one policy trained over all users", READS_WISHES, MIX_ONE, "P-MORL"},
    {"P-SOUPS", "the user's three policies, a third each", READS_WISHES, MIX_SOUP, NULL},
    {"wrong soup", "control: the three opposite policies", READS_WISHES, MIX_WRONG_SOUP, NULL},
    {"factors", "P-SOUPS with A and B averaged apart", READS_WISHES, MIX_FACTORS, NULL},
    {"P-MORL =", "P-MORL at P-SOUPS' compute", READS_WISHES, MIX_ONE, "P-MORL equal"},
    {"soup =", "a soup trained as one, at P-SOUPS' compute", READS_WISHES, MIX_TRAINED_SOUP,
     "soup equal"},
    {"soup +", "P-SOUPS, then trained as a soup", READS_WISHES, MIX_TRAINED_SOUP, "soup"},
};

static const competitor sixteen[] = {
    {"PP", "the base, told by three prompts", READS_WISHES, MIX_BASE, NULL},
    {"P-MORL 8", "trained over the first eight users only", READS_WISHES, MIX_ONE, "P-MORL"},
    {"P-MORL 16", "trained again over all sixteen", READS_WISHES, MIX_ONE, "P-MORL 16"},
    {"P-SOUPS", "two policies added, nothing trained again", READS_WISHES, MIX_SOUP, NULL},
};

static const competitor *entries(int kind) {
    return kind == CONTEST_SIXTEEN ? sixteen : eight;
}

static size_t place(const contest *c, size_t seed, size_t method, size_t user, size_t prompt) {
    return ((seed * c->n + method) * c->n_users + user) * c->n_prompts + prompt;
}

const char *contest_response(const contest *c, size_t seed, size_t method, size_t user,
                             size_t prompt) {
    return c->responses[place(c, seed, method, user, prompt)];
}

static void *allocate(size_t n, size_t bytes) {
    void *memory = calloc(n ? n : 1, bytes);
    if (!memory) {
        fprintf(stderr, "\npsoup-demo: out of memory\n");
        exit(1);
    }
    return memory;
}

void contest_begin(contest *c, const demo_run *run, int kind, size_t n_seeds, int full) {
    int styles = kind == CONTEST_SIXTEEN ? 4 : 2;
    memset(c, 0, sizeof *c);
    c->n = kind == CONTEST_SIXTEEN ? 4 : full ? 11 : 8;
    c->rated = kind == CONTEST_SIXTEEN ? 4 : 6;
    c->n_users = (size_t)(4 * styles);
    c->n_seeds = n_seeds;
    c->n_prompts = run->n_held;
    memcpy(c->prompts, run->held, sizeof c->prompts);
    for (size_t m = 0; m < c->n; m++) {
        c->methods[m].name = entries(kind)[m].name;
        c->methods[m].about = entries(kind)[m].about;
    }
    for (int u = 0; u < 4 * styles; u++) { /* the last dimension fastest, as psoup_user_get */
        int32_t members[3] = {u / (2 * styles), 2 + u / styles % 2, 4 + u % styles};
        memcpy(c->members[u], members, sizeof members);
        for (int d = 0; d < 3; d++)
            c->users[u][d] = world_preferences[members[d]].symbol[2];
    }
    c->responses = allocate(n_seeds * c->n * c->n_users * c->n_prompts, sizeof(char *));
}

void contest_free(contest *c) {
    free(c->responses);
    c->responses = NULL;
}

/* ---- playing
 * --------------------------------------------------------------------------------------- */

static const float *mix_for(demo_run *run, const competitor *entry, const int32_t *members,
                            const char *user) {
    const char *names[3];
    char factors[32], trained[3][32];
    switch (entry->mix) {
    case MIX_BASE:
        return NULL;
    case MIX_ONE:
        return demo_mix(run, &entry->adapter, 1);
    case MIX_FACTORS:
        snprintf(factors, sizeof factors, "factors %s", user);
        names[0] = factors;
        return demo_mix(run, names, 1);
    case MIX_TRAINED_SOUP:
        for (int d = 0; d < 3; d++) {
            snprintf(trained[d], sizeof trained[d], "%s %s", entry->adapter,
                     world_preferences[members[d]].symbol);
            names[d] = trained[d];
        }
        return demo_mix(run, names, 3);
    default:
        for (int d = 0; d < 3; d++)
            names[d] = world_preferences[members[d] ^ (entry->mix == MIX_WRONG_SOUP)].symbol;
        return demo_mix(run, names, 3);
    }
}

static void add_cost(demo_cost *sum, const demo_cost *more) {
    sum->seconds += more->seconds;
    sum->tokens += more->tokens;
    sum->updates += more->updates;
    sum->flop += more->flop;
}

static demo_cost cost_of(const demo_run *run, const competitor *entry, int kind) {
    demo_cost sum = {0};
    if (entry->mix == MIX_TRAINED_SOUP && !strcmp(entry->adapter, "soup equal")) {
        add_cost(&sum, &run->soup_before);
        add_cost(&sum, &run->soup_equal_cost);
        return sum;
    }
    if (entry->mix == MIX_TRAINED_SOUP)
        add_cost(&sum, &run->soup_cost);
    if (entry->mix == MIX_ONE)
        return !strcmp(entry->adapter, "RLHF")           ? run->rlhf_cost
               : !strcmp(entry->adapter, "MT")           ? run->mt_cost
               : !strcmp(entry->adapter, "P-MORL")       ? run->morl_cost
               : !strcmp(entry->adapter, "P-MORL equal") ? run->morl_equal_cost
                                                         : run->morl16_cost;
    for (int k = 0; entry->mix != MIX_BASE && k < (kind == CONTEST_SIXTEEN ? 8 : 6); k++)
        add_cost(&sum, &run->policy_cost[k]);
    return sum;
}

void contest_play(contest *c, demo_run *run, int kind, size_t seed) {
    size_t users = c->n_users, prompts = c->n_prompts;
    size_t n = c->n * users * prompts;
    demo_tokens *reads = demo_take(run, n * sizeof *reads);
    const float **mixes = demo_take(run, n * sizeof *mixes);
    for (size_t m = 0, i = 0; m < c->n; m++) {
        const competitor *entry = &entries(kind)[m];
        for (size_t u = 0; u < users; u++) {
            const int32_t *members = c->members[u];
            const float *mix = mix_for(run, entry, members, c->users[u]);
            for (size_t p = 0; p < prompts; p++, i++) {
                reads[i] =
                    demo_prompt(run, &c->prompts[p], members, entry->reads == READS_WISHES ? 3 : 0);
                mixes[i] = mix;
            }
        }
    }
    demo_response *responses = demo_generate(run, reads, mixes, n, run->seed + 5000);
    for (size_t m = 0; m < c->n; m++) {
        contest_method *method = &c->methods[m];
        size_t first = m * users * prompts, count = users * prompts;
        /* Who is not told whom it serves gives one response for all. */
        if (entries(kind)[m].reads == READS_NOTHING)
            for (size_t i = prompts; i < count; i++)
                responses[first + i] = responses[first + i % prompts];
        for (size_t u = 0; u < users; u++)
            for (size_t p = 0; p < prompts; p++)
                c->responses[place(c, seed, m, u, p)] = responses[first + u * prompts + p].text;
        demo_cost cost = cost_of(run, &entries(kind)[m], kind);
        method->kl_token +=
            demo_divergence(run, reads + first, responses + first, mixes + first, count) /
            (double)c->n_seeds;
        method->cost.seconds += cost.seconds / (double)c->n_seeds;
        method->cost.tokens += cost.tokens / (int64_t)c->n_seeds;
        method->cost.updates += cost.updates / (int64_t)c->n_seeds;
        method->cost.flop += cost.flop / (double)c->n_seeds;
    }
}

/* ---- deciding
 * ------------------------------------------------------------------------------------ */

/* Everybody's mean scores by the criteria of those users that have them. */
static void score_methods(contest *c) {
    for (size_t m = 0; m < c->n; m++) {
        contest_method *method = &c->methods[m];
        double count[WORLD_PREFERENCES] = {0}, all = 0;
        for (size_t s = 0; s < c->n_seeds; s++)
            for (size_t u = 0; u < c->n_users; u++)
                for (size_t p = 0; p < c->n_prompts; p++, all++) {
                    judge_reading r = judge_read(&c->prompts[p], contest_response(c, s, m, u, p));
                    for (int d = 0; d < 3; d++) {
                        int32_t k = c->members[u][d];
                        method->score[k] += judge_score(&r, k);
                        count[k]++;
                    }
                    method->helpful_score += judge_score(&r, -1);
                    method->length += r.words;
                    method->valid += r.valid;
                }
        for (int k = 0; k < WORLD_PREFERENCES; k++)
            method->score[k] /= count[k] > 0 ? count[k] : 1;
        method->helpful_score /= all;
        method->length /= all;
        method->valid /= all;
    }
}

/* All duels of method a against b, as the judge decides them. */
static psoup_duel *fight(const contest *c, psoup_judge *judge, const psoup_preferences *catalogue,
                         char *const *questions, size_t a, size_t b) {
    psoup_error error;
    size_t n = c->n_seeds * c->n_users * c->n_prompts, i = 0;
    psoup_duel *duels = allocate(n, sizeof *duels);
    const char **prompts = allocate(3 * n, sizeof *prompts), **first = prompts + n,
               **second = prompts + 2 * n;
    int32_t *verdicts = allocate(4 * n, sizeof *verdicts), *helpful = verdicts + 3 * n;
    for (size_t s = 0; s < c->n_seeds; s++)
        for (size_t u = 0; u < c->n_users; u++)
            for (size_t p = 0; p < c->n_prompts; p++, i++) {
                prompts[i] = questions[p];
                first[i] = contest_response(c, s, a, u, p);
                second[i] = contest_response(c, s, b, u, p);
                duels[i] = (psoup_duel){.prompt = (int64_t)p,
                                        .user = (int64_t)u,
                                        .preferences = c->members[u],
                                        .verdicts = verdicts + 3 * i,
                                        .n = 3};
            }
    must(psoup_judge_duels(judge, catalogue, prompts, first, second, duels, n, 1, verdicts, helpful,
                           &error),
         &error);
    for (i = 0; i < n; i++)
        duels[i].helpfulness = helpful[i];
    free(prompts);
    return duels;
}

/* The same duels from the other side, appended; the verdicts go into `verdicts` [3 n]. */
static void turn(const psoup_duel *duels, size_t n, psoup_duel *out, int32_t *verdicts) {
    for (size_t i = 0; i < n; i++) {
        out[i] = duels[i];
        out[i].helpfulness = -duels[i].helpfulness;
        for (size_t d = 0; d < 3; d++)
            verdicts[3 * i + d] = -duels[i].verdicts[d];
        out[i].verdicts = verdicts + 3 * i;
    }
}

void contest_decide(contest *c, demo_run *run) {
    psoup_error error;
    psoup_judge *judge;
    psoup_context *context = run->context;
    psoup_preferences *catalogue = demo_catalogue(run, 0, WORLD_PREFERENCES);
    psoup_duel *pairs[CONTEST_METHODS][CONTEST_METHODS] = {{NULL}};
    size_t n = c->n_seeds * c->n_users * c->n_prompts;
    char **questions = allocate(c->n_prompts, sizeof *questions);
    for (size_t p = 0; p < c->n_prompts; p++)
        world_question(&c->prompts[p], questions[p] = allocate(WORLD_TEXT, 1));
    score_methods(c);
    must(psoup_judge_create(context, demo_answer, NULL, &judge, &error), &error);
    for (size_t a = 0; a < c->n; a++)
        for (size_t b = a + 1; b < c->n; b++) {
            pairs[a][b] = fight(c, judge, catalogue, questions, a, b);
            int32_t *verdicts = allocate(3 * n, sizeof *verdicts);
            pairs[b][a] = allocate(n, sizeof *pairs[b][a]);
            turn(pairs[a][b], n, pairs[b][a], verdicts);
        }

    psoup_duel *pooled = allocate((size_t)c->rated * n, sizeof *pooled);
    for (size_t a = 0; a < c->n; a++) {
        contest_method *method = &c->methods[a];
        size_t count = 0;
        for (size_t b = 0; b < c->n; b++) {
            if (a == b)
                continue;
            must(psoup_winrate_aggregate(context, pairs[a][b], n, 1, &method->against[b], &error),
                 &error);
            if ((int)b < c->rated) {
                memcpy(pooled + count, pairs[a][b], n * sizeof *pooled);
                count += n;
            }
        }
        must(psoup_winrate_aggregate(context, pooled, count, 1, &method->against_all, &error),
             &error);
        must(psoup_winrate_helpfulness(context, pooled, count, 1, &method->helpful, &error),
             &error);
        for (int32_t k = 0; k < (c->n_users == 16 ? 8 : 6); k++)
            must(psoup_winrate_criterion(context, pooled, count, k, 1, &method->criterion[k],
                                         &error),
                 &error);
    }
    free(pooled);
    for (size_t a = 0; a < c->n; a++)
        for (size_t b = 0; b < c->n; b++)
            if (pairs[a][b]) {
                free((void *)(uintptr_t)pairs[a][b][0].verdicts);
                free(pairs[a][b]);
            }
    for (size_t p = 0; p < c->n_prompts; p++)
        free(questions[p]);
    free(questions);
    psoup_judge_free(judge);
    psoup_preferences_free(catalogue);
}

/* ---- telling
 * ---------------------------------------------------------------------------------------- */

void contest_print(const contest *c) {
    printf("\nWin rate over the others, %zu users, %zu held-out prompts%s (95 %% intervals by "
           "prompt)\n",
           c->n_users, c->n_prompts, c->n_seeds > 1 ? ", all seeds" : "");
    printf("  %-11s %-22s %-22s %6s %6s %8s %8s %7s %7s\n", "", "win rate", "helpfulness", "KL/tok",
           "words", "Mtokens", "updates", "GFLOP", "seconds");
    for (size_t m = 0; m < c->n; m++) {
        const contest_method *x = &c->methods[m];
        printf(
            "  %-11s %.3f [%.3f, %.3f]   %.3f [%.3f, %.3f]   %6.3f %6.1f %8.2f %8lld %7.0f %7.1f\n",
            x->name, x->against_all.rate, x->against_all.low, x->against_all.high, x->helpful.rate,
            x->helpful.low, x->helpful.high, x->kl_token, x->length, 1e-6 * (double)x->cost.tokens,
            (long long)x->cost.updates, 1e-9 * x->cost.flop, x->cost.seconds);
    }
    printf("\nWin rate of the row over the column\n  %-11s", "");
    for (size_t b = 0; b < c->n; b++)
        printf(" %-19s", c->methods[b].name);
    for (size_t a = 0; a < c->n; a++) {
        printf("\n  %-11s", c->methods[a].name);
        for (size_t b = 0; b < c->n; b++) {
            const psoup_rate *r = &c->methods[a].against[b];
            if (a == b)
                printf(" %-19s", ".");
            else
                printf(" %.3f [%.3f,%.3f] ", r->rate, r->low, r->high);
        }
    }
    printf("\n\nBy criterion, the win rate over the others, and the judge's mean score\n  %-11s",
           "");
    int criteria = c->n_users == 16 ? 8 : 6;
    for (int k = 0; k < criteria; k++)
        printf(" %-12s", world_preferences[k].symbol);
    printf(" helpful  valid\n");
    for (size_t m = 0; m < c->n; m++) {
        const contest_method *x = &c->methods[m];
        printf("  %-11s", x->name);
        for (int k = 0; k < criteria; k++)
            printf(" %.2f (%+.2f)", x->criterion[k].rate, x->score[k]);
        printf(" %+.3f  %.3f\n", x->helpful_score, x->valid);
    }
    printf("\n");
    fflush(stdout);
}
