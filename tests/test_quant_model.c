/* Models whose linears are kept in blocks: the bits of models that hold the blocks' values, in scores, gradients,
 * generation and training; directories that transformers saved with bitsandbytes; and what is refused. */
#include "model_case.h"

#include "psoup/ppo.h"

#define QUANT "tests/golden/quant/"
static const psoup_dtype dtypes[] = {PSOUP_INT8, PSOUP_NF4};

static psoup_model *load_as(psoup_context *context, const char *directory, psoup_dtype dtype) {
    psoup_load_options options = PSOUP_LOAD_OPTIONS_INIT;
    psoup_model *model = NULL;
    options.dtype = (int32_t)dtype;
    OK(psoup_model_load_with(context, directory, &options, &model, &error));
    return model;
}

static psoup_status refused_as(psoup_context *context, const char *directory, int32_t dtype) {
    psoup_load_options options = PSOUP_LOAD_OPTIONS_INIT;
    psoup_model *model = NULL;
    options.dtype = dtype;
    psoup_status status = psoup_model_load_with(context, directory, &options, &model, &error);
    ck_assert_ptr_null(model);
    return status;
}

#define REFUSED(call, status, text)                                                                         \
    do {                                                                                                    \
        ck_assert_int_eq(call, status);                                                                     \
        ck_assert_msg(strstr(error.message, text) != NULL, "\"%s\" lacks \"%s\"", error.message, text);     \
    } while (0)

/* The weights of one model written into another, of f32, of the same shape. */
static void copy_values(const psoup_model *from, psoup_model *to) {
    float *piece = malloc(3 * sizeof(float) * PSOUP__PIECE);
    for (psoup__parameter p = {.next = 0}, q = {.next = 0}; psoup__model_next(from, &p) && psoup__model_next(to, &q);)
        for (size_t first = 0; first < p.count; first += PSOUP__PIECE) {
            size_t n = p.count - first < PSOUP__PIECE ? p.count - first : PSOUP__PIECE;
            OK(psoup__parameter_read(from, &p, first, n, piece, piece + PSOUP__PIECE, &error));
            psoup__parameter_write(to, &q, first, n, piece, piece + 2 * PSOUP__PIECE);
        }
    OK(psoup__model_pack(to, false, &error));
    free(piece);
}

static void add_adapters(psoup_model *model, const char *directory) {
    psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
    if (strcmp(directory, GOLDEN "plain") == 0) {
        OK(psoup_model_load_adapter(model, "all", GOLDEN "adapter_all", &error));
        OK(psoup_model_load_adapter(model, "qv", GOLDEN "adapter_qv", &error));
        return;
    }
    options.rank = 4;
    options.targets = PSOUP_ALL_LINEAR;
    OK(psoup_model_add_adapter(model, "all", &options, &error));
    OK(psoup_model_add_adapter(model, "qv", &options, &error));
}

/* A model in blocks, and one of f32 with their values. */
typedef struct twins {
    psoup_model *blocks, *values;
} twins;

static twins make_twins(psoup_context *context, const char *directory, psoup_dtype dtype) {
    twins t = {load_as(context, directory, dtype), load_as(context, directory, PSOUP_F32)};
    copy_values(t.blocks, t.values);
    add_adapters(t.blocks, directory);
    add_adapters(t.values, directory);
    return t;
}

static void free_twins(twins *t) {
    psoup_model_free(t->blocks), psoup_model_free(t->values);
}

static void same(const float *a, const float *b, size_t n, const char *what) {
    for (size_t i = 0; i < n; i++)
        ck_assert_msg(memcmp(a + i, b + i, 4) == 0, "%s [%zu]: %a, with the values %a", what, i, a[i], b[i]);
}

/* A directory with a model of random weights whose linears' rows are no whole blocks, nor runs of 16; its files are
 * read in f32. */
