/* The one primitive: a frozen linear layer plus each row's own mix of adapters. */
#include "checkops.h"

enum { MOST_ADAPTERS = 40 };

typedef enum sharing {
    ONE_HOT, /* row k uses one adapter, rows of one adapter lie together */
    FULL,    /* every row uses all */
    SPARSE   /* some use some, some none; all that is used is listed, and more, with weight 0; adapter 0 is
              * NaN and every row lists it so */
} sharing;

typedef struct shape {
    int32_t rows, in, out, n;
    sharing sharing;
    bool ragged;  /* ranks of every sort, 0 among them, that leave no address aligned; else 16 */
    bool factors; /* two rows of three are; ragged ranks are then 0 or 35, and scales are one */
    psoup_dtype blocks; /* INT8, NF4: of the weight; or 0 */
} shape;

/* One case: what the op reads, on the device and as numbers. */
typedef struct layer {
    shape s;
    psoup__weight w;
    buffer *x, *x_lora, *bias, *a, *b, *weight, *matrix;
    int32_t *row, first[MOST_ADAPTERS + 1]; /* rows on the host */
    psoup__lora lora[MOST_ADAPTERS];
    size_t a_at[MOST_ADAPTERS + 1], b_at[MOST_ADAPTERS + 1], u_at[MOST_ADAPTERS + 1];
    psoup__mix mix;
} layer;

static const int32_t ragged_ranks[] = {8, 0, 3, 16, 1, 33, 65, 20};

static float weight_of(const shape *s, int32_t row, int32_t i, bool *listed) {
    float weight = 0.25f + (float)((row * 7 + i * 5) % 11) / 8;
    switch (s->sharing) {
    case ONE_HOT:
        *listed = i == (int32_t)((int64_t)row * s->n / s->rows);
        return *listed ? weight : 0;
    case FULL:
        *listed = true;
        return weight;
    default:
        *listed = i == 0 || (row % 5 != 4 && (row + i) % 3 != 0);
        return i == 0 || !*listed || (row + i) % 4 == 0 ? 0 : (row + i) % 2 ? -weight : weight;
    }
}

/* Whether a row is one of mix->factors. */
static bool is_factors(const shape *s, int32_t row) {
    return s->factors && row % 3 != 1;
}

static void list_rows(checker *c, layer *l) {
    const shape *s = &l->s;
    size_t cells = (size_t)s->rows * (size_t)s->n;
    float *weight = calloc(cells + 1, sizeof *weight);
    l->row = malloc((cells + 1) * sizeof *l->row);
    int32_t used = 0;
    for (int32_t i = 0; i < s->n; i++) {
        l->first[i] = used;
        for (int32_t r = 0; r < s->rows; r++) {
            bool listed;
            weight[r * s->n + i] = weight_of(s, r, i, &listed);
            if (listed)
                l->row[used++] = r;
        }
        l->u_at[i + 1] = l->u_at[i] + (size_t)(used - l->first[i]) * (size_t)l->lora[i].rank;
    }
    l->first[s->n] = used;
    l->weight = values(c, weight, cells);
    l->mix = (psoup__mix){.n = s->n, .weight = l->weight->device, .first = l->first,
                          .rows = block(c, l->row, (size_t)used * sizeof *l->row)};
    free(weight);
    if (!s->factors)
        return;
    int32_t *factors = calloc((size_t)s->rows, sizeof *factors);
    for (int32_t r = 0; r < s->rows; r++)
        factors[r] = is_factors(s, r);
    l->mix.factors = block(c, factors, (size_t)s->rows * sizeof *factors);
    free(factors);
}

/* The weight in blocks, and their values, as products take them, in the matrix that results are compared by. */
static void make_blocks(checker *c, layer *l, psoup_dtype dtype) {
    const size_t n = l->matrix->n, bytes = psoup__block_bytes(l->s.blocks, n), count = psoup__block_count(n);
    uint8_t *codes = malloc(bytes);
    float *scales = malloc(count * sizeof *scales);
    void *narrow = malloc(n * sizeof(float));
    psoup_error error;
    psoup__blocks_write(c->context, l->s.blocks, l->matrix->host, n, codes, scales);
    psoup__blocks_read(c->context, &(psoup__blocks){l->s.blocks, codes, scales}, 0, n, l->matrix->host);
    if (c->cuda) {
        psoup__from_f32(c->context, narrow, dtype, l->matrix->host, n);
        psoup__to_f32(c->context, l->matrix->host, narrow, dtype, n);
    }
    l->w.dtype = l->s.blocks;
    l->w.values = dtype;
    l->w.data = block(c, codes, bytes);
    l->w.scales = block(c, scales, count * sizeof *scales);
    expect_true(c, "packed", c->ops->weights_pack(c->be, &(psoup__weight *){&l->w}, 1, true, &error) == PSOUP_OK);
    free(codes), free(scales), free(narrow);
}

