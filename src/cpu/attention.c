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

enum {
    KEYS = 64, /* keys in a tile */
    ROWS = 32, /* rows (a query with a head) of a task */
    FEW = 4,   /* fewer rows than that read the keys where they lie */
    DIM = 128, /* the widest head_dim that is packed */
    LINE = 16, /* floats in a cache line */
    NEAR = 1 << 16 /* floats of keys, and of values, asked for ahead: half an L2 cache */
};

/* Rows that will be read often, packed: at a stride of a power of two, which projections have, they
 * push each other out of the first-level cache (packing made head_dim 64 and 128 1.4 to 1.9 times
 * as fast on a Zen 4). Returns the rows to read and sets their stride; too wide a row stays. */
static const float *packed(float room[] /* [n, DIM] */, const float *rows, int64_t *stride, int64_t n,
                           int64_t dim) {
    if (dim > DIM)
        return rows;
    for (int64_t i = 0; i < n; i++)
        if (dim == LINE) /* by one or two vectors, without a call */
            memcpy(room + i * LINE, rows + i * *stride, LINE * sizeof *room);
        else
            memcpy(room + i * dim, rows + i * *stride, (size_t)dim * sizeof *room);
    *stride = dim;
    return room;
}

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

/* Lanes after the first n, of 1 … LANES. */
static inline vec_mask lanes_from(int n) {
#if LANES == 16
    const vec_mask place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif LANES == 8
    const vec_mask place = {0, 1, 2, 3, 4, 5, 6, 7};
#else
    const vec_mask place = {0, 1, 2, 3};
#endif
    return place >= (vec_mask){0} + n;
}

/* After n values, n > 0, what makes their last vector whole. */
static inline void fill(float *x, int n, float with) {
    float *last = x + (n - 1) / LANES * LANES;
    const vec_mask beyond = lanes_from((n - 1) % LANES + 1);
    store(last, (vec)(((vec_mask)splat(with) & beyond) | ((vec_mask)load(last) & ~beyond)));
}

/* dots[j] = <q, key j> for n <= KEYS keys, n > 0; from n on up to whole vectors they are `otherwise`. */
static void tile_dots(float dots[KEYS], const float *q, const float *k, int64_t stride, int n,
                      int dim, float otherwise) {
    int j = 0;
    for (; j + LANES <= n; j += LANES)
        store(dots + j, dots_of(q, k + j * stride, stride, LANES, dim));
    if (j < n)
        store(dots + j, dots_of(q, k + j * stride, stride, n - j, dim));
    fill(dots, n, otherwise);
}

/* The first half of a and of b, or the second, one of a and one of b in turn. */
static inline vec halves(vec a, vec b, bool second) {
#if LANES == 16
    return second ? __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
                  : __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif LANES == 8
    return second ? __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
                  : __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return second ? __builtin_shufflevector(a, b, 2, 6, 3, 7) : __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

/* turned[d][j] = rows[j][d] for n rows, the last of them repeated to a whole vector; dim is a multiple of LANES. */
static void turn(float *turned /* [dim, KEYS] */, const float *rows, int64_t stride, int64_t n, int64_t dim) {
    for (int64_t j = 0; j < n; j += LANES)
        for (int64_t d = 0; d < dim; d += LANES) {
            vec a[LANES], b[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                a[i] = load(rows + (j + i < n ? j + i : n - 1) * stride + d);
#pragma GCC unroll 4
            for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++)
                    b[i] = halves(a[i / 2], a[i / 2 + LANES / 2], i % 2);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i++)
                    a[i] = b[i];
            }
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                store(turned + (d + i) * KEYS + j, a[i]);
        }
}

/* Lane i of sum_each's tree, of LANES keys at once: Σ q[d] · key[d], d = i, i + LANES, …; x: q[i], for all of them. */
static inline __attribute__((always_inline)) vec lane(vec x, const float *q, const float *turned, int i, int dim) {
    vec sum = vec_fused(x, load(turned + i * KEYS), (vec){0});
    for (int d = i + LANES; d < dim; d += LANES)
        sum = vec_fused(splat(q[d]), load(turned + d * KEYS), sum);
    return sum;
}

