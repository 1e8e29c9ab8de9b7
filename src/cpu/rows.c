/* Rows on the move: embedding, gather and scatter, the cache, and the scalar head that reads single
 * rows. */
#include "cpu/variant.h"
#include "cpu/vector.h"

enum { ROW_TILE = 16, COLUMN_TILE = 64 };

typedef struct embed_job {
    psoup_context *context;
    float *out;        /* [rows, width] */
    float *dtable;     /* [vocab, width] */
    const float *dout; /* [rows, width] */
    const psoup__weight *table;
    const int32_t *token; /* [rows] */
    size_t rows, width;
} embed_job;

static void embed_task(void *arg, size_t task, int worker) {
    const embed_job *job = arg;
    const size_t width = job->width, end = least((task + 1) * ROW_TILE, job->rows);
    const size_t bytes = width * psoup_dtype_size(job->table->dtype);
    for (size_t row = task * ROW_TILE; row < end; row++)
        psoup__to_f32(job->context, job->out + row * width,
                      (const char *)job->table->data + (size_t)job->token[row] * bytes,
                      job->table->dtype, width);
}

static void embed(psoup__backend *be, float *out, const psoup__weight *table, const int32_t *token,
                  int32_t rows) {
    embed_job job = {.context = be->context, .out = out, .table = table, .token = token,
                     .rows = (size_t)rows, .width = (size_t)table->in};
    psoup__parallel(be->context, tiles(job.rows, ROW_TILE), embed_task, &job);
}

/* A token may come often: its row is summed in the order of the batch, a tile of columns at a time. */
static void embed_backward_task(void *arg, size_t task, int worker) {
    const embed_job *job = arg;
    const size_t start = task * COLUMN_TILE, n = least(COLUMN_TILE, job->width - start);
    for (size_t row = 0; row < job->rows; row++) {
        float *dtable = job->dtable + (size_t)job->token[row] * job->width + start;
        const float *dout = job->dout + row * job->width + start;
        for (size_t j = 0; j < n; j++)
            dtable[j] += dout[j];
    }
}

static void embed_backward(psoup__backend *be, float *dtable, const float *dout,
                           const int32_t *token, int32_t vocab, int32_t width, int32_t rows) {
    embed_job job = {.dtable = dtable, .dout = dout, .token = token, .rows = (size_t)rows,
                     .width = (size_t)width};
    psoup__parallel(be->context, tiles(job.width, COLUMN_TILE), embed_backward_task, &job);
}

typedef struct move_job {
    float *out, *out2;       /* [rows, width], or a cache */
    const float *in, *in2;   /* [rows, width] */
    const float *scale;      /* [rows] or NULL */
    const int32_t *row;      /* [rows] */
    size_t rows, width;
    size_t stride;           /* of a cache's rows */
} move_job;

static void cache_task(void *arg, size_t task, int worker) {
    const move_job *job = arg;
    const size_t width = job->width, end = least((task + 1) * ROW_TILE, job->rows);
    for (size_t row = task * ROW_TILE; row < end; row++) {
        const size_t to = (size_t)job->row[row] * job->stride;
        memcpy(job->out + to, job->in + row * width, width * sizeof(float));
        memcpy(job->out2 + to, job->in2 + row * width, width * sizeof(float));
    }
}

static void cache_append(psoup__backend *be, const psoup__keys *cache, const int32_t *place,
                         const float *k, const float *v, int32_t rows, int32_t width) {
    move_job job = {.out = cache->k, .out2 = cache->v, .in = k, .in2 = v, .row = place,
                    .stride = (size_t)cache->stride, .rows = (size_t)rows, .width = (size_t)width};
    psoup__parallel(be->context, tiles(job.rows, ROW_TILE), cache_task, &job);
}

static void gather_task(void *arg, size_t task, int worker) {
    const move_job *job = arg;
    const size_t width = job->width, end = least((task + 1) * ROW_TILE, job->rows);
    for (size_t i = task * ROW_TILE; i < end; i++)
        memcpy(job->out + i * width, job->in + (size_t)job->row[i] * width, width * sizeof(float));
}

static void gather_rows(psoup__backend *be, float *out, const float *in, const int32_t *row,
                        int32_t rows, int32_t width) {
    move_job job = {.out = out, .in = in, .row = row, .rows = (size_t)rows, .width = (size_t)width};
    psoup__parallel(be->context, tiles(job.rows, ROW_TILE), gather_task, &job);
}

static void scatter_add_task(void *arg, size_t task, int worker) {
    const move_job *job = arg;
    const size_t width = job->width, end = least((task + 1) * ROW_TILE, job->rows);
    for (size_t i = task * ROW_TILE; i < end; i++) {
        float *out = job->out + (size_t)job->row[i] * width;
        const float *in = job->in + i * width;
        const float scale = job->scale ? job->scale[i] : 1;
        for (size_t j = 0; j < width; j++)
            out[j] = fused(scale, in[j], out[j]);
    }
}

