/* Judges, as callbacks and as other programs, and the feedback that is made with them. */
#include "base_case.h"
#include "eval/eval.h"

static char judge_path[512]; /* tests/judge.c, built beside this program */

/* ---- judges ------------------------------------------------------------------------------------ */

/* user: an array of what to answer; 99 fails. */
static int scripted(void *user, const psoup_question *questions, size_t n, int32_t *verdicts) {
    const int32_t *script = user;
    for (size_t i = 0; i < n; i++) {
        ck_assert_int_eq(verdicts[i], PSOUP_UNPARSED);
        verdicts[i] = script[questions[i].id];
        if (script[questions[i].id] == 99)
            return 1;
    }
    return 0;
}

START_TEST(judge_callback) {
    int32_t script[] = {PSOUP_B_WINS, PSOUP_A_WINS, PSOUP_TIE, PSOUP_UNPARSED, 3, -2}, verdicts[6];
    const int32_t expected[] = {-1, 1, 0, 2, 2, 2};
    psoup_question questions[6];
    for (int i = 0; i < 6; i++)
        questions[i] = (psoup_question){.id = i, .prompt = "p", .a = "a", .b = "b"};
    psoup_judge *judge;
    OK(psoup_judge_create(context, scripted, script, &judge, &error));
    OK(psoup_judge_ask(judge, questions, 6, verdicts, &error));
    for (int i = 0; i < 6; i++)
        ck_assert_int_eq(verdicts[i], expected[i]);
    OK(psoup_judge_ask(judge, NULL, 0, NULL, &error));
    script[3] = 99;
    FAILS(psoup_judge_ask(judge, questions, 6, verdicts, &error), PSOUP_ERROR_CANCELLED, "judge");
    psoup_judge_free(judge);
    FAILS(psoup_judge_create(context, NULL, NULL, &judge, &error), PSOUP_ERROR_ARGUMENT, "NULL");
    ck_assert_ptr_null(judge);
    psoup_judge_free(NULL);
}
END_TEST

static psoup_judge *start(const char *how) {
    psoup_judge *judge;
    OK(psoup_judge_command(context, (const char *[]){judge_path, how, NULL}, &judge, &error));
    return judge;
}

enum { ASKED = 12 };
static const psoup_question *ask_about(const char *a, const char *b) {
    static const psoup_preference tone = {"P9A", "tone", "Generate \"it\".", "Choose \"it\".", NULL};
    static psoup_question questions[ASKED];
    for (int i = 0; i < ASKED; i++)
        questions[i] = (psoup_question){
            .id = 7, .prompt = "Why\n\"é\"?", .preference = i % 2 ? &tone : NULL, .a = a, .b = b};
    return questions;
}

static void check_answers(psoup_judge *judge, const psoup_question *questions,
                          const int32_t expected[2]) {
    int32_t verdicts[ASKED];
    OK(psoup_judge_ask(judge, questions, ASKED, verdicts, &error));
    for (int i = 0; i < ASKED; i++)
        ck_assert_msg(verdicts[i] == expected[i % 2], "question %d: %d", i, verdicts[i]);
}

START_TEST(judge_command) {
    psoup_judge *judge = start("good");
    for (int twice = 0; twice < 2; twice++) {
        check_answers(judge, ask_about("a good one", "bad"), (int32_t[]){1, 1});
        check_answers(judge, ask_about("bad", "\na \"good\" one"), (int32_t[]){-1, -1});
        check_answers(judge, ask_about("", "é"), (int32_t[]){0, 0});
    }
    int32_t verdict;
    psoup_question broken = {.prompt = "p", .a = "\xff", .b = ""};
    FAILS(psoup_judge_ask(judge, &broken, 1, &verdict, &error), PSOUP_ERROR_ARGUMENT, "UTF-8");
    psoup_question early = {.prompt = "p", .a = "a", .b = "b", .reserved = {0, 1}};
    FAILS(psoup_judge_ask(judge, &early, 1, &verdict, &error), PSOUP_ERROR_ARGUMENT, "questions[0].reserved is not 0");
    check_answers(judge, ask_about("a good one", "bad"), (int32_t[]){1, 1});
    psoup_judge_free(judge);

    judge = start("pairs"); /* ids run on: the third ask starts at 24 */
    for (int times = 0; times < 3; times++)
        check_answers(judge, ask_about("a", "b"), (int32_t[]){-1, 1});
    psoup_judge_free(judge);
}
END_TEST

