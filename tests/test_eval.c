/* Preferences, templates, win rates. */
#include <math.h>

#include "base_case.h"
#include "eval/eval.h"

/* ---- preferences ------------------------------------------------------------------------------- */

START_TEST(catalogue) {
    static const char *const rows[8][4] = {
        {"P1A", "expertise", "P1B",
         " a response that can be easily understood by an elementary school student."},
        {"P1B", "expertise", "P1A",
         " a response that only a PhD Student in that specific field could understand."},
        {"P2A", "informativeness", "P2B",
         " a response that is concise and to the point, without being verbose."},
        {"P2B", "informativeness", "P2A",
         " a response that is very informative, without missing any background information."},
        {"P3A", "style", "P3B",
         " a response that is friendly, witty, funny, and humorous, like a close friend."},
        {"P3B", "style", "P3A", " a response in an unfriendly manner."},
        {"P3C", "style", "P3A", " a response in a sassy manner."},
        {"P3D", "style", "P3A", " a response in a sarcastic manner."}};
    for (int with_new = 0; with_new < 2; with_new++) {
        psoup_preferences *p;
        OK(psoup_preferences_default(context, with_new, &p, &error));
        ck_assert_uint_eq(psoup_preferences_count(p), with_new ? 8 : 6);
        for (size_t i = 0; i < psoup_preferences_count(p); i++) {
            const psoup_preference *item = psoup_preferences_get(p, i);
            ck_assert_str_eq(item->symbol, rows[i][0]);
            ck_assert_str_eq(item->dimension, rows[i][1]);
            ck_assert_str_eq(item->opposite, rows[i][2]);
            ck_assert(!strncmp(item->prompt, "Generate", 8) && !strcmp(item->prompt + 8, rows[i][3]));
            ck_assert(!strncmp(item->criterion, "Choose", 6) &&
                      !strcmp(item->criterion + 6, rows[i][3]));
            ck_assert_int_eq(psoup_preferences_find(p, rows[i][0]), (int)i);
        }
        ck_assert_ptr_null(psoup_preferences_get(p, with_new ? 8 : 6));
        ck_assert_int_eq(psoup_preferences_find(p, "P3"), -1);
        psoup_preferences_free(p);
    }
}
END_TEST

static void check_users(psoup_preferences *p, const char *const *expected, size_t n) {
    int32_t members[3];
    char name[4];
    ck_assert_uint_eq(psoup_users_count(p), n);
    ck_assert_uint_eq(psoup_user_size(p), 3);
    for (size_t u = 0; u < n; u++) {
        OK(psoup_user_get(p, u, members, name, sizeof name, &error));
        ck_assert_str_eq(name, expected[u]);
        for (int d = 0; d < 3; d++) {
            char symbol[] = {'P', (char)('1' + d), expected[u][d], 0};
            ck_assert_int_eq(members[d], psoup_preferences_find(p, symbol));
        }
        OK(psoup_user_get(p, u, members, NULL, 0, &error));
    }
    FAILS(psoup_user_get(p, n, members, name, sizeof name, &error), PSOUP_ERROR_ARGUMENT, "user ");
    FAILS(psoup_user_get(p, 0, members, name, 3, &error), PSOUP_ERROR_ARGUMENT, "name_size is 3");
    psoup_preferences_free(p);
}

START_TEST(users) {
    static const char *const eight[] = {"AAA", "AAB", "ABA", "ABB", "BAA", "BAB", "BBA", "BBB"};
    static const char *const sixteen[] = {"AAA", "AAB", "AAC", "AAD", "ABA", "ABB", "ABC", "ABD",
                                          "BAA", "BAB", "BAC", "BAD", "BBA", "BBB", "BBC", "BBD"};
    psoup_preferences *p;
    OK(psoup_preferences_default(context, 0, &p, &error));
    check_users(p, eight, 8);
    OK(psoup_preferences_default(context, 1, &p, &error));
    check_users(p, sixteen, 16);
    /* dimensions that do not stand together, numbered as they first appear */
    put_text(at("p.jsonl"), "{\"symbol\": \"P1A\", \"dimension\": \"x\", \"prompt\": \"1\"}\n"
                            "{\"symbol\": \"P2A\", \"dimension\": \"y\", \"prompt\": \"2\"}\n"
                            "{\"symbol\": \"P1B\", \"dimension\": \"x\", \"prompt\": \"3\"}\n"
                            "{\"symbol\": \"P3A\", \"dimension\": \"z\", \"prompt\": \"4\"}\n"
                            "{\"symbol\": \"P2B\", \"dimension\": \"y\", \"prompt\": \"5\"}\n"
                            "{\"symbol\": \"P3B\", \"dimension\": \"z\", \"prompt\": \"6\"}\n");
    OK(psoup_preferences_load(context, at("p.jsonl"), &p, &error));
    check_users(p, eight, 8);
}
END_TEST

