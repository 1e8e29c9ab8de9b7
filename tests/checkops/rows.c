/* Rows on the move: embedding, gather and scatter, the cache, and the scalar head that reads single rows. */
#include "checkops.h"

/* Rows of a table of 1000, each another, out of order and with gaps. */
enum { TABLE = 1000 };
static int32_t *distinct(checker *c, int32_t n, int32_t *row) {
    for (int32_t i = 0; i < n; i++)
        row[i] = (i * 387 + 11) % TABLE;
    return block(c, row, (size_t)n * sizeof *row);
}

/* x[i] = table[row[i]] of `width` numbers. */
static void pick(double *x, const float *table, const int32_t *row, int32_t n, int32_t width) {
    for (int32_t i = 0; i < n; i++)
        for (int32_t j = 0; j < width; j++)
            x[i * width + j] = table[row[i] * width + j];
}

static void check_embed(checker *c, int32_t rows, int32_t width, psoup_dtype dtype) {
    begin(c, "embed", "rows %d, width %d, %s", (int)rows, (int)width, psoup_dtype_name(dtype));
    int32_t token[64];
    const size_t n = (size_t)rows * (size_t)width;
    buffer *table = input_of(c, TABLE * (size_t)width, dtype), *out = output(c, n);
    int32_t *tokens = distinct(c, rows, token);
    psoup__weight weight = {.dtype = dtype, .out = TABLE, .in = width, .data = table->device};
    double *want = doubles(n);
    pick(want, table->host, token, rows, width);
    c->ops->embed(c->be, out->device, &weight, tokens, rows);
    expect(c, "out", out, want, 0);
    free(want);
}

/* A token's rows are summed in f32, in their order, whatever comes between them. */
static void check_embed_backward(checker *c, int32_t rows, int32_t width, int32_t vocab) {
    begin(c, "embed_backward", "rows %d, width %d, vocab %d", (int)rows, (int)width, (int)vocab);
    const size_t n = (size_t)rows * (size_t)width, m = (size_t)vocab * (size_t)width;
    buffer *dtable = input(c, m), *dout = input(c, n);
    int32_t *token = malloc((size_t)rows * sizeof *token);
    float *sum = malloc(m * sizeof *sum);
    memcpy(sum, dtable->host, m * sizeof *sum);
    for (int32_t i = 0; i < rows; i++) {
        token[i] = (i * i + i / 3) % vocab;
        for (int32_t j = 0; j < width; j++)
            sum[token[i] * width + j] += dout->host[i * width + j];
    }
    int32_t *tokens = block(c, token, (size_t)rows * sizeof *token);
    c->ops->embed_backward(c->be, dtable->device, dout->device, tokens, vocab, width, rows);
    get(c, dtable);
    expect_true(c, "each token's rows are summed in order", memcmp(dtable->host, sum, m * sizeof *sum) == 0);
    free(token), free(sum);
}

/* Into every third row of a cache whose rows are wider than what is written; the rest stays. */
static void check_cache_append(checker *c, int32_t rows, int32_t width, int32_t gap, psoup_dtype dtype) {
    begin(c, "cache_append", "rows %d, width %d, gap %d, %s", (int)rows, (int)width, (int)gap,
          psoup_dtype_name(dtype));
    const int32_t stride = width + gap;
    const size_t n = (size_t)rows * (size_t)width, m = 3 * (size_t)rows * (size_t)stride;
    buffer *k = input(c, n), *v = input(c, n);
    buffer *cache[2] = {input_of(c, m, dtype), input_of(c, m, dtype)};
    buffer *rounded[2] = {input_of(c, n, dtype), input_of(c, n, dtype)};
    int32_t *place = malloc((size_t)rows * sizeof *place);
    double *want[2] = {doubles_of(cache[0]->host, m), doubles_of(cache[1]->host, m)};
    for (int i = 0; i < 2; i++) {
        memcpy(rounded[i]->host, (i ? v : k)->host, n * sizeof *k->host);
        put(c, rounded[i]);
    }
    for (int32_t i = 0; i < rows; i++) {
        place[i] = 3 * (rows - 1 - i) + i % 2;
        for (int32_t j = 0; j < width; j++)
            for (int which = 0; which < 2; which++)
                want[which][place[i] * stride + j] = rounded[which]->host[i * width + j];
    }
    int32_t *places = block(c, place, (size_t)rows * sizeof *place);
    psoup__keys keys = {.dtype = dtype, .stride = stride, .k = cache[0]->device, .v = cache[1]->device};
    c->ops->cache_append(c->be, &keys, places, k->device, v->device, rows, width);
    expect(c, "k", cache[0], want[0], 0);
    expect(c, "v", cache[1], want[1], 0);
    free(place), free(want[0]), free(want[1]);
}

