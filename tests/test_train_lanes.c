/* Lanes: a small model's passes run side by side, a large one's in turn, and of both the bits know neither the threads, nor
 * who learns beside, nor how many rows a pass has. */
#include "ppo_case.h"

#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
enum { CHECKED = 1 }; /* every access is checked: ten times slower */
#else
enum { CHECKED = 0 };
#endif
enum { EXAMPLES = 96, LONG = 20, NARROW = 16, WIDE = 512 }; /* hidden sizes of a small model and of a large one */

static int32_t text[EXAMPLES][LONG];

static psoup_model *world(int32_t width, int policies) {
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_model *model = NULL;
    config.vocab_size = VOCABULARY;
    config.hidden_size = width;
    config.intermediate_size = 4 * width;
    config.num_hidden_layers = 2;
    config.num_attention_heads = 2;
    config.max_position_embeddings = 48;
    config.tie_word_embeddings = 1;
    config.initializer_range = width == WIDE ? 0.03f : 0.2f;
    OK(psoup_model_create(context, &config, 7, &model, &error));
    make_prompts();
    for (int p = 0; p < policies; p++)
        add_adapter(model, names[p], 20 + (uint64_t)p);
    for (int i = 0; i < EXAMPLES; i++)
        for (int t = 0; t < LONG; t++)
            text[i][t] = 2 + (i * 7 + t * t * 5) % 13;
    ck_assert_int_eq(psoup__gradients(model), width == WIDE ? 1 : PSOUP__LANES);
    return model;
}

static size_t length_of(int i) { return LONG - (size_t)i % 5; }

/* ---- the trainers: each changes P0, and P1 where it is there -------------------------------------------- */

static void fine_tune(psoup_model *model, int n, int32_t bound) {
    psoup_example examples[EXAMPLES];
    psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
    for (int i = 0; i < EXAMPLES; i++)
        examples[i] = (psoup_example){.tokens = text[i], .n = length_of(i), .n_prompt = 3};
    o.batch_tokens = bound;
    o.accumulation = 1024 / bound;
    o.max_steps = 2;
    o.lora_dropout = 0.1f;
    for (int k = 0; k < n; k++) {
        o.seed = (uint64_t)k;
        OK(psoup_sft(model, names[k], examples, EXAMPLES - 16, examples + EXAMPLES - 16, 16, &o, &error));
    }
}

static void compare(psoup_model *model, int n, int32_t bound) {
    psoup_comparison pairs[2 * EXAMPLES];
    psoup_reward *rewards[2];
    psoup_reward_options o = PSOUP_REWARD_OPTIONS_INIT;
    size_t count = 0, held = 8 * (size_t)n;
    (void)bound;
    for (int k = 0; k < n; k++) {
        OK(psoup_model_remove_adapter(model, names[k], &error));
        OK(psoup_reward_create(model, names[k], NULL, &rewards[k], &error));
    }
    for (int i = 0; i + 1 < EXAMPLES; i++)
        for (int k = 0; k < n; k++)
            pairs[count++] = (psoup_comparison){.chosen = text[i], .n_chosen = length_of(i), .rejected = text[i + 1],
                                                .n_rejected = length_of(i + 1), .reward = k};
    o.batch_size = 24;
    o.accumulation = 2;
    o.max_steps = 2;
    o.lora_dropout = 0.1f;
    OK(psoup_reward_train(rewards, (size_t)n, pairs, count - held, pairs + count - held, held, &o, &error));
    for (int k = 0; k < n; k++)
        psoup_reward_free(rewards[k]);
}

static void prefer(psoup_model *model, int n, int32_t bound) {
    psoup_dpo_pair pairs[2 * EXAMPLES];
    psoup_dpo_options o = PSOUP_DPO_OPTIONS_INIT;
    size_t count = 0, held = 8 * (size_t)n;
    (void)bound;
    for (int i = 0; i + 1 < EXAMPLES; i++)
        for (int k = 0; k < n; k++)
            pairs[count++] = (psoup_dpo_pair){.prompt = text[i], .n_prompt = 4, .chosen = text[i] + 4,
                                              .n_chosen = length_of(i) - 4, .rejected = text[i + 1] + 4,
                                              .n_rejected = length_of(i + 1) - 4, .policy = k};
    o.batch_size = 32;
    o.max_steps = 2;
    OK(psoup_dpo(model, names, (size_t)n, pairs, count - held, pairs + count - held, held, &o, &error));
}

