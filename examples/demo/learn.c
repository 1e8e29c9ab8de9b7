/* learn.c: the tokenizer and the base model from nothing, the judge's feedback, the reward models.
 */
#include "demo.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VOCABULARY = 680, TOKENIZER_TEXTS = 3000, VALIDATION = 200 };
/* Held-out comparisons are sampled so often for each prompt that the share on which a reward model agrees
 * with the judge is known to 0.008 (one standard error at 0.9); twice would leave 0.02. */
enum { HELD_ROUNDS = 12 };

/* ---- base
 * ---------------------------------------------------------------------------------------- */

/* Three examples in eleven carry no preference prompt, the others one of the eight; none has two.
 */
static int draw_preference(world_random *random) {
    int drawn = world_below(random, WORLD_PREFERENCES + 3);
    return drawn < WORLD_PREFERENCES ? drawn : -1;
}

static void train_tokenizer(demo_run *run, world_random *random) {
    psoup_error error;
    static const char *const special[] = {"</s>", "<|user|>", "<|assistant|>"};
    const char **texts = demo_take(run, 2 * TOKENIZER_TEXTS * sizeof *texts);
    for (int i = 0; i < TOKENIZER_TEXTS; i++) {
        char question[WORLD_TEXT], response[WORLD_TEXT], *filled;
        const world_prompt *prompt = &run->train[world_below(random, (int)run->n_train)];
        int preference = draw_preference(random);
        world_question(prompt, question);
        world_write(random, prompt, preference, response);
        must(psoup_template_fill(NULL, question, NULL,
                                 preference < 0 ? NULL : world_preferences[preference].prompt,
                                 &filled, &error),
             &error);
        char *both = demo_take(run, strlen(filled) + strlen(response) + 1);
        texts[i] = strcat(strcpy(both, filled), response);
        psoup_text_free(filled);
    }
    must(psoup_tokenizer_train(run->context, texts, TOKENIZER_TEXTS, VOCABULARY, special, 3, NULL,
                               &run->tokenizer, &error),
         &error);
    run->end = psoup_tokenizer_token_id(run->tokenizer, "</s>");
}

static int show_step(void *user, const psoup_step *step) {
    (void)user;
    return demo_progress(NULL, step->subject, step->step, step->total);
}

void learn_base(demo_run *run) {
    psoup_error error;
    double begun = demo_now();
    world_random random = {run->seed * 1000003u};
    run->n_train = world_prompts(0, run->train, 600);
    run->n_held = world_prompts(1, run->held, 600);
    train_tokenizer(run, &random);

    size_t n = (size_t)run->scale.base_examples, tokens = 0;
    psoup_example *examples = demo_take(run, (n + VALIDATION) * sizeof *examples);
    for (size_t i = 0; i < n + VALIDATION; i++) {
        char response[WORLD_TEXT];
        const world_prompt *prompt = &run->train[world_below(&random, (int)run->n_train)];
        int32_t preference = draw_preference(&random);
        world_write(&random, prompt, preference, response);
        demo_tokens read = demo_prompt(run, prompt, &preference, preference >= 0);
        demo_tokens all = demo_join(run, read, demo_encode(run, response), 1);
        examples[i] = (psoup_example){all.ids, all.n, read.n};
        tokens += i < n ? all.n : 0;
    }

    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    config.vocab_size = psoup_tokenizer_vocab_size(run->tokenizer);
    config.hidden_size = 64;
    config.intermediate_size = 128;
    config.num_hidden_layers = 2;
    config.num_attention_heads = 4;
    config.max_position_embeddings = 128;
    config.tie_word_embeddings = 1;
    config.eos_token_id = run->end;
    config.initializer_range = 0.06f;
    must(psoup_model_create(run->context, &config, run->seed, &run->model, &error), &error);

    psoup_sft_options options = PSOUP_SFT_OPTIONS_INIT;
    options.batch_tokens = 512;
    options.learning_rate = 4e-3f;
    options.schedule = PSOUP_SCHEDULE_LINEAR;
    options.warmup_steps = 30;
    options.seed = run->seed;
    options.on_step = show_step;
    must(psoup_sft(run->model, NULL, examples, n, examples + n, VALIDATION, &options, &error),
         &error);
    char path[1024]; /* where the policies are, for psoup generate */
    snprintf(path, sizeof path, "%s/base", run->directory);
    must(psoup_model_save(run->model, path, run->tokenizer, &error), &error);
    demo_count(run, &run->base_cost, 3, (int64_t)tokens);
    run->base_cost.seconds = demo_now() - begun;
    demo_say("base      %lld parameters from %zu examples, %zu tokens, %.0f s",
             (long long)psoup_model_parameters(run->model), n, tokens, run->base_cost.seconds);
}

