/* The one primitive of the library: a frozen linear layer plus each row's own mix of adapters. Every
 * product is psoup__gemm, which gathers and scatters rows, so no row is copied and adapters nobody
 * uses cost nothing.
 *
 *     u_i = x_i A_iᵀ        y_i += (w·s_i·u_i) B_iᵀ          (x_i, y_i: the rows that use adapter i)
 *
 *     du_i = dy_i B_i       dw_i += s_i <du_i, u_i>           dB_i += dy_iᵀ (w·s_i·u_i)
 *     du_i *= w·s_i         dA_i += du_iᵀ x_i                 dx_i += du_i A_i
 *
 * A row of mix->factors has u_i = v = Σ_j w_j x A_jᵀ for each of its adapters, and in the backward du_i = Σ_j w_j dy B_j
 * likewise (`pool`). Then the rest is as above, but for dw_i = s (<dy B_i, v> + <Σ_j w_j dy B_j, x A_iᵀ>).
 */
#include "cpu/variant.h"
#include "cpu/vector.h"

enum { PICK = 1024, BIAS_TILE = 64, ROW_TILE = 64, DB_COLUMNS = 64, DB_ROWS = 128 }; /* DB: of dBᵀ at a time */

/* Up to PICK of the rows that adapter i lists, without those of weight zero: a row that is not to
 * feel an adapter must not be multiplied by 0 · NaN either. `start` is where they begin in u_i. */
typedef struct row_pick {
    int32_t start, n;
    int32_t local[PICK]; /* row of u_i, counted from start */
    int32_t row[PICK];   /* row of x and y */
    float weight[PICK];  /* of row start + k of u_i, used or not */
    bool whole;          /* local is 0 … n − 1, and row is row[0] … row[0] + n − 1: nothing is to be gathered */
} row_pick;

static void pick_until(row_pick *pick, const psoup__mix *mix, int32_t adapter, int32_t start, int32_t end) {
    const int32_t first = mix->first[adapter];
    pick->start = start;
    pick->n = 0;
    for (int32_t k = 0; k < PICK && start + k < end; k++) {
        const int32_t row = mix->rows[first + start + k];
        const float weight = mix->weight[(size_t)row * (size_t)mix->n + (size_t)adapter];
        pick->weight[k] = weight;
        if (weight == 0)
            continue;
        pick->local[pick->n] = k;
        pick->row[pick->n++] = row;
    }
    pick->whole = true;
    for (int32_t k = 0; k < pick->n; k++)
        pick->whole &= pick->local[k] == k && pick->row[k] == pick->row[0] + k;
}

static void pick_rows(row_pick *pick, const psoup__mix *mix, int32_t adapter, int32_t start) {
    pick_until(pick, mix, adapter, start, mix->first[adapter + 1] - mix->first[adapter]);
}

/* ---- rows of factors ------------------------------------------------------------------------------- */

typedef struct pool_job {
    float *u; /* the blocks of all adapters */
    const psoup__lora *lora;
    const psoup__mix *mix;
    size_t rows;
} pool_job;

/* Where adapter i lists the row: which row of u_i is its. */
static size_t place_of(const psoup__mix *mix, int32_t adapter, int32_t row) {
    const int32_t *rows = mix->rows + mix->first[adapter];
    int32_t low = 0, high = mix->first[adapter + 1] - mix->first[adapter];
    while (low < high) {
        const int32_t middle = (low + high) / 2;
        if (rows[middle] < row)
            low = middle + 1;
        else
            high = middle;
    }
    return (size_t)low;
}

/* The row of u_i, where the row uses adapter i, else NULL; *block goes on to the next adapter's. */
static float *own_row(const pool_job *job, int32_t adapter, int32_t row, float **block) {
    const psoup__mix *mix = job->mix;
    const size_t uses = (size_t)(mix->first[adapter + 1] - mix->first[adapter]);
    const size_t rank = (size_t)job->lora[adapter].rank;
    float *u = *block;
    *block += uses * rank;
    if (rank == 0 || mix->weight[(size_t)row * (size_t)mix->n + (size_t)adapter] == 0)
        return NULL;
    return u + place_of(mix, adapter, row) * rank;
}

