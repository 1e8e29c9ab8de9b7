/* The one primitive of the library: a frozen linear layer plus each row's own mix of adapters. Every
 * product is psoup__gemm, which gathers and scatters rows, so no row is copied and adapters nobody
 * uses cost nothing.
 *
 *     u_i = x_i A_iᵀ        y_i += (w·s_i·u_i) B_iᵀ          (x_i, y_i: the rows that use adapter i)
 *
 *     du_i = dy_i B_i       dw_i += s_i <du_i, u_i>           dB_i += dy_iᵀ (w·s_i·u_i)
 *     du_i *= w·s_i         dA_i += du_iᵀ x_i                 dx_i += du_i A_i
 */
#include "cpu/variant.h"
#include "cpu/vector.h"

enum { PICK = 512, BIAS_TILE = 64, ROW_TILE = 64 };

/* Up to PICK of the rows that adapter i lists, without those of weight zero: a row that is not to
 * feel an adapter must not be multiplied by 0 · NaN either. `start` is where they begin in u_i. */
typedef struct row_pick {
    int32_t start, n;
    int32_t local[PICK]; /* row of u_i, counted from start */
    int32_t row[PICK];   /* row of x and y */
    float weight[PICK];  /* of row start + k of u_i, used or not */
} row_pick;

static void pick_rows(row_pick *pick, const psoup__mix *mix, int32_t adapter, int32_t start) {
    const int32_t first = mix->first[adapter], uses = mix->first[adapter + 1] - first;
    pick->start = start;
    pick->n = 0;
    for (int32_t k = 0; k < PICK && start + k < uses; k++) {
        const int32_t row = mix->rows[first + start + k];
        const float weight = mix->weight[(size_t)row * (size_t)mix->n + (size_t)adapter];
        pick->weight[k] = weight;
        if (weight == 0)
            continue;
        pick->local[pick->n] = k;
        pick->row[pick->n++] = row;
    }
}

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

/* y += (w · scale · u) Bᵀ on the rows of one adapter. */
static void lora_up(psoup_context *context, float *y /* [rows, out] */,
                    const float *u /* [uses, rank] */, const psoup__lora *lora,
                    const psoup__mix *mix, int32_t adapter, int32_t out) {
    const int32_t uses = mix->first[adapter + 1] - mix->first[adapter];
    for (int32_t start = 0; start < uses; start += PICK) {
        row_pick p;
        pick_rows(&p, mix, adapter, start);
        if (p.n)
            psoup__gemm(context, &(psoup__gemm_args){
                                     .m = p.n, .n = out, .k = lora->rank,
                                     .c = y, .c_stride = out, .c_rows = p.row, .accumulate = true,
                                     .a = u + (size_t)start * (size_t)lora->rank,
                                     .a_row = lora->rank, .a_col = 1, .a_rows = p.local,
                                     .a_scale = p.weight, .a_scale_stride = 1, .alpha = lora->scale,
                                     .b = lora->b, .b_dtype = PSOUP_F32,
                                     .b_row = 1, .b_col = lora->rank});
    }
}

static void linear_mix(psoup__backend *be, float *y, float *u, const float *x, const float *x_lora,
                       const psoup__weight *w, const float *bias, const psoup__lora *lora,
                       const psoup__mix *mix, int32_t rows) {
    if (bias) {
        bias_job job = {.y = y, .bias = bias, .rows = (size_t)rows, .out = (size_t)w->out};
        psoup__parallel(be->context, tiles(job.rows, ROW_TILE), bias_task, &job);
    }
    psoup__gemm(be->context, &(psoup__gemm_args){
                                 .m = rows, .n = w->out, .k = w->in,
                                 .c = y, .c_stride = w->out, .accumulate = bias != NULL,
                                 .a = x, .a_row = w->in, .a_col = 1, .alpha = 1,
                                 .b = w->data, .b_dtype = w->dtype, .b_row = 1, .b_col = w->in,
                                 .packed = w->forward});
    for (int32_t i = 0; i < mix->n; i++) {
        const int32_t uses = mix->first[i + 1] - mix->first[i];
        if (uses == 0 || lora[i].rank == 0)
            continue;
        psoup__gemm(be->context, &(psoup__gemm_args){
                                     .m = uses, .n = lora[i].rank, .k = w->in,
                                     .c = u, .c_stride = lora[i].rank,
                                     .a = x_lora, .a_row = w->in, .a_col = 1,
                                     .a_rows = mix->rows + mix->first[i], .alpha = 1,
                                     .b = lora[i].a, .b_dtype = PSOUP_F32,
                                     .b_row = 1, .b_col = w->in});
        lora_up(be->context, y, u, &lora[i], mix, i, w->out);
        u += (size_t)uses * (size_t)lora[i].rank;
    }
}

typedef struct scale_job {
    float *du;      /* [uses, rank] */
    const float *u; /* [uses, rank] */
    const psoup__lora *lora;
    const psoup__mix *mix;
    int32_t adapter;
} scale_job;

