/* Full models: their weighted sum, or adapters folded into a base. Streams: tensors go block by block
 * from the mapped sources to the file, and no tensor is ever whole in memory. */
#include "merge/merge.h"

#include <string.h>

#define BLOCK (1 << 20) /* elements */

/* What one result is the sum of. */
typedef struct place {
    const psoup__tensor *tensor;
    const char *path; /* for messages */
} place;

typedef struct stream {
    psoup_merger *merger;
    const psoup__weights *like; /* the base, or the first model: names, order, shapes */
    psoup__safetensors_writer *writer;
    place *places;       /* [sources] */
    const void **in;     /* [sources] */
    psoup_dtype *dtypes; /* [sources] */
    void *out;           /* [BLOCK], of the widest dtype */
    float *acc;          /* [acc_capacity] folded rows, and room for them rounded */
    size_t acc_capacity;
    psoup__merge_module module;
} stream;

static bool is_float(psoup_dtype dtype) {
    return dtype == PSOUP_F32 || dtype == PSOUP_F16 || dtype == PSOUP_BF16 || dtype == PSOUP_F64;
}

static psoup_dtype output_dtype(const psoup_merger *merger, psoup_dtype dtype) {
    return is_float(dtype) && merger->options.dtype >= 0 ? (psoup_dtype)merger->options.dtype
                                                         : dtype;
}

/* Why a result was not finite: a source that was not, or a dtype that is too small. */
static psoup_status blame(psoup_context *context, const place *places, const double *weights,
                          size_t count, const char *name, psoup_dtype dtype, psoup_error *error) {
    float chunk[1024];
    for (size_t i = 0; i < count; i++) {
        const psoup__tensor *tensor = places[i].tensor;
        size_t size = psoup_dtype_size(tensor->dtype), n = tensor->bytes / size;
        for (size_t at = 0; at < n && weights[i] != 0; at += 1024) {
            size_t m = n - at < 1024 ? n - at : 1024;
            psoup__to_f32(context, chunk, (const char *)tensor->data + at * size, tensor->dtype, m);
            if (!psoup__merge_finite(context, chunk, m, PSOUP_F32))
                return psoup__fail(error, PSOUP_ERROR_FORMAT,
                                   "%s: tensor %.200s holds a NaN or infinity", places[i].path,
                                   name);
        }
    }
    return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                       "%s: tensor %.200s: the result is too large for %s", places[0].path, name,
                       psoup_dtype_name(dtype));
}

/* Tensors that are not floats must be the same everywhere, and are kept. */
static psoup_status copy_same(stream *s, size_t index, psoup_error *error) {
    const char *name = psoup__weights_name(s->like, index);
    const psoup__tensor *tensor = psoup__weights_tensor(s->like, index);
    for (size_t i = 0; s->merger->base == NULL && i < s->merger->n; i++) {
        const psoup__tensor *other = psoup__weights_find(s->merger->sources[i].model, name);
        if (other->dtype != tensor->dtype || memcmp(other->data, tensor->data, tensor->bytes) != 0)
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: tensor %.200s (%s) differs from that in %s and is no sum of "
                               "floats",
                               s->merger->sources[i].path, name, psoup_dtype_name(tensor->dtype),
                               s->merger->sources[0].path);
    }
    return psoup__safetensors_write(s->writer, tensor->data, tensor->bytes, error);
}

/* The weighted sum over the first `count` places; of one with weight 1, a checked copy. */
static psoup_status write_sum(stream *s, const char *name, const double *weights, size_t count,
                              psoup_error *error) {
    psoup_status status;
    psoup_context *context = s->merger->context;
    const psoup__tensor *first = s->places[0].tensor;
    psoup_dtype dtype = output_dtype(s->merger, first->dtype);
    size_t n = first->bytes / psoup_dtype_size(first->dtype);
    for (size_t i = 0; i < count; i++) {
        s->dtypes[i] = s->places[i].tensor->dtype;
        if (!is_float(s->dtypes[i]))
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: tensor %.200s is %s; expected floats as in %s",
                               s->places[i].path, name, psoup_dtype_name(s->dtypes[i]),
                               s->places[0].path);
    }
    for (size_t at = 0; at < n; at += BLOCK) {
        size_t m = n - at < BLOCK ? n - at : BLOCK;
        for (size_t i = 0; i < count; i++)
            s->in[i] = (const char *)s->places[i].tensor->data +
                       at * psoup_dtype_size(s->dtypes[i]);
        const psoup__sum_args args = {.out = s->out, .out_dtype = dtype, .in = s->in,
                                      .dtypes = s->dtypes, .weights = weights, .count = count,
                                      .n = m};
        if (!psoup__sum(context, &args))
            return blame(context, s->places, weights, count, name, dtype, error);
        PSOUP__TRY(psoup__safetensors_write(s->writer, s->out, m * psoup_dtype_size(dtype), error));
    }
    return PSOUP_OK;
