// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A safetensors file whose tensors are taken by name and shape, until none is left: a missing, an extra and a wrong one
/// are refused alike, by name.
#pragma once

#include <initializer_list>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <fastmoe/io/safetensors.hpp>

namespace run_block {

namespace fm = fastmoe;
using std::int64_t;
using shape = std::vector<int64_t>;

class tensor_file {
public:
    /// @param whole  what all of it is, for messages: "a mixtral block"
    /// @throws invalid_argument if there is no such file, format_error if it is no safetensors file
    tensor_file(const std::string& path, std::string whole) : file_(path), whole_(std::move(whole)) {}

    bool has(const std::string& name) const { return file_.contains(name); }
    /// Whether there is a name for which f(name) is true.
    template <class F>
    bool any(const F& f) const
    {
        for (const auto& [name, t] : file_.tensors())
            if (f(name)) return true;
        return false;
    }

    /// The tensor under the first of these names that is there, of floating-point elements that are at most 32 bits wide.
    /// @throws format_error that names the tensor, what it is and what was expected
    const fm::io::safetensor& take(const std::vector<std::string>& names, const shape& wanted)
    {
        const std::string& name = known(names);
        const auto& tensors = file_.tensors();
        const auto found = tensors.find(name);
        const std::string expected = "expected F32, BF16 or F16 of shape " + fm::io::detail::shape_text(wanted);
        if (found == tensors.end()) {
            std::string others;
            for (std::size_t i = 1; i < names.size(); ++i) others += ", or under the name '" + names[i] + "'";
            refuse(name, "is missing; " + expected + others);
        }
        using enum fm::io::element_type;
        const auto& t = found->second;
        if ((t.type != f32 && t.type != bf16 && t.type != f16) || t.shape != wanted)
            refuse(name, facts(t) + "; " + expected);
        taken_.insert(name);
        return t;
    }
    const fm::io::safetensor& take(const std::string& name, const shape& wanted) { return take(std::vector{name}, wanted); }

    /// The extents of a tensor before it is taken. @throws format_error if it is missing or of another rank
    const shape& shape_of(const std::string& name, std::size_t rank) const
    {
        const std::string expected = "expected F32, BF16 or F16 of rank " + std::to_string(rank);
        const auto found = file_.tensors().find(name);
        if (found == file_.tensors().end()) refuse(name, "is missing; " + expected);
        const auto& t = found->second;
        if (t.shape.size() != rank) refuse(name, facts(t) + "; " + expected);
        return t.shape;
    }

    /// @throws format_error that names a tensor nobody has taken
    void expect_no_more() const
    {
        for (const auto& [name, t] : file_.tensors())
            if (!taken_.contains(name)) refuse(name, "is not a part of " + whole_ + "; expected no such tensor");
    }

private:
    static std::string facts(const fm::io::safetensor& t)
    {
        return std::string("is ") + name_of(t.type) + " of shape " + fm::io::detail::shape_text(t.shape);
    }

    const std::string& known(const std::vector<std::string>& names) const
    {
        for (const auto& name : names)
            if (file_.contains(name)) return name;
        return names.front();
    }

    [[noreturn]] void refuse(const std::string& tensor, const std::string& why) const
    {
        fm::raise<fm::format_error>("'" + file_.path() + "': tensor " + fm::io::detail::name_text(tensor) + ": " + why);
    }

    fm::io::safetensors_file file_;
    std::string whole_;
    std::set<std::string> taken_;
};

} // namespace run_block
