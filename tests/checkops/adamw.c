/* The optimiser. */
#include "checkops.h"

enum { STEPS = 3 };

/* torch.optim.AdamW's formula, in float64. */
static void check_adamw_step(checker *c, size_t n) {
    begin(c, "adamw", "n %zu", n);
    buffer *p = input(c, n), *m = input(c, n), *v = input(c, n), *g = input(c, n);
    for (size_t i = 0; i < n; i++)
        v->host[i] *= v->host[i];
    put(c, v);
    double *x = doubles_of(p->host, n), *mean = doubles_of(m->host, n), *square = doubles_of(v->host, n);
    for (int step = 1; step <= STEPS; step++) {
        const psoup__adamw_args o = {.lr = 1e-2f, .beta1 = 0.9f, .beta2 = 0.999f, .epsilon = 1e-8f,
                                     .weight_decay = 0.1f,
                                     .correction1 = (float)(1 - pow(0.9, step)),
                                     .correction2 = (float)(1 - pow(0.999, step)),
                                     .gradient_scale = 0.25f};
        c->ops->adamw(c->be, p->device, m->device, v->device, g->device, n, &o);
        for (size_t i = 0; i < n; i++) {
            const double d = g->host[i] * (double)o.gradient_scale;
            mean[i] += (1 - (double)o.beta1) * (d - mean[i]);
            square[i] = square[i] * o.beta2 + (1 - (double)o.beta2) * d * d;
            x[i] *= 1 - (double)o.lr * o.weight_decay;
            x[i] -= o.lr / (double)o.correction1 * mean[i] / (sqrt(square[i] / o.correction2) + o.epsilon);
        }
    }
    expect(c, "p", p, x, 3e-7);
    expect(c, "m", m, mean, 3e-7);
    expect(c, "v", v, square, 3e-7);
    free(x), free(mean), free(square);
}

/* Also where it does not begin at 16 bytes; what is within stays as it is, and so does NaN. */
static void check_clip_values(checker *c, size_t n) {
    const float limit = 0.5f;
    begin(c, "clip_values", "n %zu", n);
    buffer *x = input(c, n), *shifted = input(c, n + 1);
    double *want = doubles_of(x->host, n), *beside = doubles_of(shifted->host, n + 1);
    x->host[0] = INFINITY;
    want[0] = (double)limit;
    put(c, x);
    memcpy(shifted->host + 1, x->host, n * sizeof *x->host);
    put(c, shifted);
    for (size_t i = 0; i < n; i++)
        beside[i + 1] = want[i] = fmin(fmax(want[i], -(double)limit), (double)limit);
    c->ops->clip_values(c->be, x->device, n, limit);
    c->ops->clip_values(c->be, shifted->device + 1, n, limit);
    expect(c, "x", x, want, 0);
    expect(c, "x at an odd address", shifted, beside, 0);
    x->host[n - 1] = NAN;
    put(c, x);
    c->ops->clip_values(c->be, x->device, n, limit);
    get(c, x);
    expect_true(c, "NaN stays", isnan(x->host[n - 1]));
    free(want), free(beside);
}

/* Also where it does not begin at 16 bytes: the same bits as where it does. */
static void check_sum_squares(checker *c, size_t n) {
    psoup_error error;
    begin(c, "sum_squares", "n %zu", n);
    buffer *x = input(c, n), *shifted = input(c, n + 1);
    double want = 0, got = NAN, again = NAN;
    memcpy(shifted->host + 1, x->host, n * sizeof *x->host);
    put(c, shifted);
    for (size_t i = 0; i < n; i++)
        want += (double)x->host[i] * x->host[i];
    expect_true(c, "it succeeds", c->ops->sum_squares(c->be, &got, x->device, n, &error) == PSOUP_OK);
    expect_true(c, "Σ x² in float64", fabs(got - want) <= 1e-12 * want);
    expect_true(c, "it succeeds",
                c->ops->sum_squares(c->be, &again, shifted->device + 1, n, &error) == PSOUP_OK);
    expect_true(c, "the same bits at any address", got == again);
}

void check_adamw(checker *c) {
    for (int i = 0; i < RAGGED; i++)
        check_adamw_step(c, (size_t)ragged[i]);
    check_adamw_step(c, 37 * 640 + 3);
    for (int i = 0; i < RAGGED; i++)
        check_clip_values(c, (size_t)ragged[i] * 37);
    check_sum_squares(c, 0);
    for (int i = 0; i < RAGGED; i++)
        check_sum_squares(c, (size_t)ragged[i] * 37);
    check_sum_squares(c, 1200003); /* more than one round of the threads */
}
