/* psoup_safetensors_write: the caller's tensors to a file. */
#include "format/format.h"

psoup_status psoup_safetensors_write(psoup_context *context, const char *path,
                                     const psoup_named_tensor *tensors, size_t n,
                                     psoup_error *error) {
    psoup__safetensors_writer *writer = NULL;
    psoup_status status;
    PSOUP__TRY(psoup__safetensors_create(context, path, &writer, error));
    for (size_t i = 0; i < n; i++)
        PSOUP__TRY(psoup__safetensors_declare(writer, tensors[i].name, tensors[i].dtype,
                                              tensors[i].rank, tensors[i].shape, error));
    PSOUP__TRY(psoup__safetensors_begin(writer, error));
    for (size_t i = 0; i < n; i++) {
        size_t bytes = psoup_dtype_size(tensors[i].dtype);
        for (int32_t d = 0; d < tensors[i].rank; d++)
            if (tensors[i].shape[d] < 0 ||
                !psoup__multiply(bytes, (size_t)tensors[i].shape[d], &bytes))
                PSOUP__TRY(psoup__fail(error, PSOUP_ERROR_ARGUMENT,
                                       "%s: %s: its shape is negative or too large", path,
                                       tensors[i].name));
        PSOUP__TRY(psoup__safetensors_write(writer, tensors[i].data, bytes, error));
    }
    PSOUP__TRY(psoup__safetensors_commit(writer, error));
fail:
    psoup__safetensors_writer_free(writer);
    return status;
}