static const char *odd_directory(void) {
    static char path[64];
    psoup_context *context = make_context(1);
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_model *model = NULL;
    strcpy(path, temporary_directory());
    config.vocab_size = VOCAB;
    config.hidden_size = 42;
    config.intermediate_size = 77;
    config.num_hidden_layers = 2;
    config.num_attention_heads = 3;
    config.max_position_embeddings = 64;
    config.tie_word_embeddings = 1;
    config.attention_bias = 1;
    config.initializer_range = 0.1f;
    OK(psoup_model_create(context, &config, 3, &model, &error));
    OK(psoup_model_save(model, path, NULL, &error));
    psoup_model_free(model);
    psoup_context_free(context);
    return path;
}

/* ---- the same bits ------------------------------------------------------------------------------------ */

static void same_scores(twins *t) {
    static const float mixes[6][2] = {{1, 0}, {0, 1}, {0.5f, 0.5f}, {0, 0}, {0.25f, 0.75f}, {1, 0}};
    sample_rows rows;
    float a[256], b[256];
    fill_rows(&rows, 6, 11);
    for (int i = 0; i < 6; i++)
        rows.row[i].mix = mixes[i];
    OK(psoup_model_logprobs(t->blocks, rows.row, 6, a, &error));
    OK(psoup_model_logprobs(t->values, rows.row, 6, b, &error));
    same(a, b, rows.total - 6, "a log-probability");
    OK(psoup_model_logprobs(t->blocks, rows.row + 3, 1, a, &error)); /* alone */
    same(a, b + 6 + 18, rows.row[3].n - 1, "a row alone");
}

static void same_gradients(twins *t) {
    sample_rows rows;
    psoup_gradients *g[2];
    const float mix[2] = {0.5f, 0.5f};
    fill_rows(&rows, 5, 12);
    for (int i = 0; i < 5; i++)
        rows.row[i].mix = mix;
    const uint32_t what = PSOUP_GRADIENT_BASE | PSOUP_GRADIENT_ADAPTERS | PSOUP_GRADIENT_MIX;
    OK(psoup_model_gradients(t->blocks, rows.row, 5, NULL, what, &g[0], &error));
    OK(psoup_model_gradients(t->values, rows.row, 5, NULL, what, &g[1], &error));
    size_t n = 0;
    const float *a = psoup_gradients_get(g[0], "mix", &n), *b = psoup_gradients_get(g[1], "mix", &n);
    same(a, b, n, "mix");
    for (psoup__parameter p = {.next = 0}; psoup__model_next(t->blocks, &p);) {
        a = psoup_gradients_get(g[0], p.name, &n);
        b = psoup_gradients_get(g[1], p.name, &n);
        ck_assert(a && b && n == p.count);
        same(a, b, n, p.name);
    }
    a = psoup_gradients_get(g[0], "all/model.layers.1.mlp.down_proj.lora_A", &n);
    b = psoup_gradients_get(g[1], "all/model.layers.1.mlp.down_proj.lora_A", &n);
    ck_assert(a && b && n > 0);
    same(a, b, n, "lora_A");
    psoup_gradients_free(g[0]), psoup_gradients_free(g[1]);
}

static void same_texts(twins *t) {
    sample_rows rows;
    psoup_prompt prompts[6];
    psoup_sampling sampling = PSOUP_SAMPLING_INIT;
    psoup_generation *g[2];
    const float mix[2] = {0.5f, 0.5f};
    fill_rows(&rows, 6, 13);
    sampling.max_new_tokens = 12;
    sampling.seed = 4;
    for (int i = 0; i < 6; i++)
        prompts[i] = (psoup_prompt){.tokens = rows.row[i].tokens, .n = rows.row[i].n, .mix = i % 2 ? mix : NULL,
                                    .sequence = (uint64_t)i};
    OK(psoup_generate(t->blocks, prompts, 6, &sampling, NULL, NULL, NULL, &g[0], &error));
    OK(psoup_generate(t->values, prompts, 6, &sampling, NULL, NULL, NULL, &g[1], &error));
    for (size_t i = 0; i < 6; i++) {
        const psoup_completion *a = psoup_generation_get(g[0], i), *b = psoup_generation_get(g[1], i);
        ck_assert_uint_eq(a->n, b->n);
        ck_assert_mem_eq(a->tokens, b->tokens, a->n * sizeof *a->tokens);
        same(a->logprobs, b->logprobs, a->n, "a drawn token");
    }
    psoup_generation_free(g[0]), psoup_generation_free(g[1]);
}

