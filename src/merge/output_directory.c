/* Results into a directory: a model in one safetensors file, or in shards with their index, or a PEFT
 * adapter. */
#include "merge/engine.h"

#include <string.h>

#define ENTRY "model.safetensors"
#define INDEX "model.safetensors.index.json"
#define ADAPTER "adapter_model.safetensors"

typedef struct shard {
    size_t first, end; /* results */
    char *name;
} shard;

typedef struct directory_output {
    psoup__output output;
    psoup__staging staging;
    shard *shards;
    size_t n, capacity;
    size_t open; /* the shard being written */
    psoup__safetensors_writer *writer;
} directory_output;

static psoup_context *context_of(const directory_output *o) {
    return o->output.plan->merger->context;
}

/* ---- shards ------------------------------------------------------------------------------------------ */

/* As many results in a shard as fit into it, one at least. */
static psoup_status divide(directory_output *o, psoup_error *error) {
    psoup_status status;
    const psoup__plan *plan = o->output.plan;
    uint64_t most = plan->adapter ? 0 : plan->merger->options.shard_size, bytes = 0;
    for (size_t i = 0; i < plan->n || o->n == 0; i++) {
        uint64_t more = i < plan->n ? plan->results[i].bytes : 0;
        if (o->n == 0 || (most > 0 && bytes + more > most && bytes > 0)) {
            PSOUP__TRY(psoup__reserve(context_of(o), &o->shards, &o->capacity, o->n + 1,
                                      sizeof *o->shards, error));
            o->shards[o->n++] = (shard){i, i, NULL};
            bytes = 0;
        }
        bytes += more;
        o->shards[o->n - 1].end = i < plan->n ? i + 1 : i;
    }
    if (o->n > 99999)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "shard_size %llu makes %zu shards; expected a larger one",
                           (unsigned long long)most, o->n);
    for (size_t i = 0; i < o->n; i++) {
        o->shards[i].name =
            o->n > 1 ? psoup__format(context_of(o), error, "model-%05zu-of-%05zu.safetensors", i + 1, o->n)
                     : psoup__strdup(context_of(o), plan->adapter ? ADAPTER : ENTRY, error);
        if (o->shards[i].name == NULL)
            return PSOUP_ERROR_MEMORY;
    }
    return PSOUP_OK;
fail:
    return status;
}