/* u_i = Σ_j w_j u_j, summed in the row of its first adapter, then copied to the others. */
static void pool_row(const pool_job *job, int32_t row) {
    const psoup__mix *mix = job->mix;
    float *sum = NULL, *block = job->u;
    size_t rank = 0;
    for (int32_t i = 0; i < mix->n; i++) {
        const float weight = mix->weight[(size_t)row * (size_t)mix->n + (size_t)i];
        float *own = own_row(job, i, row, &block);
        if (!own)
            continue;
        rank = (size_t)job->lora[i].rank;
        for (size_t j = 0; j < rank; j++)
            if (sum)
                sum[j] += weight * own[j];
            else
                own[j] *= weight;
        sum = sum ? sum : own;
    }
    block = job->u;
    for (int32_t i = 0; sum && i < mix->n; i++) {
        float *own = own_row(job, i, row, &block);
        if (own && own != sum)
            memcpy(own, sum, rank * sizeof *own);
    }
}

static void pool_task(void *arg, size_t task, int worker) {
    const pool_job *job = arg;
    const size_t end = least((task + 1) * ROW_TILE, job->rows);
    for (size_t row = task * ROW_TILE; row < end; row++)
        if (job->mix->factors[row])
            pool_row(job, (int32_t)row);
}

static void pool(psoup_context *context, float *u, const psoup__lora *lora, const psoup__mix *mix,
                 int32_t rows) {
    pool_job job = {u, lora, mix, (size_t)rows};
    if (mix->factors && mix->n > 0)
        psoup__parallel(context, tiles((size_t)rows, ROW_TILE), pool_task, &job);
}

/* ---- forward ------------------------------------------------------------------------------------------ */

typedef struct bias_job {
    float *y;          /* [rows, out] */
    float *dbias;      /* [out] */
    const float *dy;   /* [rows, out] */
    const float *bias; /* [out] */
    size_t rows, out;
} bias_job;

static void bias_task(void *arg, size_t task, int worker) {
    const bias_job *job = arg;
    const size_t end = least((task + 1) * ROW_TILE, job->rows);
    for (size_t row = task * ROW_TILE; row < end; row++)
        memcpy(job->y + row * job->out, job->bias, job->out * sizeof(float));
}

static void dbias_task(void *arg, size_t task, int worker) {
    const bias_job *job = arg;
    const size_t start = task * BIAS_TILE, n = least(BIAS_TILE, job->out - start);
    float *dbias = job->dbias + start;
    for (size_t row = 0; row < job->rows; row++) {
        const float *dy = job->dy + row * job->out + start;
        for (size_t j = 0; j < n; j++)
            dbias[j] += dy[j];
    }
}

/* Both products of all adapters, by blocks of the batch's rows: no two blocks share a row, and each row's adapters
 * come in ascending order. */
typedef struct lora_job {
    psoup_context *context;
    float *y;       /* [rows, out]; NULL: u alone */
    float *u;       /* the blocks of all adapters */
    const float *x; /* [rows, in]; NULL: u is there */
    const psoup__lora *lora;
    const psoup__mix *mix;
    int32_t in, out, rows, block;
} lora_job;

/* u = x Aᵀ on rows [start, end) of one adapter's list. */
static void lora_down(const lora_job *job, float *u /* [uses, rank] */, const psoup__lora *lora,
                      int32_t adapter, int32_t start, int32_t end) {
    psoup__gemm(job->context, &(psoup__gemm_args){
                                  .m = end - start, .n = lora->rank, .k = job->in,
                                  .c = u + (size_t)start * (size_t)lora->rank, .c_stride = lora->rank,
                                  .a = job->x, .a_row = job->in, .a_col = 1,
                                  .a_rows = job->mix->rows + job->mix->first[adapter] + start, .alpha = 1,
                                  .b = lora->a, .b_dtype = PSOUP_F32, .b_row = 1, .b_col = job->in});
}

