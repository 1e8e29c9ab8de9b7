/* psoup/common.hpp: results, spans, handles and the context. See psoup.hpp. */
#ifndef PSOUP_COMMON_HPP
#define PSOUP_COMMON_HPP

#include <atomic>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>
#if __cplusplus >= 202002L
#include <span>
#endif

#include "psoup/common.h"

#if defined(__cpp_exceptions) || defined(__EXCEPTIONS)
#define PSOUP_CPP_CAN_THROW 1
#else
#define PSOUP_CPP_CAN_THROW 0
#endif

namespace psoup {

/* ---- spans ------------------------------------------------------------------------------------- */

#if __cplusplus >= 202002L
template <class T> using span = std::span<T>;
#else
/* As much of C++20's as an argument needs. */
template <class T> class span {
public:
    constexpr span() = default;
    constexpr span(T *data, std::size_t size) : data_(data), size_(size) {}
    template <std::size_t N> constexpr span(T (&array)[N]) : data_(array), size_(N) {}
    template <class C, class = std::enable_if_t<std::is_convertible_v<
                           decltype(std::declval<C &>().data()), T *> &&
                       !std::is_same_v<std::decay_t<C>, span>>>
    constexpr span(C &&container) : data_(container.data()), size_(container.size()) {}
    constexpr T *data() const { return data_; }
    constexpr std::size_t size() const { return size_; }
    constexpr bool empty() const { return size_ == 0; }
    constexpr T *begin() const { return data_; }
    constexpr T *end() const { return data_ + size_; }
    constexpr T &operator[](std::size_t i) const { return data_[i]; }

private:
    T *data_ = nullptr;
    std::size_t size_ = 0;
};
#endif

/* ---- results ----------------------------------------------------------------------------------- */

struct error {
    psoup_status status = PSOUP_OK;
    std::string message; /* one line */

