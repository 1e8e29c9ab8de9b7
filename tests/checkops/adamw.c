/* The optimiser. */
#include "checkops.h"

void check_adamw(checker *c) {
}