static void check_bits(const char *directory) {
    float first[2][256];
    for (int threads = 1; threads <= 2; threads++)
        for (int d = 0; d < 2; d++) {
            psoup_context *context = make_context(threads);
            twins t = make_twins(context, directory, dtypes[d]);
            psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
            OK(psoup_model_get_config(t.blocks, &config, &error));
            ck_assert_int_eq(config.linear_dtype, dtypes[d]);
            same_scores(&t);
            same_gradients(&t);
            same_texts(&t);
            sample_rows rows;
            float again[256];
            fill_rows(&rows, 4, 5);
            OK(psoup_model_logprobs(t.blocks, rows.row, 4, threads == 1 ? first[d] : again, &error));
            if (threads == 2)
                same(again, first[d], rows.total - 4, "two threads");
            free_twins(&t);
            psoup_context_free(context);
        }
}

START_TEST(test_bits) {
    check_bits(GOLDEN "plain");
    const char *odd = odd_directory();
    check_bits(odd);
    remove_directory(odd);
}
END_TEST

/* A created model is one whose random weights were then written in blocks. */
START_TEST(test_create) {
    psoup_context *context = make_context(2);
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_model *blocks = NULL, *plain = NULL;
    config.vocab_size = VOCAB;
    config.hidden_size = 64;
    config.intermediate_size = 128;
    config.num_hidden_layers = 1;
    config.num_attention_heads = 4;
    OK(psoup_model_create(context, &config, 7, &plain, &error));
    config.linear_dtype = PSOUP_NF4;
    OK(psoup_model_create(context, &config, 7, &blocks, &error));
    float a[64 * 128], b[64 * 128], scratch[64 * 128];
    uint8_t codes[64 * 64];
    float scales[128];
    psoup__parameter p = {.next = 0}, q = {.next = 0};
    while (psoup__model_next(blocks, &p) && psoup__model_next(plain, &q)) {
        OK(psoup__parameter_read(blocks, &p, 0, p.count, a, scratch, &error));
        OK(psoup__parameter_read(plain, &q, 0, p.count, b, scratch, &error));
        if (psoup__is_linear(plain, q.weight)) {
            psoup__blocks_write(context, PSOUP_NF4, b, p.count, codes, scales);
            psoup__blocks_read(context, &(psoup__blocks){PSOUP_NF4, codes, scales}, 0, p.count, b);
        }
        same(a, b, p.count, p.name);
    }
    psoup_model_free(blocks), psoup_model_free(plain);
    config.linear_dtype = PSOUP_Q8_0;
    REFUSED(psoup_model_create(context, &config, 7, &blocks, &error), PSOUP_ERROR_FORMAT, "linear_dtype: 12");
    config.linear_dtype = 0;
    config.reserved = 3;
    REFUSED(psoup_model_create(context, &config, 7, &blocks, &error), PSOUP_ERROR_FORMAT,
            "psoup_model_config: reserved is 3: expected 0");
    psoup_context_free(context);
}
END_TEST

/* ---- training ----------------------------------------------------------------------------------------- */

static psoup_status sft(psoup_model *model, const char *adapter, const char *checkpoints, int resume) {
    sample_rows rows;
    psoup_example examples[4];
    psoup_sft_options options = PSOUP_SFT_OPTIONS_INIT;
    fill_rows(&rows, 4, 21);
    for (int i = 0; i < 4; i++)
        examples[i] = (psoup_example){.tokens = rows.row[i].tokens, .n = rows.row[i].n, .n_prompt = 1};
    examples[2] = examples[0]; /* of one token there is nothing to learn */
    options.max_steps = 3;
    options.batch_tokens = 64;
    options.learning_rate = 1e-2f;
    options.checkpoint_dir = checkpoints;
    options.checkpoint_every = 1;
    options.resume = resume;
    return psoup_sft(model, adapter, examples, 4, NULL, 0, &options, &error);
}

