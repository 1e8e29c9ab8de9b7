/* Advantages and the losses of policies. The references are written from the papers, without src/base/policy.h. */
#include "checkops.h"

enum { RESPONSES = 7, GAP = 5 }; /* GAP: numbers before and between responses that nobody asks for */
static const int32_t lengths[RESPONSES] = {1, 37, 64, 127, 128, 129, 640};

/* ---- generalised advantages ----------------------------------------------------------------------------- */

/* A_t = Σ_k (γλ)^k δ_{t+k}, summed up for each token by itself. */
static void check_gae_of(checker *c, double gamma, double lambda) {
    begin(c, "gae", "gamma %g, lambda %g, %d responses of 1 to 640 tokens", gamma, lambda, RESPONSES);
    int32_t first[RESPONSES + 1] = {0};
    for (int i = 0; i < RESPONSES; i++)
        first[i + 1] = first[i] + lengths[i];
    const size_t n = (size_t)first[RESPONSES];
    buffer *reward = input(c, n), *value = input(c, n), *advantage = output(c, n), *returns = output(c, n);
    double *want = doubles(n), *want_returns = doubles(n);
    c->ops->gae(c->be, advantage->device, returns->device, reward->device, value->device, block(c, first, sizeof first),
                RESPONSES, gamma, lambda);
    for (int i = 0; i < RESPONSES; i++)
        for (int32_t t = first[i]; t < first[i + 1]; t++) {
            double power = 1;
            for (int32_t k = t; k < first[i + 1]; k++, power *= gamma * lambda) {
                const double then = k + 1 < first[i + 1] ? value->host[k + 1] : 0;
                want[t] += power * (reward->host[k] + gamma * then - value->host[k]);
            }
            want_returns[t] = want[t] + value->host[t];
        }
    expect(c, "advantage", advantage, want, 1e-7);
    expect(c, "returns", returns, want_returns, 1e-7);
    free(want), free(want_returns);
}

/* A response's numbers know nothing of the others, nor of its place. */
static void check_gae_alone(checker *c) {
    enum { BEFORE = 129, LENGTH = 127 };
    begin(c, "gae", "a response of %d tokens alone, and behind one of %d", LENGTH, BEFORE);
    const int32_t both[3] = {0, BEFORE, BEFORE + LENGTH}, alone[2] = {0, LENGTH};
    buffer *reward = input(c, BEFORE + LENGTH), *value = input(c, BEFORE + LENGTH);
    buffer *one[2] = {output(c, LENGTH), output(c, LENGTH)};
    buffer *two[2] = {output(c, BEFORE + LENGTH), output(c, BEFORE + LENGTH)};
    c->ops->gae(c->be, two[0]->device, two[1]->device, reward->device, value->device, block(c, both, sizeof both), 2, 0.99,
                0.95);
    c->ops->gae(c->be, one[0]->device, one[1]->device, reward->device + BEFORE, value->device + BEFORE,
                block(c, alone, sizeof alone), 1, 0.99, 0.95);
    for (int k = 0; k < 2; k++) {
        get(c, one[k]), get(c, two[k]);
        expect_true(c, k ? "returns have the same bits" : "advantages have the same bits",
                    memcmp(one[k]->host, two[k]->host + BEFORE, LENGTH * sizeof(float)) == 0);
    }
}

/* ---- losses ----------------------------------------------------------------------------------------------- */

/* One objective, and the numbers that it is of, in f64. */
typedef struct problem {
    psoup__objective objective;
    bool kl, critic;
    size_t n;               /* tokens, those between the responses too */
    psoup__response response[RESPONSES];
    double *logprob, *value; /* [n]; response i's from response[i].first */
    double *old, *advantage, *ref, *old_value, *returns; /* [n]; from response[i].old */
} problem;

static double clip_to(double x, double low, double high) {
    return x < low ? low : x > high ? high : x;
}

/* A response's loss, which is differentiated; adds to its sums. */
static double lose(const problem *p, const psoup__response *r, psoup__loss_terms *sums) {
    const psoup__objective *o = &p->objective;
    double policy = 0, values = 0, whole = 0;
    for (int32_t t = 0; t < r->tokens; t++)
        whole += p->logprob[r->first + t] - p->old[r->old + t];
    for (int32_t t = 0; t < (o->whole ? 1 : r->tokens); t++) {
        const double d = o->whole ? whole : p->logprob[r->first + t] - p->old[r->old + t];
        const double a = p->advantage[r->old + t], ratio = exp(d);
        const double plain = -a * ratio, clipped = -a * clip_to(ratio, 1 - o->clip, 1 + o->clip);
        policy += fmax(plain, clipped);
        sums->ratio += ratio;
        sums->ratio_max = fmax(sums->ratio_max, ratio);
        sums->kl -= d;
        sums->clipped += clipped > plain;
    }
    for (int32_t t = 0; p->kl && t < r->tokens; t++) {
        const double d = p->logprob[r->first + t] - p->ref[r->old + t];
        policy += r->beta * (o->estimator == PSOUP__K2 ? d * d / 2 : exp(-d) - 1 + d);
    }
    for (int32_t t = 0; p->critic && t < r->tokens; t++) {
        const double v = p->value[r->first + t], old = p->old_value[r->old + t], goal = p->returns[r->old + t];
        const double near = clip_to(v, old - o->value_clip, old + o->value_clip);
        values += fmax((v - goal) * (v - goal), (near - goal) * (near - goal)) / 2;
        sums->value_clipped += (near - goal) * (near - goal) > (v - goal) * (v - goal);
    }
    sums->policy_loss += policy;
    sums->value_loss += values;
    return r->scale * (policy + o->value_coefficient * values);
}

