/* cuda/attention.h: causal attention over spans, forward and backward. See kernels.h. */
#ifndef PSOUP__ATTENTION_H
#define PSOUP__ATTENTION_H

#include <stdint.h>

#define PSOUP__ATTENTION_KERNELS(X)

#endif
