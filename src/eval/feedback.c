/* Feedback: candidates sampled from a generator, judged, and written as comparisons
 * (Jang et al. 2023, section 2.1 and figure 1).
 */
#include "eval/eval.h"
#include "text/text.h"

#include <stdlib.h>
#include <string.h>

enum { POSITIVE, OTHER_POSITIVE, NEUTRAL, NEGATIVE, CANDIDATES };
enum { PAIRS_AT_ONCE = 64 }; /* (instruction, preference) pairs generated and judged together */

/* Philox sequences of a pair: its four candidates, then its coin. */
enum { STREAMS = CANDIDATES + 1 };

/* One instruction under one preference. */
typedef struct pair {
    const psoup_instruction *instruction;
    const psoup_preference *preference;
    char *user_input;             /* the template with the preference prompt */
    char *question;               /* what the judge reads: the instruction and its input */
    char *response[CANDIDATES];
    uint64_t number;
} pair;

typedef struct run {
    psoup_context *context;
    psoup_model *generator;
    const psoup_tokenizer *tokenizer;
    const psoup_preferences *preferences;
    psoup_judge *judge;
    psoup_feedback_options options;
    psoup_jsonl_writer *writer;
    psoup_feedback_counts counts;
} run;

static psoup_status encode(run *r, const char *text, int32_t **ids, size_t *n, psoup_error *error) {
    size_t length = strlen(text), capacity = 4 * length + 8;
    *ids = psoup__alloc(r->context, capacity, sizeof **ids, error);
    if (!*ids)
        return PSOUP_ERROR_MEMORY;
    return psoup_tokenizer_encode(r->tokenizer, text, length, PSOUP_ADD_SPECIAL, *ids, NULL,
                                  capacity, n, error);
}

/* The text of a completion. Where it is not UTF-8 (it may be cut inside a character), and for a NUL,
 * it holds U+FFFD. */
static psoup_status decode(run *r, psoup_completion completion, char **out, psoup_error *error) {
    psoup__buffer text = {.context = r->context};
    size_t length = 0;
    psoup_status status = psoup_tokenizer_decode(r->tokenizer, completion.tokens, completion.n, 1,
                                                 NULL, 0, &length, error);
    if (status != PSOUP_OK)
        return status;
    char *raw = psoup__alloc(r->context, length + 1, 1, error);
    PSOUP__TRY(raw ? PSOUP_OK : PSOUP_ERROR_MEMORY);
    PSOUP__TRY(psoup_tokenizer_decode(r->tokenizer, completion.tokens, completion.n, 1, raw, length,
                                      &length, error));
    psoup__buffer_append(&text, "", 0);
    for (size_t at = 0; at < length;) {
        uint32_t code;
        char character[4];
        at += psoup__utf8_next(raw + at, length - at, &code);
        psoup__buffer_append(&text, character, psoup__utf8_put(code ? code : 0xFFFD, character));
    }
    if (text.failed) {
        psoup__buffer_free(&text);
        status = psoup__out_of_memory(error, length);
    }
    *out = text.data;
fail:
    psoup__free(r->context, raw);
    return status;
}

/* The prompt of one candidate: with the preference, without, or with the opposite one. */
static psoup_status candidate_text(run *r, const pair *p, int candidate, char **out,
                                   psoup_error *error) {
    const char *prompt = p->preference->prompt;
    if (candidate == NEUTRAL)
        prompt = NULL;
    if (candidate == NEGATIVE) {
        int32_t other = psoup_preferences_find(r->preferences, p->preference->opposite);
        prompt = psoup_preferences_get(r->preferences, (size_t)other)->prompt;
    }
    return psoup_template_fill(r->options.prompt_template, p->instruction->instruction,
                               p->instruction->input, prompt, out, error);
}