static int reward(void *user, const psoup_rollout *rollouts, size_t n, float *scores) {
    for (size_t i = 0; i < n; i++)
        scores[i] = (float)(rollouts[i].response[0] % 7);
    return 0;
}

static void train_ppo(psoup_model *model) {
    sample_rows rows;
    psoup_ppo_prompt prompts[2];
    psoup_ppo_policy policy = {.adapter = "qv", .reward_fn = reward, .prompts = prompts, .n_prompts = 2};
    psoup_ppo_options options = PSOUP_PPO_OPTIONS_INIT;
    psoup_ppo *run = NULL;
    int64_t left;
    fill_rows(&rows, 2, 22);
    for (int i = 0; i < 2; i++)
        prompts[i] = (psoup_ppo_prompt){.tokens = rows.row[i].tokens, .n = rows.row[i].n, .id = i};
    options.steps = 1;
    options.batch_size = 2;
    options.max_new_tokens = 6;
    options.ppo_epochs = 2;
    OK(psoup_ppo_create(model, &policy, 1, &options, &run, &error));
    OK(psoup_ppo_step(run, &left, &error));
    psoup_ppo_free(run);
}

static void same_adapters(twins *t, const char *name, const char *what) {
    const float *a, *b;
    size_t n, m;
    OK(psoup_model_adapter_data(t->blocks, name, &a, &n, &error));
    OK(psoup_model_adapter_data(t->values, name, &b, &m, &error));
    ck_assert_uint_eq(n, m);
    same(a, b, n, what);
}

/* Adapters trained on blocks have the bits of those trained on their values. */
START_TEST(test_training) {
    for (int d = 0; d < 2; d++) {
        psoup_context *context = make_context(2);
        twins t = make_twins(context, GOLDEN "plain", dtypes[d]);
        OK(sft(t.blocks, "all", NULL, 0));
        OK(sft(t.values, "all", NULL, 0));
        same_adapters(&t, "all", "after SFT");
        train_ppo(t.blocks);
        train_ppo(t.values);
        same_adapters(&t, "qv", "after PPO");
        free_twins(&t);
        psoup_context_free(context);
    }
}
END_TEST

/* The base itself does not train; and a checkpoint is of the base it was taken on, to its blocks. */
START_TEST(test_identity) {
    psoup_context *context = make_context(1);
    char directory[64];
    strcpy(directory, temporary_directory());
    psoup_example example = {.tokens = (const int32_t[]){3, 4, 5}, .n = 3, .n_prompt = 1};
    psoup_sft_options options = PSOUP_SFT_OPTIONS_INIT;
    twins t = make_twins(context, GOLDEN "plain", PSOUP_NF4);
    REFUSED(psoup_sft(t.blocks, NULL, &example, 1, NULL, 0, &options, &error), PSOUP_ERROR_UNSUPPORTED, "nf4 blocks");
    psoup_memory plan = {.size = sizeof plan};
    REFUSED(psoup_sft_memory(t.blocks, NULL, &example, 1, NULL, 0, &options, &plan, &error), PSOUP_ERROR_UNSUPPORTED,
            "nf4 blocks");
    ck_assert_ptr_null(t.blocks->data);
    REFUSED(psoup_model_save(t.blocks, directory, NULL, &error), PSOUP_ERROR_UNSUPPORTED, "nf4 blocks");
    OK(sft(t.blocks, "all", directory, 0));
    OK(sft(t.blocks, "all", directory, 1));
    uint8_t *code = (uint8_t *)(uintptr_t)t.blocks->layers[1].linear[PSOUP__UP].data;
    code[7] ^= 0x10;
    REFUSED(sft(t.blocks, "all", directory, 1), PSOUP_ERROR_STATE, "base");
    REFUSED(sft(t.values, "all", directory, 1), PSOUP_ERROR_STATE, "base");
    free_twins(&t);
    remove_directory(directory);
    psoup_context_free(context);
}
END_TEST

/* ---- memory ------------------------------------------------------------------------------------------- */

typedef struct counter {
    size_t now, most;
} counter;