static void scatter_add_rows(psoup__backend *be, float *out, const float *in, const float *scale,
                             const int32_t *row, int32_t rows, int32_t width) {
    move_job job = {.out = out, .in = in, .scale = scale, .row = row, .rows = (size_t)rows,
                    .width = (size_t)width};
    psoup__parallel(be->context, tiles(job.rows, ROW_TILE), scatter_add_task, &job);
}

typedef struct combine_job {
    float *out;                       /* [n, width] */
    const float *in, *weight;
    const int32_t *first;             /* [n + 1] */
    size_t width, across;             /* tiles of a row */
} combine_job;

/* A tile of one sum stays near while its rows pass by. */
enum { COMBINE_TILE = 1024 };

static void combine_task(void *arg, size_t task, int worker) {
    const combine_job *job = arg;
    const size_t i = task / job->across, start = task % job->across * COMBINE_TILE;
    const size_t n = least(COMBINE_TILE, job->width - start);
    const int32_t begin = job->first[0], first = job->first[i] - begin, end = job->first[i + 1] - begin;
    float *out = job->out + i * job->width + start;
    if (end - first == 1) {
        memcpy(out, job->in + (size_t)first * job->width + start, n * sizeof *out);
        return;
    }
    memset(out, 0, n * sizeof *out);
    for (int32_t k = first; k < end; k++) {
        const float *in = job->in + (size_t)k * job->width + start, weight = job->weight[k];
        INDEPENDENT
        for (size_t j = 0; j < n; j++)
            out[j] = fused(weight, in[j], out[j]);
    }
}

static void combine_rows(psoup__backend *be, float *out, const float *in, const float *weight, const int32_t *first,
                         int32_t n, int32_t width) {
    combine_job job = {.out = out, .in = in, .weight = weight, .first = first, .width = (size_t)width,
                       .across = tiles((size_t)width, COMBINE_TILE)};
    psoup__parallel(be->context, (size_t)n * job.across, combine_task, &job);
}

typedef struct head_job {
    float *value;            /* part i goes to value[at[i]] */
    float *dhidden, *dw;     /* [rows, width], [width] */
    const float *dvalue;
    const float *hidden, *w; /* [rows, width], [width] */
    const int32_t *row, *at; /* [n] */
    const float *weight;     /* [n] */
    float bias;
    size_t n, width;
} head_job;

static void head_task(void *arg, size_t task, int worker) {
    const head_job *job = arg;
    const size_t end = least((task + 1) * ROW_TILE, job->n);
    for (size_t i = task * ROW_TILE; i < end; i++) {
        const float out =
            dot(job->hidden + (size_t)job->row[i] * job->width, job->w, job->width) + job->bias;
        job->value[job->at[i]] += job->weight[i] * out;
    }
}

static void head(psoup__backend *be, float *value, const float *hidden, const int32_t *row, const int32_t *at,
                 const float *weight, const float *w, const float *bias, int32_t n, int32_t width) {
    head_job job = {.value = value, .hidden = hidden, .w = w, .row = row, .at = at, .weight = weight,
                    .bias = bias ? bias[0] : 0, .n = (size_t)n, .width = (size_t)width};
    psoup__parallel(be->context, tiles(job.n, ROW_TILE), head_task, &job);
}

static void head_backward_task(void *arg, size_t task, int worker) {
    const head_job *job = arg;
    const size_t start = task * COLUMN_TILE, n = least(COLUMN_TILE, job->width - start);
    float *dw = job->dw + start;
    for (size_t i = 0; i < job->n; i++) {
        const float d = job->weight[i] * job->dvalue[job->at[i]];
        const size_t at = (size_t)job->row[i] * job->width + start;
        const float *hidden = job->hidden + at;
        for (size_t j = 0; j < n; j++)
            dw[j] = fused(d, hidden[j], dw[j]);
        if (!job->dhidden)
            continue;
        float *dhidden = job->dhidden + at;
        const float *w = job->w + start;
        for (size_t j = 0; j < n; j++)
            dhidden[j] = fused(d, w[j], dhidden[j]);
    }
}

static void head_backward(psoup__backend *be, float *dhidden, float *dw, float *dbias, const float *dvalue,
                          const float *hidden, const int32_t *row, const int32_t *at, const float *weight,
                          const float *w, int32_t n, int32_t width) {
    head_job job = {.dhidden = dhidden, .dw = dw, .dvalue = dvalue, .hidden = hidden, .w = w, .row = row, .at = at,
                    .weight = weight, .n = (size_t)n, .width = (size_t)width};
    psoup__parallel(be->context, tiles(job.width, COLUMN_TILE), head_backward_task, &job);
    if (dbias)
        for (int32_t i = 0; i < n; i++)
            dbias[0] += weight[i] * dvalue[at[i]];
}

void PSOUP__NAME(psoup__cpu_fill_rows)(psoup__ops *ops) {
    ops->embed = embed;
    ops->embed_backward = embed_backward;
    ops->cache_append = cache_append;
    ops->gather_rows = gather_rows;
    ops->scatter_add_rows = scatter_add_rows;
    ops->combine_rows = combine_rows;
    ops->head = head;
    ops->head_backward = head_backward;
}
