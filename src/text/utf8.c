/* UTF-8, the alphabet of bytes, and aligned text. */
#include "text/text.h"

#include <string.h>

size_t psoup__utf8_next(const char *text, size_t length, uint32_t *code) {
    const unsigned char *s = (const unsigned char *)text;
    unsigned char lead = s[0];
    if (lead < 0x80) {
        *code = lead;
        return 1;
    }
    /* The second byte's range depends on the lead: no overlong forms, surrogates or codes past
     * U+10FFFF (Unicode 15, table 3-7). */
    size_t need = 0;
    unsigned char low = 0x80, high = 0xBF;
    if (lead >= 0xC2 && lead <= 0xDF) {
        need = 1;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
        need = 2;
        low = lead == 0xE0 ? 0xA0 : 0x80;
        high = lead == 0xED ? 0x9F : 0xBF;
    } else if (lead >= 0xF0 && lead <= 0xF4) {
        need = 3;
        low = lead == 0xF0 ? 0x90 : 0x80;
        high = lead == 0xF4 ? 0x8F : 0xBF;
    }
    *code = 0xFFFD;
    if (need == 0)
        return 1;
    uint32_t value = lead & (0x3Fu >> need);
    for (size_t i = 1; i <= need; i++) {
        if (i >= length || s[i] < low || s[i] > high)
            return i;
        value = value << 6 | (s[i] & 0x3Fu);
        low = 0x80;
        high = 0xBF;
    }
    *code = value;
    return need + 1;
}

size_t psoup__utf8_put(uint32_t code, char out[4]) {
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    if (code < 0x800) {
        out[0] = (char)(0xC0 | code >> 6);
        out[1] = (char)(0x80 | (code & 0x3F));
        return 2;
    }
    if (code < 0x10000) {
        out[0] = (char)(0xE0 | code >> 12);
        out[1] = (char)(0x80 | (code >> 6 & 0x3F));
        out[2] = (char)(0x80 | (code & 0x3F));
        return 3;
    }
    out[0] = (char)(0xF0 | code >> 18);
    out[1] = (char)(0x80 | (code >> 12 & 0x3F));
    out[2] = (char)(0x80 | (code >> 6 & 0x3F));
    out[3] = (char)(0x80 | (code & 0x3F));
    return 4;
}

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
