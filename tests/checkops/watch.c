/* An op neither allocates nor waits: what of the backend may do either is noted here, and so is whoever of the driver's
 * calls, or of the context's allocator, is called beside. */
#include "checkops.h"

#include "gpu/internal.h"

static struct {
    checker *c;
    psoup__ops ops; /* what is called through */
    psoup__driver driver;
} of;

static void note(checker *c, const char *call) {
    if (!c->aside)
        fail(c, "the op calls %s", call);
}

/* ---- what may ----------------------------------------------------------------------------------------- */

#define ASIDE(type, name, parameters, ...)                                                                 \
    static type name parameters {                                                                          \
        const bool before = of.c->aside;                                                                   \
        of.c->aside = true;                                                                                \
        type result = of.ops.name(__VA_ARGS__);                                                            \
        of.c->aside = before;                                                                              \
        return result;                                                                                     \
    }
ASIDE(void *, alloc, (psoup__backend *be, size_t count, size_t size, psoup_error *error), be, count, size, error)
ASIDE(psoup_status, read, (psoup__backend *be, void *host, const void *in, size_t bytes, psoup_error *error), be, host, in,
      bytes, error)
ASIDE(psoup_status, reserve, (psoup__backend *be, int32_t rows, int32_t width, psoup_error *error), be, rows, width, error)
ASIDE(psoup_status, weights_pack,
      (psoup__backend *be, psoup__weight *const *weights, int32_t n, bool backward, psoup_error *error), be, weights, n,
      backward, error)
ASIDE(psoup_status, sum_squares, (psoup__backend *be, double *out, const float *x, size_t n, psoup_error *error), be, out, x,
      n, error)

/* Of more it may wait. */
static void hand_over(psoup__backend *be, void *out, const void *host, size_t bytes) {
    const bool before = of.c->aside;
    of.c->aside = before || bytes > PSOUP__UPLOAD_BYTES / 2;
    of.ops.write(be, out, host, bytes);
    of.c->aside = before;
}

static void release(psoup__backend *be, void *memory) {
    const bool before = of.c->aside;
    of.c->aside = true;
    of.ops.release(be, memory);
    of.c->aside = before;
}

/* ---- what may not ------------------------------------------------------------------------------------- */

#define NEVER(name, parameters, ...)                                                                       \
    static psoup__cu_result cu_##name parameters {                                                         \
        note(of.c, #name);                                                                                 \
        return of.driver.name(__VA_ARGS__);                                                                \
    }
NEVER(alloc, (psoup__cu_pointer * out, size_t bytes), out, bytes)
NEVER(release, (psoup__cu_pointer memory), memory)
NEVER(alloc_host, (void **out, size_t bytes, unsigned flags), out, bytes, flags)
NEVER(to_host, (void *out, psoup__cu_pointer in, size_t bytes, psoup__cu_stream stream), out, in, bytes, stream)
NEVER(stream_wait, (psoup__cu_stream stream), stream)
NEVER(stream_query, (psoup__cu_stream stream), stream)
NEVER(context_wait, (void))
NEVER(event_wait, (psoup__cu_event event), event)

static void *host_alloc(void *user, size_t bytes, size_t alignment) {
    note(user, "the allocator");
    return aligned_alloc(alignment, (bytes + alignment) / alignment * alignment);
}

static void host_free(void *user, void *memory) {
    free(memory);
}

psoup_allocator watched_allocator(checker *c) {
    c->aside = true;
    return (psoup_allocator){c, host_alloc, host_free};
}

void watch(checker *c) {
    static psoup__ops cpu;
    psoup__ops *ops = &cpu;
    of.c = c;
    of.ops = *c->be->ops;
    if (c->cuda) {
        psoup__gpu *gpu = psoup__gpu_of(c->be);
        psoup__driver *d = &gpu->driver;
        ops = &gpu->ops;
        of.driver = *d;
        d->alloc = cu_alloc, d->release = cu_release, d->alloc_host = cu_alloc_host, d->to_host = cu_to_host;
        d->stream_wait = cu_stream_wait, d->stream_query = cu_stream_query, d->context_wait = cu_context_wait;
        d->event_wait = cu_event_wait;
    }
    *ops = of.ops;
    ops->alloc = alloc, ops->read = read, ops->reserve = reserve, ops->weights_pack = weights_pack;
    ops->sum_squares = sum_squares, ops->release = release, ops->write = hand_over;
    c->be->ops = c->ops = ops;
    c->aside = false;
}
