/* psoup/model.hpp: tokenizer, model, adapters, scores, generation. See psoup.hpp. */
#ifndef PSOUP_MODEL_HPP
#define PSOUP_MODEL_HPP

#include <string_view>

#include "psoup/common.hpp"
#include "psoup/model.h"

namespace psoup {

PSOUP_CPP_QUIET_BEGIN
PSOUP_CPP_DEFAULTS(psoup_model_config, PSOUP_MODEL_CONFIG_INIT)
PSOUP_CPP_DEFAULTS(psoup_load_options, PSOUP_LOAD_OPTIONS_INIT)
PSOUP_CPP_DEFAULTS(psoup_adapter_options, PSOUP_ADAPTER_OPTIONS_INIT)
PSOUP_CPP_DEFAULTS(psoup_sampling, PSOUP_SAMPLING_INIT)
PSOUP_CPP_DEFAULTS(psoup_session_options, PSOUP_SESSION_OPTIONS_INIT)
PSOUP_CPP_QUIET_END

/* ---- tokenizer ----------------------------------------------------------------------------------- */

class tokenizer : public handle<psoup_tokenizer, psoup_tokenizer_free> {
public:
    using handle::handle;
    static result<tokenizer> load(const context &c, const std::string &path) {
        return detail::make<tokenizer>(psoup_tokenizer_load, c.get(), path.c_str());
    }
    /* An empty pattern is GPT-2's. */
    static result<tokenizer> train(const context &c, span<const std::string> texts, std::int32_t vocab_size,
                                   span<const std::string> special = {}, const std::string &pattern = {}) {
        const auto t = detail::c_strings(texts), s = detail::c_strings(special);
        return detail::make<tokenizer>(psoup_tokenizer_train, c.get(), t.data(), t.size(), vocab_size, s.data(),
                                       s.size(), pattern.empty() ? nullptr : pattern.c_str());
    }
    result<void> save(const std::string &path) const {
        return detail::call(psoup_tokenizer_save, get_const(), path.c_str());
    }
    std::int32_t vocab_size() const { return psoup_tokenizer_vocab_size(get()); }
    std::int32_t token_id(const std::string &token) const { /* −1: none */
        return psoup_tokenizer_token_id(get(), token.c_str());
    }
    const char *token(std::int32_t id) const { return psoup_tokenizer_token(get(), id); } /* nullptr: none */

