/* Attention against float64, forward and backward; the same bits from prefill, from decoding one by one,
 * from any batch and any number of threads; keys beyond a query's position never felt. */
#include "cpu_case.h"

typedef struct attended {
    psoup__attention_shape shape;
    int32_t n_spans, most;
    psoup__span spans[4];
    int32_t rows, keys;
    int64_t width, kv_width;
    float *q, *k, *v; /* [rows, heads · dim], [keys, kv_heads · dim] of all spans in order */
} attended;

/* Spans with pairs (queries, keys), keys and values of all one after another. */
static void attended_open(attended *s, int32_t heads, int32_t kv_heads, int32_t dim, int32_t n_spans,
                          const int32_t (*spans)[2]) {
    *s = (attended){.shape = {heads, kv_heads, dim, (float)(1 / sqrt(dim)), PSOUP_F32}, .n_spans = n_spans};
    s->width = (int64_t)heads * dim;
    s->kv_width = (int64_t)kv_heads * dim;
    for (int32_t i = 0; i < n_spans; i++) {
        s->rows += spans[i][0];
        s->keys += spans[i][1];
    }
    s->q = normal((size_t)(s->rows * s->width), 1);
    s->k = normal((size_t)(s->keys * s->kv_width), 2);
    s->v = normal((size_t)(s->keys * s->kv_width), 3);
    int32_t row = 0, key = 0;
    for (int32_t i = 0; i < n_spans; i++) {
        s->spans[i] = (psoup__span){row, spans[i][0], spans[i][1], key};
        s->most = spans[i][0] > s->most ? spans[i][0] : s->most;
        row += spans[i][0];
        key += spans[i][1];
    }
}

static psoup__keys keys_of(const attended *s, float *k, float *v) {
    return (psoup__keys){.dtype = PSOUP_F32, .stride = s->kv_width, .k = k, .v = v};
}

static void attend(const machine *m, const attended *s, float *out, float *lse) {
    psoup__keys keys = keys_of(s, s->k, s->v);
    psoup__spans all = {s->spans, s->n_spans, s->most, s->keys};
    m->ops->attention(m->be, out, lse, s->q, &keys, &all, &s->shape);
}

static void attend_backward(const machine *m, const attended *s, float *dq, float *dk, float *dv,
                            const float *dout, const float *out, const float *lse) {
    psoup__keys keys = keys_of(s, s->k, s->v);
    keys.dk = dk;
    keys.dv = dv;
    psoup__spans all = {s->spans, s->n_spans, s->most, s->keys};
    m->ops->attention_backward(m->be, dq, dout, s->q, out, lse, &keys, &all, &s->shape);
}

static void attended_close(attended *s) {
    free(s->q), free(s->k), free(s->v);
}

static double inner(const float *a, const float *b, int32_t n) {
    double sum = 0;
    for (int32_t i = 0; i < n; i++)
        sum += (double)a[i] * b[i];
    return sum;
}