static void *counted_alloc(void *user, size_t bytes, size_t alignment) {
    counter *c = user;
    size_t *memory = aligned_alloc(64, (bytes + 64 + 63) / 64 * 64);
    if (!memory)
        return NULL;
    *memory = bytes;
    c->now += bytes;
    c->most = c->now > c->most ? c->now : c->most;
    return (char *)memory + 64;
}

static void counted_free(void *user, void *memory) {
    counter *c = user;
    if (!memory)
        return;
    c->now -= *(size_t *)(void *)((char *)memory - 64);
    free((char *)memory - 64);
}

/* Loading takes the memory of the model in blocks and a few pieces: less than one matrix of it in f32. */
START_TEST(test_memory) {
    counter count = {0};
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_context *context = NULL;
    psoup_model *model = NULL;
    char directory[64];
    strcpy(directory, temporary_directory());
    options.threads = 1;
    options.allocator = (psoup_allocator){&count, counted_alloc, counted_free};
    OK(psoup_context_create(&options, &context, &error));
    config.vocab_size = VOCAB;
    config.hidden_size = 512;
    config.intermediate_size = 1536;
    config.num_hidden_layers = 2;
    config.num_attention_heads = 8;
    config.torch_dtype = PSOUP_F32;
    OK(psoup_model_create(context, &config, 1, &model, &error));
    OK(psoup_model_save(model, directory, NULL, &error));
    psoup_model_free(model);
    const size_t before = count.now, linears = 2 * (4 * 512 * 512 + 3 * 512 * 1536);
    for (int d = 0; d < 2; d++) {
        count.most = before;
        model = load_as(context, directory, dtypes[d]);
        const size_t blocks = linears / (d ? 2 : 1) + linears / 64 * 4;
        const size_t rest = (2 * VOCAB * 512 + 5 * 512) * sizeof(float) * 2; /* stored, and packed */
        ck_assert_msg(count.now - before >= blocks, "%zu bytes cannot hold it", count.now - before);
        ck_assert_msg(count.now - before <= blocks + rest + (1 << 17), "%zu bytes for blocks of %zu",
                      count.now - before, blocks);
        ck_assert_msg(count.most - before <= blocks + rest + (1 << 20), "%zu bytes while loading blocks of %zu",
                      count.most - before, blocks);
        psoup_model_free(model);
        ck_assert_uint_eq(count.now, before);
    }
    remove_directory(directory);
    psoup_context_free(context);
}
END_TEST

/* ---- bitsandbytes' directories ------------------------------------------------------------------------ */

static void check_logits(psoup_model *model, const char *directory) {
    char path[128];
    psoup_context *context = psoup_model_context(model);
    psoup__safetensors *file = NULL;
    snprintf(path, sizeof path, "%s/logits.safetensors", directory);
    OK(psoup__safetensors_open(context, path, &file, &error));
    OK(psoup__safetensors_map(file, &error));
    int32_t tokens[12], row[12];
    const int32_t start[2] = {0, 12};
    float want[12 * 40], got[12 * 40];
    for (size_t i = 0; i < psoup__safetensors_count(file); i++) {
        const psoup__tensor *tensor = psoup__safetensors_tensor(file, i);
        bool logits = strcmp(psoup__safetensors_name(file, i), "logits") == 0;
        ck_assert_uint_eq(tensor->bytes, logits ? sizeof want : sizeof tokens);
        memcpy(logits ? (void *)want : (void *)tokens, tensor->data, tensor->bytes);
    }
    for (int i = 0; i < 12; i++)
        row[i] = i;
    psoup__tape *tape = NULL;
    OK(psoup__tape_create(model, &tape, &error));
    const psoup__batch batch = {.n = 1, .rows = 12, .tokens = tokens, .start = start};
    OK(psoup__forward(model, tape, &batch, false, &error));
    OK(psoup__logits(model, tape, row, 12, got, &error));
    ck_assert_msg(relative(got, want, 12 * 40) < 2e-6, "the logits are off by %g", relative(got, want, 12 * 40));
    psoup__tape_free(tape);
    psoup__safetensors_free(file);
}

