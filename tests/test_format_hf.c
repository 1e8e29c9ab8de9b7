/* Hugging Face's config.json and PEFT's adapters (tests/golden/format.py), theirs and ours, and what is
 * refused. */
#include "format_case.h"

/* ---- config.json ------------------------------------------------------------------------------- */

START_TEST(reads_configs) {
    psoup_model_config c;
    ck_ok(psoup__hf_config_read(context, GOLDEN "config/llama", &c, &error));
    ck_assert_int_eq(c.vocab_size, 32);
    ck_assert_int_eq(c.hidden_size, 16);
    ck_assert_int_eq(c.intermediate_size, 24);
    ck_assert_int_eq(c.num_hidden_layers, 2);
    ck_assert_int_eq(c.num_attention_heads, 4);
    ck_assert_int_eq(c.num_key_value_heads, 2);
    ck_assert_int_eq(c.head_dim, 4);
    ck_assert_int_eq(c.max_position_embeddings, 64);
    ck_assert_float_eq(c.rms_norm_eps, 1e-5f);
    ck_assert(c.tie_word_embeddings && c.attention_bias && !c.mlp_bias && !c.qkv_bias);
    ck_assert(c.bos_token_id == 1 && c.eos_token_id == 2 && c.pad_token_id == -1);
    ck_assert_int_eq(c.torch_dtype, PSOUP_F32);
    ck_assert_int_eq(c.rope_scaling, PSOUP_ROPE_DEFAULT);
    ck_ok(psoup__hf_config_read(context, GOLDEN "config/llama3", &c, &error));
    ck_assert_int_eq(c.rope_scaling, PSOUP_ROPE_LLAMA3);
    ck_assert(c.rope_factor == 8 && c.rope_low_freq_factor == 1 && c.rope_high_freq_factor == 4 &&
              c.rope_original_max_position == 32 && c.rope_theta == 500000);
    ck_assert(c.eos_token_id == 30 && c.more_eos_token_ids[0] == 31 && c.more_eos_token_ids[1] == -1);
    ck_assert(c.torch_dtype == PSOUP_BF16 && !c.tie_word_embeddings);
    ck_ok(psoup__hf_config_read(context, GOLDEN "config/yarn", &c, &error));
    ck_assert(c.rope_scaling == PSOUP_ROPE_YARN && c.rope_factor == 4 && c.rope_beta_fast == 24 &&
              c.rope_beta_slow == 1 && c.rope_original_max_position == 64);
    ck_ok(psoup__hf_config_read(context, GOLDEN "config/mistral", &c, &error));
    ck_assert(c.head_dim == 8 && c.torch_dtype == PSOUP_F16);
    ck_ok(psoup__hf_config_read(context, GOLDEN "config/qwen2", &c, &error));
    ck_assert(c.qkv_bias && !c.attention_bias && c.bos_token_id == -1 && c.eos_token_id == 5);
    ck_assert_int_eq(psoup__hf_config_read(context, GOLDEN "config/mistral_window", &c, &error),
                     PSOUP_ERROR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(error.message, "sliding_window: 16"));
}
END_TEST

#define SIZES                                                                                      \
    "\"vocab_size\":32,\"hidden_size\":16,\"intermediate_size\":24,\"num_hidden_layers\":2,"       \
    "\"num_attention_heads\":4"

static psoup_status parse_config(const char *text, psoup_model_config *c) {
    return psoup__hf_config_parse(text, strlen(text), "config", c, &error);
}

