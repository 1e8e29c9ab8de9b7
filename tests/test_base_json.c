/* JSON, JSON Lines, and option structs read from JSON. */
#include <math.h>
#include <sys/stat.h>

#include "base_case.h"

/* ---- JSON ------------------------------------------------------------------------------------ */

START_TEST(json_values) {
    psoup_json *v = parse("{\"z\": 1, \"a\": [true, null, 2.5, \"é\\u20ac\\n\"], \"m\": {}, "
                          "\"big\": -9223372036854775808, \"f\": false}");
    const char *key = NULL, *order[] = {"z", "a", "m", "big", "f"};
    for (int i = 0; i < 5; i++) {
        ck_assert_ptr_eq(psoup_json_next(v, &key), psoup_json_get(v, order[i]));
        ck_assert_str_eq(key, order[i]);
    }
    ck_assert(psoup_json_next(v, &key) == NULL && key == NULL);
    const psoup_json *a = psoup_json_get(v, "a");
    ck_assert_uint_eq(psoup_json_size(v), 5);
    ck_assert_uint_eq(psoup_json_size(a), 4);
    ck_assert_int_eq(psoup_json_bool(psoup_json_at(a, 0), -1), 1);
    ck_assert_int_eq(psoup_json_kind(psoup_json_at(a, 1)), PSOUP_JSON_NULL);
    ck_assert_double_eq(psoup_json_real(psoup_json_at(a, 2), 0), 2.5);
    ck_assert_str_eq(psoup_json_string(psoup_json_at(a, 3), ""), "é€\n");
    ck_assert_ptr_null(psoup_json_at(a, 4));
    ck_assert(psoup_json_integer(psoup_json_get(v, "big"), 0) == INT64_MIN);
    ck_assert_double_eq(psoup_json_real(psoup_json_get(v, "z"), 0), 1.0);
    ck_assert_int_eq(psoup_json_integer(psoup_json_at(a, 2), 7), 7);
    ck_assert_str_eq(psoup_json_string(v, "other"), "other");
    ck_assert_int_eq(psoup_json_bool(psoup_json_get(v, "f"), 1), 0);
    ck_assert_int_eq(psoup_json_kind(NULL), PSOUP_JSON_NULL);
    ck_assert(psoup_json_get(a, "x") == NULL && psoup_json_at(v, 0) == NULL);
    ck_assert(psoup_json_size(NULL) == 0 && psoup_json_get(NULL, "x") == NULL);

    char *text = psoup_json_text(v, 0);
    ck_assert_str_eq(text, "{\"z\": 1, \"a\": [true, null, 2.5, \"é€\\n\"], \"m\": {}, \"big\": "
                           "-9223372036854775808, \"f\": false}");
    psoup_text_free(text);
    OK(psoup_json_write(context, at("v.json"), v, &error));
    check_text(at("v.json"),
               "{\n  \"z\": 1,\n  \"a\": [\n    true,\n    null,\n    2.5,\n    \"é€\\n\"\n  ],\n"
               "  \"m\": {},\n  \"big\": -9223372036854775808,\n  \"f\": false\n}\n");
    psoup_json *again, *copy = psoup_json_copy(v);
    psoup_json_free(v);
    OK(psoup_json_read(context, at("v.json"), &again, &error));
    char *one = psoup_json_text(again, 0), *two = psoup_json_text(copy, 0);
    ck_assert_str_eq(one, two);
    psoup_text_free(one);
    psoup_text_free(two);
    psoup_json_free(again);
    psoup_json_free(copy);
    FAILS(psoup_json_write(context, at("w.json"), NULL, &error), PSOUP_ERROR_ARGUMENT, "w.json");
    FAILS(psoup_json_read(context, at("none.json"), &again, &error), PSOUP_ERROR_IO,
          "none.json: cannot open: No such file");
    ck_assert_ptr_null(again);
}
END_TEST

