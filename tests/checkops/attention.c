/* Causal attention over spans. */
#include "checkops.h"

void check_attention(checker *c) {
}
