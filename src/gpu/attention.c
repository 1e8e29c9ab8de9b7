/* Causal attention over spans. */
#include "gpu/internal.h"

void psoup__gpu_fill_attention(psoup__ops *ops) {
}
