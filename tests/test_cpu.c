/* The smaller ops of src/cpu against float64 (the large ones: test_cpu_mix, test_cpu_attention,
 * test_cpu_sample), on ragged sizes, on every instruction set. */
#include "cpu_case.h"

static const int32_t widths[] = {1, 2, 37, 64, 127, 129, 1025};
enum { WIDTHS = sizeof widths / sizeof *widths, ROWS = 37 };

START_TEST(memory_and_failure) {
    machine m;
    if (!machine_open(&m, _i, 1))
        return;
    psoup_error error;
    unsigned char *device = m.ops->alloc(m.be, 3, 5, &error), host[15];
    ck_assert_ptr_nonnull(device);
    for (int i = 0; i < 15; i++)
        ck_assert_int_eq(device[i], 0);
    m.ops->write(m.be, device, "fourteen bytes", 15);
    m.ops->copy(m.be, device, device + 4, 4);
    ck_assert(m.ops->read(m.be, host, device, 15, &error) == PSOUP_OK);
    ck_assert_str_eq((char *)host, "teenteen bytes");
    m.ops->zero(m.be, device, 15);
    ck_assert_int_eq(device[0] | device[14], 0);
    m.ops->release(m.be, device);
    ck_assert_ptr_null(m.ops->alloc(m.be, SIZE_MAX, 8, &error));
    ck_assert_int_eq(error.status, PSOUP_ERROR_MEMORY);
    machine_close(&m);
}
END_TEST

START_TEST(rmsnorm_matches) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    for (int c = 0; c < WIDTHS; c++) {
        const int32_t width = widths[c];
        const size_t n = (size_t)(ROWS * width);
        float *x = normal(n, 1), *weight = normal((size_t)width, 2), *dout = normal(n, 3);
        float *out = poisoned(n), *rstd = poisoned(ROWS), *alone = poisoned((size_t)width);
        float *dx = normal(n, 4), *dweight = normal((size_t)width, 5);
        double *want = doubles(n), *rstd_want = doubles(ROWS), *dx_want = doubles(n);
        double *dweight_want = doubles((size_t)width);
        for (int32_t j = 0; j < width; j++)
            dweight_want[j] = dweight[j];
        for (int32_t i = 0; i < ROWS; i++) {
            const float *xi = x + i * width, *di = dout + i * width;
            double square = 0, inner = 0;
            for (int32_t j = 0; j < width; j++)
                square += (double)xi[j] * xi[j];
            const double r = rstd_want[i] = 1 / sqrt(square / width + 1e-5);
            for (int32_t j = 0; j < width; j++)
                inner += (double)di[j] * weight[j] * xi[j];
            for (int32_t j = 0; j < width; j++) {
                want[i * width + j] = xi[j] * r * weight[j];
                dx_want[i * width + j] = dx[i * width + j] +
                                         r * ((double)di[j] * weight[j] - xi[j] * inner * r * r / width);
                dweight_want[j] += di[j] * xi[j] * r;
            }
        }
        m.ops->rmsnorm(m.be, out, rstd, x, NULL, weight, 1e-5f, ROWS, width);
        near("out", out, want, n, 1e-6);
        near("rstd", rstd, rstd_want, ROWS, 1e-6);
        m.ops->rmsnorm_backward(m.be, dx, dweight, dout, x, weight, rstd, ROWS, width);
        near("dx", dx, dx_want, n, 2e-6);
        near("dweight", dweight, dweight_want, (size_t)width, 3e-6);
        m.ops->rmsnorm_backward(m.be, dx, NULL, dout, x, weight, rstd, ROWS, width);
        for (int32_t i = 0; i < ROWS; i++) { /* a row alone has the bits it has among others */
            m.ops->rmsnorm(m.be, alone, rstd, x + i * width, NULL, weight, 1e-5f, 1, width);
            same_bits("row", alone, out + i * width, (size_t)width);
        }
        free(x), free(weight), free(dout), free(out), free(rstd), free(alone), free(dx), free(dweight);
        free(want), free(rstd_want), free(dx_want), free(dweight_want);
    }
    machine_close(&m);
}
END_TEST

