/* What stands between the linear layers. */
#include "gpu/internal.h"

static void rmsnorm(psoup__backend *be, float *out, float *rstd, float *x, const float *y, const float *weight,
                    float epsilon, int32_t rows, int32_t width) {
    PSOUP__LAUNCH(psoup__gpu_of(be), rmsnorm,
                  ((psoup__grid){(unsigned)rows, 1, 1, PSOUP__NORM_THREADS, 0}),
                  {out, rstd, x, y, weight, epsilon, width});
}

/* Rows by themselves where no sums are asked for. */
static void rmsnorm_backward(psoup__backend *be, float *dx, float *dweight, const float *dout, const float *x,
                             const float *weight, const float *rstd, int32_t rows, int32_t width) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    const int32_t kept = PSOUP__NORM_THREADS * 4 * PSOUP__NORM_KEPT;
    const int32_t kept_wide = PSOUP__NORM_WIDE * 4 * PSOUP__NORM_KEPT;
    psoup__row_sums sums = {.each = 1, .blocks = rows};
    if (dweight)
        sums = psoup__gpu_row_sums(gpu, dweight, rows, width);
    psoup__rmsnorm_backward_args args = {dx, sums.sums, dout, x, weight, rstd, rows, sums.each, width, 0};
    psoup__grid grid = {(unsigned)sums.blocks, 1, 1, PSOUP__NORM_WIDE, 0};
    psoup__kernel kernel = PSOUP__KERNEL_rmsnorm_backward_wide;
    if (width <= kept) {
        grid.threads = PSOUP__NORM_THREADS;
        kernel = dweight ? PSOUP__KERNEL_rmsnorm_backward_sums : PSOUP__KERNEL_rmsnorm_backward;
    } else if (width <= kept_wide)
        kernel = dweight ? PSOUP__KERNEL_rmsnorm_backward_sums_512 : PSOUP__KERNEL_rmsnorm_backward_512;
    psoup__gpu_launch(gpu, kernel, grid, &args);
    if (dweight)
        psoup__gpu_row_sums_end(gpu, &sums);
}

static void rope(psoup__backend *be, float *x, const float *cos_sin, const int32_t *position, int32_t rows,
                 int32_t heads, int32_t head_dim, int64_t stride, bool inverse) {
    PSOUP__LAUNCH(psoup__gpu_of(be), rope, psoup__gpu_rows(rows, heads * ((head_dim / 2 + 3) / 4)),
                  {x, cos_sin, position, stride, heads, head_dim, inverse ? -1.0f : 1.0f, 0});
}

static void rope_append(psoup__backend *be, float *q, float *k, const float *v, const float *cos_sin,
                        const int32_t *position, const psoup__keys *cache, const int32_t *place, int32_t rows,
                        const psoup__attention_shape *shape) {
    const psoup__kernel kernel = cache->dtype == PSOUP_BF16  ? PSOUP__KERNEL_rope_append_bf16
                                 : cache->dtype == PSOUP_F16 ? PSOUP__KERNEL_rope_append_f16
                                                             : PSOUP__KERNEL_rope_append_f32;
    const psoup__rope_append_args args = {q, {q, k, v}, {cache->k, cache->v}, cos_sin, position, place, cache->stride,
                                          shape->heads, shape->kv_heads, shape->head_dim, 0};
    psoup__grid grid = psoup__gpu_rows(rows, shape->heads * ((shape->head_dim / 2 + 3) / 4));
    grid.y = 3;
    psoup__gpu_launch(psoup__gpu_of(be), kernel, grid, &args);
}

static void swiglu(psoup__backend *be, float *out, const float *gate, const float *up, size_t n) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    PSOUP__LAUNCH(gpu, swiglu, psoup__gpu_flat(gpu, n, 4), {out, gate, up, n});
}

static void swiglu_backward(psoup__backend *be, float *dgate, float *dup, const float *dout,
                            const float *gate, const float *up, size_t n) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    PSOUP__LAUNCH(gpu, swiglu_backward, psoup__gpu_flat(gpu, n, 4), {dgate, dup, dout, gate, up, n});
}

static void add(psoup__backend *be, float *x, const float *y, size_t n) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    PSOUP__LAUNCH(gpu, add, psoup__gpu_flat(gpu, n, 4), {x, y, n});
}

/* A piece of the rows at a time: its three tables together fit what may be staged for one kernel. */
static void drop(psoup__gpu *gpu, psoup__kernel kernel, float *out, const float *in,
                 const psoup__dropout *dropout, int32_t rows, int32_t width) {
    const int32_t most = 1 << 16;
    for (int32_t first = 0, n; first < rows; first += n) {
        n = rows - first < most ? rows - first : most;
        const size_t at = (size_t)first * (size_t)width, bytes = (size_t)n * sizeof(uint64_t);
        const psoup__dropout_args args = {.out = out + at, .in = in + at,
                                          .seed = psoup__gpu_stage(gpu, dropout->seed + first, bytes),
                                          .stream = psoup__gpu_stage(gpu, dropout->stream + first, bytes),
                                          .offset = psoup__gpu_stage(gpu, dropout->offset + first, bytes),
                                          .p = dropout->p,
                                          .scale = 1.0f / (1.0f - dropout->p),
                                          .width = width};
        psoup__gpu_launch(gpu, kernel, psoup__gpu_rows(n, (width + 3) / 4), &args);
    }
}

static void dropout(psoup__backend *be, float *out, const float *in, const psoup__dropout *options,
                    int32_t rows, int32_t width) {
    if (options->p > 0)
        drop(psoup__gpu_of(be), PSOUP__KERNEL_dropout, out, in, options, rows, width);
    else if (out != in)
        be->ops->copy(be, out, in, (size_t)rows * (size_t)width * sizeof(float));
}

static void dropout_backward(psoup__backend *be, float *dx, const float *dout, const psoup__dropout *options,
                             int32_t rows, int32_t width) {
    if (options->p > 0)
        drop(psoup__gpu_of(be), PSOUP__KERNEL_dropout_backward, dx, dout, options, rows, width);
    else
        add(be, dx, dout, (size_t)rows * (size_t)width);
}

void psoup__gpu_fill_layer(psoup__ops *ops) {
    ops->rmsnorm = rmsnorm;
    ops->rmsnorm_backward = rmsnorm_backward;
    ops->rope = rope;
    ops->rope_append = rope_append;
    ops->swiglu = swiglu;
    ops->swiglu_backward = swiglu_backward;
    ops->add = add;
    ops->dropout = dropout;
    ops->dropout_backward = dropout_backward;
}