/* ---- feedback
 * -------------------------------------------------------------------------------------- */

/* The candidates of `rounds` over the prompts, judged, and written to a file of this name. */
static void give_feedback(demo_run *run, const psoup_preferences *preferences,
                          const world_prompt *prompts, size_t n_prompts, int rounds, double noise,
                          uint64_t seed, const char *name) {
    psoup_error error;
    psoup_judge *judge;
    demo_noise noisy = {{seed * 7919u + 1}, noise};
    size_t n = n_prompts * (size_t)rounds;
    psoup_instruction *instructions = demo_take(run, n * sizeof *instructions);
    char path[1024];
    for (size_t i = 0; i < n; i++) {
        char *question = demo_take(run, WORLD_TEXT);
        world_question(&prompts[i % n_prompts], question);
        instructions[i] = (psoup_instruction){question, NULL, (int64_t)(i % n_prompts)};
    }
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_feedback_options options = PSOUP_FEEDBACK_OPTIONS_INIT;
    psoup_feedback_counts counts = {.size = sizeof counts};
    sampling.max_new_tokens = 48;
    options.sampling = &sampling;
    options.seed = seed;
    options.progress = demo_progress;
    snprintf(path, sizeof path, "%s/%s.jsonl", run->directory, name);
    must(psoup_judge_create(run->context, demo_answer, &noisy, &judge, &error), &error);
    must(psoup_feedback(run->model, run->tokenizer, preferences, instructions, n, judge, &options,
                        path, &counts, &error),
         &error);
    run->comparisons += counts.written;
    psoup_judge_free(judge);
}

/* The file's comparisons, appended to a list; each trains the reward model of its preference, or,
 * with `told`, all train number 0. */
typedef struct comparison_list {
    psoup_comparison *items;
    size_t n, capacity;
} comparison_list;

static void append(demo_run *run, comparison_list *list, demo_tokens prompt, demo_tokens chosen,
                   demo_tokens rejected, int32_t reward) {
    if (list->n == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 4096;
        psoup_comparison *items = demo_take(run, capacity * sizeof *items);
        if (list->n)
            memcpy(items, list->items, list->n * sizeof *items);
        *list = (comparison_list){items, list->n, capacity};
    }
    demo_tokens c = demo_join(run, prompt, chosen, 1), r = demo_join(run, prompt, rejected, 1);
    list->items[list->n++] = (psoup_comparison){c.ids, c.n, r.ids, r.n, reward, 0.0f};
}

static void read_feedback(demo_run *run, const char *name, int first, int told,
                          comparison_list *list) {
    psoup_jsonl_reader *reader = demo_open(run, name);
    for (psoup_json *row; (row = demo_next(reader)); psoup_json_free(row)) {
        const char *symbol = psoup_json_string(psoup_json_get(row, "preference"), "");
        int32_t reward = 0;
        for (int k = 0; !told && k < WORLD_PREFERENCES; k++)
            if (!strcmp(symbol, world_preferences[k].symbol))
                reward = k - first;
        append(
            run, list, demo_encode(run, psoup_json_string(psoup_json_get(row, "user_input"), "")),
            demo_encode(run, psoup_json_string(psoup_json_get(row, "completion_a"), "")),
            demo_encode(run, psoup_json_string(psoup_json_get(row, "completion_b"), "")), reward);
    }
    psoup_jsonl_reader_free(reader);
}

/* General helpfulness: two responses without any preference prompt, judged without a criterion. */
static void general_feedback(demo_run *run, int32_t reward, comparison_list *list) {
    psoup_error error;
    psoup_judge *judge;
    world_random random = {run->seed * 52711u};
    demo_noise noisy = {{run->seed * 15485863u}, 0.1};
    size_t n = (size_t)run->scale.general_pairs;
    demo_tokens *prompts = demo_take(run, 2 * n * sizeof *prompts);
    psoup_question *questions = demo_take(run, n * sizeof *questions);
    int32_t *verdicts = demo_take(run, n * sizeof *verdicts);
    for (size_t i = 0; i < n; i++) {
        const world_prompt *prompt = &run->train[world_below(&random, (int)run->n_train)];
        char *question = demo_take(run, WORLD_TEXT);
        world_question(prompt, question);
        questions[i].prompt = question;
        prompts[2 * i] = prompts[2 * i + 1] = demo_prompt(run, prompt, NULL, 0);
    }
    demo_response *responses = demo_generate(run, prompts, NULL, 2 * n, run->seed + 77);
    for (size_t i = 0; i < n; i++) {
        questions[i].id = (int64_t)i;
        questions[i].a = responses[2 * i].text;
        questions[i].b = responses[2 * i + 1].text;
    }
    must(psoup_judge_create(run->context, demo_answer, &noisy, &judge, &error), &error);
    must(psoup_judge_ask(judge, questions, n, verdicts, &error), &error);
    psoup_judge_free(judge);
    for (size_t i = 0; i < n; i++)
        if (verdicts[i] == PSOUP_A_WINS || verdicts[i] == PSOUP_B_WINS) {
            int a = verdicts[i] == PSOUP_A_WINS;
            append(run, list, prompts[2 * i], demo_encode(run, responses[2 * i + !a].text),
                   demo_encode(run, responses[2 * i + a].text), reward);
            run->comparisons++;
        }
}

