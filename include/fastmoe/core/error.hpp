// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How the library refuses: typed exceptions whose text names the argument, its value and what was expected.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include <fastmoe/core/config.hpp>

namespace fastmoe::inline FASTMOE_ABI {

using std::int32_t;
using std::int64_t;

/// The base of everything the library throws.
struct error : std::runtime_error {
    using std::runtime_error::runtime_error;
};
/// An argument that breaks a documented precondition.
struct invalid_argument : error {
    using error::error;
};
/// Memory that could not be had, or a workspace that is too small.
struct out_of_memory : error {
    using error::error;
};
/// A failure that the CUDA runtime or a CUDA library reported.
struct cuda_error : error {
    using error::error;
};
/// A peer that failed, disagreed or did not answer before the deadline.
struct comm_error : error {
    explicit comm_error(const std::string& text, bool pending = false) : error(text), messages_pending(pending) {}

    /// Messages of the call may still be on their way: a rank that was only stopped may go on. What it lent to them, to be sent
    /// or received, must stay allocated and be used for nothing else as long as the process lives.
    bool messages_pending;
};
/// A file that is truncated, corrupt or not in the documented format.
struct format_error : error {
    using error::error;
};

/// A place in the source; std::source_location without its header, which clang 14 does not have.
struct location {
    const char* file;
    int line;

    static constexpr location current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) noexcept
    {
        return {file, line};
    }
};

/// Throws Error with the given text, and what else it is made of; aborts with the same text where exceptions are switched off.
template <class Error = invalid_argument, class... More>
[[noreturn, gnu::cold]] inline void raise(const std::string& text, location where = location::current(), More... more)
{
    const char* name = where.file;
    for (const char* p = where.file; *p != '\0'; ++p)
        if (*p == '/') name = p + 1;
    std::string full("fastmoe: ");
    full.append(text).append(" [").append(name).append(":").append(std::to_string(where.line)).append("]");
#if defined(__cpp_exceptions)
    throw Error(full, more...);
#else
    (static_cast<void>(more), ...);
    std::fprintf(stderr, "%s\n", full.c_str());
    std::abort();
#endif
}

namespace detail {

inline std::string to_text(const char* s) { return s; }
inline std::string to_text(const std::string& s) { return s; }
inline std::string to_text(bool b) { return b ? "true" : "false"; }
inline std::string to_text(const void* p)
{
    char out[32];
    std::snprintf(out, sizeof out, "%p", p);
    return out;
}
inline std::string to_text(double d)
{
    char out[40];
    std::snprintf(out, sizeof out, "%g", d);
    return out;
}
template <class T>
    requires std::is_integral_v<T>
std::string to_text(T n)
{
    return std::to_string(n);
}

/// "<argument> is <part[0]>; expected <part[1]><part[2]>..."
[[gnu::cold]] inline std::string described(const char* argument, const std::string* part, int parts)
{
    std::string text(argument);
    text.append(" is ").append(part[0]).append("; expected ");
    for (int i = 1; i < parts; ++i) text.append(part[i]);
    return text;
}

/// What expects() does when it fails: apart from it, so that callers hold no strings.
template <class Error, class... Part>
[[noreturn, gnu::cold, gnu::noinline]] void fail(location where, const char* argument, const Part&... part)
{
    const std::string parts[] = {to_text(part)...};
    raise<Error>(described(argument, parts, static_cast<int>(sizeof...(Part))), where);
}

/// A truth with the place where it was asked, so that expects() can be variadic.
struct condition {
    bool holds;
    location where;

    constexpr condition(bool ok, location at = location::current()) noexcept : holds(ok), where(at) {}
};

} // namespace detail

/// Throws invalid_argument "<argument> is <actual>; expected <expected...>" unless the condition holds.
/// The text is built only on failure. Strings, numbers, pointers and shapes can be parts of it.
template <class Error = invalid_argument, class Actual, class... Expected>
inline void expects(detail::condition ok, const char* argument, const Actual& actual, const Expected&... expected)
{
    if (!ok.holds) [[unlikely]]
        detail::fail<Error>(ok.where, argument, actual, expected...);
}

} // namespace fastmoe::inline FASTMOE_ABI
