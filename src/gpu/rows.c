/* Rows on the move: embedding, gather and scatter, the cache, and the scalar head that reads single rows. */
#include "gpu/internal.h"

static psoup__grid tiled(int32_t rows, int32_t width) {
    const int32_t tiles = (width + PSOUP__ROWS_COLUMNS - 1) / PSOUP__ROWS_COLUMNS;
    return (psoup__grid){(unsigned)rows, (unsigned)tiles, 1, PSOUP__ROWS_THREADS, 0};
}

static void embed(psoup__backend *be, float *out, const psoup__weight *table, const int32_t *token,
                  int32_t rows) {
    const psoup__kernel kernel = table->dtype == PSOUP_BF16  ? PSOUP__KERNEL_embed_bf16
                                 : table->dtype == PSOUP_F16 ? PSOUP__KERNEL_embed_f16
                                                             : PSOUP__KERNEL_embed_f32;
    const int32_t each = 16 / (int32_t)psoup_dtype_size(table->dtype);
    const psoup__embed_args args = {out, table->data, token, table->in, 0};
    psoup__gpu_launch(psoup__gpu_of(be), kernel, psoup__gpu_rows(rows, (table->in + each - 1) / each), &args);
}

static void embed_backward(psoup__backend *be, float *dtable, const float *dout, const int32_t *token,
                           int32_t vocab, int32_t width, int32_t rows) {
    PSOUP__LAUNCH(psoup__gpu_of(be), embed_backward, tiled(rows, width), {dtable, dout, token, rows, width});
}

static void cache_append(psoup__backend *be, const psoup__keys *cache, const int32_t *place, const float *k,
                         const float *v, int32_t rows, int32_t width) {
    const psoup__kernel kernel = cache->dtype == PSOUP_BF16  ? PSOUP__KERNEL_cache_append_bf16
                                 : cache->dtype == PSOUP_F16 ? PSOUP__KERNEL_cache_append_f16
                                                             : PSOUP__KERNEL_cache_append_f32;
    const int32_t each = 16 / (int32_t)psoup_dtype_size(cache->dtype);
    const psoup__cache_append_args args = {{cache->k, cache->v}, {k, v}, place, cache->stride, width, 0};
    psoup__grid grid = psoup__gpu_rows(rows, (width + each - 1) / each);
    grid.y = 2;
    psoup__gpu_launch(psoup__gpu_of(be), kernel, grid, &args);
}

static void gather_rows(psoup__backend *be, float *out, const float *in, const int32_t *row, int32_t rows,
                        int32_t width) {
    PSOUP__LAUNCH(psoup__gpu_of(be), gather_rows, psoup__gpu_rows(rows, (width + 3) / 4),
                  {out, in, row, width, 0});
}

static void scatter_add_rows(psoup__backend *be, float *out, const float *in, const float *scale,
                             const int32_t *row, int32_t rows, int32_t width) {
    PSOUP__LAUNCH(psoup__gpu_of(be), scatter_add_rows, psoup__gpu_rows(rows, (width + 3) / 4),
                  {out, in, scale, row, width, 0});
}

static void combine_rows(psoup__backend *be, float *out, const float *in, const float *weight, const int32_t *first,
                         int32_t n, int32_t width) {
    psoup__grid grid = psoup__gpu_rows(n, (width + 3) / 4);
    grid.y = (unsigned)((width + 3) / 4 + (int32_t)grid.threads - 1) / grid.threads;
    PSOUP__LAUNCH(psoup__gpu_of(be), combine_rows, grid, {out, in, weight, first, width, 0});
}

static void head(psoup__backend *be, float *value, const float *hidden, const int32_t *row, const int32_t *at,
                 const float *weight, const float *w, const float *bias, int32_t n, int32_t width) {
    PSOUP__LAUNCH(psoup__gpu_of(be), head, ((psoup__grid){(unsigned)n, 1, 1, PSOUP__ROWS_THREADS, 0}),
                  {value, hidden, row, at, weight, w, bias, width, 0});
}

static void head_backward(psoup__backend *be, float *dhidden, float *dw, float *dbias, const float *dvalue,
                          const float *hidden, const int32_t *row, const int32_t *at, const float *weight,
                          const float *w, int32_t n, int32_t width) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    const psoup__row_sums sums = psoup__gpu_row_sums(gpu, dw, n, width);
    PSOUP__LAUNCH(gpu, head_backward, tiled(sums.blocks, width),
                  {dhidden, sums.sums, dbias, dvalue, hidden, row, at, weight, w, n, sums.each, width, 0});
    psoup__gpu_row_sums_end(gpu, &sums);
}

void psoup__gpu_fill_rows(psoup__ops *ops) {
    ops->embed = embed;
    ops->embed_backward = embed_backward;
    ops->cache_append = cache_append;
    ops->gather_rows = gather_rows;
    ops->scatter_add_rows = scatter_add_rows;
    ops->combine_rows = combine_rows;
    ops->head = head;
    ops->head_backward = head_backward;
}
