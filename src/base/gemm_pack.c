/* The matrix product's kernels by instruction set, and B packed ahead of its products. */
#include "base/gemm.h"

#include <string.h>

const psoup__gemm_kernels *psoup__gemm_kernels_of(const psoup_context *context) {
#if defined(__x86_64__)
    if (context->isa == PSOUP__ISA_AVX512)
        return &psoup__gemm_kernels_avx512;
    if (context->isa == PSOUP__ISA_AVX2)
        return &psoup__gemm_kernels_avx2;
#endif
    return &psoup__gemm_kernels_generic;
}

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

struct packing {
    const psoup__gemm_kernels *kernel;
    const psoup__gemm_source *source;
    psoup__gemm_b *out;
};

/* One panel, in the dtype of B: vector after vector, each over all depths, so that who reads one column of vectors
 * reads memory in its order. Panel t lies at t · columns · k. */
static void pack_panel(void *arg, size_t task, int worker) {
    const struct packing *packing = arg;
    const psoup__gemm_source *source = packing->source;
    const int64_t k = packing->out->k, vector = packing->kernel->vector;
    const int64_t first = (int64_t)task * packing->kernel->columns;
    const int64_t end = smaller(first + packing->kernel->columns, packing->out->n);
    enum { RUN = 32 }; /* depths: a cache line of each column where depths are neighbours */
    for (int64_t j0 = first; j0 < end; j0 += vector) {
        const int64_t columns = smaller(vector, end - j0);
        if (source->dtype == PSOUP_F32) {
            packing->kernel->pack_b((float *)packing->out->panels + j0 * k, source, 0, k, j0, columns);
            continue;
        }
        uint16_t *out = (uint16_t *)packing->out->panels + j0 * k; /* zeroed at allocation */
        const char *in = source->b;
        for (int64_t p0 = 0; p0 < k; p0 += RUN)
            for (int64_t j = 0; j < columns; j++)
                for (int64_t p = p0; p < smaller(p0 + RUN, k); p++)
                    memcpy(&out[p * vector + j], in + (p * source->b_row + (j0 + j) * source->b_col) * 2, 2);
    }
}

psoup_status psoup__gemm_pack(psoup_context *context, const void *b, psoup_dtype dtype, int64_t k,
                              int64_t n, int64_t b_row, int64_t b_col, psoup__gemm_b **out,
                              psoup_error *error) {
    const psoup__gemm_kernels *kernel = psoup__gemm_kernels_of(context);
    const psoup__gemm_source source = {b, dtype, b_row, b_col, NULL};
    psoup__gemm_b *packed;
    size_t elements;
    *out = NULL;
    if (dtype != PSOUP_F32 && dtype != PSOUP_F16 && dtype != PSOUP_BF16)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "gemm: dtype of B is %s, expected f32, f16 or bf16",
                           psoup_dtype_name(dtype));
    if (k < 0 || n < 0 || n > INT64_MAX - kernel->columns)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "gemm: B is %lld × %lld, expected sizes of at least 0", (long long)k,
                           (long long)n);
    if (!psoup__multiply((size_t)(n + kernel->vector - 1) / kernel->vector * kernel->vector, (size_t)k, &elements))
        return psoup__out_of_memory(error, SIZE_MAX);
    packed = psoup__alloc(context, 1, sizeof *packed, error);
    if (packed == NULL)
        return PSOUP_ERROR_MEMORY;
    *packed = (psoup__gemm_b){.dtype = dtype, .k = k, .n = n};
    packed->panels = psoup__alloc(context, elements, psoup_dtype_size(dtype), error);
    if (packed->panels == NULL) {
        psoup__free(context, packed);
        return PSOUP_ERROR_MEMORY;
    }
    if (elements > 0)
        psoup__parallel(context, (size_t)((n + kernel->columns - 1) / kernel->columns), pack_panel,
                        &(struct packing){kernel, &source, packed});
    *out = packed;
    return PSOUP_OK;
}

size_t psoup__gemm_pack_bytes(const psoup_context *context, psoup_dtype dtype, int64_t k, int64_t n) {
    const int64_t vector = psoup__gemm_kernels_of(context)->vector;
    return sizeof(psoup__gemm_b) + (size_t)((n + vector - 1) / vector * vector) * (size_t)k * psoup_dtype_size(dtype);
}

void psoup__gemm_b_free(psoup_context *context, psoup__gemm_b *packed) {
    if (packed == NULL)
        return;
    psoup__free(context, packed->panels);
    psoup__free(context, packed);
}