/* tile_dots of keys that were turned, to the same bits: neighbours are added first, as sum_each does, but without
 * shuffling. */
static inline __attribute__((always_inline)) void turned_columns(float dots[KEYS], const float *q, const float *turned,
                                                                 int n, const int dim) {
    vec x[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        x[i] = splat(q[i]);
    for (int j = 0; j < n; j += LANES) {
        vec sum[LANES / 4];
#pragma GCC unroll 4
        for (int i = 0; i < LANES / 4; i++)
            sum[i] = (lane(x[4 * i], q, turned + j, 4 * i, dim) + lane(x[4 * i + 1], q, turned + j, 4 * i + 1, dim)) +
                     (lane(x[4 * i + 2], q, turned + j, 4 * i + 2, dim) + lane(x[4 * i + 3], q, turned + j, 4 * i + 3, dim));
#if LANES == 16
        sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
#elif LANES == 8
        sum[0] = sum[0] + sum[1];
#endif
        store(dots + j, sum[0]);
    }
}

static void turned_dots(float dots[KEYS], const float *q, const float *turned, int n, int dim, float otherwise) {
    if (dim == LANES)
        turned_columns(dots, q, turned, n, LANES);
    else if (dim == 4 * LANES)
        turned_columns(dots, q, turned, n, 4 * LANES);
    else
        turned_columns(dots, q, turned, n, dim);
    fill(dots, n, otherwise);
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

/* One of several sums that are made at once: out = out · keep + Σ_j weight[j · step] · row j, j from `from` to `to`. */
typedef struct weighted {
    float *out; /* [dim] */
    float keep;
    const float *weight;
    int from, to;
} weighted;

/* Adds to sum[i] its products with the `count` − 1 rows from `first` on: with row t where i > t, or (upper) i <= t. */
static inline __attribute__((always_inline)) void add_triangle(vec sum[8], const weighted *w, int first, int step,
                                                               const float *rows, int64_t stride, const int count,
                                                               const bool upper) {
#pragma GCC unroll 8
    for (int t = 0; t < count - 1; t++) {
        const vec row = load(rows + (first + t) * stride);
#pragma GCC unroll 8
        for (int i = 0; i < count; i++)
            if (upper ? i <= t : i > t)
                sum[i] = vec_fused(splat(w[i].weight[(first + t) * step]), row, sum[i]);
    }
}

/* One vector of `count` such sums over the same rows. Each adds in the order of j; together they wait for no result of
 * the multiply-add before (eight are 4 times as fast as one after another; head_dim 16, Zen 4). */
static inline __attribute__((always_inline)) void add_columns(const weighted *w, int d, int step, const float *rows,
                                                              int64_t stride, const int count) {
    vec sum[8];
    int first = w[0].from, all = first, some = w[0].to, last = some; /* all: from there on, and below some, all add */
    bool begins = true, ends = true; /* each one row after the one before, and no row else is not for all */
    rows += d;
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) {
        sum[i] = load(w[i].out + d) * w[i].keep;
        begins &= w[i].from == w[0].from + i && w[i].to == w[0].to;
        ends &= w[i].to == w[0].to + i && w[i].from == w[0].from;
        first = w[i].from < first ? w[i].from : first;
        all = w[i].from > all ? w[i].from : all;
        some = w[i].to < some ? w[i].to : some;
        last = w[i].to > last ? w[i].to : last;
    }
    begins &= all <= some;
    if (begins) {
        add_triangle(sum, w, first, step, rows, stride, count, true);
        first = all;
    }
    for (int j = first, end = ends ? some : last; j < end; j++) {
        const vec row = load(rows + j * stride);
        if (j >= all && j < some) {
#pragma GCC unroll 8
            for (int i = 0; i < count; i++)
                sum[i] = vec_fused(splat(w[i].weight[j * step]), row, sum[i]);
            continue;
        }
#pragma GCC unroll 8
        for (int i = 0; i < count; i++)
            if (j >= w[i].from && j < w[i].to)
                sum[i] = vec_fused(splat(w[i].weight[j * step]), row, sum[i]);
    }
    if (ends)
        add_triangle(sum, w, some, step, rows, stride, count, false);
#pragma GCC unroll 8
    for (int i = 0; i < count; i++)
        store(w[i].out + d, sum[i]);
}

/* n of them, to the bits that add_rows gives. */
static void add_each(const weighted *w, int n, int step, const float *rows, int64_t stride, int dim) {
    int i = 0;
    for (; dim % LANES == 0 && i + 8 <= n; i += 8)
        for (int d = 0; d < dim; d += LANES)
            add_columns(w + i, d, step, rows, stride, 8);
    for (; dim % LANES == 0 && i + 4 <= n; i += 4)
        for (int d = 0; d < dim; d += LANES)
            add_columns(w + i, d, step, rows, stride, 4);
    for (; i < n; i++)
        add_rows(w[i].out, w[i].keep, w[i].weight + (int64_t)w[i].from * step, step, rows + w[i].from * stride, stride,
                 w[i].to - w[i].from, dim);
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
    const psoup__keys *keys;
    const psoup__span *spans;
    const psoup__attention_shape *shape;
    size_t blocks; /* of the span with most queries */
} attention_job;

/* Some keys of a span, of one key head: all the tile's, or as many as one may look at. */
typedef struct key_tile {
    const float *k, *v;
    int64_t k_stride, v_stride;
    bool turned; /* the keys lie in k_turned too; of a backward, the values in v_turned, and not in v */
    float k_turned[DIM * KEYS]; /* [dim, KEYS] */
    float k_room[KEYS * DIM];
    union {
        float v_room[KEYS * DIM], v_turned[DIM * KEYS];
    };
} key_tile;

static void take_tile(key_tile *tile, const psoup__keys *keys, const psoup__span *span, int64_t start,
                      int64_t kv_head, int64_t dim, bool pack, bool backward) {
    const int64_t left = span->keys - start, n = left < KEYS ? left : KEYS;
    const int64_t at = (span->first + start) * keys->stride + kv_head * dim;
    tile->k = (const float *)keys->k + at;
    tile->v = (const float *)keys->v + at;
    tile->k_stride = tile->v_stride = keys->stride;
    tile->turned = pack && dim <= DIM && dim % LANES == 0;
    if (tile->turned)
        turn(tile->k_turned, tile->k, tile->k_stride, n, dim);
    if (tile->turned && backward)
        turn(tile->v_turned, tile->v, tile->v_stride, n, dim);
    if (pack && (backward || !tile->turned))
        tile->k = packed(tile->k_room, tile->k, &tile->k_stride, n, dim);
    if (pack && (!backward || !tile->turned))
        tile->v = packed(tile->v_room, tile->v, &tile->v_stride, n, dim);
}

/* What n keys of a tile, whose dots are in p, weigh for one row, and the running maximum and sum of its softmax; returns
 * by what its out so far is to be multiplied. */
static float weigh_tile(float p[KEYS], float *max, float *sum, int n, float scale) {
    vec most = splat(*max), lanes = {0};
    for (int j = 0; j < n; j += LANES) {
        const vec scores = load(p + j) * scale;
        store(p + j, scores);
        most = vec_max(scores, most);
    }
    const float new_max = max_lanes(most), keep = exp_float(*max - new_max);
    for (int j = 0; j < n; j += LANES) {
        const vec weights = vec_exp(load(p + j) - new_max);
        store(p + j, weights);
        lanes += weights;
    }
    *max = new_max;
    *sum = *sum * keep + sum_lanes(lanes);
    return keep;
}

/* The softmax of a block's rows so far, and what their keys weigh. */
typedef struct softmax {
    float p[ROWS][KEYS];
    float max[ROWS + LANES], sum[ROWS + LANES], keep[ROWS + LANES]; /* keep: what weigh_tile returns */
    int seen[ROWS];
} softmax;

/* weigh_tile of rows from `first` on, whose dots are in p, to the same bits: no row waits for another's sums. */
static void weigh_rows(softmax *s, int first, int rows, float scale) {
    for (; first < rows; first += LANES) {
        const int n = rows - first < LANES ? rows - first : LANES;
        vec lanes[LANES];
        for (int i = 0; i < LANES; i++)
            lanes[i] = splat(-__builtin_inff());
        for (int i = 0; i < n; i++) {
            float *p = s->p[first + i];
            for (int j = 0; j < s->seen[first + i]; j += LANES) {
                const vec scores = load(p + j) * scale;
                store(p + j, scores);
                lanes[i] = vec_max(scores, lanes[i]);
            }
        }
        const vec before = load(s->max + first), after = vec_max(max_each(lanes), before);
        store(s->max + first, after);
        store(s->keep + first, vec_exp(before - after));
        for (int i = 0; i < LANES; i++)
            lanes[i] = (vec){0};
        for (int i = 0; i < n; i++) {
            float *p = s->p[first + i];
            const float max = s->max[first + i];
            for (int j = 0; j < s->seen[first + i]; j += LANES) {
                const vec weights = vec_exp(load(p + j) - max);
                store(p + j, weights);
                lanes[i] += weights;
            }
        }
        store(s->sum + first, load(s->sum + first) * load(s->keep + first) + sum_each(lanes));
    }
}

/* ROWS rows of one span and key head: its queries, and for each the heads that share the key head. */
static void attend_block(const attention_job *job, const psoup__span *span, int64_t kv_head,
                         int64_t first) {
    const psoup__attention_shape *shape = job->shape;
    const int64_t group = shape->heads / shape->kv_heads, dim = shape->head_dim;
    const int64_t all = span->queries * group, rows = all - first < ROWS ? all - first : ROWS;
    if (rows <= 0)
        return;
    const int64_t past = span->keys - span->queries;
    const int64_t last = past + (first + rows - 1) / group;
    int64_t at[ROWS]; /* of each row in q and out */
    softmax s;
    weighted each[ROWS];
    key_tile tile;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t query = (first + r) / group, head = kv_head * group + (first + r) % group;
        at[r] = ((span->query + query) * shape->heads + head) * dim;
        memset(job->out + at[r], 0, (size_t)dim * sizeof(float));
    }
    for (int r = 0; r < ROWS + LANES; r++) {
        s.max[r] = -__builtin_inff();
        s.sum[r] = 0;
    }
    for (int64_t start = 0; start <= last; start += KEYS) {
        int from = (int)rows; /* the first row that sees a key of the tile */
        take_tile(&tile, job->keys, span, start, kv_head, dim, rows >= FEW, false);
        for (int r = (int)rows - 1; r >= 0; r--) {
            s.seen[r] = keys_seen(past + (first + r) / group, start);
            if (s.seen[r] == 0)
                break;
            from = r;
            if (tile.turned)
                turned_dots(s.p[r], job->q + at[r], tile.k_turned, s.seen[r], (int)dim, -__builtin_inff());
            else
                tile_dots(s.p[r], job->q + at[r], tile.k, tile.k_stride, s.seen[r], (int)dim, -__builtin_inff());
        }
        if (rows < FEW)
            for (int r = from; r < rows; r++)
                s.keep[r] = weigh_tile(s.p[r], &s.max[r], &s.sum[r], s.seen[r], shape->scale);
        else
            weigh_rows(&s, from, (int)rows, shape->scale);
        for (int r = from; r < rows; r++)
            each[r - from] = (weighted){job->out + at[r], s.keep[r], s.p[r], 0, s.seen[r]};
        add_each(each, (int)rows - from, 1, tile.v, tile.v_stride, (int)dim);
    }
    double logs[ROWS]; /* of numbers */
    for (int r = 0; r < ROWS && job->lse; r++)
        logs[r] = log_positive(s.sum[r]);
    for (int64_t r = 0; r < rows; r++) {
        float *out = job->out + at[r];
        const float scale = 1.0f / s.sum[r];
        const bool number = s.sum[r] > 0 && s.sum[r] < __builtin_inff();
        for (int64_t d = 0; d < dim; d++)
            out[d] *= scale;
        if (job->lse)
            job->lse[at[r] / dim] = (float)(s.max[r] + (number ? logs[r] : log_double(s.sum[r])));
    }
}

