/* The model on a GPU against the model on the CPU, through the public interface: scores, gradients, generation.
 * Where there is no GPU the host driver stands for one (tests/host_driver). */
#include "generate_case.h"

#include <pthread.h>

#include "gpu/gpu.h"
#include "gpu/internal.h"
#include "model/session.h"

static psoup_context *on(const char *device) {
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *context = NULL;
    options.device = device;
    OK(psoup_context_create(&options, &context, &error));
    return context;
}

/* The same random model on two devices, in a dtype, with two adapters that are not zero. */
typedef struct pair {
    psoup_context *context[2];
    psoup_model *model[2];
} pair;

static psoup_model *random_model(psoup_context *context, int32_t dtype, int32_t head_dim, int tied) {
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_model *model = NULL;
    config.vocab_size = VOCAB;
    config.hidden_size = 48;
    config.intermediate_size = 72;
    config.num_hidden_layers = 2;
    config.num_attention_heads = 4;
    config.num_key_value_heads = 2;
    config.head_dim = head_dim;
    config.max_position_embeddings = 128;
    config.torch_dtype = dtype;
    config.tie_word_embeddings = tied;
    config.initializer_range = 0.1f;
    OK(psoup_model_create(context, &config, 11, &model, &error));
    for (int a = 0; a < 2; a++) {
        psoup_adapter_options options = PSOUP_ADAPTER_OPTIONS_INIT;
        const char *name = a ? "b" : "a";
        options.rank = a ? 4 : 5;
        options.targets = a ? PSOUP_ALL_LINEAR : PSOUP_Q_PROJ | PSOUP_V_PROJ;
        options.seed = (uint64_t)a;
        OK(psoup_model_add_adapter(model, name, &options, &error));
        psoup__adapter *adapter = psoup__model_adapter(model, name);
        float *values = malloc(adapter->count * sizeof *values);
        psoup__random random = {.seed = 5, .sequence = (uint64_t)a};
        for (size_t i = 0; i < adapter->count; i++)
            values[i] = 0.1f * psoup__random_normal(&random);
        model->be->ops->write(model->be, adapter->data, values, adapter->count * sizeof *values);
        free(values);
    }
    return model;
}

static pair make_pair(int32_t dtype, int32_t head_dim, int tied) {
    pair p = {.context = {on("cpu"), on("cuda:0")}};
    for (int i = 0; i < 2; i++)
        p.model[i] = random_model(p.context[i], dtype, head_dim, tied);
    return p;
}

static void free_pair(pair *p) {
    for (int i = 0; i < 2; i++) {
        psoup_model_free(p->model[i]);
        psoup_context_free(p->context[i]);
    }
}

static const struct {
    int32_t dtype, head_dim;
    int tied;
    double tolerance; /* of log-probs */
} kinds[] = {{PSOUP_F32, 12, 0, 1e-4}, {PSOUP_F32, 64, 1, 1e-4}, {PSOUP_BF16, 64, 0, 0.12}, {PSOUP_F16, 128, 1, 2e-2}};
enum { KINDS = sizeof kinds / sizeof *kinds };

START_TEST(scores_are_the_cpus) {
    pair p = make_pair(kinds[_i].dtype, kinds[_i].head_dim, kinds[_i].tied);
    sample_rows rows;
    mixed_rows(&rows, 31);
    float out[2][128];
    for (int i = 0; i < 2; i++)
        OK(psoup_model_logprobs(p.model[i], rows.row, 6, out[i], &error));
    double worst = distance(out[0], out[1], rows.total - 6);
    ck_assert_msg(worst <= kinds[_i].tolerance, "log-probs differ by %g", worst);
    ck_assert(worst > 0); /* they are two computations */
    free_pair(&p);
}
END_TEST