/* out and lse, and with dout the gradients, all in float64. dk and dv are laid out as s->k. */
static void reference(const attended *s, double *out, double *lse, const float *dout, double *dq,
                      double *dk, double *dv) {
    const int32_t heads = s->shape.heads, dim = s->shape.head_dim;
    for (int32_t i = 0; i < s->n_spans; i++)
        for (int32_t query = 0; query < s->spans[i].queries; query++)
            for (int32_t head = 0; head < heads; head++) {
                const psoup__span *span = &s->spans[i];
                const int32_t n = span->keys - span->queries + query + 1;
                const int64_t at = (span->query + query) * s->width + head * dim;
                const int64_t kv = span->first * s->kv_width + head / (heads / s->shape.kv_heads) * dim;
                double *p = doubles((size_t)n), max = -INFINITY, sum = 0, delta = 0;
                for (int32_t j = 0; j < n; j++) {
                    p[j] = s->shape.scale * inner(s->q + at, s->k + j * s->kv_width + kv, dim);
                    max = fmax(max, p[j]);
                }
                for (int32_t j = 0; j < n; j++)
                    sum += p[j] = exp(p[j] - max);
                lse[(span->query + query) * heads + head] = max + log(sum);
                for (int32_t j = 0; j < n; j++) {
                    p[j] /= sum;
                    for (int32_t d = 0; d < dim; d++)
                        out[at + d] += p[j] * s->v[j * s->kv_width + kv + d];
                }
                for (int32_t d = 0; dout && d < dim; d++)
                    delta += dout[at + d] * out[at + d];
                for (int32_t j = 0; dout && j < n; j++) {
                    const int64_t key = j * s->kv_width + kv;
                    const double ds =
                        s->shape.scale * p[j] * (inner(dout + at, s->v + key, dim) - delta);
                    for (int32_t d = 0; d < dim; d++) {
                        dq[at + d] += ds * s->k[key + d];
                        dk[key + d] += ds * s->q[at + d];
                        dv[key + d] += p[j] * dout[at + d];
                    }
                }
                free(p);
            }
}

static const int32_t shapes[][3] = {{2, 2, 16}, {4, 2, 64}, {3, 1, 37}, {1, 1, 128}, {6, 3, 1},
                                    {40, 1, 20}, {2, 1, 300}};
enum { SHAPES = sizeof shapes / sizeof *shapes };
static const int32_t spans[4][2] = {{1, 1}, {37, 37}, {2, 129}, {127, 130}};

START_TEST(matches_float64) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    for (int c = 0; c < SHAPES; c++) {
        attended s;
        attended_open(&s, shapes[c][0], shapes[c][1], shapes[c][2], 4, spans);
        const size_t n = (size_t)(s.rows * s.width), n_kv = (size_t)(s.keys * s.kv_width);
        const size_t n_lse = (size_t)(s.rows * s.shape.heads);
        float *out = poisoned(n), *lse = poisoned(n_lse), *dout = normal(n, 4), *dq = poisoned(n);
        float *dk = normal(n_kv, 5), *dv = normal(n_kv, 6);
        double *out_want = doubles(n), *lse_want = doubles(n_lse), *dq_want = doubles(n);
        double *dk_want = doubles(n_kv), *dv_want = doubles(n_kv);
        for (size_t i = 0; i < n_kv; i++) {
            dk_want[i] = dk[i];
            dv_want[i] = dv[i];
        }
        reference(&s, out_want, lse_want, dout, dq_want, dk_want, dv_want);
        attend(&m, &s, out, lse);
        near("out", out, out_want, n, 3e-6);
        near("lse", lse, lse_want, n_lse, 2e-6);
        attend_backward(&m, &s, dq, dk, dv, dout, out, lse);
        near("dq", dq, dq_want, n, 1e-5);
        near("dk", dk, dk_want, n_kv, 1e-5);
        near("dv", dv, dv_want, n_kv, 1e-5);
        free(out), free(lse), free(dout), free(dq), free(dk), free(dv);
        free(out_want), free(lse_want), free(dq_want), free(dk_want), free(dv_want);
        attended_close(&s);
    }
    machine_close(&m);
}
END_TEST

/* Prefill of a batch on three threads; then each query alone on one thread, keys up to its own, and all
 * later keys and values NaN. */
