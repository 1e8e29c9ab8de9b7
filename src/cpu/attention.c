/* Causal softmax attention over spans, in one pass over the keys (online softmax: Milakov & Gimelshein
 * 2018; in tiles: Dao et al. 2022, FlashAttention).
 *
 * A query's bits depend on itself and on keys 0 … p alone: keys are taken in tiles counted from key
 * 0, every score is the same sum over head_dim, and the values are added in the order of the keys.
 * So training, prefill and decoding one by one from a cache agree to the bit. Keys beyond p are never
 * multiplied by zero: they are not touched, or what came of them is replaced.
 */
#include "cpu/variant.h"
#include "cpu/vector.h"

enum { KEYS = 64, ROWS = 32 }; /* keys in a tile, rows (a query with a head) of a task */

/* Lane i: <q, key i>, for n <= LANES keys `stride` apart; the lanes from n on repeat key n − 1. */
static inline __attribute__((always_inline)) vec dots_of(const float *q, const float *k,
                                                         int64_t stride, int n, int dim) {
    vec sum[LANES];
    const int whole = dim - dim % LANES;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        sum[i] = (vec){0};
    for (int d = 0; d < whole; d += LANES) {
        const vec x = load(q + d);
        const float *key = k + d;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            sum[i] = vec_fused(x, load(key), sum[i]);
            key += i < n - 1 ? stride : 0;
        }
    }
    vec dots = sum_each(sum);
    if (whole < dim) {
        float rest[LANES];
        for (int i = 0; i < LANES; i++) {
            const float *key = k + (i < n - 1 ? i : n - 1) * stride;
            rest[i] = 0;
            for (int d = whole; d < dim; d++)
                rest[i] = fused(q[d], key[d], rest[i]);
        }
        dots += load(rest);
    }
    return dots;
}

/* dots[j] = <q, key j> for n <= KEYS keys; from n on up to KEYS they are `otherwise`. */
static void tile_dots(float dots[KEYS], const float *q, const float *k, int64_t stride, int n,
                      int dim, float otherwise) {
    int j = 0;
    for (; j + LANES <= n; j += LANES)
        store(dots + j, dots_of(q, k + j * stride, stride, LANES, dim));
    if (j < n)
        store(dots + j, dots_of(q, k + j * stride, stride, n - j, dim));
    for (j = n; j < KEYS; j++)
        dots[j] = otherwise;
}

/* `count` vectors of out = out · keep + Σ_j weight[j · step] · row j, in the order of j. */
static inline __attribute__((always_inline)) void add_vectors(float *out, float keep,
                                                              const float *weight, int step,
                                                              const float *rows, int64_t stride,
                                                              int n, const int count) {
    vec sum[8];
#pragma GCC unroll 8
    for (int c = 0; c < count; c++)
        sum[c] = load(out + c * LANES) * keep;
    for (int j = 0; j < n; j++) {
        const vec w = splat(weight[j * step]);
#pragma GCC unroll 8
        for (int c = 0; c < count; c++)
            sum[c] = vec_fused(w, load(rows + c * LANES), sum[c]);
        rows += stride;
    }
#pragma GCC unroll 8
    for (int c = 0; c < count; c++)
        store(out + c * LANES, sum[c]);
}

static void add_rows(float *out /* [dim] */, float keep, const float *weight, int step,
                     const float *rows, int64_t stride, int n, int dim) {
    int d = 0;
    for (; d + 8 * LANES <= dim; d += 8 * LANES)
        add_vectors(out + d, keep, weight, step, rows + d, stride, n, 8);
    for (; d + 4 * LANES <= dim; d += 4 * LANES)
        add_vectors(out + d, keep, weight, step, rows + d, stride, n, 4);
    for (; d + LANES <= dim; d += LANES)
        add_vectors(out + d, keep, weight, step, rows + d, stride, n, 1);
    for (; d < dim; d++) {
        float sum = out[d] * keep;
        for (int j = 0; j < n; j++)
            sum = fused(weight[j * step], rows[j * stride + d], sum);
        out[d] = sum;
    }
}

/* How many keys of the tile at `start` a query at `position` sees. */
static inline int keys_seen(int64_t position, int64_t start) {
    const int64_t n = position + 1 - start;
    return n < 0 ? 0 : n > KEYS ? KEYS : (int)n;
}

