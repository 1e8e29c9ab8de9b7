/* Log-probs of chosen tokens. */
#include "gpu/internal.h"

void psoup__gpu_fill_loss(psoup__ops *ops) {
}
