/* DPO on a tiny model: its loss against trl's, its gradient against differences, what it learns, and that
 * policies side by side are as alone. */
#include "train_case.h"

/* ---- the loss ----------------------------------------------------------------------------------- */

START_TEST(losses_are_trls) {
    psoup_json *file = golden("preferences.json");
    const psoup_json *c = psoup_json_at(psoup_json_get(file, "dpo"), (size_t)_i);
    const char *const keys[] = {"chosen", "rejected", "ref_chosen", "ref_rejected", "loss",
                                "reward_chosen", "reward_rejected", "dchosen", "drejected"};
    float *x[9];
    size_t n;
    for (int k = 0; k < 9; k++)
        x[k] = floats(c, keys[k], &n);
    double beta = real(c, "beta");
    for (size_t i = 0; i < n; i++) {
        double w = (double)x[0][i] - x[2][i], l = (double)x[1][i] - x[3][i], dw;
        near(psoup__dpo_loss(w, l, beta, real(c, "label_smoothing"), &dw), x[4][i], 1e-6, "loss", i);
        near(beta * w, x[5][i], 1e-6, "reward_chosen", i);
        near(beta * l, x[6][i], 1e-6, "reward_rejected", i);
        near(dw, x[7][i], 1e-6, "dchosen", i);
        near(-dw, x[8][i], 1e-6, "drejected", i);
    }
    for (int k = 0; k < 9; k++)
        free(x[k]);
    psoup_json_free(file);
}
END_TEST

/* ---- a tiny world ------------------------------------------------------------------------------- */

enum { PAIRS = 256, LENGTH = 6 };

static int32_t words[2][PAIRS][3][LENGTH];
static psoup_dpo_pair pairs[2 * PAIRS];
static const char *const names[] = {"P0", "P1"};

/* Policy p likes responses with token 5 + p in them. */
static void make_pairs(uint64_t seed) {
    psoup__random random = {seed, 0, 0};
    for (int p = 0; p < 2; p++)
        for (int i = 0; i < PAIRS; i++) {
            size_t n[3];
            for (int part = 0; part < 3; part++) {
                n[part] = 2 + psoup__random_below(&random, LENGTH - 2);
                for (size_t t = 0; t < n[part]; t++) {
                    int32_t word = 2 + (int32_t)psoup__random_below(&random, VOCABULARY - 3);
                    words[p][i][part][t] = word >= 5 + p ? word + 1 : word;
                }
            }
            words[p][i][1][psoup__random_below(&random, (uint32_t)n[1])] = 5 + p;
            pairs[2 * i + p] = (psoup_dpo_pair){.prompt = words[p][i][0], .n_prompt = n[0],
                                                .chosen = words[p][i][1], .n_chosen = n[1],
                                                .rejected = words[p][i][2], .n_rejected = n[2],
                                                .policy = p};
        }
}

/* The pairs of one policy, as policy 0. */
static void only(int p, psoup_dpo_pair *out, int n) {
    for (int i = 0; i < n; i++) {
        out[i] = pairs[2 * i + p];
        out[i].policy = 0;
    }
}

static psoup_model *two_policies(void) {
    psoup_model *model = tiny_model();
    add_adapter(model, names[0], 1);
    add_adapter(model, names[1], 2);
    return model;
}

static psoup_dpo_options plain(void) {
    psoup_dpo_options o = PSOUP_DPO_OPTIONS_INIT;
    o.learning_rate = 5e-3f;
    o.epochs = 6;
    o.seed = 3;
    return o;
}

typedef struct seen {
    double loss[2], accuracy[2], margin[2]; /* of the first and the last report */
    double first_norm, best;
    int validations;
    int64_t stop_at;
} seen;

static int watch(void *user, const psoup_step *step) {
    seen *s = user;
    int at = step->step > 1;
    s->loss[at] = value_of(step, "loss");
    s->accuracy[at] = value_of(step, "accuracy");
    s->margin[at] = value_of(step, "margin");
    near(value_of(step, "reward_chosen") - value_of(step, "reward_rejected"), s->margin[at], 1e-9,
         "margin", 0);
    if (strcmp(step->phase, "validation") == 0)
        s->best = s->validations++ && s->best > s->accuracy[at] ? s->best : s->accuracy[at];
    else if (step->step == 1)
        s->first_norm = value_of(step, "grad_norm");
    return s->stop_at && s->stop_at == step->step;
}

