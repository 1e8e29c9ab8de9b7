/* AdamW over one flat buffer, clipping by value and by norm, and learning-rate schedules. */
#include <math.h>

#include "train/train.h"

void psoup__permutation(int32_t *order, size_t n, uint64_t seed, uint64_t sequence) {
    psoup__random random = {seed, sequence, 0};
    for (size_t i = 0; i < n; i++)
        order[i] = (int32_t)i;
    psoup__random_shuffle(&random, order, n);
}

psoup_status psoup__optimizer_start(psoup__optimizer *optimizer, psoup__backend *be,
                                    psoup_error *error) {
    optimizer->be = be;
    optimizer->steps = 0;
    optimizer->m = be->ops->alloc(be, optimizer->n, sizeof(float), error);
    if (!optimizer->m)
        return PSOUP_ERROR_MEMORY;
    optimizer->v = be->ops->alloc(be, optimizer->n, sizeof(float), error);
    if (!optimizer->v) {
        psoup__optimizer_end(optimizer);
        return PSOUP_ERROR_MEMORY;
    }
    return PSOUP_OK;
}

void psoup__optimizer_end(psoup__optimizer *optimizer) {
    psoup__backend *be = optimizer->be;
    if (!be)
        return;
    if (optimizer->m)
        be->ops->release(be, optimizer->m);
    if (optimizer->v)
        be->ops->release(be, optimizer->v);
    optimizer->m = optimizer->v = NULL;
}

void psoup__optimizer_zero(psoup__optimizer *optimizer) {
    size_t k = 0;
    do
        optimizer->be->ops->zero(optimizer->be, optimizer->g + k * optimizer->stride, optimizer->n * sizeof(float));
    while (++k < (size_t)optimizer->gradients);
}

void psoup__optimizer_gather(psoup__optimizer *optimizer) {
    for (size_t k = 1; k < (size_t)optimizer->gradients; k++)
        optimizer->be->ops->add(optimizer->be, optimizer->g, optimizer->g + k * optimizer->stride, optimizer->n);
}

static void step(psoup__optimizer *optimizer, float lr, double scale) {
    psoup__backend *be = optimizer->be;
    optimizer->steps++;
    psoup__adamw_args args = {
        .lr = lr,
        .beta1 = optimizer->beta1,
        .beta2 = optimizer->beta2,
        .epsilon = optimizer->epsilon,
        .weight_decay = optimizer->weight_decay,
        .correction1 = (float)(1.0 - pow((double)optimizer->beta1, (double)optimizer->steps)),
        .correction2 = (float)(1.0 - pow((double)optimizer->beta2, (double)optimizer->steps)),
        .gradient_scale = (float)scale,
    };
    be->ops->adamw(be, optimizer->p, optimizer->m, optimizer->v, optimizer->g, optimizer->n, &args);
}

/* ‖g‖ of all of them. */
static psoup_status norm_of(psoup__optimizer *const *optimizers, size_t n, double *norm, psoup_error *error) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) {
        psoup__optimizer *o = optimizers[i];
        double squares = 0.0;
        psoup_status status = o->be->ops->sum_squares(o->be, &squares, o->g, o->n, error);
        if (status != PSOUP_OK)
            return status;
        sum += squares;
    }
    *norm = sqrt(sum);
    return PSOUP_OK;
}

/* Clipping: g ← min(max(g, −max_value), max_value), as torch's clip_grad_value_ has it, and then
 * g ← g · min(1, max_norm / (‖g‖ + 1e-6)), as its clip_grad_norm_. */
