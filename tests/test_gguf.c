/* GGUF models: reading what llama.cpp's converter wrote (tests/golden/gguf_golden.py), writing, config both ways. */
#include "format_case.h"

#define GGUF "tests/golden/gguf/"

static const struct {
    const char *directory, *file;
    psoup_dtype dtype;
} models[] = {{GGUF "llama", GGUF "llama-bf16.gguf", PSOUP_BF16},
              {GGUF "llama3", GGUF "llama3-f16.gguf", PSOUP_F16},
              {GGUF "qwen2", GGUF "qwen2-f32.gguf", PSOUP_F32},
              {GGUF "llama", GGUF "llama-q8_0.gguf", PSOUP_Q8_0}};
enum { MODELS = sizeof models / sizeof *models };

#define OK(call) ck_assert_msg((call) == PSOUP_OK, "%s", error.message)

static psoup__weights *weights_of(const char *path) {
    psoup__weights *weights;
    OK(psoup__weights_map(context, path, "model", &weights, &error));
    return weights;
}

/* a whole tensor as f32 */
static float *values_of(const psoup__tensor *tensor, size_t *n) {
    ck_assert(psoup__tensor_elements(tensor, n));
    float *values = malloc(*n * sizeof *values + 1);
    psoup__tensor_read(context, tensor, 0, *n, values);
    return values;
}

static void same_weights(const char *want_path, const char *got_path, bool q8) {
    psoup__weights *want = weights_of(want_path), *got = weights_of(got_path);
    ck_assert_uint_eq(psoup__weights_count(want), psoup__weights_count(got));
    for (size_t i = 0; i < psoup__weights_count(want); i++) {
        const char *name = psoup__weights_name(want, i);
        const psoup__tensor *a = psoup__weights_tensor(want, i), *b = psoup__weights_find(got, name);
        ck_assert_msg(b != NULL, "%s: no %s", got_path, name);
        ck_assert_int_eq(a->rank, b->rank);
        ck_assert_mem_eq(a->shape, b->shape, (size_t)a->rank * sizeof *a->shape);
        size_t n;
        float *x = values_of(a, &n), *y = values_of(b, &n);
        if (q8 && a->rank == 2) { /* what quantising gives */
            char *blocks = malloc(n / 32 * 34);
            psoup__from_f32(context, blocks, PSOUP_Q8_0, x, n);
            psoup__to_f32(context, x, blocks, PSOUP_Q8_0, n);
            free(blocks);
        }
        ck_assert_msg(memcmp(x, y, n * sizeof *x) == 0, "%s: %s differs", got_path, name);
        free(x);
        free(y);
    }
    psoup__weights_free(want);
    psoup__weights_free(got);
}

START_TEST(reads_the_converters) {
    same_weights(models[_i].directory, models[_i].file, models[_i].dtype == PSOUP_Q8_0);
}
END_TEST

START_TEST(reads_config) {
    psoup_model_config want, got;
    OK(psoup__hf_config_read(context, models[_i].directory, &want, &error));
    OK(psoup__hf_config_read(context, models[_i].file, &got, &error));
    want.torch_dtype = got.torch_dtype; /* the vectors are f32 there; the embedding's is meant */
    got.initializer_range = want.initializer_range; /* which is about training */
    ck_assert_int_eq(want.vocab_size, got.vocab_size);
    ck_assert_int_eq(want.head_dim, got.head_dim);
    ck_assert_float_eq(want.rope_theta, got.rope_theta);
    ck_assert_int_eq(want.rope_scaling, got.rope_scaling);
    got.rope_original_max_position = want.rope_original_max_position; /* several fit a head this small */
    if (_i == 2) /* tokenizer_config.json names one, config.json none: the file has the former */
        ck_assert_int_eq(got.bos_token_id, 0);
    got.bos_token_id = want.bos_token_id;
    ck_assert(got.pad_token_id == want.pad_token_id || got.pad_token_id == 2); /* likewise */
    got.pad_token_id = want.pad_token_id;
    ck_assert_mem_eq(&want, &got, sizeof want);
}
END_TEST

/* ---- writing ------------------------------------------------------------------------------------ */

