/* The ops that multiply: linear layers with their adapters, and attention. */
#include "bench.h"

/* ---- linear_mix ---------------------------------------------------------------------------------------- */

typedef enum sharing {
    BASE,    /* no adapters */
    ONE_HOT, /* every row one of them, rows of one together */
    SOUP     /* every row all of them */
} sharing;

typedef struct linear {
    int32_t rows, in, out, n, rank;
    psoup_dtype blocks; /* INT8, NF4: of the weight, forward; or 0 */
    int32_t first[MOST_ADAPTERS + 1];
} linear;

enum { Y, U, X, W, A, B, WEIGHT, ROWS, DX, DU, DA, DB, SCALES = DX };

/* The op's own view of the memory. */
static psoup__mix mix_of(const linear *l, void *const *p) {
    return (psoup__mix){.n = l->n, .weight = p[WEIGHT], .rows = p[ROWS], .first = l->first};
}

static void factors_of(const linear *l, void *const *p, bool gradients, psoup__lora *lora) {
    const int64_t a = (int64_t)l->rank * l->in, b = (int64_t)l->rank * l->out;
    for (int32_t i = 0; i < l->n; i++) {
        lora[i] = (psoup__lora){.rank = l->rank, .scale = 2, .a = (float *)p[A] + i * a,
                                .b = (float *)p[B] + i * b};
        lora[i].da = gradients ? (float *)p[DA] + i * a : NULL;
        lora[i].db = gradients ? (float *)p[DB] + i * b : NULL;
    }
}

static void run_forward(bench *b, void *const *p, const void *arg) {
    const linear *l = arg;
    const psoup__weight w = {.dtype = l->blocks ? l->blocks : PSOUP_BF16, .out = l->out, .in = l->in, .data = p[W],
                             .scales = l->blocks ? p[SCALES] : NULL, .values = PSOUP_BF16};
    const psoup__mix mix = mix_of(l, p);
    psoup__lora lora[MOST_ADAPTERS];
    factors_of(l, p, false, lora);
    b->ops->linear_mix(b->be, p[Y], p[U], p[X], p[X], &w, NULL, lora, &mix, l->rows);
}

static void run_backward(bench *b, void *const *p, const void *arg) {
    const linear *l = arg;
    const psoup__weight w = {.dtype = PSOUP_BF16, .out = l->out, .in = l->in, .data = p[W]};
    const psoup__mix mix = mix_of(l, p);
    psoup__lora lora[MOST_ADAPTERS];
    factors_of(l, p, true, lora);
    b->ops->linear_mix_backward(b->be, p[DX], p[DX], NULL, NULL, p[DU], p[Y], p[X], p[X], p[U], &w, lora,
                                &mix, l->rows);
}

static void bench_linear(bench *b, int32_t rows, int32_t in, int32_t out, sharing shared, psoup_dtype blocks,
                         bool backward) {
    static const char *const names[] = {"base", "one adapter a row of", "a soup of"};
    const int32_t n = shared == BASE ? 0 : b->s.adapters;
    linear l = {.rows = rows, .in = in, .out = out, .n = n, .rank = b->s.rank, .blocks = blocks};
    const int32_t most = n > 0 ? n : 1;
    int32_t *row = malloc((size_t)rows * (size_t)most * sizeof *row);
    float *weight = calloc((size_t)rows * (size_t)most, sizeof *weight);
    int32_t used = 0; /* adapters */
    for (int32_t i = 0; i < n; i++) {
        l.first[i + 1] = l.first[i];
        for (int32_t r = 0; r < rows; r++)
            if (shared == SOUP || (int64_t)r * n / rows == i) {
                row[l.first[i + 1]++] = r;
                weight[r * n + i] = shared == SOUP ? 1 / (float)n : 1;
            }
        used += l.first[i + 1] > l.first[i];
    }
    const double uses = l.first[n], x = (double)rows * in, y = (double)rows * out;
    const double factors = (double)used * l.rank * (in + out), u = uses * l.rank;
    const size_t n_a = (size_t)most * (size_t)l.rank * (size_t)in;
    const size_t n_b = (size_t)most * (size_t)l.rank * (size_t)out, n_x = (size_t)rows * (size_t)in;
    const size_t cells = (size_t)rows * (size_t)most, n_u = cells * (size_t)l.rank, n_w = (size_t)in * (size_t)out;
    const size_t bytes = blocks ? psoup__block_bytes(blocks, n_w) : 2 * n_w, scales = blocks ? psoup__block_count(n_w) : 0;
    bench_case c = {.op = backward ? "linear_mix_back" : "linear_mix", .arg = &l,
                    .run = backward ? run_backward : run_forward,
                    .flops = 2 * x * out + (backward ? 4 : 2) * u * (in + out),
                    .bytes = (double)(bytes + scales * sizeof(float)) + (backward ? 12 : 4) * x + 4 * y +
                             (backward ? 12 : 4) * factors + 4 * u,
                    .item = {FLOATS((size_t)rows * (size_t)out), FLOATS(n_u), FLOATS(n_x),
                             NUMBERS(bytes / 2, PSOUP_BF16), FLOATS(n_a), FLOATS(n_b),
                             BYTES(weight, cells * sizeof *weight), BYTES(row, cells * sizeof *row),
                             FLOATS(n_x), FLOATS(n_u), FLOATS(n_a), FLOATS(n_b)}};
    if (!backward) {
        psoup_error error;
        psoup__weight weighed = {.dtype = blocks ? blocks : PSOUP_BF16, .out = out, .in = in, .values = PSOUP_BF16};
        c.item[SCALES].n = scales;
        c.item[SCALES + 1].n = 0;
        if (b->ops->weights_pack(b->be, &(psoup__weight *){&weighed}, 1, false, &error) != PSOUP_OK) {
            fprintf(stderr, "checkops: %s\n", error.message);
            exit(2);
        }
    }
    snprintf(c.shape, sizeof c.shape, "%s, %d rows, %d to %d, %s", blocks ? psoup_dtype_name(blocks) : "bf16", (int)rows,
             (int)in, (int)out, names[shared]);
    if (shared != BASE)
        snprintf(c.shape + strlen(c.shape), sizeof c.shape - strlen(c.shape), " %d", (int)n);
    bench_run(b, &c);
    free(row), free(weight);
}

