/* Every allocation fails in turn, those inside jansson, PCRE2, Zstandard and the C library too: each
 * path must say so, leak nothing, leave no half-written file, and work when it is taken again. */
#include "alloc_case.h"

static const int32_t words[4][6] = {
    {72, 101, 108, 108, 111, 33}, {65, 66, 67, 68, 69, 70}, {32, 97, 32, 98, 32, 99}, {1, 2, 3, 4, 5, 6}};

static psoup_status digest_adapter(const char *name, uint64_t *sum) {
    const float *data;
    size_t n;
    psoup_status status = psoup_model_adapter_data(model, name, &data, &n, &error);
    if (status == PSOUP_OK)
        digest(sum, data, n * sizeof *data);
    return status;
}

/* Evaluates a call that returns a status; on failure keeps it and jumps to `fail`. */
#define TRY(call)                                                                                  \
    do {                                                                                           \
        if ((status = (call)) != PSOUP_OK)                                                         \
            goto fail;                                                                             \
    } while (0)

/* ---- (a) loading, and everything that reads or writes a file -------------------------------------- */

static psoup_status make_context(uint64_t *sum) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *made_now;
    options.threads = 3;
    psoup_status status = psoup_context_create(&options, &made_now, &error);
    psoup_context_free(made_now);
    digest(sum, "", 1);
    return status;
}

static psoup_status load_all(uint64_t *sum) {
    psoup_status status;
    TRY(psoup_model_load(context, at("base"), &model, &error));
    TRY(psoup_model_load_adapter(model, "P1A", at("P1A"), &error));
    TRY(digest_adapter("P1A", sum));
fail:
    psoup_model_free(model);
    model = NULL;
    return status;
}

static psoup_status load_blocks(uint64_t *sum) {
    psoup_load_options options = PSOUP_LOAD_OPTIONS_INIT;
    psoup_status status;
    psoup_row row = {.tokens = words[0], .n = 6};
    float logprobs[5];
    options.dtype = PSOUP_INT8;
    TRY(psoup_model_load_with(context, at("base"), &options, &model, &error));
    TRY(psoup_model_logprobs(model, &row, 1, logprobs, &error));
    digest(sum, logprobs, sizeof logprobs);
    psoup_model_free(model);
    TRY(psoup_model_load(context, "tests/golden/quant/double", &model, &error));
    digest(sum, "", 1);
fail:
    psoup_model_free(model);
    model = NULL;
    return status;
}

static psoup_status load_tokenizer(uint64_t *sum) {
    static const char text[] = "Hello,  soups\xff\n caf\xc3\xa9 </s> 12";
    psoup_status status;
    psoup_tokenizer *t = NULL;
    int32_t ids[256];
    char back[256];
    size_t n, length;
    TRY(psoup_tokenizer_load(context, "tests/golden/text/llama3.json", &t, &error));
    TRY(psoup_tokenizer_encode(t, text, sizeof text - 1, 0, ids, NULL, 256, &n, &error));
    TRY(psoup_tokenizer_decode(t, ids, n, 0, back, sizeof back, &length, &error));
    digest(sum, ids, n * sizeof *ids);
    digest(sum, back, length);
fail:
    psoup_tokenizer_free(t);
    return status;
}

/* An adapter loaded into a model that has others. */
static psoup_status load_third(uint64_t *sum) {
    psoup_status status;
    TRY(psoup_model_load_adapter(model, "third", at("P1A"), &error));
    TRY(digest_adapter("third", sum));
fail:
    if (psoup_model_adapters(model) == 3 &&
        psoup_model_remove_adapter(model, "third", NULL) != PSOUP_OK)
        status = PSOUP_ERROR_STATE;
    return status;
}