START_TEST(json_numbers_and_long_texts) {
    psoup__random random = {.seed = 3};
    for (int i = 0; i < 20000; i++) {
        uint64_t bits = (uint64_t)psoup__random_word(&random) << 32 | psoup__random_word(&random);
        double value;
        memcpy(&value, &bits, 8);
        if (!isfinite(value))
            continue;
        psoup_json *v = psoup_json_new_real(value);
        char *text = psoup_json_text(v, 0);
        ck_assert(strtod(text, NULL) == value);
        psoup_text_free(text);
        psoup_json_free(v);
    }
    psoup_json *v = psoup_json_new_real(0.1), *nan = psoup_json_new_real((double)NAN);
    char *text = psoup_json_text(v, 0);
    ck_assert_str_eq(text, "0.1");
    ck_assert_int_eq(psoup_json_kind(nan), PSOUP_JSON_NULL);
    psoup_text_free(text);
    psoup_json_free(v);
    psoup_json_free(nan);

    char *big = malloc(10001);
    memset(big, 'x', 10000);
    big[10000] = '\0';
    for (int n = 500; n < 520; n++) { /* around the size of a scratch buffer */
        v = psoup_json_new_string(big + 10000 - n);
        text = psoup_json_text(v, 0);
        ck_assert_uint_eq(strlen(text), n + 2);
        psoup_text_free(text);
        psoup_json_free(v);
    }
    free(big);
}
END_TEST

START_TEST(json_builders) {
    psoup_json *o = psoup_json_new_object(), *a = psoup_json_new_array();
    int bad = psoup_json_append(a, psoup_json_new_bool(1));
    bad |= psoup_json_append(a, psoup_json_new_integer(-5));
    bad |= psoup_json_set(o, "a", a);
    bad |= psoup_json_set(o, "n", psoup_json_new_null());
    ck_assert_int_eq(bad, 0);
    char *text = psoup_json_text(o, 0);
    ck_assert_str_eq(text, "{\"a\": [true, -5], \"n\": null}");
    psoup_text_free(text);
    ck_assert_ptr_null(psoup_json_new_string("\xff"));
    ck_assert_int_eq(psoup_json_set(o, "x", psoup_json_new_string("\xff")), -1);
    ck_assert_int_eq(psoup_json_set(o, "\xff", psoup_json_new_bool(1)), -1);
    ck_assert_int_eq(psoup_json_set(NULL, "x", psoup_json_new_bool(1)), -1);
    ck_assert_int_eq(psoup_json_append(NULL, psoup_json_new_array()), -1);
    ck_assert_int_eq(psoup_json_append(o, psoup_json_new_array()), -1);
    psoup_json_free(o);
    psoup_json_free(NULL);
}
END_TEST

