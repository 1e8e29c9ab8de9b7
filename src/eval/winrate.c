/* Win rates with intervals by prompt (Jang et al. 2023, section 2.3 and appendix E). */
#include "eval/eval.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { REPLICATES = 2000 };

/* One duel's outcome, or not counted at all. */
typedef struct outcome {
    int64_t prompt;
    int32_t verdict;
} outcome;

static int by_prompt(const void *a, const void *b) {
    int64_t x = ((const outcome *)a)->prompt, y = ((const outcome *)b)->prompt;
    return (x > y) - (x < y);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Percentile bootstrap (Efron 1979) over prompts: prompts are drawn with replacement, each with all
 * its duels, since the same prompt under several users is not several observations. */
static void bootstrap(const int64_t *wins, const int64_t *losses, size_t prompts, uint64_t seed,
                      double *rates /* [REPLICATES] */, psoup_rate *out) {
    psoup__random random = {.seed = seed};
    size_t kept = 0;
    for (int r = 0; r < REPLICATES; r++) {
        int64_t w = 0, l = 0;
        for (size_t i = 0; i < prompts; i++) {
            uint32_t pick = psoup__random_below(&random, (uint32_t)prompts);
            w += wins[pick];
            l += losses[pick];
        }
        if (w + l > 0)
            rates[kept++] = (double)w / (double)(w + l);
    }
    if (kept == 0)
        return;
    qsort(rates, kept, sizeof *rates, by_value);
    out->low = rates[(size_t)(0.025 * (double)(kept - 1) + 0.5)];
    out->high = rates[(size_t)(0.975 * (double)(kept - 1) + 0.5)];
}

static psoup_status rate(psoup_context *context, outcome *outcomes, size_t n, uint64_t seed,
                         psoup_rate *out, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    int64_t *wins = psoup__alloc(context, n, sizeof *wins, error);
    int64_t *losses = psoup__alloc(context, n, sizeof *losses, error);
    double *rates = psoup__alloc(context, REPLICATES, sizeof *rates, error);
    if (!wins || !losses || !rates) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    qsort(outcomes, n, sizeof *outcomes, by_prompt);
    size_t prompts = 0;
    for (size_t i = 0; i < n; i++) {
        prompts += i == 0 || outcomes[i].prompt != outcomes[i - 1].prompt;
        out->wins += outcomes[i].verdict == PSOUP_A_WINS;
        out->losses += outcomes[i].verdict == PSOUP_B_WINS;
        out->ties += outcomes[i].verdict == PSOUP_TIE;
        wins[prompts - 1] += outcomes[i].verdict == PSOUP_A_WINS;
        losses[prompts - 1] += outcomes[i].verdict == PSOUP_B_WINS;
    }
    if (prompts > UINT32_MAX) {
        status = psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%zu prompts, expected under 2^32",
                             prompts);
        goto fail;
    }
    if (out->wins + out->losses > 0) {
        out->rate = (double)out->wins / (double)(out->wins + out->losses);
        bootstrap(wins, losses, prompts, seed, rates, out);
    }
fail:
    psoup__free(context, wins);
    psoup__free(context, losses);
    psoup__free(context, rates);
    return status;
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
    *out = (psoup_rate){.rate = NAN, .low = NAN, .high = NAN};
    outcome *outcomes = psoup__alloc(context, n, sizeof *outcomes, error);
    if (!outcomes)
        return PSOUP_ERROR_MEMORY;
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        outcomes[kept].prompt = duels[i].prompt;
        kept += outcome_of(&duels[i], what, preference, &outcomes[kept].verdict, &out->unparsed);
    }
    psoup_status status = rate(context, outcomes, kept, seed, out, error);
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
