/* SHA-256 through libmd. */
#include <sha2.h>

#include "merge/hash.h"

psoup_status psoup__sha256_file(psoup__file *file, char out[PSOUP__SHA256_TEXT], psoup_error *error) {
    enum { PIECE = 1 << 16 };
    static const char digits[] = "0123456789abcdef";
    unsigned char buffer[PIECE];
    SHA2_CTX state;
    uint8_t digest[SHA256_DIGEST_LENGTH];
    SHA256Init(&state);
    for (size_t at = 0; at < file->length; at += PIECE) {
        size_t n = file->length - at < PIECE ? file->length - at : PIECE;
        if (!psoup__file_at(file, at, n, buffer))
            return psoup__file_check(file, "", error);
        SHA256Update(&state, buffer, n);
    }
    SHA256Final(digest, &state);
    for (int i = 0; i < SHA256_DIGEST_LENGTH; i++) {
        out[2 * i] = digits[digest[i] >> 4];
        out[2 * i + 1] = digits[digest[i] & 15];
    }
    out[64] = '\0';
    return PSOUP_OK;
}