#define TWO                                                                                        \
    "{\"symbol\": \"N1\", \"dimension\": \"tone\", \"prompt\": \"Generate it loudly.\", "          \
    "\"opposite\": \"N2\"}",                                                                       \
        "{\"symbol\": \"N2\", \"dimension\": \"tone\", \"prompt\": \"Whisper.\", "                 \
        "\"criterion\": \"The quieter.\", \"opposite\": null, \"note\": 5}"

START_TEST(loaded) {
    const char *const rows[] = {TWO};
    char array[1024], lines[1024];
    snprintf(array, sizeof array, "[%s,\n %s]", rows[0], rows[1]);
    snprintf(lines, sizeof lines, "%s\n\n%s", rows[0], rows[1]);
    put_text(at("p.json"), array);
    put_text(at("p.jsonl"), lines);
    psoup_jsonl_writer *writer;
    OK(psoup_jsonl_create(context, at("p.jsonl.zst"), 0, &writer, &error));
    for (int i = 0; i < 2; i++) {
        psoup_json *row = parse(rows[i]);
        OK(psoup_jsonl_write(writer, row, &error));
        psoup_json_free(row);
    }
    OK(psoup_jsonl_close(writer, &error));
    psoup_jsonl_writer_free(writer);
    const char *const files[] = {"p.json", "p.jsonl", "p.jsonl.zst"};
    for (int i = 0; i < 3; i++) {
        psoup_preferences *p;
        OK(psoup_preferences_load(context, at(files[i]), &p, &error));
        ck_assert_uint_eq(psoup_preferences_count(p), 2);
        const psoup_preference *one = psoup_preferences_get(p, 0), *two = psoup_preferences_get(p, 1);
        ck_assert_str_eq(one->criterion, "Choose it loudly.");
        ck_assert_str_eq(one->opposite, "N2");
        ck_assert_str_eq(two->prompt, "Whisper.");
        ck_assert_str_eq(two->criterion, "The quieter.");
        ck_assert_ptr_null(two->opposite);
        ck_assert_uint_eq(psoup_users_count(p), 2);
        psoup_preferences_free(p);
    }
}
END_TEST

START_TEST(catalogues_refused) {
    static const struct {
        const char *text;
        psoup_status status;
        const char *says;
    } bad[] = {
        {"", PSOUP_ERROR_FORMAT, "no preferences"},
        {"[]", PSOUP_ERROR_FORMAT, "no preferences"},
        {"{\"symbol\": \"A\", \"dimension\": \"d\"}", PSOUP_ERROR_FORMAT,
         "preference 1: \"prompt\" is missing"},
        {"{\"symbol\": \"A\", \"dimension\": \"d\", \"prompt\": \"p\"}\n{\"symbol\": \"B\"}",
         PSOUP_ERROR_FORMAT, "preference 2: \"dimension\" is missing"},
        {"{\"dimension\": \"d\", \"prompt\": \"p\"}", PSOUP_ERROR_FORMAT, "\"symbol\" is missing"},
        {"{\"symbol\": \"\", \"dimension\": \"d\", \"prompt\": \"p\"}", PSOUP_ERROR_FORMAT,
         "\"symbol\" is empty"},
        {"{\"symbol\": \"A\", \"dimension\": \"d\", \"prompt\": 3}", PSOUP_ERROR_FORMAT,
         "\"prompt\" is no text"},
        {"{\"symbol\": \"A\", \"dimension\": \"d\", \"prompt\": \"p\", \"opposite\": 3}",
         PSOUP_ERROR_FORMAT, "\"opposite\" is no text"},
        {"{\"symbol\": \"A\", \"dimension\": \"d\", \"prompt\": \"p\", \"opposite\": \"Z\"}",
         PSOUP_ERROR_FORMAT, "\"A\" names the opposite \"Z\""},
        {"[{\"symbol\": \"A\", \"dimension\": \"d\", \"prompt\": \"p\"},"
         "{\"symbol\": \"A\", \"dimension\": \"e\", \"prompt\": \"q\"}]",
         PSOUP_ERROR_FORMAT, "\"A\" appears twice"},
        {"{\"symbol\": ", PSOUP_ERROR_FORMAT, "p.json:1"},
        {"7", PSOUP_ERROR_FORMAT, "p.json"},
    };
    psoup_preferences *p;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        put_text(at("p.json"), bad[i].text);
        FAILS(psoup_preferences_load(context, at("p.json"), &p, &error), bad[i].status,
              bad[i].says);
        CONTAINS("p.json");
        ck_assert_ptr_null(p);
    }
    FAILS(psoup_preferences_load(context, at("none"), &p, &error), PSOUP_ERROR_IO, "none");
    psoup_preferences_free(NULL);
}
END_TEST

