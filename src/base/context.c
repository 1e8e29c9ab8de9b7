/* src/base/context.c: the context that every handle is made from. */
#include "base/internal.h"

#include <sched.h>
#include <string.h>
#include <unistd.h>

enum { MOST_THREADS = 1024 };

/* Processors that the process may use. */
static int processors(void) {
    cpu_set_t set;
    long count = 0;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        count = CPU_COUNT(&set);
    else /* a machine of more processors than cpu_set_t has bits */
        count = sysconf(_SC_NPROCESSORS_ONLN);
    return count < 1 ? 1 : count > MOST_THREADS ? MOST_THREADS : (int)count;
}

/* "cpu", "cuda" or "cuda:N". */
static psoup_status parse_device(const char *device, int *gpu, psoup_error *error) {
    *gpu = -1;
    if (device == NULL || strcmp(device, "cpu") == 0)
        return PSOUP_OK;
    *gpu = 0;
    if (strcmp(device, "cuda") == 0)
        return PSOUP_OK;
    if (strncmp(device, "cuda:", 5) == 0 && device[5] >= '0' && device[5] <= '9' &&
        (device[6] == 0 || (device[6] >= '0' && device[6] <= '9' && device[7] == 0))) {
        *gpu = device[6] == 0 ? device[5] - '0' : (device[5] - '0') * 10 + (device[6] - '0');
        return PSOUP_OK;
    }
    return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                       "device is \"%s\"; expected \"cpu\", \"cuda\" or \"cuda:N\"", device);
}

psoup_status psoup_context_create(const psoup_context_options *options, psoup_context **out,
                                  psoup_error *error) {
    psoup_status status = PSOUP_OK;
    psoup_context *context = NULL;
    psoup_context_options o = PSOUP_CONTEXT_OPTIONS_INIT;
    *out = NULL;
    PSOUP__TRY(psoup__options(&o, sizeof o, options, "context options", error));
    int gpu = -1;
    PSOUP__TRY(parse_device(o.device, &gpu, error));
    if (o.stream != NULL && gpu < 0) {
        status = psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                             "context options: a stream is given, but the device is the CPU");
        goto fail;
    }
    if (o.threads < 0 || o.threads > MOST_THREADS) {
        status = psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                             "context options: threads is %d; expected 0 to %d", (int)o.threads,
                             MOST_THREADS);
        goto fail;
    }
    if (o.reserved != 0 || (o.allocator.alloc == NULL) != (o.allocator.free == NULL)) {
        status =
            psoup__fail(error, PSOUP_ERROR_ARGUMENT, "context options: %s",
                        o.reserved != 0 ? "reserved is not 0"
                                        : "the allocator needs both alloc and free, or neither");
        goto fail;
    }
    psoup_context made = {.allocator = o.allocator, .log = o.log, .log_user = o.log_user,
                          .gpu = gpu, .gpu_stream = o.stream};
    made.threads = o.threads > 0 ? o.threads : processors();
    PSOUP__TRY(psoup__isa_parse(o.isa, &made.isa, error));
    context = psoup__alloc(&made, 1, sizeof *context, error);
    if (context == NULL) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    *context = made;
    /* waiting awake pays only where every thread has a processor of its own */
    PSOUP__TRY(psoup__pool_create(context, context->threads <= processors(), error));
    context->gemm = psoup__gemm_space_create(context, error);
    if (context->gemm == NULL) {
        status = PSOUP_ERROR_MEMORY;
        goto fail;
    }
    *out = context;
    return PSOUP_OK;
fail:
    psoup_context_free(context);
    return status;
}

void psoup_context_free(psoup_context *context) {
    if (context == NULL)
        return;
    if (context->gemm != NULL)
        psoup__gemm_space_free(context, context->gemm);
    psoup__free(context, context->merge_device);
    psoup__pool_free(context);
    psoup_context self = *context; /* its allocator frees it */
    psoup__free(&self, context);
}

int32_t psoup_context_threads(const psoup_context *context) {
    return context->threads;
}

const char *psoup_context_isa(const psoup_context *context) {
    return psoup__isa_name(context->isa);
}