fail:
    return status;
}

/* base + Σ weights · scale · B A by blocks of rows. The module's factors are loaded. */
static psoup_status write_folded(stream *s, const char *name, const psoup__tensor *base,
                                 psoup_error *error) {
    psoup_status status;
    psoup_merger *merger = s->merger;
    psoup_context *context = merger->context;
    const psoup__merge_module *module = &s->module;
    psoup_dtype dtype = output_dtype(merger, base->dtype);
    const place whole = {base, psoup__weights_path(merger->base)};
    const psoup_lora_factors *factors = module->factors;
    const double one = 1, *weights = module->weights;
    size_t count = module->count;
    psoup_lora_factors merged = {.scale = 1};
    float *a = NULL, *b = NULL;
    if (merger->options.method != PSOUP_MERGE_DELTA) {
        PSOUP__TRY(psoup__merge_module_run(merger, module, &a, &b, &merged.rank, error));
        merged.a = a;
        merged.b = b;
        factors = &merged;
        weights = &one;
        count = 1;
    }
    int64_t out = base->shape[0], in = base->shape[1], block = psoup__fold_block(out, in);
    size_t need;
    if (!psoup__multiply((size_t)block, (size_t)in, &need)) {
        status = psoup__out_of_memory(error, SIZE_MAX);
        goto fail;
    }
    if (need > s->acc_capacity) {
        psoup__free(context, s->acc);
        s->acc_capacity = 0;
        s->acc = psoup__alloc(context, need, sizeof *s->acc + sizeof(double), error);
        if (s->acc == NULL) {
            status = PSOUP_ERROR_MEMORY;
            goto fail;
        }
        s->acc_capacity = need;
    }
    void *rounded = s->acc + s->acc_capacity;
    for (int64_t first = 0; first < out; first += block) {
        int64_t rows = out - first < block ? out - first : block;
        size_t n = (size_t)rows * (size_t)in;
        psoup__fold_rows(context, s->acc, base->data, base->dtype, first, rows, in, factors,
                         weights, count);
        if (!psoup__merge_finite(context, s->acc, n, dtype)) {
            status = blame(context, &whole, &one, 1, name, dtype, error);
            goto fail;
        }
        psoup__from_f32(context, rounded, dtype, s->acc, n);
        PSOUP__TRY(psoup__safetensors_write(s->writer, rounded, n * psoup_dtype_size(dtype), error));
    }
    status = PSOUP_OK;
fail:
    psoup__free(context, a);
    return status;
}

/* Whether any adapter changes the tensor: its name is "<module>.weight". */
static psoup_status load_module(stream *s, const char *name, bool *found, psoup_error *error) {
    psoup_merger *merger = s->merger;
    size_t length = strlen(name), ending = strlen(".weight");
    *found = false;
    if (length <= ending || strcmp(name + length - ending, ".weight") != 0)
        return PSOUP_OK;
    for (size_t i = 0; i < merger->n; i++) {
        const psoup__peft_pair *pair =
            psoup__peft_find(merger->sources[i].adapter, name, length - ending);
        if (pair != NULL) {
            *found = true;
            return psoup__merge_module_load(merger, &s->module, pair->module, error);
        }
    }
    return PSOUP_OK;
}

static psoup_status write_tensor(stream *s, size_t index, psoup_error *error) {
    psoup_status status;
    psoup_merger *merger = s->merger;
    const char *name = psoup__weights_name(s->like, index);
    const psoup__tensor *tensor = psoup__weights_tensor(s->like, index);
    if (!is_float(tensor->dtype))
        return copy_same(s, index, error);
    if (merger->base == NULL) {
        for (size_t i = 0; i < merger->n; i++)
            s->places[i] = (place){psoup__weights_find(merger->sources[i].model, name),
                                   merger->sources[i].path};
        return write_sum(s, name, merger->weights, merger->n, error);
    }
    bool found;
    PSOUP__TRY(load_module(s, name, &found, error));
    if (found)
        return write_folded(s, name, tensor, error);
    const double one = 1;
    s->places[0] = (place){tensor, psoup__weights_path(merger->base)};
    return write_sum(s, name, &one, 1, error);
fail:
    return status;
}

