// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Workspaces of exactly the size that a measuring run asks for, and one byte less.
#pragma once

#include <cstddef>

#include <fastmoe/exec/memory.hpp>

namespace support {

/// An arena over memory of an executor, poisoned.
template <class Executor>
class workspace {
public:
    workspace(Executor& ex, std::int64_t bytes) : memory_(ex, bytes), arena_(memory_.view())
    {
        for (std::int64_t i = 0; i < bytes; ++i) memory_.data()[i] = std::byte{0xff};
    }
    fastmoe::arena& arena() { return arena_; }
    operator fastmoe::arena&() { return arena_; }

private:
    fastmoe::buffer<std::byte, Executor> memory_;
    fastmoe::arena arena_;
};

/// Runs f(arena) on a measuring arena, then on a workspace of exactly that size.
template <class Executor, class F>
void in_workspace(Executor& ex, F f)
{
    fastmoe::arena measure;
    f(measure);
    workspace memory(ex, measure.bytes());
    f(memory.arena());
}

/// The text of the exception that f throws, or "nothing was thrown".
template <class Error, class F>
std::string message_of(F f)
{
    try {
        f();
    } catch (const Error& e) {
        return e.what();
    }
    return "nothing was thrown";
}

inline bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

} // namespace support
