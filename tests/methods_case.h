/* What the tests of the merge methods share: a job in blocks, and the same job in every way that must give the
 * same bits. */
#ifndef METHODS_CASE_H
#define METHODS_CASE_H

#include "merge_case.h"
#include "merge/method.h"

/* Runs a job in blocks of `block` elements. */
static inline psoup_status run_blocks(psoup_context *in, const psoup__method_job *job, size_t block, float *out,
                                      psoup_error *why) {
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

/* Runs a job on every instruction set, with one thread and with two, in blocks of many sizes; all must agree to
 * the bit. (Where factors are multiplied, those of one instruction set.) */
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
                                  "%s: other bits with %s, %d threads, blocks of %zu", job->method->name,
                                  isas[isa], threads, block);
                first = false;
            }
            psoup_context_free(made);
        }
    free(other);
}

#endif
