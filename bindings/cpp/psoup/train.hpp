/* psoup/train.hpp: supervised fine-tuning, reward models, DPO, PPO. See psoup.hpp. */
#ifndef PSOUP_TRAIN_HPP
#define PSOUP_TRAIN_HPP

#include "psoup/model.hpp"
#include "psoup/ppo.h"

namespace psoup {

PSOUP_CPP_QUIET_BEGIN
PSOUP_CPP_DEFAULTS(psoup_sft_options, PSOUP_SFT_OPTIONS_INIT)
PSOUP_CPP_DEFAULTS(psoup_reward_options, PSOUP_REWARD_OPTIONS_INIT)
PSOUP_CPP_DEFAULTS(psoup_dpo_options, PSOUP_DPO_OPTIONS_INIT)
PSOUP_CPP_DEFAULTS(psoup_ppo_options, PSOUP_PPO_OPTIONS_INIT)
PSOUP_CPP_DEFAULTS(psoup_best_options, PSOUP_BEST_OPTIONS_INIT)
PSOUP_CPP_DEFAULTS(psoup_ppo_soup, PSOUP_PPO_SOUP_INIT)
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
inline const psoup_field *ppo_fields() { return psoup_ppo_fields(); }

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

/* ---- PPO ------------------------------------------------------------------------------------------------ */

/* Scores rollouts; return false on failure. */
using reward_function = std::function<bool(span<const psoup_rollout>, span<float> scores)>;
/* What a policy says after `step` steps, with options.samples_every; return false to stop. */
using on_samples =
    std::function<bool(std::int64_t step, span<const psoup_rollout>, span<const float> scores)>;

/* One of several rewards of a policy: a model, or a function. */
struct source {
    std::string name;
    reward *model = nullptr;
    reward_function function = {};
    float weight = 1.0f;
};

struct policy {
    std::string adapter;
    span<const psoup_ppo_prompt> prompts; /* borrowed until the ppo is gone, and so are its rewards */
    reward_function function;             /* instead of reward models */
    std::vector<reward *> rewards;
    span<const psoup_ppo_prompt> validation = {};
    std::uint64_t seed = 0;
    std::vector<std::string> soup = {}; /* adapters that learn as one policy, whose name `adapter` is */
    float concentration = 1.0f;         /* of their mixes */
    std::vector<source> sources = {};   /* models and functions together, instead of `function` and `rewards` */
};

inline result<psoup_ppo_options> ppo_preset(const std::string &name) {
    auto out = defaults<psoup_ppo_options>();
    auto done = detail::call(psoup_ppo_preset, name.c_str(), &out);
    if (!done) return done.error();
    return out;
}

class ppo : public handle<psoup_ppo, psoup_ppo_free> {
public:
    using handle::handle;
    static result<ppo> create(model &m, std::vector<policy> policies,
                              psoup_ppo_options options = defaults<psoup_ppo_options>(), on_step each = {},
                              on_samples said = {}) {
        auto kept = std::make_unique<state>(std::move(policies), std::move(each), std::move(said));
        if (kept->step.function || kept->samples.function) {
            options.on_step = kept->step.function ? run_step : nullptr;
            options.on_samples = kept->samples.function ? run_samples : nullptr;
            options.user = kept.get();
        }
        auto made = detail::make<ppo>(psoup_ppo_create, m.get(), kept->c_policies.data(), kept->c_policies.size(),
                                      &options);
        if (made) made->state_ = made->keep(std::move(kept));
        return made;
    }
    /* What create and run would take with these. */
    static result<psoup_memory> memory(model &m, std::vector<policy> policies,
                                       const psoup_ppo_options &options = defaults<psoup_ppo_options>()) {
        state s(std::move(policies), {}, {});
        auto out = defaults<psoup_memory>();
        auto done = detail::call(psoup_ppo_memory, m.get(), s.c_policies.data(), s.c_policies.size(), &options, &out);
        if (!done) return done.error();
        return out;
    }
    /* How many steps are left. */
    result<std::int64_t> step() {
        std::int64_t remaining = 0;
        auto done = detail::call(psoup_ppo_step, get(), &remaining);
        if (state_) state_->rethrow();
        if (!done) return done.error();
        return remaining;
    }
    result<void> run() {
        auto done = detail::call(psoup_ppo_run, get());
        if (state_) state_->rethrow();
        return done;
    }
    bool diverged(std::size_t policy) const { return psoup_ppo_diverged(get(), policy) != 0; }
    /* Its arrays are borrowed until the next call. */
    result<psoup_ppo_trace> trace(std::size_t policy) const {
        auto out = defaults<psoup_ppo_trace>();
        auto done = detail::call(psoup_ppo_get_trace, static_cast<const psoup_ppo *>(get()), policy, &out);
        if (!done) return done.error();
        return out;
    }

private:
    using reward_callback = detail::callback<bool(span<const psoup_rollout>, span<float>)>;
    static int run_reward(void *user, const psoup_rollout *rollouts, std::size_t n, float *scores) {
        auto *c = static_cast<reward_callback *>(user);
        return c->run([&] { return c->function({rollouts, n}, {scores, n}); });
    }
    using samples_callback = detail::callback<bool(std::int64_t, span<const psoup_rollout>, span<const float>)>;
    /* What C borrows, at addresses that moving a ppo does not change. */
    struct state {
        state(std::vector<policy> p, on_step each, on_samples said)
            : policies(std::move(p)), step(std::move(each)), samples(std::move(said)) {
            soups.reserve(policies.size());
            for (policy &each_policy : policies) {
                functions.push_back(std::make_unique<reward_callback>(each_policy.function));
                reward_callback *own = functions.back().get();
                rewards.push_back(detail::pointers(each_policy.rewards));
                psoup_ppo_policy c{};
                c.adapter = each_policy.adapter.c_str();
                c.rewards = rewards.back().empty() ? nullptr : rewards.back().data();
                c.n_rewards = rewards.back().size();
                sources.emplace_back();
                for (source &s : each_policy.sources) {
                    psoup_reward_source to{};
                    to.name = s.name.c_str();
                    to.model = s.model ? s.model->get() : nullptr;
                    to.weight = s.weight;
                    if (s.function) {
                        functions.push_back(std::make_unique<reward_callback>(s.function));
                        to.function = run_reward;
                        to.user = functions.back().get();
                    }
                    sources.back().push_back(to);
                }
                if (!sources.back().empty()) {
                    c.sources = sources.back().data();
                    c.n_sources = sources.back().size();
                }
                if (each_policy.function) {
                    c.reward_fn = run_reward;
                    c.reward_user = own;
                }
                c.prompts = each_policy.prompts.data();
                c.n_prompts = each_policy.prompts.size();
                c.validation = each_policy.validation.data();
                c.n_validation = each_policy.validation.size();
                c.seed = each_policy.seed;
                soup_adapters.emplace_back();
                for (const std::string &name : each_policy.soup)
                    soup_adapters.back().push_back(name.c_str());
                if (!each_policy.soup.empty()) {
                    soups.push_back(defaults<psoup_ppo_soup>());
                    soups.back().adapters = soup_adapters.back().data();
                    soups.back().n = soup_adapters.back().size();
                    soups.back().concentration = each_policy.concentration;
                    c.soup = &soups.back();
                }
                c_policies.push_back(c);
            }
        }
        void rethrow() {
            step.rethrow();
            samples.rethrow();
            for (auto &f : functions) f->rethrow();
        }
        std::vector<policy> policies;
        detail::step_callback step;
        samples_callback samples;
        std::vector<std::unique_ptr<reward_callback>> functions;
        std::vector<std::vector<psoup_reward *>> rewards;
        std::vector<std::vector<psoup_reward_source>> sources;
        std::vector<std::vector<const char *>> soup_adapters;
        std::vector<psoup_ppo_soup> soups;
        std::vector<psoup_ppo_policy> c_policies;
    };
    static int run_step(void *user, const psoup_step *step) {
        return detail::run_step(&static_cast<state *>(user)->step, step);
    }
    static int run_samples(void *user, std::int64_t step, const psoup_rollout *rollouts, const float *scores,
                           std::size_t n) {
        auto &c = static_cast<state *>(user)->samples;
        return c.run([&] { return c.function(step, {rollouts, n}, {scores, n}); });
    }
    state *state_ = nullptr;
};

/* ---- best of n -------------------------------------------------------------------------------------------- */

struct best {
    std::vector<completion> candidates;
    std::vector<float> scores;
    std::size_t chosen = 0;
    const completion &answer() const { return candidates[chosen]; }
};

/* options.n answers to each prompt, and which of them the rewards, or a function, like best. */
inline result<std::vector<best>> best_of_n(model &m, span<const prompt> prompts, std::vector<reward *> rewards,
                                           reward_function function = {},
                                           psoup_best_options options = defaults<psoup_best_options>(),
                                           const psoup_sampling &sampling = defaults<psoup_sampling>(),
                                           const psoup_session_options &session = defaults<psoup_session_options>()) {
    detail::callback<bool(span<const psoup_rollout>, span<float>)> c(std::move(function));
    const auto handles = detail::pointers(rewards);
    if (!rewards.empty()) {
        options.rewards = handles.data();
        options.n_rewards = handles.size();
    }
    if (c.function) {
        options.reward_user = &c;
        options.reward_fn = [](void *user, const psoup_rollout *rollouts, std::size_t n, float *scores) {
            auto *own = static_cast<decltype(&c)>(user);
            return own->run([&] { return own->function({rollouts, n}, {scores, n}); });
        };
    }
    std::vector<psoup_prompt> asked;
    for (const prompt &p : prompts) {
        auto one = m.prompt_of(p);
        if (!one) return one.error();
        asked.push_back(*one);
    }
    const auto each = static_cast<std::size_t>(options.n > 0 ? options.n : 0);
    std::vector<std::int32_t> chosen(prompts.size());
    std::vector<float> scores(prompts.size() * each);
    psoup_generation *made = nullptr;
    auto done = detail::call(psoup_best_of_n, m.get(), static_cast<const psoup_prompt *>(asked.data()), asked.size(),
                             &sampling, &session, static_cast<const psoup_best_options *>(&options), &made,
                             chosen.data(), scores.data());
    handle<psoup_generation, psoup_generation_free> owned(made);
    c.rethrow();
    if (!done) return done.error();
    std::vector<best> out(prompts.size());
    for (std::size_t i = 0; i < prompts.size(); i++) {
        out[i].chosen = static_cast<std::size_t>(chosen[i]);
        for (std::size_t k = 0; k < each; k++) {
            const psoup_completion *p = psoup_generation_get(made, i * each + k);
            out[i].candidates.push_back({{p->tokens, p->tokens + p->n}, {p->logprobs, p->logprobs + p->n}, p->finish});
            out[i].scores.push_back(scores[i * each + k]);
        }
    }
    return out;
}

} // namespace psoup

#endif
