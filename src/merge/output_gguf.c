/* Results into one GGUF file: a model's as they come, or an adapter's, which are kept in a file until the
 * last is there. The file grows beside its place and is renamed. */
#include "merge/engine.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define METADATA "psoup.merge"

typedef struct gguf_output {
    psoup__output output;
    char *path;        /* where the file shall be */
    char *partial;     /* where it grows */
    char *lock_path;   /* a file that is held as long as a merge works there */
    int lock;
    char *data;        /* an adapter's factors, one after the other; NULL: of a model */
    char *spaces;      /* in the place of the certificate */
    psoup__gguf_writer *writer;
    psoup__writer *spool;
    const char *architecture; /* static */
    int32_t heads, kv_heads;
    bool committed;
} gguf_output;

static psoup_context *context_of(const gguf_output *o) {
    return o->output.plan->merger->context;
}

/* ---- a model -------------------------------------------------------------------------------------------- */

/* What most of the results' bytes are. */
static psoup_dtype main_dtype(const psoup__plan *plan) {
    uint64_t bytes[PSOUP_Q8_0 + 1] = {0};
    psoup_dtype best = PSOUP_F32;
    for (size_t i = 0; i < plan->n; i++)
        bytes[plan->results[i].dtype] += plan->results[i].bytes;
    for (int i = 0; i <= PSOUP_Q8_0; i++)
        if (bytes[i] > bytes[best])
            best = (psoup_dtype)i;
    return best;
}

static psoup_status begin_model(gguf_output *o, psoup_error *error) {
    psoup_status status;
    const psoup__plan *plan = o->output.plan;
    const psoup__merge_source *like = plan->like;
    char key[96];
    if (like->model == NULL)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: a GGUF file needs a config; expected a model in files as base or first source",
                           like->path);
    const char *from = psoup__weights_path(like->model);
    PSOUP__TRY(psoup__gguf_create(context_of(o), o->partial, &o->writer, error));
    PSOUP__TRY(psoup__gguf_metadata_from(o->writer, from, main_dtype(plan), error));
    if (plan->layers >= 0) {
        PSOUP__TRY(psoup__model_heads(context_of(o), from, &o->architecture, &o->heads, &o->kv_heads, error));
        snprintf(key, sizeof key, "%s.block_count", o->architecture);
        PSOUP__TRY(psoup__gguf_set_uint32(o->writer, key, (uint32_t)plan->layers, error));
    }
    PSOUP__TRY(psoup__gguf_set_string(o->writer, METADATA, o->spaces, error));
    for (size_t i = 0; i < plan->n; i++) {
        const psoup__result *r = &plan->results[i];
        PSOUP__TRY(psoup__gguf_declare(o->writer, r->name, r->dtype, r->rank, r->shape, error));
    }
    PSOUP__TRY(psoup__gguf_begin(o->writer, error));
fail:
    return status;
}

/* ---- an adapter ------------------------------------------------------------------------------------------- */

/* Whose heads: the model that was named, or that the adapter names, or what a GGUF source says itself. */
static psoup_status find_architecture(gguf_output *o, psoup_error *error) {
    psoup_merger *merger = o->output.plan->merger;
    const char *model = merger->reference;
    const psoup__peft *first = merger->sources[0].adapter;
    if (model == NULL)
        model = psoup_json_string(psoup_json_get(first->config, "base_model_name_or_path"), "");
    if (merger->reference == NULL && *model == '\0')
        model = psoup__weights_file(first->weights, 0)->path;
    if (merger->reference == NULL && !psoup__file_exists(model))
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "%s: a GGUF adapter needs to know its model's heads, and \"%.200s\" is not here; "
                           "expected a reference model",
                           o->path, model);
    return psoup__model_heads(context_of(o), model, &o->architecture, &o->heads, &o->kv_heads, error);
}

static psoup_status begin_adapter(gguf_output *o, psoup_error *error) {
    psoup_status status;
    for (size_t i = 0; i < o->output.plan->n; i++)
        if (o->output.plan->results[i].module == NULL)
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "%s: a scalar head (score) has no place in a GGUF adapter", o->path);
    PSOUP__TRY(find_architecture(o, error));
    PSOUP__TRY(psoup__writer_create(context_of(o), o->data, &o->spool, error));
fail:
    return status;
}

/* The factors as they were kept become the file, whose bytes are the results: where a pair's scale cannot be
 * said, it is multiplied into b. */
