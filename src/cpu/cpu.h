/* src/cpu: the ops on the CPU, in f32, compiled once per instruction set. */
#ifndef PSOUP__CPU_H
#define PSOUP__CPU_H

#include "ops.h"

psoup_status psoup__cpu_create(psoup_context *context, psoup__backend **out, psoup_error *error);
/* freed by (*out)->ops->free */

#endif
