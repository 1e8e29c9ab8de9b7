/* The merger inside somebody's engine: tensors that the caller holds or gives piece by piece, results that go
 * to the caller, parameters by tensor; models and adapters mixed; the formats into each other. */
#include "merge_case.h"

static const char *const M11 = GOLDEN "model11", *const M12 = GOLDEN "model12";

static psoup_merger *merger_of(int32_t method, int32_t dtype) {
    psoup_merger *merger;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    options.method = method;
    options.dtype = dtype;
    options.any_sum = 1;
    ck_ok(psoup_merger_create(context, &options, &merger, &error));
    return merger;
}

/* What a sink received, by name. */
typedef struct received {
    struct {
        char name[128];
        psoup_dtype dtype;
        unsigned char *data;
        size_t bytes;
    } tensors[64];
    size_t n, stop_at;
} received;

static int take_tensor(void *user, const char *name, psoup_dtype dtype, int32_t rank, const int64_t *shape) {
    received *r = user;
    size_t bytes = psoup_dtype_size(dtype);
    for (int32_t i = 0; i < rank; i++)
        bytes *= (size_t)shape[i];
    ck_assert_uint_lt(r->n, 64);
    snprintf(r->tensors[r->n].name, sizeof r->tensors[0].name, "%s", name);
    r->tensors[r->n].dtype = dtype;
    r->tensors[r->n].bytes = bytes;
    r->tensors[r->n++].data = calloc(1, bytes + 1);
    return r->n == r->stop_at;
}

static int take_bytes(void *user, uint64_t offset, const void *data, size_t bytes) {
    received *r = user;
    ck_assert_uint_le(offset + bytes, r->tensors[r->n - 1].bytes);
    memcpy(r->tensors[r->n - 1].data + offset, data, bytes);
    return 0;
}

static void drop(received *r) {
    for (size_t i = 0; i < r->n; i++)
        free(r->tensors[i].data);
    r->n = 0;
}

static psoup_status receive(psoup_merger *merger, received *r) {
    psoup_merge_sink sink = PSOUP_MERGE_SINK_INIT;
    sink.user = r;
    sink.tensor = take_tensor;
    sink.write = take_bytes;
    return psoup_merger_run(merger, &sink, &error);
}

/* The results beside a file's tensors, bit by bit. */
static void same_as(const received *r, const char *path) {
    psoup__weights *weights;
    ck_ok(psoup__weights_map(context, path, "model", &weights, &error));
    ck_assert_uint_eq(r->n, psoup__weights_count(weights));
    for (size_t i = 0; i < r->n; i++) {
        const psoup__tensor *tensor = psoup__weights_find(weights, r->tensors[i].name);
        ck_assert_msg(tensor != NULL, "%s", r->tensors[i].name);
        ck_assert_int_eq(tensor->dtype, r->tensors[i].dtype);
        ck_assert_uint_eq(tensor->bytes, r->tensors[i].bytes);
        ck_assert_msg(memcmp(tensor->data, r->tensors[i].data, tensor->bytes) == 0, "%s", r->tensors[i].name);
    }
    psoup__weights_free(weights);
}

/* A model's tensors in memory, or behind a function. */
typedef struct held {
    psoup__weights *weights;
    psoup_named_tensor tensors[64];
    size_t n;
    int reads, fail;
} held;

static int give(void *user, size_t index, uint64_t offset, size_t bytes, void *out) {
    held *h = user;
    const psoup__tensor *tensor = psoup__weights_find(h->weights, h->tensors[index].name);
    __atomic_add_fetch(&h->reads, 1, __ATOMIC_RELAXED);
    if (h->fail || offset + bytes > tensor->bytes)
        return 1;
    memcpy(out, (const char *)tensor->data + offset, bytes);
    return 0;
}

static psoup_merge_tensors hold(held *h, const char *path, bool pulled) {
    *h = (held){0};
    ck_ok(psoup__weights_map(context, path, "model", &h->weights, &error));
    h->n = psoup__weights_count(h->weights);
    for (size_t i = 0; i < h->n; i++) {
        const psoup__tensor *tensor = psoup__weights_tensor(h->weights, i);
        h->tensors[i] = (psoup_named_tensor){psoup__weights_name(h->weights, i), tensor->dtype, tensor->rank,
                                             tensor->shape, pulled ? NULL : tensor->data};
    }
    psoup_merge_tensors out = PSOUP_MERGE_TENSORS_INIT;
    out.name = "engine";
    out.tensors = h->tensors;
    out.n = h->n;
    out.read = pulled ? give : NULL;
    out.user = h;
    return out;
}

