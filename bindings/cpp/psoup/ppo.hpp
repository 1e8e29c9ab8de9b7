/* psoup/ppo.hpp: PPO, RLOO and GRPO, soups trained as one, best of n. See psoup.hpp. */
#ifndef PSOUP_PPO_HPP
#define PSOUP_PPO_HPP

#include "psoup/ppo.h"
#include "psoup/train.hpp"

namespace psoup {

PSOUP_CPP_QUIET_BEGIN
PSOUP_CPP_DEFAULTS(psoup_ppo_options, PSOUP_PPO_OPTIONS_INIT)
PSOUP_CPP_DEFAULTS(psoup_best_options, PSOUP_BEST_OPTIONS_INIT)
PSOUP_CPP_DEFAULTS(psoup_ppo_soup, PSOUP_PPO_SOUP_INIT)
PSOUP_CPP_QUIET_END

inline const psoup_field *ppo_fields() { return psoup_ppo_fields(); }

/* ---- PPO ------------------------------------------------------------------------------------------------ */

/* Scores rollouts; return false on failure. */
using reward_function = std::function<bool(span<const psoup_rollout>, span<float> scores)>;
/* What a policy says after `step` steps, with options.samples_every; return false to stop. */
using on_samples =
    std::function<bool(std::int64_t step, span<const psoup_rollout>, span<const float> scores)>;

/* One of several rewards of a policy: a model, or a function; of a soup's adapter number `adapter`. */
struct source {
    std::string name;
    reward *model = nullptr;
    reward_function function = {};
    float weight = 1.0f;
    std::size_t adapter = 0;
};

namespace detail {
using reward_callback = callback<bool(span<const psoup_rollout>, span<float>)>;
inline int run_reward(void *user, const psoup_rollout *rollouts, std::size_t n, float *scores) {
    auto *c = static_cast<reward_callback *>(user);
    return c->run([&] { return c->function({rollouts, n}, {scores, n}); });
}
/* Their functions are kept in `functions`. */
inline std::vector<psoup_reward_source> c_sources(const std::vector<source> &sources,
                                                  std::vector<std::unique_ptr<reward_callback>> &functions) {
    std::vector<psoup_reward_source> out;
    for (const source &s : sources) {
        psoup_reward_source to{};
        to.name = s.name.c_str();
        to.model = s.model ? s.model->get() : nullptr;
        to.weight = s.weight;
        to.adapter = static_cast<std::int32_t>(s.adapter);
        if (s.function) {
            functions.push_back(std::make_unique<reward_callback>(s.function));
            to.function = run_reward;
            to.user = functions.back().get();
        }
        out.push_back(to);
    }
    return out;
}
} // namespace detail

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
    using samples_callback = detail::callback<bool(std::int64_t, span<const psoup_rollout>, span<const float>)>;
    /* What C borrows, at addresses that moving a ppo does not change. */
    struct state {
        state(std::vector<policy> p, on_step each, on_samples said)
            : policies(std::move(p)), step(std::move(each)), samples(std::move(said)) {
            soups.reserve(policies.size());
            for (policy &each_policy : policies) {
                functions.push_back(std::make_unique<detail::reward_callback>(each_policy.function));
                detail::reward_callback *own = functions.back().get();
                rewards.push_back(detail::pointers(each_policy.rewards));
                psoup_ppo_policy c{};
                c.adapter = each_policy.adapter.c_str();
                c.rewards = rewards.back().empty() ? nullptr : rewards.back().data();
                c.n_rewards = rewards.back().size();
                sources.push_back(detail::c_sources(each_policy.sources, functions));
                if (!sources.back().empty()) {
                    c.sources = sources.back().data();
                    c.n_sources = sources.back().size();
                }
                if (each_policy.function) {
                    c.reward_fn = detail::run_reward;
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
        std::vector<std::unique_ptr<detail::reward_callback>> functions;
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

/* options.n answers to each prompt, and which of them the rewards, a function, or both together as sources like best. */
inline result<std::vector<best>> best_of_n(model &m, span<const prompt> prompts, std::vector<reward *> rewards,
                                           reward_function function = {},
                                           psoup_best_options options = defaults<psoup_best_options>(),
                                           const psoup_sampling &sampling = defaults<psoup_sampling>(),
                                           const psoup_session_options &session = defaults<psoup_session_options>(),
                                           const std::vector<source> &sources = {}) {
    detail::reward_callback c(std::move(function));
    const auto handles = detail::pointers(rewards);
    std::vector<std::unique_ptr<detail::reward_callback>> functions;
    const auto c_sources = detail::c_sources(sources, functions);
    if (!sources.empty()) {
        options.sources = c_sources.data();
        options.n_sources = c_sources.size();
    }
    if (!rewards.empty()) {
        options.rewards = handles.data();
        options.n_rewards = handles.size();
    }
    if (c.function) {
        options.reward_user = &c;
        options.reward_fn = detail::run_reward;
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
    for (const auto &f : functions) f->rethrow();
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