static psoup_status open_shard(directory_output *o, size_t index, psoup_error *error) {
    psoup_status status;
    const psoup__plan *plan = o->output.plan;
    const shard *s = &o->shards[index];
    char *path = psoup__path_join(context_of(o), o->staging.work, s->name, error);
    if (path == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(psoup__safetensors_create(context_of(o), path, &o->writer, error));
    for (size_t i = s->first; i < s->end; i++) {
        const psoup__result *r = &plan->results[i];
        PSOUP__TRY(psoup__safetensors_declare(o->writer, r->name, r->dtype, r->rank, r->shape, error));
    }
    PSOUP__TRY(psoup__safetensors_begin(o->writer, error));
    o->open = index;
fail:
    psoup__free(context_of(o), path);
    return status;
}

static psoup_status close_shard(directory_output *o, psoup_error *error) {
    psoup_status status = psoup__safetensors_commit(o->writer, error);
    psoup__safetensors_writer_free(o->writer);
    o->writer = NULL;
    return status;
}

/* Which tensor is where, as transformers writes it. */
static psoup_status write_index(const directory_output *o, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    const psoup__plan *plan = o->output.plan;
    psoup_json *root = psoup_json_new_object(), *map = psoup_json_new_object();
    psoup_json *metadata = psoup_json_new_object();
    uint64_t total = 0;
    int failed = 0;
    for (size_t i = 0; i < o->n; i++)
        for (size_t j = o->shards[i].first; j < o->shards[i].end; j++) {
            total += plan->results[j].bytes;
            failed |= psoup_json_set(map, plan->results[j].name, psoup_json_new_string(o->shards[i].name));
        }
    failed |= psoup_json_set(metadata, "total_size", psoup_json_new_integer((int64_t)total));
    failed |= psoup_json_set(root, "metadata", metadata);
    failed |= psoup_json_set(root, "weight_map", map);
    char *path = psoup__path_join(context_of(o), o->staging.work, INDEX, error);
    if (failed)
        status = psoup__out_of_memory(error, 0);
    else if (path != NULL)
        status = psoup_json_write(context_of(o), path, root, error);
    psoup__free(context_of(o), path);
    psoup_json_free(root);
    return status;
}

/* ---- PEFT ---------------------------------------------------------------------------------------------- */

static psoup_status write_adapter_config(const directory_output *o, psoup_error *error) {
    const psoup__plan *plan = o->output.plan;
    const psoup_json *config = plan->merger->sources[0].adapter->config;
    static const float head = 0;
    psoup__peft_output adapter = {
        .rank = plan->rank, .alpha = (float)plan->rank, /* scale 1 */
        .task_type = psoup_json_string(psoup_json_get(config, "task_type"), "CAUSAL_LM"),
        .base_name = psoup_json_string(psoup_json_get(config, "base_model_name_or_path"), "")};
    psoup__peft_pair *pairs = psoup__alloc(context_of(o), plan->n, sizeof *pairs, error);
    if (pairs == NULL)
        return PSOUP_ERROR_MEMORY;
    for (size_t i = 0; i < plan->n; i++) {
        const psoup__result *r = &plan->results[i];
        if (r->kind == PSOUP__PAIR_A)
            pairs[adapter.n++] = (psoup__peft_pair){.module = r->module, .scale = 1,
                                                    .rank = (int32_t)r->shape[0]};
        else if (r->kind == PSOUP__SUM)
            adapter.head = &head; /* there is one */
    }
    adapter.pairs = pairs;
    psoup_status status = psoup__peft_write_config(context_of(o), o->staging.work, &adapter, error);
    psoup__free(context_of(o), pairs);
    return status;
}

/* ---- the table --------------------------------------------------------------------------------------------- */

static psoup_status begin(psoup__output *output, psoup_error *error) {
    directory_output *o = (directory_output *)output;
    return output->plan->adapter ? write_adapter_config(o, error)
                                 : psoup__write_sidecars(output->plan, o->staging.work, error);
}

static psoup_status tensor(psoup__output *output, size_t index, psoup_error *error) {
    directory_output *o = (directory_output *)output;
    if (o->writer != NULL)
        return PSOUP_OK;
    size_t s = 0;
    while (index >= o->shards[s].end)
        s++;
    return open_shard(o, s, error);
}

static psoup_status write(psoup__output *output, size_t index, const void *data, size_t bytes,
                          psoup_error *error) {
    (void)index;
    return psoup__safetensors_write(((directory_output *)output)->writer, data, bytes, error);
}

static psoup_status finish(psoup__output *output, size_t index, psoup_error *error) {
    directory_output *o = (directory_output *)output;
    return index + 1 == o->shards[o->open].end ? close_shard(o, error) : PSOUP_OK;
}

static psoup_status commit(psoup__output *output, const char *certificate, psoup_error *error) {
    psoup_status status;
    directory_output *o = (directory_output *)output;
    (void)certificate;
    if (o->n > 1)
        PSOUP__TRY(write_index(o, error));
    PSOUP__TRY(psoup__staging_commit(&o->staging, o->n > 1 ? INDEX : o->shards[0].name, error));
fail:
    return status;
}

static void directory_free(psoup__output *output) {
    directory_output *o = (directory_output *)output;
    psoup_context *context = context_of(o);
    psoup__safetensors_writer_free(o->writer);
    for (size_t i = 0; i < o->n; i++)
        psoup__free(context, o->shards[i].name);
    psoup__free(context, o->shards);
    psoup__staging_free(&o->staging);
    psoup__free(context, o);
}

psoup_status psoup__output_directory(const psoup__plan *plan, const char *directory, psoup__output **out,
                                     psoup_error *error) {
    static const psoup__output_kind kind = {true, begin, tensor, write, finish, commit, directory_free};
    psoup_status status;
    *out = NULL;
    directory_output *o = psoup__alloc(plan->merger->context, 1, sizeof *o, error);
    if (o == NULL)
        return PSOUP_ERROR_MEMORY;
    o->output = (psoup__output){.kind = &kind, .plan = plan};
    PSOUP__TRY(divide(o, error));
    PSOUP__TRY(psoup__staging_open(plan->merger->context, directory, plan->merger->options.resume != 0,
                                   &o->staging, error));
    *out = &o->output;
    return PSOUP_OK;
fail:
    directory_free(&o->output);
    return status;
}