START_TEST(what_the_caller_holds_or_gives_is_a_source) {
    static const int32_t methods[] = {PSOUP_MERGE_DELTA, PSOUP_MERGE_TIES, PSOUP_MERGE_SLERP};
    for (size_t m = 0; m < 3; m++)
        for (int pulled = 0; pulled < 2; pulled++) {
            held h;
            received r = {0};
            const bool ties = methods[m] == PSOUP_MERGE_TIES;
            const double half = 0.5;
            psoup_merge_tensors tensors = hold(&h, M12, pulled);
            psoup_merger *files = merger_of(methods[m], -1), *engine = merger_of(methods[m], -1);
            psoup_merger *two[2] = {files, engine};
            for (int i = 0; i < 2; i++) {
                ck_ok(psoup_merger_set_parameter(two[i], -1, "t", NULL, &half, 1, &error));
                ck_ok(psoup_merger_set_parameter(two[i], -1, "density", NULL, &half, 1, &error));
                if (ties)
                    ck_ok(psoup_merger_set_base(two[i], BASE, &error));
                ck_ok(psoup_merger_add(two[i], M11, 0.25, &error));
            }
            ck_ok(psoup_merger_add(files, M12, 0.75, &error));
            ck_ok(psoup_merger_add_tensors(engine, &tensors, 0.75, &error));
            ck_ok(psoup_merger_write(files, in_scratch("files"), &error));
            ck_ok(receive(engine, &r));
            same_as(&r, in_scratch("files"));
            ck_assert(pulled ? h.reads > 0 : h.reads == 0);
            drop(&r);
            /* a new user's weights */
            const double weights[2] = {0.6, 0.4};
            ck_ok(psoup_merger_set_weights(engine, weights, 2, &error));
            ck_ok(psoup_merger_set_weights(files, weights, 2, &error));
            ck_ok(psoup_merger_write(files, in_scratch("files"), &error));
            ck_ok(receive(engine, &r));
            same_as(&r, in_scratch("files"));
            drop(&r);
            psoup_merger_free(files);
            psoup_merger_free(engine);
            psoup__weights_free(h.weights);
        }
}
END_TEST

START_TEST(callbacks_that_fail_or_stop_are_errors) {
    held h;
    received r = {.stop_at = 3};
    psoup_merge_tensors tensors = hold(&h, M12, true);
    psoup_merger *merger = merger_of(PSOUP_MERGE_DELTA, -1);
    ck_ok(psoup_merger_add_tensors(merger, &tensors, 1, &error));
    ck_assert_int_eq(receive(merger, &r), PSOUP_ERROR_CANCELLED);
    ck_assert_ptr_nonnull(strstr(error.message, "stopped the merge at tensor"));
    drop(&r);
    r.stop_at = 0;
    h.fail = 1;
    ck_assert_int_eq(receive(merger, &r), PSOUP_ERROR_IO);
    ck_assert_ptr_nonnull(strstr(error.message, "engine: its read function"));
    drop(&r);
    psoup_merger_free(merger);

    tensors.read = NULL;
    merger = merger_of(PSOUP_MERGE_DELTA, -1);
    ck_assert_int_eq(psoup_merger_add_tensors(merger, &tensors, 1, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "expected data or `read`"));
    h.tensors[1].name = h.tensors[0].name;
    tensors.read = give;
    ck_assert_int_eq(psoup_merger_add_tensors(merger, &tensors, 1, &error), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "is there twice"));
    ck_assert_int_eq(psoup_merger_run(merger, NULL, &error), PSOUP_ERROR_STATE); /* nothing was added */
    psoup_merger_free(merger);
    psoup__weights_free(h.weights);
}
END_TEST

/* Σ w (x − …) from the files, element by element in f64. */
static double value(const char *path, const char *name, size_t i) {
    psoup__weights *weights;
    ck_ok(psoup__weights_map(context, path, "model", &weights, &error));
    const psoup__tensor *tensor = psoup__weights_find(weights, name);
    ck_assert_ptr_nonnull(tensor);
    double x = as_double(tensor, i);
    psoup__weights_free(weights);
    return x;
}