/* y += (w · scale · u) Bᵀ on the same. */
static void lora_up(const lora_job *job, const float *u /* [uses, rank] */, int32_t adapter, int32_t start,
                    int32_t end) {
    const psoup__lora *lora = &job->lora[adapter];
    for (; start < end; start += PICK) {
        row_pick p;
        pick_until(&p, job->mix, adapter, start, end);
        if (p.n)
            psoup__gemm(job->context, &(psoup__gemm_args){
                                          .m = p.n, .n = job->out, .k = lora->rank,
                                          .c = job->y, .c_stride = job->out, .c_rows = p.row,
                                          .accumulate = true,
                                          .a = u + (size_t)start * (size_t)lora->rank,
                                          .a_row = lora->rank, .a_col = 1, .a_rows = p.local,
                                          .a_scale = p.weight, .a_scale_stride = 1, .alpha = lora->scale,
                                          .b = lora->b, .b_dtype = PSOUP_F32,
                                          .b_row = 1, .b_col = lora->rank});
    }
}

static void lora_task(void *arg, size_t task, int worker) {
    const lora_job *job = arg;
    const psoup__mix *mix = job->mix;
    const int32_t first = (int32_t)task * job->block, left = job->rows - first;
    const int32_t last = first + (left < job->block ? left : job->block);
    float *u = job->u;
    for (int32_t i = 0; i < mix->n; i++) {
        const size_t uses = (size_t)(mix->first[i + 1] - mix->first[i]), rank = (size_t)job->lora[i].rank;
        const int32_t start = uses && rank ? (int32_t)place_of(mix, i, first) : 0;
        const int32_t end = uses && rank ? (int32_t)place_of(mix, i, last) : 0;
        if (start < end && job->x)
            lora_down(job, u, &job->lora[i], i, start, end);
        if (start < end && job->y)
            lora_up(job, u, i, start, end);
        u += uses * rank;
    }
}

/* Blocks are few enough that a factor, which each copies for itself, is worth copying. */
static void lora_forward(psoup_context *context, float *y, float *u, const float *x, const psoup__weight *w,
                         const psoup__lora *lora, const psoup__mix *mix, int32_t rows) {
    lora_job job = {context, y, u, x, lora, mix, w->in, w->out, rows, ROW_TILE};
    const int32_t most = context->threads > 1 ? 2 * context->threads : 1;
    while (job.block < PICK && rows / job.block > most)
        job.block *= 2;
    psoup__parallel(context, tiles((size_t)rows, (size_t)job.block), lora_task, &job);
}

/* y = x Wᵀ, added to the bias where there is one. */
static psoup__gemm_args own_product(float *y, const float *x, const psoup__weight *w, const float *bias,
                                    int32_t rows) {
    return (psoup__gemm_args){.m = rows, .n = w->out, .k = w->in,
                              .c = y, .c_stride = w->out, .accumulate = bias != NULL,
                              .a = x, .a_row = w->in, .a_col = 1, .alpha = 1,
                              .b = w->data, .b_dtype = w->dtype, .b_scales = w->scales,
                              .b_row = 1, .b_col = w->in, .packed = w->forward};
}

static void linear_mix(psoup__backend *be, float *y, float *u, const float *x, const float *x_lora,
                       const psoup__weight *w, const float *bias, const psoup__lora *lora,
                       const psoup__mix *mix, int32_t rows) {
    if (bias) {
        bias_job job = {.y = y, .bias = bias, .rows = (size_t)rows, .out = (size_t)w->out};
        psoup__parallel(be->context, tiles(job.rows, ROW_TILE), bias_task, &job);
    }
    const psoup__gemm_args product = own_product(y, x, w, bias, rows);
    psoup__gemm(be->context, &product);
    if (mix->n == 0)
        return;
    if (!mix->factors) {
        lora_forward(be->context, y, u, x_lora, w, lora, mix, rows);
        return;
    }
    lora_forward(be->context, NULL, u, x_lora, w, lora, mix, rows);
    pool(be->context, u, lora, mix, rows);
    lora_forward(be->context, y, u, NULL, w, lora, mix, rows);
}

/* ---- several that read one x ---------------------------------------------------------------------- */

typedef struct each_job {
    psoup_context *context;
    const psoup__linear *each;
    const float *x;
    const psoup__mix *mix;
    int32_t rows;
} each_job;

static void each_task(void *arg, size_t task, int worker) {
    const each_job *job = arg;
    const psoup__linear *l = &job->each[task];
    if (l->lora)
        lora_forward(job->context, l->y, l->u, job->x, l->w, l->lora, job->mix, job->rows);
}

/* Of few rows a product takes hardly longer than threads need to meet: their own products all at once, then what the
 * adapters add. */