START_TEST(json_refused) {
    static const struct {
        const char *text, *says;
    } cases[] = {
        {"{\"a\": 1,\n \"a\": 2}", "cfg:2:"},
        {"{\"a\": 1, \"a\": 2}", "duplicate"},
        {"\"a\xff\"", "cfg:1:"},
        {"\"\xed\xa0\x80\"", "decode"},
        {"{} {}", "end of file"},
        {"{\n\"a\": }", "cfg:2:"},
        {"", "cfg:1:"},
        {"[1, 2", "cfg:1:"},
        {"\"\\u0000\"", "\\u0000"},
        {"{\"\\u0000\": 1}", "\\u0000"},
        {"[NaN]", "NaN"},
        {"1e999", "overflow"},
        {"{'a': 1}", "cfg:1:"},
        {"[1,]", "cfg:1:"},
    };
    psoup_json *v;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        FAILS(psoup_json_parse(cases[i].text, strlen(cases[i].text), "cfg", &v, &error),
              PSOUP_ERROR_FORMAT, cases[i].says);
        ck_assert_ptr_null(v);
        ck_assert_ptr_null(strchr(error.message, '\n'));
    }
    FAILS(psoup_json_parse("[1]\n \0 x", 8, "cfg", &v, &error), PSOUP_ERROR_FORMAT,
          "cfg:2:2: a NUL");
    char big[400];
    memset(big, '9', sizeof big);
    FAILS(psoup_json_parse(big, sizeof big, "cfg", &v, &error), PSOUP_ERROR_FORMAT, "overflow");
    /* what int64_t cannot hold is no integer any more */
    OK(psoup_json_parse("[99999999999999999999, -9223372036854775808]", 44, "cfg", &v, &error));
    ck_assert_int_eq(psoup_json_integer(psoup_json_at(v, 0), 7), 7);
    ck_assert_double_eq(psoup_json_real(psoup_json_at(v, 0), 0), 1e20);
    ck_assert_int_eq(psoup_json_integer(psoup_json_at(v, 1), 7), INT64_MIN);
    psoup_json_free(v);
    /* a text is its length, not its NUL */
    OK(psoup_json_parse("12", 1, "cfg", &v, &error));
    ck_assert_int_eq(psoup_json_integer(v, 0), 1);
    psoup_json_free(v);

    char deep[4096];
    memset(deep, '[', 512);
    memset(deep + 512, ']', 512);
    OK(psoup_json_parse(deep, 1024, "deep", &v, &error));
    psoup_json_free(v);
    memset(deep, '[', 513);
    memset(deep + 513, ']', 513);
    FAILS(psoup_json_parse(deep, 1026, "deep", &v, &error), PSOUP_ERROR_FORMAT,
          "deep:1:513: nested deeper than 512");
    size_t million = 1000000;
    char *bomb = malloc(million);
    memset(bomb, '[', million);
    FAILS(psoup_json_parse(bomb, million, "deep", &v, &error), PSOUP_ERROR_FORMAT, "deeper");
    for (size_t i = 0; i + 5 <= million; i += 5)
        memcpy(bomb + i, "{\"a\":", 5);
    FAILS(psoup_json_parse(bomb, million, "deep", &v, &error), PSOUP_ERROR_FORMAT, "deeper");
    free(bomb);
    /* brackets within strings are no nesting */
    memset(deep, '[', 2000);
    deep[0] = deep[1999] = '"', deep[1] = '\\', deep[2] = '"';
    OK(psoup_json_parse(deep, 2000, "deep", &v, &error));
    psoup_json_free(v);
}
END_TEST

/* ---- JSON Lines ---------------------------------------------------------------------------------
 */

static void check_rows(const char *path, int n, int64_t line_step) {
    psoup_jsonl_reader *reader;
    psoup_json *row;
    OK(psoup_jsonl_open(context, path, &reader, &error));
    for (int i = 0; i < n; i++) {
        OK(psoup_jsonl_next(reader, &row, &error));
        ck_assert_int_eq(psoup_json_integer(psoup_json_get(row, "i"), -1), i);
        if (line_step > 0)
            ck_assert_int_eq(psoup_jsonl_line(reader), 1 + i * line_step);
        psoup_json_free(row);
    }
    for (int i = 0; i < 2; i++) {
        OK(psoup_jsonl_next(reader, &row, &error));
        ck_assert_ptr_null(row);
    }
    psoup_jsonl_reader_free(reader);
}

