/* SHA-256 through libmd. */
#include <sha2.h>

#include "merge/hash.h"

psoup_status psoup__sha256_file(psoup_context *context, const char *path, char out[PSOUP__SHA256_TEXT],
                                psoup_error *error) {
    static const char digits[] = "0123456789abcdef";
    psoup__file file;
    SHA2_CTX state;
    uint8_t digest[SHA256_DIGEST_LENGTH];
    psoup_status status = psoup__file_map(context, path, &file, error);
    if (status != PSOUP_OK)
        return status;
    SHA256Init(&state);
    SHA256Update(&state, file.data, file.length);
    SHA256Final(digest, &state);
    psoup__file_unmap(context, &file);
    for (int i = 0; i < SHA256_DIGEST_LENGTH; i++) {
        out[2 * i] = digits[digest[i] >> 4];
        out[2 * i + 1] = digits[digest[i] & 15];
    }
    out[64] = '\0';
    return PSOUP_OK;
}