/* Copies a model into a GGUF file in pieces of odd sizes. */
static void convert(const char *from, const char *to, psoup_dtype wanted, size_t piece) {
    psoup__weights *weights = weights_of(from);
    psoup__gguf_writer *writer;
    OK(psoup__gguf_create(context, to, &writer, &error));
    OK(psoup__gguf_metadata_from(writer, from, wanted, &error));
    size_t n = psoup__weights_count(weights);
    for (size_t i = 0; i < n; i++) {
        const psoup__tensor *t = psoup__weights_tensor(weights, i);
        OK(psoup__gguf_declare(writer, psoup__weights_name(weights, i),
                               psoup__gguf_dtype(wanted, t->rank, t->shape), t->rank, t->shape, &error));
    }
    OK(psoup__gguf_begin(writer, &error));
    for (size_t i = 0; i < n; i++) {
        const psoup__tensor *t = psoup__weights_tensor(weights, i);
        psoup_dtype dtype = psoup__gguf_dtype(wanted, t->rank, t->shape);
        size_t elements, bytes;
        float *values = values_of(t, &elements);
        ck_assert(psoup__dtype_bytes(dtype, elements, &bytes));
        char *data = malloc(bytes);
        psoup__from_f32(context, data, dtype, values, elements);
        for (size_t at = 0; at < bytes; at += piece)
            OK(psoup__gguf_write(writer, data + at, bytes - at < piece ? bytes - at : piece, &error));
        free(values);
        free(data);
    }
    ck_assert(getenv("PSOUP_TEST_KEEP") != NULL || !psoup__file_exists(to));
    OK(psoup__gguf_commit(writer, &error));
    psoup__gguf_writer_free(writer);
    psoup__weights_free(weights);
}

START_TEST(writes_what_it_reads) {
    const size_t pieces[] = {7, 1 << 20, 64, 1000};
    char path[1024];
    snprintf(path, sizeof path, "%s", in_scratch(strrchr(models[_i].file, '/') + 1));
    convert(models[_i].directory, path, models[_i].dtype, pieces[_i]);
    same_weights(models[_i].directory, path, models[_i].dtype == PSOUP_Q8_0);
    same_weights(models[_i].file, path, false);
    /* and from GGUF to GGUF, in another dtype */
    char again[1024];
    snprintf(again, sizeof again, "%s/f32-%s", scratch, strrchr(models[_i].file, '/') + 1);
    unlink(again);
    convert(path, again, PSOUP_F32, 333);
    same_weights(path, again, false);
}
END_TEST

/* Which of the converter's values we have otherwise, and why. */
static bool may_differ(const char *key) {
    static const char *const keys[] = {
        "general.name", "general.size_label", /* made up */
        "general.languages", "general.tags", "general.finetune", "general.basename", "general.quantized_by",
        "general.repo_url", "general.sampling.top_k", "general.sampling.top_p", "general.sampling.temp",
        "tokenizer.ggml.add_sep_token", /* of pairs of texts */
        "tokenizer.ggml.scores"}; /* tokenizer.json has none: the order of merges instead */
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (strcmp(key, keys[i]) == 0)
            return true;
    return false;
}

START_TEST(metadata_as_the_converters) {
    psoup__gguf *want, *got;
    psoup__gguf_writer *writer;
    const char *path = in_scratch("metadata.gguf");
    OK(psoup__gguf_create(context, path, &writer, &error));
    OK(psoup__gguf_metadata_from(writer, models[_i].directory, models[_i].dtype, &error));
    OK(psoup__gguf_begin(writer, &error));
    OK(psoup__gguf_commit(writer, &error));
    psoup__gguf_writer_free(writer);
    OK(psoup__gguf_open(context, path, &got, &error));
    OK(psoup__gguf_open(context, models[_i].file, &want, &error));
    OK(psoup__gguf_map(got, &error));
    OK(psoup__gguf_map(want, &error));
    int compared = 0;
    for (size_t i = 0; i < psoup__gguf_values(want); i++) {
        const psoup__gguf_value *a = psoup__gguf_value_at(want, i);
        if (may_differ(a->key))
            continue;
        const psoup__gguf_value *b = psoup__gguf_get(got, a->key);
        ck_assert_msg(b != NULL, "%s is missing", a->key);
        ck_assert_msg(a->type == b->type && a->element == b->element && a->count == b->count &&
                          a->bytes == b->bytes && memcmp(a->data, b->data, a->bytes) == 0,
                      "%s differs", a->key);
        compared++;
    }
    ck_assert_int_ge(compared, 20);
    const psoup__tensor *a = psoup__gguf_find(want, "rope_freqs.weight");
    const psoup__tensor *b = psoup__gguf_find(got, "rope_freqs.weight");
    ck_assert_int_eq(a != NULL, _i == 1);
    ck_assert_int_eq(b != NULL, _i == 1);
    for (size_t i = 0; a != NULL && i < a->bytes; i += 4) {
        float x, y;
        memcpy(&x, (const char *)a->data + i, 4);
        memcpy(&y, (const char *)b->data + i, 4);
        ck_assert_float_le(fabsf(x - y), 1e-5f * x);
    }
    psoup__gguf_free(want);
    psoup__gguf_free(got);
}
END_TEST

