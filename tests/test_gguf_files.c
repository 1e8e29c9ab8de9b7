/* GGUF adapters, models loaded from GGUF, and tokenizers there and back. With PSOUP_TEST_KEEP=DIR the files
 * stay in DIR for gguf_golden.py --check DIR. Golden: tests/golden/gguf_golden.py. */
#include "format_case.h"

#include "format/gguf.h"

#define GGUF "tests/golden/gguf/"
#define OK(call) ck_assert_msg((call) == PSOUP_OK, "%s", error.message)

static const char *const kinds[] = {"llama", "qwen2", "llama3"};

static const char *golden(const char *format, const char *kind) {
    static char path[2][256];
    static int turn;
    snprintf(path[turn ^= 1], sizeof path[0], format, kind);
    return path[turn];
}

static float *values_of(const psoup__tensor *tensor, size_t *n) {
    ck_assert(psoup__tensor_elements(tensor, n));
    float *values = malloc(*n * sizeof *values + 1);
    psoup__tensor_read(context, tensor, 0, *n, values);
    return values;
}

/* scale · B and A are the same to `tolerance` of the largest. */
static void same_adapters(const psoup__peft *want, const psoup__peft *got, float tolerance) {
    ck_assert_uint_eq(want->n, got->n);
    for (size_t i = 0; i < want->n; i++) {
        const psoup__peft_pair *x = &want->pairs[i], *y = &got->pairs[i];
        ck_assert_str_eq(x->module, y->module);
        ck_assert_int_eq(x->rank, y->rank);
        for (int side = 0; side < 2; side++) {
            size_t n, m;
            float *a = values_of(side ? &x->b : &x->a, &n), *b = values_of(side ? &y->b : &y->a, &m);
            ck_assert_uint_eq(n, m);
            for (size_t j = 0; j < n; j++) {
                float p = side ? x->scale * a[j] : a[j], q = side ? y->scale * b[j] : b[j];
                ck_assert_msg(fabsf(p - q) <= tolerance * fabsf(p), "%s %d %zu: %g %g", x->module, side, j,
                              (double)p, (double)q);
            }
            free(a);
            free(b);
        }
    }
}

