/* What stands between the linear layers: norm, rotary positions, gate, dropout. */
#include "cpu/variant.h"
#include "cpu/vector.h"

enum { ROW_TILE = 16, COLUMN_TILE = 64, FLAT_TILE = 16384, GATE_TILE = 2048 };

/* What a task of n items takes: a quarter of them, but at least `few` and at most `many`. Of a decoding step's
 * few rows every thread then has some. */
static size_t share(size_t n, size_t few, size_t many) {
    const size_t quarter = tiles(n, 4);
    return quarter < few ? few : least(quarter, many);
}

typedef struct norm_job {
    float *out, *rstd;      /* [rows, width], [rows] */
    float *sum;             /* x, where y is added to it; or NULL */
    float *dx, *dweight;    /* [rows, width], [width] */
    const float *dout, *x, *y; /* [rows, width] */
    const float *weight;    /* [width] */
    const float *saved;     /* rstd [rows] */
    float epsilon;
    size_t rows, width, tile; /* tile: rows of a task */
} norm_job;

static void rmsnorm_task(void *arg, size_t task, int worker) {
    const norm_job *job = arg;
    const size_t width = job->width, end = least((task + 1) * job->tile, job->rows);
    const float *weight = job->weight;
    for (size_t row = task * job->tile; row < end; row++) {
        const float *x = job->x + row * width;
        float *out = job->out + row * width;
        if (job->sum) {
            float *sum = job->sum + row * width;
            const float *y = job->y + row * width;
            INDEPENDENT
            for (size_t j = 0; j < width; j++)
                sum[j] += y[j];
        }
        const float rstd =
            1.0f / __builtin_sqrtf(dot(x, x, width) / (float)width + job->epsilon);
        INDEPENDENT
        for (size_t j = 0; j < width; j++)
            out[j] = x[j] * rstd * weight[j];
        job->rstd[row] = rstd;
    }
}

static void rmsnorm(psoup__backend *be, float *out, float *rstd, float *x, const float *y,
                    const float *weight, float epsilon, int32_t rows, int32_t width) {
    norm_job job = {.out = out, .rstd = rstd, .sum = y ? x : NULL, .x = x, .y = y, .weight = weight,
                    .epsilon = epsilon,
                    .rows = (size_t)rows, .width = (size_t)width,
                    .tile = share((size_t)rows, 1, ROW_TILE)};
    psoup__parallel(be->context, tiles(job.rows, job.tile), rmsnorm_task, &job);
}

/* With x̂ = x · rstd and g = dout · weight: dx += rstd · (g − x̂ · mean(g · x̂)). */
static void rmsnorm_dx_task(void *arg, size_t task, int worker) {
    const norm_job *job = arg;
    const size_t width = job->width, end = least((task + 1) * ROW_TILE, job->rows);
    const float *weight = job->weight;
    for (size_t row = task * ROW_TILE; row < end; row++) {
        const float *x = job->x + row * width, *dout = job->dout + row * width;
        float *dx = job->dx + row * width;
        const float rstd = job->saved[row];
        vec lanes = {0};
        size_t j = 0;
        for (; j + LANES <= width; j += LANES)
            lanes = vec_fused(load(dout + j) * load(weight + j), load(x + j), lanes);
        float sum = sum_lanes(lanes);
        for (; j < width; j++)
            sum = fused(dout[j] * weight[j], x[j], sum);
        const float mean = sum * rstd * rstd / (float)width;
        INDEPENDENT
        for (j = 0; j < width; j++)
            dx[j] += rstd * (dout[j] * weight[j] - x[j] * mean);
    }
}

/* dweight += Σ_rows dout · x̂, a tile of columns at a time. */
static void rmsnorm_dweight_task(void *arg, size_t task, int worker) {
    const norm_job *job = arg;
    const size_t start = task * COLUMN_TILE, n = least(COLUMN_TILE, job->width - start);
    float *dweight = job->dweight + start;
    for (size_t row = 0; row < job->rows; row++) {
        const float *x = job->x + row * job->width + start;
        const float *dout = job->dout + row * job->width + start;
        const float rstd = job->saved[row];
        INDEPENDENT
        for (size_t j = 0; j < n; j++)
            dweight[j] += dout[j] * (x[j] * rstd);
    }
}

static void rmsnorm_backward(psoup__backend *be, float *dx, float *dweight, const float *dout,
                             const float *x, const float *weight, const float *rstd, int32_t rows,
                             int32_t width) {
    norm_job job = {.dx = dx, .dweight = dweight, .dout = dout, .x = x, .weight = weight,
                    .saved = rstd, .rows = (size_t)rows, .width = (size_t)width};
    if (dweight)
        psoup__parallel(be->context, tiles(job.width, COLUMN_TILE), rmsnorm_dweight_task, &job);
    psoup__parallel(be->context, tiles(job.rows, ROW_TILE), rmsnorm_dx_task, &job);
}

