/* A model's life: create, load, save, free. */
#include "model/model.h"

#include <string.h>

#include "cpu/cpu.h"
#include "gpu/gpu.h"

/* ---- making ----------------------------------------------------------------------------------- */

static void shape_layer(const psoup_model *model, psoup__layer *layer) {
    int32_t dim = model->config.hidden_size, ffn = model->config.intermediate_size;
    const int32_t out[PSOUP__LINEARS] = {model->q_width, model->kv_width, model->kv_width, dim,
                                         ffn,            ffn,             dim};
    const int32_t in[PSOUP__LINEARS] = {dim, dim, dim, model->q_width, dim, dim, ffn};
    for (int i = 0; i < PSOUP__LINEARS; i++)
        layer->linear[i] = (psoup__weight){.out = out[i], .in = in[i]};
}

/* A model without weights yet. */
static psoup_status create_empty(psoup_context *context, const psoup_model_config *config,
                                 psoup_model **out, psoup_error *error) {
    psoup_status status;
    psoup_model *model = psoup__alloc(context, 1, sizeof *model, error);
    if (!model)
        return PSOUP_ERROR_MEMORY;
    model->context = context;
    model->config = *config;
    model->config.size = sizeof model->config;
    model->q_width = config->num_attention_heads * config->head_dim;
    model->kv_width = config->num_key_value_heads * config->head_dim;
    model->embed = (psoup__weight){.out = config->vocab_size, .in = config->hidden_size};
    model->lm_head = model->embed;
    PSOUP__TRY((context->gpu < 0 ? psoup__cpu_create : psoup__gpu_create)(context, &model->be, error));
    size_t layers = (size_t)config->num_hidden_layers;
    model->layers = psoup__alloc(context, layers, sizeof *model->layers, error);
    status = PSOUP_ERROR_MEMORY;
    if (!model->layers)
        goto fail;
    for (size_t i = 0; i < layers; i++)
        shape_layer(model, &model->layers[i]);
    *out = model;
    return PSOUP_OK;
fail:
    psoup_model_free(model);
    return status;
}

psoup_status psoup_model_load_with(psoup_context *context, const char *directory, const psoup_load_options *options,
                                   psoup_model **out, psoup_error *error) {
    *out = NULL;
    psoup_model *model = NULL;
    psoup_model_config config = PSOUP_MODEL_CONFIG_INIT;
    psoup_load_options full = PSOUP_LOAD_OPTIONS_INIT;
    psoup_status status;
    PSOUP__TRY(psoup__options(&full, sizeof full, options, "psoup_load_options", error));
    if (full.dtype < -1 || (full.dtype > PSOUP_BF16 && full.dtype != PSOUP_INT8 && full.dtype != PSOUP_NF4))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_load_options: dtype %d (%s); expected -1, f32, f16, bf16, int8 or nf4",
                           (int)full.dtype, psoup_dtype_name((psoup_dtype)full.dtype));
    if (full.reserved)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "psoup_load_options: reserved is %d: expected 0",
                           (int)full.reserved);
    PSOUP__TRY(psoup__hf_config_read(context, directory, &config, error));
    PSOUP__TRY(create_empty(context, &config, &model, error));
    PSOUP__TRY(psoup__model_read(model, directory, full.dtype, error));
    PSOUP__TRY(psoup__model_pack(model, false, error));
    *out = model;
    return PSOUP_OK;
fail:
    psoup_model_free(model);
    return status;
}

psoup_status psoup_model_load(psoup_context *context, const char *directory, psoup_model **out,
                              psoup_error *error) {
    return psoup_model_load_with(context, directory, NULL, out, error);
}

typedef struct normals {
    float *out;
    size_t n, first; /* elements, and the number of the first in its tensor */
    uint64_t seed, stream;
    float scale;
} normals;

enum { NORMALS = 4096 };

/* Element i takes words 2i and 2i + 1 of its tensor's stream, whoever draws it. */
static void draw_normals(void *arg, size_t task, int worker) {
    const normals *job = arg;
    size_t from = task * NORMALS, end = job->n - from < NORMALS ? job->n : from + NORMALS;
    psoup__random random = {.seed = job->seed, .sequence = job->stream,
                            .position = 2 * (uint64_t)(job->first + from)};
    psoup__random_normals(&random, job->out + from, end - from);
    for (size_t i = from; i < end; i++)
        job->out[i] *= job->scale;
}