START_TEST(adapters_read) {
    psoup__peft *want, *got;
    const char *gguf = golden(GGUF "adapter_%s.gguf", kinds[_i]);
    OK(psoup__peft_open(context, golden(GGUF "adapter_%s", kinds[_i]), &want, &error));
    OK(psoup__peft_open_heads(context, gguf, 4, 2, &got, &error));
    same_adapters(want, got, 0);
    for (size_t i = 0; i < want->n; i++)
        ck_assert_float_eq(want->pairs[i].scale, got->pairs[i].scale);
    psoup__peft_free(got);
    psoup__peft_free(want);
    /* without the heads the rows of a llama's q and k cannot be put in order */
    psoup_status status = psoup__peft_open(context, gguf, &got, &error);
    ck_assert_int_eq(status, _i == 0 ? PSOUP_ERROR_FORMAT : PSOUP_OK);
    if (_i == 0)
        ck_assert_ptr_nonnull(strstr(error.message, "head_count"));
    psoup__peft_free(got);
    /* kinds are not mixed up */
    psoup__weights *weights;
    ck_assert_int_eq(psoup__weights_map(context, gguf, "model", &weights, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_int_eq(psoup__peft_open(context, GGUF "llama-bf16.gguf", &got, &error), PSOUP_ERROR_ARGUMENT);
}
END_TEST

static void write_adapter(const psoup__peft *peft, const char *path, const char *architecture) {
    const psoup__peft_output out = {.pairs = peft->pairs, .n = peft->n, .rank = 4, .alpha = 6};
    OK(psoup__gguf_adapter_write(context, path, &out, architecture, 4, 2, &error));
}

/* What the converter writes, byte for byte in every tensor. */
START_TEST(adapters_written) {
    psoup__peft *peft, *got;
    psoup__gguf *want, *made;
    char path[1024];
    snprintf(path, sizeof path, "%s", in_scratch(_i ? "adapter_qwen2.gguf" : "adapter_llama.gguf"));
    OK(psoup__peft_open(context, golden(GGUF "adapter_%s", kinds[_i]), &peft, &error));
    write_adapter(peft, path, kinds[_i]);
    OK(psoup__gguf_open(context, golden(GGUF "adapter_%s.gguf", kinds[_i]), &want, &error));
    OK(psoup__gguf_open(context, path, &made, &error));
    OK(psoup__gguf_map(want, &error));
    OK(psoup__gguf_map(made, &error));
    ck_assert_uint_eq(psoup__gguf_count(want), psoup__gguf_count(made));
    for (size_t i = 0; i < psoup__gguf_count(want); i++) {
        const psoup__tensor *a = psoup__gguf_tensor(want, i);
        const psoup__tensor *b = psoup__gguf_find(made, psoup__gguf_name(want, i));
        ck_assert_msg(b != NULL && b->bytes == a->bytes && memcmp(a->data, b->data, a->bytes) == 0,
                      "%s differs", psoup__gguf_name(want, i));
    }
    double alpha = psoup__gguf_real(want, "adapter.lora.alpha", -1);
    ck_assert_double_eq(psoup__gguf_real(made, "adapter.lora.alpha", -2), alpha);
    ck_assert(psoup__gguf_is(made, "general.architecture", kinds[_i]));
    psoup__gguf_free(want);
    psoup__gguf_free(made);
    OK(psoup__peft_open(context, path, &got, &error)); /* ours say the heads */
    same_adapters(peft, got, 0);
    psoup__peft_free(got);
    psoup__peft_free(peft);
}
END_TEST

/* rsLoRA and patterns: llama.cpp knows alpha / rank alone, so B carries the rest. */
START_TEST(scales_folded) {
    psoup__peft *peft, *got;
    char path[1024];
    snprintf(path, sizeof path, "%s", in_scratch("adapter_rslora.gguf"));
    OK(psoup__peft_open(context, GGUF "adapter_rslora", &peft, &error));
    write_adapter(peft, path, "llama");
    OK(psoup__peft_open(context, path, &got, &error));
    same_adapters(peft, got, 4e-7f);
    int folded = 0;
    for (size_t i = 0; i < got->n; i++)
        folded += got->pairs[i].scale != peft->pairs[i].scale;
    ck_assert_int_eq(folded, 4); /* v and k of two layers; q's scale is alpha / rank of the file */
    psoup__peft_free(got);
    psoup__peft_free(peft);
    /* what has no place there */
    const float head[1] = {1};
    psoup__peft_pair pair = {.module = "model.embed_tokens", .rank = 1, .scale = 1,
                             .a = {.rank = 2, .shape = {1, 1}, .bytes = 4, .data = head},
                             .b = {.rank = 2, .shape = {1, 1}, .bytes = 4, .data = head}};
    psoup__peft_output out = {.pairs = &pair, .n = 1, .rank = 1, .alpha = 1};
    ck_assert_int_eq(psoup__gguf_adapter_write(context, in_scratch("x.gguf"), &out, "llama", 1, 1, &error),
                     PSOUP_ERROR_UNSUPPORTED);
    pair.module = "lm_head";
    out.head = head;
    ck_assert_int_eq(psoup__gguf_adapter_write(context, in_scratch("x.gguf"), &out, "llama", 1, 1, &error),
                     PSOUP_ERROR_UNSUPPORTED);
    out.head = NULL;
    ck_assert_int_eq(psoup__gguf_adapter_write(context, in_scratch("x.gguf"), &out, "bert", 1, 1, &error),
                     PSOUP_ERROR_UNSUPPORTED);
    pair.scale = INFINITY;
    ck_assert_int_ne(psoup__gguf_adapter_write(context, in_scratch("x.gguf"), &out, "llama", 1, 1, &error),
                     PSOUP_OK);
    ck_assert(!psoup__file_exists(in_scratch("x.gguf")));
}
END_TEST

/* ---- the model ---------------------------------------------------------------------------------- */

enum { TOKENS = 12 };

static float *logits_of(const char *path, const char *adapter, size_t *n) {
    psoup_model *model;
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    int32_t tokens[TOKENS];
    const float one = 1;
    OK(psoup_model_load(context, path, &model, &error));
    OK(psoup_model_get_config(model, &config, &error));
    if (adapter != NULL)
        OK(psoup_model_load_adapter(model, "a", adapter, &error));
    for (int i = 0; i < TOKENS; i++)
        tokens[i] = (i * 37 + 5) % config.vocab_size;
    const psoup_row row = {tokens, TOKENS, adapter != NULL ? &one : NULL};
    *n = (size_t)TOKENS * (size_t)config.vocab_size;
    float *out = malloc(*n * sizeof *out);
    OK(psoup_model_logits(model, &row, 1, out, &error));
    psoup_model_free(model);
    return out;
}

START_TEST(models_load) {
    static const struct {
        const char *directory, *file, *adapter, *gguf_adapter;
    } cases[] = {{GGUF "llama", GGUF "llama-bf16.gguf", NULL, NULL},
                 {GGUF "llama3", GGUF "llama3-f16.gguf", NULL, NULL},
                 {GGUF "qwen2", GGUF "qwen2-f32.gguf", NULL, NULL},
                 {GGUF "llama", GGUF "llama-bf16.gguf", GGUF "adapter_llama", GGUF "adapter_llama.gguf"},
                 {GGUF "qwen2", GGUF "qwen2-f32.gguf", GGUF "adapter_qwen2", GGUF "adapter_qwen2.gguf"}};
    size_t n, m;
    float *want = logits_of(cases[_i].directory, cases[_i].adapter, &n);
    float *got = logits_of(cases[_i].file, cases[_i].gguf_adapter, &m);
    ck_assert_uint_eq(n, m);
    /* the rotation's factors are found again only to f32's last places */
    for (size_t i = 0; i < n; i++)
        ck_assert_float_le(fabsf(want[i] - got[i]), _i == 1 ? 1e-5f : 0.0f);
    free(want);
    free(got);
}
END_TEST

START_TEST(quantised_model_loads) {
    size_t n, m;
    float *want = logits_of(GGUF "llama", NULL, &n), *got = logits_of(GGUF "llama-q8_0.gguf", NULL, &m);
    double difference = 0, size = 0;
    ck_assert_uint_eq(n, m);
    for (size_t i = 0; i < n; i++) {
        difference += pow((double)(want[i] - got[i]), 2);
        size += pow((double)want[i], 2);
    }
    ck_assert_double_gt(difference, 0);
    ck_assert_double_lt(sqrt(difference / size), 0.02);
    free(want);
    free(got);
}
END_TEST

/* ---- tokenizers --------------------------------------------------------------------------------- */

static const char *const texts[] = {
    "It's the soup's turn: 12345 spoons, 3.14 bowls!", "  two spaces,\ttabs\n\nand lines ",
    "na\xc3\xafve Z\xc3\xa9 \xf0\x9f\x8d\xb2 \xe3\x82\xb9", "DON'T we'll <s>x</s>[INST]", "a", "",
    /* no texts with added tokens that take spaces in or stand alone: GGUF cannot say that of a token */
    "The quick brown fox\r\n\r\njumps over 1 22 333 4444 dogs"};
enum { TEXTS = sizeof texts / sizeof *texts };

/* The tokenizer.json made of a GGUF file cuts texts as the one that went in. */
static void same_tokens(const char *want_path, const char *got_path) {
    psoup_tokenizer *want, *got;
    OK(psoup_tokenizer_load(context, want_path, &want, &error));
    OK(psoup_tokenizer_load(context, got_path, &got, &error));
    for (size_t t = 0; t < 2 * TEXTS; t++) {
        int32_t a[256], b[256];
        size_t n, m, length;
        char back[2][1024];
        uint32_t flags = t % 2 ? PSOUP_ADD_SPECIAL : 0;
        const char *text = texts[t / 2];
        OK(psoup_tokenizer_encode(want, text, strlen(text), flags, a, NULL, 256, &n, &error));
        OK(psoup_tokenizer_encode(got, text, strlen(text), flags, b, NULL, 256, &m, &error));
        ck_assert_msg(n == m && memcmp(a, b, n * sizeof *a) == 0, "%s: \"%s\"", got_path, text);
        OK(psoup_tokenizer_decode(want, a, n, 1, back[0], sizeof back[0], &length, &error));
        back[0][length] = '\0';
        OK(psoup_tokenizer_decode(got, a, n, 1, back[1], sizeof back[1], &length, &error));
        back[1][length] = '\0';
        ck_assert_str_eq(back[0], back[1]);
    }
    psoup_tokenizer_free(want);
    psoup_tokenizer_free(got);
}

START_TEST(sidecars) {
    static const char *const files[] = {GGUF "llama-bf16.gguf", GGUF "qwen2-f32.gguf", GGUF "llama3-f16.gguf"};
    char directory[1024], config[1100], want[1100];
    psoup_json *settings, *original;
    snprintf(directory, sizeof directory, "%s", in_scratch(golden("hf_%s", kinds[_i])));
    OK(psoup__make_directories(directory, &error));
    OK(psoup__hf_copy_sidecars(context, files[_i], directory, &error));
    same_tokens(golden(GGUF "%s", kinds[_i]), directory);
    snprintf(config, sizeof config, "%s/tokenizer_config.json", directory);
    snprintf(want, sizeof want, GGUF "%s/tokenizer_config.json", kinds[_i]);
    OK(psoup_json_read(context, config, &settings, &error));
    OK(psoup_json_read(context, want, &original, &error));
    static const char *const same[] = {"bos_token", "eos_token", "chat_template"};
    for (size_t i = 0; i < 3; i++)
        ck_assert_str_eq(psoup_json_string(psoup_json_get(settings, same[i]), "none"),
                         psoup_json_string(psoup_json_get(original, same[i]), "nothing"));
    psoup_json_free(settings);
    psoup_json_free(original);
    /* our own GGUF of the Hugging Face directory, and back again */
    psoup__gguf_writer *writer;
    char path[1024], again[1024];
    snprintf(path, sizeof path, "%s", in_scratch(golden("tokens_%s.gguf", kinds[_i])));
    snprintf(again, sizeof again, "%s", in_scratch(golden("again_%s", kinds[_i])));
    OK(psoup__gguf_create(context, path, &writer, &error));
    OK(psoup__gguf_metadata_from(writer, golden(GGUF "%s", kinds[_i]), PSOUP_F32, &error));
    OK(psoup__gguf_begin(writer, &error));
    OK(psoup__gguf_commit(writer, &error));
    psoup__gguf_writer_free(writer);
    psoup__gguf *file;
    OK(psoup__gguf_open(context, path, &file, &error));
    psoup_model_config c = PSOUP_MODEL_CONFIG_INIT;
    c.max_position_embeddings = 256;
    OK(psoup__make_directories(again, &error));
    OK(psoup__gguf_read_tokenizer(context, file, again, &c, &error));
    psoup__gguf_free(file);
    same_tokens(golden(GGUF "%s", kinds[_i]), again);
}
END_TEST

/* Tokenizers that llama.cpp has no equal of are refused by what they have. */
START_TEST(strange_tokenizers) {
#define VOCAB "\"vocab\": {\"a\": 0, \"b\": 1, \"ab\": 2}, \"merges\": [\"a b\"]"
#define BYTES "\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false}"
    static const struct {
        const char *json, *says;
    } cases[] = {
        {"{\"model\": {\"type\": \"BPE\", " VOCAB "}, " BYTES "}", NULL},
        {"{\"model\": {\"type\": \"Unigram\", " VOCAB "}, " BYTES "}", "Unigram"},
        {"{\"model\": {\"type\": \"BPE\", \"dropout\": 0.1, " VOCAB "}, " BYTES "}", "dropout"},
        {"{\"model\": {\"type\": \"BPE\", " VOCAB "}, \"normalizer\": {\"type\": \"Lowercase\"}, " BYTES "}",
         "Lowercase"},
        {"{\"model\": {\"type\": \"BPE\", " VOCAB "}, \"pre_tokenizer\": {\"type\": \"Whitespace\"}}",
         "Whitespace"},
        {"{\"model\": {\"type\": \"BPE\", " VOCAB "}, \"pre_tokenizer\": {\"type\": \"ByteLevel\"}}",
         "add_prefix_space"},
        {"{\"model\": {\"type\": \"BPE\", \"ignore_merges\": true, " VOCAB "}, " BYTES "}", "ignore_merges"},
        {"{\"model\": {\"type\": \"BPE\", " VOCAB "}, \"pre_tokenizer\": {\"type\": \"Sequence\", "
         "\"pretokenizers\": [{\"type\": \"Split\", \"pattern\": {\"Regex\": \"x+\"}, \"behavior\": "
         "\"Isolated\"}, {\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"use_regex\": false}]}}",
         "x+"},
        {"{\"model\": {\"type\": \"BPE\", \"byte_fallback\": true, " VOCAB "}}", "pre_tokenizer"},
        {"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 10}, \"merges\": []}, " BYTES "}", "id 10"},
        {"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 1, \"b\": 1}, \"merges\": []}, " BYTES "}",
         "one id"},
        {"{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 1}, \"merges\": [\"a\"]}, " BYTES "}", "merges"},
    };
    psoup_model_config c = PSOUP_MODEL_CONFIG_INIT;
    c.vocab_size = 4;
    c.hidden_size = c.intermediate_size = 8;
    c.num_hidden_layers = c.num_attention_heads = 1;
    OK(psoup__hf_config_write(context, scratch, &c, &error));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        psoup__gguf_writer *writer;
        write_file("tokenizer.json", cases[i].json, strlen(cases[i].json));
        OK(psoup__gguf_create(context, in_scratch("strange.gguf"), &writer, &error));
        psoup_status status = psoup__gguf_metadata_from(writer, scratch, PSOUP_F32, &error);
        ck_assert_msg((status == PSOUP_OK) == (cases[i].says == NULL), "%zu: %s", i, error.message);
        if (cases[i].says != NULL)
            ck_assert_msg(strstr(error.message, cases[i].says) != NULL, "%zu: %s", i, error.message);
        psoup__gguf_writer_free(writer);
    }
    psoup__gguf_writer *writer;
    unlink(in_scratch("tokenizer.json"));
    write_file("tokenizer.model", "x", 1);
    OK(psoup__gguf_create(context, in_scratch("strange.gguf"), &writer, &error));
    ck_assert_int_eq(psoup__gguf_metadata_from(writer, scratch, PSOUP_F32, &error), PSOUP_ERROR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(error.message, "tokenizer.model"));
    psoup__gguf_writer_free(writer);
}
END_TEST

/* A vocabulary of 600 tokens a, aa, aaa, … or of the golden model, whose scores are in an array here. */
static void read_vocabulary(bool many, float first_score, const char *says) {
    enum { MANY = 600 };
    static unsigned char text[MANY * (8 + MANY)], scores[4 * MANY], types[4 * MANY];
    psoup__gguf_writer *writer;
    psoup__gguf *file;
    psoup_model_config c = PSOUP_MODEL_CONFIG_INIT;
    size_t n = 0;
    OK(psoup__gguf_create(context, in_scratch("vocabulary.gguf"), &writer, &error));
    OK(psoup__gguf_metadata_from(writer, GGUF "llama", PSOUP_F32, &error));
    for (size_t i = 0; i < MANY; i++) {
        const uint64_t length = many ? i + 1 : 3;
        const float score = i == 5 ? first_score : -(float)i;
        const int32_t type = i < 3 ? 3 : 1;
        memcpy(text + n, &length, 8);
        memset(text + n + 8, 'a', length);
        if (!many)
            for (size_t k = 0, rest = i; k < 3; k++, rest /= 10)
                text[n + 8 + k] = (unsigned char)('a' + rest % 10);
        n += 8 + length;
        memcpy(scores + 4 * i, &score, 4);
        memcpy(types + 4 * i, &type, 4);
    }
    OK(psoup__gguf_set_array(writer, "tokenizer.ggml.tokens", PSOUP__GGUF_STRING, MANY, text, n, &error));
    OK(psoup__gguf_set_array(writer, "tokenizer.ggml.scores", PSOUP__GGUF_FLOAT32, MANY, scores, 4 * MANY, &error));
    OK(psoup__gguf_set_array(writer, "tokenizer.ggml.token_type", PSOUP__GGUF_INT32, MANY, types, 4 * MANY, &error));
    OK(psoup__gguf_begin(writer, &error));
    OK(psoup__gguf_commit(writer, &error));
    psoup__gguf_writer_free(writer);
    OK(psoup__gguf_open(context, in_scratch("vocabulary.gguf"), &file, &error));
    psoup_status status = psoup__gguf_read_tokenizer(context, file, scratch, &c, &error);
    ck_assert_msg((status == PSOUP_OK) == (says == NULL), "%s", status != PSOUP_OK ? error.message : "taken");
    if (says != NULL)
        ck_assert_msg(strstr(error.message, says) != NULL, "%s", error.message);
    psoup__gguf_free(file);
}

START_TEST(hostile_vocabularies) {
    read_vocabulary(false, -1, NULL);
    read_vocabulary(false, NAN, "no finite number");
    read_vocabulary(true, -1, "too many ways to split"); /* 180 000 merges of 72 MB together */
}
END_TEST

int main(void) {
    Suite *suite = suite_create("gguf_files");
    TCase *c = tcase_create("gguf_files");
    tcase_add_checked_fixture(c, set_up, tear_down);
    tcase_set_timeout(c, 60);
    tcase_add_test(c, hostile_vocabularies);
    tcase_add_loop_test(c, adapters_read, 0, 2);
    tcase_add_loop_test(c, adapters_written, 0, 2);
    tcase_add_test(c, scales_folded);
    tcase_add_loop_test(c, models_load, 0, 5);
    tcase_add_test(c, quantised_model_loads);
    tcase_add_loop_test(c, sidecars, 0, 3);
    tcase_add_test(c, strange_tokenizers);
    suite_add_tcase(suite, c);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
