/* What adapters have to do with each other, from their small factors alone. */
#include "merge/engine.h"
#include "merge/inspect.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { SPECTRUM_RANKS = 1024 }; /* Σ rank of a module up to which singular values are computed */

/* The number behind "layers.", "h.", …: the first part of the name that is one. */
static int64_t layer_of(const char *name) {
    for (const char *at = name; at != NULL; at = strchr(at, '.')) {
        at += *at == '.';
        size_t digits = strspn(at, "0123456789");
        if (digits > 0 && digits < 10 && (at[digits] == '.' || at[digits] == '\0'))
            return strtol(at, NULL, 10);
    }
    return -1;
}

static const psoup__peft_pair *pair_of(const psoup__inspection *x, size_t adapter, const char *module) {
    return psoup__peft_find(x->adapters[adapter], module, strlen(module));
}

static psoup_status read_factor(const psoup__inspection *x, const psoup__peft *adapter, const char *module,
                                const char *part, const psoup__tensor *tensor, float *out,
                                psoup_error *error) {
    size_t n = (size_t)tensor->shape[0] * (size_t)tensor->shape[1];
    psoup__tensor_read(x->context, tensor, 0, n, out);
    if (psoup__merge_finite(x->context, out, n, PSOUP_F32))
        return PSOUP_OK;
    return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: %.200s.%s holds a NaN or infinity", adapter->path,
                       module, part);
}

/* The module's factors as f32 in *memory, which the caller frees. */
static psoup_status read_module(const psoup__inspection *x, psoup__finding *f, psoup_lora_factors *factors,
                                psoup__gram_module *module, float **memory, psoup_error *error) {
    psoup_status status;
    const psoup__peft *owner = NULL;
    bool across = false;
    size_t need = 0;
    *module = (psoup__gram_module){.factors = factors, .n = x->n};
    for (size_t i = 0; i < x->n; i++) {
        const psoup__peft_pair *pair = pair_of(x, i, f->name);
        if (pair == NULL)
            continue;
        if (owner == NULL) {
            owner = x->adapters[i];
            module->in = pair->a.shape[1];
            module->out = pair->b.shape[0];
            across = pair->transposed;
        } else if (pair->transposed != across) {
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: fan_in_fan_out of %.200s is not as in %s", x->adapters[i]->path, f->name,
                               owner->path);
        } else if (pair->a.shape[1] != module->in || pair->b.shape[0] != module->out) {
            return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                               "%s: %.200s maps %lld to %lld features, in %s %lld to %lld",
                               x->adapters[i]->path, f->name, (long long)pair->a.shape[1],
                               (long long)pair->b.shape[0], owner->path, (long long)module->in,
                               (long long)module->out);
        }
        /* The tensors are in files, so these sums are far from overflowing. */
        need += (size_t)pair->rank * ((size_t)module->in + (size_t)module->out);
        factors[i].rank = pair->rank;
        factors[i].scale = pair->scale;
        module->total += pair->rank;
    }
    if ((*memory = psoup__alloc(x->context, need, sizeof **memory, error)) == NULL)
        return PSOUP_ERROR_MEMORY;
    float *at = *memory;
    for (size_t i = 0; i < x->n; i++) {
        const psoup__peft_pair *pair = pair_of(x, i, f->name);
        if (pair == NULL)
            continue;
        float *b = at + (size_t)pair->rank * (size_t)module->in;
        PSOUP__TRY(read_factor(x, x->adapters[i], f->name, "lora_A", &pair->a, at, error));
        PSOUP__TRY(read_factor(x, x->adapters[i], f->name, "lora_B", &pair->b, b, error));
        factors[i].a = at;
        factors[i].b = b;
        at = b + (size_t)pair->rank * (size_t)module->out;
    }
    return PSOUP_OK;
fail:
    return status;
}

static psoup_status study(const psoup__inspection *x, psoup__finding *f, psoup_error *error) {
    psoup_status status = PSOUP_ERROR_MEMORY;
    psoup_context *context = x->context;
    const size_t n = x->n;
    psoup__gram_module module;
    float *memory = NULL;
    double *grams = NULL;
    psoup_lora_factors *factors = psoup__alloc(context, n, sizeof *factors, error);
    if (factors == NULL)
        goto fail;
    PSOUP__TRY(read_module(x, f, factors, &module, &memory, error));
    const size_t square = (size_t)module.total * (size_t)module.total;
    status = PSOUP_ERROR_MEMORY;
    if ((grams = psoup__alloc(context, 5 * square, sizeof *grams, error)) == NULL)
        goto fail;
    double *gram_b = grams + square, *scratch = grams + 2 * square;
    PSOUP__TRY(psoup__gram_of(context, &module, false, grams, error));
    PSOUP__TRY(psoup__gram_of(context, &module, true, gram_b, error));
    psoup__gram_inner(&module, grams, gram_b, f->inner);
    f->equal = true;
    for (size_t i = 0; i < n; i++) {
        f->there[i] = factors[i].rank > 0;
        f->equal &= factors[i].rank == factors[0].rank && factors[i].scale == factors[0].scale;
        for (size_t j = 0; j < n; j++)
            f->exact += x->weights[i] * x->weights[j] * f->inner[i * n + j];
    }
    f->exact = f->exact > 0 ? f->exact : 0;
    if (f->equal)
        f->cross = psoup__gram_cross(&module, grams, gram_b, x->weights, scratch);
    f->total = module.total;
    if (module.total <= SPECTRUM_RANKS) {
        status = PSOUP_ERROR_MEMORY;
        f->squares = psoup__alloc(context, (size_t)module.total, sizeof *f->squares, error);
        if (f->squares == NULL)
            goto fail;
        psoup__gram_spectrum(&module, grams, gram_b, x->weights, f->squares, scratch);
    }
    status = PSOUP_OK;
fail:
    psoup__free(context, factors);
    psoup__free(context, memory);
    psoup__free(context, grams);
    return status;
}

