/* No option does nothing: each field of each trainer is turned, and what is trained must be other weights; or it stands
 * in the list of those that change none. */
#include "ppo_case.h"

/* ---- trainings: each on a fresh model, of its adapter's weights --------------------------------------- */

enum { ROWS = 24, LONGEST = 14 };
static int32_t row[ROWS][LONGEST];
static size_t length_of(int i) { return 6 + (size_t)(i * 5) % 9; }

static void make_rows(void) {
    for (int i = 0; i < ROWS; i++)
        for (int t = 0; t < LONGEST; t++)
            row[i][t] = 2 + (i * 7 + t * (3 + i % 4)) % 14;
}

static void fine_tune(psoup_model *model, const void *options) {
    psoup_example examples[ROWS];
    for (int i = 0; i < ROWS; i++)
        examples[i] = (psoup_example){.tokens = row[i], .n = length_of(i), .n_prompt = 3};
    OK(psoup_sft(model, "P0", examples, 16, examples + 16, 8, options, &error));
}

static void learn_taste(psoup_model *model, const void *options) {
    psoup_comparison pairs[ROWS / 2];
    psoup_adapter_options lora = PSOUP_ADAPTER_OPTIONS_INIT;
    psoup_reward *reward;
    lora.rank = 4;
    lora.targets = PSOUP_ALL_LINEAR;
    lora.seed = 5;
    OK(psoup_model_remove_adapter(model, "P0", &error));
    OK(psoup_reward_create(model, "P0", &lora, &reward, &error));
    for (int i = 0; i < ROWS / 2; i++)
        pairs[i] = (psoup_comparison){.chosen = row[2 * i], .n_chosen = length_of(2 * i), .rejected = row[2 * i + 1],
                                      .n_rejected = length_of(2 * i + 1), .margin = 0.1f * (float)(i + 1)};
    for (int i = 8; i < ROWS / 2; i++) { /* validation is of another mind: the first weights are the best */
        const psoup_comparison learnt = pairs[i - 8];
        pairs[i].chosen = learnt.rejected;
        pairs[i].n_chosen = learnt.n_rejected;
        pairs[i].rejected = learnt.chosen;
        pairs[i].n_rejected = learnt.n_chosen;
    }
    OK(psoup_reward_train(&reward, 1, pairs, 8, pairs + 8, 4, options, &error));
    psoup_reward_free(reward);
}

static void prefer(psoup_model *model, const void *options) {
    static const char *const policies[1] = {"P0"};
    psoup_dpo_pair pairs[ROWS / 2];
    for (int i = 0; i < ROWS / 2; i++)
        pairs[i] = (psoup_dpo_pair){.prompt = row[2 * i], .n_prompt = 3, .chosen = row[2 * i] + 3,
                                    .n_chosen = length_of(2 * i) - 3, .rejected = row[2 * i + 1] + 3,
                                    .n_rejected = length_of(2 * i + 1) - 3};
    for (int i = 8; i < ROWS / 2; i++) {
        const psoup_dpo_pair learnt = pairs[i - 8];
        pairs[i] = learnt;
        pairs[i].chosen = learnt.rejected;
        pairs[i].n_chosen = learnt.n_rejected;
        pairs[i].rejected = learnt.chosen;
        pairs[i].n_rejected = learnt.n_chosen;
    }
    OK(psoup_dpo(model, policies, 1, pairs, 8, pairs + 8, 4, options, &error));
}

/* How long an answer is, in part. */
static int pay_more(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    int status = pay(user, rollouts, n, scores);
    for (size_t i = 0; i < n; i++)
        scores[i] += 0.1f * (float)rollouts[i].n;
    return status;
}

static void reinforce(psoup_model *model, const void *options) {
    static int32_t other = 9;
    const psoup_reward_source sources[2] = {{.name = "a", .function = pay, .user = &wanted[0], .weight = 1.0f},
                                            {.name = "b", .function = pay_more, .user = &other, .weight = 0.5f}};
    psoup_ppo_policy p = policy(0);
    p.reward_fn = NULL;
    p.reward_user = NULL;
    p.sources = sources;
    p.n_sources = 2;
    psoup_ppo *ppo = create(model, &p, 1, options);
    OK(psoup_ppo_run(ppo, &error));
    psoup_ppo_free(ppo);
}

/* ---- fields -------------------------------------------------------------------------------------------- */

typedef struct turn {
    const char *name, *from, *to; /* members of a configuration beside the trainer's: before, and after */
} turn;

#define ADAM                                                                                       \
    {"learning_rate", "", "'learning_rate': 0.02"}, {"beta1", "", "'beta1': 0.5"}, {"beta2", "", "'beta2': 0.9"},       \
        {"epsilon", "", "'epsilon': 0.1"}, {"weight_decay", "'weight_decay': 0", "'weight_decay': 0.2"},                \
        {"max_grad_norm", "'max_grad_norm': 0", "'max_grad_norm': 0.001"},                         \
        {"max_grad_value", "", "'max_grad_value': 0.0001"}
