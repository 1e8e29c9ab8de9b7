/* The one primitive: a frozen linear layer plus each row's own mix of adapters.
 *
 *     y = bias + Σ_i w·s_i·u_i B_iᵀ, where u_i = x A_iᵀ      cuda/linear_mix.cu, two launches
 *     y += x Wᵀ                                               cuBLASLt, which reads y while it multiplies
 *
 * Where the weights have 16 bits, so has the copy of x that is multiplied. Layers that share an x (q, k, v; gate,
 * up) follow one another and share the copy.
 */
#include "gpu/internal.h"

typedef struct linear {
    psoup__gpu *gpu;
    psoup_dtype dtype; /* of the weights */
    const psoup__lora *lora;
    const psoup__mix *mix;
    int32_t rows;
} linear;

/* These kernels write no activation that anybody rounds but y, of which linear_mix takes care. */
static void launch(psoup__gpu *gpu, psoup__kernel kernel, psoup__grid grid, const void *args) {
    psoup__cast cast = gpu->cast;
    psoup__gpu_launch(gpu, kernel, grid, args);
    gpu->cast = cast;
}

/* x as products take it: itself, or its copy in the weights' dtype. NULL after a failure. */
static const void *rounded(psoup__gpu *gpu, const float *x, size_t n, psoup_dtype dtype) {
    psoup__cast *cast = &gpu->cast;
    void *room = (void *)(uintptr_t)gpu->room;
    if (dtype == PSOUP_F32 || gpu->failed.status != PSOUP_OK)
        return gpu->failed.status == PSOUP_OK ? x : NULL;
    if (cast->of == x && cast->n == n && cast->dtype == dtype)
        return room;
    if (n > gpu->room_bytes / 2) {
        psoup__fail(&gpu->failed, PSOUP_ERROR_STATE, "GPU: linear_mix rounds %zu numbers, room is reserved for %zu",
                    n, gpu->room_bytes / 2);
        return NULL;
    }
    launch(gpu, dtype == PSOUP_F16 ? PSOUP__KERNEL_mix_cast_f16 : PSOUP__KERNEL_mix_cast_bf16,
           psoup__gpu_flat(gpu, n, 8), &(psoup__mix_cast_args){room, x, n});
    *cast = (psoup__cast){x, n, dtype};
    return room;
}

/* Forgets the copy of what these numbers overwrite. */
static void overwritten(psoup__gpu *gpu, const float *y, size_t n) {
    const psoup__cast *cast = &gpu->cast;
    if (cast->of && (uintptr_t)y < (uintptr_t)(cast->of + cast->n) && (uintptr_t)cast->of < (uintptr_t)(y + n))
        gpu->cast.of = NULL;
}

static int32_t tiles(int32_t n, int32_t size) {
    return n / size + (n % size != 0);
}

/* ---- groups of adapters --------------------------------------------------------------------------------- */

/* Up to PSOUP__MIX_GROUP adapters that somebody uses, and where the next begin. */
typedef struct group {
    psoup__mix_adapter adapter[PSOUP__MIX_GROUP];
    int32_t n;
    int32_t next; /* adapter */
    float *u;     /* of `next` */
} group;

/* The next group; false at the end. Start with {.u = u}. */
static bool next_group(const linear *l, group *g, bool b) {
    const psoup__mix *mix = l->mix;
    for (g->n = 0; g->next < mix->n && g->n < PSOUP__MIX_GROUP; g->next++) {
        const psoup__lora *lora = &l->lora[g->next];
        int32_t uses = mix->first[g->next + 1] - mix->first[g->next];
        if (uses == 0 || lora->rank == 0)
            continue;
        g->adapter[g->n++] = (psoup__mix_adapter){.factor = b ? lora->b : lora->a, .u = g->u,
                                                  .rows = mix->rows + mix->first[g->next], .scale = lora->scale,
                                                  .uses = uses, .rank = lora->rank, .column = g->next};
        g->u += (size_t)uses * (size_t)lora->rank;
    }
    return g->n > 0;
}

/* ---- the two launches ------------------------------------------------------------------------------------ */

