/* Any bytes as a JSON text: refused with a message of one line, or a value that, printed and read
 * again, prints the same. */
#include <stdlib.h>
#include <string.h>

#include "base/base.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length) {
    psoup_json *value, *again;
    psoup_error error = {0};
    if (psoup_json_parse((const char *)data, length, "fuzz", &value, &error) != PSOUP_OK) {
        if (value != NULL || error.message[0] == '\0' || strchr(error.message, '\n') != NULL ||
            !psoup__is_utf8(error.message))
            abort();
        return 0;
    }
    char *text = psoup_json_text(value, length % 3);
    if (text == NULL || psoup_json_parse(text, strlen(text), "text", &again, &error) != PSOUP_OK)
        abort();
    char *second = psoup_json_text(again, length % 3);
    if (second == NULL || strcmp(text, second) != 0)
        abort();
    psoup_text_free(second);
    psoup_text_free(text);
    psoup_json_free(again);
    psoup_json_free(value);
    return 0;
}