    error(psoup_status s, std::string m) : status(s), message(std::move(m)) {}
    explicit error(const psoup_error &e, psoup_status s)
        : status(s), message(e.message[0] ? e.message : psoup_status_name(s)) {}
};

class exception : public std::exception {
public:
    explicit exception(psoup::error e) : error_(std::move(e)) {}
    const char *what() const noexcept override { return error_.message.c_str(); }
    psoup_status status() const noexcept { return error_.status; }

private:
    psoup::error error_;
};

#if PSOUP_CPP_CAN_THROW
[[noreturn]] inline void raise(const error &e) { throw exception(e); }
#endif

/* A T, or the error that there is instead of one. */
template <class T> class [[nodiscard]] result {
public:
    result(T value) : held_(std::in_place_index<0>, std::move(value)) {}
    result(psoup::error e) : held_(std::in_place_index<1>, std::move(e)) {}
    bool has_value() const noexcept { return held_.index() == 0; }
    explicit operator bool() const noexcept { return has_value(); }
    /* Only where there is one. */
    const psoup::error &error() const { return *std::get_if<1>(&held_); }
    T &value() & { return check(), *std::get_if<0>(&held_); }
    const T &value() const & { return check(), *std::get_if<0>(&held_); }
    T &&value() && { return check(), std::move(*std::get_if<0>(&held_)); }
    T &operator*() & { return value(); }
    const T &operator*() const & { return value(); }
    T &&operator*() && { return std::move(*this).value(); }
    T *operator->() { return &value(); }
    const T *operator->() const { return &value(); }
    T value_or(T other) && { return has_value() ? std::move(*this).value() : std::move(other); }

private:
    void check() const {
#if defined(PSOUP_CPP_EXCEPTIONS)
        if (!has_value()) raise(error());
#else
        assert(has_value());
#endif
    }
    std::variant<T, psoup::error> held_;
};

template <> class [[nodiscard]] result<void> {
public:
    result() = default;
    result(psoup::error e) : held_(std::move(e)) {}
    bool has_value() const noexcept { return held_.index() == 0; }
    explicit operator bool() const noexcept { return has_value(); }
    const psoup::error &error() const { return *std::get_if<1>(&held_); }
    void value() const {
#if defined(PSOUP_CPP_EXCEPTIONS)
        if (!has_value()) raise(error());
#else
        assert(has_value());
#endif
    }

private:
    std::variant<std::monostate, psoup::error> held_;
};

#if PSOUP_CPP_CAN_THROW
template <class T> T value_or_throw(result<T> r) {
    if (!r) raise(r.error());
    if constexpr (!std::is_void_v<T>) return std::move(r).value();
}
#endif

/* ---- options ------------------------------------------------------------------------------------- */

/* What the INIT macros set. C++17 does not know their form, which every compiler of C++17 takes. */
#if defined(__clang__)
#define PSOUP_CPP_QUIET_BEGIN                                                                      \
    _Pragma("clang diagnostic push") _Pragma("clang diagnostic ignored \"-Wpedantic\"")            \
        _Pragma("clang diagnostic ignored \"-Wc++20-designator\"")                                 \
            _Pragma("clang diagnostic ignored \"-Wmissing-field-initializers\"")
#define PSOUP_CPP_QUIET_END _Pragma("clang diagnostic pop")
#elif defined(__GNUC__)
#define PSOUP_CPP_QUIET_BEGIN                                                                      \
    _Pragma("GCC diagnostic push") _Pragma("GCC diagnostic ignored \"-Wpragmas\"")                 \
        _Pragma("GCC diagnostic ignored \"-Wpedantic\"")                                           \
            _Pragma("GCC diagnostic ignored \"-Wc++20-extensions\"")                               \
                _Pragma("GCC diagnostic ignored \"-Wmissing-field-initializers\"")
#define PSOUP_CPP_QUIET_END _Pragma("GCC diagnostic pop")
#else
#define PSOUP_CPP_QUIET_BEGIN
#define PSOUP_CPP_QUIET_END
#endif
#define PSOUP_CPP_DEFAULTS(type, init)                                                             \
    template <> inline type defaults<type>() {                                                     \
        type options = init;                                                                       \
        return options;                                                                            \
    }
template <class T> T defaults() {
    T empty{};
    empty.size = sizeof(T);
    return empty;
}
PSOUP_CPP_QUIET_BEGIN
PSOUP_CPP_DEFAULTS(psoup_context_options, PSOUP_CONTEXT_OPTIONS_INIT)
PSOUP_CPP_QUIET_END

/* ---- what the classes are made with ---------------------------------------------------------------- */

namespace detail {

/* Keeps what a callback throws until C has returned, and carries it over. Several threads may run it at
 * once: the first to throw is kept. */
class guard {
public:
    template <class F> int run(F &&f) noexcept {
#if PSOUP_CPP_CAN_THROW
        try {
            return f() ? 0 : 1;
        } catch (...) {
            if (!taken_.test_and_set()) thrown_ = std::current_exception();
            return 1;
        }
#else
        return f() ? 0 : 1;
#endif
    }
    void rethrow() {
#if PSOUP_CPP_CAN_THROW
        taken_.clear();
        if (thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
#endif
    }

private:
    std::exception_ptr thrown_;
    std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
};

/* A callback of the caller's with its guard, at an address that C can keep. */
template <class Signature> struct callback : guard {
    explicit callback(std::function<Signature> f) : function(std::move(f)) {}
    std::function<Signature> function;
};

template <class F, class... A> result<void> call(F f, A... arguments) {
    psoup_error e{};
    const psoup_status status = f(arguments..., &e);
    if (status != PSOUP_OK) return error(e, status);
    return {};
}

template <class H, class F, class... A> result<H> make(F f, A... arguments) {
    typename H::c_type *out = nullptr;
    psoup_error e{};
    const psoup_status status = f(arguments..., &out, &e);
    if (status != PSOUP_OK) return error(e, status);
    return H(out);
}

template <class C, void (*Free)(C *)> struct deleter {
    void operator()(C *p) const noexcept { Free(p); }
};

inline std::vector<const char *> c_strings(span<const std::string> texts) {
    std::vector<const char *> out;
    for (const std::string &t : texts) out.push_back(t.c_str());
    return out;
}

} // namespace detail

/* A C handle that frees itself, and after it what it borrows from us: callbacks, their state. */
template <class C, void (*Free)(C *)> class handle {
public:
    using c_type = C;
    handle() = default;
    explicit handle(C *owned) : owned_(owned) {}
    handle(handle &&) noexcept = default;
    handle &operator=(handle &&other) noexcept {
        owned_.reset();
        kept_ = std::move(other.kept_);
        owned_ = std::move(other.owned_);
        return *this;
    }
    C *get() const noexcept { return owned_.get(); }
    C *release() noexcept { return owned_.release(); }
    explicit operator bool() const noexcept { return owned_ != nullptr; }

protected:
    /* Keeps `state` as long as the C handle; its address stays. */
    template <class T> T *keep(std::unique_ptr<T> state) {
        T *address = state.get();
        kept_ = std::move(state);
        return address;
    }

private:
    std::shared_ptr<void> kept_;
    std::unique_ptr<C, detail::deleter<C, Free>> owned_;
};

/* Return false to stop: the call then fails with PSOUP_ERROR_CANCELLED. */
using progress = std::function<bool(const char *label, std::int64_t done, std::int64_t total)>;
using log = std::function<void(psoup_log_level level, const char *line)>;

namespace detail {
using progress_callback = callback<bool(const char *, std::int64_t, std::int64_t)>;
inline int run_progress(void *user, const char *label, std::int64_t done, std::int64_t total) {
    auto *c = static_cast<progress_callback *>(user);
    return c->run([&] { return c->function(label, done, total); });
}
} // namespace detail

/* ---- context ------------------------------------------------------------------------------------- */

class context : public handle<psoup_context, psoup_context_free> {
public:
    using handle::handle;
    /* A log function must not throw: nothing stands between it and C. */
    static result<context> create(psoup_context_options options = defaults<psoup_context_options>(),
                                  psoup::log log = {}) {
        std::unique_ptr<psoup::log> kept;
        if (log) {
            kept = std::make_unique<psoup::log>(std::move(log));
            options.log_user = kept.get();
            options.log = [](void *user, psoup_log_level level, const char *line) {
                (*static_cast<psoup::log *>(user))(level, line);
            };
        }
        auto made = detail::make<context>(psoup_context_create, &options);
        if (made) made->keep(std::move(kept));
        return made;
    }
    std::int32_t threads() const { return psoup_context_threads(get()); }
    const char *isa() const { return psoup_context_isa(get()); }
};

inline const char *version() { return psoup_version(); }
inline std::size_t size_of(psoup_dtype dtype) { return psoup_dtype_size(dtype); }
inline const char *name_of(psoup_dtype dtype) { return psoup_dtype_name(dtype); }
inline result<psoup_dtype> parse_dtype(const std::string &name) {
    psoup_dtype out{};
    psoup_error e{};
    const psoup_status status = psoup_dtype_parse(name.c_str(), &out, &e);
    if (status != PSOUP_OK) return error(e, status);
    return out;
}

} // namespace psoup

#endif
