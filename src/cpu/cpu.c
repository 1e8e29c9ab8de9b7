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

static psoup_status cpu_weight_pack(psoup__backend *be, psoup__weight *weight, bool backward,
                                    psoup_error *error) {
    psoup_status status;
    cpu_weight_unpack(be, weight);
    if (psoup__dtype_is_blocks(weight->dtype)) /* a few bits a value only while there is no copy */
        return PSOUP_OK;
    PSOUP__TRY(psoup__gemm_pack(be->context, weight->data, weight->dtype, weight->in, weight->out, 1,
                                weight->in, &weight->forward, error));
    if (backward)
        PSOUP__TRY(psoup__gemm_pack(be->context, weight->data, weight->dtype, weight->out,
                                    weight->in, weight->in, 1, &weight->backward, error));
    return PSOUP_OK;
fail:
    cpu_weight_unpack(be, weight);
    return status;
}

static size_t cpu_packed_bytes(psoup__backend *be, const psoup__weight *weight) {
    if (psoup__dtype_is_blocks(weight->dtype))
        return 0;
    size_t forward = psoup__gemm_pack_bytes(be->context, weight->dtype, weight->in, weight->out);
    size_t backward = psoup__gemm_pack_bytes(be->context, weight->dtype, weight->out, weight->in);
    return forward > backward ? forward : backward;
}

#define FILL(ops, variant)                                                                         \
    do {                                                                                           \
        psoup__cpu_fill_linear_mix_##variant(ops);                                                 \
        psoup__cpu_fill_attention_##variant(ops);                                                  \
        psoup__cpu_fill_layer_##variant(ops);                                                      \
        psoup__cpu_fill_rows_##variant(ops);                                                       \
        psoup__cpu_fill_loss_##variant(ops);                                                       \
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
    ops->weight_pack = cpu_weight_pack;
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
