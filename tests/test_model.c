/* The model against transformers, PEFT and autograd (golden files of tests/golden/model.py), and
 * against its own definition. */
#include "model_case.h"

/* ---- golden files ----------------------------------------------------------------------------- */

typedef struct golden {
    psoup__weights *file;
    psoup_row row[4];
    size_t total;
} golden;

static const float *golden_data(const golden *g, const char *name, size_t *count) {
    const psoup__tensor *tensor = psoup__weights_find(g->file, name);
    ck_assert_msg(tensor != NULL, "golden file without %s", name);
    if (count)
        ck_assert(psoup__tensor_elements(tensor, count));
    return tensor->data;
}

static void open_golden(psoup_context *context, const char *path, golden *g) {
    OK(psoup__weights_map(context, path, "golden", &g->file, &error));
    const int32_t *tokens = (const void *)golden_data(g, "tokens", &g->total);
    const int32_t *lengths = (const void *)golden_data(g, "lengths", NULL);
    for (int i = 0; i < 4; tokens += lengths[i++])
        g->row[i] = (psoup_row){.tokens = tokens, .n = (size_t)lengths[i]};
}

static void check_logits(psoup_model *model, const golden *g) {
    size_t n = 0;
    const float *expected = golden_data(g, "logits", &n);
    ck_assert_uint_eq(n, (g->total + 7) / 8 * VOCAB);
    float *logits = malloc(g->total * VOCAB * sizeof *logits);
    OK(psoup_model_logits(model, g->row, 4, logits, &error));
    for (size_t i = 0; i < g->total; i += 8)
        ck_assert_double_lt(distance(logits + i * VOCAB, expected + i / 8 * VOCAB, VOCAB), 1e-4);
    free(logits);
}

/* 1 or −1: the twin of signs in tests/golden/model.py. */
static double sign_of(uint32_t i) {
    uint32_t h = i * 0x9E3779B1u;
    h = (h ^ (h >> 15)) * 0x85EBCA77u;
    return (h ^ (h >> 13)) & 1 ? -1 : 1;
}

/* Every "fd:NAME" of the golden file, the slope along the signs as a central difference in float64
 * measured it, within 1e-4 of the gradient's length; returns how many. */
static int check_differences(const psoup_gradients *gradients, const golden *g) {
    int checked = 0;
    for (size_t i = 0; i < psoup__weights_count(g->file); i++) {
        const char *name = psoup__weights_name(g->file, i);
        size_t n = 0;
        if (strncmp(name, "fd:", 3) != 0)
            continue;
        double measured = (double)*golden_data(g, name, NULL), slope = 0, square = 0;
        const float *got = psoup_gradients_get(gradients, name + 3, &n);
        ck_assert_msg(got != NULL, "no gradient of %s", name + 3);
        for (size_t k = 0; k < n; k++) {
            slope += (double)got[k] * sign_of((uint32_t)k);
            square += (double)got[k] * (double)got[k];
        }
        ck_assert_msg(fabs(slope - measured) < 1e-4 * sqrt(square), "%s: slope %.9g, measured %.9g",
                      name + 3, slope, measured);
        checked++;
    }
    return checked;
}

/* Every "grad:NAME" of the golden file within 1e-4 relative; returns how many, and how many
 * differences there were. */
static int check_gradients(psoup_model *model, const golden *g, uint32_t what, int *differences) {
    psoup_gradients *gradients = NULL;
    int checked = 0;
    OK(psoup_model_gradients(model, g->row, 4, golden_data(g, "weights", NULL), what, &gradients,
                             &error));
    for (size_t i = 0; i < psoup__weights_count(g->file); i++) {
        const char *name = psoup__weights_name(g->file, i);
        size_t n = 0, count = 0;
        if (strncmp(name, "grad:", 5) != 0)
            continue;
        const float *expected = golden_data(g, name, &n);
        const float *got = psoup_gradients_get(gradients, name + 5, &count);
        ck_assert_msg(got && count == n, "%s: %zu elements, expected %zu", name, count, n);
        double off = relative(got, expected, n);
        ck_assert_msg(off < 1e-4, "%s: relative error %g", name, off);
        checked++;
    }
    if (what & PSOUP_GRADIENT_MIX) {
        size_t n = 0, count = 0;
        const float *expected = golden_data(g, "mixgrad", &n);
        const float *got = psoup_gradients_get(gradients, "mix", &count);
        ck_assert_uint_eq(count, n);
        ck_assert_double_lt(relative(got, expected, n), 1e-4);
        for (size_t i = 0; i < n; i++)
            ck_assert(expected[i] != 0 || got[i] == 0);
    }
    *differences = check_differences(gradients, g);
    psoup_gradients_free(gradients);
    return checked;
}

