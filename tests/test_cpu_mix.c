/* linear_mix against float64, its independence of the batch, and its promise that a weight of zero
 * keeps a diverged adapter away. */
#include "cpu_case.h"

enum { ADAPTERS = 4, RANKS_MAX = 16 };
static const int32_t ranks[ADAPTERS] = {8, 0, 16, 3};

/* A layer, a batch, and a mix in which every third row is the base and one adapter is used by all. */
typedef struct mixed {
    int32_t rows, in, out;
    float *x, *x_lora, *w, *bias, *weight, *a[ADAPTERS], *b[ADAPTERS];
    int32_t *row, first[ADAPTERS + 1];
    psoup__weight base;
    psoup__lora lora[ADAPTERS];
    psoup__mix mix;
    size_t u_size;
} mixed;

static void list_rows(mixed *s, int with_zeros) {
    int32_t n = 0;
    s->u_size = 0;
    for (int32_t i = 0; i < ADAPTERS; i++) {
        s->first[i] = n;
        for (int32_t r = 0; r < s->rows; r++)
            if (with_zeros || s->weight[r * ADAPTERS + i] != 0)
                s->row[n++] = r;
        s->u_size += (size_t)(n - s->first[i]) * (size_t)ranks[i];
    }
    s->first[ADAPTERS] = n;
}

static void mixed_open(mixed *s, int32_t rows, int32_t in, int32_t out) {
    *s = (mixed){.rows = rows, .in = in, .out = out};
    s->x = normal((size_t)(rows * in), 1);
    s->x_lora = normal((size_t)(rows * in), 2);
    s->w = normal((size_t)(out * in), 3);
    s->bias = normal((size_t)out, 4);
    s->weight = normal((size_t)(rows * ADAPTERS), 5);
    for (int32_t r = 0; r < rows; r++)
        for (int32_t i = 0; i < ADAPTERS; i++)
            if (r % 3 == 2 || (i != 2 && (r + i) % 2 == 0))
                s->weight[r * ADAPTERS + i] = 0;
    s->row = malloc((size_t)(rows * ADAPTERS) * sizeof *s->row);
    for (int32_t i = 0; i < ADAPTERS; i++) {
        s->a[i] = normal((size_t)(ranks[i] * in), 10 + (uint64_t)i);
        s->b[i] = normal((size_t)(out * ranks[i]), 20 + (uint64_t)i);
        s->lora[i] = (psoup__lora){.rank = ranks[i], .scale = 0.5f + (float)i, .a = s->a[i],
                                   .b = s->b[i]};
    }
    list_rows(s, 0);
    s->base = (psoup__weight){.dtype = PSOUP_F32, .in = in, .out = out, .data = s->w};
    s->mix = (psoup__mix){.n = ADAPTERS, .weight = s->weight, .rows = s->row, .first = s->first};
}

static void mixed_close(mixed *s) {
    free(s->x), free(s->x_lora), free(s->w), free(s->bias), free(s->weight), free(s->row);
    for (int32_t i = 0; i < ADAPTERS; i++)
        free(s->a[i]), free(s->b[i]);
}

static double sum2(const float *a, int32_t a_step, const float *b, int32_t b_step, int32_t n) {
    double sum = 0;
    for (int32_t i = 0; i < n; i++)
        sum += (double)a[i * a_step] * b[i * b_step];
    return sum;
}

/* y and u in float64; with dy also every gradient, by the formulas at the head of linear_mix.c. */
static void reference(const mixed *s, double *y, double *u) {
    for (int32_t r = 0; r < s->rows; r++)
        for (int32_t o = 0; o < s->out; o++)
            y[r * s->out + o] = s->bias[o] + sum2(s->x + r * s->in, 1, s->w + o * s->in, 1, s->in);
    for (int32_t i = 0; i < ADAPTERS; i++)
        for (int32_t k = s->first[i]; k < s->first[i + 1]; k++, u += ranks[i]) {
            const int32_t r = s->row[k];
            const double weight = (double)s->weight[r * ADAPTERS + i] * s->lora[i].scale;
            for (int32_t j = 0; j < ranks[i]; j++)
                u[j] = sum2(s->x_lora + r * s->in, 1, s->a[i] + j * s->in, 1, s->in);
            for (int32_t o = 0; o < s->out && weight != 0; o++)
                for (int32_t j = 0; j < ranks[i]; j++)
                    y[r * s->out + o] += weight * u[j] * s->b[i][o * ranks[i] + j];
        }
}

static const int32_t sizes[][3] = {{1, 1, 1}, {2, 37, 64}, {37, 64, 2}, {64, 129, 127}, {129, 127, 37},
                                   {600, 37, 33}};
enum { SIZES = sizeof sizes / sizeof *sizes };

