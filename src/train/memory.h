/* src/train/memory.h: what plans of runs are summed from. */
#ifndef PSOUP__TRAIN_MEMORY_H
#define PSOUP__TRAIN_MEMORY_H

#include "model/measure.h"
#include "train/train.h"

/* Adds a tape and its pack, which live as long as the run; `reserved` keeps the ops' largest. */
psoup_status psoup__add_pass(psoup_model *model, const psoup__extent *e, psoup_memory *memory, int64_t *reserved,
                             psoup_error *error);
/* Rows of the largest of the passes that so many items of equal length make (pack.c, psoup__plan). */
int64_t psoup__pass_rows(int64_t items, int64_t length, int64_t bound);
/* What one adapter's learning takes; *kept receives what of it stays on the host. */
int64_t psoup__learning_bytes(int64_t count, bool best, int64_t *kept);
int64_t psoup__checkpoint_bytes(const char *directory);

#endif
