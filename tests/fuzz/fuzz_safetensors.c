/* Any bytes as a safetensors file: refused with a message, or every byte of every tensor is there. */
#include <stdlib.h>
#include <string.h>

#include "format/format.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length) {
    static psoup_context *context;
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup__safetensors *file;
    psoup_error error = {0};
    options.threads = 1;
    if (context == NULL && psoup_context_create(&options, &context, &error) != PSOUP_OK)
        abort();
    if (psoup__safetensors_parse(context, data, length, "fuzz", &file, &error) != PSOUP_OK) {
        if (file != NULL || error.message[0] == '\0' || strchr(error.message, '\n') != NULL)
            abort();
        return 0;
    }
    unsigned sum = 0;
    size_t bytes = 0;
    for (size_t i = 0; i < psoup__safetensors_count(file); i++) {
        const psoup__tensor *tensor = psoup__safetensors_tensor(file, i);
        for (size_t k = 0; k < tensor->bytes; k++)
            sum += ((const unsigned char *)tensor->data)[k];
        bytes += tensor->bytes;
    }
    if (bytes > length || (bytes == 0 && sum != 0))
        abort();
    psoup__safetensors_free(file);
    return 0;
}
