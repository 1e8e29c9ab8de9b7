/* cuda/upload.h: host data that crosses inside a launch. See kernels.h. */
#ifndef PSOUP__UPLOAD_H
#define PSOUP__UPLOAD_H

#include <stdint.h>

/* What a launch carries at most: 4 KiB, less the rest of the struct. */
enum { PSOUP__CARRIED = 4096 - 16 };

/* out[0 … n) = data: one block. */
typedef struct psoup__carry_args {
    uint8_t *out;
    int32_t n, spare;
    uint8_t data[PSOUP__CARRIED];
} psoup__carry_args;

#define PSOUP__UPLOAD_KERNELS(X) X(carry, carry)

#endif
