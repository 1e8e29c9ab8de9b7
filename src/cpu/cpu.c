/* The backend itself: memory, packed weights, and the choice of the kernels. */
#include "cpu/cpu.h"

#include <string.h>

#include "cpu/variant.h"

typedef struct cpu {
    psoup__backend base; /* first: a psoup__backend * of ours is a cpu * */
    psoup__ops ops;
} cpu;

static void cpu_free(psoup__backend *be) {
    if (be)
        psoup__free(be->context, be);
}

static void *cpu_alloc(psoup__backend *be, size_t count, size_t size, psoup_error *error) {
    return psoup__alloc(be->context, count, size, error);
}

static void cpu_release(psoup__backend *be, void *memory) {
    psoup__free(be->context, memory);
}

static void cpu_copy(psoup__backend *be, void *out, const void *in, size_t bytes) {
    if (bytes)
        memmove(out, in, bytes);
}

static psoup_status cpu_read(psoup__backend *be, void *host, const void *in, size_t bytes,
                             psoup_error *error) {
    cpu_copy(be, host, in, bytes);
    return PSOUP_OK;
}

static void cpu_zero(psoup__backend *be, void *out, size_t bytes) {
    if (bytes)
        memset(out, 0, bytes);
}

static psoup_status cpu_reserve(psoup__backend *be, int32_t rows, int32_t width, psoup_error *error) {
    return PSOUP_OK;
}

static int64_t cpu_unused(psoup__backend *be) {
    return -1;
}

static size_t cpu_reserved_bytes(psoup__backend *be, int32_t rows, int32_t width) {
    return 0;
}

static psoup_dtype cpu_cache(psoup__backend *be, psoup_dtype weights) {
    return PSOUP_F32;
}

static void cpu_weight_unpack(psoup__backend *be, psoup__weight *weight) {
    psoup__gemm_b_free(be->context, weight->forward);
    psoup__gemm_b_free(be->context, weight->backward);
    weight->forward = weight->backward = NULL;
}

static size_t cpu_packed_bytes(psoup__backend *be, const psoup__weight *weight) {
    if (psoup__dtype_is_blocks(weight->dtype))
        return 0;
    size_t forward = psoup__gemm_pack_bytes(be->context, weight->dtype, weight->in, weight->out);
    size_t backward = psoup__gemm_pack_bytes(be->context, weight->dtype, weight->out, weight->in);
    return forward > backward ? forward : backward;
}

/* One direction of a weight, unless it is there. One in blocks takes a few bits a value only while there is no copy. */
static psoup_status pack(psoup__backend *be, psoup__gemm_room *room, psoup__weight *w, bool backward,
                         psoup_error *error) {
    if (psoup__dtype_is_blocks(w->dtype) || (backward ? w->backward : w->forward))
        return PSOUP_OK;
    if (backward)
        return psoup__gemm_pack_in(be->context, room, w->data, w->dtype, w->out, w->in, w->in, 1, &w->backward, error);
    return psoup__gemm_pack_in(be->context, room, w->data, w->dtype, w->in, w->out, 1, w->in, &w->forward, error);
}

static psoup_status cpu_weights_pack(psoup__backend *be, psoup__weight *const *weights, int32_t n, bool backward,
                                     psoup_error *error) {
    psoup__gemm_room *room = NULL;
    psoup_status status = PSOUP_OK;
    size_t bytes = 0;
    for (int32_t i = 0; i < n; i++) {
        const int missing = !weights[i]->forward + (backward && !weights[i]->backward);
        bytes += (size_t)missing * cpu_packed_bytes(be, weights[i]);
    }
    PSOUP__TRY(psoup__gemm_room_create(be->context, bytes, &room, error));
    for (int32_t i = 0; i < n; i++)
        PSOUP__TRY(pack(be, room, weights[i], false, error));
    for (int32_t i = 0; i < n && backward; i++)
        PSOUP__TRY(pack(be, room, weights[i], true, error));
fail:
    for (int32_t i = 0; i < n && status != PSOUP_OK; i++)
        cpu_weight_unpack(be, weights[i]);
    psoup__gemm_room_drop(be->context, room);
    return status;
}

#define FILL(ops, variant)                                                                         \
    do {                                                                                           \
        psoup__cpu_fill_linear_mix_##variant(ops);                                                 \
        psoup__cpu_fill_attention_##variant(ops);                                                  \
        psoup__cpu_fill_layer_##variant(ops);                                                      \
        psoup__cpu_fill_rows_##variant(ops);                                                       \
        psoup__cpu_fill_loss_##variant(ops);                                                       \
        psoup__cpu_fill_policy_##variant(ops);                                                     \
        psoup__cpu_fill_sample_##variant(ops);                                                     \
        psoup__cpu_fill_adamw_##variant(ops);                                                      \
    } while (0)

psoup_status psoup__cpu_create(psoup_context *context, psoup__backend **out, psoup_error *error) {
    *out = NULL;
    cpu *be = psoup__alloc(context, 1, sizeof *be, error);
    if (!be)
        return PSOUP_ERROR_MEMORY;
    psoup__ops *ops = &be->ops;
    ops->name = "cpu";
    ops->on_host = true;
    ops->free = cpu_free;
    ops->unused = cpu_unused;
    ops->alloc = cpu_alloc;
    ops->release = cpu_release;
    ops->write = cpu_copy;
    ops->read = cpu_read;
    ops->copy = cpu_copy;
    ops->zero = cpu_zero;
    ops->weights_pack = cpu_weights_pack;
    ops->weight_unpack = cpu_weight_unpack;
    ops->packed_bytes = cpu_packed_bytes;
    ops->reserve = cpu_reserve;
    ops->reserved_bytes = cpu_reserved_bytes;
    ops->cache = cpu_cache;
    switch (psoup__isa_of(context)) {
#if defined(__x86_64__)
    case PSOUP__ISA_AVX512:
        FILL(ops, avx512);
        break;
    case PSOUP__ISA_AVX2:
        FILL(ops, avx2);
        break;
#endif
    default:
        FILL(ops, generic);
    }
    be->base.ops = ops;
    be->base.context = context;
    *out = &be->base;
    return PSOUP_OK;
}
