/* What stands between the linear layers. */
#include "checkops.h"

static void check_rmsnorm(checker *c, int32_t rows, int32_t width, bool residual) {
    begin(c, "rmsnorm", "rows %d, width %d%s", (int)rows, (int)width, residual ? ", with a residual" : "");
    const size_t n = (size_t)rows * (size_t)width;
    buffer *x = input(c, n), *y = residual ? input(c, n) : NULL, *weight = input(c, (size_t)width), *out = output(c, n);
    buffer *rstd = output(c, (size_t)rows);
    c->ops->rmsnorm(c->be, out->device, rstd->device, x->device, y ? y->device : NULL, weight->device, 1e-5f, rows,
                    width);
    for (size_t i = 0; y && i < n; i++)
        y->host[i] += x->host[i];
    get(c, x);
    if (y)
        expect_true(c, "x is the sum", memcmp(x->host, y->host, n * sizeof *x->host) == 0);
    double *want = doubles(n), *rstd_want = doubles((size_t)rows);
    for (int32_t i = 0; i < rows; i++) {
        double sum = 0;
        for (int32_t j = 0; j < width; j++)
            sum += (double)x->host[i * width + j] * x->host[i * width + j];
        rstd_want[i] = 1 / sqrt(sum / width + 1e-5);
        for (int32_t j = 0; j < width; j++)
            want[i * width + j] = x->host[i * width + j] * rstd_want[i] * weight->host[j];
    }
    expect(c, "out", out, want, 1e-6);
    expect(c, "rstd", rstd, rstd_want, 1e-6);
    free(want), free(rstd_want);
}

static void check_add(checker *c, size_t n) {
    begin(c, "add", "n %zu", n);
    buffer *x = input(c, n), *y = input(c, n);
    double *want = doubles_of(x->host, n);
    for (size_t i = 0; i < n; i++)
        want[i] += y->host[i];
    c->ops->add(c->be, x->device, y->device, n);
    expect(c, "x", x, want, 1e-7);
    free(want);
}

/* With x̂ = x · rstd and g = dout · weight: dx += rstd · (g − x̂ · mean(g · x̂)), dweight += Σ dout · x̂. The
 * buffers begin `shift` elements into their memory. */
static void check_rmsnorm_backward(checker *c, int32_t rows, int32_t width, size_t shift, bool wants_weight) {
    begin(c, "rmsnorm_backward", "rows %d, width %d, shift %zu%s", (int)rows, (int)width, shift,
          wants_weight ? "" : ", no dweight");
    psoup_error error;
    const size_t n = (size_t)rows * (size_t)width;
    const size_t columns = (size_t)width + shift;
    buffer *dx = input(c, n + shift), *dweight = input(c, columns), *dout = input(c, n + shift);
    buffer *x = input(c, n + shift), *weight = input(c, columns), *rstd = input(c, (size_t)rows);
    double *want = doubles_of(dx->host, n + shift), *want_weight = doubles_of(dweight->host, columns);
    for (int32_t i = 0; i < rows; i++) {
        const float *row = x->host + shift + (size_t)i * (size_t)width;
        const float *drow = dout->host + shift + (size_t)i * (size_t)width;
        const double r = rstd->host[i];
        double mean = 0;
        for (int32_t j = 0; j < width; j++)
            mean += drow[j] * (double)weight->host[shift + (size_t)j] * row[j] * r / width;
        for (int32_t j = 0; j < width; j++) {
            const double g = drow[j] * (double)weight->host[shift + (size_t)j];
            want[shift + (size_t)i * (size_t)width + (size_t)j] += r * (g - row[j] * r * mean);
            if (wants_weight)
                want_weight[shift + (size_t)j] += drow[j] * (row[j] * r);
        }
    }
    expect_true(c, "there is room", c->ops->reserve(c->be, rows, width, &error) == PSOUP_OK);
    c->ops->rmsnorm_backward(c->be, dx->device + shift, wants_weight ? dweight->device + shift : NULL,
                             dout->device + shift, x->device + shift, weight->device + shift, rstd->device,
                             rows, width);
    expect(c, "dx", dx, want, 1e-6);
    expect(c, "dweight", dweight, want_weight, 1e-6);
    free(want), free(want_weight);
}

/* <dout, out> of x / sqrt(mean(x²) + 1e-5) · weight. */
typedef struct norm {
    int32_t rows, width;
    double *x, *weight, *dout;
} norm;