static psoup_status save_all(uint64_t *sum) {
    psoup_status status;
    TRY(psoup_model_save(model, at("out/model"), tokenizer, &error));
    TRY(psoup_model_save_adapter(model, "P2A", at("out/adapter"), NULL, &error));
    TRY(psoup_reward_save(reward, at("out/reward"), "base", &error));
    TRY(psoup_reward_score(reward, &(psoup_row){words[0], 6, NULL}, 1, (float[1]){0}, &error));
    digest(sum, "", 1);
fail:
    return status;
}

static psoup_status rows_to_file(uint64_t *sum) {
    psoup_status status;
    psoup_jsonl_writer *writer = NULL;
    psoup_jsonl_reader *reader = NULL;
    psoup_json *row = NULL;
    TRY(psoup_jsonl_create(context, at("out/rows.jsonl.zst"), 0, &writer, &error));
    for (int i = 0; i < 3; i++) {
        row = psoup_json_new_object();
        int bad = psoup_json_set(row, "i", psoup_json_new_integer(i));
        bad |= psoup_json_set(row, "text", psoup_json_new_string("a \"soup\"\n"));
        bad |= psoup_json_set(row, "x", psoup_json_new_real(0.1 * i));
        if (bad != 0) { /* the caller's own allocations */
            snprintf(error.message, sizeof error.message, "no memory for a row");
            status = PSOUP_ERROR_MEMORY;
            goto fail;
        }
        TRY(psoup_jsonl_write(writer, row, &error));
        psoup_json_free(row);
        row = NULL;
    }
    TRY(psoup_jsonl_close(writer, &error));
    TRY(psoup_jsonl_open(context, at("out/rows.jsonl.zst"), &reader, &error));
    do {
        psoup_json_free(row);
        row = NULL;
        TRY(psoup_jsonl_next(reader, &row, &error));
        const char *text = psoup_json_string(psoup_json_get(row, "text"), "");
        digest(sum, text, strlen(text));
    } while (row != NULL);
fail:
    psoup_json_free(row);
    psoup_jsonl_writer_free(writer);
    psoup_jsonl_reader_free(reader);
    return status;
}

static psoup_status options_from_file(uint64_t *sum) {
    static const char text[] = "{\"steps\": 3, \"early_stop\": \"last\", \"learning_rate\": 1e-4}";
    psoup_status status;
    psoup_ppo_options options = PSOUP_PPO_OPTIONS_INIT;
    const psoup_field *fields = psoup_ppo_fields();
    psoup_json *value = NULL, *shown = NULL;
    TRY(psoup_json_parse(text, sizeof text - 1, "ppo.json", &value, &error));
    TRY(psoup_ppo_preset("rlphf", &options, &error));
    TRY(psoup_fields_read(fields, value, "ppo.json", &options, &error));
    TRY(psoup_fields_check(&fields, 1, value, "ppo.json", &error));
    shown = psoup_fields_json(fields, &options);
    TRY(psoup_json_write(context, at("out/ppo.json"), shown, &error));
    digest(sum, &options.steps, sizeof options.steps);
fail:
    if (status == PSOUP_ERROR_ARGUMENT && shown == NULL) /* psoup_fields_json was out of memory */
        status = PSOUP_ERROR_MEMORY;
    psoup_json_free(shown);
    psoup_json_free(value);
    return status;
}

/* ---- (b) generating and scoring ------------------------------------------------------------------- */

static psoup_status generate(uint64_t *sum) {
    static const float soup[2] = {0.5f, 0.5f}, one[2] = {0, 1};
    psoup_status status;
    psoup_generation *g = NULL;
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_session_options options = PSOUP_SESSION_OPTIONS_INIT;
    psoup_prompt prompts[3] = {{.tokens = words[0], .n = 6, .mix = soup},
                               {.tokens = words[1], .n = 3, .mix = one, .sequence = 1},
                               {.tokens = words[2], .n = 5, .sequence = 2}};
    sampling.max_new_tokens = 4;
    sampling.top_k = 20;
    sampling.top_p = 0.9f;
    sampling.no_repeat_ngram_size = 2;
    options.max_sequences = 2;
    TRY(psoup_generate(model, prompts, 3, &sampling, &options, NULL, NULL, &g, &error));
    for (size_t i = 0; i < 3; i++) {
        psoup_completion c = *psoup_generation_get(g, i);
        digest(sum, c.tokens, c.n * sizeof *c.tokens);
        digest(sum, c.logprobs, c.n * sizeof *c.logprobs);
    }
fail:
    psoup_generation_free(g);
    return status;
}