#define STEPS                                                                                      \
    {"epochs", "", "'epochs': 3"}, {"max_steps", "", "'max_steps': 3"}, {"accumulation", "", "'accumulation': 2"},      \
        {"schedule", "'schedule': 'constant'", "'schedule': 'cosine'"}, {"warmup_steps", "", "'warmup_steps': 3"},      \
        {"lora_dropout", "", "'lora_dropout': 0.2"}, {"seed", "", "'seed': 3"},                    \
        {"keep_best", "'validate_every': 1, 'keep_best': true, 'learning_rate': 0.5",              \
         "'validate_every': 1, 'keep_best': false, 'learning_rate': 0.5"}

typedef struct trainer {
    const psoup_field *(*fields)(void);
    void (*train)(psoup_model *, const void *);
    const char *usual;
    const turn *turns;      /* what changes weights */
    const char *const *none; /* what does not */
} trainer;

static const turn sft_turns[] = {ADAM, STEPS, {"batch_tokens", "", "'batch_tokens': 64"},
                                 {"loss_on_prompt", "", "'loss_on_prompt': true"}, {0}};
static const turn reward_turns[] = {ADAM, STEPS, {"batch_size", "", "'batch_size': 4"}, {"margin", "", "'margin': 1"},
                                    {"margins", "", "'margins': true"}, {"centering", "", "'centering': 0.5"},
                                    {"max_tokens", "", "'max_tokens': 6"}, {0}};
static const turn dpo_turns[] = {ADAM, STEPS, {"batch_size", "", "'batch_size': 4"}, {"beta", "", "'beta': 0.5"},
                                 {"label_smoothing", "", "'label_smoothing': 0.2"},
                                 {"length_penalty", "", "'length_penalty': 0.2"}, {"max_tokens", "", "'max_tokens': 6"},
                                 {0}};
static const char *const runs[] = {"metrics", "checkpoint_dir", "checkpoint_every", "checkpoint_keep", "resume",
                                   "gradient_checkpointing", "validate_every", NULL};

#define GROUPS "'objective': 'grpo'"
#define STOPS "'ppo_epochs': 4, 'target_kl': 1e-6"
#define CUT "'max_new_tokens': 6, "
static const turn ppo_turns[] = {
    ADAM,
    {"steps", "", "'steps': 3"},
    {"batch_size", "", "'batch_size': 12"},
    {"mini_batch_size", "", "'mini_batch_size': 4"},
    {"loss_group", "", "'loss_group': 2"},
    {"ppo_epochs", "", "'ppo_epochs': 3"},
    {"gamma", "", "'gamma': 0.9"},
    {"lambda", "", "'lambda': 0.5"},
    {"clip_range", "", "'clip_range': 0.01"},
    {"clip_range_value", "", "'clip_range_value': 0.01"},
    {"value_coefficient", "", "'value_coefficient': 1"},
    {"early_stop", STOPS, STOPS ", 'early_stop': 'off'"},
    {"target_kl", "'ppo_epochs': 4", STOPS},
    {"kl_coefficient", "", "'kl_coefficient': 0.5"},
    {"adaptive_kl", "'kl_horizon': 20", "'kl_horizon': 20, 'adaptive_kl': false"},
    {"kl_target", "'steps': 3, 'kl_horizon': 20", "'steps': 3, 'kl_horizon': 20, 'kl_target': 0.0001"},
    {"kl_horizon", "", "'kl_horizon': 20"},
    {"ratio_threshold", "", "'ratio_threshold': 0.5"},
    {"skipped_step", "'learning_rate': 0.05, 'ratio_threshold': 1.0",
     "'learning_rate': 0.05, 'ratio_threshold': 1.0, 'skipped_step': true"},
    {"normalize_reward", "", "'normalize_reward': false"},
    {"normalize_apart", "", "'normalize_apart': true"},
    {"reward_clip", "", "'reward_clip': 0.2"},
    {"whiten_advantages", "", "'whiten_advantages': false"},
    {"whiten_groups", "", "'whiten_groups': 2"},
    {"lora_dropout", "", "'lora_dropout': 0.2"},
    {"head_dropout", "", "'head_dropout': 0.2"},
    {"max_new_tokens", "", "'max_new_tokens': 5"},
    {"min_new_tokens", "", "'min_new_tokens': 12"},
    {"draw_new_tokens_from", "", "'draw_new_tokens_from': 2"},
    {"draw_group", "'draw_new_tokens_from': 2", "'draw_new_tokens_from': 2, 'draw_group': 1"},
    {"temperature", "", "'temperature': 0.5"},
    {"top_p", "", "'top_p': 0.5"},
    {"top_k", "", "'top_k': 2"},
    {"truncation_penalty", CUT "'normalize_reward': false",
     CUT "'normalize_reward': false, 'truncation_penalty': 2"},
    {"keep_best", "'validate_every': 1, 'steps': 4, 'learning_rate': 0.3",
     "'validate_every': 1, 'steps': 4, 'learning_rate': 0.3, 'keep_best': false"},
    {"objective", "", "'objective': 'rloo'"},
    {"group_size", GROUPS, GROUPS ", 'group_size': 2"},
    {"kl_estimator", "", "'kl_estimator': 'k3'"},
    {"scale_rewards", GROUPS, GROUPS ", 'scale_rewards': 'none'"},
    {"length_penalty", "", "'length_penalty': 0.2"},
    {"length_target", "'length_penalty': 0.2", "'length_penalty': 0.2, 'length_target': 4"},
    {"length_correction", "", "'length_correction': 1"},
    {0}};
