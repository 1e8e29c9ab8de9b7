/* Compiled, not run, where CUDA's headers are: what src/gpu/driver.h, blas.h and blas.c wrote down from them
 * is what they say. A difference does not compile. */
#include <cublasLt.h>
#include <cuda.h>

#include "gpu/blas.c"

#define SAME(ours, theirs) _Static_assert((long long)(ours) == (long long)(theirs), #theirs)

/* ---- the driver: every call has the very type that it is called by ---------------------------------- */

#define TYPE(field, symbol, parameters)                                                                    \
    psoup__cu_result(*const psoup__type_of_##field) parameters = symbol;
PSOUP__CU_CALLS(TYPE)

SAME(PSOUP__CU_OUT_OF_MEMORY, CUDA_ERROR_OUT_OF_MEMORY);
SAME(PSOUP__CU_NOT_READY, CUDA_ERROR_NOT_READY);
SAME(PSOUP__CU_MULTIPROCESSORS, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
SAME(PSOUP__CU_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME(PSOUP__CU_CAPABILITY_MINOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME(PSOUP__CU_SHARED_MEMORY, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
SAME(PSOUP__CU_FUNCTION_DYNAMIC_SHARED, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
SAME(PSOUP__CU_STREAM_NON_BLOCKING, CU_STREAM_NON_BLOCKING);
SAME(PSOUP__CU_EVENT_NO_TIMING, CU_EVENT_DISABLE_TIMING);
SAME(PSOUP__CU_CAPTURE_RELAXED, CU_STREAM_CAPTURE_MODE_RELAXED);
SAME(PSOUP__CU_ON_HOST, CU_MEMORYTYPE_HOST);
SAME(PSOUP__CU_ON_DEVICE, CU_MEMORYTYPE_DEVICE);
SAME(CUDA_SUCCESS, 0);

#define FIELD(ours, theirs) SAME(offsetof(psoup__cu_copy_2d, ours), offsetof(CUDA_MEMCPY2D, theirs))
FIELD(in.x, srcXInBytes);
FIELD(in.y, srcY);
FIELD(in.place, srcMemoryType);
FIELD(in.host, srcHost);
FIELD(in.device, srcDevice);
FIELD(in.array, srcArray);
FIELD(in.pitch, srcPitch);
FIELD(out.x, dstXInBytes);
FIELD(out.y, dstY);
FIELD(out.place, dstMemoryType);
FIELD(out.host, dstHost);
FIELD(out.device, dstDevice);
FIELD(out.array, dstArray);
FIELD(out.pitch, dstPitch);
FIELD(width, WidthInBytes);
FIELD(height, Height);
SAME(sizeof(psoup__cu_copy_2d), sizeof(CUDA_MEMCPY2D));

/* ---- cuBLASLt: its handles are pointers to structs that we hold as void *, its enums are our ints ----- */

SAME(COMPUTE_F32, CUBLAS_COMPUTE_32F);
SAME(REAL_F32, CUDA_R_32F);
SAME(REAL_F16, CUDA_R_16F);
SAME(REAL_BF16, CUDA_R_16BF);
SAME(SET_TRANSPOSE_A, CUBLASLT_MATMUL_DESC_TRANSA);
SAME(SET_TRANSPOSE_B, CUBLASLT_MATMUL_DESC_TRANSB);
SAME(PREFER_ROOM, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
SAME(PREFER_ALIGNMENT_A, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
SAME(PREFER_ALIGNMENT_A + 1, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
SAME(PREFER_ALIGNMENT_A + 2, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
SAME(PREFER_ALIGNMENT_A + 3, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
SAME(NOT_SUPPORTED, CUBLAS_STATUS_NOT_SUPPORTED);
SAME(CUBLAS_STATUS_SUCCESS, 0);
SAME(CUBLAS_OP_N, 0); /* an operation's `transpose` is 0 or 1 */
SAME(CUBLAS_OP_T, 1);

SAME(sizeof(answer), sizeof(cublasLtMatmulHeuristicResult_t));
SAME(offsetof(answer, algorithm), offsetof(cublasLtMatmulHeuristicResult_t, algo));
SAME(offsetof(answer, room), offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
SAME(offsetof(answer, status), offsetof(cublasLtMatmulHeuristicResult_t, state));
SAME(offsetof(answer, waves), offsetof(cublasLtMatmulHeuristicResult_t, wavesCount));
SAME(sizeof(((answer *)0)->algorithm), sizeof(cublasLtMatmulAlgo_t));
SAME(sizeof(((psoup__blas_plan *)0)->algorithm), sizeof(cublasLtMatmulAlgo_t));

/* An int is passed and returned as these are. */
SAME(sizeof(int), sizeof(cublasStatus_t));
SAME(sizeof(int), sizeof(cublasComputeType_t));
SAME(sizeof(int), sizeof(cudaDataType_t));
SAME(sizeof(int), sizeof(cublasOperation_t));
SAME(sizeof(int), sizeof(cublasLtMatmulDescAttributes_t));
SAME(sizeof(int), sizeof(cublasLtMatmulPreferenceAttributes_t));

/* Each call through our types: the parameters are as many, in this order, and of these kinds. */
static int create(void **handle) {
    return cublasLtCreate((cublasLtHandle_t *)handle);
}
static int destroy(void *handle) {
    return cublasLtDestroy(handle);
}
static int operation_create(void **operation, int compute, int scale) {
    return cublasLtMatmulDescCreate((cublasLtMatmulDesc_t *)operation, compute, scale);
}
static int operation_destroy(void *operation) {
    return cublasLtMatmulDescDestroy(operation);
}
static int operation_set(void *operation, int attribute, const void *value, size_t bytes) {
    return cublasLtMatmulDescSetAttribute(operation, attribute, value, bytes);
}
static int layout_create(void **layout, int type, uint64_t rows, uint64_t columns, int64_t ld) {
    return cublasLtMatrixLayoutCreate((cublasLtMatrixLayout_t *)layout, type, rows, columns, ld);
}
static int layout_destroy(void *layout) {
    return cublasLtMatrixLayoutDestroy(layout);
}
static int preference_create(void **preference) {
    return cublasLtMatmulPreferenceCreate((cublasLtMatmulPreference_t *)preference);
}
static int preference_destroy(void *preference) {
    return cublasLtMatmulPreferenceDestroy(preference);
}
static int preference_set(void *preference, int attribute, const void *value, size_t bytes) {
    return cublasLtMatmulPreferenceSetAttribute(preference, attribute, value, bytes);
}
static int heuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                     int asked, void *results, int *found) {
    return cublasLtMatmulAlgoGetHeuristic(handle, operation, a, b, c, d, preference, asked, results, found);
}
static int matmul(void *handle, void *operation, const void *alpha, const void *a, void *a_layout,
                  const void *b, void *b_layout, const void *beta, const void *c, void *c_layout, void *d,
                  void *d_layout, const void *algorithm, void *room, size_t room_bytes,
                  psoup__cu_stream stream) {
    return cublasLtMatmul(handle, operation, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout,
                          algorithm, room, room_bytes, stream);
}
const psoup__blas_calls psoup__type_of_blas = {
    create, destroy, operation_create, operation_destroy, operation_set, layout_create, layout_destroy,
    preference_create, preference_destroy, preference_set, heuristic, matmul};

/* ---- NCCL, where its header is too: its types are pointers and enums that we hold as void * and int ------ */

#if __has_include(<nccl.h>)
#include <nccl.h>

#include "gpu/nccl.h"

SAME(PSOUP__NCCL_SUCCESS, ncclSuccess);
SAME(PSOUP__NCCL_IN_PROGRESS, ncclInProgress);
SAME(PSOUP__NCCL_F32, ncclFloat32);
SAME(PSOUP__NCCL_SUM, ncclSum);
SAME(sizeof(psoup__nccl_id), sizeof(ncclUniqueId));
SAME(offsetof(psoup__nccl_config, magic), offsetof(ncclConfig_t, magic));
SAME(offsetof(psoup__nccl_config, version), offsetof(ncclConfig_t, version));
SAME(offsetof(psoup__nccl_config, blocking), offsetof(ncclConfig_t, blocking));
SAME(offsetof(psoup__nccl_config, unset), offsetof(ncclConfig_t, cgaClusterSize));
SAME(INT_MIN, NCCL_CONFIG_UNDEF_INT);
#endif