/* ---- templates --------------------------------------------------------------------------------- */

START_TEST(templates) {
    static const struct {
        const char *name, *instruction, *input, *preference, *expected;
    } cases[] = {
        {NULL, "Why?", NULL, NULL, "<|user|>\nWhy?\n<|assistant|>\n"},
        {NULL, "Why?", "", "", "<|user|>\nWhy?\n<|assistant|>\n"},
        {"tulu", "Why?", "Rain.", NULL, "<|user|>\nWhy? Rain.\n<|assistant|>\n"},
        {"tulu", "Why?", NULL, "Be brief.", "<|user|>\nWhy? Be brief.\n<|assistant|>\n"},
        {NULL, "Why?", "Rain.", "Be brief.", "<|user|>\nWhy? Rain. Be brief.\n<|assistant|>\n"},
        {NULL, "", "Rain.", "Be brief.", "<|user|>\nRain. Be brief.\n<|assistant|>\n"},
        {NULL, "", "", "Be brief.", "<|user|>\nBe brief.\n<|assistant|>\n"},
        {NULL, "", "", "", "<|user|>\n\n<|assistant|>\n"},
        /* what a part holds is not a template again */
        {NULL, "{input} {x}", "{preference}", NULL,
         "<|user|>\n{input} {x} {preference}\n<|assistant|>\n"},
        {"alpaca", "Why?", NULL, "Be brief.",
         "Below is an instruction that describes a task. Write a response that appropriately "
         "completes the request.\n\n### Instruction:\nWhy? Be brief.\n\n### Response:\n"},
        {"{preference} {instruction} {input} =", "Why?", NULL, NULL, "Why? ="},
        {"{preference}\n{instruction}\n{instruction}", "Why?", NULL, NULL, "\nWhy?\nWhy?"},
        {"[{input}] {instruction}", "Why?", "", NULL, "[] Why?"},
        {"{ {instruction} }", "Why?", NULL, NULL, "{ Why? }"},
    };
    char *text;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        OK(psoup_template_fill(cases[i].name, cases[i].instruction, cases[i].input,
                               cases[i].preference, &text, &error));
        ck_assert_str_eq(text, cases[i].expected);
        psoup_text_free(text);
    }
    FAILS(psoup_template_fill("tula", "Why?", NULL, NULL, &text, &error), PSOUP_ERROR_ARGUMENT,
          "\"tula\"");
    ck_assert_ptr_null(text);
    FAILS(psoup_template_fill("{input}", "Why?", NULL, NULL, &text, &error), PSOUP_ERROR_ARGUMENT,
          "{instruction}");
    FAILS(psoup_template_fill(NULL, NULL, NULL, NULL, &text, &error), PSOUP_ERROR_ARGUMENT, "NULL");
}
END_TEST

/* ---- win rates --------------------------------------------------------------------------------- */

static void check_counts(const psoup_rate *r, int wins, int ties, int losses, int unparsed) {
    ck_assert_msg(r->wins == wins && r->ties == ties && r->losses == losses &&
                      r->unparsed == unparsed,
                  "%d won %d tied %d lost %d unparsed", (int)r->wins, (int)r->ties, (int)r->losses,
                  (int)r->unparsed);
    if (wins + losses)
        ck_assert_double_eq_tol(r->rate, (double)wins / (wins + losses), 1e-12);
    else
        ck_assert(isnan(r->rate) && isnan(r->low) && isnan(r->high));
}