START_TEST(names) {
    static const char *const pairs[][2] = {
        {"token_embd.weight", "model.embed_tokens.weight"},
        {"output_norm.weight", "model.norm.weight"},
        {"output.weight", "lm_head.weight"},
        {"blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"},
        {"blk.123.ffn_down.weight", "model.layers.123.mlp.down_proj.weight"},
        {"blk.7.attn_output", "model.layers.7.self_attn.o_proj"},
        {"blk.7.ffn_norm.weight", "model.layers.7.post_attention_layernorm.weight"}};
    static const char *const strange[] = {"blk.1.attn_qkv.weight", "blk.01.attn_q.weight", "blk.x.attn_q.weight",
                                          "blk.1234567.attn_q.weight", "blk.1.attn_q.scale", "blk.1", "",
                                          "token_embd.weights", "output_norm_weight"};
    char out[PSOUP__GGUF_NAME];
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        ck_assert(psoup__gguf_to_hf(pairs[i][0], out));
        ck_assert_str_eq(out, pairs[i][1]);
        ck_assert(psoup__gguf_from_hf(pairs[i][1], out));
        ck_assert_str_eq(out, pairs[i][0]);
    }
    for (size_t i = 0; i < sizeof strange / sizeof *strange; i++)
        ck_assert_msg(!psoup__gguf_to_hf(strange[i], out), "%s", strange[i]);
    const psoup__gguf_layout llama = {true, 8, 2, 0}, qwen2 = {false, 8, 2, 0};
    ck_assert_int_eq(psoup__gguf_heads(&llama, "model.layers.3.self_attn.q_proj.weight"), 8);
    ck_assert_int_eq(psoup__gguf_heads(&llama, "model.layers.3.self_attn.k_proj.bias"), 2);
    ck_assert_int_eq(psoup__gguf_heads(&llama, "model.layers.3.self_attn.v_proj.weight"), 0);
    ck_assert_int_eq(psoup__gguf_heads(&qwen2, "model.layers.3.self_attn.q_proj.weight"), 0);
}
END_TEST

