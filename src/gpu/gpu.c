/* The backend itself: the device, its memory, and what goes wrong there. */
#include "gpu/gpu.h"

#include <string.h>

#include "gpu/internal.h"

static const char *text_of(psoup__gpu *gpu, psoup__cu_result result) {
    const char *text = NULL;
    return gpu->driver.error_string(result, &text) == 0 && text ? text : "unknown error";
}

psoup_status psoup__gpu_fail(psoup__gpu *gpu, psoup__cu_result result, const char *what, psoup_error *error) {
    return psoup__fail(error, result == PSOUP__CU_OUT_OF_MEMORY ? PSOUP_ERROR_MEMORY : PSOUP_ERROR_STATE,
                       "GPU: %s: %s", what, text_of(gpu, result));
}

bool psoup__gpu_failed(psoup__gpu *gpu, psoup__cu_result result, const char *what) {
    if (result != 0 && gpu->failed.status == PSOUP_OK)
        psoup__gpu_fail(gpu, result, what, &gpu->failed);
    return gpu->failed.status != PSOUP_OK;
}

/* ---- memory ------------------------------------------------------------------------------------------- */

bool psoup__gpu_enter(psoup__gpu *gpu) {
    return !psoup__gpu_failed(gpu, gpu->driver.context_set(gpu->context), "the device's context");
}

static bool enter(psoup__gpu *gpu) {
    gpu->cast.of = NULL;
    return psoup__gpu_enter(gpu);
}

static void *gpu_alloc(psoup__backend *be, size_t count, size_t size, psoup_error *error) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    size_t bytes = 0;
    psoup__cu_pointer memory = 0;
    if (!psoup__multiply(count, size, &bytes)) {
        psoup__out_of_memory(error, SIZE_MAX);
        return NULL;
    }
    bytes = bytes > 0 ? bytes : 1;
    psoup__cu_result result = gpu->driver.context_set(gpu->context);
    if (result == 0)
        result = gpu->driver.alloc(&memory, bytes);
    if (result == 0)
        result = gpu->driver.set(memory, 0, bytes, gpu->stream);
    if (result == 0)
        return (void *)(uintptr_t)memory;
    if (memory)
        gpu->driver.release(memory);
    if (result == PSOUP__CU_OUT_OF_MEMORY)
        psoup__fail(error, PSOUP_ERROR_MEMORY, "out of GPU memory: %zu bytes", bytes);
    else
        psoup__gpu_fail(gpu, result, "an allocation", error);
    return NULL;
}

static void gpu_release(psoup__backend *be, void *memory) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    if (!memory)
        return;
    gpu->cast.of = NULL;
    gpu->driver.context_set(gpu->context);
    gpu->driver.stream_wait(gpu->stream); /* what still uses it */
    gpu->driver.release(psoup__gpu_address(memory));
}

static void gpu_write(psoup__backend *be, void *out, const void *host, size_t bytes) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    if (enter(gpu))
        psoup__gpu_write(gpu, psoup__gpu_address(out), host, bytes);
}

psoup_status psoup__gpu_tell(psoup__gpu *gpu, psoup_error *error) {
    const psoup_status status = gpu->failed.status;
    if (status != PSOUP_OK)
        psoup__fail(error, status, "%s", gpu->failed.message);
    gpu->failed.status = PSOUP_OK;
    return status;
}

psoup_status psoup__gpu_finish(psoup__gpu *gpu, psoup_error *error) {
    psoup__gpu_failed(gpu, gpu->driver.stream_wait(gpu->stream), "the work before");
    return psoup__gpu_tell(gpu, error);
}

static psoup_status gpu_read(psoup__backend *be, void *host, const void *in, size_t bytes,
                             psoup_error *error) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    if (psoup__record_refuse(gpu))
        return PSOUP_OK; /* replay tells */
    if (enter(gpu) && bytes > 0)
        psoup__gpu_failed(gpu, gpu->driver.to_host(host, psoup__gpu_address(in), bytes, gpu->stream),
                          "a copy to the host");
    return psoup__gpu_finish(gpu, error);
}

static void gpu_copy(psoup__backend *be, void *out, const void *in, size_t bytes) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    if (bytes > 0 && !psoup__record_copy(gpu, psoup__gpu_address(out), psoup__gpu_address(in), bytes) && enter(gpu))
        psoup__gpu_failed(gpu, gpu->driver.copy(psoup__gpu_address(out), psoup__gpu_address(in), bytes,
                                                gpu->stream),
                          "a copy");
}

static void gpu_zero(psoup__backend *be, void *out, size_t bytes) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    if (bytes > 0 && !psoup__record_copy(gpu, psoup__gpu_address(out), 0, bytes) && enter(gpu))
        psoup__gpu_failed(gpu, gpu->driver.set(psoup__gpu_address(out), 0, bytes, gpu->stream), "zeroing");
}

/* ---- opening ------------------------------------------------------------------------------------------ */