static void attention_task(void *arg, size_t task, int worker) {
    const attention_job *job = arg;
    const size_t kv_heads = (size_t)job->shape->kv_heads;
    attend_block(job, &job->spans[task / job->blocks / kv_heads],
                 (int64_t)(task / job->blocks % kv_heads), (int64_t)(task % job->blocks) * ROWS);
}

/* Asks for n rows of keys, or of values, in their order. */
static void ask_for(const float *rows, int64_t n, int64_t stride, int64_t width) {
    for (int64_t key = 0; key < n && key * width < NEAR; key++)
        for (int64_t d = 0; d < width; d += LINE)
            __builtin_prefetch(rows + key * stride + d, 0, 2);
}

/* All heads of a span with few queries. Its keys and values come from far and are read once, a
 * head's part of every row at a time, which no hardware prefetcher follows: asking for all keys first, then
 * all values, made this 1.25 to 1.35 times as fast (72 keys of 4 heads, a cache beyond the L3, Zen 4). */
static void decode_task(void *arg, size_t task, int worker) {
    const attention_job *job = arg;
    const psoup__attention_shape *shape = job->shape;
    const psoup__span *span = &job->spans[task];
    const int64_t width = (int64_t)shape->kv_heads * shape->head_dim, stride = job->keys->stride;
    ask_for((const float *)job->keys->k + span->first * stride, span->keys, stride, width);
    ask_for((const float *)job->keys->v + span->first * stride, span->keys, stride, width);
    for (int64_t kv_head = 0; kv_head < shape->kv_heads; kv_head++)
        attend_block(job, span, kv_head, 0);
}

