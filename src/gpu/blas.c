/* Plain products by cuBLASLt: a plan for each shape, made once.
 *
 * cuBLASLt counts columns first. What is row-major [m, n] here is column-major [n, m] there, so the product is
 * asked for transposed: Cᵀ = Bᵀ Aᵀ, with B as its first operand. */
#include "gpu/blas.h"

#include <dlfcn.h>
#include <string.h>

#include "gpu/internal.h"

enum { /* cublasLt.h, library_types.h, cublas_api.h */
    COMPUTE_F32 = 68,          /* CUBLAS_COMPUTE_32F */
    REAL_F32 = 0,              /* CUDA_R_32F */
    REAL_F16 = 2,              /* CUDA_R_16F */
    REAL_BF16 = 14,            /* CUDA_R_16BF */
    SET_TRANSPOSE_A = 3,       /* CUBLASLT_MATMUL_DESC_TRANSA */
    SET_TRANSPOSE_B = 4,       /* CUBLASLT_MATMUL_DESC_TRANSB */
    PREFER_ROOM = 1,           /* CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES */
    PREFER_ALIGNMENT_A = 5,    /* CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, then B, C, D */
    NOT_SUPPORTED = 15         /* CUBLAS_STATUS_NOT_SUPPORTED */
};

typedef struct answer { /* cublasLtMatmulHeuristicResult_t */
    uint64_t algorithm[8];
    size_t room;
    int status;
    float waves;
    int reserved[4];
} answer;

static bool find(psoup__blas *blas, const char *symbol, void *call) {
    void *address = dlsym(blas->library, symbol);
    memcpy(call, &address, sizeof address);
    return address != NULL;
}

static bool find_all(psoup__blas *blas) {
    psoup__blas_calls *call = &blas->call;
    return find(blas, "cublasLtCreate", &call->create) && find(blas, "cublasLtDestroy", &call->destroy) &&
           find(blas, "cublasLtMatmulDescCreate", &call->operation_create) &&
           find(blas, "cublasLtMatmulDescDestroy", &call->operation_destroy) &&
           find(blas, "cublasLtMatmulDescSetAttribute", &call->operation_set) &&
           find(blas, "cublasLtMatrixLayoutCreate", &call->layout_create) &&
           find(blas, "cublasLtMatrixLayoutDestroy", &call->layout_destroy) &&
           find(blas, "cublasLtMatmulPreferenceCreate", &call->preference_create) &&
           find(blas, "cublasLtMatmulPreferenceDestroy", &call->preference_destroy) &&
           find(blas, "cublasLtMatmulPreferenceSetAttribute", &call->preference_set) &&
           find(blas, "cublasLtMatmulAlgoGetHeuristic", &call->heuristic) &&
           find(blas, "cublasLtMatmul", &call->matmul);
}

psoup_status psoup__blas_open(psoup__gpu *gpu, psoup_error *error) {
    static const char *const versions[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
    psoup__blas *blas = &gpu->blas;
    for (size_t i = 0; i < sizeof versions / sizeof *versions && !blas->library; i++)
        blas->library = dlopen(versions[i], RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!blas->library)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "no GPU: cuBLASLt is not here (%s); install libcublas of CUDA 12 or 13", dlerror());
    if (!find_all(blas))
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "no GPU: libcublasLt lacks a call; one of CUDA 12 or 13 is needed");
    int result = blas->call.create(&blas->handle);
    if (result != 0)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED, "no GPU: cuBLASLt does not start (status %d)",
                           result);
    psoup__cu_result allocated = gpu->driver.alloc(&blas->room, PSOUP__BLAS_ROOM);
    return allocated == 0 ? PSOUP_OK : psoup__gpu_fail(gpu, allocated, "cuBLASLt's workspace", error);
}

static void drop(psoup__blas *blas, psoup__blas_plan *plan) {
    void *layouts[] = {plan->a, plan->b, plan->c};
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++)
        if (layouts[i])
            blas->call.layout_destroy(layouts[i]);
    if (plan->operation)
        blas->call.operation_destroy(plan->operation);
    *plan = (psoup__blas_plan){.used = 0};
}

void psoup__blas_close(psoup__gpu *gpu) {
    psoup__blas *blas = &gpu->blas;
    for (size_t i = 0; blas->handle && i < PSOUP__BLAS_PLANS; i++)
        drop(blas, &blas->plans[i]);
    if (blas->handle)
        blas->call.destroy(blas->handle);
    if (blas->room)
        gpu->driver.release(blas->room);
    if (blas->library)
        dlclose(blas->library);
    *blas = (psoup__blas){.library = NULL};
}

/* ---- plans -------------------------------------------------------------------------------------------- */

static int type_of(psoup_dtype dtype) {
    return dtype == PSOUP_F16 ? REAL_F16 : dtype == PSOUP_BF16 ? REAL_BF16 : REAL_F32;
}

/* What all three addresses are multiples of, up to 256, the most that any algorithm asks. */
static uint32_t alignment_of(const float *c, const void *a, const void *b) {
    uintptr_t bits = (uintptr_t)a | (uintptr_t)b | (uintptr_t)c | 256;
    return (uint32_t)(bits & (~bits + 1));
}

