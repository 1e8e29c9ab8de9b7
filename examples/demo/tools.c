/* tools.c: memory, prompts as tokens, generation, progress. */
#include "demo.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

void must(psoup_status status, const psoup_error *error) {
    if (status == PSOUP_OK)
        return;
    fprintf(stderr, "\npsoup-demo: %s: %s\n", psoup_status_name(status), error->message);
    exit(1);
}

struct demo_block {
    struct demo_block *next;
    size_t used, size;
    max_align_t memory[];
};

void *demo_take(demo_run *run, size_t bytes) {
    bytes = (bytes + sizeof(max_align_t) - 1) / sizeof(max_align_t) * sizeof(max_align_t);
    struct demo_block *block = run->blocks;
    if (!block || block->size - block->used < bytes) {
        size_t size = bytes > (1u << 20) ? bytes : (1u << 20);
        block = calloc(1, sizeof *block + size);
        if (!block) {
            fprintf(stderr, "\npsoup-demo: out of memory\n");
            exit(1);
        }
        block->size = size;
        block->next = run->blocks;
        run->blocks = block;
    }
    void *memory = (char *)block->memory + block->used;
    block->used += bytes;
    return memory;
}

void demo_free(demo_run *run) {
    for (size_t i = 0; i < WORLD_PREFERENCES; i++)
        psoup_reward_free(run->rewards[i]);
    psoup_reward_free(run->general);
    psoup_reward_free(run->told);
    psoup_model_free(run->model);
    psoup_tokenizer_free(run->tokenizer);
    psoup_preferences_free(run->preferences);
    while (run->blocks) {
        struct demo_block *next = run->blocks->next;
        free(run->blocks);
        run->blocks = next;
    }
}

/* ---- telling
 * ------------------------------------------------------------------------------------- */

double demo_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

void demo_say(const char *format, ...) {
    va_list arguments;
    if (isatty(STDOUT_FILENO))
        printf("\r\033[K");
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
    fflush(stdout);
}

int demo_progress(void *user, const char *label, int64_t done, int64_t total) {
    (void)user;
    if (!isatty(STDOUT_FILENO) || total <= 0)
        return 0;
    int filled = (int)(30 * done / total);
    printf("\r\033[K  %-14s [%.*s%*s] %lld/%lld", label, filled, "##############################",
           30 - filled, "", (long long)done, (long long)total);
    fflush(stdout);
    return 0;
}

void demo_count(demo_run *run, demo_cost *cost, double passes, int64_t tokens) {
    cost->tokens += tokens;
    cost->flop += passes * 2.0 * (double)psoup_model_parameters(run->model) * (double)tokens;
}

demo_estimate demo_interval(const double *values, size_t n) {
    double mean = 0, squares = 0;
    for (size_t i = 0; i < n; i++)
        mean += values[i] / (double)n;
    for (size_t i = 0; i < n; i++)
        squares += (values[i] - mean) * (values[i] - mean);
    double half = n > 1 ? 1.96 * sqrt(squares / (double)(n - 1) / (double)n) : INFINITY;
    return (demo_estimate){mean, mean - half, mean + half};
}

psoup_jsonl_reader *demo_open(demo_run *run, const char *name) {
    psoup_jsonl_reader *reader;
    psoup_error error;
    char path[1024];
    snprintf(path, sizeof path, "%s/%s.jsonl", run->directory, name);
    must(psoup_jsonl_open(run->context, path, &reader, &error), &error);
    return reader;
}

psoup_json *demo_next(psoup_jsonl_reader *reader) {
    psoup_json *row;
    psoup_error error;
    must(psoup_jsonl_next(reader, &row, &error), &error);
    return row;
}

/* ---- text and tokens
 * ------------------------------------------------------------------------------- */

demo_tokens demo_encode(demo_run *run, const char *text) {
    psoup_error error;
    int32_t ids[WORLD_TEXT * 4 + 8];
    size_t count, length = strlen(text);
    must(psoup_tokenizer_encode(run->tokenizer, text, length, 0, ids, NULL,
                                sizeof ids / sizeof ids[0], &count, &error),
         &error);
    if (count > sizeof ids / sizeof ids[0]) {
        fprintf(stderr, "\npsoup-demo: a text of %zu bytes is too long\n", length);
        exit(1);
    }
    int32_t *kept = demo_take(run, (count + 1) * sizeof *kept);
    memcpy(kept, ids, count * sizeof *kept);
    return (demo_tokens){kept, count};
}

