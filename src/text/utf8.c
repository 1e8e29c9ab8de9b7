/* UTF-8, the alphabet of bytes, and aligned text. */
#include "text/text.h"

#include <string.h>

bool psoup__is_space(uint32_t code) {
    return (code >= 9 && code <= 13) || code == 0x20 || code == 0x85 || code == 0xA0 ||
           code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 ||
           code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
}

/* The alphabet keeps the bytes that print in Latin-1 (33–126, 161–172, 174–255) and numbers the
 * others from U+0100 in their order (openai/gpt-2, encoder.py, bytes_to_unicode). */
uint32_t psoup__byte_to_char(unsigned char byte) {
    if (byte <= 32)
        return 0x100u + byte;
    if (byte >= 127 && byte <= 160)
        return 0x100u + 33 + (byte - 127u);
    return byte == 173 ? 0x100u + 67 : byte;
}

int psoup__char_to_byte(uint32_t code) {
    if ((code >= 33 && code <= 126) || (code >= 161 && code <= 255 && code != 173))
        return (int)code;
    if (code >= 0x100 && code <= 0x100 + 32)
        return (int)(code - 0x100);
    if (code > 0x100 + 32 && code < 0x100 + 67)
        return (int)(code - 0x100 - 33 + 127);
    return code == 0x100 + 67 ? 173 : -1;
}

static psoup_status grow(psoup__aligned *text, size_t n, psoup_error *error) {
    size_t need;
    if (!psoup__add(text->length, n, &need) || need > text->limit)
        return psoup__fail(error, PSOUP_ERROR_UNSUPPORTED,
                           "the tokenizer's normalizer would grow the text past %zu bytes",
                           text->limit);
    psoup_status status = psoup__reserve(text->context, &text->bytes, &text->bytes_capacity, need,
                                         sizeof *text->bytes, error);
    if (status == PSOUP_OK)
        status = psoup__reserve(text->context, &text->source, &text->source_capacity, need,
                                sizeof *text->source, error);
    return status;
}

psoup_status psoup__aligned_append(psoup__aligned *text, const char *bytes,
                                   const psoup_offset *source, size_t n, psoup_error *error) {
    if (n == 0)
        return PSOUP_OK;
    psoup_status status = grow(text, n, error);
    if (status != PSOUP_OK)
        return status;
    memcpy(text->bytes + text->length, bytes, n);
    memcpy(text->source + text->length, source, n * sizeof *source);
    text->length += n;
    return PSOUP_OK;
}

psoup_status psoup__aligned_put(psoup__aligned *text, const char *bytes, size_t n,
                                psoup_offset source, psoup_error *error) {
    if (n == 0)
        return PSOUP_OK;
    psoup_status status = grow(text, n, error);
    if (status != PSOUP_OK)
        return status;
    memcpy(text->bytes + text->length, bytes, n);
    for (size_t i = 0; i < n; i++)
        text->source[text->length + i] = source;
    text->length += n;
    return PSOUP_OK;
}

psoup_status psoup__aligned_read(psoup__aligned *text, const char *bytes, size_t n,
                                 psoup_error *error) {
    for (size_t i = 0; i < n;) {
        uint32_t code;
        char out[4];
        size_t used = psoup__utf8_next(bytes + i, n - i, &code);
        size_t written = psoup__utf8_put(code, out);
        psoup_status status =
            psoup__aligned_put(text, out, written, (psoup_offset){i, i + used}, error);
        if (status != PSOUP_OK)
            return status;
        i += used;
    }
    return PSOUP_OK;
}

void psoup__aligned_free(psoup__aligned *text) {
    psoup__free(text->context, text->bytes);
    psoup__free(text->context, text->source);
    text->bytes = NULL;
    text->source = NULL;
    text->length = text->bytes_capacity = text->source_capacity = 0;
}