START_TEST(rope_turns_and_returns) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    enum { POSITIONS = 50, HEADS = 3 };
    for (int32_t dim = 2; dim <= 66; dim += 32) {
        const int64_t stride = HEADS * dim + 5;
        const size_t n = (size_t)(ROWS * stride);
        float *x = normal(n, 1), *before = copy_of(x, n), *table = poisoned((size_t)(POSITIONS * dim));
        double *want = doubles(n);
        int32_t position[ROWS];
        for (int32_t p = 0; p < POSITIONS; p++)
            for (int32_t j = 0; j < dim / 2; j++) {
                table[p * dim + j] = (float)cos(p * pow(10000, -2.0 * j / dim));
                table[p * dim + dim / 2 + j] = (float)sin(p * pow(10000, -2.0 * j / dim));
            }
        for (size_t i = 0; i < n; i++)
            want[i] = x[i];
        for (int32_t r = 0; r < ROWS; r++) {
            position[r] = r * 7 % POSITIONS;
            for (int32_t h = 0; h < HEADS; h++)
                for (int32_t j = 0; j < dim / 2; j++) {
                    const int64_t a = r * stride + h * dim + j, b = a + dim / 2;
                    const double angle = position[r] * pow(10000, -2.0 * j / dim);
                    want[a] = before[a] * cos(angle) - before[b] * sin(angle);
                    want[b] = before[b] * cos(angle) + before[a] * sin(angle);
                }
        }
        m.ops->rope(m.be, x, table, position, ROWS, HEADS, dim, stride, false);
        near("turned", x, want, n, 1e-6);
        m.ops->rope(m.be, x, table, position, ROWS, HEADS, dim, stride, true);
        for (size_t i = 0; i < n; i++)
            want[i] = before[i];
        near("returned", x, want, n, 1e-6);
        free(x), free(before), free(table), free(want);
    }
    machine_close(&m);
}
END_TEST

START_TEST(swiglu_matches) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    for (int c = 0; c <= WIDTHS; c++) {
        const size_t n = c < WIDTHS ? (size_t)widths[c] : 40000; /* more than one task */
        float *gate = normal(n, 1), *up = normal(n, 2), *dout = normal(n, 3);
        float *out = poisoned(n), *dgate = poisoned(n), *dup = poisoned(n);
        double *want = doubles(n), *dgate_want = doubles(n), *dup_want = doubles(n);
        for (size_t i = 0; i < n; i++)
            gate[i] *= 20; /* into the tails of exp */
        gate[0] = 200;
        if (n > 1)
            gate[1] = -200;
        for (size_t i = 0; i < n; i++) {
            const double g = gate[i], s = 1 / (1 + exp(-g));
            want[i] = g * s * up[i];
            dup_want[i] = dout[i] * g * s;
            dgate_want[i] = dout[i] * (double)up[i] * s * (1 + g * (1 - s));
        }
        m.ops->swiglu(m.be, out, gate, up, n);
        near("out", out, want, n, 1e-6);
        m.ops->swiglu_backward(m.be, dgate, dup, dout, gate, up, n);
        near("dgate", dgate, dgate_want, n, 1e-6);
        near("dup", dup, dup_want, n, 1e-6);
        m.ops->swiglu_backward(m.be, gate, up, dout, gate, up, n); /* in place */
        same_bits("dgate in place", gate, dgate, n);
        same_bits("dup in place", up, dup, n);
        free(gate), free(up), free(dout), free(out), free(dgate), free(dup);
        free(want), free(dgate_want), free(dup_want);
    }
    machine_close(&m);
}
END_TEST

