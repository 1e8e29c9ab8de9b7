/* Log-probs of chosen tokens. */
#include "checkops.h"

void check_loss(checker *c) {
}