START_TEST(winrate_by_hand) {
    const int32_t c[] = {0, 2, 4}, other[] = {1, 2, 5};
    const int32_t v[][3] = {{1, 1, -1}, {1, -1, 0}, {0, 0, 0}, {-1, 0, 2}, {2, 2, 2}, {1, 2, 2}};
    const int32_t helpful[] = {1, -1, 2, 0, -1, 1};
    psoup_duel duels[6];
    for (int i = 0; i < 6; i++)
        duels[i] = (psoup_duel){.prompt = i / 2 - 1,
                                .preferences = i == 3 ? other : c,
                                .verdicts = v[i],
                                .n = 3,
                                .helpfulness = helpful[i]};
    psoup_rate r;
    OK(psoup_winrate_aggregate(context, duels, 6, 1, &r, &error));
    check_counts(&r, 2, 3, 1, 6); /* signs 1 0 0 −1 0 1 */
    OK(psoup_winrate_criterion(context, duels, 6, 0, 1, &r, &error));
    check_counts(&r, 3, 1, 0, 1);
    ck_assert(r.low == 1 && r.high == 1);
    OK(psoup_winrate_criterion(context, duels, 6, 2, 1, &r, &error));
    check_counts(&r, 1, 2, 1, 2);
    OK(psoup_winrate_criterion(context, duels, 6, 5, 1, &r, &error));
    check_counts(&r, 0, 0, 0, 1);
    OK(psoup_winrate_criterion(context, duels, 6, 3, 1, &r, &error));
    check_counts(&r, 0, 0, 0, 0);
    OK(psoup_winrate_helpfulness(context, duels, 6, 1, &r, &error));
    check_counts(&r, 2, 1, 2, 1);
    OK(psoup_winrate_aggregate(context, NULL, 0, 1, &r, &error));
    check_counts(&r, 0, 0, 0, 0);
}
END_TEST

/* 60 of 100 independent prompts: the normal approximation is 0.6 ± 1.96 √(0.24/100); the same duels
 * asked five times say no more than once. */
START_TEST(winrate_clusters) {
    psoup_duel duels[500];
    psoup_rate once, five, again;
    const double half = 1.96 * sqrt(0.24 / 100);
    for (int i = 0; i < 500; i++)
        duels[i] = (psoup_duel){.prompt = i % 100, .helpfulness = i % 100 < 60 ? 1 : -1};
    OK(psoup_winrate_helpfulness(context, duels, 100, 3, &once, &error));
    OK(psoup_winrate_helpfulness(context, duels, 500, 3, &five, &error));
    check_counts(&five, 300, 0, 200, 0);
    ck_assert_double_eq_tol(once.low, 0.6 - half, 0.02);
    ck_assert_double_eq_tol(once.high, 0.6 + half, 0.02);
    ck_assert(once.low == five.low && once.high == five.high);
    OK(psoup_winrate_helpfulness(context, duels, 100, 4, &again, &error));
    ck_assert_double_eq_tol(again.low, once.low, 0.02);
    for (int i = 0; i < 500; i++)
        duels[i].prompt = i;
    OK(psoup_winrate_helpfulness(context, duels, 500, 3, &five, &error));
    ck_assert_double_eq_tol(five.high - five.low, 2 * half / sqrt(5), 0.01);
}
END_TEST

static void check_golden(const psoup_json *golden, const psoup_rate *r, int64_t unparsed) {
    const struct {
        const char *name;
        int64_t value;
    } counts[] = {{"wins", r->wins}, {"losses", r->losses}, {"ties", r->ties}};
    for (int i = 0; i < 3; i++)
        ck_assert_int_eq(counts[i].value,
                         psoup_json_integer(psoup_json_get(golden, counts[i].name), -1));
    ck_assert_double_eq_tol(r->rate, psoup_json_real(psoup_json_get(golden, "rate"), -1), 1e-12);
    /* a percentile of 2000 replicates scatters by about 0.06 σ ≈ 0.004 */
    ck_assert_double_eq_tol(r->low, psoup_json_real(psoup_json_get(golden, "low"), -1), 0.015);
    ck_assert_double_eq_tol(r->high, psoup_json_real(psoup_json_get(golden, "high"), -1), 0.015);
    if (unparsed >= 0)
        ck_assert_int_eq(r->unparsed, unparsed);
}