START_TEST(reads_old_and_new_spellings) {
    psoup_model_config c;
    ck_ok(parse_config("{\"model_type\":\"llama\"," SIZES "}", &c));
    ck_assert_int_eq(c.num_key_value_heads, 4);
    ck_ok(parse_config("{\"model_type\":\"llama\"," SIZES ",\"pad_token_id\":-1,\"rope_scaling\":"
                       "{\"type\":\"linear\",\"factor\":2}}", &c));
    ck_assert(c.rope_scaling == PSOUP_ROPE_LINEAR && c.rope_factor == 2);
    ck_ok(parse_config("{\"model_type\":\"llama\"," SIZES ",\"dtype\":\"bfloat16\","
                       "\"rope_parameters\":{\"rope_type\":\"dynamic\",\"factor\":2.5,"
                       "\"rope_theta\":5000}}", &c));
    ck_assert(c.rope_scaling == PSOUP_ROPE_DYNAMIC && c.rope_factor == 2.5f &&
              c.rope_theta == 5000 && c.torch_dtype == PSOUP_BF16);
    ck_ok(parse_config("{\"model_type\":\"mistral\"," SIZES ",\"num_key_value_heads\":4,"
                       "\"sliding_window\":4096,\"max_position_embeddings\":4096}", &c));
}
END_TEST

static const struct {
    const char *text, *says;
} bad_configs[] = {
    {"[]", "object"},
    {"{\"model_type\":\"llama\"," SIZES ",\"eos_token_id\":[1,-1]}", "eos_token_id"},
    {"{\"model_type\":\"llama\"," SIZES ",\"eos_token_id\":[1,2,3,4,5,6,7,8,9]}",
     "eos_token_id: 9 tokens; expected at most 8"},
    {"{\"model_type\":\"gpt2\"," SIZES "}", "model_type: \"gpt2\""},
    {"{" SIZES "}", "model_type"},
    {"{\"model_type\":\"llama\"," SIZES ",\"hidden_act\":\"gelu\"}", "hidden_act: \"gelu\""},
    {"{\"model_type\":\"llama\",\"vocab_size\":32}", "hidden_size: missing"},
    {"{\"model_type\":\"llama\"," SIZES ",\"num_key_value_heads\":3}", "num_key_value_heads: 3"},
    {"{\"model_type\":\"llama\"," SIZES ",\"num_key_value_heads\":-1}", "num_key_value_heads: -1"},
    {"{\"model_type\":\"llama\"," SIZES ",\"num_key_value_heads\":1e3}", "num_key_value_heads"},
    {"{\"model_type\":\"llama\",\"vocab_size\":32,\"hidden_size\":1048576,\"intermediate_size\":24,"
     "\"num_hidden_layers\":1,\"num_attention_heads\":1}",
     "hidden_size 1048576 of 1 heads: expected at most 4096 a head"},
    {"{\"model_type\":\"llama\"," SIZES ",\"head_dim\":3}", "head_dim: 3"},
    {"{\"model_type\":\"llama\"," SIZES ",\"head_dim\":99999999999}", "head_dim: 99999999999"},
    {"{\"model_type\":\"llama\"," SIZES ",\"rms_norm_eps\":0}", "rms_norm_eps: 0"},
    {"{\"model_type\":\"llama\"," SIZES ",\"rms_norm_eps\":\"a\"}", "rms_norm_eps"},
    {"{\"model_type\":\"llama\"," SIZES ",\"rope_theta\":-1}", "rope_theta: -1"},
    {"{\"model_type\":\"llama\"," SIZES ",\"rope_scaling\":{\"type\":\"longrope\"}}", "longrope"},
    {"{\"model_type\":\"llama\"," SIZES ",\"rope_scaling\":{\"type\":\"linear\"}}", "factor: 0"},
    {"{\"model_type\":\"llama\"," SIZES ",\"rope_scaling\":3}", "rope_scaling"},
    {"{\"model_type\":\"llama\"," SIZES ",\"tie_word_embeddings\":1}", "tie_word_embeddings"},
    {"{\"model_type\":\"llama\"," SIZES ",\"torch_dtype\":\"float8\"}", "torch_dtype: \"float8\""},
    {"{\"model_type\":\"llama\"," SIZES ",\"eos_token_id\":\"x\"}", "eos_token_id"},
    {"{\"model_type\":\"llama\"," SIZES ",\"quantization_config\":{}}", "quantization_config"},
    {"{\"model_type\":\"mistral\"," SIZES ",\"num_key_value_heads\":4}", "sliding_window: 4096"},
};

