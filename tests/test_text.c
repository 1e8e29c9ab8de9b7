/* Tokenizers against golden files of the `tokenizers` library (tests/golden/text.py), and on their own. */
#include "text/text.h"

#include <check.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define GOLDEN "tests/golden/text/"

static psoup_context *context;

static void setup(void) {
    psoup_error error = {0};
    ck_assert_msg(psoup_context_create(NULL, &context, &error) == PSOUP_OK, "%s", error.message);
}

static void teardown(void) {
    psoup_context_free(context);
}

static psoup_tokenizer *load(const char *name) {
    char path[256];
    psoup_error error = {0};
    psoup_tokenizer *tokenizer;
    snprintf(path, sizeof path, GOLDEN "%s.json", name);
    ck_assert_msg(psoup_tokenizer_load(context, path, &tokenizer, &error) == PSOUP_OK, "%s",
                  error.message);
    return tokenizer;
}

static psoup_tokenizer *parse(const char *json, psoup_error *error) {
    psoup_tokenizer *tokenizer;
    psoup__tokenizer_parse(context, json, strlen(json), "test.json", &tokenizer, error);
    return tokenizer;
}

static size_t unhex(const char *hex, char **out) {
    size_t n = strlen(hex) / 2;
    *out = malloc(n + 1);
    for (size_t i = 0; i < n; i++) {
        unsigned byte;
        sscanf(hex + 2 * i, "%2x", &byte);
        (*out)[i] = (char)byte;
    }
    (*out)[n] = '\0';
    return n;
}

/* ---- golden files -------------------------------------------------------------------------- */

static const char *const golden[] = {
    "gpt2",           "gpt2_prefix",    "llama3",           "qwen2",
    "llama2",         "metaspace_always", "metaspace_first", "metaspace_never",
    "split_removed",  "split_previous", "split_next",       "split_contiguous",
    "split_invert",   "split_digits",   "split_runs",       "split_whitespace",
    "split_whitespace_split"};

/* Decoded bytes, made valid as the library makes them. */
static void check_decoded(const psoup_tokenizer *t, const int32_t *ids, size_t n, int skip,
                          const char *hex, const char *where) {
    char *expected, *text = malloc(65536);
    size_t length, expected_length = unhex(hex, &expected);
    psoup_error error = {0};
    ck_assert_msg(psoup_tokenizer_decode(t, ids, n, skip, text, 65536, &length, &error) == PSOUP_OK,
                  "%s: %s", where, error.message);
    psoup__aligned valid = {.context = context, .limit = SIZE_MAX};
    ck_assert_int_eq(psoup__aligned_read(&valid, text, length, &error), PSOUP_OK);
    ck_assert_msg(valid.length == expected_length &&
                      (valid.length == 0 || memcmp(valid.bytes, expected, valid.length) == 0),
                  "%s: decoded \"%.*s\", expected \"%s\"", where, (int)valid.length,
                  valid.bytes ? valid.bytes : "", expected);
    psoup__aligned_free(&valid);
    free(expected);
    free(text);
}

static void check_ids(const int32_t *ids, size_t n, const psoup_json *expected, const char *where) {
    for (size_t i = 0; i < n && i < psoup_json_size(expected); i++)
        ck_assert_msg(ids[i] == psoup_json_integer(psoup_json_at(expected, i), -1),
                      "%s: token %zu is %d, expected %d", where, i, ids[i],
                      (int)psoup_json_integer(psoup_json_at(expected, i), -1));
    ck_assert_msg(n == psoup_json_size(expected), "%s: %zu tokens, expected %zu", where, n,
                  psoup_json_size(expected));
}

