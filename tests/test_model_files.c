/* Models and adapters written and read again, and what is refused.
 *
 * `test_model_files --write DIR` writes what `tests/golden/model.py --verify DIR` reads. */
#include <signal.h>
#include <sys/resource.h>

#include "model_case.h"

/* ---- files ------------------------------------------------------------------------------------ */

START_TEST(adapters_come_back) {
    psoup_context *context = make_context(1);
    psoup_model *model = load_plain(context, true);
    char directory[64];
    strcpy(directory, temporary_directory());
    for (int32_t i = 0; i < 2; i++) {
        const char *name = psoup_model_adapter_name(model, i);
        OK(psoup_model_save_adapter(model, name, directory, NULL, &error));
        OK(psoup_model_load_adapter(model, "again", directory, &error));
        const psoup__adapter *a = model->adapters[i], *b = psoup__model_adapter(model, "again");
        ck_assert_uint_eq(a->count, b->count);
        ck_assert(memcmp(a->data, b->data, a->count * sizeof(float)) == 0);
        ck_assert_int_eq(a->rank, b->rank);
        ck_assert_int_eq(a->rslora, b->rslora);
        for (int pair = 0; pair < 14; pair++) {
            ck_assert_int_eq(a->lora[pair].rank, b->lora[pair].rank);
            ck_assert(a->lora[pair].scale == b->lora[pair].scale);
        }
        OK(psoup_model_remove_adapter(model, "again", &error));
    }
    /* With a scalar head. */
    psoup__adapter *qv = psoup__model_adapter(model, "qv");
    size_t before = qv->count;
    OK(psoup__adapter_add_head(model, qv, &error));
    ck_assert_uint_eq(qv->count, before + 33);
    for (int i = 0; i < 33; i++)
        qv->head[i] = (float)i / 7;
    OK(psoup__adapter_save(model, qv, directory, "base", true, &error));
    OK(psoup_model_load_adapter(model, "critic", directory, &error));
    const psoup__adapter *critic = psoup__model_adapter(model, "critic");
    ck_assert_ptr_nonnull(critic->head);
    ck_assert(memcmp(critic->data, qv->data, qv->count * sizeof(float)) == 0);
    const float *data = NULL;
    size_t count = 0;
    OK(psoup_model_adapter_data(model, "critic", &data, &count, &error));
    ck_assert_uint_eq(count, qv->count);
    ck_assert(memcmp(data, qv->data, count * sizeof(float)) == 0);
    /* The head is the trainer's: as a policy the adapter is written without it. */
    psoup__peft *peft = NULL;
    OK(psoup_model_save_adapter(model, "critic", directory, NULL, &error));
    OK(psoup__peft_open(context, directory, &peft, &error));
    ck_assert(!psoup__tensor_is_there(&peft->head));
    ck_assert_str_eq(psoup_json_string(psoup_json_get(peft->config, "task_type"), ""), "CAUSAL_LM");
    psoup__peft_free(peft);
    /* And a bias of 0 is none: transformers' score has no place for one. */
    *qv->head_bias = 0;
    OK(psoup__adapter_save(model, qv, directory, NULL, true, &error));
    OK(psoup__peft_open(context, directory, &peft, &error));
    ck_assert(psoup__tensor_is_there(&peft->head));
    ck_assert(!psoup__tensor_is_there(&peft->head_bias));
    psoup__peft_free(peft);
    remove_directory(directory);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* The tokenizer goes with the model, and says to transformers that it is a tokenizer.json's own. */
START_TEST(a_tokenizer_goes_along) {
    psoup_context *context = make_context(1);
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_model *model = NULL;
    psoup_tokenizer *tokenizer = NULL, *again = NULL;
    psoup_json *settings = NULL;
    const char *const text[] = {"soup of the day"}, *const special[] = {"</s>"};
    char directory[64], path[128];
    strcpy(directory, temporary_directory());
    snprintf(path, sizeof path, "%s/tokenizer_config.json", directory);
    OK(psoup_tokenizer_train(context, text, 1, 260, special, 1, NULL, &tokenizer, &error));
    config.vocab_size = psoup_tokenizer_vocab_size(tokenizer);
    config.hidden_size = config.intermediate_size = 8;
    config.num_hidden_layers = config.num_attention_heads = 1;
    config.max_position_embeddings = 64;
    config.eos_token_id = psoup_tokenizer_token_id(tokenizer, "</s>");
    OK(psoup_model_create(context, &config, 5, &model, &error));
    OK(psoup_model_save(model, directory, tokenizer, &error));
    OK(psoup_tokenizer_load(context, directory, &again, &error));
    ck_assert_int_eq(psoup_tokenizer_vocab_size(again), config.vocab_size);
    OK(psoup_json_read(context, path, &settings, &error));
    const struct {
        const char *key, *value;
    } said[] = {{"tokenizer_class", "PreTrainedTokenizerFast"}, {"eos_token", "</s>"}};
    for (int i = 0; i < 2; i++)
        ck_assert_str_eq(psoup_json_string(psoup_json_get(settings, said[i].key), ""),
                         said[i].value);
    ck_assert_ptr_null(psoup_json_get(settings, "bos_token"));
    psoup_json_free(settings);
    psoup_tokenizer_free(again);
    psoup_tokenizer_free(tokenizer);
    psoup_model_free(model);
    remove_directory(directory);
    psoup_context_free(context);
}
END_TEST

/* YaRN's frequencies are of the length that was trained, however far the model reaches now. */
START_TEST(yarn_knows_the_trained_length) {
    psoup_context *context = make_context(1);
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    enum { TOKENS = 12 };
    float logits[3][TOKENS * VOCAB];
    config.vocab_size = VOCAB;
    config.hidden_size = 32;
    config.intermediate_size = 40;
    config.num_hidden_layers = 1;
    config.num_attention_heads = 2;
    config.initializer_range = 0.3f;
    config.rope_scaling = PSOUP_ROPE_YARN;
    config.rope_factor = 4;
    const int32_t reach[] = {512, 128, 512}, trained[] = {128, 0, 0};
    int32_t tokens[TOKENS];
    for (int i = 0; i < TOKENS; i++)
        tokens[i] = i * 5 % VOCAB;
    for (int i = 0; i < 3; i++) {
        psoup_model *model = NULL;
        const psoup_row row = {.tokens = tokens, .n = TOKENS};
        config.max_position_embeddings = reach[i];
        config.rope_original_max_position = trained[i];
        OK(psoup_model_create(context, &config, 5, &model, &error));
        OK(psoup_model_logits(model, &row, 1, logits[i], &error));
        psoup_model_free(model);
    }
    ck_assert(memcmp(logits[0], logits[1], sizeof logits[0]) == 0);
    ck_assert(memcmp(logits[0], logits[2], sizeof logits[0]) != 0);
    psoup_context_free(context);
}
END_TEST

static const psoup_dtype dtypes[] = {PSOUP_F32, PSOUP_F16, PSOUP_BF16};

START_TEST(models_come_back) {
    psoup_context *context = make_context(1);
    char directory[64];
    strcpy(directory, temporary_directory());
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    config.vocab_size = VOCAB;
    config.hidden_size = 24;
    config.intermediate_size = 40;
    config.num_hidden_layers = 2;
    config.num_attention_heads = 3;
    config.num_key_value_heads = 1;
    config.max_position_embeddings = 64;
    config.qkv_bias = _i == 1;
    config.tie_word_embeddings = _i == 2;
    config.torch_dtype = (int32_t)dtypes[_i];
    config.initializer_range = 0.2f;
    psoup_model *model = NULL, *again = NULL;
    OK(psoup_model_create(context, &config, 5, &model, &error));
    OK(psoup_model_save(model, directory, NULL, &error));
    OK(psoup_model_load(context, directory, &again, &error));
    ck_assert_int_eq(psoup_model_parameters(model), psoup_model_parameters(again));
    psoup_model_config got = {.size = sizeof got};
    OK(psoup_model_get_config(again, &got, &error));
    ck_assert_int_eq(got.torch_dtype, config.torch_dtype);
    ck_assert_int_eq(got.head_dim, 8);
    sample_rows rows;
    float a[64 * VOCAB], b[64 * VOCAB];
    fill_rows(&rows, 4, 1);
    OK(psoup_model_logits(model, rows.row, 4, a, &error));
    OK(psoup_model_logits(again, rows.row, 4, b, &error));
    ck_assert(memcmp(a, b, rows.total * VOCAB * sizeof *a) == 0);
    ck_assert_double_gt(distance(a, a + 9 * VOCAB, VOCAB), 0.01);
    /* Thawed and frozen again: the same bits. */
    OK(psoup__model_train_base(again, true, &error));
    OK(psoup_model_logits(again, rows.row, 4, b, &error));
    ck_assert(memcmp(a, b, rows.total * VOCAB * sizeof *a) == 0);
    OK(psoup__model_train_base(again, false, &error));
    OK(psoup_model_logits(again, rows.row, 4, b, &error));
    ck_assert(memcmp(a, b, rows.total * VOCAB * sizeof *a) == 0);
    psoup_model_free(model);
    psoup_model_free(again);
    psoup_context_free(context);
    remove_directory(directory);
}
END_TEST

/* ---- bad input -------------------------------------------------------------------------------- */

#define REFUSED(call, status, text)                                                                \
    do {                                                                                           \
        ck_assert_int_eq((call), (status));                                                        \
        ck_assert_msg(strstr(error.message, (text)) != NULL, "message: %s", error.message);        \
    } while (0)

/* plain's weights with one tensor spoiled: 0 left out, 1 turned, 2 NaN, 3 one too many; or 4 with an
 * old checkpoint's buffer of three bytes before the rest, which puts all of it at odd addresses. */
static void write_spoiled(psoup_context *context, const char *directory, int how) {
    static const char name[] = "model.layers.1.mlp.up_proj.weight";
    char path[128];
    psoup__weights *weights = NULL;
    psoup__safetensors_writer *writer = NULL;
    static uint16_t values[48 * 32];
    OK(psoup__weights_map(context, GOLDEN "plain", "model", &weights, &error));
    snprintf(path, sizeof path, "%s/config.json", directory);
    copy_file(GOLDEN "plain/config.json", path);
    snprintf(path, sizeof path, "%s/model.safetensors", directory);
    OK(psoup__safetensors_create(context, path, &writer, &error));
    for (int pass = 0; pass < 2; pass++) {
        if (how == 4 && pass)
            OK(psoup__safetensors_write(writer, "abc", 3, &error));
        if (how == 4 && !pass)
            OK(psoup__safetensors_declare(writer, "model.layers.0.self_attn.rotary_emb.inv_freq",
                                          PSOUP_U8, 1, (int64_t[]){3}, &error));
        for (size_t i = 0; i < psoup__weights_count(weights); i++) {
            const psoup__tensor *t = psoup__weights_tensor(weights, i);
            const char *n = psoup__weights_name(weights, i);
            bool target = strcmp(n, name) == 0;
            if (target && how == 0)
                continue;
            const int64_t turned[2] = {32, 48};
            const void *data = t->data;
            if (target && how == 2) {
                memcpy(values, t->data, t->bytes);
                values[777] = 0x7fc0;
                data = values;
            }
            if (pass)
                OK(psoup__safetensors_write(writer, data, t->bytes, &error));
            else
                OK(psoup__safetensors_declare(writer, n, t->dtype, t->rank,
                                              target && how == 1 ? turned : t->shape, &error));
        }
        if (how == 3 && !pass)
            OK(psoup__safetensors_declare(writer, "model.layers.2.extra", PSOUP_F32, 1,
                                          (int64_t[]){2}, &error));
        if (how == 3 && pass)
            OK(psoup__safetensors_write(writer, (float[]){1, 2}, 8, &error));
        if (!pass)
            OK(psoup__safetensors_begin(writer, &error));
    }
    OK(psoup__safetensors_commit(writer, &error));
    psoup__safetensors_writer_free(writer);
    psoup__weights_free(weights);
}

START_TEST(bad_weights) {
    static const char *const says[] = {"model.layers.1.mlp.up_proj.weight is missing",
                                       "has shape [32, 48], config.json asks for [48, 32]",
                                       "model.layers.1.mlp.up_proj.weight holds NaN",
                                       "model.layers.2.extra belongs to no weight"};
    psoup_context *context = make_context(1);
    psoup_model *model = (psoup_model *)1;
    char directory[64];
    strcpy(directory, temporary_directory());
    write_spoiled(context, directory, _i);
    REFUSED(psoup_model_load(context, directory, &model, &error), PSOUP_ERROR_FORMAT, says[_i]);
    ck_assert_ptr_null(model);
    ck_assert_ptr_null(strchr(error.message, '\n'));
    remove_directory(directory);
    psoup_context_free(context);
}
END_TEST

START_TEST(weights_at_odd_addresses) {
    psoup_context *context = make_context(1);
    psoup_model *plain = load_plain(context, false), *odd = NULL;
    char directory[64];
    strcpy(directory, temporary_directory());
    write_spoiled(context, directory, 4);
    OK(psoup_model_load(context, directory, &odd, &error));
    sample_rows rows;
    static float a[60 * VOCAB], b[60 * VOCAB];
    fill_rows(&rows, 4, 1);
    OK(psoup_model_logits(plain, rows.row, 4, a, &error));
    OK(psoup_model_logits(odd, rows.row, 4, b, &error));
    ck_assert(memcmp(a, b, rows.total * VOCAB * sizeof *a) == 0);
    psoup_model_free(plain);
    psoup_model_free(odd);
    psoup_context_free(context);
    remove_directory(directory);
}
END_TEST

START_TEST(bad_arguments) {
    psoup_context *context = make_context(1);
    psoup_model *model = NULL;
    psoup_status status = psoup_model_load(context, "no/such/place", &model, &error);
    ck_assert(status != PSOUP_OK && !model && strstr(error.message, "no/such/place"));
    model = load_plain(context, true);
    float weights[2], out[8];
    REFUSED(psoup_model_parse_mix(model, "all=0.5,nobody=0.5", 0, weights, &error),
            PSOUP_ERROR_ARGUMENT, "nobody");
    REFUSED(psoup_model_parse_mix(model, "all=0.5,qv=0.4", 0, weights, &error),
            PSOUP_ERROR_ARGUMENT, "sum to 0.9");
    REFUSED(psoup_model_parse_mix(model, "all=0.5,all=0.5", 0, weights, &error),
            PSOUP_ERROR_ARGUMENT, "twice");
    REFUSED(psoup_model_parse_mix(model, "all=half", 0, weights, &error), PSOUP_ERROR_ARGUMENT,
            "NAME=NUMBER");
    OK(psoup_model_parse_mix(model, "all=0.5,qv=0.4", 1, weights, &error));
    OK(psoup_model_parse_mix(model, "qv=0.25,all=0.75", 0, weights, &error));
    ck_assert(weights[0] == 0.75f && weights[1] == 0.25f);
    OK(psoup_model_parse_mix(model, "", 0, weights, &error));
    ck_assert(weights[0] == 0 && weights[1] == 0);

    psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
    REFUSED(psoup_model_add_adapter(model, "qv", &options, &error), PSOUP_ERROR_ARGUMENT, "qv");
    REFUSED(psoup_model_add_adapter(model, "a=b", &options, &error), PSOUP_ERROR_ARGUMENT, "a=b");
    options.rank = 0;
    REFUSED(psoup_model_add_adapter(model, "new", &options, &error), PSOUP_ERROR_ARGUMENT, "rank");
    options.rank = 2;
    for (int i = 0; i < 4; i++) {
        options.alpha = (float[]){0, -1, NAN, INFINITY}[i];
        REFUSED(psoup_model_add_adapter(model, "new", &options, &error), PSOUP_ERROR_ARGUMENT, "alpha is");
    }
    REFUSED(psoup_model_remove_adapter(model, "new", &error), PSOUP_ERROR_ARGUMENT, "new");
    ck_assert(psoup_model_load_adapter(model, "new", "no/such/place", &error) != PSOUP_OK);

    int32_t tokens[70] = {1, VOCAB};
    psoup_row row = {.tokens = tokens, .n = 2};
    REFUSED(psoup_model_logprobs(model, &row, 1, out, &error), PSOUP_ERROR_ARGUMENT, "token 80");
    row.n = 0;
    REFUSED(psoup_model_logprobs(model, &row, 1, out, &error), PSOUP_ERROR_ARGUMENT, "no tokens");
    tokens[1] = 1;
    row.n = 65;
    REFUSED(psoup_model_logprobs(model, &row, 1, out, &error), PSOUP_ERROR_ARGUMENT,
            "max_position_embeddings");
    row = (psoup_row){.tokens = tokens, .n = 2, .mix = (float[]){NAN, 1}};
    REFUSED(psoup_model_logprobs(model, &row, 1, out, &error), PSOUP_ERROR_ARGUMENT, "all");
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* What a full disk cuts short is no model's directory, nor half a file. */
START_TEST(a_full_disk) {
    char directory[64];
    psoup_context *context = make_context(1);
    psoup_model *model = load_plain(context, false);
    struct rlimit limit;
    strcpy(directory, temporary_directory());
    ck_assert_int_eq(getrlimit(RLIMIT_FSIZE, &limit), 0);
    limit.rlim_cur = 8192; /* room for config.json, not for the weights */
    signal(SIGXFSZ, SIG_IGN);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    REFUSED(psoup_model_save(model, directory, NULL, &error), PSOUP_ERROR_IO, "model.safetensors");
    ck_assert_msg(rmdir(directory) == 0, "%s is not empty", directory);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* ---- for PEFT -------------------------------------------------------------------------------- */

/* What another program is to check: a random model and adapter of ours, and our logits. */
static const char *written;

START_TEST(write_for_peft) {
    char path[256];
    psoup_context *context = make_context(1);
    psoup_model *model = load_plain(context, false);
    psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
    options.rank = 3;
    options.rslora = 1;
    options.targets = PSOUP_ALL_LINEAR;
    OK(psoup_model_add_adapter(model, "a", &options, &error));
    psoup__adapter *adapter = psoup__model_adapter(model, "a");
    psoup__random random = {.seed = 8};
    for (size_t i = 0; i < adapter->count; i++)
        adapter->data[i] = 0.2f * psoup__random_normal(&random);
    snprintf(path, sizeof path, "%s/base", written);
    OK(psoup_model_save(model, path, NULL, &error));
    snprintf(path, sizeof path, "%s/adapter", written);
    OK(psoup_model_save_adapter(model, "a", path, NULL, &error));
    sample_rows rows;
    fill_rows(&rows, 4, 2);
    psoup_row row = {.tokens = rows.tokens, .n = rows.total, .mix = (float[]){1}};
    static float logits[64 * VOCAB];
    OK(psoup_model_logits(model, &row, 1, logits, &error));
    psoup__safetensors_writer *w = NULL;
    int64_t n = (int64_t)row.n;
    snprintf(path, sizeof path, "%s/logits.safetensors", written);
    OK(psoup__safetensors_create(context, path, &w, &error));
    OK(psoup__safetensors_declare(w, "tokens", PSOUP_I32, 1, &n, &error));
    OK(psoup__safetensors_declare(w, "logits", PSOUP_F32, 2, (int64_t[]){n, VOCAB}, &error));
    OK(psoup__safetensors_begin(w, &error));
    OK(psoup__safetensors_write(w, row.tokens, row.n * 4, &error));
    OK(psoup__safetensors_write(w, logits, row.n * VOCAB * 4, &error));
    OK(psoup__safetensors_commit(w, &error));
    psoup__safetensors_writer_free(w);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

int main(int argc, char **argv) {
    Suite *suite = suite_create("model files");
    TCase *tests = tcase_create("model files");
    tcase_set_timeout(tests, 120);
    if (argc == 3 && strcmp(argv[1], "--write") == 0) {
        written = argv[2];
        tcase_add_test(tests, write_for_peft);
    }
    tcase_add_test(tests, adapters_come_back);
    tcase_add_test(tests, a_tokenizer_goes_along);
    tcase_add_test(tests, yarn_knows_the_trained_length);
    tcase_add_loop_test(tests, models_come_back, 0, 3);
    tcase_add_loop_test(tests, bad_weights, 0, 4);
    tcase_add_test(tests, weights_at_odd_addresses);
    tcase_add_test(tests, bad_arguments);
    tcase_add_test(tests, a_full_disk);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
