/* src/base/utf8.c: UTF-8, read and written. */
#include "base/base.h"

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

bool psoup__is_replacement(const char *bytes, size_t length) {
    return length == 3 && memcmp(bytes, "\xEF\xBF\xBD", 3) == 0;
}

bool psoup__is_utf8(const char *text) {
    for (size_t i = 0, n = strlen(text); i < n;) {
        uint32_t code;
        size_t used = psoup__utf8_next(text + i, n - i, &code);
        if (code == 0xFFFD && !psoup__is_replacement(text + i, used))
            return false;
        i += used;
    }
    return true;
}