START_TEST(settings_by_tensor_and_depth) {
    psoup_merger *merger = merger_of(PSOUP_MERGE_DELTA, PSOUP_F32);
    const double ramp[2] = {0.2, 0.6}, half = 0.5, tenth = 0.1;
    ck_ok(psoup_merger_add(merger, M11, 1, &error));
    ck_ok(psoup_merger_add(merger, M12, 0, &error));
    ck_ok(psoup_merger_set_parameter(merger, -1, "weight", "mlp", &tenth, 1, &error));
    ck_ok(psoup_merger_set_parameter(merger, 0, "weight", NULL, ramp, 2, &error));
    ck_ok(psoup_merger_set_parameter(merger, 0, "weight", "re:self_attn\\.[qk]_proj\\.weight", &half, 1,
                                     &error)); /* the latest goes first */
    ck_ok(psoup_merger_write(merger, in_scratch("out"), &error));
    psoup_merger_free(merger);
    const struct {
        const char *name;
        double a, b;
    } expected[] = {{"model.layers.0.self_attn.q_proj.weight", 0.5, 0},
                    {"model.layers.0.self_attn.v_proj.weight", 0.2, 0},
                    {"model.layers.1.self_attn.v_proj.weight", 0.6, 0},
                    {"model.layers.1.mlp.up_proj.weight", 0.6, 0.1},
                    {"model.norm.weight", 0.2, 0}};
    for (size_t i = 0; i < 5; i++) {
        double sum = expected[i].a * value(M11, expected[i].name, 3) + expected[i].b * value(M12, expected[i].name, 3);
        ck_assert_double_eq_tol(value(in_scratch("out"), expected[i].name, 3), sum, 1e-7);
    }
    merger = merger_of(PSOUP_MERGE_DELTA, -1);
    ck_assert_int_ne(psoup_merger_set_parameter(merger, -1, "heat", NULL, &half, 1, &error), PSOUP_OK);
    ck_assert_int_ne(psoup_merger_set_parameter(merger, 0, "weight", NULL, &half, 1, &error), PSOUP_OK);
    ck_assert_int_ne(psoup_merger_set_parameter(merger, -1, "weight", "re:(a|b)", &half, 1, &error), PSOUP_OK);
    ck_assert_int_ne(psoup_merger_set_parameter(merger, -1, "weight", NULL, NULL, 0, &error), PSOUP_OK);
    psoup_merger_free(merger);
}
END_TEST

/* An adapter beside a model is the base with its change: as if that had been merged before. */
START_TEST(models_and_adapters_mixed) {
    char folded[1024], both[1024];
    recipe r = {.base = BASE, .sources = {A}, .weights = {1}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("folded"), NULL));
    snprintf(folded, sizeof folded, "%s", in_scratch("folded"));
    psoup_merger *merger = merger_of(PSOUP_MERGE_DELTA, -1);
    ck_ok(psoup_merger_set_base(merger, BASE, &error));
    ck_ok(psoup_merger_add(merger, M11, 0.5, &error));
    ck_ok(psoup_merger_add(merger, A, 0.5, &error));
    ck_ok(psoup_merger_write(merger, in_scratch("mixed"), &error));
    psoup_merger_free(merger);
    snprintf(both, sizeof both, "%s+%s", BASE, A);
    for (int i = 0; i < 2; i++) {
        merger = merger_of(PSOUP_MERGE_DELTA, PSOUP_F32);
        ck_ok(psoup_merger_add(merger, M11, 0.5, &error));
        ck_ok(psoup_merger_add(merger, i == 0 ? folded : both, 0.5, &error));
        ck_ok(psoup_merger_write(merger, in_scratch("models"), &error));
        psoup_merger_free(merger);
        compare_weights(in_scratch("models"), in_scratch("mixed"), 1e-7, 1);
    }
}
END_TEST

