/* Causal attention over spans. */
#include "gpu/internal.h"

_Static_assert(sizeof(psoup__attention_span) == sizeof(psoup__span), "a kernel's span is the ops'");

static const psoup__attention_span *spans_of(const psoup__spans *spans) {
    return (const psoup__attention_span *)spans->span;
}

typedef struct choice {
    psoup_dtype dtype;
    int32_t head_dim;
    psoup__kernel forward, dkdv, dq;
} choice;

/* What is multiplied on tensor cores; gradients in bf16. */
#define OF(dtype, type, dim)                                                                              \
    {dtype, dim, PSOUP__KERNEL_attention_##type##_##dim, PSOUP__KERNEL_attention_dkdv_##dim,              \
     PSOUP__KERNEL_attention_dq_##dim}
static const choice choices[] = {
    OF(PSOUP_BF16, bf16, 64), OF(PSOUP_BF16, bf16, 128), OF(PSOUP_BF16, bf16, 256),
    OF(PSOUP_F16, f16, 64),   OF(PSOUP_F16, f16, 128),   OF(PSOUP_F16, f16, 256),
};
#undef OF

static const choice *choose(psoup_dtype dtype, int32_t head_dim) {
    for (size_t i = 0; i < sizeof choices / sizeof *choices; i++)
        if (choices[i].dtype == dtype && choices[i].head_dim == head_dim)
            return &choices[i];
    return NULL;
}

static bool aligned(const void *a, const void *b, const void *c, int64_t stride, size_t item) {
    return ((uintptr_t)a | (uintptr_t)b | (uintptr_t)c | (size_t)stride * item) % 16 == 0;
}

/* A block for each tile of every span and key head; `most` rows or keys in the longest span. */
static psoup__grid grid_of(int32_t *tiles, int64_t most, int32_t tile, const psoup__spans *spans,
                            const psoup__attention_shape *shape, unsigned threads, size_t shared) {
    *tiles = (int32_t)((most + tile - 1) / tile);
    return (psoup__grid){(unsigned)*tiles * (unsigned)shape->kv_heads * (unsigned)spans->n, 1, 1, threads,
                         (unsigned)shared};
}

static int64_t most_rows(const psoup__spans *spans, const psoup__attention_shape *shape) {
    return (int64_t)spans->most_queries * (shape->heads / shape->kv_heads);
}

static size_t plain_tile_bytes(int32_t head_dim) {
    return PSOUP__PLAIN_ATTENTION_TILE * PSOUP__PLAIN_ATTENTION_PITCH((size_t)head_dim) * sizeof(float);
}

/* Keys and values rounded to `dtype`: rows of `pitch` numbers in `out`. */
static void round_keys(psoup__gpu *gpu, psoup_dtype dtype, void *out, int64_t pitch, const psoup__keys *keys,
                       const psoup__spans *spans, const psoup__attention_shape *shape) {
    enum { EACH = PSOUP__ROUND_THREADS / 32 };
    const int32_t blocks = (spans->most_keys + EACH - 1) / EACH;
    psoup__gpu_launch(
        gpu, dtype == PSOUP_BF16 ? PSOUP__KERNEL_attention_round_bf16 : PSOUP__KERNEL_attention_round_f16,
        (psoup__grid){(unsigned)blocks * (unsigned)spans->n, 1, 1, PSOUP__ROUND_THREADS, 0},
        &(psoup__attention_round_args){out, keys->k, keys->v, spans_of(spans), pitch, keys->stride,
                                       shape->kv_heads * shape->head_dim, blocks});
}

/* In f32, whatever the keys' dtype. */
static void attention_plain(psoup__gpu *gpu, psoup__attention_args *args, psoup_dtype dtype,
                            const psoup__spans *spans, const psoup__attention_shape *shape) {
    const psoup__grid grid =
        grid_of(&args->tiles, most_rows(spans, shape), PSOUP__PLAIN_ATTENTION_TILE, spans, shape,
                 PSOUP__PLAIN_ATTENTION_THREADS, 2 * plain_tile_bytes(shape->head_dim));
    psoup__gpu_launch(gpu,
                      dtype == PSOUP_BF16  ? PSOUP__KERNEL_attention_plain_bf16
                      : dtype == PSOUP_F16 ? PSOUP__KERNEL_attention_plain_f16
                                           : PSOUP__KERNEL_attention_plain_f32,
                      grid, args);
}

/* On tensor cores, keys that are not yet in the dtype rounded first: a tile of them is read by every tile
 * of rows. False, and nothing done, where no kernel is made for the shape. */
static bool attention_fast(psoup__gpu *gpu, psoup__attention_args *args, const psoup__keys *keys,
                           const psoup__spans *spans, const psoup__attention_shape *shape) {
    const choice *chosen = choose(shape->dtype, shape->head_dim);
    const bool rounded = keys->dtype == shape->dtype;
    if (!chosen || !aligned(args->q, keys->k, keys->v, keys->stride, psoup_dtype_size(keys->dtype)) ||
        !(shape->scale > 0) || (!rounded && (keys->dtype != PSOUP_F32 || keys->pages)) ||
        (keys->pages && args->page % PSOUP__ATTENTION_KEYS != 0))
        return false;
    const int32_t width = shape->kv_heads * shape->head_dim, rows = PSOUP__ATTENTION_ROWS(shape->head_dim);
    if (!rounded) {
        uint16_t *room = (uint16_t *)(uintptr_t)gpu->room;
        args->stride = 2 * (int64_t)width;
        args->k = room;
        args->v = room + width;
        round_keys(gpu, shape->dtype, room, args->stride, keys, spans, shape);
    }
    const size_t shared = ((size_t)rows + 4 * PSOUP__ATTENTION_KEYS) * (size_t)shape->head_dim * 2;
    const psoup__grid grid =
        grid_of(&args->tiles, most_rows(spans, shape), rows, spans, shape, PSOUP__ATTENTION_THREADS, shared);
    psoup__gpu_launch(gpu, chosen->forward, grid, args);
    return true;
}

static bool too_wide(psoup__gpu *gpu, const psoup__attention_shape *shape) {
    if (shape->head_dim <= PSOUP__PLAIN_ATTENTION_DIM)
        return false;
    if (gpu->failed.status == PSOUP_OK)
        psoup__fail(&gpu->failed, PSOUP_ERROR_UNSUPPORTED,
                    "GPU: attention: head_dim is %d; at most %d is supported", (int)shape->head_dim,
                    PSOUP__PLAIN_ATTENTION_DIM);
    return true;
}

static void attention(psoup__backend *be, float *out, float *lse, const float *q, const psoup__keys *keys,
                      const psoup__spans *spans, const psoup__attention_shape *shape) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    if (too_wide(gpu, shape))
        return;
    /* sequences that decode, in the same batch as others' prompts */
    const bool decoded = !lse && psoup__gpu_attention_decode(gpu, out, q, keys, spans, shape);
    if (decoded && spans->most_queries == 1)
        return;
    psoup__attention_args args = {
        .out = out, .lse = lse, .q = q, .k = keys->k, .v = keys->v, .pages = keys->pages,
        .spans = spans_of(spans), .stride = keys->stride, .heads = shape->heads, .kv_heads = shape->kv_heads,
        .head_dim = shape->head_dim, .page = gpu->ops.page, .least = decoded ? 2 : 1,
        .scale = shape->scale};
    if (!attention_fast(gpu, &args, keys, spans, shape))
        attention_plain(gpu, &args, keys->dtype, spans, shape);
}