static int ask(psoup__blas *blas, psoup__blas_plan *plan) {
    void *preference = NULL;
    int result = blas->call.preference_create(&preference), found = 0;
    answer best;
    uint64_t room = PSOUP__BLAS_ROOM;
    if (result == 0)
        result = blas->call.preference_set(preference, PREFER_ROOM, &room, sizeof room);
    for (int i = 0; result == 0 && i < 4; i++)
        result = blas->call.preference_set(preference, PREFER_ALIGNMENT_A + i, &plan->alignment,
                                           sizeof plan->alignment);
    if (result == 0)
        result = blas->call.heuristic(blas->handle, plan->operation, plan->a, plan->b, plan->c, plan->c,
                                      preference, 1, &best, &found);
    if (result == 0 && (found < 1 || best.status != 0))
        result = NOT_SUPPORTED;
    if (result == 0)
        memcpy(plan->algorithm, best.algorithm, sizeof plan->algorithm);
    if (preference)
        blas->call.preference_destroy(preference);
    return result;
}

static int lay_out(psoup__blas *blas, void **layout, int type, bool transposed, int32_t rows, int32_t columns,
                   int64_t ld) {
    return blas->call.layout_create(layout, type, (uint64_t)(transposed ? columns : rows),
                                    (uint64_t)(transposed ? rows : columns), ld);
}

static int make(psoup__blas *blas, psoup__blas_plan *plan) {
    const psoup__product *p = &plan->product;
    int32_t first = p->transpose_b, second = p->transpose_a;
    int type = type_of(p->dtype), result = blas->call.operation_create(&plan->operation, COMPUTE_F32, REAL_F32);
    if (result == 0)
        result = blas->call.operation_set(plan->operation, SET_TRANSPOSE_A, &first, sizeof first);
    if (result == 0)
        result = blas->call.operation_set(plan->operation, SET_TRANSPOSE_B, &second, sizeof second);
    if (result == 0)
        result = lay_out(blas, &plan->a, type, p->transpose_b, p->n, p->k, p->ldb);
    if (result == 0)
        result = lay_out(blas, &plan->b, type, p->transpose_a, p->k, p->m, p->lda);
    if (result == 0)
        result = lay_out(blas, &plan->c, REAL_F32, false, p->n, p->m, p->ldc);
    return result == 0 ? ask(blas, plan) : result;
}

static bool same(const psoup__product *a, const psoup__product *b) {
    return a->m == b->m && a->n == b->n && a->k == b->k && a->dtype == b->dtype &&
           a->transpose_a == b->transpose_a && a->transpose_b == b->transpose_b && a->lda == b->lda &&
           a->ldb == b->ldb && a->ldc == b->ldc;
}

static size_t hash_of(const psoup__product *p, uint32_t alignment) {
    uint64_t parts[] = {(uint64_t)p->m, (uint64_t)p->n, (uint64_t)p->k, (uint64_t)p->lda, (uint64_t)p->ldb,
                        (uint64_t)p->ldc, alignment,
                        (uint64_t)p->dtype * 4 + (uint64_t)p->transpose_a * 2 + (uint64_t)p->transpose_b};
    uint64_t hash = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        hash = (hash ^ parts[i]) * 0x9e3779b97f4a7c15u; /* Fibonacci hashing (Knuth, TAOCP 3, 6.4) */
    return hash >> 32;
}

/* The plan that is kept, or else, dropped, the one that was not used for longest. */
static psoup__blas_plan *plan_of(psoup__blas *blas, const psoup__product *product, uint32_t alignment) {
    const size_t sets = PSOUP__BLAS_PLANS / PSOUP__BLAS_WAYS;
    psoup__blas_plan *places = &blas->plans[hash_of(product, alignment) % sets * PSOUP__BLAS_WAYS], *oldest = places;
    for (int i = 0; i < PSOUP__BLAS_WAYS; i++) {
        psoup__blas_plan *plan = &places[i];
        if (plan->used && plan->alignment == alignment && same(&plan->product, product))
            return plan;
        if (plan->used < oldest->used)
            oldest = plan;
    }
    drop(blas, oldest);
    return oldest;
}

void psoup__blas_run(psoup__gpu *gpu, const psoup__product *product, float *c, const void *a, const void *b) {
    psoup__blas *blas = &gpu->blas;
    if (gpu->failed.status != PSOUP_OK || product->m == 0 || product->n == 0)
        return;
    if (psoup__record_product(gpu, product, c, a, b) || !psoup__gpu_enter(gpu))
        return;
    uint32_t alignment = alignment_of(c, a, b);
    psoup__blas_plan *plan = plan_of(blas, product, alignment);
    int result = 0;
    if (!plan->used) {
        plan->product = *product;
        plan->alignment = alignment;
        result = make(blas, plan);
    }
    plan->used = ++blas->clock;
    if (result == 0)
        result = blas->call.matmul(blas->handle, plan->operation, &product->alpha, b, plan->a, a, plan->b,
                                   &product->beta, c, plan->c, c, plan->c, plan->algorithm,
                                   (void *)(uintptr_t)blas->room, PSOUP__BLAS_ROOM, gpu->stream);
    if (result == 0)
        return;
    drop(blas, plan);
    psoup__fail(&gpu->failed, PSOUP_ERROR_UNSUPPORTED,
                "cuBLASLt refuses the product [%d, %d] · [%d, %d] of %s (status %d)", (int)product->m,
                (int)product->k, (int)product->k, (int)product->n, psoup_dtype_name(product->dtype), result);
}
