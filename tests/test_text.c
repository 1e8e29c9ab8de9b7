/* Tokenizers against golden files of the `tokenizers` library (tests/golden/text.py), and on their own. */
#include "text_case.h"

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

/* Ids and offsets as tokenizers 0.20.3 gives them. */
START_TEST(stripping) {
    static const struct {
        const char *left, *right, *text;
        size_t n, begin, end; /* tokens; where the first begins and the last ends */
    } cases[] = {{"true", "true", "  ab ", 2, 2, 4},   {"true", "true", " a b", 3, 1, 4},
                 {"true", "true", "   ", 0, 0, 0},     {"true", "false", "  ab ", 3, 2, 5},
                 {"true", "false", "   ", 0, 0, 0},    {"false", "true", "  ab ", 4, 0, 4},
                 {"false", "true", "   ", 0, 0, 0},    {"false", "false", "  ab ", 5, 0, 5},
                 {"true", "true", "\xe3\x80\x80" "a\xc2\xa0\n", 1, 3, 4}}; /* U+3000, U+00A0 */
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char json[300];
        int32_t ids[8];
        psoup_offset at[8];
        size_t n;
        psoup_error error = {0};
        snprintf(json, sizeof json,
                 "{\"normalizer\":{\"type\":\"Strip\",\"strip_left\":%s,\"strip_right\":%s},"
                 "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\" \":2},\"merges\":[]}}",
                 cases[i].left, cases[i].right);
        psoup_tokenizer *t = parse(json, &error);
        ck_assert_msg(t != NULL, "%s", error.message);
        ck_assert_int_eq(psoup_tokenizer_encode(t, cases[i].text, strlen(cases[i].text), 0, ids, at, 8,
                                                &n, &error), PSOUP_OK);
        ck_assert_msg(n == cases[i].n && (n == 0 || (at[0].begin == cases[i].begin &&
                                                     at[n - 1].end == cases[i].end)),
                      "case %zu: %zu tokens", i, n);
        psoup_tokenizer_free(t);
    }
}
END_TEST

/* An added token that no model.vocab has is found whole, by the rule of its own, and is nothing that words are made of.
 * Ids as tokenizers 0.20.3 gives them. */
START_TEST(added_tokens_are_no_words) {
    static const struct {
        const char *text;
        size_t n;
        int32_t ids[4];
    } cases[] = {{"ab", 1, {4}},         {"1ab", 3, {0, 1, 2}},     {"ab1", 3, {1, 2, 0}}, {"a ab", 3, {1, 0, 4}},
                 {"\u6c64", 1, {3}},     {"b\u6c64", 2, {2, 0}},    {"\u6c64" "1", 2, {0, 0}}};
    psoup_error error = {0};
    psoup_tokenizer *t = parse(
        "{\"added_tokens\":[{\"id\":3,\"content\":\"\u6c64\",\"single_word\":true,\"normalized\":false},"
        "{\"id\":4,\"content\":\"ab\",\"single_word\":true,\"normalized\":false}],"
        "\"pre_tokenizer\":{\"type\":\"Digits\",\"individual_digits\":true},"
        "\"model\":{\"type\":\"BPE\",\"unk_token\":\"<unk>\",\"ignore_merges\":true,"
        "\"vocab\":{\"<unk>\":0,\"a\":1,\"b\":2},\"merges\":[]}}", &error);
    ck_assert_msg(t != NULL, "%s", error.message);
    ck_assert_int_eq(psoup_tokenizer_token_id(t, "ab"), 4);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int32_t ids[8];
        size_t n;
        ck_assert_int_eq(psoup_tokenizer_encode(t, cases[i].text, strlen(cases[i].text), 0, ids, NULL, 8, &n, &error),
                         PSOUP_OK);
        ck_assert_msg(n == cases[i].n && memcmp(ids, cases[i].ids, n * sizeof *ids) == 0, "\"%s\": %zu tokens, %d …",
                      cases[i].text, n, (int)ids[0]);
    }
    psoup_tokenizer_free(t);
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
                 {"^b$", "a\nb\nc", 3},
                 {"[[:alpha:]]+", "ab1cd", 3},
                 {"[[:digit:][:space:]]+", "ab12 c", 3},
                 {"[]a]+", "a]b", 2}, /* a bracket that comes first is one of the class */
                 {"[^]a]+", "a]b", 2}};
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
    tcase_add_test(tests, stripping);
    tcase_add_test(tests, added_tokens_are_no_words);
    tcase_add_test(tests, ruby_syntax);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
