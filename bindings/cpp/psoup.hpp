/* psoup.hpp: the whole of libpsoup for C++17, header-only, over psoup/psoup.h.
 *
 * Handles are move-only and free themselves; what a handle is made from must outlive it, as in C, which
 * the order of declaration in a scope gives by itself. Functions that can fail return psoup::result<T>.
 * Nothing here throws, and everything compiles with -fno-exceptions, unless you ask:
 *   - psoup::value_or_throw(result) gives the value or throws psoup::exception;
 *   - with PSOUP_CPP_EXCEPTIONS defined, so do result.value(), *result and result->.
 * What a callback of yours throws comes out of the call that ran it; that call is cancelled.
 *
 *     auto context = psoup::context::create();
 *     auto model = psoup::model::load(*context, "directory");
 *     if (!model) return report(model.error().message);
 *
 * Options are C's structs; psoup::defaults<psoup_sampling>() is what the INIT macro sets.
 */
#ifndef PSOUP_HPP
#define PSOUP_HPP

#include "psoup/comm.hpp"
#include "psoup/common.hpp"
#include "psoup/data.hpp"
#include "psoup/eval.hpp"
#include "psoup/merge.hpp"
#include "psoup/merge_gpu.hpp"
#include "psoup/model.hpp"
#include "psoup/ppo.hpp"
#include "psoup/train.hpp"

#endif
