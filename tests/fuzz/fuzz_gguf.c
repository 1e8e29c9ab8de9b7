/* Any bytes as a GGUF file: refused with a message, or every value and tensor is there, and what its metadata
 * says becomes a config.json and a tokenizer.json or is refused with a message. */
#include <stdlib.h>
#include <string.h>

#include "format/gguf.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length);

static void check(psoup_status status, const psoup_error *error) {
    if (status != PSOUP_OK && (error->message[0] == '\0' || strchr(error->message, '\n') != NULL))
        abort();
}

/* Touches all that the file is said to hold. */
static void walk(const psoup__gguf *file, size_t length) {
    unsigned sum = 0;
    size_t bytes = 0;
    for (size_t i = 0; i < psoup__gguf_values(file); i++) {
        const psoup__gguf_value *value = psoup__gguf_value_at(file, i);
        for (size_t k = 0; k < value->bytes; k++)
            sum += value->data[k];
        sum += (unsigned)psoup__gguf_integer(file, value->key, 0);
        if (value->element != PSOUP__GGUF_STRING)
            continue;
        const unsigned char *at = value->data;
        for (size_t k = 0; k < value->count; k++) {
            const char *text;
            size_t n;
            psoup__gguf_next_string(&at, &text, &n);
            sum += n > 0 ? (unsigned char)text[n - 1] : 0;
        }
        if (at != value->data + value->bytes)
            abort();
    }
    for (size_t i = 0; i < psoup__gguf_count(file); i++) {
        const psoup__tensor *tensor = psoup__gguf_tensor(file, i);
        char name[PSOUP__GGUF_NAME];
        for (size_t k = 0; k < tensor->bytes; k++)
            sum += ((const unsigned char *)tensor->data)[k];
        bytes += tensor->bytes;
        sum += psoup__gguf_to_hf(psoup__gguf_name(file, i), name);
        sum += psoup__gguf_to_peft(psoup__gguf_name(file, i), name);
    }
    if (bytes > length || (sum == 1 && length == 0))
        abort();
}

/* The tensors as a model's or an adapter's, read in Hugging Face's order from the middle of rows. */
static void read_in_order(psoup_context *context, const psoup__gguf *file) {
    psoup__gguf_layout layout;
    psoup_error error = {0};
    psoup_status status = psoup__gguf_layout_of(file, &layout, &error);
    check(status, &error);
    for (size_t i = 0; status == PSOUP_OK && i < psoup__gguf_count(file); i++) {
        psoup__tensor tensor = *psoup__gguf_tensor(file, i);
        char name[PSOUP__GGUF_NAME];
        float values[100];
        size_t n;
        if (!psoup__gguf_to_hf(psoup__gguf_name(file, i), name) &&
            !psoup__gguf_to_peft(psoup__gguf_name(file, i), name))
            continue;
        psoup_status known = psoup__gguf_set_heads(&layout, "fuzz", name, name, &tensor, &error);
        check(known, &error);
        if (known != PSOUP_OK || !psoup__tensor_elements(&tensor, &n))
            continue;
        for (size_t at = 0; at < n && at < 10000; at += 77)
            psoup__tensor_read(context, &tensor, at, n - at < 100 ? n - at : 100, values);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length) {
    static psoup_context *context;
    psoup_context_options options = PSOUP_CONTEXT_OPTIONS_INIT;
    psoup_model_config config;
    psoup_json *tokenizer, *settings;
    psoup__gguf *file;
    psoup_error error = {0};
    options.threads = 1;
    if (context == NULL && psoup_context_create(&options, &context, &error) != PSOUP_OK)
        abort();
    psoup_status status = psoup__gguf_parse(context, data, length, "fuzz", &file, &error);
    check(status, &error);
    if (status != PSOUP_OK)
        return file != NULL ? abort(), 0 : 0;
    walk(file, length);
    read_in_order(context, file);
    check(psoup__gguf_read_config(file, &config, &error), &error);
    check(psoup__gguf_tokenizer_json(context, file, &config, &tokenizer, &settings, &error), &error);
    psoup_json_free(tokenizer);
    psoup_json_free(settings);
    psoup__gguf_free(file);
    return 0;
}