typedef struct attention_job {
    float *out, *lse, *dq;                /* [rows, heads · head_dim], [rows, heads] */
    const float *q, *dout, *saved;        /* [rows, heads · head_dim]; saved: the forward's out */
    const float *saved_lse;               /* [rows, heads] */
    const psoup__span *spans;
    const psoup__attention_shape *shape;
    size_t blocks; /* of the span with most queries */
} attention_job;

/* One tile of keys for one row: out, and the running maximum and sum of its softmax. */
static void attend_tile(float *out, float *max, float *sum, const float *q, const psoup__span *span,
                        int64_t start, int64_t head, int n, const psoup__attention_shape *shape) {
    const int dim = shape->head_dim;
    const int64_t at = start * span->stride + head * dim;
    float p[KEYS];
    tile_dots(p, q, span->k + at, span->stride, n, dim, -__builtin_inff());
    vec most = splat(*max);
    for (int j = 0; j < KEYS; j += LANES) {
        const vec scores = load(p + j) * shape->scale;
        store(p + j, scores);
        most = vec_max(scores, most);
    }
    const float new_max = max_lanes(most), keep = exp_float(*max - new_max);
    for (int j = 0; j < KEYS; j++)
        p[j] = exp_float(p[j] - new_max);
    vec lanes = {0};
    for (int j = 0; j < KEYS; j += LANES)
        lanes += load(p + j);
    *max = new_max;
    *sum = *sum * keep + sum_lanes(lanes);
    add_rows(out, keep, p, 1, span->v + at, span->stride, n, dim);
}

/* ROWS rows of one span and key head: its queries, and for each the heads that share the key head. */
static void attention_task(void *arg, size_t task, int worker) {
    const attention_job *job = arg;
    const psoup__attention_shape *shape = job->shape;
    const int64_t kv_heads = shape->kv_heads, group = shape->heads / kv_heads, dim = shape->head_dim;
    const psoup__span *span = &job->spans[task / job->blocks / (size_t)kv_heads];
    const int64_t kv_head = (int64_t)(task / job->blocks % (size_t)kv_heads);
    const int64_t first = (int64_t)(task % job->blocks) * ROWS;
    const int64_t all = span->queries * group, rows = all - first < ROWS ? all - first : ROWS;
    if (rows <= 0)
        return;
    const int64_t past = span->keys - span->queries;
    const int64_t last = past + (first + rows - 1) / group;
    float max[ROWS], sum[ROWS];
    for (int64_t r = 0; r < rows; r++) {
        const int64_t query = (first + r) / group, head = kv_head * group + (first + r) % group;
        memset(job->out + ((span->query + query) * shape->heads + head) * dim, 0,
               (size_t)dim * sizeof(float));
        max[r] = -__builtin_inff();
        sum[r] = 0;
    }
    for (int64_t start = 0; start <= last; start += KEYS)
        for (int64_t r = 0; r < rows; r++) {
            const int64_t query = (first + r) / group, head = kv_head * group + (first + r) % group;
            const int64_t at = ((span->query + query) * shape->heads + head) * dim;
            const int n = keys_seen(past + query, start);
            if (n)
                attend_tile(job->out + at, &max[r], &sum[r], job->q + at, span, start, kv_head, n,
                            shape);
        }
    for (int64_t r = 0; r < rows; r++) {
        const int64_t query = (first + r) / group, head = kv_head * group + (first + r) % group;
        const int64_t at = (span->query + query) * shape->heads + head;
        float *out = job->out + at * dim;
        const float scale = 1.0f / sum[r];
        for (int64_t d = 0; d < dim; d++)
            out[d] *= scale;
        if (job->lse)
            job->lse[at] = (float)(max[r] + log_double(sum[r]));
    }
}

static void attention(psoup__backend *be, float *out, float *lse, const float *q,
                      const psoup__span *spans, int32_t n_spans,
                      const psoup__attention_shape *shape) {
    attention_job job = {.out = out, .lse = lse, .q = q, .spans = spans, .shape = shape};
    int64_t most = 0;
    for (int32_t i = 0; i < n_spans; i++)
        most = spans[i].queries > most ? spans[i].queries : most;
    job.blocks = tiles((size_t)(most * (shape->heads / shape->kv_heads)), ROWS);
    psoup__parallel(be->context, (size_t)n_spans * (size_t)shape->kv_heads * job.blocks,
                    attention_task, &job);
}