static double norm_loss(void *arg) {
    const norm *p = arg;
    double loss = 0;
    for (int32_t r = 0; r < p->rows; r++) {
        const double *x = p->x + r * p->width, *dout = p->dout + r * p->width;
        double all = 0;
        for (int32_t j = 0; j < p->width; j++)
            all += dout[j] * x[j] * p->weight[j];
        loss += all / sqrt(inner(x, x, (size_t)p->width) / p->width + 1e-5);
    }
    return loss;
}

static void check_norm_differences(checker *c, int32_t rows, int32_t width) {
    begin(c, "rmsnorm_backward", "rows %d, width %d, by finite differences", (int)rows, (int)width);
    const size_t n = (size_t)rows * (size_t)width, columns = (size_t)width;
    buffer *x = input(c, n), *weight = input(c, columns), *dout = input(c, n), *out = output(c, n);
    buffer *rstd = output(c, (size_t)rows), *dx = input(c, n), *dweight = input(c, columns);
    norm p = {rows, width, doubles_of(x->host, n), doubles_of(weight->host, columns), doubles_of(dout->host, n)};
    float *before = malloc((n + columns) * sizeof *before);
    memcpy(before, dx->host, n * sizeof *before);
    memcpy(before + n, dweight->host, columns * sizeof *before);
    psoup_error error;
    expect_true(c, "there is room", c->ops->reserve(c->be, rows, width, &error) == PSOUP_OK);
    c->ops->rmsnorm(c->be, out->device, rstd->device, x->device, NULL, weight->device, 1e-5f, rows, width);
    c->ops->rmsnorm_backward(c->be, dx->device, dweight->device, dout->device, x->device, weight->device, rstd->device,
                             rows, width);
    differences(c, "dx", dx, before, p.x, n, 1, norm_loss, &p, 1e-4);
    differences(c, "dweight", dweight, before + n, p.weight, columns, 1, norm_loss, &p, 1e-4);
    free(before), free(p.x), free(p.weight), free(p.dout);
}

/* Forward and back; what lies between heads · head_dim and the stride stays. */
static void check_rope(checker *c, int32_t rows, int32_t heads, int32_t head_dim, int32_t gap) {
    begin(c, "rope", "rows %d, heads %d, head_dim %d, gap %d", (int)rows, (int)heads, (int)head_dim,
          (int)gap);
    enum { POSITIONS = 40 };
    const int32_t half = head_dim / 2, stride = heads * head_dim + gap;
    const size_t n = (size_t)rows * (size_t)stride;
    buffer *table = input(c, POSITIONS * (size_t)head_dim), *x = input(c, n);
    int32_t *position = malloc((size_t)rows * sizeof *position);
    double *before = doubles_of(x->host, n), *want = doubles_of(x->host, n);
    for (int32_t p = 0; p < POSITIONS * half; p++) {
        float *cosine = table->host + p / half * head_dim + p % half;
        const float angle = cosine[0];
        cosine[0] = cosf(angle), cosine[half] = sinf(angle);
    }
    put(c, table);
    for (int32_t i = 0; i < rows; i++) {
        position[i] = (i * 17 + 3) % POSITIONS;
        for (int32_t k = 0; k < heads * half; k++) {
            double *low = want + i * stride + k / half * head_dim + k % half;
            const float *cosine = table->host + position[i] * head_dim + k % half;
            const double a = low[0], b = low[half];
            low[0] = a * cosine[0] - b * cosine[half];
            low[half] = b * cosine[0] + a * cosine[half];
        }
    }
    int32_t *positions = block(c, position, (size_t)rows * sizeof *position);
    c->ops->rope(c->be, x->device, table->device, positions, rows, heads, head_dim, stride, false);
    expect(c, "x", x, want, 1e-6);
    c->ops->rope(c->be, x->device, table->device, positions, rows, heads, head_dim, stride, true);
    expect(c, "x turned back", x, before, 1e-6);
    free(position), free(before), free(want);
}

static bool same_bits(checker *c, buffer *a, buffer *b) {
    get(c, a), get(c, b);
    return memcmp(a->host, b->host, a->n * sizeof *a->host) == 0;
}

