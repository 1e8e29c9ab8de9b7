/* Log-probs of chosen tokens. */
#include "checkops.h"

static double lse_of(const float *row, int32_t vocab) {
    double max = -INFINITY, sum = 0;
    for (int32_t j = 0; j < vocab; j++)
        max = fmax(max, row[j]);
    for (int32_t j = 0; j < vocab; j++)
        sum += exp(row[j] - max);
    return max + log(sum);
}

static int32_t *targets(int32_t rows, int32_t vocab) {
    int32_t *target = malloc((size_t)rows * sizeof *target);
    for (int32_t i = 0; target && i < rows; i++)
        target[i] = i == 0 ? vocab - 1 : (int32_t)((int64_t)i * 7919 % vocab);
    return target;
}

/* Logits of a model are spread wide, and some are −∞. */
static buffer *spread_logits(checker *c, int32_t rows, int32_t vocab, const int32_t *target) {
    buffer *logits = input(c, (size_t)rows * (size_t)vocab);
    for (size_t i = 0; i < logits->n; i++)
        logits->host[i] *= 12;
    for (size_t i = 0; i < logits->n; i += 5)
        if ((int32_t)(i % (size_t)vocab) != target[i / (size_t)vocab])
            logits->host[i] = -INFINITY;
    put(c, logits);
    return logits;
}

static void check_logprob(checker *c, int32_t rows, int32_t vocab) {
    begin(c, "logprob", "rows %d, vocab %d", (int)rows, (int)vocab);
    int32_t *target = targets(rows, vocab);
    buffer *logits = spread_logits(c, rows, vocab, target);
    buffer *out = output(c, (size_t)rows), *lse = output(c, (size_t)rows);
    double *want = doubles((size_t)rows), *want_lse = doubles((size_t)rows);
    const int32_t *device = block(c, target, (size_t)rows * sizeof *target);
    c->ops->logprob(c->be, out->device, lse->device, logits->device, device, rows, vocab);
    for (int32_t i = 0; i < rows; i++) {
        const float *row = logits->host + (size_t)i * (size_t)vocab;
        want_lse[i] = lse_of(row, vocab);
        want[i] = row[target[i]] - want_lse[i];
    }
    expect(c, "logprob", out, want, 5e-7);
    expect(c, "lse", lse, want_lse, 5e-7);
    free(target), free(want), free(want_lse);
}

/* The gradient's own formula, in float64; `logprob` checks what it is the gradient of. */
static void check_backward(checker *c, int32_t rows, int32_t vocab, bool scaled, bool in_place) {
    begin(c, "logprob_backward", "rows %d, vocab %d%s%s", (int)rows, (int)vocab,
          scaled ? "" : ", dlogprob NULL", in_place ? ", in place" : "");
    int32_t *target = targets(rows, vocab);
    buffer *logits = spread_logits(c, rows, vocab, target), *lse = output(c, (size_t)rows);
    buffer *dlogprob = scaled ? input(c, (size_t)rows) : NULL;
    buffer *dlogits = in_place ? logits : output(c, logits->n);
    double *want = doubles(logits->n);
    for (int32_t i = 0; i < rows; i++) {
        const float *row = logits->host + (size_t)i * (size_t)vocab;
        const double d = scaled ? dlogprob->host[i] : 1;
        lse->host[i] = (float)lse_of(row, vocab);
        for (int32_t j = 0; j < vocab; j++)
            want[i * (size_t)vocab + (size_t)j] = d * ((j == target[i]) - exp(row[j] - (double)lse->host[i]));
    }
    put(c, lse);
    c->ops->logprob_backward(c->be, dlogits->device, logits->device, lse->device,
                             block(c, target, (size_t)rows * sizeof *target),
                             scaled ? dlogprob->device : NULL, rows, vocab);
    expect(c, "dlogits", dlogits, want, 1e-6);
    free(target), free(want);
}

/* d logprob / d logits by differences of the op's own log-sum-exp in float64. */
typedef struct one_row {
    double *x;
    int32_t vocab, target;
} one_row;

static double logprob_of(void *arg) {
    const one_row *r = arg;
    double max = -INFINITY, sum = 0;
    for (int32_t j = 0; j < r->vocab; j++)
        max = fmax(max, r->x[j]);
    for (int32_t j = 0; j < r->vocab; j++)
        sum += exp(r->x[j] - max);
    return r->x[r->target] - max - log(sum);
}

static void check_differences(checker *c) {
    enum { VOCAB = 129 };
    begin(c, "logprob, logprob_backward", "vocab %d", VOCAB);
    const int32_t target = 64;
    buffer *logits = input(c, VOCAB), *out = output(c, 1), *lse = output(c, 1), *dlogits = output(c, VOCAB);
    const int32_t *device = block(c, &target, sizeof target);
    one_row row = {doubles_of(logits->host, VOCAB), VOCAB, target};
    c->ops->logprob(c->be, out->device, lse->device, logits->device, device, 1, VOCAB);
    c->ops->logprob_backward(c->be, dlogits->device, logits->device, lse->device, device, NULL, 1, VOCAB);
    differences(c, "dlogits", dlogits, NULL, row.x, VOCAB, 1, logprob_of, &row, 1e-6);
    free(row.x);
}

void check_loss(checker *c) {
    for (int i = 0; i < RAGGED; i++) {
        check_logprob(c, 5, ragged[i]);
        check_backward(c, 3, ragged[i], i % 2, i % 3 == 0);
    }
    check_logprob(c, 3, 32001);
    check_logprob(c, 2, 32000);
    check_backward(c, 3, 32001, true, false);
    check_backward(c, 2, 32000, false, true);
    check_differences(c);
}