static void open_layer(checker *c, layer *l, const shape *s, psoup_dtype dtype, bool dropped, bool bias) {
    const size_t n_x = (size_t)s->rows * (size_t)s->in;
    *l = (layer){.s = *s};
    for (int32_t i = 0; i < s->n; i++) {
        l->lora[i].rank = !s->ragged ? 16 : !s->factors ? ragged_ranks[i % 8] : i % 8 == 1 ? 0 : 35;
        l->lora[i].scale = s->factors ? 0.25f : 0.5f + 0.125f * (float)i;
        l->a_at[i + 1] = l->a_at[i] + (size_t)l->lora[i].rank * (size_t)s->in;
        l->b_at[i + 1] = l->b_at[i] + (size_t)l->lora[i].rank * (size_t)s->out;
    }
    l->x = input(c, n_x);
    l->x_lora = dropped ? input(c, n_x) : l->x;
    l->matrix = input_of(c, (size_t)s->out * (size_t)s->in, dtype);
    l->bias = bias ? input(c, (size_t)s->out) : NULL;
    l->a = input(c, l->a_at[s->n]);
    l->b = input(c, l->b_at[s->n]);
    if (s->sharing == SPARSE) {
        for (size_t i = 0; i < l->a_at[1]; i++)
            l->a->host[i] = NAN;
        for (size_t i = 0; i < l->b_at[1]; i++)
            l->b->host[i] = NAN;
        put(c, l->a);
        put(c, l->b);
    }
    for (int32_t i = 0; i < s->n; i++) {
        l->lora[i].a = l->a->device + l->a_at[i];
        l->lora[i].b = l->b->device + l->b_at[i];
    }
    list_rows(c, l);
    l->w = (psoup__weight){.dtype = dtype, .out = s->out, .in = s->in, .data = l->matrix->device};
    if (s->blocks)
        make_blocks(c, l, dtype);
    psoup_error error;
    int32_t widest = s->in > s->out ? s->in : s->out;
    expect_true(c, "room", c->ops->reserve(c->be, s->rows, widest, &error) == PSOUP_OK);
}

static void forward(checker *c, const layer *l, buffer *y, buffer *u) {
    c->ops->linear_mix(c->be, y->device, u->device, l->x->device, l->x_lora->device, &l->w,
                       l->bias ? l->bias->device : NULL, l->lora, &l->mix, l->s.rows);
}

static double dot(const float *a, size_t a_step, const float *b, size_t b_step, int32_t n) {
    double sum = 0;
    for (int32_t i = 0; i < n; i++)
        sum += (double)a[(size_t)i * a_step] * b[(size_t)i * b_step];
    return sum;
}

/* weight · scale of use k of adapter i. */
static double share(const layer *l, int32_t i, int32_t k) {
    return (double)l->weight->host[l->row[k] * l->s.n + i] * l->lora[i].scale;
}

/* Element j of x A_iᵀ in row r, or of dy B_i; in a row of factors, where it uses adapter i, of Σ_q w_q x A_qᵀ. */
static double own_u(const layer *l, const float *dy /* [rows, out] or NULL */, int32_t i, int32_t r, int32_t j) {
    const int32_t in = l->s.in, out = l->s.out, rank = l->lora[i].rank;
    return dy ? dot(dy + (size_t)r * out, 1, l->b->host + l->b_at[i] + j, rank, out)
              : dot(l->x_lora->host + (size_t)r * in, 1, l->a->host + l->a_at[i] + (size_t)j * in, 1, in);
}