static psoup_status generate(run *r, pair *pairs, size_t n, psoup_error *error) {
    size_t count = n * CANDIDATES;
    psoup_generation *generation = NULL;
    psoup_status status;
    psoup_prompt *prompts = psoup__alloc(r->context, count, sizeof *prompts, error);
    int32_t **ids = psoup__alloc(r->context, count, sizeof *ids, error);
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    if (!prompts || !ids) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    PSOUP__TRY(psoup__options(&sampling, sizeof sampling, r->options.sampling, "sampling", error));
    sampling.seed = r->options.seed;
    for (size_t i = 0; i < count; i++) {
        pair *p = &pairs[i / CANDIDATES];
        int candidate = (int)(i % CANDIDATES);
        char *text = NULL;
        PSOUP__TRY(candidate_text(r, p, candidate, &text, error));
        status = encode(r, text, &ids[i], &prompts[i].n, error);
        if (status == PSOUP_OK && candidate == POSITIVE) {
            p->user_input = psoup__strdup(r->context, text, error);
            status = p->user_input ? psoup_template_fill("{instruction} {input}",
                                                         p->instruction->instruction,
                                                         p->instruction->input, NULL,
                                                         &p->question, error)
                                   : PSOUP_ERROR_MEMORY;
        }
        psoup_text_free(text);
        PSOUP__TRY(status);
        prompts[i].tokens = ids[i];
        prompts[i].mix = r->options.mix;
        prompts[i].mix_method = r->options.mix_method;
        prompts[i].sequence = p->number * STREAMS + (uint64_t)candidate;
    }
    psoup_session_options session = PSOUP_SESSION_OPTIONS_INIT;
    session.max_sequences = r->options.max_sequences ? r->options.max_sequences : 64;
    PSOUP__TRY(psoup_generate(r->generator, prompts, count, &sampling, &session, NULL, NULL,
                              &generation, error));
    for (size_t i = 0; i < count; i++) {
        psoup_completion completion = *psoup_generation_get(generation, i);
        pair *p = &pairs[i / CANDIDATES];
        if (completion.finish == PSOUP_FINISH_ERROR)
            PSOUP__TRY(psoup__fail(error, PSOUP_ERROR_STATE,
                                   "feedback: instruction %lld, %s: the generator's logits are not "
                                   "numbers",
                                   (long long)p->instruction->id, p->preference->symbol));
        PSOUP__TRY(decode(r, completion, &p->response[i % CANDIDATES], error));
    }
fail:
    psoup_generation_free(generation);
    for (size_t i = 0; ids && i < count; i++)
        psoup__free(r->context, ids[i]);
    psoup__free(r->context, ids);
    psoup__free(r->context, prompts);
    return status;
}

static psoup_status write_row(run *r, const pair *p, const char *kind, const char *better,
                              const char *worse, psoup_error *error) {
    if (!psoup__is_utf8(p->instruction->instruction) || !psoup__is_utf8(p->user_input))
        return psoup__fail(error, PSOUP_ERROR_FORMAT,
                           "feedback: instruction %lld, %s: the instruction is not UTF-8",
                           (long long)p->instruction->id, p->preference->symbol);
    psoup_json *row = psoup_json_new_object();
    int bad = psoup_json_set(row, "id", psoup_json_new_integer(p->instruction->id));
    bad |= psoup_json_set(row, "preference", psoup_json_new_string(p->preference->symbol));
    bad |= psoup_json_set(row, "kind", psoup_json_new_string(kind));
    bad |= psoup_json_set(row, "instruction", psoup_json_new_string(p->instruction->instruction));
    bad |= psoup_json_set(row, "user_input", psoup_json_new_string(p->user_input));
    bad |= psoup_json_set(row, "completion_a", psoup_json_new_string(better));
    bad |= psoup_json_set(row, "completion_b", psoup_json_new_string(worse));
    psoup_status status = bad ? psoup__out_of_memory(error, 0)
                              : psoup_jsonl_write(r->writer, row, error);
    psoup_json_free(row);
    if (status == PSOUP_OK)
        r->counts.written++;
    return status;
}

static psoup_status judge_and_write(run *r, pair *pairs, size_t n, psoup_error *error) {
    psoup_status status;
    psoup_question *questions = psoup__alloc(r->context, n, sizeof *questions, error);
    int32_t *verdicts = psoup__alloc(r->context, n, sizeof *verdicts, error);
    if (!questions || !verdicts) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    for (size_t i = 0; i < n; i++) {
        const pair *p = &pairs[i];
        questions[i] = (psoup_question){.id = p->instruction->id,
                                        .prompt = p->question,
                                        .preference = p->preference,
                                        .a = p->response[POSITIVE],
                                        .b = p->response[OTHER_POSITIVE]};
    }
    PSOUP__TRY(psoup_judge_ask(r->judge, questions, n, verdicts, error));
    for (size_t i = 0; i < n; i++) {
        const pair *p = &pairs[i];
        char *const *response = p->response;
        uint32_t coin = psoup__philox_word(r->options.seed, p->number * STREAMS + CANDIDATES, 0);
        int meets_neutral = coin >> 31 ? POSITIVE : OTHER_POSITIVE;
        int meets_negative = (coin >> 30) & 1 ? POSITIVE : OTHER_POSITIVE;
        if (verdicts[i] == PSOUP_TIE)
            r->counts.ties++;
        else if (verdicts[i] == PSOUP_UNPARSED)
            r->counts.unparsed++;
        else {
            int better = verdicts[i] == PSOUP_A_WINS ? POSITIVE : OTHER_POSITIVE;
            PSOUP__TRY(write_row(r, p, "positive-positive", response[better],
                                 response[POSITIVE + OTHER_POSITIVE - better], error));
        }
        PSOUP__TRY(write_row(r, p, "positive-neutral", response[meets_neutral], response[NEUTRAL],
                             error));
        PSOUP__TRY(write_row(r, p, "positive-negative", response[meets_negative],
                             response[NEGATIVE], error));
        PSOUP__TRY(
            write_row(r, p, "neutral-negative", response[NEUTRAL], response[NEGATIVE], error));
    }
    status = PSOUP_OK;
fail:
    psoup__free(r->context, questions);
    psoup__free(r->context, verdicts);
    return status;
}