static psoup_status score(uint64_t *sum) {
    static const float soup[2] = {0.25f, 0.75f};
    const psoup_row rows[2] = {{words[0], 6, soup}, {words[1], 4, NULL}};
    psoup_status status;
    psoup_gradients *g = NULL;
    float out[8] = {0}, mix[2];
    size_t n = 0;
    TRY(psoup_model_parse_mix(model, "P1A=0.5,P2A=0.5", 0, mix, &error));
    TRY(psoup_model_logprobs(model, rows, 2, out, &error));
    TRY(psoup_model_gradients(model, rows, 2, NULL, 7, &g, &error));
    const float *grad = psoup_gradients_get(g, "mix", &n);
    digest(sum, out, sizeof out);
    digest(sum, grad, n * sizeof *grad);
fail:
    psoup_gradients_free(g);
    return status;
}

/* ---- (c) merging ------------------------------------------------------------------------------------ */

static psoup_status merge(psoup_merge_method method, const char *base, const char *a, const char *b,
                          const char *out, uint64_t *sum) {
    psoup_status status;
    psoup_merger *merger = NULL;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    psoup_merge_report report = {.size = sizeof report};
    options.method = method;
    options.svd_rank = 2;
    TRY(psoup_merger_create(context, &options, &merger, &error));
    if (base != NULL)
        TRY(psoup_merger_set_base(merger, at(base), &error));
    TRY(psoup_merger_add(merger, at(a), 0.25, &error));
    TRY(psoup_merger_add(merger, at(b), 0.75, &error));
    TRY(psoup_merger_write(merger, at(out), &error));
    TRY(psoup_merger_report(merger, &report, &error));
    digest(sum, &report.tensors, sizeof report.tensors);
    digest(sum, &report.worst_error, sizeof report.worst_error);
fail:
    psoup_merger_free(merger);
    return status;
}

static psoup_status merge_delta(uint64_t *sum) {
    return merge(PSOUP_MERGE_DELTA, NULL, "P1A", "P2A", "out/delta", sum);
}
static psoup_status merge_factors(uint64_t *sum) {
    return merge(PSOUP_MERGE_FACTORS, NULL, "P1A", "P2A", "out/factors", sum);
}
static psoup_status merge_svd(uint64_t *sum) {
    return merge(PSOUP_MERGE_SVD, NULL, "P1A", "P2A", "out/svd", sum);
}
static psoup_status fold(uint64_t *sum) {
    return merge(PSOUP_MERGE_DELTA, "base", "P1A", "P2A", "out/folded", sum);
}
static psoup_status merge_models(uint64_t *sum) {
    return merge(PSOUP_MERGE_DELTA, NULL, "base", "base", "out/models", sum);
}

/* ---- (d) training a tokenizer ----------------------------------------------------------------------- */

static psoup_status train_tokenizer(uint64_t *sum) {
    static const char *const texts[] = {"a soup a day, souper", "caf\xc3\xa9 soups </s>"};
    static const char *const special[] = {"</s>", "<pad>"};
    psoup_status status;
    psoup_tokenizer *t = NULL;
    TRY(psoup_tokenizer_train(context, texts, 2, 266, special, 2, NULL, &t, &error));
    TRY(psoup_tokenizer_save(t, at("out/tokenizer.json"), &error));
    const char *name = psoup_tokenizer_token(t, 260);
    digest(sum, name, strlen(name));
fail:
    psoup_tokenizer_free(t);
    return status;
}

/* ---- (e) training ------------------------------------------------------------------------------------ */

