/* cuda/sample.h: drawing the next token. See kernels.h. */
#ifndef PSOUP__SAMPLE_H
#define PSOUP__SAMPLE_H

#include <stdint.h>

#define PSOUP__SAMPLE_KERNELS(X)

#endif
