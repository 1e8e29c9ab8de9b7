/* The one primitive: a frozen linear layer plus each row's own mix of adapters.
 *
 *     y = bias + Σ_i w·s_i·u_i B_iᵀ, where u_i = x A_iᵀ      cuda/linear_mix.cu, two launches
 *     y += x Wᵀ                                               cuBLASLt, which reads y while it multiplies
 *     dx += dy W,  dw += dyᵀ x                                cuBLASLt
 *     du_i = dy B_i, and the adapters' gradients from it      cuda/linear_mix_backward.cu
 *
 * Linears that read one x (q, k, v; gate, up) share the two launches. Rows of factors have their u, and du, summed
 * over their adapters between the two (mix_pool).
 *
 * Where the weights have 16 bits, so has the copy of x that is multiplied. Layers that share an x (q, k, v;
 * gate, up) follow one another and share the copy.
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
        psoup__fail(&gpu->failed, PSOUP_ERROR_STATE,
                    "GPU: linear_mix rounds %zu numbers, room is reserved for %zu", n, gpu->room_bytes / 2);
        return NULL;
    }
    launch(gpu, dtype == PSOUP_F16 ? PSOUP__KERNEL_mix_cast_f16 : PSOUP__KERNEL_mix_cast_bf16,
           psoup__gpu_flat(gpu, n, 8), &(psoup__mix_cast_args){room, x, n});
    *cast = (psoup__cast){x, n, dtype};
    return room;
}

/* Forgets the copy of what these numbers overwrite. */
static void overwritten(psoup__gpu *gpu, const float *y, size_t n) {
    uintptr_t of = (uintptr_t)gpu->cast.of, out = (uintptr_t)y;
    if (out < of + gpu->cast.n * sizeof(float) && of < out + n * sizeof(float))
        gpu->cast.of = NULL;
}

static int32_t tiles(int32_t n, int32_t size) {
    return n / size + (n % size != 0);
}

/* ---- groups of adapters ------------------------------------------------------------------------------ */

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
        g->adapter[g->n++] = (psoup__mix_adapter){
            .factor = b ? lora->b : lora->a, .u = g->u, .rows = mix->rows + mix->first[g->next],
            .scale = lora->scale, .uses = uses, .rank = lora->rank, .column = g->next};
        g->u += (size_t)uses * (size_t)lora->rank;
    }
    return g->n > 0;
}

/* ---- launches ---------------------------------------------------------------------------------------- */