/* u = x Aᵀ. Enough blocks for the device are found along the rows, and where these are few, along x's columns. */
static void shrink(const linear *l, const group *g, const void *x, bool wide, int32_t width) {
    enum { STEP = 128, BLOCKS = 2 }; /* the least columns of a split; blocks for each multiprocessor */
    psoup__gpu *gpu = l->gpu;
    psoup__mix_shrink_args args = {.x = x, .width = width, .splits = 1,
                                   .slots = (float *)(uintptr_t)gpu->blas.room,
                                   .counters = (uint32_t *)(uintptr_t)gpu->counters};
    for (int32_t i = 0; i < g->n; i++) {
        const psoup__mix_adapter *adapter = &g->adapter[i];
        args.adapter[i] = *adapter;
        args.tiles[i + 1] = args.tiles[i] + tiles(adapter->uses, PSOUP__MIX_ROWS) *
                                                tiles(adapter->rank, PSOUP__MIX_RANKS);
    }
    int32_t all = args.tiles[g->n], most = tiles(width, STEP), slots = PSOUP__BLAS_ROOM / 4 / PSOUP__MIX_SLOT;
    int32_t splits = BLOCKS * gpu->processors / all;
    splits = splits < most ? splits : most;
    if (splits > 1 && all <= PSOUP__GPU_COUNTERS && splits <= slots / all)
        args.splits = splits;
    args.slice = tiles(tiles(width, args.splits), STEP) * STEP;
    args.splits = tiles(width, args.slice);
    psoup__kernel kernel = l->dtype == PSOUP_F32   ? PSOUP__KERNEL_mix_shrink_a_f32
                           : l->dtype == PSOUP_F16 ? PSOUP__KERNEL_mix_shrink_a_f16
                                                   : PSOUP__KERNEL_mix_shrink_a_bf16;
    if (wide)
        kernel = l->dtype == PSOUP_F16 ? PSOUP__KERNEL_mix_shrink_a_f16_wide : PSOUP__KERNEL_mix_shrink_a_bf16_wide;
    launch(gpu, kernel,
           (psoup__grid){.x = (unsigned)all, .y = (unsigned)args.splits, .z = 1, .threads = PSOUP__MIX_THREADS},
           &args);
}

/* y = (y, or bias) + Σ w·s·u Bᵀ. */
static void expand(const linear *l, const group *g, float *y, const float *bias, bool add, int32_t width) {
    enum { BLOCKS = 8 }; /* of a multiprocessor: a block takes more columns where there are more */
    psoup__gpu *gpu = l->gpu;
    bool few = l->rows <= PSOUP__MIX_FEW;
    psoup__mix_expand_args args = {.y = y, .bias = bias, .weight = l->mix->weight, .n = g->n, .rows = l->rows,
                                   .width = width, .weights = l->mix->n, .add = add};
    for (int32_t i = 0; i < g->n; i++)
        args.adapter[i] = g->adapter[i];
    int32_t down = few ? 1 : tiles(l->rows, PSOUP__MIX_ROWS), across = tiles(width, PSOUP__MIX_COLUMNS);
    int64_t span = (int64_t)down * across / (BLOCKS * gpu->processors);
    args.span = span < 1 ? 1 : span < across ? (int32_t)span : across;
    psoup__kernel kernel = l->dtype == PSOUP_F32   ? PSOUP__KERNEL_mix_expand_b_f32
                           : l->dtype == PSOUP_F16 ? PSOUP__KERNEL_mix_expand_b_f16
                                                   : PSOUP__KERNEL_mix_expand_b_bf16;
    if (few)
        kernel = l->dtype == PSOUP_F32   ? PSOUP__KERNEL_mix_expand_few_f32
                 : l->dtype == PSOUP_F16 ? PSOUP__KERNEL_mix_expand_few_f16
                                         : PSOUP__KERNEL_mix_expand_few_bf16;
    launch(gpu, kernel,
           (psoup__grid){.x = (unsigned)down, .y = (unsigned)tiles(across, args.span), .z = 1,
                         .threads = PSOUP__MIX_THREADS},
           &args);
}

static void linear_mix(psoup__backend *be, float *y, float *u, const float *x, const float *x_lora,
                       const psoup__weight *w, const float *bias, const psoup__lora *lora,
                       const psoup__mix *mix, int32_t rows) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    linear l = {gpu, w->dtype, lora, mix, rows};
    if (rows == 0)
        return;
    const void *operand = rounded(gpu, x, (size_t)rows * (size_t)w->in, w->dtype);
    if (!operand)
        return;
    bool begun = false, wide = x_lora != x && w->dtype != PSOUP_F32;
    for (group a = {.u = u}, b = a; next_group(&l, &a, false) && next_group(&l, &b, true); begun = true) {
        shrink(&l, &a, x_lora == x ? operand : x_lora, wide, w->in);
        expand(&l, &b, y, bias, begun, w->out);
    }
    if (bias && !begun)
        expand(&l, &(group){.n = 0}, y, bias, false, w->out);
    psoup__blas_run(gpu,
                    &(psoup__product){.m = rows, .n = w->out, .k = w->in, .dtype = w->dtype, .transpose_b = true,
                                      .lda = w->in, .ldb = w->in, .ldc = w->out, .alpha = 1,
                                      .beta = bias || begun ? 1 : 0},
                    y, operand, w->data);
    overwritten(gpu, y, (size_t)rows * (size_t)w->out);
}

void psoup__gpu_fill_linear_mix(psoup__ops *ops) {
    ops->linear_mix = linear_mix;
}
