/* The methods' inner loops, compiled once per instruction set; plain loops that compilers vectorise. */
#include "merge/methods.h"

static void subtract(float *x, const float *y, size_t n) {
    for (size_t i = 0; i < n; i++)
        x[i] -= y[i];
}

static void finish(float *out, const float *base, const float *x, float s, size_t n) {
    if (base == NULL)
        for (size_t i = 0; i < n; i++)
            out[i] = s * x[i];
    else
        for (size_t i = 0; i < n; i++)
            out[i] = base[i] + s * x[i];
}

static void mix(float *out, const float *x, const float *y, float a, float b, size_t n) {
    for (size_t i = 0; i < n; i++)
        out[i] = a * x[i] + b * y[i];
}

#define LANES 16

static double sum_lanes(const double *lane) {
    double sum = 0;
    for (int k = 0; k < LANES; k++)
        sum += lane[k];
    return sum;
}

static double dot(const float *x, const float *y, size_t n) {
    double lane[LANES] = {0};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++)
            lane[k] += (double)x[i + k] * (double)y[i + k];
    for (; i < n; i++)
        lane[i % LANES] += (double)x[i] * (double)y[i];
    return sum_lanes(lane);
}

const psoup__method_kernels PSOUP__NAME(psoup__method_kernels) = {
    .add = PSOUP__NAME(psoup__merge_add), .subtract = subtract, .finish = finish, .mix = mix, .dot = dot,
};