static void check_encoded(const psoup_tokenizer *t, const char *text, size_t length,
                          uint32_t flags, const psoup_json *expected, const char *where) {
    size_t capacity = 4 * length + 8, n;
    int32_t *ids = malloc(capacity * sizeof *ids);
    psoup_offset *offsets = malloc(capacity * sizeof *offsets);
    psoup_error error = {0};
    ck_assert_msg(psoup_tokenizer_encode(t, text, length, flags, ids, offsets, capacity, &n,
                                         &error) == PSOUP_OK,
                  "%s: %s", where, error.message);
    ck_assert_msg(n <= capacity, "%s: %zu tokens in %zu bytes", where, n, length);
    check_ids(ids, n, psoup_json_get(expected, "ids"), where);
    for (size_t i = 0; i < n; i++) {
        const psoup_json *offset = psoup_json_at(psoup_json_get(expected, "off"), i);
        size_t begin = (size_t)psoup_json_integer(psoup_json_at(offset, 0), -1);
        size_t end = (size_t)psoup_json_integer(psoup_json_at(offset, 1), -1);
        ck_assert_msg(offsets[i].begin == begin && offsets[i].end == end,
                      "%s: token %zu \"%s\" lies at [%zu, %zu), expected [%zu, %zu)", where, i,
                      psoup_tokenizer_token(t, ids[i]), offsets[i].begin, offsets[i].end, begin,
                      end);
    }
    check_decoded(t, ids, n, 0, psoup_json_string(psoup_json_get(expected, "dec"), ""), where);
    check_decoded(t, ids, n, 1, psoup_json_string(psoup_json_get(expected, "skip"), ""), where);
    free(ids);
    free(offsets);
}

static int check_rows(const char *name, const psoup_tokenizer *t) {
    char path[256], where[512];
    psoup_jsonl_reader *reader;
    psoup_json *row;
    psoup_error error = {0};
    int rows = 0;
    snprintf(path, sizeof path, GOLDEN "%s.jsonl.zst", name);
    ck_assert_msg(psoup_jsonl_open(context, path, &reader, &error) == PSOUP_OK, "%s",
                  error.message);
    while (psoup_jsonl_next(reader, &row, &error) == PSOUP_OK && row != NULL) {
        char *text;
        size_t length = unhex(psoup_json_string(psoup_json_get(row, "text"), ""), &text);
        const psoup_json *bare = psoup_json_get(row, "bare"), *with = psoup_json_get(row, "with");
        const psoup_json *plain = psoup_json_get(row, "plain");
        snprintf(where, sizeof where, "%s, row %d, \"%.100s\"", name, ++rows, text);
        check_encoded(t, text, length, 0, bare, where);
        check_encoded(t, text, length, PSOUP_ADD_SPECIAL, with ? with : bare, where);
        int32_t *ids = malloc((4 * length + 8) * sizeof *ids);
        size_t n;
        ck_assert_int_eq(psoup_tokenizer_encode(t, text, length, PSOUP_PLAIN_SPECIAL, ids, NULL,
                                                4 * length + 8, &n, &error),
                         PSOUP_OK);
        check_ids(ids, n, plain ? plain : psoup_json_get(bare, "ids"), where);
        free(ids);
        free(text);
        psoup_json_free(row);
    }
    ck_assert_str_eq(error.message, "");
    psoup_jsonl_reader_free(reader);
    return rows;
}

START_TEST(golden_files) {
    psoup_tokenizer *t = load(golden[_i]);
    ck_assert_int_gt(check_rows(golden[_i], t), 90);
    psoup_tokenizer_free(t);
}
END_TEST

START_TEST(saved_again) {
    char path[] = "test_text.XXXXXX";
    int file = mkstemp(path);
    ck_assert_int_ge(file, 0);
    close(file);
    psoup_error error = {0};
    psoup_tokenizer *t = load("llama2"), *again;
    ck_assert_int_eq(psoup_tokenizer_save(t, path, &error), PSOUP_OK);
    psoup_tokenizer_free(t);
    ck_assert_int_eq(psoup_tokenizer_load(context, path, &again, &error), PSOUP_OK);
    ck_assert_int_gt(check_rows("llama2", again), 90);
    psoup_tokenizer_free(again);
    unlink(path);
}
END_TEST

/* ---- real vocabularies ------------------------------------------------------------------------ */