START_TEST(embed_and_moves) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    enum { VOCAB = 11 };
    const psoup_dtype dtypes[3] = {PSOUP_F32, PSOUP_F16, PSOUP_BF16};
    for (int c = 0; c < WIDTHS; c++) {
        const int32_t width = widths[c];
        const size_t n = (size_t)(ROWS * width), n_table = (size_t)(VOCAB * width);
        float *table = normal(n_table, 1), *dout = normal(n, 2), *dtable = normal(n_table, 3);
        float *out = poisoned(n), *cached[2];
        double *want = doubles(n), *dtable_want = doubles(n_table);
        int32_t token[ROWS], row[ROWS];
        for (int i = 0; i < ROWS; i++) {
            token[i] = i * i % VOCAB;
            row[i] = i * 5 % ROWS;
        }
        for (int d = 0; d < 3; d++) {
            void *data = malloc(n_table * 4);
            psoup__from_f32(m.context, data, dtypes[d], table, n_table);
            psoup__to_f32(m.context, table, data, dtypes[d], n_table);
            const psoup__weight weight = {.dtype = dtypes[d], .out = VOCAB, .in = width, .data = data};
            m.ops->embed(m.be, out, &weight, token, ROWS);
            for (int i = 0; i < ROWS; i++)
                same_bits("embed", out + i * width, table + token[i] * width, (size_t)width);
            free(data);
        }
        for (size_t i = 0; i < n_table; i++)
            dtable_want[i] = dtable[i];
        for (int i = 0; i < ROWS; i++)
            for (int32_t j = 0; j < width; j++)
                dtable_want[token[i] * width + j] += dout[i * width + j];
        m.ops->embed_backward(m.be, dtable, dout, token, VOCAB, width, ROWS);
        near("dtable", dtable, dtable_want, n_table, 1e-6);

        for (size_t i = 0; i < n; i++)
            want[i] = out[i];
        for (int i = 0; i < ROWS; i++)
            for (int32_t j = 0; j < width; j++)
                want[row[i] * width + j] += (1 + (double)dout[i]) * dout[i * width + j];
        m.ops->scatter_add_rows(m.be, out, dout, NULL, row, ROWS, width);
        m.ops->scatter_add_rows(m.be, out, dout, dout, row, ROWS, width);
        near("scatter", out, want, n, 1e-6);
        for (size_t i = 0; i < n; i++)
            want[i] += dout[i];
        m.ops->add(m.be, out, dout, n);
        near("add", out, want, n, 1e-6);
        const int32_t first[] = {2, 3, 3, ROWS + 1, ROWS + 2}; /* one, none, some, one; begun at 2 */
        float *sums = poisoned((size_t)(4 * width)), *added = calloc((size_t)width, sizeof *added);
        const int32_t to = 0;
        m.ops->combine_rows(m.be, sums, dout, dout, first, 4, width);
        same_bits("one", sums, dout, (size_t)width);
        for (int32_t j = 0; j < width; j++)
            ck_assert(sums[width + j] == 0);
        for (int i = 1; i < ROWS - 1; i++)
            m.ops->scatter_add_rows(m.be, added, dout + i * width, dout + i, &to, 1, width);
        same_bits("some", sums + 2 * width, added, (size_t)width);
        same_bits("the last", sums + 3 * width, dout + (ROWS - 1) * width, (size_t)width);
        free(sums), free(added);
        m.ops->gather_rows(m.be, out, dout, row, ROWS, width);
        for (int i = 0; i < ROWS; i++) {
            same_bits("gather", out + i * width, dout + row[i] * width, (size_t)width);
        }
        const int32_t stride = width + 3;
        cached[0] = poisoned((size_t)(ROWS * stride));
        cached[1] = poisoned((size_t)(ROWS * stride));
        const psoup__keys cache = {.dtype = PSOUP_F32, .stride = stride, .k = cached[0], .v = cached[1]};
        m.ops->cache_append(m.be, &cache, row, out, dout, ROWS, width);
        for (int i = 0; i < ROWS; i++) {
            const float *k = cached[0] + row[i] * stride, *v = cached[1] + row[i] * stride;
            same_bits("k", k, out + i * width, (size_t)width);
            same_bits("v", v, dout + i * width, (size_t)width);
            ck_assert(isnan(k[width]) && isnan(v[width]));
        }
        free(cached[0]), free(cached[1]);
        free(table), free(dout), free(dtable), free(out), free(want), free(dtable_want);
    }
    machine_close(&m);
}
END_TEST

