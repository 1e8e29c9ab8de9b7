/* src/gpu/blas.h: plain matrix products, by cuBLASLt, which is opened at run time. Types and values are those
 * of cublasLt.h (12 and later); tests/driver_header.c compares the two where it is installed.
 */
#ifndef PSOUP__BLAS_H
#define PSOUP__BLAS_H

#include "gpu/driver.h"

/* C[m, n] = alpha · A[m, k] · B[k, n] + beta · C, row-major, each row `ld` elements after the last. A transposed
 * operand is stored as [k, m], or [n, k]. A and B have one dtype, C is f32. */
typedef struct psoup__product {
    int32_t m, n, k;
    psoup_dtype dtype; /* of A and B: F32, F16, BF16; sums are f32 */
    bool transpose_a, transpose_b;
    int64_t lda, ldb, ldc;
    float alpha, beta;
} psoup__product;

enum { PSOUP__BLAS_PLANS = 256, PSOUP__BLAS_WAYS = 8, PSOUP__BLAS_ROOM = 32 << 20 };

typedef struct psoup__blas_plan {
    psoup__product product; /* alpha and beta do not count */
    uint32_t alignment;     /* of all three addresses */
    void *operation, *a, *b, *c; /* cublasLtMatmulDesc_t, cublasLtMatrixLayout_t */
    uint64_t algorithm[8];       /* cublasLtMatmulAlgo_t */
    uint64_t used; /* when last; 0: never */
} psoup__blas_plan;

typedef struct psoup__blas_calls {
    int (*create)(void **handle);
    int (*destroy)(void *handle);
    int (*operation_create)(void **operation, int compute, int scale);
    int (*operation_destroy)(void *operation);
    int (*operation_set)(void *operation, int attribute, const void *value, size_t bytes);
    int (*layout_create)(void **layout, int type, uint64_t rows, uint64_t columns, int64_t ld);
    int (*layout_destroy)(void *layout);
    int (*preference_create)(void **preference);
    int (*preference_destroy)(void *preference);
    int (*preference_set)(void *preference, int attribute, const void *value, size_t bytes);
    int (*heuristic)(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                     int asked, void *results, int *found);
    int (*matmul)(void *handle, void *operation, const void *alpha, const void *a, void *a_layout,
                  const void *b, void *b_layout, const void *beta, const void *c, void *c_layout, void *d,
                  void *d_layout, const void *algorithm, void *room, size_t room_bytes,
                  psoup__cu_stream stream);
} psoup__blas_calls;

typedef struct psoup__blas {
    void *library, *handle;
    psoup__blas_calls call;
    psoup__cu_pointer room; /* PSOUP__BLAS_ROOM bytes of workspace */
    psoup__blas_plan plans[PSOUP__BLAS_PLANS]; /* each in one of the WAYS places that its hash says */
    uint64_t clock;
} psoup__blas;

struct psoup__gpu;
psoup_status psoup__blas_open(struct psoup__gpu *gpu, psoup_error *error);
void psoup__blas_close(struct psoup__gpu *gpu);
/* Puts a product into the stream. */
void psoup__blas_run(struct psoup__gpu *gpu, const psoup__product *product, float *c, const void *a,
                     const void *b);

#endif
