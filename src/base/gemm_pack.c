/* The matrix product's kernels by instruction set, and B packed ahead of its products. */
#include "base/gemm.h"

#include <assert.h>
#include <string.h>

const psoup__gemm_kernels *psoup__gemm_kernels_of(const psoup_context *context) {
#if defined(__x86_64__)
    if (context->isa == PSOUP__ISA_AVX512)
        return &psoup__gemm_kernels_avx512;
    if (context->isa == PSOUP__ISA_AVX2)
        return &psoup__gemm_kernels_avx2;
#endif
    return &psoup__gemm_kernels_generic;
}

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

struct packing {
    const psoup__gemm_kernels *kernel;
    const psoup__gemm_source *source;
    psoup__gemm_b *out;
};

/* One panel, in the dtype of B: vector after vector, each over all depths, so that who reads one column of vectors
 * reads memory in its order. Panel t lies at t · columns · k. */
static void pack_panel(void *arg, size_t task, int worker) {
    const struct packing *packing = arg;
    const psoup__gemm_source *source = packing->source;
    const int64_t k = packing->out->k, vector = packing->kernel->vector;
    const int64_t first = (int64_t)task * packing->kernel->columns;
    const int64_t end = smaller(first + packing->kernel->columns, packing->out->n);
    enum { RUN = 32 }; /* depths: a cache line of each column where depths are neighbours */
    for (int64_t j0 = first; j0 < end; j0 += vector) {
        const int64_t columns = smaller(vector, end - j0);
        if (source->dtype == PSOUP_F32) {
            packing->kernel->pack_b((float *)packing->out->panels + j0 * k, source, 0, k, j0, columns);
            continue;
        }
        uint16_t *out = (uint16_t *)packing->out->panels + j0 * k;
        const char *in = source->b;
        if (columns < vector)
            memset(out, 0, (size_t)(vector * k) * sizeof *out);
        for (int64_t p0 = 0; p0 < k; p0 += RUN)
            for (int64_t j = 0; j < columns; j++)
                for (int64_t p = p0; p < smaller(p0 + RUN, k); p++)
                    memcpy(&out[p * vector + j], in + (p * source->b_row + (j0 + j) * source->b_col) * 2, 2);
    }
}

struct psoup__gemm_room {
    size_t holders, used, bytes; /* holders: its maker and what lies in it */
    char *memory;
};

enum { LINE = 64 };

psoup_status psoup__gemm_room_create(psoup_context *context, size_t bytes, psoup__gemm_room **out, psoup_error *error) {
    *out = psoup__alloc(context, 1, sizeof **out, error);
    if (*out == NULL)
        return PSOUP_ERROR_MEMORY;
    **out = (psoup__gemm_room){.holders = 1, .bytes = bytes};
    (*out)->memory = psoup__alloc_unset(context, bytes, 1, error);
    if ((*out)->memory == NULL) {
        psoup__free(context, *out);
        *out = NULL;
        return PSOUP_ERROR_MEMORY;
    }
    return PSOUP_OK;
}

void psoup__gemm_room_drop(psoup_context *context, psoup__gemm_room *room) {
    if (room == NULL || --room->holders > 0)
        return;
    psoup__free(context, room->memory);
    psoup__free(context, room);
}

static void *take_room(psoup__gemm_room *room, size_t bytes) {
    char *taken = room->memory + room->used;
    room->used += (bytes + LINE - 1) / LINE * LINE;
    room->holders++;
    assert(room->used <= room->bytes);
    return taken;
}

psoup_status psoup__gemm_pack_in(psoup_context *context, psoup__gemm_room *room, const void *b, psoup_dtype dtype,
                                 int64_t k, int64_t n, int64_t b_row, int64_t b_col, psoup__gemm_b **out,
                                 psoup_error *error) {
    const psoup__gemm_kernels *kernel = psoup__gemm_kernels_of(context);
    const psoup__gemm_source source = {b, dtype, b_row, b_col, NULL};
    psoup__gemm_b *packed;
    size_t elements;
    *out = NULL;
    if (dtype != PSOUP_F32 && dtype != PSOUP_F16 && dtype != PSOUP_BF16)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "gemm: dtype of B is %s, expected f32, f16 or bf16",
                           psoup_dtype_name(dtype));
    if (k < 0 || n < 0 || n > INT64_MAX - kernel->columns)
        return psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                           "gemm: B is %lld × %lld, expected sizes of at least 0", (long long)k,
                           (long long)n);
    if (!psoup__multiply((size_t)(n + kernel->vector - 1) / kernel->vector * kernel->vector, (size_t)k, &elements))
        return psoup__out_of_memory(error, SIZE_MAX);
    packed = psoup__alloc(context, 1, sizeof *packed, error);
    if (packed == NULL)
        return PSOUP_ERROR_MEMORY;
    *packed = (psoup__gemm_b){.dtype = dtype, .k = k, .n = n, .room = room};
    packed->panels = room != NULL ? take_room(room, elements * psoup_dtype_size(dtype))
                                  : psoup__alloc_unset(context, elements, psoup_dtype_size(dtype), error);
    if (packed->panels == NULL) {
        psoup__free(context, packed);
        return PSOUP_ERROR_MEMORY;
    }
    if (elements > 0)
        psoup__parallel(context, (size_t)((n + kernel->columns - 1) / kernel->columns), pack_panel,
                        &(struct packing){kernel, &source, packed});
    *out = packed;
    return PSOUP_OK;
}

psoup_status psoup__gemm_pack(psoup_context *context, const void *b, psoup_dtype dtype, int64_t k, int64_t n,
                              int64_t b_row, int64_t b_col, psoup__gemm_b **out, psoup_error *error) {
    return psoup__gemm_pack_in(context, NULL, b, dtype, k, n, b_row, b_col, out, error);
}

size_t psoup__gemm_pack_bytes(const psoup_context *context, psoup_dtype dtype, int64_t k, int64_t n) {
    const int64_t vector = psoup__gemm_kernels_of(context)->vector;
    const size_t panels = (size_t)((n + vector - 1) / vector * vector) * (size_t)k * psoup_dtype_size(dtype);
    return sizeof(psoup__gemm_b) + (panels + LINE - 1) / LINE * LINE;
}

void psoup__gemm_b_free(psoup_context *context, psoup__gemm_b *packed) {
    if (packed == NULL)
        return;
    if (packed->room == NULL)
        psoup__free(context, packed->panels);
    psoup__gemm_room_drop(context, packed->room);
    psoup__free(context, packed);
}