START_TEST(judge_misunderstood) {
    int32_t verdicts[ASKED];
    psoup_judge *judge = start("noise");
    for (int twice = 0; twice < 2; twice++) {
        OK(psoup_judge_ask(judge, ask_about("a", "b"), ASKED, verdicts, &error));
        for (int i = 0; i < ASKED; i++)
            ck_assert_int_eq(verdicts[i], i % 6 == 5 ? PSOUP_TIE : PSOUP_UNPARSED);
    }
    psoup_judge_free(judge);
    /* A line too many takes the place of the last answer, which comes late: it must not be read as
     * an answer to the next ask. */
    judge = start("banner");
    for (int times = 0; times < 3; times++) {
        OK(psoup_judge_ask(judge, ask_about("a", "b"), ASKED, verdicts, &error));
        for (int i = 0; i < ASKED; i++)
            if (times == 0 && i == ASKED - 1) /* "b", where it was in time after all */
                ck_assert(verdicts[i] == PSOUP_UNPARSED || verdicts[i] == PSOUP_B_WINS);
            else
                ck_assert_int_eq(verdicts[i], PSOUP_A_WINS);
    }
    psoup_judge_free(judge);
}
END_TEST

START_TEST(judge_fails) {
    int32_t verdicts[ASKED];
    psoup_judge *judge = start("dies");
    FAILS(psoup_judge_ask(judge, ask_about("a", "b"), ASKED, verdicts, &error), PSOUP_ERROR_IO,
          "after 2 of 12 answers");
    CONTAINS(judge_path);
    FAILS(psoup_judge_ask(judge, ask_about("a", "b"), ASKED, verdicts, &error), PSOUP_ERROR_IO,
          "after 0 of 12 answers");
    psoup_judge_free(judge);
    judge = start("deaf");
    char *large = calloc(1 << 20, 1); /* more than the pipe takes before it hears of the end */
    memset(large, 'x', (1 << 20) - 1);
    FAILS(psoup_judge_ask(judge, ask_about(large, "b"), ASKED, verdicts, &error), PSOUP_ERROR_IO,
          "it stopped reading after 0 of 12 answers");
    free(large);
    psoup_judge_free(judge); /* which ends it: it would sleep for a minute */
    judge = start("silent");
    FAILS(psoup_judge_set_patience(judge, -1, &error), PSOUP_ERROR_ARGUMENT, "-1 seconds");
    OK(psoup_judge_set_patience(judge, 0.3, &error));
    FAILS(psoup_judge_ask(judge, ask_about("a", "b"), ASKED, verdicts, &error), PSOUP_ERROR_IO,
          "silent for 0.3 seconds after 2 of 12 answers");
    psoup_judge_free(judge);
    judge = start("endless");
    FAILS(psoup_judge_ask(judge, ask_about("a", "b"), ASKED, verdicts, &error), PSOUP_ERROR_FORMAT,
          "a line of over 1048576 bytes");
    psoup_judge_free(judge);
    judge = start("unended");
    OK(psoup_judge_ask(judge, ask_about("a", "b"), 1, verdicts, &error));
    ck_assert_int_eq(verdicts[0], PSOUP_B_WINS);
    psoup_judge_free(judge);
    FAILS(psoup_judge_command(context, (const char *[]){"/nowhere/judge", NULL}, &judge, &error),
          PSOUP_ERROR_IO, "/nowhere/judge: cannot start it: No such file");
    ck_assert_ptr_null(judge);
    FAILS(psoup_judge_command(context, (const char *[]){NULL}, &judge, &error),
          PSOUP_ERROR_ARGUMENT, "empty");
    FAILS(psoup_judge_command(context, NULL, &judge, &error), PSOUP_ERROR_ARGUMENT, "empty");
}
END_TEST