static void check_gather(checker *c, int32_t rows, int32_t width) {
    begin(c, "gather_rows", "rows %d, width %d", (int)rows, (int)width);
    int32_t row[64];
    const size_t n = (size_t)rows * (size_t)width;
    buffer *in = input(c, TABLE * (size_t)width), *out = output(c, n);
    int32_t *list = distinct(c, rows, row);
    double *want = doubles(n);
    pick(want, in->host, row, rows, width);
    c->ops->gather_rows(c->be, out->device, in->device, list, rows, width);
    expect(c, "out", out, want, 0);
    free(want);
}

static void check_scatter(checker *c, int32_t rows, int32_t width, bool scaled) {
    begin(c, "scatter_add_rows", "rows %d, width %d%s", (int)rows, (int)width, scaled ? ", scaled" : "");
    int32_t row[64];
    const size_t m = TABLE * (size_t)width;
    buffer *out = input(c, m), *in = input(c, (size_t)rows * (size_t)width), *scale = input(c, (size_t)rows);
    int32_t *list = distinct(c, rows, row);
    double *want = doubles_of(out->host, m);
    for (int32_t i = 0; i < rows; i++)
        for (int32_t j = 0; j < width; j++)
            want[row[i] * width + j] += in->host[i * width + j] * (scaled ? (double)scale->host[i] : 1);
    c->ops->scatter_add_rows(c->be, out->device, in->device, scaled ? scale->device : NULL, list, rows,
                             width);
    expect(c, "out", out, want, 1e-7);
    free(want);
}

/* Sums of one row, of none, of four, of one, … */
static void check_combine(checker *c, int32_t n, int32_t width) {
    static const int32_t sizes[] = {1, 0, 4, 1, 2};
    begin(c, "combine_rows", "n %d, width %d", (int)n, (int)width);
    int32_t first[65] = {5};
    for (int32_t i = 0; i < n; i++)
        first[i + 1] = first[i] + sizes[i % 5];
    const size_t rows = (size_t)(first[n] - first[0]), m = (size_t)n * (size_t)width;
    buffer *in = input(c, rows * (size_t)width), *weight = input(c, rows), *out = output(c, m);
    const int32_t *list = block(c, first, (size_t)(n + 1) * sizeof *first);
    double *want = doubles(m);
    for (int32_t i = 0; i < n; i++)
        for (int32_t k = first[i] - first[0]; k < first[i + 1] - first[0]; k++)
            for (int32_t j = 0; j < width; j++)
                want[i * width + j] += (sizes[i % 5] == 1 ? 1 : (double)weight->host[k]) * in->host[k * width + j];
    c->ops->combine_rows(c->be, out->device, in->device, weight->device, list, n, width);
    expect(c, "out", out, want, 2e-7);
    free(want);
}

/* Every third row of `hidden`, of which a later one comes first; the values are in a third order. */
static void check_head(checker *c, int32_t n, int32_t width, bool all) {
    begin(c, "head", "n %d, width %d%s", (int)n, (int)width, all ? "" : ", without bias and dhidden");
    psoup_error error;
    const size_t m = 3 * (size_t)n * (size_t)width;
    buffer *hidden = input(c, m), *w = input(c, (size_t)width), *bias = input(c, 1);
    buffer *dhidden = input(c, m), *dw = input(c, (size_t)width), *dbias = input(c, 1);
    buffer *value = input(c, (size_t)n), *dvalue = input(c, (size_t)n), *weight = input(c, (size_t)n);
    int32_t *row = malloc((size_t)n * sizeof *row), *at = malloc((size_t)n * sizeof *at);
    double *want = doubles((size_t)n), *want_hidden = doubles_of(dhidden->host, m);
    double *want_w = doubles_of(dw->host, (size_t)width), want_bias = dbias->host[0];
    for (int32_t i = 0; i < n; i++) {
        row[i] = 3 * (n - 1 - i) + i % 2;
        at[i] = (i + n / 2) % n;
        const double d = (double)weight->host[i] * dvalue->host[at[i]];
        double out = all ? bias->host[0] : 0;
        want_bias += all ? d : 0;
        for (int32_t j = 0; j < width; j++) {
            const int32_t k = row[i] * width + j;
            out += (double)hidden->host[k] * w->host[j];
            want_w[j] += d * hidden->host[k];
            want_hidden[k] += all ? d * w->host[j] : 0;
        }
        want[at[i]] = value->host[at[i]] + weight->host[i] * out;
    }
    int32_t *list = block(c, row, (size_t)n * sizeof *row), *places = block(c, at, (size_t)n * sizeof *at);
    c->ops->head(c->be, value->device, hidden->device, list, places, weight->device, w->device,
                 all ? bias->device : NULL, n, width);
    /* A sum's rounding grows with the root of its terms. */
    expect(c, "value", value, want, 1e-6 * fmax(1, sqrt(width / 1024.0)));
    expect_true(c, "there is room", c->ops->reserve(c->be, n, width, &error) == PSOUP_OK);
    c->ops->head_backward(c->be, all ? dhidden->device : NULL, dw->device, all ? dbias->device : NULL,
                          dvalue->device, hidden->device, list, places, weight->device, w->device, n, width);
    expect(c, "dhidden", dhidden, want_hidden, 1e-6);
    expect(c, "dw", dw, want_w, 1e-6);
    expect(c, "dbias", dbias, &want_bias, 1e-6);
    free(row), free(at), free(want), free(want_hidden), free(want_w);
}

