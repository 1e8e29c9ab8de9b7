/* The one primitive: a frozen linear layer plus each row's own mix of adapters. */
#include "checkops.h"

void check_linear_mix(checker *c) {
}
