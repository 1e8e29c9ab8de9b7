/* Causal attention over spans, and its gradients. */
#include "checkops.h"

#include "gpu/internal.h"

enum { SPANS = 5, PAGE = 64 };

/* Queries and keys of the spans: a batch of its own keys has as many of both. */
typedef struct spans_of {
    int32_t queries, keys;
} spans_of;
static const spans_of mixed[SPANS] = {{1, 1}, {37, 37}, {2, 129}, {64, 64}, {100, 130}};

typedef struct problem {
    int32_t heads, kv_heads, dim;
    psoup_dtype dtype, keys; /* what is multiplied in; what the keys are stored as */
    bool paged;
    psoup__span span[SPANS];
    int32_t pages[16], n_pages, queries, rows; /* of q; of the keys */
} problem;

/* Spans follow one another, with a row between two that belongs to none; pages in the opposite order. */
static void lay_out(problem *p) {
    p->queries = p->rows = p->n_pages = 0;
    for (int i = 0; i < SPANS; i++) {
        const int32_t pages = (mixed[i].keys + PAGE - 1) / PAGE;
        p->span[i] = (psoup__span){p->queries, mixed[i].queries, mixed[i].keys,
                                   p->paged ? p->n_pages : p->rows};
        p->queries += mixed[i].queries + 1;
        p->n_pages += pages;
        p->rows += p->paged ? pages * PAGE : mixed[i].keys + 1;
    }
    for (int32_t i = 0; i < p->n_pages; i++)
        p->pages[i] = p->n_pages - 1 - i;
}

static size_t row_of(const problem *p, int span, int32_t key) {
    if (!p->paged)
        return (size_t)(p->span[span].first + key);
    return (size_t)(p->pages[p->span[span].first + key / PAGE] * PAGE + key % PAGE);
}

static double dot(const float *a, const float *b, int32_t n) {
    double sum = 0;
    for (int32_t d = 0; d < n; d++)
        sum += (double)a[d] * b[d];
    return sum;
}

/* The weights of the keys 0 … last for query `at` (an index into q), and their log-sum-exp. */
static double weights(const problem *p, double *w, int span, int32_t last, const float *q, size_t kv,
                      const float *k) {
    const size_t width = (size_t)p->kv_heads * (size_t)p->dim;
    double most = -INFINITY, sum = 0;
    for (int32_t j = 0; j <= last; j++) {
        w[j] = dot(q, k + row_of(p, span, j) * width + kv, p->dim) / sqrt(p->dim);
        most = fmax(most, w[j]);
    }
    for (int32_t j = 0; j <= last; j++)
        sum += exp(w[j] - most);
    for (int32_t j = 0; j <= last; j++)
        w[j] = exp(w[j] - most) / sum;
    return most + log(sum);
}

/* Calls `each` for every query and head. */
typedef void (*visit)(const problem *p, int span, int32_t last, size_t row, size_t head, void *arg);
static void for_each(const problem *p, visit each, void *arg) {
    for (int i = 0; i < SPANS; i++)
        for (int32_t query = 0; query < p->span[i].queries; query++)
            for (int32_t head = 0; head < p->heads; head++)
                each(p, i, p->span[i].keys - p->span[i].queries + query, (size_t)(p->span[i].query + query),
                     (size_t)head, arg);
}

typedef struct numbers {
    const float *q, *k, *v;
    double *out, *lse;
} numbers;

static void attend(const problem *p, int span, int32_t last, size_t row, size_t head, void *arg) {
    numbers *x = arg;
    const size_t dim = (size_t)p->dim, kv_width = (size_t)p->kv_heads * dim, heads = (size_t)p->heads;
    const size_t at = (row * heads + head) * dim, kv = head / (heads / (size_t)p->kv_heads) * dim;
    double w[256];
    x->lse[row * heads + head] = weights(p, w, span, last, x->q + at, kv, x->k);
    for (size_t d = 0; d < dim; d++)
        x->out[at + d] = 0;
    for (int32_t j = 0; j <= last; j++)
        for (size_t d = 0; d < dim; d++)
            x->out[at + d] += w[j] * x->v[row_of(p, span, j) * kv_width + kv + d];
}

/* The gradients of Σ dout · out: formulas in src/cpu/attention.c. */
typedef struct gradients {
    const float *q, *k, *v, *dout;
    double *dq, *dk, *dv;
} gradients;