static double u_of(const layer *l, const float *dy, int32_t i, int32_t r, int32_t j) {
    const float *weight = l->weight->host + (size_t)r * l->s.n;
    double sum = 0;
    if (!is_factors(&l->s, r) || weight[i] == 0)
        return own_u(l, dy, i, r, j);
    for (int32_t q = 0; q < l->s.n; q++)
        if (weight[q] != 0 && l->lora[q].rank > 0)
            sum += (double)weight[q] * own_u(l, dy, q, r, j);
    return sum;
}

/* y and u in float64, by the formulas at the head of src/cpu/linear_mix.c. */
static void reference(const layer *l, double *y, double *u) {
    const int32_t in = l->s.in, out = l->s.out;
    for (int32_t r = 0; r < l->s.rows; r++)
        for (int32_t o = 0; o < out; o++)
            y[r * out + o] = (l->bias ? (double)l->bias->host[o] : 0) +
                             dot(l->x->host + (size_t)r * in, 1, l->matrix->host + (size_t)o * in, 1, in);
    for (int32_t i = 0; i < l->s.n; i++)
        for (int32_t k = l->first[i]; k < l->first[i + 1]; k++) {
            const int32_t r = l->row[k], rank = l->lora[i].rank;
            for (int32_t j = 0; j < rank; j++, u++) {
                *u = u_of(l, NULL, i, r, j);
                for (int32_t o = 0; o < out && share(l, i, k) != 0; o++)
                    y[r * out + o] += share(l, i, k) * *u * l->b->host[l->b_at[i] + (size_t)(o * rank + j)];
            }
        }
}

static void say(checker *c, const char *op, const shape *s, psoup_dtype dtype, bool dropped, bool bias) {
    static const char *const sharings[] = {"one-hot", "full", "sparse"};
    begin(c, op, "%s%s%s, rows %d, in %d, out %d, %d adapters, %s, ranks %s%s%s%s", psoup_dtype_name(dtype),
          s->blocks ? ", in blocks of " : "", s->blocks ? psoup_dtype_name(s->blocks) : "", (int)s->rows, (int)s->in,
          (int)s->out, (int)s->n, sharings[s->sharing], s->ragged ? "ragged" : "16",
          s->factors ? ", factors" : "",
          dropped ? ", x_lora is not x" : "", bias ? ", bias" : "");
}

static void check_forward(checker *c, const shape *s, psoup_dtype dtype, bool dropped, bool bias) {
    layer l;
    say(c, "linear_mix", s, dtype, dropped, bias);
    open_layer(c, &l, s, dtype, dropped, bias);
    const size_t n_y = (size_t)s->rows * (size_t)s->out, n_u = l.u_at[s->n];
    buffer *y = output(c, n_y), *u = output(c, n_u);
    double *y_want = doubles(n_y), *u_want = doubles(n_u);
    forward(c, &l, y, u);
    reference(&l, y_want, u_want);
    expect(c, "y", y, y_want, tolerance_of(dtype));
    if (s->sharing != SPARSE)
        expect(c, "u", u, u_want, tolerance_of(dtype));
    free(l.row), free(y_want), free(u_want);
}

/* ---- several that read one x -------------------------------------------------------------------------- */

/* Three of other widths; where the second is `plain`, no adapter changes it. */
static void check_each(checker *c, const shape *s, psoup_dtype dtype, bool plain, bool bias) {
    enum { N = 3 };
    layer l[N];
    psoup__linear each[N];
    buffer *y[N], *u[N];
    say(c, "linear_mix_each", s, dtype, false, bias);
    for (int k = 0; k < N; k++) {
        const bool none = plain && k == 1;
        shape own = *s;
        own.out += 13 * k;
        open_layer(c, &l[k], &own, dtype, false, bias && k != 2);
        l[k].x = l[k].x_lora = l[0].x;
        if (none)
            l[k].s.n = 0;
        y[k] = output(c, (size_t)own.rows * (size_t)own.out);
        u[k] = output(c, l[k].u_at[s->n]);
        each[k] = (psoup__linear){y[k]->device, u[k]->device, &l[k].w, l[k].bias ? l[k].bias->device : NULL,
                                  none ? NULL : l[k].lora};
    }
    c->ops->linear_mix_each(c->be, each, N, l[0].x->device, &l[0].mix, s->rows);
    for (int k = 0; k < N; k++) {
        double *y_want = doubles(y[k]->n), *u_want = doubles(u[k]->n);
        reference(&l[k], y_want, u_want);
        expect(c, "y", y[k], y_want, tolerance_of(dtype));
        if (s->sharing != SPARSE && l[k].s.n > 0)
            expect(c, "u", u[k], u_want, tolerance_of(dtype));
        free(l[k].row), free(y_want), free(u_want);
    }
}

