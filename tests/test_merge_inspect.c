/* psoup_merge_inspect against numpy's dense float64 (tests/golden/gram.py), on random factors of odd shapes
 * against plain loops, and what it refuses. */
#include "merge_case.h"

#include "format/format.h"
#include "merge/inspect.h"

/* Every number of `expected` stands in `actual`, at the same place, within a relative 1e-6. */
static void same(const psoup_json *actual, const psoup_json *expected, const char *where) {
    char at[512];
    const char *key = NULL;
    psoup_json_type kind = psoup_json_kind(expected);
    switch (kind) {
    case PSOUP_JSON_OBJECT:
        for (const psoup_json *value; (value = psoup_json_next(expected, &key)) != NULL;) {
            snprintf(at, sizeof at, "%s.%s", where, key);
            same(psoup_json_get(actual, key), value, at);
        }
        break;
    case PSOUP_JSON_ARRAY:
        for (size_t i = 0; i < psoup_json_size(expected); i++) {
            snprintf(at, sizeof at, "%s[%zu]", where, i);
            same(psoup_json_at(actual, i), psoup_json_at(expected, i), at);
        }
        break;
    case PSOUP_JSON_INTEGER:
    case PSOUP_JSON_REAL:
        ck_assert_msg(fabs(psoup_json_real(actual, NAN) - psoup_json_real(expected, 0)) <=
                          1e-6 * (1 + fabs(psoup_json_real(expected, 0))),
                      "%s: %.9g, expected %.9g", where, psoup_json_real(actual, NAN),
                      psoup_json_real(expected, 0));
        break;
    case PSOUP_JSON_STRING:
        ck_assert_str_eq(psoup_json_string(actual, "?"), psoup_json_string(expected, ""));
        break;
    default:
        ck_assert_msg(actual != NULL && psoup_json_kind(actual) == kind, "%s: expected null", where);
    }
}

START_TEST(numpy_says_the_same) {
    static const char *const files[] = {"two", "three"};
    const char *paths[3] = {A, B, C};
    const double two[2] = {0.3, 0.7}, three[3] = {0.5, 0.3, 0.2};
    psoup_json *found, *expected;
    char path[256];
    snprintf(path, sizeof path, "tests/golden/gram/%s.json", files[_i]);
    ck_ok(psoup_json_read(context, path, &expected, &error));
    ck_ok(psoup_merge_inspect(context, paths, 2 + (size_t)_i, _i == 0 ? two : three, &found, &error));
    same(found, expected, "");
    ck_assert_uint_eq(psoup_json_size(psoup_json_get(found, "modules")),
                      psoup_json_size(psoup_json_get(expected, "modules")));
    ck_assert_uint_gt(psoup_json_size(psoup_json_get(found, "warnings")), 0);
    psoup_json_free(found);
    psoup_json_free(expected);
}
END_TEST

START_TEST(weights_are_equal_unless_given_and_threads_do_not_matter) {
    const char *paths[3] = {A, B, C};
    psoup_json *found, *alone;
    psoup_context *one = new_context(1, NULL);
    ck_ok(psoup_merge_inspect(context, paths, 3, NULL, &found, &error));
    ck_ok(psoup_merge_inspect(one, paths, 3, NULL, &alone, &error));
    psoup_context_free(one);
    const psoup_json *weights = psoup_json_get(psoup_json_get(found, "soup"), "weights");
    ck_assert(psoup_json_real(psoup_json_at(weights, 1), 0) == 1 / 3.0);
    char *x = psoup_json_text(found, 0), *y = psoup_json_text(alone, 0);
    ck_assert_str_eq(x, y);
    psoup_text_free(x);
    psoup_text_free(y);
    psoup_json_free(found);
    psoup_json_free(alone);
}
END_TEST