static psoup__kernel by_dtype(psoup_dtype dtype, psoup__kernel f32, psoup__kernel f16, psoup__kernel bf16) {
    return dtype == PSOUP_F32 ? f32 : dtype == PSOUP_F16 ? f16 : bf16;
}
#define BY_DTYPE(dtype, name)                                                                              \
    by_dtype(dtype, PSOUP__KERNEL_##name##_f32, PSOUP__KERNEL_##name##_f16, PSOUP__KERNEL_##name##_bf16)
#define BY_DTYPE_WIDE(dtype, name)                                                                         \
    by_dtype(dtype, PSOUP__KERNEL_##name##_f32, PSOUP__KERNEL_##name##_f16_wide,                           \
             PSOUP__KERNEL_##name##_bf16_wide)

static psoup__grid blocks(int32_t x, int32_t y) {
    return (psoup__grid){.x = (unsigned)x, .y = (unsigned)y, .z = 1, .threads = PSOUP__MIX_THREADS};
}

/* u = x Aᵀ, or with b du = dy B. `wide`: x is f32. Enough blocks for the device are found along the rows, and
 * where these are few, along x's columns. */
static void shrink(const linear *l, const group *g, bool b, const void *x, bool wide, int32_t width) {
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
    psoup__kernel kernel = b && wide ? BY_DTYPE_WIDE(l->dtype, mix_shrink_b)
                           : b       ? BY_DTYPE(l->dtype, mix_shrink_b)
                           : wide    ? BY_DTYPE_WIDE(l->dtype, mix_shrink_a)
                                     : BY_DTYPE(l->dtype, mix_shrink_a);
    launch(gpu, kernel, blocks(all, args.splits), &args);
}

/* u = x Aᵀ where no adapter has many uses: a block for each row of A. */
static bool shrink_few(const linear *l, const group *g, const float *x, int32_t width) {
    psoup__mix_shrink_args args = {.x = x, .width = width, .splits = 1, .slice = width};
    for (int32_t i = 0; i < g->n; i++) {
        if (g->adapter[i].uses > PSOUP__MIX_FEW_USES)
            return false;
        args.adapter[i] = g->adapter[i];
        args.tiles[i + 1] = args.tiles[i] + g->adapter[i].rank;
    }
    launch(l->gpu, PSOUP__KERNEL_mix_shrink_few, blocks(args.tiles[g->n], 1), &args);
    return true;
}

/* y = (y, or bias) + Σ w·s·u Bᵀ for the parts of args; without b dx += Σ w·s·du A. */
static void expand_parts(const linear *l, psoup__mix_expand_args *args, int32_t parts, bool b) {
    enum { BLOCKS = 8 }; /* of a multiprocessor: a block takes more columns where there are more */
    psoup__gpu *gpu = l->gpu;
    bool few = b && l->rows <= PSOUP__MIX_FEW;
    int32_t down = few ? 1 : tiles(l->rows, PSOUP__MIX_ROWS), most = 0;
    int64_t across = 0;
    for (int32_t i = 0; i < parts; i++) {
        int32_t own = tiles(args->part[i].width, PSOUP__MIX_COLUMNS);
        most = own > most ? own : most;
        across += own;
    }
    int64_t span = down * across / (BLOCKS * gpu->processors);
    args->weight = l->mix->weight;
    args->weights = l->mix->n;
    args->rows = l->rows;
    args->span = span < 1 ? 1 : span < most ? (int32_t)span : most;
    psoup__grid grid = blocks(down, tiles(most, args->span));
    grid.z = (unsigned)parts;
    launch(gpu, few ? BY_DTYPE(l->dtype, mix_expand_few)
                : b ? BY_DTYPE(l->dtype, mix_expand_b)
                    : BY_DTYPE(l->dtype, mix_expand_a),
           grid, args);
}

static void expand(const linear *l, const group *g, bool b, float *y, const float *bias, bool add,
                   int32_t width) {
    psoup__mix_expand_args args = {.part = {{.y = y, .bias = bias, .n = g->n, .width = width}}, .add = add};
    for (int32_t i = 0; i < g->n; i++)
        args.adapter[i] = g->adapter[i];
    expand_parts(l, &args, 1, b);
}

/* dA += Σ (w·s·du)ᵀ x, or with b dB += Σ dyᵀ (w·s·u), for adapters that ask. Chunks of uses are summed apart,
 * as many at a time as there are slots for, and added to what there is in order. */
static void gradient(const linear *l, const group *g, bool b, const void *z, bool wide, int32_t width) {
    psoup__gpu *gpu = l->gpu;
    psoup__mix_gradient_args args = {.z = z, .weight = l->mix->weight, .weights = l->mix->n, .width = width,
                                     .b_layout = b, .slots = (float *)(uintptr_t)gpu->blas.room,
                                     .counters = (uint32_t *)(uintptr_t)gpu->counters};
    int32_t n = 0, chunks = 0, slots = PSOUP__BLAS_ROOM / 4 / PSOUP__MIX_GRADIENT_SLOT;
    for (int32_t i = 0; i < g->n; i++) {
        const psoup__mix_adapter *adapter = &g->adapter[i];
        const psoup__lora *lora = &l->lora[adapter->column];
        if (!(b ? lora->db : lora->da))
            continue;
        int32_t needed = tiles(adapter->uses, PSOUP__MIX_CHUNK);
        chunks = needed > chunks ? needed : chunks;
        args.adapter[n] = *adapter;
        args.adapter[n].gradient = b ? lora->db : lora->da;
        args.tiles[n + 1] = args.tiles[n] + tiles(width, PSOUP__MIX_GRADIENT_COLUMNS) *
                                                tiles(adapter->rank, PSOUP__MIX_RANKS);
        n++;
    }
    int32_t all = args.tiles[n], at_once = all == 0 || all > PSOUP__GPU_COUNTERS ? 1 : slots / all;
    psoup__kernel kernel = wide ? BY_DTYPE_WIDE(l->dtype, mix_gradient) : BY_DTYPE(l->dtype, mix_gradient);
    at_once = at_once < 1 ? 1 : at_once;
    for (; n > 0 && args.chunk < chunks; args.chunk += at_once) {
        int32_t left = chunks - args.chunk;
        launch(gpu, kernel, blocks(all, left < at_once ? left : at_once), &args);
    }
}

/* dweight += s · <du, u>; `pooled`: of rows of factors alone, whose du is. */
static void dweight(const linear *l, const group *u, const group *du, bool pooled) {
    psoup__mix_dweight_args args = {.dweight = l->mix->dweight, .weight = l->mix->weight,
                                    .factors = l->mix->factors, .n = u->n, .weights = l->mix->n,
                                    .pooled = pooled};
    for (int32_t i = 0; i < u->n; i++) {
        args.adapter[i] = u->adapter[i];
        args.adapter[i].gradient = du->adapter[i].u;
        args.uses[i + 1] = args.uses[i] + u->adapter[i].uses;
    }
    int32_t warps = PSOUP__MIX_THREADS / 32;
    launch(l->gpu, PSOUP__KERNEL_mix_dweight, blocks(tiles(args.uses[u->n], warps), 1), &args);
}

static void pool_launch(const linear *l, const group *g, psoup__mix_pool_args *args) {
    args->n = g->n;
    for (int32_t i = 0; i < g->n; i++)
        args->adapter[i] = g->adapter[i];
    launch(l->gpu, PSOUP__KERNEL_mix_pool, blocks(tiles(args->rows, PSOUP__MIX_THREADS / 32), 1), args);
}

/* Rows of factors: u_i = Σ_j w_j u_j. More adapters than a launch takes add up in the room for slots, for as many
 * rows at a time as it holds. */
static void pool(const linear *l, float *u) {
    psoup__mix_pool_args args = {.sums = (float *)(uintptr_t)l->gpu->blas.room, .weight = l->mix->weight,
                                 .factors = l->mix->factors, .rows = l->rows, .weights = l->mix->n};
    group first = {.u = u}, more;
    if (!l->mix->factors || !next_group(l, &first, false))
        return;
    for (int32_t i = 0; i < l->mix->n; i++)
        args.most = l->lora[i].rank > args.most ? l->lora[i].rank : args.most;
    more = first;
    if (!next_group(l, &more, false)) {
        args.gather = args.begin = args.spread = 1;
        pool_launch(l, &first, &args);
        return;
    }
    int32_t at_once = PSOUP__BLAS_ROOM / 4 / args.most;
    for (; args.row0 < l->rows; args.row0 += at_once) {
        args.rows = l->rows - args.row0 < at_once ? l->rows - args.row0 : at_once;
        args.gather = args.begin = 1, args.spread = 0;
        for (group g = {.u = u}; next_group(l, &g, false); args.begin = 0)
            pool_launch(l, &g, &args);
        args.gather = 0, args.spread = 1;
        for (group g = {.u = u}; next_group(l, &g, false);)
            pool_launch(l, &g, &args);
    }
}

/* ---- the ops ----------------------------------------------------------------------------------------- */

/* y = (y +) x Wᵀ. */
static void product(psoup__gpu *gpu, float *y, const void *x, const psoup__weight *w, int32_t rows, bool add) {
    if (psoup__gpu_multiply_blocks(gpu, w, y, x, rows, add))
        return;
    psoup__blas_run(gpu,
                    &(psoup__product){.m = rows, .n = w->out, .k = w->in, .dtype = psoup__weight_dtype(w),
                                      .transpose_b = true, .lda = w->in, .ldb = w->in, .ldc = w->out,
                                      .alpha = 1, .beta = add ? 1 : 0},
                    y, x, psoup__gpu_matrix(gpu, w));
}

static void linear_mix(psoup__backend *be, float *y, float *u, const float *x, const float *x_lora,
                       const psoup__weight *w, const float *bias, const psoup__lora *lora,
                       const psoup__mix *mix, int32_t rows) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    linear l = {gpu, psoup__weight_dtype(w), lora, mix, rows};
    if (rows == 0)
        return;
    const void *operand = rounded(gpu, x, (size_t)rows * (size_t)w->in, l.dtype);
    if (!operand)
        return;
    bool begun = false, wide = x_lora != x;
    for (group a = {.u = u}; next_group(&l, &a, false);)
        if (!shrink_few(&l, &a, x_lora, w->in))
            shrink(&l, &a, false, x_lora == x ? operand : x_lora, wide, w->in);
    pool(&l, u);
    for (group b = {.u = u}; next_group(&l, &b, true); begun = true)
        expand(&l, &b, true, y, bias, begun, w->out);
    if (bias && !begun)
        expand(&l, &(group){.n = 0}, true, y, bias, false, w->out);
    product(gpu, y, operand, w, rows, bias || begun);
    overwritten(gpu, y, (size_t)rows * (size_t)w->out);
}

/* What some linears that read one x add: their adapters as one group, by A and, in `up`, by B. */
typedef struct joined {
    group down;
    psoup__mix_expand_args up;
    int32_t parts;
    bool begun[PSOUP__MIX_PARTS]; /* of each linear: it has a part */
} joined;

/* False where one launch does not take them. */
static bool join(const linear *l, const psoup__linear *each, int32_t n, joined *j) {
    if (n > PSOUP__MIX_PARTS)
        return false;
    for (int32_t i = 0; i < n; i++) {
        const linear own = {l->gpu, l->dtype, each[i].lora, l->mix, l->rows};
        group down = {.u = each[i].u}, up = {.u = each[i].u};
        if (psoup__weight_dtype(each[i].w) != l->dtype)
            return false;
        if (each[i].lora && next_group(&own, &down, false) && next_group(&own, &up, true) && down.next < l->mix->n)
            return false;
        if (j->down.n + down.n > PSOUP__MIX_GROUP)
            return false;
        j->begun[i] = down.n > 0 || each[i].bias;
        if (j->begun[i])
            j->up.part[j->parts++] = (psoup__mix_part){.y = each[i].y, .bias = each[i].bias, .first = j->down.n,
                                                       .n = down.n, .width = each[i].w->out};
        for (int32_t k = 0; k < down.n; k++) {
            j->up.adapter[j->down.n] = up.adapter[k];
            j->down.adapter[j->down.n++] = down.adapter[k];
        }
    }
    return true;
}

/* As many launches for the adapters of all as for those of one. */
static void linear_mix_each(psoup__backend *be, const psoup__linear *each, int32_t n, const float *x,
                            const psoup__mix *mix, int32_t rows) {
    const psoup__mix none = {0};
    psoup__gpu *gpu = psoup__gpu_of(be);
    const linear l = {gpu, psoup__weight_dtype(each[0].w), NULL, mix, rows};
    const int32_t in = each[0].w->in;
    joined j = {.parts = 0};
    if (rows == 0)
        return;
    if (!join(&l, each, n, &j)) {
        for (int32_t i = 0; i < n; i++)
            linear_mix(be, each[i].y, each[i].u, x, x, each[i].w, each[i].bias, each[i].lora,
                       each[i].lora ? mix : &none, rows);
        return;
    }
    const void *operand = rounded(gpu, x, (size_t)rows * (size_t)in, l.dtype);
    if (!operand)
        return;
    if (j.down.n > 0 && !shrink_few(&l, &j.down, x, in))
        shrink(&l, &j.down, false, operand, false, in);
    for (int32_t i = 0; i < n; i++)
        if (each[i].lora)
            pool(&(linear){gpu, l.dtype, each[i].lora, mix, rows}, each[i].u);
    if (j.parts > 0)
        expand_parts(&l, &j.up, j.parts, true);
    for (int32_t i = 0; i < n; i++)
        product(gpu, each[i].y, operand, each[i].w, rows, j.begun[i]);
    for (int32_t i = 0; i < n; i++)
        overwritten(gpu, each[i].y, (size_t)rows * (size_t)each[i].w->out);
}

/* The gradients of the base's own weights. */
static void base_gradients(const linear *l, float *dw, float *dbias, const float *dy, const float *x,
                           const psoup__weight *w) {
    if (dw)
        psoup__blas_run(l->gpu,
                        &(psoup__product){.m = w->out, .n = w->in, .k = l->rows, .dtype = PSOUP_F32,
                                          .transpose_a = true, .lda = w->out, .ldb = w->in, .ldc = w->in,
                                          .alpha = 1, .beta = 1},
                        dw, dy, x);
    if (dbias) {
        psoup__grid grid = blocks(tiles(w->out, PSOUP__MIX_DBIAS_COLUMNS), 1);
        grid.threads = PSOUP__MIX_DBIAS_THREADS;
        launch(l->gpu, PSOUP__KERNEL_mix_dbias, grid, &(psoup__mix_dbias_args){dbias, dy, l->rows, w->out});
    }
}

/* Whether an adapter of the group asks for dA, and for dB; of all adapters, where there is no group. */
static void asked(const linear *l, const group *g, bool *da, bool *db) {
    *da = *db = false;
    for (int32_t i = 0; i < (g ? g->n : l->mix->n); i++) {
        const psoup__lora *lora = &l->lora[g ? g->adapter[i].column : i];
        *da = *da || lora->da;
        *db = *db || lora->db;
    }
}

static void linear_mix_backward(psoup__backend *be, float *dx, float *dx_lora, float *dw,
                                float *dbias, float *du, const float *dy, const float *x,
                                const float *x_lora, float *u, const psoup__weight *w,
                                const psoup__lora *lora, const psoup__mix *mix, int32_t rows) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    linear l = {gpu, psoup__weight_dtype(w), lora, mix, rows};
    if (rows == 0)
        return;
    const void *operand = dx ? rounded(gpu, dy, (size_t)rows * (size_t)w->out, l.dtype) : dy;
    if (!operand)
        return;
    if (dx)
        psoup__blas_run(gpu,
                        &(psoup__product){.m = rows, .n = w->in, .k = w->out, .dtype = l.dtype,
                                          .lda = w->out, .ldb = w->in, .ldc = w->in, .alpha = 1, .beta = 1},
                        dx, operand, psoup__gpu_matrix(gpu, w));
    base_gradients(&l, dw, dbias, dy, x, w);
    bool da, db;
    asked(&l, NULL, &da, &db);
    bool pulled = da || dx_lora || mix->dweight;
    for (group b = {.u = du}, saved = {.u = u};
         pulled && next_group(&l, &b, true) && next_group(&l, &saved, false);) {
        shrink(&l, &b, true, operand, operand == dy, w->out);
        if (mix->dweight)
            dweight(&l, &saved, &b, false);
    }
    if (pulled)
        pool(&l, du);
    for (group a = {.u = du}, saved = {.u = u}; next_group(&l, &a, false) && next_group(&l, &saved, false);) {
        asked(&l, &a, &da, &db);
        if (db)
            gradient(&l, &saved, true, operand, operand == dy, w->out);
        if (mix->factors && mix->dweight) { /* u was pooled: once more by itself */
            shrink(&l, &saved, false, x_lora, true, w->in);
            dweight(&l, &saved, &a, true);
        }
        if (da)
            gradient(&l, &a, false, x_lora, true, w->in);
        if (dx_lora)
            expand(&l, &a, false, dx_lora, NULL, true, w->in);
    }
    gpu->cast.of = NULL; /* what comes next shares nothing with dy, and dx may lie anywhere */
}

void psoup__gpu_fill_linear_mix(psoup__ops *ops) {
    ops->linear_mix_backward = linear_mix_backward;
    ops->linear_mix = linear_mix;
    ops->linear_mix_each = linear_mix_each;
}