static psoup_status write_adapter(gguf_output *o, psoup_error *error) {
    psoup_status status;
    const psoup__plan *plan = o->output.plan;
    psoup__file file = {0};
    psoup__peft_pair *pairs = psoup__alloc(context_of(o), plan->n, sizeof *pairs, error);
    const char *metadata[3] = {METADATA, o->spaces, NULL};
    psoup__peft_output adapter = {.rank = plan->rank, .alpha = (float)plan->rank, .metadata = metadata};
    size_t at = 0;
    if (pairs == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(psoup__writer_commit(o->spool, error));
    PSOUP__TRY(psoup__file_open(context_of(o), o->data, &file, error));
    const psoup__pull *pull = psoup__file_pull(&file);
    for (size_t i = 0; i < plan->n; i++) {
        const psoup__result *r = &plan->results[i];
        psoup__tensor tensor = {.dtype = r->dtype, .rank = r->rank, .bytes = r->bytes, .pull = pull, .at = at};
        memcpy(tensor.shape, r->shape, sizeof tensor.shape);
        at += r->bytes;
        psoup__peft_pair *pair = &pairs[i / 2];
        *(r->kind == PSOUP__PAIR_A ? &pair->a : &pair->b) = tensor;
        pair->module = r->module;
        pair->scale = 1;
        if (r->kind == PSOUP__PAIR_A)
            pair->rank = (int32_t)r->shape[0];
    }
    adapter.pairs = pairs;
    adapter.n = plan->n / 2;
    PSOUP__TRY(psoup__gguf_adapter_write(context_of(o), o->partial, &adapter, o->architecture, o->heads,
                                         o->kv_heads, error));
    PSOUP__TRY(psoup__file_check(&file, "", error));
fail:
    psoup__file_close(context_of(o), &file);
    psoup__free(context_of(o), pairs);
    return status;
}

/* ---- the certificate into the file ------------------------------------------------------------------------ */

static psoup_status patch(const gguf_output *o, const char *certificate, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__gguf *file = NULL;
    const char *text;
    size_t length = 0, bytes = strlen(certificate);
    int fd = -1;
    PSOUP__TRY(psoup__gguf_open(context_of(o), o->partial, &file, error));
    if (!psoup__gguf_string(file, METADATA, &text, &length) || length < bytes) {
        status = psoup__fail(error, PSOUP_ERROR_STATE, "%s: no room for the certificate", o->partial);
        goto fail;
    }
    off_t at = (off_t)psoup__gguf_offset(file, text);
    if ((fd = open(o->partial, O_WRONLY | O_CLOEXEC)) < 0) {
        status = psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot open: %m", o->partial);
        goto fail;
    }
    while (bytes > 0 && status == PSOUP_OK) {
        ssize_t n = pwrite(fd, certificate, bytes, at);
        if (n < 0 && errno != EINTR)
            status = psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot write: %m", o->partial);
        if (n > 0) {
            certificate += n;
            at += n;
            bytes -= (size_t)n;
        }
    }
    if (status == PSOUP_OK && fsync(fd) != 0 && errno != EINVAL)
        status = psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot sync: %m", o->partial);
fail:
    if (fd >= 0)
        close(fd);
    psoup__gguf_free(file);
    return status;
}

/* ---- the table ---------------------------------------------------------------------------------------------- */

static psoup_status begin(psoup__output *output, psoup_error *error) {
    gguf_output *o = (gguf_output *)output;
    if ((o->spaces = psoup__alloc(context_of(o), output->space + 1, 1, error)) == NULL)
        return PSOUP_ERROR_MEMORY;
    memset(o->spaces, ' ', output->space);
    return o->data != NULL ? begin_adapter(o, error) : begin_model(o, error);
}

static psoup_status tensor(psoup__output *output, size_t index, psoup_error *error) {
    (void)output, (void)index, (void)error;
    return PSOUP_OK;
}

static psoup_status put(psoup__output *output, size_t index, const void *data, size_t bytes,
                        psoup_error *error) {
    gguf_output *o = (gguf_output *)output;
    (void)index;
    return o->data != NULL ? psoup__writer_write(o->spool, data, bytes, error)
                           : psoup__gguf_write(o->writer, data, bytes, error);
}

static psoup_status finish(psoup__output *output, size_t index, psoup_error *error) {
    (void)output, (void)index, (void)error;
    return PSOUP_OK;
}

/* What is known of an adapter's results when its file is written. */
static psoup_status close_file(psoup__output *output, psoup_error *error) {
    psoup_status status;
    gguf_output *o = (gguf_output *)output;
    if (o->data == NULL)
        return psoup__gguf_commit(o->writer, error);
    psoup__peft *peft = NULL;
    PSOUP__TRY(write_adapter(o, error));
    PSOUP__TRY(psoup__peft_open_heads(context_of(o), o->partial, o->heads, o->kv_heads, &peft, error));
    for (size_t i = 0; i < output->plan->n; i++) {
        const psoup__result *r = &output->plan->results[i];
        const psoup__peft_pair *pair = psoup__peft_find(peft, r->module, strlen(r->module));
        if (pair == NULL) {
            status = psoup__fail(error, PSOUP_ERROR_STATE, "%s: %.200s is lost", o->partial, r->module);
            goto fail;
        }
        PSOUP__TRY(psoup__hash_tensor(context_of(o), r->kind == PSOUP__PAIR_A ? &pair->a : &pair->b,
                                      output->made->made[i].text, error));
    }
    PSOUP__TRY(psoup__weights_check(peft->weights, error));
fail:
    psoup__peft_free(peft);
    return status;
}

static psoup_status commit(psoup__output *output, const char *certificate, psoup_error *error) {
    psoup_status status;
    gguf_output *o = (gguf_output *)output;
    psoup__writer *writer = NULL;
    char *beside = psoup__certificate_path(context_of(o), o->path, error);
    if (beside == NULL)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(patch(o, certificate, error));
    if (unlink(o->path) != 0 && errno != ENOENT) {
        status = psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot replace: %m", o->path);
        goto fail;
    }
    PSOUP__TRY(psoup__writer_create(context_of(o), beside, &writer, error));
    PSOUP__TRY(psoup__writer_write(writer, certificate, strlen(certificate), error));
    PSOUP__TRY(psoup__writer_commit(writer, error));
    if (rename(o->partial, o->path) != 0) {
        status = psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot put in its place: %m", o->path);
        goto fail;
    }
    o->committed = true;
fail:
    psoup__writer_free(writer);
    psoup__free(context_of(o), beside);
    return status;
}

static void gguf_free(psoup__output *output) {
    gguf_output *o = (gguf_output *)output;
    psoup_context *context = context_of(o);
    psoup__gguf_writer_free(o->writer);
    psoup__writer_free(o->spool);
    if (!o->committed && o->partial != NULL)
        unlink(o->partial);
    if (o->data != NULL && o->lock >= 0)
        unlink(o->data);
    if (o->lock >= 0) {
        unlink(o->lock_path);
        close(o->lock);
    }
    psoup__free(context, o->lock_path);
    psoup__free(context, o->path);
    psoup__free(context, o->partial);
    psoup__free(context, o->data);
    psoup__free(context, o->spaces);
    psoup__free(context, o);
}

/* What killed runs left: NAME.psoup-partial.…tmp. */
static psoup_status drop_left_over(const gguf_output *o, psoup_error *error) {
    const char *slash = strrchr(o->partial, '/'), *name = slash != NULL ? slash + 1 : o->partial;
    const size_t length = strlen(name) - strlen("gguf"); /* with the dot */
    char *place = psoup__directory_of(context_of(o), o->partial, error);
    if (place == NULL)
        return PSOUP_ERROR_MEMORY;
    DIR *directory = opendir(place);
    psoup__free(context_of(o), place);
    if (directory == NULL)
        return PSOUP_OK; /* what cannot be read is found out when the file is made */
    for (const struct dirent *entry; (entry = readdir(directory)) != NULL;) {
        const char *dot = strrchr(entry->d_name, '.');
        if (strncmp(entry->d_name, name, length) == 0 && strcmp(dot, ".tmp") == 0)
            unlinkat(dirfd(directory), entry->d_name, 0);
    }
    closedir(directory);
    return PSOUP_OK;
}

static psoup_status take_lock(gguf_output *o, psoup_error *error) {
    o->lock = open(o->lock_path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (o->lock < 0)
        return psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot create: %m", o->lock_path);
    struct stat info = {.st_nlink = 1};
    bool taken = flock(o->lock, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    if (taken || (fstat(o->lock, &info) == 0 && info.st_nlink == 0)) { /* or just given up, and removed */
        close(o->lock);
        o->lock = -1; /* it is somebody else's, and so is what is there */
        return psoup__fail(error, PSOUP_ERROR_STATE, "%s: another merge is writing there", o->path);
    }
    return drop_left_over(o, error);
}

psoup_status psoup__output_gguf(const psoup__plan *plan, const char *path, psoup__output **out,
                                psoup_error *error) {
    static const psoup__output_kind kind = {true, begin, tensor, put, finish, close_file, commit, gguf_free,
                                            NULL};
    psoup_context *context = plan->merger->context;
    size_t length = strlen(path);
    *out = NULL;
    if (length < 6 || strcmp(path + length - 5, ".gguf") != 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "%s: expected a name that ends in .gguf", path);
    gguf_output *o = psoup__alloc(context, 1, sizeof *o, error);
    if (o == NULL)
        return PSOUP_ERROR_MEMORY;
    o->output = (psoup__output){.kind = &kind, .plan = plan};
    o->lock = -1;
    o->committed = true; /* nothing of ours is there yet */
    o->lock_path = psoup__format(context, error, "%.*s.psoup-partial.lock", (int)length - 5, path);
    o->path = psoup__strdup(context, path, error);
    o->partial = psoup__format(context, error, "%.*s.psoup-partial.gguf", (int)length - 5, path);
    if (plan->adapter)
        o->data = psoup__format(context, error, "%.*s.psoup-partial.data", (int)length - 5, path);
    psoup_status status = PSOUP_ERROR_MEMORY;
    if (o->lock_path != NULL && o->path != NULL && o->partial != NULL && (!plan->adapter || o->data != NULL))
        status = take_lock(o, error);
    if (status != PSOUP_OK) {
        gguf_free(&o->output);
        return status;
    }
    o->committed = false;
    *out = &o->output;
    return PSOUP_OK;
}