/* ---- backward
 * --------------------------------------------------------------------------------------------- */

static void prepare(psoup__gpu *gpu, psoup__kernel kernel, psoup__attention_prepare_args args,
                    const psoup__spans *spans) {
    enum { EACH = PSOUP__ROUND_THREADS / 32 };
    const int64_t pairs = (int64_t)spans->most_queries * args.heads;
    args.blocks = (int32_t)((pairs + EACH - 1) / EACH);
    const psoup__grid grid = {(unsigned)args.blocks * (unsigned)spans->n, 1, 1, PSOUP__ROUND_THREADS, 0};
    psoup__gpu_launch(gpu, kernel, grid, &args);
}

/* The room's rows: q, dout, k and v in bf16, then the stats. */
static bool backward_fast(psoup__gpu *gpu, psoup__attention_backward_args *args,
                          psoup__attention_prepare_args *first, const psoup__keys *keys,
                          const psoup__spans *spans, const psoup__attention_shape *shape) {
    enum { KEYS = PSOUP__ATTENTION_KEYS, DKDV_KEYS = PSOUP__ATTENTION_DKDV_KEYS, STAT = 4 /* in 16 bits */ };
    const choice *chosen = choose(shape->dtype, shape->head_dim);
    const int32_t dim = shape->head_dim, parts = PSOUP__ATTENTION_DKDV_PARTS(dim);
    const size_t rows = (size_t)PSOUP__ATTENTION_ROWS(dim);
    const size_t dkdv_rows = (size_t)PSOUP__ATTENTION_DKDV_ROWS(dim);
    const size_t dkdv_shared = 2 * (size_t)dim * (2 * DKDV_KEYS + 4 * dkdv_rows) + 2 * 2 * STAT * dkdv_rows;
    const size_t dq_shared = 2 * (size_t)dim * (2 * rows + 4 * KEYS) + 2 * STAT * rows;
    if (!chosen || !aligned(args->dq, keys->dk, keys->dv, keys->stride, sizeof(float)) ||
        !aligned(args->q, args->dout, first->out, 0, 0) || !aligned(keys->k, keys->v, NULL, 0, 0) ||
        (size_t)gpu->shared_memory < (dq_shared > dkdv_shared ? dq_shared : dkdv_shared))
        return false;
    const int64_t width = (int64_t)shape->heads * dim, kv_width = (int64_t)shape->kv_heads * dim;
    uint16_t *room = (uint16_t *)(uintptr_t)gpu->room;
    args->pitch = first->pitch = (2 * (width + kv_width) + STAT * shape->heads + 7) / 8 * 8;
    args->stats_pitch = first->stats_pitch = args->pitch / 2;
    args->q16 = first->q16 = room;
    args->dout16 = first->dout16 = room + width;
    uint16_t *k16 = room + 2 * width;
    args->k16 = k16;
    args->v16 = k16 + kv_width;
    args->stats = first->stats = (float *)(k16 + 2 * kv_width);
    prepare(gpu, PSOUP__KERNEL_attention_prepare_bf16, *first, spans);
    round_keys(gpu, PSOUP_BF16, k16, args->pitch, keys, spans, shape);
    const int64_t key_tiles = (spans->most_keys + DKDV_KEYS - 1) / DKDV_KEYS;
    psoup__grid grid = grid_of(&args->tiles, parts * key_tiles, 1, spans, shape, PSOUP__ATTENTION_THREADS,
                               dkdv_shared);
    psoup__gpu_launch(gpu, chosen->dkdv, grid, args);
    grid = grid_of(&args->tiles, most_rows(spans, shape), (int32_t)rows, spans, shape,
                   PSOUP__ATTENTION_THREADS, dq_shared);
    psoup__gpu_launch(gpu, chosen->dq, grid, args);
    return true;
}

