/* Files that someone has tampered with: every kind of file that the library reads, changed at random
 * thousands of times and read through the public interface. Each reading ends well, or in a clean
 * error of one line that names the file. What was read well must also be usable. */

#include "base/base.h"
#include "world_case.h"

#ifndef __has_feature
#define __has_feature(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
enum { CHECKED = 1 }; /* every access is checked: ten times slower */
#else
enum { CHECKED = 0 };
#endif
enum { ROOM = 1 << 16 };

typedef struct text {
    unsigned char data[ROOM];
    size_t n;
} text;

typedef struct kind {
    const char *name;
    const char *file; /* the one that is changed */
    psoup_status (*read)(void);
    bool binary; /* starts with a length and a header, where most changes go */
} kind;

static uint32_t below(psoup__random *r, size_t n) {
    return psoup__random_below(r, n > 0 ? (uint32_t)n : 1);
}

/* ---- files ------------------------------------------------------------------------------------------ */

static void get(const char *path, text *out) {
    FILE *file = fopen(path, "rb");
    ck_assert_msg(file != NULL, "%s", path);
    out->n = fread(out->data, 1, ROOM, file);
    ck_assert(out->n < ROOM);
    fclose(file);
}

static void put(const char *path, const void *data, size_t n) {
    FILE *file = fopen(path, "wb");
    ck_assert(file != NULL && fwrite(data, 1, n, file) == n && fclose(file) == 0);
}

static void put_text(const char *name, const char *line) {
    put(at(name), line, strlen(line));
}

/* ---- changes ---------------------------------------------------------------------------------------- */

/* Puts `n` bytes in the place of t[from, to). */
static void splice(text *t, size_t from, size_t to, const void *bytes, size_t n) {
    unsigned char kept[ROOM];
    size_t tail = t->n - to;
    if (from + n + tail >= ROOM)
        return;
    memcpy(kept, t->data + to, tail);
    memmove(t->data + from, bytes, n);
    memcpy(t->data + from + n, kept, tail);
    t->n = from + n + tail;
}

static void change_number(text *t, psoup__random *r) {
    static const char *const numbers[] = {
        "0", "-1", "1", "2", "65536", "2147483647", "2147483648", "4294967296", "-9223372036854775808",
        "9223372036854775807", "18446744073709551616", "1e308", "1e999", "-0.5", "1e-400", "true",
        "null", "\"8\"", "[]", "{}", "4611686018427387904", "100000001", "1.5"};
    size_t from = below(r, t->n), to;
    while (from < t->n && (t->data[from] < '0' || t->data[from] > '9'))
        from++;
    for (to = from; to < t->n && t->data[to] >= '0' && t->data[to] <= '9';)
        to++;
    const char *with = numbers[below(r, sizeof numbers / sizeof *numbers)];
    if (to > from)
        splice(t, from, to, with, strlen(with));
}

static void change_length(text *t, psoup__random *r) {
    uint64_t length = 0;
    const uint64_t odd[] = {0, 1, 7, t->n, t->n - 8, t->n - 7, 100000000, 100000001, UINT64_MAX,
                            UINT64_MAX - 7, (uint64_t)1 << 63, (uint64_t)1 << 32};
    if (t->n < 8)
        return;
    for (int i = 0; i < 8; i++)
        length |= (uint64_t)t->data[i] << 8 * i;
    uint32_t pick = below(r, sizeof odd / sizeof *odd + 2);
    length = pick < 2 ? length + 2 * (uint64_t)pick - 1 : odd[pick - 2];
    for (int i = 0; i < 8; i++)
        t->data[i] = (unsigned char)(length >> 8 * i);
}

