/* The one primitive: a frozen linear layer plus each row's own mix of adapters. */
#include "gpu/internal.h"

void psoup__gpu_fill_linear_mix(psoup__ops *ops) {
}