/* ---- the head by finite differences ------------------------------------------------------------------- */

/* Σ_i dvalue[at i] weight[i] (w · hidden[row i] + bias), from these numbers alone. */
typedef struct heads {
    int32_t n, width;
    const int32_t *row, *at;
    double *hidden, *w, *bias, *dvalue, *weight;
} heads;

static double head_loss(void *arg) {
    const heads *h = arg;
    double loss = 0;
    for (int32_t i = 0; i < h->n; i++) {
        double value = h->bias[0];
        for (int32_t j = 0; j < h->width; j++)
            value += h->w[j] * h->hidden[h->row[i] * h->width + j];
        loss += h->dvalue[h->at[i]] * h->weight[i] * value;
    }
    return loss;
}

static void check_head_differences(checker *c, int32_t width) {
    enum { N = 4 };
    static const int32_t row[N] = {6, 0, 3, 5}, at[N] = {2, 3, 0, 1};
    const size_t sizes[] = {7 * (size_t)width, (size_t)width, 1};
    static const char *const names[] = {"dhidden", "dw", "dbias"};
    begin(c, "head_backward", "width %d, by finite differences", (int)width);
    psoup_error error;
    buffer *read[3], *grown[3], *dvalue = input(c, N), *weight = input(c, N);
    float *before[3];
    double *numbers[3];
    for (int k = 0; k < 3; k++) {
        read[k] = input(c, sizes[k]);
        grown[k] = input(c, sizes[k]);
        numbers[k] = doubles_of(read[k]->host, sizes[k]);
        before[k] = malloc(sizes[k] * sizeof(float));
        memcpy(before[k], grown[k]->host, sizes[k] * sizeof(float));
    }
    heads h = {N, width, row, at, numbers[0], numbers[1], numbers[2], doubles_of(dvalue->host, N),
               doubles_of(weight->host, N)};
    int32_t *list = block(c, row, sizeof row), *places = block(c, at, sizeof at);
    expect_true(c, "there is room", c->ops->reserve(c->be, N, width, &error) == PSOUP_OK);
    c->ops->head_backward(c->be, grown[0]->device, grown[1]->device, grown[2]->device, dvalue->device, read[0]->device,
                          list, places, weight->device, read[1]->device, N, width);
    for (int k = 0; k < 3; k++)
        differences(c, names[k], grown[k], before[k], numbers[k], sizes[k], 1, head_loss, &h, 1e-5);
    for (int k = 0; k < 3; k++)
        free(before[k]), free(numbers[k]);
    free(h.dvalue), free(h.weight);
}

void check_rows(checker *c) {
    static const psoup_dtype dtypes[] = {PSOUP_F32, PSOUP_F16, PSOUP_BF16};
    for (int i = 0; i < RAGGED; i++) {
        const int32_t width = ragged[i];
        for (int d = 0; d < 3; d++) {
            check_embed(c, 5, width, dtypes[d]);
            if (c->cuda || dtypes[d] == PSOUP_F32) { /* what `cache` says */
                check_cache_append(c, 5, width, 0, dtypes[d]);
                check_cache_append(c, 3, width, 1 + 7 * (i % 2), dtypes[d]);
            }
        }
        check_embed_backward(c, 40, width, 7);
        check_gather(c, 5, width);
        check_scatter(c, 5, width, i % 2);
        check_combine(c, 7, width);
        check_head(c, 3, width, true);
        check_head(c, 21, width, i % 2);
    }
    check_embed_backward(c, 700, 8, 90); /* more rows than threads */
    check_embed_backward(c, 300, 5, 1);
    check_embed_backward(c, 3, 4100, 2); /* more columns than a block's */
    check_combine(c, 1, 4100);
    check_combine(c, 64, 2049);
    check_head(c, 7, 4100, true);
    check_head(c, 2, 8193, true);
    for (int i = 0; i < RAGGED; i++)
        check_head_differences(c, ragged[i]);
}
