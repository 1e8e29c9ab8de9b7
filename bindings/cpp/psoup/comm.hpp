/* psoup/comm.hpp: several processes that train one run. See psoup.hpp. */
#ifndef PSOUP_COMM_HPP
#define PSOUP_COMM_HPP

#include <cstdlib>
#include <optional>

#include "psoup/comm.h"
#include "psoup/common.hpp"

namespace psoup {

PSOUP_CPP_QUIET_BEGIN
PSOUP_CPP_DEFAULTS(psoup_comm_options, PSOUP_COMM_OPTIONS_INIT)
PSOUP_CPP_QUIET_END

/* Who this process is, by its environment; options.world is 1 where nothing launched it as one of many. */
inline result<psoup_comm_options> launched() {
    auto options = defaults<psoup_comm_options>();
    const auto variable = [](void *, const char *name) -> const char * { return std::getenv(name); };
    auto done = detail::call(psoup_comm_launch, static_cast<psoup_variable_fn>(variable),
                             static_cast<void *>(nullptr), &options);
    if (!done) return done.error();
    return options;
}

/* What the `comm` of a trainer's options points to: options.comm = c.get(). */
class comm : public handle<psoup_comm, psoup_comm_free> {
public:
    using handle::handle;
    static result<comm> tcp(const context &c, const psoup_comm_options &options) {
        return detail::make<comm>(psoup_comm_tcp_create, c.get(), &options);
    }
    /* `host` has to outlive it. */
    static result<comm> nccl(const context &c, const comm &host) {
        return detail::make<comm>(psoup_comm_nccl_create, c.get(), static_cast<const psoup_comm *>(host.get()));
    }
    int rank() const { return get()->rank; }
    int world() const { return get()->world; }
};

} // namespace psoup

#endif
