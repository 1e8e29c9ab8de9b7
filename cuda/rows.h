/* cuda/rows.h: rows found by number: embedding, gathering, scalar heads. See kernels.h. */
#ifndef PSOUP__ROWS_H
#define PSOUP__ROWS_H

#include <stdint.h>

#define PSOUP__ROWS_KERNELS(X)

#endif
