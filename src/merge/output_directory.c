/* Results into a directory: a model in one safetensors file, or in shards with their index, or a PEFT
 * adapter. */
#include "merge/engine.h"

#include <string.h>
#include <unistd.h>

#define ENTRY "model.safetensors"
#define INDEX "model.safetensors.index.json"
#define ADAPTER "adapter_model.safetensors"

#define PROGRESS ".progress.json"
#define METADATA "psoup_merge"

typedef struct shard {
    size_t first, end; /* results */
    char *name;
    bool done;
} shard;

typedef struct directory_output {
    psoup__output output;
    psoup__staging staging;
    shard *shards;
    size_t n, capacity;
    size_t open; /* the shard being written */
    psoup__safetensors_writer *writer;
    char *spaces;        /* in the place of the certificate */
    size_t closed, told; /* shards done, and those of them that the progress tells of */
    char fingerprint[PSOUP__HASH_TEXT]; /* of the merge and its sources' files */
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
            o->shards[o->n++] = (shard){.first = i, .end = i};
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
    if (o->spaces != NULL)
        PSOUP__TRY(psoup__safetensors_metadata_set(o->writer, METADATA, o->spaces, error));
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
    o->shards[o->open].done = status == PSOUP_OK;
    o->closed += status == PSOUP_OK;
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
    const bool across = psoup_json_bool(psoup_json_get(config, "fan_in_fan_out"), 0);
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
                                                    .rank = (int32_t)r->shape[0],
                                                    .transposed = across};
        else if (r->kind == PSOUP__SUM)
            adapter.head = &head; /* there is one */
    }
    adapter.pairs = pairs;
    psoup_status status = psoup__peft_write_config(context_of(o), o->staging.work, &adapter, error);
    psoup__free(context_of(o), pairs);
    return status;
}

/* ---- resuming -------------------------------------------------------------------------------------------- */

static void stamp_files(psoup__hash *hash, const psoup__merge_source *source) {
    for (size_t i = 0; i < source->n_files; i++) {
        const psoup__file *f = source->files[i].file;
        const int64_t numbers[5] = {(int64_t)f->length, f->seconds, f->nanoseconds, (int64_t)f->device,
                                    (int64_t)f->inode};
        psoup__hash_update(hash, f->path, strlen(f->path) + 1);
        psoup__hash_update(hash, numbers, sizeof numbers);
    }
    for (size_t i = 0; source->adapter != NULL && i < source->adapter->n; i++) { /* of adapter_config.json */
        const psoup__peft_pair *pair = &source->adapter->pairs[i];
        const int32_t kind[2] = {pair->rank, pair->transposed};
        psoup__hash_update(hash, &pair->scale, sizeof pair->scale);
        psoup__hash_update(hash, kind, sizeof kind);
    }
}

/* Nothing says whether tensors that the caller holds are what they were. */
static bool are_held(const psoup_merger *merger) {
    bool held = merger->base.n_held > 0;
    for (size_t i = 0; i < merger->n; i++)
        held |= merger->sources[i].n_held > 0;
    return held;
}

/* Of the certificate before anything is known, and of the files. */
static psoup_status take_fingerprint(directory_output *o, const char *certificate, psoup_error *error) {
    const psoup_merger *merger = o->output.plan->merger;
    psoup__hash *hash = psoup__hash_create(context_of(o), error);
    if (hash == NULL)
        return PSOUP_ERROR_MEMORY;
    psoup__hash_update(hash, certificate, strlen(certificate));
    stamp_files(hash, &merger->base);
    for (size_t i = 0; i < merger->n; i++)
        stamp_files(hash, &merger->sources[i]);
    psoup__hash_text(hash, o->fingerprint);
    psoup__free(context_of(o), hash);
    return PSOUP_OK;
}

static psoup_status write_progress(const directory_output *o, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    psoup_json *root = psoup_json_new_object(), *done = psoup_json_new_array();
    char *path = psoup__path_join(context_of(o), o->staging.work, PROGRESS, error);
    int failed = psoup_json_set(root, "fingerprint", psoup_json_new_string(o->fingerprint));
    for (size_t i = 0; i < o->n; i++)
        if (o->shards[i].done)
            failed |= psoup_json_append(done, psoup_json_new_string(o->shards[i].name));
    failed |= psoup_json_set(root, "done", done);
    failed |= psoup_json_set(root, "certificate", psoup__certificate_json(o->output.made, error));
    if (failed)
        status = psoup__out_of_memory(error, 0);
    else if (path != NULL)
        status = psoup_json_write(context_of(o), path, root, error);
    psoup__free(context_of(o), path);
    psoup_json_free(root);
    return status;
}

static psoup_status settle(psoup__output *output, psoup_error *error) {
    directory_output *o = (directory_output *)output;
    if (o->closed == o->told || o->n == 1)
        return PSOUP_OK;
    o->told = o->closed;
    return write_progress(o, error);
}

