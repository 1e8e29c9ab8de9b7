/* Any text as a config.json and as an adapter_config.json; and, cut at its first NUL, as a pattern's key
 * and the module it is held against. */
#include <stdlib.h>
#include <string.h>

#include "format/format.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length);

static void check_message(psoup_status status, const psoup_error *error) {
    if (status != PSOUP_OK && (error->message[0] == '\0' || strchr(error->message, '\n') != NULL))
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length) {
    psoup_model_config config;
    psoup_json *adapter;
    psoup_error error = {0};
    psoup_status status =
        psoup__hf_config_parse((const char *)data, length, "fuzz", &config, &error);
    check_message(status, &error);
    if (status == PSOUP_OK && (config.head_dim < 2 || config.num_key_value_heads < 1 ||
                               config.num_attention_heads % config.num_key_value_heads != 0))
        abort();
    memset(&error, 0, sizeof error);
    status = psoup__peft_config_parse((const char *)data, length, "fuzz", &adapter, &error);
    check_message(status, &error);
    psoup_json_free(adapter);

    char *text = malloc(length + 2);
    bool matched;
    if (text == NULL)
        return 0;
    if (length > 0)
        memcpy(text, data, length);
    text[length] = text[length + 1] = '\0';
    memset(&error, 0, sizeof error);
    check_message(psoup__peft_match(text, text + strlen(text) + 1, "fuzz", &matched, &error), &error);
    free(text);
    return 0;
}
