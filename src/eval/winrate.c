/* Win rates with intervals by prompt (Jang et al. 2023, section 2.3 and appendix E). */
#include "eval/eval.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { REPLICATES = 2000 };

/* One duel's outcome. Duels of one group make one rate; the rates of all groups are averaged. */
typedef struct outcome {
    int64_t prompt, user;
    int32_t group; /* from 0 */
    int32_t verdict;
} outcome;

static int compare(int64_t x, int64_t y) { return (x > y) - (x < y); }

static int by_prompt(const void *a, const void *b) {
    return compare(((const outcome *)a)->prompt, ((const outcome *)b)->prompt);
}

static int by_user(const void *a, const void *b) {
    return compare(((const outcome *)a)->user, ((const outcome *)b)->user);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct count {
    int64_t wins, losses;
} count;

static void add(count *counts, const outcome *o) {
    counts[o->group].wins += o->verdict == PSOUP_A_WINS;
    counts[o->group].losses += o->verdict == PSOUP_B_WINS;
}

/* The mean of wins / (wins + losses) over the groups that have any; NaN when none has. */
static double mean_rate(const count *counts, size_t groups) {
    double sum = 0;
    size_t n = 0;
    for (size_t g = 0; g < groups; g++) {
        int64_t decided = counts[g].wins + counts[g].losses;
        if (decided == 0)
            continue;
        sum += (double)counts[g].wins / (double)decided;
        n++;
    }
    return n ? sum / (double)n : NAN;
}

/* Percentile bootstrap (Efron 1979) over prompts: prompts are drawn with replacement, each with all
 * its duels, since the same prompt under several users is not several observations. */
static void bootstrap(const outcome *outcomes, const size_t *start /* [prompts + 1] */,
                      size_t prompts, count *counts /* [groups] */, size_t groups, uint64_t seed,
                      double *rates /* [REPLICATES] */, psoup_rate *out) {
    psoup__random random = {.seed = seed};
    size_t kept = 0;
    for (int r = 0; r < REPLICATES; r++) {
        memset(counts, 0, groups * sizeof *counts);
        for (size_t i = 0; i < prompts; i++) {
            uint32_t pick = psoup__random_below(&random, (uint32_t)prompts);
            for (size_t k = start[pick]; k < start[pick + 1]; k++)
                add(counts, &outcomes[k]);
        }
        double one = mean_rate(counts, groups);
        if (!isnan(one))
            rates[kept++] = one;
    }
    if (kept == 0)
        return;
    qsort(rates, kept, sizeof *rates, by_value);
    out->low = rates[(size_t)(0.025 * (double)(kept - 1) + 0.5)];
    out->high = rates[(size_t)(0.975 * (double)(kept - 1) + 0.5)];
}

static psoup_status rate(psoup_context *context, outcome *outcomes, size_t n, bool each_user,
                         uint64_t seed, psoup_rate *out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t *start = psoup__alloc(context, n + 1, sizeof *start, error);
    count *counts = psoup__alloc(context, n + 1, sizeof *counts, error);
    double *rates = psoup__alloc(context, REPLICATES, sizeof *rates, error);
    if (!start || !counts || !rates) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    size_t prompts = 0, groups = 1;
    if (each_user && n > 0) {
        qsort(outcomes, n, sizeof *outcomes, by_user);
        for (size_t i = 1; i < n; i++) {
            groups += outcomes[i].user != outcomes[i - 1].user;
            outcomes[i].group = (int32_t)(groups - 1);
        }
    }
    if (n > 0)
        qsort(outcomes, n, sizeof *outcomes, by_prompt);
    for (size_t i = 0; i < n; i++) {
        if (i == 0 || outcomes[i].prompt != outcomes[i - 1].prompt)
            start[prompts++] = i;
        out->wins += outcomes[i].verdict == PSOUP_A_WINS;
        out->losses += outcomes[i].verdict == PSOUP_B_WINS;
        out->ties += outcomes[i].verdict == PSOUP_TIE;
        add(counts, &outcomes[i]);
    }
    start[prompts] = n;
    out->rate = mean_rate(counts, groups);
    if (out->wins + out->losses > 0)
        bootstrap(outcomes, start, prompts, counts, groups, seed, rates, out);
fail:
    psoup__free(context, start);
    psoup__free(context, counts);
    psoup__free(context, rates);
    return status;
}

psoup_status psoup__duels_check(const psoup_duel *duels, size_t n, psoup_error *error) {
    for (size_t i = 0; i < n; i++)
        if (!psoup__all_zero(duels[i].reserved, sizeof duels[i].reserved))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "duels[%zu].reserved is not 0", i);
    return PSOUP_OK;
}

typedef enum measure { AGGREGATE, CRITERION, HELPFULNESS } measure;

/* What one duel says under a measure; false when it says nothing. Unparsed verdicts are counted. */
static bool outcome_of(const psoup_duel *duel, measure what, int32_t preference, int32_t *verdict,
                       int64_t *unparsed) {
    int sum = 0;
    bool found = false;
    if (what == HELPFULNESS) {
        *unparsed += duel->helpfulness == PSOUP_UNPARSED;
        *verdict = duel->helpfulness;
        return duel->helpfulness != PSOUP_UNPARSED;
    }
    for (size_t i = 0; i < duel->n; i++) {
        if (what == CRITERION && duel->preferences[i] != preference)
            continue;
        if (duel->verdicts[i] == PSOUP_UNPARSED) {
            ++*unparsed;
            if (what == CRITERION)
                continue;
        } else
            sum += duel->verdicts[i];
        found = true;
    }
    *verdict = (sum > 0) - (sum < 0);
    return found;
}

static psoup_status measure_duels(psoup_context *context, const psoup_duel *duels, size_t n,
                                  measure what, int32_t preference, uint64_t seed, psoup_rate *out,
                                  psoup_error *error) {
    if (!out || (n > 0 && !duels))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_winrate: duels or out is NULL");
    *out = (psoup_rate){.rate = NAN, .low = NAN, .high = NAN};
    if (n > INT32_MAX)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%zu duels: expected at most %d", n,
                           INT32_MAX);
    psoup_status checked = psoup__duels_check(duels, n, error);
    if (checked != PSOUP_OK)
        return checked;
    outcome *outcomes = psoup__alloc(context, n, sizeof *outcomes, error);
    if (!outcomes)
        return PSOUP_ERROR_MEMORY;
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        outcomes[kept] = (outcome){.prompt = duels[i].prompt, .user = duels[i].user};
        kept += outcome_of(&duels[i], what, preference, &outcomes[kept].verdict, &out->unparsed);
    }
    psoup_status status = rate(context, outcomes, kept, what == CRITERION, seed, out, error);
    psoup__free(context, outcomes);
    return status;
}

psoup_status psoup_winrate_aggregate(psoup_context *context, const psoup_duel *duels, size_t n,
                                     uint64_t seed, psoup_rate *out, psoup_error *error) {
    return measure_duels(context, duels, n, AGGREGATE, -1, seed, out, error);
}

psoup_status psoup_winrate_criterion(psoup_context *context, const psoup_duel *duels, size_t n,
                                     int32_t preference, uint64_t seed, psoup_rate *out,
                                     psoup_error *error) {
    return measure_duels(context, duels, n, CRITERION, preference, seed, out, error);
}

psoup_status psoup_winrate_helpfulness(psoup_context *context, const psoup_duel *duels, size_t n,
                                       uint64_t seed, psoup_rate *out, psoup_error *error) {
    return measure_duels(context, duels, n, HELPFULNESS, -1, seed, out, error);
}