START_TEST(forward_matches) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    for (int c = 0; c < SIZES; c++)
        for (int packed = 0; packed < 2; packed++) {
            mixed s;
            mixed_open(&s, sizes[c][0], sizes[c][1], sizes[c][2]);
            list_rows(&s, packed); /* rows listed with a weight of zero change nothing */
            const size_t n = (size_t)(s.rows * s.out);
            float *y = poisoned(n), *u = poisoned(s.u_size);
            double *y_want = doubles(n), *u_want = doubles(s.u_size);
            if (packed)
                ck_assert(m.ops->weights_pack(m.be, &(psoup__weight *){&s.base}, 1, true, NULL) == PSOUP_OK);
            m.ops->linear_mix(m.be, y, u, s.x, s.x_lora, &s.base, s.bias, s.lora, &s.mix, s.rows);
            reference(&s, y_want, u_want);
            near("y", y, y_want, n, 3e-6);
            near("u", u, u_want, s.u_size, 3e-6);
            m.ops->weight_unpack(m.be, &s.base);
            free(y), free(u), free(y_want), free(u_want);
            mixed_close(&s);
        }
    machine_close(&m);
}
END_TEST

START_TEST(half_weights_match) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    const psoup_dtype dtypes[2] = {PSOUP_F16, PSOUP_BF16};
    for (int d = 0; d < 2; d++) {
        mixed s;
        mixed_open(&s, 37, 65, 40);
        uint16_t *half = malloc((size_t)(s.in * s.out) * 2);
        psoup__from_f32(m.context, half, dtypes[d], s.w, (size_t)(s.in * s.out));
        psoup__to_f32(m.context, s.w, half, dtypes[d], (size_t)(s.in * s.out));
        s.base.dtype = dtypes[d];
        s.base.data = half;
        const size_t n = (size_t)(s.rows * s.out);
        float *y = poisoned(n), *u = poisoned(s.u_size);
        double *y_want = doubles(n), *u_want = doubles(s.u_size);
        m.ops->linear_mix(m.be, y, u, s.x, s.x_lora, &s.base, s.bias, s.lora, &s.mix, s.rows);
        reference(&s, y_want, u_want);
        near("y", y, y_want, n, 3e-6);
        free(y), free(u), free(y_want), free(u_want), free(half);
        mixed_close(&s);
    }
    machine_close(&m);
}
END_TEST

/* Every row alone, on one thread, gives the bits it has in the batch on three. */
START_TEST(row_is_independent) {
    machine m, one;
    if (!machine_open(&m, _i, 3))
        return;
    ck_assert(machine_open(&one, _i, 1));
    mixed s;
    mixed_open(&s, 67, 129, 127);
    float *y = poisoned((size_t)(s.rows * s.out)), *u = poisoned(s.u_size);
    m.ops->linear_mix(m.be, y, u, s.x, s.x_lora, &s.base, s.bias, s.lora, &s.mix, s.rows);
    for (int32_t r = 0; r < s.rows; r++) {
        int32_t row[ADAPTERS] = {0}, first[ADAPTERS + 1] = {0};
        for (int32_t i = 0; i < ADAPTERS; i++)
            first[i + 1] = first[i] + (s.weight[r * ADAPTERS + i] != 0);
        float *y1 = poisoned((size_t)s.out), u1[ADAPTERS * RANKS_MAX];
        psoup__mix mix = {.n = ADAPTERS, .weight = s.weight + r * ADAPTERS, .rows = row, .first = first};
        one.ops->linear_mix(one.be, y1, u1, s.x + r * s.in, s.x_lora + r * s.in, &s.base, s.bias, s.lora,
                            &mix, 1);
        same_bits("y", y + r * s.out, y1, (size_t)s.out);
        free(y1);
    }
    free(y), free(u);
    mixed_close(&s);
    machine_close(&m);
    machine_close(&one);
}
END_TEST

/* Adapter 0 diverged to NaN: rows with weight zero on it keep their bits, forward and backward, even
 * when they are listed. */
