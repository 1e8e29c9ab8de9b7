/* psoup/merge.hpp: the merger. It needs libpsoup-merge alone. See psoup.hpp. */
#ifndef PSOUP_MERGE_HPP
#define PSOUP_MERGE_HPP

#include "psoup/data.hpp"
#include "psoup/merge.h"

namespace psoup {

PSOUP_CPP_QUIET_BEGIN
PSOUP_CPP_DEFAULTS(psoup_merger_options, PSOUP_MERGER_OPTIONS_INIT)
PSOUP_CPP_DEFAULTS(psoup_merge_sink, PSOUP_MERGE_SINK_INIT)
PSOUP_CPP_DEFAULTS(psoup_merge_tensors, PSOUP_MERGE_TENSORS_INIT)
PSOUP_CPP_QUIET_END

inline const char *merge_method_name(std::int32_t method) { return psoup_merge_method_name(method); }
inline result<std::int32_t> parse_merge_method(const std::string &name) {
    std::int32_t out = 0;
    auto done = detail::call(psoup_merge_method_parse, name.c_str(), &out);
    if (!done) return done.error();
    return out;
}

/* A full model that the caller holds; the data are borrowed as long as the merger is. Tensors whose data are
 * null come from `read`: bytes offset … offset + bytes − 1 of tensor `index` into out, from several threads at
 * once; return false for "cannot". */
struct tensors {
    std::string name; /* in messages */
    span<const psoup_named_tensor> list;
    std::function<bool(std::size_t index, std::uint64_t offset, std::size_t bytes, void *out)> read = {};
};

/* Receives results, in order, from the thread that calls; return false to stop. */
struct sink {
    std::function<bool(const char *name, psoup_dtype dtype, span<const std::int64_t> shape)> tensor;
    std::function<bool(std::uint64_t offset, const void *data, std::size_t bytes)> write;
};

class merger : public handle<psoup_merger, psoup_merger_free> {
public:
    using handle::handle;
    static result<merger> create(const context &c, psoup_merger_options options = defaults<psoup_merger_options>(),
                                 psoup::progress progress = {}) {
        auto kept = std::make_unique<state>(std::move(progress));
        if (kept->progress.function) {
            options.progress = detail::run_progress;
            options.progress_user = &kept->progress;
        }
        auto made = detail::make<merger>(psoup_merger_create, c.get(), &options);
        if (made) made->state_ = made->keep(std::move(kept));
        return made;
    }
    /* Everything, into a fresh merger, from the certificate of another merge. */
    result<void> load_certificate(const std::string &path) {
        return detail::call(psoup_merger_load_certificate, get(), path.c_str());
    }
    /* The same from a mergekit YAML file. */
    result<void> load_recipe(const std::string &path) {
        return detail::call(psoup_merger_load_recipe, get(), path.c_str());
    }
    result<void> set_reference(const std::string &model) {
        return detail::call(psoup_merger_set_reference, get(), model.c_str());
    }
    result<void> set_base(const std::string &path) {
        return detail::call(psoup_merger_set_base, get(), path.c_str());
    }
    result<void> set_base(tensors base) {
        const psoup_merge_tensors c = held(base);
        return detail::call(psoup_merger_set_base_tensors, get(), &c);
    }
    result<void> add(const std::string &path, double weight) {
        return detail::call(psoup_merger_add, get(), path.c_str(), weight);
    }
    result<void> add(tensors source, double weight) {
        const psoup_merge_tensors c = held(source);
        return detail::call(psoup_merger_add_tensors, get(), &c, weight);
    }
    result<void> set_weights(span<const double> weights) {
        return detail::call(psoup_merger_set_weights, get(), weights.data(), weights.size());
    }
    /* One value, or a gradient over the depth; source −1 is all; an empty filter is all tensors. */
    result<void> set_parameter(const std::string &parameter, span<const double> values, std::int64_t source = -1,
                               const std::string &filter = {}) {
        return detail::call(psoup_merger_set_parameter, get(), source, parameter.c_str(),
                            filter.empty() ? nullptr : filter.c_str(), values.data(), values.size());
    }
    result<void> write(const std::string &directory) { return run_and_rethrow(psoup_merger_write, directory.c_str()); }
    result<void> run(psoup::sink into) {
        struct both {
            detail::guard guard;
            psoup::sink sink;
        } user{{}, std::move(into)};
        auto c = defaults<psoup_merge_sink>();
        c.user = &user;
        c.tensor = [](void *u, const char *name, psoup_dtype dtype, std::int32_t rank, const std::int64_t *shape) {
            auto *b = static_cast<both *>(u);
            return b->guard.run([&] { return b->sink.tensor(name, dtype, {shape, static_cast<std::size_t>(rank)}); });
        };
        c.write = [](void *u, std::uint64_t offset, const void *data, std::size_t bytes) {
            auto *b = static_cast<both *>(u);
            return b->guard.run([&] { return b->sink.write(offset, data, bytes); });
        };
        auto done = run_and_rethrow(psoup_merger_run, static_cast<const psoup_merge_sink *>(&c));
        user.guard.rethrow();
        return done;
    }
    result<psoup_merge_report> report() const {
        auto out = defaults<psoup_merge_report>();
        auto done = detail::call(psoup_merger_report, static_cast<const psoup_merger *>(get()), &out);
        if (!done) return done.error();
        return out;
    }

private:
    using read_callback = detail::callback<bool(std::size_t, std::uint64_t, std::size_t, void *)>;
    struct state {
        explicit state(psoup::progress p) : progress(std::move(p)) {}
        detail::progress_callback progress;
        std::vector<std::unique_ptr<read_callback>> reads;
    };
    psoup_merge_tensors held(tensors &source) {
        auto c = defaults<psoup_merge_tensors>();
        c.name = source.name.c_str();
        c.tensors = source.list.data();
        c.n = source.list.size();
        if (source.read) {
            if (!state_) state_ = this->keep(std::make_unique<state>(psoup::progress{})); /* of a raw handle */
            state_->reads.push_back(std::make_unique<read_callback>(std::move(source.read)));
            c.user = state_->reads.back().get();
            c.read = [](void *user, std::size_t index, std::uint64_t offset, std::size_t bytes, void *out) {
                auto *r = static_cast<read_callback *>(user);
                return r->run([&] { return r->function(index, offset, bytes, out); });
            };
        }
        return c;
    }
    template <class F, class A> result<void> run_and_rethrow(F f, A argument) {
        auto done = detail::call(f, get(), argument);
        if (!state_) return done;
        state_->progress.rethrow();
        for (auto &r : state_->reads) r->rethrow();
        return done;
    }
    state *state_ = nullptr;
};

/* How many tensors of a result agree with the certificate beside it: all of them, or an error. */
inline result<std::size_t> merge_verify(const context &c, const std::string &path) {
    std::size_t n = 0;
    auto done = detail::call(psoup_merge_verify, c.get(), path.c_str(), &n);
    if (!done) return done.error();
    return n;
}

/* What adapters have to do with each other; no weights are equal ones. */
inline result<json> merge_inspect(const context &c, span<const std::string> adapters,
                                  span<const double> weights = {}) {
    if (!weights.empty() && weights.size() != adapters.size())
        return error(PSOUP_ERROR_ARGUMENT, "there are other numbers of adapters and weights");
    const auto paths = detail::c_strings(adapters);
    return detail::make<json>(psoup_merge_inspect, c.get(), paths.data(), paths.size(),
                              weights.empty() ? nullptr : weights.data());
}
inline result<void> merge_inspect_plot(const context &c, json_view inspection, const std::string &path,
                                       span<const std::string> names = {}) {
    if (!names.empty() && names.size() != inspection["cosine"].size())
        return error(PSOUP_ERROR_ARGUMENT, "there are " + std::to_string(inspection["cosine"].size()) +
                                               " adapters and " + std::to_string(names.size()) + " names");
    const auto labels = detail::c_strings(names);
    return detail::call(psoup_merge_inspect_plot, c.get(), inspection.get(), labels.empty() ? nullptr : labels.data(),
                        path.c_str());
}

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

/* New weights for a whole adapter: every module in parallel. */
inline result<void> merge_factors_batch(const context &c, psoup_merge_method method, span<psoup_merge_module> modules,
                                        bool errors = false) {
    return detail::call(psoup_merge_factors_batch, c.get(), method, modules.data(), modules.size(), errors ? 1 : 0);
}

/* ---- slices, on the host or on a device --------------------------------------------------------------- */

inline result<void> merge_views(const context &c, const psoup_merge_view &out, span<const psoup_merge_view> in,
                                span<const double> weights) {
    if (in.size() != weights.size()) return detail::counts("inputs", in.size(), weights.size());
    return detail::call(psoup_merge_views, c.get(), &out, in.data(), weights.data(), in.size());
}
inline result<void> merge_fold_view(const context &c, const psoup_merge_view &out, const psoup_merge_view &base,
                                    std::int64_t first_row, std::int64_t first_column, std::int64_t out_features,
                                    std::int64_t in_features, span<const psoup_lora_factors> factors,
                                    span<const double> weights) {
    if (factors.size() != weights.size()) return detail::counts("adapters", factors.size(), weights.size());
    return detail::call(psoup_merge_fold_view, c.get(), &out, &base, first_row, first_column, out_features,
                        in_features, factors.data(), weights.data(), factors.size());
}
inline result<void> merge_copy(const context &c, const psoup_merge_view &out, const psoup_merge_view &in) {
    return detail::call(psoup_merge_copy, c.get(), &out, &in);
}
/* nullptr takes it away. The table's functions are called by C and must not throw. */
inline result<void> set_merge_device(const context &c, const psoup_merge_device *device) {
    return detail::call(psoup_merge_set_device, c.get(), device);
}

} // namespace psoup

#endif