START_TEST(jsonl_round_trip) {
    enum { n = 3000 };
    const char *files[] = {"rows.jsonl", "rows.jsonl.zst"};
    for (int f = 0; f < 2; f++) {
        psoup_jsonl_writer *writer;
        OK(psoup_jsonl_create(context, at(files[f]), 0, &writer, &error));
        for (int i = 0; i < n; i++) {
            psoup_json *row = numbered(i);
            OK(psoup_jsonl_write(writer, row, &error));
            psoup_json_free(row);
        }
        ck_assert(!psoup__file_exists(at(files[f])));
        OK(psoup_jsonl_close(writer, &error));
        psoup_json *row = numbered(0);
        FAILS(psoup_jsonl_write(writer, row, &error), PSOUP_ERROR_STATE, files[f]);
        FAILS(psoup_jsonl_close(writer, &error), PSOUP_ERROR_STATE, files[f]);
        psoup_json_free(row);
        psoup_jsonl_writer_free(writer);
        check_rows(at(files[f]), n, 1);
    }
    struct stat plain, small;
    ck_assert(stat(at(files[0]), &plain) == 0 && stat(at(files[1]), &small) == 0);
    ck_assert_int_lt(small.st_size * 4, plain.st_size);

    /* the same rows as one array, on one line and indented */
    psoup_json *array = psoup_json_new_array();
    for (int i = 0; i < n; i++)
        psoup_json_append(array, numbered(i));
    char *line = psoup_json_text(array, 0);
    put_text(at("line.json"), line);
    psoup_text_free(line);
    OK(psoup_json_write(context, at("array.json.zst"), array, &error));
    OK(psoup_json_write(context, at("array.json"), array, &error));
    psoup_json_free(array);
    check_rows(at("line.json"), n, 0);
    check_rows(at("array.json"), n, 0);
    check_rows(at("array.json.zst"), n, 0);
    put_text(at("small.json"), " \n[ ]\n");
    check_rows(at("small.json"), 0, 0);
    put_text(at("small.json"), "[\n{\"i\":0}\n,\n{\"i\":1}\n]\n");
    psoup_jsonl_reader *reader;
    psoup_json *row;
    OK(psoup_jsonl_open(context, at("small.json"), &reader, &error));
    for (int i = 0; i < 2; i++) {
        OK(psoup_jsonl_next(reader, &row, &error));
        ck_assert_int_eq(psoup_jsonl_line(reader), 2 + 2 * i);
        psoup_json_free(row);
    }
    psoup_jsonl_reader_free(reader);
    put_text(at("small.jsonl"), "\xef\xbb\xbf{\"i\":0}\r\n\r\n\n{\"i\": 1}");
    check_rows(at("small.jsonl"), 2, 3);
    put_text(at("small.jsonl"), "");
    check_rows(at("small.jsonl"), 0, 0);
}
END_TEST

START_TEST(jsonl_refused) {
    static const struct {
        const char *text;
        int good;
        const char *says;
    } cases[] = {
        {"{\"i\":0}\n{\"i\":\n", 1, "r.jsonl:2:"},
        {"{\"i\":0}\n\n{\"i\":1,\"i\":1}\n", 1, "r.jsonl:3:8: duplicate object key near '\"i\"'"},
        {"{\"i\":0}\n7\n", 1, "r.jsonl:2: expected an object, found an integer"},
        {"{\"i\":0} {}\n", 0, "r.jsonl:1:"},
        {"[{\"i\":0},\n{\"i\":\n x}]", 1, "r.jsonl:3:"},
        {"[{\"i\":0}\n{\"i\":1}]", 1, "r.jsonl:2: expected ','"},
        {"[{\"i\":0},\n]", 1, "r.jsonl:2: expected an object"},
        {"[3]", 0, "r.jsonl:1: expected an object"},
        {"[{\"i\":0}", 1, "expected ','"},
        {"[{\"i\":0}]\n\n{}", 1, "r.jsonl:3: expected the end"},
        {"[{\"i\":0},{\"i\":\"", 1, "r.jsonl:1:"},
        {"[{\"i\":0}, {\"i\"]", 1, "r.jsonl:1:"},
    };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        psoup_jsonl_reader *reader;
        psoup_json *row;
        put_text(at("r.jsonl"), cases[c].text);
        OK(psoup_jsonl_open(context, at("r.jsonl"), &reader, &error));
        for (int i = 0; i < cases[c].good; i++) {
            OK(psoup_jsonl_next(reader, &row, &error));
            psoup_json_free(row);
        }
        FAILS(psoup_jsonl_next(reader, &row, &error), PSOUP_ERROR_FORMAT, cases[c].says);
        ck_assert_ptr_null(row);
        psoup_jsonl_reader_free(reader);
    }
    psoup_jsonl_reader *reader;
    FAILS(psoup_jsonl_open(context, at("none.jsonl"), &reader, &error), PSOUP_ERROR_IO,
          "none.jsonl");
    ck_assert_ptr_null(reader);
}
END_TEST