/* Methods of whole tensors on adapters, with and without a base, agree but for the cut to a rank. */
START_TEST(methods_of_whole_tensors_on_adapters) {
    psoup_merger *merger;
    psoup_merge_report report = {.size = sizeof report};
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    options.method = _i == 0 ? PSOUP_MERGE_TASK_ARITHMETIC : PSOUP_MERGE_DARE_LINEAR;
    options.lambda = options.density = 0.5;
    options.svd_rank = 16; /* all there is */
    ck_ok(psoup_merger_create(context, &options, &merger, &error));
    ck_ok(psoup_merger_add(merger, A, 0.3, &error));
    ck_ok(psoup_merger_add(merger, B, 0.9, &error));
    ck_ok(psoup_merger_write(merger, in_scratch("cut"), &error));
    ck_ok(psoup_merger_report(merger, &report, &error));
    ck_assert_double_lt(report.worst_error, 1e-4);
    psoup_merger_free(merger);
    recipe r = {.base = BASE, .sources = {in_scratch("cut")}, .weights = {1}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("of_cut"), NULL));
    merger = merger_of(options.method, -1);
    const double half = 0.5;
    ck_ok(psoup_merger_set_parameter(merger, -1, "lambda", NULL, &half, 1, &error));
    ck_ok(psoup_merger_set_parameter(merger, -1, "density", NULL, &half, 1, &error));
    ck_ok(psoup_merger_set_base(merger, BASE, &error));
    ck_ok(psoup_merger_add(merger, A, 0.3, &error));
    ck_ok(psoup_merger_add(merger, B, 0.9, &error));
    ck_ok(psoup_merger_write(merger, in_scratch("whole"), &error));
    psoup_merger_free(merger);
    compare_weights(in_scratch("of_cut"), in_scratch("whole"), 1e-5, 1);
}
END_TEST

/* ---- formats -------------------------------------------------------------------------------------------------- */

static void convert(const char *from, const char *reference, const char *to, int32_t format) {
    psoup_merger *merger;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    options.format = format;
    ck_ok(psoup_merger_create(context, &options, &merger, &error));
    if (reference != NULL)
        ck_ok(psoup_merger_set_reference(merger, reference, &error));
    ck_ok(psoup_merger_add(merger, from, 1, &error));
    ck_ok(psoup_merger_write(merger, to, &error));
    psoup_merger_free(merger);
    ck_ok(psoup_merge_verify(context, to, NULL, &error));
}

START_TEST(formats_there_and_back) {
    char gguf[1024], back[1024];
    snprintf(gguf, sizeof gguf, "%s", in_scratch("model.gguf"));
    snprintf(back, sizeof back, "%s", in_scratch("back"));
    convert(M11, NULL, gguf, PSOUP_MERGE_GGUF);
    convert(gguf, NULL, back, PSOUP_MERGE_AS_SOURCES);
    compare_weights(back, M11, 0, 1);
    ck_assert(psoup__file_exists(in_scratch("model.psoup-merge.json")));
    ck_assert(psoup__file_exists(in_scratch("back/config.json")));

    snprintf(gguf, sizeof gguf, "%s", in_scratch("adapter.gguf"));
    snprintf(back, sizeof back, "%s", in_scratch("peft"));
    convert(C, BASE, gguf, PSOUP_MERGE_GGUF); /* rsLoRA: a scale that GGUF has not */
    convert(gguf, NULL, back, PSOUP_MERGE_AS_SOURCES);
    recipe r = {.base = BASE, .sources = {C}, .weights = {1}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("one"), NULL));
    r.sources[0] = back;
    ck_ok(run_recipe(context, &r, in_scratch("two"), NULL));
    compare_weights(in_scratch("one"), in_scratch("two"), 1e-7, 1);
    ck_assert(!psoup__file_exists(in_scratch("adapter.psoup-partial.gguf")));
    ck_assert(!psoup__file_exists(in_scratch("adapter.psoup-partial.data")));
}
END_TEST

START_TEST(shards_hold_the_same_bits) {
    psoup_merger *merger;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    char whole[1024];
    const recipe r = {.sources = {M11, M12}, .weights = {0.5, 0.5}, .dtype = -1};
    ck_ok(run_recipe(context, &r, in_scratch("whole"), NULL));
    snprintf(whole, sizeof whole, "%s", in_scratch("whole"));
    for (uint64_t size = 1; size < 20000; size = size * 7 + 1) {
        options.shard_size = size;
        ck_ok(psoup_merger_create(context, &options, &merger, &error));
        ck_ok(psoup_merger_add(merger, M11, 0.5, &error));
        ck_ok(psoup_merger_add(merger, M12, 0.5, &error));
        ck_ok(psoup_merger_write(merger, in_scratch("shards"), &error));
        psoup_merger_free(merger);
        compare_weights(in_scratch("shards"), whole, 0, 1);
        ck_ok(psoup_merge_verify(context, in_scratch("shards"), NULL, &error));
    }
}
END_TEST