static void gradient(const problem *p, int span, int32_t last, size_t row, size_t head, void *arg) {
    gradients *x = arg;
    const size_t dim = (size_t)p->dim, kv_width = (size_t)p->kv_heads * dim, heads = (size_t)p->heads;
    const size_t at = (row * heads + head) * dim, kv = head / (heads / (size_t)p->kv_heads) * dim;
    double w[256], dw[256], mean = 0;
    weights(p, w, span, last, x->q + at, kv, x->k);
    for (int32_t j = 0; j <= last; j++) {
        dw[j] = dot(x->dout + at, x->v + row_of(p, span, j) * kv_width + kv, p->dim);
        mean += w[j] * dw[j];
    }
    for (int32_t j = 0; j <= last; j++) {
        const size_t key = row_of(p, span, j) * kv_width + kv;
        const double ds = w[j] * (dw[j] - mean) / sqrt(p->dim);
        for (size_t d = 0; d < dim; d++) {
            x->dq[at + d] += ds * x->k[key + d];
            x->dk[key + d] += ds * x->q[at + d];
            x->dv[key + d] += w[j] * x->dout[at + d];
        }
    }
}

/* Rows of no span stay NaN: they are put in order for the comparison. */
static void expect_rows(checker *c, const problem *p, const char *what, buffer *b, double *want, size_t width,
                        double tolerance) {
    bool alone = true;
    get(c, b);
    for (int i = 0; i < SPANS; i++) {
        const size_t at = (size_t)(p->span[i].query + p->span[i].queries) * width;
        for (size_t d = at; d < at + width; d++) {
            alone &= isnan(b->host[d]);
            b->host[d] = 0;
            want[d] = 0;
        }
    }
    expect_true(c, "rows of no span are left alone", alone);
    put(c, b);
    expect(c, what, b, want, tolerance);
}

/* Everything that no query may feel becomes NaN: rows of no span, and keys and values beyond the last one. */
static void poison(const problem *p, buffer *k, buffer *v) {
    const size_t width = (size_t)p->kv_heads * (size_t)p->dim;
    for (int i = 0; i < SPANS; i++)
        for (int32_t j = mixed[i].keys; p->paged ? j % PAGE != 0 : j == mixed[i].keys; j++)
            for (size_t d = 0; d < width; d++)
                k->host[row_of(p, i, j) * width + d] = v->host[row_of(p, i, j) * width + d] = NAN;
}

static double accuracy(const checker *c, psoup_dtype dtype) {
    return c->cuda ? tolerance_of(dtype) : tolerance_of(PSOUP_F32);
}

static void set_page(checker *c, int32_t page) {
    if (c->cuda)
        psoup__gpu_of(c->be)->ops.page = page;
}

static void check_forward(checker *c, problem *p) {
    begin(c, "attention", "%s, keys %s%s, head_dim %d, heads %d of %d", psoup_dtype_name(p->dtype),
          psoup_dtype_name(p->keys), p->paged ? " in pages" : "", (int)p->dim, (int)p->heads,
          (int)p->kv_heads);
    lay_out(p);
    const size_t width = (size_t)p->heads * (size_t)p->dim, rows = (size_t)p->queries;
    const size_t cells = (size_t)p->rows * (size_t)p->kv_heads * (size_t)p->dim;
    buffer *q = input(c, rows * width), *k = input_of(c, cells, p->keys), *v = input_of(c, cells, p->keys);
    buffer *out = output(c, rows * width), *lse = output(c, rows * (size_t)p->heads);
    poison(p, k, v);
    put(c, k);
    put(c, v);
    numbers x = {q->host, k->host, v->host, doubles(rows * width), doubles(rows * (size_t)p->heads)};
    for_each(p, attend, &x);
    const psoup__keys keys = {.dtype = p->keys, .stride = (int64_t)p->kv_heads * p->dim, .k = k->device,
                              .v = v->device, .pages = p->paged ? block(c, p->pages, sizeof p->pages) : NULL};
    const psoup__spans spans = {block(c, p->span, sizeof p->span), SPANS, 100, 130};
    const psoup__attention_shape shape = {p->heads, p->kv_heads, p->dim, (float)(1 / sqrt(p->dim)), p->dtype};
    c->ops->reserve(c->be, p->rows, (int32_t)width, NULL);
    const int32_t page = c->ops->page;
    set_page(c, PAGE);
    c->ops->attention(c->be, out->device, lse->device, q->device, &keys, &spans, &shape);
    set_page(c, page);
    expect_rows(c, p, "out", out, x.out, width, accuracy(c, p->dtype));
    expect_rows(c, p, "lse", lse, x.lse, (size_t)p->heads, accuracy(c, p->dtype));
    free(x.out), free(x.lse);
}