static void pairs_clear(run *r, pair *pairs, size_t n) {
    for (size_t i = 0; i < n; i++) {
        psoup__free(r->context, pairs[i].user_input);
        psoup_text_free(pairs[i].question);
        for (int c = 0; c < CANDIDATES; c++)
            psoup__free(r->context, pairs[i].response[c]);
        pairs[i] = (pair){0};
    }
}

static psoup_status run_all(run *r, const psoup_instruction *instructions, size_t n,
                            psoup_error *error) {
    size_t n_preferences = psoup_preferences_count(r->preferences), total = 0;
    psoup_status status = PSOUP_OK;
    if (!psoup__multiply(n, n_preferences, &total) || total > SIZE_MAX / STREAMS)
        return psoup__out_of_memory(error, n);
    pair *pairs = psoup__alloc(r->context, PAIRS_AT_ONCE, sizeof *pairs, error);
    if (!pairs)
        return PSOUP_ERROR_MEMORY;
    for (size_t done = 0; done < total;) {
        size_t now = total - done < PAIRS_AT_ONCE ? total - done : PAIRS_AT_ONCE;
        for (size_t i = 0; i < now; i++)
            pairs[i] = (pair){
                .instruction = &instructions[(done + i) / n_preferences],
                .preference = psoup_preferences_get(r->preferences, (done + i) % n_preferences),
                .number = done + i};
        status = generate(r, pairs, now, error);
        if (status == PSOUP_OK)
            status = judge_and_write(r, pairs, now, error);
        pairs_clear(r, pairs, now);
        if (status != PSOUP_OK)
            break;
        done += now;
        if (r->options.progress &&
            r->options.progress(r->options.user, "feedback", (int64_t)done, (int64_t)total) != 0) {
            status = psoup__fail(error, PSOUP_ERROR_CANCELLED, "feedback: stopped by its caller");
            break;
        }
    }
    psoup__free(r->context, pairs);
    return status;
}

psoup_status psoup_feedback(psoup_model *generator, const psoup_tokenizer *tokenizer,
                            const psoup_preferences *preferences,
                            const psoup_instruction *instructions, size_t n, psoup_judge *judge,
                            const psoup_feedback_options *options, const char *path,
                            psoup_feedback_counts *counts, psoup_error *error) {
    if (!generator || !tokenizer || !preferences || (n > 0 && !instructions) || !judge || !path)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_feedback: an argument is NULL");
    run r = {.context = psoup_model_context(generator),
             .generator = generator,
             .tokenizer = tokenizer,
             .preferences = preferences,
             .judge = judge,
             .options = PSOUP_FEEDBACK_OPTIONS_INIT,
             .counts = {.size = sizeof(psoup_feedback_counts)}};
    psoup_status status;
    if (counts && counts->size < sizeof(size_t))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_feedback_counts: size is %zu: expected "
                           "sizeof(psoup_feedback_counts)", counts->size);
    PSOUP__TRY(psoup__options(&r.options, sizeof r.options, options, "feedback options", error));
    if (r.options.reserved != 0)
        PSOUP__TRY(psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_feedback_options: reserved is %d: expected 0",
                               (int)r.options.reserved));
    for (size_t i = 0; i < psoup_preferences_count(preferences); i++)
        if (!psoup_preferences_get(preferences, i)->opposite)
            PSOUP__TRY(psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                   "preference \"%s\" has no opposite, which its negatives need",
                                   psoup_preferences_get(preferences, i)->symbol));
    PSOUP__TRY(psoup_jsonl_create(r.context, path, 0, &r.writer, error));
    PSOUP__TRY(run_all(&r, instructions, n, error));
    PSOUP__TRY(psoup_jsonl_close(r.writer, error));
    if (counts) { /* a caller of an older header has a shorter struct */
        size_t size = counts->size;
        memcpy(counts, &r.counts, size < sizeof r.counts ? size : sizeof r.counts);
        counts->size = size;
    }
fail:
    psoup_jsonl_writer_free(r.writer);
    return status;
}
