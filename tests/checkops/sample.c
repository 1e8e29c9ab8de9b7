/* Drawing the next token. */
#include "checkops.h"

void check_sample(checker *c) {
}