static void study_task(void *arg, size_t task, int worker) {
    psoup__inspection *x = arg;
    psoup_error error = {0};
    (void)worker;
    psoup_status status = study(x, &x->found[task], &error);
    if (status == PSOUP_OK)
        return;
    pthread_mutex_lock(&x->lock);
    if (task < x->failed) {
        x->failed = task;
        x->status = status;
        x->error = error;
    }
    pthread_mutex_unlock(&x->lock);
}

static int by_layer(const void *a, const void *b) {
    const psoup__finding *x = a, *y = b;
    if (x->layer != y->layer)
        return x->layer < y->layer ? -1 : 1;
    return strcmp(x->name, y->name);
}

/* The modules of all adapters, each once. */
static psoup_status list_modules(psoup__inspection *x, psoup_error *error) {
    psoup_status status;
    size_t capacity = 0;
    for (size_t i = 0; i < x->n; i++)
        for (size_t k = 0; k < x->adapters[i]->n; k++) {
            const char *name = x->adapters[i]->pairs[k].module;
            bool seen = false;
            for (size_t j = 0; j < i && !seen; j++)
                seen = pair_of(x, j, name) != NULL;
            if (seen)
                continue;
            PSOUP__TRY(psoup__reserve(x->context, &x->found, &capacity, x->modules + 1, sizeof *x->found,
                                      error));
            psoup__finding *f = &x->found[x->modules++];
            *f = (psoup__finding){.name = name, .layer = layer_of(name)};
            status = PSOUP_ERROR_MEMORY;
            if ((f->inner = psoup__alloc(x->context, x->n * x->n, sizeof *f->inner, error)) == NULL ||
                (f->there = psoup__alloc(x->context, x->n, 1, error)) == NULL)
                goto fail;
        }
    if (x->modules > 0)
        qsort(x->found, x->modules, sizeof *x->found, by_layer);
    return PSOUP_OK;
fail:
    return status;
}

psoup_status psoup_merge_inspect(psoup_context *context, const char *const *adapters, size_t n,
                                 const double *weights, psoup_json **out, psoup_error *error) {
    psoup_status status;
    if (out != NULL)
        *out = NULL;
    if (context == NULL || out == NULL || adapters == NULL || n < 1 || n > 1024)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_merge_inspect: %zu adapters; expected 1 to 1024, a context and out", n);
    psoup__inspection x = {.context = context, .n = n, .failed = SIZE_MAX};
    bool locked = false;
    PSOUP__TRY(weights == NULL ? PSOUP_OK : psoup__merge_check_weights(weights, n, true, error));
    status = PSOUP_ERROR_MEMORY;
    if ((x.adapters = psoup__alloc(context, n, sizeof *x.adapters, error)) == NULL ||
        (x.weights = psoup__alloc(context, n, sizeof *x.weights, error)) == NULL)
        goto fail;
    for (size_t i = 0; i < n; i++) {
        x.weights[i] = weights != NULL ? weights[i] : 1 / (double)n;
        PSOUP__TRY(psoup__peft_open(context, adapters[i], &x.adapters[i], error));
    }
    PSOUP__TRY(list_modules(&x, error));
    locked = pthread_mutex_init(&x.lock, NULL) == 0;
    psoup__parallel(context, x.modules, study_task, &x);
    for (size_t i = 0; i < n; i++)
        PSOUP__TRY(psoup__weights_check(x.adapters[i]->weights, error));
    if (x.failed != SIZE_MAX) {
        status = psoup__fail(error, x.status, "%s", x.error.message);
        goto fail;
    }
    status = psoup__inspect_answer(&x, out, error);
fail:
    if (locked)
        pthread_mutex_destroy(&x.lock);
    for (size_t m = 0; m < x.modules; m++) {
        psoup__free(context, x.found[m].inner);
        psoup__free(context, x.found[m].there);
        psoup__free(context, x.found[m].squares);
    }
    psoup__free(context, x.found);
    for (size_t i = 0; i < n && x.adapters != NULL; i++)
        psoup__peft_free(x.adapters[i]);
    psoup__free(context, x.adapters);
    psoup__free(context, x.weights);
    return status;
}