static const struct {
    const char *kind;
    int gradients, differences; /* how many the golden file holds: of every weight, a difference */
} kinds[] = {{"plain", 21, 21}, {"tied", 4, 11}, {"biases", 11, 19}, {"qwen2", 7, 14},
             {"llama3", 0, 0},  {"linear", 0, 0}, {"yarn", 0, 0},    {"dynamic", 0, 0}};

START_TEST(golden_base) {
    const char *kind = kinds[_i].kind;
    char path[128], file[160], directory[64];
    psoup_context *context = make_context(2);
    psoup_model *model = NULL;
    golden g;
    snprintf(path, sizeof path, GOLDEN "%s", kind);
    snprintf(file, sizeof file, "%s/golden.safetensors", path);
    strcpy(directory, temporary_directory());
    if (kinds[_i].gradients == 0) { /* the weights of "tied" under another config */
        char config[160], to[128];
        snprintf(config, sizeof config, "%s/config.json", path);
        snprintf(to, sizeof to, "%s/config.json", directory);
        copy_file(config, to);
        snprintf(to, sizeof to, "%s/model.safetensors", directory);
        copy_file(GOLDEN "tied/model.safetensors", to);
        strcpy(path, directory);
    }
    OK(psoup_model_load(context, path, &model, &error));
    open_golden(context, file, &g);
    check_logits(model, &g);
    if (kinds[_i].gradients) {
        int differences = 0;
        ck_assert_int_eq(check_gradients(model, &g, PSOUP_GRADIENT_BASE, &differences),
                         kinds[_i].gradients);
        ck_assert_int_eq(differences, kinds[_i].differences);
    }
    psoup__weights_free(g.file);
    psoup_model_free(model);
    psoup_context_free(context);
    remove_directory(directory);
}
END_TEST