static void attention(psoup__backend *be, float *out, float *lse, const float *q,
                      const psoup__keys *keys, const psoup__spans *spans,
                      const psoup__attention_shape *shape) {
    attention_job job = {.out = out, .lse = lse, .q = q, .keys = keys, .spans = spans->span, .shape = shape};
    const int64_t most = (int64_t)spans->most_queries * (shape->heads / shape->kv_heads);
    job.blocks = tiles((size_t)most, ROWS);
    if (most < FEW && spans->n >= be->context->threads)
        psoup__parallel(be->context, (size_t)spans->n, decode_task, &job);
    else
        psoup__parallel(be->context, (size_t)spans->n * (size_t)shape->kv_heads * job.blocks,
                        attention_task, &job);
}

/* A block of queries of one head against a tile of keys. With p = exp(s − lse), D = <dout, out>:
 *     ds = scale · p · (dout vᵀ − D)     dq += ds k     dk += dsᵀ q     dv += pᵀ dout
 */
static void backward_block(const attention_job *job, const psoup__span *span, const key_tile *tile,
                           int64_t head, int64_t kv_head, int64_t start, int64_t first,
                           int64_t rows) {
    const psoup__attention_shape *shape = job->shape;
    const int dim = shape->head_dim;
    const int64_t width = (int64_t)shape->heads * dim, past = span->keys - span->queries;
    const int64_t stride = job->keys->stride;
    const int64_t at = (span->first + start) * stride + kv_head * dim; /* of the tile in dk, dv */
    const int64_t row = (span->query + first) * width + head * dim;
    float p[ROWS][KEYS], ds[ROWS][KEYS], d[ROWS], q_room[ROWS * DIM], dout_room[ROWS * DIM];
    weighted each[KEYS];
    const int64_t seeing = start - past - first; /* the first row that sees a key of the tile, where it is one */
    const int from = seeing < 0 ? 0 : (int)seeing;
    const float scale = shape->scale;
    int64_t q_stride = width, dout_stride = width;
    const float *q = packed(q_room, job->q + row, &q_stride, rows, dim);
    const float *dout = packed(dout_room, job->dout + row, &dout_stride, rows, dim);
    for (int r = from; r < rows; r++)
        d[r] = dot(dout + r * dout_stride, job->saved + row + r * width, (size_t)dim);
    for (int r = from; r < rows; r++) {
        const int n = keys_seen(past + first + r, start);
        if (tile->turned) {
            turned_dots(p[r], q + r * q_stride, tile->k_turned, n, dim, -__builtin_inff());
            turned_dots(ds[r], dout + r * dout_stride, tile->v_turned, n, dim, 0);
        } else {
            tile_dots(p[r], q + r * q_stride, tile->k, tile->k_stride, n, dim, -__builtin_inff());
            tile_dots(ds[r], dout + r * dout_stride, tile->v, tile->v_stride, n, dim, 0);
        }
        each[r - from] = (weighted){job->dq + row + r * width, 1, ds[r], 0, n};
    }
    for (int r = from; r < rows; r++) {
        const float lse = job->saved_lse[(span->query + first + r) * shape->heads + head];
        for (int j = 0; j < each[r - from].to; j += LANES) {
            const vec weights = vec_exp(load(p[r] + j) * scale - lse);
            store(p[r] + j, weights);
            store(ds[r] + j, weights * (load(ds[r] + j) - d[r]) * scale);
        }
    }
    add_each(each, (int)rows - from, 1, tile->k, tile->k_stride, dim);
    const int seen = keys_seen(past + first + rows - 1, start);
    for (int j = 0; j < seen; j++) { /* the rows from `skip` on see key start + j */
        const int64_t skip = start + j - past - first;
        each[j] = (weighted){job->keys->dv + at + j * stride, 1, &p[0][j], skip < 0 ? 0 : (int)skip, (int)rows};
    }
    add_each(each, seen, KEYS, dout, dout_stride, dim);
    for (int j = 0; j < seen; j++) {
        each[j].out = job->keys->dk + at + j * stride;
        each[j].weight = &ds[0][j];
    }
    add_each(each, seen, KEYS, q, q_stride, dim);
}