/* Made by tests/golden/vocab.py from llama.cpp's GGUF vocabularies; most machines do not have them. */
START_TEST(real_vocabularies) {
    static const char *const names[] = {"gpt-2", "llama-spm"};
    char path[256];
    psoup_error error = {0};
    psoup_tokenizer *t;
    psoup_jsonl_reader *reader;
    psoup_json *row;
    int rows = 0;
    snprintf(path, sizeof path, "build/vocab/%s.json", names[_i]);
    if (!psoup__file_exists(path)) {
        printf("test_text: %s is not there, skipped (tests/golden/vocab.py makes it)\n", path);
        return;
    }
    ck_assert_msg(psoup_tokenizer_load(context, path, &t, &error) == PSOUP_OK, "%s", error.message);
    snprintf(path, sizeof path, "build/vocab/%s.jsonl", names[_i]);
    ck_assert_int_eq(psoup_jsonl_open(context, path, &reader, &error), PSOUP_OK);
    while (psoup_jsonl_next(reader, &row, &error) == PSOUP_OK && row != NULL) {
        char *text, where[300];
        int32_t ids[4096];
        size_t n, length = unhex(psoup_json_string(psoup_json_get(row, "text"), ""), &text);
        snprintf(where, sizeof where, "%s, row %d, \"%.100s\"", names[_i], ++rows, text);
        ck_assert_int_eq(psoup_tokenizer_encode(t, text, length, 0, ids, NULL, 4096, &n, &error),
                         PSOUP_OK);
        check_ids(ids, n, psoup_json_get(row, "ids"), where);
        check_decoded(t, ids, n, 0, psoup_json_string(psoup_json_get(row, "decoded"), ""), where);
        free(text);
        psoup_json_free(row);
    }
    ck_assert_int_gt(rows, 40);
    psoup_jsonl_reader_free(reader);
    psoup_tokenizer_free(t);
}
END_TEST

/* ---- training ---------------------------------------------------------------------------------- */

static psoup_tokenizer *train(int32_t size, const char *pattern, const psoup_json *corpus) {
    static const char *const special[] = {"<s>", "</s>", "<pad>"};
    const char *texts[64];
    psoup_error error = {0};
    psoup_tokenizer *t;
    size_t n = psoup_json_size(corpus);
    for (size_t i = 0; i < n; i++)
        texts[i] = psoup_json_string(psoup_json_at(corpus, i), NULL);
    ck_assert_msg(psoup_tokenizer_train(context, texts, n, size, special, 3, pattern, &t, &error) ==
                      PSOUP_OK,
                  "%s", error.message);
    return t;
}

START_TEST(training) {
    psoup_error error = {0};
    psoup_json *corpus, *merges;
    ck_assert_int_eq(psoup_json_read(context, GOLDEN "corpus.json", &corpus, &error), PSOUP_OK);
    ck_assert_int_eq(psoup_json_read(context, GOLDEN "merges.json", &merges, &error), PSOUP_OK);
    psoup_tokenizer *t = train(700, NULL, corpus);
    ck_assert_int_eq(psoup_tokenizer_vocab_size(t), 700);
    ck_assert_int_eq(psoup_tokenizer_token_id(t, "<s>"), 256);
    ck_assert_int_eq(psoup_tokenizer_token_id(t, "no such token"), -1);
    ck_assert_ptr_null(psoup_tokenizer_token(t, 700));
    ck_assert_ptr_null(psoup_tokenizer_token(t, -1));
    const psoup_json *ours = psoup_json_get(psoup_json_get(t->root, "model"), "merges");
    ck_assert_uint_eq(psoup_json_size(ours), psoup_json_size(merges));
    for (size_t i = 0; i < psoup_json_size(ours); i++) {
        char pair[512];
        const psoup_json *merge = psoup_json_at(ours, i);
        snprintf(pair, sizeof pair, "%s %s", psoup_json_string(psoup_json_at(merge, 0), ""),
                 psoup_json_string(psoup_json_at(merge, 1), ""));
        ck_assert_msg(strcmp(pair, psoup_json_string(psoup_json_at(merges, i), "")) == 0,
                      "merge %zu is %s, expected %s", i, pair,
                      psoup_json_string(psoup_json_at(merges, i), ""));
    }
    const char *keep = getenv("PSOUP_TEST_KEEP"); /* for: text.py FILE */
    if (keep != NULL)
        ck_assert_int_eq(psoup_tokenizer_save(t, keep, &error), PSOUP_OK);
    psoup_tokenizer_free(t);
    t = train(2000, "\\p{L}+|[^\\p{L}]", corpus); /* fewer pairs than asked for */
    ck_assert_int_lt(psoup_tokenizer_vocab_size(t), 2000);
    int32_t ids[8];
    size_t n;
    ck_assert_int_eq(psoup_tokenizer_encode(t, "soup</s>", 8, 0, ids, NULL, 8, &n, &error), PSOUP_OK);
    ck_assert_uint_eq(n, 2);
    ck_assert_str_eq(psoup_tokenizer_token(t, ids[0]), "soup");
    ck_assert_int_eq(ids[1], 257);
    psoup_tokenizer_free(t);
    psoup_json_free(corpus);
    psoup_json_free(merges);
}
END_TEST