START_TEST(refuses_a_config) {
    psoup_model_config c;
    ck_assert_int_ne(parse_config(bad_configs[_i].text, &c), PSOUP_OK);
    ck_assert_msg(strstr(error.message, bad_configs[_i].says) != NULL, "%s", error.message);
}
END_TEST

START_TEST(configs_round_trip) {
    static const char *const names[] = {"config/llama", "config/llama3", "config/yarn",
                                        "config/qwen2"};
    for (int i = 0; i < 4; i++) {
        char from[256];
        psoup_model_config a, b;
        snprintf(from, sizeof from, GOLDEN "%s", names[i]);
        make_directory(names[i]);
        ck_ok(psoup__hf_config_read(context, from, &a, &error));
        ck_ok(psoup__hf_config_write(context, in_scratch(names[i]), &a, &error));
        ck_ok(psoup__hf_config_read(context, in_scratch(names[i]), &b, &error));
        ck_assert_mem_eq(&a, &b, sizeof a);
    }
    make_directory("copy");
    ck_ok(psoup__hf_copy_sidecars(context, GOLDEN "sharded/model-00001-of-00002.safetensors",
                                  in_scratch("copy"), &error));
    ck_assert(psoup__file_exists(in_scratch("copy/config.json")));
    ck_assert(psoup__file_exists(in_scratch("copy/generation_config.json")));
    ck_assert(!psoup__file_exists(in_scratch("copy/tokenizer.json")));
}
END_TEST

/* What ends a text stands in either file, in config.json first. */
START_TEST(end_tokens_of_generation) {
    static const struct {
        const char *config, *generation;
        int32_t ends[8]; /* -1 from there on */
        const char *says;
    } cases[] = {{"7", "[7, 8]", {7, 8, -1}, NULL},
                 {"[7, 9]", "[8, 9, 7]", {7, 9, 8, -1}, NULL},
                 {"7", "8", {7, 8, -1}, NULL},
                 {"7", "null", {7, -1}, NULL},
                 {"null", "[8]", {8, -1}, NULL},
                 {"[1,2,3,4,5,6,7,8]", "8", {1, 2, 3, 4, 5, 6, 7, 8}, NULL},
                 {"[1,2,3,4,5,6,7,8]", "9", {0}, "generation_config.json: eos_token_id: with those of config.json"},
                 {"7", "[8, -2]", {0}, "generation_config.json: eos_token_id: expected a token id"},
                 {"7", "\"x\"", {0}, "generation_config.json: eos_token_id: expected a token id"},
                 {"7", "[8", {0}, "generation_config.json"}};
    make_directory("ends");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        psoup_model_config c;
        char text[512];
        snprintf(text, sizeof text, "{\"model_type\":\"llama\"," SIZES ",\"eos_token_id\":%s}", cases[i].config);
        write_file("ends/config.json", text, strlen(text));
        snprintf(text, sizeof text, "{\"temperature\":0.6,\"eos_token_id\":%s}", cases[i].generation);
        write_file("ends/generation_config.json", text, strlen(text));
        if (cases[i].says) {
            ck_assert_int_ne(psoup__hf_config_read(context, in_scratch("ends"), &c, &error), PSOUP_OK);
            ck_assert_msg(strstr(error.message, cases[i].says) != NULL, "%s", error.message);
            continue;
        }
        ck_ok(psoup__hf_config_read(context, in_scratch("ends"), &c, &error));
        bool more = true;
        for (int k = 0; k < 8; k++) {
            more = more && (k == 0 || cases[i].ends[k] > 0);
            ck_assert_int_eq(k ? c.more_eos_token_ids[k - 1] : c.eos_token_id, more ? cases[i].ends[k] : -1);
        }
    }
}
END_TEST

/* ---- PEFT ----------------------------------------------------------------------------------------- */