static void change(const kind *k, text *t, psoup__random *r) {
    static const char odd[] = "{}[]\",:\\-+.eE0917\n\r\t\0\x7f\x80\xc0\xff\xed/u* ";
    size_t within = t->n;
    if (k->binary && t->n > 8 && below(r, 8) != 0) {
        size_t header = t->data[0] | (size_t)t->data[1] << 8;
        within = header + 8 < t->n ? header + 8 : t->n;
    }
    if (t->n == 0)
        return;
    size_t from = below(r, within), to = from + below(r, t->n - from < 40 ? t->n - from : 40);
    size_t other = below(r, t->n), length = below(r, t->n - other < 60 ? t->n - other : 60);
    unsigned char piece[64];
    switch (below(r, k->binary ? 9 : 8)) {
    case 0:
        t->data[from] ^= (unsigned char)(1u << below(r, 8));
        break;
    case 1:
        t->data[from] = (unsigned char)odd[below(r, sizeof odd - 1)];
        break;
    case 2: /* cut short */
        t->n = below(r, 4) == 0 ? from : t->n - below(r, t->n < 16 ? t->n : 16);
        break;
    case 3: /* taken out */
        splice(t, from, to, "", 0);
        break;
    case 4: /* a piece from elsewhere, over or between */
    case 5:
        memcpy(piece, t->data + other, length);
        splice(t, from, below(r, 2) ? to : from, piece, length);
        break;
    case 6:
    case 7:
        change_number(t, r);
        break;
    default:
        change_length(t, r);
    }
}

/* ---- readings --------------------------------------------------------------------------------------- */

/* A model that was read is used once. */
static void use_model(const float *mix) {
    const int32_t tokens[3] = {1, 2, 3};
    float out[2];
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    OK(psoup_model_get_config(model, &config, &error));
    if (config.vocab_size > 3)
        (void)psoup_model_logprobs(model, &(psoup_row){tokens, 3, mix}, 1, out, NULL);
}

static psoup_status read_model_at(const char *name) {
    psoup_status status = psoup_model_load(context, at(name), &model, &error);
    if (status == PSOUP_OK)
        use_model(NULL);
    else
        ck_assert_ptr_null(model);
    psoup_model_free(model);
    model = NULL;
    return status;
}

static psoup_status read_model(void) {
    return read_model_at("base");
}

static psoup_status read_sharded(void) {
    return read_model_at("sharded");
}

static psoup_status read_adapter(void) {
    static const float mix[1] = {1};
    psoup_status status = psoup_model_load_adapter(model, "x", at("P1A"), &error);
    ck_assert_int_eq(psoup_model_adapters(model), status == PSOUP_OK);
    if (status == PSOUP_OK) {
        use_model(mix);
        OK(psoup_model_remove_adapter(model, "x", &error));
    }
    return status;
}

static psoup_status merge(const char *base, const char *source) {
    psoup_merger *merger;
    psoup_status status = psoup_merger_create(context, NULL, &merger, &error);
    if (status == PSOUP_OK && base != NULL)
        status = psoup_merger_set_base(merger, at(base), &error);
    if (status == PSOUP_OK)
        status = psoup_merger_add(merger, at(source), 1, &error);
    if (status == PSOUP_OK)
        status = psoup_merger_write(merger, at("out/merged"), &error);
    psoup_merger_free(merger);
    return status;
}

static psoup_status merge_adapter(void) {
    return merge(NULL, "P1A");
}

static psoup_status fold_adapter(void) {
    return merge("base", "P1A");
}

static psoup_status merge_model(void) {
    return merge(NULL, "base");
}

static psoup_status read_reward(void) {
    const int32_t tokens[3] = {1, 2, 3};
    float score;
    psoup_reward *r;
    psoup_status status = psoup_reward_load(model, "r", at("reward"), &r, &error);
    ck_assert_int_eq(psoup_model_adapters(model), status == PSOUP_OK);
    if (status == PSOUP_OK) {
        (void)psoup_reward_score(r, &(psoup_row){tokens, 3, NULL}, 1, &score, NULL);
        psoup_reward_free(r);
        OK(psoup_model_remove_adapter(model, "r", &error));
    }
    return status;
}

static psoup_status read_tokenizer(void) {
    static const char said[] = "Hello <s> caf\xc3\xa9\n\xff 12 soups </s>";
    psoup_tokenizer *t;
    int32_t ids[4 * sizeof said + 8];
    char back[256];
    size_t n, length;
    psoup_status status = psoup_tokenizer_load(context, at("tokenizer.json"), &t, &error);
    if (status == PSOUP_OK &&
        psoup_tokenizer_encode(t, said, sizeof said - 1, PSOUP_ADD_SPECIAL, ids, NULL,
                               sizeof ids / sizeof *ids, &n, NULL) == PSOUP_OK &&
        n <= sizeof ids / sizeof *ids)
        OK(psoup_tokenizer_decode(t, ids, n, 0, back, sizeof back, &length, &error));
    psoup_tokenizer_free(t);
    return status;
}

