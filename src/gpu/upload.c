/* Host data on its way to the device: through pinned memory, or, where what was copied out of it before may not have left
 * yet, in the arguments of launches. */
#include "gpu/internal.h"

#include <string.h>

enum { HALF = PSOUP__UPLOAD_BYTES / 2, ALIGN = 256 };

psoup_status psoup__upload_create(psoup__gpu *gpu, psoup_error *error) {
    psoup__upload *s = &gpu->upload;
    void *host = NULL;
    psoup__cu_result result = gpu->driver.alloc_host(&host, PSOUP__UPLOAD_BYTES, 0);
    if (result == 0) {
        s->host = host;
        result = gpu->driver.alloc(&s->device, PSOUP__UPLOAD_BYTES);
    }
    for (int i = 0; i < 2 && result == 0; i++)
        result = gpu->driver.event_create(&s->left[i], PSOUP__CU_EVENT_NO_TIMING);
    return result == 0 ? PSOUP_OK : psoup__gpu_fail(gpu, result, "staging memory", error);
}

void psoup__upload_free(psoup__gpu *gpu) {
    psoup__upload *s = &gpu->upload;
    for (int i = 0; i < 2; i++)
        if (s->left[i])
            gpu->driver.event_destroy(s->left[i]);
    if (s->device)
        gpu->driver.release(s->device);
    if (s->host)
        gpu->driver.release_host(s->host);
}

/* Room for so many bytes, which lie in one half; where they begin, or SIZE_MAX. */
static size_t take(psoup__gpu *gpu, size_t bytes) {
    psoup__upload *s = &gpu->upload;
    size_t at = (s->used + ALIGN - 1) / ALIGN * ALIGN;
    size_t half = s->used == 0 ? 0 : (s->used - 1) / HALF; /* the one that was written last */
    if (s->used > 0 && at + bytes > (half + 1) * HALF) {
        if (!s->pending[half] &&
            psoup__gpu_failed(gpu, gpu->driver.event_record(s->left[half], gpu->stream), "staging"))
            return SIZE_MAX;
        s->pending[half] = true;
        at = (1 - half) * HALF;
    }
    s->used = at + bytes;
    return at;
}

/* Whether all has left that was copied out of the host's half around `at` when it was full. */
static bool is_free(psoup__gpu *gpu, size_t at, bool wait) {
    psoup__upload *s = &gpu->upload;
    const size_t half = at / HALF;
    if (!s->pending[half])
        return true;
    const psoup__cu_result result = wait ? gpu->driver.event_wait(s->left[half]) : gpu->driver.event_query(s->left[half]);
    if (result == PSOUP__CU_NOT_READY || psoup__gpu_failed(gpu, result, "staging"))
        return false;
    s->pending[half] = false;
    return true;
}

/* By the host's bytes around `at`, if they are free. */
static void send(psoup__gpu *gpu, psoup__cu_pointer out, const char *from, size_t n, size_t at, bool wait) {
    if (is_free(gpu, at, wait)) {
        memcpy(gpu->upload.host + at, from, n);
        psoup__gpu_failed(gpu, gpu->driver.to_device(out, gpu->upload.host + at, n, gpu->stream),
                          "a copy to the device");
        return;
    }
    psoup__carry_args args = {0};
    for (size_t done = 0; done < n && gpu->failed.status == PSOUP_OK; done += (size_t)args.n) {
        args.out = (uint8_t *)(uintptr_t)(out + done);
        args.n = (int32_t)(n - done < sizeof args.data ? n - done : sizeof args.data);
        memcpy(args.data, from + done, (size_t)args.n);
        psoup__gpu_launch(gpu, PSOUP__KERNEL_carry, (psoup__grid){1, 1, 1, PSOUP__FLAT_THREADS, 0}, &args);
    }
}

const void *psoup__gpu_stage(psoup__gpu *gpu, const void *host, size_t bytes) {
    if (gpu->failed.status != PSOUP_OK || bytes > HALF || psoup__record_refuse(gpu) || !psoup__gpu_enter(gpu))
        return NULL;
    const size_t at = take(gpu, bytes > 0 ? bytes : 1);
    if (at == SIZE_MAX)
        return NULL;
    const psoup__cu_pointer out = gpu->upload.device + at;
    if (bytes > 0)
        send(gpu, out, host, bytes, at, false);
    return (const void *)(uintptr_t)out;
}

void psoup__gpu_write(psoup__gpu *gpu, psoup__cu_pointer out, const void *host, size_t bytes) {
    const char *from = host;
    const bool wait = bytes > HALF;
    if (psoup__record_refuse(gpu))
        return;
    while (bytes > 0 && gpu->failed.status == PSOUP_OK) {
        size_t n = bytes < HALF ? bytes : HALF, at = take(gpu, n);
        if (at == SIZE_MAX)
            return;
        send(gpu, out, from, n, at, wait);
        out += n;
        from += n;
        bytes -= n;
    }
}