/* The committed golden model and adapters, from files. */
START_TEST(files_are_loaded) {
    psoup_context *cpu = on("cpu"), *gpu = on("cuda");
    psoup_model *a = load_plain(cpu, true), *b = load_plain(gpu, true);
    sample_rows rows;
    mixed_rows(&rows, 32);
    float out[2][128];
    OK(psoup_model_logprobs(a, rows.row, 6, out[0], &error));
    OK(psoup_model_logprobs(b, rows.row, 6, out[1], &error));
    double off = distance(out[0], out[1], rows.total - 6);
    ck_assert_msg(off <= 0.1, "log-probs differ by %g", off); /* its weights are bf16 */
    const char *directory = temporary_directory();
    OK(psoup_model_save(b, directory, NULL, &error)); /* what was uploaded comes back, to the bit */
    psoup_model *again = NULL;
    OK(psoup_model_load(cpu, directory, &again, &error));
    OK(psoup_model_load_adapter(again, "all", GOLDEN "adapter_all", &error));
    OK(psoup_model_load_adapter(again, "qv", GOLDEN "adapter_qv", &error));
    OK(psoup_model_logprobs(again, rows.row, 6, out[1], &error));
    ck_assert(memcmp(out[0], out[1], (rows.total - 6) * sizeof(float)) == 0);
    remove_directory(directory);
    psoup_model_free(a);
    psoup_model_free(b);
    psoup_model_free(again);
    psoup_context_free(cpu);
    psoup_context_free(gpu);
}
END_TEST

START_TEST(gradients_are_the_cpus) {
    static const char *const of[] = {
        "a/model.layers.0.self_attn.q_proj.lora_A", "b/model.layers.1.mlp.down_proj.lora_B",
        "b/model.layers.0.self_attn.k_proj.lora_B", "mix", "model.embed_tokens.weight", "model.norm.weight",
        "model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.gate_proj.weight"};
    const bool base = kinds[_i].dtype == PSOUP_F32;
    pair p = make_pair(kinds[_i].dtype, kinds[_i].head_dim, kinds[_i].tied);
    sample_rows rows;
    mixed_rows(&rows, 33);
    psoup_gradients *g[2];
    for (int i = 0; i < 2; i++)
        OK(psoup_model_gradients(p.model[i], rows.row, 6, NULL,
                                 PSOUP_GRADIENT_ADAPTERS | PSOUP_GRADIENT_MIX |
                                     (base ? (uint32_t)PSOUP_GRADIENT_BASE : 0),
                                 &g[i], &error));
    for (size_t k = 0; k < (base ? 8 : 4); k++) {
        size_t n = 0, m = 0;
        const float *want = psoup_gradients_get(g[0], of[k], &n), *got = psoup_gradients_get(g[1], of[k], &m);
        ck_assert_msg(want && got && n == m, "%s", of[k]);
        double off = relative(got, want, n);
        ck_assert_msg(off <= 2 * kinds[_i].tolerance, "%s: the relative difference is %g", of[k], off);
    }
    psoup_gradients_free(g[0]);
    psoup_gradients_free(g[1]);
    free_pair(&p);
}
END_TEST

/* ---- generation --------------------------------------------------------------------------------------------- */

static psoup_generation *generate_all(psoup_model *model, const psoup_prompt *prompts, const psoup_sampling *sampling,
                                      int32_t places, int32_t steps, int64_t cache_tokens) {
    psoup_generation *g = NULL;
    psoup_session_options options = PSOUP_SESSION_OPTIONS_INIT;
    options.max_sequences = places;
    options.prefill_rows = 16;
    options.steps = steps;
    options.cache_tokens = cache_tokens;
    OK(psoup_generate(model, prompts, 6, sampling, &options, NULL, NULL, &g, &error));
    return g;
}

static psoup_generation *generate_in(psoup_model *model, const sample_rows *rows, const psoup_sampling *sampling,
                                     int32_t places, int32_t steps, int64_t cache_tokens) {
    psoup_prompt prompts[6];
    for (size_t i = 0; i < 6; i++)
        prompts[i] = prompt_of(&rows->row[i], i);
    return generate_all(model, prompts, sampling, places, steps, cache_tokens);
}

static void same_text(const psoup_generation *a, const psoup_generation *b, double tolerance, const char *what) {
    for (size_t i = 0; i < 6; i++) {
        const psoup_completion *x = psoup_generation_get(a, i), *y = psoup_generation_get(b, i);
        ck_assert_msg(x->n == y->n && x->finish == y->finish &&
                          memcmp(x->tokens, y->tokens, x->n * sizeof *x->tokens) == 0,
                      "%s: sequence %zu differs (%zu and %zu tokens)", what, i, x->n, y->n);
        ck_assert_msg(distance(x->logprobs, y->logprobs, x->n) <= tolerance, "%s: log-probs of sequence %zu", what,
                      i);
    }
}