/* What is kept is the Philox word's choice, element by element; the mean is kept; a row's pattern does
 * not depend on the batch. */
START_TEST(dropout_is_philox) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    for (int c = 0; c < WIDTHS; c++) {
        const int32_t width = widths[c];
        const size_t n = (size_t)(ROWS * width);
        uint64_t seed[ROWS], stream[ROWS], offset[ROWS];
        for (uint64_t i = 0; i < ROWS; i++) {
            seed[i] = 3 + i % 2;
            stream[i] = i * 1000003;
            offset[i] = i * i;
        }
        psoup__dropout d = {0.25f, seed, stream, offset};
        float *in = normal(n, 1), *out = poisoned(n), *dx = normal(n, 2), *before = copy_of(dx, n);
        m.ops->dropout(m.be, out, in, &d, ROWS, width);
        m.ops->dropout_backward(m.be, dx, in, &d, ROWS, width);
        size_t kept = 0;
        for (int32_t i = 0; i < ROWS; i++)
            for (int32_t j = 0; j < width; j++) {
                const size_t at = (size_t)(i * width + j);
                const uint32_t word = psoup__philox_word(
                    seed[i], stream[i], offset[i] * (uint64_t)width + (uint64_t)j);
                const int keep = psoup__uniform(word) >= 0.25f;
                const float want = keep ? in[at] * (1.0f / 0.75f) : 0, sum = before[at] + want;
                kept += (size_t)keep;
                same_bits("dropout", out + at, &want, 1);
                same_bits("dropout_backward", dx + at, &sum, 1);
            }
        if (n > 1000) /* five standard deviations */
            ck_assert(fabs((double)kept / (double)n - 0.75) < 5 * sqrt(0.1875 / (double)n));
        float *alone = poisoned((size_t)width);
        psoup__dropout last = {0.25f, seed + ROWS - 1, stream + ROWS - 1, offset + ROWS - 1};
        m.ops->dropout(m.be, alone, in + (ROWS - 1) * width, &last, 1, width);
        same_bits("row alone", alone, out + (ROWS - 1) * width, (size_t)width);
        d.p = 0;
        m.ops->dropout(m.be, out, in, &d, ROWS, width);
        same_bits("no dropout", out, in, n);
        free(in), free(out), free(dx), free(before), free(alone);
    }
    machine_close(&m);
}
END_TEST

START_TEST(head_matches) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    enum { N = 19 };
    for (int c = 0; c < WIDTHS; c++) {
        const int32_t width = widths[c];
        const size_t n = (size_t)(ROWS * width);
        float *hidden = normal(n, 1), *w = normal((size_t)width, 2), *bias = normal(1, 3);
        float *dvalue = normal(N, 4), *dhidden = normal(n, 5), *dw = normal((size_t)width, 6);
        float *dbias = normal(1, 7), *value = normal(N, 8), *weight = normal(N, 9);
        double *want = doubles(N), *dhidden_want = doubles(n), *dw_want = doubles((size_t)width);
        double dbias_want = dbias[0];
        int32_t row[N], at[N];
        for (size_t i = 0; i < n; i++)
            dhidden_want[i] = dhidden[i];
        for (int32_t j = 0; j < width; j++)
            dw_want[j] = dw[j];
        for (int i = 0; i < N; i++) {
            row[i] = i * 5 % ROWS;
            at[i] = i * 7 % N;
            const double d = (double)weight[i] * dvalue[at[i]];
            double out = bias[0];
            dbias_want += d;
            for (int32_t j = 0; j < width; j++) {
                out += (double)hidden[row[i] * width + j] * w[j];
                dhidden_want[row[i] * width + j] += d * w[j];
                dw_want[j] += d * hidden[row[i] * width + j];
            }
            want[at[i]] = value[at[i]] + weight[i] * out;
        }
        m.ops->head(m.be, value, hidden, row, at, weight, w, bias, N, width);
        near("value", value, want, N, 2e-6);
        m.ops->head_backward(m.be, dhidden, dw, dbias, dvalue, hidden, row, at, weight, w, N, width);
        near("dhidden", dhidden, dhidden_want, n, 1e-6);
        near("dw", dw, dw_want, (size_t)width, 1e-6);
        near("dbias", dbias, &dbias_want, 1, 1e-6);
        m.ops->head_backward(m.be, NULL, dw, NULL, dvalue, hidden, row, at, weight, w, N, width);
        near("dhidden left alone", dhidden, dhidden_want, n, 1e-6);
        free(hidden), free(w), free(bias), free(dvalue), free(dhidden), free(dw), free(dbias), free(value);
        free(weight);
        free(want), free(dhidden_want), free(dw_want);
    }
    machine_close(&m);
}
END_TEST

