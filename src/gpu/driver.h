/* src/gpu/driver.h: the calls of NVIDIA's driver that src/gpu uses, opened at run time: a program that
 * links libpsoup needs no CUDA to build, nor to start. Types and values are those of the driver's own
 * interface (cuda.h, 12 and later), written down here so that it need not be installed;
 * tests/driver_header.c compares the two where it is.
 */
#ifndef PSOUP__DRIVER_H
#define PSOUP__DRIVER_H

#include <stddef.h>

#include "base/base.h"

typedef unsigned psoup__cu_result; /* CUresult, and other enums as compilers hold them; 0 is success */
typedef int psoup__cu_device;
typedef unsigned long long psoup__cu_pointer; /* CUdeviceptr */
typedef struct CUctx_st *psoup__cu_context;
typedef struct CUmod_st *psoup__cu_module;
typedef struct CUfunc_st *psoup__cu_function;
typedef struct CUstream_st *psoup__cu_stream;
typedef struct CUevent_st *psoup__cu_event;
typedef struct CUgraph_st *psoup__cu_graph;
typedef struct CUgraphExec_st *psoup__cu_graph_exec;

enum {
    PSOUP__CU_OUT_OF_MEMORY = 2,               /* CUDA_ERROR_OUT_OF_MEMORY */
    PSOUP__CU_NOT_READY = 600,                 /* CUDA_ERROR_NOT_READY */
    PSOUP__CU_MULTIPROCESSORS = 16,            /* CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT */
    PSOUP__CU_CAPABILITY_MAJOR = 75,           /* CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR */
    PSOUP__CU_CAPABILITY_MINOR = 76,
    PSOUP__CU_SHARED_MEMORY = 97,              /* CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */
    PSOUP__CU_FUNCTION_DYNAMIC_SHARED = 8,     /* CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES */
    PSOUP__CU_STREAM_NON_BLOCKING = 1,         /* CU_STREAM_NON_BLOCKING */
    PSOUP__CU_EVENT_NO_TIMING = 2,             /* CU_EVENT_DISABLE_TIMING */
    PSOUP__CU_CAPTURE_RELAXED = 2,             /* CU_STREAM_CAPTURE_MODE_RELAXED */
    PSOUP__CU_ON_HOST = 1,                     /* CU_MEMORYTYPE_HOST */
    PSOUP__CU_ON_DEVICE = 2                    /* CU_MEMORYTYPE_DEVICE */
};

/* struct CUDA_MEMCPY2D_st: one end of it, and the whole. Sizes are in bytes. */
struct CUDA_MEMCPY2D_st;
typedef struct psoup__cu_plane {
    size_t x, y;
    int place; /* PSOUP__CU_ON_… */
    void *host;
    psoup__cu_pointer device;
    void *array;
    size_t pitch;
} psoup__cu_plane;
typedef struct psoup__cu_copy_2d {
    psoup__cu_plane in, out;
    size_t width, height;
} psoup__cu_copy_2d;