/* Far more than the pipes hold in each direction. */
START_TEST(judge_many) {
    enum { MANY = 20000 };
    char *prompt = calloc(401, 1);
    psoup_question *questions = calloc(MANY, sizeof *questions);
    int32_t *verdicts = calloc(MANY, sizeof *verdicts);
    memset(prompt, 'x', 400);
    for (int i = 0; i < MANY; i++)
        questions[i] = (psoup_question){
            .prompt = prompt, .a = i % 3 == 0 ? "good" : "bad", .b = i % 3 == 1 ? "good" : "bad"};
    psoup_judge *judge = start("good");
    OK(psoup_judge_ask(judge, questions, MANY, verdicts, &error));
    for (int i = 0; i < MANY; i++)
        ck_assert_int_eq(verdicts[i], i % 3 == 0   ? PSOUP_A_WINS
                                      : i % 3 == 1 ? PSOUP_B_WINS
                                                   : PSOUP_TIE);
    psoup_judge_free(judge);
    free(prompt);
    free(questions);
    free(verdicts);
}
END_TEST

/* Prefers "good", for helpfulness "kind", else the first; does not understand P2. */
static int biased(void *user, const psoup_question *questions, size_t n, int32_t *verdicts) {
    *(size_t *)user += n;
    for (size_t i = 0; i < n; i++) {
        const psoup_question *q = &questions[i];
        const char *word = q->preference ? "good" : "kind";
        int a = strstr(q->a, word) != NULL, b = strstr(q->b, word) != NULL;
        ck_assert_str_eq(q->prompt, strchr(q->a, '2') || strchr(q->b, '2') ? "second" : "first");
        verdicts[i] = a == b ? PSOUP_A_WINS : a ? PSOUP_A_WINS : PSOUP_B_WINS;
        if (q->preference && !strncmp(q->preference->symbol, "P2", 2))
            verdicts[i] = PSOUP_UNPARSED;
    }
    return 0;
}

START_TEST(duels_judged) {
    const int32_t criteria[] = {0, 2, 5};
    const psoup_duel duels[] = {{.preferences = criteria, .n = 3}, {.n = 0},
                                {.preferences = criteria, .n = 1}};
    const char *const prompts[] = {"first", "second", "first"};
    const char *const a[] = {"bad", "kind 2", "same"}, *const b[] = {"good", "bad 2", "same"};
    psoup_preferences *p;
    psoup_judge *judge;
    size_t asked = 0;
    int32_t verdicts[4], helpful[3];
    OK(psoup_preferences_default(context, 0, &p, &error));
    OK(psoup_judge_create(context, biased, &asked, &judge, &error));
    OK(psoup_judge_duels(judge, p, prompts, a, b, duels, 3, 0, verdicts, helpful, &error));
    ck_assert_uint_eq(asked, 7);
    ck_assert(verdicts[0] == -1 && verdicts[1] == 2 && verdicts[2] == -1 && verdicts[3] == 1);
    ck_assert(helpful[0] == 1 && helpful[1] == 1 && helpful[2] == 1);
    /* asked both ways, the first place is worth nothing */
    OK(psoup_judge_duels(judge, p, prompts, a, b, duels, 3, 1, verdicts, helpful, &error));
    ck_assert_uint_eq(asked, 7 + 14);
    ck_assert(verdicts[0] == -1 && verdicts[1] == 2 && verdicts[2] == -1 && verdicts[3] == 0);
    ck_assert(helpful[0] == 0 && helpful[1] == 1 && helpful[2] == 0);
    OK(psoup_judge_duels(judge, p, prompts, b, a, duels, 3, 1, verdicts, NULL, &error));
    ck_assert_uint_eq(asked, 7 + 14 + 8);
    ck_assert(verdicts[0] == 1 && verdicts[1] == 2 && verdicts[2] == 1 && verdicts[3] == 0);
    const int32_t unknown = 6;
    const psoup_duel wrong = {.preferences = &unknown, .n = 1};
    FAILS(psoup_judge_duels(judge, p, prompts, a, b, &wrong, 1, 1, verdicts, NULL, &error),
          PSOUP_ERROR_ARGUMENT, "preference 6, expected 0 to 5");
    const psoup_duel early = {.preferences = &unknown, .reserved = {0, 1}};
    FAILS(psoup_judge_duels(judge, p, prompts, a, b, &early, 1, 1, verdicts, NULL, &error), PSOUP_ERROR_ARGUMENT,
          "duels[0].reserved is not 0");
    psoup_judge_free(judge);
    psoup_preferences_free(p);
}
END_TEST

