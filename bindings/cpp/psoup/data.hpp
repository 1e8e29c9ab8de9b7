/* psoup/data.hpp: JSON values, JSON Lines and safetensors files. See psoup.hpp. */
#ifndef PSOUP_DATA_HPP
#define PSOUP_DATA_HPP

#include <string_view>

#include "psoup/common.hpp"
#include "psoup/data.h"

namespace psoup {

/* A value inside a json: borrowed, and null where there is none. */
class json_view {
public:
    json_view(const psoup_json *value = nullptr) : value_(value) {}
    const psoup_json *get() const { return value_; }
    psoup_json_type kind() const { return psoup_json_kind(value_); }
    bool is_null() const { return kind() == PSOUP_JSON_NULL; }
    json_view operator[](const char *key) const { return psoup_json_get(value_, key); }
    template <class N, class = std::enable_if_t<std::is_integral_v<N>>> json_view operator[](N index) const {
        return psoup_json_at(value_, static_cast<std::size_t>(index));
    }
    std::size_t size() const { return psoup_json_size(value_); }
    std::int64_t integer(std::int64_t otherwise = 0) const { return psoup_json_integer(value_, otherwise); }
    double real(double otherwise = 0) const { return psoup_json_real(value_, otherwise); }
    bool boolean(bool otherwise = false) const { return psoup_json_bool(value_, otherwise) != 0; }
    const char *string(const char *otherwise = "") const { return psoup_json_string(value_, otherwise); }
    /* One line, or with indent many; empty when out of memory. */
    std::string text(int indent = 0) const {
        const std::unique_ptr<char, detail::deleter<char, psoup_text_free>> owned(
            psoup_json_text(value_, indent));
        return owned ? owned.get() : "";
    }
    /* f(key, value) for each member of an object. */
    template <class F> void each(F &&f) const {
        const char *key = nullptr;
        while (const psoup_json *value = psoup_json_next(value_, &key)) f(key, json_view(value));
    }

private:
    const psoup_json *value_;
};

/* A value of one's own. An empty handle stands for memory that ran out, and spreads: one check at the end
 * of building is enough. */
class json : public handle<psoup_json, psoup_json_free> {
public:
    using handle::handle;
    static json object() { return json(psoup_json_new_object()); }
    static json array() { return json(psoup_json_new_array()); }
    static json null() { return json(psoup_json_new_null()); }
    static json from(const char *text) { return json(psoup_json_new_string(text)); }
    static json from(const std::string &text) { return from(text.c_str()); }
    static json from(bool value) { return json(psoup_json_new_bool(value)); }
    template <class N, class = std::enable_if_t<std::is_arithmetic_v<N>>> static json from(N number) {
        if constexpr (std::is_integral_v<N>)
            return json(psoup_json_new_integer(static_cast<std::int64_t>(number)));
        else
            return json(psoup_json_new_real(static_cast<double>(number)));
    }
    static json copy(json_view value) { return json(psoup_json_copy(value.get())); }
    static result<json> parse(std::string_view text, const char *name = "text") {
        return detail::make<json>(psoup_json_parse, text.data(), text.size(), name);
    }
    static result<json> read(const context &c, const std::string &path) {
        return detail::make<json>(psoup_json_read, c.get(), path.c_str());
    }
    result<void> write(const context &c, const std::string &path) const {
        return detail::call(psoup_json_write, c.get(), path.c_str(), static_cast<const psoup_json *>(get()));
    }
    json_view view() const { return get(); }
    template <class K> json_view operator[](K key) const { return view()[key]; }
    /* False when memory ran out. */
    bool set(const char *key, json value) { return psoup_json_set(get(), key, value.release()) == 0; }
    bool append(json value) { return psoup_json_append(get(), value.release()) == 0; }
};

class jsonl_reader : public handle<psoup_jsonl_reader, psoup_jsonl_reader_free> {
public:
    using handle::handle;
    static result<jsonl_reader> open(const context &c, const std::string &path) {
        return detail::make<jsonl_reader>(psoup_jsonl_open, c.get(), path.c_str());
    }
    /* The next row; an empty json at the end of the file. */
    result<json> next() { return detail::make<json>(psoup_jsonl_next, get()); }
    std::int64_t line() const { return psoup_jsonl_line(get()); }
};

class jsonl_writer : public handle<psoup_jsonl_writer, psoup_jsonl_writer_free> {
public:
    using handle::handle;
    static result<jsonl_writer> create(const context &c, const std::string &path, bool append = false) {
        return detail::make<jsonl_writer>(psoup_jsonl_create, c.get(), path.c_str(), append ? 1 : 0);
    }
    result<void> write(json_view row) { return detail::call(psoup_jsonl_write, get(), row.get()); }
    /* Without it no file is left behind. */
    result<void> close() { return detail::call(psoup_jsonl_close, get()); }
};

inline result<void> write_safetensors(const context &c, const std::string &path,
                                      span<const psoup_named_tensor> tensors) {
    return detail::call(psoup_safetensors_write, c.get(), path.c_str(), tensors.data(), tensors.size());
}

/* Options that describe themselves: from JSON, checked for members of no table, and to JSON. */
template <class Options>
result<void> read_fields(const psoup_field *fields, json_view object, const std::string &where,
                         Options &options) {
    return detail::call(psoup_fields_read, fields, object.get(), where.c_str(), static_cast<void *>(&options));
}
inline result<void> check_fields(span<const psoup_field *const> tables, json_view object,
                                 const std::string &where) {
    return detail::call(psoup_fields_check, tables.data(), tables.size(), object.get(), where.c_str());
}
template <class Options> json fields_json(const psoup_field *fields, const Options &options) {
    return json(psoup_fields_json(fields, &options));
}

} // namespace psoup

#endif