/* ---- backward ---------------------------------------------------------------------------------------- */

/* What is asked for, and where each sum begins. */
typedef struct pulls {
    buffer *dy, *dx, *dx_lora, *dw, *dbias, *da, *db, *dweight;
    double *dx_want, *dx_lora_want, *dw_want, *dbias_want, *da_want, *db_want, *dweight_want;
} pulls;

static double *begin_at(const buffer *b) {
    return b ? doubles_of(b->host, b->n) : NULL;
}

/* Every second case asks for all, the others for what training adapters asks for. */
static void open_pulls(checker *c, pulls *p, layer *l, bool all, bool dropped) {
    const shape *s = &l->s;
    const size_t n_x = (size_t)s->rows * (size_t)s->in;
    *p = (pulls){.dy = input(c, (size_t)s->rows * (size_t)s->out)};
    p->dx = all || dropped ? input(c, n_x) : NULL;
    p->dx_lora = !p->dx ? NULL : dropped ? input(c, n_x) : p->dx;
    p->dw = all ? input(c, (size_t)s->out * (size_t)s->in) : NULL;
    p->dbias = all ? input(c, (size_t)s->out) : NULL;
    p->da = input(c, l->a_at[s->n]);
    p->db = input(c, l->b_at[s->n]);
    p->dweight = all && s->sharing != SPARSE ? input(c, (size_t)s->rows * (size_t)s->n) : NULL;
    l->mix.dweight = p->dweight ? p->dweight->device : NULL;
    for (int32_t i = 0; i < s->n; i++) { /* some adapters are frozen */
        l->lora[i].da = i % 5 == 3 ? NULL : p->da->device + l->a_at[i];
        l->lora[i].db = i % 5 == 4 ? NULL : p->db->device + l->b_at[i];
    }
    p->dx_want = begin_at(p->dx);
    p->dx_lora_want = p->dx_lora == p->dx ? p->dx_want : begin_at(p->dx_lora);
    p->dw_want = begin_at(p->dw);
    p->dbias_want = begin_at(p->dbias);
    p->da_want = begin_at(p->da);
    p->db_want = begin_at(p->db);
    p->dweight_want = begin_at(p->dweight);
}

/* The gradients of the base, by the same formulas. */
static void base_reference(const layer *l, pulls *p) {
    const int32_t in = l->s.in, out = l->s.out, rows = l->s.rows;
    const float *dy = p->dy->host;
    for (int32_t r = 0; p->dx && r < rows; r++)
        for (int32_t k = 0; k < in; k++)
            p->dx_want[r * in + k] += dot(dy + (size_t)r * out, 1, l->matrix->host + k, in, out);
    for (int32_t o = 0; p->dw && o < out; o++)
        for (int32_t k = 0; k < in; k++)
            p->dw_want[o * in + k] += dot(dy + o, out, l->x->host + k, in, rows);
    for (int32_t o = 0; p->dbias && o < out; o++)
        for (int32_t r = 0; r < rows; r++)
            p->dbias_want[o] += dy[r * out + o];
}

/* And those of use k of adapter i. */
static void use_reference(const layer *l, pulls *p, int32_t i, int32_t k) {
    const int32_t in = l->s.in, out = l->s.out, r = l->row[k], rank = l->lora[i].rank;
    const float *dy = p->dy->host + (size_t)r * out, *x = l->x_lora->host + (size_t)r * in;
    for (int32_t j = 0; j < rank; j++) {
        const float *a = l->a->host + l->a_at[i] + (size_t)j * in;
        const double du = u_of(l, p->dy->host, i, r, j), u = u_of(l, NULL, i, r, j);
        if (p->dweight && is_factors(&l->s, r))
            p->dweight_want[r * l->s.n + i] += share(l, i, k) == 0 ? 0 : l->lora[i].scale *
                (own_u(l, p->dy->host, i, r, j) * u + du * own_u(l, NULL, i, r, j));
        else if (p->dweight)
            p->dweight_want[r * l->s.n + i] += l->lora[i].scale * du * u;
        if (share(l, i, k) == 0)
            continue;
        for (int32_t q = 0; q < in; q++) {
            if (l->lora[i].da)
                p->da_want[l->a_at[i] + (size_t)(j * in + q)] += share(l, i, k) * du * x[q];
            if (p->dx_lora)
                p->dx_lora_want[r * in + q] += share(l, i, k) * du * a[q];
        }
        for (int32_t o = 0; l->lora[i].db && o < out; o++)
            p->db_want[l->b_at[i] + (size_t)(o * rank + j)] += share(l, i, k) * u * dy[o];
    }
}

