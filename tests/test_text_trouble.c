/* Tokenizers that are refused, patterns and texts that would run away, and memory that fails. */
#include "text_case.h"

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
    {WITH("\"normalizer\":{\"type\":\"Strip\",\"strip_left\":1}"), "strip_left"},
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
    {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\","
          "\"pattern\":{\"Regex\":\"[[:alpha]\"}}"),
     "[:"},
    {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\","
          "\"pattern\":{\"Regex\":\"a\\\\Kb\"}}"),
     "\\K"},
    {WITH("\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\","
          "\"pattern\":{\"Regex\":\"[a\\\\H]\"}}"),
     "\\H inside"},
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
    {WITH("\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":"
          "{\"id\":\"<s>\"}}]}"),
     "expected an object with ids"},
    {WITH("\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":"
          "{\"id\":\"a\"}}],\"special_tokens\":{\"a\":{\"ids\":[0,0,0,0,0,0,0,0,0]}}}"),
     "more than 8"},
    {WITH("\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[]}"), "sequence A"},
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
    Suite *suite = suite_create("text_trouble");
    TCase *tests = tcase_create("text_trouble");
    tcase_add_checked_fixture(tests, setup, teardown);
    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, hostile_patterns);
    tcase_add_test(tests, growing_text);
    tcase_add_loop_test(tests, refusals, 0, (int)(sizeof refused / sizeof *refused));
    tcase_add_test(tests, missing_file);
    tcase_add_test(tests, allocations_fail);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
