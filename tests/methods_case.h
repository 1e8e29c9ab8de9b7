/* What the tests of the merge methods share: a job in blocks, and the same job in every way that
 * must give the same bits. */
#ifndef METHODS_CASE_H
#define METHODS_CASE_H

#include "blend/method.h"
#include "merge_case.h"

/* Runs a job in blocks of `block` elements. */
static inline psoup_status run_blocks(psoup_context *in, const psoup__method_job *job, size_t block,
                                      float *out, psoup_error *why) {
    void *state = NULL;
    psoup__method_job mine = *job;
    mine.context = in;
    psoup_status status = mine.method->prepare(&mine, &state, why);
    if (status != PSOUP_OK) {
        ck_assert_ptr_null(state);
        return status;
    }
    float *space = malloc(psoup__method_scratch(&mine) * block * sizeof *space + 1);
    for (size_t end = job->n, done = 0; done < job->n; done += block) { /* the last block first */
        size_t n = end % block != 0 ? end % block : block;
        end -= n;
        mine.method->block(&mine, state, end, n, out + end, space);
        if (end == 0)
            break;
    }
    free(space);
    psoup__free(in, state);
    return PSOUP_OK;
}

/* Runs a job on every instruction set, with one thread and with two, in blocks of many sizes; all
 * must agree to the bit. (Where factors are multiplied, those of one instruction set.) */
static inline void run_all_ways(const psoup__method_job *job, float *out) {
    static const char *const isas[] = {"generic", "avx2", "avx512"};
    const size_t rows = (size_t)job->columns, odd = job->method->whole_rows ? rows : 37;
    bool factors = job->base != NULL && job->base->n_factors > 0;
    for (size_t i = 0; i < job->count; i++)
        factors |= job->inputs[i].n_factors > 0;
    const size_t blocks[] = {job->n, rows, 2 * rows, factors ? 3 * rows : odd};
    float *other = malloc(job->n * sizeof *other + 1);
    bool first = true;
    for (int isa = 0; isa < 3; isa++, first |= factors)
        for (int threads = 1; threads <= 2; threads++) {
            psoup_context *made = new_context(threads, isas[isa]);
            for (size_t b = threads == 1 ? 0 : 2; b < (threads == 1 ? 2 : 4) && made != NULL; b++) {
                size_t block = blocks[b] < job->n ? blocks[b] : job->n;
                ck_ok(run_blocks(made, job, block, first ? out : other, &error));
                if (!first)
                    ck_assert_msg(memcmp(out, other, job->n * sizeof *out) == 0,
                                  "%s: other bits with %s, %d threads, blocks of %zu",
                                  job->method->name, isas[isa], threads, block);
                first = false;
            }
            psoup_context_free(made);
        }
    free(other);
}

/* ---- tensors of the test's own ---------------------------------------------------------------- */

typedef struct set {
    size_t n, count;
    psoup__tensor tensors[4], base_tensor;
    psoup__merge_input inputs[4], base;
    float *x[4], *zero; /* inputs, base */
    psoup__method_job job;
} set;

/* Numbers that need not be random, only many and different. */
static inline float *numbers(size_t n) {
    static uint32_t state = 1;
    float *x = malloc((n + 1) * sizeof *x);
    for (size_t i = 0; i < n; i++) {
        state = state * 1664525 + 1013904223;
        x[i] = (float)(int32_t)state * 0x1p-31f;
    }
    return x;
}

static inline void make_set(set *s, const char *method, size_t rows, size_t columns, size_t count) {
    *s = (set){.n = rows * columns, .count = count};
    for (size_t i = 0; i <= count; i++) {
        float *x = numbers(s->n);
        psoup__tensor *tensor = i < count ? &s->tensors[i] : &s->base_tensor;
        psoup__merge_input *input = i < count ? &s->inputs[i] : &s->base;
        *tensor = (psoup__tensor){.dtype = PSOUP_F32,
                                  .rank = 2,
                                  .shape = {(int64_t)rows, (int64_t)columns},
                                  .bytes = s->n * sizeof *x,
                                  .data = x};
        *input = (psoup__merge_input){.tensor = tensor, .columns = (int64_t)columns};
        *(i < count ? &s->x[i] : &s->zero) = x;
    }
    s->job = (psoup__method_job){.context = context,
                                 .name = "model.norm.weight",
                                 .n = s->n,
                                 .columns = (int64_t)columns,
                                 .rows = (int64_t)rows,
                                 .count = count,
                                 .inputs = s->inputs,
                                 .base = &s->base,
                                 .lambda = 1,
                                 .t = 0.5,
                                 .seed = 11,
                                 .method = psoup__method_named(method)};
    ck_assert_ptr_nonnull(s->job.method);
}

static inline void free_set(set *s) {
    for (size_t i = 0; i < s->count; i++)
        free(s->x[i]);
    free(s->zero);
}

/* ---- every method with some parameters ---------------------------------------------------------- */

static const char *const all[] = {
    "linear",    "task_arithmetic", "magnitude_prune", "ties",        "dare_linear",
    "dare_ties", "della",           "della_linear",    "breadcrumbs", "breadcrumbs_ties",
    "slerp",     "nuslerp",         "model_stock",     "passthrough"};
enum { ALL = sizeof all / sizeof *all };

static inline size_t inputs_of(const char *method) {
    return strcmp(method, "slerp") == 0 || strcmp(method, "passthrough") == 0 ? 1
           : strcmp(method, "nuslerp") == 0                                   ? 2
                                                                              : 3;
}

static const double some_weights[4] = {0.5, 0.7, -0.2, 1}, some_densities[4] = {0.3, 0.6, 0.5, 0.4};

#endif