START_TEST(jsonl_append) {
    psoup_jsonl_writer *writer;
    psoup_json *row = parse("{\"i\": 0}");
    put_text(at("log.jsonl"), "{\"cut\": ");
    OK(psoup_jsonl_create(context, at("log.jsonl"), 1, &writer, &error));
    OK(psoup_jsonl_write(writer, row, &error));
    check_text(at("log.jsonl"), "{\"cut\": \n{\"i\": 0}\n"); /* before it is closed */
    FAILS(psoup_jsonl_write(writer, NULL, &error), PSOUP_ERROR_ARGUMENT, "NULL");
    FAILS(psoup_jsonl_write(writer, psoup_json_get(row, "i"), &error), PSOUP_ERROR_ARGUMENT,
          "an integer");
    psoup_jsonl_writer_free(writer);
    OK(psoup_jsonl_create(context, at("log.jsonl"), 1, &writer, &error));
    OK(psoup_jsonl_write(writer, row, &error));
    OK(psoup_jsonl_close(writer, &error));
    psoup_jsonl_writer_free(writer);
    check_text(at("log.jsonl"), "{\"cut\": \n{\"i\": 0}\n{\"i\": 0}\n");
    FAILS(psoup_jsonl_create(context, at("log.jsonl.zst"), 1, &writer, &error),
          PSOUP_ERROR_ARGUMENT, ".zst");
    psoup_json_free(row);
}
END_TEST

/* ---- fields -----------------------------------------------------------------------------------
 */

typedef struct settings {
    size_t size;
    int32_t steps, flag, schedule;
    uint64_t seed;
    float rate;
    double precise;
    const char *name;
} settings;

static const psoup_field fields[] = {
    {"steps", PSOUP_FIELD_INT, offsetof(settings, steps), NULL, "Steps."},
    {"flag", PSOUP_FIELD_BOOL, offsetof(settings, flag), NULL, "Flag."},
    {"schedule", PSOUP_FIELD_ENUM, offsetof(settings, schedule), "linear|cosine|constant",
     "Shape."},
    {"seed", PSOUP_FIELD_UINT64, offsetof(settings, seed), NULL, "Seed."},
    {"learning_rate", PSOUP_FIELD_FLOAT, offsetof(settings, rate), NULL, "Rate."},
    {"precise", PSOUP_FIELD_DOUBLE, offsetof(settings, precise), NULL, "Double."},
    {"name", PSOUP_FIELD_STRING, offsetof(settings, name), NULL, "Name."},
    {NULL, PSOUP_FIELD_INT, 0, NULL, NULL},
};

START_TEST(option_fields) {
    settings s = {.steps = 1, .rate = 0.1f, .precise = 0.1, .seed = UINT64_MAX, .schedule = 2};
    psoup_json *v = psoup_fields_json(fields, &s);
    char *text = psoup_json_text(v, 0);
    ck_assert_str_eq(text, "{\"steps\": 1, \"flag\": false, \"schedule\": \"constant\", \"seed\": "
                           "\"18446744073709551615\", \"learning_rate\": 0.1, \"precise\": 0.1, "
                           "\"name\": null}");
    settings again = {.steps = 9, .name = "x"};
    OK(psoup_fields_read(fields, v, "cfg", &again, &error));
    ck_assert(again.steps == 1 && again.seed == UINT64_MAX && again.schedule == 2 &&
              again.precise == 0.1 && again.name == NULL);
    ck_assert_float_eq(again.rate, 0.1f);
    psoup_text_free(text);
    psoup_json_free(v);

    v = parse("{\"steps\": -3, \"flag\": true, \"schedule\": \"cosine\", \"seed\": 7, "
              "\"learning_rate\": 1, \"name\": \"run\", \"more\": 0}");
    OK(psoup_fields_read(fields, v, "cfg", &s, &error));
    ck_assert(s.steps == -3 && s.flag == 1 && s.schedule == 1 && s.seed == 7 && s.precise == 0.1);
    ck_assert_float_eq(s.rate, 1.0f);
    ck_assert_str_eq(s.name, "run");
    psoup_json_free(v);
    s.name = NULL; /* it was borrowed from v */

    psoup__random random = {.seed = 1};
    for (int i = 0; i < 2000; i++) { /* floats come back as they were */
        uint32_t bits = psoup__random_word(&random);
        memcpy(&s.rate, &bits, 4);
        if (!isfinite(s.rate))
            continue;
        v = psoup_fields_json(fields, &s);
        OK(psoup_fields_read(fields, v, "cfg", &again, &error));
        ck_assert_mem_eq(&again.rate, &s.rate, 4);
        psoup_json_free(v);
    }
}
END_TEST