/* One span and key head: it alone writes its dk and dv, head by head, queries ascending. */
static void backward_task(void *arg, size_t task, int worker) {
    const attention_job *job = arg;
    const psoup__attention_shape *shape = job->shape;
    const int64_t kv_heads = shape->kv_heads, group = shape->heads / kv_heads, dim = shape->head_dim;
    const psoup__span *span = &job->spans[task / (size_t)kv_heads];
    const int64_t kv_head = (int64_t)(task % (size_t)kv_heads), past = span->keys - span->queries;
    key_tile tile;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int64_t query = 0; query < span->queries; query++)
            memset(job->dq + ((span->query + query) * shape->heads + head) * dim, 0,
                   (size_t)dim * sizeof(float));
        for (int64_t start = 0; start < span->keys; start += KEYS) {
            take_tile(&tile, job->keys, span, start, kv_head, dim, span->queries >= FEW, true);
            for (int64_t first = 0; first < span->queries; first += ROWS) {
                const int64_t left = span->queries - first, rows = left < ROWS ? left : ROWS;
                if (past + first + rows - 1 >= start)
                    backward_block(job, span, &tile, head, kv_head, start, first, rows);
            }
        }
    }
}

static void attention_backward(psoup__backend *be, float *dq, const float *dout, const float *q,
                               const float *out, const float *lse, const psoup__keys *keys,
                               const psoup__spans *spans, const psoup__attention_shape *shape) {
    attention_job job = {.dq = dq, .dout = dout, .q = q, .saved = out, .saved_lse = lse,
                         .keys = keys, .spans = spans->span, .shape = shape};
    psoup__parallel(be->context, (size_t)spans->n * (size_t)shape->kv_heads, backward_task, &job);
}

void PSOUP__NAME(psoup__cpu_fill_attention)(psoup__ops *ops) {
    ops->attention = attention;
    ops->attention_backward = attention_backward;
}