START_TEST(golden_mix) {
    psoup_context *context = make_context(2);
    psoup_model *model = load_plain(context, true);
    golden g;
    open_golden(context, GOLDEN "mix.safetensors", &g);
    const float *mix = golden_data(&g, "mix", NULL);
    for (int i = 0; i < 4; i++)
        g.row[i].mix = mix + 2 * i;
    check_logits(model, &g);
    /* 2 layers of 7 pairs, and 2 of 2; differences of the mix too. */
    int differences = 0;
    const uint32_t what = PSOUP_GRADIENT_ADAPTERS | PSOUP_GRADIENT_MIX;
    ck_assert_int_eq(check_gradients(model, &g, what, &differences), 36);
    ck_assert_int_eq(differences, 37);
    /* The mix alone, with everything else frozen. */
    psoup_gradients *alone = NULL;
    size_t n = 0;
    OK(psoup_model_gradients(model, g.row, 4, golden_data(&g, "weights", NULL), PSOUP_GRADIENT_MIX,
                             &alone, &error));
    ck_assert_double_lt(
        relative(psoup_gradients_get(alone, "mix", &n), golden_data(&g, "mixgrad", NULL), 8), 1e-4);
    ck_assert_ptr_null(psoup_gradients_get(alone, "model.norm.weight", &n));
    psoup_gradients_free(alone);
    psoup__weights_free(g.file);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* ---- finite differences ----------------------------------------------------------------------- */

static double weighted_sum(psoup_model *model, const sample_rows *rows) {
    float out[256];
    double sum = 0;
    OK(psoup_model_logprobs(model, rows->row, rows->n, out, &error));
    for (size_t i = 0; i < rows->total - rows->n; i++)
        sum += out[i];
    return sum;
}

/* d f(p + t·direction) / dt at 0 against <gradient, direction>; the direction leans on the gradient,
 * so that the derivative stands out of f32's rounding. */
static void check_direction(psoup_model *model, const sample_rows *rows, float *p, const float *g,
                            size_t n) {
    double square = 0, expected = 0;
    float *old = malloc(n * sizeof *old), *direction = malloc(n * sizeof *direction);
    psoup__random random = {.seed = 3};
    for (size_t i = 0; i < n; i++)
        square += (double)g[i] * g[i];
    for (size_t i = 0; i < n; i++) {
        direction[i] = (float)(g[i] / sqrt(square) * 2 * psoup__random_uniform(&random));
        expected += (double)g[i] * direction[i];
        old[i] = p[i];
    }
    double t = 2e-3, sides[2];
    for (int side = 0; side < 2; side++) {
        for (size_t i = 0; i < n; i++)
            p[i] = old[i] + (float)(side ? -t : t) * direction[i];
        sides[side] = weighted_sum(model, rows);
    }
    memcpy(p, old, n * sizeof *p);
    double measured = (sides[0] - sides[1]) / (2 * t);
    ck_assert_msg(fabs(measured - expected) < 5e-3 * fabs(expected), "measured %g, gradient %g",
                  measured, expected);
    free(old);
    free(direction);
}

START_TEST(finite_differences) {
    psoup_context *context = make_context(2);
    psoup_model *model = load_plain(context, true);
    sample_rows rows;
    float mix[5][2] = {{0.5f, 0.5f}, {1, 0}, {0, 0}, {0.25f, 0.75f}, {0, 1}};
    fill_rows(&rows, 5, 11);
    for (size_t i = 0; i < rows.n; i++)
        rows.row[i].mix = mix[i];
    psoup_gradients *g = NULL;
    OK(psoup_model_gradients(model, rows.row, rows.n, NULL, 7, &g, &error));
    size_t n = 0;
    const float *first = psoup_gradients_get(g, "all/model.layers.0.self_attn.q_proj.lora_A", &n);
    psoup__adapter *all = psoup__model_adapter(model, "all");
    check_direction(model, &rows, all->data, first, all->count);
    first = psoup_gradients_get(g, "qv/model.layers.0.self_attn.q_proj.lora_A", &n);
    psoup__adapter *qv = psoup__model_adapter(model, "qv");
    check_direction(model, &rows, qv->data, first, qv->count);
    OK(psoup__model_train_base(model, true, &error));
    check_direction(model, &rows, model->data,
                    psoup_gradients_get(g, "model.embed_tokens.weight", &n), model->count);
    /* The mix, by its own definition: only weights that are not zero have a gradient. */
    const float *dmix = psoup_gradients_get(g, "mix", &n);
    ck_assert_uint_eq(n, 10);
    for (size_t i = 0; i < n; i++) {
        float *w = &mix[i / 2][i % 2], old = *w, t = 5e-3f;
        if (old == 0)
            continue;
        *w = old + t;
        double up = weighted_sum(model, &rows);
        *w = old - t;
        double measured = (up - weighted_sum(model, &rows)) / (2 * (double)t);
        *w = old;
        ck_assert_msg(fabs(measured - dmix[i]) < 1e-2 * (fabs((double)dmix[i]) + 1),
                      "mix %zu: measured %g, gradient %g", i, measured, (double)dmix[i]);
    }
    psoup_gradients_free(g);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* ---- the mix ---------------------------------------------------------------------------------- */

/* W += Σ mix_i s_i B_i A_i, densely, in f64. */
static void fold(psoup_model *model, const float *mix) {
    OK(psoup__model_train_base(model, true, &error));
    for (int32_t l = 0; l < model->config.num_hidden_layers; l++)
        for (int j = 0; j < PSOUP__LINEARS; j++) {
            psoup__weight *w = &model->layers[l].linear[j];
            float *data = (float *)(uintptr_t)w->data;
            for (int32_t o = 0; o < w->out; o++)
                for (int32_t i = 0; i < w->in; i++) {
                    double sum = data[o * w->in + i];
                    for (int32_t a = 0; a < model->n_adapters; a++) {
                        const psoup__lora *lora = &model->adapters[a]->lora[l * PSOUP__LINEARS + j];
                        for (int32_t r = 0; r < lora->rank; r++)
                            sum += (double)mix[a] * lora->scale * lora->b[o * lora->rank + r] *
                                   lora->a[r * w->in + i];
                    }
                    data[o * w->in + i] = (float)sum;
                }
        }
}

START_TEST(mixed_row_equals_merged_model) {
    psoup_context *context = make_context(2);
    psoup_model *model = load_plain(context, true), *merged = load_plain(context, true);
    sample_rows rows;
    const float mix[5][2] = {{1, 0}, {0.4f, 0.6f}, {0, 0}, {-0.5f, 1.5f}, {0, 1}};
    float logits[80 * VOCAB], alone[40 * VOCAB];
    fill_rows(&rows, 5, 12);
    for (size_t i = 0; i < rows.n; i++)
        rows.row[i].mix = mix[i];
    OK(psoup_model_logits(model, rows.row, rows.n, logits, &error));
    for (size_t i = 0, at = 0; i < rows.n; at += rows.row[i++].n) {
        psoup_row row = {.tokens = rows.row[i].tokens, .n = rows.row[i].n};
        psoup_model_free(merged);
        merged = load_plain(context, true);
        fold(merged, mix[i]);
        OK(psoup_model_logits(merged, &row, 1, alone, &error));
        double off = distance(alone, logits + at * VOCAB, row.n * VOCAB);
        ck_assert_msg(off < 1e-5, "row %zu: %g", i, off);
    }
    psoup_model_free(merged);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

START_TEST(zero_mix_is_the_base_and_nan_stays_home) {
    psoup_context *context = make_context(2);
    psoup_model *base = load_plain(context, false), *model = load_plain(context, true);
    sample_rows rows;
    const float mix[4][2] = {{0, 0}, {0, 1}, {1, 0}, {0, 0}};
    float expected[60 * VOCAB], got[60 * VOCAB], clean[60 * VOCAB];
    fill_rows(&rows, 4, 13);
    OK(psoup_model_logits(base, rows.row, 4, expected, &error));
    for (int i = 0; i < 4; i++)
        rows.row[i].mix = i == 3 ? NULL : mix[i];
    OK(psoup_model_logits(model, rows.row, 4, clean, &error));
    psoup__adapter *all = psoup__model_adapter(model, "all");
    for (size_t i = 0; i < all->count; i++)
        all->data[i] = NAN;
    OK(psoup_model_logits(model, rows.row, 4, got, &error));
    size_t cells = VOCAB * sizeof *got;
    ck_assert(memcmp(got, expected, 7 * cells) == 0);                    /* zeros */
    ck_assert(memcmp(got + 27 * VOCAB, expected + 27 * VOCAB, 33 * cells) == 0); /* NULL */
    ck_assert(memcmp(got + 7 * VOCAB, clean + 7 * VOCAB, 19 * cells) == 0);      /* the other one */
    ck_assert(memcmp(got + 7 * VOCAB, expected + 7 * VOCAB, 19 * cells) != 0);
    ck_assert(isnan(got[26 * VOCAB]));                                   /* the one that uses it */
    /* Gradients of the healthy adapter carry no NaN either. */
    psoup_gradients *g = NULL;
    size_t n = 0;
    OK(psoup_model_gradients(model, rows.row, 4, NULL, PSOUP_GRADIENT_ADAPTERS, &g, &error));
    const float *dq = psoup_gradients_get(g, "qv/model.layers.0.self_attn.q_proj.lora_A", &n);
    double sum = 0;
    for (size_t i = 0; i < psoup__model_adapter(model, "qv")->count; i++)
        sum += fabs((double)dq[i]);
    ck_assert(isfinite(sum) && sum > 0);
    psoup_gradients_free(g);
    psoup_model_free(base);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("model");
    TCase *tests = tcase_create("model");
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, golden_base, 0, (int)(sizeof kinds / sizeof *kinds));
    tcase_add_test(tests, golden_mix);
    tcase_add_test(tests, finite_differences);
    tcase_add_test(tests, mixed_row_equals_merged_model);
    tcase_add_test(tests, zero_mix_is_the_base_and_nan_stays_home);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