/* ---- reward models
 * ----------------------------------------------------------------------------------- */

static psoup_reward *make_reward(demo_run *run, const char *symbol, uint64_t seed) {
    psoup_error error;
    psoup_reward *reward;
    psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
    char name[32];
    options.rank = 8;
    options.alpha = 16;
    options.targets = PSOUP_ALL_LINEAR;
    options.seed = run->seed * 131 + seed;
    snprintf(name, sizeof name, "reward %s", symbol);
    must(psoup_reward_create(run->model, name, &options, &reward, &error), &error);
    return reward;
}

static void train_rewards(demo_run *run, psoup_reward *const *rewards, size_t n,
                          const comparison_list *list) {
    psoup_error error;
    psoup_reward_options options = PSOUP_REWARD_OPTIONS_INIT;
    int64_t tokens = 0;
    options.batch_size = 32;
    options.learning_rate = 4e-3f;
    options.centering = 0.01f;
    options.max_grad_norm = 1.0f;
    options.warmup_steps = 10;
    options.seed = run->seed;
    options.on_step = show_step;
    for (size_t i = 0; i < list->n; i++)
        tokens += (int64_t)(list->items[i].n_chosen + list->items[i].n_rejected);
    must(psoup_reward_train(rewards, n, list->items, list->n, NULL, 0, &options, &error), &error);
    demo_count(run, &run->reward_cost, 2, tokens);
}

void learn_rewards(demo_run *run) {
    double begun = demo_now();
    psoup_reward *side_by_side[7];
    comparison_list each = {0}, all = {0};
    run->n_preferences = 6;
    run->preferences = demo_catalogue(run, 0, 6);
    give_feedback(run, run->preferences, run->train, run->n_train, run->scale.feedback_rounds, 0.1,
                  run->seed + 11, "feedback");
    read_feedback(run, "feedback", 0, 0, &each);
    general_feedback(run, 6, &each);
    run->feedback_cost.seconds = demo_now() - begun;
    demo_say("feedback  %zu comparisons, every tenth verdict of the judge flipped, %.0f s",
             run->comparisons, run->feedback_cost.seconds);

    begun = demo_now();
    for (int k = 0; k < 6; k++)
        side_by_side[k] = run->rewards[k] =
            make_reward(run, world_preferences[k].symbol, (uint64_t)k);
    side_by_side[6] = run->general = make_reward(run, "general", 50);
    train_rewards(run, side_by_side, 7, &each);
    run->told = make_reward(run, "told", 51);
    read_feedback(run, "feedback", 0, 1, &all);
    train_rewards(run, &run->told, 1, &all);
    run->reward_cost.seconds = demo_now() - begun;

    size_t before = run->comparisons;
    give_feedback(run, run->preferences, run->held, run->n_held, HELD_ROUNDS, 0, run->seed + 12,
                  "feedback-heldout");
    run->comparisons = before;
    demo_say(
        "rewards   six side by side with one of general helpfulness, one told by prompt, %.0f s",
        run->reward_cost.seconds);
}

void learn_new_rewards(demo_run *run) {
    psoup_error error;
    comparison_list each = {0}, all = {0};
    psoup_preferences *both = demo_catalogue(run, 6, 8);
    run->n_preferences = 8;
    give_feedback(run, both, run->train, run->n_train, run->scale.feedback_rounds, 0.1,
                  run->seed + 13, "feedback-new");
    give_feedback(run, both, run->held, run->n_held, HELD_ROUNDS, 0, run->seed + 14,
                  "feedback-new-heldout");
    read_feedback(run, "feedback-new", 6, 0, &each);
    for (int k = 6; k < 8; k++)
        run->rewards[k] = make_reward(run, world_preferences[k].symbol, (uint64_t)k);
    train_rewards(run, run->rewards + 6, 2, &each);

    /* The one told by prompt learns all eight, from the start. */
    psoup_reward_free(run->told);
    must(psoup_model_remove_adapter(run->model, "reward told", &error), &error);
    run->told = make_reward(run, "told", 52);
    read_feedback(run, "feedback", 0, 1, &all);
    read_feedback(run, "feedback-new", 6, 1, &all);
    train_rewards(run, &run->told, 1, &all);
    psoup_preferences_free(both);
}