static psoup_status sft(uint64_t *sum) {
    static const psoup_example examples[2] = {{words[0], 6, 2}, {words[1], 5, 1}};
    psoup_sft_options options = PSOUP_SFT_OPTIONS_INIT;
    options.lora_dropout = 0.1f;
    options.metrics = at("out/metrics.jsonl");
    psoup_status status =
        psoup_sft(model, "P1A", examples, 2, examples, 1, &options, &error);
    return status == PSOUP_OK ? digest_adapter("P1A", sum) : status;
}

static int stop(void *user, const psoup_step *step) { return 1; }

/* Stopped after its first step, and continued. */
static psoup_status sft_resumed(uint64_t *sum) {
    static const psoup_example examples[2] = {{words[0], 6, 2}, {words[1], 5, 1}};
    psoup_sft_options options = PSOUP_SFT_OPTIONS_INIT;
    unlink(at("kept/checkpoint-000000000.safetensors.zst"));
    unlink(at("kept/checkpoint-000000001.safetensors.zst"));
    unlink(at("kept/checkpoint-000000002.safetensors.zst"));
    options.epochs = 2;
    options.validate_every = 1;
    options.metrics = at("out/metrics.jsonl");
    options.checkpoint_dir = at("kept");
    options.on_step = stop;
    psoup_status status = psoup_sft(model, "P1A", examples, 2, examples, 1, &options, &error);
    if (status != PSOUP_ERROR_CANCELLED)
        return status;
    options.resume = 1;
    options.on_step = NULL;
    status = psoup_sft(model, "P1A", examples, 2, examples, 1, &options, &error);
    return status == PSOUP_OK ? digest_adapter("P1A", sum) : status;
}

static psoup_status sft_base(uint64_t *sum) {
    static const psoup_example examples[2] = {{words[0], 6, 2}, {words[1], 5, 1}};
    float out[5] = {0};
    psoup_status status = psoup_sft(model, NULL, examples, 2, examples, 1, NULL, &error);
    if (status == PSOUP_OK)
        status = psoup_model_logprobs(model, &(psoup_row){words[2], 6, NULL}, 1, out, &error);
    digest(sum, out, sizeof out);
    return status;
}

static psoup_status reward_train(uint64_t *sum) {
    static const psoup_comparison pairs[2] = {{words[0], 6, words[1], 5, 0, 0.0f},
                                              {words[2], 4, words[3], 6, 0, 0.0f}};
    psoup_reward_options options = PSOUP_REWARD_OPTIONS_INIT;
    double accuracy = 0, loss;
    options.metrics = at("out/metrics.jsonl");
    psoup_status status =
        psoup_reward_train(&reward, 1, pairs, 2, pairs, 1, &options, &error);
    if (status == PSOUP_OK)
        status = psoup_reward_accuracy(&reward, 1, pairs, 2, &accuracy, &loss, &error);
    return status == PSOUP_OK ? digest_adapter("R", sum) : status;
}

static psoup_status dpo(uint64_t *sum) {
    static const psoup_dpo_pair pairs[2] = {{words[0], 3, words[1], 5, words[2], 4, 0, {0}},
                                            {words[1], 2, words[3], 6, words[0], 6, 0, {0}}};
    static const char *const policies[1] = {"P1A"};
    psoup_dpo_options options = PSOUP_DPO_OPTIONS_INIT;
    options.metrics = at("out/metrics.jsonl");
    psoup_status status =
        psoup_dpo(model, policies, 1, pairs, 2, pairs, 1, &options, &error);
    return status == PSOUP_OK ? digest_adapter("P1A", sum) : status;
}