static void expect_pull(checker *c, const char *what, buffer *got, double *want, double tolerance) {
    if (got)
        expect(c, what, got, want, tolerance);
    free(want);
}

static void check_backward(checker *c, const shape *s, psoup_dtype dtype, bool dropped, bool all) {
    layer l;
    pulls p;
    say(c, "linear_mix_backward", s, dtype, dropped, all);
    open_layer(c, &l, s, dtype, dropped, all);
    open_pulls(c, &p, &l, all, dropped);
    buffer *y = output(c, p.dy->n), *u = output(c, l.u_at[s->n]), *du = output(c, l.u_at[s->n]);
    forward(c, &l, y, u);
    c->ops->linear_mix_backward(c->be, p.dx ? p.dx->device : NULL, p.dx_lora ? p.dx_lora->device : NULL,
                                p.dw ? p.dw->device : NULL, p.dbias ? p.dbias->device : NULL, du->device,
                                p.dy->device, l.x->device, l.x_lora->device, u->device, &l.w, l.lora, &l.mix,
                                s->rows);
    base_reference(&l, &p);
    for (int32_t i = 0; i < s->n; i++)
        for (int32_t k = l.first[i]; k < l.first[i + 1]; k++)
            use_reference(&l, &p, i, k);
    const double tolerance = tolerance_of(dtype);
    if (p.dx_lora != p.dx)
        expect_pull(c, "dx_lora", p.dx_lora, p.dx_lora_want, tolerance);
    expect_pull(c, "dx", p.dx, p.dx_want, tolerance);
    expect_pull(c, "dw", p.dw, p.dw_want, 1e-5);
    expect_pull(c, "dbias", p.dbias, p.dbias_want, 1e-5);
    expect_pull(c, "da", p.da, p.da_want, tolerance);
    expect_pull(c, "db", p.db, p.db_want, tolerance);
    expect_pull(c, "dweight", p.dweight, p.dweight_want, 2 * tolerance); /* two rounded factors */
    free(l.row);
}

/* ---- by finite differences ---------------------------------------------------------------------------- */

enum { X, X_LORA, MATRIX, BIAS, A, B, WEIGHT, NUMBERS };

/* y = W x + bias and, of a row, Σ w_i s B_i A_i x, or s (Σ w_i B_i)(Σ w_j A_j) x of one of factors, from these numbers
 * alone; the loss is <dy, y>. */
typedef struct plain {
    const layer *l;
    double *of[NUMBERS], *dy;
} plain;

enum { PLAIN_RANK = 16 };

/* Element j of x A_iᵀ in row r, and of dy B_i. */
static void plain_ends(const plain *p, int32_t r, int32_t i, int32_t j, double *ax, double *dyb) {
    const shape *s = &p->l->s;
    *ax = *dyb = 0;
    for (int32_t k = 0; k < s->in; k++)
        *ax += p->of[A][(i * PLAIN_RANK + j) * s->in + k] * p->of[X_LORA][r * s->in + k];
    for (int32_t o = 0; o < s->out; o++)
        *dyb += p->of[B][(i * s->out + o) * PLAIN_RANK + j] * p->dy[r * s->out + o];
}

static double plain_loss(void *arg) {
    const plain *p = arg;
    const shape *s = &p->l->s;
    double loss = 0;
    for (int32_t r = 0; r < s->rows; r++) {
        for (int32_t o = 0; o < s->out; o++) {
            double y = p->of[BIAS][o];
            for (int32_t k = 0; k < s->in; k++)
                y += p->of[MATRIX][o * s->in + k] * p->of[X][r * s->in + k];
            loss += p->dy[r * s->out + o] * y;
        }
        for (int32_t j = 0; j < PLAIN_RANK; j++) {
            double down = 0, up = 0;
            for (int32_t i = 0; i < s->n; i++) {
                const double w = p->of[WEIGHT][r * s->n + i];
                double ax, dyb;
                plain_ends(p, r, i, j, &ax, &dyb);
                down += w * ax;
                up += w * dyb;
                loss += is_factors(s, r) ? 0 : p->l->lora[i].scale * w * ax * dyb;
            }
            loss += is_factors(s, r) ? p->l->lora[0].scale * down * up : 0;
        }
    }
    return loss;
}