/* Every module of every adapter must be a matrix of the base, of its shape. */
static psoup_status check_adapters_fit(const psoup_merger *merger, psoup_error *error) {
    for (size_t i = 0; i < merger->n; i++) {
        const psoup__peft *adapter = merger->sources[i].adapter;
        if (adapter->head.data != NULL)
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "%s: has a scalar head (score), which a full model has no place for; "
                               "merge such adapters without a base",
                               adapter->path);
        for (size_t j = 0; j < adapter->n; j++) {
            const psoup__peft_pair *pair = &adapter->pairs[j];
            char *name = psoup__format(merger->context, error, "%s.weight", pair->module);
            if (name == NULL)
                return PSOUP_ERROR_MEMORY;
            const psoup__tensor *tensor = psoup__weights_find(merger->base, name);
            psoup__free(merger->context, name);
            const char *base = psoup__weights_path(merger->base);
            if (tensor == NULL)
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                   "%s: %.200s is not in the base %s%s", adapter->path,
                                   pair->module, base,
                                   strcmp(pair->module, "lm_head") == 0
                                       ? " (its head is tied to the embedding)"
                                       : "");
            if (tensor->rank != 2 || tensor->shape[0] != pair->b.shape[0] ||
                tensor->shape[1] != pair->a.shape[1] || !is_float(tensor->dtype))
                return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                   "%s: %.200s maps %lld to %lld features; the base %s has another "
                                   "shape",
                                   adapter->path, pair->module, (long long)pair->a.shape[1],
                                   (long long)pair->b.shape[0], base);
        }
    }
    return PSOUP_OK;
}

/* config.json names the dtype; the other files go with the model as they are. */
static psoup_status write_sidecars(const psoup_merger *merger, const psoup__weights *like,
                                   const char *directory, psoup_error *error) {
    static const char *const names[] = {"float32", "float16", "bfloat16"};
    psoup_status status;
    psoup_context *context = merger->context;
    psoup_json *config = NULL, *changed = NULL;
    char *path = NULL;
    PSOUP__TRY(psoup__hf_copy_sidecars(context, psoup__weights_path(like), directory, error));
    if (merger->options.dtype < 0)
        return PSOUP_OK;
    if ((path = psoup__path_join(context, directory, "config.json", error)) == NULL)
        return PSOUP_ERROR_MEMORY;
    if (psoup__file_exists(path)) {
        PSOUP__TRY(psoup_json_read(context, path, &config, error));
        const char *field = psoup_json_get(config, "dtype") != NULL ? "dtype" : "torch_dtype";
        changed = psoup_json_copy(config);
        if (psoup_json_set(changed, field, psoup_json_new_string(names[merger->options.dtype])) != 0)
            status = psoup__out_of_memory(error, 0);
        else
            status = psoup_json_write(context, path, changed, error);
    }
fail:
    psoup_json_free(changed);
    psoup_json_free(config);
    psoup__free(context, path);
    return status;
}

psoup_status psoup__merge_models(psoup_merger *merger, const char *directory, psoup_error *error) {
    psoup_status status;
    psoup_context *context = merger->context;
    stream s = {.merger = merger,
                .like = merger->base != NULL ? merger->base : merger->sources[0].model};
    size_t n = psoup__weights_count(s.like);
    char *path = psoup__path_join(context, directory, "model.safetensors", error);
    if (path == NULL)
        return PSOUP_ERROR_MEMORY;
    if (merger->base != NULL) {
        PSOUP__TRY(check_adapters_fit(merger, error));
        PSOUP__TRY(psoup__merge_module_init(merger, &s.module, error));
    }
    status = PSOUP_ERROR_MEMORY;
    if ((s.places = psoup__alloc(context, merger->n, sizeof *s.places, error)) == NULL ||
        (s.in = psoup__alloc(context, merger->n, sizeof *s.in, error)) == NULL ||
        (s.dtypes = psoup__alloc(context, merger->n, sizeof *s.dtypes, error)) == NULL ||
        (s.out = psoup__alloc(context, BLOCK, sizeof(double), error)) == NULL)
        goto fail;
    PSOUP__TRY(write_sidecars(merger, s.like, directory, error));
    PSOUP__TRY(psoup__safetensors_create(context, path, &s.writer, error));
    for (size_t i = 0; i < n; i++) {
        const psoup__tensor *tensor = psoup__weights_tensor(s.like, i);
        PSOUP__TRY(psoup__safetensors_declare(s.writer, psoup__weights_name(s.like, i),
                                              output_dtype(merger, tensor->dtype), tensor->rank,
                                              tensor->shape, error));
    }
    PSOUP__TRY(psoup__safetensors_begin(s.writer, error));
    for (size_t i = 0; i < n; i++) {
        PSOUP__TRY(write_tensor(&s, i, error));
        PSOUP__TRY(psoup__merge_progress(merger, i + 1, n, error));
    }
    PSOUP__TRY(psoup__safetensors_commit(s.writer, error));
    merger->report.tensors = n;
fail:
    psoup__safetensors_writer_free(s.writer);
    if (merger->base != NULL)
        psoup__merge_module_free(merger, &s.module);
    psoup__free(context, s.places);
    psoup__free(context, s.in);
    psoup__free(context, s.dtypes);
    psoup__free(context, s.out);
    psoup__free(context, s.acc);
    psoup__free(context, path);
    return status;
}