    result<std::vector<std::int32_t>> encode(std::string_view text, std::uint32_t flags = 0,
                                             std::vector<psoup_offset> *offsets = nullptr) const {
        std::vector<std::int32_t> ids(text.size() + 8);
        for (;;) {
            std::size_t n = 0;
            if (offsets) offsets->resize(ids.size());
            auto done = detail::call(psoup_tokenizer_encode, get_const(), text.data(), text.size(), flags, ids.data(),
                                     offsets ? offsets->data() : nullptr, ids.size(), &n);
            if (!done) return done.error();
            const bool whole = n <= ids.size();
            ids.resize(n);
            if (!whole) continue;
            if (offsets) offsets->resize(n);
            return ids;
        }
    }
    /* Bytes: they need not be UTF-8 where the ids cut a character. */
    result<std::string> decode(span<const std::int32_t> ids, bool skip_special = false) const {
        std::string text(16 * ids.size() + 64, '\0');
        for (;;) {
            std::size_t n = 0;
            auto done = detail::call(psoup_tokenizer_decode, get_const(), ids.data(), ids.size(),
                                     skip_special ? 1 : 0, text.data(), text.size(), &n);
            if (!done) return done.error();
            const bool whole = n <= text.size();
            text.resize(n);
            if (whole) return text;
        }
    }

private:
    const psoup_tokenizer *get_const() const { return get(); }
};

/* ---- model ----------------------------------------------------------------------------------------- */

inline const char *name_of(psoup_mix_method method) { return psoup_mix_method_name(method); }
inline result<psoup_mix_method> parse_mix_method(const std::string &name) {
    std::int32_t out = 0;
    psoup_error e{};
    const psoup_status status = psoup_mix_method_parse(name.c_str(), &out, &e);
    if (status != PSOUP_OK) return error(e, status);
    return static_cast<psoup_mix_method>(out);
}

/* A sequence and its mix: a weight per adapter; empty is the base. */
struct row {
    span<const std::int32_t> tokens;
    span<const float> mix = {};
    std::int32_t mix_method = PSOUP_MIX_DELTA;
};

struct prompt {
    span<const std::int32_t> tokens;
    span<const float> mix = {};
    std::uint64_t sequence = 0;
    const psoup_sampling *sampling = nullptr; /* nullptr: the call's */
    std::int32_t mix_method = PSOUP_MIX_DELTA;
    float mix_strength = 1; /* multiplies the weights; 0: 1 */
};

struct token {
    std::int64_t id;
    std::int32_t token;
    float logprob;
    psoup_finish finish;
};
/* Return false to stop with PSOUP_ERROR_CANCELLED. */
using on_token = std::function<bool(const token &)>;

struct completion {
    std::vector<std::int32_t> tokens;
    std::vector<float> logprobs;
    psoup_finish finish;
};

class gradients : public handle<psoup_gradients, psoup_gradients_free> {
public:
    using handle::handle;
    /* Borrowed; empty where there is none of that name. */
    span<const float> get_named(const std::string &name) const {
        std::size_t n = 0;
        const float *data = psoup_gradients_get(get(), name.c_str(), &n);
        return data ? span<const float>(data, n) : span<const float>();
    }
};

class model : public handle<psoup_model, psoup_model_free> {
public:
    using handle::handle;
    static result<model> load(const context &c, const std::string &directory) {
        return detail::make<model>(psoup_model_load, c.get(), directory.c_str());
    }
    static result<model> load(const context &c, const std::string &directory, const psoup_load_options &options) {
        return detail::make<model>(psoup_model_load_with, c.get(), directory.c_str(), &options);
    }
    static result<model> create(const context &c, const psoup_model_config &config, std::uint64_t seed = 0) {
        return detail::make<model>(psoup_model_create, c.get(), &config, seed);
    }
    result<void> save(const std::string &directory, const psoup::tokenizer *tokenizer = nullptr) const {
        return detail::call(psoup_model_save, get_const(), directory.c_str(),
                            static_cast<const psoup_tokenizer *>(tokenizer ? tokenizer->get() : nullptr));
    }
    result<psoup_model_config> config() const {
        auto out = defaults<psoup_model_config>();
        auto done = detail::call(psoup_model_get_config, get_const(), &out);
        if (!done) return done.error();
        return out;
    }
    std::int64_t parameters() const { return psoup_model_parameters(get()); }
    psoup_context *context_handle() const { return psoup_model_context(get()); }

    /* ---- adapters */
    result<void> add_adapter(const std::string &name,
                             const psoup_adapter_options &options = defaults<psoup_adapter_options>()) {
        return detail::call(psoup_model_add_adapter, get(), name.c_str(), &options);
    }
    result<void> load_adapter(const std::string &name, const std::string &directory) {
        return detail::call(psoup_model_load_adapter, get(), name.c_str(), directory.c_str());
    }
    result<void> save_adapter(const std::string &name, const std::string &directory,
                              const std::string &base_name = {}) const {
        return detail::call(psoup_model_save_adapter, get_const(), name.c_str(), directory.c_str(), base_name.c_str());
    }
    result<void> remove_adapter(const std::string &name) {
        return detail::call(psoup_model_remove_adapter, get(), name.c_str());
    }
    std::vector<std::string> adapters() const {
        std::vector<std::string> out;
        for (std::int32_t i = 0; i < psoup_model_adapters(get()); i++)
            out.emplace_back(psoup_model_adapter_name(get(), i));
        return out;
    }
    std::int32_t find_adapter(const std::string &name) const {
        return psoup_model_find_adapter(get(), name.c_str());
    }
    /* Borrowed. */
    result<span<const float>> adapter_data(const std::string &name) const {
        const float *data = nullptr;
        std::size_t n = 0;
        auto done = detail::call(psoup_model_adapter_data, get_const(), name.c_str(), &data, &n);
        if (!done) return done.error();
        return span<const float>(data, n);
    }
    /* "P1A=0.5,P2B=0.5" */
    result<std::vector<float>> parse_mix(const std::string &text, bool any_sum = false) const {
        std::vector<float> weights(static_cast<std::size_t>(psoup_model_adapters(get())));
        auto done = detail::call(psoup_model_parse_mix, get_const(), text.c_str(), any_sum ? 1 : 0, weights.data());
        if (!done) return done.error();
        return weights;
    }