static void check_differences(checker *c, const shape *s) {
    static const char *const names[NUMBERS] = {"dx", "dx_lora", "dw", "dbias", "da", "db", "dweight"};
    layer l;
    begin(c, "linear_mix_backward", "rows %d, factors %d, by finite differences", (int)s->rows, (int)s->factors);
    open_layer(c, &l, s, PSOUP_F32, true, true);
    buffer *dy = input(c, (size_t)(s->rows * s->out)), *y = output(c, dy->n), *u = output(c, l.u_at[s->n]);
    buffer *du = output(c, u->n), *read[NUMBERS] = {l.x, l.x_lora, l.matrix, l.bias, l.a, l.b, l.weight};
    buffer *grown[NUMBERS];
    plain p = {.l = &l, .dy = doubles_of(dy->host, dy->n)};
    float *before[NUMBERS];
    for (int k = 0; k < NUMBERS; k++) {
        p.of[k] = doubles_of(read[k]->host, read[k]->n);
        grown[k] = input(c, read[k]->n);
        before[k] = malloc(grown[k]->n * sizeof(float));
        memcpy(before[k], grown[k]->host, grown[k]->n * sizeof(float));
    }
    for (int32_t i = 0; i < s->n; i++) {
        l.lora[i].da = grown[A]->device + l.a_at[i];
        l.lora[i].db = grown[B]->device + l.b_at[i];
    }
    l.mix.dweight = grown[WEIGHT]->device;
    forward(c, &l, y, u);
    c->ops->linear_mix_backward(c->be, grown[X]->device, grown[X_LORA]->device, grown[MATRIX]->device,
                                grown[BIAS]->device, du->device, dy->device, l.x->device, l.x_lora->device, u->device,
                                &l.w, l.lora, &l.mix, s->rows);
    for (int k = 0; k < NUMBERS; k++)
        differences(c, names[k], grown[k], before[k], p.of[k], grown[k]->n, 1, plain_loss, &p, 2e-5);
    for (int k = 0; k < NUMBERS; k++)
        free(before[k]), free(p.of[k]);
    free(p.dy), free(l.row);
}

/* ---- the copy of x that layers share ----------------------------------------------------------------- */

/* Writes into x between two layers that read it, in each way there is. The second must see what was
 * written. */
static void check_rewritten(checker *c) {
    static const char *const ways[] = {"write", "copy", "zero", "an op", "a layer"};
    const shape s = {5, 32, 32, 1, FULL, false, false, 0};
    for (int way = 0; way < 5; way++) {
        layer l, other;
        begin(c, "linear_mix", "x is rewritten by %s", ways[way]);
        open_layer(c, &l, &s, PSOUP_BF16, false, false);
        open_layer(c, &other, &s, PSOUP_F32, false, false);
        const size_t n = (size_t)(s.rows * s.in);
        buffer *y = output(c, n), *u = output(c, l.u_at[1]), *news = input(c, n);
        double *y_want = doubles(n), *u_want = doubles(l.u_at[1]);
        forward(c, &l, y, u);
        switch (way) {
        case 0:
            memcpy(l.x->host, news->host, n * sizeof(float));
            put(c, l.x);
            break;
        case 1:
            c->ops->copy(c->be, l.x->device, news->device, n * sizeof(float));
            break;
        case 2:
            c->ops->zero(c->be, l.x->device, n * sizeof(float));
            break;
        case 3:
            c->ops->add(c->be, l.x->device, news->device, n);
            break;
        default:
            forward(c, &other, l.x, u);
        }
        forward(c, &l, y, u);
        get(c, l.x);
        reference(&l, y_want, u_want);
        expect(c, "y", y, y_want, tolerance_of(PSOUP_BF16));
        free(l.row), free(other.row), free(y_want), free(u_want);
    }
}