/* To the bits of rope, rope and cache_append. Rows of the cache that are not written, and what lies between them, stay. */
static void check_rope_append(checker *c, int32_t rows, int32_t group, int32_t head_dim, int32_t gap, psoup_dtype dtype) {
    enum { POSITIONS = 40, KV_HEADS = 2 };
    const psoup__attention_shape shape = {KV_HEADS * group, KV_HEADS, head_dim, 1, dtype};
    const int32_t width = KV_HEADS * head_dim, stride = width + gap;
    const size_t n = (size_t)rows * (size_t)width, m = 2 * (size_t)rows * (size_t)stride;
    begin(c, "rope_append", "%s, rows %d, heads %d of %d, head_dim %d, gap %d", psoup_dtype_name(dtype), (int)rows,
          KV_HEADS, (int)shape.heads, (int)head_dim, (int)gap);
    buffer *table = input(c, POSITIONS * (size_t)head_dim), *v = input(c, n);
    buffer *q = input(c, (size_t)group * n), *k = input(c, n), *cache[2] = {input_of(c, m, dtype), input_of(c, m, dtype)};
    buffer *q_apart = values(c, q->host, q->n), *k_apart = values(c, k->host, n);
    buffer *apart[2] = {input_of(c, m, dtype), input_of(c, m, dtype)};
    int32_t *position = malloc(2 * (size_t)rows * sizeof *position), *place = position + rows;
    for (int i = 0; i < 2; i++) {
        memcpy(apart[i]->host, cache[i]->host, m * sizeof *cache[i]->host);
        put(c, apart[i]);
    }
    for (int32_t i = 0; i < rows; i++) {
        position[i] = (i * 17 + 3) % POSITIONS;
        place[i] = 2 * (rows - 1 - i) + i % 2;
    }
    const int32_t *positions = block(c, position, (size_t)rows * sizeof *position);
    const int32_t *places = block(c, place, (size_t)rows * sizeof *place);
    const psoup__keys to = {.dtype = dtype, .stride = stride, .k = cache[0]->device, .v = cache[1]->device};
    const psoup__keys to_apart = {.dtype = dtype, .stride = stride, .k = apart[0]->device, .v = apart[1]->device};
    c->ops->rope(c->be, q_apart->device, table->device, positions, rows, shape.heads, head_dim, group * width, false);
    c->ops->rope(c->be, k_apart->device, table->device, positions, rows, KV_HEADS, head_dim, width, false);
    c->ops->cache_append(c->be, &to_apart, places, k_apart->device, v->device, rows, width);
    c->ops->rope_append(c->be, q->device, k->device, v->device, table->device, positions, &to, places, rows, &shape);
    expect_true(c, "q is turned", same_bits(c, q, q_apart));
    expect_true(c, "k is turned and put there", same_bits(c, cache[0], apart[0]));
    expect_true(c, "v is put there", same_bits(c, cache[1], apart[1]));
    free(position);
}

typedef struct gate_loss {
    double *gate, *up, *dout;
    size_t n;
} gate_loss;

static double swiglu_loss(void *arg) {
    const gate_loss *l = arg;
    double sum = 0;
    for (size_t i = 0; i < l->n; i++)
        sum += l->dout[i] * l->gate[i] / (1 + exp(-l->gate[i])) * l->up[i];
    return sum;
}

static void check_swiglu(checker *c, size_t n, size_t shift) {
    begin(c, "swiglu", "n %zu, shift %zu", n, shift);
    static const float edges[] = {0, -0.0f, 20, -20, 90, -90, 1e4f, -1e4f};
    buffer *gate = input(c, n + shift), *up = input(c, n), *dout = input(c, n), *out = output(c, n);
    buffer *dgate = output(c, n), *dup = output(c, n);
    for (size_t i = 0; i < sizeof edges / sizeof *edges && 8 * i + 3 < n; i++)
        gate->host[shift + 8 * i + 3] = edges[i];
    put(c, gate);
    double *want = doubles(n);
    for (size_t i = 0; i < n; i++) {
        const double g = gate->host[shift + i];
        want[i] = g / (1 + exp(-g)) * up->host[i];
    }
    c->ops->swiglu(c->be, out->device, gate->device + shift, up->device, n);
    expect(c, "out", out, want, 1e-6);
    c->ops->swiglu_backward(c->be, dgate->device, dup->device, dout->device, gate->device + shift, up->device,
                            n);
    gate_loss l = {doubles_of(gate->host + shift, n), doubles_of(up->host, n), doubles_of(dout->host, n), n};
    const size_t step = n / 16 + 1;
    differences(c, "dgate", dgate, NULL, l.gate, n, step, swiglu_loss, &l, 1e-4);
    differences(c, "dup", dup, NULL, l.up, n, step, swiglu_loss, &l, 1e-4);
    for (size_t i = 0; i < n; i++) {
        const double sigmoid = 1 / (1 + exp(-l.gate[i]));
        want[i] = l.dout[i] * l.up[i] * sigmoid * (1 + l.gate[i] * (1 - sigmoid));
    }
    expect(c, "dgate", dgate, want, 1e-6);
    for (size_t i = 0; i < n; i++)
        l.up[i] = l.dout[i] * l.gate[i] / (1 + exp(-l.gate[i]));
    expect(c, "dup", dup, l.up, 1e-6);
    memmove(gate->host, gate->host + shift, n * sizeof *gate->host), put(c, gate);
    c->ops->swiglu_backward(c->be, gate->device, up->device, dout->device, gate->device, up->device, n);
    get(c, gate), get(c, up);
    expect_true(c, "the same in place", memcmp(gate->host, dgate->host, n * sizeof *gate->host) == 0 &&
                                            memcmp(up->host, dup->host, n * sizeof *up->host) == 0);
    free(l.gate), free(l.up), free(l.dout), free(want);
}