static psoup_status load_images(psoup__gpu *gpu, psoup_error *error) {
    for (int i = 0; psoup__gpu_images[i]; i++) {
        if (i == PSOUP__GPU_IMAGES)
            return psoup__fail(error, PSOUP_ERROR_STATE, "GPU: more than %d images", PSOUP__GPU_IMAGES);
        psoup__cu_result result = gpu->driver.module_load(&gpu->modules[i], psoup__gpu_images[i]);
        if (result == 0) {
            gpu->n_modules++;
            continue;
        }
        if (strcmp(psoup__gpu_images[i], "none") == 0)
            return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                               "no GPU: this libpsoup was built where nvcc was missing, without its kernels");
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "no GPU: the kernels do not load on compute capability %d.%d: %s",
                           gpu->capability / 10, gpu->capability % 10, text_of(gpu, result));
    }
    return PSOUP_OK;
}

static psoup_status open_device(psoup__gpu *gpu, int ordinal, psoup_error *error) {
    psoup__driver *d = &gpu->driver;
    int count = 0, major = 0, minor = 0;
    psoup__cu_result result = d->device_count(&count);
    if (result == 0 && ordinal >= count)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT, "no GPU: device cuda:%d is asked for, there are %d",
                           ordinal, count);
    if (result == 0)
        result = d->device_get(&gpu->device, ordinal);
    if (result == 0)
        result = d->device_attribute(&gpu->processors, PSOUP__CU_MULTIPROCESSORS, gpu->device);
    if (result == 0)
        result = d->device_attribute(&gpu->shared_memory, PSOUP__CU_SHARED_MEMORY, gpu->device);
    if (result == 0)
        result = d->device_attribute(&major, PSOUP__CU_CAPABILITY_MAJOR, gpu->device);
    if (result == 0)
        result = d->device_attribute(&minor, PSOUP__CU_CAPABILITY_MINOR, gpu->device);
    gpu->capability = major * 10 + minor;
    if (result == 0 && gpu->capability < 80)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "no GPU: cuda:%d has compute capability %d.%d; 8.0 or more is needed", ordinal,
                           major, minor);
    if (result == 0)
        result = d->context_get(&gpu->before);
    if (result == 0)
        result = d->context_retain(&gpu->context, gpu->device);
    if (result == 0)
        result = d->context_set(gpu->context);
    return result == 0 ? PSOUP_OK : psoup__gpu_fail(gpu, result, "opening the device", error);
}

static psoup_status open_stream(psoup__gpu *gpu, void *stream, psoup_error *error) {
    gpu->stream = stream;
    if (stream)
        return PSOUP_OK;
    psoup__cu_result result = gpu->driver.stream_create(&gpu->stream, PSOUP__CU_STREAM_NON_BLOCKING);
    gpu->own_stream = result == 0;
    return result == 0 ? PSOUP_OK : psoup__gpu_fail(gpu, result, "a stream", error);
}

static psoup_status make_counters(psoup__gpu *gpu, psoup_error *error) {
    void *counters = gpu_alloc(&gpu->base, PSOUP__GPU_COUNTERS, sizeof(uint32_t), error);
    gpu->counters = psoup__gpu_address(counters);
    return counters ? PSOUP_OK : PSOUP_ERROR_MEMORY;
}

/* Whatever of it is open; the thread's context is `before` again. */
static void close_gpu(psoup__gpu *gpu) {
    psoup__driver *d = &gpu->driver;
    if (gpu->context) {
        d->context_set(gpu->context);
        if (gpu->stream)
            d->stream_wait(gpu->stream);
        psoup__record_free(gpu);
        psoup__blas_close(gpu);
        psoup__upload_free(gpu);
        if (gpu->room)
            d->release(gpu->room);
        if (gpu->matrix)
            d->release(gpu->matrix);
        if (gpu->counters)
            d->release(gpu->counters);
        for (int i = 0; i < gpu->n_modules; i++)
            d->module_unload(gpu->modules[i]);
        if (gpu->own_stream)
            d->stream_destroy(gpu->stream);
        d->context_set(gpu->before);
        d->context_release(gpu->device);
    }
    psoup__driver_close(d);
    psoup__free(gpu->base.context, gpu);
}

static void gpu_free(psoup__backend *be) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    if (!gpu)
        return;
    gpu->driver.context_get(&gpu->before);
    close_gpu(gpu);
}

/* ---- the table ---------------------------------------------------------------------------------------- */

psoup_status psoup__gpu_make_room(psoup__gpu *gpu, size_t bytes, psoup_error *error) {
    if (bytes <= gpu->room_bytes)
        return PSOUP_OK;
    gpu_release(&gpu->base, (void *)(uintptr_t)gpu->room);
    gpu->room = 0;
    gpu->room_bytes = 0;
    void *room = gpu_alloc(&gpu->base, bytes, 1, error);
    if (!room)
        return PSOUP_ERROR_MEMORY;
    gpu->room = psoup__gpu_address(room);
    gpu->room_bytes = bytes;
    return PSOUP_OK;
}