void bench_linear_mix(bench *b) {
    const int32_t width = b->s.width, ffn = b->s.ffn, rows[] = {1, b->s.batch, b->s.rows};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        for (sharing s = BASE; s <= SOUP; s++) {
            bench_linear(b, rows[i], width, width, s, 0, false);
            bench_linear(b, rows[i], width, ffn, s, 0, false);
            bench_linear(b, rows[i], ffn, width, s, 0, false);
        }
    bench_linear(b, b->s.batch, width, b->s.vocab, BASE, 0, false);
    const int32_t few[] = {1, PSOUP__BLOCKS_MORE, b->s.batch};
    for (size_t i = 0; i < sizeof few / sizeof *few; i++) {
        bench_linear(b, few[i], width, ffn, BASE, PSOUP_NF4, false);
        bench_linear(b, few[i], width, ffn, BASE, PSOUP_INT8, false);
    }
    for (sharing s = BASE; s <= SOUP; s++) {
        bench_linear(b, b->s.rows, width, width, s, 0, true);
        bench_linear(b, b->s.rows, width, ffn, s, 0, true);
        bench_linear(b, b->s.rows, ffn, width, s, 0, true);
    }
}

/* ---- attention ----------------------------------------------------------------------------------------- */

typedef struct attending {
    psoup__attention_shape shape;
    int32_t rows, spans, queries, keys;
    bool paged;
} attending;

enum { OUT, LSE, Q, K, V, SPAN, PAGES, DQ = PAGES, DK, DV, DOUT };

static psoup__spans spans_of(const attending *t, void *const *p) {
    return (psoup__spans){p[SPAN], t->spans, t->queries, t->keys};
}

static void run_attention(bench *b, void *const *p, const void *arg) {
    const attending *t = arg;
    const psoup__keys keys = {.stride = (int64_t)t->shape.kv_heads * t->shape.head_dim, .k = p[K], .v = p[V]};
    const psoup__spans spans = spans_of(t, p);
    b->ops->attention(b->be, p[OUT], p[LSE], p[Q], &keys, &spans, &t->shape);
}

static void run_attention_backward(bench *b, void *const *p, const void *arg) {
    const attending *t = arg;
    const psoup__keys keys = {.stride = (int64_t)t->shape.kv_heads * t->shape.head_dim, .k = p[K], .v = p[V],
                              .dk = p[DK], .dv = p[DV]};
    const psoup__spans spans = spans_of(t, p);
    b->ops->attention_backward(b->be, p[DQ], p[DOUT], p[Q], p[OUT], p[LSE], &keys, &spans, &t->shape);
}

static void run_decode(bench *b, void *const *p, const void *arg) {
    const attending *t = arg;
    const psoup__keys keys = {.dtype = PSOUP_BF16, .stride = (int64_t)t->shape.kv_heads * t->shape.head_dim,
                              .k = p[K], .v = p[V], .pages = t->paged ? p[PAGES] : NULL};
    const psoup__spans spans = spans_of(t, p);
    b->ops->attention(b->be, p[OUT], NULL, p[Q], &keys, &spans, &t->shape);
}