/* 0: the likeliest tokens; 1: ended by tokens, no pair twice, none before the fifth; 2: longer ones. */
static psoup_sampling ruled(int which) {
    static const int32_t stops[] = {7, 8, 9, 10, 11, 12};
    psoup_sampling sampling = sampled(which == 2 ? 20 : 13);
    sampling.temperature = which == 0 ? 0 : 0.9f;
    if (which == 1) {
        sampling.stop_tokens = stops;
        sampling.n_stop_tokens = 6;
        sampling.min_new_tokens = 5;
        sampling.no_repeat_ngram_size = 2;
        sampling.top_k = 30;
        sampling.top_p = 0.95f;
    }
    return sampling;
}

/* In f32 the GPU writes the CPU's texts, with few places and many, token by token or in windows, in a small cache. */
START_TEST(texts_are_the_cpus) {
    pair p = make_pair(PSOUP_F32, 64, 0);
    sample_rows rows;
    mixed_rows(&rows, 34);
    psoup_sampling sampling = ruled(_i);
    psoup_generation *cpu = generate_in(p.model[0], &rows, &sampling, 6, 0, 0);
    psoup_generation *one = generate_in(p.model[1], &rows, &sampling, 6, 1, 0);
    psoup_generation *window = generate_in(p.model[1], &rows, &sampling, 6, 0, 0);
    psoup_generation *few = generate_in(p.model[1], &rows, &sampling, 3, 3, 192);
    same_text(cpu, one, 1e-4, "one at a time");
    same_text(cpu, window, 1e-4, "windows");
    same_text(cpu, few, 1e-4, "three places, a small cache");
    psoup_generation_free(cpu);
    psoup_generation_free(one);
    psoup_generation_free(window);
    psoup_generation_free(few);
    free_pair(&p);
}
END_TEST

/* Logits are mixed of two policies, of the base alone, of one and, by its strength, the base, and of two and the base;
 * beside them parameters, by both methods. */
static void mixed_prompts(psoup_prompt *prompts, const sample_rows *rows) {
    static const int32_t methods[6] = {PSOUP_MIX_LOGITS, PSOUP_MIX_LOGITS, PSOUP_MIX_FACTORS,
                                       PSOUP_MIX_LOGITS, PSOUP_MIX_LOGITS, PSOUP_MIX_DELTA};
    static const float strengths[6] = {0, 0, 0, 1.5f, 1.25f, 0}, both[2] = {0.3f, 0.7f};
    for (size_t i = 0; i < 6; i++) {
        prompts[i] = prompt_of(&rows->row[i], i);
        prompts[i].mix_method = methods[i];
        prompts[i].mix_strength = strengths[i];
    }
    prompts[5].mix = both;
}

static uint64_t windows_of(const psoup_model *model) {
    return psoup__gpu_of(model->be)->record.clock;
}

START_TEST(mixed_logits_are_the_cpus) {
    static const struct {
        int32_t places, steps;
        int64_t cache;
    } ways[] = {{10, 1, 0}, {10, 0, 0}, {10, 3, 0}, {3, 3, 192}};
    pair p = make_pair(PSOUP_F32, 64, 0);
    sample_rows rows;
    psoup_prompt prompts[6];
    psoup_sampling sampling = ruled(_i);
    mixed_rows(&rows, 34);
    mixed_prompts(prompts, &rows);
    psoup_generation *cpu = generate_all(p.model[0], prompts, &sampling, 10, 0, 0);
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        const uint64_t before = windows_of(p.model[1]);
        char what[64];
        snprintf(what, sizeof what, "%d places, %d steps", (int)ways[i].places, (int)ways[i].steps);
        psoup_generation *g =
            generate_all(p.model[1], prompts, &sampling, ways[i].places, ways[i].steps, ways[i].cache);
        same_text(cpu, g, 1e-4, what);
        ck_assert_msg((windows_of(p.model[1]) > before) == (ways[i].steps != 1), "%s", what);
        psoup_generation_free(g);
    }
    psoup_generation_free(cpu);
    free_pair(&p);
}
END_TEST

/* Windows have the bits of steps, where both run the same kernels: in up to four rows that begin together. Ends are in
 * the middle of windows, and come one by one. */