/* Dense ΔW of a module of odd shape: adapters of different ranks, one absent, one whose B has a column twice. */
START_TEST(odd_shapes_have_the_spectra_of_their_dense_changes) {
    enum { N = 4, OUT = 37, IN = 23, TOTAL = 3 + 5 + 1 };
    static const int32_t ranks[N] = {3, 0, 5, 1};
    const double weights[N] = {0.7, 0.2, -0.4, 1.5};
    psoup_lora_factors f[N];
    double dense[N][OUT * IN] = {{0}}, soup[OUT * IN] = {0}, gram_a[TOTAL * TOTAL], gram_b[TOTAL * TOTAL];
    double room[3 * TOTAL * TOTAL], squares[TOTAL], inner[N * N];
    float *kept[N][2];
    for (int i = 0; i < N; i++) {
        float *a = kept[i][0] = noises((size_t)ranks[i] * IN), *b = kept[i][1] = noises((size_t)ranks[i] * OUT);
        for (int r = 0; r < OUT && i == 2; r++)
            b[r * 5 + 4] = b[r * 5 + 1];
        f[i] = (psoup_lora_factors){a, b, ranks[i], 0.5f + (float)i};
        for (int r = 0; r < OUT; r++)
            for (int c = 0; c < IN; c++) {
                for (int k = 0; k < ranks[i]; k++)
                    dense[i][r * IN + c] += (0.5 + i) * (double)b[r * ranks[i] + k] * (double)a[k * IN + c];
                soup[r * IN + c] += weights[i] * dense[i][r * IN + c];
            }
    }
    const psoup__gram_module module = {.factors = f, .n = N, .out = OUT, .in = IN, .total = TOTAL};
    ck_ok(psoup__gram_of(context, &module, false, gram_a, &error));
    ck_ok(psoup__gram_of(context, &module, true, gram_b, &error));
    psoup__gram_inner(&module, gram_a, gram_b, inner);
    psoup__gram_spectrum(&module, gram_a, gram_b, weights, squares, room);
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            double sum = 0;
            for (int k = 0; k < OUT * IN; k++)
                sum += dense[i][k] * dense[j][k];
            ck_assert_double_eq_tol(inner[i * N + j], sum, 1e-9 * (1 + fabs(sum)));
        }
    /* Σσ², Σσ⁴ and Σσ⁶ are traces of powers of the dense soup's Gram matrix. */
    static double g[IN * IN], g2[IN * IN];
    double trace[3] = {0}, ours[3] = {0};
    for (int i = 0; i < IN * IN; i++) {
        g[i] = 0;
        for (int r = 0; r < OUT; r++)
            g[i] += soup[r * IN + i / IN] * soup[r * IN + i % IN];
    }
    for (int i = 0; i < IN * IN; i++) {
        g2[i] = 0;
        for (int k = 0; k < IN; k++)
            g2[i] += g[i / IN * IN + k] * g[k * IN + i % IN];
    }
    for (int i = 0; i < IN; i++) {
        trace[0] += g[i * IN + i];
        trace[1] += g2[i * IN + i];
        for (int k = 0; k < IN; k++)
            trace[2] += g2[i * IN + k] * g[k * IN + i];
    }
    for (int k = 0; k < TOTAL; k++) {
        ck_assert(k == 0 || squares[k] <= squares[k - 1]);
        for (int p = 0; p < 3; p++)
            ours[p] += pow(squares[k], p + 1);
    }
    for (int p = 0; p < 3; p++)
        ck_assert_double_eq_tol(ours[p] / trace[p], 1, 1e-10);
    ck_assert(squares[TOTAL - 2] > 1e-6 * squares[0] && squares[TOTAL - 1] < 1e-12 * squares[0]);
    for (int i = 0; i < N * 2; i++)
        free(kept[i / 2][i % 2]);
}
END_TEST

/* An adapter of one module with 4 outputs, written for the occasion. */
static const char *write_adapter(const char *name, float value, int64_t in) {
    static char path[2][1100];
    static int turn;
    float a[2 * 8], b[4 * 2];
    for (int i = 0; i < 16; i++)
        a[i] = i == 3 ? value : 1;
    for (int i = 0; i < 8; i++)
        b[i] = 1;
    const psoup__peft_pair pair = {
        .module = "model.layers.7.self_attn.q_proj",
        .a = {.dtype = PSOUP_F32, .rank = 2, .shape = {2, in}, .bytes = (size_t)(2 * in) * 4, .data = a},
        .b = {.dtype = PSOUP_F32, .rank = 2, .shape = {4, 2}, .bytes = sizeof b, .data = b},
        .scale = 2,
        .rank = 2};
    const psoup__peft_output output = {.pairs = &pair, .n = 1, .rank = 2, .alpha = 4, .task_type = "CAUSAL_LM"};
    snprintf(path[turn ^= 1], sizeof path[0], "%s/%s", scratch, name);
    ck_ok(psoup__make_directories(path[turn], &error));
    ck_ok(psoup__peft_write(context, path[turn], &output, &error));
    return path[turn];
}

/* Written as GGUF, whose q rows lie in llama.cpp's order, an adapter is still itself. */
START_TEST(gguf_adapters_are_the_same) {
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    psoup_merger *merger;
    psoup_json *found;
    const char *paths[2] = {A, in_scratch("a.gguf")};
    options.format = PSOUP_MERGE_GGUF;
    ck_ok(psoup_merger_create(context, &options, &merger, &error));
    ck_ok(psoup_merger_add(merger, A, 1, &error));
    ck_ok(psoup_merger_set_reference(merger, BASE, &error));
    ck_ok(psoup_merger_write(merger, paths[1], &error));
    psoup_merger_free(merger);
    ck_ok(psoup_merge_inspect(context, paths, 2, NULL, &found, &error));
    const psoup_json *row = psoup_json_at(psoup_json_get(found, "cosine"), 0);
    ck_assert_double_eq_tol(psoup_json_real(psoup_json_at(row, 1), 0), 1, 1e-6);
    ck_assert_uint_eq(psoup_json_size(psoup_json_get(found, "modules")), 4);
    psoup_json_free(found);
}
END_TEST

