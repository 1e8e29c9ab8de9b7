/* Several ranks begin one run: all have to mean the same one, and to begin in the same state. */
#include <string.h>

#include "train/checkpoint.h"

/* What rank 0 says first. */
typedef struct beginning {
    uint64_t length; /* of the text of its run */
    int32_t kept, every;
} beginning;

static psoup_status compare(const psoup__checkpoint *c, const char *key, const psoup_json *first,
                            const psoup_json *own, psoup_error *error) {
    char *a = psoup_json_text(first, 0), *b = psoup_json_text(own, 0);
    psoup_status status = PSOUP_OK;
    if ((first && !a) || (own && !b))
        status = psoup__out_of_memory(error, 0);
    else if (!first || !own || strcmp(a, b) != 0)
        status = psoup__fail(error, PSOUP_ERROR_STATE,
                             "rank %d is of another run than rank 0: its %s is %.300s, rank 0's %.300s",
                             c->team->rank, key, own ? b : "absent", first ? a : "absent");
    psoup_text_free(a);
    psoup_text_free(b);
    return status;
}

static psoup_status compare_all(const psoup__checkpoint *c, const char *text, size_t length,
                                psoup_error *error) {
    psoup_json *first = NULL;
    const char *key = NULL;
    psoup_status status = psoup_json_parse(text, length, "rank 0's run", &first, error);
    for (const psoup_json *own; status == PSOUP_OK && (own = psoup_json_next(c->run, &key));)
        status = compare(c, key, psoup_json_get(first, key), own, error);
    key = NULL;
    for (const psoup_json *it; status == PSOUP_OK && (it = psoup_json_next(first, &key));)
        status = compare(c, key, it, psoup_json_get(c->run, key), error);
    psoup_json_free(first);
    return status;
}

psoup_status psoup__ranks_agree(psoup__checkpoint *c, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    char *run = psoup_json_text(c->run, 0), *text = NULL;
    if (!run)
        return psoup__out_of_memory(error, 0);
    beginning b = {.length = strlen(run), .kept = c->kept, .every = c->every};
    PSOUP__TRY(psoup__team_broadcast(c->team, &b, sizeof(b), error));
    text = psoup__alloc(c->context, (size_t)b.length + 1, 1, error);
    if (!text) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    if (c->team->rank == 0)
        memcpy(text, run, (size_t)b.length);
    PSOUP__TRY(psoup__team_broadcast(c->team, text, (size_t)b.length, error));
    c->kept = b.kept != 0;
    c->every = b.every;
    if (c->team->rank != 0)
        PSOUP__TRY(compare_all(c, text, (size_t)b.length, error));
    double all = 0.0; /* nothing is written before all have compared */
    PSOUP__TRY(psoup__team_sum(c->team, &all, 1, error));
fail:
    psoup_text_free(run);
    psoup__free(c->context, text);
    return status;
}

/* The best weights so far, of which there may be none. */
static psoup_status share_best(const psoup__checkpoint *c, const psoup__piece *piece, psoup_error *error) {
    psoup__best *best = piece->best;
    uint64_t n = best->data ? piece->n : 0;
    psoup_status status = psoup__team_broadcast(c->team, &n, sizeof(n), error);
    if (status != PSOUP_OK || n == 0)
        return status;
    if (!best->data)
        best->data = psoup__alloc(c->context, piece->n, sizeof(float), error);
    best->n = piece->n;
    return best->data ? psoup__team_broadcast(c->team, best->data, piece->n * sizeof(float), error)
                      : PSOUP_ERROR_MEMORY;
}

static psoup_status share_begun(const psoup__checkpoint *c, const psoup__piece *piece, psoup_error *error) {
    psoup__begun *begun = piece->begun;
    uint64_t n = begun->n;
    psoup_status status = psoup__team_broadcast(c->team, &n, sizeof(n), error);
    if (status == PSOUP_OK)
        status = psoup__reserve(c->context, &begun->data, &begun->capacity, (size_t)n, sizeof(*begun->data), error);
    begun->n = (size_t)n;
    return status == PSOUP_OK && n ? psoup__team_broadcast(c->team, begun->data, (size_t)n * sizeof(*begun->data), error)
                                   : status;
}

static psoup_status share_device(const psoup__checkpoint *c, const psoup__piece *piece, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    size_t bytes = piece->n * psoup_dtype_size(piece->dtype);
    for (size_t at = 0, size; at < bytes; at += size) {
        size = bytes - at < PSOUP__PIECE * sizeof(float) ? bytes - at : PSOUP__PIECE * sizeof(float);
        if (c->team->rank == 0)
            PSOUP__TRY(piece->be->ops->read(piece->be, c->buffer, (char *)piece->data + at, size, error));
        PSOUP__TRY(psoup__team_broadcast(c->team, c->buffer, size, error));
        if (c->team->rank != 0)
            piece->be->ops->write(piece->be, (char *)piece->data + at, c->buffer, size);
    }
fail:
    return status;
}

psoup_status psoup__ranks_share(psoup__checkpoint *c, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (size_t i = 0; status == PSOUP_OK && i < c->n; i++) {
        const psoup__piece *piece = &c->pieces[i];
        status = piece->best    ? share_best(c, piece, error)
                 : piece->begun ? share_begun(c, piece, error)
                 : piece->be    ? share_device(c, piece, error)
                                : psoup__team_broadcast(c->team, piece->data,
                                                        piece->n * psoup_dtype_size(piece->dtype), error);
    }
    return status;
}