static void improve(psoup_model *model, int n, int32_t bound) {
    psoup_ppo_policy policies[2] = {policy(0), policy(1)};
    psoup_ppo_options o = plain();
    psoup_ppo *run = NULL;
    bool large = psoup__gradients(model) == 1;
    o.batch_size = large ? 24 : 96;
    o.mini_batch_size = large ? 16 : 64;
    o.ppo_epochs = 2;
    o.loss_group = 8;
    o.steps = 2;
    o.validate_every = 1;
    o.lora_dropout = o.head_dropout = 0.1f;
    o.micro_batch_tokens = bound;
    OK(psoup_ppo_create(model, policies, (size_t)n, &o, &run, &error));
    OK(psoup_ppo_run(run, &error));
    psoup_ppo_free(run);
}

typedef void train_fn(psoup_model *model, int n, int32_t bound);
static train_fn *const trainers[] = {fine_tune, compare, prefer, improve};
enum { TRAINERS = sizeof(trainers) / sizeof(trainers[0]) };

/* P0's weights after a training of n side by side. */
static float *trained(train_fn *train, int32_t width, int threads, int n, int32_t bound, size_t *count) {
    open_context(threads);
    psoup_model *model = world(width, 2);
    train(model, n, bound);
    float *after = weights(model, names[0], count);
    psoup_model_free(model);
    psoup_context_free(context);
    return after;
}

static void same(train_fn *train, int32_t width, int threads, int n, int32_t bound, const float *expected,
                 size_t expected_count) {
    size_t count = 0;
    float *got = trained(train, width, threads, n, bound, &count);
    ck_assert_uint_eq(count, expected_count);
    ck_assert_msg(memcmp(got, expected, count * sizeof(*got)) == 0,
                  "other bits: width %d, %d threads, %d side by side, passes of %d rows", (int)width, threads, n,
                  (int)bound);
    free(got);
}

START_TEST(a_small_model) {
    size_t count = 0;
    float *expected = trained(trainers[_i], NARROW, 1, 1, 1024, &count);
    same(trainers[_i], NARROW, 2, 1, 1024, expected, count);
    same(trainers[_i], NARROW, 3, 2, 1024, expected, count);
    same(trainers[_i], NARROW, 1, 2, 1024, expected, count);
    if (trainers[_i] == improve) /* more micro-batches of SFT hold other examples */
        same(trainers[_i], NARROW, 2, 2, 256, expected, count);
    free(expected);
}
END_TEST

START_TEST(a_large_model) {
    size_t count = 0;
    float *expected = trained(trainers[_i], WIDE, 1, 1, 1024, &count);
    same(trainers[_i], WIDE, 2, 2, 1024, expected, count);
    free(expected);
}
END_TEST

/* ---- plans ----------------------------------------------------------------------------------------------- */

enum { ITEMS = 150, FIRST = 90 };

/* Counts the rows of lanes and passes, which must be in order and within bounds; returns how many lanes there are. */
static int32_t check_plan(const psoup__passes *p, const int32_t *rows, const int32_t *pass, size_t n, int64_t most) {
    size_t next = 0;
    ck_assert_int_eq(p->first[p->lanes], p->n);
    for (int32_t k = 0; k < p->n; k++) {
        int64_t sum = 0;
        ck_assert_uint_eq(p->begin[k], next);
        for (next = p->begin[k]; next < p->end[k]; next++) {
            ck_assert_int_eq(pass[next], k);
            sum += rows[next];
        }
        ck_assert_int_le(sum, most);
    }
    ck_assert_uint_eq(next, n);
    return p->lanes;
}