START_TEST(reads_adapters) {
    psoup_json *scales;
    ck_ok(psoup_json_read(context, GOLDEN "scales.json", &scales, &error));
    const char *name = NULL;
    for (const psoup_json *expected; (expected = psoup_json_next(scales, &name)) != NULL;) {
        char path[256];
        psoup__peft *peft;
        snprintf(path, sizeof path, GOLDEN "adapter/%s", name);
        ck_ok(psoup__peft_open(context, path, &peft, &error));
        ck_assert_uint_eq(peft->n, psoup_json_size(expected));
        ck_assert(!psoup__tensor_is_there(&peft->head));
        for (size_t i = 0; i < peft->n; i++) {
            double scale = psoup_json_real(psoup_json_get(expected, peft->pairs[i].module), NAN);
            ck_assert_msg(fabs((double)peft->pairs[i].scale - scale) < 1e-6, "%s %s %g %g", name,
                          peft->pairs[i].module, (double)peft->pairs[i].scale, scale);
            ck_assert(i == 0 || strcmp(peft->pairs[i - 1].module, peft->pairs[i].module) < 0);
        }
        psoup__peft_free(peft);
    }
    psoup_json_free(scales);
    psoup__peft *peft;
    ck_ok(psoup__peft_open(context, GOLDEN "adapter/reward", &peft, &error));
    ck_assert_str_eq(peft->pairs[0].module, "model.layers.0.self_attn.q_proj");
    ck_assert(psoup__tensor_is_there(&peft->head) && peft->head.shape[0] == 1 && peft->head.shape[1] == 16);
    psoup__peft_free(peft);
}
END_TEST

static void same_bytes(const psoup__tensor *a, const psoup__tensor *b) {
    char x[4096], y[sizeof x];
    ck_assert(a->bytes == b->bytes && a->bytes <= sizeof x);
    psoup__tensor_bytes(a, 0, a->bytes, x);
    psoup__tensor_bytes(b, 0, b->bytes, y);
    ck_assert_mem_eq(x, y, a->bytes);
}

START_TEST(adapters_round_trip) {
    static const struct {
        const char *name;
        int32_t rank;
        float alpha;
        bool rslora;
    } all[] = {{"adapter/plain", 4, 8, false}, {"adapter/patterns", 4, 8, true},
               {"adapter/regex", 2, 4, false}, {"adapter/reward", 2, 4, false}};
    for (int i = 0; i < 4; i++) {
        char from[256];
        float head[16];
        psoup__peft *a, *b;
        snprintf(from, sizeof from, GOLDEN "%s", all[i].name);
        ck_ok(psoup__peft_open(context, from, &a, &error));
        psoup__peft_output output = {.pairs = a->pairs, .n = a->n, .rank = all[i].rank,
                                     .alpha = all[i].alpha, .rslora = all[i].rslora,
                                     .task_type = psoup__tensor_is_there(&a->head) ? "SEQ_CLS" : "CAUSAL_LM"};
        if (psoup__tensor_is_there(&a->head)) {
            psoup__tensor_bytes(&a->head, 0, sizeof head, head);
            output.head = head;
            output.dim = 16;
        }
        ck_ok(psoup__peft_write(context, in_scratch(all[i].name), &output, &error));
        ck_ok(psoup__peft_open(context, in_scratch(all[i].name), &b, &error));
        ck_assert_uint_eq(a->n, b->n);
        for (size_t k = 0; k < a->n; k++) {
            ck_assert_str_eq(a->pairs[k].module, b->pairs[k].module);
            ck_assert_float_eq(a->pairs[k].scale, b->pairs[k].scale);
            ck_assert_int_eq(a->pairs[k].rank, b->pairs[k].rank);
            same_bytes(&a->pairs[k].a, &b->pairs[k].a);
            same_bytes(&a->pairs[k].b, &b->pairs[k].b);
        }
        if (psoup__tensor_is_there(&a->head))
            same_bytes(&a->head, &b->head);
        psoup__peft_free(a);
        psoup__peft_free(b);
    }
}
END_TEST

