/* psoup/merge.hpp: the merger. It needs libpsoup-merge alone. See psoup.hpp. */
#ifndef PSOUP_MERGE_HPP
#define PSOUP_MERGE_HPP

#include "psoup/common.hpp"
#include "psoup/merge.h"

namespace psoup {

PSOUP_CPP_QUIET_BEGIN
PSOUP_CPP_DEFAULTS(psoup_merger_options, PSOUP_MERGER_OPTIONS_INIT)
PSOUP_CPP_QUIET_END

class merger : public handle<psoup_merger, psoup_merger_free> {
public:
    using handle::handle;
    static result<merger> create(const context &c, psoup_merger_options options = defaults<psoup_merger_options>(),
                                 psoup::progress progress = {}) {
        std::unique_ptr<detail::progress_callback> kept;
        if (progress) {
            kept = std::make_unique<detail::progress_callback>(std::move(progress));
            options.progress = detail::run_progress;
            options.progress_user = kept.get();
        }
        auto made = detail::make<merger>(psoup_merger_create, c.get(), &options);
        if (made) made->progress_ = made->keep(std::move(kept));
        return made;
    }
    result<void> set_base(const std::string &path) {
        return detail::call(psoup_merger_set_base, get(), path.c_str());
    }
    result<void> add(const std::string &path, double weight) {
        return detail::call(psoup_merger_add, get(), path.c_str(), weight);
    }
    result<void> set_weights(span<const double> weights) {
        return detail::call(psoup_merger_set_weights, get(), weights.data(), weights.size());
    }
    result<void> write(const std::string &directory) {
        return run(psoup_merger_write, directory.c_str());
    }
    result<psoup_merge_report> report() const {
        auto out = defaults<psoup_merge_report>();
        auto done = detail::call(psoup_merger_report, static_cast<const psoup_merger *>(get()), &out);
        if (!done) return done.error();
        return out;
    }

private:
    template <class F, class... A> result<void> run(F f, A... arguments) {
        auto done = detail::call(f, get(), arguments...);
        if (progress_) progress_->rethrow();
        return done;
    }
    detail::progress_callback *progress_ = nullptr;
};

/* ---- in memory ------------------------------------------------------------------------------------- */

namespace detail {
inline error counts(const char *what, std::size_t n, std::size_t weights) {
    return error(PSOUP_ERROR_ARGUMENT, "there are " + std::to_string(n) + " " + what + " and " +
                                           std::to_string(weights) + " weights");
}
} // namespace detail

/* out[j] = Σ_i weights[i] · in[i][j], j < n. */
inline result<void> merge_sum(const context &c, void *out, psoup_dtype out_dtype, span<const void *const> in,
                              psoup_dtype in_dtype, span<const double> weights, std::size_t n) {
    if (in.size() != weights.size()) return detail::counts("inputs", in.size(), weights.size());
    return detail::call(psoup_merge_sum, c.get(), out, out_dtype, in.data(), in_dtype, weights.data(), in.size(), n);
}

inline result<void> merge_fold(const context &c, void *out, const void *base, psoup_dtype dtype,
                               std::int64_t out_features, std::int64_t in_features,
                               span<const psoup_lora_factors> factors, span<const double> weights) {
    if (factors.size() != weights.size()) return detail::counts("adapters", factors.size(), weights.size());
    return detail::call(psoup_merge_fold, c.get(), out, base, dtype, out_features, in_features, factors.data(),
                        weights.data(), factors.size());
}

/* a_out [rank, in], b_out [out, rank]. Returns ‖merged − exact‖ / ‖exact‖. */
inline result<double> merge_factors(const context &c, psoup_merge_method method, span<float> a_out,
                                    span<float> b_out, std::int32_t rank, std::int64_t out_features,
                                    std::int64_t in_features, span<const psoup_lora_factors> factors,
                                    span<const double> weights) {
    if (factors.size() != weights.size()) return detail::counts("adapters", factors.size(), weights.size());
    if (rank < 1 || out_features < 1 || in_features < 1 ||
        a_out.size() / static_cast<std::size_t>(rank) < static_cast<std::size_t>(in_features) ||
        b_out.size() / static_cast<std::size_t>(rank) < static_cast<std::size_t>(out_features))
        return error(PSOUP_ERROR_ARGUMENT, "the buffers are too small for rank " + std::to_string(rank));
    double relative = 0;
    auto done = detail::call(psoup_merge_factors, c.get(), method, a_out.data(), b_out.data(), rank, out_features,
                             in_features, factors.data(), weights.data(), factors.size(), &relative);
    if (!done) return done.error();
    return relative;
}

} // namespace psoup

#endif
