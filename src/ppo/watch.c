/* Signs that a policy collapses, or that its numbers cannot be right. They are told, and change nothing. */
#include <math.h>
#include <string.h>

#include "ppo/ppo.h"

enum { GRAM = 4 };

size_t psoup__repeated_grams(const int32_t *tokens, size_t n, int32_t *table, size_t size) {
    size_t repeated = 0;
    if (n < GRAM)
        return 0;
    memset(table, 0xff, size * sizeof(*table)); /* −1: free; else where a gram first stood */
    for (size_t i = 0; i + GRAM <= n; i++) {
        uint64_t hash = 0;
        for (size_t k = 0; k < GRAM; k++)
            hash = (hash ^ (uint32_t)tokens[i + k]) * UINT64_C(0x9E3779B97F4A7C15);
        size_t at = (size_t)(hash >> 32) & (size - 1);
        while (table[at] >= 0 && memcmp(tokens + table[at], tokens + i, GRAM * sizeof(*tokens)) != 0)
            at = (at + 1) & (size - 1);
        if (table[at] >= 0)
            repeated++;
        else
            table[at] = (int32_t)i;
    }
    return repeated;
}

/* Means over the older and the newer half of the window. */
typedef struct halves {
    double reward[2], kl[2], deviation; /* the latter over all of it */
    double rise; /* of the reward, in deviations */
} halves;

static halves halves_of(const psoup__watch *watch, int64_t step, int64_t window) {
    halves h = {.rise = 0.0};
    int64_t older = window / 2;
    for (int64_t i = 0; i < window; i++) {
        int64_t at = (step + 1 + i) % window; /* the oldest is where the next will be */
        int half = i >= older;
        double n = (double)(half ? window - older : older);
        h.reward[half] += watch->reward[at] / n;
        h.kl[half] += watch->kl[at] / n;
        h.deviation += watch->deviation[at] / (double)window;
    }
    double difference = h.reward[1] - h.reward[0];
    h.rise = difference == 0.0 ? 0.0 : difference / h.deviation; /* without a deviation: infinite */
    return h;
}

/* A policy whose KL to the reference is K has a mean reward within σ √(2K) of the reference's, where the reward's tails
 * are no heavier than a normal distribution's of deviation σ (Boucheron, Lugosi & Massart 2013, lemma 4.18). Two means
 * z σ apart therefore need a K of z²/8 at one of them at least. Two fifths of that are asked for, since σ is
 * estimated. */
static bool rose_for_nothing(const halves *h, float bound) {
    double paid = fmax(h->kl[0], h->kl[1]);
    return bound > 0.0f && h->rise > bound && paid < 0.4 * h->rise * h->rise / 8.0;
}

/* More KL buys less: it grew by the factor, and past 1 nat, while the reward fell by more than twice the error of its
 * means over so many responses. */
static bool paid_for_nothing(const halves *h, float bound, double responses) {
    double error = h->deviation * sqrt(4.0 / responses);
    return bound > 0.0f && h->kl[1] > 1.0 && h->kl[1] > bound * h->kl[0] &&
           h->reward[1] < h->reward[0] - 2.0 * error;
}

/* Notes whether a warning holds; true where it did not before, on the one rank that tells. */
static bool tell(const psoup_ppo *ppo, psoup__policy *policy, int bit, bool holds) {
    int64_t mask = (int64_t)1 << bit;
    bool news = holds && !(policy->next.watch.warned & mask);
    policy->next.watch.warned = holds ? policy->next.watch.warned | mask : policy->next.watch.warned & ~mask;
    return news && ppo->team.rank == 0;
}

static void watch_texts(const psoup_ppo *ppo, psoup__policy *policy, const psoup__ppo_summary *seen) {
    const psoup_ppo_options *o = &ppo->options;
    psoup_context *context = ppo->model->context;
    long long step = policy->next.step;
    if (tell(ppo, policy, 0, o->warn_repetition > 0.0f && seen->repetition > o->warn_repetition))
        psoup__log(context, PSOUP_LOG_WARNING,
                   "ppo: policy '%s', step %lld: %.0f%% of the 4-grams of its responses repeat (warn_repetition is "
                   "%g): it may be collapsing", policy->name, step, 100.0 * seen->repetition,
                   (double)o->warn_repetition);
    if (tell(ppo, policy, 1, o->warn_empty > 0.0f && seen->empty > o->warn_empty))
        psoup__log(context, PSOUP_LOG_WARNING,
                   "ppo: policy '%s', step %lld: %.0f%% of its responses are empty (warn_empty is %g): it may be "
                   "collapsing", policy->name, step, 100.0 * seen->empty, (double)o->warn_empty);
}

static void watch_reward(const psoup_ppo *ppo, psoup__policy *policy, const halves *h) {
    const psoup_ppo_options *o = &ppo->options;
    psoup_context *context = ppo->model->context;
    long long step = policy->next.step;
    if (tell(ppo, policy, 2, rose_for_nothing(h, o->warn_reward_rise)))
        psoup__log(context, PSOUP_LOG_WARNING,
                   "ppo: policy '%s', step %lld: its reward rose from %g to %g, %.2g deviations, over %d steps at a KL "
                   "of %.3g, where such a rise costs about %.3g: the reward does not come from the policy, or its KL is "
                   "not what is estimated", policy->name, step, h->reward[0], h->reward[1], h->rise,
                   (int)o->warn_window, h->kl[1], h->rise * h->rise / 8.0);
    if (tell(ppo, policy, 3, paid_for_nothing(h, o->warn_kl_growth, (double)o->batch_size * o->warn_window)))
        psoup__log(context, PSOUP_LOG_WARNING,
                   "ppo: policy '%s', step %lld: its KL grew from %.3g to %.3g over %d steps while its reward fell "
                   "from %g to %g: it leaves the reference for nothing", policy->name, step, h->kl[0], h->kl[1],
                   (int)o->warn_window, h->reward[0], h->reward[1]);
}

void psoup__ppo_watch(const psoup_ppo *ppo, psoup__policy *policy, const psoup__ppo_summary *seen) {
    int64_t window = ppo->options.warn_window, step = policy->next.step;
    psoup__watch *watch = &policy->next.watch;
    halves h = {.rise = 0.0};
    watch->reward[step % window] = seen->reward;
    watch->deviation[step % window] = seen->deviation;
    watch->kl[step % window] = seen->kl;
    watch_texts(ppo, policy, seen);
    if (step >= window && ppo->options.batch_size > 1) { /* one response to a step has no deviation */
        h = halves_of(watch, step, window);
        watch_reward(ppo, policy, &h);
    }
    int warnings = 0;
    for (int64_t left = watch->warned; left; left &= left - 1)
        warnings++;
    psoup__metric(&policy->metrics, "reward_rise", h.rise);
    psoup__metric(&policy->metrics, "warnings", warnings);
}