START_TEST(nan_is_contained) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    mixed s;
    mixed_open(&s, 40, 33, 29);
    list_rows(&s, 1);
    const size_t n = (size_t)(s.rows * s.out), n_x = (size_t)(s.rows * s.in);
    float *y[2], *dx[2], *u = poisoned(s.u_size), *du = poisoned(s.u_size), *dy = normal(n, 9);
    for (int k = 0; k < 2; k++) {
        for (int32_t j = 0; k == 1 && j < ranks[0] * s.in; j++)
            s.a[0][j] = NAN;
        y[k] = poisoned(n);
        dx[k] = normal(n_x, 8);
        m.ops->linear_mix(m.be, y[k], u, s.x, s.x_lora, &s.base, s.bias, s.lora, &s.mix, s.rows);
        m.ops->linear_mix_backward(m.be, dx[k], dx[k], NULL, NULL, du, dy, s.x, s.x_lora, u, &s.base,
                                   s.lora, &s.mix, s.rows);
    }
    for (int32_t r = 0; r < s.rows; r++)
        if (s.weight[r * ADAPTERS] == 0) {
            same_bits("y", y[0] + r * s.out, y[1] + r * s.out, (size_t)s.out);
            same_bits("dx", dx[0] + r * s.in, dx[1] + r * s.in, (size_t)s.in);
        } else
            ck_assert(isnan(y[1][r * s.out]) && isnan(dx[1][r * s.in]));
    for (int k = 0; k < 2; k++)
        free(y[k]), free(dx[k]);
    free(u), free(du), free(dy);
    mixed_close(&s);
    machine_close(&m);
}
END_TEST

START_TEST(backward_matches) {
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    for (int c = 0; c < SIZES; c++) {
        mixed s;
        mixed_open(&s, sizes[c][0], sizes[c][1], sizes[c][2]);
        list_rows(&s, c % 2);
        const int32_t rows = s.rows, in = s.in, out = s.out;
        const size_t n_x = (size_t)(rows * in), n_y = (size_t)(rows * out), n_w = (size_t)(out * in),
                     n_m = (size_t)(rows * ADAPTERS);
        /* What each gradient held before stays in the sum. */
        float *y = poisoned(n_y), *u = poisoned(s.u_size), *du = poisoned(s.u_size);
        float *dy = normal(n_y, 30), *dx = normal(n_x, 31), *dx_lora = normal(n_x, 32);
        float *dw = normal(n_w, 33), *dbias = normal((size_t)out, 34), *dweight = normal(n_m, 35);
        double *dx_want = doubles(n_x), *dx_lora_want = doubles(n_x), *dw_want = doubles(n_w);
        double *dbias_want = doubles((size_t)out), *dweight_want = doubles(n_m);
        for (int32_t r = 0; r < rows; r++)
            for (int32_t j = 0; j < in; j++) {
                dx_want[r * in + j] = dx[r * in + j] + sum2(dy + r * out, 1, s.w + j, in, out);
                dx_lora_want[r * in + j] = dx_lora[r * in + j];
            }
        for (int32_t o = 0; o < out; o++) {
            for (int32_t j = 0; j < in; j++)
                dw_want[o * in + j] = dw[o * in + j] + sum2(dy + o, out, s.x + j, in, rows);
            dbias_want[o] = dbias[o];
            for (int32_t r = 0; r < rows; r++)
                dbias_want[o] += dy[r * out + o];
        }
        for (size_t i = 0; i < n_m; i++)
            dweight_want[i] = dweight[i];
        double *da_want[ADAPTERS], *db_want[ADAPTERS];
        for (int32_t i = 0; i < ADAPTERS; i++) {
            const int32_t rank = ranks[i];
            s.lora[i].da = normal((size_t)(rank * in), 40 + (uint64_t)i);
            s.lora[i].db = normal((size_t)(out * rank), 50 + (uint64_t)i);
            da_want[i] = doubles((size_t)(rank * in));
            db_want[i] = doubles((size_t)(out * rank));
            for (int32_t j = 0; j < rank * in; j++)
                da_want[i][j] = s.lora[i].da[j];
            for (int32_t j = 0; j < out * rank; j++)
                db_want[i][j] = s.lora[i].db[j];
            for (int32_t k = s.first[i]; k < s.first[i + 1]; k++) {
                const int32_t r = s.row[k];
                const double weight = s.weight[r * ADAPTERS + i], scale = s.lora[i].scale;
                for (int32_t j = 0; j < rank; j++) {
                    const double u_j = sum2(s.x_lora + r * in, 1, s.a[i] + j * in, 1, in);
                    const double du_j = sum2(dy + r * out, 1, s.b[i] + j, rank, out);
                    dweight_want[r * ADAPTERS + i] += scale * du_j * u_j;
                    for (int32_t p = 0; p < in; p++) {
                        da_want[i][j * in + p] += weight * scale * du_j * s.x_lora[r * in + p];
                        dx_lora_want[r * in + p] += weight * scale * du_j * s.a[i][j * in + p];
                    }
                    for (int32_t o = 0; o < out; o++)
                        db_want[i][o * rank + j] += dy[r * out + o] * weight * scale * u_j;
                }
            }
        }
        s.mix.dweight = dweight;
        m.ops->linear_mix(m.be, y, u, s.x, s.x_lora, &s.base, s.bias, s.lora, &s.mix, rows);
        m.ops->linear_mix_backward(m.be, dx, dx_lora, dw, dbias, du, dy, s.x, s.x_lora, u, &s.base,
                                   s.lora, &s.mix, rows);
        near("dx", dx, dx_want, n_x, 3e-6);
        near("dx_lora", dx_lora, dx_lora_want, n_x, 3e-6);
        near("dw", dw, dw_want, n_w, 3e-6);
        near("dbias", dbias, dbias_want, (size_t)out, 3e-6);
        near("dweight", dweight, dweight_want, n_m, 5e-6);
        for (int32_t i = 0; i < ADAPTERS; i++) {
            near("da", s.lora[i].da, da_want[i], (size_t)(ranks[i] * in), 5e-6);
            near("db", s.lora[i].db, db_want[i], (size_t)(out * ranks[i]), 5e-6);
            free(s.lora[i].da), free(s.lora[i].db), free(da_want[i]), free(db_want[i]);
        }
        free(y), free(u), free(du), free(dy), free(dx), free(dx_lora), free(dw), free(dbias);
        free(dweight), free(dx_want), free(dx_lora_want), free(dw_want), free(dbias_want);
        free(dweight_want);
        mixed_close(&s);
    }
    machine_close(&m);
}
END_TEST

