/* Where learning ends: on responses of one token each objective's fixed point is known, and is reached. */
#include "ppo_case.h"

static double reward_of(int token) { return 0.15 * ((token * 7) % VOCABULARY); }

/* What a prompt's rewards are times that. */
enum { BANDITS = 2 };
static const double stake[BANDITS] = {1.0, 0.4};

static int pay_token(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    for (size_t i = 0; i < n; i++)
        scores[i] = (float)(stake[rollouts[i].prompt->id] * reward_of(rollouts[i].response[0]));
    return 0;
}

static psoup_model *bandit_model(void) {
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_model *model;
    config.vocab_size = VOCABULARY;
    config.hidden_size = 32;
    config.intermediate_size = 32;
    config.num_hidden_layers = 1;
    config.num_attention_heads = 1;
    config.num_key_value_heads = 1;
    config.max_position_embeddings = 4;
    config.initializer_range = 0.3f;
    OK(psoup_model_create(context, &config, 7, &model, &error));
    add_adapter(model, "P0", 1);
    return model;
}

/* Trains on the first n prompts; ref and got [n] receive π_ref and π. */
static void train(const psoup_ppo_options *o, size_t n, double (*ref)[VOCABULARY], double (*got)[VOCABULARY]) {
    static const int32_t token[BANDITS] = {2, 9};
    const float mix[1] = {1.0f};
    psoup_model *model = bandit_model();
    const psoup_ppo_prompt asked[BANDITS] = {{.tokens = &token[0], .n = 1}, {.tokens = &token[1], .n = 1, .id = 1}};
    psoup_ppo_policy p = {.adapter = "P0", .reward_fn = pay_token, .prompts = asked, .n_prompts = n, .seed = 11};
    psoup_ppo *ppo = create(model, &p, 1, o);
    OK(psoup_ppo_run(ppo, &error));
    psoup_ppo_free(ppo);
    for (size_t i = 0; i < n * VOCABULARY; i++) {
        int a = (int)(i % VOCABULARY);
        const int32_t row[2] = {token[i / VOCABULARY], a};
        const psoup_row policy_row = {row, 2, mix}, base = {row, 2, NULL};
        float logprob;
        OK(psoup_model_logprobs(model, &policy_row, 1, &logprob, &error));
        got[i / VOCABULARY][a] = exp(logprob);
        OK(psoup_model_logprobs(model, &base, 1, &logprob, &error));
        ref[i / VOCABULARY][a] = exp(logprob);
    }
    psoup_model_free(model);
}

static psoup_ppo_options bandit(psoup_objective objective) {
    psoup_ppo_options o = PSOUP_PPO_OPTIONS_INIT;
    o.objective = objective;
    o.group_size = 8;
    o.batch_size = 512;
    o.steps = 150;
    o.ppo_epochs = 1;
    o.max_new_tokens = 1;
    o.normalize_reward = o.adaptive_kl = 0;
    o.kl_coefficient = 0.5f;
    o.learning_rate = 3e-3f;
    return o;
}

/* ---- the fixed points ------------------------------------------------------------------------------- */

static double mean_reward(const double *p) {
    double sum = 0.0;
    for (int a = 0; a < VOCABULARY; a++)
        sum += p[a] * reward_of(a);
    return sum;
}

static double deviation(const double *p) {
    double sum = 0.0, mean = mean_reward(p);
    for (int a = 0; a < VOCABULARY; a++)
        sum += p[a] * (reward_of(a) - mean) * (reward_of(a) - mean);
    return sqrt(sum);
}

/* π ∝ π_ref exp(r / b): of E[r] − b KL(π ‖ π_ref). */
static void tilted(double *p, const double *ref, double b) {
    double total = 0.0;
    for (int a = 0; a < VOCABULARY; a++)
        total += p[a] = ref[a] * exp(reward_of(a) / b);
    for (int a = 0; a < VOCABULARY; a++)
        p[a] /= total;
}