START_TEST(training_refuses) {
    const char *text = "abc";
    const char *twice[] = {"<s>", "<s>"}, *letter[] = {"a"}, *broken[] = {"\xff"};
    psoup_error error = {0};
    psoup_tokenizer *t;
    ck_assert_int_eq(psoup_tokenizer_train(context, &text, 1, 255, NULL, 0, NULL, &t, &error),
                     PSOUP_ERROR_ARGUMENT);
    ck_assert_int_eq(psoup_tokenizer_train(context, &text, 1, 300, twice, 2, NULL, &t, &error),
                     PSOUP_ERROR_ARGUMENT);
    ck_assert_int_eq(psoup_tokenizer_train(context, &text, 1, 300, letter, 1, NULL, &t, &error),
                     PSOUP_ERROR_ARGUMENT);
    ck_assert_int_eq(psoup_tokenizer_train(context, &text, 1, 300, broken, 1, NULL, &t, &error),
                     PSOUP_ERROR_ARGUMENT);
    ck_assert_int_eq(psoup_tokenizer_train(context, &text, 1, 300, NULL, 0, "(", &t, &error),
                     PSOUP_ERROR_FORMAT);
    ck_assert_ptr_null(t);
    ck_assert_ptr_nonnull(strstr(error.message, "pattern"));
}
END_TEST

/* ---- threads, length, limits ---------------------------------------------------------------------- */

static void *encode_rows(void *tokenizer) {
    check_rows("llama3", tokenizer);
    return NULL;
}