/* Shards that an earlier run of the same merge finished need not be made again. */
static psoup_status take_progress(directory_output *o, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    psoup_context *context = context_of(o);
    psoup_json *root = NULL;
    size_t kept = 0;
    char *path = psoup__path_join(context, o->staging.work, PROGRESS, error);
    const char **names = psoup__alloc(context, o->n + 1, sizeof *names, error);
    if (path == NULL || names == NULL ||
        (o->output.there = psoup__alloc(context, o->output.plan->n, 1, error)) == NULL)
        goto fail;
    if (!psoup__file_exists(path) || psoup_json_read(context, path, &root, NULL) != PSOUP_OK ||
        strcmp(psoup_json_string(psoup_json_get(root, "fingerprint"), ""), o->fingerprint) != 0) {
        psoup__staging_keep(&o->staging, NULL, 0); /* nothing was finished, or of another merge */
        status = PSOUP_OK;
        goto fail;
    }
    names[kept++] = PROGRESS;
    PSOUP__TRY(psoup__certificate_take(o->output.made, psoup_json_get(root, "certificate"), error));
    const psoup_json *done = psoup_json_get(root, "done");
    for (size_t i = 0; i < psoup_json_size(done); i++)
        for (size_t j = 0; j < o->n; j++) {
            shard *s = &o->shards[j];
            if (s->done || strcmp(psoup_json_string(psoup_json_at(done, i), ""), s->name) != 0)
                continue;
            psoup__free(context, path);
            path = psoup__path_join(context, o->staging.work, s->name, error);
            if (path == NULL) {
                status = PSOUP_ERROR_MEMORY;
                goto fail;
            }
            if (!psoup__file_exists(path))
                continue;
            s->done = true;
            o->closed++;
            names[kept++] = s->name;
            memset(o->output.there + s->first, 1, s->end - s->first);
        }
    o->told = o->closed;
    psoup__staging_keep(&o->staging, names, kept); /* not what a killed run was writing */
    if (o->closed > 0)
        psoup__log(context, PSOUP_LOG_INFO, "%s: resuming with %zu of %zu shards", o->staging.target,
                   o->closed, o->n);
    status = PSOUP_OK;
fail:
    psoup__free(context, names);
    psoup__free(context, path);
    psoup_json_free(root);
    return status;
}

/* ---- the table --------------------------------------------------------------------------------------------- */

static psoup_status begin(psoup__output *output, psoup_error *error) {
    psoup_status status;
    directory_output *o = (directory_output *)output;
    psoup_json *json = psoup__certificate_json(output->made, error);
    char *text = json != NULL ? psoup_json_text(json, 2) : NULL;
    psoup_json_free(json);
    if (text == NULL)
        return psoup__out_of_memory(error, 0);
    PSOUP__TRY(take_fingerprint(o, text, error));
    if ((o->spaces = psoup__alloc(context_of(o), output->space + 1, 1, error)) == NULL) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    memset(o->spaces, ' ', output->space);
    if (output->plan->merger->options.resume && are_held(output->plan->merger))
        psoup__staging_keep(&o->staging, NULL, 0);
    else if (output->plan->merger->options.resume)
        PSOUP__TRY(take_progress(o, error));
    PSOUP__TRY(output->plan->adapter ? write_adapter_config(o, error)
                                     : psoup__write_sidecars(output->plan, o->staging.work, error));
fail:
    psoup_text_free(text);
    return status;
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

static psoup_status put(psoup__output *output, size_t index, const void *data, size_t bytes,
                          psoup_error *error) {
    (void)index;
    return psoup__safetensors_write(((directory_output *)output)->writer, data, bytes, error);
}

static psoup_status finish(psoup__output *output, size_t index, psoup_error *error) {
    directory_output *o = (directory_output *)output;
    return index + 1 == o->shards[o->open].end ? close_shard(o, error) : PSOUP_OK;
}

/* The certificate into every file's metadata, and beside them. */
static psoup_status write_certificate(directory_output *o, const char *certificate, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__writer *writer = NULL;
    char *path = NULL;
    for (size_t i = 0; i < o->n; i++) {
        psoup__free(context_of(o), path);
        if ((path = psoup__path_join(context_of(o), o->staging.work, o->shards[i].name, error)) == NULL)
            return PSOUP_ERROR_MEMORY;
        PSOUP__TRY(psoup__safetensors_patch(context_of(o), path, METADATA, certificate, error));
    }
    psoup__free(context_of(o), path);
    if ((path = psoup__path_join(context_of(o), o->staging.work, PROGRESS, error)) == NULL)
        return PSOUP_ERROR_MEMORY;
    unlink(path);
    psoup__free(context_of(o), path);
    if ((path = psoup__certificate_path(context_of(o), o->staging.work, error)) == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(psoup__writer_create(context_of(o), path, &writer, error));
    PSOUP__TRY(psoup__writer_write(writer, certificate, strlen(certificate), error));
    PSOUP__TRY(psoup__writer_commit(writer, error));
fail:
    psoup__writer_free(writer);
    psoup__free(context_of(o), path);
    return status;
}

static psoup_status commit(psoup__output *output, const char *certificate, psoup_error *error) {
    psoup_status status;
    directory_output *o = (directory_output *)output;
    if (o->n > 1)
        PSOUP__TRY(write_index(o, error));
    PSOUP__TRY(write_certificate(o, certificate, error));
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
    psoup__free(context, o->spaces);
    psoup__free(context, o->output.there);
    psoup__staging_free(&o->staging);
    psoup__free(context, o);
}

psoup_status psoup__output_directory(const psoup__plan *plan, const char *directory, psoup__output **out,
                                     psoup_error *error) {
    static const psoup__output_kind kind = {true, begin, tensor, put, finish, NULL, commit, directory_free,
                                             settle};
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
