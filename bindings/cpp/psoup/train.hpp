/* psoup/train.hpp: supervised fine-tuning, reward models, DPO. See psoup.hpp. */
#ifndef PSOUP_TRAIN_HPP
#define PSOUP_TRAIN_HPP

#include "psoup/model.hpp"
#include "psoup/train.h"

namespace psoup {

PSOUP_CPP_QUIET_BEGIN
PSOUP_CPP_DEFAULTS(psoup_sft_options, PSOUP_SFT_OPTIONS_INIT)
PSOUP_CPP_DEFAULTS(psoup_reward_options, PSOUP_REWARD_OPTIONS_INIT)
PSOUP_CPP_DEFAULTS(psoup_dpo_options, PSOUP_DPO_OPTIONS_INIT)
PSOUP_CPP_QUIET_END

/* Return false to stop with PSOUP_ERROR_CANCELLED. */
using on_step = std::function<bool(const psoup_step &)>;

namespace detail {
using step_callback = callback<bool(const psoup_step &)>;
inline int run_step(void *user, const psoup_step *step) {
    auto *c = static_cast<step_callback *>(user);
    return c->run([&] { return c->function(*step); });
}
} // namespace detail

inline const psoup_field *sft_fields() { return psoup_sft_fields(); }
inline const psoup_field *reward_fields() { return psoup_reward_fields(); }
inline const psoup_field *dpo_fields() { return psoup_dpo_fields(); }

/* An empty adapter name trains the base itself. */
inline result<void> sft(model &m, const std::string &adapter, span<const psoup_example> train,
                        psoup_sft_options options = defaults<psoup_sft_options>(), on_step each = {},
                        span<const psoup_example> validation = {}) {
    detail::step_callback c(std::move(each));
    if (c.function) {
        options.on_step = detail::run_step;
        options.user = &c;
    }
    auto done = detail::call(psoup_sft, m.get(), adapter.empty() ? nullptr : adapter.c_str(), train.data(),
                             train.size(), validation.data(), validation.size(), &options);
    c.rethrow();
    return done;
}

/* What sft would take with these. */
inline result<psoup_memory> sft_memory(model &m, const std::string &adapter, span<const psoup_example> train,
                                       const psoup_sft_options &options = defaults<psoup_sft_options>(),
                                       span<const psoup_example> validation = {}) {
    auto out = defaults<psoup_memory>();
    auto done = detail::call(psoup_sft_memory, m.get(), adapter.empty() ? nullptr : adapter.c_str(), train.data(),
                             train.size(), validation.data(), validation.size(), &options, &out);
    if (!done) return done.error();
    return out;
}

/* ---- reward models ----------------------------------------------------------------------------------- */

class reward : public handle<psoup_reward, psoup_reward_free> {
public:
    using handle::handle;
    static result<reward> create(model &m, const std::string &name,
                                 const psoup_adapter_options &options = defaults<psoup_adapter_options>()) {
        return detail::make<reward>(psoup_reward_create, m.get(), name.c_str(), &options);
    }
    static result<reward> load(model &m, const std::string &name, const std::string &directory) {
        return detail::make<reward>(psoup_reward_load, m.get(), name.c_str(), directory.c_str());
    }
    result<void> save(const std::string &directory, const std::string &base_name = {}) const {
        return detail::call(psoup_reward_save, static_cast<const psoup_reward *>(get()), directory.c_str(),
                            base_name.c_str());
    }
    const char *name() const { return psoup_reward_name(get()); }
    /* Mixes of the rows are not read. */
    result<std::vector<float>> score(span<const row> rows) {
        std::vector<psoup_row> c;
        for (const row &r : rows) c.push_back({r.tokens.data(), r.tokens.size(), nullptr});
        std::vector<float> out(rows.size());
        auto done = detail::call(psoup_reward_score, get(), c.data(), c.size(), out.data());
        if (!done) return done.error();
        return out;
    }
};

namespace detail {
inline std::vector<psoup_reward *> pointers(span<reward *const> rewards) {
    std::vector<psoup_reward *> out;
    for (reward *r : rewards) out.push_back(r->get());
    return out;
}
} // namespace detail

inline result<void> train_rewards(span<reward *const> rewards, span<const psoup_comparison> train,
                                  psoup_reward_options options = defaults<psoup_reward_options>(), on_step each = {},
                                  span<const psoup_comparison> validation = {}) {
    detail::step_callback c(std::move(each));
    if (c.function) {
        options.on_step = detail::run_step;
        options.user = &c;
    }
    const auto r = detail::pointers(rewards);
    auto done = detail::call(psoup_reward_train, r.data(), r.size(), train.data(), train.size(), validation.data(),
                             validation.size(), &options);
    c.rethrow();
    return done;
}

/* What train_rewards would take with these. */
inline result<psoup_memory> reward_memory(span<reward *const> rewards, span<const psoup_comparison> train,
                                          const psoup_reward_options &options = defaults<psoup_reward_options>(),
                                          span<const psoup_comparison> validation = {}) {
    const auto r = detail::pointers(rewards);
    auto out = defaults<psoup_memory>();
    auto done = detail::call(psoup_reward_memory, r.data(), r.size(), train.data(), train.size(), validation.data(),
                             validation.size(), &options, &out);
    if (!done) return done.error();
    return out;
}

struct accuracy {
    double rate, loss;
};
inline result<accuracy> reward_accuracy(span<reward *const> rewards, span<const psoup_comparison> comparisons) {
    const auto r = detail::pointers(rewards);
    accuracy out{};
    auto done = detail::call(psoup_reward_accuracy, r.data(), r.size(), comparisons.data(), comparisons.size(),
                             &out.rate, &out.loss);
    if (!done) return done.error();
    return out;
}

/* ---- DPO ------------------------------------------------------------------------------------------------ */

/* The policies are adapters of the model; a pair names its own by its place among them. */
inline result<void> dpo(model &m, const std::vector<std::string> &policies, span<const psoup_dpo_pair> train,
                        psoup_dpo_options options = defaults<psoup_dpo_options>(), on_step each = {},
                        span<const psoup_dpo_pair> validation = {}) {
    detail::step_callback c(std::move(each));
    if (c.function) {
        options.on_step = detail::run_step;
        options.user = &c;
    }
    std::vector<const char *> names;
    for (const std::string &name : policies) names.push_back(name.c_str());
    auto done = detail::call(psoup_dpo, m.get(), names.data(), names.size(), train.data(), train.size(),
                             validation.data(), validation.size(), &options);
    c.rethrow();
    return done;
}

/* What dpo would take with these. */
inline result<psoup_memory> dpo_memory(model &m, const std::vector<std::string> &policies,
                                       span<const psoup_dpo_pair> train,
                                       const psoup_dpo_options &options = defaults<psoup_dpo_options>(),
                                       span<const psoup_dpo_pair> validation = {}) {
    std::vector<const char *> names;
    for (const std::string &name : policies) names.push_back(name.c_str());
    auto out = defaults<psoup_memory>();
    auto done = detail::call(psoup_dpo_memory, m.get(), names.data(), names.size(), train.data(), train.size(),
                             validation.data(), validation.size(), &options, &out);
    if (!done) return done.error();
    return out;
}

/* ---- step by step ---------------------------------------------------------------------------------------- */

/* sft, train_rewards or dpo in pieces. Rows, and rewards, are borrowed until it is gone. */
class training : public handle<psoup_training, psoup_training_free> {
public:
    using handle::handle;
    static result<training> sft(model &m, const std::string &adapter, span<const psoup_example> train,
                                psoup_sft_options options = defaults<psoup_sft_options>(), on_step each = {},
                                span<const psoup_example> validation = {}) {
        return start(options, std::move(each), psoup_sft_create, m.get(), adapter.empty() ? nullptr : adapter.c_str(),
                     train.data(), train.size(), validation.data(), validation.size());
    }
    static result<training> rewards(span<reward *const> rewards, span<const psoup_comparison> train,
                                    psoup_reward_options options = defaults<psoup_reward_options>(),
                                    on_step each = {}, span<const psoup_comparison> validation = {}) {
        const auto r = detail::pointers(rewards);
        return start(options, std::move(each), psoup_reward_train_create, r.data(), r.size(), train.data(),
                     train.size(), validation.data(), validation.size());
    }
    static result<training> dpo(model &m, const std::vector<std::string> &policies, span<const psoup_dpo_pair> train,
                                psoup_dpo_options options = defaults<psoup_dpo_options>(), on_step each = {},
                                span<const psoup_dpo_pair> validation = {}) {
        std::vector<const char *> names;
        for (const std::string &name : policies) names.push_back(name.c_str());
        return start(options, std::move(each), psoup_dpo_create, m.get(), names.data(), names.size(), train.data(),
                     train.size(), validation.data(), validation.size());
    }
    /* How many steps are left. */
    result<std::int64_t> step() {
        std::int64_t remaining = 0;
        auto done = detail::call(psoup_training_step, get(), &remaining);
        if (each_) each_->rethrow();
        if (!done) return done.error();
        return remaining;
    }
    result<void> run() {
        auto done = detail::call(psoup_training_run, get());
        if (each_) each_->rethrow();
        return done;
    }

private:
    template <class Options, class F, class... A>
    static result<training> start(Options options, on_step each, F create, A... arguments) {
        auto kept = std::make_unique<detail::step_callback>(std::move(each));
        if (kept->function) {
            options.on_step = detail::run_step;
            options.user = kept.get();
        }
        auto made = detail::make<training>(create, arguments..., static_cast<const Options *>(&options));
        if (made) made->each_ = made->keep(std::move(kept));
        return made;
    }
    detail::step_callback *each_ = nullptr;
};

} // namespace psoup

#endif
