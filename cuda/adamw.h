/* cuda/adamw.h: the optimiser. See kernels.h. */
#ifndef PSOUP__ADAMW_H
#define PSOUP__ADAMW_H

#include <stdint.h>

#define PSOUP__ADAMW_KERNELS(X)

#endif
