/* LoRA's variants in training, against peft and torch (golden files of tests/golden/lora.py): any subset of the
 * linears, rsLoRA, ranks and alphas of their own. With --write DIR the trained adapters are left there. */
#include "train_case.h"

#include "format/format.h"

static const char *const variants[] = {"all", "o_down", "rslora", "patterns", "rslora_patterns"};
enum { VARIANTS = 5, ROWS = 4, STEPS = 3 };
static const char *written;

typedef struct golden_file {
    psoup__weights *file;
    psoup_row row[ROWS];
    psoup_example example[ROWS];
    size_t tokens; /* that carry loss */
} golden_file;

static const float *find(const golden_file *g, const char *variant, const char *part, const char *name, size_t *n) {
    char path[160];
    snprintf(path, sizeof(path), "%s/%s%s", variant, part, name);
    const psoup__tensor *tensor = psoup__weights_find(g->file, path);
    ck_assert_msg(tensor != NULL, "the golden file has no %s", path);
    ck_assert(psoup__tensor_elements(tensor, n));
    return tensor->data;
}

static golden_file open_golden(const float *mix) {
    golden_file g = {.tokens = 0};
    OK(psoup__weights_map(context, "tests/golden/lora/golden.safetensors", "golden", &g.file, &error));
    const int32_t *tokens = psoup__weights_find(g.file, "tokens")->data;
    const int32_t *lengths = psoup__weights_find(g.file, "lengths")->data;
    for (int i = 0; i < ROWS; tokens += lengths[i++]) {
        g.row[i] = (psoup_row){.tokens = tokens, .n = (size_t)lengths[i], .mix = mix};
        g.example[i] = (psoup_example){.tokens = tokens, .n = (size_t)lengths[i]};
        g.tokens += (size_t)lengths[i] - 1;
    }
    return g;
}

static double relative(const float *a, const float *b, size_t n) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        size += (double)b[i] * b[i];
    }
    return sqrt(difference / size);
}

/* The factors of an adapter by name: "model.layers.0.self_attn.q_proj.lora_A"; returns how many there are. */
static int each_factor(const psoup_model *model, const psoup__adapter *a, const golden_file *g, const char *variant,
                       const char *part, const psoup_gradients *gradients, double tolerance) {
    static const char *const linears[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                          "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"};
    int n_factors = 0;
    size_t pairs = (size_t)model->config.num_hidden_layers * 7, n, count;
    for (size_t i = 0; i < pairs; i++)
        for (int side = 0; side < 2 && a->lora[i].rank; side++, n_factors++) {
            char name[128], full[160];
            snprintf(name, sizeof(name), "model.layers.%zu.%s.lora_%c", i / 7, linears[i % 7], side ? 'B' : 'A');
            snprintf(full, sizeof(full), "%s/%s", variant, name);
            const float *expected = find(g, variant, part, name, &n);
            const float *got = gradients ? psoup_gradients_get(gradients, full, &count)
                                         : (side ? a->lora[i].b : a->lora[i].a);
            ck_assert_msg(got && (!gradients || count == n), "%s%s: %zu elements, expected %zu", part, full, count, n);
            ck_assert_msg(relative(got, expected, n) < tolerance, "%s%s: off by %g", part, full,
                          relative(got, expected, n));
        }
    return n_factors;
}

static double first_loss;
static int keep_first(void *user, const psoup_step *step) {
    if (step->step == 1)
        first_loss = value_of(step, "loss");
    return 0;
}

static int same_config(const psoup__adapter *a, const psoup__adapter *b, size_t pairs) {
    int same = a->rank == b->rank && a->alpha == b->alpha && a->rslora == b->rslora;
    for (size_t i = 0; i < pairs; i++)
        same = same && a->lora[i].rank == b->lora[i].rank && a->lora[i].scale == b->lora[i].scale;
    return same;
}

/* Each factor's gradient within 1e-4 of autograd's, and after three steps of AdamW each factor within 1e-4 of torch's;
 * saved and loaded again it is what it was, with its ranks, alphas and rsLoRA. */
START_TEST(variants_train_as_in_peft) {
    static const int factors[VARIANTS] = {28, 8, 12, 16, 8};
    const float mix[1] = {1.0f};
    const char *variant = variants[_i];
    char path[256];
    psoup_model *model;
    psoup_gradients *gradients;
    golden_file g = open_golden(mix);
    size_t n, pairs;
    OK(psoup_model_load(context, "tests/golden/model/plain", &model, &error));
    snprintf(path, sizeof(path), "tests/golden/lora/%s", variant);
    OK(psoup_model_load_adapter(model, variant, path, &error));
    pairs = (size_t)model->config.num_hidden_layers * 7;
    float *weight = malloc(g.tokens * sizeof(*weight));
    for (size_t i = 0; i < g.tokens; i++)
        weight[i] = -1.0f / (float)g.tokens;
    OK(psoup_model_gradients(model, g.row, ROWS, weight, PSOUP_GRADIENT_ADAPTERS, &gradients, &error));
    ck_assert_int_eq(each_factor(model, psoup__model_adapter(model, variant), &g, variant, "grad:", gradients, 1e-4),
                     factors[_i]);
    psoup_gradients_free(gradients);

    psoup_sft_options o = PSOUP_SFT_OPTIONS_INIT;
    o.epochs = STEPS;
    o.learning_rate = 1e-2f;
    o.weight_decay = 0.1f;
    o.max_grad_norm = 0.0f;
    o.on_step = keep_first;
    OK(psoup_sft(model, variant, g.example, ROWS, NULL, 0, &o, &error));
    near(first_loss, *find(&g, variant, "loss", "", &n), 1e-5, "loss", 0);
    psoup__adapter *trained = psoup__model_adapter(model, variant);
    each_factor(model, trained, &g, variant, "after:", NULL, 1e-4);

    char directory[200];
    temporary(directory, sizeof(directory));
    ck_assert_ptr_nonnull(mkdtemp(directory));
    snprintf(path, sizeof(path), "%s/%s", written ? written : directory, variant);
    OK(psoup_model_save_adapter(model, variant, path, "plain", &error));
    OK(psoup_model_load_adapter(model, "again", path, &error));
    const psoup__adapter *again = psoup__model_adapter(model, "again");
    trained = psoup__model_adapter(model, variant);
    ck_assert(same_config(trained, again, pairs));
    ck_assert(trained->count == again->count &&
              memcmp(trained->data, again->data, trained->count * sizeof(float)) == 0);
    if (written) { /* its log-probabilities, for PEFT to repeat */
        const float two[2] = {1.0f, 0.0f};
        for (int i = 0; i < ROWS; i++)
            g.row[i].mix = two;
        OK(psoup_model_logprobs(model, g.row, ROWS, weight, &error));
        snprintf(path, sizeof(path), "%s/%s.f32", written, variant);
        FILE *out = fopen(path, "wb");
        ck_assert(out && fwrite(weight, sizeof(*weight), g.tokens, out) == g.tokens && fclose(out) == 0);
    }
    char remove[300];
    snprintf(remove, sizeof(remove), "rm -rf '%s'", directory);
    ck_assert_int_eq(system(remove), 0);
    free(weight);
    psoup__weights_free(g.file);
    psoup_model_free(model);
}
END_TEST

int main(int argc, char **argv) {
    Suite *suite = suite_create("train_lora");
    TCase *tests = tcase_create("lora");
    written = argc == 3 && strcmp(argv[1], "--write") == 0 ? argv[2] : NULL;
    tcase_set_timeout(tests, 120);
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_add_loop_test(tests, variants_train_as_in_peft, 0, VARIANTS);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