typedef struct rope_job {
    float *x;             /* [rows, heads · head_dim], stride apart */
    const float *cos_sin; /* [positions, head_dim] */
    const int32_t *position;
    size_t rows, heads, head_dim;
    int64_t stride;
    float sign;
} rope_job;

static void rope_task(void *arg, size_t task, int worker) {
    const rope_job *job = arg;
    const size_t half = job->head_dim / 2, end = least((task + 1) * ROW_TILE, job->rows);
    for (size_t row = task * ROW_TILE; row < end; row++) {
        const float *cosine = job->cos_sin + (size_t)job->position[row] * job->head_dim;
        const float *sine = cosine + half;
        for (size_t head = 0; head < job->heads; head++) {
            float *low = job->x + (int64_t)row * job->stride + head * job->head_dim;
            float *high = low + half;
            INDEPENDENT
            for (size_t j = 0; j < half; j++) {
                const float a = low[j], b = high[j], s = sine[j] * job->sign;
                low[j] = a * cosine[j] - b * s;
                high[j] = b * cosine[j] + a * s;
            }
        }
    }
}

static void rope(psoup__backend *be, float *x, const float *cos_sin, const int32_t *position,
                 int32_t rows, int32_t heads, int32_t head_dim, int64_t stride, bool inverse) {
    rope_job job = {x, cos_sin, position, (size_t)rows, (size_t)heads, (size_t)head_dim, stride,
                    inverse ? -1.0f : 1.0f};
    psoup__parallel(be->context, tiles(job.rows, ROW_TILE), rope_task, &job);
}

static void rope_append(psoup__backend *be, float *q, float *k, const float *v, const float *cos_sin,
                        const int32_t *position, const psoup__keys *cache, const int32_t *place, int32_t rows,
                        const psoup__attention_shape *shape) {
    const int32_t dim = shape->head_dim, width = shape->kv_heads * dim;
    rope(be, q, cos_sin, position, rows, shape->heads, dim, (int64_t)shape->heads * dim, false);
    rope(be, k, cos_sin, position, rows, shape->kv_heads, dim, width, false);
    be->ops->cache_append(be, cache, place, k, v, rows, width);
}

typedef struct gate_job {
    float *out, *dgate, *dup;      /* [n] */
    const float *dout, *gate, *up; /* [n] */
    size_t n, tile; /* tile: values of a task */
} gate_job;

static void swiglu_task(void *arg, size_t task, int worker) {
    const gate_job *job = arg;
    const size_t start = task * job->tile, n = least(job->tile, job->n - start);
    const float *gate = job->gate + start, *up = job->up + start;
    float *out = job->out + start;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(out + i, load(gate + i) / (1.0f + vec_exp(-load(gate + i))) * load(up + i));
    for (; i < n; i++)
        out[i] = gate[i] / (1.0f + exp_float(-gate[i])) * up[i];
}

static void swiglu(psoup__backend *be, float *out, const float *gate, const float *up, size_t n) {
    gate_job job = {.out = out, .gate = gate, .up = up, .n = n,
                    .tile = share(n, GATE_TILE, FLAT_TILE)};
    psoup__parallel(be->context, tiles(n, job.tile), swiglu_task, &job);
}

/* With σ = sigmoid(gate): dup = dout·gate·σ, dgate = dout·up·σ·(1 + gate·(1 − σ)). */
static void swiglu_backward_task(void *arg, size_t task, int worker) {
    const gate_job *job = arg;
    const size_t start = task * FLAT_TILE, n = least(FLAT_TILE, job->n - start);
    const float *gate = job->gate + start, *up = job->up + start, *dout = job->dout + start;
    float *dgate = job->dgate + start, *dup = job->dup + start;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vec g = load(gate + i), u = load(up + i), d = load(dout + i);
        const vec sigmoid = 1.0f / (1.0f + vec_exp(-g));
        store(dup + i, d * g * sigmoid);
        store(dgate + i, d * u * sigmoid * (1.0f + g * (1.0f - sigmoid)));
    }
    for (; i < n; i++) {
        const float g = gate[i], u = up[i], d = dout[i];
        const float sigmoid = 1.0f / (1.0f + exp_float(-g));
        dup[i] = d * g * sigmoid;
        dgate[i] = d * u * sigmoid * (1.0f + g * (1.0f - sigmoid));
    }
}

