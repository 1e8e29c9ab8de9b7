/* What stands between the linear layers. */
#include "checkops.h"

static void check_rmsnorm(checker *c, int32_t rows, int32_t width) {
    begin(c, "rmsnorm", "rows %d, width %d", (int)rows, (int)width);
    const size_t n = (size_t)rows * (size_t)width;
    buffer *x = input(c, n), *weight = input(c, (size_t)width), *out = output(c, n);
    buffer *rstd = output(c, (size_t)rows);
    c->ops->rmsnorm(c->be, out->device, rstd->device, x->device, weight->device, 1e-5f, rows, width);
    double *want = doubles(n), *rstd_want = doubles((size_t)rows);
    for (int32_t i = 0; i < rows; i++) {
        double sum = 0;
        for (int32_t j = 0; j < width; j++)
            sum += (double)x->host[i * width + j] * x->host[i * width + j];
        rstd_want[i] = 1 / sqrt(sum / width + 1e-5);
        for (int32_t j = 0; j < width; j++)
            want[i * width + j] = x->host[i * width + j] * rstd_want[i] * weight->host[j];
    }
    expect(c, "out", out, want, 1e-6);
    expect(c, "rstd", rstd, rstd_want, 1e-6);
    free(want), free(rstd_want);
}

static void check_add(checker *c, size_t n) {
    begin(c, "add", "n %zu", n);
    buffer *x = input(c, n), *y = input(c, n);
    double *want = doubles_of(x->host, n);
    for (size_t i = 0; i < n; i++)
        want[i] += y->host[i];
    c->ops->add(c->be, x->device, y->device, n);
    expect(c, "x", x, want, 1e-7);
    free(want);
}

void check_layer(checker *c) {
    for (int i = 0; i < RAGGED; i++) {
        check_rmsnorm(c, 5, ragged[i]);
        check_add(c, (size_t)ragged[i] * 37);
    }
}
