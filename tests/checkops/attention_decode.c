/* Attention of one query to a cache, with and without pages. */
#include "checkops.h"

#include "gpu/internal.h"

enum { SPANS = 5, PAGE = 16 };

/* Keys of span i stand in rows that follow one another, or in pages that lie in the opposite order. */
typedef struct cached {
    int32_t heads, kv_heads, dim;
    psoup_dtype dtype;
    bool paged;
    psoup__span span[SPANS];
    int32_t pages[64], n_pages, rows;
} cached;

static const int32_t lengths[SPANS] = {1, 37, 64, 200, 129};

static void lay_out(cached *s) {
    s->rows = s->n_pages = 0;
    for (int i = 0; i < SPANS; i++) {
        s->span[i] = (psoup__span){i, 1, lengths[i], s->paged ? s->n_pages : s->rows};
        int32_t pages = (lengths[i] + PAGE - 1) / PAGE;
        s->n_pages += pages;
        s->rows += s->paged ? pages * PAGE : lengths[i];
    }
    s->span[2].queries = 0; /* a span of another kind: its row stays as it is */
    for (int32_t i = 0; i < s->n_pages; i++)
        s->pages[i] = s->n_pages - 1 - i;
}

static int64_t row_of(const cached *s, int span, int32_t key) {
    if (!s->paged)
        return s->span[span].first + key;
    return (int64_t)s->pages[s->span[span].first + key / PAGE] * PAGE + key % PAGE;
}

static void reference(const cached *s, double *out, const float *q, const float *k, const float *v) {
    const int64_t width = (int64_t)s->kv_heads * s->dim;
    for (int i = 0; i < SPANS; i++)
        for (int32_t head = 0; head < s->heads && s->span[i].queries == 1; head++) {
            double p[256], sum = 0, most = -INFINITY;
            const int64_t at = ((int64_t)i * s->heads + head) * s->dim, kv = head / (s->heads / s->kv_heads) * s->dim;
            for (int32_t j = 0; j < s->span[i].keys; j++) {
                p[j] = 0;
                for (int32_t d = 0; d < s->dim; d++)
                    p[j] += (double)q[at + d] * k[row_of(s, i, j) * width + kv + d] / sqrt(s->dim);
                most = fmax(most, p[j]);
            }
            for (int32_t j = 0; j < s->span[i].keys; j++)
                sum += p[j] = exp(p[j] - most);
            for (int32_t j = 0; j < s->span[i].keys; j++)
                for (int32_t d = 0; d < s->dim; d++)
                    out[at + d] += p[j] / sum * v[row_of(s, i, j) * width + kv + d];
        }
}

static void check(checker *c, cached *s, int32_t page) {
    psoup__gpu *gpu = psoup__gpu_of(c->be);
    begin(c, "attention_decode", "%s, head_dim %d, heads %d of %d, %s", psoup_dtype_name(s->dtype), (int)s->dim,
          (int)s->heads, (int)s->kv_heads, s->paged ? "pages" : "rows");
    lay_out(s);
    const size_t n = (size_t)SPANS * (size_t)s->heads * (size_t)s->dim;
    const size_t width = (size_t)s->kv_heads * (size_t)s->dim, cells = (size_t)s->rows * width;
    buffer *q = input(c, n), *k = input_of(c, cells, s->dtype), *v = input_of(c, cells, s->dtype);
    buffer *out = output(c, n);
    for (int i = 0; s->paged && i < SPANS; i++) /* what a page holds beyond the last key is anything */
        for (int32_t j = lengths[i]; j % PAGE != 0; j++)
            for (size_t d = 0; d < width; d++)
                k->host[(size_t)row_of(s, i, j) * width + d] = v->host[(size_t)row_of(s, i, j) * width + d] = NAN;
    put(c, k);
    put(c, v);
    double *want = doubles(n);
    reference(s, want, q->host, k->host, v->host);
    psoup__keys keys = {.dtype = s->dtype, .stride = (int64_t)width, .k = k->device, .v = v->device};
    keys.pages = s->paged ? block(c, s->pages, sizeof s->pages) : NULL;
    psoup__spans spans = {block(c, s->span, sizeof s->span), SPANS, 1, 200};
    psoup__attention_shape shape = {s->heads, s->kv_heads, s->dim, (float)(1 / sqrt(s->dim)), s->dtype};
    c->ops->reserve(c->be, SPANS, 8 * s->heads * s->dim, NULL);
    const int32_t kept = gpu->ops.page;
    gpu->ops.page = page;
    expect_true(c, "a kernel is made for it",
                psoup__gpu_attention_decode(gpu, out->device, q->device, &keys, &spans, &shape));
    gpu->ops.page = kept;
    get(c, out);
    for (size_t i = 0; i < (size_t)s->heads * (size_t)s->dim; i++) {
        size_t at = 2 * (size_t)s->heads * (size_t)s->dim + i;
        expect_true(c, "the row of another span is left alone", isnan(out->host[at]));
        out->host[at] = 0;
    }
    put(c, out);
    expect(c, "out", out, want, 2e-6);
    free(want);
}

void check_attention_decode(checker *c) {
    static const int32_t heads[][2] = {{1, 1}, {4, 2}, {3, 1}, {10, 1}};
    static const psoup_dtype dtypes[] = {PSOUP_F32, PSOUP_BF16, PSOUP_F16};
    for (int32_t dim = 64; c->cuda && dim <= 256; dim *= 2)
        for (int h = 0; h < 4; h++)
            for (int d = 0; d < 3; d++)
                check(c, &(cached){heads[h][0], heads[h][1], dim, dtypes[d], (h + d) % 2 == 1, .rows = 0}, PAGE);
}