static void swiglu_backward(psoup__backend *be, float *dgate, float *dup, const float *dout,
                            const float *gate, const float *up, size_t n) {
    gate_job job = {.dgate = dgate, .dup = dup, .dout = dout, .gate = gate, .up = up, .n = n};
    psoup__parallel(be->context, tiles(n, FLAT_TILE), swiglu_backward_task, &job);
}

typedef struct add_job {
    float *x;       /* [n] */
    const float *y; /* [n] */
    size_t n;
} add_job;

static void add_task(void *arg, size_t task, int worker) {
    const add_job *job = arg;
    const size_t start = task * FLAT_TILE, n = least(FLAT_TILE, job->n - start);
    float *x = job->x + start;
    const float *y = job->y + start;
    INDEPENDENT
    for (size_t i = 0; i < n; i++)
        x[i] += y[i];
}

static void add(psoup__backend *be, float *x, const float *y, size_t n) {
    add_job job = {x, y, n};
    psoup__parallel(be->context, tiles(n, FLAT_TILE), add_task, &job);
}

typedef struct dropout_job {
    float *out;      /* [rows, width] */
    const float *in; /* [rows, width] */
    const psoup__dropout *dropout;
    size_t rows, width;
    bool add;
} dropout_job;

/* The Philox words of BLOCKS blocks from `block` on: psoup__philox_block (base/philox.c) in a form
 * that the compiler vectorises: dropout takes a fifth (AVX-512) to a half of the time. */
enum { BLOCKS = 64 };
static void philox_words(uint32_t words[BLOCKS * 4], uint64_t seed, uint64_t sequence,
                         uint64_t block) {
    for (uint32_t i = 0; i < BLOCKS; i++) {
        uint32_t c0 = (uint32_t)(block + i), c1 = (uint32_t)((block + i) >> 32);
        uint32_t c2 = (uint32_t)sequence, c3 = (uint32_t)(sequence >> 32);
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; round++) {
            const uint64_t p0 = (uint64_t)c0 * 0xd2511f53u, p1 = (uint64_t)c2 * 0xcd9e8d57u;
            c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
            c1 = (uint32_t)p1;
            c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
            c3 = (uint32_t)p0;
            k0 += 0x9e3779b9u;
            k1 += 0xbb67ae85u;
        }
        words[i * 4] = c0;
        words[i * 4 + 1] = c1;
        words[i * 4 + 2] = c2;
        words[i * 4 + 3] = c3;
    }
}

static void dropout_row(const dropout_job *job, size_t row) {
    const psoup__dropout *d = job->dropout;
    const float *in = job->in + row * job->width;
    float *out = job->out + row * job->width;
    const float p = d->p, scale = 1.0f / (1.0f - p);
    uint64_t position = d->offset[row] * job->width;
    for (size_t j = 0, n; j < job->width; j += n, position += n) {
        uint32_t room[BLOCKS * 4];
        philox_words(room, d->seed[row], d->stream[row], position / 4);
        const uint32_t *word = room + position % 4;
        n = least(job->width - j, BLOCKS * 4 - position % 4);
        if (job->add) {
            INDEPENDENT
            for (size_t i = 0; i < n; i++)
                out[j + i] += psoup__uniform(word[i]) >= p ? in[j + i] * scale : 0.0f;
        } else {
            INDEPENDENT
            for (size_t i = 0; i < n; i++)
                out[j + i] = psoup__uniform(word[i]) >= p ? in[j + i] * scale : 0.0f;
        }
    }
}

static void dropout_task(void *arg, size_t task, int worker) {
    const dropout_job *job = arg;
    const size_t end = least((task + 1) * ROW_TILE, job->rows);
    for (size_t row = task * ROW_TILE; row < end; row++)
        dropout_row(job, row);
}

static void dropout(psoup__backend *be, float *out, const float *in, const psoup__dropout *options,
                    int32_t rows, int32_t width) {
    dropout_job job = {out, in, options, (size_t)rows, (size_t)width, false};
    if (options->p == 0) {
        if (out != in && rows > 0)
            memcpy(out, in, job.rows * job.width * sizeof(float));
    } else
        psoup__parallel(be->context, tiles(job.rows, ROW_TILE), dropout_task, &job);
}

static void dropout_backward(psoup__backend *be, float *dx, const float *dout,
                             const psoup__dropout *options, int32_t rows, int32_t width) {
    dropout_job job = {dx, dout, options, (size_t)rows, (size_t)width, true};
    if (options->p == 0)
        add(be, dx, dout, job.rows * job.width);
    else
        psoup__parallel(be->context, tiles(job.rows, ROW_TILE), dropout_task, &job);
}

void PSOUP__NAME(psoup__cpu_fill_layer)(psoup__ops *ops) {
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