static psoup_status read_rows(const char *path) {
    psoup_jsonl_reader *reader;
    psoup_json *row = NULL;
    psoup_status status = psoup_jsonl_open(context, path, &reader, &error);
    while (status == PSOUP_OK) {
        status = psoup_jsonl_next(reader, &row, &error);
        if (row == NULL)
            break;
        psoup_text_free(psoup_json_text(row, 1));
        psoup_json_free(row);
    }
    psoup_jsonl_reader_free(reader);
    return status;
}

static psoup_status read_jsonl(void) {
    return read_rows(at("rows.jsonl"));
}

static psoup_status read_zst(void) {
    return read_rows(at("rows.jsonl.zst"));
}

static psoup_status read_preferences(void) {
    psoup_preferences *all;
    int32_t members[16];
    char name[32];
    psoup_status status = psoup_preferences_load(context, at("preferences.json"), &all, &error);
    if (status == PSOUP_OK && psoup_users_count(all) > 0 && psoup_user_size(all) <= 16)
        (void)psoup_user_get(all, psoup_users_count(all) - 1, members, name, sizeof name, NULL);
    psoup_preferences_free(all);
    return status;
}

static psoup_status read_options(const char *path, const psoup_field *fields, void *options) {
    psoup_json *value = NULL;
    psoup_status status = psoup_json_read(context, path, &value, &error);
    if (status == PSOUP_OK)
        status = psoup_fields_check(&fields, 1, value, path, &error);
    if (status == PSOUP_OK)
        status = psoup_fields_read(fields, value, path, options, &error);
    if (status == PSOUP_OK)
        psoup_json_free(psoup_fields_json(fields, options));
    psoup_json_free(value);
    return status;
}

static psoup_status read_ppo(void) {
    psoup_ppo_options options = PSOUP_PPO_OPTIONS_INIT;
    return read_options(at("ppo.json"), psoup_ppo_fields(), &options);
}

static psoup_status read_sft(void) {
    psoup_sft_options options = PSOUP_SFT_OPTIONS_INIT;
    return read_options(at("sft.json"), psoup_sft_fields(), &options);
}

/* ---- the files before ------------------------------------------------------------------------------- */

static void copy(const char *from, const char *to) {
    static text t;
    get(from, &t);
    put(at(to), t.data, t.n);
}

static void write_options(const char *name, const psoup_field *fields, const void *options) {
    psoup_json *value = psoup_fields_json(fields, options);
    OK(psoup_json_write(context, at(name), value, &error));
    psoup_json_free(value);
}

static void set_up(void) {
    static const char *const shard[] = {"config.json", "model-00001-of-00002.safetensors",
                                        "model-00002-of-00002.safetensors",
                                        "model.safetensors.index.json"};
    psoup_ppo_options ppo = PSOUP_PPO_OPTIONS_INIT;
    psoup_sft_options sft = PSOUP_SFT_OPTIONS_INIT;
    psoup_jsonl_writer *writer;
    make_world();
    load_reward();
    OK(psoup_reward_save(reward, at("reward"), NULL, &error));
    mkdir(at("sharded"), 0777);
    for (size_t i = 0; i < sizeof shard / sizeof *shard; i++) {
        char from[128], to[128];
        snprintf(from, sizeof from, "tests/golden/format/sharded/%s", shard[i]);
        snprintf(to, sizeof to, "sharded/%s", shard[i]);
        copy(from, to);
    }
    copy("tests/golden/text/llama3.json", "tokenizer.json");
    put_text("rows.jsonl", "{\"id\": 1, \"text\": \"a \\\"soup\\\" \\u00e9 \\ud83c\\udf72\", \"x\": [1.5e3, null, "
                           "true]}\n\n{\"id\": -2, \"in\": {\"deep\": [[], {}]}}\n");
    put_text("preferences.json",
             "[{\"symbol\": \"X1\", \"dimension\": \"d\", \"prompt\": \"Generate one.\"},\n{\"symbol\": "
             "\"X2\", \"dimension\": \"d\", \"prompt\": \"Generate two.\", \"opposite\": \"X1\"}]\n");
    OK(psoup_jsonl_create(context, at("rows.jsonl.zst"), 0, &writer, &error));
    for (int i = 0; i < 3; i++) {
        psoup_json *row = psoup_json_new_object();
        psoup_json_set(row, "text", psoup_json_new_string("soup, soups and more soup"));
        OK(psoup_jsonl_write(writer, row, &error));
        psoup_json_free(row);
    }
    OK(psoup_jsonl_close(writer, &error));
    psoup_jsonl_writer_free(writer);
    write_options("ppo.json", psoup_ppo_fields(), &ppo);
    write_options("sft.json", psoup_sft_fields(), &sft);
    release();
}

