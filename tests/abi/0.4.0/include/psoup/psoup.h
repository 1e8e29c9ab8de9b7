/* psoup/psoup.h: the whole of libpsoup. */
#ifndef PSOUP_H
#define PSOUP_H

#include "psoup/comm.h"
#include "psoup/common.h"
#include "psoup/data.h"
#include "psoup/eval.h"
#include "psoup/merge.h"
#include "psoup/merge_gpu.h"
#include "psoup/model.h"
#include "psoup/train.h"

#endif