START_TEST(accuracy_and_margin_rise_on_pairs_never_seen) {
    psoup_model *model = two_policies();
    psoup_dpo_pair train[PAIRS], held_out[PAIRS];
    static int32_t kept[2][PAIRS][3][LENGTH];
    seen s = {.stop_at = 0};
    make_pairs(1);
    memcpy(kept, words, sizeof(kept));
    only(0, train, PAIRS);
    for (int i = 0; i < PAIRS; i++) {
        train[i].prompt = kept[0][i][0];
        train[i].chosen = kept[0][i][1];
        train[i].rejected = kept[0][i][2];
    }
    make_pairs(2);
    only(0, held_out, PAIRS);
    psoup_dpo_options o = plain();
    o.on_step = watch;
    o.user = &s;
    OK(psoup_dpo(model, names, 1, train, PAIRS, held_out, PAIRS, &o, &error));
    near(s.loss[0], log(2.0), 1e-6, "first loss: the policy is the reference", 0);
    ck_assert_double_eq(s.accuracy[0], 0.0); /* ties are no wins */
    ck_assert_int_eq(s.validations, 1);
    ck_assert_msg(s.accuracy[1] > 0.9, "accuracy %g", s.accuracy[1]);
    ck_assert_double_lt(s.loss[1], 0.6);
    ck_assert_double_gt(s.margin[1], 0.3);
    psoup_model_free(model);
}
END_TEST

/* The loss of all pairs under an adapter's weights moved by `h` along `direction`. */
static double loss_at(psoup_model *model, const float *start, const float *direction, size_t count,
                      double h, const psoup_dpo_pair *set, int n, const psoup_dpo_options *o) {
    psoup__adapter *adapter = psoup__model_adapter(model, "P0");
    float *moved = malloc(count * sizeof(*moved));
    double sum = 0.0;
    for (size_t i = 0; i < count; i++)
        moved[i] = start[i] + (float)h * direction[i];
    model->be->ops->write(model->be, adapter->data, moved, count * sizeof(*moved));
    free(moved);
    for (int i = 0; i < n; i++) {
        double gain[2] = {0}, dw;
        for (int side = 0; side < 2; side++) {
            int32_t row[2 * LENGTH];
            size_t n_prompt = set[i].n_prompt, length = side ? set[i].n_rejected : set[i].n_chosen;
            float mix[2] = {1.0f, 0.0f}, policy[2 * LENGTH], base[2 * LENGTH];
            memcpy(row, set[i].prompt, n_prompt * sizeof(*row));
            memcpy(row + n_prompt, side ? set[i].rejected : set[i].chosen, length * sizeof(*row));
            psoup_row rows[2] = {{row, n_prompt + length, mix}, {row, n_prompt + length, NULL}};
            OK(psoup_model_logprobs(model, &rows[0], 1, policy, &error));
            OK(psoup_model_logprobs(model, &rows[1], 1, base, &error));
            for (size_t t = n_prompt - 1; t < n_prompt + length - 1; t++)
                gain[side] += (double)policy[t] - base[t];
        }
        gain[0] += o->length_penalty / o->beta * (double)set[i].n_chosen;
        gain[1] += o->length_penalty / o->beta * (double)set[i].n_rejected;
        sum += psoup__dpo_loss(gain[0], gain[1], o->beta, o->label_smoothing, &dw) / n;
    }
    return sum;
}

/* AdamW's first step with an epsilon far above the gradient is learning_rate / epsilon · gradient: at 1 the
 * step is the gradient, whose norm must be the slope of the loss along it. */