static void linear_mix_each(psoup__backend *be, const psoup__linear *each, int32_t n, const float *x,
                            const psoup__mix *mix, int32_t rows) {
    const psoup__mix none = {0};
    enum { MOST = 8 };
    psoup__gemm_args products[MOST] = {0};
    each_job job = {be->context, each, x, mix, rows};
    bool together = rows <= ROW_TILE && n <= MOST && !mix->factors, adapted = false;
    for (int32_t i = 0; i < n; i++)
        together &= !each[i].bias, adapted |= each[i].lora && mix->n > 0;
    for (int32_t i = 0; i < n; i++)
        if (together)
            products[i] = own_product(each[i].y, x, each[i].w, NULL, rows);
        else
            linear_mix(be, each[i].y, each[i].u, x, x, each[i].w, each[i].bias, each[i].lora,
                       each[i].lora ? mix : &none, rows);
    if (together)
        psoup__gemm_each(be->context, products, (size_t)n);
    if (together && adapted)
        psoup__parallel(be->context, (size_t)n, each_task, &job);
}

/* ---- backward ----------------------------------------------------------------------------------------- */

typedef struct scale_job {
    float *du;      /* [uses, rank] */
    const float *u; /* [uses, rank]; may be du */
    const psoup__lora *lora;
    const psoup__mix *mix;
    int32_t adapter;
    bool pooled; /* dweight: of the rows of factors, once more */
} scale_job;

/* dweight += scale · <du, u>. */
static void dweight_task(void *arg, size_t task, int worker) {
    const scale_job *job = arg;
    const psoup__mix *mix = job->mix;
    const size_t first = (size_t)mix->first[job->adapter];
    const size_t uses = (size_t)mix->first[job->adapter + 1] - first;
    const size_t rank = (size_t)job->lora->rank, end = least((task + 1) * ROW_TILE, uses);
    for (size_t k = task * ROW_TILE; k < end; k++) {
        const size_t row = (size_t)mix->rows[first + k], at = row * (size_t)mix->n + (size_t)job->adapter;
        const bool factors = mix->factors && mix->factors[row];
        if (factors ? mix->weight[at] != 0 : !job->pooled)
            mix->dweight[at] += job->lora->scale * dot(job->du + k * rank, job->u + k * rank, rank);
    }
}

/* du = weight · scale · u. */
static void scale_task(void *arg, size_t task, int worker) {
    const scale_job *job = arg;
    const psoup__mix *mix = job->mix;
    const size_t first = (size_t)mix->first[job->adapter];
    const size_t uses = (size_t)mix->first[job->adapter + 1] - first;
    const size_t rank = (size_t)job->lora->rank, end = least((task + 1) * ROW_TILE, uses);
    for (size_t k = task * ROW_TILE; k < end; k++) {
        float *du = job->du + k * rank;
        const float *u = job->u + k * rank;
        const size_t at = (size_t)mix->rows[first + k] * (size_t)mix->n + (size_t)job->adapter;
        const float factor = mix->weight[at] * job->lora->scale;
        INDEPENDENT
        for (size_t j = 0; j < rank; j++)
            du[j] = u[j] * factor;
    }
}

/* du = dy B on the rows of one adapter. */
static void lora_du(psoup_context *context, float *du, const float *dy, const psoup__lora *lora,
                    const psoup__mix *mix, int32_t adapter, int32_t out) {
    psoup__gemm(context, &(psoup__gemm_args){
                             .m = mix->first[adapter + 1] - mix->first[adapter], .n = lora->rank, .k = out,
                             .c = du, .c_stride = lora->rank,
                             .a = dy, .a_row = out, .a_col = 1, .a_rows = mix->rows + mix->first[adapter],
                             .alpha = 1, .b = lora->b, .b_dtype = PSOUP_F32,
                             .b_row = lora->rank, .b_col = 1});
}

typedef struct db_job {
    psoup_context *context;
    float *db;       /* [out, rank] */
    const float *dy; /* [rows, out] */
    const float *u;  /* [p->n …, rank] from p->start on, scaled */
    int32_t rank;
    const row_pick *p;
    size_t out, width, across; /* columns of a task, and tasks across dBᵀ */
} db_job;

