/* Checkpoints: safetensors files under Zstandard, whose metadata says which run they are of. */
#include "train/checkpoint.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#define NAME "checkpoint-%09lld.safetensors.zst"
#define HEADER_LIMIT 100000000u

_Static_assert(sizeof(size_t) == sizeof(int64_t), "places are kept as I64");

static psoup_status take(psoup__checkpoint *c, psoup_error *error) {
    psoup_status status = psoup__make_directories(c->directory, error);
    if (status != PSOUP_OK)
        return status;
    c->lock = open(c->directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (c->lock < 0)
        return psoup__fail(error, PSOUP_ERROR_IO, "%s: cannot open: %m", c->directory);
    if (flock(c->lock, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        return psoup__fail(error, PSOUP_ERROR_STATE, "%s: another run keeps its checkpoints there",
                           c->directory);
    return PSOUP_OK;
}

psoup_status psoup__checkpoint_open(psoup__checkpoint *c, psoup_context *context,
                                    psoup__reporter *reporter, const char *directory, int32_t every,
                                    int32_t keep, bool resume, psoup_error *error) {
    *c = (psoup__checkpoint){.context = context, .team = reporter->team, .every = every, .keep = keep,
                             .resume = resume, .before = SIZE_MAX, .lock = -1, .reporter = reporter,
                             .metrics = -1,
                             .samples = -1};
    c->directory = c->team->rank == 0 ? directory : NULL;
    c->kept = c->directory != NULL;
    psoup_status status = c->kept ? take(c, error) : PSOUP_OK;
    if (status != PSOUP_OK)
        return status;
    c->buffer = psoup__alloc(context, PSOUP__PIECE, sizeof(float), error);
    c->run = psoup_json_new_object();
    if (!c->buffer)
        return PSOUP_ERROR_MEMORY;
    return psoup__run_text(c, "version", error, "%s", psoup_version());
}

void psoup__checkpoint_close(psoup__checkpoint *c) {
    if (!c->context)
        return;
    if (c->lock >= 0)
        close(c->lock);
    psoup_json_free(c->run);
    psoup__free(c->context, c->pieces);
    psoup__free(c->context, c->buffer);
    *c = (psoup__checkpoint){.lock = -1};
}

psoup_status psoup__checkpoint_add(psoup__checkpoint *c, size_t owner, const psoup__piece *pieces,
                                   size_t n, psoup_error *error) {
    psoup_status status =
        psoup__reserve(c->context, &c->pieces, &c->capacity, c->n + n, sizeof(*pieces), error);
    for (size_t i = 0; status == PSOUP_OK && i < n; i++) {
        c->pieces[c->n] = pieces[i];
        c->pieces[c->n++].owner = owner;
    }
    return status;
}

psoup_status psoup__checkpoint_add_learner(psoup__checkpoint *c, size_t owner, psoup__optimizer *o,
                                           psoup__best *best, psoup_error *error) {
    return psoup__checkpoint_add_part(c, owner, 0, o, best, error);
}

psoup_status psoup__checkpoint_add_part(psoup__checkpoint *c, size_t owner, size_t part,
                                        psoup__optimizer *o, psoup__best *best, psoup_error *error) {
    psoup__piece pieces[] = {
        {.name = "weights", .dtype = PSOUP_F32, .data = o->p, .n = o->n, .be = o->be},
        {.name = "adam_m", .dtype = PSOUP_F32, .data = o->m, .n = o->n, .be = o->be},
        {.name = "adam_v", .dtype = PSOUP_F32, .data = o->v, .n = o->n, .be = o->be},
        {.name = "adam_steps", .dtype = PSOUP_I64, .data = &o->steps, .n = 1},
        {.name = "best", .dtype = PSOUP_F32, .n = o->n, .best = best},
        {.name = "best_value", .dtype = PSOUP_F64, .data = &best->value, .n = 1},
        {.name = "best_tie", .dtype = PSOUP_F64, .data = &best->tie, .n = 1},
        {.name = "best_step", .dtype = PSOUP_I64, .data = &best->step, .n = 1},
    };
    size_t n = sizeof(pieces) / sizeof(pieces[0]);
    for (size_t i = 0; i < n; i++)
        pieces[i].part = part;
    return psoup__checkpoint_add(c, owner, pieces, n, error);
}

/* ---- the files of the directory ----------------------------------------------------------------- */

static int later_first(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

/* Steps of the checkpoints, the newest first; the caller frees them. What a killed run left half-written
 * is removed: the directory is ours. */
static psoup_status list(const psoup__checkpoint *c, int64_t **steps, size_t *n, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t capacity = 0;
    *n = 0;
    *steps = NULL;
    DIR *directory = opendir(c->directory);
    if (!directory)
        return psoup__fail(error, errno == ENOMEM ? PSOUP_ERROR_MEMORY : PSOUP_ERROR_IO,
                           "%s: cannot read: %m", c->directory);
    for (const struct dirent *entry; status == PSOUP_OK && (entry = readdir(directory));) {
        long long step;
        int end = 0;
        size_t length = strlen(entry->d_name);
        if (sscanf(entry->d_name, NAME "%n", &step, &end) != 1 || end == 0 || step < 0)
            continue;
        if (entry->d_name[end] == '\0') {
            status = psoup__reserve(c->context, steps, &capacity, *n + 1, sizeof(**steps), error);
            if (status == PSOUP_OK)
                (*steps)[(*n)++] = step;
        } else if (strcmp(entry->d_name + length - 4, ".tmp") == 0) {
            unlinkat(dirfd(directory), entry->d_name, 0);
        }
    }
    closedir(directory);
    if (status == PSOUP_OK && *n)
        qsort(*steps, *n, sizeof(**steps), later_first);
    return status;
}

static char *path_of(const psoup__checkpoint *c, int64_t step, psoup_error *error) {
    return psoup__format(c->context, error, "%s/" NAME, c->directory, (long long)step);
}

static psoup_status drop_old(const psoup__checkpoint *c, psoup_error *error) {
    int64_t *steps;
    size_t n;
    psoup_status status = list(c, &steps, &n, error);
    for (size_t i = (size_t)c->keep; status == PSOUP_OK && i < n; i++) {
        char *path = path_of(c, steps[i], error);
        if (path)
            unlink(path);
        else
            status = PSOUP_ERROR_MEMORY;
        psoup__free(c->context, path);
    }
    psoup__free(c->context, steps);
    return status;
}

/* ---- writing ------------------------------------------------------------------------------------- */

enum { PIECE_NAME = 64 };
static void piece_name(const psoup__piece *piece, char out[PIECE_NAME]) {
    if (piece->part)
        snprintf(out, PIECE_NAME, "%zu.%zu.%s", piece->owner, piece->part, piece->name);
    else
        snprintf(out, PIECE_NAME, "%zu.%s", piece->owner, piece->name);
}

static size_t piece_count(const psoup__piece *piece) {
    return piece->begun ? piece->begun->n : piece->best && !piece->best->data ? 0 : piece->n;
}

static void *piece_data(const psoup__piece *piece) {
    return piece->begun ? (void *)piece->begun->data : piece->best ? (void *)piece->best->data : piece->data;
}

static psoup_status write_piece(const psoup__checkpoint *c, psoup__safetensors_writer *writer,
                                const psoup__piece *piece, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t bytes = piece_count(piece) * psoup_dtype_size(piece->dtype);
    if (!piece->be)
        return psoup__safetensors_write(writer, piece_data(piece), bytes, error);
    for (size_t at = 0, size; at < bytes; at += size) {
        size = bytes - at < PSOUP__PIECE * sizeof(float) ? bytes - at : PSOUP__PIECE * sizeof(float);
        PSOUP__TRY(piece->be->ops->read(piece->be, c->buffer, (const char *)piece->data + at, size,
                                        error));
        PSOUP__TRY(psoup__safetensors_write(writer, c->buffer, size, error));
    }
fail:
    return status;
}

static psoup_status write_pieces(const psoup__checkpoint *c, psoup__safetensors_writer *writer,
                                 psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; i < c->n; i++) {
        char name[PIECE_NAME];
        int64_t count = (int64_t)piece_count(&c->pieces[i]);
        piece_name(&c->pieces[i], name);
        PSOUP__TRY(psoup__safetensors_declare(writer, name, c->pieces[i].dtype, 1, &count, error));
    }
    PSOUP__TRY(psoup__safetensors_begin(writer, error));
    for (size_t i = 0; i < c->n; i++)
        PSOUP__TRY(write_piece(c, writer, &c->pieces[i], error));
    PSOUP__TRY(psoup__safetensors_commit(writer, error));
fail:
    return status;
}

static psoup_status save(psoup__checkpoint *c, int64_t step, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    psoup__safetensors_writer *writer = NULL;
    char *run = NULL, *path = path_of(c, step, error);
    if (!path)
        return status;
    run = psoup_json_text(c->run, 0);
    if (!run) {
        psoup__out_of_memory(error, 0);
        goto fail;
    }
    if (c->reporter->writer)
        PSOUP__TRY(psoup__jsonl_sync(c->reporter->writer, &c->metrics, error));
    if (c->reporter->samples)
        PSOUP__TRY(psoup__jsonl_sync(c->reporter->samples, &c->samples, error));
    PSOUP__TRY(psoup__safetensors_create(c->context, path, &writer, error));
    PSOUP__TRY(psoup__safetensors_metadata_set(writer, "run", run, error));
    PSOUP__TRY(write_pieces(c, writer, error));
    PSOUP__TRY(drop_old(c, error));
fail:
    psoup__safetensors_writer_free(writer);
    psoup_text_free(run);
    psoup__free(c->context, path);
    return status;
}

/* A rank is gone: rank 0 keeps what there is, and says so behind why. */
static psoup_status save_alone(psoup__checkpoint *c, psoup_status told, int64_t step, psoup_error *error) {
    psoup_error trouble = {0};
    if (!c->directory)
        return told;
    psoup_status status = save(c, step, &trouble);
    char why[700];
    snprintf(why, sizeof(why), "%.690s", error ? error->message : "");
    return psoup__fail(error, told, status == PSOUP_OK ? "%s; %s has the run as it was after step %lld%s"
                                                       : "%s; %s has no checkpoint of step %lld: %.200s",
                       why, c->directory, (long long)step, trouble.message);
}

psoup_status psoup__checkpoint_after(psoup__checkpoint *c, psoup_status told, int64_t step, bool last,
                                     psoup_error *error) {
    return psoup__checkpoint_at(c, told, step, step, last, error);
}

psoup_status psoup__checkpoint_at(psoup__checkpoint *c, psoup_status told, int64_t step, int64_t moved,
                                  bool last, psoup_error *error) {
    bool due = told == PSOUP_OK ? last || (c->every && moved % c->every == 0)
                                : told == PSOUP_ERROR_CANCELLED;
    if (c->kept && c->team->lost)
        return save_alone(c, told, step, error);
    if (!c->kept || !due)
        return told;
    psoup_status status = c->directory ? save(c, step, error) : PSOUP_OK;
    status = psoup__team_outcome(c->team, status, error);
    if (c->team->lost)
        return save_alone(c, status, step, error);
    return status == PSOUP_OK ? told : status;
}

psoup_status psoup__checkpoint_now(psoup__checkpoint *c, int64_t step, psoup_error *error) {
    return c->directory ? save(c, step, error) : PSOUP_OK;
}

/* ---- reading ------------------------------------------------------------------------------------- */

static psoup_status read_bytes(psoup__input *input, const char *path, void *out, size_t bytes,
                               psoup_error *error) {
    for (size_t at = 0, got; at < bytes; at += got) {
        psoup_status status = psoup__input_read(input, (char *)out + at, bytes - at, &got, error);
        if (status != PSOUP_OK)
            return status;
        if (got == 0)
            return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: is cut short", path);
    }
    return PSOUP_OK;
}

static psoup_status another_run(const char *path, const char *key, const psoup_json *was,
                                const psoup_json *is, psoup_error *error) {
    char *before = psoup_json_text(was, 0), *now = psoup_json_text(is, 0);
    psoup_status status = PSOUP_OK;
    if ((was && !before) || (is && !now))
        status = psoup__out_of_memory(error, 0);
    else if (!was || !is || strcmp(before, now) != 0)
        status = psoup__fail(error, PSOUP_ERROR_STATE, "%s: is of another run: its %s was %s, is %s",
                             path, key, was ? before : "absent", is ? now : "absent");
    psoup_text_free(before);
    psoup_text_free(now);
    return status;
}

/* The policies that a run has, by its list of what it is; of another trainer's 0. */
static size_t policies_of(const psoup_json *run) {
    return strtoul(psoup_json_string(psoup_json_get(run, "policies"), "0"), NULL, 10);
}

/* Whether what is called `key` is of a policy that joins: its name ends in "policy K". */
static bool of_joining(const psoup__checkpoint *c, const char *key) {
    const char *name = strrchr(key, 'p');
    size_t k;
    int end = 0;
    return name && sscanf(name, "policy %zu%n", &k, &end) == 1 && !name[end] && k >= c->before;
}

/* What differs when policies join: their number, and all that is told of them. */
static bool may_differ(const psoup__checkpoint *c, const char *key) {
    return c->before != SIZE_MAX && (strcmp(key, "policies") == 0 || of_joining(c, key));
}

static psoup_status same_run(psoup__checkpoint *c, const char *path, const psoup_json *header,
                             psoup_error *error) {
    const char *text = psoup_json_string(psoup_json_get(psoup_json_get(header, "__metadata__"), "run"),
                                         NULL);
    const char *key = NULL;
    psoup_json *run = NULL;
    if (!text)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: is no checkpoint of libpsoup", path);
    psoup_status status = psoup_json_parse(text, strlen(text), path, &run, error);
    if (c->join && policies_of(run) < policies_of(c->run))
        c->before = policies_of(run);
    for (const psoup_json *is; status == PSOUP_OK && (is = psoup_json_next(c->run, &key));)
        if (!may_differ(c, key))
            status = another_run(path, key, psoup_json_get(run, key), is, error);
    key = NULL;
    for (const psoup_json *was; status == PSOUP_OK && (was = psoup_json_next(run, &key));)
        if (!may_differ(c, key))
            status = another_run(path, key, was, psoup_json_get(c->run, key), error);
    psoup_json_free(run);
    return status;
}

static psoup_status read_json(const psoup__checkpoint *c, psoup__input *input, const char *path, psoup_json **header,
                              psoup_error *error) {
    psoup_status status = PSOUP_OK;
    unsigned char bytes[8];
    uint64_t length = 0;
    char *text = NULL;
    PSOUP__TRY(read_bytes(input, path, bytes, sizeof(bytes), error));
    for (int i = 7; i >= 0; i--)
        length = length << 8 | bytes[i];
    if (length > HEADER_LIMIT) {
        status = psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: is no checkpoint of libpsoup", path);
        goto fail;
    }
    text = psoup__alloc(c->context, (size_t)length + 1, 1, error);
    if (!text)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(read_bytes(input, path, text, (size_t)length, error));
    PSOUP__TRY(psoup_json_parse(text, (size_t)length, path, header, error));
fail:
    psoup__free(c->context, text);
    return status;
}

/* The header is ours when it is what write_pieces makes: every piece in its order, one behind the other. */
static psoup_status read_header(psoup__checkpoint *c, psoup__input *input, const char *path,
                                psoup_json **header, psoup_error *error) {
    psoup_status status = read_json(c, input, path, header, error);
    return status == PSOUP_OK ? same_run(c, path, *header, error) : status;
}

/* *count receives the elements that the file has of the piece, which begins at byte `at` of the data. */
static psoup_status find_piece(const psoup_json *header, const psoup__piece *piece, const char *path,
                               int64_t at, size_t *count, psoup_error *error) {
    char name[PIECE_NAME];
    piece_name(piece, name);
    const psoup_json *entry = psoup_json_get(header, name), *shape = psoup_json_get(entry, "shape");
    const psoup_json *offsets = psoup_json_get(entry, "data_offsets");
    const char *dtype = psoup_json_string(psoup_json_get(entry, "dtype"), "");
    int64_t n = psoup_json_integer(psoup_json_at(shape, 0), -1);
    bool fits = n == (int64_t)piece->n || (piece->best && n == 0) ||
                (piece->begun && n >= 0 && n < (int64_t)piece->n);
    *count = (size_t)n;
    if (!fits || psoup_json_size(shape) != 1 ||
        strcmp(dtype, psoup__safetensors_dtype_name(piece->dtype)) != 0 ||
        psoup_json_integer(psoup_json_at(offsets, 0), -1) != at)
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: tensor %s is not the %s[%zu] that the run has",
                           path, name, psoup__safetensors_dtype_name(piece->dtype), piece->n);
    return PSOUP_OK;
}

static psoup_status read_piece(const psoup__checkpoint *c, psoup__input *input, const char *path,
                               const psoup__piece *piece, size_t count, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t bytes = count * psoup_dtype_size(piece->dtype);
    char *to = piece->data;
    if (piece->best && count) {
        psoup__best *best = piece->best;
        best->data = psoup__alloc(c->context, count, sizeof(float), error);
        if (!best->data)
            return PSOUP_ERROR_MEMORY;
        best->n = count;
        to = (char *)best->data;
    }
    if (piece->begun) {
        psoup__begun *begun = piece->begun;
        PSOUP__TRY(psoup__reserve(c->context, &begun->data, &begun->capacity, count, sizeof(*begun->data), error));
        begun->n = count;
        to = (char *)begun->data;
    }
    if (!piece->be)
        return read_bytes(input, path, to, bytes, error);
    for (size_t at = 0, size; at < bytes; at += size) {
        size = bytes - at < PSOUP__PIECE * sizeof(float) ? bytes - at : PSOUP__PIECE * sizeof(float);
        PSOUP__TRY(read_bytes(input, path, c->buffer, size, error));
        piece->be->ops->write(piece->be, to + at, c->buffer, size);
    }
fail:
    return status;
}

/* Reads to the end: the checksum is there. */
static psoup_status check_whole(const psoup__checkpoint *c, const char *path, psoup_error *error) {
    psoup__input *input;
    size_t got = 1;
    psoup_status status = psoup__input_open(c->context, path, &input, error);
    while (status == PSOUP_OK && got)
        status = psoup__input_read(input, c->buffer, PSOUP__PIECE * sizeof(float), &got, error);
    psoup__input_free(input);
    return status;
}

/* Nothing is read into the state before all is known to be there. */
static psoup_status read_checkpoint(psoup__checkpoint *c, const char *path, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup__input *input = NULL;
    psoup_json *header = NULL;
    size_t *counts = psoup__alloc(c->context, c->n, sizeof(*counts), error);
    int64_t at = 0;
    if (!counts)
        return PSOUP_ERROR_MEMORY;
    PSOUP__TRY(check_whole(c, path, error));
    PSOUP__TRY(psoup__input_open(c->context, path, &input, error));
    PSOUP__TRY(read_header(c, input, path, &header, error));
    for (size_t i = 0; i < c->n; i++) {
        if (c->pieces[i].owner >= c->before)
            continue;
        PSOUP__TRY(find_piece(header, &c->pieces[i], path, at, &counts[i], error));
        at += (int64_t)(counts[i] * psoup_dtype_size(c->pieces[i].dtype));
    }
    for (size_t i = 0; i < c->n; i++)
        if (c->pieces[i].owner < c->before)
            PSOUP__TRY(read_piece(c, input, path, &c->pieces[i], counts[i], error));
fail:
    psoup_json_free(header);
    psoup__input_free(input);
    psoup__free(c->context, counts);
    return status;
}

/* Whether a checkpoint has something of a step in progress; one that cannot be read has nothing. */
static bool has_begun(const psoup__checkpoint *c, const char *path) {
    psoup__input *input = NULL;
    psoup_json *header = NULL;
    bool begun = false;
    if (psoup__input_open(c->context, path, &input, NULL) == PSOUP_OK &&
        read_json(c, input, path, &header, NULL) == PSOUP_OK)
        for (size_t i = 0; i < c->n; i++) {
            char name[PIECE_NAME];
            piece_name(&c->pieces[i], name);
            begun = begun || (c->pieces[i].begun &&
                              psoup_json_integer(psoup_json_at(psoup_json_get(psoup_json_get(header, name), "shape"), 0),
                                                 0) > 0);
        }
    psoup_json_free(header);
    psoup__input_free(input);
    return begun;
}

static psoup_status start_files(psoup__checkpoint *c, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    int64_t *steps = NULL;
    size_t n = 0;
    char *path = NULL;
    PSOUP__TRY(list(c, &steps, &n, error));
    if (n && !(path = path_of(c, steps[0], error))) {
        status = PSOUP_ERROR_MEMORY;
    } else if (n == 0 || (steps[0] == 0 && !c->resume && !has_begun(c, path))) { /* nothing is lost */
        PSOUP__TRY(save(c, 0, error));
    } else if (!c->resume) {
        status = psoup__fail(error, PSOUP_ERROR_STATE,
                             "%s: has checkpoints of an earlier run, up to step %lld: resume it, or "
                             "choose another directory", c->directory, (long long)steps[0]);
    } else {
        PSOUP__TRY(read_checkpoint(c, path, error));
        if (c->reporter->writer)
            PSOUP__TRY(psoup__jsonl_cut(c->reporter->writer, c->metrics, error));
        if (c->reporter->samples)
            PSOUP__TRY(psoup__jsonl_cut(c->reporter->samples, c->samples, error));
        PSOUP__TRY(drop_old(c, error)); /* where it was killed before it did */
        psoup__log(c->context, PSOUP_LOG_INFO, "%s: the run goes on", path);
    }
fail:
    psoup__free(c->context, path);
    psoup__free(c->context, steps);
    return status;
}

psoup_status psoup__checkpoint_start(psoup__checkpoint *c, psoup_error *error) {
    const psoup__piece files[] = {
        {.name = "metrics", .dtype = PSOUP_I64, .data = &c->metrics, .n = 1},
        {.name = "samples", .dtype = PSOUP_I64, .data = &c->samples, .n = 1},
    };
    psoup_status status = psoup__checkpoint_add(c, 0, files, 2, error);
    if (status == PSOUP_OK && c->team->comm)
        status = psoup__ranks_agree(c, error);
    if (status == PSOUP_OK && c->directory)
        status = start_files(c, error);
    if (c->kept && (status == PSOUP_OK || c->directory))
        status = psoup__team_outcome(c->team, status, error);
    if (status == PSOUP_OK && c->team->comm)
        status = psoup__ranks_share(c, error);
    return status;
}

psoup_status psoup__checkpoint_expect(const psoup__checkpoint *c, bool sense, const char *what,
                                      psoup_error *error) {
    return sense ? PSOUP_OK
                 : psoup__fail(error, PSOUP_ERROR_FORMAT,
                               "%s: the newest checkpoint's %s is none that the run can have",
                               c->directory, what);
}