/* dweight += scale · <du, u>, then du *= weight · scale. */
static void scale_task(void *arg, size_t task, int worker) {
    const scale_job *job = arg;
    const psoup__mix *mix = job->mix;
    const size_t first = (size_t)mix->first[job->adapter];
    const size_t uses = (size_t)mix->first[job->adapter + 1] - first;
    const size_t rank = (size_t)job->lora->rank, end = least((task + 1) * ROW_TILE, uses);
    const float scale = job->lora->scale;
    for (size_t k = task * ROW_TILE; k < end; k++) {
        float *du = job->du + k * rank;
        const size_t at = (size_t)mix->rows[first + k] * (size_t)mix->n + (size_t)job->adapter;
        if (mix->dweight)
            mix->dweight[at] += scale * dot(du, job->u + k * rank, rank);
        const float factor = mix->weight[at] * scale;
        for (size_t j = 0; j < rank; j++)
            du[j] *= factor;
    }
}

/* The gradients of one adapter and of its part of the input. */
static void lora_backward(psoup_context *context, float *dx_lora, float *du, const float *dy,
                          const float *x_lora, const float *u, const psoup__weight *w,
                          const psoup__lora *lora, const psoup__mix *mix, int32_t adapter) {
    const int32_t first = mix->first[adapter], uses = mix->first[adapter + 1] - first;
    const int32_t rank = lora->rank;
    psoup__gemm(context, &(psoup__gemm_args){
                             .m = uses, .n = rank, .k = w->out,
                             .c = du, .c_stride = rank,
                             .a = dy, .a_row = w->out, .a_col = 1, .a_rows = mix->rows + first,
                             .alpha = 1, .b = lora->b, .b_dtype = PSOUP_F32,
                             .b_row = rank, .b_col = 1});
    scale_job scale = {du, u, lora, mix, adapter};
    psoup__parallel(context, tiles((size_t)uses, ROW_TILE), scale_task, &scale);
    for (int32_t start = 0; start < uses; start += PICK) {
        row_pick p;
        pick_rows(&p, mix, adapter, start);
        if (p.n == 0)
            continue;
        const float *du_start = du + (size_t)start * (size_t)rank;
        const float *u_start = u + (size_t)start * (size_t)rank;
        if (lora->db)
            psoup__gemm(context, &(psoup__gemm_args){
                                     .m = w->out, .n = rank, .k = p.n,
                                     .c = lora->db, .c_stride = rank, .accumulate = true,
                                     .a = dy, .a_row = 1, .a_col = w->out, .a_depth = p.row,
                                     .a_scale = mix->weight + adapter, .a_scale_stride = mix->n,
                                     .a_scale_by_depth = true, .alpha = lora->scale,
                                     .b = u_start, .b_dtype = PSOUP_F32, .b_row = rank, .b_col = 1,
                                     .b_depth = p.local});
        if (lora->da)
            psoup__gemm(context, &(psoup__gemm_args){
                                     .m = rank, .n = w->in, .k = p.n,
                                     .c = lora->da, .c_stride = w->in, .accumulate = true,
                                     .a = du_start, .a_row = 1, .a_col = rank, .a_depth = p.local,
                                     .alpha = 1, .b = x_lora, .b_dtype = PSOUP_F32,
                                     .b_row = w->in, .b_col = 1, .b_depth = p.row});
        if (dx_lora)
            psoup__gemm(context, &(psoup__gemm_args){
                                     .m = p.n, .n = w->in, .k = rank,
                                     .c = dx_lora, .c_stride = w->in, .c_rows = p.row,
                                     .accumulate = true,
                                     .a = du_start, .a_row = rank, .a_col = 1, .a_rows = p.local,
                                     .alpha = 1, .b = lora->a, .b_dtype = PSOUP_F32,
                                     .b_row = w->in, .b_col = 1});
    }
}

static void linear_mix_backward(psoup__backend *be, float *dx, float *dx_lora, float *dw,
                                float *dbias, float *du, const float *dy, const float *x,
                                const float *x_lora, const float *u, const psoup__weight *w,
                                const psoup__lora *lora, const psoup__mix *mix, int32_t rows) {
    if (dx)
        psoup__gemm(be->context, &(psoup__gemm_args){
                                     .m = rows, .n = w->in, .k = w->out,
                                     .c = dx, .c_stride = w->in, .accumulate = true,
                                     .a = dy, .a_row = w->out, .a_col = 1, .alpha = 1,
                                     .b = w->data, .b_dtype = w->dtype,
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
    for (int32_t i = 0; i < mix->n; i++) {
        const int32_t uses = mix->first[i + 1] - mix->first[i];
        if (uses == 0 || lora[i].rank == 0)
            continue;
        if (dx_lora || lora[i].da || lora[i].db || mix->dweight)
            lora_backward(be->context, dx_lora, du, dy, x_lora, u, w, &lora[i], mix, i);
        du += (size_t)uses * (size_t)lora[i].rank;
        u += (size_t)uses * (size_t)lora[i].rank;
    }
}

void PSOUP__NAME(psoup__cpu_fill_linear_mix)(psoup__ops *ops) {
    ops->linear_mix = linear_mix;
    ops->linear_mix_backward = linear_mix_backward;
}
