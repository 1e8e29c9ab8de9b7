/* cuda/attention_decode.h: attention of few queries over a cache. See kernels.h. */
#ifndef PSOUP__ATTENTION_DECODE_H
#define PSOUP__ATTENTION_DECODE_H

#include <stdint.h>

#define PSOUP__ATTENTION_DECODE_KERNELS(X)

#endif