/* A block of queries of one head against a tile of keys. With p = exp(s − lse), D = <dout, out>:
 *     ds = scale · p · (dout vᵀ − D)     dq += ds k     dk += dsᵀ q     dv += pᵀ dout
 */
static void backward_block(const attention_job *job, const psoup__span *span, int64_t head,
                           int64_t kv_head, int64_t start, int64_t first, int64_t rows) {
    const psoup__attention_shape *shape = job->shape;
    const int dim = shape->head_dim;
    const int64_t width = (int64_t)shape->heads * dim, past = span->keys - span->queries;
    const int64_t at = start * span->stride + kv_head * dim; /* of the tile in k, v, dk, dv */
    const int64_t row = (span->query + first) * width + head * dim;
    float p[ROWS][KEYS], ds[ROWS][KEYS];
    for (int64_t r = 0; r < rows; r++) {
        const int n = keys_seen(past + first + r, start);
        if (n == 0)
            continue;
        const int64_t here = row + r * width;
        const float lse = job->saved_lse[(span->query + first + r) * shape->heads + head];
        const float d = dot(job->dout + here, job->saved + here, (size_t)dim);
        const float scale = shape->scale;
        tile_dots(p[r], job->q + here, span->k + at, span->stride, n, dim, -__builtin_inff());
        tile_dots(ds[r], job->dout + here, span->v + at, span->stride, n, dim, 0);
        for (int j = 0; j < KEYS; j++) {
            p[r][j] = exp_float(p[r][j] * scale - lse);
            ds[r][j] = p[r][j] * (ds[r][j] - d) * scale;
        }
        add_rows(job->dq + here, 1, ds[r], 1, span->k + at, span->stride, n, dim);
    }
    const int seen = keys_seen(past + first + rows - 1, start);
    for (int j = 0; j < seen; j++) { /* the rows from `skip` on see key start + j */
        int64_t skip = start + j - past - first;
        skip = skip < 0 ? 0 : skip;
        const int64_t from = row + skip * width, key = at + j * span->stride;
        add_rows(span->dv + key, 1, &p[skip][j], KEYS, job->dout + from, width, (int)(rows - skip),
                 dim);
        add_rows(span->dk + key, 1, &ds[skip][j], KEYS, job->q + from, width, (int)(rows - skip),
                 dim);
    }
}

/* One span and key head: it alone writes its dk and dv, head by head, queries ascending. */
static void backward_task(void *arg, size_t task, int worker) {
    const attention_job *job = arg;
    const psoup__attention_shape *shape = job->shape;
    const int64_t kv_heads = shape->kv_heads, group = shape->heads / kv_heads, dim = shape->head_dim;
    const psoup__span *span = &job->spans[task / (size_t)kv_heads];
    const int64_t kv_head = (int64_t)(task % (size_t)kv_heads), past = span->keys - span->queries;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int64_t query = 0; query < span->queries; query++)
            memset(job->dq + ((span->query + query) * shape->heads + head) * dim, 0,
                   (size_t)dim * sizeof(float));
        for (int64_t start = 0; start < span->keys; start += KEYS)
            for (int64_t first = 0; first < span->queries; first += ROWS) {
                const int64_t left = span->queries - first, rows = left < ROWS ? left : ROWS;
                if (past + first + rows - 1 >= start)
                    backward_block(job, span, head, kv_head, start, first, rows);
            }
    }
}

static void attention_backward(psoup__backend *be, float *dq, const float *dout, const float *q,
                               const float *out, const float *lse, const psoup__span *spans,
                               int32_t n_spans, const psoup__attention_shape *shape) {
    attention_job job = {.dq = dq, .dout = dout, .q = q, .saved = out, .saved_lse = lse,
                         .spans = spans, .shape = shape};
    psoup__parallel(be->context, (size_t)n_spans * (size_t)shape->kv_heads, backward_task, &job);
}

void PSOUP__NAME(psoup__cpu_fill_attention)(psoup__ops *ops) {
    ops->attention = attention;
    ops->attention_backward = attention_backward;
}