/* Some rows and columns of dBᵀ += uᵀ dy, with u scaled. dy is wide and u is narrow: this way round the product reads dy
 * where it stands, in whole vectors (4 times as fast; rank 8, 64 columns, Zen 4). */
static void db_task(void *arg, size_t task, int worker) {
    const db_job *job = arg;
    const row_pick *p = job->p;
    const size_t rank = (size_t)job->rank, first = task / job->across * DB_ROWS;
    const size_t column = task % job->across * job->width;
    const size_t rows = least(DB_ROWS, rank - first), columns = least(job->width, job->out - column);
    float turned[DB_ROWS * DB_COLUMNS], *db = job->db + column * rank + first;
    for (size_t j = 0; j < columns; j++)
        for (size_t i = 0; i < rows; i++)
            turned[i * columns + j] = db[j * rank + i];
    psoup__gemm(job->context, &(psoup__gemm_args){
                                  .m = (int64_t)rows, .n = (int64_t)columns, .k = p->n,
                                  .c = turned, .c_stride = (int64_t)columns, .accumulate = true,
                                  .a = job->u + first, .a_row = 1, .a_col = (int64_t)rank,
                                  .a_depth = p->whole ? NULL : p->local, .alpha = 1,
                                  .b = job->dy + column + (p->whole ? (size_t)p->row[0] * job->out : 0),
                                  .b_dtype = PSOUP_F32, .b_row = (int64_t)job->out, .b_col = 1,
                                  .b_depth = p->whole ? NULL : p->row});
    for (size_t j = 0; j < columns; j++)
        for (size_t i = 0; i < rows; i++)
            db[j * rank + i] = turned[i * columns + j];
}

/* dB += dyᵀ (w · scale · u), by PICK rows at a time as what follows; scaled: scratch of u's size. */
static void lora_db(psoup_context *context, const float *dy, const float *u, float *scaled, const psoup__lora *lora,
                    const psoup__mix *mix, int32_t adapter, int32_t out) {
    const int32_t uses = mix->first[adapter + 1] - mix->first[adapter], rank = lora->rank;
    const size_t width = out <= DB_COLUMNS ? DB_COLUMNS / 2 : DB_COLUMNS; /* two tasks at least */
    const size_t across = tiles((size_t)out, width);
    scale_job scale = {scaled, u, lora, mix, adapter, false};
    psoup__parallel(context, tiles((size_t)uses, ROW_TILE), scale_task, &scale);
    for (int32_t start = 0; start < uses; start += PICK) {
        row_pick p;
        pick_rows(&p, mix, adapter, start);
        db_job job = {context, lora->db, dy, scaled + (size_t)start * (size_t)rank, rank, &p, (size_t)out, width, across};
        if (p.n)
            psoup__parallel(context, across * tiles((size_t)rank, DB_ROWS), db_task, &job);
    }
}

/* dA += duᵀ x and dx += du A, with du scaled. */
static void lora_da(psoup_context *context, float *dx_lora, const float *du, const float *x_lora,
                    const psoup__lora *lora, const psoup__mix *mix, int32_t adapter, int32_t in) {
    const int32_t uses = mix->first[adapter + 1] - mix->first[adapter], rank = lora->rank;
    for (int32_t start = 0; start < uses; start += PICK) {
        row_pick p;
        pick_rows(&p, mix, adapter, start);
        if (p.n == 0)
            continue;
        const float *du_start = du + (size_t)start * (size_t)rank;
        if (lora->da)
            psoup__gemm(context, &(psoup__gemm_args){
                                     .m = rank, .n = in, .k = p.n,
                                     .c = lora->da, .c_stride = in, .accumulate = true,
                                     .a = du_start, .a_row = 1, .a_col = rank,
                                     .a_depth = p.whole ? NULL : p.local, .alpha = 1,
                                     .b = x_lora + (p.whole ? (size_t)p.row[0] * (size_t)in : 0),
                                     .b_dtype = PSOUP_F32, .b_row = in, .b_col = 1,
                                     .b_depth = p.whole ? NULL : p.row});
        if (dx_lora)
            psoup__gemm(context, &(psoup__gemm_args){
                                     .m = p.n, .n = in, .k = rank,
                                     .c = dx_lora, .c_stride = in, .c_rows = p.row,
                                     .accumulate = true,
                                     .a = du_start, .a_row = rank, .a_col = 1, .a_rows = p.local,
                                     .alpha = 1, .b = lora->a, .b_dtype = PSOUP_F32,
                                     .b_row = in, .b_col = 1});
    }
}

