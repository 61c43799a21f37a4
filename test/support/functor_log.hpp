// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Remembers which row functors ran on lanes. At the end of the program their names go to the file that FASTMOE_LANES_LOG
/// names, where test/functors/check.py compares them with the functors of the library.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <string>
#include <typeinfo>

#include <cxxabi.h>

namespace support {

class functor_log {
public:
    static functor_log& of_program()
    {
        static functor_log log;
        return log;
    }
    functor_log(const functor_log&) = delete;
    ~functor_log()
    {
        const char* path = std::getenv("FASTMOE_LANES_LOG");
        std::FILE* file = path ? std::fopen(path, "w") : nullptr;
        if (!file) return;
        for (const std::string& name : names_) std::fprintf(file, "%s\n", name.c_str());
        std::fclose(file);
    }

    void add(const std::type_info& type)
    {
        int status = 0;
        char* readable = abi::__cxa_demangle(type.name(), nullptr, nullptr, &status);
        const std::string name = status == 0 ? readable : type.name();
        std::free(readable);
        std::lock_guard lock(mutex_);
        names_.insert(name);
    }

private:
    functor_log() = default;
    std::mutex mutex_;
    std::set<std::string> names_;
};

/// F ran; epilogues and policies are part of its name.
template <class F>
void note_functor()
{
    [[maybe_unused]] static const bool once = (functor_log::of_program().add(typeid(F)), true);
}

} // namespace support
