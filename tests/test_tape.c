/* What trainers use of the model: dropout, scalar heads, gradients that accumulate. */
#include "model_case.h"

static const float mixes[4][2] = {{0.5f, 0.5f}, {1, 0}, {0, 0}, {0.3f, 0.7f}};
static const uint64_t seeds[4] = {5, 6, 7, 8}, streams[4] = {1, 2, 3, 4};

typedef struct fixture {
    psoup_context *context;
    psoup_model *model;
    psoup__tape *tape;
    sample_rows rows;
    int32_t start[5];
    psoup__batch batch;
} fixture;

static void set_up(fixture *f, float dropout) {
    *f = (fixture){.context = make_context(2)};
    f->model = load_plain(f->context, true);
    OK(psoup__tape_create(f->model, &f->tape, &error));
    fill_rows(&f->rows, 4, 31);
    for (int i = 0; i < 4; i++)
        f->start[i + 1] = f->start[i] + (int32_t)f->rows.row[i].n;
    f->batch = (psoup__batch){.n = 4, .rows = f->start[4], .tokens = f->rows.tokens,
                              .start = f->start, .mix = mixes[0], .dropout = dropout,
                              .dropout_seed = seeds, .dropout_stream = streams};
}

static void tear_down(fixture *f) {
    psoup__tape_free(f->tape);
    psoup_model_free(f->model);
    psoup_context_free(f->context);
}

static int32_t targets_of(const fixture *f, int32_t *row, int32_t *target) {
    int32_t n = 0;
    for (int s = 0; s < 4; s++)
        for (int32_t r = f->start[s]; r + 1 < f->start[s + 1]; r++) {
            row[n] = r;
            target[n++] = f->rows.tokens[r + 1];
        }
    return n;
}

/* Σ log p plus Σ (i + 1) · value i, of a few rows' heads with weights, and its gradient. */
typedef struct objective {
    int32_t row[64], target[64], n;
    int32_t head_row[3];
    float dvalue[3], ones[64];
    psoup__head_rows heads;
    psoup__dropout dropout;
} objective;

static void make_objective(const fixture *f, objective *o, bool head, float head_dropout) {
    static const uint64_t head_seed[3] = {1, 1, 1}, head_stream[3] = {9, 8, 7}, zero[3] = {0};
    static const int32_t at[3] = {2, 0, 1};
    static const float weight[3] = {1, -0.5f, 2};
    *o = (objective){.head_row = {20, 3, 58}, .dvalue = {1, 2, 3}};
    o->n = targets_of(f, o->row, o->target);
    for (int i = 0; i < o->n; i++)
        o->ones[i] = 1;
    if (!head)
        return;
    psoup__adapter *qv = psoup__model_adapter(f->model, "qv");
    OK(psoup__adapter_add_head(f->model, qv, &error));
    psoup__random random = {.seed = 2};
    for (int i = 0; i < 33; i++)
        qv->head[i] = psoup__random_normal(&random);
    o->dropout = (psoup__dropout){head_dropout, head_seed, head_stream, zero};
    o->heads = (psoup__head_rows){.adapter = qv, .row = o->head_row, .at = at, .weight = weight, .n = 3,
                                  .dropout = &o->dropout};
}

static double value_of(fixture *f, objective *o) {
    float logprobs[64];
    double sum = 0;
    OK(psoup__forward(f->model, f->tape, &f->batch, false, &error));
    OK(psoup__logprobs(f->model, f->tape, o->row, o->target, o->n, logprobs, &error));
    for (int i = 0; i < o->n; i++)
        sum += logprobs[i];
    if (o->heads.n) {
        float value[3] = {0};
        OK(psoup__heads(f->model, f->tape, &o->heads, 1, value, &error));
        for (int i = 0; i < 3; i++)
            sum += (double)o->dvalue[i] * value[i];
    }
    return sum;
}

static void run_backward(fixture *f, objective *o, float *dmix) {
    psoup__loss_gradient loss = {.row = o->row, .target = o->target, .dlogprob = o->ones,
                                 .n = o->n, .heads = &o->heads, .n_heads = o->heads.n > 0,
                                 .dvalue = o->dvalue, .dmix = dmix};
    OK(psoup__forward(f->model, f->tape, &f->batch, true, &error));
    OK(psoup__backward(f->model, f->tape, &loss, &error));
}

/* Along the gradient itself the derivative is ‖g‖. */
static void check_along(fixture *f, objective *o, float *p, const float *g, size_t n) {
    double size = 0, sides[2];
    float *old = malloc(n * sizeof *old);
    memcpy(old, p, n * sizeof *p);
    for (size_t i = 0; i < n; i++)
        size += (double)g[i] * g[i];
    size = sqrt(size);
    double t = 0.1 / size; /* a change of 0.2: far above f32's rounding, far below the curvature */
    for (int side = 0; side < 2; side++) {
        for (size_t i = 0; i < n; i++)
            p[i] = old[i] + (float)((side ? -t : t) * g[i] / size);
        sides[side] = value_of(f, o);
    }
    memcpy(p, old, n * sizeof *p);
    free(old);
    double measured = (sides[0] - sides[1]) / (2 * t);
    ck_assert_double_gt(size, 0.1);
    ck_assert_msg(fabs(measured - size) < 5e-3 * size, "measured %g, gradient %g", measured, size);
}