static psoup_status ppo(uint64_t *sum) {
    psoup_ppo_prompt prompts[2] = {{.tokens = words[0], .n = 4}, {.tokens = words[1], .n = 3}};
    psoup_ppo_policy policy = {.adapter = "P1A", .rewards = &reward, .n_rewards = 1,
                               .prompts = prompts, .n_prompts = 2, .validation = prompts,
                               .n_validation = 1, .seed = 4};
    psoup_ppo_options options = PSOUP_PPO_OPTIONS_INIT;
    psoup_ppo *handle = NULL;
    psoup_status status;
    options.steps = 1;
    options.batch_size = 2;
    options.ppo_epochs = 1;
    options.max_new_tokens = 3;
    options.lora_dropout = 0.1f;
    options.reward_text = 1;
    options.tokenizer = tokenizer;
    options.metrics = at("out/metrics.jsonl");
    options.samples_every = options.samples_count = 1;
    options.samples = at("out/samples.jsonl");
    TRY(psoup_ppo_create(model, &policy, 1, &options, &handle, &error));
    TRY(psoup_ppo_run(handle, &error));
    TRY(digest_adapter("P1A", sum));
fail:
    psoup_ppo_free(handle);
    return status;
}

static psoup_status best_of_n(uint64_t *sum) {
    const psoup_prompt prompts[2] = {{.tokens = words[0], .n = 4}, {.tokens = words[1], .n = 3, .sequence = 1}};
    psoup_best_options options = PSOUP_BEST_OPTIONS_INIT;
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_generation *generation = NULL;
    int32_t chosen[2];
    float scores[4];
    psoup_status status;
    sampling.max_new_tokens = 3;
    options.n = 2;
    options.rewards = &reward;
    options.n_rewards = 1;
    options.reward_text = 1;
    options.tokenizer = tokenizer;
    TRY(psoup_best_of_n(model, prompts, 2, &sampling, NULL, &options, &generation, chosen, scores,
                        &error));
    digest(sum, chosen, sizeof chosen);
    digest(sum, scores, sizeof scores);
fail:
    psoup_generation_free(generation);
    return status;
}

/* ---- (f) feedback and win rates ------------------------------------------------------------------------ */

static int longer(void *user, const psoup_question *questions, size_t n, int32_t *verdicts) {
    for (size_t i = 0; i < n; i++)
        verdicts[i] = strcmp(questions[i].a, questions[i].b) > 0 ? PSOUP_A_WINS : PSOUP_B_WINS;
    return 0;
}

static psoup_status compare(psoup_judge *judge, uint64_t *sum) {
    static const char *const prompts[] = {"Why?", "How?"}, *const a[] = {"a", "b"},
                             *const b[] = {"b", "bb"};
    static const int32_t members[3] = {0, 2, 4};
    psoup_status status;
    psoup_preferences *all = NULL;
    psoup_feedback_options options = PSOUP_FEEDBACK_OPTIONS_INIT;
    psoup_feedback_counts counts = {.size = sizeof counts};
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_instruction instruction = {"Hi", NULL, 3};
    int32_t verdicts[6], helpful[2];
    psoup_duel duels[2] = {{.preferences = members, .verdicts = verdicts, .n = 3},
                           {.prompt = 1, .user = 1, .preferences = members,
                            .verdicts = verdicts + 3, .n = 3}};
    duels[0].helpfulness = duels[1].helpfulness = PSOUP_UNPARSED;
    psoup_rate rate;
    sampling.max_new_tokens = 3;
    options.sampling = &sampling;
    TRY(psoup_preferences_default(context, 0, &all, &error));
    TRY(psoup_feedback(model, tokenizer, all, &instruction, 1, judge, &options,
                       at("out/feedback.jsonl"), &counts, &error));
    TRY(psoup_judge_duels(judge, all, prompts, a, b, duels, 2, 1, verdicts, helpful, &error));
    TRY(psoup_winrate_aggregate(context, duels, 2, 1, &rate, &error));
    digest(sum, verdicts, sizeof verdicts);
    digest(sum, &rate, sizeof rate);
    digest(sum, &counts.written, sizeof counts.written);
fail:
    psoup_preferences_free(all);
    return status;
}

static psoup_status feedback(uint64_t *sum) {
    psoup_judge *judge = NULL;
    psoup_status status = psoup_judge_create(context, longer, NULL, &judge, &error);
    if (status == PSOUP_OK)
        status = compare(judge, sum);
    psoup_judge_free(judge);
    return status;
}