static const struct {
    const char *fields, *says;
} bad_adapters[] = {
    {"\"peft_type\":\"IA3\"", "peft_type"},
    {"\"r\":0", "r:"},
    {"\"lora_alpha\":\"x\"", "lora_alpha"},
    {"\"use_dora\":true", "use_dora"},
    {"\"bias\":\"all\"", "bias: \"all\""},
    {"\"fan_in_fan_out\":\"yes\"", "fan_in_fan_out"},
    {"\"layer_replication\":[[0,1]]", "layer_replication"},
    {"\"init_lora_weights\":\"pissa_niter_4\"", "pissa_niter_4"},
    {"\"init_lora_weights\":\"olora\"", "olora"},
    {"\"modules_to_save\":[\"lm_head\"]", "modules_to_save: \"lm_head\""},
    {"\"trainable_token_indices\":[1]", "trainable_token_indices"},
    {"\"rank_pattern\":{\"(q|k)_proj\":2}", "(q|k)_proj"},
    {"\"rank_pattern\":{\"q_proj\":-2}", "q_proj"},
    {"\"alpha_pattern\":{\"q_proj\":\"2\"}", "q_proj"},
    {"\"alpha_pattern\":[]", "alpha_pattern"},
};

START_TEST(refuses_an_adapter) {
    char text[512];
    psoup_json *config;
    static const char *const defaults[] = {"\"peft_type\":\"LORA\"", "\"r\":4", "\"lora_alpha\":8"};
    int n = snprintf(text, sizeof text, "{%s", bad_adapters[_i].fields);
    for (int i = 0; i < 3; i++)
        if (strncmp(bad_adapters[_i].fields, defaults[i], strchr(defaults[i], ':') - defaults[i]) != 0)
            n += snprintf(text + n, sizeof text - (size_t)n, ",%s", defaults[i]);
    snprintf(text + n, sizeof text - (size_t)n, "}");
    ck_assert_int_ne(psoup__peft_config_parse(text, strlen(text), "adapter", &config, &error),
                     PSOUP_OK);
    ck_assert_msg(strstr(error.message, bad_adapters[_i].says) != NULL, "%s", error.message);
    ck_assert_ptr_null(config);
}
END_TEST

/* A copy of the plain adapter with a byte string in its files replaced by another of that length. */
static psoup_status open_changed(const char *file, const char *from, const char *to) {
    static const char *const files[] = {"adapter_config.json", "adapter_model.safetensors"};
    psoup__peft *peft;
    make_directory("changed");
    for (int i = 0; i < 2; i++) {
        char path[256], *data;
        size_t length, changes = 0;
        snprintf(path, sizeof path, GOLDEN "adapter/plain/%s", files[i]);
        ck_ok(psoup__file_read(context, path, 1 << 20, &data, &length, &error));
        for (size_t at = 0; strcmp(file, files[i]) == 0 && at + strlen(from) <= length; at++)
            if (memcmp(data + at, from, strlen(from)) == 0) {
                memcpy(data + at, to, strlen(to));
                changes++;
                break;
            }
        ck_assert(changes == 1 || strcmp(file, files[i]) != 0);
        snprintf(path, sizeof path, "changed/%s", files[i]);
        write_file(path, data, length);
        psoup__free(context, data);
    }
    psoup_status status = psoup__peft_open(context, in_scratch("changed"), &peft, &error);
    psoup__peft_free(peft);
    return status;
}

START_TEST(refuses_adapter_tensors) {
    ck_ok(open_changed("adapter_config.json", "\"r\": 4", "\"r\": 4"));
    ck_assert_int_eq(open_changed("adapter_config.json", "\"r\": 4", "\"r\": 3"), PSOUP_ERROR_FORMAT);
    ck_assert_ptr_nonnull(strstr(error.message, "expected rank 3"));
    ck_assert_int_ne(open_changed("adapter_model.safetensors", "lora_A", "lora_C"), PSOUP_OK);
    ck_assert_ptr_nonnull(strstr(error.message, "lora_C"));
    ck_assert_int_ne(open_changed("adapter_model.safetensors", "layers.1.self_attn.q_proj.lora_A",
                                  "layers.1.self_attn.k_proj.lora_A"), PSOUP_OK);
    ck_assert_ptr_nonnull(strstr(error.message, "has no lora_"));
    ck_assert_int_ne(open_changed("adapter_model.safetensors", "base_model.", "best_model."),
                     PSOUP_OK);
}
END_TEST

