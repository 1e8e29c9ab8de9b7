/* Inner loops of the small dense problems, compiled once per instruction set. */
#include "blend/dense.h"

#include <string.h>

/* Sums run in eight lanes, which are PARTS of the machine's vectors. */
#define LANES 8
#if defined(__AVX512F__)
#define WIDTH 8
#elif defined(__AVX__)
#define WIDTH 4
#else
#define WIDTH 2
#endif
#define PARTS (LANES / WIDTH)
typedef double vec __attribute__((vector_size(8 * WIDTH), aligned(8), may_alias));
#define AT(x) (*(const vec *)(x))

/* What is left after whole lanes, filled with zeros. */
static void rest(double out[LANES], const double *x, size_t n) {
    memset(out, 0, LANES * sizeof *out);
    memcpy(out, x, n * sizeof *out);
}

static double sum(const vec part[PARTS]) {
    double lane[LANES];
    memcpy(lane, part, sizeof lane);
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) +
           ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

static double dot(const double *x, const double *y, size_t n) {
    vec even[PARTS] = {{0}}, odd[PARTS] = {{0}};
    double last[2][LANES];
    size_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (int p = 0; p < PARTS; p++) {
            even[p] += AT(x + i + WIDTH * p) * AT(y + i + WIDTH * p);
            odd[p] += AT(x + i + LANES + WIDTH * p) * AT(y + i + LANES + WIDTH * p);
        }
    for (; i < n; i += LANES) {
        rest(last[0], x + i, n - i < LANES ? n - i : LANES);
        rest(last[1], y + i, n - i < LANES ? n - i : LANES);
        for (int p = 0; p < PARTS; p++)
            even[p] += AT(last[0] + WIDTH * p) * AT(last[1] + WIDTH * p);
    }
    for (int p = 0; p < PARTS; p++)
        even[p] += odd[p];
    return sum(even);
}

static void reflect_one(double *x, const double *v, double tau, size_t n) {
    vec a[PARTS] = {{0}};
    double last[2][LANES];
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int p = 0; p < PARTS; p++)
            a[p] += AT(v + i + WIDTH * p) * AT(x + i + WIDTH * p);
    rest(last[0], v + i, n - i);
    rest(last[1], x + i, n - i);
    for (int p = 0; p < PARTS; p++)
        a[p] += AT(last[0] + WIDTH * p) * AT(last[1] + WIDTH * p);
    double w = tau * sum(a);
    for (i = 0; i < n; i++)
        x[i] -= w * v[i];
}

/* The same for four at a time, each with the bits that reflect_one gives it. */
static void reflect_four(double *x, size_t stride, const double *v, double tau, size_t n) {
    vec a[PARTS] = {{0}}, b[PARTS] = {{0}}, c[PARTS] = {{0}}, d[PARTS] = {{0}};
    double *xa = x, *xb = x + stride, *xc = xb + stride, *xd = xc + stride, last[5][LANES];
    const size_t most = n / LANES * LANES;
    for (size_t i = 0; i < most; i += LANES)
        for (int p = 0; p < PARTS; p++) {
            const size_t at = i + (size_t)(WIDTH * p);
            const vec u = AT(v + at);
            a[p] += u * AT(xa + at);
            b[p] += u * AT(xb + at);
            c[p] += u * AT(xc + at);
            d[p] += u * AT(xd + at);
        }
    rest(last[0], v + most, n - most);
    for (size_t k = 0; k < 4; k++)
        rest(last[k + 1], x + k * stride + most, n - most);
    for (int p = 0; p < PARTS; p++) {
        const vec u = AT(last[0] + WIDTH * p);
        a[p] += u * AT(last[1] + WIDTH * p);
        b[p] += u * AT(last[2] + WIDTH * p);
        c[p] += u * AT(last[3] + WIDTH * p);
        d[p] += u * AT(last[4] + WIDTH * p);
    }
    const double wa = tau * sum(a), wb = tau * sum(b), wc = tau * sum(c), wd = tau * sum(d);
    for (size_t i = 0; i < most; i += WIDTH) {
        const vec u = AT(v + i);
        *(vec *)(xa + i) -= wa * u;
        *(vec *)(xb + i) -= wb * u;
        *(vec *)(xc + i) -= wc * u;
        *(vec *)(xd + i) -= wd * u;
    }
    for (size_t i = most; i < n; i++) {
        xa[i] -= wa * v[i];
        xb[i] -= wb * v[i];
        xc[i] -= wc * v[i];
        xd[i] -= wd * v[i];
    }
}

static void reflect(double *x, size_t stride, size_t columns, const double *v, double tau,
                    size_t n) {
    size_t c = 0;
    for (; c + 4 <= columns; c += 4)
        reflect_four(x + c * stride, stride, v, tau, n);
    for (; c < columns; c++)
        reflect_one(x + c * stride, v, tau, n);
}

static void rotate(double *p, double *q, double c, double s, size_t n) {
    for (size_t i = 0; i < n; i++) {
        double a = p[i], b = q[i];
        p[i] = c * a - s * b;
        q[i] = s * a + c * b;
    }
}

const psoup__dense_kernels PSOUP__NAME(psoup__dense_kernels) = {
    .dot = dot, .reflect = reflect, .rotate = rotate};