START_TEST(test_bitsandbytes) {
    static const struct {
        const char *directory;
        psoup_dtype dtype;
    } models[] = {{QUANT "nf4", PSOUP_NF4}, {QUANT "double", PSOUP_NF4}, {QUANT "int8", PSOUP_INT8}};
    psoup_context *context = make_context(2);
    for (int m = 0; m < 3; m++) {
        psoup_model *as_is = NULL;
        psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
        OK(psoup_model_load(context, models[m].directory, &as_is, &error));
        OK(psoup_model_get_config(as_is, &config, &error));
        ck_assert_int_eq(config.linear_dtype, models[m].dtype);
        check_logits(as_is, models[m].directory);
        psoup_model *same_dtype = load_as(context, models[m].directory, models[m].dtype);
        psoup_model *wide = load_as(context, models[m].directory, PSOUP_F32);
        psoup_model *narrow = load_as(context, models[m].directory, PSOUP_BF16);
        OK(psoup_model_get_config(narrow, &config, &error));
        ck_assert(config.linear_dtype == 0 && config.torch_dtype == PSOUP_BF16);
        const int32_t tokens[] = {4, 9, 22, 5, 31};
        const psoup_row row = {.tokens = tokens, .n = 5};
        float a[4], b[4];
        OK(psoup_model_logprobs(as_is, &row, 1, a, &error));
        OK(psoup_model_logprobs(same_dtype, &row, 1, b, &error));
        same(b, a, 4, "nf4 as nf4");
        OK(psoup_model_logprobs(wide, &row, 1, b, &error));
        same(b, a, 4, "in f32");
        OK(psoup_model_logprobs(narrow, &row, 1, b, &error));
        ck_assert(distance(b, a, 4) < 0.1 && distance(b, a, 4) > 0);
        REFUSED(refused_as(context, models[m].directory, m < 2 ? PSOUP_INT8 : PSOUP_NF4), PSOUP_ERROR_UNSUPPORTED,
                m < 2 ? "its linears are nf4" : "its linears are int8");
        psoup_model_free(as_is), psoup_model_free(same_dtype), psoup_model_free(wide), psoup_model_free(narrow);
    }
    psoup_context_free(context);
}
END_TEST

/* ---- hostile files ------------------------------------------------------------------------------------ */

/* What one tensor of a copy is changed to. */
typedef struct change {
    const char *directory, *tensor; /* NULL: none */
    enum { DROPPED, RETYPED, SHORTER, BYTES } how;
    psoup_dtype dtype;
    size_t at, n;
    const char *bytes;
    const char *message;
} change;

static void write_changed(psoup_context *context, const change *c, const char *to) {
    char path[160];
    psoup__safetensors *file = NULL;
    psoup__safetensors_writer *writer = NULL;
    snprintf(path, sizeof path, "%s/model.safetensors", c->directory);
    OK(psoup__safetensors_open(context, path, &file, &error));
    OK(psoup__safetensors_map(file, &error));
    snprintf(path, sizeof path, "%s/model.safetensors", to);
    OK(psoup__safetensors_create(context, path, &writer, &error));
    const size_t count = psoup__safetensors_count(file);
    bool found = false;
    for (int pass = 0; pass < 2; pass++) {
        for (size_t i = 0; i < count; i++) {
            const char *name = psoup__safetensors_name(file, i);
            psoup__tensor t = *psoup__safetensors_tensor(file, i);
            bool hit = strcmp(name, c->tensor) == 0;
            found = found || hit;
            if (hit && c->how == DROPPED)
                continue;
            if (hit && c->how == RETYPED)
                t.dtype = c->dtype;
            if (hit && c->how == SHORTER) {
                t.bytes -= t.bytes / (size_t)t.shape[0];
                t.shape[0]--;
            }
            if (pass == 0) {
                OK(psoup__safetensors_declare(writer, name, t.dtype, t.rank, t.shape, &error));
                continue;
            }
            char *bytes = malloc(t.bytes + 1);
            memcpy(bytes, t.data, t.bytes);
            if (hit && c->how == BYTES) {
                ck_assert_uint_le(c->at + c->n, t.bytes);
                memcpy(bytes + c->at, c->bytes, c->n);
            }
            OK(psoup__safetensors_write(writer, bytes, t.bytes, &error));
            free(bytes);
        }
        if (pass == 0)
            OK(psoup__safetensors_begin(writer, &error));
    }
    ck_assert_msg(found, "no tensor %s", c->tensor);
    OK(psoup__safetensors_commit(writer, &error));
    psoup__safetensors_writer_free(writer);
    psoup__safetensors_free(file);
    snprintf(path, sizeof path, "%s/config.json", to);
    char from[160];
    snprintf(from, sizeof from, "%s/config.json", c->directory);
    copy_file(from, path);
}