START_TEST(gradient_is_what_differences_say) {
    psoup_model *model = two_policies();
    psoup_dpo_pair train[PAIRS];
    psoup_dpo_options o = plain();
    seen s = {.stop_at = 0};
    size_t count;
    make_pairs(1);
    only(0, train, PAIRS);
    o.beta = 0.5f;
    o.label_smoothing = 0.1f;
    o.length_penalty = _i ? 0.3f : 0.0f;
    OK(psoup_dpo(model, names, 1, train, 24, NULL, 0, &o, &error)); /* away from the reference */
    float *start = weights(model, "P0", &count);
    o.max_steps = 1;
    o.batch_size = 3;
    o.accumulation = 2;
    o.max_grad_norm = 0.0f;
    o.learning_rate = o.epsilon = 1e6f;
    o.schedule = PSOUP_SCHEDULE_CONSTANT;
    o.on_step = watch;
    o.user = &s;
    OK(psoup_dpo(model, names, 1, train, 6, NULL, 0, &o, &error));
    float *end = weights(model, "P0", &count), *unit = malloc(count * sizeof(*unit));
    double norm = 0.0;
    for (size_t i = 0; i < count; i++)
        norm += ((double)end[i] - start[i]) * ((double)end[i] - start[i]);
    norm = sqrt(norm);
    for (size_t i = 0; i < count; i++)
        unit[i] = (float)(((double)start[i] - end[i]) / norm);
    near(norm, s.first_norm, 1e-3, "norm of the step", 0);
    near(loss_at(model, start, unit, count, 0.0, train, 6, &o), s.loss[0], 1e-5, "loss", 0);
    double h = 2e-3, rise = (loss_at(model, start, unit, count, h, train, 6, &o) -
                             loss_at(model, start, unit, count, -h, train, 6, &o)) / (2.0 * h);
    ck_assert_msg(fabs(rise - s.first_norm) < 1e-2 * s.first_norm, "%g along the gradient, norm %g", rise,
                  s.first_norm);
    free(unit);
    free(start);
    free(end);
    psoup_model_free(model);
}
END_TEST

START_TEST(side_by_side_is_alone) {
    psoup_model *model = two_policies();
    psoup_dpo_pair alone[PAIRS];
    size_t count[2];
    float *expected[2];
    make_pairs(1);
    psoup_dpo_options o = plain();
    o.epochs = 2;
    o.batch_size = 6;
    o.accumulation = 3;
    o.lora_dropout = 0.1f;
    o.validate_every = 2;
    /* The second learns from fewer pairs: its run ends earlier. */
    size_t n = 2 * PAIRS - 40;
    psoup_dpo_pair *fewer = malloc(n * sizeof(*fewer));
    size_t m = 0;
    for (size_t i = 0; i < n; i++)
        if (pairs[i].policy == 0 || i < n - 40)
            fewer[m++] = pairs[i];
    OK(psoup_dpo(model, names, 2, fewer, m, pairs, 40, &o, &error));
    free(fewer);
    for (int p = 0; p < 2; p++)
        expected[p] = weights(model, names[p], &count[p]);
    psoup_model_free(model);
    tear_down();
    open_context(1); /* one thread instead of two, at that */
    for (int p = 0; p < 2; p++) {
        model = two_policies();
        only(p, alone, PAIRS);
        OK(psoup_dpo(model, names + p, 1, alone, p ? (n - 40) / 2 : n / 2, alone, 20, &o, &error));
        ck_assert(same_weights(model, names[p], expected[p], count[p]));
        free(expected[p]);
        psoup_model_free(model);
    }
}
END_TEST

/* max_tokens keeps a row's first tokens: what stands past them trains nothing. */
START_TEST(long_rows_keep_their_first_tokens) {
    float *expected = NULL;
    size_t count;
    make_pairs(5);
    for (int cut = 0; cut < 2; cut++) {
        psoup_model *model = two_policies();
        psoup_dpo_pair few[8];
        psoup_dpo_options o = plain();
        only(0, few, 8);
        for (int i = 0; i < 8; i++) {
            few[i].n_prompt = 2;
            if (cut)
                few[i].n_chosen = few[i].n_rejected = 2;
        }
        o.max_tokens = 4;
        o.epochs = 1;
        OK(psoup_dpo(model, names, 1, few, 8, NULL, 0, &o, &error));
        if (cut)
            ck_assert(same_weights(model, names[0], expected, count));
        else
            expected = weights(model, names[0], &count);
        o.max_tokens = 2;
        ck_assert_int_eq(psoup_dpo(model, names, 1, few, 8, NULL, 0, &o, &error),
                         PSOUP_ERROR_ARGUMENT);
        ck_assert_ptr_nonnull(strstr(error.message, "train[0] has a prompt of 2 tokens"));
        psoup_model_free(model);
    }
    free(expected);
}
END_TEST