START_TEST(matches_patterns) {
    static const struct {
        const char *key, *module;
        bool matches;
    } all[] = {
        {"q_proj", "model.layers.0.self_attn.q_proj", true},
        {"q_proj", "q_proj", true},
        {"proj", "model.layers.0.self_attn.q_proj", false},
        {"self_attn.q_proj", "model.layers.0.self_attn.q_proj", true},
        {"layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", false},
        {"layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj", true},
        {"model.layers.1.q", "model.layers.1.q", true},
        {"layers\\.\\d+\\.q", "model.layers.17.q", true},
        {"layers\\.\\d+\\.q", "model.layers.x.q", false},
        {"layers.[0-3].q", "model.layers.3.q", true},
        {"layers.[^0-3].q", "model.layers.3.q", false},
        {".*q", "model.layers.3.q", true},
        {"q_pro", "model.q_proj", false},
        {"colou?r", "a.color", true},
        {"colou?r", "a.colouur", false},
        {"a+b", "x.aaab", true},
        {"a+b", "x.b", false},
    };
    bool matches;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        ck_ok(psoup__peft_match(all[i].key, all[i].module, "test", &matches, &error));
        ck_assert_msg(matches == all[i].matches, "%s %s", all[i].key, all[i].module);
    }
    static const char *const refused[] = {"(a)", "a|b", "^a", "a$", "a{2}", "[a", "a**", "*a", "\\b",
                                          "a\\", "[]", "[b-a]"};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        ck_assert_msg(psoup__peft_match(refused[i], "a", "test", &matches, &error) ==
                          PSOUP_ERROR_UNSUPPORTED, "%s", refused[i]);
}
END_TEST

/* ---- memory ----------------------------------------------------------------------------------------- */

static psoup_status use_everything(void) {
    psoup_status status;
    psoup__weights *weights = NULL;
    psoup__peft *peft = NULL;
    psoup_model_config config;
    PSOUP__TRY(psoup__weights_map(context, GOLDEN "sharded", "model", &weights, &error));
    PSOUP__TRY(psoup__hf_config_read(context, GOLDEN "sharded", &config, &error));
    PSOUP__TRY(psoup__hf_config_write(context, scratch, &config, &error));
    PSOUP__TRY(psoup__hf_copy_sidecars(context, GOLDEN "sharded", scratch, &error));
    PSOUP__TRY(psoup__peft_open(context, GOLDEN "adapter/plain", &peft, &error));
    const psoup__peft_output output = {.pairs = peft->pairs, .n = peft->n, .rank = 4, .alpha = 8};
    PSOUP__TRY(psoup__peft_write(context, scratch, &output, &error));
fail:
    psoup__peft_free(peft);
    psoup__weights_free(weights);
    return status;
}

START_TEST(survives_every_failed_allocation) {
    int before = live, n = 0;
    psoup_status status;
    do {
        allocations = 0;
        fail_at = n++;
        memset(&error, 0, sizeof error);
        status = use_everything();
        fail_at = -1;
        ck_assert_int_eq(live, before);
        ck_assert_msg(status == PSOUP_OK || status == PSOUP_ERROR_MEMORY, "%d: %s", n,
                      error.message);
        ck_assert(status == PSOUP_OK || error.message[0] != '\0');
    } while (status != PSOUP_OK);
    ck_assert_int_gt(n, 50);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("format_hf");
    TCase *tests = tcase_create("format_hf");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, reads_configs);
    tcase_add_test(tests, reads_old_and_new_spellings);
    tcase_add_loop_test(tests, refuses_a_config, 0, (int)(sizeof bad_configs / sizeof *bad_configs));
    tcase_add_test(tests, configs_round_trip);
    tcase_add_test(tests, end_tokens_of_generation);
    tcase_add_test(tests, reads_adapters);
    tcase_add_test(tests, adapters_round_trip);
    tcase_add_loop_test(tests, refuses_an_adapter, 0,
                        (int)(sizeof bad_adapters / sizeof *bad_adapters));
    tcase_add_test(tests, refuses_adapter_tensors);
    tcase_add_test(tests, matches_patterns);
    tcase_add_test(tests, survives_every_failed_allocation);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