/* What is sampled past an end is cut; text and reward models are tests/test_train_ppo_rewards.c's. */
static const char *const ppo_none[] = {
    "metrics", "samples", "samples_every", "samples_count", "checkpoint_dir", "checkpoint_every", "checkpoint_keep",
    "resume", "join", "gradient_checkpointing", "validate_every", "max_sequences", "micro_batch_tokens", "ignore_stop",
    "reward_text", "reward_max_tokens", "warn_repetition", "warn_empty", "warn_reward_rise", "warn_kl_growth", "warn_window", NULL};

enum { TRAINERS = 4 };
static const trainer trainers[TRAINERS] = {
    {psoup_sft_fields, fine_tune, "'batch_tokens': 32, 'learning_rate': 0.01, 'epochs': 2", sft_turns, runs},
    {psoup_reward_fields, learn_taste, "'batch_size': 2, 'learning_rate': 0.01, 'epochs': 2", reward_turns, runs},
    {psoup_dpo_fields, prefer, "'batch_size': 2, 'learning_rate': 0.01, 'epochs': 2", dpo_turns, runs},
    {psoup_ppo_fields, reinforce,
     "'steps': 2, 'batch_size': 8, 'ppo_epochs': 2, 'max_new_tokens': 12, 'learning_rate': 0.003, 'warn_empty': 0",
     ppo_turns, ppo_none}};

/* What a configuration of these members trains; freed by the caller. Later members count. */
static float *trained_by(const trainer *t, const char *more, size_t *count) {
    union {
        psoup_sft_options sft;
        psoup_reward_options reward;
        psoup_dpo_options dpo;
        psoup_ppo_options ppo;
    } options;
    const char *const parts[2] = {t->usual, more};
    psoup_model *model = fresh(1);
    if (t->train == fine_tune)
        options.sft = (psoup_sft_options)PSOUP_SFT_OPTIONS_INIT;
    else if (t->train == learn_taste)
        options.reward = (psoup_reward_options)PSOUP_REWARD_OPTIONS_INIT;
    else if (t->train == prefer)
        options.dpo = (psoup_dpo_options)PSOUP_DPO_OPTIONS_INIT;
    else
        options.ppo = (psoup_ppo_options)PSOUP_PPO_OPTIONS_INIT;
    for (int i = 0; i < 2; i++) {
        char text[512];
        psoup_json *object;
        snprintf(text, sizeof(text), "{%s}", parts[i]);
        for (char *c = text; *c; c++)
            *c = *c == '\'' ? '"' : *c;
        OK(psoup_json_parse(text, strlen(text), "options", &object, &error));
        OK(psoup_fields_read(t->fields(), object, "options", &options, &error));
        psoup_json_free(object);
    }
    t->train(model, &options);
    float *got = weights(model, "P0", count);
    psoup_model_free(model);
    return got;
}

START_TEST(every_option_does_something) {
    const trainer *t = &trainers[_i];
    char idle[1024] = "";
    make_rows();
    for (const turn *f = t->turns; f->name; f++) {
        size_t n, m;
        float *before = trained_by(t, f->from, &n), *after = trained_by(t, f->to, &m);
        if (n == m && memcmp(before, after, n * sizeof(*before)) == 0)
            strcat(strcat(idle, " "), f->name);
        free(before);
        free(after);
    }
    ck_assert_msg(!*idle, "what changes nothing:%s", idle);
    for (const psoup_field *field = t->fields(); field->name; field++) {
        int listed = 0;
        for (const turn *f = t->turns; f->name; f++)
            listed += strcmp(f->name, field->name) == 0;
        for (const char *const *name = t->none; *name; name++)
            listed += strcmp(*name, field->name) == 0;
        ck_assert_msg(listed == 1, "%s stands in %d lists", field->name, listed);
    }
}
END_TEST

/* Two micro-batches of two pairs are one of four, but for the order of sums. */
START_TEST(accumulation_is_a_larger_batch) {
    const trainer *t = &trainers[1 + _i];
    size_t n, m;
    make_rows();
    float *one = trained_by(t, "'batch_size': 4", &n), *two = trained_by(t, "'accumulation': 2", &m);
    ck_assert_uint_eq(n, m);
    for (size_t i = 0; i < n; i++)
        near(two[i], one[i], 1e-4, "weight", i);
    free(one);
    free(two);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("train_options");
    TCase *tests = tcase_create("options");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, every_option_does_something, 0, TRAINERS);
    tcase_add_loop_test(tests, accumulation_is_a_larger_batch, 0, 2);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