START_TEST(windows_have_the_bits_of_steps) {
    static const size_t batches[][3] = {{0, 2, 5}, {4, 5, 5}, {1, 3, 2}, {4, 1, 1}, {0, 3, 3}, {1, 2, 5}};
    psoup_context *context = on("cuda:0");
    psoup_model *model = random_model(context, PSOUP_F32, 64, 0);
    sample_rows rows;
    psoup_prompt all[6];
    psoup_sampling sampling = ruled(_i), brief = sampling;
    mixed_rows(&rows, 38);
    mixed_prompts(all, &rows);
    brief.max_new_tokens = 6;
    for (size_t b = 0; b < sizeof batches / sizeof *batches; b++) {
        psoup_prompt prompts[3];
        psoup_generation *g[3] = {NULL};
        const size_t n = batches[b][1] == batches[b][2] ? 2 : 3;
        for (size_t i = 0; i < n; i++)
            prompts[i] = all[batches[b][i]];
        for (size_t first = 0; first < 2; first++) { /* which of them is brief */
            prompts[first].sampling = &brief;
            prompts[1 - first].sampling = NULL;
            for (int way = 0; way < 3; way++) {
                psoup_session_options options = PSOUP_SESSION_OPTIONS_INIT;
                options.max_sequences = 4;
                options.steps = way == 0 ? 1 : way == 1 ? 8 : 5;
                OK(psoup_generate(model, prompts, n, &sampling, &options, NULL, NULL, &g[way], &error));
            }
            for (size_t i = 0; i < n; i++)
                for (int way = 1; way < 3; way++)
                    ck_assert_msg(equal(*psoup_generation_get(g[0], i), *psoup_generation_get(g[way], i)),
                                  "batch %zu, brief %zu, sequence %zu, way %d", b, first, i, way);
            for (int way = 0; way < 3; way++)
                psoup_generation_free(g[way]);
        }
    }
    ck_assert_uint_gt(windows_of(model), 0);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

static int graphs_of(const psoup_model *model) {
    const psoup__record *record = &psoup__gpu_of(model->be)->record;
    int n = 0;
    for (int i = 0; i < PSOUP__GRAPHS; i++)
        n += record->graphs[i].exec != NULL;
    return n;
}

static int allocations;
static psoup__cu_result (*driver_alloc)(psoup__cu_pointer *out, size_t bytes);
static psoup__cu_result count_alloc(psoup__cu_pointer *out, size_t bytes) {
    allocations++;
    return driver_alloc(out, bytes);
}

/* Windows of one batch run one graph: were the launches' arguments to differ, each would be captured anew. So do those
 * of a batch that shrinks, within what its rows are rounded up to (six, then five: eight; where two of the six mix the
 * logits of two policies and the base, ten, then nine: twelve). And from the second window on nothing is allocated. */
START_TEST(a_graph_is_used_again) {
    static const int32_t places[] = {2, 8, 12};
    const size_t n = _i ? 6 : 2;
    psoup_context *context = on("cuda:0");
    psoup_model *model = random_model(context, PSOUP_BF16, 64, 0);
    psoup__driver *driver = &psoup__gpu_of(model->be)->driver;
    psoup_session *session = NULL;
    psoup_session_options options = PSOUP_SESSION_OPTIONS_INIT;
    options.max_tokens = 100;
    options.max_sequences = places[_i];
    options.steps = 4;
    OK(psoup_session_create(model, &options, &session, &error));
    sample_rows rows;
    mixed_rows(&rows, 35);
    psoup_sampling sampling = sampled(33), brief = sampled(5);
    sampling.ignore_stop = brief.ignore_stop = 1;
    for (size_t i = 0; i < n; i++) {
        psoup_prompt prompt = prompt_of(&rows.row[0], i);
        prompt.sampling = i == 5 ? &brief : &sampling;
        if (_i == 2 && i < 2) {
            prompt.mix_method = PSOUP_MIX_LOGITS;
            prompt.mix_strength = 1.5f;
        }
        OK(psoup_session_submit(session, (int64_t)i, &prompt, &error));
    }
    size_t running = 1;
    int steps = 0;
    for (; running > 0; steps++) {
        if (steps == 2) {
            driver_alloc = driver->alloc;
            driver->alloc = count_alloc;
            allocations = 0;
        }
        OK(psoup_session_step(session, NULL, NULL, &running, &error));
    }
    ck_assert_int_eq(steps, 9); /* the prompt with its token, eight windows of four */
    ck_assert_uint_eq(psoup__gpu_of(model->be)->record.clock, 8);
    ck_assert_int_eq(graphs_of(model), 1);
    ck_assert_int_eq(allocations, 0);
    psoup_session_free(session);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

typedef struct stopped {
    size_t n, stop_at;
    int32_t tokens[6][64];
    size_t length[6];
} stopped;

static int stop(void *user, int64_t id, int32_t token, float logprob, psoup_finish finish) {
    stopped *s = user;
    s->tokens[id][s->length[id]++] = token;
    return ++s->n == s->stop_at;
}

static psoup_status refuse(psoup__backend *be, int32_t times, psoup_error *told) {
    psoup__gpu_of(be)->record.refused = true;
    return psoup__gpu_replay(be, times, told);
}

/* A callback that stops in the middle of a window loses nothing, and nothing comes twice. Nor where logits are mixed,
 * also with a head that takes few rows at once; nor where a step cannot be recorded after all. */
START_TEST(a_window_can_be_stopped) {
    enum { PLAIN, MIXED, FEW_AT_ONCE, REFUSED };
    psoup_context *context = on("cuda:0");
    psoup_model *model = random_model(context, PSOUP_F32, 64, 0);
    sample_rows rows;
    mixed_rows(&rows, 36);
    psoup_prompt prompts[6];
    psoup_sampling sampling = sampled(11);
    sampling.ignore_stop = 1;
    for (size_t i = 0; i < 6; i++)
        prompts[i] = prompt_of(&rows.row[i], i);
    if (_i != PLAIN)
        mixed_prompts(prompts, &rows);
    psoup_generation *whole = generate_all(model, prompts, &sampling, 10, 1, 0);
    psoup_session *session = NULL;
    OK(psoup_session_create(model, NULL, &session, &error));
    if (_i == FEW_AT_ONCE)
        session->tape->chunk_rows = 4;
    if (_i == REFUSED)
        psoup__gpu_of(model->be)->ops.replay = refuse;
    for (size_t i = 0; i < 6; i++) {
        prompts[i].sampling = &sampling;
        OK(psoup_session_submit(session, (int64_t)i, &prompts[i], &error));
    }
    stopped s = {.stop_at = 20};
    size_t running = 1;
    int cancelled = 0;
    while (running > 0) {
        psoup_status status = psoup_session_step(session, stop, &s, &running, &error);
        ck_assert(status == PSOUP_OK || status == PSOUP_ERROR_CANCELLED);
        cancelled += status == PSOUP_ERROR_CANCELLED;
    }
    ck_assert_int_eq(cancelled, 1);
    ck_assert((windows_of(model) > 0) == (_i != REFUSED));
    for (size_t i = 0; i < 6; i++) {
        const psoup_completion *c = psoup_generation_get(whole, i);
        ck_assert_uint_eq(s.length[i], c->n);
        ck_assert(memcmp(s.tokens[i], c->tokens, c->n * sizeof *c->tokens) == 0);
    }
    psoup_generation_free(whole);
    psoup_session_free(session);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* A policy that diverges ends the texts that mix its logits, in the middle of a window, and no other. */
START_TEST(a_diverged_policy_ends_its_rows) {
    psoup_context *context = on("cuda:0");
    psoup_model *model = random_model(context, PSOUP_F32, 64, 0);
    sample_rows rows;
    mixed_rows(&rows, 39);
    psoup_prompt prompts[6];
    psoup_sampling sampling = sampled(11);
    sampling.ignore_stop = 1;
    mixed_prompts(prompts, &rows);
    psoup_generation *well = generate_all(model, prompts, &sampling, 10, 1, 0);
    psoup__adapter *adapter = psoup__model_adapter(model, "b");
    float nan = NAN;
    model->be->ops->write(model->be, adapter->data, &nan, sizeof nan);
    psoup_generation *ill = generate_all(model, prompts, &sampling, 10, 0, 0);
    for (size_t i = 0; i < 6; i++) {
        const psoup_completion *a = psoup_generation_get(well, i), *b = psoup_generation_get(ill, i);
        const bool apart = i == 1 || i == 2;
        ck_assert_int_eq(b->finish, apart ? PSOUP_FINISH_LENGTH : PSOUP_FINISH_ERROR);
        ck_assert(!apart || (a->n == b->n && memcmp(a->tokens, b->tokens, a->n * sizeof *a->tokens) == 0));
    }
    psoup_generation_free(well);
    psoup_generation_free(ill);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* Device memory, counted. */
static struct {
    psoup__cu_pointer at[4096];
    size_t bytes[4096], n;
    int64_t now, most;
} held;
static psoup__cu_result (*driver_release)(psoup__cu_pointer memory);

static psoup__cu_result hold(psoup__cu_pointer *out, size_t bytes) {
    const psoup__cu_result result = driver_alloc(out, bytes);
    if (result != 0 || held.n == sizeof held.at / sizeof *held.at)
        return result;
    held.at[held.n] = *out;
    held.bytes[held.n++] = bytes;
    held.now += (int64_t)bytes;
    held.most = held.now > held.most ? held.now : held.most;
    return result;
}

static psoup__cu_result let_go(psoup__cu_pointer memory) {
    for (size_t i = held.n; i-- > 0;)
        if (held.at[i] == memory) {
            held.now -= (int64_t)held.bytes[i];
            held.at[i] = 0;
            break;
        }
    return driver_release(memory);
}

/* What psoup_generate_memory says of the device is enough, for windows too. */
START_TEST(generation_takes_what_it_is_said_to) {
    psoup_context *context = on("cuda:0");
    psoup_model *model = random_model(context, PSOUP_F32, 64, 0);
    psoup__driver *driver = &psoup__gpu_of(model->be)->driver;
    psoup_memory said = {.size = sizeof said};
    psoup_prompt prompts[6];
    sample_rows rows;
    mixed_rows(&rows, 40);
    mixed_prompts(prompts, &rows);
    psoup_sampling sampling = sampled(20);
    sampling.no_repeat_ngram_size = 3;
    OK(psoup_generate_memory(model, prompts, 6, &sampling, NULL, &said, &error));
    driver_alloc = driver->alloc, driver_release = driver->release;
    driver->alloc = hold, driver->release = let_go;
    psoup_generation *g = NULL;
    OK(psoup_generate(model, prompts, 6, &sampling, NULL, NULL, NULL, &g, &error));
    ck_assert_uint_gt(windows_of(model), 0);
    ck_assert_uint_lt(held.n, sizeof held.at / sizeof *held.at);
    const int64_t room = said.device - said.held;
    ck_assert_msg(held.most > 0 && held.most <= room, "%lld bytes, more than the %lld that were said",
                  (long long)held.most, (long long)room);
    psoup_generation_free(g);
    driver->alloc = driver_alloc, driver->release = driver_release;
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* ---- the backend alone --------------------------------------------------------------------------------------- */

enum { SMALL = 5 };
typedef struct alone {
    psoup_context *context;
    psoup__backend *be;
    float *x, *y; /* [SMALL] on the device: 1, 2, … and 10, 20, … */
} alone;

static alone start_alone(void) {
    static const float x[SMALL] = {1, 2, 3, 4, 5}, y[SMALL] = {10, 20, 30, 40, 50};
    alone a = {.context = on("cuda:0")};
    OK(psoup__gpu_create(a.context, &a.be, &error));
    ck_assert((a.x = a.be->ops->alloc(a.be, SMALL, sizeof *a.x, &error)) &&
              (a.y = a.be->ops->alloc(a.be, SMALL, sizeof *a.y, &error)));
    a.be->ops->write(a.be, a.x, x, sizeof x);
    a.be->ops->write(a.be, a.y, y, sizeof y);
    return a;
}

static void end_alone(alone *a, float of_y) {
    float x[SMALL];
    OK(a->be->ops->read(a->be, x, a->x, sizeof x, &error));
    for (int i = 0; i < SMALL; i++)
        ck_assert(x[i] == (float)(i + 1) * (1 + 10 * of_y));
    a->be->ops->release(a->be, a->x);
    a->be->ops->release(a->be, a->y);
    a->be->ops->free(a->be);
    psoup_context_free(a->context);
}

static void *add_alone(void *user) {
    const alone *a = user;
    a->be->ops->add(a->be, a->x, a->y, SMALL);
    return NULL;
}

/* A thread that never had the device's context may put the first op into the stream. */
START_TEST(any_thread_may_call) {
    alone a = start_alone();
    pthread_t thread;
    ck_assert_int_eq(pthread_create(&thread, NULL, add_alone, &a), 0);
    ck_assert_int_eq(pthread_join(thread, NULL), 0);
    end_alone(&a, 1);
}
END_TEST

/* What a caller's stream is given: all of it, so that a capture of the stream has an op, and the caller keeps it. */
START_TEST(a_callers_stream_is_used) {
    alone a = start_alone();
    const psoup__driver *d = &psoup__gpu_of(a.be)->driver;
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_context *context;
    psoup__backend *be;
    psoup__cu_stream stream;
    psoup__cu_graph graph;
    psoup__cu_graph_exec exec;
    ck_assert_uint_eq(d->stream_create(&stream, PSOUP__CU_STREAM_NON_BLOCKING), 0);
    options.device = "cuda:0";
    options.stream = stream;
    OK(psoup_context_create(&options, &context, &error));
    OK(psoup__gpu_create(context, &be, &error));
    OK(a.be->ops->read(a.be, NULL, NULL, 0, &error)); /* x and y are there */
    ck_assert_uint_eq(d->capture_begin(stream, PSOUP__CU_CAPTURE_RELAXED), 0);
    be->ops->add(be, a.x, a.y, SMALL);
    ck_assert_uint_eq(d->capture_end(stream, &graph), 0);
    ck_assert_uint_eq(d->graph_instantiate(&exec, graph, 0), 0);
    for (int turn = 0; turn < 3; turn++)
        ck_assert_uint_eq(d->graph_launch(exec, stream), 0);
    be->ops->add(be, a.x, a.y, SMALL);
    be->ops->free(be);
    psoup_model *model = random_model(context, PSOUP_F32, 64, 0);
    ck_assert_ptr_eq(psoup__gpu_of(model->be)->stream, stream);
    psoup_model_free(model);
    psoup_context_free(context);
    ck_assert_uint_eq(d->stream_wait(stream), 0);
    d->graph_exec_destroy(exec);
    d->graph_destroy(graph);
    d->stream_destroy(stream);
    end_alone(&a, 4);
}
END_TEST

static int waits;
static psoup__cu_result (*event_wait)(psoup__cu_event);
static psoup__cu_result count_waits(psoup__cu_event event) {
    waits++;
    return event_wait(event);
}

/* Tables for ops, three times what the pinned memory has, while nothing that was put into the stream has been done. */
START_TEST(tables_cross_without_a_wait) {
    enum { ALL = 3 * PSOUP__UPLOAD_BYTES, MOST = PSOUP__UPLOAD_BYTES / 2 };
    alone a = start_alone();
    psoup__gpu *gpu = psoup__gpu_of(a.be);
    psoup__driver *d = &gpu->driver;
    uint8_t *host = malloc(ALL), *back = malloc(ALL), *table = malloc(MOST);
    uint8_t *device = a.be->ops->alloc(a.be, ALL, 1, &error);
    ck_assert(host && back && table && device);
    for (size_t i = 0; i < ALL; i++)
        host[i] = (uint8_t)(i * 2654435761u >> 21);
    event_wait = d->event_wait;
    d->event_wait = count_waits;
    for (int turn = 0; turn < 2; turn++) { /* the second finds the pinned memory free again */
        static const size_t sizes[] = {1, 700001, 4080, 262144, MOST, 4081, 65537};
        a.be->ops->zero(a.be, device, ALL);
        for (size_t at = 0, i = 0, n; at < ALL; at += n, i++) {
            n = sizes[i % 7] < ALL - at ? sizes[i % 7] : ALL - at;
            memcpy(table, host + at, n);
            if (i % 2 == 0)
                a.be->ops->write(a.be, device + at, table, n);
            else
                a.be->ops->copy(a.be, device + at, psoup__gpu_stage(gpu, table, n), n);
            memset(table, 0xa5, n); /* it is the caller's again */
        }
        ck_assert_int_eq(waits, 0);
        OK(a.be->ops->read(a.be, back, device, ALL, &error));
        ck_assert(memcmp(back, host, ALL) == 0);
    }
    a.be->ops->zero(a.be, device, ALL);
    a.be->ops->write(a.be, device, host, ALL);
    ck_assert_int_gt(waits, 0); /* weights may */
    OK(a.be->ops->read(a.be, back, device, ALL, &error));
    ck_assert(memcmp(back, host, ALL) == 0);
    a.be->ops->release(a.be, device);
    free(host), free(back), free(table);
    end_alone(&a, 0);
}
END_TEST

static int plans;
static psoup__blas_calls blas;
static int count_plans(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference, int asked,
                       void *results, int *found) {
    plans++;
    return blas.heuristic(handle, operation, a, b, c, d, preference, asked, results, found);
}

/* A product of a shape that was there before is not planned again. */
START_TEST(products_are_planned_once) {
    psoup_context *context = on("cuda:0");
    psoup_model *model = random_model(context, PSOUP_BF16, 64, 0);
    psoup__blas_calls *call = &psoup__gpu_of(model->be)->blas.call;
    sample_rows rows;
    float out[128];
    mixed_rows(&rows, 31);
    blas = *call;
    call->heuristic = count_plans;
    OK(psoup_model_logprobs(model, rows.row, 6, out, &error));
    const int first = plans;
    OK(psoup_model_logprobs(model, rows.row, 6, out, &error));
    ck_assert_int_gt(first, 0);
    ck_assert_int_eq(plans, first);
    psoup_model_free(model);
    psoup_context_free(context);
}
END_TEST

/* A step in which an op is refused says so; those after it are recorded and done. */
START_TEST(a_refused_step_is_told_once) {
    alone a = start_alone();
    const psoup__ops *ops = a.be->ops;
    for (int turn = 0; turn < 2; turn++) {
        ops->record(a.be);
        ops->add(a.be, a.x, a.y, SMALL);
        ops->sample(a.be, (void *)a.x, a.x, a.x, (void *)a.x, 1, INT32_MAX);
        ck_assert_int_eq(ops->replay(a.be, 2, &error), PSOUP_ERROR_UNSUPPORTED);
        ck_assert_ptr_nonnull(strstr(error.message, "GPU: a vocabulary of 2147483647"));
        ops->record(a.be);
        ops->add(a.be, a.x, a.y, SMALL);
        OK(ops->replay(a.be, 2, &error));
    }
    end_alone(&a, 4);
}
END_TEST

/* ---- trouble ------------------------------------------------------------------------------------------------ */

START_TEST(a_wrong_device_is_told) {
    psoup_context *context = on("cuda:7");
    psoup_model *model = NULL;
    ck_assert_int_eq(psoup_model_load(context, GOLDEN "plain", &model, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_null(model);
    ck_assert_ptr_nonnull(strstr(error.message, "no GPU: device cuda:7 is asked for, there "));
    psoup_context_free(context);
}
END_TEST

/* Every allocation of device memory fails in turn, of a load and a generation: each ends in a clean status. */
START_TEST(device_memory_runs_out) {
    int failures = 0;
    for (int n = 1;; n++) {
        char text[16];
        snprintf(text, sizeof text, "+%d", n); /* the nth from now on */
        setenv("PSOUP_HOST_FAIL_ALLOC", text, 1);
        psoup_context *context = on("cuda:0");
        psoup_model *model = NULL;
        psoup_generation *g = NULL;
        psoup_status status = psoup_model_load(context, GOLDEN "plain", &model, &error);
        if (status == PSOUP_OK)
            status = psoup_model_load_adapter(model, "qv", GOLDEN "adapter_qv", &error);
        sample_rows rows;
        fill_rows(&rows, 1, 37);
        psoup_prompt prompt = prompt_of(&rows.row[0], 0);
        const float half = 0.5f;
        prompt.mix = &half;
        prompt.mix_method = PSOUP_MIX_LOGITS; /* of the adapter and, as the weight is not 1, the base */
        psoup_sampling sampling = sampled(4);
        if (status == PSOUP_OK)
            status = psoup_generate(model, &prompt, 1, &sampling, NULL, NULL, NULL, &g, &error);
        unsetenv("PSOUP_HOST_FAIL_ALLOC");
        psoup_generation_free(g);
        psoup_model_free(model);
        psoup_context_free(context);
        if (status == PSOUP_OK)
            break;
        ck_assert_msg(status == PSOUP_ERROR_MEMORY, "%d: %s", n, error.message);
        failures++;
        ck_assert_int_lt(failures, 200);
    }
    ck_assert_int_gt(failures, 10);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("gpu");
    TCase *tests = tcase_create("model");
    tcase_set_timeout(tests, 600);
    tcase_add_loop_test(tests, scores_are_the_cpus, 0, KINDS);
    tcase_add_test(tests, files_are_loaded);
    tcase_add_loop_test(tests, gradients_are_the_cpus, 0, KINDS);
    tcase_add_loop_test(tests, texts_are_the_cpus, 0, 3);
    tcase_add_loop_test(tests, mixed_logits_are_the_cpus, 0, 3);
    tcase_add_loop_test(tests, windows_have_the_bits_of_steps, 0, 3);
    tcase_add_loop_test(tests, a_graph_is_used_again, 0, 3);
    tcase_add_loop_test(tests, a_window_can_be_stopped, 0, 4);
    tcase_add_test(tests, a_diverged_policy_ends_its_rows);
    tcase_add_test(tests, generation_takes_what_it_is_said_to);
    tcase_add_test(tests, any_thread_may_call);
    tcase_add_test(tests, a_callers_stream_is_used);
    tcase_add_test(tests, tables_cross_without_a_wait);
    tcase_add_test(tests, products_are_planned_once);
    tcase_add_test(tests, a_refused_step_is_told_once);
    tcase_add_test(tests, a_wrong_device_is_told);
    tcase_add_test(tests, device_memory_runs_out);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    const int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