/* ---- feedback ---------------------------------------------------------------------------------- */

static psoup_model *model;
static psoup_tokenizer *tokenizer;
static psoup_preferences *preferences;

static void set_up_feedback(void) {
    set_up();
    const char *const texts[] = {"Why does it rain? Name a colour. Generate a response in a manner.",
                                 "friendly, witty, funny, and humorous, like a close friend."};
    const char *const special[] = {"</s>"};
    OK(psoup_tokenizer_train(context, texts, 2, 270, special, 1, NULL, &tokenizer, &error));
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    config.vocab_size = psoup_tokenizer_vocab_size(tokenizer);
    config.hidden_size = config.intermediate_size = 16;
    config.num_hidden_layers = 1;
    config.num_attention_heads = 2;
    config.max_position_embeddings = 256;
    config.eos_token_id = psoup_tokenizer_token_id(tokenizer, "</s>");
    config.initializer_range = 0.6f;
    OK(psoup_model_create(context, &config, 5, &model, &error));
    OK(psoup_preferences_default(context, 0, &preferences, &error));
}

static void tear_down_feedback(void) {
    psoup_preferences_free(preferences);
    psoup_model_free(model);
    psoup_tokenizer_free(tokenizer);
    tear_down();
}

enum { INSTRUCTIONS = 3, ROWS = INSTRUCTIONS * 6 * 4 };
static const psoup_instruction instructions[INSTRUCTIONS] = {
    {"Why does it rain?", NULL, 11}, {"Name a colour.", "Red is taken.", 12}, {"Why?", "", 13}};

/* Answers by turns as `script` says, and keeps what it was shown. */
typedef struct memory {
    const int32_t *script; /* repeated; ends with 9 */
    size_t n;
    psoup_preference preference[INSTRUCTIONS * 6];
    char *prompt[INSTRUCTIONS * 6], *a[INSTRUCTIONS * 6], *b[INSTRUCTIONS * 6];
} memory;

static int remembering(void *user, const psoup_question *questions, size_t n, int32_t *verdicts) {
    memory *m = user;
    size_t length = 0;
    while (m->script[length] != 9)
        length++;
    for (size_t i = 0; i < n; i++, m->n++) {
        if (m->script[m->n % length] == 99)
            return 1;
        verdicts[i] = m->script[m->n % length];
        m->preference[m->n] = *questions[i].preference;
        m->prompt[m->n] = strdup(questions[i].prompt);
        m->a[m->n] = strdup(questions[i].a);
        m->b[m->n] = strdup(questions[i].b);
    }
    return 0;
}

static void forget(memory *m) {
    for (size_t i = 0; i < m->n; i++) {
        free(m->prompt[i]);
        free(m->a[i]);
        free(m->b[i]);
    }
    m->n = 0;
}