START_TEST(threads) {
    psoup_tokenizer *t = load("llama3");
    pthread_t workers[4];
    for (int i = 0; i < 4; i++)
        ck_assert_int_eq(pthread_create(&workers[i], NULL, encode_rows, t), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(workers[i], NULL);
    psoup_tokenizer_free(t);
}
END_TEST

/* A word of a million letters: seconds where merging is quadratic. */
START_TEST(long_word) {
    size_t length = 1000000, n, bytes;
    char *text = malloc(length), *back = malloc(length);
    int32_t *ids = malloc(length * sizeof *ids);
    psoup_error error = {0};
    for (size_t i = 0; i < length; i++)
        text[i] = "soupwarmcook"[i * i % 11];
    psoup_tokenizer *t = load("gpt2");
    ck_assert_int_eq(psoup_tokenizer_encode(t, text, length, 0, ids, NULL, length, &n, &error),
                     PSOUP_OK);
    ck_assert_uint_lt(n, length);
    ck_assert_int_eq(psoup_tokenizer_decode(t, ids, n, 0, back, length, &bytes, &error), PSOUP_OK);
    ck_assert_uint_eq(bytes, length);
    ck_assert_int_eq(memcmp(text, back, length), 0);
    /* Little room: the count is still whole, and nothing is written past it. */
    ids[2] = -7;
    ck_assert_int_eq(psoup_tokenizer_encode(t, "a b c d", 7, 0, ids, NULL, 2, &n, &error), PSOUP_OK);
    ck_assert_uint_ge(n, 4);
    ck_assert_int_eq(ids[2], -7);
    ids[0] = psoup_tokenizer_vocab_size(t);
    ck_assert_int_eq(psoup_tokenizer_decode(t, ids, 1, 0, back, 10, &bytes, &error),
                     PSOUP_ERROR_ARGUMENT);
    psoup_tokenizer_free(t);
    free(text);
    free(back);
    free(ids);
}
END_TEST

/* Oniguruma's reading where PCRE2's is another; checked by hand against tokenizers 0.20.3. */
START_TEST(ruby_syntax) {
    static const struct {
        const char *pattern, *text;
        size_t spans;
    } cases[] = {{"\\p{L}+|b", "aaaaaaa1", 2},
                 {"[^\\S\n]+|\\h", "x  f\ny", 4},
                 {"\\s", "a\xe1\xa0\x8e z", 3}, /* U+180E is no space */
                 {"^b$", "a\nb\nc", 3}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        psoup__pattern *pattern;
        psoup__spans spans = {.context = context};
        psoup_error error = {0};
        ck_assert_msg(psoup__pattern_create(context, "test", cases[i].pattern, false, &pattern,
                                            &error) == PSOUP_OK,
                      "%s", error.message);
        ck_assert_int_eq(psoup__pattern_spans(pattern, cases[i].text, strlen(cases[i].text), &spans,
                                              &error),
                         PSOUP_OK);
        ck_assert_msg(spans.n == cases[i].spans, "%s: %zu spans, expected %zu", cases[i].pattern,
                      spans.n, cases[i].spans);
        psoup__spans_free(&spans);
        psoup__pattern_free(pattern);
    }
}
END_TEST

#define MODEL "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1},\"merges\":[]}"

START_TEST(hostile_patterns) {
    static const char *const patterns[] = {"(a+)+b", "(?:a|aa)+b", "(a|a|a|b)*c", "(?:(?:a*)*)*b"};
    char text[5001], json[512];
    memset(text, 'a', 5000);
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        psoup_error error = {0};
        size_t n = 0;
        snprintf(json, sizeof json,
                 "{\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"%s\"},"
                 "\"behavior\":\"Isolated\"}," MODEL "}",
                 patterns[i]);
        psoup_tokenizer *t = parse(json, &error);
        ck_assert_msg(t != NULL, "%s", error.message);
        int32_t ids[8];
        psoup_status status = psoup_tokenizer_encode(t, text, 5000, 0, ids, NULL, 8, &n, &error);
        ck_assert_msg(status == PSOUP_ERROR_UNSUPPORTED || status == PSOUP_OK, "%s: %d %s",
                      patterns[i], status, error.message);
        if (status != PSOUP_OK)
            ck_assert_ptr_nonnull(strstr(error.message, "too many steps"));
        psoup_tokenizer_free(t);
    }
}
END_TEST

START_TEST(growing_text) {
    char json[8192] = "{\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[";
    for (int i = 0; i < 40; i++)
        strcat(json, "{\"type\":\"Replace\",\"pattern\":{\"String\":\"a\"},\"content\":\"aa\"},");
    strcat(json, "{\"type\":\"NFC\"}]}," MODEL "}");
    psoup_error error = {0};
    psoup_tokenizer *t = parse(json, &error);
    ck_assert_msg(t != NULL, "%s", error.message);
    int32_t ids[8];
    size_t n;
    ck_assert_int_eq(psoup_tokenizer_encode(t, "a", 1, 0, ids, NULL, 8, &n, &error),
                     PSOUP_ERROR_UNSUPPORTED);
    psoup_tokenizer_free(t);
}
END_TEST

/* ---- files that are refused ------------------------------------------------------------------------- */

#define VOCAB(vocab, merges)                                                                       \
    "{\"model\":{\"type\":\"BPE\",\"vocab\":" vocab ",\"merges\":" merges "}}"
#define WITH(field) "{" field "," MODEL "}"