START_TEST(winrate_golden) {
    psoup_json *golden;
    OK(psoup_json_read(context, "tests/golden/eval/winrate.json", &golden, &error));
    const psoup_json *rows = psoup_json_get(golden, "duels");
    const psoup_json *unparsed = psoup_json_get(golden, "unparsed");
    size_t n = psoup_json_size(rows);
    ck_assert_uint_eq(n, 320);
    psoup_duel *duels = calloc(n, sizeof *duels);
    int32_t(*numbers)[2][3] = calloc(n, sizeof *numbers);
    for (size_t i = 0; i < n; i++) {
        const psoup_json *row = psoup_json_at(rows, i);
        for (size_t k = 0; k < 3; k++) {
            numbers[i][0][k] = (int32_t)psoup_json_integer(
                psoup_json_at(psoup_json_get(row, "criteria"), k), -1);
            numbers[i][1][k] = (int32_t)psoup_json_integer(
                psoup_json_at(psoup_json_get(row, "verdicts"), k), -9);
        }
        duels[i] = (psoup_duel){
            .prompt = psoup_json_integer(psoup_json_get(row, "prompt"), 0),
            .user = psoup_json_integer(psoup_json_get(row, "user"), -1),
            .preferences = numbers[i][0],
            .verdicts = numbers[i][1],
            .n = 3,
            .helpfulness = (int32_t)psoup_json_integer(psoup_json_get(row, "helpfulness"), 0)};
    }
    psoup_rate r;
    OK(psoup_winrate_aggregate(context, duels, n, 1, &r, &error));
    check_golden(psoup_json_get(golden, "aggregate"), &r,
                 psoup_json_integer(psoup_json_at(unparsed, 0), 0));
    OK(psoup_winrate_helpfulness(context, duels, n, 1, &r, &error));
    check_golden(psoup_json_get(golden, "helpfulness"), &r,
                 psoup_json_integer(psoup_json_at(unparsed, 1), 0));
    for (int32_t i = 0; i < 6; i++) {
        OK(psoup_winrate_criterion(context, duels, n, i, 1, &r, &error));
        check_golden(psoup_json_at(psoup_json_get(golden, "criteria"), (size_t)i), &r, -1);
    }
    free(duels);
    free(numbers);
    psoup_json_free(golden);
}
END_TEST

START_TEST(nothing_given) {
    psoup_preferences *preferences;
    psoup_rate rate;
    psoup_duel duel = {.n = 0};
    char *text;
    int32_t member;
    FAILS(psoup_preferences_default(context, 0, NULL, &error), PSOUP_ERROR_ARGUMENT, "NULL");
    FAILS(psoup_preferences_load(context, NULL, &preferences, &error), PSOUP_ERROR_ARGUMENT, "NULL");
    OK(psoup_preferences_default(context, 0, &preferences, &error));
    FAILS(psoup_user_get(NULL, 0, &member, NULL, 0, &error), PSOUP_ERROR_ARGUMENT, "NULL");
    FAILS(psoup_user_get(preferences, 0, NULL, NULL, 0, &error), PSOUP_ERROR_ARGUMENT, "NULL");
    FAILS(psoup_template_fill(NULL, "x", NULL, NULL, NULL, &error), PSOUP_ERROR_ARGUMENT, "NULL");
    FAILS(psoup_template_fill(NULL, NULL, NULL, NULL, &text, &error), PSOUP_ERROR_ARGUMENT, "NULL");
    FAILS(psoup_winrate_aggregate(context, NULL, 1, 1, &rate, &error), PSOUP_ERROR_ARGUMENT, "NULL");
    FAILS(psoup_winrate_helpfulness(context, &duel, 1, 1, NULL, &error), PSOUP_ERROR_ARGUMENT, "NULL");
    FAILS(psoup_judge_ask(NULL, NULL, 0, NULL, &error), PSOUP_ERROR_ARGUMENT, "NULL");
    duel.reserved[1] = 1;
    FAILS(psoup_winrate_helpfulness(context, &duel, 1, 1, &rate, &error), PSOUP_ERROR_ARGUMENT,
          "duels[0].reserved is not 0");
    FAILS(psoup_feedback(NULL, NULL, preferences, NULL, 0, NULL, NULL, NULL, NULL, &error),
          PSOUP_ERROR_ARGUMENT, "psoup_feedback");
    psoup_preferences_free(preferences);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("eval");
    TCase *c = tcase_create("eval");
    tcase_set_timeout(c, 60);
    tcase_add_checked_fixture(c, set_up, tear_down);
    tcase_add_test(c, catalogue);
    tcase_add_test(c, users);
    tcase_add_test(c, loaded);
    tcase_add_test(c, catalogues_refused);
    tcase_add_test(c, templates);
    tcase_add_test(c, winrate_by_hand);
    tcase_add_test(c, winrate_clusters);
    tcase_add_test(c, winrate_golden);
    tcase_add_test(c, nothing_given);
    suite_add_tcase(suite, c);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