static psoup_status randomise(psoup_model *model, uint64_t seed, psoup_error *error) {
    float *piece = psoup__alloc(model->context, 2 * (size_t)PSOUP__PIECE, sizeof(float), error);
    if (!piece)
        return PSOUP_ERROR_MEMORY;
    normals job = {.out = piece, .seed = seed, .scale = model->config.initializer_range};
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p); job.stream++) {
        float constant = p.vector && strstr(p.name, "norm.weight") ? 1 : 0;
        for (size_t first = 0; first < p.count; first += PSOUP__PIECE) {
            size_t n = p.count - first < PSOUP__PIECE ? p.count - first : PSOUP__PIECE;
            job.n = n;
            job.first = first;
            if (p.weight)
                psoup__parallel(model->context, (n + NORMALS - 1) / NORMALS, draw_normals, &job);
            for (size_t i = 0; !p.weight && i < n; i++)
                piece[i] = constant;
            psoup__parameter_write(model, &p, first, n, piece, piece + PSOUP__PIECE);
        }
    }
    psoup__free(model->context, piece);
    return PSOUP_OK;
}

psoup_status psoup_model_create(psoup_context *context, const psoup_model_config *config,
                                uint64_t seed, psoup_model **out, psoup_error *error) {
    *out = NULL;
    psoup_model *model = NULL;
    psoup_model_config full = PSOUP_MODEL_CONFIG_INIT;
    psoup_status status;
    PSOUP__TRY(psoup__options(&full, sizeof full, config, "psoup_model_config", error));
    PSOUP__TRY(psoup__config_check(&full, "psoup_model_config", error));
    PSOUP__TRY(create_empty(context, &full, &model, error));
    PSOUP__TRY(psoup__model_store(model, true, error));
    PSOUP__TRY(randomise(model, seed, error));
    PSOUP__TRY(psoup__model_pack(model, false, error));
    *out = model;
    return PSOUP_OK;
fail:
    psoup_model_free(model);
    return status;
}

void psoup_model_free(psoup_model *model) {
    if (!model)
        return;
    psoup_context *context = model->context;
    if (model->be) {
        const psoup__ops *ops = model->be->ops;
        while (model->n_adapters > 0)
            psoup_model_remove_adapter(model, model->adapters[model->n_adapters - 1]->name, NULL);
        ops->weight_unpack(model->be, &model->lm_head);
        for (int32_t i = 0; model->layers && i < model->config.num_hidden_layers; i++)
            for (int j = 0; j < PSOUP__LINEARS; j++)
                ops->weight_unpack(model->be, &model->layers[i].linear[j]);
        ops->release(model->be, model->storage);
        ops->release(model->be, model->vectors);
        ops->release(model->be, model->data);
        ops->release(model->be, model->grad);
        ops->release(model->be, model->cos_sin);
        ops->free(model->be);
    }
    psoup__weights_free(model->weights);
    psoup__free(context, model->adapters);
    psoup__free(context, model->layers);
    psoup__free(context, model);
}

/* ---- saving ----------------------------------------------------------------------------------- */

/* A frozen matrix keeps its dtype; the rest is written as torch_dtype. */
static psoup_dtype saved_dtype(const psoup_model *model, const psoup__parameter *p) {
    return p->weight && !model->data ? p->weight->dtype : (psoup_dtype)model->config.torch_dtype;
}

static psoup_status write_weights(const psoup_model *model, psoup__safetensors_writer *writer,
                                  float *piece, psoup_error *error) {
    psoup_status status;
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);) {
        const int64_t shape[2] = {p.rows, p.columns};
        PSOUP__TRY(psoup__safetensors_declare(writer, p.name, saved_dtype(model, &p),
                                              p.weight ? 2 : 1, shape, error));
    }
    PSOUP__TRY(psoup__safetensors_metadata_set(writer, "format", "pt", error));
    PSOUP__TRY(psoup__safetensors_begin(writer, error));
    void *scratch = piece + PSOUP__PIECE;
    for (psoup__parameter p = {.next = 0}; psoup__model_next(model, &p);)
        for (size_t first = 0; first < p.count; first += PSOUP__PIECE) {
            size_t n = p.count - first < PSOUP__PIECE ? p.count - first : PSOUP__PIECE;
            psoup_dtype dtype = saved_dtype(model, &p);
            PSOUP__TRY(psoup__parameter_read(model, &p, first, n, piece, scratch, error));
            psoup__from_f32(model->context, scratch, dtype, piece, n);
            PSOUP__TRY(psoup__safetensors_write(writer, scratch, n * psoup_dtype_size(dtype),
                                                error));
        }
    PSOUP__TRY(psoup__safetensors_commit(writer, error));