static const struct {
    float dropout;
    bool head;
    float head_dropout;
} cases[] = {{0, false, 0}, {0.3f, false, 0}, {0, true, 0}, {0.3f, true, 0.5f}};

START_TEST(gradients) {
    fixture f;
    objective o;
    set_up(&f, cases[_i].dropout);
    make_objective(&f, &o, cases[_i].head, cases[_i].head_dropout);
    psoup__adapter *all = psoup__model_adapter(f.model, "all");
    psoup__adapter *qv = psoup__model_adapter(f.model, "qv");
    OK(psoup__adapter_train(f.model, qv, true, &error));
    ck_assert_ptr_null(all->grad);
    float dmix[8];
    run_backward(&f, &o, dmix);
    check_along(&f, &o, qv->data, qv->grad, qv->count);
    ck_assert(dmix[0] != 0 && dmix[1] != 0 && dmix[2] != 0 && dmix[3] == 0 && dmix[4] == 0);
    /* Once more without clearing: twice the gradient. */
    float *once = malloc(qv->count * sizeof *once);
    memcpy(once, qv->grad, qv->count * sizeof *once);
    run_backward(&f, &o, NULL);
    for (size_t i = 0; i < qv->count; i++)
        once[i] *= 2;
    ck_assert_double_lt(relative(qv->grad, once, qv->count), 1e-5);
    free(once);
    /* And with the base training too. */
    OK(psoup__model_train_base(f.model, true, &error));
    run_backward(&f, &o, NULL);
    check_along(&f, &o, f.model->data, f.model->grad, f.model->count);
    tear_down(&f);
}
END_TEST

/* A sequence's dropout pattern is its own: alone, the same bits. Its seed and stream choose it. */
START_TEST(dropout_patterns) {
    fixture f;
    set_up(&f, 0.4f);
    static float batch[64 * 32], alone[64 * 32];
    OK(psoup__forward(f.model, f.tape, &f.batch, false, &error));
    memcpy(batch, psoup__tape_hidden(f.tape), (size_t)f.batch.rows * 32 * sizeof *batch);
    for (int s = 0; s < 4; s++) {
        int32_t n = f.start[s + 1] - f.start[s], start[2] = {0, n};
        psoup__batch one = {.n = 1, .rows = n, .tokens = f.rows.tokens + f.start[s],
                            .start = start, .mix = mixes[s], .dropout = 0.4f,
                            .dropout_seed = seeds + s, .dropout_stream = streams + s};
        size_t bytes = (size_t)n * 32 * sizeof *alone;
        OK(psoup__forward(f.model, f.tape, &one, true, &error)); /* saving changes nothing */
        memcpy(alone, psoup__tape_hidden(f.tape), bytes);
        ck_assert(memcmp(alone, batch + f.start[s] * 32, bytes) == 0);
        uint64_t other = seeds[s] + 100;
        one.dropout_seed = &other;
        OK(psoup__forward(f.model, f.tape, &one, false, &error));
        bool same = memcmp(psoup__tape_hidden(f.tape), batch + f.start[s] * 32, bytes) == 0;
        ck_assert_int_eq(same, s == 2); /* the base's row has nothing to drop */
    }
    tear_down(&f);
}
END_TEST

START_TEST(order_of_calls) {
    fixture f;
    objective o;
    set_up(&f, 0);
    make_objective(&f, &o, false, 0);
    psoup__loss_gradient loss = {.row = o.row, .target = o.target, .dlogprob = o.ones, .n = o.n};
    ck_assert_int_eq(psoup__backward(f.model, f.tape, &loss, &error), PSOUP_ERROR_STATE);
    OK(psoup__forward(f.model, f.tape, &f.batch, false, &error));
    ck_assert_int_eq(psoup__backward(f.model, f.tape, &loss, &error), PSOUP_ERROR_STATE);
    OK(psoup__forward(f.model, f.tape, &f.batch, true, &error));
    OK(psoup__backward(f.model, f.tape, &loss, &error));
    ck_assert_int_eq(psoup__backward(f.model, f.tape, &loss, &error), PSOUP_ERROR_STATE);
    const int32_t at = 0;
    float one = 1, value = 0;
    psoup__head_rows heads = {.adapter = f.model->adapters[0], .row = o.row, .at = &at, .weight = &one, .n = 1};
    ck_assert_int_eq(psoup__heads(f.model, f.tape, &heads, 1, &value, &error), PSOUP_ERROR_STATE);
    tear_down(&f);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("tape");
    TCase *tests = tcase_create("tape");
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, gradients, 0, (int)(sizeof cases / sizeof *cases));
    tcase_add_test(tests, dropout_patterns);
    tcase_add_test(tests, order_of_calls);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