static void name_shape(bench_case *c, const attending *t) {
    snprintf(c->shape, sizeof c->shape, "bf16, %d x %d, %d of %d heads of %d", (int)t->spans, (int)t->keys,
             (int)t->shape.kv_heads, (int)t->shape.heads, (int)t->shape.head_dim);
}

/* Whole sequences, each of whose queries sees what is before it: half of the square. */
static void bench_sequences(bench *b, int32_t kv_heads) {
    const bench_sizes *s = &b->s;
    const attending t = {.shape = {s->heads, kv_heads, s->head_dim, 0.125f, PSOUP_BF16},
                         .rows = s->rows, .spans = s->rows / s->sequence, .queries = s->sequence,
                         .keys = s->sequence};
    psoup__span *span = malloc((size_t)t.spans * sizeof *span);
    for (int32_t i = 0; i < t.spans; i++)
        span[i] = (psoup__span){i * s->sequence, s->sequence, s->sequence, i * s->sequence};
    const size_t n = (size_t)s->rows * (size_t)s->width, lse = (size_t)s->rows * (size_t)s->heads;
    const size_t kv = (size_t)s->rows * (size_t)(kv_heads * s->head_dim);
    const double square = (double)t.spans * s->sequence * (double)s->sequence / 2 * s->width;
    bench_case c = {.op = "attention", .flops = 4 * square, .run = run_attention, .arg = &t,
                    .bytes = 8.0 * (double)(n + kv) + 4.0 * (double)lse,
                    .item = {FLOATS(n), FLOATS(lse), FLOATS(n), FLOATS(kv), FLOATS(kv),
                             BYTES(span, (size_t)t.spans * sizeof *span)}};
    name_shape(&c, &t);
    bench_run(b, &c);
    c.op = "attention_back";
    c.flops = 10 * square;
    c.bytes = 16.0 * (double)n + 24.0 * (double)kv + 4.0 * (double)lse;
    c.run = run_attention_backward;
    c.item[DQ] = (bench_item)FLOATS(n);
    c.item[DK] = c.item[DV] = (bench_item)FLOATS(kv);
    c.item[DOUT] = (bench_item)FLOATS(n);
    bench_run(b, &c);
    free(span);
}

/* One query to each sequence of a cache, whose pages stand in no order. */
static void bench_decode(bench *b, int32_t kv_heads) {
    const bench_sizes *s = &b->s;
    const int32_t page = b->ops->page > 0 ? b->ops->page : s->context;
    const int32_t each = (s->context + page - 1) / page, n_pages = each * s->batch;
    const attending t = {.shape = {s->heads, kv_heads, s->head_dim, 0.125f, PSOUP_BF16},
                         .rows = s->batch, .spans = s->batch, .queries = 1, .keys = s->context,
                         .paged = b->ops->page > 0};
    psoup__span *span = malloc((size_t)s->batch * sizeof *span);
    int32_t *pages = malloc((size_t)n_pages * sizeof *pages);
    for (int32_t i = 0; i < s->batch; i++)
        span[i] = (psoup__span){i, 1, s->context, t.paged ? i * each : i * s->context};
    for (int32_t i = 0; i < n_pages; i++)
        pages[i] = n_pages - 1 - i;
    const size_t n = (size_t)s->batch * (size_t)s->width, width = (size_t)(kv_heads * s->head_dim);
    const size_t kv = (size_t)n_pages * (size_t)page * width;
    bench_case c = {.op = "attention_decode", .run = run_decode, .arg = &t,
                    .bytes = 4.0 * (double)s->batch * s->context * (double)width + 8.0 * (double)n,
                    .item = {FLOATS(n), FLOATS(1), FLOATS(n), NUMBERS(kv, PSOUP_BF16),
                             NUMBERS(kv, PSOUP_BF16), BYTES(span, (size_t)s->batch * sizeof *span),
                             BYTES(pages, (size_t)n_pages * sizeof *pages)}};
    name_shape(&c, &t);
    bench_run(b, &c);
    free(span), free(pages);
}

void bench_attention(bench *b) {
    bench_sequences(b, b->s.heads);
    if (b->s.kv_heads != b->s.heads)
        bench_sequences(b, b->s.kv_heads);
    bench_decode(b, b->s.heads);
    if (b->s.kv_heads != b->s.heads)
        bench_decode(b, b->s.kv_heads);
}
