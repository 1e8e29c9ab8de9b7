/* The one primitive: a frozen linear layer plus each row's own mix of adapters. */
#include "checkops.h"

enum { MOST_ADAPTERS = 33 };

typedef enum sharing {
    ONE_HOT, /* row k uses one adapter, rows of one adapter lie together */
    FULL,    /* every row uses all */
    SPARSE   /* some use some, some none; all that is used is listed, and more, with weight 0; adapter 0 is
              * NaN and every row lists it so */
} sharing;

typedef struct shape {
    int32_t rows, in, out, n;
    sharing sharing;
    bool ragged; /* ranks of every sort, 0 among them, that leave no address aligned; else 16 */
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
}

static void open_layer(checker *c, layer *l, const shape *s, psoup_dtype dtype, bool dropped, bool bias) {
    const size_t n_x = (size_t)s->rows * (size_t)s->in;
    *l = (layer){.s = *s};
    for (int32_t i = 0; i < s->n; i++) {
        l->lora[i].rank = s->ragged ? ragged_ranks[i % 8] : 16;
        l->lora[i].scale = 0.5f + 0.125f * (float)i;
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
                const float *a = l->a->host + l->a_at[i] + (size_t)j * in;
                *u = dot(l->x_lora->host + (size_t)r * in, 1, a, 1, in);
                for (int32_t o = 0; o < out && share(l, i, k) != 0; o++)
                    y[r * out + o] += share(l, i, k) * *u * l->b->host[l->b_at[i] + (size_t)(o * rank + j)];
            }
        }
}

static void say(checker *c, const char *op, const shape *s, psoup_dtype dtype, bool dropped, bool bias) {
    static const char *const sharings[] = {"one-hot", "full", "sparse"};
    begin(c, op, "%s, rows %d, in %d, out %d, %d adapters, %s, ranks %s%s%s", psoup_dtype_name(dtype),
          (int)s->rows, (int)s->in, (int)s->out, (int)s->n, sharings[s->sharing], s->ragged ? "ragged" : "16",
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
        const float *a = l->a->host + l->a_at[i] + (size_t)j * in, *b = l->b->host + l->b_at[i] + j;
        const double du = dot(dy, 1, b, rank, out), u = dot(x, 1, a, 1, in);
        if (p->dweight)
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

/* ---- the copy of x that layers share ----------------------------------------------------------------- */

/* Writes into x between two layers that read it, in each way there is. The second must see what was
 * written. */
static void check_rewritten(checker *c) {
    static const char *const ways[] = {"write", "copy", "zero", "an op", "a layer"};
    const shape s = {5, 32, 32, 1, FULL, false};
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
    {1, 1, 1, 1, FULL, true},          {1, 640, 129, 8, FULL, false},    {2, 37, 127, 0, FULL, false},
    {5, 1000, 33, 1, FULL, true},      {17, 129, 37, 8, SPARSE, true},   {64, 640, 64, 3, FULL, false},
    {127, 64, 128, 8, ONE_HOT, false}, {129, 127, 2, 3, ONE_HOT, true},  {37, 64, 80, 33, FULL, true},
    {66, 72, 65, 33, SPARSE, false},   {600, 40, 640, 1, ONE_HOT, false}, {1100, 33, 24, 2, FULL, false},
};
enum { SHAPES = sizeof shapes / sizeof *shapes };

void check_linear_mix(checker *c) {
    static const psoup_dtype dtypes[] = {PSOUP_F32, PSOUP_BF16, PSOUP_F16};
    for (int i = 0; i < SHAPES; i++)
        for (int d = 0; d < 3; d++)
            check_forward(c, &shapes[i], dtypes[d], (i + d) % 2, (i + d) % 3 == 0);
    for (int i = 0; i < SHAPES; i++)
        for (int d = 0; d < 3; d++)
            check_backward(c, &shapes[i], dtypes[d], (i + d) % 2, (i + d) % 3 != 1);
    check_rewritten(c);
}