static psoup_status collect(memory *m, const psoup_feedback_options *options, const char *path,
                            psoup_feedback_counts *counts) {
    psoup_judge *judge;
    OK(psoup_judge_create(context, remembering, m, &judge, &error));
    psoup_status status = psoup_feedback(model, tokenizer, preferences, instructions, INSTRUCTIONS,
                                         judge, options, path, counts, &error);
    psoup_judge_free(judge);
    return status;
}

static size_t read_rows(const char *path, psoup_json **rows) {
    psoup_jsonl_reader *reader;
    size_t n = 0;
    OK(psoup_jsonl_open(context, path, &reader, &error));
    do {
        OK(psoup_jsonl_next(reader, &rows[n], &error));
    } while (rows[n] && ++n <= ROWS);
    psoup_jsonl_reader_free(reader);
    return n;
}

static const char *text_of(const psoup_json *row, const char *key) {
    const char *text = psoup_json_string(psoup_json_get(row, key), NULL);
    ck_assert_msg(text != NULL, "no \"%s\"", key);
    return text;
}

/* Four rows of every pair, in order; a tie and an answer not understood drop the first. */
START_TEST(feedback_rows) {
    const int32_t script[] = {PSOUP_A_WINS, PSOUP_TIE, PSOUP_B_WINS, PSOUP_UNPARSED, 9};
    static const char *const kinds[] = {"positive-positive", "positive-neutral",
                                        "positive-negative", "neutral-negative"};
    memory m = {.script = script};
    psoup_json *rows[ROWS + 1];
    psoup_feedback_counts counts = {.size = sizeof counts};
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_feedback_options options = PSOUP_FEEDBACK_OPTIONS_INIT;
    sampling.max_new_tokens = 12;
    options.sampling = &sampling;
    OK(collect(&m, &options, at("f.jsonl.zst"), &counts));
    size_t n = read_rows(at("f.jsonl.zst"), rows), row = 0;
    bool coins[2][2] = {0};
    ck_assert_uint_eq(m.n, INSTRUCTIONS * 6);
    ck_assert_uint_eq(counts.ties, 5); /* 18 pairs: verdicts 1 0 −1 2 1 0 … */
    ck_assert_uint_eq(counts.unparsed, 4);
    ck_assert_uint_eq(counts.written, n);
    ck_assert_uint_eq(n, ROWS - 9);
    for (size_t pair = 0; pair < m.n; pair++) {
        const psoup_instruction *instruction = &instructions[pair / 6];
        const psoup_preference *preference = psoup_preferences_get(preferences, pair % 6);
        char *user_input, question[256];
        const char *input = instruction->input ? instruction->input : "";
        snprintf(question, sizeof question, "%s%s%s", instruction->instruction, *input ? " " : "",
                 input);
        ck_assert_str_eq(m.prompt[pair], question);
        ck_assert_str_eq(m.preference[pair].symbol, preference->symbol);
        OK(psoup_template_fill(NULL, instruction->instruction, instruction->input,
                               preference->prompt, &user_input, &error));
        const char *neutral = NULL, *negative = NULL;
        for (int kind = script[pair % 4] == PSOUP_TIE || script[pair % 4] == PSOUP_UNPARSED;
             kind < 4; kind++, row++) {
            const char *better = text_of(rows[row], "completion_a");
            const char *worse = text_of(rows[row], "completion_b");
            ck_assert_int_eq(psoup_json_integer(psoup_json_get(rows[row], "id"), 0),
                             instruction->id);
            ck_assert_str_eq(text_of(rows[row], "kind"), kinds[kind]);
            ck_assert_str_eq(text_of(rows[row], "preference"), preference->symbol);
            ck_assert_str_eq(text_of(rows[row], "instruction"), instruction->instruction);
            ck_assert_str_eq(text_of(rows[row], "user_input"), user_input);
            ck_assert_uint_eq(psoup_json_size(rows[row]), 7);
            if (kind == 0) {
                bool a = script[pair % 4] == PSOUP_A_WINS;
                ck_assert_str_eq(better, a ? m.a[pair] : m.b[pair]);
                ck_assert_str_eq(worse, a ? m.b[pair] : m.a[pair]);
            } else if (kind < 3) {
                bool is_b = strcmp(better, m.a[pair]) != 0;
                ck_assert_str_eq(better, is_b ? m.b[pair] : m.a[pair]);
                coins[kind - 1][is_b] = true;
                *(kind == 1 ? &neutral : &negative) = worse;
            } else {
                ck_assert_str_eq(better, neutral);
                ck_assert_str_eq(worse, negative);
            }
        }
        ck_assert_str_ne(m.a[pair], m.b[pair]);
        psoup_text_free(user_input);
    }
    ck_assert(coins[0][0] && coins[0][1] && coins[1][0] && coins[1][1]);
    for (size_t i = 0; i < n; i++)
        psoup_json_free(rows[i]);
    forget(&m);
}
END_TEST