    /* ---- scores */
    result<std::vector<float>> logprobs(span<const row> rows) {
        std::size_t n = 0;
        for (const row &r : rows) n += r.tokens.empty() ? 0 : r.tokens.size() - 1;
        return scores(psoup_model_logprobs_mixed, rows, n);
    }
    result<std::vector<float>> logits(span<const row> rows) {
        auto c = config();
        if (!c) return c.error();
        std::size_t n = 0;
        for (const row &r : rows) n += r.tokens.size();
        return scores(psoup_model_logits_mixed, rows, n * static_cast<std::size_t>(c->vocab_size));
    }
    /* weights: as logprobs' result, or empty for all 1. what: PSOUP_GRADIENT_… */
    result<psoup::gradients> gradients(span<const row> rows, std::uint32_t what, span<const float> weights = {}) {
        auto c_rows = rows_of(rows);
        if (!c_rows) return c_rows.error();
        const auto methods = methods_of(rows);
        return detail::make<psoup::gradients>(psoup_model_gradients_mixed, get(), c_rows->data(), methods.data(),
                                              c_rows->size(), weights.empty() ? nullptr : weights.data(), what);
    }

    /* ---- generation */
    result<std::vector<completion>> generate(span<const prompt> prompts,
                                             const psoup_sampling &sampling = defaults<psoup_sampling>(),
                                             on_token each = {},
                                             const psoup_session_options &options = defaults<psoup_session_options>());

    /* What generate would take with these. */
    result<psoup_memory> generate_memory(span<const prompt> prompts,
                                         const psoup_sampling &sampling = defaults<psoup_sampling>(),
                                         const psoup_session_options &options = defaults<psoup_session_options>()) {
        std::vector<psoup_prompt> c_prompts;
        for (const prompt &p : prompts) {
            auto c = prompt_of(p);
            if (!c) return c.error();
            c_prompts.push_back(*c);
        }
        auto out = defaults<psoup_memory>();
        auto done = detail::call(psoup_generate_memory, get(), c_prompts.data(), c_prompts.size(), &sampling, &options,
                                 &out);
        if (!done) return done.error();
        return out;
    }

