/* Attention of spans of one query over a cache. */
#include "gpu/internal.h"

enum { LEAST_SPLIT = 64, WAVES = 4 };

typedef struct choice {
    psoup_dtype dtype;
    int32_t head_dim, heads; /* heads: to a tile */
    psoup__kernel kernel;
} choice;

#define OF(dtype, type, dim)                                                                               \
    {dtype, dim, 1, PSOUP__KERNEL_decode_##type##_##dim##_1},                                              \
        {dtype, dim, 4, PSOUP__KERNEL_decode_##type##_##dim##_4},                                          \
        {dtype, dim, 8, PSOUP__KERNEL_decode_##type##_##dim##_8}
static const choice choices[] = {
    OF(PSOUP_F32, float, 64),  OF(PSOUP_F32, float, 128), OF(PSOUP_F32, float, 256),
    OF(PSOUP_BF16, bf16, 64),  OF(PSOUP_BF16, bf16, 128), OF(PSOUP_BF16, bf16, 256),
    OF(PSOUP_F16, f16, 64),    OF(PSOUP_F16, f16, 128),   OF(PSOUP_F16, f16, 256),
};

/* The smallest tile that holds the heads of a key head, or the largest there is. */
static const choice *choose(psoup_dtype dtype, int32_t head_dim, int32_t group) {
    const choice *found = NULL;
    for (size_t i = 0; i < sizeof choices / sizeof *choices; i++)
        if (choices[i].dtype == dtype && choices[i].head_dim == head_dim && (!found || found->heads < group))
            found = &choices[i];
    return found;
}

static bool aligned(const psoup__keys *keys) {
    const size_t item = psoup_dtype_size(keys->dtype);
    return ((uintptr_t)keys->k | (uintptr_t)keys->v | ((size_t)keys->stride * item)) % 16 == 0;
}

/* Into how many parts the keys are cut: enough blocks for every multiprocessor, whatever the batch, but no more
 * than there is room for. */
static int32_t splits_of(const psoup__gpu *gpu, const psoup__spans *spans, const psoup__attention_shape *shape,
                         int32_t blocks) {
    const int32_t most = (spans->most_keys + LEAST_SPLIT - 1) / LEAST_SPLIT;
    const size_t part = (size_t)spans->n * (size_t)shape->heads * ((size_t)shape->head_dim + 2) * sizeof(float);
    int64_t splits = ((int64_t)gpu->processors * WAVES + blocks - 1) / blocks;
    splits = splits < most ? splits : most;
    splits = splits < (int64_t)(gpu->room_bytes / part) ? splits : (int64_t)(gpu->room_bytes / part);
    return splits > 1 ? (int32_t)splits : 1;
}

bool psoup__gpu_attention_decode(psoup__gpu *gpu, float *out, const float *q, const psoup__keys *keys,
                                 const psoup__spans *spans, const psoup__attention_shape *shape) {
    const int32_t group = shape->heads / shape->kv_heads;
    const choice *chosen = choose(keys->dtype, shape->head_dim, group);
    if (!chosen || !aligned(keys) || spans->n > 65535)
        return false;
    const int32_t tiles = shape->kv_heads * ((group + chosen->heads - 1) / chosen->heads);
    int32_t splits = splits_of(gpu, spans, shape, spans->n * tiles);
    const int32_t split = (spans->most_keys + splits - 1) / splits;
    splits = (spans->most_keys + split - 1) / split;
    float *part = (float *)(uintptr_t)gpu->room;
    psoup__attention_decode_args args = {
        .out = out, .part = part, .q = q, .k = keys->k, .v = keys->v, .stride = keys->stride,
        .pages = keys->pages, .span = &spans->span->query, .page = keys->pages ? gpu->ops.page : 0,
        .heads = shape->heads, .kv_heads = shape->kv_heads, .splits = splits, .split = split,
        .scale = shape->scale * 1.44269504088896341f /* log2 e */};
    const psoup__grid grid = {(unsigned)splits, (unsigned)tiles, (unsigned)spans->n, PSOUP__DECODE_THREADS, 0};
    psoup__gpu_launch(gpu, chosen->kernel, grid, &args);
    if (splits > 1)
        PSOUP__LAUNCH(gpu, attention_merge,
                      ((psoup__grid){(unsigned)shape->heads, (unsigned)spans->n, 1, PSOUP__DECODE_THREADS, 0}),
                      {out, part, &spans->span->query, shape->heads, shape->head_dim, splits, split});
    return true;
}