START_TEST(writer_refuses) {
    psoup__gguf_writer *w;
    const int64_t shape[2] = {4, 6}, odd[2] = {6, 8}, tall[2] = {16, 8}, blocks[2] = {2, 64}, huge[2] = {INT64_MAX, 4};
    const psoup__gguf_layout layout = {true, 4, 4, 2};
    const char *path = in_scratch("refused.gguf");
    char data[256] = {0};
    OK(psoup__gguf_create(context, path, &w, &error));
    psoup__gguf_set_layout(w, &layout);
    const struct {
        const char *name;
        psoup_dtype dtype;
        int rank;
        const int64_t *shape;
    } wrong[] = {{"model.layers.0.self_attn.rotary_emb.inv_freq", PSOUP_F32, 1, shape},
                 {"lm_head.weight", PSOUP_F64, 2, shape},
                 {"lm_head.weight", PSOUP_F8_E4M3, 2, shape},
                 {"lm_head.weight", PSOUP_F32, 0, shape},
                 {"lm_head.weight", PSOUP_Q8_0, 2, shape},
                 {"lm_head.weight", PSOUP_F32, 2, huge},
                 {"model.layers.0.self_attn.q_proj.weight", PSOUP_F32, 2, tall},
                 {"model.layers.0.self_attn.q_proj.weight", PSOUP_F32, 2, odd}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        ck_assert_msg(psoup__gguf_declare(w, wrong[i].name, wrong[i].dtype, wrong[i].rank, wrong[i].shape,
                                          &error) != PSOUP_OK, "case %zu", i);
    OK(psoup__gguf_declare(w, "lm_head.weight", PSOUP_Q8_0, 2, blocks, &error));
    ck_assert_int_ne(psoup__gguf_declare(w, "lm_head.weight", PSOUP_Q8_0, 2, blocks, &error), PSOUP_OK);
    OK(psoup__gguf_set_string(w, "general.name", "one", &error));
    OK(psoup__gguf_set_string(w, "general.name", "two", &error));
    OK(psoup__gguf_begin(w, &error));
    ck_assert_int_ne(psoup__gguf_set_bool(w, "late", true, &error), PSOUP_OK);
    ck_assert_int_ne(psoup__gguf_declare(w, "model.norm.weight", PSOUP_F32, 1, shape, &error), PSOUP_OK);
    ck_assert_int_ne(psoup__gguf_commit(w, &error), PSOUP_OK);
    OK(psoup__gguf_write(w, data, 136, &error));
    ck_assert_int_ne(psoup__gguf_write(w, data, 1, &error), PSOUP_OK);
    ck_assert(!psoup__file_exists(path));
    OK(psoup__gguf_commit(w, &error));
    psoup__gguf_writer_free(w);
    psoup__gguf *file;
    OK(psoup__gguf_open(context, path, &file, &error));
    ck_assert(psoup__gguf_is(file, "general.name", "two"));
    psoup__gguf_free(file);
    /* a writer that is given up leaves nothing */
    const char *other = in_scratch("given_up.gguf");
    OK(psoup__gguf_create(context, other, &w, &error));
    OK(psoup__gguf_begin(w, &error));
    psoup__gguf_writer_free(w);
    ck_assert(!psoup__file_exists(other));
    const int64_t wide[2] = {3, 40};
    ck_assert_int_eq(psoup__gguf_dtype(PSOUP_Q8_0, 2, wide), PSOUP_F16);
    ck_assert_int_eq(psoup__gguf_dtype(PSOUP_BF16, 1, wide), PSOUP_F32);
    ck_assert_int_eq(psoup__gguf_dtype(PSOUP_F8_E5M2, 2, wide), PSOUP_BF16);
    ck_assert_int_eq(psoup__gguf_dtype(PSOUP_F64, 2, wide), PSOUP_F32);
    ck_assert_int_eq(psoup__gguf_dtype(PSOUP_BF16, 2, wide), PSOUP_BF16);
}
END_TEST

/* Every scaling of the rotation, through a file and back. */
START_TEST(rotations) {
    static const psoup_model_config base = PSOUP_MODEL_CONFIG_INIT;
    for (int which = 0; which < 4; which++) {
        psoup_model_config c = base, got;
        psoup__gguf_writer *w;
        psoup__gguf *file;
        c.vocab_size = 10;
        c.hidden_size = c.intermediate_size = 64;
        c.num_hidden_layers = 1;
        c.num_attention_heads = 2;
        c.max_position_embeddings = 512;
        c.rope_scaling = which;
        c.rope_factor = 4;
        c.rope_original_max_position = which == PSOUP_ROPE_LINEAR ? 512 : 128;
        c.rope_attention_factor = which == PSOUP_ROPE_YARN ? 1.25f : 0;
        c.rope_beta_fast = which == PSOUP_ROPE_YARN ? 24 : 32;
        c.bos_token_id = 3;
        c.eos_token_id = 4;
        c.more_eos_token_ids[0] = 5;
        OK(psoup__make_directories(in_scratch("hf"), &error));
        OK(psoup__hf_config_write(context, in_scratch("hf"), &c, &error));
        OK(psoup__hf_config_read(context, in_scratch("hf"), &c, &error));
        OK(psoup__gguf_create(context, in_scratch("rope.gguf"), &w, &error));
        OK(psoup__gguf_metadata_from(w, in_scratch("hf"), PSOUP_F32, &error));
        OK(psoup__gguf_begin(w, &error));
        OK(psoup__gguf_commit(w, &error));
        psoup__gguf_writer_free(w);
        OK(psoup__gguf_open(context, in_scratch("rope.gguf"), &file, &error));
        ck_assert(psoup__gguf_is(file, "tokenizer.ggml.model", "none"));
        OK(psoup__gguf_read_config(file, &got, &error));
        psoup__gguf_free(file);
        ck_assert_int_eq(got.rope_scaling, which);
        if (which != PSOUP_ROPE_DEFAULT) {
            ck_assert_float_eq(got.rope_factor, c.rope_factor);
            ck_assert_int_eq(got.rope_original_max_position, c.rope_original_max_position);
        }
        ck_assert_float_eq_tol(got.rope_attention_factor, c.rope_attention_factor, 1e-6f);
        ck_assert_float_eq(got.rope_beta_fast, c.rope_beta_fast);
    }
    psoup_model_config dynamic = base;
    psoup__gguf_writer *w;
    dynamic.vocab_size = dynamic.hidden_size = dynamic.intermediate_size = 64;
    dynamic.num_hidden_layers = dynamic.num_attention_heads = 1;
    dynamic.rope_scaling = PSOUP_ROPE_DYNAMIC;
    dynamic.rope_factor = 2;
    OK(psoup__hf_config_write(context, in_scratch("hf"), &dynamic, &error));
    OK(psoup__gguf_create(context, in_scratch("dynamic.gguf"), &w, &error));
    ck_assert_int_eq(psoup__gguf_metadata_from(w, in_scratch("hf"), PSOUP_F32, &error),
                     PSOUP_ERROR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(error.message, "dynamic"));
    psoup__gguf_writer_free(w);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("gguf");
    TCase *c = tcase_create("gguf");
    tcase_add_checked_fixture(c, set_up, tear_down);
    tcase_set_timeout(c, 60);
    tcase_add_loop_test(c, reads_the_converters, 0, MODELS);
    tcase_add_loop_test(c, reads_config, 0, MODELS);
    tcase_add_loop_test(c, writes_what_it_reads, 0, MODELS);
    tcase_add_loop_test(c, metadata_as_the_converters, 0, MODELS);
    tcase_add_test(c, names);
    tcase_add_test(c, writer_refuses);
    tcase_add_test(c, rotations);
    suite_add_tcase(suite, c);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