demo_tokens demo_prompt(demo_run *run, const world_prompt *prompt, const int32_t *preferences,
                        size_t n) {
    psoup_error error;
    char question[WORLD_TEXT], wishes[WORLD_TEXT] = "", *text;
    world_question(prompt, question);
    for (size_t i = 0; i < n; i++) {
        if (i)
            strcat(wishes, " ");
        strcat(wishes, world_preferences[preferences[i]].prompt);
    }
    must(psoup_template_fill(NULL, question, NULL, n ? wishes : NULL, &text, &error), &error);
    demo_tokens tokens = demo_encode(run, text);
    psoup_text_free(text);
    return tokens;
}

demo_tokens demo_join(demo_run *run, demo_tokens prompt, demo_tokens response, int end) {
    size_t n = prompt.n + response.n + (end ? 1 : 0);
    int32_t *ids = demo_take(run, n * sizeof *ids);
    memcpy(ids, prompt.ids, prompt.n * sizeof *ids);
    memcpy(ids + prompt.n, response.ids, response.n * sizeof *ids);
    if (end)
        ids[n - 1] = run->end;
    return (demo_tokens){ids, n};
}

float *demo_mix(demo_run *run, const char *const *adapters, size_t n) {
    float *mix = demo_take(run, 64 * sizeof *mix); /* more than there ever are adapters */
    for (size_t i = 0; i < n; i++) {
        int32_t index = psoup_model_find_adapter(run->model, adapters[i]);
        if (index < 0 || index >= 64) {
            fprintf(stderr, "\npsoup-demo: no adapter '%s'\n", adapters[i]);
            exit(1);
        }
        mix[index] = 1.0f / (float)n;
    }
    return mix;
}

static demo_response read_answer(demo_run *run, psoup_completion c) {
    psoup_error error;
    char text[8 * WORLD_TEXT];
    size_t length;
    int32_t *ids = demo_take(run, (c.n + 1) * sizeof *ids);
    memcpy(ids, c.tokens, c.n * sizeof *ids);
    must(psoup_tokenizer_decode(run->tokenizer, ids, c.n, 1, text, sizeof text - 1, &length, &error),
         &error);
    length = length < sizeof text ? length : sizeof text - 1;
    char *kept = demo_take(run, length + 1);
    memcpy(kept, text, length);
    return (demo_response){{ids, c.n}, kept};
}

static psoup_sampling sampling_of(uint64_t seed) {
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    sampling.max_new_tokens = 48;
    sampling.seed = seed;
    return sampling;
}

static psoup_session_options session_options(void) {
    psoup_session_options session = PSOUP_SESSION_OPTIONS_INIT;
    session.max_sequences = 64;
    session.max_tokens = 96;
    return session;
}

demo_response *demo_generate(demo_run *run, const demo_tokens *prompts, const float *const *mixes,
                             size_t n, uint64_t seed) {
    psoup_error error;
    psoup_generation *generation;
    psoup_prompt *rows = demo_take(run, n * sizeof *rows);
    demo_response *responses = demo_take(run, n * sizeof *responses);
    psoup_sampling sampling = sampling_of(seed);
    psoup_session_options session = session_options();
    for (size_t i = 0; i < n; i++)
        rows[i] = (psoup_prompt){.tokens = prompts[i].ids,
                                 .n = prompts[i].n,
                                 .sequence = i,
                                 .mix = mixes ? mixes[i] : NULL};
    must(psoup_generate(run->model, rows, n, &sampling, &session, NULL, NULL, &generation, &error),
         &error);
    for (size_t i = 0; i < n; i++)
        responses[i] = read_answer(run, *psoup_generation_get(generation, i));
    psoup_generation_free(generation);
    return responses;
}