START_TEST(logprob_matches) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    const int32_t vocabs[] = {1, 2, 37, 64, 127, 129, 3001};
    for (int c = 0; c < 7; c++) {
        const int32_t vocab = vocabs[c];
        const size_t n = (size_t)(ROWS * vocab);
        float *logits = normal(n, 1), *dlogprob = normal(ROWS, 2), *dlogits = poisoned(n);
        float *logprob = poisoned(ROWS), *lse = poisoned(ROWS), *alone = poisoned(2);
        double *want = doubles(ROWS), *lse_want = doubles(ROWS), *d_want = doubles(n);
        int32_t target[ROWS];
        for (int i = 0; i < ROWS; i++) {
            float *row = logits + i * vocab;
            target[i] = i * 31 % vocab;
            for (int32_t j = 0; j < vocab; j++)
                row[j] = row[j] * 10 + (i == 3 ? 5000 : 0);
            if (vocab > 1)
                row[(target[i] + 1) % vocab] = -INFINITY;
            double max = -INFINITY, sum = 0;
            for (int32_t j = 0; j < vocab; j++)
                max = fmax(max, row[j]);
            for (int32_t j = 0; j < vocab; j++)
                sum += exp(row[j] - max);
            lse_want[i] = max + log(sum);
            want[i] = row[target[i]] - lse_want[i];
            for (int32_t j = 0; j < vocab; j++)
                d_want[i * vocab + j] = dlogprob[i] * ((j == target[i]) - exp(row[j] - lse_want[i]));
        }
        m.ops->logprob(m.be, logprob, lse, logits, target, ROWS, vocab);
        near("logprob", logprob, want, ROWS, 1e-6);
        near("lse", lse, lse_want, ROWS, 1e-6);
        for (int i = 0; i < ROWS; i++) {
            m.ops->logprob(m.be, alone, alone + 1, logits + i * vocab, target + i, 1, vocab);
            same_bits("logprob alone", alone, logprob + i, 1);
        }
        m.ops->logprob_backward(m.be, dlogits, logits, lse, target, dlogprob, ROWS, vocab);
        near("dlogits", dlogits, d_want, n, 3e-4); /* row 3: lse near 5000 in f32 */
        near("dlogits", dlogits + 4 * vocab, d_want + 4 * vocab, n - 4 * (size_t)vocab, 1e-5);
        m.ops->logprob_backward(m.be, logits, logits, lse, target, dlogprob, ROWS, vocab);
        same_bits("in place", logits, dlogits, n);
        free(logits), free(dlogprob), free(dlogits), free(logprob), free(lse), free(alone);
        free(want), free(lse_want), free(d_want);
    }
    machine_close(&m);
}
END_TEST

