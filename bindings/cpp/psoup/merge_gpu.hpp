/* psoup/merge_gpu.hpp: merging on a GPU. See psoup.hpp. */
#ifndef PSOUP_MERGE_GPU_HPP
#define PSOUP_MERGE_GPU_HPP

#include "psoup/merge.hpp"
#include "psoup/merge_gpu.h"

namespace psoup {

/* While it lives, merge_views, merge_fold_view and merge_copy of its context take views on the device. */
class gpu_merge : public handle<psoup_gpu_merge, psoup_gpu_merge_free> {
public:
    using handle::handle;
    static result<gpu_merge> create(const context &c) {
        return detail::make<gpu_merge>(psoup_gpu_merge_create, c.get());
    }
};

} // namespace psoup

#endif
