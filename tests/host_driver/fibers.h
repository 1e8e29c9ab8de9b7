/* A launch on the CPU. */
#ifndef PSOUP__FIBERS_H
#define PSOUP__FIBERS_H

#include "host_device.h"

namespace host {
struct entry {
    const char *name;
    size_t args_size;
    unsigned most_threads;
    kernel call;
};
const entry *find(const char *name); /* NULL: no such kernel */
/* Runs every block. `order` is how the blocks, and a block's threads between barriers, take turns: 0 ascending,
 * 1 descending, 2 mixed. What a correct kernel computes does not depend on it. */
void run(const entry *kernel, index grid, unsigned threads, size_t shared_bytes, const void *args, int order);
} // namespace host

#endif