/* ---- the test --------------------------------------------------------------------------------------- */

static const kind kinds[] = {
    {"weights", "base/model.safetensors", read_model, true},
    {"config.json", "base/config.json", read_model, false},
    {"index.json", "sharded/model.safetensors.index.json", read_sharded, false},
    {"a shard", "sharded/model-00002-of-00002.safetensors", read_sharded, true},
    {"adapter_config.json", "P1A/adapter_config.json", read_adapter, false},
    {"adapter weights", "P1A/adapter_model.safetensors", read_adapter, true},
    {"merged config", "P1A/adapter_config.json", merge_adapter, false},
    {"merged weights", "P1A/adapter_model.safetensors", merge_adapter, true},
    {"folded weights", "P1A/adapter_model.safetensors", fold_adapter, true},
    {"a merged model", "base/model.safetensors", merge_model, true},
    {"reward weights", "reward/adapter_model.safetensors", read_reward, true},
    {"tokenizer.json", "tokenizer.json", read_tokenizer, false},
    {"JSON Lines", "rows.jsonl", read_jsonl, false},
    {"compressed rows", "rows.jsonl.zst", read_zst, false},
    {"preferences", "preferences.json", read_preferences, false},
    {"PPO options", "ppo.json", read_ppo, false},
    {"SFT options", "sft.json", read_sft, false},
};

/* A message of one clean line that names the file, or the directory it is in. */
static void check_message(const kind *k, long i, psoup_status status) {
    const unsigned char *m = (const unsigned char *)error.message;
    size_t length = strlen(error.message);
    ck_assert_msg(status >= PSOUP_ERROR_ARGUMENT && status <= PSOUP_ERROR_UNSUPPORTED,
                  "%s %ld: status %d: %s", k->name, i, (int)status, error.message);
    ck_assert_msg(error.status == status, "%s %ld: two statuses: %s", k->name, i, error.message);
    ck_assert_msg(length > 0 && length < sizeof error.message, "%s %ld: no message", k->name, i);
    ck_assert_msg(psoup__is_utf8(error.message), "%s %ld: not UTF-8", k->name, i);
    for (size_t c = 0; c < length; c++)
        ck_assert_msg(m[c] >= 0x20 && m[c] != 0x7f, "%s %ld: not one clean line", k->name, i);
    ck_assert_msg(strstr(error.message, home) != NULL, "%s %ld: names no file: %s", k->name, i,
                  error.message);
}

START_TEST(changed_files) {
    static text whole, t;
    const kind *k = &kinds[_i];
    long n = getenv("PSOUP_LONG") == NULL ? 2000 : CHECKED ? 5000 : 40000, good = 0;
    open_context(1);
    get(at(k->file), &whole);
    if (k->read == read_adapter || k->read == read_reward)
        OK(psoup_model_load(context, at("base"), &model, &error));
    OK(k->read()); /* unchanged */
    for (long i = 0; i < n; i++) {
        psoup__random r = {.seed = (uint64_t)_i, .sequence = (uint64_t)i};
        t = whole;
        for (uint32_t changes = 1 + below(&r, 3); changes > 0; changes--)
            change(k, &t, &r);
        put(at(k->file), t.data, t.n);
        memset(&error, 0, sizeof error);
        psoup_status status = k->read();
        good += status == PSOUP_OK;
        if (status != PSOUP_OK)
            check_message(k, i, status);
    }
    ck_assert_msg(good < n, "%s: no change was seen", k->name);
    printf("%-20s %6ld changed files, %6ld read well\n", k->name, n, good);
    release();
}
END_TEST

int main(void) {
    Suite *suite = suite_create("hostile");
    TCase *tests = tcase_create("hostile");
    tcase_add_checked_fixture(tests, set_up, end_world);
    tcase_set_timeout(tests, 1200);
    tcase_add_loop_test(tests, changed_files, 0, (int)(sizeof kinds / sizeof *kinds));
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failures = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failures ? 1 : 0;
}