START_TEST(best_is_kept_and_stopping_is_clean) {
    psoup_model *model = two_policies();
    psoup_dpo_pair mine[PAIRS];
    psoup_dpo_options o = plain();
    seen s = {.stop_at = 0}, again = {.stop_at = 1};
    make_pairs(1);
    only(0, mine, PAIRS);
    o.on_step = watch;
    o.user = &s;
    o.validate_every = 1;
    o.max_steps = 8;
    o.learning_rate = 0.2f; /* too much */
    o.lora_dropout = 0.3f; /* in training alone */
    OK(psoup_dpo(model, names, 1, mine, 64, mine + 64, 32, &o, &error));
    ck_assert_int_eq(s.validations, 8);
    psoup_dpo_options once = plain(); /* its first report is of the weights it begins with */
    once.batch_size = 32;
    once.on_step = watch;
    once.user = &again;
    ck_assert_int_eq(psoup_dpo(model, names, 1, mine + 64, 32, NULL, 0, &once, &error),
                     PSOUP_ERROR_CANCELLED);
    ck_assert_double_eq(again.accuracy[0], s.best);
    s.stop_at = 3;
    o.user = &s;
    ck_assert_int_eq(psoup_dpo(model, names, 2, pairs, 2 * PAIRS, NULL, 0, &o, &error),
                     PSOUP_ERROR_CANCELLED);
    for (int p = 0; p < 2; p++)
        ck_assert_ptr_null(psoup__model_adapter(model, names[p])->grad);
    psoup_model_free(model);
}
END_TEST

static void refused(psoup_model *model, const char *const *policies, size_t n,
                    const psoup_dpo_pair *train, size_t n_train, const char *words_in_it) {
    ck_assert_int_eq(psoup_dpo(model, policies, n, train, n_train, NULL, 0, NULL, &error),
                     PSOUP_ERROR_ARGUMENT);
    ck_assert_msg(strstr(error.message, words_in_it) != NULL, "%s", error.message);
}

START_TEST(what_cannot_be_is_refused) {
    psoup_model *model = two_policies();
    const char *const twice[] = {"P0", "P0"}, *const nobody[] = {"P0", NULL}, *const other[] = {"P9"};
    make_pairs(1);
    refused(NULL, names, 1, pairs, 1, "model is NULL");
    refused(model, NULL, 1, pairs, 1, "no policy");
    refused(model, names, 0, pairs, 1, "no policy");
    refused(model, twice, 2, pairs, 1, "'P0' is there twice");
    refused(model, nobody, 2, pairs, 1, "'(NULL)'");
    refused(model, other, 1, pairs, 1, "no adapter 'P9'");
    refused(model, names, 1, NULL, 1, "train is NULL");
    refused(model, names, 1, pairs, 2, "train[1] names policy 1 of 1");
    refused(model, names, 2, pairs, 1, "'P1' has no pairs");
    psoup_dpo_pair bad = pairs[0];
    bad.n_rejected = 0;
    refused(model, names, 1, &bad, 1, "train[0] has an empty prompt or response");
    bad = pairs[0];
    bad.reserved[2] = 1;
    refused(model, names, 1, &bad, 1, "train[0].reserved is not 0");
    psoup_dpo_options o = plain();
    o.label_smoothing = 0.6f;
    ck_assert_int_eq(psoup_dpo(model, names, 1, pairs, 1, NULL, 0, &o, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "label_smoothing is 0.6"));
    for (int p = 0; p < 2; p++)
        ck_assert_ptr_null(psoup__model_adapter(model, names[p])->grad);
    psoup_model_free(model);
}
END_TEST