START_TEST(fields_refused) {
    static const char *const cases[][2] = {
        {"{\"steps\": 1.5}", "cfg: member \"steps\": expected an integer of 32 bits, found 1.5"},
        {"{\"steps\": 2147483648}", "2147483648"},
        {"{\"steps\": \"1\"}", "\"1\""},
        {"{\"flag\": 1}", "\"flag\": expected true or false, found 1"},
        {"{\"schedule\": \"cosin\"}", "one of linear|cosine|constant, found \"cosin\""},
        {"{\"schedule\": \"\"}", "found \"\""},
        {"{\"schedule\": 1}", "found 1"},
        {"{\"seed\": -1}", "found -1"},
        {"{\"seed\": \"18446744073709551616\"}", "18446744073709551616"},
        {"{\"seed\": \" 1\"}", "\" 1\""},
        {"{\"seed\": \"-1\"}", "\"-1\""},
        {"{\"learning_rate\": 1e39}", "a number of 32 bits"},
        {"{\"learning_rate\": null}", "found null"},
        {"{\"precise\": \"x\"}", "a number, found \"x\""},
        {"{\"name\": [1]}", "a string or null, found [1]"},
        {"[]", "cfg: expected an object, found an array"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        settings s = {0};
        psoup_json *v = parse(cases[i][0]);
        FAILS(psoup_fields_read(fields, v, "cfg", &s, &error), PSOUP_ERROR_ARGUMENT, cases[i][1]);
        psoup_json_free(v);
    }
    static const psoup_field more[] = {{"kl_coef", PSOUP_FIELD_FLOAT, 0, NULL, ""},
                                       {NULL, PSOUP_FIELD_INT, 0, NULL, NULL}};
    const psoup_field *const tables[] = {fields, more};
    psoup_json *v = parse("{\"kl_coef\": 1, \"steps\": 1, \"learning_rat\": 2}");
    FAILS(psoup_fields_check(tables, 2, v, "cfg", &error), PSOUP_ERROR_ARGUMENT,
          "cfg: unknown member \"learning_rat\"; the nearest known one is \"learning_rate\"");
    FAILS(psoup_fields_check(tables, 1, v, "cfg", &error), PSOUP_ERROR_ARGUMENT, "\"kl_coef\"");
    FAILS(psoup_fields_check(tables, 0, v, "cfg", &error), PSOUP_ERROR_ARGUMENT, "none is");
    psoup_json_free(v);
    v = parse("{\"kl_coef\": 1, \"steps\": 1}");
    OK(psoup_fields_check(tables, 2, v, "cfg", &error));
    psoup_json_free(v);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("base json");
    TCase *c = tcase_create("json");
    tcase_set_timeout(c, 120);
    tcase_add_checked_fixture(c, set_up, tear_down);
    tcase_add_test(c, json_values);
    tcase_add_test(c, json_numbers_and_long_texts);
    tcase_add_test(c, json_builders);
    tcase_add_test(c, json_refused);
    tcase_add_test(c, jsonl_round_trip);
    tcase_add_test(c, jsonl_refused);
    tcase_add_test(c, jsonl_append);
    tcase_add_test(c, option_fields);
    tcase_add_test(c, fields_refused);
    suite_add_tcase(suite, c);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