START_TEST(adamw_matches) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    for (int c = 0; c <= WIDTHS; c++) {
        const size_t n = c < WIDTHS ? (size_t)widths[c] : 40000;
        float *p = normal(n, 1), *mean = poisoned(n), *square = poisoned(n);
        double *p_want = doubles(n), *m_want = doubles(n), *v_want = doubles(n), sum = 0, got;
        for (size_t i = 0; i < n; i++) {
            p_want[i] = p[i];
            mean[i] = square[i] = 0;
        }
        for (int step = 1; step <= 5; step++) {
            float *g = normal(n, 10 + (uint64_t)step);
            const double c1 = 1 - pow(0.9, step), c2 = 1 - pow(0.95, step);
            for (size_t i = 0; i < n; i++) {
                const double d = 0.5 * g[i];
                m_want[i] = 0.9 * m_want[i] + 0.1 * d;
                v_want[i] = 0.95 * v_want[i] + 0.05 * d * d;
                p_want[i] = p_want[i] * (1 - 0.01 * 0.1) -
                            0.01 * (m_want[i] / c1) / (sqrt(v_want[i] / c2) + 1e-8);
            }
            m.ops->adamw(m.be, p, mean, square, g, n,
                         &(psoup__adamw_args){.lr = 0.01f, .beta1 = 0.9f, .beta2 = 0.95f,
                                              .epsilon = 1e-8f, .weight_decay = 0.1f,
                                              .correction1 = (float)c1, .correction2 = (float)c2,
                                              .gradient_scale = 0.5f});
            free(g);
        }
        near("p", p, p_want, n, 2e-6);
        near("m", mean, m_want, n, 1e-6);
        near("v", square, v_want, n, 1e-6);
        for (size_t i = 0; i < n; i++)
            sum += (double)p[i] * p[i];
        for (size_t i = 0; i < n; i++)
            square[i] = i % 7 == 3 ? NAN : p[i];
        m.ops->clip_values(m.be, square, n, 0.75f);
        for (size_t i = 0; i < n; i++)
            if (i % 7 == 3)
                ck_assert(isnan(square[i]));
            else
                ck_assert_float_eq(square[i], p[i] > 0.75f ? 0.75f : p[i] < -0.75f ? -0.75f : p[i]);
        ck_assert(m.ops->sum_squares(m.be, &got, p, n, NULL) == PSOUP_OK);
        ck_assert_double_eq_tol(got, sum, 1e-12 * sum);
        ck_assert(m.ops->sum_squares(m.be, &got, p, 0, NULL) == PSOUP_OK && got == 0);
        free(p), free(mean), free(square), free(p_want), free(m_want), free(v_want);
    }
    machine_close(&m);
}
END_TEST

/* exp, to a unit in the last place: swiglu and logprob see it blurred, so here it is read from
 * logprob_backward with lse 0: dlogits = −exp(logits). */
START_TEST(exp_is_accurate) {
    machine m;
    if (!machine_open(&m, _i, 1))
        return;
    enum { N = 200001 };
    float *x = poisoned(N), *y = poisoned(N);
    const float zero = 0, one = 1;
    const int32_t target = 0;
    for (int i = 0; i < N; i++)
        x[i] = -87.3f + (float)i * (176.0f / N);
    x[1] = -INFINITY, x[2] = INFINITY, x[3] = NAN, x[4] = 88.73f, x[5] = -104.5f, x[6] = -1e30f;
    x[7] = 1e30f;
    m.ops->logprob_backward(m.be, y, x, &zero, &target, &one, 1, N);
    for (int i = 8; i < N; i++) {
        const double want = exp((double)x[i]);
        if (!(fabs(-y[i] - want) <= 1.2e-7 * want || (want > 3.4e38 && isinf(y[i]))))
            ck_abort_msg("exp(%.9g) = %.9g, want %.9g", (double)x[i], (double)-y[i], want);
    }
    ck_assert(y[1] == 0 && y[2] == -INFINITY && isnan(y[3]) && y[4] == -INFINITY && y[5] == 0);
    ck_assert(y[6] == 0 && y[7] == -INFINITY);
    free(x), free(y);
    machine_close(&m);
}
END_TEST