/* π = π_ref b / (b + J − r), J so that they sum to 1: of E[r] − b KL(π_ref ‖ π). */
static void inverse(double *p, const double *ref, double b) {
    double low = 15 * 0.15 - b, high = 15 * 0.15; /* b + J above the largest reward */
    for (int i = 0; i < 200; i++) {
        double j = 0.5 * (low + high), total = 0.0;
        for (int a = 0; a < VOCABULARY; a++)
            total += p[a] = ref[a] * b / (b + j - reward_of(a));
        *(total > 1.0 ? &low : &high) = j;
    }
}

/* π ∝ π_ref exp(r / (b σ)), σ the deviation of r under π itself. */
static void scaled(double *p, const double *ref, double b) {
    double sigma = 1.0;
    for (int i = 0; i < 500; i++) {
        tilted(p, ref, b * sigma);
        sigma = 0.9 * sigma + 0.1 * deviation(p);
    }
}

/* Of all rewards that the prompts are paid, as often asked the one as the other. */
static double step_deviation(double (*p)[VOCABULARY], size_t n) {
    double mean = 0.0, squares = 0.0;
    for (size_t k = 0; k < n; k++)
        mean += stake[k] * mean_reward(p[k]) / (double)n;
    for (size_t k = 0; k < n; k++)
        squares += (pow(stake[k] * deviation(p[k]), 2.0) + pow(stake[k] * mean_reward(p[k]) - mean, 2.0)) / (double)n;
    return sqrt(squares);
}

/* π = π_ref b σ / (b σ + J − r), σ the deviation of r under π, of the prompt's own rewards or of all: where the
 * gradient of the advantages (r − J) / σ and that of b k3, 1 − π_ref/π, cancel. */
static void scaled_inverse(double (*p)[VOCABULARY], double (*ref)[VOCABULARY], size_t n, double b, bool step) {
    double sigma[BANDITS] = {1.0, 1.0};
    for (int i = 0; i < 500; i++) {
        for (size_t k = 0; k < n; k++)
            inverse(p[k], ref[k], b * sigma[k] / stake[k]);
        for (size_t k = 0; k < n; k++)
            sigma[k] = 0.9 * sigma[k] + 0.1 * (step ? step_deviation(p, n) : stake[k] * deviation(p[k]));
    }
}

/* The same by going there: small steps along the exact gradient by the logits, from π_ref. */
static void ascended(double (*p)[VOCABULARY], double (*ref)[VOCABULARY], size_t n, double b, bool step) {
    double logit[BANDITS][VOCABULARY];
    for (size_t i = 0; i < n * VOCABULARY; i++)
        logit[i / VOCABULARY][i % VOCABULARY] = log(ref[i / VOCABULARY][i % VOCABULARY]);
    for (int i = 0; i < 200000; i++) {
        for (size_t k = 0; k < n; k++) {
            double total = 0.0;
            for (int a = 0; a < VOCABULARY; a++)
                total += p[k][a] = exp(logit[k][a]);
            for (int a = 0; a < VOCABULARY; a++)
                p[k][a] /= total;
        }
        for (size_t k = 0; k < n; k++) {
            double mean = mean_reward(p[k]), sigma = step ? step_deviation(p, n) : stake[k] * deviation(p[k]);
            for (int a = 0; a < VOCABULARY; a++) {
                double advantage = stake[k] * (reward_of(a) - mean) / sigma;
                logit[k][a] += 0.2 * (p[k][a] * advantage - b * (p[k][a] - ref[k][a]));
            }
        }
    }
}

static double apart(const double *p, const double *q) {
    double sum = 0.0;
    for (int a = 0; a < VOCABULARY; a++)
        sum += 0.5 * fabs(p[a] - q[a]);
    return sum;
}

/* ---- and that they are reached ---------------------------------------------------------------------- */

enum { RLOO, PPO, DR_GRPO, DR_GRPO_K3, GRPO, CASES };

