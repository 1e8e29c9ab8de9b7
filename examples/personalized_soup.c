/* personalized_soup.c: the whole story, through the public interface, in under a minute: a base model
 * from random weights, feedback, two reward models, two PPO policies over the one base, and one batch
 * that answers four users, every row with its own mix of the policies. Nothing is merged or swapped.
 */
#include <psoup/psoup.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "demo/judge.h"

enum { EXAMPLES = 24000, ROUNDS = 2, MANY = 60000 };
static const char catalogue[] = "build/soup-preferences.json", data[] = "build/soup-feedback.jsonl";
static psoup_error error;
static psoup_tokenizer *tokenizer;

static void must(psoup_status status) {
    if (status != PSOUP_OK) {
        fprintf(stderr, "personalized_soup: %s\n", error.message);
        exit(1);
    }
}

static char *join(const char *a, const char *b) { /* texts and tokens live as long as the program */
    char *text = malloc(strlen(a) + strlen(b) + 1);
    return text ? strcat(strcpy(text, a), b) : (exit(1), NULL);
}

static size_t encode(const char *text, int end, const int32_t **ids) {
    size_t capacity = 4 * strlen(text) + 9, n;
    int32_t *tokens = malloc(capacity * sizeof *tokens);
    *ids = tokens ? tokens : (exit(1), NULL);
    must(psoup_tokenizer_encode(tokenizer, text, strlen(text), 0, tokens, NULL, capacity, &n, &error));
    if (end)
        tokens[n++] = psoup_tokenizer_token_id(tokenizer, "</s>");
    return n;
}

/* The prompt as the model reads it, with one preference's wish (−1: none). */
static char *fill(const world_prompt *prompt, int wish) {
    char question[WORLD_TEXT], *text;
    world_question(prompt, question);
    must(psoup_template_fill(NULL, question, NULL, wish < 0 ? NULL : world_preferences[wish].prompt,
                             &text, &error));
    return text;
}

/* The judge, as a callback: which response is better by the one preference asked about. */
static int judge_pairs(void *user, const psoup_question *questions, size_t n, int32_t *verdicts) {
    (void)user;
    for (size_t i = 0; i < n; i++) {
        const char *symbol = questions[i].preference->symbol; /* "P1A" … "P3B" */
        int preference = 2 * (symbol[1] - '1') + (symbol[2] - 'A');
        world_prompt prompt;
        world_understand(questions[i].prompt, &prompt);
        verdicts[i] = judge_compare(&prompt, preference, questions[i].a, questions[i].b);
    }
    return 0;
}

static const char *get(const psoup_json *row, const char *key) {
    return psoup_json_string(psoup_json_get(row, key), "");
}