/* So near to x that some are clipped and some are not. */
static buffer *near_to(checker *c, const double *x, size_t n, double far) {
    buffer *b = input(c, n);
    for (size_t i = 0; i < n; i++)
        b->host[i] = (float)(x[i] + far * b->host[i]);
    put(c, b);
    return b;
}

static double *numbers(checker *c, size_t n, buffer **out) {
    *out = input(c, n);
    return doubles_of((*out)->host, n);
}

/* Every response's sums, against their own definition. */
static void check_terms(checker *c, const problem *p, const psoup__loss_terms *terms) {
    const char *const names[] = {"policy_loss", "value_loss", "ratio", "ratio_max", "kl", "clipped", "value_clipped"};
    for (int i = 0; i < RESPONSES; i++) {
        psoup__loss_terms sums = {0};
        lose(p, &p->response[i], &sums);
        const double *want = &sums.policy_loss, *got = &terms[i].policy_loss;
        for (int k = 0; k < 7; k++) {
            c->checks++;
            if (!(fabs(got[k] - want[k]) <= 1e-11 * (1 + fabs(want[k]))))
                fail(c, "%s of response %d is %.17g, expected %.17g", names[k], i, got[k], want[k]);
        }
        expect_true(c, "tokens and ratios are counted",
                    terms[i].tokens == lengths[i] && terms[i].ratios == (p->objective.whole ? 1 : lengths[i]) &&
                        terms[i].broken == 0);
    }
}

/* What lies between the responses stays NaN. */
static void check_gaps(checker *c, const problem *p, buffer *b) {
    bool kept = true;
    get(c, b);
    for (size_t k = 0, i = 0; k < p->n; k++) {
        while (i < RESPONSES && k >= (size_t)(p->response[i].first + p->response[i].tokens))
            i++;
        if (i == RESPONSES || k < (size_t)p->response[i].first)
            kept = kept && isnan(b->host[k]);
    }
    expect_true(c, "nothing is written between the responses", kept);
}

/* The gradient at the tokens that a response has, by differences of the loss. */
static void check_gradient(checker *c, problem *p, const char *what, buffer *got, double *x) {
    for (int i = 0; i < RESPONSES; i++) {
        const psoup__response *r = &p->response[i];
        buffer part = {.host = malloc(((size_t)r->tokens + 1) * sizeof(float)), .device = got->device + r->first,
                       .n = (size_t)r->tokens, .dtype = PSOUP_F32};
        psoup_error error;
        c->checks++;
        if (c->ops->read(c->be, part.host, part.device, part.n * sizeof(float), &error) != PSOUP_OK)
            fail(c, "%s", error.message);
        for (int32_t t = 0; t < r->tokens; t += r->tokens > 100 ? 13 : 1) {
            const double h = 1e-6, kept = x[r->first + t];
            psoup__loss_terms none = {0};
            x[r->first + t] = kept + h;
            const double above = lose(p, r, &none);
            x[r->first + t] = kept - h;
            const double want = (above - lose(p, r, &none)) / (2 * h);
            x[r->first + t] = kept;
            if (!(fabs(part.host[t] - want) <= 1e-6 * (1 + fabs(want)))) {
                fail(c, "%s[%d] of response %d is %.9g; by finite differences %.9g", what, (int)t, i,
                     (double)part.host[t], want);
                break;
            }
        }
        free(part.host);
    }
}