/* ---- the optimum ---------------------------------------------------------------------------------- */

/* A policy of one token with a reward for each: from pairs whose winners Bradley and Terry would draw, DPO's optimum
 * is π ∝ π_ref exp(r / β) (Rafailov et al. 2023, equations 4 and 6). Or every other response has two tokens, and the
 * policy pays α for each: among these responses π ∝ π_ref exp((r − α length) / β) (Park et al. 2024, arXiv
 * 2403.19159). */
START_TEST(bandit_reaches_its_optimum) {
    enum { COPIES = 16 };
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
    static const int32_t prompt[1] = {2};
    static int32_t response[VOCABULARY][2];
    size_t length[VOCABULARY];
    static psoup_dpo_pair set[VOCABULARY * (VOCABULARY - 1) / 2 * COPIES];
    float ref[VOCABULARY], got[VOCABULARY], mix[1] = {1.0f};
    double reward[VOCABULARY], beta = 0.5, alpha = _i ? 0.6 : 0.0, total = 0.0, all = 0.0, distance = 0.0;
    size_t n = 0;
    for (int a = 0; a < VOCABULARY; a++) {
        response[a][0] = a;
        response[a][1] = 3;
        length[a] = _i && a % 2 ? 2 : 1;
        reward[a] = 0.15 * ((a * 7) % VOCABULARY);
    }
    for (int a = 0; a < VOCABULARY; a++)
        for (int b = 0; b < a; b++) {
            long wins = lround(COPIES / (1.0 + exp(reward[b] - reward[a])));
            for (long k = 0; k < COPIES; k++)
                set[n++] = (psoup_dpo_pair){.prompt = prompt, .n_prompt = 1,
                                            .chosen = response[k < wins ? a : b],
                                            .n_chosen = length[k < wins ? a : b],
                                            .rejected = response[k < wins ? b : a],
                                            .n_rejected = length[k < wins ? b : a]};
        }
    psoup_dpo_options o = PSOUP_DPO_OPTIONS_INIT;
    o.beta = (float)beta;
    o.length_penalty = (float)alpha;
    o.batch_size = 480;
    o.epochs = 60;
    o.learning_rate = 2e-2f;
    o.schedule = PSOUP_SCHEDULE_COSINE;
    OK(psoup_dpo(model, names, 1, set, n, NULL, 0, &o, &error));
    for (int a = 0; a < VOCABULARY; a++) {
        int32_t row[3] = {2, a, 3};
        float logprob[2][2] = {{0}};
        psoup_row policy = {row, 1 + length[a], mix}, base = {row, 1 + length[a], NULL};
        OK(psoup_model_logprobs(model, &policy, 1, logprob[0], &error));
        OK(psoup_model_logprobs(model, &base, 1, logprob[1], &error));
        got[a] = logprob[0][0] + logprob[0][1];
        ref[a] = logprob[1][0] + logprob[1][1];
        reward[a] -= alpha * (double)length[a];
        total += exp(ref[a] + reward[a] / beta);
        all += exp(got[a]);
    }
    for (int a = 0; a < VOCABULARY; a++)
        distance += 0.5 * fabs(exp(got[a]) / all - exp(ref[a] + reward[a] / beta) / total);
    ck_assert_msg(distance < 0.05, "total variation %g", distance);
    psoup_model_free(model);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train_dpo");
    TCase *tests = tcase_create("dpo");
    tcase_set_timeout(tests, 120);
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_add_loop_test(tests, losses_are_trls, 0, 3);
    tcase_add_test(tests, accuracy_and_margin_rise_on_pairs_never_seen);
    tcase_add_loop_test(tests, gradient_is_what_differences_say, 0, 2);
    tcase_add_test(tests, side_by_side_is_alone);
    tcase_add_test(tests, long_rows_keep_their_first_tokens);
    tcase_add_test(tests, best_is_kept_and_stopping_is_clean);
    tcase_add_test(tests, what_cannot_be_is_refused);
    tcase_add_loop_test(tests, bandit_reaches_its_optimum, 0, 2);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