static psoup_status judge_command(uint64_t *sum) {
    static const psoup_question question = {.id = 1, .prompt = "p", .a = "a", .b = "b"};
    psoup_judge *judge = NULL;
    int32_t verdict = 0;
    static const char answers[] = "s/.*\"id\": \\([0-9]*\\).*/{\"id\": \\1, \"verdict\": \"b\"}/";
    psoup_status status = psoup_judge_command(
        context, (const char *[]){"sed", "-u", answers, NULL}, &judge, &error);
    if (status == PSOUP_OK)
        status = psoup_judge_ask(judge, &question, 1, &verdict, &error);
    psoup_judge_free(judge);
    digest(sum, &verdict, sizeof verdict);
    return status;
}

static psoup_status catalogue(uint64_t *sum) {
    psoup_status status;
    psoup_preferences *all = NULL;
    char *text = NULL;
    TRY(psoup_preferences_load(context, at("preferences.json"), &all, &error));
    TRY(psoup_template_fill("alpaca", "Why?", NULL, psoup_preferences_get(all, 1)->prompt, &text,
                            &error));
    digest(sum, text, strlen(text));
fail:
    psoup_text_free(text);
    psoup_preferences_free(all);
    return status;
}

static void write_catalogue(void) {
    open_context(1);
    FILE *file = fopen(at("preferences.json"), "w");
    fputs("[{\"symbol\": \"X1\", \"dimension\": \"d\", \"prompt\": \"Generate one.\"},\n"
          "{\"symbol\": \"X2\", \"dimension\": \"d\", \"prompt\": \"Generate two.\", "
          "\"opposite\": \"X1\"}]\n",
          file);
    fclose(file);
}

/* ------------------------------------------------------------------------------------------------------- */

static const path paths[] = {
    {"context", NULL, make_context, NULL, false},
    {"load a model", bare, load_all, release, false},
    {"load models in blocks", bare, load_blocks, release, false},
    {"load a tokenizer", bare, load_tokenizer, release, false},
    {"load one adapter more", load, load_third, release, false},
    {"save model and adapters", load_reward, save_all, release, false},
    {"JSON Lines, compressed", bare, rows_to_file, release, false},
    {"options", bare, options_from_file, release, false},
    {"generate", load, generate, release, false},
    {"score", load, score, release, false},
    {"merge: delta", bare, merge_delta, release, false},
    {"merge: factors", bare, merge_factors, release, false},
    {"merge: svd", bare, merge_svd, release, false},
    {"fold into the base", bare, fold, release, false},
    {"merge models", bare, merge_models, release, false},
    {"train a tokenizer", bare, train_tokenizer, release, false},
    {"fine-tune an adapter", load, sft, release, true},
    {"fine-tune an adapter, stopped and resumed", load, sft_resumed, release, true},
    {"fine-tune the base", load, sft_base, release, true},
    {"train a reward model", load_reward, reward_train, release, true},
    {"DPO", load, dpo, release, true},
    {"PPO", load_reward, ppo, release, true},
    {"best of n", load_reward, best_of_n, release, false},
    {"feedback and win rates", load, feedback, release, false},
    {"a judge's program", bare, judge_command, release, false},
    {"preferences and templates", write_catalogue, catalogue, release, false},
};

START_TEST(allocations_fail) {
    fail_in_turn(&paths[_i]);
}
END_TEST

int main(void) {
    if (!CAN_INTERPOSE) {
        puts("skipped: a sanitizer or another C library owns malloc here");
        return 0;
    }
    Suite *suite = suite_create("alloc");
    TCase *tests = tcase_create("alloc");
    tcase_add_checked_fixture(tests, make_world, end_world);
    tcase_set_timeout(tests, 600);
    tcase_add_loop_test(tests, allocations_fail, 0, (int)(sizeof paths / sizeof *paths));
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failures = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failures ? 1 : 0;
}
