/* cuda/loss.h: log-probs of chosen tokens. See kernels.h. */
#ifndef PSOUP__LOSS_H
#define PSOUP__LOSS_H

#include <stdint.h>

#define PSOUP__LOSS_KERNELS(X)

#endif