    /* Mixes have one weight per adapter or none. */
    result<const float *> mix_of(span<const float> mix) const {
        if (mix.empty()) return static_cast<const float *>(nullptr);
        const auto n = static_cast<std::size_t>(psoup_model_adapters(get()));
        if (mix.size() != n)
            return error(PSOUP_ERROR_ARGUMENT, "the mix has " + std::to_string(mix.size()) +
                                                   " weights: the model has " + std::to_string(n) + " adapters");
        return mix.data();
    }
    result<psoup_prompt> prompt_of(const prompt &p) const {
        auto mix = mix_of(p.mix);
        if (!mix) return mix.error();
        psoup_prompt out{};
        out.tokens = p.tokens.data();
        out.n = p.tokens.size();
        out.mix = *mix;
        out.sequence = p.sequence;
        out.sampling = p.sampling;
        out.mix_method = p.mix_method;
        out.mix_strength = p.mix_strength;
        return out;
    }

private:
    const psoup_model *get_const() const { return get(); }
    result<std::vector<psoup_row>> rows_of(span<const row> rows) const {
        std::vector<psoup_row> out;
        for (const row &r : rows) {
            auto mix = mix_of(r.mix);
            if (!mix) return mix.error();
            out.push_back({r.tokens.data(), r.tokens.size(), *mix});
        }
        return out;
    }
    static std::vector<std::int32_t> methods_of(span<const row> rows) {
        std::vector<std::int32_t> out;
        for (const row &r : rows) out.push_back(r.mix_method);
        return out;
    }
    template <class F> result<std::vector<float>> scores(F f, span<const row> rows, std::size_t n) {
        auto c_rows = rows_of(rows);
        if (!c_rows) return c_rows.error();
        std::vector<float> out(n);
        const auto methods = methods_of(rows);
        auto done = detail::call(f, get(), c_rows->data(), methods.data(), c_rows->size(), out.data());
        if (!done) return done.error();
        return out;
    }
};

namespace detail {
using token_callback = callback<bool(const token &)>;
inline int run_token(void *user, std::int64_t id, std::int32_t t, float logprob, psoup_finish finish) {
    auto *c = static_cast<token_callback *>(user);
    return c->run([&] { return c->function(token{id, t, logprob, finish}); });
}
} // namespace detail

class session : public handle<psoup_session, psoup_session_free> {
public:
    using handle::handle;
    static result<session> create(model &m,
                                  const psoup_session_options &options = defaults<psoup_session_options>()) {
        auto made = detail::make<session>(psoup_session_create, m.get(), &options);
        if (made) made->model_ = m.get();
        return made;
    }
    /* Everything is copied. */
    result<void> submit(std::int64_t id, const prompt &p) {
        const auto n = static_cast<std::size_t>(psoup_model_adapters(model_));
        if (!p.mix.empty() && p.mix.size() != n)
            return error(PSOUP_ERROR_ARGUMENT, "the mix has " + std::to_string(p.mix.size()) +
                                                   " weights: the model has " + std::to_string(n) + " adapters");
        psoup_prompt c{};
        c.tokens = p.tokens.data();
        c.n = p.tokens.size();
        c.mix = p.mix.empty() ? nullptr : p.mix.data();
        c.sequence = p.sequence;
        c.sampling = p.sampling;
        c.mix_method = p.mix_method;
        c.mix_strength = p.mix_strength;
        return detail::call(psoup_session_submit, get(), id, &c);
    }
    /* How many are running or waiting afterwards. */
    result<std::size_t> step(on_token each = {}) {
        detail::token_callback c(std::move(each));
        std::size_t running = 0;
        auto done = detail::call(psoup_session_step, get(), c.function ? detail::run_token : nullptr,
                                 static_cast<void *>(&c), &running);
        c.rethrow();
        if (!done) return done.error();
        return running;
    }

private:
    psoup_model *model_ = nullptr;
};

inline result<std::vector<completion>> model::generate(span<const prompt> prompts, const psoup_sampling &sampling,
                                                       on_token each, const psoup_session_options &options) {
    std::vector<psoup_prompt> c_prompts;
    for (const prompt &p : prompts) {
        auto c = prompt_of(p);
        if (!c) return c.error();
        c_prompts.push_back(*c);
    }
    using owner = handle<psoup_generation, psoup_generation_free>;
    detail::token_callback c(std::move(each));
    auto made = detail::make<owner>(psoup_generate, get(), c_prompts.data(), c_prompts.size(), &sampling, &options,
                                    c.function ? detail::run_token : nullptr, static_cast<void *>(&c));
    c.rethrow();
    if (!made) return made.error();
    std::vector<completion> out;
    for (std::size_t i = 0; i < prompts.size(); i++) {
        const psoup_completion *p = psoup_generation_get(made->get(), i);
        out.push_back({{p->tokens, p->tokens + p->n}, {p->logprobs, p->logprobs + p->n}, p->finish});
    }
    return out;
}

} // namespace psoup

#endif
