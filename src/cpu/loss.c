/* Log probabilities of tokens, and their gradient. */
#include "cpu/variant.h"
#include "cpu/vector.h"

/* Exponentials are summed in f32 lanes over a block and the blocks in f64, so that a vocabulary of
 * any size loses nothing. */
enum { SUM_BLOCK = 1024 };

double PSOUP__NAME(psoup__cpu_lse)(const float *logits /* [vocab] */, int32_t vocab) {
    const size_t n = (size_t)vocab;
    const float none = -__builtin_inff();
    vec most[4] = {splat(none), splat(none), splat(none), splat(none)};
    size_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (size_t j = 0; j < 4; j++)
            most[j] = vec_max(load(logits + i + j * LANES), most[j]);
    for (; i + LANES <= n; i += LANES)
        most[0] = vec_max(load(logits + i), most[0]);
    if (i < n)
        most[0] = vec_max(load_some(logits + i, n - i, none), most[0]);
    const float max = max_lanes(vec_max(vec_max(most[0], most[1]), vec_max(most[2], most[3])));

    double sum = 0;
    for (i = 0; i < n; i += SUM_BLOCK) {
        const size_t block = least(SUM_BLOCK, n - i);
        vec lanes = {0};
        size_t j = 0;
        for (; j + LANES <= block; j += LANES)
            lanes += vec_exp(load(logits + i + j) - max);
        float part = sum_lanes(lanes), rest[LANES];
        if (j < block)
            store(rest, vec_exp(load_some(logits + i + j, block - j, 0) - max));
        for (size_t k = 0; j + k < block; k++)
            part += rest[k];
        sum += part;
    }
    return max + log_double(sum);
}

typedef struct logprob_job {
    float *logprob, *lse;   /* [rows] */
    float *dlogits;         /* [rows, vocab] */
    const float *logits;    /* [rows, vocab] */
    const float *saved_lse; /* [rows] */
    const float *dlogprob;  /* [rows] or NULL */
    const int32_t *target;  /* [rows] */
    int32_t vocab;
} logprob_job;

static void logprob_task(void *arg, size_t row, int worker) {
    const logprob_job *job = arg;
    const float *logits = job->logits + row * (size_t)job->vocab;
    double lse = PSOUP__NAME(psoup__cpu_lse)(logits, job->vocab);
    job->lse[row] = (float)lse;
    job->logprob[row] = (float)(logits[job->target[row]] - lse);
}

static void logprob(psoup__backend *be, float *out, float *lse, const float *logits,
                    const int32_t *target, int32_t rows, int32_t vocab) {
    logprob_job job = {
        .logprob = out, .lse = lse, .logits = logits, .target = target, .vocab = vocab};
    psoup__parallel(be->context, (size_t)rows, logprob_task, &job);
}

static void logprob_backward_task(void *arg, size_t row, int worker) {
    const logprob_job *job = arg;
    const size_t n = (size_t)job->vocab;
    const float *logits = job->logits + row * n;
    float *dlogits = job->dlogits + row * n;
    const float d = job->dlogprob ? job->dlogprob[row] : 1, lse = job->saved_lse[row];
    size_t j = 0;
    for (; j + LANES <= n; j += LANES)
        store(dlogits + j, -d * vec_exp(load(logits + j) - lse));
    if (j < n)
        store_some(dlogits + j, n - j, -d * vec_exp(load_some(logits + j, n - j, 0) - lse));
    dlogits[job->target[row]] += d;
}

static void logprob_backward(psoup__backend *be, float *dlogits, const float *logits,
                             const float *lse, const int32_t *target, const float *dlogprob,
                             int32_t rows, int32_t vocab) {
    logprob_job job = {.dlogits = dlogits, .logits = logits, .saved_lse = lse, .target = target,
                       .dlogprob = dlogprob, .vocab = vocab};
    psoup__parallel(be->context, (size_t)rows, logprob_backward_task, &job);
}

void PSOUP__NAME(psoup__cpu_fill_loss)(psoup__ops *ops) {
    ops->logprob = logprob;
    ops->logprob_backward = logprob_backward;
}