/* Without chance: a preference's negative is its opposite's positive, and all neutrals are one. */
START_TEST(feedback_prompts) {
    const int32_t script[] = {PSOUP_A_WINS, 9};
    memory m = {.script = script};
    psoup_json *rows[ROWS + 1];
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_feedback_options options = PSOUP_FEEDBACK_OPTIONS_INIT;
    sampling.max_new_tokens = 8;
    sampling.temperature = 0;
    options.sampling = &sampling;
    OK(collect(&m, &options, at("f.jsonl"), NULL));
    ck_assert_uint_eq(read_rows(at("f.jsonl"), rows), ROWS);
    size_t different = 0;
    for (size_t pair = 0; pair < m.n; pair++) {
        psoup_json **four = rows + 4 * pair, **opposite = rows + 4 * (pair ^ 1);
        psoup_json **first = rows + 4 * (pair / 6 * 6);
        const char *positive = text_of(four[0], "completion_a");
        ck_assert_str_eq(positive, text_of(four[0], "completion_b"));
        ck_assert_str_eq(text_of(four[2], "completion_b"), text_of(opposite[0], "completion_a"));
        ck_assert_str_eq(text_of(four[1], "completion_b"), text_of(first[1], "completion_b"));
        different += strcmp(positive, text_of(four[2], "completion_b")) != 0;
        different += strcmp(positive, text_of(four[1], "completion_b")) != 0;
    }
    ck_assert_uint_ge(different, m.n); /* or the above would say nothing */
    for (size_t i = 0; i < ROWS; i++)
        psoup_json_free(rows[i]);
    forget(&m);
}
END_TEST

START_TEST(feedback_seeds) {
    const int32_t script[] = {PSOUP_B_WINS, 9};
    memory m = {.script = script};
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_feedback_options options = PSOUP_FEEDBACK_OPTIONS_INIT;
    char *text[3], *response[3];
    size_t length;
    sampling.max_new_tokens = 6;
    options.sampling = &sampling;
    for (int i = 0; i < 3; i++) { /* the same, by other batches too; then another seed */
        options.max_sequences = i == 1 ? 5 : 0;
        options.seed = i == 2 ? 1 : 8;
        sampling.seed = (uint64_t)i; /* not read */
        OK(collect(&m, &options, at("f.jsonl"), NULL));
        text[i] = get(at("f.jsonl"), &length);
        response[i] = strdup(m.a[0]);
        forget(&m);
    }
    ck_assert_str_eq(text[0], text[1]);
    ck_assert_str_ne(response[0], response[2]);
    for (int i = 0; i < 3; i++) {
        psoup__free(context, text[i]);
        free(response[i]);
    }
}
END_TEST

static int stop(void *user, const char *label, int64_t done, int64_t total) {
    ck_assert_str_eq(label, "feedback");
    ck_assert(done > 0 && done <= total && total == INSTRUCTIONS * 6);
    return ++*(int *)user;
}