START_TEST(decode_gives_prefill_bits) {
    machine m, one;
    if (!machine_open(&m, _i, 3))
        return;
    ck_assert(machine_open(&one, _i, 1));
    for (int c = 0; c < SHAPES; c++) {
        attended s;
        attended_open(&s, shapes[c][0], shapes[c][1], shapes[c][2], 4, spans);
        const size_t n = (size_t)(s.rows * s.width), n_kv = (size_t)(s.keys * s.kv_width);
        float *out = poisoned(n), *lse = poisoned((size_t)(s.rows * s.shape.heads));
        attend(&m, &s, out, lse);
        float *k = copy_of(s.k, n_kv), *v = copy_of(s.v, n_kv), *out1 = poisoned((size_t)s.width);
        for (int32_t i = 0; i < s.n_spans; i++)
            for (int32_t query = s.spans[i].queries - 1; query >= 0; query--) {
                const int32_t p = s.spans[i].keys - s.spans[i].queries + query;
                const int64_t at = s.spans[i].first * s.kv_width;
                psoup__span span = {.queries = 1, .keys = p + 1, .first = s.spans[i].first};
                psoup__spans alone = {&span, 1, 1, p + 1};
                psoup__keys keys = keys_of(&s, k, v);
                for (int64_t j = at + (p + 1) * s.kv_width; j < at + s.spans[i].keys * s.kv_width; j++)
                    k[j] = v[j] = NAN;
                const int64_t row = s.spans[i].query + query;
                one.ops->attention(one.be, out1, NULL, s.q + row * s.width, &keys, &alone, &s.shape);
                same_bits("out", out1, out + row * s.width, (size_t)s.width);
            }
        free(out), free(lse), free(k), free(v), free(out1);
        attended_close(&s);
    }
    machine_close(&m);
    machine_close(&one);
}
END_TEST

/* In a prefill too a poisoned key touches only the queries that see it. */
START_TEST(later_keys_are_not_felt) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    attended s;
    attended_open(&s, 2, 1, 24, 1, (const int32_t[][2]){{100, 100}});
    const size_t n = (size_t)(s.rows * s.width);
    float *clean = poisoned(n), *out = poisoned(n);
    attend(&m, &s, clean, NULL);
    for (int32_t bad = 0; bad < 100; bad += 7) {
        float *k = copy_of(s.k, (size_t)(s.keys * s.kv_width));
        float *v = copy_of(s.v, (size_t)(s.keys * s.kv_width));
        k[bad * s.kv_width] = v[bad * s.kv_width + 1] = NAN;
        attended poisoned_keys = s;
        poisoned_keys.k = k;
        poisoned_keys.v = v;
        attend(&m, &poisoned_keys, out, NULL);
        same_bits("out", out, clean, (size_t)(bad * s.width));
        for (size_t i = (size_t)(bad * s.width); i < n; i++)
            if (!isnan(out[i]))
                ck_abort_msg("out[%zu] misses the poison of key %d", i, bad);
        free(k), free(v);
    }
    free(clean), free(out);
    attended_close(&s);
    machine_close(&m);
}
END_TEST

/* Gradients have the same bits on any number of threads. */
START_TEST(backward_ignores_threads) {
    float *kept = NULL;
    for (int threads = 1; threads <= 4; threads += 3) {
        machine m;
        if (!machine_open(&m, _i, threads))
            return;
        attended s;
        attended_open(&s, 4, 2, 32, 4, spans);
        const size_t n = (size_t)(s.rows * s.width), n_kv = (size_t)(s.keys * s.kv_width);
        float *out = poisoned(n), *lse = poisoned((size_t)(s.rows * 4)), *dout = normal(n, 4);
        float *grads = poisoned(n + 2 * n_kv);
        memset(grads + n, 0, 2 * n_kv * sizeof *grads);
        attend(&m, &s, out, lse);
        attend_backward(&m, &s, grads, grads + n, grads + n + n_kv, dout, out, lse);
        if (kept)
            same_bits("gradients", kept, grads, n + 2 * n_kv);
        free(out), free(lse), free(dout), free(kept);
        kept = grads;
        attended_close(&s);
        machine_close(&m);
    }
    free(kept);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("cpu: attention");
    TCase *tests = tcase_create("attention");
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, matches_float64, 0, CASE_ISAS);
    tcase_add_loop_test(tests, decode_gives_prefill_bits, 0, CASE_ISAS);
    tcase_add_loop_test(tests, later_keys_are_not_felt, 0, CASE_ISAS);
    tcase_add_loop_test(tests, backward_ignores_threads, 0, CASE_ISAS);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