/* ---- what does not fit, and memory that fails ------------------------------------------------------------------ */

/* A model of an embedding and a norm, with a head or without. */
static const float numbers[3][32] = {{1, 2, 3, 4, 5, 6, 7, 8}, {9, 8, 7, 6, 5, 4, 3, 2}, {0.5f, 0.25f}};
static const int64_t eight[2] = {4, 2}, two_by_four[2] = {2, 4};
static psoup_merge_tensors small(psoup_named_tensor tensors[3], const char *name, int which, bool head) {
    tensors[0] = (psoup_named_tensor){"model.embed_tokens.weight", PSOUP_F32, 2, eight, numbers[which]};
    tensors[1] = (psoup_named_tensor){"model.norm.weight", PSOUP_F32, 1, eight + 1, numbers[2]};
    tensors[2] = (psoup_named_tensor){"lm_head.weight", PSOUP_F32, 2, eight, numbers[1 - which]};
    psoup_merge_tensors out = PSOUP_MERGE_TENSORS_INIT;
    out.name = name;
    out.tensors = tensors;
    out.n = head ? 3 : 2;
    return out;
}

START_TEST(a_tied_head_is_the_embedding) {
    for (int first = 0; first < 2; first++) { /* whichever comes first has none */
        psoup_named_tensor a[3], b[3];
        received r = {0};
        psoup_merge_tensors tied = small(a, "tied", 0, false), untied = small(b, "untied", 1, true);
        psoup_merger *merger = merger_of(PSOUP_MERGE_DELTA, -1);
        ck_ok(psoup_merger_add_tensors(merger, first == 0 ? &tied : &untied, first == 0 ? 0.75 : 0.25, &error));
        ck_ok(psoup_merger_add_tensors(merger, first == 0 ? &untied : &tied, first == 0 ? 0.25 : 0.75, &error));
        ck_ok(receive(merger, &r));
        ck_assert_uint_eq(r.n, 3);
        for (size_t i = 0; i < 3; i++) {
            float x[8];
            memcpy(x, r.tensors[i].data, r.tensors[i].bytes);
            for (int j = 0; j < 8 && strcmp(r.tensors[i].name, "lm_head.weight") == 0; j++) /* untied's is
                numbers[0] too */
                ck_assert_float_eq(x[j], numbers[0][j]);
            for (int j = 0; j < 8 && strcmp(r.tensors[i].name, "model.embed_tokens.weight") == 0; j++)
                ck_assert_float_eq(x[j], 0.75f * numbers[0][j] + 0.25f * numbers[1][j]);
        }
        drop(&r);
        psoup_merger_free(merger);
    }
}
END_TEST

START_TEST(what_does_not_fit_is_refused) {
    psoup_named_tensor a[3], b[3];
    received r = {0};
    psoup_merge_tensors one = small(a, "one", 0, true), two = small(b, "two", 1, true);
    psoup_merger *merger = merger_of(PSOUP_MERGE_DELTA, -1);
    b[0].shape = two_by_four;
    ck_ok(psoup_merger_add_tensors(merger, &one, 0.5, &error));
    ck_ok(psoup_merger_add_tensors(merger, &two, 0.5, &error));
    ck_assert_int_eq(receive(merger, &r), PSOUP_ERROR_ARGUMENT);
    ck_assert_str_eq(error.message, "two: tensor model.embed_tokens.weight has another shape than in one: 2 × 4, "
                                    "there 4 × 2 (the vocabularies differ)");
    psoup_merger_free(merger);

    char command[2048]; /* tensors of the same names in another architecture */
    snprintf(command, sizeof command,
             "cp -r '%s' '%s' && sed -i 's/\"model_type\": \"llama\"/\"model_type\": \"mistral\"/' "
             "'%s/config.json'", M11, in_scratch("mistral"), in_scratch("mistral"));
    ck_assert_int_eq(system(command), 0);
    merger = merger_of(PSOUP_MERGE_DELTA, -1);
    ck_ok(psoup_merger_add(merger, M12, 0.5, &error));
    ck_ok(psoup_merger_add(merger, in_scratch("mistral"), 0.5, &error));
    ck_assert_int_eq(receive(merger, &r), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "model_type is mistral, that of tests/golden/merge/model12 llama"));
    psoup_merger_free(merger);

    merger = merger_of(PSOUP_MERGE_TIES, -1);
    ck_ok(psoup_merger_add(merger, M12, 0.5, &error));
    ck_assert_int_eq(receive(merger, &r), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "ties takes differences from a base"));
    psoup_merger_free(merger);
    merger = merger_of(PSOUP_MERGE_TIES, -1);
    ck_ok(psoup_merger_add(merger, A, 0.5, &error));
    ck_assert_int_eq(receive(merger, &r), PSOUP_ERROR_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(error.message, "expected a base, or svd_rank"));
    psoup_merger_free(merger);
}
END_TEST