psoup_status psoup__optimizers_step(psoup__optimizer *const *optimizers, size_t n, float lr,
                                    double *norm, bool *stepped, psoup_error *error) {
    double clipped, scale = 1.0;
    float max_norm = optimizers[0]->max_grad_norm, max_value = optimizers[0]->max_grad_value;
    *stepped = false;
    psoup_status status = norm_of(optimizers, n, norm, error);
    if (status != PSOUP_OK || !isfinite(*norm))
        return status;
    clipped = *norm;
    for (size_t i = 0; max_value > 0.0f && i < n; i++)
        optimizers[i]->be->ops->clip_values(optimizers[i]->be, optimizers[i]->g, optimizers[i]->n, max_value);
    if (max_value > 0.0f && max_norm > 0.0f)
        status = norm_of(optimizers, n, &clipped, error);
    if (status != PSOUP_OK)
        return status;
    if (max_norm > 0.0f)
        scale = fmin(1.0, max_norm / (clipped + 1e-6));
    for (size_t i = 0; i < n; i++)
        step(optimizers[i], lr, scale);
    *stepped = true;
    return PSOUP_OK;
}

psoup_status psoup__optimizer_step(psoup__optimizer *optimizer, float lr, double *norm,
                                   bool *stepped, psoup_error *error) {
    return psoup__optimizers_step(&optimizer, 1, lr, norm, stepped, error);
}

/* For messages: no "-nan". */
static double unsigned_nan(double x) { return isnan(x) ? (double)NAN : x; }

psoup_status psoup__guarded_step(const psoup__team *team, psoup__optimizer *optimizer, float lr, double loss,
                                 const char *trainer, const char *subject, int64_t step, double *norm,
                                 bool *stepped, psoup_error *error) {
    psoup_status status = PSOUP_OK;
    *norm = 0.0;
    *stepped = false;
    if (isfinite(loss))
        status = psoup__optimizer_step(optimizer, lr, norm, stepped, error);
    if (status == PSOUP_OK && !*stepped && team->rank == 0)
        psoup__log(optimizer->be->context, PSOUP_LOG_WARNING,
                   "%s: '%s', step %lld was skipped, its optimiser left as it was: %s is %g", trainer, subject,
                   (long long)step, isfinite(loss) ? "the norm of its gradient" : "its loss",
                   unsigned_nan(isfinite(loss) ? *norm : loss));
    return status;
}

/* transformers' get_*_schedule_with_warmup: with k = step − 1 steps behind, k / warmup while warming
 * up; then 1, (total − k) / (total − warmup), or ½ (1 + cos π (k − warmup) / (total − warmup)). */
float psoup__learning_rate(float peak, psoup_schedule schedule, int64_t warmup, int64_t step,
                           int64_t total) {
    int64_t k = step - 1;
    if (k < warmup)
        return (float)(peak * ((double)k / (double)warmup));
    double left = (double)(total - k) / (double)(total > warmup ? total - warmup : 1);
    left = fmin(fmax(left, 0.0), 1.0);
    switch (schedule) {
    case PSOUP_SCHEDULE_LINEAR: return (float)(peak * left);
    case PSOUP_SCHEDULE_COSINE: return (float)(peak * 0.5 * (1.0 - cos(acos(-1.0) * left)));
    default: return peak;
    }
}

/* ---- going back ----------------------------------------------------------------------------------- */

psoup_status psoup__snapshot_take(psoup__snapshot *s, const psoup__optimizer *o, psoup_error *error) {
    const float *const from[] = {o->p, o->m, o->v};
    psoup_status status = PSOUP_OK;
    size_t count;
    if (!psoup__multiply(o->n, 3, &count))
        return psoup__out_of_memory(error, SIZE_MAX);
    if (!s->data)
        s->data = psoup__alloc(o->be->context, count, sizeof(*s->data), error);
    if (!s->data)
        return PSOUP_ERROR_MEMORY;
    for (size_t k = 0; status == PSOUP_OK && k < 3; k++)
        status = o->be->ops->read(o->be, s->data + k * o->n, from[k], o->n * sizeof(float), error);
    s->steps = o->steps;
    return status;
}

void psoup__snapshot_restore(const psoup__snapshot *s, psoup__optimizer *o) {
    float *const to[] = {o->p, o->m, o->v};
    for (size_t k = 0; k < 3; k++)
        o->be->ops->write(o->be, to[k], s->data + k * o->n, o->n * sizeof(float));
    o->steps = s->steps;
}

void psoup__snapshot_free(psoup__snapshot *s, psoup_context *context) {
    psoup__free(context, s->data);
    s->data = NULL;
}
