/* The matrix product's buffers: taken for a call, given back after it. */
#include "base/gemm.h"

#include <pthread.h>

enum {
    WIDE_B = 1 << 20,  /* floats of B copied at once for all workers: 4 MiB, a fraction of an L3 */
    NARROW_B = 1 << 17 /* and for a caller that works alone */
};

struct psoup__gemm_space {
    pthread_mutex_t mutex;
    pthread_cond_t freed;
    int slots;
    psoup__gemm_slot *slot; /* [slots]; the first is wide: it serves a call that uses all workers */
    psoup__gemm_worker *workers;
    float *memory;
};

struct psoup__gemm_space *psoup__gemm_space_create(psoup_context *context, psoup_error *error) {
    const size_t block = (size_t)PSOUP__GEMM_ROWS * PSOUP__GEMM_DEPTH;
    const size_t panel = (size_t)psoup__gemm_kernels_of(context)->columns * PSOUP__GEMM_DEPTH;
    const size_t threads = (size_t)(context->threads > 1 ? context->threads : 1);
    const size_t narrow = threads + 1; /* a call in every worker, and one besides */
    struct psoup__gemm_space *space = psoup__alloc(context, 1, sizeof *space, error);
    if (space == NULL)
        return NULL;
    space->slots = (int)(narrow + 1);
    space->slot = psoup__alloc(context, narrow + 1, sizeof *space->slot, error);
    space->workers = psoup__alloc(context, threads + narrow, sizeof *space->workers, error);
    if (space->slot == NULL || space->workers == NULL)
        goto fail;
    space->memory = psoup__alloc(context,
                                 WIDE_B + threads * (block + panel) +
                                     narrow * (NARROW_B + block + panel),
                                 sizeof(float), error);
    if (space->memory == NULL)
        goto fail;
    float *at = space->memory;
    for (int i = 0; i < space->slots; i++) {
        psoup__gemm_slot *slot = &space->slot[i];
        slot->workers = i == 0 ? (int)threads : 1;
        slot->b_size = i == 0 ? WIDE_B : NARROW_B;
        slot->worker = space->workers + (i == 0 ? 0 : threads + (size_t)i - 1);
        slot->b = at;
        slot->a = slot->b + slot->b_size;
        slot->panel = slot->a + (size_t)slot->workers * block;
        at = slot->panel + (size_t)slot->workers * panel;
    }
    pthread_mutex_init(&space->mutex, NULL);
    pthread_cond_init(&space->freed, NULL);
    return space;

fail:
    psoup__free(context, space->workers);
    psoup__free(context, space->slot);
    psoup__free(context, space);
    return NULL;
}

void psoup__gemm_space_free(psoup_context *context, struct psoup__gemm_space *space) {
    if (space == NULL)
        return;
    pthread_cond_destroy(&space->freed);
    pthread_mutex_destroy(&space->mutex);
    psoup__free(context, space->memory);
    psoup__free(context, space->workers);
    psoup__free(context, space->slot);
    psoup__free(context, space);
}

psoup__gemm_slot *psoup__gemm_take(struct psoup__gemm_space *space, bool wide) {
    psoup__gemm_slot *slot = NULL;
    pthread_mutex_lock(&space->mutex);
    while (slot == NULL) {
        for (int i = wide ? 0 : 1; i < space->slots && slot == NULL; i++)
            if (!space->slot[i].busy)
                slot = &space->slot[i];
        if (slot == NULL)
            pthread_cond_wait(&space->freed, &space->mutex);
    }
    slot->busy = true;
    pthread_mutex_unlock(&space->mutex);
    for (int i = 0; i < slot->workers; i++)
        slot->worker[i].turned = NULL;
    return slot;
}

void psoup__gemm_give(struct psoup__gemm_space *space, psoup__gemm_slot *slot) {
    pthread_mutex_lock(&space->mutex);
    slot->busy = false;
    pthread_cond_signal(&space->freed);
    pthread_mutex_unlock(&space->mutex);
}

