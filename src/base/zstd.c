/* src/base/zstd.c: the one file that knows the Zstandard library. */
#include "base/internal.h"

#include <zstd.h>
#include <zstd_errors.h>

struct psoup__unzstd {
    psoup_context *context;
    const char *path; /* borrowed from the owner */
    ZSTD_DStream *stream;
    size_t expects; /* 0 at the edge of a frame */
    bool any;
};

psoup_status psoup__unzstd_create(psoup_context *context, const char *path, psoup__unzstd **out,
                                  psoup_error *error) {
    *out = NULL;
    psoup__unzstd *z = psoup__alloc(context, 1, sizeof *z, error);
    if (z == NULL)
        return PSOUP_ERROR_MEMORY;
    z->context = context;
    z->path = path;
    z->stream = ZSTD_createDStream();
    if (z->stream == NULL) {
        psoup__unzstd_free(z);
        return psoup__fail(error, PSOUP_ERROR_MEMORY, "%s: out of memory for decompression", path);
    }
    *out = z;
    return PSOUP_OK;
}

psoup_status psoup__unzstd_step(psoup__unzstd *z, const unsigned char **in, size_t *in_length,
                                void *out, size_t capacity, size_t *got, psoup_error *error) {
    ZSTD_inBuffer from = {*in, *in_length, 0};
    ZSTD_outBuffer to = {out, capacity, 0};
    size_t result = ZSTD_decompressStream(z->stream, &to, &from);
    if (ZSTD_isError(result) && ZSTD_getErrorCode(result) == ZSTD_error_memory_allocation)
        return psoup__fail(error, PSOUP_ERROR_MEMORY, "%s: out of memory for decompression",
                           z->path);
    if (ZSTD_isError(result))
        return psoup__fail(error, PSOUP_ERROR_FORMAT, "%s: not valid Zstandard: %s", z->path,
                           ZSTD_getErrorName(result));
    /* called with nothing to read at a frame's edge, it asks for the next frame's header */
    if (from.pos > 0 || to.pos > 0) {
        z->expects = result;
        z->any = true;
    }
    *in += from.pos;
    *in_length -= from.pos;
    *got = to.pos;
    return PSOUP_OK;
}

bool psoup__unzstd_at_end(const psoup__unzstd *z) {
    return z->any && z->expects == 0;
}

void psoup__unzstd_free(psoup__unzstd *z) {
    if (z == NULL)
        return;
    ZSTD_freeDStream(z->stream);
    psoup__free(z->context, z);
}

struct psoup__tozstd {
    psoup_context *context;
    const char *path; /* borrowed from the owner */
    ZSTD_CStream *stream;
};

psoup_status psoup__tozstd_create(psoup_context *context, const char *path, psoup__tozstd **out,
                                  psoup_error *error) {
    *out = NULL;
    psoup__tozstd *z = psoup__alloc(context, 1, sizeof *z, error);
    if (z == NULL)
        return PSOUP_ERROR_MEMORY;
    z->context = context;
    z->path = path;
    z->stream = ZSTD_createCStream();
    if (z->stream == NULL ||
        ZSTD_isError(ZSTD_CCtx_setParameter(z->stream, ZSTD_c_checksumFlag, 1))) {
        psoup__tozstd_free(z);
        return psoup__fail(error, PSOUP_ERROR_MEMORY, "%s: out of memory for compression", path);
    }
    *out = z;
    return PSOUP_OK;
}

psoup_status psoup__tozstd_step(psoup__tozstd *z, const unsigned char **in, size_t *in_length,
                                bool finish, void *out, size_t capacity, size_t *got, bool *done,
                                psoup_error *error) {
    ZSTD_inBuffer from = {*in, *in_length, 0};
    ZSTD_outBuffer to = {out, capacity, 0};
    size_t left =
        ZSTD_compressStream2(z->stream, &to, &from, finish ? ZSTD_e_end : ZSTD_e_continue);
    if (ZSTD_isError(left))
        return psoup__fail(error, PSOUP_ERROR_MEMORY, "%s: cannot compress: %s", z->path,
                           ZSTD_getErrorName(left));
    *in += from.pos;
    *in_length -= from.pos;
    *got = to.pos;
    *done = *in_length == 0 && (!finish || left == 0);
    return PSOUP_OK;
}

void psoup__tozstd_free(psoup__tozstd *z) {
    if (z == NULL)
        return;
    ZSTD_freeCStream(z->stream);
    psoup__free(z->context, z);
}
