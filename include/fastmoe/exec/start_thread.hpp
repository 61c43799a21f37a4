// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A thread of a call's own, or an error of the library's. For who runs a rank or a transfer beside the caller.
#pragma once

#include <string>
#include <system_error>
#include <thread>

#include <fastmoe/core/error.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// @param what  the thread, in the error's words
/// @throws error if the system does not start it
template <class F>
std::thread start_thread(const char* what, const F& f)
{
#if defined(__cpp_exceptions)
    try {
        return std::thread(f);
    } catch (const std::system_error& e) {
        raise<error>(std::string(what) + " could not be started: " + e.what());
    }
#else
    static_cast<void>(what);
    return std::thread(f);
#endif
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
