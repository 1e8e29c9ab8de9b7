/* Every allocation of the evaluation room made to fail in turn: a clean status, no leak, no file. */
#include "base_case.h"
#include "eval/eval.h"

typedef struct failing {
    long countdown, alive;
} failing;
static failing f;

static void *failing_alloc(void *user, size_t bytes, size_t alignment) {
    (void)user;
    if (f.countdown-- == 0)
        return NULL;
    f.alive++;
    return aligned_alloc(alignment < 64 ? 64 : alignment, (bytes + 63) / 64 * 64);
}

static void failing_free(void *user, void *memory) {
    (void)user;
    f.alive -= memory != NULL;
    free(memory);
}

static char judge_path[512];
static psoup_model *model;
static psoup_tokenizer *tokenizer;

static void set_up_failing(void) {
    set_up();
    psoup_context_free(context);
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    options.threads = 1;
    options.allocator = (psoup_allocator){NULL, failing_alloc, failing_free};
    f = (failing){.countdown = -1};
    OK(psoup_context_create(&options, &context, &error));
    put_text(at("p.json"),
             "[{\"symbol\": \"A\", \"dimension\": \"d\", \"prompt\": \"Generate a.\", \"opposite\": "
             "\"B\"}, {\"symbol\": \"B\", \"dimension\": \"d\", \"prompt\": \"b\", \"opposite\": "
             "\"A\"}]");
}

static void tear_down_failing(void) {
    tear_down();
    ck_assert_int_eq(f.alive, 0);
}

/* Calls path until no allocation fails; returns how many there are. */
static long each_allocation(psoup_status (*path)(void)) {
    OK(path()); /* a model keeps what it made for its first use, such as packed weights */
    int files = names(false);
    for (long failures = 0;; failures++) {
        long before = f.alive;
        f.countdown = failures;
        psoup_status status = path();
        bool whole = f.countdown >= 0;
        f.countdown = -1;
        ck_assert_msg(status == (whole ? PSOUP_OK : PSOUP_ERROR_MEMORY),
                      "allocation %ld: status %d, %s", failures, (int)status, error.message);
        ck_assert_msg(f.alive == before, "allocation %ld: %ld blocks leaked", failures,
                      f.alive - before);
        if (whole)
            return failures;
        ck_assert_msg(names(false) == files, "allocation %ld: a file is left", failures);
    }
}

static psoup_status catalogues(void) {
    psoup_preferences *own = NULL, *paper = NULL;
    psoup_status status = psoup_preferences_load(context, at("p.json"), &own, &error);
    if (status == PSOUP_OK)
        status = psoup_preferences_default(context, 1, &paper, &error);
    psoup_preferences_free(own);
    psoup_preferences_free(paper);
    return status;
}

START_TEST(catalogues_out_of_memory) {
    ck_assert_int_gt(each_allocation(catalogues), 8);
}
END_TEST

static psoup_status command(void) {
    psoup_judge *judge = NULL;
    const psoup_question questions[] = {{.prompt = "p", .a = "good", .b = "bad"},
                                        {.prompt = "p", .a = "bad", .b = "good"}};
    int32_t verdicts[2];
    psoup_status status =
        psoup_judge_command(context, (const char *[]){judge_path, "good", NULL}, &judge, &error);
    if (status == PSOUP_OK)
        status = psoup_judge_ask(judge, questions, 2, verdicts, &error);
    if (status == PSOUP_OK)
        ck_assert(verdicts[0] == PSOUP_A_WINS && verdicts[1] == PSOUP_B_WINS);
    psoup_judge_free(judge);
    return status;
}

START_TEST(command_out_of_memory) {
    ck_assert_int_gt(each_allocation(command), 5);
}
END_TEST

static int first(void *user, const psoup_question *questions, size_t n, int32_t *verdicts) {
    (void)user, (void)questions;
    for (size_t i = 0; i < n; i++)
        verdicts[i] = PSOUP_A_WINS;
    return 0;
}

static psoup_status duels(void) {
    const int32_t criteria[] = {0, 1};
    int32_t verdicts[2], helpful[1];
    const psoup_duel duel = {.preferences = criteria, .verdicts = verdicts, .n = 2};
    psoup_preferences *p = NULL;
    psoup_judge *judge = NULL;
    psoup_rate rate;
    psoup_status status = psoup_preferences_default(context, 0, &p, &error);
    if (status == PSOUP_OK)
        status = psoup_judge_create(context, first, NULL, &judge, &error);
    if (status == PSOUP_OK)
        status = psoup_judge_duels(judge, p, (const char *[]){"p"}, (const char *[]){"a"},
                                   (const char *[]){"b"}, &duel, 1, 0, verdicts, helpful, &error);
    if (status == PSOUP_OK)
        status = psoup_winrate_aggregate(context, &duel, 1, 0, &rate, &error);
    if (status == PSOUP_OK)
        ck_assert(rate.wins == 1 && rate.rate == 1);
    psoup_judge_free(judge);
    psoup_preferences_free(p);
    return status;
}

START_TEST(duels_out_of_memory) {
    ck_assert_int_gt(each_allocation(duels), 6);
}
END_TEST

static psoup_status feedback(void) {
    const psoup_instruction instruction = {"Why?", NULL, 1};
    psoup_preferences *p = NULL;
    psoup_judge *judge = NULL;
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_feedback_options options = PSOUP_FEEDBACK_OPTIONS_INIT;
    sampling.max_new_tokens = 3;
    options.sampling = &sampling;
    psoup_status status = psoup_preferences_load(context, at("p.json"), &p, &error);
    if (status == PSOUP_OK)
        status = psoup_judge_create(context, first, NULL, &judge, &error);
    if (status == PSOUP_OK)
        status = psoup_feedback(model, tokenizer, p, &instruction, 1, judge, &options,
                                at("f.jsonl"), NULL, &error);
    psoup_judge_free(judge);
    psoup_preferences_free(p);
    return status;
}

START_TEST(feedback_out_of_memory) {
    const char *const text = "Why?", *const end = "</s>";
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    OK(psoup_tokenizer_train(context, &text, 1, 258, &end, 1, NULL, &tokenizer, &error));
    config.vocab_size = psoup_tokenizer_vocab_size(tokenizer);
    config.hidden_size = config.intermediate_size = 8;
    config.num_hidden_layers = config.num_attention_heads = 1;
    config.max_position_embeddings = 128;
    config.eos_token_id = 256;
    OK(psoup_model_create(context, &config, 5, &model, &error));
    ck_assert_int_gt(each_allocation(feedback), 50);
    ck_assert_int_eq(names(false), 2);
    psoup_model_free(model);
    psoup_tokenizer_free(tokenizer);
}
END_TEST

int main(int argc, char **argv) {
    const char *slash = argc > 0 ? strrchr(argv[0], '/') : NULL;
    snprintf(judge_path, sizeof judge_path, "%.*sjudge", slash ? (int)(slash - argv[0] + 1) : 2,
             slash ? argv[0] : "./");
    Suite *suite = suite_create("evaluation out of memory");
    TCase *c = tcase_create("memory");
    tcase_set_timeout(c, 120);
    tcase_add_checked_fixture(c, set_up_failing, tear_down_failing);
    tcase_add_test(c, catalogues_out_of_memory);
    tcase_add_test(c, command_out_of_memory);
    tcase_add_test(c, duels_out_of_memory);
    tcase_add_test(c, feedback_out_of_memory);
    suite_add_tcase(suite, c);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