/* The largest need of any op, attention_backward's: a row's queries, keys, values and gradient of the
 * output in 16 bits, and two numbers for each head. And at least what few rows' attention to many keys takes,
 * in parts for as many blocks as fill a device. */
static int64_t gpu_unused(psoup__backend *be) {
    psoup__gpu *gpu = psoup__gpu_of(be);
    size_t unused = 0, total = 0;
    return gpu->driver.memory_info(&unused, &total) == 0 ? (int64_t)unused : -1;
}

static size_t gpu_reserved_bytes(psoup__backend *be, int32_t rows, int32_t width) {
    const size_t most = 9, least = 8 << 20; /* bytes for each number of a row; bytes */
    size_t bytes = 0;
    if (!psoup__multiply((size_t)rows, (size_t)width, &bytes) || !psoup__multiply(bytes, most, &bytes))
        return SIZE_MAX;
    return bytes > least ? bytes : least;
}

static psoup_status gpu_reserve(psoup__backend *be, int32_t rows, int32_t width, psoup_error *error) {
    size_t bytes = gpu_reserved_bytes(be, rows, width);
    if (bytes == SIZE_MAX)
        return psoup__out_of_memory(error, SIZE_MAX);
    return psoup__gpu_make_room(psoup__gpu_of(be), bytes, error);
}

/* Half of the bytes for models that have half of the bits. */
static psoup_dtype gpu_cache(psoup__backend *be, psoup_dtype weights) {
    return weights;
}

/* A weight is multiplied as it lies in the device's memory, or by way of the room for one. */
static psoup_status gpu_weights_pack(psoup__backend *be, psoup__weight *const *weights, int32_t n, bool backward,
                                     psoup_error *error) {
    psoup_status status = PSOUP_OK;
    for (int32_t i = 0; i < n && status == PSOUP_OK; i++)
        status = psoup__gpu_reserve_matrix(psoup__gpu_of(be), weights[i], error);
    return status;
}

static void gpu_weight_unpack(psoup__backend *be, psoup__weight *weight) {
}

static size_t gpu_packed_bytes(psoup__backend *be, const psoup__weight *weight) {
    return 0;
}

enum { PAGE = 64 /* rows of a cache: enough to read at full speed, few enough to waste little */ };

static void fill(psoup__ops *ops) {
    ops->name = "cuda";
    ops->page = PAGE;
    ops->free = gpu_free;
    ops->unused = gpu_unused;
    ops->alloc = gpu_alloc;
    ops->release = gpu_release;
    ops->write = gpu_write;
    ops->read = gpu_read;
    ops->copy = gpu_copy;
    ops->zero = gpu_zero;
    ops->record = psoup__gpu_record;
    ops->replay = psoup__gpu_replay;
    ops->reserve = gpu_reserve;
    ops->reserved_bytes = gpu_reserved_bytes;
    ops->cache = gpu_cache;
    ops->weights_pack = gpu_weights_pack;
    ops->weight_unpack = gpu_weight_unpack;
    ops->packed_bytes = gpu_packed_bytes;
    psoup__gpu_fill_layer(ops);
    psoup__gpu_fill_rows(ops);
    psoup__gpu_fill_attention(ops);
    psoup__gpu_fill_linear_mix(ops);
    psoup__gpu_fill_loss(ops);
    psoup__gpu_fill_policy(ops);
    psoup__gpu_fill_sample(ops);
    psoup__gpu_fill_advance(ops);
    psoup__gpu_fill_adamw(ops);
}

psoup_status psoup__gpu_open(psoup_context *context, bool products, psoup__gpu **out, psoup_error *error) {
    psoup_status status;
    *out = NULL;
    psoup__gpu *gpu = psoup__alloc(context, 1, sizeof *gpu, error);
    if (!gpu)
        return PSOUP_ERROR_MEMORY;
    fill(&gpu->ops);
    gpu->base.ops = &gpu->ops;
    gpu->base.context = context;
    PSOUP__TRY(psoup__driver_open(&gpu->driver, error));
    PSOUP__TRY(open_device(gpu, context->gpu, error));
    PSOUP__TRY(open_stream(gpu, context->gpu_stream, error));
    PSOUP__TRY(load_images(gpu, error));
    PSOUP__TRY(make_counters(gpu, error));
    PSOUP__TRY(psoup__upload_create(gpu, error));
    if (products)
        PSOUP__TRY(psoup__blas_open(gpu, error));
    *out = gpu;
    return PSOUP_OK;
fail:
    close_gpu(gpu);
    return status;
}

psoup_status psoup__gpu_create(psoup_context *context, psoup__backend **out, psoup_error *error) {
    psoup__gpu *gpu;
    psoup_status status = psoup__gpu_open(context, true, &gpu, error);
    *out = gpu ? &gpu->base : NULL;
    return status;
}
