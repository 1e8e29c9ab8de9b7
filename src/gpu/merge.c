/* A GPU as the device of a context's merges. */
#include "psoup/merge_gpu.h"

#include <pthread.h>

#include "gpu/interpolate.h"

struct psoup_gpu_merge {
    psoup_context *context;
    psoup__gpu *gpu;
    pthread_mutex_t lock; /* one call after another puts its work into the stream */
    psoup__terms room;
};

/* The device's context instead of the thread's own, which `leave` gives back. What the caller does on streams
 * that we do not know is not to be overtaken. */
static psoup__cu_context enter(psoup_gpu_merge *merge) {
    psoup__gpu *gpu = merge->gpu;
    psoup__cu_context before = NULL;
    pthread_mutex_lock(&merge->lock);
    if (!psoup__gpu_failed(gpu, gpu->driver.context_get(&before), "the thread's context"))
        psoup__gpu_enter(gpu);
    if (gpu->own_stream)
        psoup__gpu_failed(gpu, gpu->driver.context_wait(), "the device's work before");
    return before;
}

/* A failure is told once, by the call that is here when it is known. */
static psoup_status leave(psoup_gpu_merge *merge, psoup__cu_context before, psoup_status status,
                          psoup_error *error) {
    psoup__gpu *gpu = merge->gpu;
    if (status == PSOUP_OK && gpu->own_stream)
        status = psoup__gpu_finish(gpu, error);
    else if (status == PSOUP_OK)
        status = psoup__gpu_tell(gpu, error);
    gpu->failed.status = PSOUP_OK;
    gpu->driver.context_set(before);
    pthread_mutex_unlock(&merge->lock);
    return status;
}

static psoup_status sum(void *user, const psoup_merge_view *out, const psoup_merge_view *in,
                        const double *weights, size_t count, psoup_error *error) {
    psoup_gpu_merge *merge = user;
    psoup__cu_context before = enter(merge);
    psoup_status status = psoup__gpu_sum(merge->gpu, &merge->room, out, in, weights, count, error);
    return leave(merge, before, status, error);
}

static psoup_status fold(void *user, const psoup_merge_view *out, const psoup_merge_view *base,
                         int64_t first_row, int64_t first_column, int64_t in_features,
                         const psoup_lora_factors *factors, const double *weights, size_t count,
                         psoup_error *error) {
    psoup_gpu_merge *merge = user;
    psoup__cu_context before = enter(merge);
    psoup_status status = psoup__gpu_fold(merge->gpu, &merge->room, out, base, first_row, first_column,
                                          in_features, factors, weights, count, error);
    return leave(merge, before, status, error);
}

static psoup_status copy(void *user, const psoup_merge_view *out, const psoup_merge_view *in,
                         psoup_error *error) {
    psoup_gpu_merge *merge = user;
    psoup__cu_context before = enter(merge);
    return leave(merge, before, psoup__gpu_copy_view(merge->gpu, out, in, error), error);
}

psoup_status psoup_gpu_merge_create(psoup_context *context, psoup_gpu_merge **out, psoup_error *error) {
    psoup_status status;
    *out = NULL;
    if (context == NULL || context->gpu < 0)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "psoup_gpu_merge_create: %s; expected one whose device is \"cuda:N\"",
                           context == NULL ? "context is NULL" : "the context's device is the CPU");
    psoup_gpu_merge *merge = psoup__alloc(context, 1, sizeof *merge, error);
    if (merge == NULL)
        return PSOUP_ERROR_MEMORY;
    merge->context = context;
    pthread_mutex_init(&merge->lock, NULL);
    PSOUP__TRY(psoup__gpu_open(context, false, &merge->gpu, error));
    merge->gpu->driver.context_set(merge->gpu->before);
    const psoup_merge_device table = {.size = sizeof table, .user = merge, .sum = sum, .fold = fold,
                                      .copy = copy};
    PSOUP__TRY(psoup_merge_set_device(context, &table, error));
    *out = merge;
    return PSOUP_OK;
fail:
    psoup_gpu_merge_free(merge);
    return status;
}

void psoup_gpu_merge_free(psoup_gpu_merge *merge) {
    if (merge == NULL)
        return;
    psoup_context *context = merge->context;
    if (context->merge_device != NULL && context->merge_device->user == merge)
        psoup_merge_set_device(context, NULL, NULL);
    if (merge->gpu != NULL)
        merge->gpu->ops.free(&merge->gpu->base);
    pthread_mutex_destroy(&merge->lock);
    psoup__free(context, merge->room.memory);
    psoup__free(context, merge);
}