/* X(what it is called here, the symbol, its parameters) */
#define PSOUP__CU_CALLS(X)                                                                                 \
    X(init, cuInit, (unsigned flags))                                                                      \
    X(error_string, cuGetErrorString, (psoup__cu_result error, const char **text))                         \
    X(driver_version, cuDriverGetVersion, (int *version))                                                  \
    X(device_count, cuDeviceGetCount, (int *count))                                                        \
    X(device_get, cuDeviceGet, (psoup__cu_device * device, int ordinal))                                   \
    X(device_name, cuDeviceGetName, (char *name, int length, psoup__cu_device device))                     \
    X(device_attribute, cuDeviceGetAttribute, (int *value, unsigned attribute, psoup__cu_device device))   \
    X(context_retain, cuDevicePrimaryCtxRetain, (psoup__cu_context * context, psoup__cu_device device))    \
    X(context_release, cuDevicePrimaryCtxRelease_v2, (psoup__cu_device device))                            \
    X(context_set, cuCtxSetCurrent, (psoup__cu_context context))                                           \
    X(context_get, cuCtxGetCurrent, (psoup__cu_context * context))                                         \
    X(context_wait, cuCtxSynchronize, (void))                                                              \
    X(memory_info, cuMemGetInfo_v2, (size_t * unused, size_t *total))                                      \
    X(alloc, cuMemAlloc_v2, (psoup__cu_pointer * out, size_t bytes))                                       \
    X(release, cuMemFree_v2, (psoup__cu_pointer memory))                                                   \
    X(alloc_host, cuMemHostAlloc, (void **out, size_t bytes, unsigned flags))                              \
    X(release_host, cuMemFreeHost, (void *memory))                                                         \
    X(to_device, cuMemcpyHtoDAsync_v2,                                                                     \
      (psoup__cu_pointer out, const void *in, size_t bytes, psoup__cu_stream stream))                      \
    X(to_host, cuMemcpyDtoHAsync_v2,                                                                       \
      (void *out, psoup__cu_pointer in, size_t bytes, psoup__cu_stream stream))                            \
    X(copy, cuMemcpyDtoDAsync_v2,                                                                          \
      (psoup__cu_pointer out, psoup__cu_pointer in, size_t bytes, psoup__cu_stream stream))                \
    X(copy_2d, cuMemcpy2DAsync_v2, (const struct CUDA_MEMCPY2D_st *copy, psoup__cu_stream stream))         \
    X(set, cuMemsetD8Async,                                                                                \
      (psoup__cu_pointer out, unsigned char value, size_t bytes, psoup__cu_stream stream))                 \
    X(stream_create, cuStreamCreate, (psoup__cu_stream * out, unsigned flags))                             \
    X(stream_destroy, cuStreamDestroy_v2, (psoup__cu_stream stream))                                       \
    X(stream_wait, cuStreamSynchronize, (psoup__cu_stream stream))                                         \
    X(stream_query, cuStreamQuery, (psoup__cu_stream stream))                                              \
    X(event_create, cuEventCreate, (psoup__cu_event * out, unsigned flags))                                \
    X(event_destroy, cuEventDestroy_v2, (psoup__cu_event event))                                           \
    X(event_record, cuEventRecord, (psoup__cu_event event, psoup__cu_stream stream))                       \
    X(event_wait, cuEventSynchronize, (psoup__cu_event event))                                             \
    X(event_query, cuEventQuery, (psoup__cu_event event))                                                  \
    X(event_elapsed, cuEventElapsedTime,                                                                   \
      (float *milliseconds, psoup__cu_event start, psoup__cu_event end)) /* for the bench */               \
    X(module_load, cuModuleLoadData, (psoup__cu_module * out, const void *image))                          \
    X(module_unload, cuModuleUnload, (psoup__cu_module module))                                            \
    X(module_function, cuModuleGetFunction,                                                                \
      (psoup__cu_function * out, psoup__cu_module module, const char *name))                               \
    X(function_set, cuFuncSetAttribute, (psoup__cu_function function, unsigned attribute, int value))      \
    X(launch, cuLaunchKernel,                                                                              \
      (psoup__cu_function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,   \
       unsigned block_y, unsigned block_z, unsigned shared_bytes, psoup__cu_stream stream, void **args,    \
       void **extra))                                                                                      \
    X(capture_begin, cuStreamBeginCapture_v2, (psoup__cu_stream stream, unsigned mode))                    \
    X(capture_end, cuStreamEndCapture, (psoup__cu_stream stream, psoup__cu_graph *out))                    \
    X(graph_instantiate, cuGraphInstantiateWithFlags,                                                      \
      (psoup__cu_graph_exec * out, psoup__cu_graph graph, unsigned long long flags))                       \
    X(graph_launch, cuGraphLaunch, (psoup__cu_graph_exec graph, psoup__cu_stream stream))                  \
    X(graph_exec_destroy, cuGraphExecDestroy, (psoup__cu_graph_exec graph))                                \
    X(graph_destroy, cuGraphDestroy, (psoup__cu_graph graph))

typedef struct psoup__driver {
    void *library;
#define PSOUP__CU_FIELD(field, symbol, parameters) psoup__cu_result(*field) parameters;
    PSOUP__CU_CALLS(PSOUP__CU_FIELD)
#undef PSOUP__CU_FIELD
} psoup__driver;

/* Opens libcuda.so.1 and starts it: "no GPU: …" with the reason where it cannot. */
psoup_status psoup__driver_open(psoup__driver *driver, psoup_error *error);
void psoup__driver_close(psoup__driver *driver);

#endif