/* Several linears that read one x give the bits of one after another: of any number of rows, with and without
 * adapters, biases, packed weights and rows of factors. */
START_TEST(several_at_once_are_each) {
    enum { N = 3, IN = 70 };
    static const int32_t outs[N] = {130, 33, 64}, batches[] = {1, 2, 16, 64, 65, 200};
    machine m;
    if (!machine_open(&m, _i, 2))
        return;
    for (size_t c = 0; c < sizeof batches / sizeof *batches; c++)
        for (int way = 0; way < 8; way++) {
            mixed s[N];
            psoup__linear each[N];
            float *y[N], *u[N];
            const bool bias = way & 1, packed = way & 2, factors = way & 4;
            int32_t *apart = calloc((size_t)batches[c], sizeof *apart);
            for (int32_t r = 0; r < batches[c]; r += 2)
                apart[r] = 1;
            for (int k = 0; k < N; k++) {
                mixed_open(&s[k], batches[c], IN, outs[k]);
                for (int32_t i = 0; factors && i < ADAPTERS; i++) /* those are of one rank and scale */
                    s[k].lora[i].rank = i == 1 ? 0 : 3, s[k].lora[i].scale = 2;
                s[k].mix.factors = factors ? apart : NULL;
                if (packed)
                    ck_assert(m.ops->weights_pack(m.be, &(psoup__weight *){&s[k].base}, 1, false, NULL) == PSOUP_OK);
                y[k] = poisoned((size_t)(batches[c] * outs[k]));
                u[k] = poisoned((size_t)batches[c] * ADAPTERS * RANKS_MAX);
                each[k] = (psoup__linear){poisoned((size_t)(batches[c] * outs[k])),
                                          poisoned((size_t)batches[c] * ADAPTERS * RANKS_MAX), &s[k].base,
                                          bias ? s[k].bias : NULL, k == 1 ? NULL : s[k].lora};
                static const int32_t nobody[1] = {0};
                m.ops->linear_mix(m.be, y[k], u[k], s[0].x, s[0].x, &s[k].base, each[k].bias, each[k].lora,
                                  k == 1 ? &(psoup__mix){.first = nobody} : &s[0].mix, batches[c]);
            }
            m.ops->linear_mix_each(m.be, each, N, s[0].x, &s[0].mix, batches[c]);
            for (int k = 0; k < N; k++) {
                same_bits("y", each[k].y, y[k], (size_t)(batches[c] * outs[k]));
                ck_assert(isnan(each[k].y[batches[c] * outs[k]]));
                if (k != 1)
                    same_bits("u", each[k].u, u[k], s[0].u_size / (factors ? RANKS_MAX : 1));
                m.ops->weight_unpack(m.be, &s[k].base);
                free(each[k].y), free(each[k].u), free(y[k]), free(u[k]);
            }
            for (int k = 0; k < N; k++)
                mixed_close(&s[k]);
            free(apart);
        }
    machine_close(&m);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("cpu: linear_mix");
    TCase *tests = tcase_create("linear_mix");
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, forward_matches, 0, CASE_ISAS);
    tcase_add_loop_test(tests, half_weights_match, 0, CASE_ISAS);
    tcase_add_loop_test(tests, row_is_independent, 0, CASE_ISAS);
    tcase_add_loop_test(tests, nan_is_contained, 0, CASE_ISAS);
    tcase_add_loop_test(tests, several_at_once_are_each, 0, CASE_ISAS);
    tcase_add_loop_test(tests, backward_matches, 0, CASE_ISAS);
    suite_add_tcase(suite, tests);
    return run_suite(suite);
}