static const struct {
    const char *json, *says;
} refused[] = {
    {"[]", "expected an object"},
    {"{}", "model.vocab"},
    {"{\"model\":3}", "model.vocab"},
    {"{\"model\":{\"type\":\"Unigram\",\"vocab\":[]}}", "Unigram"},
    {VOCAB("[]", "[]"), "model.vocab"},
    {VOCAB("{\"a\":0}", "{}"), "model.merges"},
    {VOCAB("{\"a\":-1}", "[]"), "\"a\""},
    {VOCAB("{\"a\":4194304}", "[]"), "\"a\""},
    {VOCAB("{\"a\":\"0\"}", "[]"), "\"a\""},
    {VOCAB("{\"a\":1.5}", "[]"), "\"a\""},
    {VOCAB("{\"a\":0,\"b\":0}", "[]"), "same id"},
    {VOCAB("{\"a\":0}", "[\"a b\"]"), "merges[0]: \"b\""},
    {VOCAB("{\"a\":0,\"b\":1}", "[\"a b\"]"), "merges[0]: \"ab\""},
    {VOCAB("{\"a\":0,\"b\":1}", "[\"ab\"]"), "merges[0]"},
    {VOCAB("{\"a\":0,\"b\":1}", "[\"a b c\"]"), "merges[0]"},
    {VOCAB("{\"a\":0,\"b\":1}", "[[\"a\"]]"), "merges[0]"},
    {VOCAB("{\"a\":0,\"b\":1}", "[[\"a\",1]]"), "merges[0]"},
    {VOCAB("{\"a\":0,\"b\":1}", "[7]"), "merges[0]"},
    {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"unk_token\":\"?\"}}", "unk_token"},
    {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"dropout\":0.1}}", "dropout"},
    {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"fuse_unk\":1}}", "fuse_unk"},
    {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"continuing_subword_prefix\":\"##\"}}",
     "continuing_subword_prefix"},
    {"{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"end_of_word_suffix\":\"</w>\"}}",
     "end_of_word_suffix"},
    {WITH("\"added_tokens\":{}"), "added_tokens"},
    {WITH("\"added_tokens\":[{\"id\":0,\"content\":\"x\"}]"), "same id"},
    {WITH("\"added_tokens\":[{\"id\":5,\"content\":\"a\"}]"), "added_tokens[0]"},
    {WITH("\"added_tokens\":[{\"id\":-5,\"content\":\"x\"}]"), "added_tokens"},
    {WITH("\"added_tokens\":[{\"id\":2,\"content\":7}]"), "added_tokens[0].content"},
    {WITH("\"added_tokens\":[{\"id\":2,\"content\":\"x\",\"special\":\"yes\"}]"), "special"},
    {WITH("\"normalizer\":{\"type\":\"Lowercase\"}"), "Lowercase"},
    {WITH("\"normalizer\":[]"), "normalizer"},
    {WITH("\"normalizer\":{\"type\":\"Sequence\"}"), "normalizers"},
    {WITH("\"normalizer\":{\"type\":\"Replace\",\"content\":\"\",\"pattern\":{\"String\":\"\"}}"),
     "empty"},
    {WITH("\"normalizer\":{\"type\":\"Prepend\"}"), "prepend"},
    {WITH("\"pre_tokenizer\":{\"type\":\"UnicodeScripts\"}"), "UnicodeScripts"},
    {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\","
          "\"pattern\":{\"Regex\":\"[a[b]]\"}}"),
     "inside another"},
    {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\","
          "\"pattern\":{\"Regex\":\"a{1,3}+\"}}"),
     "{n,m}+"},
    {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\","
          "\"pattern\":{\"Regex\":\"(*SKIP)\"}}"),
     "(*"},
    {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\"}"), "pattern"},
    {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Never\","
          "\"pattern\":{\"String\":\"a\"}}"),
     "behavior"},
    {WITH("\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"__\"}"), "replacement"},
    {WITH("\"pre_tokenizer\":{\"type\":\"Metaspace\",\"replacement\":\"_\","
          "\"prepend_scheme\":\"last\"}"),
     "prepend_scheme"},
    {WITH("\"decoder\":{\"type\":\"WordPiece\"}"), "WordPiece"},
    {WITH("\"decoder\":{\"type\":\"Strip\",\"content\":\" \",\"start\":-1,\"stop\":0}"), "start"},
    {WITH("\"post_processor\":{\"type\":\"BertProcessing\"}"), "BertProcessing"},
    {WITH("\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"Sequence\":"
          "{\"id\":\"B\"}}]}"),
     "sequence A"},
    {WITH("\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":"
          "{\"id\":\"<s>\"}}],\"special_tokens\":{\"<s>\":{\"ids\":[99]}}}"),
     "no token"},
};

START_TEST(refusals) {
    psoup_error error = {0};
    psoup_tokenizer *t = parse(refused[_i].json, &error);
    ck_assert_msg(t == NULL, "accepted: %s", refused[_i].json);
    ck_assert_int_ne(error.status, PSOUP_OK);
    ck_assert_msg(strstr(error.message, refused[_i].says) != NULL, "\"%s\" does not say %s",
                  error.message, refused[_i].says);
    ck_assert_msg(strncmp(error.message, "test.json: ", 11) == 0, "%s", error.message);
    ck_assert_ptr_null(strchr(error.message, '\n'));
}
END_TEST