/* Bit for bit: kept are those whose word, by base/philox.c, is no less than p. */
static void check_dropout(checker *c, int32_t rows, int32_t width, float p) {
    begin(c, "dropout", "rows %d, width %d, p %g", (int)rows, (int)width, (double)p);
    const size_t n = (size_t)rows * (size_t)width;
    buffer *in = input(c, n), *out = output(c, n), *dx = input(c, n);
    float *want = malloc(n * sizeof *want);
    double *sum = doubles_of(dx->host, n);
    uint64_t *table = malloc(3 * (size_t)rows * sizeof *table);
    psoup__dropout options = {.p = p, .seed = table, .stream = table + rows, .offset = table + 2 * rows};
    for (int32_t i = 0; i < rows; i++) {
        table[i] = (uint64_t)i % 3 << 40 | 0x9876543210u;
        table[rows + i] = (uint64_t)i << 33 | 5;
        table[2 * rows + i] = (uint64_t)i << 34 | (uint64_t)(i * 7);
        for (int32_t j = 0; j < width; j++) {
            const size_t at = (size_t)i * (size_t)width + (size_t)j;
            const uint64_t position = table[2 * rows + i] * (uint64_t)width + (uint64_t)j;
            const uint32_t word = psoup__philox_word(table[i], table[rows + i], position);
            want[at] = psoup__uniform(word) >= p ? in->host[at] * (1.0f / (1.0f - p)) : 0;
            sum[at] += want[at];
        }
    }
    c->ops->dropout(c->be, out->device, in->device, &options, rows, width);
    c->ops->dropout_backward(c->be, dx->device, in->device, &options, rows, width);
    get(c, out);
    expect_true(c, "out is in where it is kept", memcmp(out->host, want, n * sizeof *want) == 0);
    expect(c, "dx", dx, sum, 1e-7);
    c->ops->dropout(c->be, in->device, in->device, &options, rows, width);
    get(c, in);
    expect_true(c, "the same in place", memcmp(in->host, want, n * sizeof *want) == 0);
    free(want), free(sum), free(table);
}

void check_layer(checker *c) {
    static const psoup_dtype dtypes[] = {PSOUP_F32, PSOUP_BF16, PSOUP_F16};
    for (int i = 0; i < RAGGED; i++) {
        check_rmsnorm(c, 5, ragged[i], false);
        check_rmsnorm(c, 3, ragged[i], true);
        check_rmsnorm_backward(c, 4, ragged[i], 0, true);
        check_rmsnorm_backward(c, 5, ragged[i], 0, i % 2);
        check_norm_differences(c, 3, ragged[i]);
        check_add(c, (size_t)ragged[i] * 37);
        check_swiglu(c, (size_t)ragged[i] * 3, 0);
        check_swiglu(c, (size_t)ragged[i], 1);
        check_rope(c, 3, 1 + i % 3, 2 * ragged[i], 0);
        check_dropout(c, 5, ragged[i], 0.25f);
        for (int d = 0; d < (c->cuda ? 3 : 1); d++)
            check_rope_append(c, 5, 1 + (i + d) % 3, 2 * ragged[i], (i + d) % 4, dtypes[d]);
    }
    check_rmsnorm_backward(c, 37, 128, 0, true);
    check_rmsnorm_backward(c, 9, 128, 1, true);
    static const int32_t wide[] = {4096, 4097, 5120, 8192, 8193}; /* as many kernels as there are */
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++) {
        check_rmsnorm_backward(c, 6, wide[i], 0, true);
        check_rmsnorm_backward(c, 2, wide[i], 0, true);
        check_rmsnorm_backward(c, 2, wide[i], 0, false);
    }
    check_rmsnorm(c, 2, 8193, false);
    check_rmsnorm(c, 2, 4096, true);
    check_rmsnorm(c, 2, 8193, true);
    check_rope(c, 3, 5, 64, 128);
    check_rope(c, 3, 5, 64, 1);
    check_dropout(c, 3, 64, 0);
    check_dropout(c, 300, 8, 0.9f);
    check_dropout(c, 66000, 3, 0.5f); /* more rows than one kernel takes */
}