#define Q "model.layers.0.self_attn.q_proj."
#define STATE "weight.quant_state.bitsandbytes__nf4"

START_TEST(test_hostile) {
    static const char nan[] = "\0\0\xc0\x7f", infinity[] = "\0\0\x80\x7f";
    static const change changes[] = {
        {QUANT "nf4", Q "weight", DROPPED, 0, 0, 0, NULL, "weight is missing"},
        {QUANT "nf4", Q "weight", SHORTER, 0, 0, 0, NULL, "has 1151 elements of u8, expected 1152 of u8"},
        {QUANT "nf4", Q "weight", RETYPED, PSOUP_I8, 0, 0, NULL, "of i8, expected 1152 of u8"},
        {QUANT "nf4", Q "weight.absmax", DROPPED, 0, 0, 0, NULL, "absmax is missing"},
        {QUANT "nf4", Q "weight.absmax", SHORTER, 0, 0, 0, NULL, "has 35 elements of f32, expected 36 of f32"},
        {QUANT "nf4", Q "weight.absmax", RETYPED, PSOUP_I32, 0, 0, NULL, "of i32, expected 36 of f32"},
        {QUANT "nf4", Q "weight.absmax", BYTES, 0, 8, 4, nan, "q_proj.weight holds NaN or infinite"},
        {QUANT "nf4", Q "weight.absmax", BYTES, 0, 8, 4, infinity, "q_proj.weight holds NaN or infinite"},
        {QUANT "nf4", Q "weight.quant_map", DROPPED, 0, 0, 0, NULL, "quant_map is missing"},
        {QUANT "nf4", Q "weight.quant_map", BYTES, 0, 8, 4, nan, "[2] is nan; nf4's is -0.52507"},
        {QUANT "nf4", Q STATE, DROPPED, 0, 0, 0, NULL, "expected the bytes of a JSON object"},
        {QUANT "nf4", Q STATE, SHORTER, 0, 0, 0, NULL, ": tensor " Q STATE ":1:"},
        {QUANT "nf4", Q STATE, BYTES, 0, 0, 1, "\xff", "quant_state.bitsandbytes__nf4"},
        {QUANT "nf4", Q STATE, BYTES, 0, 16, 3, "fp4", "\"fp4\" in blocks of 64"},
        {QUANT "nf4", Q STATE, BYTES, 0, 35, 2, "32", "in blocks of 32"},
        {QUANT "nf4", Q STATE, BYTES, 0, 69, 2, "84", "its shape is not [48, 48]"},
        {QUANT "nf4", "lm_head.weight", DROPPED, 0, 0, 0, NULL, "lm_head.weight is missing"},
        {QUANT "double", Q "weight.absmax", RETYPED, PSOUP_I8, 0, 0, NULL, "of i8, expected 64 of u8"},
        {QUANT "double", Q "weight.nested_absmax", DROPPED, 0, 0, 0, NULL, "has 64 elements of u8, expected 64 of f32"},
        {QUANT "double", Q "weight.nested_absmax", BYTES, 0, 0, 4, nan, "q_proj.weight holds NaN"},
        {QUANT "double", Q "weight.nested_quant_map", SHORTER, 0, 0, 0, NULL, "has 255 elements"},
        {QUANT "double", Q "weight.nested_quant_map", DROPPED, 0, 0, 0, NULL, "nested_quant_map is missing"},
        {QUANT "int8", Q "SCB", DROPPED, 0, 0, 0, NULL, "q_proj.SCB is missing"},
        {QUANT "int8", Q "SCB", BYTES, 0, 4, 4, nan, "q_proj.weight holds NaN or infinite"},
        {QUANT "int8", Q "SCB", SHORTER, 0, 0, 0, NULL, "has 63 elements of f32, expected 64"},
        {QUANT "int8", Q "weight", RETYPED, PSOUP_U8, 0, 0, NULL, "of u8, expected 4096 of i8"},
        {QUANT "int8", Q "weight_format", BYTES, 0, 0, 1, "\2", "only 0, rows, is supported"},
    };
    psoup_context *context = make_context(1);
    char directory[64];
    strcpy(directory, temporary_directory());
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        write_changed(context, &changes[i], directory);
        psoup_status status = refused_as(context, directory, -1);
        ck_assert_msg(status != PSOUP_OK && strstr(error.message, changes[i].message),
                      "change %zu of %s: \"%s\" lacks \"%s\"", i, changes[i].tensor, error.message,
                      changes[i].message);
    }
    remove_directory(directory);
    psoup_context_free(context);
}
END_TEST