START_TEST(trouble_is_named) {
    psoup_json *found = NULL;
    const char *paths[2];
    paths[0] = write_adapter("good", 2, 4);
    paths[1] = write_adapter("bad", NAN, 4);
    ck_assert_int_eq(psoup_merge_inspect(context, paths, 2, NULL, &found, &error), PSOUP_ERROR_FORMAT);
    ck_assert_ptr_null(found);
    ck_assert_msg(strstr(error.message, "/bad: model.layers.7.self_attn.q_proj.lora_A holds a NaN") != NULL,
                  "%s", error.message);
    ck_ok(psoup_merge_inspect(context, paths, 1, NULL, &found, &error));
    psoup_json_free(found);
    paths[1] = write_adapter("wide", 2, 8);
    paths[0] = write_adapter("good", 2, 4);
    ck_assert_int_eq(psoup_merge_inspect(context, paths, 2, NULL, &found, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_msg(strstr(error.message, "maps 8 to 4 features") != NULL, "%s", error.message);
    ck_assert_int_eq(psoup_merge_inspect(context, paths, 0, NULL, &found, &error), PSOUP_ERROR_ARGUMENT);
    const double nan = NAN;
    ck_assert_int_eq(psoup_merge_inspect(context, paths, 1, &nan, &found, &error), PSOUP_ERROR_ARGUMENT);
    paths[0] = "no such adapter";
    ck_assert_int_eq(psoup_merge_inspect(context, paths, 1, NULL, &found, &error), PSOUP_ERROR_IO);
    ck_assert_int_eq(psoup_merge_inspect_plot(context, NULL, NULL, in_scratch("x.svg"), &error),
                     PSOUP_ERROR_ARGUMENT);
}
END_TEST

START_TEST(the_picture_is_svg) {
    const char *paths[3] = {A, B, C}, *names[3] = {"<a> & b", NULL, NULL};
    psoup_json *found;
    char *svg;
    size_t length;
    ck_ok(psoup_merge_inspect(context, paths, 3, NULL, &found, &error));
    ck_ok(psoup_merge_inspect_plot(context, found, names, in_scratch("p.svg"), &error));
    ck_ok(psoup__file_read(context, in_scratch("p.svg"), 1 << 20, &svg, &length, &error));
    ck_assert(strncmp(svg, "<svg xmlns", 10) == 0 && strstr(svg, "</svg>\n") != NULL);
    ck_assert(strstr(svg, "&lt;a> &amp; b") != NULL && strstr(svg, "nan") == NULL);
    int cells = 0;
    for (const char *at = svg; (at = strstr(at, "<rect")) != NULL; at++)
        cells++;
    ck_assert_int_eq(cells, 1 + 9 + 60 + 3 * 2); /* ground, adapters × adapters, scale, pairs × layers */
    psoup__free(context, svg);
    psoup_json_free(found);
}
END_TEST

START_TEST(memory_may_run_out_anywhere) {
    const char *paths[2] = {A, C};
    psoup_json *found;
    for (int at = 0, done = 0; !done; at++) {
        psoup_context *one = new_context(1, NULL);
        allocations = 0;
        fail_at = at;
        psoup_status status = psoup_merge_inspect(one, paths, 2, NULL, &found, &error);
        fail_at = -1;
        done = status == PSOUP_OK;
        ck_assert(done || status == PSOUP_ERROR_MEMORY);
        ck_assert(done == (found != NULL));
        psoup_json_free(found);
        psoup_context_free(one);
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("merge_inspect");
    TCase *all = tcase_create("inspect");
    tcase_set_timeout(all, 120);
    tcase_add_checked_fixture(all, set_up, tear_down);
    tcase_add_loop_test(all, numpy_says_the_same, 0, 2);
    tcase_add_test(all, weights_are_equal_unless_given_and_threads_do_not_matter);
    tcase_add_test(all, odd_shapes_have_the_spectra_of_their_dense_changes);
    tcase_add_test(all, gguf_adapters_are_the_same);
    tcase_add_test(all, trouble_is_named);
    tcase_add_test(all, the_picture_is_svg);
    tcase_add_test(all, memory_may_run_out_anywhere);
    suite_add_tcase(suite, all);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
