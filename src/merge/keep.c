/* Adapters' factors that stay in memory between the runs of a merger, so that another user's weights read no
 * file. What was read and fingerprinted once is never read again; nothing is dropped to make room. */
#include "merge/engine.h"

#include <string.h>

enum {
    ONE_RUN = 64 << 20, /* bytes where the caller said nothing: a merge stays small, */
    MANY = 1 << 30      /* and one whose weights change is worth more */
};

static size_t bound_of(const psoup_merger *merger) {
    const int64_t said = merger->options.keep_bytes;
    return said >= 0 ? (size_t)said : merger->reweighs ? MANY : ONE_RUN;
}

static psoup__kept *slot_of(psoup_merger *merger, const psoup__plan_part *of, int part) {
    const psoup__merge_source *source = psoup__merger_source(merger, of->source);
    return source->kept != NULL ? &source->kept[2 * (size_t)(of->pair - source->adapter->pairs) + (size_t)part] : NULL;
}

const psoup__kept *psoup__keep_find(psoup_merger *merger, const psoup__plan_part *of, int part) {
    const psoup__kept *kept = slot_of(merger, of, part);
    return kept != NULL && kept->text[0] != '\0' ? kept : NULL;
}

float *psoup__keep_room(psoup_merger *merger, const psoup__plan_part *of, int part, size_t n) {
    psoup_error none;
    psoup__merge_source *source = psoup__merger_source(merger, of->source);
    const size_t bound = bound_of(merger);
    if (merger->kept_bytes > bound || n > (bound - merger->kept_bytes) / sizeof(float))
        return NULL;
    if (source->kept == NULL)
        source->kept = psoup__alloc(merger->context, source->adapter->n, 2 * sizeof *source->kept, &none);
    psoup__kept *kept = slot_of(merger, of, part);
    if (kept == NULL || kept->values != NULL) /* the same pair twice in one result: the first is to be read */
        return NULL;
    if ((kept->values = psoup__alloc_unset(merger->context, n, sizeof *kept->values, &none)) != NULL)
        merger->kept_bytes += n * sizeof *kept->values;
    return kept->values;
}

void psoup__keep_read(psoup_merger *merger, const psoup__plan_part *of, int part, const char *text) {
    psoup__kept *kept = slot_of(merger, of, part);
    memcpy(kept->text, text, sizeof kept->text);
}

void psoup__keep_free(psoup_context *context, psoup__merge_source *source) {
    for (size_t i = 0; source->kept != NULL && i < 2 * source->adapter->n; i++)
        psoup__free(context, source->kept[i].values);
    psoup__free(context, source->kept);
    source->kept = NULL;
}

void psoup__keep_forget(psoup_merger *merger) {
    for (size_t i = 0; i < merger->n; i++)
        psoup__keep_free(merger->context, &merger->sources[i]);
    merger->kept_bytes = 0;
}