/* Numbers that are none, or that do not fit, on the way from f32. */
START_TEST(test_numbers) {
    psoup_context *context = make_context(1);
    char directory[64], path[128];
    strcpy(directory, temporary_directory());
    static const change nan = {GOLDEN "plain", "model.layers.1.mlp.up_proj.weight", BYTES, 0, 400, 4, "\0\0\xc0\x7f",
                               NULL};
    static const change huge = {GOLDEN "plain", "model.layers.1.mlp.up_proj.weight", BYTES, 0, 400, 4,
                                "\0\0\xc0\x57", NULL};
    write_changed(context, &nan, directory);
    REFUSED(refused_as(context, directory, PSOUP_NF4), PSOUP_ERROR_FORMAT, "up_proj.weight holds NaN");
    REFUSED(refused_as(context, directory, PSOUP_BF16), PSOUP_ERROR_FORMAT, "up_proj.weight holds NaN");
    write_changed(context, &huge, directory);
    REFUSED(refused_as(context, directory, PSOUP_F16), PSOUP_ERROR_ARGUMENT, "does not fit f16");
    psoup_model_free(load_as(context, directory, PSOUP_INT8));
    REFUSED(refused_as(context, directory, PSOUP_Q8_0), PSOUP_ERROR_ARGUMENT, "dtype 12 (q8_0)");
    REFUSED(refused_as(context, directory, -2), PSOUP_ERROR_ARGUMENT, "dtype -2");
    psoup_load_options options = PSOUP_LOAD_OPTIONS_INIT;
    psoup_model *model;
    options.reserved = 3;
    REFUSED(psoup_model_load_with(context, directory, &options, &model, &error), PSOUP_ERROR_ARGUMENT,
            "psoup_load_options: reserved is 3: expected 0");
    snprintf(path, sizeof path, "%s/config.json", directory);
    FILE *file = fopen(path, "w");
    fputs("{\"model_type\": \"llama\", \"quantization_config\": {\"quant_method\": \"gptq\"}}", file);
    fclose(file);
    REFUSED(refused_as(context, directory, -1), PSOUP_ERROR_UNSUPPORTED, "\"gptq\"; expected bitsandbytes");
    file = fopen(path, "w");
    fputs("{\"model_type\": \"llama\", \"quantization_config\": {\"quant_method\": \"bitsandbytes\", "
          "\"load_in_4bit\": true, \"bnb_4bit_quant_type\": \"fp4\"}}", file);
    fclose(file);
    REFUSED(refused_as(context, directory, -1), PSOUP_ERROR_UNSUPPORTED, "\"fp4\" in uint8; expected nf4");
    remove_directory(directory);
    psoup_context_free(context);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("quant model");
    TCase *tests = tcase_create("all");
    tcase_set_timeout(tests, 240);
    tcase_add_test(tests, test_bits);
    tcase_add_test(tests, test_create);
    tcase_add_test(tests, test_training);
    tcase_add_test(tests, test_identity);
    tcase_add_test(tests, test_memory);
    tcase_add_test(tests, test_bitsandbytes);
    tcase_add_test(tests, test_hostile);
    tcase_add_test(tests, test_numbers);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