int main(void) {
    psoup_context *context;
    must(psoup_context_create(NULL, &context, &error));
    /* 1. A base model: instructions with at most one preference prompt, a tokenizer, training. */
    static world_prompt train[600], held[600];
    size_t n_train = world_prompts(0, train, 600), n_held = world_prompts(1, held, 600);
    static const char *const special[] = {"</s>", "<|user|>", "<|assistant|>"};
    static char *prompts[EXAMPLES], *texts[EXAMPLES];
    static psoup_example examples[EXAMPLES];
    world_random random = {1};
    for (int i = 0; i < EXAMPLES; i++) {
        char response[WORLD_TEXT];
        const world_prompt *prompt = &train[world_below(&random, (int)n_train)];
        int preference = world_below(&random, WORLD_PREFERENCES + 1) - 1;
        world_write(&random, prompt, preference, response);
        prompts[i] = fill(prompt, preference);
        texts[i] = join(prompts[i], response);
    }
    must(psoup_tokenizer_train(context, (const char *const *)texts, 3000, 680, special, 3, NULL,
                               &tokenizer, &error));
    for (int i = 0; i < EXAMPLES; i++) { /* the longer text's tokens stay */
        examples[i].n_prompt = encode(prompts[i], 0, &examples[i].tokens);
        examples[i].n = encode(texts[i], 1, &examples[i].tokens);
    }
    psoup_model *model;
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    config.vocab_size = psoup_tokenizer_vocab_size(tokenizer);
    config.hidden_size = 64;
    config.intermediate_size = 128;
    config.num_hidden_layers = 2;
    config.num_attention_heads = 4;
    config.tie_word_embeddings = 1;
    config.eos_token_id = psoup_tokenizer_token_id(tokenizer, "</s>");
    config.initializer_range = 0.06f;
    must(psoup_model_create(context, &config, 1, &model, &error));
    psoup_sft_options sft = PSOUP_SFT_OPTIONS_INIT;
    sft.batch_tokens = 512;
    sft.learning_rate = 5e-3f;
    sft.schedule = PSOUP_SCHEDULE_LINEAR;
    must(psoup_sft(model, NULL, examples, EXAMPLES, NULL, 0, &sft, &error));

    /* 2. Feedback: the base's own responses, told the preference, not told, told the opposite. */
    FILE *list = fopen(catalogue, "w");
    const struct world_preference *p = world_preferences;
    for (int k = 0; list && k < 6; k += k == 1 ? 3 : 1) /* P1A P1B P3A P3B */
        fprintf(list, "{\"symbol\":\"%s\",\"dimension\":\"%s\",\"prompt\":\"%s\",\"opposite\":\"%s\"}\n",
                p[k].symbol, p[k].dimension, p[k].prompt, p[k].opposite);
    if (!list || fclose(list))
        return perror(catalogue), 1;
    static psoup_instruction asked[ROUNDS * 600];
    for (size_t i = 0; i < ROUNDS * n_train; i++) {
        char question[WORLD_TEXT];
        world_question(&train[i % n_train], question);
        asked[i].instruction = join(question, "");
    }
    psoup_preferences *wishes;
    psoup_judge *judge;
    psoup_sampling sampling = PSOUP_SAMPLING_INIT; /* as it is: at most 128 tokens, temperature 1 */
    psoup_feedback_options feedback = PSOUP_FEEDBACK_OPTIONS_INIT;
    must(psoup_preferences_load(context, catalogue, &wishes, &error));
    must(psoup_judge_create(context, judge_pairs, NULL, &judge, &error));
    must(psoup_feedback(model, tokenizer, wishes, asked, ROUNDS * n_train, judge, &feedback, data,
                        NULL, &error));

    /* 3. A reward model for each of the two preferences, side by side. */
    static psoup_comparison comparisons[MANY];
    size_t n_comparisons = 0;
    psoup_jsonl_reader *reader;
    psoup_json *row;
    must(psoup_jsonl_open(context, data, &reader, &error));
    while (must(psoup_jsonl_next(reader, &row, &error)), row && n_comparisons < MANY) {
        psoup_comparison *c = &comparisons[n_comparisons];
        const char *prompt = get(row, "user_input"), *about = get(row, "preference");
        c->reward = !strcmp(about, "P3A");
        c->n_chosen = encode(join(prompt, get(row, "completion_a")), 1, &c->chosen);
        c->n_rejected = encode(join(prompt, get(row, "completion_b")), 1, &c->rejected);
        n_comparisons += !strcmp(about, "P1A") || !strcmp(about, "P3A"); /* else the next overwrites */
        psoup_json_free(row);
    }
    psoup_reward *rewards[2];
    psoup_adapter_options lora = PSOUP_ADAPTER_OPTIONS_INIT;
    psoup_reward_options learn = PSOUP_REWARD_OPTIONS_INIT;
    lora.targets = PSOUP_ALL_LINEAR;
    learn.batch_size = 32;
    learn.learning_rate = 4e-3f;
    must(psoup_reward_create(model, "easy?", &lora, &rewards[0], &error));
    must(psoup_reward_create(model, "friendly?", &lora, &rewards[1], &error));
    must(psoup_reward_train(rewards, 2, comparisons, n_comparisons, NULL, 0, &learn, &error));

    /* 4. A policy for each: one run, one base. Only its reward model reads what is wanted. */
    static psoup_ppo_prompt reads[2][600];
    static psoup_reward_input told[2][600];
    psoup_ppo *ppo;
    psoup_ppo_policy policies[2]; /* of P1A, easy words, and P3A, friendly */
    psoup_ppo_options options = PSOUP_PPO_OPTIONS_INIT;
    for (int k = 0; k < 2; k++) {
        policies[k] = (psoup_ppo_policy){.adapter = world_preferences[4 * k].symbol,
                                         .rewards = &rewards[k], .n_rewards = 1,
                                         .prompts = reads[k], .n_prompts = n_train};
        must(psoup_model_add_adapter(model, policies[k].adapter, &lora, &error));
        for (size_t i = 0; i < n_train; i++) {
            told[k][i].weight = 1;
            told[k][i].n = encode(fill(&train[i], 4 * k), 0, &told[k][i].tokens);
            reads[k][i] = (psoup_ppo_prompt){.inputs = &told[k][i], .n_inputs = 1};
            reads[k][i].n = encode(fill(&train[i], -1), 0, &reads[k][i].tokens);
        }
    }
    options.steps = 30;
    options.learning_rate = 2e-3f;
    options.kl_coefficient = 0.05f;
    must(psoup_ppo_create(model, policies, 2, &options, &ppo, &error));
    must(psoup_ppo_run(ppo, &error));

    /* 5. One batch, one question that training never asked, four users: each row its own mix. */
    static const char *const mixes[] = {"", "P1A=1", "P3A=1", "P1A=0.5,P3A=0.5"};
    float weights[4][4] = {{0}}; /* adapters: easy?, friendly?, P1A, P3A */
    psoup_prompt rows[4];
    for (size_t u = 0; u < 4; u++) {
        must(psoup_model_parse_mix(model, mixes[u], 0, weights[u], &error));
        rows[u] = (psoup_prompt){.mix = weights[u], .sequence = u};
        rows[u].n = encode(fill(&held[n_held / 3], -1), 0, &rows[u].tokens);
    }
    psoup_generation *generation;
    sampling.temperature = 0.5f;
    must(psoup_generate(model, rows, 4, &sampling, NULL, NULL, NULL, &generation, &error));
    printf("%s\n", fill(&held[n_held / 3], -1));
    for (size_t u = 0; u < 4; u++) {
        psoup_completion c = *psoup_generation_get(generation, u);
        char answer[8 * WORLD_TEXT];
        size_t n;
        must(psoup_tokenizer_decode(tokenizer, c.tokens, c.n, 1, answer, sizeof answer, &n, &error));
        printf("  %-16s %.*s\n", *mixes[u] ? mixes[u] : "the base", (int)n, answer);
    }
    return 0;
}