/* A key, or its value, that is NaN is felt by the queries from it on and by no other. */
static void check_nan(checker *c, int32_t dim, psoup_dtype dtype, bool value) {
    enum { ROWS = 50, BAD = 21 };
    begin(c, "attention", "%s, head_dim %d, %s %d of %d is NaN", psoup_dtype_name(dtype), (int)dim,
          value ? "value" : "key", BAD, ROWS);
    const size_t n = (size_t)ROWS * (size_t)dim;
    buffer *q = input(c, n), *k = input(c, n), *v = input(c, n), *out = output(c, n);
    for (int32_t d = 0; d < dim; d++)
        (value ? v : k)->host[BAD * dim + d] = NAN;
    put(c, k);
    put(c, v);
    const psoup__span span = {0, ROWS, ROWS, 0};
    const psoup__spans spans = {block(c, &span, sizeof span), 1, ROWS, ROWS};
    const psoup__keys keys = {.dtype = PSOUP_F32, .stride = dim, .k = k->device, .v = v->device};
    const psoup__attention_shape shape = {1, 1, dim, (float)(1 / sqrt(dim)), dtype};
    c->ops->reserve(c->be, ROWS, dim, NULL);
    c->ops->attention(c->be, out->device, NULL, q->device, &keys, &spans, &shape);
    get(c, out);
    bool right = true;
    for (size_t i = 0; i < n; i++)
        right &= isnan(out->host[i]) == (i >= (size_t)BAD * (size_t)dim);
    expect_true(c, "NaN from that query on", right);
}

static void check_backward(checker *c, problem *p) {
    begin(c, "attention_backward", "%s, head_dim %d, heads %d of %d", psoup_dtype_name(p->dtype), (int)p->dim,
          (int)p->heads, (int)p->kv_heads);
    lay_out(p);
    const size_t rows = (size_t)p->queries, heads = (size_t)p->heads, n = rows * heads * (size_t)p->dim;
    const size_t cells = (size_t)p->rows * (size_t)p->kv_heads * (size_t)p->dim;
    buffer *q = input(c, n), *k = input(c, cells), *v = input(c, cells), *dout = input(c, n);
    buffer *out = output(c, n), *lse = output(c, rows * heads), *dq = output(c, n);
    buffer *dk = input(c, cells), *dv = input(c, cells);
    gradients x = {q->host, k->host, v->host, dout->host, doubles(n), doubles_of(dk->host, cells),
                   doubles_of(dv->host, cells)};
    poison(p, k, v);
    put(c, k);
    put(c, v);
    for_each(p, gradient, &x);
    const psoup__keys keys = {.dtype = PSOUP_F32, .stride = (int64_t)p->kv_heads * p->dim, .k = k->device,
                              .v = v->device, .dk = dk->device, .dv = dv->device};
    const psoup__spans spans = {block(c, p->span, sizeof p->span), SPANS, 100, 130};
    const psoup__attention_shape shape = {p->heads, p->kv_heads, p->dim, (float)(1 / sqrt(p->dim)), p->dtype};
    c->ops->reserve(c->be, p->rows, p->heads * p->dim, NULL);
    c->ops->attention(c->be, out->device, lse->device, q->device, &keys, &spans, &shape);
    c->ops->attention_backward(c->be, dq->device, dout->device, q->device, out->device, lse->device, &keys,
                               &spans, &shape);
    const double tolerance = accuracy(c, p->dtype == PSOUP_F32 ? PSOUP_F32 : PSOUP_BF16);
    expect_rows(c, p, "dq", dq, x.dq, heads * (size_t)p->dim, tolerance);
    expect(c, "dk", dk, x.dk, tolerance);
    expect(c, "dv", dv, x.dv, tolerance);
    free(x.dq), free(x.dk), free(x.dv);
}

/* ---- by finite differences -------------------------------------------------------------------------------- */

