/* embed_engine: an inference engine of one screen that owns its weights, and gives each user a soup of
 * its adapters in place. It needs libpsoup-merge alone. See docs/embedding.md.
 *
 *     cc embed_engine.c $(pkg-config --cflags --static --libs psoup-merge)
 */
#include <math.h>
#include <psoup/merge.h>
#include <stdio.h>
#include <stdlib.h>

enum { OUT = 96, IN = 64, RANK = 4, ADAPTERS = 3 };

typedef struct engine { /* one linear, y = W x, whose W changes from user to user */
    float base[OUT * IN], live[OUT * IN];
    float a[ADAPTERS][RANK * IN], b[ADAPTERS][OUT * RANK];
    psoup_lora_factors adapters[ADAPTERS];
    psoup_context *context;
} engine;

static void fill(float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
}

/* Always from the pristine base: what one user had is no matter for the next. */
static int serve(engine *e, const double weights[ADAPTERS]) {
    psoup_error error = {0};
    if (psoup_merge_fold(e->context, e->live, e->base, PSOUP_F32, OUT, IN, e->adapters, weights, ADAPTERS,
                         &error) == PSOUP_OK)
        return 0;
    fprintf(stderr, "%s\n", error.message);
    return 1;
}

static double apply(const float *w, const float *x, size_t columns, size_t row) {
    double y = 0;
    for (size_t i = 0; i < columns; i++)
        y += (double)w[row * columns + i] * x[i];
    return y;
}

int main(void) {
    engine *e = calloc(1, sizeof *e);
    const double users[][ADAPTERS] = {{0.5, 0.5, 0}, {0.1, 0.2, 0.7}, {1, 0, 0}};
    float x[IN], ax[RANK];
    double worst = 0;
    if (e == NULL || psoup_context_create(NULL, &e->context, NULL) != PSOUP_OK)
        return 1;
    fill(e->base, OUT * IN);
    fill(x, IN);
    for (size_t i = 0; i < ADAPTERS; i++) {
        fill(e->a[i], RANK * IN);
        fill(e->b[i], OUT * RANK);
        e->adapters[i] = (psoup_lora_factors){.a = e->a[i], .b = e->b[i], .rank = RANK, .scale = 2.0f};
    }
    for (size_t u = 0; u < sizeof users / sizeof *users; u++) {
        if (serve(e, users[u]) != 0)
            return 1;
        for (size_t row = 0; row < OUT; row++) { /* what the user should see: W x + Σ w_i s_i B_i (A_i x) */
            double expected = apply(e->base, x, IN, row);
            for (size_t i = 0; i < ADAPTERS; i++) {
                for (size_t k = 0; k < RANK; k++)
                    ax[k] = (float)apply(e->a[i], x, IN, k);
                expected += users[u][i] * 2.0 * apply(e->b[i], ax, RANK, row);
            }
            worst = fmax(worst, fabs(apply(e->live, x, IN, row) - expected));
        }
        printf("user %zu: y[0] = %.6f\n", u, apply(e->live, x, IN, 0));
    }
    printf("largest difference from the sum of the adapters: %.1e\n", worst);
    psoup_context_free(e->context);
    free(e);
    return worst < 1e-4 ? 0 : 1;
}