demo_response *demo_best(demo_run *run, const demo_tokens *prompts, size_t n, psoup_reward *reward,
                         int of, uint64_t seed) {
    psoup_error error;
    psoup_generation *generation;
    psoup_prompt *rows = demo_take(run, n * sizeof *rows);
    demo_response *responses = demo_take(run, n * sizeof *responses);
    int32_t *chosen = demo_take(run, n * sizeof *chosen);
    psoup_sampling sampling = sampling_of(seed);
    psoup_session_options session = session_options();
    psoup_best_options options = PSOUP_BEST_OPTIONS_INIT;
    options.n = of;
    options.rewards = &reward;
    options.n_rewards = 1;
    for (size_t i = 0; i < n; i++)
        rows[i] = (psoup_prompt){.tokens = prompts[i].ids, .n = prompts[i].n, .sequence = i};
    must(psoup_best_of_n(run->model, rows, n, &sampling, &session, &options, &generation, chosen,
                         NULL, &error),
         &error);
    for (size_t i = 0; i < n; i++)
        responses[i] = read_answer(
            run, *psoup_generation_get(generation, i * (size_t)of + (size_t)chosen[i]));
    psoup_generation_free(generation);
    return responses;
}

double demo_divergence(demo_run *run, const demo_tokens *prompts, const demo_response *responses,
                       const float *const *mixes, size_t n) {
    psoup_error error;
    psoup_row *rows = demo_take(run, n * sizeof *rows);
    size_t total = 0, tokens = 0, at = 0;
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        demo_tokens all = demo_join(run, prompts[i], responses[i].tokens, 0);
        rows[i] = (psoup_row){all.ids, all.n, NULL};
        total += all.n;
    }
    float *base = demo_take(run, 2 * total * sizeof *base), *policy = base + total;
    must(psoup_model_logprobs(run->model, rows, n, base, &error), &error);
    for (size_t i = 0; i < n; i++)
        rows[i].mix = mixes[i];
    must(psoup_model_logprobs(run->model, rows, n, policy, &error), &error);
    for (size_t i = 0; i < n; at += rows[i++].n - 1)
        for (size_t t = prompts[i].n - 1; t < rows[i].n - 1; t++, tokens++)
            sum += (double)policy[at + t] - base[at + t];
    return sum / (double)tokens;
}

/* ---- preferences and the judge ------------------------------------------------------------------
 */

psoup_preferences *demo_catalogue(demo_run *run, int from, int to) {
    psoup_error error;
    psoup_preferences *preferences;
    psoup_json *list = psoup_json_new_array();
    char path[1024];
    for (int k = from; k < to; k++) {
        psoup_json *one = psoup_json_new_object();
        psoup_json_set(one, "symbol", psoup_json_new_string(world_preferences[k].symbol));
        psoup_json_set(one, "dimension", psoup_json_new_string(world_preferences[k].dimension));
        psoup_json_set(one, "prompt", psoup_json_new_string(world_preferences[k].prompt));
        psoup_json_set(one, "opposite", psoup_json_new_string(world_preferences[k].opposite));
        psoup_json_append(list, one);
    }
    snprintf(path, sizeof path, "%s/preferences-%d-%d.json", run->directory, from, to);
    must(psoup_json_write(run->context, path, list, &error), &error);
    must(psoup_preferences_load(run->context, path, &preferences, &error), &error);
    psoup_json_free(list);
    return preferences;
}

int demo_answer(void *user, const psoup_question *questions, size_t n, int32_t *verdicts) {
    demo_noise *noise = user;
    for (size_t i = 0; i < n; i++) {
        int preference = -1;
        world_prompt prompt;
        if (world_understand(questions[i].prompt, &prompt))
            return -1;
        for (int k = 0; questions[i].preference && k < WORLD_PREFERENCES; k++)
            if (!strcmp(questions[i].preference->symbol, world_preferences[k].symbol))
                preference = k;
        int verdict = judge_compare(&prompt, preference, questions[i].a, questions[i].b);
        int turned = noise && world_uniform(&noise->random) < noise->share;
        verdicts[i] = turned ? -verdict : verdict;
    }
    return 0;
}