fail:
    return status;
}

/* With tokenizer.json alone transformers would guess a tokenizer from the model's type, one that puts a
 * "<s>" of its own before the text. */
static psoup_status write_tokenizer_config(const psoup_model *model, const char *directory,
                                           const psoup_tokenizer *tokenizer, psoup_error *error) {
    const psoup_model_config *c = &model->config;
    const struct {
        const char *name;
        int32_t id;
    } tokens[] = {{"bos_token", c->bos_token_id},
                  {"eos_token", c->eos_token_id},
                  {"pad_token", c->pad_token_id}};
    psoup_status status = PSOUP_ERROR_MEMORY;
    psoup_json *root = psoup_json_new_object();
    char *path = psoup__path_join(model->context, directory, "tokenizer_config.json", error);
    int failed = psoup_json_set(root, "tokenizer_class",
                                psoup_json_new_string("PreTrainedTokenizerFast"));
    failed |= psoup_json_set(root, "clean_up_tokenization_spaces", psoup_json_new_bool(0));
    failed |= psoup_json_set(root, "model_max_length",
                             psoup_json_new_integer(c->max_position_embeddings));
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
        const char *text = psoup_tokenizer_token(tokenizer, tokens[i].id);
        if (text)
            failed |= psoup_json_set(root, tokens[i].name, psoup_json_new_string(text));
    }
    if (failed)
        status = psoup__out_of_memory(error, 0);
    else if (path)
        status = psoup_json_write(model->context, path, root, error);
    psoup__free(model->context, path);
    psoup_json_free(root);
    return status;
}

psoup_status psoup_model_save(const psoup_model *model, const char *directory,
                              const psoup_tokenizer *tokenizer, psoup_error *error) {
    psoup_context *context = model->context;
    if (model->config.linear_dtype)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "%s: the model is kept in %s blocks, of which no file is written: the files that it was "
                           "loaded from are more exact",
                           directory, psoup_dtype_name((psoup_dtype)model->config.linear_dtype));
    psoup__safetensors_writer *writer = NULL;
    char *path = NULL, *tokenizer_path = NULL;
    psoup_status status = PSOUP_ERROR_MEMORY;
    float *piece = psoup__alloc(context, 2 * (size_t)PSOUP__PIECE, sizeof(float), error);
    if (!piece)
        goto fail;
    path = psoup__path_join(context, directory, "model.safetensors", error);
    if (!path)
        goto fail;
    tokenizer_path = psoup__path_join(context, directory, "tokenizer.json", error);
    if (!tokenizer_path)
        goto fail;
    PSOUP__TRY(psoup__make_directories(directory, error));
    PSOUP__TRY(psoup__safetensors_create(context, path, &writer, error));
    PSOUP__TRY(write_weights(model, writer, piece, error));
    if (tokenizer)
        PSOUP__TRY(psoup_tokenizer_save(tokenizer, tokenizer_path, error));
    if (tokenizer)
        PSOUP__TRY(write_tokenizer_config(model, directory, tokenizer, error));
    PSOUP__TRY(psoup__hf_config_write(context, directory, &model->config, error)); /* last: what lacks it is no model */
fail:
    psoup__safetensors_writer_free(writer);
    psoup__free(context, piece);
    psoup__free(context, path);
    psoup__free(context, tokenizer_path);
    return status;
}

/* ---- questions -------------------------------------------------------------------------------- */

psoup_status psoup_model_get_config(const psoup_model *model, psoup_model_config *config,
                                    psoup_error *error) {
    size_t size = config->size;
    if (size < sizeof size)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_model_config: size is %zu; set it to sizeof(psoup_model_config)",
                           size);
    size_t known = size < sizeof *config ? size : sizeof *config;
    memcpy(config, &model->config, known);
    memset((char *)config + known, 0, size - known);
    config->size = size;
    return PSOUP_OK;
}

int64_t psoup_model_parameters(const psoup_model *model) {
    return (int64_t)psoup__model_count(model);
}

psoup_context *psoup_model_context(const psoup_model *model) {
    return model->context;
}
