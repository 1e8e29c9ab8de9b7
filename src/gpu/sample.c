/* Drawing the next token. */
#include "gpu/internal.h"

void psoup__gpu_fill_sample(psoup__ops *ops) {
}