static psoup_status into_gguf(void) {
    psoup_status status;
    psoup_merger *merger = NULL;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    options.format = PSOUP_MERGE_GGUF;
    PSOUP__TRY(psoup_merger_create(context, &options, &merger, &error));
    PSOUP__TRY(psoup_merger_set_reference(merger, BASE, &error));
    PSOUP__TRY(psoup_merger_add(merger, A, 0.5, &error));
    PSOUP__TRY(psoup_merger_add(merger, C, 0.5, &error));
    PSOUP__TRY(psoup_merger_write(merger, in_scratch("out.gguf"), &error));
fail:
    psoup_merger_free(merger);
    return status;
}

static psoup_status into_shards(void) {
    psoup_status status;
    psoup_merger *merger = NULL;
    psoup_merger_options options = PSOUP_MERGER_OPTIONS_INIT;
    options.method = PSOUP_MERGE_DARE_TIES;
    options.shard_size = 4000;
    options.resume = 1;
    options.sha256 = 1;
    PSOUP__TRY(psoup_merger_create(context, &options, &merger, &error));
    PSOUP__TRY(psoup_merger_set_base(merger, M11, &error));
    PSOUP__TRY(psoup_merger_add(merger, M12, 1, &error));
    PSOUP__TRY(psoup_merger_write(merger, in_scratch("shards"), &error));
fail:
    psoup_merger_free(merger);
    return status;
}

static psoup_status from_certificate(void) {
    psoup_status status;
    psoup_merger *merger = NULL;
    char path[1024];
    PSOUP__TRY(into_shards());
    snprintf(path, sizeof path, "%s", in_scratch("shards/psoup-merge.json"));
    PSOUP__TRY(psoup_merger_create(context, NULL, &merger, &error));
    PSOUP__TRY(psoup_merger_load_certificate(merger, path, &error));
    PSOUP__TRY(psoup_merger_write(merger, in_scratch("again"), &error));
    PSOUP__TRY(psoup_merge_verify(context, in_scratch("again"), NULL, &error));
fail:
    psoup_merger_free(merger);
    return status;
}

START_TEST(survives_every_failed_allocation) {
    static psoup_status (*const paths[])(void) = {into_gguf, into_shards, from_certificate};
    int before = live, n = 0;
    psoup_status status;
    do {
        allocations = 0;
        fail_at = n++;
        status = paths[_i]();
        fail_at = -1;
        ck_assert_int_eq(live, before);
        ck_assert_msg(status == PSOUP_OK || status == PSOUP_ERROR_MEMORY, "%d: %s", n, error.message);
        if (_i == 2 && n > 200)
            n += 6; /* long: every seventh */
    } while (status != PSOUP_OK);
    ck_assert_int_gt(n, 100);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("merge_engine");
    TCase *tests = tcase_create("merge_engine");
    tcase_add_checked_fixture(tests, set_up, tear_down);
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, what_the_caller_holds_or_gives_is_a_source);
    tcase_add_test(tests, callbacks_that_fail_or_stop_are_errors);
    tcase_add_test(tests, settings_by_tensor_and_depth);
    tcase_add_test(tests, models_and_adapters_mixed);
    tcase_add_loop_test(tests, methods_of_whole_tensors_on_adapters, 0, 2);
    tcase_add_test(tests, formats_there_and_back);
    tcase_add_test(tests, shards_hold_the_same_bits);
    tcase_add_test(tests, a_tied_head_is_the_embedding);
    tcase_add_test(tests, what_does_not_fit_is_refused);
    tcase_add_loop_test(tests, survives_every_failed_allocation, 0, 3);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
