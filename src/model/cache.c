/* A KV cache cut into pages. A sequence takes what its prompt and its longest answer need when it is admitted, so
 * that no running one is ever left without. */
#include "model/tape.h"

void psoup__cache_free(psoup__cache *cache) {
    if (!cache)
        return;
    psoup__backend *be = cache->model->be;
    be->ops->release(be, cache->k);
    be->ops->release(be, cache->v);
    psoup__free(cache->model->context, cache->unused);
    psoup__free(cache->model->context, cache);
}

/* Fills in the sizes of a cache; false where they overflow. *cells receives the numbers of k, and of v. */
static bool size_up(psoup__cache *cache, int32_t sequences, int32_t max_tokens, int64_t tokens, size_t *cells) {
    psoup_model *model = cache->model;
    psoup__backend *be = model->be;
    cache->dtype = be->ops->cache(be, model->embed.dtype);
    cache->page = be->ops->page ? be->ops->page : max_tokens;
    int64_t each = ((int64_t)max_tokens + cache->page - 1) / cache->page, pages = sequences * each;
    if (tokens > 0 && tokens / cache->page < pages)
        pages = tokens / cache->page > each ? tokens / cache->page : each; /* one sequence at least */
    cache->most = (int32_t)each;
    bool spare = be->ops->replay != NULL;
    if (!psoup__multiply((size_t)pages + spare, (size_t)cache->page, cells) || *cells > INT32_MAX ||
        !psoup__multiply(*cells, (size_t)model->kv_width, cells) ||
        !psoup__multiply(*cells, (size_t)model->config.num_hidden_layers, cells))
        return false;
    cache->spare = spare ? (int32_t)pages : -1;
    cache->n_unused = (int32_t)pages;
    cache->pages = (int32_t)pages + spare;
    return true;
}

size_t psoup__cache_bytes(psoup_model *model, int32_t sequences, int32_t max_tokens, int64_t tokens) {
    psoup__cache cache = {.model = model};
    size_t cells = 0, bytes = 0;
    if (!size_up(&cache, sequences, max_tokens, tokens, &cells) ||
        !psoup__multiply(cells, 2 * psoup_dtype_size(cache.dtype), &bytes))
        return SIZE_MAX;
    return bytes;
}

psoup_status psoup__cache_create(psoup_model *model, int32_t sequences, int32_t max_tokens, int64_t tokens,
                                 psoup__cache **out, psoup_error *error) {
    psoup__backend *be = model->be;
    *out = NULL;
    psoup__cache *cache = psoup__alloc(model->context, 1, sizeof *cache, error);
    if (!cache)
        return PSOUP_ERROR_MEMORY;
    cache->model = model;
    size_t cells = 0;
    psoup_status status = PSOUP_ERROR_MEMORY;
    if (!size_up(cache, sequences, max_tokens, tokens, &cells)) {
        status = psoup__out_of_memory(error, SIZE_MAX);
        goto fail;
    }
    size_t item = psoup_dtype_size(cache->dtype);
    if (!(cache->k = be->ops->alloc(be, cells, item, error)) || !(cache->v = be->ops->alloc(be, cells, item, error)) ||
        !(cache->unused = psoup__alloc(model->context, (size_t)cache->n_unused, sizeof *cache->unused, error)))
        goto fail;
    for (int32_t i = 0; i < cache->n_unused; i++) /* taken from the end: page 0 first */
        cache->unused[i] = cache->n_unused - 1 - i;
    *out = cache;
    return PSOUP_OK;
fail:
    psoup__cache_free(cache);
    return status;
}

int32_t psoup__cache_pages(const psoup__cache *cache, int32_t tokens) {
    return (tokens + cache->page - 1) / cache->page;
}

bool psoup__cache_take(psoup__cache *cache, int32_t *pages, int32_t n) {
    if (n > cache->n_unused)
        return false;
    for (int32_t i = 0; i < n; i++)
        pages[i] = cache->unused[--cache->n_unused];
    return true;
}

void psoup__cache_give(psoup__cache *cache, const int32_t *pages, int32_t n) {
    for (int32_t i = n; i-- > 0;)
        cache->unused[cache->n_unused++] = pages[i];
}
