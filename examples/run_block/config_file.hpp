// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A model's config.json: values by key, each checked, and a message that names the key where one is not what it must be.
#pragma once

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <string>
#include <utility>

#include <sys/stat.h>

#include <nlohmann/json.hpp>

#include <fastmoe/core/error.hpp>

namespace run_block {

namespace fm = fastmoe;
using std::int64_t;

/// The objects of a configuration, read once. Keys of an object inside are named with dots in messages.
class config_file {
public:
    /// @throws format_error if the file is no JSON object in UTF-8, or cannot be read
    explicit config_file(const std::string& path) : path_(path)
    {
        const std::string text = content(path);
        // The parser takes a zero byte for the end of its input, which would let anything hide behind it.
        if (text.find('\0') != std::string::npos) refuse("it holds a zero byte; expected JSON");
        try {
            object_ = nlohmann::json::parse(text);
        } catch (const nlohmann::json::parse_error& e) {
            refuse("byte " + std::to_string(e.byte) + " is not valid JSON in UTF-8");
        } catch (const nlohmann::json::exception&) {
            refuse("it holds a number that no double can hold; expected JSON");
        }
        if (!object_.is_object()) refuse("it is " + shown(object_) + "; expected a JSON object");
    }

    const std::string& path() const { return path_; }
    /// Whether the key is there, and not null.
    bool has(const char* key) const { return object_.contains(key) && !object_.at(key).is_null(); }

    /// A whole number from `least` to 2^31 - 1.
    int64_t whole(const char* key, int64_t least = 1) const
    {
        const std::string wanted = "a whole number from " + std::to_string(least) + " on";
        const auto& v = at(key, wanted);
        const bool small = v.is_number_integer() && (!v.is_number_unsigned() || v.get<std::uint64_t>() <= INT32_MAX);
        if (!small || v.get<int64_t>() < least || v.get<int64_t>() > INT32_MAX) refuse(key, wanted);
        return v.get<int64_t>();
    }
    /// The same under the first of these keys that is there: versions of a model's code name things differently.
    int64_t whole(std::initializer_list<const char*> keys) const
    {
        for (const char* key : keys)
            if (has(key)) return whole(key);
        return whole(*keys.begin());
    }
    int64_t whole_or(const char* key, int64_t otherwise, int64_t least = 1) const
    {
        return has(key) ? whole(key, least) : otherwise;
    }
    double number(const char* key) const
    {
        const auto& v = at(key, "a number");
        if (!v.is_number()) refuse(key, "a number");
        return v.get<double>();
    }
    double number_or(const char* key, double otherwise) const { return has(key) ? number(key) : otherwise; }
    bool truth(const char* key) const
    {
        const auto& v = at(key, "true or false");
        if (!v.is_boolean()) refuse(key, "true or false");
        return v.get<bool>();
    }
    bool truth_or(const char* key, bool otherwise) const { return has(key) ? truth(key) : otherwise; }
    std::string text(const char* key) const
    {
        const auto& v = at(key, "a string");
        if (!v.is_string()) refuse(key, "a string");
        return v.get<std::string>();
    }
    std::string text_or(const char* key, const char* otherwise) const { return has(key) ? text(key) : otherwise; }

    /// An object inside.
    config_file inside(const char* key) const
    {
        const auto& v = at(key, "an object");
        if (!v.is_object()) refuse(key, "an object");
        config_file out = *this;
        out.object_ = nlohmann::json(v); // a copy first: v is a part of what it replaces
        out.prefix_ = prefix_ + key + ".";
        return out;
    }

    /// Throws a format_error that names the key, what it is and what was expected.
    [[noreturn]] void refuse(const char* key, const std::string& expected) const
    {
        const std::string actual = object_.contains(key) ? shown(object_.at(key)) : "missing";
        refuse("'" + prefix_ + key + "' is " + actual + "; expected " + expected);
    }

private:
    [[noreturn]] void refuse(const std::string& why) const { fm::raise<fm::format_error>("'" + path_ + "': " + why); }

    std::string content(const std::string& path) const
    {
        constexpr std::int64_t most = 16 << 20;
        struct stat there;
        if (::stat(path.c_str(), &there) != 0) refuse(std::strerror(errno));
        if (!S_ISREG(there.st_mode)) refuse("it is a folder or a device; expected a file");
        if (there.st_size > most) refuse("it has " + std::to_string(there.st_size) + " bytes; expected at most 16 MiB");
        std::ifstream in(path, std::ios::binary);
        std::string text{std::istreambuf_iterator<char>(in), {}};
        if (!in.is_open() || in.bad()) refuse("it cannot be read");
        return text;
    }

    const nlohmann::json& at(const char* key, const std::string& wanted) const
    {
        if (!object_.contains(key)) refuse(key, wanted);
        return object_.at(key);
    }

    /// A value for a message: short, and in one line.
    static std::string shown(const nlohmann::json& v)
    {
        if (v.is_object()) return "an object";
        if (v.is_array()) return "an array";
        const std::string text = v.dump(-1, ' ', true);
        return text.size() > 80 ? text.substr(0, 80) + "..." : text;
    }

    std::string path_, prefix_;
    nlohmann::json object_;
};

} // namespace run_block
