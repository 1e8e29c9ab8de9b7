/* psoup/eval.hpp: preferences, templates, judges, feedback, win rates. See psoup.hpp. */
#ifndef PSOUP_EVAL_HPP
#define PSOUP_EVAL_HPP

#include "psoup/data.hpp"
#include "psoup/eval.h"
#include "psoup/model.hpp"

namespace psoup {

PSOUP_CPP_QUIET_BEGIN
PSOUP_CPP_DEFAULTS(psoup_feedback_options, PSOUP_FEEDBACK_OPTIONS_INIT)
PSOUP_CPP_QUIET_END

struct user {
    std::string name;
    std::vector<std::int32_t> members; /* indices of preferences */
};

class preferences : public handle<psoup_preferences, psoup_preferences_free> {
public:
    using handle::handle;
    static result<preferences> paper(const context &c, bool with_new = false) {
        return detail::make<preferences>(psoup_preferences_default, c.get(), with_new ? 1 : 0);
    }
    static result<preferences> load(const context &c, const std::string &path) {
        return detail::make<preferences>(psoup_preferences_load, c.get(), path.c_str());
    }
    std::size_t size() const { return psoup_preferences_count(get()); }
    const psoup_preference &operator[](std::size_t index) const { return *psoup_preferences_get(get(), index); }
    std::int32_t find(const std::string &symbol) const { return psoup_preferences_find(get(), symbol.c_str()); }
    std::size_t users() const { return psoup_users_count(get()); }
    result<psoup::user> user(std::size_t number) const {
        char name[256];
        std::vector<std::int32_t> members(psoup_user_size(get()));
        auto done = detail::call(psoup_user_get, static_cast<const psoup_preferences *>(get()), number,
                                 members.data(), static_cast<char *>(name), sizeof name);
        if (!done) return done.error();
        return psoup::user{name, std::move(members)};
    }
};

/* nullptr: none; for the template, Tulu's. */
inline result<std::string> fill_template(const char *name_or_template, const std::string &instruction,
                                         const char *input = nullptr, const char *preference = nullptr) {
    char *out = nullptr;
    auto done = detail::call(psoup_template_fill, name_or_template, instruction.c_str(), input, preference, &out);
    if (!done) return done.error();
    std::string text(out);
    psoup_text_free(out);
    return text;
}

/* Answers questions with PSOUP_A_WINS, PSOUP_TIE, PSOUP_B_WINS or PSOUP_UNPARSED; return false on failure. */
using judge_function = std::function<bool(span<const psoup_question>, span<std::int32_t> verdicts)>;

class judge : public handle<psoup_judge, psoup_judge_free> {
public:
    using handle::handle;
    static result<judge> create(const context &c, judge_function f) {
        auto kept = std::make_unique<function>(std::move(f));
        auto made = detail::make<judge>(psoup_judge_create, c.get(), run_judge, static_cast<void *>(kept.get()));
        if (made) made->function_ = made->keep(std::move(kept));
        return made;
    }
    static result<judge> command(const context &c, span<const std::string> arguments) {
        auto argv = detail::c_strings(arguments);
        argv.push_back(nullptr);
        return detail::make<judge>(psoup_judge_command, c.get(), argv.data());
    }
    result<void> set_patience(double seconds) { return detail::call(psoup_judge_set_patience, get(), seconds); }
    result<std::vector<std::int32_t>> ask(span<const psoup_question> questions) {
        std::vector<std::int32_t> verdicts(questions.size());
        auto done = detail::call(psoup_judge_ask, get(), questions.data(), questions.size(), verdicts.data());
        rethrow();
        if (!done) return done.error();
        return verdicts;
    }
    /* verdicts [Σ n_i]; helpful is empty (not asked) or has one place a duel. */
    result<void> duels(const preferences &p, span<const char *const> prompts, span<const char *const> a,
                       span<const char *const> b, span<const psoup_duel> duels, bool swap,
                       span<std::int32_t> verdicts, span<std::int32_t> helpful = {}) {
        std::size_t asked = 0;
        for (const psoup_duel &d : duels) asked += d.n;
        if (prompts.size() != duels.size() || a.size() != duels.size() || b.size() != duels.size() ||
            verdicts.size() < asked || (!helpful.empty() && helpful.size() < duels.size()))
            return error(PSOUP_ERROR_ARGUMENT, "prompts, responses and results are of other numbers than the duels");
        auto done = detail::call(psoup_judge_duels, get(), static_cast<const psoup_preferences *>(p.get()),
                                 prompts.data(), a.data(), b.data(), duels.data(), duels.size(), swap ? 1 : 0,
                                 verdicts.data(), helpful.empty() ? nullptr : helpful.data());
        rethrow();
        return done;
    }
    /* What the judge's function threw during a call of C that asked it. */
    void rethrow() {
        if (function_) function_->rethrow();
    }

private:
    using function = detail::callback<bool(span<const psoup_question>, span<std::int32_t>)>;
    static int run_judge(void *user, const psoup_question *questions, std::size_t n, std::int32_t *verdicts) {
        auto *c = static_cast<function *>(user);
        return c->run([&] { return c->function({questions, n}, {verdicts, n}); });
    }
    function *function_ = nullptr;
};

inline result<psoup_feedback_counts> feedback(model &generator, const tokenizer &t, const preferences &p,
                                              span<const psoup_instruction> instructions, judge &j,
                                              const std::string &path,
                                              psoup_feedback_options options = defaults<psoup_feedback_options>(),
                                              psoup::progress progress = {}) {
    detail::progress_callback c(std::move(progress));
    if (c.function) {
        options.progress = detail::run_progress;
        options.user = &c;
    }
    auto out = defaults<psoup_feedback_counts>();
    auto done = detail::call(psoup_feedback, generator.get(), static_cast<const psoup_tokenizer *>(t.get()),
                             static_cast<const psoup_preferences *>(p.get()), instructions.data(), instructions.size(),
                             j.get(), &options, path.c_str(), &out);
    c.rethrow();
    j.rethrow();
    if (!done) return done.error();
    return out;
}

namespace detail {
template <class F, class... A> result<psoup_rate> rate(F f, A... arguments) {
    psoup_rate out{};
    auto done = call(f, arguments..., &out);
    if (!done) return done.error();
    return out;
}
} // namespace detail

inline result<psoup_rate> winrate_aggregate(const context &c, span<const psoup_duel> duels, std::uint64_t seed = 0) {
    return detail::rate(psoup_winrate_aggregate, c.get(), duels.data(), duels.size(), seed);
}
inline result<psoup_rate> winrate_criterion(const context &c, span<const psoup_duel> duels, std::int32_t preference,
                                            std::uint64_t seed = 0) {
    return detail::rate(psoup_winrate_criterion, c.get(), duels.data(), duels.size(), preference, seed);
}
inline result<psoup_rate> winrate_helpfulness(const context &c, span<const psoup_duel> duels,
                                              std::uint64_t seed = 0) {
    return detail::rate(psoup_winrate_helpfulness, c.get(), duels.data(), duels.size(), seed);
}

} // namespace psoup

#endif