/* A sequence and its own keys, from these numbers alone; the loss is <dout, out>. */
typedef struct plain {
    int32_t n, heads, kv_heads, dim;
    double *q, *k, *v, *dout;
} plain;

static double plain_loss(void *arg) {
    const plain *p = arg;
    double loss = 0, w[16];
    for (int32_t i = 0; i < p->n; i++)
        for (int32_t h = 0; h < p->heads; h++) {
            const int32_t at = (i * p->heads + h) * p->dim, kv = h / (p->heads / p->kv_heads) * p->dim;
            double sum = 0, all = 0;
            for (int32_t j = 0; j <= i; j++) {
                const int32_t key = j * p->kv_heads * p->dim + kv;
                double score = 0, value = 0;
                for (int32_t d = 0; d < p->dim; d++) {
                    score += p->q[at + d] * p->k[key + d];
                    value += p->dout[at + d] * p->v[key + d];
                }
                w[j] = exp(score / sqrt(p->dim));
                sum += w[j];
                all += w[j] * value;
            }
            loss += all / sum;
        }
    return loss;
}

static void check_differences(checker *c, int32_t dim) {
    enum { N = 5, HEADS = 2 };
    const size_t n = (size_t)(N * HEADS * dim), cells = (size_t)(N * dim);
    const psoup__span span = {0, N, N, 0};
    begin(c, "attention_backward", "head_dim %d, by finite differences", (int)dim);
    buffer *q = input(c, n), *k = input(c, cells), *v = input(c, cells), *dout = input(c, n), *out = output(c, n);
    buffer *lse = output(c, N * HEADS), *dq = output(c, n), *dk = input(c, cells), *dv = input(c, cells);
    plain p = {N, HEADS, 1, dim, doubles_of(q->host, n), doubles_of(k->host, cells), doubles_of(v->host, cells),
               doubles_of(dout->host, n)};
    float *before = malloc(2 * cells * sizeof *before);
    memcpy(before, dk->host, cells * sizeof *before);
    memcpy(before + cells, dv->host, cells * sizeof *before);
    const psoup__keys keys = {.dtype = PSOUP_F32, .stride = dim, .k = k->device, .v = v->device, .dk = dk->device,
                              .dv = dv->device};
    const psoup__spans spans = {block(c, &span, sizeof span), 1, N, N};
    const psoup__attention_shape shape = {HEADS, 1, dim, (float)(1 / sqrt(dim)), PSOUP_F32};
    c->ops->reserve(c->be, N, HEADS * dim, NULL);
    c->ops->attention(c->be, out->device, lse->device, q->device, &keys, &spans, &shape);
    c->ops->attention_backward(c->be, dq->device, dout->device, q->device, out->device, lse->device, &keys, &spans,
                               &shape);
    differences(c, "dq", dq, NULL, p.q, n, 7, plain_loss, &p, 1e-4);
    differences(c, "dk", dk, before, p.k, cells, 5, plain_loss, &p, 1e-4);
    differences(c, "dv", dv, before + cells, p.v, cells, 5, plain_loss, &p, 1e-4);
    free(before), free(p.q), free(p.k), free(p.v), free(p.dout);
}

void check_attention(checker *c) {
    static const int32_t dims[] = {16, 37, 64, 128, 256};
    static const int32_t heads[][2] = {{1, 1}, {4, 2}, {4, 1}, {2, 1}, {2, 2}};
    static const psoup_dtype dtypes[] = {PSOUP_F32, PSOUP_BF16, PSOUP_F16};
    for (int i = 0; i < 5; i++)
        for (int t = 0; t < (c->cuda ? 3 : 1); t++) {
            const int32_t *h = heads[(i + t) % 5];
            check_forward(c, &(problem){h[0], h[1], dims[i], dtypes[t], PSOUP_F32, false, .rows = 0});
            if (c->cuda)
                check_forward(c, &(problem){h[0], h[1], dims[i], dtypes[t], dtypes[t], i % 2 == t % 2,
                                            .rows = 0});
            check_backward(c, &(problem){h[0], h[1], dims[i], dtypes[t], PSOUP_F32, false, .rows = 0});
            check_nan(c, dims[i], dtypes[t], false);
            check_nan(c, dims[i], dtypes[t], true);
        }
    for (int i = 0; i < 5; i++)
        check_differences(c, dims[i]);
}
