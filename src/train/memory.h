/* src/train/memory.h: what plans of runs are summed from. */
#ifndef PSOUP__TRAIN_MEMORY_H
#define PSOUP__TRAIN_MEMORY_H

#include "model/measure.h"
#include "train/train.h"

/* Passes of one kind: as many as `at_once` runners have one of this extent at a time. */
typedef struct psoup__use {
    psoup__extent extent;
    int64_t at_once;
} psoup__use;
enum { PSOUP__USES = 4 };
/* Adds the tapes and packs of runners that have all of these, which live as long as the run; `reserved` keeps the ops'
 * largest. */
psoup_status psoup__add_passes(psoup_model *model, const psoup__use *uses, int n, psoup_memory *memory,
                               int64_t *reserved, psoup_error *error);
/* What one adapter's learning takes, or the base's (model NULL); *kept receives what of it stays on the host. */
int64_t psoup__learning_bytes(const psoup_model *model, int64_t count, bool best, int64_t *kept);
/* Of an item's places in the lists of a run (passes.c), which may have doubled. */
enum { PSOUP__ITEM_BYTES = 2 * (8 + 8 + 4 + 4) };
int64_t psoup__checkpoint_bytes(const char *directory);

#endif