static void check_objective(checker *c, const char *name, psoup__objective objective, bool kl, bool critic) {
    problem p = {.objective = objective, .kl = kl, .critic = critic};
    begin(c, "policy_loss", "%s, clip %g, value clip %g, k%d; %d responses of 1 to 640 tokens", name, objective.clip,
          objective.value_clip, (int)objective.estimator, RESPONSES);
    int32_t first = GAP;
    int64_t old = 0;
    for (int i = 0; i < RESPONSES; i++) {
        p.response[i] = (psoup__response){.scale = 0.5 + i, .beta = 0.05 * (1 + i), .first = first, .tokens = lengths[i]};
        first += lengths[i] + GAP;
    }
    p.n = (size_t)first;
    for (int i = RESPONSES; i-- > 0; old += lengths[i]) /* what was known stands in another order */
        p.response[i].old = old;
    buffer *known[5], *logprob, *value;
    p.old = numbers(c, p.n, &known[0]);
    p.advantage = numbers(c, p.n, &known[1]);
    p.ref = numbers(c, p.n, &known[2]);
    p.old_value = numbers(c, p.n, &known[3]);
    p.returns = numbers(c, p.n, &known[4]);
    double *at_old[2] = {doubles(p.n), doubles(p.n)};
    for (int i = 0; i < RESPONSES; i++)
        for (int32_t t = 0; t < lengths[i]; t++) {
            at_old[0][p.response[i].first + t] = p.old[p.response[i].old + t];
            at_old[1][p.response[i].first + t] = p.old_value[p.response[i].old + t];
        }
    logprob = near_to(c, at_old[0], p.n, objective.whole ? 0.02 : 0.2);
    value = near_to(c, at_old[1], p.n, 0.3);
    p.logprob = doubles_of(logprob->host, p.n);
    p.value = doubles_of(value->host, p.n);
    buffer *dlogprob = output(c, p.n), *dvalue = output(c, p.n);
    psoup__loss_terms terms[RESPONSES];
    memset(terms, 0xff, sizeof terms);
    psoup__loss_terms *device = block(c, terms, sizeof terms);
    const psoup__old given = {known[0]->device, known[1]->device, kl ? known[2]->device : NULL,
                              critic ? known[3]->device : NULL, critic ? known[4]->device : NULL};
    psoup_error error;
    c->ops->policy_loss(c->be, dlogprob->device, critic ? dvalue->device : NULL, device, logprob->device,
                        critic ? value->device : NULL, &given, block(c, p.response, sizeof p.response), RESPONSES,
                        &objective);
    expect_true(c, "it is done", c->ops->read(c->be, terms, device, sizeof terms, &error) == PSOUP_OK);
    check_terms(c, &p, terms);
    check_gradient(c, &p, "dlogprob", dlogprob, p.logprob);
    check_gaps(c, &p, dlogprob);
    if (critic) {
        check_gradient(c, &p, "dvalue", dvalue, p.value);
        check_gaps(c, &p, dvalue);
    }
    double *all[] = {p.old, p.advantage, p.ref, p.old_value, p.returns, p.logprob, p.value, at_old[0], at_old[1]};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

/* Ratios and values that are no finite numbers are counted, those of one response in its own sums alone. */
static void check_broken(checker *c) {
    enum { N = 40 };
    const float bad[] = {NAN, INFINITY, 1e30f};
    const psoup__response response[2] = {{.scale = 1, .tokens = N}, {.scale = 1, .first = N, .tokens = N, .old = N}};
    for (int k = 0; k < 3 * 2; k++) {
        const bool of_value = k >= 3;
        begin(c, "policy_loss", "a %s of %g", of_value ? "value" : "log-prob", (double)bad[k % 3]);
        const psoup__objective objective = {.clip = 0.2, .value_clip = 0.2, .value_coefficient = 1};
        buffer *logprob = input(c, (size_t)2 * N), *value = input(c, (size_t)2 * N), *old = input(c, (size_t)2 * N);
        buffer *dlogprob = output(c, (size_t)2 * N), *dvalue = output(c, (size_t)2 * N);
        (of_value ? value : logprob)->host[N + 37] = bad[k % 3];
        put(c, logprob), put(c, value);
        const psoup__old given = {old->device, old->device, NULL, old->device, old->device};
        psoup__loss_terms terms[2], *device = block(c, NULL, sizeof terms);
        psoup_error error;
        c->ops->policy_loss(c->be, dlogprob->device, dvalue->device, device, logprob->device, value->device, &given,
                            block(c, response, sizeof response), 2, &objective);
        expect_true(c, "it is done", c->ops->read(c->be, terms, device, sizeof terms, &error) == PSOUP_OK);
        expect_true(c, "one number is broken", terms[0].broken == 0 &&
                                                   terms[1].broken == (of_value && bad[k % 3] == 1e30f ? 0 : 1));
    }
}

void check_policy(checker *c) {
    static const double pairs[][2] = {{1, 0.95}, {0.99, 0.9}, {1, 1}, {0.9, 0}, {0, 0.5}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        check_gae_of(c, pairs[i][0], pairs[i][1]);
    check_gae_alone(c);
    check_objective(c, "PPO", (psoup__objective){0.2, 0.2, 0.1, 0, 0}, false, true);
    check_objective(c, "PPO", (psoup__objective){0.1, 0.5, 1, 0, 0}, false, true);
    check_objective(c, "RLOO", (psoup__objective){0.2, 0, 0, 1, 0}, false, false);
    check_objective(c, "GRPO", (psoup__objective){0.2, 0, 0, 0, PSOUP__K3}, true, false);
    check_objective(c, "GRPO", (psoup__objective){0.2, 0, 0, 0, PSOUP__K2}, true, false);
    check_objective(c, "RLOO with a KL term and a critic", (psoup__objective){0.2, 0.2, 0.5, 1, PSOUP__K3}, true, true);
    check_broken(c);
}