START_TEST(plans) {
    psoup_model *model = world(NARROW, 1);
    psoup__passes *both = NULL, *alone = NULL;
    int32_t rows[ITEMS], owner[ITEMS], pass[ITEMS], own[ITEMS];
    OK(psoup__passes_create(model, false, &both, &error));
    OK(psoup__passes_create(model, false, &alone, &error));
    for (int i = 0; i < ITEMS; i++) {
        rows[i] = 10 + i * i % 31;
        owner[i] = i >= FIRST;
    }
    OK(psoup__passes_plan(both, rows, owner, ITEMS, 1024, true, pass, &error));
    check_plan(both, rows, pass, ITEMS, 1024 / PSOUP__LANES);
    ck_assert_int_eq(both->at_once, PSOUP__LANES); /* of 1024 / 8 rows each */
    OK(psoup__passes_plan(alone, rows + FIRST, owner + FIRST, ITEMS - FIRST, 1024, true, own, &error));
    int32_t lanes = check_plan(alone, rows + FIRST, own, ITEMS - FIRST, 1024 / PSOUP__LANES);
    ck_assert_int_gt(lanes, 2);
    ck_assert_int_gt(both->lanes, lanes);
    for (int32_t k = 0; k < lanes; k++) { /* the last lanes, cut alike, to the same gradients */
        int32_t other = both->lanes - lanes + k;
        ck_assert_int_eq(alone->gradient[k], k);
        ck_assert_int_eq(both->gradient[other], k);
        ck_assert_uint_eq(both->begin[both->first[other]], alone->begin[alone->first[k]] + FIRST);
    }
    /* Where nothing learns, as many for each thread; of few rows, one. */
    OK(psoup__passes_plan(both, rows, owner, ITEMS, 1 << 20, false, pass, &error));
    ck_assert_int_eq(check_plan(both, rows, pass, ITEMS, 1 << 20), 2);
    OK(psoup__passes_plan(both, rows, owner, 3, 1 << 20, false, pass, &error));
    ck_assert_int_eq(check_plan(both, rows, pass, 3, 1 << 20), 1);
    /* A bound below a lane's smallest pass lets one run at a time; an item above it runs alone. */
    OK(psoup__passes_plan(both, rows, owner, ITEMS, 30, false, pass, &error));
    check_plan(both, rows, pass, ITEMS, 40);
    ck_assert_int_eq(both->at_once, 1);
    OK(psoup__passes_plan(both, rows, owner, 0, 1024, true, pass, &error));
    ck_assert_int_eq(both->n + both->lanes, 0);
    OK(psoup__passes_run(both, NULL, NULL, &error));
    psoup__passes_free(alone);
    psoup__passes_free(both);
    psoup_model_free(model);
}
END_TEST

/* What fails in one lane is what the run says, and it can be run again. */
typedef struct refusal {
    psoup__passes *passes;
    int32_t refused; /* pass */
} refusal;

static psoup_status refuse(void *user, psoup__pack *pack, int32_t pass, psoup_error *error_) {
    const refusal *r = user;
    ck_assert_uint_eq(pack->n, 0);
    return pass == r->refused ? psoup__fail(error_, PSOUP_ERROR_STATE, "pass %d", (int)pass) : PSOUP_OK;
}

START_TEST(one_lane_fails) {
    psoup_model *model = world(NARROW, 1);
    refusal r = {.refused = 5};
    int32_t rows[ITEMS], owner[ITEMS] = {0}, pass[ITEMS];
    for (int i = 0; i < ITEMS; i++)
        rows[i] = 40;
    OK(psoup__passes_create(model, false, &r.passes, &error));
    OK(psoup__passes_plan(r.passes, rows, owner, ITEMS, 1024, false, pass, &error));
    ck_assert_int_eq(psoup__passes_run(r.passes, refuse, &r, &error), PSOUP_ERROR_STATE);
    ck_assert_str_eq(error.message, "pass 5");
    ck_assert_int_eq(psoup__passes_run(r.passes, refuse, &r, NULL), PSOUP_ERROR_STATE);
    r.refused = -1;
    OK(psoup__passes_run(r.passes, refuse, &r, &error));
    psoup__passes_free(r.passes);
    psoup_model_free(model);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train: lanes");
    TCase *bits = tcase_create("bits"), *tests = tcase_create("plans");
    tcase_set_timeout(bits, 300);
    tcase_add_loop_test(bits, a_small_model, 0, TRAINERS);
    tcase_add_loop_test(bits, a_large_model, 0, CHECKED ? 1 : TRAINERS);
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_add_test(tests, plans);
    tcase_add_test(tests, one_lane_fails);
    suite_add_tcase(suite, bits);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