enum { RESPONSES = 3, TOKENS = 1 + 37 + 129 };
static const int32_t response_first[RESPONSES + 1] = {0, 1, 38, TOKENS};

/* Advantages and returns; with a critic and a KL term, or of whole responses, gradients and terms. */
typedef struct policy_numbers {
    float advantage[TOKENS], returns[TOKENS], dlogprob[2][TOKENS], dvalue[2][TOKENS];
    psoup__loss_terms terms[2][RESPONSES];
} policy_numbers;

/* Response by response, or all of them at once. */
static void run_policy(machine *m, policy_numbers *out, bool apart) {
    float *x[6];
    for (int k = 0; k < 6; k++)
        x[k] = normal(TOKENS, 20 + (uint64_t)k);
    for (int i = 0; i < TOKENS; i++)
        x[1][i] = x[0][i] + 0.01f * x[1][i];
    const psoup__old old = {x[1], x[2], x[3], x[4], x[5]};
    psoup__response response[RESPONSES];
    for (int i = 0; i < RESPONSES; i++)
        response[i] = (psoup__response){1.5 + i, 0.1, response_first[i], response_first[i + 1] - response_first[i],
                                        response_first[i]};
    memset(out, 0xff, sizeof *out);
    for (int i = 0, n = apart ? 1 : RESPONSES; i < RESPONSES; i += n) {
        m->ops->gae(m->be, out->advantage, out->returns, x[2], x[3], response_first + i, n, 0.99, 0.95);
        for (int whole = 0; whole < 2; whole++) {
            const psoup__objective o = {0.2, 0.2, 0.5, whole, whole ? PSOUP__K2 : PSOUP__K3};
            m->ops->policy_loss(m->be, out->dlogprob[whole], out->dvalue[whole], out->terms[whole] + i, x[0], x[3], &old,
                                response + i, n, &o);
        }
    }
    for (int k = 0; k < 6; k++)
        free(x[k]);
}

/* What they are of is checked elsewhere (test_train.c, checkops): here, that they are the same for every instruction set,
 * whatever else is in the batch. */
START_TEST(policies_have_the_same_bits) {
    machine m, plain;
    static policy_numbers want, got;
    if (!machine_open(&m, _i, 2))
        return;
    ck_assert(machine_open(&plain, 0, 1));
    run_policy(&plain, &want, true);
    run_policy(&m, &got, false);
    ck_assert_int_eq(memcmp(&want, &got, sizeof want), 0);
    for (int i = 0; i < TOKENS; i++)
        ck_assert(isfinite(got.advantage[i]) && isfinite(got.returns[i]) && isfinite(got.dlogprob[0][i]) &&
                  isfinite(got.dvalue[1][i]));
    machine_close(&plain);
    machine_close(&m);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("cpu");
    TCase *tests = tcase_create("ops");
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, memory_and_failure, 0, CASE_ISAS);
    tcase_add_loop_test(tests, rmsnorm_matches, 0, CASE_ISAS);
    tcase_add_loop_test(tests, rope_turns_and_returns, 0, CASE_ISAS);
    tcase_add_loop_test(tests, swiglu_matches, 0, CASE_ISAS);
    tcase_add_loop_test(tests, embed_and_moves, 0, CASE_ISAS);
    tcase_add_loop_test(tests, dropout_is_philox, 0, CASE_ISAS);
    tcase_add_loop_test(tests, head_matches, 0, CASE_ISAS);
    tcase_add_loop_test(tests, logprob_matches, 0, CASE_ISAS);
    tcase_add_loop_test(tests, policies_have_the_same_bits, 0, CASE_ISAS);
    tcase_add_loop_test(tests, adamw_matches, 0, CASE_ISAS);
    tcase_add_loop_test(tests, exp_is_accurate, 0, CASE_ISAS);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