static const shape shapes[] = {
    {1, 1, 1, 1, FULL, true, false, 0},          {1, 640, 129, 8, FULL, false, false, 0},
    {2, 37, 127, 0, FULL, false, false, 0},      {5, 1000, 33, 1, FULL, true, false, 0},
    {17, 129, 37, 8, SPARSE, true, false, 0},    {64, 640, 64, 3, FULL, false, false, 0},
    {127, 64, 128, 8, ONE_HOT, false, false, 0}, {129, 127, 2, 3, ONE_HOT, true, false, 0},
    {37, 64, 80, 33, FULL, true, false, 0},      {66, 72, 65, 33, SPARSE, false, false, 0},
    {600, 40, 640, 1, ONE_HOT, false, false, 0}, {1100, 33, 24, 2, FULL, false, false, 0},
    {1, 640, 129, 8, FULL, false, true, 0},      {17, 129, 37, 8, SPARSE, true, true, 0},
    {127, 64, 48, 3, ONE_HOT, false, true, 0},   {20, 40, 33, 40, FULL, true, true, 0},
    {66, 72, 65, 33, SPARSE, false, true, 0},    {600, 33, 24, 2, FULL, false, true, 0},
    {1, 1, 1, 1, FULL, true, false, PSOUP_NF4},       {1, 640, 128, 8, FULL, false, false, PSOUP_NF4},
    {5, 37, 33, 1, FULL, true, false, PSOUP_INT8},    {129, 127, 3, 3, ONE_HOT, true, false, PSOUP_NF4},
    {200, 64, 80, 2, FULL, false, false, PSOUP_INT8}, {17, 48, 37, 8, SPARSE, true, false, PSOUP_NF4},
    /* few rows, in blocks that rows of the weight begin with */
    {1, 64, 1, 0, FULL, false, false, PSOUP_NF4},     {1, 64, 33, 1, FULL, false, false, PSOUP_INT8},
    {2, 1088, 37, 0, FULL, false, false, PSOUP_INT8}, {7, 2112, 64, 1, FULL, true, false, PSOUP_NF4},
    {8, 1152, 129, 2, ONE_HOT, false, false, PSOUP_NF4}, {9, 192, 65, 3, SPARSE, false, false, PSOUP_NF4},
    {16, 576, 31, 2, FULL, true, false, PSOUP_INT8},  {17, 128, 40, 1, FULL, false, false, PSOUP_INT8},
};
enum { SHAPES = sizeof shapes / sizeof *shapes };

static const shape together[] = {
    {1, 640, 129, 8, FULL, false, false, 0},     {3, 37, 64, 8, FULL, true, false, 0},
    {5, 64, 20, 0, FULL, false, false, 0},       {17, 129, 37, 8, SPARSE, true, false, 0},
    {64, 640, 64, 8, FULL, false, false, 0},     {127, 64, 128, 8, ONE_HOT, false, false, 0},
    {37, 64, 80, 33, FULL, true, false, 0},      {66, 72, 65, 11, SPARSE, false, false, 0},
    {17, 129, 37, 8, SPARSE, true, true, 0},     {300, 33, 24, 2, FULL, false, true, 0},
    {9, 128, 80, 2, FULL, false, false, PSOUP_NF4}, {20, 72, 33, 3, ONE_HOT, true, false, PSOUP_INT8},
};
enum { TOGETHER = sizeof together / sizeof *together };

void check_linear_mix(checker *c) {
    static const psoup_dtype dtypes[] = {PSOUP_F32, PSOUP_BF16, PSOUP_F16};
    for (int i = 0; i < SHAPES; i++)
        for (int d = 0; d < 3; d++)
            check_forward(c, &shapes[i], dtypes[d], (i + d) % 2, (i + d) % 3 == 0);
    for (int i = 0; i < TOGETHER; i++)
        for (int d = 0; d < 3; d++)
            check_each(c, &together[i], dtypes[d], (i + d) % 2, (i + d) % 3 != 0);
    for (int i = 0; i < SHAPES; i++)
        for (int d = 0; d < 3; d++)
            check_backward(c, &shapes[i], dtypes[d], (i + d) % 2, (i + d) % 3 != 1);
    for (int32_t rows = 1; rows < 6; rows += 2) /* of factors row 1 is none, and the first of one is */
        for (int factors = 0; factors < 2; factors++)
            check_differences(c, &(shape){rows, 7, 5, 3, FULL, false, factors, 0});
    check_rewritten(c);
}