/* The gradients of an adapter's A and of its part of the input, from du, which is pooled by now. */
static void lora_backward(psoup_context *context, float *dx_lora, float *du, const float *x_lora, float *u,
                          const psoup__weight *w, const psoup__lora *lora, const psoup__mix *mix, int32_t adapter) {
    const size_t tasks = tiles((size_t)(mix->first[adapter + 1] - mix->first[adapter]), ROW_TILE);
    scale_job job = {du, u, lora, mix, adapter, true};
    if (mix->factors && mix->dweight) { /* u was pooled: once more by itself */
        const lora_job down = {.context = context, .x = x_lora, .mix = mix, .in = w->in};
        lora_down(&down, u, lora, adapter, 0, mix->first[adapter + 1] - mix->first[adapter]);
        psoup__parallel(context, tasks, dweight_task, &job);
    }
    if (!lora->da && !dx_lora)
        return;
    job.u = du;
    psoup__parallel(context, tasks, scale_task, &job);
    lora_da(context, dx_lora, du, x_lora, lora, mix, adapter, w->in);
}

static void linear_mix_backward(psoup__backend *be, float *dx, float *dx_lora, float *dw,
                                float *dbias, float *du, const float *dy, const float *x,
                                const float *x_lora, float *u, const psoup__weight *w,
                                const psoup__lora *lora, const psoup__mix *mix, int32_t rows) {
    if (dx)
        psoup__gemm(be->context, &(psoup__gemm_args){
                                     .m = rows, .n = w->in, .k = w->out,
                                     .c = dx, .c_stride = w->in, .accumulate = true,
                                     .a = dy, .a_row = w->out, .a_col = 1, .alpha = 1,
                                     .b = w->data, .b_dtype = w->dtype, .b_scales = w->scales,
                                     .b_row = w->in, .b_col = 1, .packed = w->backward});
    if (dw)
        psoup__gemm(be->context, &(psoup__gemm_args){
                                     .m = w->out, .n = w->in, .k = rows,
                                     .c = dw, .c_stride = w->in, .accumulate = true,
                                     .a = dy, .a_row = 1, .a_col = w->out, .alpha = 1,
                                     .b = x, .b_dtype = PSOUP_F32, .b_row = w->in, .b_col = 1});
    if (dbias) {
        bias_job job = {.dbias = dbias, .dy = dy, .rows = (size_t)rows, .out = (size_t)w->out};
        psoup__parallel(be->context, tiles(job.out, BIAS_TILE), dbias_task, &job);
    }
    const float *u_next = u;
    float *du_next = du;
    for (int32_t i = 0; i < mix->n; i++) {
        const size_t uses = (size_t)(mix->first[i + 1] - mix->first[i]), rank = (size_t)lora[i].rank;
        scale_job job = {du_next, u_next, &lora[i], mix, i, false};
        if (uses * rank > 0 && lora[i].db)
            lora_db(be->context, dy, u_next, du_next, &lora[i], mix, i, w->out);
        if (uses * rank > 0 && (dx_lora || lora[i].da || mix->dweight || mix->factors)) {
            lora_du(be->context, du_next, dy, &lora[i], mix, i, w->out);
            if (mix->dweight)
                psoup__parallel(be->context, tiles(uses, ROW_TILE), dweight_task, &job);
        }
        u_next += uses * rank;
        du_next += uses * rank;
    }
    pool(be->context, du, lora, mix, rows);
    for (int32_t i = 0; i < mix->n; i++) {
        const size_t count = (size_t)(mix->first[i + 1] - mix->first[i]) * (size_t)lora[i].rank;
        if (count > 0)
            lora_backward(be->context, dx_lora, du, x_lora, u, w, &lora[i], mix, i);
        du += count;
        u += count;
    }
}

void PSOUP__NAME(psoup__cpu_fill_linear_mix)(psoup__ops *ops) {
    ops->linear_mix = linear_mix;
    ops->linear_mix_each = linear_mix_each;
    ops->linear_mix_backward = linear_mix_backward;
}