START_TEST(missing_file) {
    psoup_error error = {0};
    psoup_tokenizer *t;
    ck_assert_int_eq(psoup_tokenizer_load(context, "no/such/tokenizer.json", &t, &error),
                     PSOUP_ERROR_IO);
    ck_assert_ptr_null(t);
}
END_TEST

/* ---- every allocation fails in turn -------------------------------------------------------------------- */

typedef struct budget {
    long left, live;
} budget;

static void *limited_alloc(void *user, size_t bytes, size_t alignment) {
    budget *b = user;
    if (b->left-- <= 0)
        return NULL;
    void *memory = NULL;
    if (posix_memalign(&memory, alignment < sizeof(void *) ? sizeof(void *) : alignment,
                       bytes ? bytes : 1) != 0)
        return NULL;
    b->live++;
    return memory;
}

static void limited_free(void *user, void *memory) {
    if (memory != NULL)
        ((budget *)user)->live--;
    free(memory);
}

/* Loads, encodes, decodes and trains; the first failure's status. */
static psoup_status use_all(psoup_context *limited, psoup_error *error) {
    static const char text[] = "<s> It's 12  soups\xff caf\xc3\xa9 <mask> e\xcc\x81 souper Ze\xcc\x81";
    const char *texts[] = {text}, *special[] = {"<s>"};
    psoup_tokenizer *t = NULL;
    int32_t ids[256];
    char out[512];
    size_t n, length;
    psoup_status status = psoup_tokenizer_load(limited, GOLDEN "qwen2.json", &t, error);
    if (status == PSOUP_OK)
        status = psoup_tokenizer_encode(t, text, sizeof text - 1, 0, ids, NULL, 256, &n, error);
    if (status == PSOUP_OK)
        status = psoup_tokenizer_decode(t, ids, n, 0, out, sizeof out, &length, error);
    psoup_tokenizer_free(t);
    t = NULL;
    if (status == PSOUP_OK)
        status = psoup_tokenizer_train(limited, texts, 1, 280, special, 1, NULL, &t, error);
    psoup_tokenizer_free(t);
    return status;
}

START_TEST(allocations_fail) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    long step = 1;
    for (long allowed = 0; status != PSOUP_OK; allowed += step) {
        budget b = {.left = LONG_MAX};
        psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
        options.threads = 1;
        options.allocator = (psoup_allocator){&b, limited_alloc, limited_free};
        psoup_context *limited;
        psoup_error error = {0};
        ck_assert_int_eq(psoup_context_create(&options, &limited, &error), PSOUP_OK);
        long before = b.live;
        b.left = allowed;
        status = use_all(limited, &error);
        ck_assert_msg(status == PSOUP_OK || status == PSOUP_ERROR_MEMORY, "after %ld: %s", allowed,
                      error.message);
        ck_assert_msg(b.live == before, "after %ld: %ld leaked", allowed, b.live - before);
        psoup_context_free(limited);
        ck_assert_int_eq(b.live, 0);
        ck_assert_int_lt(allowed, 100000);
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("text");
    TCase *tests = tcase_create("text");
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_set_timeout(tests, 60);
    tcase_add_loop_test(tests, golden_files, 0, (int)(sizeof golden / sizeof *golden));
    tcase_add_loop_test(tests, real_vocabularies, 0, 2);
    tcase_add_test(tests, saved_again);
    tcase_add_test(tests, training);
    tcase_add_test(tests, training_refuses);
    tcase_add_test(tests, threads);
    tcase_add_test(tests, long_word);
    tcase_add_test(tests, ruby_syntax);
    tcase_add_test(tests, hostile_patterns);
    tcase_add_test(tests, growing_text);
    tcase_add_loop_test(tests, refusals, 0, (int)(sizeof refused / sizeof *refused));
    tcase_add_test(tests, missing_file);
    tcase_add_test(tests, allocations_fail);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failures = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failures ? 1 : 0;
}