static void backward_plain(psoup__gpu *gpu, psoup__attention_backward_args *args,
                           psoup__attention_prepare_args *first, const psoup__spans *spans,
                           const psoup__attention_shape *shape) {
    enum { TILE = PSOUP__PLAIN_ATTENTION_TILE, THREADS = PSOUP__PLAIN_ATTENTION_THREADS };
    const size_t shared = 3 * plain_tile_bytes(shape->head_dim);
    args->stats = first->stats = (float *)(uintptr_t)gpu->room;
    args->stats_pitch = first->stats_pitch = 2 * (int64_t)shape->heads;
    prepare(gpu, PSOUP__KERNEL_attention_prepare_plain, *first, spans);
    psoup__grid grid = grid_of(&args->tiles, spans->most_keys, TILE, spans, shape, THREADS, shared);
    psoup__gpu_launch(gpu, PSOUP__KERNEL_attention_dkdv_plain, grid, args);
    grid = grid_of(&args->tiles, most_rows(spans, shape), TILE, spans, shape, THREADS, shared);
    psoup__gpu_launch(gpu, PSOUP__KERNEL_attention_dq_plain, grid, args);
}

static void attention_backward(psoup__backend *be, float *dq, const float *dout, const float *q,
                               const float *out, const float *lse, const psoup__keys *keys,
                               const psoup__spans *spans, const psoup__attention_shape *shape) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    if (too_wide(gpu, shape))
        return;
    psoup__attention_prepare_args first = {
        .dout = dout, .q = q, .out = out, .lse = lse, .spans = spans_of(spans), .heads = shape->heads,
        .head_dim = shape->head_dim};
    psoup__attention_backward_args args = {
        .dq = dq, .dk = keys->dk, .dv = keys->dv, .dout = dout, .q = q, .k = keys->k, .v = keys->v,
        .spans = spans_of(spans), .stride = keys->stride, .heads = shape->heads, .kv_heads = shape->kv_heads,
        .head_dim = shape->head_dim, .scale = shape->scale};
    if (!backward_fast(gpu, &args, &first, keys, spans, shape))
        backward_plain(gpu, &args, &first, spans, shape);
}

void psoup__gpu_fill_attention(psoup__ops *ops) {
    ops->attention = attention;
    ops->attention_backward = attention_backward;
}