START_TEST(feedback_fails) {
    const int32_t script[] = {PSOUP_A_WINS, 9}, failing[] = {1, 1, 1, 1, 99, 9};
    memory m = {.script = script};
    int calls = 0;
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_feedback_options options = PSOUP_FEEDBACK_OPTIONS_INIT;
    sampling.max_new_tokens = 3;
    options.sampling = &sampling;
    options.progress = stop;
    options.user = &calls;
    FAILS(collect(&m, &options, at("f.jsonl"), NULL), PSOUP_ERROR_CANCELLED, "stopped");
    ck_assert_int_eq(calls, 1);
    forget(&m);
    options.progress = NULL;
    m.script = failing;
    FAILS(collect(&m, &options, at("f.jsonl"), NULL), PSOUP_ERROR_CANCELLED, "judge");
    forget(&m);
    m.script = script;
    sampling.temperature = -1;
    FAILS(collect(&m, &options, at("f.jsonl"), NULL), PSOUP_ERROR_ARGUMENT, "temperature");
    sampling.temperature = 1;
    options.prompt_template = "nothing";
    FAILS(collect(&m, &options, at("f.jsonl"), NULL), PSOUP_ERROR_ARGUMENT, "template");
    options.prompt_template = NULL;
    options.mix_method = 9;
    FAILS(collect(&m, &options, at("f.jsonl"), NULL), PSOUP_ERROR_ARGUMENT, "method");
    options.mix_method = PSOUP_MIX_LOGITS;
    options.reserved = 1;
    FAILS(collect(&m, &options, at("f.jsonl"), NULL), PSOUP_ERROR_ARGUMENT, "reserved is 1");
    options.reserved = 0;
    FAILS(collect(&m, &options, at("none/f.jsonl"), NULL), PSOUP_ERROR_IO, "none/f.jsonl");
    psoup_feedback_counts no_size = {0};
    FAILS(collect(&m, &options, at("f.jsonl"), &no_size), PSOUP_ERROR_ARGUMENT, "size is 0");
    put_text(at("p.json"), "[{\"symbol\": \"A\", \"dimension\": \"d\", \"prompt\": \"p\"}]");
    psoup_preferences_free(preferences);
    OK(psoup_preferences_load(context, at("p.json"), &preferences, &error));
    FAILS(collect(&m, &options, at("f.jsonl"), NULL), PSOUP_ERROR_ARGUMENT,
          "\"A\" has no opposite");
    ck_assert_int_eq(names(false), 1); /* p.json: no comparisons, no temporary file */
    forget(&m);
}
END_TEST

int main(int argc, char **argv) {
    const char *slash = argc > 0 ? strrchr(argv[0], '/') : NULL;
    snprintf(judge_path, sizeof judge_path, "%.*sjudge", slash ? (int)(slash - argv[0] + 1) : 2,
             slash ? argv[0] : "./");
    Suite *suite = suite_create("judges and feedback");
    TCase *c = tcase_create("judges"), *f = tcase_create("feedback");
    tcase_set_timeout(c, 60);
    tcase_add_checked_fixture(c, set_up, tear_down);
    tcase_add_test(c, judge_callback);
    tcase_add_test(c, judge_command);
    tcase_add_test(c, judge_misunderstood);
    tcase_add_test(c, judge_fails);
    tcase_add_test(c, judge_many);
    tcase_add_test(c, duels_judged);
    suite_add_tcase(suite, c);
    tcase_set_timeout(f, 60);
    tcase_add_checked_fixture(f, set_up_feedback, tear_down_feedback);
    tcase_add_test(f, feedback_rows);
    tcase_add_test(f, feedback_prompts);
    tcase_add_test(f, feedback_seeds);
    tcase_add_test(f, feedback_fails);
    suite_add_tcase(suite, f);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
