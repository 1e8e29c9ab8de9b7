/* cuda/interpolate.h: weighted sums of tensors, and adapters folded into them. See kernels.h. */
#ifndef PSOUP__INTERPOLATE_H
#define PSOUP__INTERPOLATE_H

#include <stdint.h>

#define PSOUP__INTERPOLATE_KERNELS(X)

#endif
