/* The optimiser. */
#include "gpu/internal.h"

void psoup__gpu_fill_adamw(psoup__ops *ops) {
}
