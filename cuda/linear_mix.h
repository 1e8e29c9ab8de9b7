/* cuda/linear_mix.h: the adapters' part of a linear layer. See kernels.h. */
#ifndef PSOUP__LINEAR_MIX_H
#define PSOUP__LINEAR_MIX_H

#include <stdint.h>

#define PSOUP__LINEAR_MIX_KERNELS(X)

#endif