START_TEST(fixed_points_are_reached) {
    static const psoup_objective objective[CASES] = {PSOUP_OBJECTIVE_RLOO, PSOUP_OBJECTIVE_PPO, PSOUP_OBJECTIVE_GRPO,
                                                     PSOUP_OBJECTIVE_GRPO, PSOUP_OBJECTIVE_GRPO};
    static void (*const point[CASES])(double *, const double *, double) = {tilted, tilted, tilted, inverse, scaled};
    double ref[VOCABULARY], got[VOCABULARY], expected[VOCABULARY], other[VOCABULARY];
    psoup_ppo_options o = bandit(objective[_i]);
    if (_i == PPO) {
        o.ppo_epochs = 2;
        o.learning_rate = 1e-3f;
        o.whiten_advantages = 0;
    } else if (_i != RLOO) { /* a group's mean has each reward in it: k/(k − 1) times the penalty's weight */
        o.group_size = 64;
        o.kl_estimator = _i == DR_GRPO_K3 ? PSOUP_KL_DEFAULT : PSOUP_KL_K2;
        o.scale_rewards = _i == GRPO ? PSOUP_SCALE_GROUP : PSOUP_SCALE_NONE;
        o.kl_coefficient = _i == GRPO ? 1.5f : 0.5f; /* with less the deviation has no fixed point but 0 */
    }
    train(&o, 1, &ref, &got);
    point[_i](expected, ref, o.kl_coefficient);
    ck_assert_msg(apart(ref, expected) > 0.2, "it began %g away", apart(ref, expected));
    ck_assert_msg(apart(got, expected) < 0.05, "total variation %g", apart(got, expected));
    for (int c = DR_GRPO; c < CASES; c++) { /* and no other is meant */
        point[c](other, ref, o.kl_coefficient);
        if (point[c] != point[_i] && isfinite(apart(got, other)))
            ck_assert_msg(apart(got, other) > 2.0 * apart(got, expected), "case %d: total variation %g", c,
                          apart(got, other));
    }
}
END_TEST

/* GRPO's own loss, k3, with what divides its advantages: two prompts whose stakes differ tell a group's deviation from
 * the step's. */
START_TEST(scaled_advantages_and_k3) {
    double ref[BANDITS][VOCABULARY], got[BANDITS][VOCABULARY], expected[BANDITS][VOCABULARY];
    double walked[BANDITS][VOCABULARY], other[BANDITS][VOCABULARY], unscaled[VOCABULARY];
    psoup_ppo_options o = bandit(PSOUP_OBJECTIVE_GRPO);
    bool step = _i == 1;
    o.group_size = 256; /* the deviation of few is noisy, and small where it divides much */
    o.scale_rewards = step ? PSOUP_SCALE_BATCH : PSOUP_SCALE_GROUP;
    o.steps = 300;
    train(&o, BANDITS, ref, got);
    scaled_inverse(expected, ref, BANDITS, o.kl_coefficient, step);
    scaled_inverse(other, ref, BANDITS, o.kl_coefficient, !step);
    ascended(walked, ref, BANDITS, o.kl_coefficient, step);
    for (int k = 0; k < BANDITS; k++) {
        double off = apart(got[k], expected[k]);
        ck_assert_msg(apart(walked[k], expected[k]) < 1e-6, "the point is %g from where the gradient leads",
                      apart(walked[k], expected[k]));
        ck_assert_msg(apart(ref[k], expected[k]) > 0.2, "prompt %d began %g away", k, apart(ref[k], expected[k]));
        ck_assert_msg(off < 0.05, "prompt %d: total variation %g", k, off);
        inverse(unscaled, ref[k], o.kl_coefficient / stake[k]);
        ck_assert_msg(apart(got[k], other[k]) > 2.0 * off, "prompt %d: %g from the other scale's, %g off", k,
                      apart(got[k], other[k]), off);
        ck_assert_msg(apart(got[k], unscaled) > 2.0 * off, "prompt %d: %g from the unscaled", k,
                      apart(got[k], unscaled));
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train_bandit");
    TCase *tests = tcase_create("bandit");
    tcase_set_timeout(tests, 120);
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_add_loop_test(tests, fixed_points_are_reached, 0, CASES);
    tcase_add_loop_test(tests, scaled_advantages_and_k3, 0, 2);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
